"""What rounding one tensor costs: by how much the KL divergence is predicted to rise.

It is predicted from the calibration alone. A linear layer's error Δ costs tr(G Δ H Δᵀ) / 2 for
each token that reaches it (quantline/calibration/output_moments.py). The embedding's is
Σ f Δ G Δᵀ / 2 over its rows, with each token's frequency f; the head's is the divergence on final
hidden states of the calibration text. The costs of all tensors add up to the prediction for the
model.

A calibration without gradients has no common measure: there every cost is the share of the squared
output that is error.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property

import numpy as np
import torch

from quantline.calibration import embedding_and_head
from quantline.errors import Failure, StageError
from quantline.files import check_made
from quantline.methods.integer.curvature import divergence
from quantline.methods.integer.output_error import output_error
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.recipes.context import QuantizationContext

CHUNK_VALUES = 1 << 24  # logits, or weights of an embedding, held at once
TINY = 1e-30  # what squared outputs count at least, so that they can divide

Cost = Callable[[torch.Tensor], float]


def has_cost(ctx: QuantizationContext, tensor: str) -> bool:
    """Whether there is a cost for a tensor of the source."""
    if tensor in (ctx.arch.embedding, ctx.arch.head):
        return True
    return tensor.removesuffix(".weight") in ctx.calibration.layers


class Costs:
    """The costs of rounding one model's tensors.

    Attributes:
        in_nats: Whether the calibration has gradients, so that costs are KL divergences.
        unit: What they are measured in, in words.
    """

    def __init__(self, ctx: QuantizationContext) -> None:
        """Check that the calibration has what costs need.

        Raises:
            StageError: missing_file, if it was made before there were budgets.
        """
        self.ctx = ctx
        self.in_nats = ctx.calibration.has_gradients
        if self.in_nats:
            self.unit = "nats of KL divergence per token"
            needed = [embedding_and_head.FINAL, embedding_and_head.EMBEDDING]
        else:
            self.unit = "share of the squared output"
            needed = [embedding_and_head.FINAL]
        for name in needed:
            check_made(ctx.calibration.folder / name, "calibrate", what="what a budget needs")

    def of(self, tensor: str, weight: torch.Tensor) -> Cost:
        """Return the function that predicts what rounding a tensor costs.

        Args:
            tensor: Of the source.
            weight: Its values, float32 [out, in], on the device.

        Returns:
            A function of the rounded weight. It raises StageError: non_finite.
        """
        costs: list[Cost] = []
        if tensor == self.ctx.arch.embedding:
            costs.append(self._cost_of_embedding(weight))
        if tensor == self.ctx.arch.head:
            costs.append(self._cost_of_head(weight))
        if not costs:
            costs.append(self._cost_of_linear(tensor.removesuffix(".weight"), weight))

        def total(stored: torch.Tensor) -> float:
            value = sum(cost(stored) for cost in costs)
            if not np.isfinite(value):
                raise StageError(
                    Failure.NON_FINITE,
                    f"expected a finite cost of rounding {tensor}, found {value}; look at its "
                    "weights and at the calibration text",
                )
            return value

        return total

    def _cost_of_linear(self, layer: str, weight: torch.Tensor) -> Cost:
        calibration = self.ctx.calibration
        token_share = max(calibration.tokens(layer), 1) / calibration.info["tokens"]
        hessian = self.ctx.hessian(layer)
        if self.in_nats:
            fisher_out = self.ctx.on_device(calibration.fisher_out(layer))
            return lambda stored: token_share * divergence(stored - weight, hessian, fisher_out) / 2
        output = max(output_error(weight * 0, weight, hessian), TINY)
        return lambda stored: token_share * output_error(weight, stored, hessian) / output

    def _cost_of_embedding(self, weight: torch.Tensor) -> Cost:
        frequencies = self.ctx.on_device(self._frequencies)
        if self.in_nats:
            return lambda stored: self._embedding_divergence(weight, stored, frequencies)

        def share(stored: torch.Tensor) -> float:
            error = float(frequencies @ (stored - weight).square().sum(1).double())
            output = float(frequencies @ weight.square().sum(1).double())
            return error / max(output, TINY)

        return share

    def _embedding_divergence(
        self, weight: torch.Tensor, stored: torch.Tensor, frequencies: torch.Tensor
    ) -> float:
        """Return Σ f Δ G Δᵀ / 2 over the rows of the embedding [vocabulary, hidden]."""
        fisher = self.ctx.on_device(self._embedding_fisher)
        blocks, size, _ = fisher.shape
        total = 0.0
        step = max(1, CHUNK_VALUES // weight.shape[1])
        for start in range(0, len(weight), step):
            rows = slice(start, start + step)
            parts = (stored[rows] - weight[rows]).reshape(-1, blocks, size)
            products = (parts.transpose(0, 1) @ fisher).transpose(0, 1)
            of_rows = (products * parts).sum((1, 2)).double()
            total += float(frequencies[rows] @ of_rows)
        arch = self.ctx.arch
        factor = arch.hidden_size if arch.family.scaled_embedding else 1
        return total / 2 * factor

    def _cost_of_head(self, weight: torch.Tensor) -> Cost:
        source = self.ctx.source
        head = replace(OutputHead.of(source).to_torch(device()), weight=weight)
        states = self.ctx.on_device(self._states)
        step = max(1, CHUNK_VALUES // len(weight))

        def cost(stored: torch.Tensor) -> float:
            rounded_head = replace(head, weight=stored)
            total = torch.zeros(2, dtype=torch.float64, device=weight.device)
            for part in states.split(step):
                logits = head.logits(part)
                rounded = rounded_head.logits(part)
                if self.in_nats:
                    divergences = _divergence_of_logits(logits, rounded)
                    total += divergences / len(states)
                else:
                    error = (rounded - logits).square().sum(dtype=torch.float64)
                    output = logits.square().sum(dtype=torch.float64)
                    total += torch.stack([error, output])
            if self.in_nats:
                return float(total[0])
            return float(total[0] / total[1].clamp(min=TINY))

        return cost

    @cached_property
    def _states(self) -> np.ndarray:
        return embedding_and_head.final_states(self.ctx.calibration.folder)

    @cached_property
    def _embedding_fisher(self) -> np.ndarray:
        return embedding_and_head.embedding_fisher(self.ctx.calibration.folder)

    @cached_property
    def _frequencies(self) -> np.ndarray:
        vocabulary = self.ctx.source.shape(self.ctx.arch.embedding)[0]
        return embedding_and_head.token_frequencies(self.ctx.calibration.folder, vocabulary)


def _divergence_of_logits(logits: torch.Tensor, rounded: torch.Tensor) -> torch.Tensor:
    """Return the sum over tokens of the KL divergence, float64, for logits [tokens, vocabulary]."""
    logprobs = torch.log_softmax(logits, -1)
    rounded_logprobs = torch.log_softmax(rounded, -1)
    return (logprobs.exp() * (logprobs - rounded_logprobs)).sum(dtype=torch.float64)
