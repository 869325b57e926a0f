// Assembles the page: one state, and an update of everything that depends on it.

import { accuracyChart, confusionTable, interval, keyOf, SHAPE_NAMES, latencyOf, tauChart, type Timing, timingLabel, timings } from "./charts";
import { CircuitPicture, type Filters } from "./circuit";
import { type Graph, kindLabel, LETTERS, type Letter, type Node as Part, nodeLabel, type PageData, readRun, type Run, verdict, type View } from "./data";
import { type Child, choice, count, el, ms, percent, save, short, signed, table } from "./dom";
import { dropZone } from "./drop";
import { nodePanel } from "./panel";
import { pictureSection, positionSection } from "./pictures";

const page: PageData = JSON.parse(document.getElementById("data")!.textContent!);
const runs: Run[] = page.runs.map(readRun);
const known = timings(runs);
const state = {
  run: 0,
  view: 0,
  node: null as Part | null,
  timing: (known[0] ?? null) as Timing | null,
  lit: null as Map<string, number> | null,
  filters: { letters: new Set<Letter>(LETTERS), kinds: new Set(["cls", "register", "patch"]), found: new Set<Part>() } as Filters,
};

const root = document.getElementById("page")!;
const title = el("h1", { "aria-live": "polite" });
const eyebrow = el("p", { class: "eyebrow" });
const slider = el("input", { type: "range", min: "0", step: "1", id: "point", "aria-label": "point" });
const viewName = el("output", { for: "point", id: "view" });
const facts = el("dl", { class: "facts", id: "facts" });
const panel = el("aside", { id: "panel", "aria-label": "node" });
const shown = el("p", { class: "note", id: "shown" });
const search = el("input", { type: "search", id: "search", placeholder: "attn.0.1, mlp.2", "aria-label": "find a node", autocomplete: "off" });
const accuracy = el("div", { class: "chart", id: "accuracy" });
const taus = el("div", { class: "charts", id: "taus" });
const confusions = el("div", { class: "charts", id: "confusions" });
const tables = el("div", { id: "tables" });
const pictures = el("div", { id: "pictures" });
const positions = el("div");
const about = el("div", { id: "about" });
const filterBox = el("div", { class: "filters" });
const picture = new CircuitPicture((node) => choose(node));

const run = (): Run => runs[state.run];
const view = (): View => run().views[state.view];

function sentence(run: Run, view: View): string {
  const { headlines } = run.data;
  if (view.name in headlines) return headlines[view.name].slice(view.name.length + 2);
  if (view.step) {
    const { macs_fraction, accuracy_coarse } = view.step;
    return `${view.name === view.step.name ? "On the way to a budget: " : ""}${percent(macs_fraction, 0)} of the MACs, ${percent(accuracy_coarse)} coarse accuracy on val images`;
  }
  if (view.name === "dense") return "The dense model, before anything is cut";
  if (view.name === "class-only") return "Nothing cut, but compiled: the last block computes what is read alone";
  return view.circuit ? `A circuit of ${count(view.circuit.numKept)} edges` : view.name;
}

