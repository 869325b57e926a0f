"""A device that is none: it computes on the CPU, and refuses to mix its tensors with the CPU's.

So what would break on a GPU breaks here, where there is none.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("lazy", 0)
"""Torch would look for a driver of CUDA; of this one it knows the name only."""


class Placed(Tensor):
    """A tensor on `ELSEWHERE`; its values lie in ``inner``, on the CPU."""

    inner: Tensor

    @staticmethod
    def __new__(cls, inner: Tensor) -> "Placed":
        made = Tensor._make_wrapper_subclass(
            cls,
            inner.size(),
            strides=inner.stride(),
            storage_offset=inner.storage_offset(),
            dtype=inner.dtype,
            device=ELSEWHERE,
            requires_grad=inner.requires_grad,
        )
        made.inner = inner.detach()
        return made

    def __repr__(self, **_: Any) -> str:
        return f"Placed({self.inner!r})"

    @classmethod
    def __torch_function__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.tolist:
            return args[0].inner.tolist()
        if function is Tensor.numpy:
            raise TypeError("a tensor elsewhere has no array: call .cpu() first")
        if function in {Tensor.__getitem__, Tensor.__setitem__}:
            # Torch would put an index that is a list beside the tensor.
            index = args[1] if isinstance(args[1], tuple) else (args[1],)
            index = tuple(torch.tensor(at) if isinstance(at, list) else at for at in index)
            args = (args[0], index, *args[2:])
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **(kwargs or {}))

    @classmethod
    def __torch_dispatch__(
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(function, args, kwargs or {})


class FakeDevice(TorchDispatchMode):
    """Inside this block `ELSEWHERE` can be used like a device."""

    def __enter__(self) -> Any:
        # Modules are moved by new parameters: an old one would not take these as its data.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        self._tensor, self._inference_mode = torch.tensor, torch.inference_mode
        # Tensors like these cannot be inference tensors.
        torch.tensor, torch.inference_mode = self._make, torch.no_grad
        return super().__enter__()

    def __exit__(self, *told: Any) -> None:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.tensor, torch.inference_mode = self._tensor, self._inference_mode
        super().__exit__(*told)

    def _make(self, *values: Any, device: Any = None, **known: Any) -> Tensor:
        """Like ``torch.tensor``, which asks for the device before it asks this mode."""
        made = self._tensor(*values, **known)
        return made if device is None else made.to(device)

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        return _call(function, args, kwargs or {})


_INDEXING = {
    torch.ops.aten.index.Tensor,
    torch.ops.aten.index_put.default,
    torch.ops.aten.index_put_.default,
}
"""A tensor elsewhere may be indexed by one on the CPU, but not the other way round."""


def _call(function: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    flat = [item for item in tree_flatten((args, kwargs))[0] if isinstance(item, Tensor)]
    ours = any(isinstance(item, Placed) for item in flat)
    asked = kwargs.get("device")
    copies = function in {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}
    # As on a real device, a number of the CPU (no dimension) may meet any tensor.
    strangers = [item for item in flat if not isinstance(item, Placed) and item.ndim]
    indexed = function in _INDEXING
    if ours and strangers and not copies and not indexed:
        raise RuntimeError(
            f"{function} got tensors on two devices: shapes {[tuple(item.shape) for item in flat]}"
        )
    if indexed and ours and not isinstance(args[0], Placed):
        raise RuntimeError("a tensor on the CPU is indexed by one elsewhere")
    plain_args, plain = tree_map(
        lambda item: item.inner if isinstance(item, Placed) else item, (args, kwargs)
    )
    if asked is not None:
        plain["device"] = torch.device("cpu")
    result = function(*plain_args, **plain)
    if asked is not None:
        ours = torch.device(asked).type == ELSEWHERE.type
    elif copies:
        ours = isinstance(args[0], Placed)
    if function is torch.ops.aten._local_scalar_dense.default:
        return result
    first = args[0] if args else None
    if isinstance(first, Placed) and result is first.inner:
        return first
    return tree_map(
        lambda item: Placed(item) if ours and isinstance(item, Tensor) else item, result
    )
