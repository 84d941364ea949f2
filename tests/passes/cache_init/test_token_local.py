"""The proof before packing: every zoo model holds, every planted mixer is named with its op and source
line."""

from __future__ import annotations

import pytest
import torch

import adkit
from adkit.contract import ExportError
from adkit.passes.cache_init.token_local import mixing_nodes

aten = torch.ops.aten


def size(s, x, dim=1):
    return s.call(aten.sym_size.int, (x, dim))


def flattened(s, x):
    flat = s.call(aten.flatten.using_ints, (x, 0, 1))
    product = s.call(aten.matmul.default, (s.call(aten.t.default, (flat,)), flat))
    return s.call(aten.matmul.default, (x, product))


def scrambled(s, x):
    batch, length = size(s, x, 0), size(s, x)
    turned = s.call(aten.view.default, (x, [batch, 48, length]))
    return s.call(aten.add.Tensor, (x, s.call(aten.transpose.int, (turned, 1, 2))))


def positions(s, x):
    length = size(s, x)
    at = s.call(aten.arange.default, (length,), {"device": torch.device("cpu")})
    return s.call(aten.mul.Tensor, (x, s.call(aten.unsqueeze.default, (at, -1))))


def filled(s, x):
    number = s.call(aten.scalar_tensor.default, (size(s, x),))
    return s.call(aten.mul.Tensor, (x, number))


def plain_function(x):
    return x.flip(1)


MIXERS = {
    "cumsum": (lambda s, x: s.call(aten.cumsum.default, (x, 1)), "aten.cumsum"),
    "roll": (lambda s, x: s.call(aten.roll.default, (x, [1], [1])), "aten.roll"),
    "roll flattened": (lambda s, x: s.call(aten.roll.default, (x, [1])), "aten.roll"),
    "mean": (lambda s, x: s.call(aten.sub.Tensor, (x, s.call(aten.mean.dim, (x, [1], True)))), "aten.mean"),
    "mean over everything": (
        lambda s, x: s.call(aten.sub.Tensor, (x, s.call(aten.mean.default, (x,)))),
        "aten.mean",
    ),
    "softmax over tokens": (lambda s, x: s.call(aten.softmax.int, (x, 1)), "aten.softmax"),
    "flip": (lambda s, x: s.call(aten.flip.default, (x, [1])), "aten.flip"),
    "batch mean": (
        lambda s, x: s.call(aten.sub.Tensor, (x, s.call(aten.mean.dim, (x, [0], True)))),
        "aten.mean",
    ),
    "arange": (positions, "aten.arange"),
    "length": (lambda s, x: s.call(aten.mul.Tensor, (x, size(s, x))), "number of tokens"),
    "length as a tensor": (filled, "holds a size"),
    "flattened product": (flattened, "contracts over tokens"),
    "tokens and features regrouped": (scrambled, "anew"),
    "padded sequence": (
        lambda s, x: s.call(aten.slice.Tensor, (s.call(aten.pad.default, (x, [0, 0, 1, 0])), 1, 0, -1)),
        "pads the sequence",
    ),
    "convolution": (
        lambda s, x: s.call(
            aten.transpose.int,
            (
                s.call(
                    aten.conv1d.default,
                    (s.call(aten.transpose.int, (x, 1, 2)), s.call(aten.ones.default, ([48, 48, 1],))),
                ),
                1,
                2,
            ),
        ),
        "convolves along the sequence",
    ),
    "a plain function": (lambda s, x: s.call(plain_function, (x,), like=x), "plain_function"),
}


@pytest.fixture(scope="module")
def wb(exported):
    return exported().run(until="weight_load")


@pytest.mark.parametrize("kind", MIXERS)
def test_a_planted_mixer_is_refused_with_its_op_and_line(wb, kind):
    build, said = MIXERS[kind]

    class Plant(adkit.Pass):
        """Mix tokens in the first MLP."""

        key = "plant"
        stage = adkit.Stage.POST_LOAD_FUSION

        def apply(self, gm, ctx):
            n = next(n for n in gm.graph.nodes if n.target is torch.ops.adkit.torch_swiglu.default)
            x = n.args[0]
            while "val" not in x.meta or x.meta["val"].shape[-1] != 48:
                x = x.all_input_nodes[0]
            user = n
            while user.meta["val"].shape[-1] != 48:
                user = next(iter(user.users))
            readers = list(user.users)
            with self.site(gm, [user], label="plant", before=user.next) as s:
                new = build(s, user)
                for r in readers:
                    r.replace_input_with(user, new)
            return adkit.PassInfo(num_matches=1)

    if "plant" in wb.steps:
        wb.replace("plant", Plant)
    else:
        wb.insert(Plant, after="move_inputs_to_device")
        wb.disable("fuse_gemms")
    wb.run(until="plant")
    with pytest.raises(ExportError, match="cannot run packed batches") as caught:
        wb.run(until="insert_cached_attention")
    message = str(caught.value)
    assert said in message
    assert "modeling_llama.py:" in message
    assert wb.steps[wb.position].name == "insert_cached_attention"


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["phi3", "gpt_oss", "bloom", "deepseek_v3", "gemma3n_text"])
def test_models_hold(kind):
    """The other types pass it too: tests/test_equivalence.py generates with all of them."""
    from tests.zoo import tiny_config

    wb = adkit.Workbench(tiny_config(kind), device="cpu", max_seq_len=64, progress=False)
    assert wb.run(until="insert_cached_attention").steps["insert_cached_attention"].info.num_matches == 2


@pytest.mark.parametrize(
    ("pick", "holds"),
    [
        (lambda ids: ids[0], True),
        (lambda ids: ids[:1], True),
        (lambda ids: ids[1], False),
        (lambda ids: ids[:, :1], False),
        (lambda ids: ids[:, 0][:, None], False),
    ],
)
def test_a_packed_batch_has_one_row_so_the_first_is_all_of_it(pick, holds):
    class Picks(torch.nn.Module):
        def forward(self, input_ids):
            return (input_ids * pick(input_ids),)

    ids = {"input_ids": torch.zeros(2, 6, dtype=torch.long)}
    dims = {"input_ids": {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}}
    gm = torch.export.export(Picks(), (), ids, dynamic_shapes=dims).module(check_guards=False)
    assert (mixing_nodes(gm) == []) is holds


def test_a_graph_of_fixed_sizes_proves_nothing():
    gm = torch.export.export(torch.nn.ReLU(), (), {"input": torch.zeros(2, 6)}).module(check_guards=False)
    ((_, reason),) = mixing_nodes(gm)
    assert "fixed numbers" in reason
