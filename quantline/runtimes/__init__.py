"""Engines that serve a bundle. A runtime reads only the bundle."""
