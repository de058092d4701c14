"use strict";

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const LEFT = 76; // of a figure: room for numbers such as +0.000939
const WORDS = { block: "Flagged", review: "To review", allow: "Not flagged" };
const LOOKS = { block: "known flagged", review: "known review", allow: "known" };
let guard = null;
let last = null;
const asked = [];

function element(name, text, className) {
  const made = document.createElement(name);
  if (text !== undefined) made.textContent = text;
  if (className) made.className = className;
  return made;
}

function drawn(name, attributes, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  return made;
}

const number = (value) => {
  const size = Math.abs(value);
  let text = size >= 0.1 || size === 0 ? size.toFixed(3) : size.toPrecision(3);
  if (size >= 10000 || (size && size < 0.0001)) text = size.toExponential(2);
  return (value < 0 ? "−" : "") + text;
};
const signed = (value) => (value > 0 ? "+" : "") + number(value);

async function ask(path, body) {
  const headers = { "content-type": "application/json" };
  if ($("key").value) headers.authorization = `Bearer ${$("key").value}`;
  const how = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const answer = await fetch(path, how);
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  if (answer.status === 401) $("access").open = true;
  throw new Error(content.error ? content.error.message : `The service answered ${answer.status}.`);
}

function problem(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
}

async function meet() {
  try {
    guard = await ask("/v1/guard");
  } catch (error) {
    $("about").textContent = error.message;
    return false;
  }
  const layers = guard.layers;
  $("about").textContent = `Guard of ${guard.model}. Reads ${guard.reading} at ` +
    (layers.length > 1 ? `layers ${layers[0]} to ${layers.at(-1)}` : `layer ${layers[0]}`) +
    `. Flagged chats: ${guard.policy}.` +
    (guard.review === null ? "" : ` Chats to review: ${guard.on_review}.`);
  $("promise").textContent = `Promise of the threshold: ${guard.promise}. A guard of this kind ` +
    "does not stop a determined adversary.";
  return true;
}

/* "User: ..." at the start of a line begins a turn; a text without such lines is one prompt. */
function messages(text) {
  const turns = [];
  for (const line of text.split("\n")) {
    const found = /^(System|User|Assistant):[ \t]?(.*)$/i.exec(line);
    if (found) turns.push({ role: found[1].toLowerCase(), content: found[2] });
    else if (turns.length) turns[turns.length - 1].content += `\n${line}`;
    else if (line.trim()) return [{ role: "user", content: text }];
  }
  return turns.map((turn) => ({ ...turn, content: turn.content.replace(/\s+$/, "") }));
}

async function read(event) {
  event.preventDefault();
  const text = $("chat").value;
  const button = $("ask").querySelector("button");
  button.disabled = true;
  problem("");
  try {
    if (!guard && !(await meet())) throw new Error($("about").textContent);
    const said = messages(text);
    if (!said.length || said[said.length - 1].role !== "user") {
      throw new Error("The last turn should be the user’s.");
    }
    const answer = await ask("/v1/score", { messages: said, tokens: true });
    last = { text: said[said.length - 1].content, ...answer.results[0], layers: answer.layers };
    asked.unshift(last);
    show();
  } catch (error) {
    problem(error.message);
  } finally {
    button.disabled = false;
  }
}

function show() {
  showVerdict();
  showTokens();
  showLayers();
  prepareThreshold();
  atThreshold();
}

/* At a threshold; the lower one, of the band to review, stays. Long prompts have no such band. */
function decision(one, threshold) {
  if (one.score > threshold) return "block";
  const band = guard.review !== null && !(one.evidence || []).length;
  return band && one.score > guard.review ? "review" : "allow";
}

