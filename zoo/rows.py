"""Rows of the model table: what replaces a field of one is checked against the field's type before a model is
built."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from dataclasses import fields, replace
from numbers import Integral, Real
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from zoo.errors import ConfigError

Row = TypeVar("Row")
# Other whole numbers count things of which there is at least one.
FROM_ZERO = ("num_classes", "shift", "side_dwconv", "proj_drop")
ANY_SIGN = ("offset_range_factor",)  # other numbers are ratios and shares


def replaced(row: Row, values: Mapping[str, Any]) -> Row:
    """Return a row, a dataclass of a family, with some of its fields replaced; lists become tuples.

    Raises: ConfigError for a value of another type than the field's, a count or ratio that is not above 0,
        and fields of another number of stages than `dims`.
    """
    hints = get_type_hints(type(row))
    made = replace(row, **{key: fitted(key, value, hints[key]) for key, value in values.items()})
    _refuse_stages(made)
    _refuse_ratios(made)
    return made


def fitted(key: str, value: Any, hint: Any, inside: str = "") -> Any:
    """Return a value as the type says, lists as tuples.

    Raises: ConfigError for a value of another type, with `inside` telling where the key is.
    """
    above = -math.inf if key in ANY_SIGN else -1 if key in FROM_ZERO else 0
    try:
        return _either(hint, value, above)
    except TypeError:
        raise ConfigError(f"{key}{inside} must be {_words(hint, above)}, found {value!r}") from None


def _kinds(hint: Any) -> tuple[Any, ...]:
    return get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)


def _as(kind: Any, value: Any, above: float) -> Any:
    """The value as that type. Raises: TypeError where it is of another."""
    inner, is_bool = get_args(kind), isinstance(value, bool)
    if get_origin(kind) is tuple and isinstance(value, list | tuple):
        every = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        if value and len(every) == len(value):
            return tuple(_either(each, one, above) for each, one in zip(every, value, strict=True))
    elif kind is int and isinstance(value, Integral) and not is_bool and value > above:
        return int(value)
    elif kind is float and isinstance(value, Real) and not is_bool and above < value < math.inf:
        return float(value)
    elif kind in (bool, str, types.NoneType) and isinstance(value, kind):
        return value
    raise TypeError


def _either(hint: Any, value: Any, above: float) -> Any:
    for kind in _kinds(hint):
        try:
            return _as(kind, value, above)
        except TypeError:
            continue
    raise TypeError


def _words(hint: Any, above: float, many: bool = False) -> str:
    """A type in words, `many` of it where it is asked for in a tuple."""
    kinds = _kinds(hint)
    if len(kinds) > 1:
        return " or ".join(_words(kind, above, many) for kind in kinds)
    names = {
        int: (f"a whole number above {above}", f"whole numbers above {above}"),
        float: (f"a number above {above}", f"numbers above {above}"),
        str: ("a text", "texts"),
        bool: ("true or false", "true or false"),
        types.NoneType: ("None", "None"),
    }
    if hint in names:
        return names[hint][many]
    inner = get_args(hint)
    count = "" if inner[-1] is Ellipsis else f"{len(inner)} "
    return f"{'tuples' if many else 'a tuple'} of {count}{_words(inner[0], above, True)}"


def _refuse_stages(row: Any) -> None:
    """Refuse a row whose tuples, all of which go stage by stage, differ in length."""
    if not hasattr(row, "dims"):
        return
    tuples = {field.name: getattr(row, field.name) for field in fields(row)}
    tuples = {key: value for key, value in tuples.items() if isinstance(value, tuple)}
    wrong = {key: value for key, value in tuples.items() if len(value) != len(row.dims)}
    if wrong:
        found = ", ".join(f"{key}={value}" for key, value in wrong.items())
        raise ConfigError(
            f"dims={row.dims} has {len(row.dims)} stages and {found} another number; give one value a stage"
        )


def _refuse_ratios(row: Any) -> None:
    """Refuse an MLP without a hidden channel."""
    key = "mlp_ratios" if hasattr(row, "mlp_ratios") else "mlp_ratio"
    ratios, dims = getattr(row, key, ()), getattr(row, "dims", None) or (getattr(row, "dim", 0),)
    ratios = ratios if isinstance(ratios, tuple) else (ratios,) * len(dims)
    for ratio, dim in zip(ratios, dims, strict=False):
        if int(ratio * dim) < 1:
            raise ConfigError(f"{key} must leave an MLP a channel, found {ratio} of {dim}")
