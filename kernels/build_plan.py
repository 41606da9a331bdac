"""Numbers the visible patches of each image in row-major order: slots, coords and offsets in one launch.

One program per image walks over its patches and counts as it goes. Where every image has the same number of visible patches, its first tile
is known without looking at the others; elsewhere the offsets come in, counted before.
"""

import triton
import triton.language as tl


@triton.jit
def _build_plan_kernel(active, stride_b, stride_r, stride_c, visible, coords, slots, offsets, batch, patches, columns, KNOWN: tl.constexpr, BLOCK: tl.constexpr):
    """active uint8 [B, Gh, Gw], any strides; coords int32 [T, 3]; slots int32 [B, Gh, Gw]; offsets int32 [B + 1], read where not KNOWN"""
    image = tl.program_id(0).to(tl.int64)
    if KNOWN:
        first = (image * visible).to(tl.int32)
        tl.store(offsets + image, first)  # the program behind the last image only closes the list
    else:
        first = tl.load(offsets + image)
    count = tl.full([], 0, tl.int32)
    here = tl.where(image < batch, patches, 0)
    for start in range(0, here, BLOCK):
        patch = start + tl.arange(0, BLOCK)
        valid = patch < patches
        row, column = patch // columns, patch % columns
        seen = (tl.load(active + image * stride_b + row.to(tl.int64) * stride_r + column.to(tl.int64) * stride_c, mask=valid, other=0) != 0).to(tl.int32)
        number = count + tl.cumsum(seen, 0) - 1
        tile = first + number
        tl.store(slots + image * patches + patch, tl.where(seen > 0, tile, -1), mask=valid)
        # A wrong count must not write beyond the list before the assertion ends the program.
        room = (seen > 0) & ((number < visible) | (not KNOWN))
        place = coords + tile.to(tl.int64) * 3
        tl.store(place, tl.zeros_like(patch) + image.to(tl.int32), mask=room)
        tl.store(place + 1, row, mask=room)
        tl.store(place + 2, column, mask=room)
        count += tl.sum(seen, 0)
    if KNOWN:
        tl.device_assert((count == visible) | (image == batch), "build_plan: an image has another number of visible patches than `visible`")


def build_plan(active, visible, coords, slots, offsets):
    """Fill coords [T, 3], slots [B, Gh, Gw] and, where visible >= 0, offsets [B + 1]; int32, contiguous. active: uint8, any strides.

    With visible < 0 the offsets are given. An image with another count than `visible` is a device-side assertion.
    """
    batch, rows, columns = active.shape
    patches = rows * columns
    block = min(1024, triton.next_power_of_2(max(patches, 1)))
    _build_plan_kernel[(batch + 1,)](active, *active.stride(), visible, coords, slots, offsets, batch, patches, columns, KNOWN=visible >= 0, BLOCK=block,
                                     num_warps=max(1, block // 128), debug=True, sanitize_overflow=False)


def compile_cases():
    """(name, kernel, signature, constants, options) of the variants for usual grids."""
    signature = {"active": "*u8", "stride_b": "i32", "stride_r": "i32", "stride_c": "i32", "visible": "i32", "coords": "*i32", "slots": "*i32", "offsets": "*i32",
                 "batch": "i32", "patches": "i32", "columns": "i32"}
    for known in (True, False):
        for block in (64, 1024):
            yield (f"{block} patches, {'known' if known else 'counted'}", _build_plan_kernel, signature, {"KNOWN": known, "BLOCK": block},
                   {"num_warps": max(1, block // 128), "debug": True, "sanitize_overflow": False})
