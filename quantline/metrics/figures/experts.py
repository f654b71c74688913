"""How well the calibration text covers a mixture's experts.

The figures are exact, and those of the calibration: every variant that is rounded by it has them.
"""

from quantline.metrics.figure import Figure, register_figure

register_figure(
    Figure(
        "experts_starved",
        label="experts that too few tokens of the calibration text reached",
        better="lower",
        format=".0f",
    )
)

register_figure(
    Figure(
        "expert_tokens_min",
        label="tokens of the calibration text that reached the expert with the fewest",
        better="higher",
        format=".0f",
    )
)

EXPERT_FIGURES = ("experts", "experts_starved", "expert_tokens_min")
