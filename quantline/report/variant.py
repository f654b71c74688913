"""One variant in the report, as reports/compression.json has it."""

from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from quantline.metrics.figures.speed import ESTIMATED_SPEED


@dataclass
class VariantRow:
    """One variant in reports/compression.json, whose keys the fields are.

    Attributes:
        variant: Its name.
        recipe: Name of its recipe.
        format: Its container.
        runtime: Where it is measured.
        status: Whether there are figures, and whether they are those of the present parameters,
            files and artifacts.
        failure: Name of what went wrong.
        message: The same in words.
        pareto: Whether no other variant is both smaller and closer to the unquantized model.
        metrics: metrics/<variant>.json.
        speed: metrics/<variant>.speed.json.
        gates: What each of the target's gates says (see `check_gate`).
        lm_eval: Task of lm-evaluation-harness → its metrics.
        flips: Gold items that are answered other than by the unquantized model.
        smoke: Prompts of the smoke test with what was generated.
        layers: The layers with the largest error (see `worst_layers`).
        fallbacks: Layer → how it was rounded, if not as the recipe says (see `fallbacks`).
        grids: How many layers have which grid (see `grid_counts`).
        budget: What a budget chose (see `budget_summary`); None without one.
        beside: The uniform variant that a budget's is compared with (see `uniform_counterpart`).
        lineage: Where the bundle comes from (see `read_lineage`).
        memory: What it takes while it serves (see `memory_use`).
        estimated: Speed on the target's hardware (see `estimate_decoding`); {} without hardware.
        substituted_share: Share of weights that are stored in another type than was asked for.
        provenance: Kind of figure → "measured" or "estimated".
        objections: Why the target cannot take it; empty if it can.
        why_not: What it lost by; empty for the variant that is picked.
    """

    variant: str
    recipe: str
    format: str
    runtime: str
    status: Literal["ok", "failed", "stale"] = "ok"
    failure: str | None = None
    message: str | None = None
    pareto: bool = False
    metrics: dict[str, Any] = field(default_factory=dict)
    speed: dict[str, Any] = field(default_factory=dict)
    gates: list[dict[str, Any]] = field(default_factory=list)
    lm_eval: dict[str, Any] = field(default_factory=dict)
    flips: list[dict[str, Any]] = field(default_factory=list)
    smoke: list[dict[str, Any]] = field(default_factory=list)
    layers: list[dict[str, Any]] = field(default_factory=list)
    fallbacks: dict[str, str] = field(default_factory=dict)
    grids: dict[str, int] = field(default_factory=dict)
    budget: dict[str, Any] | None = None
    beside: dict[str, Any] | None = None
    lineage: dict[str, Any] = field(default_factory=dict)
    memory: dict[str, Any] = field(default_factory=lambda: {"mib": None})
    estimated: dict[str, Any] = field(default_factory=dict)
    substituted_share: float = 0.0
    provenance: dict[str, str] = field(
        default_factory=lambda: {"quality": "measured", "speed": "measured"}
    )
    objections: list[str] = field(default_factory=list)
    why_not: list[str] = field(default_factory=list)

    @property
    def is_measured(self) -> bool:
        """Whether there are figures."""
        return self.status == "ok"

    @property
    def busy(self) -> str:
        """What else the machine did while the speed was measured; "" if it was quiet."""
        return "; ".join(self.speed.get("busy") or ())

    @property
    def problem(self) -> str:
        """Why there are no figures: "stale", or "failed" with the failure's name."""
        return "stale" if self.status == "stale" else f"failed: {self.failure}"

    @property
    def figures(self) -> dict[str, Any]:
        """All figures by their keys; those that are not known are None or absent."""
        return {
            **self.speed,
            **self.metrics,
            "memory_mib": self.memory["mib"],
            ESTIMATED_SPEED: self.estimated.get("decode_tok_s"),
        }

    def to_json(self) -> dict[str, Any]:
        """Return the row as reports/compression.json has it."""
        return asdict(self)
