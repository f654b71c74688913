"""The stages of the pipeline, one script each: `python -m stages.<stage> [<recipe or variant>]`."""

import quantline  # noqa: F401  it sets the process's environment, which has to precede numpy and torch
from quantline.messages import guard_libraries

guard_libraries()
