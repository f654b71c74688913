"""Tokenizers in GGUF: llama.cpp gives the source's ids for every family, or refuses by name."""

import json
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as FastTokenizer

from quantline.errors import Failure, StageError
from quantline.formats.gguf.vocabulary import name_in_file, write_vocabulary
from quantline.runtimes import llama_cpp
from quantline.runtimes.llama_cpp_log import load_library
from quantline.runtimes.smoke.tokenizer_parity import (
    TEXTS,
    compare_tokenizers,
    texts_with_added_tokens,
)
from quantline.text.tokenizer import Tokenizer
from tests.helpers.tokenizers import (
    BYTE_LEVEL,
    CORPUS,
    SENTENCEPIECE,
    write_byte_level,
    write_sentencepiece,
)


def vocabulary_file(folder: Path, padding: int = 0, **changes: Any) -> Path:
    """Write a GGUF file with nothing but the vocabulary of a folder.

    `padding` is how many rows the embedding has beyond it; `changes` are metadata that take the
    place of ours.
    """
    source = Tokenizer(folder)
    path = folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name_in_file(source, "r"))
    for write_setting in (
        writer.add_block_count,
        writer.add_context_length,
        writer.add_embedding_length,
        writer.add_feed_forward_length,
        writer.add_head_count,
        writer.add_layer_norm_rms_eps,
    ):
        write_setting(1)
    write_vocabulary(writer, source, source.fast.get_vocab_size() + padding)
    for key, value in changes.items():
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def tokenizer_of(path: Path) -> llama_cpp.Engine:
    """Return llama.cpp's tokenizer of a file, without a model."""
    library = load_library()
    settings = library.llama_model_default_params()
    settings.vocab_only = True
    engine = llama_cpp.Engine.__new__(llama_cpp.Engine)
    engine.llama = library
    engine.model = library.llama_model_load_from_file(str(path).encode(), settings)
    assert engine.model, "llama.cpp cannot load the vocabulary"
    engine.tokens = library.llama_model_get_vocab(engine.model)
    return engine


def differing_texts(folder: Path, **changes: Any) -> list[str]:
    """Return the texts that llama.cpp tokenizes otherwise than the source."""
    source = Tokenizer(folder)
    engine = tokenizer_of(vocabulary_file(folder, **changes))
    texts = (*TEXTS, *CORPUS, *texts_with_added_tokens(source))
    parity = compare_tokenizers(engine, source, texts)
    assert parity.compared > 20
    return parity.differing


def field(path: Path, key: str) -> Any:
    """Return what a file says of its tokenizer."""
    fields = GGUFReader(path).fields
    name = f"tokenizer.ggml.{key}"
    return fields[name].contents() if name in fields else None


