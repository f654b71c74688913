"""Tokenizers and chat templates that were made to harm whoever uses them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from quantline.text.tokenizer import Tokenizer
from tests.helpers.attacks import HARMLESS, outcome

MESSAGES = [{"role": "user", "content": "hello"}]
# What reaches for Python behind the template's values, in the forms that escapes of sandboxes had.
ESCAPES = {
    "the classes of a text": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "the same by attr": "{{ ''|attr('__class__')|attr('__mro__') }}",
    "the same by item": "{{ ''['__class__']['__mro__'] }}",
    "the globals of a function": "{{ raise_exception.__globals__['os'].system('touch $MARK') }}",
    "the globals of a macro": "{% macro m() %}{% endmacro %}{{ m.__globals__ }}",
    "the builtins of a cycler": "{{ cycler.__init__.__globals__.os.system('touch $MARK') }}",
    "the builtins of a namespace": "{{ namespace.__init__.__globals__ }}",
    "the code of a function": "{{ raise_exception.__code__ }}",
    "the frame of a generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "the template itself": "{{ self.__init__.__globals__ }}",
    "the environment": "{{ self._TemplateReference__context.environment }}",
    "format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "format by attr": "{{ ('{0.__class__}'|attr('format'))('') }}",
    "format_map": "{{ '{a.__class__}'.format_map({'a': 1}) }}",
    "an import": "{% import 'os' as os %}{{ os.system('touch $MARK') }}",
    "an include": "{% include '/etc/passwd' %}",
    "an include from outside": "{% include '../outside/private.txt' %}",
    "an extension": "{% extends '/etc/passwd' %}",
    "a change of the messages": "{% set _ = messages.append(1) %}",
    "a change of a message": "{% set _ = messages[0].update({'role': 'x'}) %}",
    "a power of powers": "{{ 9**9**9 }}",
    "a text of 10**12 letters": "{{ 'a' * 10**12 }}",
    "a wide field": "{{ '%1000000000000d' % 1 }}",
    "a range of 10**12": "{% for i in range(10**12) %}{% endfor %}",
    "a macro that calls itself": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "brackets 10,000 deep": "{{ " + "(" * 10_000 + "1" + ")" * 10_000 + " }}",
    "no end": "{% for m in messages %}",
    "an error with control characters": "{{ raise_exception('\x1b[2J\x07\u202e') }}",
    "an error that is no text": "{{ raise_exception(messages) }}",
    "a key that is not there": "{{ messages[99].content.x.y }}",
    "a division by zero": "{{ 1 // 0 }}",
    "a number that is no number": "{{ 'x'|int(base=99) }}",
    "a filter that does not exist": "{{ messages|evil }}",
    "a table as a list's index": "{{ messages[{}] }}",
}


@pytest.fixture(scope="module")
def plain(tiny_narrow, tmp_path_factory) -> Path:
    """A folder with a tokenizer alone."""
    folder = tmp_path_factory.mktemp("plain")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_narrow / name, folder)
    return folder


@pytest.fixture
def folder(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "tokenizer"))


@pytest.mark.parametrize("name", ESCAPES)
def test_render_keeps_inside_its_sandbox(name, folder):
    (folder / "chat_template.jinja").write_text(ESCAPES[name])
    rendered = []
    messages = json.loads(json.dumps(MESSAGES))
    found = outcome(lambda: rendered.append(Tokenizer(folder).render(messages)))
    assert messages == MESSAGES
    if found == HARMLESS:
        assert not any(word in rendered[0] for word in ("class", "<function", "root:", "private"))
        assert len(rendered[0]) < 1_000_000


def tokenizer(**changes: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: values | changes


def normalizer(pattern: str) -> dict[str, Any]:
    return {"type": "Replace", "pattern": {"Regex": pattern}, "content": ""}


def nested(kind: str, key: str, depth: int) -> dict[str, Any]:
    inner: dict[str, Any] = {"type": "Lowercase"} if kind == "normalizer" else {"type": "Digits"}
    for _ in range(depth):
        inner = {"type": "Sequence", key: [inner]}
    return {kind: inner}


def added(number: int, content: str = "x") -> dict[str, Any]:
    return {
        "id": number, "content": content, "single_word": False, "lstrip": False, "rstrip": False,
        "normalized": False, "special": True,
    }  # fmt: skip


TOKENIZERS = {
    "an added token of a megabyte": tokenizer(added_tokens=[added(383, "x" * 2**20)]),
    "an added token of an id of 2**40": tokenizer(added_tokens=[added(2**40)]),
    "an added token of a negative id": tokenizer(added_tokens=[added(-1)]),
    "an added token of no letters": tokenizer(added_tokens=[added(383, "")]),
    "an added token of control characters": tokenizer(added_tokens=[added(383, "\x1b[2J")]),
    "100,000 added tokens of one id": tokenizer(added_tokens=[added(383)] * 100_000),
    "sequences in sequences": tokenizer(**nested("normalizer", "normalizers", 100)),
    "sequences 50 deep": tokenizer(**nested("pre_tokenizer", "pretokenizers", 50)),
    "a pattern that is none": tokenizer(normalizer=normalizer("(((")),
    "a normalizer that does not exist": tokenizer(normalizer={"type": "Evil"}),
    "a model that does not exist": tokenizer(model={"type": "Evil"}),
    "a model that is a text": tokenizer(model="BPE"),
    "a template of ids that are not there": tokenizer(
        post_processor={
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "gone", "type_id": 0}}],
            "pair": [],
            "special_tokens": {},
        }
    ),
    "a truncation to nothing": tokenizer(
        truncation={"max_length": 0, "stride": 9, "strategy": "LongestFirst", "direction": "Left"}
    ),
    "a padding of 10**12": tokenizer(
        padding={"strategy": {"Fixed": 10**12}, "direction": "Left", "pad_id": 0,
                 "pad_to_multiple_of": None, "pad_type_id": 0, "pad_token": "x"}
    ),
    "a list": lambda _: [],
    "no text": lambda _: "",
}  # fmt: skip


@pytest.mark.parametrize("name", TOKENIZERS)
def test_tokenizer_takes_no_harm_from(name, folder):
    path = folder / "tokenizer.json"
    changed = TOKENIZERS[name](json.loads(path.read_text()))
    path.write_text(changed if isinstance(changed, str) else json.dumps(changed))
    outcome(lambda: Tokenizer(folder).encode("hello 12 world" * 9))


SPECIAL = {
    "a token that is a number": {"eos_token": 7},
    "a token that is a list": {"eos_token": ["x"]},
    "a token without content": {"eos_token": {"lstrip": True}},
    "a token that is not there": {"eos_token": "<gone>"},
    "a template that is a number": {"chat_template": 7},
    "a template that is a list of numbers": {"chat_template": [1, 2]},
    "templates without a name": {"chat_template": [{"template": "x"}]},
    "ends that are texts": {"eos_token": "\x1b[2J"},
}


@pytest.mark.parametrize("name", SPECIAL)
def test_tokenizer_takes_no_harm_from_a_configuration_with(name, folder):
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | SPECIAL[name]))
    (folder / "chat_template.jinja").unlink(missing_ok=True)

    def use() -> None:
        tokenizer = Tokenizer(folder)
        tokenizer.prompt("hello", MESSAGES)
        assert isinstance(tokenizer.end_tokens, list)

    outcome(use)
