"""A rounded model run forwards and backwards, one block's weights in memory at a time."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from quantline.calibration.output_moments import go_back
from quantline.model.activation_store import ActivationBatches, ActivationStore
from quantline.model.block_runner import BlockRun
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.quantized.store import block_part
from quantline.recipes.refinement.divergence import summed_divergence
from quantline.recipes.refinement.schedule import Schedule
from quantline.recipes.refinement.student import NORMS, Student, norms_of

Gradients = dict[str, torch.Tensor]  # of layers and norms, by the names of what moves


class RoundedRun:
    """The rounded model over the sequences of a schedule.

    Attributes:
        run: Its blocks; their weights are the student's.
        student: The weights that were rounded.
        expected: Final hidden states of the unquantized model, in batches.
        head: The rounded model's head.
        expected_head: The unquantized model's.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        schedule: Schedule,
        student: Student,
        expected: ActivationStore,
        heads: tuple[OutputHead, OutputHead],
    ) -> None:
        """Embed the tokens.

        Args:
            checkpoint: The unquantized model.
            schedule: Its tokens are embedded.
            student: The weights that were rounded.
            expected: Final hidden states of the unquantized model, in batches.
            heads: The rounded model's head and the unquantized model's, with torch tensors.
        """
        self.student = student
        self.expected = expected
        self.head, self.expected_head = heads
        self.run = BlockRun(checkpoint, schedule.tokens, schedule.rows, student)
        self.layers = self.run.arch.layers
        self._norms = norms_of(self.run.parts, student.part_of)

    def divergence(self, numbers: Sequence[int], advance: Callable[[int], None]) -> float:
        """Return the mean KL divergence of batches, in nats a token.

        Args:
            numbers: Of the batches.
            advance: Called with how many more blocks have run.
        """
        states = self._entering(numbers, sets=1)
        with torch.no_grad():
            for block in range(self.layers):
                with self.run.loaded(block):
                    for place, number in enumerate(numbers):
                        out = self.run.call(block, number, states[place].to(device()))
                        states[place] = out.float().cpu()
                advance(1)
            total = 0.0
            with self.run.tail() as tail:
                for place, number in enumerate(numbers):
                    final = tail(number, states[place].to(device()))
                    total += self._at_head(number, final)[0]
        return total / self._tokens(numbers)

    def step(
        self,
        numbers: Sequence[int],
        take: Callable[[str, Gradients], None],
        advance: Callable[[int], None],
    ) -> float:
        """Return the mean KL divergence of batches, with its gradients.

        Args:
            numbers: Of the batches.
            take: Called as take(part, gradients), from the end of the model to its beginning.
            advance: Called with how many more blocks have run.
        """
        many = len(numbers)
        states = self._entering(numbers, sets=self.layers + 1)
        with torch.no_grad():
            for block in range(self.layers):
                with self.run.loaded(block):
                    for place, number in enumerate(numbers):
                        entering = states[block * many + place].to(device())
                        out = self.run.call(block, number, entering)
                        states[(block + 1) * many + place] = out.float().cpu()
                advance(1)
        gradients = self._room(numbers)
        total = self._from_head(numbers, states, gradients, take)
        for block in range(self.layers - 1, -1, -1):
            with self.run.loaded(block) as (linears, _):
                weights = self._moving_weights(block, linears)
                for place, number in enumerate(numbers):
                    entering = states[block * many + place].detach().to(device())
                    entering.requires_grad_(True)
                    with torch.enable_grad():
                        out = self.run.call(block, number, entering, backward=True)
                        go_back(self.run.shared(number), out, gradients[place].to(device()))
                    assert entering.grad is not None
                    gradients[place] = entering.grad.cpu()
                take(block_part(block), self._by_change(weights))
            advance(1)
        return total / self._tokens(numbers)

    def _room(self, numbers: Sequence[int], sets: int = 1) -> ActivationBatches:
        """Return room for sets of the hidden states of some batches."""
        hidden = self.run.hidden
        shapes = [hidden.shapes[number] for number in numbers]
        return ActivationBatches(shapes * sets, hidden.folder)

    def _entering(self, numbers: Sequence[int], sets: int) -> ActivationBatches:
        """Begin a pass: return room whose first set is what enters the first block."""
        states = self._room(numbers, sets)
        for place, number in enumerate(numbers):
            states[place] = self.run.hidden[number]
            for shared in self.run.shared(number):
                shared.begin_again()
        return states

    def _tokens(self, numbers: Sequence[int]) -> int:
        return sum(self.run.batches[number].numel() for number in numbers)

    def _at_head(self, number: int, final: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return the divergence of a batch, summed over its tokens, and its gradient."""
        flat = final.detach().reshape(-1, final.shape[-1])
        wanted = self.expected.batch(0, number).to(device()).reshape(flat.shape)
        total, gradient = summed_divergence(flat, wanted, self.head, self.expected_head)
        return total, gradient.reshape(final.shape)

    def _from_head(
        self,
        numbers: Sequence[int],
        states: ActivationBatches,
        gradients: ActivationBatches,
        take: Callable[[str, Gradients], None],
    ) -> float:
        """Take gradients from the head to what leaves the last block.

        Args:
            numbers: Of the batches.
            states: What enters each block, and what leaves the last.
            gradients: They are put here.
            take: As for `step`.

        Returns:
            The divergence, summed over tokens.
        """
        tokens = self._tokens(numbers)
        last = self.layers * len(numbers)
        total = 0.0
        with self.run.tail() as tail:
            weights = self._moving_norms(outside=True)
            for place, number in enumerate(numbers):
                leaving = states[last + place].detach().to(device()).requires_grad_(True)
                with torch.enable_grad():
                    final = tail(number, leaving)
                found, gradient = self._at_head(number, final)
                total += found
                final.backward(gradient / tokens)
                assert leaving.grad is not None
                gradients[place] = leaving.grad.cpu()
            take(NORMS, self._by_change(weights))
        return total

    def _moving_weights(self, block: int, linears: dict[str, nn.Linear]) -> dict[str, torch.Tensor]:
        """Return what moves in a loaded block, by its name, and ask for its gradients."""
        found = self._moving_norms(block=block)
        for name, linear in linears.items():
            if name in self.student.part_of:
                linear.weight.requires_grad_(True)
                found[name] = linear.weight
        return found

    def _moving_norms(
        self, block: int | None = None, outside: bool = False
    ) -> dict[str, torch.Tensor]:
        """Return the norms of a loaded block, or those outside, and ask for their gradients."""
        inside = f"{self.run.parts.path}."
        start = inside if outside else f"{self.run.parts.block_path(block or 0)}."
        found = {}
        for path, name in self._norms.items():
            if path.startswith(start) != outside:
                found[name] = self.run.parts.model.get_parameter(path)
                found[name].requires_grad_(True)
        return found

    def _by_change(self, weights: dict[str, torch.Tensor]) -> Gradients:
        """Return the gradients by what moves; of what none reached there is none."""
        return {
            name: self.student.by_change(name, parameter.grad)
            for name, parameter in weights.items()
            if parameter.grad is not None
        }
