"""The bundle that a command is given: a variant of the project, or a folder anywhere."""

import os
from pathlib import Path
from typing import Any, NamedTuple

from quantline.cli.program import PARAMS
from quantline.config.compose import load_params, project_root
from quantline.errors import ConfigError
from quantline.formats.bundle.manifest import MANIFEST, check_bundle, check_files, read_manifest
from quantline.paths import EXPORTS


class CheckedBundle(NamedTuple):
    """A bundle whose files are those of its manifest.

    Attributes:
        folder: Where it lies.
        manifest: The content of its manifest.
        pythons: Runtime → interpreter of its own, as the project has them.
    """

    folder: Path
    manifest: dict[str, Any]
    pythons: dict[str, str]


def find_bundle(name: str) -> CheckedBundle:
    """Return a bundle, checked to the byte.

    Args:
        name: A variant of the project of the working folder, or the folder of a bundle.

    Raises:
        ConfigError: If it is neither.
        StageError: missing_file, artifact_changed.
    """
    folder = Path(name)
    if (folder / MANIFEST).is_file():
        manifest = read_manifest(folder)
        check_files(folder, manifest)
        return CheckedBundle(folder.resolve(), manifest, {})
    os.chdir(project_root())
    params = load_params(PARAMS)
    if name not in params.variants:
        raise ConfigError(
            f"expected the folder of a bundle, or a variant among {', '.join(params.variants)}, "
            f"found {name}"
        )
    folder = EXPORTS / name
    pythons = {key: path for key, path in params.evaluation.pythons.items() if path}
    return CheckedBundle(folder.resolve(), check_bundle(folder), pythons)
