"""What every part of params.yaml has in common."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, StringConstraints

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$")]


class ConfigError(Exception):
    """params.yaml or conf/ is not usable; the message says where, what was expected, and what mends it."""


class Section(BaseModel):
    """A part of params.yaml: no unknown keys, no changes after loading."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())
