"""Trying a bundle from its files: does it load, answer, and tokenize as the source does?

What the unquantized model answers is right (quantline/metrics/source_answers.py). A variant whose
weights are not rounded has to agree with it, token by token of that answer. A quantized one may say
something else, but not what no model says: nothing, where the unquantized model says something, or
one token again and again.

The export stage calls `smoke_test` in a process of its own, which native code may bring down and
which imports no more than the runtime does. So its arguments and its result are plain JSON.
"""

import time
from pathlib import Path
from typing import Any

import numpy as np

from quantline.errors import Failure, StageError
from quantline.formats.bundle.tokenizer_metadata import metadata_differences
from quantline.formats.container import load_container
from quantline.run.progress import progress
from quantline.runtimes.runtime import Runtime, ServingRuntime, open_runtime
from quantline.runtimes.smoke.tokenizer_parity import (
    TEXTS,
    compare_tokenizers,
    texts_with_added_tokens,
)
from quantline.text.tokenizer import Tokenizer
from quantline.text.transformers_tokenizer import SAMPLES

QUOTED_IDS = 12  # of each tokenizer in an error
QUOTED_CHARACTERS = 80  # of an answer in an error
# Nats within which two tokens are equally likely: 16-bit weights and kernels move them as far.
NEAR = 0.5
REPEATED = 8  # tokens that are all the same: an answer that repeats itself
# Check → what it says where it is not passed.
MEANINGS = {
    "finite": "log-probabilities are NaN or infinite",
    "non_empty": "it answers nothing, where the unquantized model answers",
    "varied": "it says one token again and again, where the unquantized model does not",
    "like_source": "its weights are not rounded, yet it does not say what the model says",
    "tokenizer_parity": "the prompt has other token ids",
    "repeatable": "it answers otherwise the second time",
    "vocabulary": "it has another number of tokens",
}


def smoke_test(
    bundle: str,
    model: str,
    format: str,
    runtime: str,
    answers: list[dict[str, Any]],
    tokens: int,
    rows: int,
    exact: bool = False,
    exact_tokenizer: bool = True,
    threads: int | None = None,
) -> dict[str, Any]:
    """Answer prompts from the files of a bundle.

    Args:
        bundle: Folder of the bundle.
        model: Folder of the unquantized model.
        format: Name of the bundle's container.
        runtime: Name of the runtime that will serve it.
        answers: The prompts with the unquantized model's answers (see `answer_prompts`).
        tokens: How many tokens to generate for each.
        rows: Height of the source's embedding, which the logits have to be as wide as.
        exact: Whether the weights are not rounded, so that the answers have to agree.
        exact_tokenizer: Whether token ids have to agree with the source's on every text that is
            tried; otherwise the texts on which they do not are reported.
        threads: Threads of the runtime; None is one per core.

    Returns:
        The content of smoke.json.

    Raises:
        StageError: tokenizer_mismatch, smoke_failed, and as `open_runtime` does.
    """
    source = Tokenizer(Path(model))
    engine = open_runtime(runtime, Path(bundle), threads)
    prompts = [answer["prompt"] for answer in answers]
    tokenizer = check_tokenizer(Path(bundle), format, engine, source, prompts, exact_tokenizer)
    traces = []
    for answer in progress(answers, "prompts", "prompt"):
        agrees = not exact_tokenizer or answer["prompt"] not in tokenizer["texts_differing"]
        traces.append(_answer(engine, answer, tokens, rows, agrees, exact))
    if traces:
        _answer_again(engine, answers, tokens, traces)
    for trace in traces:
        failed = [check for check, passed in trace["checks"].items() if not passed]
        if failed:
            raise StageError(
                Failure.SMOKE_FAILED,
                f"the prompt {trace['prompt']!r} failed {', '.join(failed)} in {runtime} "
                f"({'; '.join(MEANINGS[check] for check in failed)}): it answered "
                f"{trace['output'][:QUOTED_CHARACTERS]!r}, the unquantized model "
                f"{trace['source_output'][:QUOTED_CHARACTERS]!r}; take another runtime if the "
                "unquantized variant fails too, otherwise a recipe with more bits",
            )
    return {
        "runtime": engine.name,
        "runtime_version": engine.version,
        "device": engine.device,
        "helped": getattr(engine, "helped", None),
        "tokenizer": tokenizer,
        "passed": True,
        "prompts": traces,
    }


def _answer(
    engine: Runtime,
    source: dict[str, Any],
    tokens: int,
    rows: int,
    tokenizer_agrees: bool,
    exact: bool,
) -> dict[str, Any]:
    """Answer a prompt and check the answer; return its entry in smoke.json."""
    stop = set(source["end"])
    ids = source["ids"]
    started = time.perf_counter()
    answer = engine.generate(ids, tokens, stop)
    seconds = time.perf_counter() - started
    logprobs = engine.logprobs(np.array([ids + answer], np.int32))
    wide = logprobs.shape[-1] == rows
    distance = distance_to_source(engine, source) if wide else None
    checks = {
        "finite": bool(np.isfinite(logprobs).all()),
        "non_empty": bool(answer) or may_be_empty(source),
        "varied": not repeats(answer) or repeats(source["token_ids"]),
        "like_source": not exact or distance is None or distance <= NEAR,
        "tokenizer_parity": tokenizer_agrees,
        "vocabulary": wide,
    }
    return {
        "prompt": source["prompt"],
        "output": engine.decode(answer),
        "token_ids": answer,
        "source_output": source["output"],
        "source_distance": _for_json(distance),
        "seconds": round(seconds, 4),
        "checks": checks,
        "passed": all(checks.values()),
    }


