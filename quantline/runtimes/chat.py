"""A chat with a bundle in its runtime: its own template, its own tokens, greedily."""

import time
from pathlib import Path
from typing import Any, NamedTuple

from quantline.formats.container import load_container
from quantline.runtimes.own_tokens import own_tokens
from quantline.runtimes.runtime import open_runtime
from quantline.text.chat_template import render

Message = dict[str, str]


class Answer(NamedTuple):
    """What a bundle said.

    Attributes:
        text: The answer, without the token that ended it.
        tokens: How many tokens it has.
        seconds: What they took, the prompt included.
    """

    text: str
    tokens: int
    seconds: float


class Chat:
    """One bundle that is asked, and what was said so far.

    A model without a chat template continues texts instead: each message is one.
    """

    def __init__(self, folder: Path, manifest: dict[str, Any], threads: int | None = None) -> None:
        """Load the bundle.

        Args:
            folder: The bundle.
            manifest: Its manifest.
            threads: Of the runtime; None for one per core.

        Raises:
            StageError: runtime_unavailable, and what the runtime raises.
        """
        said = load_container(manifest["format"]).tokenizer_metadata(folder)
        self.name = str(manifest["variant"])
        self.engine = open_runtime(manifest["runtime"], folder, threads)
        self.template = said["chat_template"]
        ids = {f"{name}_token": said[name] for name in ("bos", "eos", "unk", "pad")}
        self.tokens = {
            name: self.engine.decode([token]) for name, token in ids.items() if token is not None
        }
        self.begin = [said["bos"]] if said["adds_bos"] and said["bos"] is not None else []
        self.ends = set(said["ends"] if "ends" in said else own_tokens(self.engine)[1])
        self.messages: list[Message] = []

    def ask(self, text: str, max_new_tokens: int) -> Answer:
        """Return the answer to a message, which both are part of the chat then.

        Raises:
            StageError: dataset_invalid, if the template refuses the chat.
        """
        if self.template:
            asked: list[Message] = [*self.messages, {"role": "user", "content": text}]
            prompt = self.engine.encode(render(self.template, asked, True, self.tokens))
        else:
            asked = []
            prompt = self.begin + self.engine.encode(text)
        begun = time.perf_counter()
        ids = self.engine.generate(prompt, max_new_tokens, self.ends)
        seconds = time.perf_counter() - begun
        answer = self.engine.decode(ids)
        self.messages = [*asked, {"role": "assistant", "content": answer}] if asked else []
        return Answer(answer, len(ids), seconds)
