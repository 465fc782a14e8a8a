// View: the state, the controls and the pointer. The hash of the address keeps what is looked at, to be sent on.

const $ = (id) => document.getElementById(id);
const measured = data.views.find((view) => view.source === "measured");
const state = {
  show: data.views.length > 1 ? "both" : data.views[0].source,
  rows: data.num_devices <= 32 ? "paired" : "stacked",
  step: measured ? measured.first : 0,
  colorBy: "component",
  transfers: false,
  zoomRows: 1,
  t0: 0,
  t1: 1,
  hover: null,
  pinned: null,
  cursor: null,
  only: null, // { field, index }: all else is dimmed
};
let layout = null, dirty = { rows: true, overlay: true, memory: true }, scheduled = false, curvesShown = null;

function redraw(...parts) {
  for (const part of parts) dirty[part] = true;
  if (!scheduled) {
    scheduled = true;
    requestAnimationFrame(guarded(draw));
  }
}

function draw() {
  scheduled = false;
  const started = performance.now();
  if (dirty.rows) {
    layout = makeLayout(state, $("chart").clientWidth);
    drawSharedAxis($("axis"), state, layout);
    drawRows($("rows"), state, layout);
    showRange();
  }
  if (dirty.rows || dirty.overlay) drawOverlay($("overlay"), state, layout);
  if ((dirty.rows || dirty.memory) && stepOf(state, layout.shown[0]).levels.length) curvesShown = drawMemory($("memory"), state, layout);
  if (dirty.rows) document.documentElement.dataset.drawMs = (performance.now() - started).toFixed(1);
  dirty = { rows: false, overlay: false, memory: false };
  document.documentElement.dataset.ready = "1";
}

function showRange() {
  const own = haveOwnAxes(state), range = (from, to) => `${seconds(from)} to ${seconds(to)}`;
  const parts = shownViews(state).map((view) => [NOUNS[view.source], stretchOf(state, view)]);
  $("range").textContent = own ? parts.map(([noun, stretch]) => `${noun} ${range(state.t0 / stretch, state.t1 / stretch)}`).join(", ") : range(state.t0, state.t1);
  $("scales").textContent = own ? scalesInWords(state) : "";
}

/** Show what went wrong, and the static picture instead of ours. */
function guarded(run) {
  return (...args) => {
    try {
      return run(...args);
    } catch (error) {
      document.documentElement.classList.remove("js");
      $("failure").textContent = `The interactive timeline stopped (${error.message}); this is its static picture.`;
      $("failure").hidden = false;
      document.documentElement.dataset.failed = String(error.stack || error.message);
    }
  };
}

// -- zoom and pan --------------------------------------------------------------------------------------------------

function setRange(t0, t1) {
  const most = longest(state), closest = 50 * Math.max(...shownViews(state).map((view) => stretchOf(state, view)));
  const span = clamp(t1 - t0, Math.min(closest, most), most);
  const middle = (t0 + t1) / 2;
  state.t0 = clamp(middle - span / 2, 0, most - span);
  state.t1 = state.t0 + span;
  redraw("rows");
  keepHash();
}

function fit() {
  setRange(0, longest(state));
}

function zoom(factor, around) {
  const at = around === undefined ? (state.t0 + state.t1) / 2 : around;
  setRange(at - (at - state.t0) * factor, at + (state.t1 - at) * factor);
}

function zoomRows(factor) {
  state.zoomRows = clamp(state.zoomRows * factor, 0.25, 8);
  redraw("rows");
}

/** Show moments of a view, with a margin that is a share of their distance. */
function showMoments(view, from, to, margin) {
  const stretch = shownViews(state).includes(view) ? stretchOf(state, view) : 1, around = (to - from) * margin;
  setRange((from - around) * stretch, (to + around) * stretch);
}

function zoomTo(wave) {
  showMoments(measured, wave[WAVE.start], wave[WAVE.end], 0.15);
  $("chart").scrollIntoView({ block: "nearest" });
}

function onWheel(event) {
  const x = event.clientX - $("chart").getBoundingClientRect().left;
  if (x < layout.left || x > layout.left + layout.plot) return;
  const sideways = event.shiftKey ? event.deltaY || event.deltaX : Math.abs(event.deltaX) > Math.abs(event.deltaY) ? event.deltaX : 0;
  if (sideways) {
    event.preventDefault();
    setRange(state.t0 + sideways / layout.scale, state.t1 + sideways / layout.scale);
  } else if (event.deltaY < 0 || state.t1 - state.t0 < longest(state) * 0.9999) {
    event.preventDefault(); // zoomed out fully, the page scrolls on
    zoom(Math.exp(clamp(event.deltaY, -120, 120) * 0.0022), layout.at(x));
  }
}

