"""The run events on disk: one JSON object a line, appended whole, and read past what is broken."""

import json
import os
import re
from pathlib import Path
from typing import Any

# Control characters that JSON leaves as they are: C1, those that change the direction of text, and
# separators of lines.
UNPRINTABLE = re.compile("[\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff]")

# What every event has, with its type.
KEYS: dict[str, type | tuple[type, ...]] = {
    "stage": str,
    "severity": str,
    "summary": str,
    "reason_code": (str, type(None)),
    "payload": dict,
}


def append_event(path: Path, event: dict[str, Any]) -> None:
    """Append an event as one line, in one write, so that lines of two processes do not mix.

    Where a full disk takes a part of it alone, writing the rest brings the system's own error.
    After a line that was cut off so, the next event starts a new one.

    Raises:
        OSError: If the file cannot take the line.
    """
    text = json.dumps(event, ensure_ascii=False, sort_keys=True)
    # JSON's own escapes in place of what would move a terminal that shows the file.
    text = UNPRINTABLE.sub(lambda found: f"\\u{ord(found[0]):04x}", text)
    line = text.encode("utf-8", "backslashreplace") + b"\n"  # a text may hold half a character
    descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
    try:
        size = os.fstat(descriptor).st_size
        if size and os.pread(descriptor, 1, size - 1) != b"\n":
            line = b"\n" + line
        while line:
            line = line[os.write(descriptor, line) :]
    finally:
        os.close(descriptor)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Return the events of a file, oldest first, without lines that are none of ours."""
    if not path.is_file():
        return []
    events = []
    for line in path.read_bytes().splitlines():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):  # a torn line, or bytes that are no text
            continue
        if isinstance(event, dict) and all(
            isinstance(event.get(key), kind) for key, kind in KEYS.items()
        ):
            events.append(event)
    return events
