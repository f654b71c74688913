"""Our perplexity and divergence beside llama.cpp's own `llama-perplexity`: the same files, tokens and threads, in one run.

    python -m benchmarks.perplexity                                  # the tool is fetched and built on first use
    python -m benchmarks.perplexity --source /path/to/llama_cpp_python-0.3.36
    python -m benchmarks.perplexity --models demo                    # no random models of large vocabularies

The tool tokenizes the text, cuts it into chunks, puts the begin token first where the model has one, and scores the second
half of each chunk. Its tokens are read from its own file and are what our reference and our evaluation get, and we score
the same positions. Seconds are those from the loaded model to the figures, on both sides: decoding, reading or rebuilding the
reference, and comparing. CPU seconds are compared twice: ours of that span with those of the tool's whole process, which
loads and warms up in it, and process with process, where ours starts Python and imports. Writes
benchmarks/results/perplexity.json, where the rows of models that are not run stay, and prints the tables.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.peers import llama_perplexity as peer
from benchmarks.storage import stored_as_the_tool_does
from quantline.files import write_json

HERE, ROOT = Path(__file__).parent, Path(__file__).parent.parent
VARIANTS = {"gguf-q8_0": "q8_0", "gguf-q4_k_m": "q4_k_m", "gguf-q2_k": "q2_k"}
BASE = "gguf-f32"
SIZES = {"hidden_size": 1024, "intermediate_size": 1024, "num_hidden_layers": 2, "num_attention_heads": 8,
         "num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 512, "tie_word_embeddings": True}
RANDOM_CHUNKS = 2


def environment(threads: int) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": str(threads)}


def make(folder: Path, model: Path, variants: dict[str, str], threads: int) -> None:
    """The base and the variants of a model, by the pipeline's own stages, in a project of their own."""
    from quantline.config.compose import as_yaml, compose

    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "dvc.yaml", folder)
    asked = ["model=local", f"model.path={model.resolve()}", f"variant=[{','.join([BASE, *variants])}]",
             f"recipe=[{','.join(['none', *variants.values()])}]",
             *(f"{section}.path={(ROOT / 'demo/data' / section).resolve()}.txt" for section in ("calibration", "evaluation")),
             "evaluation.gold=null", "calibration.sequences=16", "evaluation.speed.repetitions=1"]
    (folder / "params.yaml").write_text(as_yaml(compose(asked, root=folder)), encoding="utf-8")
    stages = [("load",), ("calibrate",), *(("quantize", recipe) for recipe in ("none", *variants.values())),
              *(("export", name) for name in (BASE, *variants))]
    done = subprocess.run([sys.executable, "-m", "benchmarks.perplexity", "--make", *("@".join(stage) for stage in stages)],
                          cwd=folder, capture_output=True, text=True, check=False, env=environment(threads))
    if done.returncode:
        raise SystemExit(f"making {', '.join(variants)} failed: {done.stderr[-2000:]}")


def run_stages(asked: list[str]) -> None:
    """Stages of the project that is the working folder, `name` or `name@instance`, one after another in this process."""
    from importlib import import_module

    from quantline.run.stage import stage_run

    for one in asked:
        name, _, instance = one.partition("@")
        with stage_run(name, instance or None) as run:
            getattr(import_module(f"stages.{name}"), name)(run)


def random_model(folder: Path, vocabulary: int) -> Path:
    """A Llama of random weights with a large vocabulary, of which the demo's tokenizer knows the first tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "demo/model" / name, folder)
    torch.manual_seed(0)
    config = LlamaConfig(vocab_size=vocabulary, initializer_range=0.05, bos_token_id=0, eos_token_id=0, **SIZES)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    return folder


def reference(project: Path, logits: Path, folder: Path) -> tuple[int, np.ndarray]:
    """Store our reference for the tokens in the tool's file; returns (first scored position, tokens)."""
    from quantline.model.architecture import architecture
    from quantline.model.block_runner import run_blocks
    from quantline.model.checkpoint import Checkpoint
    from quantline.text.tokenizer import Tokenizer
    from stages.reference import store

    checkpoint, tokenizer = Checkpoint(project / "artifacts/model"), Tokenizer(project / "artifacts/model")
    facts = architecture(checkpoint)
    tokens, vocabulary = peer.tokens_of(logits, tokenizer.bos)
    if vocabulary != facts.vocab_size:
        raise SystemExit(f"expected {facts.vocab_size} tokens in the tool's vocabulary, found {vocabulary}")
    folder.mkdir()
    store(folder, checkpoint, tokens, run_blocks(checkpoint, tokens, "reference"))
    write_json(folder / "reference.json", {"logit_scale": facts.logit_scale, "logit_softcap": facts.logit_softcap})
    return tokens.shape[1] // 2, tokens


