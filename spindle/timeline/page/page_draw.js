// Drawing: state and layout in, pixels out. Nothing here changes the state.

let colors = {};

/** Colors of the page's scheme, from its style sheet. */
function readColors() {
  const style = getComputedStyle(document.documentElement);
  const names = ["page", "card", "text", "muted", "line", "row", "wait", "blocked", "issue", "reduce", "step", "load", "slow", "fast", "accent", "band"];
  colors = Object.fromEntries(names.map((name) => [name, style.getPropertyValue("--" + name).trim()]));
  colors.dark = matchMedia("(prefers-color-scheme: dark)").matches;
  colors.lines = colors.dark ? data.lines.dark : data.lines.light;
  colors.causes = data.causes.map(([name]) => style.getPropertyValue("--cause-" + name).trim());
  colors.paleBlocked = mixed(colors.row, colors.wait, 0.22);
  colors.paleWait = mixed(colors.row, colors.wait, 0.5);
  colors.paleFills = data.fills.map(([fill]) => mixed(fill, colors.card, 0.42));
  colors.hatch = hatch(colors.card, colors.dark ? 0.5 : 0.62);
  colors.crosses = crosses(colors.card);
}

function mixed(color, other, share) {
  const channel = (text, i) => parseInt(text.slice(1 + 2 * i, 3 + 2 * i), 16);
  return "#" + [0, 1, 2].map((i) => Math.round(channel(color, i) * (1 - share) + channel(other, i) * share).toString(16).padStart(2, "0")).join("");
}

/** Diagonal stripes: backward. */
function hatch(color, alpha) {
  const scale = Math.max(1, Math.round(devicePixelRatio || 1)), tile = document.createElement("canvas");
  const side = 6 * scale, pen = tile.getContext("2d");
  tile.width = tile.height = side;
  pen.strokeStyle = color;
  pen.globalAlpha = alpha;
  pen.lineWidth = 1.7 * scale;
  for (const shift of [-side, 0, side]) {
    pen.beginPath();
    pen.moveTo(shift - scale, side + scale);
    pen.lineTo(shift + side + scale, -scale);
    pen.stroke();
  }
  const pattern = pen.createPattern(tile, "repeat");
  if (pattern.setTransform) pattern.setTransform(new DOMMatrix().scale(1 / scale));
  return pattern;
}

/** Vertical stripes: reductions. */
function crosses(color) {
  const tile = document.createElement("canvas"), pen = tile.getContext("2d");
  tile.width = 4;
  tile.height = 4;
  pen.fillStyle = color;
  pen.globalAlpha = 0.45;
  pen.fillRect(0, 0, 1, 4);
  return pen.createPattern(tile, "repeat");
}

/** A canvas made `width` x `height` CSS pixels, cleared; its pen works in CSS pixels. */
function prepared(canvas, width, height) {
  const ratio = devicePixelRatio || 1;
  if (canvas.width !== Math.round(width * ratio) || canvas.height !== Math.round(height * ratio)) {
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    canvas.style.width = width + "px";
    canvas.style.height = height + "px";
  }
  const pen = canvas.getContext("2d");
  pen.setTransform(ratio, 0, 0, ratio, 0, 0);
  pen.clearRect(0, 0, width, height);
  return pen;
}

const FONT = 'system-ui, "Segoe UI", Roboto, Helvetica, Arial, sans-serif';
const widths = new Map();

function textWidth(pen, text, font) {
  const name = font + "\n" + text;
  if (!widths.has(name)) {
    pen.font = font;
    widths.set(name, pen.measureText(text).width);
  }
  return widths.get(name);
}

function clipPlot(pen, layout, y, height) {
  pen.beginPath();
  pen.rect(layout.left, y, layout.plot, height);
  pen.clip();
}

// -- rows ----------------------------------------------------------------------------------------------------------

function drawRows(canvas, state, layout) {
  const pen = prepared(canvas, layout.width, layout.height);
  drawGutter(pen, layout);
  for (const axis of layout.axes) if (axis.amongRows) drawAxis(pen, axis, state, layout);
  pen.save();
  clipPlot(pen, layout, 0, layout.height);
  pen.fillStyle = colors.row;
  for (const row of layout.rows) pen.fillRect(layout.left, row.y, layout.plot, row.height);
  pen.fillStyle = colors.line;
  for (const { frame, top, bottom } of layout.axes) {
    for (const at of niceTicks(frame.t0, frame.t1, layout.plot / 95).ticks) pen.fillRect(Math.round(frame.x(at)), top, 1, bottom - top);
  }
  const labeled = new Map();
  for (const row of layout.rows) drawRow(pen, row, state, layout, labeled);
  if (state.transfers) drawAllLinks(pen, state, layout);
  pen.restore();
  if (layout.bars) drawBars(pen, state, layout);
}

