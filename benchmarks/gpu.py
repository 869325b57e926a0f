"""Measure dense, class-only and cut models on a GPU; writes docs/benchmarks/gpu.

    PYTHONPATH=src python benchmarks/gpu.py                  # everything, in 8 minutes
    PYTHONPATH=src python benchmarks/gpu.py --device cpu --quick
    PYTHONPATH=src python benchmarks/gpu.py --make-plans deit_small_patch16_224

Needs no network: weights are random, which changes no time, and what is kept of each model is read
from ``docs/benchmarks/gpu/plans``. Packages that the machine lacks are also looked for in a folder
``vendor``, in the checkout or beside it. A part that fails is recorded, and so is what the time
did not suffice for; the raw file is written after every step.
"""

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from gpu_page import write_page
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
sys.path += [str(path / "vendor") for path in (ROOT, ROOT.parent) if (path / "vendor").is_dir()]
sys.path.insert(0, str(ROOT / "src"))

PAGE = ROOT / "docs" / "benchmarks" / "gpu"
PLANS = PAGE / "plans"
MODELS = ("deit_small_patch16_224", "vit_base_patch16_224", "vit_tiny_patch16_224")
FRACTIONS = (0.5, 0.3, 0.15)
BATCHES = (256, 1, 64, 1024, 8)
"""The order is that of their worth: time may run out."""
COMPILED = (
    ("deit_small_patch16_224", 256, "max-autotune", ("dense", "class-only", "0.3", "0.15", "0.5")),
    ("deit_small_patch16_224", 1, "reduce-overhead", ("dense", "0.3", "0.15")),
    ("vit_base_patch16_224", 256, "max-autotune", ("dense", "0.3")),
    ("vit_tiny_patch16_224", 256, "reduce-overhead", ("dense", "0.3", "0.15")),
    ("vit_base_patch16_224", 1, "reduce-overhead", ("dense", "0.3")),
    ("deit_small_patch16_224", 64, "reduce-overhead", ("dense", "0.3")),
    ("deit_small_patch16_224", 1024, "reduce-overhead", ("dense", "0.3")),
)
"""What is compiled, in the order of its worth. Both modes use CUDA graphs; max-autotune also tries
out kernels, which takes up to a minute for each model and batch size."""
COMPILE_S = 75
"""No compilation is begun with less time left."""
VERBS_S = 100
"""Time kept for the commands."""
QUICK = {"name": "vit_tiny_patch16_224", "size": 32, "batches": (4, 1)}


class Record:
    """The raw file: everything that was measured, that failed, and that was left out."""

    def __init__(self, path: Path, seconds: float, facts: dict[str, Any]) -> None:
        self.path, self.end = path, time.monotonic() + seconds
        kinds = ("models", "exactness", "times", "commands", "failures", "skipped")
        self.content: dict[str, Any] = {**facts, **{kind: [] for kind in kinds}}

    @property
    def left_s(self) -> float:
        """Seconds that are left."""
        return self.end - time.monotonic()

    def add(self, kind: str, **facts: Any) -> None:
        """Note something, and write the file."""
        self.content[kind].append(facts)
        self.content["seconds"] = round(self.content["minutes"] * 60 - self.left_s, 1)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        part = self.path.with_suffix(".part")
        part.write_text(json.dumps(self.content, indent=1) + "\n", encoding="utf-8")
        part.replace(self.path)
        sys.stderr.write(f"{kind}: {json.dumps(facts)[:300]}\n")

    @contextmanager
    def part(self, name: str, *, least_s: float = 0.0) -> Iterator[None]:
        """A piece of work that may fail; its body asks for `least_s` with `has`."""
        start = time.monotonic()
        try:
            if self.left_s < least_s:
                raise TimeoutError(f"{self.left_s:.0f} s were left, {least_s:.0f} are needed")
            yield
        except TimeoutError as error:
            self.add("skipped", part=name, reason=str(error))
        except Exception as error:
            told = traceback.format_exc().splitlines()[-12:]
            self.add("failures", part=name, error=f"{type(error).__name__}: {error}", trace=told)
        finally:
            sys.stderr.write(f"{name}: {time.monotonic() - start:.1f} s\n")


