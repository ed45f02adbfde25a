// Puts the live view into the elements that the server has drawn. The server formats every text.

import { byKey, each, setState, showText } from "/assets/live.js";

const texts = byKey("data-text");
const states = byKey("data-state");
const bars = byKey("data-bar");
const flows = byKey("data-flow");

const setWidth = (element, width) => {
  element.setAttribute("width", width);
  element.setAttribute("x", Number(element.dataset.right) - width);
};

const showProcesses = (processes) => {
  const template = document.getElementById("process");
  const rows = processes.map((process) => {
    const row = template.content.cloneNode(true);
    for (const cell of row.querySelectorAll("[data-field]")) cell.textContent = process[cell.dataset.field];
    setState(row.querySelector(".pill"), process.state);
    return row;
  });
  document.getElementById("processes").replaceChildren(...rows);
};

const show = (view) => {
  each(texts, view.texts, showText);
  each(states, view.states, setState);
  each(bars, view.widths, setWidth);
  each(flows, view.flows, (element, flowing) => element.classList.toggle("flows", flowing));
  showProcesses(view.processes);
};

// Moving dots distract some people. They have asked the system for less motion.
const still = window.matchMedia("(prefers-reduced-motion: reduce)");
const setMotion = () => {
  for (const map of document.querySelectorAll("svg.map")) {
    if (still.matches) map.pauseAnimations();
    else map.unpauseAnimations();
  }
};
still.addEventListener("change", setMotion);
setMotion();

// The browser connects again by itself.
const live = new EventSource("/live/map");
const offline = document.getElementById("offline");
live.onopen = () => { offline.hidden = true; };
live.onerror = () => { offline.hidden = false; };
live.onmessage = (event) => show(JSON.parse(event.data));
