"""How far long work is: lines without a terminal, bars on one, and what a child process does."""

import json
import sys
import time
from pathlib import Path

import pytest

from quantline.run import progress as module
from quantline.run.progress import FILE, Follower, at_work, counting, duration, progress


@pytest.fixture
def clock(monkeypatch) -> list[float]:
    """The time, which a test moves."""
    now = [1000.0]
    monkeypatch.setattr(module.time, "monotonic", lambda: now[0])
    return now


def lines_of(label: str, total: int | None) -> module._Lines:
    return module._Lines(label, "block", total)


def test_duration_is_said_as_exactly_as_people_want_it():
    said = [duration(seconds) for seconds in (0, 45.4, 80, 3600, 11_100, 187_200)]
    assert said == ["0 s", "45 s", "1 min 20 s", "1 h 0 min", "3 h 5 min", "2 d 4 h"]


def test_progress_yields_every_item_and_says_nothing_of_what_is_quick(capsys):
    assert list(progress(range(3), "counting", "number")) == [0, 1, 2]
    assert capsys.readouterr() == ("", "")


def test_a_line_has_what_is_done_and_an_estimate_of_the_rest(clock):
    told = lines_of("calibrating", 30)
    assert told.line() == "calibrating: 0 of 30 blocks in 0 s"
    for _ in range(10):
        clock[0] += 6
        told.advance(1)
    assert told.line() == "calibrating: 10 of 30 blocks in 1 min 0 s, about 2 min 0 s left"
    clock[0] += 5
    assert told.line() == "calibrating: 10 of 30 blocks in 1 min 5 s, about 1 min 55 s left"
    told.close()


def test_what_an_earlier_run_had_done_does_not_make_the_rest_look_short(clock):
    told = lines_of("gptq", 30)
    for step in (0.01,) * 20 + (60.0, 60.0):
        clock[0] += step
        told.advance(1)
    assert told.line().endswith("about 8 min 0 s left")
    told.close()


def test_without_a_total_there_is_no_estimate(clock):
    told = lines_of("reading", None)
    clock[0] += 3
    told.advance(1)
    assert told.line() == "reading: 1 block in 3 s"
    told.close()


def wait_for(words: str, said: list[str]) -> None:
    deadline = time.monotonic() + 20
    while not any(line.startswith(words) for line in said):
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_every_half_minute_a_line_tells_of_what_was_opened_last(monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(module, "LINE_S", 0.02)
    monkeypatch.setattr(module, "say", lambda line, error: said.append(line))
    with at_work("export bf16"):
        wait_for("export bf16: at work for ", said)
        with counting("writing", "tensor", 4) as advance:
            advance(1)
            wait_for("writing: 1 of 4 tensors in ", said)
    count = len(said)
    time.sleep(0.1)
    assert len(said) <= count + 1  # none after the end


def test_on_a_terminal_there_is_a_bar_and_no_lines(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    with at_work("calibrate"):
        for _ in progress(range(2), "forward pass", "block"):
            assert [entry.line() for entry in module._speaker._open][1:] == [None]
    assert "forward pass: 100%" in capsys.readouterr().err


def test_a_child_writes_how_far_it_is_and_the_one_that_waits_tells_it(tmp_path, monkeypatch, clock):
    path = tmp_path / "progress.json"
    follower = Follower(path, "measuring process of bf16")
    follower.look()  # nothing is written yet
    monkeypatch.setenv(FILE, str(path))
    with counting("divergence", "token", 100) as advance:
        for _ in range(4):
            clock[0] += 1
            advance(10)
        monkeypatch.delenv(FILE)
        follower.look()
        assert follower._told is not None
        said = follower._told.line()
        assert (
            said == "measuring process of bf16, divergence: 40 of 100 tokens in 0 s, about 0 s left"
        )
    monkeypatch.setenv(FILE, str(path))
    with counting("answers", "question", 3):
        monkeypatch.delenv(FILE)
        follower.look()
        assert "answers: 0 of 3 questions" in str(follower._told.line())
    path.write_text("[")
    follower.look()
    follower.close()
    assert module._speaker._open == []


def test_a_full_disk_does_not_end_what_tells_how_far_it_is(tmp_path, monkeypatch):
    monkeypatch.setenv(FILE, str(tmp_path / "nowhere" / "progress.json"))
    assert list(progress([1, 2], "counting", "number")) == [1, 2]


def test_the_file_of_a_child_has_what_a_follower_reads(tmp_path, monkeypatch):
    path = tmp_path / "progress.json"
    monkeypatch.setenv(FILE, str(path))
    with counting("speed", "repetition", 6) as advance:
        advance(2)
    assert json.loads(path.read_text()) == {
        **{"label": "speed", "unit": "repetition", "total": 6, "done": 2},
    }
    assert [one.name for one in Path(tmp_path).iterdir()] == ["progress.json"]
