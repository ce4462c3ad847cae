"""Names of the layers of transformer models: ComfyUI's, which are those of each model's release, and diffusers'."""

from __future__ import annotations

from .rule import COMFYUI_MODEL, NameRule, kohya_name

_PREFIX = "transformer."


def _rule(name: str, *diffusers: str, shares: tuple[int, ...] = (), swapped: bool = False) -> NameRule:
    comfyui = COMFYUI_MODEL + name
    theirs = tuple(_PREFIX + each for each in diffusers)
    return NameRule(comfyui, kohya_name(comfyui), theirs, shares or (1,) * len(theirs), swapped)


def _block(name: str, diffusers: str, modules: dict[str, str]) -> list[NameRule]:
    """Return the rules for the modules of a numbered block."""
    return [_rule(f"{name}.*.{module}", f"{diffusers}.*.{theirs}") for module, theirs in modules.items()]


def _fused(name: str, diffusers: str, *parts: str, shares: tuple[int, ...] = ()) -> NameRule:
    """Return the rule for one layer of ComfyUI that is several of diffusers'."""
    return _rule(name, *(f"{diffusers}.{part}" for part in parts), shares=shares)


def _same(*names: str) -> list[NameRule]:
    """Return the rules for layers that have the same name in diffusers."""
    return [_rule(name, name) for name in names]


def _mlp(name: str, diffusers: str) -> dict[str, str]:
    """Return linear layers 1 and 2 of a timestep or text embedding."""
    return {f"{name}.0": f"{diffusers}.linear_1", f"{name}.2": f"{diffusers}.linear_2"}


def _outside(names: dict[str, str]) -> list[NameRule]:
    return [_rule(name, diffusers) for name, diffusers in names.items()]


_QKV = ("to_q", "to_k", "to_v")
_ADDED_QKV = ("add_q_proj", "add_k_proj", "add_v_proj")

