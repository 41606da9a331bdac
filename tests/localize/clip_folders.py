"""Small CLIP-like models with random weights, saved to disk as a user's checkpoints would be."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = ["<pad>", "<unk>", *"a the of in both lungs lung left right brain tumour heart chest mri".split(), "<start>", "<end>"]
SIZE, PATCH, WIDTH, DEPTH, HEADS, POSITIONS = 48, 16, 32, 4, 4, 12
KINDS = ("clip", "siglip", "dual-clip", "dual-vit", "open-clip", "open-clip-timm", "open-clip-bert")


def make(kind: str, folder: Path) -> Path:
    """Write a checkpoint of a kind.

    Returns:
        The folder.
    """
    torch.manual_seed(5)
    folder.mkdir(parents=True, exist_ok=True)
    return _open_clip(kind, folder) if kind.startswith("open-clip") else _transformers(kind, folder)


def tokenizer() -> object:
    """One token per word, with a start and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    inner = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=[(word, WORDS.index(word)) for word in ("<start>", "<end>")])
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>", pad_token="<pad>", bos_token="<start>", eos_token="<end>", model_max_length=POSITIONS)


def louder(model: torch.nn.Module) -> torch.nn.Module:
    """Freshly initialised weights are so small that every prompt gives the same map."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4 if parameter.ndim > 1 else 1)
    return model.eval()


def _transformers(kind: str, folder: Path) -> Path:
    from transformers import (
        BertConfig,
        BertModel,
        CLIPConfig,
        CLIPImageProcessor,
        CLIPModel,
        CLIPVisionConfig,
        CLIPVisionModel,
        SiglipConfig,
        SiglipModel,
        VisionTextDualEncoderModel,
        ViTConfig,
        ViTModel,
    )

    side = {"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": HEADS}
    vision = {**side, "num_hidden_layers": DEPTH, "image_size": SIZE, "patch_size": PATCH}
    text = {**side, "num_hidden_layers": 2, "vocab_size": len(WORDS), "max_position_embeddings": POSITIONS, "bos_token_id": len(WORDS) - 2, "eos_token_id": len(WORDS) - 1,
            "pad_token_id": 0}
    if kind == "clip":
        model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=WIDTH))
    elif kind == "siglip":
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        pictures = CLIPVisionModel(CLIPVisionConfig(**vision)) if kind == "dual-clip" else ViTModel(ViTConfig(**vision))
        words = BertModel(BertConfig(**{**text, "max_position_embeddings": POSITIONS}))
        model = VisionTextDualEncoderModel(vision_model=pictures, text_model=words)
    louder(model).save_pretrained(folder)
    CLIPImageProcessor(size={"height": SIZE, "width": SIZE}, do_center_crop=False).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def _open_clip(kind: str, folder: Path) -> Path:
    import open_clip
    from safetensors.torch import save_file

    vision = {"image_size": SIZE, "patch_size": PATCH, "width": WIDTH, "layers": DEPTH, "head_width": WIDTH // HEADS}
    text: dict[str, object] = {"context_length": POSITIONS, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
    if kind != "open-clip":
        vision = {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 160}
    if kind == "open-clip-bert":  # as BiomedCLIP: timm's ViT, BERT of transformers
        from transformers import BertConfig

        small = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2}
        BertConfig(**small, vocab_size=len(WORDS), max_position_embeddings=POSITIONS).save_pretrained(folder)
        tokenizer().save_pretrained(folder)
        text = {"hf_model_name": str(folder), "hf_tokenizer_name": str(folder), "hf_model_pretrained": False, "hf_proj_type": "mlp",
                "hf_pooler_type": "cls_last_hidden_state_pooler", "context_length": POSITIONS}
    config = {"model_cfg": {"embed_dim": WIDTH, "vision_cfg": vision, "text_cfg": text},
              "preprocess_cfg": {"mean": [0.5] * 3, "std": [0.25] * 3, "interpolation": "bicubic"}}
    model = (open_clip.CustomTextCLIP if kind == "open-clip-bert" else open_clip.CLIP)(**config["model_cfg"])
    save_file({name: value.contiguous() for name, value in louder(model).state_dict().items()}, folder / "open_clip_model.safetensors")
    (folder / "open_clip_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder
