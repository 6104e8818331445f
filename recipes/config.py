"""What a recipe may say: typed dataclasses, read from YAML and `key=value`, checked before anything runs.

A recipe holds names and numbers only. Nothing in it is imported or executed: names are looked up in closed
lists, unknown keys and wrong types are refused; the only interpolations are `${oc.env:NAME}`, `${other.key}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import re
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, is_dataclass
from enum import Enum
from functools import cache
from pathlib import Path, PurePath
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from zoo.errors import ConfigError, did_you_mean

CONFIGS = Path(__file__).resolve().parent / "configs"
MAX_BYTES = 1 << 20
MAX_DEPTH = 20
TO_BE_GIVEN = "(to be given)"
PRECISIONS = (
    "32-true", "bf16-mixed", "16-mixed", "bf16-true", "16-true", "64-true", "transformer-engine",
)  # fmt: skip


# Constraints live beside the field they belong to, so that the check and its test find them by introspection.
def number(
    default: Any, *, above: float = -math.inf, low: float = -math.inf, high: float = math.inf, length: int = 0
) -> Any:
    """A field of finite numbers, `> above`, `>= low`, `<= high`; `length` of them where it is a list."""
    metadata = {"above": above, "low": low, "high": high, "length": length}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


def choice(default: Any, names: Sequence[str] | Callable[[], Sequence[str]], *, slow: bool = False) -> Any:
    """A field with one of `names`, or of what `names()` returns; `slow` where that imports torch."""
    return field(default=default, metadata={"names": names, "slow": slow})


def _models() -> Sequence[str]:
    from zoo import list_models

    return list_models()


def _optimizers() -> Sequence[str]:
    from timm.optim import list_optimizers

    return list_optimizers()


def _data_sets() -> Sequence[str]:
    from zoo.recipes.data import NAMES

    return NAMES


@dataclass(kw_only=True)
class Model:
    """The network and what it starts from."""

    name: str = choice("???", _models, slow=True)
    pretrained: bool = False  # the published or shipped weights of this name
    checkpoint: str | None = None  # or a file, or another model whose published weights are taken
    num_classes: int | None = number(None, low=1)  # None: as many as the data has; else checked against it
    drop_path_rate: float | None = number(None, low=0, high=0.99)
    grad_checkpointing: bool = False  # recompute in backward: less memory, about a third more time
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the model


@dataclass(kw_only=True)
class Data:
    """Where the images are and how many travel together; None leaves a value to the model."""

    name: str = choice("???", _data_sets)
    root: str | None = None  # folder: holds train/ and val/; torchvision: where its files are kept
    download: bool = False  # torchvision sets only
    batch_size: int = number(64, low=1)  # images per process and step
    val_batch_size: int | None = number(None, low=1)
    workers: int = number(2, low=0, high=512)  # reader processes for each training process
    image_size: int | None = number(None, low=1, high=16384)
    crop_pct: float | None = number(None, above=0, high=1)  # share of the side that validation keeps
    mean: list[float] | None = number(None, length=3)
    std: list[float] | None = number(None, above=0, length=3)
    interpolation: str | None = choice(None, ("bicubic", "bilinear", "nearest", "lanczos"))
    bad_images: str = choice("error", ("error", "skip"))  # skip: go on without, list them in bad_files.txt
    max_bad: float = number(
        0.01, low=0, high=1
    )  # with skip: stop above this share (five files are always allowed)


@dataclass(kw_only=True)
class Augment:
    """Changes to training images; every random number follows from seed, epoch and image."""

    crop_scale: list[float] | None = number(
        [0.08, 1.0], above=0, high=1, length=2
    )  # None: resize, do not crop
    crop_ratio: list[float] = number([0.75, 4 / 3], above=0, length=2)
    interpolation: str = choice("random", ("random", "bicubic", "bilinear", "nearest", "lanczos"))
    hflip: float = number(0.5, low=0, high=1)
    vflip: float = number(0.0, low=0, high=1)
    rotate: float = number(0.0, low=0, high=180)  # degrees to either side
    shift: float = number(0.0, low=0, high=1)  # share of the side
    zoom: float = number(0.0, low=0, high=0.99)  # 0.1: between 0.9 and 1.1
    shear: float = number(0.0, low=0, high=89)  # degrees to either side
    color_jitter: float = number(0.0, low=0)  # replaced by auto_augment where that is given, as in timm
    auto_augment: str | None = None  # timm's notation, such as rand-m9-mstd0.5-inc1
    random_erasing: float = number(0.0, low=0, high=1)
    mixup: float = number(0.0, low=0)
    cutmix: float = number(0.0, low=0)
    mix_prob: float = number(1.0, low=0, high=1)
    mix_switch: float = number(0.5, low=0, high=1)  # how often cutmix where both are on
    label_smoothing: float = number(0.0, low=0, high=0.999)


@dataclass(kw_only=True)
class Optim:
    """Optimiser and schedule; the learning rate is a function of the step alone."""

    name: str = choice("adamw", _optimizers, slow=True)
    lr: float = number(1e-3, above=0)
    lr_base_batch: int | None = number(
        None, low=1
    )  # lr belongs to this many images a step; scaled to the actual
    weight_decay: float = number(0.05, low=0)
    layer_decay: float | None = number(None, above=0, high=1)
    betas: list[float] | None = number(None, low=0, high=0.99999, length=2)
    momentum: float = number(0.9, low=0, high=0.99999)
    args: dict[str, Any] = field(default_factory=dict)  # further keyword arguments of the optimiser
    schedule: str = choice("cosine", ("cosine", "linear", "constant"))
    epochs: int = number(100, low=1)  # of the schedule
    cooldown_epochs: int = number(0, low=0)  # after it, at min_lr
    warmup_epochs: float = number(5.0, low=0)  # replaces the beginning of the schedule, as in timm
    warmup_lr: float = number(1e-6, low=0)
    min_lr: float = number(1e-6, low=0)
    clip_grad: float | None = number(None, above=0)  # norm of all gradients together
    accumulate: int = number(1, low=1)  # batches for each step
    ema: float | None = number(
        None, low=0, high=0.999999
    )  # decay of the averaged weights, which are then the result


@dataclass(kw_only=True)
class Trainer:
    """Lightning's own names where Lightning has one, and what the run folder keeps."""

    accelerator: str = choice("auto", ("auto", "cpu", "gpu", "cuda", "mps", "tpu"))
    devices: int | str = "auto"
    num_nodes: int = number(1, low=1)
    strategy: str = "auto"
    precision: str = choice("32-true", PRECISIONS)
    deterministic: bool = False  # refuse operations that differ from run to run (GPU)
    compile: bool = False
    channels_last: bool = False
    val_every: int = number(1, low=1)  # epochs
    log_every: int = number(10, low=1)  # steps
    save_every: int = number(1000, low=1)  # steps between saves of last.ckpt inside an epoch
    keep_best: int = number(1, low=1)  # checkpoints kept by validation accuracy


