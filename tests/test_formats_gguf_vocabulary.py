"""Tokenizers in GGUF: llama.cpp gives the source's ids on real text for every family, or the tokenizer is refused."""

import ctypes
import json
import unicodedata
from pathlib import Path

import gguf
import pytest
import tokenizers_like as like
from gguf import GGUFReader, TokenType
from tokenizers import AddedToken, normalizers
from tokenizers import Tokenizer as Fast

from quantline.text.tokenizer import Tokenizer
from quantline.formats.gguf.vocabulary import add_vocabulary, name_of
from quantline.runtimes.tokenizer_parity import TEXTS, mismatches, texts_of
from quantline.errors import Failure, StageError


def vocabulary_file(folder: Path, more: int = 0, **changes) -> Path:
    """A GGUF file with nothing but the vocabulary of a folder; `changes`: key → value that takes the place of ours."""
    source, path = Tokenizer(folder), folder / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(name_of(source, "r"))
    for setting in (writer.add_block_count, writer.add_context_length, writer.add_embedding_length,
                    writer.add_feed_forward_length, writer.add_head_count, writer.add_layer_norm_rms_eps):
        setting(1)
    add_vocabulary(writer, source, source.fast.get_vocab_size() + more)
    for key, value in changes.items():
        writer.kv_data[0][f"tokenizer.ggml.{key}"].value = value
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def engine(path: Path):
    """llama.cpp's tokenizer of a file, without a model."""
    import llama_cpp as llama

    from quantline.runtimes import llama_cpp as runtime

    made = runtime.Engine.__new__(runtime.Engine)
    llama.llama_log_set(runtime._quiet, ctypes.c_void_p())
    settings = llama.llama_model_default_params()
    settings.vocab_only = True
    made.model = llama.llama_model_load_from_file(str(path).encode(), settings)
    assert made.model, "llama.cpp cannot load the vocabulary"
    made.vocabulary = llama.llama_model_get_vocab(made.model)
    return made


def differing(folder: Path, **changes) -> list[str]:
    source = Tokenizer(folder)
    wrong, compared = mismatches(engine(vocabulary_file(folder, **changes)), source, (*TEXTS, *like.CORPUS, *texts_of(source)))
    assert compared > 20
    return wrong


def field(path: Path, key: str):
    fields = GGUFReader(path).fields
    return fields[f"tokenizer.ggml.{key}"].contents() if f"tokenizer.ggml.{key}" in fields else None


@pytest.mark.parametrize("family", like.BYTE_LEVEL)
def test_byte_level_families_agree_in_every_script(family, tmp_path):
    folder = like.write_byte_level(tmp_path / "model", family)
    wrong = differing(folder)
    assert field(folder / "vocabulary.gguf", "pre") == like.BYTE_LEVEL[family][0]
    if family == "mistral nemo":  # llama.cpp's tekken splits words at combining marks
        assert wrong and all(any(unicodedata.category(one).startswith("M") for one in text) for text in wrong)
    else:
        assert wrong == []


@pytest.mark.parametrize("family", like.SENTENCEPIECE)
def test_sentencepiece_families_agree_in_every_script(family, tmp_path):
    folder = like.write_sentencepiece(tmp_path / "model", family)
    wrong = differing(folder)
    path = folder / "vocabulary.gguf"
    assert (field(path, "model"), field(path, "add_space_prefix")) == ("llama", family != "gemma")
    if family == "mistral v0.3":  # only the first text is prefixed, and none that begins with a space
        special = [token.content for token in Tokenizer(folder).fast.get_added_tokens_decoder().values()]
        assert wrong and all(text.startswith(" ") or any(one in text for one in special) for text in wrong)
    else:
        assert wrong == []


@pytest.mark.parametrize(("family", "wrong"), [
    ("llama 3", "gpt-2"), ("llama 3", "qwen2"), ("gpt2", "smollm"), ("smollm and starcoder2", "gpt-2"),
    ("gpt-4o", "gpt-4o"), ("deepseek-llm", "gpt-2"), ("deepseek-coder", "gpt-2"), ("falcon", "gpt-2"), ("qwen3.5", "qwen2")])
def test_the_wrong_pre_tokenizer_is_noticed(family, wrong, tmp_path):
    assert differing(like.write_byte_level(tmp_path / "model", family), pre=wrong)


@pytest.mark.parametrize("family", ["llama 2", "gemma"])
def test_a_wrong_space_prefix_is_noticed(family, tmp_path):
    assert differing(like.write_sentencepiece(tmp_path / "model", family), add_space_prefix=family == "gemma")


def test_rows_beyond_the_vocabulary_are_padding(tmp_path):
    folder = like.write_byte_level(tmp_path / "model", "llama 3")
    size, path = Tokenizer(folder).fast.get_vocab_size(), vocabulary_file(folder, more=5)
    assert field(path, "tokens")[size:] == [f"[PAD{index}]" for index in range(size, size + 5)]
    assert field(path, "token_type")[size:] == [TokenType.UNUSED] * 5
    assert engine(path).encode("[PAD703]") == Tokenizer(folder).encode("[PAD703]")


def test_tokens_have_their_kinds(tmp_path):
    folder = like.write_sentencepiece(tmp_path / "model", "gemma")
    path = vocabulary_file(folder)
    kinds = dict(zip(field(path, "tokens"), field(path, "token_type"), strict=True))
    assert [kinds[one] for one in ("<unk>", "<s>", "<0x00>", "<0xFF>", "  ", "<b>", "▁the")] == [
        TokenType.UNKNOWN, TokenType.CONTROL, TokenType.BYTE, TokenType.BYTE, TokenType.USER_DEFINED, TokenType.USER_DEFINED,
        TokenType.NORMAL]


