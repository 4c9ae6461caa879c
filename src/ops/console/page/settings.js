// Configuration: every key as it took effect, and where its value is written. Secrets are hidden before they leave the daemon.

import { count, el, empty, failed, loading, pager, pill, show, table, visible } from "./dom.js";
import { get } from "./api.js";

const find = el("input", { name: "find", id: "find-setting", autocomplete: "off", placeholder: "such as batch" });
const changed = el("input", { type: "checkbox", id: "only-changed" });
const form = el("form", { class: "filter", role: "search", on: { submit: (event) => { event.preventDefault(); anew(); }, input: () => anew() } },
  el("label", {}, "Key", find), el("label", { class: "line" }, changed, "only what is set somewhere"));
const result = el("div", {}, loading());
const piece = { skip: 0, limit: 100 };

export const settings = {
  name: "Configuration",
  page: [el("section", { class: "card" }, el("h1", {}, "Configuration"), form, result)],
  search: () => find.focus(),
  async entered() { await refresh(); },
};

async function anew() {
  piece.skip = 0;
  await refresh();
}

async function refresh() {
  try {
    const { rows, total } = await get("/api/config", { find: find.value.trim(), changed: changed.checked ? "true" : "", ...piece });
    const origin = (one) => one.origin === "default" ? pill("default") : el("code", {}, visible(one.origin));
    show(result, el("p", { class: "muted" }, `${count(total)} keys`), total === 0 ? empty("No key matches.") : table("Configuration", [
      ["Key", (one) => el("code", {}, one.key)], ["Value", (one) => el("code", {}, visible(one.value))], ["Written in", origin], ["Why it exists", (one) => one.reason],
    ], rows), pager("settings", piece, total, refresh));
  } catch (error) { show(result, failed(error)); }
}
