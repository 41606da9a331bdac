"""CLIP-like models of transformers as a `Tower`: CLIPModel, SiglipModel, VisionTextDualEncoderModel (with a CLIP, SigLIP or ViT vision tower)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mwm.localize.checkpoints import commit_of, first_line, image_settings, quiet_transformers
from mwm.localize.tower import Tower, logit_scale
from mwm.localize.training import KEY, training_from
from mwm.localize.vit_block import Block, Linear, Norm

KINDS = {"clip": "CLIPModel", "siglip": "SiglipModel", "vision-text-dual-encoder": "VisionTextDualEncoderModel"}
_OFFSET_POSITIONS = ("roberta", "xlm-roberta", "camembert", "xlm-roberta-xl")  # these count positions from behind the padding token's number


def read(source: str, *, name: str, device: torch.device, local_only: bool, trust_remote_code: bool, revision: str | None) -> tuple[Tower, str]:
    """The tower of a folder or hub name, and the commit it came from.

    Raises:
        ValueError: it is no such model, is not there, or cannot be read.
    """
    options = {"local_files_only": local_only, "revision": revision, "trust_remote_code": trust_remote_code}
    with quiet_transformers(bars=not local_only), _one_sentence(source, name):
        model, processor, tokenizer = _read(source, name, options)
    model = model.to(device).eval().requires_grad_(False)
    size, mean, std, resample = image_settings(processor)
    tower = _tower(model, name, _Texts(model, tokenizer, name, device), (size, mean, std, resample))
    tower.training = training_from(getattr(model.config, KEY, None), name)
    return tower, "local" if Path(source).is_dir() else commit_of(source, revision)


def _read(source: str, name: str, options: dict[str, Any]) -> tuple[nn.Module, Any, Any]:
    import transformers

    found, _ = transformers.PretrainedConfig.get_config_dict(source, **{k: v for k, v in options.items() if k != "trust_remote_code"})
    kind = found.get("model_type", "unknown")
    own_code = bool(options["trust_remote_code"] and found.get("auto_map"))
    if kind not in KINDS and not own_code:
        why = "It comes with code of its own, which is run only with trust_remote_code." if found.get("auto_map") else f"Give one of {', '.join(KINDS.values())}."
        raise ValueError(f"{name}: checkpoint must be a CLIP-like model, got {source!r} of type {kind!r}. {why}")
    loader = transformers.AutoModel if own_code else getattr(transformers, KINDS[kind])
    if not own_code:
        options = {**options, "trust_remote_code": False}
    model, report = loader.from_pretrained(source, use_safetensors=True, output_loading_info=True, dtype=torch.float32, **options)
    missing = sorted(key for key in report["missing_keys"] if not key.endswith("position_ids"))
    if missing:
        raise ValueError(f"{name}: checkpoint must hold all weights of its model, got {source!r} without {len(missing)} of them (first: {missing[0]}). Download or save it again.")
    return model, transformers.AutoImageProcessor.from_pretrained(source, **options), transformers.AutoTokenizer.from_pretrained(source, **options)


@contextlib.contextmanager
def _one_sentence(source: str, name: str) -> Any:
    """Every failure becomes one sentence."""
    try:
        yield
    except OSError as error:
        if "safetensors" in str(error):
            raise ValueError(f"{name}: checkpoint must hold its weights as safetensors, got {source!r} without. "
                             "Load it once with from_pretrained and save it with save_pretrained.") from error
        if Path(source).is_dir():
            raise ValueError(f"{name}: checkpoint must hold config.json, an image processor, a tokenizer and model.safetensors, got {source!r} without some of them "
                             f"({first_line(error)}). Save model and processor with save_pretrained.") from error
        raise ValueError(f"{name}: checkpoint {source!r} is neither a local folder nor could it be fetched from the hub ({first_line(error)}). "
                         "Check the name and the network, or download it and give the folder.") from error
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(f"{name}:"):
            raise
        raise ValueError(f"{name}: checkpoint {source!r} cannot be read ({first_line(error)}). Download or save it again.") from error


class _Texts:
    """Texts → embeddings [P, E]."""

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, device: torch.device) -> None:
        self.model, self.tokenizer, self.name, self.device = model, tokenizer, name, device
        config = model.config.text_config
        positions = int(getattr(config, "max_position_embeddings", 512))
        if config.model_type in _OFFSET_POSITIONS:
            positions -= int(config.pad_token_id or 0) + 1
        self.limit = min(positions, int(tokenizer.model_max_length))
        self.fixed_length = config.model_type.startswith("siglip")  # was trained on padded texts without a mask

    def __call__(self, texts: list[str]) -> Tensor:
        for text in texts:
            count = len(self.tokenizer(text)["input_ids"])
            if count > self.limit:
                raise ValueError(f"{self.name}: prompt must have at most {self.limit} tokens, got {count} in {text[:60]!r}…. Shorten it.")
        padding = {"padding": "max_length", "max_length": self.limit} if self.fixed_length else {"padding": True}
        encoded = self.tokenizer(texts, return_tensors="pt", **padding).to(self.device)
        kept = {"input_ids": encoded["input_ids"]}
        if not self.fixed_length:
            kept["attention_mask"] = encoded["attention_mask"]
        return _embedding(self.model.get_text_features(**kept))


def _embedding(output: Any) -> Tensor:
    """transformers 5 wraps what transformers 4 gave as it is."""
    return output if isinstance(output, Tensor) else output.pooler_output


def _tower(model: nn.Module, name: str, encode: _Texts, images: tuple[tuple[int, int], Tensor, Tensor, str]) -> Tower:
    vision = model.vision_model
    vision = getattr(vision, "vision_model", vision)
    config = model.config.vision_config
    edge, patch = _pair(config.image_size), _pair(config.patch_size)
    project = getattr(model, "visual_projection", nn.Identity())
    embed, tail, one_token, leading = _ends(vision, project, name)
    layers = _at(vision, "encoder.layers", "encoder.layer", "layers")
    if layers is None:
        raise ValueError(f"{name}: the vision tower must be that of CLIP, SigLIP or ViT, got {type(vision).__name__}. Take another checkpoint.")
    heads = int(config.num_attention_heads)
    blocks = [_block(layer, heads) for layer in layers]
    size, mean, std, resample = images
    if size != edge:
        size = edge  # processors resize the shorter edge and crop; the tower knows what it takes
    return Tower(embed, blocks, tail, one_token, leading, (edge[0] // patch[0], edge[1] // patch[1]), size, mean, std, resample, encode,
                 lambda pixels: _embedding(model.get_image_features(pixel_values=pixels)), type(model).__name__, logit_scale=logit_scale(model))


def _ends(vision: nn.Module, project: nn.Module, name: str) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], bool, int]:
    """What comes before and after the blocks, whether only the first token is read, and how many tokens precede the patches."""
    if hasattr(vision, "pre_layrnorm"):  # CLIP; the name is theirs
        return lambda x: vision.pre_layrnorm(vision.embeddings(x)), lambda x: project(vision.post_layernorm(x[:, 0])), True, 1
    if getattr(vision, "head", None) is not None:  # SigLIP
        return vision.embeddings, lambda x: project(vision.head(vision.post_layernorm(x))), False, 0
    if getattr(vision, "pooler", None) is not None and hasattr(vision, "layernorm"):  # ViT
        return vision.embeddings, lambda x: project(vision.pooler(vision.layernorm(x))), True, 1
    raise ValueError(f"{name}: the vision tower must be that of CLIP, SigLIP or ViT with a pooler, got {type(vision).__name__}. Take another checkpoint.")


def _block(layer: nn.Module, heads: int) -> Block:
    attention = _at(layer, "self_attn", "attention.attention", "attention")
    parts = [_at(attention, *names) for names in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))]
    weight = torch.cat([part.weight for part in parts])
    bias = None if parts[0].bias is None else torch.cat([part.bias for part in parts])
    for part, own in zip(parts, weight.chunk(3), strict=True):
        part.weight.data = own  # one copy in memory, not two
    mlp = _at(layer, "mlp")
    up, down, activation = (mlp.fc1, mlp.fc2, mlp.activation_fn) if mlp is not None else (layer.intermediate.dense, layer.output.dense, layer.intermediate.intermediate_act_fn)
    out = _at(layer, "self_attn.out_proj", "attention.output.dense", "attention.o_proj")
    first, second = _at(layer, "layer_norm1", "layernorm_before"), _at(layer, "layer_norm2", "layernorm_after")
    return Block(_norm(first), Linear(weight, bias), Linear(out.weight, out.bias), _norm(second), Linear(up.weight, up.bias), activation, Linear(down.weight, down.bias), heads)


def _norm(norm: nn.LayerNorm) -> Norm:
    return norm.weight, norm.bias, norm.eps


def _at(module: nn.Module, *paths: str) -> Any:
    """The first of several attributes, which may be dotted, that is there; None where none is."""
    for path in paths:
        found: Any = module
        for part in path.split("."):
            found = getattr(found, part, None)
        if found is not None:
            return found
    return None


def _pair(value: Any) -> tuple[int, int]:
    return (int(value), int(value)) if isinstance(value, int) else (int(value[0]), int(value[1]))
