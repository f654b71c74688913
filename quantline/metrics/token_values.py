"""The values of every evaluated token that metrics are computed from, and their standard errors.

The standard error of a mean is the sample's standard deviation over the square root of the number
of tokens, that of a function of means follows by the delta method, and that of a quantile is
Maritz and Jarrett's (1978). Tokens count as independent draws.
"""

from dataclasses import dataclass, fields
from functools import cached_property

import numpy as np


@dataclass(frozen=True)
class TokenValues:
    """What was measured at each of n tokens, in natural logarithms.

    Attributes:
        kld: KL divergence of the variant's distribution from the reference's, float64 [n].
        nll: The variant's negative log-likelihood of the token that follows, float64 [n].
        reference_nll: The unquantized model's, float64 [n].
        delta_p: The variant's probability of the token that follows less the unquantized model's,
            float64 [n].
        same_top: Whether both have the same most probable token, bool [n].
    """

    kld: np.ndarray
    nll: np.ndarray
    reference_nll: np.ndarray
    delta_p: np.ndarray
    same_top: np.ndarray

    @classmethod
    def join(cls, chunks: "list[TokenValues]") -> "TokenValues":
        """Return the tokens of all chunks, of which there may be none."""
        if not chunks:
            none = np.empty(0)
            return cls(none, none, none, none, np.empty(0, bool))
        of_chunks = [chunk.arrays() for chunk in chunks]
        return cls(
            **{
                field.name: np.concatenate([arrays[field.name] for arrays in of_chunks])
                for field in fields(cls)
            }
        )

    def take(self, order: np.ndarray) -> "TokenValues":
        """Return the tokens of these numbers, in their order."""
        return TokenValues(**{name: values[order] for name, values in self.arrays().items()})

    def arrays(self) -> dict[str, np.ndarray]:
        """Return the values by name."""
        return {field.name: getattr(self, field.name) for field in fields(self)}

    @cached_property
    def ordered_kld(self) -> np.ndarray:
        """KL divergences in ascending order, as quantiles need them, float64 [n]."""
        return np.sort(self.kld)

    def __len__(self) -> int:
        return len(self.kld)


def mean_se(values: np.ndarray) -> float:
    """Return the standard error of the mean of `values` [n], for n > 1."""
    return float(values.std(ddof=1) / np.sqrt(len(values)))


def quantile_se(ordered: np.ndarray, share: float) -> float:
    """Return the standard error of a quantile (Maritz and Jarrett, JASA 73, 1978).

    The quantile is an order statistic, whose place among the values is beta distributed.

    Args:
        ordered: [n], ascending.
        share: Which quantile, between 0 and 1.
    """
    from scipy.special import betainc

    count = len(ordered)
    edges = np.arange(count + 1) / count
    weights = np.diff(betainc((count + 1) * share, (count + 1) * (1 - share), edges))
    # Not BLAS's products of long vectors, whose last bits depend on the number of threads.
    centre = (weights * ordered).sum()
    return float(np.sqrt((weights * (ordered - centre) ** 2).sum()))
