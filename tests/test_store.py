import errno
import hashlib
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import vitcut.tensors
from vitcut.errors import ArtefactError, ConfigError
from vitcut.store import (
    atomic_folder,
    atomic_path,
    cache_dir,
    load,
    read_json,
    save,
    sealed,
    sha256_file,
    sha256_json,
    sweep,
    write_json,
    write_text,
)
from vitcut.tensors import read_tensors, write_tensors

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=8,
)


def _expect_refusal(path, match):
    with pytest.raises(ArtefactError, match=match) as caught:
        read_json(path, kind="circuit", version=1)
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
        assert temporary.parent.parent == tmp_path
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


def test_what_a_killed_process_left_is_removed_and_what_another_writes_stays(tmp_path):
    """Both have the name that the next writer looks for; only a lock tells them apart."""
    code = f"""
import os, signal, sys
from pathlib import Path
from vitcut.store import atomic_folder, atomic_path
write = {{"file": atomic_path, "folder": atomic_folder}}[sys.argv[1]]
with write(Path({str(tmp_path / "x")!r})) as part:
    print(part, flush=True)
    sys.stdin.read()
"""
    for kind in ("file", "folder"):
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        with subprocess.Popen([sys.executable, "-c", code, kind], **pipes) as process:
            part = Path(process.stdout.readline().strip())
            write_text(tmp_path / "x", "new")
            sweep(tmp_path)
            assert part.exists()
            process.kill()
        assert part.exists()
        write_text(tmp_path / "x", "newer")
        assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_sweeping_leaves_what_others_call_a_part(tmp_path):
    for name in (".part", "x.part", ".notes.part", ".x.abcdefgh.part"):
        (tmp_path / name).mkdir()
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / ".y.123456789abc.part").touch()
    sweep(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        ".notes.part", ".part", "deep", "x.part"
    ]  # fmt: skip
    sweep(tmp_path, deep=True)
    assert list((tmp_path / "deep").iterdir()) == []
    sweep(tmp_path / "nowhere", deep=True)


def test_a_replacement_that_was_left_halfway_is_finished(tmp_path):
    _write_folder(tmp_path / "x", "new")
    _write_folder(tmp_path / ".x.replaced-by-vitcut", "old")
    _write_folder(tmp_path / ".y.replaced-by-vitcut", "old")
    sweep(tmp_path, deep=True)
    assert _texts(tmp_path) == {"x": "new", "y": "old"}


@pytest.mark.parametrize("umask", [0o022, 0o077, 0o002])
def test_modes_follow_the_umask(tmp_path, umask):
    before = os.umask(umask)
    try:
        _write_folder(tmp_path / "x", "text")
        write_text(tmp_path / "y", "text")
        write_tensors(tmp_path / "z", {"a": torch.ones(2)}, {}, version=1)
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in tmp_path.iterdir()}
    assert modes == {"x": 0o777 & ~umask, "y": 0o666 & ~umask, "z": 0o666 & ~umask}


def test_json_comes_back_in_the_order_in_which_it_was_given(tmp_path):
    content = {"z": [1, 2.5, None], "a": "ü"}
    write_json(tmp_path / "x.json", sealed(content, 1))
    loaded = read_json(tmp_path / "x.json", kind="circuit", version=1)
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
    write_json(path, sealed({}, 2))
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
    at=st.none() | st.dictionaries(st.integers(-9, 9), st.lists(st.floats(-1, 1)).map(tuple)),
    free=st.none() | st.dictionaries(st.text(), json_values),
)


@given(wholes)
def test_a_saved_dataclass_comes_back_equal(tmp_path_factory, value):
    path = tmp_path_factory.mktemp("store") / "x.json"
    save(path, value, version=3)
    assert load(path, Whole, kind="whole", version=3) == value
    assert list(json.loads(path.read_text())) == [
        "format_version", "name", "parts", "at", "free", "sha256"
    ]  # fmt: skip


def _reseal(path, content):
    """Write a file as a forger would, with the right hash."""
    del content["sha256"]
    path.write_text(json.dumps(content | {"sha256": sha256_json(content)}))


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
        (lambda c: c.update(format_version=1), "make it again"),
        (
            lambda c: c["parts"][0].update(count=10**30),
            r"out of range - at `\$\.parts\[0\]\.count`",
        ),
    ],
)
def test_a_dataclass_of_other_keys_or_types_is_refused_by_name(tmp_path, edit, message):
    path = tmp_path / "x.json"
    save(path, Whole(parts=(Part(count=1), Part(count=2))), version=2)
    content = json.loads(path.read_text())
    edit(content)
    _reseal(path, content)
    with pytest.raises(ArtefactError, match=message) as caught:
        load(path, Whole, kind="whole", version=2)
    assert "\n" not in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("kind", ["json", "tensors"])
def test_no_bit_of_a_sealed_file_can_be_flipped_in_silence(tmp_path, kind):
    path, tensors = tmp_path / "x", {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(2)}
    if kind == "json":
        save(path, Whole(name="name", parts=(Part(count=1),)), version=2)
    else:
        write_tensors(path, tensors, {"of": "this"}, version=2)

    def read():
        if kind == "json":
            return load(path, Whole, kind="whole", version=2)
        found, facts = read_tensors(path, kind="whole", version=2)
        return {name: tensor.tolist() for name, tensor in found.items()}, facts

    whole, content = read(), path.read_bytes()
    for place in range(8 * len(content)):
        altered = bytearray(content)
        altered[place // 8] ^= 1 << place % 8
        path.write_bytes(altered)
        with suppress(ArtefactError):
            assert read() == whole, f"bit {place}"


def test_a_number_that_json_lacks_is_no_way_around_the_hash(tmp_path):
    (tmp_path / "x.json").write_text('{"format_version": 1, "a": NaN}')
    _expect_refusal(tmp_path / "x.json", "was altered")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_tensors_that_are_not_finite_are_refused(tmp_path, value):
    write_tensors(tmp_path / "x", {"a": torch.tensor([0.0, value])}, {}, version=1)
    with pytest.raises(ArtefactError, match="not finite, in a: restore it"):
        read_tensors(tmp_path / "x", kind="whole", version=1)


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


def test_tensors_that_share_memory_are_written_as_copies(tmp_path):
    whole = torch.arange(6.0)
    tensors = {"a": whole, "b": whole, "c": whole.view(2, 3), "d": whole[2:4]}
    write_tensors(tmp_path / "x.safetensors", tensors, {}, version=1)
    found, _ = read_tensors(tmp_path / "x.safetensors", kind="thing", version=1)
    assert found.keys() == tensors.keys()
    assert all(torch.equal(found[name], tensors[name]) for name in tensors)


def test_a_shortage_while_reading_is_not_called_damage(tmp_path, monkeypatch):
    def no_files(*_, **__):
        raise OSError(errno.EMFILE, "Too many open files")

    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {}, version=1)
    write_json(tmp_path / "x.json", sealed({}, 1))
    monkeypatch.setattr(vitcut.tensors, "safe_open", no_files)
    with pytest.raises(OSError, match="Too many open files"):
        read_tensors(tmp_path / "x.safetensors", kind="thing", version=1)
    monkeypatch.setattr(Path, "read_text", no_files)
    with pytest.raises(OSError, match="Too many open files"):
        read_json(tmp_path / "x.json", kind="thing", version=1)
