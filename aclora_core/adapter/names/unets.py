"""Names of the layers of Stable Diffusion's U-Nets and their CLIP text encoders."""

from __future__ import annotations

from .rule import COMFYUI_MODEL, COMFYUI_TEXT, KOHYA_MODEL, NameRule

_LEVELS = 4  # at most; a U-Net with fewer has no layers of these names

_RESNET = {
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_ATTENTION = {
    name: name
    for name in (
        "proj_in",
        "proj_out",
        *(f"transformer_blocks.*.{attention}.to_{part}" for attention in ("attn1", "attn2") for part in "qkv"),
        "transformer_blocks.*.attn1.to_out.0",
        "transformer_blocks.*.attn2.to_out.0",
        "transformer_blocks.*.ff.net.0.proj",
        "transformer_blocks.*.ff.net.2",
    )
}
_OUTSIDE = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.2": "conv_out",
}
_CLIP_LAYER = tuple(f"self_attn.{part}_proj" for part in ("q", "k", "v", "out")) + ("mlp.fc1", "mlp.fc2")


def unet_rules(res_blocks: int, deepest_attention: bool, kohya_like_diffusers: bool = False) -> tuple[NameRule, ...]:
    """Return the rules of a U-Net.

    Args:
        res_blocks: residual blocks at each resolution on the way down.
        deepest_attention: whether there is attention at the lowest resolution, besides that of the middle block.
        kohya_like_diffusers: whether kohya's names are diffusers' with underscores (SD1.5, SD2), or ComfyUI's (SDXL).
    """
    rules = []
    for name, diffusers in _unet_names(res_blocks, deepest_attention).items():
        kohya = (diffusers if kohya_like_diffusers else name).replace(".", "_")
        # ComfyUI reads the attention layers of a U-Net only as diffusers named them at first.
        attention = diffusers.replace(".to_out.0", ".to_out").replace(".to_", ".processor.to_")
        rules.append(NameRule(COMFYUI_MODEL + name, KOHYA_MODEL + kohya, (f"unet.{attention}",)))
    return tuple(rules)


def clip_rules(part: str, kohya_prefix: str, diffusers_prefix: str, projection: str = "") -> tuple[NameRule, ...]:
    """Return the rules of a CLIP text encoder.

    Args:
        part: its name in ComfyUI, such as "clip_l".
        kohya_prefix: such as "lora_te1_".
        diffusers_prefix: such as "text_encoder.".
        projection: kohya's name of its last layer, if ComfyUI reads one. It reads none of diffusers'.
    """
    rules = [NameRule(f"{COMFYUI_TEXT}{part}.transformer.text_projection", projection)] if projection else []
    for module in _CLIP_LAYER:
        name = f"text_model.encoder.layers.*.{module}"
        comfyui = f"{COMFYUI_TEXT}{part}.transformer.{name}"
        rules.append(NameRule(comfyui, kohya_prefix + name.replace(".", "_"), (diffusers_prefix + name,)))
    return tuple(rules)


def _unet_names(res_blocks: int, deepest_attention: bool) -> dict[str, str]:
    """Return ComfyUI's name -> diffusers'. ComfyUI numbers the blocks through, diffusers those of each resolution."""
    resnets = {"middle_block.0": "mid_block.resnets.0", "middle_block.2": "mid_block.resnets.1"}
    attentions = {"middle_block.1": "mid_block.attentions.0"}
    names = dict(_OUTSIDE)
    for level in range(_LEVELS):
        first_down, first_up = 1 + (res_blocks + 1) * level, (res_blocks + 1) * level
        for index in range(res_blocks):
            resnets[f"input_blocks.{first_down + index}.0"] = f"down_blocks.{level}.resnets.{index}"
            attentions[f"input_blocks.{first_down + index}.1"] = f"down_blocks.{level}.attentions.{index}"
        names[f"input_blocks.{first_down + res_blocks}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
        for index in range(res_blocks + 1):
            resnets[f"output_blocks.{first_up + index}.0"] = f"up_blocks.{level}.resnets.{index}"
            attentions[f"output_blocks.{first_up + index}.1"] = f"up_blocks.{level}.attentions.{index}"
        place = 2 if level > 0 or deepest_attention else 1  # behind the attention, if there is one
        names[f"output_blocks.{first_up + res_blocks}.{place}.conv"] = f"up_blocks.{level}.upsamplers.0.conv"
    for modules, blocks in ((_RESNET, resnets), (_ATTENTION, attentions)):
        for block, diffusers in blocks.items():
            names |= {f"{block}.{name}": f"{diffusers}.{theirs}" for name, theirs in modules.items()}
    return names
