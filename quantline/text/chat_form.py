"""How a chat template wraps messages, where it wraps each of them alike.

Programs that do not run a model's own template, such as Ollama, are given what stands before and
behind a message of each role. It is found by rendering sentinels, and held against the template on
chats of several lengths: a form that is not exactly the template's is none.
"""

from collections.abc import Callable
from typing import Any

from quantline.errors import StageError
from quantline.text.tokenizer import Tokenizer

Message = dict[str, str]
Render = Callable[[list[Message], bool], str]

SYSTEM = "quantlineSystemText"
USER = "quantlineUserText"
ANSWER = "quantlineAnswerText"
LONGEST = 4000  # characters of a part


def chat_form(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """Return how a tokenizer's chat template wraps messages.

    Returns:
        {before: role → text, behind: role → text, opening: what stands where an answer begins,
        system: the message that the template gives where a chat has none, or null}, without the
        token that the runtime itself puts before a text. {reason} for a template that does not
        wrap each message alike, and None for a model without one.
    """
    if not tokenizer.chat_template:
        return None
    begin = tokenizer.decode(tokenizer.begin) if tokenizer.begin else ""

    def render(messages: list[Message], opens: bool) -> str:
        # A runtime that is given the form puts the begin token there by itself.
        return tokenizer.render(messages, opens).removeprefix(begin)

    try:
        return find_form(render)
    except StageError as error:
        return {"reason": str(error)}


def find_form(render: Render) -> dict[str, Any]:
    """Return the form of what renders messages; see `chat_form`.

    Args:
        render: Called with messages, and whether the text ends where an answer begins.
    """
    user = {"role": "user", "content": USER}
    system = {"role": "system", "content": SYSTEM}
    answer = {"role": "assistant", "content": ANSWER}
    whole = render([system, user, answer, user], False)
    pieces = _between(whole, [SYSTEM, USER, ANSWER, USER])
    opened = render([system, user], True)
    closed = render([system, user], False)
    if pieces is None or not opened.startswith(closed):
        return {"reason": "it does not write the messages one after the other as they are"}
    first, after_system, after_user, after_answer, end = pieces
    opening = opened.removeprefix(closed)
    # What ends the whole chat stands behind every message of the user's.
    if after_user.startswith(end):
        before_answer = after_user.removeprefix(end)
        for behind_answer in _beginnings(after_answer, end):
            before_user = after_answer.removeprefix(behind_answer)
            if not before_user or not after_system.endswith(before_user):
                continue
            behind_system = after_system.removesuffix(before_user)
            form: dict[str, Any] = {
                "before": {"system": first, "user": before_user, "assistant": before_answer},
                "behind": {"system": behind_system, "user": end, "assistant": behind_answer},
                "opening": opening,
                "system": None,
            }
            form["system"] = _given_system(render([user], False), form)
            if _fits(form, render):
                return form
    return {"reason": "it does not wrap every message of a role alike"}


def apply_form(form: dict[str, Any], messages: list[Message], opens: bool) -> str:
    """Return a chat as a form writes it, which is what its template does."""
    given = form["system"]
    if given is not None and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": given}, *messages]
    text = ""
    for message in messages:
        role = message["role"]
        text += form["before"][role] + message["content"] + form["behind"][role]
    return text + (form["opening"] if opens else "")


def _between(text: str, marks: list[str]) -> list[str] | None:
    """Return what stands before, between and behind marks; None if they are not all there."""
    pieces = []
    for mark in marks:
        piece, found, text = text.partition(mark)
        if not found or len(piece) > LONGEST:
            return None
        pieces.append(piece)
    return [*pieces, text]


def _beginnings(text: str, likely: str) -> list[str]:
    """Return all beginnings of a text, the longest first but for one that is likely."""
    found = [text[:end] for end in range(len(text), -1, -1)]
    return sorted(found, key=lambda beginning: beginning != likely)


def _given_system(without: str, form: dict[str, Any]) -> str | None:
    """Return the system message that a template gives where a chat has none."""
    before = form["before"]
    behind = form["behind"]
    rest = f"{before['user']}{USER}{behind['user']}"
    if without == rest or not without.endswith(rest):
        return None
    wrapped = without.removesuffix(rest)
    if wrapped.startswith(before["system"]) and wrapped.endswith(behind["system"]):
        return wrapped.removeprefix(before["system"]).removesuffix(behind["system"])
    return None


def _fits(form: dict[str, Any], render: Render) -> bool:
    """Whether a form writes chats exactly as a template does."""
    turns = [
        {"role": "user", "content": "One: 1?\nTwo"},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": "And then"},
        {"role": "assistant", "content": "No"},
        {"role": "user", "content": "Why"},
    ]
    system = [{"role": "system", "content": "Be short."}]
    for length in (1, 3, 5):
        for messages in (turns[:length], system + turns[:length]):
            if apply_form(form, messages, True) != render(messages, True):
                return False
    return True
