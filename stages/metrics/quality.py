"""All quality figures of one bundle in its runtime, against the stored reference."""

import json
from pathlib import Path

import ml_dtypes  # noqa: F401  gives numpy the bfloat16 of the output head
import numpy as np
from safetensors import safe_open

from stages.metrics import gold
from stages.metrics.divergence import Divergence, OutputHead
from stages.metrics.scoring import score
from stages.metrics.significance import compare_gold, compare_tasks
from stages.runtimes import Runtime
from stages.tracking import Failure, StageError

CHUNK_VALUES = 1 << 25  # log-probabilities that a runtime hands over at once


def measure(runtime: Runtime, reference: Path) -> tuple[dict[str, float], list[dict]]:
    """(metrics, the gold set item by item). Every runtime is fed the same token ids.

    Raises StageError: tokenizer_mismatch if the vocabulary is smaller than the reference's, non_finite.
    """
    facts = json.loads((reference / "reference.json").read_text(encoding="utf-8"))
    with safe_open(reference / "head.safetensors", "np") as file:
        head = OutputHead(file.get_tensor("weight").astype(np.float32), facts["logit_scale"], facts["logit_softcap"])
    vocabulary = len(head.weight)
    collected = Divergence(head)
    with safe_open(reference / "hidden.safetensors", "np") as file:
        tokens, hidden = file.get_tensor("tokens"), file.get_slice("hidden")
        step = max(1, CHUNK_VALUES // (tokens.shape[1] * vocabulary))
        for start in range(0, len(tokens), step):
            part = tokens[start:start + step]
            values = runtime.logprobs(part)
            if values.shape[-1] < vocabulary:
                raise StageError(Failure.TOKENIZER_MISMATCH, f"expected at least {vocabulary} logits from "
                                                             f"{runtime.name}, found {values.shape[-1]}")
            for states, logprobs, ids in zip(hidden[start:start + len(part)], values, part, strict=True):
                collected.add(states, logprobs[:, :vocabulary], ids)
    metrics, items = collected.summary(), []
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
