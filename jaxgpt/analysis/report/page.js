"use strict";
// The curves, the sorting of tables, and the theme. No request is made.

const $ = (id) => document.getElementById(id);
const SVG = "http://www.w3.org/2000/svg";
const DATA = JSON.parse($("points").textContent);

// ---- points: base64 of little-endian arrays ----

function unpack(text, Type) {
  const raw = atob(text), bytes = new Uint8Array(raw.length);
  for (let i = 0; i < raw.length; i++) bytes[i] = raw.charCodeAt(i);
  return new Type(bytes.buffer);
}

for (const run of DATA.runs) {
  for (const series of Object.values(run.series)) {
    series.last = unpack(series.last, Uint32Array);
    series.first = series.first ? unpack(series.first, Uint32Array) : series.last;
    if (series.hours) series.hours = unpack(series.hours, Float32Array);
  }
}

function points(run, kind, metric) {
  const found = DATA.runs[run].series[kind]?.metrics[metric];
  if (!found) return null;
  if (typeof found.mean === "string") {
    found.mean = unpack(found.mean, Float32Array);
    found.low = found.low ? unpack(found.low, Float32Array) : found.mean;
    found.high = found.high ? unpack(found.high, Float32Array) : found.mean;
  }
  return found;
}

// ---- what all charts share ----

const state = { axis: "steps", smooth: 0, log: false, marks: true, zoom: null, off: new Set(), focus: null };
const hasHours = DATA.runs.every((run) => Object.values(run.series).every((s) => s.hours));
const xs = (series) => (state.axis === "hours" ? series.hours : series.last);

// The x value of a step, between the points around it.
function xOfStep(run, step) {
  if (state.axis === "steps") return step;
  const series = DATA.runs[run].series.train;
  if (!series || !series.hours) return NaN;
  const i = search(series.last, step);
  if (i === 0) return step ? series.hours[0] * step / series.last[0] : 0;
  if (i >= series.last.length) return series.hours[series.last.length - 1];
  const t = (step - series.last[i - 1]) / (series.last[i] - series.last[i - 1]);
  return series.hours[i - 1] + t * (series.hours[i] - series.hours[i - 1]);
}

// The first index whose value is at least x.
function search(sorted, x) {
  let low = 0, high = sorted.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (sorted[middle] < x) low = middle + 1;
    else high = middle;
  }
  return low;
}

function fullRange() {
  let high = 0;
  DATA.runs.forEach((run, r) => {
    if (state.off.has(r)) return;
    for (const series of Object.values(run.series)) {
      const x = xs(series);
      if (x && x.length) high = Math.max(high, x[x.length - 1]);
    }
  });
  return [0, high || 1];
}

// ---- numbers ----

function ticks(low, high, count) {
  const rough = (high - low) / count, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const out = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) out.push(k * step);
  return out;
}

function logTicks(low, high) {
  const out = [];
  const wide = Math.log10(high / low) > 3;
  for (let e = Math.floor(Math.log10(low)); e <= Math.ceil(Math.log10(high)); e++) {
    for (const m of wide ? [1] : [1, 2, 5]) {
      const value = m * 10 ** e;
      if (value >= low && value <= high) out.push(value);
    }
  }
  return out.length > 1 ? out : ticks(low, high, 4);
}

function short(value) {
  const size = Math.abs(value);
  if (value === 0) return "0";
  if (size >= 1e9) return trim((value / 1e9).toPrecision(3)) + "G";
  if (size >= 1e6) return trim((value / 1e6).toPrecision(3)) + "M";
  if (size >= 1e4) return trim((value / 1e3).toPrecision(3)) + "k";
  if (size < 1e-3) return value.toExponential(1).replace(".0e", "e").replace("e-", "e−");
  return trim(value.toPrecision(size >= 1000 ? 4 : 3));
}
const trim = (text) => (text.includes(".") && !text.includes("e") ? text.replace(/\.?0+$/, "") : text);

function exact(value) {
  if (!Number.isFinite(value)) return "none";
  const size = Math.abs(value);
  if (value !== 0 && (size < 1e-3 || size >= 1e7)) return value.toPrecision(4);
  return value.toLocaleString("en-US", { maximumSignificantDigits: 6 });
}

