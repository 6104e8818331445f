"""The geometry of a forward, read from its arguments."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from zoo.diffusion import TokenLayout
from zoo.diffusion.adapters import flux_layout


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("grid", [(1, 1), (1, 9), (9, 1), (6, 7), (300, 4), (4, 300), (260, 270)], ids=str)
@pytest.mark.parametrize("batched", [False, True], ids=["2-D", "3-D"])
def test_rows_and_columns_survive_the_rounding_of_the_ids(inputs, grid, dtype, batched):
    arguments = inputs(grid, text=3, batch=1)
    ids = arguments["img_ids"].to(dtype)
    arguments["img_ids"] = ids[None] if batched else ids
    assert flux_layout(None, arguments) == TokenLayout(text=3, grid=grid)
