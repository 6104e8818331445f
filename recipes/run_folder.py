"""The folder of a run: where it is, what lies in it, and how a model comes out of it again.

config.yaml        the recipe as it was merged, interpolations unresolved
command.txt        how it was started, one line for each start
environment.json   versions and devices
classes.json       the class names
metrics.csv        losses and accuracies; tensorboard/ holds the same
checkpoints/       last.ckpt and best.ckpt
model.safetensors  of a finished run: the best weights with all that is needed to use them
curves.png and the pictures of the task; bad_files.txt
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import nn

from zoo.errors import ConfigError, DataError, IntegrityError, ResourceError, did_you_mean
from zoo.recipes.config import build, check, environment_names, parse
from zoo.recipes.data.images import at_home
from zoo.recipes.data.transforms import InputSettings
from zoo.recipes.files import load_checkpoint, write_atomically, write_text
from zoo.recipes.schema import TIMM, Recipe, pick, put
from zoo.recipes.tasks import task_of

RUNS = Path("runs")
MODEL = "model.safetensors"
PACKAGES = (
    "attnzoo", "torch", "torchvision", "timm", "triton",
    "pytorch-lightning", "torchmetrics", "numpy", "pillow",
)  # fmt: skip

# What must be the same for a run to go on: the network, what it sees, what batch and step mean, and how
# validation judges, for the best of all epochs is kept.
FROZEN = (
    "task", "seed", "model.name", "model.num_classes", "model.args", "model.freeze", "model.probe",
    "data.name", "data.batch_size", "data.balance",
    "data.image_size", "data.mean", "data.std", "data.crop_pct", "data.interpolation", "data.max_side",
    "data.ignore_index", "data.reduce_zero_label", "data.width", "data.frames", "data.words",
    "data.conditions", "inference",
    "optim.name", "optim.ema", "optim.ema_warmup", "optim.accumulate", "optim.layer_decay", "head",
    "diffusion", "data.vae", "lora", "attention",
)  # fmt: skip


def new_folder(name: str) -> Path:
    """Return the first of runs/<name>, runs/<name>-2, ... that no run has used."""
    number = 1
    while is_used(folder := RUNS / (name if number == 1 else f"{name}-{number}")) or _is_foreign(folder):
        number += 1
    return folder


def is_used(folder: Path) -> bool:
    """Tell whether a run has left a checkpoint or a model in a folder."""
    return (folder / MODEL).exists() or any((folder / "checkpoints").glob("*.ckpt"))


def _is_foreign(folder: Path) -> bool:
    return folder.exists() and not (folder / "config.yaml").exists() and any(folder.iterdir())


def latest_run(name: str) -> Path:
    """Return the run of a recipe that was active last. Raises ConfigError where there is none."""
    folders = [
        folder for folder in (RUNS / name, *RUNS.glob(f"{name}-*")) if (folder / "config.yaml").exists()
    ]
    if not folders:
        raise ConfigError(
            f"no run of {name} in {RUNS}/ to resume; name its folder after --resume, or start without it"
        )

    def active(folder: Path) -> float:
        last = folder / "checkpoints" / "last.ckpt"
        return (last if last.exists() else folder / "config.yaml").stat().st_mtime

    return max(folders, key=active)


def resume_point(where: Path) -> tuple[Path, Path | None]:
    """Return the run folder and the checkpoint to go on from; None where none had been written yet.

    `where` is a run folder or a checkpoint in one. Raises ConfigError where there is nothing to resume.
    """
    if where.is_dir():
        last = where / "checkpoints" / "last.ckpt"
        if last.exists():
            return where, last
        if (where / MODEL).exists() or not (where / "config.yaml").exists():
            raise ConfigError(f"{where} holds no run to resume (no checkpoints/last.ckpt)")
        return where, None
    if not where.exists():
        parent = where.parent.parent if where.suffix == ".ckpt" else where.parent
        near = did_you_mean(where.name, [entry.name for entry in parent.glob("*")])
        raise ConfigError(f"nothing to resume at {where}{near or '; wanted a run folder or a .ckpt file'}")
    return (where.parent.parent if where.parent.name == "checkpoints" else where.parent), where


def refuse_another(made: Recipe, saved: dict[str, Any], where: Path) -> list[str]:
    """Raise ConfigError naming the fields in which a recipe is another run than the saved one.

    What a run of an older version does not say was as it is by default. Returns the differences that a run
    may go on with, as texts `optim.lr 0.001 -> 0.0005`.
    """
    frozen, free = [], []
    now, usual, said = made.plain(), type(made)().plain(), _leaf_keys(saved)
    for key in said | _leaf_keys(now):
        before, after = pick(saved if key in said else usual, key), pick(now, key)
        if before != after and key != "name":
            differs = f"{key} {before} -> {after}"
            (frozen if key.startswith(FROZEN) else free).append(differs)
    if frozen:
        raise ConfigError(
            f"{where} is of another run: {'; '.join(sorted(frozen))}; "
            "resume it with its own values, or start a new run"
        )
    return sorted(free)


def _leaf_keys(container: dict[str, Any], prefix: str = "") -> set[str]:
    keys = set()
    for name, value in container.items():
        deeper = isinstance(value, dict) and name != "args"
        keys |= _leaf_keys(value, f"{prefix}{name}.") if deeper else {f"{prefix}{name}"}
    return keys


@contextmanager
def finding_data(made: Recipe) -> Iterator[None]:
    """Say with a DataError, where it is so, that a run's relative data.root leads nowhere from here."""
    try:
        yield
    except DataError as error:
        root = at_home(made.data.root) if made.data.root is not None else Path()
        if not root.is_absolute() and not root.exists():
            error.args = (
                f"{error}; data.root={made.shown('data.root')} is relative to where the command runs: run it "
                "where the training was started, or give data.root=FOLDER",
            )
        raise


