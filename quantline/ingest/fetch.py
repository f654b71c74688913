"""Getting a checkpoint's files: from a folder, or from the Hub at one commit."""

import shutil
from pathlib import Path

from quantline.ingest import verify
from quantline.ingest.reflink import link
from quantline.model.checkpoint import INDEX, SINGLE, inside, read_json
from quantline.config.params import Model
from quantline.errors import Failure, StageError

SIDE_FILES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "tokenizer.model",
              "special_tokens_map.json", "added_tokens.json", "vocab.json", "merges.txt", "chat_template.jinja")


def fetch(model: Model) -> tuple[Path, dict]:
    """The folder of a model's files and where it comes from: {kind, path or id, revision}.

    What the configuration alone forbids is refused before weights are fetched. Raises StageError: network_unavailable,
    missing_file, and as `verify.check_config` and `verify.check_listing` do.
    """
    if model.source == "hub":
        return fetch_from_hub(model.id, model.revision, model.converter)
    folder = Path(model.path)
    if not (folder / "config.json").is_file():
        raise StageError(Failure.MISSING_FILE, f"expected a Hugging Face folder with config.json at {folder}, found "
                                               f"{'none in it' if folder.is_dir() else 'no folder'}")
    verify.check_config(folder, model.converter)
    verify.check_listing(str(folder), [path.name for path in folder.iterdir()])
    return folder, {"kind": model.source, "path": model.path, "revision": None}


def fetch_from_hub(name: str, revision: str, converter: str | None = None) -> tuple[Path, dict]:
    """Exactly the files that are needed, at the commit that `revision` is now, so that what is recorded cannot move.

    With HF_HUB_OFFLINE=1 a commit that was fetched before serves, as it lies in huggingface_hub's cache.
    """
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    try:
        if constants.HF_HUB_OFFLINE:
            folder = Path(snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=["*.json"]))
            commit, listing = folder.name, [path.name for path in folder.iterdir()]
        else:
            info = HfApi().model_info(name, revision=revision)
            commit, listing = info.sha, [one.rfilename for one in info.siblings]
            side = [one for one in (*SIDE_FILES, INDEX) if one in listing]
            folder = Path(snapshot_download(name, revision=commit, allow_patterns=side))
        verify.check_config(folder, converter)
        verify.check_listing(name, listing)
        if not constants.HF_HUB_OFFLINE:
            snapshot_download(name, revision=commit, allow_patterns=[*side, *weight_files(folder)])
    except (errors.RepositoryNotFoundError, errors.RevisionNotFoundError) as error:
        raise StageError(Failure.MISSING_FILE, f"expected {name} at {revision} on the Hub, found no such repository or "
                         f"revision, or none that is open to you (for a gated model accept its licence and set "
                         f"HF_TOKEN): {error}") from error
    except (errors.HTTPError, OSError) as error:
        raise StageError(Failure.NETWORK_UNAVAILABLE, f"cannot get {name} at {revision} from the Hub: {error}; "
                                                      "try again, or use model=local with a folder") from error
    return folder, {"kind": "hub", "id": name, "revision": commit}


def weight_files(folder: Path) -> list[str]:
    """Names of the safetensors files that a checkpoint consists of. Raises StageError(path_escape)."""
    if not (folder / INDEX).is_file():
        return [SINGLE]
    names = read_json(folder / INDEX).get("weight_map") or {}
    for name in names.values():
        inside(folder, name)
    return sorted(set(names.values()))


def bring(folder: Path, target: Path) -> tuple[list[str], str]:
    """Put the checkpoint's files into `target`: weights linked, the small ones copied.

    Returns all names, and how the weights are linked. Raises StageError(path_escape).
    """
    side = [name for name in (*SIDE_FILES, INDEX) if (folder / name).is_file()]
    for name in side:
        shutil.copyfile(inside(folder, name), target / name)
    weights = weight_files(folder)
    ways = {link(inside(folder, name), target / name) for name in weights}
    return sorted({*side, *weights}), " and ".join(sorted(ways))