function showVerdict() {
  const box = $("verdict");
  box.hidden = false;
  box.dataset.decision = last.decision;
  $("verdict-word").textContent = WORDS[last.decision];
  const figures = [
    ["Score", number(last.score)],
    ["Threshold", number(guard.threshold)],
    ...(guard.review === null ? [] : [["Review above", number(guard.review)]]),
    ["Probability", last.probability.toFixed(3)],
    ["Δ harmful", signed(last.beliefs.harmful)],
  ];
  if ("refuse" in last.beliefs) figures.push(["Δ refuse", signed(last.beliefs.refuse)]);
  if (last.category) figures.push(["Nearest category", last.category.replaceAll("_", " ")]);
  if (last.quadrant) figures.push(["Quadrant", last.quadrant]);
  if (last.obfuscations.length) figures.push(["Undone", last.obfuscations.join(", ")]);
  $("figures").replaceChildren(...figures.map(([name, value]) => {
    const pair = element("div");
    pair.append(element("dt", name), element("dd", value));
    return pair;
  }));
}

/* Tokens that stand for parts of one character come together with the last of them. */
function visible(tokens) {
  return tokens.filter((token) => token.text !== "");
}

function showTokens() {
  const tokens = visible(last.tokens || []);
  const most = Math.max(...tokens.map((token) => Math.abs(token.belief)), 1e-9);
  $("tokens-card").hidden = !tokens.length;
  $("tokens").replaceChildren(...tokens.map((token, index) => {
    const made = element("span", token.text);
    const share = Math.round((Math.abs(token.belief) / most) * 55);
    made.style.background =
      `color-mix(in srgb, var(${token.belief > 0 ? "--hot" : "--cold"}) ${share}%, transparent)`;
    made.setAttribute("role", "option");
    made.setAttribute("aria-label", `${token.text.trim() || "white space"}, ${signed(token.belief)}`);
    made.title = signed(token.belief);
    made.tabIndex = index === tokens.length - 1 ? 0 : -1;
    made.addEventListener("focus", () => tell(index));
    made.addEventListener("pointerenter", () => tell(index));
    return made;
  }));
  tell(tokens.length - 1);
}

function tell(index) {
  const spans = [...$("tokens").children];
  const tokens = visible(last.tokens || []);
  spans.forEach((span, at) => {
    span.setAttribute("aria-selected", String(at === index));
    span.tabIndex = at === index ? 0 : -1;
  });
  const token = tokens[index];
  if (!token) return;
  const where = index === tokens.length - 1 ? " (t_inst)" : "";
  $("token-said").textContent =
    `Token ${index + 1} of ${tokens.length}${where}, “${token.text}”: Δ harmful ${signed(token.belief)}`;
}

function along(event) {
  const spans = [...$("tokens").children];
  const here = spans.indexOf(document.activeElement);
  const steps = { ArrowRight: here + 1, ArrowLeft: here - 1, Home: 0, End: spans.length - 1 };
  if (here < 0 || !(event.key in steps)) return;
  const next = spans[steps[event.key]];
  if (next) {
    event.preventDefault();
    next.focus();
  }
}

function frame(width, height) {
  return drawn("svg", { viewBox: `0 0 ${width} ${height}`, role: "img" });
}

function scale(low, high, from, to) {
  const span = high - low || 1;
  return (value) => from + ((value - low) / span) * (to - from);
}

