"""Any backbone and any decoder make one network, which sees any size, and its views add up."""

from __future__ import annotations

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import nn

import zoo
from zoo.errors import ConfigError
from zoo.heads import HEADS, Segmenter, SemanticFPN, UPerNet, segment


def small(head: str = "upernet", **keywords: object) -> Segmenter:
    torch.manual_seed(0)
    return Segmenter(zoo.create_model("nat_digits", num_classes=0), 5, head=head, channels=16, **keywords)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("size", [(64, 64), (49, 75), (96, 32)])
def test_logits_have_the_resolution_of_the_finest_stage(head, size):
    model = small(head).eval()
    logits = model(torch.randn(2, 3, *size))
    assert logits.shape == (2, 5, -(-size[0] // 4), -(-size[1] // 4))
    assert logits.isfinite().all()


@pytest.mark.parametrize("head", HEADS)
def test_every_parameter_learns(head):
    model = small(head, auxiliary=8)
    logits, second = model(torch.randn(2, 3, 48, 48), auxiliary=True)
    assert second.shape == (2, 5, 6, 6)
    (logits.square().mean() + second.square().mean()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name


def test_parameters_are_named_as_in_the_published_checkpoints():
    keys = set(small(auxiliary=8).state_dict())
    assert {
        "decode_head.conv_seg.weight",
        "decode_head.psp_modules.3.1.conv.weight",
        "decode_head.psp_modules.0.1.bn.running_mean",
        "decode_head.bottleneck.conv.weight",
        "decode_head.lateral_convs.1.bn.bias",
        "decode_head.fpn_convs.0.conv.weight",
        "decode_head.fpn_bottleneck.conv.weight",
        "auxiliary_head.convs.0.conv.weight",
        "auxiliary_head.conv_seg.bias",
        "backbone.patch_embed.proj.0.weight",
    } <= keys
    assert not any(key.startswith(("backbone.norm.", "backbone.head.")) for key in keys)


@pytest.mark.parametrize(("name", "millions"), [("nat_mini", 50), ("nat_tiny", 58), ("nat_small", 82)])
def test_the_published_network_has_as_many_parameters_as_its_paper_says(name, millions):
    """UPerNet with 150 classes of ADE20K; the authors publish 50, 58 and 82 million."""
    with torch.device("meta"):
        model = Segmenter(zoo.create_model(name, num_classes=0), 150, auxiliary=256)
    assert round(sum(p.numel() for p in model.parameters()) / 1e6) == millions


def test_semantic_fpn_doubles_as_often_as_the_strides_say():
    head = SemanticFPN([8, 16, 32, 64], 3, reductions=[4, 8, 16, 32], channels=8, fpn_channels=16)
    doublings = [sum(isinstance(m, nn.Upsample) for m in branch) for branch in head.scale_heads]
    assert doublings == [0, 1, 2, 3]
    assert [len(branch) for branch in head.scale_heads] == [1, 2, 4, 6]


@pytest.mark.parametrize("name", ["nat_isotropic_small", "vitrpb_small"])
def test_a_body_of_one_resolution_gets_four(name):
    with torch.device("meta"):
        model = Segmenter(zoo.create_model(name, num_classes=0), 5, head="semantic_fpn", channels=16)
        assert model.stages == [2, 5, 8, 11]
        sizes = [tuple(x.shape[-2:]) for x in model.features(torch.empty(1, 3, 224, 224, device="meta"))]
    assert sizes == [(56, 56), (28, 28), (14, 14), (7, 7)]


@pytest.mark.parametrize("name", ["resnet18", "test_vit"])
def test_models_of_timm_are_backbones_too(name):
    model = Segmenter(timm.create_model(name), 4, head="upernet", channels=8).eval()
    side = timm.create_model(name).pretrained_cfg["input_size"][-1]
    assert model(torch.randn(1, 3, side, side)).shape[1] == 4


def test_layer_decay_reaches_backbone_and_decoder():
    groups = create_optimizer_v2(small(), opt="adamw", lr=1.0, layer_decay=0.5).param_groups
    scales = sorted({group["lr_scale"] for group in groups})
    assert len(scales) > 4 and scales[-1] == 1.0
    model = small()
    assert {name for name in model.no_weight_decay()} == {
        name for name, _ in model.named_parameters() if name.endswith(".rpb")
    }


@pytest.mark.slow
@pytest.mark.parametrize("head", HEADS)
def test_a_segmenter_compiles_and_exports(head):
    model = small(head).eval()
    images = torch.randn(2, 3, 64, 64)
    expected = model(images)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    assert torch.allclose(compiled(images), expected, atol=1e-5)
    exported = torch.export.export(model, (images,)).module()
    assert torch.allclose(exported(images), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("keywords", "words"),
    [
        ({"head": "upernett"}, "did you mean upernet"),
        ({"stages": [0, 3]}, r"0\.\.2"),
        ({"stages": [1, 0]}, "must rise"),
        ({"stages": 1}, r"stages must be whole numbers such as \(0, 1\), found 1"),
        ({"stages": [0.5]}, r"stages must be whole numbers .* found \[0\.5\]"),
        ({"num_classes": 0}, "num_classes must be a whole number from 1, found 0"),
        ({"channels": 0}, "channels must be a whole number from 1, found 0"),
        ({"channels": 0, "head": "semantic_fpn"}, "channels must be a whole number from 1, found 0"),
        ({"auxiliary": -1}, "auxiliary must be a whole number from 0, found -1"),
    ],
)
def test_wrong_arguments_are_named_and_leave_the_backbone_whole(keywords, words):
    backbone = zoo.create_model("nat_digits")
    keys = list(backbone.state_dict())
    with pytest.raises(ConfigError, match=words):
        Segmenter(backbone, **{"num_classes": 5, **keywords})
    assert list(backbone.state_dict()) == keys


@pytest.mark.parametrize("source", ["none", "zoo", "timm"])
def test_what_is_no_backbone_is_refused(source):
    name = {"zoo": "nat_digits", "timm": "resnet10t"}.get(source)
    wrong = timm.create_model(name, features_only=True) if name else None
    with pytest.raises(ConfigError, match="backbone must be a model .*made without features_only, found"):
        Segmenter(wrong, 3)


def test_decoders_by_themselves_refuse_no_class_and_no_width():
    with pytest.raises(ConfigError, match="num_classes must be a whole number from 1, found 0"):
        UPerNet([4, 8], 0)
    with pytest.raises(ConfigError, match="channels must be a whole number from 1, found 0"):
        UPerNet([4, 8], 3, channels=0)
    with pytest.raises(ConfigError, match="fpn_channels must be a whole number from 1, found 0"):
        SemanticFPN([4, 8], 3, reductions=[4, 8], fpn_channels=0)


# ---- inference


class Colours(nn.Module):
    """Logits are the image itself: what a pixel shows is its class, wherever it lies."""

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return images


def test_one_view_gives_the_log_probabilities_of_the_logits():
    images = torch.randn(2, 3, 10, 14)
    found = segment(Colours(), [images], (10, 14))
    assert torch.allclose(found, images.log_softmax(1), atol=1e-6)


@pytest.mark.parametrize(("window", "stride"), [(8, None), (8, 3), (8, 8), (5, 5), (100, None), (14, 1)])
def test_windows_cover_every_pixel_and_agree_where_they_overlap(window, stride):
    images = torch.randn(1, 3, 10, 14)
    found = segment(Colours(), [images], (10, 14), window=window, stride=stride)
    assert torch.allclose(found, images.log_softmax(1), atol=1e-5)


def test_windows_are_what_the_network_sees():
    seen = []

    class Watcher(Colours):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.append(tuple(images.shape[-2:]))
            return images

    segment(Watcher(), [torch.randn(1, 3, 12, 20)], (12, 20), window=8, stride=4)
    assert set(seen) == {(8, 8)} and len(seen) == 2 * 4


@pytest.mark.parametrize("size", [(8, 8), (12, 20), (5, 20), (5, 3)])
def test_a_model_of_one_size_sees_no_other(size):
    seen = set()

    class Square(Colours):
        pretrained_cfg = {"fixed_input_size": True, "input_size": (3, 8, 8)}

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            seen.add(tuple(images.shape[-2:]))
            return images

    images = torch.randn(2, 3, *size)
    found = segment(Square(), [images], size)
    assert torch.allclose(found, images.log_softmax(1), atol=1e-5) and seen == {(8, 8)}


def test_mirrored_views_come_back_mirrored():
    images = torch.randn(1, 3, 6, 6)
    found = segment(Colours(), [images], (6, 6), flip=True)
    assert torch.allclose(found, images.log_softmax(1), atol=1e-5)


def test_views_are_averaged_as_probabilities():
    one, other = torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 8, 8)
    one[:, 0], other[:, 1] = 2.0, 4.0
    found = segment(Colours(), [one, other], (4, 4)).exp()
    expected = (one.softmax(1) + other[..., :4, :4].softmax(1)) / 2
    assert torch.allclose(found, expected, atol=1e-6)


def test_upernet_takes_one_image_in_evaluation():
    head = UPerNet([4, 8], 3, channels=8).eval()
    assert head([torch.randn(1, 4, 8, 8), torch.randn(1, 8, 4, 4)]).shape == (1, 3, 8, 8)
