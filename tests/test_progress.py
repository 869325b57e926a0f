import sys

import pytest

from vitcut import progress
from vitcut.progress import Meter, say, track


@pytest.fixture
def clock(monkeypatch):
    """A clock that the test moves."""

    class Clock:
        now = 0.0

        def monotonic(self):
            return self.now

    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def _lines(capsys):
    out, err = capsys.readouterr()
    assert out == ""
    return err.splitlines()


def test_a_line_goes_to_standard_error_as_it_is(capsys):
    text = "[bold]x[/bold] /a/path :smile: " + "long " * 60
    say(text)
    assert _lines(capsys) == [text]


def test_what_is_done_within_two_seconds_is_silent(capsys, clock):
    for _ in track(range(3), "work", 3):
        clock.now += 0.5
    assert _lines(capsys) == []


def test_what_takes_longer_says_how_far_it_is_and_how_long_it_will_take(capsys, clock):
    with Meter("work", 100, unit="images") as meter:
        clock.now = 4.0
        meter.advance(20, note="loss 0.5")
    assert _lines(capsys) == ["work: 20/100, 5 images/s, 16 s left, loss 0.5"]


def test_further_lines_come_every_fifteen_seconds(capsys, clock):
    with Meter("work", 100) as meter:
        for _ in range(40):
            clock.now += 1
            meter.advance()
    assert [line.split(",")[0] for line in _lines(capsys)] == [
        *("work: 2/100", "work: 17/100", "work: 32/100"),
    ]


def test_a_note_stays_until_it_is_replaced(capsys, clock):
    with Meter("work", 4) as meter:
        meter.advance(note="first")
        clock.now = 5.0
        meter.advance()
    assert _lines(capsys)[0].endswith("first")


def test_tracking_yields_every_item_in_order():
    assert list(track("abc", "work", 3)) == ["a", "b", "c"]


def test_on_a_terminal_a_bar_is_shown_and_removed(capsys, monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "xterm")
    with Meter("work", 2, unit="images") as meter:
        meter.advance(note="halfway")
        meter.advance()
    out, err = capsys.readouterr()
    assert out == ""
    assert "work" in err
    assert "2/2" in err


def test_an_error_inside_a_bar_is_not_swallowed(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)

    def fail():
        with Meter("work", 2):
            raise KeyError("x")

    with pytest.raises(KeyError):
        fail()
