"""Target executorch: a program for ExecuTorch, with XNNPACK for the CPUs of phones and boards."""

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
from executorch.exir import to_edge_transform_and_lower
from executorch.exir.passes.constant_prop_pass import constant_prop_pass
from executorch.runtime import Runtime

from vitcut.compact.model import CompactViT, centred
from vitcut.exports.settings import ExportSettings
from vitcut.exports.target import Subject, Written
from vitcut.runtimes.session import in_batches
from vitcut.shapes import Float, Tensor

FILE = "model.pte"
_USE = f"""import torch
from executorch.runtime import Runtime

method = Runtime.get().load_program("{FILE}").load_method("forward")
logits = method.execute([torch.from_numpy(images)])[0].numpy()"""

_ATEN = torch.ops.aten


def write(subject: Subject, folder: Path, settings: ExportSettings) -> Written:
    """Write ``model.pte``, which takes a fixed number of images: one unless told.

    XNNPACK takes neither LayerNorm nor a product that is added to a sum; what it does not take runs
    in ExecuTorch's plain loops, eight times slower in all. So these are first written as what it
    takes. A cut of vit_tiny to 30 % of its MACs then needs 8 calls of XNNPACK, not 80.
    """
    path, batch = folder / FILE, 1 if settings.batch == "dynamic" else settings.batch
    module = subject.module
    program = torch.export.export(
        centred(module) if isinstance(module, CompactViT) else module,
        (subject.examples[:1].repeat(batch, 1, 1, 1),),
    )
    program = constant_prop_pass(program.run_decompositions(_PLAIN))
    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    graph = lowered.exported_program().graph
    called = [str(node.target) for node in graph.nodes if node.op == "call_function"]
    path.write_bytes(lowered.to_executorch().buffer)
    return Written(
        file=path,
        run=in_batches(load(path), batch),
        tools={name: version(name) for name in ("torch", "executorch")},
        needs=("executorch", "torch"),
        use=_USE,
        details={
            "batch": batch,
            "xnnpack_calls": sum("call_delegate" in name for name in called),
            "other_operations": sum("EdgeOpOverload" in name for name in called),
        },
    )


def load(path: Path) -> Callable[[Tensor], Tensor]:
    """What runs the file: as many normalised images as it takes to logits."""
    method = Runtime.get().load_program(path).load_method("forward")
    if method is None:
        raise TypeError(f"{path} has no method forward")
    return lambda images: method.execute([images])[0].clone()


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """A product without the copies that broadcasting makes."""
    if min(a.ndim, b.ndim) < 2:
        return NotImplemented
    if b.ndim == 2:
        return _ATEN.mm(a.reshape(-1, a.shape[-1]), b).reshape(*a.shape[:-1], b.shape[-1])
    lead = torch.broadcast_shapes(a.shape[:-2], b.shape[:-2])
    a, b = (
        (each if each.shape[:-2] == lead else each.expand(*lead, *each.shape[-2:])).reshape(
            -1, *each.shape[-2:]
        )
        for each in (a, b)
    )
    product = _ATEN.bmm(a, b)
    return product.reshape(*lead, *product.shape[-2:])


def _attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Attention without the case that all tokens are masked."""
    if attn_mask is not None or dropout_p or is_causal or enable_gqa:
        return NotImplemented
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    scores = _matmul(q if factor == 1 else q * factor, k.transpose(-1, -2))
    return _matmul(_ATEN.softmax.int(scores, -1), v)


def _addmm(total: Tensor, a: Tensor, b: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    if beta != 1 or alpha != 1:
        return NotImplemented
    return total + _ATEN.linear(a, b.t())


def _layer_norm(
    values: Float[Tensor, "*tokens width"],
    shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,  # noqa: ARG001 (an argument of the operation)
) -> Float[Tensor, "*tokens width"]:
    """The means over the width as products with a constant, which XNNPACK takes."""
    if len(shape) != 1:
        return NotImplemented
    share = torch.full((1, shape[0]), 1 / shape[0], dtype=values.dtype)
    values = values - _ATEN.linear(values, share)
    values = values * _ATEN.rsqrt(_ATEN.linear(values * values, share) + eps)
    values = values if weight is None else values * weight
    return values if bias is None else values + bias


_PLAIN: dict[Any, Callable[..., Tensor]] = {
    _ATEN.matmul.default: _matmul,
    _ATEN.scaled_dot_product_attention.default: _attend,
    _ATEN.addmm.default: _addmm,
    _ATEN.layer_norm.default: _layer_norm,
}
"""Operations that XNNPACK does not take, as others that it takes."""
