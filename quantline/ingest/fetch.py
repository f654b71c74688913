"""Getting a checkpoint's files: from a folder, or from the Hub at one commit."""

import shutil
from pathlib import Path
from typing import Any

from quantline.causes import raise_if_of_machine
from quantline.config.params import Model
from quantline.errors import Failure, StageError
from quantline.ingest import verify
from quantline.ingest.source_card import is_card_file
from quantline.links import link
from quantline.model.checkpoint_files import (
    INDEX,
    SIDE_FILES,
    SINGLE,
    inside,
    is_sharded,
    is_side_file,
    read_index,
    side_files,
)
from quantline.model.configuration import CONFIG

GGUF = ".gguf"
OTHER_FORMATS = {GGUF: "which has to be named itself", ".pth": "which is another format"}
NAMED = 3  # folders in a message


def fetch(model: Model) -> tuple[Path, dict[str, Any]]:
    """Find or download a model's files.

    What the configuration alone forbids is refused before weights are downloaded.

    Returns:
        The folder, or the GGUF file, and where it comes from: {kind, path or id, revision}.

    Raises:
        StageError: network_unavailable, missing_file, and as `verify.check_config` and
            `verify.check_listing` do.
    """
    if model.source == "hub":
        assert model.id and model.revision, "the schema requires both"
        return fetch_from_hub(model.id, model.revision)
    folder = Path(model.path or "")
    if folder.suffix == GGUF and folder.is_file():
        return folder, {"kind": model.source, "path": model.path, "revision": None}
    if not (folder / "config.json").is_file():
        raise StageError(
            Failure.MISSING_FILE,
            f"expected a Hugging Face folder with config.json at {folder}, found "
            f"{what_is_there(folder)}; check model.path",
        )
    verify.check_config(folder)
    verify.check_listing(str(folder), [path.name for path in folder.iterdir()])
    return folder, {"kind": model.source, "path": model.path, "revision": None}


def what_is_there(folder: Path) -> str:
    """Say what a folder is that has no config.json."""
    if not folder.is_dir():
        return "a file, not the folder that it lies in" if folder.is_file() else "no folder"
    if (folder / CONFIG).is_symlink():
        return f"a link to {(folder / CONFIG).readlink()}, where there is nothing"
    names = sorted(path.name for path in folder.iterdir())
    other_case = [name for name in names if name.lower() == CONFIG]
    if other_case:
        return f"{other_case[0]}, whose case is another"
    if "adapter_config.json" in names:
        return "an adapter (name its base as model.path, and this folder as model.adapter)"
    inner = [*folder.glob(f"*/{CONFIG}"), *folder.glob(f"snapshots/*/{CONFIG}")]
    if inner:
        paths = sorted(str(path.parent.relative_to(folder)) for path in inner)
        return f"none in it, but one in {', '.join(paths[:NAMED])}"
    others = [name for name in names if Path(name).suffix in OTHER_FORMATS]
    return f"none in it, but {describe_other(others[0])}" if others else "none in it"


def describe_other(name: str) -> str:
    """Name a file of another format, and say what to do with it."""
    return f"{name}, {OTHER_FORMATS[Path(name).suffix]}"


def fetch_from_hub(name: str, revision: str) -> tuple[Path, dict[str, Any]]:
    """Download exactly the files that are needed, at the commit that `revision` is now.

    With HF_HUB_OFFLINE=1 a commit that was fetched before is taken from huggingface_hub's cache.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    offline = constants.HF_HUB_OFFLINE
    side: list[str] = []
    try:
        if offline:
            folder = Path(
                snapshot_download(
                    name, revision=revision, local_files_only=True, allow_patterns=["*.json"]
                )
            )
            commit = folder.name
            listing = [path.name for path in folder.iterdir()]
        else:
            info = HfApi().model_info(name, revision=revision)
            commit = info.sha or revision
            listing = [sibling.rfilename for sibling in info.siblings or []]
            index = [] if SINGLE in listing else [INDEX]
            side = [file for file in listing if is_brought(file) or file in index]
            folder = Path(snapshot_download(name, revision=commit, allow_patterns=side))
        verify.check_config(folder)
        verify.check_listing(name, listing)
        if not offline:
            patterns = [*side, *weight_files(folder)]
            snapshot_download(name, revision=commit, allow_patterns=patterns)
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise StageError(
            Failure.MISSING_FILE,
            f"expected {name} at {revision} on the Hub, found no such repository or revision, or "
            "none that is open to you (for a gated model accept its licence and set HF_TOKEN): "
            f"{error}",
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise_if_of_machine(error)
        raise StageError(
            Failure.NETWORK_UNAVAILABLE,
            f"cannot get {name} at {revision} from the Hub: {error}; try again, or use "
            "model=local with a folder",
        ) from error
    return folder, {"kind": "hub", "id": name, "revision": commit}


def is_brought(name: str) -> bool:
    """Whether a file, named from the checkpoint's folder, is fetched besides the weights."""
    return is_side_file(name) or is_card_file(name)


def weight_files(folder: Path) -> list[str]:
    """Return the safetensors files of a checkpoint.

    Raises:
        StageError: path_escape; missing_shard, for an index that names none.
    """
    sharded = is_sharded(folder)
    try:
        files = read_index(folder) if (folder / INDEX).is_file() else {}
    except StageError:
        if sharded:
            raise
        files = {}  # left over, and of no use to anyone
    for name in files.values():  # also of an index that does not count: who made it meant harm
        inside(folder, name)
    return sorted(set(files.values())) if sharded else [SINGLE]


def bring(folder: Path, target: Path) -> tuple[list[str], str]:
    """Put a checkpoint's files into `target`: weights linked, small files copied.

    Returns:
        All names, and how the weights are linked.

    Raises:
        StageError: path_escape; missing_file, for a link that leads nowhere.
    """
    index = [INDEX] if is_sharded(folder) else []
    for name in (*SIDE_FILES, *index):
        path = folder / name
        if path.is_symlink() and not path.exists():
            raise StageError(
                Failure.MISSING_FILE,
                f"expected the file {path}, found a link to {path.readlink()}, where there is "
                "none; fetch the checkpoint again, or remove the link if the model has no such "
                "file",
            )
    side = [*side_files(folder), *index]
    for name in side:
        copy = target / name
        copy.parent.mkdir(exist_ok=True)
        shutil.copyfile(inside(folder, name), copy)
    weights = weight_files(folder)
    ways = {link(inside(folder, name), target / name) for name in weights}
    return sorted({*side, *weights}), " and ".join(sorted(ways))
