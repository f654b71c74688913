"""Reading the sizes of a model from its config.json."""

import shutil
from pathlib import Path
from typing import Any

from quantline.causes import reading_foreign
from quantline.errors import Failure, StageError
from quantline.model.architecture import Architecture
from quantline.model.configuration import (
    CONFIG,
    complete,
    read_config,
    read_configuration,
    refusal,
)
from quantline.model.configuration import FILE as CONFIGURATION
from quantline.model.family import Block, Family
from quantline.model.find_family import family_of, is_tied, known_family
from quantline.model.structure import FILE as STRUCTURE
from quantline.model.structure import Structure, read_structure

DESCRIPTION = (CONFIG, CONFIGURATION, STRUCTURE)  # the files that say what a model is
# What config.json calls a size; the first name that it has counts.
USUAL_KEYS = {
    "hidden_size": ("hidden_size",),
    "intermediate_size": ("intermediate_size",),
    "layers": ("num_hidden_layers",),
    "heads": ("num_attention_heads",),
    "kv_heads": ("num_key_value_heads",),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_positions": ("max_position_embeddings",),
    "norm_eps": ("rms_norm_eps",),
    "activation": ("hidden_activation", "hidden_act"),
    "rope_theta": ("rope_theta", "rotary_emb_base"),
    "rotary_share": ("partial_rotary_factor", "rotary_pct"),
    "experts": ("num_local_experts", "num_experts"),
    "experts_used": ("num_experts_per_tok",),
    "expert_size": ("moe_intermediate_size", "intermediate_size"),
}


@reading_foreign(Failure.UNSUPPORTED_ARCHITECTURE, "values in config.json that a model takes")
def architecture_from_config(config: dict[str, Any]) -> Architecture:
    """Ask transformers what a config.json means, and read the sizes.

    Raises:
        StageError: unsupported_architecture, for a family that has no table, or a value that
            cannot be taken.
    """
    family = known_family(config)
    return architecture_of(complete(config), family)


def architecture_of(configuration: dict[str, Any], family: Family) -> Architecture:
    """Read the sizes from a completed configuration.

    Raises:
        StageError: unsupported_architecture, for a size that is missing or cannot be.
    """
    name = configuration.get("model_type")
    try:
        arch = _read(str(name), family, configuration)
    except KeyError as error:
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"config.json lacks {error}, which {name} needs; fetch the checkpoint again, or add it",
        ) from None
    _check_sizes(arch, family)
    window = configuration.get("sliding_window")
    if window is not None and (type(window) is not int or window < 1):
        raise refusal("sliding_window", "null or a whole number above 0", repr(window))
    return arch