const xText = (x) => state.axis === "hours"
  ? (x >= 1 ? trim(x.toPrecision(4)) + " h" : trim((x * 60).toPrecision(4)) + " min")
  : "step " + Math.round(x).toLocaleString("en-US");

function xTick(x, high) {
  if (state.axis !== "hours") return short(x);
  return high >= 1 ? short(x) + " h" : high >= 1 / 60 ? short(x * 60) + " min" : short(x * 3600) + " s";
}

function element(name, attributes, parent) {
  const made = document.createElementNS(SVG, name);
  for (const key in attributes) made.setAttribute(key, attributes[key]);
  if (parent) parent.append(made);
  return made;
}

// ---- a chart ----

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.metric = figure.dataset.metric;
    this.plot = figure.querySelector(".plot");
    this.title = figure.querySelector("figcaption b").textContent;
    this.cursor = null; // x value
    this.drawn = false;
    this.listen();
  }

  // The curves of this chart, with the points at each pixel column: the mean, least and greatest.
  curves([x0, x1], width) {
    const out = [];
    DATA.runs.forEach((run, r) => {
      if (state.off.has(r)) return;
      for (const [kind, series] of Object.entries(run.series)) {
        const found = points(r, kind, this.metric), x = xs(series);
        if (!found || !x) continue;
        const smoothed = kind === "train" && state.smooth ? smooth(found.mean) : null;
        const from = Math.max(search(x, x0) - 1, 0), to = Math.min(search(x, x1) + 1, x.length);
        const columns = [];
        let column = null, at = null;
        for (let i = from; i < to; i++) {
          const mean = found.mean[i];
          const pixel = Math.round((x[i] - x0) / (x1 - x0) * width * 2) / 2;
          if (!Number.isFinite(mean)) { column = null; continue; }
          if (column === null || at !== pixel) {
            column = { x: 0, y: 0, s: 0, n: 0, low: Infinity, high: -Infinity, gap: column === null };
            columns.push(column);
            at = pixel;
          }
          column.n++;
          column.x += x[i]; column.y += mean; column.s += smoothed ? smoothed[i] : mean;
          column.low = Math.min(column.low, found.low[i]);
          column.high = Math.max(column.high, found.high[i]);
        }
        for (const c of columns) { c.x /= c.n; c.y /= c.n; c.s /= c.n; }
        const banded = columns.some((c) => c.low < c.high);
        if (columns.length) out.push({ r, kind, columns, banded, smoothed: !!smoothed, count: to - from });
      }
    });
    return out;
  }

  draw() {
    this.drawn = true;
    const box = this.plot.getBoundingClientRect();
    if (!box.width) { this.drawn = false; return; }
    const pad = { left: 48, right: 12, top: 10, bottom: state.marks ? 41 : 22 };
    const W = box.width, H = box.height, w = W - pad.left - pad.right, h = H - pad.top - pad.bottom;
    const range = state.zoom || fullRange(), curves = this.curves(range, w);
    const svg = element("svg", { viewBox: `0 0 ${W} ${H}`, "aria-hidden": "true" });
    let low = Infinity, high = -Infinity;
    for (const curve of curves) {
      for (const c of curve.columns) { low = Math.min(low, c.low); high = Math.max(high, c.high); }
    }
    if (!Number.isFinite(low)) {
      element("text", { x: W / 2, y: H / 2, "text-anchor": "middle" }, svg).textContent = "no points here";
      this.plot.replaceChildren(svg);
      this.scale = null;
      return;
    }
    const log = state.log && low > 0;
    if (low === high) { const d = Math.abs(low) * 0.05 || 1; low -= log ? 0 : d; high += d; }
    const room = log ? (high / low) ** 0.05 : (high - low) * 0.06;
    const bottom = log ? low / room : low >= 0 && low - room < 0 ? 0 : low - room;
    const top = log ? high * room : high + room;
    const f = log ? Math.log : (v) => v;
    const X = (x) => pad.left + (x - range[0]) / (range[1] - range[0]) * w;
    const Y = (y) => pad.top + (1 - (f(y) - f(bottom)) / (f(top) - f(bottom))) * h;
    this.scale = { X, Y, pad, w, h, range, W, H };
    for (const y of log ? logTicks(bottom, top) : ticks(bottom, top, h > 140 ? 5 : 3)) {
      element("line", { x1: pad.left, x2: W - pad.right, y1: Y(y), y2: Y(y), class: "grid" }, svg);
      element("text", { x: pad.left - 6, y: Y(y) + 4, "text-anchor": "end" }, svg).textContent = short(y);
    }
    const base = pad.top + h;
    element("line", { x1: pad.left, x2: W - pad.right, y1: base, y2: base, class: "base" }, svg);
    for (const x of ticks(range[0], range[1], Math.max(2, Math.floor(w / 90)))) {
      element("line", { x1: X(x), x2: X(x), y1: pad.top, y2: base, class: "grid" }, svg);
      const end = X(x) > W - 24;
      element("text", { x: end ? W - 2 : X(x), y: H - 5, "text-anchor": end ? "end" : "middle" }, svg)
        .textContent = xTick(x, range[1]);
    }
    const id = "clip-" + this.figure.id;
    element("rect", { x: pad.left - 5, y: 0, width: w + 10, height: H }, element("clipPath", { id }, svg));
    const inner = element("g", { "clip-path": `url(#${id})` }, svg);
    if (state.marks) this.drawMarks(inner, X, base, pad.top);
    for (const curve of curves) this.drawCurve(inner, curve, X, Y);
    this.overlay = element("g", {}, svg);
    this.plot.replaceChildren(svg);
    this.label(curves);
    if (this.cursor !== null) this.drawCursor();
  }

  drawCurve(parent, { r, kind, columns, banded, smoothed }, X, Y) {
    const faded = state.focus !== null && state.focus !== r ? " faded" : "";
    const group = element("g", { class: `c${r % 10}${faded}` }, parent);
    const held = kind !== "train";
    const path = (key) => {
      let d = "";
      for (const c of columns) d += `${c.gap ? "M" : "L"}${X(c.x).toFixed(1)} ${Y(c[key]).toFixed(1)}`;
      return d;
    };
    if (banded) {
      let d = "", piece = [];
      const close = () => {
        if (piece.length > 1) {
          d += "M" + piece.map((c) => `${X(c.x).toFixed(1)} ${Y(c.high).toFixed(1)}`).join("L");
          d += "L" + piece.reverse().map((c) => `${X(c.x).toFixed(1)} ${Y(c.low).toFixed(1)}`).join("L") + "Z";
        }
        piece = [];
      };
      for (const c of columns) { if (c.gap) close(); piece.push(c); }
      close();
      const shown = state.focus === r ? 1 : DATA.runs.length - state.off.size;
      element("path", { d, class: "band" }, group).style.opacity = 0.2 / (0.65 + 0.35 * shown);
    }
    if (smoothed) element("path", { d: path("y"), class: "line raw" }, group);
    const dash = held || r >= 10 ? " held" : "";
    element("path", { d: path(smoothed ? "s" : "y"), class: "line" + dash }, group);
    if (held && columns.length <= 60) {
      for (const c of columns) element("circle", { cx: X(c.x), cy: Y(c.y), r: 3, class: "dot" }, group);
    } else if (columns.length === 1) {
      element("circle", { cx: X(columns[0].x), cy: Y(columns[0].y), r: 3, class: "lone" }, group);
    }
  }

  drawMarks(parent, X, base, top) {
    DATA.runs.forEach((run, r) => {
      if (state.off.has(r)) return;
      const faded = state.focus !== null && state.focus !== r ? " faded" : "";
      const group = element("g", { class: `c${r % 10}${faded}` }, parent);
      const place = (step) => X(xOfStep(r, step));
      let bars = "", dots = "";
      for (const step of run.marks.saves) bars += `M${(place(step) - 1).toFixed(1)} ${base + 3}v7h2v-7z`;
      for (const step of run.marks.evaluations) {
        dots += `M${(place(step) - 2.2).toFixed(1)} ${base + 16}a2.2 2.2 0 1 0 4.4 0a2.2 2.2 0 1 0 -4.4 0z`;
      }
      element("path", { d: bars, class: "mark" }, group);
      element("path", { d: dots, class: "mark" }, group);
      for (const step of run.marks.starts) {
        const x = place(step);
        if (step) element("line", { x1: x, x2: x, y1: top, y2: base, class: "restart" }, group);
        element("path", { d: `M${x - 4.5} ${base + 10}h9l-4.5 -8z`, class: "mark" }, group);
      }
    });
  }

  // What a screen reader says of the chart.
  label(curves) {
    const text = curves.slice(0, 12).map(({ r, kind, columns }) => {
      const first = columns[0], last = columns[columns.length - 1];
      return `${DATA.runs[r].name} ${kind}: from ${exact(first.y)} at ${xText(first.x)} to ${exact(last.y)} at ${xText(last.x)}`;
    });
    this.plot.setAttribute("aria-label", `${this.title}. ${text.join("; ")}`);
  }

  // The value of each curve at the cursor.
  values() {
    const out = [];
    DATA.runs.forEach((run, r) => {
      if (state.off.has(r)) return;
      for (const [kind, series] of Object.entries(run.series)) {
        const found = points(r, kind, this.metric), x = xs(series);
        if (!found || !x || !x.length) continue;
        let i = Math.min(search(x, this.cursor), x.length - 1);
        if (i > 0 && this.cursor - x[i - 1] < x[i] - this.cursor) i--;
        const [from, to] = state.zoom || fullRange(), reach = (to - from) * 0.02;
        if (this.cursor < x[0] - reach || this.cursor > x[x.length - 1] + reach) continue;
        if (!Number.isFinite(found.mean[i])) continue;
        out.push({ r, kind, name: run.name, x: x[i], first: series.first[i], last: series.last[i],
          mean: found.mean[i], low: found.low[i], high: found.high[i] });
      }
    });
    return out;
  }

  drawCursor() {
    const { X, Y, pad, h, range } = this.scale || {};
    if (!X || this.cursor < range[0] || this.cursor > range[1]) { this.overlay?.replaceChildren(); return []; }
    this.overlay.replaceChildren();
    element("line", { x1: X(this.cursor), x2: X(this.cursor), y1: pad.top, y2: pad.top + h, class: "cursor" }, this.overlay);
    const found = this.values();
    for (const v of found) {
      if (v.x < range[0] || v.x > range[1]) continue;
      element("circle", { cx: X(v.x), cy: Y(v.mean), r: 3.5, class: `dot c${v.r % 10}` }, this.overlay);
    }
    return found;
  }

  listen() {
    const at = (event) => {
      const box = this.plot.getBoundingClientRect();
      return Math.min(Math.max(event.clientX - box.left, this.scale.pad.left), this.scale.W - this.scale.pad.right);
    };
    const value = (pixel) => {
      const { pad, w, range } = this.scale;
      return range[0] + (pixel - pad.left) / w * (range[1] - range[0]);
    };
    let from = null;
    this.plot.addEventListener("pointerdown", (event) => {
      if (event.button || !this.scale) return;
      from = at(event);
      this.plot.setPointerCapture(event.pointerId);
    });
    this.plot.addEventListener("pointermove", (event) => {
      if (!this.scale) return;
      const pixel = at(event);
      moveCursor(this, value(pixel), event.clientX, event.clientY);
      if (from !== null && Math.abs(pixel - from) > 3) {
        const x = Math.min(pixel, from);
        element("rect", { x, y: this.scale.pad.top, width: Math.abs(pixel - from), height: this.scale.h, class: "select" }, this.overlay);
      }
    });
    this.plot.addEventListener("pointerup", (event) => {
      if (from === null || !this.scale) return;
      const pixel = at(event), a = value(Math.min(pixel, from)), b = value(Math.max(pixel, from));
      if (Math.abs(pixel - from) > 6) zoomTo(a, b);
      from = null;
    });
    this.plot.addEventListener("pointercancel", () => { from = null; });
    this.plot.addEventListener("pointerleave", () => { if (from === null) endCursor(); });
    this.plot.addEventListener("dblclick", () => zoomTo(null));
    this.plot.addEventListener("blur", endCursor);
    this.plot.addEventListener("keydown", (event) => this.key(event));
  }

  key(event) {
    if (!this.scale || event.ctrlKey || event.metaKey || event.altKey) return;
    const range = state.zoom || fullRange(), size = range[1] - range[0];
    const here = this.cursor ?? range[0] + size / 2, step = size * (event.shiftKey ? 0.1 : 0.01);
    const moves = { ArrowLeft: here - step, ArrowRight: here + step, Home: range[0], End: range[1] };
    if (event.key in moves) {
      const x = Math.min(Math.max(moves[event.key], range[0]), range[1]);
      const box = this.plot.getBoundingClientRect();
      moveCursor(this, x, box.left + this.scale.X(x), box.top + 30);
      const said = this.values().map((v) => `${DATA.runs.length > 1 ? v.name + " " : ""}${v.kind} ${exact(v.mean)}`);
      $("said").textContent = `${this.title}, ${xText(x)}: ${said.join("; ") || "no value"}`;
    } else if (event.key === "+" || event.key === "=") zoomTo(here - size / 4, here + size / 4);
    else if (event.key === "-") zoomTo(here - size, here + size);
    else if (event.key === "0" || event.key === "Escape") zoomTo(null);
    else return;
    event.preventDefault();
  }
}

