"""The KL divergence of a rounded model from the unquantized one, and its gradient."""

import torch

from quantline.calibration.output_moments import CHUNK_VALUES
from quantline.model.output_head import OutputHead


def summed_divergence(
    hidden: torch.Tensor,
    expected: torch.Tensor,
    head: OutputHead,
    expected_head: OutputHead,
) -> tuple[float, torch.Tensor]:
    """Return Σ KL(unquantized || rounded) over tokens, and its gradient by the final states.

    Args:
        hidden: Final hidden states of the rounded model, float32 [n, D].
        expected: Those of the unquantized model, float32 [n, D].
        head: The rounded model's head, with torch tensors.
        expected_head: The unquantized model's, likewise.

    Returns:
        The sum in nats, and float32 [n, D].
    """
    gradients = torch.empty_like(hidden)
    total = 0.0
    step = max(1, CHUNK_VALUES // len(head))
    for start in range(0, len(hidden), step):
        part = slice(start, start + step)
        wanted = torch.log_softmax(expected_head.logits(expected[part]), -1)
        logits, slope = head.logits_and_slope(hidden[part])
        found = torch.log_softmax(logits, -1)
        share = wanted.exp()
        total += float((share * (wanted - found)).sum(-1).double().sum())
        gradients[part] = ((found.exp() - share) * slope) @ head.weight
    return total, gradients
