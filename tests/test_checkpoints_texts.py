"""Documents, their parts, the check that texts share none, and token ids."""

import json
from itertools import pairwise

import numpy as np
import pytest

from quantline.text import documents as texts
from quantline.text.tokenizer import Tokenizer
from quantline.config.params import Text
from quantline.errors import Failure, StageError


def text(path, **changes):
    return Text(**{"source": "file", "path": str(path), "sequences": 4, "length": 16, "watch": str(path)} | changes)


def test_plain_text_is_parted_by_blank_lines(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\nstill one\r\n\r\ntwo\n\n\n\nthree\n")
    assert texts.documents(text(tmp_path / "a.txt")) == ["one\nstill one", "two", "three"]


def test_parts_cover_the_documents_without_overlap(tmp_path):
    wanted = [f"document {index}" for index in range(17)]
    (tmp_path / "a.txt").write_text("\n\n".join(wanted))
    cuts = [0, 0.1, 0.5, 0.73, 1]
    parts = [texts.documents(text(tmp_path / "a.txt", part=(start, end)))
             for start, end in pairwise(cuts)]
    assert [one for part in parts for one in part] == wanted


def test_jsonl_holds_text_or_messages(tmp_path):
    chat = [{"role": "user", "content": "who?"}, {"role": "assistant", "content": "ada\u2028hugo"}]
    lines = [{"text": "plain"}, {"messages": chat}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    found = texts.documents(text(tmp_path / "a.jsonl"))
    assert found == ["plain", chat]
    assert texts.sha256_documents(found) != texts.sha256_documents(found[:1])


@pytest.mark.parametrize("line", ["{", "{}", '{"text": 3}', '{"messages": []}', '{"messages": [{"role": "user"}]}', "",
                                  '{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "[]"])
def test_a_bad_line_is_named_by_its_number(line, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "good"}\n' + line + '\n{"text": "good"}\n')
    with pytest.raises(StageError, match="line 2") as error:
        texts.documents(text(tmp_path / "a.jsonl"))
    assert error.value.failure == Failure.DATASET_INVALID


@pytest.mark.parametrize("content", [None, b"", b"\n\n", b"\xff\xfe\xfa"])
def test_a_text_that_is_none_is_refused(content, tmp_path):
    if content is not None:
        (tmp_path / "a.txt").write_bytes(content)
    with pytest.raises(StageError) as error:
        texts.documents(text(tmp_path / "a.txt"))
    assert error.value.failure == Failure.DATASET_INVALID


LONG = "a paragraph that is long enough to be no accident, " * 3


@pytest.mark.parametrize(("ours", "theirs", "prompt", "words"), [
    ([LONG, "x"], ["y", LONG], "is this prompt anywhere?", "share no document"),
    (["so it asks: is this prompt anywhere? Yes."], ["y"], "is this prompt anywhere?", "calibration text"),
    (["x"], ["so it asks: is this prompt anywhere? Yes."], "is this prompt anywhere?", "evaluation text"),
    ([[{"role": "user", "content": LONG}]], [LONG], "is this prompt anywhere?", "share no document"),
])
def test_overlap_is_refused(ours, theirs, prompt, words):
    with pytest.raises(StageError, match=words) as error:
        texts.check_disjoint(ours, theirs, {"g-1": prompt})
    assert error.value.failure == Failure.TEXTS_OVERLAP


def test_short_coincidences_are_no_overlap():
    texts.check_disjoint(["Yes.", LONG], ["Yes.", LONG + "!"], {"g-1": "Yes."})


def test_encoding_is_that_of_transformers(tiny_model):
    from transformers import AutoTokenizer

    ours, theirs = Tokenizer(tiny_model), AutoTokenizer.from_pretrained(tiny_model)
    for sample in ("ada met hugo 127", " é漢\u2028\x00\n\n<|im_end|> x", ""):
        ids = ours.encode(sample)
        assert ids == theirs(sample, add_special_tokens=False).input_ids
        assert ours.decode(ids) == sample
    chat = [{"role": "user", "content": "who?"}]
    wanted = theirs.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    assert ours.render(chat, generation_prompt=True) == wanted
    assert ours.prompt("", chat) == theirs(wanted, add_special_tokens=False).input_ids
    assert ours.prompt("who?") == ours.encode("who?") and ours.bos is None


@pytest.fixture
def with_bos(tiny_model, tmp_path):
    """The tiny tokenizer, told to begin every text with <|endoftext|>, without a chat template."""
    about = json.loads((tiny_model / "tokenizer.json").read_text())
    about["post_processor"] = {"type": "TemplateProcessing", "single": [{"SpecialToken": {
        "id": "<|endoftext|>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}], "pair": [
            {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(about))
    (tmp_path / "tokenizer_config.json").write_text((tiny_model / "tokenizer_config.json").read_text())
    return Tokenizer(tmp_path)


def test_packing_cuts_one_stream_into_full_sequences(tiny_model, with_bos):
    plain = Tokenizer(tiny_model)
    documents = ["ada met hugo", "the river", "a letter"]
    stream = [token for one in documents for token in [*plain.encode(one), 0]]
    packed = plain.pack(documents, 100, 5)
    assert packed.dtype == np.int32 and packed.shape == (len(stream) // 5, 5)
    assert packed.reshape(-1).tolist() == stream[:packed.size]
    assert np.array_equal(plain.pack(documents, 1, 5), packed[:1])

    begun = with_bos.pack(documents, 100, 5)
    assert begun.shape[1] == 5 and (begun[:, 0] == 0).all() and begun[:, 1:].reshape(-1).tolist() == stream[:begun[:, 1:].size]
    assert with_bos.prompt("ada") == [0, *plain.encode("ada")]


def test_text_that_fills_no_sequence_is_refused(tiny_model):
    with pytest.raises(StageError, match="found 2") as error:
        Tokenizer(tiny_model).pack(["ada"], 4, 16)
    assert error.value.failure == Failure.CALIBRATION_EMPTY


def test_chat_without_a_template_is_refused(with_bos):
    with pytest.raises(StageError, match="no chat template"):
        with_bos.render([{"role": "user", "content": "who?"}])


@pytest.mark.parametrize("template", ["{{ raise_exception('roles must alternate') }}", "{{ ''.__class__.__mro__ }}",
                                      "{% for"])
def test_a_template_that_refuses_or_reaches_out_is_a_plain_error(template, with_bos):
    (with_bos.folder / "chat_template.jinja").write_text(template)
    with pytest.raises(StageError, match="chat template") as error:
        with_bos.render([{"role": "user", "content": "who?"}])
    assert error.value.failure == Failure.DATASET_INVALID


def hub_text(monkeypatch, rows: dict, **changes):
    """The documents of a Hub dataset with these rows, and what the library was asked for."""
    import datasets

    asked = []

    def load(*names, **how):
        asked.append((names, how))
        return datasets.Dataset.from_dict(rows)

    monkeypatch.setattr(datasets, "load_dataset", load)
    about = Text(source="hub", dataset="owner/stories", dataset_config="plain", split="test", dataset_revision="c0ffee",
                 sequences=4, length=16, watch="conf", **changes)
    return texts.documents(about), asked


def test_a_hub_dataset_is_asked_for_at_its_commit_and_gives_its_column(monkeypatch):
    found, asked = hub_text(monkeypatch, {"story": ["one", "", "  ", "two"], "other": [1, 2, 3, 4]}, column="story")
    assert found == ["one", "two"]
    assert asked == [(("owner/stories", "plain"), {"split": "test", "revision": "c0ffee"})]


def test_chats_of_a_hub_dataset_go_before_its_text(monkeypatch):
    chat = [{"role": "user", "content": "who?"}]
    assert hub_text(monkeypatch, {"messages": [chat], "text": ["plain"]})[0] == [chat]


def test_a_column_that_a_hub_dataset_has_not(monkeypatch):
    with pytest.raises(StageError, match="has the columns story, not 'text'; set column") as error:
        hub_text(monkeypatch, {"story": ["one"]})
    assert error.value.failure == Failure.DATASET_INVALID


def test_a_hub_that_does_not_answer(monkeypatch):
    import datasets

    def load(*names, **how):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(StageError, match="no route") as error:
        texts.documents(Text(source="hub", dataset="owner/stories", split="test", sequences=4, length=16, watch="conf"))
    assert error.value.failure == Failure.NETWORK_UNAVAILABLE
