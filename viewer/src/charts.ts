// Accuracy against latency, accuracy and parts over tau, and confusions.

import { extent } from "d3-array";
import { axisBottom, axisLeft } from "d3-axis";
import { type ScaleLinear, scaleLinear, scaleLog } from "d3-scale";
import { create } from "d3-selection";
import { line, symbol, symbolCircle, symbolDiamond, symbolSquare, symbolTriangle } from "d3-shape";
import type { Latency, Point, Run } from "./data";
import { type Child, el, ms, percent, signed, table } from "./dom";

const SHAPES = [symbolCircle, symbolSquare, symbolTriangle, symbolDiamond];
export const SHAPE_NAMES = ["Circles", "Squares", "Triangles", "Diamonds"];
const MARGIN = { top: 12, right: 18, bottom: 40, left: 52 };
const TALL = 300;

export interface Timing {
  runtime: string;
  batch: number;
}

/** Every runtime and batch size that was timed, ONNX Runtime and large batches first. */
export function timings(runs: Run[]): Timing[] {
  const found = new Map<string, Timing>();
  for (const { data } of runs) {
    for (const point of data.results ? [data.results.dense, ...data.results.points] : []) {
      for (const { runtime, batch } of point?.latency ?? []) found.set(timingLabel({ runtime, batch }), { runtime, batch });
    }
  }
  const rank = (one: Timing) => (one.runtime === "onnxruntime" ? 1e6 : 0) + one.batch;
  return [...found.values()].sort((a, b) => rank(b) - rank(a));
}

export const timingLabel = ({ runtime, batch }: Timing): string => `${runtime}, batch ${batch}`;

export function latencyOf(point: Point | null, timing: Timing | null): Latency | null {
  return point?.latency.find((one) => one.runtime === timing?.runtime && one.batch === timing?.batch) ?? null;
}

/** What the mark and the name of a point carry, so that the one in view is found. */
export const keyOf = (run: number, name: string): string => `${run} ${name}`;

interface Mark {
  run: number;
  point: Point;
  x: Latency;
  low: number | null;
  high: number | null;
}

function frame(width: number, label: string) {
  return create("svg").attr("viewBox", `0 0 ${width} ${TALL}`).attr("width", width).attr("height", TALL).attr("role", "img").attr("aria-label", label);
}

function padded([low, high]: [number, number], share: number): [number, number] {
  const pad = (high - low || Math.abs(high) || 1) * share;
  return [low - pad, high + pad];
}

export function accuracyChart(
  runs: Run[], timing: Timing, first: string, width: number, picked: (run: number, name: string) => void,
): SVGSVGElement {
  const marks: Mark[] = runs.flatMap((run, number) => {
    const results = run.data.results;
    const dense = results?.dense?.accuracy_coarse;
    return (results ? [results.dense, ...results.points] : []).flatMap((point) => {
      const x = latencyOf(point, timing);
      if (!point || !x || point.accuracy_coarse === null) return [];
      const known = dense !== null && dense !== undefined && point.change_low !== null && point.change_high !== null;
      return [{ run: number, point, x, low: known ? dense + point.change_low! : null, high: known ? dense + point.change_high! : null }];
    });
  });
  const svg = frame(width, `coarse accuracy against latency in ${timingLabel(timing)}`);
  const xs = extent(marks.flatMap((mark) => [mark.x.p10_ms, mark.x.p90_ms])) as [number, number];
  const ys = extent(marks.flatMap((mark) => [mark.point.accuracy_coarse!, mark.low ?? mark.point.accuracy_coarse!, mark.high ?? mark.point.accuracy_coarse!])) as [number, number];
  const x = scaleLinear([0, xs[1] * 1.06], [MARGIN.left, width - MARGIN.right]);
  const y = shares(padded(ys, 0.12));
  axes(svg, width, axisBottom(x).ticks(Math.min(8, width / 70)), percentAxis(y), `ms per batch, ${timingLabel(timing)} (from 0)`, "coarse accuracy, %");
  const groups = svg
    .append("g")
    .selectAll("g")
    .data(marks)
    .join("g")
    .attr("class", "mark")
    .attr("data-key", (mark) => keyOf(mark.run, mark.point.name))
    .on("click", (_, mark) => picked(mark.run, mark.point.name));
  groups.filter((mark) => mark.low !== null).append("line").attr("class", "whisker")
    .attr("x1", (m) => x(m.x.median_ms)).attr("x2", (m) => x(m.x.median_ms)).attr("y1", (m) => y(m.low!)).attr("y2", (m) => y(m.high!));
  groups.append("line").attr("class", "whisker")
    .attr("x1", (m) => x(m.x.p10_ms)).attr("x2", (m) => x(m.x.p90_ms)).attr("y1", (m) => y(m.point.accuracy_coarse!)).attr("y2", (m) => y(m.point.accuracy_coarse!));
  groups.append("path").attr("d", (mark) => symbol(SHAPES[mark.run % SHAPES.length], 80)())
    .attr("transform", (m) => `translate(${x(m.x.median_ms)},${y(m.point.accuracy_coarse!)})`);
  groups.append("title").text((m) => `${runs.length > 1 ? `${runs[m.run].data.name}, ` : ""}${m.point.name}: ${percent(m.point.accuracy_coarse)} at ${ms(m.x.median_ms)} ms`);
  labels(groups.nodes().map((_, n) => marks[n]), x, y, width, svg, first);
  return svg.node()!;
}

