"""Neighborhood attention in Flux: the same numbers as the stock processor under the equivalent mask."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from zoo import ConfigError, diffusion, ops

TEXT = 5


def equivalent_mask(grid: tuple[int, int], text: int, **window: object) -> torch.Tensor:
    """Who sees whom: text sees all, an image token its neighborhood and the text; bool [1, 1, N, N]."""
    size = text + grid[0] * grid[1]
    mask = torch.ones(size, size, dtype=torch.bool)
    mask[text:, text:] = False
    for query, keys in enumerate(ops.neighborhood_indices(grid, **window)):
        mask[text + query, text + keys] = True
    return mask[None, None]


@torch.no_grad()
def outputs(model: torch.nn.Module, x: dict, mask: torch.Tensor | None = None) -> torch.Tensor:
    return model(**x, joint_attention_kwargs=None if mask is None else {"attention_mask": mask})[0]


@pytest.mark.parametrize("fused", [False, True], ids=["separate", "fused"])
@pytest.mark.parametrize("grid", [(6, 7), (8, 8), (1, 9), (5, 1), (1, 1)], ids=str)
@pytest.mark.parametrize("kernel_size", ["grid", 99])
def test_a_window_over_the_whole_grid_changes_nothing(flux, inputs, grid, kernel_size, fused):
    x = inputs(grid)
    if fused:
        flux.fuse_qkv_projections()
    stock = outputs(flux, x)
    with diffusion.apply_neighborhood(flux, tuple(max(2, n) for n in grid) if kernel_size == "grid" else 99):
        assert (outputs(flux, x) - stock).abs().max() <= 1e-5


@pytest.mark.parametrize(
    "window",
    [
        {"kernel_size": (3, 3)},
        {"kernel_size": (2, 5)},
        {"kernel_size": (3, 3), "dilation": (2, 1)},
        {"kernel_size": (4, 4), "stride": (2, 4)},
    ],
    ids=str,
)
@pytest.mark.parametrize("text", [TEXT, 1, 0])
def test_it_is_dense_attention_under_the_neighborhood_mask(flux, inputs, window, text):
    x = inputs((6, 7), text=text)
    wanted = outputs(flux, x, equivalent_mask((6, 7), text, **window))
    with diffusion.apply_neighborhood(flux, **window):
        found = outputs(flux, x)
    assert (found - wanted).abs().max() <= 1e-5
    assert (found - outputs(flux, x)).abs().max() > 1e-3


def test_every_gradient_is_that_of_the_mask_also_with_checkpointing(flux, inputs):
    x = inputs((6, 7))
    mask = equivalent_mask((6, 7), TEXT, kernel_size=(3, 3))

    def gradients(**kwargs: object) -> dict[str, torch.Tensor]:
        flux.zero_grad()
        flux(**x, **kwargs)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in flux.named_parameters() if p.grad is not None}

    wanted = gradients(joint_attention_kwargs={"attention_mask": mask})
    with diffusion.apply_neighborhood(flux, 3):
        plain = gradients()
        flux.enable_gradient_checkpointing()
        flux.train()
        repeated = gradients()
    assert plain.keys() == repeated.keys() == wanted.keys()
    for name, gradient in wanted.items():
        torch.testing.assert_close(plain[name], gradient, atol=1e-4, rtol=1e-3)
        torch.testing.assert_close(repeated[name], plain[name])


# torch's own remark on the float32 weights of the stock QK norm under autocast
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight:UserWarning")
@pytest.mark.parametrize("autocast", [False, True], ids=["bfloat16", "autocast"])
def test_half_precision_stays_as_near_to_the_mask_as_its_rounding(flux, inputs, autocast):
    x = inputs((6, 7))
    mask = equivalent_mask((6, 7), TEXT, kernel_size=(3, 3))
    truth = outputs(flux, x, mask)
    if not autocast:
        flux.to(torch.bfloat16)
        x = {name: y.bfloat16() if torch.is_tensor(y) else y for name, y in x.items()}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        budget = (outputs(flux, x, mask) - truth).abs().max()
        with diffusion.apply_neighborhood(flux, 3):
            assert (outputs(flux, x) - truth).abs().max() <= 2 * budget


def test_sizes_and_text_lengths_may_change_from_call_to_call(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3):
        found = [
            outputs(flux, inputs(grid, text=text)) for grid, text in [((6, 7), 5), ((7, 6), 5), ((4, 9), 8)]
        ]
    for result, (grid, text) in zip(found, [((6, 7), 5), ((7, 6), 5), ((4, 9), 8)], strict=True):
        wanted = outputs(flux, inputs(grid, text=text), equivalent_mask(grid, text, kernel_size=3))
        assert (result - wanted).abs().max() <= 1e-5


def test_a_window_larger_than_a_small_image_is_clamped_with_its_dilation_and_stride(flux, inputs):
    x = inputs((3, 7))
    wanted = outputs(
        flux, x, equivalent_mask((3, 7), TEXT, kernel_size=(3, 2), dilation=(1, 3), stride=(3, 2))
    )
    with diffusion.apply_neighborhood(flux, (5, 4), dilation=3, stride=4):
        assert (outputs(flux, x) - wanted).abs().max() <= 1e-5


def test_an_attention_mask_is_refused_and_not_dropped(flux, inputs):
    mask = torch.ones(1, 1, 47, 47, dtype=torch.bool)
    with diffusion.apply_neighborhood(flux, 3), pytest.raises(ConfigError, match="attention_mask .* 47, 47"):
        outputs(flux, inputs(), mask)


def test_stats_count_the_pairs_of_the_mask(flux, inputs):
    handle = diffusion.apply_neighborhood(flux, (3, 5), dense_steps=1)
    assert handle.stats() == diffusion.Stats(0, 0, 1.0, 0, None)
    outputs(flux, inputs(timestep=1.0))
    assert handle.stats() == diffusion.Stats(4, 0, 1.0, 0, None)
    outputs(flux, inputs(timestep=0.5))
    stats = handle.stats()
    mask = equivalent_mask((6, 7), TEXT, kernel_size=(3, 5))
    layers, batch, width = 4, 2, 32
    assert (stats.calls, stats.sparse_calls) == (8, 4)
    assert stats.keep == pytest.approx((1 + mask.float().mean().item()) / 2)
    assert stats.flops_saved == 4 * width * batch * layers * int((~mask).sum())
    assert stats.backend in {row.backend for row in ops.backends()}


def test_a_backend_asked_for_by_name_is_the_one_that_runs(flux, inputs):
    with diffusion.apply_neighborhood(flux, 3, backend="reference") as handle:
        outputs(flux, inputs())
    assert handle.stats().backend == "reference"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel_size": 1}, "kernel_size .* found 1"),
        ({"kernel_size": 3.0}, "kernel_size .* found 3.0"),
        ({"kernel_size": "7"}, "kernel_size .* found '7'"),
        ({"kernel_size": (3, 3, 3)}, r"kernel_size .* 2 of them, found \(3, 3, 3\)"),
        ({"kernel_size": 3, "dilation": 0}, "dilation .* found 0"),
        ({"kernel_size": 3, "stride": (1, 4)}, r"stride .* \(3, 3\), found \(1, 4\)"),
        ({"kernel_size": 3, "backend": "refrence"}, "backend .* 'refrence'; did you mean reference"),
        ({"kernel_size": 3, "dense_steps": -1}, "dense_steps .* found -1"),
        ({"kernel_size": 3, "dense_steps": 1.5}, "dense_steps .* found 1.5"),
        ({"kernel_size": 3, "dense_layers": 4}, "dense_layers .* 0..3, found 4"),
        ({"kernel_size": 3, "dense_layers": [9]}, "dense_layers .* found 9"),
        ({"kernel_size": 3, "dense_layers": None}, "dense_layers must be a number of layers, .* found None"),
        ({"kernel_size": 3, "dense_layers": 1.5}, "dense_layers must be a number of layers, .* found 1.5"),
        (
            {"kernel_size": 3, "dense_layers": ["single_*", "transformer_*"]},
            "at least one layer, found all 4",
        ),
        (
            {"kernel_size": 3, "dense_layers": ["transformer_blocks.1.atn"]},
            "'transformer_blocks.1.atn'; did you mean transformer_blocks.1.attn",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_is_named_and_nothing_is_changed(flux, settings, message):
    before = dict(flux.attn_processors)
    with pytest.raises(ConfigError, match=message):
        diffusion.apply_neighborhood(flux, **settings)
    assert all(flux.attn_processors[name] is processor for name, processor in before.items())
    assert not flux._forward_pre_hooks
