"""A narrow model to make quantized checkpoints of, and what is wanted of each."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from quantline.ingest.dequantize import dequantize
from tests.helpers.models import write_model
from tests.helpers.quantized_sources import Quantize, plain_tensors, write_source


@pytest.fixture(scope="session")
def narrow(tmp_path_factory) -> Path:
    """Llama in bfloat16 with widths 64 and 160, of which 160 is no multiple of a block of 64."""
    return write_model(
        tmp_path_factory.mktemp("narrow") / "model",
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=1,
        num_key_value_heads=2,
    )


@pytest.fixture
def make_source(narrow, tmp_path) -> Callable[[dict[str, Any], Quantize], Path]:
    """make_source(settings, quantize) writes a quantized checkpoint of the narrow model."""
    return lambda settings, quantize: write_source(narrow, tmp_path / "source", settings, quantize)


@pytest.fixture
def dequantized(tmp_path) -> Callable[[Path], dict[str, np.ndarray]]:
    """dequantized(source) → the tensors of the plain checkpoint."""

    def run(source: Path) -> dict[str, np.ndarray]:
        dequantize(source, tmp_path / "plain")
        return plain_tensors(tmp_path / "plain")

    return run


def bfloat16(values: np.ndarray) -> np.ndarray:
    """Round once."""
    return np.asarray(values, np.float32).astype(ml_dtypes.bfloat16)
