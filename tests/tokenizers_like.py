"""Small tokenizers in the exact pipelines of well-known families, trained here."""

import json
from collections.abc import Callable
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from quantline.formats.gguf import pretokenizers as known

CORPUS = [
    "It's the 1st of May 2024; we'll see 12,345.67 or 1e-9 of them, won't we? I'M sure THEY'RE here, you'd say.",
    "def area(r: float) -> float:\n    if r < 0:\n        raise ValueError(f\"bad {r!r}\")\n    return 3.14159 * r ** 2\n\n\n",
    "for (int i = 0; i < n; ++i) {\n\tsum += a[i] << 2; // shift\n}\r\n#include <stdio.h>\r\n",
    "    indented    by    four\t\ttabs\n \n  \n   trailing spaces   ", "{\"key\": [1, 2.5, null], \"path\": \"C:\\\\dir\"}",
    "Ο ήλιος ανατέλλει πάντα από την ανατολή. Η Αθήνα είναι μεγάλη πόλη.", "Русский язык и ещё немного слов; ПриВет, МИР!",
    "עברית וערבית: مرحبا بالعالم، كيف حالك؟", "हिन्दी में लिखा हुआ एक वाक्य, नमस्ते दुनिया।", "ภาษาไทยไม่มีช่องว่างระหว่างคำ",
    "中文字符与日本語のテキスト、한국어 문장입니다。你好，世界！", "Größe, naïve café, œuvre, Ångström, İstanbul, ǅ, ﬁ",
    "🙂👍🏽👩‍👩‍👧‍👦🏳️‍🌈🚀🚀 emoji", "½ ² ³ ① Ⅷ ٣٤٥ १२३ ４５", "— “quotes” … № € £ ¥ © ™ ≤ ≠ → ∑ 😀",
] * 3


def byte_level(*steps, use_regex: bool = False):
    return pre_tokenizers.Sequence([*steps, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)])


def split(regex: str, **how):
    return pre_tokenizers.Split(Regex(regex), **({"behavior": "isolated"} | how))


def deepseek(*regexes: str):
    return byte_level(*(split(regex) for regex in regexes), pre_tokenizers.Digits(individual_digits=True))


LLM, CODER = ([step[1] for step in steps if step[0] == "split"]
              for steps, names in known.NAMES.items() if names[0][0] in ("deepseek-llm", "deepseek-coder"))
V3 = next([step[1] for step in steps if step[0] == "split"] for steps, names in known.NAMES.items() if names[0][0] == "deepseek-v3")
NFC = normalizers.NFC()
# Family → (llama.cpp's name, pre-tokenizer, normalizer, ignore_merges).
BYTE_LEVEL: dict[str, tuple[str, Callable, object, bool]] = {
    "gpt2": ("gpt-2", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), None, False),
    "gpt-neox and olmo": ("gpt-2", lambda: pre_tokenizers.ByteLevel(add_prefix_space=False), NFC, False),
    "gpt2 by its regex": ("gpt-2", lambda: byte_level(split(known.GPT2)), None, False),
    "smollm and starcoder2": ("smollm", lambda: byte_level(pre_tokenizers.Digits(individual_digits=True), use_regex=True), None, False),
    "llama 3": ("llama-bpe", lambda: byte_level(split(known.LLAMA3)), None, True),
    "dbrx": ("llama-bpe", lambda: byte_level(split(known.LLAMA3, behavior="removed", invert=True)), None, False),
    "qwen2": ("qwen2", lambda: byte_level(split(known.QWEN2)), NFC, False),
    "qwen3.5": ("qwen35", lambda: byte_level(split(known.QWEN35)), NFC, False),
    "mistral nemo": ("tekken", lambda: byte_level(split(known.TEKKEN)), None, True),
    "gpt-4o": ("granite-embed-multi-97m", lambda: byte_level(split(known.GPT4O)), None, False),
    "llama 4": ("granite-embed-multi-97m", lambda: byte_level(split(known.GPT4O, behavior="removed", invert=True)), None, True),
    "deepseek-llm": ("deepseek-llm", lambda: deepseek(*LLM), None, False),
    "deepseek-coder": ("deepseek-coder", lambda: deepseek(*CODER), None, False),
    "deepseek-v3": ("deepseek-v3", lambda: byte_level(*(split(regex) for regex in V3)), None, False),
    "falcon": ("falcon", lambda: pre_tokenizers.Sequence([
        pre_tokenizers.Punctuation("contiguous"), pre_tokenizers.ByteLevel(add_prefix_space=False),
        pre_tokenizers.Digits(individual_digits=False), split("[0-9][0-9][0-9]")]), None, False),
}


