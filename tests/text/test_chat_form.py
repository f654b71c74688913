"""The form of a chat template is exactly the template's, or there is none."""

import pytest
from jinja2 import Environment

from quantline.text.chat_form import apply_form, find_form

CHATML = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
WITH_SYSTEM = (
    "{% if messages[0].role != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}" + CHATML
)
INSTRUCT = (
    "{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'assistant' %} {{ m.content }}</s>"
    "{% else %}[SYS]{{ m.content }}[/SYS]{% endif %}{% endfor %}"
)


def renderer(template):
    compiled = Environment(keep_trailing_newline=True).from_string(template)

    def render(messages, opens):
        return compiled.render(messages=messages, add_generation_prompt=opens)

    return render


@pytest.mark.parametrize("template", [CHATML, WITH_SYSTEM, INSTRUCT])
def test_find_form_writes_chats_as_the_template_does(template):
    render = renderer(template)
    form = find_form(render)
    chat = [{"role": "user", "content": "One"}, {"role": "assistant", "content": "Two"}]
    for messages in (chat, [{"role": "system", "content": "S"}, *chat], chat[:1]):
        for opens in (False, True):
            assert apply_form(form, messages, opens) == render(messages, opens)


def test_find_form_finds_the_system_message_that_is_given():
    form = find_form(renderer(WITH_SYSTEM))
    assert form["system"] == "Be kind."
    assert form["before"] == {
        "system": "<|system|>\n",
        "user": "<|user|>\n",
        "assistant": "<|assistant|>\n",
    }
    assert set(form["behind"].values()) == {"<|end|>\n"}
    assert form["opening"] == "<|assistant|>\n"


# Templates that no list of pieces around messages can be.
IRREGULAR = {
    "counts": "{% for m in messages %}{{ loop.index }}:{{ m.role }}:{{ m.content }};{% endfor %}",
    "drops": "{{ messages[-1].content }}",
    "in capitals": CHATML.replace("m.content", "m.content|upper"),
    "system inside the first message": (
        "{% for m in messages %}{% if m.role == 'user' %}[I]"
        "{% if loop.index == 2 %}({{ messages[0].content }}){% endif %}{{ m.content }}[/I]"
        "{% elif m.role == 'assistant' %}{{ m.content }}.{% endif %}{% endfor %}"
    ),
}


@pytest.mark.parametrize("template", IRREGULAR)
def test_find_form_finds_none_in_a_template_that_is_not_regular(template):
    assert set(find_form(renderer(IRREGULAR[template]))) == {"reason"}
