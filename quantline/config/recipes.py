"""What a recipe is: how weights are quantized, and what the rest has to know about its method.

A method is one module: it defines a subclass of `Recipe` with the method's options, and names its
implementation. See CONTRIBUTING.md, "Add a method".
"""

from collections.abc import Callable, Iterable
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar, get_args

from pydantic import BeforeValidator, Field, SerializeAsAny, ValidationError, model_validator
from pydantic_core import InitErrorDetails, PydanticCustomError

from quantline.config.refinement import Refinement
from quantline.config.section import Section
from quantline.registry import Registry

Bits = Literal[2, 3, 4, 8]
FixedGroupSize = Literal[32, 64, 128, -1]
GroupSize = Literal["auto", FixedGroupSize]
BITS: tuple[Bits, ...] = get_args(Bits)
AUTO: Literal["auto"] = "auto"
WHOLE_ROW: Literal[-1] = -1
GROUP_SIZES: tuple[FixedGroupSize, ...] = get_args(FixedGroupSize)[:3]  # of parts of a row

# Share that is taken off the off-diagonal entries of H: what two inputs have in common in one text
# is partly not so in another (docs/methods.md has the figures).
SHRINKAGE = 0.2
Shrinkage = Annotated[
    float,
    Field(
        ge=0,
        le=1,
        allow_inf_nan=False,
        description="Share that is taken off the Hessian's off-diagonal entries, since texts "
        "differ there.",
    ),
]

OutputStatistics = Literal["none", "diagonal", "full"]
RecipeType = TypeVar("RecipeType", bound="Recipe")


class Budget(Section):
    """A size within which each tensor gets the type that its predicted cost is worth.

    Without a limit of its own, the file is as large as the recipe without a budget would make it.
    """

    size_mib: float | None = Field(
        default=None, gt=0, allow_inf_nan=False, description="Size of the weight file in MiB."
    )
    bits_per_weight: float | None = Field(
        default=None,
        gt=0,
        allow_inf_nan=False,
        description="Bits per weight over all weights of the file.",
    )

    @model_validator(mode="after")
    def _one_limit(self) -> "Budget":
        if self.size_mib is not None and self.bits_per_weight is not None:
            raise ValueError(
                "expected one limit, found size_mib and bits_per_weight; leave one of them out"
            )
        return self


class GridBudget(Budget):
    """A budget for layers of grouped integers."""

    bits: tuple[Bits, ...] = Field(
        default=BITS, min_length=1, description="Bits that a layer can have."
    )
    group_sizes: tuple[FixedGroupSize, ...] = Field(
        default=GROUP_SIZES, min_length=1, description="Group sizes that a layer can have."
    )
    format: Literal["safetensors", "onnx"] = Field(
        default="safetensors",
        description="The format whose sizes count. In onnx the bits of embedding and head are "
        "chosen too.",
    )


class Recipe(Section):
    """The options of one quantization method.

    The class attributes are what the rest of quantline knows about the method:

    * `storage`: the kind of quantized tensor that it makes (quantline.quantized.store), or "none".
    * `activations`: whether the server rounds activations too.
    * `scales_inputs`: whether layers that share an input are scaled together before rounding.
    * `container`: the format of a variant that names none.
    * `baseline`: the plain method that every layer is compared with, "rtn" or "ggml".
    * `rounds_outside`: whether something outside of all blocks is rounded too.
    * `implementation`: "module:Class" of the Method that does it, imported when it is used; None
      if the weights stay as they are.
    """

    method: str
    substitution: Literal["report", "fail"] = Field(
        default="report",
        description="What happens where a container stores another type than was asked for.",
    )

    storage: ClassVar[str]
    activations: ClassVar[bool] = False
    scales_inputs: ClassVar[bool] = False
    container: ClassVar[str] = "safetensors"
    baseline: ClassVar[str] = "rtn"
    implementation: ClassVar[str | None] = None

    @property
    def size_budget(self) -> Budget | None:
        """The budget that the recipe is fitted to, if it has one."""
        return getattr(self, "budget", None)

    @property
    def hessian_shrinkage(self) -> float:
        """The share that is taken off the off-diagonal entries of H."""
        return getattr(self, "shrinkage", SHRINKAGE)

    @property
    def output_statistics(self) -> OutputStatistics:
        """How much of the output gradient's second moments the method uses."""
        return "none"

    @property
    def uses_calibration(self) -> bool:
        """Whether what is rounded depends on the statistics of the calibration text."""
        return self.storage != "none"

    @property
    def rounds_outside(self) -> bool:
        """Whether something outside of all blocks is rounded too."""
        return False

    @property
    def rounding_name(self) -> str:
        """How the method rounds, in the words of a budget's report."""
        return self.method


