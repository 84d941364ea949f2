"""What virtual ranks are fed, and what their logits are together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from adkit.checking import rope_lengths
from adkit.contract import ConfigError, DistConfig, ShardingError

if TYPE_CHECKING:
    from adkit.workbench import Workbench


class Feeds:
    """Inputs of a Workbench's model, for the ranks of a world."""

    def __init__(self, wb: Workbench, dist: DistConfig) -> None:
        self.wb, self.dist = wb, dist

    def prompts(self, prompts: Sequence[str | Sequence[int]] | None, tokens: int, seed: int) -> list[Tensor]:
        """Token ids [B, S] to run one after another: the prompts given, or one batch of random ones."""
        if prompts is None:
            if tokens < 1:
                raise ConfigError(f"check(tokens={tokens}): expected at least 1")
            vocab = self.wb.factory.config.get_text_config(decoder=True).vocab_size
            batch = max(2, self.dist.world_size if self.dist.enable_attention_dp else 2)
            generator = torch.Generator().manual_seed(seed)
            return [torch.randint(vocab, (batch, tokens), generator=generator)]
        if isinstance(prompts, str) or not len(prompts):
            raise ConfigError(f"check(prompts={prompts!r}): expected a list of texts or lists of token ids")
        rows = [torch.tensor([self._ids(p)]) for p in prompts]
        if not self.dist.enable_attention_dp:
            return rows
        # each rank needs a sequence of its own: the prompt, turned by one token from rank to rank
        return [torch.cat([row.roll(r, 1) for r in range(self.dist.world_size)]) for row in rows]

    def _ids(self, prompt: str | Sequence[int]) -> list[int]:
        if not isinstance(prompt, str):
            return [int(i) for i in prompt]
        tokenizer = self.wb.factory.tokenizer()
        if tokenizer is None:
            raise ConfigError(f"{self.wb.name!r} has no tokenizer: prompts must be lists of token ids")
        ids: list[int] = tokenizer.encode(prompt)
        return ids

    def feed(self, ids: Tensor, prompt: int | None = None) -> dict[str, Tensor]:
        """The graph's inputs for token ids [B, S], of which the first ``prompt`` (default: all) were the prompt."""
        batch, length = ids.shape
        feed = {
            "input_ids": ids,
            "position_ids": torch.arange(length).expand(batch, length).contiguous(),
            "rope_lengths": rope_lengths(length, prompt or length).expand(batch, length).contiguous(),
        }
        return {k: v.to(self.wb.device) for k, v in feed.items()}

    def split(self, feed: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Each rank's inputs: the same, or with attention_dp its share of the sequences."""
        n = self.dist.world_size
        if not self.dist.enable_attention_dp:
            return [feed] * n
        rows = feed["input_ids"].shape[0]
        if rows % n:
            raise ShardingError(
                f"with attention_dp {n} ranks share out the sequences of a batch; {rows} do not divide by {n}"
            )
        return [{k: v.chunk(n)[r] for k, v in feed.items()} for r in range(n)]
