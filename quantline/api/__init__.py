"""quantline in a notebook: one model, any recipe, a bundle, its figures, and the choice.

    >>> import quantline
    >>> model = quantline.load_checkpoint("path/to/model", "work/model")
    >>> text = quantline.text_file("calibration.txt", sequences=32, length=256)
    >>> calibration = quantline.calibrate(model, text, "work/calibration")
    >>> recipe = {"method": "kquant-curvature", "mix": "Q4_K_M"}
    >>> weights = quantline.quantize(model, calibration, recipe, "work/weights/q4_k_m")
    >>> bundle = quantline.export(model, weights, "work/bundles/q4_k_m")
    >>> unseen = quantline.text_file("evaluation.txt", sequences=16, length=256)
    >>> truth = quantline.make_reference(model, calibration, text, unseen, "work/reference")
    >>> results = quantline.measure(bundle, truth, "work/metrics")
    >>> print(quantline.compare([bundle], "work/metrics", model))

Every call that makes files writes them atomically, and returns what reads them: the model, the
statistics, the weights, the bundle's folder, the figures. The stages make the same calls, and
record them in DVC and MLflow.
"""

from quantline.api.bundle import export
from quantline.api.choice import Comparison, compare, smallest
from quantline.api.figures import make_reference, measure
from quantline.api.weights import calibrate, load_checkpoint, quantize, text_file

__all__ = [
    "Comparison",
    "calibrate",
    "compare",
    "export",
    "load_checkpoint",
    "make_reference",
    "measure",
    "quantize",
    "smallest",
    "text_file",
]
