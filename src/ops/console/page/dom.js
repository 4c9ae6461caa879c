// Elements from text. Nothing here, and nothing on this page, makes markup of a text: what came from a stream is only ever text.

/** An element. Attributes: `class`, `on` (handlers by event), booleans as properties, everything else as attributes. */
export function el(tag, attributes = {}, ...children) {
  return filled(document.createElement(tag), attributes, children);
}

/** The same for SVG. */
export function svg(tag, attributes = {}, ...children) {
  return filled(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);
}

function filled(element, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (value === undefined || value === null || value === false) continue;
    if (name === "on") for (const [event, handler] of Object.entries(value)) element.addEventListener(event, handler);
    else if (value === true) element.setAttribute(name, "");
    else element.setAttribute(name, String(value));
  }
  element.append(...children.flat(Infinity).filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Puts other children into a place; whoever had the keyboard's focus has it again, by id. */
export function show(place, ...children) {
  const active = document.activeElement;
  const id = active && place.contains(active) ? active.id : "";
  place.replaceChildren(...children.flat(Infinity).filter(Boolean));
  if (id) document.getElementById(id)?.focus({ preventScroll: true });
}

/** A table. Columns: [heading, cell of a row, "number"?]. Narrow screens show each row as a card. */
export function table(caption, columns, rows) {
  const cell = (tag, column, ...content) => el(tag, { class: column[2], ...(tag === "th" ? { scope: "col" } : { "data-label": column[0] }) }, ...content);
  return el("div", { class: "scroll" }, el("table", { class: "stack", "aria-label": caption },
    el("thead", {}, el("tr", {}, columns.map((column) => cell("th", column, column[0])))),
    el("tbody", {}, rows.map((row) => el("tr", {}, columns.map((column) => cell("td", column, column[1](row) ?? "–")))))));
}

export const empty = (text) => el("p", { class: "empty" }, text);
export const loading = () => el("p", { class: "loading" }, "Loading…");
export const failed = (error) => el("p", { class: "failed", role: "alert" }, error.message);
export const pill = (text, tone = "") => el("span", { class: `pill ${tone}` }, text);

/** Control characters, and those that turn the direction of writing, as escapes: they could hide what is there. */
export function visible(text) {
  return text.replace(/[\u0000-\u0008\u000b-\u001f\u007f-\u009f\u200e\u200f\u202a-\u202e\u2066-\u2069\ufeff]/g,
    (c) => `\\u{${c.codePointAt(0).toString(16)}}`);
}

export const count = (number) => number === null || number === undefined ? "?" : Math.round(number).toLocaleString("en-US");
export const rate = (number) => number === null || number === undefined ? "?" : number < 10 && number > 0 ? number.toFixed(1) : count(number);

/** Milliseconds in their two largest units. */
export function lasting(ms) {
  if (ms === null || ms === undefined) return "?";
  const seconds = Math.floor(ms / 1000);
  if (ms < 1000) return `${Math.round(ms)} ms`;
  if (seconds < 60) return `${(ms / 1000).toFixed(1)} s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)} m ${seconds % 60} s`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)} h ${Math.floor(seconds % 3600 / 60)} m`;
  return `${Math.floor(seconds / 86400)} d ${Math.floor(seconds % 86400 / 3600)} h`;
}

export function bytes(number) {
  if (number === null || number === undefined) return "?";
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let unit = 0;
  while (number >= 1024 && unit + 1 < units.length) { number /= 1024; unit += 1; }
  return `${unit ? number.toFixed(1) : number} ${units[unit]}`;
}

/** Forth and back through rows. */
export function pager(name, piece, total, turned) {
  if (total <= piece.limit && piece.skip === 0) return null;
  const to = (skip) => () => { piece.skip = skip; turned(); };
  return el("div", { class: "bar" },
    el("button", { type: "button", id: `${name}-before`, disabled: piece.skip === 0, on: { click: to(Math.max(0, piece.skip - piece.limit)) } }, "Earlier rows"),
    el("span", { class: "muted" }, `${count(Math.min(total, piece.skip + 1))}–${count(Math.min(total, piece.skip + piece.limit))} of ${count(total)}`),
    el("button", { type: "button", id: `${name}-after`, disabled: piece.skip + piece.limit >= total, on: { click: to(piece.skip + piece.limit) } }, "Later rows"));
}

/** Says something at the edge of the window, for a while. */
export function toast(text, isBad = false) {
  const told = el("div", { class: isBad ? "toast bad" : "toast" }, text);
  document.getElementById("toasts").append(told);
  setTimeout(() => told.remove(), isBad ? 12000 : 6000);
}
