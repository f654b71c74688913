"""The stored reference that variants are measured against: the library call of a stage.

Stored are the final hidden states on the evaluation text and the output head, from which the exact
distribution after each token is rebuilt, at a fraction of the size of logits; and the gold set with
the unquantized model's answers.
"""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from quantline.calibration.store import CalibrationStore
from quantline.config.texts import Text
from quantline.errors import Failure, StageError
from quantline.files import sha256_file, versions, write_json, write_tensors, write_text
from quantline.metrics.baseline import UnquantizedModel, perplexity
from quantline.metrics.gold_items import GoldItem, load_gold, prompts_of
from quantline.metrics.gold_set import accuracy
from quantline.metrics.gold_tokens import tokenize_items
from quantline.metrics.scoring import score_items
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from quantline.model.output_head import FILE, OutputHead
from quantline.model.positions import check_item_lengths, check_length, learned_positions
from quantline.model.read_architecture import copy_description
from quantline.text.disjoint import Allowed, check_disjoint
from quantline.text.documents import (
    Document,
    pin_revision,
    read_documents,
    sha256_documents,
)
from quantline.text.tokenizer import Tokenizer


def make_reference(
    model_folder: Path,
    calibration_folder: Path,
    calibration: Text,
    evaluation: Text,
    gold: Path | None,
    folder: Path,
    allow_overlap: Allowed = False,
) -> dict[str, Any]:
    """Run the unquantized model on the evaluation text and the gold set, and store the results.

    Args:
        model_folder: What the stage `load` made.
        calibration_folder: What the stage `calibrate` made.
        calibration: The text that was calibrated on, which must share no document with the others.
        evaluation: The text to measure on.
        gold: The gold set, if there is one.
        folder: Where hidden.safetensors, head.safetensors, gold.jsonl, baseline.json,
            reference.json and the model's config.json are written.
        allow_overlap: Ids of gold items and documents that may stand in other texts too; True for
            all.

    Returns:
        The content of reference.json.

    Raises:
        StageError: dataset_invalid, texts_overlap, artifact_changed, non_finite,
            network_unavailable.
    """
    evaluation = pin_revision(evaluation)
    checkpoint = Checkpoint(model_folder)
    arch = checkpoint.arch
    check_length(arch, "evaluation.length", evaluation.length)
    tokenizer = Tokenizer(model_folder)
    documents = read_documents(evaluation)
    questions = load_gold(gold) if gold else []
    items = tokenize_items(questions, tokenizer)
    labels = [question.label for question in questions]
    check_item_lengths(arch, dict(zip(labels, (item.longest for item in items), strict=True)))
    overlaps = check_texts(calibration_folder, calibration, documents, questions, allow_overlap)

    tokens = tokenizer.pack(documents, evaluation.sequences, evaluation.length)
    hidden = final_hidden_states(checkpoint, tokens, "reference")
    head = OutputHead.of(checkpoint)
    baseline = []
    if items:
        baseline = score_items(UnquantizedModel(checkpoint, head, tokenizer, items), items)
    info = {
        "head": arch.head,
        "logit_scale": arch.logit_scale,
        "logit_softcap": arch.logit_softcap,
        "positions": learned_positions(arch),
        "dataset_revision": evaluation.dataset_revision,
        "tokens": int(tokens.size),
        "text_sha256": sha256_documents(documents),
        "gold_sha256": sha256_file(gold) if gold else None,
        "gold_items": len(items),
        "allowed_overlaps": overlaps,
        "gold_accuracy": accuracy(baseline),
        "perplexity": perplexity(head, hidden, tokens),
        "versions": versions("torch", "transformers", "tokenizers"),
    }
    write_reference(folder, checkpoint, tokens, hidden)
    copy_description(model_folder, folder)
    lines = [json.dumps(asdict(item)) + "\n" for item in items]
    write_text(folder / "gold.jsonl", "".join(lines))
    write_json(folder / "baseline.json", [result.as_dict() for result in baseline])
    write_json(folder / "reference.json", info)
    return info


def write_reference(
    folder: Path, checkpoint: Checkpoint, tokens: np.ndarray, hidden: np.ndarray
) -> None:
    """Write what the distribution after each token is rebuilt from.

    Args:
        folder: Where hidden.safetensors and head.safetensors are written.
        checkpoint: The unquantized model, whose head is stored as it is there.
        tokens: int32 [n, length].
        hidden: Its final hidden states, float32 [n, length, D].
    """
    head = {"weight": checkpoint.raw(checkpoint.arch.head)}
    bias = checkpoint.optional(checkpoint.arch.head_bias)
    if bias is not None:
        head["bias"] = bias
    write_tensors(folder / "hidden.safetensors", {"hidden": hidden, "tokens": tokens})
    write_tensors(folder / FILE, head)


def check_texts(
    calibration_folder: Path,
    calibration: Text,
    documents: list[Document],
    questions: list[GoldItem],
    allowed: Allowed = False,
) -> list[str]:
    """Check that the texts are disjoint, and that the calibration text has not changed since.

    Args:
        calibration_folder: What the stage `calibrate` made.
        calibration: The calibration text, as params.yaml names it.
        documents: Of the evaluation text.
        questions: The gold set.
        allowed: Ids that may overlap; True for all.

    Returns:
        The ids that overlap and are allowed.

    Raises:
        StageError: texts_overlap, artifact_changed, config_invalid.
    """
    info = CalibrationStore(calibration_folder).info
    text = calibration.model_copy(update={"dataset_revision": info["dataset_revision"]})
    calibrated_on = read_documents(text)
    if sha256_documents(calibrated_on) != info["text_sha256"]:
        raise StageError(
            Failure.ARTIFACT_CHANGED,
            f"expected the calibration text that {calibration_folder} was made from, found "
            f"another in {text.path or text.dataset}; run calibrate again",
        )
    return check_disjoint(calibrated_on, documents, prompts_of(questions), allowed)
