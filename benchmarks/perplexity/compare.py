"""One variant measured by both sides: figures, times and memory."""

import statistics
from pathlib import Path
from typing import Any

from benchmarks.peers.llama_perplexity import LINES, LlamaPerplexity, parse_figures
from benchmarks.perplexity.ours import measure_in_process
from benchmarks.perplexity.project import Reference
from benchmarks.perplexity.storage import figures_after_storage
from quantline.model.gguf_files import model_files

SHARED_COSTS = ("seconds", "wall_s", "cpu_s", "peak_mib")


def compare_variant(
    tool: LlamaPerplexity, bundle: Path, logits: Path, reference: Reference, repetitions: int
) -> dict[str, Any]:
    """Measure one variant by both sides in turn, several times.

    Args:
        tool: llama-perplexity.
        bundle: Of the variant.
        logits: The tool's reference.
        reference: Ours.
        repetitions: How many times.

    Returns:
        {figures, times: medians of both sides and of ours over all positions, and ratios}.
    """
    folder = reference.folder
    first = reference.first
    if repetitions > 1:  # so that the page cache holds the files
        measure_in_process(bundle, folder, first, tool.threads)
    theirs = []
    ours = []
    ours_everywhere = []
    for _ in range(repetitions):
        run = tool.run(model_files(bundle)[0], logits, "--kl-divergence")
        theirs.append(run.costs)
        ours.append(measure_in_process(bundle, folder, first, tool.threads))
        ours_everywhere.append(measure_in_process(bundle, folder, 0, tool.threads))
    figures = compare_figures(
        ours[-1]["figures"], parse_figures(run.text), figures_after_storage(bundle, folder, first)
    )
    tool_costs = medians(theirs, *SHARED_COSTS)
    our_costs = medians(ours, *SHARED_COSTS, "load_s", "anonymous_mib", "work_cpu_s")
    our_costs_everywhere = medians(ours_everywhere, *SHARED_COSTS, "work_cpu_s")
    return {
        "figures": figures,
        "times": {
            "tool": tool_costs,
            "ours": our_costs,
            "ours, all positions": our_costs_everywhere,
        },
        "ratio": our_costs["seconds"] / tool_costs["seconds"],
        "cpu_ratio": our_costs["work_cpu_s"] / tool_costs["cpu_s"],
        "cpu_ratio_processes": our_costs["cpu_s"] / tool_costs["cpu_s"],
        "cpu_ratio_all_positions": our_costs_everywhere["work_cpu_s"] / tool_costs["cpu_s"],
        "ratio_all_positions": our_costs_everywhere["seconds"] / tool_costs["seconds"],
    }


def medians(runs: list[dict[str, Any]], *keys: str) -> dict[str, float]:
    """Return the median over some runs of each key."""
    return {key: statistics.median(run[key] for run in runs) for key in keys}


def compare_figures(
    ours: dict[str, float], theirs: dict[str, float], stored: dict[str, dict[str, float]]
) -> dict[str, dict[str, Any]]:
    """Compare the figures of both sides.

    Args:
        ours: Our figures.
        theirs: Those that the tool printed.
        stored: What `figures_after_storage` returned.

    Returns:
        For each figure both sides, their difference, what 16-bit storage makes of ours, and whether
        the difference is within the bound of storage and printing.
    """
    ours = ours | {"reference_perplexity": ours["perplexity"] - ours["perplexity_delta"]}
    rows: dict[str, dict[str, Any]] = {}
    for name, line in LINES.items():
        bound = stored["bound"][name] + line.last_digit * line.unit / 2
        difference = ours[name] - theirs[name]
        rows[name] = {
            "ours": ours[name],
            "tool": theirs[name],
            "difference": difference,
            "bound": bound,
            "within": abs(difference) <= bound,
            "ours_stored_in_16_bits": stored["figures"][name],
        }
        error = f"{name}_se"
        if error in theirs and error in ours:
            rows[name] |= {"ours_se": ours[error], "tool_se": theirs[error]}
    return rows
