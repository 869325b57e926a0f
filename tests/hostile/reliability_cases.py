"""Bit flips, forged artefacts and kills, counted; a few in the default run, all in the slow one.

Every case runs the public functions on tiny models and generated pictures, and ends in one word:
``refused`` (one line of ours), ``same`` (the result of an undisturbed run), or what went wrong.
"""

import json
import os
import shutil
import signal
import sys
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from forging import forge
from PIL import Image

import vitcut
from vitcut.circuit import Circuit
from vitcut.compiler.cost import CostModel
from vitcut.compiler.cut import Cut
from vitcut.errors import VitcutError
from vitcut.images.drawn import drawn_images
from vitcut.model.model import Model, weight_hash
from vitcut.model.settings import VitSettings
from vitcut.reports.pictures import Pictures
from vitcut.results import Results
from vitcut.store import hash_of_read
from vitcut.tensors import read_tensors, write_tensors
from vitcut.training.checkpoint import read_training
from vitcut.training.repair import Repair
from vitcut.training.settings import TrainSettings, TransferSettings

GROUPS = {"plain": {"disc": "disc", "square": "square"}, "striped": {"grid": "grid"}}
VIT = VitSettings(patch_size=8, width=16, depth=2, num_heads=2, mlp_ratio=2.0)
TRAIN = TrainSettings(
    epochs=3,
    batch_size=16,
    warmup_epochs=1,
    learning_rate=0.005,
    augmentation="none",
    compile=False,
    precision="float32",
    device="cpu",
)
FINETUNE = vitcut.FinetuneSettings(
    epochs=2,
    batch_size=16,
    augmentation="none",
    compile=False,
    precision="float32",
    device="cpu",
)
CUT = vitcut.CutSettings(images=32, verify_images=8)
BENCH = vitcut.BenchSettings(
    runtimes=("torch",), batches=(1,), seconds=0.01, min_rounds=3, min_sample_ms=0.05
)
BUDGET = vitcut.Budget(target_macs=0.6, rounds=2, score_images=24, val_images=16)
_TIMES = {
    "seconds", "train_seconds", "images_per_s", "latency", "comparisons", "machine", "sha256",
}  # fmt: skip
"""What differs from run to run, and hashes over it."""


@dataclass(frozen=True)
class Lab:
    """Where everything lies; the pictures are of three classes in a .zip."""

    root: Path

    @classmethod
    def make(cls, root: Path) -> "Lab":
        """Draw the pictures, and run every stage once, undisturbed."""
        lab = cls(root)
        pixels, ids = drawn_images(images_per_class=30, seed=0, image_size=16)
        with zipfile.ZipFile(root / "pictures.zip", "w") as archive:
            for number, (image, own) in enumerate(zip(pixels, ids, strict=True)):
                if own in {"disc", "square", "grid"}:
                    stream = BytesIO()
                    Image.fromarray(image).save(stream, "PNG")
                    archive.writestr(f"{own}/{number}.png", stream.getvalue())
        (root / "task.yaml").write_text(yaml.safe_dump({"name": "shapes", "groups": GROUPS}))
        os.environ["VITCUT_CACHE"] = str(root / "cache")
        for name, stage in STAGES.items():
            stage(lab, root / name)
        CostModel().save(root / "costs.json")
        return lab

    def images(self, model: Any = None, **more: Any) -> Any:
        """The pictures, for a model or for training one."""
        return vitcut.load_images(
            self.root / "pictures.zip", task=self.root / "task.yaml", model=model, **more
        )


def _prepare(lab: Lab, out: Path) -> None:
    os.environ["VITCUT_CACHE"] = str(out)
    try:
        lab.images(image_size=16)
    finally:
        os.environ["VITCUT_CACHE"] = str(lab.root / "cache")


def _train(lab: Lab, out: Path) -> Any:
    return vitcut.train(lab.images(image_size=16), vit=VIT, settings=TRAIN, out=out)


