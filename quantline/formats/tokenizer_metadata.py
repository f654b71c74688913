"""What a bundle holds of the tokenizer beside the tokens: special tokens, whether texts begin with one, the template."""

from pathlib import Path
from typing import Any

from quantline.text.tokenizer import Tokenizer
from quantline.formats.container import GGUF

SPECIAL = ("bos", "eos", "unk", "pad")


def of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """{bos, eos, unk, pad: id or None; adds_bos; chat_template} of a Hugging Face folder."""
    ids = {role: tokenizer.special(f"{role}_token") for role in SPECIAL}
    return ids | {"adds_bos": tokenizer.bos is not None, "chat_template": tokenizer.chat_template or None}


def of_bundle(folder: Path) -> dict[str, Any]:
    """The same of a bundle, from its GGUF file's metadata if it has one."""
    files = sorted(folder.glob(GGUF))
    if not files:
        return of_tokenizer(Tokenizer(folder))
    from gguf import GGUFReader

    fields = GGUFReader(files[0]).fields

    def value(key: str) -> Any:
        return fields[key].contents() if key in fields else None

    ids = {role: value(f"tokenizer.ggml.{'unknown' if role == 'unk' else 'padding' if role == 'pad' else role}_token_id")
           for role in SPECIAL}
    return ids | {"adds_bos": bool(value("tokenizer.ggml.add_bos_token")), "chat_template": value("tokenizer.chat_template")}


def differences(folder: Path, source: Tokenizer) -> dict[str, tuple[Any, Any]]:
    """{what: (in the source, in the bundle)} where they differ."""
    before, after = of_tokenizer(source), of_bundle(folder)
    return {key: (before[key], after[key]) for key in before if before[key] != after[key]}
