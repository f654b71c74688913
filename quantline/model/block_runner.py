"""Running the unquantized model one decoder block at a time, so that memory ignores its depth."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress

import numpy as np
import torch
from torch import nn

from quantline.model.activation_store import ActivationBatches
from quantline.model.block_calls import (
    Call,
    CallRecorder,
    Record,
    Recorded,
    in_place_of,
    play,
    players_of,
)
from quantline.model.block_model import BlockModel
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.same_bits import same_bits
from quantline.model.shared_state import SharedState
from quantline.run.progress import progress

BATCH_TOKENS = 4096
Linears = dict[str, nn.Linear]  # of a block, by their names
Watch = Callable[[Linears, nn.Module], AbstractContextManager[None]]


def sequences_in_batch(length: int) -> int:
    """Return how many sequences of a length run at once."""
    return max(1, BATCH_TOKENS // length)


class _HeadReached(Exception):
    """Ends a forward pass before the head."""

    def __init__(self, states: torch.Tensor) -> None:
        super().__init__()
        self.states = states


class BlockRun:
    """The decoder's blocks over one set of tokens; one block's weights in memory at a time.

    Attributes:
        hidden: What enters the next block, in batches.
        blocks: The decoder blocks, on the meta device unless loaded.
        arch: Sizes and names of the model.
        shares_state: Whether blocks leave something for later blocks besides hidden states.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        tokens: np.ndarray,
        rows: int | None = None,
        known: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        """Embed the tokens.

        Args:
            checkpoint: The model.
            tokens: int32 [sequences, length].
            rows: Sequences in a batch, if not as many as BATCH_TOKENS are.
            known: Tensors that are in memory already, by their names.
        """
        self.checkpoint = checkpoint
        self.parts = BlockModel(checkpoint, known)
        self.arch = self.parts.arch
        self.blocks = self.parts.blocks
        self.returns = self.arch.block_returns
        batch_size = rows or sequences_in_batch(tokens.shape[1])
        batches = torch.from_numpy(tokens.astype(np.int64)).split(batch_size)
        self.batches = [batch.to(device()) for batch in batches]
        self._calls: list[list[Call]] = []
        recorder = CallRecorder(self.blocks, self.returns)
        with self.parts.outside_loaded(), torch.no_grad():
            self.hidden = ActivationBatches(self._shapes(), checkpoint.folder.parent)
            for number, batch in enumerate(self.batches):
                record = self._embed(recorder, batch)
                self._calls.append(recorder.keep(record))
                assert record.entered is not None
                self.hidden[number] = record.entered.float().cpu()
        self._shared = recorder.shared
        self.shares_state = any(self._shared)

    def _embed(self, recorder: CallRecorder, batch: torch.Tensor) -> Record:
        """Run what is before the blocks; return what enters them."""
        stand_ins, record = recorder.stand_ins()
        with in_place_of(self.parts.model, self.parts.path, stand_ins), suppress(Recorded):
            self.parts.model(input_ids=batch, use_cache=False)
        return record

    def _shapes(self) -> list[tuple[int, ...]]:
        """Return the shapes of the hidden states of all batches; the last may be a smaller one."""
        known: dict[int, tuple[int, ...]] = {}
        for batch in (self.batches[0], self.batches[-1]):
            if len(batch) not in known:
                record = self._embed(CallRecorder(self.blocks, self.returns), batch)
                assert record.entered is not None
                known[len(batch)] = tuple(record.entered.shape)
        return [known[len(batch)] for batch in self.batches]

    @contextmanager
    def loaded(self, index: int) -> Iterator[tuple[Linears, nn.Module]]:
        """Yield a block with its weights in memory, and its linear layers by name."""
        with self.parts.loaded(index) as block:
            yield self.parts.linears(index), block

    def call(
        self, index: int, number: int, states: torch.Tensor, backward: bool = False
    ) -> torch.Tensor:
        """Run a loaded block.

        Args:
            index: Of the block.
            number: Of the batch.
            states: What enters the block, on its device.
            backward: Whether gradients are wanted (see `shared`).
        """
        for state in self._shared[number]:
            state.begin(index, backward)
        return self.call_of(index, number).run(self.blocks[index], states)

    def call_of(self, index: int, number: int) -> Call:
        """Return how a block is called for a batch."""
        return self._calls[number][index]

    def shared(self, number: int) -> list[SharedState]:
        """Return what the blocks of a batch leave for later ones."""
        return self._shared[number]

    def _find_undercalibrated(self, index: int) -> None:
        """Mark the experts of a loaded block that too few tokens reach, in a pass of its own."""
        modules = [experts for experts, _ in self.parts.experts(index)]
        if not modules:
            return
        for number, batch in enumerate(self.hidden):
            self.call(index, number, batch.to(device()))
        for experts in modules:
            experts.mark_undercalibrated()
            experts.tokens_seen = [0] * len(experts)

    def forward(
        self,
        label: str,
        watch: Watch | None = None,
        after: Callable[[int], None] | None = None,
        start: int = 0,
        find_undercalibrated: bool = False,
    ) -> None:
        """Take `hidden` through the blocks.

        Args:
            label: Of the progress bar.
            watch: watch(linear layers, block) is entered while a block runs over all batches.
            after: after(index) is called when a block has run.
            start: The first block to run. Where blocks share state, those before run again, and
                `hidden` has to be what enters the first block.
            find_undercalibrated: Whether experts that too few tokens reach show `watch` all tokens.
        """
        first = 0 if self.shares_state else start
        with torch.no_grad():
            indices = range(first, len(self.blocks))
            for index in progress(indices, label, "block"):
                again = index < start
                with self.loaded(index) as (linears, block):
                    if find_undercalibrated and not again:
                        self._find_undercalibrated(index)
                    with watch(linears, block) if watch and not again else nullcontext():
                        for number, batch in enumerate(self.hidden):
                            out = self.call(index, number, batch.to(device()))
                            self.hidden[number] = out.float().cpu()
                if after and not again:
                    after(index)

    @contextmanager
    def tail(self) -> Iterator[Callable[[int, torch.Tensor], torch.Tensor]]:
        """Yield what the model does after the last block, up to its head.

        It is a function of the number of a batch and of what leaves the last block; it returns
        what enters the head, and gradients go through it.
        """
        model = self.parts.model
        players = players_of(self.blocks, self.returns)

        def stop(head: nn.Module, args: tuple[torch.Tensor, ...]) -> None:
            raise _HeadReached(args[0])

        def run(number: int, states: torch.Tensor) -> torch.Tensor:
            play(players, states)
            try:
                model(input_ids=self.batches[number], use_cache=False)
            except _HeadReached as reached:
                return reached.states.float()
            raise AssertionError("the model ended without its head")

        hook = self.parts.head.register_forward_pre_hook(stop)
        try:
            with self.parts.outside_loaded(), in_place_of(model, self.parts.path, players):
                yield run
        finally:
            hook.remove()

    def final_states(self) -> np.ndarray:
        """Return what enters the head, float32 [sequences, length, hidden], after `forward`."""
        sequences = sum(len(batch) for batch in self.batches)
        length = self.batches[0].shape[1]
        states = np.empty((sequences, length, self.arch.hidden_size), np.float32)
        start = 0
        with torch.no_grad(), self.tail() as tail:
            for number, batch in enumerate(self.hidden):
                final = tail(number, batch.to(device())).cpu()
                states[start : start + len(final)] = final
                start += len(final)
        return states


@same_bits()
def final_hidden_states(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    label: str,
    watch: Watch | None = None,
    rows: int | None = None,
) -> np.ndarray:
    """Run all blocks, and what comes before the head.

    Args:
        checkpoint: The model.
        tokens: int32 [sequences, length].
        label: Of the progress bar.
        watch: As in BlockRun.forward.
        rows: Sequences in a batch.

    Returns:
        float32 [sequences, length, hidden].
    """
    run = BlockRun(checkpoint, tokens, rows)
    run.forward(label, watch)
    return run.final_states()
