import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from vitcut.training.augment import (
    cutmix,
    draw_cutmix_box,
    normalize,
    shift_and_flip,
    soft_targets,
)

SIZE = 8


def _images(count: int, seed: int = 0) -> torch.Tensor:
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count, SIZE, SIZE, 3), generator=draw, dtype=torch.uint8)


def _moved(images, down, right, flipped):
    return shift_and_flip(
        images,
        down=torch.tensor([down]),
        right=torch.tensor([right]),
        flipped=torch.tensor([flipped]),
    )


def test_no_shift_and_no_flip_change_nothing():
    images = _images(1)
    assert torch.equal(_moved(images, 0, 0, False), images)


def test_a_flip_mirrors_left_and_right():
    images = _images(1)
    assert torch.equal(_moved(images, 0, 0, True), images.flip(2))


@given(down=st.integers(-6, 6), right=st.integers(-6, 6))
def test_a_shift_moves_the_image_and_mirrors_its_border_into_the_gap(down, right):
    images = _images(1)
    moved = _moved(images, down, right, False)
    padded = torch.nn.functional.pad(images.permute(0, 3, 1, 2).float(), (6, 6, 6, 6), "reflect")
    expected = padded[:, :, 6 - down : 14 - down, 6 - right : 14 - right]
    assert torch.equal(moved.permute(0, 3, 1, 2).float(), expected)


def test_each_image_moves_by_its_own_amount():
    images = _images(3)
    down, right = torch.tensor([0, 2, -3]), torch.tensor([1, 0, 5])
    flipped = torch.tensor([True, False, True])
    together = shift_and_flip(images, down=down, right=right, flipped=flipped)
    alone = [
        _moved(images[i : i + 1], down[i].item(), right[i].item(), flipped[i].item())
        for i in range(3)
    ]
    assert torch.equal(together, torch.cat(alone))


@given(st.integers(0, 2**32 - 1))
def test_cutmix_targets_sum_to_one_and_match_the_pasted_area(seed):
    torch.manual_seed(seed)
    # Image i is all of shade i, so a pixel says whose it is.
    images = torch.arange(4, dtype=torch.uint8).view(4, 1, 1, 1).expand(4, SIZE, SIZE, 3)
    targets = soft_targets(torch.arange(4), 4, 0.0)
    mixed, mixed_targets = cutmix(images, targets, box=draw_cutmix_box(SIZE, SIZE))
    for i in range(4):
        shares = torch.bincount(mixed[i, :, :, 0].flatten().long(), minlength=4) / SIZE**2
        torch.testing.assert_close(mixed_targets[i], shares)
    torch.testing.assert_close(mixed_targets.sum(1), torch.ones(4))


def test_cutmix_leaves_its_arguments_alone():
    images, targets = _images(4), soft_targets(torch.arange(4), 4, 0.1)
    before = images.clone(), targets.clone()
    cutmix(images, targets, box=(0, 4, 0, 4))
    assert torch.equal(images, before[0])
    assert torch.equal(targets, before[1])


@given(st.integers(0, 2**32 - 1))
def test_a_drawn_box_lies_inside_the_image(seed):
    torch.manual_seed(seed)
    top, bottom, left, right = draw_cutmix_box(SIZE, 2 * SIZE)
    assert 0 <= top <= bottom <= SIZE
    assert 0 <= left <= right <= 2 * SIZE


def test_smoothed_targets_sum_to_one_and_keep_their_label():
    targets = soft_targets(torch.tensor([2, 0]), 4, 0.2)
    torch.testing.assert_close(targets.sum(1), torch.ones(2))
    assert targets[0].tolist() == pytest.approx([0.05, 0.05, 0.85, 0.05])


def test_normalize_scales_bytes_per_channel():
    images = torch.tensor([0, 255, 51], dtype=torch.uint8).view(1, 1, 1, 3)
    scaled = normalize(images, (0.5, 0.5, 0.0), (0.5, 0.25, 1.0))
    assert scaled.shape == (1, 3, 1, 1)
    assert scaled.flatten().tolist() == pytest.approx([-1, 2, 0.2])
