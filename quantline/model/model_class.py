"""Which of transformers' classes a config.json names."""

from collections.abc import Mapping
from functools import cache
from typing import Any


def class_name(config: dict[str, Any]) -> str:
    """Return the class under `architectures`, or else transformers' own for the model_type.

    Of several it is the first that transformers knows, as for its own AutoModel. The class of the
    type is its causal language model, or else the one that reads images too.
    """
    names = config.get("architectures")
    if names in (None, []):
        return _class_of_type(str(config.get("model_type")))
    if not isinstance(names, list):
        return str(names)
    if len(names) > 1:
        known = frozenset[str]().union(*classes_by_task().values())
        found = [name for name in names if isinstance(name, str) and name in known]
        return found[0] if found else ", ".join(map(str, names))
    return str(names[0])


def _class_of_type(model_type: str) -> str:
    """Return the class that transformers takes for a model_type."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(
        model_type, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, "none")
    )
    return name if isinstance(name, str) else name[0]


@cache
def classes_by_task() -> dict[str, frozenset[str]]:
    """Return the names of transformers' classes by their task, BASE for models without a head."""
    from transformers.models.auto import modeling_auto

    tasks = {
        mapping.removeprefix("MODEL_FOR_").removesuffix("_MAPPING_NAMES"): _names(classes)
        for mapping, classes in vars(modeling_auto).items()
        if mapping.startswith("MODEL_FOR_") and mapping.endswith("_MAPPING_NAMES")
    }
    return tasks | {"BASE": _names(modeling_auto.MODEL_MAPPING_NAMES)}


def _names(mapping: Mapping[str, Any]) -> frozenset[str]:
    """Return the names of the classes of one of transformers' mappings."""
    names: set[str] = set()
    for value in mapping.values():
        names.update([value] if isinstance(value, str) else value)
    return frozenset(names)
