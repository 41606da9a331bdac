"""One thread for all, and a small random CLIPSeg with its own tokenizer, saved as a user's local checkpoint would be."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789-,."


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Small work, which more threads would slow down."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def clipseg_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPSegConfig, CLIPSegForImageSegmentation, CLIPSegProcessor, CLIPTokenizer, ViTImageProcessor

    folder = tmp_path_factory.mktemp("clipseg")
    letters = [*LETTERS, *(letter + "</w>" for letter in LETTERS), "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({letter: index for index, letter in enumerate(letters)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=24)
    images = ViTImageProcessor(size={"height": 64, "width": 64}, image_mean=[0.485, 0.456, 0.406], image_std=[0.229, 0.224, 0.225], resample=2)
    CLIPSegProcessor(images, tokenizer).save_pretrained(folder)
    torch.manual_seed(7)
    width = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_hidden_layers": 3}
    config = CLIPSegConfig(
        text_config={**width, "vocab_size": len(letters), "max_position_embeddings": 24, "bos_token_id": len(letters) - 2,
                     "eos_token_id": len(letters) - 1, "pad_token_id": len(letters) - 1},
        vision_config={**width, "image_size": 64, "patch_size": 16},
        projection_dim=32, reduce_dim=16, extract_layers=[0, 1, 2], decoder_num_attention_heads=4, decoder_intermediate_size=32,
    )
    model = CLIPSegForImageSegmentation(config).eval()
    with torch.no_grad():  # freshly initialised weights are so small that every prompt gives the same map
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    model.save_pretrained(folder)
    return folder
