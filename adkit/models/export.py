"""A Hugging Face causal LM as one flat graph with keyword inputs, dynamic batch and sequence."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.export import _trace
from torch.fx import GraphModule, Node
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.fx.graph import CodeGen
from torch.fx.node import map_aggregate

import adkit.ops  # noqa: F401  (defines the canonical ops)
from adkit.contract import ExportError
from adkit.models.hf.masks import MaskUsedAsTensor
from adkit.models.hf.patches import Extensions, extension_points, fake_tensors

BATCH, SEQUENCE = 2, 11
EXPERTS = ("interface", "batched_mm")


@dataclass
class ExportFacts:
    """What export found out; also in ``gm.meta["adkit_export"]``.

    ``attention`` is the mode used: interface falls back to eager where the model does not go through the
    interface, sdpa where that would be wrong, with the reason in ``notes``. ``experts`` is the mode
    asked for. ``inputs`` are the graph's placeholders.
    """

    attention: str
    inputs: tuple[str, ...]
    experts: str = "interface"
    length_dependent_rope: tuple[str, ...] = ()
    notes: list[str] = field(default_factory=list)


def export_model(model: Any, attention: str = "interface", experts: str = "interface") -> GraphModule:
    """The model as a flat graph: ``gm(input_ids=..., position_ids=...) -> (logits,)``.

    ``model`` is a Hugging Face causal LM, on meta or with weights (which the graph then shares); it and
    Hugging Face's global state are left as they were. Inputs are int64 [B, S]: ``input_ids``,
    ``position_ids`` where the model takes them, and ``rope_lengths`` where a rotary scaling depends on length
    (each token's sequence length). Values and device literals say ``cpu``; :func:`retarget_device` changes
    the literals. ``attention``: ``interface`` for canonical ops, ``sdpa`` or ``eager`` for Hugging Face's own
    code; eager also where the model's class does not support sdpa, or sdpa would drop a softcap or sinks.
    ``experts``: ``interface`` for canonical ops, ``batched_mm`` for Hugging Face's batched products.

    Raises ExportError, naming the module where it can, when the model cannot be captured or its mask is not
    understood.
    """
    if experts not in EXPERTS:
        raise ExportError(
            f"experts = {experts!r} cannot be exported, only {' or '.join(EXPERTS)}: in Hugging Face's other "
            "forms sizes depend on what the router chose"
        )
    if attention == "sdpa":
        reason = _without_sdpa(model)
        if not reason:
            graph, extensions = _capture(model, attention, experts)
            if not extensions.dropped:
                return graph
            reason = f"Hugging Face's sdpa code ignores {' and '.join(sorted(extensions.dropped))}"
        return _noted(_capture(model, "eager", experts)[0], reason)
    if attention == "eager":
        return _capture(model, attention, experts)[0]
    reason = "the model does not go through Hugging Face's attention interface"
    gm: GraphModule | None = None
    try:
        gm, extensions = _capture(model, attention, experts)
        if any(n.target is torch.ops.adkit.torch_attention.default for n in gm.graph.nodes):
            return gm
        if extensions.masks:  # masks went in as descriptors and nothing read them
            gm = None
    except MaskUsedAsTensor as error:
        reason = str(error)
    if gm is None:
        gm, _ = _capture(model, "eager", experts)
    return _noted(gm, reason)


def _noted(gm: GraphModule, reason: str) -> GraphModule:
    """The graph, saying why it holds eager attention."""
    facts: ExportFacts = gm.meta["adkit_export"]
    facts.attention = "eager"
    facts.notes.insert(0, f"{reason}: its own attention code is in the graph")
    return gm


def _without_sdpa(model: nn.Module) -> str:
    """Says which model, or model within it, declares that it does not support sdpa; empty if all do.

    Hugging Face refuses such a class when it builds one; writing the config afterwards is not refused.
    """
    names = (type(m).__name__ for m in model.modules() if getattr(m, "_supports_sdpa", True) is False)
    return next((f"{name} does not support sdpa" for name in names), "")


def _capture(model: Any, attention: str, experts: str) -> tuple[GraphModule, Extensions]:
    """One ``torch.export``, as a graph module over the model's own tensors."""
    model.eval()
    takes_positions = "position_ids" in inspect.signature(model.forward).parameters
    mode = FakeTensorMode(
        shape_env=ShapeEnv(tracked_fakes=[], trace_asserts=True), allow_non_fake_inputs=True, export=True
    )
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    try:
        with extension_points(model, attention, experts) as extensions, fake_tensors(model, mode):
            inputs = {"input_ids": torch.zeros(BATCH, SEQUENCE, dtype=torch.long)}
            if takes_positions:
                inputs["position_ids"] = torch.arange(SEQUENCE).expand(BATCH, SEQUENCE).contiguous()
            if extensions.length_dependent:
                inputs["rope_lengths"] = torch.full((BATCH, SEQUENCE), SEQUENCE)
            dims = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
            forward = _forward(model.forward, extensions)
            with (
                mock.patch.object(model, "forward", forward),
                # Where it fails, torch prints hundreds of lines of graph; the error says all that is needed of it.
                mock.patch.object(_trace, "print", create=True),
                torch.no_grad(),
                tracing(TracingContext(mode)),
            ):
                program = torch.export.export(
                    model, (), kwargs=inputs, strict=False, dynamic_shapes=dict.fromkeys(inputs, dims)
                )
            module = program.module(check_guards=False)
    except ExportError:
        raise
    except Exception as error:
        found = _cause(error, MaskUsedAsTensor)
        if found is not None:
            raise found from error
        raise ExportError(_why_not(model, error)) from error
    gm = _plain(module, tensors)
    notes = _length_notes(program) + _after_padding(gm)
    gm.meta["adkit_export"] = ExportFacts(
        attention=attention,
        inputs=tuple(inputs),
        experts=experts,
        length_dependent_rope=tuple(extensions.rope),
        notes=extensions.notes + notes + _input_notes(gm),
    )
    return gm, extensions


def _forward(original: Callable[..., Any], extensions: Extensions) -> Callable[..., tuple[Tensor]]:
    """The model's forward with tensors only, no cache, and the logits alone as result."""

    def forward(
        input_ids: Tensor, position_ids: Tensor | None = None, rope_lengths: Tensor | None = None
    ) -> tuple[Tensor]:
        extensions.rope_lengths = rope_lengths
        more = {} if position_ids is None else {"position_ids": position_ids}
        return (original(input_ids=input_ids, use_cache=False, return_dict=True, **more).logits,)

    return forward


def _plain(module: GraphModule, tensors: dict[str, Tensor]) -> GraphModule:
    """A graph module called with keywords, without export's hooks, over the model's own tensors."""
    graph = module.graph
    graph.set_codegen(CodeGen())
    attributes: dict[str, Any] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            if node.target not in tensors:
                node.meta["adkit_constant"] = True
            attributes[node.target] = (
                tensors[node.target] if node.target in tensors else _constant(module, node)
            )
        elif node.op == "call_module":
            attributes[node.target] = module.get_submodule(node.target)
    gm = GraphModule(attributes, graph, class_name="GraphModule")
    gm.eval()
    return gm


def _constant(module: GraphModule, node: Node) -> Any:
    """The data of a tensor that the forward made from numbers, or kept outside its buffers."""
    value: Any = module
    for part in node.target.split("."):  # type: ignore[union-attr]
        value = getattr(value, part)
    if isinstance(value, Tensor) and (isinstance(value, FakeTensor) or value.is_meta):
        raise ExportError(
            f"the forward uses a tensor {tuple(value.shape)} that is neither parameter nor buffer and has no "
            f"data (graph attribute {node.target!r}); build the model on the CPU instead of meta"
        )
    return value


_SAME_POSITIONS = frozenset(
    {torch.ops.aten.to.dtype, torch.ops.aten.slice.Tensor, torch.ops.aten.view.default}
)


def _after_padding(gm: GraphModule) -> list[str]:
    """Count from ``padding_idx`` + 1 where a table of positions has a row for padding; returns notes.

    RoBERTa and its kin do so when they number tokens themselves (fairseq's ``make_positions``), but take
    ``position_ids`` as they come, while a graph's ``position_ids`` count from 0.
    """
    notes = []
    for node in list(gm.graph.nodes):
        if node.target is not torch.ops.aten.embedding.default:
            continue
        start = node.args[2] if len(node.args) > 2 else node.kwargs.get("padding_idx", -1)
        index = source = node.args[1]
        while source.target in _SAME_POSITIONS:
            source = source.args[0]
        if start < 0 or source.op != "placeholder" or source.target != "position_ids":
            continue
        with gm.graph.inserting_before(node):
            shifted = gm.graph.call_function(torch.ops.aten.add.Tensor, (index, start + 1))
        shifted.meta = {**{k: v for k, v in node.meta.items() if k != "custom"}, "val": index.meta["val"]}
        node.replace_input_with(index, shifted)
        notes.append(f"positions start at {start + 1} in the table {node.args[0]}, after its padding row")
    return notes


def _length_notes(program: Any) -> list[str]:
    """What export found out about lengths: beyond a bound the forward goes another way, which was not captured."""
    notes = []
    for bounds in program.range_constraints.values():
        lower = 0 if bounds.lower < 0 else int(bounds.lower)
        upper = None if bounds.upper > 2**40 else int(bounds.upper)
        if lower > 2 or upper is not None:
            notes.append(
                f"captured for sizes from {lower} to {upper or 'any'} only: it computes otherwise beyond"
            )
    return notes


def _input_notes(gm: GraphModule) -> list[str]:
    unused = [n.target for n in gm.graph.nodes if n.op == "placeholder" and not n.users]
    names = [n.target for n in gm.graph.nodes if n.op == "placeholder"]
    notes = [f"{name} is not read" for name in unused]
    if "position_ids" not in names:
        notes.append("the model takes no position_ids; the graph counts positions itself")
    return notes


def _cause(error: BaseException | None, kind: type[BaseException]) -> Any:
    while error is not None:
        if isinstance(error, kind):
            return error
        error = error.__cause__ or error.__context__
    return None


_FIXED_LENGTH = (
    "its forward works for one sequence length only, because it loops over tokens (recurrent and state-space "
    "models) or computes with the length"
)
_DATA_DEPENDENT = (
    "what it does next depends on the values of a tensor (which experts, patches or keys were chosen), so that no "
    "one graph holds for all tokens"
)
_ADVICE = (
    "What to do: run it with transformers itself (model.generate), or choose a model of a type that "
    "docs/coverage.md lists as running"
)


def _why_not(model: nn.Module, error: Exception) -> str:
    """The message for a model that torch.export cannot capture."""
    text, where = _first_line(error), _where(error, model)
    if "Constraints violated" in str(error):
        text = f"{_FIXED_LENGTH} ({text.split('!')[0]})"
    elif "data-dependent" in str(error):
        text = f"{where}: {_DATA_DEPENDENT} ({text.split(' (unhinted')[0]})"
    else:
        text = f"{where}: {text}"
    return f"{type(model).__name__} cannot be exported: {text}. {_ADVICE}"


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _where(error: BaseException, model: nn.Module) -> str:
    """Path and class of the innermost module that was running when ``error`` arose."""
    names = {id(module): name for name, module in model.named_modules()}
    found, trace = "", error.__traceback__
    while trace is not None:
        at = trace.tb_frame.f_locals.get("self")
        if id(at) in names:
            found = f"{names[id(at)] or 'the model'} ({type(at).__name__})"
        trace = trace.tb_next
    return found or "outside its modules"


def retarget_device(gm: GraphModule, device: torch.device | str) -> int:
    """Point every device literal and every constant of the graph at ``device``; returns how many changed.

    Constants are tensors the forward made from numbers (not parameters or buffers, which ``load_weights``
    places). Values (``meta["val"]``) stay on the device of the export: passes compute with them, they are not
    run.
    """
    device = torch.device(device)
    changed = 0

    def moved(value: Any) -> Any:
        nonlocal changed
        if isinstance(value, torch.device) and value != device:
            changed += 1
            return device
        return value

    for node in gm.graph.nodes:
        if node.op == "call_function":
            args, kwargs = map_aggregate(node.args, moved), map_aggregate(node.kwargs, moved)
            if args != node.args or kwargs != node.kwargs:
                node.args, node.kwargs = args, kwargs
        elif node.op == "get_attr" and is_constant(node):
            changed += _move_constant(gm, node.target, device)
    return changed


def is_constant(node: Node) -> bool:
    """Whether a ``get_attr`` node reads a tensor that export lifted out of the forward."""
    return bool(node.meta.get("adkit_constant", False))


def _move_constant(gm: GraphModule, target: str, device: torch.device) -> int:
    path, _, name = target.rpartition(".")
    owner = gm.get_submodule(path)
    tensor = getattr(owner, name)
    if not isinstance(tensor, Tensor) or tensor.device == device:
        return 0
    owner.register_buffer(name, tensor.to(device))
    return 1
