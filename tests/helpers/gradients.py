"""Gradients through the whole model, as transformers and autograd compute them."""

from typing import Any, NamedTuple

import numpy as np
import torch
from torch.nn import functional

from tests.helpers.models import transformers_model


class Seen(NamedTuple):
    """What a linear layer reads, float64 [tokens, in], and the gradients at its outputs."""

    inputs: np.ndarray
    gradients: np.ndarray


def gradient_for_label_one(hidden: torch.Tensor, head: Any, generator: Any) -> torch.Tensor:
    """Return the gradient for the label 1, so that no draw stands between the two sides."""
    logits, slope = head.logits_and_slope(hidden)
    probabilities = torch.softmax(logits, -1)
    probabilities[:, 1] -= 1
    return (probabilities * slope) @ head.weight


def seen_in_transformers(folder: Any, tokens: np.ndarray) -> dict[str, Seen]:
    """Return what all linear layers see, for the label 1 at each token.

    Args:
        folder: Of the checkpoint.
        tokens: int [sequences, length].
    """
    from transformers.pytorch_utils import Conv1D

    model = transformers_model(folder)
    inputs, gradients = {}, {}

    def listen(name):
        def before(module, args):
            inputs[name] = args[0].detach()

        def after(module, by_inputs, by_outputs):
            gradients[name] = by_outputs[0]

        return before, after

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear | Conv1D) and name != "lm_head":
            before, after = listen(name)
            module.register_forward_pre_hook(before)
            module.register_full_backward_hook(after)
    logits = model(torch.from_numpy(tokens).long()).logits
    labels = torch.ones(tokens.size, dtype=torch.long)
    flat = logits.reshape(-1, logits.shape[-1])
    functional.cross_entropy(flat, labels, reduction="sum").backward()
    return {
        name: Seen(
            *(part[name].reshape(tokens.size, -1).double().numpy() for part in (inputs, gradients))
        )
        for name in gradients
    }
