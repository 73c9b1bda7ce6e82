"""A tiny random model of every causal architecture that transformers has, built from its configuration's own fields."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

CONFIG_CLASSES: dict[str, Any] = {kind.model_type: kind for kind in MODEL_FOR_CAUSAL_LM_MAPPING}

_SIZES = {
    64: "vocab_size vocab_size_per_layer_input ngram_vocab_size",
    32: "hidden_size d_model n_embd dim embedding_size emb_dim dim_model lru_width d_inner intermediate_size ffn_dim "
    "d_ff dff dim_ff n_inner ffn_hidden_size encoder_ffn_dim decoder_ffn_dim intermediate_size_mlp feed_forward_size "
    "shared_intermediate_size moe_intermediate_size shared_expert_intermediate_size shared_experts_intermediate_size "
    "moe_shared_expert_intermediate_size expert_ffn_hidden_size dense_intermediate_size "
    "prefix_dense_intermediate_size",
    16: "index_head_dim q_lora_rank kv_lora_rank mamba_d_head mamba_head_dim",
    8: "head_dim v_head_dim qk_nope_head_dim qk_rope_head_dim swa_head_dim swa_v_head_dim global_head_dim rotary_dim "
    "attention_head_dim d_kv kv_channels o_lora_rank mamba_d_state state_size ssm_state_size linear_key_head_dim "
    "linear_value_head_dim",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads num_local_experts "
    "num_experts n_routed_experts moe_num_experts num_routed_experts mamba_n_heads mamba_num_heads "
    "linear_num_value_heads",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_key_value_heads mamba_expand "
    "num_experts_per_tok num_experts_per_token moe_topk moe_k moe_top_k top_k_experts experts_per_token "
    "linear_num_key_heads eos_token_id",
    1: "n_group topk_group n_groups mamba_n_groups bos_token_id",
    0: "pad_token_id",
    0.25: "initializer_range init_std",
}
_WINDOWS = (
    "sliding_window sliding_window_size attention_chunk_size window_size local_attention attention_window_size "
    "attention_window keep_window_size index_topk floor_scale log_scaling_n_floor"
)
_LENGTHS = "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions model_max_length"

_ONE_KEY_PER_HEAD = (
    "axk1 axk2 bailing_hybrid deepseek_v2 deepseek_v3 deepseek_v32 dots1 dots3_note dots3_note_text glm4_moe_lite "
    "glm_moe_dsa kimi_linear longcat_flash minicpm3 youtu"
)
_OWN: dict[str, dict[str, Any]] = {
    "codegen": {"rotary_dim": 4},
    "gptj": {"rotary_dim": 4},
    "gemma3n": {"num_kv_shared_layers": 0},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "dots1": {"n_shared_experts": 1},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "llama4_text": {"layer_types": ["chunked_attention", "full_attention"], "no_rope_layers": [1, 0]},
    "mamba2": {"num_heads": 4, "head_dim": 16},
    "minimax_m3_vl_text": {"layer_types": ["full_attention", "minimax_m3_sparse"]},
    "zaya": {"num_experts_per_tok": 1},
    "roc_bert": dict.fromkeys(
        ("pronunciation_embed_dim", "pronunciation_vocab_size", "shape_embed_dim", "shape_vocab_size"), 8
    ),
}
"""What these ask for besides."""

UNBUILT = {
    "blt": "a hash table of 500,002 entries per n-gram that no field makes small",
    "cohere_compass_text": "wants rotary parameters for each kind of layer",
    "dbrx": "its nested attention configuration has no rope_theta in this transformers",
    "emu3": "its text configuration is not in the mapping",
    "falcon_h1": "its Mamba heads must match further sizes",
    "gemma4_assistant": "reads another model's states",
    "git": "has an image encoder",
    "lfm2_moe": "wants layer_types, for which it has no default",
    "mllama": "its text configuration is not in the mapping",
    "musicgen": "reads audio codes of several codebooks",
    "musicgen_melody": "reads audio codes of several codebooks",
    "phi4_multimodal": "has encoders of images and speech",
    "qwen4_exp": "wants an indexer ratio, for which it has no default",
    "qwen4_exp_text": "wants an indexer ratio, for which it has no default",
    "reformer": "its axial positions must match further sizes",
    "xmod": "wants a language",
    "zamba": "wants layer_types for its number of layers",
    "zamba2": "wants layer_types for its number of layers",
}
"""Architectures that are not built here, and why."""


def tiny(name: str, *, window: int, length: int) -> Any:
    """A model of at most six layers, one of each kind it has, with eager attention.

    Args:
        name: its `model_type`.
        window: for every number that says how far back a token sees, or from where on a scale grows.
        length: most tokens of a row.
    """
    kind = type(CONFIG_CLASSES[name]().get_text_config(decoder=True))
    known = kind().to_dict()
    wanted: dict[str, Any] = {key: size for size, keys in _SIZES.items() for key in keys.split()}
    wanted |= dict.fromkeys(_WINDOWS.split(), window) | dict.fromkeys(_LENGTHS.split(), length)
    wanted |= {"is_decoder": True, "use_sliding_window": True}
    settings = {key: value for key, value in wanted.items() if key in known or key == "is_decoder"}
    if name in _ONE_KEY_PER_HEAD.split():
        settings["num_key_value_heads"] = 4
    settings |= _OWN.get(name, {})
    if known.get("layer_types") and "layer_types" not in settings:
        layers = list(dict.fromkeys(known["layer_types"]))
        settings["layer_types"] = layers if len(layers) > 1 else layers * 2
    if "layer_types" in settings:
        settings["num_hidden_layers"] = len(settings["layer_types"])
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(kind(**settings), attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            # Sinks, gates and biases begin at a constant, which would hide what they do.
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    return model
