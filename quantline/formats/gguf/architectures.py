"""How each model family lies in a GGUF file: a table of names, orders of rows, and settings.

Tensor names come from the gguf package's own map; what llama.cpp does with the settings is in its src/models/.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import gguf
import numpy as np

from quantline.model.architecture import Architecture
from quantline.model.gguf_checkpoint import IN_FILE, Converted
from quantline.model.checkpoint import Checkpoint
from quantline.formats.gguf.rope import Rope, rope_of
from quantline.errors import Failure, StageError

# Architectures that llama.cpp runs without a sliding window.
NO_WINDOW = ("llama", "phi3", "qwen2", "qwen3", "qwen3moe", "starcoder2")

Order = Callable[[Architecture, int], np.ndarray]


def interleave(rows: int, heads: int) -> np.ndarray:
    """Row order that puts the two halves of each head's rotary pairs side by side: int [rows]."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def split_heads(rows: int, heads: int) -> np.ndarray:
    """Row order that puts all queries before all keys before all values, from head by head: int [rows]."""
    return np.arange(rows).reshape(heads, 3, rows // heads // 3).swapaxes(0, 1).reshape(-1)


INTERLEAVED: dict[str, Order] = {"attn_q": lambda facts, rows: interleave(rows, facts.heads),
                                 "attn_k": lambda facts, rows: interleave(rows, facts.kv_heads)}


@dataclass(frozen=True)
class Container:
    """`name`: llama.cpp's for the architecture. `orders`: part → order of its rows. `settings`: method of the writer →
    (key of config.json, default). `needed`: key → (the only value that llama.cpp knows, default).
    `layers_of_hidden_scale`: how many layers the model has whose attention llama.cpp scales by hidden size over heads,
    and all others' by the head's width. `square`: whether the heads fill the hidden size.
    """

    name: str
    orders: dict[str, Order] = field(default_factory=dict)
    settings: dict[str, tuple[str, Any]] = field(default_factory=dict)
    needed: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    windows: bool = False  # whether layers with a sliding window alternate with others
    layers_of_hidden_scale: int | None = None
    square: bool = False
    rms: bool = True  # kind of norm
    all_sparse: bool = False  # whether every block has experts


LLAMA = Container("llama", INTERLEAVED)
GEMMA2 = Container("gemma2", windows=True, layers_of_hidden_scale=46, settings={
    "add_sliding_window": ("sliding_window", 4096), "add_attn_logit_softcapping": ("attn_logit_softcapping", 50.0),
    "add_final_logit_softcapping": ("final_logit_softcapping", 30.0)})
GEMMA3 = Container("gemma3", windows=True, layers_of_hidden_scale=62, settings={
    "add_sliding_window": ("sliding_window", 4096), "add_final_logit_softcapping": ("final_logit_softcapping", None)},
    needed={"attn_logit_softcapping": (None, None)})
GPT2 = Container("gpt2", square=True, rms=False, needed={
    "scale_attn_weights": (True, True), "scale_attn_by_inverse_layer_idx": (False, False)})
NEOX = Container("gptneox", {"attn_qkv": lambda facts, rows: split_heads(rows, facts.heads)}, square=True, rms=False,
                 settings={"add_parallel_residual": ("use_parallel_residual", True)})
PHI3 = Container("phi3", square=True, settings={"add_sliding_window": ("sliding_window", 0)})
PHI = Container("phi2", square=True, rms=False, needed={"qk_layernorm": (False, False)})
QWEN3_MOE = Container("qwen3moe", needed={"norm_topk_prob": (True, False)}, all_sparse=True)

CONTAINERS = {"gemma2": GEMMA2, "gemma3_text": GEMMA3, "gpt2": GPT2, "gpt_neox": NEOX, "llama": LLAMA, "mistral": LLAMA,
              "mixtral": LLAMA, "phi": PHI, "phi3": PHI3, "qwen2": Container("qwen2", square=True), "qwen3": Container("qwen3"),
              "qwen3_moe": QWEN3_MOE, "starcoder2": Container("starcoder2", square=True, rms=False)}
WHOLE = ("position_embd", "ffn_gate_inp")  # parts that llama.cpp wants in full precision


def container_of(facts: Architecture) -> Container:
    """The entry of the table, or of a converter's file what it says of itself.

    Raises StageError(unsupported_architecture) for a family that the table lacks.
    """
    if facts.family is IN_FILE:
        return Container(facts.model_type)
    if facts.model_type not in CONTAINERS:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected a model among {', '.join(CONTAINERS)} for GGUF, "
                                                           f"found {facts.model_type}; choose another format, or name "
                                                           "your checkout of llama.cpp as model.converter")
    return CONTAINERS[facts.model_type]


