"""The family of a model that has no table, read off the model that transformers builds.

It says enough to run the model block by block and to round the linear layers of its blocks one by
one. It cannot say what a scale could be folded into, nor how the model lies in a container with
names of its own.
"""

import json
from functools import cache
from typing import TYPE_CHECKING, Any

from quantline.model.family import Block, Family, InputGroup

if TYPE_CHECKING:
    from torch import nn

NORM_EPS = (
    "rms_norm_eps",
    "layer_norm_eps",
    "layer_norm_epsilon",
    "norm_eps",
    "norm_epsilon",
    "layernorm_epsilon",
)


def infer_family(config: dict[str, Any]) -> Family | None:
    """Infer the family of a config.json.

    Returns:
        None for a model that transformers does not know, or whose decoder is not embeddings,
        blocks of equal parts without experts, and one norm.
    """
    return _infer(json.dumps(config, sort_keys=True, default=str))


def complete_config(config: dict[str, Any]) -> dict[str, Any]:
    """Return a config.json with transformers' defaults, and sizes under their usual names."""
    known = _known_config(config)
    completed = known.to_dict() | config
    for usual in known.attribute_map:
        if hasattr(known, usual):
            completed[usual] = getattr(known, usual)
    named_eps = [completed[name] for name in NORM_EPS if completed.get(name) is not None]
    completed.setdefault("rms_norm_eps", named_eps[0] if named_eps else 0.0)
    completed.setdefault("intermediate_size", 4 * completed.get("hidden_size", 0))
    if "logits_scaling" in completed:  # Granite divides
        completed["logit_scale"] = 1 / completed["logits_scaling"]
    return completed


def _known_config(config: dict[str, Any]) -> Any:
    """Return transformers' configuration, from its own classes alone.

    Raises:
        ValueError: If it does not know the model_type.
    """
    from transformers import AutoConfig

    values = {key: value for key, value in config.items() if key != "auto_map"}
    return AutoConfig.for_model(**values)


@cache
def _infer(text: str) -> Family | None:
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = json.loads(text)
    try:
        known = _known_config(config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(
                known, dtype=torch.float32, trust_remote_code=False
            )
    except (ValueError, TypeError, KeyError):  # no such model, or not with these values
        return None
    names = {module: name for name, module in model.named_modules()}
    decoder = model.get_decoder()
    head = model.get_output_embeddings()
    embedding = model.get_input_embeddings()
    parts = [child for child in decoder.children() if list(child.parameters())] if decoder else []
    stacks = [
        part
        for part in parts
        if isinstance(part, nn.ModuleList) and len(part) == known.num_hidden_layers
    ]
    plain_head = isinstance(head, nn.Linear) and head.bias is None
    if len(stacks) != 1 or embedding not in parts or not plain_head:
        return None
    blocks = stacks[0]
    before = parts[: parts.index(blocks)]
    after = parts[parts.index(blocks) + 1 :]
    if len(after) != 1 or embedding not in before or not _blocks_are_alike(blocks):
        return None
    outside = {}
    for module in before:
        part = "token_embd" if module is embedding else f"{_last_name(names[module])}_embd"
        outside[part] = names[module]
    modules = [name.rpartition(".")[0] for name, _ in blocks[0].named_parameters()]
    linears = [name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]
    activations = [
        getattr(known, key) for key in ("hidden_activation", "hidden_act") if hasattr(known, key)
    ]
    return Family(
        block=Block(
            modules={module: module for module in modules},
            inputs=tuple(InputGroup((name,)) for name in linears),
        ),
        outside=outside | {"output_norm": names[after[0]], "output": names[head]},
        blocks=names[blocks],
        activations=(activations[0] if activations else None,),
        tied=bool(known.tie_word_embeddings),
        normalized="llama",
    )


def _last_name(name: str) -> str:
    return name.rpartition(".")[2]


def _blocks_are_alike(blocks: "nn.ModuleList") -> bool:
    """Whether all blocks have the same parameters, none of which is a stack of matrices."""
    names = [{name for name, _ in block.named_parameters()} for block in blocks]
    alike = all(other == names[0] for other in names)
    return alike and all(parameter.ndim <= 2 for parameter in blocks[0].parameters())
