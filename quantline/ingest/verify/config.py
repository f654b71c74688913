"""What config.json has to be: no code, a known quantization or none, a causal language model."""

from pathlib import Path
from typing import Any

from quantline.causes import raise_if_of_machine, reading_foreign
from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.ingest import dequantize
from quantline.model.architecture import Architecture
from quantline.model.checkpoint_files import INDEX, SINGLE, inside
from quantline.model.configuration import CONFIG, read_config, refusal
from quantline.model.configuration_limits import check_numbers
from quantline.model.family import FAMILIES
from quantline.model.read_architecture import architecture_from_config

WITH_CODE = (CONFIG, "tokenizer_config.json", "generation_config.json")
# Key of config.json → values by which transformers masks no token that follows.
BOTH_WAYS: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "use_bidirectional_attention": (True, "all"),
}


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
    dequantize.check(config)
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
            "config.json; take another model, or model.converter=auto",
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
        raise_if_of_machine(error)
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
