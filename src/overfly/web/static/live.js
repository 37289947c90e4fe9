"use strict";
// The live page: polls the state of the stream, and shows its end and the reason.
const message = document.getElementById("state");
const stream = document.getElementById("stream");

function show(text, ended) {
  if (message.textContent !== text) message.textContent = text;
  message.classList.toggle("warn", ended);
  stream.classList.toggle("ended", ended);
}

async function poll() {
  let again = true;
  try {
    const response = await fetch("/stream/state", { cache: "no-store" });
    if (!response.ok) throw new Error(`HTTP status ${response.status}`);
    const state = await response.json();
    again = state.live;
    if (!state.live) show(`This stream has ended${state.end_reason ? `: ${state.end_reason}` : ""}.`, true);
    else show(state.frames ? "" : "Waiting for the first frame …", false);
  } catch (error) {
    show("No connection to the server; the image is not live.", true);
  }
  if (again) setTimeout(poll, 1000);
}

poll();
