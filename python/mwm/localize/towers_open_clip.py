"""Models of open_clip as a `Tower`: its own vision transformers, and timm's (BiomedCLIP, SigLIP)."""

from __future__ import annotations

import importlib.util
import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mwm.localize.checkpoints import first_line
from mwm.localize.open_clip_settings import read_settings
from mwm.localize.tower import OPEN_CLIP_CONFIG, Tower, logit_scale
from mwm.localize.vit_block import Block, Linear, Norm

SAFE, TENSORS_ONLY = "open_clip_model.safetensors", "open_clip_pytorch_model.bin"
_TEXT_FILES = ("*token*", "vocab*", "merges.txt", "special_tokens_map.json", "*.model")


def read(source: str, *, name: str, device: torch.device, local_only: bool, trust_remote_code: bool, revision: str | None) -> tuple[Tower, str]:
    """The tower of a folder or hub name, and the commit it came from.

    Raises:
        ValueError: open_clip is not installed; the model is not there, cannot be read, or has no transformer for its images.
    """
    if importlib.util.find_spec("open_clip") is None:
        raise ValueError(f"{name}: checkpoint {source!r} is a model of open_clip, which is not installed. pip install 'mwm[openclip]'.")
    import open_clip

    folder, commit = (Path(source), "local") if Path(source).is_dir() else _fetched(source, name, local_only, revision)
    if not any(path.suffix in (".safetensors", ".bin") for path in folder.iterdir()):  # open_clip would go on with random weights
        raise ValueError(f"{name}: checkpoint must hold {SAFE} or {TENSORS_ONLY}, got {source!r} without. Download or save it again.")
    settings = read_settings(folder, name, source, local_only)
    # What AutoTokenizer is told here goes before what the checkpoint's settings would tell it.
    told = {"trust_remote_code": False, "local_files_only": True} if settings.text.get("hf_tokenizer_name") else {}
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)  # open_clip tells its steps to the root logger
    try:
        model = open_clip.create_model(f"local-dir:{folder}", precision="fp32", device=str(device), require_pretrained=True, weights_only=True, text_cfg=settings.text)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}", **told)
    except Exception as error:
        raise ValueError(f"{name}: checkpoint {source!r} cannot be read by open_clip ({first_line(error)}). Download or save it again.") from error
    finally:
        root.setLevel(level)
    return _tower(model.eval().requires_grad_(False), name, _Texts(model, tokenizer, name, device)), commit


def _fetched(source: str, name: str, local_only: bool, revision: str | None) -> tuple[Path, str]:
    """Folder and commit of a hub model."""
    from huggingface_hub import snapshot_download

    try:
        options = {"revision": revision, "local_files_only": local_only}
        folder = Path(snapshot_download(source, allow_patterns=[OPEN_CLIP_CONFIG, SAFE, *_TEXT_FILES], **options))
        if not (folder / SAFE).is_file():
            folder = Path(snapshot_download(source, allow_patterns=[OPEN_CLIP_CONFIG, TENSORS_ONLY, *_TEXT_FILES], **options))
    except Exception as error:
        raise ValueError(f"{name}: checkpoint {source!r} is neither a local folder nor could it be fetched from the hub ({first_line(error)}). "
                         "Check the name and the network, or download it and give the folder.") from error
    return folder, folder.name


class _Texts:
    """Texts → embeddings [P, E]."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, device: torch.device) -> None:
        self.model, self.tokenizer, self.name, self.device = model, tokenizer, name, device
        self.limit = int(getattr(model, "context_length", None) or tokenizer.context_length)

    def __call__(self, texts: list[str]) -> Tensor:
        for text in texts:
            count = self._count(text)
            if count > self.limit:
                raise ValueError(f"{self.name}: prompt must have at most {self.limit} tokens, got {count} in {text[:60]!r}…. Shorten it.")
        return self.model.encode_text(self.tokenizer(texts, context_length=self.limit).to(self.device))

    def _count(self, text: str) -> int:
        """open_clip cuts long texts without a word, so the tokens are counted before."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        return len(inner(text)["input_ids"]) if inner is not None else len(self.tokenizer.encode(text)) + 2


def _tower(model: nn.Module, name: str, encode: _Texts) -> Tower:
    visual = model.visual
    shape = visual.preprocess_cfg
    size = shape["size"]
    size = (int(size), int(size)) if isinstance(size, int) else (int(size[0]), int(size[1]))
    mean, std = (torch.tensor(list(shape[key]), dtype=torch.float32).reshape(3, 1, 1) for key in ("mean", "std"))
    trunk = getattr(visual, "trunk", None)
    if trunk is not None and hasattr(trunk, "blocks") and hasattr(trunk, "patch_embed"):
        blocks = [_timm_block(block, name) for block in trunk.blocks]
        one_token, leading, grid = trunk.attn_pool is None and trunk.global_pool == "token", int(trunk.num_prefix_tokens), tuple(trunk.patch_embed.grid_size)

        def embed(x: Tensor) -> Tensor:
            return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(trunk.patch_embed(x))))

        def tail(x: Tensor) -> Tensor:
            return visual.head(trunk.forward_head(trunk.norm(x)))
    elif hasattr(visual, "transformer") and hasattr(visual, "grid_size"):
        blocks = [_own_block(block, name) for block in visual.transformer.resblocks]
        one_token, leading, grid = visual.attn_pool is None and visual.pool_type == "tok", 1, tuple(visual.grid_size)
        embed = visual._embeds

        def tail(x: Tensor) -> Tensor:
            pooled = visual._pool(x)[0]
            return pooled if visual.proj is None else pooled @ visual.proj
    else:
        raise ValueError(f"{name}: the vision tower must be a transformer, got {type(trunk or visual).__name__}. Take a ViT checkpoint.")
    return Tower(embed, blocks, tail, one_token, leading, grid, size, mean, std, "bilinear" if shape.get("interpolation") == "bilinear" else "bicubic", encode,
                 model.encode_image, f"open_clip {type(trunk or visual).__name__}", logit_scale=logit_scale(model))


def _own_block(block: nn.Module, name: str) -> Block:
    attention = block.attn
    if not isinstance(attention, nn.MultiheadAttention):
        raise ValueError(f"{name}: the vision tower must have plain attention, got {type(attention).__name__}. Take another checkpoint.")
    return Block(_norm(block.ln_1), Linear(attention.in_proj_weight, attention.in_proj_bias), _linear(attention.out_proj), _norm(block.ln_2),
                 _linear(block.mlp.c_fc), block.mlp.gelu, _linear(block.mlp.c_proj), attention.num_heads, getattr(block.ls_1, "gamma", None), getattr(block.ls_2, "gamma", None))


def _timm_block(block: nn.Module, name: str) -> Block:
    attention = block.attn
    if not hasattr(attention, "qkv"):
        raise ValueError(f"{name}: the vision tower must have plain attention, got {type(attention).__name__}. Take another checkpoint.")
    return Block(_norm(block.norm1), _linear(attention.qkv), _linear(attention.proj), _norm(block.norm2), _linear(block.mlp.fc1), block.mlp.act, _linear(block.mlp.fc2),
                 attention.num_heads, getattr(block.ls1, "gamma", None), getattr(block.ls2, "gamma", None))


def _linear(layer: nn.Linear) -> Linear:
    return Linear(layer.weight, layer.bias)


def _norm(norm: nn.LayerNorm) -> Norm:
    return norm.weight, norm.bias, norm.eps
