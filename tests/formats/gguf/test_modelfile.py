"""Ollama's Modelfile writes chats as the model's own template does."""

from types import SimpleNamespace

from quantline.formats.gguf.modelfile import go_template, modelfile

FORM = {
    "before": {"system": "<s>", "user": "<u>", "assistant": "<a>"},
    "behind": {"system": "</s>\n", "user": "</u>\n", "assistant": "</a>\n"},
    "opening": "<a>",
    "system": None,
}
TOKENS = {1: "<end>", 2: 'q"', 3: ""}
TOKENIZER = SimpleNamespace(end_tokens=[1, 2, 3], decode=lambda ids: TOKENS[ids[0]])


def test_modelfile_has_file_template_and_stops():
    text = modelfile("x.gguf", ["mmproj-x.gguf"], FORM, TOKENIZER)
    assert text == (
        "# ollama create my-model --file Modelfile\n"
        "FROM ./x.gguf\n"
        "FROM ./mmproj-x.gguf\n"
        '\nTEMPLATE """{{ range .Messages }}'
        '{{ if eq .Role "system" }}<s>{{ .Content }}</s>\n'
        '{{ else if eq .Role "user" }}<u>{{ .Content }}</u>\n'
        '{{ else if eq .Role "assistant" }}<a>{{ .Content }}</a>\n'
        '{{ end }}{{ end }}<a>"""\n'
        '\nPARAMETER stop "<end>"\n'
    )


def test_modelfile_gives_the_system_message_that_the_template_gives():
    text = modelfile("x.gguf", [], FORM | {"system": "Be kind."}, TOKENIZER)
    assert '\nSYSTEM """Be kind."""\n' in text


def test_modelfile_of_a_model_without_a_template_passes_texts_on():
    assert 'TEMPLATE """{{ .Prompt }}"""' in modelfile("x.gguf", [], None, TOKENIZER)


def test_modelfile_says_why_a_template_has_no_equal():
    text = modelfile("x.gguf", [], {"reason": "it wraps\nFROM ./evil.gguf"}, TOKENIZER)
    assert "# The chat template has no equal here: it wraps FROM ./evil.gguf.\n" in text
    assert "TEMPLATE" not in text


def test_go_template_refuses_texts_that_would_end_it():
    for text in ('"""', "{{ .System }}", "}}"):
        assert go_template(FORM | {"opening": text}) is None
        assert go_template(FORM | {"system": text}) is None
