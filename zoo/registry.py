"""Names become models: the zoo's registry, which is timm's with our names in it."""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from fnmatch import fnmatchcase
from importlib import import_module
from numbers import Integral
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zoo.errors import ConfigError, IntegrityError, at_least, below_one, did_you_mean
from zoo.rows import replaced

if TYPE_CHECKING:
    from torch import Tensor, nn

log = logging.getLogger("zoo")

IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225), "interpolation": "bicubic"}

# Keyword arguments that are taken before the model sees the rest, by timm's builder and by ours.
_BUILDER_ARGUMENTS = (
    "features_only",
    "out_indices",
    "feature_cls",
    "pretrained_cfg",
    "pretrained_cfg_overlay",
    "img_size",
    "attention",
    "attention_kwargs",
)


_NO_WEIGHTS_FIT = (
    "weights of {} do not fit another attention; build it without weights, "
    "then zoo.load_checkpoint(model, path, strict=False) takes the layers that are the same"
)


@dataclass(frozen=True)
class Entry:
    """One registered model: its class, its row, and its name in timm's registry (generators: None)."""

    name: str
    timm_name: str | None
    model: type[nn.Module]
    config: Any
    family: str
    paper: str
    attention: str
    task: str


@dataclass(frozen=True)
class ModelInfo:
    """What is known of a model; counts are measured on the model itself, metrics are as published.

    `input_size` is that of an image, or of the latents of a generator: [C, height, width] or [C, T, ..].
    """

    name: str
    family: str
    task: str
    attention: str
    paper: str
    params: int
    macs: int
    input_size: tuple[int, ...]
    num_classes: int
    top1: float | None = None
    weights: tuple[dict[str, Any], ...] = ()
    licence: str | None = None
    recipes: tuple[str, ...] = field(default_factory=tuple)


_entries: dict[str, Entry] = {}


def register_family(
    model: type[nn.Module],
    rows: Mapping[str, Any],
    *,
    paper: str,
    attention: str,
    task: str = "classification",
    cfg: Mapping[str, Any] = IMAGENET,
) -> None:
    """Register every row of a family with the zoo and with timm; the module's name is the family's.

    `model(cfg=row, **arguments)` builds a model, `model.default_cfg(row)` is its part of timm's
    configuration and `model.default_features(row)` the stages that `features_only` returns. A name that timm
    has already is registered there as `zoo_<name>`: timm's own stays untouched.
    """
    from timm.models import is_model, register_model

    module = sys.modules[model.__module__]
    family = model.__module__.rpartition(".")[2]
    for name, config in rows.items():
        timm_name = f"zoo_{name}" if is_model(name) else name
        entry = Entry(name, timm_name, model, config, family, paper, attention, task)
        if not hasattr(module, "default_cfgs"):
            module.default_cfgs = {}
        module.default_cfgs[timm_name] = _timm_cfgs(entry, cfg)
        register_model(_entry_point(entry))
        _entries[name] = entry


def register_generators(
    model: type[nn.Module], rows: Mapping[str, Any], *, paper: str, attention: str
) -> None:
    """Register every row of a family of diffusion transformers with the zoo; timm has no place for them.

    `model(**fields of the row)` is the plain module and `model.example_inputs()` what its forward takes;
    `create_model` builds the class of the same interface as diffusers' own, found in zoo/diffusion.
    """
    family = model.__module__.rpartition(".")[2]
    for name, config in rows.items():
        _entries[name] = Entry(name, None, model, config, family, paper, attention, "generation")


