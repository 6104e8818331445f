"""The functions of natten with their signatures, computed by `neighborhood_attention`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from zoo.errors import did_you_mean
from zoo.kernels.neighborhood.op import PerAxis, neighborhood_attention

BACKENDS = {"cutlass-fna", "hopper-fna", "blackwell-fna", "flex-fna"}
TUNING = {
    "attention_kwargs",
    "q_tile_shape",
    "kv_tile_shape",
    "backward_q_tile_shape",
    "backward_kv_tile_shape",
    "backward_kv_splits",
    "backward_use_pt_reduction",
    "run_persistent_kernel",
    "kernel_schedule",
    "torch_compile",
}


def _natten(rank: int) -> Callable[..., Tensor | tuple[Tensor, Tensor]]:
    def function(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kernel_size: PerAxis[int],
        stride: PerAxis[int] = 1,
        dilation: PerAxis[int] = 1,
        is_causal: PerAxis[bool] | None = False,
        scale: float | None = None,
        additional_keys: Tensor | None = None,
        additional_values: Tensor | None = None,
        *,
        backend: str | None = None,
        return_lse: bool = False,
        **tuning: Any,
    ) -> Tensor | tuple[Tensor, Tensor]:
        if query.ndim != rank + 3:
            raise ValueError(
                f"query of na{rank}d must be [B, {rank} grid axes, H, D], found shape {tuple(query.shape)}"
            )
        for name in tuning.keys() - TUNING:
            near = did_you_mean(name, TUNING)
            raise TypeError(f"na{rank}d got an unexpected keyword argument {name!r}{near}")
        return neighborhood_attention(
            query,
            key,
            value,
            kernel_size,
            dilation=dilation,
            stride=stride,
            is_causal=False if is_causal is None else is_causal,
            scale=scale or None,  # natten takes 0 for the default too
            extra_k=additional_keys,
            extra_v=additional_values,
            return_lse=return_lse,
            backend="auto" if backend is None or backend in BACKENDS else backend,
        )

    function.__name__ = function.__qualname__ = f"na{rank}d"
    function.__doc__ = f"""Attend in {rank}-D neighborhoods; the signature is that of natten's na{rank}d.

    Shapes: query, key, value [B, {rank} grid axes, H, D]; additional_keys and additional_values [B, n, H, D].
    natten's own backend names mean `auto`; arguments that only tune its kernels (tile shapes, splits,
    schedules, torch_compile, attention_kwargs) are accepted and change nothing.
    Raises: as `neighborhood_attention`; TypeError for an argument that natten does not have either.
    """
    return function


na1d, na2d, na3d = _natten(1), _natten(2), _natten(3)
