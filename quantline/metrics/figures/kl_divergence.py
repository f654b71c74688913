"""KL divergence of a variant's next-token distributions from the unquantized model's.

The greatest divergence is of the evaluated tokens alone, and so has no standard error.
"""

import numpy as np

from quantline.metrics.figure import Column, Estimate, Figure, register_metric
from quantline.metrics.token_values import TokenValues, mean_se, quantile_se


@register_metric(
    Figure(
        "mean_kld",
        label="mean KL divergence",
        better="lower",
        interval="standard error",
        columns={
            "dvc": Column("KLD", order=20),
            "cli": Column("KLD", "z.5f", order=40),
            "markdown": Column(
                "KL divergence", "z.5f", detail="error", error_format=".5f", order=30
            ),
            "quality": Column(
                "KL divergence", "z.5f", detail="noise", error_format=".5f", order=30
            ),
            "model registry": Column("mean_kld", ".6g", order=10),
        },
    )
)
def mean_kld(tokens: TokenValues) -> Estimate:
    """Return the mean over tokens."""
    return Estimate(float(tokens.ordered_kld.mean()), mean_se(tokens.ordered_kld))


def _quantile(tokens: TokenValues, share: float) -> Estimate:
    ordered = tokens.ordered_kld
    return Estimate(float(np.quantile(ordered, share)), quantile_se(ordered, share))


@register_metric(
    Figure(
        "median_kld",
        label="median KL divergence",
        better="lower",
        interval="standard error",
        columns={"tail": Column("median KL", detail="error", order=10)},
    )
)
def median_kld(tokens: TokenValues) -> Estimate:
    """Return the median over tokens."""
    return _quantile(tokens, 0.5)


@register_metric(
    Figure(
        "p99_kld",
        label="KL divergence at the 99th percentile",
        better="lower",
        interval="standard error",
        columns={"tail": Column("99 % KL", detail="error", order=20)},
    )
)
def p99_kld(tokens: TokenValues) -> Estimate:
    """Return what 99 % of the tokens stay below."""
    return _quantile(tokens, 0.99)


@register_metric(
    Figure(
        "p999_kld",
        label="KL divergence at the 99.9th percentile",
        better="lower",
        interval="standard error",
        columns={"tail": Column("99.9 % KL", detail="error", order=30)},
    )
)
def p999_kld(tokens: TokenValues) -> Estimate:
    """Return what 99.9 % of the tokens stay below."""
    return _quantile(tokens, 0.999)


@register_metric(
    Figure(
        "max_kld",
        label="greatest KL divergence",
        better="lower",
        columns={"tail": Column("greatest KL", detail="error", order=40)},
    )
)
def max_kld(tokens: TokenValues) -> Estimate:
    """Return the greatest value of all tokens."""
    return Estimate(float(tokens.ordered_kld[-1]))
