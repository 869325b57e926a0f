"""Cut a model down to the circuit of its task, and see what that costs.

With the shipped model and its data:

    python examples/cut_animals.py --source tiny-imagenet-200.zip

With what ``vitcut demo`` leaves behind:

    python examples/cut_animals.py --model runs/demo --source drawn --task drawn
"""

# ruff: noqa: T201

import argparse
from collections.abc import Sequence

import vitcut


def main(arguments: Sequence[str] | None = None) -> None:
    """Discover, cut, compare, save."""
    options = _parser().parse_args(arguments)
    model = vitcut.load_model(options.model)
    images = vitcut.load_images(options.source, task=options.task, model=model)

    settings = vitcut.DiscoverSettings(tau=options.tau, images=options.images)
    circuit = vitcut.discover(model, images, settings=settings)
    cut = vitcut.cut(model, images, circuit, bench=None)

    edges = circuit.graph.num_edges
    print(f"edges kept: {circuit.num_kept} of {edges}; heads kept: {circuit.num_heads_kept}")
    print(f"largest difference from the masked model: {cut.exactness.max_abs_diff:.2g}")
    print(f"coarse accuracy, dense:   {vitcut.evaluate(model, images).accuracy_coarse:.1%}")
    print(f"coarse accuracy, compact: {vitcut.evaluate(cut, images).accuracy_coarse:.1%}")

    cut.model.save_pretrained(options.out)
    print(f"saved: {options.out}; see it with: vitcut show {options.out}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Cut a model down to the circuit of its task.")
    parser.add_argument("--source", required=True, help="images, as vitcut.load_images takes them")
    parser.add_argument("--model", default="animals", help="as vitcut.load_model takes it")
    parser.add_argument("--task", default="animals", help="a shipped task, or a label file")
    parser.add_argument("--tau", type=float, default=0.01, help="ACDC's threshold, in nats")
    parser.add_argument("--images", type=int, default=128, help="calibration images")
    parser.add_argument("--out", default="animals-cut", help="folder for the compact model")
    return parser


if __name__ == "__main__":
    main()
