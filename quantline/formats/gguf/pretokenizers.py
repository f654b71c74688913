"""Which of llama.cpp's pre-tokenizers a tokenizer.json has, told from its steps and regular expressions, not names.

llama.cpp's side is in src/llama-vocab.cpp (llm_tokenizer_bpe, and load() for what each name switches on).
"""

from collections.abc import Iterator

CONTRACTIONS, SPACES = "(?i:'s|'t|'re|'ve|'m|'ll|'d)", r"\s*[\r\n]+|\s+(?!\S)|\s+"
GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = CONTRACTIONS + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + SPACES
QWEN2 = LLAMA3.replace(r"\p{N}{1,3}", r"\p{N}")
QWEN35 = QWEN2.replace(r"\p{L}+", r"[\p{L}\p{M}]+").replace(r" ?[^\s\p{L}\p{N}]", r" ?[^\s\p{L}\p{M}\p{N}]")
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = [r"[^\r\n\p{L}\p{N}]?" + word for word in (f"{UPPER}*{LOWER}+", f"{UPPER}+{LOWER}*")]
AFTER_WORDS = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + SPACES
TEKKEN = "|".join(CASED) + r"|\p{N}" + AFTER_WORDS
GPT4O = "|".join(f"{word}{CONTRACTIONS}?" for word in CASED) + r"|\p{N}{1,3}" + AFTER_WORDS
LETTERS = (  # of alphabets that have case, in code points, since editors change some of them into their equals
    "A-Za-z\u00B5\u00C0-\u00D6\u00D8-\u00F6\u00F8-\u01BA\u01BC-\u01BF\u01C4-\u0293\u0295-\u02AF\u0370-\u0373\u0376"
    "\u0377\u037B-\u037D\u037F\u0386\u0388-\u038A\u038C\u038E-\u03A1\u03A3-\u03F5\u03F7-\u0481\u048A-\u052F\u0531-"
    "\u0556\u10A0-\u10C5\u13A0-\u13F5\u13F8-\u13FD\u1C90-\u1CBA\u1CBD-\u1CBF\u1D00-\u1D2B\u1D6B-\u1D77\u1D79-\u1D9A"
    "\u1E00-\u1F15\u1F18-\u1F1D\u1F20-\u1F45\u1F48-\u1F4D\u1F50-\u1F57\u1F59\u1F5B\u1F5D\u1F5F-\u1F7D\u1F80-\u1FB4"
    "\u1FB6-\u1FBC\u1FBE\u1FC2-\u1FC4\u1FC6-\u1FCC\u1FD0-\u1FD3\u1FD6-\u1FDB\u1FE0-\u1FEC\u1FF2-\u1FF4\u1FF6-\u1FFC"
    "\u2102\u2107\u210A-\u2113\u2115\u2119-\u211D\u2124\u2126\u2128\u212A-\u212D\u212F-\u2134\u2139\u213C-\u213F"
    "\u2145-\u2149\u214E\u2183\u2184\u2C00-\u2C7B\u2C7E-\u2CE4\u2CEB-\u2CEE\u2CF2\u2CF3\uA640-\uA66D\uA680-\uA69B"
    "\uA722-\uA76F\uA771-\uA787\uA78B-\uA78E\uAB70-\uABBF\uFB00-\uFB06\uFB13-\uFB17\uFF21-\uFF3A\uFF41-\uFF5A"
    "\U00010400-\U0001044F\U000104B0-\U000104D3\U000104D8-\U000104FB\U00010C80-\U00010CB2\U00010CC0-\U00010CF2"
    "\U000118A0-\U000118DF\U0001E900-\U0001E943"
)
CJK = "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+"
PUNCTUATION = r"\s?" + "[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+"
DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
             r" ?[\p{P}\p{S}]+[\r\n]*|" + SPACES).replace(r'\"', '"')

COMPLETE = (GPT2, LLAMA3, QWEN2, QWEN35, TEKKEN, GPT4O)  # leave no text between matches, so that none can be removed
BYTES = ("bytes",)
WORDS = (("split", GPT2), BYTES)  # what ByteLevel does by itself
# Steps → (name, whether llama.cpp takes a word that is a token whole, past the merges), the best first. llama.cpp's
# own gpt-4o and tekken split words at combining marks (vowel signs of Hindi or Thai), which theirs do not; there is one
# like gpt-4o that does not, under the name of another model.
NAMES: dict[tuple, tuple[tuple[str, bool], ...]] = {
    WORDS: (("gpt-2", False),),
    (("digits", True), *WORDS): (("smollm", False),),  # also llama.cpp's starcoder, refact, command-r and codeshell
    (("punctuation", "Contiguous"), *WORDS, ("digits", False), ("split", "[0-9][0-9][0-9]")): (("falcon", False),),
    (("split", LLAMA3), BYTES): (("llama-bpe", True), ("dbrx", False)),
    (("split", QWEN2), BYTES): (("qwen2", False),),
    (("split", QWEN35), BYTES): (("qwen35", False),),
    (("split", TEKKEN), BYTES): (("tekken", True),),
    (("split", GPT4O), BYTES): (("granite-embed-multi-97m", True), ("gpt-4o", False)),
    (("split", r"[\r\n]"), ("split", r"\s?[" + LETTERS + "]+"), ("split", PUNCTUATION),
     ("split", r"\s+$"), ("split", CJK), ("digits", True), BYTES): (("deepseek-llm", False),),
    (("split", r"[\r\n]"), ("split", r"\s?\p{L}+"), ("split", r"\s?\p{P}+"), ("split", CJK), ("digits", True),
     BYTES): (("deepseek-coder", False),),
    (("split", r"\p{N}{1,3}"), ("split", "[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+"), ("split", DEEPSEEK3),
     BYTES): (("deepseek-v3", False),),
}


def steps_of(spec: dict | None) -> Iterator[tuple]:
    """The steps of a `pre_tokenizer` in one way of writing; ("unknown", …) for what llama.cpp has nothing like."""
    for step in (spec or {}).get("pretokenizers", [spec] if spec else []):
        kind, pattern = step["type"], step.get("pattern")
        regex = pattern.get("Regex") if isinstance(pattern, dict) else None
        pieces = (step.get("behavior"), bool(step.get("invert")))
        isolated = pieces == ("Isolated", False) or (pieces == ("Removed", True) and regex in COMPLETE)
        if kind == "Sequence":
            yield from steps_of(step)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield from WORDS if step.get("use_regex", True) else (BYTES,)
        elif kind == "Digits":
            yield "digits", bool(step.get("individual_digits"))
        elif kind == "Punctuation":
            yield "punctuation", step.get("behavior", "Isolated")
        elif kind == "Split" and regex and isolated:
            yield "split", regex.replace("\r", r"\r").replace("\n", r"\n")
        else:
            yield "unknown", kind


def pre_tokenizer_names(spec: dict | None) -> tuple[tuple[str, bool], ...]:
    """(llama.cpp's name for the `pre_tokenizer` of a tokenizer.json, whether llama.cpp then takes words that are tokens
    whole), the best first; none if it knows none like it.
    """
    return NAMES.get(tuple(steps_of(spec)), ())