def architecture_of_structure(configuration: dict[str, Any], structure: Structure) -> Architecture:
    """Read the sizes of a model whose family has no table.

    Those that its structure does not say are only told to people and to containers; they are 0
    where config.json has no such thing.

    Args:
        configuration: Completed.
        structure: What was found out about the model.
    """

    def size(*names: str) -> int:
        found = [configuration.get(name) for name in names]
        usable = [value for value in found if type(value) is int and value > 0]
        return usable[0] if usable else 0

    scale, softcap = structure.logit_scale, structure.logit_softcap
    if scale is None:  # as long as the model has not been run
        scale = configuration.get("logit_scale", 1.0)
        softcap = configuration.get("final_logit_softcapping")
    heads = size("num_attention_heads")
    experts = max((len(group.layers) for group in structure.experts), default=0)
    return Architecture(
        model_type=str(configuration.get("model_type")),
        family=Family(block=Block({}, ()), outside={}, blocks=structure.block_names),
        hidden_size=structure.hidden_size,
        intermediate_size=size("intermediate_size"),
        layers=structure.layers,
        heads=heads,
        kv_heads=size("num_key_value_heads") or heads,
        head_dim=size("head_dim") or (structure.hidden_size // heads if heads else 0),
        vocab_size=structure.vocab_size,
        max_positions=size("max_position_embeddings"),
        norm_eps=float(configuration.get("rms_norm_eps") or 0.0),
        rope_theta=0.0,
        rope_scaling=None,
        rotary_dim=0,
        tied=structure.head == structure.embedding,
        sparse_layers=frozenset(group.block for group in structure.experts),
        experts=experts,
        experts_used=size(*USUAL_KEYS["experts_used"], "top_k_experts", "moe_top_k"),
        expert_size=size(*USUAL_KEYS["expert_size"]),
        logit_scale=float(scale or 1.0),
        logit_softcap=softcap,
        structure=structure,
    )


def architecture_of_folder(folder: Path) -> Architecture:
    """Read the architecture of the model in a folder, without building it.

    Raises:
        StageError: unsupported_architecture, for a model without a table that `load` has found
            nothing out about.
    """
    config = read_config(folder)
    structure = read_structure(folder)
    if structure is not None and family_of(config) is None:
        return architecture_of_structure(read_configuration(folder), structure)
    return architecture_of(read_configuration(folder), known_family(config))


def copy_description(model: Path, folder: Path) -> None:
    """Copy what `architecture_of_folder` reads: a colleague has it without the model's weights.

    Args:
        model: Folder of the model.
        folder: Where to write.
    """
    for name in DESCRIPTION:
        if (model / name).is_file():
            shutil.copyfile(model / name, folder / name)


def _check_sizes(arch: Architecture, family: Family) -> None:
    """Refuse sizes that no model can have, which transformers does not look at."""
    sizes = ["hidden_size", "intermediate_size", "layers", "heads", "kv_heads", "head_dim"]
    sizes += ["vocab_size", "max_positions"]
    if arch.sparse_layers:
        sizes += ["experts", "experts_used", "expert_size"]
    for size in sizes:
        value = getattr(arch, size)
        key = family.keys.get(size, USUAL_KEYS[size][0])
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise refusal(key, "a whole number above 0", repr(value))
    if arch.heads % arch.kv_heads:
        key = family.keys.get("kv_heads", USUAL_KEYS["kv_heads"][0])
        raise refusal(key, f"a divisor of the {arch.heads} heads", str(arch.kv_heads))
    eps = arch.norm_eps
    if isinstance(eps, bool) or not isinstance(eps, int | float) or not 0 <= eps < 1:
        key = family.keys.get("norm_eps", USUAL_KEYS["norm_eps"][0])
        raise refusal(key, "a number from 0 to below 1", repr(eps))


def _number(config: dict[str, Any], key: str, value: Any, zero: bool = False) -> Any:
    """Return a value that is computed with. Raises StageError if it is no number above 0."""
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not (value >= 0 if zero else value > 0):
        raise refusal(key, "a number", f"{config.get(key, value)!r:.80}")
    return value


def _read(name: str, family: Family, config: dict[str, Any]) -> Architecture:
    """Read the sizes. Raises KeyError for one that is not there; StageError as its caller."""

    def key(size: str) -> str:
        """Return what this config.json calls a size, or would."""
        names = (family.keys[size],) if size in family.keys else USUAL_KEYS[size]
        return next((candidate for candidate in names if candidate in config), names[0])

    activation = config.get(key("activation"))
    if activation not in (None, *family.activations):
        raise StageError(
            Failure.UNSUPPORTED_ARCHITECTURE,
            f"expected {key('activation')} {' or '.join(map(str, family.activations))}, found "
            f"{activation!r} in config.json; take another model",
        )
    rope = config.get("rope_parameters") or {}
    rope = rope.get("full_attention") or rope  # some families have one for each kind of layer
    unscaled = ("rope_theta", "partial_rotary_factor")
    scaling = {setting: value for setting, value in rope.items() if setting not in unscaled}
    kind = scaling.get("rope_type", "default")
    heads = _number(config, key("heads"), config[key("heads")])
    hidden = _number(config, key("hidden_size"), config[key("hidden_size")])
    head_dim = _number(config, key("head_dim"), config.get(key("head_dim")) or hidden // heads)
    share = rope.get("partial_rotary_factor", config.get(key("rotary_share"), family.rotary_share))
    share = _number(config, key("rotary_share"), share, zero=True)
    width = config.get(key("intermediate_size")) or family.widening * hidden
    theta = rope.get("rope_theta", config.get(key("rope_theta"), 10000.0))
    theta = _number(config, key("rope_theta"), theta)
    layers = _number(config, key("layers"), config[key("layers")])
    sparse: dict[str, Any] = {}
    if family.sparse:
        dense = config.get("mlp_only_layers") or ()
        step = config.get("decoder_sparse_step") or 1
        sparse = {size: config[key(size)] for size in ("experts", "experts_used", "expert_size")}
        sparse["sparse_layers"] = frozenset(
            layer for layer in range(layers) if layer not in dense and (layer + 1) % step == 0
        )
    return Architecture(
        model_type=name,
        family=family,
        hidden_size=hidden,
        intermediate_size=width or config[key("intermediate_size")],
        layers=layers,
        heads=heads,
        kv_heads=config.get(key("kv_heads")) or heads,
        head_dim=head_dim,
        vocab_size=config[key("vocab_size")],
        max_positions=config[key("max_positions")],
        norm_eps=config[key("norm_eps")],
        rope_theta=float(theta),
        rope_scaling=scaling if kind != "default" else None,
        rotary_dim=int(head_dim * share),
        tied=is_tied(config, family),
        logit_softcap=config.get("final_logit_softcapping"),
        logit_scale=config.get("logit_scale", 1.0),
        **sparse,
    )
