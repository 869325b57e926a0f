"""Pictures that a camera turned: EXIF orientation, for every library and every format."""

import io
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
from data_samples import write_folder
from PIL import ExifTags, Image, ImageOps
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionViT

import vitcut
from vitcut import cli
from vitcut.errors import ConfigError
from vitcut.images.decoding import decode
from vitcut.images.prepare import prepare
from vitcut.images.settings import DataSettings
from vitcut.preprocessing import WHOLE, Framing

TURNED = replace(WHOLE, orientation="apply")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def _turned(orientation: int, form: str = "PNG") -> bytes:
    """A picture whose quarters all differ, with an orientation."""
    quarters = np.array([[10, 90], [170, 250]], np.uint8).repeat(16, 0).repeat(16, 1)
    picture = Image.fromarray(quarters).convert("RGB")
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    stream = io.BytesIO()
    lossless = {"lossless": True} if form == "WEBP" else {}
    picture.save(stream, form, exif=exif, **lossless)
    return stream.getvalue()


@pytest.mark.parametrize("form", ["PNG", "JPEG", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_every_orientation_is_applied_as_pillow_does_or_ignored(orientation, form) -> None:
    content = _turned(orientation, form)
    with Image.open(io.BytesIO(content)) as picture:
        stored, upright = np.asarray(picture), np.asarray(ImageOps.exif_transpose(picture))
    for framing, expected in ((WHOLE, stored), (TURNED, upright)):
        found = decode(content, 32, framing)
        assert found.orientation == orientation
        np.testing.assert_array_equal(found.pixels, expected)


def test_what_pillow_turns_by_itself_is_not_counted_as_ignored() -> None:
    found = decode(_turned(6, "TIFF"), 32)
    assert found.orientation == 1
    np.testing.assert_array_equal(found.pixels, decode(_turned(6), 32, TURNED).pixels)


def test_broken_exif_does_not_spoil_a_picture() -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 8), (200, 0, 0)).save(stream, "PNG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    for framing in (WHOLE, TURNED):
        assert decode(stream.getvalue(), 8, framing).orientation == 1


def _photos(root: Path) -> str:
    files = {f"{name}/{i}.png": _turned(6 if i else 1) for name in ("cat", "dog") for i in range(9)}
    return str(write_folder(root / "photos", files))


def test_ignored_orientations_are_counted_each_time_and_the_choice_is_part_of_the_cache(
    tmp_path: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = DataSettings(source=_photos(tmp_path), image_size=32)
    for _ in range(2):
        stored = prepare(settings)
        told = "16 of 18 pictures have an EXIF orientation, which is ignored, as timm and torchvis"
        assert told in capsys.readouterr().err
    turned = prepare(settings, TURNED)
    assert "which is turned as it says" in capsys.readouterr().err
    assert not np.array_equal(stored.images, turned.images)
    assert len(list((cache / "data").iterdir())) == 2


LIBRARIES = ["timm", "torchvision", "transformers"]


def _module(library: str) -> nn.Module:
    """A tiny model of a library."""
    if library == "torchvision":
        return TorchvisionViT(32, 16, 1, 2, 16, 32, num_classes=2)
    if library == "transformers":
        transformers = pytest.importorskip("transformers")
        config = transformers.ViTConfig(
            image_size=32, patch_size=16, hidden_size=16, num_hidden_layers=1,
            num_attention_heads=2, intermediate_size=32, num_labels=2,
        )  # fmt: skip
        return transformers.ViTForImageClassification(config)
    sizes = {"img_size": 32, "patch_size": 16, "embed_dim": 16, "depth": 1, "num_heads": 2}
    return timm.create_model("vit_tiny_patch16_224", num_classes=2, **sizes)


@pytest.mark.parametrize("library", LIBRARIES)
def test_auto_is_what_the_models_library_does(tmp_path: Path, library: str) -> None:
    model = vitcut.load_model(_module(library), mean=0.5, std=0.5)
    expected = "apply" if library == "transformers" else "ignore"
    assert model.preprocessing.framing.orientation == expected
    images = vitcut.load_images(_photos(tmp_path), model=model)
    assert images.preprocessing.framing == model.preprocessing.framing


@pytest.mark.parametrize("library", LIBRARIES)
@pytest.mark.parametrize("chosen", ["apply", "ignore"])
def test_a_saved_model_keeps_what_was_chosen(tmp_path: Path, library: str, chosen: str) -> None:
    model = vitcut.load_model(_module(library), mean=0.5, std=0.5, labels=["cat", "dog"])
    taken = replace(model.preprocessing, framing=replace(WHOLE, orientation=chosen))
    replace(model, preprocessing=taken).save(tmp_path / "dense")
    again = vitcut.load_model(tmp_path / "dense")
    assert again.preprocessing.framing.orientation == chosen
    again.save(tmp_path / "again")
    assert vitcut.load_model(tmp_path / "again").preprocessing == again.preprocessing


def test_predict_turns_pictures_where_it_is_told_and_says_how_many(tmp_path: Path, capsys) -> None:
    model = vitcut.load_model(_module("timm"), mean=0.5, std=0.5, labels=["cat", "dog"])
    photos, upright, answers = _photos(tmp_path), tmp_path / "upright.png", {}
    with Image.open(f"{photos}/cat/1.png") as picture:
        ImageOps.exif_transpose(picture).save(upright)
    for way in ("auto", "ignore", "apply"):
        answers[way] = [one.groups for one in vitcut.predict(model, photos, orientation=way)]
        told = "turned as it says" if way == "apply" else "ignored, as timm and torchvision do"
        assert f"16 of 18 pictures have an EXIF orientation, which is {told}" in (
            capsys.readouterr().err
        )
    [expected] = vitcut.predict(model, upright)
    assert answers["auto"] == answers["ignore"] != answers["apply"]
    assert dict(answers["apply"][1]) == pytest.approx(dict(expected.groups))
    assert "EXIF" not in capsys.readouterr().err
    assert cli.main(["predict", "animals", photos, "--orientation", "up"]) == 2


def test_a_chosen_orientation_goes_with_the_model_that_is_made_of_the_images(tmp_path) -> None:
    from vitcut.inputs import for_images

    images = vitcut.load_images(_photos(tmp_path), image_size=32, orientation="apply")
    assert images.origin["orientation"] == "apply"
    assert images.fingerprint != vitcut.load_images(_photos(tmp_path), image_size=32).fingerprint
    model = vitcut.load_model(_module("timm"), mean=0.5, std=0.5)
    assert for_images(model, images).preprocessing.framing.orientation == "apply"
    theirs = replace(
        model, preprocessing=replace(model.preprocessing, framing=Framing(orientation="apply"))
    )
    with pytest.raises(ConfigError, match="takes images with orientation apply, got ignore"):
        for_images(theirs, vitcut.load_images(_photos(tmp_path), image_size=32))


def test_an_orientation_that_is_none_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["prepare", "--source", "drawn", "--orientation", "turn"]) == 2
    assert "orientation must be one of auto, apply, ignore, got turn" in capsys.readouterr().err
    settings = DataSettings()
    object.__setattr__(settings, "orientation", "turn")  # past the tests' own check of types
    with pytest.raises(ConfigError, match="orientation must be one of auto, apply, ignore"):
        settings.__post_init__()
