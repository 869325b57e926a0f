import csv
import json

import networkx
import pytest

import vitcut
from vitcut.circuit import Circuit
from vitcut.cli import main
from vitcut.errors import ConfigError
from vitcut.graph import Graph
from vitcut.reports.files import files_of, to_mib

NAMES = ["acdc-resample-0.03", "acdc-resample-0.001"]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    out = tmp_path_factory.mktemp("files") / "page.html"
    assert main(["report", str(finished), "--files", "csv,networkx,mib", "--out", str(out)]) == 0
    return out.parent / "page"


def test_the_table_holds_every_point_and_latency(folder, finished):
    with (folder / "points.csv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    results = json.loads((finished / "results.json").read_text())
    points = [results["dense"], *results["points"]]
    told = [(row["name"], float(row["accuracy_coarse"]), float(row["median_ms"])) for row in rows]
    assert told == [
        (p["name"], p["accuracy_coarse"], latency["median_ms"])
        for p in points
        for latency in p["latency"]
    ]


@pytest.mark.parametrize("name", NAMES)
def test_networkx_reads_the_circuit(folder, finished, name):
    data = json.loads((folder / f"{name}.networkx.json").read_text())
    found = networkx.node_link_graph(data, edges="edges")
    circuit = Circuit.load(finished / "points" / name / "model" / "circuit.json")
    assert found.number_of_edges() == circuit.num_kept
    assert networkx.is_directed_acyclic_graph(found)
    heads = [node for node, kept in found.nodes(data="kept") if kept and node.startswith("attn")]
    assert len(heads) == circuit.num_heads_kept


@pytest.mark.parametrize("name", NAMES)
def test_mib_gets_every_edge_with_its_mask(folder, finished, name):
    data = json.loads((folder / f"{name}.mib.json").read_text())
    circuit = Circuit.load(finished / "points" / name / "model" / "circuit.json")
    edges = data["edges"]
    assert len(edges) == circuit.graph.num_edges == 46
    assert sum(edge["in_graph"] for edge in edges.values()) == circuit.kept.sum()
    assert {"input->a0.h0<q>", "a0.h1->m0", "m0->a1.h1<v>", "m1->logits"} <= edges.keys()
    assert data["nodes"].keys() == {
        "input",
        "a0.h0",
        "a0.h1",
        "m0",
        "a1.h0",
        "a1.h1",
        "m1",
        "logits",
    }


def test_mib_refuses_token_kinds_and_no_name_leads_out_of_the_folder():
    split = Graph(num_layers=1, num_heads=1, kinds=("cls", "patch"), readout=("cls",))
    with pytest.raises(ConfigError, match="MIB's circuits are over whole tokens, got the token"):
        to_mib(Circuit.full(split), {})
    [(name, _)] = files_of(None, {"../../etc/x": (Circuit.full(split), {})}, {"networkx", "mib"})
    assert name == "..-..-etc-x.networkx.json"


def test_points_whose_names_look_alike_have_files_of_their_own():
    graph = Graph(num_layers=1, num_heads=1)
    whole, empty = Circuit.full(graph), Circuit.full(graph).with_ablation("zero")
    points = {name: (whole if name == "a/b" else empty, {}) for name in ("a-b", "a/b", "a:b")}
    files = dict(files_of(None, points, {"networkx"}))
    assert [*files] == [f"a-b{more}.networkx.json" for more in ("", "-too", "-too-too")]
    told = [json.loads(text)["graph"]["ablation"] for text in files.values()]
    assert told == ["zero", whole.ablation, "zero"]


def test_figures_are_drawn_with_matplotlib(finished, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    vitcut.report(finished, files=("svg", "png"), out=tmp_path / "page.html")
    for name in ("accuracy-torch-1", *NAMES):
        assert (tmp_path / "page" / f"{name}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (tmp_path / "page" / f"{name}.svg").read_text(encoding="utf-8")


def test_figures_without_matplotlib_say_what_to_install(finished, tmp_path, monkeypatch):
    monkeypatch.setattr("vitcut.extras.find_spec", lambda _: None)
    with pytest.raises(ConfigError, match=r'needs matplotlib, .* pip install "vitcut\[figures\]"'):
        vitcut.report(finished, files=("csv", "svg"), out=tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


def test_unknown_files_are_refused(finished, tmp_path, capsys):
    out = str(tmp_path / "page.html")
    assert main(["report", str(finished), "--files", "gif", "--out", out]) == 2
    assert "gif" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="give out, the file to write"):
        vitcut.report(finished, files=("csv",))
    with pytest.raises(ConfigError, match=r"out must be a name such as .*page.html, got .*page: "):
        vitcut.report(finished, files=("csv",), out=tmp_path / "page")
    assert not list(tmp_path.iterdir())


def test_a_notebook_shows_the_report(finished, tmp_path):
    nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed")
    nbformat = pytest.importorskip("nbformat", reason="nbformat is not installed")
    pytest.importorskip("ipykernel", reason="ipykernel is not installed")
    code = f"import vitcut\nvitcut.report({str(finished)!r}).show()"
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    nbclient.NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    [output] = notebook.cells[0].outputs
    assert output.data["text/html"].startswith('<iframe srcdoc="&lt;!doctype html&gt;')
