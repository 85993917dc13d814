"use strict";
// Draws the report from the JSON in the page. What a model wrote is only ever set as text, never as markup.

const RUNS = (JSON.parse(document.getElementById("data").textContent).runs || []).map((run) => ({ rounds: [], log: [], ...run }));
const SVG = "http://www.w3.org/2000/svg";
const PAGE = 25;
const MANY = RUNS.length > 1;

// ---- elements ----------------------------------------------------------------------------------------------------

function fill(node, attributes, children) {
  for (const [key, value] of Object.entries(attributes || {})) {
    if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(key, value);
  }
  for (const child of children.flat(3)) {
    if (child !== null && child !== undefined && child !== false) node.append(child);
  }
  return node;
}
const el = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const svg = (tag, attributes, ...children) => fill(document.createElementNS(SVG, tag), attributes, children);
const colour = (i) => `var(--c${i % 8})`;

function section(id, title, about, ...children) {
  const known = children.flat().filter(Boolean);
  if (!known.length) return null;
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { id: `${id}-title` }, title), about && el("p", {}, about), known);
}

// ---- numbers for people ------------------------------------------------------------------------------------------

const finite = (value) => typeof value === "number" && Number.isFinite(value);

function number(value, digits) {
  if (!finite(value)) return "–";
  if (value === 0) return "0"; // Also where it is -0.
  if (Number.isInteger(value)) return value.toLocaleString("en");
  const size = Math.abs(value);
  if (size !== 0 && (size < 5e-4 || size >= 1e7)) return value.toExponential(2);
  return value.toLocaleString("en", { maximumFractionDigits: digits ?? (size < 1 ? 4 : size < 100 ? 2 : 0) });
}
const share = (value) => (finite(value) ? `${number(value * 100, 1)} %` : "–");

function time(seconds) {
  if (!finite(seconds)) return "–";
  if (seconds < 60) return `${number(seconds < 0.05 ? Math.round(seconds * 1000) / 1000 : seconds, seconds < 0.05 ? 3 : 1)} s`;
  const whole = Math.round(seconds);
  const [h, m, s] = [Math.floor(whole / 3600), Math.floor((whole % 3600) / 60), whole % 60];
  const two = (n) => String(n).padStart(2, "0");
  return h ? `${h}h ${two(m)}m` : `${m}m ${two(s)}s`;
}

function bytes(value) {
  if (!finite(value)) return "–";
  const units = ["B", "kB", "MB", "GB", "TB"];
  let unit = 0;
  while (value >= 1000 && unit < units.length - 1) { value /= 1000; unit += 1; }
  return `${number(value, 1)} ${units[unit]}`;
}

// ---- the view's state, in the address ----------------------------------------------------------------------------

const state = () => new URLSearchParams(location.hash.slice(1));

function setState(changes) {
  const next = state();
  for (const [key, value] of Object.entries(changes)) {
    if (value === "" || value === null) next.delete(key);
    else next.set(key, value);
  }
  history.replaceState(null, "", `#${next}`);
  draw.samples();
}

