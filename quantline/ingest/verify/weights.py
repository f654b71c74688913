"""What a checkpoint's weights have to be: safetensors, whole, finite, and those of config.json."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from quantline.errors import Failure, StageError
from quantline.ingest.verify.config import check_task
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX, SINGLE
from quantline.model.finite import all_finite
from quantline.model.model_class import class_name
from quantline.run.progress import progress
from quantline.text.tokenizer import SLOW_FILES, Tokenizer

PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WHOLE_NUMBERS = ("I64", "I32", "I16", "I8", "U8", "BOOL")  # of buffers that tables are in
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_listing(where: str, names: Iterable[str]) -> None:
    """Refuse a folder without safetensors. Raises StageError: unsafe_checkpoint, missing_shard."""
    names = sorted(names)
    if SINGLE in names or INDEX in names:
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise StageError(
            Failure.UNSAFE_CHECKPOINT,
            f"expected safetensors in {where}, found only {pickles[0]}, a pickle, which can run "
            "code when it is opened; convert it to safetensors",
        )
    others = [name for name in names if name.endswith(".safetensors")]
    advice = "fetch the checkpoint again"
    if others:
        known = {SINGLE, INDEX}
        other_case = [name for name in names if name.lower() in known]
        advice = (
            f"rename {other_case[0]}, whose case is another"
            if other_case
            else f"it has {', '.join(others[:3])}: a variant, shards without their index, or "
            "another layout; rename it or convert it to what transformers loads by itself"
        )
    raise StageError(
        Failure.MISSING_SHARD,
        f"expected {SINGLE} or {INDEX} in {where}, found neither; {advice}",
    )


def check_checkpoint(checkpoint: Checkpoint) -> dict[str, Any]:
    """Check every tensor.

    Returns:
        What the model's manifest says of it: architecture, model_type, task, parameters, dtype,
        sizes.

    Raises:
        StageError: missing_shard (a file or a tensor), unsupported_architecture (names, shapes or
            dtypes that do not fit config.json), non_finite.
    """
    arch = checkpoint.arch
    if checkpoint.structure is None:
        check_fit(checkpoint)
    else:
        for copy, name in sorted(checkpoint.structure.copies.items()):
            check_tied(checkpoint, copy, name)
    parameters: dict[str, int] = {}
    names = [*checkpoint.names, *checkpoint.passed]
    for name in progress(names, "checking weights", "tensor"):
        dtype = checkpoint.stored_dtype(name)
        if dtype in WHOLE_NUMBERS and checkpoint.structure is not None:
            continue
        if dtype not in DTYPES:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {', '.join(DTYPES)}, found {name} in {dtype}; start from the "
                "full-precision model",
            )
        if not all_finite(checkpoint.raw(name)):
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite weights, found NaN or infinity in {name} in "
                f"{checkpoint.folder}; the training or the conversion broke",
            )
        count = int(np.prod(checkpoint.shape(name)))
        parameters[dtype] = parameters.get(dtype, 0) + count
    usual = max(sorted(parameters), key=lambda dtype: parameters[dtype])
    return {
        "architecture": class_name(checkpoint.config),
        "model_type": arch.model_type,
        "task": check_task(checkpoint.config),
        "parameters": sum(parameters.values()),
        "dtype": DTYPES[usual],
        "sizes": {
            "hidden": arch.hidden_size,
            "layers": arch.layers,
            "heads": arch.heads,
            "vocabulary": arch.vocab_size,
        },
    }


def check_has_tokenizer(folder: Path) -> None:
    """Refuse a folder without a tokenizer. Raises StageError: missing_tokenizer."""
    if not any((folder / name).is_file() for name in ("tokenizer.json", *SLOW_FILES)):
        raise StageError(
            Failure.MISSING_TOKENIZER,
            f"expected tokenizer.json in {folder}, found no tokenizer; copy the one that the "
            "model was trained with into the folder",
        )


def check_fit(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with the model that transformers builds from config.json.

    Raises:
        StageError: missing_shard, unsupported_architecture.
    """
    from quantline.model.check_binding import check_prefix
    from quantline.model.empty_model import empty_model

    blocks = {checkpoint.arch.layer_index(name) for name in checkpoint.names} - {None}
    if not blocks:
        check_prefix(checkpoint.keys.values(), checkpoint.arch.family.blocks)
    # Before the model is built, which takes time and memory for every block.
    if checkpoint.arch.layers > len(blocks):
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected {checkpoint.arch.layers} blocks, as config.json asks, found tensors of "
            f"{len(blocks)} in {checkpoint.folder}; fetch the checkpoint again",
        )
    parameters = empty_model(checkpoint).named_parameters()
    wanted = {name: tuple(parameter.shape) for name, parameter in parameters}
    absent = sorted(set(wanted) - set(checkpoint.names))
    if absent:
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected {absent[0]}{and_more(absent)}, which config.json asks for, found no such "
            f"tensor in {checkpoint.folder}; fetch the checkpoint again",
        )
    strange = sorted(set(checkpoint.names) - set(wanted))
    if strange:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            "expected only tensors that config.json asks for, found "
            f"{strange[0]}{and_more(strange)} in {checkpoint.folder}; take the config.json that "
            "the weights were saved with, or another model",
        )
    for name in checkpoint.names:
        if checkpoint.shape(name) != wanted[name]:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {name} to be {wanted[name]} as config.json asks, found "
                f"{checkpoint.shape(name)}; take the config.json that the weights were saved with",
            )
    head = checkpoint.tied_head
    if head is not None and head in checkpoint:
        check_tied(checkpoint, head, checkpoint.arch.embedding)


def check_tied(checkpoint: Checkpoint, copy: str, name: str) -> None:
    """Refuse a tensor that differs from the one that config.json says it is.

    Args:
        checkpoint: The model.
        copy: The tensor that is left out.
        name: The one that it has to be equal to.

    Raises:
        StageError: unsupported_architecture.
    """
    if not np.array_equal(checkpoint.raw(copy), checkpoint.raw(name)):
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {name} and {copy} to be equal, since config.json ties them, found that "
            "they differ; set tie_word_embeddings to false if the head is its own (transformers "
            "takes it so, and warns)",
        )


def and_more(names: list[str]) -> str:
    """Return " and 3 more", for a message that names the first of several."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""


def check_tokenizer(folder: Path, vocabulary: int) -> None:
    """Check that every token has one of the embedding's rows, of which there are `vocabulary`.

    Raises:
        StageError: missing_tokenizer, tokenizer_mismatch.
    """
    rows = vocabulary
    highest = max(Tokenizer(folder).fast.get_vocab(with_added_tokens=True).values())
    if not highest < rows:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected token ids below the embedding's {rows} rows, found {highest} in "
            "tokenizer.json; it belongs to another model",
        )