// A moving average without a bias to its first values (as Adam's moments are corrected).
function smooth(values) {
  const out = new Float32Array(values.length);
  let mean = 0, weight = 0;
  for (let i = 0; i < values.length; i++) {
    if (!Number.isFinite(values[i])) { out[i] = values[i]; continue; }
    mean = state.smooth * mean + (1 - state.smooth) * values[i];
    weight = state.smooth * weight + (1 - state.smooth);
    out[i] = mean / weight;
  }
  return out;
}

const charts = [...document.querySelectorAll("figure[data-metric]")].map((figure) => new Chart(figure));
const visible = new Set();

// ---- the cursor of all charts ----

function moveCursor(chart, x, clientX, clientY) {
  for (const other of charts) {
    other.cursor = x;
    if (other !== chart && visible.has(other) && other.scale) other.drawCursor();
  }
  const found = chart.drawCursor(), tip = $("tip");
  if (!found.length) { tip.hidden = true; return; }
  const table = document.createElement("table");
  found.sort((a, b) => b.mean - a.mean);
  for (const v of found.slice(0, 14)) {
    const row = table.insertRow(), name = row.insertCell();
    const swatch = document.createElement("span");
    swatch.className = `swatch c${v.r % 10}`;
    name.append(swatch, DATA.runs.length > 1 ? `${v.name}${v.kind === "train" ? "" : ", " + v.kind}` : v.kind);
    const number = row.insertCell();
    number.className = "num";
    number.textContent = exact(v.mean);
    const range = row.insertCell();
    range.className = "range";
    range.textContent = v.low < v.high ? `${exact(v.low)} to ${exact(v.high)}`
      : v.last !== Math.round(x) && state.axis === "steps" ? `at step ${v.last.toLocaleString("en-US")}` : "";
  }
  const head = document.createElement("b");
  const bucket = found.find((v) => v.first !== v.last);
  head.textContent = bucket && state.axis === "steps"
    ? `steps ${bucket.first.toLocaleString("en-US")} to ${bucket.last.toLocaleString("en-US")}` : xText(x);
  tip.replaceChildren(head, table);
  tip.hidden = false;
  const box = tip.getBoundingClientRect();
  const left = clientX + 14 + box.width > innerWidth ? clientX - 14 - box.width : clientX + 14;
  tip.style.left = Math.max(left, 6) + "px";
  tip.style.top = Math.max(6, Math.min(clientY + 12, innerHeight - box.height - 6)) + "px";
}

