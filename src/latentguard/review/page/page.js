/* One prompt at a time: shows it, labels it, and teaches the guard. Texts are never markup. */

const $ = (id) => document.getElementById(id);
const DECISIONS = { block: "Flagged", review: "To review", allow: "Allowed" };
const KEYS = { h: "harmful", l: "harmless", s: "skip", u: "undo" };
const LONG = 600; // characters from which a prompt is set smaller
const PAUSE = 150; // milliseconds before the tokens are asked for
const POLL = 1000; // milliseconds between two looks at the teaching

let key = location.hash.slice(1); // of this machine's page; the service asks for the admin key
let about = null;
let item = null;
let pending = 0;
let turn = Promise.resolve();
let reviewer = "";

function element(name, text, className) {
  const node = document.createElement(name);
  if (text !== undefined) node.textContent = text;
  if (className) node.className = className;
  return node;
}

const number = (value) => value.toFixed(Math.abs(value) >= 100 ? 0 : 3).replace("-", "−");

async function ask(path, body) {
  const headers = { "content-type": "application/json", authorization: `Bearer ${key}` };
  const how = body ? { method: "POST", headers, body: JSON.stringify(body) } : { headers };
  const answer = await fetch(`/review/${path}`, how).catch(() => {
    throw new Error("The program cannot be reached. Is it still running? Your labels are in the file.");
  });
  const content = await answer.json().catch(() => ({}));
  if (answer.ok) return content;
  const error = new Error(content.error ? content.error.message : `The program answered ${answer.status}.`);
  error.status = answer.status;
  throw error;
}

function problem(text) {
  $("problem").textContent = text || "";
  $("problem").hidden = !text;
}

/* One piece of work after the other. */
function inTurn(work) {
  pending += 1;
  turn = turn.then(work).then(() => problem(""), (error) => problem(error.message)).finally(() => { pending -= 1; });
}

/* Dropped while something is under way, so that a key that is struck twice labels nothing unseen. */
function alone(work) {
  if (!pending) inTurn(work);
}

/* ---- who reviews */

async function enter() {
  about = await ask("about");
  reviewer = reviewer || about.reviewer || localStorage.getItem("reviewer") || "";
  $("about").textContent = `${about.source} · guard: ${about.name}`;
  $("enter").hidden = Boolean(reviewer);
  for (const id of ["desk", "actions", "who"]) $(id).hidden = !reviewer;
  if (!reviewer) {
    $("name").focus();
    return;
  }
  $("who").textContent = `Reviewer: ${reviewer}`;
  tell(`Each label is written to ${about.labels} at once.`);
  await next(null);
  await watchTeaching();
}

async function open() {
  try {
    await enter();
  } catch (error) {
    $("about").textContent = "";
    if (error.status !== 401 || location.hash) return problem(error.message);
    problem(key ? "This is not the admin key." : "");
    $("enter").hidden = $("key-part").hidden = false;
    $("key").required = true;
    $("name").value = localStorage.getItem("reviewer") || "";
  }
}

$("enter").addEventListener("submit", (event) => {
  event.preventDefault();
  reviewer = $("name").value.trim();
  localStorage.setItem("reviewer", reviewer);
  if ($("key").value) key = $("key").value;
  problem("");
  open();
});

$("who").addEventListener("click", () => {
  $("name").value = reviewer;
  $("enter").hidden = false;
  $("desk").hidden = $("actions").hidden = true;
  $("name").select();
});

/* ---- one prompt at a time */

const place = () => ({ reviewer, which: $("which").value, order: $("order").value });

async function next(after) {
  show(await ask("next", { ...place(), after }));
}

async function label(word) {
  if (!item) return;
  const answer = await ask("label", { ...place(), key: item.key, label: word });
  tellLabel(answer.labelled);
  show(answer);
}

async function undo() {
  const answer = await ask("undo", place());
  show(answer);
  tell("Undone.");
}

function tell(text, dispute = false) {
  $("last").textContent = text;
  $("last").classList.toggle("dispute", dispute);
}

