"""The typed schema of params.yaml: what each key may be, what fits together, and errors that say so plainly."""

import difflib
from collections.abc import Iterable, Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]
INTEGER_METHODS = ("rtn", "gptq", "awq", "int8")
ACTIVATION_METHODS = ("smoothquant", "fp8")  # activations are rounded too
# The mixes of llama.cpp, and the types that one tensor can be asked to have (stages/methods/mixes.py).
MIXES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q2_K_S", "Q3_K_S", "Q3_K_M", "Q3_K_L", "Q4_K_S",
         "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS",
         "IQ3_S", "IQ3_M", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4_MOE")
GGML_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ1_S",
              "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "MXFP4")
# Those of them that have a codec (stages/methods/ggml_blocks.py), so that curvature can round within their grids.
CURVED_TYPES = ("F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS")
CURVED_MIXES = tuple(mix for mix in MIXES[3:] if mix.startswith(("Q", "IQ4")))
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
    mix: Literal[MIXES]
    importance: bool = True  # weigh errors by the input's second moments (the importance matrix)
    kernel: Literal["ggml", "numba"] = "numba"  # numba: the same blocks as ggml's own, several times as fast
    # An importance matrix that llama.cpp's tool llama-imatrix made, instead of the calibration's. Where its content
    # changes, give it another name: DVC looks at the path alone.
    importance_file: str | None = None
    # Types that take precedence over the mix: regular expression → type. It is searched for in the names that tensors
    # have in the GGUF file (blk.0.attn_v.weight, output.weight), as that of llama-quantize's --tensor-type; the first fits.
    overrides: dict[str, Literal[GGML_TYPES]] = {}


class KQuantCurvature(Recipe):
    """Rounded within ggml's grids by the curvature, which needs a calibration with gradients."""

    method: Literal["kquant-curvature"]
    mix: Literal[CURVED_MIXES]
    overrides: dict[str, Literal[CURVED_TYPES]] = {}  # as KQuant's
    damping: float = Field(default=0.01, gt=0, allow_inf_nan=False)
    rounds: int = Field(default=4, ge=0)  # of scales and codes in turn
    importance: ClassVar[bool] = True  # ggml's part of the work is weighed by the calibration
    importance_file: ClassVar[None] = None
    kernel: ClassVar[str] = "numba"


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


class Target(Section):
    name: str
    formats: list[Literal["safetensors", "gguf", "onnx"]]
    runtimes: list[Literal["transformers", "llama.cpp", "onnxruntime"]]
    max_size_mib: float | None = Field(default=None, gt=0)
    max_memory_mib: float | None = Field(default=None, gt=0)
    context: int | None = Field(default=None, gt=0)  # tokens whose KV cache counts as memory
    memory: Literal["measured", "size"] = "measured"  # what it is added to: this machine's peak, or the size on disk
    min_runtimes: int = Field(default=1, ge=1)  # in which the recipe has to meet the target
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
    if variant.split_max_mib and variant.format != "gguf":
        yield f".split_max_mib: only gguf is split by it, found {variant.format}"
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


