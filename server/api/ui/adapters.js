// The second view: every adapter with its state, and the orders: publish, load, pin, unload, roll back, delete.

import { adapterPath, ApiError, getJson, listAdapters } from "./api.js";
import { confirm, keyNotice, openDialog } from "./dialogs.js";
import { field, formatAge, formatBytes, formatNumber, formatSeconds, h, replace, toast } from "./dom.js";
import { search } from "./picker.js";
import { tierWords } from "./tiers.js";

const REFRESH_S = 3;
const MAX_SHOWN = 100;

const COLUMNS = [
  ["id", "Name", (row) => row.id],
  ["state", "State", (row) => row.state],
  ["tier", "Where", (row) => ["device", "host", "disk", "absent"].indexOf(row.tier)],
  ["size", "Size", (row) => row.memory_bytes || row.file_bytes || 0],
  ["hits", "Hits", (row) => row.hits ?? 0],
  ["requests", "Running", (row) => row.requests ?? 0],
  ["owner", "Owner", (row) => row.owner ?? ""],
];

// order -> what is asked before it; null: nothing is.
const ORDERS = {
  load: { word: "Load", done: "is loaded" },
  pin: { word: "Pin", done: "is pinned" },
  unpin: { word: "Unpin", done: "is no longer pinned" },
  unload: {
    word: "Unload", done: "is unloaded",
    ask: "Its memory is freed on every server when its last request there has ended, and its pin is taken. The next request loads it again.",
  },
  rollback: { word: "Roll back", done: "answers with the version before", ask: "The version before answers again, on every server, from the next request on." },
  delete: {
    word: "Delete", done: "is deleted", method: "DELETE",
    ask: "The name answers no more, on every server; requests that run on it still end. Its source is left alone.",
  },
};