def measure(bundle: Path, reference: Path, first: int, threads: int) -> dict:
    """In a process of its own: our figures of a bundle, and the seconds and memory that they take."""
    from quantline.metrics.quality import divergence
    from quantline.runtimes.runtime import open_runtime

    started = time.perf_counter()
    runtime = open_runtime("llama.cpp", bundle, threads)
    loaded, status, used = time.perf_counter(), Path("/proc/self/status"), time.process_time()
    figures = divergence(runtime, reference, first).summary()
    fields = dict(line.split(":", 1) for line in status.read_text(encoding="utf-8").splitlines())
    return {"figures": figures, "seconds": time.perf_counter() - loaded, "load_s": loaded - started,
            "cpu_s": time.process_time(), "work_cpu_s": time.process_time() - used,
            "peak_mib": int(fields["VmHWM"].split()[0]) / 1024, "anonymous_mib": int(fields["RssAnon"].split()[0]) / 1024}


def ours(bundle: Path, folder: Path, first: int, threads: int) -> dict:
    """`measure` in a fresh process; wall_s has its start and its imports in it."""
    started = time.perf_counter()
    done = subprocess.run([sys.executable, "-m", "benchmarks.perplexity", "--measure", str(bundle), str(folder), str(first),
                           str(threads)], capture_output=True, text=True, check=False, cwd=ROOT, env=environment(threads))
    if done.returncode:
        raise SystemExit(f"measuring {bundle} failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout) | {"wall_s": time.perf_counter() - started}


def median(runs: list[dict], *names: str) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in names}


def compared(tool: Path, bundle: Path, logits: Path, folder: Path, first: int, asked: argparse.Namespace) -> dict:
    """One variant measured by both sides in turn, `repetitions` times."""
    theirs, mine, whole = [], [], []
    length = peer.tokens_of(logits, None)[0].shape[1]
    if asked.repetitions > 1:
        ours(bundle, folder, first, asked.threads)  # draws the files into memory
    for _ in range(asked.repetitions):
        said, took = peer.run(tool, bundle / "model.gguf", logits, length, asked.threads, asked.batch, "--kl-divergence")
        theirs.append(took)
        mine.append(ours(bundle, folder, first, asked.threads))
        whole.append(ours(bundle, folder, 0, asked.threads))
    kept = ("seconds", "wall_s", "cpu_s", "peak_mib")
    times = {"tool": median(theirs, *kept), "ours": median(mine, *kept, "load_s", "anonymous_mib", "work_cpu_s"),
             "ours, all positions": median(whole, *kept, "work_cpu_s")}
    return {"figures": agreement(mine[-1]["figures"], peer.figures(said), stored_as_the_tool_does(bundle, folder, first)),
            "times": times, "ratio": times["ours"]["seconds"] / times["tool"]["seconds"],
            "cpu_ratio": times["ours"]["work_cpu_s"] / times["tool"]["cpu_s"],
            "cpu_ratio_processes": times["ours"]["cpu_s"] / times["tool"]["cpu_s"],
            "cpu_ratio_all_positions": times["ours, all positions"]["work_cpu_s"] / times["tool"]["cpu_s"],
            "ratio_all_positions": times["ours, all positions"]["seconds"] / times["tool"]["seconds"]}


def agreement(mine: dict[str, float], theirs: dict[str, float], stored: dict[str, dict[str, float]]) -> dict[str, dict]:
    """Per figure: both sides, their difference, what 16-bit storage makes of ours, and whether the difference is within the
    bound of storage and printing.
    """
    mine = mine | {"reference_perplexity": mine["perplexity"] - mine["perplexity_delta"]}
    rows = {}
    for name, (_, unit, digit) in peer.LINES.items():
        bound = stored["bound"][name] + digit * unit / 2
        difference = mine[name] - theirs[name]
        rows[name] = {"ours": mine[name], "tool": theirs[name], "difference": difference, "bound": bound,
                      "within": abs(difference) <= bound, "ours_stored_in_16_bits": stored["figures"][name]}
        if f"{name}_se" in theirs and f"{name}_se" in mine:
            rows[name] |= {"ours_se": mine[f"{name}_se"], "tool_se": theirs[f"{name}_se"]}
    return rows


def disk(logits: Path, folder: Path, tokens: np.ndarray, first: int) -> dict[str, float]:
    """Bytes of both references, whole and per scored position: the tool stores and scores the second half of a chunk, we
    store all of it and score all that has a token after it.
    """
    hidden = (folder / "hidden.safetensors").stat().st_size
    count, length = tokens.shape
    per = {"tool": logits.stat().st_size / (count * (length - 1 - first)), "ours": hidden / (count * (length - 1))}
    return {"tool_bytes": logits.stat().st_size, "ours_bytes": hidden, "head_bytes": (folder / "head.safetensors").stat().st_size,
            "tool_per_scored": per["tool"], "ours_per_scored": per["ours"], "ratio_per_scored": per["ours"] / per["tool"],
            "ratio_of_files": hidden / logits.stat().st_size}


