// Overview: is it flushing, how far behind, what is at risk, and why.

import { bytes, count, el, empty, failed, lasting, loading, pager, pill, rate, show, table, toast } from "./dom.js";
import { ended, get, post, session } from "./api.js";
import { chart } from "./chart.js";
import { form } from "./dialog.js";

const TONES = { ok: "good", notice: "warn", degraded: "warn", down: "bad" };
const STATES = { flowing: "good", paused: "warn", interrupted: "bad", halted: "bad" };
const KEPT_MS = 15 * 60 * 1000;

const verdict = el("section", { class: "card verdict", "aria-live": "polite" }, loading());
const tiles = el("div", { class: "tiles" });
const charts = el("div", { class: "charts" });
const chosen = el("select", { id: "chart-pipeline", "aria-label": "Pipeline of the charts", on: { change: () => draw() } }, el("option", { value: "" }, "all pipelines"));
const pipelines = el("section", { class: "card" }, loading());
const streams = el("section", { class: "card", hidden: true });
const history = new Map();
const piece = { skip: 0, limit: 50 };
let shown = "";
let again = () => {};

export const overview = {
  name: "Overview",
  page: [verdict, tiles, el("section", { class: "card" }, el("div", { class: "bar" }, el("h2", {}, "The last quarter of an hour"), chosen), charts), pipelines, streams],
  async entered() { await follow(); },
  async told(status, refresh) {
    again = refresh;
    judge(status);
    number(status);
    list(status);
    if (shown) await listStreams();
  },
  refused(error) { show(verdict, failed(error)); },
  async tick() { await follow(); },
};

function judge({ verdict: { state, sentence }, reasons, reasons_total: total }) {
  verdict.className = `card verdict ${state === "notice" ? "notice-state" : state}`;
  const reason = (reason) => el("li", {}, pill(reason.severity, TONES[reason.severity]), " ",
    [reason.pipeline, reason.stream].filter(Boolean).map((name) => [el("code", {}, name), " "]), reason.words,
    el("p", { class: "muted" }, reason.next_step));
  show(verdict, el("h1", {}, sentence), reasons.length ? el("ul", { class: "reasons" }, reasons.map(reason)) : null,
    total > reasons.length ? el("p", { class: "muted" }, `and ${count(total - reasons.length)} more: tidegate status`) : null);
}

function number({ verdict, pipelines: all, ledger_bytes: ledger, postgres, valkey }) {
  const sum = (of) => all.reduce((sum, one) => sum === null || of(one) === null ? null : sum + of(one), 0);
  const tile = (name, value, detail) => el("div", { class: "tile" }, el("span", { class: "muted" }, name), el("b", {}, value), detail ? el("span", { class: "muted" }, detail) : null);
  const reached = (server) => server.reachable ? pill("reachable", "good") : pill("away", "bad");
  show(tiles, tile("Unsettled entries", count(verdict.at_risk), "in Valkey alone until flushed"), tile("Oldest of them", verdict.oldest_ms === 0 ? "none" : lasting(verdict.oldest_ms)),
    tile("In", `${rate(sum((one) => one.in_per_second))} /s`), tile("Out", `${rate(sum((one) => one.out_per_second))} /s`),
    tile("Open dead letters", count(sum((one) => one.dead_letters))), tile("Ledger on disk", bytes(ledger)),
    el("div", { class: "tile" }, el("span", { class: "muted" }, "Servers"), el("div", {}, "Valkey ", reached(valkey)), el("div", {}, "PostgreSQL ", reached(postgres))));
}

function list({ pipelines: all, pipelines_total: total }) {
  const state = (one) => one.paused ? pill("paused", "warn") : one.state ? pill(one.state, STATES[one.state]) : pill("no daemon", "bad");
  const act = (one) => el("button", { type: "button", id: `pause-${one.name}`, disabled: !session.may_change, title: session.may_change ? "" : "Needs the token",
    on: { click: () => one.paused ? resume(one.name) : pause(one.name) } }, one.paused ? "Resume" : "Pause");
  const opened = (one) => el("button", { type: "button", class: "link", id: `streams-${one.name}`, "aria-expanded": shown === one.name ? "true" : "false",
    on: { click: () => { shown = shown === one.name ? "" : one.name; piece.skip = 0; streams.hidden = !shown; list({ pipelines: all, pipelines_total: total }); listStreams(); } } }, one.name);
  const letters = (one) => one.dead_letters ? el("a", { href: `#letters?pipeline=${encodeURIComponent(one.name)}` }, count(one.dead_letters)) : count(one.dead_letters);
  const backlog = (one) => one.backlog_is_exact ? count(one.backlog) : one.backlog === null ? "?" : `≥ ${count(one.backlog)}`;
  const eta = (one) => one.backlog === 0 ? "–" : one.eta_seconds === null ? "?" : lasting(one.eta_seconds * 1000);
  show(pipelines, el("h2", {}, "Pipelines"), all.length === 0 ? empty("No pipeline is configured.") : table("Pipelines", [
    ["Pipeline", opened], ["Table", (one) => el("code", {}, one.table)], ["State", state], ["Backlog", backlog, "number"],
    ["Oldest", (one) => one.oldest_ms === 0 ? "–" : lasting(one.oldest_ms), "number"], ["In /s", (one) => rate(one.in_per_second), "number"],
    ["Out /s", (one) => rate(one.out_per_second), "number"], ["Done in", eta, "number"], ["Dead letters", letters, "number"],
    ["Delivery", (one) => one.delivery], ["Streams", (one) => count(one.streams), "number"], ["Daemons", (one) => count(one.processes), "number"], ["", act],
  ], all), total > all.length ? el("p", { class: "muted" }, `and ${count(total - all.length)} more: tidegate status`) : null);
  const names = all.map((one) => one.name);
  if (names.join() !== [...chosen.options].slice(1).map((option) => option.value).join()) {
    const before = chosen.value;
    show(chosen, el("option", { value: "" }, "all pipelines"), names.map((name) => el("option", { value: name }, name)));
    chosen.value = names.includes(before) ? before : "";
  }
}