// -- pointer -------------------------------------------------------------------------------------------------------

let drag = null;

function onDown(event) {
  if (event.button !== 0) return;
  drag = { x: event.clientX, t0: state.t0, t1: state.t1, moved: false };
}

function onMove(event) {
  if (drag && event.buttons & 1) {
    const shift = (drag.x - event.clientX) / layout.scale;
    if (Math.abs(event.clientX - drag.x) > 3) {
      if (!drag.moved) $("chart").setPointerCapture(event.pointerId);
      drag.moved = true;
      $("chart").classList.add("dragging");
      $("tip").hidden = !state.pinned;
      setRange(drag.t0 + shift, drag.t1 + shift);
    }
    return;
  }
  const box = $("rows").getBoundingClientRect(), x = event.clientX - box.left, before = state.hover && state.hover.device;
  const inPlot = x >= layout.left && x <= layout.left + layout.plot;
  state.cursor = inPlot ? layout.at(x) : null;
  state.hover = hitTest(layout, x, event.clientY - box.top);
  redraw("overlay", "memory");
  if (!state.pinned) showTip(tipAt(event, x), event.clientX, event.clientY);
}

/** What stands under the pointer, in words; null for nothing. */
function tipAt(event, x) {
  if (state.hover && (state.hover.place >= 0 || state.hover.bar)) return describe(state, state.hover);
  const view = state.cursor === null ? null : stripAt(event);
  if (!view) return null;
  const all = stepOf(state, view).waves, waves = leadingWaves(all), at = layout.frames.get(view).at(x);
  const place = waves.findLastIndex((wave) => wave[WAVE.start] <= at);
  if (place < 0) return null;
  const end = place + 1 < waves.length ? waves[place + 1][WAVE.start] : Infinity;
  return describeWave(view, waves[place], all.filter((wave) => !wave[WAVE.leads] && wave[WAVE.start] >= waves[place][WAVE.start] && wave[WAVE.start] < end));
}

/** The view in whose strip of waves the pointer is; undefined beside all strips. */
function stripAt(event) {
  for (const axis of layout.axes) {
    const y = event.clientY - $(axis.amongRows ? "rows" : "axis").getBoundingClientRect().top - axis.y - TICKS_HEIGHT;
    if (y >= 0 && y < STRIP_HEIGHT * axis.views.length) return axis.views[Math.floor(y / STRIP_HEIGHT)];
  }
}

function onUp(event) {
  const clicked = drag && !drag.moved;
  drag = null;
  $("chart").classList.remove("dragging");
  if (!clicked) return;
  state.pinned = !state.pinned && state.hover && state.hover.place >= 0 ? state.hover : null;
  showTip(state.pinned ? describe(state, state.pinned) : null, event.clientX, event.clientY);
  keepHash();
  redraw("overlay", "memory");
}

function onLeave() {
  if (drag && drag.moved) return;
  state.hover = state.cursor = null;
  if (!state.pinned) $("tip").hidden = true;
  redraw("overlay", "memory");
}

function onDouble() {
  if (!state.hover || state.hover.place < 0) return fit();
  const row = stepOf(state, state.hover.view).rows[state.hover.device], place = state.hover.place;
  showMoments(state.hover.view, row.start[place], row.end[place], 0.6);
}

function showTip(content, clientX, clientY) {
  const tip = $("tip");
  tip.hidden = !content;
  if (!content) return;
  const title = element("div", { class: "tip-title" }, content.fill ? swatch(content.fill) : null, content.title, element("span", { class: "quiet" }, " " + content.note));
  const lines = element("dl");
  for (const [label, text, color] of content.lines) lines.append(element("dt", {}, color ? swatch(color) : null, label), element("dd", {}, text));
  tip.replaceChildren(title, lines);
  if (state.pinned) tip.append(element("div", { class: "quiet tip-foot" }, "pinned; Esc or a click lets go"));
  tip.classList.toggle("pinned", Boolean(state.pinned));
  const { width, height } = tip.getBoundingClientRect();
  tip.style.left = clamp(clientX + 16 + width > innerWidth - 8 ? clientX - width - 16 : clientX + 16, 8, Math.max(8, innerWidth - width - 8)) + "px";
  tip.style.top = clamp(clientY + 18, 8, Math.max(8, innerHeight - height - 8)) + "px";
}

