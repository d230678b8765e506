from __future__ import annotations

import io
import logging
import sys

import pytest

from ullme import progress
from ullme.progress import Progress


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


@pytest.fixture
def log(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    """What is logged where there is no terminal."""
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    caplog.set_level(logging.INFO)
    return caplog


def lines(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.message for record in caplog.records if record.name == "ullme.progress"]


def test_a_log_gets_a_line_every_ten_seconds_and_one_at_the_end(clock: list[float], log: pytest.LogCaptureFixture) -> None:
    with Progress(40, "encode", unit="text") as counter:
        for _ in range(40):
            clock[0] += 1
            counter.advance(note="loss 0.5")
    assert lines(log) == [
        "encode: 10/40 text, 1.0 text/s, 30 s left, loss 0.5",
        "encode: 20/40 text, 1.0 text/s, 20 s left, loss 0.5",
        "encode: 30/40 text, 1.0 text/s, 10 s left, loss 0.5",
        "encode: 40/40 text, 1.0 text/s, in 40.0 s, loss 0.5",
    ]


def test_the_end_is_told_once(log: pytest.LogCaptureFixture) -> None:
    with Progress(4, "encode", unit="text") as counter:
        counter.advance(4)
        counter.advance(0)
    assert len(lines(log)) == 1


def test_what_was_done_before_a_restart_does_not_count_as_speed(clock: list[float], log: pytest.LogCaptureFixture) -> None:
    with Progress(100, "train", unit="step", initial=80) as counter:
        clock[0] += 10
        counter.advance(10)
    assert lines(log) == ["train: 90/100 step, 1.0 step/s, 10 s left"]


def test_slow_units_are_told_in_seconds_each(clock: list[float], log: pytest.LogCaptureFixture) -> None:
    with Progress(4, "train", unit="step") as counter:
        clock[0] += 21
        counter.advance()
    assert lines(log) == ["train: 1/4 step, 21.0 s/step, 63 s left"]


def test_a_terminal_gets_a_bar_and_no_line(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    caplog.set_level(logging.INFO)
    with Progress(4, "train", unit="step") as counter:
        counter.advance(4, note="loss 0.250")
    assert lines(caplog) == []
    assert "train: 100%" in terminal.getvalue()
    assert "loss 0.250" in terminal.getvalue()


def test_an_error_inside_passes_through() -> None:
    with pytest.raises(KeyError), Progress(2, "train"):
        raise KeyError("x")