function applyTheme() {
  const wanted = state().get("theme") || (matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light");
  document.documentElement.dataset.theme = wanted;
}

// ---- what the runs say -------------------------------------------------------------------------------------------

const stagesOf = (run) => run.rounds.flatMap((round) => Object.entries(round.stages || {}).map(([name, stage]) => ({ round: round.round, name, ...stage })));
const sum = (list, key) => list.reduce((total, item) => total + (finite(item[key]) ? item[key] : 0), 0);
const lines = (run, event) => run.log.filter((line) => line.event === event);

/** Steps on one axis over all rounds: a round begins where the one before it ended. */
function axisOf(run) {
  const last = new Map();
  for (const line of run.log) {
    if (finite(line.step)) last.set(line.round, Math.max(last.get(line.round) || 0, line.step));
  }
  const starts = new Map();
  let at = 0;
  for (const round of [...last.keys()].sort((a, b) => a - b)) { starts.set(round, at); at += last.get(round); }
  return { place: (line) => (starts.get(line.round) || 0) + line.step, starts: [...starts] };
}

function busyShare(run) {
  const intervals = (run.timeline && run.timeline.intervals) || [];
  const devices = new Set(intervals.filter((i) => i.track.includes(":")).map((i) => i.track));
  const busy = sum(intervals.filter((i) => devices.has(i.track)).map((i) => ({ s: (i.end - i.start) * i.share })), "s");
  return devices.size && run.timeline.end ? busy / (devices.size * run.timeline.end) : null;
}

/** Of the last evaluation, or where there is none of the last step, which is noisy. */
const margin = (train) => (train.eval && train.eval["eval_rewards/margins"]) ?? train.last_margin;

function headFigures(run) {
  const stages = stagesOf(run);
  const steps = lines(run, "step");
  const trained = run.rounds.map((round) => round.train).filter(Boolean);
  const last = trained.at(-1);
  const generators = stages.filter((stage) => stage.kind === "sampler");
  const dead = run.dead_letters ? run.dead_letters.total : 0;
  return [
    ["Rounds", `${run.rounds.length}${run.rounds_planned ? ` of ${run.rounds_planned}` : ""}`, "begun"],
    ["Time", time(run.seconds_wall), "of the last start"],
    ["Pairs trained on", number(sum(trained, "pairs")), `${number(steps.length)} optimizer steps`],
    ["Tokens sampled", number(sum(generators, "tokens_out")), `${number(sum(generators, "tokens_out") / sum(generators, "seconds_busy"))} a busy second`],
    ["Last margin", number(last ? margin(last) : null), last ? `first ${number(trained[0].first_margin)}` : "no training yet"],
    ["Last loss", number(last ? last.last_loss : null), last ? `first ${number(trained[0].first_loss)}` : "no training yet"],
    ["Devices busy", share(busyShare(run)), "of the time"],
    ["Dead letters", number(dead || 0), dead ? "rows given up" : "no row was given up"],
    ["Memory", bytes(run.peak_rss_bytes), "at most, resident"],
  ];
}

/** What a person should look at, and what to do about it. */
function warnings(run) {
  const found = [];
  const say = (text) => found.push(text);
  for (const stage of stagesOf(run)) {
    const h = stage.health || {};
    const where = `Round ${stage.round}, ${stage.name}: `;
    if (h.unreadable_rate > 0.5) say(`${where}${share(h.unreadable_rate)} of the judge's answers could not be read. Give it a plainer prompt, a parse, or read = "logits".`);
    // Where both orders are asked, the line after this one says it.
    if (finite(h.first_slot_rate) && !finite(h.swap_consistency) && (h.first_slot_rate > 0.9 || h.first_slot_rate < 0.1)) say(`${where}${share(h.first_slot_rate)} of the verdicts are for the answer shown first: it judges places, not answers. Ask in both orders: order = "both".`);
    if (finite(h.swap_consistency) && h.swap_consistency < 0.4) say(`${where}both orders name the same answer in only ${share(h.swap_consistency)} of the pairs, and ${share(h.first_slot_rate)} of the verdicts are for the first place. Use a stronger judge, or a rule.`);
    if (finite(h.pair_yield) && h.pair_yield < 0.1) say(`${where}only ${share(h.pair_yield)} of the prompts give a pair. Sample more candidates, or lower min_gap.`);
  }
  for (const round of run.rounds) {
    const train = round.train;
    if (train && finite(margin(train)) && margin(train) < Math.min(0, train.first_margin || 0)) say(`Round ${round.round}: the reward margin fell below zero. The policy learns the wrong way round; look at the pairs and lower learning_rate.`);
  }
  const broken = lines(run, "step").filter((line) => !finite(line.loss) || line.skipped).length;
  if (broken) say(`${broken} optimizer steps had no finite loss or gradient. Lower learning_rate, or train in another dtype.`);
  for (const gate of run.gates || []) {
    if (gate.passed === false) say(`Round ${gate.round}: the adapter did not pass the gate ${gate.stage} (${share(gate.win_rate)} of the held-out prompts won, ${share(gate.threshold)} asked for).`);
  }
  if (run.dead_letters && run.dead_letters.total) say(`${number(run.dead_letters.total)} rows were given up; their reasons are below.`);
  return found;
}

// ---- charts ------------------------------------------------------------------------------------------------------

// Drawings that are as wide as the page are made for its width, or their texts would be tiny on a phone.
const PAGE_WIDTH = Math.min(Math.max(document.documentElement.clientWidth - 54, 300), 1000);
const NARROW = PAGE_WIDTH < 600;

const W = 420, H = 190, LEFT = 54, RIGHT = 8, TOP = 12, BOTTOM = 24;

function ticks(low, high, count) {
  const raw = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map((n) => n * power).find((n) => n >= raw) || raw;
  const found = [];
  for (let i = Math.ceil(low / step); i * step <= high + step * 1e-9 && found.length < 20; i += 1) found.push(i * step);
  return found;
}

/** series: [{ name, points: [[x, y]], dots }]; marks: [[x, label]]; range: lowest and highest of y. */
function chart(key, title, unit, series, marks = [], range = null) {
  const shown = series
    .map((s, i) => ({ tint: colour(s.colour ?? i), ...s, points: s.points.filter(([x, y]) => finite(x) && finite(y)) }))
    .filter((s) => s.points.length);
  if (!shown.length) return null;
  const all = shown.flatMap((s) => s.points);
  const xs = all.map((p) => p[0]), ys = all.map((p) => p[1]);
  const least = (values) => values.reduce((a, b) => Math.min(a, b), Infinity);
  const most = (values) => values.reduce((a, b) => Math.max(a, b), -Infinity);
  let [x0, x1, y0, y1] = [least(xs), most(xs), least(ys), most(ys)];
  if (x0 === x1) { x0 -= 0.5; x1 += 0.5; }
  const room = (y1 - y0) * 0.06 || Math.abs(y1) * 0.1 || 1;
  y0 -= room; y1 += room;
  if (range) [y0, y1] = range;
  const x = (value) => LEFT + ((value - x0) / (x1 - x0)) * (W - LEFT - RIGHT);
  const y = (value) => H - BOTTOM - ((value - y0) / (y1 - y0)) * (H - TOP - BOTTOM);
  const about = `${title}: ${shown.map((s) => `${s.name} from ${number(s.points[0][1])} to ${number(s.points.at(-1)[1])}`).join("; ")}`;
  const cross = svg("line", { class: "cross", y1: TOP, y2: H - BOTTOM, visibility: "hidden" });
  const read = el("div", { class: "read", "aria-live": "off" });
  const drawing = svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": about, "data-chart": key },
    svg("title", {}, about),
    ticks(y0, y1, 4).map((value) => [
      svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value) }),
      svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value, 4)),
    ]),
    ticks(x0, x1, 5).filter(Number.isInteger).map((value) => svg("text", { x: x(value), y: H - 8, "text-anchor": "middle" }, number(value))),
    marks.filter(([at]) => at > x0 && at < x1).map(([at, label]) => [
      svg("line", { class: "mark", x1: x(at), x2: x(at), y1: TOP, y2: H - BOTTOM }),
      svg("text", { x: x(at) + 3, y: TOP + 8 }, label),
    ]),
    shown.map((s) => [
      !s.dots && svg("path", { class: "line", style: `stroke:${s.tint}`, d: s.points.map((p, i) => `${i ? "L" : "M"}${x(p[0]).toFixed(1)} ${y(p[1]).toFixed(1)}`).join("") }),
      (s.dots || s.points.length < 12) && s.points.map((p) => svg("circle", { cx: x(p[0]), cy: y(p[1]), r: 3, style: `fill:${s.tint}` })),
    ]),
    cross);
  drawing.addEventListener("pointermove", (event) => {
    const box = drawing.getBoundingClientRect();
    const at = x0 + ((((event.clientX - box.left) / box.width) * W - LEFT) / (W - LEFT - RIGHT)) * (x1 - x0);
    const nearest = (s) => s.points.reduce((best, p) => (Math.abs(p[0] - at) < Math.abs(best[0] - at) ? p : best));
    const place = nearest(shown[0])[0];
    cross.setAttribute("x1", x(place)); cross.setAttribute("x2", x(place)); cross.setAttribute("visibility", "visible");
    read.textContent = `${unit} ${number(place)}: ${shown.map((s) => `${s.name} ${number(nearest(s)[1])}`).join(", ")}`;
  });
  drawing.addEventListener("pointerleave", () => { cross.setAttribute("visibility", "hidden"); read.textContent = ""; });
  const legend = shown.length > 1 && el("div", { class: "legend" }, shown.map((s) => el("span", {}, el("i", { style: `background:${s.tint}` }), s.name)));
  return el("div", { class: "chart" }, el("h3", {}, title), legend, drawing, read);
}