SD3 = (
    _fused("joint_blocks.*.x_block.attn.qkv", "transformer_blocks.*.attn", *_QKV),
    _fused("joint_blocks.*.x_block.attn2.qkv", "transformer_blocks.*.attn2", *_QKV),
    _fused("joint_blocks.*.context_block.attn.qkv", "transformer_blocks.*.attn", *_ADDED_QKV),
    _rule("joint_blocks.*.x_block.adaLN_modulation.1", "transformer_blocks.*.norm1.linear"),
    # The last block's modulation of the text gives a scale and a shift only.
    _rule("joint_blocks.*.context_block.adaLN_modulation.1", "transformer_blocks.*.norm1_context.linear", swapped=True),
    *_block(
        "joint_blocks",
        "transformer_blocks",
        {
            "x_block.attn.proj": "attn.to_out.0",
            "x_block.attn2.proj": "attn2.to_out.0",
            "x_block.mlp.fc1": "ff.net.0.proj",
            "x_block.mlp.fc2": "ff.net.2",
            "context_block.attn.proj": "attn.to_add_out",
            "context_block.mlp.fc1": "ff_context.net.0.proj",
            "context_block.mlp.fc2": "ff_context.net.2",
        },
    ),
    *_outside(
        {
            "context_embedder": "context_embedder",
            "x_embedder.proj": "pos_embed.proj",
            "final_layer.linear": "proj_out",
            **_mlp("t_embedder.mlp", "time_text_embed.timestep_embedder"),
            **_mlp("y_embedder.mlp", "time_text_embed.text_embedder"),
        }
    ),
    _rule("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
)

FLUX = (
    _fused("double_blocks.*.img_attn.qkv", "transformer_blocks.*.attn", *_QKV),
    _fused("double_blocks.*.txt_attn.qkv", "transformer_blocks.*.attn", *_ADDED_QKV),
    *_block(
        "double_blocks",
        "transformer_blocks",
        {
            "img_attn.proj": "attn.to_out.0",
            "img_mlp.0": "ff.net.0.proj",
            "img_mlp.2": "ff.net.2",
            "img_mod.lin": "norm1.linear",
            "txt_attn.proj": "attn.to_add_out",
            "txt_mlp.0": "ff_context.net.0.proj",
            "txt_mlp.2": "ff_context.net.2",
            "txt_mod.lin": "norm1_context.linear",
        },
    ),
    # The queries, keys and values, and beside them four times as many rows for the MLP.
    _rule(
        "single_blocks.*.linear1",
        *(f"single_transformer_blocks.*.{part}" for part in ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")),
        shares=(1, 1, 1, 4),
    ),
    *_block("single_blocks", "single_transformer_blocks", {"linear2": "proj_out", "modulation.lin": "norm.linear"}),
    *_outside({"img_in": "x_embedder", "txt_in": "context_embedder", "final_layer.linear": "proj_out"}),
    *(
        _rule(f"{name}.{layer}", f"time_text_embed.{diffusers}.{theirs}")
        for name, diffusers in {
            "time_in": "timestep_embedder",
            "vector_in": "text_embedder",
            "guidance_in": "guidance_embedder",
        }.items()
        for layer, theirs in {"in_layer": "linear_1", "out_layer": "linear_2"}.items()
    ),
    _rule("final_layer.adaLN_modulation.1", "norm_out.linear", swapped=True),
)

Z_IMAGE = (
    *(
        rule
        for blocks in ("layers", "context_refiner", "noise_refiner")
        for rule in (
            _fused(f"{blocks}.*.attention.qkv", f"{blocks}.*.attention", *_QKV),
            _rule(f"{blocks}.*.attention.out", f"{blocks}.*.attention.to_out.0"),
            *_same(*(f"{blocks}.*.feed_forward.{part}" for part in ("w1", "w2", "w3"))),
        )
    ),
    *_outside(
        {
            "final_layer.linear": "all_final_layer.2-1.linear",
            "final_layer.adaLN_modulation.1": "all_final_layer.2-1.adaLN_modulation.1",
            "x_embedder": "all_x_embedder.2-1",
        }
    ),
    *_same("layers.*.adaLN_modulation.0", "noise_refiner.*.adaLN_modulation.0"),
    *_same("cap_embedder.1", "t_embedder.mlp.0", "t_embedder.mlp.2"),
)

PIXART = (
    _fused("blocks.*.attn.qkv", "transformer_blocks.*.attn1", *_QKV),
    _fused("blocks.*.cross_attn.kv_linear", "transformer_blocks.*.attn2", "to_k", "to_v"),
    *_block(
        "blocks",
        "transformer_blocks",
        {
            "attn.proj": "attn1.to_out.0",
            "cross_attn.q_linear": "attn2.to_q",
            "cross_attn.proj": "attn2.to_out.0",
            "mlp.fc1": "ff.net.0.proj",
            "mlp.fc2": "ff.net.2",
        },
    ),
    *_outside(
        {
            "x_embedder.proj": "pos_embed.proj",
            "y_embedder.y_proj.fc1": "caption_projection.linear_1",
            "y_embedder.y_proj.fc2": "caption_projection.linear_2",
            "t_block.1": "adaln_single.linear",
            "final_layer.linear": "proj_out",
            **_mlp("t_embedder.mlp", "adaln_single.emb.timestep_embedder"),
            **_mlp("csize_embedder.mlp", "adaln_single.emb.resolution_embedder"),
            **_mlp("ar_embedder.mlp", "adaln_single.emb.aspect_ratio_embedder"),
        }
    ),
)

_AURAFLOW_MLP = {"c_fc1": "linear_1", "c_fc2": "linear_2", "c_proj": "out_projection"}
AURAFLOW = (
    *_block(
        "double_layers",
        "joint_transformer_blocks",
        {
            **{f"attn.w2{part}": f"attn.to_{part}" for part in "qkv"},
            "attn.w2o": "attn.to_out.0",
            **{f"attn.w1{part}": f"attn.add_{part}_proj" for part in "qkv"},
            "attn.w1o": "attn.to_add_out",
            **{f"mlpX.{name}": f"ff.{diffusers}" for name, diffusers in _AURAFLOW_MLP.items()},
            **{f"mlpC.{name}": f"ff_context.{diffusers}" for name, diffusers in _AURAFLOW_MLP.items()},
            "modX.1": "norm1.linear",
            "modC.1": "norm1_context.linear",
        },
    ),
    *_block(
        "single_layers",
        "single_transformer_blocks",
        {
            **{f"attn.w1{part}": f"attn.to_{part}" for part in "qkv"},
            "attn.w1o": "attn.to_out.0",
            **{f"mlp.{name}": f"ff.{diffusers}" for name, diffusers in _AURAFLOW_MLP.items()},
            "modCX.1": "norm1.linear",
        },
    ),
    *_outside(
        {
            "cond_seq_linear": "context_embedder",
            "init_x_linear": "pos_embed.proj",
            "final_linear": "proj_out",
            **_mlp("t_embedder.mlp", "time_step_proj"),
        }
    ),
    _rule("modF.1", "norm_out.linear", swapped=True),
)

_KREA_MODULES = {
    "attn.wq": "attn.to_q",
    "attn.wk": "attn.to_k",
    "attn.wv": "attn.to_v",
    "attn.gate": "attn.to_gate",
    "attn.wo": "attn.to_out.0",
    "mlp.gate": "ff.gate",
    "mlp.up": "ff.up",
    "mlp.down": "ff.down",
}
KREA_2 = (
    *_block("blocks", "transformer_blocks", _KREA_MODULES),
    *_block("txtfusion.layerwise_blocks", "text_fusion.layerwise_blocks", _KREA_MODULES),
    *_block("txtfusion.refiner_blocks", "text_fusion.refiner_blocks", _KREA_MODULES),
    *_outside(
        {
            "first": "img_in",
            "tmlp.0": "time_embed.linear_1",
            "tmlp.2": "time_embed.linear_2",
            "tproj.1": "time_mod_proj",
            "txtmlp.1": "txt_in.linear_1",
            "txtmlp.3": "txt_in.linear_2",
            "txtfusion.projector": "text_fusion.projector",
            "last.linear": "final_layer.linear",
        }
    ),
)
