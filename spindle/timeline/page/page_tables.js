// Tables beside the drawing: where the time went, and waves that missed their prediction.

function element(tag, attributes, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes || {})) {
    if (name === "onclick" || name === "onchange" || name === "onmouseenter" || name === "onmouseleave") made[name] = value;
    else if (value !== null && value !== undefined) made.setAttribute(name, value);
  }
  made.append(...children.filter((child) => child !== null));
  return made;
}

function swatch(color) {
  const made = element("span", { class: "swatch" });
  made.style.background = color;
  return made;
}

/** Mean and worst of each cause over all devices, for the views that are there. */
function accountsTable(state) {
  const views = data.views, steps = views.map((view) => stepOf(state, view)), count = data.num_devices;
  const head = element("tr", {}, element("th", {}, ""));
  views.forEach((view, v) => {
    const title = `${VIEW_TITLES[view.source]}, ${seconds(steps[v].ticks)}`;
    head.append(element("th", { colspan: 2, class: "number" }, title));
  });
  head.append(element("th", { class: "number" }, "worst device"));
  const body = element("tbody");
  for (const group of ["computing", "communicating", "idle", "other steps"]) {
    const causes = data.causes.map((_, cause) => cause).filter((cause) => data.causes[cause][2] === group);
    const sums = steps.map((step) => causes.map((cause) => step.accounts.reduce((sum, row) => sum + row[cause], 0)));
    const totals = sums.map((list) => list.reduce((a, b) => a + b, 0));
    if (!totals.some((total) => total > 0)) continue;
    body.append(accountsRow(element("td", {}, group), totals, steps, count, "", "group"));
    causes.forEach((cause, place) => {
      if (!sums.some((list) => list[place] > 0)) return;
      const label = element("td", {}, swatch(colors.causes[cause]), data.causes[cause][1]);
      body.append(accountsRow(label, sums.map((list) => list[place]), steps, count, worstOf(steps[steps.length - 1], cause), ""));
    });
  }
  return element("table", { class: "accounts" }, element("thead", {}, head), body);
}

function accountsRow(label, ticks, steps, count, worst, name) {
  const row = element("tr", { class: name }, label);
  ticks.forEach((value, v) => {
    row.append(element("td", { class: "number" }, value ? seconds(value / count) : "\u2013"), element("td", { class: "number share" }, value ? percent(value / count / steps[v].ticks) : ""));
  });
  row.append(element("td", { class: "number share" }, worst));
  return row;
}

function worstOf(step, cause) {
  let worst = 0;
  step.accounts.forEach((row, device) => {
    if (row[cause] > step.accounts[worst][cause]) worst = device;
  });
  const ticks = step.accounts[worst][cause];
  return ticks && data.num_devices > 1 ? `${seconds(ticks)} on ${worst}` : "";
}

const MOST_WAVES = 12;

/** Waves that missed their prediction, worst first; a click zooms to the wave. */
function wavesTable(state, zoomTo) {
  const view = data.views.find((candidate) => candidate.source === "measured"), within = percent(data.threshold).replace(".0", "");
  if (!view) return element("p", { class: "quiet" }, "No run is shown. With the trace of a run, this lists the waves that missed their prediction.");
  const all = stepOf(state, view).waves, planned = all.filter((wave) => wave[WAVE.planned] > 0);
  const missed = all.filter((wave) => wave[WAVE.miss]).sort((a, b) => Math.abs(b[WAVE.ticks] - b[WAVE.planned]) - Math.abs(a[WAVE.ticks] - a[WAVE.planned]));
  if (!planned.length) return element("p", { class: "quiet" }, "The plan says nothing of how long its waves should take.");
  if (!missed.length) return element("p", { class: "quiet" }, `All ${planned.length} waves (forward and backward) took within ${within} of their planned time.`);
  const body = element("tbody");
  for (const wave of missed.slice(0, MOST_WAVES)) {
    const miss = element("td", { class: "number " + (wave[WAVE.miss] > 0 ? "slow" : "fast") }, percent(wave[WAVE.miss], true));
    const name = element("button", { class: "link", onclick: () => zoomTo(wave) }, `wave ${wave[WAVE.wave]} ${data.kinds[wave[WAVE.kind]]}`);
    body.append(element("tr", {}, element("td", {}, name), ...[WAVE.start, WAVE.planned, WAVE.ticks].map((field) => element("td", { class: "number" }, seconds(wave[field]))), miss));
  }
  const head = element("tr", {}, element("th", {}, ""), ...["starts at", "planned", "took", "off by"].map((text) => element("th", { class: "number" }, text)));
  const note = `${missed.length} of ${planned.length} missed by more than ${within}, judged by their longest slice` + (missed.length > MOST_WAVES ? `; the ${MOST_WAVES} that cost most are listed.` : ".");
  return element("div", {}, element("p", { class: "quiet" }, note), element("table", {}, element("thead", {}, head), body));
}
