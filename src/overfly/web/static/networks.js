"use strict";
// The networks page: upload a dropped or chosen image, and open its map.
const form = document.getElementById("upload");
const message = document.getElementById("message");
const drop = document.getElementById("drop");
const file = document.getElementById("file");

function selected() {
  const values = new FormData(form);
  return { network: values.get("network"), other: values.get("other") };
}

async function createMap(address, settings) {
  message.className = "";
  message.textContent = "Predicting …";
  try {
    const response = await fetch(address, { method: "POST", ...settings });
    const result = await response.json().catch(() => ({}));
    if (!response.ok) {
      const detail = typeof result.detail === "string" ? result.detail : `HTTP status ${response.status}`;
      throw new Error(detail);
    }
    location.assign(`/map/${encodeURIComponent(result.key)}`);
  } catch (error) {
    message.className = "warn";
    message.textContent = `Error: ${error.message}`;
  }
}

function send(image) {
  if (!image) return;
  const body = new FormData();
  body.append("image", image);
  for (const [name, value] of Object.entries(selected())) if (value) body.append(name, value);
  createMap("/maps", { body });
}

file.addEventListener("change", () => send(file.files[0]));
for (const kind of ["dragenter", "dragover"]) {
  document.addEventListener(kind, (event) => { event.preventDefault(); drop.classList.add("over"); });
}
document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
document.addEventListener("drop", (event) => {
  event.preventDefault();
  drop.classList.remove("over");
  send(event.dataTransfer.files[0]);
});
for (const button of document.querySelectorAll("[data-scene]")) {
  button.addEventListener("click", () => createMap(`/scenes/${button.dataset.scene}?${new URLSearchParams(selected())}`, {}));
}
document.getElementById("compare").addEventListener("click", () => {
  const { network, other } = selected();
  location.assign(`/compare?${new URLSearchParams({ one: network, other })}`);
});
window.addEventListener("pageshow", () => { message.textContent = ""; file.value = ""; });
