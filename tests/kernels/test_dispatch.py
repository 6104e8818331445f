"""The backend a call uses: chosen once, scoped to a block and a thread, never replaced silently."""

from __future__ import annotations

import threading

import pytest
import torch

from zoo import ops

X = torch.randn(1, 6, 6, 1, 4)


def used() -> str:
    return ops.explain("neighborhood_attention", X, X, X, 3).backend


def test_a_block_sets_the_backend_and_gives_it_back():
    assert used() == "cpu"
    with ops.use_backend("reference"):
        assert used() == "reference"
        with ops.use_backend("cpu"):
            assert used() == "cpu"
        assert used() == "reference"
    assert used() == "cpu"


def test_an_exception_gives_it_back_too():
    with pytest.raises(KeyError), ops.use_backend("reference"):
        raise KeyError
    assert used() == "cpu"


def test_a_name_given_to_the_call_wins_over_the_block():
    with ops.use_backend("reference"):
        told = ops.explain("neighborhood_attention", X, X, X, 3, backend="cpu")
    assert told.backend == "cpu"


def test_threads_do_not_see_each_other():
    seen = []
    thread = threading.Thread(target=lambda: seen.append(used()))
    with ops.use_backend("reference"):
        thread.start()
        thread.join()
    assert seen == ["cpu"]


def test_an_unknown_name_is_refused_with_the_near_ones():
    with pytest.raises(ValueError, match="unknown backend 'referense'.*did you mean reference"):
        with ops.use_backend("referense"):
            pass


def test_every_backend_says_whether_it_can_run_here():
    rows = {(row.op, row.backend): row.reason for row in ops.backends()}
    assert rows[("neighborhood_attention", "reference")] is None
