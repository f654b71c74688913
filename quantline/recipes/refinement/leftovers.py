"""Where a refinement keeps its steps, and how they go once the result is whole."""

import shutil
from pathlib import Path

FOLDER = "refinement"  # inside the folder of the result


def remove_leftovers(folder: Path) -> None:
    """Remove the steps of a refinement, if there are any, from a result that is whole.

    Raises:
        OSError: If they stay: no result is whole with them.
    """
    if (folder / FOLDER).exists():
        shutil.rmtree(folder / FOLDER)
