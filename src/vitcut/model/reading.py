"""How an adapter reads a module: every part that it does not name as understood is refused."""

from typing import Any, ClassVar, NoReturn

import torch
from timm.layers import to_2tuple
from torch import nn

from vitcut.errors import UnsupportedModelError
from vitcut.model.weights import Activation, MlpWeights, NormWeights
from vitcut.shapes import Tensor

_HARMLESS_HOOKS = "transformers.utils.output_capturing"
"""Module of transformers' own hooks, which only record what passes through."""


class Reading:
    """One model being read. `finish` refuses every part that has not been named by then.

    Args:
        model: The whole model; it is not changed.
    """

    remedy: ClassVar[str]
    """What to use instead, at the end of every refusal."""
    norm_kinds: ClassVar[tuple[type[nn.Module], ...]] = (nn.LayerNorm,)
    """The library's classes that compute a LayerNorm."""
    activation_kinds: ClassVar[dict[type[nn.Module], Activation]] = {}
    """The library's activations that vitcut can compute."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model
        # By identity, so that an added part is noticed whatever it is called. Tensors are tracked
        # apart from modules, because a known module may have been given another parameter.
        self._tensors: set[int] = set()
        self._modules: set[int] = {id(model)}

    def refuse(self, feature: str, *, yet: bool = False) -> NoReturn:
        """Refuse a feature by name; ``yet`` if support for it is planned."""
        raise UnsupportedModelError(
            f"not supported{' yet' if yet else ''}: {feature}; {self.remedy}"
        )

    def require(self, module: Any, what: str, *kinds: type[nn.Module], why: str = "") -> None:
        """Name a module that must be of one of these classes: a subclass may compute otherwise.

        Args:
            module: The module.
            what: What it is called in a refusal.
            kinds: Classes whose forward pass is understood.
            why: What the refusal says of any other class.
        """
        if type(module) not in kinds:
            *others, last = dict.fromkeys(kind.__name__ for kind in kinds)
            known = f"{', '.join(others)} and {last} are" if others else f"{last} is"
            self.refuse(f"{what} {type(module).__name__}{why} (only {known})")
        self._modules.add(id(module))

    def whole(self, module: nn.Module) -> None:
        """Name a module with all of its tensors."""
        self._modules.add(id(module))
        self._tensors |= {id(one) for one in (*module.parameters(), *module.buffers())}

    def inert(self, module: Any, what: str, *also: type[nn.Module]) -> None:
        """Name a module that does nothing in eval mode: identity, dropout, or ``also``."""
        if type(module) not in {nn.Identity, nn.Dropout, *also}:
            self.refuse(f"{what} ({type(module).__name__})")
        self._modules.add(id(module))

    def unused(self, tensor: Tensor | None) -> None:
        """Name a tensor that the forward pass does not touch."""
        if tensor is not None:
            self._tensors.add(id(tensor))

    def tensor(self, tensor: Tensor) -> Tensor:
        """Name and copy a tensor."""
        self._tensors.add(id(tensor))
        return tensor.detach().clone()

    def weight_and_bias(self, module: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of a module that was named already; a missing bias is zeros."""
        weight = self.tensor(module.weight)
        if module.bias is None:
            return weight, weight.new_zeros(len(weight))
        return weight, self.tensor(module.bias)

    def linear(
        self, module: Any, what: str, layer_scale: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Weight and bias of a linear layer, with the LayerScale of its output folded in."""
        self.require(module, what, nn.Linear)
        weight, bias = self.weight_and_bias(module)
        if layer_scale is not None:
            # gamma * (W x + b) = (diag(gamma) W) x + gamma * b: one factor per output row.
            weight, bias = weight * layer_scale[:, None], bias * layer_scale
        return weight, bias

    def patches(self, module: Any, image_size: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of the convolution that embeds a square grid of square patches."""
        self.require(module, "patch embedding", nn.Conv2d, why=": a convolutional stem")
        sides = {"image size": to_2tuple(image_size), "patch size": module.kernel_size}
        for name, (height, width) in sides.items():
            if height != width:
                self.refuse(f"{name} {height} x {width}, which is not square")
        (size, _), (patch, _) = sides.values()
        if size % patch:
            self.refuse(f"image size {size}, which is not a multiple of the patch size {patch}")
        # Only then is the convolution a linear map of each patch alone.
        side_by_side = (
            module.stride == module.kernel_size
            and module.padding in {(0, 0), "valid"}
            and module.dilation == (1, 1)
            and module.groups == 1
        )
        if not side_by_side:
            self.refuse(f"patch embedding {module}, whose patches do not lie side by side")
        return self.weight_and_bias(module)

    def norm(self, module: Any, what: str = "norm") -> NormWeights:
        """A LayerNorm; one without affine weights gets ones and zeros."""
        self.require(module, what, *self.norm_kinds)
        width, like = module.normalized_shape[0], next(self.model.parameters())
        return NormWeights(
            weight=like.new_ones(width) if module.weight is None else self.tensor(module.weight),
            bias=like.new_zeros(width) if module.bias is None else self.tensor(module.bias),
            eps=module.eps,
        )

    def norm_if(self, module: Any, what: str) -> NormWeights | None:
        """A LayerNorm, or None for an identity in its place."""
        if isinstance(module, nn.Identity):
            self.inert(module, what)
            return None
        return self.norm(module, what)

    def separate_qkv(self, attn: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of ``q_proj``, ``k_proj`` and ``v_proj``, concatenated."""
        names = [f"{letter}_proj" for letter in "qkv"]
        parts = [self.linear(getattr(attn, name), f"attention's {name}") for name in names]
        weight, bias = (torch.cat(both) for both in zip(*parts, strict=True))
        return weight, bias

    def mlp(
        self,
        first: tuple[Tensor, Tensor],
        activation: Any,
        second: Any,
        *,
        layer_scale: Tensor | None = None,
        gate: tuple[Tensor, Tensor] | None = None,
        norm: NormWeights | None = None,
    ) -> MlpWeights:
        """An MLP, plain or gated.

        Args:
            first: Weight and bias of the first layer.
            activation: Module applied to the first layer, or to the gate if there is one.
            second: Second layer.
            layer_scale: LayerScale of the MLP's output.
            gate: Weight and bias of the gate.
            norm: LayerNorm over the hidden units, before the second layer.
        """
        function = self.activation_kinds.get(type(activation))
        if function is None:
            self.refuse(f"activation {activation}")
        # torch has one class for both kinds of GELU.
        if getattr(activation, "approximate", "none") == "tanh":
            function = "gelu_tanh"
        self._modules.add(id(activation))
        out_weight, out_bias = self.linear(second, "MLP's second layer", layer_scale)
        gate_weight, gate_bias = gate or (None, None)
        return MlpWeights(
            in_weight=first[0],
            in_bias=first[1],
            out_weight=out_weight,
            out_bias=out_bias,
            activation=function,
            gate_weight=gate_weight,
            gate_bias=gate_bias,
            norm=norm,
        )

    def classifiers(self, *heads: Any) -> tuple[Tensor, Tensor]:
        """Weight and bias of the mean of linear classifiers, each with a token of its own."""
        # mean_i(W_i x_i + b_i) is one linear map of the concatenated tokens: [W_1 ... W_n] / n.
        parts = [self.linear(head, "classifier") for head in heads]
        weights, biases = zip(*parts, strict=True)
        return torch.cat(weights, dim=1) / len(heads), torch.stack(biases).mean(dim=0)

    def finish(self) -> None:
        """Refuse hooks, replaced methods, and every module and tensor that was not named."""
        for name, module in self.model.named_modules():
            where = f"{name or 'the model'} ({type(module).__name__})"
            if id(module) not in self._modules:
                self.refuse(f"{where}, a part of an unknown kind")
            hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
            if any(hook.__module__ != _HARMLESS_HOOKS for hook in hooks):
                self.refuse(f"a hook on {where}, which may change its output: remove it")
            replaced = [key for key in vars(module) if callable(getattr(type(module), key, None))]
            if replaced:
                self.refuse(f"{where}, whose method {replaced[0]} was replaced")
        for name, tensor in [*self.model.named_parameters(), *self.model.named_buffers()]:
            if id(tensor) not in self._tensors:
                self.refuse(f"{name}, a tensor whose role in the model is unknown")
