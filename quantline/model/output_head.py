"""The output head: logits from final hidden states, with all that a family does to them.

numpy computes them block by block of the vocabulary, torch at once; the formula is one.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import ml_dtypes
import numpy as np
from safetensors import safe_open

from quantline.model.tensor_source import TensorSource

if TYPE_CHECKING:
    import torch

FILE = "head.safetensors"
# Taken at once, so that a block and what is made of it stay in the processor's caches.
BLOCK_VALUES = 1 << 21
BLOCK_TOKENS = 1 << 10
RESIDENT_VALUES = 1 << 26  # weights kept in float32; a larger head is converted block by block

Values = TypeVar("Values", np.ndarray, "torch.Tensor")


@dataclass(frozen=True)
class OutputHead:
    """The head of a model.

    Logits are (hidden · weightᵀ + bias) · scale, then softcap · tanh(logits / softcap) where there
    is a softcap: transformers' order in the families that have either.

    Attributes:
        weight: [vocabulary, hidden]: numpy of any float type, a safetensors slice of that shape,
            or a float32 torch tensor.
        scale: What logits are multiplied by.
        softcap: Logits become softcap · tanh(logits / softcap), if there is one.
        bias: float32 [vocabulary], of the same library as the weight.
    """

    weight: Any
    scale: float = 1.0
    softcap: float | None = None
    bias: Any = None

    def __post_init__(self) -> None:
        """Keep a small head of numpy or of a file in float32."""
        if not self._is_torch and np.prod(self.shape) <= RESIDENT_VALUES:
            object.__setattr__(self, "weight", np.asarray(self.weight[:], np.float32))

    @classmethod
    def of(cls, source: TensorSource) -> "OutputHead":
        """Read the head of a model."""
        arch = source.arch
        return cls(
            source.tensor(arch.head),
            arch.logit_scale,
            arch.logit_softcap,
            source.optional(arch.head_bias),
        )

    @property
    def _is_torch(self) -> bool:
        return not isinstance(self.weight, np.ndarray) and not hasattr(self.weight, "get_shape")

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, hidden)."""
        if hasattr(self.weight, "get_shape"):
            vocabulary, hidden = self.weight.get_shape()
        else:
            vocabulary, hidden = self.weight.shape
        return vocabulary, hidden

    def __len__(self) -> int:
        return self.shape[0]

    def to_torch(self, device: "torch.device") -> "OutputHead":
        """Return the head with torch tensors on a device."""
        import torch

        weight = torch.from_numpy(self._float32(slice(None))).to(device)
        bias = None if self.bias is None else torch.from_numpy(self.bias).to(device)
        return replace(self, weight=weight, bias=bias)

    def blocks(self) -> list[slice]:
        """Cut the vocabulary into even parts."""
        vocabulary, hidden = self.shape
        most = max(1, min(BLOCK_TOKENS, BLOCK_VALUES // hidden))
        step = -(-vocabulary // -(-vocabulary // most))
        return [slice(start, min(vocabulary, start + step)) for start in range(0, vocabulary, step)]

    def _float32(self, tokens: slice) -> np.ndarray:
        """Return the weights of some tokens.

        bfloat16 is the upper half of float32, which numpy shifts without holding Python's lock.
        """
        part = self.weight[tokens]
        if part.dtype == ml_dtypes.bfloat16:
            return np.left_shift(part.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
        return np.asarray(part, np.float32)

    def block(self, hidden: np.ndarray, tokens: slice) -> np.ndarray:
        """Return logits float32 [n, block] of some tokens for hidden [n, D], by numpy."""
        products = hidden @ self._float32(tokens).T
        if self.bias is not None:
            products += self.bias[tokens]
        return self._transform(products)[0]

    def logits(self, hidden: Values) -> Values:
        """Return logits float32 [n, vocabulary] for hidden [n, D]."""
        if not isinstance(hidden, np.ndarray):
            return self.logits_and_slope(hidden)[0]
        return np.concatenate([self.block(hidden, tokens) for tokens in self.blocks()], axis=1)

    def logits_and_slope(
        self, hidden: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor | float]":
        """Return torch's logits [n, vocabulary], and their derivative by hidden · weightᵀ."""
        from torch.nn import functional

        return self._transform(functional.linear(hidden, self.weight, self.bias))

    def _transform(self, products: Values) -> tuple[Values, Values | float]:
        """Scale the products, then take softcap · tanh(logits / softcap) where there is a softcap.

        Returns:
            The logits, and their derivative by the products.
        """
        logits = products
        slope: Values | float = self.scale
        if self.scale != 1:
            logits = logits * self.scale
        if self.softcap:
            capped = logits / self.softcap
            capped = np.tanh(capped) if isinstance(capped, np.ndarray) else capped.tanh()
            logits = capped * self.softcap
            slope = self.scale * (1 - capped**2)
        return logits, slope

    def logprobs(self, hidden: np.ndarray) -> np.ndarray:
        """Return natural log-probabilities float32 [n, vocabulary] for hidden [n, D]."""
        from scipy.special import log_softmax

        return log_softmax(self.logits(hidden), axis=-1)


def open_head(reference: Path, info: dict[str, Any]) -> OutputHead:
    """Return the head that the reference stage stored.

    Args:
        reference: The stage's folder.
        info: Its reference.json.
    """
    file = safe_open(reference / FILE, "np")
    bias = file.get_tensor("bias") if "bias" in set(file.keys()) else None
    return OutputHead(file.get_slice("weight"), info["logit_scale"], info["logit_softcap"], bias)
