"""MaskedImageModel against its dense twin in float64, and on real encoders."""

from __future__ import annotations

import copy
import importlib.util
from pathlib import Path

import pytest
import timm
import torch

import mwm
from mwm.mim import MaskedImageModel

_spec = importlib.util.spec_from_file_location("dense_twin", Path(__file__).with_name("dense_twin.py"))
dense_twin = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(dense_twin)


def _toy(norm: str = "auto", net_norm: str = "batch", min_std: float = 0.0) -> MaskedImageModel:
    model = MaskedImageModel(mwm.sparsify(dense_twin.ToyNet(norm=net_norm)), patch_size=8, decoder_width=16, min_std=min_std, norm=norm).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model


def _batch(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    active = torch.rand(batch, 3, 2) < 0.5
    active[0, 0], active[-1] = torch.tensor([True, False]), False  # one image without a visible patch
    return torch.randn(batch, 2, 24, 16, dtype=torch.float64), active


@pytest.mark.parametrize(("norm", "net_norm", "min_std"), [("auto", "batch", 0.0), ("layer", "batch", 0.0), ("auto", "none", 0.9)])
def test_loss_and_gradients_equal_the_dense_mask_multiply_twin(norm: str, net_norm: str, min_std: float) -> None:
    model, (images, active) = _toy(norm, net_norm, min_std), _batch()
    twin = copy.deepcopy(model)
    loss, expected = model(images, active), dense_twin.twin_loss(twin, images, active)
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_hidden_pixels_reach_the_loss_only_as_targets() -> None:
    model, (images, active) = _toy(), _batch()
    hidden = (~active).repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(images)
    one = model.predict(images, active)
    two = model.predict(torch.where(hidden, torch.randn_like(images), images), active)
    assert torch.equal(one, two)


def test_dry_run_finds_channels_and_strides_and_moves_no_statistic() -> None:
    net = mwm.sparsify(timm.create_model("resnet18", features_only=True, in_chans=1)).train()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    model = MaskedImageModel(net, decoder_width=32)
    assert (model.strides, model.channels, model.in_chans) == ([4, 8, 16, 32], [64, 128, 256, 512], 1)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert model.unreached == ()


@pytest.mark.parametrize(("name", "norm"), [("resnet18", "VisibleBatchNorm"), ("convnext_atto", "VisibleLayerNorm"), ("densenet121", "VisibleBatchNorm"),
                                            ("efficientnet_b0", "VisibleBatchNorm")])
def test_timm_encoders_train_on_any_channels_and_shape(name: str, norm: str) -> None:
    net = mwm.sparsify(timm.create_model(name, features_only=True, in_chans=2))
    model = MaskedImageModel(net, patch_size=32, decoder_width=32)
    assert type(model.densify["32"].norm).__name__ == norm
    images, active = torch.randn(2, 2, 64, 96), torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(images, active, visible=None)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_reconstruction_keeps_visible_pixels_and_rebuilds_the_rest() -> None:
    model, (images, active) = _toy().eval(), _batch()
    rebuilt = model.reconstruct(images, active)
    visible = active.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(images)
    assert rebuilt.shape == images.shape
    assert torch.equal(rebuilt[visible], images[visible])
    assert (rebuilt[~visible] != images[~visible]).all()
    assert not rebuilt.requires_grad


def test_bfloat16_autocast_stays_near_float32() -> None:
    model, (images, active) = _toy().float(), _batch()
    images = images.float()
    plain = model(images, active)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(images, active)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, plain, rtol=0.05, atol=0)
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_maps_may_come_as_a_dict_and_one_per_stride_is_used() -> None:
    class Named(dense_twin.ToyNet):
        def forward(self, x):
            two, four, eight = super().forward(x)
            return {"two": two, "four": four, "eight early": eight, "eight": torch.relu(eight)}

    model = MaskedImageModel(mwm.sparsify(Named()), patch_size=8, decoder_width=16)
    assert (model.strides, model.channels, model._maps) == ([4, 8], [6, 8], [1, 3])


def test_parameters_that_no_map_in_use_depends_on_are_named_and_the_others_get_gradients() -> None:
    class Aside(dense_twin.ToyNet):
        def __init__(self) -> None:
            super().__init__()
            self.aside = torch.nn.Conv2d(8, 5, 1)

        def forward(self, x):
            two, four, eight = super().forward(x)
            return [two, four, self.aside(eight), eight]

    model = MaskedImageModel(mwm.sparsify(Aside()), patch_size=8, decoder_width=16)
    assert model.unreached == ("aside.weight", "aside.bias")
    images, active = _batch()
    model(images.float(), active).backward()
    assert {name for name, p in model.net.named_parameters() if p.grad is None} == set(model.unreached)


def test_sum_reduction_gives_the_terms_of_the_mean() -> None:
    model, (images, active) = _toy(), _batch()
    terms = model(images, active, reduction="sum")
    torch.testing.assert_close(terms.total / terms.hidden, model(images, active))
    assert terms.hidden == (~active).sum()


@pytest.mark.parametrize(("change", "words"), [
    ({"images": torch.zeros(3, 3, 24, 16)}, "images must be"),
    ({"images": torch.zeros(3, 2, 20, 16)}, "patch_size 8 must divide"),
    ({"active": torch.ones(3, 2, 2, dtype=torch.bool)}, "active must be"),
    ({"active": torch.ones(3, 3, 2)}, "active must be"),
])
def test_wrong_batches_are_refused_with_both_sizes(change: dict, words: str) -> None:
    model, (images, active) = _toy(), _batch()
    with pytest.raises(ValueError, match=words):
        model(**{"images": images, "active": active, **change})


@pytest.mark.parametrize(("settings", "words"), [
    ({"decoder_width": 20}, "decoder_width must be a multiple of 8"),
    ({"norm": "group"}, "norm must be"),
    ({"min_std": -1.0}, "min_std must be"),
    ({"patch_size": 0}, "patch_size must be a positive"),
    ({"patch_size": 8.0}, "patch_size must be a positive"),
])
def test_wrong_settings_are_refused(settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        MaskedImageModel(mwm.sparsify(dense_twin.ToyNet()), **{"patch_size": 8, "decoder_width": 16, **settings})


def test_dense_nets_and_classifiers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"Pass mwm\.sparsify"):
        MaskedImageModel(dense_twin.ToyNet())
    with pytest.raises(ValueError, match="net must return maps"):
        MaskedImageModel(mwm.sparsify(timm.create_model("resnet18")), decoder_width=32)
