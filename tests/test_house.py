"""The house rules that no linter checks."""

import ast
from pathlib import Path
from symtable import symtable

import vitcut

SRC = Path(vitcut.__file__).parent
ROOT = Path(__file__).parents[1]
FILES = sorted(SRC.rglob("*.py"))
MOST_LINES = 600
MOST_BODY_LINES = 80


def _name(path):
    return path.relative_to(SRC).as_posix()


def _trees():
    return {_name(path): ast.parse(path.read_text(encoding="utf-8")) for path in FILES}


def test_no_file_is_longer_than_600_lines():
    lengths = {_name(path): len(path.read_text().splitlines()) for path in FILES}
    assert {name: lines for name, lines in lengths.items() if lines > MOST_LINES} == {}


def test_no_function_body_is_longer_than_80_lines():
    found = {}
    for name, tree in _trees().items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                body = node.body[1:] if ast.get_docstring(node) else node.body
                found[f"{name}:{node.name}"] = (
                    body[-1].end_lineno - body[0].lineno + 1 if body else 0
                )
    assert {name: lines for name, lines in found.items() if lines > MOST_BODY_LINES} == {}


def test_every_file_says_what_it_is_in_one_line():
    for name, tree in _trees().items():
        first = (ast.get_docstring(tree) or "").splitlines()[:1]
        assert first, f"{name} has no docstring"
        assert first[0].endswith("."), f"{name}: {first[0]}"


def test_packages_hold_no_code():
    for name, tree in _trees().items():
        if name.endswith("/__init__.py"):
            assert len(tree.body) == 1, f"{name} holds more than its docstring"


def test_annotations_are_never_postponed():
    for path in FILES:
        assert "from __future__ import annotations" not in path.read_text(), _name(path)


def test_benchmarks_and_examples_import_what_is_there():
    missing = []
    for path in [*ROOT.glob("benchmarks/*.py"), *ROOT.glob("examples/**/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vitcut."):
                here = SRC.parent.joinpath(*node.module.split("."))
                known = {item.stem for item in here.glob("*.py")}
                file = here.with_suffix(".py")
                if file.is_file():
                    # Not imported: a package of an extra may be absent.
                    table = symtable(file.read_text(encoding="utf-8"), str(file), "exec")
                    known |= set(table.get_identifiers())
                names = {item.name for item in node.names}
                missing += [f"{path.name}: {node.module}.{name}" for name in names - known]
    assert missing == []
