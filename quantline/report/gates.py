"""Gates: whether a figure meets a limit, as far as the sample that it was measured on can tell."""

import math
import operator
from collections.abc import Mapping
from typing import Any

from quantline.config.targets import Gate
from quantline.metrics.interval import Measurement, measurement

OPERATORS = {"<=": operator.le, ">=": operator.ge, "<": operator.lt, ">": operator.gt}
PASSES = "passes"
FAILS = "fails"
CANNOT_TELL = "cannot tell"


def verdict(gate: Gate, measured: Measurement) -> str:
    """Return whether a measurement meets a gate: PASSES, FAILS or CANNOT_TELL.

    The last if one end of the interval meets the limit and the other does not. NaN meets none.
    """
    ends = measured.interval or (measured.value,)
    meets = [_meets(gate, end) for end in ends]
    if all(meets):
        return PASSES
    return CANNOT_TELL if any(meets) else FAILS


def _meets(gate: Gate, value: float) -> bool:
    return bool(OPERATORS[gate.operator](value, gate.threshold))


def needed_sample(gate: Gate, measured: Measurement) -> dict[str, Any]:
    """Return how many more tokens or items would decide a gate that cannot tell.

    They are those at which the half width of the interval is the distance to the threshold; a half
    width shrinks with the root of their number.

    Returns:
        {more, unit}; `more` is None where no number would (the figure is the threshold), or where
        the figure is not a mean over them.
    """
    assert measured.interval is not None, "an exact figure leaves nothing open"
    distance = abs(gate.threshold - measured.value)
    if not distance or measured.count is None or measured.busy:
        return {"more": None, "unit": measured.unit}
    # The half that reaches towards the threshold.
    end = measured.interval[gate.threshold > measured.value]
    half = abs(end - measured.value)
    wanted = math.ceil(measured.count * (half / distance) ** 2)
    return {"more": max(1, wanted - measured.count), "unit": measured.unit}


def check_gate(gate: Gate, figures: Mapping[str, Any]) -> dict[str, Any]:
    """Check a gate.

    A figure that is NaN or was not measured fails.

    Args:
        gate: Of the target.
        figures: All figures of a variant.

    Returns:
        The gate's own keys; {value, interval} of the figure, an open end being None; the verdict;
        {needed}: what more it would take, if it cannot tell; {passed}: whether the gate counts as
        passed; and all that in words, under {said}.
    """
    measured = measurement(gate.metric, figures, gate.level, difference=gate.on == "delta")
    if measured is None:
        return {
            **gate.model_dump(),
            "value": None,
            "interval": None,
            "verdict": FAILS,
            "needed": None,
            "passed": False,
            "said": f"{_label(gate)} is not measured, {_wanted(gate)}",
        }
    decided = verdict(gate, measured)
    open_question = decided == CANNOT_TELL
    needed = needed_sample(gate, measured) if open_question else None
    return {
        **gate.model_dump(),
        "value": measured.value,
        "interval": _ends(measured),
        "verdict": decided,
        "needed": needed,
        "passed": _counts_as_passed(gate, measured) if open_question else decided == PASSES,
        "said": _sentence(gate, measured, needed),
    }


def does_not_apply(gate: Gate, why: str) -> dict[str, Any]:
    """Return what `check_gate` does of a gate that there is nothing to look at for: it passes.

    Args:
        gate: Of the target.
        why: In words.
    """
    return {
        **gate.model_dump(),
        "value": None,
        "interval": None,
        "verdict": PASSES,
        "needed": None,
        "passed": True,
        "said": f"{_label(gate)} does not apply: {why}",
    }


def _ends(measured: Measurement) -> list[float | None] | None:
    """Return the ends of an interval as JSON has them."""
    if measured.interval is None:
        return None
    return [end if math.isfinite(end) else None for end in measured.interval]


def _counts_as_passed(gate: Gate, measured: Measurement) -> bool:
    """Whether a gate that cannot tell counts as passed."""
    if gate.cannot_tell == "estimate":
        return _meets(gate, measured.value)
    return gate.cannot_tell == "passes"


def _label(gate: Gate) -> str:
    return f"the difference in {gate.metric}" if gate.on == "delta" else gate.metric


def _wanted(gate: Gate) -> str:
    return f"the gate wants {gate.operator} {gate.threshold:g}"


def _sentence(gate: Gate, measured: Measurement, needed: dict[str, Any] | None) -> str:
    """Return the verdict in words; `needed` is None for a gate that is decided."""
    text = f"{_label(gate)} is {measured.value:.4g}"
    if needed is None or measured.interval is None:
        return f"{text}, {_wanted(gate)}"
    if measured.busy:
        return (
            f"{text} on a busy machine ({'; '.join(measured.busy)}), {_wanted(gate)}: it cannot "
            "tell; measure again while nothing else runs"
        )
    low, high = measured.interval
    sample = f"at {100 * gate.level:g} %" if measured.count else "over the repetitions"
    text = f"{text}, between {low:.4g} and {high:.4g} {sample}, {_wanted(gate)}: it cannot tell"
    if needed["more"] is not None:
        return f"{text}; {needed['more']:,} more {needed['unit']} would decide it"
    if measured.count is None:
        return f"{text}; no number of {needed['unit']} is known that would"
    return f"{text}; the figure is the threshold itself"
