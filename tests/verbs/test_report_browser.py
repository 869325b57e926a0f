"""The report in a real browser; skips where there is none."""

import base64
import io
import json
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
from chromium import open_browser, until
from PIL import Image

import vitcut
from vitcut.circuit import Circuit
from vitcut.compact.model import CompactViT
from vitcut.graph import Graph
from vitcut.reports.pictures import Picture, Pictures
from vitcut.results import Point, Results
from vitcut.runs import Run

STEPS = """() => {
    const slider = document.querySelector("#point"), times = [];
    for (let i = 0; i <= 3 * slider.max; i++) {
        const start = performance.now();
        slider.value = i % (1 + +slider.max);
        slider.dispatchEvent(new Event("input"));
        times.push(performance.now() - start);
    }
    return times;
}"""


@pytest.fixture(scope="module")
def browser():
    with open_browser() as opened:
        yield opened


@pytest.fixture
def open_report(browser, tmp_path):
    """Opens the report of runs; at the end there must be no error and one request."""
    requests, errors = [], []
    context = browser.new_context(viewport={"width": 1280, "height": 900})

    def opened(*runs, **how):
        vitcut.report(list(runs), out=tmp_path / "report.html", **how)
        page = context.new_page()
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: errors.append(message.text))
        page.on("pageerror", lambda error: errors.append(str(error)))
        page.goto((tmp_path / "report.html").as_uri())
        return page

    yield opened
    assert errors == []
    assert requests == [(tmp_path / "report.html").as_uri()]
    context.close()


def _facts(page):
    pairs = page.eval_on_selector_all(
        "#facts > div", "all => all.map(d => [d.children[0].textContent, d.children[1].innerText])"
    )
    return {name: value.split("\n") for name, value in pairs}


def _go(page, position):
    page.locator("#point").evaluate(
        "(s, to) => { s.value = to; s.dispatchEvent(new Event('input')); }", position
    )


def test_every_point_shows_its_numbers_in_results_json(open_report, finished):
    page = open_report(finished)
    results = json.loads((finished / "results.json").read_text())
    points = {p["name"]: p for p in [results["dense"], *results["points"]]}
    seen = set()
    for position in range(int(page.locator("#point").get_attribute("max")) + 1):
        _go(page, position)
        name = page.locator("#view").inner_text().rpartition(" (")[0]
        seen.add(name)
        facts, point = _facts(page), points[name]
        assert facts["coarse accuracy"][0] == f"{100 * point['accuracy_coarse']:.1f} %"
        assert facts["edges kept"] == [str(point["edges_kept"]), f"of {point['edges_total']}"]
        assert facts["heads kept"] == [str(point["heads_kept"]), f"of {point['heads_total']}"]
        [latency] = point["latency"]
        assert float(facts["latency"][0].removesuffix(" ms")) == pytest.approx(
            latency["median_ms"], abs=0.05
        )
        assert page.locator("#shown").inner_text().startswith(f"{point['edges_kept']} of 46 edges")
        assert page.locator("tr.current th").first.inner_text() == name
    assert seen == points.keys()


def test_a_click_on_a_node_shows_its_edges_and_its_points(open_report, finished):
    page, name = open_report(finished), "acdc-resample-0.001"
    circuit = Circuit.load(finished / "points" / name / "model" / "circuit.json")
    last = int(page.locator("#point").get_attribute("max"))
    for position in range(last + 1):
        _go(page, position)
        if page.locator("#view").inner_text().startswith(f"{name} ("):
            break
    page.locator(".node.classifier").click()
    panel = page.locator("#panel").inner_text()
    kept = int(circuit.kept[:, -1].sum())
    assert "Classifier" in panel
    assert f"Edges in: {kept} of 7 kept" in panel
    assert "kept at 4 of 4 points" in panel
    assert "KL RISE" in panel.upper()


def test_a_head_shows_where_it_looks_and_a_point_what_it_answers_otherwise(open_report, finished):
    page = open_report(finished)
    told = json.loads((finished / "pictures.json").read_text())
    page.locator(".node.head").first.click()
    assert page.locator("#maps canvas").count() == 6
    until(
        lambda: page.evaluate(
            "[...document.querySelectorAll('#maps canvas')].every(c => "
            "c.getContext('2d').getImageData(0, 0, 168, 168).data.some(v => v > 9 && v < 255))"
        )
    )
    for position in range(int(page.locator("#point").get_attribute("max")) + 1):
        _go(page, position)
        name = page.locator("#view").inner_text().rpartition(" (")[0]
        if name in told["points"][1:]:
            total = told["changed"][told["points"].index(name)]
            assert re.match(
                rf"On {total} of \d+ test images", page.locator("#changed").inner_text()
            )
    page.locator(".node.mlp").first.click()
    assert page.locator("#maps").count() == 0


def test_the_page_opens_at_the_verdict_and_without_empty_sections(open_report, finished, tmp_path):
    page = open_report(finished)
    results = json.loads((finished / "results.json").read_text())
    cuts = [point for point in results["points"] if point["name"] != "class-only"]
    within = [point for point in cuts if point["change_high"] >= 0]
    best = max(cuts, key=lambda p: p["accuracy_coarse"])
    best = min(within, key=lambda p: p["macs"]) if within else best
    assert page.locator("#view").inner_text().startswith(f"{best['name']} (")


def test_where_nothing_was_measured_no_heading_is_empty(open_report, finished, tmp_path):
    (tmp_path / "circuits").mkdir()
    (tmp_path / "circuits" / "points").symlink_to(finished / "points")
    page = open_report(tmp_path / "circuits")
    headings = page.locator("h2:visible").all_inner_texts()
    assert headings == ["A node", "To make it again", "What this page does not hold"]


