"""Trains the demo model from scratch and writes the package data.

    python -m scripts.demo_model.train --seconds 270

The tokenizer is built first, then background processes make the corpus up while the model trains for a
given time: the learning rate follows the clock, so training ends on schedule on any machine. Trains on the
GPU where there is one. With `--start DIR` the weights and the tokenizer are taken from DIR instead of
starting anew.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections import deque
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
import transformers
from tokenizers import Tokenizer
from transformers import GenerationConfig, Qwen3Config, Qwen3ForCausalLM

from adkit.models.demo import MODEL_DIR
from scripts.demo_model.corpus import END, PAD
from scripts.demo_model.data import COUNTS, STARTS, TOKEN_MASK, start_workers
from scripts.demo_model.tokenizer import MAX_LENGTH, VOCAB_SIZE, build_tokenizer, save_tokenizer


def model_config(tokenizer: Tokenizer) -> Qwen3Config:
    """The shape of the demo model: six layers of width 256, 4.5 million parameters, tied embeddings."""
    end = tokenizer.token_to_id(END)
    return Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=tokenizer.token_to_id(PAD),
    )


class ShardPool:
    """The shards made so far, kept on the training device; new ones join as they appear in `folder`."""

    def __init__(self, folder: Path, device: str, seed: int) -> None:
        self.folder, self.device = folder, device
        self.seen: set[str] = set()
        self.shards: list[torch.Tensor] = []
        self.rng = np.random.default_rng(seed)
        self.queue: deque[tuple[int, int]] = deque()

    def refresh(self) -> None:
        """Load new shards and queue their rows."""
        for file in sorted(self.folder.glob("shard-*.npy")):
            if file.name not in self.seen:
                self.seen.add(file.name)
                shard = torch.from_numpy(np.load(file).view(np.int16)).to(self.device)
                self.shards.append(shard)
                self._enqueue([len(self.shards) - 1])
                file.unlink()

    def _enqueue(self, indices: list[int]) -> None:
        fresh = [(index, row) for index in indices for row in range(len(self.shards[index]))]
        self.rng.shuffle(fresh)
        self.queue += [(int(index), int(row)) for index, row in fresh]

    def batch(self, rows: int) -> torch.Tensor:
        """The next `rows` rows as flagged tokens (B, S), int32; used-up shards come again."""
        while len(self.queue) < rows:
            before = len(self.shards)
            self.refresh()
            if len(self.shards) == before:
                if self.shards:
                    self._enqueue(list(range(len(self.shards))))
                else:
                    time.sleep(0.2)
        chosen = [self.queue.popleft() for _ in range(rows)]
        return torch.stack([self.shards[index][row] for index, row in chosen]).to(torch.int32) & 0xFFFF


def loss_of(model: Qwen3ForCausalLM, flagged: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy, in nats, over the counted tokens of flagged rows (B, S).

    In three rows of four a token attends to its own document alone, as at inference; in the others to the
    whole row, so that the model also knows what comes after the end of a document.
    """
    tokens = flagged & TOKEN_MASK
    documents = ((flagged & STARTS) != 0).cumsum(dim=1)  # (B, S)
    rows, length = tokens.shape
    documents[::4] = 0
    causal = torch.ones(length, length, dtype=torch.bool, device=tokens.device).tril()
    mask = (documents[:, None, :, None] == documents[:, None, None, :]) & causal  # (B, 1, S, S)
    hidden = model.model(
        input_ids=tokens, attention_mask=mask, use_cache=False
    ).last_hidden_state  # (B, S, D)
    counted = ((flagged[:, 1:] & COUNTS) != 0).reshape(-1)
    targets = tokens[:, 1:].reshape(-1).long().masked_fill(~counted, -100)
    logits = model.lm_head(hidden[:, :-1]).float().reshape(rows * (length - 1), -1)  # (B * (S - 1), V)
    return F.cross_entropy(logits, targets, ignore_index=-100)


def rate_at(progress: float, step: int) -> float:
    """The share of the peak learning rate at `progress` (0 to 1 of the time): warm-up, plateau, decay."""
    decay = 1.0 if progress < 0.55 else max(0.0, 1.0 - (progress - 0.55) / 0.45)
    return min(1.0, (step + 1) / 150) * max(decay, 0.005)


def compiled(model: Qwen3ForCausalLM, pool: ShardPool, rows: int, device: str) -> bool:
    """Compile the decoder layers and try one step; on any failure go back to the plain layers."""
    for layer in model.model.layers:
        layer.compile()
    try:
        with torch.autocast(device, dtype=torch.bfloat16):
            loss_of(model, pool.batch(rows)).backward()
        return True
    except Exception as error:
        print(f"compiling failed, going on without: {type(error).__name__}: {error}")
        for layer in model.model.layers:
            layer._compiled_call_impl = None
        return False
    finally:
        model.zero_grad(set_to_none=True)


