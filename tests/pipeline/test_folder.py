import pytest
import yaml

from vitcut.errors import ArtefactError
from vitcut.pipeline.folder import RunFolder

SETTINGS = {"task": "drawn", "train": {"epochs": 3, "std": [0.1, 0.2]}}


def _expect_refusal(path, match, settings=SETTINGS):
    with pytest.raises(ArtefactError, match=match) as caught:
        RunFolder(path, settings)
    assert "\n" not in str(caught.value)


@pytest.fixture
def claimed(tmp_path):
    """A folder in which work was done."""
    RunFolder(tmp_path / "run", SETTINGS).claim()
    (tmp_path / "run" / "points").mkdir()
    return tmp_path / "run"


def test_looking_at_a_folder_writes_nothing(tmp_path):
    RunFolder(tmp_path / "run", SETTINGS)
    assert list(tmp_path.iterdir()) == []


def test_an_empty_folder_is_claimed(tmp_path):
    RunFolder(tmp_path, SETTINGS).claim()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == SETTINGS


def test_the_same_settings_go_on_and_write_nothing(claimed):
    before = (claimed / "config.yaml").stat().st_mtime_ns
    RunFolder(claimed, SETTINGS).claim()
    assert (claimed / "config.yaml").stat().st_mtime_ns == before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (SETTINGS | {"task": "animals"}, "task was 'drawn', now 'animals'"),
        (SETTINGS | {"train": {"epochs": 4, "std": [0.1, 0.2]}}, "train.epochs was 3, now 4"),
        (SETTINGS | {"train": {"epochs": 3, "std": [0.1]}}, r"train.std was \[0.1, 0.2\], now"),
        (SETTINGS | {"more": 1}, "more was None, now 1"),
        ({"task": "drawn"}, "train was .* now None"),
    ],
)
def test_other_settings_are_refused_by_the_key_that_differs(claimed, settings, message):
    _expect_refusal(
        claimed, f"holds a run of other settings: {message}.*choose another --out", settings
    )


def test_settings_may_be_mended_before_any_work_is_done(tmp_path):
    RunFolder(tmp_path, SETTINGS).claim()
    (tmp_path / "origin.json").touch()
    (tmp_path / ".config.yaml.x.part").touch()
    mended = SETTINGS | {"task": "animals"}
    RunFolder(tmp_path, mended).claim()
    assert yaml.safe_load((tmp_path / "config.yaml").read_text()) == mended


def test_what_changes_no_result_may_differ(tmp_path):
    settings = {"discover": {"tau": 0.1, "memory_gib": 8.0, "precision": "float32"}}
    other = {"discover": {"tau": 0.2, "memory_gib": 1.0, "precision": "float64"}}
    RunFolder(tmp_path, settings).claim()
    (tmp_path / "points").mkdir()
    _expect_refusal(tmp_path, "discover.tau was 0.1, now 0.2", other)
    RunFolder(tmp_path, other, free=("discover.tau",)).claim()


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    _expect_refusal(tmp_path, "is not empty and no run of vitcut: choose another --out")
    _expect_refusal(tmp_path / "thesis.tex", "is not empty and no run of vitcut")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- 1\n", "is no run's settings"),
        (b"", "is no run's settings"),
        (b"a: [\n", "is not readable"),
        (b"\xff\xfe\x00", "is not readable"),
    ],
)
def test_settings_that_cannot_be_read_are_refused(tmp_path, content, message):
    (tmp_path / "config.yaml").write_bytes(content)
    (tmp_path / "points").mkdir()
    _expect_refusal(tmp_path, message)