function tellLabel(labelled) {
  const others = Object.entries(labelled.others);
  const said = others.map(([name, word]) => `${name}: ${word}`).join(", ");
  const dispute = labelled.disputed ? " You disagree, so it does not count yet." : "";
  tell(`Labelled ${labelled.label}.${said ? ` ${said}.` : ""}${dispute}`, labelled.disputed);
}

function show(answer) {
  showCounts(answer.counts);
  item = answer.item;
  $("item").hidden = !item;
  $("end").hidden = Boolean(item);
  for (const id of ["harmful", "harmless", "skip"]) $(id).disabled = !item;
  if (item) showItem();
  else showEnd(answer.counts);
  window.scrollTo({ top: 0 });
}

function showCounts(counts) {
  const done = counts.harmful + counts.harmless;
  for (const side of ["harmful", "harmless"]) {
    $(`bar-${side}`).style.width = `${(100 * counts[side]) / Math.max(counts.total, 1)}%`;
  }
  const disputes = counts.disputed === 1 ? "1 disagreement" : `${counts.disputed} disagreements`;
  $("counts").textContent = `${done} of ${counts.total} labelled: ${counts.harmful} harmful, ` +
    `${counts.harmless} harmless` + (counts.disputed ? `, ${disputes}` : "");
  $("bar").setAttribute("aria-label", $("counts").textContent);
  showTeachButton(counts.agreed);
}

function showItem() {
  $("item").dataset.decision = item.decision;
  $("decision").textContent = DECISIONS[item.decision];
  $("category").textContent = (item.category || "").replaceAll("_", " ");
  $("decoded").textContent = item.obfuscations.length ? `decoded: ${item.obfuscations.join(", ")}` : "";
  $("own").textContent = ownWords();
  $("name-of").textContent = [item.id, item.segment].filter(Boolean).join(" · ");
  showGauge();
  $("history").replaceChildren(...item.history.map((turn) => {
    const line = element("p");
    line.dir = "auto";
    line.append(element("b", turn.role), turn.content);
    return line;
  }));
  $("text").textContent = item.text;
  $("text").classList.toggle("long", item.text.length > LONG);
  $("read-part").hidden = true;
  $("legend").textContent = "Looking at the tokens …";
  showTokens(item.key);
}

function ownWords() {
  if (!item.label) return item.disputed ? "reviewers disagree" : "";
  const others = Object.entries(item.others).map(([name, word]) => `, ${name}: ${word}`);
  return `you: ${item.label}${others.join("")}`;
}

function showGauge() {
  const span = about.high - about.low || 1;
  const at = (value) => `${Math.min(Math.max((100 * (value - about.low)) / span, 0), 100)}%`;
  $("cut").style.left = at(item.threshold);
  $("dot").style.left = at(item.score);
  const words = [`Score ${number(item.score)}`, `threshold ${number(item.threshold)}`,
    `probability ${Math.round(100 * item.probability)} %`];
  $("numbers").replaceChildren(...words.map((word) => element("span", word)));
  $("gauge").setAttribute("aria-label", words.join(", "));
}

function showEnd(counts) {
  const isDone = counts.harmful + counts.harmless >= counts.total;
  $("end-title").textContent = isDone ? "All prompts are labelled." : "The end of this list.";
  $("end-words").textContent = counts.matching
    ? `${counts.matching === 1 ? "1 prompt" : `${counts.matching} prompts`} of this list came before, such as what you skipped.`
    : isDone ? "The guard can learn from them below." : "Choose another list above, or teach the guard below.";
  $("again").hidden = !counts.matching;
}

/* ---- the tokens that speak */

/* Tokens that stand for parts of one character come together with the last of them. */
function visible(tokens) {
  const shown = [];
  let waiting = 0;
  for (const [text, adds] of tokens) {
    waiting += adds;
    if (text === "") continue;
    shown.push([text, waiting]);
    waiting = 0;
  }
  return shown;
}

