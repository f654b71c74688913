"""The files that a checkpoint's folder consists of, and the tensors that each of them holds."""

from pathlib import Path, PurePosixPath

import ml_dtypes  # noqa: F401 (it gives numpy the bfloat16 that safetensors hands over)
import numpy as np
from safetensors import SafetensorError, safe_open

from quantline.errors import Failure, StageError
from quantline.files import read_json, sha256_json

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
    # How images, videos and sounds become inputs, of models that take more than text:
    "preprocessor_config.json",
    "processor_config.json",
    "image_processor_config.json",
    "video_preprocessor_config.json",
    "feature_extractor_config.json",
    "audio_processor_config.json",
)
TEMPLATES = "additional_chat_templates"  # a folder of named templates, one in each *.jinja


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


def is_sharded(folder: Path) -> bool:
    """Whether a checkpoint's index counts: transformers takes model.safetensors where there is one.

    An index beside it may be left over from before.
    """
    return not (folder / SINGLE).is_file() and (folder / INDEX).is_file()


def read_index(folder: Path) -> dict[str, str]:
    """Return tensor name → file name, as the index has them. Raises StageError: missing_shard."""
    listed = read_json(folder / INDEX).get("weight_map")
    if not isinstance(listed, dict) or not listed:
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected a weight_map in {folder / INDEX}, found none; fetch the checkpoint again",
        )
    return listed


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
