"""A model without its weights."""

import pytest
import torch
from transformers import AutoConfig

from quantline.model.configuration import read_config
from quantline.model.meta_model import meta_model


@pytest.fixture
def deterministic():
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_no_memory_is_filled_for_parameters_that_are_never_read(deterministic, tmp_path):
    """As torch does with deterministic algorithms: a layer of large experts has gigabytes."""
    config = AutoConfig.for_model(
        "llama", num_hidden_layers=1, hidden_size=8, num_attention_heads=1
    )
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    filled = []
    register = torch.nn.modules.module.register_module_parameter_registration_hook
    hook = register(lambda *_: filled.append(torch.utils.deterministic.fill_uninitialized_memory))
    try:
        model = meta_model(read_config(tmp_path))
    finally:
        hook.remove()
    assert {parameter.device.type for parameter in model.parameters()} == {"meta"}
    assert filled and not any(filled)
    assert torch.utils.deterministic.fill_uninitialized_memory
