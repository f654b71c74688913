"""A variant that MLflow loads: `mlflow.pyfunc.load_model("models:/<name>@champion")`.

MLflow calls `_load_pyfunc` with the data folder of a model that quantline/tracking/logged_models.py
has written. The bundle is the copy that lies there, or the project's, if it has the same bytes; all
of it is hashed before it is opened in its runtime.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from quantline.config.compose import project_root
from quantline.config.runtimes import RUNTIMES
from quantline.errors import ConfigError, Failure, StageError
from quantline.files import read_json
from quantline.formats.bundle.manifest import MANIFEST, check_files, read_manifest
from quantline.paths import EXPORTS
from quantline.runtimes.own_tokens import own_tokens
from quantline.runtimes.runtime import Runtime, open_runtime
from quantline.tracking.logged_models import COPY, DESCRIPTION, MAX_NEW_TOKENS


class BundleModel:
    """What `mlflow.pyfunc` calls; `get_raw_model()` of the loaded model is the runtime."""

    def __init__(self, runtime: Runtime, begin: list[int], ends: list[int]) -> None:
        """Wrap a loaded runtime.

        Args:
            runtime: With the bundle.
            begin: Token ids that are put before every text.
            ends: Token ids at which a generated text ends.
        """
        self.runtime = runtime
        self._begin = begin
        self._ends = set(ends)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[Any]:
        """Continue texts greedily, or say how likely they are.

        Args:
            model_input: One text, a list of texts, or a table with one column of texts.
            params: `max_new_tokens` of an answer, and `logprobs`: whether log-probabilities of the
                texts are wanted in place of answers.

        Returns:
            For each text its continuation; or {tokens: its ids, logprobs: natural log-probability
            of each token after those before it, None for the first if nothing is before it}.
        """
        wanted = {"max_new_tokens": MAX_NEW_TOKENS, "logprobs": False} | (params or {})
        texts = _texts(model_input)
        if wanted["logprobs"]:
            return [self.logprobs(text) for text in texts]
        return [self.generate(text, int(wanted["max_new_tokens"])) for text in texts]

    def generate(self, text: str, max_new_tokens: int = MAX_NEW_TOKENS) -> str:
        """Return a text's continuation, decoded greedily."""
        prompt = [*self._begin, *self.runtime.encode(text)]
        if not prompt:
            raise ValueError(f"expected a text to go on from, found {text!r}, which has no tokens")
        return self.runtime.decode(self.runtime.generate(prompt, max_new_tokens, self._ends))

    def logprobs(self, text: str) -> dict[str, list[Any]]:
        """Return a text's tokens, and the log-probability of each."""
        ids = self.runtime.encode(text)
        row = [*self._begin, *ids]
        values: list[float | None] = []
        if len(row) > 1:
            after = self.runtime.logprobs(np.array([row[:-1]], np.int32))[0]
            values = [float(after[index, token]) for index, token in enumerate(row[1:])]
        known = values[len(values) - len(ids) :] if self._begin else [None, *values]
        return {"tokens": ids, "logprobs": known[: len(ids)]}

    def get_raw_model(self) -> Runtime:
        """Return the runtime: `logprobs`, `generate`, `encode` and `decode` of token ids."""
        return self.runtime


def _texts(model_input: Any) -> list[str]:
    """Return the texts of what `predict` was given. Raises ValueError for anything else."""
    if isinstance(model_input, str):
        return [model_input]
    if hasattr(model_input, "columns"):  # a table of pandas
        if len(model_input.columns) != 1:
            raise ValueError(
                f"expected a table with one column of texts, found {len(model_input.columns)}"
            )
        model_input = model_input.iloc[:, 0].tolist()
    texts = list(model_input)
    for text in texts:
        if not isinstance(text, str):
            raise ValueError(f"expected texts, found {type(text).__name__}")
    return texts


def _load_pyfunc(data_path: str) -> BundleModel:
    """Open a model; MLflow calls this by its name.

    Raises:
        StageError: missing_file, if no folder has the bundle's bytes; artifact_changed, if one was
            changed; runtime_unavailable.
    """
    folder = Path(data_path)
    described = read_json(folder / DESCRIPTION)
    name = described["runtime"]
    if name not in RUNTIMES:
        raise StageError(
            Failure.RUNTIME_UNAVAILABLE,
            f"expected a runtime among {', '.join(RUNTIMES)}, found {name}; install the package "
            "that registers it",
        )
    runtime = open_runtime(name, find_bundle(folder, described))
    if described["begin"] is None or described["ends"] is None:
        return BundleModel(runtime, *own_tokens(runtime))
    return BundleModel(runtime, described["begin"], described["ends"])


def find_bundle(folder: Path, described: dict[str, Any]) -> Path:
    """Return the folder of a bundle that has the right bytes, after hashing all of it.

    Args:
        folder: The data of MLflow's model.
        described: The content of bundle.json.
    """
    wanted = described["artifact_sha256"]
    for place in _places(folder, described):
        if not (place / MANIFEST).is_file():
            continue
        manifest = read_manifest(place)
        if manifest["artifact_sha256"] == wanted:
            check_files(place, manifest)
            return place
    variant = described["variant"]
    raise StageError(
        Failure.MISSING_FILE,
        f"expected the bundle of {variant} with sha256 {wanted[:12]}… in {described['path']} or in "
        f"{EXPORTS / variant} of the project of the working folder, found none with these bytes; "
        f"check out the commit that made it and run `dvc pull {EXPORTS / variant}`, or promote it "
        "where it is: a promoted version has a copy",
    )


def _places(folder: Path, described: dict[str, Any]) -> Iterator[Path]:
    """Yield where the bundle may be."""
    yield folder / COPY
    yield Path(described["path"])
    try:
        yield project_root() / EXPORTS / described["variant"]
    except ConfigError:
        return
