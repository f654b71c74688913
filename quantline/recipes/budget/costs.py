"""What rounding one tensor costs: by how much the KL divergence is predicted to rise, from the calibration alone.

A linear layer's error Δ costs tr(G Δ H Δᵀ) / 2 for each token that it sees (quantline/calibration/output_moments.py). The
embedding's is Σ f Δ G Δᵀ / 2 over its rows, with each token's frequency f; the head's divergence is worked out on final
hidden states of the calibration text. The costs of all tensors add up to the prediction for the model.
A calibration without gradients has no common measure: there every cost is the share of the squared output that is error.
"""

from collections.abc import Callable
from functools import cached_property

import numpy as np
import torch

from quantline.calibration import embedding_and_head as ends
from quantline.methods.integer.curvature import divergence
from quantline.methods.integer.grid import output_error
from quantline.recipes.context import Work
from quantline.errors import Failure, StageError

CHUNK_VALUES = 1 << 24  # logits, or weights of an embedding, held at once


def known(work: Work, tensor: str) -> bool:
    """Whether there is a cost for a tensor of the checkpoint."""
    return tensor in (work.facts.embedding, work.facts.head) or tensor.removesuffix(".weight") in work.moments.layers


class Costs:
    """Of one model's tensors, each by the name of its module."""

    def __init__(self, work: Work) -> None:
        self.work, self.whole = work, work.moments.info["curvature"]
        self.unit = "nats of KL divergence per token" if self.whole else "share of the squared output"
        missing = [name for name in (ends.FINAL, *([ends.EMBEDDING] if self.whole else [])) if not self._there(name)]
        if missing:
            raise StageError(Failure.MISSING_FILE, f"expected {work.moments.folder / missing[0]}, which a budget needs, found "
                                                   "nothing; run `dvc repro calibrate`")

    def _there(self, name: str) -> bool:
        return (self.work.moments.folder / name).is_file()

    def of(self, tensor: str, weight: torch.Tensor) -> Callable[[torch.Tensor], float]:
        """What it costs that a tensor's `weight` [out, in] is stored as another, which the function is given.

        That raises StageError(non_finite).
        """
        facts, parts = self.work.facts, []
        if tensor == facts.embedding:
            parts.append(self._embedding)
        if tensor == facts.head:
            parts.append(self._head)
        if not parts:
            parts.append(self._linear(tensor.removesuffix(".weight"), weight))

        def cost(stored: torch.Tensor) -> float:
            found = sum(part(weight, stored) for part in parts)
            if not np.isfinite(found):
                raise StageError(Failure.NON_FINITE, f"expected a finite cost of rounding {tensor}, found {found}; look at "
                                                     "its weights and at the calibration text")
            return found

        return cost

    def _linear(self, module: str, weight: torch.Tensor) -> Callable[[torch.Tensor, torch.Tensor], float]:
        moments = self.work.moments
        share, moment = max(moments.tokens(module), 1) / moments.info["tokens"], self.work.moment(module)
        if self.whole:
            factors = self.work.on_device(moments.factors(module))
            return lambda weight, stored: share * divergence(stored - weight, moment, factors) / 2
        size = max(output_error(weight * 0, weight, moment), 1e-30)
        return lambda weight, stored: share * output_error(weight, stored, moment) / size

    def _embedding(self, weight: torch.Tensor, stored: torch.Tensor) -> float:
        often = self.work.on_device(self._frequencies)
        if not self.whole:
            error, size = (float(often @ one.square().sum(1).double()) for one in (stored - weight, weight))
            return error / max(size, 1e-30)
        factors, found = self.work.on_device(self._embedding_factors), 0.0
        step = max(1, CHUNK_VALUES // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            parts = (stored[rows] - weight[rows]).reshape(-1, len(factors), factors.shape[1])
            found += float(often[rows] @ ((parts.transpose(0, 1) @ factors).transpose(0, 1) * parts).sum((1, 2)).double())
        return found / 2 * (self.work.facts.hidden_size if self.work.facts.family.scaled_embedding else 1)

    def _head(self, weight: torch.Tensor, stored: torch.Tensor) -> float:
        facts, states = self.work.facts, self.work.on_device(self._states)
        step, total = max(1, CHUNK_VALUES // len(weight)), torch.zeros(2, dtype=torch.float64, device=weight.device)

        def logits(weight: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
            found = (states @ weight.T) * facts.logit_scale
            cap = facts.logit_softcap
            return torch.tanh(found / cap) * cap if cap else found

        for part in states.split(step):
            ours, theirs = logits(weight, part), logits(stored, part)
            if self.whole:
                one, other = (torch.log_softmax(values, -1) for values in (ours, theirs))
                total += (one.exp() * (one - other)).sum(dtype=torch.float64) / len(states)
            else:
                total += torch.stack([one.square().sum(dtype=torch.float64) for one in (theirs - ours, ours)])
        return float(total[0]) if self.whole else float(total[0] / total[1].clamp(min=1e-30))

    @cached_property
    def _states(self) -> np.ndarray:
        return ends.final_states(self.work.moments.folder)

    @cached_property
    def _embedding_factors(self) -> np.ndarray:
        return ends.embedding_factors(self.work.moments.folder)

    @cached_property
    def _frequencies(self) -> np.ndarray:
        facts = self.work.facts
        return ends.frequencies(self.work.moments.folder, self.work.checkpoint.shape(facts.embedding)[0])
