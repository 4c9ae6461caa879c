// Dead letters: found, shown, applied again, given up, opened again.

import { count, el, empty, failed, loading, pager, pill, show, table, toast, visible } from "./dom.js";
import { ended, get, post, session } from "./api.js";
import { form, open } from "./dialog.js";

const input = (name, label, attributes) => el("label", {}, label, el("input", { name, id: `find-${name}`, autocomplete: "off", ...attributes }));
const state = el("select", { name: "state", id: "find-state" }, [["open", "open"], ["resolved", "resolved"], ["discarded", "discarded"], ["all", "all"]].map(([value, text]) => el("option", { value }, text)));
const find = el("form", { class: "filter", role: "search", on: { submit: (event) => { event.preventDefault(); anew(); }, reset: () => setTimeout(anew) } },
  input("key", "Key of the row"), input("id", "Entry's id", { placeholder: "1700000000000-0" }), input("reason", "Reason", { placeholder: "bad_amount", list: "reasons" }),
  input("pipeline", "Pipeline"), input("since", "Buried since", { placeholder: "30m, or a time" }), el("label", {}, "State", state),
  el("datalist", { id: "reasons" }), el("button", { type: "submit", class: "primary" }, "Search"), el("button", { type: "reset" }, "Clear"));
const result = el("div", {}, loading());
const piece = { skip: 0, limit: 50 };
const marked = new Set();
/** Letters are counted by PostgreSQL each time, so less often than the rest is looked at. */
const EVERY_MS = 10000;
let last = null;
let askedAt = 0;

export const letters = {
  name: "Dead letters",
  page: [el("section", { class: "card" }, el("h1", {}, "Dead letters"), find, result)],
  search: () => find.elements.key.focus(),
  async entered(words) {
    for (const [name, value] of words) if (find.elements[name]) find.elements[name].value = value;
    await anew();
  },
  async told() { if (!document.querySelector("dialog") && performance.now() - askedAt > EVERY_MS) await refresh(); },
};

/** What is looked for, as the port takes it. */
function wanted() {
  const of = (name) => find.elements[name].value.trim();
  return { key: of("key"), id: of("id"), reason: of("reason"), pipeline: of("pipeline"), since: of("since"), state: state.value };
}

/** The same, as a change takes it. */
function filter() {
  const { key, id, reason, pipeline, since } = wanted();
  const list = (value) => value ? [value] : [];
  return { ids: list(id), reasons: list(reason), pipelines: list(pipeline), key: key || null, since: since || null };
}

async function anew() {
  piece.skip = 0;
  marked.clear();
  await refresh();
}

async function refresh() {
  askedAt = performance.now();
  try {
    last = await get("/api/dead", { ...wanted(), ...piece });
    draw();
  } catch (error) { show(result, failed(error)); }
}

function draw() {
  const { total, by_reason: reasons, letters: rows } = last;
  show(document.getElementById("reasons"), Object.keys(reasons).map((reason) => el("option", { value: reason })));
  const mark = (letter) => el("input", { type: "checkbox", id: `mark-${letter.letter}`, "aria-label": `Mark ${letter.letter}`, checked: marked.has(letter.letter),
    on: { change: (event) => { if (event.target.checked) marked.add(letter.letter); else marked.delete(letter.letter); draw(); } } });
  const shown = (letter) => el("button", { type: "button", class: "link mono", id: `show-${letter.letter}`, on: { click: () => details(letter.letter) } }, letter.letter);
  const why = (letter) => letter.resolution ? [pill("resolved", "good"), " ", visible(letter.resolution)] : visible(letter.detail);
  show(result, el("p", {}, `${count(total)} ${total === 1 ? "letter" : "letters"} `, Object.entries(reasons).map(([reason, number]) => [pill(`${reason} ${count(number)}`), " "])),
    total === 0 ? empty(state.value === "open" ? "No dead letter is open. Nothing has to be done." : "No letter matches.") : [buttons(total), table("Dead letters", [
      ["Mark", mark], ["Letter", shown], ["Pipeline", (letter) => letter.pipeline], ["Stream", (letter) => el("code", {}, visible(letter.stream))], ["Reason", (letter) => pill(letter.reason, "warn")],
      ["Buried", (letter) => letter.buried_at], ["Why", why],
    ], rows), pager("letters", piece, total, refresh)]);
}

