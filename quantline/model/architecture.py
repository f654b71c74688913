"""Sizes and names of one model."""

import re
from dataclasses import dataclass
from typing import Any

from quantline.errors import Failure, StageError
from quantline.model.family import ROUTER, VALUE, Block, Family, InputGroup
from quantline.model.structure import Structure

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
        structure: What was found out about a model whose family has no table; it goes before what
            the family says.
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
    structure: Structure | None = None

    @property
    def normalized(self) -> str:
        """The name of the family's configuration in optimum."""
        return self.family.normalized or self.model_type

    @property
    def embedding(self) -> str:
        """The tensor with a row for each token."""
        if self.structure:
            return self.structure.embedding
        return f"{self.family.outside['token_embd']}.weight"

    @property
    def head(self) -> str:
        """The tensor that makes logits of final hidden states."""
        if self.structure:
            return self.structure.head
        return self.embedding if self.tied else f"{self.family.outside['output']}.weight"

    @property
    def head_bias(self) -> str | None:
        """The tensor that some checkpoints add to the logits."""
        if self.structure:
            return self.structure.head_bias
        return f"{self.family.outside['output']}.bias"

    @property
    def text_path(self) -> str:
        """The module of transformers' model that is the text decoder; "" for the whole."""
        return self.structure.text_path if self.structure else ""

    @property
    def block_path(self) -> str:
        """The module that the decoder blocks are in, in quantline's model and in transformers'."""
        return self.structure.blocks if self.structure else self.family.blocks

    @property
    def block_returns(self) -> tuple[int, ...]:
        """For each block how many values it returns; 0 for a tensor that is no tuple.

        Raises:
            StageError: missing_file, for a model without a table that load has not run.
        """
        if not self.structure:
            return (0,) * self.layers
        if self.structure.returns is None:
            raise StageError(
                Failure.MISSING_FILE,
                f"expected what load finds out about {self.model_type} when it runs it, found "
                "nothing; run load again",
            )
        return self.structure.returns

    @property
    def unquantized_modules(self) -> list[str]:
        """Module names of the linear layers that no method rounds: heads and routers."""
        if self.structure:
            return list(self.structure.kept_linears)
        modules = self.module_names(self.family.outside["output"])
        for layer in sorted(self.sparse_layers):
            for module, part in self.block(layer).modules.items():
                if part == ROUTER:
                    modules.append(self.prefix(layer) + module)
        return modules

    def module_names(self, name: str) -> list[str]:
        """Return what the checkpoint, and transformers if it differs, call a layer or the head."""
        if not self.structure:
            return [name, *(own for own, stored in self.family.renamed.items() if stored == name)]
        layer = self.layer_index(name)
        if layer is not None:
            return list(dict.fromkeys((name, self.structure.linears[layer].get(name, name))))
        tensor = self.structure.tensors.get(f"{name}.weight")
        paths = tensor.paths if tensor else ()
        return list(dict.fromkeys((name, *(path.removesuffix(".weight") for path in paths))))

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
        if self.structure:
            return list(self.structure.linears[layer])
        names = []
        for module in self.block(layer).linears:
            names += [self.prefix(layer) + name for name in self.expand_experts(module)]
        return names

    def expert_groups(self, layer: int) -> list[list[list[str]]]:
        """Return, for each module of experts of a block, the linear layers of each expert."""
        if self.structure:
            return [
                [list(layers) for layers in group.layers]
                for group in self.structure.experts
                if group.block == layer
            ]
        names = [self.prefix(layer) + name for name in self.block(layer).linears if "*" in name]
        if not names:
            return []
        return [[[name.replace("*", str(n)) for name in names] for n in range(self.experts)]]

    def expert_linears(self) -> list[str]:
        """Return module names of the linear layers of all experts, in order of use."""
        names = []
        for layer in range(self.layers):
            groups = self.expert_groups(layer)
            of_experts = {name for experts in groups for layers in experts for name in layers}
            names += [name for name in self.linears_of(layer) if name in of_experts]
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
        if self.structure:
            raise self._no_part(name)
        layer = self.layer_index(name)
        if layer is None:
            parts = {module: part for part, module in self.family.outside.items()}
        else:
            modules = self.block(layer).modules
            parts = {self.prefix(layer) + module: part for module, part in modules.items()}
        module = re.sub(r"\.(weight|bias)$", "", name)
        module = EXPERT_NUMBER.sub(".experts.*.", module)
        if module not in parts:
            raise self._no_part(name)
        return parts[module]

    def _no_part(self, name: str) -> StageError:
        return StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected a tensor that {self.model_type} is known to have, found {name}; take "
            "another format, or model.converter=auto",
        )

    def layer_index(self, name: str) -> int | None:
        """Return the decoder block of a tensor or module; None for what is around the blocks."""
        if self.structure:
            return self.structure.blocks_of_names.get(name)
        found = re.match(rf"{re.escape(self.family.blocks)}\.(\d{{1,9}})\.", name)
        return int(found[1]) if found else None

    def input_groups(self, layer: int) -> list[InputGroup]:
        """Return the linear layers of a block, grouped by the tensor that they read.

        Values reach o_proj through attention, which shares a head of v among several of q: with
        grouped-query attention no scale of v equals one of o's input, so nothing can be folded
        there.
        """
        if self.structure:
            return list(self.structure.inputs[layer])
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
