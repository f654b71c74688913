"""Sizes and names of one model."""

import re
from dataclasses import dataclass
from typing import Any

from quantline.errors import Failure, StageError
from quantline.model.family import ROUTER, VALUE, Block, Family, InputGroup

EXPERT_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class Architecture:
    """Sizes and names of one model.

    Attributes:
        sparse_layers: The blocks with experts.
        experts_used: How many experts each token is sent to.
        expert_size: The intermediate size of one expert.
        logit_scale: What logits are multiplied by.
        logit_softcap: Logits become softcap · tanh(logits / softcap), if there is one.
    """

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
    rope_scaling: dict[str, Any] | None
    rotary_dim: int
    tied: bool
    sparse_layers: frozenset[int] = frozenset()
    experts: int = 0
    experts_used: int = 0
    expert_size: int = 0
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
    def unquantized_modules(self) -> list[str]:
        """Module names of the linear layers that no method rounds: heads and routers."""
        head = self.family.outside["output"]
        modules = [head]
        modules += [own for own, stored in self.family.renamed.items() if stored == head]
        for layer in sorted(self.sparse_layers):
            for module, part in self.block(layer).modules.items():
                if part == ROUTER:
                    modules.append(self.prefix(layer) + module)
        return modules

    def prefix(self, layer: int) -> str:
        """Return what the names of one decoder block begin with."""
        return f"{self.family.blocks}.{layer}."

    def block(self, layer: int) -> Block:
        """Return what a decoder block consists of."""
        if layer in self.sparse_layers and self.family.sparse:
            return self.family.sparse
        return self.family.block

    def expand_experts(self, module: str) -> list[str]:
        """Return the module, or where its name has a `*` that of every expert."""
        if "*" not in module:
            return [module]
        return [module.replace("*", str(number)) for number in range(self.experts)]

    def linears_of(self, layer: int) -> list[str]:
        """Return module names of the linear layers of one decoder block, in order of use."""
        names = []
        for module in self.block(layer).linears:
            names += [self.prefix(layer) + name for name in self.expand_experts(module)]
        return names

    def linears(self) -> list[str]:
        """Return module names of all linear layers of the decoder blocks, in order of use."""
        return [name for layer in range(self.layers) for name in self.linears_of(layer)]

    def part(self, name: str) -> str:
        """Return the part that a tensor or module plays, as llama.cpp names it.

        Such as token_embd, output, attn_q or ffn_down.

        Raises:
            StageError: unsupported_architecture, for a name that this family does not have.
        """
        layer = self.layer_index(name)
        if layer is None:
            parts = {module: part for part, module in self.family.outside.items()}
        else:
            modules = self.block(layer).modules
            parts = {self.prefix(layer) + module: part for module, part in modules.items()}
        module = re.sub(r"\.(weight|bias)$", "", name)
        module = EXPERT_NUMBER.sub(".experts.*.", module)
        if module not in parts:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected a tensor that {self.model_type} is known to have, found {name}; take "
                "another format, or model.converter=auto",
            )
        return parts[module]

    def layer_index(self, name: str) -> int | None:
        """Return the decoder block of a tensor or module; None for what is around the blocks."""
        found = re.match(rf"{re.escape(self.family.blocks)}\.(\d{{1,9}})\.", name)
        return int(found[1]) if found else None

    def input_groups(self, layer: int) -> list[InputGroup]:
        """Return the linear layers of a block, grouped by the tensor that they read.

        Values reach o_proj through attention, which shares a head of v among several of q: with
        grouped-query attention no scale of v equals one of o's input, so nothing can be folded
        there.
        """
        shared_heads = self.heads != self.kv_heads
        prefix = self.prefix(layer)
        groups = []
        for group in self.block(layer).inputs:
            foldable = None if shared_heads and group.before == VALUE else group.before
            is_norm = foldable is not None and foldable not in self.block(layer).linears
            offset = self.family.norm_offset if is_norm else 0.0
            for number in range(self.experts if "*" in group.linears[0] else 1):
                names = tuple(prefix + name.replace("*", str(number)) for name in group.linears)
                target = prefix + foldable.replace("*", str(number)) if foldable else None
                groups.append(InputGroup(names, target, offset))
        return groups
