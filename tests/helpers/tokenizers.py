"""Small tokenizers in the exact pipelines of well-known families, trained here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from quantline.formats.gguf.pretokenizers import (
    GPT2,
    GPT4O,
    LLAMA3,
    PRE_TOKENIZERS,
    QWEN2,
    QWEN35,
    TEKKEN,
)

# Prose, code, numbers, white space and emoji in many scripts, each three times.
CORPUS = [
    "It's the 1st of May 2024; we'll see 12,345.67 or 1e-9 of them, won't we? I'M sure "
    "THEY'RE here, you'd say.",
    'def area(r: float) -> float:\n    if r < 0:\n        raise ValueError(f"bad '
    '{r!r}")\n    return 3.14159 * r ** 2\n\n\n',
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] << 2; // shift\n}\r\n#include <stdio.h>\r\n",
    "    indented    by    four\t\ttabs\n \n  \n   trailing spaces   ",
    '{"key": [1, 2.5, null], "path": "C:\\\\dir"}',
    "Ο ήλιος ανατέλλει πάντα από την ανατολή. Η Αθήνα είναι μεγάλη πόλη.",
    "Русский язык и ещё немного слов; ПриВет, МИР!",
    "עברית וערבית: مرحبا بالعالم، كيف حالك؟",
    "हिन्दी में लिखा हुआ एक वाक्य, नमस्ते दुनिया।",
    "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "中文字符与日本語のテキスト、한국어 문장입니다。你好，世界！",
    "Größe, naïve café, œuvre, Ångström, İstanbul, ǅ, ﬁ",
    "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈🚀🚀 emoji",
    "½ ² ³ ① Ⅷ ٣٤٥ १२३ ４５",
    "— “quotes” … № € £ ¥ © ™ ≤ ≠ → ∑ 😀",
] * 3
SPACE = "▁"  # what SentencePiece writes for a space
NFC = normalizers.NFC()


def byte_level(*steps: Any, use_regex: bool = False) -> Any:
    """Return a pre-tokenizer of these steps and bytes."""
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*steps, last])


def gpt2() -> Any:
    """Return GPT-2's pre-tokenizer as its tokenizer.json has it."""
    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def split(regex: str, **options: Any) -> Any:
    """Return a step that makes each match of a regular expression a word."""
    return pre_tokenizers.Split(Regex(regex), **({"behavior": "isolated"} | options))


def split_by(regex: str) -> Callable[[], Any]:
    """Return what makes a pre-tokenizer that keeps the text between matches."""
    return lambda: byte_level(split(regex))


def split_inverted(regex: str) -> Callable[[], Any]:
    """Return what makes a pre-tokenizer that removes the text between matches."""
    return lambda: byte_level(split(regex, behavior="removed", invert=True))


def expressions_of(name: str) -> list[str]:
    """Return the regular expressions of one of llama.cpp's pre-tokenizers."""
    for steps, known in PRE_TOKENIZERS.items():
        if known[0].name == name:
            return [step[1] for step in steps if step[0] == "split"]
    raise AssertionError(f"no pre-tokenizer {name}")


def deepseek(name: str) -> Any:
    """Return DeepSeek's older pre-tokenizers, which split digits too."""
    splits = [split(regex) for regex in expressions_of(name)]
    return byte_level(*splits, pre_tokenizers.Digits(individual_digits=True))


