// Workers: the daemons as they describe themselves, and what each member of the groups holds.

import { count, el, empty, failed, lasting, loading, pager, pill, show, table } from "./dom.js";
import { get } from "./api.js";

const TONES = { flowing: "good", paused: "warn", interrupted: "bad", halted: "bad" };
const daemons = el("section", { class: "card" }, loading());
const members = el("section", { class: "card" }, loading());
const [ofDaemons, ofMembers] = [{ skip: 0, limit: 50 }, { skip: 0, limit: 50 }];

export const workers = {
  name: "Workers",
  page: [daemons, members],
  async entered() { await refresh(); },
  async told() { await refresh(); },
};

async function refresh() {
  await Promise.all([listDaemons(), listMembers()]);
}

async function listDaemons() {
  try {
    const { rows, total } = await get("/api/workers", ofDaemons);
    const state = (one) => [pill(one.state === "flowing" && one.reads_alone === true ? "reads alone" : one.state === "flowing" && one.reads_alone === false ? "stands by" : one.state, TONES[one.state]),
      one.fault ? el("p", {}, one.fault, el("br"), el("span", { class: "muted" }, one.advice ?? "")) : null];
    show(daemons, el("h2", {}, "Daemons"), total === 0 ? empty("No daemon is at work, or this user may not read what they say of themselves.") : table("Daemons", [
      ["Process", (one) => el("code", {}, one.process)], ["Pipeline", (one) => one.pipeline], ["Stream", (one) => el("code", {}, one.stream)], ["State", state],
      ["For", (one) => one.lasted_ms ? lasting(one.lasted_ms) : "–", "number"], ["Workers", (one) => count(one.workers), "number"], ["Applied", (one) => count(one.applied), "number"],
      ["Recognised", (one) => count(one.recognised), "number"], ["Buried", (one) => count(one.buried), "number"], ["Version", (one) => one.version],
    ], rows), pager("daemons", ofDaemons, total, listDaemons));
  } catch (error) { show(daemons, failed(error)); }
}

async function listMembers() {
  try {
    const { rows, total } = await get("/api/consumers", ofMembers);
    show(members, el("h2", {}, "Members of the groups"), total === 0 ? empty("The groups have no member.") : table("Members of the groups", [
      ["Consumer", (one) => el("code", {}, one.name)], ["Pipeline", (one) => one.pipeline], ["Stream", (one) => el("code", {}, one.stream)], ["Holds", (one) => count(one.entries), "number"],
      ["Silent for", (one) => lasting(one.idle_ms), "number"], ["Connected", (one) => one.alive ? pill("yes", "good") : pill("no", "bad")],
    ], rows), pager("members", ofMembers, total, listMembers));
  } catch (error) { show(members, failed(error)); }
}
