"use strict";

// ---- what is shown, and what the reader chose -------------------------------------------------------------------------

const live = document.documentElement.dataset.live === "true";
let text = document.getElementById("data").textContent;
let data = JSON.parse(text);
const view = { x: "tokens", measure: "kl", log: "1", price: "", probe: "1", off: "" };
for (const [name, value] of new URLSearchParams(location.hash.slice(1))) if (name in view) view[name] = value;

const byId = (id) => document.getElementById(id);
const hidden = () => new Set(view.off ? view.off.split("\n") : []);
const shownRuns = () => data.runs.filter((run) => !hidden().has(run.name));
const color = (run) => {
  const index = data.runs.indexOf(run);
  return index < 8 ? `var(--run-${index})` : `hsl(${(index * 137.5) % 360} 62% 52%)`; // chosen ones first, then spread hues
};
const priceOf = (run) => (view.price === "" ? run.price : Number(view.price));
const known = (value) => typeof value === "number" && Number.isFinite(value);
const mean = (values) => (values.length && values.every(known) ? values.reduce((a, b) => a + b, 0) / values.length : null);

const HOURS = { cuda: "GPU-hours", cpu: "CPU-hours" };
const hoursName = () => {
  const kinds = new Set(data.runs.map((run) => run.kind));
  return (kinds.size === 1 && HOURS[[...kinds][0]]) || "device-hours";
};

const X = {
  tokens: { of: (record) => record.tokens, name: () => "tokens", show: (x) => si(x), unit: () => 1 },
  // Whole seconds, minutes or hours are what a reader takes for round.
  hours: {
    of: (record) => over(record.device_seconds, 3600), name: hoursName, show: (x) => hours(x),
    unit: (most) => (most < 1 / 60 ? 1 / 3600 : most < 1 ? 1 / 60 : 1),
  },
  dollars: {
    of: (record, run) => {
      const spent = over(record.device_seconds, 3600);
      return known(spent) && known(priceOf(run)) ? spent * priceOf(run) : null;
    },
    name: () => "dollars",
    show: (x) => money(x),
    unit: () => 1,
  },
};

const MEASURES = {
  kl: { of: (d) => d.kl, show: (y) => plain(y), log: true, unit: "nats a token", best: Math.min },
  loss: { of: (d) => d.loss, teacher: (d) => d.teacher_loss, show: (y) => plain(y), log: true, unit: "nats a token", best: Math.min },
  above: {
    of: (d) => (known(d.loss) ? d.loss / d.teacher_loss - 1 : null),
    teacher: () => 0, show: (y) => percent(y), unit: "of the teacher's loss", best: Math.min,
  },
  agreement: { of: (d) => d.agreement, show: (y) => percent(y), unit: "of tokens, the same first choice", best: Math.max },
};

// ---- numbers ------------------------------------------------------------------------------------------------------------

const over = (a, b) => (known(a) ? a / b : null);
const trim = (digits) => (digits.includes(".") ? digits.replace(/\.?0+$/, "") : digits);
const superscript = (n) => String(n).replace(/[-0-9]/g, (c) => (c === "-" ? "⁻" : "⁰¹²³⁴⁵⁶⁷⁸⁹"[c]));
function si(x) {
  if (!known(x)) return "–";
  for (const [size, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e3, "k"]])
    if (Math.abs(x) >= size) return trim((x / size).toFixed(x / size >= 100 ? 0 : x / size >= 10 ? 1 : 2)) + letter;
  return String(Math.round(x * 100) / 100);
}
function plain(y) {
  if (!known(y)) return "–";
  const size = Math.abs(y);
  if (size === 0) return "0";
  if (size < 1e-3 || size >= 1e5) {
    const power = Math.floor(Math.log10(size) + 1e-9), factor = trim((y / 10 ** power).toFixed(1));
    return (factor === "1" ? "" : `${factor}·`) + "10" + superscript(power);
  }
  return signed(y.toFixed(size >= 100 ? 0 : size >= 10 ? 1 : size >= 1 ? 2 : 3));
}
const signed = (digits) => digits.replace("-", "−");
const percent = (y) => (known(y) ? `${signed((100 * y).toFixed(Math.abs(y) < 0.1 ? 1 : 0))} %` : "–");
// On an axis the zeros at the end of a number are noise.
const tick = (show) => (y) => show(y).replace(/^(\$?−?\d*\.\d*?)0+(?=$|\D)/, "$1").replace(/\.(?=$|\D)/, "");
const money = (x) => (known(x) ? `$${x >= 100 ? x.toFixed(0) : x.toFixed(x >= 1 ? 2 : 3)}` : "–");
function hours(x) {
  if (!known(x)) return "–";
  if (x === 0) return "0";
  return x >= 1 ? `${x.toFixed(x >= 10 ? 0 : 1)} h` : x >= 1 / 60 ? `${(60 * x).toFixed(x < 1 / 6 ? 1 : 0)} min`
    : `${(3600 * x).toFixed(x < 1 / 360 ? 1 : 0)} s`;
}

