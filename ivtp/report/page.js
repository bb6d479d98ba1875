// The page's behaviour. All text from data goes in as text, never as markup.
const data = JSON.parse(document.getElementById("data").textContent);
const { rows, samples, texts } = data;
const $ = (id) => document.getElementById(id);

function make(tag, properties = {}, ...children) {
  const element = Object.assign(document.createElement(tag), properties);
  element.append(...children);
  return element;
}
function svg(tag, attributes, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}
const bdi = (text) => make("bdi", { textContent: text });

// Answers ------------------------------------------------------------------------------------------------------------

const answered = (row, sample) => rows[row].predictions[sample] >= 0;
const prediction = (row, sample) => (answered(row, sample) ? texts[rows[row].predictions[sample]] : null);
const failed = (row, sample) => texts[rows[row].failed[sample]];
const right = (row, sample) => rows[row].right[sample] >= 0.5;
const differ = (one, other, sample) =>
  answered(one, sample) && answered(other, sample) && rows[one].predictions[sample] !== rows[other].predictions[sample];

const FILTERS = {
  all: (s) => [state.a, state.b].some((row) => answered(row, s) || failed(row, s)),
  differ: (s) => differ(state.a, state.b, s),
  gained: (s) => right(state.a, s) && answered(state.b, s) && !right(state.b, s),
  lost: (s) => right(state.b, s) && answered(state.a, s) && !right(state.a, s),
  "flip-a": (s) => differ(state.a, 0, s),
  "flip-b": (s) => differ(state.b, 0, s),
  "none-a": (s) => right(state.a, s) && answered(0, s) && !right(0, s),
  failed: (s) => failed(state.a, s) || failed(state.b, s),
};

function verdict(row, sample) {
  const share = rows[row].right[sample];
  const partly = rows[row].seeds ? `right in ${Math.round(100 * share)} % of the seeds` : `score ${share?.toFixed(2)}`;
  const text = share === null ? "not scored alone" : share === 1 ? "✓ right" : share === 0 ? "✗ wrong" : partly;
  return make("span", { className: `verdict ${right(row, sample) ? "right" : "wrong"}`, textContent: text });
}

// Table --------------------------------------------------------------------------------------------------------------

function number(text) {
  const found = text.replace("−", "-").match(/[-+]?\d+(\.\d+)?(e[-+]?\d+)?/i);
  return found ? Number(found[0]) : NaN;
}

