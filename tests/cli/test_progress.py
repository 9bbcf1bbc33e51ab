"""Progress, with a clock of the tests' own."""

from __future__ import annotations

import io
import math

import pytest
from rich.console import Console

from harness.cli.progress import LiveProgress, PlainProgress, Tally, clock
from harness.planning import PlannedJob

JOB = PlannedJob(
    "0" * 16, "digits[latent_dim=2]", "avb", "avb[lr=0.0001]", {"lr": 1e-4}, 1, "steps=5000", "", waiting=()
)  # fmt: skip


class Time:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0:00"), (7.4, "0:07"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (math.nan, "?"), (math.inf, "?")],
)
def test_clock(seconds: float, text: str) -> None:
    assert clock(seconds) == text


def test_remaining_times_are_those_of_steady_work() -> None:
    time = Time()
    tally = Tally(time)
    tally.whole.start(4)
    assert tally.whole.left() == "?"
    time.now = 60.0
    tally.start_job(JOB)
    tally.finish_job()  # one of four in a minute
    assert tally.whole.left() == "3:00"
    tally.start_job(JOB)
    assert tally.job_left() == "?"
    tally.advance(0.25, 100, -1.5, 10.0)
    assert tally.job_left() == "0:30"
    time.now = 75.0
    assert tally.whole.left() == "2:45"
    assert tally.fit_facts() == ["25%", "objective -1.500", "0:30 left", "10 steps/s"]


def test_remaining_times_do_not_count_what_earlier_runs_have_done() -> None:
    time = Time()
    tally = Tally(time)
    tally.whole.start(2)
    tally.start_job(JOB)
    tally.resume(0.5, 2000)
    assert tally.fit_facts() == ["starting"]
    assert tally.whole.left() == "?"
    time.now = 10.0
    tally.advance(0.75, 3000, -1.5, 30.0)  # a quarter of a job in ten seconds
    assert (tally.job_left(), tally.whole.left()) == ("0:10", "0:50")
    tally.finish_job()
    tally.start_job(JOB)
    time.now = 20.0
    assert tally.whole.left() == "0:40"


def test_jobs_that_are_fitted_together_count_as_so_many() -> None:
    time = Time()
    tally = Tally(time)
    tally.whole.start(8)
    tally.start_job(JOB, 4)
    time.now = 10.0
    tally.advance(0.5, 100, -1.5, 10.0)  # half of four jobs
    assert tally.job.endswith(", seed 1 and 3 more at once")
    assert tally.whole.left() == "0:30"
    tally.start_job(JOB)
    assert tally.job.endswith(", seed 1")


def test_plain_progress_tells_of_a_resumption(capsys: pytest.CaptureFixture[str]) -> None:
    progress = PlainProgress(Tally(Time()))
    progress.started(2)
    progress.job_started(JOB)
    progress.resumed(0.37, 1850)
    progress.job_started(JOB)
    progress.resumed(0.0, 500)  # nobody knows the part where convergence decides
    lines = capsys.readouterr().err.splitlines()
    assert lines[1].endswith("seed 1: resumed at step 1850, 37%")
    assert lines[3].endswith("seed 1: resumed at step 500")


def test_plain_lines_are_few(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    progress = PlainProgress(Tally(time))
    progress.started(2)
    progress.job_started(JOB)
    for second in range(1, 36):
        time.now = float(second)
        progress.step(second / 35, 100 * second, 3.25, float(second))
    progress.measuring("importance")
    progress.job_finished(JOB, "failed", "RuntimeError: half-way")
    progress.finished()
    said = capsys.readouterr()
    assert said.out == ""
    lines = said.err.splitlines()
    assert len(lines) == 5  # start, after 10, 20 and 30 seconds, end
    assert lines[0] == "[1/2] avb[lr=0.0001] on digits[latent_dim=2], seed 1: started"
    assert "step 1000, 29%, objective 3.250, 0:25 left, 100 steps/s, all jobs: 1:00 left" in lines[1]
    assert lines[-1].endswith("failed after 0:35: RuntimeError: half-way")


def test_plain_lines_tell_of_long_measuring_now_and_then(capsys: pytest.CaptureFixture[str]) -> None:
    time = Time()
    progress = PlainProgress(Tally(time))
    progress.started(1)
    progress.job_started(JOB)
    progress.measuring("ais")
    for second in range(1, 26):
        time.now = float(second)
        progress.measured(second / 50, f"acceptance 0.{second}")
    time.now = 31.0
    progress.measuring("bdmc")
    progress.job_finished(JOB, "ok", "")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5  # start, after 10 and 20 seconds, the next evaluator, end
    assert lines[1].endswith("seed 1: measuring: ais 20%, acceptance 0.10")
    assert lines[2].endswith("seed 1: measuring: ais 40%, acceptance 0.20")
    assert lines[3].endswith("seed 1: measuring: bdmc")


@pytest.mark.parametrize("width", [60, 80, 100, 140])
def test_the_live_line_shows_how_far_measuring_is(width: int) -> None:
    screen = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    progress = LiveProgress(screen, Tally(Time()))
    progress.tally.whole.start(1)
    progress.job_started(JOB)
    progress.step(1.0, 5000, -23.4, 10.0)

    def line() -> str:
        with screen.capture() as capture:
            screen.print(progress.drawn())
        lines = capture.get().splitlines()
        assert all(len(text) <= width for text in lines)
        return lines[0]

    progress.measuring("ais")
    assert "measuring: ais" in line()
    assert "%" not in line()
    progress.measured(0.25, "acceptance 0.65")
    assert "measuring: ais 25%  acceptance 0.65" in line()
    progress.measuring("bdmc")
    assert "measuring: bdmc" in line()
    assert "acceptance" not in line()


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_live_lines_fit_the_terminal_and_keep_the_essentials(width: int) -> None:
    screen = Console(width=width, file=io.StringIO(), force_terminal=True, color_system=None)
    progress = LiveProgress(screen, Tally(Time()))
    progress.tally.whole.start(12)
    progress.job_started(JOB)
    progress.step(0.5, 2000, -23.4512, 10.0)
    with screen.capture() as capture:
        screen.print(progress.drawn())
    lines = capture.get().splitlines()
    assert len(lines) == 2
    assert all(len(line) <= width for line in lines)
    assert "objective -23.451" in lines[0]
    assert "0:10 left" in lines[0]
    assert "0 of 12 jobs" in lines[1]
    if width >= 100:
        assert "avb[lr=0.0001]" in lines[0]
        assert "200 steps/s" in lines[0]


def test_live_progress_tells_of_failures_and_leaves_the_screen_clean() -> None:
    file = io.StringIO()
    progress = LiveProgress(Console(width=100, file=file, force_terminal=True, color_system=None))
    progress.started(2)
    for status, reason in (("ok", ""), ("failed", "RuntimeError: [half-way]")):
        progress.job_started(JOB)
        progress.resumed(0.37, 1850)
        progress.measuring("exact")
        progress.job_finished(JOB, status, reason)
    progress.finished()
    text = file.getvalue()
    assert "seed 1: failed: RuntimeError: [half-way]" in text
    assert text.count("seed 1: resumed at step 1850, 37%") == 2
    assert ": ok" not in text
    assert text.endswith("\x1b[2K") or text.rstrip().endswith("\x1b[2K")  # the bars are wiped
