"""From a kernel back to the lines of modelling code, and forward again."""

from __future__ import annotations

import inspect

import pytest
from transformers.models.llama import modeling_llama

from adkit.graph.history import History, descendants, trace_origins
from tests.graph.samples import sample

# the file itself is the reference for line numbers: they differ between transformers releases
LINES, START = inspect.getsourcelines(modeling_llama.LlamaRMSNorm.forward)
VARIANCE = START + next(k for k, line in enumerate(LINES) if "variance =" in line)


def test_a_fused_norm_goes_back_to_its_lines() -> None:
    steps = sample("llama")
    norm = steps["fuse_gemms"].after.find("torch_rmsnorm")[0]
    trace = trace_origins(steps, norm.id)
    assert VARIANCE in [s.line for s in trace.sources]
    assert trace.steps == ("match_rmsnorm_pattern",)
    assert "variance = " in repr(trace)


def test_two_passes_in_a_row_are_followed() -> None:
    steps = sample("llama")
    packed = steps["fuse_gemms"].after.find("torch_swiglu_packed")[0]
    trace = trace_origins(steps, packed.id)
    assert trace.steps == ("match_swiglu_pattern", "fuse_gemms")
    assert {"aten.silu", "aten.mul.Tensor"} <= {n.target_name for n in trace.roots}


def test_a_line_leads_to_the_kernels_that_compute_it_now() -> None:
    steps = sample("llama")
    traces = descendants(steps, f"modeling_llama.py:{VARIANCE}")
    ends = {n.id for t in traces for n in t.ends}
    assert ends == {n.id for n in steps["fuse_gemms"].after.find("adkit.torch_rmsnorm")}
    assert len(ends) == 9


def test_erased_nodes_are_said_to_be_gone() -> None:
    steps = sample("llama")
    dead = steps["export_to_gm"].after.find("_assert_tensor_metadata")[0]
    (trace,) = descendants(steps, dead.id)
    assert trace.ends == ()
    assert "gone" in repr(trace)
    assert History(steps).gone[dead.id] == "strip_asserts"


def test_unknown_ids_and_lines_are_told() -> None:
    steps = sample("llama")
    with pytest.raises(KeyError, match="no node with id 999999"):
        trace_origins(steps, 999999)
    with pytest.raises(KeyError, match="no exported node came from"):
        descendants(steps, "modeling_llama.py:1")
    with pytest.raises(KeyError, match=r"lines of modeling_llama\.py that did: \d+"):
        descendants(steps, "modeling_llama.py")
    with pytest.raises(KeyError, match=r"came from ''; give it as 'modeling_llama\.py:66'"):
        descendants(steps, "")
