"""Recipes are read from YAML and `key=value` into typed dataclasses, and checked before anything runs.

A recipe holds names and numbers only. Nothing in it is imported or executed: names are looked up in closed
lists, unknown keys and wrong types are refused; the only interpolations are `${oc.env:NAME}`, `${other.key}`.
"""

from __future__ import annotations

import dataclasses
import difflib
import io
import math
import os
import re
import typing
from collections.abc import Iterator, Sequence
from dataclasses import is_dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import InterpolationResolutionError, MissingMandatoryValue, OmegaConfBaseException

from zoo.errors import ConfigError, did_you_mean
from zoo.recipes.schema import RECIPES, Recipe, pick, put
from zoo.weights.files import open_file

CONFIGS = Path(__file__).resolve().parent / "configs"
MAX_BYTES = 1 << 20
MAX_DEPTH = 20
LATER = "???"  # what a file says of a key that a user gives later
TO_BE_GIVEN = "(to be given)"  # what a text without a default is until then


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
    folder, _, typed = text.rpartition("/")
    leaves = difflib.get_close_matches(typed, {known.rpartition("/")[2] for known in recipe_names()})
    near = [known for leaf in leaves for known in recipe_names() if known.endswith(f"/{leaf}")]
    near = [known for known in near if known.startswith(f"{folder}/")] or near
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
    told, model = {text.partition("=")[0].strip() for text in overrides}, raw.get("model")
    names_file = (
        isinstance(model, dict) and model.get("checkpoint") is not None and "model.checkpoint" in told
    )
    if names_file and "model.pretrained" not in told:
        model["pretrained"] = False  # the recipe's start, which the file takes the place of
    made = build(raw, source=str(file), allow_missing=allow_missing)
    if not made.name:
        made.name = file.stem
    check(made, names=names)
    return made


def _read(file: Path) -> dict[str, Any]:
    if file.is_dir():
        raise ConfigError(f"{file} is a folder; a recipe is a .yaml file")
    try:
        with open_file(file) as opened:
            data = opened.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(
            f"no recipe file {file}; `zoo recipes list` shows those that come with the zoo"
        ) from None
    except OSError as error:
        raise ConfigError(f"{file} cannot be read ({error.strerror})") from None
    if len(data) > MAX_BYTES:
        raise ConfigError(f"{file} has more than {MAX_BYTES:,} bytes, too many for a recipe")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{file} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return _at_home(parse(text, str(file)))


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
    if not _is_utf8(text):
        raise ConfigError(f"override {text!r} is not UTF-8, as every recipe is; rename what it names")
    # YAML takes 2024_01_05 for a number, "on" for true and "My: photos" for a mistake: a text is one.
    typed = value.strip()
    if _is_text(raw, key) and not _is_quoted(typed) and typed not in ("", "~", "null", "Null", "NULL"):
        put(raw, key, _at_home(typed))
    else:
        put(raw, key, parse(f"value: {value}", f"override {text!r}").get("value"))