// ---- elements -------------------------------------------------------------------------------------------------------------

function make(tag, attributes = {}, ...children) {
  const svg = ["svg", "path", "line", "text", "rect", "circle", "g"].includes(tag);
  const node = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined) node.setAttribute(name, value);
  node.append(...children.filter((child) => child !== null));
  return node;
}

function card(title, { badge = null, last = [] } = {}) {
  const caption = make("figcaption", {}, title);
  if (badge) caption.append(make("span", { class: "badge" }, badge));
  const values = make("span", { class: "last" });
  for (const { color: own, label } of last) values.append(make("span", { style: `color:${own}` }, label));
  caption.append(values);
  return make("figure", { class: "card", "data-chart": title }, caption);
}

function replace(id, cards) {
  byId(id).replaceChildren(...cards.map(({ node }) => node));
  for (const { draw } of cards) draw();
}

// ---- tooltip --------------------------------------------------------------------------------------------------------------

function tip(event, heading, rows) {
  const body = make("table", {}, ...rows.map(({ own, dashed, name, value }) => make("tr", {},
    make("td", {}, own ? make("span", { class: dashed ? "dash" : "dot", style: `--own:${own}` }) : "", name), make("td", {}, value))));
  const box = byId("tip");
  box.replaceChildren(make("b", {}, heading), body);
  box.hidden = false;
  const { width, height } = box.getBoundingClientRect();
  const left = event.clientX + 16 + width > innerWidth ? event.clientX - width - 16 : event.clientX + 16;
  box.style.left = `${Math.max(4, left)}px`;
  box.style.top = `${Math.min(Math.max(4, event.clientY - height / 2), innerHeight - height - 4)}px`;
}
const untip = () => { byId("tip").hidden = true; };

// ---- charts ---------------------------------------------------------------------------------------------------------------

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const size = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * size).find((s) => s >= rough);
  const found = [];
  for (let t = Math.ceil(low / step) * step; t <= high + step * 1e-9; t += step) found.push(Math.abs(t) < step * 1e-9 ? 0 : t);
  return found;
}

function logTicks(low, high) {
  const found = [];
  for (let power = Math.floor(Math.log10(low)); power <= Math.ceil(Math.log10(high)); power++)
    for (const m of [1, 2, 5]) found.push(m * 10 ** power);
  const inside = found.filter((t) => t >= low * 0.999 && t <= high * 1.001);
  if (inside.length < 3) return ticks(low, high, 4).filter((t) => t > 0);
  return inside.length > 6 ? inside.filter((t) => /^1e/.test(t.toExponential())) : inside;
}

