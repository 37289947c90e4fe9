"use strict";
// The networks page: upload a dropped or chosen image, or choose one of the server, and open its map.
const form = document.getElementById("upload");
const message = document.getElementById("message");
const drop = document.getElementById("drop");
const file = document.getElementById("file");
const fields = document.getElementById("fields");
const names = ["bands", "max_value", "nodata"];
let image = null;  // an upload {body} or a scene {scene}

function selected() {
  const values = new FormData(form);
  return { network: values.get("network"), other: values.get("other") };
}

function say(text, error) {
  message.className = error ? "warn" : "";
  message.textContent = text;
}

async function call(address, settings) {
  const response = await fetch(address, settings);
  const result = await response.json().catch(() => ({}));
  if (response.ok) return result;
  const error = new Error(typeof result.detail === "string" ? result.detail : `HTTP status ${response.status}`);
  error.status = response.status;
  throw error;
}

function body(values) {
  const data = new FormData();
  if (image.file) data.append("image", image.file);
  for (const [name, value] of Object.entries(values)) if (value) data.append(name, value);
  return data;
}

async function createMap() {
  say("Reading the image …");
  const given = fields.open ? Object.fromEntries(names.map((name) => [name, form.elements[name].value.trim()])) : {};
  try {
    const result = await call(image.file ? "/maps" : `/scenes/${image.scene}`, { method: "POST", body: body({ ...selected(), ...given }) });
    location.assign(`/map/${encodeURIComponent(result.key)}`);
  } catch (error) {
    if (error.status === 400 && !fields.open) await describe().catch(() => {});
    say(`Error: ${error.message}`, true);
  }
}

// Fill in the fields from the file and the network A.
async function describe() {
  const { network } = selected();
  const found = await call(image.file ? "/images" : `/scenes/${image.scene}?${new URLSearchParams({ network })}`, image.file ? { method: "POST", body: body({ network }) } : {});
  for (const name of names) form.elements[name].value = found[name];
  fields.open = true;
  document.getElementById("about").textContent = `${image.name}: ${found.width}×${found.height} pixels, ${found.image_bands} bands, ${found.dtype}. The network reads ${found.network_bands} bands of values up to ${found.network_max_value}.`;
  document.getElementById("make").hidden = false;
}

async function choose(chosen) {
  if (!chosen.file && chosen.scene === undefined) return;
  image = chosen;
  if (!fields.open) return createMap();
  say("Reading the image …");
  return describe().then(() => say("Check the fields, then make the map."), (error) => say(`Error: ${error.message}`, true));
}

const chooseFile = (chosen) => choose({ file: chosen, name: chosen && chosen.name });
file.addEventListener("change", () => chooseFile(file.files[0]));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  chooseFile(event.dataTransfer.files[0]);
});
for (const button of document.querySelectorAll("[data-scene]")) {
  button.addEventListener("click", () => choose({ scene: button.dataset.scene, name: button.textContent }));
}
form.addEventListener("submit", (event) => { event.preventDefault(); if (image) createMap(); });
document.getElementById("compare").addEventListener("click", () => {
  const { network, other } = selected();
  location.assign(`/compare?${new URLSearchParams({ one: network, other })}`);
});
window.addEventListener("pageshow", () => { say(""); file.value = ""; });