function trainingCharts() {
  const marks = MANY ? [] : RUNS.flatMap((run) => axisOf(run).starts.slice(1).map(([round, at]) => [at + 0.5, `round ${round}`]));
  const trainers = RUNS.map((run) => [...new Set(run.log.filter((line) => line.event === "step" || line.event === "evaluation").map((line) => line.stage))]);
  const curve = (key, title, names) => {
    let tint = -1;
    const series = RUNS.flatMap((run, r) => {
      const axis = axisOf(run);
      return trainers[r].flatMap((stage) => names.flatMap(([name, text]) => {
        const of = (event, key) => lines(run, event).filter((line) => line.stage === stage).map((line) => [axis.place(line), line[key]]);
        const several = MANY || trainers[r].length > 1;
        const label = several ? [MANY && run.name, trainers[r].length > 1 && stage, names.length > 1 && text].filter(Boolean).join(" ") : text;
        tint += 1;
        return [
          { name: label, colour: tint, points: of("step", name) },
          { name: `${label} (evaluation)`, colour: tint + (several ? 0 : 2), dots: true, points: of("evaluation", `eval_${name}`) },
        ];
      }));
    });
    return chart(key, title, "Step", series, marks);
  };
  return [
    curve("loss", "Loss", [["loss", "loss"]]),
    curve("margin", "Reward margin", [["rewards/margins", "margin"]]),
    curve("accuracy", "Share of pairs with a positive margin", [["rewards/accuracies", "accuracy"]]),
    curve("logps", "Log-probs of the answers, nats", [["logps/chosen", "chosen"], ["logps/rejected", "rejected"]]),
    curve("grad_norm", "Gradient norm before clipping", [["grad_norm", "norm"]]),
    curve("learning_rate", "Learning rate", [["learning_rate", "rate"]]),
  ].filter(Boolean);
}

const HEALTH = [
  ["unreadable_rate", "Unreadable", share], ["tie_rate", "Ties", share], ["first_slot_rate", "First place wins", share],
  ["swap_consistency", "Same in both orders", share], ["longer_wins_rate", "Longer answer wins", share],
  ["pair_yield", "Prompts with a pair", share], ["mean_gap", "Mean gap", number], ["score.mean", "Mean score", number],
  ["score.saturation", "Scores at the top", share], ["score.length_correlation", "Score and length", number],
  ["chosen_characters", "Chosen, characters", number], ["rejected_characters", "Rejected, characters", number],
];
const dig = (value, path) => path.split(".").reduce((at, key) => (at ? at[key] : undefined), value);

function judgeCharts() {
  return HEALTH.map(([key, title, show]) => {
    const of = (run) => run.rounds.map((round) => [round.round, dig(round.judge, key)]);
    const series = RUNS.map((run, i) => ({ name: MANY ? run.name : title, colour: i, points: of(run) }));
    return chart(`judge-${key}`, title, "Round", series, [], show === share ? [0, 1] : null);
  }).filter(Boolean);
}

