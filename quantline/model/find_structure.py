"""Finding the structure of a model in the model that transformers builds from its config.json."""

from collections import Counter
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from quantline.errors import Failure, StageError
from quantline.model.check_binding import (
    check_missing,
    check_prefix,
    check_shapes,
    check_surplus,
    check_towers,
    check_unused,
    ignored_tensors,
    tensors_of_towers,
)
from quantline.model.find_layers import (
    find_experts,
    find_linears,
    find_unsplit,
    linears_outside,
)
from quantline.model.meta_model import meta_model
from quantline.model.stored_view import StoredView
from quantline.model.structure import Place, Structure
from quantline.model.take_apart import parts_of, put_in_place, replacements_in
from quantline.model.weight_conversion import Shapes, bind


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
    tower_keys = {
        key for path, view in binding.views.items() if path not in views for key in view.keys
    }
    wanted = {
        name: tuple(tensor.shape)
        for name, tensor in model.state_dict().items()
        if _is_text(name, text_path, head_path)
    }
    aliases = _aliases(model)
    copies = _take_copies(model, views, aliases)
    passed = ignored_tensors(model, binding.unused)
    text_keys = {key for view in views.values() for key in view.keys}
    passed += tensors_of_towers(binding.unused, text_keys | copies.keys(), tower_keys)
    if not any(path.startswith(f"{blocks}.") for path in views):
        check_prefix(binding.unused, blocks)
    check_unused(model, stored, binding.unused, passed)
    check_shapes(views, wanted)
    check_surplus(views, wanted)
    check_missing(model, views, wanted, aliases)
    check_towers(model, binding.views, wanted, aliases)
    names = _names(views, stored, blocks)
    tensors: dict[str, Place] = {}
    for path, view in views.items():
        name = names[path]
        paths = (path, *(other for other in aliases.get(path, ()) if other not in views))
        tensors[name] = Place(paths, None if view.is_plain(stored) and name in stored else view)
    by_path = {path: name for name, place in tensors.items() for path in place.paths}
    passed += tower_keys
    stack = model.get_submodule(blocks)
    assert isinstance(stack, nn.ModuleList)
    linears, kept = find_linears(stack, blocks, by_path)
    head = model.get_submodule(head_path)
    embedding = _path_of(model, model.get_input_embeddings().weight)
    return Structure(
        class_name=type(model).__name__,
        text_path=text_path,
        blocks=blocks,
        block_names=_block_names(views, stored, blocks),
        tensors=tensors,
        linears=linears,
        kept_linears=tuple(sorted({*kept, *linears_outside(model, binding.views, blocks)})),
        experts=find_experts(stack, blocks, by_path),
        embedding=by_path[embedding],
        head=by_path[f"{head_path}.weight"],
        head_path=head_path,
        head_bias=by_path.get(f"{head_path}.bias"),
        passed=tuple(sorted(set(passed))),
        copies={key: names[source] for key, source in copies.items()},
        unsplit=tuple(find_unsplit(stack, blocks, by_path)),
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


def _needs_shape(key: str, tensors: dict[str, Place]) -> bool:
    """Whether a stored tensor is a part of the tensors that views are made of."""
    return key not in tensors or tensors[key].view is not None
