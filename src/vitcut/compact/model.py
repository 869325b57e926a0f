"""``CompactViT``: the small ViT that a plan describes, ready to be trained, exported and shipped.

Filling it with a circuit's weights is left to the compiler, files to ``artefact.py``.
"""

import tempfile
from pathlib import Path

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
from vitcut.compact.plan import EMBED, BlockPlan, MlpPlan, Plan, ViTShape
from vitcut.compact.stream import Stream, Written, make_table, write
from vitcut.errors import ModelError
from vitcut.names import Activation
from vitcut.shapes import Float, Tensor


class CompactMlp(nn.Module):
    """What is left of a block's MLP for some tokens."""

    def __init__(self, plan: MlpPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.activation: Activation = shape.activation
        self.stream = Stream(plan.stream, shape)
        self.fc1 = nn.Linear(shape.width, plan.hidden)
        self.fc2 = nn.Linear(plan.hidden, shape.width, bias=plan.bias)

    def forward(self, written: Written) -> None:
        """Read the stream and write the output."""
        hidden = ACTIVATIONS[self.activation](self.fc1(self.stream(written)))
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
        self.blocks = nn.ModuleList(CompactBlock(block, shape) for block in plan.blocks)
        self.stream = self.classifier = self.logits = None
        if plan.classifier is None:
            self.logits = make_table(shape.num_classes)
        else:
            self.stream = Stream(plan.classifier, shape)
            self.classifier = nn.Linear(shape.width, shape.num_classes)
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
            # The prefix tokens and all positions stand in the tables of the streams that read this.
            patches = self.patch_embed(pixels).flatten(2)
            written[EMBED] = patches.transpose(1, 2)
        for block in self.blocks:
            block(written)
        return self._classify(written)

    def save_pretrained(
        self,
        folder: str | Path,
        *,
        circuit: Path | str | None = None,
        fill: Path | None = None,
        card: str | None = None,
    ) -> None:
        """Write a model directory; it appears as a whole or not at all.

        Args:
            folder: Where; an earlier model directory of that name is replaced.
            circuit: The ``circuit.json`` that the model was compiled from: its path or its text.
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
        circuit: Path | str | None = None,
        fill: Path | None = None,
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
        if self.stream is None or self.classifier is None:
            raise ModelError("the plan has neither a classifier nor constant logits")
        return self.classifier(self.stream(written))

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