def lock(folder: Path) -> AbstractContextManager[Any]:
    """Hold a run folder for one process. Raises ConfigError where another one holds it."""
    folder.mkdir(parents=True, exist_ok=True)
    held = FileLock(folder / ".lock")
    try:
        held.acquire(timeout=0)
    except Timeout:
        raise ConfigError(
            f"{folder} is in use by another process; wait for it or take another --run-dir"
        ) from None
    return held


def write_start(folder: Path, made: Recipe, command: str, classes: Sequence[str]) -> None:
    """Write what is known before the first step."""
    write_text(folder / "config.yaml", made.yaml())
    write_text(folder / "classes.json", json.dumps(list(classes), ensure_ascii=False, indent=0))
    environment = {
        "started": datetime.now().astimezone().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "threads": torch.get_num_threads(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "packages": {name: _version(name) for name in PACKAGES},
    }
    write_text(folder / "environment.json", json.dumps(environment, indent=2))
    with (folder / "command.txt").open("a", encoding="utf-8", errors="backslashreplace") as file:
        file.write(command + "\n")


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


# ---- models


@dataclass(kw_only=True)
class Trained:
    """A network with what is needed to use it: class names, input settings, and where it comes from.

    `folders` are other names of the classes, by which data sets call their folders.
    """

    model: nn.Module
    name: str
    classes: list[str]
    settings: InputSettings
    recipe: Recipe | None
    source: str
    folders: list[str] = field(default_factory=list)


def build_backbone(made: Recipe, num_classes: int) -> nn.Module:
    """Return the backbone of a recipe with its first weights; `num_classes` 0 makes no classifier.

    A classifier for another number of classes than the weights' stays as it was made. Raises ConfigError for
    a wrong argument, IntegrityError for weights that do not fit.
    """
    from zoo import create_model, list_models
    from zoo.heads.probe import AttentiveProbe, freeze_all_but_classifier
    from zoo.weights.loader import read_pretrained

    part = made.model
    arguments = {**part.args, "num_classes": 0 if part.probe == "attentive" else num_classes}
    if part.drop_path_rate is not None:
        arguments["drop_path_rate"] = part.drop_path_rate
    path = part.checkpoint
    if path is not None and path in list_models(task="classification"):
        path = read_pretrained(path)[1]
    if part.name.startswith(TIMM):
        model = _from_timm(part.name.removeprefix(TIMM), part.pretrained, path, arguments)
    else:
        model = create_model(part.name, pretrained=part.pretrained, checkpoint_path=path, **arguments)
    if part.grad_checkpointing:
        model.set_grad_checkpointing(True)
    if part.probe == "attentive":
        return AttentiveProbe(model, num_classes)
    return freeze_all_but_classifier(model) if part.probe == "linear" else model


def _from_timm(name: str, pretrained: bool, path: str | None, arguments: dict[str, Any]) -> nn.Module:
    """Return a model of timm's own. Raises ConfigError, ResourceError where its weights cannot be fetched."""
    import timm

    from zoo import load_checkpoint

    try:
        model = timm.create_model(name, pretrained=pretrained, **arguments)
    except (TypeError, AssertionError, ValueError) as error:
        raise ConfigError(f"timm refuses {TIMM}{name}: {' '.join(str(error).split())[:200]}") from None
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ResourceError(
            f"timm's weights of {name} cannot be fetched ({' '.join(str(error).split())[:160]}); fetch them "
            "where there is a network, they are kept, or give a recipe model.checkpoint=FILE"
        ) from None
    if path is not None:
        load_checkpoint(model, path)
    return model


def export_model(folder: Path, checkpoint: Path, made: Recipe, settings: InputSettings) -> Path:
    """Write the result weights of a checkpoint as model.safetensors, with all that is needed to use them."""
    from safetensors.torch import save

    content = load_checkpoint(checkpoint)
    best = content["callbacks"]["Checkpoints"]["ranking"]
    facts = {
        "format": "pt",
        "model": made.model.name,
        "model_args": json.dumps(made.plain()["model"]["args"]),
        "num_classes": str(len(content["classes"])),
        "classes": json.dumps(content["classes"], ensure_ascii=False),
        "input": json.dumps(settings.plain()),
        "recipe": made.yaml(),
        "recipe_sha256": hashlib.sha256(made.yaml().encode()).hexdigest(),
        task_of(made).monitor.removeprefix("val_"): f"{best[0]['score']:.6f}" if best else "",
        "attnzoo": _version("attnzoo") or "",
    }
    path = folder / MODEL
    data = save(result_weights(content), metadata=facts)
    write_atomically(path, lambda file: file.write(data))
    return path


def result_weights(content: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Return from a checkpoint the weights that count: the averaged ones where there are any."""
    state = content["state_dict"]
    prefix = "ema.module." if any(key.startswith("ema.module.") for key in state) else "model."
    return {
        key.removeprefix(prefix): value.contiguous() for key, value in state.items() if key.startswith(prefix)
    }


def load_trained(source: str | Path) -> Trained:
    """Return the network of a run folder, a model.safetensors or .ckpt of one, or a model name with weights.

    The name may be one of timm's own: timm/resnet50.a1_in1k.

    Raises ConfigError for a name or path that is none of these, IntegrityError for a file that does not fit.
    """
    path = Path(source)
    if path.is_dir():
        candidates = [path / MODEL, path / "checkpoints" / "best.ckpt", path / "checkpoints" / "last.ckpt"]
        found = [each for each in candidates if each.exists()]
        if not found:
            raise ConfigError(f"{path} holds no trained model ({MODEL} or checkpoints/best.ckpt)")
        path = found[0]
    if path.suffix == ".safetensors" and path.exists():
        return _from_safetensors(path, str(source))
    if path.suffix == ".ckpt" and path.exists():
        return _from_checkpoint(path, str(source))
    if path.exists():
        raise ConfigError(f"{path} is neither a run folder nor a .safetensors or .ckpt file of one")
    if str(source).startswith(TIMM):
        return _from_timm_name(str(source))
    if path.suffix in (".ckpt", ".safetensors", ".pth", ".pt") or len(path.parts) > 1:
        raise ConfigError(
            f"no run folder or file {source}; give a run folder, or a model name from `zoo list`"
        )
    return _from_name(str(source))


def _from_safetensors(path: Path, source: str, state: dict[str, torch.Tensor] | None = None) -> Trained:
    from safetensors import SafetensorError, safe_open

    from zoo.weights.loader import read_state_dict

    state = state if state is not None else read_state_dict(path)
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        made = _rebuild(parse(facts["recipe"], "the recipe inside the file"))
        classes, settings = json.loads(facts["classes"]), InputSettings.from_plain(json.loads(facts["input"]))
    except (KeyError, ValueError, TypeError, SafetensorError) as error:
        raise IntegrityError(
            f"{path} does not say which model it is ({type(error).__name__}: {error}); "
            f"only a {MODEL} from a run folder can be used by itself"
        ) from None
    return _assemble(made, classes, settings, state, source)


def _rebuild(raw: dict[str, Any]) -> Recipe:
    """Build the recipe that a file carries; variables of the machine it came from need not be set here."""
    for key in _leaf_keys(raw):
        value = pick(raw, key)
        if isinstance(value, str) and any(os.environ.get(name) is None for name in environment_names(value)):
            put(raw, key, None)
    return build(raw, source="the recipe inside the file")


def _from_checkpoint(path: Path, source: str) -> Trained:
    content = load_checkpoint(path)
    made = _rebuild(content["recipe"])
    settings = InputSettings.from_plain(content["input"])
    return _assemble(made, content["classes"], settings, result_weights(content), source)


def _assemble(
    made: Recipe,
    classes: list[str],
    settings: InputSettings,
    state: dict[str, torch.Tensor],
    source: str,
) -> Trained:
    check(made)
    if not task_of(made).keeps_base:
        made.model.pretrained, made.model.checkpoint = False, None
    model = task_of(made).build_model(made, len(classes))
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        reason = str(error).splitlines()
        raise IntegrityError(
            f"{source} does not fit {made.model.name}: {' '.join(reason[1:2]).strip()}"
        ) from None
    return Trained(
        model=model.eval(),
        name=made.model.name,
        classes=classes,
        settings=settings,
        recipe=made,
        source=source,
    )


def _from_name(name: str) -> Trained:
    from zoo import create_model, list_models
    from zoo.weights.loader import read_pretrained
    from zoo.weights.manifest import entries_of

    known = list_models(task="classification")
    # Of the others only those whose weights come with the recipe that made them.
    known += [
        each
        for each in list_models(task="generation", pretrained=True)
        if any(entry.packaged for entry in entries_of(each)[:1])
    ]
    if name not in known and name in list_models(task="generation", pretrained=True):
        raise ConfigError(
            f"the published weights of {name} come without a recipe; zoo.create_model({name!r}, "
            "pretrained=True) loads them, for pipelines of diffusers"
        )
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(
            f"{name!r} is neither a run folder nor a model with weights{near or '; see `zoo list`'}"
        )
    if any(entry.packaged for entry in entries_of(name)[:1]):  # a file of a recipe of ours, which says it all
        state, path = read_pretrained(name)
        return _from_safetensors(Path(path), name, state)
    return _published(create_model(name, pretrained=True), name)


def _from_timm_name(name: str) -> Trained:
    from timm import list_pretrained
    from timm.models import model_entrypoint

    # timm lists the zoo's models too.
    own = [each for each in list_pretrained() if model_entrypoint(each).__module__.startswith("timm.")]
    tagged = [f"{TIMM}{each}" for each in own]
    known = dict.fromkeys([*tagged, *(each.partition(".")[0] for each in tagged)])
    if name not in known:
        near = did_you_mean(name, known)
        raise ConfigError(f"timm has no weights of {name}{near or '; see timm.list_pretrained()'}")
    return _published(_from_timm(name.removeprefix(TIMM), pretrained=True, path=None, arguments={}), name)


def _published(model: nn.Module, name: str) -> Trained:
    classes, folders = _class_names(model.num_classes)
    return Trained(
        model=model.eval(),
        name=name,
        classes=classes,
        settings=InputSettings.of(model),
        recipe=None,
        source=name,
        folders=folders,
    )


def _class_names(count: int) -> tuple[list[str], list[str]]:
    """Return the classes of published weights, in words and as ImageNet's folders; else numbers."""
    if count == 1000:
        from timm.data import ImageNetInfo

        info = ImageNetInfo()
        return [info.index_to_description(i).partition(",")[0] for i in range(count)], info.label_names()
    return [str(index) for index in range(count)], []


def choose_device(device: str | torch.device | None) -> torch.device:
    """Return the device of that name, by default the GPU where there is one. Raises ConfigError."""
    if device is None:
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {device!r}; such as cpu, cuda or cuda:1") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device={device!r} is not there: PyTorch sees {torch.cuda.device_count()} GPUs; use cpu"
        )
    return chosen
