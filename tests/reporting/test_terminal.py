from __future__ import annotations

import io
import re
from types import SimpleNamespace

import pytest
from rich.console import Console

from rexrag.reporting.terminal import Progress, duration, step_line


def plain() -> tuple[Console, io.StringIO]:
    out = io.StringIO()
    return Console(file=out, force_terminal=False, width=200, highlight=False), out


def test_without_a_terminal_there_are_plain_lines() -> None:
    console, out = plain()
    with Progress(console=console) as progress:
        progress.stage("building [the] index", total=2)
        progress.advance_to(1)
        progress.training(done=1, total=3)
        progress.waiting(2, finished=3, needed=16)
        progress.step(2, metrics={"target/em": 0.25, "probe/em": None, "target/dead_end_rate": 0.5})
        progress.evaluation({"split": "dev", "step": 2, "em": 0.5, "em_low": 0.25, "em_high": 0.75, "n": 8})
    lines = out.getvalue().splitlines()
    assert lines[0] == "building [the] index ..."
    assert re.fullmatch(r"building \[the\] index: \d+\.\d s", lines[1])
    assert lines[2].startswith("step 2/3  EM target 0.25 probe -  dead ends 50%  rescued -%")
    assert lines[2].endswith("left")
    assert lines[3] == "EM on dev at step 2: 0.50 [0.25, 0.75], n = 8"
    assert "\x1b" not in out.getvalue()


def test_a_note_holds_nothing_that_a_terminal_would_act_on() -> None:
    console, out = plain()
    with Progress(console=console) as progress:
        progress.note("a passage\nwith \x1b]0;a title\x07 in it")
    assert out.getvalue() == "a passage\nwith \ufffd]0;a title\ufffd in it\n"


def test_a_long_stage_tells_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 0.0, 20.0, 21.0, 40.0, 50.0])
    monkeypatch.setattr("rexrag.reporting.terminal.time", SimpleNamespace(monotonic=lambda: next(clock)))
    console, out = plain()
    progress = Progress(console=console)
    progress.stage("warm start", total=10)
    for done in (4, 5, 8):
        progress.advance_to(done)
    progress.end_stage()
    assert out.getvalue().splitlines() == [
        "warm start ...",
        "  warm start: 40%, 30 s left",
        "  warm start: 80%, 10 s left",
        "warm start: 50 s",
    ]


def test_a_terminal_gets_a_bar_that_goes_away_and_the_same_lines() -> None:
    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=120, highlight=False)
    with Progress(console=console) as progress:
        progress.training(done=0, total=2)
        progress.step(1, metrics={"target/em": 0.25})
    assert "step 1/2  EM target 0.25" in out.getvalue()


def test_a_failed_stage_does_not_say_that_it_is_done() -> None:
    console, out = plain()
    with pytest.raises(ValueError, match="broken"), Progress(console=console) as progress:
        progress.stage("building")
        raise ValueError("broken")
    assert out.getvalue().splitlines() == ["building ..."]


def test_numbers_line_up() -> None:
    lines = [step_line(step, total=100, metrics={"target/em": 0.1, "group/rescued": 0.4}) for step in (7, 100)]
    assert len(set(map(len, lines))) == 1
    assert "rescued 40%" in lines[0]


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.94, "9.9 s"), (59.6, "1 min 0 s"), (200, "3 min 20 s"), (7500, "2 h 5 min")],
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text
