"""Whether scales of an input can be folded into the module before it: by trying.

The layers that read the input have their columns multiplied by random powers of two, and the module
before them is divided by the same. Powers of two change no rounding, so all that a block returns
has to stay the same to the last bit.
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from quantline.model.data_flow import tensors_in
from quantline.model.family import InputGroup

DRAWS = 2
EXPONENT = 3  # the largest of a scale; small enough that nothing over- or underflows
SMALLEST_FACTOR = 2.0**-8  # of a norm that adds 1 to its weight
CHUNK_BYTES = 1 << 28  # of weights that are copied at a time
MOST_TRIALS = 64  # of single pairs, where many at once have failed

Run = Callable[[], Any]


def powers_of_two(size: int, generator: torch.Generator, exponent: int = EXPONENT) -> torch.Tensor:
    """Return random powers of two, float32 [size]."""
    drawn = torch.randint(-exponent, exponent + 1, (size,), generator=generator)
    return torch.exp2(drawn.float())


def is_transposed(module: nn.Module) -> bool:
    """Whether a linear layer keeps its weight as [in, out]."""
    return not isinstance(module, nn.Linear)


def scale_columns(module: nn.Module, scales: torch.Tensor) -> None:
    """Multiply what reads each input of a linear layer, in place."""
    weight = _tensor(module, "weight")
    weight.mul_(scales[:, None] if is_transposed(module) else scales)


def divide_outputs(module: nn.Module, scales: torch.Tensor, norm_offset: float | None) -> None:
    """Divide what a module returns, in place.

    Args:
        module: A linear layer or a norm.
        scales: float [out].
        norm_offset: What a norm adds to its weight; None for a linear layer.
    """
    weight = _tensor(module, "weight")
    if norm_offset is not None:
        weight.add_(norm_offset).div_(scales).sub_(norm_offset)
    else:
        weight.div_(scales if is_transposed(module) else scales[:, None])
    if getattr(module, "bias", None) is not None:
        _tensor(module, "bias").div_(scales)


def _tensor(module: nn.Module, name: str) -> torch.Tensor:
    value = getattr(module, name)
    assert isinstance(value, torch.Tensor)
    return value


@contextmanager
def copies(modules: Sequence[nn.Module]) -> Iterator[dict[tuple[nn.Module, str], nn.Parameter]]:
    """Give modules copies of their weights and biases; yield the originals, which come back."""
    originals: dict[tuple[nn.Module, str], nn.Parameter] = {}
    for module in modules:
        for name, value in module.named_parameters(recurse=False):
            if name in ("weight", "bias"):
                originals[module, name] = value
    try:
        for (module, name), value in originals.items():
            setattr(module, name, nn.Parameter(value.detach().clone(), requires_grad=False))
        yield originals
    finally:
        for (module, name), value in originals.items():
            setattr(module, name, value)


def same(first: Any, second: Any) -> bool:
    """Whether all tensors of two results are the same."""
    ones = tensors_in(first)
    others = tensors_in(second)
    if len(ones) != len(others) or not ones:
        return False
    return all(torch.equal(one, other) for one, other in zip(ones, others, strict=True))


def find_norm_offset(
    norm: nn.Module, args: Any, kwargs: dict[str, Any], generator: torch.Generator
) -> float | None:
    """Find what a norm adds to its weight before it multiplies.

    Args:
        norm: A module with a weight of one dimension.
        args: What it is called with.
        kwargs: The same, by name.
        generator: Of the scales.

    Returns:
        0 or 1; None if its output does not follow its weight like that.
    """
    size = _tensor(norm, "weight").numel()
    scales = powers_of_two(size, generator)
    factors = torch.randint(128, 512, (size,), generator=generator) / 256
    for offset in (0.0, 1.0):
        with copies([norm]), torch.no_grad():
            weight = _tensor(norm, "weight")
            scales = scales.to(weight.device)
            weight.copy_(factors - offset)
            before = norm(*args, **kwargs)
            divide_outputs(norm, scales, offset)
            after = norm(*args, **kwargs)
        if isinstance(after, torch.Tensor) and torch.equal(after * scales, before):
            return offset
    return None


class FoldTest:
    """Tries pairs of inputs and modules before them on one block."""

    def __init__(
        self, block: nn.Module, run: Run, norms: Collection[str], generator: torch.Generator
    ) -> None:
        """Prepare the trials.

        Args:
            block: The block.
            run: Runs what is to stay the same, and returns it.
            norms: The modules that are norms.
            generator: Of the scales.
        """
        self.block = block
        self.run = run
        self.norms = norms
        self.generator = generator
        self.trials = 0

    def passing(self, pairs: list[InputGroup]) -> list[InputGroup]:
        """Return the pairs that pass.

        Many are tried at once; where that fails, their halves are tried.
        """
        passed: list[InputGroup] = []
        chunk: list[InputGroup] = []
        size = 0
        for pair in pairs:
            added = self._bytes(pair)
            if chunk and size + added > CHUNK_BYTES:
                passed += self._halved(chunk)
                chunk = []
                size = 0
            chunk.append(pair)
            size += added
        return passed + (self._halved(chunk) if chunk else [])

    def _bytes(self, pair: InputGroup) -> int:
        weights = [_tensor(module, "weight") for module in self._modules([pair])]
        return sum(weight.numel() * weight.element_size() for weight in weights)

    def _modules(self, pairs: Sequence[InputGroup]) -> list[nn.Module]:
        names: dict[str, None] = {}
        for pair in pairs:
            assert pair.before is not None
            names |= dict.fromkeys((*pair.linears, pair.before))
        return [self.block.get_submodule(name) for name in names]

    def _halved(self, pairs: list[InputGroup]) -> list[InputGroup]:
        if self.holds(pairs):
            return pairs
        self.trials += 1
        if len(pairs) == 1 or self.trials > MOST_TRIALS:
            return []
        middle = len(pairs) // 2
        return self._halved(pairs[:middle]) + self._halved(pairs[middle:])

    def holds(self, pairs: Sequence[InputGroup], expected: Any = None, draws: int = DRAWS) -> bool:
        """Whether scaling the inputs of all pairs at once leaves the result as it is.

        Args:
            pairs: To be scaled.
            expected: What the block returns, if that is known.
            draws: How many times they are scaled.
        """
        with copies(self._modules(pairs)), torch.no_grad():
            for pair in pairs:
                if pair.norm_offset:
                    _shorten_factors(self.block.get_submodule(str(pair.before)), pair.norm_offset)
                    expected = None
            if expected is None:
                expected = self.run()
            for _ in range(draws):
                for pair in pairs:
                    self._scale(pair)
                if not same(self.run(), expected):
                    return False
        return True

    def _scale(self, pair: InputGroup) -> None:
        before = self.block.get_submodule(str(pair.before))
        offset = pair.norm_offset if pair.before in self.norms else None
        linears = [self.block.get_submodule(name) for name in pair.linears]
        weight = _tensor(linears[0], "weight")
        size = weight.shape[0 if is_transposed(linears[0]) else 1]
        scales = powers_of_two(size, self.generator).to(weight.device)
        divide_outputs(before, scales, offset)
        for linear in linears:
            scale_columns(linear, scales)


def _shorten_factors(norm: nn.Module, offset: float) -> None:
    """Give what a norm multiplies by few digits, so that the weight holds it exactly."""
    weight = _tensor(norm, "weight")
    factors = (weight + offset).bfloat16().float()
    factors[factors.abs() < SMALLEST_FACTOR] = SMALLEST_FACTOR
    weight.copy_(factors - offset)
