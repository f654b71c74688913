"""Number types by their names: in config.json and params.yaml, in weight files, and in numpy."""

import ml_dtypes
import numpy as np

# What safetensors and GGUF call a float type → what config.json and params.yaml call it.
CONFIG_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
STORED_NAMES = {config_name: name for name, config_name in CONFIG_NAMES.items()}
NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    # Tables of whole numbers that a model may have beside its weights:
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
