"""A gold set answered by a model of transformers, whose weights may change between answers."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.model_under_test import ModelUnderTest
from quantline.metrics.gold_items import load_gold
from quantline.metrics.gold_tokens import tokenize_items
from quantline.metrics.scoring import score_items
from quantline.metrics.significance import compare_gold
from quantline.runtimes.runtime import decode_greedily
from quantline.text.tokenizer import Tokenizer


class GoldAnswers:
    """A gold set, and the model with the weights that it has now as scoring needs it.

    Attributes:
        items: The questions as token ids.
        baseline: The unquantized model's answers.
    """

    def __init__(self, model: ModelUnderTest, gold: Path) -> None:
        """Read the questions and answer them.

        Args:
            model: With its own weights.
            gold: The file of the gold set.
        """
        self._model = model.model
        self._tokenizer = Tokenizer(model.checkpoint.folder)
        self.items = tokenize_items(load_gold(gold), self._tokenizer)
        self.baseline = score_items(self, self.items)

    @torch.inference_mode()
    def logprobs(self, tokens: np.ndarray) -> np.ndarray:
        """Return natural log-probabilities float32 [b, n, V] of the token after each token."""
        logits = self._model(torch.from_numpy(tokens).long()).logits
        return torch.log_softmax(logits, -1).numpy()

    def generate(self, prompt: list[int], max_new_tokens: int, stop: set[int]) -> list[int]:
        """Decode greedily; return the new tokens without the stop token."""
        context = list(prompt)

        def last_logprobs() -> np.ndarray:
            return self.logprobs(np.array([context], np.int32))[0, -1]

        def step(token: int) -> np.ndarray:
            context.append(token)
            return last_logprobs()

        return decode_greedily(last_logprobs(), step, max_new_tokens, stop)

    def decode(self, ids: list[int]) -> str:
        """Return the text of token ids."""
        return self._tokenizer.decode(ids)

    def compare(self) -> dict[str, Any]:
        """Answer again, and return the gold figures beside the unquantized model's."""
        return compare_gold(self.baseline, score_items(self, self.items))
