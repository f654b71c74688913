"""The same bits for any number of threads.

torch cuts a tensor into as many pieces as there are threads, and MKL cuts its work likewise. Where
the last bits depend on the cuts, one thread computes. That is nearly everywhere: a piece's last
elements are computed one by one, and its others by vector instructions, whose exponential is
another. Products of matrices take nearly all of the time; MKL cuts them so that their bits stay
(MKL_CBWR in quantline/__init__.py), as long as each thread gets enough of a product of float32.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantline.model.device import device

ATTENTION_BACKWARD = "aten::_scaled_dot_product_flash_attention_for_cpu_backward"
# Operations whose bits do not depend on the cuts: attention, which is cut between heads
# and blocks of queries; and what is rounded once per element, or not at all.
ANY_CUTS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        ATTENTION_BACKWARD,
        "aten::_to_copy",
        "aten::abs",
        "aten::add",
        "aten::add_",
        "aten::cat",
        "aten::clone",
        "aten::copy_",
        "aten::div",
        "aten::gather",
        "aten::index",
        "aten::mul",
        "aten::mul_",
        "aten::neg",
        "aten::repeat",
        "aten::sub",
        "aten::sub_",
        "aten::where",
    }
)

# Products → which of their arguments is the first matrix.
PRODUCTS = {
    "aten::mm": 0,
    "aten::bmm": 0,
    "aten::addmm": 1,
    "aten::addmm_": 1,
    "aten::baddbmm": 1,
}
# T threads give the bits of one if a product has so many numbers times T². Of some 1,200 shapes up
# to 6,000 wide, with up to 64 threads, the one that needed most needed a third of it.
NUMBERS = 4096


@contextmanager
def at_most(threads: int) -> Iterator[None]:
    """Compute with no more than some threads of torch's and MKL's."""
    present = torch.get_num_threads()
    if present <= threads:
        yield
        return
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(present)


def _allowed(name: str, args: tuple[Any, ...], present: int) -> int:
    """Return how many threads an operation may have, of those that there are."""
    if any(isinstance(value, torch.Tensor) and value.is_complex() for value in args):
        return 1  # a product of complex numbers is rounded more than once
    if name == ATTENTION_BACKWARD and args[1].shape[:2].numel() == 1:
        return 1  # of one head, whose products are cut
    if name in ANY_CUTS:
        return present
    if name not in PRODUCTS:
        return 1
    left, right = args[PRODUCTS[name] :][:2]
    if left.dtype != torch.float32:
        return 1
    return max(1, math.isqrt(left.shape[-2] * right.shape[-1] // NUMBERS))


@cache
def _has_only_parts(func: Any) -> bool:
    """Whether an operation is made of others, and has no kernel of its own on a CPU."""
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU")
    return bool(func._can_decompose()) and not has_kernel


class _SameBits(TorchDispatchMode):
    """Runs each operation with the threads that it may have."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        """Say that nothing is compiled here: else torch imports its compiler, for a second."""
        return False

    def __torch_dispatch__(
        self,
        func: Any,
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run an operation with as many threads as leave its bits.

        In inference mode, operations that are made of others come here whole, such as a linear
        layer with its product.
        """
        present = torch.get_num_threads()
        if present == 1:
            return func(*args, **(kwargs or {}))
        if _has_only_parts(func):
            with self:
                return func.decompose(*args, **(kwargs or {}))
        with at_most(_allowed(func._schema.name, args, present)):
            return func(*args, **(kwargs or {}))


@contextmanager
def same_bits() -> Iterator[None]:
    """Compute on the CPU so that results are the same bits for any number of threads.

    It decorates functions too. A GPU has no threads that are counted here.
    """
    if device().type != "cpu":
        yield
        return
    with _SameBits():
        yield