def create_model(
    name: str,
    pretrained: bool | str = False,
    checkpoint_path: str | Path | None = None,
    num_classes: int | None = None,
    **kwargs: Any,
) -> nn.Module:
    """Build a model by name, or by timm's "name.tag", which says too which weights `pretrained` means.

    `pretrained` loads the published weights (True, or a tag that `model_info` lists), `checkpoint_path` a
    file. `num_classes` None keeps the model's own count, 0 removes the classifier; another count than the
    weights' leaves the classifier as initialised. `attention` builds the model's body with another mechanism
    ("neighborhood", "window" ...; `zoo.attention.swap` has them all) and `attention_kwargs` are that
    mechanism's arguments. Other arguments are the model's (drop_path_rate, dilations ...) or timm's
    (features_only, out_indices, in_chans ...). A name of the task "generation" gives a diffusers model.
    Raises: ConfigError for an unknown name or argument; IntegrityError for weights that do not fit;
        ResourceError for a generator without diffusers.
    """
    name, tag = _split(name)
    entry = _find(name)
    allowed = _arguments(entry)
    for argument in [*kwargs, *(["num_classes"] if num_classes is not None else [])]:
        if argument not in allowed:
            raise ConfigError(
                f"unknown argument {argument!r} of {name}; use {', '.join(sorted(allowed))}"
                f"{did_you_mean(argument, allowed)}"
            )
    if not isinstance(pretrained, bool | str):
        raise ConfigError(f"pretrained must be True, False or the tag of a file, found {pretrained!r}")
    if tag and isinstance(pretrained, str) and pretrained != tag:
        raise ConfigError(f"{name}.{tag} and pretrained={pretrained!r} name two files; give one")
    if tag and pretrained:
        pretrained = tag
    if pretrained and checkpoint_path is not None:
        raise ConfigError("give either pretrained or checkpoint_path, not both")
    # A generator's mechanisms share their parameters where they can; its file says whether it fits.
    is_timm = entry.timm_name is not None
    if is_timm and (pretrained or checkpoint_path is not None) and kwargs.get("attention"):
        raise ConfigError(_NO_WEIGHTS_FIT.format(name))
    if pretrained:
        _refuse_other_files(kwargs)
    if num_classes is not None:
        if isinstance(num_classes, bool) or not isinstance(num_classes, Integral) or num_classes < 0:
            raise ConfigError(f"num_classes must be 0 (no classifier) or more, found {num_classes!r}")
        kwargs["num_classes"] = num_classes
    _refuse_numbers(kwargs)

    state = None
    if checkpoint_path is not None:
        from zoo.weights.loader import read_state_dict

        state, source = read_state_dict(checkpoint_path), str(checkpoint_path)
    elif pretrained:
        from zoo.weights.loader import read_pretrained

        state, source = read_pretrained(name, None if pretrained is True else pretrained)
    if is_timm:
        import timm.models

        chosen = tag or pretrained
        if isinstance(chosen, str):  # its images may be cropped in a way of their own
            kwargs.setdefault("pretrained_cfg", chosen)
        model = timm.models.model_entrypoint(entry.timm_name)(**kwargs)
    else:
        from zoo.diffusion.transformers import as_diffusers

        model = as_diffusers(entry.model, {**_row(entry), **kwargs})
    if state is not None:
        _load(model, state, source, strict=True)
    return model


def list_models(
    pattern: str = "*", family: str | None = None, task: str | None = None, pretrained: bool = False
) -> list[str]:
    """Names of the models, sorted; `pattern` is a glob such as "dinat*".

    Raises: ConfigError for an unknown family or task.
    """
    if not isinstance(pattern, str):
        raise ConfigError(f"pattern must be a text such as 'dinat*', found {pattern!r}")
    entries = _all().values()
    for argument, value, known in (
        ("family", family, sorted({entry.family for entry in entries})),
        ("task", task, sorted({entry.task for entry in entries})),
    ):
        if value is not None and value not in known:
            raise ConfigError(
                f"unknown {argument} {value!r}; use {', '.join(known)}{did_you_mean(value, known)}"
            )
    names = (
        entry.name
        for entry in entries
        if fnmatchcase(entry.name, pattern) and family in (None, entry.family) and task in (None, entry.task)
    )
    if pretrained:
        from zoo.weights.manifest import entries_of

        names = (name for name in names if entries_of(name))
    return sorted(names)


