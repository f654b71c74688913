"""What a budget chooses from in GGUF: ggml's type of each tensor of the file."""

from dataclasses import replace
from re import escape

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from quantline.formats.gguf.container import header_bytes, padded
from quantline.formats.gguf.architectures import dimensions
from quantline.methods.ggml import (
    block_types as ggml_blocks,
    curvature as kquant_curvature,
    mixes,
    quantize as kquant,
)
from quantline.recipes.budget.costs import Costs, known
from quantline.recipes.context import Work


class Types:
    """`budget.Plan` of a recipe in ggml's blocks. An item is a matrix of the file: all experts of a block are one.

    A tensor without a cost, or that the overrides name, keeps the type that the recipe gives it.
    """

    def __init__(self, work: Work, asked: dict) -> None:
        self.work, self.mixture, self.items, self.before, self.tensors = work, work.mixture, {}, {}, 0
        self.rounding = "ggml" + (", with gptq's error feedback in the blocks" if work.recipe.method == "kquant-curvature" else "")
        for place, names in self.mixture.groups.items():
            before = self.mixture.types(names[0])[1]
            fixed = (not mixes.is_quantized(place, dimensions(work.checkpoint, names)) or self.mixture.pinned(place)
                     or not all(known(work, name) for name in names))
            if fixed:
                self.tensors += padded(self._bytes(names, before))
            else:
                self.items[place], self.before[place] = self._kinds(names[0]), before
        report = {"calibration": work.moments.provenance(), "importance": self.mixture.about_importance()}
        self.around = header_bytes(work.checkpoint, report | {"recipe": asked})
        # Whatever a recipe without a budget is called, its file has no shorter name.
        self.more = self.around - header_bytes(work.checkpoint, report | {"recipe": asked | {"budget": None, "name": "a"}})

    def _kinds(self, name: str) -> list[str]:
        """The types that a tensor's rows allow of those that are asked for."""
        width = self.work.checkpoint.shape(name)[-1]
        kinds = {mixes.fit_width(kind, width) for kind in self.work.recipe.budget.types}
        return sorted(kind for kind in kinds
                      if kind not in kquant.WITHOUT_IT_GGML_STOPS or self.mixture.importance(name, kind)[0] is not None)

    def _bytes(self, names: list[str], kind: str) -> int:
        """The bytes of a tensor of the file that consists of these, of a type."""
        block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
        return len(names) * int(np.prod(self.work.checkpoint.shape(names[0]))) // block * size

    def size(self, item: str, what: str) -> int:
        return padded(self._bytes(self.mixture.groups[item], what))

    def costs(self, costs: Costs, layer: int | None) -> dict[str, dict[str, float]]:
        """By the recipe's rounding; where it goes on to the curvature, as it is before the rounds that go down that."""
        found = {}
        for place, kinds in self.items.items():
            names = self.mixture.groups[place]
            if self.work.facts.layer_index(names[0]) == layer:
                each = [self._costs_of(costs, name, kinds) for name in names]
                found[place] = {kind: sum(one[kind] for one in each) for kind in kinds}
        return found

    def _costs_of(self, costs: Costs, name: str, kinds: list[str]) -> dict[str, float]:
        weight, module = self.work.checkpoint.tensor(name), name.removesuffix(".weight")
        cost, found = costs.of(name, self.work.on_device(weight)), {}
        moments, recipe = self.work.moments, self.work.recipe
        fed_back = recipe.method == "kquant-curvature" and module in moments.layers
        statistics = (moments.moment(module), moments.factors(module)) if fed_back else ()
        for kind in kinds:
            if fed_back and kind not in mixes.FLOATS:
                blocks, _ = kquant_curvature.quantize(weight, kind, *statistics, recipe.damping, rounds=0)
            else:
                blocks = kquant.quantize(weight, kind, self.mixture.importance(name, kind)[0], kernel=recipe.kernel)
            found[kind] = cost(self.work.on_device(ggml_blocks.dequantize(blocks, kind)))
        return found

    def chosen(self, choice: dict[str, str]) -> Work:
        overrides = {f"^{escape(place)}$": kind for place, kind in choice.items()} | self.work.recipe.overrides
        return replace(self.work, recipe=self.work.recipe.model_copy(update={"overrides": overrides}))
