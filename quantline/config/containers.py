"""What quantline knows about a container without opening it.

A container is one module or package: it registers a `ContainerInfo` here, which names its
implementation. See CONTRIBUTING.md, "Add a container".
"""

from dataclasses import dataclass

from quantline.config.recipes import RECIPES, Recipe
from quantline.registry import Registry


@dataclass(frozen=True)
class ContainerInfo:
    """One container format.

    Attributes:
        name: What params.yaml calls it.
        implementation: "module:Class" of the Container, imported when it is used.
        runtime: The runtime of a variant that names none.
        carries: Kinds of quantized tensor that it can hold ("none": unquantized weights).
        activations: Whether a server of it can round activations too.
        packages: Packages that write or read it; their versions go into the manifest.
        dtypes: Float types that unquantized weights can be stored in.
        layouts: Layouts of quantized layers, the first being the default; empty if there is one.
        splits: Whether a large model can lie in several files of a size that is asked for.
        colour: Of its points in plots, as "#rrggbb".
        marker: Of its points in plots, as matplotlib names it.
    """

    name: str
    implementation: str
    runtime: str
    carries: frozenset[str]
    packages: tuple[str, ...]
    colour: str
    marker: str
    activations: bool = False
    dtypes: tuple[str, ...] = ("float32", "float16", "bfloat16")
    layouts: tuple[str, ...] = ()
    splits: bool = False

    def can_carry(self, recipe: type[Recipe]) -> bool:
        """Whether the container can hold what recipes of this class make."""
        return recipe.storage in self.carries and (self.activations or not recipe.activations)

    def methods(self) -> list[str]:
        """Return the names of the methods that it can carry, sorted."""
        return sorted(name for name, recipe in RECIPES.items() if self.can_carry(recipe))


CONTAINERS: Registry[ContainerInfo] = Registry("format")


def register_container(info: ContainerInfo) -> ContainerInfo:
    """Register a container under its name and return it."""
    CONTAINERS.add(info.name, info)
    return info
