"""A model that cannot run says in which lines of whose code, why, and what to do."""

from __future__ import annotations

import pytest

import adkit
from adkit.contract import ExportError
from tests.zoo import tiny_config


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("lfm2", "in some layers tokens meet in a convolution along the sequence"),
        ("deepseek_v32", "follows from what the tokens are"),
        ("mamba", "one sequence length only"),
        ("dbrx", "depends on the values of a tensor"),
    ],
)
def test_a_refusal_says_where_why_and_what_to_do(kind, said):
    wb = adkit.Workbench(tiny_config(kind), device="cpu", max_seq_len=64, page_size=4, progress=False)
    with pytest.raises(ExportError, match="What to do: run ") as caught:
        wb.run(until="insert_cached_attention")
    message = str(caught.value)
    assert said in message
    if wb.steps["export_to_gm"].status == "done":
        assert f"modeling_{kind}.py:" in message
        assert len(message.splitlines()) <= 11  # a line of code once, however many layers hold it
