"""`python -m quantline.cli`."""

from quantline.cli import app

app()
