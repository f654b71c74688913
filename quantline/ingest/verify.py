"""What a checkpoint has to be: safe, whole, finite, and a causal language model."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from quantline.errors import Failure, StageError, pass_on, reading_foreign
from quantline.files import read_json
from quantline.model.architecture import Architecture
from quantline.model.checkpoint import Checkpoint
from quantline.model.checkpoint_files import INDEX, SINGLE, inside
from quantline.model.configuration import (
    CONFIG,
    read_config,
    read_configuration,
    refusal,
    transformers_config,
)
from quantline.model.configuration_limits import check_numbers
from quantline.model.family import FAMILIES
from quantline.model.read_architecture import architecture_from_config
from quantline.text.tokenizer import SLOW_FILES, Tokenizer

CHECKED_TOKENS = 32
LOGIT_TOLERANCE = 1e-4  # of the greatest logit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
WITH_CODE = (CONFIG, "tokenizer_config.json", "generation_config.json")
# Key of config.json → values by which transformers masks no token that follows.
BOTH_WAYS: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "use_bidirectional_attention": (True, "all"),
}
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
    inside(folder, CONFIG)
    config = read_config(folder)
    for name in WITH_CODE:
        if (folder / name).is_file() and _has_key(read_json(inside(folder, name)), "auto_map"):
            raise StageError(
                Failure.CUSTOM_CODE,
                f"{folder / name} asks for the checkpoint's own code (auto_map), which is never "
                "run; use a model that transformers knows by itself",
            )
    for key in ("quantization_config", "compression_config"):
        settings = config.get(key)
        if settings:
            known = settings if isinstance(settings, dict) else {}
            method = known.get("quant_method", "unnamed")
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected a trained model, found {key} ({method}) in {CONFIG}: it is quantized "
                "already; start from its full-precision source",
            )
    named = config.get("transformers_weights")
    if named not in (None, SINGLE, INDEX):
        raise refusal("transformers_weights", f"{SINGLE} or {INDEX}", repr(named))
    check_numbers(config)
    check_task(config)
    check_causal(config)
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or (not converter and model_type not in FAMILIES):
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected model_type among {', '.join(FAMILIES)}, found {model_type!r} in "
            "config.json; take another model, or name your checkout of llama.cpp, whose "
            "converter may know it: model.converter=/path/to/llama.cpp",
        )
    return architecture_from_config(config)


def _has_key(value: Any, key: str) -> bool:
    """Whether a JSON value has a key, at any depth."""
    if isinstance(value, dict):
        return key in value or any(_has_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_has_key(inner, key) for inner in value)


def class_name(config: dict[str, Any]) -> str:
    """Return the class that a config.json names, or else transformers' own for its model_type."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    names = config.get("architectures")
    if names in (None, []):
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(str(config.get("model_type")), "none")
        return name if isinstance(name, str) else name[0]
    return str(names[0]) if isinstance(names, list) else str(names)


def check_task(config: dict[str, Any]) -> str:
    """Return the task that optimum detects from the class, which has to be text generation.

    Raises:
        StageError: unsupported_architecture.
    """
    import transformers
    from optimum.exporters.tasks import TasksManager

    name = class_name(config)
    try:
        model_class = getattr(transformers, name, None)
    except Exception as error:  # modules that transformers imports for a name fail in any way
        pass_on(error)
        model_class = None
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


def check_causal(config: dict[str, Any]) -> None:
    """Refuse a model whose tokens see those that follow, which no runtime generates text with.

    Raises:
        StageError: unsupported_architecture, naming the key.
    """
    for key, both_ways in BOTH_WAYS.items():
        if config.get(key) in both_ways:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected a causal language model, found {key} {config[key]!r} in {CONFIG}: its "
                "tokens see those that follow, as those of embedding models do; take a causal one",
            )


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
        "architecture": class_name(checkpoint.config),
        "model_type": arch.model_type,
        "task": check_task(checkpoint.config),
        "parameters": sum(parameters.values()),
        "dtype": DTYPES[usual],
        "sizes": normalized_sizes(checkpoint.config, arch),
    }


def check_fit(checkpoint: Checkpoint) -> None:
    """Compare names and shapes with the model that transformers builds from config.json.

    Raises:
        StageError: missing_shard, unsupported_architecture.
    """
    from quantline.model.empty_model import empty_model

    blocks = {checkpoint.arch.layer_index(name) for name in checkpoint.names} - {None}
    # Before the model is built, which takes time and memory for every block.
    if checkpoint.arch.layers > len(blocks):
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected {checkpoint.arch.layers} blocks, as config.json asks, found tensors of "
            f"{len(blocks)} in {checkpoint.folder}; fetch the checkpoint again",
        )
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
            f"expected {checkpoint.arch.embedding} and {head} to be equal, since config.json ties "
            "them, found that they differ; set tie_word_embeddings to false if the head is its own "
            "(transformers takes it so, and warns)",
        )


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, f"a {CONFIG} that transformers' own model runs")
def check_runs(checkpoint: Checkpoint) -> None:
    """Refuse what transformers builds and cannot run, such as an unknown kind of attention.

    Raises:
        StageError: unsupported_architecture.
    """
    from quantline.model.block_runner import prepare_blocks

    prepare_blocks(checkpoint)


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
    rows = read_configuration(folder)["vocab_size"]
    highest = max(Tokenizer(folder).fast.get_vocab(with_added_tokens=True).values())
    if not highest < rows:
        raise StageError(
            Failure.TOKENIZER_MISMATCH,
            f"expected token ids below the embedding's {rows} rows, found {highest} in "
            "tokenizer.json; it belongs to another model",
        )


def normalized_sizes(config: dict[str, Any], arch: Architecture) -> dict[str, int]:
    """Return the sizes by optimum's names, which are one for what families call differently."""
    from optimum.utils import NormalizedConfigManager

    normalized_class = NormalizedConfigManager.get_normalized_config_class(arch.normalized)
    normalized = normalized_class(transformers_config(config))
    return {
        "hidden": normalized.hidden_size,
        "layers": normalized.num_layers,
        "heads": normalized.num_attention_heads,
        "vocabulary": normalized.vocab_size,
    }


def and_more(names: list[str]) -> str:
    """Return " and 3 more", for a message that names the first of several."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
