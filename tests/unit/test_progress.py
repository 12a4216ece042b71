"""Progress where there is no terminal: a line at the start, then one a minute with rate and time left."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytest

from daco_rt import progress as module
from daco_rt.progress import progress


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def test_lines_say_rate_and_time_left(clock: list[float], capsys: Any):
    with progress("harvesting", total=100_000, unit="stimuli") as advance:
        assert capsys.readouterr().err == "harvesting …\n"
        clock[0] += 59
        advance(590)
        assert capsys.readouterr().err == ""
        clock[0] += 1
        advance(10)
        assert capsys.readouterr().err == "harvesting: 600 of 100,000 stimuli, 10 a second, 2 h 46 min left\n"
        clock[0] += 30
        advance(2000)
        assert capsys.readouterr().err == ""
        clock[0] += 30
        advance(57_400)
        assert "60,000 of 100,000 stimuli, 500 a second, 1 min left" in capsys.readouterr().err


def test_an_unknown_total_has_no_end(clock: list[float], capsys: Any):
    with progress("reading", unit="texts") as advance:
        clock[0] += 100
        advance(25)
    assert capsys.readouterr().err == "reading …\nreading: 25 texts, 0.25 a second\n"


def test_a_terminal_shows_the_rate(monkeypatch: pytest.MonkeyPatch, capsys: Any):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("FORCE_COLOR", "1")
    with progress("harvesting", total=400, unit="stimuli") as advance:
        for _ in range(4):
            advance(100)
            time.sleep(0.01)
    shown = capsys.readouterr().err
    assert "400/400" in shown and "stimuli/s" in shown
