"""Makes the resolvers of conf/ known when DVC composes: Hydra imports all of hydra_plugins/."""

from quantline.config.compose import register_resolvers

register_resolvers()
