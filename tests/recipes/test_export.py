"""An exported model gives the outputs of the original, or is not written."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file

from zoo.cli import main
from zoo.errors import ConfigError, IntegrityError, ResourceError
from zoo.recipes import export as exports
from zoo.recipes.export import export
from zoo.recipes.run_folder import load_trained

SIDE = 32


def outputs(model: torch.nn.Module, batch: int = 5) -> torch.Tensor:
    with torch.inference_mode():
        return model(torch.randn(batch, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(9)))


def test_safetensors_hold_the_weights(finished, tmp_path):
    result = export(finished, "safetensors", tmp_path / "bare.safetensors")
    model = load_trained(finished).model
    assert result.difference == 0
    expected, found = model.state_dict(), load_file(result.path)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in found)


def test_timms_folder_is_loaded_by_timm(finished, tmp_path, capsys):
    folder = tmp_path / "for-timm"
    assert main(["export", str(finished), "--format", "timm", "--output", str(folder)]) == 0
    assert "import zoo; timm.create_model('local-dir:' + " in capsys.readouterr().out
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    assert model.pretrained_cfg["label_names"] == ["dark", "light"]
    torch.testing.assert_close(outputs(model), outputs(load_trained(finished).model))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["finished", "nat_digits"])
def test_a_torch_program_takes_any_batch(request, tmp_path, kind):
    source = request.getfixturevalue(kind) if kind == "finished" else kind
    path = tmp_path / "program.pt2"
    export(source, "torch-export", path)
    program = torch.export.load(path).module()
    for batch in (1, 5):
        torch.testing.assert_close(outputs(program, batch), outputs(load_trained(source).model, batch))


@pytest.mark.slow
def test_onnx_runs_elsewhere(tmp_path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    path = tmp_path / "digits.onnx"
    assert export("nat_digits", "onnx", path).difference < 1e-5
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    images = torch.randn(1, 3, SIDE, SIDE)
    (found,) = session.run(None, {"images": images.numpy()})
    with torch.inference_mode():
        expected = load_trained("nat_digits").model(images)
    torch.testing.assert_close(torch.from_numpy(found), expected, atol=1e-4, rtol=1e-4)


def test_an_export_that_differs_is_not_kept(finished, tmp_path, monkeypatch):
    ending, write = exports.FORMATS["safetensors"]

    def spoilt(*arguments):
        run, use = write(*arguments)
        return (lambda images: run(images) + 0.01), use

    monkeypatch.setitem(exports.FORMATS, "safetensors", (ending, spoilt))
    with pytest.raises(IntegrityError, match="differ by .* it is not kept"):
        export(finished, "safetensors", tmp_path / "bad.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("task", "words"),
    [
        ("generation", r"x generates images; use `zoo generate x`, or diffusers/ of a finished run"),
        ("lora", r"x holds adapters; pytorch_lora_weights.safetensors of a finished run"),
    ],
)
@pytest.mark.parametrize("format", exports.FORMATS)
def test_what_diffusers_reads_is_not_exported(tmp_path, monkeypatch, format, task, words):
    trained = SimpleNamespace(recipe=SimpleNamespace(task=task))
    monkeypatch.setattr(exports, "load_trained", lambda source: trained)
    with pytest.raises(ConfigError, match=words):
        export("x", format, tmp_path / "x")


def test_what_an_operation_does_not_allow_is_one_line(finished, tmp_path, monkeypatch):
    def refuse(*arguments, **keywords):
        raise RuntimeError("\x1b[31mUnsupported: data-dependent\x1b[0m shape\n" * 20)

    monkeypatch.setattr(torch.export, "export", refuse)
    with pytest.raises(
        ConfigError, match="cannot be written as torch-export .*: Unsupported: data-dep"
    ) as refused:
        export(finished, "torch-export", tmp_path / "x.pt2")
    assert "\n" not in str(refused.value) and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("format", "name", "words"),
    [
        ("tflite", "x", "one of torch-export, onnx, safetensors, timm"),
        ("safetensors", "used.safetensors", "exists already"),
        ("safetensors", "x.bin", "must end in .safetensors"),
    ],
)
def test_what_cannot_be_meant_is_refused(finished, tmp_path, format, name, words):
    (tmp_path / "used.safetensors").touch()
    with pytest.raises(ConfigError, match=words):
        export(finished, format, tmp_path / name)


def test_a_missing_package_is_named(finished, tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ResourceError, match=r"pip install 'attnzoo\[export\]'"):
        export(finished, "onnx", tmp_path / "x.onnx")
