"""The typed schema of params.yaml: what each key may be, what fits together, and errors that say so plainly."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
INTEGER_METHODS = ("rtn", "gptq", "awq", "int8")
ACTIVATION_METHODS = ("smoothquant", "fp8")  # activations are rounded too
FORMATS = {  # container -> (runtime that serves it, methods that it can carry)
    "safetensors": ("transformers", ("none", *INTEGER_METHODS, *ACTIVATION_METHODS)),
    "gguf": ("llama.cpp", ("none", "kquant", "kquant-curvature")),
    "onnx": ("onnxruntime", ("none", *INTEGER_METHODS)),
}


class ConfigError(Exception):
    """params.yaml or conf/ is not usable; the message says where, what was expected, and what mends it."""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class Model(Section):
    source: Literal["demo", "local", "hub"]
    path: str | None = None
    id: str | None = None
    revision: str | None = None
    adapter: str | None = None
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


class Calibration(Text):
    curvature: bool = True  # also collect the output factors of the KL divergence's curvature, in a backward pass


class Evaluation(Text):
    gold: str | None = None
    gold_watch: str  # `gold`, or `watch` where there is none: DVC cannot depend on nothing
    smoke_prompts: list[str] = Field(min_length=1)
    smoke_tokens: int = Field(gt=0)
    speed: Speed


class Recipe(Section):
    substitution: Literal["report", "fail"] = "report"


class Grouped(Recipe):
    bits: Literal[2, 3, 4, 8]
    group_size: Literal[32, 64, 128, -1]
    symmetric: bool
    scales: Literal["minmax", "weighted"] = "weighted"  # weighted: the span with the least diag(H)-weighted error
    curvature: bool = False  # afterwards move integers and scales to where the KL divergence rises least


class NoneRecipe(Recipe):
    method: Literal["none"]


class Rtn(Grouped):
    method: Literal["rtn"]
    scales: Literal["minmax", "weighted"] = "minmax"


class Gptq(Grouped):
    method: Literal["gptq"]
    act_order: bool = True
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)


class Awq(Grouped):
    method: Literal["awq"]
    grid: int = Field(default=20, ge=2)
    rounding: Literal["nearest", "gptq"] = "nearest"  # how the scaled weights are rounded


class Int8(Recipe):
    method: Literal["int8"]


class SmoothQuant(Recipe):
    method: Literal["smoothquant"]
    smoothing: float | None = Field(default=None, ge=0, le=1)  # the exponent a; None searches the best for each input
    grid: int = Field(default=20, ge=2)


class Fp8(Recipe):
    method: Literal["fp8"]


class KQuant(Recipe):
    method: Literal["kquant"]
    mix: Literal["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    importance: bool = True  # weigh errors by the input's second moments (the importance matrix)
    kernel: Literal["ggml", "numba"] = "numba"  # numba: the same blocks as ggml's own, several times as fast


class KQuantCurvature(Recipe):
    """Rounded within ggml's grids by the curvature, which needs a calibration with gradients."""

    method: Literal["kquant-curvature"]
    mix: Literal["Q2_K", "Q3_K_M", "Q4_K_M", "Q5_K_M", "Q6_K", "Q8_0"]
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    rounds: int = Field(default=4, ge=0)  # of scales and codes in turn


RECIPES = {"none": NoneRecipe, "rtn": Rtn, "gptq": Gptq, "awq": Awq, "int8": Int8, "smoothquant": SmoothQuant, "fp8": Fp8,
           "kquant": KQuant, "kquant-curvature": KQuantCurvature}
AnyRecipe = Annotated[NoneRecipe | Rtn | Gptq | Awq | Int8 | SmoothQuant | Fp8 | KQuant | KQuantCurvature,
                      Field(discriminator="method")]


class Variant(Section):
    recipe: Name
    format: Literal["safetensors", "gguf", "onnx"]
    runtime: Literal["transformers", "llama.cpp", "onnxruntime"]
    dtype: Literal["float32", "float16", "bfloat16"] | None = None
    layout: Literal["compressed-tensors", "gptq", "awq"] = "compressed-tensors"  # of quantized layers in safetensors


class Gate(Section):
    metric: str
    operator: Literal["<=", ">=", "<", ">"]
    threshold: float = Field(allow_inf_nan=False)
    required: bool = True


