// What the live pages share: they put texts and states into the elements that the server has drawn.

// The elements with an attribute, by its value.
export const byKey = (attribute) => {
  const elements = new Map();
  for (const element of document.querySelectorAll(`[${attribute}]`)) {
    const key = element.getAttribute(attribute);
    elements.set(key, [...(elements.get(key) ?? []), element]);
  }
  return elements;
};

export const each = (elements, values, change) => {
  for (const [key, value] of Object.entries(values)) {
    for (const element of elements.get(key) ?? []) change(element, value);
  }
};

// Only a change is written, so that a screen reader says it once.
export const showText = (element, text) => {
  if (element.textContent !== text) element.textContent = text;
};

const STATES = ["good", "wait", "bad"];

export const setState = (element, state) => {
  element.classList.remove(...STATES);
  if (state) element.classList.add(state);
};
