"""The backend a call uses: chosen once, scoped to a block and a thread, never replaced silently."""

from __future__ import annotations

import threading

import pytest
import torch

from zoo import ops
from zoo.kernels import dispatch

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


@pytest.fixture
def toy(monkeypatch):
    """An operation on numbers: `fast` takes even ones, `absent` is not installed, `plain` takes all."""
    table = (
        dispatch.Backend("absent", run=float, why_not=lambda call: None, missing=lambda: "not installed"),
        dispatch.Backend("fast", run=float, why_not=lambda call: "the number is odd" if call % 2 else None),
        dispatch.Backend("plain", run=float, why_not=lambda call: None),
    )
    monkeypatch.setitem(dispatch.OPERATIONS, "toy", table)


def test_auto_takes_the_first_that_can_and_says_why_not_the_others(toy):
    assert dispatch.resolve("toy", "auto", 2)[0].name == "fast"
    backend, reason = dispatch.resolve("toy", "auto", 3)
    assert backend.name == "plain"
    assert reason == "absent cannot: not installed; fast cannot: the number is odd"


def test_a_named_backend_is_never_replaced(toy):
    assert dispatch.resolve("toy", "plain", 2)[0].name == "plain"
    with pytest.raises(RuntimeError, match="'fast' cannot run toy: the number is odd; use plain"):
        dispatch.resolve("toy", "fast", 3)
    with (
        dispatch.use_backend("absent"),
        pytest.raises(RuntimeError, match="not installed; use fast or plain"),
    ):
        dispatch.resolve("toy", "auto", 2)
    with pytest.raises(ValueError, match="toy has no backend 'plane'.*did you mean plain"):
        dispatch.resolve("toy", "plane", 2)


def test_the_choice_of_a_block_can_be_taken_along():
    with ops.use_backend("reference"):
        taken = ops.current_backend()
    with ops.use_backend(taken):
        assert used() == "reference"


def test_every_backend_says_whether_it_can_run_here():
    rows = {(row.op, row.backend): row.reason for row in ops.backends()}
    assert rows[("neighborhood_attention", "reference")] is None
