"""Collecting the statistics: one pass forward over the blocks, and one backward for gradients."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from quantline.calibration.block_files import INPUTS, OUTPUTS, WEIGHTED, BlockWriter
from quantline.calibration.embedding_and_head import (
    EMBEDDING,
    FINAL,
    embedding_sums,
    keep_embedding_moments,
    keep_final_states,
    sample_final_states,
)
from quantline.calibration.input_moments import InputMoments
from quantline.calibration.output_moments import (
    OutputMoments,
    backward,
    last_block_gradients,
)
from quantline.calibration.sums import last_batches
from quantline.calibration.weighted_moments import WeightedMoments
from quantline.errors import Failure, StageError
from quantline.files import read_json, write_json, write_tensors
from quantline.model.activation_store import ActivationBatches, ActivationStore
from quantline.model.architecture import Architecture
from quantline.model.block_runner import BlockRun
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.model.same_bits import same_bits

FISHER_BLOCK = 512  # outputs that one block of G spans: wider ones cost more than they bring
# What a killed run is continued from; it is removed once all results are there.
PROGRESS = "layers.json"  # what was seen of the blocks that are complete
STATES = "states"
GRADIENTS = "gradients"


class Part(NamedTuple):
    """A part of a text, whose sums are stored as they are, for merging with those of the others.

    Attributes:
        whole: Tokens of the whole text.
        before: Tokens of it before the part.
    """

    whole: int
    before: int


@same_bits()
def collect_statistics(
    checkpoint: Checkpoint,
    tokens: np.ndarray,
    folder: Path,
    seed: int | None = None,
    weighted: bool = False,
    part: Part | None = None,
) -> dict[str, dict[str, Any]]:
    """Run the model over a text and write the statistics of every linear layer.

    One block's weights and moments are in memory at a time. Blocks whose files are in the folder
    already are not run again.

    Args:
        checkpoint: The unquantized model.
        tokens: int32 [sequences, length].
        folder: Where to write.
        seed: With it a backward pass follows, with labels drawn by it, and the moments of the
            output gradients are written too.
        weighted: Whether tokens count by their gradients in the inputs' moments. That takes a seed.
        part: Which part of a text the tokens are; None if they are the whole text. The model of a
            part has no experts, and no finite state is asked of it.

    Returns:
        {linear layer: {moments: the layer whose input it shares, tokens: how many it saw, block}},
        with `starved: True` for experts that were calibrated on all tokens.

    Raises:
        StageError: non_finite; calibration_empty, also for a layer that saw nothing.
    """
    arch = checkpoint.arch
    run = BlockRun(checkpoint, tokens)
    writer = BlockWriter(folder, INPUTS)
    ends = () if part else last_batches(len(run.batches))
    whole = part.whole if part else tokens.size
    inputs = InputMoments(whole, writer.add, not weighted, ends, raw=part is not None)
    slots = 2 if seed is None else arch.layers + 1
    states = ActivationStore(folder / STATES, slots, run.hidden)
    progress = folder / PROGRESS

    def after(block: int) -> None:
        states.put(block + 1, run.hidden)
        _note_experts(run, block, inputs.layers, tokens.size)
        write_json(progress, inputs.layers)
        writer.close(block)

    missing = [block for block in range(arch.layers) if not writer.has(block)]
    start = missing[0] if missing else arch.layers
    if start:
        # The last block may have been written down without its file.
        inputs.layers = {
            name: entry
            for name, entry in read_json(progress).items()
            if arch.layer_index(name) in range(start)
        }
        if not run.shares_state:  # those before run again, for what they leave
            run.hidden.fill(states.get(start))
    else:
        states.put(0, run.hidden)
    label = "calibrating" if seed is None else "forward pass (1 of 2)"
    run.forward(label, inputs.watch, after, start, find_undercalibrated=True)
    check_coverage(arch, inputs.layers, tokens.size)
    final = sample_final_states(run, whole)
    finite = has_finite_states(run)
    if part:
        found = {"states": final.numpy(), "finite": np.array([finite])}
        write_tensors(folder / FINAL, found)
    else:
        check_finite_states(finite, inputs.layers)
        keep_final_states(final, folder)
    if seed is not None:
        _collect_gradients(run, states, folder, seed, inputs.layers, weighted, part)
    return {
        name: entry | {"block": arch.layer_index(name)}
        for name, entry in sorted(inputs.layers.items())
    }


def remove_progress(folder: Path) -> None:
    """Remove what a killed run is continued from."""
    for name in (STATES, GRADIENTS, PROGRESS):
        (folder / name).unlink(missing_ok=True)


def _note_experts(
    run: BlockRun, block: int, layers: dict[str, dict[str, Any]], tokens: int
) -> None:
    """Write down how many tokens came to the experts of a block, and which are undercalibrated.

    Raises:
        StageError: calibration_empty, for a layer whose statistics are not of these tokens.
    """
    calibrated = set(run.arch.linears_of(block))
    for experts, names in run.parts.experts(block):
        for number, came in enumerate(experts.tokens_seen):
            starved = number in experts.undercalibrated
            for name in calibrated.intersection(names[number]):
                recorded = layers[name]["tokens"] if name in layers else 0
                if not recorded if starved else recorded != came:
                    raise _not_seen(name, tokens if starved else came, recorded)
                layers[name]["tokens"] = came
                if starved:
                    layers[name]["starved"] = True


def check_coverage(arch: Architecture, layers: dict[str, dict[str, Any]], tokens: int) -> None:
    """Check that every layer saw all tokens.

    The experts of a block have to have seen each token as often as the router chooses, or, where
    that is not known, at least once.

    Raises:
        StageError: calibration_empty.
    """

    def seen(names: Iterable[str]) -> int:
        return sum(layers[name]["tokens"] for name in names if name in layers)

    for block in range(arch.layers):
        groups = arch.expert_groups(block)
        in_experts = {name for experts in groups for names in experts for name in names}
        for name in arch.linears_of(block):
            found = seen([name])
            # A model may run a layer twice.
            whole = found and found % tokens == 0 if arch.structure else found == tokens
            if name not in in_experts and not whole:
                raise _not_seen(name, tokens, found)
        for experts in groups:
            for names in zip(*experts, strict=True):  # gates, ups and downs
                found = seen(names)
                wanted = tokens * (arch.experts_used if not arch.structure else 1)
                if found < wanted or (not arch.structure and found != wanted):
                    raise _not_seen(names[0].replace(".0.", ".*."), wanted, found)


def _not_seen(name: str, expected: int, seen: int) -> StageError:
    return StageError(
        Failure.CALIBRATION_EMPTY,
        f"expected {name} to see {expected} tokens, found {seen}; the model does not run its "
        "layers as they are listed: please report it",
    )


def has_finite_states(run: BlockRun) -> bool:
    """Whether some token leaves the last block without NaN and infinity."""
    return any(bool(batch.isfinite().all(-1).any()) for batch in run.hidden)


def check_finite_states(found: bool, layers: dict[str, dict[str, Any]]) -> None:
    """Check that the model does not overflow on the whole text.

    Single tokens, or a sequence, are left out of the statistics (see InputMoments).

    Args:
        found: Whether `has_finite_states`.
        layers: What was seen of each layer.

    Raises:
        StageError: non_finite.
    """
    if found:
        return
    order = list(layers)
    first = next((name for name in order if layers[name].get("not_finite")), "the last layer")
    raise StageError(
        Failure.NON_FINITE,
        f"expected finite inputs of {first}, found NaN or infinity, and none of the text's tokens "
        "without them at the end of the model; it overflows on the calibration text",
    )


def _collect_gradients(
    run: BlockRun,
    states: ActivationStore,
    folder: Path,
    seed: int,
    layers: dict[str, dict[str, Any]],
    weighted: bool,
    part: Part | None,
) -> None:
    """Do the backward pass, from the block where an earlier run stopped."""
    arch = run.arch
    writer = BlockWriter(folder, OUTPUTS)
    of_inputs = BlockWriter(folder, WEIGHTED)
    gradients = ActivationStore(folder / GRADIENTS, 2, run.hidden)
    for index in range(arch.layers):  # also of blocks that an earlier run has seen
        _restore_undercalibrated(run, index, layers)

    def after(block: int, entering: ActivationBatches) -> None:
        gradients.put(block, entering)
        if weighted:
            of_inputs.close(block)
        writer.close(block)

    missing = [block for block in range(arch.layers) if not writer.has(block)]
    last = missing[-1] if missing else -1
    if missing and run.shares_state:  # later blocks hand gradients to earlier ones
        last = arch.layers - 1
    if last == arch.layers - 1:
        head = OutputHead.of(run.checkpoint).to_torch(device())
        before = part.before if part else 0
        leaving = last_block_gradients(run, states.get(arch.layers), head, seed, before)
    else:
        leaving = run.hidden.like()
        leaving.fill(gradients.get(last + 1))
    raw = part is not None
    ends = () if part else last_batches(len(leaving))
    of_outputs = OutputMoments(FISHER_BLOCK, writer.add, raw)
    by_gradients = WeightedMoments(of_inputs.add, raw) if weighted else None
    backward(run, states, leaving, of_outputs, last, after, by_gradients, ends)
    sums = embedding_sums(leaving, FISHER_BLOCK, ends)
    if part:
        write_tensors(folder / EMBEDDING, sums.tensors())
    else:
        keep_embedding_moments(sums, folder)


def _restore_undercalibrated(run: BlockRun, block: int, layers: dict[str, dict[str, Any]]) -> None:
    """Mark the experts of a block as the forward pass found them."""
    for experts, names in run.parts.experts(block):
        experts.undercalibrated = frozenset(
            number for number, layer in enumerate(names) if layers[layer[0]].get("starved")
        )
