"""What every recipe works with: the model, its calibration, and where the result goes."""

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np

from quantline.model.architecture import Architecture
from quantline.quantized.store import QuantizedWriter
from quantline.model.gguf_checkpoint import Converted
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint
from quantline.config.recipes import AnyRecipe

if TYPE_CHECKING:
    import torch

    from quantline.recipes.tensor_types import Mixture


@dataclass(frozen=True)
class Work:
    """What every method works with."""

    recipe: AnyRecipe
    checkpoint: Checkpoint | Converted
    facts: Architecture
    moments: Moments
    writer: QuantizedWriter
    grids: dict[str, dict] = field(default_factory=dict)  # of layers that have another grid than the recipe's

    def recipe_of(self, name: str) -> AnyRecipe:
        """The recipe with the grid of a layer."""
        return self.recipe.model_copy(update=self.grids.get(name))

    @cached_property
    def mixture(self) -> "Mixture":
        """Of a kquant recipe: the type and the importance of each tensor."""
        from quantline.recipes.tensor_types import Mixture

        return Mixture(self.recipe, self.checkpoint, self.facts, self.moments)

    def on_device(self, values: np.ndarray) -> "torch.Tensor":
        """A tensor where the rounding is done: on the GPU, if there is one."""
        import torch

        from quantline.model.device import device

        return torch.from_numpy(values).to(device())

    def weight(self, name: str) -> "torch.Tensor":
        """W [out, in] of a layer."""
        return self.on_device(self.checkpoint.tensor(f"{name}.weight"))

    def factors(self, name: str) -> "torch.Tensor | None":
        """What a layer's outputs matter, as the recipe looks at it: G in blocks for curvature rounding, its diagonal
        [out, 1, 1] for awq if the calibration has it, else None.
        """
        if getattr(self.recipe, "curvature", False):
            return self.on_device(self.moments.factors(name))
        if self.recipe.method == "awq" and self.moments.info["curvature"]:
            return self.importance(name)[:, None, None]
        return None

    def importance(self, name: str) -> "torch.Tensor":
        """The diagonal of G, or 1 if the calibration has no gradients: how much each output matters, float32 [out]."""
        if not self.moments.info["curvature"]:
            return self.on_device(np.ones(self.checkpoint.shape(f"{name}.weight")[0], np.float32))
        return self.on_device(self.moments.importance(name))

    def moment(self, name: str) -> "torch.Tensor":
        """H of a layer."""
        return self.on_device(self.moments.moment(name))