@dataclass(kw_only=True)
class Recipe:
    """All of a training run that is not code; `zoo.recipe` makes one from a file."""

    task: str = choice("classification", ("classification",))
    name: str = ""  # of the run folder; the recipe's file name unless given
    seed: int = number(0, low=0, high=2**31 - 1)
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    augment: Augment = field(default_factory=Augment)
    optim: Optim = field(default_factory=Optim)
    trainer: Trainer = field(default_factory=Trainer)

    # What each interpolated key said and became: `plain` puts the former back, so that no secret is saved.
    _interpolated: typing.ClassVar[dict[str, tuple[str, Any]]] = {}

    def plain(self) -> dict[str, Any]:
        """Return plain containers for a file, with `${...}` as it was written, not what it stood for."""
        container = _plain(dataclasses.asdict(self))
        for key, (written, meant) in self._interpolated.items():
            if pick(container, key) == meant:
                put(container, key, written)
        return container

    def shown(self, key: str) -> Any:
        """Return the value of a dotted key as a message may show it: as written, never a resolved secret."""
        return pick(self.plain(), key)

    def conceal(self, text: str) -> str:
        """Return a text with what interpolations stood for replaced by how they were written."""
        for written, meant in self._interpolated.values():
            if isinstance(meant, str) and len(meant) > 2:
                text = text.replace(meant, written)
        return text

    def yaml(self) -> str:
        """Return the recipe as a YAML file that `zoo train` accepts."""
        return yaml.safe_dump(self.plain(), sort_keys=False, allow_unicode=True)


