"""Ranks as actors of a Ray cluster on this host."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from adkit.contract import DistConfig, EngineError, SamplingParams, ShardingError
from adkit.runtime import LiveModel
from adkit.runtime.ranks import over_ray
from tests.runtime.conftest import Lab
from tests.runtime.ranks.conftest import engine_of

TOY = "tests.runtime.ranks.toy:build"
GREEDY = SamplingParams(max_tokens=20, ignore_eos=True)


@pytest.fixture(scope="module")
def ray(repo_root: Path):
    """A cluster of three CPUs, one a rank and one to see that more are refused."""
    ray = pytest.importorskip("ray", reason="needs Ray: pip install 'adkit[ray]'")
    path = os.pathsep.join(filter(None, [str(repo_root), os.environ.get("PYTHONPATH")]))
    options = {
        "num_cpus": 3, "num_gpus": 0, "include_dashboard": False, "log_to_driver": False, "logging_level": "error",
        "runtime_env": {"env_vars": {"PYTHONPATH": path}},
    }  # fmt: skip
    for tries_left in (1, 0):
        try:
            ray.init(address="local", **options)
            break
        except Exception as error:  # Ray gives its processes 30 s to come up, and nobody can give them more
            ray.shutdown()
            if "timed out during startup" not in str(error):
                raise
            if not tries_left:
                pytest.skip("needs a machine with time for Ray: it did not come up within 30 s, twice")
    yield ray
    ray.shutdown()


@pytest.mark.slow
def test_actors_are_ranks_as_processes_are(ray):
    """All in one test: a cluster takes longer to come up than all that is asked of it."""
    dist = DistConfig.of(tp=2, enable_attention_dp=True)
    model, device = over_ray.start_actors(TOY, {}, dist, device="cpu")
    prompts = [[1, 2, 3], [4, 5], [6], [7, 8, 9, 10]]
    with LiveModel(model, engine_of((model, device)).config, device=device) as live:
        assert len(live.engine.pools) == 2
        answers = live.generate(prompts, GREEDY, progress=False)
    assert [list(a.token_ids) for a in answers] == [Lab.greedy_alone(p, 20, ignore_eos=True) for p in prompts]

    model, device = over_ray.start_actors(TOY, {}, DistConfig.of(tp=2), device="cpu")
    live = LiveModel(model, engine_of((model, device), overlap=True).config, device=device)
    prompts = [[1, 2, 3], [4, 5]]
    answers = live.generate(prompts, GREEDY, progress=False)
    assert [list(a.token_ids) for a in answers] == [Lab.greedy_alone(p, 20, ignore_eos=True) for p in prompts]

    with pytest.raises(ShardingError, match="4 ranks need a CPU each and the Ray cluster has 3"):
        over_ray.start_actors(TOY, {}, DistConfig.of(tp=4), device="auto")
    with pytest.raises(ShardingError, match="2 ranks need 2 GPUs and the Ray cluster has 0"):
        over_ray.start_actors(TOY, {}, DistConfig.of(tp=2), device="cuda")

    stream = live.stream(prompts, GREEDY)
    next(stream)
    os.kill(device.crew.ready[1].facts["pid"], signal.SIGKILL)
    with pytest.raises(EngineError, match=r"rank 1 of 2 (was lost|closed its connection)"):
        list(stream)
    assert ray.is_initialized()  # it was there before
    with pytest.raises(ShardingError, match="3 heads cannot be cut over 2 ranks"):
        over_ray.start_actors(TOY, {"fault": (1, "refuse", 0)}, DistConfig.of(tp=2), device="cpu")


def test_ray_is_missing(monkeypatch):
    def missing(name: str):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(over_ray, "import_module", missing)
    with pytest.raises(ShardingError, match=r"No module named 'ray'.*pip install 'adkit\[ray\]'"):
        over_ray.start_actors(TOY, {}, DistConfig.of(tp=2))
