"""A Workbench's model on ranks: real processes over gloo, compared with the same model in one process."""

from __future__ import annotations

import subprocess
import sys
from inspect import signature

import pytest

import adkit
from adkit import SamplingParams, Workbench, ranks
from adkit.bench import latency, throughput
from adkit.contract import AdkitError, ConfigError, EngineConfig, PassError, ShardingError
from adkit.passes import Pass, Stage
from adkit.runtime import LiveModel
from tests.forked_ranks import forked, gone

PROMPTS = ["What is 27 + 45?", "Once upon a time", "Reverse the word: lantern", "The night was"]
GREEDY = SamplingParams(max_tokens=64, ignore_eos=True)


@pytest.fixture(scope="module", autouse=True)
def quick():
    with forked():
        yield


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """``demo(**options)``: a Workbench of the demo model whose export comes from a cache that all ranks share."""
    root = str(tmp_path_factory.mktemp("cache"))
    cache = {"transforms": {"pipeline_cache": {"enabled": True, "root": root}}}

    def make(**options):
        options = {"device": "cpu", "max_seq_len": 160, "max_batch_size": 4, "progress": False, **options}
        return Workbench("demo", config=cache, **options)

    make().run(until="pattern_matcher")
    return make


@pytest.fixture(scope="module")
def alone(demo) -> LiveModel:
    return demo().llm()


@pytest.fixture(scope="module")
def wb(demo):
    return demo()


@pytest.fixture(scope="module")
def together(wb):
    with wb.llm(tp=2, timeout=60) as live:
        yield live


def test_greedy_texts_are_those_of_one_process(alone, together):
    texts = together.generate(PROMPTS, GREEDY, progress=False)
    assert texts == alone.generate(PROMPTS, GREEDY, progress=False)
    assert {len(t.token_ids) for t in texts} == {64}
    assert together.stats.step_sequences > together.stats.steps  # several at once
    assert (
        together.chat([{"role": "user", "content": PROMPTS[0]}], progress=False).text.strip()
        == "27 + 45 = 72."
    )


def test_four_ranks_of_which_pairs_hold_the_same_key_and_value_head(alone, demo):
    with demo().llm(tp=4) as live:
        assert live.generate(PROMPTS[:2], GREEDY, progress=False) == alone.generate(
            PROMPTS[:2], GREEDY, progress=False
        )


def test_ranks_with_sequences_of_their_own_give_the_same(alone, demo):
    with demo().llm(tp=2, attention_dp=True, timeout=60) as live:
        assert live.generate(PROMPTS, GREEDY, progress=False) == alone.generate(
            PROMPTS, GREEDY, progress=False
        )
        engine = live.engine
        # half of the sequences, half of the pages; page 0 is everybody's own
        assert [2 * p.capacity for p in engine.pools] == [alone.engine.pages.capacity] * 2
        assert engine.capacity == alone.engine.capacity


def test_sampling_with_a_seed_gives_the_same(alone, together):
    params = [
        SamplingParams(
            max_tokens=24, temperature=0.9, seed=n, top_p=0.9, top_k=40 * n, repetition_penalty=1 + n / 10
        )
        for n in range(4)
    ]
    assert together.generate(PROMPTS, params, progress=False) == alone.generate(
        PROMPTS, params, progress=False
    )


def test_streams_can_be_cancelled(alone, together):
    expected = alone.generate(PROMPTS[1], GREEDY, progress=False)
    stream = together.stream(PROMPTS, GREEDY)
    seen = [next(stream) for _ in range(9)]
    assert {d.index for d in seen} == {0, 1, 2, 3}
    stream.close()
    assert not together.engine.has_work
    pieces = list(together.stream(PROMPTS[1], GREEDY))
    assert "".join(p.text for p in pieces) == expected.text


def test_the_engine_stays_while_the_pipeline_does(demo):
    wb = demo()
    assert wb.position == 0
    first = wb.llm(tp=2)
    pids = [m.pid for m in first.engine.device.crew.members.values()]
    assert wb.llm(tp=2) is first
    assert wb.position == 0  # the walk is the ranks', not this Workbench's
    wb.disable("fuse_swiglu")
    second = wb.llm(tp=2)
    assert second is not first
    assert gone(pids)
    second.close()
    with pytest.raises(AdkitError, match="close"):
        second.generate(PROMPTS[0], progress=False)
    assert wb.llm(tp=2) is not second
    wb.llm(tp=2).close()


class Spoil(Pass):
    """Changes a number in every rank's graph, so that it shows whether ranks walk this pipeline."""

    key = "spoil"
    stage = Stage.POST_LOAD_FUSION

    def apply(self, gm, ctx):
        raise RuntimeError(f"spoilt on rank {ctx.dist.rank}")


def test_ranks_walk_the_pipeline_as_it_was_changed_here(demo):
    wb = demo().insert(Spoil)
    with pytest.raises(PassError, match=r"spoil.*spoilt on rank [01]"):
        wb.llm(tp=2)

    class Local(Spoil):
        key = "local"

    wb.replace("spoil", Local)
    with pytest.raises(ShardingError, match="'local' is defined in this notebook or program"):
        wb.llm(tp=2)


