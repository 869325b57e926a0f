"""The pages that users read name only what is there: links, commands, flags and Python names."""

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
import yaml

import vitcut
from vitcut import cli, errors
from vitcut.task import parse_task

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("docs/**/*.md")])
CHANGES = {"run": {"--source", "--taus"}, "demo": {"--source", "--taus"}}
"""Changes of a recipe, which no parser lists; those with a dot are left out."""

_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_INLINE = re.compile(r"`([^`\n]+)`")
_LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
_COMMAND = re.compile(r"(?:^|\s)vitcut ([a-z]+)\b(.*)")
_FLAG = re.compile(r"--[a-z][\w.-]*")


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def code_lines(page: Path) -> Iterator[str]:
    text = page.read_text(encoding="utf-8")
    for _, block in _FENCE.findall(text):
        yield from block.replace("\\\n", " ").splitlines()
    outside = _FENCE.sub("", text)
    yield from (line for line in outside.splitlines() if line.startswith("    "))
    yield from _INLINE.findall(outside)


def commands(page: Path) -> list[tuple[str, set[str]]]:
    found = (_COMMAND.search(line.split(" #")[0]) for line in code_lines(page))
    return [(match[1], set(_FLAG.findall(match[2]))) for match in found if match]


def python_blocks(page: Path) -> list[str]:
    text = page.read_text(encoding="utf-8")
    return [block for language, block in _FENCE.findall(text) if language == "python"]


def anchors(page: Path) -> set[str]:
    text = _FENCE.sub("", page.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in headings}


@cache
def flags_of(verb: str) -> frozenset[str]:
    parser = cli.build_parser(verb)
    shown = {flag.replace("_", "-") for flag in _FLAG.findall(parser.format_help())}
    return frozenset(shown | CHANGES.get(verb, set()) | {"--debug", "--help"})


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_relative_link_leads_somewhere(page):
    for link in _LINK.findall(_FENCE.sub("", page.read_text(encoding="utf-8"))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{name_of(page)} links to {link}, which is not there"
        if anchor and target.suffix == ".md":
            assert anchor in anchors(target), f"{name_of(page)}: no heading for {link}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_shown_exists_with_its_flags(page):
    for verb, flags in commands(page):
        assert verb in cli.VERBS, f"{name_of(page)} shows vitcut {verb}, which is no command"
        unknown = {flag for flag in flags if "." not in flag} - flags_of(verb)
        assert not unknown, f"{name_of(page)}: vitcut {verb} has no {', '.join(sorted(unknown))}"


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_python_snippets_compile_and_use_public_names(page):
    for block in python_blocks(page):
        compile(block, name_of(page), "exec")
        for name in re.findall(r"\bvitcut\.([A-Za-z_]+)\(", block):
            assert name in vitcut.__all__, f"{name_of(page)} uses vitcut.{name}"


def test_the_pages_show_the_main_commands():
    shown = {verb for page in PAGES for verb, _ in commands(page)}
    assert shown == set(cli.VERBS)


def test_every_error_class_is_explained():
    text = (ROOT / "docs" / "errors.md").read_text(encoding="utf-8")
    classes = [item for item in vars(errors).values() if isinstance(item, type)]
    assert len(classes) > 1
    for item in classes:
        assert f"{item.__name__}`" in text, f"docs/errors.md leaves out {item.__name__}"


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == vitcut.__version__
    assert f"## [{vitcut.__version__}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_label_files_shown_are_label_files():
    page = ROOT / "docs" / "how-to" / "choose-a-task.md"
    shown = [
        block
        for language, block in _FENCE.findall(page.read_text(encoding="utf-8"))
        if language == "yaml"
    ]
    groups = [parse_task(block, origin="shown.yaml").groups for block in shown]
    assert groups == [
        ("cats", "dogs"), ("tabby", "golden retriever", "1"), ("n02123045", "other"),
        ("cat", "dog"), ("cat", "dog"), ("crane", "pug"),
    ]  # fmt: skip