def model_info(name: str) -> ModelInfo:
    """Collect what is known of a model: size and cost, paper, weights, recipes.

    Raises: ConfigError for an unknown name.
    """
    import torch

    from zoo.layers import count_macs
    from zoo.weights.manifest import entries_of

    entry = _find(name)
    with torch.device("meta"):
        if entry.timm_name is None:
            model, (latents, *others) = generator(name)
            input_size = tuple(latents.shape[1:])
        else:
            model, others = create_model(name), ()
            input_size = tuple(model.default_cfg["input_size"])
    weights = entries_of(name)
    published = [w.metric["top1"] for w in weights if w.metric and "top1" in w.metric]
    return ModelInfo(
        name=name,
        family=entry.family,
        task=entry.task,
        attention=entry.attention,
        paper=entry.paper,
        params=sum(parameter.numel() for parameter in model.parameters()),
        macs=count_macs(model, input_size, *others),
        input_size=input_size,
        num_classes=getattr(model, "num_classes", 0),
        top1=published[0] if published else None,
        weights=tuple(w.summary() for w in weights),
        licence=next((w.license for w in weights if w.license), None),
        recipes=tuple(_recipes_of(name)),
    )


def family_of(name: str) -> str:
    """The family of a model, such as "nat". Raises: ConfigError for an unknown name."""
    return _find(name).family


def generator(name: str, side: int | None = None) -> tuple[nn.Module, tuple[Tensor, ...]]:
    """The plain module of a generator, and what its forward takes, for latents of `side` pixels.

    `side` None is the size that the model is meant for. Needs no diffusers.
    Raises: ConfigError for an unknown name or another task.
    """
    import torch

    entry = _find(name)
    if entry.timm_name is not None:
        raise ConfigError(f"{name} is no generator; its task is {entry.task}")
    row = _row(entry)
    if side is not None and "sample_size" in row:
        row["sample_size"] = side
    model = entry.model(**row)
    latents, *others = model.example_inputs()
    if side is not None:
        latents = torch.zeros(*latents.shape[:-2], side, side)
    return model, (latents, *others)


def load_checkpoint(model: nn.Module, path: str | Path, strict: bool = True) -> list[str]:
    """Load a published or own weights file into a model, as it is: wrapper keys, prefixes and layouts
    included.

    With `strict` every parameter must be found with its shape, else nothing is loaded; without, what does
    not fit is left out. A classifier for another number of classes is always left as initialised. Returns
    the keys left out. Raises: IntegrityError naming the file and the first five keys that do not fit.
    """
    from zoo.weights.loader import read_state_dict

    return _load(model, read_state_dict(path), str(path), strict=strict)