function judgeTable() {
  const rows = RUNS.flatMap((run) => stagesOf(run).filter((s) => s.health).map((stage) => ({ run, stage })));
  if (!rows.length) return null;
  const used = HEALTH.filter(([key]) => rows.some(({ stage }) => finite(dig(stage.health, key))));
  return table("What every judge and pair stage said of itself", [MANY && "Run", "Round", "Stage", ...used.map(([, title]) => [title])],
    rows.map(({ run, stage }) => [MANY && run.name, stage.round, stage.name, ...used.map(([key, , show]) => [show(dig(stage.health, key))])]));
}

/** A cell or a head in an array is a number's. */
function table(caption, heads, rows, attributes = {}) {
  const cell = (tag, content, extra) => content !== false && (Array.isArray(content) ? el(tag, { class: "n", ...extra }, String(content[0])) : el(tag, extra || {}, content instanceof Node ? content : String(content)));
  return el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": caption }, el("table", attributes, el("caption", {}, caption),
    el("thead", {}, el("tr", {}, heads.map((head) => cell("th", head, { scope: "col" })))),
    el("tbody", {}, rows.map((row) => (row instanceof Node ? row : el("tr", {}, row.map((content) => cell("td", content))))))));
}

function roundsTable(run) {
  const rows = run.rounds.flatMap((round) => {
    const train = round.train;
    const trained = train && finite(train.steps) ? `, ${number(train.steps)} steps, loss ${number(train.first_loss)} to ${number(train.last_loss)}, margin ${number(train.last_margin)}` : "";
    const head = el("tr", { class: "round" }, el("th", { colspan: 8, scope: "rowgroup" }, `Round ${round.round}${trained}`));
    const stages = Object.entries(round.stages || {}).map(([name, s]) => [name, s.kind || "", [number(s.rows_in)], [number(s.rows_out)], [number(s.reused_rows)], [number(s.tokens_out || s.tokens_in)], [time(s.seconds_busy)], [time(s.seconds_wall)]]);
    return [head, ...stages];
  });
  if (!rows.length) return null;
  return table(MANY ? run.name : "A line a stage", ["Stage", "Kind", ["Rows in"], ["Rows out"], ["Reused"], ["Tokens"], ["Busy"], ["Wall"]], rows);
}

const SPREADS = { generation_tokens: "Tokens of an answer", score: "Scores", probability: "Probability that the first answer is better", gap: "Gap of a pair", chosen_tokens: "Tokens of chosen answers", rejected_tokens: "Tokens of rejected answers" };

function histogram(run, spread) {
  const top = Math.max(...spread.counts, 1), n = spread.counts.length;
  const width = (W - LEFT - RIGHT) / n;
  const y = (count) => H - BOTTOM - (count / top) * (H - TOP - BOTTOM);
  const about = `${SPREADS[spread.what] || spread.what}, ${spread.stage} in round ${spread.round}: ${number(spread.counts.reduce((a, b) => a + b, 0))} values from ${number(spread.edges[0])} to ${number(spread.edges.at(-1))}`;
  return el("div", { class: "chart" }, el("h3", {}, `${SPREADS[spread.what] || spread.what}`), el("div", { class: "read" }, `${MANY ? `${run.name}, ` : ""}${spread.stage}, round ${spread.round}`),
    svg("svg", { viewBox: `0 0 ${W} ${H}`, role: "img", "aria-label": about, "data-chart": "histogram" }, svg("title", {}, about),
      ticks(0, top, 3).filter(Number.isInteger).map((value) => [svg("line", { class: "grid", x1: LEFT, x2: W - RIGHT, y1: y(value), y2: y(value) }), svg("text", { x: LEFT - 6, y: y(value) + 4, "text-anchor": "end" }, number(value))]),
      spread.counts.map((count, i) => svg("rect", { x: LEFT + i * width + 0.5, y: y(count), width: Math.max(width - 1, 0.5), height: H - BOTTOM - y(count), style: `fill:${colour(0)}` }, svg("title", {}, `${number(spread.edges[i])} to ${number(spread.edges[i + 1])}: ${number(count)}`))),
      [0, Math.floor(n / 2), n].map((i) => svg("text", { x: LEFT + i * width, y: H - 8, "text-anchor": i === 0 ? "start" : i === n ? "end" : "middle" }, number(spread.edges[i])))));
}

function histograms() {
  const all = RUNS.flatMap((run) => (run.histograms || []).map((spread) => ({ run, spread })));
  if (!all.length) return null;
  const rounds = [...new Set(all.map(({ spread }) => spread.round))].sort((a, b) => a - b);
  const place = el("div", { class: "charts" });
  const show = (round) => place.replaceChildren(...all.filter(({ spread }) => spread.round === round).map(({ run, spread }) => histogram(run, spread)));
  const select = el("select", { onchange: (event) => show(Number(event.target.value)) }, rounds.map((round) => el("option", { value: round }, `Round ${round}`)));
  select.value = rounds.at(-1);
  show(rounds.at(-1));
  return [el("div", { class: "controls" }, el("label", {}, "Round", select)), place];
}