function onKey(event) {
  const span = state.t1 - state.t0;
  const actions = {
    ArrowLeft: () => setRange(state.t0 - span * 0.15, state.t1 - span * 0.15),
    ArrowRight: () => setRange(state.t0 + span * 0.15, state.t1 + span * 0.15),
    "+": () => zoom(0.7),
    "=": () => zoom(0.7),
    "-": () => zoom(1 / 0.7),
    0: fit,
    Escape: unpin,
  };
  if (!actions[event.key] || event.ctrlKey || event.metaKey || event.altKey) return;
  event.preventDefault();
  actions[event.key]();
}

function unpin() {
  state.pinned = null;
  $("tip").hidden = true;
  keepHash();
  redraw("overlay", "memory");
}

// -- controls ------------------------------------------------------------------------------------------------------

function choice(label, options, value, onPick) {
  const select = element("select", { onchange: (event) => onPick(event.target.value) });
  for (const [name, text] of options) select.append(element("option", { value: name, selected: name === value ? "" : null }, text));
  return element("label", {}, label + " ", select);
}

function button(text, title, onclick) {
  return element("button", { type: "button", title, "aria-label": title, onclick: guarded(onclick) }, text);
}

function set(changes) {
  Object.assign(state, changes);
  state.hover = state.pinned = null;
  $("tip").hidden = true;
  buildControls();
  buildTables();
  paintLegend();
  if (state.t1 > longest(state) || "show" in changes || "step" in changes) fit();
  redraw("rows");
}

function buildControls() {
  const controls = $("controls"), two = data.views.length > 1;
  const parts = [];
  if (two) parts.push(choice("show", [["both", "both"], ...data.views.map((view) => [view.source, VIEW_TITLES[view.source].toLowerCase()])], state.show, (show) => set({ show })));
  if (measured && measured.steps.length > 1) {
    const steps = measured.steps.map((step, index) => [String(index), `${step.step} (${seconds(step.ticks)}${index === measured.first ? ", median" : ""})`]);
    parts.push(choice("step", steps, String(state.step), (step) => set({ step: Number(step) })));
  }
  if (two && state.show === "both" && data.num_devices <= 128 && !haveOwnAxes(state)) parts.push(choice("rows", [["paired", "plan over run"], ["stacked", "plan, then run"]], state.rows, (rows) => set({ rows })));
  parts.push(choice("color", [["component", "by component"], ["task", "by task"]], state.colorBy, (colorBy) => set({ colorBy })));
  const box = element("input", { type: "checkbox", onchange: (event) => { state.transfers = event.target.checked; redraw("rows"); } });
  box.checked = state.transfers;
  if (data.views.some((view) => stepOf(state, view).links.length)) parts.push(element("label", {}, box, " transfers"));
  parts.push(element("span", { class: "spacer" }));
  parts.push(element("span", { id: "range", class: "quiet" }, ""));
  parts.push(element("span", { class: "buttons" }, "time ", button("\u2212", "zoom out (-)", () => zoom(1 / 0.6)), button("+", "zoom in (+)", () => zoom(0.6)), button("fit", "show the whole step (0)", fit)));
  parts.push(element("span", { class: "buttons" }, "height ", button("\u2212", "lower rows", () => zoomRows(1 / 1.4)), button("+", "higher rows", () => zoomRows(1.4))));
  controls.replaceChildren(...parts);
  showRange();
  if (measured && measured.steps.length < measured.num_steps) $("left-out").textContent = `${measured.num_steps - measured.steps.length} of ${measured.num_steps} steps are left out to keep the page small.`;
}

function buildTables() {
  $("accounts").replaceChildren(accountsTable(state));
  $("waves").replaceChildren(wavesTable(state, guarded(zoomTo)));
}

/** What colors stand for changes with the choice of colors: fills for one field, outlines for the other. */
function paintLegend() {
  for (const item of document.querySelectorAll("[data-field]")) {
    const index = Number(item.dataset.index), filled = item.dataset.field === state.colorBy;
    const box = element("span", { class: "legend-box" });
    if (filled) box.style.background = data.fills[index][0];
    else box.style.boxShadow = `inset 0 0 0 2.4px ${colors.lines[index]}`;
    item.firstElementChild.replaceWith(box);
  }
}

