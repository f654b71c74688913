"""What each variant generates for the prompts of the smoke test, beside full precision."""

from typing import Any, NamedTuple

from quantline.report.build import Report
from quantline.report.variant import VariantRow


class Generation(NamedTuple):
    """What one variant generated.

    Attributes:
        row: Of the variant.
        same: As far as it is what full precision generates.
        other: The rest.
    """

    row: VariantRow
    same: str
    other: str


def answers_by_prompt(report: Report) -> list[dict[str, Any]]:
    """Return {prompt, full, generations} of each prompt, the variants in the report's order.

    `full` is what the unquantized model generates; None where that is not here.
    """
    full = {answer["prompt"]: answer["output"] for answer in report.answers}
    prompts = dict.fromkeys(full)
    for row in report.measured:
        prompts |= dict.fromkeys(answer["prompt"] for answer in row.smoke)
    return [
        {
            "prompt": prompt,
            "full": full.get(prompt),
            "generations": list(_generations(report.measured, prompt, full.get(prompt))),
        }
        for prompt in prompts
    ]


def _generations(rows: list[VariantRow], prompt: str, full: str | None) -> list[Generation]:
    found = []
    for row in rows:
        for answer in row.smoke:
            if answer["prompt"] == prompt:
                same = _common_start(full or "", answer["output"])
                found.append(Generation(row, same, answer["output"].removeprefix(same)))
    return found


def _common_start(first: str, second: str) -> str:
    """Return what two texts both begin with."""
    length = 0
    for one, other in zip(first, second, strict=False):
        if one != other:
            break
        length += 1
    return first[:length]
