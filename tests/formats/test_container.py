"""Every registered container has an implementation, and describes its tensors."""

import json
import os
import subprocess
import sys

import numpy as np

from quantline.config.containers import CONTAINERS
from quantline.formats.container import Container, StoredTensor, load_container
from tests.helpers.project import ROOT

REGISTRATIONS = """
import json
import sys

import quantline.formats.container
import quantline.formats.gguf
import quantline.formats.onnx
import quantline.formats.safetensors

heavy = {"gguf", "numpy", "onnx", "safetensors", "torch", "transformers"}
print(json.dumps(sorted(heavy & set(sys.modules))))
"""


def test_load_container_imports_every_implementation():
    assert {"gguf", "onnx", "safetensors"} <= set(CONTAINERS)
    for name in CONTAINERS:
        assert isinstance(load_container(name), Container)


def test_containers_are_registered_without_heavy_imports():
    done = subprocess.run(
        [sys.executable, "-c", REGISTRATIONS],
        capture_output=True,
        text=True,
        check=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
    )
    assert json.loads(done.stdout) == []


def test_stored_tensor_counts_scales_and_zero_points():
    tensor = StoredTensor("int4", (4, 32), 4 * 32 // 2 + 16, lambda: np.zeros((4, 32)))
    assert tensor.weights == 128
    assert tensor.bits == 5.0
