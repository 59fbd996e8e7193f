// The third view: queue, KV blocks, rates, tiers and each adapter's rates, asked once a second while it is looked at.

import { ApiError, getJson } from "./api.js";
import { partsBar, timeChart, topOf } from "./chart.js";
import { keyNotice } from "./dialogs.js";
import { formatAge, formatBytes, formatNumber, formatSeconds, h, replace } from "./dom.js";
import { tierWords } from "./tiers.js";

const EVERY_S = 1;
const NUM_KEPT = 120; // samples of a server: two minutes
const RATE_S = 10; // rates of adapters are over so long

export function makeLive(root, server) {
  const histories = new Map(); // server id -> samples, the last one newest
  let chosen = "";
  let timer = null;
  let isShown = false;
  let isPaused = false;

  const pause = h("button", { class: "button small", "aria-pressed": "false", onclick: () => {
    isPaused = !isPaused;
    pause.setAttribute("aria-pressed", String(isPaused));
    pause.textContent = isPaused ? "Go on" : "Pause";
    if (!isPaused) poll();
  } }, "Pause");
  const which = h("select", { "aria-label": "Server", hidden: true, onchange: () => { chosen = which.value; draw(); } });
  const headline = h("p", { class: "headline" });
  const notice = h("div", {});
  const tiles = h("div", { class: "tiles" });
  const perAdapter = h("div", { class: "panel table-panel" });
  const whole = h("div", { class: "live" }, h("div", { class: "toolbar" }, headline, which, pause), tiles, perAdapter);
  replace(root, h("h1", { class: "visually-hidden" }, "Live"), notice, whole);
  whole.hidden = true;

  async function poll() {
    clearTimeout(timer);
    if (!isShown || isPaused) return;
    if (!document.hidden) {
      try {
        take(await getJson("v1/stats"));
        replace(notice);
        whole.hidden = false;
        draw();
      } catch (error) {
        if (!(error instanceof ApiError)) throw error;
        whole.hidden = error.needsKey;
        replace(notice, error.needsKey ? keyNotice(error, "Live numbers") : h("p", { class: "notice", role: "alert" }, error.message));
        if (error.needsKey) return; // asked again with another key
      }
    }
    timer = setTimeout(poll, EVERY_S * 1000);
  }

  function take(sample) {
    const history = histories.get(sample.server) ?? [];
    history.push(sample);
    histories.set(sample.server, history.slice(-NUM_KEPT));
    for (const [id, kept] of histories) if (sample.time - kept.at(-1).time > NUM_KEPT) histories.delete(id);
    if (!histories.has(chosen)) chosen = sample.server;
    const ids = [...histories.keys()].sort();
    which.hidden = ids.length < 2;
    if ([...which.options].map((one) => one.value).join() !== ids.join()) replace(which, ids.map((id) => h("option", { value: id }, `server ${id}`)));
    which.value = chosen;
  }

  function draw() {
    const history = histories.get(chosen);
    const now = history.at(-1);
    const bad = now.engines.filter((engine) => engine.unhealthy !== null);
    headline.textContent = [
      `${now.engines.length === 1 ? now.engines[0].device : `${now.engines.length} engines`}, up ${formatAge(now.uptime_s)}`,
      now.draining ? "draining" : "", bad.length ? `not serving: ${bad.map((engine) => `${engine.device} (${engine.unhealthy})`).join(", ")}` : "",
    ].filter(Boolean).join(" · ");
    headline.classList.toggle("bad", bad.length > 0 || now.draining);
    const values = (read) => padded(history.map(read));
    const rates = (read) => padded(ratesOf(history, read));
    const tokens = rates((one) => one.totals.output_tokens);
    const requests = rates((one) => one.totals.requests);
    const firstToken = padded(firstTokens(history));
    replace(tiles,
      chartTile({ title: "Requests under way", value: formatNumber(now.queue.running + now.queue.waiting + now.queue.preparing), stacked: true, series: [
        { name: "running", colour: "c1", values: values((one) => one.queue.running) },
        { name: "waiting", colour: "c3", values: values((one) => one.queue.waiting) },
        { name: "preparing", colour: "c0", values: values((one) => one.queue.preparing) },
      ], foot: `load ${formatNumber(now.queue.load, 2)} of what fits at once` }),
      chartTile({ title: "Output tokens a second", value: formatNumber(last(tokens), 0), series: [{ name: "tokens/s", colour: "c1", values: tokens }],
        foot: `${formatNumber(now.totals.output_tokens)} since the start` }),
      chartTile({ title: "Requests a second", value: formatNumber(last(requests), 1), series: [{ name: "requests/s", colour: "c2", values: requests }],
        foot: `${formatNumber(now.totals.failed)} of ${formatNumber(now.totals.requests)} failed or were dropped` }),
      chartTile({ title: "Mean time to first token", value: formatSeconds(last(firstToken)), format: formatSeconds,
        series: [{ name: "first token", colour: "c4", values: firstToken }], foot: "of requests that ended in the last seconds" }),
      chartTile({ title: "KV blocks", value: now.kv.total ? `${Math.round((now.kv.used / now.kv.total) * 100)} %` : "–", most: Math.max(1, now.kv.total), series: [
        { name: "used", colour: "c1", values: values((one) => one.kv.used) },
        { name: "reusable prefixes", colour: "c3", values: values((one) => one.kv.cached) },
      ], foot: `${formatNumber(now.kv.used)} of ${formatNumber(now.kv.total)} blocks, ${cacheShare(now)} of prompt tokens read from the cache` }),
      tiersTile(now.tiers));
    drawAdapters(history, now);
  }

  function tiersTile(tiers) {
    const parts = [["device", "c1", tiers.device, tiers.device_bytes], ["host", "c2", tiers.host, tiers.host_bytes], ["disk", "c0", tiers.disk, null]]
      .map(([tier, colour, value, bytes]) => ({ name: tierWords(tier, server.device)[0], colour, value, bytes }));
    const total = parts.reduce((sum, part) => sum + part.value, 0);
    return h("article", { class: "tile panel" }, h("h2", {}, "Adapters by tier"), h("p", { class: "big" }, formatNumber(total)),
      partsBar({ parts, label: `Adapters by tier: ${parts.map((part) => `${part.name} ${part.value}`).join(", ")}` }),
      h("ul", { class: "legend rows" }, parts.map((part) => h("li", {}, h("span", { class: `swatch ${part.colour}`, "aria-hidden": "true" }),
        h("span", {}, part.name), h("span", { class: "grow" }, formatNumber(part.value)), h("span", { class: "hint", title: part.bytes === null ? null : "copies of adapters in a nearer tier included" }, part.bytes === null ? "" : formatBytes(part.bytes))))),
      tiers.device_bytes_max ? h("p", { class: "hint" }, `${formatBytes(tiers.device_bytes_max)} of device memory may hold adapters`) : null);
  }

  function drawAdapters(history, now) {
    const before = history.findLast((one) => now.time - one.time >= RATE_S) ?? history[0];
    const elapsed = now.time - before.time;
    const known = new Map(before.adapters.map((row) => [`${row.source} ${row.adapter}`, row]));
    const rows = now.adapters.map((row) => {
      const old = known.get(`${row.source} ${row.adapter}`) ?? { requests: 0, failures: 0, tokens: 0, first_token_s: 0 };
      const num = row.requests - old.requests;
      return { row, requests: num, rate: elapsed > 0 ? num / elapsed : 0, tokens: elapsed > 0 ? (row.tokens - old.tokens) / elapsed : 0,
        firstToken: num > 0 ? (row.first_token_s - old.first_token_s) / num : NaN };
    }).sort((a, b) => b.tokens - a.tokens || b.row.requests - a.row.requests || (a.row.adapter < b.row.adapter ? -1 : 1));
    const most = Math.max(1e-9, ...rows.map((one) => one.tokens));
    const cell = (label, ...children) => h("td", { "data-label": label }, children);
    replace(perAdapter, h("h2", { class: "panel-title" }, "By adapter"),
      rows.length === 0 ? h("p", { class: "hint" }, "No adapter has answered yet.") : h("table", { class: "rates" },
        h("caption", { class: "visually-hidden" }, `Rates of each adapter over the last ${RATE_S} seconds`),
        h("thead", {}, h("tr", {}, ["Adapter", "Tokens/s", "Requests/s", "First token", "Requests", "Failed"].map((label) => h("th", { scope: "col" }, label)))),
        h("tbody", {}, rows.slice(0, 50).map(({ row, rate, tokens, firstToken }) => h("tr", {},
          h("th", { scope: "row", class: "column-id" }, h("span", { class: "name", title: row.adapter }, row.adapter === "_other" ? "all others" : row.adapter)),
          cell("Tokens/s", h("span", { class: "metered" }, partsBar({ parts: [{ name: "", colour: "c1", value: tokens }], whole: most, label: "share" }), formatNumber(tokens, 1))),
          cell("Requests/s", formatNumber(rate, 2)), cell("First token", formatSeconds(firstToken)),
          cell("Requests", formatNumber(row.requests)), cell("Failed", formatNumber(row.failures)))))));
  }

  return {
    show() { isShown = true; poll(); },
    hide() { isShown = false; clearTimeout(timer); },
  };
}

