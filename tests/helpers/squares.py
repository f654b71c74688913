"""A function for items of workers."""

import time
from pathlib import Path

from quantline.files import write_json


def square(number: int, folder: Path) -> None:
    """Write the square of a number; of 13, fail."""
    if number == 13:
        raise ValueError("13 brings bad luck")
    write_json(folder / "square.json", {"square": number**2})


def square_on_ray(number: int, marks: str, seconds: float, folder: Path) -> None:
    """Leave a mark that names the node of Ray, take some time, and write the square."""
    import ray

    node = ray.get_runtime_context().get_node_id()
    (Path(marks) / f"{number}-{node}").touch()
    time.sleep(seconds)
    square(number, folder)
