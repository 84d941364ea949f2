"""The cached reference against attention over whole sequences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from adkit.ops import cached_attention as module
from tests.ops.paged import Case, serve, whole

WHOLE = torch.ops.adkit.torch_attention.default
CACHED = torch.ops.adkit.torch_attention_with_paged_cache.default


def assert_close(case: Case, rel: float) -> None:
    for got, want in zip(serve(case, CACHED).outputs, whole(case, WHOLE, torch.float64), strict=True):
        assert (got.double() - want).abs().max() <= rel * want.abs().max()


@st.composite
def cases(draw: Any) -> Case:
    kv_heads = draw(st.sampled_from([1, 2, 3]))
    options: dict[str, Any] = {"scale": draw(st.sampled_from([None, 0.3, 1.0]))}
    options["window"] = draw(st.sampled_from([None, 1, 3, 8]))
    options["chunk"] = draw(st.sampled_from([None, 1, 4, 7]))
    options["softcap"] = draw(st.sampled_from([None, 2.0, 30.0]))
    return Case(
        chunks=draw(st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=5), min_size=1, max_size=4)),
        heads=kv_heads * draw(st.sampled_from([1, 2, 4])),
        kv_heads=kv_heads,
        head_dim=draw(st.sampled_from([4, 10, 16])),
        value_dim=draw(st.sampled_from([4, 6, 16])),
        page_size=draw(st.sampled_from([1, 3, 4, 16])),
        dtype=draw(st.sampled_from([torch.float32, torch.float64])),
        options=options,
        sinks=draw(st.booleans()),
        alibi=draw(st.booleans()),
        padding=draw(st.sampled_from([0, 2])),
        seed=draw(st.integers(0, 1000)),
    )


@settings(max_examples=80, deadline=None)
@given(case=cases())
def test_any_chunking_over_any_pages_equals_attention_over_whole_sequences(case: Case) -> None:
    assert_close(case, 1e-6 if case.dtype == torch.float32 else 1e-13)


@pytest.mark.parametrize(
    "option",
    [{"window": 3}, {"chunk": 4}, {"softcap": 1.0}, {"scale": 0.9}, {"sinks": True}, {"alibi": True}],
)
def test_every_option_matters(option: dict[str, Any]) -> None:
    """Guards the property test: with the option dropped, the outputs differ visibly."""
    plain = {k: v for k, v in option.items() if k in ("sinks", "alibi")}
    case = Case([[9, 1, 1]], options={k: v for k, v in option.items() if k not in plain}, **plain)
    with_option, without = serve(case, CACHED).outputs[0], serve(Case([[9, 1, 1]]), CACHED).outputs[0]
    assert (with_option - without).abs().max() > 1e-2


def test_a_long_prompt_in_blocks_of_queries_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    case = Case([[13, 1], [5, 6]], options={"window": 6}, alibi=True)
    monkeypatch.setattr(module, "_BLOCK_SCORES", 4 * 13 * 2)
    assert_close(case, 1e-6)


def test_writes_stay_in_their_slots_and_the_storage_stays() -> None:
    case = Case([[5, 1], [1, 1, 1]], value_dim=8)
    served = serve(case, CACHED, poison=-7.0)
    for cache, new in ((served.k_cache, case.tensors()[1]), (served.v_cache, case.tensors()[2])):
        flat = cache.view(-1, *cache.shape[2:])
        rest = torch.ones(len(flat), dtype=torch.bool)
        rest[served.slots] = False
        assert (flat[rest] == -7.0).all()
        want = torch.cat(new, 1)[0].flatten(1)
        assert torch.equal(flat[served.slots].flatten(1).sort(0).values, want.sort(0).values)


def step(device: str = "cpu", **change: Any) -> list[Any]:
    values: dict[str, Any] = {
        "query": torch.randn(1, 3, 4, 8, device=device),
        "key": torch.randn(1, 3, 2, 8, device=device),
        "value": torch.randn(1, 3, 2, 6, device=device),
        "attn_bias": None,
        "sinks": None,
        "alibi_slopes": None,
        "cu_seqlens": torch.tensor([0, 2, 3], dtype=torch.int32, device=device),
        "cache_lens": torch.tensor([0, 4], dtype=torch.int32, device=device),
        "page_table": torch.tensor([[1, 0], [2, 3]], dtype=torch.int32, device=device),
        "slot_mapping": torch.tensor([4, 5, 12], device=device),
        "k_cache": torch.zeros(5, 4, 2, 8, device=device),
        "v_cache": torch.zeros(5, 4, 2, 6, device=device),
    }
    return list({**values, **change}.values())


def test_schema_and_fake_agree_with_the_op() -> None:
    torch.library.opcheck(CACHED, tuple(step()), {"window": 3}, test_utils=("test_schema", "test_faketensor"))


def test_runs_on_meta() -> None:
    out = CACHED(*step("meta"))
    assert out.device.type == "meta"
    assert out.shape == (1, 3, 4, 6)


@pytest.mark.parametrize("change", [{"attn_bias": torch.zeros(1, 1, 3, 3)}, {"is_causal": False}])
def test_refuses_what_a_cache_cannot_serve(change: dict[str, Any]) -> None:
    options = {k: v for k, v in change.items() if k == "is_causal"}
    with pytest.raises(ValueError, match="serves causal attention"):
        CACHED(*step(**{k: v for k, v in change.items() if k not in options}), **options)


def test_a_cache_of_another_dtype_is_cast_on_the_way() -> None:
    caches = {"k_cache": torch.zeros(5, 4, 2, 8), "v_cache": torch.zeros(5, 4, 2, 6)}
    torch.manual_seed(0)
    want = CACHED(*step(**caches))
    low = {k: torch.zeros_like(v, dtype=torch.bfloat16) for k, v in caches.items()}
    torch.manual_seed(0)
    got = CACHED(*step(**low))
    assert got.dtype == torch.float32
    assert low["k_cache"].abs().sum() > 0
    torch.testing.assert_close(got, want, rtol=0.02, atol=0.02)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_compiled_by_inductor_it_writes_the_callers_cache_and_copies_none() -> None:
    from torch._inductor.utils import run_and_get_code

    args = step()
    k_cache, v_cache = args[-2], args[-1]
    where = k_cache.data_ptr()

    def model(query: Any, *rest: Any) -> Any:
        return CACHED(query * 2, *rest) + 1

    torch.manual_seed(0)
    eager = step()
    eager[:3] = [t.clone() for t in args[:3]]
    want = model(*eager)
    got, code = run_and_get_code(torch.compile(model), *args)
    torch.testing.assert_close(got, want)
    assert torch.equal(k_cache, eager[-2])
    assert torch.equal(v_cache, eager[-1])
    assert k_cache.data_ptr() == where
    allocated = [line for line in "\n".join(code).splitlines() if "= empty_strided" in line]
    assert allocated
    assert not any("(5, 4, 2," in line for line in allocated)
