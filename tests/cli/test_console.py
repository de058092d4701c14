"""Progress: a bar on a terminal, else a line with the time left each half minute."""

from threading import Event

import pytest

from latentguard.cli import console
from latentguard.cli.console import ProgressLines, duration, progress


class Clock:
    """A clock that is set by hand."""

    def __init__(self):
        self.seconds = 100.0

    def __call__(self):
        return self.seconds


@pytest.fixture
def clock():
    return Clock()


class TestLine:
    def test_count_share_and_time_left(self, clock):
        lines = ProgressLines("capture", 9_600, clock)
        clock.seconds += 30
        lines.advance(1_200)
        assert lines.line() == "capture: 1,200 of 9,600 (12%), about 4 min left"

    def test_the_speed_is_that_of_the_last_lines(self, clock):
        """The prompts of an earlier run come at once, and say nothing of the speed."""
        lines = ProgressLines("score", 1_000, clock)
        lines.advance(500)
        for _ in range(console.REMEMBERED):
            clock.seconds += 30
            lines.advance(10)
            lines.line()
        clock.seconds += 30
        lines.advance(10)
        assert lines.line() == "score: 560 of 1,000 (56%), about 22 min left"

    def test_without_progress_no_time_is_made_up(self, clock):
        lines = ProgressLines("capture", 10, clock)
        clock.seconds += 30
        assert lines.line() == "capture: 0 of 10 (0%)"

    def test_a_step_that_is_done_has_no_time_left(self, clock):
        lines = ProgressLines("capture", 10, clock)
        clock.seconds += 30
        lines.advance(10)
        assert lines.line() == "capture: 10 of 10 (100%)"

    def test_an_unknown_total_is_a_count(self, clock):
        lines = ProgressLines("score", None, clock)
        lines.advance(1_234)
        assert lines.line() == "score: 1,234 done"

    def test_a_new_step_begins_at_nothing(self, clock):
        lines = ProgressLines("capture", 10, clock)
        lines.advance(10)
        lines.step("calibrate", 20)(5)
        clock.seconds += 30
        assert lines.line() == "calibrate: 5 of 20 (25%), about 2 min left"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0 s"), (89, "89 s"), (90, "2 min"), (3_600, "60 min"), (7_500, "2 h 05 min")],
)
def test_a_duration_is_in_the_unit_that_people_use(seconds, text):
    assert duration(seconds) == text


class TestProgress:
    def test_without_a_terminal_a_line_is_written_each_period(self, monkeypatch):
        written, seen = [], Event()

        def echo(text):
            written.append(text)
            seen.set()

        monkeypatch.setattr(console, "PERIOD", 0.001)
        monkeypatch.setattr(console, "echo_err", echo)
        with progress("capture", 10) as view:
            view.advance(4)
            seen.clear()
            assert seen.wait(60)
        assert written[-1].startswith("capture: 4 of 10 (40%)")

    def test_a_short_step_without_a_terminal_writes_nothing(self, capsys):
        with progress("capture", 10) as view:
            view.advance(10)
        assert capsys.readouterr().err == ""

    def test_on_a_terminal_there_is_a_bar(self, monkeypatch, capsys):
        monkeypatch.setenv("FORCE_COLOR", "1")
        with progress("capture", 10) as view:
            view.advance(3)
            view.step("calibrate", 20)(20)
        err = capsys.readouterr().err
        assert "calibrate" in err
        assert "20/20" in err
