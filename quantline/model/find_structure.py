"""Finding the structure of a model in the model that transformers builds from its config.json."""

import re
from collections import Counter
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantline.errors import Failure, StageError
from quantline.model.experts import Experts, experts_in
from quantline.model.fused_experts import parts_of, put_in_place, replacements_in
from quantline.model.meta_model import meta_model
from quantline.model.stored_view import StoredView
from quantline.model.structure import ExpertGroup, Place, Structure
from quantline.model.weight_conversion import Shapes, bind

SHOWN = 3  # names in one message
SMALL_SHARE = 0.05  # of the blocks' weights that may stay as they are
NARROWEST = 32  # inputs and outputs of a layer that is rounded: scales would cost what it saves


def find_structure(config: dict[str, Any], stored: Shapes) -> Structure:
    """Find the structure of a model.

    Args:
        config: The content of config.json.
        stored: Tensor of the checkpoint's files → its shape.

    Raises:
        StageError: unsupported_architecture, for what is no decoder of blocks with an output head,
            or tensors that do not fit it; missing_shard, for tensors that are not there.
    """
    model = meta_model(config)
    text_path = text_decoder_path(model)
    blocks = block_list_path(model, text_path)
    head_path = output_head_path(model)
    own_paths = {name for name in model.state_dict() if _is_text(name, text_path, head_path)}
    replacements = replacements_in(model)

    def take_apart(path: str, tensor: torch.Tensor) -> dict[str, torch.Tensor]:
        if path not in own_paths:
            return {path: tensor}
        return parts_of(path, tensor, replacements)

    binding = bind(model, stored, take_apart)  # transformers' conversion knows its own modules
    put_in_place(model, replacements)
    model.tie_weights()
    views = {
        path: view for path, view in binding.views.items() if _is_text(path, text_path, head_path)
    }
    tower = {path for path in binding.views if path not in views}
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if _is_text(name, text_path, head_path)
    }
    aliases = _aliases(model)
    copies = _take_copies(model, views, aliases)
    passed = _ignored(model, binding.unused)
    passed += _of_towers(binding.unused, text_path, views, _block_names(views, stored, blocks))
    _check_unused(model, stored, binding.unused, passed)
    _check_shapes(views, wanted)
    _check_missing(model, views, wanted, aliases)
    names = _names(views, stored, blocks)
    tensors: dict[str, Place] = {}
    for path, view in views.items():
        name = names[path]
        paths = (path, *(other for other in aliases.get(path, ()) if other not in views))
        tensors[name] = Place(paths, None if view.is_plain(stored) and name in stored else view)
    by_path = {path: name for name, place in tensors.items() for path in place.paths}
    passed += [key for path in tower for key in binding.views[path].keys]
    stack = model.get_submodule(blocks)
    assert isinstance(stack, nn.ModuleList)
    linears, kept = _linears(stack, blocks, by_path)
    head = model.get_submodule(head_path)
    embedding = _path_of(model, model.get_input_embeddings().weight)
    return Structure(
        class_name=type(model).__name__,
        text_path=text_path,
        blocks=blocks,
        block_names=_block_names(views, stored, blocks),
        tensors=tensors,
        linears=linears,
        kept_linears=tuple(sorted({*kept, *_outside_linears(model, binding.views, blocks)})),
        experts=_expert_groups(stack, blocks, by_path),
        embedding=by_path[embedding],
        head=by_path[f"{head_path}.weight"],
        head_path=head_path,
        head_bias=by_path.get(f"{head_path}.bias"),
        passed=tuple(sorted(set(passed))),
        copies={key: names[source] for key, source in copies.items()},
        unsplit=tuple(_unsplit(stack, blocks, by_path)),
        positions=_learned_positions(model),
        hidden_size=head.in_features,
        vocab_size=head.out_features,
        stored={key: shape for key, shape in stored.items() if _needs_shape(key, tensors)},
    )


def text_decoder_path(model: PreTrainedModel) -> str:
    """Return the path of the part that is the language model; "" for the whole."""
    text = model.config.get_text_config(decoder=True)
    if text is model.config:
        return ""
    for path, module in model.named_modules():
        if path and isinstance(module, PreTrainedModel) and module.config is text:
            return path
    raise _refusal(type(model).__name__, "a language model in it", "none with its text_config")


def block_list_path(model: PreTrainedModel, text_path: str) -> str:
    """Return the path of the list of decoder blocks: the one with the most parameters."""
    best = ("", 0)
    for path, module in model.get_submodule(text_path).named_modules():
        if isinstance(module, nn.ModuleList) and not path.startswith(f"{best[0]}."):
            size = sum(parameter.numel() for parameter in module.parameters())
            if size > best[1]:
                best = (path, size)
    if not best[1]:
        raise _refusal(type(model).__name__, "a list of decoder blocks", "none")
    return f"{text_path}.{best[0]}" if text_path else best[0]


def output_head_path(model: PreTrainedModel) -> str:
    """Return the path of the linear layer that makes logits."""
    head = model.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        kind = type(head).__name__ if head is not None else "none"
        raise _refusal(type(model).__name__, "an output head that is a linear layer", kind)
    return next(path for path, module in model.named_modules() if module is head)


def _learned_positions(model: PreTrainedModel) -> int | None:
    """Return how many positions a model has learned; None if it has no embedding of them.

    OPT's has two rows more than positions.
    """
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    tokens = model.get_input_embeddings()
    for module in model.modules():
        is_other = isinstance(module, nn.Embedding) and module is not tokens
        if limit and is_other and limit <= module.num_embeddings <= limit + 2:
            return limit
    return None


def _refusal(name: str, expected: str, found: str) -> StageError:
    return StageError(
        Failure.UNSUPPORTED_ARCHITECTURE,
        f"expected {expected} of {name}, found {found}; take a causal language model",
    )