/** Device numbers and nodes, as many as there is room for. */
function drawGutter(pen, layout) {
  pen.textBaseline = "middle";
  for (const heading of layout.headings) {
    pen.font = "600 11.5px " + FONT;
    pen.textAlign = "left";
    pen.fillStyle = colors.text;
    pen.fillText(heading.text, layout.left, heading.y);
  }
  for (const block of layout.nodes) {
    pen.fillStyle = colors.line;
    pen.fillRect(layout.nodeX + 12, block.y + 1, 2, block.height - 2);
    pen.fillStyle = colors.muted;
    pen.font = "10.5px " + FONT;
    const text = `node ${block.node}`;
    if (textWidth(pen, text, pen.font) + 4 > block.height) continue;
    pen.save();
    pen.translate(layout.nodeX + 5, block.y + block.height / 2);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "center";
    pen.fillText(text, 0, 0);
    pen.restore();
  }
  pen.textAlign = "right";
  for (const label of layout.labels) {
    pen.font = `${label.weight} ${label.size}px ${FONT}`;
    pen.fillStyle = label.weight > 500 ? colors.text : colors.muted;
    pen.fillText(label.text, label.x, label.y);
  }
}

function drawRow(pen, row, state, layout, labeled) {
  const items = row.items, whats = row.view.whats, { t0, t1, x, scale } = row.frame, feet = [];
  let painted = -1;
  for (let i = firstAfter(items, t0); i < items.count && items.start[i] < t1; i++) {
    const what = whats[items.what[i]];
    if (what[WHAT.kind] === KIND.idle && what[WHAT.cause] !== CAUSE.other) continue;
    const x0 = x(items.start[i]), x1 = x(items.end[i]);
    if (x1 - x0 < 0.8) {
      if (x1 - painted < 0.6) continue; // thinner than a pixel and beside one that is painted
      painted = x1;
    }
    pen.globalAlpha = dimmed(state, what) ? 0.13 : 1;
    if (COMPUTE_KINDS.has(what[WHAT.kind])) drawCompute(pen, row, i, what, x0, x1, state, layout, labeled);
    else if (items.under[i]) feet.push(i); // over the boxes, whichever began first
    else drawOther(pen, row, i, what, x0, x1, scale);
  }
  for (const i of feet) {
    const what = whats[items.what[i]];
    pen.globalAlpha = dimmed(state, what) ? 0.13 : 1;
    drawOther(pen, row, i, what, x(items.start[i]), x(items.end[i]), scale);
  }
  pen.globalAlpha = 1;
}

function dimmed(state, what) {
  const only = state.only;
  return only !== null && what[only.field] !== only.index;
}

function fillIndex(state, what) {
  return what[state.colorBy === "task" ? WHAT.task : WHAT.component];
}

function drawCompute(pen, row, place, what, x0, x1, state, layout, labeled) {
  const index = fillIndex(state, what), width = Math.max(x1 - x0, 0.6), { y, height } = row;
  const backward = what[WHAT.kind] === KIND.backward, roomy = height >= 7 && width >= 4;
  pen.fillStyle = index < 0 ? colors.issue : backward && !roomy ? colors.paleFills[index] : data.fills[index][0];
  pen.fillRect(x0, y, roomy ? width - 0.75 : width, height);
  if (!roomy) return;
  if (backward) {
    pen.fillStyle = colors.hatch;
    pen.fillRect(x0, y, width - 0.75, height);
  }
  const line = what[state.colorBy === "task" ? WHAT.component : WHAT.task];
  const stroke = height >= 14 ? 2 : 1.25;
  pen.lineWidth = stroke;
  pen.strokeStyle = line < 0 ? colors.muted : colors.lines[line % colors.lines.length];
  pen.strokeRect(x0 + stroke / 2, y + stroke / 2, width - stroke - 0.75, height - stroke);
  if (row.view.source === "measured" && what[WHAT.planned] > 0 && height >= 9) {
    const ratio = (row.items.end[place] - row.items.start[place]) / what[WHAT.planned] - 1;
    if (ratio > data.threshold) {
      pen.fillStyle = colors.slow;
      pen.fillRect(x0, y + height - 3, width - 0.75, 3);
    }
  }
  if (height >= 11) drawLabel(pen, row, what, x0, x1, index, layout, labeled, backward);
}