def _dense(lab: Lab) -> tuple[Any, Any]:
    model = vitcut.load_model(lab.root / "train")
    return model, lab.images(model)


def _probe(lab: Lab, out: Path) -> Any:
    model = vitcut.load_model(lab.root / "train")
    images = lab.images(model, new_head=True)
    return vitcut.train(images, model=model, transfer=TransferSettings(freeze="backbone"), out=out)


def _discover(lab: Lab, out: Path) -> Any:
    settings = vitcut.DiscoverSettings(images=8, tau=0.003)
    return vitcut.discover(*_dense(lab), settings=settings, out=out)


def _cut(lab: Lab, out: Path) -> Any:
    return vitcut.cut(*_dense(lab), budget=BUDGET, settings=CUT, bench=BENCH, out=out)


def _finetune(lab: Lab, out: Path) -> Any:
    cut = lab.root / "cut"
    return vitcut.finetune(cut, *_dense(lab), settings=FINETUNE, bench=BENCH, out=out)


Stage = Callable[[Lab, Path], Any]
STAGES: dict[str, Stage] = {
    "prepare": _prepare,
    "train": _train,
    "probe": _probe,
    "discover": _discover,
    "cut": _cut,
    "finetune": _finetune,
}
KILLED = ("prepare", "train", "discover", "cut", "finetune")


# What a file means to whoever reads it


def _plain(value: Any) -> Any:
    """JSON values without times."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items() if key not in _TIMES}
    return [_plain(item) for item in value] if isinstance(value, list) else value


def contents(folder: Path) -> dict[str, Any]:
    """Every file of a directory by name, as what it holds but for times."""
    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() or path.name == "README.md":
            found[name] = None
        elif path.suffix == ".jsonl":
            found[name] = [_plain(json.loads(line)) for line in path.read_text().splitlines()]
        elif path.suffix == ".json":
            found[name] = _plain(json.loads(path.read_text()))
        elif path.parent.name == "checkpoints":
            tensors, facts = read_tensors(path, kind="checkpoint", version=2)
            facts = [{k: v for k, v in row.items() if k not in _TIMES} for row in facts["epochs"]]
            found[name] = {key: tensor.tolist() for key, tensor in tensors.items()}, facts
        else:
            found[name] = hash_of_read(path.read_bytes().hex())
    return found


def _cut_of(folder: Path) -> Any:
    found = Cut.load(folder)
    facts = found.circuit, found.exactness, found.faithfulness, found.name, found.budget
    fill = found.read_fill()
    fill = None if fill is None else fill.fingerprint
    return weight_hash(found.model), found.model.plan, found.model.info, fill, *facts


def _model_of(folder: Path) -> Any:
    found = Model.load(folder)
    return found.weight_hash, found.preprocessing, found.labels and found.labels.ids


def _config_of(lab: Lab, folder: Path) -> Any:
    """A directory's settings are read by the command that goes on, and by those that use it."""
    _train(lab, folder)
    model = vitcut.load_model(folder)
    images = vitcut.load_images(model=model)
    return model.weight_hash, model.preprocessing, images.fingerprint, images.task


def _cache_of(lab: Lab) -> Any:
    prepared = lab.images(image_size=16)
    sets = prepared.train, prepared.val, prepared.test
    return prepared.fingerprint, [(one.all().tolist(), one.labels.tolist()) for one in sets]


@dataclass(frozen=True)
class Kind:
    """A kind of file, and what reads it: from an undisturbed directory, or one half done."""

    file: str
    """Within the directory of the stage."""
    stage: str
    read: Callable[[Lab, Path], Any]
    undone: tuple[str, ...] = ()
    """What is removed from the directory, so that the stage has to go on from the file."""
    change: Callable[[Path], None] = lambda folder: None


