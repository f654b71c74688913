"""Other tools that quantize the same model: each in its own environment, called as a script."""

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.model_under_test import ModelUnderTest
from benchmarks.paths import PEER_SCRIPTS
from quantline.files import read_json, write_json

# Tool and method; its script is benchmarks/peers/<tool>_peer.py.
PEERS = (
    ("llmcompressor", "gptq"),
    ("llmcompressor", "awq"),
    ("gptqmodel", "gptq"),
    ("autoround", "autoround"),
    ("autoround", "signroundv2"),
)
ENVIRONMENTS = Path.home() / ".cache/quantline-peers"
SETTINGS = {"GPTQMODEL_CPU_WORKERS": "2", "CUDA_VISIBLE_DEVICES": ""}


def peer_python(peer: str) -> Path:
    """Return the Python of a tool's environment, which is made on first use."""
    environment = ENVIRONMENTS / peer
    python = environment / "bin/python"
    complete = environment / "complete"
    if complete.is_file():
        return python
    requirements = read_json(PEER_SCRIPTS / "requirements.json")[peer]
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(environment)], check=True)
    # Torch first and alone, so that nothing brings another build of it.
    for packages in (requirements[:1], requirements):
        command = [str(python), "-m", "pip", "install", "--quiet", *packages]
        subprocess.run(command, check=True)
    complete.touch()
    return python


def run_peer(
    model: ModelUnderTest, peer: str, method: str, bits: int, group_size: int, minutes: float
) -> dict[str, Any]:
    """Quantize a model with another tool.

    Args:
        model: The model, its texts, and the reference.
        peer: The tool.
        method: What it is to do.
        bits: Of a weight.
        group_size: Weights that share a scale.
        minutes: After which it is stopped.

    Returns:
        Its divergence and seconds; {failed: its last line, or that it was stopped}.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        np.savez(folder / "tokens.npz", calibration=model.calibration, evaluation=model.evaluation)
        job = {
            "model": str(model.checkpoint.folder.resolve()),
            "method": method,
            "bits": bits,
            "group_size": group_size,
        }
        write_json(folder / "job.json", job)
        command = [str(peer_python(peer)), str(PEER_SCRIPTS / f"{peer}_peer.py"), str(folder)]
        try:
            process = subprocess.run(
                command,
                capture_output=True,
                text=True,
                check=False,
                cwd=folder,
                env=os.environ | SETTINGS,
                timeout=60 * minutes,
            )
        except subprocess.TimeoutExpired:
            return {"failed": f"stopped after {minutes:g} minutes"}
        if not (folder / "done.json").is_file():
            lines = process.stderr.strip().splitlines() or ["no message"]
            return {"failed": lines[-1]}
        times = read_json(folder / "done.json")
        logprobs = torch.from_numpy(np.load(folder / "logprobs.npy"))
        return model.divergence(logprobs) | times