def write(folder: Path, tokenizer: Tokenizer, **about) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"} | about))
    return folder


def write_byte_level(folder: Path, family: str, size: int = 700) -> Path:
    """A byte-level BPE tokenizer of a family."""
    _, steps, normalizer, whole = BYTE_LEVEL[family]
    tokenizer = Tokenizer(models.BPE(ignore_merges=whole))
    tokenizer.pre_tokenizer, tokenizer.decoder = steps(), decoders.ByteLevel()
    if normalizer:
        tokenizer.normalizer = normalizer
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(CORPUS, trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False, special_tokens=["<|bos|>", "<|endoftext|>"]))
    tokenizer.add_special_tokens([AddedToken("<|im_start|>", normalized=False, special=True)])
    tokenizer.add_tokens([AddedToken("<tool_call>", normalized=False), AddedToken("<|fim_prefix|>", normalized=False)])
    return write(folder, tokenizer, bos_token="<|bos|>", eos_token="<|endoftext|>")


def sentencepiece_merges(folder: Path, **how) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """(vocabulary, merges as transformers derives them) of a SentencePiece BPE trained here."""
    import sentencepiece as spm

    (folder / "corpus.txt").write_text("\n".join(text.replace("\n", " ") for text in CORPUS))
    settings = {"model_type": "bpe", "vocab_size": 900, "byte_fallback": True, "character_coverage": 0.98,
                "normalization_rule_name": "identity", "remove_extra_whitespaces": False, "split_digits": True,
                "minloglevel": 2, "hard_vocab_limit": False} | how
    spm.SentencePieceTrainer.train(input=str(folder / "corpus.txt"), model_prefix=str(folder / "spm"), **settings)
    model = spm.SentencePieceProcessor(model_file=str(folder / "spm.model"))
    scores = {model.id_to_piece(index): (index, model.get_score(index)) for index in range(model.get_piece_size())}
    merges = []
    for piece, (_, score) in scores.items():
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece)) if piece[:cut] in scores and piece[cut:] in scores]
        merges += [(*pair, score) for pair in sorted(pairs, key=lambda pair: (scores[pair[0]][0], scores[pair[1]][0]))]
    merges.sort(key=lambda one: one[2], reverse=True)
    return {piece: index for piece, (index, _) in scores.items()}, [one[:2] for one in merges]


SPACE = "▁"


def write_sentencepiece(folder: Path, family: str) -> Path:
    """A SentencePiece-like tokenizer as llama 2, mistral v0.3 (Metaspace), gemma or phi-3 have it."""
    folder.mkdir(parents=True, exist_ok=True)
    defined = {"gemma": {"user_defined_symbols": ["\n\n", SPACE * 2, SPACE * 3, "<b>"]}}.get(family, {})
    vocabulary, merges = sentencepiece_merges(folder, **defined)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    replace = normalizers.Replace(" ", SPACE)
    if family == "gemma":
        tokenizer.normalizer, tokenizer.pre_tokenizer = replace, pre_tokenizers.Split(" ", "merged_with_previous")
    elif family == "mistral v0.3":
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement=SPACE, prepend_scheme="first", split=False)
    else:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), replace])
    tokenizer.decoder = decoders.Sequence([decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()])
    special = [AddedToken(text, normalized=False, special=True, rstrip=(family, text) == ("phi-3", "</s>"))
               for text in ("<unk>", "<s>", "</s>")]
    tokenizer.add_special_tokens(special)
    if family == "gemma":
        tokenizer.add_tokens([AddedToken(text, normalized=True, special=False) for text in defined["user_defined_symbols"]])
    if family == "phi-3":
        tokenizer.add_special_tokens([AddedToken("<|endoftext|>", normalized=False, special=True)])
        tokenizer.add_special_tokens([AddedToken(text, normalized=False, special=True, rstrip=True)
                                      for text in ("<|user|>", "<|assistant|>", "<|end|>")])
    if family == "mistral v0.3":
        tokenizer.add_special_tokens([AddedToken("[INST]", normalized=False, special=True)])
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return write(folder, tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


SENTENCEPIECE = ("llama 2", "mistral v0.3", "gemma", "phi-3")
