// Adds the records that arrive to the list, the newest first.

const ROWS = 100;

const list = document.getElementById("records");
const template = document.getElementById("record");
const sampled = document.getElementById("sampled");
const pause = document.getElementById("pause");

const row = (record) => {
  const copy = template.content.cloneNode(true);
  for (const cell of copy.querySelectorAll("[data-field]")) cell.textContent = record[cell.dataset.field];
  copy.querySelector("a").setAttribute("href", record.href);
  copy.querySelector(".kind").classList.add(record.color);
  return copy;
};

const show = (update) => {
  document.getElementById("none")?.remove();
  list.prepend(...update.rows.map(row));
  while (list.children.length > ROWS) list.lastElementChild.remove();
  sampled.textContent = update.left_out > 0
    ? `Too many records to show all: ${update.left_out} of the last ${update.arrived} are left out.`
    : "";
};

// Paused: nothing is received. Then the list continues with what arrives.
let live;
const resume = () => {
  live = new EventSource(`/live/events${window.location.search}`);
  live.onmessage = (event) => show(JSON.parse(event.data));
};
pause.hidden = false;
pause.addEventListener("click", () => {
  const isPaused = pause.getAttribute("aria-pressed") === "true";
  if (isPaused) resume();
  else live.close();
  pause.setAttribute("aria-pressed", String(!isPaused));
  pause.textContent = isPaused ? "Pause" : "Resume";
});
resume();
