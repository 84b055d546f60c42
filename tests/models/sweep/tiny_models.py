"""Tiny models of every architecture that transformers has for causal language models."""

from __future__ import annotations

import inspect
from typing import Any

import torch

# Names by which configs of transformers call the same sizes.
SIZES: dict[str, Any] = {
    # shape of the whole
    "vocab_size": 272,
    "hidden_size": 32,
    "d_model": 32,
    "n_embd": 32,
    "emb_dim": 32,
    "dim_model": 32,
    "embedding_size": 32,
    "num_hidden_layers": 4,
    "num_layers": 4,
    "n_layer": 4,
    "n_layers": 4,
    "decoder_layers": 4,
    "encoder_layers": 2,
    "num_decoder_layers": 4,
    "num_encoder_layers": 2,
    "num_blocks": 4,
    # attention
    "num_attention_heads": 4,
    "n_head": 4,
    "n_heads": 4,
    "num_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4,
    "num_encoder_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "d_kv": 8,
    "sliding_window": 6,
    "window_size": 6,
    "local_attention": 12,
    "attention_window_size": 6,
    "attention_chunk_size": 6,
    "sliding_window_size": 6,
    "swa_head_dim": 8,
    "swa_num_attention_heads": 4,
    "swa_num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "rotary_dim": 4,
    "max_position_embeddings": 128,
    "n_positions": 128,
    "n_ctx": 128,
    "max_seq_len": 128,
    "max_target_positions": 128,
    "max_source_positions": 32,
    # multilayer perceptrons
    "intermediate_size": 48,
    "n_inner": 48,
    "ffn_hidden_size": 48,
    "ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
    "dim_ff": 48,
    "dff": 48,
    "feed_forward_size": 48,
    "dense_intermediate_size": 48,
    "shared_intermediate_size": 48,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24,
    "moe_shared_expert_intermediate_size": 24,
    "expert_ffn_hidden_size": 24,
    "prefix_dense_intermediate_size": 48,
    "intermediate_size_mlp": 48,
    # mixtures of experts
    "num_experts": 4,
    "num_local_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "num_dense_layers": 1,
    "decoder_sparse_step": 1,
    # state spaces and convolutions
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_d_state": 8,
    "mamba_d_head": 16,
    "mamba_n_heads": 4,
    "mamba_n_groups": 1,
    "mamba_expand": 2,
    "mamba_d_ssm": 64,
    "mamba_chunk_size": 4,
    "chunk_size": 4,
    "state_size": 8,
    "ssm_state_size": 8,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "mamba_ngroups": 1,
    "n_mamba_heads": 2,
    "lru_width": 32,
    # sparse attention
    "index_head_dim": 16,
    "index_n_heads": 8,
    "index_topk": 24,
    # draws
    "initializer_range": 0.3,
    "init_std": 0.3,
    "pad_token_id": 2,
    "eos_token_id": 2,
    "bos_token_id": None,
    # predicted tokens beyond the next one belong to other losses
    "num_nextn_predict_layers": 0,
    "num_mtp_layers": 0,
}

# What else an architecture needs to be tiny, or to have all of its kinds of layers.
_LATENT = {"num_key_value_heads": 4}  # keys and values come out of one latent state
_DECODER = {"is_decoder": True}  # else attention looks at later tokens, too
_VISION: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
}
_QUARTER = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25}
_ROPE = {"rope_type": "default", "rope_theta": 10000.0}