// series: {name, own, dashed, points: [[x, y]]}; options: showX, showY, log, marks [{x, own, label}], labels (of whole x), from0
function lineChart(figure, series, options) {
  const { showX, showY, log = false, marks = [], labels = null, xName = "", height = 190, unit = () => 1 } = options;
  const width = Math.max(200, figure.clientWidth - 28);
  const points = series.flatMap((one) => one.points).filter(([x, y]) => known(x) && known(y) && (!log || y > 0));
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": figure.dataset.chart });
  figure.append(svg);
  if (!points.length) {
    svg.append(make("text", { x: width / 2, y: height / 2, "text-anchor": "middle" }, "nothing recorded"));
    return;
  }
  const xs = points.map(([x]) => x), ys = points.map(([, y]) => y);
  const x0 = labels ? 0 : Math.min(0, ...xs), x1 = labels ? labels.length - 1 : Math.max(...xs) || 1;
  let y0 = Math.min(...ys), y1 = Math.max(...ys);
  if (log) { y0 /= 1.08; y1 *= 1.08; } else { const room = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1; y0 -= room; y1 += room; }
  if (!log && Math.min(...ys) >= 0 && y0 < (y1 - y0) * 0.35) y0 = Math.min(0, ...ys);
  const yTicks = log ? logTicks(y0, y1) : ticks(y0, y1, 4);
  const showTick = tick(showY);
  const left = 10 + 6.4 * Math.max(...yTicks.map((t) => showTick(t).length)), right = width - 8, top = 16, bottom = height - 32;
  const scale = log ? Math.log : (y) => y;
  const px = (x) => left + ((x - x0) / (x1 - x0 || 1)) * (right - left);
  const py = (y) => bottom - ((scale(y) - scale(y0)) / (scale(y1) - scale(y0) || 1)) * (bottom - top);
  for (const t of yTicks) svg.append(
    make("line", { class: "grid-line", x1: left, x2: right, y1: py(t), y2: py(t) }),
    make("text", { x: left - 6, y: py(t) + 4, "text-anchor": "end" }, showTick(t)));
  const every = labels ? Math.ceil(labels.length / Math.floor((right - left) / 34)) : 1;
  const xTicks = labels ? labels.map((_, i) => i).filter((i) => i % every === 0) 
    : ticks(x0 / unit(x1), x1 / unit(x1), Math.max(2, Math.floor(width / 62))).map((t) => t * unit(x1));
  for (const t of xTicks)
    svg.append(make("text", { x: px(t), y: bottom + 15, "text-anchor": "middle" }, labels ? labels[t] : tick(showX)(t)));
  svg.append(make("line", { class: "axis", x1: left, x2: right, y1: bottom, y2: bottom }),
    make("text", { x: right, y: height - 3, "text-anchor": "end" }, xName));
  const said = [];
  for (const { x, own, label } of marks) {
    if (!known(x) || x <= x0 || x > x1) continue;
    svg.append(make("line", { class: "stage", x1: px(x), x2: px(x), y1: top - 4, y2: bottom, style: `stroke:${own}` }));
    if (said.some((at) => Math.abs(at - px(x)) < 40)) continue;
    said.push(px(x));
    svg.append(make("text", { x: Math.min(px(x) + 3, right - 5 * label.length), y: top - 4 }, label));
  }
  for (const { name, own, dashed, points: all } of series) {
    let path = "", pen = "M";
    const drawn = all.filter(([x, y]) => known(x) && known(y) && (!log || y > 0));
    for (const [x, y] of all) {
      if (!known(x) || !known(y) || (log && y <= 0)) { pen = "M"; continue; }
      path += `${pen}${px(x).toFixed(1)} ${py(y).toFixed(1)}`;
      pen = "L";
    }
    svg.append(make("path", { class: dashed ? "curve teacher" : "curve", d: path, style: `stroke:${own}`, "data-series": name }));
    if (drawn.length === 1) svg.append(make("circle", { cx: px(drawn[0][0]), cy: py(drawn[0][1]), r: 3, style: `fill:${own}` }));
  }
  const cursor = make("g", { visibility: "hidden" });
  svg.append(cursor);
  const candidates = [...new Set(xs)].sort((a, b) => a - b);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const wanted = x0 + (((event.clientX - box.left) * (width / box.width) - left) / (right - left)) * (x1 - x0);
    const at = candidates.reduce((best, x) => (Math.abs(x - wanted) < Math.abs(best - wanted) ? x : best));
    cursor.replaceChildren(make("line", { class: "cursor", x1: px(at), x2: px(at), y1: top, y2: bottom }));
    const rows = [];
    for (const { name, own, dashed, points: all } of series) {
      const near = all.filter(([x, y]) => known(x) && known(y))
        .reduce((best, point) => (!best || Math.abs(point[0] - at) < Math.abs(best[0] - at) ? point : best), null);
      if (!near || Math.abs(near[0] - at) > (x1 - x0) / 40) continue;
      rows.push({ own, dashed, name, value: showY(near[1]) });
      if (!log || near[1] > 0) cursor.append(make("circle", { cx: px(near[0]), cy: py(near[1]), r: 3.5, style: `fill:${own}` }));
    }
    cursor.setAttribute("visibility", "visible");
    tip(event, labels ? options.whole(at) : `${showX(at)}${view.x === "tokens" || options.plainX ? ` ${xName}` : ""}`, rows);
  });
  svg.addEventListener("pointerleave", () => { cursor.setAttribute("visibility", "hidden"); untip(); });
}

