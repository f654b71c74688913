"""Measure one bundle from its files on disk, in a fresh process, in the runtime that will serve it.

    python -m stages.evaluate gguf-q4_k_m     # → metrics/gguf-q4_k_m.json, metrics/gguf-q4_k_m.speed.json

The measuring process imports neither torch nor transformers unless the runtime is transformers; if native code brings
it down, that is a named failure of this variant.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from stages.config import Variant, load_params
from stages.formats import ABOUT
from stages.tracking import Failure, Reason, StageError, StageRun, describe_files, stage_run, write_json
from stages.tracking.experiments import of_variant

EXPORTS, REFERENCE, METRICS = Path("artifacts/exports"), Path("artifacts/reference"), Path("metrics")
OUT_OF_MEMORY_SIGNAL = -9


def check_bundle(folder: Path) -> dict:
    """The manifest of a bundle whose files are what it says, to the byte.

    Raises StageError: missing_file (reason export_artifact_missing), artifact_changed.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise StageError(Failure.MISSING_FILE, f"expected a bundle at {folder}, found no manifest.json; export it first",
                         Reason.EXPORT_ARTIFACT_MISSING)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    names = [str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file() and one.name not in ABOUT]
    there, said = describe_files(folder, names), manifest["files"]
    changed = sorted(name for name in {*there, *said} if there.get(name) != said.get(name))
    if changed:
        raise StageError(Failure.ARTIFACT_CHANGED, f"{folder / changed[0]} is not what its manifest says (sha256 or "
                                                   "presence); export the variant again")
    return manifest


def measure(name: str, variant: Variant, target: Path) -> None:
    """The measuring process: load, measure quality, then speed; write {quality, items, speed} or {failure, message}."""
    from stages.metrics import quality, speed
    from stages.runtimes import open_runtime

    settings = load_params().evaluation.speed
    try:
        started = time.perf_counter()
        runtime = open_runtime(variant.runtime, EXPORTS / name, settings.threads)
        load_s = time.perf_counter() - started
        metrics, items = quality.measure(runtime, REFERENCE)
        found = {"quality": metrics, "items": items, "runtime_version": runtime.version,
                 "speed": speed.measure(runtime, settings, load_s) | {"device": runtime.device}}
    except StageError as error:
        found = {"failure": error.failure, "message": str(error)}
    except MemoryError:
        found = {"failure": Failure.OUT_OF_MEMORY, "message": "not enough memory to measure this variant"}
    write_json(target, found)


def in_fresh_process(name: str) -> dict:
    """What `measure` found. Raises StageError: its own failures, runtime_crashed, out_of_memory."""
    with tempfile.TemporaryDirectory() as work:
        target = Path(work) / "measured.json"
        done = subprocess.run([sys.executable, "-m", "stages.evaluate", name, "--into", str(target)],
                              capture_output=True, text=True, check=False)
        if done.returncode or not target.is_file():
            tail = " ".join(done.stderr.strip().splitlines()[-2:])
            if done.returncode == OUT_OF_MEMORY_SIGNAL:
                raise StageError(Failure.OUT_OF_MEMORY, f"the system killed the measuring process of {name}")
            how = f"signal {-done.returncode}" if done.returncode < 0 else f"exit code {done.returncode}"
            raise StageError(Failure.RUNTIME_CRASHED, f"the measuring process of {name} ended with {how}: {tail}")
        found = json.loads(target.read_text(encoding="utf-8"))
    if "failure" in found:
        raise StageError(Failure(found["failure"]), found["message"])
    return found


def evaluate(run: StageRun) -> None:
    name, variant = run.instance, run.params.variants[run.instance]
    manifest = check_bundle(EXPORTS / name)
    found = in_fresh_process(name)
    threads = run.params.evaluation.speed.threads or os.cpu_count()
    quality = found["quality"] | {key: manifest[key] for key in ("size_bytes", "bits_per_weight", "artifact_sha256")} \
        | {"runtime": variant.runtime, "runtime_version": found["runtime_version"]}
    speed = found["speed"] | {"threads": threads, "machine": platform.processor() or platform.machine()}
    write_json(METRICS / "items" / f"{name}.json", found["items"])
    write_json(METRICS / f"{name}.speed.json", speed)
    write_json(METRICS / f"{name}.json", quality)
    run.track(**of_variant(manifest), metrics=quality | {"speed": speed}, files=[METRICS / "items" / f"{name}.json"])
    gold = f", gold {quality['gold_accuracy']:.3f}" if "gold_accuracy" in quality else ""
    run.finish(f"KL divergence {quality['mean_kld']:.5f}, perplexity {quality['perplexity']:.3f}{gold}, "
               f"{speed['decode_tok_s']:.0f} tokens/s")


if __name__ == "__main__":
    if "--into" in sys.argv:
        measure(sys.argv[1], load_params().variants[sys.argv[1]], Path(sys.argv[3]))
    else:
        with stage_run("evaluate", sys.argv[1]) as this:
            evaluate(this)