# What else an architecture needs to be tiny, or to have all of its kinds of layers.
CHANGES: dict[str, dict[str, Any]] = {
    **{
        name: _LATENT
        for name in (
            "axk1",
            "axk2",
            "deepseek_v2",
            "deepseek_v3",
            "deepseek_v32",
            "dots3_note_text",
            "glm4_moe_lite",
            "glm_moe_dsa",
            "longcat_flash",
            "minicpm3",
            "sarvam_mla",
            "youtu",
        )
    },
    **{
        name: _DECODER
        for name in (
            "bert",
            "bert-generation",
            "big_bird",
            "camembert",
            "data2vec-text",
            "electra",
            "ernie",
            "megatron-bert",
            "rembert",
            "roberta",
            "roberta-prelayernorm",
            "roformer",
            "xlm-roberta",
            "xlm-roberta-xl",
        )
    },
    "bailing_hybrid": {
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "cohere_compass_text": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "rope_parameters": {"sliding_attention": _ROPE, "full_attention": _ROPE},
    },
    "cwm": {"bos_token_id": 0},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {
            "ffn_hidden_size": 48,
            "hidden_size": 32,
            "moe_num_experts": 4,
            "moe_top_k": 2,
        },
    },
    "dory": {"n_input_layers": 1, "n_output_layers": 1, "n_recurrent_layers": 2},
    "gemma3n_text": {
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 0,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "intermediate_size": [48] * 4,
    },
    "gemma4_text": {"vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "inkling2_loop_text": {"unpadded_vocab_size": 272},
    "inkling2_text": {"unpadded_vocab_size": 272},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {
        "num_key_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2,
    },
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2, "block_multiple_of": 16},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp"],
        "n_groups": 1,
    },
    "zamba": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "mamba_dt_rank": 2,
        "num_key_value_heads": 4,
    },
    "zamba2": {
        "layers_block_type": ["linear_attention", "hybrid", "linear_attention", "hybrid"],
        "mamba_d_state": 8,
        "n_mamba_heads": 4,
        "num_key_value_heads": 4,
        "adapter_rank": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
    "reformer": {
        "is_decoder": True,
        "attention_head_size": 8,
        "axial_pos_embds_dim": (16, 16),
        "axial_pos_shape": (8, 16),
        "local_attn_chunk_length": 8,
        "lsh_attn_chunk_length": 8,
    },
    "modernbert-decoder": {
        "bos_token_id": 0,
        "layer_types": ["full_attention", "sliding_attention"] * 2,
    },
    "xmod": {"is_decoder": True, "languages": ("en_XX",), "default_language": "en_XX"},
    "roc_bert": {
        "is_decoder": True,
        "enable_pronunciation": True,
        "pronunciation_vocab_size": 272,
        "pronunciation_embed_dim": 8,
        "shape_vocab_size": 272,
        "shape_embed_dim": 8,
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * 2,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
        "indexer_head_dim": 8,
        "indexer_kv_heads": 1,
        "indexer_n_heads": 2,
        "ple_embed_dim": 32,
        "hc_lowrank": 8,
        "ngram_vocab_size_base": 1000,
        "make_ngram_vocab_size_divisible_by": 8,
        "output_gate_type": "silu",
    },
    **{
        name: {"encoder_layers": 4, "num_encoder_layers": 4}
        for name in (
            "bart",
            "bigbird_pegasus",
            "blenderbot",
            "blenderbot-small",
            "marian",
            "mbart",
            "mvp",
            "pegasus",
            "plbart",
            "prophetnet",
        )
    },
    "dots3_note_text": {
        **_LATENT,
        "layer_types": ["indexed_attention", "sliding_attention"] * 2,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 16,
        "swa_kv_lora_rank": 16,
        "swa_head_dim": 16,
        "qk_rope_head_dim": 8,
        "swa_qk_nope_head_dim": 8,
        "swa_v_head_dim": 8,
    },
    "emu3": {"text_config": {"bos_token_id": 0}},
    "mllama": {"text_config": {"bos_token_id": 0, "cross_attention_layers": [1]}},
    "fuyu": {"text_config": {"model_type": "persimmon"}},
    "gemma3": {
        "vision_config": {**_VISION, "image_size": 16, "patch_size": 4},
        "mm_tokens_per_image": 4,
    },
    "gemma4": {
        "text_config": {"vocab_size_per_layer_input": 272, "hidden_size_per_layer_input": 8},
        "vision_config": {**_VISION, "position_embedding_size": 16},
        "audio_config": None,
    },
    "gemma4_unified": {
        "vision_config": {
            "mm_embed_dim": 16,
            "output_proj_dims": 16,
            "mm_posemb_size": 16,
            "patch_size": 2,
        },
        "audio_config": {"audio_embed_dim": 16},
    },
    "gemma4_assistant": {
        "text_config": {
            "model_type": "gemma4_text",
            "hidden_size_per_layer_input": 0,
            "vocab_size_per_layer_input": 0,
            "num_kv_shared_layers": 4,
        },
        "backbone_hidden_size": 32,
    },
    "gemma4_unified_assistant": {
        "text_config": {"model_type": "gemma4_unified_text"},
        "backbone_hidden_size": 32,
    },
    "got_ocr2": {
        "text_config": {"model_type": "qwen2"},
        "vision_config": {
            **_VISION,
            "output_channels": 8,
            "mlp_dim": 16,
            "image_size": 32,
            "global_attn_indexes": [0],
        },
    },
    "moss_transcribe_diarize": {
        "text_config": {"model_type": "qwen3"},
        "audio_config": {
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "intermediate_size": 16,
            "hidden_size": 16,
            "max_source_positions": 16,
        },
    },
    "phi4_multimodal": {
        "vision_config": {**_VISION, "num_hidden_layers": 2, "image_size": 28, "crop_size": 28},
        "audio_config": {
            "hidden_size": 16,
            "intermediate_size": 16,
            "num_blocks": 1,
            "num_attention_heads": 2,
            "ext_pw_out_channel": 16,
            "depthwise_separable_out_channel": 16,
            "nemo_conv_channels": 16,
        },
    },
    "xlstm": {"hidden_size": 128, "num_heads": 4, "chunk_size": 4},
    "hrm_text": {"initializer_range": 0.2},
    "blt": {"encoder_hash_byte_group_vocab": 64},
    "falcon:alibi": {"alibi": True, "new_decoder_architecture": False},
    "falcon:new": {"new_decoder_architecture": True, "num_kv_heads": 2},
    "bert:encoder": {},
    "qwen2:window": {"use_sliding_window": True, "max_window_layers": 2},
    **{
        f"{name}:whole": {"sliding_window": None}
        for name in ("mistral", "mixtral", "phi3", "phimoe", "starcoder2")
    },
    "llama:dynamic": {
        "rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0},
        "max_position_embeddings": 8,
    },
    "gemma4_text:moe": {
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 0,
        "enable_moe_block": True,
        "num_experts": 4,
        "top_k_experts": 2,
        "moe_intermediate_size": 24,
        "attention_k_eq_v": True,
    },
    "gemma4_text:shared": {
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "gemma3n_text:shared": {
        "vocab_size_per_layer_input": 272,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "intermediate_size": [48] * 4,
    },
}
CHANGES["qwen4_exp"] = {"text_config": CHANGES["qwen4_exp_text"]}
CHANGES["dots3_note"] = {"text_config": CHANGES["dots3_note_text"]}


# What cannot be built here, and why.
NOT_BUILT: dict[str, str] = {
    "dots3_note": "its text config names layers by number, up to 41",
    "gemma3n": "its picture encoder is a package that is not installed (timm)",
    "musicgen": "reads and writes audio codes, not text",
    "musicgen_melody": "reads and writes audio codes, not text",
}


def every_name() -> list[str]:
    """All model types of transformers for causal language models, and the variants."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return [*MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, *(name for name in CHANGES if ":" in name)]


def tiny_config(name: str) -> Any:
    """A config of four layers, as far as its class has names for its sizes.

    Args:
        name: A model type of transformers, or one of the variants in `CHANGES`.
    """
    from transformers import CONFIG_MAPPING

    kind = CONFIG_MAPPING[name.partition(":")[0]]
    return kind(**_merged(_options(kind), CHANGES.get(name, {})))


def _options(kind: Any) -> dict[str, Any]:
    names = set(inspect.signature(kind.__init__).parameters)
    options = {name: value for name, value in SIZES.items() if name in names}
    for name, part in getattr(kind, "sub_configs", {}).items():
        options[name] = {} if part.__name__ == "AutoConfig" else _options(part)
    return options


def _merged(options: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """Options with changes over them, also inside the configs of a model's parts."""
    from transformers import CONFIG_MAPPING

    options = {**options}
    for name, value in changes.items():
        former = options.get(name)
        if not isinstance(former, dict) or not isinstance(value, dict):
            options[name] = value
            continue
        if "model_type" in value:
            former = {**_options(CONFIG_MAPPING[value["model_type"]])}
        options[name] = {**former, **value}
    return options


def tiny_model(name: str, seed: int = 0) -> Any:
    """A model with weights so large that a fault shows, in eval mode."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(tiny_config(name)).eval()
    stir_(model)
    return model


@torch.no_grad()
def stir_(model: Any) -> None:
    """Give constant parameters and faint matrices values that matter."""
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.numel() < 2 or not parameter.is_floating_point():
            continue
        spread = float(parameter.float().std())
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.dim() > 1 and spread < 0.15:
            parameter += (0.25 * noise).to(parameter.dtype)
        elif spread < 1e-3:
            parameter += (0.1 * noise).to(parameter.dtype)