def train(
    model: Qwen3ForCausalLM, pool: ShardPool, args: argparse.Namespace, began: float
) -> dict[str, object]:
    """Train until `args.seconds` after `began` (seconds of `time.monotonic`); returns what was done."""
    device = model.device.type
    decayed = [p for p in model.parameters() if p.ndim >= 2]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.95), fused=device == "cuda")
    used_compiler = args.compile and compiled(model, pool, args.rows, device)
    start = time.monotonic()
    print(f"training starts {start - began:.0f} s in, compiled layers: {used_compiler}", flush=True)
    total, step, progress = args.seconds - (start - began), 0, 0.0
    while progress < 1.0 and (args.steps is None or step < args.steps):
        progress = min(1.0, (time.monotonic() - start) / total)
        if args.steps is not None:
            progress = max(progress, step / args.steps)
        for group in optimizer.param_groups:
            group["lr"] = args.rate * rate_at(progress, step)
        with torch.autocast(device, dtype=torch.bfloat16):
            loss = loss_of(model, pool.batch(args.rows))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 10 == 0:
            pool.refresh()
        if step % args.log_every == 0:
            print(f"step {step} time {time.monotonic() - start:.0f} s loss {loss.item():.4f} "
                  f"shards {len(pool.shards)}", flush=True)  # fmt: skip
        step += 1
    return {
        "steps": step,
        "tokens": step * args.rows * MAX_LENGTH,
        "distinct_tokens": sum(shard.numel() for shard in pool.shards),
        "rows_per_step": args.rows,
        "tokens_per_row": MAX_LENGTH,
        "peak_learning_rate": args.rate,
        "training_seconds": round(time.monotonic() - start, 1),
        "final_batch_loss_nats": round(loss.item(), 4),
        "compiled_layers": used_compiler,
    }


def save(model: Qwen3ForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Write the package data: bf16 weights, the configurations and the tokenizer."""
    end = tokenizer.token_to_id(END)
    model = model.to("cpu", torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.generation_config = GenerationConfig(
        bos_token_id=end,
        eos_token_id=end,
        pad_token_id=tokenizer.token_to_id(PAD),
        do_sample=False,
        max_new_tokens=256,
    )
    model.save_pretrained(folder)
    save_tokenizer(tokenizer, folder)


def main() -> None:
    """Command line; see the module's text."""
    began = time.monotonic()
    parser = argparse.ArgumentParser(description="Train the demo model and write its package data.")
    parser.add_argument("--out", type=Path, default=MODEL_DIR, help="folder for the package data")
    parser.add_argument("--start", type=Path, default=None, help="folder of a checkpoint to go on from")
    parser.add_argument(
        "--seconds", type=float, default=270.0, help="wall-clock time for everything but saving"
    )
    parser.add_argument("--steps", type=int, default=None, help="stop after this many steps, if sooner")
    parser.add_argument("--rows", type=int, default=64, help=f"rows of {MAX_LENGTH} tokens in a batch")
    parser.add_argument("--rate", type=float, default=2.5e-3, help="peak learning rate")
    parser.add_argument(
        "--workers", type=int, default=max(1, (os.cpu_count() or 2) - 2), help="corpus processes"
    )
    parser.add_argument("--shards", type=int, default=64, help="shards that each process makes")
    parser.add_argument("--shard-rows", type=int, default=512, help="rows in a shard")
    parser.add_argument("--log-every", type=int, default=200, help="steps between log lines")
    parser.add_argument("--compile", action=argparse.BooleanOptionalAction, default=False)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.set_float32_matmul_precision("high")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    args.out.mkdir(parents=True, exist_ok=True)
    if args.start is not None:
        tokenizer = Tokenizer.from_file(str(args.start / "tokenizer.json"))
        model = Qwen3ForCausalLM.from_pretrained(args.start, dtype=torch.float32)
    else:
        tokenizer = build_tokenizer()
        model = Qwen3ForCausalLM(model_config(tokenizer))
    model = model.to(device).train()
    print(f"{model.num_parameters()} parameters, {time.monotonic() - began:.0f} s in", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tokenizer.save(str(folder / "tokenizer.json"))
        workers = start_workers(
            folder / "tokenizer.json",
            folder,
            args.workers,
            args.shards,
            args.shard_rows,
            MAX_LENGTH,
            args.seed,
        )
        try:
            done = train(model, ShardPool(folder, device, args.seed), args, began)
        finally:
            for worker in workers:
                worker.terminate()
            for worker in workers:
                worker.join()
    save(model, tokenizer, args.out)
    record = {
        "machine": f"1x {torch.cuda.get_device_name()}" if device == "cuda" else platform.machine(),
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        "parameters": model.num_parameters(),
        "seed": args.seed,
        "started_from_checkpoint": args.start is not None,
        **done,
    }
    if args.start is not None and (args.start / "training.json").exists():
        record["before"] = json.loads((args.start / "training.json").read_text())
    (args.out / "training.json").write_text(json.dumps(record, indent=2) + "\n")
    print(json.dumps(record), flush=True)


if __name__ == "__main__":
    main()
