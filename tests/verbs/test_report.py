import gzip
import hashlib
import json
import re
import shlex
import shutil
import subprocess
from base64 import b64decode
from html import unescape
from importlib import resources
from pathlib import Path

import numpy as np
import pytest

import vitcut
from vitcut.circuit import Circuit
from vitcut.cli import build_parser, main
from vitcut.errors import ArtefactError, ConfigError
from vitcut.recipes import read_recipe, settings_from
from vitcut.reports.page import Report, command_of
from vitcut.results import Point, Results
from vitcut.runs import read_settings
from vitcut.store import parse_yaml

VIEWER = Path(__file__).parents[2] / "viewer"
ASSETS = Path(str(resources.files("vitcut"))) / "assets" / "report"


def data_of(page):
    [text] = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return json.loads(text)


@pytest.fixture(scope="module")
def page(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("report") / "report.html"
    assert main(["report", str(finished), "--out", str(out)]) == 0
    return out.read_text(encoding="utf-8")


def test_the_page_holds_what_was_measured(page, finished):
    [run] = data_of(page)["runs"]
    results = json.loads((finished / "results.json").read_text())
    kept = {key: results[key] for key in ("task", "machine", "dense", "points", "comparisons")}
    assert run["results"] == kept
    assert run["groups"] == ["plain", "striped"]
    assert run["headlines"].keys() == {p["name"] for p in results["points"]} - {"class-only"}


def test_the_page_holds_every_circuit_edge_by_edge(page, finished):
    [run] = data_of(page)["runs"]
    for name in ("acdc-resample-0.03", "acdc-resample-0.001"):
        circuit = Circuit.load(finished / "points" / name / "model" / "circuit.json")
        told = run["circuits"][name]
        graph = run["graphs"][told["graph"]]
        bits = np.unpackbits(np.frombuffer(b64decode(told["kept"]), dtype=np.uint8)).tolist()
        kept = {
            (graph["sources"][source], target)
            for target, (first, end) in zip(graph["targets"], graph["reads"], strict=True)
            for source in range(first, end, graph["step"])
            if bits.pop(0)
        }
        assert kept == {
            (circuit.graph.sources[s].name, circuit.graph.targets[t].name)
            for s, t in np.argwhere(circuit.kept)
        }
        strengths = np.frombuffer(b64decode(told["strengths"]), dtype="<f4")
        assert len(strengths) == circuit.graph.num_edges
        assert np.isfinite(strengths).any()


def test_the_page_loads_nothing(page):
    policy = unescape(re.findall(r'Content-Security-Policy" content="([^"]+)"', page)[0])
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert len(page) < 1_000_000


def test_pictures_are_those_of_the_run_or_none(page, finished, tmp_path):
    [run] = data_of(page)["runs"]
    results = json.loads((finished / "results.json").read_text())
    told = run["pictures"]
    assert told["points"] == ["dense", "acdc-resample-0.03", "acdc-resample-0.001"]
    for at, name in enumerate(told["points"][1:], start=1):
        [point] = [p for p in results["points"] if p["name"] == name]
        gain = (told["gained"][at] - told["lost"][at]) / point["images"]
        assert gain == pytest.approx(point["accuracy_coarse"] - results["dense"]["accuracy_coarse"])
    bare = tmp_path / "bare.html"
    assert main(["report", str(finished), "--no-pictures", "--out", str(bare)]) == 0
    assert data_of(bare.read_text(encoding="utf-8"))["runs"][0]["pictures"] is None
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "results.json").symlink_to(finished / "results.json")
    (tmp_path / "run" / "pictures.json").write_text("{}")
    with pytest.raises(ArtefactError, match="not a vitcut pictures file"):
        Report.of([tmp_path / "run"])


def test_text_from_outside_cannot_end_the_data(tmp_path):
    name = "</script><script>alert(1)</script><!--"
    results = Results(task=name, machine={"cpu": name}, dense=Point(name=name))
    results.save(tmp_path / "results.json")
    page = Report.of([tmp_path]).to_html()
    assert name not in page
    assert data_of(page)["runs"][0]["results"]["task"] == name


def test_a_directory_with_circuits_or_results_alone_has_a_report(finished, tmp_path):
    for part in ("points", "results.json"):
        folder = tmp_path / part.partition(".")[0]
        folder.mkdir()
        (folder / part).symlink_to(finished / part)
        assert data_of(Report.of([folder]).to_html())["runs"][0]["name"] == folder.name
    with pytest.raises(ArtefactError, match=r"nothing to report at .*: expected the run directory"):
        Report.of([tmp_path])


