"""Letter E of the reliability checks, operations and backends: R39 to R44, every operation by one table.

What is particular to one operation is in tests/kernels; scorecard.yaml lists the tests elsewhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from zoo import ops
from zoo.kernels import dispatch
from zoo.kernels.dispatch import OPERATIONS
from zoo.layers.checkpoint import checkpoint


@dataclass(frozen=True)
class Case:
    """Shapes of an operation's tensors by B, H and D, its other arguments, and what depends on the batch."""

    tensors: dict[str, str]
    options: dict[str, Any] = field(default_factory=dict)
    others: Callable[[int], dict[str, Any]] = lambda batch: {}

    def inputs(
        self,
        dtype: torch.dtype = torch.float32,
        *,
        B: int = 2,
        H: int = 2,
        D: int = 8,
        N: int = 6,
        M: int = 5,
    ):
        """The tensors, the first of which decides what the result looks like."""
        sizes = {"B": B, "H": H, "D": D, "N": N, "M": M, "G": 1, "C": H * D}
        shapes = {
            name: [sizes[letter] if letter in sizes else int(letter) for letter in shape.split()]
            for name, shape in self.tensors.items()
        }
        return {
            name: (torch.rand(shape) * 2 - 1 if name == "positions" else torch.randn(shape)).to(dtype)
            for name, shape in shapes.items()
        }


def call(op: str, tensors: dict[str, Tensor], backend: str = "auto", **others: Any) -> Tensor:
    """The operation on these tensors with the other arguments of its case."""
    case = CASES[op]
    batch = next(iter(tensors.values())).shape[0]
    return getattr(ops, op)(**tensors, **{**case.options, **case.others(batch), **others}, backend=backend)


