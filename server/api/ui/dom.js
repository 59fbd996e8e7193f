// Elements and small words. Text only ever becomes text: nothing that the server or a model says is read as HTML.

const SVG = "http://www.w3.org/2000/svg";

// An element: attributes, `on*` as listeners, `class`, and children (strings become text; null and false are left out).
export function h(tag, attributes = {}, ...children) {
  return fill(document.createElement(tag), attributes, children);
}

export function svg(tag, attributes = {}, ...children) {
  return fill(document.createElementNS(SVG, tag), attributes, children);
}

function fill(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : String(value));
  }
  element.append(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

export function replace(parent, ...children) {
  parent.replaceChildren(...children.flat(2).filter((child) => child !== null && child !== undefined && child !== false));
}

let numIds = 0;
export function newId(prefix) {
  numIds += 1;
  return `${prefix}-${numIds}`;
}

// A label above its control, with a hint below.
export function field(label, control, hint) {
  control.id ||= newId("field");
  const note = hint ? h("span", { class: "hint", id: `${control.id}-hint` }, hint) : null;
  if (note) control.setAttribute("aria-describedby", note.id);
  return h("div", { class: "field" }, h("label", { for: control.id }, label), control, note);
}

export function formatBytes(bytes) {
  if (bytes === null || bytes === undefined) return "–";
  let value = bytes;
  for (const unit of ["B", "kB", "MB", "GB"]) {
    if (value < 1000) return `${unit === "B" || value >= 100 ? Math.round(value) : value.toFixed(1)} ${unit}`;
    value /= 1000;
  }
  return `${value.toFixed(1)} TB`;
}

export function formatSeconds(seconds) {
  if (seconds === null || seconds === undefined || !Number.isFinite(seconds)) return "–";
  if (seconds < 1) return `${Math.round(seconds * 1000)} ms`;
  return seconds < 120 ? `${seconds.toFixed(seconds < 10 ? 2 : 1)} s` : `${Math.round(seconds / 60)} min`;
}

export function formatNumber(value, digits = 0) {
  if (value === null || value === undefined || !Number.isFinite(value)) return "–";
  return value.toLocaleString("en", { maximumFractionDigits: digits, minimumFractionDigits: value < 100 ? digits : 0 });
}

export function formatAge(seconds) {
  for (const [unit, size] of [["day", 86400], ["hour", 3600], ["minute", 60]]) {
    const count = Math.floor(seconds / size);
    if (count >= 1) return `${count} ${unit}${count === 1 ? "" : "s"}`;
  }
  return "less than a minute";
}

// A message at the edge of the page. Errors stay until they are closed.
export function toast(text, kind = "info") {
  const box = document.getElementById("toasts");
  const close = () => message.remove();
  const message = h("div", { class: `toast ${kind}`, role: kind === "error" ? "alert" : null },
    h("span", {}, text), h("button", { class: "icon-button", "aria-label": "Close this message", onclick: close }, "×"));
  box.append(message);
  while (box.children.length > 4) box.firstElementChild.remove();
  if (kind !== "error") setTimeout(close, 6000);
}
