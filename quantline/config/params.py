"""The typed schema of params.yaml as a whole."""

from typing import Literal, Self

from pydantic import Field, model_validator

from quantline.config.executor import Executor
from quantline.config.recipes import AnyRecipe, GroupedRecipe
from quantline.config.section import Name, Section
from quantline.config.targets import Target
from quantline.config.texts import Calibration, Evaluation
from quantline.config.tracking import Tracking
from quantline.config.variants import Variant, misfits

AUTO = "auto"


class Model(Section):
    """The trained model that goes in."""

    source: Literal["demo", "local", "hub"] = Field(description="Where the checkpoint comes from.")
    path: str | None = Field(default=None, description="Folder of the checkpoint, or a GGUF file.")
    id: str | None = Field(default=None, description="The model's id on the Hub.")
    revision: str | None = Field(default=None, description="Branch, tag or commit on the Hub.")
    adapter: str | None = Field(default=None, description="Folder of a LoRA adapter to merge in.")
    converter: str | None = Field(
        default=AUTO,
        description="What makes the file that GGUF variants are quantized from. auto is quantline "
        "itself for the families that it has a table of, and for all others the converter of the "
        "llama.cpp that is installed; a path is a checkout of llama.cpp, or its "
        "convert_hf_to_gguf.py, for every model; null is quantline's tables alone.",
    )
    watch: str = Field(
        description="The path whose change makes DVC load again; of a Hub model, the file in conf/ "
        "that pins it."
    )
    adapter_watch: str | None = Field(default=None, description="The same for the adapter.")

    @model_validator(mode="after")
    def _complete(self) -> Self:
        if self.source == "hub" and not (self.id and self.revision):
            raise ValueError("source hub needs id and revision (a branch, tag or commit)")
        if self.source != "hub" and not self.path:
            raise ValueError(f"source {self.source} needs path")
        others = {"path": self.path}
        if self.source != "hub":
            others = {"id": self.id, "revision": self.revision}
        for key, value in others.items():
            if value is not None:
                raise ValueError(
                    f"source {self.source} takes no {key}, found {value!r}; leave it out"
                )
        return self


class StageLimits(Section):
    """Bounds of each stage as a whole; null is no limit.

    A stage that goes over one is ended with a named failure, and goes on where it stopped when it
    is run again with another.
    """

    seconds: float | None = Field(default=172800, gt=0, description="Wall-clock time.")
    memory_mib: float | None = Field(
        default=None, gt=0, description="Resident memory of the stage and all that it starts."
    )


class Params(Section):
    """Everything that params.yaml holds."""

    # What torch and numpy both take.
    seed: int = Field(ge=0, lt=2**32, description="Seed of all random draws.")
    conf_sha256: str = Field(description="Digest of conf/, from which params.yaml was composed.")
    suite: str = Field(description="Name of the suite of recipes and variants.")
    model: Model
    calibration: Calibration
    evaluation: Evaluation
    recipes: dict[Name, AnyRecipe]
    variants: dict[Name, Variant]
    target: Target
    tracking: Tracking
    limits: StageLimits = StageLimits()
    executor: Executor = Executor()

    @model_validator(mode="after")
    def _fit_together(self) -> Self:
        problems = []
        for name, recipe in self.recipes.items():
            if isinstance(recipe, GroupedRecipe):
                misfit = recipe.refine.misfit(self.calibration.sequences)
                problems += [f"recipes.{name}.refine: {misfit}"] if misfit else []
        for name, variant in self.variants.items():
            problems += [f"variants.{name}{problem}" for problem in misfits(variant, self.recipes)]
        if problems:
            raise ValueError("\n".join(problems))
        return self
