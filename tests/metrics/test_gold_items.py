"""The lines of a gold set, one bad one at a time, and the items that they make."""

import json

import pytest

from quantline.errors import Failure, Reason, StageError
from quantline.metrics.gold_items import load_gold
from quantline.tracking.run_content import numbers


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
        ("[" * 100_000, "nested too deeply"),
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
        (changed(match="regex", answer="(yes)?"), "any answer would be right"),
        (changed(match="contains", answer="a\nb", stop=["\n"]), "none could be right"),
        (changed(answer="yes.", stop=["no", "."]), "holds the stop '.'"),
        (changed(max_tokens=10**9), "max_tokens"),
        (changed(max_tokens=0), "max_tokens: "),
        (changed(max_tokens="3"), "max_tokens: "),
        (changed(stop="."), "stop: "),
        (changed(normalize="length"), "goes with choices"),
        (changed(choices=["y", "z"], max_tokens=3), "is not generated"),
        (changed(prompt=None, messages=[3]), "messages.0"),
        ('{"id": "b", "prompt": "x \\ud83d", "answer": "y"}', "ud83d, half of a surrogate pair"),
        ('{"id": "b", "prompt": "x", "answer": "y", "stop": ["\\u0000"]}', "NUL"),
        (changed(task="math//algebra"), "between slashes"),
        (changed(task="math/"), "between slashes"),
        (changed(task="/math"), "between slashes"),
        (changed(task="../x"), "between slashes"),
        (changed(task="x/./y"), "between slashes"),
        (changed(task="."), "between slashes"),
        (changed(task="a" * 101), "100 characters at most"),
        (changed(task=" math"), "blanks at its ends"),
        (changed(task="tab\there"), "no control characters"),
        (changed(task="\x1b[31mred"), "no control characters"),
        (changed(task="50 # off"), "cannot tell from '50 % off'"),
    ],
)
def test_load_gold_names_a_bad_line_by_its_number(line, words, tmp_path):
    first = {"id": "a", "prompt": "p \u2028 q", "answer": "r", "task": "50 % off"}
    path = write_lines(tmp_path / "gold.jsonl", first, line)
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


def test_load_gold_names_all_bad_lines_at_once(tmp_path):
    path = write_lines(tmp_path / "gold.jsonl", changed(), "{", changed(id="c", task="../x"), "[]")
    with pytest.raises(StageError, match="3 that are bad") as caught:
        load_gold(path)
    for words in ("line 2: no JSON", "line 3: a task's name", "line 4: "):
        assert words in str(caught.value)


@pytest.mark.parametrize("begin", ["", "\ufeff"])
@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\n\n \n"])
def test_load_gold_takes_files_as_other_tools_write_them(begin, end, tmp_path):
    lines = [json.dumps(changed(id=name)) for name in "abc"]
    path = tmp_path / "gold.jsonl"
    path.write_bytes((begin + end.join([*lines, ""])).encode())
    assert [item.id for item in load_gold(path)] == ["a", "b", "c"]


TASKS = ("mmlu (5-shot)", "数学", "Größe", "math/algebra", "a.b", "50% off", "x: y", "a" * 100)


def test_load_gold_takes_names_of_tasks_that_mlflow_takes_too(tmp_path):
    from mlflow.utils.validation import _validate_metric_name

    items = [changed(id=str(number), task=task) for number, task in enumerate(TASKS)]
    loaded = load_gold(write_lines(tmp_path / "gold.jsonl", *items))
    assert [item.task for item in loaded] == list(TASKS)
    figures = {"tasks": {task: {"accuracy_delta_interval": 0.5} for task in TASKS}}
    names = numbers(figures)
    assert len(names) == len(TASKS)
    for name in names:
        _validate_metric_name(name)


@pytest.mark.parametrize("content", [None, b"\xff\xfe", b" \n\n"])
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


def test_load_gold_says_what_to_do_with_one_json_array(tmp_path):
    path = tmp_path / "gold.json"
    path.write_text(json.dumps([{"id": "1", "prompt": "a", "answer": "b"}], indent=1))
    with pytest.raises(StageError, match=r"found one JSON array; .*jq -c '\.\[\]' gold\.json"):
        load_gold(path)
