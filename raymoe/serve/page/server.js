// Requests to the server that this page came from, with the key if there is one.

const KEY = "raymoe-key";
const TIMEOUT_MS = 15000;

export class ServerError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

export const key = {
  get: () => sessionStorage.getItem(KEY) ?? "",
  set: (value) => (value ? sessionStorage.setItem(KEY, value) : sessionStorage.removeItem(KEY)),
};

// Relative to the page, so that an application under another route prefix works as well.
const at = (path) => new URL(path, document.baseURI).href;

function headers(extra = {}) {
  return key.get() ? { ...extra, Authorization: `Bearer ${key.get()}` } : extra;
}

async function checked(response) {
  if (response.ok) return response;
  let message = `the server answered with status ${response.status}`;
  try {
    message = (await response.json()).error.message;
  } catch {
    // no JSON: the status has to do
  }
  throw new ServerError(message, response.status);
}

export async function get(path) {
  const response = await fetch(at(path), { headers: headers(), signal: AbortSignal.timeout(TIMEOUT_MS) });
  return (await checked(response)).json();
}

function post(path, body, signal) {
  return fetch(at(path), {
    method: "POST",
    headers: headers({ "Content-Type": "application/json" }),
    body: JSON.stringify(body),
    signal,
  });
}

export async function change(path, body) {
  return (await checked(await post(path, body, AbortSignal.timeout(TIMEOUT_MS)))).json();
}

/** The events of a streamed answer, parsed. Throws ServerError for one that carries an error. */
export async function* stream(path, body, signal) {
  const response = await checked(await post(path, { ...body, stream: true }, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const data = event
        .split(/\r?\n/)
        .filter((line) => line.startsWith("data:"))
        .map((line) => line.slice(5).trim())
        .join("\n");
      if (!data || data === "[DONE]") continue;
      const parsed = JSON.parse(data);
      if (parsed.error) throw new ServerError(parsed.error.message, 200);
      yield parsed;
    }
  }
}
