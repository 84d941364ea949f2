"""The model factory: a Hugging Face causal LM on meta, and its tensors one at a time.

Neighbours: ``resolve`` finds what a user means and makes a factory; ``checkpoint`` reads files;
``conversion`` maps stored names to the model's; ``initialise`` makes what is not stored; ``memory`` counts
bytes; ``loading`` fills a graph module from a factory.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from adkit.contract import CheckpointError, EngineConfig, LocalWeight, ModelError
from adkit.models import conversion, initialise, memory
from adkit.models.checkpoint import Checkpoint
from adkit.models.classes import text_model_class

Progress = Callable[[int, int], None]
Weights = Literal["checkpoint", "random", "none"]
_SHOWN = 8  # names listed a category in an error


@dataclass
class LoadReport:
    """How a checkpoint and a model fit: names and messages a category."""

    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    mismatched: dict[str, str] = field(default_factory=dict)
    made: list[str] = field(default_factory=list)  # absent, and the model class says they may be
    untied: bool = False

    @property
    def ok(self) -> bool:
        """Every tensor of the model can be read."""
        return not self.missing and not self.mismatched

    def __repr__(self) -> str:
        lines = [
            f"{title} ({len(names)}): {_some(names, sep)}"
            for title, names, sep in (
                ("missing", self.missing, ", "),
                ("mis-shaped", [f"{k}: {v}" for k, v in self.mismatched.items()], ";\n  "),
                ("unexpected", self.unexpected, ", "),
                ("absent, initialised", self.made, ", "),
            )
            if names
        ]
        return "\n".join(lines) if lines else "every tensor has its place"


@dataclass(eq=False)
class ModelFactory:
    """Builds a model without weights and streams its tensors.

    ``config`` is the Hugging Face config of the causal LM (the text part of a multi-modal one, then
    ``nested`` is true); ``weights`` says where tensors come from, ``why_no_weights`` is a sentence when they
    come from nowhere; ``directory`` holds the checkpoint and tokenizer files; ``lean`` takes the model of
    :mod:`adkit.models.lean` in place of Hugging Face's.
    """

    name: str
    config: Any
    dtype: torch.dtype
    weights: Weights = "none"
    why_no_weights: str = ""
    directory: Path | None = None
    seed: int = 0
    trust_remote_code: bool = False
    allow_pickle: bool = False
    nested: bool = False
    lean: bool = False
    fetch: Callable[[], Path] | None = field(default=None, repr=False)
    why_no_tokenizer: str = field(default="", repr=False)

    def build(self) -> nn.Module:
        """The causal LM on the meta device, in eval mode, in ``dtype``.

        Tensors that Hugging Face keeps in float32 are float32. Raises ModelError when it cannot be made.
        """
        tied = None
        if self.weights == "checkpoint" and not self._tied_in_checkpoint:
            tied = False
        return self._construct(torch.device("meta"), tied)

    def load(
        self,
        names: Iterable[str] | None = None,
        device: torch.device | str = "cpu",
        progress: Progress | None = None,
        parts: Mapping[str, LocalWeight] | None = None,
    ) -> Iterator[tuple[str, Tensor]]:
        """Stream tensors by name, on ``device``, in the model's dtypes: all of them, or those in ``names``.

        Parameters and persistent buffers come from the checkpoint or the seed, computed buffers are rebuilt.
        Tied names come one after the other with the same tensor. Only what is needed is read. A name in ``parts``
        stands for one rank's part of the weight that the part names: equal to that part of the whole tensor.
        ``progress(done, total)`` counts bytes. Raises CheckpointError listing every missing or mis-shaped
        tensor (before anything is read), ModelError for an unknown name or when there are no weights.
        """
        device = torch.device(device)
        table, parts = self.tensors, parts or {}
        wanted = list(table) if names is None else list(dict.fromkeys(names))
        unknown = [n for n in wanted if (parts[n].name if n in parts else n) not in table]
        if unknown:
            raise ModelError(f"{self.name} has no tensor {_some(unknown)}")
        if self.weights == "none":
            raise ModelError(f"{self.name} has no weights: {self.why_no_weights}")
        aliases: dict[LocalWeight, list[str]] = {}
        for n in wanted:
            part = parts.get(n, LocalWeight(n))
            aliases.setdefault(replace(part, name=self._canonical[part.name]), []).append(n)
        computed = [p for p in aliases if p.name in self.computed]
        stored = [p for p in aliases if p.name not in self.computed]
        sizes = {p: math.prod(p.shape(table[p.name].shape)) * table[p.name].itemsize for p in aliases}
        total = sum(sizes.values())
        done = 0
        source = (
            self._from_checkpoint(stored, device)
            if self.weights == "checkpoint"
            else self._from_seed(stored, device)
        )
        for stream in (source, self._computed(computed, device)):
            for part, tensor in stream:
                done += sizes[part]
                for alias in aliases[part]:
                    yield alias, tensor
                if progress is not None:
                    progress(done, total)

    def tokenizer(self) -> Any | None:
        """The tokenizer, or None (``why_no_tokenizer`` says why; prompts are then lists of token ids)."""
        if self._tokenizer is None and self.why_no_tokenizer and self.directory is not None:
            warnings.warn(f"{self.name}: {self.why_no_tokenizer}; prompts must be token ids", stacklevel=2)
        return self._tokenizer

    @cached_property
    def generation_config(self) -> Any:
        """Hugging Face's generation config: the checkpoint's, else what the model config implies."""
        from transformers import GenerationConfig

        if self.directory is not None and (self.directory / "generation_config.json").exists():
            try:
                return GenerationConfig.from_pretrained(self.directory)
            except (OSError, ValueError, TypeError) as error:
                warnings.warn(
                    f"{self.directory}/generation_config.json cannot be read ({error}); ignored", stacklevel=2
                )
        return GenerationConfig.from_model_config(self.config)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Token ids that end a completion."""
        for source in (self.generation_config, self.config.get_text_config(decoder=True)):
            ids = getattr(source, "eos_token_id", None)
            if ids is not None:
                return tuple(ids) if isinstance(ids, list | tuple) else (int(ids),)
        return ()

    @property
    def positions(self) -> int | None:
        """Positions that the config says the model is made for, those that a RoPE scaling adds included; None where it
        says nothing."""
        text = self.config.get_text_config(decoder=True)
        trained = getattr(text, "max_position_embeddings", None)
        if not isinstance(trained, int) or trained < 1:
            return None
        rope = getattr(text, "rope_parameters", None) or {}
        by_layer_type = [k for k in rope.values() if isinstance(k, dict)]
        kinds = by_layer_type or [rope]
        return max(trained, *(_stretched(kind, trained) for kind in kinds))

    def memory_estimate(
        self, engine: EngineConfig, device: torch.device | str | None = None
    ) -> memory.MemoryEstimate:
        """Bytes of weights, KV cache and workspace against what is free on the device."""
        where = engine.resolved_device() if device is None else torch.device(device)
        once = [t for n, t in self.tensors.items() if self._canonical[n] == n]
        return memory.estimate(self.name, self.config, self.dtype, once, engine, where)

    def check_checkpoint(self) -> LoadReport:
        """Compare the checkpoint's headers with the model, reading no weights."""
        return self._fit[1]

    def with_random_weights(self, seed: int = 0) -> ModelFactory:
        """The same model with seeded random weights."""
        other = copy.copy(self)
        if self.weights == "checkpoint" and not self._tied_in_checkpoint:
            other.config = copy.deepcopy(self.config)
            other.config.tie_word_embeddings = False
        other.weights, other.seed, other.why_no_weights = "random", seed, ""
        return other

    def without_weights(self) -> ModelFactory:
        """The same model on shapes."""
        other = copy.copy(self)
        other.weights, other.why_no_weights = "none", "only shapes were asked for"
        return other

    def stored_names(self) -> list[str]:
        """Names of the checkpoint's tensors as they are in its files; none without a checkpoint."""
        return list(self._checkpoint.tensors) if self.weights == "checkpoint" else []

    def tensor_names(self) -> list[str]:
        """Names of every parameter and buffer, in the model's order."""
        return list(self.tensors)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        """Every parameter and buffer as a meta tensor by name, tied names and computed buffers included."""
        model = self._skeleton
        named = [
            *model.named_parameters(remove_duplicate=False),
            *model.named_buffers(remove_duplicate=False),
        ]
        return dict(named)

    @cached_property
    def computed(self) -> frozenset[str]:
        """Names of buffers that checkpoints do not hold (rotary frequencies, masks, scales)."""
        model = self._skeleton
        found = set()
        for name, _ in model.named_buffers(remove_duplicate=False):
            path, _, leaf = name.rpartition(".")
            if leaf in model.get_submodule(path)._non_persistent_buffers_set:
                found.add(name)
        return frozenset(found)

    @property
    def tied(self) -> dict[str, str]:
        """Name -> the name whose tensor it shares."""
        return {n: c for n, c in self._canonical.items() if n != c}

    @cached_property
    def _skeleton(self) -> Any:
        return self.build()

    @cached_property
    def _canonical(self) -> dict[str, str]:
        """Each name -> the first name of the tensor it shares."""
        first: dict[int, str] = {}
        return {name: first.setdefault(id(tensor), name) for name, tensor in self.tensors.items()}

    @cached_property
    def _members(self) -> dict[str, list[str]]:
        """First name -> all names of the tensor."""
        members: dict[str, list[str]] = {}
        for name, first in self._canonical.items():
            members.setdefault(first, []).append(name)
        return members

    @cached_property
    def _tokenizer(self) -> Any | None:
        from transformers import AutoTokenizer

        if self.directory is None:
            self.why_no_tokenizer = "there is no tokenizer beside a config without files"
            return None
        if not any((self.directory / f).exists() for f in _TOKENIZER_FILES):
            self.why_no_tokenizer = (
                f"{self.directory} has no tokenizer files ({_TOKENIZER_FILES[0]} and the like)"
            )
            return None
        try:
            return AutoTokenizer.from_pretrained(self.directory, trust_remote_code=self.trust_remote_code)
        except Exception as error:  # tokenizers raise whatever their parser raises
            what = f"{type(error).__name__}: {str(error).strip()[:200]}"
            self.why_no_tokenizer = f"the tokenizer in {self.directory} cannot be read ({what})"
            return None

    @cached_property
    def _checkpoint(self) -> Checkpoint:
        if self.fetch is not None:
            self.directory = self.fetch()
        if self.directory is None:
            raise CheckpointError(f"{self.name} has no checkpoint directory")
        return Checkpoint(self.directory, allow_pickle=self.allow_pickle)

    @cached_property
    def _tied_in_checkpoint(self) -> bool:
        """False when the config ties two tensors that the checkpoint stores with different values."""
        if not getattr(self.config.get_text_config(decoder=True), "tie_word_embeddings", False):
            return True
        if self.fetch is not None and "_checkpoint" not in self.__dict__:
            return True  # do not download weights in order to draw a graph
        model: Any = self._construct(torch.device("meta"), None)
        plan = conversion.make_plan(model, self._checkpoint.tensors, nested=self.nested)
        for one, other in (getattr(model, "all_tied_weights_keys", None) or {}).items():
            groups = [plan.where.get(one), plan.where.get(other)]
            stored = [g.sources[0][0] for g in groups if g is not None and g.converter is None]
            if (
                len(stored) == 2
                and stored[0] != stored[1]
                and not self._checkpoint.same(stored[0], stored[1])
            ):
                return False
        return True

    @cached_property
    def _fit(self) -> tuple[conversion.Plan, LoadReport]:
        model = self._skeleton
        plan = conversion.make_plan(model, self._checkpoint.tensors, nested=self.nested)
        report = LoadReport(untied=not self._tied_in_checkpoint)
        absent_ok = conversion.may_be_missing(model)
        for first, names in self._members.items():
            if first in self.computed or any(n in plan.where or n in plan.mismatched for n in names):
                continue
            optional = absent_ok is not None and any(absent_ok.search(n) for n in names)
            (report.made if optional else report.missing).append(first)
        ignored = conversion.may_be_unexpected(model)
        report.unexpected = [
            name
            for name, key in plan.unexpected.items()
            if key not in self.computed  # old checkpoints hold buffers that are computed now
            and (ignored is None or not (ignored.search(name) or ignored.search(key)))
        ]
        report.mismatched = {**plan.mismatched, **self._wrong_dtypes(plan)}
        return plan, report

    def _wrong_dtypes(self, plan: conversion.Plan) -> dict[str, str]:
        """Stored integers (or unknown formats) where the model has floats: quantised or damaged weights."""
        wrong = {}
        for name, group in plan.where.items():
            for stored_name, _ in group.sources:
                stored = self._checkpoint.tensors[stored_name]
                kind = stored.dtype
                if (
                    kind is None
                    or (kind.is_floating_point and kind.itemsize >= 2)
                    != self.tensors[name].is_floating_point()
                ):
                    wrong[name] = f"stored as {stored.dtype_name}, the model has {self.tensors[name].dtype}"
        return wrong

    def _from_checkpoint(
        self, wanted: list[LocalWeight], device: torch.device
    ) -> Iterator[tuple[LocalWeight, Tensor]]:
        plan, report = self._fit
        asked = {alias for part in wanted for alias in self._members[part.name]}
        missing = [n for n in report.missing if n in asked]
        mismatched = {n: why for n, why in report.mismatched.items() if n in asked}
        if missing or mismatched:
            bad = LoadReport(missing, report.unexpected, mismatched)
            raise CheckpointError(
                f"the checkpoint in {self._checkpoint.directory} does not fit "
                f"{type(self._skeleton).__name__}:\n{bad!r}\n"
                "check that config.json and the weights belong together; random_weights=True needs none"
            )
        pending: dict[int, tuple[conversion.Group, list[tuple[str, LocalWeight]]]] = {}
        for part in wanted:
            supplier = next((a for a in self._members[part.name] if a in plan.where), None)
            if supplier is not None:
                group = plan.where[supplier]
                pending.setdefault(id(group), (group, []))[1].append((supplier, part))
        order = {id(g): i for i, g in enumerate(plan.groups)}
        for _, (group, found) in sorted(pending.items(), key=lambda item: order[item[0]]):
            if any(part.cuts or part.zero for _, part in found):
                yield from self._parts_of(group, found, device)
            else:
                yield from self._whole(group, found, device)
        self._checkpoint.close()
        made_up = set(report.made)
        rest = [p for p in wanted if p.name in made_up]
        if rest:
            yield from self._from_seed(rest, device)

    def _whole(
        self, group: conversion.Group, found: list[tuple[str, LocalWeight]], device: torch.device
    ) -> Iterator[tuple[LocalWeight, Tensor]]:
        """Tensors of one group, converted as Hugging Face does; a part is cut from the whole."""
        target = self.tensors[group.key].dtype
        read = [self._checkpoint.read(n, device, target) for n, _ in group.sources]
        made = group.convert(read, self._skeleton)
        del read
        left = Counter(supplier for supplier, _ in found)
        for supplier, part in found:
            left[supplier] -= 1
            whole = made[supplier] if left[supplier] else made.pop(supplier)
            tensor = whole.to(device=device, dtype=self.tensors[part.name].dtype).contiguous()
            del whole
            yield part, part.take(tensor)

    def _parts_of(
        self, group: conversion.Group, found: list[tuple[str, LocalWeight]], device: torch.device
    ) -> Iterator[tuple[LocalWeight, Tensor]]:
        """Parts of one group's tensors, reading no more than them where the conversion allows it."""
        experts = group.experts()
        if group.converter is None:
            for _, part in found:
                dtype = self.tensors[part.name].dtype
                yield part, self._checkpoint.read_part(group.sources[0][0], part, device, dtype)
        elif experts is None:
            yield from self._whole(group, found, device)
        else:
            for _, part in found:
                yield part, self._expert_by_expert(experts, part, device)

    def _expert_by_expert(
        self, experts: conversion.Experts, part: LocalWeight, device: torch.device
    ) -> Tensor:
        """A part of a tensor of experts: those of this rank, one after another, straight from the mapped files."""
        meta = self.tensors[part.name]
        made = torch.zeros(part.shape(meta.shape), dtype=meta.dtype, device=device)
        if part.zero:
            return made
        kept = next((c.ranges for c in part.cuts if c.dim == 0), ((0, len(experts.sources)),))
        for at, expert in enumerate(e for start, stop in kept for e in range(start, stop)):
            stored = [self._checkpoint.mapped(name) for name in experts.sources[expert]]
            experts.copy(stored, part, made[at : at + 1])
        return made

    def _from_seed(
        self, wanted: list[LocalWeight], device: torch.device
    ) -> Iterator[tuple[LocalWeight, Tensor]]:
        by_name = _by_name(wanted)
        for name, tensor in initialise.random_tensors(self._skeleton, list(by_name), device, self.seed):
            for part in by_name[name]:
                yield part, part.take(tensor)

    def _computed(
        self, wanted: list[LocalWeight], device: torch.device
    ) -> Iterator[tuple[LocalWeight, Tensor]]:
        if not wanted:
            return
        by_name = _by_name(wanted)
        made = initialise.computed_buffers(
            self._skeleton, list(by_name), lambda: self._construct(torch.device("cpu"), None)
        )
        for name, found in by_name.items():
            for part in found:
                yield part, part.take(made[name].to(device))

    def _construct(self, device: torch.device, tied: bool | None) -> nn.Module:
        from transformers import AutoModelForCausalLM

        from adkit.models.lean import lean_class

        config = copy.deepcopy(self.config)
        if tied is not None:
            config.tie_word_embeddings = tied
        try:
            with torch.device(device):
                own = lean_class(config) if self.lean else text_model_class(config)
                if own is not None:
                    model = own._from_config(config, dtype=self.dtype)
                else:
                    model = AutoModelForCausalLM.from_config(
                        config, dtype=self.dtype, trust_remote_code=self.trust_remote_code
                    )
        except ModelError:
            raise
        except Exception as error:
            raise ModelError(
                f"cannot build {self.name} ({type(config).__name__}, {self.dtype}): "
                f"{type(error).__name__}: {error}"
            ) from error
        if device.type == "meta":
            _empty(model)
        for name in conversion.float32_names(model, self.dtype):
            path, _, leaf = name.rpartition(".")
            owner = model.get_submodule(path)
            if leaf in owner._buffers:
                owner._buffers[leaf] = owner._buffers[leaf].float()
            else:
                owner._parameters[leaf] = nn.Parameter(owner._parameters[leaf].detach().float())
        return model.eval().requires_grad_(False)