def main() -> None:
    """Measure what the time allows."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, default=8.0, help="For everything.")
    parser.add_argument("--quick", action="store_true", help="Tiny sizes, to try the script.")
    parser.add_argument("--out", type=Path, default=None, help="The raw file.")
    parser.add_argument("--make-plans", metavar="MODEL", default=None, help="A timm name.")
    parser.add_argument("--circuit", type=Path, action="append", default=[], help="For the plans.")
    parser.add_argument("--page", action="store_true", help="Only write the page.")
    given = parser.parse_args()
    out = given.out or PAGE / ("quick.json" if given.quick else "results.json")
    facts = {
        "format_version": 1,
        "device": given.device,
        "quick": given.quick,
        "minutes": given.minutes,
        "torch": torch.__version__,
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda,
        "dtype": "bfloat16",
    }
    record = Record(out, given.minutes * 60, facts)
    if given.page:
        write_page(PAGE)
        return
    if given.make_plans:
        make_plans(given.make_plans, given.circuit)
        return
    try:
        import_module("vitcut.api")
        from vitcut.runtime import describe_machine
    except ImportError as error:
        record.add("failures", part="import vitcut", error=str(error), trace=[])
        raise SystemExit(f"vitcut cannot be imported: {error}; put it into {ROOT}/vendor") from None
    record.content["machine"] = describe_machine()
    if given.device.startswith("cuda"):
        os.environ.setdefault("TORCHINDUCTOR_FX_GRAPH_CACHE", "1")
        torch.set_float32_matmul_precision("highest")
    names = (QUICK["name"],) if given.quick else MODELS
    ready: dict[str, dict[str, nn.Module]] = {}
    for name in names:
        with record.part(f"prepare {name}", least_s=VERBS_S * (not given.quick)):
            ready[name] = prepare(name, record, given.device, quick=given.quick)
    for batch in QUICK["batches"] if given.quick else BATCHES:
        for name, models in ready.items():
            for mode in ("eager", "graph"):
                with record.part(f"{name}, batch {batch}, {mode}", least_s=VERBS_S):
                    measure(name, models, batch, mode, record, given.device)
    with record.part("commands", least_s=10):
        commands(record, given.device, quick=given.quick)
    compiled = [(names[0], 4, "default", ("dense", "0.3"))] if given.quick else COMPILED
    for name, batch, mode, variants in compiled:
        # Each model is compiled as long as there is time; those that were are timed in turn.
        with record.part(f"{name}, batch {batch}, {mode}"):
            there = ready.get(name, {})
            chosen = {key: there[key] for key in variants if key in there}
            measure(name, chosen, batch, mode, record, given.device)
    record.add("commands", command="end", seconds=0.0)
    if not given.quick:
        write_page(PAGE)


def prepare(name: str, record: Record, device: str, *, quick: bool) -> dict[str, nn.Module]:
    """The dense model, and what each plan leaves of it, checked in float32, then in bfloat16."""
    from vitcut.circuit import Circuit
    from vitcut.compact.operations import count_macs, dense_macs
    from vitcut.compiler.emit import compile_circuit, verify
    from vitcut.inputs import load_model
    from vitcut.masked.fill import zero_fill
    from vitcut.masked.fitting import mean_fill

    model = load_model(
        f"timm:{name}", random_weights=True, image_size=QUICK["size"] if quick else None
    ).to(device)
    weights = model.weights
    draw = torch.Generator().manual_seed(0)
    side = weights.image_size
    pixels = torch.randn(8, 3, side, side, generator=draw).to(device)
    made: dict[str, nn.Module] = {"dense": model.module}
    means = mean_fill(weights, [pixels])
    circuits = {"class-only": Circuit.full(weights.graph, ablation="zero")}
    for fraction in FRACTIONS:
        path = PLANS / f"{name}-{fraction:g}.json"
        if path.is_file():
            plan = json.loads(path.read_text(encoding="utf-8"))
            circuits[f"{fraction:g}"] = circuit_of(plan, weights.split_graph, weights.num_neurons)
    for variant, circuit in circuits.items():
        with record.part(f"compile {name}, {variant}"):
            fill = zero_fill(weights) if circuit.ablation == "zero" else means
            compact = compile_circuit(weights, circuit, fill).to(device)
            found = verify(compact, weights, circuit, fill, pixels)
            macs, dense = count_macs(compact.plan), dense_macs(weights.shape)
            record.add(
                "exactness",
                model=name,
                variant=variant,
                macs_fraction=round(macs / dense, 4),
                params=sum(value.numel() for value in compact.parameters()),
                max_abs_diff=found.max_abs_diff,
            )
            made[variant] = compact
    dtype = torch.bfloat16
    return {key: module.eval().requires_grad_(False).to(dtype) for key, module in made.items()}


def measure(
    name: str,
    models: dict[str, nn.Module],
    batch: int,
    mode: str,
    record: Record,
    device: str,
) -> None:
    """Time models in turn at one batch size: eager, eager in a CUDA graph, or compiled."""
    from vitcut.benchmark.bootstrap import bootstrap_interval
    from vitcut.benchmark.latency import time_sessions
    from vitcut.benchmark.settings import BenchSettings
    from vitcut.runtimes.session import Session

    on_gpu = torch.device(device).type == "cuda"
    if mode == "graph" and not on_gpu:
        raise TimeoutError("CUDA graphs need CUDA")
    size = QUICK["size"] if record.content["quick"] else 224
    draw = torch.Generator().manual_seed(1)
    example = torch.randn(batch, 3, size, size, generator=draw).to(device, torch.bfloat16)
    sessions: dict[str, Session] = {}
    memory: dict[str, float | None] = {}
    prepared: dict[str, float] = {}
    for variant, module in models.items():
        what = f"{name}, {variant}, batch {batch}, {mode}"
        compiles = mode not in {"eager", "graph"}
        with record.part(what, least_s=COMPILE_S if compiles and on_gpu else 0):
            start = time.monotonic()
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            call = ready_to_run(module, example, mode)
            with torch.inference_mode():
                call(example)
            memory[variant] = None
            if on_gpu:
                torch.cuda.synchronize()
                memory[variant] = torch.cuda.max_memory_allocated() / 2**30
            prepared[variant] = round(time.monotonic() - start, 2)
            sessions[variant] = Session(
                runtime="torch" if mode in {"eager", "graph"} else "torch-compile",
                batch=batch,
                threads=torch.get_num_threads(),
                run=ended(call, on_gpu=on_gpu),
                device=device,
                dtype="bfloat16",
            )
    if not sessions:
        return
    settings = BenchSettings(
        threads=torch.get_num_threads(),
        seconds=0.05 if record.content["quick"] else 0.25,
        min_rounds=7,
        min_sample_ms=1.0 if record.content["quick"] else 5.0,
    )
    samples = time_sessions(sessions, example, settings)
    for variant, own in samples.items():
        p10, median, p90 = np.percentile(own, (10, 50, 90))
        speed_up = None
        if "dense" in samples and variant != "dense":
            ratios = samples["dense"] / own
            low, high = bootstrap_interval(ratios, np.median, seed=0)
            speed_up = [round(x, 4) for x in (float(np.median(ratios)), low, high)]
        record.add(
            "times",
            model=name,
            variant=variant,
            batch=batch,
            mode=mode,
            median_ms=round(float(median), 5),
            p10_ms=round(float(p10), 5),
            p90_ms=round(float(p90), 5),
            rounds=len(own),
            images_per_s=round(batch * 1000 / float(median), 1),
            speed_up=speed_up,
            peak_gib=None if memory[variant] is None else round(memory[variant] or 0.0, 3),
            prepare_s=prepared[variant],
        )


def ready_to_run(module: nn.Module, example: torch.Tensor, mode: str) -> Callable[..., Any]:
    """A model as a function, made ready for one batch size."""
    if mode == "eager":
        return module
    if mode == "graph":
        # Everything that eager torch launches, recorded once and launched at once.
        still, stream = example.clone(), torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream), torch.inference_mode():
            for _ in range(3):
                module(still)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.inference_mode(), torch.cuda.graph(graph):
            logits = module(still)

        def replay(images: torch.Tensor) -> torch.Tensor:
            still.copy_(images)
            graph.replay()
            return logits

        return replay

    def run(images: torch.Tensor) -> torch.Tensor:
        return module(images)

    # A code object for each: torch runs eagerly after eight compilations of the same one.
    run.__code__ = run.__code__.replace()
    compiled = torch.compile(run, mode=mode, dynamic=False, fullgraph=True)
    with torch.inference_mode():
        for _ in range(3):
            compiled(example)
    return compiled


def ended(call: Callable[..., Any], *, on_gpu: bool) -> Callable[..., Any]:
    """A call that ends when its logits are there."""

    def run(images: torch.Tensor) -> Any:
        with torch.inference_mode():
            if on_gpu:
                torch.compiler.cudagraph_mark_step_begin()
            logits = call(images)
            if on_gpu:
                torch.cuda.synchronize()
        return logits

    return run


def commands(record: Record, device: str, *, quick: bool) -> None:
    """Search, cut and repair the shipped model once on the device, on pictures of noise."""
    from PIL import Image

    import vitcut

    with TemporaryDirectory() as folder:
        os.environ["VITCUT_CACHE"] = f"{folder}/cache"
        rng = np.random.default_rng(0)
        per_class = 12 if quick else 40
        for name in vitcut.load_task("animals").class_ids:
            place = Path(folder) / "noise" / name
            place.mkdir(parents=True)
            for number in range(per_class):
                picture = rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)
                Image.fromarray(picture).save(place / f"{number}.png")
        model = vitcut.load_model("animals", device=device)
        images = vitcut.load_images(f"{folder}/noise", task="animals", model=model)
        timing = vitcut.BenchSettings(runtimes=("torch",), batches=(64,), seconds=0.2, min_rounds=5)
        budget = vitcut.Budget(target_macs=0.3, score_images=58 if quick else 232, rounds=2)
        # Fills are fitted to all of the pictures, except in a try.
        cutting = vitcut.CutSettings(images=58) if quick else vitcut.CutSettings()
        discovery = vitcut.DiscoverSettings(tau=0.05, images=16)
        training = vitcut.FinetuneSettings(epochs=1, augmentation="none")
        done: dict[str, Any] = {}
        verbs: dict[str, Callable[[], Any]] = {
            "evaluate": lambda: vitcut.evaluate(model, images),
            "cut": lambda: vitcut.cut(model, images, budget=budget, settings=cutting, bench=timing),
            "discover": lambda: vitcut.discover(model, images, settings=discovery),
            "finetune": lambda: vitcut.finetune(
                done["cut"], model, images, settings=training, repair_dense=False, bench=timing
            ),
        }
        for name, call in verbs.items():
            with record.part(f"vitcut {name}"):
                start = time.monotonic()
                done[name] = found = call()
                told: dict[str, Any] = {"seconds": round(time.monotonic() - start, 2)}
                if name == "cut":
                    told["max_abs_diff"] = found.exactness.max_abs_diff
                results = getattr(found, "results", None)
                if results is not None:
                    told["devices"] = sorted(
                        {each.device for point in results.all_points() for each in point.latency}
                    )
                record.add("commands", command=name, device=device, **told)


def circuit_of(plan: dict[str, Any], graph: Any, num_neurons: int) -> Any:
    """The circuit of a plan; which neurons are kept is not in it, and changes no time."""
    from vitcut.circuit import Circuit

    blocks, kinds = graph.num_layers, graph.num_kinds
    heads = np.zeros((blocks, graph.num_heads, kinds), dtype=np.bool_)
    neurons = np.zeros((blocks, kinds, num_neurons), dtype=np.bool_)
    for block in range(blocks):
        for kind, name in enumerate(graph.kinds):
            heads[block, plan["heads"][name][block], kind] = True
            neurons[block, kind, : plan["neurons"][name][block]] = True
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="mean")


def plan_of(circuit: Any, **facts: Any) -> dict[str, Any]:
    """A circuit over parts as a plan: which heads, and how many neurons, per token kind."""
    graph = circuit.graph
    heads, mlps = graph.by_block(circuit.live_sources)
    neurons = mlps[:, :, None] & circuit.neurons
    return {
        "format_version": 1,
        **facts,
        "kinds": list(graph.kinds),
        "heads": {
            name: [np.flatnonzero(heads[block, :, kind]).tolist() for block in range(len(heads))]
            for kind, name in enumerate(graph.kinds)
        },
        "neurons": {
            name: neurons[:, kind].sum(-1).tolist() for kind, name in enumerate(graph.kinds)
        },
    }


def make_plans(name: str, files: list[Path]) -> None:
    """Write the plans of a model: of circuits that were found, or else of uneven random ones."""
    from vitcut.circuit import Circuit
    from vitcut.compact.operations import count_macs, dense_macs
    from vitcut.compiler.cost import CostModel
    from vitcut.compiler.planning import plan_circuit
    from vitcut.inputs import load_model

    weights = load_model(f"timm:{name}", random_weights=True).weights
    costs, dense = CostModel(batch=256), dense_macs(weights.shape)

    def share_of(circuit: Circuit) -> float:
        return count_macs(plan_circuit(weights.shape, circuit, costs)) / dense

    found = [(Circuit.load(path), path.name) for path in files]
    for fraction in () if files else FRACTIONS:
        low, high = 0.0, 2.0
        for _ in range(20):
            scale = (low + high) / 2
            small = share_of(draw_circuit(weights, scale)) <= fraction
            low, high = (scale, high) if small else (low, scale)
        found.append((draw_circuit(weights, low), "drawn: uneven over blocks, not searched"))
    for circuit, origin in found:
        share = share_of(circuit)
        fraction = min(FRACTIONS, key=lambda each: abs(each - share))
        plan = plan_of(circuit, model=name, origin=origin, macs_fraction=round(share, 4))
        path = PLANS / f"{name}-{fraction:g}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(plan) + "\n", encoding="utf-8")
        sys.stderr.write(f"{path}: {share:.3f} of the MACs\n")


def draw_circuit(weights: Any, scale: float) -> Any:
    """Keep about this share of the heads and neurons of every block and token kind, unevenly."""
    from vitcut.circuit import Circuit

    graph, rng = weights.split_graph, np.random.default_rng(0)
    blocks, kinds = graph.num_layers, graph.num_kinds
    heads = np.zeros((blocks, graph.num_heads, kinds), dtype=np.bool_)
    neurons = np.zeros((blocks, kinds, weights.num_neurons), dtype=np.bool_)
    for block, kind in np.ndindex(blocks, kinds):
        # Searches leave some blocks nearly whole, and others nearly empty.
        of_heads, of_neurons = np.clip(scale * rng.uniform(0.4, 1.6, 2), 0, 1)
        order = rng.permutation(graph.num_heads)
        heads[block, order[: round(of_heads * graph.num_heads)], kind] = True
        neurons[block, kind, : round(of_neurons * weights.num_neurons)] = True
    return Circuit.of_parts(graph, heads=heads, neurons=neurons, ablation="mean")


if __name__ == "__main__":
    main()
