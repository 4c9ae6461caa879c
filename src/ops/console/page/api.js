// What this page asks of the port that it came from. The token is kept in this page's memory alone: it is gone when the page is closed or loaded again.

const LIMIT_MS = 15000;

/** What whoever looks may do, as the port has told it last. */
export const session = { may_read: true, may_change: false, has_token: false, version: "", source: "" };

let token = "";
let operator = "";

async function ask(path, options = {}) {
  const headers = { Accept: "application/json", ...options.headers };
  if (token) headers.Authorization = `Bearer ${token}`;
  let answer;
  try {
    answer = await fetch(path, { ...options, headers, cache: "no-store", credentials: "omit", redirect: "error", signal: AbortSignal.timeout(LIMIT_MS) });
  } catch (error) {
    throw new Error(error.name === "TimeoutError" ? "The daemon has not answered in time." : "The daemon cannot be reached. Is it running?");
  }
  const text = await answer.text();
  let content = {};
  try { content = JSON.parse(text); } catch { content = { error: text.trim() }; }
  if (!answer.ok) {
    const error = new Error(content.error || `The daemon answered ${answer.status}.`);
    error.status = answer.status;
    throw error;
  }
  return content;
}

/** A document. `words`: what is behind the question mark; empty ones are left out. */
export function get(path, words = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(words)) {
    for (const one of [value].flat()) if (one !== "" && one !== undefined && one !== null) query.append(name, one);
  }
  return ask(query.size ? `${path}?${query}` : path);
}

/** A change. */
export function post(path, body) {
  const named = operator ? { ...body, operator } : body;
  return ask(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(named) });
}

/** Takes a token and a name into use, or lays them aside; says whether the token is right. */
export async function enter(given, name) {
  token = given;
  operator = name;
  await refreshSession();
  if (!session.may_change) token = "";
  return session.may_change;
}

export async function refreshSession() {
  Object.assign(session, await get("/api/session"));
}

/** Waits for the end of a change that takes longer than its answer. */
export async function ended(action) {
  while (action.state === "running") {
    await new Promise((done) => setTimeout(done, 1000));
    const { actions } = await get("/api/actions");
    action = actions.find((other) => other.number === action.number) ?? { ...action, state: "failed", error: "The daemon was started again meanwhile." };
  }
  if (action.state === "failed") throw new Error(action.error);
  return action.result;
}
