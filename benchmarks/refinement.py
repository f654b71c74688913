"""What it would bring to tune scales and norms after rounding, by the final divergence.

    python -m benchmarks.real_models smollm2-135m /tmp/smollm2
    python -m benchmarks.refinement /tmp/smollm2 --grids 4 64 --grids 2 64 --steps 16 32

A trial, of which no recipe is made. The model is calibrated, and rounded by a recipe; the integers
stay, and Adam moves the scales of all groups and the norms by the gradient of the KL divergence on
the calibration text, whole sequences at a time, end to end. Scales are rounded to bfloat16 again
before each measurement. The divergence on other news, on code and on dialogue stands beside the
seconds of calibration, of rounding and of tuning. Writes
benchmarks/results/refinement-<model>.json and prints the table.
"""

import argparse
import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn
from torch.nn import functional

from benchmarks.model_under_test import TEXTS, ModelUnderTest
from benchmarks.paths import RESULTS
from benchmarks.quality.our_recipes import our_recipes
from benchmarks.stopwatch import stopwatch
from benchmarks.tables import number_table
from quantline.files import write_json
from quantline.quantized.store import QuantizedModel
from quantline.quantized.tensors import GroupedLinear

SEQUENCES_IN_STEP = 4
SEED = 0
RECIPES = ("gptq", "gptq + curvature", "awq + gptq + curvature")


class TunedLinear(nn.Module):
    """A rounded linear layer whose scales can be moved.

    Attributes:
        change: What is added to 1 and multiplies the scales, float32 [out, groups, 1].
    """

    def __init__(self, linear: nn.Linear, rounded: GroupedLinear) -> None:
        """Take the place of a linear layer."""
        super().__init__()
        shape = (*rounded.scales.shape, rounded.group_size)
        zeros = torch.from_numpy(rounded.zeros).float()[:, :, None]
        codes = torch.from_numpy(rounded.integers).float().reshape(shape) - zeros
        self.register_buffer("codes", codes)
        self.register_buffer("scales", torch.from_numpy(rounded.scales)[:, :, None])
        self.change = nn.Parameter(torch.zeros_like(self.scales))
        self.bias = linear.bias
        self.stored = False

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        """Return the outputs."""
        scales = self.scales * (1 + self.change)
        if self.stored:
            scales = scales.bfloat16().float()
        weight = (self.codes * scales).reshape(len(self.codes), -1)
        return functional.linear(inputs, weight, self.bias)


def tuned_copy(model: nn.Module, quantized: QuantizedModel) -> tuple[nn.Module, list[nn.Parameter]]:
    """Return a copy of a rounded model that can be tuned, and what can be moved in it."""
    copied = copy.deepcopy(model).requires_grad_(False)
    moved = []
    for name in quantized.linears:
        rounded = quantized.linear(name)
        assert isinstance(rounded, GroupedLinear)
        parent, _, own = name.rpartition(".")
        tuned = TunedLinear(copied.get_submodule(name), rounded)
        setattr(copied.get_submodule(parent), own, tuned)
        moved.append(tuned.change)
    norms = [value for name, value in copied.named_parameters() if name.endswith("norm.weight")]
    for norm in norms:
        norm.requires_grad_(True)
    return copied, [*moved, *norms]


@contextmanager
def as_stored(model: nn.Module) -> Iterator[None]:
    """Have the scales as a file would hold them."""
    linears = [module for module in model.modules() if isinstance(module, TunedLinear)]
    for linear in linears:
        linear.stored = True
    yield
    for linear in linears:
        linear.stored = False


def step(student: nn.Module, teacher: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return the mean KL divergence of a batch of sequences [n, length], with its gradient."""
    with torch.no_grad():
        expected = torch.log_softmax(teacher(tokens).logits, -1)
    found = torch.log_softmax(student(tokens).logits, -1)
    return functional.kl_div(found, expected, reduction="sum", log_target=True) / tokens.numel()


def tune(
    model: ModelUnderTest, quantized: QuantizedModel, steps: list[int], rate: float
) -> list[dict[str, Any]]:
    """Tune a model; return a row for each number of steps, of which 0 is the first."""
    teacher = copy.deepcopy(model.model)  # before rounding
    with model.quantized_weights(quantized.folder):
        student, moved = tuned_copy(model.model, quantized)
    optimizer = torch.optim.Adam(moved, lr=rate)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, max(steps))
    generator = torch.Generator().manual_seed(SEED)
    tokens = torch.from_numpy(model.calibration).long()
    order: list[int] = []
    rows = []
    seconds = 0.0
    own = model.model
    for number in range(max(steps) + 1):
        if number in (0, *steps):
            with as_stored(student):
                model.model = student
                found = model.figures(model.token_divergences())["texts"]
                model.model = own
            rows.append({"steps": number, "tuning_seconds": seconds, "kld": found})
            print(rows[-1], flush=True)
        if len(order) < SEQUENCES_IN_STEP:
            order += torch.randperm(len(tokens), generator=generator).tolist()
        batch = tokens[order[:SEQUENCES_IN_STEP]]
        del order[:SEQUENCES_IN_STEP]
        with stopwatch() as times:
            optimizer.zero_grad()
            step(student, teacher, batch).backward()
            optimizer.step()
            schedule.step()
        seconds += times["seconds"]
    return rows


def main() -> None:
    """Run the trial."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="that benchmarks.real_models has made")
    parser.add_argument(
        "--grids", type=int, nargs=2, action="append", help="bits and group size", required=True
    )
    parser.add_argument("--recipe", choices=RECIPES, default=RECIPES[-1])
    parser.add_argument("--steps", type=int, nargs="+", default=[16, 32])
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--sequences", type=int, nargs=2, default=[64, 8])
    options = parser.parse_args()
    model = ModelUnderTest.of_folder(options.folder, tuple(options.sequences))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as temporary:
        calibration = Path(temporary) / "calibration"
        calibrated = model.calibrate(calibration, True)
        for bits, group_size in options.grids:
            with tempfile.TemporaryDirectory() as name:
                recipe = our_recipes(bits, group_size)[options.recipe]
                quantized = model.quantize(recipe, calibration, Path(name))
                found = tune(model, QuantizedModel(name), options.steps, options.rate)
            of_grid = {"bits": bits, "group_size": group_size, "recipe": options.recipe}
            rows += [of_grid | {"rate": options.rate} | row | quantized for row in found]
            content = {
                "model": model.name,
                "calibration_tokens": int(model.calibration.size),
                "calibration_seconds": calibrated["seconds"],
                "evaluation_tokens": model.tokens_of,
                "rows": rows,
            }
            write_json(RESULTS / f"refinement-{model.name}.json", content)
    cells = [
        [
            f"{row['bits']} / {row['group_size']}",
            str(row["steps"]),
            *(f"{one['kld']:.4f}" for one in row["kld"].values()),
            f"{row['seconds']:.0f}",
            f"{row['tuning_seconds']:.0f}",
        ]
        for row in rows
    ]
    titles = ("bits / group", "steps", *TEXTS, "seconds to round", "to tune")
    Console().print(number_table(titles, cells))


if __name__ == "__main__":
    main()
