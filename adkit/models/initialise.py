"""Values that no checkpoint holds: computed buffers (rotary frequencies, masks) and seeded random weights.

Both come from Hugging Face's own ``_init_weights``, run on one module at a time: a shallow copy of the meta
module gets real tensors for its own parameters or buffers, filled with a sentinel, and whatever the
initialiser leaves untouched is noticed rather than used. The seed depends on the module's name only, so a
tensor's values do not depend on which others are made, or in which order (they do depend on the device's
random generator: CPU and CUDA differ).
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from adkit.contract import ModelError


def computed_buffers(model: Any, names: list[str], make: Callable[[], nn.Module]) -> dict[str, Tensor]:
    """Real values, on the CPU, of a meta model's buffers.

    What ``_init_weights`` does not fill is taken from ``make()``: the same model constructed once more with
    real buffers (see :func:`parameters_on_meta`). Raises ModelError for a buffer that neither gives.
    """
    made: dict[str, Tensor] = {}
    for path, leaves in _by_module(names).items():
        made.update(_initialise(model, path, leaves, torch.device("cpu"), 0))
    rest = [n for n in names if n not in made]
    if rest:
        with parameters_on_meta(), no_init_weights():
            real = dict(make().named_buffers(remove_duplicate=False))
        for name in rest:
            if name not in real or real[name].is_meta:
                raise ModelError(
                    f"buffer {name!r} of {type(model).__name__} is computed by its code, but neither its "
                    "initialiser nor its constructor gives its values; load a checkpoint that stores it"
                )
            made[name] = real[name].detach()
    return made


def random_tensors(
    model: Any, names: list[str], device: torch.device, seed: int
) -> Iterator[tuple[str, Tensor]]:
    """Seeded values of parameters and persistent buffers, made on ``device`` module by module.

    Each is what Hugging Face initialises it to: norms 1 (0 where the code adds 1), biases 0, matrices
    normal(0, initializer_range). Tensors that ``_init_weights`` leaves alone follow the same rule by rank.
    """
    wanted = set(names)
    for path, leaves in _by_module(names).items():
        module = model.get_submodule(path)
        own = [
            *module._parameters,
            *(b for b in module._buffers if b not in module._non_persistent_buffers_set),
        ]
        # All of the module's tensors, always: one generator serves them in turn.
        all_leaves = [leaf for leaf in own if getattr(module, leaf) is not None]
        made = _initialise(model, path, all_leaves, device, seed)
        for leaf in leaves:
            name = f"{path}.{leaf}" if path else leaf
            if name in wanted:
                yield name, made.pop(name) if name in made else _by_rank(model, name, device, seed)


def tensor_seed(name: str, seed: int) -> int:
    """A 63-bit seed of a name under a global seed: the first bytes of sha256."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1


@contextmanager
def parameters_on_meta() -> Iterator[None]:
    """Inside, constructing a module leaves its parameters on meta and its buffers real.

    A parameter exists for the moment between its allocation and its registration; untouched memory costs
    nothing, so a 405B model constructs in seconds.
    """
    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, param: nn.Parameter | None) -> None:
        if param is not None and not param.is_meta:
            param = nn.Parameter(param.detach().to("meta"), requires_grad=param.requires_grad)
        original(self, name, param)

    nn.Module.register_parameter = register  # type: ignore[method-assign]
    try:
        yield
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]


def _by_module(names: list[str]) -> dict[str, list[str]]:
    """Module path -> the leaf names wanted of it."""
    found: dict[str, list[str]] = {}
    for name in names:
        path, _, leaf = name.rpartition(".")
        found.setdefault(path, []).append(leaf)
    return found


def _initialise(
    model: Any, path: str, leaves: list[str], device: torch.device, seed: int
) -> dict[str, Tensor]:
    """Those of a module's own tensors that ``_init_weights`` fills, by full name.

    It is called as Hugging Face calls it: for the module, then for each module around it, since some
    initialise their children (output projections scaled by depth).
    """
    module = model.get_submodule(path)
    exact = [leaf for leaf in leaves if not getattr(module, leaf).is_floating_point()]
    runs = []
    # Integers have no NaN: what two different fills agree on was written.
    for fill in (0, 1) if exact else (0,):
        real = {}
        for leaf in leaves:
            meta = getattr(module, leaf)
            start = fill if leaf in exact else torch.nan
            real[leaf] = torch.full(meta.shape, start, dtype=meta.dtype, device=device)
        chain = _shadows(model, path, real)
        with torch.no_grad(), _seeded(device, tensor_seed(path, seed)):
            for owner, shadow in chain:
                try:
                    owner._init_weights(shadow)
                except (RuntimeError, ValueError, TypeError, LookupError, AttributeError):
                    continue  # it reaches for tensors that are on meta here
        runs.append({leaf: getattr(chain[0][1], leaf).detach() for leaf in leaves})
    filled = {}
    for leaf in leaves:
        value = runs[0][leaf]
        written = torch.equal(value, runs[1][leaf]) if leaf in exact else not bool(value.sum().isnan())
        if written and not value.is_meta:
            filled[f"{path}.{leaf}" if path else leaf] = value
    return filled


def _shadows(model: Any, path: str, real: dict[str, Tensor]) -> list[tuple[Any, nn.Module]]:
    """Shallow copies of a module (with ``real`` tensors) and of all around it, innermost first.

    Each comes with the innermost PreTrainedModel that holds it, whose initialiser Hugging Face would use.
    """
    parts = path.split(".") if path else []
    line: list[Any] = [model]
    for part in parts:
        line.append(getattr(line[-1], part))
    shadows: list[nn.Module] = []
    for depth in range(len(parts), -1, -1):
        shadow = copy.copy(line[depth])
        shadow._parameters, shadow._buffers = dict(shadow._parameters), dict(shadow._buffers)
        shadow._modules = dict(shadow._modules)
        if shadows:
            shadow._modules[parts[depth]] = shadows[-1]
        else:
            for leaf, tensor in real.items():
                if leaf in shadow._parameters:
                    shadow._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
                else:
                    shadow._buffers[leaf] = tensor
        shadows.append(shadow)
    owners: list[Any] = []
    for module in line:
        owners.append(module if isinstance(module, PreTrainedModel) or not owners else owners[-1])
    return list(zip(reversed(owners), shadows, strict=True))


def _by_rank(model: Any, name: str, device: torch.device, seed: int) -> Tensor:
    meta = model.get_parameter_or_buffer(name)
    if not meta.is_floating_point():
        raise ModelError(f"no rule makes random values of {meta.dtype} for {name!r}; use a checkpoint")
    if meta.ndim < 2:
        return torch.full(meta.shape, 0.0 if name.endswith("bias") else 1.0, dtype=meta.dtype, device=device)
    std = getattr(model.config.get_text_config(), "initializer_range", None) or 0.02
    with _seeded(device, tensor_seed(name, seed)):
        return torch.empty(meta.shape, dtype=meta.dtype, device=device).normal_(0.0, std)


@contextmanager
def _seeded(device: torch.device, seed: int) -> Iterator[None]:
    """The global generators seeded inside, as they were outside."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
