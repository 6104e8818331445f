"""Fields of a model's row given as arguments: right types pass, everything else is one sentence."""

from __future__ import annotations

import re
from dataclasses import fields

import numpy as np
import pytest

import zoo
from zoo import registry
from zoo.models.dat import DATConfig
from zoo.models.nat import NATConfig
from zoo.rows import replaced


@pytest.mark.parametrize("name", zoo.list_models())
def test_every_row_is_right_by_its_own_types(name):
    row = registry._find(name).config
    assert replaced(row, {field.name: getattr(row, field.name) for field in fields(row)}) == row


def test_lists_become_tuples_and_numbers_of_arrays_plain():
    row = replaced(NATConfig(), {"dims": [8, 16, 32, 64], "kernel_size": np.int64(5), "mlp_ratio": 2})
    assert (row.dims, row.kernel_size, row.mlp_ratio) == ((8, 16, 32, 64), 5, 2.0)
    assert type(row.kernel_size) is int and type(row.mlp_ratio) is float
    assert replaced(NATConfig(), {"dilations": [[1], [1, 2], [1], [1]]}).dilations == (
        (1,),
        (1, 2),
        (1,),
        (1,),
    )


@pytest.mark.parametrize(
    ("key", "value", "words"),
    [
        ("depths", -1, "depths must be a tuple of whole numbers above 0, found -1"),
        ("depths", (1, 0, 1, 1), "depths must be a tuple of whole numbers above 0, found (1, 0, 1, 1)"),
        ("dims", (), "dims must be a tuple of whole numbers above 0, found ()"),
        ("kernel_size", "7", "kernel_size must be a whole number above 0, found '7'"),
        ("kernel_size", True, "kernel_size must be a whole number above 0, found True"),
        ("mlp_ratio", float("nan"), "mlp_ratio must be a number above 0, found nan"),
        ("layer_scale", "x", "layer_scale must be a number above 0 or None, found 'x'"),
        ("qkv_bias", "no", "qkv_bias must be true or false, found 'no'"),
        ("num_classes", -1, "num_classes must be a whole number above -1, found -1"),
        (
            "dilations",
            5,
            "dilations must be a tuple of tuples of whole numbers above 0 or a text or None, found 5",
        ),
        (
            "dims",
            (8, 16),
            "dims=(8, 16) has 2 stages and depths=(3, 4, 6, 5), num_heads=(2, 4, 8, 16) another",
        ),
    ],
)
def test_a_wrong_value_is_one_sentence(key, value, words):
    with pytest.raises(zoo.ConfigError, match=re.escape(words)):
        replaced(NATConfig(), {key: value})


def test_only_a_range_may_be_negative():
    assert replaced(DATConfig(), {"offset_range_factor": -2}).offset_range_factor == -2.0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"depths": -1}, "depths must be a tuple"),
        ({"in_chans": 0}, "in_chans must be a whole number from 1, found 0"),
        ({"drop_path_rate": 2.0}, "drop_path_rate must be from 0 to below 1, found 2.0"),
        ({"drop_path_rate": "x"}, "drop_path_rate must be from 0 to below 1, found 'x'"),
    ],
)
@pytest.mark.parametrize("name", ["nat_digits", "davit_digits", "biformer_digits"])
def test_a_model_is_not_built_with_it(name, arguments, words):
    with pytest.raises(zoo.ConfigError, match=words):
        zoo.create_model(name, **arguments)
