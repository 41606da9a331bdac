"""The probe finds what is linear, reports no more than there is, and its rivals are computed fairly."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from mwm.transfer import linear_probe, pixel_statistics, recalibrate_batchnorm


def patients_of(n: int, prefix: str) -> list[str]:
    return [f"{prefix}{k // 2}" for k in range(n)]


def test_probe_separates_linear_classes_and_not_noise() -> None:
    rng = np.random.default_rng(0)
    y, y_test = rng.integers(0, 2, 80), rng.integers(0, 2, 80)
    signal = lambda labels: rng.normal(size=(80, 6)) * 50 + 100 * np.outer(labels, [1, 0, 0, 1, 0, 0])  # noqa: E731
    good = linear_probe(signal(y), y, signal(y_test), y_test, patients_of(80, "t"), rounds=200)
    noise = linear_probe(rng.normal(size=(80, 6)), y, rng.normal(size=(80, 6)), y_test, patients_of(80, "t"), rounds=200)
    assert good.auroc > 0.9
    assert good.low <= good.auroc <= good.high
    assert (good.images, good.patients) == (80, 40)
    assert noise.low < 0.5 < noise.high


def test_probe_does_not_depend_on_the_scale_of_features() -> None:
    rng = np.random.default_rng(1)
    y, y_test = rng.integers(0, 2, 60), rng.integers(0, 2, 40)
    x, x_test = rng.normal(size=(60, 4)) + y[:, None], rng.normal(size=(40, 4)) + y_test[:, None]
    scale, shift = np.array([1e-3, 1, 10, 1e3]), np.array([5, -3, 0, 100])
    plain = linear_probe(x, y, x_test, y_test, patients_of(40, "t"), rounds=50)
    scaled = linear_probe(x * scale + shift, y, x_test * scale + shift, y_test, patients_of(40, "t"), rounds=50)
    assert scaled.auroc == pytest.approx(plain.auroc, abs=1e-6)


def test_test_labels_do_not_influence_the_fit() -> None:
    rng = np.random.default_rng(2)
    x, y, x_test = rng.normal(size=(40, 3)), rng.integers(0, 2, 40), rng.normal(size=(20, 3))
    labels = np.array([0, 1] * 10)
    first = linear_probe(x, y, x_test, labels, patients_of(20, "t"), rounds=20)
    second = linear_probe(x, y, x_test, 1 - labels, patients_of(20, "t"), rounds=20)
    assert np.array_equal(first.probabilities, second.probabilities)
    assert second.auroc == pytest.approx(1 - first.auroc)


def test_probe_knows_three_classes() -> None:
    rng = np.random.default_rng(3)
    y, y_test = np.arange(90) % 3, np.arange(45) % 3
    x, x_test = rng.normal(size=(90, 3)) + 3 * np.eye(3)[y], rng.normal(size=(45, 3)) + 3 * np.eye(3)[y_test]
    result = linear_probe(x, y, x_test, y_test, patients_of(45, "t"), groups_fit=patients_of(90, "f"), rounds=100)
    assert result.auroc > 0.9
    assert result.probabilities.shape == (45, 3)


@pytest.mark.parametrize(("change", "words"), [
    ({"labels_fit": np.zeros(10, int)}, "labels_fit must hold at least two classes"),
    ({"labels_test": np.array([0, 1, 2, 0, 1, 2])}, "labels_test must occur in labels_fit"),
    ({"features_test": np.full((6, 2), np.nan)}, "features_test must be finite"),
    ({"groups": ["a"]}, "groups must name the patient"),
    ({"groups_fit": ["a"] * 5 + ["t1"] * 5}, "groups must be other patients"),
])
def test_probe_refuses_what_would_mislead(change, words) -> None:
    rng = np.random.default_rng(4)
    arguments = {"features_fit": rng.normal(size=(10, 2)), "labels_fit": np.array([0, 1] * 5), "features_test": rng.normal(size=(6, 2)),
                 "labels_test": np.array([0, 1] * 3), "groups": patients_of(6, "t")}
    with pytest.raises(ValueError, match=words):
        linear_probe(**(arguments | change))


def test_recalibrated_batch_norm_holds_the_statistics_of_the_images_and_no_weight_moves() -> None:
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.5))
    before = {k: v.clone() for k, v in model.named_parameters()}
    images = 3 + 2 * torch.randn(32, 1, 8, 8)
    recalibrate_batchnorm(model, [images[:16], images[16:]])
    with torch.no_grad():
        inner = model[0](images)
    assert torch.allclose(model[1].running_mean, inner.mean((0, 2, 3)), atol=1e-4)
    assert torch.allclose(model[1].running_var, inner.var((0, 2, 3)), rtol=0.1)
    assert all(torch.equal(v, before[k]) for k, v in model.named_parameters())
    assert not model.training
    assert model[1].momentum == 0.1


def test_a_rest_of_one_image_counts_as_one_image() -> None:
    model, images = nn.Sequential(nn.BatchNorm2d(2)), torch.randn(9, 2, 1, 1)
    images[8] += 100
    recalibrate_batchnorm(model, [images[:4], images[4:8], images[8:]])  # alone, one value has no variance
    whole = torch.stack([images[:4].mean((0, 2, 3)), images[4:].mean((0, 2, 3))]).mean(0)
    assert torch.allclose(model[0].running_mean, whole, atol=1e-4)
    recalibrate_batchnorm(model, list(images[:6].split(1)))
    assert torch.allclose(model[0].running_mean, images[:6].mean((0, 2, 3)), atol=1e-4)


def test_recalibration_without_images_is_refused_and_changes_nothing() -> None:
    model = nn.Sequential(nn.BatchNorm2d(2))
    model[0].running_mean.fill_(7)
    with pytest.raises(ValueError, match="at least one batch"):
        recalibrate_batchnorm(model, [])
    assert model[0].running_mean.tolist() == [7, 7]
    assert model[0].momentum == 0.1


def test_pixel_statistics_tell_brightness_and_place_and_nothing_of_the_batch() -> None:
    images = torch.rand(3, 1, 16, 24)
    images[0] *= 0.2
    images[1, :, :, 12:] = 1
    table = pixel_statistics(images)
    assert table.shape == (3, 27)
    assert table[0, 0] < table[2, 0] < table[1, 0]
    coarse = table[1, 11:].reshape(4, 4)
    assert coarse[:, 2:].mean() == pytest.approx(1)
    assert np.allclose(pixel_statistics(images[1:2]), table[1:2], rtol=1e-12)
