// The cut model in the page: ONNX Runtime's plain WebAssembly, unpacked when it is first needed.

import { env, InferenceSession, Tensor } from "onnxruntime-web/wasm";
import type { Answered, PageModel } from "./drop";

let session: Promise<InferenceSession> | null = null;

async function unpack(id: string): Promise<ArrayBuffer> {
  const bytes = Uint8Array.from(atob(document.getElementById(id)!.textContent!.trim()), (letter) => letter.charCodeAt(0));
  return new Response(new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"))).arrayBuffer();
}

async function start(): Promise<InferenceSession> {
  env.wasm.numThreads = 1;
  env.wasm.proxy = false;
  env.wasm.wasmBinary = await unpack("runtime");
  return InferenceSession.create(await unpack("model"), { executionProviders: ["wasm"] });
}

const model: PageModel = {
  async run(picture: ImageData): Promise<Answered> {
    session ??= start();
    const { width, height, data } = picture;
    const rgb = new Uint8Array(3 * width * height);
    for (let from = 0, to = 0; from < data.length; from += 4) {
      rgb[to++] = data[from];
      rgb[to++] = data[from + 1];
      rgb[to++] = data[from + 2];
    }
    const ready = await session;
    const started = performance.now();
    const found = await ready.run({ pictures: new Tensor("uint8", rgb, [1, height, width, 3]) });
    return {
      milliseconds: performance.now() - started,
      probabilities: [...(found.probabilities.data as Float32Array)],
      written: [...(found.written.data as Float32Array)],
    };
  },
};

(window as unknown as { vitcutModel: PageModel }).vitcutModel = model;
