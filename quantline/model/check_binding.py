"""Whether a checkpoint has what a model is made of, and nothing that belongs to nobody."""

import re
from collections.abc import Callable, Iterable

from transformers import PreTrainedModel

from quantline.errors import Failure, StageError
from quantline.model.configuration import CONFIG
from quantline.model.stored_view import StoredView
from quantline.model.weight_conversion import Shapes

SHOWN = 3  # names in one message


def ignored_tensors(model: PreTrainedModel, unused: Iterable[str]) -> list[str]:
    """Return those stored tensors that transformers' class leaves out on purpose."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_unexpected or ()]
    return [key for key in unused if any(pattern.search(key) for pattern in patterns)]


def tensors_of_towers(
    unused: Iterable[str], text: Iterable[str], towers: Iterable[str]
) -> list[str]:
    """Return those stored tensors that nothing is made of and that lie in a tower.

    Nobody here computes with towers, so what a tensor of theirs is for is not asked.

    Args:
        unused: The stored tensors that nothing is made of.
        text: Those that the language model is made of.
        towers: Those that the rest of the model is made of.
    """
    of_text = {start for key in text for start in _starts(key)}
    homes = {
        next((start for start in _starts(key) if start not in of_text), f"{key}.") for key in towers
    }
    return [key for key in unused if homes & set(_starts(key))]


def _starts(key: str) -> list[str]:
    """Return what a name begins with, part by part."""
    parts = key.split(".")
    return [".".join(parts[:count]) + "." for count in range(1, len(parts))]


def check_prefix(stored: Iterable[str], blocks: str) -> None:
    """Refuse a model that was saved inside another, whose name its tensors begin with.

    Args:
        stored: The names of the checkpoint's tensors.
        blocks: What the names of its blocks should begin with.

    Raises:
        StageError: unsupported_architecture.
    """
    for key in sorted(stored):
        prefix, found, _ = key.partition(f".{blocks}.")
        if found:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected tensors named {blocks}.0… as config.json asks, found {key}: it was "
                "saved inside of something (a wrapper for training, an adapter, a model with "
                f"images) whose names begin with {prefix!r}; save the inner model alone with "
                "save_pretrained",
            )


def check_unused(
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


def check_shapes(views: dict[str, StoredView], wanted: Shapes) -> None:
    """Refuse tensors of other shapes than config.json asks for.

    Raises:
        StageError: unsupported_architecture.
    """
    for path, view in views.items():
        if path in wanted and view.shape != wanted[path]:
            raise StageError(
                Failure.UNSUPPORTED_ARCHITECTURE,
                f"expected {view.keys[0]} to be {wanted[path]} as config.json asks, found "
                f"{view.shape}; take the config.json that the weights were saved with",
            )


def check_surplus(views: dict[str, StoredView], wanted: Shapes) -> None:
    """Refuse parts of the model that config.json has no place for, such as experts beyond its own.

    Args:
        views: Path → where its values are stored.
        wanted: The paths that there are.

    Raises:
        StageError: unsupported_architecture.
    """
    strange = sorted(
        {key for path, view in views.items() if path not in wanted for key in view.keys}
    )
    if strange:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected only tensors that {CONFIG} asks for, found {_list(strange)}, which it has "
            "too many of; take the config.json that the weights were saved with",
        )


def check_missing(
    model: PreTrainedModel,
    views: dict[str, StoredView],
    wanted: Shapes,
    aliases: dict[str, list[str]],
) -> None:
    """Refuse a checkpoint that lacks tensors."""
    absent = absent_tensors(model, views, wanted, aliases)
    if absent:
        raise StageError(
            Failure.MISSING_SHARD,
            f"expected {_list(absent)}, which config.json asks for, found no such tensor; fetch "
            "the checkpoint again",
        )


def absent_tensors(
    model: PreTrainedModel,
    views: dict[str, StoredView],
    wanted: Shapes,
    aliases: dict[str, list[str]],
) -> list[str]:
    """Return the paths of wanted tensors whose values are not stored."""
    patterns = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    return [
        path
        for path in sorted(wanted)
        if path not in views
        and not any(other in views for other in aliases.get(path, ()))
        and not any(pattern.search(path) for pattern in patterns)
    ]


def check_towers(
    model: PreTrainedModel,
    views: dict[str, StoredView],
    text: Iterable[str],
    aliases: dict[str, list[str]],
) -> None:
    """Refuse a wrapper whose towers are not in the checkpoint as config.json builds them.

    Nobody here computes with them, but they go into bundles, which have to load.

    Args:
        model: On the meta device.
        views: Path → where its values are stored, of the whole model.
        text: Paths of the language model's tensors, which are checked elsewhere.
        aliases: Path of a parameter → its other paths.

    Raises:
        StageError: missing_shard, unsupported_architecture.
    """
    language = set(text)
    wanted = {
        path: tuple(parameter.shape)
        for path, parameter in model.named_parameters()
        if path not in language
    }
    check_shapes(views, wanted)
    absent = absent_tensors(model, views, wanted, aliases)
    if not absent:
        return
    towers: dict[str, int] = {}
    for path in absent:
        tower = next(start for start in _starts(path) if not any(map(_begins(start), language)))
        towers[tower] = towers.get(tower, 0) + 1
    named = [f"{count} of {tower.removesuffix('.')}" for tower, count in towers.items()]
    raise StageError(
        Failure.MISSING_SHARD,
        f"expected all tensors of a {type(model).__name__}, which {CONFIG} asks for, found no "
        f"such tensors as {absent[0]}: {_list(named)} are missing beside the language model; "
        f"fetch the whole checkpoint, or, if it is the text model alone, {_text_advice(model)}",
    )


def _begins(start: str) -> Callable[[str], bool]:
    return lambda path: path.startswith(start)


def _text_advice(model: PreTrainedModel) -> str:
    """Say what the text model of a wrapper is saved with."""
    from quantline.model.model_class import class_name

    text_type = model.config.get_text_config(decoder=True).model_type
    name = class_name({"model_type": text_type})
    if name == "none" or name == type(model).__name__:
        return "take a model with its towers, for transformers has no class of its text model"
    return (
        f"save it as one: {CONFIG} with the content of text_config, model_type {text_type} and "
        f"architectures {name}"
    )


def _list(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
