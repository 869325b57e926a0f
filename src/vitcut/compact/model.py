"""``CompactViT``: the small ViT that a plan describes, to be trained, exported and shipped."""

import tempfile
from copy import deepcopy
from pathlib import Path
from typing import cast

import torch
from torch import nn

from vitcut.compact.artefact import CARD, load_folder, resolve_folder, save_folder
from vitcut.compact.attention import CompactAttention, HeadOutput
from vitcut.compact.card import naming
from vitcut.compact.info import ModelInfo
from vitcut.compact.layers import (
    ACTIVATIONS,
    PatchEmbedding,
    Stream,
    Written,
    by_image,
    make_table,
    write,
)
from vitcut.compact.plan import EMBED, BlockPlan, MlpPlan, Plan, ViTShape
from vitcut.errors import ArtefactError, ModelError, one_line
from vitcut.hub import hub_access
from vitcut.names import Activation
from vitcut.shapes import Float, Tensor
from vitcut.store import write_text


class CompactMlp(nn.Module):
    """What is left of a block's MLP for some tokens."""

    def __init__(self, plan: MlpPlan, shape: ViTShape) -> None:
        super().__init__()
        self.plan = plan
        self.activation: Activation = shape.activation
        self.gated = shape.gated
        self.stream = Stream(plan.stream, shape)
        computed = shape.num_computed(plan.hidden)
        # Gates come first: [gates, neurons] in one product.
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
            # The norm needs all neurons; those that are read come first.
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

    Attributes:
        plan: What it computes.
        info: Labels, preprocessing and origin.
        folder: The model directory that it was loaded from, if any.
    """

    def __repr__(self) -> str:
        shape = self.plan.shape
        params = sum(tensor.numel() for tensor in self.parameters())
        return (
            f"CompactViT({shape.num_layers} blocks, {params:,} parameters, {shape.num_classes} "
            f"classes, {shape.image_size} px)"
        )

    def __init__(self, plan: Plan, info: ModelInfo | None = None) -> None:
        """Build the modules, freshly initialised.

        Args:
            plan: What to build.
            info: What else a user of the model needs to know: labels, preprocessing, origin.
        """
        super().__init__()
        shape = plan.shape
        self.plan = plan
        self.info = info or ModelInfo()
        self.folder: Path | None = None
        self.patch_embed = PatchEmbedding(shape) if plan.embeds else None
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
        for module in self.modules():
            if isinstance(module, nn.Linear):
                for name, value in module.named_parameters():
                    if name == "weight":
                        nn.init.trunc_normal_(value, std=0.02)
                    else:
                        nn.init.zeros_(value)

    def forward(
        self, pixels: Float[Tensor, "images channels y x"]
    ) -> Float[Tensor, "images classes"]:
        """Logits of normalised images.

        Raises:
            ModelError: The images have another size or other channels than the model takes.
        """
        shape = self.plan.shape
        expected = (shape.channels, shape.image_size, shape.image_size)
        if not torch.compiler.is_compiling() and tuple(pixels.shape[1:]) != expected:
            raise ModelError(
                f"images must have shape [images, {', '.join(map(str, expected))}], got "
                f"{list(pixels.shape)}: convert them to RGB and resize them first"
            )
        if self.logits is not None:
            return self.logits.expand(pixels.shape[0], -1)
        written: Written = {}
        if self.patch_embed is not None:
            # Prefix tokens and positions are in the tables of the streams that read this, unless
            # a norm follows: then positions are added before it.
            patches = self.patch_embed(pixels)
            if self.embed_norm is not None:
                patches = self.embed_norm(patches + self.positions)
            written[EMBED] = patches
        for block in self.blocks:
            block(written)
        features: list[Tensor] = []
        for plan, stream in zip(self.plan.readout, self.readout, strict=True):
            # Patches become the mean of their tokens, [images, width]; prefix tokens are put one
            # after the other, [images, rows * width].
            normed = stream(written)
            if not stream.pooled and plan.rows.count > 1:
                tokens = by_image(normed, plan.rows)
                normed = tokens.mean(1) if plan.rows == shape.patch_rows else tokens.flatten(1)
            features.append(normed)
        classifier = cast("nn.Linear", self.classifier)
        return classifier(torch.cat(features, dim=1) if len(features) > 1 else features[0])

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
                which begins with a brace. By default that of the directory it was loaded from.
            fill: The ``fill.safetensors`` that it was compiled with. The model runs without it; it
                is needed to build the masked model again.
            card: The model card's text, for ``README.md``. By default that of the directory it was
                loaded from, if its weights are unchanged; else a card without measurements.

        Raises:
            ArtefactError: ``folder`` exists and is not a model directory, the circuit or the fill
                cannot be read, or the tensors cannot be written.
        """
        save_folder(
            Path(folder),
            plan=self.plan,
            info=self.info,
            tensors=self.state_dict(),
            circuit=circuit,
            fill=fill,
            card=card,
            origin=self.folder,
        )

    @classmethod
    def from_pretrained(
        cls, folder_or_hub_id: str | Path, *, revision: str | None = None
    ) -> "CompactViT":
        """Load a model directory, or a model of the Hugging Face hub; in eval mode, trainable.

        Raises:
            ArtefactError: There is none, or it is damaged, altered or of another version.
        """
        folder = resolve_folder(folder_or_hub_id, revision=revision)
        plan, info, tensors = load_folder(folder)
        # On "meta" nothing is initialised: all values are assigned.
        with torch.device("meta"):
            model = cls(plan, info)
        expected, got = (
            {name: list(tensor.shape) for name, tensor in of.items()}
            for of in (model.state_dict(), tensors)
        )
        for name in sorted(expected.keys() | got.keys()):
            if expected.get(name) != got.get(name):
                raise ArtefactError(
                    f"tensor {name} in {folder} must have the shape {expected.get(name)} that the "
                    f"plan needs (None: no such tensor), got {got.get(name)}: save the model again"
                )
        model.load_state_dict(tensors, assign=True)
        model.folder = folder
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
            card: As for ``save_pretrained``; its example loads the model from the hub.

        Returns:
            The address of the upload.

        Raises:
            ArtefactError: The hub does not answer or does not let you write there, or as for
                ``save_pretrained``.
        """
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError

        api = HfApi()
        with tempfile.TemporaryDirectory() as parent:
            folder = Path(parent) / "model"
            self.save_pretrained(folder, circuit=circuit, fill=fill, card=card)
            path = folder / CARD
            write_text(path, naming(path.read_text(encoding="utf-8"), hub_id))
            try:
                with hub_access():
                    api.create_repo(hub_id, private=private, exist_ok=True)
                    commit = api.upload_folder(repo_id=hub_id, folder_path=folder)
            except (HfHubHTTPError, HFValidationError, OSError) as error:
                refused = isinstance(error, HfHubHTTPError)
                remedy = "; `hf auth login` says who you are" if refused else ""
                raise ArtefactError(
                    f"cannot upload to {hub_id}: {one_line(error)}{remedy}"
                ) from None
            return str(commit.commit_url)


@torch.no_grad()
def centred(model: CompactViT) -> CompactViT:
    """A frozen copy in eval mode whose streams have mean 0 over the width, for export.

    LayerNorm takes the mean over the width off its input, and all streams are read through
    LayerNorms, so the mean of what is written never matters. Taken off the weights of every writer
    once, it need not be taken off every token of every image: the LayerNorms become
    RMSNormalization in ONNX. Nothing changes but rounding. If the classifier reads without a
    LayerNorm, the copy is plain.

    Source:
        LayerNorm's invariance to a shift of its input: Ba et al. 2016, arXiv:1607.06450, section 5.
    """
    model = deepcopy(model).eval().requires_grad_(requires_grad=False)
    if not model.plan.shape.final_norm:
        return model
    writers: list[nn.Module] = [] if model.patch_embed is None else [model.patch_embed]
    for module in model.modules():
        if isinstance(module, HeadOutput):
            writers.append(module.product)
        elif isinstance(module, CompactMlp):
            writers.append(module.fc2)
        elif isinstance(module, Stream):
            if module.table is not None:
                module.table.sub_(module.table.mean(-1, keepdim=True))
            module.centred = True
    for writer in writers:
        for value in writer.parameters():
            # Output channels, the stream's width, come first: [width, inputs], [width].
            value.sub_(value.mean(0, keepdim=True))
    if model.embed_norm is not None:
        model.embed_norm = nn.Sequential(model.embed_norm, _Centre())
    return model


class _Centre(nn.Module):
    """Takes the mean over the width off what a norm with weights of its own has written."""

    def forward(self, values: Float[Tensor, "*tokens width"]) -> Float[Tensor, "*tokens width"]:
        return values - values.mean(-1, keepdim=True)
