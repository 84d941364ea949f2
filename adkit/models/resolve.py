"""From what a user names to a :class:`~adkit.models.factory.ModelFactory`."""

from __future__ import annotations

import copy
import difflib
import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch

from adkit.contract import CheckpointError, ModelError, nearest
from adkit.models import hub
from adkit.models.bundled import bundled_config, bundled_names, demo_directory
from adkit.models.checkpoint import Checkpoint, has_weights
from adkit.models.classes import has_causal_lm
from adkit.models.factory import ModelFactory, Weights
from adkit.models.lean import lean_class

_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
_ADDRESS = re.compile(r"https?://[^/]+/(?P<id>[\w.-]+/[\w.-]+)([/?#]|$)")  # a model's page on some hub
_SHAPES_ONLY = (
    "shapes only: pass random_weights=True for seeded random weights, or a checkpoint's directory or hub id"
)


def resolve(
    model: Any,
    *,
    dtype: str | torch.dtype = "auto",
    device: torch.device | str | None = None,
    random_weights: bool = False,
    seed: int = 0,
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    revision: str | None = None,
    lean: bool = False,
) -> ModelFactory:
    """The factory of a model.

    ``model``: ``"demo"``, a bundled config's name (any case; a model directory of that name comes first), a
    local directory, a Hugging Face hub id, a Hugging Face config object, or such a config as a dictionary.
    ``dtype`` auto: float32 when ``device`` is the CPU, else what the config or the checkpoint says.
    ``random_weights`` replaces any checkpoint by values drawn from ``seed``. ``lean`` takes the hand-written model
    with sharding hints (:mod:`adkit.models.lean`) in place of Hugging Face's. Raises ModelError
    (CheckpointError for its files) saying what to do.
    """
    options = {"trust_remote_code": trust_remote_code}
    if isinstance(model, str) and model.lower() == "demo":
        model = "demo"
    directory: Path | None = None
    repo: str | None = None
    why = ""
    if isinstance(model, dict):
        config, name = _from_dict(model), str(model.get("model_type", "config"))
        why = f"a config has {_SHAPES_ONLY}"
    elif hasattr(model, "model_type") and hasattr(model, "get_text_config"):
        config, name = model, str(getattr(model, "name_or_path", "") or model.model_type)
        name = Path(name).name if Path(name).is_dir() else name  # as a directory itself is named
        why = f"a config has {_SHAPES_ONLY}"
    elif not isinstance(model, str | Path):
        raise ModelError(
            f"a model is a name, a directory, a hub id or a Hugging Face config, not {type(model).__name__}; "
            "for a module that is already built, pass its .config"
        )
    elif str(model).lower() in bundled_names() and not (Path(model) / "config.json").exists():
        name = str(model).lower()
        config = _from_dict(bundled_config(name))
        why = f"the bundled config {name} has {_SHAPES_ONLY}"
    else:
        directory, repo = _locate(str(model), revision, trust_remote_code)
        name = str(model) if repo or str(model) == "demo" else directory.name
        config = _from_directory(directory, str(model), **options)

    kind, parent = config, None
    text = config.get_text_config(decoder=True)
    if text is not config and has_causal_lm(text):
        kind, parent = text, config
        if getattr(parent, "tie_word_embeddings", False) and not getattr(text, "tie_word_embeddings", True):
            kind = copy.deepcopy(text)  # the whole model's config decides
            kind.tie_word_embeddings = True
    elif not has_causal_lm(config) and not (trust_remote_code and _has_remote_code(config)):
        raise ModelError(
            f"{name}: transformers has no causal language model for config type {config.model_type!r} "
            f"({type(config).__name__})"
            + (
                "; it comes with its own code: pass trust_remote_code=True if you trust it"
                if _has_remote_code(config)
                else "; adkit runs decoder-only text generation"
            )
        )

    if lean:
        lean_class(kind)  # raises, saying which there are

    weights: Weights = "random" if random_weights else "none" if directory is None else "checkpoint"
    fetch = None
    files = directory if weights == "checkpoint" else None
    if files is not None:
        _refuse_quantised(name, config, kind)
        if repo is not None:
            fetch, files = partial(hub.fetch_weights, repo, files, allow_pickle), None
        elif not has_weights(files):
            Checkpoint(files)  # raises, saying what was looked for
    return ModelFactory(
        name=name,
        config=kind,
        dtype=_dtype(dtype, kind, parent, device, files, allow_pickle),
        weights=weights,
        why_no_weights=why if weights == "none" else "",
        directory=directory,
        seed=seed,
        trust_remote_code=trust_remote_code,
        allow_pickle=allow_pickle,
        nested=parent is not None,
        lean=lean,
        fetch=fetch,
    )


