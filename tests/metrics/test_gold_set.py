"""The lines of a gold set, one bad one at a time, and the items that they make."""

import json

import pytest

from quantline.errors import Failure, Reason, StageError
from quantline.metrics.gold_set import (
    GoldResult,
    TokenizedItem,
    accuracy,
    load_gold,
    read_tokenized,
)


def write_lines(path, *items: dict | str):
    lines = []
    for item in items:
        text = item if isinstance(item, str) else json.dumps(item, ensure_ascii=False)
        lines.append(text + "\n")
    path.write_text("".join(lines))
    return path


def changed(**values) -> dict:
    """Return an item with other values; None takes a key away."""
    item = {"id": "b", "prompt": "x", "answer": "y"} | values
    return {key: value for key, value in item.items() if value is not None}


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "one JSON object"),
        ("[]", "one JSON object"),
        ("", "one JSON object"),
        (changed(answer=None), "answer: Field required"),
        (changed(id="a"), "the id 'a' again"),
        (changed(answer=""), "answer: "),
        (changed(huh=1), "huh: "),
        (changed(id=3), "id: "),
        (changed(choices=["z", "w"]), "among the choices"),
        (changed(choices=["y"]), "choices: "),
        (changed(choices=["y", "y"]), "each choice once"),
        (changed(choices=["y", 3]), "choices.1: "),
        (changed(prompt=None), "prompt is empty"),
        (changed(task="flips"), "needs another name"),
        (changed(messages=[{"role": "user"}]), "messages.0.content"),
        (changed(messages=[]), "messages: "),
        (changed(messages="hi"), "messages: "),
        (changed(match="near"), "match: "),
        (changed(match="regex", answer="("), "no regular expression"),
        (changed(max_tokens=0), "max_tokens: "),
        (changed(max_tokens="3"), "max_tokens: "),
        (changed(stop="."), "stop: "),
        (changed(normalize="length"), "goes with choices"),
        (changed(choices=["y", "z"], max_tokens=3), "is not generated"),
        (changed(prompt=None, messages=[3]), "messages.0"),
    ],
)
def test_load_gold_names_a_bad_line_by_its_number(line, words, tmp_path):
    first = {"id": "a", "prompt": "p \u2028 q", "answer": "r"}
    path = write_lines(tmp_path / "gold.jsonl", first, line)
    if line == "":
        path.write_text(path.read_text() + '{"id": "c", "prompt": "p", "answer": "r"}\n')
    with pytest.raises(StageError, match="line 2") as caught:
        load_gold(path)
    assert words in str(caught.value)
    assert caught.value.failure == Failure.DATASET_INVALID
    assert caught.value.reason == Reason.EVAL_DATASET_MISSING


def test_load_gold_takes_the_last_message_for_the_prompt(tmp_path):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "who?"}]
    line = {"id": "a", "messages": messages, "answer": "ada"}
    (item,) = load_gold(write_lines(tmp_path / "gold.jsonl", line))
    assert item.prompt == "who?"
    assert item.chat == messages
    assert not item.generated


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_load_gold_refuses_a_file_that_is_not_there_or_no_text(tmp_path, content):
    if content:
        (tmp_path / "none.jsonl").write_bytes(content)
    with pytest.raises(StageError) as caught:
        load_gold(tmp_path / "none.jsonl")
    assert caught.value.reason == Reason.EVAL_DATASET_MISSING


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        ({}, "forced"),
        ({"choices": ["y", "z"]}, "choices"),
        ({"match": "contains"}, "generated"),
        ({"stop": ["."]}, "generated"),
        ({"max_tokens": 3}, "generated"),
    ],
)
def test_gold_item_kind_follows_from_its_keys(values, kind, tmp_path):
    (item,) = load_gold(write_lines(tmp_path / "gold.jsonl", changed(**values)))
    assert item.kind == kind


def test_accuracy_is_per_task_and_over_all():
    results = [
        GoldResult("1", "facts", True, []),
        GoldResult("2", "facts", False, []),
        GoldResult("3", "words", True, []),
    ]
    assert accuracy(results) == {"all": 2 / 3, "facts": 0.5, "words": 1.0}
    assert accuracy([]) == {}


def test_read_tokenized_reads_what_the_reference_stage_wrote(tmp_path):
    item = TokenizedItem("a", "t", "?", "x", "forced", [1], [[2, 3]], 0, [2], stop=["."], end=[0])
    line = json.dumps(item.__dict__)
    path = write_lines(tmp_path / "gold.jsonl", line, line)
    assert read_tokenized(path) == [item, item]
