import shutil
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
from tiny import random_vit

from vitcut.circuit import Circuit
from vitcut.compact.operations import count_macs, dense_macs
from vitcut.compiler.cost import CostModel
from vitcut.compiler.emit import compile_circuit
from vitcut.compiler.planning import plan_circuit
from vitcut.compiler.settings import CutSettings
from vitcut.errors import CircuitError, ConfigError
from vitcut.images.load import Images, ImageSet, normalise
from vitcut.labels import Labels
from vitcut.masked.fill import zero_fill
from vitcut.masked.fitting import Fitter
from vitcut.model.model import Model
from vitcut.preprocessing import Preprocessing
from vitcut.runs import Run
from vitcut.selection import search as searching
from vitcut.selection.search import leave_images, search
from vitcut.selection.settings import Budget
from vitcut.selection.steps import PathStep, SearchPath
from vitcut.settings import as_plain
from vitcut.task import Task, TaskClass

WEIGHTS = random_vit(2, num_heads=3, hidden=6)
COSTS = CostModel(batch=8)
MACS = Budget(target_macs=0.4, rounds=3, score_images=8)
LATENCY = Budget(target_latency=0.5, score_images=8)
LINEAR = CutSettings(ablation="linear", images=16, memory_gib=64.0)
TASK = Task(
    name="tiny",
    classes=tuple(TaskClass(id=n, name=n, group="ab"[n > "1"]) for n in "0123"),
    groups=("a", "b"),
)
TAKEN = Preprocessing(image_size=WEIGHTS.image_size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
MODEL = Model(
    module=compile_circuit(
        WEIGHTS, Circuit.full(WEIGHTS.graph, ablation="zero"), zero_fill(WEIGHTS)
    ),
    name="tiny",
    weights=WEIGHTS,
    preprocessing=TAKEN,
    labels=None,
    weight_hash="0123",
)


def random_images(count: int = 40) -> Images:
    """As many for training as for choosing."""
    side = WEIGHTS.image_size
    array = np.random.default_rng(0).integers(0, 256, (2 * count, side, side, 3), np.uint8)
    labels = np.arange(2 * count) % 4
    train, val = (
        ImageSet(array=array, rows=rows, labels=labels[rows])
        for rows in np.split(np.arange(2 * count), 2)
    )
    return Images(
        task=TASK,
        train=train,
        val=val,
        test=val,
        preprocessing=TAKEN,
        labels=Labels(owner="the data", ids=TASK.class_ids, names=TASK.class_names),
        fingerprint="tiny images",
        origin={},
    )


class NotedRun(Run):
    """Notes what was made, not read back."""

    def __init__(self, path) -> None:
        path.mkdir(parents=True, exist_ok=True)
        (path / "config.yaml").touch()
        super().__init__(path)
        self.made = []

    def once(self, name, make, load):
        def noted():
            value = make()
            self.made.append(name)
            return value

        return super().once(name, noted, load)


def fitted_pixels(images: Images, count: int = LINEAR.images) -> torch.Tensor:
    return normalise(images.calibration(min(count, len(images.train)), seed=0).all(), TAKEN)


def found(path, budget=MACS, settings=LINEAR, *, images=None, fractions=None):
    """The circuit of a search, and the run."""
    images, run = images or random_images(), NotedRun(path)
    taken = fitted_pixels(images, settings.images)
    fitter = Fitter(WEIGHTS, lambda: taken, ridge=0.1, memory_gib=64.0)
    answers = search(
        MODEL, images, budget, settings, fitter, COSTS, run, threads=1, fractions=fractions
    )
    return answers[-1].circuit, run


def macs(circuit: Circuit) -> float:
    return count_macs(plan_circuit(WEIGHTS.shape, circuit, COSTS)) / dense_macs(WEIGHTS.shape)


def test_a_search_ends_within_its_budget_and_says_where_it_comes_from(tmp_path):
    circuit, _ = found(tmp_path)
    assert macs(circuit) <= 0.4
    assert (circuit.method, circuit.task, circuit.ablation) == ("fisher", "tiny", "linear")
    facts = circuit.provenance
    assert (facts["model"], facts["weight_hash"]) == ("tiny", "0123")
    assert facts["images_fingerprint"] == "tiny images"
    assert facts["selection"]["target_macs"] == 0.4
    assert facts["cut"] == as_plain(replace(LINEAR, costs=None))
    steps = SearchPath.load(tmp_path / "path.json").steps
    assert len(steps) == 3
    assert [step.macs_fraction for step in steps] == sorted(
        (step.macs_fraction for step in steps), reverse=True
    )
    assert steps[-1].macs_fraction == pytest.approx(macs(circuit))
    assert steps[-1].kl > 0
    assert PathStep.load(tmp_path / "path" / "macs-0.4000" / "step.json") == steps[-1]


@pytest.mark.parametrize("rescore", [True, False])
def test_a_search_goes_on_after_the_rounds_that_are_saved(tmp_path, rescore):
    budget = replace(MACS, rescore=rescore)
    whole, run = found(tmp_path / "whole", budget)
    first = run.made[:2]
    for name in first:
        (tmp_path / "part" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(tmp_path / "whole" / name, tmp_path / "part" / name)
    again, rest = found(tmp_path / "part", budget)
    assert again == whole
    assert rest.made == run.made[2:]
    # How long the first rounds took is unknown, unless they were made again.
    assert whole.provenance["seconds"] > 0
    assert (again.provenance["seconds"] is None) == rescore
    for name in ("path.json", *first):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_search_that_is_done_is_not_done_again(tmp_path, monkeypatch):
    circuit, _ = found(tmp_path)
    monkeypatch.setattr(searching, "Selection", None)
    again, run = found(tmp_path)
    assert again == circuit
    assert run.made == []


def test_a_walk_stops_at_predicted_latencies_and_times_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "measure_latency", None)
    circuit, _ = found(tmp_path, LATENCY, replace(LINEAR, ablation="mean"), fractions=(0.9, 0.8))
    steps = SearchPath.load(tmp_path / "path.json").steps
    assert [step.name for step in steps] == ["predicted-0.9000", "predicted-0.8000"]
    assert [step.latency_fraction for step in steps] == [None, None]
    circuits = [Circuit.load(tmp_path / step.circuit) for step in steps]
    assert circuits[-1] == circuit
    uncut = Circuit.full(WEIGHTS.split_graph)
    smooth = replace(COSTS, smooth=True)
    costs = [
        smooth.latency_ms(plan_circuit(WEIGHTS.shape, item, COSTS)) for item in (uncut, *circuits)
    ]
    assert costs[1] <= 0.9 * costs[0]
    assert costs[2] <= 0.8 * costs[0]


@pytest.mark.parametrize(
    ("count", "fitted", "scored"), [(100, 16, 8), (24, 16, 8), (20, 12, 8), (10, 5, 5)]
)
def test_parts_are_scored_on_images_that_no_fill_is_fitted_to(
    tmp_path, monkeypatch, capsys, count, fitted, scored
):
    seen, real = [], searching.Selection

    def selection(*args, pixels, **settings):
        seen.append(pixels)
        return real(*args, pixels=pixels, **settings)

    monkeypatch.setattr(searching, "Selection", selection)
    images = random_images(count)
    settings = leave_images(LINEAR, images, MACS)
    assert settings.images == fitted
    assert (f"fitted to {fitted} of {count} training images" in capsys.readouterr().err) == (
        fitted < 16
    )
    answers_of(tmp_path, replace(MACS, rounds=1), images=images, settings=settings)
    fit = fitted_pixels(images, fitted)
    assert len(seen[0]) == scored
    assert not any((fit == pixels).flatten(1).all(1).any() for pixels in seen[0])


def test_a_fit_to_all_training_images_leaves_none_to_score_parts_on(tmp_path):
    with pytest.raises(ConfigError, match=r"all 12 training images.*give fewer --images"):
        answers_of(tmp_path, MACS, images=random_images(12))


def test_one_training_image_cannot_be_mended_by_fewer_images(tmp_path):
    one = random_images(12)
    with pytest.raises(ConfigError, match=r"all 1 training images.*add training images"):
        answers_of(tmp_path, MACS, images=replace(one, train=one.train.take([0])))


def answers_of(path, budget, *, images=None, settings=LINEAR):
    images, run = images or random_images(), NotedRun(path)
    taken = fitted_pixels(images, settings.images)
    fitter = Fitter(WEIGHTS, lambda: taken, ridge=0.1, memory_gib=64.0)
    return search(MODEL, images, budget, settings, fitter, COSTS, run), run


def test_several_targets_are_one_path_with_a_circuit_each(tmp_path):
    budget = replace(MACS, target_macs=(0.6, 0.4, 0.3), rounds=2)
    answers, _ = answers_of(tmp_path, budget)
    assert [item.asked for item in answers] == [{"macs": 0.6}, {"macs": 0.4}, {"macs": 0.3}]
    assert [item.name for item in answers] == [f"fisher-linear-macs-{n}" for n in (0.6, 0.4, 0.3)]
    for item in answers:
        assert macs(item.circuit) <= item.asked["macs"]
    for larger, smaller in pairwise(answers):
        assert not (smaller.circuit.neurons & ~larger.circuit.neurons).any()
    path = SearchPath.load(tmp_path / "path.json")
    assert path.answers == ("macs-0.6000", "macs-0.4000", "macs-0.3000")
    # No step is steeper than two steps to the last target would be.
    fractions = [float(step.name.removeprefix("macs-")) for step in path.steps]
    assert [name for name in (step.name for step in path.steps) if name in path.answers] == list(
        path.answers
    )
    assert min(after / before for before, after in pairwise(fractions)) >= 0.3**0.5


def test_a_drop_is_approached_from_both_sides(tmp_path, monkeypatch):
    """Whether a cut holds is up to its size here: above 55 % of the MACs it does."""

    def interval(correct, reference, *, seed):
        return (-0.05, 0.0) if noted[-1] > 0.55 else (-0.2, 0.0)

    noted, real = [], searching.count_macs

    def count(plan):
        noted.append(real(plan) / dense_macs(WEIGHTS.shape))
        return real(plan)

    monkeypatch.setattr(searching, "count_macs", count)
    monkeypatch.setattr(searching, "paired_interval", interval)
    budget = Budget(max_drop=10.0, score_images=8)
    [answer], run = answers_of(tmp_path / "whole", budget)
    path = SearchPath.load(tmp_path / "whole" / "path.json")
    steps = {step.name: step for step in path.steps}
    chosen = steps[path.answers[0]]
    assert 0.55 < chosen.macs_fraction < 0.62
    assert macs(answer.circuit) == pytest.approx(chosen.macs_fraction)
    failed = [step.macs_fraction for step in path.steps if step.change_low < -0.1]
    assert max(failed) <= 0.55
    assert answer.asked == {"max_drop": 10.0}
    # Killed after some files, also between steps that fail and hold, it goes on to the same end.
    for done in range(1, len(run.made) - 1, 3):
        part = tmp_path / f"part-{done}"
        for name in run.made[:done]:
            (part / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tmp_path / "whole" / name, part / name)
        [again], rest = answers_of(part, budget)
        assert again.circuit == answer.circuit
        assert rest.made == run.made[done:]


def test_a_drop_that_no_cut_holds_names_the_nearest(tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "paired_interval", lambda *_, **__: (-0.9, 0.0))
    with pytest.raises(CircuitError, match=r"no cut loses less than 10 points for certain"):
        answers_of(tmp_path, Budget(max_drop=10.0, score_images=8))


def test_too_few_val_images_to_show_a_drop_are_refused_with_what_they_can_show(tmp_path):
    with pytest.raises(ConfigError, match=r"decided on 40 val images: .* loss of 7\.5 po"):
        answers_of(tmp_path, Budget(max_drop=1.0, score_images=8))


def test_a_search_that_needs_more_memory_than_allowed_computes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(searching, "Selection", None)
    with pytest.raises(ConfigError, match="fills of 16 images and scores of 8 needs about"):
        answers_of(tmp_path, MACS, settings=replace(LINEAR, memory_gib=0.1))
    assert not list(tmp_path.glob("path*"))


def test_a_path_is_measured_on_as_many_val_images_as_asked(tmp_path, monkeypatch):
    counts, real = [], searching.evaluate

    def noted(module, images, *args, **settings):
        counts.append(len(images))
        return real(module, images, *args, **settings)

    monkeypatch.setattr(searching, "evaluate", noted)
    answers_of(tmp_path, replace(MACS, rounds=1, val_images=12))
    assert counts == [12, 12]
