"""What a model is called, whose it is and under which terms, as load wrote it down.

It goes into model cards and into the metadata of GGUF files.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quantline.config.model_name import model_name
from quantline.files import read_json

MANIFEST = "manifest.json"
# The texts of a source that go wherever its weights go: licence, notices, and terms of use.
LEGAL = re.compile(
    r"(licen[cs]es?|notices?|copying|copyright|(acceptable[-_ ]?)?use[-_ ]?policy|terms|"
    r"third[-_ ]?party[-_ ]?notices?)([-_. ][\w.-]*)?",
    re.IGNORECASE,
)
LEGAL_SUFFIXES = ("", ".md", ".txt", ".rst", ".pdf")


@dataclass(frozen=True)
class Origin:
    """Where a model comes from.

    Attributes:
        name: What it is called, with its adapter's name behind it.
        hub_id: Its owner/name on the Hub; None for a model from elsewhere.
        revision: The commit there.
        license: As the source's card or file names it; None if it does not.
        license_name: What a licence is called that the Hub has no name for.
        license_link: Where such a licence stands.
        languages: Codes of its languages.
        legal: Names of the files with its terms.
    """

    name: str
    hub_id: str | None = None
    revision: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    languages: tuple[str, ...] = ()
    legal: tuple[str, ...] = ()


def is_legal(name: str) -> bool:
    """Whether a file of a checkpoint's folder has terms that go with the weights."""
    path = Path(name)
    is_here = path.name == name
    return is_here and path.suffix.lower() in LEGAL_SUFFIXES and bool(LEGAL.fullmatch(name))


def origin_of(manifest: dict[str, Any]) -> Origin:
    """Return what the manifest of a model, or that of a bundle, says of its origin.

    Args:
        manifest: With `source`, and under `card` what load found in the source's card.
    """
    source = manifest.get("source") or {}
    card = manifest.get("card") or {}
    name = card.get("name")
    adapter = source.get("adapter")
    if name is None:
        name = model_name({**source, "source": None})
    elif adapter:
        name = f"{name}-{Path(adapter).name}"
    return Origin(
        name=name,
        hub_id=source.get("id"),
        revision=source.get("revision"),
        license=card.get("license"),
        license_name=card.get("license_name"),
        license_link=card.get("license_link"),
        languages=tuple(card.get("languages", ())),
        legal=tuple(card.get("legal", ())),
    )


def read_origin(folder: Path) -> Origin:
    """Return what is known of the model in a folder, which load made or anything else."""
    path = folder / MANIFEST
    manifest = read_json(path) if path.is_file() else {}
    return origin_of({"source": {"path": str(folder.absolute())}} | manifest)
