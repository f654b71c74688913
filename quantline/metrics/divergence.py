"""How far a variant's next-token distributions are from the unquantized model's.

The definitions are those of llama.cpp's `perplexity` tool with --kl-divergence: per token,
KL(P || Q) with P the reference; whether both have the same top token; the difference of the
probability of the token that follows (Δp). The reference is exact: its logits are the stored final
hidden states times the output head, made again block by block of the vocabulary, so that no token's
whole distribution is held. All in natural logarithms.
"""

import os
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import numpy as np
from threadpoolctl import ThreadpoolController

from quantline.errors import Failure, StageError
from quantline.metrics.figure import FIGURES
from quantline.metrics.softmax import block_sums, merge_blocks, normalizers
from quantline.metrics.token_values import TokenValues
from quantline.model.output_head import OutputHead


class _BlockValues(NamedTuple):
    """What `DivergenceCollector.add` needs of a block of the vocabulary, each [n].

    The first four are those of BlockSums, with `top` counted in the whole vocabulary. `following`
    is the reference's logit of the token that follows, float64, and 0 where it is not in the block.
    """

    high: np.ndarray
    top: np.ndarray
    total: np.ndarray
    weighted: np.ndarray
    following: np.ndarray


class DivergenceCollector:
    """Collects the values of tokens chunk by chunk; `summary` makes figures of them.

    Attributes:
        head: The unquantized model's output head.
    """

    def __init__(self, head: OutputHead, threads: int | None = None) -> None:
        """Start without any token.

        Args:
            head: The unquantized model's output head.
            threads: That compare; None is one per core.
        """
        self.head = head
        self.threads = threads or os.cpu_count() or 1
        self._chunks: list[TokenValues] = []
        self._places: list[np.ndarray] = []
        self._blas = ThreadpoolController()

    def add(
        self,
        hidden: np.ndarray,
        logits: np.ndarray,
        following: np.ndarray,
        places: np.ndarray | None = None,
    ) -> None:
        """Add n tokens.

        Threads share the blocks of the vocabulary, and each multiplies matrices alone: threads of
        BLAS go on spinning after a product, and take the time of the runtime's.

        Args:
            hidden: The reference's final hidden states, float32 [n, D].
            logits: The variant's logits or log-probabilities, float32 [n, V], over its whole
                vocabulary, of which the first are the reference's.
            following: Ids of the tokens that follow, [n].
            places: Where the tokens stand in the text, [n]; by default after those before.
        """
        rows = np.arange(len(following))
        if places is None:
            places = rows + sum(len(chunk) for chunk in self._chunks)
        self._places.append(places)
        threads = self.threads

        def block_values(tokens: slice) -> _BlockValues:
            return self._block_values(hidden, logits, following, tokens)

        with self._blas.limit(limits=1), ThreadPoolExecutor(threads) as pool:
            parts = [part for part in np.array_split(logits, threads) if len(part)]
            normalized = list(pool.map(normalizers, parts))
            blocks = list(pool.map(block_values, self.head.blocks()))
        log_sum = np.concatenate([part.log_sum for part in normalized])
        variant_top = np.concatenate([part.top for part in normalized])
        merged = merge_blocks(
            np.stack([block.high for block in blocks]),
            np.stack([block.total for block in blocks]),
            np.stack([block.weighted for block in blocks]),
        )
        reference_top = np.stack([block.top for block in blocks])[merged.best, rows]
        # Log-probabilities of the token that follows.
        p = np.stack([block.following for block in blocks]).sum(0) - merged.log_sum
        q = logits[rows, following] - log_sum
        self._chunks.append(
            TokenValues(
                # Rounding may leave less than 0; NaN stays.
                kld=np.maximum(merged.mean_difference - merged.log_sum + log_sum, 0),
                nll=-q,
                reference_nll=-p,
                delta_p=np.exp(q) - np.exp(p),
                same_top=reference_top == variant_top,
            )
        )

    def _block_values(
        self, hidden: np.ndarray, logits: np.ndarray, following: np.ndarray, tokens: slice
    ) -> _BlockValues:
        """Compare the tokens of one block of the vocabulary."""
        block = self.head.block(hidden, tokens)
        sums = block_sums(block, logits[:, tokens])
        column = following - tokens.start
        inside = (column >= 0) & (column < block.shape[1])
        chosen = block[np.arange(len(block)), np.where(inside, column, 0)]
        following_logits = np.where(inside, chosen, 0).astype(np.float64)
        return _BlockValues(
            sums.high, sums.top + tokens.start, sums.total, sums.weighted, following_logits
        )

    def values(self) -> TokenValues:
        """Return the tokens in the order of the text."""
        places = np.concatenate([np.empty(0, np.int64), *self._places])
        return TokenValues.join(self._chunks).take(np.argsort(places))

    def summary(self) -> dict[str, float]:
        """Return `summarize` of the tokens."""
        return summarize(self.values())


def summarize(tokens: TokenValues) -> dict[str, float]:
    """Return every registered metric, its standard error as <key>_se, and how many tokens.

    Raises:
        StageError: non_finite, if one of them is NaN or infinite.
    """
    with np.errstate(invalid="ignore"):
        figures = compute_figures(tokens)
    broken = sorted(name for name, value in figures.items() if not np.isfinite(value))
    if broken:
        raise StageError(
            Failure.NON_FINITE,
            f"expected finite metrics, found {', '.join(broken)} that are not; look at the "
            "recipe, and at whether its runtime computes in a type that is too narrow",
        )
    return figures


def compute_figures(tokens: TokenValues) -> dict[str, float]:
    """Return every registered metric of these tokens, with standard errors as <key>_se."""
    figures: dict[str, float] = {"tokens": len(tokens)}
    for figure in FIGURES.values():
        if figure.compute is None:
            continue
        estimate = figure.compute(tokens)
        figures[figure.key] = estimate.value
        if estimate.standard_error is not None:
            figures[f"{figure.key}_se"] = estimate.standard_error
    return figures
