"""What a compact model becomes before a runtime takes it over: the same function, shorter.

The mean over the width of what a stream adds up never reaches a LayerNorm's output. Taken off every
writer's weights, it need not be looked for image by image.
"""

from collections.abc import Iterator
from copy import deepcopy

import torch
from torch import nn

from vitcut.compact.attention import HeadOutput
from vitcut.compact.model import CompactMlp, CompactViT
from vitcut.compact.stream import Stream
from vitcut.shapes import Float, Tensor


@torch.no_grad()
def centred(model: CompactViT) -> CompactViT:
    """A frozen copy in evaluation mode with the mean over the width taken off all that streams add.

    Nothing changes but rounding: streams are read through LayerNorms alone. Exported to ONNX, its
    LayerNorms become RMSNormalization. Where the classifier reads without one, the copy is plain.

    Source:
        LayerNorm's invariance to a shift of its input: Ba et al. 2016, arXiv:1607.06450, section 5.
    """
    model = deepcopy(model).eval().requires_grad_(requires_grad=False)
    if not model.plan.shape.final_norm:
        return model
    for writer in _writers(model):
        # Output channels come first in the weights of convolutions and of products.
        writer.sub_(writer.mean(0, keepdim=True))
    if model.embed_norm is not None:
        model.embed_norm = nn.Sequential(model.embed_norm, _Centre())
    for stream in _streams(model):
        if stream.table is not None:
            stream.table.sub_(stream.table.mean(-1, keepdim=True))
        stream.centred = True
    return model


class _Centre(nn.Module):
    """Takes the mean over the width off what a norm with weights of its own has written."""

    def forward(self, values: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return values - values.mean(-1, keepdim=True)


def _writers(model: CompactViT) -> Iterator[nn.Parameter]:
    """Weights and biases of the products that write into streams."""
    if model.patch_embed is not None:
        yield from model.patch_embed.parameters()
    for module in model.modules():
        if isinstance(module, HeadOutput):
            yield from module.product.parameters()
        if isinstance(module, CompactMlp):
            yield from module.fc2.parameters()


def _streams(model: CompactViT) -> Iterator[Stream]:
    return (module for module in model.modules() if isinstance(module, Stream))
