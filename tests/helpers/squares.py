"""A function for items of workers."""

from pathlib import Path

from quantline.files import write_json


def square(number: int, folder: Path) -> None:
    """Write the square of a number; of 13, fail."""
    if number == 13:
        raise ValueError("13 brings bad luck")
    write_json(folder / "square.json", {"square": number**2})
