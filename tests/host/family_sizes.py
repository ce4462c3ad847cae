"""Small settings for the networks of every family, named as the host reads them from a file."""

from __future__ import annotations

from typing import Any

import torch

UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [1],
    "channel_mult": [1], "transformer_depth": [1], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1], "context_dim": 24, "use_spatial_transformer": True, "legacy": False,
    "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False, "adm_in_channels": None,
}  # fmt: skip
SD15 = UNET | {"use_linear_in_transformer": False}
UNCLIP = UNET | {
    "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential", "adm_in_channels": 1536,
}  # fmt: skip
SDXL: dict[str, Any] = UNET | {
    "model_channels": 64, "use_linear_in_transformer": True, "num_classes": "sequential",
    "adm_in_channels": 16 + 6 * 256,  # the pooled caption, and six sizes of the picture
}  # fmt: skip
SD3: dict[str, Any] = {
    "in_channels": 16, "patch_size": 2, "depth": 1, "input_size": None, "adm_in_channels": 16,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": 24, "out_features": 64}},
    "pos_embed_max_size": 16, "pos_embed_scaling_factor": None, "num_patches": 256, "qk_norm": "rms",
    "x_block_self_attn_layers": [],
}  # fmt: skip
FLUX: dict[str, Any] = {
    "hidden_size": 64, "num_heads": 2, "axes_dim": [8, 12, 12], "context_in_dim": 24, "depth": 1,
    "depth_single_blocks": 1, "theta": 10000, "mlp_ratio": 4.0, "qkv_bias": True, "txt_ids_dims": [],
}  # fmt: skip
LUMINA: dict[str, Any] = {
    "image_model": "lumina2", "patch_size": 2, "in_channels": 16, "dim": 64, "cap_feat_dim": 24, "n_layers": 1,
    "n_refiner_layers": 1, "qk_norm": True, "n_heads": 2, "axes_dims": [8, 12, 12], "axes_lens": [300, 512, 512],
    "multiple_of": 32, "ffn_dim_multiplier": 1.0,
}  # fmt: skip
COSMOS: dict[str, Any] = {
    "max_img_h": 64, "max_img_w": 64, "max_frames": 8, "in_channels": 16, "out_channels": 16, "patch_spatial": 2,
    "patch_temporal": 1, "model_channels": 64, "concat_padding_mask": True, "crossattn_emb_channels": 24,
    "pos_emb_cls": "rope3d", "pos_emb_learnable": True, "pos_emb_interpolation": "crop", "min_fps": 1, "max_fps": 30,
    "use_adaln_lora": True, "adaln_lora_dim": 8, "num_blocks": 1, "num_heads": 2, "extra_per_block_abs_pos_emb": False,
    "rope_h_extrapolation_ratio": 4.0, "rope_w_extrapolation_ratio": 4.0, "rope_t_extrapolation_ratio": 1.0,
    "extra_h_extrapolation_ratio": 1.0, "extra_w_extrapolation_ratio": 1.0, "extra_t_extrapolation_ratio": 1.0,
    "rope_enable_fps_modulation": False,
}  # fmt: skip
WAN: dict[str, Any] = {
    "image_model": "wan2.1", "model_type": "t2v", "dim": 64, "num_heads": 2, "ffn_dim": 128, "num_layers": 1,
    "patch_size": (1, 2, 2), "freq_dim": 64, "text_dim": 24, "window_size": (-1, -1), "qk_norm": True,
    "cross_attn_norm": True, "eps": 1e-6,
}  # fmt: skip
HIDREAM: dict[str, Any] = {
    "image_model": "hidream", "attention_head_dim": 32, "axes_dims_rope": [16, 8, 8], "caption_channels": [24, 20],
    "max_resolution": [16, 16], "in_channels": 16, "llama_layers": [0, 1], "num_attention_heads": 2,
    "num_routed_experts": 4, "num_activated_experts": 2, "num_layers": 1, "num_single_layers": 1, "out_channels": 16,
    "patch_size": 2, "text_emb_dim": 16,
}  # fmt: skip
CASCADE: dict[str, Any] = {
    "stable_cascade_stage": "c", "c_clip_text": 24, "c_clip_text_pooled": 16, "c_hidden": [64, 64], "nhead": [2, 2],
    "blocks": [[1, 1], [1, 1]], "c_r": 16, "c_cond": 32,
}  # fmt: skip
CASCADE_B: dict[str, Any] = {
    "stable_cascade_stage": "b", "c_clip": 16, "c_hidden": [64, 64], "nhead": [2, 2], "blocks": [[1, 1], [1, 1]],
    "c_r": 16, "c_cond": 32, "level_config": ["CT", "CTA"], "block_repeat": [[1, 1], [2, 1]],
}  # fmt: skip
PIXART: dict[str, Any] = {
    "image_model": "pixart_alpha", "patch_size": 2, "in_channels": 4, "hidden_size": 72, "depth": 1, "num_heads": 2,
    "caption_channels": 24, "model_max_length": 7, "micro_condition": True,
}  # fmt: skip
PIXART_SIGMA = PIXART | {
    "image_model": "pixart_sigma", "micro_condition": False, "input_size": 128, "pe_interpolation": 2,
}  # fmt: skip
AURAFLOW: dict[str, Any] = {
    "max_seq": 64, "cond_seq_dim": 24, "n_double_layers": 1, "n_layers": 2, "dim": 64, "n_heads": 2,
    "global_conddim": 64,
}  # fmt: skip
HUNYUAN_DIT: dict[str, Any] = {
    "image_model": "hydit", "depth": 2, "hidden_size": 64, "num_heads": 2, "text_states_dim": 24,
    "text_states_dim_t5": 32, "text_len": 7, "text_len_t5": 5,
}  # fmt: skip
HUNYUAN_IMAGE: dict[str, Any] = {
    "image_model": "hunyuan_video", "in_channels": 64, "out_channels": 64, "patch_size": [1, 1], "axes_dim": [16, 16],
    "vec_in_dim": None, "context_in_dim": 24, "hidden_size": 64, "mlp_ratio": 4.0, "num_heads": 2, "depth": 1,
    "depth_single_blocks": 1, "theta": 256, "qkv_bias": True, "guidance_embed": False, "byt5": False,
    "meanflow": False, "use_cond_type_embedding": False, "vision_in_dim": None, "meanflow_sum": False,
}  # fmt: skip
HUNYUAN_VIDEO = HUNYUAN_IMAGE | {
    "in_channels": 16, "out_channels": 16, "patch_size": [1, 2, 2], "axes_dim": [8, 12, 12], "vec_in_dim": 16,
    "guidance_embed": True,
}  # fmt: skip
HUNYUAN_VIDEO_15 = HUNYUAN_IMAGE | {
    "in_channels": 65, "out_channels": 32, "patch_size": [1, 1, 1], "axes_dim": [8, 12, 12], "vision_in_dim": 12,
    "use_cond_type_embedding": True, "meanflow_sum": True,
}  # fmt: skip
KANDINSKY: dict[str, Any] = {
    "image_model": "kandinsky5", "model_dim": 64, "ff_dim": 128, "time_dim": 32, "in_text_dim": 24, "in_text_dim2": 16,
    "axes_dims": (8, 12, 12), "num_text_blocks": 1, "num_visual_blocks": 1, "visual_embed_dim": 64,
    "rope_scale_factor": (1.0, 1.0, 1.0),
}  # fmt: skip
OMNIGEN: dict[str, Any] = {
    "image_model": "omnigen2", "hidden_size": 64, "num_layers": 1, "num_refiner_layers": 1, "num_attention_heads": 2,
    "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": (8, 12, 12), "text_feat_dim": 24, "timestep_scale": 1000.0,
}  # fmt: skip
BOOGU: dict[str, Any] = {
    "image_model": "boogu", "hidden_size": 64, "num_layers": 1, "num_double_stream_layers": 1, "num_refiner_layers": 1,
    "num_attention_heads": 2, "num_kv_heads": 1, "multiple_of": 32, "axes_dim_rope": (8, 12, 12),
    "instruction_feat_dim": 24,
}  # fmt: skip
ERNIE: dict[str, Any] = {
    "image_model": "ernie", "hidden_size": 64, "num_attention_heads": 2, "num_layers": 1, "ffn_hidden_size": 96,
    "text_in_dim": 24, "rope_axes_dim": (8, 12, 12),
}  # fmt: skip
FLUX_1 = FLUX | {
    "image_model": "flux", "guidance_embed": True, "in_channels": 16, "out_channels": 16, "patch_size": 2,
    "vec_in_dim": 16,
}  # fmt: skip
LONGCAT = FLUX_1 | {"guidance_embed": False, "vec_in_dim": None, "txt_ids_dims": [1, 2]}
CHROMA = FLUX | {
    "image_model": "chroma", "in_channels": 64, "out_channels": 64, "patch_size": 2, "vec_in_dim": 16, "in_dim": 64,
    "out_dim": 64, "hidden_dim": 32, "n_layers": 1,
}  # fmt: skip
RADIANCE = CHROMA | {
    "image_model": "chroma_radiance", "in_channels": 3, "out_channels": 3, "patch_size": 8, "nerf_hidden_size": 16,
    "nerf_mlp_ratio": 2, "nerf_depth": 1, "nerf_max_freqs": 2, "nerf_tile_size": 8, "nerf_final_head_type": "conv",
    "nerf_embedder_dtype": torch.float32, "use_x0": True, "use_sequential_txt_ids": True,
}  # fmt: skip
Z_IMAGE = LUMINA | {
    "dim": 256, "n_heads": 8, "n_kv_heads": 8, "rope_theta": 256.0, "z_image_modulation": True, "time_scale": 1000.0,
    "pad_tokens_multiple": 32,
}  # fmt: skip
Z_IMAGE_PIXEL = Z_IMAGE | {
    "image_model": "zimage_pixel", "patch_size": 4, "in_channels": 3, "decoder_in_channels": 48,
    "decoder_hidden_size": 32, "decoder_num_res_blocks": 1, "decoder_max_freqs": 2, "use_x0": True,
}  # fmt: skip
PIXELDIT: dict[str, Any] = {
    "image_model": "pixeldit_t2i", "num_groups": 2, "hidden_size": 64, "pixel_hidden_size": 8,
    "pixel_attn_hidden_size": 32, "pixel_num_groups": 2, "patch_depth": 1, "pixel_depth": 1, "patch_size": 8,
    "txt_embed_dim": 24, "txt_max_length": 7,
}  # fmt: skip
HIDREAM_O1: dict[str, Any] = {
    "image_model": "hidream_o1",
    "text_config_overrides": {
        "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 32, "rope_dims": [6, 5, 5],
    },
    "vision_config_overrides": {
        "hidden_size": 32, "num_heads": 2, "intermediate_size": 48, "depth": 1, "num_position_embeddings": 16,
    },
}  # fmt: skip
MAGE: dict[str, Any] = {
    "image_model": "mage_flow", "in_channels": 128, "num_layers": 1, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
JOY: dict[str, Any] = {
    "image_model": "joyimage", "hidden_size": 64, "num_attention_heads": 2, "text_dim": 24, "num_layers": 1,
    "rope_dim_list": [8, 12, 12],
}  # fmt: skip
IDEOGRAM: dict[str, Any] = {
    "image_model": "ideogram4", "in_channels": 128, "num_layers": 2, "num_attention_heads": 2,
    "attention_head_dim": 32, "intermediate_size": 96, "adaln_dim": 16, "llm_features_dim": 24,
    "mrope_section": [6, 5, 5],
}  # fmt: skip
KREA: dict[str, Any] = {
    "image_model": "krea2", "features": 64, "tdim": 32, "txtdim": 12, "heads": 2, "kvheads": 1, "layers": 1,
    "txtlayers": 2, "txtheads": 2, "txtkvheads": 2,
}  # fmt: skip
LENS: dict[str, Any] = {
    "image_model": "lens", "num_layers": 1, "attention_head_dim": 32, "num_attention_heads": 2, "enc_hidden_dim": 12,
    "axes_dims_rope": (8, 12, 12), "selected_layer_index": (0, 1),
}  # fmt: skip
COSMOS_1: dict[str, Any] = {
    "image_model": "cosmos", "max_img_h": 64, "max_img_w": 64, "max_frames": 8, "in_channels": 16, "out_channels": 16,
    "patch_spatial": 2, "patch_temporal": 1, "model_channels": 64, "block_config": "FA-CA-MLP",
    "concat_padding_mask": True, "pos_emb_cls": "rope3d", "block_x_format": "THWBD", "affline_emb_norm": True,
    "use_adaln_lora": True, "adaln_lora_dim": 8, "num_blocks": 2, "num_heads": 2, "crossattn_emb_channels": 24,
    "extra_per_block_abs_pos_emb": True, "extra_per_block_abs_pos_emb_type": "learnable",
}  # fmt: skip
MOCHI: dict[str, Any] = {
    "image_model": "mochi_preview", "depth": 2, "patch_size": 2, "num_heads": 2, "hidden_size_x": 64,
    "hidden_size_y": 32, "mlp_ratio_x": 192.0, "mlp_ratio_y": 4.0, "learn_sigma": False, "in_channels": 12,
    "qk_norm": True, "qkv_bias": False, "out_bias": True, "attn_drop": 0.0, "patch_embed_bias": True,
    "posenc_preserve_area": True, "timestep_mlp_bias": True, "attend_to_padding": False, "timestep_scale": 1000.0,
    "use_t5": True, "t5_feat_dim": 24, "t5_token_length": 7, "rope_theta": 10000.0,
}  # fmt: skip
LTXV: dict[str, Any] = {
    "image_model": "ltxv", "in_channels": 128, "cross_attention_dim": 64, "attention_head_dim": 32,
    "num_attention_heads": 2, "caption_channels": 24, "num_layers": 1,
}  # fmt: skip
COGVIDEO: dict[str, Any] = {
    "image_model": "cogvideox", "num_attention_heads": 2, "attention_head_dim": 64, "time_embed_dim": 32,
    "text_embed_dim": 24, "num_layers": 2, "use_rotary_positional_embeddings": True, "max_text_seq_length": 7,
}  # fmt: skip
QWEN: dict[str, Any] = {
    "image_model": "qwen_image", "in_channels": 64, "num_layers": 1, "attention_head_dim": 32,
    "num_attention_heads": 2, "joint_attention_dim": 24, "axes_dims_rope": (8, 12, 12),
}  # fmt: skip
FLUX_2 = FLUX | {
    "image_model": "flux2", "guidance_embed": True, "in_channels": 128, "out_channels": 128, "patch_size": 1,
    "vec_in_dim": None, "axes_dim": [8, 8, 8, 8], "mlp_ratio": 3.0, "theta": 2000, "global_modulation": True,
    "mlp_silu_act": True, "qkv_bias": False, "ops_bias": False, "default_ref_method": "index",
    "ref_index_scale": 10.0, "txt_ids_dims": [3],
}  # fmt: skip