def _again(stage: str) -> Callable[[Lab, Path], Any]:
    """Run a stage again; the result is all that lies there then."""

    def read(lab: Lab, folder: Path) -> Any:
        STAGES[stage](lab, folder)
        # What was altered may lie there still, but the result does not depend on it.
        skipped = {"README.md", "training.json"}
        return {k: v for k, v in contents(folder).items() if Path(k).name not in skipped}

    return read


def _unfinished(folder: Path) -> None:
    forge(folder / "training.json", lambda content: content.update(result=None))


def kinds(lab: Lab) -> dict[str, Kind]:
    """Every kind of file that is read again, by name."""
    [key] = [path.name for path in (lab.root / "cache" / "data").iterdir()]
    step = sorted(path.name for path in (lab.root / "cut" / "path").iterdir())[0]
    log = "points/acdc-mean-0.003"
    cut, train = _again("cut"), _again("train")
    unfinished = {"undone": ("dense",), "change": _unfinished}
    read = {
        "cache: images.npy": Kind(f"data/{key}/images.npy", "cache", lambda lab, _: _cache_of(lab)),
        "cache: index.parquet": Kind(
            f"data/{key}/index.parquet", "cache", lambda lab, _: _cache_of(lab)
        ),
        "cache: meta.json": Kind(f"data/{key}/meta.json", "cache", lambda lab, _: _cache_of(lab)),
        "config.yaml": Kind("config.yaml", "train", _config_of),
        "training.json": Kind("training.json", "train", lambda _, at: read_training(at)),
        "metrics.jsonl": Kind("metrics.jsonl", "train", train, **unfinished),
        "last.safetensors": Kind("checkpoints/last.safetensors", "train", train, **unfinished),
        "best.safetensors": Kind("checkpoints/best.safetensors", "train", train, ("dense",)),
        "dense: config.json": Kind("dense/config.json", "train", lambda _, at: _model_of(at)),
        "dense: model.safetensors": Kind(
            "dense/model.safetensors", "train", lambda _, at: _model_of(at)
        ),
        "features.safetensors": Kind("features.safetensors", "probe", _again("probe"), ("dense",)),
        "decisions.jsonl": Kind(
            f"{log}/decisions.jsonl", "discover", _again("discover"), (f"{log}/circuit.json",)
        ),
        "circuit.json": Kind(
            f"{log}/circuit.json", "discover", lambda _, at: Circuit.load(at / log / "circuit.json")
        ),
        "path: circuit.json": Kind(f"path/{step}/circuit.json", "cut", cut, ("path.json", "model")),
        "path: step.json": Kind(f"path/{step}/step.json", "cut", cut, ("path.json", "model")),
        "path.json": Kind("path.json", "cut", cut, ("model",)),
        "results.json": Kind(
            "results.json", "cut", lambda _, at: Results.load(at / "results.json")
        ),
        "repair.json": Kind(
            "repair.json", "finetune", lambda _, at: Repair.load(at / "repair.json")
        ),
        "pictures.json": Kind(
            "pictures.json", "cut", lambda _, at: Pictures.load(at / "pictures.json")
        ),
        "costs.json": Kind("costs.json", ".", lambda _, at: CostModel.load(at / "costs.json")),
    }
    parts = ("config.json", "model.safetensors", "circuit.json", "fill.safetensors", "cut.json")
    for name in parts:
        read[f"model: {name}"] = Kind(f"model/{name}", "cut", lambda _, at: _cut_of(at / "model"))
    return read


def _outcome(read: Callable[[], Any], whole: Any) -> str:
    """What reading something disturbed came to."""
    try:
        return "same" if read() == whole else "SILENT"
    except VitcutError as error:
        return "refused" if "\n" not in str(error) else "TWO LINES"
    except Exception as error:
        return f"TRACEBACK {type(error).__name__}: {error}"


def _copy(lab: Lab, kind: Kind) -> Path:
    """A fresh copy of a stage's directory, in which something is undone."""
    # In place: run directories record absolute paths.
    folder, spare = lab.root / kind.stage, lab.root / f"{kind.stage}.spare"
    if kind.stage == ".":
        return folder
    if not spare.exists():
        shutil.copytree(folder, spare)
    shutil.rmtree(folder)
    shutil.copytree(spare, folder)
    for name in kind.undone:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    kind.change(folder)
    return folder


