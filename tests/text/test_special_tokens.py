"""Special tokens, ends and beginnings are those of transformers, from every source of them."""

import itertools
import json
from pathlib import Path
from typing import Any

import pytest

from quantline.errors import StageError
from quantline.text import transformers_tokenizer
from quantline.text.special_tokens import FILE, read_special_tokens
from quantline.text.tokenizer import Tokenizer
from tests.helpers.checkpoint_files import ROWS, begin_with, brought, tokenizer_config, write_files
from tests.helpers.tensor_files import edit_json
from tests.helpers.tokenizers import write_sentencepiece

NAMES = ("bos_token", "eos_token", "pad_token", "unk_token", "cls_token", "sep_token")
TEXT = "  ada met hugo 127,  naïve<|im_end|> the <|im_start|>user\n x"
END = "<|im_end|>"
BEGIN = "<|im_start|>"
CLASSES = (
    "PreTrainedTokenizerFast",
    "LlamaTokenizerFast",
    "LlamaTokenizer",
    "Qwen2Tokenizer",
    "GPT2Tokenizer",
    "TokenizersBackend",
)


def theirs(folder: Path) -> Any:
    """Return what transformers serves with."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)


def generation_ends(folder: Path) -> list[int]:
    """Return what transformers' generation stops at."""
    from transformers import GenerationConfig

    try:
        ends = GenerationConfig.from_pretrained(folder).eos_token_id
    except OSError:
        ends = GenerationConfig.from_pretrained(
            folder, config_file_name="config.json", _from_model_config=True
        ).eos_token_id
    listed = ends if isinstance(ends, list) else [ends]
    return [end for end in listed if end is not None]


def assert_transformers_answer(folder: Path, source: Path, rows: int = ROWS) -> Tokenizer:
    """Compare a folder's tokenizer with what transformers has for its source."""
    ours = Tokenizer(folder)
    expected = theirs(source)
    for name in NAMES:
        token = getattr(expected, f"{name}_id")
        assert ours.special(name) == (token if token is None or token < rows else None), name
    assert ours.specials.tokens == expected.special_tokens_map
    for text in (TEXT, "a", "ada"):
        assert ours.encode(text) == expected(text, add_special_tokens=False).input_ids
        whole = expected(text).input_ids
        assert ours.begin + ours.encode(text) + ours.specials.finish == whole
        assert ours.prompt(text) == whole[: len(whole) - len(ours.specials.finish)]
        assert ours.decode(whole) == expected.decode(whole)
    assert max(ours.fast.get_vocab().values()) < rows
    named = [expected.eos_token_id, *generation_ends(source)]
    reachable = dict.fromkeys(end for end in named if end is not None and 0 <= end < rows)
    assert ours.end_tokens == list(reachable)
    return ours


def assert_answer_of_load(source: Path, folder: Path, monkeypatch, rows: int = ROWS) -> Tokenizer:
    """Compare what load makes of a source, which later stages read without transformers."""
    copy, _ = brought(source, folder)
    with monkeypatch.context() as patch:
        patch.setattr(transformers_tokenizer, "ask", lambda folder: pytest.fail("asked again"))
        ours = assert_transformers_answer(copy, source, rows)
    assert theirs(copy)(TEXT).input_ids == theirs(source)(TEXT).input_ids
    return ours


def added(text: str, **flags: Any) -> dict[str, Any]:
    """Return a token as tokenizer_config.json describes one."""
    return {"__type": "AddedToken", "content": text, "special": True} | flags