def test_runs_stand_side_by_side_but_none_twice(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    page = vitcut.report([finished, tmp_path / "other"]).to_html()
    assert [run["name"] for run in data_of(page)["runs"]] == ["finished", "other"]
    with pytest.raises(ConfigError, match="twice: give each run once"):
        vitcut.report([finished, finished / "points" / ".."])
    with pytest.raises(ConfigError, match="with-model takes one run, got 2: give one alone"):
        vitcut.report([finished, tmp_path / "other"], with_model=True)
    assert main(["report", str(finished), str(finished), "--out", str(tmp_path / "r.html")]) == 2
    assert not (tmp_path / "r.html").exists()


def test_a_notebook_shows_the_page_in_a_frame(finished):
    shown = vitcut.report(finished)._repr_html_()
    assert shown.startswith('<iframe srcdoc="&lt;!doctype html&gt;')
    assert 'sandbox="allow-scripts allow-downloads"' in shown


def test_the_recipe_on_the_page_makes_the_run_again(page, finished, recipe):
    command, text = data_of(page)["runs"][0]["command"].split("# recipe.yaml\n")
    assert command == "vitcut run recipe.yaml\n\n"
    told = parse_yaml(text)
    assert told["task"] == "LABELS.yaml"  # not shipped
    told["task"] = read_recipe(recipe, {}).task
    assert settings_from(told, "it") == read_recipe(recipe, {})


def test_the_command_on_the_page_is_one(finished):
    settings = read_settings(finished) | {
        "select": {"target_macs": 0.6, "rounds": 1},
        "cut": {"ablation": "mean", "merge": True},
    }
    del settings["taus"]
    words = shlex.split(command_of(settings))
    assert words[:2] == ["vitcut", "cut"]
    flags = {word for word in words if word.startswith("--")}
    assert {"--target-macs", "--rounds", "--merge"} <= flags
    known = vars(build_parser("cut").get_defaults())
    assert {flag[2:].replace("-", "_") for flag in flags} <= known.keys()


def test_the_built_viewer_is_that_of_its_sources():
    files = ["package.json", "build.mjs", *(f"src/{p.name}" for p in (VIEWER / "src").iterdir())]
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(f"{name}\0".encode() + (VIEWER / name).read_bytes() + b"\0")
    built = (ASSETS / "report.js").read_text(encoding="utf-8")
    assert built.startswith(f"/* sources sha256 {digest.hexdigest()}\n"), (
        "viewer/ has changed: npm install && npm run build there"
    )
    assert (ASSETS / "report.html").read_bytes() == (VIEWER / "src" / "report.html").read_bytes()


def test_the_built_viewer_holds_the_runtime_that_it_names():
    wanted = json.loads((VIEWER / "package.json").read_text())["devDependencies"]
    module = (ASSETS / "model.js").read_text(encoding="utf-8")
    assert f"ONNX Runtime Web v{wanted['onnxruntime-web']}" in module
    runtime = gzip.decompress((ASSETS / "runtime.wasm.gz").read_bytes())
    assert runtime.startswith(b"\0asm")
    # What the page holds beside its model.
    held = (ASSETS / "runtime.wasm.gz").stat().st_size * 4 / 3 + len(module)
    assert held + (ASSETS / "report.js").stat().st_size < 6_000_000


@pytest.mark.slow
def test_the_viewer_is_built_again_to_the_same_files(tmp_path):
    if shutil.which("npm") is None:
        pytest.skip("npm is not installed")
    shutil.copytree(VIEWER, tmp_path / "viewer", ignore=shutil.ignore_patterns("node_modules"))
    built = tmp_path / "src" / "vitcut" / "assets"
    for kind in ("label", "report"):
        (built / kind).mkdir(parents=True)
    for words in (["ci", "--ignore-scripts"], ["run", "check"], ["test"], ["run", "build"]):
        subprocess.run(["npm", *words], cwd=tmp_path / "viewer", check=True, capture_output=True)
    files = [path for path in built.rglob("*") if path.is_file()]
    for file in files:
        own, kept = file.read_bytes(), (ASSETS.parent / file.relative_to(built)).read_bytes()
        if file.suffix == ".gz":  # Versions of zlib compress otherwise.
            own, kept = gzip.decompress(own), gzip.decompress(kept)
        assert own == kept, file.name
    assert {file.name for file in files} >= {"report.js", "model.js", "runtime.wasm.gz", "label.js"}


def test_demo_ends_with_its_report(finished, tmp_path, monkeypatch, capsys):
    def run(recipe, *, changes, out):
        shutil.copytree(finished, out)
        return Results.load(out / "results.json")

    monkeypatch.setattr("vitcut.recipes.run", run)
    assert main(["demo", "--out", str(tmp_path / "demo")]) == 0
    assert f"next: open {tmp_path / 'demo' / 'report.html'} in a browser" in capsys.readouterr().out
    assert data_of((tmp_path / "demo" / "report.html").read_text(encoding="utf-8"))["runs"]
