"""Measure one bundle from its files on disk, in a fresh process, in the runtime that will serve it.

    python -m stages.evaluate gguf-q4_k_m     # → metrics/gguf-q4_k_m.json, metrics/gguf-q4_k_m.speed.json

The measuring process imports neither torch nor transformers unless the runtime needs them; if native code brings it
down, or it goes over evaluation.limits, that is a named failure of this variant.
"""

import json
import sys
import time
from pathlib import Path

from quantline.config.compose import load_params
from quantline.config.params import Speed, Variant
from quantline.formats.container import ABOUT
from quantline.errors import Failure, Reason, StageError
from quantline.files import describe_files, sha256_file, write_json
from quantline.run.stage import StageRun, stage_run
from quantline.tracking.mlflow_runs import figures, of_variant
from quantline.run.child_process import answer, ask
from quantline.paths import EXPORTS, METRICS, REFERENCE



def check_bundle(folder: Path) -> dict:
    """The manifest of a bundle, which bears the variant's name and whose files are what it says, to the byte.

    Raises StageError: missing_file (reason export_artifact_missing), artifact_changed.
    """
    path = folder / "manifest.json"
    if not path.is_file():
        raise StageError(Failure.MISSING_FILE, f"expected a bundle at {folder}, found no manifest.json; export it first",
                         Reason.EXPORT_ARTIFACT_MISSING)
    manifest = json.loads(path.read_text(encoding="utf-8"))
    if manifest["variant"] != folder.name:
        raise StageError(Failure.ARTIFACT_CHANGED, f"expected the bundle of {folder.name} at {folder}, found that of "
                                                   f"{manifest['variant']}; export the variant again")
    names = [str(one.relative_to(folder)) for one in folder.rglob("*") if one.is_file() and one.name not in ABOUT]
    there, said = describe_files(folder, names), manifest["files"]
    changed = sorted(name for name in {*there, *said} if there.get(name) != said.get(name))
    if changed:
        name = changed[0]
        expected, found = (f"{about['bytes']} bytes with sha256 {about['sha256'][:12]}…" if about else "no such file"
                           for about in (said.get(name), there.get(name)))
        raise StageError(Failure.ARTIFACT_CHANGED, f"{folder / name} is not what its manifest says: expected {expected}, "
                                                   f"found {found}; export the variant again")
    return manifest


def measure(name: str, variant: Variant, settings: Speed) -> dict:
    """In the measuring process: load, measure speed, then quality. Returns {quality, items, speed, runtime_version}.

    Speed comes first, so that the peak of the memory is that of serving, and not of what the figures need.
    """
    from quantline.metrics import quality, speed
    from quantline.runtimes.runtime import engine

    module = engine(variant.runtime)
    started = time.perf_counter()
    runtime = module(EXPORTS / name, settings.threads)
    found = speed.measure(runtime, settings, load_s=time.perf_counter() - started)
    metrics, items = quality.measure(runtime, REFERENCE)
    return {"quality": metrics, "items": items, "runtime_version": runtime.version, "speed": found}


def evaluate(run: StageRun) -> None:
    name, variant = run.instance, run.params.variants[run.instance]
    manifest = check_bundle(EXPORTS / name)
    asked = run.params.evaluation
    found = ask("stages.evaluate", name, limits=asked.limits, what=f"the measuring process of {name}",
                python=asked.pythons.get(variant.runtime))
    write_json(METRICS / "items" / f"{name}.json", found["items"])
    whose = {"artifact_sha256": manifest["artifact_sha256"], "runtime": variant.runtime, "runtime_version": found["runtime_version"]}
    quality = found["quality"] | whose | {"size_bytes": manifest["size_bytes"], "bits_per_weight": manifest["bits_per_weight"],
                                          "items_sha256": sha256_file(METRICS / "items" / f"{name}.json")}
    speed = found["speed"] | whose
    write_json(METRICS / f"{name}.speed.json", speed)
    write_json(METRICS / f"{name}.json", quality)
    run.track(**of_variant(manifest), metrics=figures(quality) | {"speed": speed},
              files=[METRICS / "items" / f"{name}.json"])
    gold = f", gold {quality['gold_accuracy']:.3f}" if "gold_accuracy" in quality else ""
    run.finish(f"KL divergence {quality['mean_kld']:.5f}, perplexity {quality['perplexity']:.3f}{gold}, "
               f"{speed['decode_tok_s']:.0f} tokens/s")


if __name__ == "__main__":
    if "--into" in sys.argv:
        asked = load_params()
        answer(Path(sys.argv[3]), lambda: measure(sys.argv[1], asked.variants[sys.argv[1]], asked.evaluation.speed))
    else:
        with stage_run("evaluate", sys.argv[1]) as this:
            evaluate(this)