# What is in the files → the files. Each line is a source that transformers knows.
SOURCES: dict[str, dict[str, Any]] = {
    "as it is": {},
    "a token described": tokenizer_config(eos_token=added(END, normalized=False)),
    "no begin token": tokenizer_config(bos_token=None),
    "an empty begin token": tokenizer_config(bos_token=""),
    "an empty end token": tokenizer_config(eos_token="", pad_token=""),
    "no end token": tokenizer_config(eos_token=None, pad_token=None),
    "in the map alone": {
        "tokenizer_config": {"bos_token": None, "eos_token": None},
        "special_tokens_map": {"eos_token": END, "bos_token": {"content": BEGIN}},
    },
    "in both, and the map counts": {
        "tokenizer_config": {"eos_token": BEGIN},
        "special_tokens_map": {"eos_token": {"content": END, "lstrip": False}},
    },
    "in both, and the decoder counts": {
        "tokenizer_config": {"eos_token": BEGIN, "added_tokens_decoder": {"1": added(BEGIN)}},
        "special_tokens_map": {"eos_token": END},
    },
    "by the class alone": tokenizer_config(
        tokenizer_class="GPT2Tokenizer", bos_token=None, eos_token=None, pad_token=None
    ),
    "a token that is new": tokenizer_config(pad_token="[PAD]"),
    "a new end": tokenizer_config(eos_token="</s>"),
    "one that the class adds beyond the rows": {
        "tokenizer_config": {"tokenizer_class": "GPTNeoXTokenizer"},
        "config": {"vocab_size": 384},
    },
    "more special tokens": tokenizer_config(additional_special_tokens=[BEGIN, "<tool>"]),
    "named more special tokens": tokenizer_config(extra_special_tokens={"image_token": END}),
    "a model's own token": tokenizer_config(image_token="<|im_start|>"),
    "added_tokens.json": {"added_tokens": {"<think>": 384}},
    "stripping tokens": tokenizer_config(
        added_tokens_decoder={"2": {"content": END, "lstrip": True, "rstrip": True}}
    ),
    "normalized tokens": tokenizer_config(
        added_tokens_decoder={"390": added("<x>", normalized=True)}
    ),
    "no tokenizer_config.json": {"tokenizer_config": None},
    "ends in generation_config.json": {"generation_config": {"eos_token_id": [2, 1]}},
    "one end in generation_config.json": {"generation_config": {"eos_token_id": 2}},
    "no end in generation_config.json": {
        "generation_config": {"do_sample": False},
        "config": {"eos_token_id": 2},
    },
    "an end beyond the vocabulary": {"generation_config": {"eos_token_id": [2, 99_999]}},
    "a negative end": {"generation_config": {"eos_token_id": [2, -1]}},
    "ends in config.json": {"config": {"eos_token_id": [1, 2]}},
    "ends in text_config": {
        "config": {
            "model_type": "gemma3",
            "text_config": {
                "eos_token_id": [1, 2], "vocab_size": ROWS, "model_type": "gemma3_text",
            },
        },
        "tokenizer_config": {"tokenizer_class": "TokenizersBackend"},
    },
    "ids in config.json beyond the rows": {
        "config": {"bos_token_id": 5000, "pad_token_id": 6000, "eos_token_id": 7000}
    },
    "cut and padded texts": {
        "tokenizer": {
            "truncation": {
                "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0,
            },
            "padding": {
                "strategy": {"Fixed": 12}, "direction": "Right", "pad_to_multiple_of": None,
                "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
            },
        }
    },
    "a class that builds it anew": tokenizer_config(tokenizer_class="Qwen2Tokenizer"),
    "a family that builds it anew": {"config": {"model_type": "qwen2"}},
    "a prefix of a space": tokenizer_config(tokenizer_class="GPT2Tokenizer", add_prefix_space=True),
    "an unknown class": tokenizer_config(tokenizer_class="FancyTokenizer"),
    "a cleaned-up text": tokenizer_config(clean_up_tokenization_spaces=True),
}  # fmt: skip


@pytest.mark.parametrize("name", SOURCES)
def test_every_source_of_special_tokens_is_taken_as_transformers_takes_it(
    name, tmp_path, monkeypatch
):
    source = write_files(tmp_path / "source", **SOURCES[name])
    rows = SOURCES[name].get("config", {}).get("vocab_size", ROWS)
    assert_transformers_answer(source, source, rows)
    assert_answer_of_load(source, tmp_path / "loaded", monkeypatch, rows)