def _restore(lab: Lab, kind: Kind) -> None:
    spare = lab.root / f"{kind.stage}.spare"
    if spare.exists():
        shutil.rmtree(lab.root / kind.stage)
        spare.rename(lab.root / kind.stage)


def flips(lab: Lab, *, each: int, only: tuple[str, ...] = ()) -> Iterator[tuple[str, str]]:
    """Flip single bits of each kind of file: its name and the outcome."""
    drawn = np.random.default_rng(0)
    for name, kind in kinds(lab).items():
        if only and name not in only:
            continue
        whole = kind.read(lab, _copy(lab, kind))
        for _ in range(each):
            folder = _copy(lab, kind)
            path = folder / kind.file
            content = bytearray(path.read_bytes())
            original = bytes(content)
            place = int(drawn.integers(8 * len(content)))
            content[place // 8] ^= 1 << place % 8
            path.write_bytes(content)
            yield name, _outcome(lambda: kind.read(lab, folder), whole)  # noqa: B023
            path.write_bytes(original) if path.exists() else None
        _restore(lab, kind)


# Forged artefacts: the right hashes around values that cannot be


def _leaves(value: Any, place: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Any]]:
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in inner:
        if isinstance(item, (dict, list)):
            yield from _leaves(item, (*place, key))
        else:
            yield (*place, key), item


def _set(content: Any, place: tuple[Any, ...], value: Any) -> None:
    for key in place[:-1]:
        content = content[key]
    content[place[-1]] = value


_FREE = {"eps", "seconds", "machine", "provenance", "task", "settings", "final_norm", "name"}
"""A forger who changes these makes another artefact, which nothing contradicts."""


