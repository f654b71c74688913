"""Token ids, chat templates and packed sequences, as transformers makes them."""

import json
from pathlib import Path

import numpy as np
import pytest

from quantline.errors import Failure, StageError
from quantline.text.tokenizer import Tokenizer
from tests.helpers.tensor_files import edit_json

CHAT = [{"role": "user", "content": "who?"}]
BEGIN = "<|endoftext|>"
ADDED_TOKEN = {"__type": "AddedToken", "content": "<|im_end|>", "special": True}
# Puts BEGIN in front of every text.
POST_PROCESSOR = {
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": BEGIN, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
    ],
    "pair": [
        {"Sequence": {"id": "A", "type_id": 0}},
        {"Sequence": {"id": "B", "type_id": 1}},
    ],
    "special_tokens": {BEGIN: {"id": BEGIN, "ids": [0], "tokens": [BEGIN]}},
}


@pytest.fixture
def with_begin_token(tiny_model, tmp_path) -> Tokenizer:
    """The tiny tokenizer, which begins every text with <|endoftext|>, without a chat template."""
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_text((tiny_model / name).read_text())
    edit_json(tmp_path / "tokenizer.json", post_processor=POST_PROCESSOR)
    return Tokenizer(tmp_path)


def test_encode_gives_the_ids_of_transformers(tiny_model):
    from transformers import AutoTokenizer

    ours = Tokenizer(tiny_model)
    theirs = AutoTokenizer.from_pretrained(tiny_model)
    for text in ("ada met hugo 127", " é漢\u2028\x00\n\n<|im_end|> x", ""):
        ids = ours.encode(text)
        assert ids == theirs(text, add_special_tokens=False).input_ids
        assert ours.decode(ids) == text
    rendered = theirs.apply_chat_template(CHAT, add_generation_prompt=True, tokenize=False)
    assert ours.render(CHAT, generation_prompt=True) == rendered
    assert ours.prompt("", CHAT) == theirs(rendered, add_special_tokens=False).input_ids
    assert ours.prompt("who?") == ours.encode("who?")
    assert ours.bos is None


def test_pack_cuts_one_stream_into_full_sequences(tiny_model, with_begin_token):
    plain = Tokenizer(tiny_model)
    documents = ["ada met hugo", "the river", "a letter"]
    stream = []
    for document in documents:
        stream += [*plain.encode(document), 0]
    packed = plain.pack(documents, 100, 5)
    assert packed.dtype == np.int32
    assert packed.shape == (len(stream) // 5, 5)
    assert packed.reshape(-1).tolist() == stream[: packed.size]
    assert np.array_equal(plain.pack(documents, 1, 5), packed[:1])

    begun = with_begin_token.pack(documents, 100, 5)
    rest = begun[:, 1:].reshape(-1)
    assert begun.shape[1] == 5
    assert (begun[:, 0] == 0).all()
    assert rest.tolist() == stream[: rest.size]
    assert with_begin_token.prompt("ada") == [0, *plain.encode("ada")]


def test_pack_gives_the_tokenizer_no_more_than_a_piece_of_a_giant_document(tiny_model, monkeypatch):
    monkeypatch.setattr("quantline.text.tokenizer.LONGEST", 60)
    tokenizer = Tokenizer(tiny_model)
    encoded = []
    encode = tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda text: encoded.append(text) or encode(text))
    giant = "ada met hugo by the river. " * 1000
    packed = tokenizer.pack([[{"role": "user", "content": giant}]], 2, 16)
    assert packed.shape == (2, 16)
    assert max(map(len, encoded)) <= 60
    assert len(encoded) < 10  # enough tokens end it


def test_pack_refuses_text_that_fills_no_sequence(tiny_model):
    with pytest.raises(StageError, match="found 2") as error:
        Tokenizer(tiny_model).pack(["ada"], 4, 16)
    assert error.value.failure == Failure.CALIBRATION_EMPTY


def test_render_refuses_chat_without_a_template(with_begin_token):
    with pytest.raises(StageError, match="no chat template"):
        with_begin_token.render(CHAT)


@pytest.mark.parametrize(
    "template",
    ["{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}", "{% for"],
)
def test_render_names_a_template_that_refuses_or_reaches_out(template, with_begin_token):
    (with_begin_token.folder / "chat_template.jinja").write_text(template)
    with pytest.raises(StageError, match="chat template") as error:
        with_begin_token.render(CHAT)
    assert error.value.failure == Failure.DATASET_INVALID


def test_special_reads_a_token_by_its_text_or_its_description(with_begin_token):
    assert with_begin_token.special("eos_token") == 0
    path = with_begin_token.folder / "tokenizer_config.json"
    edit_json(path, eos_token=ADDED_TOKEN, pad_token=None)
    tokenizer = Tokenizer(with_begin_token.folder)
    assert tokenizer.special("eos_token") == tokenizer.encode("<|im_end|>")[0]
    assert tokenizer.special("pad_token") is None
    assert tokenizer.special("cls_token") is None


@pytest.mark.parametrize(("configured", "expected"), [(None, [0]), (2, [0, 2]), ([2, 0], [0, 2])])
def test_end_tokens_are_the_tokenizers_and_then_the_generations(
    with_begin_token, configured, expected
):
    path = with_begin_token.folder / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": configured}))
    assert Tokenizer(with_begin_token.folder).end_tokens == expected


@pytest.mark.parametrize("content", [None, "{", "{}"])
def test_tokenizer_refuses_a_folder_without_a_usable_one(tmp_path: Path, content):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(StageError, match=r"tokenizer\.json") as error:
        Tokenizer(tmp_path)
    assert error.value.failure == Failure.MISSING_TOKENIZER
