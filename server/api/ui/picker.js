// The list that adapters are picked from: search over thousands, up to four at once, by mouse or keyboard.

import { formatNumber, h, newId, replace } from "./dom.js";

export const MAX_PICKED = 4;
const MAX_SHOWN = 100;

// Lower-case words of the search must all be in the name; names that begin with it come first.
export function search(names, text) {
  const words = text.toLowerCase().split(/\s+/).filter(Boolean);
  const found = names.filter((name) => words.every((word) => name.toLowerCase().includes(word)));
  const start = words[0] ?? "";
  return found.sort((a, b) => Number(b.toLowerCase().startsWith(start)) - Number(a.toLowerCase().startsWith(start)));
}

export function makePicker({ onChange }) {
  let names = [];
  let shown = [];
  let active = 0;
  const picked = new Map(); // name -> its colour, 1 to 4
  const listId = newId("adapters");

  const box = h("input", {
    type: "search", class: "search", role: "combobox", placeholder: "Search adapters", "aria-label": "Search adapters",
    "aria-controls": listId, "aria-expanded": "true", "aria-autocomplete": "list", autocomplete: "off", spellcheck: "false",
  });
  const list = h("ul", { id: listId, class: "options", role: "listbox", "aria-multiselectable": "true", "aria-label": "Adapters" });
  const count = h("p", { class: "count", role: "status" });

  function draw() {
    const matches = search(names, box.value);
    shown = matches.slice(0, MAX_SHOWN);
    active = Math.min(active, Math.max(0, shown.length - 1));
    replace(list, shown.map((name, index) => {
      const colour = picked.get(name);
      return h("li", {
        id: `${listId}-${index}`, role: "option", class: `option ${index === active ? "active" : ""}`, "aria-selected": String(colour !== undefined),
        "data-colour": colour, title: name, onclick: () => { active = index; toggle(name); box.focus(); },
      }, h("span", { class: "tick", "aria-hidden": "true" }), h("span", { class: "option-name" }, name));
    }));
    if (shown.length) box.setAttribute("aria-activedescendant", `${listId}-${active}`);
    else box.removeAttribute("aria-activedescendant");
    const more = matches.length > shown.length ? `, the first ${MAX_SHOWN} are shown` : "";
    count.textContent = names.length === 0 ? "No adapters yet" : box.value
      ? `${formatNumber(matches.length)} of ${formatNumber(names.length)}${more}` : `${formatNumber(names.length)} adapters${more}`;
  }

  function toggle(name) {
    if (picked.has(name)) picked.delete(name);
    else if (picked.size < MAX_PICKED) {
      const used = new Set(picked.values());
      picked.set(name, [1, 2, 3, 4].find((colour) => !used.has(colour)));
    } else {
      count.textContent = `${MAX_PICKED} at most: take one off first`;
      return;
    }
    draw();
    onChange(picked);
  }

  box.addEventListener("input", () => { active = 0; draw(); });
  box.addEventListener("keydown", (event) => {
    const moves = { ArrowDown: active + 1, ArrowUp: active - 1, PageDown: active + 8, PageUp: active - 8 };
    if (event.key in moves) active = Math.max(0, Math.min(shown.length - 1, moves[event.key]));
    else if (event.key === "Enter" && shown[active] !== undefined) toggle(shown[active]);
    else if (event.key === "Escape" && box.value) { box.value = ""; active = 0; }
    else return;
    event.preventDefault();
    if (event.key !== "Enter") draw();
    list.children[active]?.scrollIntoView({ block: "nearest" });
  });

  return {
    element: h("div", { class: "picker" }, h("h2", { class: "panel-title" }, "Adapters"), box, list, count),
    picked,
    toggle,
    // Take over the names; what is no longer there is no longer picked. The first time, the first few are picked.
    setNames(next, pickFirst) {
      names = next;
      const gone = [...picked.keys()].filter((name) => !next.includes(name));
      gone.forEach((name) => picked.delete(name));
      if (pickFirst) next.slice(0, MAX_PICKED).forEach((name, index) => picked.set(name, index + 1));
      draw();
      onChange(picked);
    },
  };
}
