"""One tiny model per family for the whole session."""

from collections.abc import Callable

import pytest

from tests.helpers.families import ALL, FamilyModel


@pytest.fixture(scope="session")
def family_models(tmp_path_factory) -> Callable[[str], FamilyModel]:
    """family_models(model_type) returns the model of a family, made when it is first used."""
    models: dict[str, FamilyModel] = {}

    def get(model_type: str) -> FamilyModel:
        if model_type not in models:
            models[model_type] = FamilyModel(tmp_path_factory.mktemp(model_type), model_type)
        return models[model_type]

    return get


@pytest.fixture(params=ALL)
def family(request, family_models) -> FamilyModel:
    """Every family in turn."""
    return family_models(request.param)
