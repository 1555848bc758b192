"use strict";
(() => {
  const SVG = "http://www.w3.org/2000/svg";
  // What marks a kind of error besides its line: about the middle (x, y) of the cell, with radius r.
  const GLYPHS = {
    missed: (x, y, r) => `M${x - r} ${y}a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0`,  // a dot
    false: (x, y, r) => `M${x - r} ${y - r}l${2 * r} ${2 * r}M${x - r} ${y + r}l${2 * r} ${-2 * r}`,
    merged: (x, y, r) => `M${x - r} ${y}h${2 * r}M${x} ${y - r}v${2 * r}`,
    split: (x, y, r) => `M${x - r} ${y + r}l${2 * r} ${-2 * r}`,
  };
  const byId = (id) => document.getElementById(id);
  const cards = [...document.querySelectorAll(".card")];
  const viewer = byId("viewer");
  const details = new WeakMap();  // of a card: its outlines, read once

  function element(name, attributes = {}, parent = null) {
    const made = document.createElementNS(SVG, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (parent) parent.append(made);
    return made;
  }

  function detailOf(card) {
    const script = card.querySelector("script");
    if (script) {
      const detail = JSON.parse(script.textContent);
      const bytes = Uint8Array.from(atob(detail.image), (c) => c.charCodeAt(0));
      detail.url = URL.createObjectURL(new Blob([bytes], { type: "image/jpeg" }));
      script.remove();
      delete detail.image;
      details.set(card, detail);
    }
    return details.get(card) ?? null;
  }

  /* The box [x1, y1, x2, y2] of an outline: absolute starts "Mx y", then pairs of steps, then "z". */
  function boxOf(outline) {
    let x1 = Infinity, y1 = Infinity, x2 = -Infinity, y2 = -Infinity;
    for (const ring of outline.split("M").slice(1)) {
      const numbers = ring.match(/-?\d+/g).map(Number);
      let x = 0, y = 0;
      for (let i = 0; i < numbers.length; i += 2) {
        x += numbers[i]; y += numbers[i + 1];
        x1 = Math.min(x1, x); x2 = Math.max(x2, x); y1 = Math.min(y1, y); y2 = Math.max(y2, y);
      }
    }
    return [x1, y1, x2, y2];
  }

  function addLayer(svg, kind, outlines, always = false) {
    if (!outlines.length) return;
    const group = element("g", { class: `layer ${kind}${always ? " always" : ""}` }, svg);
    const path = outlines.join("");
    element("path", { class: "halo", d: path }, group);
    element("path", { class: "stroke", d: path }, group);
    if (!GLYPHS[kind]) return;
    const glyphs = outlines.map((outline) => {
      const [x1, y1, x2, y2] = boxOf(outline);
      const radius = Math.max(0.6, 0.16 * Math.min(x2 - x1, y2 - y1));
      return GLYPHS[kind]((x1 + x2) / 2, (y1 + y2) / 2, Math.round(radius * 10) / 10);
    }).join("");
    element("path", { class: "glyph-halo", d: glyphs }, group);
    element("path", { class: "glyph", d: glyphs }, group);
  }

  // Lines and marks are as thin as the cells are small on the screen, so that they never hide them.
  const FULL_WIDTH = 24;  // pixels of a cell on the screen from which lines have their full width
  function shrink(svg) {
    const { detail } = svg;
    detail.side ??= sideOf(detail.truth);
    const shown = svg.viewBox.baseVal.width, scale = shown ? svg.clientWidth / shown : 1;
    svg.style.setProperty("--shrink", Math.min(1, Math.max(0.3, scale * detail.side / FULL_WIDTH)).toFixed(2));
  }
  const shrinker = new ResizeObserver((entries) => entries.forEach((entry) => shrink(entry.target)));

  /* The median side of the boxes of outlines, pixels of the image. */
  function sideOf(outlines) {
    const sides = outlines.map(boxOf).map(([x1, y1, x2, y2]) => Math.sqrt((x2 - x1) * (y2 - y1))).sort((a, b) => a - b);
    return sides.length ? sides[sides.length >> 1] : FULL_WIDTH;
  }

  const number = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;
  const pick = (list, indices) => indices.map((i) => list[i]);

  // The class that is shown, an index, or "" for all.
  const chosenClass = () => byId("class")?.value ?? "";
  const noun = (of) => chosenClass() === "" ? of : `${byId("class").selectedOptions[0].textContent} ${of}`;
  const marksOf = (model) => chosenClass() === "" ? model : model.classes[chosenClass()];

  function addPanel(parent, detail, caption, draw) {
    const figure = document.createElement("figure");
    figure.className = "panel";
    const text = document.createElement("figcaption");
    text.textContent = caption;
    const svg = element("svg", { viewBox: `0 0 ${detail.width} ${detail.height}`, role: "img", "aria-label": caption });
    const image = { width: detail.width, height: detail.height, href: detail.url, preserveAspectRatio: "none" };
    element("image", image, element("g", { class: "layer image" }, svg));
    draw(svg);
    figure.append(text, svg);
    parent.append(figure);
    shrinker.observe(svg);
    svg.detail = detail;
    return svg;
  }

  /* Input, ground truth and the instances of every model, side by side. */
  function addPanels(parent, detail) {
    parent.replaceChildren();
    const truth = chosenClass() === "" ? detail.truth : pick(detail.truth, detail.classes[chosenClass()]);
    addPanel(parent, detail, "Input", () => {});
    addPanel(parent, detail, `Ground truth, ${number(truth.length, noun("cell"))}`, (svg) => addLayer(svg, "truth", truth, true));
    detail.models.forEach((model, m) => {
      const marks = marksOf(model);
      const caption = `${MODELS[m]}, ${number(marks.found.length + marks.false.length, noun("instance"))}`;
      const svg = addPanel(parent, detail, caption, (svg) => {
        addLayer(svg, "truth", truth);
        addLayer(svg, "merged", pick(model.cells, marks.merged));
        addLayer(svg, "split", pick(detail.truth, marks.split));
        addLayer(svg, "found", pick(model.cells, marks.found));
        addLayer(svg, "false", pick(model.cells, marks.false));
        addLayer(svg, "missed", pick(detail.truth, marks.missed));
      });
      svg.dataset.model = m;
    });
  }

  // Cards get their panels when they come near the screen, and before printing where they have come.
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) {
      if (!entry.isIntersecting) continue;
      watcher.unobserve(entry.target);
      addPanels(entry.target.querySelector(".panels"), detailOf(entry.target));
    }
  }, { rootMargin: "500px 0px" });
  const watch = () => { for (const card of cards) if (card.dataset.detail === "1") watcher.observe(card); };
  watch();

  // Layers
  const boxes = new Map([...document.querySelectorAll("[data-layer]")].map((box) => [box.getAttribute("aria-keyshortcuts"), box]));
  function showLayer(box) {
    document.body.classList.toggle(`hide-${box.dataset.layer}`, !box.checked);
  }
  for (const box of boxes.values()) {
    box.addEventListener("change", () => showLayer(box));
    showLayer(box);
  }

  // Order and choice
  const parts = new Intl.Collator(undefined, { numeric: true });
  const byClass = new Map(cards.map((card) => [card, JSON.parse(card.dataset.byClass ?? "[]")]));
  const ofAll = new Map(cards.map((card) => [card, { ...card.dataset, rows: rowsOf(card) }]));

  /* The counts of a card's models, a list of texts each. */
  function rowsOf(card) {
    return [...card.querySelectorAll("tbody tr")].map((row) => [...row.querySelectorAll("td")].map((cell) => cell.textContent));
  }

  /* Show and count the cells of the chosen class, or of all. */
  function showClass() {
    for (const card of cards) {
      const counts = chosenClass() === "" ? ofAll.get(card) : byClass.get(card)[chosenClass()];
      for (const key of ["f1", "spread", "cells", "missed", "false", "merged", "split"]) card.dataset[key] = counts[key];
      card.querySelector(".cells").textContent = counts.cells;
      const rows = [...card.querySelectorAll("tbody tr")];
      rows.forEach((row, m) => {
        const values = Object.values(counts.rows[m]);
        row.querySelectorAll("td").forEach((cell, i) => { cell.textContent = values[i]; });
      });
      if (card.dataset.detail === "1" && card.querySelector(".panel svg")) card.querySelector(".panels").replaceChildren();
    }
    watcher.disconnect();
    watch();
    arrange();
  }
  byId("class")?.addEventListener("change", showClass);

  /* Whether an image has a cell or an instance of the chosen class. */
  function hasClass(card) {
    const counts = byClass.get(card)[chosenClass()];
    return chosenClass() === "" || counts.cells + counts.instances > 0;
  }

  function arrange() {
    const [key, direction] = byId("order").value.split(" ");
    const only = byId("only").value, name = byId("name").value.trim().toLowerCase();
    const sign = direction === "up" ? 1 : -1;
    const compare = (a, b) => key === "name" ? parts.compare(a.dataset.name, b.dataset.name) : a.dataset[key] - b.dataset[key];
    const sorted = [...cards].sort((a, b) => sign * compare(a, b) || a.dataset.index - b.dataset.index);
    let left = 0;
    for (const card of sorted) {
      card.hidden = !card.dataset.name.toLowerCase().includes(name) || (only !== "" && !(Number(card.dataset[only]) > 0)) || !hasClass(card);
      left += !card.hidden;
    }
    byId("cards").append(...sorted);
    byId("count").textContent = left === cards.length ? `${left} images` : `${left} of ${cards.length} images`;
    byId("none").hidden = left > 0;
  }
  for (const id of ["order", "only"]) byId(id).addEventListener("change", arrange);
  byId("name").addEventListener("input", arrange);

  // The viewer: one card enlarged; `view` is the part of the image on show, [x, y, width, height] in its pixels.
  let current = null, view = null, outlines = [];
  const context = document.createElement("canvas").getContext("2d");

  function open(card) {
    const detail = detailOf(card);
    if (!detail) return;
    current = card;
    byId("viewer-title").textContent = card.dataset.name;
    addPanels(viewer.querySelector(".panels"), detail);
    viewer.querySelector(".viewer-head").after(byId("layers"));
    outlines = detail.models.map((model) => {
      const { found, false: wrong } = marksOf(model), shown = new Set([...found, ...wrong]);
      return model.cells.map((outline, i) => shown.has(i) ? new Path2D(outline) : new Path2D());
    });
    show([0, 0, detail.width, detail.height]);
    if (!viewer.open) viewer.showModal();
    fit();
    viewer.querySelector("[data-do=next]").focus({ preventScroll: true });
  }

  /* As many columns as make the panels largest. */
  function fit() {
    const panels = viewer.querySelector(".panels"), count = panels.children.length, caption = 28;
    const { width, height } = detailOf(current);
    const widthWith = (columns) => {
      const high = panels.clientHeight / Math.ceil(count / columns) - caption;
      return Math.min(panels.clientWidth / columns, Math.max(high, 160) * width / height);
    };
    const columns = [...Array(count).keys()].map((i) => i + 1).sort((a, b) => widthWith(b) - widthWith(a) || a - b)[0];
    panels.style.gridTemplateColumns = `repeat(${columns}, minmax(0, ${Math.floor(widthWith(columns)) - 8}px))`;
  }
  addEventListener("resize", () => { if (viewer.open) fit(); });

  function show(wanted) {
    const { width, height } = detailOf(current);
    const w = Math.min(width, Math.max(8, wanted[2])), h = w * height / width;
    view = [Math.min(width - w, Math.max(0, wanted[0])), Math.min(height - h, Math.max(0, wanted[1])), w, h];
    for (const svg of viewer.querySelectorAll(".panel svg")) {
      svg.setAttribute("viewBox", view.map((v) => v.toFixed(2)).join(" "));
      shrink(svg);
    }
    const zoom = width / w;
    byId("readout").textContent = zoom > 1.01 ? `zoom ${zoom.toFixed(1)}` : "";
  }

  function zoom(factor, x = view[0] + view[2] / 2, y = view[1] + view[3] / 2) {
    show([x - (x - view[0]) / factor, y - (y - view[1]) / factor, view[2] / factor]);
  }

  const move = (right, down) => show([view[0] + right * view[2], view[1] + down * view[3], view[2]]);

  function step(by) {
    const shown = [...byId("cards").children].filter((card) => !card.hidden);
    const before = viewer.open ? current : document.activeElement.closest?.(".card");
    let i = shown.indexOf(before) + by;
    if (before === null || before === undefined) i = by > 0 ? 0 : shown.length - 1;
    if (viewer.open) {
      while (shown[i] && shown[i].dataset.detail !== "1") i += by;
      if (shown[i]) open(shown[i]);
    } else if (shown[i]) {
      const target = shown[i].querySelector(".enlarge") || shown[i];
      if (target === shown[i]) target.tabIndex = -1;
      target.focus({ preventScroll: true });
      shown[i].scrollIntoView({ block: "center" });
    }
  }

  const ACTIONS = {
    in: () => zoom(1.5), out: () => zoom(1 / 1.5), whole: () => show([0, 0, Infinity, Infinity]),
    previous: () => step(-1), next: () => step(1), close: () => viewer.close(),
  };
  viewer.addEventListener("click", (event) => ACTIONS[event.target.dataset.do]?.());
  viewer.addEventListener("close", () => {
    viewer.querySelector(".panels").replaceChildren();
    document.querySelector(".bar").prepend(byId("layers"));
    current?.querySelector(".enlarge").focus({ preventScroll: true });
  });
  byId("cards").addEventListener("click", (event) => {
    if (event.target.closest(".enlarge, .panel svg")) open(event.target.closest(".card"));
  });

  function pointOf(event, svg) {
    const at = new DOMPoint(event.clientX, event.clientY).matrixTransform(svg.getScreenCTM().inverse());
    return [at.x, at.y];
  }

  viewer.addEventListener("wheel", (event) => {
    const svg = event.target.closest(".panel svg");
    if (!svg) return;
    event.preventDefault();
    zoom(Math.exp(-event.deltaY / 400), ...pointOf(event, svg));
  }, { passive: false });

  let held = null;  // where the image is held while it is dragged
  viewer.addEventListener("pointerdown", (event) => {
    const svg = event.target.closest(".panel svg");
    if (svg) { held = pointOf(event, svg); svg.setPointerCapture(event.pointerId); event.preventDefault(); }
  });
  viewer.addEventListener("pointerup", () => { held = null; });
  viewer.addEventListener("pointermove", (event) => {
    const svg = event.target.closest(".panel svg");
    if (!svg) return;
    const [x, y] = pointOf(event, svg);
    if (held) show([view[0] + held[0] - x, view[1] + held[1] - y, view[2]]);
    else if (svg.dataset.model !== undefined) byId("readout").textContent = describe(Number(svg.dataset.model), x, y);
  });

  /* The name of the class of an instance with a comma, or nothing where it has none. */
  function classOf(model, i) {
    const index = model.classes.findIndex(({ found, false: wrong }) => found.includes(i) || wrong.includes(i));
    return index < 0 ? "" : `${byId("class").options[index + 1].textContent}, `;
  }

  /* The instance under the pointer in words. */
  function describe(m, x, y) {
    const model = detailOf(current).models[m];
    const i = outlines[m].findIndex((outline) => context.isPointInPath(outline, x, y, "evenodd"));
    if (i < 0) return "";
    const score = model.scores ? `score ${model.scores[i]}, ` : "";
    const merged = model.merged.includes(i) ? ", merged" : "";
    const kind = classOf(model, i);
    return `${MODELS[m]}: ${kind}${score}IoU ${model.iou[i]}, ${marksOf(model).found.includes(i) ? "found" : "false"}${merged}`;
  }

  // Keys
  const VIEWER_KEYS = {
    "+": ACTIONS.in, "=": ACTIONS.in, "-": ACTIONS.out, "0": ACTIONS.whole,
    ArrowLeft: () => move(-0.1, 0), ArrowRight: () => move(0.1, 0), ArrowUp: () => move(0, -0.1), ArrowDown: () => move(0, 0.1),
  };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches("select, input[type=search]")) return;
    const box = boxes.get(event.key);
    if (box) { box.checked = !box.checked; showLayer(box); }
    else if (event.key === "j") step(1);
    else if (event.key === "k") step(-1);
    else if (event.key === "/" && !viewer.open) byId("name").focus();
    else if (viewer.open && VIEWER_KEYS[event.key]) VIEWER_KEYS[event.key]();
    else return;
    event.preventDefault();
  });
})();