function chartTile({ title, value, series, stacked = false, most, format = (number) => formatNumber(number, number < 10 ? 1 : 0), foot }) {
  const label = `${title}: ${series.map((one) => `${one.name} ${format(last(one.values) ?? NaN)}`).join(", ")}`;
  return h("article", { class: "tile panel" }, h("h2", {}, title), h("p", { class: "big" }, value),
    h("div", { class: "plot" }, timeChart({ series, num: NUM_KEPT, stacked, most, label, format }),
      h("span", { class: "top-label", "aria-hidden": "true" }, format(topOf(series, NUM_KEPT, stacked, most)))),
    series.length > 1 ? h("ul", { class: "legend" }, series.map((one) => h("li", {}, h("span", { class: `swatch ${one.colour}`, "aria-hidden": "true" }), one.name))) : null,
    h("p", { class: "hint" }, foot));
}

function last(values) {
  return values.at(-1) ?? NaN;
}

function padded(values) {
  return [...Array(NUM_KEPT - values.length).fill(null), ...values];
}

// What a total grew by, a second, between each sample and the ones a few seconds before it.
function ratesOf(history, read) {
  return history.map((one, index) => {
    const before = history[Math.max(0, index - 3)];
    const elapsed = one.time - before.time;
    return elapsed > 0 ? Math.max(0, read(one) - read(before)) / elapsed : null;
  });
}

function firstTokens(history) {
  return history.map((one, index) => {
    const before = history[Math.max(0, index - 5)];
    const num = one.totals.succeeded - before.totals.succeeded;
    return num > 0 ? (one.totals.first_token_s - before.totals.first_token_s) / num : null;
  });
}

function cacheShare(now) {
  const { cached_tokens: cached, prompt_tokens: prompt } = now.totals;
  return prompt + cached > 0 ? `${Math.round((cached / (prompt + cached)) * 100)} %` : "0 %";
}