async function listStreams() {
  if (!shown) return;
  try {
    const { rows, total } = await get("/api/streams", { pipeline: shown, ...piece });
    show(streams, el("h2", {}, `Streams of ${shown}`), table(`Streams of ${shown}`, [
      ["Stream", (one) => el("code", {}, one.stream)], ["Exists", (one) => one.exists === null ? "?" : one.exists ? "yes" : "no"], ["Group", (one) => one.group_exists === null ? "?" : one.group_exists ? "yes" : "no"],
      ["Backlog", (one) => count(one.backlog), "number"], ["Undelivered", (one) => count(one.undelivered), "number"], ["Pending", (one) => count(one.pending), "number"],
      ["Oldest", (one) => one.oldest_ms === 0 ? "–" : lasting(one.oldest_ms), "number"], ["Entries kept", (one) => count(one.length), "number"],
      ["Memory", (one) => bytes(one.memory_bytes), "number"], ["Ledger rows", (one) => count(one.ledger_rows), "number"],
      ["Last flush", (one) => one.last_flush_ms_ago === null ? "?" : `${lasting(one.last_flush_ms_ago)} ago`, "number"],
    ], rows), pager("streams", piece, total, listStreams));
  } catch (error) { show(streams, failed(error)); }
}

async function pause(name) {
  const duration = el("input", { name: "duration", placeholder: "such as 30m; empty: until it is resumed", autocomplete: "off" });
  const reason = el("input", { name: "reason", maxlength: 300, autocomplete: "off" });
  await form(`Pause ${name}`, [el("p", {}, "Its workers settle what they hold and read nothing more. Entries wait in Valkey. It outlasts restarts."),
    el("label", {}, "For how long", duration), el("label", {}, "Why", reason)], {
    does: "Pause",
    act: async () => told(await ended(await post("/api/pause", { pipeline: name, duration: duration.value, reason: reason.value }))),
  });
  again();
}

async function resume(name) {
  try { told(await ended(await post("/api/resume", { pipeline: name }))); } catch (error) { toast(error.message, true); }
  again();
}

function told({ pipelines: [one] }) {
  toast(`${one.pipeline}: ${one.paused ? "paused" : "resumed"}; ${one.obeying} of ${one.daemons} daemons follow.`);
}

async function follow() {
  const latest = Math.max(0, ...[...history.values()].map((points) => points.at(-1)?.[0] ?? 0));
  try {
    const { pipelines: told } = await get("/api/history", { after: latest || undefined });
    for (const name of history.keys()) if (!(name in told)) history.delete(name);
    for (const [name, points] of Object.entries(told)) {
      const kept = [...(history.get(name) ?? []), ...points];
      const oldest = (kept.at(-1)?.[0] ?? 0) - KEPT_MS;
      history.set(name, kept.filter(([ms]) => ms >= oldest));
    }
    draw();
  } catch { /* The status says that the daemon cannot be reached. */ }
}

/** Of one pipeline, or of all: sums, and the highest age. */
function points() {
  if (chosen.value) return history.get(chosen.value) ?? [];
  const all = new Map();
  for (const points of history.values()) {
    for (const [ms, backlog, age, settled] of points) {
      const sum = all.get(ms) ?? [ms, null, null, 0];
      if (backlog !== null) sum[1] = (sum[1] ?? 0) + backlog;
      if (age !== null) sum[2] = Math.max(sum[2] ?? 0, age);
      sum[3] += settled;
      all.set(ms, sum);
    }
  }
  return [...all.values()].sort((a, b) => a[0] - b[0]);
}

function draw() {
  const all = points();
  const rates = all.slice(1).map(([ms, , , settled], n) => [ms, settled < all[n][3] ? null : (settled - all[n][3]) * 1000 / Math.max(1, ms - all[n][0])]);
  show(charts, chart("Unsettled entries", all.map(([ms, backlog]) => [ms, backlog]), count), chart("Age of the oldest", all.map(([ms, , age]) => [ms, age]), lasting),
    chart("Settled by this daemon", rates, (value) => `${rate(value)} /s`));
}
