"use strict";
// The sliders of the page, and a page that reads itself again while its training goes on. All else is there without it.
(() => {
  const LEFT = 46, RIGHT = 312, WIDTH = 320; // of a chart's plotting area and of the chart, as in charts.py
  const byId = (id) => document.getElementById(id);
  const all = (selector, within = document) => [...within.querySelectorAll(selector)];

  for (const element of all(".scripted")) element.classList.remove("scripted");

  // Pictures: the slider shows the newest of each place that are not later than it.
  const stop = byId("stop");
  const showPictures = () => {
    const iteration = Number(stop.dataset.stops.split(" ")[stop.value]);
    const name = stop.dataset.names.split("|")[stop.value];
    stop.setAttribute("aria-valuetext", name);
    for (const place of all("output, .now", stop.closest(".bar"))) place.textContent = name;
    for (const figure of all(".pictures .strip")) {
      const images = all("img", figure);
      const shown = images.findLast((image) => Number(image.dataset.at) <= iteration) ?? images[0];
      for (const image of images) image.hidden = image !== shown;
    }
  };

  // Charts: the slider, or a pointer above one of them, shows all their values at an iteration.
  const at = byId("at");
  const lines = new WeakMap();
  const lineOf = (group) => {
    if (!lines.has(group)) {
      const [from, to] = group.dataset.i.split(":").map(Number);
      const iterations = to === undefined ? group.dataset.i.split(" ").map(Number)
        : Array.from({ length: to - from + 1 }, (_, k) => from + k);
      lines.set(group, { iterations, values: group.dataset.v.split(" ") });
    }
    return lines.get(group);
  };
  const readAt = (iteration) => { // null: the end
    for (const chart of all(".chart")) {
      if (!chart.offsetParent) continue; // in details that are closed
      const svg = chart.querySelector(":scope > svg");
      const first = Number(svg.dataset.first), span = Math.max(svg.dataset.last - first, 1);
      chart.classList.toggle("reading", iteration !== null);
      if (iteration !== null) {
        const x = LEFT + (RIGHT - LEFT) * Math.min(Math.max((iteration - first) / span, 0), 1);
        chart.querySelector(".cross").setAttribute("transform", `translate(${x.toFixed(1)} 0)`);
      }
      const keys = all(".key b", chart);
      all(":scope > svg > g.line", chart).forEach((group, k) => {
        keys[k].dataset.end ??= keys[k].textContent;
        const { iterations, values } = lineOf(group);
        const index = iterations.findLastIndex((each) => each <= iteration);
        keys[k].textContent = iteration === null ? keys[k].dataset.end : index < 0 ? "–" : values[index];
      });
    }
    const name = iteration === null ? "the end" : iteration ? `iteration ${iteration}` : "before training";
    all("output", at.closest(".bar"))[0].textContent = name;
    return name;
  };
  const showValues = () => {
    const name = readAt(at.value === at.max ? null : Number(at.value));
    at.setAttribute("aria-valuetext", name);
  };

  if (stop) stop.addEventListener("input", showPictures);
  if (at) {
    at.addEventListener("input", showValues);
    document.addEventListener("toggle", showValues, true); // charts that have just been opened
    for (const svg of all(".chart > svg")) {
      svg.addEventListener("pointermove", (event) => {
        const box = svg.getBoundingClientRect(), first = Number(svg.dataset.first);
        const share = ((event.clientX - box.left) / box.width * WIDTH - LEFT) / (RIGHT - LEFT);
        readAt(Math.round(first + Math.min(Math.max(share, 0), 1) * (svg.dataset.last - first)));
      });
      svg.addEventListener("pointerleave", showValues);
    }
  }

  // Reading itself again, with everything as the reader has left it.
  const KEY = `fastgrpo ${location.pathname}`;
  const inputs = () => all("input[id]");
  const keep = () => {
    const section = all("section[id]").findLast((each) => each.getBoundingClientRect().top <= 80) ?? document.body;
    const state = {
      inputs: Object.fromEntries(inputs().map((each) => [each.id, each.type === "checkbox" ? each.checked
        : each.value === each.max ? "last" : each.value])),
      open: Object.fromEntries(all("details[id]").map((each) => [each.id, each.open])),
      focus: document.activeElement?.id ?? "",
      place: [section.id, section.getBoundingClientRect().top],
    };
    try { sessionStorage.setItem(KEY, JSON.stringify(state)); } catch { /* a browser that keeps nothing for files */ }
  };
  const restore = () => {
    let state = null;
    try {
      state = JSON.parse(sessionStorage.getItem(KEY));
      sessionStorage.removeItem(KEY);
    } catch { /* as above */ }
    if (!state) return;
    history.scrollRestoration = "manual";
    for (const input of inputs()) {
      const kept = state.inputs[input.id];
      if (kept === undefined) continue;
      if (input.type === "checkbox") input.checked = kept;
      else input.value = kept === "last" ? input.max : kept;
    }
    for (const each of all("details[id]")) each.open = state.open[each.id] ?? each.open;
    if (stop) showPictures();
    if (at) showValues();
    if (state.focus) byId(state.focus)?.focus({ preventScroll: true });
    const [id, top] = state.place;
    const back = () => window.scrollBy(0, ((id && byId(id)) || document.body).getBoundingClientRect().top - top);
    back();
    window.addEventListener("load", back, { once: true });
  };
  restore();

  const again = 1000 * Number(document.body.dataset.again);
  if (again) {
    const began = Date.now();
    let touched = 0;
    for (const name of ["pointerdown", "keydown", "input", "scroll"]) {
      document.addEventListener(name, () => { touched = Date.now(); }, { passive: true, capture: true });
    }
    setInterval(() => {
      const now = Date.now(), selecting = !(getSelection()?.isCollapsed ?? true);
      if (!byId("follow").checked || document.hidden || selecting) return;
      if (now - began < again || now - touched < 2000) return;
      keep();
      location.reload();
    }, 500);
  }
})();
