// Talks to the server: requests, the API key, and answers that arrive in pieces.

const KEY = "everybit-key";
const $ = (id) => document.getElementById(id);
let asking = null; // the answer to the one open key dialog

const storedKey = () => sessionStorage.getItem(KEY);

function askForKey(message) {
  asking ??= new Promise((resolve) => {
    const dialog = $("key-dialog");
    $("key-message").textContent = message;
    $("key").value = "";
    dialog.returnValue = "";
    dialog.addEventListener("close", () => {
      asking = null;
      const key = $("key").value.trim();
      const given = dialog.returnValue === "use" && key !== "";
      if (given) sessionStorage.setItem(KEY, key);
      resolve(given);
    }, { once: true });
    dialog.showModal();
    $("key").focus();
  });
  return asking;
}

async function failure(response) {
  const body = await response.json().catch(() => null);
  return new Error(body?.error?.message || `The server answered with status ${response.status}.`);
}

/** fetch, with the stored API key; asks for one at a 401, unless `quiet`. Throws whatever the server complains about. */
export async function request(path, options = {}, quiet = false) {
  for (;;) {
    const key = storedKey();
    const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
    const response = await fetch(path, { ...options, headers }).catch((error) => {
      throw error instanceof TypeError ? new Error("The server cannot be reached.") : error;
    });
    if (response.ok) return response;
    const error = await failure(response);
    if (response.status !== 401 || quiet) throw error;
    const another = storedKey() !== key; // given meanwhile, to a request beside this one
    if (!another && !(await askForKey(error.message))) throw error;
  }
}

export const post = (path, body, signal) =>
  request(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });

/** Splits a server-sent event stream, cut anywhere, into the data of its events. */
export class EventSplitter {
  #rest = "";
  #data = [];

  push(text, end = false) {
    const events = [];
    const lines = (this.#rest + text).split("\n");
    this.#rest = end ? "" : lines.pop();
    for (const line of end ? [...lines, ""] : lines) {
      if (line.startsWith("data:")) this.#data.push(line.slice(line[5] === " " ? 6 : 5).replace(/\r$/, ""));
      else if (line.trim() === "" && this.#data.length) {
        events.push(this.#data.join("\n"));
        this.#data = [];
      }
    }
    return events;
  }
}

/** The JSON frames of a streamed answer, up to [DONE] or the end of the stream. */
export async function* frames(response) {
  const reader = response.body.getReader();
  const decoder = new TextDecoder();
  const splitter = new EventSplitter();
  try {
    for (;;) {
      const { done, value } = await reader.read();
      for (const data of splitter.push(done ? decoder.decode() : decoder.decode(value, { stream: true }), done)) {
        if (data === "[DONE]") return;
        yield JSON.parse(data);
      }
      if (done) return;
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
