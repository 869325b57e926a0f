"""How an adapter reads a module: what it has not understood is left over, and refused by name.

Which part of a library's module means what is left to the adapters.
"""

from collections.abc import Iterator
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import nn

from vitcut.errors import UnsupportedModelError
from vitcut.model.weights import Activation, MlpWeights, NormWeights
from vitcut.shapes import Float, Tensor

_OWN_HOOKS = "transformers.utils.output_capturing"
"""Its hooks only look at what passes by."""


class Reading:
    """One module being read; `finish` refuses whatever was not read or named by then."""

    def __init__(self, model: nn.Module, remedy: str) -> None:
        """Begin to read a module, which is not changed.

        Args:
            model: The whole model.
            remedy: What to use instead, at the end of every refusal.
        """
        self.model: Any = model
        self._remedy = remedy
        self._tensors: set[int] = set()
        self._modules: set[int] = {id(model)}

    def refuse(self, feature: str, *, yet: bool = False) -> NoReturn:
        """Refuse a feature by name; ``yet`` where vitcut is to learn it."""
        raise UnsupportedModelError(
            f"not supported{' yet' if yet else ''}: {feature}; {self._remedy}"
        )

    def require(self, module: Any, expected: type[nn.Module], what: str) -> None:
        """Name a module whose forward pass is understood; a subclass may do something else."""
        if type(module) is not expected:
            self.refuse(f"{what} {type(module).__name__} (only {expected.__name__} is)")
        self._modules.add(id(module))

    def whole(self, module: nn.Module) -> None:
        """Name a module, and all of its tensors, that was asked for what it gives."""
        self._modules.add(id(module))
        self._tensors |= {id(one) for one in (*module.parameters(), *module.buffers())}

    def inert(self, module: Any, what: str, *, also: tuple[type[nn.Module], ...] = ()) -> None:
        """Name a module that does nothing when the model answers: identity, or dropout."""
        if type(module) not in {nn.Identity, nn.Dropout, *also}:
            self.refuse(f"{what} ({type(module).__name__})")
        self._modules.add(id(module))

    def unused(self, tensor: Tensor | None) -> None:
        """Name a parameter that the forward pass does not touch."""
        if tensor is not None:
            self._tensors.add(id(tensor))

    def tensor(self, tensor: Tensor) -> Tensor:
        """A copy of a parameter."""
        self._tensors.add(id(tensor))
        return tensor.detach().clone()

    def linear(self, module: Any, what: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer; a missing bias is zero."""
        self.require(module, nn.Linear, what)
        return self.weight_and_bias(module)

    def patches(self, module: Any, what: str) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that embeds patches side by side."""
        if type(module) is not nn.Conv2d:
            self.refuse(f"{what} {type(module).__name__}: a convolutional stem (only Conv2d is)")
        self.require(module, nn.Conv2d, what)
        height, width = module.kernel_size
        if height != width:
            self.refuse(f"patch size {height} x {width}, which is not square")
        plain = (
            module.stride == module.kernel_size
            and module.padding in {(0, 0), "valid"}
            and module.dilation == (1, 1)
            and module.groups == 1
        )
        if not plain:
            self.refuse(f"{what} {module}, whose patches do not lie side by side")
        return self.weight_and_bias(module)

    def norm(self, module: Any, what: str, *, like: Tensor, kinds: Any = ()) -> NormWeights:
        """A LayerNorm; one without weights takes type and device of ``like``.

        Args:
            module: The norm.
            what: What it is called in a refusal.
            like: A tensor of the model.
            kinds: A library's own classes that compute the same.
        """
        if type(module) not in {nn.LayerNorm, *kinds}:
            self.refuse(f"{what} {type(module).__name__} (only LayerNorm is)")
        self._modules.add(id(module))
        width = module.normalized_shape[0]
        return NormWeights(
            weight=like.new_ones(width) if module.weight is None else self.tensor(module.weight),
            bias=like.new_zeros(width) if module.bias is None else self.tensor(module.bias),
            eps=module.eps,
        )

    def mlp(
        self,
        first: tuple[Tensor, Tensor],
        second: Any,
        activation: Activation,
        *,
        layer_scale: Tensor | None = None,
        gate: tuple[Tensor, Tensor] | None = None,
        norm: NormWeights | None = None,
    ) -> MlpWeights:
        """An MLP, plain or gated.

        Args:
            first: Weight and bias of its first layer.
            second: The second layer, into which LayerScale is folded.
            activation: Of the first layer, or of the gate.
            layer_scale: The factors, if any.
            gate: Weight and bias of what neurons are multiplied by, if they are.
            norm: What all of them pass before the second layer, if they do.
        """
        out_weight, out_bias = scaled(*self.linear(second, "MLP's second layer"), layer_scale)
        gate_weight, gate_bias = gate or (None, None)
        return MlpWeights(
            in_weight=first[0],
            in_bias=first[1],
            out_weight=out_weight,
            out_bias=out_bias,
            activation=activation,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
            norm=norm,
        )

    def qkv(self, attn: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of ``q_proj``, ``k_proj`` and ``v_proj``, one after the other."""
        names = [f"{letter}_proj" for letter in "qkv"]
        parts = [self.linear(getattr(attn, name), f"attention's {name}") for name in names]
        weight, bias = (torch.cat(both) for both in zip(*parts, strict=True))
        return weight, bias

    def classifiers(self, *heads: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of the mean of linear classifiers, each of which reads its own token."""
        parts = [self.linear(head, "classifier") for head in heads]
        weights, biases = zip(*parts, strict=True)
        return torch.cat(weights, dim=1) / len(heads), torch.stack(biases).mean(dim=0)

    def grid(self, image_size: Any, patch_size: Any) -> None:
        """Refuse images that are not cut into whole square patches, as many across as down."""
        height, width = _pair(image_size)
        if height != width:
            self.refuse(f"image size {height} x {width}, which is not square")
        patch, across = _pair(patch_size)
        if patch != across:
            self.refuse(f"patch size {patch} x {across}, which is not square")
        if height % patch:
            self.refuse(f"image size {height}, which is no multiple of the patch size {patch}")

    def finish(self) -> None:
        """Refuse hooks, replaced methods, and every module and tensor that was not understood."""
        for name, module in self.model.named_modules():
            where = f"{name or 'the model'} ({type(module).__name__})"
            if id(module) not in self._modules:
                self.refuse(f"{where}, a part of an unknown kind")
            if any(_foreign_hooks(module)):
                self.refuse(f"a hook on {where}, which may change what it gives: remove it")
            replaced = [key for key in vars(module) if callable(getattr(type(module), key, None))]
            if replaced:
                self.refuse(f"{where}, whose method {replaced[0]} was replaced")
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if id(tensor) not in self._tensors:
                self.refuse(f"{name}, a tensor whose part in the model is unknown")

    def weight_and_bias(self, module: Any) -> tuple[Tensor, Tensor]:
        """Of a module that was named already; a missing bias is zero."""
        weight = self.tensor(module.weight)
        if module.bias is None:
            return weight, weight.new_zeros(len(weight))
        return weight, self.tensor(module.bias)


def scaled(weight: Tensor, bias: Tensor, layer_scale: Tensor | None) -> tuple[Tensor, Tensor]:
    """Output weight and bias with LayerScale folded in."""
    if layer_scale is None:
        return weight, bias
    return weight * layer_scale[:, None], bias * layer_scale


def normed(tokens: Float[Tensor, "tokens width"], norm: NormWeights) -> Tensor:
    """Tokens behind a LayerNorm."""
    return F.layer_norm(tokens, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def _pair(size: Any) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _foreign_hooks(module: Any) -> Iterator[Any]:
    """Whatever runs before or after a module's own forward pass, and is not the library's."""
    for hooks in (module._forward_pre_hooks, module._forward_hooks):
        yield from (hook for hook in hooks.values() if hook.__module__ != _OWN_HOOKS)
