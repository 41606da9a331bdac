"""MaskedImageModel: a sparse encoder, densified maps, a light decoder, a loss on what was hidden."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from mwm.mim.decoder import Decoder
from mwm.mim.densify import Densify
from mwm.mim.loss import LossTerms, hidden_patch_loss, masked_patch_loss, restore_patches
from mwm.ops import TilePlan, build_plan, pack_tiles, unpack_tiles
from mwm.sparse import Packed, is_sparsified, pack

SHALLOWEST_STRIDE = 4
DECODE = ("dense", "hidden")


class MaskedImageModel(nn.Module):
    """Masked image modelling with any sparsified encoder.

    Encode the visible patches, fill the hidden places of every map with a learned token, decode, compare the hidden
    patches with the image. Channels and strides of the pyramid are learned from one dry run; of several maps of one
    stride the last is used, and only strides of at least 4.

    Args:
        net: a net made by `mwm.sparsify` that returns a list, tuple or dict of maps, or one map.
        patch_size: edge of the patch that is hidden as a unit, pixels; a multiple of the deepest stride.
        decoder_width: channels of the decoder at the deepest stride (paper: 768); halved at every doubling.
        min_std: hidden patches whose standard deviation is below are left out of the loss, in the images' units;
            0 keeps all (paper). For standardised images `mwm.mim.RECOMMENDED_MIN_STD` leaves out air.
        norm: densify norm, "batch" (ResNet-like), "layer" (ConvNeXt-like) or "auto": batch where the net has one.
        in_chans: channels of the images; None takes those of the net's first convolution.
        decode: "dense" (the paper) decodes the whole image. "hidden" decodes the hidden patches only, at the price of what is
            hidden; parameters and keys are the same, so that a checkpoint of one serves the other. It is another function:
            (1) the decoder's batch norms take mean and variance, and their running statistics, over the positions of the
            batch's hidden patches, not over all; (2) of what is visible, a hidden patch sees the densified maps alone: the
            deepest within reach of the first transposed convolution, that is the visible patches beside it, and each
            shallower one through its 3x3 projection, one position deep. At a visible place the decoder's own features
            are zero: a convolution at the rim of a hidden patch reads zeros there, as at the rim of the image.
            With no visible patch both modes are the same function.

    Attributes:
        channels, strides: of the maps in use, deepest last.
        unreached: names of the net's parameters that no map in use depends on.

    Raises:
        ValueError: the net is not sparsified, returns no usable map, or its strides do not fit the patch size.

    Source: Mask What Matters (arXiv 2509.23054).
    """

    def __init__(self, net: nn.Module, patch_size: int = 32, decoder_width: int = 768, min_std: float = 0.0, norm: str = "auto",
                 *, in_chans: int | None = None, decode: str = "dense") -> None:
        super().__init__()
        if decode not in DECODE:
            raise ValueError(f'MaskedImageModel: decode must be "dense" or "hidden", got {decode!r}.')
        if norm not in ("auto", "batch", "layer"):
            raise ValueError(f'MaskedImageModel: norm must be "auto", "batch" or "layer", got {norm!r}.')
        if isinstance(patch_size, bool) or not isinstance(patch_size, int) or patch_size < 1:
            raise ValueError(f"MaskedImageModel: patch_size must be a positive whole number of pixels, got {patch_size!r}.")
        if not min_std >= 0:
            raise ValueError(f"MaskedImageModel: min_std must be at least 0, got {min_std}.")
        if not is_sparsified(net):
            raise ValueError("MaskedImageModel: net must read packed tiles, got a dense network. Pass mwm.sparsify(net).")
        self.net, self.patch_size, self.min_std, self.decode = net, patch_size, float(min_std), decode
        self.in_chans = in_chans if in_chans is not None else _input_channels(net)
        maps, self.unreached = _dry_run(net, self.in_chans, patch_size)
        by_stride = {patch_size // x.tiles.shape[-1]: (index, x.tiles.shape[1]) for index, x in enumerate(maps)}
        usable = sorted(stride for stride in by_stride if stride >= SHALLOWEST_STRIDE)
        if not usable:
            raise ValueError(f"MaskedImageModel: net must return a map of stride {SHALLOWEST_STRIDE} or more, got strides "
                             f"{sorted(by_stride)}. Take deeper features.")
        odd = [stride for stride in usable if stride & (stride - 1)]
        if odd:
            raise ValueError(f"MaskedImageModel: strides must be powers of two (the decoder doubles), got {odd} with patch_size "
                             f"{patch_size}. Take other features.")
        self.strides = usable
        self.channels = [by_stride[stride][1] for stride in usable]
        self._maps = [by_stride[stride][0] for stride in usable]
        kind = _norm_of(net) if norm == "auto" else norm
        blocks = self.strides[-1].bit_length() - 1
        self.decoder = Decoder(decoder_width, blocks, self.in_chans)
        self.densify = nn.ModuleDict({
            str(stride): Densify(channels, self.decoder.widths[blocks - (stride.bit_length() - 1)],
                                 deepest=stride == self.strides[-1], norm=kind)
            for stride, channels in zip(self.strides, self.channels, strict=True)})
        like = next(net.parameters())
        self.decoder.to(device=like.device, dtype=like.dtype)
        self.densify.to(device=like.device, dtype=like.dtype)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: Tensor, active: Tensor | TilePlan, *, visible: int | None = None, reduction: str = "mean",
                weight: Tensor | None = None) -> Tensor | LossTerms:
        """The loss of one batch.

        Args:
            images: float32 (or the net's dtype). [B, C, H, W]
            active: bool, True = visible. [B, Gh, Gw] with Gh = H / patch_size, Gw = W / patch_size. Or its plan, as `mwm.pack` takes it.
            visible: visible patches per image where constant (`policy.visible(grid)`); spares a GPU sync.
            reduction: "mean", the loss; "sum", the `LossTerms` it is made of (for several processes).
            weight: how much each hidden patch counts in the loss, at least 0, relative to the others. float [B, Gh, Gw]

        Returns:
            Scalar, float32 also under autocast; 0 where nothing is hidden. []

        Raises:
            ValueError: shapes do not fit; the message names them.
        """
        if reduction not in ("mean", "sum"):
            raise ValueError(f'MaskedImageModel: reduction must be "mean" or "sum", got {reduction!r}.')
        mask, active = active, _mask_of(active)
        if weight is not None:
            self._check_weight(weight, active)
            weight = weight.to(images.device)
        if self.decode == "hidden":
            tiles, plan = self._predict_tiles(images, mask, visible)
            if weight is not None:
                weight = weight[tuple(plan.coords.long().unbind(1))]
            terms = hidden_patch_loss(tiles, pack_tiles(images, plan), self.min_std, weight)
        else:
            predicted = self.predict(images, mask, visible=visible)
            terms = masked_patch_loss(predicted, images, active.to(predicted.device), self.patch_size, self.min_std, weight)
        return terms.mean() if reduction == "mean" else terms

    def predict(self, images: Tensor, active: Tensor | TilePlan, *, visible: int | None = None) -> Tensor:
        """The decoder's output, in units of normalised patches; arguments as `forward`.

        Returns:
            With decode="hidden" zero at visible patches, which are not decoded. [B, C, H, W]
        """
        if self.decode == "hidden":
            return unpack_tiles(*self._predict_tiles(images, active, visible))
        levels = self._maps_by_level(images, active, visible)
        return self.decoder([level and level[0](level[1]) for level in levels])

    def _maps_by_level(self, images: Tensor, active: Tensor | TilePlan, visible: int | None) -> list[tuple[Densify, Packed] | None]:
        """The encoder's maps with what densifies them, one entry per block of the decoder, deepest first."""
        self._check(images, _mask_of(active))
        maps = _as_list(self.net(pack(images.contiguous(memory_format=torch.channels_last), active, visible=visible)))
        levels: list[tuple[Densify, Packed] | None] = [None] * len(self.decoder.blocks)
        for stride, index in zip(self.strides, self._maps, strict=True):
            levels[len(levels) - (stride.bit_length() - 1)] = self.densify[str(stride)], maps[index]
        return levels

    def _predict_tiles(self, images: Tensor, active: Tensor | TilePlan, visible: int | None) -> tuple[Tensor, TilePlan]:
        """The decoder's output at the hidden patches, and where they lie. [T, C, p, p]"""
        levels, active = self._maps_by_level(images, active, visible), _mask_of(active)
        hidden = None if visible is None else active.shape[1] * active.shape[2] - visible
        plan = build_plan(~active, self.patch_size, visible=hidden)
        if hidden is None and torch.compiler.is_compiling():
            torch._check(plan.coords.shape[0] >= 2)  # as in `pack`
        plan = plan if plan.device == images.device else plan.to(images.device)
        deepest, seen = levels[0]
        around = Packed(deepest.at_visible(seen), seen.plan)
        return self.decoder.decode_tiles([level and level[0].at_hidden(level[1], plan) for level in levels], plan, around), plan

    @torch.no_grad()
    def reconstruct(self, images: Tensor, active: Tensor) -> Tensor:
        """The images with their hidden patches replaced by what the model makes of the visible ones.

        A predicted patch takes the mean and deviation of the patch it replaces, since the model predicts neither.
        Runs in the module's present mode; call `eval()` first for running statistics.

        Args:
            images: [B, C, H, W]
            active: bool, True = visible. [B, Gh, Gw]

        Returns:
            [B, C, H, W]
        """
        return restore_patches(self.predict(images, active), images, active.to(images.device), self.patch_size)

    def _check(self, images: Tensor, active: Tensor) -> None:
        if images.ndim != 4 or images.shape[1] != self.in_chans:
            raise ValueError(f"MaskedImageModel: images must be [B, {self.in_chans}, H, W], got {list(images.shape)}.")
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size:
            raise ValueError(f"MaskedImageModel: patch_size {self.patch_size} must divide the image, got {height} x {width}. Resize the "
                             f"images to multiples of {self.patch_size}.")
        grid = [len(images), height // self.patch_size, width // self.patch_size]
        if active.dtype != torch.bool or list(active.shape) != grid:
            raise ValueError(f"MaskedImageModel: active must be bool {grid} for images {list(images.shape)} and patch_size "
                             f"{self.patch_size}, got {active.dtype} {list(active.shape)}.")


    def _check_weight(self, weight: Tensor, active: Tensor) -> None:
        if not weight.is_floating_point() or weight.shape != active.shape:
            raise ValueError(f"MaskedImageModel: weight must be float {list(active.shape)} as active, got {weight.dtype} {list(weight.shape)}.")
        looked_at = weight.device.type == "cpu" and not torch.compiler.is_compiling()  # a look at a GPU's would wait for it
        if looked_at and not bool((weight >= 0).all()):
            raise ValueError("MaskedImageModel: weight must be at least 0 everywhere, got a negative value or NaN.")


def _mask_of(active: Tensor | TilePlan) -> Tensor:
    return active.active if isinstance(active, TilePlan) else active


def _as_list(maps: object) -> list[Packed]:
    if isinstance(maps, Packed):
        return [maps]
    if isinstance(maps, Mapping):
        maps = list(maps.values())
    if isinstance(maps, Iterable):
        maps = list(maps)
        if maps and all(isinstance(x, Packed) for x in maps):
            return maps
    raise ValueError(f"MaskedImageModel: net must return maps (a list or dict of mwm.Packed), got {type(maps).__name__}. Use "
                     "mwm.create_encoder(name) or timm's features_only=True.")


def _input_channels(net: nn.Module) -> int:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            return module.in_channels
    raise ValueError("MaskedImageModel: net has no convolution to read the number of image channels from. Pass in_chans.")


def _norm_of(net: nn.Module) -> str:
    return "batch" if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()) else "layer"


def _dry_run(net: nn.Module, in_chans: int, patch_size: int) -> tuple[list[Packed], tuple[str, ...]]:
    """The maps of one visible image of 2x2 patches, and the names of the parameters none of them depends on.

    Runs in eval mode, so that no running statistic moves.
    """
    training = {module: module.training for module in net.modules()}
    like = next(net.parameters())
    images = torch.zeros(1, in_chans, 2 * patch_size, 2 * patch_size, device=like.device, dtype=like.dtype)
    try:
        with torch.enable_grad():
            maps = _as_list(net.eval()(pack(images, torch.ones(1, 2, 2, dtype=torch.bool))))
            last = {patch_size // x.tiles.shape[-1]: x for x in maps}
            used = [x for stride, x in last.items() if stride >= SHALLOWEST_STRIDE]
            named = [(name, p) for name, p in net.named_parameters() if p.requires_grad]
            total = sum((x.tiles.sum() for x in used), images.new_zeros(()))
            grads = torch.autograd.grad(total, [p for _, p in named], allow_unused=True) if named and used else []
    finally:
        for module, mode in training.items():
            module.training = mode
    return maps, tuple(name for (name, _), grad in zip(named, grads, strict=False) if grad is None)
