"""The family of a model that has no table (families.py), read off the model that transformers builds from config.json.

It says enough to run the model block by block and to round the linear layers of its blocks one by one. What it cannot
say is what a scale could be folded into, and how the model lies in a container with names of its own.
"""

import json
from functools import cache

from quantline.model.families import Block, Family

NORM_EPS = ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon", "layernorm_epsilon")


def derived(config: dict) -> Family | None:
    """The family of a config.json; None for a model that transformers does not know, or whose decoder is not embeddings,
    blocks of equal parts without experts, and one norm.
    """
    return _derived(json.dumps(config, sort_keys=True, default=str))


def completed(config: dict) -> dict:
    """A config.json with the values that transformers takes where it says nothing, sizes under their usual names."""
    known = _known(config)
    found = known.to_dict() | config
    found |= {usual: getattr(known, usual) for usual in known.attribute_map if hasattr(known, usual)}
    eps = next((found[name] for name in NORM_EPS if found.get(name) is not None), 0.0)
    found.setdefault("rms_norm_eps", eps)
    found.setdefault("intermediate_size", 4 * found.get("hidden_size", 0))
    if "logits_scaling" in found:  # Granite divides
        found["logit_scale"] = 1 / found["logits_scaling"]
    return found


def _known(config: dict):
    """transformers' configuration, from its own classes alone. Raises ValueError for an unknown model_type."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{key: value for key, value in config.items() if key != "auto_map"})


@cache
def _derived(text: str) -> Family | None:
    import torch
    from accelerate import init_empty_weights
    from torch import nn
    from transformers import AutoModelForCausalLM

    config = json.loads(text)
    try:
        known = _known(config)
        with init_empty_weights():
            model = AutoModelForCausalLM.from_config(known, dtype=torch.float32, trust_remote_code=False)
    except (ValueError, TypeError, KeyError):  # no such model, or one that cannot be built with these values
        return None
    names = {module: name for name, module in model.named_modules()}
    decoder, head, rows = model.get_decoder(), model.get_output_embeddings(), model.get_input_embeddings()
    parts = [module for module in decoder.children() if list(module.parameters())] if decoder else []
    stacks = [one for one in parts if isinstance(one, nn.ModuleList) and len(one) == known.num_hidden_layers]
    if len(stacks) != 1 or rows not in parts or not isinstance(head, nn.Linear) or head.bias is not None:
        return None
    blocks = stacks[0]
    before, after = parts[:parts.index(blocks)], parts[parts.index(blocks) + 1:]
    shapes = [{name: tuple(one.shape) for name, one in block.named_parameters()} for block in blocks]
    uneven = any(one.keys() != shapes[0].keys() for one in shapes)
    if len(after) != 1 or rows not in before or uneven or any(len(shape) > 2 for shape in shapes[0].values()):
        return None
    outside = {"token_embd" if module is rows else f"{names[module].rpartition('.')[2]}_embd": names[module]
               for module in before}
    modules = {name.rpartition(".")[0]: name.rpartition(".")[0] for name in shapes[0]}
    linears = [name for name, module in blocks[0].named_modules() if isinstance(module, nn.Linear)]
    activation = next((getattr(known, key) for key in ("hidden_activation", "hidden_act") if hasattr(known, key)), None)
    return Family(Block(modules, tuple(((name,), None) for name in linears)),
                  outside=outside | {"output_norm": names[after[0]], "output": names[head]}, blocks=names[blocks],
                  activations=(activation,), tied=bool(known.tie_word_embeddings), normalized="llama")
