"""llama.cpp's own `llama-perplexity`: building it, running it, and reading what it prints.

It is built from the source distribution of llama-cpp-python and linked to the libraries that
llama-cpp-python, our runtime, computes with: both sides run the same kernels.
"""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

VERSION = "0.3.36"  # of llama-cpp-python
HOME = Path.home() / ".cache/quantline-peers/llama.cpp"
CMAKE_OPTIONS = ("CMAKE_BUILD_TYPE=Release", "BUILD_SHARED_LIBS=OFF", "LLAMA_OPENSSL=OFF")
# The tool logs in a thread of its own, and on a busy machine it may end without its last lines.
TRIES = 5
NUMBER = r"(-?[\d.]+)"
MAGIC = b"_logits_"


class Line(NamedTuple):
    """A line of the tool's output.

    Attributes:
        pattern: Regular expression, with the figure and its uncertainty as groups.
        unit: What one of the printed unit is, such as 0.01 for percent.
        last_digit: The smallest step that is printed, in the printed unit.
    """

    pattern: str
    unit: float
    last_digit: float


# Our name of a figure → the line that has it.
LINES = {
    "perplexity": Line(rf"Mean PPL\(Q\) +: +{NUMBER} ± +{NUMBER}", 1, 1e-6),
    "reference_perplexity": Line(rf"Mean PPL\(base\) +: +{NUMBER} ± +{NUMBER}", 1, 1e-6),
    "mean_kld": Line(rf"Mean +KLD: +{NUMBER} ± +{NUMBER}", 1, 1e-6),
    "p999_kld": Line(rf"99\.9% +KLD: +{NUMBER}", 1, 1e-6),
    "p99_kld": Line(rf"99\.0% +KLD: +{NUMBER}", 1, 1e-6),
    "median_kld": Line(rf"Median +KLD: +{NUMBER}", 1, 1e-6),
    "max_kld": Line(rf"Maximum KLD: +{NUMBER}", 1, 1e-6),
    "rms_delta_p": Line(rf"RMS Δp +: +{NUMBER} ± +{NUMBER} %", 0.01, 1e-3),
    "mean_delta_p": Line(rf"Mean +Δp: +{NUMBER} ± +{NUMBER} %", 0.01, 1e-3),
    "same_top_p": Line(rf"Same top p: +{NUMBER} ± +{NUMBER} %", 0.01, 1e-3),
}


class ToolRun(NamedTuple):
    """What a run of the tool printed, and what it took.

    Attributes:
        text: Its output.
        costs: {seconds: the tool's own "total time", from the end of its warm-up to its end and
            without loading; wall_s, cpu_s and peak_mib of its whole process}.
    """

    text: str
    costs: dict[str, float]


@dataclass(frozen=True)
class LlamaPerplexity:
    """The tool with its settings.

    The cache of keys and values is float32 and flash attention off, as where we measure.

    Attributes:
        path: Of the program.
        length: Tokens of a chunk.
        threads: To compute in.
        batch: Tokens that it runs at once.
    """

    path: Path
    length: int
    threads: int
    batch: int

    def run(self, model: Path, logits: Path, *more: str) -> ToolRun:
        """Run the tool.

        Args:
            model: A GGUF file.
            logits: The file of the reference's logits, to write or to read.
            more: More of its arguments.

        Raises:
            SystemExit: If it fails.
        """
        command = [
            *(str(self.path), "--model", str(model)),
            *("--kl-divergence-base", str(logits)),
            *("--ctx-size", str(self.length), "--batch-size", str(self.batch)),
            *("--threads", str(self.threads), "--threads-batch", str(self.threads)),
            *("--cache-type-k", "f32", "--cache-type-v", "f32", "--flash-attn", "off"),
            *("--perf", "--log-verbosity", "4", *more),
        ]
        for _ in range(TRIES):
            text, code, costs = _run_once(command)
            total = re.search(rf"total time = +{NUMBER} ms", text)
            if code or total:
                break
        if code or total is None:
            raise SystemExit(f"{' '.join(command)}\nended with {code}:\n{text[-2000:]}")
        return ToolRun(text, {"seconds": float(total[1]) / 1000, **costs})


