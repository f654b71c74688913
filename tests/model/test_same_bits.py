"""Results of torch are the same bits for any number of threads, and wherever tensors lie."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from quantline.calibration.collect import collect_statistics, remove_progress
from quantline.model import activation_store
from quantline.model import same_bits as module
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from quantline.model.same_bits import ANY_CUTS, PRODUCTS, at_most, same_bits
from tests.helpers.project import ROOT
from tests.helpers.quantized import tokens_of

pytestmark = pytest.mark.skipif(
    not torch.backends.mkl.is_available(), reason="products are the same bits by a mode of MKL"
)
THREADS = (1, 2, 3, 5)
UNEVEN = 5 * 32768 + 77  # elements that no number of threads cuts into whole vectors
Bits = dict[str, bytes]


@pytest.fixture
def threads():
    """Put the number of threads back."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def draw(*shape: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).normal(size=shape).astype(np.float32))


def at_shifted_address(tensor: torch.Tensor, elements: int) -> torch.Tensor:
    """Return a copy that begins so many elements after an aligned address."""
    room = torch.empty(elements + tensor.numel())
    return room[elements:].view(tensor.shape).copy_(tensor)


def statistics(checkpoint: Checkpoint, tokens: np.ndarray, folder) -> Bits:
    """Return the files of a calibration."""
    folder.mkdir()
    collect_statistics(checkpoint, tokens, folder, seed=0, weighted=True)
    remove_progress(folder)
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_calibration_is_the_same_for_any_number_of_threads(tiny_model, tmp_path, threads):
    """Five sequences of 61 tokens fill no batch and no vector."""
    checkpoint = Checkpoint(tiny_model)
    tokens = tokens_of(checkpoint, 5, 61)
    found = []
    for number in (*THREADS, THREADS[0]):
        torch.set_num_threads(number)
        found.append(statistics(checkpoint, tokens, tmp_path / f"{len(found)}"))
    assert len(found[0]) == 8
    for other in found[1:]:
        assert other == found[0]


def test_calibration_is_the_same_wherever_states_lie(tiny_narrow, tmp_path, monkeypatch):
    """States that are read from a file begin at any address that a float32 may have."""
    checkpoint = Checkpoint(tiny_narrow)
    tokens = tokens_of(checkpoint, 5, 61)
    monkeypatch.setattr(activation_store, "RESIDENT_BYTES", 0)
    read_tensor = activation_store.read_tensor
    found = []
    for shift in (0, 1, 7):

        def read(file, shape, shift=shift):
            return at_shifted_address(read_tensor(file, shape), shift)

        monkeypatch.setattr(activation_store, "read_tensor", read)
        found.append(statistics(checkpoint, tokens, tmp_path / f"{shift}"))
    assert found[1] == found[0] and found[2] == found[0]


def test_hidden_states_are_the_same_for_any_number_of_threads(tiny_model, threads):
    checkpoint = Checkpoint(tiny_model)
    tokens = tokens_of(checkpoint, 5, 61)
    found = []
    for number in THREADS:
        torch.set_num_threads(number)
        found.append(final_hidden_states(checkpoint, tokens, "states"))
    for other in found[1:]:
        assert np.array_equal(other, found[0])


def rows_of(values: torch.Tensor, *shape: int) -> torch.Tensor:
    return values[: np.prod(shape)].view(shape)


def complex_product(values: torch.Tensor) -> torch.Tensor:
    left = torch.complex(values, values.flip(0))
    return torch.view_as_real(left * left.flip(0))


def factor(values: torch.Tensor) -> torch.Tensor:
    rows = rows_of(values, 400, 200)
    return torch.linalg.cholesky(rows.T @ rows + torch.eye(200))


