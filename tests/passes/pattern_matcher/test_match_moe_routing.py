"""Routers become one op that gives the same bits; routers that give something else stay."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.fx import GraphModule

from adkit.graph.edit import clean
from adkit.models.export import export_model
from tests.passes.graphs import check_values, logits, run_pass, tiny_graph
from tests.zoo import meta_twin, tiny, with_weights_of

TOPK = torch.ops.adkit.torch_moe_topk.default
KEY = "match_moe_routing_pattern"
GROUPED = {"score": "sigmoid", "groups": 2, "top_groups": 1}

# Options of the op in float32; in bfloat16 the dtype of the weights, where it is not float32.
EXPECTED: dict[str, tuple[dict[str, Any], bool]] = {
    "mixtral": ({"normalize": True}, False),
    "qwen3_moe": ({}, True),
    "qwen3_next": ({"normalize": True}, True),
    "olmoe": ({}, True),
    "gpt_oss": ({"score": "topk_softmax"}, True),
    "granitemoe": ({"score": "topk_softmax"}, True),
    "deepseek_v2": ({}, False),
    "deepseek_v3": ({**GROUPED, "normalize": True, "eps": 1e-20, "scale": 2.5}, False),
    "dots1": (GROUPED, False),
    "ernie4_5_moe": ({"normalize": True, "eps": 1e-12}, True),
    "minimax_m2": ({"score": "sigmoid", "normalize": True}, False),
}


def routers(gm: GraphModule) -> list[Any]:
    return [n for n in gm.graph.nodes if n.target is TOPK]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", EXPECTED)
def test_routers_of_hugging_face_keep_their_bits(kind: str, dtype: torch.dtype) -> None:
    options, rounds = EXPECTED[kind]
    gm = tiny_graph(kind, dtype)
    before = logits(gm)
    info = run_pass(gm, KEY)
    assert not info.details
    assert (
        info.num_matches == len(routers(gm)) == sum("torch_moe." in str(n.target) for n in gm.graph.nodes) > 0
    )
    wanted = {**options, **({"dtype": dtype} if rounds and dtype != torch.float32 else {})}
    assert [n.kwargs for n in routers(gm)] == [wanted] * len(routers(gm))
    assert torch.equal(logits(gm), before)
    check_values(gm)
    left = {"aten.topk.default", "aten.gather.default", "aten.div_.Tensor"}
    assert not left & {str(n.target) for n in gm.graph.nodes}
    assert run_pass(gm, KEY).num_matches == 0


def test_a_bias_on_meta_is_read_from_the_graph() -> None:
    config, model = tiny("deepseek_v3")
    gm = export_model(meta_twin(config))
    clean(gm)
    assert run_pass(gm, KEY).num_matches == 1
    (router,) = routers(gm)
    assert str(router.args[2].target).endswith("e_score_correction_bias")
    with_weights_of(gm, model)
    ids = torch.arange(18).view(2, 9)
    positions = torch.arange(9).expand(2, 9)
    with torch.no_grad():
        want = model(input_ids=ids, position_ids=positions, use_cache=False).logits
        got = gm(input_ids=ids, position_ids=positions)[0]
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_a_router_of_another_kind_stays_and_the_step_says_so() -> None:
    gm = tiny_graph("phimoe")
    before = [n.name for n in gm.graph.nodes]
    info = run_pass(gm, KEY)
    assert info.num_matches == 0
    assert [n.name for n in gm.graph.nodes] == before
    (why,) = info.details["not matched"]
    assert "modeling_phimoe.py" in why
    assert "no known router" in why


class Routed(nn.Module):
    """Experts behind a router that is given as a function of logits."""

    def __init__(self, router: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router = router
        self.embed, self.gate, self.up, self.down = (
            nn.Parameter(torch.randn(s)) for s in ((9, 8), (6, 8), (6, 10, 8), (6, 8, 5))
        )

    def forward(self, input_ids: Tensor) -> Any:
        x = F.embedding(input_ids, self.embed).flatten(0, 1)
        out = self.router(F.linear(x, self.gate))
        return (torch.ops.adkit.torch_moe(x, out[1], out[0], self.up, self.down), *out[2:])


def routed(router: Any) -> tuple[GraphModule, Any]:
    """The graph after the pass, which must compute what it did before, and what the pass says."""
    shape = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    ids = torch.arange(6).view(2, 3)
    program = torch.export.export(Routed(router), (ids,), dynamic_shapes=(shape,))
    gm = program.module()
    assert isinstance(gm, GraphModule)
    with torch.no_grad():
        before = gm(ids)
        info = run_pass(gm, KEY)
        torch.testing.assert_close(gm(ids), before)
    return gm, info


def topk(p: Tensor, k: int = 2) -> tuple[Tensor, Tensor]:
    weights, ids = torch.topk(p, k)
    return weights, ids


def rounded_too_early(x: Tensor) -> Any:
    weights, ids = topk(x.softmax(-1))
    weights = weights.to(torch.bfloat16)
    return (weights / weights.sum(-1, keepdim=True)).float(), ids


def read_elsewhere(x: Tensor) -> Any:
    p = x.softmax(-1)
    return (*topk(p), p)


def worst(x: Tensor) -> Any:
    weights, ids = torch.topk(x.softmax(-1), 2, largest=False)
    return weights, ids


def capped(x: Tensor) -> Any:
    return topk((torch.tanh(x / 3) * 3).softmax(-1))


@pytest.mark.parametrize(
    ("router", "why"),
    [
        (rounded_too_early, "no known router"),
        (read_elsewhere, "something else reads"),
        (worst, "no known router"),
        (capped, "no known router"),
    ],
)
def test_near_misses_stay(router: Any, why: str) -> None:
    gm, info = routed(router)
    assert not routers(gm)
    (reason,) = info.details["not matched"]
    assert why in reason


def normalised_by_hand(x: Tensor) -> Any:
    p = x.softmax(-1)
    ids = p.argsort(-1, descending=True)[:, :3]
    chosen = p.gather(1, ids)
    return chosen * chosen.sum(-1, keepdim=True).reciprocal() * 1.5, ids


def test_another_way_of_writing_is_the_same_op() -> None:
    gm, info = routed(normalised_by_hand)
    assert info.num_matches == 1
    assert routers(gm)[0].args[1] == 3
    assert routers(gm)[0].kwargs == {"normalize": True, "scale": 1.5}
