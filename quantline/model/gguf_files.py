"""Which of the files of a GGUF bundle is the model.

This file imports no gguf: llama.cpp's engine reads it.
"""

from pathlib import Path

SUFFIX = ".gguf"
PROJECTOR = "mmproj-"  # begins the name of what makes tokens of images and sound
MODELFILE = "Modelfile"  # Ollama's


def model_files(folder: Path) -> list[Path]:
    """Return the file of a bundle's model, or those of a split one, the first of which is loaded.

    Whatever makes tokens of images or sound is another file.
    """
    return sorted(path for path in folder.glob(f"*{SUFFIX}") if _is_model(path.name))


def model_file(names: list[str]) -> str:
    """Return the file to load, of the names of a bundle's files."""
    return min(name for name in names if name.endswith(SUFFIX) and _is_model(name))


def projector_files(names: list[str]) -> list[str]:
    """Return those of the names that make tokens of images or sound."""
    return [name for name in names if name.endswith(SUFFIX) and not _is_model(name)]


def _is_model(name: str) -> bool:
    return not name.startswith(PROJECTOR)