OPERATIONS = {
    "silu": torch.nn.functional.silu,
    "sigmoid": torch.sigmoid,
    "product of complex numbers": complex_product,
    "sum": torch.sum,
    "product": lambda values: rows_of(values, 2500, 64).T @ rows_of(values, 2500, 64),
    "products": lambda values: rows_of(values, 4, 600, 64).mT @ rows_of(values, 4, 600, 64),
    "factor": factor,
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_an_operation_is_the_same_for_any_number_of_threads(name, threads):
    values = draw(UNEVEN)
    found = []
    for number in THREADS:
        torch.set_num_threads(number)
        with same_bits():
            found.append(OPERATIONS[name](values))
        assert torch.get_num_threads() == number
    for other in found[1:]:
        assert torch.equal(other, found[0])


ELEMENTWISE = {
    "aten::_to_copy": lambda a, b: a.double(),
    "aten::abs": lambda a, b: a.abs(),
    "aten::add": lambda a, b: a + b,
    "aten::add_": lambda a, b: a.double().add_(b),
    "aten::cat": lambda a, b: torch.cat((a, b)),
    "aten::clone": lambda a, b: a.clone(),
    "aten::copy_": lambda a, b: torch.empty_like(a).copy_(b),
    "aten::div": lambda a, b: a / b,
    "aten::gather": lambda a, b: a.gather(0, b.argsort()),
    "aten::index": lambda a, b: a[b.argsort()],
    "aten::mul": lambda a, b: a * b,
    "aten::mul_": lambda a, b: a.double().mul_(b),
    "aten::neg": lambda a, b: -a,
    "aten::repeat": lambda a, b: a.repeat(3),
    "aten::sub": lambda a, b: a - b,
    "aten::sub_": lambda a, b: a.double().sub_(b),
    "aten::where": lambda a, b: torch.where(a > 0, a, b),
}


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_what_is_rounded_once_may_be_cut_anywhere(name, threads):
    a, b = draw(2, UNEVEN)
    found = []
    for number in THREADS:
        torch.set_num_threads(number)
        found.append(ELEMENTWISE[name](a, b))
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_all_that_may_be_cut_is_tried_here():
    names = {"aten::addmm", "aten::addmm_", "aten::baddbmm", "aten::bmm", "aten::mm"}
    assert PRODUCTS.keys() == names
    attention = {name for name in ANY_CUTS if "attention" in name}
    assert attention | ELEMENTWISE.keys() == ANY_CUTS


SHAPES = [
    (300, 256, 128),
    (17, 333, 65),
    (1, 256, 768),
    (700, 64, 1),
    (3, 320, 577),  # fewer rows than threads
    (17, 33, 31),
    (129, 64, 385),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
def test_products_are_the_same_for_any_number_of_threads_and_any_address(shape, dtype, threads):
    rows, inner, columns = shape
    left, right, bias = draw(rows, inner), draw(inner, columns).to(dtype), draw(columns).to(dtype)
    found = []
    for number in (*THREADS, 24):
        torch.set_num_threads(number)
        for shift in (0, 1, 5):
            moved = at_shifted_address(left, shift).to(dtype)
            with same_bits():
                found.append(products(moved, right, bias))
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


def products(left: torch.Tensor, right: torch.Tensor, bias: torch.Tensor) -> list[torch.Tensor]:
    stacked = torch.stack([left] * 3)
    wide_bias = bias.expand(2, len(left), -1)
    columns = bias.repeat(len(left), 2)[:, 1 : 1 + len(bias)]  # of a wider matrix
    return [
        left @ right,
        torch.addmm(bias, left, right),
        columns.addmm_(left, right, alpha=-1),
        left.T @ left,
        stacked.mT @ stacked,
        torch.baddbmm(wide_bias, left.expand(2, -1, -1), right.expand(2, -1, -1)),
    ]


@pytest.mark.parametrize("shape", [(2, 4, 61, 32), (1, 1, 651, 32)])
def test_attention_is_the_same_for_any_number_of_threads_and_any_address(shape, threads):
    heads = draw(3, *shape)
    found = []
    for number, shift in zip((*THREADS, 16), (0, 1, 5, 7, 0), strict=True):
        torch.set_num_threads(number)
        inputs = [at_shifted_address(part, shift).requires_grad_(True) for part in heads]
        with same_bits():
            out = torch.nn.functional.scaled_dot_product_attention(*inputs, is_causal=True)
            found.append([out, *torch.autograd.grad(out, inputs, torch.ones_like(out))])
    for other in found[1:]:
        assert all(map(torch.equal, other, found[0]))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_linear_layer_has_its_product_on_all_threads_in_every_mode(mode, threads, monkeypatch):
    """In inference mode it is not taken apart before it comes to us."""
    layer = torch.nn.Linear(200, 300)
    inputs = draw(3, 500, 200)
    limits = []

    def at_most_noted(number: int):
        limits.append(number)
        return at_most(number)

    monkeypatch.setattr(module, "at_most", at_most_noted)
    found = []
    for number in THREADS:
        torch.set_num_threads(number)
        with mode(), same_bits():
            found.append(layer(inputs))
    assert max(limits) >= max(THREADS), limits
    for other in found[1:]:
        assert torch.equal(other, found[0])


def test_at_most_puts_the_number_back_after_an_error(threads):
    torch.set_num_threads(3)
    with pytest.raises(ZeroDivisionError), at_most(1):
        assert torch.get_num_threads() == 1
        raise ZeroDivisionError
    assert torch.get_num_threads() == 3


def test_a_gpu_computes_as_it_does(monkeypatch):
    monkeypatch.setattr(module, "device", lambda: torch.device("cuda"))
    with same_bits():
        assert torch.utils._python_dispatch._len_torch_dispatch_stack() == 0


@pytest.mark.slow
def test_calibration_is_the_same_in_processes_of_other_threads(tiny_model, tmp_path):
    code = (
        "import sys, hashlib; from pathlib import Path\n"
        "from tests.model.test_same_bits import Checkpoint, statistics, tokens_of\n"
        "model, folder = map(Path, sys.argv[1:])\n"
        "checkpoint = Checkpoint(model)\n"
        "found = statistics(checkpoint, tokens_of(checkpoint, 5, 61), folder)\n"
        "print(hashlib.sha256(repr(sorted(found.items())).encode()).hexdigest())"
    )
    answers = set()
    for number in ("1", "2", "4"):
        folder = tmp_path / number
        done = subprocess.run(
            [sys.executable, "-c", code, str(tiny_model), str(folder)],
            env=os.environ | {"OMP_NUM_THREADS": number, "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        answers.add(done.stdout)
    assert len(answers) == 1


@pytest.mark.slow
def test_same_bits_does_without_torchs_compiler():
    """It would take a second of every process that quantizes."""
    code = (
        "import sys, torch; from quantline.model.same_bits import same_bits\n"
        "with same_bits(): torch.ones(2).exp()\n"
        "print('torch._dynamo' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
