"use strict";
// The live page: says when the stream has ended, and how; its last picture then looks no longer live.
const state = document.getElementById("state");
const film = document.getElementById("film");

function say(words, still) {
  if (state.textContent !== words) state.textContent = words;
  state.classList.toggle("warn", still);
  film.classList.toggle("ended", still);
}

async function look() {
  let again = true;
  try {
    const answer = await fetch("/stream/state", { cache: "no-store" });
    if (!answer.ok) throw new Error(`the server answered ${answer.status}`);
    const found = await answer.json();
    again = found.live;
    if (!found.live) say(`This stream has ended${found.ended ? `: ${found.ended}` : ""}.`, true);
    else say(found.frames ? "" : "Waiting for the first picture …", false);
  } catch (error) {
    say("The server does not answer; the picture stands still.", true);
  }
  if (again) setTimeout(look, 1000);
}

look();
