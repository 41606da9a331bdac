"""The arithmetic of an encoder equals the figure that torchvision publishes."""

from __future__ import annotations

import pytest
import torchvision

from mwm.study.flops import dense_gflop


@pytest.mark.parametrize(("name", "weights"), [("torchvision/resnet18", torchvision.models.ResNet18_Weights), ("resnet50", torchvision.models.ResNet50_Weights)])
def test_flops_are_twice_the_published_multiply_adds(name: str, weights) -> None:
    published = weights.DEFAULT.meta["_ops"]
    head = 2 * 1e-9 * 1000 * (2048 if name == "resnet50" else 0)  # our timm encoder has no classifier
    assert dense_gflop(name, (224, 224), 3) == pytest.approx(2 * published - head, rel=2e-3)


def test_a_grey_image_of_half_the_edge_costs_a_quarter() -> None:
    assert dense_gflop("resnet18", (64, 64), 1) == pytest.approx(dense_gflop("resnet18", (128, 128), 1) / 4, rel=0.01)


def test_a_grey_image_costs_the_same_in_both_libraries() -> None:
    assert dense_gflop("torchvision/resnet18", (64, 64), 1) == pytest.approx(dense_gflop("resnet18", (64, 64), 1), rel=1e-4)