function heatmap(figure, run, layers, all) {
  const used = layers[0].octaves.map((_, i) => all.some((layer) => layer.octaves[i] > 0)); // the same range in each
  const first = used.indexOf(true), end = used.lastIndexOf(true) + 1;
  const width = Math.max(200, figure.clientWidth - 28), row = Math.max(5, Math.min(18, 240 / layers.length));
  const left = 30, right = width - 8, top = 4, bottom = top + row * layers.length, height = bottom + 32;
  const cell = (right - left) / (end - first);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": figure.dataset.chart });
  const px = (octave) => left + Math.min(Math.max(octave - first, 0), end - first) * cell;
  layers.forEach((layer, i) => {
    const total = layer.octaves.reduce((a, b) => a + b, 0) || 1;
    for (let octave = first; octave < end; octave++) {
      const share = layer.octaves[octave] / total;
      if (share > 0) svg.append(make("rect", { x: px(octave) + 0.5, y: top + i * row + 0.5, width: cell - 1, height: row - 1, rx: 1.5,
        style: `fill:${color(run)}`, opacity: (0.08 + 0.92 * Math.sqrt(share)).toFixed(3) }));
    }
    const median = Math.log2(layer.half_life[1]);
    svg.append(make("line", { x1: px(median), x2: px(median), y1: top + i * row + 1, y2: top + (i + 1) * row - 1,
      style: "stroke:var(--ink);stroke-width:2" }));
    if (i % Math.ceil(layers.length / 8) === 0)
      svg.append(make("text", { x: left - 6, y: top + (i + 0.5) * row + 4, "text-anchor": "end" }, i));
  });
  const every = Math.ceil((end - first + 1) / Math.floor((right - left) / 36));
  for (let octave = first; octave <= end; octave += every)
    svg.append(make("text", { x: px(octave), y: bottom + 14, "text-anchor": "middle" }, binary(2 ** octave)));
  svg.append(make("text", { x: right, y: height - 3, "text-anchor": "end" }, "half-life in tokens"));
  figure.append(svg);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect(), at = Math.floor(((event.clientY - box.top) * (height / box.height) - top) / row);
    const layer = layers[at];
    if (!layer) return untip();
    const [low, middle, high] = layer.half_life.map(si);
    tip(event, `layer ${at}`, [{ name: "median", value: middle }, { name: "10 % to 90 %", value: `${low} to ${high}` },
      { name: "largest state", value: plain(layer.state_norm[1]) }]);
  });
  svg.addEventListener("pointerleave", untip);
}

// ---- sections -------------------------------------------------------------------------------------------------------------