def _load(model: nn.Module, state: dict[str, Tensor], source: str, *, strict: bool) -> list[str]:
    model = _unwrapped(model)
    target = getattr(model, "model", model) if hasattr(model, "feature_info") else model
    if any(parameter.is_meta for parameter in target.parameters()):
        raise ConfigError(
            f"{type(target).__name__} is on the meta device, which holds no numbers; build it on another, or "
            "call to_empty(device=...) before loading"
        )
    if hasattr(target, "filter_checkpoint"):
        try:
            state = target.filter_checkpoint(state, target)
        except (LookupError, RuntimeError, TypeError, ValueError) as error:  # by shapes that no such file has
            raise IntegrityError(
                f"{source} has the names of {type(target).__name__} but not its shapes "
                f"({str(error).splitlines()[0]}); use the model the file was made with"
            ) from error
    own = target.state_dict()
    state = _first_convolution_for_channels(target, dict(state), own)
    skipped = _classifier_of_other_classes(target, state, own)
    if skipped:
        log.info("%s: the classifier has other classes and stays as initialised", source)
    headless = getattr(target, "num_classes", None) == 0
    classifier = tuple(f"{name}." for name in _names(target, "classifier"))
    extra = [key for key in state if key not in own and not (headless and key.startswith(classifier))]
    pruned = target is not model  # a feature extractor has no norm, no classifier and perhaps fewer stages
    problems = {
        "missing": [key for key in own if key not in state],
        "unexpected": [] if pruned else extra,
        "misshapen": [
            f"{key} {_kind(value)} instead of {_kind(own[key])}"
            for key, value in state.items()
            if key in own and key not in skipped and not _is_like(value, own[key])
        ],
    }
    wrong = {kind: keys for kind, keys in problems.items() if keys}
    if wrong and strict:
        told = "; ".join(
            f"{len(keys)} {kind}: {', '.join(keys[:5])}{', ...' if len(keys) > 5 else ''}"
            for kind, keys in wrong.items()
        )
        raise IntegrityError(
            f"{source} does not fit {type(target).__name__} ({told}); use the model the file was made with, "
            "or strict=False to load what fits"
        )
    fitting = {
        key: value
        for key, value in state.items()
        if key in own and key not in skipped and _is_like(value, own[key])
    }
    if not fitting:
        raise IntegrityError(f"{source} has no entry that fits {type(target).__name__}")
    for key, value in fitting.items():
        if value.is_floating_point() and not value.isfinite().all():
            raise IntegrityError(
                f"{source}: {key} holds infinite numbers or NaN; training went wrong or it is damaged"
            )
    target.load_state_dict(fitting, strict=False)
    return sorted(
        [*skipped, *problems["missing"], *extra, *(key.split()[0] for key in problems["misshapen"])]
    )


def _unwrapped(model: nn.Module) -> nn.Module:
    """The model in what torch.compile, data parallelism and weight averaging put around it."""
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not hasattr(inner, "state_dict"):
            return model
        model = inner


def _is_like(value: Tensor, own: Tensor) -> bool:
    """Whether a tensor of a file can be one of a model: integers and complex numbers are no weights."""
    return value.shape == own.shape and value.is_floating_point() >= own.is_floating_point()


def _kind(x: Tensor) -> str:
    return f"{list(x.shape)}{'' if x.is_floating_point() else f' of {x.dtype}'}"


def _names(model: nn.Module, role: str) -> tuple[str, ...]:
    """The layers with this role in timm's configuration, such as "classifier" or "first_conv"."""
    names = (getattr(model, "default_cfg", None) or {}).get(role) or ()
    return (names,) if isinstance(names, str) else tuple(names)


