// Test images in the page: what each point answers on them, and where a head looks.

import { type AttentionData, type Node, type PictureData, type Run, unpackBits, type View } from "./data";
import { count, el, percent } from "./dom";

const MOST_CHANGED = 6;
/** How dark a cell becomes that gets no attention. */
const SHADE = 0.72;

const loaded = new Map<PictureData, HTMLImageElement>();
/** The images of each row by their place in the page's data: a step of the slider decodes none again. */
const shown = new Map<string, HTMLImageElement>();

function image(picture: PictureData, alt: string): HTMLImageElement {
  return el("img", { src: `data:image/webp;base64,${picture.image}`, alt, width: "96", height: "96" });
}

/** The answer of one model, and whether it is right, in words as well as by its look. */
function answer(run: Run, picture: PictureData, name: string, at: number): HTMLElement {
  const group = picture.answers[at];
  const right = group === picture.group;
  return el(
    "span",
    { class: right ? "answer right" : "answer wrong" },
    el("small", {}, name),
    `${right ? "\u2713" : "\u2717"}\u00a0${run.data.pictures!.groups[group]} ${percent(picture.probabilities[at], 0).replace(" ", "\u00a0")}`,
  );
}

function card(run: Run, view: View, picture: PictureData, row: string): HTMLElement {
  const { groups, points, pictures } = run.data.pictures!;
  const here = points.indexOf(view.name);
  const key = `${run.data.name} ${row} ${pictures.indexOf(picture)}`;
  const small = shown.get(key) ?? image(picture, `a test image of ${groups[picture.group]}`);
  shown.set(key, small);
  return el(
    "figure",
    { class: "card" },
    small,
    el("figcaption", {}, el("b", {}, groups[picture.group]), answer(run, picture, points[0], 0), here > 0 && answer(run, picture, "here", here)),
  );
}

/** The samples, and those images that the point in view answers otherwise than the dense model. */
export function pictureSection(run: Run, view: View): HTMLElement[] {
  const { pictures } = run.data;
  if (!pictures?.pictures.length) return [];
  const samples = pictures.attention ? samplesOf(pictures.attention) : pictures.pictures.length;
  const row = (name: string, chosen: PictureData[]) => el("div", { class: "cards" }, ...chosen.map((one) => card(run, view, one, name)));
  const made: HTMLElement[] = [row("samples", pictures.pictures.slice(0, samples))];
  const here = pictures.points.indexOf(view.name);
  if (here > 0) {
    const [total, gained, lost] = [pictures.changed[here], pictures.gained[here], pictures.lost[here]];
    const text = total
      ? `On ${count(total)}${view.point?.images ? ` of ${count(view.point.images)}` : ""} test images ${view.name} answers otherwise than ${pictures.points[0]}: ${count(gained)} that were wrong are right now, ${count(lost)} that were right are wrong${total > gained + lost ? `, ${count(total - gained - lost)} are wrong in another way` : ""}.`
      : `${view.name} answers as ${pictures.points[0]} does on all test images.`;
    const changed = pictures.pictures.filter((one) => one.answers[here] !== one.answers[0]);
    made.push(el("h3", {}, "Where the answer changed"), el("p", { id: "changed" }, text));
    if (changed.length) made.push(row("changed", sure(changed, here).slice(0, MOST_CHANGED)));
  }
  return made;
}

/** The patches that a circuit keeps, on the samples' own grid: dropped ones are dark. */
export function positionSection(run: Run, view: View): HTMLElement[] {
  const positions = view.circuit?.data.positions;
  if (!positions) return [];
  const kept = unpackBits(positions.kept, positions.total);
  const { pictures } = run.data;
  const samples: (PictureData | null)[] = pictures?.attention ? pictures.pictures.slice(0, samplesOf(pictures.attention)) : [null];
  const maps = samples.map((picture) => {
    const canvas = el("canvas", { width: "168", height: "168", role: "img", "aria-label": "kept patches" });
    draw(canvas, picture, [...kept], Math.round(Math.sqrt(positions.total)));
    return el("figure", {}, canvas);
  });
  const share = kept.reduce((sum, one) => sum + one, 0);
  return [el("div", { class: "maps wide", id: "positions" }, ...maps), el("p", { class: "note" }, `${count(share)} of ${count(positions.total)} patches are kept; no token is computed for the dark ones.`)];
}

/** Those first of which both models are surest. */
function sure(changed: PictureData[], here: number): PictureData[] {
  const weight = (one: PictureData) => one.probabilities[0] * one.probabilities[here];
  return [...changed].sort((a, b) => weight(b) - weight(a));
}

export const samplesOf = (data: AttentionData): number => data.peaks.length / (data.layers * data.heads);

/** The attention of one head on one sample: levels from 0 to 1, row by row, and their peak. */
export function attentionOf(data: AttentionData, sample: number, layer: number, head: number): { levels: number[]; peak: number } {
  const map = (sample * data.layers + layer) * data.heads + head;
  const cells = data.grid * data.grid;
  const bytes = atob(data.values).slice(map * cells, (map + 1) * cells);
  return { levels: [...bytes].map((letter) => letter.charCodeAt(0) / 255), peak: data.peaks[map] };
}

/** The samples, bright where a head looks; nothing for other nodes. */
export function attentionPanel(run: Run, node: Node): HTMLElement[] {
  const { pictures } = run.data;
  const data = pictures?.attention;
  if (node.role !== "head" || !pictures || !data || node.layer >= data.layers || node.head >= data.heads) return [];
  const maps = pictures.pictures.slice(0, samplesOf(data)).map((picture, sample) => {
    const { levels, peak } = attentionOf(data, sample, node.layer, node.head);
    const canvas = el("canvas", { width: "168", height: "168", role: "img", "aria-label": `attention on an image of ${pictures.groups[picture.group]}, at most ${percent(peak)} on one cell` });
    draw(canvas, picture, levels, data.grid);
    return el("figure", {}, canvas, el("figcaption", {}, percent(peak)));
  });
  const whose = data.asks === "patches" ? "patches look, on average," : "the class token looks";
  return [
    el("h3", {}, "Attention"),
    el("div", { class: "maps", id: "maps" }, ...maps),
    el("p", { class: "note" }, `Where ${whose} through this head, in the dense model: bright is most. Below each picture: the share of the brightest cell.`),
  ];
}

function draw(canvas: HTMLCanvasElement, picture: PictureData | null, levels: number[], grid: number): void {
  const source = picture && (loaded.get(picture) ?? image(picture, ""));
  if (source) loaded.set(picture, source);
  const paint = () => {
    const context = canvas.getContext("2d")!;
    const [side, cell] = [canvas.width, canvas.width / grid];
    context.fillStyle = "#cfd6e2";
    context.fillRect(0, 0, side, side);
    if (source) context.drawImage(source, 0, 0, side, side);
    levels.forEach((level, number) => {
      const [x, y] = [(number % grid) * cell, Math.floor(number / grid) * cell];
      context.fillStyle = `rgb(0 0 0 / ${SHADE * (1 - level)})`;
      // Whole pixels: no seams between cells.
      context.fillRect(Math.round(x), Math.round(y), Math.round(x + cell) - Math.round(x), Math.round(y + cell) - Math.round(y));
    });
  };
  if (!source || (source.complete && source.naturalWidth)) paint();
  else source.addEventListener("load", paint, { once: true });
}
