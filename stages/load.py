"""Bring the trained model in: fetch or link it, check it, pin it, merge its adapter.

    python -m stages.load          # model section of params.yaml → artifacts/model/
"""

from pathlib import Path

from quantline.ingest import fetch as source, llama_cpp_converter as converter, lora, verify
from quantline.model.families import FAMILIES
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import convert_slow
from quantline.files import describe_files, sha256_json, versions, write_json
from quantline.run.stage import StageRun, stage_run
from quantline.paths import MODEL



def load(run: StageRun) -> None:
    model = run.params.model
    origin, where = source.fetch(model)
    facts = verify.check_whole(origin)

    with run.output(MODEL) as folder:
        names, linked = source.bring(origin, folder)
        files = describe_files(origin, names)
        transforms = [step for step in [convert_slow(folder)] if step]
        verify.check_tokenizer(folder)
        if model.adapter:
            adapter = Path(model.adapter)
            transforms.append(lora.merge(Checkpoint(origin), adapter, folder))
            for name, about in describe_files(adapter, [lora.CONFIG, lora.WEIGHTS]).items():
                files[f"adapter/{name}"] = about
        if facts["model_type"] not in FAMILIES:
            verify.check_blocks(Checkpoint(folder))
        converted = converter.convert(model.converter, folder) if model.converter else None
        manifest = {"source": where | {"adapter": model.adapter}, "files": files, "transforms": transforms, **facts,
                    **({"converted": converted} if converted else {}),
                    "versions": versions("transformers", "optimum", "safetensors", "huggingface-hub")}
        write_json(folder / "manifest.json", manifest)

    size = sum(path.stat().st_size for path in MODEL.rglob("*.safetensors"))
    run.track(
        key=f"model:{sha256_json(files)}", name="model", metrics={"parameters": facts["parameters"], "bytes": size},
        params={"architecture": facts["architecture"], "dtype": facts["dtype"], **manifest["source"]},
        tags={"linked_by": linked}, files=[MODEL / "manifest.json"],
    )
    merged = f" with {model.adapter} merged in" if model.adapter else ""
    also = f", converted by {model.converter}" if converted else ""
    run.finish(f"{facts['architecture']}{merged}, {facts['parameters'] / 1e6:.1f} M parameters in {facts['dtype']}, "
               f"{size / 2**20:.1f} MiB by {linked}{also}")


if __name__ == "__main__":
    with stage_run("load") as this:
        load(this)