def falcon() -> Any:
    """Return Falcon's pre-tokenizer."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Punctuation("contiguous"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            pre_tokenizers.Digits(individual_digits=False),
            split("[0-9][0-9][0-9]"),
        ]
    )


class ByteLevelFamily(NamedTuple):
    """A family with byte-level BPE.

    Attributes:
        name: llama.cpp's name for its pre-tokenizer.
        pre_tokenizer: Makes it.
        normalizer: If it has one.
        ignore_merges: Whether words that are tokens are taken as they are.
    """

    name: str
    pre_tokenizer: Callable[[], Any]
    normalizer: Any = None
    ignore_merges: bool = False


BYTE_LEVEL = {
    "gpt2": ByteLevelFamily("gpt-2", gpt2),
    "gpt-neox and olmo": ByteLevelFamily("gpt-2", gpt2, NFC),
    "gpt2 by its regex": ByteLevelFamily("gpt-2", split_by(GPT2)),
    "smollm and starcoder2": ByteLevelFamily(
        "smollm",
        lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True),
    ),
    "llama 3": ByteLevelFamily("llama-bpe", split_by(LLAMA3), ignore_merges=True),
    "dbrx": ByteLevelFamily("llama-bpe", split_inverted(LLAMA3)),
    "qwen2": ByteLevelFamily("qwen2", split_by(QWEN2), NFC),
    "qwen3.5": ByteLevelFamily("qwen35", split_by(QWEN35), NFC),
    "mistral nemo": ByteLevelFamily("tekken", split_by(TEKKEN), ignore_merges=True),
    "gpt-4o": ByteLevelFamily("granite-embed-multi-97m", split_by(GPT4O)),
    "llama 4": ByteLevelFamily(
        "granite-embed-multi-97m", split_inverted(GPT4O), ignore_merges=True
    ),
    "deepseek-llm": ByteLevelFamily("deepseek-llm", lambda: deepseek("deepseek-llm")),
    "deepseek-coder": ByteLevelFamily("deepseek-coder", lambda: deepseek("deepseek-coder")),
    "deepseek-v3": ByteLevelFamily(
        "deepseek-v3",
        lambda: byte_level(*(split(regex) for regex in expressions_of("deepseek-v3"))),
    ),
    "falcon": ByteLevelFamily("falcon", falcon),
}
SENTENCEPIECE = ("llama 2", "mistral v0.3", "gemma", "phi-3")


def save(folder: Path, tokenizer: Tokenizer, **config: Any) -> Path:
    """Write tokenizer.json and tokenizer_config.json; return the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def write_byte_level(folder: Path, family: str, size: int = 700) -> Path:
    """Write a byte-level BPE tokenizer of a family."""
    kind = BYTE_LEVEL[family]
    tokenizer = Tokenizer(models.BPE(ignore_merges=kind.ignore_merges))
    tokenizer.pre_tokenizer = kind.pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    if kind.normalizer:
        tokenizer.normalizer = kind.normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
        special_tokens=["<|bos|>", "<|endoftext|>"],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    plain = [AddedToken(token, normalized=False) for token in ("<tool_call>", "<|fim_prefix|>")]
    tokenizer.add_tokens(plain)
    return save(folder, tokenizer, bos_token="<|bos|>", eos_token="<|endoftext|>")


def train_sentencepiece(
    folder: Path, **options: Any
) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Train a SentencePiece BPE; return its vocabulary, and merges as transformers derives them."""
    import sentencepiece

    corpus = folder / "corpus.txt"
    corpus.write_text("\n".join(text.replace("\n", " ") for text in CORPUS))
    settings = {
        "model_type": "bpe",
        "vocab_size": 900,
        "byte_fallback": True,
        "character_coverage": 0.98,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "split_digits": True,
        "minloglevel": 2,
        "hard_vocab_limit": False,
    }
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(folder / "spm"), **(settings | options)
    )
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    pieces = [model.id_to_piece(index) for index in range(model.get_piece_size())]
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = []
    for piece, index in vocabulary.items():
        pairs = []
        for cut in range(1, len(piece)):
            left = piece[:cut]
            right = piece[cut:]
            if left in vocabulary and right in vocabulary:
                pairs.append((left, right))
        pairs.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(model.get_score(index), pair) for pair in pairs]
    merges.sort(key=lambda merge: merge[0], reverse=True)
    return vocabulary, [pair for _, pair in merges]


def write_sentencepiece(folder: Path, family: str) -> Path:
    """Write a tokenizer as llama 2, mistral v0.3 (Metaspace), gemma or phi-3 have it."""
    folder.mkdir(parents=True, exist_ok=True)
    own_symbols = ["\n\n", SPACE * 2, SPACE * 3, "<b>"] if family == "gemma" else []
    options = {"user_defined_symbols": own_symbols} if own_symbols else {}
    vocabulary, merges = train_sentencepiece(folder, **options)
    model = models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(model)
    replace = normalizers.Replace(" ", SPACE)
    if family == "gemma":
        tokenizer.normalizer = replace
        tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    elif family == "mistral v0.3":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
            replacement=SPACE, prepend_scheme="first", split=False
        )
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    _add_tokens(tokenizer, family, own_symbols)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return save(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def _add_tokens(tokenizer: Tokenizer, family: str, own_symbols: list[str]) -> None:
    """Add the special tokens of a family, and its own symbols."""

    def special(text: str, rstrip: bool = False) -> AddedToken:
        return AddedToken(text, normalized=False, special=True, rstrip=rstrip)

    is_phi3 = family == "phi-3"
    end = special("</s>", rstrip=is_phi3)
    tokenizer.add_special_tokens([special("<unk>"), special("<s>"), end])
    tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in own_symbols])
    if is_phi3:
        roles = ("<|user|>", "<|assistant|>", "<|end|>")
        tokenizer.add_special_tokens([special("<|endoftext|>")])
        tokenizer.add_special_tokens([special(text, rstrip=True) for text in roles])
    if family == "mistral v0.3":
        tokenizer.add_special_tokens([special("[INST]")])
