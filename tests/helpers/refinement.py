"""Rounded models of which scales and norms have moved."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from quantline.model.activation_store import ActivationBatches, ActivationStore
from quantline.model.block_model import BlockModel
from quantline.model.block_runner import final_hidden_states
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.quantized.store import QuantizedModel, block_part
from quantline.recipes.refinement.moves import Moved
from quantline.recipes.refinement.rounded_run import RoundedRun
from quantline.recipes.refinement.schedule import Schedule
from quantline.recipes.refinement.state import RefinementState
from quantline.recipes.refinement.student import NORMS, Student, norms_of


def student_of(checkpoint: Checkpoint, rounded: QuantizedModel, folder: Path) -> Student:
    """Return the student in which all layers and all norms move."""
    parts = BlockModel(checkpoint)
    part_of = {}
    for path, name in norms_of(parts, set(checkpoint.names)).items():
        inside = path.removeprefix(f"{parts.path}.")
        part_of[name] = NORMS if inside == path else block_part(int(inside.partition(".")[0]))
    for block in range(parts.arch.layers):
        part_of |= dict.fromkeys(parts.arch.linears_of(block), block_part(block))
    return Student(checkpoint, rounded, part_of, RefinementState(folder))


def move_by(student: Student, changes: dict[str, torch.Tensor]) -> None:
    """Have scales and norms of a student moved, as if by a finished step."""
    state = student.state
    for part in sorted(set(student.part_of.values())):
        moved = {}
        for name, change in changes.items():
            if student.part_of[name] == part:
                moved[name] = Moved(change, torch.zeros_like(change), torch.zeros_like(change))
        state.write(part, moved)
    state.note(steps=state.steps + 1)


def random_changes(student: Student, size: float, seed: int = 0) -> dict[str, torch.Tensor]:
    """Return a random change of everything that moves."""
    generator = torch.Generator().manual_seed(seed)
    changes = {}
    for name in sorted(student.part_of):
        is_layer = name in student.rounded.linears
        like = student.scales(name) if is_layer else student.norm(name)
        changes[name] = size * torch.randn(like.shape, generator=generator)
    return changes


def rounded_run(
    checkpoint: Checkpoint, tokens: np.ndarray, student: Student, rows: int, head: Any = None
) -> RoundedRun:
    """Return a run over some tokens, with the final states of the unquantized model."""
    finals = torch.from_numpy(final_hidden_states(checkpoint, tokens, "test")).split(rows)
    batches = ActivationBatches([tuple(batch.shape) for batch in finals], student.state.folder)
    expected = ActivationStore(student.state.folder / "expected", 1, batches)
    expected.put(0, finals)
    schedule = Schedule(tokens, rows, [], [], [])
    source = OutputHead.of(checkpoint).to_torch(device())
    return RoundedRun(checkpoint, schedule, student, expected, (head or source, source))


def all_gradients(
    run: RoundedRun, numbers: list[int]
) -> tuple[float, dict[str, dict[str, torch.Tensor]]]:
    """Return the divergence of some batches, and part → its gradients."""
    found: dict[str, dict[str, torch.Tensor]] = {}
    divergence = run.step(numbers, found.__setitem__, lambda blocks: None)
    return divergence, found
