"""What config.json has to be: no code, a known quantization or none, a causal language model."""

from pathlib import Path
from typing import Any

from quantline.causes import reading_foreign
from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.ingest import dequantize
from quantline.model.checkpoint_files import INDEX, SINGLE, inside
from quantline.model.configuration import (
    CONFIG,
    read_config,
    refusal,
    transformers_config,
)
from quantline.model.configuration_limits import check_numbers
from quantline.model.find_family import family_of
from quantline.model.model_class import class_name, classes_by_task
from quantline.model.read_architecture import architecture_from_config

WITH_CODE = (CONFIG, "tokenizer_config.json", "generation_config.json")
# transformers' mapping of a task → the task's name, for those whose models write text.
TASKS = {
    "CAUSAL_LM": "text-generation",
    "IMAGE_TEXT_TO_TEXT": "image-text-to-text",
    "MULTIMODAL_LM": "any-to-any",
}
# Key of config.json → values by which transformers masks no token that follows.
BOTH_WAYS: dict[str, tuple[Any, ...]] = {
    "is_causal": (False,),
    "is_encoder_decoder": (True,),
    "use_bidirectional_attention": (True, "all"),
}


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, "values in config.json that a model takes")
def check_config(folder: Path) -> None:
    """Refuse what the JSON files of a checkpoint alone forbid.

    Raises:
        StageError: custom_code, unsupported_architecture, path_escape, missing_file.
    """
    inside(folder, CONFIG)
    config = read_config(folder)
    for name in WITH_CODE:
        if not (folder / name).is_file():
            continue
        content = read_json(inside(folder, name))
        if name == CONFIG and transformers_has(content.get("auto_map")):
            content = {key: value for key, value in content.items() if key != "auto_map"}
        if _has_key(content, "auto_map"):
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
    if family_of(config) is None:
        transformers_config(config)
    else:
        architecture_from_config(config)


def transformers_has(auto_map: Any) -> bool:
    """Whether an auto_map names only classes that transformers has under the same names.

    Models are published with the code that transformers has taken over since; that is run, and the
    checkpoint's is not.
    """
    import transformers

    if not isinstance(auto_map, dict) or not auto_map:
        return False
    for reference in auto_map.values():
        repository, _, path = str(reference).rpartition("--")
        name = path.rpartition(".")[2]
        if not isinstance(reference, str) or repository or name not in dir(transformers):
            return False
    return True


def _has_key(value: Any, key: str) -> bool:
    """Whether a JSON value has a key, at any depth."""
    if isinstance(value, dict):
        return key in value or any(_has_key(inner, key) for inner in value.values())
    return isinstance(value, list) and any(_has_key(inner, key) for inner in value)


def check_task(config: dict[str, Any]) -> str:
    """Return the task of the class that config.json names, which has to write text.

    transformers' own mapping of tasks decides, not what the class is called.

    Raises:
        StageError: unsupported_architecture.
    """
    name = class_name(config)
    tasks = classes_by_task()
    found = [task for task, classes in tasks.items() if name in classes and task != "BASE"]
    for task, words in TASKS.items():
        if task in found:
            return words
    others = [task.lower().replace("_", " ") for task in found]
    if not others:
        others = ["without an output head" if name in tasks["BASE"] else "unknown to transformers"]
    raise StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        "expected the architecture of a causal language model (text-generation) in "
        f"config.json, found {name} ({', '.join(others)}); take a causal language model",
    )


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
