"""What the pipeline has to know of a model family, read from config.json: names, sizes, and what feeds what."""

import re
from dataclasses import dataclass

from stages.checkpoints.families import FAMILIES, Family, tied
from stages.checkpoints.reader import Checkpoint
from stages.tracking import Failure, StageError

EMBEDDING, HEAD, FINAL_NORM = "model.embed_tokens.weight", "lm_head.weight", "model.norm.weight"
VALUE = "self_attn.v_proj"


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
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None
    tied: bool
    head: str
    embedding: str = EMBEDDING
    final_norm: str = FINAL_NORM
    block_prefix: str = "model.layers."
    logit_scale: float = 1.0
    logit_softcap: float | None = None

    @property
    def normalized(self) -> str:
        """The name of the family's configuration in optimum."""
        return self.family.normalized or self.model_type

    def linears_of(self, layer: int) -> list[str]:
        """Module names of the linear layers of one decoder block, in order of use."""
        return [f"model.layers.{layer}.{module}" for module in self.family.linears]

    def linears(self) -> list[str]:
        """Module names of all linear layers of the decoder blocks, in order of use."""
        return [name for layer in range(self.layers) for name in self.linears_of(layer)]

    def role(self, name: str) -> str:
        """The part that a tensor or module plays: token_embd, output, output_norm, attn_q, ffn_down, …

        Raises StageError(unsupported_architecture) for a name that this family does not have.
        """
        fixed = {EMBEDDING: "token_embd", HEAD: "output", FINAL_NORM: "output_norm"}
        if name in fixed:
            return fixed[name]
        inner = re.sub(r"^model\.layers\.\d+\.|\.(weight|bias)$", "", name)
        if inner not in self.family.modules:
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"tensor {name} has no known part in {self.model_type}")
        return self.family.modules[inner]

    def layer_index(self, name: str) -> int | None:
        found = re.match(r"model\.layers\.(\d+)\.", name)
        return int(found[1]) if found else None

    def input_groups(self, layer: int) -> list[tuple[list[str], str | None]]:
        """Linears that share an input, each with the norm or linear before it that a scale can be folded into.

        Values reach o_proj through attention, which shares a head of v among several of q: with grouped-query
        attention there is no scale of v that equals one of o's input, so nothing can be folded there.
        """
        shared = self.heads != self.kv_heads
        return [([f"model.layers.{layer}.{linear}" for linear in linears],
                 f"model.layers.{layer}.{before}" if before and not (shared and before == VALUE) else None)
                for linears, before in self.family.inputs]


def architecture(checkpoint: Checkpoint) -> Architecture:
    """The facts of a checkpoint. Raises StageError(unsupported_architecture) for an unknown family."""
    return from_config(checkpoint.config)


def from_config(config: dict) -> Architecture:
    """The facts that a config.json tells. Raises StageError(unsupported_architecture) as `architecture` does."""
    family = config.get("model_type")
    parts = FAMILIES.get(family)
    if parts is None:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE,
                         f"expected model_type among {', '.join(FAMILIES)}, found {family!r} in config.json")
    try:
        rope = config.get("rope_parameters") or {}
        scaling = config.get("rope_scaling") or {key: value for key, value in rope.items() if key != "rope_theta"}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        heads = config["num_attention_heads"]
        key = "hidden_activation" if "hidden_activation" in config else "hidden_act"
        if config.get(key, parts.activation) != parts.activation:
            raise StageError(Failure.UNSUPPORTED_ARCHITECTURE,
                             f"expected {key} {parts.activation}, found {config[key]!r} in config.json")
        return Architecture(
            model_type=family, family=parts, hidden_size=config["hidden_size"], intermediate_size=config["intermediate_size"],
            layers=config["num_hidden_layers"], heads=heads,
            kv_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads, vocab_size=config["vocab_size"],
            max_positions=config["max_position_embeddings"], rms_norm_eps=config["rms_norm_eps"],
            rope_theta=float(rope.get("rope_theta", config.get("rope_theta", 10000.0))),
            rope_scaling=scaling if kind != "default" else None, tied=tied(config), head=EMBEDDING if tied(config) else HEAD,
            logit_softcap=config.get("final_logit_softcapping"),
        )
    except KeyError as error:
        raise StageError(Failure.UNSUPPORTED_ARCHITECTURE, f"config.json lacks {error}, which {family} needs") from None
