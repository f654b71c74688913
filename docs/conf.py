"""Settings of the documentation site, which `make docs` builds. Warnings are errors."""

import sys
from pathlib import Path

DOCS = Path(__file__).resolve().parent
sys.path[:0] = [str(DOCS.parent), str(DOCS / "_ext")]

project = "quantline"
author = "the quantline authors"
project_copyright = "the quantline authors, Apache-2.0"

extensions = [
    "myst_parser",
    "quantline_reference",
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
]
exclude_patterns = ["_build", "_ext"]
autodoc_member_order = "bysource"
autodoc_typehints = "none"

myst_enable_extensions = ["colon_fence", "deflist"]
myst_heading_anchors = 3

html_theme = "furo"
html_title = "quantline"
html_theme_options = {"navigation_with_keys": True}
html_show_sphinx = False
html_copy_source = False
