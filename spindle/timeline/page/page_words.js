// Words: what the pointer is on in, lines of text out.

const NOUNS = { plan: "plan", predicted: "plan", measured: "run" };

/** Which view is drawn smaller, and by how much, where each has an axis of its own. */
function scalesInWords(state) {
  const ticks = (view) => stepOf(state, view).ticks, [shorter, longer] = shownViews(state).sort((a, b) => ticks(a) - ticks(b));
  const ratio = ticks(longer) / ticks(shorter);
  return `The ${NOUNS[longer.source]} is drawn at 1/${ratio.toFixed(ratio < 10 ? 1 : 0)} of the ${NOUNS[shorter.source]}'s scale: each has a time axis of its own.`;
}

/** Title, color and (label, text) lines of an item. */
function describe(state, hit) {
  const step = stepOf(state, hit.view), row = step.rows[hit.device];
  if (hit.bar || hit.place < 0) return describeDevice(step, hit);
  const what = hit.view.whats[row.what[hit.place]], kind = what[WHAT.kind], ticks = row.end[hit.place] - row.start[hit.place];
  const lines = [];
  const add = (label, text) => text && lines.push([label, text]);
  if (kind !== KIND.idle) {
    add("MetaOp", data.strings[what[WHAT.metaop]]);
    add("task", what[WHAT.task] >= 0 && data.tasks[what[WHAT.task]]);
    add("component", what[WHAT.component] >= 0 && data.components[what[WHAT.component]]);
  }
  const slice = data.slices[what[WHAT.slice]];
  if (slice) {
    const of = slice[2] ? ` of ${slice[2]}` : "";
    if (slice[0] === slice[1]) add("layer", slice[0] + of);
    else add("layers", `${slice[0]} to ${slice[1]}${of}`);
    add("devices", slice[3]);
  }
  if (what[WHAT.wave] >= 0) add("wave", String(what[WHAT.wave]));
  add("start", seconds(row.start[hit.place]));
  add("duration", seconds(ticks));
  if (what[WHAT.planned] > 0 && hit.view.source === "measured") add("planned", `${seconds(what[WHAT.planned])} (${percent(ticks / what[WHAT.planned] - 1, true)})`);
  if (what[WHAT.bytes]) add("bytes", bytesOf(what[WHAT.bytes], ticks - row.blocked[hit.place], kind));
  addWaits(add, what, row.blocked[hit.place], ticks);
  if (kind !== KIND.idle && kind !== KIND.wait) addIdleBefore(add, hit, row);
  const index = fillIndex(state, what), fill = index >= 0 && kind !== KIND.idle ? data.fills[index][0] : "";
  return { title: titleOf(hit.view, what), fill, note: `${VIEW_TITLES[hit.view.source].toLowerCase()}, device ${hit.device}`, lines };
}

/** Measured names say what is done; predicted ones name the slice alone. */
function titleOf(view, what) {
  const kind = what[WHAT.kind], name = data.strings[what[WHAT.name]];
  if (view.source === "measured" || kind === KIND.idle || kind === KIND.reduce || kind === KIND.work) return name;
  return `${kind === KIND.wait ? "transfer for" : data.kinds[kind]} ${name}`;
}

function bytesOf(bytes, ticks, kind) {
  const rate = kind !== KIND.issue && ticks > 0 ? `, ${size(bytes / (ticks * data.tick_s))}/s` : "";
  return size(bytes) + rate;
}

/** What an item itself waited for. */
function addWaits(add, what, blocked, ticks) {
  const kind = what[WHAT.kind], why = data.strings[what[WHAT.why]], cause = data.causes[what[WHAT.cause]][1];
  if (kind === KIND.idle) {
    add("cause", cause);
    add(what[WHAT.cause] === CAUSE.overhead ? "" : what[WHAT.cause] === CAUSE.unmade ? "for" : "why", why);
  } else if (kind === KIND.wait) {
    if (blocked > 0) add("not made for", `${seconds(blocked)}: ${why}`);
    else add("for", why);
    add("under way for", seconds(ticks - blocked));
  } else if (kind === KIND.reduce && blocked > 0) {
    add("waited for", `${seconds(blocked)}: ${why}`);
    add("reduced in", seconds(ticks - blocked));
  }
}

/** Time without work right before an item, by cause. */
function addIdleBefore(add, hit, row) {
  let total = 0;
  const parts = new Map();
  for (let i = hit.place - 1; i >= 0; i--) {
    const what = hit.view.whats[row.what[i]], kind = what[WHAT.kind];
    if (kind === KIND.issue) continue;
    if (kind !== KIND.idle && kind !== KIND.wait && kind !== KIND.load) break;
    const ticks = row.end[i] - row.start[i], name = data.strings[what[WHAT.why]] || data.causes[what[WHAT.cause]][1];
    total += ticks;
    parts.set(name, (parts.get(name) || 0) + ticks);
  }
  if (!total) return;
  const listed = [...parts].sort((a, b) => b[1] - a[1]).slice(0, 2).map(([name, ticks]) => (parts.size > 1 ? `${seconds(ticks)} ${name}` : name));
  add("idle before", `${seconds(total)}: ${listed.join("; ")}`);
}

/** A whole device: its step by cause. */
function describeDevice(step, hit) {
  const accounts = step.accounts[hit.device], lines = [];
  accounts.forEach((ticks, cause) => {
    if (ticks > 0) lines.push([data.causes[cause][1], `${seconds(ticks)}, ${percent(ticks / step.ticks)}`, colors.causes[cause]]);
  });
  lines.sort((a, b) => accounts[data.causes.findIndex((c) => c[1] === b[0])] - accounts[data.causes.findIndex((c) => c[1] === a[0])]);
  return { title: `device ${hit.device}`, fill: "", note: VIEW_TITLES[hit.view.source].toLowerCase(), lines };
}

/** A wave under the pointer in its strip. `late`: waves that begin while it leads, though the plan has them before it. */
function describeWave(view, wave, late) {
  const lines = [["direction", data.kinds[wave[WAVE.kind]]], ["from", seconds(wave[WAVE.start])], ["to", seconds(wave[WAVE.end])], ["longest slice", seconds(wave[WAVE.ticks])]];
  if (wave[WAVE.planned] > 0 && view.source === "measured") lines.push(["planned", `${seconds(wave[WAVE.planned])} (${percent(wave[WAVE.ticks] / wave[WAVE.planned] - 1, true)})`]);
  if (late.length) lines.push(["begin late beside it", late.slice(0, 6).map((other) => `wave ${other[WAVE.wave]} ${data.kinds[other[WAVE.kind]]}${other[WAVE.miss] ? ` (${percent(other[WAVE.miss], true)})` : ""}`).join(", ")]);
  return { title: `wave ${wave[WAVE.wave]}`, fill: "", note: VIEW_TITLES[view.source].toLowerCase(), lines };
}
