"""What a checkpoint has to be: safe, whole, finite, and a causal language model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from quantline.errors import Failure, StageError, reading_foreign
from quantline.files import read_json
from quantline.model.architecture import Architecture, architecture_from_config
from quantline.model.checkpoint import INDEX, SINGLE, Checkpoint, inside
from quantline.model.family import FAMILIES
from quantline.text.tokenizer import SLOW_FILES, Tokenizer

CHECKED_TOKENS = 32
LOGIT_TOLERANCE = 1e-4  # of the greatest logit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, "values in config.json that a model takes")
def check_config(folder: Path, converter: str | None = None) -> Architecture:
    """Refuse what the JSON files alone forbid.

    Args:
        folder: The checkpoint.
        converter: With one, a family that has no table is admitted.

    Raises:
        StageError: custom_code, unsupported_architecture, path_escape, missing_file.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(inside(folder, name)):
            raise StageError(
                Failure.CUSTOM_CODE,
                f"{folder / name} asks for the checkpoint's own code (auto_map), which is never "
                "run; use a model that transformers knows by itself",
            )
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unnamed")
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected a trained model, found one that is quantized already ({method}); start "
            "from its full-precision source",
        )
    check_task(config)
    model_type = config.get("model_type")
    if not converter and model_type not in FAMILIES:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected model_type among {', '.join(FAMILIES)}, found {model_type!r} in "
            "config.json; take another model, or name your checkout of llama.cpp, whose "
            "converter may know it: model.converter=/path/to/llama.cpp",
        )
    return architecture_from_config(config)


def check_task(config: dict[str, Any]) -> str:
    """Return the task that optimum detects from `architectures`, which has to be text generation.

    Raises:
        StageError: unsupported_architecture.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    model_class = getattr(transformers, name, None)
    task = "unknown to transformers"
    if isinstance(model_class, type):
        try:
            task = TasksManager.infer_task_from_model(model_class)
        except ValueError:
            task = "no task that optimum knows"
    if task != "text-generation":
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            "expected the architecture of a causal language model (text-generation) in "
            f"config.json, found {name} ({task}); take a causal language model",
        )
    return task


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
    raise StageError(
        Failure.MISSING_SHARD,
        f"expected {SINGLE} or {INDEX} in {where}, found neither; fetch the checkpoint again",
    )


def check_checkpoint(folder: Path) -> dict[str, Any]:
    """Check every tensor.

    Returns:
        What the model's manifest says of it: architecture, model_type, task, parameters, dtype,
        sizes.

    Raises:
        StageError: missing_tokenizer, missing_shard (a file or a tensor),
            unsupported_architecture (names, shapes or dtypes that do not fit config.json),
            non_finite.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", *SLOW_FILES)):
        raise StageError(
            Failure.MISSING_TOKENIZER,
            f"expected tokenizer.json in {folder}, found no tokenizer; copy the one that the "
            "model was trained with into the folder",
        )
    checkpoint = Checkpoint(folder)
    arch = checkpoint.arch
    check_fit(checkpoint)
    parameters: dict[str, int] = {}
    for name in tqdm(checkpoint.names, desc="checking weights", unit="tensor", disable=None):
        dtype = checkpoint.stored_dtype(name)
        if dtype not in DTYPES:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {', '.join(DTYPES)}, found {name} in {dtype}; start from the "
                "full-precision model",
            )
        if not np.isfinite(checkpoint.raw(name)).all():
            raise StageError(
                Failure.NON_FINITE,
                f"expected finite weights, found NaN or infinity in {name} in {folder}; the "
                "training or the conversion broke",
            )
        count = int(np.prod(checkpoint.shape(name)))
        parameters[dtype] = parameters.get(dtype, 0) + count
    usual = max(sorted(parameters), key=lambda dtype: parameters[dtype])
    return {
        "architecture": checkpoint.config["architectures"][0],
        "model_type": arch.model_type,
        "task": check_task(checkpoint.config),
        "parameters": sum(parameters.values()),
        "dtype": DTYPES[usual],
        "sizes": normalized_sizes(folder, arch),
    }


def check_fit(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with the model that transformers builds from config.json.

    Raises:
        StageError: missing_shard, unsupported_architecture.
    """
    from quantline.model.empty_model import empty_model

    parameters = empty_model(checkpoint.folder).named_parameters()
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
    if head is None or head not in checkpoint:
        return
    if not np.array_equal(checkpoint.raw(head), checkpoint.raw(checkpoint.arch.embedding)):
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"config.json ties the head to the embedding, found a {head} that differs; set "
            "tie_word_embeddings to false if the head is its own",
        )


def check_blocks(checkpoint: Checkpoint) -> None:
    """Compare the logits of the run block by block with those of transformers' forward pass.

    Done for a family that has no table, so that nothing is measured on another model.

    Raises:
        StageError: unsupported_architecture, also if the logits are not finite.
    """
    import torch

    from quantline.model.block_runner import final_hidden_states, full_model_logits
    from quantline.model.output_head import OutputHead

    arch = checkpoint.arch
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, arch.vocab_size, (1, CHECKED_TOKENS)).astype(np.int32)
    try:
        wanted = full_model_logits(checkpoint, tokens)
        hidden = final_hidden_states(checkpoint, tokens, "checking blocks")
    except (
        RuntimeError,
        TypeError,
        ValueError,
        AttributeError,
        LookupError,
        NotImplementedError,
    ) as error:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"{arch.model_type} does not run block by block: {error!r}; take another model",
        ) from error
    head = OutputHead.of(checkpoint).to_torch(torch.device("cpu"))
    logits = head.logits(torch.from_numpy(hidden))
    difference = float((logits - wanted).abs().max())
    size = float(wanted.abs().max())
    if not difference <= LOGIT_TOLERANCE * size:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected the logits of {arch.model_type} run block by block to be transformers' "
            f"own, found a difference of {difference:.3g} of {size:.3g}; take another model",
        )


def check_tokenizer(folder: Path) -> None:
    """Check that every token has a row of the embedding.

    Raises:
        StageError: missing_tokenizer, tokenizer_mismatch.
    """
    rows = architecture_from_config(read_json(folder / "config.json")).vocab_size
    highest = max(Tokenizer(folder).fast.get_vocab(with_added_tokens=True).values())
    if not highest < rows:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected token ids below the embedding's {rows} rows, found {highest} in "
            "tokenizer.json; it belongs to another model",
        )


def normalized_sizes(folder: Path, arch: Architecture) -> dict[str, int]:
    """Return the sizes by optimum's names, which are one for what families call differently."""
    from optimum.utils import NormalizedConfigManager
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    normalized_class = NormalizedConfigManager.get_normalized_config_class(arch.normalized)
    normalized = normalized_class(config)
    return {
        "hidden": normalized.hidden_size,
        "layers": normalized.num_layers,
        "heads": normalized.num_attention_heads,
        "vocabulary": normalized.vocab_size,
    }


def and_more(names: list[str]) -> str:
    """Return " and 3 more", for a message that names the first of several."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