/** Names in the legend light up what they name. */
function wireLegend() {
  const fields = { component: WHAT.component, task: WHAT.task };
  for (const item of document.querySelectorAll("[data-field]")) {
    const only = { field: fields[item.dataset.field], index: Number(item.dataset.index) };
    const light = (value) => { state.only = value; redraw("rows"); };
    item.addEventListener("pointerenter", guarded(() => light(only)));
    item.addEventListener("pointerleave", guarded(() => light(null)));
  }
}

// -- address -------------------------------------------------------------------------------------------------------

let hashTimer = 0;

function keepHash() {
  clearTimeout(hashTimer);
  hashTimer = setTimeout(() => {
    const parts = new URLSearchParams();
    if (state.t0 > 0 || state.t1 < longest(state)) parts.set("t", `${(state.t0 * data.tick_s).toPrecision(6)}-${(state.t1 * data.tick_s).toPrecision(6)}`);
    if (measured && state.step !== measured.first) parts.set("step", measured.steps[state.step].step);
    if (state.show !== "both") parts.set("show", state.show);
    if (state.colorBy !== "component") parts.set("color", state.colorBy);
    if (state.transfers) parts.set("transfers", "1");
    if (state.pinned) parts.set("pin", `${state.pinned.view.source}.${state.pinned.device}.${state.pinned.place}`);
    try {
      history.replaceState(null, "", "#" + parts);
    } catch (error) {
      // some viewers of local files forbid it; the page works without
    }
  }, 250);
}

function readHash() {
  const parts = new URLSearchParams(location.hash.slice(1));
  const step = measured ? measured.steps.findIndex((candidate) => String(candidate.step) === parts.get("step")) : -1;
  if (step >= 0) state.step = step;
  const sources = data.views.map((view) => view.source);
  if (sources.includes(parts.get("show"))) state.show = parts.get("show");
  if (["paired", "stacked"].includes(parts.get("rows"))) state.rows = parts.get("rows");
  if (parts.get("color") === "task") state.colorBy = "task";
  state.transfers = parts.get("transfers") === "1";
  fit();
  const [t0, t1] = (parts.get("t") || "").split("-").map((text) => parseFloat(text) / data.tick_s);
  if (t1 > t0) setRange(t0, t1);
  const [source, device, place] = (parts.get("pin") || "").split(".");
  const view = data.views[sources.indexOf(source)], row = view && stepOf(state, view).rows[device];
  if (row && place < row.count) state.pinned = { view, device: Number(device), place: Number(place) };
}

function showPinned() {
  const row = state.pinned && layout.rowOf(state.pinned.view, state.pinned.device);
  if (!row) return;
  const box = $("rows").getBoundingClientRect(), x = row.frame.x((row.items.start[state.pinned.place] + row.items.end[state.pinned.place]) / 2);
  showTip(describe(state, state.pinned), box.left + clamp(x, layout.left, layout.left + layout.plot), box.top + row.y + row.height);
}

function onHash() {
  Object.assign(state, { show: data.views.length > 1 ? "both" : data.views[0].source, step: measured ? measured.first : 0, pinned: null });
  readHash();
  buildControls();
  buildTables();
  paintLegend();
  dirty.rows = true;
  draw();
  showPinned();
}

function start() {
  document.documentElement.classList.add("js");
  readColors();
  readHash();
  buildControls();
  buildTables();
  paintLegend();
  wireLegend();
  draw();
  showPinned();
  const chart = $("chart");
  for (const [name, handler] of [["pointerdown", onDown], ["pointermove", onMove], ["pointerleave", onLeave], ["dblclick", onDouble], ["keydown", onKey]]) chart.addEventListener(name, guarded(handler));
  chart.addEventListener("wheel", guarded(onWheel), { passive: false });
  addEventListener("pointerup", guarded(onUp));
  addEventListener("keydown", (event) => event.key === "Escape" && unpin());
  addEventListener("hashchange", guarded(onHash));
  new ResizeObserver(() => redraw("rows")).observe(chart);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", guarded(() => { readColors(); buildTables(); paintLegend(); redraw("rows"); }));
}

guarded(start)();
