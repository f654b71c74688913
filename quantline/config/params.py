"""The typed schema of params.yaml: what each key may be, and what fits together."""

import re
from collections.abc import Iterator
from typing import Any, Literal

from pydantic import Field, field_validator, model_validator

from quantline.config.recipes import ACTIVATION_METHODS, INTEGER_METHODS, AnyRecipe, Recipe
from quantline.config.section import Name, Section

FORMATS = {  # container -> (runtimes that serve it, methods that it can carry)
    "safetensors": (("transformers", "vllm"), ("none", *INTEGER_METHODS, *ACTIVATION_METHODS)),
    "gguf": (("llama.cpp",), ("none", "kquant", "kquant-curvature")),
    "onnx": (("onnxruntime", "onnxruntime-genai"), ("none", *INTEGER_METHODS)),
}
Runtime = Literal["transformers", "vllm", "llama.cpp", "onnxruntime", "onnxruntime-genai"]


class Model(Section):
    source: Literal["demo", "local", "hub"]
    path: str | None = None
    id: str | None = None
    revision: str | None = None
    adapter: str | None = None
    # A checkout of llama.cpp, whose convert_hf_to_gguf.py makes the file that GGUF variants are quantized from. With it a
    # model may be of an architecture that has no table here. Where its content changes, load again: DVC looks at the path.
    converter: str | None = None
    watch: str  # the path whose change makes DVC load again; for a Hub model, the conf file that pins it
    adapter_watch: str | None = None  # the same for the adapter

    @model_validator(mode="after")
    def _named(self) -> "Model":
        if self.source == "hub" and not (self.id and self.revision):
            raise ValueError("source hub needs id and revision (a branch, tag or commit)")
        if self.source != "hub" and not self.path:
            raise ValueError(f"source {self.source} needs path")
        return self


class Text(Section):
    source: Literal["file", "hub"]
    path: str | None = None
    dataset: str | None = None
    dataset_config: str | None = None
    split: str | None = None
    column: str = "text"
    dataset_revision: str | None = None
    part: tuple[float, float] = (0.0, 1.0)  # share of the documents, from and to
    sequences: int = Field(gt=0)
    length: int = Field(gt=1)
    watch: str  # the path whose change makes DVC read the text again

    @model_validator(mode="after")
    def _named(self) -> "Text":
        if self.source == "file" and not self.path:
            raise ValueError("source file needs path")
        if self.source == "hub" and not (self.dataset and self.split):
            raise ValueError("source hub needs dataset and split")
        if not 0 <= self.part[0] < self.part[1] <= 1:
            raise ValueError("part needs two numbers with 0 <= from < to <= 1")
        return self


class Speed(Section):
    prompt_tokens: int = Field(gt=0)
    new_tokens: int = Field(gt=1)
    repetitions: int = Field(gt=0)
    threads: int | None = Field(default=None, gt=0)  # None: as many as there are cores


class Limits(Section):
    """Of each process in which a variant is tried or measured; None for no limit."""

    seconds: float | None = Field(default=14400, gt=0)
    memory_mib: float | None = Field(default=None, gt=0)  # resident, of the process and all that it starts


class Calibration(Text):
    curvature: bool = True  # also collect the output factors of the KL divergence's curvature, in a backward pass


class Evaluation(Text):
    gold: str | None = None
    gold_watch: str  # `gold`, or `watch` where there is none: DVC cannot depend on nothing
    smoke_prompts: list[str] = Field(min_length=1)
    smoke_tokens: int = Field(gt=0)
    speed: Speed
    limits: Limits = Limits()
    pythons: dict[Runtime, str | None] = Field(default_factory=dict)  # the interpreter of a runtime that is installed in an environment of its own


class Variant(Section):
    recipe: Name
    format: Literal["safetensors", "gguf", "onnx"]
    runtime: Runtime
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    layout: Literal["compressed-tensors", "gptq", "awq"] = "compressed-tensors"  # of quantized layers in safetensors
    split_max_mib: int | None = Field(default=None, gt=0)  # of one GGUF file; a larger model lies in several
    # Whether the bundle's tokenizer has to give the source's ids on every text that is tried, or where it does not is told
    # in smoke.json: llama.cpp splits words of some families at combining marks, or puts a space where another is.
    tokenizer: Literal["exact", "report"] = "exact"


class Gate(Section):
    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    threshold: float = Field(allow_inf_nan=False)
    required: bool = True
    on: Literal["value", "delta"] = "value"  # delta: the difference to the unquantized model
    level: float = Field(default=0.95, gt=0, lt=1)  # of the confidence interval that decides
    # What an interval that holds the threshold counts as: `estimate` goes by the figure itself.
    cannot_tell: Literal["estimate", "passes", "fails"] = "estimate"

    @model_validator(mode="before")
    @classmethod
    def _on(cls, values: Any) -> Any:
        """`on` without quotes is the truth value in YAML 1.1."""
        if isinstance(values, dict) and True in values:
            return {"on" if key is True else key: value for key, value in values.items()}
        return values

    @model_validator(mode="after")
    def _has_baseline(self) -> "Gate":
        if self.on == "delta" and not (self.metric == "perplexity" or self.metric.startswith("gold_")):
            raise ValueError(f"on: delta goes with perplexity and gold_..., found {self.metric}, which "
                             "has no figure of the unquantized model beside it")
        return self


