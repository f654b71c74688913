"""Ollama's Modelfile for a bundle: the file, how chats are written, and where answers end."""

from typing import Any

from quantline.text.tokenizer import Tokenizer

QUOTES = '"""'
HEAD = """\
# ollama create my-model --file Modelfile
FROM ./{file}
"""
PROJECTOR = "FROM ./{file}\n"
NO_FORM = """
# The chat template has no equal here: {reason}.
# Ollama goes by the one in the file, as far as it knows it.
"""
ROLES = ("system", "user", "assistant")


def modelfile(
    file: str, projectors: list[str], form: dict[str, Any] | None, tokenizer: Tokenizer
) -> str:
    """Return the text of a Modelfile.

    Args:
        file: Of the model, or the first of its parts.
        projectors: Files that make tokens of images and sound.
        form: How chats are written (quantline.text.chat_form); None for a model without a
            template, which is given texts as they are.
        tokenizer: Of the model.
    """
    text = HEAD.format(file=file)
    for name in projectors:
        text += PROJECTOR.format(file=name)
    if form is None:
        text += f"\nTEMPLATE {QUOTES}{{{{ .Prompt }}}}{QUOTES}\n"
    elif "reason" in form:
        text += NO_FORM.format(reason=" ".join(form["reason"].split()))
    elif (template := go_template(form)) is None:
        text += NO_FORM.format(reason="it has quotes that a Modelfile cannot hold")
    else:
        text += f"\nTEMPLATE {QUOTES}{template}{QUOTES}\n"
        if form["system"] is not None:
            text += f"\nSYSTEM {QUOTES}{form['system']}{QUOTES}\n"
    stops = [tokenizer.decode([token]) for token in tokenizer.end_tokens]
    lines = [f"PARAMETER stop {_quoted(stop)}\n" for stop in stops if stop and '"' not in stop]
    return text + ("\n" + "".join(lines) if lines else "")


def go_template(form: dict[str, Any]) -> str | None:
    """Return a form as a template of Go's; None where its texts cannot stand in one."""
    texts = [*form["before"].values(), *form["behind"].values(), form["opening"]]
    texts.append(form["system"] or "")
    if any(QUOTES in text or "{{" in text or "}}" in text for text in texts):
        return None
    branches = ""
    for role in ROLES:
        word = "if" if role == ROLES[0] else "else if"
        written = f"{form['before'][role]}{{{{ .Content }}}}{form['behind'][role]}"
        branches += f'{{{{ {word} eq .Role "{role}" }}}}{written}'
    return f"{{{{ range .Messages }}}}{branches}{{{{ end }}}}{{{{ end }}}}{form['opening']}"


def _quoted(text: str) -> str:
    return f'"{text}"'
