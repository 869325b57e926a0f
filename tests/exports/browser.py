"""Pictures classified by Transformers.js in headless Chromium, from a server on 127.0.0.1."""

import json
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from tempfile import TemporaryDirectory

PACKAGE = "@huggingface/transformers@4.3.2"
_SECONDS = 240
_FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
_PAGE = """<!doctype html>
<script type="module">
  const send = (answer) => fetch("/answer", { method: "POST", body: JSON.stringify(answer) });
  try {
    const at = "/node_modules/@huggingface/transformers/dist/transformers.min.js";
    const { env, pipeline } = await import(at);
    env.allowRemoteModels = false;
    env.allowLocalModels = true;
    env.localModelPath = "/";
    env.backends.onnx.wasm.wasmPaths = "/node_modules/onnxruntime-web/dist/";
    const classify = await pipeline("image-classification", "EXPORT");
    const answers = [];
    for (const picture of PICTURES) {
      answers.push(await classify("/pictures/" + picture, { top_k: null }));
    }
    await send(answers);
  } catch (error) {
    await send(String(error.stack ?? error));
  }
</script>
"""


def missing() -> str:
    """What this machine lacks for it, or nothing."""
    return ", ".join(name for name in ("npm", "chromium") if shutil.which(name) is None)


def install(modules: Path) -> None:
    """Install the package into a folder, without running its scripts."""
    modules.mkdir(parents=True, exist_ok=True)
    command = ["npm", "install", "--ignore-scripts", "--no-audit", "--no-fund", PACKAGE]
    subprocess.run(command, cwd=modules, check=True, capture_output=True, timeout=_SECONDS)


def classify(export: Path, pictures: Path, modules: Path) -> list[dict[str, float]]:
    """The scores of each picture's labels, in the order of the pictures' names.

    Args:
        export: A folder of target transformers-js.
        pictures: A folder of pictures.
        modules: Where `install` installed.
    """
    names = sorted(path.name for path in pictures.iterdir())
    page = _PAGE.replace("EXPORT", export.name).replace("PICTURES", json.dumps(names))
    answered, answers = threading.Event(), []

    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def do_GET(self):
            if self.path != "/":
                return super().do_GET()
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page.encode())
            return None

        def do_POST(self):
            answers.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.send_response(204)
            self.end_headers()
            answered.set()

    with TemporaryDirectory() as root, TemporaryDirectory() as profile:
        (Path(root) / export.name).symlink_to(export.absolute())
        (Path(root) / "pictures").symlink_to(pictures.absolute())
        (Path(root) / "node_modules").symlink_to(modules.absolute() / "node_modules")
        with ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=root)) as server:
            threading.Thread(target=server.serve_forever, daemon=True).start()
            address = f"http://127.0.0.1:{server.server_port}/"
            browser = subprocess.Popen(
                ["chromium", *_FLAGS, f"--user-data-dir={profile}", address],
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
            try:
                answered.wait(_SECONDS)
            finally:
                browser.terminate()
                browser.wait()
                server.shutdown()
    if not answers:
        raise TimeoutError(f"the browser gave no answer in {_SECONDS} s")
    if isinstance(answers[0], str):
        raise RuntimeError(answers[0])
    return [{each["label"]: each["score"] for each in one} for one in answers[0]]


if __name__ == "__main__":
    # python browser.py EXPORT PICTURES MODULES
    json.dump(classify(*map(Path, sys.argv[1:])), sys.stdout)
