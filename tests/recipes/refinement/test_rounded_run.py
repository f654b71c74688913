"""Gradients by scales and norms are those of autograd through the whole model."""

import numpy as np
import pytest
import torch
from torch.nn import functional

from quantline.ingest import verify
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.recipes.refinement.student import NORMS
from tests.helpers.models import transformers_model
from tests.helpers.quantized import rounded, tokens_of
from tests.helpers.refinement import (
    all_gradients,
    move_by,
    random_changes,
    rounded_run,
    student_of,
)

SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3}
SHARED = {
    **{"num_hidden_layers": 4, "num_kv_shared_layers": 2, "vocab_size_per_layer_input": 384},
    **{"hidden_size_per_layer_input": 32, "sliding_window": 16, "global_head_dim": 16},
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}


def gradients_of_transformers(student, changes, tokens) -> tuple[float, dict[str, torch.Tensor]]:
    """Return the divergence and its gradients by all changes, in float64."""
    folder = student.source.folder
    model = transformers_model(folder).double()
    ids = torch.from_numpy(tokens).long()
    with torch.no_grad():
        wanted = torch.log_softmax(model(ids).logits, -1)
    leaves = {name: change.double().requires_grad_(True) for name, change in changes.items()}
    weights = {}
    for name, change in leaves.items():
        if name in student.rounded.linears:
            scales = torch.from_numpy(student.rounded.linear(name).scales).double()
            codes = student.codes(name).double()
            weight = codes * (scales * (1 + change))[:, :, None]
            weights[f"{name}.weight"] = weight.reshape(len(weight), -1)
        else:
            weight = torch.from_numpy(student.source.tensor(name)).double()
            weights[name] = weight + change
    logits = torch.func.functional_call(model, weights, (ids,)).logits
    found = torch.log_softmax(logits, -1)
    total = functional.kl_div(found, wanted, reduction="sum", log_target=True) / tokens.size
    total.backward()
    return float(total.detach()), {name: leaf.grad for name, leaf in leaves.items()}


@pytest.mark.parametrize(
    ("family", "symmetric"),
    [("llama", False), ("llama", True), ("qwen3", False), ("gemma2", False), ("gpt_neox", False)],
)
def test_step_gives_the_gradients_of_transformers(family, symmetric, make_model, tmp_path):
    checkpoint = Checkpoint(make_model(tmp_path / "model", family, **SIZES))
    weights = rounded(tmp_path / "rounded", checkpoint, bits=2, symmetric=symmetric)
    student = student_of(checkpoint, weights, tmp_path)
    changes = random_changes(student, 0.05)
    move_by(student, changes)
    tokens = tokens_of(checkpoint, 5, 12)
    run = rounded_run(checkpoint, tokens, student, rows=2)
    total, found = all_gradients(run, [0, 1, 2])
    expected_total, expected = gradients_of_transformers(student, changes, tokens)
    assert total == pytest.approx(expected_total, rel=1e-4)
    assert run.divergence([0, 1, 2], lambda blocks: None) == pytest.approx(total, rel=1e-5)
    flat = {name: value for part in found.values() for name, value in part.items()}
    assert sorted(flat) == sorted(expected)
    assert list(found) == [NORMS, "block-002", "block-001", "block-000"]
    for name, gradient in flat.items():
        wanted = expected[name].float()
        tolerance = 1e-4 * float(wanted.abs().max())
        torch.testing.assert_close(gradient, wanted, rtol=1e-3, atol=tolerance, msg=name)


@pytest.mark.parametrize(
    ("family", "sizes", "distance"),
    # The divergence of the second bends strongly.
    [("mixtral", {"num_local_experts": 3}, 1e-3), ("gemma4_text", SHARED, 2e-4)],
)
def test_step_gives_slopes_of_the_divergence_where_layers_are_taken_apart(
    family, sizes, distance, make_model, tmp_path
):
    """Of experts, and of keys and values that later blocks read; twice, as steps come again."""
    checkpoint = Checkpoint(make_model(tmp_path / "model", family, **SIZES | sizes))
    if family != "mixtral":
        structure = verify.check_blocks(checkpoint)
        checkpoint = Checkpoint(checkpoint.folder, structure=structure)
    weights = rounded(tmp_path / "rounded", checkpoint, bits=3)
    student = student_of(checkpoint, weights, tmp_path)
    tokens = np.random.default_rng(0).integers(3, 380, (3, 12)).astype(np.int32)
    run = rounded_run(checkpoint, tokens, student, rows=2)
    assert run.run.shares_state == (family != "mixtral")
    first = all_gradients(run, [0, 1])
    again = all_gradients(run, [0, 1])
    assert first[0] == again[0]
    gradients = {name: values for part in again[1].values() for name, values in part.items()}
    for part, of_part in first[1].items():
        assert all(torch.equal(again[1][part][name], values) for name, values in of_part.items())
    direction = {
        name: change.abs() * gradients[name].sign() if name in gradients else change
        for name, change in random_changes(student, 1.0, seed=3).items()
    }
    slope = sum(float((gradients[name] * direction[name]).sum()) for name in gradients)
    sides = []
    for sign in (1, -1):
        move_by(student, {name: sign * distance * way for name, way in direction.items()})
        sides.append(run.divergence([0, 1], lambda blocks: None))
    assert (sides[0] - sides[1]) / (2 * distance) == pytest.approx(slope, rel=0.03)


def test_step_goes_by_a_rounded_head(make_model, tmp_path):
    checkpoint = Checkpoint(make_model(tmp_path / "model", tie_word_embeddings=False, **SIZES))
    weights = rounded(tmp_path / "rounded", checkpoint, bits=2, outside=4)
    student = student_of(checkpoint, weights, tmp_path)
    tokens = tokens_of(checkpoint, 2, 12)
    linear = weights.with_outside(["lm_head"]).linear("lm_head")
    head = OutputHead(torch.from_numpy(linear.dequantize()).to(device()))
    plain = rounded_run(checkpoint, tokens, student, rows=2)
    own = rounded_run(checkpoint, tokens, student, rows=2, head=head)
    assert own.divergence([0], lambda blocks: None) > plain.divergence([0], lambda blocks: None)
    found = all_gradients(own, [0])[1]["block-000"]
    other = all_gradients(plain, [0])[1]["block-000"]
    assert all(not torch.equal(found[name], other[name]) for name in found)


def test_run_leaves_the_embedded_tokens_as_they_are(make_model, tmp_path):
    checkpoint = Checkpoint(make_model(tmp_path / "model", **SIZES))
    weights = rounded(tmp_path / "rounded", checkpoint, bits=2)
    student = student_of(checkpoint, weights, tmp_path)
    run = rounded_run(checkpoint, tokens_of(checkpoint, 4, 12), student, rows=2)
    before = [batch.clone() for batch in run.run.hidden]
    all_gradients(run, [1])
    run.divergence([0, 1], lambda blocks: None)
    for batch, same in zip(run.run.hidden, before, strict=True):
        assert torch.equal(batch, same) and not batch.requires_grad
