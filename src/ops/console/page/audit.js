// Audit: do the counters in Valkey equal their rows and what is on the way; and what was done in this console.

import { count, el, empty, failed, loading, pill, show, table, visible } from "./dom.js";
import { ended, get, post, session } from "./api.js";

const pipeline = el("select", { name: "pipeline", id: "audit-pipeline", required: true });
const sample = el("input", { name: "sample", type: "number", min: 1, max: 100000, value: 1000 });
const keys = el("input", { name: "keys", placeholder: "instead of a sample; separated by blanks", autocomplete: "off" });
const button = el("button", { type: "submit", class: "primary", id: "audit-start" }, "Audit");
const found = el("div", {});
const actions = el("section", { class: "card" }, loading());

export const audit = {
  name: "Audit",
  page: [el("section", { class: "card" }, el("h1", {}, "Audit"),
    el("p", { class: "muted" }, "Compares counters in Valkey with their rows in PostgreSQL, what is pending, and dead letters, while producers run. It changes nothing."),
    el("form", { class: "filter", on: { submit: start } }, el("label", {}, "Pipeline", pipeline), el("label", {}, "So many counters, at random", sample), el("label", {}, "Only these keys", keys), button), found), actions],
  async entered() { await list(); },
  async told(status) {
    button.disabled = !session.may_change || button.dataset.runs === "yes";
    button.title = session.may_change ? "" : "Needs the token";
    const names = status.pipelines.map((one) => one.name);
    if (names.join() !== [...pipeline.options].map((option) => option.value).join()) show(pipeline, names.map((name) => el("option", { value: name }, name)));
    await list();
  },
};

async function start(event) {
  event.preventDefault();
  button.dataset.runs = "yes";
  button.disabled = true;
  show(found, el("p", { class: "loading", role: "status" }, "Comparing… counters that differ are looked at several times, so this may take a while."));
  try {
    const list = keys.value.trim();
    const wanted = list ? { pipeline: pipeline.value, keys: list.split(/\s+/) } : { pipeline: pipeline.value, sample: Number(sample.value) };
    show(found, report(await ended(await post("/api/audit", wanted))));
  } catch (error) { show(found, failed(error)); }
  button.dataset.runs = "";
  button.disabled = !session.may_change;
  await list();
}

function report(audit) {
  const differ = audit.valkey_ahead + audit.pg_ahead + audit.unexplained;
  const parts = [[audit.equal, "equal"], [audit.pending, "different by what is on the way: all is well"], [audit.dead_letters, "different by dead letters"], [audit.valkey_ahead, "ahead in Valkey"], [audit.pg_ahead, "ahead in PostgreSQL"], [audit.unexplained, "unexplained"]];
  return el("div", { role: "status" }, el("p", {}, differ ? pill(`${count(differ)} ${differ === 1 ? "differs" : "differ"}`, "bad") : pill("none differs", "good"), ` ${audit.pipeline}: ${count(audit.counters)} counters judged (${audit.scope})`),
    el("ul", {}, parts.filter(([number]) => number > 0).map(([number, words]) => el("li", {}, `${count(number)} ${words}`))),
    audit.differences.length ? [table("Differences", [
      ["Key", (one) => el("code", {}, visible(one.key))], ["Class", (one) => pill(one.class, "bad")], ["Valkey", (one) => one.valkey, "number"], ["PostgreSQL", (one) => one.postgres, "number"], ["Pending", (one) => one.pending, "number"],
      ["Letters", (one) => one.dead_letters, "number"], ["Difference", (one) => one.difference, "number"], ["Why", (one) => one.why ? visible(one.why) : "–"],
    ], audit.differences), el("p", { class: "muted" }, "To set Valkey right: tidegate audit --repair --dry-run")] : null);
}

async function list() {
  try {
    const { actions: all } = await get("/api/actions");
    const outcome = (one) => one.state === "failed" ? [pill("failed", "bad"), " ", one.error] : pill(one.state, one.state === "done" ? "good" : "warn");
    show(actions, el("h2", {}, "Done in this console"), all.length === 0 ? empty("Nothing was done since the daemon was started.") : table("Done in this console", [
      ["When", (one) => one.began_at], ["What", (one) => `${one.action}${one.is_trial && one.action !== "audit" ? " (trial)" : ""}`], ["Of", (one) => visible(one.about)], ["Who", (one) => visible(one.by)], ["Outcome", outcome],
    ], all));
  } catch (error) { show(actions, failed(error)); }
}
