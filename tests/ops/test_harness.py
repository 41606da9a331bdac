"""The harness must find what it is there to find."""

from __future__ import annotations

import harness
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor


def _inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [harness.normals((2, 3, 6, 5), generator), harness.normals((4, 3, 3, 3), generator)]


def _dense(x: Tensor, weight: Tensor) -> Tensor:
    return F.conv2d(x, weight, padding=1)


def _by_taps(x: Tensor, weight: Tensor, *, skip: int | None = None, shift: int = 0) -> Tensor:
    """The same convolution as nine shifted products; `skip` drops one tap, `shift` reads one row off."""
    padded = F.pad(x, (1, 1, 1, 1))
    out = torch.zeros_like(F.conv2d(x, weight, padding=1))
    for tap in range(9):
        if tap == skip:
            continue
        row, column = tap // 3, tap % 3
        rows = padded.roll(shift, 2)[:, :, row : row + x.shape[2], column : column + x.shape[3]]
        out = out + torch.einsum("nchw,kc->nkhw", rows, weight[:, :, row, column])
    return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_another_order_of_the_same_sums_passes_in_float32_and_float64(dtype: torch.dtype) -> None:
    findings = harness.check(_by_taps, _dense, _inputs(), dtype=dtype, threads=(1,))
    assert [finding.name for finding in findings] == ["value", "gradient 0", "gradient 1"]


@pytest.mark.parametrize("tap", range(9))
def test_a_dropped_tap_fails(tap: int) -> None:
    with pytest.raises(AssertionError, match="value"):
        harness.check(lambda x, w: _by_taps(x, w, skip=tap), _dense, _inputs())


def test_a_row_off_fails() -> None:
    with pytest.raises(AssertionError, match="value"):
        harness.check(lambda x, w: _by_taps(x, w, shift=1), _dense, _inputs())


def test_a_wrong_gradient_fails_although_the_value_is_right() -> None:
    def wrong(x: Tensor, weight: Tensor) -> Tensor:
        return _dense(x, weight) + 1e-4 * (weight - weight.detach()).sum()

    with pytest.raises(AssertionError, match="gradient 1"):
        harness.check(wrong, _dense, _inputs(), threads=(1,))


def test_nan_fails() -> None:
    def poisoned(x: Tensor, weight: Tensor) -> Tensor:
        out = _dense(x, weight)
        return torch.where(torch.arange(out.numel()).reshape(out.shape) == 17, torch.nan, out)

    with pytest.raises(AssertionError, match="value"):
        harness.check(poisoned, _dense, _inputs(), threads=(1,))


def test_half_precision_accumulation_fails_in_float32() -> None:
    with pytest.raises(AssertionError, match="value"):
        harness.check(lambda x, w: _dense(x.bfloat16(), w.bfloat16()).float(), _dense, _inputs(), threads=(1,))


def test_a_result_that_changes_between_runs_fails() -> None:
    calls = iter(range(100))
    with pytest.raises(AssertionError, match="bitwise"):
        harness.check(lambda x, w: _dense(x, w) * (1 + 1e-7 * next(calls)), _dense, _inputs())


def test_exact_mode_demands_equality() -> None:
    generator = torch.Generator().manual_seed(1)
    inputs = [harness.integers((2, 3, 6, 5), generator), harness.integers((4, 3, 3, 3), generator)]
    for dtype in (torch.float32, torch.bfloat16):
        harness.check(_dense, _dense, inputs, dtype=dtype, exact=True)
    with pytest.raises(AssertionError, match="value"):
        harness.check(lambda x, w: _dense(x, w) * (1 + 2**-20), _dense, inputs, exact=True)


def test_a_wrong_shape_fails() -> None:
    with pytest.raises(AssertionError, match="shape"):
        harness.check(lambda x, w: _dense(x, w)[:, :, :-1], _dense, _inputs(), gradients=False)
