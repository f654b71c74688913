"""Round the model's weights by one recipe, from the shared calibration.

    python -m stages.quantize gptq-w4g128     # → artifacts/quantized/gptq-w4g128/
"""

import sys
from pathlib import Path

import numpy as np
from tqdm import tqdm

from quantline.model.architecture import architecture
from quantline.quantized.store import QuantizedWriter
from quantline.model.gguf_checkpoint import Converted, in_gguf
from quantline.calibration.collect import Moments
from quantline.model.checkpoint import Checkpoint, stamp
from quantline.recipes.dispatch import MODULES, PLAIN, round_block
from quantline.recipes.budget.fit import fit
from quantline.recipes.context import Work
from quantline.files import sha256_file, sha256_json, versions
from quantline.run.stage import StageRun, stage_run
from quantline.paths import CALIBRATION, MODEL, QUANTIZED



def inputs_key(recipe: dict, moments: Moments, checkpoint: Checkpoint | Converted) -> dict:
    """What the result of a recipe depends on; a killed run goes on only if all of it is the same.

    Hashing the moments would take longer than most recipes, so they are told by size and time of change.
    """
    home = Path(__file__).parents[1] / "quantline"
    code = [path for room in ("recipes", "methods", "model", "calibration", "quantized", "formats") for path in (home / room).rglob("*.py")]
    given = [path for path in (Path(recipe.get("importance_file") or "none"),) if path.is_file()]
    return {"recipe": recipe, "calibration": sha256_json(moments.info),
            "moments": stamp(moments.folder.glob("*.safetensors")), "model": checkpoint.stamp(), "importance": stamp(given),
            "versions": versions("torch", "numpy", "numba", "gguf", "llama-cpp-python"),
            "code": sha256_json({str(path.relative_to(home)): sha256_file(path) for path in code})}


def quantize(run: StageRun) -> None:
    name, recipe = run.instance, run.params.recipes[run.instance]
    in_ggml, moments = MODULES.get(recipe.method) == "ggml", Moments(CALIBRATION)
    checkpoint = in_gguf(MODEL) if in_ggml else Checkpoint(MODEL)
    facts, asked = architecture(checkpoint), {"name": name, **recipe.model_dump(mode="json")}
    parts = {f"block-{layer:03d}": layer for layer in range(facts.layers)} | ({"rest": None} if in_ggml else {})
    with run.resumable_output(QUANTIZED / name, inputs_key(asked, moments, checkpoint)) as folder:
        work, transforms = fit(Work(recipe, checkpoint, facts, moments, QuantizedWriter(folder)), asked, folder)
        layers = {}
        for part, layer in tqdm(parts.items() if recipe.method != "none" else (), desc=name, unit="block", disable=None):
            done = work.writer.report_of(part)
            if done is None:
                done = round_block(work, layer)
                work.writer.close_part(part, done)
            layers |= done["layers"]
            transforms += done["transforms"]
        if recipe.method != "none":
            transforms.append({"step": "quantize", **recipe.model_dump(mode="json")})
        activations = {"activations": "dynamic"} if recipe.method in ("smoothquant", "fp8") else {}
        report = {"recipe": asked, **activations, "transforms": transforms, "calibration": moments.provenance(),
                  "versions": versions("torch", "gguf", "llama-cpp-python"),
                  "tensors" if in_ggml else "layers": layers}
        if in_ggml:
            report["importance"] = work.mixture.write_importance(folder)
        work.writer.close(report)
    what, plain = ("divergence", "ggml") if in_ggml else ("error", "rtn")
    errors = [(one[what], one[f"{plain}_{what}"]) for one in layers.values() if "error" in one]
    gain = float(np.mean([ours / naive if naive > 0 else 1.0 for ours, naive in errors])) if errors else None
    run.track(key=f"recipe:{name}:{sha256_json(report)}", name=f"quantize {name}", params=asked,
              metrics={"layers": len(layers)} | ({f"{what}_over_{plain}": gain, "fell_back": 0} if errors else {}),
              files=[QUANTIZED / name / "quantized.json"])
    told = f", {'output error' if what == 'error' else what} {gain:.2f} of {PLAIN[plain][0]}" if errors else ""
    run.finish(f"{len(layers)} {'tensors' if in_ggml else 'layers'} rounded{told}")


if __name__ == "__main__":
    with stage_run("quantize", sys.argv[1]) as this:
        quantize(this)
