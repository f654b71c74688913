"""A checkpoint to a quantized GGUF: our one pass beside llama.cpp's two steps, its converter and then llama_model_quantize.

    python -m benchmarks.gguf                                    # fetches llama-cpp-python's source for the converter
    python -m benchmarks.gguf --source llama_cpp_python-0.3.36.tar.gz    # or its folder, or a checkout of llama.cpp
    python -m benchmarks.gguf --blocks 2 --mixes Q6_K --importance without

The model is a Llama of random weights in bfloat16 with the demo's tokenizer. Both sides get the same importance matrix and
run in processes of their own, imports and all, with as many threads as there are cores. Ours is timed with ggml's kernel,
whose tensors have to be those of llama.cpp to the bit, and with our own. Writes benchmarks/results/gguf.json.
"""

import argparse
import ctypes
import os
import resource
import shutil
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path

import numpy as np

from quantline.files import versions, write_json

HERE, DEMO = Path(__file__).parent, Path("demo/model")
SIZES = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_attention_heads": 16,
         "num_key_value_heads": 4, "vocab_size": 8192, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
         "tie_word_embeddings": False, "architectures": ["LlamaForCausalLM"], "hidden_act": "silu",
         "torch_dtype": "bfloat16", "bos_token_id": 0, "eos_token_id": 0}
WANTED = {"ggml": 0.67, "numba": 0.3}  # our seconds over theirs
PACKAGE = "llama-cpp-python"
MIB = 1 << 20
# The converter tells pre-tokenizers by a hash over a vocabulary; that of a vocabulary that was trained here it cannot know.
CONVERTER = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def make(folder: Path, blocks: int) -> None:
    """The model, written tensor by tensor: weights with a few large channels, as trained ones have them."""
    import ml_dtypes

    from quantline.model.safetensors_writer import SafetensorsStream

    folder.mkdir(parents=True)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(DEMO / name, folder)
    write_json(folder / "config.json", SIZES | {"num_hidden_layers": blocks})
    width, inner, keys = SIZES["hidden_size"], SIZES["intermediate_size"], SIZES["hidden_size"] // 4
    shapes = {"model.embed_tokens": (SIZES["vocab_size"], width), "lm_head": (SIZES["vocab_size"], width), "model.norm": (width,)}
    parts = {"self_attn.q_proj": (width, width), "self_attn.k_proj": (keys, width), "self_attn.v_proj": (keys, width),
             "self_attn.o_proj": (width, width), "mlp.gate_proj": (inner, width), "mlp.up_proj": (inner, width),
             "mlp.down_proj": (width, inner), "input_layernorm": (width,), "post_attention_layernorm": (width,)}
    shapes |= {f"model.layers.{block}.{part}": shape for block in range(blocks) for part, shape in parts.items()}
    draw = np.random.default_rng(0)
    with SafetensorsStream(folder / "model.safetensors", [f"{name}.weight" for name in shapes]) as stream:
        for name, shape in shapes.items():
            tensor = draw.standard_normal(shape, np.float32) * 0.02 if len(shape) > 1 else np.ones(shape, np.float32)
            tensor = tensor * np.exp(0.5 * draw.standard_normal(shape[-1:], np.float32))
            stream.add(f"{name}.weight", tensor.astype(ml_dtypes.bfloat16))


def make_importance(folder: Path, model: Path) -> None:
    """An importance matrix in llama-imatrix's format, and the folder of a calibration that holds nothing else."""
    from quantline.model.architecture import architecture
    from quantline.model.checkpoint import Checkpoint
    from quantline.formats.gguf import imatrix
    from quantline.formats.gguf.architectures import tensor_names

    checkpoint, draw, entries = Checkpoint(model), np.random.default_rng(1), {}
    facts = architecture(checkpoint)
    for name, place in tensor_names(checkpoint, facts).items():
        if facts.layer_index(name) is not None and len(checkpoint.shape(name)) > 1:
            sums = np.exp(draw.standard_normal((1, checkpoint.shape(name)[-1]), np.float32)) * 1000
            entries[place] = imatrix.Entry(sums, np.full(1, 1000, np.float32))
    folder.mkdir()
    imatrix.write(folder / imatrix.FILE, imatrix.ImportanceMatrix(entries, ("random",), 1, 1000), "llama")
    write_json(folder / "calibration.json", {"layers": {}, "tokens": 1000, "curvature": False, "seed": 0, "text_sha256": "0" * 64})


def llama_cpp(source: str | None, work: Path) -> Path:
    """The folder of llama.cpp: given, unpacked, or fetched with pip from the package index."""
    if source is None:
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", PACKAGE, "--dest", str(work),
                   f"{PACKAGE}=={versions(PACKAGE)[PACKAGE]}"]
        subprocess.run(command, check=True)
        source = str(next(work.glob("*.tar.gz")))
    path = Path(source)
    if path.is_file():
        with tarfile.open(path) as archive:
            archive.extractall(work / "source", filter="data")
        path = work / "source"
    found = min(path.rglob("convert_hf_to_gguf.py"), default=None, key=lambda one: len(one.parts))
    if found is None:
        raise SystemExit(f"expected convert_hf_to_gguf.py in {path}, found none; give --source")
    return found.resolve().parent


