"""What a model family consists of: a table per family, read by quantline/model/architecture.py.

Names are those of the checkpoint's tensors without `.weight`; parts have the names that llama.cpp gives them.
"""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Block:
    """`modules`: module inside a block → the part it plays, in the order of use. `inputs`: the linear layers that read
    one tensor, and the module before them that a scale of that tensor can be folded into, if there is one. `*` stands for
    the number of an expert.
    """

    modules: dict[str, str]
    inputs: tuple[tuple[tuple[str, ...], str | None], ...]

    @property
    def linears(self) -> tuple[str, ...]:
        """The linear layers, in the order of use."""
        read = {linear for linears, _ in self.inputs for linear in linears}
        return tuple(module for module in self.modules if module in read)


ROUTER, EXPERT_PARTS = "ffn_gate_inp", ("ffn_gate_exps", "ffn_up_exps", "ffn_down_exps")
LLAMA_OUTSIDE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}


@dataclass(frozen=True)
class Family:
    """`block`: what the blocks consist of, and `sparse` those with experts. `outside`: part → module around the blocks;
    `blocks`: the module that they are in. `keys`: what config.json calls a size, where that is not the usual name
    (architecture.USUAL).
    """

    block: Block
    sparse: Block | None = None
    outside: dict[str, str] = field(default_factory=LLAMA_OUTSIDE.copy)
    blocks: str = "model.layers"
    keys: dict[str, str] = field(default_factory=dict)
    activations: tuple[str, ...] = ("silu",)
    norm_offset: float = 0.0  # a norm multiplies by its weight plus this
    scaled_embedding: bool = False  # the first block is given the embedding times the root of the hidden size
    rotary_share: float = 1.0  # of a head that is rotated, where config.json does not say
    widening: int = 0  # times a hidden state that feed-forward layers are wide, where config.json does not say
    renamed: dict[str, str] = field(default_factory=dict)  # transformers' name for a module → the checkpoint's
    transposed: bool = False  # the blocks' linear layers are stored as [in, out]
    tied: bool = False  # whether the head is the embedding, where config.json does not say
    normalized: str | None = None  # optimum's name for the configuration, where it is not the family's

    @property
    def expert_names(self) -> list[str]:
        """What an expert's gate, up and down are called inside of it."""
        modules = {part: module for module, part in self.sparse.modules.items()} if self.sparse else {}
        return [modules[part].rpartition(".")[2] for part in EXPERT_PARTS if part in modules]

    def turned(self, name: str) -> bool:
        """Whether files hold this tensor as [in, out]."""
        inside, _, module = name.removeprefix(f"{self.blocks}.").removesuffix(".weight").partition(".")
        return (self.transposed and name.startswith(self.blocks) and name.endswith(".weight") and inside.isdecimal()
                and module in self.block.linears)


ATTENTION = {"self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
             "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm", "self_attn.o_proj": "attn_output"}
MLP = {"mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down"}
QKV, GATE_UP = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"), ("mlp.gate_proj", "mlp.up_proj")

LLAMA = Family(Block(
    {"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", **MLP},
    ((QKV, "input_layernorm"), (("self_attn.o_proj",), "self_attn.v_proj"), (GATE_UP, "post_attention_layernorm"),
     (("mlp.down_proj",), "mlp.up_proj"))))
# Norms before and after both halves of a block, and weights of norms that are stored less one.
GEMMA = Family(Block(
    {"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "attn_post_norm",
     "pre_feedforward_layernorm": "ffn_norm", **MLP, "post_feedforward_layernorm": "ffn_post_norm"},
    ((QKV, "input_layernorm"), (("self_attn.o_proj",), "self_attn.v_proj"), (GATE_UP, "pre_feedforward_layernorm"),
     (("mlp.down_proj",), "mlp.up_proj"))),
    activations=("gelu_pytorch_tanh",), norm_offset=1.0, scaled_embedding=True, tied=True, normalized="gemma")
# One matrix for queries, keys and values, and one for gate and up: nothing is folded into a part of a matrix.
PHI3 = Family(Block(
    {"input_layernorm": "attn_norm", "self_attn.qkv_proj": "attn_qkv", "self_attn.o_proj": "attn_output",
     "post_attention_layernorm": "ffn_norm", "mlp.gate_up_proj": "ffn_up", "mlp.down_proj": "ffn_down"},
    ((("self_attn.qkv_proj",), "input_layernorm"), (("self_attn.o_proj",), None),
     (("mlp.gate_up_proj",), "post_attention_layernorm"), (("mlp.down_proj",), None))))
