"""Rules for tensor operations: what each does to the axis of a batch's examples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from stochbn.execution.masks import arguments
from stochbn.execution.moves import MOVES, index, moved
from stochbn.execution.places import Flow, Lookup, MixedError, Place, constant, only, uniform

__all__ = ["flows_of"]


def flows_of(
    func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], outputs: Any, flow: Lookup, examples: int
) -> Any:
    """The flows of an operation's outputs, as a list in the order of its flattened outputs.

    Raises:
        MixedError: the operation combines examples, or is not known to keep them apart.
    """
    tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
    made = [t for t in pytree.tree_leaves(outputs) if isinstance(t, Tensor)]
    inputs = [flow(t) for t in tensors]
    drawn = any(f.drawn for f in inputs)
    for f in inputs:
        if f.mixed:
            return [Flow(mixed=f.mixed, drawn=drawn) for _ in made]
    if all(f.axis is None for f in inputs):
        return [Flow(drawn=drawn) for _ in made]
    name = func._schema.name.removeprefix("aten::")
    base = name.removesuffix("_")
    bound = arguments(func, args, kwargs)
    if name in ("new_zeros", "new_ones", "new_empty", "new_full"):
        places: list[Place | None] = [None]
    elif base in _RULES:
        places = _RULES[base](bound, made, flow, examples)
    elif torch.Tag.pointwise in func.tags or base in _POINTWISE:
        places = [_broadcast(tensors, out, flow, examples) for out in made]
    elif base in MOVES:
        places = moved(func, bound, args, kwargs, made, flow, examples)
    elif base in _ALONG or base in _REDUCTIONS:
        places = _over_axes(bound, made, flow, keeps=base in _ALONG)
    else:
        raise MixedError(f"the operation {name} is not known to treat examples one by one")
    return [
        Flow(drawn=drawn) if place is None else Flow(axis=place[0], per=place[1], drawn=drawn)
        for place, _ in zip(places, made, strict=True)
    ]


def _broadcast(tensors: Sequence[Tensor], out: Tensor, flow: Lookup, examples: int) -> Place | None:
    """An elementwise operation: examples must be on the same axis of all tensors, counted from the last."""
    places = {(t.ndim - f.axis, f.per) for t in tensors if (f := flow(t)).axis is not None}
    if len(places) != 1:
        raise MixedError("an elementwise operation on tensors with the examples on different axes")
    from_last, per = next(iter(places))
    for t in tensors:
        if flow(t).axis is None and t.ndim >= from_last and not uniform(t, t.ndim - from_last, examples, flow):
            raise MixedError("an elementwise operation with numbers that depend on an example's place in the batch")
    return out.ndim - from_last, per


def _over_axes(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, *, keeps: bool) -> list[Place | None]:
    """An operation along some axes, or a reduction, but not along the axis of the examples."""
    source: Any = bound.get("self", bound.get("input"))
    axis, per = only(source, flow)
    others = [v for k, v in bound.items() if isinstance(v, Tensor) and v is not source]
    if any(not flow(t).constant and (flow(t).axis, flow(t).per) != (axis, per) for t in others):
        raise MixedError("an operation along an axis on tensors with the examples on different axes")
    dims = bound.get("dim")
    if dims is None or dims == []:
        raise MixedError("a sum, maximum or other reduction over all examples")
    along = {d % source.ndim for d in ([dims] if isinstance(dims, int) else dims)}
    if axis in along:
        raise MixedError("a sum, maximum, softmax or order over examples")
    shift = 0 if keeps or bound.get("keepdim") else sum(d < axis for d in along)
    return [(axis - shift, per)] * len(made)


def _leading(free: int) -> Callable[..., list[Place | None]]:
    """An operation on the last `free` axes, for each entry of the others."""

    def rule(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
        source: Any = bound.get("self", bound.get("input"))
        axis, per = only(source, flow)
        constant(flow, [v for v in bound.values() if v is not source])
        if axis >= source.ndim - free:
            raise MixedError("pooling, padding or resizing over examples")
        return [(axis, per)] * len(made)

    return rule


def _convolution(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    axis, per = only(bound["input"], flow)
    constant(flow, bound["weight"], bound["bias"])
    if axis or bound["input"].ndim != bound["weight"].ndim:
        raise MixedError("a convolution that has examples elsewhere than on its first axis")
    return [(0, per)] * len(made)


def _batch_norm(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    axis, per = only(bound["input"], flow)
    channels = {k: v for k, v in bound.items() if k != "input"}
    training = bound.get("training", bound.get("train", False)) or bound.get("running_mean") is None
    if axis == 1:  # the channels are the examples', as in instance normalisation
        for values in pytree.tree_leaves(channels):
            if isinstance(values, Tensor) and (not flow(values).constant or not uniform(values, 0, examples, flow)):
                raise MixedError("a batch norm with examples on the axis of its channels")
    else:
        constant(flow, channels)
        if training:
            raise MixedError("a batch norm that normalises by its mini-batch")
    saved = [(0, per) if axis == 1 and t.shape == (examples * per,) else None for t in made[1:]]
    return [(axis, per), *saved] if made[0].ndim > axis else [None] * len(made)


def _layer_norm(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    axis, per = only(bound["input"], flow)
    constant(flow, bound["weight"], bound["bias"])
    if axis >= bound["input"].ndim - len(bound["normalized_shape"]):
        raise MixedError("a layer normalisation over examples")
    return [(axis, per)] * len(made)


def _group_norm(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    axis, per = only(bound["input"], flow)
    constant(flow, bound["weight"], bound["bias"])
    if axis:
        raise MixedError("a group normalisation over examples")
    return [(axis, per)] * len(made)


def _product(first: str, second: str, *added: str) -> Callable[..., list[Place | None]]:
    """A product of matrices, or of batches of them."""

    def rule(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
        a, b = bound[first], bound[second]
        left, right = flow(a), flow(b)
        rows, columns = a.ndim - 2, b.ndim - 1
        if left.axis is not None and right.axis is not None:
            if a.ndim == 2 or left.axis or right.axis or left.per != right.per:
                raise MixedError("a product of examples with each other")
            place = 0, left.per
        elif left.axis is not None:
            if left.axis == a.ndim - 1 or (left.axis == 0 and a.ndim == 3 and not uniform(b, 0, examples, flow)):
                raise MixedError("a product that sums over examples")
            place = left.axis, left.per
        elif right.axis is not None:
            if right.axis == rows or (right.axis == 0 and b.ndim == 3 and not uniform(a, 0, examples, flow)):
                raise MixedError("a product that sums over examples")
            place = (columns if right.axis == b.ndim - 1 else 0), right.per
        else:
            raise MixedError("a sum with examples on another axis")
        for values in (bound[name] for name in added):
            from_last = made[0].ndim - place[0]
            if not flow(values).constant:
                if (values.ndim - (flow(values).axis or 0), flow(values).per) != (from_last, place[1]):
                    raise MixedError("a sum with examples on another axis")
            elif values.ndim >= from_last and not uniform(values, values.ndim - from_last, examples, flow):
                raise MixedError("a sum with numbers that depend on an example's place in the batch")
        return [place]

    return rule


def _embedding(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    constant(flow, bound["weight"])
    return [only(bound["indices"], flow)]


def _gather(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    places = {only(bound["self"], flow), only(bound["index"], flow)}
    if len(places) != 1 or bound["dim"] % bound["self"].ndim in {axis for axis, _ in places}:
        raise MixedError("entries that are gathered from other examples")
    return [next(iter(places))]


def _attention(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    places = {only(bound[name], flow) for name in ("query", "key", "value")}
    mask = next((bound[k] for k in ("attn_mask", "attn_bias") if isinstance(bound.get(k), Tensor)), None)
    if mask is not None:
        if flow(mask).axis is not None:
            if mask.ndim != bound["query"].ndim:
                raise MixedError("attention with a mask that has examples on another axis")
            places.add(only(mask, flow))
        elif mask.ndim == bound["query"].ndim and not uniform(mask, 0, examples, flow):
            raise MixedError("attention with a mask that depends on an example's place in the batch")
    if len(places) != 1 or next(iter(places))[0] != 0 or bound["query"].ndim < 3:
        raise MixedError("attention between examples")
    return [next(iter(places)) if out.ndim >= 3 else None for out in made]


def _grid_sampler(bound: dict[str, Any], made: Sequence[Tensor], flow: Lookup, examples: int) -> list[Place | None]:
    places = {only(bound["input"], flow), only(bound["grid"], flow)}
    if len(places) != 1 or next(iter(places))[0] != 0:
        raise MixedError("samples of one example at the places of another")
    return [next(iter(places))]


_POINTWISE = {
    "clone", "copy", "detach", "alias", "lift_fresh", "_to_copy", "to", "contiguous", "hardswish", "native_dropout",
    "dropout", "masked_fill", "fill", "zero", "zeros_like", "ones_like", "full_like", "empty_like",
    "addcmul", "addcdiv", "lerp", "where", "nan_to_num", "bernoulli", "prelu", "_prelu_kernel", "threshold", "isnan",
    "log_sigmoid_forward", "glu_jvp", "rrelu_with_noise",
}  # fmt: skip
_REDUCTIONS = {
    "sum", "mean", "amax", "amin", "max", "min", "argmax", "argmin", "prod", "var", "std", "var_mean", "std_mean",
    "norm", "linalg_vector_norm", "logsumexp", "any", "all", "median", "nanmedian", "mode", "aminmax", "count_nonzero",
}  # fmt: skip
_ALONG = {
    "_softmax", "_log_softmax", "_safe_softmax", "softmax", "log_softmax", "cumsum", "cumprod", "logcumsumexp",
    "cummax", "cummin", "sort", "topk", "argsort", "glu", "_fft_r2c", "_fft_c2r", "_fft_c2c",
}  # fmt: skip
_RULES: dict[str, Callable[..., list[Place | None]]] = {
    **dict.fromkeys(("convolution", "_convolution", "mkldnn_convolution", "conv2d"), _convolution),
    **dict.fromkeys(
        (
            "native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training", "batch_norm",
            "cudnn_batch_norm", "miopen_batch_norm", "_batch_norm_with_update", "_batch_norm_no_update",
        ),
        _batch_norm,
    ),
    "native_layer_norm": _layer_norm,
    "native_group_norm": _group_norm,
    "addmm": _product("mat1", "mat2", "self"),
    "mm": _product("self", "mat2"),
    "bmm": _product("self", "mat2"),
    "baddbmm": _product("batch1", "batch2", "self"),
    "linear": _leading(1),
    "embedding": _embedding,
    "index": index,
    "gather": _gather,
    "grid_sampler_2d": _grid_sampler,
    "grid_sampler_3d": _grid_sampler,
    "_scaled_dot_product_flash_attention_for_cpu": _attention,
    "_scaled_dot_product_flash_attention": _attention,
    "_scaled_dot_product_efficient_attention": _attention,
    "_scaled_dot_product_cudnn_attention": _attention,
    **{
        f"{name}{k}d{end}": _leading(k)
        for k in (1, 2, 3)
        for name in ("max_pool", "avg_pool", "adaptive_avg_pool", "_adaptive_avg_pool", "adaptive_max_pool",
                     "upsample_nearest", "_upsample_nearest_exact", "upsample_linear", "fractional_max_pool")
        for end in ("", "_with_indices")
    },
    **{f"{end}upsample_{kind}2d{tail}": _leading(2)
       for kind in ("bilinear", "bicubic") for end, tail in (("", ""), ("_", "_aa"))},
    "upsample_trilinear3d": _leading(3), "upsample_linear1d": _leading(1), "im2col": _leading(3), "col2im": _leading(2),
}  # fmt: skip
