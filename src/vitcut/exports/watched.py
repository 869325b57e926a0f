"""A cut model that also says how much each of its heads and MLPs writes, for the report's page."""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import nn

from vitcut.compact.attention import HeadOutput
from vitcut.compact.info import ModelInfo
from vitcut.compact.model import CompactMlp, CompactViT
from vitcut.compact.plan import Rows
from vitcut.errors import ExactnessError
from vitcut.exports.pictures import PictureModel
from vitcut.runtimes.onnx_runtime import write_graph
from vitcut.shapes import Float, Tensor, UInt8

NAMES = ("pictures", "probabilities", "written")
_OPSET = 18
_FARTHEST = 1e-4


class WatchedModel(nn.Module):
    """A picture of any size to probabilities, and the mean norm of what every part writes.

    The norm is that of a token's vector; the mean is over the tokens that the part writes to.
    Biases belong to no part. What a head writes to every token of every image alike, from its value
    bias, is left out where the plan has absorbed its values: there it stands in a table.

    Attributes:
        parts: Names as in a circuit, ``attn.L.H`` and ``mlp.L``; with ``.KIND`` where the circuit
            tells token kinds apart.
    """

    def __init__(self, model: CompactViT, info: ModelInfo, *, by_kind: bool) -> None:
        super().__init__()
        self.pictures = PictureModel(model, info)
        self.shape, self.by_kind = model.plan.shape, by_kind
        self.watched = [
            (layer, module)
            for layer, block in enumerate(model.blocks)
            for module in block.modules()
            if isinstance(module, (HeadOutput, CompactMlp))
        ]
        self.parts = tuple(self._collect({}))

    def forward(
        self, pictures: UInt8[Tensor, "one height width three"]
    ) -> tuple[Float[Tensor, "one groups"], Float[Tensor, "parts"]]:
        """Probabilities of a picture's groups, and what each part wrote."""
        seen: dict[nn.Module, Tensor] = {}

        def keep_input(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            seen[module] = inputs[0]

        def keep_output(module: nn.Module, _: Any, output: Tensor) -> None:
            seen[module] = output

        with ExitStack() as hooks:
            for _, module in self.watched:
                if isinstance(module, HeadOutput):
                    hooks.enter_context(module.register_forward_pre_hook(keep_input))
                else:
                    hooks.enter_context(module.fc2.register_forward_hook(keep_output))
            probabilities = self.pictures(pictures)
        found = self._collect(seen)
        return probabilities, torch.stack([torch.cat(norms).mean() for norms in found.values()])

    def _collect(self, seen: dict[nn.Module, Tensor]) -> dict[str, list[Tensor]]:
        """The norms of each part by token; without values only the names."""
        found: dict[str, list[Tensor]] = {}
        for layer, module in self.watched:
            value = seen.get(module.fc2 if isinstance(module, CompactMlp) else module)
            if isinstance(module, CompactMlp):
                rows = module.plan.stream.rows
                wrote = [(f"mlp.{layer}", None if value is None else _mlp_norms(module, value))]
            else:
                rows = module.plan.rows
                wrote = [
                    (f"attn.{layer}.{head}", None if value is None else _norms(module, value, at))
                    for at, head in enumerate(module.plan.heads)
                ]
            for name, norms in wrote:
                for suffix, first, end in self._pieces(rows):
                    own = found.setdefault(name + suffix, [])
                    if norms is not None:
                        own.append(norms[first:end])
        return found

    def _pieces(self, rows: Rows) -> Iterator[tuple[str, int, int]]:
        """The token kinds among some rows, and where they are in them."""
        for kind, own in self.shape.kind_rows.items() if self.by_kind else ():
            first, end = max(own.first, rows.first), min(own.end, rows.end)
            if first < end:
                yield f".{kind}", first - rows.first, end - rows.first
        if not self.by_kind:
            yield "", 0, rows.count


def _mlp_norms(module: CompactMlp, output: Tensor) -> Float[Tensor, "rows"]:
    bias = module.fc2.bias if module.plan.bias else None
    return (output if bias is None else output - bias).flatten(0, -2).norm(dim=-1)


def _norms(module: HeadOutput, mixed: Tensor, at: int) -> Float[Tensor, "rows"]:
    """How much one head of an output writes to each token of one image.

    Args:
        module: The output.
        mixed: What the heads of its head set have mixed.
        at: Which of its heads.
    """
    plan, own = module.plan, module.head_set.rows
    place = module.head_set.heads.index(plan.heads[at])
    # [rows of the head set, inputs]; see HeadSet.forward for the dimensions that are left out.
    one = mixed[0] if module.head_set.stands_alone else mixed[0, place]
    one = one.unflatten(0, (1, -1)) if one.ndim == 1 else one
    one = one[plan.rows.first - own.first : plan.rows.end - own.first]
    inputs = module.product.in_features // len(plan.heads)
    return (one @ module.product.weight[:, at * inputs : (at + 1) * inputs].T).norm(dim=-1)


def write_watched(model: CompactViT, info: ModelInfo, path: Path, *, by_kind: bool) -> list[str]:
    """Write a cut model with what its parts write as an ONNX file.

    Args:
        model: The cut model.
        info: Its preprocessing and groups.
        path: The file.
        by_kind: Whether its circuit tells token kinds apart.

    Returns:
        The names of the parts, in the order of the output ``written``.

    Raises:
        ExactnessError: The probabilities are not those of the model alone.
    """
    module = WatchedModel(model, info, by_kind=by_kind).eval().requires_grad_(requires_grad=False)
    write_graph(
        module,
        path,
        example=torch.zeros(1, 70, 90, 3, dtype=torch.uint8),
        names=NAMES,
        dynamic={1: "height", 2: "width"},
        opset=_OPSET,
        metadata={},
    )
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    alone, farthest = PictureModel(model, info).eval(), 0.0
    for seed, size in enumerate(((64, 48), (90, 130))):
        shape = (1, *size, 3)
        picture = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
        with torch.inference_mode():
            expected = alone(torch.from_numpy(picture)).numpy()
        got, written = map(np.asarray, session.run(None, {NAMES[0]: picture}))
        farthest = max(farthest, float(np.abs(got - expected).max()))
        if not np.isfinite(written).all():
            farthest = float("inf")
    if not farthest <= _FARTHEST:
        raise ExactnessError(
            f"the page's model differs from the cut model by up to {farthest:.2g}, expected at "
            f"most {_FARTHEST}: leave out with-model"
        )
    return list(module.parts)
