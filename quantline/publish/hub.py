"""Uploading a folder to a repository of the Hub, with huggingface_hub."""

import glob
import json
from pathlib import Path

from quantline.errors import ConfigError, Failure, StageError
from quantline.formats.bundle.manifest import MANIFEST
from quantline.messages import without_secrets


def check_repository(name: str) -> str:
    """Return the name of a repository. Raises ConfigError for one that the Hub does not have."""
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    try:
        validate_repo_id(name)
        if name.count("/") == 1:
            return name
        found = name
    except HFValidationError as error:
        found = f"{name} ({error})"
    raise ConfigError(f"expected a repository as owner/name, found {found}")


def upload(folder: Path, repository: str, message: str, private: bool = False) -> str:
    """Upload a folder as one commit; return where it is.

    Files that an earlier upload of quantline's left, and that are not in the folder any more, are
    removed: a shard of another split would be taken for one of this model's. Others stay.

    Args:
        folder: With the files.
        repository: owner/name; it is made if it is not there.
        message: Of the commit.
        private: Whether a repository that is made is private.

    Raises:
        StageError: publication_refused, if the Hub does not take it; network_unavailable.
    """
    from huggingface_hub import HfApi, errors

    api = HfApi()
    try:
        made = api.create_repo(repository, private=private, exist_ok=True)
        commit = api.upload_folder(
            repo_id=repository,
            folder_path=folder,
            commit_message=message,
            delete_patterns=[glob.escape(name) for name in _left_over(api, repository, folder)],
        )
    except errors.HfHubHTTPError as error:
        raise StageError(
            Failure.PUBLICATION_REFUSED,
            f"expected the Hub to take {repository}, found that it refuses: "
            f"{without_secrets(error)}; check the name, and that HF_TOKEN (or `hf auth login`) may "
            "write there",
        ) from error
    except (errors.HTTPError, OSError) as error:
        raise StageError(
            Failure.NETWORK_UNAVAILABLE,
            f"cannot reach the Hub to publish {repository}: {without_secrets(error)}; try again: "
            "what is uploaded already is not uploaded twice",
        ) from error
    return str(getattr(commit, "commit_url", made))


def _left_over(api: "object", repository: str, folder: Path) -> list[str]:
    """Return the files of earlier bundles in a repository that are not in a folder."""
    from huggingface_hub import HfApi

    assert isinstance(api, HfApi)
    there = set(api.list_repo_files(repository))
    listed: set[str] = set()
    for name in there:
        path = Path(name)
        if path.name != MANIFEST:
            continue
        text = Path(api.hf_hub_download(repository, name)).read_text(encoding="utf-8")
        try:
            manifest = json.loads(text)
        except ValueError:
            continue
        if not isinstance(manifest, dict) or "artifact_sha256" not in manifest:
            continue
        listed |= {(path.parent / file).as_posix() for file in manifest.get("files", {})}
    here = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return sorted((listed & there) - here)
