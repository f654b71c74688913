"""A file of text as UTF-8, and a file of JSON lines, with the number of every line that is bad."""

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, Reason, StageError

SHOWN = 10  # bad lines in one message
BOM = "\ufeff"
# First bytes of a file → what it is; UTF-32's mark begins with UTF-16's.
MARKS = {
    b"\xff\xfe\x00\x00": "UTF-32",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\xff\xfe": "UTF-16",
    b"\xfe\xff": "UTF-16",
}
PACKED = {
    b"\x1f\x8b": "a file compressed with gzip",
    b"BZh": "a file compressed with bzip2",
    b"\xfd7zXZ\x00": "a file compressed with xz",
    b"\x28\xb5\x2f\xfd": "a file compressed with zstd",
    b"PK\x03\x04": "a zip archive",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
}
HALF_A_PAIR = re.compile("[\ud800-\udfff]")


def read_text_file(path: Path, reason: Reason | None = None) -> str:
    r"""Return the content of a UTF-8 file with plain line ends.

    A byte-order mark is dropped, also where files were joined and one begins a later line. Line
    ends are "\n", whether the file has those of Windows or of old Macs.

    Args:
        path: The file.
        reason: Of the error.

    Raises:
        StageError: dataset_invalid, for a file that is absent, packed, in another encoding, or
            has NUL characters; with the line where there is one.
    """

    def refuse(found: str, advice: str) -> StageError:
        message = f"expected a file of text in UTF-8 at {path}, found {found}; {advice}"
        return StageError(Failure.DATASET_INVALID, message, reason)

    if not path.is_file():
        if path.is_dir():
            raise refuse(
                "a folder", "join its files into one (cat folder/* > all.txt), and name it"
            )
        found = "something that is no regular file" if path.exists() else "no such file"
        raise refuse(found, "correct the path")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise_if_of_machine(error)
        raise refuse(f"one that cannot be read ({error.strerror})", "mend that") from error
    for mark, kind in PACKED.items():
        if data.startswith(mark):
            raise refuse(kind, "unpack it, and name the text or the JSON lines in it")
    for mark, encoding in MARKS.items():
        if data.startswith(mark):
            advice = (
                f"convert it: iconv -f {encoding} -t UTF-8 {path.name} > converted{path.suffix}"
            )
            raise refuse(encoding, advice)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = len((data[: error.start] + b".").splitlines())
        raise refuse(
            f"the byte 0x{data[error.start]:02x} in line {line}, which is no UTF-8",
            "if it is Latin-1, convert it: iconv -f LATIN1 -t UTF-8",
        ) from None
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    text = text.removeprefix(BOM).replace("\n" + BOM, "\n")
    if "\0" in text:
        line = text.count("\n", 0, text.index("\0")) + 1
        raise refuse(
            f"a NUL character in line {line}",
            "take it out, or convert the file if it is UTF-16",
        )
    return text


def flaw_of(text: str) -> str | None:
    """Say what no tokenizer takes in a text that comes out of JSON; None if it is sound."""
    if "\0" in text:
        return "a NUL character"
    half = HALF_A_PAIR.search(text)
    if half:
        return f"\\u{ord(half[0]):04x}, half of a surrogate pair, which is no character"
    return None


def json_lines(content: str) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line that is not blank."""
    # Not splitlines: a JSON string may hold U+2028 and its like as they are.
    for number, line in enumerate(content.split("\n"), 1):
        if line.strip():
            yield number, line


def parse_line(line: str) -> Any:
    """Return the value of a line of JSON. Raises ValueError, in plain words."""
    try:
        return json.loads(line)
    except RecursionError:
        raise ValueError("JSON that is nested too deeply") from None
    except json.JSONDecodeError as error:
        raise ValueError(f"no JSON ({error.msg} at character {error.colno})") from None


def _is_array(content: str) -> bool:
    """Whether a file is one JSON array of objects, as other tools write data sets."""
    if not content.lstrip().startswith("["):
        return False
    try:
        value = parse_line(content)
    except ValueError:
        return False
    return bool(value) and all(isinstance(item, dict) for item in value)


def read_json_lines(
    path: Path,
    read: Callable[[int, Any], None],
    expected: str,
    reason: Reason | None = None,
) -> None:
    """Read every line of a JSONL file, and name all that are bad.

    Args:
        path: The file; blank lines are skipped.
        read: Takes a line's number and value; it raises ValueError for one that is bad.
        expected: What a line has to be, for the message.
        reason: Of the error.

    Raises:
        StageError: dataset_invalid.
    """
    problems = []
    content = read_text_file(path, reason)
    for number, line in json_lines(content):
        try:
            read(number, parse_line(line))
        except ValueError as error:
            problems.append(f"line {number}: {error}")
    if problems:
        found = listing(problems)
        advice = f"mend {'that line' if len(problems) == 1 else 'those lines'}"
        if _is_array(content):
            found = "one JSON array"
            advice = f"write what is in it line by line: jq -c '.[]' {path.name} > lines.jsonl"
        raise StageError(
            Failure.DATASET_INVALID,
            f"expected {expected} on each line of {path}, found {found}; {advice}",
            reason,
        )


def listing(problems: list[str], shown: int = SHOWN) -> str:
    """Return one problem as it is, and several one a line, the first few of them."""
    if len(problems) == 1:
        return problems[0]
    lines = "".join(f"\n  {problem}" for problem in problems[:shown])
    more = f"\n  and {len(problems) - shown} more" if len(problems) > shown else ""
    return f"{len(problems)} that are bad:{lines}{more}\n"
