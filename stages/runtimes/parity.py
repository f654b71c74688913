"""Does a bundle's own tokenizer give the same ids as the source's?"""

from stages.checkpoints.tokenization import Tokenizer
from stages.runtimes import Runtime

TEXTS = (
    "The quick brown fox doesn't jump over 13 lazy dogs; it's 3.14159 o'clock.",
    "  two  spaces,\ttab,\nnew line\n\n and trailing ", "def f(x: int) -> str:\n    return f\"{x:>8}\"  # code\n",
    "1234567890 1,000,000.50 0x1F 2²", "Ελληνικά, русский язык, עברית, العربية, हिन्दी, ภาษาไทย",
    "中文字符与日本語のテキスト、한국어", "naïve café œuvre — “quotes” … № ½", "🙂👩‍👩‍👧‍👦🏳️‍🌈 emoji 🚀🚀",
)


def mismatches(runtime: Runtime, source: Tokenizer, texts: tuple[str, ...] = TEXTS) -> tuple[list[str], int]:
    """(texts that the bundle tokenizes otherwise, number of texts compared).

    A text that the source itself cannot represent (it has no bytes to fall back on) has no ids to agree on and is
    left out.
    """
    unknown = source.special("unk_token")
    compared = [text for text in texts if unknown is None or unknown not in source.encode(text)]
    return [text for text in compared if runtime.encode(text) != source.encode(text)], len(compared)
