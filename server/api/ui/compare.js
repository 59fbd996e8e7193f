// The first view: one prompt to the base and up to four adapters at once, answers streamed side by side.

import { ApiError, getJson, streamEvents } from "./api.js";
import { askForKey, keyNotice } from "./dialogs.js";
import { field, formatNumber, formatSeconds, h, replace } from "./dom.js";
import { makePicker } from "./picker.js";
import { tierWords } from "./tiers.js";

const EXAMPLES = [
  "What is the capital of France?",
  "Greta Costa, a tailor from Geneva, is 52.",
  "Table cars(brand, color, price). What is the average price of the cars?",
  "My laptop should have come on Monday and is still not here.",
];

export function makeCompare(root, server) {
  let base = "";
  let abort = null;
  let loadedOnce = false;

  const chips = h("div", { class: "chips", role: "group", "aria-label": "Asked" });
  const picker = makePicker({ onChange: drawChips });
  const prompt = h("textarea", { rows: "3", name: "prompt", placeholder: "Ask them all something", "aria-label": "Prompt" });
  prompt.value = EXAMPLES[0];
  const maxTokens = h("input", { type: "number", min: "1", max: "4096", value: "96", inputmode: "numeric" });
  const temperature = h("input", { type: "number", min: "0", max: "2", step: "0.1", value: "0", inputmode: "decimal" });
  const form = h("select", {}, h("option", { value: "chat" }, "chat message"), h("option", { value: "text" }, "plain text"));
  const ask = h("button", { class: "button primary ask", type: "submit" }, "Ask", h("kbd", { "aria-hidden": "true" }, "Ctrl ↵"));
  const said = h("p", { class: "visually-hidden", role: "status" });
  const answers = h("div", { class: "answers" });
  const notice = h("div", {});
  const examples = h("div", { class: "examples" }, h("span", { class: "hint" }, "Try"),
    EXAMPLES.map((text) => h("button", { class: "example", type: "button", onclick: () => { prompt.value = text; prompt.focus(); } }, text)));

  const asking = h("form", { class: "asking panel" }, chips, prompt,
    h("div", { class: "asking-row" }, field("Tokens", maxTokens), field("Temperature", temperature), field("As", form), ask), examples);
  asking.addEventListener("submit", (event) => { event.preventDefault(); abort ? stop() : run(); });
  prompt.addEventListener("keydown", (event) => {
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) { event.preventDefault(); asking.requestSubmit(); }
  });
  replace(root, h("h1", { class: "visually-hidden" }, "Compare adapters"), notice,
    h("div", { class: "compare" }, h("aside", { class: "panel" }, picker.element), h("div", { class: "stage" }, asking, said, answers)));

  function drawChips(picked) {
    replace(chips, h("span", { class: "chip", "data-colour": "0" }, "base"),
      [...picked].map(([name, colour]) => h("span", { class: "chip", "data-colour": colour }, h("span", { class: "chip-name" }, name),
        h("button", { class: "icon-button", type: "button", "aria-label": `Take ${name} off`, onclick: () => picker.toggle(name) }, "×"))));
    if (!abort) drawCards();
  }

  function cardNames() {
    return [["", 0], ...picker.picked];
  }

  let cards = [];
  function drawCards() {
    cards = cardNames().map(([name, colour]) => makeCard(name, colour, server));
    replace(answers, cards.map((card) => card.element));
  }

  async function load() {
    try {
      const { data } = await getJson("v1/models");
      base = data.find((model) => model.parent === null)?.id ?? "";
      replace(notice);
      picker.setNames(data.filter((model) => model.parent !== null).map((model) => model.id), !loadedOnce);
      loadedOnce = true;
    } catch (error) {
      if (!(error instanceof ApiError)) throw error;
      replace(notice, error.needsKey ? keyNotice(error, "Answers") : h("p", { class: "notice", role: "alert" }, error.message));
    }
  }

  function stop() {
    abort?.abort();
  }

  async function run() {
    if (!prompt.value.trim()) { prompt.focus(); return; }
    for (const input of [maxTokens, temperature]) if (!input.reportValidity()) return;
    abort = new AbortController();
    ask.firstChild.textContent = "Stop";
    ask.classList.add("stopping");
    drawCards();
    said.textContent = `${cards.length} answers are on their way`;
    const wishes = { max_tokens: Number(maxTokens.value), temperature: Number(temperature.value) };
    let numDone = 0;
    await Promise.all(cards.map(async (card) => {
      await stream(card, prompt.value, wishes, abort.signal);
      numDone += 1;
      said.textContent = `${numDone} of ${cards.length} answers are there`;
    }));
    abort = null;
    ask.firstChild.textContent = "Ask";
    ask.classList.remove("stopping");
  }

  async function stream(card, text, wishes, signal) {
    const isChat = form.value === "chat";
    const asked = isChat ? { messages: [{ role: "user", content: text }] } : { prompt: text };
    const body = { model: card.name || base, ...asked, ...wishes, stream: true, stream_options: { include_usage: true } };
    const begunAt = performance.now();
    let [firstAt, lastAt, numPieces, numTokens] = [0, 0, 0, 0];
    const rate = (count) => (count > 1 && lastAt > firstAt ? ((count - 1) * 1000) / (lastAt - firstAt) : NaN);
    card.begin();
    try {
      const events = streamEvents(isChat ? "v1/chat/completions" : "v1/completions", body, {
        signal, onHeaders: (headers) => card.showTier(headers.get("x-adapter-tier")),
      });
      for await (const event of events) {
        const choice = event.choices[0];
        const piece = choice?.delta?.content ?? choice?.text;
        if (piece) {
          lastAt = performance.now();
          firstAt ||= lastAt;
          numPieces += 1;
          card.add(piece);
          card.showNumbers((firstAt - begunAt) / 1000, rate(numPieces), numPieces);
        }
        if (choice?.finish_reason) card.showEnd(choice.finish_reason);
        if (event.usage) {
          numTokens = event.usage.completion_tokens;
          card.showTier(event.adapter_tier);
          if (firstAt) card.showNumbers((firstAt - begunAt) / 1000, rate(numTokens), numTokens);
        }
      }
      card.end();
    } catch (error) {
      if (error.name === "AbortError") card.end("stopped");
      else card.fail(error);
    }
  }

  return { show: load, hide() {} };
}

