// Puts the story into the page whenever it has changed. The server renders and escapes every text.

const story = document.getElementById("story");
const progress = document.getElementById("progress");
const parser = new DOMParser();

// Open steps stay open, and the focus stays where it is.
const show = (text) => {
  const next = parser.parseFromString(text, "text/html");
  for (const open of story.querySelectorAll("details[open]")) next.getElementById(open.id)?.setAttribute("open", "");
  const focused = document.activeElement?.closest("#story details");
  story.replaceChildren(...next.body.childNodes);
  if (focused) document.getElementById(focused.id)?.querySelector("summary").focus();
  // An erased user cannot be erased again.
  document.getElementById("erase")?.toggleAttribute("hidden", document.getElementById("gone") !== null);
  progress.textContent = `${story.querySelectorAll("details").length} steps so far.`;
};

const { user, older } = story.dataset;
const live = new EventSource(`/live/story?${new URLSearchParams({ user, older })}`);
live.onmessage = (event) => show(JSON.parse(event.data));
