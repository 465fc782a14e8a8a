// Axis: moments and strips of waves, drawn above what they belong to.

/** Round moments between t0 and t1, at most about `most`. */
function niceTicks(t0, t1, most) {
  const raw = ((t1 - t0) * data.tick_s) / most, power = 10 ** Math.floor(Math.log10(raw));
  const distance = [1, 2, 5, 10].map((digit) => digit * power).find((d) => d >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil((t0 * data.tick_s) / distance - 1e-6); i * distance <= t1 * data.tick_s * (1 + 1e-9); i++) ticks.push((i * distance) / data.tick_s);
  return { ticks, distance: distance / data.tick_s };
}

/** All labels of an axis bear the unit that suits its end. */
function tickLabel(at, distance, end) {
  const unit = [[1, "s"], [1e-3, "ms"], [1e-6, "\u00b5s"]].find(([factor]) => end * data.tick_s >= factor) || [1e-9, "ns"];
  const places = Math.max(0, -Math.floor(Math.log10((distance * data.tick_s) / unit[0]) + 1e-9));
  return at ? ((at * data.tick_s) / unit[0]).toFixed(places) + " " + unit[1] : "0";
}

/** The axis that all views share, on a canvas of its own that stays in sight. */
function drawSharedAxis(canvas, state, layout) {
  const pen = prepared(canvas, layout.width, layout.axisHeight);
  for (const axis of layout.axes) if (!axis.amongRows) drawAxis(pen, axis, state, layout);
}

/** Moments, and below them a strip of waves for each view of the axis. */
function drawAxis(pen, axis, state, layout) {
  pen.font = "11px " + FONT;
  pen.textBaseline = "middle";
  const { t0, t1, x } = axis.frame, { ticks, distance } = niceTicks(t0, t1, layout.plot / 95);
  pen.fillStyle = colors.muted;
  for (const at of ticks) {
    const label = tickLabel(at, distance, t1), half = textWidth(pen, label, pen.font) / 2;
    pen.textAlign = "left";
    pen.fillText(label, Math.min(Math.max(x(at) - half, layout.left), layout.left + layout.plot - 2 * half), axis.y + 11);
    pen.fillRect(Math.round(x(at)), axis.y + 19, 1, 4);
  }
  axis.views.forEach((view, place) => drawWaves(pen, view, axis.y + TICKS_HEIGHT + place * STRIP_HEIGHT, state, layout));
  if (layout.bars) {
    pen.fillStyle = colors.muted;
    pen.textAlign = "left";
    pen.fillText("time by cause", layout.barLeft, axis.y + axisHeight(axis.views) - 10);
  }
}

/** A strip on which each wave that leads lasts until the next one begins; waves that missed their prediction stand out,
 * waves that begin behind a later one by a mark alone. */
function drawWaves(pen, view, y, state, layout) {
  const all = stepOf(state, view).waves, waves = leadingWaves(all), frame = layout.frames.get(view);
  pen.textAlign = "right";
  pen.fillStyle = colors.muted;
  pen.font = "10.5px " + FONT;
  pen.fillText(view.source === "measured" ? "run waves" : "plan waves", layout.left - 8, y + 7.5);
  pen.save();
  clipPlot(pen, layout, y - 1, 18);
  pen.textAlign = "left";
  waves.forEach((wave, place) => {
    const next = waves[place + 1], x0 = frame.x(wave[WAVE.start]), x1 = frame.x(next ? next[WAVE.start] : Math.max(...all.map((other) => other[WAVE.end])));
    const missed = wave[WAVE.miss], width = Math.max(x1 - x0, 1);
    pen.globalAlpha = missed ? 1 : place % 2 ? 0.45 : 1;
    pen.fillStyle = missed ? (missed > 0 ? colors.slow : colors.fast) : colors.band;
    pen.fillRect(x0, y, missed ? Math.max(width, 3) : width, 15);
    pen.fillStyle = colors.card;
    if (width > 4) pen.fillRect(x1 - 1, y, 1, 15);
    pen.globalAlpha = 1;
    const label = missed ? [`${wave[WAVE.wave]}  ${percent(missed, true)}`, String(wave[WAVE.wave])] : [String(wave[WAVE.wave])];
    const room = x1 - Math.max(x0, layout.left) - 7, text = label.find((words) => textWidth(pen, words, pen.font) <= room);
    pen.fillStyle = missed ? "#ffffff" : colors.text;
    if (text) pen.fillText(text, Math.max(x0, layout.left) + 4, y + 8);
  });
  for (const wave of all) {
    if (wave[WAVE.leads] || !wave[WAVE.miss]) continue;
    pen.fillStyle = wave[WAVE.miss] > 0 ? colors.slow : colors.fast;
    pen.fillRect(frame.x(wave[WAVE.start]), y + 12, 3, 3);
  }
  pen.restore();
}

/** Waves that begin before all that the plan has behind them: their numbers rise through forward, fall through backward. */
function leadingWaves(waves) {
  return waves.filter((wave) => wave[WAVE.leads]);
}