function showLayers() {
  const names = Object.keys(last.by_layer);
  const all = names.flatMap((name) => last.by_layer[name]).concat(0);
  const layers = last.layers;
  const [width, height] = [380, 240];
  const svg = frame(width, height);
  svg.setAttribute("aria-label", `Belief by layer: ${names.map((name) =>
    `${name} from ${signed(last.by_layer[name][0])} to ${signed(last.by_layer[name].at(-1))}`).join("; ")}`);
  const low = Math.min(...all);
  const high = Math.max(...all);
  const pad = (high - low || 1) * 0.1;
  const spread = layers.length > 1 ? 0 : 1; // a single layer stands in the middle
  const x = scale(layers[0] - spread, layers.at(-1) + spread, LEFT, width - 16);
  const y = scale(low - pad, high + pad, height - 40, 24);
  svg.append(drawn("line", { x1: LEFT, x2: width - 16, y1: y(0), y2: y(0), class: "zero" }));
  for (const value of new Set([low, 0, high])) {
    if (value !== 0 && Math.abs(y(value) - y(0)) < 14) continue;
    svg.append(drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, signed(value)));
  }
  const step = Math.max(1, Math.ceil(layers.length / 8));
  layers.forEach((layer, index) => {
    if (index % step) return;
    svg.append(drawn("text", { x: x(layer), y: height - 20, "text-anchor": "middle" }, layer));
  });
  svg.append(drawn("text", { x: (LEFT + width) / 2, y: height - 5, "text-anchor": "middle" }, "layer"));
  names.forEach((name, index) => {
    const points = last.by_layer[name].map((value, at) => `${x(layers[at])},${y(value)}`);
    svg.append(drawn("polyline", { points: points.join(" "), class: name }));
    if (points.length === 1) {
      const [cx, cy] = points[0].split(",");
      svg.append(drawn("circle", { cx, cy, r: 4, class: name }));
    }
    svg.append(drawn("text", { x: LEFT + 4 + 110 * index, y: 14, class: `${name}-name` },
      `${name === "refuse" ? "┅" : "━"} Δ ${name}`));
  });
  $("layers").replaceChildren(svg);
  const head = element("tr");
  head.append(element("th", "Layer"), ...names.map((name) => element("th", `Δ ${name}`)));
  $("layers-table").replaceChildren(head, ...layers.map((layer, at) => {
    const row = element("tr");
    row.append(element("td", layer), ...names.map((name) => element("td", signed(last.by_layer[name][at]))));
    return row;
  }));
  $("layers-card").hidden = false;
}