@pytest.mark.parametrize("kind", CLASSES)
def test_a_text_begins_as_transformers_lets_it(kind, tmp_path, monkeypatch):
    """The begin token by the post-processor, against what tokenizer_config.json says of it."""
    begun = 0
    for adds, said in itertools.product((True, False), (True, False, None)):
        changes = {"tokenizer_class": kind, "bos_token": "<|endoftext|>", "eos_token": END}
        if said is not None:
            changes |= {"add_bos_token": said, "add_eos_token": said}
        folder = tmp_path / f"{adds}-{said}"
        source = write_files(folder / "source", tokenizer_config=changes)
        if adds:
            begin_with(source, "<|endoftext|>")
        ours = assert_answer_of_load(source, folder / "loaded", monkeypatch)
        assert ours.bos == (0 if theirs(source)("ada").input_ids[0] == 0 else None)
        begun += ours.bos is not None
    assert begun


def test_a_text_can_begin_with_two_tokens_and_end_with_one(tmp_path, monkeypatch):
    source = begin_with(write_files(tmp_path / "source"), BEGIN, "<|endoftext|>", end=END)
    ours = assert_answer_of_load(source, tmp_path / "loaded", monkeypatch)
    assert (ours.begin, ours.specials.finish) == ([1, 0], [2])
    assert ours.pack(["ada met hugo"] * 9, 2, 8)[:, :2].tolist() == [[1, 0]] * 2


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "GemmaTokenizer", "TokenizersBackend", None])
@pytest.mark.parametrize("add_prefix_space", [True, False, None])
def test_sentencepiece_is_taken_as_transformers_takes_it(
    kind, add_prefix_space, tmp_path, monkeypatch, sentencepiece
):
    """A class that builds the tokenizer anew adds a space before the text, or does not."""
    source = tmp_path / "source"
    source.mkdir()
    for path in sentencepiece.glob("*.json"):
        (source / path.name).write_text(path.read_text())
    size = len(json.loads((source / "tokenizer.json").read_text())["model"]["vocab"]) + 8
    changes = {"tokenizer_class": kind, "add_prefix_space": add_prefix_space, "legacy": False}
    known = {key: value for key, value in changes.items() if value is not None}
    path = source / "tokenizer_config.json"
    settings = {k: v for k, v in json.loads(path.read_text()).items() if k != "tokenizer_class"}
    path.write_text(json.dumps(settings | known))
    (source / "config.json").write_text(json.dumps({"model_type": "llama", "vocab_size": size}))
    assert_answer_of_load(source, tmp_path / "loaded", monkeypatch, size)


@pytest.fixture(scope="module")
def sentencepiece(tmp_path_factory) -> Path:
    return write_sentencepiece(tmp_path_factory.mktemp("spm") / "model", "llama 2")


def test_the_answer_is_dropped_when_a_file_changes(tmp_path):
    folder, _ = brought(write_files(tmp_path / "source"), tmp_path / "loaded")
    assert read_special_tokens(folder) is not None
    edit_json(folder / "tokenizer_config.json", eos_token=END)
    assert read_special_tokens(folder) is None
    assert Tokenizer(folder).special("eos_token") == 2


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"files": {}}'])
def test_a_torn_answer_is_not_believed(content, tmp_path):
    folder, _ = brought(write_files(tmp_path / "source"), tmp_path / "loaded")
    (folder / FILE).write_text(content)
    assert read_special_tokens(folder) is None
    assert Tokenizer(folder).special("eos_token") == 0


def test_a_tokenizer_whose_parts_do_not_fit_is_named(tmp_path):
    """As transformers can describe a damaged one: with a merge of what is no token."""
    spec = json.loads((write_files(tmp_path / "m") / "tokenizer.json").read_text())
    spec["model"]["merges"].append(["no", "token"])
    with pytest.raises(StageError, match="fit each other, found otherwise") as caught:
        transformers_tokenizer.tokenizer_of(tmp_path, spec)
    assert caught.value.failure == "missing_tokenizer"
