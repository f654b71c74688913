"""The plain roundings that layers are compared with, by the name that `Recipe.baseline` has."""

from typing import NamedTuple


class Baseline(NamedTuple):
    """A plain rounding.

    Attributes:
        label: What the reader of a report sees.
        method: The method that rounds like that.
        measure: The figure of a layer's report in which a recipe's gain over it is given.
        measure_label: That figure in words.
    """

    label: str
    method: str
    measure: str
    measure_label: str

    @property
    def possessive(self) -> str:
        """The label for sentences such as "more than round-to-nearest's"."""
        return f"{self.label}'s"


# The names are also what the figures begin with in quantized.json, such as rtn_error.
BASELINES = {
    "rtn": Baseline("round-to-nearest", "rtn", "error", "output error"),
    "ggml": Baseline("ggml's own rounding", "kquant", "divergence", "divergence"),
}