# ---- names and files


def recipe_names() -> list[str]:
    """Return the names of the recipes that come with the zoo, such as `classification/digits`."""
    return sorted(file.relative_to(CONFIGS).with_suffix("").as_posix() for file in CONFIGS.rglob("*.yaml"))


def find_recipe(name: str | Path) -> Path:
    """Return the file of a recipe: a packaged name, or a path that ends in .yaml.

    Raises ConfigError for a name that does not exist.
    """
    text = str(name)
    if text.endswith((".yaml", ".yml")):
        return Path(text)
    if text in recipe_names():
        return CONFIGS / f"{text}.yaml"
    leaves = {known.rpartition("/")[2]: known for known in recipe_names()}
    near = [leaves[leaf] for leaf in difflib.get_close_matches(text.rpartition("/")[2], leaves)]
    hint = f"did you mean {' or '.join(near)}?" if near else "`zoo recipes list` shows all"
    raise ConfigError(f"unknown recipe {text!r}; {hint} (a file of yours ends in .yaml)")


def head_comment(file: Path) -> str:
    """Return the comment at the top of a recipe file, without its marks."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.lstrip("#").strip())
    return "\n".join(lines)


def recipe(
    name: str | Path, overrides: Sequence[str] = (), *, allow_missing: bool = False, names: bool = True
) -> Recipe:
    """Read a recipe by name or file, apply `key=value` overrides, and check every key, type and value.

    `allow_missing` accepts values marked `???`, which a user gives later; `names=False` leaves out the checks
    that import torch. Raises ConfigError, in one sentence, for whatever is wrong.
    """
    file = find_recipe(name)
    raw = _read(file)
    parent = raw.pop("base", None)
    if parent is not None:
        raw = _merge_plain(_read_parent(parent, file), raw)
    for text in overrides:
        override(raw, text)
    made = build(raw, source=str(file), allow_missing=allow_missing)
    if not made.name:
        made.name = file.stem
    check(made, names=names)
    return made


def _read(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; a recipe is a .yaml file")
    try:
        data = file.read_bytes()
    except FileNotFoundError:
        raise ConfigError(
            f"no recipe file {file}; `zoo recipes list` shows those that come with the zoo"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file} has {len(data):,} bytes; a recipe has at most {MAX_BYTES:,}")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse(text, str(file))


def parse(text: str, source: str) -> dict[str, Any]:
    """Parse YAML without tags, duplicate keys or deep nesting into a mapping, interpolations untouched."""
    try:
        _refuse_depth(text, source)
        content = OmegaConf.load(io.StringIO(text))
        plain = OmegaConf.to_container(content, resolve=False)
    except ConfigError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "not YAML"
        raise ConfigError(f"{source}{where}: {problem}") from None
    except (AssertionError, OSError, ValueError, TypeError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0] if str(error) else "the file is no mapping"
        raise ConfigError(f"{source} is no mapping of keys to values ({reason})") from None
    if not isinstance(plain, dict) or not plain:
        found = "nothing" if not plain else f"a {type(plain).__name__}"
        raise ConfigError(
            f"{source} holds {found}; a recipe is a mapping such as `model: {{name: nat_mini}}`"
        )
    return plain


def _refuse_depth(text: str, source: str) -> None:
    # By events, which need no stack: building a mapping nested 100,000 deep ends the process without a word.
    depth = 0
    for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > MAX_DEPTH:
                raise ConfigError(
                    f"{source} is nested more than {MAX_DEPTH} levels deep, too deeply for a recipe"
                )
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1


def _read_parent(parent: Any, child: Path) -> dict[str, Any]:
    if not isinstance(parent, str):
        raise ConfigError(f"{child}: base={parent!r} must be one recipe name or .yaml file")
    file = find_recipe(parent)
    if not file.is_absolute():
        file = child.parent / file
    raw = _read(file)
    if "base" in raw:
        raise ConfigError(f"{child}: its base {parent} has a base of its own; one level is the limit")
    return raw


def override(raw: dict[str, Any], text: str) -> None:
    """Apply one `key=value`, the value read as YAML, to plain containers. Raises ConfigError."""
    key, equals, value = text.partition("=")
    key = key.strip()
    if not equals or not key:
        raise ConfigError(f"override {text!r} must be key=value, such as optim.lr=1e-3")
    if not all(key.split(".")):
        raise ConfigError(f"override {text!r} has an empty part in its key")
    if key == "base":
        raise ConfigError("base= belongs into a recipe file, not on the command line")
    put(raw, key, parse(f"value: {value}", f"override {text!r}").get("value"))


def _merge_plain(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge_plain(merged[key], value) if both else value
    return merged


def pick(container: dict[str, Any], key: str) -> Any:
    """Return the value at a dotted key, or None."""
    for part in key.split("."):
        container = container.get(part) if isinstance(container, dict) else None
    return container


def put(container: dict[str, Any], key: str, value: Any) -> None:
    """Set the value at a dotted key of nested dictionaries, making those on the way."""
    *parents, leaf = key.split(".")
    for part in parents:
        if not isinstance(container.get(part), dict):
            container[part] = {}
        container = container[part]
    container[leaf] = value


# ---- from plain to typed


def build(raw: dict[str, Any], *, source: str = "recipe", allow_missing: bool = False) -> Recipe:
    """Turn plain containers into a Recipe: known keys, right types, resolved; the values are not checked."""
    _refuse_code(raw, "", source)
    _check_keys(raw, Recipe, "", source)
    try:
        config = OmegaConf.merge(_schema(), OmegaConf.create(raw))
        missing = sorted(OmegaConf.missing_keys(config))
        if missing and not allow_missing:
            raise ConfigError(f"{source}: {missing[0]} is not given; add {missing[0]}=... to the command")
        for key in missing:
            OmegaConf.update(config, key, TO_BE_GIVEN)
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error, raw)}") from None
    assert isinstance(made, Recipe)
    resolved = dataclasses.asdict(made)
    written = dict(_leaves(raw))
    made._interpolated = {
        key: (value, pick(resolved, key))
        for key, value in written.items()
        if isinstance(value, str) and "${" in value
    }
    return made


@cache
def _schema() -> DictConfig:
    return OmegaConf.structured(Recipe)


@cache
def _hints(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind)


def _leaves(container: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(container, dict):
        for key, value in container.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, container


CODE_KEYS = {"class_path", "init_args", "target", "module", "import", "import_path", "callable"}
DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)+(:\w+)?")


def _refuse_code(value: Any, key: str, source: str) -> None:
    """Refuse whatever other programs would import or run: such a file was not written for the zoo."""
    if isinstance(value, dict):
        for name, inner in value.items():
            path = f"{key}.{name}" if key else str(name)
            if str(name).startswith("_") or name in CODE_KEYS:
                raise ConfigError(
                    f"{source}: key {path!r} names code to run; a recipe holds names and numbers only"
                )
            _refuse_code(inner, path, source)
    elif isinstance(value, list):
        for inner in value:
            _refuse_code(inner, key, source)
    elif isinstance(value, str):
        for resolver in re.findall(r"\$\{\s*([^}:{\s]+)\s*:", value):
            if resolver != "oc.env":
                raise ConfigError(
                    f"{source}: {key} uses the resolver {resolver!r}; "
                    "only ${oc.env:NAME} and ${other.key} are read"
                )
        free = key.startswith(("model.args", "optim.args"))
        if free and "${" not in value and (DOTTED.fullmatch(value) or "://" in value):
            raise ConfigError(
                f"{source}: {key}={value!r} looks like code or an address; only plain values are read"
            )


REFUSED_ARGS = (
    "pretrained",
    "checkpoint",
    "num_classes",
    "cache_dir",
    "drop_path_rate",
    "model",
    "opt",
    "lr",
)


def _check_keys(raw: dict[str, Any], kind: type, prefix: str, source: str) -> None:
    """Name an unknown key and the nearest known one, wherever in the recipe that is."""
    hints = _hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if key not in known:
            every = all_keys()
            same_leaf = [k for k in every if k.rpartition(".")[2] == str(key)]
            near = f"; did you mean {' or '.join(same_leaf)}?" if same_leaf else did_you_mean(path, every)
            raise ConfigError(
                f"{source}: unknown key {path!r}{near or f'; known here: {chr(44).join(sorted(known))}'}"
            )
        if is_dataclass(hints[key]):
            if not isinstance(value, dict):
                raise ConfigError(
                    f"{source}: {path} is a group of keys, such as {path}.{_first(hints[key])}=..."
                )
            _check_keys(value, hints[key], f"{path}.", source)
        elif _is_of_another_shape(value, str(hints[key])):
            raise ConfigError(f"{source}: {path}={value} is not {_wanted(path)}")
        elif isinstance(value, dict):
            for name in value:
                if str(name).startswith(REFUSED_ARGS):
                    raise ConfigError(
                        f"{source}: {path}.{name} has a key of its own or is not for recipes; leave it out"
                    )


def _is_of_another_shape(value: Any, hint: str) -> bool:
    """Tell whether a list or group stands where none belongs, or a text, even `${...}`, in their place."""
    if isinstance(value, dict | list):
        return type(value).__name__ not in hint
    return isinstance(value, str) and ("list" in hint or "dict" in hint)


def _first(kind: type) -> str:
    return dataclasses.fields(kind)[0].name


def all_keys(kind: type = Recipe, prefix: str = "") -> list[str]:
    """Return every dotted key that a recipe knows."""
    keys = []
    for item in dataclasses.fields(kind):
        hint = _hints(kind)[item.name]
        keys += all_keys(hint, f"{prefix}{item.name}.") if is_dataclass(hint) else [f"{prefix}{item.name}"]
    return keys


def _plain(value: Any) -> Any:
    """Return a value as YAML and the safe reader of checkpoints know it, from paths and array scalars too."""
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, bool | int | float | str) and type(value).__module__ == "builtins" or value is None:
        return value
    if hasattr(value, "item"):
        return value.item()
    raise ConfigError(f"{value!r} in a recipe is neither a number nor a text; recipes hold plain values only")


def environment_names(text: str) -> list[str]:
    """Return the environment variables that a value refers to."""
    return re.findall(r"\$\{\s*oc\.env\s*:\s*([\w.]+)", text)


def _explain(error: OmegaConfBaseException, raw: dict[str, Any]) -> str:
    """Say what is wrong with a value, showing it as it was written: a resolved one may be a secret."""
    key = re.sub(r"\[\d+\]", "", error.full_key or "")
    written = pick(raw, key)
    if isinstance(error, InterpolationResolutionError):
        variables = environment_names(str(written))
        if variables and "not found" in str(error):
            return f"{key}={written} needs the environment variable {variables[0]}, which is not set"
        if "not found" in str(error):
            return f"{key}={written} refers to a key that does not exist"
    if isinstance(error, MissingMandatoryValue):
        return f"{key} is not given; add {key}=... to the command"
    return f"{key}={written!r} is not {_wanted(key)}" if key else str(error).splitlines()[0]


def _wanted(key: str) -> str:
    kind: Any = Recipe
    for part in key.split("."):
        kind = _hints(kind).get(part) if is_dataclass(kind) else None
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    words |= {list[float]: "a list of numbers, such as [0.5, 1.0]", dict[str, Any]: "a group of keys"}
    kinds = typing.get_args(kind) if typing.get_origin(kind) not in (list, dict, None) else (kind,)
    return " or ".join(words.get(each, "of the right kind") for each in kinds)


# ---- value checks


def check(made: Recipe, *, names: bool = True) -> None:
    """Check the values of a recipe: ranges, names from closed lists, and what must fit together.

    `names=False` leaves out the lists that live in torch, timm or the registry. Raises ConfigError.
    """
    slow = []
    for key, value, metadata in _fields(made):
        if value is None or value == TO_BE_GIVEN:
            continue
        if "low" in metadata:
            _check_number(made, key, value, metadata)
        if metadata.get("slow"):
            slow.append((key, value, metadata["names"]))
        elif "names" in metadata:
            _check_name(made, key, value, metadata["names"])
    _check_together(made)
    if names:
        for key, value, allowed in slow:
            _check_name(made, key, value, allowed)
        if made.augment.auto_augment is not None:
            _check_auto_augment(made)


def _fields(made: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    for item in dataclasses.fields(made):
        value = getattr(made, item.name)
        if is_dataclass(value):
            yield from _fields(value, f"{prefix}{item.name}.")
        else:
            yield f"{prefix}{item.name}", value, item.metadata


def _check_number(made: Recipe, key: str, value: Any, limits: Any) -> None:
    values = value if isinstance(value, list) else [value]
    if limits["length"] and len(values) != limits["length"]:
        raise ConfigError(f"{key}={made.shown(key)} has {len(values)} numbers; {limits['length']} are wanted")
    for each in values:
        high = min(limits["high"], 2**31 - 1)
        wanted = ""
        if not math.isfinite(each):
            wanted = "a finite number"
        elif each <= limits["above"]:
            wanted = f"above {limits['above']:g}"
        elif each < limits["low"]:
            wanted = f"at least {limits['low']:g}"
        elif each > high:
            wanted = f"at most {high:g}"
        if wanted:
            raise ConfigError(f"{key}={made.shown(key)} must be {wanted}")


def _check_name(made: Recipe, key: str, value: str, allowed: Any) -> None:
    allowed = allowed() if callable(allowed) else allowed
    if value in allowed:
        return
    few = f"; one of {', '.join(allowed)}" if len(allowed) <= 12 else ""
    raise ConfigError(
        f"unknown {key}={made.shown(key)!r}{did_you_mean(str(made.shown(key)), allowed) or few}"
    )


def _check_together(made: Recipe) -> None:
    optim, augment, data, model = made.optim, made.augment, made.data, made.model
    if made.name and not re.fullmatch(r"[\w][\w .+-]*", made.name):
        raise ConfigError(f"name={made.shown('name')!r} must be a plain folder name")
    for key in ("crop_scale", "crop_ratio"):
        pair = getattr(augment, key)
        if pair is not None and pair[0] > pair[1]:
            raise ConfigError(f"augment.{key}={pair} must go from the smaller number to the larger")
    if (augment.mixup or augment.cutmix) and data.batch_size % 2:
        raise ConfigError(
            f"data.batch_size={data.batch_size} must be even with augment.mixup or augment.cutmix"
        )
    if optim.warmup_epochs > optim.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={optim.warmup_epochs} is longer than optim.epochs={optim.epochs}"
        )
    epochs = optim.epochs + optim.cooldown_epochs
    if made.trainer.val_every > epochs:
        raise ConfigError(f"trainer.val_every={made.trainer.val_every} is more than all {epochs} epochs")
    if model.pretrained and model.checkpoint is not None:
        raise ConfigError("model.pretrained and model.checkpoint are both given; choose one start")
    if data.download and data.name in ("folder", "digits"):
        raise ConfigError(f"data.download is for torchvision sets; data.name={data.name} needs none")
    if optim.ema is not None and made.trainer.precision in ("bf16-true", "16-true", "transformer-engine"):
        raise ConfigError(
            f"trainer.precision={made.trainer.precision} is too coarse for the averaged weights of "
            "optim.ema; use bf16-mixed or set optim.ema=null"
        )
    if optim.ema is not None and made.trainer.strategy.startswith(("fsdp", "deepspeed")):
        raise ConfigError(
            f"optim.ema does not work with trainer.strategy={made.trainer.strategy}; set optim.ema=null"
        )


def _check_auto_augment(made: Recipe) -> None:
    from timm.data.auto_augment import (
        augment_and_mix_transform,
        auto_augment_transform,
        rand_augment_transform,
    )

    text = made.augment.auto_augment
    kinds = {"rand": rand_augment_transform, "augmix": augment_and_mix_transform}
    kind = next(
        (make for start, make in kinds.items() if text.startswith(f"{start}-")), auto_augment_transform
    )
    try:
        kind(text, {})
    except (AssertionError, ValueError, KeyError, IndexError, TypeError):
        raise ConfigError(
            f"augment.auto_augment={made.shown('augment.auto_augment')!r} is not timm's notation, "
            "such as rand-m9-mstd0.5-inc1, augmix-m5-w4-d2 or original"
        ) from None
