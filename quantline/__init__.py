"""quantline: one trained language model in, every quantized variant worth deploying out, each measured from its file.

The settings below belong to the process, so they come before any other import: idle OpenMP threads sleep instead of
spinning (two processes on two cores stall each other otherwise), and so do OpenBLAS's, and nothing reports home.
"""

import os

for name, value in {
    "OMP_WAIT_POLICY": "PASSIVE",
    "GOMP_SPINCOUNT": "0",
    "OPENBLAS_THREAD_TIMEOUT": "4",
    "TOKENIZERS_PARALLELISM": "false",
    "DVC_NO_ANALYTICS": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "HF_HUB_DISABLE_TELEMETRY": "1",
}.items():
    os.environ.setdefault(name, value)
