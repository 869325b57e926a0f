// A picture that is dropped on the page, and what the cut model in the page makes of it.

import type { ModelData } from "./data";
import { el, ms, percent } from "./dom";

/** What `model.ts` offers; it is in the page only if the model is. */
export interface PageModel {
  run(picture: ImageData): Promise<Answered>;
}

export interface Answered {
  milliseconds: number;
  probabilities: number[];
  /** By part, the mean norm of what it wrote to a token. */
  written: number[];
}

/** Longer sides are shrunk by the browser first. */
const LONGEST = 2048;
const MOST_GROUPS = 5;

/** How much each part wrote, by its name; the largest of each token kind is 1. */
export function levels(parts: string[], written: number[]): Map<string, number> {
  const kind = (part: string) => /[a-z]+$/.exec(part)?.[0] ?? "";
  const most = new Map<string, number>();
  parts.forEach((part, at) => most.set(kind(part), Math.max(written[at], most.get(kind(part)) ?? Number.MIN_VALUE)));
  return new Map(parts.map((part, at) => [part, written[at] / most.get(kind(part))!]));
}

async function read(file: Blob, turned: boolean): Promise<{ bitmap: ImageBitmap; pixels: ImageData }> {
  const bitmap = await createImageBitmap(file, { imageOrientation: turned ? "from-image" : ("none" as ImageOrientation), colorSpaceConversion: "none", premultiplyAlpha: "none" });
  const share = Math.min(1, LONGEST / Math.max(bitmap.width, bitmap.height));
  const [width, height] = [bitmap.width, bitmap.height].map((side) => Math.max(1, Math.round(side * share)));
  const context = el("canvas", { width: String(width), height: String(height) }).getContext("2d", { willReadFrequently: true })!;
  context.imageSmoothingQuality = "high";
  context.drawImage(bitmap, 0, 0, width, height);
  return { bitmap, pixels: context.getImageData(0, 0, width, height) };
}

/** The place to drop a picture on; `lit` gets what each part wrote, or null while it is not known. */
export function dropZone(model: ModelData, lit: (written: Map<string, number> | null) => void): HTMLElement {
  const told = el("div", { class: "told", "aria-live": "polite", id: "answer" });
  const input = el("input", { type: "file", accept: "image/*", id: "picture", "aria-label": "a picture to classify" });
  const zone = el(
    "section",
    { class: "drop", id: "drop" },
    el("div", {}, el("b", {}, "Try a picture"), el("p", { class: "note" }, `Drop one anywhere on this page, or choose a file. The cut model ${model.point === "model" ? "" : `of ${model.point} `}answers it here, in your browser; nothing is sent anywhere.`), input),
    told,
  );
  let turn = 0;
  const classify = async (file: Blob) => {
    const own = ++turn;
    lit(null);
    told.replaceChildren(el("p", {}, "unpacking and computing\u2026"));
    try {
      const { bitmap, pixels } = await read(file, model.turned);
      // The message is painted before the page is busy.
      await new Promise((resume) => setTimeout(resume, 30));
      const answered = await (window as unknown as { vitcutModel: PageModel }).vitcutModel.run(pixels);
      if (own !== turn) return;
      told.replaceChildren(thumbnail(bitmap), bars(model, answered));
      lit(levels(model.parts, answered.written));
    } catch (error) {
      if (own === turn) told.replaceChildren(el("p", { class: "answer wrong" }, error instanceof DOMException ? "This browser cannot read that file as a picture." : `The model could not run: ${String(error)}`));
    }
  };
  input.addEventListener("change", () => input.files?.[0] && void classify(input.files[0]));
  document.addEventListener("dragover", (event) => {
    event.preventDefault();
    zone.classList.add("over");
  });
  document.addEventListener("dragleave", () => zone.classList.remove("over"));
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    zone.classList.remove("over");
    const file = event.dataTransfer?.files[0];
    if (file) void classify(file);
  });
  return zone;
}

function thumbnail(bitmap: ImageBitmap): HTMLCanvasElement {
  const share = 96 / Math.max(bitmap.width, bitmap.height);
  const [width, height] = [bitmap.width * share, bitmap.height * share].map((side) => Math.max(1, Math.round(side)));
  const canvas = el("canvas", { width: String(width), height: String(height), role: "img", "aria-label": "your picture" });
  canvas.getContext("2d")!.drawImage(bitmap, 0, 0, width, height);
  return canvas;
}

function bars(model: ModelData, { probabilities, milliseconds }: Answered): HTMLElement {
  const order = probabilities.map((share, group) => ({ share, group })).sort((a, b) => b.share - a.share);
  const rows = order.slice(0, MOST_GROUPS).map(({ share, group }) => {
    const meter = el("progress", { max: "1", value: String(share) });
    return el("div", { class: "bar-row" }, el("span", {}, model.groups[group]), meter, el("span", {}, percent(share)));
  });
  return el("div", { class: "bars" }, ...rows, el("p", { class: "note" }, `${ms(milliseconds)} ms in this browser, on one thread. The stronger the colour of a head or MLP in the circuit, the more it wrote for this picture (mean norm over tokens, as a share of the largest in its row).`));
}
