"""An item: a part of a stage's work that a worker does by itself.

It is a JSON file that names a function of FUNCTIONS and its arguments. Its result is a folder of
safetensors and JSON, whose name is the sha256 of the item. So nothing is ever pickled, and a result
that is there already need not be made again.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, cast

from quantline.errors import Failure, StageError
from quantline.files import read_json, sha256_json, write_json

# Name → the module and the function that workers call, with the item's arguments by name and
# `folder=`, an empty folder for the result.
FUNCTIONS = {
    "quantize_part": ("quantline.recipes.block_items", "quantize_part"),
    "measure_text_part": ("quantline.metrics.measure_items", "measure_text_part"),
    "ask_questions": ("quantline.metrics.measure_items", "ask_questions"),
    "sum_part": ("quantline.calibration.parts", "sum_part"),
    "merge_block": ("quantline.calibration.parts", "merge_block"),
    "part_costs": ("quantline.recipes.budget.cost_items", "part_costs"),
}


def move_files(made: Path, folder: Path, names: Sequence[str]) -> None:
    """Move the files of a result, the one that says that it is whole last.

    Those that a killed run has moved already are not there any more.

    Args:
        made: Where a worker has put them.
        folder: Where they belong.
        names: Of the files, in the order in which they are moved.
    """
    for name in names:
        if (made / name).exists() or not (folder / name).exists():
            os.rename(made / name, folder / name)


@dataclass(frozen=True)
class Item:
    """What is done on its own.

    Attributes:
        label: What messages call it.
        function: A name in FUNCTIONS.
        arguments: Those of the function, as JSON.
    """

    label: str
    function: str
    arguments: dict[str, Any]

    @cached_property
    def id(self) -> str:
        """The sha256 over what the result depends on."""
        return sha256_json([self.function, self.arguments])

    def write(self, path: Path) -> None:
        """Write the item for a worker."""
        values = {"label": self.label, "function": self.function, "arguments": self.arguments}
        write_json(path, values)

    @classmethod
    def read(cls, path: Path) -> "Item":
        """Read an item. Raises StageError: missing_file."""
        return cls(**read_json(path))

    def perform(self, folder: Path) -> None:
        """Call the function, which writes its result into the folder.

        Raises:
            StageError: config_invalid, for a function that workers do not know; as the function
                does.
        """
        if self.function not in FUNCTIONS:
            raise StageError(
                Failure.CONFIG_INVALID,
                f"expected a function of {', '.join(FUNCTIONS)} for {self.label}, found "
                f"{self.function}; give all machines the same release of quantline",
            )
        module, name = FUNCTIONS[self.function]
        function = cast(Callable[..., None], getattr(import_module(module), name))
        function(**self.arguments, folder=folder)