def llama_quantize(source: Path, target: Path, mix: str, importance: Path | None) -> None:
    """llama.cpp's own quantization of a file, in all threads."""
    import llama_cpp as llama

    from quantline.formats.gguf import imatrix

    settings = llama.llama_model_quantize_default_params()
    settings.nthread, settings.ftype = os.cpu_count(), getattr(llama, f"LLAMA_FTYPE_MOSTLY_{mix}")
    if importance:
        flat = {name: entry.values().reshape(-1) for name, entry in imatrix.read(importance).entries.items()}
        entries = (llama.llama_model_imatrix_data * (len(flat) + 1))()
        for entry, (name, values) in zip(entries, flat.items(), strict=False):
            entry.name, entry.size, entry.data = name.encode(), len(values), values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        settings.imatrix = entries
    if llama.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(settings)):
        raise SystemExit("llama_model_quantize failed")


def ours(work: Path, mix: str, kernel: str, importance: Path | None) -> None:
    """What the stages quantize and export do between reading the checkpoint and the finished file."""
    from benchmarks.rounding import round_model
    from quantline.model.architecture import architecture
    from quantline.quantized.store import Quantized, QuantizedWriter
    from quantline.calibration.collect import Moments
    from quantline.model.checkpoint import Checkpoint
    from quantline.config.params import Variant
    from quantline.formats.gguf import container as gguf
    from quantline.recipes.context import Work
    from quantline.config.recipes import KQuant

    recipe = KQuant(method="kquant", mix=mix, kernel=kernel, importance=False, importance_file=importance and str(importance))
    checkpoint, moments = Checkpoint(work / "model"), Moments(work / "calibration")
    facts, folder, bundle = architecture(checkpoint), work / f"ours-{kernel}/quantized", work / f"ours-{kernel}/bundle"
    folder.mkdir(parents=True)
    bundle.mkdir()
    job = Work(recipe, checkpoint, facts, moments, QuantizedWriter(folder))
    layers = round_model(job)
    job.writer.close({"recipe": {"name": mix.lower(), **recipe.model_dump(mode="json")}, "tensors": layers, "transforms": [],
                      "calibration": moments.provenance(), "importance": job.mixture.write_importance(folder)})
    gguf.write(checkpoint, Quantized(folder), bundle, Variant(recipe=mix.lower(), format="gguf", runtime="llama.cpp"))


class Disk(threading.Thread):
    """The largest size of a folder while something runs."""

    def __init__(self, folder: Path) -> None:
        super().__init__(daemon=True)
        self.folder, self.peak, self.over = folder, 0, threading.Event()

    def run(self) -> None:
        while not self.over.wait(0.1):
            self.peak = max(self.peak, size(self.folder))


def size(folder: Path) -> int:
    """Bytes of all files in a folder."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() else 0
        except FileNotFoundError:  # renamed meanwhile
            continue
    return total


def timed(folder: Path, *commands: list[str]) -> dict:
    """Wall and CPU seconds of commands, one after another, MiB that they leave in their folder, and the most it held."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.sync()
    watch, before, found = Disk(folder), resource.getrusage(resource.RUSAGE_CHILDREN), {"steps": []}
    watch.start()
    for command in commands:
        started = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{command} ended with {done.returncode}: {done.stderr[-3000:]}")
        found["steps"].append(time.perf_counter() - started)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    watch.over.set()
    watch.join()
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": sum(found["steps"]), "cpu_seconds": cpu, "written_mib": size(folder) / MIB,
            "peak_disk_mib": max(watch.peak, size(folder)) / MIB, **found}


