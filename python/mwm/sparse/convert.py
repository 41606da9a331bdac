"""`sparsify`: make a CNN read packed tiles, in place, keeping every parameter and every key."""

from __future__ import annotations

from torch import nn

from .layers import timm_layers, torch_layers, torchvision_layers
from .randomness import LAYER
from .refusal import NAME, PackedError

# Layers whose output at a position depends on hidden or distant positions in a way that tiles cannot give, whatever the input.
REFUSED = {
    nn.MultiheadAttention: "attention reads all positions of an image",
    nn.Transformer: "attention reads all positions of an image",
    nn.TransformerEncoderLayer: "attention reads all positions of an image",
    nn.TransformerDecoderLayer: "attention reads all positions of an image",
    nn.RNNBase: "a recurrent layer reads positions in sequence",
    nn.Conv3d: "packed tiles are two-dimensional",
    nn.ConvTranspose3d: "packed tiles are two-dimensional",
    nn.MaxPool3d: "packed tiles are two-dimensional",
    nn.AvgPool3d: "packed tiles are two-dimensional",
    nn.Unfold: "it flattens the positions of the dense map",
    nn.Fold: "it needs the positions of the dense map",
    nn.FractionalMaxPool2d: "its windows do not align with patches",
    nn.MaxUnpool2d: "its indices are those of the dense map",
}
REFUSED_IN_TIMM = {
    "attention": "attention reads all positions of an image",
    "attention2d": "attention reads all positions of an image",
    "attention_pool": "attention reads all positions of an image",
    "attention_pool2d": "attention reads all positions of an image",
    "bottleneck_attn": "attention reads all positions of an image",
    "halo_attn": "attention reads all positions of an image",
    "lambda_layer": "attention reads all positions of an image",
    "non_local_attn": "attention reads all positions of an image",
    "global_context": "its softmax over positions needs the dense map",
    "coord_attn": "it averages over rows and columns alone",
    "patch_embed": "it flattens the positions of the map",
    "pos_embed_rel": "position embeddings have the size of the dense map",
}
# Attention, and what mixes positions like it, that a net brings along in its own file.
REFUSED_IN_NETS = {
    "timm.models.cpubone": ("ConvAttention",),
    "timm.models.edgenext": ("CrossCovarianceAttn",),
    "timm.models.efficientformer": ("Attention",),
    "timm.models.efficientformer_v2": ("Attention2d", "Attention2dDownsample"),
    "timm.models.efficientvim": ("HSMSSD",),
    "timm.models.efficientvit_mit": ("LiteMLA",),
    "timm.models.efficientvit_msra": ("CascadedGroupAttention", "LocalWindowAttention"),
    "timm.models.fastvit": ("Attention",),
    "timm.models.iformer": ("SHMA",),
    "timm.models.levit": ("Attention", "AttentionDownsample"),
    "timm.models.lowformer": ("ConvAttention",),
    "timm.models.maxxvit": ("Attention2d", "AttentionCl"),
    "timm.models.metaformer": ("Attention",),
    "timm.models.mobilevit": ("LinearSelfAttention", "LinearTransformerBlock"),
    "timm.models.nextvit": ("EfficientAttention",),
    "timm.models.shvit": ("SHSA",),
    "timm.models.swiftformer": ("EfficientAdditiveAttention",),
    "timm.models.visformer": ("Attention",),
    "torchvision.models.maxvit": ("RelativePositionalMultiHeadAttention",),
    "torchvision.models.swin_transformer": ("ShiftedWindowAttention", "ShiftedWindowAttentionV2"),
}


def sparsify(module: nn.Module) -> nn.Module:
    """Make a CNN read packed tiles (`mwm.pack`), in place.

    The net then maps `Packed` to `Packed` (a pyramid to a list of them, a classifier to [B, classes]) with the meaning of
    SparK's mask-multiply: hidden neighbours are zero, norms see visible positions only, global pooling is per image over
    its visible positions. A plain tensor runs the dense network as before. Parameters, buffers, keys, hooks and isinstance stay;
    the result can be deep-copied, pickled, moved, cast and wrapped; calling it again changes nothing.

    Args:
        module: any CNN; unmodified timm and torchvision nets, or your own.

    Returns:
        The same module.

    Raises:
        PackedError: (a TypeError) a layer cannot run on tiles, named with the reason. What the modules do not show, such as a
            flatten inside a forward, is refused by name at the first call.

    Source: Designing BERT for Convolutional Networks (arXiv 2301.03580), §3.1.
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"sparsify: module must be a torch.nn.Module, got {type(module).__name__}.")
    for name, layer in module.named_modules():
        reason = _reason(layer)
        if reason:
            raise PackedError(f"sparsify: module {name or 'itself'!r} ({type(layer).__name__}) cannot run on packed tiles: {reason}. "
                              "Sparsify the convolutional part of the net only.")
    for number, (name, layer) in enumerate(module.named_modules()):
        layer.__dict__[NAME] = name
        swap = _swap(layer)
        if swap is not None:
            layer.__class__ = swap
        if type(layer) in _noisy():
            layer.__dict__[LAYER] = number
    return module


def is_sparsified(module: nn.Module) -> bool:
    """Whether `sparsify` made the module, or a net that holds it, read packed tiles."""
    return NAME in module.__dict__


def _reason(layer: nn.Module) -> str | None:
    for kind, reason in REFUSED.items():
        if isinstance(layer, kind):
            return reason
    place = type(layer).__module__
    if place.startswith("timm.layers."):
        return REFUSED_IN_TIMM.get(place.rpartition(".")[2])
    return "it mixes all positions of an image, as attention does" if type(layer).__name__ in REFUSED_IN_NETS.get(place, ()) else None


def _library(layer: nn.Module) -> dict[type, type]:
    place = type(layer).__module__.partition(".")[0]
    return timm_layers() if place == "timm" else torchvision_layers() if place == "torchvision" else torch_layers() if place == "torch" else {}


def _swap(layer: nn.Module) -> type | None:
    return _library(layer).get(type(layer))


def _noisy() -> tuple[type, ...]:
    from .layers import PackedDropout2d

    return (PackedDropout2d, *(kind for kind in _loaded() if "Drop" in kind.__name__ or "Stochastic" in kind.__name__))


def _loaded() -> list[type]:
    import sys

    found: list[type] = []
    for place in ("timm_layers", "torchvision_layers"):
        module = sys.modules.get(f"{__package__}.{place}")
        found += list(module.SWAPS.values()) if module else []
    return found
