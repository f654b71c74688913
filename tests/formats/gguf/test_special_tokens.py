"""Special tokens, ends and chat templates in GGUF: llama.cpp takes them as transformers does."""

from pathlib import Path
from typing import Any

import pytest
from gguf import GGUFReader

from quantline.errors import Failure, StageError
from quantline.formats.bundle.tokenizer_metadata import metadata_of_tokenizer
from quantline.formats.gguf.special_tokens import metadata_of_fields, token_keys
from quantline.text.tokenizer import Tokenizer
from tests.formats.gguf.test_vocabulary import tokenizer_of, vocabulary_file
from tests.helpers.checkpoint_files import begin_with, write_files
from tests.helpers.models import CHAT_TEMPLATE

END = "<|im_end|>"


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


# What ends a text → the files.
ENDS: dict[str, dict[str, Any]] = {
    "one": {},
    "two": {"generation_config": {"eos_token_id": [40, 0]}},
    "three": {"generation_config": {"eos_token_id": [0, 40, 41]}},
    "four, of which llama.cpp knows one": {"generation_config": {"eos_token_id": [2, 40, 41]}},
    "the generation's alone": {
        "tokenizer_config": {"eos_token": None}, "generation_config": {"eos_token_id": [40, 41]},
    },
    "one named in the map": {
        "tokenizer_config": {"eos_token": None},
        "special_tokens_map": {"eos_token": "<|im_start|>"},
    },
    "one beyond the vocabulary": {"generation_config": {"eos_token_id": [40, 9999]}},
}  # fmt: skip


@pytest.mark.parametrize("name", ENDS)
def test_llama_cpp_stops_where_the_model_stops(name, tmp_path):
    folder = write_files(tmp_path / "m", **ENDS[name])
    source = Tokenizer(folder)
    engine = tokenizer_of(vocabulary_file(folder))
    expected = [transformers_tokenizer(folder).eos_token_id]
    expected += ENDS[name].get("generation_config", {}).get("eos_token_id", [])
    reachable = {end for end in expected if end is not None and end < 400}
    assert set(source.end_tokens) == reachable
    assert reachable
    for end in reachable:
        assert engine.stops_at(end), end
    assert not engine.stops_at(100)


def test_ends_that_a_file_has_no_room_for_are_refused(tmp_path):
    ends = {"generation_config": {"eos_token_id": [40, 41, 42]}}
    source = Tokenizer(write_files(tmp_path / "m", **ends))
    with pytest.raises(StageError, match="at most 3 tokens that end a text") as caught:
        token_keys(source)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def test_a_model_without_an_end_is_refused(tmp_path):
    """llama.cpp would take the end token of another model."""
    source = Tokenizer(write_files(tmp_path / "m", tokenizer_config={"eos_token": None}))
    with pytest.raises(StageError, match="a token that ends a text"):
        token_keys(source)


@pytest.mark.parametrize(
    ("tokens", "end"), [((), None), (("<|endoftext|>",), None), (("<|endoftext|>",), END)]
)
def test_llama_cpp_begins_and_ends_texts_as_transformers_does(tokens, end, tmp_path):
    folder = write_files(tmp_path / "m", tokenizer_config={"eos_token": END})
    begin_with(folder, *tokens, end=end)
    engine = tokenizer_of(vocabulary_file(folder))
    expected = transformers_tokenizer(folder)
    for text in ("ada met hugo", " the", "<|im_start|>user\n"):
        assert engine.encode_whole(text) == expected(text).input_ids
        assert engine.encode(text) == expected(text, add_special_tokens=False).input_ids


def test_a_text_may_begin_with_another_token_where_there_is_no_begin_token(tmp_path):
    folder = write_files(tmp_path / "m", tokenizer_config={"bos_token": None})
    begin_with(folder, "<|im_start|>")
    engine = tokenizer_of(vocabulary_file(folder))
    assert engine.encode_whole("ada") == transformers_tokenizer(folder)("ada").input_ids


@pytest.mark.parametrize(("tokens", "end"), [(("<|im_start|>", "<|endoftext|>"), None), ((), END)])
def test_what_llama_cpp_cannot_put_around_a_text_is_refused(tokens, end, tmp_path):
    folder = begin_with(write_files(tmp_path / "m"), *tokens, end=end)
    with pytest.raises(StageError, match="token alone") as caught:
        vocabulary_file(folder)
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH


def metadata(folder: Path) -> dict[str, Any]:
    return metadata_of_fields(GGUFReader(vocabulary_file(folder)).fields)


def test_named_templates_are_kept_as_ggufs_own_writer_keeps_them(tmp_path):
    import gguf

    listed = [
        {"name": "default", "template": CHAT_TEMPLATE},
        {"name": "tool-use", "template": "tools"},
        {"name": "rag", "template": "rag"},
    ]
    files = {"tokenizer_config": {"chat_template": listed}, "chat_template": None}
    folder = write_files(tmp_path / "m", **files)
    found = metadata(folder)
    assert found["chat_template"] == CHAT_TEMPLATE
    assert found["named_templates"] == {"tool_use": "tools", "rag": "rag"}
    writer = gguf.GGUFWriter(None, "llama")
    writer.add_chat_template(listed)
    fields = GGUFReader(folder / "vocabulary.gguf").fields
    for key, value in writer.kv_data[0].items():
        if key.startswith("tokenizer."):
            written = fields[key].contents()
            assert written == (sorted(value.value) if key.endswith("s") else value.value)
    expected = metadata_of_tokenizer(Tokenizer(folder))
    assert {key: expected[key] for key in found} == found


def test_templates_whose_names_become_one_are_refused(tmp_path):
    templates = {"default": "x", "tool-use": "a", "tool_use": "b"}
    files = {"tokenizer_config": {"chat_template": templates}, "chat_template": None}
    with pytest.raises(StageError, match="names of chat templates") as caught:
        vocabulary_file(write_files(tmp_path / "m", **files))
    assert caught.value.failure == Failure.TOKENIZER_MISMATCH