const REPEAT_LABEL = 4;

/** Component and layers, on every fourth of neighboring rows that run the same slice. */
function drawLabel(pen, row, what, x0, x1, index, layout, labeled, backward) {
  const name = `${row.view.source} ${what[WHAT.kind]} ${what[WHAT.slice]}`, above = labeled.get(name);
  const repeats = above && what[WHAT.slice] >= 0 && above.last === row.device - 1 && row.sameNode;
  labeled.set(name, { last: row.device, times: repeats ? above.times + 1 : 0 });
  if (repeats && (above.times + 1) % REPEAT_LABEL) return;
  const from = Math.max(x0, layout.left), room = Math.min(x1, layout.left + layout.plot) - from - 8;
  const font = (row.height >= 15 ? "11px " : "10px ") + FONT;
  const text = labelsOf(what).find((words) => textWidth(pen, words, font) <= room);
  if (!text) return;
  const middle = row.y + row.height / 2 + 0.5, wide = textWidth(pen, text, font);
  if (backward) {
    pen.fillStyle = index < 0 ? colors.issue : data.fills[index][0];
    pen.fillRect(from + 3, middle - 6, wide + 4, 11.5);
  }
  pen.font = font;
  pen.textAlign = "left";
  pen.textBaseline = "middle";
  pen.fillStyle = index < 0 ? colors.text : data.fills[index][1];
  pen.fillText(text, from + 5, middle);
}

/** Labels of a slice, longest first. */
function labelsOf(what) {
  const component = what[WHAT.component] >= 0 ? data.components[what[WHAT.component]] : data.strings[what[WHAT.metaop]];
  const slice = data.slices[what[WHAT.slice]], found = [];
  if (slice) {
    const layers = slice[0] === slice[1] ? String(slice[0]) : `${slice[0]}\u2013${slice[1]}`;
    if (what[WHAT.task] >= 0) found.push(`${component} ${layers} \u00b7 ${data.tasks[what[WHAT.task]]}`);
    found.push(`${component} ${layers}`);
  }
  return found.concat(component || []);
}

function drawOther(pen, row, place, what, x0, x1, scale) {
  const kind = what[WHAT.kind], width = Math.max(x1 - x0, 0.6), under = row.items.under[place];
  const height = under ? Math.max(1, Math.round(row.height * 0.3)) : row.height, y = row.y + row.height - height;
  const blocked = Math.min(row.items.blocked[place] * scale, width), low = height < 7;
  if (blocked > 0) {
    pen.fillStyle = low ? colors.paleBlocked : colors.blocked;
    pen.fillRect(x0, low ? y : y + height / 2 - 0.75, blocked, low ? height : 1.5);
    if (width - blocked <= 0.05) return;
  }
  if (kind === KIND.idle) {
    pen.fillStyle = colors.band;
    pen.fillRect(x0, y, width, height);
  } else if (kind === KIND.wait) {
    pen.fillStyle = low ? colors.paleWait : colors.wait;
    const bar = low ? height : height * 0.34;
    pen.fillRect(x0 + blocked, y + (height - bar) / 2, width - blocked, bar);
  } else if (kind === KIND.reduce) {
    pen.fillStyle = colors.reduce;
    pen.fillRect(x0 + blocked, y, width - blocked, height);
    if (height >= 5 && width - blocked > 3) {
      pen.fillStyle = colors.crosses;
      pen.fillRect(x0 + blocked, y, width - blocked, height);
    }
  } else {
    pen.fillStyle = kind === KIND.issue ? colors.issue : kind === KIND.step ? colors.step : colors.load;
    pen.fillRect(x0, y, width, height);
  }
}

/** Where the whole step went, a bar beside each row. */
function drawBars(pen, state, layout) {
  for (const row of layout.rows) {
    let x = layout.barLeft;
    stepOf(state, row.view).accounts[row.device].forEach((ticks, cause) => {
      const width = ((ticks * row.frame.stretch) / layout.longest) * layout.barWidth;
      pen.fillStyle = colors.causes[cause];
      pen.fillRect(x, row.y, width, row.height);
      x += width;
    });
  }
}

