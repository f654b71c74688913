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


def infer_family(config: dict[str, Any]) -> Family | None:
    """Infer the family of a config.json.

    Returns:
        None for a model that transformers does not know, or whose decoder is not embeddings,
        blocks of equal parts without experts, and one norm.

    Raises:
        StageError: unsupported_architecture, for values that transformers cannot take.
    """
    return _infer(json.dumps(config, sort_keys=True, default=str))


@cache
def _infer(text: str) -> Family | None:
    from torch import nn
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    from quantline.model.configuration import transformers_config
    from quantline.model.meta_model import meta_model

    config = json.loads(text)
    if config.get("model_type") not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        return None
    known = transformers_config(config)
    model = meta_model(config)
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
