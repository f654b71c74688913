"""Refining a rounded model: the integers stay, and scales and norms follow the KL divergence.

What rounding one layer costs depends on all others. Each step runs the rounded model over some
sequences of the calibration text, block by block, takes the gradient of the KL divergence from the
unquantized model's next tokens back through the same blocks, and moves the scales of all groups and
the weights of the norms by Adam. The divergence is measured before and after on sequences that no
step has seen, with scales and norms as they are stored. What is no better is not kept.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch

from quantline.calibration.embedding_and_head import calibration_tokens
from quantline.config.recipes import GroupedRecipe
from quantline.errors import Failure, StageError
from quantline.model.activation_store import ActivationBatches, ActivationStore
from quantline.model.block_model import BlockModel
from quantline.model.block_runner import BlockRun, sequences_in_batch
from quantline.model.checkpoint import Checkpoint
from quantline.model.device import device
from quantline.model.output_head import OutputHead
from quantline.model.same_bits import same_bits
from quantline.quantized.store import QuantizedModel, block_part
from quantline.recipes.context import QuantizationContext
from quantline.recipes.refinement.moves import at_rest, move
from quantline.recipes.refinement.rounded_run import Gradients, RoundedRun
from quantline.recipes.refinement.schedule import Schedule, make_schedule
from quantline.recipes.refinement.state import EXPECTED, RefinementState
from quantline.recipes.refinement.student import NORMS, WEIGHT, Student, norms_of
from quantline.run.progress import counting

OVERRIDE = "override:"  # before the name of a norm, among the tensors of a result


@same_bits()
def refine(ctx: QuantizationContext, name: str, folder: Path) -> dict[str, Any]:
    """Tune the scales and norms of a model whose blocks are all rounded.

    Args:
        ctx: What was quantized, and how; the rounded blocks are in its writer's folder.
        name: Of the recipe.
        folder: Of the result. The steps of a run that was killed are there, and go on.

    Returns:
        {steps, learning_rate, sequences, held_out_tokens, kld_before, kld_after, kept}; the
        divergences are means in nats a token.

    Raises:
        StageError: non_finite.
    """
    state = RefinementState(folder)
    if "report" not in state.known:
        _Refinement(ctx, name, state).run()
    report = state.known["report"]
    if report["kept"]:
        for part in state.known["parts"]:
            tensors = state.result(part)
            changed = {key for key in tensors if key.startswith(OVERRIDE)}
            ctx.writer.change_part(
                part,
                {key: tensors[key] for key in tensors.keys() - changed},
                {key.removeprefix(OVERRIDE): tensors[key] for key in changed},
            )
    return report


class _Refinement:
    """One refinement, up to the verdict on it."""

    def __init__(self, ctx: QuantizationContext, name: str, state: RefinementState) -> None:
        self.ctx = ctx
        self.name = name
        self.state = state
        self.checkpoint = cast(Checkpoint, ctx.source)
        self.options = cast(GroupedRecipe, ctx.recipe).refine
        self.rounded = ctx.writer.so_far()
        tokens = calibration_tokens(ctx.calibration.folder)
        self.schedule: Schedule = make_schedule(
            tokens, self.options, ctx.calibration.info["seed"], sequences_in_batch(tokens.shape[1])
        )
        self.student = Student(self.checkpoint, self.rounded, self._part_of(), state)

    def _part_of(self) -> dict[str, str]:
        """Return the layers and norms that move, each with its part.

        Layers that the source has had rounded already, and whose codes were kept, stay as they are.
        """
        parts = BlockModel(self.checkpoint)
        inside = f"{parts.path}."
        found = {}
        for path, name in norms_of(parts, set(self.checkpoint.names)).items():
            found[name] = NORMS
            if path.startswith(inside):
                block = path.removeprefix(inside).partition(".")[0]
                found[name] = block_part(int(block))
        for number in range(parts.arch.layers):
            report = self.ctx.writer.report_of(block_part(number))
            assert report is not None, f"block {number} is not rounded yet"
            for layer, of_layer in report["layers"].items():
                if "codes" not in of_layer:
                    found[layer] = block_part(number)
        return found

    def run(self) -> None:
        """Take all steps that are missing, and write down what came of them."""
        known = self.state.known
        if "expected" not in known:
            self._keep_expected_states()
        blocks = self.checkpoint.arch.layers
        left = 2 * blocks * (self.options.steps - self.state.steps)
        left += blocks * sum(key not in known for key in ("kld_before", "kld_after"))
        run = RoundedRun(
            self.checkpoint, self.schedule, self.student, self._expected(), self._heads()
        )
        held_out = self.schedule.held_out
        with counting(f"{self.name}, refining", "block", left) as advance:
            if "kld_before" not in known:
                before = run.divergence(held_out, advance)
                self._check("the divergence of the rounded model", before)
                self.state.note(kld_before=before)
            while self.state.steps < self.options.steps:
                self._step(run, advance)
            if "kld_after" not in known:
                self.student.stored = True
                after = run.divergence(held_out, advance)
                # JSON has no NaN; what is not finite is not kept.
                self.state.note(kld_after=after if np.isfinite(after) else None)
        self._conclude(sum(run.run.batches[number].numel() for number in held_out))

    def _step(self, run: RoundedRun, advance: Any) -> None:
        """Take one step; it is on the disk at the end."""
        number = self.state.steps
        rate = self.schedule.rates[number]

        def take(part: str, gradients: Gradients) -> None:
            moved = self.state.read(part)
            for name, gradient in gradients.items():
                self._check(f"the gradient at {name} in step {number + 1}", gradient)
                before = moved.get(name) or at_rest(gradient)
                moved[name] = move(before, gradient, number + 1, rate)
            self.state.write(part, moved)

        run.step(self.schedule.steps[number], take, advance)
        self.state.note(steps=number + 1)

    def _check(self, what: str, value: torch.Tensor | float) -> None:
        """Refuse what is not finite. Raises StageError(non_finite)."""
        if bool(torch.as_tensor(value).isfinite().all()):
            return
        key = f"recipes.{self.name}.refine"
        raise StageError(
            Failure.NON_FINITE,
            f"expected finite numbers for {what}, found NaN or infinity; set {key}.learning_rate "
            f"lower, or {key}.steps=0",
        )

    def _shapes(self) -> list[tuple[int, ...]]:
        """Return the shape of the final states of each batch."""
        count, length = self.schedule.tokens.shape
        rows = self.schedule.rows
        sizes = [min(rows, count - start) for start in range(0, count, rows)]
        return [(size, length, self.checkpoint.arch.hidden_size) for size in sizes]

    def _expected(self) -> ActivationStore:
        """Return the final states of the unquantized model, which may not be there yet."""
        like = ActivationBatches(self._shapes(), self.state.folder)
        return ActivationStore(self.state.folder / EXPECTED, 1, like)

    def _keep_expected_states(self) -> None:
        """Run the unquantized model, and keep its final states."""
        run = BlockRun(self.checkpoint, self.schedule.tokens, self.schedule.rows)
        run.forward(f"{self.name}, the unquantized model")
        with torch.no_grad(), run.tail() as tail:
            finals = ActivationBatches(self._shapes(), self.state.folder)
            for number, batch in enumerate(run.hidden):
                finals[number] = tail(number, batch.to(device())).cpu()
                self._check("the final states of the unquantized model", finals[number])
        self._expected().put(0, finals)
        self.state.note(expected=True)

    def _heads(self) -> tuple[OutputHead, OutputHead]:
        """Return the head of the rounded model, as safetensors hold it, and that of the source."""
        source = OutputHead.of(self.checkpoint).to_torch(device())
        if not cast(GroupedRecipe, self.ctx.recipe).safetensors_head:
            return source, source
        module = self.checkpoint.arch.head.removesuffix(WEIGHT)
        held: QuantizedModel = self.rounded.with_outside([module])
        weight = torch.from_numpy(held.linear(module).dequantize()).to(device())
        return replace(source, weight=weight), source

    def _conclude(self, held_out_tokens: int) -> None:
        """Say what came of it, and keep what shall stand in the place of the rounded blocks."""
        known = self.state.known
        before, after = known["kld_before"], known["kld_after"]
        kept = after is not None and after < before
        parts = []
        if kept:
            parts = [block_part(block) for block in range(self.checkpoint.arch.layers)]
            parts += [NORMS] if self.state.read(NORMS) else []
        for part in parts:
            self.state.keep_result(part, self._result(part))
        report = {
            **self.options.model_dump(mode="json"),
            "held_out_tokens": held_out_tokens,
            "kld_before": before,
            "kld_after": after,
            "kept": kept,
        }
        self.state.note(report=report, parts=parts)

    def _result(self, part: str) -> dict[str, np.ndarray]:
        """Return the scales and norms of a part as they are stored from now on."""
        self.student.stored = True
        found = {}
        for name in self.state.read(part):
            if name in self.rounded.linears:
                found[f"{name}.scales"] = self.student.scales(name).cpu().numpy()
            else:
                found[f"{OVERRIDE}{name}"] = self.student.norm(name).cpu().numpy()
        return found
