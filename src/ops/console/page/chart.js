// A line over time, as SVG. Its last value, its highest one and the moment under the pointer are told as text, so that nothing is told by the picture alone.

import { el, svg } from "./dom.js";

const [WIDTH, HEIGHT] = [300, 100];

/** A chart of points [milliseconds, value or null]. `format` writes a value. */
export function chart(title, points, format) {
  const known = points.filter(([, value]) => value !== null);
  const last = known.at(-1);
  const most = Math.max(0, ...known.map(([, value]) => value));
  const told = el("b", {}, last ? format(last[1]) : "not known yet");
  const caption = el("figcaption", {}, el("span", {}, title), told);
  if (known.length < 2) return el("figure", {}, caption, el("p", { class: "empty" }, "A line is drawn when there are two values."));
  const [from, to] = [points[0][0], points.at(-1)[0]];
  const top = niceAbove(most);
  const x = (ms) => (ms - from) / Math.max(1, to - from) * WIDTH;
  const y = (value) => HEIGHT - value / top * (HEIGHT - 4) - 2;
  const mark = svg("line", { class: "chart-mark", y1: 0, y2: HEIGHT, visibility: "hidden" });
  const picture = svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img",
    "aria-label": `${title}: ${format(last[1])} now, ${format(most)} at the most in ${Math.round((to - from) / 60000)} minutes` },
    [0, 0.5, 1].map((part) => svg("line", { class: "chart-grid", x1: 0, x2: WIDTH, y1: y(top * part), y2: y(top * part) })),
    runs(points).map((run) => {
      const line = run.map(([ms, value]) => `${x(ms).toFixed(1)} ${y(value).toFixed(1)}`).join("L");
      return [svg("path", { class: "chart-area", d: `M${x(run[0][0]).toFixed(1)} ${HEIGHT}L${line}L${x(run.at(-1)[0]).toFixed(1)} ${HEIGHT}Z` }),
        svg("path", { class: "chart-line", d: `M${line}` })];
    }), mark);
  picture.addEventListener("pointermove", (event) => {
    const box = picture.getBoundingClientRect();
    const at = from + (event.clientX - box.left) / box.width * (to - from);
    const near = known.reduce((best, point) => Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best);
    mark.setAttribute("x1", x(near[0]));
    mark.setAttribute("x2", x(near[0]));
    mark.setAttribute("visibility", "visible");
    told.textContent = `${format(near[1])} at ${clock(near[0])}`;
  });
  picture.addEventListener("pointerleave", () => {
    mark.setAttribute("visibility", "hidden");
    told.textContent = format(last[1]);
  });
  return el("figure", {}, caption, picture, el("div", { class: "axis" }, el("span", {}, clock(from)), el("span", {}, `top ${format(top)}`), el("span", {}, clock(to))));
}

/** A gap is no line: where a value is not known, the line ends. */
function runs(points) {
  const runs = [[]];
  for (const point of points) {
    if (point[1] === null) runs.push([]);
    else runs.at(-1).push(point);
  }
  return runs.filter((run) => run.length > 0);
}

function niceAbove(value) {
  if (value <= 0) return 1;
  const step = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((part) => part * step).find((part) => part >= value);
}

const clock = (ms) => new Date(ms).toLocaleTimeString([], { hour: "2-digit", minute: "2-digit", second: "2-digit" });