// ---- timeline ----------------------------------------------------------------------------------------------------

function timeline() {
  const usable = RUNS.filter((run) => run.timeline && (run.timeline.intervals || []).length);
  if (!usable.length) return null;
  const place = el("div", {});
  const show = (run) => place.replaceChildren(lanes(run));
  show(usable[0]);
  const choose = usable.length > 1 && el("label", {}, "Run", el("select", { onchange: (event) => show(usable[Number(event.target.value)]) }, usable.map((run, i) => el("option", { value: i }, run.name))));
  return [choose && el("div", { class: "controls" }, choose), place];
}

function lanes(run) {
  const { intervals, end } = run.timeline;
  const device = (track) => track.includes(":");
  const stages = [...new Set(intervals.map((i) => i.stage).filter(Boolean))];
  const tracks = [...new Set(intervals.map((i) => i.track))].sort((a, b) => device(b) - device(a) || (device(a) ? a.localeCompare(b) : stages.indexOf(a) - stages.indexOf(b)));
  const tint = (stage) => (stage ? colour(stages.indexOf(stage)) : "var(--soft)");
  const width = PAGE_WIDTH, left = NARROW ? 78 : 110, lane = 22, height = tracks.length * lane + 26;
  let [from, to] = [0, Math.max(end, 1e-3)];
  const drawing = svg("svg", { id: "timeline-lanes", viewBox: `0 0 ${width} ${height}`, role: "img", tabindex: 0, "data-chart": "timeline", "aria-label": `What each of ${tracks.length} devices and stages worked on over ${time(end)}; plus and minus zoom, arrows move` });
  const read = el("div", { class: "read" }, "Point at a stretch of work to read it.");
  const x = (seconds) => left + ((seconds - from) / (to - from)) * (width - left - 70);
  const redraw = () => {
    const visible = intervals.filter((i) => i.end >= from && i.start <= to);
    const busy = (track) => sum(visible.filter((i) => i.track === track).map((i) => ({ s: (Math.min(i.end, to) - Math.max(i.start, from)) * i.share })), "s") / (to - from);
    drawing.replaceChildren(
      ...tracks.flatMap((track, row) => [
        svg("text", { x: left - 8, y: row * lane + 15, "text-anchor": "end" }, track),
        svg("line", { class: "grid", x1: left, x2: width - 70, y1: (row + 1) * lane, y2: (row + 1) * lane }),
        svg("text", { x: width - 64, y: row * lane + 15 }, share(busy(track))),
      ]),
      ...visible.map((i) => {
        const [a, b] = [Math.max(x(i.start), left), Math.min(x(i.end), width - 70)];
        const bar = svg("rect", { x: a, y: tracks.indexOf(i.track) * lane + 3, width: Math.max(b - a, 0.6), height: lane - 6, style: `fill:${tint(i.stage)};fill-opacity:${number(0.25 + 0.75 * Math.min(i.share, 1), 2)};stroke:${tint(i.stage)};stroke-width:${i.share < 0.95 ? 0.7 : 0}` });
        bar.addEventListener("pointerenter", () => { read.textContent = `${i.track}: ${i.name}${i.stage ? ` for ${i.stage}` : ""}, ${time(i.start)} to ${time(i.end)} (${time(i.end - i.start)}${i.share < 0.95 ? `, ${share(i.share)} of it work` : ""})`; });
        return bar;
      }),
      ...ticks(from, to, NARROW ? 3 : 8).map((at) => svg("text", { x: x(at), y: height - 6, "text-anchor": "middle" }, time(at))));
  };
  const zoom = (factor, around = (from + to) / 2) => {
    const span = Math.min(Math.max((to - from) * factor, end / 5000), end);
    const start = around - ((around - from) / (to - from)) * span;
    from = Math.min(Math.max(start, 0), end - span); to = from + span;
    redraw();
  };
  const move = (by) => { const span = to - from; from = Math.min(Math.max(from + by * span, 0), end - span); to = from + span; redraw(); };
  const at = (event) => { const box = drawing.getBoundingClientRect(); return from + ((((event.clientX - box.left) / box.width) * width - left) / (width - left - 70)) * (to - from); };
  drawing.addEventListener("wheel", (event) => { if (event.ctrlKey || event.shiftKey) { event.preventDefault(); zoom(event.deltaY > 0 ? 1.25 : 0.8, at(event)); } }, { passive: false });
  const fingers = new Map();
  drawing.addEventListener("pointerdown", (event) => { fingers.set(event.pointerId, event.clientX); drawing.setPointerCapture(event.pointerId); });
  drawing.addEventListener("pointermove", (event) => {
    if (!fingers.has(event.pointerId)) return;
    const before = [...fingers.values()];
    const moved = event.clientX - fingers.get(event.pointerId);
    fingers.set(event.pointerId, event.clientX);
    const now = [...fingers.values()];
    if (now.length === 2) zoom(Math.abs(before[0] - before[1]) / Math.max(Math.abs(now[0] - now[1]), 1), at(event));
    else move(-moved / drawing.getBoundingClientRect().width);
  });
  for (const name of ["pointerup", "pointercancel"]) drawing.addEventListener(name, (event) => fingers.delete(event.pointerId));
  const keys = { "+": () => zoom(0.6), "=": () => zoom(0.6), "-": () => zoom(1.6), ArrowLeft: () => move(-0.2), ArrowRight: () => move(0.2), 0: () => zoom(1e9) };
  drawing.addEventListener("keydown", (event) => { if (keys[event.key]) { event.preventDefault(); keys[event.key](); } });
  redraw();
  const button = (text, label, act) => el("button", { type: "button", "aria-label": label, onclick: act }, text);
  return el("div", { class: "chart" },
    el("div", { class: "controls" }, button("+", "Zoom in", () => zoom(0.6)), button("−", "Zoom out", () => zoom(1.6)), button("←", "Earlier", () => move(-0.3)), button("→", "Later", () => move(0.3)), button("Whole run", "Show the whole run", () => zoom(1e9))),
    el("div", { class: "legend" }, stages.map((stage) => el("span", {}, el("i", { style: `background:${tint(stage)}` }), stage))), drawing, read,
    el("details", {}, el("summary", {}, "The same as a table"), table("Seconds of work, and their share of the run", ["Device or stage", "For", ["Seconds"], ["Share"]], busyRows(intervals, tracks, end))));
}