def change_spec(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change a folder's tokenizer.json."""
    path = folder / "tokenizer.json"
    spec = json.loads(path.read_text())
    change(spec)
    path.write_text(json.dumps(spec))


def has_combining_mark(text: str) -> bool:
    return any(unicodedata.category(character).startswith("M") for character in text)


@pytest.mark.parametrize("family", BYTE_LEVEL)
def test_write_vocabulary_of_byte_level_families_agrees_in_every_script(family, tmp_path):
    folder = write_byte_level(tmp_path / "model", family)
    differing = differing_texts(folder)
    assert field(folder / "vocabulary.gguf", "pre") == BYTE_LEVEL[family].name
    if family == "mistral nemo":  # llama.cpp's tekken splits words at combining marks
        assert differing
        assert all(has_combining_mark(text) for text in differing)
    else:
        assert differing == []


@pytest.mark.parametrize("family", SENTENCEPIECE)
def test_write_vocabulary_of_sentencepiece_families_agrees_in_every_script(family, tmp_path):
    folder = write_sentencepiece(tmp_path / "model", family)
    differing = differing_texts(folder)
    path = folder / "vocabulary.gguf"
    assert field(path, "model") == "llama"
    assert field(path, "add_space_prefix") == (family != "gemma")
    if family == "mistral v0.3":  # only the first text is prefixed, and none that begins so
        added = Tokenizer(folder).fast.get_added_tokens_decoder().values()
        special = [token.content for token in added]
        assert differing
        for text in differing:
            assert text.startswith(" ") or any(token in text for token in special)
    else:
        assert differing == []


@pytest.mark.parametrize(
    ("family", "wrong"),
    [
        ("llama 3", "gpt-2"),
        ("llama 3", "qwen2"),
        ("gpt2", "smollm"),
        ("smollm and starcoder2", "gpt-2"),
        ("gpt-4o", "gpt-4o"),
        ("deepseek-llm", "gpt-2"),
        ("deepseek-coder", "gpt-2"),
        ("falcon", "gpt-2"),
        ("qwen3.5", "qwen2"),
    ],
)
def test_compare_tokenizers_notices_the_wrong_pre_tokenizer(family, wrong, tmp_path):
    assert differing_texts(write_byte_level(tmp_path / "model", family), pre=wrong)


@pytest.mark.parametrize("family", ["llama 2", "gemma"])
def test_compare_tokenizers_notices_a_wrong_space_prefix(family, tmp_path):
    folder = write_sentencepiece(tmp_path / "model", family)
    assert differing_texts(folder, add_space_prefix=family == "gemma")


def test_write_vocabulary_pads_rows_beyond_the_vocabulary(tmp_path):
    folder = write_byte_level(tmp_path / "model", "llama 3")
    size = Tokenizer(folder).fast.get_vocab_size()
    path = vocabulary_file(folder, padding=5)
    assert field(path, "tokens")[size:] == [f"[PAD{size + number}]" for number in range(5)]
    assert field(path, "token_type")[size:] == [TokenType.UNUSED] * 5
    text = f"[PAD{size}]"
    assert tokenizer_of(path).encode(text) == Tokenizer(folder).encode(text)


def test_write_vocabulary_gives_tokens_their_types(tmp_path):
    folder = write_sentencepiece(tmp_path / "model", "gemma")
    path = vocabulary_file(folder)
    types = dict(zip(field(path, "tokens"), field(path, "token_type"), strict=True))
    expected = {
        "<unk>": TokenType.UNKNOWN,
        "<s>": TokenType.CONTROL,
        "<0x00>": TokenType.BYTE,
        "<0xFF>": TokenType.BYTE,
        "  ": TokenType.USER_DEFINED,
        "<b>": TokenType.USER_DEFINED,
        "▁the": TokenType.NORMAL,
    }
    assert {token: types[token] for token in expected} == expected


def test_write_vocabulary_says_which_tokens_are_special_and_surround_a_text(tmp_path):
    path = vocabulary_file(write_sentencepiece(tmp_path / "spm", "llama 2"))
    assert [field(path, f"{key}_token_id") for key in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert (field(path, "add_bos_token"), field(path, "add_eos_token")) == (True, False)
    path = vocabulary_file(write_byte_level(tmp_path / "bpe", "gpt2"))
    assert (field(path, "add_bos_token"), field(path, "add_eos_token")) == (False, False)
    folder = write_sentencepiece(tmp_path / "both", "llama 2")

    def add_end_token(spec: dict[str, Any]) -> None:
        processor = spec["post_processor"]
        processor["single"].append({"SpecialToken": {"id": "</s>", "type_id": 0}})
        processor["special_tokens"]["</s>"] = {"id": "</s>", "ids": [2], "tokens": ["</s>"]}

    change_spec(folder, add_end_token)
    assert field(vocabulary_file(folder), "add_eos_token") is True


def test_name_in_file_says_phi_3_only_where_tokens_strip_what_follows(tmp_path):
    phi = Tokenizer(write_sentencepiece(tmp_path / "phi", "phi-3"))
    assert name_in_file(phi, "Mine") == "Mine (phi-3)"
    assert name_in_file(phi, "Phi-3 Mini") == "Phi-3 Mini"
    llama = Tokenizer(write_sentencepiece(tmp_path / "llama", "llama 2"))
    assert name_in_file(llama, "phi3-like") == "Phi 3-like"


def make_token_unreachable(spec: dict[str, Any]) -> None:
    """Take away the merge of the last token, in a tokenizer that does not ignore merges."""
    merges = spec["model"]["merges"][:-1]
    spec["model"].update(ignore_merges=False, merges=merges)


def first_step(spec: dict[str, Any]) -> dict[str, Any]:
    return spec["pre_tokenizer"]["pretokenizers"][0]


def normalize_twice(spec: dict[str, Any]) -> None:
    steps = [{"type": "NFKC"}, spec["normalizer"]]
    spec["normalizer"] = {"type": "Sequence", "normalizers": steps}


# What is wrong → the family, the change, and words of the error.
REFUSED = {
    "another model": (
        "gpt2",
        lambda spec: spec["model"].update(type="Unigram"),
        "a Unigram model",
    ),
    "lower case": (
        "gpt2",
        lambda spec: spec.update(normalizer={"type": "Lowercase"}),
        "Lowercase",
    ),
    "a prefix": (
        "gpt2",
        lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True),
        "add_prefix_space",
    ),
    "another regex": (
        "qwen2",
        lambda spec: first_step(spec)["pattern"].update(Regex=r"\w+"),
        r"\\w\+",
    ),
    "removed text": (
        "deepseek-v3",
        lambda spec: first_step(spec).update(behavior="Removed", invert=True),
        "Removed",
    ),
    "merges with spaces": (
        "gpt2",
        lambda spec: spec["model"]["merges"].append(["a b", "c"]),
        "pieces with spaces",
    ),
    "unreachable tokens": ("mistral nemo", make_token_unreachable, "which no merges make"),
    "no tokens": (
        "gpt2",
        lambda spec: spec["model"]["vocab"].update({"": 10}),
        "differ and are not empty",
    ),
    "lacking bytes": (
        "llama 2",
        lambda spec: spec["model"]["vocab"].pop("<0x41>"),
        "byte_fallback without the token <0x41>",
    ),
    "normalized text": ("llama 2", normalize_twice, "NFKC"),
    "ids beyond the rows": (
        "gpt2",
        lambda spec: spec["model"]["vocab"].update({"xyzzy": 9999}),
        "beyond the embedding's",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_write_vocabulary_refuses_what_llama_cpp_has_no_equal_of(name, tmp_path):
    family, change, words = REFUSED[name]
    write = write_byte_level if family in BYTE_LEVEL else write_sentencepiece
    folder = write(tmp_path / "model", family)
    source = Tokenizer(folder)
    change_spec(folder, change)
    source.spec = json.loads((folder / "tokenizer.json").read_text())  # few of them can be loaded
    with pytest.raises(StageError, match=words) as caught:
        write_vocabulary(gguf.GGUFWriter(None, "llama"), source, source.fast.get_vocab_size())
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def test_write_vocabulary_chooses_by_tokens_that_no_merges_make(tmp_path):
    folder = write_byte_level(tmp_path / "model", "dbrx")
    # Words that are tokens are taken as they are, which changes nothing here.
    assert field(vocabulary_file(folder), "pre") == "llama-bpe"
    change_spec(folder, make_token_unreachable)
    assert differing_texts(folder) == []
    assert field(folder / "vocabulary.gguf", "pre") == "dbrx"


def test_write_vocabulary_refuses_equal_tokens_and_does_not_stop_the_process(tmp_path):
    folder = write_sentencepiece(tmp_path / "model", "gemma")
    tokenizer = FastTokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("   ", normalized=False)])  # as the file writes ▁▁▁
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(StageError, match="found '   ' 2 times") as caught:
        vocabulary_file(folder)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def test_compare_tokenizers_sees_text_that_is_not_nfc(tmp_path):
    """llama.cpp does not normalize, so what the tokenizer would compose stays as it is."""
    folder = write_byte_level(tmp_path / "model", "qwen2")
    source = Tokenizer(folder)
    engine = tokenizer_of(vocabulary_file(folder))
    composed = "naïve café"
    decomposed = unicodedata.normalize("NFD", composed)
    assert isinstance(source.fast.normalizer, normalizers.NFC)
    assert compare_tokenizers(engine, source, (composed, decomposed)) == ([decomposed], 2)
