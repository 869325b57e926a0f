// The picture of a circuit: edges on a canvas, nodes above it as SVG that can be focused.

import { create, select, type Selection } from "d3-selection";
import { type Circuit, type Edge, type Graph, isKept, keptShare, kindLabel, LETTERS, type Letter, type Node, nodeLabel } from "./data";
import { el } from "./dom";
import { type Layout, layOut, trace } from "./layout";

export interface Filters {
  letters: Set<Letter>;
  kinds: Set<string>;
  found: Set<Node>;
}

const FAINT = 0.07;

/** Opacity at which many edges stay apart and few stay visible. */
function opacity(edges: number): number {
  return Math.max(0.03, Math.min(0.85, (13 / Math.sqrt(edges + 1)) * Math.min(1, 4000 / edges)));
}

export class CircuitPicture {
  readonly root: HTMLElement;
  private readonly canvas = el("canvas", { "aria-hidden": "true" });
  private readonly svg = create("svg").attr("role", "group").attr("aria-label", "circuit");
  private readonly stage = el("div", { class: "stage" }, this.canvas);
  private graph: Graph | null = null;
  private layout: Layout | null = null;
  private boxes: Selection<SVGGElement, Node, SVGSVGElement, undefined> | null = null;
  private available = 0;

  constructor(private readonly chosen: (node: Node | null) => void) {
    this.stage.append(this.svg.node()!);
    this.root = el("div", { class: "circuit" }, this.stage);
  }

  /** `lit` says how much each part wrote, from 0 to 1, where a picture was classified. */
  draw(circuit: Circuit, node: Node | null, filters: Filters, lit: Map<string, number> | null = null): void {
    const available = this.root.clientWidth || 900;
    if (circuit.graph !== this.graph || available !== this.available) {
      this.available = available;
      this.place(circuit.graph, available);
    }
    this.drawEdges(circuit, node, filters);
    // A part that is the same for every picture is in none of the outputs: it stays dark.
    const light = (one: Node) => lit?.get(one.name) ?? (one.role === "head" || one.role === "mlp" ? 0 : 1);
    this.boxes!
      .classed("kept", (one) => isKept(circuit, one))
      .classed("chosen", (one) => one === node)
      .classed("hidden", (one) => one.kind !== "" && !filters.kinds.has(one.kind))
      .classed("found", (one) => filters.found.has(one))
      .classed("dim", (one) => lit !== null && light(one) < 0.6)
      .attr("aria-label", (one) => `${nodeLabel(one)}, ${isKept(circuit, one) ? "kept" : "cut"}`)
      .select<SVGRectElement>("rect.fill")
      .attr("fill-opacity", (one) => (lit ? light(one) : null))
      .attr("y", (one) => this.box(one).y + this.box(one).height * (1 - (lit ? 1 : this.level(circuit, one))))
      .attr("height", (one) => this.box(one).height * (lit ? 1 : this.level(circuit, one)));
  }

  /** A whole pixel at least, so that an MLP with few neurons does not look cut. */
  private level(circuit: Circuit, node: Node): number {
    const share = keptShare(circuit, node);
    return share > 0 ? Math.max(share, 2 / this.box(node).height) : 0;
  }

  private box(node: Node) {
    return this.layout!.boxes.get(node)!;
  }

  private place(graph: Graph, available: number): void {
    this.graph = graph;
    const layout = (this.layout = layOut(graph, available));
    const scale = window.devicePixelRatio || 1;
    this.canvas.width = Math.round(layout.width * scale);
    this.canvas.height = Math.round(layout.height * scale);
    this.canvas.style.width = `${layout.width}px`;
    this.canvas.style.height = `${layout.height}px`;
    this.stage.style.width = `${layout.width}px`;
    this.svg.attr("width", layout.width).attr("height", layout.height).selectAll("*").remove();
    const svg = this.svg as unknown as Selection<SVGSVGElement, undefined, null, undefined>;
    const bands = svg.append("g").attr("class", "bands").selectAll("g").data(layout.bands).join("g");
    bands
      .append("rect")
      .attr("x", 0.5)
      .attr("y", (band) => band.top)
      .attr("width", layout.width - 1)
      .attr("height", (band) => band.bottom - band.top)
      .attr("rx", 6);
    const words = layout.bands.map((band) => kindLabel(band.kind).split(" "));
    bands
      .selectAll("text")
      .data((band, number) => words[number].map((text, line) => ({ text, y: (band.top + band.bottom) / 2 + 15 * (line - (words[number].length - 1) / 2) })))
      .join("text")
      .attr("x", 10)
      .attr("y", (line) => line.y)
      .attr("dy", "0.35em")
      .text((line) => line.text);
    svg
      .append("g")
      .attr("class", "blocks")
      .selectAll("text")
      .data(layout.blocks)
      .join("text")
      .attr("x", (block) => block.x)
      .attr("y", 15)
      .text((block) => (layout.width / layout.blocks.length > 80 ? `block ${block.layer}` : block.layer));
    const boxes = svg
      .append("g")
      .selectAll<SVGGElement, Node>("g")
      .data(graph.nodes)
      .join("g")
      .attr("class", (node) => `node ${node.role}`)
      .attr("tabindex", (_, number) => (number ? -1 : 0))
      .attr("role", "button")
      .on("click", (_, node) => this.chosen(node))
      .on("keydown", (event: KeyboardEvent, node) => this.pressed(event, node));
    for (const name of ["frame", "fill"]) {
      boxes
        .append("rect")
        .attr("class", name)
        .attr("x", (node) => layout.boxes.get(node)!.x)
        .attr("y", (node) => layout.boxes.get(node)!.y)
        .attr("width", (node) => layout.boxes.get(node)!.width)
        .attr("height", (node) => layout.boxes.get(node)!.height)
        .attr("rx", 3);
    }
    boxes
      .append("text")
      .attr("x", (node) => layout.boxes.get(node)!.x + layout.boxes.get(node)!.width / 2)
      .attr("y", (node) => layout.boxes.get(node)!.y + layout.boxes.get(node)!.height / 2)
      .attr("dy", "0.36em")
      .text((node) => ({ head: String(node.head), mlp: layout.boxes.get(node)!.width < 26 ? "m" : "mlp", embed: "in", classifier: "out" })[node.role]);
    boxes.append("title").text(nodeLabel);
    this.boxes = boxes as never;
    this.svg.on("click", (event: MouseEvent) => {
      if (event.target === this.svg.node() || (event.target as Element).closest(".bands")) this.chosen(null);
    });
  }

