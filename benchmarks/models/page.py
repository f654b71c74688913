"""docs/models.md and the short table of the README, from what was found out."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.models.journey import MAKE
from benchmarks.models.project import VARIANTS
from benchmarks.models.results import is_made
from benchmarks.paths import ROOT

PAGE = ROOT / "docs/models.md"
# Pages that have the short table, between these lines.
WITH_COUNTS = (ROOT / "README.md", ROOT / "docs/your-model.md")
BEGIN = "<!-- the table of `make models` begins -->"
END = "<!-- the table of `make models` ends -->"
EXACT = 1e-6  # mean KL divergence of what is not rounded

Model = dict[str, Any]


class Capability(NamedTuple):
    """What can be done with a model.

    Attributes:
        label: In words.
        variant: That shows it; None for what comes before all variants.
        holds: Whether it can be done with a model.
    """

    label: str
    variant: str | None
    holds: Callable[[Model], bool]


def _kld(model: Model, variant: str) -> float | None:
    return model["figures"].get(variant, {}).get("mean_kld")


def _is_measured(variant: str) -> Callable[[Model], bool]:
    return lambda model: _kld(model, variant) is not None


def _is_exact(variant: str) -> Callable[[Model], bool]:
    """Whether a variant without rounding says what the model says."""

    def holds(model: Model) -> bool:
        kld = _kld(model, variant)
        return kld is not None and kld < EXACT

    return holds


CAPABILITIES = (
    Capability("load and calibrate", None, lambda model: "calibrate" in model["figures"]),
    Capability("full precision in safetensors", "bf16", _is_exact("bf16")),
    Capability("GPTQ, 4 bits, in safetensors", "gptq-w4g32", _is_measured("gptq-w4g32")),
    Capability("AWQ, 4 bits, in safetensors", "awq-w4g32", _is_measured("awq-w4g32")),
    Capability("ONNX, full precision", "onnx-fp32", _is_exact("onnx-fp32")),
    Capability("GGUF, F32", "gguf-f32", _is_exact("gguf-f32")),
    Capability("GGUF, Q8_0", "gguf-q8_0", _is_measured("gguf-q8_0")),
    Capability("GGUF, Q4_K_M", "gguf-q4_k_m", _is_measured("gguf-q4_k_m")),
)
GROUPS: dict[str, Callable[[str], bool]] = {
    "dense": lambda kind: kind == "dense",
    "mixtures of experts": lambda kind: kind == "mixture",
    "hybrid and recurrent": lambda kind: (
        kind.startswith(("hybrid", "recurrent")) and not kind.endswith("wrapper")
    ),
    "text of wrappers": lambda kind: kind.endswith("wrapper"),
    "all": lambda kind: True,
}
INTRO = """\
# Models

