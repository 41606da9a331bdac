from __future__ import annotations

import math
import random

import harness
import pytest
import torch
from torch import Tensor

from mwm import ops
from mwm.ops import reference

FLOATS = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def _both(region: Tensor, grid: tuple[int, int], **settings: float) -> tuple[Tensor, Tensor]:
    inside, cover = ops.region_coverage(region, grid, **settings, backend="cpu")
    expected = ops.region_coverage(region, grid, **settings, backend="reference")
    assert torch.equal(inside, expected[0])
    assert torch.equal(cover, expected[1])
    return inside, cover


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("size", "grid"), [((14, 21), (7, 7)), ((64, 96), (2, 3)), ((5, 3), (5, 1)), ((9, 9), (1, 1)), ((32, 35), (4, 5))])
def test_native_equals_the_reference(size: tuple[int, int], grid: tuple[int, int], dtype: torch.dtype, isa: str) -> None:
    region = (torch.rand(5, *size) * 1.4 - 0.2).to(dtype)  # also beyond [0, 1]: clamped
    region[1] = 0
    region[2] = 1
    inside, cover = _both(region, grid)
    assert not inside[1].any()
    assert (cover[2] == 255 * (size[0] // grid[0]) * (size[1] // grid[1])).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_rounding_is_half_to_even_at_every_step_of_eight_bits(dtype: torch.dtype, isa: str) -> None:
    """Values at and around (k + 0.5) / 255, in the arithmetic of the dtype: one pixel per patch shows each rounding."""
    middle = (torch.arange(256, dtype=torch.float64) + 0.5) / 255
    values = torch.cat([middle, middle - 1e-7, middle + 1e-7, torch.arange(256) / 255]).to(dtype).reshape(1, 32, 32)
    _, cover = _both(values, (32, 32))
    wide = values.double() if dtype == torch.float64 else values.float()
    assert torch.equal(cover, (wide * 255).round().clamp(0, 255).long())


def test_infinities_are_clamped_and_nan_is_refused(isa: str) -> None:
    region = torch.zeros(1, 4, 4)
    region[0, 0, 0], region[0, 3, 3] = torch.inf, -torch.inf
    _, cover = _both(region, (2, 2))
    assert cover.tolist() == [[[255, 0], [0, 0]]]
    for backend in ("cpu", "reference"):
        for dtype in FLOATS:
            for place in range(16):
                bad = torch.rand(2, 4, 4).to(dtype)
                bad[1].view(-1)[place] = torch.nan
                with pytest.raises(ValueError, match="contains NaN"):
                    ops.region_coverage(bad, (2, 2), backend=backend)


def test_threshold_is_the_ceiling_of_the_decimal_share() -> None:
    """min_cover = 0.1 of 40 pixels is 1020 exactly, although the float 0.1 is a little more."""
    region = torch.zeros(1, 4, 10)
    region[0, 0, :4] = 1  # 4 pixels: 1020
    inside, cover = _both(region, (1, 1), min_cover=0.1)
    assert cover.item() == 1020
    assert inside.item()
    for share in (0.25, 0.3, 1 / 3, 0.7, 1.0):
        for pixels in range(41):
            region = (torch.arange(80).reshape(2, 4, 10) % 40 < pixels).float()
            region[1] = 1  # another image, so that claims of the first do not matter
            region = region.reshape(1, 8, 10)
            inside, _ = _both(region, (2, 1), min_cover=share)
            assert inside[0, 0, 0].item() == (255 * pixels >= math.ceil(round(share * 255 * 40, 6)))


def test_a_region_that_reaches_no_patch_claims_its_best_covered_one_the_lowest_on_ties() -> None:
    region = torch.zeros(4, 6, 6)
    region[0, 4, 4] = 1  # one pixel of nine
    region[1, 0, 4], region[1, 5, 0] = 0.5, 0.5  # a tie between patches 1 and 2
    region[2, 0, 0] = 0.001  # rounds to zero: an empty region claims nothing
    region[3, :3, :3] = 1
    inside, _ = _both(region, (2, 2))
    assert inside.flatten(1).tolist() == [[False, False, False, True], [False, True, False, False], [False] * 4, [True, False, False, False]]


def test_bool_regions_and_any_strides(isa: str) -> None:
    region = torch.rand(3, 8, 12) < 0.3
    inside, cover = _both(region, (2, 3))
    assert torch.equal(_both(region.float(), (2, 3))[1], cover)
    wide = torch.full((3, 8, 24), torch.nan)
    wide[..., ::2] = region.float()
    for other in (wide[..., ::2], region.float().permute(2, 0, 1).contiguous().permute(1, 2, 0), region[:1].float().expand(3, 8, 12)):
        _both(other, (2, 3))
    assert torch.equal(_both(wide[..., ::2], (2, 3))[0], inside)


def test_long_rows_do_not_overflow_32_bits() -> None:
    region = torch.ones(1, 1, 9_000_000)
    assert _both(region, (1, 1))[1].item() == 255 * 9_000_000


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_empty_batch(backend: str) -> None:
    inside, cover = ops.region_coverage(torch.zeros(0, 8, 8), (2, 2), backend=backend)
    assert inside.shape == cover.shape == (0, 2, 2)


def test_results_do_not_depend_on_the_number_of_threads() -> None:
    region = torch.rand(16, 224, 224)
    results = []
    for count in (1, 2, 3):
        with harness.num_threads(count):
            results.append(ops.region_coverage(region, (7, 7)))
    assert all(torch.equal(inside, results[0][0]) and torch.equal(cover, results[0][1]) for inside, cover in results)


def test_random_regions_agree_where_float_sums_would_not() -> None:
    """Regions with many patches exactly at the threshold."""
    random.seed(0)
    edge = 8
    need = math.ceil(0.25 * 255 * edge * edge)
    for _ in range(30):
        values = torch.zeros(edge * edge, dtype=torch.int64)
        left = need
        while left:
            i = random.randrange(edge * edge)
            step = min(left, 255 - int(values[i]), random.randint(1, 60))
            values[i] += step
            left -= step
        for change, expected in ((0, True), (-1, False)):
            shifted = values.clone()
            shifted[int(shifted.argmax())] += change
            region = torch.zeros(1, edge, 2 * edge)
            region[0, :, :edge] = (shifted / 255).float().reshape(edge, edge)
            region[0, :, edge:] = 1  # so that the patch in question cannot claim itself
            assert _both(region, (1, 2))[0][0, 0, 0].item() == expected


@pytest.mark.parametrize(
    ("shape", "grid", "min_cover", "message"),
    [
        ((8, 8), (2, 2), 0.25, r"\[B, H, W\]"),
        ((1, 9, 8), (2, 2), 0.25, "must divide into the grid 2 x 2, got H x W = 9 x 8"),
        ((1, 8, 8), (0, 2), 0.25, "grid"),
        ((1, 8, 8), (2, 2), 0.0, "min_cover"),
        ((1, 8, 8), (2, 2), 1.1, "min_cover"),
    ],
)
def test_wrong_arguments_are_refused(shape: tuple, grid: tuple, min_cover: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ops.region_coverage(torch.zeros(shape), grid, min_cover=min_cover)


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_opcheck(backend: str) -> None:
    torch.library.opcheck(torch.ops.mwm.region_coverage.default, (torch.rand(2, 8, 12), 2, 3, 1, 4, backend))


def test_quantise_is_the_one_definition() -> None:
    assert reference.quantise(torch.tensor([0.0, 0.5 / 255, 1.5 / 255, 1.0, 2.0, -1.0])).tolist() == [0, 0, 2, 255, 255, 0]
