"""A model that is with a colleague alone is not asked for where load is up to date."""

from pathlib import Path

import pytest
import yaml

from quantline.config.compose import load_params
from quantline.run.model_elsewhere import LOCK, is_model_elsewhere


def lock(model: object) -> None:
    LOCK.write_text(yaml.safe_dump({"stages": {"load": {"params": {"params.yaml": model}}}}))


def test_is_model_elsewhere_where_the_lock_has_the_same_section(project):
    project.compose("model.path=gone", "model.watch=gone")
    params = load_params()
    assert not is_model_elsewhere(params, Path.cwd())  # nothing says what it was
    lock({"model": params.model.model_dump(mode="json")})
    assert is_model_elsewhere(params, Path.cwd())
    Path("gone").mkdir()
    assert not is_model_elsewhere(params, Path.cwd())
    lock({"model": params.model.model_dump(mode="json") | {"path": "another"}})
    Path("gone").rmdir()
    assert not is_model_elsewhere(params, Path.cwd())


@pytest.mark.parametrize("text", ["", "[]", "stages: 3", "stages: {load: {}}", "a: [", "\0"])
def test_is_model_elsewhere_says_no_to_a_torn_lock(project, text):
    project.compose("model.path=gone", "model.watch=gone")
    LOCK.write_text(text)
    assert not is_model_elsewhere(load_params(), Path.cwd())
