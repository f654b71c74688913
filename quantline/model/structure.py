"""What was found out about a model by building it, in a form that every stage reads without torch.

`load` finds it (find_structure.py) and keeps it beside config.json, for models whose family has no
table. Paths are those of quantline's model, in which every expert has layers of its own; names are
the checkpoint's.
"""

import hashlib
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json
from quantline.model.configuration import CONFIG
from quantline.model.family import InputGroup
from quantline.model.stored_view import StoredView

FILE = "structure.json"
VERSION = 1  # of the file's form


@dataclass(frozen=True)
class Place:
    """A tensor of the model.

    Attributes:
        paths: Its paths in quantline's model; several, where modules share it.
        view: Where its values are stored; None for a stored tensor of that name as it is.
    """

    paths: tuple[str, ...]
    view: StoredView | None = None


@dataclass(frozen=True)
class ExpertGroup:
    """The experts of one module.

    Attributes:
        block: The block that it is in.
        path: Of the module.
        layers: For each expert its linear layers, by name.
    """

    block: int
    path: str
    layers: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Structure:
    """The structure of a model.

    Attributes:
        class_name: transformers' class.
        text_path: The module that is the text decoder; "" for the model itself.
        blocks: Path of the list of decoder blocks.
        block_names: What the names of the blocks' tensors begin with in the checkpoint, without
            the block's number.
        tensors: Name → place, of all parameters and persistent buffers of the text model.
        linears: For each block, its linear layers that can be rounded: name → path.
        kept_linears: Names of linear layers that are not rounded: heads, routers, narrow ones, and
            those of towers.
        experts: The experts of all blocks.
        embedding: The tensor with a row for each token.
        head: The tensor that makes logits; the embedding if that is the same.
        head_path: The module of the head.
        head_bias: The tensor that is added to the logits, if there is one.
        passed: Stored tensors that the text model is not made of, and that bundles keep as they
            are: towers, projectors, and what transformers' class leaves out on purpose.
        copies: Stored tensor that bundles leave out → the tensor that it has to be equal to, since
            the model ties the two.
        unsplit: Parameters of the blocks that look like several matrices and that quantline does
            not know how to take apart.
        positions: How many positions the model has learned; None if it computes them.
        hidden_size: Width of the final hidden states.
        vocab_size: Number of logits.
        returns: For each block how many values it returns; 0 for a tensor that is no tuple. None
            until the model has been run.
        inputs: For each block, its linear layers grouped by the tensor that they read.
        logit_scale: As in Architecture; None until the model has been run.
        logit_softcap: As in Architecture.
        stored: The shapes of the stored tensors that views are parts of.
    """

    class_name: str
    text_path: str
    blocks: str
    block_names: str
    tensors: dict[str, Place]
    linears: tuple[dict[str, str], ...]
    kept_linears: tuple[str, ...]
    experts: tuple[ExpertGroup, ...]
    embedding: str
    head: str
    head_path: str
    head_bias: str | None
    passed: tuple[str, ...]
    copies: dict[str, str]
    unsplit: tuple[str, ...]
    positions: int | None
    hidden_size: int
    vocab_size: int
    returns: tuple[int, ...] | None = None
    inputs: tuple[tuple[InputGroup, ...], ...] = ()
    logit_scale: float | None = None
    logit_softcap: float | None = None
    stored: dict[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def layers(self) -> int:
        """The number of blocks."""
        return len(self.linears)

    @cached_property
    def blocks_of_names(self) -> dict[str, int]:
        """Tensor or linear layer of a block → the block, by the first path that it has."""
        found = {}
        start = f"{self.blocks}."
        for name, place in self.tensors.items():
            path = place.paths[0]
            if path.startswith(start):
                number = int(path.removeprefix(start).partition(".")[0])
                found[name] = number
                found[name.rpartition(".")[0]] = number
        for number, block in enumerate(self.linears):  # a shared layer belongs to one block
            for name in block:
                found[name] = found[f"{name}.weight"] = number
        return found

    @cached_property
    def names_of_paths(self) -> dict[str, str]:
        """Path in quantline's model → the checkpoint's name, of all tensors."""
        return {path: name for name, place in self.tensors.items() for path in place.paths}

    @cached_property
    def experts_of_layers(self) -> dict[str, tuple[int, int]]:
        """Linear layer of an expert → (index in `experts`, number of the expert)."""
        return {
            name: (index, number)
            for index, group in enumerate(self.experts)
            for number, layers in enumerate(group.layers)
            for name in layers
        }

    def to_json(self) -> dict[str, Any]:
        """Return what `from_json` restores it from."""
        content = asdict(self)
        content["tensors"] = {
            name: {"paths": list(place.paths)}
            | ({"view": place.view.to_json()} if place.view else {})
            for name, place in self.tensors.items()
        }
        content["linears"] = [list(block.items()) for block in self.linears]  # in their order
        content["inputs"] = [[group._asdict() for group in block] for block in self.inputs]
        return content

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> "Structure":
        """Restore it from what `to_json` returned."""
        values = dict(content)
        values["tensors"] = {
            name: Place(
                tuple(place["paths"]),
                StoredView.from_json(place["view"]) if "view" in place else None,
            )
            for name, place in content["tensors"].items()
        }
        values["experts"] = tuple(
            ExpertGroup(group["block"], group["path"], tuple(map(tuple, group["layers"])))
            for group in content["experts"]
        )
        values["inputs"] = tuple(
            tuple(InputGroup(**(group | {"linears": tuple(group["linears"])})) for group in block)
            for block in content["inputs"]
        )
        values["stored"] = {name: tuple(shape) for name, shape in content["stored"].items()}
        values["linears"] = tuple(dict(block) for block in content["linears"])
        for name in ("kept_linears", "passed", "unsplit", "returns"):
            values[name] = tuple(content[name]) if content[name] is not None else None
        return cls(**values)


def write_structure(folder: Path, structure: Structure) -> None:
    """Keep the structure of a folder's model beside its config.json."""
    content = {"version": VERSION, "config_sha256": _sha256(folder), **structure.to_json()}
    write_json(folder / FILE, content)


def read_structure(folder: Path) -> Structure | None:
    """Return the structure that is kept in a folder.

    Returns:
        None if there is none, or one of another config.json or of another release's form.

    Raises:
        StageError: artifact_changed, for a file that no stage wrote.
    """
    if not (folder / FILE).is_file():
        return None
    content = read_json(folder / FILE)
    if content.pop("version", None) != VERSION:
        return None
    if content.pop("config_sha256", None) != _sha256(folder):
        return None
    try:
        return Structure.from_json(content)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected the structure of a model in {folder / FILE}, found {error!r}; run load "
            "again",
        ) from error


def _sha256(folder: Path) -> str:
    return hashlib.sha256((folder / CONFIG).read_bytes()).hexdigest()
