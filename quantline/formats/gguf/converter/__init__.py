"""GGUF files by llama.cpp's own converter, for models that quantline has no table for.

`release.py` has the converter of the release that is linked, `driver.py` is what runs it in a
process of its own, `conversion.py` keeps its file, and `origins.py` finds in it what calibration
knows of the checkpoint.
"""
