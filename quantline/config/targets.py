"""The section `target`: what a deployment demands, and what it optimizes."""

from typing import Any, Literal, Self

from pydantic import Field, model_validator

from quantline.config.section import Section
from quantline.config.variants import FormatName, RuntimeName


class Gate(Section):
    """A limit that a figure has to keep."""

    metric: str = Field(description="Key of the figure in metrics/<variant>.json.")
    operator: Literal["<=", ">=", "<", ">"]
    threshold: float = Field(allow_inf_nan=False)
    required: bool = Field(default=True, description="Whether failing it excludes a variant.")
    on: Literal["value", "delta"] = Field(
        default="value", description="delta: the difference to the unquantized model."
    )
    level: float = Field(
        default=0.95, gt=0, lt=1, description="Level of the confidence interval that decides."
    )
    cannot_tell: Literal["estimate", "passes", "fails"] = Field(
        default="estimate",
        description="What an interval that holds the threshold counts as; estimate goes by the "
        "figure itself.",
    )

    @model_validator(mode="before")
    @classmethod
    def _read_on(cls, values: Any) -> Any:
        """Read `on` without quotes, which YAML 1.1 takes for a truth value."""
        if isinstance(values, dict) and True in values:
            return {"on" if key is True else key: value for key, value in values.items()}
        return values


class Optimize(Section):
    """By which figure the variants that meet the target are ranked."""

    metric: str
    direction: Literal["min", "max"]
    within: float = Field(
        default=0.005,
        ge=0,
        lt=1,
        description="Share of the best figure by which others count as equal; the KL divergence "
        "then decides.",
    )


class Hardware(Section):
    """A device that is not this machine; what it would do is estimated."""

    name: str
    bandwidth_gb_s: float = Field(
        gt=0,
        allow_inf_nan=False,
        description="Bandwidth of the memory that holds the weights, in 10^9 bytes per second.",
    )


class Target(Section):
    """What a deployment demands of a variant."""

    name: str
    formats: list[FormatName] | None = Field(
        default=None, description="Containers that it can serve; null is every one."
    )
    runtimes: list[RuntimeName] | None = Field(
        default=None, description="Runtimes that it has; null is every one."
    )
    max_size_mib: float | None = Field(default=None, gt=0, description="Limit on disk.")
    max_memory_mib: float | None = Field(default=None, gt=0, description="Limit in memory.")
    context: int | None = Field(
        default=None, gt=0, description="Tokens whose key-value cache counts as memory."
    )
    memory: Literal["measured", "size"] = Field(
        default="measured",
        description="What the cache is added to: this machine's peak, or the size on disk.",
    )
    min_runtimes: int = Field(
        default=1, ge=1, description="In how many runtimes a recipe has to meet the target."
    )
    hardware: Hardware | None = Field(default=None, description="A device to estimate speed for.")
    gates: list[Gate] = Field(default_factory=list)
    optimize: Optimize

    @model_validator(mode="after")
    def _has_hardware(self) -> Self:
        metrics = [gate.metric for gate in self.gates] + [self.optimize.metric]
        estimated = [metric for metric in metrics if metric.startswith("estimated_")]
        if estimated and self.hardware is None:
            raise ValueError(
                f"{estimated[0]} needs hardware: {{name: ..., bandwidth_gb_s: ...}}, found none"
            )
        return self
