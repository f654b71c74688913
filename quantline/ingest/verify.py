"""What a checkpoint must be before anything else reads it: safe, a causal language model, whole, and finite."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from quantline.model.architecture import Architecture, from_config
from quantline.model.families import FAMILIES
from quantline.model.checkpoint import INDEX, SINGLE, Checkpoint, inside, read_json
from quantline.text.tokenizer import SLOW, Tokenizer
from quantline.errors import Failure, StageError

CHECKED_TOKENS, LOGIT_ROOM = 32, 1e-4  # of the greatest logit
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def check_config(folder: Path, converter: str | None = None) -> Architecture:
    """Refuse what the JSON files alone forbid; without a `converter`, also a family that has no table.

    Raises StageError: custom_code, unsupported_architecture, path_escape, missing_file.
    """
    for name in ("config.json", "tokenizer_config.json"):
        if (folder / name).is_file() and "auto_map" in read_json(inside(folder, name)):
            raise StageError(Failure.CUSTOM_CODE, f"{folder / name} asks for the checkpoint's own code (auto_map), which "
                                                  "is never run; use a model that transformers knows by itself")
    config = read_json(folder / "config.json")
    if config.get("quantization_config"):
        method = dict(config["quantization_config"]).get("quant_method", "unnamed")
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected a trained model, found one that is quantized "
                                                           f"already ({method}); start from its full-precision source")
    task_of(config)
    if not converter and (name := config.get("model_type")) not in FAMILIES:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected model_type among {', '.join(FAMILIES)}, found {name!r} "
                         "in config.json; take another model, or name your checkout of llama.cpp, whose converter may know "
                         "it: model.converter=/path/to/llama.cpp")
    return from_config(config)


def task_of(config: dict) -> str:
    """The task that optimum detects from the class in `architectures`, which has to be text generation."""
    import transformers
    from optimum.exporters.tasks import TasksManager

    names = config.get("architectures")
    name = str(names[0]) if isinstance(names, list) and names else "none"
    task, model_class = "unknown to transformers", getattr(transformers, name, None)
    if isinstance(model_class, type):
        try:
            task = TasksManager.infer_task_from_model(model_class)
        except ValueError:
            task = "no task that optimum knows"
    if task != "text-generation":
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected the architecture of a causal language model "
                                                           f"(text-generation) in config.json, found {name} ({task})")
    return task


def check_listing(where: str, names: Iterable[str]) -> None:
    """Refuse a folder without safetensors. Raises StageError: unsafe_checkpoint, missing_shard."""
    names = sorted(names)
    if SINGLE in names or INDEX in names:
        return
    pickles = [name for name in names if name.endswith(PICKLES)]
    if pickles:
        raise StageError(Failure.UNSAFE_CHECKPOINT, f"expected safetensors in {where}, found only {pickles[0]}, a pickle, "
                                                    "which can run code when it is opened; convert it to safetensors")
    raise StageError(Failure.MISSING_SHARD, f"expected {SINGLE} or {INDEX} in {where}, found neither")


def check_whole(folder: Path) -> dict[str, Any]:
    """Check every tensor; return facts for the manifest.

    Raises StageError: missing_tokenizer, missing_shard (a file or a tensor), unsupported_architecture (names, shapes or
    dtypes that do not fit config.json), non_finite.
    """
    if not any((folder / name).is_file() for name in ("tokenizer.json", *SLOW)):
        raise StageError(Failure.MISSING_TOKENIZER, f"expected tokenizer.json in {folder}, found no tokenizer; copy the "
                                                    "one that the model was trained with into the folder")
    checkpoint = Checkpoint(folder)
    facts = from_config(checkpoint.config)
    check_fit(checkpoint)
    dtypes: dict[str, int] = {}
    for name in tqdm(checkpoint.names, desc="checking weights", unit="tensor", disable=None):
        dtype = checkpoint.stored_dtype(name)
        if dtype not in DTYPES:
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected {', '.join(DTYPES)}, found {name} in {dtype}; "
                                                               "start from the full-precision model")
        if not np.isfinite(checkpoint.raw(name)).all():
            raise StageError(Failure.NON_FINITE, f"expected finite weights, found NaN or infinity in {name} in {folder}; "
                                                 "the training or the conversion broke")
        dtypes[dtype] = dtypes.get(dtype, 0) + int(np.prod(checkpoint.shape(name)))
    return {"architecture": checkpoint.config["architectures"][0], "model_type": facts.model_type,
            "task": task_of(checkpoint.config), "parameters": sum(dtypes.values()),
            "dtype": DTYPES[max(sorted(dtypes), key=dtypes.get)], "sizes": sizes(folder, facts)}


def check_fit(checkpoint: Checkpoint) -> None:
    """Hold names and shapes against the model that transformers builds from config.json."""
    from quantline.model.empty_model import empty_model

    wanted = {name: tuple(one.shape) for name, one in empty_model(checkpoint.folder).named_parameters()}
    absent = sorted(set(wanted) - set(checkpoint.names))
    if absent:
        raise StageError(Failure.MISSING_SHARD, f"expected {absent[0]}{more(absent)}, which config.json asks for, found no "
                                                f"such tensor in {checkpoint.folder}; fetch the checkpoint again")
    strange = sorted(set(checkpoint.names) - set(wanted))
    if strange:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected only tensors that config.json asks for, found "
                                                           f"{strange[0]}{more(strange)} in {checkpoint.folder}")
    for name in checkpoint.names:
        if checkpoint.shape(name) != wanted[name]:
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected {name} to be {wanted[name]} as config.json asks, "
                                                               f"found {checkpoint.shape(name)}")
    facts = from_config(checkpoint.config)
    head = checkpoint.tied_head
    if head in checkpoint.files and not np.array_equal(checkpoint.raw(head), checkpoint.raw(facts.embedding)):
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"config.json ties the head to the embedding, found a "
                         f"{head} that differs; set tie_word_embeddings to false if the head is its own")


def check_blocks(checkpoint: Checkpoint) -> None:
    """Hold the logits of the run block by block against those of transformers' own forward pass, in which a block's weights
    are loaded only while it runs: for a family that has no table, so that nothing is measured on another model.

    Raises StageError(unsupported_architecture), also if they are not finite.
    """
    import torch

    from quantline.model.block_runner import run_blocks, whole_logits

    facts = from_config(checkpoint.config)
    tokens = np.random.default_rng(0).integers(0, facts.vocab_size, (1, CHECKED_TOKENS)).astype(np.int32)
    try:
        wanted, hidden = whole_logits(checkpoint, tokens), run_blocks(checkpoint, tokens, "checking blocks")
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError, NotImplementedError) as error:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"{facts.model_type} does not run block by block: {error!r}; "
                                                           "take another model") from error
    found = torch.from_numpy(hidden) @ torch.from_numpy(checkpoint.tensor(facts.head)).T * facts.logit_scale
    if facts.logit_softcap:
        found = torch.tanh(found / facts.logit_softcap) * facts.logit_softcap
    difference, size = float((found - wanted).abs().max()), float(wanted.abs().max())
    if not difference <= LOGIT_ROOM * size:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected the logits of {facts.model_type} run block by block to "
                         f"be transformers' own, found a difference of {difference:.3g} of {size:.3g}; take another model")


def check_tokenizer(folder: Path) -> None:
    """Every token needs a row of the embedding. Raises StageError: missing_tokenizer, tokenizer_mismatch."""
    rows = from_config(read_json(folder / "config.json")).vocab_size
    highest = max(Tokenizer(folder).fast.get_vocab(with_added_tokens=True).values())
    if not highest < rows:
        raise StageError(Failure.TOKENIZER_MISMATCH, f"expected token ids below the embedding's {rows} rows, found "
                                                     f"{highest} in tokenizer.json; it belongs to another model")


def sizes(folder: Path, facts: Architecture) -> dict[str, int]:
    """The sizes by optimum's normalized configuration, which has one name for what families call differently."""
    from optimum.utils import NormalizedConfigManager
    from transformers import AutoConfig

    one = NormalizedConfigManager.get_normalized_config_class(facts.normalized)(
        AutoConfig.from_pretrained(folder, trust_remote_code=False))
    return {"hidden": one.hidden_size, "layers": one.num_layers, "heads": one.num_attention_heads,
            "vocabulary": one.vocab_size}


def more(names: list[str]) -> str:
    """" and 3 more" after the first of several names."""
    return f" and {len(names) - 1} more" if len(names) > 1 else ""