function sortBy(head, column) {
  const down = head.getAttribute("aria-sort") !== "descending";
  document.querySelectorAll("thead th").forEach((th) => th.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", down ? "descending" : "ascending");
  for (const body of document.querySelectorAll("#table tbody")) {
    const lines = [...body.querySelectorAll("tr[data-row]")];
    const value = (line) => line.children[column].textContent.trim();
    lines.sort((one, other) => {
      if (column === 0) return value(one).localeCompare(value(other), undefined, { numeric: true }) * (down ? 1 : -1);
      const [x, y] = [number(value(one)), number(value(other))];
      if (Number.isNaN(x) || Number.isNaN(y)) return Number.isNaN(x) - Number.isNaN(y); // what is not known comes last
      return down ? y - x : x - y;
    });
    body.append(...lines);
  }
}

function setUpTable() {
  document.querySelectorAll(".sort").forEach((button) =>
    button.addEventListener("click", () => sortBy(button.closest("th"), Number(button.dataset.column))));
  for (const line of document.querySelectorAll("tr[data-row]")) {
    const row = Number(line.dataset.row);
    line.firstElementChild.title = rows[row].label;
    const count = samples.filter((_, s) => differ(row, 0, s)).length;
    const cell = line.querySelector(".flips");
    if (row === 0 || !samples.some((_, s) => answered(row, s))) { cell.textContent = "–"; continue; }
    const button = make("button", { type: "button", textContent: String(count) });
    button.setAttribute("aria-label", `${count} flipped answers of ${rows[row].label}: show them`);
    button.addEventListener("click", () => {
      Object.assign(state, { a: 0, b: row, filter: "differ", family: "" });
      $("list-box").open = true;
      choose();
      $("viewer").scrollIntoView();
    });
    cell.append(button);
  }
}

// Plots --------------------------------------------------------------------------------------------------------------

function theme() {
  const style = getComputedStyle(document.documentElement);
  const [text, quiet, line] = ["--text", "--quiet", "--line"].map((name) => style.getPropertyValue(name).trim());
  const font = "system-ui, 'DejaVu Sans', sans-serif";
  return {
    background: "transparent", font, view: { stroke: null },
    axis: { labelColor: quiet, titleColor: quiet, gridColor: line, domainColor: line, tickColor: line, titleFontWeight: 400, labelFontSize: 11, titleFontSize: 12, labelLimit: 180 },
    legend: { labelColor: text, titleColor: quiet, labelLimit: 220, symbolStrokeColor: quiet, symbolBaseFillColor: quiet, titleFontWeight: 400 },
    header: { labelColor: text, titleColor: quiet, labelFontSize: 12, labelFontWeight: 600, labelAnchor: "start" },
  };
}

// Every cell of the row, under names without signs that Vega would read.
const cellsOf = (i) => Object.fromEntries(data.cells[i].map((cell, c) => [`c${c}`, cell]));
const points = data.plots.wide.datasets.points.map((point) => ({ ...cellsOf(point.row), ...point }));
const color = { ...data.plots.wide.encoding.color, legend: null };
const tooltip = data.plots.wide.layer.at(-1).encoding.tooltip;

// The plot is specified in plots.py; Vega writes into a specification, so it gets a copy.
const costSpec = (width) => structuredClone({ ...data.plots[width < 640 ? "narrow" : "wide"], datasets: { points } });

function familySpec(width) {
  const names = data.families;
  const columns = Math.max(1, Math.min(names.length, Math.floor((width - 140) / 150)));
  const labels = Math.min(190, Math.max(60, width * 0.3));
  const values = rows.flatMap((row, i) => names.flatMap((family) => {
    const [mean, low, high] = row.accuracy[family] ?? [null];
    return mean === null ? [] : [{ ...cellsOf(i), label: row.label, series: row.series, family, mean, low, high }];
  }));
  const step = rows.length > 16 ? 14 : 20;
  return {
    data: { values },
    facet: { field: "family", type: "nominal", title: null, sort: names }, columns,
    spacing: { column: 14, row: 22 },
    resolve: { axis: { x: "independent" } },
    spec: {
      width: Math.max(70, (width - labels - 24 - 14 * columns) / columns), height: { step },
      encoding: { y: { field: "label", type: "nominal", title: null, sort: rows.map((row) => row.label), axis: { labelLimit: labels, ticks: false, domain: false } } },
      layer: [
        { mark: { type: "bar", height: { band: 0.72 } }, encoding: { x: { field: "mean", type: "quantitative", title: null, axis: { tickCount: 4, format: ".0f" }, scale: { domainMin: 0 } }, color, tooltip } },
        { mark: { type: "rule", strokeWidth: 1.3, color: theme().header.labelColor, opacity: 0.75 }, encoding: { x: { field: "low", type: "quantitative" }, x2: { field: "high" } } },
      ],
    },
  };
}

async function plot() {
  if (!window.vegaEmbed) return;
  const options = { actions: false, renderer: "svg", ast: true, config: theme(), tooltip: { theme: "custom" } };
  await window.vegaEmbed($("cost-plot"), costSpec($("cost-plot").clientWidth), options);
  await window.vegaEmbed($("families-plot"), familySpec($("families-plot").clientWidth), options);
  document.body.dataset.plots = "drawn";
}

// Viewer -------------------------------------------------------------------------------------------------------------

const drawable = rows.map((row, i) => i).filter((i) => rows[i].predictions.some((p) => p >= 0));
const withCuts = drawable.filter((i) => rows[i].cuts.length);
const first = rows.findIndex((row) => row.label === data.compare_to);
const a = withCuts.includes(first) ? first : withCuts.find((i) => rows[i].tau !== null) ?? withCuts[0] ?? drawable[0] ?? 0;
const b = withCuts.find((i) => i !== a && rows[i].series !== rows[a].series) ?? withCuts.find((i) => i !== a) ?? a;
const state = { a, b, filter: "all", family: "", sample: 0, cuts: { a: Infinity, b: Infinity } };
let shown = [];

function options(select, entries, chosen) {
  select.replaceChildren(...entries.map(([value, text]) => make("option", { value, textContent: text, selected: String(value) === String(chosen) })));
}

/** Recompute what the controls offer after any of them changed, keep the sample if it is still there, draw. */
function choose() {
  shown = samples.map((_, s) => s).filter((s) => (!state.family || samples[s].groups.includes(state.family)) && FILTERS[state.filter](s));
  // Questions without a stored picture come last.
  shown.sort((one, other) => ("picture" in samples[other]) - ("picture" in samples[one]) || one - other);
  if (!shown.includes(state.sample)) state.sample = shown[0] ?? -1;
  $("filter").value = state.filter;
  $("family").value = state.family;
  for (const side of ["a", "b"]) $(`method-${side}`).value = state[side];
  list();
  draw();
}

function draw() {
  const sample = samples[state.sample];
  const images = [...new Set(shown.map((s) => samples[s].image))];
  options($("image"), images.map((image) => [image, image]), sample?.image);
  options($("question"), shown.filter((s) => samples[s].image === sample?.image).map((s) => [s, `${samples[s].family}: ${samples[s].question}`]), state.sample);
  const place = shown.indexOf(state.sample);
  $("count").textContent = shown.length ? `${place + 1} of ${shown.length}` : "none";
  $("previous").disabled = place <= 0;
  $("next").disabled = place < 0 || place >= shown.length - 1;
  if (sample) $("current").replaceChildren(bdi(sample.question), " → ", make("b", {}, bdi(sample.answer)));
  else $("current").textContent = "No question fits this choice.";
  for (const button of $("list").querySelectorAll("button")) {
    if (Number(button.dataset.sample) === state.sample) button.setAttribute("aria-current", "true");
    else button.removeAttribute("aria-current");
  }
  for (const side of ["a", "b"]) panel(side);
}

function panel(side) {
  const row = rows[state[side]];
  const sample = samples[state.sample];
  const slider = $(`cut-${side}`);
  const cuts = row.cuts.length;
  const cut = Math.min(state.cuts[side], cuts);
  slider.max = cuts;
  slider.value = cut;
  slider.disabled = !cuts;
  slider.setAttribute("aria-label", `Cut of method ${side.toUpperCase()}`);
  for (const part of ["picture", "state", "answer", "words"]) $(`${part}-${side}`).replaceChildren();
  if (!sample) return;
  answer(side, row);
  if (failed(state[side], state.sample)) return;
  words(side, row);
  const lived = row.lived[state.sample];
  if (!("picture" in sample) || lived === undefined) {
    $(`picture-${side}`).append(make("p", { className: "quiet", textContent: "No picture is stored for this question: the page keeps those of the first questions with one image (viewer=…)." }));
    return;
  }
  const counts = [...lived].map((c) => c.codePointAt(0) - 48);
  const alive = counts.map((n) => n >= cut);
  const before = counts.map((n) => n >= cut - 1);
  const kept = alive.filter(Boolean).length;
  const on = sample.target.filter((p) => alive[p]).length;
  slider.setAttribute("aria-valuetext", cut ? `after cut ${cut} of ${cuts}, ${kept} tokens` : "before any cut");
  $(`picture-${side}`).append(picture(`alive-${side}`, sample, alive, before, `${kept} of ${counts.length} tokens`));
  const where = !cuts ? "never cut" : cut ? `cut ${cut} of ${cuts}: ${row.cuts[cut - 1]}` : `before the first of ${cuts} cuts`;
  const target = sample.target.length ? `; ${on} of the ${sample.target.length} target patches` : "";
  $(`state-${side}`).append(make("strong", { textContent: `${kept} of ${counts.length} tokens` }), target, make("br"), where);
}

function picture(id, sample, alive, before, label) {
  const side = Math.round(Math.sqrt(alive.length));
  const cells = (chosen) => chosen.map((yes, p) => (yes ? `M${p % side} ${Math.floor(p / side)}h1v1h-1z` : "")).join("");
  const target = new Set(sample.target);
  let frame = "";
  for (const p of target) {
    const [x, y] = [p % side, Math.floor(p / side)];
    if (!target.has(p - side)) frame += `M${x} ${y}h1`;
    if (!target.has(p + side)) frame += `M${x} ${y + 1}h1`;
    if (x === 0 || !target.has(p - 1)) frame += `M${x} ${y}v1`;
    if (x === side - 1 || !target.has(p + 1)) frame += `M${x + 1} ${y}v1`;
  }
  const removed = before.map((yes, p) => yes && !alive[p]);
  const strokes = removed.map((yes, p) => (yes ? `M${(p % side) + 0.3} ${Math.floor(p / side) + 0.7}l.4-.4` : "")).join("");
  const line = { fill: "none", "vector-effect": "non-scaling-stroke", "stroke-linecap": "square" };
  const image = { href: data.pictures[sample.picture], width: side, height: side, preserveAspectRatio: "none" };
  return svg("svg", { viewBox: `0 0 ${side} ${side}`, role: "img", "aria-label": `The image with ${label} alive` },
    svg("image", { ...image, class: "dim" }),
    svg("clipPath", { id }, svg("path", { d: cells(alive) })),
    svg("image", { ...image, class: "alive", "clip-path": `url(#${id})` }),
    svg("path", { class: "now", d: strokes, ...line }),
    svg("path", { d: frame, stroke: "#000", "stroke-width": 4.5, "stroke-opacity": 0.55, ...line }),
    svg("path", { class: "frame", d: frame, stroke: "#fff", "stroke-width": 2, ...line }));
}

function answer(side, row) {
  if (!answered(state[side], state.sample)) {
    const reason = failed(state[side], state.sample);
    return $(`answer-${side}`).append(...(reason ? [make("strong", { textContent: "failed: " }), bdi(reason)] : ["no answer recorded"]));
  }
  $(`answer-${side}`).append("“", bdi(prediction(state[side], state.sample)), "” ", verdict(state[side], state.sample));
  const early = row.early[state.sample];
  if (early >= 0) $(`answer-${side}`).append(make("br"), make("span", { className: "quiet" }, "after part 1: ", bdi(texts[early] || "–")));
}

function words(side, row) {
  const found = row.words[state.sample];
  const box = $(`words-${side}`);
  if (!found) {
    if (row.cuts.length) box.append(make("p", { className: "quiet", textContent: Object.keys(row.words).length ? "The words of this question are not stored." : "This method does not read the words." }));
    return;
  }
  const [which, ...scores] = found;
  const list = data.words[which];
  const top = 1.25 * Math.max(...scores.filter((x) => x !== null), row.tau ?? 0, 0.01);
  const line = make("p", {});
  const passing = [];
  list.forEach((word, i) => {
    const score = scores[i];
    const passes = row.tau !== null && score !== null && score >= row.tau;
    if (passes) passing.push(word);
    const element = make("span", { className: passes ? "word passes" : "word" }, bdi(word.trim() || "␣"), make("small", { textContent: score === null ? "–" : score.toFixed(2) }));
    element.style.setProperty("--heat", (4 + 71 * Math.max(0, score ?? 0) / top).toFixed(0));
    line.append(element);
  });
  const scale = make("div", { className: "scale" }, make("span", { textContent: "0" }));
  if (row.tau !== null) {
    const at = `${Math.min(100, Math.max(0, 100 * row.tau / top))}%`;
    const mark = scale.appendChild(make("i"));
    mark.style.left = at;
    scale.appendChild(make("span", { textContent: `τ = ${row.tau}` })).style.left = at;
  }
  box.append(make("p", { className: "quiet", textContent: "Cosine of each word with the image" }), line, scale);
  if (row.tau === null) return;
  const text = make("p", {}, make("span", { className: "quiet", textContent: "Pseudo CLS: " }));
  if (passing.length) passing.forEach((word, i) => text.append(i ? ", " : "mean of ", make("b", {}, bdi(word.trim()))));
  else text.append("no word reaches τ, so the visual CLS stands in");
  box.append(text);
}

function list() {
  $("list-count").textContent = shown.length;
  $("list").replaceChildren(...shown.map((s) => {
    const button = make("button", { type: "button" }, make("span", { className: "quiet", textContent: samples[s].family }), bdi(samples[s].question));
    const answers = make("span", {});
    for (const side of ["a", "b"]) {
      if (failed(state[side], s)) answers.append(side === "b" ? " · " : "", `${side.toUpperCase()}: failed`);
      if (!answered(state[side], s)) continue;
      const good = right(state[side], s);
      answers.append(side === "b" ? " · " : "", `${side.toUpperCase()}: `, make("span", { className: good ? "right" : "wrong" }, bdi(prediction(state[side], s)), good ? " ✓" : " ✗"));
    }
    button.append(answers);
    button.dataset.sample = s;
    button.addEventListener("click", () => { state.sample = s; draw(); $("current").scrollIntoView({ block: "start" }); });
    return make("li", {}, button);
  }));
}

function setUpViewer() {
  for (const side of ["a", "b"]) {
    options($(`method-${side}`), drawable.map((i) => [i, rows[i].section ? `${rows[i].label} (${rows[i].section})` : rows[i].label]), state[side]);
    $(`method-${side}`).addEventListener("change", (event) => { state[side] = Number(event.target.value); state.cuts[side] = Infinity; choose(); });
    $(`cut-${side}`).addEventListener("input", (event) => { state.cuts[side] = Number(event.target.value); panel(side); });
  }
  options($("family"), [["", "all"], ...data.families.map((name) => [name, name])], "");
  for (const name of ["filter", "family"]) $(name).addEventListener("change", (event) => { state[name] = event.target.value; choose(); });
  $("image").addEventListener("change", (event) => { state.sample = shown.find((s) => samples[s].image === event.target.value); draw(); });
  $("question").addEventListener("change", (event) => { state.sample = Number(event.target.value); draw(); });
  for (const [id, step] of [["previous", -1], ["next", 1]])
    $(id).addEventListener("click", () => { state.sample = shown[shown.indexOf(state.sample) + step] ?? state.sample; draw(); });
  // Open with something to see: target patches, and two answers.
  const telling = samples.findIndex((sample, s) => sample.target?.length && differ(state.a, state.b, s));
  state.sample = Math.max(0, telling);
  choose();
}

setUpTable();
setUpViewer();
await plot();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { plot(); draw(); });
let width = innerWidth;
let waiting;
addEventListener("resize", () => {
  clearTimeout(waiting);
  waiting = setTimeout(() => { if (innerWidth !== width) { width = innerWidth; plot(); } }, 200);
});
