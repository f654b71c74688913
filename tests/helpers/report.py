"""Rows and reports for tests, and what evaluate and export leave of a variant."""

import json
from dataclasses import replace
from typing import Any

from quantline.config.compose import load_params
from quantline.config.targets import Gate, Optimize, Target
from quantline.files import sha256_file, write_json, write_text
from quantline.model.family import FAMILIES
from quantline.model.read_architecture import architecture_of
from quantline.paths import EVENTS, EXPORTS, METRICS, MODEL, REFERENCE
from quantline.report.build import Report
from quantline.report.gates import check_gate
from quantline.report.memory import memory_use
from quantline.report.selection import choose, own_objections
from quantline.report.variant import VariantRow
from quantline.text.special_tokens import SpecialTokens, write_special_tokens
from tests.helpers.lineage import vouch_for

SHA256 = "ab" * 32
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 6,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 384,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
}
ARCH = architecture_of(CONFIG, FAMILIES["llama"])
# Answers to a gold set that is large enough to decide the gates of every target.
DECIDED = {
    "gold_accuracy_delta": 0.0,
    "gold_accuracy_delta_interval": [0.0, 0.0],
    "gold_flips": 0,
    "gold_lost": 0,
    "gold_won": 0,
    "gold_items": 1000,
}
# Of a variant, as the table shows them.
MEASURED_FIGURES = {
    "size_bytes": 2**21,
    "bits_per_weight": 4.5,
    "perplexity": 8.125,
    "mean_kld": 0.0125,
    "same_top_p": 0.97,
    "gold_accuracy": 0.96,
}
TARGET = Target(
    name="laptop",
    formats=["gguf", "onnx"],
    runtimes=["llama.cpp", "onnxruntime"],
    max_size_mib=None,
    max_memory_mib=None,
    gates=[Gate(metric="mean_kld", operator="<=", threshold=0.1)],
    optimize=Optimize(metric="size_bytes", direction="min"),
)
LINEAGE = {
    "source": {"path": "demo", "revision": None},
    "recipe": {"name": "r", "method": "rtn"},
    "calibration": None,
    "versions": {"gguf": "1.0"},
    "files": {"model.gguf": {"sha256": SHA256, "bytes": 4096}},
    "created_by": "export-1",
    "serve": "llama-server --model model.gguf",
}
# What `write_measured` leaves in a manifest: a dozen layers, and one that is copied as it is.
LAYERS: dict[str, dict[str, float]] = {
    f"layer-{number}": {"error": float(number % 7), "rtn_error": 8.0} for number in range(12)
} | {"copied": {}}
TENSORS = {
    f"{name}.weight": {"actual": "int4", "bits_per_weight": 4.5, "weights": 64, "bytes": 36}
    for name in LAYERS
}


def metrics_of(size: float, kld: float) -> dict[str, Any]:
    """Return metrics of a variant of `size` MiB, with a gold set."""
    return {
        "size_bytes": size * 2**20,
        "bits_per_weight": 4.5,
        "layer_bits_per_weight": 4.25,
        "mean_kld": kld,
        "mean_kld_se": kld / 10,
        "p999_kld": 9 * kld,
        "p999_kld_se": kld,
        "max_kld": 20 * kld,
        "rms_delta_p": 0.02,
        "rms_delta_p_se": 0.001,
        "perplexity": 3.0,
        "perplexity_delta": 0.1,
        "perplexity_delta_se": 0.01,
        "same_top_p": 0.97,
        "same_top_p_se": 0.01,
        "tokens": 100,
        "gold_accuracy": 0.9,
        "gold_accuracy_delta": -0.01,
        "gold_accuracy_delta_interval": [-0.04, 0.02],
        "gold_flips": 3,
        "gold_lost": 2,
        "gold_won": 1,
        "gold_items": 100,
        "gold_p_value": 0.6,
        "gold_facts": 0.9,
        "gold_tasks": {"facts": {"accuracy": 0.9, "lost": 2, "won": 1, "items": 100}},
        "artifact_sha256": SHA256,
        "runtime_version": "1.0",
    }


def speed_of() -> dict[str, Any]:
    """Return the speed of a variant."""
    return {
        "load_s": 0.1,
        "prefill_tok_s": 900.0,
        "decode_tok_s": 90.0,
        "peak_rss_mib": 300.0,
        "threads": 2,
        "device": "cpu",
    }


def make_row(
    name: str, size: float, kld: float, target: Target = TARGET, **fields: Any
) -> VariantRow:
    """Return the row of a measured GGUF variant of `size` MiB, judged for a target."""
    defaults: dict[str, Any] = {
        "variant": name,
        "recipe": "r",
        "format": "gguf",
        "runtime": "llama.cpp",
        "metrics": metrics_of(size, kld),
        "speed": speed_of(),
        "lineage": LINEAGE,
    }
    row = VariantRow(**(defaults | fields))
    row.gates = [check_gate(gate, row.figures) for gate in target.gates]
    row.memory = memory_use(row, target, ARCH)
    row.objections = own_objections(row, target)
    return row


