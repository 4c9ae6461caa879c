// The console: which section is shown, when the daemon is asked, the token, and the keyboard.

import { el, lasting, show, toast } from "./dom.js";
import { enter, get, refreshSession, session } from "./api.js";
import { form, open } from "./dialog.js";
import { overview } from "./overview.js";
import { workers } from "./workers.js";
import { letters } from "./letters.js";
import { audit } from "./audit.js";
import { settings } from "./settings.js";

const SECTIONS = { overview, workers, letters, audit, settings };
const STATUS_EVERY_MS = 2000;
const HISTORY_EVERY_MS = 5000;

const place = (id) => document.getElementById(id);
let current = overview;
let status = null;
let takenAt = 0;
let isAsking = false;

function words() {
  const [name, query] = location.hash.slice(1).split("?");
  return [SECTIONS[name] ? name : "overview", new URLSearchParams(query)];
}

async function enterSection() {
  const [name, query] = words();
  current = SECTIONS[name];
  document.title = `${current.name} · Tidegate`;
  navigate();
  show(place("main"), current.page);
  if (!session.may_read) return;
  await current.entered?.(query);
  if (status) await current.told?.(status, refresh);
}

function navigate() {
  const open = status?.pipelines.reduce((sum, one) => sum + (one.dead_letters ?? 0), 0);
  show(place("nav"), Object.entries(SECTIONS).map(([name, section]) => el("a", { href: `#${name}`, id: `nav-${name}`, "aria-current": section === current ? "page" : null },
    section.name, section === letters && open ? el("span", { class: "count", "aria-label": `${open} open` }, open.toLocaleString("en-US")) : null)));
}

async function refresh() {
  if (isAsking || document.hidden) return;
  isAsking = true;
  try {
    if (!session.may_read) await refreshSession();
    locked();
    if (session.may_read) {
      status = await get("/api/status");
      takenAt = performance.now() - status.taken_ms_ago;
      notice("");
      navigate();
      await current.told?.(status, refresh);
    }
  } catch (error) {
    if (error.status === 401) { session.may_read = false; session.may_change = false; }
    notice(status ? `${error.message} What is shown is old.` : error.message);
    if (!status && session.may_read) current.refused?.(error);
  } finally {
    isAsking = false;
    age();
  }
}

/** A console whose reading needs the token says so in the place of everything. */
function locked() {
  place("token").textContent = session.may_change ? "Changes allowed" : session.has_token ? "Read only: enter the token" : "Read only";
  place("token").classList.toggle("on", session.may_change);
  place("source").textContent = session.source;
  if (!session.may_read) show(place("main"), el("p", { class: "empty" }, "This console is locked. ", el("button", { type: "button", id: "unlock", class: "primary", on: { click: askToken } }, "Enter the token")));
  else if (place("unlock")) enterSection();
}

function notice(text) {
  place("notice").hidden = !text;
  if (place("notice").textContent !== text) place("notice").textContent = text;
  place("main").classList.toggle("stale", Boolean(text) && Boolean(status));
}

function age() {
  const ms = performance.now() - takenAt;
  place("fresh").textContent = !status ? "" : ms < 3000 ? "live" : `as of ${lasting(Math.round(ms / 1000) * 1000)} ago`;
}

async function askToken() {
  if (session.may_change) {
    await enter("", "");
    toast("The token was laid aside: read only.");
    return refresh();
  }
  if (!session.has_token) {
    return open("Read only", (close) => [el("p", {}, "Nothing can be changed here because no token is configured. Set ", el("code", {}, "admin.token_file"), " and reload the daemon (SIGHUP)."),
      el("div", { class: "bar" }, el("button", { type: "button", on: { click: close } }, "Close"))]);
  }
  const token = el("input", { name: "token", type: "password", required: true, autocomplete: "off", autofocus: true });
  const name = el("input", { name: "operator", maxlength: 60, autocomplete: "off" });
  await form("Allow changes", [el("p", {}, "The token is kept in this page's memory until it is closed or loaded again."), el("label", {}, "Token (admin.token)", token), el("label", {}, "Your name, for the log", name)], {
    does: "Enter",
    act: async () => { if (!await enter(token.value, name.value)) throw new Error("This is not the token."); },
  });
  await refresh();
}

function help() {
  const rows = [["1 – 5", "a section"], ["/", "search"], ["r", "ask again now"], ["t", "the token"], ["?", "this list"], ["Esc", "close a dialog"]];
  return open("Keyboard", (close) => [el("dl", { class: "facts" }, rows.map(([key, does]) => [el("dt", {}, el("code", {}, key)), el("dd", {}, does)])),
    el("p", { class: "muted" }, `Tidegate ${session.version}`), el("div", { class: "bar" }, el("button", { type: "button", on: { click: close } }, "Close"))]);
}

function pressed(event) {
  const isTyping = event.target.closest?.("input:not([type=checkbox]), select, textarea, dialog");
  if (isTyping || event.ctrlKey || event.metaKey || event.altKey) return;
  const section = Object.keys(SECTIONS)[Number(event.key) - 1];
  if (section) location.hash = section;
  else if (event.key === "/" && current.search) { event.preventDefault(); current.search(); }
  else if (event.key === "r") refresh();
  else if (event.key === "t") askToken();
  else if (event.key === "?") help();
}

addEventListener("hashchange", enterSection);
addEventListener("keydown", pressed);
document.addEventListener("visibilitychange", refresh);
place("token").addEventListener("click", askToken);
place("keys").addEventListener("click", help);
setInterval(refresh, STATUS_EVERY_MS);
setInterval(age, 1000);
setInterval(() => { if (!document.hidden && session.may_read) current.tick?.(); }, HISTORY_EVERY_MS);
try { await refreshSession(); } catch (error) { notice(error.message); }
locked();
await enterSection();
await refresh();
