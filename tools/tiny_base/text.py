"""The text encoder of the tiny base: a small CLIP tokenizer and a small CLIP text model, trained with the denoiser.

The tokenizer is written in the files that CLIP tokenizers read (vocab.json, merges.txt): byte-pair merges learned on
the captions, so that a frequent word is one token, and any other word is split.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import Tensor

LENGTH = 24  # tokens of a prompt; ComfyUI splits longer prompts
START, END = "<|startoftext|>", "<|endoftext|>"


def learn_vocabulary(captions: list[str], size: int, folder: Path) -> None:
    """Learn byte-pair merges on the captions and write a CLIP tokenizer's files into folder."""
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(words, behavior="removed", invert=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=size, min_frequency=2, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(captions, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = list(alphabet) + [letter + "</w>" for letter in alphabet]
    merges = [tuple(pair) for pair in model["merges"]]
    tokens += [token for token in ("".join(pair) for pair in merges) if token not in set(tokens)]
    tokens += [START, END]
    folder.mkdir(parents=True, exist_ok=True)
    vocabulary = {token: number for number, token in enumerate(dict.fromkeys(tokens))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), encoding="utf-8")
    lines = ["#version: 0.2"] + [" ".join(pair) for pair in merges]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {
        "tokenizer_class": "CLIPTokenizer",
        "bos_token": START,
        "eos_token": END,
        "pad_token": END,
        "unk_token": END,
        "model_max_length": 8192,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")


def load_tokenizer(folder: Path):
    """Load the tokenizer from its files."""
    from transformers import CLIPTokenizer

    return CLIPTokenizer.from_pretrained(str(folder))


def tokenize(tokenizer, captions: list[str]) -> Tensor:
    """Return the token ids (n, LENGTH), int64: start, words, end, padded with the end token as in ComfyUI."""
    end = tokenizer.convert_tokens_to_ids(END)
    rows = tokenizer(captions)["input_ids"]
    return torch.tensor([(row[: LENGTH - 1] + [end] * LENGTH)[:LENGTH] if row[-1] == end else row for row in rows])


def text_config(vocabulary: int, width: int = 256, layers: int = 2) -> dict:
    """Return the config of ComfyUI's CLIP text model; it is written beside the weights."""
    return {
        "hidden_act": "gelu",
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "max_position_embeddings": LENGTH,
        "num_attention_heads": width // 64,
        "num_hidden_layers": layers,
        "eos_token_id": vocabulary - 1,
        "vocab_size": vocabulary,
    }


def _layer_forward(layer: torch.nn.Module, x: Tensor, mask: Tensor | None, attention) -> Tensor:
    # ComfyUI's layer adds in place, which autograd does not support here; this adds out of place.
    x = x + layer.self_attn(layer.layer_norm1(x), mask, attention)
    return x + layer.mlp(layer.layer_norm2(x))


def build(config: dict) -> torch.nn.Module:
    """Return ComfyUI's CLIP text model with new weights and the config's vocabulary size, trainable."""
    import comfy.clip_model
    import comfy.ops

    operations = comfy.ops.disable_weight_init
    model = comfy.clip_model.CLIPTextModel(config, torch.float32, "cpu", operations)
    model.set_input_embeddings(operations.Embedding(config["vocab_size"], config["hidden_size"], dtype=torch.float32))
    for module in model.modules():
        if isinstance(module, torch.nn.Linear):
            torch.nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.LayerNorm):
            torch.nn.init.ones_(module.weight)
            torch.nn.init.zeros_(module.bias)
        elif isinstance(module, torch.nn.Embedding):
            torch.nn.init.normal_(module.weight, std=0.02)
    for layer in model.text_model.encoder.layers:
        layer.forward = _layer_forward.__get__(layer)
    return model.requires_grad_(True)


def encode(model: torch.nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Encode tokens (n, LENGTH) to hidden states (n, LENGTH, width) and the projected pooled state (n, width)."""
    config_end = model.text_model.eos_token_id
    embeds = model.get_input_embeddings()(tokens)
    position = model.text_model.embeddings.position_embedding.weight
    x = embeds + position
    mask = torch.full((LENGTH, LENGTH), float("-inf"), device=x.device, dtype=x.dtype).triu_(1)
    for layer in model.text_model.encoder.layers:
        x = layer(x, mask, _attention)
    x = model.text_model.final_layer_norm(x)
    end = (tokens == config_end).int().argmax(dim=1)  # the first end token
    pooled = x[torch.arange(len(x), device=x.device), end]
    return x, model.text_projection(pooled)


def _attention(q: Tensor, k: Tensor, v: Tensor, heads: int, mask: Tensor | None) -> Tensor:
    def split(t: Tensor) -> Tensor:
        return t.unflatten(-1, (heads, -1)).transpose(1, 2)

    mask = mask.to(q.dtype) if mask is not None else None
    out = torch.nn.functional.scaled_dot_product_attention(split(q), split(k), split(v), attn_mask=mask)
    return out.transpose(1, 2).flatten(-2)