function buttons(total) {
  const many = marked.size ? `${count(marked.size)} marked` : total === 1 ? "the one that matches" : `all ${count(total)} that match`;
  const button = (id, text, act, attributes = {}) => el("button", { type: "button", id, disabled: !session.may_change, title: session.may_change ? "" : "Needs the token", on: { click: act }, ...attributes }, `${text} ${many}`);
  const isOpen = state.value === "open" || state.value === "all";
  return el("div", { class: "bar" }, isOpen ? [button("redrive", "Redrive", redrive, { class: "primary" }), button("discard", "Discard", discard, { class: "danger" })] : null,
    state.value === "discarded" ? button("reopen", "Reopen", reopen) : null);
}

/** The letters that are meant: those marked, or all that match. */
function meant() {
  if (marked.size) return { letters: { ids: [...marked] } };
  const letters = filter();
  const isAll = letters.ids.length + letters.reasons.length + letters.pipelines.length === 0 && !letters.key && !letters.since;
  return { letters, all: isAll };
}

async function redrive() {
  const which = meant();
  const account = el("div", {}, loading());
  try {
    const tried = post("/api/dead/redrive", { ...which, dry_run: true }).then(ended);
    tried.then((tried) => show(account, accountOf(tried)), (error) => show(account, failed(error)));
    await form("Redrive dead letters", [el("p", {}, "Each letter's delta is added to its table and counts once. What cannot be applied stays as it is. A trial that was rolled back says:"), account], {
      does: "Redrive",
      act: async () => {
        const done = await ended(await post("/api/dead/redrive", which));
        toast(`${count(done.redriven)} redriven${done.refused.length ? `, ${count(done.refused.length)} cannot be applied still` : ""}.`, done.refused.length > 0 && done.redriven === 0);
      },
    });
  } finally { marked.clear(); await refresh(); }
}

function accountOf({ redriven, doubtful, already_resolved: resolved, refused }) {
  return el("div", {}, el("p", {}, el("b", {}, `${count(redriven)} would be redriven`), resolved ? `, ${count(resolved)} were resolved by somebody else` : "",
    doubtful ? `, ${count(doubtful)} are left alone: whether they were applied before cannot be known` : "", "."),
  refused.length ? [el("p", {}, `${count(refused.length)} cannot be applied still:`), el("ul", {}, refused.slice(0, 10).map((one) => el("li", {}, el("code", {}, one.letter), " ", visible(one.why))))] : null);
}

async function discard() {
  const which = meant();
  const because = el("input", { name: "because", maxlength: 300, required: true, autocomplete: "off" });
  await form("Discard dead letters", [el("p", {}, "Their deltas stay out of the tables. The letters stay as they are and can be opened again."), el("label", {}, "Why", because)], {
    does: "Discard",
    isDanger: true,
    act: async () => toast(`${count((await ended(await post("/api/dead/discard", { ...which, because: because.value }))).letters)} discarded.`),
  });
  await anew();
}

async function reopen() {
  try { toast(`${count((await ended(await post("/api/dead/reopen", meant()))).letters)} opened again.`); } catch (error) { toast(error.message, true); }
  await anew();
}

async function details(name) {
  const content = el("div", {}, loading());
  get("/api/dead/letter", { id: name }).then(({ letters: [letter] }) => show(content, whole(letter)), (error) => show(content, failed(error)));
  await open("Dead letter", (close) => [content, el("div", { class: "bar" }, el("button", { type: "button", on: { click: close } }, "Close"))]);
}

function whole(letter) {
  const facts = [["Letter", letter.letter], ["Pipeline", letter.pipeline], ["Stream", letter.stream], ["Table", letter.table], ["Added", letter.added_at ?? "its id is no time"], ["Buried", `${letter.buried_at} by ${letter.consumer}`],
    ["Reason", letter.reason], ["Detail", letter.detail], ["Meaning", letter.meaning ?? "–"], ["Resolved", letter.resolved_at ? `${letter.resolved_at}: ${letter.resolution}` : "no"], ["Size", letter.bytes === null ? "not known" : `${count(letter.bytes)} bytes${letter.shortened ? ", of which the beginnings are kept" : ""}`]];
  const text = (bytes) => "text" in bytes ? visible(bytes.text) : `0x${bytes.hex}`;
  return [el("dl", { class: "facts" }, facts.map(([name, value]) => [el("dt", {}, name), el("dd", {}, visible(value))])), el("h2", {}, "Fields"),
    el("dl", { class: "fields" }, letter.fields.map((field) => [el("dt", { class: "mono" }, text(field.name)), el("dd", { class: "mono" }, text(field.value) || "(empty)")])),
    letter.left_out_bytes + letter.left_out_fields ? el("p", { class: "muted" }, `${count(letter.left_out_bytes)} bytes and ${count(letter.left_out_fields)} fields are not shown here: tidegate dead show ${letter.letter}`) : null];
}
