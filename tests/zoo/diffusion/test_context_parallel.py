"""Two processes with a part of the sequence each: refused, because a mask of the whole would not fit it."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from diffusers import ContextParallelConfig
from tiny_diffusion import WAN
from torch import multiprocessing

from zoo import ConfigError, diffusion

pytestmark = pytest.mark.slow
RADIAL: dict[str, Any] = {"block_size": 4, "decimation_threshold": 8}


def parallel(model: torch.nn.Module) -> torch.nn.Module:
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    return model


@torch.no_grad()
def one_of_two(rank: int, folder: str) -> None:
    """What every process does; diffusers believes that its accelerator is a CPU."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    cpu = mock.patch("torch._C._get_accelerator", return_value=torch.device("cpu"))
    count = mock.patch("torch.accelerator.device_count", return_value=2)
    with cpu, count:
        inputs = WAN.inputs((4, 4, 4))
        alone = WAN.build()(**inputs)[0]
        together = parallel(WAN.build())
        torch.testing.assert_close(together(**inputs)[0], alone)  # so this is what users of it have

        before = dict(together.attn_processors)
        with pytest.raises(ConfigError, match="cannot run with context parallelism, found it enabled on Wan"):
            diffusion.apply_radial_attention(together, **RADIAL)
        assert all(together.attn_processors[name] is p for name, p in before.items())

        later = WAN.build()
        handle = diffusion.apply_radial_attention(later, **RADIAL)
        parallel(later)
        with pytest.raises(ConfigError, match="cannot run with context parallelism, found it enabled on Wan"):
            later(**inputs)
        handle.remove()
        torch.testing.assert_close(later(**inputs)[0], alone)  # all of the sequence, not this rank's part
    Path(folder, f"done{rank}").touch()
    torch.distributed.destroy_process_group()


def test_context_parallelism_is_refused_before_and_after_it_is_enabled(tmp_path):
    multiprocessing.spawn(one_of_two, (str(tmp_path),), nprocs=2)
    assert {path.name for path in tmp_path.glob("done*")} == {"done0", "done1"}
