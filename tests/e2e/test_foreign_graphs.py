"""Graphs that never saw adkit, in the page: modules and calls are told by the graph that they stand in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.fx import symbolic_trace

from adkit.viz import diff
from adkit.viz.record import Record
from tests.e2e.standalone import button, opened

expect = pytest.importorskip("playwright.sync_api").expect
pytestmark = [pytest.mark.browser, pytest.mark.slow]


class Net(nn.Module):
    def __init__(self, act: type[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(4, 8), act(), nn.Linear(8, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x)


@pytest.fixture(scope="module")
def record() -> Record:
    return diff(symbolic_trace(Net(nn.ReLU)), symbolic_trace(Net(nn.GELU))).record()


def test_each_pane_tells_the_class_that_is_called_there(chromium, page_file: Path) -> None:
    with opened(chromium, page_file) as page:
        button(page, "Compare").click()
        button(page, "Unfold changed").click()
        panes = page.locator(".adk-pane")
        expect(panes).to_have_count(2)
        for pane, here, there in ((panes.nth(0), "ReLU", "GELU"), (panes.nth(1), "GELU", "ReLU")):
            expect(pane.locator("[data-key='m:layers.1']")).to_contain_text(f"1: {here}")
            node = pane.locator("[data-key^='n:']").filter(has_text=here)
            expect(node).to_have_count(1)
            expect(pane).not_to_contain_text(there)
