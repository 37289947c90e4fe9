"use strict";
// The first page: an image is dropped or chosen, sent, and its map opened.
const form = document.getElementById("ask");
const told = document.getElementById("told");
const drop = document.getElementById("drop");
const file = document.getElementById("file");

function chosen() {
  const values = new FormData(form);
  return { network: values.get("network"), other: values.get("other") };
}

async function open(address, settings) {
  told.className = "";
  told.textContent = "Working …";
  try {
    const answer = await fetch(address, { method: "POST", ...settings });
    const found = await answer.json().catch(() => ({}));
    if (!answer.ok) {
      const detail = typeof found.detail === "string" ? found.detail : `the server answered ${answer.status}`;
      throw new Error(detail);
    }
    location.assign(`/map/${encodeURIComponent(found.key)}`);
  } catch (error) {
    told.className = "warn";
    told.textContent = `That did not work: ${error.message}`;
  }
}

function send(image) {
  if (!image) return;
  const body = new FormData();
  body.append("image", image);
  for (const [name, value] of Object.entries(chosen())) if (value) body.append(name, value);
  open("/maps", { body });
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
  button.addEventListener("click", () => open(`/scenes/${button.dataset.scene}?${new URLSearchParams(chosen())}`, {}));
}
document.getElementById("compare").addEventListener("click", () => {
  const { network, other } = chosen();
  location.assign(`/compare?${new URLSearchParams({ one: network, other })}`);
});
window.addEventListener("pageshow", () => { told.textContent = ""; file.value = ""; });
