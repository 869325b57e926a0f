// Bundles label/ into the package, as build.mjs does src/. The first line names the hash of the sources.
import { createHash } from "node:crypto";
import { copyFileSync, readdirSync, readFileSync } from "node:fs";
import { build } from "esbuild";

const out = "../src/vitcut/assets/label";
const files = ["package.json", "build-label.mjs", "src/dom.ts", ...readdirSync("label").map((name) => `label/${name}`)];
const hash = createHash("sha256");
for (const name of files.sort()) {
  hash.update(`${name}\0`).update(readFileSync(name)).update("\0");
}
const yaml = readFileSync("node_modules/yaml/LICENSE", "utf8").trim();
await build({
  entryPoints: { label: "label/main.ts" },
  outdir: out,
  bundle: true,
  minify: true,
  format: "iife",
  target: "es2022",
  charset: "ascii",
  banner: { js: `/* sources sha256 ${hash.digest("hex")}\nwith the package yaml:\n${yaml} */` },
});
await build({ entryPoints: { label: "label/label.css" }, outdir: out, minify: true });
copyFileSync("label/label.html", `${out}/label.html`);
