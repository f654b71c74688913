"""Linear attention and state spaces by onnxruntime's own operator, in place of loops over a text.

transformers writes these as functions that a faster kernel of a known name can replace: the chunks
of a gated delta net, Kimi's delta attention, the scans of Mamba and Mamba 2. Their loops run as
often as a text has chunks or tokens, which a trace would freeze. All of them are one recurrence:

    S ← exp(g) · S + k ⊗ u    with u = v, or by the delta rule u = β · (v - (exp(g) · S)ᵀ k)
    o = Sᵀ q

com.microsoft's LinearAttention computes it (onnxruntime, docs/ContribOperators.md).
"""

import contextlib
import inspect
import sys
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.nn import functional
from torch.onnx import (
    register_custom_op_symbolic,
    symbolic_helper,
    unregister_custom_op_symbolic,
)
from transformers.cache_utils import Cache

from quantline.formats.onnx.symbolics import OPSET

OPERATOR = "recurrences::linear_attention"
GATED = "gated"
DELTA = "gated_delta"
# Of the square root in the norm of queries and keys, as the kernels have it.
NORM_EPSILON = 1e-6


@torch.library.custom_op(OPERATOR, mutates_args=())
def linear_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    state: torch.Tensor,
    decay: torch.Tensor,
    beta: torch.Tensor,
    heads: int,
    rule: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Compute the recurrence token by token, in torch.

    Args:
        query: [texts, tokens, heads · key width].
        key: Of the same shape.
        value: [texts, tokens, heads · value width].
        state: S before the first token, [texts, heads, key width, value width].
        decay: g, [texts, tokens, heads] or [texts, tokens, heads · key width].
        beta: [texts, tokens, heads]; not read by the rule "gated".
        heads: How many there are.
        rule: "gated" or "gated_delta".

    Returns:
        o, [texts, tokens, heads · value width], and S after the last token.
    """
    texts, tokens, _ = query.shape
    q, k, v, g, b = (x.view(texts, tokens, heads, -1) for x in (query, key, value, decay, beta))
    state = state.clone()
    outputs = []
    for n in range(tokens):
        state = state * g[:, n, :, :, None].exp()
        added = v[:, n]
        if rule == DELTA:
            added = b[:, n] * (added - torch.einsum("thkv,thk->thv", state, k[:, n]))
        state = state + k[:, n, :, :, None] * added[:, :, None, :]
        outputs.append(torch.einsum("thkv,thk->thv", state, q[:, n]).flatten(1))
    return torch.stack(outputs, 1), state


def _symbolic(g: Any, *arguments: Any) -> Any:
    """Write the recurrence as one node."""
    query, key, value, state, decay, beta, heads, rule = arguments
    read = [query, key, value, state, decay]
    rule = symbolic_helper._parse_arg(rule, "s")
    heads = symbolic_helper._parse_arg(heads, "i")
    output, present = g.op(
        "com.microsoft::LinearAttention",
        *([*read, beta] if rule == DELTA else read),
        q_num_heads_i=heads,
        kv_num_heads_i=heads,
        scale_f=1.0,
        update_rule_s=rule,
        outputs=2,
    )
    output.setType(value.type())
    present.setType(state.type())
    return output, present


def _normed(x: torch.Tensor) -> torch.Tensor:
    """Return vectors of length one."""
    return x * torch.rsqrt((x * x).sum(-1, keepdim=True) + NORM_EPSILON)


def delta_rule(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Compute chunk_gated_delta_rule or chunk_kda of flash-linear-attention.

    Args:
        query: [texts, tokens, key heads, key width].
        key: Of the same shape.
        value: [texts, tokens, heads, value width].
        g: [texts, tokens, heads], or with a last axis of the key width.
        beta: [texts, tokens, heads].
        initial_state: [texts, heads, key width, value width].
        output_final_state: Whether to return the state.
        use_qk_l2norm_in_kernel: Whether queries and keys are made one long.

    Returns:
        [texts, tokens, heads, value width], and the state after the last token.
    """
    heads = value.shape[2]
    if use_qk_l2norm_in_kernel:
        query = _normed(query)
        key = _normed(key)
    query = query * query.shape[-1] ** -0.5
    if key.shape[2] != heads:
        shared = int(heads // key.shape[2])
        query = query.repeat_interleave(shared, 2)
        key = key.repeat_interleave(shared, 2)
    if initial_state is None:
        initial_state = value.new_zeros(value.shape[0], heads, key.shape[-1], value.shape[-1])
    decay = g if g.ndim == 3 else g.flatten(2)
    out, state = linear_attention(
        query.flatten(2), key.flatten(2), value.flatten(2), initial_state, decay, beta,
        int(heads), DELTA,
    )  # fmt: skip
    return out.view(value.shape), state if output_final_state else None


def mamba_2(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    dt_bias: torch.Tensor | None = None,
    initial_states: torch.Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    **_: Any,
) -> Any:
    """Compute mamba_chunk_scan_combined of mamba-ssm.

    Args:
        hidden_states: [texts, tokens, heads, width].
        dt: [texts, tokens, heads].
        A: [heads].
        B: [texts, tokens, groups, state width].
        C: Of the same shape.
        chunk_size: Does not matter here.
        D: [heads].
        z: A gate of the shape of hidden_states.
        dt_bias: [heads].
        initial_states: [texts, heads, width, state width].
        dt_softplus: Whether dt goes through softplus.
        dt_limit: Bounds of dt.
        return_final_states: Whether to return the state too.

    Returns:
        [texts, tokens, heads, width], and the state if asked for.
    """
    heads = int(hidden_states.shape[2])
    shared = heads // int(B.shape[2])
    dt = dt if dt_bias is None else dt + dt_bias
    dt = functional.softplus(dt) if dt_softplus else dt
    if tuple(dt_limit) != (0.0, float("inf")) or not dt_softplus:
        dt = torch.clamp(dt, min=dt_limit[0], max=dt_limit[1])
    key, query = (x.repeat_interleave(shared, 2) if shared > 1 else x for x in (B, C))
    if initial_states is None:
        sizes = (hidden_states.shape[0], heads, hidden_states.shape[-1], B.shape[-1])
        initial_states = hidden_states.new_zeros(sizes)
    out, state = linear_attention(
        query.flatten(2), key.flatten(2), (hidden_states * dt[..., None]).flatten(2),
        initial_states.transpose(2, 3), A * dt, dt, heads, GATED,
    )  # fmt: skip
    out = out.view(hidden_states.shape)
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * functional.silu(z)
    return (out, state.transpose(2, 3)) if return_final_states else out


def mamba_1(
    hidden_states: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    z: torch.Tensor | None = None,
    delta_bias: torch.Tensor | None = None,
    delta_softplus: bool = False,
    return_last_state: bool = False,
    initial_state: torch.Tensor | None = None,
    **_: Any,
) -> Any:
    """Compute selective_scan_fn of mamba-ssm, every channel a head of one value.

    Args:
        hidden_states: [texts, channels, tokens].
        dt: Of the same shape.
        A: [channels, state width].
        B: [texts, state width, tokens].
        C: Of the same shape.
        D: [channels].
        z: A gate of the shape of hidden_states.
        delta_bias: [channels].
        delta_softplus: Whether dt goes through softplus.
        return_last_state: Whether to return the state too.
        initial_state: [texts, channels, state width]; the kernel itself always begins with zeros.

    Returns:
        [texts, channels, tokens], and the state if asked for.
    """
    channels, width = (int(size) for size in A.shape)
    dt = dt if delta_bias is None else dt + delta_bias[:, None]
    dt = functional.softplus(dt) if delta_softplus else dt
    steps = dt.transpose(1, 2)
    key, query = (x.transpose(1, 2).repeat(1, 1, channels) for x in (B, C))
    if initial_state is None:
        initial_state = hidden_states.new_zeros(hidden_states.shape[0], channels, width)
    out, state = linear_attention(
        query, key, (hidden_states * dt).transpose(1, 2), initial_state[..., None],
        (steps[..., None] * A).flatten(2), steps, channels, GATED,
    )  # fmt: skip
    out = out.transpose(1, 2)
    out = out if D is None else out + hidden_states * D[:, None]
    out = out if z is None else out * functional.silu(z)
    return (out, state[..., 0]) if return_last_state else out


# The kernel's name → what computes the same.
KERNELS: dict[str, Callable[..., Any]] = {
    "chunk_gated_delta_rule": delta_rule,
    "chunk_kda": delta_rule,
    "mamba_chunk_scan_combined": mamba_2,
    "selective_scan_fn": mamba_1,
}


def _replaceable(model: nn.Module) -> Iterator[tuple[Any, str, str]]:
    """Yield (Python module, name, kernel) of the functions of a model that a kernel can replace."""
    for file in {type(module).__module__ for module in model.modules()}:
        for name, value in list(vars(sys.modules[file]).items()):
            if inspect.isfunction(value) and hasattr(value, "__wrapped__"):
                kernel = inspect.getclosurevars(value).nonlocals.get("func_name")
                if kernel in KERNELS:
                    yield sys.modules[file], name, kernel


@contextlib.contextmanager
def in_place_of_loops(model: nn.Module) -> Iterator[bool]:
    """Let a model compute its recurrences by `linear_attention`, and torch write it as a node.

    Yields:
        Whether the model has any.
    """
    # Mamba's scan is never told the state of earlier tokens, which its caller has just looked up.
    last: list[torch.Tensor | None] = [None]
    look_up = Cache.get_recurrent_state

    def remembering(cache: Cache, *args: Any, **options: Any) -> torch.Tensor | None:
        last[0] = look_up(cache, *args, **options)
        return last[0]

    def scan(*args: Any, **options: Any) -> Any:
        return mamba_1(*args, **(options | {"initial_state": last[0]}))

    register_custom_op_symbolic(OPERATOR, _symbolic, OPSET)
    try:
        with contextlib.ExitStack() as stack:
            stack.enter_context(mock.patch.object(Cache, "get_recurrent_state", remembering))
            found = list(_replaceable(model))
            for module, name, kernel in found:
                function = scan if KERNELS[kernel] is mamba_1 else KERNELS[kernel]
                stack.enter_context(mock.patch.object(module, name, function))
            yield bool(found)
    finally:
        unregister_custom_op_symbolic(OPERATOR, OPSET)