/** What is drawn, for those who can't point at it. */
function busyRows(intervals, tracks, end) {
  const sums = new Map();
  for (const i of intervals) {
    const key = JSON.stringify([i.track, i.stage]);
    sums.set(key, (sums.get(key) || 0) + (i.end - i.start) * i.share);
  }
  const rows = [...sums].map(([key, seconds]) => [...JSON.parse(key), seconds]);
  rows.sort((a, b) => tracks.indexOf(a[0]) - tracks.indexOf(b[0]) || b[2] - a[2]);
  return rows.map(([track, stage, seconds]) => [track, stage === track ? "" : stage || "itself", [time(seconds)], [share(seconds / end)]]);
}

function queueCharts() {
  return RUNS.flatMap((run) => (run.queues || []).filter((queue) => queue.points.some(([, rows]) => rows > 0)).map((queue, i) => {
    const limit = queue.capacity ? `, room for ${number(queue.capacity)}` : ", never blocks its sender";
    return chart("queues", `${MANY ? `${run.name}: ` : ""}${queue.edge}${limit}`, "Second", [{ name: "rows", colour: i, points: queue.points }]);
  })).filter(Boolean);
}

// ---- answers -----------------------------------------------------------------------------------------------------

const SAMPLES = RUNS.flatMap((run) => ((run.samples && run.samples.rows) || []).map((row) => ({ run: run.name, ...row })));
const textOf = (row) => [row.prompt, row.chosen, row.rejected, row.a, row.b, row.generation, row.judge].filter(Boolean).join("\n").toLowerCase();

const FILTERS = {
  run: { label: "Run", of: (row) => row.run, when: MANY },
  round: { label: "Round", of: (row) => String(row.round), when: true },
  stage: { label: "Stage", of: (row) => row.stage, when: true },
  verdict: { label: "Verdict", of: (row) => row.verdict, when: true },
  orders: { label: "Both orders", of: (row) => (row.consistent === true ? "agree" : row.consistent === false ? "disagree" : null), when: true },
};
const SORTS = { "": null, probability: (row) => -(row.probability ?? -1), gap: (row) => -(row.gap ?? -1), length: (row) => -textOf(row).length };

function chosenSamples(view) {
  const search = (view.get("search") || "").toLowerCase();
  const rows = SAMPLES.filter((row) => Object.entries(FILTERS).every(([key, filter]) => !view.get(key) || String(filter.of(row)) === view.get(key)) && (!search || textOf(row).includes(search)));
  const by = SORTS[view.get("sort") || ""];
  return by ? [...rows].sort((a, b) => by(a) - by(b)) : rows;
}

function sampleRow(row) {
  const first = row.chosen ?? row.generation ?? row.a;
  const judged = row.verdict || (finite(row.gap) ? `gap ${number(row.gap)}` : finite(row.score) ? `score ${number(row.score)}` : "");
  const detail = el("tr", { hidden: "" }, el("td", { colspan: 6 }, details(row)));
  const toggle = el("button", { type: "button", "aria-expanded": "false", "aria-label": "Show the whole row" }, "+");
  toggle.addEventListener("click", () => {
    detail.hidden = !detail.hidden;
    toggle.setAttribute("aria-expanded", String(!detail.hidden));
    toggle.textContent = detail.hidden ? "+" : "−";
  });
  const clip = (text) => el("td", {}, el("div", { class: "clip", dir: "auto" }, (text || "").slice(0, 300)));
  return [el("tr", { "data-sample": `${row.round}-${row.stage}-${row.row}` }, el("td", {}, toggle), el("td", {}, `${MANY ? `${row.run}, ` : ""}${row.round}`), el("td", {}, row.stage), clip(row.prompt), clip(first), el("td", {}, judged)), detail];
}

