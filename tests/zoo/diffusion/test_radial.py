"""The masks of radial attention: the released rule to the bit, sparsities as published, not its faults."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("diffusers", reason="pip install 'attnzoo[diffusion]'")

from goldens import cases, golden
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_diffusion import HUNYUAN, WAN, noise, train_lora
from torch import Tensor

from zoo import ConfigError, diffusion
from zoo.diffusion import radial_block_mask, radial_token_mask
from zoo.diffusion.handle import PLANS


def unpack(packed: Tensor, rows: int, columns: int) -> Tensor:
    return torch.from_numpy(
        np.unpackbits(packed.numpy())[: rows * columns].reshape(rows, columns).astype(bool)
    )


def sparsity(frames: int, tokens: int, **rule: object) -> float:
    """Percent of the video's blocks that are left out."""
    size = rule.get("block_size", 128)
    mask = radial_block_mask(frames, tokens, text_tokens=-frames * tokens % size, keep_diagonal=False, **rule)
    video = frames * tokens // size
    return 100 * (1 - mask[:video, :video].double().mean().item())


# The rule --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", cases("radial"))
def test_it_is_the_released_mask_to_the_bit(path):
    case, stored = golden().load_case(path)
    args, mask = case["args"], case["mask"]
    wanted = unpack(stored["mask_packed"], mask["rows"], mask["cols"])
    if case["family"] == "radial_paper":
        sizes = (args["num_frames"], args["tokens_per_frame"])
        assert torch.equal(radial_token_mask(*sizes), wanted)
        with_sink = unpack(stored["mask_sink_packed"], mask["rows"], mask["cols"])
        assert torch.equal(radial_token_mask(*sizes, sink=True), with_sink)
        return
    found = radial_block_mask(
        args["num_frames"], args["tokens_per_frame"],
        text_tokens=args["seq_len"] - args["video_token_num"], block_size=args["block_size"],
        decay_factor=args["decay_factor"], model_type=args["model_type"], keep_diagonal=False,
    )  # fmt: skip
    assert torch.equal(found, wanted)
    assert torch.equal(found.sum(dim=1).int(), stored["row_counts"])


@pytest.mark.parametrize(
    ("percent", "frames", "tokens", "rule"),
    [
        (73.61, 41, 3840, {"model_type": "wan"}),  # 161 frames; the paper says 73.6
        (82.2, 64, 3600, {"model_type": "hunyuan"}),
        (80.79, 64, 3600, {"model_type": "hunyuan", "sink": True}),  # 253 frames; the paper says 80.8
        (81.6, 64, 3840, {"model_type": "hunyuan"}),
        (80.2, 64, 3840, {"model_type": "hunyuan", "sink": True}),
        (88.5, 128, 3840, {"model_type": "hunyuan"}),
        (87.8, 128, 3840, {"model_type": "hunyuan", "sink": True}),
        (71.3, 18, 3840, {"model_type": "wan", "decay_factor": 0.2}),
        (56.9, 18, 3840, {"model_type": "wan"}),
        (73.9, 21, 3840, {"model_type": "wan", "decay_factor": 0.2}),
        (72.5, 30, 3840, {"model_type": "hunyuan", "decay_factor": 0.95}),
        (69.9, 30, 3840, {"model_type": "hunyuan", "decay_factor": 0.95, "sink": True}),
        (70.7, 30, 3840, {"model_type": "hunyuan"}),
        (65.1, 20, 3840, {"model_type": "wan", "decay_factor": 0.8, "block_size": 64}),
        (74.0, 41, 3600, {"model_type": "wan"}),
    ],
    ids=str,
)
def test_sparsities_are_the_published_ones(percent, frames, tokens, rule):
    assert sparsity(frames, tokens, **rule) == pytest.approx(percent, abs=0.1)


def test_a_mask_of_540_blocks_computes_a_handful_of_its_frame_pairs(monkeypatch):
    from zoo.layers import radial

    computed, original = [], radial._blocks_of_band
    monkeypatch.setattr(radial, "_blocks_of_band", lambda *args: computed.append(args) or original(*args))
    assert radial_block_mask(18, 3840, decay_factor=0.2).shape == (540, 540)  # 324 pairs of frames
    assert len(computed) < 10
    computed.clear()
    radial_block_mask(21, 3600, decay_factor=0.2)  # frames that begin inside a block
    assert len(computed) == len(set(computed)) < 441


def slow_blocks(tokens: Tensor, size: int) -> Tensor:
    """A block is True where any pair of its tokens is."""
    blocks = -(-len(tokens) // size)
    padded = torch.nn.functional.pad(tokens, (0, blocks * size - len(tokens)) * 2)
    return padded.view(blocks, size, blocks, size).any(dim=3).any(dim=1)


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 9), tokens=st.integers(1, 40), size=st.integers(1, 9), sink=st.booleans(),
    text=st.integers(0, 12),
)  # fmt: skip
def test_the_printed_rule_keeps_every_pair_of_the_equation(frames, tokens, size, sink, text):
    mask = radial_block_mask(
        frames, tokens, text_tokens=text, block_size=size, sink=sink, rule="printed", keep_diagonal=False
    )
    video = frames * tokens
    pairs = torch.ones(video + text, video + text, dtype=torch.bool)
    pairs[:video, :video] = radial_token_mask(frames, tokens, sink=sink)
    assert torch.equal(mask, slow_blocks(pairs, size))


