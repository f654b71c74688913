"""Tensors of a Hugging Face folder, read one at a time, without torch."""

from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import ml_dtypes  # it also gives numpy the bfloat16 that safetensors hands over
import numpy as np
from safetensors import SafetensorError, safe_open

from quantline.errors import Failure, StageError
from quantline.files import read_json, sha256_json, stamp
from quantline.model.architecture import Architecture, architecture_of, known_family
from quantline.model.configuration import CONFIG, read_config, read_configuration
from quantline.model.find_family import family_of, tied_head

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
# What a checkpoint has beside its weights, as far as quantline brings it in and hands it on.
SIDE_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of named templates, one in each *.jinja
# Buffers that config.json determines and old checkpoints store: frequencies, and attention masks.
COMPUTED_BUFFERS = (
    ".rotary_emb.inv_freq",
    ".attn.bias",
    ".attn.masked_bias",
    ".attention.bias",
    ".attention.masked_bias",
)


def listing_sha256(folder: Path) -> str:
    """Return the sha256 over the names in a folder that a checkpoint can consist of.

    A file that is new there, such as a chat template, makes it another checkpoint.
    """
    weights = (path.name for path in folder.glob("*.safetensors*"))
    return sha256_json(sorted({*weights, *side_files(folder)}))


def inside(folder: Path, name: str) -> Path:
    """Return `folder/name`.

    A link may lead only to where the folder itself lies, or into the cache of huggingface_hub that
    it is part of (there snapshots/<commit>/ links to blobs/): what a link leads to ends up in
    bundles that people publish.

    Raises:
        StageError: path_escape, if the name is absolute or leads out of the folder.
    """
    parts = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if (
        parts.is_absolute()
        or ".." in parts.parts
        or {"\\", "\0"} & set(str(name))
        or not parts.parts
    ):
        raise StageError(
            Failure.PATH_ESCAPE,
            f"expected a file name inside {folder}, found {name!r}; the checkpoint cannot be "
            "trusted",
        )
    home = folder.resolve()
    for parent in home.parents:
        if parent.name == "snapshots" and (parent.parent / "blobs").is_dir():
            home = parent.parent
            break
    try:
        target = (folder / name).resolve()
    except RuntimeError:  # a circle of links
        raise StageError(
            Failure.PATH_ESCAPE,
            f"expected a file {name} in {folder}, found links that lead in a circle; put the file "
            "itself there",
        ) from None
    if not target.is_relative_to(home):
        raise StageError(
            Failure.PATH_ESCAPE,
            f"expected {name} to lie inside {folder}, found a link to {target}; put the file "
            "itself there if you trust it",
        )
    return folder / name


def is_side_file(name: str) -> bool:
    """Whether a file, named from the checkpoint's folder, is among those beside the weights."""
    path = PurePosixPath(name)
    return name in SIDE_FILES or (str(path.parent) == TEMPLATES and path.suffix == ".jinja")


