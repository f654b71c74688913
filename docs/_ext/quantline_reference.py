"""Tables that are made from the code while the site is built, so that they cannot be out of date.

The directive `quantline` takes the name of a table:

    ```{quantline} options
    ```

`options` are all keys of params.yaml, from the pydantic schema; `recipes` those of each method. The
others list what is registered: `methods`, `formats`, `runtimes`, `families` and `metrics`, with
those of the plugins that are installed.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, ClassVar, get_args

from docutils import nodes
from docutils.parsers.rst import Directive
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective

from quantline.config.containers import CONTAINERS
from quantline.config.params import Params
from quantline.config.recipes import RECIPES
from quantline.config.runtimes import RUNTIMES, runtimes_of
from quantline.config.section import Section
from quantline.config.variants import FormatName, RuntimeName, Variant
from quantline.metrics.figure import FIGURES
from quantline.model.family import FAMILIES

NAMED_SECTIONS = ("recipes", "variants")  # whose keys are names that users choose
BOUNDS = {
    "exclusiveMinimum": "above",
    "minimum": "at least",
    "exclusiveMaximum": "below",
    "maximum": "at most",
}


def table(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [list(headings), ["---"] * len(headings), *rows]
    return "\n".join("| " + " | ".join(cell(text) for text in line) + " |" for line in lines)


def cell(text: str) -> str:
    """Return a text as one cell of a table; <words> outside code are no HTML."""
    parts = " ".join(text.split()).replace("|", "\\|").split("`")
    parts[::2] = [part.replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def code(value: object) -> str:
    """Return a value as YAML has it, in the type of code."""
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, list | tuple):
        return f"`[{', '.join(str(item) for item in value)}]`"
    return f"`{value}`" if value != "" else '`""`'


def codes(values: Iterable[object]) -> str:
    """Return values in the type of code, separated by commas; a dash where there are none."""
    return ", ".join(code(value) for value in values) or "–"


def first_paragraph(documented: object) -> str:
    """Return the first paragraph of a docstring."""
    return (inspect.getdoc(documented) or "").partition("\n\n")[0]


def value_text(schema: dict[str, Any]) -> str:
    """Describe in words which values a JSON schema takes."""
    if "anyOf" in schema:
        return " or ".join(value_text(member) for member in schema["anyOf"])
    if "const" in schema:
        return code(schema["const"])
    if "enum" in schema:
        return ", ".join(code(value) for value in schema["enum"])
    kind = schema.get("type")
    if kind == "null":
        return code(None)
    if kind == "array":
        return _array_text(schema)
    if kind == "object":
        inner = schema.get("additionalProperties")
        return f"names, each with {value_text(inner)}" if isinstance(inner, dict) else "keys"
    words = {"string": "text", "integer": "whole number", "number": "number", "boolean": "yes/no"}
    if kind == "boolean":
        return "`true`, `false`"
    bounds = [f"{word} {schema[key]:g}" for key, word in BOUNDS.items() if key in schema]
    return " ".join([words.get(str(kind), "section"), ", ".join(bounds)]).strip()


def _array_text(schema: dict[str, Any]) -> str:
    """Describe the values of a list."""
    if "prefixItems" in schema:
        members = [value_text(item) for item in schema["prefixItems"]]
        return f"list of {len(members)}: {', '.join(members)}"
    return f"list of {value_text(schema['items'])}"


def section_in(annotation: Any) -> type[Section] | None:
    """Return the section among the members of a type, which may be optional or a list."""
    for member in (annotation, *get_args(annotation)):
        if isinstance(member, type) and issubclass(member, Section):
            return member
    return None


def registered_names(metadata: Sequence[Any]) -> str:
    """Return the names of a registry, if a field's validator looks them up there; else nothing."""
    for annotation, registry in ((FormatName, CONTAINERS), (RuntimeName, RUNTIMES)):
        if annotation.__metadata__[0] in metadata:
            return codes(registry)
    return ""