function domainNames() {
  const names = new Map();
  for (const run of data.runs) for (const probe of run.probes.slice(-1))
    for (const [name, domain] of Object.entries(probe.domains)) names.set(name, (names.get(name) ?? true) && domain.kept_out);
  return [...names].sort((a, b) => a[1] - b[1]);
}

const against = () => ({ showX: X[view.x].show, xName: X[view.x].name(), unit: X[view.x].unit });

const stageMarks = () => shownRuns().flatMap((run) => run.stages.slice(1)
  .map((stage) => ({ x: X[view.x].of(stage, run), own: color(run), label: stage.name })));

function curvesOf(pick, measure) {
  const series = [], teachers = new Map();
  for (const run of shownRuns()) {
    const points = [], teacher = [];
    for (const probe of run.probes) {
      const domains = pick(probe), x = X[view.x].of(probe, run);
      if (!domains.length) continue;
      points.push([x, mean(domains.map(measure.of))]);
      if (measure.teacher) teacher.push([x, mean(domains.map(measure.teacher))]);
    }
    if (points.length) series.push({ name: run.name, own: color(run), points });
    // One line for all runs with this teacher: the longest.
    const height = teacher.length ? plain(teacher[0][1]) : null;
    if (height !== null && !(teachers.get(height)?.at(-1)[0] > teacher.at(-1)[0])) teachers.set(height, teacher);
  }
  for (const points of teachers.values()) series.push({ name: "teacher", own: "var(--soft)", dashed: true, points });
  return series;
}

function domainCard(title, badge, pick) {
  const measure = MEASURES[view.measure], series = curvesOf(pick, measure);
  const last = series.filter(({ dashed }) => !dashed || view.measure === "loss").map(({ own, points }) => ({ color: own, label: measure.show(points.at(-1)[1]) }));
  const node = card(title, { badge, last });
  return { node, draw: () => lineChart(node, series, {
    ...against(), showY: measure.show, log: view.log === "1" && measure.log, marks: stageMarks() }) };
}

function drawHeldOut() {
  const names = domainNames();
  byId("held-out").hidden = byId("moment").hidden = !names.length;
  if (!names.length) return;
  const learnt = names.filter(([, kept]) => !kept).map(([name]) => name), cards = [];
  const side = (wanted) => (probe) => wanted.filter((name) => name in probe.domains).map((name) => probe.domains[name]);
  if (learnt.length > 1) cards.push(domainCard("The mixture", "mean", side(learnt)));
  const kept = names.filter(([, is]) => is).map(([name]) => name);
  if (kept.length > 1) cards.push(domainCard("Kept out", "mean", side(kept)));
  for (const [name, is] of names) cards.push(domainCard(name, is ? "kept out" : null, side([name])));
  replace("domains", cards);
  byId("held-out-note").textContent = [MEASURES[view.measure].unit,
    ...(MEASURES[view.measure].teacher ? ["dashed: the teacher"] : []), "dotted: where a stage begins"].join("; ");
}

function probeAt(run) {
  const end = Math.max(...shownRuns().flatMap((each) => each.probes.slice(-1).map((probe) => probe.tokens)));
  const wanted = Number(view.probe) * end;
  return run.probes.reduce((best, probe) => (!best || Math.abs(probe.tokens - wanted) < Math.abs(best.tokens - wanted) ? probe : best), null);
}

const octaveName = (i) => (i === 0 ? "0" : binary(2 ** (i - 1)));
const octaveRange = (i) => `${i < 2 ? i : `${2 ** (i - 1)} to ${2 ** i - 1}`} tokens before`;
const binary = (n) => (n >= 2 ** 20 ? `${n / 2 ** 20}M` : n >= 1024 ? `${n / 1024}k` : String(n));

