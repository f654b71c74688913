"""What a model is made of, as its weights and its cache say."""

from typing import Any


def kind_of(model: Any) -> str:
    """Return what a model is made of, in words.

    "mixture" if it has weights of experts, else "dense". Before it "hybrid" if some layers keep a
    state of fixed size and some keep keys, or "recurrent" if none keeps keys. After it "wrapper" if
    the text is one part among others.
    """
    text = model.config.get_text_config(decoder=True)
    kinds = [_state(model)] if _state(model) else []
    has_experts = any("expert" in name for name, _ in model.named_parameters())
    kinds.append("mixture" if has_experts else "dense")
    if text is not model.config:
        kinds.append("wrapper")
    return " ".join(kinds)


def _state(model: Any) -> str:
    """Return "hybrid", "recurrent" or nothing, by what a pass leaves in the cache."""
    import torch

    with torch.inference_mode():
        try:
            out = model(input_ids=torch.tensor([[1, 2, 3]]), use_cache=True)
        except Exception:  # it is a decoder all the same, only not with a cache
            return ""
    cache = out.get("past_key_values", out.get("cache_params"))
    layers = getattr(cache, "layers", [])
    states = [_keeps(layer, "is_recurrent_states_initialized") for layer in layers]
    convolutions = [_keeps(layer, "is_conv_states_initialized") for layer in layers]
    has_keys = any(getattr(layer, "keys", None) is not None for layer in layers)
    if any(states) or any(convolutions):
        return "hybrid" if has_keys else "recurrent"
    return ""


def _keeps(layer: Any, name: str) -> bool:
    initialized = getattr(layer, name, {})
    flags = initialized.values() if isinstance(initialized, dict) else [initialized]
    return any(flags)
