"""lm-evaluation-harness's kinds of requests, answered by a runtime. It imports nothing of it.

The rules are those of the harness's own models (docs/model_guide.md, and `TemplateLM` in
lm_eval/api/model.py): how context and continuation become tokens, and how a text longer than the
model's context is cut.
"""

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

import numpy as np

from quantline.errors import Failure, StageError
from quantline.metrics.scoring import (
    ContinuationScore,
    Pair,
    ScoringModel,
    first_stop,
    score_continuations,
)
from quantline.run.progress import progress
from quantline.text.join import encode_join
from quantline.text.tokenizer import Tokenizer

MAX_TOKENS = 256  # of a text that is generated, where the task does not say
# Names of that limit; the first one that a task sets counts.
TOKEN_LIMITS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class Request(Protocol):
    """A request of the harness: its arguments depend on its kind."""

    args: tuple[Any, ...]


class RuntimeLM:
    """A runtime as the harness sees a model.

    Every runtime is given the ids of the source's tokenizer, as everywhere in quantline; the text
    of ids is the bundle's own.

    Raises:
        StageError: missing_tokenizer, if no token can begin a text.
    """

    def __init__(self, model: ScoringModel, tokenizer: Tokenizer, max_length: int) -> None:
        """Wrap a runtime.

        Args:
            model: The runtime.
            tokenizer: Of the source.
            max_length: The model's context length in tokens.
        """
        self.model = model
        self.source_tokenizer = tokenizer
        self.max_length = max_length
        candidates = [tokenizer.special("bos_token"), *tokenizer.end_tokens]
        prefix = next((token for token in candidates if token is not None), None)
        if prefix is None:
            raise StageError(
                Failure.MISSING_TOKENIZER,
                "expected a token that begins or ends a text, found none in "
                "tokenizer_config.json; tasks with an empty context need one",
            )
        self.prefix = prefix

    def loglikelihood(self, requests: Iterable[Request], **_: Any) -> list[tuple[float, bool]]:
        """Answer requests of (context, continuation).

        Returns:
            For each the continuation's log-likelihood, and whether greedy decoding gives it.
        """
        pairs = [self._encode_pair(*request.args) for request in requests]
        answers = []
        for score, (_context, continuation) in zip(self._score(pairs), pairs, strict=True):
            answers.append((_total(score), score.greedy == continuation))
        return answers

    def loglikelihood_rolling(self, requests: Iterable[Request], **_: Any) -> list[float]:
        """Answer requests of (text,).

        Returns:
            For each its log-likelihood, in windows of which each token is in one.
        """
        windows = [self._windows(*request.args) for request in requests]
        pairs: list[Pair] = []
        for own in windows:
            pairs += own
        scores = iter(self._score(pairs))
        return [sum(_total(next(scores)) for _ in own) for own in windows]

    def generate_until(self, requests: Iterable[Request], **_: Any) -> list[str]:
        """Answer requests of (context, settings).

        Returns:
            For each what greedy decoding writes, up to the first of the setting `until`.

        Raises:
            StageError: dataset_invalid, if a task samples or wants too many tokens.
        """
        listed = list(requests)
        told = progress(listed, "answers", "question")
        return [self._generate(*request.args) for request in told]

    def _encode(self, text: str) -> list[int]:
        """Encode a text as the model expects it.

        It begins with the begin token, if the tokenizer adds one and the text has none.
        """
        ids = self.source_tokenizer.encode(text)
        bos = self.source_tokenizer.bos
        return ids if bos is None or ids[:1] == [bos] else [bos, *ids]

    def _encode_pair(self, context: str, continuation: str) -> Pair:
        """Encode both together, and part them where the context alone ends.

        Spaces at the end of the context belong to the continuation.
        """
        encode = self.source_tokenizer.encode
        if not context:
            ids = encode(continuation)
            return (ids[:1], ids[1:]) if ids[:1] == [self.prefix] else ([self.prefix], ids)
        if not context.strip():
            return [self.prefix], encode(context + continuation)
        return encode_join(self._encode, context, continuation)

    def _windows(self, text: str) -> list[Pair]:
        """Cut a text into contexts and continuations that predict each token once.

        Each token is predicted from as much as there is room for. With room for 4 tokens and the
        prefix P, a text of 6 tokens gives

            context   P            continuation   0 1 2 3
            context   1 2 3        continuation   4 5
        """
        ids = self.source_tokenizer.encode(text)
        with_prefix = [self.prefix, *ids]
        windows = []
        for start in range(0, len(ids), self.max_length):
            end = min(start + self.max_length, len(ids))
            begin = max(0, end - self.max_length)  # in `with_prefix`, which is one longer
            windows.append((with_prefix[begin : start + 1], ids[start:end]))
        return windows

    def _score(self, pairs: list[Pair]) -> list[ContinuationScore]:
        """Score continuations, without the beginning of contexts that are too long.

        Raises:
            StageError: dataset_invalid, for a continuation that is too long; non_finite.
        """
        cut = []
        for context, continuation in pairs:
            room = self.max_length + 1 - len(continuation)  # the last token is not run
            if room < 1:
                raise StageError(
                    Failure.DATASET_INVALID,
                    f"expected continuations of {self.max_length} tokens at most, which is the "
                    f"model's context, found one of {len(continuation)}; leave that task out",
                )
            cut.append((context[-room:], continuation))
        scores = score_continuations(self.model, cut)
        for score, (_context, continuation) in zip(scores, cut, strict=True):
            finite = np.isfinite(score.logprobs)
            if not finite.all():
                text = self.source_tokenizer.decode(continuation)
                raise StageError(
                    Failure.NON_FINITE,
                    f"expected finite log-likelihoods, found {score.logprobs[~finite][0]} in "
                    f"{text[:80]!r}; look at the recipe of this variant",
                )
        return scores

    def _generate(self, context: str, settings: Mapping[str, Any]) -> str:
        sampled = settings.get("do_sample")
        temperature = float(settings.get("temperature") or 0)
        if sampled or (sampled is None and temperature > 0):
            raise StageError(
                Failure.DATASET_INVALID,
                f"expected a task that decodes greedily, found one that samples ({settings}); "
                "take it in a greedy version: runtimes are compared without chance",
            )
        count = _token_limit(settings)
        if not 0 < count < self.max_length:
            raise StageError(
                Failure.DATASET_INVALID,
                "expected a task that asks for fewer tokens than the model's context of "
                f"{self.max_length}, found {count}; leave that task out",
            )
        until = settings.get("until") or []
        stops = [until] if isinstance(until, str) else until
        prompt = self._encode(context) or [self.prefix]
        room = self.max_length - count
        ids = self.model.generate(prompt[-room:], count, set(self.source_tokenizer.end_tokens))
        return first_stop(self.model.decode(ids), [stop for stop in stops if stop])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Render messages with the model's template.

        Without the prompt for an answer, the text is open at the end of the last message.
        """
        text = self.source_tokenizer.render(chat_history, generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].rstrip()
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str:
        """Return the model's template, if one is wanted and there is one."""
        return (self.source_tokenizer.chat_template or "") if chat_template else ""

    @property
    def tokenizer_name(self) -> str:
        """What the harness names rendered prompts by."""
        return self.source_tokenizer.folder.name


def _total(score: ContinuationScore) -> float:
    """Return the log-likelihood of a whole continuation."""
    return float(score.logprobs.sum(dtype=np.float64))


def _token_limit(settings: Mapping[str, Any]) -> int:
    """Return how many tokens a task wants at most."""
    for name in TOKEN_LIMITS:
        if settings.get(name) is not None:
            return int(settings[name])
    return MAX_TOKENS
