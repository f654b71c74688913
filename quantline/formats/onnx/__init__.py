"""ONNX, for onnxruntime and onnxruntime-genai."""

from quantline.config.containers import ContainerInfo, register_container

register_container(
    ContainerInfo(
        name="onnx",
        implementation="quantline.formats.onnx.container:OnnxContainer",
        runtime="onnxruntime",
        carries=frozenset({"none", "grouped"}),
        packages=("onnx", "onnxruntime", "torch", "transformers"),
        colour="#3f8f5b",
        marker="^",
        dtypes=("float32", "float16"),
    )
)
