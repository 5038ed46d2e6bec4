// Requests to our own server. All addresses are relative, so that the page works wherever the server is mounted.

const KEPT = "steploom-key"; // of this tab only: sessionStorage ends with it

export class ApiError extends Error {
  constructor(status, { message, code, param } = {}) {
    super(message ?? `the server answered ${status}`);
    Object.assign(this, { status, code, param });
  }
}

export const setKey = (key) => sessionStorage.setItem(KEPT, key);

function withKey(headers) {
  const key = sessionStorage.getItem(KEPT);
  return key ? { ...headers, Authorization: `Bearer ${key}` } : headers;
}

/** The response, if it is a good one. Raises ApiError otherwise. */
export async function ask(path, { headers = {}, ...options } = {}) {
  const response = await fetch(path, { ...options, headers: withKey(headers), cache: "no-store" });
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new ApiError(response.status, body.error);
}

/** The server-sent events of a response, as {id, kind, data}. EventSource could not send a key. */
export async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      const found = parsed(part);
      if (found) yield found;
    }
  }
}

function parsed(text) {
  const event = { id: null, kind: "message", data: null };
  for (const line of text.split("\n")) {
    if (line.startsWith("id: ")) event.id = Number(line.slice(4));
    else if (line.startsWith("event: ")) event.kind = line.slice(7);
    else if (line.startsWith("data: ")) event.data = JSON.parse(line.slice(6));
  }
  return event.data === null ? null : event; // comments keep the connection awake
}
