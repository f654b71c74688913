"""How fast a variant is: measured on this machine (quantline.metrics.speed), or estimated."""

from quantline.metrics.figure import Column, Figure, register_figure

ESTIMATED_SPEED = "estimated_decode_tok_s"  # of the report: quantline.report.speed_estimate

register_figure(
    Figure(
        "load_s",
        label="seconds to load",
        better="lower",
        timed=True,
        columns={"speed": Column("load, s", ".2f", order=10)},
    )
)

register_figure(
    Figure(
        "prefill_tok_s",
        label="prefill speed in tokens/s",
        better="higher",
        interval="spread",
        timed=True,
        repetitions="prefill",
        columns={
            "speed": Column(
                "prefill, tokens/s", ".0f", detail="quartiles", error_format=".0f", order=20
            )
        },
    )
)

register_figure(
    Figure(
        "decode_tok_s",
        label="decoding speed in tokens/s",
        better="higher",
        interval="spread",
        timed=True,
        repetitions="decode",
        columns={
            "dvc": Column("tok/s", order=40),
            "cli": Column("tok/s", ".0f", order=70),
            "markdown": Column("tokens/s", ".0f", order=60),
            "speed": Column(
                "decode, tokens/s", ".0f", detail="quartiles", error_format=".0f", order=30
            ),
        },
    )
)

register_figure(
    Figure(
        ESTIMATED_SPEED,
        label="estimated decoding speed in tokens/s",
        better="higher",
    )
)