Which architectures work, and how well: made by `make models`, never by hand. For each architecture that the installed
transformers can load as a language model, a tiny checkpoint of random weights ({layers} layers, {width} wide) goes through the
stages, from the check of the inputs to the figures of each bundle in its runtime. No list says what works; the stages
find it out, and what does not work is refused with its cause, which stands [below](#what-is-refused).

Random weights show whether an architecture is computed rightly, not how well it takes rounding: divergences of trained
models are smaller. The figures are mean KL divergences from the unquantized model, on {tokens} tokens.
"""
TABLE = """
## Every architecture

* **loads**: and runs block by block over the calibration text as the whole model does.
* **bf16**, **ONNX**, **F32**: not rounded. In brackets, by how many nats a log-probability is off at most from that of the
  whole model in transformers.
* **GPTQ**, **AWQ**: 4 bits in groups of 32, symmetric, in safetensors. In brackets, what share of the
  blocks' weights are rounded; with AWQ, of how many of the rounded layers the inputs have scales, which are folded into what
  comes before them.
* **GGUF by**: quantline's own table, or llama.cpp's converter.
* × is refused or failed, and a line is a step that was not reached.

| name | class | kind | loads | bf16 | GPTQ | AWQ | ONNX | GGUF by | F32 | Q8_0 | Q4_K_M |
|---|---|---|---|---|---|---|---|---|---|---|---|
"""


def write_pages(results: dict[str, Any]) -> None:
    """Write the page, and the short table into those that have it."""
    PAGE.write_text(page(results), encoding="utf-8")
    for path in WITH_COUNTS:
        path.write_text(with_counts(path, results), encoding="utf-8")


def with_counts(path: Path, results: dict[str, Any]) -> str:
    """Return the text of a page with the present short table."""
    before, rest = path.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    return f"{before}{BEGIN}\n{counts(results)}{END}{after}"


def page(results: dict[str, Any]) -> str:
    """Return the text of docs/models.md."""
    models = results["models"]
    made = {name: model for name, model in models.items() if is_made(model)}
    parts = [
        INTRO.format(layers="two or four", width=256, tokens=256),
        "\n## How many\n\n",
        counts(results),
        TABLE,
        "".join(_row(name, model) for name, model in made.items()),
        "\n## What is refused\n",
        *_refusals(made),
        "\n## What is not tried\n\n",
        "transformers has these names too, and no tiny model of them goes on with a text:\n\n",
        *(
            f"* {name}: {model['failures'][MAKE]['cause']}\n"
            for name, model in models.items()
            if not is_made(model)
        ),
        *_waiting(results),
        "\n## Versions\n\n",
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()),
        ".\n",
    ]
    return "".join(parts)


def counts(results: dict[str, Any]) -> str:
    """Return the short table: how many architectures can do what."""
    made = [model for model in results["models"].values() if is_made(model)]
    lines = [f"| | {' | '.join(GROUPS)} |", "|---" * (len(GROUPS) + 1) + "|"]
    for capability in CAPABILITIES:
        cells = []
        for of_group in GROUPS.values():
            group = [
                model
                for model in made
                if of_group(model["made"]["kind"])
                and (capability.variant is None or capability.variant in model["tried"])
            ]
            cells.append(f"{sum(map(capability.holds, group))} of {len(group)}")
        lines.append(f"| {capability.label} | {' | '.join(cells)} |")
    return "\n".join([*lines, "", _extent(results), ""])


def _extent(results: dict[str, Any]) -> str:
    """Return a sentence on how many names were tried, and by how many versions of the code."""
    models = results["models"].values()
    versions = len({model["code"] for model in models})
    by = "one version" if versions == 1 else f"{versions} versions"
    total = len(results["names"])
    return f"{len(models)} of the {total} names were tried, by {by} of quantline's code."


def _row(name: str, model: Model) -> str:
    made = model["made"]
    figures = model["figures"]
    by = "–"
    if "gguf-f32" in figures:
        by = "converter" if figures["gguf-f32"].get("converted") else "table"
    awq = figures.get("quantize awq-w4g32", {})
    cells = [
        f"`{name}`",
        made["class_name"],
        made["kind"],
        "yes" if "calibrate" in figures else "×",
        _exact_cell(model, "bf16"),
        _cell(model, "gptq-w4g32", _percent(figures.get("gptq-w4g32", {}).get("rounded"))),
        _cell(model, "awq-w4g32", _percent(awq.get("scaled"))),
        _exact_cell(model, "onnx-fp32"),
        by,
        _exact_cell(model, "gguf-f32"),
        _cell(model, "gguf-q8_0"),
        _cell(model, "gguf-q4_k_m"),
    ]
    return f"| {' | '.join(cells)} |\n"


def _percent(share: float | None) -> str | None:
    return None if share is None else f"{share:.0%}"


def _exact_cell(model: Model, variant: str) -> str:
    difference = model["figures"].get(variant, {}).get("difference")
    return _cell(model, variant, None if difference is None else f"{difference:.0e}")


def _cell(model: Model, variant: str, more: Any = None) -> str:
    """Return a variant's divergence, with something more in brackets."""
    kld = _kld(model, variant)
    if kld is None:
        return "×" if _failed_steps(model, variant) else "–"
    text = f"{kld:.0e}" if kld < 1e-4 else f"{kld:.2g}"
    return text if more is None else f"{text} ({more})"


def _failed_steps(model: Model, variant: str) -> list[str]:
    steps = {f"{stage} {variant}" for stage in ("export", "evaluate", "compare")}
    steps.add(f"quantize {VARIANTS[variant]}")
    return sorted(steps & set(model["failures"]))


def _refusals(made: dict[str, Model]) -> Iterable[str]:
    """Yield a section for each step, with the causes of the failures and whose they are."""
    steps: dict[str, dict[str, list[str]]] = {}
    for name, model in made.items():
        for label, step in model["failures"].items():
            cause = f"`{step['failure']}`: {_plain(step['cause'])}"
            names = steps.setdefault(label, {}).setdefault(cause, [])
            names.append(f"`{name}`")
    if not steps:
        yield "\nNothing.\n"
    for label, causes in steps.items():
        yield f"\n**{label}**\n\n"
        for cause, names in sorted(causes.items(), key=lambda pair: (-len(pair[1]), pair[0])):
            yield f"* {', '.join(names)}: {cause}\n"


def _waiting(results: dict[str, Any]) -> Iterable[str]:
    """Yield a section with the names that have no results yet."""
    waiting = [f"`{name}`" for name in results["names"] if name not in results["models"]]
    if waiting:
        yield f"\n## What waits for the next `make models`\n\n{', '.join(waiting)}\n"


def _plain(text: str) -> str:
    """Return a text in which nothing is markup."""
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]<>#|$~" else letter for letter in text)
