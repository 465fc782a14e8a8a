// Layout: state and width in, where everything stands out (CSS pixels). Rows: one for each device and view.

const LEFT = 96, BARS = 128, BARS_GAP = 16, LEAST_WIDTH_FOR_BARS = 760;

function stepOf(state, view) {
  return decodeStep(view, view.source === "measured" ? state.step : view.first);
}

function clamp(value, low, high) {
  return Math.min(Math.max(value, low), high);
}

function shownViews(state) {
  return data.views.filter((view) => state.show === "both" || view.source === state.show);
}

/** Ticks of the longest shown step. The state's range is a part of it. */
function longest(state) {
  return Math.max(...shownViews(state).map((view) => stepOf(state, view).ticks), 1);
}

/** Whether each view has an axis of its own, since one step lasts far longer than the other. */
function haveOwnAxes(state) {
  const ticks = shownViews(state).map((view) => stepOf(state, view).ticks);
  return Math.min(...ticks) > 0 && Math.max(...ticks) > data.own_axis_ratio * Math.min(...ticks);
}

/** How often a view's step goes into the longest one, where each fills the width; else 1. */
function stretchOf(state, view) {
  return haveOwnAxes(state) ? longest(state) / stepOf(state, view).ticks : 1;
}

/** Where moments of a view stand. */
function makeFrame(state, view, scale) {
  const stretch = stretchOf(state, view);
  return {
    stretch,
    scale: scale * stretch,
    t0: state.t0 / stretch,
    t1: state.t1 / stretch,
    x: (at) => LEFT + (at * stretch - state.t0) * scale,
    at: (x) => (state.t0 + (x - LEFT) / scale) / stretch,
  };
}

function makeLayout(state, width) {
  const bars = width >= LEAST_WIDTH_FOR_BARS, right = bars ? BARS + BARS_GAP : 12;
  const shown = shownViews(state), ownAxes = haveOwnAxes(state);
  const plot = width - LEFT - right, scale = plot / (state.t1 - state.t0);
  const layout = {
    width, plot, scale, bars, shown,
    left: LEFT,
    nodeX: 4,
    barLeft: LEFT + plot + BARS_GAP,
    barWidth: BARS - 4,
    axisHeight: ownAxes ? 0 : axisHeight(shown),
    rows: [], labels: [], nodes: [], headings: [],
    axes: [], // of each: its views, from where to where its lines go, and whether it stands among the rows
    height: 0,
    ownAxes,
    longest: longest(state),
    frames: new Map(shown.map((view) => [view, makeFrame(state, view, scale)])),
    x: (at) => LEFT + (at - state.t0) * scale,
    at: (x) => state.t0 + (x - LEFT) / scale,
  };
  if (shown.length > 1 && state.rows === "paired" && !ownAxes) placePairs(layout, state);
  else placePanels(layout, state);
  if (!ownAxes) layout.axes.push({ views: shown, frame: layout.frames.get(shown[0]), y: 0, top: 0, bottom: layout.height, amongRows: false });
  const index = new Map(layout.rows.map((row) => [row.view.source + row.device, row]));
  layout.rowOf = (view, device) => index.get(view.source + device);
  return layout;
}

const TICKS_HEIGHT = 24, STRIP_HEIGHT = 18;

function axisHeight(views) {
  return TICKS_HEIGHT + 4 + STRIP_HEIGHT * views.length;
}

