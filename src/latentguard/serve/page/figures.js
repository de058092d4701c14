/* The page's figures, as SVG; each function returns one. */

const SVG = "http://www.w3.org/2000/svg";
const LEFT = 76; // room for numbers such as +0.000939
const WIDTH = 380;
const HEIGHT = 240;
const RIGHT = WIDTH - 16;
const BOTTOM = HEIGHT - 40;
const BINS = 36;
const LOOKS = { block: "known flagged", review: "known review", allow: "known" };

export const number = (value) => {
  const size = Math.abs(value);
  let text = size >= 0.1 || size === 0 ? size.toFixed(3) : size.toPrecision(3);
  if (size >= 10000 || (size && size < 0.0001)) text = size.toExponential(2);
  return (value < 0 ? "−" : "") + text;
};
export const signed = (value) => (value > 0 ? "+" : "") + number(value);

function shape(name, attributes, text) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

function frame(label) {
  return shape("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": label });
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function padded(values, share = 0.1) {
  const [low, high] = [Math.min(...values), Math.max(...values)];
  const pad = (high - low || 1) * share;
  return [low - pad, high + pad];
}

/* Numbers beside the upright axis; one that would lie on another is left out. */
function ticks(svg, y, values, show) {
  const places = [];
  for (const value of values) {
    if (places.some((place) => Math.abs(place - y(value)) < 14)) continue;
    places.push(y(value));
    svg.append(shape("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, show(value)));
  }
}

function layerScale(layers) {
  const spread = layers.length > 1 ? 0.5 : 1; // a single layer stands in the middle
  return scale(layers[0] - spread, layers.at(-1) + spread, LEFT, RIGHT);
}

function nameLayers(svg, x, layers) {
  const step = Math.max(1, Math.ceil(layers.length / 8));
  layers.forEach((layer, index) => {
    if (index % step) return;
    svg.append(shape("text", { x: x(layer), y: HEIGHT - 20, "text-anchor": "middle" }, layer));
  });
  svg.append(shape("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "layer"));
}

/* From the baseline up or down, layer by layer, to the score. */
export function layerSteps(parts, layers, threshold) {
  const svg = frame(`From the baseline ${number(parts.baseline)}, layer by layer, to the score ${number(parts.score)}`);
  const sums = [parts.baseline];
  for (const value of parts.layers) sums.push(sums.at(-1) + value);
  const x = layerScale(layers);
  const y = scale(...padded([...sums, threshold]), BOTTOM, 14);
  const half = Math.min(14, (x(1) - x(0)) * 0.38);
  svg.append(shape("line", { x1: LEFT, x2: RIGHT, y1: y(threshold), y2: y(threshold), class: "cut" }));
  const away = parts.score > threshold ? 14 : -5; // on the side that the last bars have left
  svg.append(shape("text", { x: RIGHT, y: y(threshold) + away, "text-anchor": "end" }, "threshold"));
  parts.layers.forEach((value, index) => {
    const [from, to] = [y(sums[index]), y(sums[index + 1])];
    const middle = x(layers[index]);
    const next = index + 1 < layers.length ? x(layers[index + 1]) : RIGHT;
    svg.append(shape("line", { x1: middle, x2: next, y1: to, y2: to, class: "joint" }));
    const bar = shape("rect", { x: middle - half, width: 2 * half, y: Math.min(from, to),
      height: Math.max(Math.abs(from - to), 1), class: value > 0 ? "more" : "less" });
    bar.append(shape("title", {}, `Layer ${layers[index]}: ${signed(value)}`));
    svg.append(bar);
  });
  svg.append(shape("line", { x1: LEFT, x2: x(layers[0]), y1: y(sums[0]), y2: y(sums[0]), class: "joint" }));
  ticks(svg, y, [parts.score, parts.baseline, threshold], number);
  nameLayers(svg, x, layers);
  return svg;
}

/* Known scores as a histogram, coloured by what is decided of them, and the prompt's own score. */
export function histogram(scores, prompt, cuts, decide) {
  const svg = frame(`The score ${number(prompt)} among ${scores.length} known scores`);
  const [low, high] = padded([...scores, prompt, ...cuts.map((cut) => cut.at)], 0.04);
  const x = scale(low, high, 24, RIGHT);
  const size = (high - low) / BINS;
  const counts = Array(BINS).fill(0);
  for (const score of scores) counts[Math.min(Math.floor((score - low) / size), BINS - 1)] += 1;
  const y = scale(0, Math.max(...counts, 1), BOTTOM, 58);
  counts.forEach((count, bin) => {
    if (!count) return;
    const decision = decide(low + (bin + 0.5) * size);
    const look = { block: "bar flagged", review: "bar review", allow: "bar" }[decision];
    const bar = shape("rect", { x: x(low + bin * size) + 0.5, y: y(count), class: look,
      width: Math.max(x(size) - x(0) - 1, 1), height: BOTTOM - y(count) });
    bar.append(shape("title", {}, `${count} of ${scores.length}`));
    svg.append(bar);
  });
  svg.append(shape("line", { x1: 24, x2: RIGHT, y1: BOTTOM, y2: BOTTOM, class: "axis" }));
  const name = (at, height, text, look) => svg.append(shape("text", { x: Math.min(Math.max(x(at), 84),
    WIDTH - 84), y: height, "text-anchor": "middle", class: look }, text));
  cuts.forEach((cut, index) => {
    svg.append(shape("line", { x1: x(cut.at), x2: x(cut.at), y1: 36 + 16 * index, y2: BOTTOM,
      class: index ? "cut review" : "cut" }));
    name(cut.at, 32 + 16 * index, `${cut.name} ${number(cut.at)}`, "");
  });
  svg.append(shape("line", { x1: x(prompt), x2: x(prompt), y1: 20, y2: BOTTOM, class: "mark" }));
  name(prompt, 15, `this prompt ${number(prompt)}`, "mark-name");
  for (const [value, anchor] of [[low, "start"], [high, "end"]]) {
    svg.append(shape("text", { x: x(value), y: HEIGHT - 22, "text-anchor": anchor }, number(value)));
  }
  svg.append(shape("text", { x: WIDTH / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "score →"));
  return svg;
}

/* The paper's beliefs by layer, a line for each. */
export function beliefLines(byLayer, layers) {
  const names = Object.keys(byLayer);
  const values = names.flatMap((name) => byLayer[name]);
  const svg = frame(names.map((name) =>
    `Δ ${name} from ${signed(byLayer[name][0])} to ${signed(byLayer[name].at(-1))}`).join("; "));
  const x = layerScale(layers);
  const y = scale(...padded([...values, 0]), BOTTOM, 24);
  svg.append(shape("line", { x1: LEFT, x2: RIGHT, y1: y(0), y2: y(0), class: "zero" }));
  ticks(svg, y, [0, Math.max(...values), Math.min(...values)], signed);
  nameLayers(svg, x, layers);
  names.forEach((name, index) => {
    const points = byLayer[name].map((value, at) => `${x(layers[at])},${y(value)}`);
    svg.append(shape("polyline", { points: points.join(" "), class: name }));
    if (points.length === 1) {
      const [cx, cy] = points[0].split(",");
      svg.append(shape("circle", { cx, cy, r: 4, class: name }));
    }
    svg.append(shape("text", { x: LEFT + 4 + 110 * index, y: 14, class: `${name}-name` },
      `${name === "refuse" ? "┅" : "━"} Δ ${name}`));
  });
  return svg;
}

/* Figure 3's plane: both beliefs of reference prompts, and the prompt's own. */
export function beliefPlane(known, prompt, decide) {
  const svg = frame(`Both beliefs of the prompt, among ${known.length} reference prompts`);
  const everyone = [...known, prompt];
  const across = everyone.map((point) => point.beliefs.harmful);
  const up = everyone.map((point) => point.beliefs.refuse);
  const x = scale(...padded(across, 0.12), LEFT, RIGHT);
  const y = scale(...padded(up, 0.12), BOTTOM, 14);
  svg.append(shape("rect", { x: LEFT, y: 14, width: RIGHT - LEFT, height: BOTTOM - 14, fill: "none", class: "axis" }));
  for (const point of known) {
    svg.append(shape("circle", { cx: x(point.beliefs.harmful), cy: y(point.beliefs.refuse), r: 4,
      class: LOOKS[decide(point)] }));
  }
  const [cx, cy] = [x(prompt.beliefs.harmful), y(prompt.beliefs.refuse)];
  svg.append(shape("circle", { cx, cy, r: 9, class: "here" }),
    shape("circle", { cx, cy, r: 3.5, class: LOOKS[decide(prompt)] }));
  for (const [value, anchor] of [[Math.min(...across), "start"], [Math.max(...across), "end"]]) {
    svg.append(shape("text", { x: x(value), y: HEIGHT - 22, "text-anchor": anchor }, signed(value)));
  }
  ticks(svg, y, [Math.min(...up), Math.max(...up)], signed);
  svg.append(shape("text", { x: (LEFT + WIDTH) / 2, y: HEIGHT - 5, "text-anchor": "middle" }, "Δ harmful →"));
  svg.append(shape("text", { x: LEFT + 4, y: 28 }, "↑ Δ refuse"));
  return svg;
}