function drawMoment() {
  const runs = shownRuns().filter((run) => run.probes.length);
  const moments = runs.map((run) => [run, probeAt(run)]);
  const tokens = Math.max(...moments.map(([, probe]) => probe.tokens));
  byId("probe-name").textContent = runs.length ? `after ${si(tokens)} tokens` : "";
  const cards = domainNames().map(([name, kept]) => {
    const series = [];
    let longest = 0;
    for (const [run, probe] of moments) {
      const places = probe.domains[name]?.by_position;
      if (!places) continue;
      longest = Math.max(longest, places.loss.length);
      series.push({ name: run.name, own: color(run), points: places.loss.map((y, i) => [i, y]) });
      if (series.filter(({ dashed }) => dashed).every(({ points }) => plain(points[0][1]) !== plain(places.teacher_loss[0])))
        series.push({ name: "teacher", own: "var(--soft)", dashed: true, points: places.teacher_loss.map((y, i) => [i, y]) });
    }
    const node = card(name, { badge: kept ? "kept out" : null });
    node.dataset.chart = `${name} by position`;
    const labels = Array.from({ length: longest }, (_, i) => octaveName(i));
    return { node, draw: () => lineChart(node, series, { showY: plain, labels, whole: octaveRange, xName: "tokens before, from" }) };
  });
  replace("positions", cards);
  const layered = moments.filter(([, probe]) => probe.layers.length);
  replace("half-lives", layered.map(([run, probe]) => {
    const node = card(run.name);
    node.dataset.chart = `${run.name} half-lives`;
    return { node, draw: () => heatmap(node, run, probe.layers, layered.flatMap(([, { layers }]) => layers)) };
  }));
  const states = [
    ["Norm of the largest state", (layer) => layer.state_norm[1], true],
    ["Smallest normaliser, share of the largest", (layer) => layer.smallest_normalizer, true],
  ];
  replace("states", states.map(([title, of, log]) => {
    const series = layered.map(([run, probe]) => ({ name: run.name, own: color(run), points: probe.layers.map((layer, i) => [i, of(layer)]) }));
    const node = card(title);
    return { node, draw: () => lineChart(node, series, { showX: plainLayer, showY: plain, log, xName: "layer", plainX: true, height: 170 }) };
  }));
}
const plainLayer = (x) => (Number.isInteger(x) ? String(x) : "");

function drawTraining() {
  const curves = [
    ["Alignment error", "alignment_error", plain, true], ["KL from the teacher", "kl", plain, true],
    ["Next-token loss", "next_token_loss", plain, false], ["Gradient norm", "gradient_norm", plain, true],
    ["Tokens a second", "tokens_per_second", si, false],
  ];
  const cards = [];
  for (const [title, name, showY, log] of curves) {
    const series = shownRuns().map((run) => ({ name: run.name, own: color(run), points: run.training.tokens.map((tokens, i) => [
      X[view.x].of({ tokens, device_seconds: run.training.device_seconds[i] }, run), run.training[name][i]]) }));
    if (!series.some(({ points }) => points.some(([, y]) => known(y)))) continue;
    const node = card(title);
    node.dataset.chart = `training: ${title}`;
    cards.push({ node, draw: () => lineChart(node, series, {
      ...against(), showY, log, marks: stageMarks() }) });
  }
  byId("training").hidden = !cards.length;
  replace("curves", cards);
}

// ---- table ----------------------------------------------------------------------------------------------------------------

const shown = (value) => (value === null || value === undefined ? "–" : typeof value === "number" ? String(value)
  : typeof value === "string" ? value.split("/").pop() || value : JSON.stringify(value).replaceAll('"', ""));
const titled = (name) => name.replaceAll("_", " ");

const COLUMNS = [
  ["tokens", (run) => si(run.tokens)],
  ["tokens/s", (run) => si(run.tokens_per_second)],
  [() => hoursName(), (run) => hours(run.device_hours)],
  ["cost", (run) => money(known(run.device_hours) && known(priceOf(run)) ? run.device_hours * priceOf(run) : null)],
  ["KL", (run) => plain(run.summary?.learnt?.kl), (run) => run.summary?.learnt?.kl, "best"],
  ["above\nteacher", (run) => percent(run.summary?.learnt?.above), (run) => run.summary?.learnt?.above],
  ["KL,\nkept out", (run) => plain(run.summary?.kept_out?.kl), (run) => run.summary?.kept_out?.kl, "best"],
  ["above,\nkept out", (run) => percent(run.summary?.kept_out?.above), (run) => run.summary?.kept_out?.above],
];

