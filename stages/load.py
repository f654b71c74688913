"""Bring the trained model in: fetch or link it, check it, pin it, merge its adapter.

python -m stages.load          # model section of params.yaml → artifacts/model/
"""

from quantline.files import MIB, folder_bytes, sha256_json
from quantline.ingest.load import load as load_model
from quantline.paths import MODEL
from quantline.run.stage import StageRun, stage_run


def load(run: StageRun) -> None:
    """Run the stage."""
    model = run.params.model
    with run.output(MODEL) as folder:
        loaded = load_model(model, folder)
        run.inputs.record(folder, loaded.files_read)
    manifest, linked_by, notes = loaded
    for note in notes:
        run.event("warning", note)
    size = folder_bytes(MODEL, "*.safetensors")
    run.track(
        key=f"model:{sha256_json(manifest['files'])}",
        name="model",
        params={
            "architecture": manifest["architecture"],
            "dtype": manifest["dtype"],
            **manifest["source"],
        },
        metrics={"parameters": manifest["parameters"], "bytes": size},
        tags={"linked_by": linked_by},
        files=[MODEL / "manifest.json"],
    )
    merged = f" with {model.adapter} merged in" if model.adapter else ""
    run.set_summary(
        f"{manifest['architecture']}{merged}, {manifest['parameters'] / 1e6:.1f} M parameters in "
        f"{manifest['dtype']}, {size / MIB:.1f} MiB by {linked_by}"
    )


if __name__ == "__main__":
    with stage_run("load") as run:
        load(run)