MAPS = dict.fromkeys("qkv", "B N N H D")
BLOCKS = ops.BlockList.from_mask(
    torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 1]], dtype=torch.bool), block_size=2
)
CASES = {
    "agent_attention": Case({"q": "B N H D", "k": "B M H D", "v": "B M H D", "agents": "B 2 H D"}),
    "aligned_attention": Case(MAPS, {"radius": 1}),
    "attention": Case({"q": "B N H D", "k": "B M H D", "v": "B M H D"}),
    "bilevel_routing_attention": Case(
        MAPS,
        {"regions": 2},
        lambda batch: {"routes": torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]]).expand(batch, -1, -1)},
    ),
    "block_sparse_attention": Case(dict.fromkeys("qkv", "B N H D"), {"blocks": BLOCKS}),
    "channel_attention": Case(MAPS),
    "deformable_attention": Case(
        {"q": "B N N H D", "k": "B M H D", "v": "B M H D", "positions": "B G M 2", "table": "H N N"}
    ),
    "deformable_sample": Case({"x": "B N N C", "positions": "B G M 2"}),
    "gated_residual": Case({"x": "B N C", "y": "B N C", "gate": "B G C"}),
    "modulated_norm": Case({"x": "B N C", "scale": "B G C", "shift": "B G C"}),
    "neighborhood_attention": Case(MAPS, {"kernel_size": 3}),
    "rotary_norm": Case({"x": "B N H D", "weight": "D"}),
    "window_attention": Case(MAPS, {"window_size": 3, "shift": 1}),
}
# The same over N tokens in a row, any number of them: other shapes where there are maps, and other arguments.
ROW = dict.fromkeys("qkv", "B 1 N H D")
IN_A_ROW = {
    "aligned_attention": (ROW, lambda n: {"radius": (0, 2)}),
    "bilevel_routing_attention": (
        dict.fromkeys("qkv", "B 2 N H D"),
        lambda n: {"regions": (2, 1), "routes": torch.tensor([[[1], [0]]])},
    ),
    "block_sparse_attention": (
        dict.fromkeys("qkv", "B N H D"),
        lambda n: {"blocks": ops.BlockList.from_mask(torch.ones(2 * [-(-n // 8)]).tril() > 0, block_size=8)},
    ),
    "channel_attention": (ROW, lambda n: {}),
    "deformable_attention": (
        {"q": "B 1 N H D", "k": "B M H D", "v": "B M H D", "positions": "B G M 2", "table": "H 3 5"},
        lambda n: {},
    ),
    "deformable_sample": ({"x": "B 1 N C", "positions": "B G M 2"}, lambda n: {}),
    "neighborhood_attention": (dict.fromkeys("qkv", "B N H D"), lambda n: {"kernel_size": min(n, 5)}),
    "window_attention": (
        dict.fromkeys("qkv", "B N 6 H D"), lambda n: {"window_size": (1, 3), "shift": (0, 1)}
    ),
}  # fmt: skip
LENGTHS, WIDTHS = (1, 2, 5, 17, 97, 257), (10, 12, 33, 59, 80, 111)
# What returns an LSE; PyTorch's own attention does not.
WITH_LSE = (
    "aligned_attention", "attention", "bilevel_routing_attention", "block_sparse_attention",
    "deformable_attention", "neighborhood_attention", "window_attention",
)  # fmt: skip
RUNNABLE = [
    (op, backend.name)
    for op, table in sorted(OPERATIONS.items())
    for backend in table
    if op in CASES and backend.missing() is None and backend.name not in ("natten", "flex", "xformers")
]
every_backend = pytest.mark.parametrize(("op", "backend"), RUNNABLE)
every_operation = pytest.mark.parametrize("op", CASES)


def gradients(out: Tensor, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of the sum of squares, by name."""
    found = torch.autograd.grad(out.float().square().sum(), list(tensors.values()), materialize_grads=True)
    return dict(zip(tensors, found, strict=True))


def leaves(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: x.detach().requires_grad_() for name, x in tensors.items()}


def in_a_row(op: str, length: int, width: int, keys: int = 5) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors in float64 and arguments of an operation over so many tokens of so many channels."""
    tensors, others = IN_A_ROW.get(op, (CASES[op].tensors, lambda n: {}))
    length = max(length, 2) if op == "neighborhood_attention" else length  # of one token there is no window
    return Case(tensors).inputs(torch.float64, B=1, D=width, N=length, M=keys), others(length)


def everything(
    op: str, tensors: dict[str, Tensor], backend: str, others: dict[str, Any], with_lse: bool
) -> list[Tensor]:
    """The output, its LSE where asked for, and the gradients of both."""
    tensors, options = leaves(tensors), {"return_lse": True} if with_lse else {}
    out = call(op, tensors, backend, **others, **options)
    found = list(out) if with_lse else [out]
    loss = sum(x.to(torch.promote_types(x.dtype, torch.float32)).square().sum() for x in found)
    return found + list(torch.autograd.grad(loss, list(tensors.values()), materialize_grads=True))


def compare_in_a_row(
    op: str, backend: str, dtype: torch.dtype, sizes: tuple[int, int, int], slack: float = 0.0
) -> None:
    """Hold a backend against the definition in float64, over so many tokens of so many channels and keys."""
    torch.manual_seed(sum(sizes))
    tensors, others = in_a_row(op, *sizes)
    exact = {name: x.to(dtype).double() for name, x in tensors.items()}
    low = {name: x.to(dtype) for name, x in exact.items()}
    with_lse = op in WITH_LSE and backend != "sdpa"
    truth = everything(op, exact, "reference", others, with_lse)
    # Gradients on one scale: where they cancel, what is left is a rounding of their parts.
    results, rounding = 1 + with_lse, torch.finfo(dtype).eps
    scales = [max(1.0, x.abs().max().item()) for x in truth]
    scales[results:] = [max(scales[results:])] * len(tensors)
    ours, theirs = (
        [
            (a.double() - b).abs().max().item() / scale
            for a, b, scale in zip(everything(op, low, name, others, with_lse), truth, scales, strict=True)
        ]
        for name in (backend, "reference")
    )
    for place, (error, budget) in enumerate(zip(ours, theirs, strict=True)):
        error -= slack
        if dtype == torch.float64:
            assert error <= 1e-12, place
        elif place < results:
            assert error <= 2 * budget + 1e-5, place
        else:  # what was saved for the backward pass may have been rounded
            assert error <= 2 * max(budget, rounding) + 2e-4, place


def test_every_operation_with_backends_is_in_the_table():
    assert set(CASES) == set(OPERATIONS)


@every_backend
def test_a_default_device_changes_nothing(op, backend):
    case = CASES[op]
    tensors, others = leaves(case.inputs()), {**case.options, **case.others(2)}
    expected = getattr(ops, op)(**tensors, **others, backend=backend)
    with torch.device("meta"):
        out = getattr(ops, op)(**tensors, **others, backend=backend)
        found = gradients(out, tensors)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    torch.testing.assert_close(found, gradients(expected, tensors), rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:.torch.jit.script. is deprecated:FutureWarning")  # by PyTorch itself
@every_operation
def test_forward_mode_differentiation_finds_a_backend(op):
    case = CASES[op]
    tensors, others = case.inputs(dtype=torch.float64), {**case.options, **case.others(2)}
    changes = {name: torch.randn_like(x) for name, x in tensors.items()}
    function = lambda tensors: getattr(ops, op)(**tensors, **others)  # noqa: E731
    _, forward = torch.func.jvp(function, (tensors,), (changes,))
    graph = {name: x.requires_grad_() for name, x in tensors.items()}
    out = function(graph)
    back = torch.autograd.grad((out * forward).sum(), list(graph.values()), materialize_grads=True)
    along = sum((grad * change).sum() for grad, change in zip(back, changes.values(), strict=True))
    torch.testing.assert_close(along, forward.square().sum())


# R39: as exact as the same precision allows -----------------------------------------------------------------


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [8, 33])
def test_r39_the_error_is_at_most_twice_that_of_the_definition(op, backend, dtype, width):
    exact = leaves({name: x.to(dtype).double() for name, x in CASES[op].inputs(D=width).items()})
    truth = call(op, exact, "reference")
    truths = gradients(truth, exact)

    def errors(backend: str) -> list[float]:
        tensors = leaves({name: x.to(dtype) for name, x in exact.items()})
        out = call(op, tensors, backend)
        found = gradients(out, tensors)
        pairs = [(out, truth), *((found[name], truths[name]) for name in tensors)]
        return [(a.double() - b).abs().max().item() / b.abs().max().clamp(min=1e-12).item() for a, b in pairs]

    # The definition computes in float32 throughout; a path that keeps what it saves for the backward pass in
    # its own precision may err by a rounding of that.
    output, *others = zip(errors(backend), errors("reference"), strict=True)
    assert output[0] <= 2 * output[1] + 1e-5
    for ours, theirs in others:
        assert ours <= 2 * max(theirs, torch.finfo(dtype).eps) + 2e-4


@pytest.mark.slow
@every_backend
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_r39_any_length_and_width_has_its_values_lse_and_gradients(op, backend, dtype):
    for sizes in zip(LENGTHS, WIDTHS, LENGTHS[::-1], strict=True):
        compare_in_a_row(op, backend, dtype, sizes)


# R40: what has no numbers leaks nowhere, what is large stays finite -----------------------------------------


@every_backend
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_r40_an_image_without_numbers_leaves_the_others_alone(op, backend, bad):
    tensors = CASES[op].inputs()
    expected = call(op, tensors, backend)
    name = next(reversed([name for name in tensors if name in "xqkv"]))
    damaged = {**tensors, name: tensors[name].clone()}
    damaged[name][1] = bad
    torch.testing.assert_close(call(op, damaged, backend)[0], expected[0])


@pytest.mark.parametrize(("op", "backend"), [pair for pair in RUNNABLE if "q" in CASES[pair[0]].tensors])
@pytest.mark.parametrize("factor", [50, 300])
def test_r40_large_logits_stay_finite_and_right(op, backend, factor):
    exact = {name: x.double() for name, x in CASES[op].inputs().items()}
    for name in ("q", "k"):
        exact[name] = exact[name] * factor
    tensors = leaves({name: x.float() for name, x in exact.items()})
    out = call(op, tensors, backend)
    torch.testing.assert_close(out.double(), call(op, exact, "reference"), rtol=1e-3, atol=1e-3)
    assert all(gradient.isfinite().all() for gradient in gradients(out, tensors).values())


# R41: odd arguments have a defined result or are refused by name --------------------------------------------


@every_backend
@pytest.mark.parametrize("empty", ["B", "H", "N"])
def test_r41_nothing_is_nothing_or_refused_by_name(op, backend, empty):
    tensors = leaves(CASES[op].inputs(**{empty: 0}))
    try:
        out = call(op, tensors, backend)
    except (ValueError, RuntimeError) as error:
        assert isinstance(error, ValueError) or "cannot run" in str(error)
        assert empty != "B" or "cannot run" in str(error), "an empty batch is a batch"
        assert "\n" not in str(error)
        return
    first = next(iter(tensors.values()))
    assert out.isfinite().all() and out.shape[0] == first.shape[0]
    assert all(gradient.isfinite().all() for gradient in gradients(out, tensors).values())


@every_operation
def test_r41_an_argument_of_another_kind_is_refused_by_its_name(op):
    tensors = CASES[op].inputs()
    for name in [name for name in tensors if name != next(iter(tensors))]:
        kinds = {
            "another dtype": tensors[name].double(),
            "integers": tensors[name].long(),
            "another device": tensors[name].to("meta"),
        }
        for what, wrong in kinds.items():
            if name in ("positions", "table") and what == "another dtype":
                continue  # they are read in at least float32 whatever the call's dtype is
            with pytest.raises(ValueError, match=rf"^{name}\b"):
                call(op, {**tensors, name: wrong})


@every_operation
def test_r41_integers_and_complex_numbers_are_refused(op):
    tensors = CASES[op].inputs()
    for dtype in (torch.int64, torch.bool, torch.complex64):
        with pytest.raises(ValueError, match=str(dtype)):
            call(op, {name: x.to(dtype) for name, x in tensors.items()})


@every_operation
def test_r41_another_batch_is_refused(op):
    tensors = CASES[op].inputs()
    for name in tensors:
        if CASES[op].tensors[name].startswith("B") and name != next(iter(tensors)):
            with pytest.raises(ValueError, match=name):
                call(op, {**tensors, name: torch.cat([tensors[name]] * 2)})


@every_backend
def test_r41_however_a_tensor_lies_in_memory_it_counts_the_same(op, backend):
    tensors = CASES[op].inputs()
    expected = call(op, tensors, backend)
    strided = {name: torch.stack([x, x + 1], dim=-1)[..., 0] for name, x in tensors.items()}
    swapped = {
        name: x.transpose(1, 2).contiguous().transpose(1, 2) if x.ndim > 2 else x
        for name, x in tensors.items()
    }
    offset = {
        name: torch.cat([x.flatten()[:1], x.flatten()])[1:].view(x.shape) for name, x in tensors.items()
    }
    for variant in (strided, swapped, offset):
        torch.testing.assert_close(call(op, variant, backend), expected)
    one = {name: x[:1] for name, x in tensors.items()} | {
        name: x for name, x in tensors.items() if not CASES[op].tensors[name].startswith("B")
    }
    expanded = {
        name: x.expand(3, *x.shape[1:]) if CASES[op].tensors[name].startswith("B") else x
        for name, x in one.items()
    }
    for row in call(op, expanded, backend):
        torch.testing.assert_close(row, call(op, one, backend)[0])


# R43: the same again, and image by image --------------------------------------------------------------------


@every_backend
def test_r43_the_same_call_gives_the_same_bits(op, backend):
    tensors = leaves(CASES[op].inputs())
    first, second = (call(op, tensors, backend) for _ in range(2))
    assert torch.equal(first, second)
    for one, other in zip(*(gradients(out, tensors).values() for out in (first, second)), strict=True):
        assert torch.equal(one, other)


@every_backend
def test_r43_a_batch_is_its_images_one_by_one(op, backend):
    tensors = CASES[op].inputs(B=8)
    together = call(op, tensors, backend)
    for number in range(8):
        one = {
            name: x[number : number + 1] if CASES[op].tensors[name].startswith("B") else x
            for name, x in tensors.items()
        }
        torch.testing.assert_close(call(op, one, backend)[0], together[number], rtol=1e-5, atol=1e-5)


# R44: backends ----------------------------------------------------------------------------------------------


@every_operation
def test_r44_an_unknown_backend_is_refused_with_those_there_are(op):
    with pytest.raises(ValueError, match="referense.*did you mean reference"):
        call(op, CASES[op].inputs(), "referense")
    names = [backend.name for backend in OPERATIONS[op]]
    assert names[-1] == "reference", "the definition runs whatever the others refuse"


def chosen(op: str, tensors: dict[str, Tensor]) -> str:
    """The backend that a call without a name takes here."""
    case = CASES[op]
    return ops.explain(op, **tensors, **case.options, **case.others(2)).backend


@every_operation
def test_r44_threads_have_backends_of_their_own(op):
    tensors, names = CASES[op].inputs(), [backend for each, backend in RUNNABLE if each == op]
    together, seen = threading.Barrier(len(names), timeout=60), {}

    def work(name: str) -> None:
        with ops.use_backend(name):
            together.wait()
            out = call(op, tensors)
            seen[name] = chosen(op, tensors), out
            together.wait()

    threads = [threading.Thread(target=work, args=(name,)) for name in names]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: backend for name, (backend, _) in seen.items()} == dict(zip(names, names, strict=True))
    for name, (_, out) in seen.items():
        assert torch.equal(out, call(op, tensors, name))


@every_operation
def test_r44_an_exception_gives_the_backend_back(op):
    tensors = CASES[op].inputs()
    before = chosen(op, tensors)
    with pytest.raises(ValueError), ops.use_backend("reference"):
        assert chosen(op, tensors) == "reference"
        call(op, {name: x.long() for name, x in tensors.items()})
    assert chosen(op, tensors) == before


@every_backend
def test_r44_what_is_computed_again_takes_the_backend_of_the_first_time(op, backend, monkeypatch):
    tensors, resolve, used = leaves(CASES[op].inputs()), dispatch.resolve, []

    def spy(*arguments: Any) -> Any:
        used.append(resolve(*arguments)[0].name)
        return resolve(*arguments)

    monkeypatch.setattr(dispatch, "resolve", spy)
    with ops.use_backend(backend):
        out = checkpoint(lambda *x: call(op, dict(zip(tensors, x, strict=True))), *tensors.values())
    found = gradients(out, tensors)
    assert used == [backend] * 2
    for name, x in gradients(call(op, tensors, backend), tensors).items():
        assert torch.equal(found[name], x)


@every_backend
def test_r44_under_autocast_the_result_is_in_its_dtype_and_gradients_in_the_leaves_own(op, backend):
    tensors = leaves(CASES[op].inputs())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = call(op, tensors, backend)
    # Sampling between tokens and sums are no products of matrices: they keep their precision, as in PyTorch.
    kept = op in ("deformable_sample", "gated_residual")
    assert out.dtype == (torch.float32 if kept else torch.bfloat16)
    truth = call(op, tensors, "reference")
    torch.testing.assert_close(out.float(), truth, rtol=0.05, atol=0.05)
    assert {gradient.dtype for gradient in gradients(out, tensors).values()} == {torch.float32}
