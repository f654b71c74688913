"""What a bundle says of its tokenizer besides the tokens, compared with the source's.

That is its special tokens, whether every text begins with one, and the chat template.
"""

from pathlib import Path
from typing import Any

from quantline.formats.container import Container
from quantline.text.tokenizer import Tokenizer

SPECIAL_TOKENS = ("bos", "eos", "unk", "pad")


def metadata_of_tokenizer(tokenizer: Tokenizer) -> dict[str, Any]:
    """Return what a Hugging Face folder says of its tokenizer (see Container)."""
    metadata: dict[str, Any] = {}
    for token in SPECIAL_TOKENS:
        metadata[token] = tokenizer.special(f"{token}_token")
    metadata["adds_bos"] = tokenizer.bos is not None
    metadata["chat_template"] = tokenizer.chat_template or None
    return metadata


def metadata_differences(
    container: Container[Any], bundle: Path, source: Tokenizer
) -> dict[str, tuple[Any, Any]]:
    """Return {what differs: (in the source, in the bundle)}."""
    expected = metadata_of_tokenizer(source)
    found = container.tokenizer_metadata(bundle)
    differences = {}
    for key, value in expected.items():
        if found[key] != value:
            differences[key] = (value, found[key])
    return differences
