"""lm-evaluation-harness's kinds of requests, answered by a runtime. It needs nothing of the harness itself.

The rules are those of the harness's own models (docs/model_guide.md, and `TemplateLM` in lm_eval/api/model.py): how
context and continuation become tokens, and how a text longer than the model's context is cut.
"""

from collections.abc import Iterable
from typing import Any, Protocol

import numpy as np

from quantline.text.tokenizer import Tokenizer
from quantline.metrics.scoring import Model, follow
from quantline.errors import Failure, StageError

MAX_TOKENS = 256  # of a text that is generated, where the task does not say
LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # names for it, the first one counts
Pair = tuple[list[int], list[int]]


class Request(Protocol):
    args: tuple


class Answers:
    """Every runtime is given the ids of the source's tokenizer, as everywhere; the text is the bundle's own.

    `max_length` is the number of tokens that the model can look at. Raises StageError(missing_tokenizer) if no token
    can begin a text.
    """

    def __init__(self, model: Model, tokenizer: Tokenizer, max_length: int) -> None:
        self.model, self.source, self.max_length = model, tokenizer, max_length
        first = [tokenizer.special("bos_token"), *tokenizer.ends]
        self.prefix = next((one for one in first if one is not None), None)
        if self.prefix is None:
            raise StageError(Failure.MISSING_TOKENIZER, "expected a token that begins or ends a text, found none in "
                             "tokenizer_config.json; tasks with an empty context need one")

    def loglikelihood(self, requests: Iterable[Request], **_: Any) -> list[tuple[float, bool]]:
        """Per (context, continuation): the continuation's log-likelihood, and whether greedy decoding gives it."""
        pairs = [self._pair(*request.args) for request in requests]
        return [(float(found.sum(dtype=np.float64)), greedy == continuation)
                for (found, greedy), (_, continuation) in zip(self._follow(pairs), pairs, strict=True)]

    def loglikelihood_rolling(self, requests: Iterable[Request], **_: Any) -> list[float]:
        """Per (text,): its log-likelihood, in windows of which each token is in one."""
        windows = [self._windows(*request.args) for request in requests]
        found = iter(self._follow([pair for one in windows for pair in one]))
        return [sum(float(next(found)[0].sum(dtype=np.float64)) for _ in one) for one in windows]

    def generate_until(self, requests: Iterable[Request], **_: Any) -> list[str]:
        """Per (context, settings): what greedy decoding writes, up to the first of `until`."""
        return [self._write(*request.args) for request in requests]

    def _encode(self, text: str) -> list[int]:
        """As the model expects a text: with the begin token, if the tokenizer adds one and the text has none."""
        ids, bos = self.source.encode(text), self.source.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _pair(self, context: str, continuation: str) -> Pair:
        """Both as ids: encoded together and parted where the context alone ends; spaces belong to what follows them."""
        if not context:
            ids = self.source.encode(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        bare = context.rstrip()
        if not bare:
            return [self.prefix], self.source.encode(context + continuation)
        before = self._encode(bare)
        return before, self._encode(context + continuation)[len(before):]

    def _windows(self, text: str) -> list[Pair]:
        """Contexts and continuations that predict each token once, each from as much as there is room for."""
        ids, found = self.source.encode(text), []
        whole = [self.prefix, *ids]
        for start in range(0, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            begin = max(0, end - self.max_length)  # in `whole`, which is one longer
            found.append((whole[begin:start + 1], ids[start:end]))
        return found

    def _follow(self, pairs: list[Pair]) -> list[tuple[np.ndarray, list[int]]]:
        """As `follow`, without the beginning of what is too long. Raises StageError: dataset_invalid, non_finite."""
        cut = []
        for context, continuation in pairs:
            room = self.max_length + 1 - len(continuation)  # the last token is not run
            if room < 1:
                raise StageError(Failure.DATASET_INVALID, f"expected continuations of {self.max_length} tokens at most, "
                                 f"which is the model's context, found one of {len(continuation)}; leave that task out")
            cut.append((context[-room:], continuation))
        found = follow(self.model, cut)
        for (likelihoods, _), (_, continuation) in zip(found, cut, strict=True):
            if not np.isfinite(likelihoods).all():
                wrong = likelihoods[~np.isfinite(likelihoods)][0]
                raise StageError(Failure.NON_FINITE, f"expected finite log-likelihoods, found {wrong} in "
                                                     f"{self.source.decode(continuation)[:80]!r}")
        return found

    def _write(self, context: str, settings: dict[str, Any]) -> str:
        sampled = settings.get("do_sample")
        if sampled or (sampled is None and float(settings.get("temperature") or 0) > 0):
            raise StageError(Failure.DATASET_INVALID, "expected a task that decodes greedily, found one that samples "
                             f"({settings}); take it in a greedy version: runtimes are compared without chance")
        count = int(next((settings[name] for name in LIMITS if settings.get(name) is not None), MAX_TOKENS))
        if not 0 < count < self.max_length:
            raise StageError(Failure.DATASET_INVALID, "expected a task that asks for fewer tokens than the model's context "
                                                      f"of {self.max_length}, found {count}; leave that task out")
        until = settings.get("until") or []
        until = [until] if isinstance(until, str) else until
        prompt = self._encode(context) or [self.prefix]
        text = self.model.decode(self.model.generate(prompt[-(self.max_length - count):], count, set(self.source.ends)))
        return text[:min([place for stop in until if stop and (place := text.find(stop)) >= 0], default=len(text))]

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Messages through the model's template; without the prompt for an answer, open at the end of the last one."""
        text = self.source.render(chat_history, generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()
        return text[:text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        return (self.source.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        return self.source.folder.name