def test_the_keyboard_alone_reaches_points_nodes_and_search(open_report, finished):
    page = open_report(finished)
    before = page.locator("#view").inner_text()
    page.keyboard.press("ArrowLeft")
    assert page.locator("#view").inner_text() != before
    page.keyboard.press("/")
    page.keyboard.type("mlp.1")
    assert page.locator(".node.found").count() == 1
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").inner_text() == "MLP of block 1"
    page.keyboard.press("ArrowLeft")  # now on the node
    page.keyboard.press("Enter")
    assert page.locator("#panel h2").inner_text() in {"Head 1 of block 1", "MLP of block 0"}
    page.keyboard.press("Escape")
    assert page.locator("#panel h2").inner_text() == "A node"


def test_a_step_of_the_slider_takes_less_than_a_blink_at_3628_edges(open_report, tmp_path):
    graph = Graph(num_layers=6, num_heads=8)
    assert graph.num_edges == 3628
    chance, run = np.random.default_rng(0), tmp_path / "run"
    for number, share in enumerate((0.9, 0.6, 0.3)):
        kept = graph.edges & (chance.random(graph.edges.shape) < share)
        circuit = Circuit(graph=graph, kept=kept, ablation="mean", method="acdc", tau=0.01 + number)
        circuit.save(run / "points" / f"acdc-{number}" / "circuit.json")
    page = open_report(run)
    assert np.median(page.evaluate(STEPS)) < 200  # 10 ms measured; CI machines are shared


@pytest.mark.graph
def test_a_dropped_picture_gets_the_answer_that_the_cut_model_gives(
    open_report, finished, tmp_path
):
    shade = np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)
    Image.fromarray(shade).save(tmp_path / "picture.png")
    page = open_report(finished, with_model=True)
    policy = page.locator("meta[http-equiv]").get_attribute("content")
    script = policy.partition("script-src ")[2].partition(";")[0]
    assert re.fullmatch(r"'sha256-\S+' 'sha256-\S+' 'wasm-unsafe-eval'", script)
    name = page.locator("#view").inner_text().rpartition(" (")[0]
    _go(page, 0)
    page.set_input_files("#picture", tmp_path / "picture.png")
    page.wait_for_selector("#answer .bars", timeout=60_000)
    told = page.locator("#answer .bar-row").all_inner_texts()
    model = CompactViT.from_pretrained(finished / "points" / name / "model")
    [answer] = vitcut.predict(model, [tmp_path / "picture.png"])
    for row, group in zip(told, answer.groups, strict=True):
        assert row.split("\n") == [group[0], f"{100 * group[1]:.1f} %"]
    # The page goes to the point whose model it holds; what wrote most has the full colour.
    assert page.locator("#view").inner_text().startswith(f"{name} (")
    fills = ".node.head .fill, .node.mlp .fill"
    shares = page.eval_on_selector_all(
        fills, "all => all.map(f => +f.getAttribute('fill-opacity'))"
    )
    assert (min(shares), max(shares)) == (0, 1)
    page.set_input_files("#picture", finished / "results.json")
    page.wait_for_selector("#answer .wrong")
    assert page.locator("#answer").inner_text() == (
        "This browser cannot read that file as a picture."
    )


def test_kept_patches_are_drawn_on_their_grid(open_report, tmp_path):
    graph, positions = Graph(num_layers=2, num_heads=2), np.arange(16) < 4
    circuit = replace(Circuit.full(graph), positions=positions)
    circuit.save(tmp_path / "run" / "points" / "some" / "circuit.json")
    page = open_report(tmp_path / "run")
    assert "4 of 16 patches are kept" in page.locator("main").inner_text()
    rows = page.locator("#positions canvas").evaluate(
        "c => { const { data } = c.getContext('2d').getImageData(80, 0, 1, 168);"
        "return [10, 60, 110, 160].map(y => data[4 * y]); }"
    )
    assert rows[0] > 200
    assert max(rows[1:]) < 100


def test_text_from_outside_is_shown_as_text(open_report, tmp_path):
    name = "<img src=x onerror=alert(1)>"
    run = tmp_path / "run"
    Run(run).claim({"images": {"task": {"name": name, "groups": {name: {}}}}})
    point = Point(name=name, accuracy_coarse=1.0, images=2, confusion=((2,),))
    Results(task=name, machine={"cpu": name}, dense=point).save(run / "results.json")
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "WEBP")
    drawn = base64.b64encode(file.getvalue()).decode()
    picture = Picture(image=drawn, group=0, answers=(0,), probabilities=(1.0,))
    nothing = {"changed": (0,), "gained": (0,), "lost": (0,), "attention": None}
    told = Pictures(groups=(name,), points=(name,), pictures=(picture,), **nothing)
    told.save(run / "pictures.json")
    page = open_report(run)
    assert page.locator("img").count() == page.locator("#pictures img").count() == 1
    assert page.locator("main").inner_text().count(name) >= 6


def test_runs_side_by_side_share_a_chart(open_report, finished, tmp_path):
    shutil.copytree(finished, tmp_path / "other")
    page = open_report(finished, tmp_path / "other")
    assert page.locator("#accuracy .mark").count() == 8
    assert "The runs side by side" in page.locator("#tables").inner_text()
    page.locator(".bar select").first.select_option(index=1)
    assert page.locator(".eyebrow").inner_text().startswith("other")
