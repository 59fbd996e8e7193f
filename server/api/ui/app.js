// The page: tabs, the state of the server in the header, the key. Each view is a module with `show` and `hide`.

import { makeAdapters } from "./adapters.js";
import { getJson, getKey, isHealthy, keyChanges } from "./api.js";
import { makeCompare } from "./compare.js";
import { askForKey } from "./dialogs.js";
import { makeLive } from "./live.js";

const NAMES = ["compare", "adapters", "live"];
const HEALTH_S = 5;

// What is known of the server, for all views: `device` decides what "device memory" is called.
const server = { base: "", device: "" };

const makers = { compare: makeCompare, adapters: makeAdapters, live: makeLive };
const views = Object.fromEntries(NAMES.map((name) => [name, makers[name](document.getElementById(`view-${name}`), server)]));
const tabs = NAMES.map((name) => document.getElementById(`tab-${name}`));
let shown = "";

function show(name, focus = false) {
  if (shown === name) return;
  if (shown) views[shown].hide();
  shown = name;
  NAMES.forEach((one, index) => {
    document.getElementById(`view-${one}`).hidden = one !== name;
    tabs[index].setAttribute("aria-selected", String(one === name));
    tabs[index].tabIndex = one === name ? 0 : -1;
    if (one === name && focus) tabs[index].focus();
  });
  if (location.hash !== `#${name}`) history.replaceState(null, "", `#${name}`);
  document.title = `${tabs[NAMES.indexOf(name)].textContent} · manylora`;
  views[name].show();
}

tabs.forEach((tab, index) => {
  tab.addEventListener("click", () => show(NAMES[index]));
  tab.addEventListener("keydown", (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    const next = step ? (index + step + NAMES.length) % NAMES.length : { Home: 0, End: NAMES.length - 1 }[event.key];
    if (next === undefined) return;
    event.preventDefault();
    show(NAMES[next], true);
  });
});

const status = document.getElementById("status");
function showStatus(state, text) {
  if (status.dataset.state === state && status.lastElementChild.textContent === text) return; // said once, not each time
  status.dataset.state = state;
  status.lastElementChild.textContent = text;
}

async function watch() {
  if (!document.hidden) {
    try {
      const problem = await isHealthy();
      if (problem === null && !server.base) await learn();
      showStatus(problem === null ? "good" : "bad", problem === null ? server.base || "serving" : problem);
    } catch (error) {
      showStatus("bad", error.message);
    }
  }
  setTimeout(watch, HEALTH_S * 1000);
}

async function learn() {
  try {
    const info = await getJson("info");
    server.base = info.model_id;
    server.device = info.engine?.device ?? "";
  } catch {
    // not for this caller: the views say so themselves
  }
}

const keyButton = document.getElementById("key-button");
function showKey() {
  keyButton.classList.toggle("has-key", Boolean(getKey()));
  keyButton.setAttribute("aria-label", getKey() ? "Key: one is set" : "Key: none is set");
}
keyButton.addEventListener("click", askForKey);
keyChanges.addEventListener("change", async () => {
  showKey();
  if (!server.base) await learn();
  views[shown].hide();
  views[shown].show();
});

showKey();
await learn();
showStatus(server.base ? "good" : "", server.base || "connecting…");
show(NAMES.includes(location.hash.slice(1)) ? location.hash.slice(1) : "compare");
addEventListener("hashchange", () => NAMES.includes(location.hash.slice(1)) && show(location.hash.slice(1)));
watch();
