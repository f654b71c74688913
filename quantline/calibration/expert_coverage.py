"""How many tokens of the calibration text came to each expert of a mixture."""

from typing import Any

from quantline.model.architecture import Architecture


def expert_coverage(arch: Architecture, layers: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Return what each module of experts saw, in the order of the blocks.

    Args:
        arch: Of the model.
        layers: What calibration.json says of each linear layer.

    Returns:
        {block, module: what the experts' names begin with, tokens: how many came to each expert,
        starved: the numbers of those that were calibrated on all tokens}; nothing for a dense
        model.
    """
    modules = []
    for block in range(arch.layers):
        for experts in arch.expert_groups(block):
            names = [name for expert in experts for name in expert]
            # Layers that are too narrow to be rounded are not calibrated.
            entries = [
                next((layers[name] for name in expert if name in layers), {}) for expert in experts
            ]
            if not any(entries):
                continue
            modules.append(
                {
                    "block": block,
                    "module": _shared_start(names),
                    "tokens": [entry.get("tokens", 0) for entry in entries],
                    "starved": [
                        number for number, entry in enumerate(entries) if entry.get("starved")
                    ],
                }
            )
    return modules


def _shared_start(names: list[str]) -> str:
    """Return the module that names of layers have in common."""
    parts = []
    for column in zip(*(name.split(".") for name in names), strict=False):
        if len(set(column)) > 1:
            break
        parts.append(column[0])
    return ".".join(parts)


def coverage_figures(modules: list[dict[str, Any]]) -> dict[str, int] | None:
    """Return the figures that gates can look at; None for a model without experts.

    Args:
        modules: What `expert_coverage` returned.

    Returns:
        {experts: of all blocks and modules, experts_starved: how many of them, expert_tokens_min:
        the fewest tokens that came to one}.
    """
    if not modules:
        return None
    return {
        "experts": sum(len(module["tokens"]) for module in modules),
        "experts_starved": sum(len(module["starved"]) for module in modules),
        "expert_tokens_min": min(min(module["tokens"]) for module in modules),
    }
