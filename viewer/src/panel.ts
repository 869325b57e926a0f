// What is known of one node: where it is kept, and its edges in and out.

import { type Circuit, countKept, isKept, keptShare, type Node, nodeLabel, type Run, type View } from "./data";
import { count, el, percent } from "./dom";
import { attentionPanel } from "./pictures";

const MOST_EDGES = 8;

/** The circuits of a run over the same graph, with the names of their views. */
export function comparable(run: Run, circuit: Circuit): View[] {
  return run.views.filter((view) => view.circuit?.graph === circuit.graph);
}

/** Circuits that ACDC found under one ablation, one per tau. */
export function overTau(run: Run, circuit: Circuit): Circuit[] {
  const found = new Map<number, Circuit>();
  for (const { circuit: one } of run.views) {
    if (one && one.graph === circuit.graph && one.data.tau !== null && one.data.ablation === circuit.data.ablation) {
      found.set(one.data.tau, one);
    }
  }
  return circuit.data.tau === null ? [] : [...found.values()];
}

function edgeTable(
  run: Run, circuit: Circuit, node: Node, into: boolean, go: (node: Node) => void,
): HTMLElement {
  const { edges, useful } = circuit.graph;
  const taus = overTau(run, circuit);
  const numbers: number[] = [];
  edges.forEach((edge, number) => {
    if (useful[number] && (into ? edge.to : edge.from) === node) numbers.push(number);
  });
  const strength = (number: number) => {
    const value = circuit.strengths?.[number];
    return value === undefined || Number.isNaN(value) ? -Infinity : value;
  };
  numbers.sort((a, b) => circuit.kept[b] - circuit.kept[a] || strength(b) - strength(a));
  const kept = numbers.filter((number) => circuit.kept[number]).length;
  const rows = numbers.slice(0, MOST_EDGES).map((number) => {
    const edge = edges[number];
    const other = into ? edge.from : edge.to;
    const button = el("button", { type: "button", class: "link", title: nodeLabel(other) }, other.name);
    button.addEventListener("click", () => go(other));
    const cells: (string | HTMLElement)[] = [button, edge.letter === "classifier" ? "out" : edge.letter, circuit.kept[number] ? "kept" : "cut"];
    if (circuit.strengths) cells.push(strength(number) === -Infinity ? "-" : strength(number).toPrecision(2));
    if (taus.length > 1) cells.push(`${countKept(taus, number)} of ${taus.length}`);
    return el("tr", {}, ...cells.map((cell) => el("td", {}, cell)));
  });
  const headers = [into ? "from" : "to", "as", "", ...(circuit.strengths ? ["KL rise"] : []), ...(taus.length > 1 ? ["at taus"] : [])];
  return el(
    "table",
    { class: "edges" },
    el("caption", {}, `Edges ${into ? "in" : "out"}: ${count(kept)} of ${count(numbers.length)} kept`),
    el("thead", {}, el("tr", {}, ...headers.map((text) => el("th", { scope: "col" }, text)))),
    el("tbody", {}, ...rows),
  );
}

export function nodePanel(run: Run, view: View, node: Node, go: (node: Node) => void): HTMLElement[] {
  const circuit = view.circuit!;
  const views = comparable(run, circuit);
  const keptAt = views.filter((one) => isKept(one.circuit!, node));
  const state = isKept(circuit, node) ? "kept" : "cut";
  const facts = [el("p", {}, el("strong", { class: state }, state), ` at ${view.name}; kept at ${keptAt.length} of ${views.length} points`)];
  if (node.role === "mlp" && circuit.data.neurons) {
    const total = circuit.data.neurons.total;
    const share = keptShare(circuit, node);
    facts.push(el("p", {}, `${count(Math.round(share * total))} of ${count(total)} neurons kept (${percent(share)})`));
  }
  const list = el(
    "ul",
    { class: "points" },
    ...views.map((one) => {
      const on = isKept(one.circuit!, node);
      return el("li", { class: on ? "kept" : "cut" }, `${one.name}: ${on ? "kept" : "cut"}`);
    }),
  );
  const tables = [true, false]
    .filter((into) => (into ? node.role !== "embed" : node.role !== "classifier"))
    .map((into) => edgeTable(run, circuit, node, into, go));
  const note = circuit.strengths
    ? "KL rise: how much the mean KL, in nats, rose when ACDC cut the edge (or would have, had it stayed cut). Strongest first."
    : "This run holds no strength of single edges: kept edges come first.";
  return [el("h2", {}, nodeLabel(node)), ...facts, ...attentionPanel(run, node), ...tables, el("p", { class: "note" }, note), el("details", {}, el("summary", {}, "Kept at which points"), list)];
}
