"""The output head: logits from final hidden states, with all that the model's family does to them."""

from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import safe_open
from scipy.special import log_softmax

FILE = "head.safetensors"
BLOCK_VALUES, BLOCK_TOKENS = 1 << 21, 1 << 10  # taken at once, so that a block and what it makes stay in the caches
RESIDENT_VALUES = 1 << 26  # weights kept in float32; a larger head is converted block by block, each time


@dataclass(frozen=True)
class OutputHead:
    """`weight` [V, hidden] in any floating type, or a safetensors slice of that shape, and `bias` float32 [V].

    Logits are (hidden · weightᵀ + bias) · scale, then softcap · tanh(logits / softcap) where there is one: transformers'
    order in the families that have either.
    """

    weight: np.ndarray
    scale: float = 1.0
    softcap: float | None = None
    bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        if np.prod(self.shape) <= RESIDENT_VALUES:
            object.__setattr__(self, "weight", np.asarray(self.weight[:], np.float32))

    @property
    def shape(self) -> tuple[int, int]:
        """(vocabulary, hidden)."""
        return tuple(self.weight.shape if isinstance(self.weight, np.ndarray) else self.weight.get_shape())

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self) -> list[slice]:
        """The vocabulary in even parts."""
        vocabulary, width = self.shape
        most = max(1, min(BLOCK_TOKENS, BLOCK_VALUES // width))
        step = -(-vocabulary // -(-vocabulary // most))
        return [slice(start, min(vocabulary, start + step)) for start in range(0, vocabulary, step)]

    def _float32(self, tokens: slice) -> np.ndarray:
        """The weights of some tokens. bfloat16 is the upper half of float32, which numpy shifts without holding its lock."""
        part = self.weight[tokens]
        if part.dtype == ml_dtypes.bfloat16:
            return np.left_shift(part.view(np.uint16), 16, dtype=np.uint32).view(np.float32)
        return np.asarray(part, np.float32)

    def block(self, hidden: np.ndarray, tokens: slice) -> np.ndarray:
        """Logits float32 [n, block] of some tokens of the vocabulary for hidden [n, D]."""
        made = hidden @ self._float32(tokens).T
        if self.bias is not None:
            made += self.bias[tokens]
        if self.scale != 1:
            made *= np.float32(self.scale)
        if self.softcap:
            made = np.tanh(made / np.float32(self.softcap)) * np.float32(self.softcap)
        return made

    def logits(self, hidden: np.ndarray) -> np.ndarray:
        """Logits float32 [n, V] for hidden [n, D]."""
        return np.concatenate([self.block(hidden, tokens) for tokens in self.blocks()], axis=1)

    def logprobs(self, hidden: np.ndarray) -> np.ndarray:
        """Natural log-probabilities float32 [n, V] for final hidden states [n, hidden]."""
        return log_softmax(self.logits(hidden), axis=-1)


def open_head(reference: Path, facts: dict) -> OutputHead:
    """The head that the reference stage stored in a folder, `facts` being its reference.json."""
    file = safe_open(reference / FILE, "np")
    return OutputHead(file.get_slice("weight"), facts["logit_scale"], facts["logit_softcap"],
                      file.get_tensor("bias") if "bias" in set(file.keys()) else None)
