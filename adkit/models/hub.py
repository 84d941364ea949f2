"""The Hugging Face hub as a local directory: small files first, weights only when they are read.

Everything after this module works on local directories. Its errors say in one sentence what was asked for,
what came back and what to do.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from adkit.contract import ModelError

_SMALL = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_TIMEOUT = 5.0  # seconds the hub may take to answer the first question


def fetch_small_files(repo: str, revision: str | None = None, *, code: bool = False) -> Path:
    """Directory with the repository's config, tokenizer and weight index, no weights.

    ``code`` fetches Python files too. Uses the local cache when the network is away. Raises ModelError.
    """
    return _snapshot(repo, revision, [*_SMALL, "*.py"] if code else _SMALL)


def fetch_weights(repo: str, directory: Path, allow_pickle: bool = False) -> Path:
    """Download the weights that belong to a snapshot made by :func:`fetch_small_files`; its directory.

    ``directory`` names the commit, so config and weights are of one revision. Raises ModelError.
    """
    for index in (
        "model.safetensors.index.json",
        *(("pytorch_model.bin.index.json",) if allow_pickle else ()),
    ):
        path = directory / index
        if path.exists():
            try:
                shards = sorted(set(json.loads(path.read_text(encoding="utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise ModelError(
                    f"{path} is not a weight index ({error}); delete it and download again"
                ) from error
            return _snapshot(repo, directory.name, shards)
    patterns = ["model.safetensors"] + (["pytorch_model.bin"] if allow_pickle else [])
    return _snapshot(repo, directory.name, patterns)


def _snapshot(repo: str, revision: str | None, patterns: list[str]) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(
                repo, revision=revision, allow_patterns=patterns, etag_timeout=_TIMEOUT, max_workers=4
            )
        )
    except Exception as error:
        raise ModelError(_explain(repo, revision, error)) from error


def _explain(repo: str, revision: str | None, error: Exception) -> str:
    from huggingface_hub import errors

    advice = "give a local directory or a bundled config name instead"

    def is_a(*names: str) -> bool:
        kinds: tuple[Any, ...] = tuple(k for n in names if (k := getattr(errors, n, None)))
        chain: BaseException | None = error
        while chain is not None:
            if isinstance(chain, kinds):
                return True
            chain = chain.__cause__
        return False

    if is_a("GatedRepoError"):
        return (
            f"{repo!r} is a gated repository: accept its terms at https://huggingface.co/{repo} and log in "
            f"(`hf auth login`, or the variable HF_TOKEN), or {advice}"
        )
    if is_a("HFValidationError"):
        return (
            f"{repo!r} is neither a directory here, nor a bundled config, nor a hub id (owner/name): {error}"
        )
    if is_a("RepositoryNotFoundError"):
        return (
            f"no repository {repo!r} on the Hugging Face hub that this login may see: check the spelling, "
            f"log in if it is private (`hf auth login`), or {advice}"
        )
    if is_a("RevisionNotFoundError"):
        return f"{repo!r} has no revision {revision!r}: name a branch, tag or commit that it has"
    if is_a("OfflineModeIsEnabled", "LocalEntryNotFoundError") or isinstance(error, OSError):
        offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "TRUE", "YES", "ON"}
        why = "HF_HUB_OFFLINE is set" if offline else "the hub cannot be reached (no network?)"
        todo = "unset it" if offline else "check the network"
        return f"{repo!r} is not in the local Hugging Face cache and {why}: {todo}, or {advice}"
    return f"could not fetch {repo!r} from the Hugging Face hub: {type(error).__name__}: {error}; {advice}"
