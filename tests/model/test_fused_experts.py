"""Experts of every form that transformers has, taken apart, compute what the fused ones do."""

import pytest
import torch
from torch import nn

from quantline.model.experts import Experts
from quantline.model.fused_experts import replacement_of

WIDTH, INNER, COUNT, TOKENS = 32, 48, 4, 24
SIZES = {"hidden_size": WIDTH, "intermediate_size": INNER, "num_hidden_layers": 1}


def module_of(path: str, config_name: str, **sizes) -> nn.Module:
    """Build one of transformers' modules with random weights."""
    import importlib

    import transformers

    name, _, cls = path.rpartition(".")
    config = getattr(transformers, config_name)(**{**SIZES, **sizes})
    config._experts_implementation = "eager"
    module_type = getattr(importlib.import_module(f"transformers.models.{name}"), cls)
    module = module_type(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / 4)
    return module.eval()


def routed() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(TOKENS, WIDTH, generator=generator)
    chosen = torch.stack([torch.randperm(COUNT, generator=generator)[:2] for _ in range(TOKENS)])
    return hidden, chosen, torch.rand(TOKENS, 2, generator=generator)


def sorted_rows() -> tuple[torch.Tensor]:
    """Llama 4's: a row for every token and expert, of zeros where it was sent elsewhere."""
    hidden, chosen, weights = routed()
    rows = torch.zeros(COUNT, TOKENS, WIDTH)
    rows[chosen[:, 0], torch.arange(TOKENS)] = hidden * weights[:, :1]
    return (rows.reshape(-1, WIDTH),)


FORMS = {
    "concatenated": (
        "qwen3_moe.modeling_qwen3_moe.Qwen3MoeExperts",
        "Qwen3MoeConfig",
        {"num_experts": COUNT, "moe_intermediate_size": INNER},
        routed,
    ),
    "interleaved, transposed, with biases and clamps": (
        "gpt_oss.modeling_gpt_oss.GptOssExperts",
        "GptOssConfig",
        {"num_local_experts": COUNT},
        routed,
    ),
    "without a gate": (
        "nemotron_h.modeling_nemotron_h.NemotronHExperts",
        "NemotronHConfig",
        {"n_routed_experts": COUNT, "moe_intermediate_size": INNER},
        routed,
    ),
    "concatenated with clamps, not in the protocol": (
        "step3p7.modeling_step3p7.Step3p7Experts",
        "Step3p7TextConfig",
        {"num_local_experts": COUNT, "moe_intermediate_size": INNER},
        routed,
    ),
    "on sorted rows": (
        "llama4.modeling_llama4.Llama4TextExperts",
        "Llama4TextConfig",
        {"num_local_experts": COUNT},
        sorted_rows,
    ),
}


def split(fused: nn.Module) -> Experts:
    """Return the replacement with the fused module's weights."""
    replacement = replacement_of(fused)
    assert isinstance(replacement.module, Experts)
    for name, parameter in list(fused.named_parameters()):
        parts = replacement.parts.get(name)
        for path, part in (parts(parameter.detach()) if parts else {}).items():
            own = replacement.module.get_parameter(path)
            assert own.shape == part.shape
            own.data = part.contiguous()
    return replacement.module


@pytest.mark.parametrize("undercalibrated", [(), (0, 2)])
@pytest.mark.parametrize("form", FORMS)
def test_replacement_computes_what_the_fused_module_does(form, undercalibrated):
    path, config, sizes, inputs = FORMS[form]
    fused = module_of(path, config, **sizes)
    if hasattr(fused, "limit"):
        fused.limit = 0.5  # so that clamps do something
    ours = split(fused)
    ours.undercalibrated = frozenset(undercalibrated)
    results = []
    for module in (fused, ours):
        states, *rest = inputs()
        states.requires_grad_(True)
        out = module(states, *rest)
        out.square().sum().backward()
        results.append((out.detach(), states.grad))
    for expected, found in zip(*results, strict=True):
        assert expected.abs().max() > 0.01
        # Rows of zeros give no gradient here: nobody asks for it.
        used = states.abs().sum(-1) > 0 if found is results[1][1] else slice(None)
        assert torch.allclose(expected[used], found[used], atol=1e-4)


def test_jetmoe_experts_run_on_the_rows_that_they_are_given():
    from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts

    fused = JetMoeParallelExperts(COUNT, WIDTH, INNER)
    with torch.no_grad():
        fused.weight.copy_(torch.randn(fused.weight.shape))
    ours = split(fused)
    rows, counts = torch.randn(10, WIDTH), [3, 0, 5, 2]
    assert torch.allclose(fused(rows, counts), ours(rows, counts), atol=1e-5)
    assert ours.tokens_seen == counts
    ours.undercalibrated = frozenset([1])
    seen = []
    list(ours)[1].register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    assert torch.allclose(fused(rows, counts), ours(rows, counts), atol=1e-5)
    assert seen == [10]  # the expert that nothing came to sees all rows


def test_dbrx_experts_are_apart_as_rows_and_columns():
    from transformers.models.dbrx.configuration_dbrx import DbrxFFNConfig
    from transformers.models.dbrx.modeling_dbrx import DbrxExperts

    config = DbrxFFNConfig(
        hidden_size=WIDTH, ffn_hidden_size=INNER, moe_num_experts=COUNT, moe_top_k=2
    )
    config.ffn_act_fn = {"name": "silu"}
    fused = DbrxExperts(config)
    with torch.no_grad():
        for parameter in fused.parameters():
            parameter.copy_(torch.randn(parameter.shape) / 4)
    ours = split(fused)
    hidden, chosen, weights = routed()
    found = ours(hidden[None], chosen, weights)
    assert torch.allclose(fused(hidden[None], chosen, weights), found, atol=1e-4)


def test_linear_layers_stay_and_conv1d_becomes_one():
    from transformers.pytorch_utils import Conv1D

    assert replacement_of(nn.Linear(4, 8)) is None
    conv = Conv1D(8, 4)
    replacement = replacement_of(conv)
    assert replacement.module.weight.shape == (8, 4)
    parts = replacement.parts["weight"](conv.weight)
    assert torch.equal(parts["weight"], conv.weight.T)