  private drawEdges(circuit: Circuit, node: Node | null, filters: Filters): void {
    const { canvas, layout } = this;
    const context = canvas.getContext("2d")!;
    const scale = window.devicePixelRatio || 1;
    const style = getComputedStyle(this.root);
    context.setTransform(scale, 0, 0, scale, 0, 0);
    context.clearRect(0, 0, layout!.width, layout!.height);
    context.lineWidth = 1;
    const { edges } = circuit.graph;
    const shown = (edge: Edge) =>
      filters.letters.has(edge.letter) && (edge.from.kind === "" || filters.kinds.has(edge.from.kind));
    for (const letter of LETTERS) {
      const all = new Path2D();
      const own = new Path2D();
      for (let i = 0; i < edges.length; i++) {
        const edge = edges[i];
        if (edge.letter !== letter || !circuit.kept[i] || !shown(edge)) continue;
        trace(node && (edge.from === node || edge.to === node) ? own : all, edge, layout!);
      }
      context.strokeStyle = style.getPropertyValue(`--${letter}`);
      context.globalAlpha = node ? FAINT : opacity(circuit.numKept);
      context.stroke(all);
      context.globalAlpha = 0.9;
      context.lineWidth = 1.5;
      context.stroke(own);
      context.lineWidth = 1;
    }
    context.globalAlpha = 1;
  }

  /** Arrow keys go to the nearest node in that direction. */
  private pressed(event: KeyboardEvent, node: Node): void {
    const directions: Record<string, [number, number]> = {
      ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1],
    };
    if (event.key === "Enter" || event.key === " ") {
      event.preventDefault();
      this.chosen(node);
    }
    const way = directions[event.key];
    if (!way || event.ctrlKey || event.metaKey || event.altKey) return;
    event.preventDefault();
    event.stopPropagation();
    const here = this.box(node);
    let best: Node | null = null;
    let least = Infinity;
    for (const [other, box] of this.layout!.boxes) {
      const dx = box.x - here.x;
      const dy = box.y + box.height / 2 - here.y - here.height / 2;
      const along = dx * way[0] + dy * way[1];
      const across = Math.abs(dx * way[1]) + Math.abs(dy * way[0]);
      if (along > 1 && along + 3 * across < least) [best, least] = [other, along + 3 * across];
    }
    if (best) this.focus(best);
  }

  focus(node: Node): void {
    this.boxes!.attr("tabindex", (one) => (one === node ? 0 : -1)).filter((one) => one === node).node()?.focus();
  }

  /** The picture as one SVG, edges included. */
  toSvg(circuit: Circuit): string {
    const copy = this.svg.node()!.cloneNode(true) as SVGSVGElement;
    const style = getComputedStyle(this.root);
    const sources = this.svg.node()!.querySelectorAll("rect, text");
    copy.querySelectorAll("rect, text").forEach((item, number) => {
      const own = getComputedStyle(sources[number]);
      for (const name of ["fill", "stroke", "stroke-dasharray", "font-size", "font-family", "text-anchor", "opacity"]) {
        item.setAttribute(name, own.getPropertyValue(name));
      }
    });
    copy.setAttribute("xmlns", "http://www.w3.org/2000/svg");
    const group = select(copy).insert("g", ":scope > :nth-child(2)").attr("fill", "none").attr("opacity", opacity(circuit.numKept));
    circuit.graph.edges.forEach((edge, number) => {
      if (!circuit.kept[number]) return;
      const path = new SvgPath();
      trace(path as unknown as Path2D, edge, this.layout!);
      group.append("path").attr("d", path.text).attr("stroke", style.getPropertyValue(`--${edge.letter}`));
    });
    return copy.outerHTML;
  }
}

/** What `trace` draws into where there is no canvas. */
class SvgPath {
  text = "";
  moveTo(x: number, y: number): void {
    this.text += `M${x.toFixed(1)},${y.toFixed(1)}`;
  }
  bezierCurveTo(...values: number[]): void {
    this.text += `C${values.map((value) => value.toFixed(1)).join(",")}`;
  }
}
