"""Window attention by flex_attention and by xformers, window by window: only where they are named."""

from __future__ import annotations

from torch import Tensor

from zoo.kernels.peers import attend
from zoo.kernels.window.windows import in_windows


def flex(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    window_size: tuple[int, int],
    shift: tuple[int, int],
    scale: float,
    bias: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Return the output [B, Y, X, H, Dv] and the natural-log LSE [B, Y, X, H]."""

    def each(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = attend.with_flex(*rows, scale, None if bias is None else bias[None])
        return out.transpose(1, 2), lse.transpose(1, 2)[..., None]

    return in_windows(each, q, k, v, window_size, shift, bias)


def xformers(
    q: Tensor, k: Tensor, v: Tensor, window_size: tuple[int, int], shift: tuple[int, int], scale: float
) -> Tensor:
    """Return the output [B, Y, X, H, D]; every window is an image of its own."""

    def each(q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None) -> tuple[Tensor, None]:
        rows = [x.transpose(1, 2) for x in (q, k, v)]
        return attend.with_xformers(*rows, scale).transpose(1, 2), None

    return in_windows(each, q, k, v, window_size, shift, None)[0]
