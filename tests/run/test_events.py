"""Run events on disk: whole lines, also beside broken ones."""

import errno
import json
from pathlib import Path

import pytest

from quantline.run.events import append_event, read_events
from tests.helpers.full_disk import largest_file

EVENT = {
    "stage": "load",
    "severity": "info",
    "summary": "load started",
    "reason_code": None,
    "payload": {"instance": None},
}


@pytest.fixture
def path(tmp_path) -> Path:
    return tmp_path / "events.jsonl"


def test_read_events_returns_what_was_appended_in_order(path):
    assert read_events(path) == []
    for number in range(3):
        append_event(path, EVENT | {"summary": f"line {number} ü"})
    assert [event["summary"] for event in read_events(path)] == [
        "line 0 ü",
        "line 1 ü",
        "line 2 ü",
    ]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3


@pytest.mark.parametrize(
    "broken",
    [
        b'{"stage": "lo',
        b"\xff\xfe\x00",
        b"[1, 2]",
        b'"text"',
        b'{"stage": "load"}',
        b'{"stage": 1, "severity": "info", "summary": "", "reason_code": null, "payload": {}}',
        b'{"stage": "a", "severity": "info", "summary": "", "reason_code": null, "payload": 3}',
        b"",
    ],
)
def test_read_events_goes_on_past_a_line_that_is_none(path, broken):
    append_event(path, EVENT)
    with path.open("ab") as file:
        file.write(broken)
    append_event(path, EVENT | {"summary": "after"})
    assert [event["summary"] for event in read_events(path)] == ["load started", "after"]


def test_append_event_takes_half_a_character(path):
    append_event(path, EVENT | {"summary": "half \ud83d"})
    (event,) = read_events(path)
    assert event["summary"].startswith("half ")
    assert all(json.loads(line) for line in path.read_bytes().splitlines())


@pytest.mark.parametrize("room", [0, 1, 77])
def test_append_event_on_a_full_disk_raises_the_systems_own_error(path, room):
    append_event(path, EVENT)
    with largest_file(path.stat().st_size + room), pytest.raises(OSError, match="large") as full:
        append_event(path, EVENT | {"summary": "too much"})
    assert full.value.errno == errno.EFBIG
    append_event(path, EVENT | {"summary": "with room again"})
    assert [event["summary"] for event in read_events(path)] == ["load started", "with room again"]