function endCursor() {
  $("tip").hidden = true;
  for (const chart of charts) { chart.cursor = null; chart.overlay?.replaceChildren(); }
}

// ---- controls ----

function zoomTo(low, high) {
  const full = fullRange();
  if (low === null || high - low >= full[1] - full[0]) state.zoom = null;
  else {
    const least = (full[1] - full[0]) / 1e4;
    low = Math.max(low, full[0]);
    high = Math.min(Math.max(high, low + least), full[1]);
    state.zoom = [Math.min(low, high - least), high];
  }
  $("reset").disabled = !state.zoom;
  redraw();
}

let waiting = false;
function redraw() {
  for (const chart of charts) chart.drawn = false;
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    for (const chart of visible) if (!chart.drawn) chart.draw();
  });
}

if (charts.length) {
  const byPlot = new Map(charts.map((chart) => [chart.plot, chart]));
  const seen = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      const chart = byPlot.get(entry.target);
      if (entry.isIntersecting) {
        visible.add(chart);
        if (!chart.drawn) chart.draw();
      } else visible.delete(chart);
    }
  }, { rootMargin: "300px" });
  const sized = new ResizeObserver((entries) => {
    for (const entry of entries) {
      const chart = byPlot.get(entry.target);
      chart.drawn = false;
      if (visible.has(chart)) chart.draw();
    }
  });
  for (const chart of charts) { seen.observe(chart.plot); sized.observe(chart.plot); }

  if (!hasHours) $("axis").closest("label").hidden = true;
  $("axis").addEventListener("change", () => { state.axis = $("axis").value; zoomTo(null); });
  $("smooth").addEventListener("input", () => { state.smooth = Number($("smooth").value); redraw(); });
  $("log").addEventListener("change", () => { state.log = $("log").checked; redraw(); });
  $("marks").addEventListener("change", () => { state.marks = $("marks").checked; redraw(); });
  $("reset").addEventListener("click", () => zoomTo(null));
  for (const button of document.querySelectorAll("#legend button")) {
    const run = Number(button.dataset.run);
    button.addEventListener("click", () => {
      const shown = button.getAttribute("aria-pressed") === "true";
      button.setAttribute("aria-pressed", String(!shown));
      if (shown) state.off.add(run);
      else state.off.delete(run);
      redraw();
    });
    const focus = (on) => () => { state.focus = on && !state.off.has(run) ? run : null; redraw(); };
    button.addEventListener("pointerenter", focus(true));
    button.addEventListener("pointerleave", focus(false));
    button.addEventListener("focus", focus(true));
    button.addEventListener("blur", focus(false));
  }
}