function drawTable() {
  const usual = Object.fromEntries(data.differences.map((name) => [name, commonest(data.runs.map((run) => shown(run.settings[name])))]));
  const columns = COLUMNS.filter(([, show]) => data.runs.some((run) => show(run) !== "–"));
  const heads = columns.map(([name]) => make("th", { scope: "col", style: "white-space:pre" }, typeof name === "function" ? name() : name));
  const settings = data.differences.map((name) => make("th", { scope: "col", class: "setting" }, titled(name)));
  const rows = data.runs.map((run) => {
    const box = make("input", { type: "checkbox", "aria-label": `show ${run.name}` });
    box.checked = !hidden().has(run.name);
    box.addEventListener("change", () => {
      const off = hidden();
      if (box.checked) off.delete(run.name); else off.add(run.name);
      choose("off", [...off].join("\n"));
    });
    const cells = columns.map(([, show, value, mark]) => {
      const best = mark && data.runs.length > 1 && known(value(run)) && value(run) === Math.min(...data.runs.map(value).filter(known));
      return make("td", { class: best ? "best" : null }, show(run));
    });
    const others = data.differences.map((name) => {
      const value = shown(run.settings[name]);
      return make("td", { class: value === usual[name] ? "setting" : "setting other", title: JSON.stringify(run.settings[name]) ?? "" }, value);
    });
    return make("tr", { class: box.checked ? null : "off", "data-run": run.name },
      make("td", { class: "run", style: `--own:${color(run)}` }, make("label", {}, box, run.name)), make("td", {}, ...progress(run)), ...cells, ...others);
  });
  byId("runs").replaceChildren(
    make("thead", {}, make("tr", {}, make("th", { scope: "col" }, "run"), make("th", { scope: "col" }, ""), ...heads, ...settings)),
    make("tbody", {}, ...rows));
  drawSame();
}

function drawBenchmarks() {
  const runs = shownRuns().filter((run) => Object.keys(run.tasks).length), rows = new Map();
  for (const run of runs) for (const [name, row] of Object.entries(run.tasks)) if (!rows.has(name)) rows.set(name, row);
  byId("benchmarks").hidden = !rows.size;
  const within = (estimate) => (estimate ? `${signed((100 * estimate.value).toFixed(1))} ± ${(100 * (estimate.error ?? 0)).toFixed(1)}` : "–");
  const heads = runs.map((run) => make("th", { scope: "col" }, make("span", { class: "dot", style: `--own:${color(run)}` }), run.name));
  byId("tasks").replaceChildren(
    make("thead", {}, make("tr", {}, ...["benchmark", "chance", "teacher"].map((head) => make("th", { scope: "col" }, head)), ...heads)),
    make("tbody", {}, ...[...rows].map(([name, row]) => make("tr", { "data-task": name },
      make("td", {}, row.title, make("span", { class: "detail" }, `by ${row.kind}, ${row.shots === null ? "" : `${row.shots}-shot, `}${row.documents} documents`)),
      make("td", {}, (100 * row.chance).toFixed(1)), make("td", {}, within(row.teacher)),
      ...runs.map((run) => {
        const own = run.tasks[name];
        return make("td", {}, own ? within(own.recovered) : "", make("span", { class: "detail" }, own ? within(own.student) : ""));
      })))));
}

function progress(run) {
  const bar = make("span", { class: "bar" }, make("i", { style: `width:${(100 * run.step) / run.steps}%` }));
  const left = run.state === "running" && run.tokens_per_second ? `, ${hours((run.all_tokens - run.tokens) / run.tokens_per_second / 3600)} left` : "";
  return run.state === "finished" ? [make("span", { class: "state" }, "finished")]
    : [make("span", { class: "state" }, `${run.state}, ${Math.floor((100 * run.step) / run.steps)} %${left}`), bar];
}

