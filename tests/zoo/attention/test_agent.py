"""Agent attention as a module: published outputs and gradients, tables on any map, other agents, capture."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from goldens import cases, golden

import zoo
from zoo.attention import AgentAttention
from zoo.attention.stripes import StripeMixing

TABLES = ("an_bias", "na_bias", "ah_bias", "aw_bias", "ha_bias", "wa_bias")


def module(dim=16, num_heads=2, **arguments) -> AgentAttention:
    torch.manual_seed(0)
    arguments = {"agent_num": 4, "map_size": (6, 6), **arguments}
    attention = AgentAttention(dim, num_heads, **arguments).double()
    with torch.no_grad():
        for name, table in attention.named_parameters():
            if name.endswith("_bias"):
                table.normal_()
    return attention


def by_definition(m: AgentAttention, x: torch.Tensor, agents: tuple[int, int]) -> torch.Tensor:
    """The published formulas, token by token, for a map [B, Y, X, C] and agents pooled over a grid."""
    batch, rows, columns, dim = x.shape
    heads, width = m.num_heads, dim // m.num_heads
    p = round(m.agent_num**0.5)
    q, k, v = m.qkv(x).chunk(3, dim=-1)

    def cells(length, count):
        return [(i * length // count, -(-(i + 1) * length // count)) for i in range(count)]

    pooled = [
        q[:, a:b, c:d].mean((1, 2)) for a, b in cells(rows, agents[0]) for c, d in cells(columns, agents[1])
    ]
    pooled = torch.stack(pooled, 1)

    def resize(t, size):  # bilinear, cell centres
        return F.interpolate(t, size, mode="bilinear", align_corners=False)

    def other_agents(t):  # [H, A, N] to [H, agents, N]
        return resize(t.transpose(1, 2).unflatten(2, (p, p)), agents).flatten(2).transpose(1, 2)

    first = resize(m.an_bias, (rows, columns)) + resize(
        m.ah_bias[0] + m.aw_bias[0], (rows, columns)
    )  # [H, A, Y, X]
    second = resize(m.na_bias, (rows, columns)) + resize(
        (m.ha_bias[0] + m.wa_bias[0]).permute(0, 3, 1, 2), (rows, columns)
    )
    first, second = (other_agents(t.flatten(2)) for t in (first, second))
    out = []
    for h in range(heads):
        own = slice(h * width, (h + 1) * width)
        q_, k_, v_ = (t.flatten(1, 2)[..., own] for t in (q, k, v))
        a_ = pooled[..., own]
        gathered = (a_ @ k_.transpose(1, 2) * width**-0.5 + first[h]).softmax(-1) @ v_
        out.append((q_ @ a_.transpose(1, 2) * width**-0.5 + second[h].T).softmax(-1) @ gathered)
    out = torch.cat(out, -1).unflatten(1, (rows, columns))
    return m.proj(out + m.dwc(v.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


@pytest.mark.parametrize("case", [c for c in cases("agent") if c.id.startswith(("op_agent_", "absent"))])
def test_it_computes_the_published_function_and_gradient(case):
    facts, stored = golden().load_case(case)
    with_class = "cls" in case.stem
    attention = AgentAttention(
        64, 4, agent_num=49 if with_class else 9, map_size=(14, 14), class_token=with_class
    )
    attention.load_state_dict(golden().reference_state_dict(facts))
    x = stored["input"].requires_grad_()
    out = attention(x, (14, 14)) if with_class else attention(x.unflatten(1, (14, 14))).flatten(1, 2)
    error, tolerance = golden().relative_error, facts["tolerance"]
    assert error(out, stored["output"]) <= tolerance["outputs"]
    upstream = golden().seeded_normal("grad", out.shape, facts["seed"])
    (grad,) = torch.autograd.grad((out * upstream).sum(), x)
    assert error(grad, stored["dinput"]) <= tolerance["gradients"]


@pytest.mark.parametrize("size", [(6, 6), (7, 7), (4, 9), (11, 5), (1, 3)])
@pytest.mark.parametrize("agents", [(2, 2), (3, 3), (2, 5)])
def test_any_map_and_any_agents_are_the_definition(size, agents):
    m = module(agent_shape=agents)
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    torch.testing.assert_close(m(x), by_definition(m, x, agents))


def test_agents_are_pooled_over_cells_that_may_overlap():
    m = module(agent_num=9)
    x = torch.randn(1, 56, 56, 16, dtype=torch.float64)
    q, *_ = m.qkv(x).unflatten(-1, (3, 2, -1)).unbind(3)
    agents = m.pool(q.flatten(1, 2), (56, 56))
    torch.testing.assert_close(agents[0, 1], q[0, 0:19, 18:38].mean((0, 1)))
    torch.testing.assert_close(agents[0, 8], q[0, 37:56, 37:56].mean((0, 1)))


@pytest.mark.parametrize("name", TABLES)
def test_every_table_shows_in_the_output_and_learns(name):
    m = module()
    x = torch.randn(1, 6, 6, 16, dtype=torch.float64)
    before = m(x)
    before.square().sum().backward()
    assert getattr(m, name).grad.abs().max() > 0
    with torch.no_grad():
        getattr(m, name).copy_(torch.randn_like(getattr(m, name)))
    assert (m(x) - before).abs().max() > 1e-6


def test_the_class_token_makes_no_agents_and_no_convolution():
    m = module(class_token=True)
    x = torch.randn(2, 1 + 36, 16, dtype=torch.float64)
    other = x.clone()
    other[:, 0] = torch.randn(2, 16)
    q, k, v, *_ = m._project(x, (6, 6))
    q2, *_ = m._project(other, (6, 6))
    torch.testing.assert_close(m.pool(q, (6, 6)), m.pool(q2, (6, 6)))
    # The class token attends like any other query: through the agents, with its own bias.
    record = m.attention_weights(x, (6, 6))
    assert record.axes == ("batch", "token", "head", "agent") and record.weights.shape == (2, 37, 2, 4)
    assert record.agents.shape == (2, 4, 2, 37)
    taken = torch.einsum("bnha,bahm,bmhd->bnhd", record.weights, record.agents, v.float())
    with torch.no_grad():
        m.dwc.weight.zero_()
        m.dwc.bias.fill_(3.0)
    expected = taken.flatten(2).double()
    expected[:, 1:] += 3.0
    torch.testing.assert_close(m(x, (6, 6)), m.proj(expected), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("size", [(8, 8), (9, 6), (5, 7), (1, 1)])
def test_coarser_keys_keep_the_map(size):
    m = module(separate_kv=True, sr_ratio=2, map_size=(8, 8))
    assert m.ah_bias.shape[3] == 4 and m.ha_bias.shape[2] == 8
    x = torch.randn(2, *size, 16, dtype=torch.float64)
    assert m(x).shape == x.shape
    rows, columns = (max(1, side // 2) for side in size)
    record = m.attention_weights(x)
    assert record.agents.shape == (2, 4, 2, rows * columns)
    assert m.attention_macs(x.shape) == 2 * 2 * 4 * 16 * (size[0] * size[1] + rows * columns)
    q, k, v, grid, key_grid = m._project(x.flatten(1, 2), size)
    big = F.interpolate(
        v.flatten(2).unflatten(1, key_grid).permute(0, 3, 1, 2), size, mode="bilinear", align_corners=False
    )
    mixed = torch.einsum("bnha,bahm,bmhd->bnhd", *_weights(m, q, k, grid, key_grid), v).flatten(2)
    expected = m.proj(mixed + m.dwc(big).flatten(2).transpose(1, 2)).view(x.shape)
    torch.testing.assert_close(m(x), expected, rtol=1e-5, atol=1e-5)


def _weights(m, q, k, grid, key_grid):
    return (w.double() for w in m.mixing_weights(q, k, grid, key_grid))


def test_separate_projections_are_the_joint_one():
    joint, apart = module(), module(separate_kv=True)
    state = joint.state_dict()
    for kind in ("weight", "bias"):
        q, kv = state.pop(f"qkv.{kind}").split([16, 32])
        state |= {f"q.{kind}": q, f"kv.{kind}": kv}
    apart.load_state_dict(state)
    x = torch.randn(1, 5, 6, 16, dtype=torch.float64)
    torch.testing.assert_close(apart(x), joint(x))


def test_captured_weights_rebuild_the_output():
    m = module()
    x = torch.randn(2, 5, 7, 16, dtype=torch.float64)
    record = m.attention_weights(x)
    assert record.axes == ("batch", "row", "column", "head", "agent") and record.grid == (5, 7)
    assert record.weights.shape == (2, 5, 7, 2, 4) and record.agents.shape == (2, 4, 2, 35)
    torch.testing.assert_close(record.agents.sum(-1), torch.ones(2, 4, 2))
    v = m.qkv(x).unflatten(-1, (3, 2, -1))[..., 2, :, :].flatten(1, 2)
    out = torch.einsum("byxha,bahm,bmhd->byxhd", record.weights, record.agents, v.float()).flatten(3)
    local = m.dwc(m.qkv(x)[..., 32:].permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
    torch.testing.assert_close(m(x), m.proj(out.double() + local), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"agent_num": 8}, "agent_num must be a square such as 9, 16 or 49, found 8"),
        ({"agent_num": 0}, "found 0"),
        ({"num_heads": 3}, "dim 16 must be a multiple of num_heads 3"),
        ({"sr_ratio": 2}, "sr_ratio must be 1, or more with separate_kv"),
        ({"sr_ratio": 2, "separate_kv": True, "class_token": True}, "without class_token"),
    ],
)
def test_arguments_that_do_not_fit_are_refused(arguments, message):
    with pytest.raises(zoo.ConfigError, match=message):
        module(**arguments)


# Stripes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(6, 6), (4, 9), (7, 5), (2, 2)])
@pytest.mark.parametrize("direction", ["down", "across", None])
def test_stripes_attend_inside_and_convolve_inside(direction, size):
    torch.manual_seed(0)
    m = StripeMixing(8, 2, direction=direction, width=3).double()
    q, k, v = (torch.randn(2, *size, 2, 4, dtype=torch.float64) for _ in range(3))
    out = m.mix(q, k, v)
    rows, columns = size
    cuts = {
        "down": [(slice(None), slice(x, x + 3)) for x in range(0, columns, 3)],
        "across": [(slice(y, y + 3), slice(None)) for y in range(0, rows, 3)],
        None: [(slice(None), slice(None))],
    }[direction]
    pairs = 0
    for y, x in cuts:
        q_, k_, v_ = (t[:, y, x] for t in (q, k, v))
        tokens = q_.flatten(1, 2).transpose(1, 2)
        logits = tokens @ k_.flatten(1, 2).transpose(1, 2).transpose(2, 3) / 2
        seen = (logits.softmax(-1) @ v_.flatten(1, 2).transpose(1, 2)).transpose(1, 2).flatten(2)
        local = m.get_v(v_.flatten(3).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)
        torch.testing.assert_close(out[:, y, x], seen.view(local.shape) + local)
        pairs += tokens.shape[2] ** 2
    assert m.mixing_macs(2, size) == 2 * 2 * pairs * 8
    keys = m.seen(size)
    for token in range(rows * columns):
        y, x = next(
            cut for cut in cuts if token in torch.arange(rows * columns).view(size)[cut].flatten().tolist()
        )
        inside = torch.arange(rows * columns).view(size)[y, x].flatten().tolist()
        assert sorted(key for key in keys[token].tolist() if key >= 0) == inside
