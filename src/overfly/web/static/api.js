"use strict";
// The API page: /openapi.json as tables.
function element(name, text, kind) {
  const created = document.createElement(name);
  if (text !== undefined) created.textContent = text;
  if (kind) created.className = kind;
  return created;
}

function typeName(schema) {
  if (!schema) return "";
  if (schema.anyOf) return schema.anyOf.filter((option) => option.type !== "null").map(typeName).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.type === "array") return `list of ${typeName(schema.items)}`;
  return schema.contentMediaType || schema.format === "binary" ? "file" : schema.type || "";
}

function resolve(schemas, schema) {
  return schema && schema.$ref ? schemas.components.schemas[schema.$ref.split("/").pop()] : schema;
}

function rows(schemas, operation) {
  const result = (operation.parameters || []).map(({ name, in: location, schema, required, description }) => [name, location, typeName(schema), required, description || schema.description, schema.default]);
  const body = Object.entries((operation.requestBody || { content: {} }).content)[0];
  if (body) {
    const schema = resolve(schemas, body[1].schema);
    for (const [name, property] of Object.entries(schema.properties || {})) {
      result.push([name, "form", typeName(property), (schema.required || []).includes(name), property.description, property.default]);
    }
  }
  return result;
}

function describe(schemas, path, method, operation) {
  const part = element("details");
  const summary = element("summary");
  summary.append(element("code", `${method.toUpperCase()} ${path}`), ` ${(operation.description || operation.summary || "").split("\n")[0]}`);
  part.append(summary);
  const inputs = rows(schemas, operation);
  if (inputs.length) {
    const table = element("table");
    const head = table.createTHead().insertRow();
    for (const heading of ["name", "in", "type", "default", "meaning"]) head.append(element("th", heading));
    const body = table.createTBody();
    for (const [name, location, type, required, meaning, value] of inputs) {
      const row = body.insertRow();
      for (const text of [name, location, type, required ? "required" : value ?? "", meaning || ""]) row.insertCell().textContent = text;
    }
    const scroll = element("div", undefined, "scroll");
    scroll.append(table);
    part.append(scroll);
  }
  const responses = element("ul");
  for (const [status, response] of Object.entries(operation.responses)) {
    const kinds = Object.keys(response.content || {}).join(", ");
    responses.append(element("li", `${status}: ${response.description}${kinds ? ` (${kinds})` : ""}`));
  }
  part.append(responses);
  return part;
}

document.getElementById("address").textContent = `${location.origin}/`;
fetch("/openapi.json").then((response) => response.json()).then((schemas) => {
  const container = document.getElementById("api");
  for (const [path, methods] of Object.entries(schemas.paths)) {
    for (const [method, operation] of Object.entries(methods)) container.append(describe(schemas, path, method, operation));
  }
});