class Optimize(Section):
    metric: str
    direction: Literal["min", "max"]
    # Share of the best figure by which others count as its equals, which the KL divergence then tells apart.
    within: float = Field(0.005, ge=0, lt=1)


class Hardware(Section):
    """A device that is not this machine; what it would do is estimated."""

    name: str
    # Of the memory that holds the weights, in 10^9 bytes a second.
    bandwidth_gb_s: float = Field(gt=0, allow_inf_nan=False)


class Target(Section):
    name: str
    formats: list[Literal["safetensors", "gguf", "onnx"]]
    runtimes: list[Runtime]
    max_size_mib: float | None = Field(default=None, gt=0)
    max_memory_mib: float | None = Field(default=None, gt=0)
    context: int | None = Field(default=None, gt=0)  # tokens whose KV cache counts as memory
    memory: Literal["measured", "size"] = "measured"  # what it is added to: this machine's peak, or the size on disk
    min_runtimes: int = Field(default=1, ge=1)  # in which the recipe has to meet the target
    hardware: Hardware | None = None
    gates: list[Gate] = Field(default_factory=list)
    optimize: Optimize

    @model_validator(mode="after")
    def _described(self) -> "Target":
        asked = [one.metric for one in (*self.gates, self.optimize) if one.metric.startswith("estimated_")]
        if asked and self.hardware is None:
            raise ValueError(f"{asked[0]} needs hardware: {{name: ..., bandwidth_gb_s: ...}}, found none")
        return self


class Registry(Section):
    """Where the variant to ship becomes a version of a registered model, if the required gates of its target pass."""

    name: str = Field(pattern=r"^[^/:]+$")  # MLflow's rule
    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9_-]+$", max_length=255)
    # The version's source: the bundle in artifacts/exports/, or a copy of it among the run's artifacts.
    upload: bool = False

    @field_validator("alias")
    @classmethod
    def _free(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ValueError(f"MLflow keeps {alias} for itself; choose another alias, such as champion")
        return alias


class Tracking(Section):
    uri: str
    experiment: str
    registry: Registry | None = None

    @field_validator("uri")
    @classmethod
    def _no_secret(cls, uri: str) -> str:
        if re.match(r"https?://[^/]*@", uri):
            raise ValueError("no credentials in the address: params.yaml is kept in git; set MLFLOW_TRACKING_USERNAME "
                             "and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN")
        return uri

    @model_validator(mode="after")
    def _reachable(self) -> "Tracking":
        if self.uri.startswith("http") and self.registry and not self.registry.upload:
            raise ValueError("registry.upload: a server takes no path of this machine as the source of a version; set "
                             "it to true, or registry to null")
        return self


class Params(Section):
    seed: int
    conf_sha256: str
    suite: str
    model: Model
    calibration: Calibration
    evaluation: Evaluation
    recipes: dict[Name, AnyRecipe]
    variants: dict[Name, Variant]
    target: Target
    tracking: Tracking

    @model_validator(mode="after")
    def _fit(self) -> "Params":
        problems = [f"variants.{name}{problem}" for name, variant in self.variants.items()
                    for problem in _misfits(variant, self.recipes)]
        if problems:
            raise ValueError("\n".join(problems))
        return self


def _misfits(variant: Variant, recipes: dict[str, Recipe]) -> Iterator[str]:
    """What does not fit together in a variant: `.key: expected ..., found ...`."""
    runtimes, methods = FORMATS[variant.format]
    if variant.runtime not in runtimes:
        yield f".runtime: {variant.format} is served by {' or '.join(runtimes)}, found {variant.runtime}"
    recipe = recipes.get(variant.recipe)
    if recipe is None:
        yield f".recipe: no recipe {variant.recipe!r} in this suite; there are {', '.join(sorted(recipes))}"
        return
    if recipe.method not in methods:
        yield (f".recipe: {variant.format} carries the methods {', '.join(methods)}; recipe {variant.recipe} has "
               f"{recipe.method}")
    if variant.layout != "compressed-tensors" and recipe.method in ACTIVATION_METHODS:
        yield f".layout: {recipe.method} needs compressed-tensors, found {variant.layout}"
    if variant.split_max_mib and variant.format != "gguf":
        yield f".split_max_mib: only gguf is split by it, found {variant.format}"
    if variant.dtype and recipe.method != "none":
        yield f".dtype: only a variant whose recipe has method none has one; {variant.recipe} has {recipe.method}"
    elif variant.dtype not in (None, "float32") and variant.format == "onnx":
        yield f".dtype: onnx is exported in float32, found {variant.dtype}"
