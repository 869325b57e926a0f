"""Closed sets of words that several floors share."""

from typing import Literal

Ablation = Literal["zero", "mean", "resample", "linear"]
"""What stands in for a cut part."""

EdgeAblation = Literal["zero", "mean", "resample"]
"""What stands in for a cut edge; a linear fill is of whole parts."""

Criterion = Literal["increment", "total"]
"""What ACDC compares with tau: the rise of the KL divergence, or the KL divergence itself."""

PairMode = Literal["each_other_group", "one_random"]
"""Corrupted images per clean image: one from each other group, or one from a random other group."""

RuntimeName = Literal["torch", "torch-compile", "onnxruntime", "openvino"]
"""What executes a model; every measured latency names its own."""

Split = Literal["train", "val", "test"]
"""Disjoint image sets: fitting and calibration, choosing, and reporting."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
"""What stands between the two products of an MLP."""

PatchReadout = Literal["none", "normed_mean", "mean"]
"""What the classifier reads of the patches: nothing, the mean of their LayerNorms, or the LayerNorm
of their mean."""

Letter = Literal["q", "k", "v"]
"""What a head computes of its input: queries, keys, values."""

LETTERS: tuple[Letter, ...] = ("q", "k", "v")

SHIPPED_MODEL = "animals"
"""The model that comes with vitcut, and the name of its task."""

SiteKey = tuple[int, str, int]
"""Block, "heads" or "neurons", position of the token kind: parts that can stand in for another."""

Tokens = Literal["all", "split"]
"""Whether parts are over whole tokens or exist once per token kind."""

TokenKind = Literal["cls", "register", "patch"]
"""Prefix tokens that the classifier reads, other prefix tokens, patch tokens."""

TOKEN_KINDS: tuple[TokenKind, ...] = ("cls", "register", "patch")
