"""Where a refinement keeps its steps, and how they go once the result is whole."""

import shutil
from pathlib import Path

FOLDER = "refinement"  # inside the folder of the result


def remove_leftovers(folder: Path) -> None:
    """Remove the steps of a refinement from the folder of a result that is whole."""
    shutil.rmtree(folder / FOLDER, ignore_errors=True)
