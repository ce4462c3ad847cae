"""The layers that each preset selects, in every model family that ComfyUI knows."""

import re

import pytest

from tests.support.families import FAMILIES, build

# Suffixes of the layer names of each preset: attention and feed-forward.
UNET = r"attn[12]\.to_(q|k|v|out\.0)", r"ff\.net\.(0\.proj|2)"
SD3 = r"attn2?\.(qkv|proj)", r"mlp\.fc[12]"
LUMINA = r"attention\.(qkv|out)", r"feed_forward\.w[123]"
# Flux's single blocks have attention and feed-forward in the same two layers.
FLUX = r"(img|txt)_attn\.(qkv|proj)|single_blocks\.\d+\.linear[12]", r"(img|txt)_mlp\.[02]"
HUNYUAN = rf"{FLUX[0]}|self_attn\.(qkv|proj)", rf"{FLUX[1]}|blocks\.\d+\.mlp\.[02]"
HUNYUAN_DIT = r"attn1\.(Wqkv|out_proj)|attn2\.(q_proj|kv_proj|out_proj)", r"mlp\.fc[12]"
QWEN = r"attn\.(to_[qkv]|add_[qkv]_proj|to_out\.0|to_add_out)", r"(img|txt)_mlp\.net\.(0\.proj|2)"
WAN = r"(self|cross)_attn\.[qkvo]", r"ffn\.[02]"
PIXART = r"attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear)", r"mlp\.fc[12]"
KANDINSKY = r"(self|cross)_attention\.(to_(query|key|value)|out_layer)", r"feed_forward\.(in|out)_layer"
OMNIGEN = r"attn\.to_(q|k|v|out\.0)", r"feed_forward\.linear_[123]"
COSMOS = r"(self|cross)_attn\.(q|k|v|output)_proj", r"mlp\.layer[12]"
PRESETS = {
    "SD1.5": UNET,
    "SD2.1": UNET,
    "SDXL": UNET,
    "KOALA": UNET,
    "SDXL inpainting": UNET,
    "Stable Cascade C": (r"attention\.attn\.(to_[qkv]|out_proj)", r"channelwise\.[04]"),
    "SD3": SD3,
    "SD3.5": SD3,
    "PixArt Alpha": PIXART,
    "PixArt Sigma": PIXART,
    "AuraFlow": (r"attn\.w[12][qkvo]", r"mlp[CX]?\.c_(fc1|fc2|proj)"),
    "HunyuanDiT": HUNYUAN_DIT,
    "HunyuanDiT 1.0": HUNYUAN_DIT,
    "Flux.1": FLUX,
    "Flux.1 schnell": FLUX,
    "Flux.1 Fill": FLUX,
    "Flux.2": FLUX,
    "Chroma": FLUX,
    "LongCat": FLUX,
    "Chroma Radiance": FLUX,
    "Ovis": (FLUX[0], r"(img|txt)_mlp\.(gate|up|down)_proj"),
    "Lumina 2": LUMINA,
    "NewBie": LUMINA,
    "Z-Image": LUMINA,
    "Z-Image pixel": (LUMINA[0], rf"{LUMINA[1]}|res_blocks\.\d+\.mlp\.[02]"),
    "Qwen-Image": QWEN,
    "Mage-Flow": QWEN,
    "JoyImage": (r"(img|txt)_attn_(qkv|proj)", QWEN[1]),
    "HiDream": (r"attn1\.to_(q|k|v|out)(_t)?", r"ff_[it]\.((shared_experts|experts\.\d+)\.)?w[123]"),
    "HiDream-O1": (r"self_attn\.[qkvo]_proj", r"mlp\.(gate|up|down)_proj"),
    "Hunyuan Image 2.1": HUNYUAN,
    "Hunyuan Video": HUNYUAN,
    "Hunyuan Video 1.5": HUNYUAN,
    "Kandinsky 5 Image": KANDINSKY,
    "Kandinsky 5": KANDINSKY,
    "ERNIE-Image": (r"self_attention\.to_(q|k|v|out\.0)", r"mlp\.(gate_proj|up_proj|linear_fc2)"),
    "OmniGen 2": OMNIGEN,
    "Boogu": (rf"{OMNIGEN[0]}|processor\.(img|instruct)_(to_[qkv]|out)", OMNIGEN[1]),
    "Ideogram 4": (r"attention\.(qkv|o)", LUMINA[1]),
    "Krea 2": (r"attn\.(w[qkvo]|gate)", r"mlp\.(gate|up|down)"),
    "Lens": (r"attn\.((img|txt)_qkv|to_out\.0|to_add_out)", r"(img|txt)_mlp\.w[123]"),
    "Wan 2.1": WAN,
    "Wan 2.2 5B": WAN,
    "Cosmos Predict 2": COSMOS,
    "Anima": COSMOS,
    "Cosmos 1": (r"attn\.to_(q|k|v|out)\.0", r"block\.layer[12]"),
    "Mochi": (r"attn\.(qkv|proj)_[xy]", r"mlp_[xy]\.w[12]"),
    "CogVideoX": (r"blocks\.\d+\.([qkv]|attn_out)", r"ff_(proj|out)"),
}
# Layers with similar names outside the blocks: text, timestep and size embedders.
ELSEWHERE = re.compile(r"embedder|adapter|mlp_t5")


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_selects_the_expected_layers(pack, name):
    network, (attention, feed_forward) = build(FAMILIES[name]).model.diffusion_model, PRESETS[name]
    find_layers = pack.aclora_core.lora.targets.preset_layers
    blocks = [layer for layer in find_layers(network, "all") if not ELSEWHERE.search(layer)]
    chosen = {layer for layer in blocks if re.search(rf"(^|[._])({attention})$", layer)}
    assert chosen and set(find_layers(network, "attention")) == chosen
    chosen |= {layer for layer in blocks if re.search(rf"(^|[._])({feed_forward})$", layer)}
    assert set(find_layers(network, "attention and feed-forward")) == chosen
