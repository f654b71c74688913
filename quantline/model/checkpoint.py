"""Tensors of a Hugging Face folder, read one at a time, without torch."""

from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from quantline.files import stamp
from quantline.model.architecture import Architecture
from quantline.model.checkpoint_files import INDEX, SINGLE, weight_map
from quantline.model.configuration import CONFIG, read_config, read_configuration
from quantline.model.find_family import family_of, known_family, tied_head
from quantline.model.read_architecture import architecture_of, architecture_of_structure
from quantline.model.stored_tensors import StoredTensors
from quantline.model.stored_view import StoredView
from quantline.model.structure import Structure, read_structure

# With the names of its files, for those who read or write such a folder.
__all__ = ["INDEX", "SINGLE", "Checkpoint", "weight_map"]

# Buffers that config.json determines and old checkpoints store: frequencies, and attention masks.
COMPUTED_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


class Checkpoint:
    """A checkpoint folder as a TensorSource.

    `names` leave out a stored copy of a tied head and buffers that are computed from config.json,
    so that nobody rounds or ships them. Files of a bare GPT-2 lack the first part of the names;
    here they have it. A weight is [out, in], also where the family's files hold it as [in, out].

    Attributes:
        structure: What was found out about a model whose family has no table; None for others.
        passed: Stored tensors that bundles keep as they are, though the text model lacks them.

    Raises:
        StageError: As `weight_map` and `find_structure` do.
    """

    converted = False

    def __init__(
        self,
        folder: Path | str,
        configuration: dict[str, Any] | None = None,
        structure: Structure | None = None,
    ) -> None:
        """Read the names of all tensors.

        Args:
            folder: The checkpoint.
            configuration: What its config.json means, if that is known already.
            structure: Of a model whose family has no table, if it is known already.
        """
        self.folder = Path(folder)
        self.stored_files = weight_map(self.folder)
        self._stored = StoredTensors(self.stored_files)
        self.passed: tuple[str, ...] = ()
        self._views: dict[str, StoredView] = {}
        if configuration is not None:
            self.configuration = configuration
        described = (self.folder / CONFIG).is_file()
        self.family = family_of(self.config) if described else None
        self.structure = structure
        if described and self.family is None and structure is None:
            self.structure = self._find_structure()
        if self.structure is not None:
            is_tied = self.structure.head == self.structure.embedding
            self.tied_head = f"{self.structure.head_path}.weight" if is_tied else None
            self._name_by_structure(self.structure)
        else:
            self.tied_head = tied_head(self.configuration, self.family) if self.family else None
            self._name_by_family()

    def _find_structure(self) -> Structure:
        """Return the structure that `load` has kept; find it if it has not."""
        kept = read_structure(self.folder)
        if kept is not None:
            return kept
        from quantline.model.find_structure import find_structure

        return find_structure(self.config, self.stored_shapes)

    def _name_by_structure(self, structure: Structure) -> None:
        """Take the names that the structure gives to tensors."""
        self.passed = structure.passed
        self.keys = {key: key for key in self.stored_files}
        self.names = sorted(structure.tensors)
        self.files = dict(self.stored_files)
        self._views = {
            name: place.view
            for name, place in structure.tensors.items()
            if place.view is not None and not (name not in place.view.keys and name in self.files)
        }

    def _name_by_family(self) -> None:
        """Take the names of the files, as far as the family does not change them."""
        files = self.stored_files
        first = f"{self.family.blocks.partition('.')[0]}." if self.family else ""
        head = f"{self.family.outside['output']}." if self.family else ""
        bare = not any(name.startswith(first) for name in files)
        embedding = self._tied_embedding()
        # The name of a tensor here → its name in its file.
        self.keys = {}
        for key in files:
            # The head lies beside what the first part is the name of.
            name = first + key if bare and not key.startswith(head) else key
            self.keys[name] = key
        # Some checkpoints store a tensor that is both under the name of the head alone.
        if self.tied_head in self.keys and embedding and embedding not in self.keys:
            self.keys[embedding] = self.keys.pop(self.tied_head)
        self.files = {name: files[key] for name, key in self.keys.items()}
        self.names = sorted(
            name
            for name in self.files
            if not name.endswith(COMPUTED_BUFFERS) and name != self.tied_head
        )

    def _tied_embedding(self) -> str | None:
        """Return the embedding's name where the head is the same tensor."""
        if self.family is None or self.tied_head is None:
            return None
        return f"{self.family.outside['token_embd']}.weight"

    @cached_property
    def stored_shapes(self) -> dict[str, tuple[int, ...]]:
        """Stored tensor → its shape in its file."""
        return {key: self._stored.shape(key) for key in self.stored_files}

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of config.json."""
        return read_config(self.folder)

    @cached_property
    def configuration(self) -> dict[str, Any]:
        """What config.json means, with transformers' defaults; see configuration.py."""
        return read_configuration(self.folder)

    @cached_property
    def arch(self) -> Architecture:
        """Sizes and names. Raises StageError(unsupported_architecture) for an unknown family."""
        if self.structure is not None:
            return architecture_of_structure(self.configuration, self.structure)
        return architecture_of(self.configuration, known_family(self.config))

    def stamp(self) -> dict[str, list[int]]:
        """Return size and time of change of the weight files."""
        return stamp(self.files.values())

    def __contains__(self, name: object) -> bool:
        view = self._views.get(str(name))
        if view is not None:
            return all(key in self.stored_files for key in view.keys)
        return name in self.files

    def view_of(self, name: str) -> StoredView | None:
        """Return where the values of a tensor are stored; None for one that is stored as it is."""
        return self._views.get(name)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a weight [out, in]."""
        if name in self._views:
            return self._views[name].shape
        shape = self._stored.shape(self.keys[name])
        return shape[::-1] if self._is_transposed(name) else shape

    def stored_dtype(self, name: str) -> str:
        """Return the dtype on disk as safetensors names it: F32, F16, BF16.

        What is made of several stored tensors of several dtypes is in F32, as `raw` returns it.
        """
        view = self._views.get(name)
        # A view's tensor may have its own name: one that is stored transposed.
        keys = view.keys if view is not None else (self.keys[name],)
        dtypes = {self._stored.dtype(key) for key in keys}
        return dtypes.pop() if len(dtypes) == 1 else "F32"

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""
        if name in self._views:
            return self.read_view(self._views[name])
        return self.as_stored(name, self._stored.read(self.keys[name]))

    def read_view(self, view: StoredView) -> np.ndarray:
        """Return the tensor that a view is of, in the dtype that it is stored in."""
        shapes = {key: self._stored_shape(key) for key in view.keys}
        return view.read(self._stored.read_rows, shapes)

    def stored_tensor(self, key: str) -> np.ndarray:
        """Return a tensor of the files as it lies there."""
        return self._stored.read(key)

    def _stored_shape(self, key: str) -> tuple[int, ...]:
        if self.structure is not None and key in self.structure.stored:
            return self.structure.stored[key]
        return self.stored_shapes[key]

    def _is_transposed(self, name: str) -> bool:
        return self.family is not None and self.family.is_transposed(name)

    def as_stored(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Transpose a tensor between [out, in] and the order of the family's files."""
        return np.ascontiguousarray(tensor.T) if self._is_transposed(name) else tensor

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in float32, which holds every bfloat16 and float16 exactly."""
        return self.raw(name).astype(np.float32)

    def number(self, name: str) -> np.ndarray:
        """Return a tensor as a model computes with it: floats in float32, whole numbers as such."""
        values = self.raw(name)
        return values if values.dtype.kind in "iub" else values.astype(np.float32)

    def optional(self, name: str | None) -> np.ndarray | None:
        """Return a tensor in float32; None where the checkpoint has none of that name."""
        return self.tensor(name) if name is not None and name in self else None

    def keeps_float32(self, name: str) -> bool:
        """Return False: the checkpoint's dtype is what it is."""
        return False

    def layer_of(self, name: str) -> str | None:
        """Return the module whose weight a tensor is."""
        return name.removesuffix(".weight")

    def in_order_of(self, name: str, values: np.ndarray) -> np.ndarray:
        """Return the values: the columns are in the checkpoint's order."""
        return values

    def has_rows_of_layer(self, name: str) -> bool:
        """Return True: a tensor is its own layer's."""
        return True

    def row_order(self, name: str) -> np.ndarray | None:
        """Return None: the rows are in the checkpoint's order."""
        return None
