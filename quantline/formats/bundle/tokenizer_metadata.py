"""What a bundle says of its tokenizer besides the tokens, compared with the source's.

That is its special tokens, what is put around every text, and the chat templates.
"""

from pathlib import Path
from typing import Any

from quantline.formats.container import Container
from quantline.text.special_tokens import DEFAULT, plain_name
from quantline.text.tokenizer import Tokenizer


def metadata_of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a Hugging Face folder says of its tokenizer (see Container)."""
    special = tokenizer.specials
    begin = special.begin[0] if special.begin else None
    templates = {}
    for name, template in special.templates.items():
        if name != DEFAULT:
            templates[plain_name(name)] = template
    return {
        "bos": special.ids.get("bos_token", begin),
        "eos": special.ends[0] if special.ends else None,
        "unk": special.ids.get("unk_token"),
        "pad": special.ids.get("pad_token"),
        "ends": special.ends,
        "adds_bos": bool(special.begin),
        "adds_eos": bool(special.finish),
        "chat_template": special.default_template,
        "named_templates": templates,
    }


def metadata_differences(
    container: Container[Any], bundle: Path, source: Tokenizer
) -> dict[str, tuple[Any, Any]]:
    """Return {what differs: (in the source, in the bundle)}, of what the bundle has words for."""
    expected = metadata_of_tokenizer(source)
    found = container.tokenizer_metadata(bundle)
    differences = {}
    for key, value in expected.items():
        if key in found and found[key] != value:
            differences[key] = (value, found[key])
    return differences
