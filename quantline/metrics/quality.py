"""All quality figures of one bundle in its runtime, against the stored reference."""

from contextlib import ExitStack
from pathlib import Path
from typing import Any

from safetensors import safe_open

from quantline.errors import Failure, StageError
from quantline.files import read_json, read_json_list
from quantline.metrics.divergence import DivergenceCollector
from quantline.metrics.gold_set import GoldResult, accuracy, read_tokenized
from quantline.metrics.scoring import score_items
from quantline.metrics.significance import compare_gold, compare_tasks
from quantline.model.output_head import open_head
from quantline.run.progress import counting
from quantline.runtimes.runtime import Runtime, logit_chunks


def measure_divergence(runtime: Runtime, reference: Path, first: int = 0) -> DivergenceCollector:
    """Compare a runtime's distributions with those of the stored reference, token by token.

    Args:
        runtime: With the bundle loaded.
        reference: The reference stage's folder.
        first: Position in each sequence after which tokens count.

    Raises:
        StageError: tokenizer_mismatch, if the vocabulary is smaller than the reference's.
    """
    collector = DivergenceCollector(open_head(reference, read_json(reference / "reference.json")))
    vocabulary = len(collector.head)
    with safe_open(reference / "hidden.safetensors", "np") as file, ExitStack() as watching:
        tokens = file.get_tensor("tokens")
        hidden = file.get_slice("hidden")
        end = tokens.shape[1] - 1
        chunks = logit_chunks(runtime, tokens, first, end)
        advance = watching.enter_context(
            counting("divergence", "token", len(tokens) * (end - first))
        )
        for rows, positions, logits in chunks:
            if logits.shape[-1] < vocabulary:
                raise StageError(
                    Failure.TOKENIZER_MISMATCH,
                    f"expected at least {vocabulary} logits from {runtime.name}, found "
                    f"{logits.shape[-1]}; export the variant again",
                )
            states = hidden[rows, positions]
            following = tokens[rows, positions.start + 1 : positions.stop + 1]
            count = following.size
            collector.add(
                states.reshape(count, -1), logits.reshape(count, -1), following.reshape(-1)
            )
            advance(count)
    return collector


def measure_quality(
    runtime: Runtime, reference: Path
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Measure all quality figures. Every runtime is fed the same token ids.

    Args:
        runtime: With the bundle loaded.
        reference: The reference stage's folder.

    Returns:
        The figures, and the gold set item by item with the unquantized model's answers.

    Raises:
        StageError: tokenizer_mismatch, if the vocabulary is smaller than the reference's;
            non_finite.
    """
    figures: dict[str, Any] = dict(measure_divergence(runtime, reference).summary())
    questions = read_tokenized(reference / "gold.jsonl")
    if not questions:
        return figures, []
    baseline = [GoldResult(**row) for row in read_json_list(reference / "baseline.json")]
    results = score_items(runtime, questions)
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