def option_rows(section: type[Section], prefix: str) -> Iterator[list[str]]:
    """Yield [key, values, default, description] of every option of a section, nested ones too.

    Args:
        section: The class of the section.
        prefix: What the keys begin with, such as `evaluation.`.
    """
    schema = section.model_json_schema()
    for name, field in section.model_fields.items():
        nested = section_in(field.annotation)
        described = field.description or (first_paragraph(nested) if nested else "")
        if name == "method":
            described = "Names the method."
        option = schema["properties"][name]
        is_list = option.get("type") == "array"
        if nested:
            values = "list of sections" if is_list else "section"
            values += " or `null`" if "anyOf" in option else ""
        else:
            values = registered_names(field.metadata) or value_text(option)
        if field.is_required():
            default = "required"
        elif nested and option.get("default") is not None:
            default = "–" if not is_list else code(option["default"])
        elif option.get("type") == "object":
            default = "`{}`"
        else:
            default = code(option.get("default", []))
        yield [f"`{prefix}{name}`", values, default, described]
        if nested:
            yield from option_rows(nested, f"{prefix}{name}{'[]' if is_list else ''}.")


OPTION_HEADINGS = ("key", "value", "default", "what it does")


def options() -> str:
    """Return the tables of all sections but the recipes."""
    parts = []
    plain = []
    for name, field in Params.model_fields.items():
        section = section_in(field.annotation)
        if name == "variants":
            section = Variant
        if name == "recipes" or section is None:
            plain += [[f"`{name}`", "", "required", field.description or "see below"]]
            continue
        prefix = f"{name}.<name>." if name in NAMED_SECTIONS else f"{name}."
        parts += [f"## {name}", first_paragraph(section)]
        parts.append(table(OPTION_HEADINGS, option_rows(section, prefix)))
    return "\n\n".join(parts)


def recipes() -> str:
    """Return the options of each method."""
    parts = []
    for name, recipe in RECIPES.items():
        rows = option_rows(recipe, "")
        parts += [f"## {name}", first_paragraph(recipe), table(OPTION_HEADINGS, rows)]
    return "\n\n".join(parts)


def methods() -> str:
    """Return the registered methods."""
    rows = []
    for name, recipe in RECIPES.items():
        formats = [info.name for info in CONTAINERS.values() if info.can_carry(recipe)]
        activations = "yes" if recipe.activations else "no"
        described = first_paragraph(recipe)
        rows.append([f"`{name}`", described, f"`{recipe.storage}`", activations, codes(formats)])
    headings = ("method", "what it does", "storage", "rounds activations", "formats")
    return table(headings, rows)


def formats() -> str:
    """Return the registered containers."""
    rows = [
        [
            f"`{info.name}`",
            f"`{info.runtime}`",
            codes(runtimes_of(info.name)),
            codes(info.methods()),
            codes(info.dtypes),
            codes(info.layouts),
        ]
        for info in CONTAINERS.values()
    ]
    headings = ("format", "default runtime", "runtimes", "methods", "float types", "layouts")
    return table(headings, rows)


def runtimes() -> str:
    """Return the registered runtimes."""
    rows = [
        [f"`{info.name}`", codes(info.formats), code(info.install), str(info.kv_bytes)]
        for info in RUNTIMES.values()
    ]
    headings = ("runtime", "formats", "how to install it", "bytes per cached key or value")
    return table(headings, rows)


def families() -> str:
    """Return the registered model families."""
    rows = [
        [
            f"`{name}`",
            f"`{family.gguf.name}`" if family.gguf else "–",
            "yes" if family.sparse else "no",
        ]
        for name, family in FAMILIES.items()
    ]
    return table(("model_type in config.json", "architecture in GGUF", "experts"), rows)


def metrics() -> str:
    """Return the registered figures."""
    rows = [
        [
            f"`{figure.key}`",
            figure.label,
            figure.better or "–",
            figure.interval or "–",
            codes(sorted(figure.columns)),
        ]
        for figure in FIGURES.values()
    ]
    return table(("key", "what it is", "better", "interval from", "tables that show it"), rows)


TABLES: dict[str, Callable[[], str]] = {
    make.__name__: make
    for make in (options, recipes, methods, formats, runtimes, families, metrics)
}


class QuantlineTable(SphinxDirective):
    """The directive `quantline`."""

    required_arguments: ClassVar[int] = 1

    def run(self) -> list[nodes.Node]:
        """Return the table that the argument names."""
        name = self.arguments[0]
        if name not in TABLES:
            raise self.error(f"unknown table {name!r}; there are {', '.join(TABLES)}")
        self.env.note_reread()  # what is registered may change without the page
        return self.parse_text_to_nodes(TABLES[name](), allow_section_headings=True)


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directive."""
    directive: type[Directive] = QuantlineTable
    app.add_directive("quantline", directive)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
