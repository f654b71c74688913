"""The code that a stage's result depends on, as one digest.

A killed stage is continued only if this digest is the same; dvc.yaml depends on the same rooms. A
test checks both against the imports.
"""

from importlib.util import find_spec
from pathlib import Path

from quantline.files import sha256_file, sha256_files, sha256_json

PACKAGE = Path(__file__).resolve().parents[1]
# Stage → the rooms of quantline, or parts of rooms, that its result depends on. What frames every
# stage (config, run, tracking, and the ground floor) is not among them: parameters are compared by
# value.
ROOMS: dict[str, tuple[str, ...]] = {
    "load": ("ingest", "model", "quantized", "text"),
    "answer": ("metrics", "model", "runtimes/smoke", "text"),
    "calibrate": ("calibration", "model", "text"),
    "reference": ("calibration", "metrics", "model", "text"),
    "quantize": (
        "calibration",
        "formats/bundle",
        "formats/container.py",
        "formats/gguf",
        "formats/onnx/sizes.py",
        "methods",
        "model",
        "quantized",
        "recipes",
        "text",
    ),
    "export": ("formats", "model", "quantized", "runtimes", "text"),
    "evaluate": ("formats/bundle", "metrics", "model", "runtimes"),
    "compare": (
        "calibration",
        "formats",
        "metrics",
        "model",
        "recipes/baseline.py",
        "recipes/grid_counts.py",
        "report",
        "runtimes",
        "text",
    ),
}


def code_digest(stage: str, implementation: str | None = None) -> str:
    """Return the sha256 over the code of a stage's rooms.

    Args:
        stage: The stage's name.
        implementation: "module:Class" of a method, whose file counts too if it is a plugin's.
    """
    digests = {}
    for room in ROOMS[stage]:
        path = PACKAGE / room
        files = [path] if path.is_file() else sorted(path.rglob("*.py"))
        digests[room] = sha256_files(PACKAGE, files)
    module = (implementation or "").partition(":")[0]
    if module and not module.startswith(f"{PACKAGE.name}."):
        spec = find_spec(module)
        if spec and spec.origin:
            digests[module] = sha256_file(Path(spec.origin))
    return sha256_json(digests)
