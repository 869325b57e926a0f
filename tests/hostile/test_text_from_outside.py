"""Names from outside that would steer a terminal or change a page are shown as they are."""

import inspect
from dataclasses import replace

import pytest
import yaml

from vitcut import cli
from vitcut.circuit import Circuit
from vitcut.compact.card import Origin
from vitcut.compact.info import ModelInfo
from vitcut.errors import DataError, one_line, plain_markdown, printable
from vitcut.graph import Graph
from vitcut.progress import Meter, Terminal, say
from vitcut.reports.cards import compact_card
from vitcut.reports.show import show_circuit
from vitcut.reports.tables import point_table, print_table
from vitcut.results import Point, Results

ESC = "\x1b[31mred\x1b[0m\x1b]0;title\x07"
NASTY = [
    "pets[/v2]",
    "[bold]x",
    ":cat:",
    ESC,
    "a\r\x08b",
    "\u202egnp.exe",
    "\udcff\udc80",
    "\x9b2J",
]
FORBIDDEN = "\x1b\x07\r\x08\u202e\x9b\udcff"


@pytest.mark.parametrize("name", NASTY)
def test_names_reach_the_terminal_as_they_are_or_escaped(capsys, name):
    expected = printable(name)
    circuit = replace(Circuit.full(Graph(num_layers=1, num_heads=2)), task=name)
    show_circuit(circuit)
    point = Point(name=name, accuracy_coarse=0.5)
    results = Results(task=name, machine={"cpu": name}, dense=None, points=(point,))
    print_table(point_table(results), title=name)
    say(f"{name}\nwith a break")
    Terminal().print(name)
    shown = capsys.readouterr()
    assert shown.out.count(expected) >= 4
    assert shown.err == f"{expected} with a break\n"
    assert not set(FORBIDDEN) & set(shown.out + shown.err)


@pytest.mark.parametrize("name", NASTY)
def test_errors_are_one_printable_line(capsys, monkeypatch, name):
    def fail(*_, **__):
        raise DataError(f"no class {name}\nhere")

    monkeypatch.setitem(cli.VERBS, "show", replace(cli.VERBS["show"], call=fail))
    fail.__signature__ = inspect.Signature()
    assert cli.main(["show"]) == 2
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert not set(FORBIDDEN) & set(told)


def test_the_letters_of_every_script_stay():
    for name in ("Käse", "\u0646\u200c\u0647", "猫", "\N{ZERO WIDTH JOINER}", "a\nb"):
        assert printable(name) == name
    assert one_line(ValueError("a\nb\x1b")) == r"a b\x1b"


def test_a_bar_shows_a_label_with_brackets(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Meter("pets[/v2]", 2) as meter:
        meter.advance(note="[/x]")
    shown = capsys.readouterr().err
    assert "pets[/v2]" in shown
    assert "[/x]" in shown


@pytest.mark.parametrize("name", ["<script>alert(1)</script>", "[a](http://b)", "|x|", "# h\n# g"])
def test_cards_show_names_and_no_markup(name):
    info = ModelInfo(class_names=(name, "b"), group_names=(name, "b"), group_of_class=(0, 1))
    point = Point(name=name, accuracy_coarse=0.5, images=3)
    results = Results(task=name, machine={"cpu": name}, dense=None, points=(point,))
    origin = Origin(model=name, license=name, base_model=name, pictures=name, dataset=name)
    card = compact_card(results, point, info, origin)
    _, front, text = card.split("---\n", 2)
    assert yaml.safe_load(front)["base_model"] == name
    assert plain_markdown(name) in text
    assert not [mark for mark in ("<script", "[a](", "\n# g") if mark in text]
