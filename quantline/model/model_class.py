"""Which of transformers' classes a config.json names."""

from typing import Any


def class_name(config: dict[str, Any]) -> str:
    """Return the class under `architectures`, or else transformers' own for the model_type.

    That is the causal language model of the type, or else the one that reads images too.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
        MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
    )

    names = config.get("architectures")
    if names in (None, []):
        model_type = str(config.get("model_type"))
        name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(
            model_type, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(model_type, "none")
        )
        return name if isinstance(name, str) else name[0]
    return str(names[0]) if isinstance(names, list) else str(names)
