"""Perplexity on the evaluation text, and its difference to the unquantized model's."""

import numpy as np

from quantline.metrics.figure import Column, Estimate, Figure, register_metric
from quantline.metrics.token_values import TokenValues, mean_se


@register_metric(
    Figure(
        "perplexity",
        label="perplexity",
        better="lower",
        interval="standard error",
        columns={
            "cli": Column("ppl", ".3f", order=30),
            "markdown": Column("perplexity", ".3f", order=40),
            "quality": Column(
                "perplexity", ".3f", detail="difference", error_format=".3f", order=40
            ),
        },
    )
)
def perplexity(tokens: TokenValues) -> Estimate:
    """Return exp of the mean negative log-likelihood of the tokens that follow."""
    value = float(np.exp(tokens.nll.mean()))
    return Estimate(value, value * mean_se(tokens.nll))


@register_metric(
    Figure(
        "perplexity_delta",
        label="difference in perplexity",
        better="lower",
        interval="standard error",
    )
)
def perplexity_delta(tokens: TokenValues) -> Estimate:
    """Return the variant's perplexity less the unquantized model's, on the same tokens."""
    variant = float(np.exp(tokens.nll.mean()))
    reference = float(np.exp(tokens.reference_nll.mean()))
    error = mean_se(variant * tokens.nll - reference * tokens.reference_nll)
    return Estimate(variant - reference, error)
