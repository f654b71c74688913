"""Which of llama.cpp's pre-tokenizers a tokenizer.json has.

That is read from its steps and regular expressions, not from names. llama.cpp's side is in
src/llama-vocab.cpp (llm_tokenizer_bpe, and load() for what each name switches on).
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
SPACES = r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(
    r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]"
)
UPPER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]"
LOWER = r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = [
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}*{LOWER}+",
    rf"[^\r\n\p{{L}}\p{{N}}]?{UPPER}+{LOWER}*",
]
AFTER_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
TEKKEN = "|".join(CASED) + r"|\p{N}" + AFTER_WORDS
GPT4O = "|".join(f"{word}{CONTRACTIONS}?" for word in CASED) + r"|\p{N}{1,3}" + AFTER_WORDS
# Of alphabets that have case, in code points, since editors change some letters into equal ones.
LETTERS = (
    "A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    "\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1"
    "\u03a3-\u03f5\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd"
    "\u1c90-\u1cba\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d"
    "\u1f20-\u1f45\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4"
    "\u1fb6-\u1fbc\u1fbe\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec"
    "\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128"
    "\u212a-\u212d\u212f-\u2134\u2139\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b"
    "\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787"
    "\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a"
    "\U00010400-\U0001044f\U000104b0-\U000104d3\U000104d8-\U000104fb\U00010c80-\U00010cb2"
    "\U00010cc0-\U00010cf2\U000118a0-\U000118df\U0001e900-\U0001e943"
)
CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
PUNCTUATION = r"\s?" + "[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
CJK_V3 = "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"
DEEPSEEK3 = (
    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
    r" ?[\p{P}\p{S}]+[\r\n]*|" + SPACES
)

# These leave no text between matches, so that none can be removed.
COMPLETE = (GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN, GPT4O)
Step = tuple[Any, ...]  # its kind and what it needs
BYTES: Step = ("bytes",)
GPT2_STEPS: tuple[Step, ...] = (("split", GPT2), BYTES)  # what ByteLevel does by itself


class PreTokenizer(NamedTuple):
    """One of llama.cpp's pre-tokenizers.

    Attributes:
        name: What a GGUF file calls it.
        ignores_merges: Whether llama.cpp then takes a word that is a token as it is, whatever the
            merges make of it.
    """

    name: str
    ignores_merges: bool


# Steps → what llama.cpp has for them, the best first. llama.cpp's own gpt-4o and tekken split words
# at combining marks (vowel signs of Hindi or Thai), which theirs do not; there is one like gpt-4o
# that does not, under the name of another model.
PRE_TOKENIZERS: dict[tuple[Step, ...], tuple[PreTokenizer, ...]] = {
    GPT2_STEPS: (PreTokenizer("gpt-2", False),),
    # Also llama.cpp's starcoder, refact, command-r and codeshell.
    (("digits", True), *GPT2_STEPS): (PreTokenizer("smollm", False),),
    (
        ("punctuation", "Contiguous"),
        *GPT2_STEPS,
        ("digits", False),
        ("split", "[0-9][0-9][0-9]"),
    ): (PreTokenizer("falcon", False),),
    (("split", LLAMA3), BYTES): (
        PreTokenizer("llama-bpe", True),
        PreTokenizer("dbrx", False),
    ),
    (("split", QWEN2), BYTES): (PreTokenizer("qwen2", False),),
    (("split", QWEN35), BYTES): (PreTokenizer("qwen35", False),),
    (("split", TEKKEN), BYTES): (PreTokenizer("tekken", True),),
    (("split", GPT4O), BYTES): (
        PreTokenizer("granite-embed-multi-97m", True),
        PreTokenizer("gpt-4o", False),
    ),
    (
        ("split", r"[\r\n]"),
        ("split", r"\s?[" + LETTERS + "]+"),
        ("split", PUNCTUATION),
        ("split", r"\s+$"),
        ("split", CJK),
        ("digits", True),
        BYTES,
    ): (PreTokenizer("deepseek-llm", False),),
    (
        ("split", r"[\r\n]"),
        ("split", r"\s?\p{L}+"),
        ("split", r"\s?\p{P}+"),
        ("split", CJK),
        ("digits", True),
        BYTES,
    ): (PreTokenizer("deepseek-coder", False),),
    (
        ("split", r"\p{N}{1,3}"),
        ("split", CJK_V3),
        ("split", DEEPSEEK3),
        BYTES,
    ): (PreTokenizer("deepseek-v3", False),),
}


def find_pre_tokenizers(spec: dict[str, Any] | None) -> tuple[PreTokenizer, ...]:
    """Return llama.cpp's pre-tokenizers for that of a tokenizer.json, the best first.

    It is empty if llama.cpp knows none like it.
    """
    return PRE_TOKENIZERS.get(tuple(normalized_steps(spec)), ())


def normalized_steps(spec: dict[str, Any] | None) -> Iterator[Step]:
    """Yield the steps of a `pre_tokenizer` in a canonical form.

    A step that llama.cpp lacks is ("unknown", type).
    """
    if not spec:
        return
    for step in spec.get("pretokenizers", [spec]):
        kind = step["type"]
        if kind == "Sequence":
            yield from normalized_steps(step)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield from GPT2_STEPS if step.get("use_regex", True) else (BYTES,)
        elif kind == "Digits":
            yield "digits", bool(step.get("individual_digits"))
        elif kind == "Punctuation":
            yield "punctuation", step.get("behavior", "Isolated")
        elif kind == "Split":
            yield _normalized_split(step)
        else:
            yield "unknown", kind


def _normalized_split(step: dict[str, Any]) -> Step:
    """Return a step that makes each match of a regular expression a word of its own."""
    pattern = step.get("pattern")
    regex = pattern.get("Regex") if isinstance(pattern, dict) else None
    behaviour = (step.get("behavior"), bool(step.get("invert")))
    keeps_all_text = behaviour == ("Isolated", False) or (
        behaviour == ("Removed", True) and regex in COMPLETE
    )
    if not regex or not keeps_all_text:
        return ("unknown", step["type"])
    return ("split", regex.replace("\r", r"\r").replace("\n", r"\n"))
