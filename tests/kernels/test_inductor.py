"""A backbone of each family through inductor, in one graph, on the smallest row with one block per stage."""

from __future__ import annotations

import shutil

import pytest
import torch

import zoo

# A model compiles for a minute and more, most of it in the C++ compiler: what is here has each block once.
SMALLER = {
    "nat_digits": {"dims": (24, 48), "depths": (1, 1), "num_heads": (2, 4)},
    "biformer_digits": {"dims": (24, 48), "depths": (1, 1), "num_heads": (2, 4), "topks": (4, None)},
    "davit_digits": {"dims": (20, 40), "depths": (1, 1), "num_heads": (2, 4)},
    "dat_digits": {
        "dims": (24, 48), "stages": ("N", "D"), "num_heads": (2, 4), "groups": (1, 2), "strides": (4, 2),
        "offset_kernel_sizes": (5, 3),
    },
    "agent_digits": {
        "dims": (24, 48), "stages": ("A", "B"), "num_heads": (2, 4), "agent_num": (9, 9),
        "mlp_ratios": (2.0, 2.0),
    },
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("name", SMALLER)
def test_a_backbone_compiles_to_one_graph_with_inductor(name):
    torch._dynamo.reset()
    torch.manual_seed(0)
    model = zoo.create_model(name, **SMALLER[name]).eval()
    image = torch.randn(1, model.default_cfg["input_size"][0], 32, 32)
    # Scalar code: vectors would test the C++ compiler, and take it longer.
    with torch.no_grad(), torch._inductor.config.patch({"cpp.simdlen": 1, "compile_threads": 1}):
        compiled = torch.compile(model, fullgraph=True)
        torch.testing.assert_close(compiled(image), model(image), rtol=1e-4, atol=1e-5)