def bench(tool: Path, model: Path, variants: dict[str, str], chunks: int, asked: argparse.Namespace,
          keep: Callable[[dict], None]) -> None:
    """Everything of one model; `keep` gets what is found so far after each variant."""
    with tempfile.TemporaryDirectory() as work:
        project, logits, folder = Path(work) / "project", Path(work) / "logits", Path(work) / "reference"
        if asked.project:
            project = asked.project
        else:
            project.mkdir()
            make(project, model, variants, asked.threads)
        exports = project / "artifacts/exports"
        text = ROOT / "demo/data/evaluation.txt"
        _, took = peer.run(tool, exports / BASE / "model.gguf", logits, asked.length, asked.threads, asked.batch,
                           "--file", str(text), "--chunks", str(chunks))
        first, tokens = reference(project, logits, folder)
        found = {"tokens": int(tokens.size), "scored": tokens.shape[0] * (tokens.shape[1] - 1 - first),
                 "disk": disk(logits, folder, tokens, first), "tool_base_run": took, "variants": {}}
        for name in variants:
            found["variants"][name] = compared(tool, exports / name, logits, folder, first, asked)
            keep(found)


def calculated() -> list[dict[str, float]]:
    """Bytes per scored token by calculation: float32 hidden states against 16 bits for each token of the vocabulary."""
    return [{"vocabulary": vocabulary, "hidden": hidden, "tool": 2 * vocabulary + 8, "ours": 4 * hidden,
             "ratio": 4 * hidden / (2 * vocabulary + 8)}
            for vocabulary, hidden in ((1280, 256), (32000, 2048), (128256, 2048), (128256, 4096), (151936, 1024), (262144, 2560))]


def show(name: str, found: dict, console: Console) -> None:
    for variant, row in found["variants"].items():
        table = Table("figure", "ours", "±", "tool", "±", "difference", "bound", "within", box=None,
                      title=f"{name}, {variant}: {found['scored']} of {found['tokens']} tokens scored")
        for figure, one in row["figures"].items():
            errors = [f"{one[key]:.2g}" if key in one else "" for key in ("ours_se", "tool_se")]
            table.add_row(figure, f"{one['ours']:.7f}", errors[0], f"{one['tool']:.7f}", errors[1],
                          f"{one['difference']:+.1e}", f"{one['bound']:.1e}", "yes" if one["within"] else "NO")
        console.print(table)
        console.print(*(f"{who}: {one['seconds']:.2f} s, {one['cpu_s']:.2f} s of CPU, {one['peak_mib']:.0f} MiB;"
                        for who, one in row["times"].items()),
                      f"ratio {row['ratio']:.2f}, of CPU {row['cpu_ratio']:.2f}, of the processes' "
                      f"{row['cpu_ratio_processes']:.2f}; with all positions {row['ratio_all_positions']:.2f}")
    console.print(f"disk, {name}: {found['disk']}")


def main() -> None:
    if sys.argv[1:2] == ["--make"]:
        run_stages(sys.argv[2:])
        return
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), Path(sys.argv[3]), *map(int, sys.argv[4:6]))))
        return
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--source", type=Path, help="an unpacked source distribution of llama-cpp-python")
    parser.add_argument("--tool", type=Path, help="a llama-perplexity that is there already")
    parser.add_argument("--models", nargs="*", default=["demo", "131072", "262144"],
                        help="demo, or the vocabularies of random models")
    parser.add_argument("--project", type=Path, help="the project of an earlier run of one model, whose exports are used again")
    parser.add_argument("--length", type=int, default=256)
    parser.add_argument("--chunks", type=int, default=64)
    parser.add_argument("--batch", type=int, default=2048, help="tokens that the tool runs at once")
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    asked = parser.parse_args()
    console, tool, path = Console(width=120), asked.tool or peer.build(asked.source), HERE / "results/perplexity.json"
    results = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {"models": {}}
    results |= {"calculated": calculated()}
    for name in asked.models:
        about = {"threads": asked.threads, "batch": asked.batch, "tool": f"llama-cpp-python {peer.VERSION}",
                 "repetitions": asked.repetitions}

        def keep(found: dict, name: str = name, about: dict = about) -> None:
            results["models"][name] = about | found
            write_json(path, results)

        with tempfile.TemporaryDirectory() as work:
            if name == "demo":
                bench(tool, ROOT / "demo/model", VARIANTS, asked.chunks, asked, keep)
            else:
                bench(tool, random_model(Path(work) / "model", int(name)), {"gguf-q8_0": "q8_0"}, RANDOM_CHUNKS, asked, keep)
        show(name, results["models"][name], console)


if __name__ == "__main__":
    main()