_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model",
    "tekken.json",
)  # fmt: skip


def _empty(model: nn.Module) -> None:
    """Move to meta what was made elsewhere (``torch.normal`` heeds no default device); ties hold.

    Made-up values would pass for loaded weights.
    """
    memo: dict[int, Tensor] = {}
    for module in model.modules():
        tables: tuple[dict[str, Any], ...] = (module._parameters, module._buffers)
        for table in tables:
            for name, tensor in table.items():
                if tensor is None or tensor.is_meta:
                    continue
                if id(tensor) not in memo:
                    moved = tensor.detach().to("meta")
                    memo[id(tensor)] = nn.Parameter(moved) if isinstance(tensor, nn.Parameter) else moved
                table[name] = memo[id(tensor)]


def _by_name(parts: list[LocalWeight]) -> dict[str, list[LocalWeight]]:
    found: dict[str, list[LocalWeight]] = {}
    for part in parts:
        found.setdefault(part.name, []).append(part)
    return found


def _stretched(rope: Mapping[str, Any], trained: int) -> int:
    """Positions that a RoPE scaling is made for. Some configs count them among the trained ones, others do not."""
    return int((rope.get("original_max_position_embeddings") or trained) * (rope.get("factor") or 1))


def _some(names: list[str], sep: str = ", ") -> str:
    more = len(names) - _SHOWN
    return sep.join(names[:_SHOWN]) + (f" and {more} more" if more > 0 else "")