function commonest(values) {
  const count = new Map();
  for (const value of values) count.set(value, (count.get(value) ?? 0) + 1);
  return [...count].reduce((best, each) => (each[1] > best[1] ? each : best), ["", 0])[0];
}

function drawSame() {
  const first = data.runs[0]?.settings ?? {};
  const names = Object.keys(first).filter((name) => !data.differences.includes(name));
  const device = data.runs[0]?.device;
  const rows = names.map((name) => [titled(name), shown(first[name])]);
  if (device) rows.unshift(["device", `${data.runs[0].devices} × ${device}`]);
  byId("same").firstElementChild.textContent = data.runs.length > 1 ? "The same in all of them" : "Recipe";
  byId("same").lastElementChild.replaceChildren(...rows.map(([name, value]) =>
    make("div", {}, make("dt", {}, name), make("dd", { title: value }, value))));
}

// ---- everything -----------------------------------------------------------------------------------------------------------

function draw() {
  const some = data.runs.length > 0;
  byId("empty").hidden = some;
  byId("empty").textContent = "No runs here yet: power-retention retrain MODEL OUT --text … --held-out NAME=PATH begins one.";
  byId("unreadable").textContent = data.unreadable.join(" ");
  for (const section of document.querySelectorAll("main > section")) section.hidden = !some;
  if (!some) return;
  byId("hours-name").textContent = hoursName();
  for (const input of document.querySelectorAll("fieldset input")) input.checked = view[input.name] === input.value;
  const timed = data.runs.some((run) => known(run.device_hours));
  document.querySelector("input[value=hours]").disabled = !timed;
  document.querySelector("input[value=dollars]").disabled = !timed || !data.runs.some((run) => known(priceOf(run)));
  byId("log").checked = view.log === "1";
  byId("log").parentElement.hidden = !MEASURES[view.measure].log;
  if (document.activeElement !== byId("price")) byId("price").value = view.price;
  byId("probe").value = view.probe;
  drawTable();
  drawHeldOut();
  drawBenchmarks();
  if (!byId("moment").hidden) drawMoment();
  drawTraining();
}

function choose(name, value) {
  view[name] = value;
  const plainly = new URLSearchParams(Object.entries(view).filter(([, each]) => each !== ""));
  history.replaceState(null, "", `#${plainly}`);
  draw();
}

for (const fieldset of document.querySelectorAll("fieldset"))
  fieldset.addEventListener("change", (event) => choose(event.target.name, event.target.value));
byId("log").addEventListener("change", (event) => choose("log", event.target.checked ? "1" : "0"));
byId("price").addEventListener("input", (event) => choose("price", event.target.validity.valid ? event.target.value : ""));
byId("probe").addEventListener("input", (event) => choose("probe", event.target.value));
byId("controls").addEventListener("submit", (event) => event.preventDefault());
let resizing = 0;
addEventListener("resize", () => { cancelAnimationFrame(resizing); resizing = requestAnimationFrame(draw); });

async function refresh() {
  const sign = byId("live");
  try {
    if (!document.hidden) {
      const answer = await fetch("data.json", { cache: "no-cache" });
      if (!answer.ok) throw new Error(answer.statusText);
      const newer = await answer.text();
      if (newer !== text) { text = newer; data = JSON.parse(newer); untip(); draw(); }
    }
    sign.textContent = data.runs.some((run) => run.state === "running") ? "live" : "up to date";
    sign.className = "";
  } catch (error) {
    sign.textContent = "not connected";
    sign.className = "lost";
  }
  setTimeout(refresh, 2000);
}

if (view.x === "dollars" && !data.runs.some((run) => known(priceOf(run)))) view.x = "tokens";
draw();
if (live) { byId("live").hidden = false; refresh(); }
