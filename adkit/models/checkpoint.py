"""Checkpoint files as a table of tensors: headers are read at once, data one tensor at a time.

Safetensors files are memory-mapped and copied straight to the device asked for, so the host never holds more
than the tensor being read. Pickle files (``.bin``) run arbitrary code in older torch and are refused unless
asked for; then they are read with ``weights_only``.
"""

from __future__ import annotations

import json
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from adkit.contract import CheckpointError, LocalWeight

_DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8,
    "BOOL": torch.bool,
}  # fmt: skip
_OPEN_FILES = 4


@dataclass(frozen=True)
class Stored:
    """A tensor as it lies in a file: which file, shape, and dtype (a safetensors name such as ``BF16``)."""

    file: Path
    shape: tuple[int, ...]
    dtype_name: str

    @property
    def dtype(self) -> torch.dtype | None:
        """The torch dtype, or None when torch has none of that name."""
        return _DTYPES.get(self.dtype_name)


class Checkpoint:
    """All tensors of a checkpoint directory by their stored names.

    Raises CheckpointError when the directory has no weights, an index names absent shards, a file is
    truncated or corrupt, or only pickle files exist and ``allow_pickle`` is false.
    """

    def __init__(self, directory: str | Path, *, allow_pickle: bool = False) -> None:
        self.directory = Path(directory)
        self.files, self.pickled = _weight_files(self.directory, allow_pickle)
        self.tensors: dict[str, Stored] = {}
        self._open: OrderedDict[Path, Any] = OrderedDict()
        for file in self.files:
            self.tensors.update(self._header(file))
            self.close()

    def read(self, name: str, device: torch.device | str = "cpu", dtype: torch.dtype | None = None) -> Tensor:
        """A copy of one stored tensor on ``device``, cast to ``dtype`` when given."""
        return self.mapped(name).to(device=device, dtype=dtype, copy=True)

    def read_part(self, name: str, part: LocalWeight, device: torch.device, dtype: torch.dtype) -> Tensor:
        """A copy of one rank's part of a stored tensor; no more than that comes into memory."""
        whole = self.mapped(name)
        made = torch.empty(part.shape(whole.shape), dtype=dtype, device=device)
        part.copy(whole, made)
        return made

    def same(self, one: str, other: str, rows: int = 1024) -> bool:
        """Whether two stored tensors hold the same, looked at few rows at a time."""
        a, b = self.mapped(one), self.mapped(other)
        if a.shape != b.shape or a.dtype != b.dtype:
            return a.shape == b.shape and torch.equal(a, b)
        return all(torch.equal(x, y) for x, y in zip(a.split(rows), b.split(rows), strict=True))

    def mapped(self, name: str) -> Tensor:
        """One stored tensor as it lies in its mapped file: it takes no memory of its own, and must not be kept."""
        file = self.tensors[name].file
        handle = self._handle(file)
        try:
            tensor = handle[name] if self.pickled else handle.get_tensor(name)
        except Exception as error:
            raise CheckpointError(f"cannot read {name!r} from {file}: {error}") from error
        return tensor.detach()

    def close(self) -> None:
        """Let go of the open files."""
        self._open.clear()

    def _header(self, file: Path) -> dict[str, Stored]:
        handle = self._handle(file)
        if self.pickled:
            names = {t: n for n, t in _DTYPES.items()}
            return {
                k: Stored(file, tuple(t.shape), names.get(t.dtype, str(t.dtype))) for k, t in handle.items()
            }
        found = {}
        for name in handle.keys():  # noqa: SIM118 (not a dict)
            view = handle.get_slice(name)
            found[name] = Stored(file, tuple(view.get_shape()), str(view.get_dtype()))
        return found

    def _handle(self, file: Path) -> Any:
        if file in self._open:
            self._open.move_to_end(file)
            return self._open[file]
        handle = _open_pickle(file) if self.pickled else _open_safetensors(file)
        self._open[file] = handle
        while len(self._open) > _OPEN_FILES:
            self._open.popitem(last=False)
        return handle


def has_weights(directory: Path) -> bool:
    """Whether the directory has any weight file, of any kind."""
    return any(
        any(directory.glob(p)) for p in ("*.safetensors", "*.safetensors.index.json", "pytorch_model*.bin")
    )


def _open_safetensors(file: Path) -> Any:
    from safetensors import safe_open

    size = file.stat().st_size
    try:
        return safe_open(str(file), framework="pt", device="cpu")
    except Exception as error:
        with file.open("rb") as stream:
            start = stream.read(40)
        hint = "it is truncated or corrupt; copy or download it again"
        if start.startswith(b"version https://git-lfs"):
            hint = "it is a Git LFS pointer, not the weights; run `git lfs pull`"
        raise CheckpointError(f"cannot read {file} ({size:,} bytes): {error}; {hint}") from error


def _open_pickle(file: Path) -> dict[str, Tensor]:
    try:
        try:
            state = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # the old file layout cannot be mapped
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise CheckpointError(
            f"cannot read {file} ({file.stat().st_size:,} bytes): {str(error).splitlines()[0]}; it is "
            "truncated, corrupt, or holds more than tensors; convert it to safetensors"
        ) from error
    if not isinstance(state, dict) or not all(isinstance(t, Tensor) for t in state.values()):
        raise CheckpointError(f"{file} does not hold a table of tensors; convert it to safetensors")
    return state


def _weight_files(directory: Path, allow_pickle: bool) -> tuple[list[Path], bool]:
    """Files that make up the checkpoint, and whether they are pickles."""
    if not directory.is_dir():
        raise CheckpointError(f"no checkpoint directory {directory}")
    for stem, suffix, pickled in (("model", "safetensors", False), ("pytorch_model", "bin", True)):
        index, single = directory / f"{stem}.{suffix}.index.json", directory / f"{stem}.{suffix}"
        if pickled and (index.exists() or single.exists()) and not allow_pickle:
            raise CheckpointError(
                f"{directory} has only pickle weights ({stem}.{suffix}), which can run code when read: "
                "convert them to safetensors, or pass allow_pickle=True if you trust their source"
            )
        if index.exists():
            return _shards(index), pickled
        if single.exists():
            return [single], pickled
    others = sorted(p.name for p in directory.glob("*.safetensors"))
    if others:
        raise CheckpointError(
            f"{directory} has {', '.join(others[:3])} but neither model.safetensors nor "
            "model.safetensors.index.json, so which files make the model is not known; "
            "rename the file or restore the index"
        )
    raise CheckpointError(
        f"{directory} has no weights (expected model.safetensors, or model.safetensors.index.json and its "
        "shards): add them, pass random_weights=True, or pass the config object to work on shapes only"
    )


def _shards(index: Path) -> list[Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
        files = [index.parent / name for name in names]
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise CheckpointError(
            f"{index} is not a weight index ({type(error).__name__}: {error}); copy it again"
        ) from error
    absent = [f.name for f in files if not f.exists()]
    if absent:
        shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
        raise CheckpointError(
            f"{index} names {len(files)} shards, of which {len(absent)} are absent: {shown}; "
            "copy or download them"
        )
    return files
