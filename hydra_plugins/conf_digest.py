"""Makes conf/'s resolvers known when DVC composes (`dvc exp run -S`): Hydra imports whatever hydra_plugins/ holds."""

from quantline.config.compose import register_resolvers

register_resolvers()
