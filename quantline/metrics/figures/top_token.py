"""How often a variant has the unquantized model's most probable next token."""

import numpy as np

from quantline.metrics.figure import Column, Estimate, Figure, register_metric
from quantline.metrics.token_values import TokenValues


@register_metric(
    Figure(
        "same_top_p",
        label="share of tokens with the same most probable next one",
        better="higher",
        interval="share",
        columns={
            "cli": Column("top %", ".1f", scale=100, order=50),
            "quality": Column(
                "same top, %", ".1f", scale=100, detail="error", error_format=".1f", order=50
            ),
        },
    )
)
def same_top_p(tokens: TokenValues) -> Estimate:
    """Return the share of tokens."""
    share = float(tokens.same_top.mean())
    return Estimate(share, float(np.sqrt(share * (1 - share) / (len(tokens) - 1))))
