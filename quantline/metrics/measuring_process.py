"""The fresh processes in which a bundle is measured, in the runtime that will serve it."""

from pathlib import Path
from typing import Any, NamedTuple

from quantline.config.texts import Limits, Speed
from quantline.run.child_process import call_in_child

# Turns that a thread of a runtime waits for others before it gives up its core. Threads of stages
# give it up at once (quantline/__init__.py), which costs llama.cpp most of its speed on small
# models. The demo's Q8_0 on two cores decoded 1,540 to 1,900 tokens/s with 10,000 turns, 220 to 420
# with none, and 1,430 to 1,830 with libgomp's own 300,000; beside three busy processes 420 to 540,
# 140 to 700, and 130 to 230.
AS_SERVED = {"GOMP_SPINCOUNT": "10000"}


class Measuring(NamedTuple):
    """What is measured, and how the processes that measure are contained.

    Attributes:
        bundle: Its folder.
        runtime: Name of the runtime.
        reference: Folder of the reference stage.
        limits: Of each process.
        python: Its interpreter; None is this one.
    """

    bundle: Path
    runtime: str
    reference: Path
    limits: Limits
    python: str | None = None

    def call(self, function: str, **arguments: Any) -> dict[str, Any]:
        """Call a function of quantline.metrics.measure in a fresh process.

        Args:
            function: Its name.
            arguments: Those besides bundle, runtime and reference.

        Raises:
            StageError: As the function and `call_in_child` do.
        """
        arguments |= {
            "bundle": str(self.bundle),
            "runtime": self.runtime,
            "reference": str(self.reference),
        }
        function = f"quantline.metrics.measure:{function}"
        label = f"the measuring process of {self.bundle.name}"
        return call_in_child(function, arguments, self.limits, label, self.python, AS_SERVED)


def measure_in_child(measuring: Measuring, speed: Speed) -> dict[str, Any]:
    """Measure a bundle in a fresh process.

    Args:
        measuring: The bundle.
        speed: How speed is measured.

    Returns:
        {quality, items, speed, runtime_version}.

    Raises:
        StageError: As `measure_bundle` and `call_in_child` do.
    """
    return measuring.call("measure_bundle", speed=speed.model_dump())