def tensor_names(model: Checkpoint | Converted, facts: Architecture) -> dict[str, str]:
    """Source tensor name → name in the file, through gguf's own map.

    Raises StageError(unsupported_architecture), also for a model that llama.cpp would compute otherwise.
    """
    if facts.family is IN_FILE:
        return {name: name for name in model.names}
    container = container_of(facts)
    for problem in problems(container, facts, model.config):
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"llama.cpp knows {container.name} only with {problem}; "
                                                           "choose another format")
    kind = next(one for one, name in gguf.MODEL_ARCH_NAMES.items() if name == container.name)
    names = gguf.get_tensor_name_map(kind, facts.layers)

    def place(name: str) -> str | None:
        if ".experts." in name:  # all experts of a block lie in one tensor
            return f"blk.{facts.layer_index(name)}.{facts.role(name)}.weight"
        return names.get_name(name, try_suffixes=(".weight", ".bias"))

    found = {name: place(name) for name in model.names if name != model.tied_head}
    lost = sorted(name for name, there in found.items() if there is None)
    if lost:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"GGUF has no place for {lost[0]} in {facts.model_type}")
    return found


def by_place(names: dict[str, str]) -> dict[str, list[str]]:
    """Name in the file → the source's tensors that it consists of, experts by number."""
    found: dict[str, list[str]] = {}
    for name, place in names.items():
        found.setdefault(place, []).append(name)
    return {place: sorted(them, key=lambda name: [int(number) for number in re.findall(r"\d+", name)])
            for place, them in found.items()}


def dimensions(model: Checkpoint, names: list[str]) -> int:
    """How many dimensions a tensor of the file has that consists of these."""
    return len(model.shape(names[0])) + (".experts." in names[0])


def row_order(facts: Architecture, name: str, rows: int) -> np.ndarray | None:
    """The rows of a source tensor in the order of the file, where they differ."""
    orders = container_of(facts).orders
    order = orders.get(facts.role(name)) if orders else None
    return order(facts, rows) if order else None


def offset(facts: Architecture, name: str) -> np.float32:
    """What the file adds to a tensor: families that store norms less one have them whole there."""
    return np.float32(facts.family.norm_offset if name.endswith("norm.weight") else 0)


def window_pattern(config: dict, layers: int, model_type: str) -> list[bool]:
    """For each layer, whether its attention slides. What config.json leaves out, transformers takes as here."""
    if kinds := config.get("layer_types"):
        return [kind == "sliding_attention" for kind in kinds]
    every = config.get("sliding_window_pattern", 2 if model_type == "gemma2" else 6)
    return [bool((layer + 1) % every) for layer in range(layers)]


def context_length(container: Container, facts: Architecture, config: dict) -> int:
    """How many tokens the file may be given: where llama.cpp has no sliding window, no more than the model's window,
    beyond which the file would be another model.
    """
    window = config.get("sliding_window")
    if container.name in NO_WINDOW and window and config.get("use_sliding_window", True):
        return min(facts.max_positions, window)
    return facts.max_positions


def problems(container: Container, facts: Architecture, config: dict) -> Iterator[str]:
    """What llama.cpp would compute otherwise than the model does: `expected …, found …`."""
    if container.square and facts.heads * facts.head_dim != facts.hidden_size:
        yield f"heads that fill the hidden size {facts.hidden_size}, found {facts.heads} of {facts.head_dim}"
    if container.layers_of_hidden_scale:
        wide = facts.layers == container.layers_of_hidden_scale
        scale = facts.hidden_size // facts.heads if wide else facts.head_dim
        if (found := config.get("query_pre_attn_scalar", 256)) != scale:
            yield f"query_pre_attn_scalar {scale} with {facts.layers} layers, found {found}"
    for key, (wanted, default) in container.needed.items():
        if (found := config.get(key, default)) != wanted:
            yield f"{key} {wanted}, found {found}"
    if container.all_sparse and len(facts.sparse_layers) != facts.layers:
        yield f"experts in all {facts.layers} blocks, found them in {len(facts.sparse_layers)}"
    for key, default in container.settings.values():
        if config.get(key, default) is None and default is not None and key != "sliding_window":
            yield f"a number for {key}, found none"


def add_settings(writer: gguf.GGUFWriter, model: Checkpoint | Converted, facts: Architecture) -> Rope:
    """Write sizes, windows and rotary settings, or all that a converter's file says; returns the rotary settings, whose tensors the file needs too.

    Raises StageError(unsupported_architecture) for a rope scaling that llama.cpp does not have.
    """
    if facts.family is IN_FILE:
        model.add_settings(writer)
        return Rope({})
    container, config = container_of(facts), model.config
    rope = rope_of(config, facts, container.name)
    writer.add_context_length(context_length(container, facts, config))
    writer.add_embedding_length(facts.hidden_size)
    writer.add_block_count(facts.layers)
    writer.add_feed_forward_length(facts.intermediate_size)
    writer.add_head_count(facts.heads)
    writer.add_head_count_kv(facts.kv_heads)
    writer.add_key_length(facts.head_dim)
    writer.add_value_length(facts.head_dim)
    (writer.add_layer_norm_rms_eps if container.rms else writer.add_layer_norm_eps)(facts.norm_eps)
    writer.add_vocab_size(facts.vocab_size)
    if facts.experts:
        writer.add_expert_count(facts.experts)
        writer.add_expert_used_count(facts.experts_used)
        writer.add_expert_feed_forward_length(facts.expert_size)
    if container.windows:
        writer.add_sliding_window_pattern(window_pattern(config, facts.layers, facts.model_type))
    for method, (key, default) in container.settings.items():
        value = config.get(key, default)
        value = default if value is None else value
        if value is not None:
            getattr(writer, method)(value)
    for method, value in rope.settings.items():
        getattr(writer, method)(value)
    return rope
