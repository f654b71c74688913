"""A bundle whose files are links, as a folder that onnxruntime takes.

With `cache.type symlink`, DVC puts links to its cache in a bundle's place. onnxruntime refuses
external data that lies outside of the model's folder once links are followed.
"""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from quantline.links import link


@contextmanager
def without_links(bundle: Path) -> Iterator[Path]:
    """Yield the bundle, or beside it a folder with the same bytes under the same names.

    What has been opened from there stays open when the folder is removed.
    """
    files = [path for path in bundle.rglob("*") if path.is_file()]
    if not any(path.is_symlink() for path in files):
        yield bundle
        return
    # Beside the project's other working files: there the bytes can be shared rather than copied.
    beside = Path(".quantline")
    with tempfile.TemporaryDirectory(
        prefix="bundle-", dir=beside if beside.is_dir() else None
    ) as name:
        for path in files:
            link(path, Path(name) / path.relative_to(bundle))
        yield Path(name)
