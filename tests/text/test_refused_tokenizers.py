"""Every tokenizer that transformers cannot take is refused, with the file and the key."""

import json
from typing import Any

import pytest

from quantline.errors import StageError
from quantline.text.tokenizer import Tokenizer
from tests.helpers.checkpoint_files import brought, tokenizer_config, write_files
from tests.helpers.tensor_files import edit_json

END = "<|im_end|>"

# What is wrong → the files, and words of the error.
REFUSED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {
    "a number for a token": (
        tokenizer_config(eos_token=5), ("tokenizer_config.json", "eos_token", "found 5")
    ),
    "a list for a token": (
        tokenizer_config(pad_token=["<x>"]), ("tokenizer_config.json", "pad_token")
    ),
    "a description without its type": (
        tokenizer_config(bos_token={"content": END}), ("tokenizer_config.json", "bos_token")
    ),
    "a number in the map": (
        {"special_tokens_map": {"unk_token": 3}}, ("special_tokens_map.json", "unk_token")
    ),
    "a token beyond the rows": (
        {"tokenizer_config": {"pad_token": "[PAD]"}, "config": {"vocab_size": 384}},
        ("tokenizer_config.json", "pad_token", "'[PAD]'", "384 rows"),
    ),
    "a text for an end's id": (
        {"generation_config": {"eos_token_id": "</s>"}},
        ("generation_config.json", "eos_token_id", "'</s>'"),
    ),
    "a text among ends' ids": (
        {"generation_config": {"eos_token_id": [2, "</s>"]}},
        ("generation_config.json", "eos_token_id"),
    ),
    "true for an end's id": (
        {"generation_config": {"eos_token_id": True}}, ("generation_config.json", "eos_token_id")
    ),
    "settings that transformers refuses": (
        {"generation_config": {"cache_implementation": "x", "max_new_tokens": -3}},
        ("generation_config.json",),
    ),
    "a number for the class": (
        tokenizer_config(tokenizer_class=5),
        ("transformers", "tokenizer_class 5 in tokenizer_config.json"),
    ),
    "a class without its tokens": (
        tokenizer_config(tokenizer_class="GemmaTokenizer"), ("transformers", "<unk>")
    ),
    "a number for a template": (
        {"tokenizer_config": {"chat_template": 5}, "chat_template": None}, ("chat_template",)
    ),
    "half a character in a template": (
        {"tokenizer_config": {"chat_template": "a \ud83d"}, "chat_template": None},
        ("tokenizer_config.json", "chat_template", "whole characters"),
    ),
    "special tokens that are written out": (
        tokenizer_config(split_special_tokens=True),
        ("tokenizer_config.json", "split_special_tokens"),
    ),
    "half a character in a token": (
        tokenizer_config(eos_token="a \ud83d"), ("surrogates",)
    ),
    "a list without names": (
        {"tokenizer_config": {"chat_template": [{"template": "x"}]}, "chat_template": None},
        ("tokenizer_config.json",),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_transformers_cannot_take_is_refused_with_file_and_key(name, tmp_path):
    files, words = REFUSED[name]
    source = write_files(tmp_path / "source", **files)
    for refuse in (Tokenizer, lambda folder: brought(folder, tmp_path / "loaded")):
        with pytest.raises(StageError) as caught:
            refuse(source)
        assert caught.value.failure in ("tokenizer_mismatch", "missing_tokenizer")
        for word in words:
            assert word in str(caught.value)


def test_ids_by_chance_are_refused(tmp_path):
    source = write_files(tmp_path / "source")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    edit_json(source / "tokenizer.json", model=model | {"dropout": 0.25})
    with pytest.raises(StageError, match=r"model\.dropout in .*tokenizer\.json, found 0\.25"):
        Tokenizer(source)


@pytest.mark.parametrize(
    "name",
    ["tokenizer_config", "special_tokens_map", "added_tokens", "generation_config", "tokenizer"],
)
@pytest.mark.parametrize("content", [b"[1]", b"{", b"null", b'"x"', b"\x00\xff", b"[" * 99_999])
def test_files_that_are_no_json_objects_are_named(name, content, tmp_path):
    source = write_files(tmp_path / "source")
    (source / f"{name}.json").write_bytes(content)
    with pytest.raises(StageError, match=rf"{name}\.json"):
        Tokenizer(source)


def test_a_template_that_is_not_utf_8_is_named(tmp_path):
    source = write_files(tmp_path / "source")
    (source / "chat_template.jinja").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(StageError, match=r"chat_template\.jinja"):
        Tokenizer(source)
