"""The states of a model, whatever their kinds."""

import pytest
import torch

from quantline.formats.onnx.states import Carried
from tests.helpers.small_models import small_model


def found(model_type: str, **sizes) -> dict[str, tuple]:
    """Return the states of a small model: name → shape."""
    with torch.inference_mode():
        carried = Carried(small_model(model_type, **sizes))
    return {state.past: state.shape for state in carried.states}


@pytest.mark.parametrize(
    ("model_type", "expected"),
    [
        (
            "deepseek_v3",
            {
                "past_key_values.0.key": ("batch", 1, "past", 24),
                "past_key_values.0.value": ("batch", 1, "past", 8),
                "past_key_values.1.key": ("batch", 1, "past", 24),
                "past_key_values.1.value": ("batch", 1, "past", 8),
            },
        ),
        (
            "lfm2",
            {
                "past_states.0.conv": ("batch", 32, 3),
                "past_key_values.1.key": ("batch", 1, "past", 16),
                "past_key_values.1.value": ("batch", 1, "past", 16),
            },
        ),
        (
            "qwen3_next",
            {
                "past_states.0.conv": ("batch", 80, 4),
                "past_states.0.recurrent": ("batch", 4, 8, 12),
                "past_key_values.1.key": ("batch", 1, "past", 16),
                "past_key_values.1.value": ("batch", 1, "past", 16),
            },
        ),
        (
            "minimax",
            {
                "past_states.0.linear_cache": ("batch", 2, 16, 16),
                "past_key_values.1.key": ("batch", 1, "past", 16),
                "past_key_values.1.value": ("batch", 1, "past", 16),
            },
        ),
    ],
)
def test_carried_finds_what_the_models_cache_holds(model_type, expected):
    assert found(model_type) == expected


def test_carried_keeps_what_a_window_would_drop():
    """The window is shorter than the passes that look for what grows."""
    shapes = set(found("gemma3_text").values())
    assert shapes == {("batch", 1, "past", 16)}


def test_carried_takes_no_mask_where_nothing_grows():
    with torch.inference_mode():
        assert "attention_mask" not in Carried(small_model("mamba2")).inputs


@pytest.mark.parametrize("model_type", ["lfm2", "mamba2"])
def test_call_goes_on_from_the_states_that_it_returned(model_type):
    model = small_model(model_type)
    ids = torch.arange(22).reshape(2, 11)
    with torch.inference_mode():
        carried = Carried(model)
        expected = model(input_ids=ids, use_cache=False).logits
        states = [state.zeros(2, 0) for state in carried.states]
        parts = []
        for start, end in ((0, 4), (4, 5), (5, 11)):
            inputs = carried.example(2, start, end - start) | {"input_ids": ids[:, start:end]}
            logits, *states = carried.call(inputs, states)
            parts.append(logits)
    assert torch.allclose(torch.cat(parts, 1), expected, atol=1e-4)
