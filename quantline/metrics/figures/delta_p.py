"""Δp: how the probability of the token that follows in the text changes."""

import numpy as np

from quantline.metrics.figure import Column, Estimate, Figure, register_metric
from quantline.metrics.token_values import TokenValues, mean_se


@register_metric(
    Figure(
        "mean_delta_p",
        label="mean change in the probability of the token that follows",
        better="higher",
        interval="standard error",
        columns={"tail": Column("mean Δp, %", scale=100, detail="error", order=50)},
    )
)
def mean_delta_p(tokens: TokenValues) -> Estimate:
    """Return the mean over tokens; below 0 where the variant finds the text less likely."""
    return Estimate(float(tokens.delta_p.mean()), mean_se(tokens.delta_p))


@register_metric(
    Figure(
        "rms_delta_p",
        label="root mean square change in the probability of the token that follows",
        better="lower",
        interval="standard error",
        columns={"tail": Column("RMS Δp, %", scale=100, detail="error", order=60)},
    )
)
def rms_delta_p(tokens: TokenValues) -> Estimate:
    """Return the root of the mean square; its error is llama.cpp's, by the delta method."""
    squares = tokens.delta_p**2
    value = float(np.sqrt(squares.mean()))
    return Estimate(value, mean_se(squares) / (2 * value) if value else 0.0)