def _is_text(path: str, text_path: str, head_path: str) -> bool:
    """Whether a tensor belongs to the language model."""
    return not text_path or path.startswith((f"{text_path}.", f"{head_path}."))


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return, for every path of a parameter, the other paths of the same parameter."""
    by_identity: dict[int, list[str]] = {}
    for path, parameter in model.named_parameters(remove_duplicate=False):
        by_identity.setdefault(id(parameter), []).append(path)
    return {
        path: [other for other in paths if other != path]
        for paths in by_identity.values()
        for path in paths
    }


def _take_copies(
    model: PreTrainedModel, views: dict[str, StoredView], aliases: dict[str, list[str]]
) -> dict[str, str]:
    """Take tied parameters out of `views` that a file holds twice.

    Returns:
        Stored tensor → the path of the parameter that it has to be equal to.
    """
    copies = {}
    for target, source in model.all_tied_weights_keys.items():
        if target in views and source in views and source in aliases.get(target, ()):
            copies[views.pop(target).keys[0]] = source
    return copies


def _path_of(model: nn.Module, parameter: nn.Parameter) -> str:
    return next(path for path, own in model.named_parameters() if own is parameter)


def _ignored(model: PreTrainedModel, unused: Iterable[str]) -> list[str]:
    """Return those stored tensors that transformers' class leaves out on purpose."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return [key for key in unused if any(pattern.search(key) for pattern in patterns)]


def _of_towers(
    unused: Iterable[str], text_path: str, views: dict[str, StoredView], block_names: str
) -> list[str]:
    """Return those stored tensors that lie outside of the language model of a larger one.

    Nobody here computes with them, so what they are for is not asked.
    """
    if not text_path:
        return []
    home = block_names.rpartition(".")[0]  # what the names of the language model begin with
    heads = {view.keys[0] for view in views.values()}
    return [key for key in unused if not key.startswith(f"{home}.") and key not in heads]


def _check_unused(
    model: PreTrainedModel, stored: Shapes, unused: list[str], passed: list[str]
) -> None:
    """Refuse stored tensors that nothing is made of and that nobody leaves out on purpose."""
    tied = set(model.all_tied_weights_keys)
    computed = {path for path, _ in model.named_buffers()} - set(model.state_dict())
    ends = tuple(f".{path.rpartition('.')[2]}" for path in computed)
    strange = [
        key
        for key in unused
        if key not in passed and key not in tied and not (ends and key.endswith(ends))
    ]
    if strange:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            "expected only tensors that config.json asks for, found "
            f"{_list(strange)}; take the config.json that the weights were saved with, or another "
            "model",
        )


def _check_shapes(views: dict[str, StoredView], wanted: Shapes) -> None:
    for path, view in views.items():
        if path in wanted and view.shape != wanted[path]:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {view.keys[0]} to be {wanted[path]} as config.json asks, found "
                f"{view.shape}; take the config.json that the weights were saved with",
            )


def _check_missing(
    model: PreTrainedModel,
    views: dict[str, StoredView],
    wanted: Shapes,
    aliases: dict[str, list[str]],
) -> None:
    """Refuse a checkpoint that lacks tensors."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    absent = [
        path
        for path in sorted(wanted)
        if path not in views
        and not any(other in views for other in aliases.get(path, ()))
        and not any(pattern.search(path) for pattern in patterns)
    ]
    if absent:
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected {_list(absent)}, which config.json asks for, found no such tensor; fetch "
            "the checkpoint again",
        )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _block_names(views: dict[str, StoredView], stored: Shapes, blocks: str) -> str:
    """Return what the checkpoint's names of blocks begin with: what most of them do."""
    starts: Counter[str] = Counter()
    for path, view in views.items():
        if path.startswith(f"{blocks}.") and view.is_whole(stored):
            number = path.removeprefix(f"{blocks}.").partition(".")[0]
            start, found, _ = view.keys[0].partition(f".{number}.")
            if found:
                starts[start] += 1
    return starts.most_common(1)[0][0] if starts else blocks


def _names(views: dict[str, StoredView], stored: Shapes, blocks: str) -> dict[str, str]:
    """Return path → name: that of the stored tensor, or for parts of one a name like it."""
    block_names = _block_names(views, stored, blocks)
    names = {}
    taken: dict[str, str] = {}
    for path, view in views.items():
        key = view.keys[0]
        ends_alike = key.rpartition(".")[2] == path.rpartition(".")[2]
        if view.is_whole(stored) and ends_alike:
            name = key
        elif path.startswith(f"{blocks}."):
            name = block_names + path.removeprefix(blocks)
        else:
            name = path
        if name in taken:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected one tensor of the name {name}, found {path} and {taken[name]}; take "
                "another model",
            )
        taken[name] = path
        names[path] = name
    return names


def _linears(
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


def _outside_linears(
    model: PreTrainedModel, views: dict[str, StoredView], blocks: str
) -> list[str]:
    """Return the checkpoint's names of linear layers outside of the blocks: heads, towers."""
    names = []
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear) and not path.startswith(f"{blocks}."):
            view = views.get(f"{path}.weight")
            key = view.keys[0] if view else path
            names += [key.removesuffix(".weight"), path]
    return names


def _expert_groups(
    stack: nn.ModuleList, blocks: str, by_path: dict[str, str]
) -> tuple[ExpertGroup, ...]:
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


def _unsplit(stack: nn.ModuleList, blocks: str, by_path: dict[str, str]) -> list[str]:
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


def _needs_shape(key: str, tensors: dict[str, Place]) -> bool:
    """Whether a stored tensor is a part of the tensors that views are made of."""
    return key not in tensors or tensors[key].view is not None
