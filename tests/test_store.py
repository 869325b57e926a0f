import hashlib
import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import ArtefactError, ConfigError
from vitcut.store import (
    atomic_folder,
    atomic_path,
    cache_dir,
    load,
    read_json,
    save,
    sha256_file,
    sha256_json,
    write_json,
    write_text,
)

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def _expect_refusal(path, match):
    with pytest.raises(ArtefactError, match=match) as caught:
        read_json(path, kind="circuit", newest_version=1)
    assert "\n" not in str(caught.value)


def test_a_block_that_raises_leaves_the_old_file_and_no_temporary(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")

    def write_half():
        with atomic_path(path) as temporary:
            temporary.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_until_the_block_ends_the_old_file_is_seen(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
        assert path.read_text() == "old"
        assert temporary.parent == tmp_path
    assert path.read_text() == "new"
    assert list(tmp_path.iterdir()) == [path]


def test_a_written_file_can_be_read_by_everyone_and_makes_its_folders(tmp_path):
    path = tmp_path / "a" / "b" / "file.txt"
    write_text(path, "grün")
    assert path.read_text(encoding="utf-8") == "grün"
    assert path.stat().st_mode & 0o777 == 0o644


def _write_folder(folder, text, **options):
    with atomic_folder(folder, **options) as part:
        assert part.parent == folder.parent
        (part / "file.txt").write_text(text)


def _texts(parent):
    return {path.name: (path / "file.txt").read_text() for path in parent.iterdir()}


def test_a_folder_is_replaced_whole(tmp_path):
    _write_folder(tmp_path / "a" / "x", "old")
    (tmp_path / "a" / "x" / "stale").touch()
    _write_folder(tmp_path / "a" / "x", "new")
    assert _texts(tmp_path / "a") == {"x": "new"}
    assert [path.name for path in (tmp_path / "a" / "x").iterdir()] == ["file.txt"]
    assert (tmp_path / "a" / "x").stat().st_mode & 0o777 == 0o755


def test_a_link_is_replaced_and_what_it_points_to_stays(tmp_path):
    _write_folder(tmp_path / "far" / "x", "old")
    (tmp_path / "near").mkdir()
    (tmp_path / "near" / "x").symlink_to(tmp_path / "far" / "x")
    _write_folder(tmp_path / "near" / "x", "new")
    assert _texts(tmp_path / "near") == {"x": "new"}
    assert _texts(tmp_path / "far") == {"x": "old"}


def test_a_folder_that_must_not_be_replaced_stays(tmp_path):
    _write_folder(tmp_path / "x", "first", replace=False)
    _write_folder(tmp_path / "x", "second", replace=False)
    assert _texts(tmp_path) == {"x": "first"}


def test_a_block_that_raises_leaves_the_old_folder_and_no_temporary(tmp_path):
    _write_folder(tmp_path / "x", "old")

    def write_half():
        with atomic_folder(tmp_path / "x") as part:
            (part / "file.txt").write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_half()
    assert _texts(tmp_path) == {"x": "old"}


def test_a_new_folder_that_cannot_take_its_name_leaves_the_old_one(tmp_path, monkeypatch):
    _write_folder(tmp_path / "x", "old")
    rename = Path.replace

    def refuse_part(path, target):
        if path.suffix == ".part":
            raise OSError("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "replace", refuse_part)
    with pytest.raises(OSError, match="no"):
        _write_folder(tmp_path / "x", "new")
    assert _texts(tmp_path) == {"x": "old"}


def test_a_kill_between_the_renames_loses_nothing(tmp_path):
    _write_folder(tmp_path / "x", "old")
    code = f"""
import os, signal
from pathlib import Path
from vitcut.store import atomic_folder
rename = Path.replace
def rename_and_die(path, target):
    rename(path, target)
    os.kill(os.getpid(), signal.SIGKILL)
with atomic_folder(Path({str(tmp_path / "x")!r})):
    Path.replace = rename_and_die
"""
    killed = subprocess.run([sys.executable, "-c", code], check=False)
    assert killed.returncode == -signal.SIGKILL
    assert not (tmp_path / "x").exists()
    with atomic_folder(tmp_path / "x"):
        assert (tmp_path / "x" / "file.txt").read_text() == "old"


@pytest.mark.parametrize(("age_s", "stays"), [(4000, False), (60, True)])
def test_a_temporary_folder_of_a_killed_process_is_removed_after_a_while(tmp_path, age_s, stays):
    part = tmp_path / ".x.abc.part"
    part.mkdir()
    (part / "file.txt").write_text("half")
    changed = part.stat().st_mtime - age_s
    os.utime(part / "file.txt", (changed, changed))
    os.utime(part, (changed, changed))
    _write_folder(tmp_path / "x", "new")
    assert part.exists() == stays


def test_json_comes_back_in_the_order_in_which_it_was_given(tmp_path):
    content = {"format_version": 1, "z": [1, 2.5, None], "a": "ü"}
    write_json(tmp_path / "x.json", content)
    loaded = read_json(tmp_path / "x.json", kind="circuit", newest_version=1)
    assert list(loaded.items()) == list(content.items())


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_a_number_that_json_lacks_is_refused_and_leaves_the_old_file(tmp_path, number):
    path = tmp_path / "x.json"
    path.write_text("old")
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"x": number})
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_file_is_named(tmp_path):
    _expect_refusal(tmp_path / "circuit.json", r"no circuit file at .*circuit\.json")


@pytest.mark.parametrize(
    "content",
    [
        pytest.param(b'{"format_version": 1', id="truncated"),
        pytest.param(b"", id="empty"),
        pytest.param(b"\xff\xfe", id="binary"),
        pytest.param(b"[" * 100_000, id="too deep"),
        pytest.param(b'{"format_version": ' + b"9" * 5000 + b"}", id="too long a number"),
    ],
)
def test_a_damaged_file_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_bytes(content)
    _expect_refusal(path, "is not a readable circuit file")


def test_a_folder_is_no_file(tmp_path):
    _expect_refusal(tmp_path, "is not a readable circuit file")


@pytest.mark.parametrize(
    "content", [[], {}, None, {"format_version": "1"}, {"format_version": True}]
)
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    _expect_refusal(path, "is not a vitcut circuit file: it has no format_version")


def test_a_newer_file_asks_for_an_upgrade(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"format_version": 2})
    _expect_refusal(path, "format_version 2, this vitcut reads up to 1: upgrade vitcut")


