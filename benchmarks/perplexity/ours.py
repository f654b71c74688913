"""Our figures of a bundle on the tool's tokens, and what measuring them takes.

python -m benchmarks.perplexity.ours <bundle> <reference> <first position> <threads>

measures in a process of its own and prints JSON.
"""

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from benchmarks.paths import ROOT
from benchmarks.perplexity.environment import process_environment


def measure(bundle: Path, reference: Path, first: int, threads: int) -> dict[str, Any]:
    """Measure a bundle in this process.

    Args:
        bundle: With a GGUF file.
        reference: The folder that `store_reference` wrote.
        first: Position in each sequence after which tokens count.
        threads: Of the runtime.

    Returns:
        {figures, seconds and work_cpu_s: from the loaded model to the figures, load_s, cpu_s: of
        the whole process, peak_mib and anonymous_mib: its memory}.
    """
    from quantline.metrics.quality import measure_divergence
    from quantline.runtimes.runtime import open_runtime

    started = time.perf_counter()
    runtime = open_runtime("llama.cpp", bundle, threads)
    loaded = time.perf_counter()
    cpu_before = time.process_time()
    figures = measure_divergence(runtime, reference, first).summary()
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    fields = dict(line.split(":", 1) for line in status.splitlines())
    cpu_seconds = time.process_time()
    return {
        "figures": figures,
        "seconds": time.perf_counter() - loaded,
        "load_s": loaded - started,
        "cpu_s": cpu_seconds,
        "work_cpu_s": cpu_seconds - cpu_before,
        "peak_mib": int(fields["VmHWM"].split()[0]) / 1024,
        "anonymous_mib": int(fields["RssAnon"].split()[0]) / 1024,
    }


def measure_in_process(bundle: Path, reference: Path, first: int, threads: int) -> dict[str, Any]:
    """Call `measure` in a fresh process.

    Returns:
        The same, and wall_s, which includes its start and its imports.

    Raises:
        SystemExit: If it fails.
    """
    arguments = [str(bundle), str(reference), str(first), str(threads)]
    started = time.perf_counter()
    process = subprocess.run(
        [sys.executable, "-m", "benchmarks.perplexity.ours", *arguments],
        capture_output=True,
        text=True,
        check=False,
        cwd=ROOT,
        env=process_environment(threads),
    )
    if process.returncode:
        raise SystemExit(f"measuring {bundle} failed: {process.stderr[-2000:]}")
    return json.loads(process.stdout) | {"wall_s": time.perf_counter() - started}


def main() -> None:
    """Measure what the command line names."""
    bundle, reference, first, threads = sys.argv[1:]
    print(json.dumps(measure(Path(bundle), Path(reference), int(first), int(threads))))


if __name__ == "__main__":
    main()
