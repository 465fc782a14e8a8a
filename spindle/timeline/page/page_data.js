// Data: the embedded JSON in, rows as typed arrays out. Times are ticks throughout.

const data = JSON.parse(document.getElementById("timeline-data").textContent);
const KIND = Object.fromEntries(data.kinds.map((name, index) => [name, index]));
const CAUSE = Object.fromEntries(data.causes.map(([name], index) => [name, index]));
const COMPUTE_KINDS = new Set([KIND.forward, KIND.backward, KIND.work]);
const COMMUNICATION_KINDS = new Set([KIND.issue, KIND.wait, KIND.reduce]);
const VIEW_TITLES = { plan: "Plan", predicted: "Planned", measured: "Measured" };

const WHAT = { kind: 0, name: 1, task: 2, component: 3, metaop: 4, wave: 5, bytes: 6, slice: 7, planned: 8, why: 9, cause: 10 };
const WAVE = { wave: 0, kind: 1, start: 2, end: 3, ticks: 4, planned: 5, miss: 6, leads: 7 };

/** One row: what, start, end and blocked of each item; `under` marks communication beside compute. */
function decodeRow(flat, blockedPairs, whats) {
  const count = flat.length / 3;
  const row = {
    count,
    what: new Int32Array(count),
    start: new Float64Array(count),
    end: new Float64Array(count),
    blocked: new Float64Array(count),
    under: new Uint8Array(count),
    reach: new Float64Array(count), // latest end of this and all items before: rows may overlap
  };
  let at = 0, reach = 0, computeEnd = -1, lastUnder = -1;
  for (let i = 0; i < count; i++) {
    row.what[i] = flat[3 * i];
    row.start[i] = at + flat[3 * i + 1];
    row.end[i] = at = row.start[i] + flat[3 * i + 2];
    row.reach[i] = reach = Math.max(reach, at);
    const kind = whats[row.what[i]][WHAT.kind];
    if (COMMUNICATION_KINDS.has(kind)) {
      if (row.start[i] < computeEnd) row.under[i] = 1;
      lastUnder = i;
    } else if (kind !== KIND.idle) {
      computeEnd = Math.max(computeEnd, row.end[i]);
      if (lastUnder >= 0 && row.end[lastUnder] > row.start[i]) row.under[lastUnder] = 1;
    }
  }
  for (let i = 0; i < blockedPairs.length; i += 2) row.blocked[blockedPairs[i]] = blockedPairs[i + 1];
  return row;
}

/** Memory of a device as two arrays: moments and levels. */
function decodeLevels(flat) {
  const at = new Float64Array(flat.length / 2), level = new Float64Array(flat.length / 2);
  let now = 0;
  for (let i = 0; i < at.length; i++) {
    at[i] = now += flat[2 * i];
    level[i] = flat[2 * i + 1];
  }
  return { at, level };
}

/** A step made ready for drawing; made once, when it is first looked at. */
function decodeStep(view, index) {
  const step = view.steps[index];
  if (!step.decoded) {
    step.decoded = true;
    step.rows = step.rows.map((flat, device) => decodeRow(flat, step.blocked[device], view.whats));
    step.levels = step.memory.map(decodeLevels);
    step.linksBySource = new Map();
    step.linksByTarget = new Map();
    for (let i = 0; i < step.links.length; i += 4) {
      addTo(step.linksBySource, key(step.links[i], step.links[i + 1]), i);
      addTo(step.linksByTarget, key(step.links[i + 2], step.links[i + 3]), i);
    }
    step.bySlice = new Map();
    step.rows.forEach((row, device) => {
      for (let i = 0; i < row.count; i++) {
        const what = view.whats[row.what[i]];
        if (what[WHAT.slice] >= 0 && COMPUTE_KINDS.has(what[WHAT.kind])) addTo(step.bySlice, what[WHAT.slice], [device, i]);
      }
    });
  }
  return step;
}

const key = (device, place) => device * 1e7 + place;

function addTo(map, name, value) {
  const list = map.get(name);
  if (list) list.push(value);
  else map.set(name, [value]);
}

/** First item of a row that ends after `at`. */
function firstAfter(row, at) {
  let low = 0, high = row.count;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (row.reach[middle] > at) high = middle;
    else low = middle + 1;
  }
  return low;
}

// -- words ---------------------------------------------------------------------------------------------------------

function digits(value, count) {
  const text = value.toPrecision(count);
  return text.includes("e") ? value.toFixed(0) : String(parseFloat(text));
}

function seconds(ticks) {
  const value = ticks * data.tick_s;
  if (!value) return "0 s";
  for (const [factor, unit] of [[1, "s"], [1e-3, "ms"], [1e-6, "\u00b5s"], [1e-9, "ns"]]) {
    if (Math.abs(value) >= factor * 0.99995) return digits(value / factor, 4) + " " + unit;
  }
  return digits(value / 1e-9, 4) + " ns";
}

function size(bytes) {
  for (const [factor, unit] of [[2 ** 40, "TiB"], [2 ** 30, "GiB"], [2 ** 20, "MiB"], [2 ** 10, "KiB"]]) {
    if (bytes >= factor * 0.9995) return digits(bytes / factor, 3) + " " + unit;
  }
  return digits(bytes, 3) + " B";
}

const percent = (share, signed) => (signed && share > 0 ? "+" : "") + (100 * share).toFixed(1) + " %";
