"""Which special tokens a checkpoint has: transformers' answer, as `load` writes it down.

Where a special token is named, and which name counts, is transformers' own business: in
tokenizer_config.json, special_tokens_map.json, added_tokens.json, tokenizer.json, the defaults of a
tokenizer's class, generation_config.json or config.json. `load` asks it once
(quantline/text/transformers_tokenizer.py). Later stages, and bundles wherever they lie, read the
answer from a file, so that they need not import transformers.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from string import ascii_letters, digits

from quantline.errors import StageError
from quantline.files import known_sha256, read_json, write_json

FILE = "special_tokens.json"
TEMPLATES = "additional_chat_templates"  # a folder of named templates, one in each *.jinja
DEFAULT = "default"  # the name of the template that serves where none is asked for
# What transformers reads the answer from, besides config.json and that folder.
SOURCES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "tokenizer.model",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "generation_config.json",
)


@dataclass(frozen=True)
class SpecialTokens:
    """What is special about a tokenizer.

    Attributes:
        tokens: Name, such as `bos_token` → text; chat templates see these as variables.
        ids: Name → id, of those that have a row in the embedding.
        begin: Ids that are put before every text.
        finish: Ids that are put behind every text.
        ends: Ids at which a generated text ends: the tokenizer's end, then those that the model's
            generation stops at.
        unreachable: Ids that the generation shall stop at and that the embedding has no row for,
            so that they never come.
        templates: Name → chat template; one that has no name is called `default`.
    """

    tokens: dict[str, str]
    ids: dict[str, int]
    begin: list[int]
    finish: list[int]
    ends: list[int]
    unreachable: list[int]
    templates: dict[str, str]

    @property
    def default_template(self) -> str | None:
        """The chat template that serves: the one named `default`, or the only one."""
        if DEFAULT in self.templates:
            return self.templates[DEFAULT] or None
        return next(iter(self.templates.values())) if len(self.templates) == 1 else None


def plain_name(template: str) -> str:
    """Return a template's name with the letters and digits that GGUF allows, else underscores."""
    return "".join(one if one in ascii_letters + digits else "_" for one in template)


def source_files(folder: Path) -> list[str]:
    """Return the files of a folder that the answer is made of, besides config.json."""
    names = [name for name in SOURCES if (folder / name).is_file()]
    return names + template_files(folder)


def template_files(folder: Path) -> list[str]:
    """Return the files with named templates, as `additional_chat_templates/<name>.jinja`."""
    paths = sorted((folder / TEMPLATES).glob("*.jinja"))
    return [f"{TEMPLATES}/{path.name}" for path in paths if path.is_file()]


def write_special_tokens(folder: Path, special: SpecialTokens) -> None:
    """Write the answer beside the files that it was made of, with their hashes."""
    hashes = {name: known_sha256(folder / name) for name in source_files(folder)}
    write_json(folder / FILE, asdict(special) | {"files": hashes})


def read_special_tokens(folder: Path) -> SpecialTokens | None:
    """Return the answer of a folder; None if there is none that belongs to its files."""
    path = folder / FILE
    if not path.is_file():
        return None
    try:
        stored = read_json(path)
    except StageError:
        return None
    names = source_files(folder)
    if stored.pop("files", None) != {name: known_sha256(folder / name) for name in names}:
        return None
    known = [field.name for field in fields(SpecialTokens)]
    return SpecialTokens(**stored) if sorted(stored) == sorted(known) else None


def describe_differences(ours: SpecialTokens, theirs: SpecialTokens) -> Iterable[str]:
    """Yield "ends [1] and [1, 2]" and so on for each attribute in which two answers differ."""
    for field in fields(SpecialTokens):
        left = getattr(ours, field.name)
        right = getattr(theirs, field.name)
        if left != right:
            yield f"{field.name} {left!r:.200} and {right!r:.200}"
