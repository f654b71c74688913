"""One trained language model in, every quantized variant worth deploying out, each measured.

`quantline.api` documents the calls; they are imported when they are used, so that `import
quantline` costs nothing. The settings below belong to the process, so they come before any other
import: idle threads of OpenMP and OpenBLAS sleep instead of spinning (two processes on two cores
stall each other otherwise), MKL's products of matrices are the same bits for any number of threads,
and nothing reports home.
"""

import os
from typing import TYPE_CHECKING, Any

from quantline.torch_import import watch_import

if TYPE_CHECKING:
    from quantline.api import (
        Comparison,
        calibrate,
        compare,
        export,
        load_checkpoint,
        make_reference,
        measure,
        quantize,
        text_file,
    )

__all__ = [
    "Comparison",
    "calibrate",
    "compare",
    "export",
    "load_checkpoint",
    "make_reference",
    "measure",
    "quantize",
    "text_file",
]

for _name, _value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "OPENBLAS_THREAD_TIMEOUT": "4",
    "MKL_CBWR": "AUTO,STRICT",
    "TOKENIZERS_PARALLELISM": "false",
    "DVC_NO_ANALYTICS": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(_name, _value)
watch_import()


def __getattr__(name: str) -> Any:
    """Import a call of `quantline.api` when it is first used."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from quantline import api

    return getattr(api, name)


def __dir__() -> list[str]:
    """Return the public names."""
    return sorted({*globals(), *__all__})
