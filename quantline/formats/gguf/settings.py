"""The settings of a model in a GGUF file; what llama.cpp does with them is in its src/models/."""

from typing import Any

import gguf

from quantline.formats.gguf.architectures import gguf_family
from quantline.formats.gguf.rope import Rope, rope_of
from quantline.model.architecture import Architecture
from quantline.model.family import GgufFamily
from quantline.model.gguf_checkpoint import GgufCheckpoint
from quantline.model.tensor_source import TensorSource


def write_settings(writer: gguf.GGUFWriter, source: TensorSource) -> Rope:
    """Write sizes, windows and the rotary embedding, or all that a converter's file says.

    Returns:
        The rotary embedding, whose tensors the file needs too.

    Raises:
        StageError: unsupported_architecture, as `rope_of` does.
    """
    if isinstance(source, GgufCheckpoint):
        source.write_fields(writer)
        return Rope({})
    arch = source.arch
    config = source.configuration
    family = gguf_family(arch)
    rope = rope_of(config, arch, family)
    writer.add_context_length(context_length(family, arch, config))
    writer.add_embedding_length(arch.hidden_size)
    writer.add_block_count(arch.layers)
    writer.add_feed_forward_length(arch.intermediate_size)
    writer.add_head_count(arch.heads)
    writer.add_head_count_kv(arch.kv_heads)
    writer.add_key_length(arch.head_dim)
    writer.add_value_length(arch.head_dim)
    if family.rms_norm:
        writer.add_layer_norm_rms_eps(arch.norm_eps)
    else:
        writer.add_layer_norm_eps(arch.norm_eps)
    writer.add_vocab_size(arch.vocab_size)
    if arch.experts:
        writer.add_expert_count(arch.experts)
        writer.add_expert_used_count(arch.experts_used)
        writer.add_expert_feed_forward_length(arch.expert_size)
    if family.sliding_windows:
        pattern = window_pattern(config, arch.layers, family.window_period)
        writer.add_sliding_window_pattern(pattern)
    for method, (key, default) in family.settings.items():
        value = config.get(key, default)
        if value is None:
            value = default
        if value is not None:
            getattr(writer, method)(value)
    for method, value in rope.settings.items():
        getattr(writer, method)(value)
    return rope


def limits(source: TensorSource) -> list[str]:
    """Say where llama.cpp computes another model than the checkpoint's: beyond which length."""
    if isinstance(source, GgufCheckpoint):
        without = source.note.get("step", {}).get("without_projector")
        return [f"no images and no sound: {without}"] if without else []
    arch = source.arch
    family = gguf_family(arch)
    said = []
    length = context_length(family, arch, source.configuration)
    if length < arch.max_positions:
        said.append(
            f"llama.cpp has no sliding window for {arch.model_type}: the file states a context of "
            f"{length} tokens, the window, instead of {arch.max_positions}, and is another model "
            "beyond it"
        )
    if arch.rope_scaling and arch.rope_scaling.get("rope_type") == "longrope":
        original = arch.rope_scaling.get("original_max_position_embeddings")
        said.append(
            "llama.cpp takes the rotary factors for long contexts as soon as it is started with a "
            f"context of more than {original} tokens, transformers once a text is longer"
        )
    return said


def window_pattern(config: dict[str, Any], layers: int, period: int) -> list[bool]:
    """Return for each layer whether its attention has a sliding window.

    Args:
        config: The completed configuration.
        layers: How many layers there are.
        period: Every how many layers one has no window, where config.json does not say.
    """
    layer_types = config.get("layer_types")
    if layer_types:
        return [layer_type == "sliding_attention" for layer_type in layer_types]
    period = config.get("sliding_window_pattern", period)
    return [bool((layer + 1) % period) for layer in range(layers)]


def context_length(family: GgufFamily, arch: Architecture, config: dict[str, Any]) -> int:
    """Return the context length that the file states.

    Where llama.cpp has no sliding window, it is no more than the model's window: beyond it the
    file would be another model.
    """
    window = config.get("sliding_window")
    kinds = config.get("layer_types")
    if kinds and "sliding_attention" not in kinds:  # no layer has it
        window = None
    if family.ignores_window and window and config.get("use_sliding_window", True):
        return min(arch.max_positions, window)
    return arch.max_positions
