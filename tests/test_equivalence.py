"""The compiled graph against Hugging Face, float32 on CPU: a ragged packed batch, prefilled and decoded.

The models are tiny and made sensitive (``tests/zoo.py``): a mistake in attention, positions or windows shows.
"""

from __future__ import annotations

import pytest
import torch

import adkit
from adkit.checking import packed_logits
from tests.reference import hf_greedy, rmse_ratio
from tests.zoo import INTERFACE_TYPES, tiny

LENGTHS = (3, 17, 1, 9, 30)
STEPS = 48
TOLERANCE = 1e-5
TYPES = (*INTERFACE_TYPES, "bloom", "diffllama", "deepseek_v2", "deepseek_v3", "roberta")


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """``models(type)``: (HF model, directory of its checkpoint, HF's tokens and logits), made once."""
    made = {}

    def get(kind):
        if kind not in made:
            config, model = tiny(kind)
            model = model.float().eval()
            folder = tmp_path_factory.mktemp(kind)
            model.save_pretrained(folder)
            model.set_attn_implementation("eager")
            generator = torch.Generator().manual_seed(1)
            prompts = [torch.randint(config.vocab_size, (n,), generator=generator) for n in LENGTHS]
            made[kind] = (folder, [hf_greedy(model, p, STEPS) for p in prompts])
        return made[kind]

    return get


def run(wb, reference):
    """Worst rmse ratio over sequences, and whether every greedy token agrees."""
    wb.run()
    compiled = wb._state.compiled
    with torch.inference_mode():
        got = packed_logits(
            compiled.forward, compiled.inputs, compiled.caches, [t for t, _ in reference], LENGTHS, wb.device
        )
    worst = max(
        rmse_ratio(g[n - 1 :], e[n - 1 :]) for g, (_, e), n in zip(got, reference, LENGTHS, strict=True)
    )
    same = all(torch.equal(g.argmax(-1), e.argmax(-1)) for g, (_, e) in zip(got, reference, strict=True))
    prefill = max(rmse_ratio(g[:n], e[:n]) for g, (_, e), n in zip(got, reference, LENGTHS, strict=True))
    return max(worst, prefill), same


def bench(folder, **options):
    return adkit.Workbench(
        folder, device="cpu", dtype="float32", max_seq_len=128, page_size=4, progress=False, **options
    )


@pytest.mark.parametrize("kind", TYPES)
def test_packed_generation_equals_hugging_face(models, kind):
    folder, reference = models(kind)
    worst, same = run(bench(folder), reference)
    assert worst < TOLERANCE
    assert same


class Mutation(adkit.Pass):
    """A deliberate mistake, to see that the comparison notices it."""

    stage = adkit.Stage.POST_LOAD_FUSION


class ZeroAttention(Mutation):
    """Attention gives nothing."""

    key = "zero_attention"

    def apply(self, gm, ctx):
        for n in [n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_attention.default]:
            users = list(n.users)
            with self.site(gm, [n], label="zero", before=n.next) as s:
                zero = s.call(torch.ops.aten.mul.Tensor, (n, 0.0), like=n)
                for u in users:
                    u.replace_input_with(n, zero)
        return adkit.PassInfo(num_matches=1)


class DoublePositions(Mutation):
    """Every token stands twice as far along."""

    key = "double_positions"

    def apply(self, gm, ctx):
        n = next(n for n in gm.graph.nodes if n.op == "placeholder" and n.target == "position_ids")
        users = list(n.users)
        call = next(m for m in gm.graph.nodes if m.op == "call_function")
        with self.site(gm, [n], label="double", before=call) as s:
            twice = s.call(torch.ops.aten.mul.Tensor, (n, 2), like=n)
            for u in users:
                u.replace_input_with(n, twice)
        return adkit.PassInfo(num_matches=1)


class DropWindow(Mutation):
    """Attention sees everything before it."""

    key = "drop_window"

    def apply(self, gm, ctx):
        for n in gm.graph.nodes:
            if n.target is torch.ops.adkit.torch_attention.default:
                n.kwargs = {**n.kwargs, "window": None}
        return adkit.PassInfo(num_matches=1)


@pytest.mark.parametrize(
    ("kind", "mutation"),
    [
        ("llama", ZeroAttention),
        ("qwen3", ZeroAttention),
        ("gpt_oss", ZeroAttention),
        ("llama", DoublePositions),
        ("gpt2", DoublePositions),
        ("olmo3", DoublePositions),
        ("mistral", DropWindow),
        ("gemma2", DropWindow),
        ("phimoe", DropWindow),
    ],
)
def test_a_wrong_graph_is_noticed(models, kind, mutation):
    folder, reference = models(kind)
    worst, same = run(bench(folder).insert(mutation), reference)
    assert worst > 100 * TOLERANCE
    assert not same
