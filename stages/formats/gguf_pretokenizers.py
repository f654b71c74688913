"""Which of llama.cpp's pre-tokenizers a tokenizer.json has, told from its steps and regular expressions, not from names.

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
LETTERS = (
    "A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-ՖႠ-ჅᎠ-Ᏽᏸ-ᏽᲐ-ᲺᲽ-Ჿᴀ-ᴫᵫ-ᵷᵹ-ᶚḀ-ἕἘ-Ἕἠ-ὅὈ-Ὅὐ-ὗὙὛὝὟ-ώᾀ-ᾴᾶ-ᾼιῂ-ῄῆ-ῌῐ-ΐῖ-Ίῠ-Ῥῲ-ῴῶ-ῼℂℇℊ-ℓ"
    "ℕℙ-ℝℤΩℨK-ℭℯ-ℴℹℼ-ℿⅅ-ⅉⅎↃↄⰀ-ⱻⱾ-ⳤⳫ-ⳮⳲⳳꙀ-ꙭꚀ-ꚛꜢ-ꝯꝱ-ꞇꞋ-ꞎꭰ-ꮿﬀ-ﬆﬓ-ﬗＡ-Ｚａ-ｚ𐐀-𐑏𐒰-𐓓𐓘-𐓻𐲀-𐲲𐳀-𐳲𑢠-𑣟𞤀-𞥃")
CJK = "[一-龥ࠀ-一가-퟿]+"
DEEPSEEK3 = (r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+| ?[\p{P}\p{S}]+[\r\n]*|"
             + SPACES).replace(r'\"', '"')

BYTES = ("bytes",)
WORDS = (("split", GPT2), BYTES)  # what ByteLevel does by itself
# Steps → (name, whether llama.cpp takes a word that is a token whole, past the merges). Where there are two, the
# tokenizer's own ignore_merges decides.
NAMES: dict[tuple, tuple[tuple[str, bool], ...]] = {
    WORDS: (("gpt-2", False),),
    (("digits", True), *WORDS): (("smollm", False),),  # also llama.cpp's starcoder, refact, command-r and codeshell
    (("punctuation", "Contiguous"), *WORDS, ("digits", False), ("split", "[0-9][0-9][0-9]")): (("falcon", False),),
    (("split", LLAMA3), BYTES): (("llama-bpe", True), ("dbrx", False)),
    (("split", QWEN2), BYTES): (("qwen2", False),),
    (("split", QWEN35), BYTES): (("qwen35", False),),
    (("split", TEKKEN), BYTES): (("tekken", True),),
    (("split", GPT4O), BYTES): (("gpt-4o", False),),
    (("split", r"[\r\n]"), ("split", r"\s?[" + LETTERS + "]+"), ("split", r"\s?[!-/:-~！-／：-～‘-‟　-。]+"),
     ("split", r"\s+$"), ("split", CJK), ("digits", True), BYTES): (("deepseek-llm", False),),
    (("split", r"[\r\n]"), ("split", r"\s?\p{L}+"), ("split", r"\s?\p{P}+"), ("split", CJK), ("digits", True),
     BYTES): (("deepseek-coder", False),),
    (("split", r"\p{N}{1,3}"), ("split", "[一-龥぀-ゟ゠-ヿ]+"), ("split", DEEPSEEK3), BYTES): (("deepseek-v3", False),),
}


def steps_of(spec: dict | None) -> Iterator[tuple]:
    """The steps of a `pre_tokenizer` in one way of writing; ("unknown", …) for what llama.cpp has nothing like."""
    for step in (spec or {}).get("pretokenizers", [spec] if spec else []):
        kind, regex = step["type"], (step.get("pattern") or {}).get("Regex") if isinstance(step.get("pattern"), dict) else None
        # That the pieces are what matches, or that what matches no inverse is removed, is the same: these match everything.
        pieces = (step.get("behavior"), bool(step.get("invert"))) in (("Isolated", False), ("Removed", True))
        if kind == "Sequence":
            yield from steps_of(step)
        elif kind == "ByteLevel" and not step.get("add_prefix_space"):
            yield from WORDS if step.get("use_regex", True) else (BYTES,)
        elif kind == "Digits":
            yield "digits", bool(step.get("individual_digits"))
        elif kind == "Punctuation":
            yield "punctuation", step.get("behavior", "Isolated")
        elif kind == "Split" and regex and pieces:
            yield "split", regex.replace("\r", r"\r").replace("\n", r"\n")
        else:
            yield "unknown", kind


def pre_tokenizer_name(spec: dict | None, whole_words: bool = False) -> tuple[str, bool] | None:
    """(llama.cpp's name for the `pre_tokenizer` of a tokenizer.json, whether llama.cpp takes words that are tokens whole);
    None if it knows none like it. `whole_words` is the model's ignore_merges.
    """
    names = NAMES.get(tuple(steps_of(spec)), ())
    return next((one for one in names if one[1] == whole_words), names[0] if names else None)