def _locate(model: str, revision: str | None, trust_remote_code: bool) -> tuple[Path, str | None]:
    """The local directory of a model, and its hub id when it came from the hub."""
    if model == "demo":
        directory = demo_directory()
        if not (directory / "config.json").exists():
            raise ModelError(f"the demo model is not in this installation ({directory}); reinstall adkit")
        return directory, None
    if not model.strip():
        raise ModelError(
            "the model's name is empty: give 'demo', a bundled config's name, a directory or a hub id owner/name"
        )
    address = _ADDRESS.match(model)
    if address:
        raise ModelError(f"{model!r} is an address, not a model: give the hub id {address['id']!r}")
    path = Path(model).expanduser()
    if path.is_dir():
        if not (path / "config.json").exists():
            raise ModelError(f"{path} has no config.json: give the directory that `save_pretrained` wrote")
        return path, None
    if path.exists():
        raise ModelError(f"{path} is a file: give the directory that holds config.json and the weights")
    if model.startswith((".", "/", "~")) or model.endswith("/") or model.count("/") > 1:
        raise ModelError(f"no directory {model!r}{nearest(model, bundled_names())}")
    known = ("demo", *bundled_names())
    close = difflib.get_close_matches(model.lower(), known, 1, cutoff=0.75)
    if "/" not in model and close:
        raise ModelError(
            f"no model {model!r}; did you mean {close[0]!r}? (bundled: {', '.join(known)}; a directory or a "
            "hub id owner/name works too)"
        )
    try:
        return hub.fetch_small_files(model, revision, code=trust_remote_code), model
    except ModelError as error:
        if "/" in model:
            raise
        raise ModelError(f"{error} (bundled: {', '.join(known)})") from error


def _from_dict(values: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    rest = dict(values)
    kind = rest.pop("model_type", None)
    if not kind:
        raise ModelError("a config dictionary needs 'model_type', as in a Hugging Face config.json")
    try:
        return AutoConfig.for_model(kind, **rest)
    except Exception as error:
        raise ModelError(f"no config can be made of model_type {kind!r}: {_short(error)}") from error


def _from_directory(directory: Path, given: str, trust_remote_code: bool) -> Any:
    from transformers import AutoConfig

    file = directory / "config.json"
    if not file.exists():
        raise ModelError(f"{given!r} has no config.json, so it is not a transformers model")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{file} is not valid JSON ({error}); copy or download it again") from error
    if not isinstance(values, dict):
        raise ModelError(
            f"{file} holds a {type(values).__name__}, and a config.json is an object of a model's settings "
            '({"model_type": "llama", ...}); copy or download it again'
        )
    try:
        return AutoConfig.from_pretrained(directory, trust_remote_code=trust_remote_code)
    except Exception as error:
        if not trust_remote_code and values.get("auto_map"):
            raise ModelError(
                f"{given!r} comes with its own Python code, which is not run by default: pass "
                "trust_remote_code=True if you trust it"
            ) from error
        kind = values.get("model_type")
        raise ModelError(
            f"{file} (model_type {kind!r}) cannot be read by this transformers: {_short(error)}"
        ) from error


def _has_remote_code(config: Any) -> bool:
    return "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})


def _refuse_quantised(name: str, *configs: Any) -> None:
    for config in configs:
        found = getattr(config, "quantization_config", None)
        if found:
            values = found if isinstance(found, dict) else getattr(found, "__dict__", {})
            method = values.get("quant_method", "unknown method")
            raise CheckpointError(
                f"{name}'s checkpoint is quantised ({getattr(method, 'value', method)}), which is not "
                "supported yet: use an unquantised checkpoint, or random_weights=True to work on its graph"
            )


def _dtype(
    asked: str | torch.dtype,
    config: Any,
    parent: Any,
    device: torch.device | str | None,
    directory: Path | None,
    allow_pickle: bool,
) -> torch.dtype:
    if isinstance(asked, torch.dtype):
        asked = str(asked).removeprefix("torch.")
    if asked in _DTYPES:
        return _DTYPES[asked]
    if asked != "auto":
        raise ModelError(f"dtype {asked!r}{nearest(asked, ('auto', *_DTYPES))}")
    where = (
        torch.device(device)
        if device is not None
        else torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    if where.type == "cpu":
        return torch.float32
    for source in (config, parent):
        found = getattr(source, "dtype", None)
        if found is not None:
            return _DTYPES.get(str(found).removeprefix("torch."), torch.float32)
    if directory is not None:
        for stored in Checkpoint(directory, allow_pickle=allow_pickle).tensors.values():
            if stored.dtype in _DTYPES.values():
                return stored.dtype  # type: ignore[return-value]
    return torch.float32


def _short(error: Exception, most: int = 300) -> str:
    """The error on one line: config validation names the field on one line, the reason on the next."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text if len(text) <= most else text[:most] + ' ...'}"