// -- links and highlights ------------------------------------------------------------------------------------------

function drawLink(pen, layout, view, step, at) {
  const [fromDevice, fromPlace, toDevice, toPlace] = step.links.slice(at, at + 4);
  const from = layout.rowOf(view, fromDevice), to = layout.rowOf(view, toDevice);
  const x0 = from.frame.x(from.items.end[fromPlace]), x1 = to.frame.x(to.items.end[toPlace]);
  const y0 = from.y + from.height / 2, y1 = to.y + to.height / 2, bend = Math.max(14, Math.abs(x1 - x0) / 2);
  pen.beginPath();
  pen.moveTo(x0, y0);
  pen.bezierCurveTo(x0 + bend, y0, x1 - bend, y1, x1, y1);
  pen.stroke();
  pen.beginPath();
  pen.arc(x1, y1, 2.2, 0, 7);
  pen.fill();
}

function drawAllLinks(pen, state, layout) {
  pen.strokeStyle = pen.fillStyle = colors.accent;
  pen.lineWidth = 1;
  for (const view of layout.shown) {
    const step = stepOf(state, view), visible = [], { t0, t1 } = layout.frames.get(view);
    for (let i = 0; i < step.links.length; i += 4) {
      const start = layout.rowOf(view, step.links[i]).items.end[step.links[i + 1]], end = layout.rowOf(view, step.links[i + 2]).items.end[step.links[i + 3]];
      if (end >= t0 && start <= t1) visible.push(i);
    }
    const stride = Math.ceil(visible.length / 3000);
    pen.globalAlpha = clamp(60 / visible.length, 0.1, 0.7);
    for (let i = 0; i < visible.length; i += stride) drawLink(pen, layout, view, step, visible[i]);
  }
  pen.globalAlpha = 1;
}

/** What lies over the rows: crosshair, the slice under the pointer on all its devices, its transfers. */
function drawOverlay(canvas, state, layout) {
  const pen = prepared(canvas, layout.width, layout.height), chosen = state.pinned || state.hover;
  pen.save();
  clipPlot(pen, layout, 0, layout.height);
  if (state.cursor !== null) {
    pen.fillStyle = colors.muted;
    pen.fillRect(Math.round(layout.x(state.cursor)), 0, 1, layout.height);
  }
  if (chosen && chosen.place >= 0) drawChosen(pen, chosen, state, layout);
  pen.restore();
}

function drawChosen(pen, chosen, state, layout) {
  const home = layout.rowOf(chosen.view, chosen.device);
  if (!home) return;
  const what = chosen.view.whats[home.items.what[chosen.place]], slice = what[WHAT.slice];
  pen.lineWidth = 2;
  pen.strokeStyle = colors.text;
  if (slice >= 0 && COMPUTE_KINDS.has(what[WHAT.kind])) {
    for (const view of layout.shown) {
      for (const [device, place] of stepOf(state, view).bySlice.get(slice) || []) {
        const row = layout.rowOf(view, device);
        pen.globalAlpha = view.whats[row.items.what[place]][WHAT.kind] === what[WHAT.kind] ? 1 : 0.4;
        outline(pen, row, place, layout);
      }
    }
    pen.globalAlpha = 1;
  } else outline(pen, home, chosen.place, layout);
  const step = stepOf(state, chosen.view), name = key(chosen.device, chosen.place);
  pen.strokeStyle = pen.fillStyle = colors.accent;
  pen.lineWidth = 1.5;
  for (const links of [step.linksBySource.get(name), step.linksByTarget.get(name)]) {
    for (const at of links || []) drawLink(pen, layout, chosen.view, step, at);
  }
}

function outline(pen, row, place, layout) {
  const x0 = row.frame.x(row.items.start[place]), x1 = row.frame.x(row.items.end[place]);
  if (x1 < layout.left || x0 > layout.left + layout.plot) return;
  pen.strokeRect(x0 - 0.5, row.y - 0.5, Math.max(x1 - x0, 1) + 1, row.height + 1);
}

// -- memory --------------------------------------------------------------------------------------------------------

