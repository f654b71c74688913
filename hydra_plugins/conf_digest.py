"""Makes the resolvers of conf/ known when DVC composes: Hydra imports all of hydra_plugins/.

With them comes a check that an experiment is on the project's own model, texts and suite.
"""

from quantline.run.dvc_composition import register_for_dvc

register_for_dvc()
