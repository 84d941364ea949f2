"""Makes training data in background processes while the model trains.

A shard is an array of rows (R, S) of uint16: documents packed whole, one after another, padded at the end of
the row. The two highest bits are flags, so one array says all there is to know of a token: `COUNTS` (the loss
counts it) and `STARTS` (it begins a document).
"""

from __future__ import annotations

import multiprocessing
import os
from pathlib import Path
from random import Random

import numpy as np
from tokenizers import Tokenizer

from scripts.demo_model.corpus import Segment, document

COUNTS = 1 << 15
STARTS = 1 << 14
TOKEN_MASK = STARTS - 1
PAD_ID = 0


def encode(tokenizer: Tokenizer, documents: list[list[Segment]]) -> list[np.ndarray]:
    """Tokenise documents segment by segment into flagged uint16 arrays, one for each document."""
    encodings = iter(tokenizer.encode_batch([text for segments in documents for text, _ in segments]))
    arrays = []
    for segments in documents:
        parts = [
            np.array(next(encodings).ids, dtype=np.uint16) | np.uint16(COUNTS if counts else 0)
            for _, counts in segments
        ]
        tokens = np.concatenate(parts)
        tokens[0] |= STARTS
        arrays.append(tokens)
    return arrays


def make_shard(tokenizer: Tokenizer, rng: Random, rows: int, length: int) -> np.ndarray:
    """A shard of `rows` rows of `length` tokens; documents longer than a row are left out."""
    shard = np.full((rows, length), PAD_ID, dtype=np.uint16)
    row = column = 0
    while True:
        for tokens in encode(tokenizer, [document(rng) for _ in range(512)]):
            size = len(tokens)
            if size > length:
                continue
            if column + size > length:
                row, column = row + 1, 0
                if row == rows:
                    return shard
            shard[row, column : column + size] = tokens
            column += size


def _work(
    tokenizer_file: str, folder: str, worker: int, seed: int, shards: int, rows: int, length: int
) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    os.nice(5)
    tokenizer = Tokenizer.from_file(tokenizer_file)
    rng = Random(f"corpus-{seed}-{worker}")
    for index in range(shards):
        shard = make_shard(tokenizer, rng, rows, length)
        partial = Path(folder) / f"partial-{worker}.npy"
        np.save(partial, shard)
        partial.rename(Path(folder) / f"shard-{index:04d}-{worker:03d}.npy")


def start_workers(
    tokenizer_file: Path, folder: Path, workers: int, shards: int, rows: int, length: int, seed: int = 0
) -> list[multiprocessing.process.BaseProcess]:
    """Start `workers` processes that each write `shards` shards to `folder`, and return the processes."""
    context = multiprocessing.get_context("spawn")
    processes: list[multiprocessing.process.BaseProcess] = []
    for worker in range(workers):
        process = context.Process(
            target=_work,
            args=(str(tokenizer_file), str(folder), worker, seed, shards, rows, length),
            daemon=True,
        )
        process.start()
        processes.append(process)
    return processes
