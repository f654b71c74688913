"""Measured bundles side by side, and the one to ship."""

import io
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantline.config.targets import Optimize, Target

if TYPE_CHECKING:
    from quantline.model.checkpoint import Checkpoint


@dataclass(frozen=True)
class Comparison:
    """Variants side by side; printed, it is a table with the choice and its reasons.

    Attributes:
        pick: Name of the variant to ship; None if no variant meets the target.
        reasons: The decision in sentences.
        report: Everything, by the keys of reports/compression.json.
    """

    pick: str | None
    reasons: list[str]
    report: dict[str, Any]

    def __str__(self) -> str:
        """Return the table."""
        from quantline.report.terminal import print_report

        text = io.StringIO()
        print_report(self.report, text)
        return text.getvalue()


def compare(
    bundles: Iterable[Path | str],
    folder: Path | str,
    model: "Checkpoint",
    target: Target | dict[str, Any] | None = None,
) -> Comparison:
    """Compare measured bundles and choose the one to ship.

    Args:
        bundles: From `export`, each of them measured.
        folder: Where `measure` put the figures.
        model: From `load_checkpoint`.
        target: As in conf/target; by default the smallest bundle wins, wherever it runs.

    Raises:
        StageError: artifact_changed, if figures are of other bytes than the bundle's.
    """
    from quantline.formats.bundle.manifest import check_bundle
    from quantline.metrics.results import ResultFiles, read_results
    from quantline.report.build import rank
    from quantline.report.rows import fill_in
    from quantline.report.variant import VariantRow

    demands = Target.model_validate(target) if target else smallest()
    rows = []
    for bundle in map(Path, bundles):
        manifest = check_bundle(bundle)
        results = read_results(ResultFiles.of(Path(folder), bundle.name), manifest)
        row = VariantRow(
            bundle.name, manifest["recipe"]["name"], manifest["format"], manifest["runtime"]
        )
        fill_in(row, bundle, manifest, results, demands, model.arch)
        rows.append(row)
    choice = rank(rows, demands, model.arch)
    report = {
        "target": demands.model_dump(mode="json"),
        "pick": choice.pick,
        "runner_up": choice.runner_up,
        "reasons": choice.reasons,
        "variants": [row.to_json() for row in rows],
    }
    return Comparison(choice.pick, choice.reasons, report)


def smallest() -> Target:
    """Return a target that every bundle meets and that ranks by size."""
    return Target(
        name="the smallest",
        optimize=Optimize(metric="size_bytes", direction="min"),
    )