def _answer_again(
    engine: Runtime, answers: list[dict[str, Any]], tokens: int, traces: list[dict[str, Any]]
) -> None:
    """Give the longest of the answers once more, and check that it is the same.

    A runtime whose bits change shows it there first, and the others take as long again.
    """
    longest = max(range(len(traces)), key=lambda index: len(traces[index]["token_ids"]))
    source, trace = answers[longest], traces[longest]
    again = engine.generate(source["ids"], tokens, set(source["end"]))
    trace["checks"]["repeatable"] = again == trace["token_ids"]
    trace["passed"] = all(trace["checks"].values())


def may_be_empty(source: dict[str, Any]) -> bool:
    """Whether the unquantized model answers nothing, or might as well."""
    gap = source["end_gap"]
    return not source["token_ids"] or (gap is not None and gap <= NEAR)


def repeats(token_ids: list[int]) -> bool:
    """Whether an answer is one token again and again."""
    return len(token_ids) >= REPEATED and len(set(token_ids)) == 1


def distance_to_source(engine: Runtime, source: dict[str, Any]) -> float | None:
    """Return by how many nats a bundle likes other tokens more than those of the source's answer.

    Returns:
        The largest of all tokens, with the one that ended the answer; 0 where each is the bundle's
        own choice. None where the source neither said anything nor ended. NaN where the bundle's
        probabilities are.
    """
    wanted = [*source["token_ids"], *([source["ended"]] if source["ended"] is not None else [])]
    if not wanted:
        return None
    ids = source["ids"]
    logprobs = engine.logprobs(np.array([ids + wanted[:-1]], np.int32))[0, len(ids) - 1 :]
    likelihoods = logprobs[np.arange(len(wanted)), wanted]
    return float((logprobs.max(-1) - likelihoods).max())


def _for_json(value: float | None) -> float | None:
    """Return a number that JSON holds; None for NaN and infinity."""
    return round(value, 4) if value is not None and np.isfinite(value) else None


def check_tokenizer(
    bundle: Path,
    format: str,
    engine: Runtime,
    source: Tokenizer,
    prompts: list[str],
    exact: bool,
) -> dict[str, Any]:
    """Compare special tokens, chat template and token ids with the source's.

    Args:
        bundle: Folder of the bundle.
        format: Name of its container.
        engine: The bundle in its runtime.
        source: Tokenizer of the unquantized model.
        prompts: Texts to compare ids on, besides those that are always compared.
        exact: Whether all ids have to agree.

    Returns:
        The entry `tokenizer` of smoke.json.

    Raises:
        StageError: tokenizer_mismatch.
    """
    differences = metadata_differences(load_container(format), bundle, source)
    for key, (expected, found) in differences.items():
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected {key} {expected!r} in the bundle, found {found!r}; choose another format",
        )
    texts = (*prompts, *TEXTS, *texts_with_added_tokens(source))
    parity = compare_tokenizers(engine, source, texts)
    if parity.differing and exact:
        text = parity.differing[0]
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected the source's token ids, found others in {len(parity.differing)} of "
            f"{parity.compared} texts, such as {text!r}: {engine.encode(text)[:QUOTED_IDS]} "
            f"instead of {source.encode(text)[:QUOTED_IDS]}; choose another format, or tokenizer: "
            "report if such text is none of yours",
        )
    _check_serving(engine, source)
    return {
        "texts_compared": parity.compared,
        "texts_given": len(texts),
        "texts_differing": parity.differing,
        "special_tokens": True,
        "chat_template": source.chat_template is not None,
        "ends": source.end_tokens,
    }


def _check_serving(engine: Runtime, source: Tokenizer) -> None:
    """Check that the runtime by itself begins texts, and ends them, as the source does.

    Raises:
        StageError: tokenizer_mismatch.
    """
    if not isinstance(engine, ServingRuntime):
        return
    for token in source.end_tokens:
        if not engine.stops_at(token):
            text = source.fast.id_to_token(token)
            raise StageError(
                Failure.TOKENIZER_MISMATCH,
                f"expected {engine.name} to end a text at {text!r} ({token}), as the source does, "
                "found that it goes on; choose another format",
            )
    special = source.specials
    text = next((text for text in SAMPLES if engine.encode(text)), "")
    expected = special.begin + engine.encode(text) + special.finish
    if engine.encode_whole(text) != expected:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected {engine.name} to put {special.begin} before and {special.finish} behind a "
            f"text, found {engine.encode_whole(text)} in place of {expected} for {text!r}; choose "
            "another format",
        )
