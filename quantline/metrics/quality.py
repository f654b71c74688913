"""All quality figures of one bundle in its runtime, against the stored reference."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import safe_open

from quantline.errors import Failure, StageError
from quantline.files import read_json, read_json_list
from quantline.metrics.divergence import DivergenceCollector, summarize
from quantline.metrics.gold_set import GoldResult, accuracy, read_tokenized
from quantline.metrics.scoring import score_items
from quantline.metrics.significance import compare_gold, compare_tasks
from quantline.metrics.token_values import TokenValues
from quantline.model.output_head import open_head
from quantline.run.progress import counting
from quantline.runtimes.runtime import Runtime, logit_chunks, sequences_at_once

WHOLE = (0, 1)  # the first and only part of a text


def measure_divergence(
    runtime: Runtime,
    reference: Path,
    first: int = 0,
    part: tuple[int, int] = WHOLE,
    threads: int | None = None,
) -> DivergenceCollector:
    """Compare a runtime's distributions with those of the stored reference, token by token.

    Args:
        runtime: With the bundle loaded.
        reference: The reference stage's folder.
        first: Position in each sequence after which tokens count.
        part: Its number, and of how many: each has whole batches of the runtime, so that its
            tokens have the values that they have in the whole text.
        threads: That compare; None is one per core.

    Raises:
        StageError: tokenizer_mismatch, if the vocabulary is smaller than the reference's.
    """
    head = open_head(reference, read_json(reference / "reference.json"))
    collector = DivergenceCollector(head, threads)
    vocabulary = len(collector.head)
    with safe_open(reference / "hidden.safetensors", "np") as file, ExitStack() as watching:
        tokens = file.get_tensor("tokens")
        hidden = file.get_slice("hidden")
        length = tokens.shape[1]
        start, stop = rows_of_part(len(tokens), sequences_at_once(runtime, length), part)
        end = length - 1
        own = tokens[start:stop]
        chunks = logit_chunks(runtime, own, first, end) if len(own) else ()
        advance = watching.enter_context(counting("divergence", "token", len(own) * (end - first)))
        for rows, positions, logits in chunks:
            _check_logits(runtime, logits, vocabulary)
            states = hidden[rows.start + start : rows.stop + start, positions]
            following = own[rows, positions.start + 1 : positions.stop + 1]
            count = following.size
            where = np.arange(own.size).reshape(own.shape)[rows, positions]
            collector.add(
                states.reshape(count, -1),
                logits.reshape(count, -1),
                following.reshape(-1),
                where.reshape(-1),
            )
            advance(count)
    return collector


def check_vocabulary(runtime: Runtime, reference: Path) -> None:
    """Check that a runtime's vocabulary is not smaller than the reference's.

    Raises:
        StageError: tokenizer_mismatch.
    """
    head = open_head(reference, read_json(reference / "reference.json"))
    _check_logits(runtime, runtime.logprobs(np.zeros((1, 1), np.int32)), len(head))


def _check_logits(runtime: Runtime, logits: np.ndarray, vocabulary: int) -> None:
    if logits.shape[-1] < vocabulary:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected at least {vocabulary} logits from {runtime.name}, found "
            f"{logits.shape[-1]}; export the variant again",
        )


def rows_of_part(count: int, together: int, part: tuple[int, int]) -> tuple[int, int]:
    """Return the first sequence of a part and the one before which it ends.

    Args:
        count: Sequences of the text.
        together: Sequences in a batch, which no part divides.
        part: Its number, and of how many.
    """
    number, parts = part
    batches = -(-count // together)
    first, last = (batches * bound // parts for bound in (number, number + 1))
    return min(count, first * together), min(count, last * together)


def measure_questions(runtime: Runtime, reference: Path) -> list[GoldResult]:
    """Ask a runtime the gold set, which may be empty.

    Raises:
        StageError: non_finite.
    """
    questions = read_tokenized(reference / "gold.jsonl")
    return score_items(runtime, questions) if questions else []


def measure_quality(
    runtime: Runtime, reference: Path, threads: int | None = None
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure all quality figures. Every runtime is fed the same token ids.

    Args:
        runtime: With the bundle loaded.
        reference: The reference stage's folder.
        threads: That compare; None is one per core.

    Returns:
        As `quality_figures` does.

    Raises:
        StageError: tokenizer_mismatch, if the vocabulary is smaller than the reference's;
            non_finite.
    """
    tokens = measure_divergence(runtime, reference, threads=threads).values()
    return quality_figures(tokens, measure_questions(runtime, reference), reference)


def quality_figures(
    tokens: TokenValues, results: list[GoldResult], reference: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Make figures of what was measured.

    Args:
        tokens: Of the whole evaluation text, in order.
        results: Of the gold set, in order.
        reference: The reference stage's folder.

    Returns:
        The figures, and the gold set item by item with the unquantized model's answers.

    Raises:
        StageError: non_finite.
    """
    figures: dict[str, Any] = dict(summarize(tokens))
    questions = read_tokenized(reference / "gold.jsonl")
    if not questions:
        return figures, []
    baseline = [GoldResult(**row) for row in read_json_list(reference / "baseline.json")]
    figures |= compare_gold(baseline, results)
    figures["gold_tasks"] = compare_tasks(baseline, results)
    for task, share in accuracy(results).items():
        if task != "all":
            figures[f"gold_{task}"] = share
    items = []
    for question, before, result in zip(questions, baseline, results, strict=True):
        items.append(
            result.as_dict()
            | {
                "prompt": question.text,
                "reference": question.reference,
                "baseline_correct": before.correct,
                "baseline_said": before.said,
            }
        )
    return figures, items