function showPlane(threshold) {
  const known = guard.reference.points;
  const refuses = "refuse" in last.beliefs && known.every((point) => "refuse" in point.beliefs);
  const up = (point) => (refuses ? point.beliefs.refuse : point.score);
  const everyone = [...known, last];
  const cuts = [["threshold", threshold]];
  if (guard.review !== null && guard.review < threshold) cuts.push(["review above", guard.review]);
  const [width, height] = [380, 240];
  const svg = frame(width, height);
  const span = (values) => {
    const [low, high] = [Math.min(...values), Math.max(...values)];
    const pad = (high - low || 1) * 0.12;
    return [low - pad, high + pad];
  };
  const x = scale(...span(everyone.map((p) => p.beliefs.harmful)), LEFT, width - 12);
  const y = scale(...span(everyone.map(up).concat(refuses ? [] : cuts.map(([, at]) => at))), height - 40, 14);
  const box = { x: LEFT, y: 14, width: width - 12 - LEFT, height: height - 54, fill: "none", class: "axis" };
  svg.append(drawn("rect", box));
  for (const [name, at] of refuses ? [] : cuts) {
    svg.append(drawn("line", { x1: LEFT, x2: width - 12, y1: y(at), y2: y(at),
      class: name === "threshold" ? "cut" : "cut review" }));
    svg.append(drawn("text", { x: width - 16, y: y(at) + (name === "threshold" ? -4 : 14),
      "text-anchor": "end" }, name));
  }
  for (const point of known) {
    svg.append(drawn("circle", { cx: x(point.beliefs.harmful), cy: y(up(point)), r: 4,
      class: LOOKS[decision(point, threshold)] }));
  }
  const [cx, cy] = [x(last.beliefs.harmful), y(up(last))];
  svg.append(drawn("circle", { cx, cy, r: 9, class: "here" }),
    drawn("circle", { cx, cy, r: 3.5, class: LOOKS[decision(last, threshold)] }));
  const lows = everyone.map((p) => p.beliefs.harmful);
  const [least, most] = [Math.min(...lows), Math.max(...lows)];
  for (const [value, anchor] of least < most ? [[least, "start"], [most, "end"]] : [[least, "middle"]]) {
    svg.append(drawn("text", { x: x(value), y: height - 22, "text-anchor": anchor }, signed(value)));
  }
  const ups = everyone.map(up);
  for (const value of new Set([Math.min(...ups), Math.max(...ups)])) {
    svg.append(drawn("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, signed(value)));
  }
  svg.append(drawn("text", { x: (LEFT + width) / 2, y: height - 5, "text-anchor": "middle" }, "Δ harmful →"));
  svg.append(drawn("text", { x: LEFT + 4, y: 28 }, refuses ? "↑ Δ refuse" : "↑ score"));
  const below = known.filter((point) => point.score < last.score).length;
  svg.setAttribute("aria-label", `The prompt among ${known.length} ${guard.reference.what}.`);
  $("plane").replaceChildren(svg);
  const hollow = guard.review === null ? "" : ", hollow is to review";
  const lines = cuts.length > 1 ? "; the lines are the two thresholds" : "; the line is the threshold";
  $("plane-said").textContent = known.length
    ? `The ring is this prompt; orange is flagged at the threshold below${hollow}. Its score is above ${below} of ${known.length} ${guard.reference.what}` +
      `${refuses ? "" : lines}.`
    : "No prompts to compare with: give --reference.";
  $("plane-card").hidden = false;
}

function prepareThreshold() {
  const scores = [...guard.reference.points, ...asked].map((point) => point.score).concat(guard.threshold);
  const [low, high] = [Math.min(...scores), Math.max(...scores)];
  const pad = (high - low || 1) * 0.05;
  const slider = $("threshold");
  const kept = slider.dataset.moved ? Number(slider.value) : guard.threshold;
  slider.min = low - pad;
  slider.max = high + pad;
  slider.step = (high - low + 2 * pad) / 400;
  slider.value = kept;
  $("threshold-card").hidden = false;
  $("asked-card").hidden = false;
}

function atThreshold() {
  if (!last) return;
  const slider = $("threshold");
  const value = slider.dataset.moved ? Number(slider.value) : guard.threshold;
  const count = (points, what) => points.filter((point) => decision(point, value) === what).length;
  const flags = (points) => count(points, "block");
  const known = guard.reference.points;
  $("threshold-value").textContent = number(value) + (slider.dataset.moved ? "" : " (the guard’s own)");
  slider.setAttribute("aria-valuetext", number(value));
  const there = decision(last, value);
  const would = { block: "would be flagged", review: "would be left to review",
    allow: "would not be flagged" }[there];
  const now = there === last.decision ? "as now" : "unlike now";
  const theirs = known.length ? `${flags(known)} of ${known.length} ${guard.reference.what} (now ` +
    `${known.filter((p) => p.flagged).length}) and ` : "";
  $("threshold-said").textContent = `This prompt ${would}, ${now}. At this threshold ${theirs}` +
    `${flags(asked)} of ${asked.length} asked here would be flagged` +
    (guard.review === null ? ". " : `, and ${count(known, "review") + count(asked, "review")} left to review. `) +
    "The promise holds for the guard’s own threshold only.";
  showPlane(value);
  showAsked(value);
}

function showAsked(value) {
  $("asked").replaceChildren(...asked.slice(0, 50).map((one, index) => {
    const row = element("tr");
    const button = element("button", one.text.length > 90 ? `${one.text.slice(0, 90)}…` : one.text, "link");
    button.type = "button";
    if (one === last) button.setAttribute("aria-current", "true");
    button.addEventListener("click", () => {
      last = one;
      show();
      $("asked").querySelectorAll("button")[index].focus();
    });
    const cell = element("td");
    cell.append(button);
    row.append(cell, element("td", number(one.score)),
      element("td", WORDS[decision(one, value)].toLowerCase()));
    return row;
  }));
}

$("ask").addEventListener("submit", read);
$("chat").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey)) $("ask").requestSubmit();
});
$("tokens").addEventListener("keydown", along);
$("threshold").addEventListener("input", () => {
  $("threshold").dataset.moved = "yes";
  atThreshold();
});
$("threshold-reset").addEventListener("click", () => {
  delete $("threshold").dataset.moved;
  if (last) {
    prepareThreshold();
    atThreshold();
  }
});
meet();
