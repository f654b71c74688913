"""Chat templates render as apply_chat_template does, on a day that does not move."""

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from quantline.errors import Failure, StageError
from quantline.text import chat_template
from quantline.text.tokenizer import Tokenizer
from tests.helpers.checkpoint_files import begin_with, brought, write_files
from tests.helpers.models import CHAT_TEMPLATE

CHAT = [
    {"role": "system", "content": " be brief "},
    {"role": "user", "content": "who <|im_end|> met\n\n  hugo? <b>&\"'"},
    {"role": "assistant", "content": "ada", "reasoning": "it was her"},
    {"role": "user", "content": "ünd?"},
]
# What a template does → the template.
TEMPLATES = {
    "chat ml": CHAT_TEMPLATE,
    "writes the begin token": "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}",
    "asks whether a token is there": (
        "{% if unk_token is defined %}{{ unk_token }}{% else %}none{% endif %}"
        "{{ pad_token }}{{ eos_token }}{{ image_token }}"
    ),
    "marks what is generated": (
        "{% for m in messages %}{{ m.role }}: {% generation %}{{ m.content }}{% endgeneration %}"
        "{% endfor %}"
    ),
    "writes the day": "{{ strftime_now('%d %b %Y %H:%M %A') }} {{ messages[0]['content'] }}",
    "asks for the clock": "{% if strftime_now is defined %}{{ strftime_now('%Y') }}{% endif %}",
    "writes json": (
        "{{ messages | tojson }}{{ messages[1] | tojson(indent=2) }}"
        "{{ messages[1] | tojson(ensure_ascii=True, sort_keys=True, separators=(',', ':')) }}"
    ),
    "asks for tools": (
        "{% if tools %}tools{% endif %}{% if tools is none %}none{% endif %}"
        "{% if not documents %}no documents{% endif %}{{ tools is defined }}"
    ),
    "reads reasoning": (
        "{% for m in messages %}{{ m.reasoning_content or '-' }}{{ m.thinking }}{% endfor %}"
    ),
    "leaves loops": (
        "{% for m in messages %}{% if loop.index > 2 %}{% break %}{% endif %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{{ m.content }}{% endfor %}"
    ),
    "keeps a namespace": (
        "{% set ns = namespace(n=0, first=dict(a=1)) %}{% for m in messages %}"
        "{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}{{ ns.first }}"
    ),
    "writes macros": (
        "{% macro turn(m) -%}\n  [{{ m.role | upper }}] {{ m.content | trim }}\n{%- endmacro %}"
        "{% for m in messages %}{{ turn(m) }}\n{% endfor %}\n"
        "    {% if add_generation_prompt %}\n    go\n    {% endif %}\n"
    ),
    "leaves blanks": "  {%- for m in messages -%} {{ m.content }} {%+ endfor %}\n\n",
    "is empty but for a comment": "{# nothing #}",
}


class StandingClock(chat_template.datetime):
    """The day of quantline's clock, for transformers' own."""

    @classmethod
    def now(cls, tz: Any = None) -> chat_template.datetime:
        return chat_template.TODAY


@pytest.fixture(autouse=True)
def standing_clock(monkeypatch):
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(chat_template_utils, "datetime", StandingClock)


def transformers_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def assert_renders_alike(folder: Path, source: Path, **named: str) -> Tokenizer:
    """Compare texts and ids with what transformers makes of the source."""
    ours = Tokenizer(folder)
    theirs = transformers_tokenizer(source)
    for prompted in (True, False):
        options = {"add_generation_prompt": prompted, **named}
        text = theirs.apply_chat_template(CHAT, tokenize=False, **options)
        assert ours.render(CHAT, generation_prompt=prompted) == text
    ids = theirs.apply_chat_template(CHAT, add_generation_prompt=True, **named).input_ids
    assert ours.prompt("", CHAT) == ids
    return ours


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_renders_as_transformers_renders_it(name, tmp_path):
    source = write_files(
        tmp_path / "m",
        tokenizer_config={"image_token": "<|im_start|>"},
        chat_template=TEMPLATES[name],
    )
    assert_renders_alike(source, source)


def test_a_template_that_writes_the_begin_token_gets_no_second_one(tmp_path):
    source = write_files(tmp_path / "m", chat_template=TEMPLATES["writes the begin token"])
    begin_with(source, "<|endoftext|>")
    ours = assert_renders_alike(source, source)
    assert ours.prompt("", CHAT)[:2] != [0, 0]
    assert ours.prompt("ada")[:1] == [0]


def in_config(value: Any) -> dict[str, Any]:
    return {"chat_template": None, "tokenizer_config": {"chat_template": value}}


def listed(**templates: str) -> list[dict[str, str]]:
    return [{"name": name, "template": text} for name, text in templates.items()]


OTHER = "tools {{ messages[0].content }}"
# Where templates are → the files.
PLACES: dict[str, dict[str, Any]] = {
    "a text in tokenizer_config.json": in_config(CHAT_TEMPLATE),
    "a list with names": in_config(listed(default=CHAT_TEMPLATE, tool_use=OTHER)),
    "an object with names": in_config({"default": CHAT_TEMPLATE, "tool_use": OTHER}),
    "a list of one": in_config(listed(default=CHAT_TEMPLATE)),
    "a file over tokenizer_config.json": {
        "tokenizer_config": {"chat_template": OTHER}, "chat_template": CHAT_TEMPLATE,
    },
    "a folder": {
        "chat_template": CHAT_TEMPLATE, "additional_chat_templates/tool_use": OTHER,
        "additional_chat_templates/rag": "rag {{ documents }}",
    },
}  # fmt: skip