/** Number by number what is known of a view; `of` is what it is compared with. */
function factsOf(run: Run, view: View): [string, string, string][] {
  const found: [string, string, string][] = [];
  const { point, step, circuit } = view;
  const results = run.data.results;
  const dense = results?.dense;
  const add = (name: string, value: string, of = "") => found.push([name, value, of]);
  if (point) {
    const share = dense?.macs && point.macs !== null ? `${percent(point.macs / dense.macs, 0)} of dense` : "";
    add("MACs", short(point.macs), share);
    const latency = latencyOf(point, state.timing);
    const against = results!.comparisons.find((one) => one.point === point.name && one.against === "dense" && one.runtime === state.timing?.runtime && one.batch === state.timing?.batch);
    const ratio = against ? `${against.ratio.toFixed(2)}x as fast (${against.low.toFixed(2)} to ${against.high.toFixed(2)})` : "";
    if (latency) add("latency", `${ms(latency.median_ms)} ms`, ratio || `p10 ${ms(latency.p10_ms)}, p90 ${ms(latency.p90_ms)}`);
    const change = dense && dense.accuracy_coarse !== null && point.accuracy_coarse !== null && point !== dense;
    add("coarse accuracy", percent(point.accuracy_coarse), change ? `${signed(point.accuracy_coarse! - dense.accuracy_coarse!)} points (${interval(point) || "no interval"})` : point.images ? `${count(point.images)} test images` : "");
    if (point.accuracy_fine !== null) add("fine accuracy", percent(point.accuracy_fine));
    if (point.kl !== null) add("KL from dense", `${point.kl.toFixed(4)}`, "nats");
    if (point.edges_kept !== null) add("edges kept", count(point.edges_kept), `of ${count(point.edges_total)}`);
    if (point.heads_kept !== null) add("heads kept", count(point.heads_kept), `of ${count(point.heads_total)}`);
    if (point.neurons_kept_fraction !== null) add("neurons kept", percent(point.neurons_kept_fraction));
    add("parameters", short(point.params));
    if (point.max_abs_diff !== null) add("difference", point.max_abs_diff.toExponential(1), "of compact to masked");
  } else if (step) {
    add("MACs", short(step.macs), `${percent(step.macs_fraction, 0)} of dense`);
    const change = step.change_low === null ? "" : `: change ${signed(step.change_low)} to ${signed(step.change_high!)} points`;
    add("coarse accuracy", percent(step.accuracy_coarse), `on val images${change}`);
    add("KL from dense", step.kl.toFixed(4), "nats");
    add("heads kept", count(step.heads_kept));
    add("neurons kept", percent(step.neurons_kept_fraction));
  } else if (circuit) {
    add("edges kept", count(circuit.numKept), `of ${count(circuit.graph.useful.reduce((a, b) => a + b, 0))}`);
  }
  return found;
}

/** Everything that changes with the point in view. */
function update(): void {
  const here = view();
  slider.value = String(state.view);
  slider.setAttribute("aria-valuetext", here.name);
  viewName.textContent = `${here.name} (${state.view + 1} of ${run().views.length})`;
  title.textContent = sentence(run(), here);
  facts.replaceChildren(...factsOf(run(), here).map(([name, value, of]) => el("div", {}, el("dt", {}, name), el("dd", {}, value, of ? el("small", {}, of) : null))));
  drawCircuit();
  fill(positions, positionSection(run(), here));
  fill(pictures, pictureSection(run(), here));
  markCurrent();
  drawConfusions();
  for (const row of tables.querySelectorAll("tbody tr")) row.classList.toggle("current", row.firstChild!.textContent === here.name);
}

/** Puts things into their section, which is left out if there are none. */
function fill(place: HTMLElement, parts: (Element | null)[]): void {
  const there = parts.filter((part) => part !== null);
  place.replaceChildren(...there);
  (place.closest("section") as HTMLElement).hidden = !there.length;
}

function drawCircuit(): void {
  const { circuit } = view();
  picture.root.hidden = filterBox.hidden = panel.hidden = !circuit;
  (panel.parentElement as HTMLElement).hidden = !run().views.some((one) => one.circuit);
  if (!circuit) {
    shown.textContent = "No circuit of this point is in the run directory.";
    return;
  }
  if (state.node && !circuit.graph.nodes.includes(state.node)) {
    state.node = circuit.graph.nodes.find((node) => node.name === state.node!.name) ?? null;
  }
  drawFilters(circuit.graph);
  const lit = view().name === page.model?.point ? state.lit : null;
  picture.root.classList.toggle("lit", lit !== null);
  picture.draw(circuit, state.node, state.filters, lit);
  shown.textContent = `${count(circuit.numKept)} of ${count(circuit.graph.useful.reduce((a, b) => a + b, 0))} edges that can reach the classifier are kept. A filled box is kept, as high as the share of its neurons; an empty one is cut.${circuit.graph.data.kinds.length ? " Heads of each token kind read the keys and values of all kinds, so edges also lead into empty boxes." : ""}`;
  if (state.node) {
    const close = el("button", { type: "button", class: "close", "aria-label": "close" }, "\u00d7");
    close.addEventListener("click", () => choose(null));
    panel.replaceChildren(close, ...nodePanel(run(), view(), state.node, (node) => choose(node)));
    const wrote = lit?.get(state.node.name);
    if (wrote !== undefined) panel.querySelector("p")!.after(el("p", {}, `wrote ${percent(wrote, 0)} of the most that a part of its row wrote for your picture`));
  } else {
    panel.replaceChildren(el("h2", {}, "A node"), el("p", {}, "Click a head, an MLP, in or out, or move there with the keyboard: its edges, and the points that keep it."));
  }
}