def _at_home(value: Any) -> Any:
    """Expand ~/ in texts, however deep: no shell does it behind a key or in a file."""
    if isinstance(value, dict):
        return {key: _at_home(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_at_home(inner) for inner in value]
    return os.path.expanduser(value) if isinstance(value, str) and value.startswith("~/") else value  # noqa: PTH111


def _is_utf8(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_quoted(text: str) -> bool:
    return len(text) > 1 and text[0] == text[-1] and text[0] in "'\""


def _is_text(raw: dict[str, Any], key: str) -> bool:
    """Whether the schema has a text at this key."""
    task = raw.get("task", "classification")
    kind: Any = RECIPES.get(task) if isinstance(task, str) else None
    for part in key.split("."):
        kind = _hints(kind).get(part) if is_dataclass(kind) else None
    return kind in (str, str | None)


def _merge_plain(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merge_plain(merged[key], value) if both else value
    return merged


# ---- from plain to typed


def build(raw: dict[str, Any], *, source: str = "recipe", allow_missing: bool = False) -> Recipe:
    """Turn plain containers into a Recipe: known keys, right types, resolved; the values are not checked."""
    _refuse_code(raw, "", source)
    kind = _kind(raw, source)
    _check_keys(raw, kind, "", source, kind)
    written = dict(_leaves(raw))
    # Merged over a default, ??? is dropped without a word; only keys without one are still missing then.
    later = {key for key, value in written.items() if value == LATER}
    try:
        config = OmegaConf.merge(_schema(kind), OmegaConf.create(raw))
        empty = OmegaConf.missing_keys(config)
        missing = sorted(later | empty)
        if missing and not allow_missing:
            raise ConfigError(f"{source}: {missing[0]} is not given; add {missing[0]}=... to the command")
        for key in empty:
            OmegaConf.update(config, key, TO_BE_GIVEN)
        made = OmegaConf.to_object(config)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{source}: {_explain(error, raw, kind)}") from None
    assert isinstance(made, Recipe)
    resolved = dataclasses.asdict(made)
    interpolated = {key: value for key, value in written.items() if isinstance(value, str) and "${" in value}
    interpolated |= dict.fromkeys(missing, LATER)
    made._interpolated = {key: (value, pick(resolved, key)) for key, value in interpolated.items()}
    return made


def _kind(raw: dict[str, Any], source: str) -> type[Recipe]:
    """The class of a recipe follows from its task, which is therefore read before all else."""
    task = raw.get("task", "classification")
    if not isinstance(task, str):
        return Recipe  # which says what is wrong with it
    if task not in RECIPES:
        near = did_you_mean(task, RECIPES) or f"; one of {', '.join(RECIPES)}"
        raise ConfigError(f"{source}: unknown task={task!r}{near}")
    return RECIPES[task]


@cache
def _schema(kind: type[Recipe]) -> DictConfig:
    return OmegaConf.structured(kind)


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


def _check_keys(raw: dict[str, Any], kind: type, prefix: str, source: str, root: type[Recipe]) -> None:
    """Name an unknown key and the nearest known one, wherever in the recipe that is."""
    hints = _hints(kind)
    known = {item.name for item in dataclasses.fields(kind)}
    for key, value in raw.items():
        path = f"{prefix}{key}"
        if key not in known:
            every = all_keys(root)
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
            _check_keys(value, hints[key], f"{path}.", source, root)
        elif _is_of_another_shape(value, str(hints[key])):
            raise ConfigError(f"{source}: {path}={value} is not {_wanted(path, root)}")
        elif isinstance(value, dict):
            for name in value:
                if not isinstance(name, str):
                    raise ConfigError(
                        f"{source}: {path} has the key {name!r}, which is no text; write it in quotes"
                    )
                if name.startswith(REFUSED_ARGS):
                    raise ConfigError(
                        f"{source}: {path}.{name} has a key of its own or is not for recipes; leave it out"
                    )


def _is_of_another_shape(value: Any, hint: str) -> bool:
    """Tell whether a list or group stands where none belongs, or a text, even `${...}`, in their place."""
    if isinstance(value, dict | list):
        return type(value).__name__ not in hint
    return isinstance(value, str) and value != LATER and ("list" in hint or "dict" in hint)


def _first(kind: type) -> str:
    return dataclasses.fields(kind)[0].name


def all_keys(kind: type = Recipe, prefix: str = "") -> list[str]:
    """Return every dotted key that a recipe knows."""
    keys = []
    for item in dataclasses.fields(kind):
        hint = _hints(kind)[item.name]
        keys += all_keys(hint, f"{prefix}{item.name}.") if is_dataclass(hint) else [f"{prefix}{item.name}"]
    return keys


def environment_names(text: str) -> list[str]:
    """Return the environment variables that a value refers to."""
    return re.findall(r"\$\{\s*oc\.env\s*:\s*([\w.]+)", text)


def _explain(error: OmegaConfBaseException, raw: dict[str, Any], root: type[Recipe]) -> str:
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
    return f"{key}={written!r} is not {_wanted(key, root)}" if key else str(error).splitlines()[0]


def _wanted(key: str, root: type[Recipe]) -> str:
    kind: Any = root
    for part in key.split("."):
        kind = _hints(kind).get(part) if is_dataclass(kind) else None
    words = {
        int: "a whole number",
        float: "a number",
        str: "a text",
        bool: "true or false",
        type(None): "null",
    }
    words |= {list[float]: "a list of numbers, such as [0.5, 1.0]", list[int]: "a list of whole numbers"}
    words |= {list[str]: "a list of texts"}
    words |= {dict[str, Any]: "a group of keys"}
    kinds = typing.get_args(kind) if typing.get_origin(kind) not in (list, dict, None) else (kind,)
    return " or ".join(words.get(each, "of the right kind") for each in kinds)


# ---- value checks


def check(made: Recipe, *, names: bool = True) -> None:
    """Check the values of a recipe: ranges, names from closed lists, and what must fit together.

    `names=False` leaves out the lists that live in torch, timm or the registry. Raises ConfigError.
    """
    slow, texts = [], []
    for key, value, metadata in _fields(made):
        if value is None or value == TO_BE_GIVEN:
            continue
        if "low" in metadata:
            _check_number(made, key, value, metadata)
        known = metadata["quick"](value) if metadata.get("quick") else None
        if known is not None:
            _check_name(made, key, value, known)
        elif metadata.get("slow"):
            slow.append((key, value, metadata["names"]))
        elif "names" in metadata:
            _check_name(made, key, value, metadata["names"])
        elif "is_right" in metadata:
            texts.append((key, value, metadata))
    if not _has_stand_ins(made):
        _check_together(made)
        made.refuse()
    if names:
        for key, value, allowed in slow:
            _check_name(made, key, value, allowed)
        for key, value, metadata in texts:
            if not metadata["is_right"](value):
                raise ConfigError(f"{key}={made.shown(key)!r} is not {metadata['wanted']}")


def _has_stand_ins(made: Recipe) -> bool:
    """Whether a default stands where a value is given later: what fits it says nothing of that."""
    said = made._interpolated.values()
    return any(written == LATER and meant not in (None, TO_BE_GIVEN) for written, meant in said)


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
    optim, data, model = made.optim, made.data, made.model
    if made.name and not re.fullmatch(r"[\w][\w .+=-]*", made.name):
        raise ConfigError(f"name={made.shown('name')!r} must be a plain folder name")
    if optim.warmup_epochs > optim.epochs:
        raise ConfigError(
            f"optim.warmup_epochs={optim.warmup_epochs} is longer than optim.epochs={optim.epochs}"
        )
    epochs = optim.epochs + optim.cooldown_epochs
    if made.trainer.val_every > epochs:
        raise ConfigError(f"trainer.val_every={made.trainer.val_every} is more than all {epochs} epochs")
    if model.probe is not None and made.task != "classification":
        raise ConfigError(
            f"model.probe={model.probe} is for classification; model.freeze=[backbone] trains a decoder on a "
            "frozen backbone"
        )
    if model.probe is not None and model.freeze:
        raise ConfigError("model.probe freezes the network already; leave model.freeze out")
    if model.pretrained and model.checkpoint is not None:
        raise ConfigError(
            "model.pretrained and model.checkpoint are both given; "
            "model.pretrained=false starts from the file"
        )
    if data.download and data.name in data.local:
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
