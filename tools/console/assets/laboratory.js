// Keeps the indicators and the conditions up to date, and copies commands.

import { byKey, each, setState, showText } from "/assets/live.js";

const texts = byKey("data-text");
const states = byKey("data-state");
const notes = document.getElementById("notes");
const template = document.getElementById("note");
let shownNotes = "";

const noteRow = (note) => {
  const row = template.content.cloneNode(true);
  for (const cell of row.querySelectorAll("[data-field]")) cell.textContent = note[cell.dataset.field];
  return row;
};

const show = (view) => {
  each(texts, view.texts, showText);
  each(states, view.states, setState);
  const newNotes = JSON.stringify(view.notes);
  if (newNotes !== shownNotes) notes.replaceChildren(...view.notes.map(noteRow));
  shownNotes = newNotes;
};

const live = new EventSource("/live/laboratory");
const offline = document.getElementById("offline");
live.onopen = () => { offline.hidden = true; };
live.onerror = () => { offline.hidden = false; };
live.onmessage = (event) => show(JSON.parse(event.data));

// Browsers offer the clipboard only on localhost and over TLS.
for (const button of document.querySelectorAll("button[data-copy]")) {
  button.hidden = !navigator.clipboard;
  button.addEventListener("click", async () => {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "Copied";
  });
}
