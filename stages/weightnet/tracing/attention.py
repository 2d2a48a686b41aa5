"""torch's attention layer, written out: its own forward is one function of many that moves the axis of the batch."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from stages.common.stage import InputError
from stages.weightnet.tracing.written_out import require_alike, write_out


def write_out_attention(model: nn.Module) -> None:
    """Let a module's attention layers run by functions that are followed; what they give is compared with torch's own."""
    write_out(model, nn.MultiheadAttention, attend)


def attend(
    layer: nn.MultiheadAttention,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Return what the layer gives when a result attends to itself; the weights of the attention are left out.

    InputError if it attends to another, or differs from torch's own.
    """
    del need_weights
    if key_padding_mask is not None or layer.in_proj_weight is None or layer.bias_k is not None or layer.add_zero_attn:
        raise InputError("MultiheadAttention with padding, or of several sizes, is not supported")
    if key is not query or value is not query:
        raise InputError("MultiheadAttention to what is not its query is not supported")
    x = query if layer.batch_first else query.transpose(0, 1)
    parts = linear(x, layer.in_proj_weight, layer.in_proj_bias).chunk(3, -1)
    queries, keys, values = [part.unflatten(-1, (layer.num_heads, -1)).transpose(1, 2) for part in parts]
    y = scaled_dot_product_attention(
        queries, keys, values, attn_mask=attn_mask, is_causal=bool(options.get("is_causal")) and attn_mask is None
    )
    y = linear(y.transpose(1, 2).flatten(2), layer.out_proj.weight, layer.out_proj.bias)
    y = y if layer.batch_first else y.transpose(0, 1)
    with torch._C.DisableTorchFunction():
        own, _ = type(layer).forward(layer, query, key, value, attn_mask=attn_mask, need_weights=False, **options)
    require_alike(layer, own, y)
    return y, None
