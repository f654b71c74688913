"""Write one deliverable bundle, read it back, and try it in the runtime that will serve it.

    python -m stages.export gguf-q4_k_m     # → artifacts/exports/gguf-q4_k_m/
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

from quantline.model.architecture import architecture
from quantline.quantized.store import REPORT, Quantized
from quantline.model.gguf_checkpoint import Converted, in_gguf
from quantline.model.checkpoint import Checkpoint, read_json
from quantline.config.params import Params, Variant
from quantline.formats.container import StoredTensor, load_format
from quantline.formats.bundle_readme import readme
from quantline.errors import Failure, Reason, StageError
from quantline.files import describe_files, sha256_json, versions, write_json, write_text
from quantline.run.stage import StageRun, stage_run
from quantline.tracking.mlflow_runs import of_variant
from quantline.run.child_process import ask
from quantline.paths import EXPORTS, MODEL, QUANTIZED

PACKAGES = ("compressed-tensors", "gguf", "llama-cpp-python", "onnx", "onnxruntime", "optimum", "safetensors",
            "tokenizers", "torch", "transformers")


def inputs(name: str, params: Params) -> tuple[Variant, Checkpoint | Converted, Quantized, dict]:
    """The variant, the model, its quantized weights and the model's manifest.

    Raises StageError: missing_file, artifact_changed if the weights are of another recipe than asked.
    """
    variant = params.variants[name]
    for path, stage in ((MODEL / "manifest.json", "load"), (QUANTIZED / variant.recipe / REPORT, f"quantize@{variant.recipe}")):
        if not path.is_file():
            raise StageError(Failure.MISSING_FILE, f"expected {path}, found nothing; run `dvc repro {stage}`",
                             Reason.EXPORT_ARTIFACT_MISSING)
    quantized = Quantized(QUANTIZED / variant.recipe)
    asked = {"name": variant.recipe, **params.recipes[variant.recipe].model_dump(mode="json")}
    if quantized.report["recipe"] != asked:
        raise StageError(Failure.ARTIFACT_CHANGED, f"expected weights of {asked}, found those of "
                         f"{quantized.report['recipe']}; run `dvc repro quantize@{variant.recipe}`")
    model = in_gguf(MODEL) if variant.format == "gguf" else Checkpoint(MODEL)
    return variant, model, quantized, read_json(MODEL / "manifest.json")


def check_container(module, folder: Path, model: Checkpoint | Converted, quantized: Quantized, requested: dict[str, str],
                    fail_on_substitution: bool) -> dict[str, dict]:
    """Read every tensor back: type asked and got, and the exact values. Returns the manifest's `tensors`.

    Raises StageError: readback_mismatch, type_substituted.
    """
    held: dict[str, StoredTensor] = module.read_back(folder, model)
    tensors = {}
    for name in model.names:
        if name not in requested or name not in held:
            raise StageError(Failure.READBACK_MISMATCH, f"expected {name} in the container, found no such tensor")
        got = held[name]
        if got.shape != model.shape(name):
            raise StageError(Failure.READBACK_MISMATCH, f"expected {name} to be {model.shape(name)}, found {got.shape}")
        # array_equal is false for NaN, which no tensor may hold.
        if not np.array_equal(got.dequantize(), module.expected(model, quantized, name, got.type)):
            raise StageError(Failure.READBACK_MISMATCH, f"{name} reads back with other values than were written; the "
                             f"{got.type} in the container does not hold them")
        tensors[name] = {"requested": requested[name], "actual": got.type, "bits_per_weight": round(got.bits, 4),
                         "bytes": got.bytes, "weights": int(np.prod(got.shape))}
    substituted = [name for name, about in tensors.items() if about["requested"] != about["actual"]]
    if substituted and fail_on_substitution:
        first = tensors[substituted[0]]
        raise StageError(Failure.TYPE_SUBSTITUTED, f"expected {first['requested']} for {substituted[0]} and "
                         f"{len(substituted) - 1} more, found {first['actual']}: the container has no "
                         f"{first['requested']} for rows of {model.shape(substituted[0])[-1]} weights; choose another "
                         "type, or substitution: report")
    return tensors


def substitutions(tensors: dict[str, dict], weights: int) -> list[dict[str, Any]]:
    """Per pair of types asked and got: the share of the model's weights, and the tensors."""
    pairs: dict[tuple[str, str], list[str]] = {}
    for name, about in tensors.items():
        if about["requested"] != about["actual"]:
            pairs.setdefault((about["requested"], about["actual"]), []).append(name)
    return [{"requested": requested, "actual": actual, "tensors": names,
             "share": sum(tensors[name]["weights"] for name in names) / weights}
            for (requested, actual), names in sorted(pairs.items())]


def export(run: StageRun) -> None:
    name = run.instance
    variant, model, quantized, loaded = inputs(name, run.params)
    module, recipe = load_format(variant.format), quantized.report["recipe"]
    with run.output(EXPORTS / name) as folder:
        requested = module.write(model, quantized, folder, variant)
        tensors = check_container(module, folder, model, quantized, requested, recipe["substitution"] == "fail")
        files = describe_files(folder, [path.relative_to(folder).as_posix() for path in folder.rglob("*")
                                        if path.is_file()])
        rows = model.shape(architecture(model).embedding)[0]
        trace = ask("stages.smoke", name, str(folder), str(rows), limits=run.params.evaluation.limits,
                    what=f"the smoke test of {name}", python=run.params.evaluation.pythons.get(variant.runtime))
        weights = sum(about["weights"] for about in tensors.values())
        replaced = substitutions(tensors, weights)
        manifest = {
            "variant": name, "recipe": recipe, "format": variant.format, "runtime": variant.runtime,
            "source": loaded["source"] | {"files": loaded["files"]},
            "transforms": [*loaded["transforms"], *([loaded["converted"]] if isinstance(model, Converted) else []),
                           *quantized.report["transforms"],
                           {"step": "export", **variant.model_dump(mode="json")},
                           *({"step": "substitute", **one} for one in replaced)],
            "tensors": tensors, "layers": quantized.report.get("layers", quantized.report.get("tensors", {})), "substituted_share": sum(one["share"] for one in replaced),
            "bits_per_weight": 8 * sum(about["bytes"] for about in tensors.values()) / weights,
            "size_bytes": sum(about["bytes"] for about in files.values()), "files": files,
            "artifact_sha256": sha256_json({path: about["sha256"] for path, about in files.items()}),
            "versions": versions(*PACKAGES), "calibration": quantized.report["calibration"], "created_by": run.run_id,
        }
        write_json(folder / "manifest.json", manifest)
        write_json(folder / "smoke.json", trace)
        write_text(folder / "README.md", readme(manifest))
    run.track(**of_variant(manifest), files=[EXPORTS / name / "manifest.json", EXPORTS / name / "smoke.json"],
              metrics={key: manifest[key] for key in ("size_bytes", "bits_per_weight", "substituted_share")})
    told = "".join(f", {one['share']:.0%} of the weights in {one['actual']} instead of {one['requested']}"
                   for one in replaced)
    run.finish(f"{manifest['size_bytes'] / 2**20:.1f} MiB, {manifest['bits_per_weight']:.2f} bits per weight{told}")


if __name__ == "__main__":
    with stage_run("export", sys.argv[1]) as this:
        export(this)