def test_special_tokens_and_whether_they_surround_a_text(tmp_path):
    path = vocabulary_file(like.write_sentencepiece(tmp_path / "spm", "llama 2"))
    assert [field(path, f"{key}_token_id") for key in ("bos", "eos", "unknown")] == [1, 2, 0]
    assert (field(path, "add_bos_token"), field(path, "add_eos_token")) == (True, False)
    path = vocabulary_file(like.write_byte_level(tmp_path / "bpe", "gpt2"))
    assert (field(path, "add_bos_token"), field(path, "add_eos_token")) == (False, False)
    folder = like.write_sentencepiece(tmp_path / "both", "llama 2")
    change(folder, lambda spec: spec["post_processor"].update(
        single=[*spec["post_processor"]["single"], {"SpecialToken": {"id": "</s>", "type_id": 0}}],
        special_tokens=spec["post_processor"]["special_tokens"] | {"</s>": {"id": "</s>", "ids": [2], "tokens": ["</s>"]}}))
    assert field(vocabulary_file(folder), "add_eos_token") is True


def test_a_name_says_phi_3_only_where_tokens_strip_what_follows(tmp_path):
    assert name_of(Tokenizer(like.write_sentencepiece(tmp_path / "phi", "phi-3")), "q4") == "phi-3 q4"
    assert name_of(Tokenizer(like.write_sentencepiece(tmp_path / "llama", "llama 2")), "phi3-q4") == "phi 3-q4"


def change(folder: Path, how) -> None:
    spec = json.loads((folder / "tokenizer.json").read_text())
    how(spec)
    (folder / "tokenizer.json").write_text(json.dumps(spec))


def stuck(spec: dict) -> None:
    """A token that no merges make, in a tokenizer that does not take words whole, but whose only name in llama.cpp does."""
    spec["model"].update(ignore_merges=False, merges=spec["model"]["merges"][:-1])


REFUSED = {
    "another model": ("gpt2", lambda spec: spec["model"].update(type="Unigram"), "a Unigram model"),
    "lower case": ("gpt2", lambda spec: spec.update(normalizer={"type": "Lowercase"}), "Lowercase"),
    "a prefix": ("gpt2", lambda spec: spec["pre_tokenizer"].update(add_prefix_space=True), "add_prefix_space"),
    "another regex": ("qwen2", lambda spec: spec["pre_tokenizer"]["pretokenizers"][0]["pattern"].update(Regex=r"\w+"), r"\\w\+"),
    "removed text": ("deepseek-v3", lambda spec: spec["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed", invert=True),
                     "Removed"),
    "merges with spaces": ("gpt2", lambda spec: spec["model"]["merges"].append(["a b", "c"]), "pieces with spaces"),
    "unreachable tokens": ("mistral nemo", stuck, "which no merges make"),
    "no tokens": ("gpt2", lambda spec: spec["model"]["vocab"].update({"": 10}), "differ and are not empty"),
    "lacking bytes": ("llama 2", lambda spec: spec["model"]["vocab"].pop("<0x41>"), "byte_fallback without the token <0x41>"),
    "normalized text": ("llama 2", lambda spec: spec.update(normalizer={"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, spec["normalizer"]]}), "NFKC"),
    "ids beyond the rows": ("gpt2", lambda spec: spec["model"]["vocab"].update({"xyzzy": 9999}), "beyond the embedding's"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_llama_cpp_has_no_equal_of_is_refused(name, tmp_path):
    family, how, words = REFUSED[name]
    write = like.write_byte_level if family in like.BYTE_LEVEL else like.write_sentencepiece
    folder = write(tmp_path / "model", family)
    source = Tokenizer(folder)
    change(folder, how)
    with pytest.raises(StageError, match=words) as caught:
        add_vocabulary(gguf.GGUFWriter(None, "llama"), source, source.fast.get_vocab_size())
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def test_tokens_that_no_merges_make_decide_between_names(tmp_path):
    folder = like.write_byte_level(tmp_path / "model", "dbrx")
    assert field(vocabulary_file(folder), "pre") == "llama-bpe"  # words are taken whole, which changes nothing here
    change(folder, stuck)
    assert differing(folder) == [] and field(folder / "vocabulary.gguf", "pre") == "dbrx"


def test_two_tokens_with_one_text_are_refused_and_do_not_stop_the_process(tmp_path):
    folder = like.write_sentencepiece(tmp_path / "model", "gemma")
    tokenizer = Fast.from_file(str(folder / "tokenizer.json"))
    tokenizer.add_tokens([AddedToken("   ", normalized=False)])  # as the file writes ▁▁▁
    tokenizer.save(str(folder / "tokenizer.json"))
    with pytest.raises(StageError, match="found '   ' 2 times") as caught:
        vocabulary_file(folder)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def test_text_that_is_not_nfc_is_where_nfc_is_missed(tmp_path):
    """llama.cpp does not normalize: what the tokenizer would compose stays as it is, and the parity check can see it."""
    folder = like.write_byte_level(tmp_path / "model", "qwen2")
    source, runtime = Tokenizer(folder), engine(vocabulary_file(folder))
    decomposed = unicodedata.normalize("NFD", "naïve café")
    assert isinstance(source.fast.normalizer, normalizers.NFC)
    assert mismatches(runtime, source, ("naïve café", decomposed)) == ([decomposed], 2)