/** Names beside the marks, each only where nothing is in the way; one point comes first. */
function labels(
  marks: Mark[], x: (v: number) => number, y: (v: number) => number, width: number, svg: ReturnType<typeof frame>, first: string,
): void {
  const taken = marks.flatMap((m) => {
    const [cx, cy] = [x(m.x.median_ms), y(m.point.accuracy_coarse!)];
    const [left, top] = [x(m.x.p10_ms), y(m.high ?? m.point.accuracy_coarse!)];
    return [
      { x: cx - 6, y: cy - 6, w: 12, h: 12 },
      { x: left, y: cy - 1, w: x(m.x.p90_ms) - left, h: 2 },
      { x: cx - 1, y: top, w: 2, h: y(m.low ?? m.point.accuracy_coarse!) - top },
    ];
  });
  const rank = (m: Mark) => (keyOf(m.run, m.point.name) === first ? 0 : 1);
  for (const mark of [...marks].sort((a, b) => rank(a) - rank(b))) {
    const text = mark.point.name;
    const w = text.length * 6.6;
    const cx = x(mark.x.median_ms);
    const cy = y(mark.point.accuracy_coarse!);
    const places = [[cx + 10, cy - 6], [cx + 8, cy - 20], [cx + 8, cy + 8], [cx - 10 - w, cy - 6], [cx - 8 - w, cy - 20], [cx - 8 - w, cy + 8], [cx + 8, cy - 34], [cx + 8, cy + 22]];
    const free = places.find(([px, py]) => px > MARGIN.left && px + w < width && py > 0 && py + 12 < TALL - MARGIN.bottom && taken.every((t) => px > t.x + t.w || px + w < t.x || py > t.y + t.h || py + 12 < t.y));
    if (!free) continue;
    taken.push({ x: free[0], y: free[1], w, h: 12 });
    svg.append("text").attr("class", "name").attr("data-key", keyOf(mark.run, text)).attr("x", free[0]).attr("y", free[1] + 10).text(text);
  }
}

// eslint-disable-next-line @typescript-eslint/no-explicit-any
function axes(svg: ReturnType<typeof frame>, width: number, bottom: any, left: any, below: string, beside: string): void {
  svg.append("g").attr("class", "axis").attr("transform", `translate(0,${TALL - MARGIN.bottom})`).call(bottom);
  svg.append("g").attr("class", "axis").attr("transform", `translate(${MARGIN.left},0)`).call(left);
  svg.append("text").attr("class", "title").attr("x", width - MARGIN.right).attr("y", TALL - 4).attr("text-anchor", "end").text(below);
  svg.append("text").attr("class", "title").attr("transform", `translate(13,${MARGIN.top}) rotate(-90)`).attr("text-anchor", "end").text(beside);
}

/** The upright scale of fractions, rounded to ticks but never beyond 0 and 1. */
function shares(extent: [number, number]): ScaleLinear<number, number> {
  const y = scaleLinear(extent, [TALL - MARGIN.bottom, MARGIN.top]).nice(5);
  return y.domain(y.domain().map((value) => Math.min(1, Math.max(0, value))));
}

