// Bundles src/ into the package. The first line names the hash of the sources, which a test compares.
import { createHash } from "node:crypto";
import { copyFileSync, existsSync, readdirSync, readFileSync, writeFileSync } from "node:fs";
import { gunzipSync, gzipSync } from "node:zlib";
import { build } from "esbuild";

const out = "../src/vitcut/assets/report";
const files = ["package.json", "build.mjs", ...readdirSync("src").map((name) => `src/${name}`)];
const hash = createHash("sha256");
for (const name of files.sort()) {
  hash.update(`${name}\0`).update(readFileSync(name)).update("\0");
}
const d3 = readFileSync("node_modules/d3-scale/LICENSE", "utf8").trim();
await build({
  entryPoints: { report: "src/main.ts" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  charset: "ascii",
  banner: { js: `/* sources sha256 ${hash.digest("hex")}\nwith modules of d3:\n${d3} */` },
});
await build({
  entryPoints: { model: "src/model.ts" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "esm",
  target: "es2022",
  charset: "ascii",
  legalComments: "inline",
});
// Compressed once here, as it goes into the page: WebAssembly without a GPU, one thread is used.
const wasm = readFileSync("node_modules/onnxruntime-web/dist/ort-wasm-simd-threaded.wasm");
if (!existsSync(`${out}/runtime.wasm.gz`) || !gunzipSync(readFileSync(`${out}/runtime.wasm.gz`)).equals(wasm)) {
  writeFileSync(`${out}/runtime.wasm.gz`, gzipSync(wasm, { level: 9 }));
}
await build({ entryPoints: { report: "src/report.css" }, outdir: out, minify: true });
copyFileSync("src/report.html", `${out}/report.html`);
