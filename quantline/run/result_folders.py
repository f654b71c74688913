"""Whether DVC will take what stages make, asked before hours of work and not after."""

from pathlib import Path

from quantline.errors import ConfigError
from quantline.paths import ARTIFACTS, EXPORTS, METRICS, QUANTIZED, REPORTS
from quantline.run.dvc_program import has_git

FOLDERS = (ARTIFACTS, QUANTIZED, EXPORTS, METRICS, METRICS / "items", METRICS / "lineage", REPORTS)


def check_result_folders() -> None:
    """Check that the folders of results of the project in the working folder are in it.

    DVC writes a .gitignore beside each result, and git wants no file behind a link to elsewhere.

    Raises:
        ConfigError: If one is a link that leads out of the project.
    """
    project = Path.cwd().resolve()
    if not has_git(project):
        return
    for folder in FOLDERS:
        if folder.is_symlink() and not folder.resolve().is_relative_to(project):
            raise ConfigError(
                f"expected {folder} to be a folder of the project, found a link to "
                f"{folder.readlink()}: DVC keeps no results outside of the git repository; put the "
                "whole project on that disk, or mount a folder of it there (`mount --bind`)"
            )
