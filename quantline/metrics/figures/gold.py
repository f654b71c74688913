"""Answers to the gold set. quantline.metrics.significance computes them from the answers."""

from quantline.metrics.figure import Column, Figure, register_figure

register_figure(
    Figure(
        "gold_accuracy",
        label="gold accuracy",
        better="higher",
        interval="gold",
        columns={
            "dvc": Column("gold %", scale=100, order=30),
            "cli": Column("gold %", ".1f", scale=100, order=60),
            "markdown": Column("gold", ".1%", order=50),
            "quality": Column(
                "gold, %", ".1f", scale=100, detail="difference", error_format=".1f", order=60
            ),
            "model registry": Column("gold_accuracy", ".6g", order=20),
        },
    )
)

register_figure(
    Figure(
        "gold_accuracy_delta",
        label="difference in gold accuracy",
        better="higher",
        interval="gold",
    )
)

register_figure(
    Figure(
        "gold_flips",
        label="gold answers that flip",
        better="lower",
        columns={"quality": Column("flips", ".0f", order=70)},
    )
)

register_figure(
    Figure(
        "gold_p_value",
        label="p-value of the flips",
        columns={"quality": Column("p", ".2g", order=80)},
    )
)
