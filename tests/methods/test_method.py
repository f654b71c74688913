"""What the calibration knows about a layer, and the check of its weight."""

import pytest
import torch

from quantline.errors import Failure, StageError
from quantline.methods.method import LayerStatistics, check_finite, scale_hessian


def test_scale_hessian_is_that_of_the_scaled_input():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(100, 8, generator=generator)
    scales = torch.rand(8, generator=generator) + 0.5
    scaled = inputs / scales
    hessian = scale_hessian(inputs.T @ inputs, scales)
    assert torch.allclose(hessian, scaled.T @ scaled, rtol=1e-4, atol=1e-4)


def test_scaled_statistics_are_those_of_the_scaled_input_and_output():
    generator = torch.Generator().manual_seed(1)
    inputs = torch.randn(100, 8, generator=generator)
    gradients = torch.randn(100, 6, generator=generator)
    columns = torch.rand(8, generator=generator) + 0.5
    rows = torch.rand(6, generator=generator) + 0.5
    moments = gradients.T @ gradients
    blocks = torch.stack([moments[:3, :3], moments[3:, 3:]])
    statistics = LayerStatistics("x", inputs.T @ inputs, blocks).scaled(columns, rows)
    scaled_inputs = inputs / columns
    scaled_gradients = gradients * rows
    expected = scaled_gradients.T @ scaled_gradients
    fisher_out = statistics.fisher_out
    assert torch.allclose(statistics.hessian, scaled_inputs.T @ scaled_inputs, atol=1e-4)
    assert torch.allclose(fisher_out[0], expected[:3, :3], atol=1e-4)
    assert torch.allclose(fisher_out[1], expected[3:, 3:], atol=1e-4)
    without = LayerStatistics("x", inputs.T @ inputs).scaled(columns, rows)
    assert without.fisher_out is None


def test_layer_statistics_reads_what_few_methods_use_once():
    reads = []

    def read() -> torch.Tensor:
        reads.append(1)
        return torch.ones(3)

    statistics = LayerStatistics("x", torch.eye(3), read_input_peak=read)
    assert not reads
    assert torch.equal(statistics.input_peak, torch.ones(3))
    assert torch.equal(statistics.input_peak, torch.ones(3)) and reads == [1]
    with pytest.raises(AssertionError, match="no sample"):
        _ = statistics.input_sample


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_refuses_weights_by_name(value):
    with pytest.raises(StageError, match="the weight of q_proj is not finite") as caught:
        check_finite("q_proj", torch.tensor([1.0, value]))
    assert caught.value.failure == Failure.NON_FINITE