def _first_convolution_for_channels(
    model: nn.Module, state: dict[str, Tensor], own: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Fit colour filters to another number of image channels as timm does: summed or repeated."""
    from timm.models import adapt_input_conv

    for name in _names(model, "first_conv"):
        theirs, ours = state.get(f"{name}.weight"), own.get(f"{name}.weight")
        if theirs is None or ours is None or theirs.ndim != 4 or theirs.shape[1] != 3 or ours.shape[1] == 3:
            continue
        state[f"{name}.weight"] = adapt_input_conv(ours.shape[1], theirs)
    return state


def _classifier_of_other_classes(
    model: nn.Module, state: Mapping[str, Tensor], own: Mapping[str, Tensor]
) -> list[str]:
    """Keys of classifiers that differ from the model's in the number of classes and in nothing else."""
    keys = []
    for name in _names(model, "classifier"):
        theirs, ours = state.get(f"{name}.weight"), own.get(f"{name}.weight")
        if theirs is None or ours is None or theirs.ndim != ours.ndim:
            continue
        if theirs.shape[1:] == ours.shape[1:] and theirs.shape[0] != ours.shape[0]:
            keys += [key for key in (f"{name}.weight", f"{name}.bias") if key in own]
    return keys


def _refuse_numbers(kwargs: Mapping[str, Any]) -> None:
    """Refuse what timm would take and compute nonsense with."""
    at_least(1, in_chans=kwargs.get("in_chans", 3))
    below_one(**{key: rate for key, rate in kwargs.items() if key.endswith("_rate")})
    stages = kwargs.get("out_indices")
    if stages is not None and not kwargs.get("features_only"):
        raise ConfigError("out_indices are the stages of features_only=True, which is not given")
    each = (0,) if stages is None else stages if isinstance(stages, list | tuple) else (stages,)
    if not each or not all(isinstance(i, Integral) and not isinstance(i, bool) for i in each):
        raise ConfigError(
            f"out_indices must be stages, such as (1, -1), or the number of last ones; found {stages!r}"
        )


def _refuse_other_files(kwargs: Mapping[str, Any]) -> None:
    """Refuse weights that timm's configuration names beside `pretrained`: they would not be read."""
    for argument in ("pretrained_cfg", "pretrained_cfg_overlay"):
        given = kwargs.get(argument)
        for key in ("file", "url", "hf_hub_id", "state_dict"):
            if isinstance(given, Mapping) and given.get(key):
                raise ConfigError(
                    f"{argument} names weights ({key}), which pretrained does not read; "
                    "give checkpoint_path=FILE instead of pretrained"
                )


def _all() -> dict[str, Entry]:
    import_module("zoo.models")
    return _entries


def _split(name: str) -> tuple[str, str]:
    """A name and the tag of its weights behind a point, as timm lists them; "" where there is none.

    Raises: ConfigError for a tag that the model has no weights of.
    """
    body, _, tag = str(name).partition(".")
    if not tag or body not in _all():
        return name, ""
    from zoo.weights.loader import find_entry

    return body, find_entry(body, tag).tag


def _find(name: str) -> Entry:
    entries = _all()
    if not isinstance(name, str) or name not in entries:
        near = did_you_mean(str(name), entries) or "; zoo.list_models() has all names"
        raise ConfigError(f"unknown model {name!r}{near}")
    return entries[name]


def _arguments(entry: Entry) -> set[str]:
    """Every keyword argument that the entry's model understands."""
    own = set(inspect.signature(entry.model.__init__).parameters) - {"self", "cfg"}
    if entry.timm_name is None:
        return own
    return own | _fields(entry) | set(_BUILDER_ARGUMENTS)


def _fields(entry: Entry) -> set[str]:
    """The fields of the entry's row that its model reads."""
    return {f.name for f in fields(entry.config)} - set(entry.model.unused_fields)


def _row(entry: Entry) -> dict[str, Any]:
    """The fields of the entry's row, by name."""
    return {f.name: getattr(entry.config, f.name) for f in fields(entry.config)}


def _entry_point(entry: Entry) -> Callable[..., nn.Module]:
    """The function timm calls for a name; arguments that are fields of the row replace them."""

    def build(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        from timm.models import build_model_with_cfg

        row = _fields(entry) - set(inspect.signature(entry.model.__init__).parameters)
        own = {key: kwargs.pop(key) for key in row & kwargs.keys()}
        if kwargs.get("img_size") is not None:  # timm's name of it
            if "input_size" in own:
                raise ConfigError("give input_size or timm's img_size, not both")
            own["input_size"] = _side(kwargs.pop("img_size"))
        config = replaced(entry.config, own)
        if config.input_size != entry.config.input_size:  # then what timm says of the model follows
            side = config.input_size
            said = {"input_size": (3, side, side), **entry.model.default_cfg(config)}
            kwargs["pretrained_cfg_overlay"] = said | (kwargs.get("pretrained_cfg_overlay") or {})
        attention, attention_kwargs = kwargs.pop("attention", None), kwargs.pop("attention_kwargs", None)
        if attention is None and attention_kwargs:
            raise ConfigError("attention_kwargs are the arguments of attention=, which is not given")
        if attention is not None:
            if pretrained:
                raise ConfigError(_NO_WEIGHTS_FIT.format(entry.name))
            for argument in sorted(own.keys() & set(entry.model.attention_fields)):
                raise ConfigError(
                    f"{argument} is of {entry.name}'s own attention, which attention={attention!r} takes the "
                    "place of; give attention_kwargs what that one takes"
                )
            if "qkv_bias" in own:
                attention_kwargs = {"qkv_bias": own["qkv_bias"], **(attention_kwargs or {})}
        if kwargs.get("feature_cls", "getter") != "getter":
            raise ConfigError(
                f"feature_cls must be 'getter', found {kwargs['feature_cls']!r}; "
                "a hook would hand out maps with channels last"
            )
        tag, tags = (
            kwargs.get("pretrained_cfg"),
            sys.modules[build.__module__].default_cfgs[entry.timm_name].tags,
        )
        if isinstance(tag, str) and tag not in tags:
            raise ConfigError(
                f"pretrained_cfg {tag!r} is no tag of {entry.name}; use {', '.join(map(repr, tags))}"
                f"{did_you_mean(tag, tags)}"
            )
        try:
            model = build_model_with_cfg(
                entry.model,
                entry.timm_name,
                pretrained,
                model_cfg=config,
                pretrained_filter_fn=entry.model.filter_checkpoint,
                # timm gives it to models of fixed size; ours read the row's input_size.
                kwargs_filter=("img_size",),
                feature_cfg={"out_indices": entry.model.default_features(config), "feature_cls": "getter"},
                **kwargs,
            )
        except AssertionError as error:  # timm's way to say that there are fewer stages
            raise ConfigError(f"out_indices={kwargs.get('out_indices')}: {error}") from None
        if attention is not None:
            from zoo.attention.swap import swap_attention

            swap_attention(getattr(model, "model", model), attention, attention_kwargs)
        return model

    build.__name__ = build.__qualname__ = entry.timm_name
    build.__module__ = entry.model.__module__
    build.__doc__ = f"{entry.name}: {entry.attention} attention, {entry.paper}."
    return build


def _side(img_size: Any) -> int:
    """The side of square images from timm's `img_size`, a number or two."""
    sides = tuple(img_size) if isinstance(img_size, list | tuple) else (img_size,)
    if len(set(sides)) != 1:
        raise ConfigError(
            f"img_size must be that of squares, found {img_size!r}; a model of any size takes rectangles as "
            "they come"
        )
    return sides[0]


def _timm_cfgs(entry: Entry, cfg: Mapping[str, Any]) -> Any:
    """timm's configuration of a model, one for every published weights file."""
    from collections import deque

    from timm.models import DefaultCfg, PretrainedCfg

    from zoo.weights.manifest import entries_of

    config = entry.config
    common = {
        "num_classes": config.num_classes,
        "input_size": (3, config.input_size, config.input_size),
        "crop_pct": config.crop_pct,
        "classifier": "head",
        **cfg,
        **entry.model.default_cfg(config),
    }
    tagged = {
        weights.tag: PretrainedCfg(
            **{
                **common,
                "url": weights.url or "",
                "hf_hub_id": "/".join((weights.hub or "").split("/")[:2]) or None,
                "file": str(weights.packaged) if weights.packaged else None,
                "license": weights.license,
                "origin_url": weights.source or "",
                **weights.input,
            }
        )
        for weights in entries_of(entry.name)
    } or {"": PretrainedCfg(**common)}
    return DefaultCfg(tags=deque(tagged), cfgs=tagged)


def _recipes_of(name: str) -> list[str]:
    """Recipes that train this model, found by reading their files as text."""
    import zoo

    for root in map(Path, zoo.__path__):
        folder = root / "recipes" / "configs"
        if folder.is_dir():
            return sorted(
                path.relative_to(folder).with_suffix("").as_posix()
                for path in folder.rglob("*.yaml")
                if name in (line.partition("name:")[2].strip() for line in path.read_text().splitlines())
                or name in (line.partition("model:")[2].strip() for line in path.read_text().splitlines())
            )
    return []