@pytest.mark.parametrize("place", PLACES)
def test_templates_are_found_where_transformers_finds_them(place, tmp_path):
    source = tmp_path / "source"
    (source / "additional_chat_templates").mkdir(parents=True)
    write_files(source, **PLACES[place])
    folder, steps = brought(source, tmp_path / "loaded")
    assert steps == []
    ours = assert_renders_alike(folder, source)
    found = transformers_tokenizer(source).chat_template
    expected = found if isinstance(found, dict) else {"default": found}
    assert ours.specials.templates == expected
    assert transformers_tokenizer(folder).chat_template == found


def test_the_only_template_serves_whatever_its_name_is(tmp_path):
    source = write_files(tmp_path / "m", **in_config(listed(chat=CHAT_TEMPLATE)))
    assert_renders_alike(source, source, chat_template="chat")


def test_of_several_templates_none_serves_without_the_name_default(tmp_path):
    source = write_files(tmp_path / "m", **in_config(listed(rag="x", tool_use="y")))
    assert Tokenizer(source).chat_template is None
    with pytest.raises(StageError, match="none but those named rag, tool_use") as caught:
        Tokenizer(source).render(CHAT)
    assert caught.value.failure == Failure.DATASET_INVALID


def test_an_empty_template_is_said_to_be_empty(tmp_path):
    source = write_files(tmp_path / "m", chat_template="")
    with pytest.raises(StageError, match="found an empty one"):
        Tokenizer(source).render(CHAT)


def test_a_template_of_a_processor_is_brought_where_tokenizers_look(tmp_path):
    source = write_files(tmp_path / "m", chat_template=None)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": CHAT_TEMPLATE}))
    folder, steps = brought(source, tmp_path / "loaded")
    assert [step["step"] for step in steps] == ["convert_chat_template"]
    assert (folder / "chat_template.jinja").read_text() == CHAT_TEMPLATE
    assert_renders_alike(folder, folder)
    (source / "chat_template.json").write_text(json.dumps({"chat_template": 5}))
    with pytest.raises(StageError, match=r"chat_template\.json"):
        brought(source, tmp_path / "again")


# What a template does wrong → the template, and words of the error.
BROKEN = {
    "does not compile": ("{% for m in messages %}", "does not compile: line 1"),
    "refuses": ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
    "asks for what is not there": ("{{ messages[0].tools[0].name }}", "tools"),
    "divides by zero": ("{{ 1 / 0 }}", "division"),
    "reaches out": ("{{ ''.__class__.__mro__ }}", "__class__"),
    "calls what is none": ("{{ missing() }}", "missing"),
    "adds text and number": ("{{ 'a' + 1 }}", "str"),
    "calls itself": ("{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "recursion"),
    "includes a file": ("{% include '/etc/passwd' %}", "loader"),
    "imports": ("{% import 'os' as os %}{{ os }}", "loader"),
    "counts too far": ("{{ range(999999999) | list }}", "range"),
    "draws a word": ("{{ ['a', 'b'] | random }}", "draws by chance"),
    "draws a text": ("{{ lipsum(1) }}", "draws by chance"),
    "stores under a private name": ("{% set ns = namespace(__x=1) %}", "namespace"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_fails_is_named(name, tmp_path):
    template, words = BROKEN[name]
    with pytest.raises(StageError, match="chat template") as caught:
        chat_template.render(template, CHAT, True, {})
    assert caught.value.failure == Failure.DATASET_INVALID
    assert words in str(caught.value)


def test_our_clock_stands_and_that_of_transformers_goes(monkeypatch):
    from transformers.utils import chat_template_utils

    monkeypatch.setattr(StandingClock, "now", classmethod(lambda cls: cls(1999, 12, 31)))
    template = "{{ strftime_now('%d %B %Y') }}"
    assert chat_template.render(template, CHAT, False, {}) == "26 July 2024"
    theirs = chat_template_utils._compile_jinja_template(template)
    assert theirs.render() == "31 December 1999"


@pytest.fixture(scope="module")
def alternating(tmp_path_factory) -> tuple[Tokenizer, Any]:
    template = (
        "{{ bos_token }}{% for m in messages %}"
        "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('order') }}"
        "{% endif %}"
        "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + eos_token + '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    source = write_files(tmp_path_factory.mktemp("t") / "m", chat_template=template)
    return Tokenizer(source), transformers_tokenizer(source)


@settings(max_examples=25)
@given(
    turns=st.lists(
        st.tuples(st.sampled_from(["user", "assistant"]), st.text(max_size=20)), min_size=1
    ),
    prompted=st.booleans(),
)
def test_any_chat_is_rendered_or_refused_as_by_transformers(alternating, turns, prompted):
    from jinja2.exceptions import TemplateError

    ours, theirs = alternating
    chat = [{"role": role, "content": content} for role, content in turns]
    try:
        expected = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompted)
    except TemplateError:
        with pytest.raises(StageError, match="order"):
            ours.render(chat, prompted)
        return
    assert ours.render(chat, prompted) == expected
    assert ours.encode(expected) == theirs(expected, add_special_tokens=False).input_ids
