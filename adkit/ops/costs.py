"""FLOPs and bytes of adkit's ops, for the cost model (:mod:`adkit.graph.cost`)."""

from __future__ import annotations

from adkit.graph.cost import Call, CostFn, attended_pairs, matmul


def linear(call: Call) -> tuple[float, float]:
    """2 M N K."""
    return matmul(call, call["input"])


def fused_linear(call: Call) -> tuple[float, float]:
    """2 M N K; the norm, the gate and the sum around the product are lost beside it."""
    x, weight = call["input"], call["weight"]
    return 2.0 * x.numel * weight.shape[0], call.traffic


def per_element(operations: float) -> CostFn:
    """So many operations for each element of the outputs' largest."""

    def cost(call: Call) -> tuple[float, float]:
        return operations * max(t.numel for t in call.outputs), call.traffic

    return cost


def rope(call: Call) -> tuple[float, float]:
    """Two products and a sum for each rotated element."""
    return 3.0 * sum(t.numel for t in call.outputs), call.traffic


def rope_kv_cache(call: Call) -> tuple[float, float]:
    """As ``rope``, four operations more for each element that is normalised; of the caches, only what is
    written moves.
    """
    q, k, v = call["query"], call["key"], call["value"]
    caches = {"k_cache": k, "v_cache": v}
    flops = 3.0 * (q.numel + k.numel)
    flops += sum(4.0 * t.numel for t, eps in ((q, "q_eps"), (k, "k_eps")) if call.get(eps) is not None)
    written = sum(t.numel * call[name].dtype.itemsize for name, t in caches.items())
    return flops, call.traffic - sum(call[name].bytes for name in caches) + written


def attention(call: Call) -> tuple[float, float]:
    """Two products, 2 (H + Hv) a head and (query, key) pair that the mask lets through."""
    q, v = call["query"], call["value"]
    at = (1, 2) if call.get("layout", "bsnd") == "bsnd" else (2, 1)
    queries, heads, keys = q.shape[at[0]], q.shape[at[1]], v.shape[at[0]]
    pairs = attended_pairs(
        queries, keys - queries, call.get("is_causal", True), call.get("window"), call.get("chunk")
    )
    return 2.0 * q.shape[0] * heads * pairs * (q.shape[-1] + v.shape[-1]), call.traffic


def cached_attention(call: Call) -> tuple[float, float]:
    """As ``attention``, T tokens shared evenly by R sequences, each with ``context`` tokens of history in
    all.

    Reads the history that the window or chunk reaches once a sequence, and writes this step's keys and
    values unless (``slot_mapping`` None) they stand in the cache already. Without ``context`` nothing was
    cached before.
    """
    q, v = call["query"], call["value"]
    tokens, heads = q.shape[1], q.shape[2]
    sequences = max(1, call["cache_lens"].shape[0])
    each = max(1, round(tokens / sequences))
    context = max(each, call.sizes.get("context", each))
    window, chunk = call.get("window"), call.get("chunk")
    pairs = attended_pairs(each, context - each, True, window, chunk) * tokens / each
    reach = min(context, each + window - 1 if window else context)
    if chunk:
        reach = min(reach, context - (context - each) // chunk * chunk)
    k_cache, v_cache = call["k_cache"], call["v_cache"]
    per_token = sum(c.shape[2] * c.shape[3] * c.dtype.itemsize for c in (k_cache, v_cache))
    small = [t for t in call.inputs if t is not k_cache and t is not v_cache]
    moved = sum(t.bytes for t in small) + sum(t.numel * t.dtype.itemsize for t in call.outputs)
    flops = 2.0 * heads * pairs * (q.shape[-1] + v.shape[-1])
    written = 0 if call.get("slot_mapping") is None else tokens
    return flops, float(moved + per_token * (written + sequences * reach))


def moe(call: Call) -> tuple[float, float]:
    """Each token's k experts; weights of the experts expected to be hit by uniform routing, E (1 - (1 -
    k/E)^T).
    """
    ids, gate_up, down = call["topk_ids"], call["gate_up"], call["down"]
    tokens, k = ids.shape
    experts = gate_up.shape[0]
    weights = [t for t in (gate_up, down, call.get("gate_up_bias"), call.get("down_bias")) if t is not None]
    each = sum(t.bytes for t in weights) / experts
    hit = experts * (1 - (1 - min(1.0, k / experts)) ** tokens)
    flops = 2.0 * tokens * k * (gate_up.numel + down.numel) / experts
    activations = call.traffic - sum(t.bytes for t in weights)
    return flops, activations + hit * each
