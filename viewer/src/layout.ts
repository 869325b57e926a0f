// Where the nodes of a graph stand: half a block per column, heads below each other, MLPs beneath.

import type { Edge, Graph, Node } from "./data";

export interface Box {
  x: number;
  y: number;
  width: number;
  height: number;
}

export interface Layout {
  width: number;
  height: number;
  boxes: Map<Node, Box>;
  /** The middle of each block, for its label. */
  blocks: { layer: number; x: number }[];
  bands: { kind: string; top: number; bottom: number }[];
}

const LEFT = 78;
const RIGHT = 12;
const TOP = 26;
const GAP = 26;
const NARROWEST = 30;

export function layOut(graph: Graph, available: number): Layout {
  const { layers, heads } = graph.data;
  const kinds = graph.data.kinds.length ? graph.data.kinds : [""];
  const columns = 2 * layers + 2;
  const column = Math.max(NARROWEST, (available - LEFT - RIGHT) / columns);
  const row = Math.max(20, Math.min(44, 400 / (kinds.length * (heads + 1))));
  const bandHeight = (heads + 1) * row + 8;
  const width = LEFT + columns * column + RIGHT;
  const boxWidth = Math.min(40, column * 0.62);
  const boxes = new Map<Node, Box>();
  for (const node of graph.nodes) {
    const band = Math.max(0, kinds.indexOf(node.kind));
    const top = TOP + band * (bandHeight + GAP);
    const place = node.role === "embed" ? 0 : node.role === "classifier" ? columns - 1 : 1 + 2 * node.layer;
    const number = place + (node.role === "mlp" ? 1 : 0);
    const middle = { embed: (heads + 1) / 2, classifier: (heads + 1) / 2, head: node.head + 0.5, mlp: heads + 0.8 };
    const tall = node.role === "embed" || node.role === "classifier" ? 48 : Math.min(22, row - 6);
    boxes.set(node, {
      x: LEFT + (number + 0.5) * column - boxWidth / 2,
      y: top + middle[node.role] * row - tall / 2,
      width: boxWidth,
      height: tall,
    });
  }
  return {
    width,
    height: TOP + kinds.length * (bandHeight + GAP) - GAP + 22,
    boxes,
    blocks: Array.from({ length: layers }, (_, layer) => ({ layer, x: LEFT + (2 + 2 * layer) * column })),
    bands: kinds.map((kind, band) => {
      const top = TOP + band * (bandHeight + GAP);
      return { kind, top, bottom: top + bandHeight };
    }),
  };
}

const OFFSETS: Record<string, number> = { q: -4.5, k: 0, v: 4.5, mlp: 0, classifier: 0 };

/** Adds an edge to a path: from the right of its source to the left of its target. */
export function trace(path: Path2D, edge: Edge, layout: Layout): void {
  const from = layout.boxes.get(edge.from)!;
  const to = layout.boxes.get(edge.to)!;
  const x0 = from.x + from.width;
  const y0 = from.y + from.height / 2;
  const y1 = to.y + to.height / 2 + OFFSETS[edge.letter];
  const bend = Math.max(6, (to.x - x0) * 0.45);
  path.moveTo(x0, y0);
  path.bezierCurveTo(x0 + bend, y0, to.x - bend, y1, to.x, y1);
}
