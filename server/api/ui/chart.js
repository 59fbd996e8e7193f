// Small charts in SVG: lines or stacked areas over the last minutes, and bars of parts. Each says in words what it shows.

import { svg } from "./dom.js";

const WIDTH = 320;
const HEIGHT = 96;
const TOP = 8;

// A round number that is not below the value: 1, 2 or 5 times a power of ten.
export function roundUp(value) {
  if (!(value > 0)) return 1;
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 5, 10].map((step) => step * power).find((step) => step >= value * 0.999);
}

// `series`: [{name, colour, values}], each value null where there is none; `stacked` adds them up. `most`: the axis' end, else found.
export function timeChart({ series, num, most, stacked = false, label, format }) {
  const sums = stacked ? stack(series, num) : series.map((one) => one.values);
  const top = most ?? roundUp(Math.max(0, ...sums.flat().filter((value) => value !== null)));
  const x = (index) => (index / Math.max(1, num - 1)) * WIDTH;
  const y = (value) => HEIGHT - (Math.min(value, top) / top) * (HEIGHT - TOP);
  const shapes = sums.map((values, index) => {
    const below = stacked && index > 0 ? sums[index - 1] : null;
    return runs(values).map((run) => drawRun(run, values, below, x, y, series[index].colour));
  });
  return svg("svg", { class: "chart", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: TOP, y2: TOP }),
    svg("line", { class: "grid", x1: 0, x2: WIDTH, y1: (HEIGHT + TOP) / 2, y2: (HEIGHT + TOP) / 2 }),
    svg("line", { class: "axis", x1: 0, x2: WIDTH, y1: HEIGHT - 0.5, y2: HEIGHT - 0.5 }),
    stacked ? shapes.reverse() : shapes, svg("title", {}, `${label}; the top line is ${format(top)}`));
}

// The axis' end as `timeChart` takes it, for a caption beside the chart.
export function topOf(series, num, stacked, most) {
  const sums = stacked ? stack(series, num) : series.map((one) => one.values);
  return most ?? roundUp(Math.max(0, ...sums.flat().filter((value) => value !== null)));
}

function stack(series, num) {
  const sums = [];
  for (const one of series) {
    const below = sums.at(-1);
    sums.push(Array.from({ length: num }, (_, index) => {
      const value = one.values[index];
      return value === null || value === undefined ? null : value + (below?.[index] ?? 0);
    }));
  }
  return sums;
}

// Stretches without a gap, as [first, last].
function runs(values) {
  const found = [];
  values.forEach((value, index) => {
    if (value === null || value === undefined) return;
    if (found.at(-1)?.[1] === index - 1) found.at(-1)[1] = index;
    else found.push([index, index]);
  });
  return found;
}

function drawRun([first, last], values, below, x, y, colour) {
  const indices = Array.from({ length: last - first + 1 }, (_, k) => first + k);
  const line = indices.map((index) => `${x(index).toFixed(1)},${y(values[index]).toFixed(1)}`);
  const floor = indices.toReversed().map((index) => `${x(index).toFixed(1)},${y(below?.[index] ?? 0).toFixed(1)}`);
  return svg("g", { class: `series ${colour}` },
    svg("path", { class: "area", d: `M${[...line, ...floor].join("L")}Z` }),
    svg("path", { class: "line", d: `M${line.join("L")}${indices.length === 1 ? "h0.1" : ""}`, "vector-effect": "non-scaling-stroke" }));
}

// Parts of a whole, side by side: [{name, colour, value}].
export function partsBar({ parts, whole, label }) {
  const total = whole ?? parts.reduce((sum, part) => sum + part.value, 0);
  let from = 0;
  const shapes = parts.filter((part) => part.value > 0).map((part) => {
    const width = total > 0 ? Math.min(100 - from, (part.value / total) * 100) : 0;
    const shape = svg("rect", { class: `part ${part.colour}`, x: from, width: Math.max(0, width), y: 0, height: 10 }, svg("title", {}, part.name));
    from += width;
    return shape;
  });
  return svg("svg", { class: "bar", viewBox: "0 0 100 10", preserveAspectRatio: "none", role: "img", "aria-label": label },
    svg("rect", { class: "part rest", x: 0, width: 100, y: 0, height: 10 }), shapes);
}