/** Least, mean and most bytes over all devices, at each pixel of the plot; and those of one device. */
function memoryCurves(view, state, layout, device) {
  const levels = stepOf(state, view).levels, { t0, scale } = layout.frames.get(view);
  const columns = Math.max(1, Math.floor(layout.plot));
  const low = new Float64Array(columns).fill(Infinity), high = new Float64Array(columns), mean = new Float64Array(columns), own = new Float64Array(columns);
  levels.forEach(({ at, level }, index) => {
    let place = 0;
    for (let x = 0; x < columns; x++) {
      const from = t0 + x / scale, to = from + 1 / scale;
      while (place + 1 < at.length && at[place + 1] <= from) place++;
      let most = level[place];
      for (let i = place + 1; i < at.length && at[i] < to; i++) most = Math.max(most, level[i]);
      low[x] = Math.min(low[x], level[place]);
      high[x] = Math.max(high[x], most);
      mean[x] += level[place] / levels.length;
      if (index === device) own[x] = most;
    }
  });
  return { low, high, mean, own };
}

function drawMemory(canvas, state, layout) {
  const height = 132, top = 10, bottom = height - 8, pen = prepared(canvas, layout.width, height);
  const chosen = state.pinned || state.hover, device = chosen ? chosen.device : -1;
  const unit = data.memory_unit_bytes, capacity = data.capacity_bytes / unit;
  const main = layout.shown[layout.shown.length - 1], other = layout.shown.length > 1 ? layout.shown[0] : null;
  let peak = 0;
  for (const view of layout.shown) for (const { level } of stepOf(state, view).levels) for (const value of level) peak = Math.max(peak, value);
  const top_value = capacity && peak > 0.4 * capacity ? Math.max(capacity, peak) * 1.04 : peak * 1.12 || 1;
  const y = (value) => bottom - (value / top_value) * (bottom - top);
  pen.textBaseline = "middle";
  pen.font = "10.5px " + FONT;
  memoryScale(pen, layout, top_value, unit, y);
  pen.save();
  clipPlot(pen, layout, 0, height);
  const curves = memoryCurves(main, state, layout, device);
  band(pen, layout, curves.low, curves.high, y);
  curve(pen, layout, curves.mean, y, colors.muted, 1.2, []);
  if (other) curve(pen, layout, memoryCurves(other, state, layout, -1).high, y, colors.muted, 1.2, [4, 3]);
  if (device >= 0) curve(pen, layout, curves.own, y, colors.accent, 2, []);
  if (capacity && capacity <= top_value) {
    pen.fillStyle = colors.slow;
    pen.fillRect(layout.left, y(capacity), layout.plot, 1.2);
    pen.textAlign = "left";
    pen.fillText(`${size(data.capacity_bytes)} on a device`, layout.left + 6, y(capacity) + 9);
  }
  if (state.cursor !== null) {
    pen.fillStyle = colors.muted;
    pen.fillRect(Math.round(layout.x(state.cursor)), 0, 1, height);
  }
  pen.restore();
  return curves;
}

function memoryScale(pen, layout, top_value, unit, y) {
  const gib = (top_value * unit) / 4, power = 2 ** Math.floor(Math.log2(gib)), distance = (gib / power > 1.5 ? 2 : 1) * power;
  pen.textAlign = "right";
  for (let bytes = 0; bytes <= top_value * unit * 0.98; bytes += distance) {
    pen.fillStyle = colors.line;
    pen.fillRect(layout.left, Math.round(y(bytes / unit)), layout.plot, 1);
    pen.fillStyle = colors.muted;
    pen.fillText(bytes ? size(bytes) : "0", layout.left - 8, y(bytes / unit));
  }
}

function band(pen, layout, low, high, y) {
  pen.beginPath();
  high.forEach((value, x) => pen.lineTo(layout.left + x, y(value)));
  for (let x = low.length - 1; x >= 0; x--) pen.lineTo(layout.left + x, y(low[x]));
  pen.closePath();
  pen.fillStyle = colors.accent;
  pen.globalAlpha = 0.22;
  pen.fill();
  pen.globalAlpha = 1;
  curve(pen, layout, high, y, colors.accent, 1.3, []);
}

function curve(pen, layout, values, y, color, width, dash) {
  pen.beginPath();
  values.forEach((value, x) => pen.lineTo(layout.left + x, y(value)));
  pen.strokeStyle = color;
  pen.lineWidth = width;
  pen.setLineDash(dash);
  pen.stroke();
  pen.setLineDash([]);
}