function drawAccuracy(): void {
  if (!state.timing) return;
  const pick = (number: number, name: string) => show(number, runs[number].views.findIndex((one) => one.name === name));
  accuracy.replaceChildren(accuracyChart(runs, state.timing, keyOf(state.run, view().name), accuracy.clientWidth || 640, pick));
}

function drawTaus(): void {
  const points = run().data.results?.points ?? [];
  const width = Math.min(520, (taus.clientWidth || 1000) / (taus.clientWidth > 760 ? 2 : 1) - 16);
  const edges = (one: (typeof points)[number]) => (one.edges_kept === null ? null : one.edges_kept / one.edges_total!);
  fill(taus, [
    tauChart(state.run, points, (one) => one.accuracy_coarse, "coarse accuracy, %", width, false),
    tauChart(state.run, points, edges, "edges kept, % (from 0)", width, true),
  ]);
}

function markCurrent(): void {
  const key = keyOf(state.run, view().name);
  for (const item of root.querySelectorAll<SVGElement>("[data-key]")) item.classList.toggle("current", item.dataset.key === key);
}

function drawConfusions(): void {
  const dense = run().data.results?.dense;
  const { point } = view();
  fill(confusions, [dense, point === dense ? null : point].map((one) => (one?.confusion ? confusionTable(`${one.name}: images by group and answer`, run().data.groups, one.confusion) : null)));
}

let filtersOf: Graph | null = null;

function drawFilters(graph: Graph): void {
  if (graph === filtersOf) return;
  filtersOf = graph;
  const toggle = <T extends string>(value: T, label: string, chosen: Set<T>, className = "") => {
    const box = el("input", { type: "checkbox" });
    box.checked = chosen.has(value);
    box.addEventListener("change", () => {
      if (box.checked) chosen.add(value);
      else chosen.delete(value);
      drawCircuit();
    });
    return el("label", { class: className }, box, ` ${label}`);
  };
  const names: Record<Letter, string> = { q: "queries", k: "keys", v: "values", mlp: "MLP", classifier: "classifier" };
  const download = el("button", { type: "button" }, "Save SVG");
  download.addEventListener("click", () => save(`circuit-${view().name}.svg`, new Blob([picture.toSvg(view().circuit!)], { type: "image/svg+xml" })));
  filterBox.replaceChildren(
    ...LETTERS.map((letter) => toggle(letter, names[letter], state.filters.letters, `letter ${letter}`)),
    ...graph.data.kinds.map((kind) => toggle(kind, kindLabel(kind), state.filters.kinds)),
    el("label", {}, "find ", search),
    download,
  );
}

