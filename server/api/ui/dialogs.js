// Dialogs: the key, and "are you sure". Native <dialog>: focus is kept inside and goes back to where it was, Escape closes.

import { getKey, setKey } from "./api.js";
import { field, h, newId } from "./dom.js";

// A modal dialog with a title and a form; `onSubmit(form)` may be async and throws what is then shown. Resolves to whether it was done.
export function openDialog({ title, body, submit, danger = false, onSubmit = async () => {}, actions = [] }) {
  return new Promise((resolve) => {
    const titleId = newId("dialog");
    const problem = h("p", { class: "problem", role: "alert", hidden: true });
    const go = h("button", { class: `button ${danger ? "danger" : "primary"}`, type: "submit" }, submit);
    let done = false;
    const form = h("form", { method: "dialog" },
      h("h2", { id: titleId }, title), body, problem,
      h("div", { class: "dialog-actions" }, actions,
        h("button", { class: "button", type: "button", onclick: () => dialog.close() }, "Cancel"), go));
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      go.disabled = true;
      go.setAttribute("aria-busy", "true");
      problem.hidden = true;
      try {
        await onSubmit(form);
        done = true;
        dialog.close();
      } catch (error) {
        problem.textContent = error.message;
        problem.hidden = false;
      } finally {
        go.disabled = false;
        go.removeAttribute("aria-busy");
      }
    });
    const dialog = h("dialog", { class: "dialog", "aria-labelledby": titleId }, form);
    dialog.addEventListener("close", () => {
      dialog.remove();
      resolve(done);
    });
    document.body.append(dialog);
    dialog.showModal();
  });
}

export function confirm({ title, text, submit, danger = true, onSubmit }) {
  return openDialog({ title, body: h("p", {}, text), submit, danger, onSubmit });
}

export function askForKey() {
  const input = h("input", { type: "password", name: "key", autocomplete: "off", spellcheck: "false", value: getKey(), autofocus: true });
  const forget = getKey()
    ? h("button", { class: "button quiet", type: "button", onclick: (event) => { setKey(""); event.target.closest("dialog").close(); } }, "Forget it")
    : null;
  return openDialog({
    title: "Your key",
    body: h("div", {},
      field("Key", input, "The server’s admin key, a tenant’s key, or an API Gateway key. It stays in this tab and goes out in a header alone.")),
    submit: "Use this key",
    actions: [forget],
    onSubmit: async () => setKey(input.value.trim()),
  });
}

// What stands in a view that may not be seen without a key.
export function keyNotice(error, what) {
  const off = error.status === 403 && !getKey();
  return h("div", { class: "empty" },
    h("h2", {}, `${what} need a key`),
    h("p", {}, off || error.status === 403 ? error.message : "They are for whoever shows a key that may see them: the server’s admin key, for one. The demo prints its own when it starts."),
    h("button", { class: "button primary", onclick: askForKey }, getKey() ? "Use another key" : "Enter a key"));
}
