// What the page is given, and circuits decoded from it.

export interface Latency {
  runtime: string;
  device: string;
  dtype: string;
  batch: number;
  threads: number;
  median_ms: number;
  p10_ms: number;
  p90_ms: number;
  images_per_s: number;
}

export interface Point {
  name: string;
  method: string | null;
  granularity: string | null;
  ablation: string | null;
  tau: number | null;
  budget: Record<string, unknown> | null;
  edges_total: number | null;
  edges_kept: number | null;
  heads_total: number | null;
  heads_kept: number | null;
  neurons_kept_fraction: number | null;
  accuracy_fine: number | null;
  accuracy_coarse: number | null;
  change_low: number | null;
  change_high: number | null;
  kl: number | null;
  macs: number | null;
  params: number | null;
  bytes: number | null;
  max_abs_diff: number | null;
  seconds: number | null;
  images: number | null;
  latency: Latency[];
  confusion: number[][] | null;
  faithfulness: Faithfulness | null;
}

export interface Measured {
  ablation: string;
  kl: number;
}

export interface Faithfulness {
  discovery?: Measured | null;
  cut?: Measured | null;
}

export interface Comparison {
  point: string;
  against: string;
  runtime: string;
  batch: number;
  threads: number;
  ratio: number;
  low: number;
  high: number;
}

export interface Results {
  task: string;
  machine: Record<string, unknown>;
  dense: Point | null;
  points: Point[];
  comparisons: Comparison[];
}

export interface Step {
  name: string;
  macs: number;
  macs_fraction: number;
  accuracy_coarse: number;
  kl: number;
  heads_kept: number;
  neurons_kept_fraction: number;
  change_low: number | null;
  change_high: number | null;
}

export interface Pair {
  point: string;
  against: string;
  images: number;
  difference: number;
  low: number;
  high: number;
}

export interface GraphData {
  layers: number;
  heads: number;
  kinds: string[];
  sources: string[];
  targets: string[];
  reads: [number, number][];
  step: number;
  useful: string;
}

export interface CircuitData {
  graph: number;
  method: string;
  ablation: string;
  tau: number | null;
  fingerprint: string;
  kept: string;
  onPath: string;
  neurons: { total: number; kept: number[][] } | null;
  /** Which patches are kept, row by row; null if all are. */
  positions: { kept: string; total: number } | null;
  strengths: string | null;
}

export interface PictureData {
  /** WebP in base64. */
  image: string;
  group: number;
  /** The group that each of the points answers, and how sure it is. */
  answers: number[];
  probabilities: number[];
}

export interface AttentionData {
  asks: string;
  layers: number;
  heads: number;
  grid: number;
  peaks: number[];
  values: string;
}

export interface PicturesData {
  groups: string[];
  points: string[];
  changed: number[];
  gained: number[];
  lost: number[];
  pictures: PictureData[];
  attention: AttentionData | null;
}

/** The cut model that the page holds. */
export interface ModelData {
  point: string;
  /** Names of heads and MLPs, in the order of what they wrote. */
  parts: string[];
  groups: string[];
  /** Whether pictures are turned as their EXIF entry says. */
  turned: boolean;
}

export interface RunData {
  name: string;
  task: string | null;
  groups: string[];
  results: Results | null;
  headlines: Record<string, string>;
  recommended: string | null;
  /** The point or step at which the page opens. */
  verdict: string | null;
  steps: Step[];
  pairs: Pair[];
  pictures: PicturesData | null;
  graphs: GraphData[];
  circuits: Record<string, CircuitData>;
  settings: string | null;
  command: string | null;
}

export interface PageData {
  version: string;
  model: ModelData | null;
  runs: RunData[];
}

export const LETTERS = ["q", "k", "v", "mlp", "classifier"] as const;
export type Letter = (typeof LETTERS)[number];

/** A head, an MLP, the embedding or the classifier, of one token kind. */
export interface Node {
  name: string;
  role: "embed" | "head" | "mlp" | "classifier";
  layer: number;
  head: number;
  kind: string;
  /** Its number among the sources; -1 for the classifier. */
  source: number;
}

export interface Edge {
  source: number;
  target: number;
  from: Node;
  to: Node;
  letter: Letter;
}

export interface Graph {
  data: GraphData;
  nodes: Node[];
  edges: Edge[];
  useful: Uint8Array;
}

export interface Circuit {
  data: CircuitData;
  graph: Graph;
  /** 1 where an edge is kept and leads to the classifier. */
  kept: Uint8Array;
  onPath: Uint8Array;
  strengths: Float32Array | null;
  numKept: number;
}

function bytes(text: string): Uint8Array {
  return Uint8Array.from(atob(text), (letter) => letter.charCodeAt(0));
}

/** Bits as numpy's packbits writes them. */
export function unpackBits(text: string, count: number): Uint8Array {
  const packed = bytes(text);
  const found = new Uint8Array(count);
  for (let i = 0; i < count; i++) found[i] = (packed[i >> 3] >> (7 - (i & 7))) & 1;
  return found;
}

