import torch
from adapter_laws import tensors_of
from tiny import random_vit

from vitcut.compact.plan import ViTShape
from vitcut.model.weights import map_tensors


def test_every_tensor_is_changed_and_nothing_else():
    weights = random_vit(num_layers=2)
    zeros = map_tensors(weights, torch.zeros_like)
    assert len(tensors_of(zeros)) == len(tensors_of(weights)) == 8 + 2 * 16
    assert not any(tensor.any() for tensor in tensors_of(zeros))
    assert zeros.blocks[0].mlp.activation == weights.blocks[0].mlp.activation
    assert zeros.blocks[0].attn.scale == weights.blocks[0].attn.scale
    assert zeros.norm.eps == weights.norm.eps


def test_another_type_leaves_the_original_alone():
    weights = random_vit()
    single = weights.to(torch.float32)
    assert {tensor.dtype for tensor in tensors_of(single)} == {torch.float32}
    assert {tensor.dtype for tensor in tensors_of(weights)} == {torch.float64}
    assert (single.dtype, weights.dtype) == (torch.float32, torch.float64)


def test_nothing_to_change_copies_nothing():
    weights = random_vit()
    same = weights.to(device="cpu")
    pairs = zip(tensors_of(weights), tensors_of(same), strict=True)
    assert all(one.data_ptr() == other.data_ptr() for one, other in pairs)


def test_sizes_follow_from_the_tensors():
    weights = random_vit(
        num_layers=3, num_heads=2, width=6, patches_per_side=4, patch_size=2, num_prefix=2
    )
    assert (weights.graph.num_layers, weights.graph.num_heads) == (3, 2)
    assert (weights.width, weights.num_heads, weights.num_classes) == (6, 2, 4)
    assert (weights.patch_size, weights.channels, weights.image_size) == (2, 3, 8)
    assert (weights.num_prefix, weights.num_tokens) == (2, 18)
    assert weights.device == torch.device("cpu")


def test_the_shape_is_that_of_the_model():
    assert random_vit().shape == ViTShape(
        image_size=4,
        channels=3,
        patch_size=2,
        num_prefix=1,
        width=6,
        num_layers=2,
        num_heads=2,
        head_dim=3,
        hidden=5,
        activation="gelu",
        eps=1e-6,
        num_classes=4,
    )
    kinds = {"embed_norm": True, "final_norm": False, "head_norm": True, "rotary": True}
    kinds |= {"gated": True, "neuron_norm": True}
    other = random_vit(head_dim=4, num_read=0, patch_readout="mean", **kinds).shape
    assert {name: getattr(other, name) for name in kinds} == kinds
    assert (other.num_read, other.patch_readout) == (0, "mean")
