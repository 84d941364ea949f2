"""Tiny random causal LMs of any Hugging Face type, made so that mistakes show.

``tiny("llama")`` builds one from its config class and a few general overrides. Random models of default
initialisation hardly notice attention or positions, so matrices other than embeddings are scaled by 10, norms
and biases are made uneven, and windows are short (8).
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

#: The types that generation must be exact for (issue 2), without bloom.
INTERFACE_TYPES = (
    "llama",
    "mistral",
    "ministral",
    "qwen2",
    "qwen3",
    "gemma",
    "gemma2",
    "gemma3_text",
    "phi3",
    "olmo2",
    "olmo3",
    "granite",
    "starcoder2",
    "cohere2",
    "glm4",
    "smollm3",
    "exaone4",
    "gpt2",
    "gpt_neox",
    "opt",
    "phi",
    "gpt_oss",
    "mixtral",
    "qwen3_moe",
    "olmoe",
    "phimoe",
)

_SIZES: dict[str, Any] = {
    "vocab_size": 131,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "sliding_window": 8,
    "attention_chunk_size": 8,
    # mixtures of experts
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "intermediate_size_mlp": 40,
    # names of the GPT-2 family, OPT, MPT, GPT-J
    "n_embd": 48,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 256,
    "n_inner": 80,
    "d_model": 48,
    "n_heads": 4,
    "n_layers": 2,
    "max_seq_len": 256,
    "ffn_dim": 80,
    "word_embed_proj_dim": 48,
    "rotary_dim": 8,
    "num_layers": 2,
    "num_heads": 4,
    "ffn_hidden_size": 80,
    "n_ctx": 256,
    # routing in groups, layers without experts
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    # decoders of encoder-decoder models, vision and audio towers
    "decoder_layers": 2,
    "decoder_attention_heads": 4,
    "decoder_ffn_dim": 80,
    "encoder_layers": 2,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 80,
    "image_size": 28,
    "patch_size": 14,
    "depth": 2,
    "embed_dim": 48,
    "hidden_size_global": 48,
    # indexers, state spaces
    "index_head_dim": 16,
    "index_n_heads": 2,
    "index_topk": 64,
    "indexer_head_dim": 16,
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_budget": 64,
    "indexer_compress_ratio": 4,
    # tables of n-grams
    "encoder_hash_byte_group_vocab": 131,
    "ngram_vocab_size_base": 131,
    "split_ngram_parts": 4,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 131,
    "mamba_n_heads": 4,
    # BERT and its kin are causal only as decoders
    "is_decoder": True,
    # special tokens must lie in the vocabulary
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

#: Sizes of every type with latent attention (known by its ``kv_lora_rank``).
_LATENT: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 24,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8,
    "v_head_dim": 10,
}

#: Leaves a field to the config class.
DROP = object()

#: Hybrids that share a block's weights: with fewer than two such layers there is nothing to share.
_SHARING: dict[str, Any] = {
    "num_hidden_layers": 4,
    "layer_types": DROP,
    "layers_block_type": ["linear_attention", "hybrid"] * 2,
}

#: What a type needs beyond sizes. Keys are merged over ``_SIZES``.
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen2_moe": {"use_sliding_window": True, "max_window_layers": 1},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 1},
    "gemma2": {"query_pre_attn_scalar": 12},
    "gemma3_text": {"query_pre_attn_scalar": 12, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            "original_max_position_embeddings": 16,
        },
    },
    "phimoe": {
        "original_max_position_embeddings": 16,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5],
            "long_factor": [2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
            "short_mscale": 1.1,
            "long_mscale": 1.3,
            "original_max_position_embeddings": 16,
        },
    },
    "smollm3": {"no_rope_layers": [1, 0], "layer_types": DROP},
    "exaone4": {"sliding_window_pattern": 2, "layer_types": ["sliding_attention", "full_attention"]},
    "gpt_neox": {"num_key_value_heads": DROP},
    "dots1": {"n_shared_experts": 1},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "longcat_flash": {"head_dim": 8, "zero_expert_num": 2},
    "nemotron_h": {"layer_types": ["linear_attention", "full_attention"]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}},
    },
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm3": {"layer_types": ["conv", "full_attention"]},
    "recurrent_gemma": {"layer_types": DROP, "block_types": ["recurrent", "attention"]},
    "jamba": {"layer_types": DROP, "attn_layer_period": 2, "attn_layer_offset": 1},
    "bamba": {"attn_layer_indices": [1]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "prophetnet": {"num_decoder_attention_heads": 4, "num_decoder_layers": 2, "decoder_ffn_dim": 80},
    "mamba2": {"num_heads": 8},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 1e4},
        "ffn_config": {"ffn_hidden_size": 80, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "dots3_note_vision_encoder": {"per_layer_config": {}, "adapter_in_dim": 48, "adapter_out_dim": 48},
    "dots3_note_audio_encoder": {"adapter_input_size": 48, "adapter_out_dim": 48},
    "reformer": {"axial_pos_embds": False},
    "xlstm": {"hidden_size": 128},
    "zamba": _SHARING,
    "zamba2": _SHARING,
    "xmod": {"default_language": "en_XX"},
    "zaya": {"num_experts_per_tok": 1},
    "gemma3n_text": {"num_kv_shared_layers": 0, "layer_types": ["sliding_attention", "full_attention"]},
    "roc_bert": {"shape_vocab_size": 131, "pronunciation_vocab_size": 131},
    "stablelm": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "window_size": 8},
    "llama4_text": {
        "no_rope_layers": [1, 0],
        "layer_types": DROP,
        "interleave_moe_layer_step": 1,
        "max_position_embeddings": 512,
        "floor_scale": 4,  # of the temperature: within the tests' lengths
    },
    "cohere2": {"layer_types": ["sliding_attention", "full_attention"]},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"]},
    "olmo3": {"layer_types": ["sliding_attention", "full_attention"]},
    "ministral": {"layer_types": ["sliding_attention", "full_attention"]},
}


def tiny_config(model_type: str, **more: Any) -> Any:
    """A tiny config of the type; sizes that the config class does not know are left out."""
    special = {**OVERRIDES.get(model_type, {}), **more}
    given = {**_sizes(AutoConfig.for_model(model_type)), **special}
    return AutoConfig.for_model(model_type, **{n: v for n, v in given.items() if v is not DROP})


def _sizes(default: Any) -> dict[str, Any]:
    """The sizes that a config knows, those of the configs inside it included."""
    aliases = getattr(default, "attribute_map", {})
    known = set(default.to_dict()) | set(aliases)
    sizes = {**_SIZES, **_LATENT, "head_dim": DROP} if "kv_lora_rank" in known else _SIZES
    given = {n: v for n, v in sizes.items() if n in known and aliases.get(n) not in sizes}
    kinds = list(dict.fromkeys(getattr(default, "layer_types", None) or ()))
    first = [k for k in (kinds and default.layer_types[:2]) if k.endswith("attention") and "linear" not in k]
    if len(kinds) > 1 and not first:
        given["layer_types"] = kinds[:2]  # a hybrid whose first layers hold a state: both kinds
    for name in getattr(default, "sub_configs", None) or {}:
        inner = getattr(default, name, None)
        if inner is not None and hasattr(inner, "to_dict"):
            kind = {"model_type": inner.model_type} if inner.model_type else {}
            special = {**_sizes(inner), **OVERRIDES.get(inner.model_type, {})}
            given[name] = {**kind, **{n: v for n, v in special.items() if v is not DROP}}
    return given


def tiny(model_type: str, seed: int = 0, **more: Any) -> tuple[Any, Any]:
    """``(config, model)`` of the type: float32, CPU, eager attention, eval, sensitive weights."""
    config = tiny_config(model_type, **more)
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    sensitise(model, seed)
    return config, model


def sensitise(model: Any, seed: int = 0) -> None:
    """Make a random model feel attention, positions, norms and biases, in place."""
    generator = torch.Generator().manual_seed(seed)
    embeddings = {id(p) for m in model.modules() if isinstance(m, torch.nn.Embedding) for p in m.parameters()}
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() >= 2:
                if parameter.abs().max() == 0 or not torch.isfinite(parameter).all():
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
                if id(parameter) not in embeddings:
                    parameter.mul_(10)
            else:
                parameter.nan_to_num_().add_(torch.randn(parameter.shape, generator=generator) * 0.2)


def meta_twin(config: Any, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a config on meta, without weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def with_weights_of(gm: torch.fx.GraphModule, model: Any) -> torch.fx.GraphModule:
    """Fill a graph exported from meta with the tensors of a real model, by name."""
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target in tensors:
            path, _, name = node.target.rpartition(".")
            owner = gm.get_submodule(path)
            owner._parameters.pop(name, None)
            owner._buffers.pop(name, None)
            owner.register_buffer(name, tensors[node.target].detach())
    return gm


def rmse_ratio(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """rmse(actual - expected) / rmse(expected)."""
    return float((actual - expected).double().norm() / expected.double().norm())


def inputs_for(
    gm: torch.fx.GraphModule, batch: int, length: int, vocab: int = 131, seed: int = 0
) -> dict[str, torch.Tensor]:
    """Random inputs by the names of the graph's placeholders."""
    ids = torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))
    values = {
        "input_ids": ids,
        "position_ids": torch.arange(length).expand(batch, length).contiguous(),
        "rope_lengths": torch.full((batch, length), length),
    }
    return {n.target: values[n.target] for n in gm.graph.nodes if n.op == "placeholder"}


def all_types() -> list[str]:
    """Every type of transformers' causal LM mapping."""
    return list(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
