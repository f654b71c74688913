"""Loading a bundle in transformers: by itself if it can, else with quantline's help.

Most bundles need none, and then none is given: what is measured is what everybody gets who loads
the folder. Whether one needs it is found by trying, once: the smoke test keeps it in smoke.json.
"""

import gc
import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from quantline.causes import raise_if_of_machine
from quantline.errors import Failure, StageError
from quantline.files import read_json
from quantline.formats.bundle.manifest import SMOKE
from quantline.runtimes.compressed_loading import without_needless_initialization

HELPED = "helped"  # the key in smoke.json
COMPRESSED = "compressed-tensors"
OF_GPTQMODEL = ("gptq", "awq")  # what transformers leaves to that package


class Loaded(NamedTuple):
    """A model.

    Attributes:
        model: transformers' own.
        helped: Why transformers alone did not load it; None if it did.
    """

    model: Any
    helped: str | None


def load_model(bundle: Path, dtype: Any) -> Loaded:
    """Load a folder, all of whose weights have to be found.

    Raises:
        StageError: runtime_crashed, if transformers does not find every weight (it would draw
            random ones); runtime_unavailable, if the layout needs a package that is missing; as
            `meta_model` does.
    """
    from quantline.model.join_experts import experts_joined

    config = json.loads((bundle / "config.json").read_text(encoding="utf-8"))
    method = config.get("quantization_config", {}).get("quant_method")
    if method in OF_GPTQMODEL and find_spec("gptqmodel") is None:
        raise _not_installed("there is no gptqmodel")
    try:
        helped = _known(bundle) if method == COMPRESSED else None
        if method == COMPRESSED and not helped:
            model, helped = _tried(bundle, config, dtype)
            if not helped:
                return Loaded(model, None)
        with without_needless_initialization(), experts_joined(bundle):
            model, why_not = _tried(bundle, config, dtype)
    except ImportError as error:
        raise _not_installed(str(error)) from None
    if why_not:
        raise StageError(
            Failure.RUNTIME_CRASHED,
            f"expected transformers to find every weight of {bundle}, found {why_not}; "
            "export it again",
        )
    return Loaded(model, helped)


def _not_installed(found: str) -> StageError:
    return StageError(
        Failure.RUNTIME_UNAVAILABLE,
        f"transformers cannot load this layout here: {found}; install what it needs: "
        "pip install 'quantline[gptqmodel]'",
    )


def _known(bundle: Path) -> str | None:
    """Return what the smoke test found out, if there was one."""
    path = bundle / SMOKE
    return read_json(path).get(HELPED) if path.is_file() else None


def _tried(bundle: Path, config: dict[str, Any], dtype: Any) -> tuple[Any, str | None]:
    """Return the model, or None and why transformers does not load it."""
    from quantline.model.meta_model import model_class_of

    try:
        model, loading = model_class_of(config).from_pretrained(
            bundle, dtype=dtype, local_files_only=True, output_loading_info=True
        )
    except (ImportError, StageError):
        raise
    except Exception as error:  # whatever transformers stumbles over
        raise_if_of_machine(error)
        return None, " ".join(f"{type(error).__name__}: {error}".split())
    problems = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if not problems:
        return model, None
    del model
    gc.collect()  # before it is tried again
    return None, "; ".join(
        f"{kind.replace('_', ' ')}, {len(names)} in all, such as {names[0]}"
        for kind, names in sorted(problems.items())
    )
