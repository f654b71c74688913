"""The options of refinement: scales and norms tuned after rounding."""

from pydantic import Field

from quantline.config.section import Section


class Refinement(Section):
    """Tuning of scales and norms after rounding, by the KL divergence of the whole model."""

    steps: int = Field(
        default=0,
        ge=0,
        le=100_000,
        description="Steps in which the scales of all groups and the norms move downhill on the "
        "final KL divergence, while the integers stay; 0 leaves them as they were rounded.",
    )
    learning_rate: float = Field(
        default=0.002,
        gt=0,
        le=0.1,
        allow_inf_nan=False,
        description="How far a step moves them at first: a scale by this share of it, a norm's "
        "weight by this. It falls to nothing by a cosine.",
    )
    sequences: int = Field(
        default=4, gt=0, le=100_000, description="Sequences of the calibration text in a step."
    )

    def misfit(self, sequences: int) -> str | None:
        """Say why a calibration text is too short; None if it is not, or nothing is refined.

        Args:
            sequences: That it has at most.
        """
        if not self.steps or sequences > self.sequences:
            return None
        return (
            f"expected a calibration text of at least {self.sequences + 1} sequences, one more "
            f"than refine.sequences, since what is gained is measured on others than those of the "
            f"steps, found {sequences}; set calibration.sequences higher, or refine.sequences lower"
        )
