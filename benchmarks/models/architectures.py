"""The architectures that the installed transformers can load as a language model.

They are its own mappings: a new release shows its new names by itself.
"""

from typing import Any, NamedTuple

# Rotary embeddings as published checkpoints have them, on the plainest model that takes them.
YARN = {
    "rope_type": "yarn",
    "rope_theta": 1e6,
    "factor": 4.0,
    "original_max_position_embeddings": 128,
}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 5e5,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 128,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 1e4,
    "partial_rotary_factor": 0.75,
    "short_factor": [1.0] * 24,
    "long_factor": [1.5] * 24,
    "original_max_position_embeddings": 256,
}
LINEAR_OF_LAYERS = {
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
    "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
}
WITH_ROPE = {
    "llama-llama3-rope": ("llama", {"rope_parameters": LLAMA3}),
    "qwen3-yarn": ("qwen3", {"rope_parameters": YARN}),
    "phi3-longrope": (
        "phi3",
        {"rope_parameters": LONGROPE, "partial_rotary_factor": 0.75, "tie_word_embeddings": True},
    ),
    "gemma3_text-linear-rope": ("gemma3_text", {"rope_parameters": LINEAR_OF_LAYERS}),
}


class Architecture(NamedTuple):
    """What a checkpoint of a name is made of.

    Attributes:
        model_type: As config.json says it.
        auto: The class of transformers that builds it.
        options: Of its configuration, besides the sizes.
    """

    model_type: str
    auto: str
    options: dict[str, Any] | None = None


def architectures() -> dict[str, Architecture]:
    """Return name → architecture, in the order of the names."""
    from transformers.models.auto import modeling_auto

    with_images = modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    of_text = modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    return {name: architecture(name) for name in (*sorted({*with_images, *of_text}), *WITH_ROPE)}


def architecture(name: str) -> Architecture:
    """Return the architecture of a name.

    A type that stands in both mappings is built by the one for text alone, unless its configuration
    has a part for the text: then it is a wrapper, and is built as one.
    """
    from transformers.models.auto import modeling_auto
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name in WITH_ROPE:
        model_type, options = WITH_ROPE[name]
        return Architecture(model_type, "AutoModelForCausalLM", options)
    wrapped = "text_config" in getattr(CONFIG_MAPPING[name], "sub_configs", {})
    of_text = name in modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    with_images = name in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    takes_images = with_images and (wrapped or not of_text)
    auto = "AutoModelForImageTextToText" if takes_images else "AutoModelForCausalLM"
    return Architecture(name, auto)
