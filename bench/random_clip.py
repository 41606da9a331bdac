"""CLIP models with random weights, saved as a user's checkpoint would be, for benches of localizers."""

from __future__ import annotations

import json
from pathlib import Path

import torch

_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-,."


def random_clip(folder: Path, *, width: int = 768, depth: int = 12, heads: int = 12, size: int = 224, patch: int = 16, text_width: int = 512, text_depth: int = 12,
                positions: int = 77, seed: int = 0) -> Path:
    """Write a `CLIPModel` of transformers with its processor; the defaults are those of OpenAI's ViT-B/16, but for the vocabulary, which is of letters.

    Returns:
        The folder.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor, CLIPTokenizer

    folder.mkdir(parents=True, exist_ok=True)
    letters = [*_LETTERS, *(letter + "</w>" for letter in _LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}), encoding="utf-8")
    (folder / "merges.txt").write_text("#version: 0.2\n", encoding="utf-8")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=positions)
    images = CLIPImageProcessor(size={"shortest_edge": size}, crop_size={"height": size, "width": size})
    CLIPProcessor(images, tokenizer).save_pretrained(folder)
    config = CLIPConfig(
        text_config={"hidden_size": text_width, "intermediate_size": 4 * text_width, "num_attention_heads": max(1, text_width // 64), "num_hidden_layers": text_depth,
                     "vocab_size": len(letters), "max_position_embeddings": positions, "bos_token_id": len(letters) - 2, "eos_token_id": len(letters) - 1,
                     "pad_token_id": len(letters) - 1},
        vision_config={"hidden_size": width, "intermediate_size": 4 * width, "num_attention_heads": heads, "num_hidden_layers": depth, "image_size": size, "patch_size": patch},
        projection_dim=min(512, width),
    )
    torch.manual_seed(seed)
    CLIPModel(config).save_pretrained(folder)
    return folder
