"""Operations that torch's exporter lacks: onnxruntime computes what torch does."""

import io
import warnings

import numpy as np
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional

from quantline.formats.onnx.complex_pairs import in_place_of_complex
from quantline.formats.onnx.symbolics import OPSET, SYMBOLICS, registered


class _Function(nn.Module):
    def __init__(self, function) -> None:
        super().__init__()
        self.function = function

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.function(*inputs)


def in_onnxruntime(function, traced: torch.Tensor, x: torch.Tensor) -> np.ndarray:
    """Trace a function with one tensor, and run it on another of more or fewer rows."""
    file = io.BytesIO()
    with registered(), in_place_of_complex(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            _Function(function),
            (traced,),
            file,
            input_names=["x"],
            dynamic_axes={"x": {0: "rows"}},
            opset_version=OPSET,
            dynamo=False,
            do_constant_folding=False,
        )
    session = onnxruntime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    return session.run(None, {"x": x.numpy()})[0]


def overwritten(x: torch.Tensor) -> torch.Tensor:
    memory = torch.zeros_like(x)
    memory.copy_(x * 2)
    return memory


def turned(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding by complex numbers."""
    angles = torch.arange(4.0)[None, :] * torch.ones(1, 1)
    turns = torch.polar(torch.ones_like(angles), angles) * 0.5
    pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2))
    return torch.view_as_real(pairs * turns[None].unsqueeze(2)[:, :, 0, :]).flatten(2)


RMS_WEIGHT = torch.linspace(0.5, 2.0, 8)
FUNCTIONS = {
    "repeat_interleave, last axis": lambda x: x.repeat_interleave(2, -1),
    "repeat_interleave, an inner axis": lambda x: x.repeat_interleave(3, dim=1),
    "expm1": torch.expm1,
    "expm1 of what is small": lambda x: torch.expm1(x * 1e-6) * 1e6,
    "rms_norm": lambda x: functional.rms_norm(x, (8,), RMS_WEIGHT, 1e-3),
    "rms_norm, no weight": lambda x: functional.rms_norm(x, (3, 8)),
    "copy_": overwritten,
    "cumsum of what is true": lambda x: (x > 0).cumsum(0),
    "flatten": lambda x: x.flatten(-2),
    "complex numbers": turned,
}


@pytest.mark.parametrize("name", FUNCTIONS)
def test_symbolics_compute_what_torch_does(name):
    function = FUNCTIONS[name]
    generator = torch.Generator().manual_seed(0)
    traced, x = (torch.randn(rows, 3, 8, generator=generator) for rows in (2, 5))
    expected = function(x).numpy()
    found = in_onnxruntime(function, traced, x)
    assert found.dtype == expected.dtype
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_flatten_takes_a_tensor_without_rows():
    none = torch.zeros(0, 3, 8)
    assert in_onnxruntime(torch.ops.aten.flatten, torch.ones(2, 3, 8), none).shape == (0,)
    found = in_onnxruntime(lambda x: x.flatten(1), torch.ones(2, 3, 8), none)
    assert found.shape == (0, 24)


def test_registered_leaves_nothing_behind():
    from torch.onnx._internal.torchscript_exporter.registration import registry

    with registered():
        pass
    for name in SYMBOLICS:
        group = registry.get_function_group(name)
        symbolic = group.get(OPSET) if group else None
        assert symbolic is None or not symbolic.__module__.startswith("quantline")