def slow_released(frames: int, tokens: int, size: int, factor: float, threshold: float, sink: bool) -> Tensor:
    """The released rule pair by pair, on an explicit canvas of tokens."""
    blocks = -(-frames * tokens // size)
    out = torch.zeros(blocks + 2, blocks + 2, dtype=torch.bool)
    power = 2 ** tokens.bit_length()
    place = torch.arange(tokens)
    for i in range(frames):
        for j in range(frames):
            d = abs(i - j)
            length = power / 2 ** d.bit_length()
            width = tokens if d <= 1 else max(size, length * factor)
            kept = length >= threshold or d % int(threshold / length) == 0
            band = ((place[:, None] - place).abs() <= width) & kept
            if sink and j == 0:
                band = torch.ones_like(band)
            span = -(-tokens // size) * size
            row, column = i * tokens, j * tokens
            canvas = torch.zeros(span + row % size, span + column % size, dtype=torch.bool)
            canvas[row % size :, column % size :][:tokens, :tokens] = band
            cut = canvas[:span, :span].view(span // size, size, span // size, size)
            density = cut.sum(dim=1) / size
            enough = (density > 1 / 3).sum(-1) / ((density > 0).sum(-1) + 1e-9) > 0.6
            out[row // size :, column // size :][: len(enough), : len(enough)] |= enough
    out = out[:blocks, :blocks]
    out[frames * tokens // size :] = out[:, frames * tokens // size :] = True
    return out


@settings(max_examples=60, deadline=None)
@given(
    frames=st.integers(1, 9), tokens=st.integers(1, 40), size=st.sampled_from([1, 2, 4, 7, 8, 16]),
    factor=st.sampled_from([0.2, 0.5, 0.95, 1.0, 3.0]), threshold=st.sampled_from([1, 8, 20, 128]),
    sink=st.booleans(),
)  # fmt: skip
def test_the_released_rule_is_the_one_written_out(frames, tokens, size, factor, threshold, sink):
    found = radial_block_mask(
        frames, tokens, block_size=size, decay_factor=factor, decimation_threshold=threshold, sink=sink,
        keep_diagonal=False,
    )  # fmt: skip
    assert torch.equal(found, slow_released(frames, tokens, size, factor, threshold, sink))


# What the released code gets wrong ------------------------------------------------------------------------


def test_the_sink_is_an_argument_and_the_model_type_its_default():
    plain, wan = (radial_block_mask(12, 256, model_type=kind) for kind in ("hunyuan", "wan"))
    assert torch.equal(plain, plain.T) and not torch.equal(wan, wan.T)
    assert wan[:, :2].all() and not plain[:, :2].all()
    assert torch.equal(radial_block_mask(12, 256, model_type="hunyuan", sink=True), wan)
    assert torch.equal(radial_block_mask(12, 256, sink=False), plain)


def test_adjacent_frames_of_small_videos_are_kept_with_a_smaller_threshold():
    # 64 tokens per frame: the fixed threshold of 128 drops frames next to each other.
    frames = radial_block_mask(8, 64, block_size=32, model_type="hunyuan").view(8, 2, 8, 2).any(3).any(1)
    assert not frames.diagonal(1).any()
    frames = radial_block_mask(8, 64, block_size=32, model_type="hunyuan", decimation_threshold=32)
    assert frames.view(8, 2, 8, 2).any(3).any(1).diagonal(1).all()


@pytest.mark.parametrize("tokens", [1, 30, 42, 100, 200, 3600])
@pytest.mark.parametrize("frames", [1, 2, 21])
def test_no_row_is_empty_whatever_the_frames_and_their_sizes(frames, tokens):
    mask = radial_block_mask(frames, tokens, model_type="hunyuan")
    assert mask.shape == (-(-frames * tokens // 128),) * 2
    assert mask.diagonal().all() and mask.any(dim=1).all() and mask.any(dim=0).all()
    released = radial_block_mask(frames, tokens, model_type="hunyuan", keep_diagonal=False)
    assert torch.equal(released | torch.eye(len(mask), dtype=torch.bool), mask)


def test_the_released_rule_loses_every_video_block_of_tiny_frames():
    assert not radial_block_mask(16, 40, model_type="hunyuan", keep_diagonal=False)[:5, :5].any()


def test_a_length_that_is_no_multiple_of_the_block_is_no_error():
    mask = radial_block_mask(21, 3600)  # 81 frames at 720 x 1280: 75,600 tokens
    assert mask.shape == (591, 591) and mask[-1].all()


def test_sizes_and_settings_leave_nothing_behind():
    first = radial_block_mask(8, 128)
    radial_block_mask(8, 256, decay_factor=0.2)
    radial_block_mask(6, 128)
    assert torch.equal(radial_block_mask(8, 128), first)
    first.zero_()  # what is returned belongs to the caller
    assert radial_block_mask(8, 128).any()


def test_a_handle_keeps_a_bounded_number_of_geometries_and_makes_each_once(monkeypatch):
    model, made = WAN.build(1), []
    original = diffusion.radial.radial_block_mask

    def count(*args: object, **kwargs: object) -> Tensor:
        made.append(args)
        return original(*args, **kwargs)

    with diffusion.apply_radial_attention(model, block_size=4, decimation_threshold=8) as handle:
        monkeypatch.setattr(diffusion.radial, "radial_block_mask", count)
        for _ in range(2):
            for timestep in (900.0, 500.0):
                with torch.no_grad():
                    model(**WAN.inputs((5, 2, 2), timestep=timestep))
                    model(**WAN.inputs((5, 2, 4), timestep=timestep))
        assert len(made) == 2
        for frames in range(2, 6 + PLANS):
            with torch.no_grad():
                model(**WAN.inputs((frames, 1, 1), batch=1))
        assert len(handle._plans) == PLANS


def test_batch_elements_are_apart_and_a_negative_prompt_may_be_padded_otherwise():
    model = HUNYUAN.build()
    inputs = HUNYUAN.inputs((5, 4, 4))
    with torch.no_grad(), diffusion.apply_radial_attention(model, block_size=4, decimation_threshold=8):
        both = model(**inputs)[0]
        for i in range(2):
            one = {name: x[i : i + 1] if torch.is_tensor(x) else x for name, x in inputs.items()}
            torch.testing.assert_close(model(**one)[0], both[i : i + 1], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("tiny", [WAN, HUNYUAN], ids=repr)
def test_lora_for_longer_videos_trains_and_travels_as_diffusers_saves_it(tiny, tmp_path):
    pytest.importorskip("peft", reason="pip install 'attnzoo[diffusion]'")
    from peft.utils import get_peft_model_state_dict

    settings = {"block_size": 4, "decimation_threshold": 8}
    grid, pipe, other = (9, 2, 4), tiny.pipe(), tiny.pipe()  # longer than the other tests' videos
    inputs = tiny.inputs(grid)
    with diffusion.apply_radial_attention(pipe, **settings):
        train_lora(
            pipe.transformer, ["to_q", "to_k", "to_v", "to_out.0"], lambda: pipe.transformer(**inputs)[0]
        )
        wanted = tiny.generate(pipe, grid, steps=2)
    layers = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights(tmp_path, transformer_lora_layers=layers)
    with diffusion.apply_radial_attention(other, **settings):
        plain = tiny.generate(other, grid, steps=2)
        other.load_lora_weights(tmp_path)
        torch.testing.assert_close(tiny.generate(other, grid, steps=2), wanted)
        other.unload_lora_weights()
        assert torch.equal(tiny.generate(other, grid, steps=2), plain)
    assert (wanted - plain).abs().max() > 1e-3


def test_long_videos_keep_their_memory_linear():
    # 30,720 tokens: their dense mask alone would be a gigabyte in bool.
    query = noise(1, 30_720, 1, 8)
    layout = diffusion.TokenLayout(text=0, grid=(16, 40, 48))
    config = diffusion.RadialConfig(decay_factor=0.2)
    adapter = next(a for a in diffusion.adapters.ADAPTERS if "Wan" in a.model.__name__)
    plan = config.plan(adapter, layout, 0, torch.device("cpu"), None)
    assert plan.pairs < 0.5 * layout.tokens**2
    assert sum(x.numel() for x in (plan.blocks.offsets, plan.blocks.indices)) < 240 * 241
    assert config.chosen_backend(query, query, layout, plan) == "cpu"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_frames": 0}, "num_frames .* found 0"),
        ({"tokens_per_frame": 1.5}, "tokens_per_frame .* found 1.5"),
        ({"text_tokens": -1}, "text_tokens .* found -1"),
        ({"block_size": True}, "block_size .* found True"),
        ({"block_size": 10**9}, "block_size must be at most 65536 tokens, found 1000000000"),
        ({"keep_diagonal": "no"}, "keep_diagonal must be True or False, found .no."),
        ({"decay_factor": 0.0}, "decay_factor .* found 0.0"),
        ({"decimation_threshold": float("nan")}, "decimation_threshold .* found nan"),
        ({"model_type": "wna"}, "'wna'; did you mean wan"),
        ({"rule": "paper"}, "released, printed, found 'paper'"),
        ({"sink": "yes"}, "sink .* found 'yes'"),
    ],
    ids=str,
)
def test_wrong_arguments_are_named(change, message):
    with pytest.raises(ConfigError, match=message):
        radial_block_mask(**{"num_frames": 4, "tokens_per_frame": 8, **change})