/** Ticks in percent with as many digits as tell them apart. */
function percentAxis(y: ScaleLinear<number, number>) {
  const [first, second] = y.ticks(6);
  const digits = second - first < 0.0099 ? 1 : 0;
  return axisLeft(y).ticks(6).tickFormat((v) => (100 * +v).toFixed(digits));
}

/** One value of the points that ACDC found, over tau on a logarithmic axis. */
export function tauChart(
  run: number, points: Point[], value: (point: Point) => number | null, label: string, width: number, fromZero: boolean,
): SVGSVGElement | null {
  const marks = points.filter((point) => point.tau !== null && value(point) !== null).sort((a, b) => a.tau! - b.tau!);
  if (new Set(marks.map((point) => point.tau)).size < 2) return null;
  const svg = frame(width, `${label} over tau`);
  const taus = marks.map((point) => point.tau!);
  const values = extent(marks, (point) => value(point)!) as [number, number];
  const x = scaleLog([taus[0] / 1.3, taus[taus.length - 1] * 1.3], [MARGIN.left, width - MARGIN.right]);
  const y = shares(fromZero ? [0, values[1] * 1.1] : padded(values, 0.15));
  axes(svg, width, axisBottom(x).tickValues([...new Set(taus)]).tickFormat((v) => String(v)), percentAxis(y), "tau, nats (log scale)", label);
  const byAblation = new Map<string, Point[]>();
  for (const point of marks) {
    // As it was searched for: a circuit found under resample is cut under mean.
    const ablation = point.faithfulness?.discovery?.ablation ?? point.ablation ?? "";
    byAblation.set(ablation, [...(byAblation.get(ablation) ?? []), point]);
  }
  const draw = line<Point>((point) => x(point.tau!), (point) => y(value(point)!));
  let shape = 0;
  for (const [ablation, own] of byAblation) {
    svg.append("path").attr("class", "series").attr("d", draw(own));
    const groups = svg.append("g").selectAll("g").data(own).join("g").attr("class", "mark").attr("data-key", (point) => keyOf(run, point.name));
    const row = MARGIN.top + 8 + 18 * shape;
    const mark = symbol(SHAPES[shape++ % SHAPES.length], 80)();
    groups.append("path").attr("d", mark).attr("transform", (point) => `translate(${x(point.tau!)},${y(value(point)!)})`);
    groups.append("title").text((point) => `${point.name}: ${percent(value(point))}`);
    if (byAblation.size > 1) {
      // Both fall towards the right, where the corner above is free.
      svg.append("path").attr("class", "key").attr("d", mark).attr("transform", `translate(${width - MARGIN.right - 90},${row})`);
      svg.append("text").attr("class", "name").attr("x", width - MARGIN.right - 78).attr("y", row + 4).text(ablation);
    }
  }
  return svg.node()!;
}

const MOST_GROUPS = 12;

/** Images by true group and answer; of many groups, the most frequent confusions alone. */
export function confusionTable(caption: string, groups: string[], confusion: number[][]): HTMLElement {
  const name = (group: number) => groups[group] ?? `group ${group}`;
  if (confusion.length <= MOST_GROUPS) {
    const rows: Child[][] = confusion.map((row, group) => {
      const sum = row.reduce((a, b) => a + b, 0);
      return [name(group), ...row.map((cell, answer) => el("span", { class: answer === group ? "right" : cell ? "wrong" : "none" }, String(cell))), sum ? percent(row[group] / sum) : "-"];
    });
    return table(caption, ["group", ...confusion.map((_, group) => name(group)), "right"], rows);
  }
  const pairs = confusion.flatMap((row, group) => row.map((cell, answer) => ({ cell, group, answer })));
  const worst = pairs.filter((p) => p.cell && p.group !== p.answer).sort((a, b) => b.cell - a.cell).slice(0, 10);
  return table(caption, ["group", "taken for", "images"], worst.map((p) => [name(p.group), name(p.answer), String(p.cell)]));
}

export function interval(point: Point): string {
  return point.change_low === null || point.change_high === null ? "" : `${signed(point.change_low)} to ${signed(point.change_high)}`;
}