def side_files(folder: Path) -> list[str]:
    """Return the files beside the weights that a folder has."""
    names = [name for name in SIDE_FILES if (folder / name).is_file()]
    for path in sorted((folder / TEMPLATES).glob("*.jinja")):
        names.append(f"{TEMPLATES}/{path.name}")
    return names


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's index counts: transformers takes model.safetensors where there is one.

    An index beside it may be left over from before.
    """
    return not (folder / SINGLE).is_file() and (folder / INDEX).is_file()


def weight_map(folder: Path) -> dict[str, Path]:
    """Return tensor name → the safetensors file that holds it.

    Raises:
        StageError: missing_shard, for a file that is absent or cut short, or two that hold one
            tensor; path_escape, for one outside the folder.
    """
    listed = read_index(folder) if is_sharded(folder) else {}
    files = {name: inside(folder, file) for name, file in listed.items()}
    tensors: dict[str, Path] = {}
    for path in sorted(set(files.values())) or [inside(folder, SINGLE)]:
        for name in _names_in(path):
            if name in tensors:
                _check_same(name, tensors[name], path)
            tensors[name] = path
    absent = sorted(set(files) - set(tensors))
    if absent:
        raise StageError(
            Failure.MISSING_SHARD,
            f"the index lists {absent[0]} and {len(absent) - 1} more tensors that no shard holds; "
            "fetch the checkpoint again",
        )
    return tensors


def read_index(folder: Path) -> dict[str, str]:
    """Return tensor name → file name, as the index has them. Raises StageError: missing_shard."""
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected a weight_map in {folder / INDEX}, found none; fetch the checkpoint again",
        )
    return listed


def _names_in(path: Path) -> list[str]:
    """Return the names of the tensors of a file."""
    if not path.is_file():
        leads = f"a link to {path.readlink()}, where there is none" if path.is_symlink() else "none"
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected the file {path.name} in {path.parent}, found {leads}; fetch the whole "
            "checkpoint again",
        )
    try:
        with safe_open(path, "np") as file:
            return list(file.keys())
    except SafetensorError as error:
        raise StageError(
            Failure.MISSING_SHARD, f"{path} is damaged or cut short ({error}); fetch it again"
        ) from None


def _check_same(name: str, first: Path, second: Path) -> None:
    """Refuse a tensor that two files hold with different values."""
    values = []
    for path in (first, second):
        with safe_open(path, "np") as file:
            values.append(file.get_tensor(name))
    if values[0].dtype != values[1].dtype or not np.array_equal(values[0], values[1]):
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected {name} in one shard, found it in {first.name} and in {second.name} with "
            "other values; fetch the whole checkpoint again",
        )


class Checkpoint:
    """A checkpoint folder as a TensorSource.

    `names` leave out a stored copy of a tied head and buffers that are computed from config.json,
    so that nobody rounds or ships them. Files of a bare GPT-2 lack the first part of the names;
    here they have it. A weight is [out, in], also where the family's files hold it as [in, out].

    Raises:
        StageError: As `weight_map` does.
    """

    converted = False

    def __init__(self, folder: Path | str, configuration: dict[str, Any] | None = None) -> None:
        """Read the names of all tensors.

        Args:
            folder: The checkpoint.
            configuration: What its config.json means, if that is known already.
        """
        self.folder = Path(folder)
        files = weight_map(self.folder)
        if configuration is not None:
            self.configuration = configuration
        described = (self.folder / CONFIG).is_file()
        self.family = family_of(self.config) if described else None
        self.tied_head = tied_head(self.configuration, self.family) if self.family else None
        first = f"{self.family.blocks.partition('.')[0]}." if self.family else ""
        bare = not any(name.startswith(first) for name in files)
        embedding = self._tied_embedding()
        # The name of a tensor here → its name in its file.
        self.keys = {}
        for key in files:
            name = first + key if bare and key != self.tied_head else key
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
        family = self.family or known_family(self.config)
        return architecture_of(self.configuration, family)

    def stamp(self) -> dict[str, list[int]]:
        """Return size and time of change of the weight files."""
        return stamp(self.files.values())

    def __contains__(self, name: object) -> bool:
        return name in self.files

    def shape(self, name: str) -> tuple[int, ...]:
        """Return a tensor's shape; of a weight [out, in]."""
        with safe_open(self.files[name], "np") as file:
            shape = tuple(file.get_slice(self.keys[name]).get_shape())
        return shape[::-1] if self._is_transposed(name) else shape

    def stored_dtype(self, name: str) -> str:
        """Return the dtype on disk as safetensors names it: F32, F16, BF16."""
        with safe_open(self.files[name], "np") as file:
            return file.get_slice(self.keys[name]).get_dtype()

    def raw(self, name: str) -> np.ndarray:
        """Return a tensor in the dtype that it is stored in."""
        return self.as_stored(name, self._read(name))

    def _read(self, name: str) -> np.ndarray:
        key = self.keys[name]
        with safe_open(self.files[name], "np") as file:
            if file.get_slice(key).get_dtype() != "F8_E4M3":
                return file.get_tensor(key)
        import torch  # safetensors hands this type to torch alone

        with safe_open(self.files[name], "pt") as file:
            values = file.get_tensor(key).view(torch.uint8).numpy()
        return values.view(ml_dtypes.float8_e4m3fn)

    def _is_transposed(self, name: str) -> bool:
        return self.family is not None and self.family.is_transposed(name)

    def as_stored(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """Transpose a tensor between [out, in] and the order of the family's files."""
        return np.ascontiguousarray(tensor.T) if self._is_transposed(name) else tensor

    def tensor(self, name: str) -> np.ndarray:
        """Return a tensor in float32, which holds every bfloat16 and float16 exactly."""
        return self.raw(name).astype(np.float32)

    def optional(self, name: str) -> np.ndarray | None:
        """Return a tensor in float32; None where the checkpoint has none of that name."""
        return self.tensor(name) if name in self.files else None

    def keeps_float32(self, name: str) -> bool:
        """Return False: the checkpoint's dtype is what it is."""
        return False

    def layer_of(self, name: str) -> str | None:
        """Return the module whose weight a tensor is."""
        return name.removesuffix(".weight")

    def row_order(self, name: str) -> np.ndarray | None:
        """Return None: the rows are in the checkpoint's order."""
        return None
