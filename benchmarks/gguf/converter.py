"""llama.cpp's converter from a checkpoint to GGUF, from the source of llama-cpp-python."""

import subprocess
import sys
import tarfile
from pathlib import Path

from quantline.files import versions

PACKAGE = "llama-cpp-python"
SCRIPT = "convert_hf_to_gguf.py"
# A script that runs the converter: `convert.py <llama.cpp> <converter> <its arguments>`. The
# converter knows a pre-tokenizer by a hash over a vocabulary, and cannot know that of a vocabulary
# that was trained here.
CONVERT = """
import runpy, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/gguf-py"]
from conversion.base import TextModel
TextModel.get_vocab_base_pre = lambda self, tokenizer: "smollm"
sys.argv[:] = sys.argv[2:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def find_converter(source: str | None, folder: Path) -> Path:
    """Return the folder of llama.cpp that holds the converter.

    Args:
        source: A source distribution of llama-cpp-python, packed or unpacked, or a checkout of
            llama.cpp; None fetches the installed version's from the package index with pip.
        folder: Where to fetch and unpack.

    Raises:
        SystemExit: If there is no converter in it.
    """
    path = fetch_source(folder) if source is None else Path(source)
    if path.is_file():
        with tarfile.open(path) as archive:
            archive.extractall(folder / "source", filter="data")
        path = folder / "source"
    scripts = list(path.rglob(SCRIPT))
    if not scripts:
        raise SystemExit(f"expected {SCRIPT} in {path}, found none; give --source")
    nearest = min(scripts, key=lambda script: len(script.parts))
    return nearest.resolve().parent


def fetch_source(folder: Path) -> Path:
    """Download the source distribution of the installed version into a folder."""
    requirement = f"{PACKAGE}=={versions(PACKAGE)[PACKAGE]}"
    command = [
        *(sys.executable, "-m", "pip", "download", "--no-deps"),
        *("--no-binary", PACKAGE, "--dest", str(folder), requirement),
    ]
    subprocess.run(command, check=True)
    return next(folder.glob("*.tar.gz"))
