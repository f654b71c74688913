"""The section `tracking`: where runs are logged and models registered."""

import re
from typing import Literal

from pydantic import Field, field_validator

from quantline.config.section import Section
from quantline.messages import without_secrets

# Of the stores that MLflow keeps runs and models in. Its folders of files are gone, and those of
# one vendor want that vendor's client.
SCHEMES = ("sqlite", "postgresql", "mysql", "mssql", "http", "https")


class Registry(Section):
    """Where a variant becomes a version of a registered model."""

    name: str = Field(
        pattern=r"^[^/:'\"`]+$", max_length=256, description="Name of the registered model."
    )
    alias: str = Field(
        default="champion",
        pattern=r"^[A-Za-z0-9_-]+$",
        max_length=255,
        description="Alias of the version that was promoted last.",
    )
    promote: Literal["explicit", "auto"] = Field(
        default="explicit",
        description="Who makes a variant a version: `quantline promote`, or every comparison.",
    )

    @field_validator("alias")
    @classmethod
    def _not_reserved(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v\d+", alias, re.IGNORECASE):
            raise ValueError(
                f"MLflow keeps {alias} for itself; choose another alias, such as champion"
            )
        return alias


class Tracking(Section):
    """The MLflow store and what is registered there."""

    uri: str = Field(description="Address of the MLflow store.")
    experiment: str = Field(description="Name of the experiment.")
    models: Literal["linked", "copied"] | None = Field(
        default="linked",
        description="Whether MLflow's model of each variant opens the bundle in artifacts/exports, "
        "or a copy that MLflow keeps; null makes no models.",
    )
    registry: Registry | None = Field(default=None, description="null registers nothing.")

    @field_validator("uri")
    @classmethod
    def _is_a_store(cls, uri: str) -> str:
        scheme = re.match(r"([A-Za-z][A-Za-z0-9]*)(?:\+\w+)?://", uri)
        if scheme is None or scheme[1].lower() not in SCHEMES:
            raise ValueError(
                f"expected an address that begins with one of {', '.join(SCHEMES)}, each followed "
                "by ://, such as sqlite:///mlflow.db or https://mlflow.example.org, found "
                f"{without_secrets(uri)}"
            )
        return uri