function details(row) {
  const block = (title, text, kind) => text !== null && text !== undefined && el("div", {}, el("h3", {}, title), el("p", { class: `text ${kind || ""}`, dir: "auto" }, text || "(empty)"));
  const figures = [["probability", row.probability], ["chosen's score", row.chosen_score], ["rejected's score", row.rejected_score], ["score", row.score], ["gap", row.gap]].filter(([, value]) => finite(value)).map(([name, value]) => `${name} ${number(value)}`);
  if (typeof row.swapped === "boolean") figures.push(row.swapped ? "shown in swapped order" : "shown in order");
  if (row.parsed === false) figures.push("the judge's answer could not be read");
  const pair = row.chosen !== null && row.chosen !== undefined
    ? [block("Chosen", row.chosen, "chosen"), block("Rejected", row.rejected, "rejected")]
    : [block("First answer", row.a), block("Second answer", row.b)];
  return [block("Prompt", row.prompt), el("div", { class: "pair" }, pair), block("Answer", row.generation), block("The judge wrote", row.judge), el("p", {}, `Row ${number(row.row)} of ${row.stage}. ${figures.join(", ")}`)];
}

const draw = {};

function samples() {
  if (!SAMPLES.length) return el("p", {}, "No answers yet: they appear here as the first rows are finished.");
  const controls = el("div", { class: "controls" });
  const search = el("input", { type: "search", "aria-label": "Search in prompts and answers", placeholder: "Search", oninput: (event) => setState({ search: event.target.value, page: null }) });
  controls.append(search);
  const selects = Object.entries(FILTERS).filter(([, filter]) => filter.when).map(([key, filter]) => {
    const values = [...new Set(SAMPLES.map(filter.of).filter((value) => value !== null && value !== undefined))];
    if (values.length < 2) return null;
    const select = el("select", { id: `filter-${key}`, onchange: (event) => setState({ [key]: event.target.value, page: null }) }, el("option", { value: "" }, "all"), values.map((value) => el("option", { value }, value)));
    controls.append(el("label", {}, filter.label, select));
    return [key, select];
  }).filter(Boolean);
  const sort = el("select", { onchange: (event) => setState({ sort: event.target.value }) }, Object.keys(SORTS).map((key) => el("option", { value: key }, key || "as they came")));
  controls.append(el("label", {}, "Sort", sort));
  const count = el("span", { id: "samples-count", role: "status" });
  const place = el("div", {});
  const pages = el("div", { class: "controls" });
  draw.samples = () => {
    const view = state();
    if (search.value !== (view.get("search") || "")) search.value = view.get("search") || "";
    selects.forEach(([key, select]) => { select.value = view.get(key) || ""; });
    sort.value = view.get("sort") || "";
    const rows = chosenSamples(view);
    const last = Math.max(Math.ceil(rows.length / PAGE), 1);
    const page = Math.min(Math.max(Number(view.get("page")) || 1, 1), last);
    count.textContent = `${number(rows.length)} of ${number(SAMPLES.length)} rows`;
    place.replaceChildren(table("Prompts and what was made of them; the plus shows a row whole", [el("span", { class: "unseen" }, "Whole row"), "Round", "Stage", "Prompt", "Answer", "Verdict"], rows.slice((page - 1) * PAGE, page * PAGE).flatMap(sampleRow), { id: "samples-table" }));
    const turn = (to, text) => el("button", { type: "button", disabled: to < 1 || to > last ? "" : null, onclick: () => setState({ page: to }) }, text);
    pages.replaceChildren(turn(page - 1, "Back"), el("span", {}, `page ${page} of ${last}`), turn(page + 1, "On"));
  };
  draw.samples();
  return [controls, el("p", {}, count), place, pages];
}

// ---- the rest ----------------------------------------------------------------------------------------------------

function gates() {
  const rows = RUNS.flatMap((run) => (run.gates || []).map((gate) => ({ run, ...gate })));
  if (!rows.length) return null;
  const width = Math.min(PAGE_WIDTH, 640), left = NARROW ? 12 : 190, line = NARROW ? 50 : 30, height = rows.length * line + 26;
  const x = (value) => left + Math.min(Math.max(value, 0), 1) * (width - left - 20);
  const about = `Share of held-out prompts that each round's adapter won: ${rows.map((gate) => `round ${gate.round} ${share(gate.win_rate)}`).join(", ")}`;
  return el("div", { class: "chart" }, svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": about, "data-chart": "gates", style: "max-width:640px" }, svg("title", {}, about),
    [0, 0.25, 0.5, 0.75, 1].map((value) => [svg("line", { class: "grid", x1: x(value), x2: x(value), y1: 0, y2: height - 22 }), svg("text", { x: x(value), y: height - 6, "text-anchor": "middle" }, share(value))]),
    rows.map((gate, i) => {
      const y = i * line + (NARROW ? 36 : 16), tint = gate.passed ? "var(--good)" : "var(--bad)";
      return [
        svg("text", { x: 0, y: NARROW ? y - 16 : y + 4 }, `${MANY ? `${gate.run.name}, ` : ""}round ${gate.round}: ${share(gate.win_rate)}, ${gate.passed ? "passed" : "failed"}`),
        finite(gate.low) && svg("line", { x1: x(gate.low), x2: x(gate.high), y1: y, y2: y, style: `stroke:${tint};stroke-width:2` }),
        finite(gate.win_rate) && svg("circle", { cx: x(gate.win_rate), cy: y, r: 5, style: `fill:${tint}` }),
        finite(gate.threshold) && svg("line", { class: "cross", x1: x(gate.threshold), x2: x(gate.threshold), y1: y - 9, y2: y + 9 }),
      ];
    })));
}

