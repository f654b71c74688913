"""Does a graph compute what the model computes, at other lengths than it was traced with?

A trace keeps one way through the Python code. Where that depends on the length of a text, or on
which experts its tokens are sent to, the graph is another model for any other text, and says
nothing. So each graph is run: at once, and in pieces with the states carried from one to the next.
"""

import tempfile
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper

from quantline.formats.onnx.states import Carried
from quantline.formats.onnx.subgraphs import names_read, nodes_of

TOLERANCE = 1e-3  # of the largest logit
TEXTS = 2
# Tokens that are read at once, and pieces that another text is read in. The examples of a trace
# have 3 and 1.
LONG = 23
PIECES = (5, 1, 1, 4)
# Experts of a wide mixture are nearly equal for some token, and rounding decides between them.
# So many of the positions have to agree where a model chooses.
AGREEING = 0.75
ALIGNMENT = 4096


def difference(graph: onnx.ModelProto, carried: Carried) -> str | None:
    """Return where a graph is not the model; None if it is.

    Args:
        graph: What `trace` returned, without weights.
        carried: The model that it was traced from, with weights that are not all alike.
    """
    generator = torch.Generator().manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        session = _Session(graph, carried, Path(folder))
        for pieces in ((LONG,), PIECES):
            size = (TEXTS, sum(pieces))
            ids = torch.randint(carried.vocabulary, size, generator=generator)
            with torch.inference_mode():
                expected = carried.model(input_ids=ids, use_cache=False).logits.float().numpy()
            found = session.logits(ids.numpy(), pieces)
            wrong = _disagreement(found, expected, _chooses(graph))
            if wrong is not None:
                way = "at once" if len(pieces) == 1 else f"in pieces of {pieces}"
                return (
                    f"for {size[1]} tokens {way} its logits are off by {wrong:.2g} of the largest"
                )
    return None


def _disagreement(found: np.ndarray, expected: np.ndarray, chooses: bool) -> float | None:
    """Return the largest difference, relative to the largest logit, if it is too large."""
    largest = np.abs(expected).max()
    errors = np.abs(found - expected).max(-1) / largest
    enough = AGREEING if chooses else 1.0
    # Written so that NaN fails.
    return None if (errors <= TOLERANCE).mean() >= enough else float(errors.max())


def _chooses(graph: onnx.ModelProto) -> bool:
    """Whether the model chooses among parts of itself."""
    return any(node.op_type in ("TopK", "ArgMax") for node in nodes_of(graph.graph))


class _Session:
    """The graph in onnxruntime, whose weights lie in a file that it maps."""

    def __init__(self, graph: onnx.ModelProto, carried: Carried, folder: Path) -> None:
        import onnxruntime

        self.carried = carried
        whole = onnx.ModelProto()
        whole.CopyFrom(graph)
        whole.graph.initializer.extend(_initializers(graph, carried, folder / "weights"))
        (folder / "graph.onnx").write_bytes(whole.SerializeToString())
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 4
        options.intra_op_num_threads = torch.get_num_threads()
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        # Both would copy every weight.
        options.add_session_config_entry("session.disable_prepacking", "1")
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
        self.session = onnxruntime.InferenceSession(
            folder / "graph.onnx", options, providers=["CPUExecutionProvider"]
        )

        # The exporter leaves out what a model takes and does not read.
        names = {value.name for value in graph.graph.input}
        self.takes = [name for name in carried.inputs if name in names]

    def logits(self, ids: np.ndarray, pieces: tuple[int, ...]) -> np.ndarray:
        """Return the logits of a text that is read in pieces."""
        states = [state.zeros(len(ids), 0).numpy() for state in self.carried.states]
        parts = []
        past = 0
        for tokens in pieces:
            inputs = self.carried.example(len(ids), past, tokens)
            values = {name: inputs[name].numpy() for name in self.takes}
            values["input_ids"] = ids[:, past : past + tokens]
            names = [state.past for state in self.carried.states]
            values |= dict(zip(names, states, strict=True))
            logits, *states = self.session.run(None, values)
            parts.append(logits)
            past += tokens
        return np.concatenate(parts, 1)


def _initializers(graph: onnx.ModelProto, carried: Carried, path: Path) -> list[TensorProto]:
    """Write the weights that a graph reads, a shared one once, and describe them."""
    read = names_read(graph.graph)
    found = []
    written: dict[int, tuple[int, int]] = {}
    with path.open("wb") as file:
        for name, tensor in carried.weights().items():
            if name not in read:
                continue
            array = tensor.detach().contiguous().numpy()
            memory = tensor.data_ptr()
            if memory not in written:
                file.write(bytes(-file.tell() % ALIGNMENT))
                written[memory] = (file.tell(), array.nbytes)
                file.write(array.tobytes())
            offset, length = written[memory]
            described = TensorProto(
                name=name,
                dims=array.shape,
                data_location=TensorProto.EXTERNAL,
                data_type=helper.np_dtype_to_tensor_dtype(array.dtype),
            )
            place = {"location": path.name, "offset": offset, "length": length}
            for key, value in place.items():
                described.external_data.add(key=key, value=str(value))
            found.append(described)
    return found