class GroupedRecipe(Recipe):
    """A recipe for grouped integers: `bits` per weight, one scale and zero point per group."""

    storage: ClassVar[str] = "grouped"

    bits: Bits = Field(description="Bits per weight.")
    group_size: GroupSize = Field(
        description="Neighbouring inputs that share a scale; -1 is the whole row. auto: in each "
        "layer the largest of 128, 64 and 32 that divides its inputs, with eight bits 32 alone; "
        "else the whole row."
    )
    budget: GridBudget | None = Field(
        default=None, description="Choose bits and group size layer by layer within a size."
    )
    symmetric: Literal[True, False, "auto"] = Field(
        description="Whether the zero point is fixed in the middle. auto: in experts, of which "
        "transformers loads no zero points."
    )
    scales: Literal["minmax", "weighted"] = Field(
        default="weighted",
        description="minmax: a scale spans its group. weighted: the span is clipped to where the "
        "error weighted by diag(H) is least.",
    )
    curvature: bool = Field(
        default=False,
        description="Afterwards move integers and scales to where the KL divergence rises least.",
    )
    shrinkage: Shrinkage = SHRINKAGE
    embedding_bits: Literal[8, 4] | None = Field(
        default=8,
        description="Bits of the embedding and of the output head in ONNX; safetensors keep them "
        "in floats. 8: rounded to nearest. 4: rounded by the method. null: in floats.",
    )
    safetensors_head: bool = Field(
        default=False,
        description="Whether safetensors hold the output head in those bits too, in the layout "
        "compressed-tensors. It has to be a matrix of its own, not the embedding.",
    )
    refine: Refinement = Refinement()

    @model_validator(mode="after")
    def _head_has_bits(self) -> Self:
        if self.safetensors_head and self.embedding_bits is None:
            raise ValueError(
                "expected embedding_bits of 8 or 4 with safetensors_head, found null; set "
                "embedding_bits=8, or safetensors_head=false"
            )
        return self

    @property
    def rounds_outside(self) -> bool:
        """Whether embedding and head are rounded."""
        return self.embedding_bits is not None

    @property
    def output_statistics(self) -> OutputStatistics:
        """All of the output gradient's second moments, if the recipe descends on them."""
        return "full" if self.curvature else "none"

    def for_layer(self, widths: Iterable[int], of_expert: bool = False) -> Self:
        """Return the recipe with the grid of one layer in place of every `auto`.

        Args:
            widths: Inputs of the layer, and of those that have to share its grid.
            of_expert: Whether it is a layer of an expert.
        """
        grid: dict[str, Any] = {}
        if self.group_size == AUTO:
            grid["group_size"] = largest_group(widths, self.bits)
        if self.symmetric == AUTO:
            grid["symmetric"] = of_expert
        return self.model_copy(update=grid) if grid else self

    def outside(self, width: int) -> Self | None:
        """Return the recipe of the embedding or the head, whose rows have so many weights.

        None if the only group of a row is the row, in which no container holds them.
        """
        grid = {
            "bits": self.embedding_bits,
            "symmetric": True,
            "curvature": False,
            "budget": None,
            "refine": Refinement(),
        }
        recipe = self.model_copy(update=grid).for_layer((width,))
        size = recipe.group_size
        return None if size == WHOLE_ROW or width % int(size) else recipe


def largest_group(widths: Iterable[int], bits: int = 4) -> FixedGroupSize:
    """Return the largest group size that divides all widths; the whole row if none does.

    With eight bits only the smallest is looked at: a scale more costs little there, and onnxruntime
    rounds the inputs of a layer in the blocks that its weight has.
    """
    every = tuple(widths)
    sizes = (min(GROUP_SIZES),) if bits == 8 else GROUP_SIZES
    fitting = [size for size in sizes if all(width % size == 0 for width in every)]
    return max(fitting, default=WHOLE_ROW)


RECIPES: Registry[type[Recipe]] = Registry("method")


def register_method(name: str) -> Callable[[type[RecipeType]], type[RecipeType]]:
    """Return a decorator that registers a recipe class as the method `name`."""

    def register(recipe: type[RecipeType]) -> type[RecipeType]:
        RECIPES.add(name, recipe)
        return recipe

    return register


def parse_recipe(values: Any) -> Recipe:
    """Read a recipe by its `method`.

    Raises:
        ValidationError: pydantic's, if there is no such method or an option is wrong.
    """
    if isinstance(values, Recipe):
        return values
    method = values.get("method") if isinstance(values, dict) else None
    if not isinstance(method, str) or method not in RECIPES:
        problem = PydanticCustomError("value_error", RECIPES.unknown(method))
        details = InitErrorDetails(type=problem, loc=("method",), input=method)
        raise ValidationError.from_exception_data("Recipe", [details])
    return RECIPES[method].model_validate(values)


AnyRecipe = Annotated[SerializeAsAny[Recipe], BeforeValidator(parse_recipe)]
