"""Closed sets of words that several files share, grouped by what they are about."""

from typing import Literal, get_args

# Circuits

Ablation = Literal["zero", "mean", "resample", "linear"]
"""What stands in for a cut part."""

EdgeAblation = Literal["zero", "mean", "resample"]
"""What stands in for a cut edge; a linear fill is for whole parts only."""

Criterion = Literal["increment", "total"]
"""What ACDC compares with tau: the rise of the KL divergence, or the KL divergence itself."""

# Models

Letter = Literal["q", "k", "v"]
"""The inputs of a head: queries, keys and values."""

LETTERS: tuple[Letter, ...] = get_args(Letter)

TokenKind = Literal["cls", "register", "patch"]
"""Prefix tokens that the classifier reads, other prefix tokens, and patch tokens."""

TOKEN_KINDS: tuple[TokenKind, ...] = get_args(TokenKind)

Tokens = Literal["all", "split"]
"""Whether parts are over whole tokens, or exist once per token kind."""

PatchReadout = Literal["none", "normed_mean", "mean"]
"""What the classifier reads of the patches: nothing, the mean of their LayerNorms, or the LayerNorm
of their mean."""

Activation = Literal["gelu", "gelu_tanh", "quick_gelu", "silu", "relu"]
"""The nonlinearity of an MLP."""

SHIPPED_MODEL = "animals"
"""The model that comes with vitcut, and the name of its task."""

# Images

Split = Literal["train", "val", "test"]
"""Disjoint sets of images: for training and calibration, for choices, and for reported results."""

PairMode = Literal["each_other_group", "one_random"]
"""Corrupted images per clean image: one from each other group, or one from a random other group."""

# Runtimes

RuntimeName = Literal["torch", "torch-compile", "onnxruntime", "openvino"]
"""The software that runs a model; every measured latency names its own."""

# Exports

TargetName = Literal["onnx", "openvino", "pt2", "executorch", "litert", "transformers-js"]
"""What a model is exported for; each has a folder of its own."""

Precision = Literal["float32", "float16", "int8"]
"""The numbers that an exported model computes with."""
