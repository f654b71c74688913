"""Peak memory over the number of blocks: of load, calibrate and GPTQ, for several kinds of model.

    python -m benchmarks.depth                            # 4, 8, 16 and 32 blocks; an hour
    python -m benchmarks.depth --kinds found --blocks 4 16

The kinds are a Llama, which has a table; SmolLM3, whose structure load has to find; and a mixture
of each sort: Qwen3 MoE and OLMoE. Each step runs in a process of its own. Its peak of anonymous
memory (what is no page of a file), less what the imports alone take, is told in multiples of one
block's float32 weights. Writes benchmarks/results/depth.json and prints the table.
"""

import argparse
import tempfile
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from benchmarks.memory import run_quantize, watch_process
from benchmarks.paths import RESULTS
from benchmarks.tables import number_table
from quantline.files import MIB, read_json, write_json
from quantline.model.checkpoint import Checkpoint

VOCABULARY = 4096
SEQUENCES = 8
LENGTH = 128
SIZES: dict[str, Any] = {
    "hidden_size": 512,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": VOCABULARY,
    "max_position_embeddings": 512,
    "tie_word_embeddings": True,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": None,
}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2}
# Kind → transformers' model_type, and its sizes besides SIZES.
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"intermediate_size": 1408}),
    "found": ("smollm3", {"intermediate_size": 1408}),
    "mixture": ("qwen3_moe", {"moe_intermediate_size": 384, **EXPERTS}),
    "found mixture": ("olmoe", {"intermediate_size": 384, **EXPERTS}),
}
STEPS = ("load", "calibrate", "calibrate with gradients", "gptq")
# What each step imports: a process that does nothing else is its baseline.
MODULES = {
    "load": ("quantline.ingest.verify", "quantline.model.whole_model", "benchmarks.calibration"),
    "calibrate": ("benchmarks.calibration", "quantline.calibration.output_moments"),
    "gptq": (
        "quantline.methods.integer.gptq",
        "quantline.recipes.layerwise",
        "quantline.recipes.quantize",
    ),
}
IMPORTS = "imports of "  # with a step after it: the baseline of that step

Row = dict[str, Any]


def write_model(folder: Path, kind: str, blocks: int) -> None:
    """Write a model of random weights in bfloat16, as transformers saves it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    model_type, own = KINDS[kind]
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **SIZES, **own, num_hidden_layers=blocks)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)


def run_step(name: str, folder: Path) -> None:
    """Run what is measured, in the process that is watched.

    Args:
        name: One of STEPS, or IMPORTS and a step, which only imports what that step does.
        folder: Holds `model`; the step writes beside it.
    """
    step = name.removeprefix(IMPORTS)
    for module in MODULES[step.partition(" ")[0]]:
        import_module(module)
    if name != step:
        return
    if step == "load":
        run_load(folder / "model")
    elif step == "gptq":
        run_quantize(step, folder)
    else:
        run_calibrate(folder, gradients=step != "calibrate")


def run_load(model: Path) -> None:
    """Check a model as the stage load does, and keep the structure that is found."""
    from quantline.ingest import verify
    from quantline.model.structure import write_structure

    checkpoint = Checkpoint(model)
    verify.check_checkpoint(checkpoint)
    if checkpoint.structure is None:
        verify.check_runs(checkpoint)
    else:
        write_structure(model, verify.check_blocks(checkpoint))


def run_calibrate(folder: Path, gradients: bool) -> None:
    """Calibrate the model in a folder on random tokens."""
    from benchmarks.calibration import calibrate

    draw = np.random.default_rng(1)
    tokens = draw.integers(0, VOCABULARY, (SEQUENCES, LENGTH)).astype(np.int32)
    into = folder / ("calibration" if gradients else "calibration-forward")
    calibrate(Checkpoint(folder / "model"), tokens, into, gradients)


def block_mib(model: Path) -> float:
    """Return the MiB of the first block's float32 weights."""
    checkpoint = Checkpoint(model)
    shapes = [checkpoint.shape(name) for name in checkpoint.names if ".layers.0." in name]
    return 4 * sum(int(np.prod(shape)) for shape in shapes) / MIB


@cache
def baseline(step: str) -> dict[str, float]:
    """Return the memory of a process that only imports what a step does."""
    return watch_process("benchmarks.depth", IMPORTS + step, Path())


def measure(kind: str, blocks: int, steps: list[str]) -> list[Row]:
    """Measure a kind of model of so many blocks; return a row for each step."""
    rows = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", kind, blocks)
        model_mib = sum(path.stat().st_size for path in folder.glob("model/*.safetensors")) / MIB
        unit = block_mib(folder / "model")
        for step in steps:
            imports = baseline(step)
            peaks = watch_process("benchmarks.depth", step, folder)
            over = {key: peaks[key] - imports[key] for key in ("resident", "anonymous")}
            about = {"kind": kind, "blocks": blocks, "step": step, "model_mib": model_mib}
            rows.append({**about, "block_mib": unit, "over_imports_mib": over, **peaks})
    return rows


def print_rows(rows: list[Row], console: Console) -> None:
    """Print anonymous memory in blocks, a column for each depth."""
    depths = sorted({row["blocks"] for row in rows})
    cells = []
    for kind in KINDS:
        for step in STEPS:
            own = [row for row in rows if (row["kind"], row["step"]) == (kind, step)]
            found = {row["blocks"]: row for row in own}
            if not found:
                continue
            taken = {
                depth: row["over_imports_mib"]["anonymous"] / row["block_mib"]
                for depth, row in found.items()
            }
            numbers = [f"{taken[depth]:.1f}" if depth in taken else "–" for depth in depths]
            ratio = taken[max(taken)] / taken[min(taken)]
            cells.append([kind, step, *numbers, f"{ratio:.2f}"])
    titles = ("kind", "step", *(f"{depth} blocks" for depth in depths), "deepest over shallowest")
    console.print(number_table(titles, cells))


def main() -> None:
    """Measure every kind at every depth. Rows of the results that are not measured again stay."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kinds", nargs="+", default=list(KINDS), choices=KINDS)
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 8, 16, 32])
    parser.add_argument("--steps", nargs="+", default=list(STEPS), choices=STEPS)
    parser.add_argument("--step", help="run this step in this process, and nothing else")
    parser.add_argument("--folder", type=Path, help="where that step finds its model")
    options = parser.parse_args()
    if options.step:
        run_step(options.step, options.folder)
        return
    path = RESULTS / "depth.json"
    rows: list[Row] = read_json(path)["rows"] if path.is_file() else []
    for kind in options.kinds:
        for blocks in options.blocks:
            new = measure(kind, blocks, options.steps)
            known = {(row["kind"], row["blocks"], row["step"]) for row in new}
            old = [row for row in rows if (row["kind"], row["blocks"], row["step"]) not in known]
            rows = old + new
            write_json(path, {"rows": rows})
    print_rows(rows, Console(width=120))


if __name__ == "__main__":
    main()