// ---- tables ----

function sortable(table) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  if (body.rows.length < 2 || table.dataset.sortable) return;
  table.dataset.sortable = "yes";
  heads.forEach((head, column) => {
    const button = document.createElement("button");
    button.type = "button";
    button.textContent = head.textContent;
    head.replaceChildren(button);
    button.addEventListener("click", () => {
      const down = head.getAttribute("aria-sort") === "ascending";
      for (const other of heads) other.removeAttribute("aria-sort");
      head.setAttribute("aria-sort", down ? "descending" : "ascending");
      const numeric = head.classList.contains("num");
      const key = (row) => {
        const cell = row.cells[column];
        return numeric ? (cell.dataset.v === undefined ? null : Number(cell.dataset.v)) : cell.textContent;
      };
      const rows = [...body.rows].map((row) => [key(row), row]);
      rows.sort(([a], [b]) => {
        if (a === null || b === null) return (a === null) - (b === null);
        const order = numeric ? a - b : a.localeCompare(b, "en", { numeric: true });
        return down ? -order : order;
      });
      body.append(...rows.map(([, row]) => row));
    });
  });
}

// Tables in what is folded are prepared when it unfolds: a page of many runs opens sooner.
for (const table of document.querySelectorAll("main table")) {
  if (!table.closest("details:not([open])")) sortable(table);
}
for (const part of document.querySelectorAll("main details")) {
  part.addEventListener("toggle", () => part.querySelectorAll("table").forEach(sortable));
}

for (const part of document.querySelectorAll(".config")) {
  const box = part.querySelector(".all-keys");
  const show = () => part.classList.toggle("only-set", !box.checked);
  box.addEventListener("change", show);
  show();
}

// ---- theme, navigation, print ----

const dark = matchMedia("(prefers-color-scheme: dark)");
$("theme").addEventListener("click", () => {
  const root = document.documentElement;
  const now = root.dataset.theme || (dark.matches ? "dark" : "light");
  root.dataset.theme = now === "dark" ? "light" : "dark";
});

const links = new Map([...document.querySelectorAll("nav a")].map((a) => [a.hash.slice(1), a]));
const read = new IntersectionObserver((entries) => {
  for (const entry of entries) links.get(entry.target.id)?.classList.toggle("here", entry.isIntersecting);
}, { rootMargin: "-25% 0px -70% 0px" });
for (const section of document.querySelectorAll("section")) read.observe(section);

let opened = [];
addEventListener("beforeprint", () => {
  opened = [...document.querySelectorAll("details:not([open]):not(.figures)")];
  for (const part of opened) part.open = true;
  for (const chart of charts) { visible.add(chart); chart.draw(); }
});
addEventListener("afterprint", () => { for (const part of opened) part.open = false; });
