import hashlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vitcut.errors import ArtefactError
from vitcut.files import (
    atomic_path,
    cache_dir,
    read_json,
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


def _refused(path, match):
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
    _refused(tmp_path / "circuit.json", r"no circuit file at .*circuit\.json")


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
    _refused(path, "is not a readable circuit file")


def test_a_folder_is_no_file(tmp_path):
    _refused(tmp_path, "is not a readable circuit file")


@pytest.mark.parametrize(
    "content", [[], {}, None, {"format_version": "1"}, {"format_version": True}]
)
def test_a_foreign_file_is_refused(tmp_path, content):
    path = tmp_path / "x.json"
    path.write_text(json.dumps(content))
    _refused(path, "is not a vitcut circuit file: it has no format_version")


def test_a_newer_file_asks_for_an_upgrade(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"format_version": 2})
    _refused(path, "format_version 2, this vitcut reads up to 1: upgrade vitcut")


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
