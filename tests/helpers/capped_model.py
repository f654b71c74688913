"""A model with a biased, scaled and soft capped head, and its stored reference."""

import json

import numpy as np
from safetensors.numpy import save_file
from scipy.special import log_softmax

VOCABULARY = 17
HIDDEN = 5
LENGTH = 12


def capped(hidden: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Return logits with a bias, scaled by 2 and soft capped at 5."""
    return 5 * np.tanh(2.0 * (hidden @ weight.T + bias) / 5)


class CappedModel:
    """A runtime that answers as that model does."""

    name = "capped"
    version = "1.0"
    device = "cpu"

    def __init__(self, folder, left_out: str | None = None) -> None:
        """Store its reference, with a part of the head's description left out."""
        draw = np.random.default_rng(0)
        self.weight = draw.normal(size=(VOCABULARY, HIDDEN)).astype(np.float32)
        self.hidden = draw.normal(size=(2, LENGTH, HIDDEN)).astype(np.float32)
        self.bias = draw.normal(size=VOCABULARY).astype(np.float32)
        self.tokens = draw.integers(0, VOCABULARY, (2, LENGTH)).astype(np.int32)
        states = {"hidden": self.hidden, "tokens": self.tokens}
        save_file(states, folder / "hidden.safetensors")
        head = {"weight": self.weight, "bias": self.bias}
        if left_out == "bias":
            head.pop("bias")
        save_file(head, folder / "head.safetensors")
        (folder / "gold.jsonl").touch()
        info: dict[str, float | None] = {"logit_scale": 2.0, "logit_softcap": 5.0}
        if left_out == "logit_scale":
            info["logit_scale"] = 1.0
        elif left_out == "logit_softcap":
            info["logit_softcap"] = None
        (folder / "reference.json").write_text(json.dumps(info))

    def logprobs(self, ids: np.ndarray) -> np.ndarray:
        assert np.array_equal(ids, self.tokens)
        return log_softmax(capped(self.hidden, self.weight, self.bias), axis=-1)

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        return [0] * max_new_tokens