function drawTables(): void {
  const { results, pairs, recommended } = run().data;
  const parts: HTMLElement[] = [];
  if (results) {
    const dense = results.dense;
    const all = [...(dense ? [dense] : []), ...results.points];
    const rows: Child[][] = all.map((point) => {
      const latency = latencyOf(point, state.timing);
      return [
        point.name, percent(point.accuracy_coarse), interval(point) || "-", point.kl === null ? "-" : point.kl.toFixed(3), short(point.macs), short(point.params),
        latency ? ms(latency.median_ms) : "-", latency ? `${ms(latency.p10_ms)} to ${ms(latency.p90_ms)}` : "-",
      ];
    });
    const time = state.timing ? timingLabel(state.timing) : "not timed";
    parts.push(table("All points, on the test images", ["point", "coarse accuracy", "change, points (95 %)", "KL, nats", "MACs", "parameters", `ms, ${time}`, "p10 to p90"], rows));
    const opened = run().views[verdict(run())].name;
    parts.push(el("p", { class: "note" }, `The page opens at ${opened}: the smallest cut whose accuracy is within its interval of dense, or else the most accurate one.${recommended && recommended !== opened ? ` vitcut itself takes ${recommended}: the smallest that loses at most one point for certain, or else the most accurate.` : ""}`));
    const faithful = all.filter((point) => point.faithfulness?.discovery || point.faithfulness?.cut);
    if (faithful.length) {
      const cell = (one?: { ablation: string; kl: number } | null) => (one ? `${one.kl.toFixed(4)} (${one.ablation})` : "-");
      parts.push(table("Faithfulness: mean KL on the images of the search, in nats", ["point", "as found", "as cut"], faithful.map((point) => [point.name, cell(point.faithfulness!.discovery), cell(point.faithfulness!.cut)])));
    }
  }
  if (pairs.length) parts.push(table("After the repair, image by image", ["point", "against", "difference, points (95 %)", "images"], pairs.map((pair) => [pair.point, pair.against, `${signed(pair.difference)} (${signed(pair.low)} to ${signed(pair.high)})`, count(pair.images)])));
  if (runs.length > 1) {
    const rows = runs.map(({ data }): Child[] => {
      const best = data.results?.points.find((point) => point.name === data.recommended);
      return [data.name, data.task ?? "-", best?.name ?? "-", best ? data.headlines[best.name].slice(best.name.length + 2) : "-"];
    });
    const sides = table("The runs side by side: the point that each recommends", ["run", "task", "point", "what it came to"], rows);
    sides.className = "words";
    parts.unshift(sides);
  }
  fill(tables, parts.map((part) => el("div", { class: "scroll" }, part)));
}

function drawAbout(): void {
  const { results, command, settings } = run().data;
  const machine = results?.machine ?? {};
  const flat = Object.entries(machine).flatMap(([name, value]): [string, string][] =>
    value && typeof value === "object" && !Array.isArray(value)
      ? Object.entries(value).map(([key, one]): [string, string] => [key, String(one ?? "not installed")])
      : [[name.replaceAll("_", " "), Array.isArray(value) ? value.join(" ") : String(value ?? "none")]],
  );
  const missing: string[] = [];
  if (!results) missing.push("accuracies and latencies: nothing was measured");
  if (run().views.some((one) => !one.circuit)) missing.push("the circuits of " + run().views.filter((one) => !one.circuit).map((one) => one.name).join(", "));
  if (!run().views.some((one) => one.circuit?.strengths)) missing.push("how strong single edges are: no edges were tested one by one");
  if (!run().data.pictures) missing.push("sample pictures, and what heads attend to on them");
  const lacks = missing.length ? [el("h2", {}, "What this page does not hold"), el("ul", {}, ...missing.map((text) => el("li", {}, text)))] : [];
  about.replaceChildren(
    ...(flat.length ? [el("section", {}, el("h2", {}, "The machine"), table("Where it was measured", ["", ""], flat))] : []),
    el(
      "section",
      {},
      el("h2", {}, "To make it again"),
      command ? el("pre", {}, command) : el("p", {}, "The directory does not say how it was made."),
      settings ? el("details", {}, el("summary", {}, "All settings of the run"), el("pre", {}, settings)) : null,
      ...lacks,
    ),
  );
}

/** Shows what each part wrote on a picture, at the point whose model the page holds. */
function light(written: Map<string, number> | null): void {
  state.lit = written;
  const at = run().views.findIndex((one) => one.name === page.model!.point);
  if (written && at >= 0) show(state.run, at);
  else drawCircuit();
}

function choose(node: Part | null): void {
  state.node = node;
  drawCircuit();
  if (node) picture.focus(node);
}

function show(number: number, position: number): void {
  const other = number !== state.run;
  [state.run, state.view] = [number, Math.max(0, position)];
  if (other) drawRun();
  else update();
}