def forgeries(lab: Lab, *, most: int = 1000) -> Iterator[tuple[str, str]]:
    """Change values of files and mend their hashes: the kind of file and the outcome."""
    found = kinds(lab)
    forged = {
        "model: config.json": None,
        "model: cut.json": None,
        "model: circuit.json": None,
        "results.json": None,
        "repair.json": None,
        "pictures.json": None,
        "path.json": None,
        "path: step.json": None,
        "training.json": None,
        "config.yaml": None,
        "cache: meta.json": None,
        "circuit.json": None,
        "costs.json": None,
    }
    for name in forged:
        kind = found[name]
        path = _copy(lab, kind) / kind.file
        text = path.read_text()
        content = yaml.safe_load(text) if path.suffix == ".yaml" else json.loads(text)
        whole = kind.read(lab, path.parents[len(Path(kind.file).parts) - 1])
        changes = list(_changes(name, content))
        step = max(1, len(changes) // most)
        for place, value in changes[::step][:most]:
            folder = _copy(lab, kind)
            before = (folder / kind.file).read_bytes()
            forge(folder / kind.file, lambda c: _set(c, place, value))  # noqa: B023
            outcome = _outcome(lambda: kind.read(lab, folder), whole)  # noqa: B023
            yield name, outcome if outcome in {"refused", "same"} else f"{outcome} {place} {value}"
            if (folder / kind.file).exists():
                (folder / kind.file).write_bytes(before)
        _restore(lab, kind)


def _changes(name: str, content: dict[str, Any]) -> Iterator[tuple[tuple[Any, ...], Any]]:
    """Impossible values for the places of a file."""
    yield ("more",), 1
    for place, value in _leaves(content):
        free = _FREE & set(place) or place[0] in {"sha256", "format_version"}
        if isinstance(value, str) and place[-1] in {"circuit", "model"}:
            yield place, f"../../{value}"
        if free and not ({"machine", "provenance"} & set(place)):
            yield place, {"of": "another type"}
        elif not free:
            yield place, [value]
            if isinstance(value, bool):
                yield place, int(value)
            elif isinstance(value, int):
                yield place, -1 - value
                yield place, 10**30
            elif isinstance(value, float):
                yield place, float("1e400")


def tensor_forgeries(lab: Lab) -> Iterator[tuple[str, str]]:
    """The same for tensors: other shapes, types and names, and numbers that are not finite."""
    found = kinds(lab)
    for name, title in (
        ("last.safetensors", "checkpoint"),
        ("best.safetensors", "checkpoint"),
        ("features.safetensors", "features"),
        ("model: fill.safetensors", "fill"),
    ):
        kind = found[name]
        whole = kind.read(lab, _copy(lab, kind))
        for change in (
            lambda t: t.flatten()[:-1].clone(),
            lambda t: t.double().long(),
            lambda t: t.double() * float("nan"),
            lambda t: t.unsqueeze(0).clone(),
            None,
        ):
            folder = _copy(lab, kind)
            path = folder / kind.file
            version = 3 if title == "fill" else 2
            tensors, facts = read_tensors(path, kind=title, version=version)
            key = max(tensors, key=lambda key: tensors[key].numel())
            changed = tensors.pop(key)
            if change is not None:
                tensors[key] = change(changed)
            write_tensors(path, tensors, facts, version=version)
            yield name, _outcome(lambda: kind.read(lab, folder), whole)  # noqa: B023
        _restore(lab, kind)


# Kills


def _in_child(work: Callable[[], Any]) -> int:
    """Run something in a forked process; the signal that ended it, or 0, or its exit code."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        except VitcutError as error:
            sys.stderr.write(f"{error}\n")
            code = 2
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


_EVENTS = {"open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "shutil.rmtree", "os.chmod"}


def kills(lab: Lab, *, each: int, only: tuple[str, ...] = KILLED) -> Iterator[tuple[str, str]]:
    """Kill each stage at points that are spread over what it does to its files: the outcomes."""
    for stage in only:
        folder = lab.root / stage
        spare = folder.rename(lab.root / f"{stage}.spare")
        counted = lab.root / "events"

        def run(last: int | None) -> None:
            seen = 0

            def watch(event: str, details: tuple[Any, ...]) -> None:
                nonlocal seen
                if event in _EVENTS and str(details[0]).startswith(str(folder)):  # noqa: B023
                    seen += 1
                    if seen == last:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(watch)
            STAGES[stage](lab, folder)  # noqa: B023
            counted.write_text(str(seen))  # noqa: B023

        assert _in_child(lambda: run(None)) == 0
        whole = contents(folder)
        events = int(counted.read_text())
        shutil.rmtree(folder)
        for number in range(each):
            last = 1 + round(number * (events - 1) / max(each - 1, 1))
            ended = _in_child(lambda: run(last))  # noqa: B023
            again = _in_child(lambda: run(None))
            outcome = "same" if contents(folder) == whole else "DIFFERENT"
            if again:
                outcome = f"REFUSED with {again}"
            yield stage, outcome if ended == -signal.SIGKILL else f"NOT KILLED, {ended}"
            shutil.rmtree(folder)
        spare.rename(folder)


def table(title: str, counted: Counter[tuple[str, str]]) -> str:
    """Raw counts as Markdown: one row per kind."""
    outcomes = sorted({outcome.split(" ")[0] for _, outcome in counted}, key=str.lower)
    rows: dict[str, Counter[str]] = {}
    for (name, outcome), number in counted.items():
        rows.setdefault(name, Counter())[outcome.split(" ")[0]] += number
    lines = [f"| {title} | cases | {' | '.join(outcomes)} |"]
    lines.append("|---" + "|---:" * (1 + len(outcomes)) + "|")
    rows["all"] = sum(rows.values(), Counter())
    for name, own in rows.items():
        cells = " | ".join(str(own[outcome]) for outcome in outcomes)
        lines.append(f"| {name} | {own.total()} | {cells} |")
    return "\n".join(lines) + "\n"
