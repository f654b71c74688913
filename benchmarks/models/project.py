"""The project in which a tiny model goes through the stages: the demo's texts, and few of them."""

import shutil
from pathlib import Path

from benchmarks.paths import ROOT

CHECKPOINT = "checkpoint"  # where a project has its model
DATABASE = "mlflow.db"
# Variant → its recipe. The groups of 32 divide the width of every linear layer of these models.
VARIANTS = {
    "bf16": "none",
    "gptq-w4g32": "gptq-w4g32",
    "awq-w4g32": "awq-w4g32",
    "onnx-fp32": "none",
    "gguf-f32": "none",
    "gguf-q8_0": "q8_0",
    "gguf-q4_k_m": "q4_k_m",
}
RECIPES = tuple(dict.fromkeys(VARIANTS.values()))
OVERRIDES = (
    "suite=quick",
    f"recipe=[{','.join(RECIPES)}]",
    f"variant=[{','.join(VARIANTS)}]",
    # transformers and vLLM take no zero points in the experts of a mixture.
    "recipes.gptq-w4g32.symmetric=true",
    "recipes.awq-w4g32.symmetric=true",
    # Compared with transformers to the bit, in whatever float type a tiny model has.
    "variants.bf16.dtype=null",
    "target=any",
    "model=local",
    f"model.path={CHECKPOINT}",
    "calibration=file",
    f"calibration.path={ROOT / 'demo/data/calibration.txt'}",
    "calibration.part=[0.0,1.0]",
    "calibration.sequences=8",
    "calibration.length=64",
    "calibration.curvature=false",
    "evaluation=file",
    f"evaluation.path={ROOT / 'demo/data/evaluation.txt'}",
    "evaluation.part=[0.0,1.0]",
    "evaluation.sequences=4",
    "evaluation.length=64",
    "evaluation.gold=null",
    "evaluation.smoke_prompts=['One day Ada and Hugo met at the']",
    "evaluation.smoke_tokens=4",
    "evaluation.speed.prompt_tokens=8",
    "evaluation.speed.new_tokens=4",
    "evaluation.speed.repetitions=1",
    "evaluation.speed.threads=1",
)


def begin_template(folder: Path, *overrides: str) -> Path:
    """Make a project without a model, to be copied for each; return its folder.

    Args:
        folder: To be made.
        *overrides: Of its parameters, besides those of all.
    """
    from mlflow.tracking import MlflowClient

    from quantline.config.compose import as_yaml, compose

    shutil.copytree(ROOT / "conf", folder / "conf")
    shutil.copy(ROOT / "dvc.yaml", folder)
    (folder / "params.yaml").write_text(as_yaml(compose((*OVERRIDES, *overrides), root=folder)))
    # Making the tables takes seconds, copying them none.
    MlflowClient(tracking_uri=f"sqlite:///{folder / DATABASE}").search_experiments()
    return folder
