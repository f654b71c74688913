"""What the pipeline has to know of a model family, read from config.json: names, sizes, and what feeds what."""

import re
from dataclasses import dataclass

from quantline.model.inferred_family import completed
from quantline.model.families import FAMILIES, ROUTER, Block, Family, family_of, tied
from quantline.model.checkpoint import Checkpoint
from quantline.errors import Failure, StageError

VALUE = "self_attn.v_proj"
# What config.json calls a size; the first name that it has counts.
USUAL = {"hidden_size": ("hidden_size",), "intermediate_size": ("intermediate_size",), "layers": ("num_hidden_layers",),
         "heads": ("num_attention_heads",), "kv_heads": ("num_key_value_heads",), "head_dim": ("head_dim",),
         "vocab_size": ("vocab_size",), "max_positions": ("max_position_embeddings",), "norm_eps": ("rms_norm_eps",),
         "activation": ("hidden_activation", "hidden_act"), "rope_theta": ("rope_theta", "rotary_emb_base"),
         "rotary_share": ("partial_rotary_factor", "rotary_pct"), "experts": ("num_local_experts", "num_experts"),
         "experts_used": ("num_experts_per_tok",), "expert_size": ("moe_intermediate_size", "intermediate_size")}


@dataclass(frozen=True)
class Architecture:
    """Sizes and names of one model."""

    model_type: str
    family: Family
    hidden_size: int
    intermediate_size: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    rotary_dim: int
    tied: bool
    sparse_layers: frozenset[int] = frozenset()  # the blocks with experts
    experts: int = 0
    experts_used: int = 0  # by each token
    expert_size: int = 0  # the intermediate size of one
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def normalized(self) -> str:
        """The name of the family's configuration in optimum."""
        return self.family.normalized or self.model_type

    @property
    def embedding(self) -> str:
        """The tensor with a row for each token."""
        return f"{self.family.outside['token_embd']}.weight"

    @property
    def head(self) -> str:
        """The tensor that makes logits of final hidden states."""
        return self.embedding if self.tied else f"{self.family.outside['output']}.weight"

    @property
    def head_bias(self) -> str:
        """The tensor that some checkpoints add to the logits."""
        return f"{self.family.outside['output']}.bias"

    @property
    def final_norm(self) -> str:
        """The weight of the norm after the last block."""
        return f"{self.family.outside['output_norm']}.weight"

    @property
    def kept(self) -> list[str]:
        """Module names of the linear layers that no method rounds."""
        heads = [self.family.outside["output"]]
        heads += [own for own, stored in self.family.renamed.items() if stored in heads]
        return heads + [self.prefix(layer) + module for layer in sorted(self.sparse_layers)
                        for module, part in self.block(layer).modules.items() if part == ROUTER]

    def prefix(self, layer: int) -> str:
        """What the names of one decoder block begin with."""
        return f"{self.family.blocks}.{layer}."

    def block(self, layer: int) -> Block:
        """What a decoder block consists of."""
        return self.family.sparse if layer in self.sparse_layers else self.family.block

    def each(self, module: str) -> list[str]:
        """The module, or where its name has a `*` that of every expert."""
        return [module.replace("*", str(number)) for number in range(self.experts)] if "*" in module else [module]

    def linears_of(self, layer: int) -> list[str]:
        """Module names of the linear layers of one decoder block, in order of use."""
        return [self.prefix(layer) + one for module in self.block(layer).linears for one in self.each(module)]

    def linears(self) -> list[str]:
        """Module names of all linear layers of the decoder blocks, in order of use."""
        return [name for layer in range(self.layers) for name in self.linears_of(layer)]

    def role(self, name: str) -> str:
        """The part that a tensor or module plays, as llama.cpp names it: token_embd, output, attn_q, ffn_down, …

        Raises StageError(unsupported_architecture) for a name that this family does not have.
        """
        module, layer = re.sub(r"\.(weight|bias)$", "", name), self.layer_index(name)
        parts = ({module: part for part, module in self.family.outside.items()} if layer is None else
                 {self.prefix(layer) + inner: part for inner, part in self.block(layer).modules.items()})
        module = re.sub(r"\.experts\.\d+\.", ".experts.*.", module)
        if module not in parts:
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"tensor {name} has no known part in {self.model_type}")
        return parts[module]

    def layer_index(self, name: str) -> int | None:
        """The decoder block that a tensor or module lies in; None for what is around the blocks."""
        found = re.match(rf"{re.escape(self.family.blocks)}\.(\d+)\.", name)
        return int(found[1]) if found else None

    def input_groups(self, layer: int) -> list[tuple[list[str], str | None]]:
        """Linears that share an input, each with the norm or linear before it that a scale can be folded into.

        Values reach o_proj through attention, which shares a head of v among several of q: with grouped-query
        attention there is no scale of v that equals one of o's input, so nothing can be folded there.
        """
        shared, prefix = self.heads != self.kv_heads, self.prefix(layer)
        groups = []
        for linears, before in self.block(layer).inputs:
            before = None if shared and before == VALUE else before
            for number in range(self.experts if "*" in linears[0] else 1):
                names = [prefix + linear.replace("*", str(number)) for linear in linears]
                groups.append((names, prefix + before.replace("*", str(number)) if before else None))
        return groups


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The facts of a checkpoint. Raises StageError(unsupported_architecture) for an unknown family.

    A converter's file (quantline/model/gguf_checkpoint.py) has its own, with the names that tensors have there.
    """
    return getattr(checkpoint, "facts", None) or from_config(checkpoint.config)


def from_config(config: dict) -> Architecture:
    """The facts that a config.json tells. Raises StageError(unsupported_architecture) as `architecture` does."""
    name, family = config.get("model_type"), family_of(config)
    if family is None:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE,
                         f"expected model_type among {', '.join(FAMILIES)}, or a decoder without experts that transformers "
                         f"has, found {name!r} in config.json")
    config = config if name in FAMILIES else completed(config)

    def key(size: str) -> str:
        """What this config.json calls a size, or would."""
        names = (family.keys[size],) if size in family.keys else USUAL[size]
        return next((one for one in names if one in config), names[0])

    try:
        if (activation := config.get(key("activation"))) not in (None, *family.activations):
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"expected {key('activation')} "
                             f"{' or '.join(family.activations)}, found {activation!r} in config.json")
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {one: value for one, value in rope.items()
                                                 if one not in ("rope_theta", "partial_rotary_factor")}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        heads, hidden = config[key("heads")], config[key("hidden_size")]
        head_dim = config.get(key("head_dim")) or hidden // heads
        share = rope.get("partial_rotary_factor", config.get(key("rotary_share"), family.rotary_share))
        width = config.get(key("intermediate_size")) or family.widening * hidden or config[key("intermediate_size")]
        layers, sparse = config[key("layers")], {}
        if family.sparse:
            dense, step = config.get("mlp_only_layers") or (), config.get("decoder_sparse_step") or 1
            sparse = {size: config[key(size)] for size in ("experts", "experts_used", "expert_size")}
            sparse["sparse_layers"] = frozenset(one for one in range(layers) if one not in dense and (one + 1) % step == 0)
        return Architecture(
            model_type=name, family=family, hidden_size=hidden, intermediate_size=width, layers=layers,
            heads=heads, kv_heads=config.get(key("kv_heads")) or heads, head_dim=head_dim,
            vocab_size=config[key("vocab_size")], max_positions=config[key("max_positions")],
            norm_eps=config[key("norm_eps")],
            rope_theta=float(rope.get("rope_theta", config.get(key("rope_theta"), 10000.0))),
            rope_scaling=scaling if kind != "default" else None, rotary_dim=int(head_dim * share), tied=tied(config),
            logit_softcap=config.get("final_logit_softcapping"), logit_scale=config.get("logit_scale", 1.0), **sparse,
        )
    except KeyError as error:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"config.json lacks {error}, which {name} needs") from None
