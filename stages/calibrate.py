"""Run the unquantized model once over the calibration text and keep what every method needs.

    python -m stages.calibrate     # artifacts/model, calibration section → artifacts/calibration/
"""


from safetensors.numpy import save_file

from quantline.text import documents as texts
from quantline.calibration.collect import collect
from quantline.model.checkpoint import Checkpoint
from quantline.text.tokenizer import Tokenizer
from quantline.files import sha256_json, versions, write_json
from quantline.run.stage import StageRun, stage_run
from quantline.paths import CALIBRATION, MODEL



def calibrate(run: StageRun) -> None:
    text, checkpoint = texts.pinned(run.params.calibration), Checkpoint(MODEL)
    documents = texts.documents(text)
    tokens = Tokenizer(MODEL).pack(documents, text.sequences, text.length)

    text_sha256 = texts.sha256_documents(documents)
    key = {"text": text_sha256, "calibration": text.model_dump(mode="json"), "seed": run.params.seed,
           "model": checkpoint.stamp(), "versions": versions("torch", "transformers", "tokenizers")}
    with run.resumable_output(CALIBRATION, key) as folder:
        layers = collect(checkpoint, tokens, folder, run.params.seed if text.curvature else None)
        info = {"text_sha256": text_sha256, "text": text.path or text.dataset,
                "dataset_revision": text.dataset_revision, "tokens": int(tokens.size), "sequences": len(tokens),
                "length": text.length, "seed": run.params.seed, "curvature": text.curvature, "layers": layers,
                "versions": versions("torch", "transformers", "tokenizers")}
        save_file({"tokens": tokens}, folder / "tokens.safetensors")
        write_json(folder / "calibration.json", info)

    run.track(key=f"calibration:{sha256_json(info)}:{sha256_json(checkpoint.config)}", name="calibration",
              params={key: info[key] for key in ("text", "text_sha256", "dataset_revision", "sequences", "length")},
              metrics={"tokens": tokens.size, "layers": len(layers)}, files=[CALIBRATION / "calibration.json"])
    short = "" if len(tokens) == text.sequences else f" (the text fills {len(tokens)} of {text.sequences} sequences)"
    inputs, size = {one["moments"] for one in layers.values()}, sum(path.stat().st_size for path in CALIBRATION.iterdir())
    experts = {name.rpartition(".")[0]: about.get("starved", False) for name, about in layers.items() if ".experts." in name}
    fed = f"{sum(experts.values())} of {len(experts)} experts starved (calibrated on all tokens), " if experts else ""
    run.finish(f"{tokens.size} tokens{short}, {fed}second moments of {len(inputs)} inputs of {len(layers)} layers"
               f"{' and of their output gradients' if text.curvature else ''}, "
               f"{size / 2**20:.1f} MiB")


if __name__ == "__main__":
    with stage_run("calibrate") as this:
        calibrate(this)