class Optimize(Section):
    metric: str
    direction: Literal["min", "max"]


class Target(Section):
    name: str
    formats: list[Literal["safetensors", "gguf", "onnx"]]
    runtimes: list[Literal["transformers", "llama.cpp", "onnxruntime"]]
    max_size_mib: float | None = Field(default=None, gt=0)
    max_memory_mib: float | None = Field(default=None, gt=0)
    gates: list[Gate] = []
    optimize: Optimize


class Tracking(Section):
    uri: str
    experiment: str


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
    runtime, methods = FORMATS[variant.format]
    if variant.runtime != runtime:
        yield f".runtime: {variant.format} is served by {runtime}, found {variant.runtime}"
    recipe = recipes.get(variant.recipe)
    if recipe is None:
        yield f".recipe: no recipe {variant.recipe!r} in this suite; there are {', '.join(sorted(recipes))}"
        return
    if recipe.method not in methods:
        yield (f".recipe: {variant.format} carries the methods {', '.join(methods)}; recipe {variant.recipe} has "
               f"{recipe.method}")
    if variant.layout != "compressed-tensors" and recipe.method in ACTIVATION_METHODS:
        yield f".layout: {recipe.method} needs compressed-tensors, found {variant.layout}"
    if variant.dtype and recipe.method != "none":
        yield f".dtype: only a variant whose recipe has method none has one; {variant.recipe} has {recipe.method}"
    elif variant.dtype not in (None, "float32") and variant.format == "onnx":
        yield f".dtype: onnx is exported in float32, found {variant.dtype}"


def validate(values: dict) -> Params:
    """The typed parameters. Raises ConfigError that names each wrong key and lists the valid ones."""
    try:
        return Params.model_validate(values)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(one) for one in error.errors())) from None


def _explain(error: dict) -> str:
    """One of pydantic's errors as `dotted.key: what was expected, what was found`."""
    where = [str(part) for part in error["loc"]]
    if where[:1] == ["recipes"] and len(where) > 2 and where[2] in RECIPES:
        del where[2]  # pydantic names the method here; it is no key of params.yaml
    dotted = ".".join(where)
    if error["type"] == "extra_forbidden":
        valid = _fields(error["loc"][:-1])
        return f"{dotted}: unknown key{_nearest(where[-1], valid)}; valid keys here are {', '.join(sorted(valid))}"
    if error["type"] == "union_tag_invalid":
        found = error["ctx"]["tag"]
        return f"{dotted}.method: unknown method {found!r}{_nearest(found, RECIPES)}; there are {', '.join(RECIPES)}"
    if where[-1:] == ["[key]"]:
        return f"{'.'.join(where[:-1])}: a name has only a-z, 0-9, _ and -, and starts with a letter or digit"
    said = error["msg"].removeprefix("Value error, ")
    if not where:
        return said
    return f"{dotted}: {said}" + ("" if error["type"] in ("missing", "value_error") else f", found {error['input']!r}")


def unknown_key(dotted: str) -> str | None:
    """What to say of a dotted key that the schema does not know; None for one that it knows."""
    where = dotted.split(".")
    valid = _fields(tuple(where[:-1]))
    if where[0] == "recipes" and len(where) == 3:
        valid = [field for recipe in RECIPES.values() for field in recipe.model_fields]
    if where[-1] in valid or (len(where) == 2 and where[0] in ("recipes", "variants")):
        return None
    return f"{dotted}: unknown key{_nearest(where[-1], valid)}; valid keys here are {', '.join(sorted(set(valid)))}"


def _nearest(word: str, valid: Iterable[str]) -> str:
    near = difflib.get_close_matches(word, list(valid), n=1)
    return f" (did you mean {near[0]}?)" if near else ""


def _fields(where: tuple[str | int, ...]) -> list[str]:
    """The field names of the section at this place of the schema."""
    section: type[Section] = Params
    for part in where:
        if section is Params and part in ("recipes", "variants"):
            section = Variant if part == "variants" else Recipe
        elif part in RECIPES and section is Recipe:
            section = RECIPES[part]
        elif part == "gates":
            section = Gate
        elif (field := section.model_fields.get(str(part))) and isinstance(field.annotation, type):
            section = field.annotation
    return list(section.model_fields)