/** One panel: a row for each device. Two views: one panel below the other, with its own axis where the lengths differ. */
function placePanels(layout, state) {
  const count = data.num_devices, two = layout.shown.length > 1;
  const pitch = clamp(Math.floor(((two ? 420 : 600) / count) * state.zoomRows), two ? 2 : 3, two ? 22 * state.zoomRows : 30 * state.zoomRows);
  let y = 6;
  for (const view of layout.shown) {
    if (two) {
      layout.headings.push({ text: VIEW_TITLES[view.source], y: y + 8 });
      y += 20;
    }
    const axis = { views: [view], frame: layout.frames.get(view), y, amongRows: true };
    if (layout.ownAxes) y += axisHeight(axis.views);
    axis.top = y;
    placeNodes(layout, y, pitch);
    for (let device = 0; device < count; device++) {
      addRow(layout, state, view, device, y + device * pitch, pitch - (pitch >= 7 ? 2 : pitch >= 5 ? 1 : 0));
    }
    addLabels(layout, y, pitch, LEFT - 8);
    y += count * pitch + (two ? 12 : 4);
    if (layout.ownAxes) layout.axes.push({ ...axis, bottom: y });
  }
  layout.height = y;
}

/** Planned and measured of each device right above each other. */
function placePairs(layout, state) {
  const count = data.num_devices, pitch = clamp(Math.floor((620 / count) * state.zoomRows), 10, 46 * state.zoomRows);
  const gap = pitch >= 24 ? 6 : pitch >= 14 ? 3 : 2, above = Math.round((pitch - gap) * 0.38), y = 6;
  placeNodes(layout, y, pitch);
  for (let device = 0; device < count; device++) {
    const top = y + device * pitch;
    addRow(layout, state, layout.shown[0], device, top, above - 1);
    addRow(layout, state, layout.shown[1], device, top + above, pitch - gap - above);
    if (pitch >= 28) {
      const small = { size: 9.5, weight: 400, x: LEFT - 8 };
      layout.labels.push({ ...small, text: "plan", y: top + above / 2 }, { ...small, text: "run", y: top + above + (pitch - gap - above) / 2 });
    }
  }
  addLabels(layout, y - gap / 2, pitch, pitch >= 28 ? LEFT - 40 : LEFT - 8);
  layout.height = y + count * pitch + 2;
}

function addRow(layout, state, view, device, y, height) {
  const sameNode = device % data.devices_per_node !== 0;
  layout.rows.push({ view, frame: layout.frames.get(view), device, y, height, sameNode, items: stepOf(state, view).rows[device] });
}

function addLabels(layout, y, pitch, x) {
  let stride = 1;
  while (stride * pitch < 12) stride *= 2;
  for (let device = 0; device < data.num_devices; device += stride) {
    layout.labels.push({ text: String(device), x, y: y + device * pitch + Math.max(pitch, Math.min(12, stride * pitch)) / 2, size: stride > 1 ? 10.5 : 11, weight: stride > 1 ? 400 : 600 });
  }
}

function placeNodes(layout, y, pitch) {
  const per = data.devices_per_node;
  if (data.num_devices <= per) return;
  for (let first = 0; first < data.num_devices; first += per) {
    const count = Math.min(per, data.num_devices - first);
    layout.nodes.push({ node: first / per, y: y + first * pitch, height: count * pitch - (pitch >= 14 ? 4 : 1) });
  }
}

/** The row and item at a point; place -1 beside any item, null outside all rows. */
function hitTest(layout, x, y) {
  const row = layout.rows.find((candidate) => y >= candidate.y - 1 && y < candidate.y + candidate.height + 1);
  if (!row) return null;
  const hit = { view: row.view, device: row.device, place: -1, bar: layout.bars && x >= layout.barLeft - 6 };
  if (hit.bar || x < layout.left || x > layout.left + layout.plot) return hit;
  const at = row.frame.at(x), slack = 2 / row.frame.scale, items = row.items;
  let nearest = Infinity;
  for (let i = firstAfter(items, at - slack); i < items.count && items.start[i] <= at + slack; i++) {
    const idle = row.view.whats[items.what[i]][WHAT.kind] === KIND.idle;
    const away = Math.max(items.start[i] - at, at - items.end[i], 0) + (idle ? slack : 0) + (items.under[i] && y < row.y + row.height * 0.7 ? slack : 0);
    if (away < nearest && (away <= slack || idle)) [nearest, hit.place] = [away, i];
  }
  return hit;
}
