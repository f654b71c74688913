"""Peak memory of calibrate and quantize on a model of random weights, and on one of twice as many blocks.

    python -m benchmarks.memory                  # 1.1 GB and 2.1 GB in bfloat16; some hours on two cores
    python -m benchmarks.memory --steps calibrate gptq

Each step runs in a process of its own. Writes benchmarks/results/memory.json and prints the table: the peak of the whole
resident memory and of its anonymous part (what is no page of a file), less what the imports alone take, as multiples of
one block's float32 weights.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table
from transformers import AutoConfig

from quantline.model.safetensors_writer import SafetensorsStream
from quantline.files import write_json

HERE = Path(__file__).parent
SIZES = {"model_type": "llama", "hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16,
         "num_key_value_heads": 16, "vocab_size": 8192, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu", "torch_dtype": "bfloat16"}
SEQUENCES, LENGTH = 8, 128
STEPS = ["calibrate", "gptq", "awq", "gptq+curvature"]
MIB = 1 << 20


def make(folder: Path, blocks: int) -> None:
    """A Llama of random weights, written tensor by tensor."""
    import ml_dtypes

    folder.mkdir()
    config = SIZES | {"num_hidden_layers": blocks}
    write_json(folder / "config.json", config)
    from accelerate import init_empty_weights
    from transformers import AutoModelForCausalLM

    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    shapes = {name: tuple(value.shape) for name, value in model.named_parameters()}
    draw = np.random.default_rng(0)
    with SafetensorsStream(folder / "model.safetensors", sorted(shapes)) as stream:
        for name in sorted(shapes):
            shape = shapes[name]
            tensor = np.ones(shape, np.float32) if len(shape) == 1 else draw.standard_normal(shape, np.float32) * 0.02
            stream.add(name, tensor.astype(ml_dtypes.bfloat16))


def step(name: str, folder: Path) -> None:
    """What is measured, in the process that is watched. `imports` does nothing but import."""
    from benchmarks.rounding import calibrate, round_model
    from quantline.calibration import output_moments  # noqa: F401
    from quantline.model import block_runner  # noqa: F401
    from quantline.model.architecture import architecture
    from quantline.quantized.store import QuantizedWriter
    from quantline.calibration.collect import Moments
    from quantline.model.checkpoint import Checkpoint
    from quantline.config.recipes import RECIPES
    from quantline.methods.integer import awq, curvature, gptq  # noqa: F401
    from quantline.recipes.context import Work

    checkpoint, calibration = Checkpoint(folder / "model"), folder / "calibration"
    if name == "calibrate":
        tokens = np.random.default_rng(1).integers(0, SIZES["vocab_size"], (SEQUENCES, LENGTH)).astype(np.int32)
        calibrate(checkpoint, tokens, calibration, True)
    elif name != "imports":
        method, curved = name.split("+") if "+" in name else (name, None)
        recipe = RECIPES[method](method=method, bits=4, group_size=128, symmetric=False, curvature=curved is not None)
        (folder / name).mkdir()
        round_model(Work(recipe, checkpoint, architecture(checkpoint), Moments(calibration), QuantizedWriter(folder / name)))


def watched(name: str, folder: Path) -> dict[str, float]:
    """Peak MiB, whole and anonymous, and seconds of a step, from /proc while it runs."""
    started, peak = time.perf_counter(), {"resident": 0.0, "anonymous": 0.0}
    process = subprocess.Popen([sys.executable, "-m", "benchmarks.memory", "--step", name, "--folder", str(folder)],
                               env=os.environ | {"MALLOC_TRIM_THRESHOLD_": "0"})
    while process.poll() is None:
        try:
            fields = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
        except FileNotFoundError:
            break
        for what, field in (("resident", "VmHWM"), ("anonymous", "RssAnon")):
            if field in fields:
                peak[what] = max(peak[what], int(fields[field].split()[0]) / 1024)
        time.sleep(0.02)
    if process.wait():
        raise SystemExit(f"{name} failed with exit code {process.returncode}")
    return peak | {"seconds": time.perf_counter() - started}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--blocks", type=int, nargs="+", default=[40, 80])
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="calibrate has to be among them")
    parser.add_argument("--step")
    parser.add_argument("--folder", type=Path)
    asked = parser.parse_args()
    if asked.step:
        step(asked.step, asked.folder)
        return
    hidden, inner = SIZES["hidden_size"], SIZES["intermediate_size"]
    block = 4 * (4 * hidden**2 + 3 * hidden * inner) / MIB
    table = Table("blocks", "step", "peak resident MiB", "in blocks", "anonymous MiB", "in blocks", "seconds", box=None)
    target, rows = HERE / "results/memory.json", []
    if target.is_file():  # what is not measured again stays
        rows = json.loads(target.read_text(encoding="utf-8"))["rows"]
    for blocks in asked.blocks:
        rows = [row for row in rows if row["blocks"] != blocks or row["step"] not in [*asked.steps, "size"]]
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work)
            make(folder / "model", blocks)
            size = (folder / "model/model.safetensors").stat().st_size / MIB
            base = watched("imports", folder)
            for name in asked.steps:
                found = watched(name, folder)
                over = {what: (found[what] - base[what]) / block for what in ("resident", "anonymous")}
                rows.append({"blocks": blocks, "model_mib": size, "step": name, **found, "over_imports_in_blocks": over})
                table.add_row(str(blocks), name, f"{found['resident']:.0f}", f"{over['resident']:.2f}",
                              f"{found['anonymous']:.0f}", f"{over['anonymous']:.2f}", f"{found['seconds']:.0f}")
            packed = {kind: sum(path.stat().st_size for path in (folder / "calibration").glob(f"{kind}-*")) / MIB
                      for kind in ("inputs", "outputs")}
            rows.append({"blocks": blocks, "model_mib": size, "step": "size", **packed})
            table.add_row(str(blocks), "size of the factors over the model's", *(f"{kind} {one / size:.2f}" for kind, one in packed.items()))
            write_json(target, {"block_mib": block, "rows": rows})
    Console().print(table)


if __name__ == "__main__":
    main()