def _run_once(command: list[str]) -> tuple[str, int, dict[str, float]]:
    """Run a command; return its output, its exit code, and wall_s, cpu_s and peak_mib."""
    started = time.perf_counter()
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    )
    assert process.stdout is not None, "its output is a pipe"
    with process.stdout as output:
        text = output.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    costs = {
        "wall_s": time.perf_counter() - started,
        "cpu_s": usage.ru_utime + usage.ru_stime,
        "peak_mib": usage.ru_maxrss / 1024,
    }
    return text, process.returncode, costs


def build(given: Path | None) -> Path:
    """Build the tool on first use.

    Args:
        given: An unpacked source distribution of llama-cpp-python; None fetches it with pip.

    Returns:
        The program.
    """
    program = HOME / "build/perplexity/llama-perplexity"
    if program.is_file():
        return program
    import llama_cpp

    project = HOME / "project"
    project.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(__file__).with_suffix(".cmake"), project / "CMakeLists.txt")
    source = (given or fetch_source()).resolve() / "vendor/llama.cpp"
    runtime = Path(llama_cpp.__file__).parent / "lib"
    settings = [*CMAKE_OPTIONS, f"SOURCE={source}", f"RUNTIME={runtime}"]
    build_folder = str(HOME / "build")
    configure = ["cmake", "-S", str(project), "-B", build_folder, "-G", "Ninja"]
    subprocess.run([*configure, *(f"-D{setting}" for setting in settings)], check=True)
    compile_tool = ["cmake", "--build", build_folder, "--target", "llama-perplexity"]
    subprocess.run([*compile_tool, "--parallel", str(os.cpu_count())], check=True)
    return program


def fetch_source() -> Path:
    """Fetch the source distribution with pip on first use; return its unpacked folder."""
    folder = HOME / f"llama_cpp_python-{VERSION}"
    if (folder / "complete").is_file():
        return folder
    HOME.mkdir(parents=True, exist_ok=True)
    command = [
        *(sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"),
        *("--no-binary", ":all:", "--dest", str(HOME), f"llama-cpp-python=={VERSION}"),
    ]
    subprocess.run(command, check=True)
    with tarfile.open(HOME / f"llama_cpp_python-{VERSION}.tar.gz") as archive:
        archive.extractall(HOME, filter="data")
    (folder / "complete").touch()
    return folder


def parse_figures(text: str) -> dict[str, float]:
    """Return the figures of a run with --kl-divergence under our names.

    A figure that is printed with its uncertainty has that too, as <name>_se.

    Raises:
        SystemExit: If a line is not there.
    """
    figures = {}
    for name, line in LINES.items():
        match = re.search(line.pattern, text)
        if match is None:
            raise SystemExit(
                f"expected a line like {line.pattern!r} from llama-perplexity, found:\n"
                f"{text[-3000:]}"
            )
        figures[name] = float(match[1]) * line.unit
        if match.re.groups == 2:
            figures[f"{name}_se"] = float(match[2]) * line.unit
    return figures


def read_tokens(logits: Path, begin: int | None) -> tuple[np.ndarray, int]:
    """Read the tokens that the tool feeds to a model.

    The file holds "_logits_", the chunks' length, the vocabulary and the number of chunks, then the
    text's tokens, then per scored position two floats and a 16-bit integer for each token of the
    vocabulary.

    Args:
        logits: The tool's file.
        begin: The token that the tool puts in the place of each chunk's first, where the model's
            vocabulary asks for one.

    Returns:
        The tokens int32 [chunks, length], and the size of the vocabulary.

    Raises:
        SystemExit: If it is another file.
    """
    with logits.open("rb") as file:
        if file.read(len(MAGIC)) != MAGIC:
            raise SystemExit(f"expected a file of llama-perplexity's logits at {logits}")
        length, vocabulary, chunks = np.fromfile(file, np.int32, 3)
        tokens = np.fromfile(file, np.int32, length * chunks).reshape(chunks, length)
    if begin is not None:
        tokens[:, 0] = begin
    return tokens, int(vocabulary)
