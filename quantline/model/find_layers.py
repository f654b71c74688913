"""The linear layers of a model's blocks: those to round, those of experts, those to keep."""

from torch import nn
from transformers import PreTrainedModel

from quantline.model.experts import Experts, experts_in
from quantline.model.stored_view import StoredView
from quantline.model.structure import ExpertGroup

SMALL_SHARE = 0.05  # of the blocks' weights that may stay as they are
NARROWEST = 32  # inputs and outputs of a layer that is rounded: scales would cost what it saves


def find_linears(
    stack: nn.ModuleList, blocks: str, by_path: dict[str, str]
) -> tuple[tuple[dict[str, str], ...], list[str]]:
    """Return the linear layers of each block that can be rounded, and those that are kept.

    Kept are layers that are narrow, and routers: layers beside experts that have an output for each
    of them, or one alone. A layer that blocks share belongs to the first of them.
    """
    seen: set[int] = set()
    linears = []
    kept = []
    for number, block in enumerate(stack):
        routers = _routers(block)
        own: dict[str, str] = {}
        for inner, module in block.named_modules():
            if not isinstance(module, nn.Linear) or id(module) in seen:
                continue
            seen.add(id(module))
            path = f"{blocks}.{number}.{inner}"
            name = by_path[f"{path}.weight"].removesuffix(".weight")
            if module in routers or min(module.weight.shape) < NARROWEST:
                kept += [name, path]  # servers may look for either
            else:
                own[name] = path
        linears.append(own)
    return tuple(linears), kept


def _routers(block: nn.Module) -> set[nn.Module]:
    """Return the linear layers of a block that choose experts or weigh them."""
    found: set[nn.Module] = set()
    for path, experts in experts_in(block).items():
        parent = block.get_submodule(path.rpartition(".")[0])
        inside = set(experts.modules())
        for module in parent.modules():
            is_beside = isinstance(module, nn.Linear) and module not in inside
            if is_beside and module.out_features in (len(experts), 1):
                found.add(module)
    return found


def linears_outside(model: PreTrainedModel, views: dict[str, StoredView], blocks: str) -> list[str]:
    """Return the checkpoint's names of linear layers outside of the blocks: heads, towers."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.startswith(f"{blocks}."):
            view = views.get(f"{path}.weight")
            key = view.keys[0] if view else path
            names += [key.removesuffix(".weight"), path]
    return names


def find_experts(
    stack: nn.ModuleList, blocks: str, by_path: dict[str, str]
) -> tuple[ExpertGroup, ...]:
    """Return the experts of all blocks, with the names of their layers."""
    groups = []
    for number, block in enumerate(stack):
        for inner, experts in experts_in(block).items():
            path = f"{blocks}.{number}.{inner}"
            layers = tuple(
                tuple(
                    by_path[f"{path}.{name}.weight"].removesuffix(".weight")
                    for name in experts.linears(index)
                )
                for index in range(len(experts))
            )
            groups.append(ExpertGroup(number, path, layers))
    return tuple(groups)


def find_unsplit(stack: nn.ModuleList, blocks: str, by_path: dict[str, str]) -> list[str]:
    """Return parameters that look like several matrices: of three dimensions, not of convolutions.

    Nothing is known of how they are multiplied, so nothing would calibrate them. There are none
    where they are a small share of the weights.
    """
    found = {}
    for number, block in enumerate(stack):
        for inner, module in block.named_modules():
            if isinstance(module, nn.modules.conv._ConvNd | Experts):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if parameter.ndim == 3 and min(parameter.shape) > 1:
                    path = ".".join(filter(None, (blocks, str(number), inner, name)))
                    found[by_path[path]] = parameter.numel()
    total = sum(parameter.numel() for parameter in stack.parameters())
    return list(found) if sum(found.values()) > SMALL_SHARE * total else []