@dataclass(frozen=True, kw_only=True)
class Part:
    count: int
    size: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Whole:
    name: str | None = None
    parts: tuple[Part, ...] = ()
    at: dict[int, tuple[float, ...]] | None = None
    free: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        if self.name == "":
            raise ConfigError("name must not be empty")


wholes = st.builds(
    Whole,
    name=st.none() | st.text(min_size=1),
    parts=st.lists(st.builds(Part, count=st.integers(-9, 9), size=st.floats(-1, 1))).map(tuple),
    at=st.none() | st.dictionaries(st.integers(), st.lists(st.floats(-1, 1)).map(tuple)),
    free=st.none() | st.dictionaries(st.text(), json_values),
)


@given(wholes)
def test_a_saved_dataclass_comes_back_equal(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("store") / "x.json"
    save(path, value, version=3)
    assert load(path, Whole, kind="whole", version=3) == value
    assert list(json.loads(path.read_text())) == ["format_version", "name", "parts", "at", "free"]


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda c: c.pop("name"), r"missing field `name` - at `\$`"),
        (lambda c: c["parts"][1].pop("count"), r"missing.* `count` - at `\$\.parts\[1\]`"),
        (lambda c: c["parts"][1].pop("size"), r"missing field `size` - at `\$\.parts\[1\]`"),
        (lambda c: c["parts"][0].update(more=1), r"unknown field `more` - at `\$\.parts\[0\]`"),
        (lambda c: c["parts"][0].update(count=True), r"`int`, got `bool` - at `\$\.parts.*count`"),
        (lambda c: c["parts"][0].update(count=1.5), r"`int`, got `float` - at `\$\.parts.*count`"),
        (lambda c: c["parts"][0].update(size="1"), r"`float`, got `str` - at `\$\.parts.*size`"),
        (lambda c: c.update(at={"a": []}), "Expected `int`, got `str`"),
        (lambda c: c.update(name=""), "name must not be empty"),
        (lambda c: c.update(format_version=3), "upgrade vitcut"),
    ],
)
def test_a_dataclass_of_other_keys_or_types_is_refused_by_name(tmp_path, edit, message):
    path = tmp_path / "x.json"
    save(path, Whole(parts=(Part(count=1), Part(count=2))), version=2)
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    with pytest.raises(ArtefactError, match=message) as caught:
        load(path, Whole, kind="whole", version=2)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


def test_the_hash_of_a_file_is_that_of_its_bytes(tmp_path):
    (tmp_path / "x").write_bytes(b"abc")
    assert sha256_file(tmp_path / "x") == hashlib.sha256(b"abc").hexdigest()


@given(st.dictionaries(st.text(), json_values))
def test_the_hash_of_json_ignores_the_order_of_keys(content):
    assert sha256_json(content) == sha256_json(dict(reversed(content.items())))


@given(json_values, json_values)
def test_different_json_hashes_differently(one, other):
    same = json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)
    assert (sha256_json(one) == sha256_json(other)) == same


def test_the_cache_is_where_the_environment_says(tmp_path, monkeypatch):
    monkeypatch.setenv("VITCUT_CACHE", str(tmp_path))
    assert cache_dir() == tmp_path
    monkeypatch.setenv("VITCUT_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "vitcut"
