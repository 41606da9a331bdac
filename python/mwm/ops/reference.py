"""The meaning of every op in plain torch: no plan, no index tables, only the bool `active`.

Written apart from the plan code and the kernels, so that they cannot share an error with it. It is also the backend
"reference", which runs where no kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .constants import LOG2_TABLE, STREAM_ROUNDING, STREAM_WEIGHT, WORD_MASK


def _by_patch(x: Tensor, active: Tensor) -> Tensor:
    """[B, C, Gh*t, Gw*t] seen as [B, Gh, Gw, C, t, t]."""
    batch, channels, height, width = x.shape
    _, rows, columns = active.shape
    split = x.reshape(batch, channels, rows, height // rows, columns, width // columns)
    return split.permute(0, 2, 4, 1, 3, 5)


def pack_tiles(x: Tensor, active: Tensor) -> Tensor:
    """[B, C, H, W] -> [T, C, t, t]"""
    return _by_patch(x, active)[active]


def unpack_tiles(tiles: Tensor, active: Tensor, fill: float = 0.0) -> Tensor:
    """[T, C, t, t] -> [B, C, Gh*t, Gw*t]"""
    batch, rows, columns = active.shape
    _, channels, edge, _ = tiles.shape
    patches = torch.full((batch, rows, columns, channels, edge, edge), fill, dtype=tiles.dtype, device=tiles.device)
    patches[active] = tiles
    return patches.permute(0, 3, 1, 4, 2, 5).reshape(batch, channels, rows * edge, columns * edge)


def spread(active: Tensor, edge: int) -> Tensor:
    """The mask at a feature map whose tiles have `edge` positions. bool [B, 1, Gh*t, Gw*t]"""
    return active.repeat_interleave(edge, 1).repeat_interleave(edge, 2)[:, None]


def build_plan(active: Tensor, visible: int) -> tuple[Tensor, Tensor, Tensor]:
    """(coords int32 [T, 3], slots int32 [B, Gh, Gw], offsets int32 [B + 1]); `visible` < 0 means unknown."""
    batch, rows, columns = active.shape
    flat = active.reshape(batch, rows * columns)
    counts = flat.sum(1)
    if visible < 0:
        coords = active.nonzero()
    else:
        wrong = counts != visible
        if active.device.type == "cpu":
            if bool(wrong.any()):
                image = int(wrong.nonzero()[0])
                raise ValueError(visible_error(image, int(counts[image]), visible))
        else:
            torch._assert_async(~wrong.any(), "build_plan: an image has another number of visible patches than `visible`")
        where = torch.argsort((~flat).to(torch.uint8), dim=1, stable=True)[:, :visible]
        image = torch.arange(batch, device=active.device)[:, None].expand(batch, visible)
        coords = torch.stack([image, where // columns, where % columns], 2).reshape(-1, 3)
    everything = active.reshape(-1)
    numbers = everything.cumsum(0) - 1
    slots = torch.where(everything, numbers, -1).reshape(active.shape)
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    return coords.to(torch.int32).contiguous(), slots.to(torch.int32), offsets.to(torch.int32)


def visible_error(image: int, count: int, visible: int) -> str:
    """The sentence for a wrong `visible`."""
    return (
        f"build_plan: visible must be the number of visible patches of every image, got {visible}, but image {image} has {count}. "
        f"Leave visible out where it is not constant."
    )


def image_sum(x: Tensor, active: Tensor) -> Tensor:
    """[T, C, t, t] -> float32 (float64 for float64) [B, C]"""
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    return unpack_tiles(wide.sum((2, 3), keepdim=True), active).sum((2, 3))


def image_expand(y: Tensor, active: Tensor) -> Tensor:
    """[B, C] -> [T, C]"""
    return y[:, None, None, :].expand(*active.shape, y.shape[1])[active]


def philox(counter: Tensor, key: Tensor) -> Tensor:
    """Philox4x32-10: counter int64 [..., 4], key int64 [..., 2], words in [0, 2³²) -> int64 [..., 4]."""
    c0, c1, c2, c3 = counter.unbind(-1)
    k0, k1 = key.unbind(-1)
    for _ in range(10):
        # The int64 product wraps around; its bits are those of the 64-bit unsigned product.
        first, second = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        high0, low0 = (first >> 32) & WORD_MASK, first & WORD_MASK
        high1, low1 = (second >> 32) & WORD_MASK, second & WORD_MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + 0x9E3779B9) & WORD_MASK, (k1 + 0xBB67AE85) & WORD_MASK
    return torch.stack([c0, c1, c2, c3], -1)


def random_words(seed: int, ids: Tensor, epoch: int, view: int, stream: int, n: int) -> Tensor:
    """int64 [B, n]; `seed` is a signed or unsigned 64-bit number."""
    if ids.numel() and (int(ids.min()) < 0 or int(ids.max()) > WORD_MASK):
        raise ValueError("random_words: ids must be integers in [0, 2**32).")
    batch, blocks = ids.shape[0], -(-n // 4)
    counter = torch.empty((batch, blocks, 4), dtype=torch.int64, device=ids.device)
    counter[..., 0] = torch.arange(blocks, device=ids.device)
    counter[..., 1] = ids[:, None]
    counter[..., 2] = epoch
    counter[..., 3] = (stream << 16) | view
    key = torch.tensor([seed & WORD_MASK, (seed >> 32) & WORD_MASK], dtype=torch.int64, device=ids.device)
    return philox(counter, key).reshape(batch, blocks * 4)[:, :n].contiguous()


def negative_log2(words: Tensor, more: Tensor) -> Tensor:
    """-log2(u) * 2³² for u = (words * 2³² + more) / 2⁶⁴, by a table of 256 chords; 0 counts as 2⁻⁶⁴. int64, at most 2³⁸."""
    more = torch.where((words == 0) & (more == 0), 1, more)
    bits = (words << 32) | more
    zeros = torch.zeros_like(bits)
    for width in (32, 16, 8, 4, 2, 1):
        empty = (bits >> (64 - width)) & ((1 << width) - 1) == 0
        zeros = zeros + width * empty
        bits = torch.where(empty, bits << width, bits)
    table = torch.tensor(LOG2_TABLE, dtype=torch.int64, device=words.device)
    index = (bits >> 55) & 0xFF
    fraction = (bits >> 23) & WORD_MASK
    log2 = table[index] + (((table[index + 1] - table[index]) * fraction) >> 32)
    return ((zeros + 1) << 32) - log2


def sample_active(
    strata: Tensor, amounts: Tensor, exact: bool, seed: int, ids: Tensor, epoch: int, view: int, weights: Tensor | None
) -> Tensor:
    """Meaning of `mwm.ops.sample_active`: strata int64 [B, L], amounts int64 [B, S], weights int64 [B, L] -> bool [B, L]."""
    patches = strata.shape[1]
    kinds = amounts.shape[1]
    if strata.numel() and (int(strata.min()) < 0 or int(strata.max()) >= kinds):
        raise ValueError(f"sample_active: strata must lie in [0, {kinds}), got {int(strata.min())} to {int(strata.max())}.")
    member = strata[:, :, None] == torch.arange(kinds, device=strata.device)
    sizes = member.sum(1)
    if exact:
        hidden = amounts
        if bool(((hidden < 0) | (hidden > sizes)).any()):
            raise ValueError("sample_active: hidden must be between 0 and the number of patches of each stratum.")
    else:
        product = sizes * amounts
        chance = random_words(seed, ids, epoch, view, STREAM_ROUNDING, kinds)
        hidden = (product >> 32) + (chance < (product & WORD_MASK))
    keys = random_words(seed, ids, epoch, view, 0, patches)
    if weights is not None:
        more = random_words(seed, ids, epoch, view, STREAM_WEIGHT, patches)
        race = (negative_log2(keys, more) << 16) // weights.clamp(min=1)
        keys = torch.where(weights > 0, race, keys + (1 << 62))
    order = torch.argsort(keys, dim=1, stable=True)
    sorted_member = member.gather(1, order[:, :, None].expand_as(member))
    sorted_rank = (sorted_member.cumsum(1) - 1).masked_fill(~sorted_member, 0).sum(2)
    rank = torch.empty_like(order).scatter_(1, order, sorted_rank)
    return rank >= hidden.gather(1, strata)


def quantise(values: Tensor) -> Tensor:
    """round(255 * value), half to even, clamped to [0, 255]: one multiplication in float32 (float64 for float64). int64"""
    if values.dtype == torch.bool:
        return values.to(torch.int64) * 255
    wide = values.to(torch.float64 if values.dtype == torch.float64 else torch.float32)
    return torch.round((wide * 255).clamp(0, 255)).to(torch.int64)


def region_coverage(region: Tensor, rows: int, columns: int, numerator: int, denominator: int) -> tuple[Tensor, Tensor]:
    """(inside bool [B, Gh, Gw], cover int64 [B, Gh, Gw]); min_cover = numerator / denominator."""
    if bool(torch.isnan(region).any()):
        raise ValueError("region_coverage: region contains NaN. Replace it, e.g. with torch.nan_to_num.")
    batch, height, width = region.shape
    edge_h, edge_w = height // rows, width // columns
    cover = quantise(region).reshape(batch, rows, edge_h, columns, edge_w).sum((2, 4))
    inside = cover >= -(-numerator * 255 * edge_h * edge_w // denominator)
    flat = cover.flatten(1)
    if flat.numel():
        best = flat.argmax(1, keepdim=True)
        best = (flat == flat.gather(1, best)).to(torch.uint8).argmax(1, keepdim=True)
        claims = ~inside.flatten(1).any(1, keepdim=True) & (flat.gather(1, best) > 0)
        inside = inside | torch.zeros_like(flat, dtype=torch.bool).scatter_(1, best, claims).reshape(inside.shape)
    return inside, cover


def patch_loss(predicted: Tensor, images: Tensor, active: Tensor, edge: int, min_std: float, flat_std: float, eps: float) -> Tensor:
    """Sums [4] of `mwm.ops.patch_loss`; differentiable by torch in predicted and images."""
    wide = torch.promote_types(torch.promote_types(predicted.dtype, images.dtype), torch.float32)
    guess, truth = (_by_patch(x.to(wide), active).flatten(3) for x in (predicted, images))
    if not guess.numel():
        return (guess.sum() + torch.zeros(4, dtype=wide, device=guess.device)).to(wide)
    variance, mean = torch.var_mean(truth, 3, correction=0, keepdim=True)
    error = (guess - (truth - mean) / torch.sqrt(variance + eps)).square().mean(3)
    deviation = variance.sqrt()[..., 0]
    counts, flat = ~active & (deviation >= min_std), ~active & (deviation < flat_std)
    none = error.new_zeros(())
    sums = torch.where(counts, error, none).sum(), counts.sum().to(wide), torch.where(flat, error.detach(), none).sum(), flat.sum().to(wide)
    return torch.stack(sums)


def patch_loss_backward(grad: Tensor, predicted: Tensor, images: Tensor, active: Tensor, edge: int, min_std: float, eps: float) -> Tensor:
    """Gradient of the first of those sums in predicted. [B, C, H, W]"""
    guess, truth = _by_patch(predicted.to(grad.dtype), active), _by_patch(images.to(grad.dtype), active)
    if not guess.numel():
        return torch.zeros_like(predicted)
    variance, mean = torch.var_mean(truth, (3, 4, 5), correction=0, keepdim=True)
    counts = ~active[:, :, :, None, None, None] & (variance.sqrt() >= min_std)
    slope = 2 * grad * (guess - (truth - mean) / torch.sqrt(variance + eps)) / guess[0, 0, 0].numel()
    return torch.where(counts, slope, 0).permute(0, 3, 1, 4, 2, 5).reshape(predicted.shape)
