"""Tensors of a Hugging Face folder, one at a time, without torch."""

import json
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path, PurePosixPath

import ml_dtypes  # also gives numpy the bfloat16 that safetensors hands over
import numpy as np
from safetensors import SafetensorError, safe_open

from quantline.model.families import family_of, tied_head
from quantline.errors import Failure, StageError

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"
# Buffers that config.json determines and old checkpoints store: frequencies, and masks of GPT-2 and GPT-NeoX.
COMPUTED = (".rotary_emb.inv_freq", ".attn.bias", ".attn.masked_bias", ".attention.bias", ".attention.masked_bias")


def inside(folder: Path, name: str) -> Path:
    """`folder/name`. Raises StageError(path_escape) if the name is absolute, climbs out of the folder, or is a link.

    A link may lead only to where the folder itself lies, or into the cache of huggingface_hub that it is part of
    (there snapshots/<commit>/ links to blobs/): what a link leads to ends up in bundles that people publish.
    """
    parts = PurePosixPath(name) if isinstance(name, str) else PurePosixPath()
    if parts.is_absolute() or ".." in parts.parts or "\\" in str(name) or not parts.parts:
        raise StageError(Failure.PATH_ESCAPE, f"expected a file name inside {folder}, found {name!r}; "
                                              "the checkpoint is not to be trusted")
    home = folder.resolve()
    if home.parent.name == "snapshots" and (home.parent.parent / "blobs").is_dir():
        home = home.parent.parent
    if not (folder / name).resolve().is_relative_to(home):
        raise StageError(Failure.PATH_ESCAPE, f"expected {name} to lie inside {folder}, found a link to "
                                              f"{(folder / name).resolve()}; put the file itself there if you trust it")
    return folder / name


def read_json(path: Path) -> dict:
    """A JSON object from a file. Raises StageError(missing_file) if it is not there or not JSON."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise StageError(Failure.MISSING_FILE, f"expected a JSON object in {path}: {error}") from error
    if not isinstance(value, dict):
        raise StageError(Failure.MISSING_FILE, f"expected a JSON object in {path}, found {type(value).__name__}")
    return value


def stamp(paths: Iterable[Path]) -> dict[str, list[int]]:
    """{name: [bytes, time of change]} of files: what tells in no time that one was replaced."""
    return {path.name: [path.stat().st_size, path.stat().st_mtime_ns] for path in sorted(set(paths))}


def weight_map(folder: Path) -> dict[str, Path]:
    """Tensor name → the safetensors file that holds it.

    Raises StageError: missing_shard for a file that is absent or cut short, path_escape for one outside the folder.
    """
    if (folder / INDEX).is_file():
        listed = read_json(folder / INDEX).get("weight_map")
        if not isinstance(listed, dict) or not listed:
            raise StageError(Failure.MISSING_SHARD, f"expected a weight_map in {folder / INDEX}, found none; "
                                                    "fetch the checkpoint again")
        files = {name: inside(folder, file) for name, file in listed.items()}
    else:
        files = {SINGLE: inside(folder, SINGLE)}
    found: dict[str, Path] = {}
    for path in sorted(set(files.values())):
        if not path.is_file():
            raise StageError(Failure.MISSING_SHARD, f"expected {path.name} in {folder}, found no such file; "
                                                    "fetch the whole checkpoint again")
        try:
            with safe_open(path, "np") as file:
                found |= dict.fromkeys(file.keys(), path)
        except SafetensorError as error:
            raise StageError(Failure.MISSING_SHARD, f"{path} is damaged or cut short ({error}); fetch it again") from None
    absent = sorted(set(files) - set(found)) if (folder / INDEX).is_file() else []
    if absent:
        raise StageError(Failure.MISSING_SHARD, f"the index lists {absent[0]} and {len(absent) - 1} more tensors that "
                                                f"no shard holds; fetch the checkpoint again")
    return found


class Checkpoint:
    """A checkpoint folder. Raises StageError as `weight_map` does.

    `names` are the tensors that the model consists of: a stored copy of a tied head and buffers that are computed
    from config.json are left out, so that nobody rounds or ships them. Files of a bare GPT-2 lack the first part of the
    names; here they have it. A weight is [out, in] here, also where the family's files hold it as [in, out].
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        files, config = weight_map(self.folder), self.config if (self.folder / "config.json").is_file() else {}
        self.family, self.tied_head = family_of(config), tied_head(config)
        first = f"{self.family.blocks.partition('.')[0]}." if self.family else ""
        bare = not any(name.startswith(first) for name in files)
        # The name of a tensor here → its name in its file.
        self.keys = {first + name if bare and name != self.tied_head else name: name for name in files}
        self.files = {name: files[key] for name, key in self.keys.items()}
        self.names = sorted(name for name in self.files if not name.endswith(COMPUTED) and name != self.tied_head)

    @cached_property
    def config(self) -> dict:
        return read_json(self.folder / "config.json")

    def stamp(self) -> dict[str, list[int]]:
        """The stamps of the weights' files."""
        return stamp(self.files.values())

    def shape(self, name: str) -> tuple[int, ...]:
        with safe_open(self.files[name], "np") as file:
            shape = tuple(file.get_slice(self.keys[name]).get_shape())
        return shape[::-1] if self._turned(name) else shape

    def stored_dtype(self, name: str) -> str:
        """The dtype on disk in safetensors' words: F32, F16, BF16."""
        with safe_open(self.files[name], "np") as file:
            return file.get_slice(self.keys[name]).get_dtype()

    def raw(self, name: str) -> np.ndarray:
        """The tensor in the dtype that it is stored in."""
        return self.as_stored(name, self._get(name))

    def _get(self, name: str) -> np.ndarray:
        key = self.keys[name]
        with safe_open(self.files[name], "np") as file:
            if file.get_slice(key).get_dtype() != "F8_E4M3":
                return file.get_tensor(key)
        import torch  # safetensors hands this type to torch alone

        with safe_open(self.files[name], "pt") as file:
            return file.get_tensor(key).view(torch.uint8).numpy().view(ml_dtypes.float8_e4m3fn)

    def _turned(self, name: str) -> bool:
        return self.family is not None and self.family.turned(name)

    def as_stored(self, name: str, tensor: np.ndarray) -> np.ndarray:
        """A tensor as the family's files hold it, turned where they do; of such a one, what it is here."""
        return np.ascontiguousarray(tensor.T) if self._turned(name) else tensor

    def optional(self, name: str) -> np.ndarray | None:
        """The tensor in float32; None where the checkpoint has none of that name."""
        return self.tensor(name) if name in self.files else None

    def tensor(self, name: str) -> np.ndarray:
        """The tensor in float32, which holds every bfloat16 and float16 exactly."""
        return self.raw(name).astype(np.float32)
