"""What a model family consists of: where its parts are, and how it lies in a GGUF file.

A family is one module in quantline/model/families/, found by its `model_type`. See CONTRIBUTING.md,
"Add a model family". Names are those of the checkpoint's tensors without `.weight`; parts have the
names that llama.cpp gives them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple, Protocol

import numpy as np

from quantline.registry import Registry

ROUTER = "ffn_gate_inp"
EXPERT_PARTS = ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
LLAMA_OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}
ATTENTION = {
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
}
QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
VALUE = "self_attn.v_proj"


class HeadCounts(Protocol):
    """What the order of rows depends on; an Architecture has it."""

    @property
    def heads(self) -> int:
        """Heads of queries."""

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values."""


# Called with the counts and the number of rows; returns which row of the checkpoint comes where.
RowOrder = Callable[[HeadCounts, int], np.ndarray]


class InputGroup(NamedTuple):
    """Linear layers that read one tensor.

    Attributes:
        linears: Their module names.
        before: The module before them that scales of that tensor can be folded into, a norm or a
            linear layer; None if there is none.
        norm_offset: What a norm before them adds to its weight before it multiplies.
        reason: Why there is none before them, in words; "" where nobody has tried.
    """

    linears: tuple[str, ...]
    before: str | None = None
    norm_offset: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class Block:
    """What a decoder block consists of.

    Attributes:
        modules: Module inside the block → the part it plays, in the order of use. `*` stands for
            the number of an expert.
        inputs: The linear layers, grouped by the tensor that they read.
    """

    modules: dict[str, str]
    inputs: tuple[InputGroup, ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers, in the order of use."""
        read = {linear for group in self.inputs for linear in group.linears}
        return tuple(module for module in self.modules if module in read)


@dataclass(frozen=True)
class GgufFamily:
    """How a family lies in a GGUF file, and what llama.cpp takes for granted about it.

    Attributes:
        name: llama.cpp's name for the architecture.
        row_orders: Part → the order of its rows in the file.
        settings: Method of gguf's writer → (key of config.json, default).
        required: Key of config.json → (the only value that llama.cpp knows, default).
        sliding_windows: Whether layers with a sliding window alternate with others.
        window_period: Every how many layers one has no window, where config.json does not say.
        ignores_window: Whether llama.cpp runs the architecture without a sliding window.
        local_rope: Whether layers with a window have a rotary base of their own.
        longrope: Whether the rotary embedding has factors for long contexts.
        rope_factors: Whether it has factors for each frequency, which Llama 3's scaling needs.
        layers_of_hidden_scale: How many layers the model has whose attention llama.cpp scales by
            hidden size over heads; it scales all others' by the head's width.
        heads_fill_hidden: Whether heads times their width has to be the hidden size.
        rms_norm: Whether norms are RMS norms.
        biases: Which linear layers of a block may have a bias: "some" of them, "none", or "all",
            which then have to.
        partial_rotary: Whether part of a head can be rotated.
        own_head: Whether the head has to be a tensor of its own.
        all_blocks_sparse: Whether every block has to have experts.
        counts_as_70b: Which models of 80 layers llama.cpp's mixes treat as "70B".
    """

    name: str
    row_orders: dict[str, RowOrder] = field(default_factory=dict)
    settings: dict[str, tuple[str, Any]] = field(default_factory=dict)
    required: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    sliding_windows: bool = False
    window_period: int = 6
    ignores_window: bool = False
    local_rope: bool = False
    longrope: bool = False
    rope_factors: bool = False
    layers_of_hidden_scale: int | None = None
    heads_fill_hidden: bool = False
    rms_norm: bool = True
    biases: Literal["some", "none", "all"] = "some"
    partial_rotary: bool = False
    own_head: bool = False
    all_blocks_sparse: bool = False
    counts_as_70b: Literal["never", "with shared keys", "always"] = "never"


@dataclass(frozen=True)
class Family:
    """The structure of a model family.

    Attributes:
        block: What the decoder blocks consist of.
        sparse: What the blocks with experts consist of, if there are any.
        outside: Part → module around the blocks.
        blocks: The module that the blocks are in.
        keys: What config.json calls a size, where that is not the usual name (architecture.py).
        activations: The activations that the family has.
        norm_offset: What a norm adds to its weight before it multiplies.
        scaled_embedding: Whether the first block is given the embedding times the root of the
            hidden size.
        rotary_share: Share of a head that is rotated, where config.json does not say.
        widening: How many times the hidden size feed-forward layers are wide, where config.json
            does not say.
        renamed: transformers' name for a module → the checkpoint's.
        transposed: Whether the blocks' linear layers are stored as [in, out].
        tied: Whether the head is the embedding, where config.json does not say.
        normalized: optimum's name for the configuration, where it is not the family's.
        gguf: How it lies in GGUF; None if quantline does not know.
    """

    block: Block
    sparse: Block | None = None
    outside: dict[str, str] = field(default_factory=LLAMA_OUTSIDE.copy)
    blocks: str = "model.layers"
    keys: dict[str, str] = field(default_factory=dict)
    activations: tuple[str | None, ...] = ("silu",)
    norm_offset: float = 0.0
    scaled_embedding: bool = False
    rotary_share: float = 1.0
    widening: int = 0
    renamed: dict[str, str] = field(default_factory=dict)
    transposed: bool = False
    tied: bool = False
    normalized: str | None = None
    gguf: GgufFamily | None = None

    @property
    def expert_names(self) -> list[str]:
        """What an expert's gate, up and down are called inside the expert."""
        if self.sparse is None:
            return []
        modules = {part: module for module, part in self.sparse.modules.items()}
        return [modules[part].rpartition(".")[2] for part in EXPERT_PARTS if part in modules]

    def is_transposed(self, name: str) -> bool:
        """Whether files hold a tensor as [in, out]."""
        if not (self.transposed and name.startswith(self.blocks) and name.endswith(".weight")):
            return False
        inside = name.removeprefix(f"{self.blocks}.").removesuffix(".weight")
        layer, _, module = inside.partition(".")
        return layer.isdecimal() and module in self.block.linears


FAMILIES: Registry[Family] = Registry("family")


def register_family(model_type: str, family: Family) -> None:
    """Register a family under the `model_type` of its config.json."""
    FAMILIES.add(model_type, family)


def moe_block(module: str, gate: str, up: str, down: str) -> Block:
    """Describe Llama's block with experts in `module`, by the names of an expert's layers.

    Nothing is folded into the norm before the experts: the router reads the same tensor, and with
    a scale in it would choose by other roundings of its weights. An expert's up takes the scales
    of its own down.
    """
    experts = [f"{module}.experts.*.{name}" for name in (gate, up, down)]
    return Block(
        modules={
            "input_layernorm": "attn_norm",
            **ATTENTION,
            "post_attention_layernorm": "ffn_norm",
            f"{module}.gate": ROUTER,
            **dict(zip(experts, EXPERT_PARTS, strict=True)),
        },
        inputs=(
            InputGroup(QKV, "input_layernorm"),
            InputGroup(("self_attn.o_proj",), VALUE),
            InputGroup((experts[0], experts[1])),
            InputGroup((experts[2],), experts[1]),
        ),
    )


def interleave_halves(rows: int, heads: int) -> np.ndarray:
    """Return the row order that puts the halves of each head's rotary pairs side by side."""
    return np.arange(rows).reshape(heads, 2, rows // heads // 2).swapaxes(1, 2).reshape(-1)


def split_heads(rows: int, heads: int) -> np.ndarray:
    """Return the row order that puts all queries before all keys before all values."""
    return np.arange(rows).reshape(heads, 3, rows // heads // 3).swapaxes(0, 1).reshape(-1)