export function makeAdapters(root, server) {
  let rows = [];
  let sorted = ["hits", -1];
  let numShown = MAX_SHOWN;
  let timer = null;
  let isShown = false;

  const box = h("input", { type: "search", class: "search", placeholder: "Search adapters", "aria-label": "Search adapters", spellcheck: "false" });
  const state = h("select", { "aria-label": "State" }, h("option", { value: "" }, "any state"),
    ["ready", "loading", "fetching", "idle", "failed"].map((one) => h("option", {}, one)), h("option", { value: "pinned" }, "pinned"));
  const publishButton = h("button", { class: "button primary", onclick: publish }, "Publish…");
  const count = h("p", { class: "count", role: "status" });
  const head = h("tr", {});
  const bodyRows = h("tbody", {});
  const more = h("button", { class: "button", hidden: true, onclick: () => { numShown += MAX_SHOWN; draw(); } }, "Show more");
  const table = h("div", { class: "panel table-panel" },
    h("div", { class: "toolbar" }, box, state, publishButton), count,
    h("table", { class: "adapters" }, h("caption", { class: "visually-hidden" }, "Adapters"), h("thead", {}, head), bodyRows), more);
  const notice = h("div", {});
  replace(root, h("h1", { class: "visually-hidden" }, "Adapters"), notice, table);
  box.addEventListener("input", draw);
  state.addEventListener("change", draw);

  // Owners are shown where there are any: a server without tenants has none.
  function columns() {
    return COLUMNS.filter(([key]) => key !== "owner" || rows.some((row) => row.owner));
  }

  function drawHead() {
    replace(head, columns().map(([key, label]) => {
      const order = sorted[0] === key ? (sorted[1] > 0 ? "ascending" : "descending") : null;
      return h("th", { scope: "col", class: `column-${key}`, "aria-sort": order }, h("button", {
        class: "sorter", "data-row": `column ${key}`, onclick: () => { sorted = [key, sorted[0] === key ? -sorted[1] : key === "id" ? 1 : -1]; draw(); },
      }, label, h("span", { class: "arrow", "aria-hidden": "true" }, order === "ascending" ? "▲" : order ? "▼" : "")));
    }), h("th", { scope: "col" }, h("span", { class: "visually-hidden" }, "Orders")));
  }

  function draw() {
    const names = new Set(search([...new Set(rows.map((row) => row.id))], box.value));
    const valueOf = COLUMNS.find(([key]) => key === sorted[0])[2];
    const matches = rows.filter((row) => names.has(row.id) && (!state.value || (state.value === "pinned" ? row.pinned : row.state === state.value)));
    matches.sort((a, b) => {
      const [x, y] = [valueOf(a), valueOf(b)];
      return (x < y ? -1 : x > y ? 1 : 0) * sorted[1] || (a.id < b.id ? -1 : 1);
    });
    const focused = document.activeElement?.dataset?.row;
    drawHead();
    replace(bodyRows, matches.slice(0, numShown).map(drawRow));
    if (focused) table.querySelector(`button[data-row="${CSS.escape(focused)}"]`)?.focus(); // drawn anew, focus stays
    more.hidden = matches.length <= numShown;
    count.textContent = matches.length === rows.length ? `${formatNumber(rows.length)} adapters`
      : `${formatNumber(matches.length)} of ${formatNumber(rows.length)} adapters`;
    if (rows.length === 0) count.textContent = "No adapters yet: publish one, or ask for an id of a source";
  }

  function drawRow(row) {
    const [where, explained] = tierWords(row.tier, server.device);
    const cell = (key, label, ...children) => h("td", { class: `column-${key}`, "data-label": label }, children);
    return h("tr", {},
      h("th", { scope: "row", class: "column-id" },
        h("span", { class: "name", title: row.id }, row.id),
        row.version ? h("span", { class: "badge", title: `Published version ${row.version}` }, `v${row.version}`) : null,
        row.pinned ? h("span", { class: "badge pinned", title: "Kept in memory on every server" }, "pinned") : null),
      cell("state", "State", h("span", { class: "state", "data-state": row.state, title: row.error ?? "" }, row.state)),
      cell("tier", "Where", h("span", { class: "badge tier", "data-tier": row.tier, title: explained }, where)),
      cell("size", "Size", formatBytes(row.memory_bytes || row.file_bytes)),
      cell("hits", "Hits", formatNumber(row.hits)),
      cell("requests", "Running", formatNumber(row.requests)),
      columns().length === COLUMNS.length ? cell("owner", "Owner", row.owner ?? "shared") : null,
      h("td", { class: "column-open" }, h("button", { class: "button small", "data-row": row.id, "aria-label": `Open ${row.id}`, onclick: () => open(row) }, "Open")));
  }

  async function refresh() {
    clearTimeout(timer);
    try {
      const found = await listAdapters();
      rows = found.rows;
      replace(notice);
      table.hidden = false;
      if (isShown && !document.hidden) draw();
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      table.hidden = error.needsKey;
      replace(notice, error.needsKey ? keyNotice(error, "Adapters") : h("p", { class: "notice", role: "alert" }, error.message));
      if (error.needsKey) return; // asked again with another key
    }
    if (isShown) timer = setTimeout(refresh, REFRESH_S * 1000 * (rows.length > 2000 ? 10 : 1));
  }

  async function give(row, order) {
    const { method = "POST", done } = ORDERS[order];
    await getJson(adapterPath(row.id, method === "DELETE" ? "" : order), { method });
    toast(`${row.id} ${done}`);
    await refresh();
  }

  // Everything about one adapter, with its orders. Those that take something away ask first.
  function open(row) {
    const facts = [
      ["State", row.state], ["Where", tierWords(row.tier, server.device)[0]], ["In memory", formatBytes(row.memory_bytes)],
      ["Files", formatBytes(row.file_bytes)], ["Rank", row.rank ?? "–"], ["Trained on", row.base ?? "–"],
      ["Version", row.version ? `${row.version}, published ${formatAge(Date.now() / 1000 - row.published_at)} ago` : "not published: the source’s own"],
      ["Comes from", `${row.source}: ${row.source_id}`], ["Content", row.hash ? row.hash.slice(0, 16) : "–"],
      ["Last load", formatSeconds(row.load_s)], ["Requests", `${formatNumber(row.hits)} since the start, ${formatNumber(row.requests)} running`],
      ...(row.owner ? [["Owner", row.owner]] : []),
    ];
    const problem = h("p", { class: "problem", role: "alert", hidden: true });
    const named = row.source_id !== row.id || row.version !== null;
    const orders = ["load", row.pinned ? "unpin" : "pin", "unload", ...(row.past_versions?.length ? ["rollback"] : []), "delete"];
    const buttons = orders.map((order) => h("button", {
      class: `button ${order === "delete" ? "danger-text" : ""}`, type: "button", onclick: async (event) => {
        const { ask, word } = ORDERS[order];
        problem.hidden = true;
        if (ask) {
          const done = await confirm({ title: `${word} ${row.id}?`, text: ask, submit: word, danger: order !== "rollback", onSubmit: () => give(row, order) });
          if (done) dialog.close();
          return;
        }
        event.target.disabled = true;
        event.target.setAttribute("aria-busy", "true");
        try {
          await give(row, order);
          dialog.close();
        } catch (error) {
          problem.textContent = error.message;
          problem.hidden = false;
        } finally {
          event.target.disabled = false;
          event.target.removeAttribute("aria-busy");
        }
      },
    }, ORDERS[order].word));
    const dialog = h("dialog", { class: "dialog wide", "aria-label": row.id },
      h("h2", {}, row.id), row.error ? h("p", { class: "problem" }, row.error) : null,
      h("dl", { class: "facts" }, facts.map(([label, value]) => h("div", {}, h("dt", {}, label), h("dd", {}, String(value))))),
      problem,
      h("div", { class: "dialog-actions" }, buttons, named ? h("button", { class: "button", type: "button", onclick: () => { dialog.close(); publish(row); } }, "New version…") : null,
        h("button", { class: "button primary", type: "button", autofocus: true, onclick: () => dialog.close() }, "Close")));
    dialog.addEventListener("close", () => dialog.remove());
    document.body.append(dialog);
    dialog.showModal();
  }

  async function publish(row) {
    const known = row?.id ? row : null;
    const name = h("input", { required: true, maxlength: "1024", value: known?.id ?? "", placeholder: "team/sql", spellcheck: "false", autocomplete: "off" });
    const source = h("select", {}, ["", "local", "s3", "hub"].map((one) => h("option", { value: one, selected: known?.source === one }, one || "the server’s own")));
    const id = h("input", { maxlength: "1024", value: known?.source_id ?? "", placeholder: "the name itself", spellcheck: "false", autocomplete: "off" });
    const replaces = h("input", { type: "checkbox", checked: true });
    const pin = h("input", { type: "checkbox", checked: known?.pinned ?? false });
    const check = (input, label) => h("label", { class: "check" }, input, label);
    await openDialog({
      title: known ? `A new version of ${known.id}` : "Publish an adapter",
      body: h("div", { class: "fields" },
        field("Name", name, "What requests will call it."), field("Source", source), field("Id in the source", id, "Fetched, checked and loaded before the name means it."),
        check(replaces, "Replace what the name means now"), check(pin, "Keep it in memory on every server")),
      submit: "Publish",
      onSubmit: async () => {
        const body = { name: name.value.trim(), replace: replaces.checked, pin: pin.checked };
        if (source.value) body.source = source.value;
        if (id.value.trim()) body.id = id.value.trim();
        const found = await getJson("v1/adapters", { method: "POST", body });
        toast(`${found.id} answers with version ${found.version}`);
        await refresh();
      },
    });
  }

  return {
    show() { isShown = true; refresh(); },
    hide() { isShown = false; clearTimeout(timer); },
  };
}
