"""All quality figures of one bundle in its runtime, against the stored reference."""

import json
from pathlib import Path

from safetensors import safe_open

from quantline.metrics import gold_set as gold
from quantline.metrics.divergence import Divergence
from quantline.model.output_head import open_head
from quantline.metrics.scoring import score
from quantline.metrics.significance import compare_gold, compare_tasks
from quantline.runtimes.runtime import Runtime, pieces
from quantline.errors import Failure, StageError


def divergence(runtime: Runtime, reference: Path, first: int = 0) -> Divergence:
    """The figures of every token of the stored reference that follows position `first` of its sequence or a later one.

    Raises StageError(tokenizer_mismatch) if the vocabulary is smaller than the reference's.
    """
    collected = Divergence(open_head(reference, json.loads((reference / "reference.json").read_text(encoding="utf-8"))))
    with safe_open(reference / "hidden.safetensors", "np") as file:
        tokens, hidden = file.get_tensor("tokens"), file.get_slice("hidden")
        for rows, places, logits in pieces(runtime, tokens, first, tokens.shape[1] - 1):
            if logits.shape[-1] < len(collected.head):
                raise StageError(Failure.TOKENIZER_MISMATCH, f"expected at least {len(collected.head)} logits from "
                                                             f"{runtime.name}, found {logits.shape[-1]}")
            states, following = hidden[rows, places], tokens[rows, places.start + 1:places.stop + 1]
            collected.add(states.reshape(following.size, -1), logits.reshape(following.size, -1), following.reshape(-1))
    return collected


def measure(runtime: Runtime, reference: Path) -> tuple[dict[str, float], list[dict]]:
    """(metrics, the gold set item by item). Every runtime is fed the same token ids.

    Raises StageError: tokenizer_mismatch if the vocabulary is smaller than the reference's, non_finite.
    """
    metrics, items = divergence(runtime, reference).summary(), []
    questions = gold.read_tokenized(reference / "gold.jsonl")
    if questions:
        rows = json.loads((reference / "baseline.json").read_text(encoding="utf-8"))
        baseline, results = [gold.GoldResult(**row) for row in rows], score(runtime, questions)
        metrics |= compare_gold(baseline, results) | {"gold_tasks": compare_tasks(baseline, results)}
        metrics |= {f"gold_{task}": share for task, share in gold.accuracy(results).items() if task != "all"}
        items = [result.as_dict() | {"prompt": question.text, "reference": question.reference,
                                     "baseline_correct": base.correct, "baseline_said": base.said}
                 for question, base, result in zip(questions, baseline, results, strict=True)]
    return metrics, items
