"""decode="hidden" against its dense mask-multiply twin in float64, and beside decode="dense"."""

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


def _toy(decode: str = "hidden", norm: str = "auto", net_norm: str = "batch", min_std: float = 0.0) -> MaskedImageModel:
    net = mwm.sparsify(dense_twin.ToyNet(norm=net_norm))
    model = MaskedImageModel(net, patch_size=8, decoder_width=16, min_std=min_std, norm=norm, decode=decode).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.3 * torch.randn_like(parameter) + (parameter.ndim == 1))
    return model


def _batch(batch: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    active = torch.rand(batch, 3, 2) < 0.5
    active[0, 0], active[-1] = torch.tensor([True, False]), False  # one image without a visible patch
    return torch.randn(batch, 2, 24, 16, dtype=torch.float64), active


def _pixels(active: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    return active.repeat_interleave(8, 1).repeat_interleave(8, 2)[:, None].expand_as(images)


def _grads(model: MaskedImageModel) -> dict[str, torch.Tensor]:
    return {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize(("norm", "net_norm", "min_std"), [("auto", "batch", 0.0), ("layer", "batch", 0.0), ("auto", "none", 0.9)])
def test_loss_and_gradients_equal_the_twin_whose_every_layer_is_multiplied_by_the_hidden_mask(norm: str, net_norm: str, min_std: float) -> None:
    model, (images, active) = _toy("hidden", norm, net_norm, min_std), _batch()
    twin = copy.deepcopy(model)
    loss, expected = model(images, active), dense_twin.twin_loss(twin, images, active, "hidden")
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-12)
    loss.backward()
    expected.backward()
    for (name, ours), theirs in zip(model.named_parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-11, msg=lambda text, name=name: f"{name}: {text}")


def test_the_two_modes_differ_where_some_patches_are_visible_and_agree_where_none_is() -> None:
    model, (images, active) = _toy(), _batch()
    dense = copy.deepcopy(model)
    dense.decode = "dense"
    assert not torch.allclose(model(images, active), dense(images, active), rtol=1e-3)
    nothing = torch.zeros_like(active)
    one, two = model(images, nothing), dense(images, nothing)
    torch.testing.assert_close(one, two, rtol=1e-11, atol=0)
    one.backward()
    two.backward()
    for name, grad in _grads(model).items():
        torch.testing.assert_close(grad, dict(dense.named_parameters())[name].grad, rtol=1e-9, atol=1e-11)


def test_a_checkpoint_of_one_mode_loads_into_the_other() -> None:
    hidden, dense = _toy("hidden"), _toy("dense")
    assert [(k, v.shape) for k, v in hidden.state_dict().items()] == [(k, v.shape) for k, v in dense.state_dict().items()]
    dense.load_state_dict(hidden.state_dict())
    images, active = _batch()
    dense.decode = "hidden"
    assert torch.equal(hidden.eval()(images, active), dense.eval()(images, active))


def test_running_statistics_are_those_of_hidden_positions() -> None:
    model, (images, active) = _toy(), _batch()
    norm = model.decoder.blocks[-1][2]
    seen = []
    model.decoder.blocks[-1][1].register_forward_hook(lambda _m, _i, out: seen.append(out.unpack(float("nan"))))
    model(images, active)
    values = seen[0].permute(0, 2, 3, 1).reshape(-1, norm.num_features)
    values = values[~values[:, 0].isnan()]
    assert len(values) == int((~active).sum()) * 64
    torch.testing.assert_close(norm.running_mean, 0.1 * values.mean(0))
    torch.testing.assert_close(norm.running_var, 0.9 + 0.1 * values.var(0))


def test_predictions_are_zero_where_visible_and_the_reconstruction_keeps_those_pixels() -> None:
    model, (images, active) = _toy().eval(), _batch()
    visible = _pixels(active, images)
    predicted = model.predict(images, active)
    assert predicted.shape == images.shape
    assert (predicted[visible] == 0).all() and (predicted[~visible] != 0).all()
    rebuilt = model.reconstruct(images, active)
    assert torch.equal(rebuilt[visible], images[visible])
    assert (rebuilt[~visible] != images[~visible]).all()


def test_hidden_pixels_reach_the_prediction_in_no_way() -> None:
    model, (images, active) = _toy(), _batch()
    images.requires_grad_()
    model.predict(images, active).square().sum().backward()
    visible = _pixels(active, images)
    assert (images.grad[~visible] == 0).all()
    assert (images.grad[visible] != 0).any()


def test_a_visible_neighbour_reaches_a_hidden_patch_through_the_densified_maps() -> None:
    model = _toy().eval()
    images, active = torch.randn(1, 2, 24, 16, dtype=torch.float64, requires_grad=True), torch.ones(1, 3, 2, dtype=torch.bool)
    active[0, 1, 0] = False
    model.predict(images, active)[:, :, 8:16, :8].square().sum().backward()
    reached = images.grad.abs().amax(1).view(3, 8, 2, 8).amax((1, 3))
    assert (reached[active[0]] > 0).all() and reached[1, 0] == 0


def test_tiles_of_other_images_change_nothing_in_eval_mode() -> None:
    model, (images, active) = _toy().eval(), _batch(1)
    alone = model.predict(images, active)
    beside = model.predict(torch.cat([images.flip(0).neg(), images, images.neg()]), torch.cat([~active, active, ~active]))[1:2]
    torch.testing.assert_close(alone, beside, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_all_or_nothing_hidden_trains_without_a_warning(share: float) -> None:
    model, (images, active) = _toy(), _batch()
    active[:] = share == 0.0
    loss = model(images, active)
    loss.backward()
    assert loss.isfinite() and (share == 1.0 or loss == 0)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())
    if share == 0.0:
        assert all(p.grad is None or (p.grad == 0).all() for p in model.parameters())
    assert model.reconstruct(images, active).shape == images.shape


def test_an_empty_batch_gives_no_loss() -> None:
    model = _toy()
    loss = model(torch.zeros(0, 2, 24, 16, dtype=torch.float64), torch.zeros(0, 3, 2, dtype=torch.bool))
    loss.backward()
    assert loss == 0


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


def test_steps_are_repeated_bit_for_bit_whatever_the_number_of_threads() -> None:
    net = mwm.sparsify(timm.create_model("resnet18", features_only=True, in_chans=1))
    model = MaskedImageModel(net, decoder_width=32, decode="hidden")
    images, active = torch.randn(2, 1, 96, 64), torch.tensor([[[1, 0], [0, 1], [0, 0]], [[0, 0], [1, 0], [1, 1]]], dtype=torch.bool)
    threads, results = torch.get_num_threads(), []
    try:
        for count in (2, 2, 1):
            torch.set_num_threads(count)
            copied = copy.deepcopy(model)
            loss = copied(images, active, visible=None)
            loss.backward()
            results.append({"loss": loss.detach(), **_grads(copied)})
    finally:
        torch.set_num_threads(threads)
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        torch.testing.assert_close(value, results[2][name], rtol=2e-3, atol=1e-5)  # torch's own dense convolutions round by threads


def test_a_real_encoder_learns_and_every_parameter_gets_a_gradient() -> None:
    model = MaskedImageModel(mwm.sparsify(timm.create_model("convnext_atto", features_only=True, in_chans=2)), patch_size=32, decoder_width=32, decode="hidden")
    images, active = torch.randn(2, 2, 64, 96), torch.tensor([[[1, 0, 1], [0, 1, 0]], [[0, 0, 1], [1, 1, 0]]], dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(4):
        optimizer.zero_grad()
        loss = model(images, active, visible=3)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_sum_reduction_gives_the_terms_of_the_mean_and_counts_flat_patches() -> None:
    model, (images, active) = _toy(min_std=0.05), _batch()
    images[-1, :, :8, :8] = 0.25
    terms = model(images, active, reduction="sum")
    torch.testing.assert_close(terms.total / terms.hidden, model(images, active))
    assert (terms.hidden, terms.flat_hidden) == ((~active).sum() - 1, 1)


def test_another_word_for_decode_is_refused() -> None:
    with pytest.raises(ValueError, match='decode must be "dense" or "hidden", got \'sparse\''):
        _toy("sparse")


def test_a_compiled_step_in_one_graph_equals_the_eager_one() -> None:
    model, (images, active) = _toy().float(), _batch()
    images, active[0, 1] = images.float(), True
    expected = torch.autograd.grad(model(images, active), list(model.parameters()))
    torch.compiler.reset()
    compiled = torch.compile(copy.deepcopy(model), fullgraph=True, backend="aot_eager")
    found = torch.autograd.grad(compiled(images, active), list(compiled.parameters()))
    torch.compiler.reset()
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("norm", ["batch", "layer"])
def test_the_densified_map_at_hidden_patches_is_that_of_the_whole_map(norm: str) -> None:
    model, (images, active) = _toy(norm=norm), _batch()
    maps, hidden = model.net(mwm.pack(images, active)), mwm.ops.build_plan(~active, 8)
    for stride, index in ((4, 1), (8, 2)):
        part = model.densify[str(stride)]
        whole = part(maps[index])
        torch.testing.assert_close(part.at_hidden(maps[index], hidden), mwm.ops.pack_tiles(whole, hidden), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(part.at_visible(maps[2]), mwm.ops.pack_tiles(whole, maps[2].plan), rtol=1e-11, atol=1e-12)