function deadLetters() {
  return RUNS.filter((run) => run.dead_letters && run.dead_letters.total).map((run) => {
    const { rows, total } = run.dead_letters;
    return table(`${MANY ? `${run.name}: ` : ""}${number(rows.length)} of ${number(total)} rows; all are in dead_letters.parquet`, ["Round", "Stage", ["Row"], "Reason", "Input"],
      rows.map((letter) => [letter.round, letter.stage, [number(letter.row)], letter.reason, el("div", { class: "clip", dir: "auto" }, letter.input || "")]), { id: "dead-letters" });
  });
}

function configuration(run) {
  if (!run.config) return null;
  const others = RUNS.filter((other) => other !== run).map((other) => new Set((other.config || "").split("\n")));
  const text = run.config.split("\n").map((line) => {
    const kind = /^\s*#/.test(line) ? "comment" : /^\s*\[/.test(line) ? "head" : "";
    const only = MANY && line.trim() && others.some((lines) => !lines.has(line)) ? " only" : "";
    return el("span", { class: kind + only }, `${line}\n`);
  });
  const copy = el("button", { type: "button", onclick: () => navigator.clipboard && navigator.clipboard.writeText(run.config).then(() => { copy.textContent = "Copied"; }) }, "Copy");
  return el("div", {}, el("div", { class: "controls" }, MANY && el("h3", {}, run.name), copy), el("div", { class: "wide", tabindex: 0, role: "region", "aria-label": `The flow of ${run.name}` }, el("pre", {}, text)));
}

function figures() {
  if (!MANY) return RUNS.map((run) => el("div", { class: "figures" }, headFigures(run).map(([name, value, about]) => el("div", { class: "figure" }, el("span", {}, name), el("b", {}, value), el("span", {}, about)))));
  const all = RUNS.map(headFigures);
  return table("Side by side", ["", ...RUNS.map((run) => [run.name])], all[0].map(([name], i) => [name, ...all.map((run) => [run[i][1]])]), { id: "compare" });
}

function head() {
  const run = RUNS[0] || {};
  const title = MANY ? RUNS.map((r) => r.name).join(" and ") : run.flow || run.name || "A run";
  document.title = `${title} – flowrun report`;
  document.getElementById("title").textContent = title;
  const pill = (r) => el("span", { class: `pill ${r.status || ""}` }, (r.status || "unknown").replaceAll("_", " "));
  const when = finite(run.written) ? ` written ${new Date(run.written * 1000).toLocaleString()}` : "";
  document.getElementById("about").replaceChildren(...RUNS.flatMap((r) => [pill(r), ` ${MANY ? r.name : r.name || ""} `]), `${when}${run.version ? `, flowrun ${run.version}` : ""}`, run.status === "running" ? ". Still running: reload for the latest." : "");
}

function main() {
  applyTheme();
  head();
  const errors = RUNS.filter((run) => run.error).map((run) => el("div", { class: "note bad", role: "alert" }, `${MANY ? `${run.name}: ` : ""}${run.error}`));
  const notes = RUNS.flatMap((run) => warnings(run).map((text) => el("div", { class: "note" }, MANY ? `${run.name}: ${text}` : text)));
  const charts = (list) => list.length > 0 && el("div", { class: "charts" }, list);
  document.getElementById("main").replaceChildren(...[
    section("figures", "At a glance", null, figures(), errors, notes),
    section("training", "Training", "Each optimizer step, all rounds one after the other; dots are evaluations.", charts(trainingCharts())),
    section("rounds", "Rounds and stages", null, RUNS.map(roundsTable)),
    section("judge", "The judge", "0.5 is fair for the first place and the longer answer; a judge that can be trusted names the same answer in both orders.", judgeTable(), charts(judgeCharts())),
    section("gates", "Gates", "Share of held-out prompts won, with its 95 % interval; the upright line is what was asked for.", gates()),
    section("timeline", "Timeline", "What each device and stage worked on; the share on the right is of what is shown, and a pale stretch is work with gaps in it. Drag to move, Ctrl and wheel or the buttons to zoom.", timeline()),
    section("queues", "Queues", "Rows on the edges between stages. One that is always full stands before the stage that the run waits for.", charts(queueCharts())),
    section("histograms", "Spread", null, histograms()),
    section("samples", "Answers", null, samples()),
    section("dead", "Dead letters", null, deadLetters()),
    section("config", "Configuration", MANY ? "Marked lines are not in every run." : null, RUNS.map(configuration)),
  ].filter(Boolean));
  document.getElementById("theme").addEventListener("click", () => {
    setState({ theme: document.documentElement.dataset.theme === "dark" ? "light" : "dark" });
    applyTheme();
  });
  // The address holds the view, so the link must not become it.
  document.querySelector(".skip").addEventListener("click", (event) => {
    const answers = document.getElementById("samples-title");
    event.preventDefault();
    if (answers) { answers.tabIndex = -1; answers.focus(); }
  });
  addEventListener("hashchange", () => { applyTheme(); draw.samples(); });
  document.body.dataset.ready = "true";
}

draw.samples = () => {};
main();
