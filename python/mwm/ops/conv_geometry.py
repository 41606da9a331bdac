"""Numbers of a convolution window: from the forms that torch accepts to the one list that every backend reads."""

from __future__ import annotations

from collections.abc import Sequence


def conv_numbers(
    edge: int,
    grid: tuple[int, int],
    kernel: tuple[int, int],
    stride: int | Sequence[int],
    padding: int | Sequence[int],
    dilation: int | Sequence[int],
    groups: int,
) -> list[int]:
    """[stride, dilation of rows, of columns, padding left, right, top, bottom, groups]

    Args:
        edge: Edge t of a tile in positions.
        grid: (Gh, Gw) of the plan.
        kernel: (kh, kw).
        stride, dilation: One number, or (rows, columns).
        padding: One number, (rows, columns), or (left, right, top, bottom) as in F.pad.
        groups: Groups of channels.

    Raises:
        ValueError: The dense output would not be the input divided by the stride; the message names the numbers.
    """
    steps = _pair("stride", stride, 1)
    gaps = _pair("dilation", dilation, 1)
    left, right, top, bottom = _sides(padding)
    height, width = grid[0] * edge, grid[1] * edge
    rows = (height + top + bottom - gaps[0] * (kernel[0] - 1) - 1) // steps[0] + 1
    columns = (width + left + right - gaps[1] * (kernel[1] - 1) - 1) // steps[1] + 1
    if steps[0] != steps[1] or edge % steps[0] or rows * steps[0] != height or columns * steps[1] != width:
        raise ValueError(
            f"tile_conv: the output must be the input divided by the stride, tile by tile; got tiles of edge {edge}, kernel {kernel}, "
            f"stride {steps}, dilation {gaps}, padding (left, right, top, bottom) = {(left, right, top, bottom)}: a {height} x {width} map "
            f"becomes {rows} x {columns}, not {height / steps[0]:g} x {width / steps[1]:g}. Choose another padding or a larger patch."
        )
    return [steps[0], *gaps, left, right, top, bottom, groups]


def _pair(name: str, value: int | Sequence[int], least: int) -> tuple[int, int]:
    pair = (value, value) if isinstance(value, int) else tuple(value) * (2 if len(value) == 1 else 1)
    if len(pair) != 2 or min(pair) < least:
        raise ValueError(f"tile_conv: {name} must be one or two integers of at least {least}, got {value}.")
    return pair


def _sides(padding: int | Sequence[int]) -> tuple[int, ...]:
    if not isinstance(padding, int) and len(padding) == 4:
        sides = tuple(padding)
    else:
        rows, columns = _pair("padding", padding, 0)
        sides = (columns, columns, rows, rows)
    if min(sides) < 0:
        raise ValueError(f"tile_conv: padding must not be negative, got {padding}.")
    return sides
