import { expect, test } from "vitest";
import { type CircuitData, countKept, type GraphData, keptShare, parseName, readCircuit, readGraph, readRun, type Run, type RunData, unpackBits, verdict } from "../src/data";
import { fixed } from "../src/dom";
import { levels } from "../src/drop";
import { layOut } from "../src/layout";
import { attentionOf, samplesOf } from "../src/pictures";

/** A graph as Python numbers it: over whole tokens, or over two kinds of which one is read out. */
function graphOf(layers: number, heads: number, kinds: string[] = []): GraphData {
  const suffixes = kinds.length ? kinds.map((kind) => `.${kind}`) : [""];
  const split = (names: string[]) => names.flatMap((name) => suffixes.map((suffix) => name + suffix));
  const sources = ["embed"];
  const targets: string[] = [];
  const reads: [number, number][] = [];
  const add = (name: string) => suffixes.forEach((suffix, kind) => {
    targets.push(name + suffix);
    reads.push([kind, sources.length * suffixes.length]);
  });
  for (let layer = 0; layer < layers; layer++) {
    for (const letter of "qkv") for (let head = 0; head < heads; head++) add(`attn.${layer}.${head}.${letter}`);
    for (let head = 0; head < heads; head++) sources.push(`attn.${layer}.${head}`);
    add(`mlp.${layer}`);
    sources.push(`mlp.${layer}`);
  }
  targets.push(`classifier${suffixes[0]}`);
  reads.push([0, sources.length * suffixes.length]);
  return { layers, heads, kinds, sources: split(sources), targets, reads, step: suffixes.length, useful: ones(1e5) };
}

const ones = (bits: number) => btoa("\xff".repeat(Math.ceil(bits / 8)));

const circuitOf = (more: Partial<CircuitData> = {}): CircuitData => ({
  graph: 0, method: "acdc", ablation: "mean", tau: 0.01, fingerprint: "a", kept: ones(1e5), onPath: ones(1e3), neurons: null, positions: null, strengths: null, ...more,
});

test("bits are read from the highest of each byte on", () => {
  expect([...unpackBits(btoa("\xa0\x40"), 10)]).toEqual([1, 0, 1, 0, 0, 0, 0, 0, 0, 1]);
});

test("names of sources and targets lead to their node", () => {
  expect(parseName("attn.3.1.k.patch", ["cls", "patch"])).toMatchObject({ node: { name: "attn.3.1.patch", layer: 3, head: 1, kind: "patch" }, letter: "k" });
  expect(parseName("mlp.2", []).node.name).toBe("mlp.2");
  expect(parseName("classifier.cls", ["cls"]).node.role).toBe("classifier");
});

test("numbers are rounded as Python rounds them", () => {
  expect([18.25, 18.75, 0.65, 0.15, 0.25, -0.25].map((value) => fixed(value, 1))).toEqual(["18.2", "18.8", "0.7", "0.1", "0.2", "-0.2"]);
  expect([0.5, 1.5, 2.5].map((value) => fixed(value, 0))).toEqual(["0", "2", "2"]);
});

test("a graph has as many edges as Python counts", () => {
  expect(readGraph(graphOf(6, 8)).edges.length).toBe(3628);
  expect(readGraph(graphOf(12, 12)).edges.length).toBe(32491);
  expect(readGraph(graphOf(12, 3)).nodes.length).toBe(1 + 12 * 4 + 1);
});

test("boxes never overlap and stay in the picture", () => {
  for (const [layers, heads, kinds] of [[3, 4, []], [12, 12, ["cls", "patch"]], [12, 3, ["cls", "register", "patch"]]] as const) {
    for (const available of [320, 900, 1600]) {
      const { boxes, width, height } = layOut(readGraph(graphOf(layers, heads, [...kinds])), available);
      const all = [...boxes.values()];
      for (const [number, box] of all.entries()) {
        expect(box.x > 0 && box.x + box.width < width && box.y > 0 && box.y + box.height < height).toBe(true);
        for (const other of all.slice(number + 1)) {
          const apart = box.x + box.width < other.x || other.x + other.width < box.x || box.y + box.height < other.y || other.y + other.height < box.y;
          expect(apart).toBe(true);
        }
      }
    }
  }
});

test("a part is as bright as its share of the largest of its token kind", () => {
  const found = levels(["attn.0.0.cls", "mlp.0.cls", "attn.0.0.patch"], [1, 4, 2]);
  expect([...found.values()]).toEqual([0.25, 1, 1]);
  expect(levels(["attn.0.0", "mlp.0"], [1, 2]).get("attn.0.0")).toBe(0.5);
});

test("attention is found by picture, layer and head", () => {
  const values = btoa(String.fromCharCode(...Array.from({ length: 2 * 2 * 2 * 4 }, (_, at) => at)));
  const data = { asks: "class token", layers: 2, heads: 2, grid: 2, peaks: Array.from({ length: 8 }, (_, at) => at), values };
  expect(samplesOf(data)).toBe(2);
  const { levels: cells, peak } = attentionOf(data, 1, 0, 1);
  expect(cells.map((cell) => 255 * cell)).toEqual([20, 21, 22, 23]);
  expect(peak).toBe(5);
});

test("the page opens at the verdict, which may be a step, or at the smallest circuit", () => {
  const views = ["dense", "a", "b"].map((name) => ({ name, point: null, step: name === "a" ? { name: "macs-0.5" } : null, circuit: null }));
  const at = (name: string | null) => verdict({ data: { verdict: name }, graphs: [], views } as unknown as Run);
  expect([at("b"), at("macs-0.5"), at(null), at("gone")]).toEqual([2, 1, 2, 2]);
});

test("an MLP is as full as the share of its neurons, and empty off the path", () => {
  const graph = readGraph(graphOf(1, 1));
  const mlp = graph.nodes.find((node) => node.role === "mlp")!;
  const neurons = { total: 8, kept: [[2]] };
  expect(keptShare(readCircuit(circuitOf({ neurons }), [graph]), mlp)).toBe(0.25);
  expect(keptShare(readCircuit(circuitOf({ neurons, onPath: btoa("\0") }), [graph]), mlp)).toBe(0);
});

test("edges are counted over circuits, and steps that a point shows are left out", () => {
  const circuits = { found: circuitOf(), "macs-0.5": circuitOf(), "macs-0.8": circuitOf({ fingerprint: "b", kept: btoa("\0".repeat(99)) }) };
  const step = { macs: 1, macs_fraction: 0.5, accuracy_coarse: 1, kl: 0, heads_kept: 1, neurons_kept_fraction: 1, change_low: null, change_high: null };
  const results = { task: "t", machine: {}, dense: null, comparisons: [], points: [{ name: "found", macs: 1, latency: [] }] };
  const data = { graphs: [graphOf(1, 1)], circuits, results, steps: [{ ...step, name: "macs-0.5" }, { ...step, name: "macs-0.8", macs: 2 }] };
  const run = readRun(data as unknown as RunData);
  expect(run.views.map((view) => view.name)).toEqual(["macs-0.8", "found"]);
  expect(countKept(run.views.map((view) => view.circuit!), 0)).toBe(1);
});
