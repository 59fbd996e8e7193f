// The API as the page uses it: where it is, the caller's key, JSON answers, streams of tokens.
//
// The key lives in sessionStorage and in one header; it is never part of a URL. The API takes it as a bearer token, API Gateway as x-api-key:
// which one is right is found out with the first answer that is not a refusal, and remembered beside the key.

const ROOT = new URL("..", import.meta.url); // the page's own prefix, whatever a gateway put before it
const KEY = "manylora.key";
const STYLE = "manylora.key-header";
const STYLES = {
  bearer: (key) => ({ authorization: `Bearer ${key}` }),
  gateway: (key) => ({ "x-api-key": key }),
};

export const keyChanges = new EventTarget();

export function getKey() {
  return sessionStorage.getItem(KEY) ?? "";
}

export function setKey(key) {
  sessionStorage.removeItem(STYLE);
  if (key) sessionStorage.setItem(KEY, key);
  else sessionStorage.removeItem(KEY);
  keyChanges.dispatchEvent(new Event("change"));
}

// What the server answered instead of what was asked for; status 0: it did not answer.
export class ApiError extends Error {
  constructor(status, message) {
    super(message);
    this.status = status;
  }

  get needsKey() {
    return this.status === 401 || this.status === 403;
  }
}

async function send(path, options) {
  const key = getKey();
  const known = sessionStorage.getItem(STYLE);
  const styles = key ? (known ? [known] : Object.keys(STYLES)) : [null];
  let refused = null;
  for (const style of styles) {
    const headers = { ...options.headers, ...(style ? STYLES[style](key) : {}) };
    let response;
    try {
      response = await fetch(new URL(path, ROOT), { ...options, headers, credentials: "omit", cache: "no-store", redirect: "error" });
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new ApiError(0, "The server does not answer. Is it running, and is this page from it?");
    }
    if (response.status !== 401 && response.status !== 403) {
      if (style && response.ok && key === getKey()) sessionStorage.setItem(STYLE, style);
      return response;
    }
    refused ??= response; // the first refusal is the API's own; the second try's is of a header that it may not know
  }
  return refused;
}

async function failure(response) {
  let body = null;
  try {
    body = await response.json();
  } catch {
    // not ours: a gateway's page
  }
  const told = body?.error?.message ?? (typeof body?.error === "string" ? body.error : body?.message);
  const wait = response.headers.get("retry-after");
  return new ApiError(response.status, (told ?? `The server answered ${response.status}.`) + (wait ? ` Try again in ${wait} s.` : ""));
}

// The JSON of an answer; ApiError for anything but a success.
export async function getJson(path, { method = "GET", body, signal } = {}) {
  const headers = body === undefined ? {} : { "content-type": "application/json" };
  const response = await send(path, { method, headers, signal, body: body === undefined ? undefined : JSON.stringify(body) });
  if (!response.ok) throw await failure(response);
  return response.json();
}

export async function isHealthy() {
  const response = await send("health", { method: "GET" });
  return response.ok ? null : (await failure(response)).message;
}

// Each event of a stream of server-sent events, as parsed JSON, until [DONE]. `onHeaders` sees the response's headers first.
export async function* streamEvents(path, body, { signal, onHeaders = () => {} }) {
  const response = await send(path, { method: "POST", signal, headers: { "content-type": "application/json" }, body: JSON.stringify(body) });
  if (!response.ok) throw await failure(response);
  onHeaders(response.headers);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let pending = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) throw new ApiError(0, "The stream ended before the answer did.");
      const frames = (pending + value).split("\n\n");
      pending = frames.pop();
      for (const frame of frames) {
        if (!frame.startsWith("data:")) continue; // a keep-alive comment
        const data = frame.slice(5).trim();
        if (data === "[DONE]") return;
        const event = JSON.parse(data);
        if (event.error) throw new ApiError(0, event.error.message ?? String(event.error));
        yield event;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}

// Names in a path: a name may hold slashes, which stay.
export function adapterPath(name, order = "") {
  return `v1/adapters/${name.split("/").map(encodeURIComponent).join("/")}${order ? `/${order}` : ""}`;
}

// Every adapter that requests may name, with its state; needs the right to give orders.
export async function listAdapters(signal) {
  const rows = [];
  for (let after = null; ; after = rows.at(-1).id) {
    const page = await getJson(`v1/adapters?limit=1000${after === null ? "" : `&after=${encodeURIComponent(after)}`}`, { signal });
    rows.push(...page.data);
    if (!page.has_more || page.data.length === 0) return { rows, draining: page.draining };
  }
}
