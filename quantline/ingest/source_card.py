"""What a source says of itself to people: its model card, and the files with its terms."""

import re
import shutil
from pathlib import Path
from typing import Any

from quantline.messages import say
from quantline.model.checkpoint_files import inside
from quantline.model.origin import is_legal

README = "README.md"
LARGEST = 1 << 20  # bytes of a text that is read or brought
LONGEST = 200  # characters of a value that is kept
MOST = 100  # entries of a list that are kept
TERMS = ("license", "license_name", "license_link")  # keys of a card
METADATA = "---"  # all that a card's head says
NAMES = ("model_name", "name")  # keys of a card under which some name the model
LANGUAGE = re.compile(r"[A-Za-z][\w-]{0,39}")
GGUF_KEYS = {
    "general.name": "name",
    "general.license": "license",
    "general.license.name": "license_name",
    "general.license.link": "license_link",
}


def is_card_file(name: str) -> bool:
    """Whether a file of a checkpoint's folder is its model card, or has its terms."""
    return name == README or is_legal(name)


def bring_card(source: Path, folder: Path) -> dict[str, Any]:
    """Copy the files with a source's terms, and read its model card.

    Args:
        source: The checkpoint's folder, or a GGUF file. What lies beside that file may belong to
            others, so that it counts for itself.
        folder: Where to copy to.

    Returns:
        {name, license, license_name, license_link, languages, legal}, so far as they are known;
        `legal` are the names of the copies.

    Raises:
        StageError: path_escape, for a link that leads out of the folder.
    """
    if source.is_file():
        return card_of_gguf(source)
    legal = sorted(path.name for path in source.iterdir() if is_legal(path.name))
    legal = [name for name in legal if _is_small(inside(source, name))]
    for name in legal:
        shutil.copyfile(source / name, folder / name)
    card: dict[str, Any] = {}
    if (source / README).exists() and _is_small(inside(source, README)):
        card, unread = read_card((source / README).read_text(encoding="utf-8", errors="replace"))
        if unread:
            say(
                f"load: expected {'YAML' if METADATA in unread else 'a short line of text'} under "
                f"{', '.join(unread)} of the source's {README}, found something else; bundles do "
                "not name it, so mend the card if they should",
                error=True,
            )
    return card | ({"legal": legal} if legal else {})


def _is_small(path: Path) -> bool:
    """Whether a path is a file that is no larger than texts are."""
    return path.is_file() and path.stat().st_size <= LARGEST


def read_card(text: str) -> tuple[dict[str, Any], list[str]]:
    """Read what a model card says under the Hub's keys, so far as it is what they are for.

    Returns:
        {name, license, license_name, license_link, languages}, so far as they are known, and the
        keys under which something else is written; METADATA for a card whose head is no YAML.
    """
    import yaml
    from huggingface_hub.repocard import REGEX_YAML_BLOCK

    match = REGEX_YAML_BLOCK.search(text)
    if match is None:
        return {}, []
    try:
        data = yaml.safe_load(match[2])
    except (yaml.YAMLError, ValueError, RecursionError):
        return {}, [METADATA]
    if not isinstance(data, dict):
        return {}, [METADATA]
    card: dict[str, Any] = {key: _line(data.get(key)) for key in TERMS}
    unread = [key for key in TERMS if data.get(key) is not None and card[key] is None]
    card["name"] = next((name for key in NAMES if (name := _line(data.get(key)))), None)
    languages = data.get("language")
    listed = languages if isinstance(languages, list) else [languages]
    codes = [_line(code) for code in listed[:MOST]]
    card["languages"] = [code for code in codes if code and LANGUAGE.fullmatch(code)]
    return {key: value for key, value in card.items() if value}, unread


def card_of_gguf(path: Path) -> dict[str, Any]:
    """Return what a GGUF file says of its name and its terms, under the keys of `read_card`."""
    import gguf

    fields = gguf.GGUFReader(path).fields
    card: dict[str, Any] = {}
    for key, name in GGUF_KEYS.items():
        if key in fields:
            card[name] = _line(fields[key].contents())
    if "general.languages" in fields:
        codes = fields["general.languages"].contents()[:MOST]
        card["languages"] = [code for code in codes if LANGUAGE.fullmatch(str(code))]
    return {key: value for key, value in card.items() if value}


def _line(value: Any) -> str | None:
    """Return a value that is a short line of text; None for anything else."""
    # YAML reads the code of Norwegian as False.
    text = "no" if value is False else value
    if not isinstance(text, str) or len(text) > LONGEST:
        return None
    line = " ".join(text.split())
    return line if line.isprintable() and line else None