# Norms with biases, half of a block beside the other, and a quarter of each head rotated.
NEOX = Family(Block(
    {"input_layernorm": "attn_norm", "attention.query_key_value": "attn_qkv", "attention.dense": "attn_output",
     "post_attention_layernorm": "ffn_norm", "mlp.dense_h_to_4h": "ffn_up", "mlp.dense_4h_to_h": "ffn_down"},
    ((("attention.query_key_value",), "input_layernorm"), (("attention.dense",), None),
     (("mlp.dense_h_to_4h",), "post_attention_layernorm"), (("mlp.dense_4h_to_h",), None))),
    outside={"token_embd": "gpt_neox.embed_in", "output_norm": "gpt_neox.final_layer_norm", "output": "embed_out"},
    blocks="gpt_neox.layers", keys={"norm_eps": "layer_norm_eps", "kv_heads": "num_attention_heads"},
    activations=("gelu", "gelu_fast", "gelu_new"), rotary_share=0.25, renamed={"lm_head": "embed_out"})
# Learned positions instead of rotated heads.
GPT2 = Family(Block(
    {"ln_1": "attn_norm", "attn.c_attn": "attn_qkv", "attn.c_proj": "attn_output", "ln_2": "ffn_norm",
     "mlp.c_fc": "ffn_up", "mlp.c_proj": "ffn_down"},
    ((("attn.c_attn",), "ln_1"), (("attn.c_proj",), None), (("mlp.c_fc",), "ln_2"), (("mlp.c_proj",), None))),
    outside={"token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
             "output": "lm_head"},
    blocks="transformer.h",
    keys={"hidden_size": "n_embd", "intermediate_size": "n_inner", "layers": "n_layer", "heads": "n_head",
          "kv_heads": "n_head", "max_positions": "n_positions", "norm_eps": "layer_norm_epsilon",
          "activation": "activation_function"},
    activations=("gelu_new", "gelu", "gelu_pytorch_tanh"), rotary_share=0.0, widening=4, transposed=True, tied=True)
# Llama's attention with norms that have biases, and a feed-forward part of two layers.
STARCODER2 = Family(Block(
    {"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm", "mlp.c_fc": "ffn_up",
     "mlp.c_proj": "ffn_down"},
    ((QKV, "input_layernorm"), (("self_attn.o_proj",), "self_attn.v_proj"), (("mlp.c_fc",), "post_attention_layernorm"),
     (("mlp.c_proj",), None))),
    keys={"norm_eps": "norm_epsilon"}, activations=("gelu_pytorch_tanh",), tied=True, normalized="llama")

# Both halves of a block read one norm, and the head has a bias.
PHI = Family(Block(
    {"input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
     "self_attn.v_proj": "attn_v", "self_attn.dense": "attn_output", "mlp.fc1": "ffn_up", "mlp.fc2": "ffn_down"},
    (((*QKV, "mlp.fc1"), "input_layernorm"), (("self_attn.dense",), "self_attn.v_proj"), (("mlp.fc2",), None))),
    outside=LLAMA_OUTSIDE | {"output_norm": "model.final_layernorm"}, keys={"norm_eps": "layer_norm_eps"},
    activations=("gelu_new",), rotary_share=0.5)


def mixture(module: str, gate: str, up: str, down: str) -> Block:
    """Llama's block with experts. Nothing is folded into the norm before them: the router reads the same tensor, and with a
    scale in it would choose by other roundings of its weights. An expert's up takes the scales of its own down.
    """
    gate, up, down = (f"{module}.experts.*.{name}" for name in (gate, up, down))
    return Block({"input_layernorm": "attn_norm", **ATTENTION, "post_attention_layernorm": "ffn_norm",
                  f"{module}.gate": ROUTER, **dict(zip((gate, up, down), EXPERT_PARTS, strict=True))},
                 ((QKV, "input_layernorm"), (("self_attn.o_proj",), "self_attn.v_proj"), ((gate, up), None), ((down,), up)))


SPARSE = mixture("block_sparse_moe", "w1", "w3", "w2")
MIXTRAL = Family(SPARSE, SPARSE, renamed={"mlp": "block_sparse_moe"})
# Some blocks may be dense.
QWEN3_MOE = Family(LLAMA.block, mixture("mlp", "gate_proj", "up_proj", "down_proj"))

FAMILIES = {"gemma2": GEMMA, "gemma3_text": GEMMA, "gpt2": GPT2, "gpt_neox": NEOX, "llama": LLAMA, "mistral": LLAMA,
            "mixtral": MIXTRAL, "phi": PHI, "phi3": PHI3, "qwen2": LLAMA, "qwen3": LLAMA, "qwen3_moe": QWEN3_MOE,
            "starcoder2": STARCODER2}


def family_of(config: dict) -> Family | None:
    """The family that config.json names: from its table, or else as transformers has it; None if it does not."""
    from quantline.model.inferred_family import derived

    name = config.get("model_type")
    return FAMILIES.get(name) or (derived(config) if name else None)


def tied(config: dict) -> bool:
    """Whether the head is the embedding; where config.json does not say, what transformers takes for the family."""
    family = family_of(config)
    return bool(config.get("tie_word_embeddings", family.tied if family else False))


def tied_head(config: dict) -> str | None:
    """The tensor of a head that is the embedding, which a checkpoint may hold a second time; None where it is its own."""
    family = family_of(config)
    return f"{family.outside['output']}.weight" if family and tied(config) else None
