"""A trained network in the formats of other programs, compared with the original before it is kept."""

from __future__ import annotations

import copy
import json
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from zoo.errors import ConfigError, IntegrityError, ResourceError
from zoo.recipes.data.loader import reseed
from zoo.recipes.files import write_atomically
from zoo.recipes.run_folder import Trained, load_trained
from zoo.recipes.schema import TIMM

TOLERANCE = 1e-4  # of the largest output, for programs that sum in another order
BATCHES = (2, 3)  # sizes that are compared; the first is what a program is traced with


@dataclass(frozen=True, kw_only=True)
class Exported:
    """What was written, and the largest difference of its outputs to the original's, as a share of them."""

    path: Path
    difference: float
    use: str  # one line of Python that loads it


def export(source: str | Path, format: str, output: str | Path | None = None) -> Exported:
    """Write a run, a checkpoint or a model with weights as `format`, one of FORMATS, and compare the outputs.

    `output` defaults to the name of the model beside a run's files, or here. What is written takes images
    as the recipe normalises them, in batches of any size. Raises ConfigError for a format that does not take
    this network or a path that is used, ResourceError for a missing package, IntegrityError where the
    outputs differ, and then leaves nothing behind.
    """
    if format not in FORMATS:
        raise ConfigError(f"unknown format {format!r}; one of {', '.join(FORMATS)}")
    trained = load_trained(source)
    task = trained.recipe.task if trained.recipe is not None else None
    if task == "generation":
        raise ConfigError(
            f"{source} generates images; use `zoo generate {source}`, or diffusers/ of a finished run"
        )
    if task == "lora":
        raise ConfigError(
            f"{source} holds adapters; pytorch_lora_weights.safetensors of a finished run is what "
            "pipe.load_lora_weights reads"
        )
    ending, write = FORMATS[format]
    path = Path(output) if output is not None else _beside(Path(source), trained.name, ending)
    if path.exists():
        raise ConfigError(f"{path} exists already; name another one with --output")
    model = copy.deepcopy(trained.model).cpu().eval().requires_grad_(False)
    if path.suffix != ending and not ending.startswith("-"):
        raise ConfigError(f"{path} must end in {ending}, by which {format} files are known")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".export-") as folder:
        place = Path(folder) / path.name
        run, use = write(model, trained, place)
        difference = _difference(model, run, trained.settings.size)
        if place.is_dir():
            shutil.move(place, path)
        else:
            write_atomically(path, lambda file: file.write(place.read_bytes()))
    return Exported(path=path, difference=difference, use=use.format(path=repr(str(path))))


def _beside(source: Path, name: str, ending: str) -> Path:
    folder = source if source.is_dir() else source.parent if source.exists() else Path()
    folder = folder.parent if folder.name == "checkpoints" else folder
    return folder / f"{name.replace('/', '-')}{ending}"


def _images(batch: int, size: tuple[int, int, int]) -> Tensor:
    return torch.randn(batch, *size, generator=torch.Generator().manual_seed(batch))


@torch.inference_mode()
def _difference(model: nn.Module, run: Callable[[Tensor], Tensor], size: tuple[int, int, int]) -> float:
    """Compare the outputs for some batches. Raises IntegrityError where they differ."""
    worst = 0.0
    for batch in BATCHES:
        images = _images(batch, size)
        wanted, found = model(images), run(images)
        if found.shape != wanted.shape:
            raise IntegrityError(
                f"the export gives {tuple(found.shape)} where the model gives {tuple(wanted.shape)}; not kept"
            )
        worst = max(worst, ((found - wanted).abs().max() / wanted.abs().max().clamp(min=1e-6)).item())
    if not worst <= TOLERANCE:
        raise IntegrityError(
            f"the outputs of the export differ by {worst:.1e} of the largest; it is not kept"
        )
    return worst


# ---- formats: each writes to a path and returns what runs it, and the line that loads it


Written = tuple[Callable[[Tensor], Tensor], str]


def _torch_export(model: nn.Module, trained: Trained, path: Path) -> Written:
    program = _traced(model, trained, "torch-export")
    with _silence():
        torch.export.save(program, path)
    return program.module(), "torch.export.load({path}).module()"