async function showTokens(of) {
  let answer;
  await new Promise((done) => setTimeout(done, PAUSE)); // a prompt that is skipped at once is not read
  if (!item || item.key !== of) return;
  try {
    answer = await ask(`tokens?key=${of}`);
  } catch (error) {
    if (item && item.key === of) $("legend").textContent = error.message;
    return;
  }
  if (!item || item.key !== of) return;
  const tokens = visible(answer.tokens);
  const read = tokens.map(([text]) => text).join("");
  const start = item.text.indexOf(read);
  const marks = marked(tokens);
  if (start >= 0) {
    $("text").replaceChildren(item.text.slice(0, start), ...marks, item.text.slice(start + read.length));
  } else {
    $("read").replaceChildren(...marks);
    $("read-part").hidden = false;
  }
  $("legend").replaceChildren(element("span", "", "swatch cold"), "speaks for harmless",
    element("span", "", "swatch hot"), "for harmful");
}

function marked(tokens) {
  const most = Math.max(...tokens.map(([, adds]) => Math.abs(adds)), 1e-9);
  return tokens.flatMap(([text, adds]) => {
    const word = text.trimStart();
    const mark = element("mark", word);
    const share = Math.round((Math.abs(adds) / most) * 50);
    mark.style.background = `color-mix(in srgb, var(${adds > 0 ? "--hot" : "--cold"}) ${share}%, transparent)`;
    mark.title = `${adds > 0 ? "+" : ""}${number(adds)}`;
    return [text.slice(0, text.length - word.length), mark];
  });
}

/* ---- teaching */

let teaching = { state: "idle" };
let agreed = 0;

function showTeachButton(count) {
  agreed = count;
  const labels = count === 1 ? "this 1 label" : `these ${count} labels`;
  $("teach").textContent = count ? `Teach the guard with ${labels}` : "Teach the guard";
  $("teach").disabled = !count || teaching.state === "running";
}

async function watchTeaching() {
  $("teach").hidden = !about.can_teach;
  if (!about.can_teach) {
    $("teach-words").textContent = "This guard cannot be adapted here. The labels are in the file.";
    return;
  }
  teaching = await ask("teach");
  showTeaching();
  if (teaching.state === "running") setTimeout(() => watchTeaching().catch((e) => problem(e.message)), POLL);
}

const duration = (seconds) => (seconds < 60 ? "less than a minute" : `${Math.floor(seconds / 60)} min`);

function showTeaching() {
  const words = {
    idle: "The guard learns from all labels of the file on which the reviewers agree.",
    running: `The guard learns from ${teaching.labels} labels, for ${duration(teaching.seconds)} so far. ` +
      "This may take many minutes. You can go on with labelling.",
    done: `The guard has learnt from ${teaching.labels} labels.`,
    failed: teaching.error,
  };
  const text = words[teaching.state]; // set only if it changed, as it is read out
  if ($("teach-words").textContent !== text) $("teach-words").textContent = text;
  $("offer").hidden = teaching.state !== "done";
  $("folder").textContent = teaching.folder || "";
  $("command").textContent = teaching.command || "";
  $("tables").replaceChildren(...(teaching.tables || []).map(table));
  showTeachButton(agreed);
}

function table({ title, note, columns, rows }) {
  const made = element("table");
  made.append(element("caption", title));
  const head = made.createTHead().insertRow();
  for (const name of columns) head.append(element("th", name));
  const body = made.createTBody();
  for (const row of rows) {
    const line = body.insertRow();
    for (const cell of row) line.append(element("td", cell));
  }
  const box = element("div", undefined, "scroll");
  box.append(made);
  if (note) box.append(element("p", note));
  return box;
}

/* ---- buttons and keys */

const ACTIONS = {
  harmful: () => label("harmful"),
  harmless: () => label("harmless"),
  skip: async () => { if (item) await next(item.key); tell(""); },
  undo,
};
for (const [id, action] of Object.entries(ACTIONS)) $(id).addEventListener("click", () => alone(action));
for (const id of ["which", "order"]) $(id).addEventListener("change", () => inTurn(() => next(null)));
$("again").addEventListener("click", () => alone(() => next(null)));
$("teach").addEventListener("click", () => alone(async () => {
  await ask("teach", {});
  await watchTeaching();
}));

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || event.repeat) return;
  if (event.target.closest("input, select, textarea") || $("actions").hidden) return;
  const action = KEYS[event.key.toLowerCase()];
  if (action) alone(ACTIONS[action]);
});

open();