function drawRun(): void {
  const { data, views } = run();
  slider.max = String(views.length - 1);
  eyebrow.textContent = `${data.name}, task ${data.task ?? "unknown"}`;
  drawTables();
  drawAbout();
  drawAccuracy();
  drawTaus();
  update();
}

function step(by: number): void {
  show(state.run, Math.min(run().views.length - 1, Math.max(0, state.view + by)));
}

function find(text: string): void {
  const { circuit } = view();
  const wanted = text.trim().toLowerCase();
  const matches = (node: Part) => node.name.includes(wanted) || nodeLabel(node).toLowerCase().includes(wanted);
  state.filters.found = new Set(wanted && circuit ? circuit.graph.nodes.filter(matches) : []);
  drawCircuit();
}

function build(): void {
  const button = (text: string, label: string, by: number) => {
    const made = el("button", { type: "button", "aria-label": label }, text);
    made.addEventListener("click", () => step(by));
    return made;
  };
  slider.addEventListener("input", () => show(state.run, Number(slider.value)));
  search.addEventListener("input", () => find(search.value));
  search.addEventListener("keydown", (event) => {
    const [first] = state.filters.found;
    if (event.key === "Enter" && first) choose(first);
  });
  const pickers: Child[] = [];
  if (runs.length > 1) {
    const names = runs.map((one, number) => `${number + 1}. ${one.data.name}`);
    pickers.push(choice("run", names, names[0], (name) => show(names.indexOf(name), verdict(runs[names.indexOf(name)]))));
  }
  if (known.length > 1) {
    pickers.push(
      choice("times of", known.map(timingLabel), timingLabel(known[0]), (label) => {
        state.timing = known.find((one) => timingLabel(one) === label)!;
        drawTables();
        drawAccuracy();
        update();
      }),
    );
  }
  const parts: Child[] = [
    el("header", {}, eyebrow, title),
    el("div", { class: "bar" }, button("\u2190", "larger point", -1), slider, button("\u2192", "smaller point", 1), viewName, ...pickers),
    facts,
    page.model && dropZone(page.model, light),
    el("section", { class: "main" }, el("figure", {}, filterBox, picture.root, el("figcaption", {}, shown)), panel),
    el("section", {}, el("h2", {}, "Kept patches"), positions),
    el("section", {}, el("h2", {}, "Test images"), pictures),
    ...(known.length ? [el("section", {}, el("h2", {}, "Accuracy against latency"), accuracy, el("p", { class: "note" }, "Upright lines: 95 % paired interval of the change against the dense model. Level lines: p10 to p90 of the latency. The point in view is filled; click another to go there." + (runs.length > 1 ? ` ${runs.map((one, number) => `${SHAPE_NAMES[number % SHAPE_NAMES.length]}: ${one.data.name}`).join("; ")}.` : "")))] : []),
    el("section", {}, el("h2", {}, "Over tau"), taus),
    el("section", {}, el("h2", {}, "Which images are taken for what"), confusions),
    el("section", {}, el("h2", {}, "Numbers"), tables),
    el("div", { class: "two" }, about),
    el("footer", {}, `Made by vitcut ${page.version}. Keys: \u2190 \u2192 another point, / find a node, Tab into the picture and arrows from node to node, Enter opens, Escape closes.`),
  ];
  root.replaceChildren(...parts.filter((part) => part !== null && part !== false));
  document.addEventListener("keydown", (event) => {
    const typing = event.target instanceof HTMLInputElement || event.target instanceof HTMLSelectElement;
    if (event.key === "Escape") choose(null);
    if (typing || event.ctrlKey || event.metaKey || event.altKey) return;
    if (event.key === "ArrowLeft") step(-1);
    if (event.key === "ArrowRight") step(1);
    if (event.key === "/") {
      event.preventDefault();
      search.focus();
    }
  });
  let wait = 0;
  window.addEventListener("resize", () => {
    window.clearTimeout(wait);
    wait = window.setTimeout(() => (drawAccuracy(), drawTaus(), update()), 100);
  });
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", update);
  state.view = verdict(runs[0]);
  drawRun();
}

build();