def test_llm_takes_the_same_options_with_and_without_a_workbench(monkeypatch):
    """What is said of ranks goes to them, all else to the Workbench; so no name may mean both."""
    taken = {*signature(Workbench).parameters, *EngineConfig.model_fields}
    assert not taken & set(ranks.OPTIONS)
    told = {"moe_ep": 1, "attention_dp": True, "executor": "ray", "timeout": 60, "port": 0}
    assert set(told) == set(ranks.OPTIONS)
    seen = []
    monkeypatch.setattr(
        Workbench, "llm", lambda self, *args, **kw: seen.append((self.config.page_size, args, kw))
    )
    adkit.LLM("demo", tp=2, page_size=8, progress=False, **told)
    assert seen == [(8, (2,), told)]
    with pytest.raises(ConfigError, match="has no option 'timeouts'; did you mean 'timeout'"):
        adkit.LLM("demo", timeouts=60)
    with pytest.raises(ConfigError, match="has no option 'page_sice'; did you mean 'page_size'"):
        adkit.LLM("demo", page_sice=8)


def test_what_cannot_be(demo):
    wb = demo()
    with pytest.raises(ShardingError, match="tp is 0"):
        wb.llm(tp=0)
    for tp in ("2", 2.5):
        with pytest.raises(ShardingError, match=f"tp is {tp!r}"):
            wb.llm(tp=tp)
    with pytest.raises(ShardingError, match="moe_ep='2' does not divide"):
        wb.llm(tp=2, moe_ep="2")
    for port in (-1, 80_000, "29500"):
        with pytest.raises(ConfigError, match="port is"):
            wb.llm(tp=2, port=port)
    for timeout in (0, -1, float("inf"), "60"):
        with pytest.raises(ConfigError, match="timeout is"):
            wb.llm(tp=2, timeout=timeout)
    with pytest.raises(ConfigError, match="expected a DistConfig"):
        demo(dist={"tp": 2})
    for option in ({"tp": 2}, {"attention_dp": True}):
        with pytest.raises(ConfigError, match=f"a Workbench has no option '{next(iter(option))}': wb.llm"):
            demo(**option)
    with pytest.raises(ConfigError, match="executor is 'threads'; expected one of: processes, ray"):
        wb.llm(tp=2, executor="threads")
    with pytest.raises(ConfigError, match="has no option 'timeouts'; did you mean 'timeout'"):
        wb.llm(tp=2, timeouts=3)
    with pytest.raises(ConfigError, match="'max_seq_len'; give it to the Workbench"):
        wb.llm(max_seq_len=100)
    with pytest.raises(ShardingError, match="tp=3"):  # 4 heads: told by a rank
        wb.llm(tp=3)
    with pytest.raises(ShardingError, match="rank 1 of 2, and the others are not there"):
        demo(dist=ranks.world(2).at(1)).llm()


def test_one_rank_cannot_share_out_sequences(demo, monkeypatch):
    wb = demo()
    one = "attention_dp .* and there is 1 rank; give tp .* 2 or more"
    for asked in (
        lambda: wb.llm(attention_dp=True),
        lambda: wb.llm(tp=1, attention_dp=True),
        lambda: wb.shard(1, attention_dp=True),
        lambda: adkit.LLM("demo", attention_dp=True, progress=False),
        lambda: ranks.place(None, {}, attention_dp=True).__enter__(),
        lambda: latency.measure("demo", attention_dp=True),
        lambda: throughput.measure("demo", requests=2, tp=1, attention_dp=True),
    ):
        with pytest.raises(ConfigError, match=one):
            asked()
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    with pytest.raises(ConfigError, match=one), ranks.place(None, {}, attention_dp=True):
        pass


def test_torchruns_ranks_must_be_as_many_as_asked_for(monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ShardingError, match="torchrun started 3 ranks, but tp is 2"), ranks.place(2, {}):
        pass


@pytest.mark.slow
def test_a_command_on_ranks_and_under_torchrun(repo_root, tmp_path):
    """Rank 0 prints what a run on one prints; the other nothing."""
    cache = tmp_path / "cache.yaml"
    cache.write_text(f"transforms: {{pipeline_cache: {{enabled: true, root: {tmp_path}}}}}")
    run = ["adkit", "run", "demo", "--config", str(cache), "--set", "device=cpu", "-p", PROMPTS[0]]
    # Standalone: on a free port, and not on the one that every torchrun takes.
    alone = ["--standalone", "--local-addr", "127.0.0.1"]
    torchrun = ["torch.distributed.run", *alone, "--nproc-per-node", "2", "-m", *run]
    outputs = []
    for command in ([*run, "--tp", "2"], torchrun, [*run, "--tp", "2", "--attention-dp"]):
        done = subprocess.run(
            [sys.executable, "-m", *command], cwd=repo_root, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        lines = done.stdout.splitlines()
        # Without the stages and their notes: the second run finds the first one's export.
        outputs.append(
            [line for line in lines if not line.startswith(("[", " ")) and not line.endswith(" s")]
        )
        assert len([line for line in lines if line.startswith("[compile")]) == 1
    assert outputs[0] == outputs[1] == outputs[2]
    assert f"> {PROMPTS[0]}" in outputs[0]
    assert "27 + 45 = 72." in outputs[0]


def test_a_playground_over_ranks(alone, together):
    panel = adkit.Playground(together)
    answers = panel.generate(PROMPTS[0], copies=2, max_tokens=20).wait(300)
    expected = alone.chat(
        [{"role": "user", "content": PROMPTS[0]}], SamplingParams(max_tokens=20), progress=False
    )
    assert [a.token_ids for a in answers] == [expected.token_ids] * 2
    panel.close()
