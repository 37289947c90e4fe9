"use strict";
// The API page: /openapi.json as tables.
function element(name, text, kind) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

function typeName(schema) {
  if (!schema) return "";
  if (schema.anyOf) return schema.anyOf.filter((each) => each.type !== "null").map(typeName).join(" or ");
  if (schema.enum) return schema.enum.join(" | ");
  if (schema.$ref) return schema.$ref.split("/").pop();
  if (schema.type === "array") return `list of ${typeName(schema.items)}`;
  return schema.contentMediaType || schema.format === "binary" ? "file" : schema.type || "";
}

function resolve(schemas, schema) {
  return schema && schema.$ref ? schemas.components.schemas[schema.$ref.split("/").pop()] : schema;
}

function rows(schemas, operation) {
  const found = (operation.parameters || []).map((each) => [each.name, each.in, typeName(each.schema), each.required, each.description || each.schema.description, each.schema.default]);
  const body = Object.entries((operation.requestBody || { content: {} }).content)[0];
  if (body) {
    const schema = resolve(schemas, body[1].schema);
    for (const [name, each] of Object.entries(schema.properties || {})) {
      found.push([name, "form", typeName(each), (schema.required || []).includes(name), each.description, each.default]);
    }
  }
  return found;
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
    for (const words of ["name", "in", "type", "default", "meaning"]) head.append(element("th", words));
    const body = table.createTBody();
    for (const [name, where, type, required, meaning, value] of inputs) {
      const row = body.insertRow();
      for (const words of [name, where, type, required ? "required" : value ?? "", meaning || ""]) row.insertCell().textContent = words;
    }
    const scroll = element("div", undefined, "scroll");
    scroll.append(table);
    part.append(scroll);
  }
  const answers = element("ul");
  for (const [status, answer] of Object.entries(operation.responses)) {
    const kinds = Object.keys(answer.content || {}).join(", ");
    answers.append(element("li", `${status}: ${answer.description}${kinds ? ` (${kinds})` : ""}`));
  }
  part.append(answers);
  return part;
}

document.getElementById("address").textContent = `${location.origin}/`;
fetch("/openapi.json").then((answer) => answer.json()).then((schemas) => {
  const container = document.getElementById("api");
  for (const [path, methods] of Object.entries(schemas.paths)) {
    for (const [method, operation] of Object.entries(methods)) container.append(describe(schemas, path, method, operation));
  }
});