/** The node that a source or a target belongs to, and the letter under which it is read. */
export function parseName(name: string, kinds: string[]): { node: Omit<Node, "source">; letter: Letter } {
  const words = name.split(".");
  const kind = kinds.includes(words[words.length - 1]) ? words.pop()! : "";
  const [role] = words;
  const suffix = kind ? `.${kind}` : "";
  if (role === "attn") {
    const letter = (words[3] ?? "q") as Letter;
    const own = `attn.${words[1]}.${words[2]}${suffix}`;
    return { node: { name: own, role: "head", layer: +words[1], head: +words[2], kind }, letter };
  }
  if (role === "mlp") {
    return { node: { name, role: "mlp", layer: +words[1], head: -1, kind }, letter: "mlp" };
  }
  const last = role === "classifier";
  return {
    node: { name, role: last ? "classifier" : "embed", layer: last ? Infinity : -1, head: -1, kind },
    letter: "classifier",
  };
}

export function readGraph(data: GraphData): Graph {
  const nodes: Node[] = data.sources.map((name, source) => ({ ...parseName(name, data.kinds).node, source }));
  const byName = new Map(nodes.map((node) => [node.name, node]));
  const edges: Edge[] = [];
  data.targets.forEach((name, target) => {
    const { node, letter } = parseName(name, data.kinds);
    let to = byName.get(node.name);
    if (!to) {
      to = { ...node, source: -1 };
      byName.set(node.name, to);
      nodes.push(to);
    }
    const [first, end] = data.reads[target];
    for (let source = first; source < end; source += data.step) {
      edges.push({ source, target, from: nodes[source], to, letter });
    }
  });
  return { data, nodes, edges, useful: unpackBits(data.useful, edges.length) };
}

export function readCircuit(data: CircuitData, graphs: Graph[]): Circuit {
  const graph = graphs[data.graph];
  const kept = unpackBits(data.kept, graph.edges.length);
  let numKept = 0;
  for (let i = 0; i < kept.length; i++) numKept += kept[i] &= graph.useful[i];
  return {
    data,
    graph,
    kept,
    numKept,
    onPath: unpackBits(data.onPath, graph.data.sources.length),
    strengths: data.strengths ? new Float32Array(bytes(data.strengths).buffer) : null,
  };
}

/** One position of the slider: a point of the results, or a step on the way to a budget. */
export interface View {
  name: string;
  point: Point | null;
  step: Step | null;
  circuit: Circuit | null;
}

export interface Run {
  data: RunData;
  graphs: Graph[];
  views: View[];
}

function size(view: View): number {
  return view.point?.macs ?? view.step?.macs ?? view.circuit?.numKept ?? 0;
}

/** Decodes a run. Views go from the dense model to the smallest; a step is shown once. */
export function readRun(data: RunData): Run {
  const graphs = data.graphs.map(readGraph);
  const circuits = new Map(Object.entries(data.circuits).map(([name, one]) => [name, readCircuit(one, graphs)]));
  const { results } = data;
  const points = results ? [...(results.dense ? [results.dense] : []), ...results.points] : [];
  const views: View[] = points.map((point) => {
    return { name: point.name, point, step: null, circuit: circuits.get(point.name) ?? null };
  });
  const shown = new Map(views.map((view) => [view.circuit?.data.fingerprint, view]));
  const isStep = (name: string) => data.steps.some((one) => one.name === name);
  for (const [name, circuit] of [...circuits].sort((a, b) => +isStep(a[0]) - +isStep(b[0]))) {
    const step = data.steps.find((one) => one.name === name) ?? null;
    const twin = shown.get(circuit.data.fingerprint);
    if (step && twin) twin.step ??= step;
    else if (!points.some((point) => point.name === name)) {
      const view = { name, point: null, step, circuit };
      views.push(view);
      shown.set(circuit.data.fingerprint, view);
    }
  }
  const rank = (view: View) => ["dense", "class-only", "dense-repaired"].indexOf(view.name) + 1 || 9;
  views.sort((a, b) => rank(a) - rank(b) || size(b) - size(a));
  return { data, graphs, views };
}

/** Where the page opens: at the best trade, or at the smallest circuit if nothing was measured. */
export function verdict({ data, views }: Run): number {
  const at = views.findIndex((view) => data.verdict !== null && (view.name === data.verdict || view.step?.name === data.verdict));
  return at < 0 ? views.length - 1 : at;
}

/** At how many of some circuits an edge is kept. */
export function countKept(circuits: Circuit[], edge: number): number {
  return circuits.reduce((sum, circuit) => sum + circuit.kept[edge], 0);
}

/** Whether a node takes part in a circuit. */
export function isKept(circuit: Circuit, node: Node): boolean {
  return node.source < 0 || circuit.onPath[node.source] === 1;
}

/** The share of an MLP's neurons that are kept; 1 for what has none. */
export function keptShare(circuit: Circuit, node: Node): number {
  if (!isKept(circuit, node)) return 0;
  const { neurons } = circuit.data;
  if (node.role !== "mlp" || !neurons) return 1;
  const kind = Math.max(0, circuit.graph.data.kinds.indexOf(node.kind));
  return neurons.kept[node.layer][kind] / neurons.total;
}

const KINDS: Record<string, string> = { cls: "class token", register: "register tokens", patch: "patches" };

export function kindLabel(kind: string): string {
  return KINDS[kind] ?? "all tokens";
}

export function nodeLabel(node: Node): string {
  const of = node.kind ? `, ${kindLabel(node.kind)}` : "";
  if (node.role === "head") return `Head ${node.head} of block ${node.layer}${of}`;
  if (node.role === "mlp") return `MLP of block ${node.layer}${of}`;
  return `${node.role === "embed" ? "Patch embedding" : "Classifier"}${of}`;
}