// One answer: its text as it comes, and the numbers below it.
function makeCard(name, colour, server) {
  const text = h("div", { class: "answer-text", tabindex: "0", "aria-label": `Answer of ${name || "the base"}` });
  const tier = h("span", { class: "badge tier", hidden: true });
  const numbers = h("dl", { class: "numbers" });
  const end = h("span", { class: "hint answer-end" });
  const element = h("article", { class: "answer", "data-colour": colour, "aria-busy": "false" },
    h("header", {}, h("h2", { title: name || server.base }, name || "base"), tier), text, h("footer", {}, numbers, end));
  const tail = document.createTextNode("");
  text.append(tail);

  function number(label, value) {
    return h("div", {}, h("dt", {}, label), h("dd", {}, value));
  }
  function showNumbers(firstTokenS, tokensPerS, numTokens) {
    replace(numbers, number("first token", formatSeconds(firstTokenS)), number("tokens/s", formatNumber(tokensPerS, 1)),
      number("tokens", formatNumber(numTokens)));
  }
  showNumbers(NaN, NaN, NaN);

  return {
    name, element, showNumbers,
    begin() { element.setAttribute("aria-busy", "true"); },
    add(piece) {
      const atEnd = text.scrollHeight - text.scrollTop - text.clientHeight < 24;
      tail.appendData(piece);
      if (atEnd) text.scrollTop = text.scrollHeight;
    },
    showTier(value) {
      if (!value) return;
      const [word, explained] = tierWords(value, server.device);
      tier.textContent = word;
      tier.title = explained;
      tier.dataset.tier = value;
      tier.hidden = false;
    },
    showEnd(reason) { end.textContent = reason === "length" ? "cut off at the token limit" : ""; },
    end(word = "") {
      element.setAttribute("aria-busy", "false");
      if (word) end.textContent = word;
    },
    fail(error) {
      element.setAttribute("aria-busy", "false");
      element.classList.add("failed");
      text.append(h("p", { class: "problem", role: "alert" }, error.message),
        error.needsKey ? h("button", { class: "button", type: "button", onclick: askForKey }, "Enter a key") : "");
    },
  };
}
