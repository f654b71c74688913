"""How large a variant is, on disk and while it serves."""

from quantline.metrics.figure import Column, Figure, register_figure

PER_MIB = 2**-20

register_figure(
    Figure(
        "size_bytes",
        label="size",
        better="lower",
        scale=PER_MIB,
        format=".1f",
        unit="MiB",
        columns={
            "dvc": Column("MiB", scale=PER_MIB, order=10),
            "cli": Column("MiB", ".1f", scale=PER_MIB, order=10),
            "markdown": Column("MiB", ".1f", scale=PER_MIB, order=10),
            "quality": Column("MiB", ".1f", scale=PER_MIB, order=10),
            "model registry": Column("size_bytes", ".6g", order=30),
        },
    )
)

register_figure(
    Figure(
        "bits_per_weight",
        label="bits per weight",
        better="lower",
        columns={
            "cli": Column("bits/w", ".2f", order=20),
            "markdown": Column("bits/weight", ".2f", order=20),
            "quality": Column("bits/w", ".2f", order=20),
        },
    )
)

register_figure(
    Figure(
        "layer_bits_per_weight",
        label="bits per weight without embedding and head",
        better="lower",
        columns={
            "markdown": Column("bits/weight in layers", ".2f", order=25),
            "quality": Column("bits/w in layers", ".2f", order=25),
        },
    )
)

register_figure(
    Figure(
        "memory_mib",  # of the report, not of a file: quantline.report.memory makes it
        label="memory",
        better="lower",
        format=".1f",
        unit="MiB",
    )
)

register_figure(
    Figure(
        "peak_rss_mib",
        label="peak memory of the measuring process",
        better="lower",
        format=".1f",
        unit="MiB",
        columns={
            "cli": Column("RAM MiB", ".0f", order=80),
            "speed": Column("peak, MiB", ".0f", order=40),
        },
    )
)