def compared(one: Path, other: Path) -> dict:
    """How many tensors and blocks of two files are equal, to the bit."""
    import gguf

    files = [{tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors} for path in (one, other)]
    if files[0].keys() != files[1].keys():
        raise SystemExit(f"expected the same tensors, found {sorted(files[0].keys() ^ files[1].keys())} in one file alone")
    tensors = blocks = equal = whole = 0
    for name, tensor in files[0].items():
        there = files[1][name]
        if tensor.tensor_type != there.tensor_type:
            raise SystemExit(f"expected {name} in {there.tensor_type.name}, found {tensor.tensor_type.name}")
        width = gguf.GGML_QUANT_SIZES[tensor.tensor_type][1]
        same = (np.asarray(tensor.data).view(np.uint8).reshape(-1, width) ==
                np.asarray(there.data).view(np.uint8).reshape(-1, width)).all(1)
        tensors, whole, blocks, equal = tensors + 1, whole + bool(same.all()), blocks + len(same), equal + int(same.sum())
    return {"tensors": tensors, "tensors_equal": whole, "blocks": blocks, "equal_share": equal / blocks}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", help="llama-cpp-python's source distribution, or a checkout of llama.cpp")
    parser.add_argument("--blocks", type=int, default=8, help="of the model; 86 MiB each")
    parser.add_argument("--mixes", nargs="+", default=["Q4_K_M", "Q6_K", "Q8_0"])
    parser.add_argument("--kernels", nargs="+", default=["ggml", "numba"])
    parser.add_argument("--importance", nargs="+", default=["without", "with"], choices=["without", "with"])
    parser.add_argument("--work", type=Path, help="a folder to work in that is kept, with the model")
    parser.add_argument("--step", nargs="+", help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.step:
        name, *paths = asked.step
        importance = asked.work / "calibration/imatrix.gguf" if asked.importance == ["with"] else None
        if name == "quantize":
            llama_quantize(Path(paths[0]), Path(paths[1]), asked.mixes[0], importance)
        else:
            ours(asked.work, asked.mixes[0], name, importance)
        return
    with tempfile.TemporaryDirectory() as folder:
        measure(asked, (asked.work or Path(folder)).resolve())


def measure(asked: argparse.Namespace, work: Path) -> None:
    """Make the model, run both sides without and with importance, and write the result after each run."""
    work.mkdir(exist_ok=True)
    if not (work / "model").is_dir():
        make(work / "model", asked.blocks)
        make_importance(work / "calibration", work / "model")
    checkout = llama_cpp(asked.source, work)
    (work / "convert.py").write_text(CONVERTER)
    for path in (work / "model").iterdir():  # into the page cache
        path.read_bytes()
    if "numba" in asked.kernels:
        from quantline.methods.ggml import quantize as kquant

        for kind in kquant.SEARCHED:  # compiled once, and cached for every later run
            kquant.quantize(np.ones((1, 256), np.float32), kind, kernel="numba")
    found = {"threads": os.cpu_count(), "model_mib": size(work / "model") / MIB,
             "versions": versions("gguf", PACKAGE, "numba", "numpy"), "rows": []}
    for mix, importance in product(asked.mixes, asked.importance):
        for row in sides(asked.kernels, work, checkout, mix, importance):
            found["rows"].append({"mix": mix, "importance": importance == "with", **row})
            write_json(HERE / "results/gguf.json", found)
    table(found)
    unequal = [row for row in found["rows"] if row["by"] == "ggml" and row["tensors_equal"] != row["tensors"]]
    if unequal:
        raise SystemExit(f"expected all {unequal[0]['tensors']} tensors to be llama.cpp's, found {unequal[0]['tensors_equal']}")


def sides(kernels: list[str], work: Path, checkout: Path, mix: str, importance: str) -> Iterator[dict]:
    """llama.cpp's two steps, then ours with each kernel, held against them."""
    theirs = work / "theirs"
    plain, target = theirs / "bf16.gguf", theirs / "quantized.gguf"
    this = [sys.executable, "-m", "benchmarks.gguf", "--work", str(work), "--mixes", mix, "--importance", importance, "--step"]
    first = timed(theirs, [sys.executable, str(work / "convert.py"), str(checkout), str(checkout / "convert_hf_to_gguf.py"),
                           str(work / "model"), "--outfile", str(plain), "--outtype", "bf16"],
                  [*this, "quantize", str(plain), str(target)])
    yield {"by": "llama.cpp", **first}
    for kernel in kernels:
        folder = work / f"ours-{kernel}"
        run = timed(folder, [*this, kernel])
        yield {"by": kernel, **run, "over_theirs": run["seconds"] / first["seconds"],
               "cpu_over_theirs": run["cpu_seconds"] / first["cpu_seconds"], "wanted": WANTED[kernel],
               **compared(folder / "bundle/model.gguf", target)}


def table(found: dict) -> None:
    """Print what was found."""
    from rich.console import Console
    from rich.table import Table

    made = Table("mix", "importance", "by", "seconds", "of theirs", "wanted", "CPU s", "of theirs", "MiB written", "peak MiB",
                 "equal tensors", "equal blocks", box=None)
    for row in found["rows"]:
        more = [f"{row['over_theirs']:.2f}", str(row["wanted"])] if "wanted" in row else ["", ""]
        equal = [f"{row['tensors_equal']} of {row['tensors']}", f"{row['equal_share']:.4%}"] if "wanted" in row else ["", ""]
        made.add_row(row["mix"], "yes" if row["importance"] else "no", row["by"], " + ".join(f"{one:.1f}" for one in row["steps"]), *more,
                     f"{row['cpu_seconds']:.1f}", f"{row['cpu_over_theirs']:.2f}" if "wanted" in row else "",
                     f"{row['written_mib']:.0f}", f"{row['peak_disk_mib']:.0f}", *equal)
    console = Console(width=130)
    console.print(made)
    console.print(f"{found['model_mib']:.0f} MiB of bfloat16 in {found['threads']} threads")


if __name__ == "__main__":
    main()
