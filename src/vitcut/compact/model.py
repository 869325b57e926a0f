"""``CompactViT``: the small ViT that a plan describes, ready to be trained, exported and shipped.

Filling it with a circuit's weights is left to the compiler, files to ``artefact.py``.
"""

import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vitcut.compact.activations import ACTIVATIONS
from vitcut.compact.artefact import (
    Companions,
    ModelInfo,
    StoredModel,
    load_folder,
    require_shapes,
    resolve_folder,
    save_folder,
    upload_folder,
)
from vitcut.compact.attention import CompactAttention
from vitcut.compact.plan import EMBED, BlockPlan, MlpPlan, Plan, Rows, ViTShape
from vitcut.compact.stream import Stream, Written, by_image, make_table, write
from vitcut.errors import ModelError
from vitcut.names import Activation
from vitcut.shapes import Float, Tensor


class CompactMlp(nn.Module):
    """What is left of a block's MLP for some tokens."""

    def __init__(self, plan: MlpPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.activation: Activation = shape.activation
        self.gated = shape.gated
        self.stream = Stream(plan.stream, shape)
        computed = shape.num_computed(plan.hidden)
        # Gates come first.
        self.fc1 = nn.Linear(shape.width, 2 * computed if shape.gated else computed)
        self.norm = (
            nn.LayerNorm(computed, shape.eps, elementwise_affine=False)
            if shape.neuron_norm
            else None
        )
        self.fc2 = nn.Linear(plan.hidden, shape.width, bias=plan.bias)

    def forward(self, written: Written) -> None:
        """Read the stream and write the output."""
        hidden = self.fc1(self.stream(written))
        if self.gated:
            gate, hidden = hidden.chunk(2, dim=-1)
            hidden = ACTIVATIONS[self.activation](gate) * hidden
        else:
            hidden = ACTIVATIONS[self.activation](hidden)
        if self.norm is not None:
            # Neurons that are read come first.
            hidden = self.norm(hidden)[..., : self.plan.hidden]
        written[self.plan.name] = write(hidden, self.fc2, bias=self.plan.bias)


class CompactBlock(nn.Module):
    """What is left of a block."""

    def __init__(self, plan: BlockPlan, shape: ViTShape) -> None:
        super().__init__()
        self.attention = CompactAttention(plan.attention, shape) if plan.attention else None
        self.mlps = nn.ModuleList(CompactMlp(item, shape) for item in plan.mlps)

    def forward(self, written: Written) -> None:
        """Run what is left."""
        if self.attention is not None:
            self.attention(written)
        for mlp in self.mlps:
            mlp(written)


class CompactViT(nn.Module):
    """A ViT without the parts that a circuit cuts.

    LayerNorm's affine parts, the attention scale and all constants are folded into the products
    and into one table per stream.
    """

    def __init__(self, plan: Plan, info: ModelInfo | None = None) -> None:
        """Build the modules, freshly initialised.

        Args:
            plan: What to build.
            info: What a user of the model needs to know besides: labels, preprocessing, origin.
        """
        super().__init__()
        shape = plan.shape
        self.plan = plan
        self.info = info or ModelInfo()
        self.patch_embed = (
            nn.Conv2d(shape.channels, shape.width, shape.patch_size, shape.patch_size, bias=False)
            if plan.embeds
            else None
        )
        self.positions = None
        self.embed_norm: nn.Module | None = None
        if plan.embeds and shape.embed_norm:
            self.positions = make_table(shape.num_patches, shape.width)
            self.embed_norm = nn.LayerNorm(shape.width, shape.eps, bias=False)
        self.blocks = nn.ModuleList(CompactBlock(block, shape) for block in plan.blocks)
        pools_first = shape.patch_readout == "mean"
        self.readout = nn.ModuleList(
            Stream(
                item,
                shape,
                pooled=pools_first and item.rows == shape.patch_rows,
                normalised=shape.final_norm,
            )
            for item in plan.readout
        )
        self.classifier = self.logits = None
        if plan.readout:
            features = sum(shape.num_features(item.rows) for item in plan.readout)
            self.classifier = nn.Linear(features, shape.num_classes)
        else:
            self.logits = make_table(shape.num_classes)
        self.apply(_initialise)

    def forward(
        self, pixels: Float[Tensor, "images channels y x"]
    ) -> Float[Tensor, "images classes"]:
        """Logits of normalised images.

        Raises:
            ModelError: The images have another size or other channels than the model takes.
        """
        if not torch.compiler.is_compiling():
            self._check(pixels)
        if self.logits is not None:
            return self.logits.expand(pixels.shape[0], -1)
        written: Written = {}
        if self.patch_embed is not None:
            # The prefix tokens and all positions stand in the tables of the streams that read this,
            # unless they have to be there before a norm.
            patches = self.patch_embed(pixels).flatten(2).transpose(1, 2)
            if self.embed_norm is not None:
                patches = self.embed_norm(patches + self.positions)
            written[EMBED] = patches
        for block in self.blocks:
            block(written)
        return self._classify(written)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        circuit: str | Path | None = None,
        fill: str | Path | None = None,
        card: str | None = None,
    ) -> None:
        """Write a model directory; it appears as a whole or not at all.

        Args:
            folder: Where; an earlier model directory of that name is replaced.
            circuit: The ``circuit.json`` that the model was compiled from: its path, or its text,
                which begins with a brace.
            fill: The ``fill.safetensors`` that it was compiled with.
            card: The model card's text, for ``README.md``.

        Raises:
            ArtefactError: ``folder`` exists and is no model directory.
        """
        stored = StoredModel(plan=self.plan, info=self.info, tensors=self.state_dict())
        save_folder(Path(folder), stored, Companions(circuit=circuit, fill=fill, card=card))

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, revision: str | None = None
    ) -> "CompactViT":
        """Load a model directory, or a model of the Hugging Face hub; in eval mode, trainable.

        Raises:
            ArtefactError: There is none, or it is damaged, altered or of another version.
        """
        folder = resolve_folder(folder_or_hub_id, revision=revision)
        stored = load_folder(folder)
        with torch.device("meta"):
            model = cls(stored.plan, stored.info)
        require_shapes(model.state_dict(), stored.tensors, origin=folder)
        model.load_state_dict(stored.tensors, assign=True)
        return model.eval()

    def push_to_hub(
        self,
        hub_id: str,
        *,
        private: bool = False,
        circuit: str | Path | None = None,
        fill: str | Path | None = None,
        card: str | None = None,
    ) -> str:
        """Upload the model directory to the Hugging Face hub.

        Args:
            hub_id: ``owner/name``; created if it does not exist.
            private: Whether a newly created repository is private.
            circuit: As for ``save_pretrained``.
            fill: As for ``save_pretrained``.
            card: As for ``save_pretrained``.

        Returns:
            The address of the upload.
        """
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder, circuit=circuit, fill=fill, card=card)
            return upload_folder(folder, hub_id, private=private)

    def _classify(self, written: Written) -> Tensor:
        if self.classifier is None:
            raise ModelError("the plan has neither a classifier nor constant logits")
        read = [self._features(stream, stream(written)) for stream in self.readout]
        return self.classifier(torch.cat(read, dim=1) if len(read) > 1 else read[0])

    def _features(self, stream: Any, normed: Tensor) -> Float[Tensor, "images features"]:
        """Prefix tokens one after the other, patches as their mean."""
        rows: Rows = stream.plan.rows
        if stream.pooled or rows.count == 1:
            return normed
        by_token = by_image(normed, rows)
        patches = rows == self.plan.shape.patch_rows
        return by_token.mean(1) if patches else by_token.flatten(1)

    def _check(self, pixels: Tensor) -> None:
        shape = self.plan.shape
        expected = (shape.channels, shape.image_size, shape.image_size)
        if tuple(pixels.shape[1:]) != expected or pixels.ndim != 4:
            raise ModelError(
                f"images must have shape [images, {', '.join(map(str, expected))}], got "
                f"{list(pixels.shape)}: convert them to RGB and resize them first"
            )


def _initialise(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        for bias in [value for name, value in module.named_parameters() if name == "bias"]:
            nn.init.zeros_(bias)