def _traced(model: nn.Module, trained: Trained, format: str) -> torch.export.ExportedProgram:
    """Return the network as a program for any batch size. Raises ConfigError naming what it cannot hold."""
    example = _images(BATCHES[0], trained.settings.size)
    try:
        with _silence():
            return torch.export.export(
                model, (example,), dynamic_shapes=({0: torch.export.Dim("batch", min=1)},), strict=False
            )
    except Exception as error:  # whatever the tracer met in the network
        raise ConfigError(_refusal(trained, format, error)) from None


def _refusal(trained: Trained, format: str, error: Exception) -> str:
    text = re.sub(r"\x1b\[[0-9;]*m", "", str(error))  # torch's exporter colours its own
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    reason = next((line for line in lines if "nsupported" in line or "onvert" in line), (lines or [""])[0])
    return f"{trained.name} cannot be written as {format} ({type(error).__name__}: {reason[:160]})"


def _onnx(model: nn.Module, trained: Trained, path: Path) -> Written:
    try:
        import onnx
        import onnxruntime
        import onnxscript  # noqa: F401, torch's exporter needs it
    except ImportError as error:
        raise ResourceError(f"onnx needs {error.name}: pip install 'attnzoo[export]'") from None

    example = _images(BATCHES[0], trained.settings.size)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with _silence():
            torch.onnx.export(
                model, (example,), path, input_names=["images"], output_names=["logits"],
                dynamic_shapes=dynamic, dynamo=True, external_data=False, verbose=False,
            )  # fmt: skip
            onnx.checker.check_model(path)
    except Exception as error:  # an operation that ONNX does not have, or the tracer's refusal
        raise ConfigError(_refusal(trained, "onnx", error)) from None
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor:
        return torch.from_numpy(session.run(None, {"images": images.numpy()})[0])

    return run, "onnxruntime.InferenceSession({path})"


def _safetensors(model: nn.Module, trained: Trained, path: Path) -> Written:
    from safetensors.torch import load_file, save_file

    facts = {
        "format": "pt",
        "model": trained.name,
        "classes": json.dumps(trained.classes, ensure_ascii=False),
        "input": json.dumps(trained.settings.plain()),
    }
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, path, metadata=facts)
    again = copy.deepcopy(model)
    with torch.no_grad():
        for value in again.state_dict().values():
            value.zero_()
    again.load_state_dict(load_file(path))
    return again, "model.load_state_dict(safetensors.torch.load_file({path}))"


def _timm(model: nn.Module, trained: Trained, path: Path) -> Written:
    import timm
    from timm.models import save_for_hf

    made = trained.recipe
    if made is not None and (made.task != "classification" or made.model.probe == "attentive"):
        what = "an attentive probe" if made.task == "classification" else made.task
        raise ConfigError(
            f"timm's folders hold its classifiers, and {trained.source} is {what}; use safetensors"
        )
    arguments = made.plain()["model"]["args"] if made is not None else {}
    settings = trained.settings
    model.pretrained_cfg = {
        **model.pretrained_cfg, "num_classes": len(trained.classes), "input_size": settings.size,
        "mean": settings.mean, "std": settings.std, "interpolation": settings.interpolation,
        "crop_pct": settings.crop_pct, "label_names": trained.classes, "tag": "",
    }  # fmt: skip
    save_for_hf(model, str(path), model_args=arguments, safe_serialization=True)
    again = timm.create_model(f"local-dir:{path}", pretrained=True).eval()
    own = "" if trained.name.startswith(TIMM) else "import zoo; "
    return again, own + "timm.create_model('local-dir:' + {path}, pretrained=True)"


class _silence(warnings.catch_warnings):
    """Without what the tracers warn of, and without a trace of them in the random state."""

    def __enter__(self) -> Any:
        result = super().__enter__()
        warnings.simplefilter("ignore")
        self.state = torch.get_rng_state()
        reseed("export")
        return result

    def __exit__(self, *details: Any) -> None:
        torch.set_rng_state(self.state)
        super().__exit__(*details)


FORMATS: dict[str, tuple[str, Callable[[nn.Module, Trained, Path], Written]]] = {
    "torch-export": (".pt2", _torch_export),
    "onnx": (".onnx", _onnx),
    "safetensors": (".safetensors", _safetensors),
    "timm": ("-timm", _timm),
}
