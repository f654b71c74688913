"""`quantline chat`: one variant or two answer side by side."""

import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from quantline.cli.bundles import find_bundle
from quantline.cli.program import app, stop
from quantline.errors import ConfigError, StageError
from quantline.messages import plain, say

if TYPE_CHECKING:
    from quantline.runtimes.chat import Chat

AGAIN = "/new"
END = "/exit"


@app.command()
def chat(
    variants: Annotated[
        list[str],
        typer.Argument(
            help="One or two: variants of the project, or folders of bundles", show_default=False
        ),
    ],
    prompt: Annotated[
        list[str] | None,
        typer.Option(help="A message instead of the keyboard's; may be given again"),
    ] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Of an answer at most")] = 256,
    threads: Annotated[
        int | None, typer.Option(help="Of each runtime; else one per core", show_default=False)
    ] = None,
) -> None:
    """Chat with one variant, or with two side by side, each in its own runtime.

    Answers are greedy, so that a difference is the variant's: quantline chat bf16 gguf-q4_k_m
    """
    from quantline.runtimes.chat import Chat

    try:
        if len(variants) > 2:
            raise ConfigError(f"expected one variant or two, found {len(variants)}")
        bundles = [find_bundle(name) for name in variants]
        chats = [Chat(bundle.folder, bundle.manifest, threads) for bundle in bundles]
        for text in messages(prompt, chats):
            _answer(chats, text, max_tokens)
    except (ConfigError, StageError) as error:
        raise stop(error) from None


def messages(given: list[str] | None, chats: "list[Chat]") -> Iterator[str]:
    """Yield what is asked: the messages that are given, or the lines of the keyboard."""
    if given:
        yield from given
        return
    if sys.stdin.isatty():
        say(f"{' | '.join(chat.name for chat in chats)}; {AGAIN} begins anew, {END} ends")
    while True:
        try:
            line = input("> " if sys.stdin.isatty() else "").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if line == END:
            return
        if line == AGAIN:
            for chat in chats:
                chat.messages = []
        elif line:
            yield line


def _answer(chats: "list[Chat]", text: str, max_tokens: int) -> None:
    """Ask every bundle, and print the answers beside each other."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    answers = [chat.ask(text, max_tokens) for chat in chats]
    table = Table(title=Text(plain(text)), show_lines=False, expand=True)
    for chat in chats:
        table.add_column(Text(plain(chat.name)), ratio=1)
    table.add_row(*[Text(plain(answer.text.strip())) for answer in answers])
    table.add_row(
        *[
            Text(f"{answer.tokens} tokens in {answer.seconds:.1f} s", style="dim")
            for answer in answers
        ]
    )
    Console().print(table)
