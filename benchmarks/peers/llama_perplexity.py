"""llama.cpp's own `llama-perplexity`, built from the source distribution of llama-cpp-python, and what it prints.

The tool is linked to the libraries that llama-cpp-python, our runtime, computes with: both sides run the same kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np

VERSION = "0.3.36"  # of llama-cpp-python
HOME = Path.home() / ".cache/quantline-peers/llama.cpp"
OPTIONS = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF")
TRIES = 5  # the tool logs in a thread of its own, and on a busy machine now and then ends without its last lines
NUMBER = r"(-?[\d.]+)"
# Our name of a figure → (its line in the tool's output, the unit of that line, the last digit that is printed).
LINES = {
    "perplexity": (rf"Mean PPL\(Q\) +: +{NUMBER} ± +{NUMBER}", 1, 1e-6),
    "reference_perplexity": (rf"Mean PPL\(base\) +: +{NUMBER} ± +{NUMBER}", 1, 1e-6),
    "mean_kld": (rf"Mean +KLD: +{NUMBER} ± +{NUMBER}", 1, 1e-6),
    "p999_kld": (rf"99\.9% +KLD: +{NUMBER}", 1, 1e-6),
    "p99_kld": (rf"99\.0% +KLD: +{NUMBER}", 1, 1e-6),
    "median_kld": (rf"Median +KLD: +{NUMBER}", 1, 1e-6),
    "max_kld": (rf"Maximum KLD: +{NUMBER}", 1, 1e-6),
    "rms_delta_p": (rf"RMS Δp +: +{NUMBER} ± +{NUMBER} %", 0.01, 1e-3),
    "mean_delta_p": (rf"Mean +Δp: +{NUMBER} ± +{NUMBER} %", 0.01, 1e-3),
    "same_top_p": (rf"Same top p: +{NUMBER} ± +{NUMBER} %", 0.01, 1e-3),
}


def source() -> Path:
    """llama.cpp's source, fetched with pip on first use."""
    folder = HOME / f"llama_cpp_python-{VERSION}"
    if not (folder / "complete").is_file():
        HOME.mkdir(parents=True, exist_ok=True)
        subprocess.run([sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:",
                        "--dest", str(HOME), f"llama-cpp-python=={VERSION}"], check=True)
        with tarfile.open(HOME / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
            archive.extractall(HOME, filter="data")
        (folder / "complete").touch()
    return folder


def build(given: Path | None) -> Path:
    """The tool, made on first use from `given`, an unpacked source distribution, or from the package index's."""
    made = HOME / "build/perplexity/llama-perplexity"
    if not made.is_file():
        import llama_cpp

        (HOME / "project").mkdir(parents=True, exist_ok=True)
        shutil.copy(Path(__file__).with_suffix(".cmake"), HOME / "project/CMakeLists.txt")
        places = {"SOURCE": (given or source()).resolve() / "vendor/llama.cpp", "RUNTIME": Path(llama_cpp.__file__).parent / "lib"}
        subprocess.run(["cmake", "-S", str(HOME / "project"), "-B", str(HOME / "build"), "-G", "Ninja",
                        *(f"-D{option}" for option in (*OPTIONS, *(f"{name}={path}" for name, path in places.items())))],
                       check=True)
        subprocess.run(["cmake", "--build", str(HOME / "build"), "--target", "llama-perplexity", "--parallel",
                        str(os.cpu_count())], check=True)
    return made


def run(tool: Path, model: Path, logits: Path, length: int, threads: int, batch: int, *more: str) -> tuple[str, dict]:
    """(what the tool printed, {seconds, wall_s, cpu_s, peak_mib}).

    `seconds` is the tool's own "total time": from the end of its warm-up to its end, without loading. The cache of keys
    and values is float32 and flash attention off, as where we measure. Raises SystemExit if the tool fails.
    """
    command = [str(tool), "--model", str(model), "--kl-divergence-base", str(logits), "--ctx-size", str(length),
               "--threads", str(threads), "--threads-batch", str(threads), "--batch-size", str(batch),
               "--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off", "--perf", "--log-verbosity", "4", *more]
    for _ in range(TRIES):
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
        with process.stdout as said:
            text = said.read()
        _, status, used = os.wait4(process.pid, 0)
        wall, process.returncode = time.perf_counter() - started, os.waitstatus_to_exitcode(status)
        total = re.search(rf"total time = +{NUMBER} ms", text)
        if process.returncode or total:
            break
    if process.returncode or total is None:
        raise SystemExit(f"{' '.join(command)}\nended with {process.returncode}:\n{text[-2000:]}")
    return text, {"seconds": float(total[1]) / 1000, "wall_s": wall, "cpu_s": used.ru_utime + used.ru_stime,
                  "peak_mib": used.ru_maxrss / 1024}


def figures(text: str) -> dict[str, float]:
    """The figures of a --kl-divergence run under our names, with `_se` where the tool prints an uncertainty."""
    found = {}
    for name, (pattern, unit, _) in LINES.items():
        line = re.search(pattern, text)
        if line is None:
            raise SystemExit(f"expected a line like {pattern!r} from llama-perplexity, found:\n{text[-3000:]}")
        found[name] = float(line[1]) * unit
        if line.re.groups == 2:
            found[f"{name}_se"] = float(line[2]) * unit
    return found


def tokens_of(logits: Path, begin: int | None) -> tuple[np.ndarray, int]:
    """(int32 [chunks, length], vocabulary) of a file of logits: the tokens as the tool feeds them.

    The file holds "_logits_", the chunks' length, the vocabulary and the number of chunks, then the text's tokens, then
    per scored position two floats and a 16-bit integer for each token of the vocabulary. `begin` is the token that the
    tool puts in the place of each chunk's first, where the model's vocabulary asks for one.
    """
    with logits.open("rb") as file:
        if file.read(8) != b"_logits_":
            raise SystemExit(f"expected a file of llama-perplexity's logits at {logits}")
        length, vocabulary, chunks = np.fromfile(file, np.int32, 3)
        tokens = np.fromfile(file, np.int32, length * chunks).reshape(chunks, length)
    if begin is not None:
        tokens[:, 0] = begin
    return tokens, int(vocabulary)