def failed_row(message: str) -> VariantRow:
    """Return the row of a variant that was not measured."""
    return VariantRow(
        variant="broken",
        recipe="r",
        format="gguf",
        runtime="llama.cpp",
        status="failed",
        failure="type_substituted",
        message=message,
    )


def without_gold(row: VariantRow) -> VariantRow:
    """Return a row whose variant was measured without a gold set."""
    metrics = {key: value for key, value in row.metrics.items() if not key.startswith("gold_")}
    return replace(row, metrics=metrics)


def make_report(rows: list[VariantRow], target: Target = TARGET) -> Report:
    """Return a report that chooses among rows."""
    choice = choose(rows, target)
    return Report(
        model="demo",
        parameters=5_000_000,
        target=target.model_dump(mode="json"),
        pick=choice.pick,
        runner_up=choice.runner_up,
        reasons=choice.reasons,
        tokens=1000,
        baseline={"all": 0.9, "facts": 0.9},
        tasks=["facts"],
        variants=rows,
        commit="c" * 40,
        uncommitted=[],
        params={"suite": "quick", "seed": 0},
        refused=[],
    )


def event(stage: str, instance: str | None, failure: str | None = None) -> dict[str, Any]:
    """Return a line of events.jsonl: an error, or the good end of a stage."""
    payload = {"instance": instance}
    if failure:
        payload["failure"] = failure
    return {
        "stage": stage,
        "severity": "error" if failure else "info",
        "summary": f"{stage}: {failure}",
        "reason_code": "export_run_failed" if failure else "stage_finished",
        "payload": payload,
    }


def write_events(*events: dict[str, Any]) -> None:
    """Write events.jsonl into the working folder."""
    write_text(EVENTS, "".join(json.dumps(line) + "\n" for line in events))


def write_figures(
    name: str,
    size: float,
    kld: float,
    sha256: str = SHA256,
    runtime: str = "llama.cpp",
    **metrics: Any,
) -> None:
    """Write what evaluate leaves of a variant of `size` MiB; `metrics` replace figures."""
    items = []
    for item, before in (("a", False), ("b", True)):
        items.append(
            {
                "id": item,
                "task": "open",
                "prompt": "p",
                "reference": "r",
                "said": name,
                "correct": True,
                "baseline_said": "t",
                "baseline_correct": before,
            }
        )
    answers = METRICS / "items" / f"{name}.json"
    write_json(answers, items)
    measured_on = {"artifact_sha256": sha256, "runtime": runtime}
    figures = metrics_of(size, kld) | {"gold_tasks": {}, "gold_open": 0.9} | measured_on
    figures["items_sha256"] = sha256_file(answers)
    write_json(METRICS / f"{name}.json", figures | metrics)
    write_json(METRICS / f"{name}.speed.json", speed_of() | measured_on)
    params = load_params()
    if name in params.variants:
        vouch_for(name, params)


def write_measured(
    name: str, size: float, kld: float, sha256: str = SHA256, **metrics: Any
) -> None:
    """Write what export and evaluate leave of a variant of `size` MiB."""
    write_figures(name, size, kld, sha256, **metrics)
    bundle = EXPORTS / name
    manifest = {
        "artifact_sha256": sha256,
        "substituted_share": 0.25,
        "layers": LAYERS,
        "tensors": TENSORS,
        "recipe": {"name": "q8_0"},
        "calibration": None,
        "variant": name,
        "format": "gguf",
        "runtime": "llama.cpp",
        "versions": {},
        "files": {},
        "created_by": "export-1",
        "source": {"path": "here", "files": {"a": "b"}},
    }
    write_json(bundle / "manifest.json", manifest)
    write_text(bundle / "README.md", "# A bundle\n\n## Serve it\n\nllama-server\n")
    write_json(bundle / "smoke.json", {"prompts": [{"prompt": "One", "output": " day"}]})


def write_truth(sha256: str = "e" * 64) -> None:
    """Write what `reference` leaves of the evaluation text, and `load` of the special tokens."""
    truth = {"text_sha256": sha256, "tokens": 100, "gold_sha256": "a" * 64, "gold_items": 1000}
    write_json(REFERENCE / "reference.json", truth)
    MODEL.mkdir(parents=True, exist_ok=True)
    write_special_tokens(MODEL, SpecialTokens({}, {}, [1], [], [2], [], {}))


def write_pick() -> None:
    """Leave figures of bf16, and of gguf-q8_0, which is the pick of the target laptop-cpu."""
    write_truth()
    write_measured("bf16", 10, 0, **DECIDED)
    write_measured("gguf-q8_0", 5, 0.001, **DECIDED)
