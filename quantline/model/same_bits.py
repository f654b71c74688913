"""The same bits for any number of threads.

torch cuts a tensor into as many pieces as there are threads, and MKL cuts its work likewise. Where
the last bits depend on the cuts, one thread computes. That is nearly everywhere: a piece's last
elements are computed one by one, and its others by vector instructions, whose exponential is
another. Products of matrices take nearly all of the time; MKL cuts them so that their bits stay
(MKL_CBWR in quantline/__init__.py).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from quantline.model.device import device

# Operations whose bits do not depend on the cuts: products; attention, which is cut between heads
# and blocks of queries; and what is rounded once per element, or not at all.
ANY_CUTS = frozenset(
    {
        "aten::_scaled_dot_product_flash_attention_for_cpu",
        "aten::_scaled_dot_product_flash_attention_for_cpu_backward",
        "aten::_to_copy",
        "aten::abs",
        "aten::add",
        "aten::add_",
        "aten::addmm",
        "aten::baddbmm",
        "aten::bmm",
        "aten::cat",
        "aten::clone",
        "aten::copy_",
        "aten::div",
        "aten::mm",
        "aten::mul",
        "aten::neg",
        "aten::sub",
    }
)


@contextmanager
def one_thread() -> Iterator[None]:
    """Compute with one thread of torch's and MKL's."""
    threads = torch.get_num_threads()
    if threads == 1:
        yield
        return
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


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
        """Run an operation, with one thread unless it is one of ANY_CUTS."""
        if torch.get_num_threads() == 1:
            return func(*args, **(kwargs or {}))
        # A product of complex numbers is rounded more than once.
        real = not any(isinstance(value, torch.Tensor) and value.is_complex() for value in args)
        if real and func._schema.name in ANY_CUTS:
            return func(*args, **(kwargs or {}))
        with one_thread():
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
