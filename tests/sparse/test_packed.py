"""The contract of pack, Packed, sparsify and create_encoder."""

from __future__ import annotations

import copy
import io
import pickle

import pytest
import timm
import torch
import torchvision
from comparison import compare, randomise, some_mask
from torch import nn
from torch.nn import functional as F

import mwm


def net() -> nn.Module:
    torch.manual_seed(0)
    return timm.create_model("test_resnet", features_only=True, in_chans=1)


def batch(size: int = 64, count: int = 2, **kwargs) -> mwm.Packed:
    generator = torch.Generator().manual_seed(1)
    return mwm.pack(torch.randn(count, 1, size, size, generator=generator, **kwargs), some_mask(count, size // 32, size // 32))


def test_unpack_puts_the_visible_pixels_back_and_fills_the_hidden_ones() -> None:
    images, active = torch.randn(2, 3, 8, 12), some_mask(2, 2, 3)
    packed = mwm.pack(images, active)
    visible = active.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None]
    assert packed.shape == (int(active.sum()), 3, 4, 4) == packed.tiles.shape and packed.ndim == 4
    assert torch.equal(packed.unpack(7.0), torch.where(visible, images, 7.0))
    assert torch.equal(packed.active, active) and packed.dtype == torch.float32


def test_hidden_pixels_have_exactly_zero_gradient_even_where_they_are_not_numbers() -> None:
    model, active = mwm.sparsify(net()), some_mask(2, 2, 2)
    hidden = ~active.repeat_interleave(32, 1).repeat_interleave(32, 2)[:, None]
    images = torch.randn(2, 1, 64, 64).masked_fill(hidden, float("nan")).requires_grad_()
    total = sum(f.sum() for f in model(mwm.pack(images, active)))
    total.backward()
    assert total.isfinite() and torch.equal(images.grad[hidden], torch.zeros(int(hidden.sum())))
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize(("images", "active", "error", "words"), [
    (torch.zeros(2, 1, 8, 8), torch.ones(2, 3, 2, dtype=torch.bool), ValueError, "square patches on the grid 3 x 2"),
    (torch.zeros(2, 1, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool), ValueError, "one grid per image"),
    (torch.zeros(2, 1, 8, 8), torch.ones(2, 2, 2), TypeError, "bool"),
    (torch.zeros(2, 8, 8), torch.ones(2, 2, 2, dtype=torch.bool), ValueError, r"\[B, C, H, W\]"),
])
def test_pack_refuses_what_does_not_fit(images, active, error, words) -> None:
    with pytest.raises(error, match=words):
        mwm.pack(images, active)


def test_a_wrong_constant_count_is_refused() -> None:
    with pytest.raises(ValueError, match="visible"):
        mwm.pack(torch.zeros(1, 1, 8, 8), torch.tensor([[[True, True], [True, False]]]), visible=2)


@pytest.mark.parametrize("visible", [1.5, True, "3"])
def test_a_count_that_is_no_whole_number_is_refused_by_type(visible) -> None:
    with pytest.raises(TypeError, match="visible must be a whole number"):
        mwm.pack(torch.zeros(1, 1, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool), visible=visible)


def test_a_mask_on_the_cpu_goes_to_the_device_of_the_images() -> None:
    images, active = torch.zeros(2, 3, 8, 8, device="meta"), torch.tensor([[[True, True], [True, False]]] * 2)
    packed = mwm.pack(images, active)
    assert packed.shape == (6, 3, 4, 4) and packed.device == packed.plan.device == packed.active.device == torch.device("meta")


def test_operators_that_are_no_functions_per_position_are_refused_by_name() -> None:
    x = batch()
    for call, name in ((lambda: x @ x, "__matmul__"), (lambda: torch.zeros(32, 32) @ x, "matmul__"), (lambda: x << 1, "__lshift__"),
                       (lambda: 1 in x, "__contains__"), (lambda: float(x), "__float__"), (lambda: int(x), "__int__")):
        with pytest.raises(mwm.sparse.PackedError, match=name):
            call()


def test_type_and_device_are_read_and_changed_as_those_of_a_tensor() -> None:
    x = batch()
    assert x.type() == "torch.FloatTensor" and x.type(torch.float64).dtype == torch.float64
    assert torch.equal(x.cpu().tiles, x.tiles) and x.to("meta").plan.device == torch.device("meta")


def test_sparsify_keeps_keys_parameters_types_hooks_and_the_dense_answer() -> None:
    dense = net().eval()
    model = copy.deepcopy(dense)
    seen = []
    model.conv1.register_forward_hook(lambda module, args, out: seen.append(type(out).__name__))
    kinds, keys, ids = [type(m) for m in model.modules()], list(model.state_dict()), [id(p) for p in model.parameters()]
    assert mwm.sparsify(model) is model and mwm.sparsify(model) is model and mwm.sparse.is_sparsified(model)
    assert keys == list(model.state_dict()) and ids == [id(p) for p in model.parameters()]
    assert all(isinstance(m, kind) for m, kind in zip(model.modules(), kinds, strict=True))
    images = torch.randn(1, 1, 64, 64)
    for a, b in zip(model(images), dense(images), strict=True):
        assert torch.equal(a, b)
    model(batch())
    assert seen == ["Tensor", "Packed"]
    dense.load_state_dict(model.state_dict())


def test_copies_pickles_and_casts_stay_sparse() -> None:
    model = mwm.sparsify(timm.create_model("test_efficientnet", features_only=True, in_chans=1, drop_path_rate=0.1)).eval()
    expected = model(batch())[-1].unpack()
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert mwm.sparse.is_sparsified(twin) and torch.equal(twin(batch())[-1].unpack(), expected)
    wide = copy.deepcopy(model).double()(batch(dtype=torch.float64))[-1]
    assert wide.dtype == torch.float64 and wide.unpack().shape == expected.shape
    half = copy.deepcopy(model).to(torch.bfloat16)(batch(dtype=torch.bfloat16))[-1]
    assert half.dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.allclose(model(batch())[-1].unpack().float(), expected, atol=0.1 * expected.abs().max().item())
    buffer = io.BytesIO()
    torch.save(model.state_dict(), buffer)


def test_refusals_name_function_and_module() -> None:
    model = mwm.sparsify(nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.Sequential(nn.Flatten())))
    with pytest.raises(mwm.sparse.PackedError, match=r"flatten.* in module '1\.0' \(Flatten\)"):
        model(batch())
    with pytest.raises(mwm.sparse.PackedError, match=r"'blocks\.0\.attn' \(Attention\)|patch_embed"):
        mwm.sparsify(timm.create_model("test_vit"))
    with pytest.raises(TypeError, match="unfold"):
        F.unfold(batch(), 3)
    with pytest.raises(mwm.sparse.PackedError, match=r"normalize.* dimensions \(2, 3\)"):
        F.normalize(batch(), dim=(2, 3))
    with pytest.raises(TypeError, match=r"nn\.Module"):
        mwm.sparsify("resnet50")


def test_layers_that_compute_with_tile_sizes_are_refused() -> None:
    class HandMadeMean(nn.Module):
        def forward(self, x):
            _, _, height, width = x.shape
            return x * (x.sum((2, 3), keepdim=True) / (height * width))

    class Position(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Parameter(torch.ones(1, 1, 7, 7))

        def forward(self, x):
            return x + F.interpolate(self.embedding, size=x.shape[-2:])

    for layer in (HandMadeMean(), Position()):
        with pytest.raises(mwm.sparse.PackedError, match="height or width"):
            mwm.sparsify(layer)(batch())
    assert batch().shape[-1] * 2 == 64  # outside a net sizes are plain numbers


def test_a_patch_that_a_stride_does_not_divide_names_layer_stride_and_smallest_patch() -> None:
    model = mwm.sparsify(net())
    with pytest.raises(ValueError, match=r"stride 16 in module 'layer\d.*smallest legal patch") as error:
        model(mwm.pack(torch.zeros(1, 1, 48, 48), torch.ones(1, 2, 2, dtype=torch.bool)))
    assert "multiple of 32 pixels" in str(error.value)


def test_patches_need_not_be_a_power_of_two() -> None:
    result = compare(randomise(net()), some_mask(2, 2, 2), channels=1, patch=96)
    assert result.worst < 1e-7, result.where


def test_a_mask_written_to_after_packing_changes_no_number_in_silence() -> None:
    images, active = torch.rand(1, 2, 8, 8) - 2, torch.tensor([[[True, True], [False, False]]])
    first = mwm.pack(images, active)
    expected = first.amax((2, 3))
    active.logical_not_()
    assert torch.equal(first.amax((2, 3)), expected) and (expected < 0).all()
    with pytest.raises(mwm.sparse.PackedError, match="different masks"):
        first + mwm.pack(images, active)


def test_packed_by_hand_needs_tiles_and_their_plan() -> None:
    plan = mwm.pack(torch.zeros(1, 1, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool)).plan
    assert mwm.Packed(torch.zeros(4, 3, 2, 2), plan).unpack().shape == (1, 3, 4, 4)
    for tiles, place, error in (([1], plan, TypeError), (torch.zeros(4, 1, 4, 4), None, TypeError), (torch.zeros(3, 1, 4, 4), plan, ValueError)):
        with pytest.raises(error, match="Packed: "):
            mwm.Packed(tiles, place)


def test_operands_of_other_masks_strides_or_dense_maps_are_refused() -> None:
    x, other = batch(), batch(count=3)
    with pytest.raises(TypeError, match="different masks"):
        x + other
    with pytest.raises(TypeError, match="where it is visible"):
        x + torch.zeros(2, 1, 32, 32)
    with pytest.raises(ValueError, match="different strides"):
        x + F.avg_pool2d(x, 2)
    with pytest.raises(TypeError, match="neither 1 nor one row per image"):
        x * torch.zeros(5, 1, 1, 1)
    with pytest.raises(TypeError, match="padding"):
        F.relu(F.pad(x, (1, 1, 1, 1)))


def test_reductions_are_per_image_and_zero_without_a_visible_patch() -> None:
    active = torch.zeros(3, 2, 2, dtype=torch.bool)
    active[0, 0, 0] = active[2] = True
    images = torch.randn(3, 2, 8, 8)
    packed = mwm.pack(images, active)
    mean = packed.mean((2, 3), keepdim=True)
    assert mean.shape == (3, 2, 1, 1)
    assert torch.allclose(mean[0, :, 0, 0], images[0, :, :4, :4].mean((1, 2))) and torch.equal(mean[1], torch.zeros(2, 1, 1))
    assert torch.allclose(F.adaptive_avg_pool2d(packed, 1)[2, :, 0, 0], images[2].mean((1, 2)))
    assert torch.equal((packed * mean).unpack()[1], torch.zeros(2, 8, 8))


def test_work_in_place_on_a_contiguous_copy_does_not_reach_the_original() -> None:
    x = mwm.pack(torch.randn(1, 4, 8, 8), torch.ones(1, 2, 2, dtype=torch.bool))
    before = x.unpack()
    x[:, :2].contiguous().add_(1)
    x.permute(0, 2, 3, 1).contiguous().mul_(2)
    assert torch.equal(x.unpack(), before)
    x[:, :2].add_(1)
    assert torch.equal(x.unpack()[:, :2], before[:, :2] + 1)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_batch_norm_of_one_value_moves_only_the_mean_and_of_none_nothing(momentum: float | None) -> None:
    norm = mwm.sparsify(nn.BatchNorm2d(3, momentum=momentum)).train()
    images, active = torch.randn(1, 3, 2, 2), torch.zeros(1, 2, 2, dtype=torch.bool)
    nothing = norm(mwm.pack(images, active))
    assert nothing.shape == (0, 3, 1, 1)
    assert torch.equal(norm.running_mean, torch.zeros(3)) and torch.equal(norm.running_var, torch.ones(3))
    active[0, 1, 0] = True
    one = norm(mwm.pack(images.requires_grad_(), active))
    assert torch.allclose(one.tiles.flatten(), norm.bias)
    assert torch.equal(norm.running_var, torch.ones(3)) and norm.running_mean.abs().min() > 0
    one.sum().backward()
    assert torch.equal(images.grad, torch.zeros_like(images)) and torch.equal(norm.bias.grad, torch.ones(3))


@pytest.mark.parametrize("name", ["test_resnet", "test_convnext2", "test_efficientnet_gn"])
def test_empty_batches_run_forward_and_backward(name: str) -> None:
    model = mwm.sparsify(timm.create_model(name, features_only=True, in_chans=1)).train()
    for count in (0, 2):
        maps = model(mwm.pack(torch.zeros(count, 1, 64, 64), torch.zeros(count, 2, 2, dtype=torch.bool)))
        sum(f.sum() for f in maps).backward()
        assert [len(f.tiles) for f in maps] == [0] * len(maps)
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


class Dropping(nn.Module):
    """Three kinds of noise per image."""

    def __init__(self) -> None:
        super().__init__()
        self.path, self.depth, self.channels = timm.layers.DropPath(0.5), torchvision.ops.StochasticDepth(0.5, "row"), nn.Dropout2d(0.5)

    def forward(self, x):
        return [self.path(x), self.depth(x), self.channels(x)]


def test_noise_is_one_draw_per_image() -> None:
    model = mwm.sparsify(Dropping()).train()
    packed = mwm.pack(torch.ones(64, 3, 4, 4), torch.ones(64, 2, 2, dtype=torch.bool))
    path, depth, channels = (x.unpack() for x in model(packed))
    for x in (path, depth):
        assert all(image.unique().numel() == 1 and image.max() in (0.0, 2.0) for image in x)
        assert 16 < (x[:, 0, 0, 0] > 0).sum() < 48
    assert all(c.unique().numel() == 1 for image in channels for c in image)
    assert 48 < (channels[:, :, 0, 0] > 0).sum() < 144


def test_noise_in_a_random_state_is_a_function_of_the_image_alone() -> None:
    model = mwm.sparsify(Dropping()).train()
    ids = torch.arange(40) * 7919

    def packed(count: int) -> mwm.Packed:
        return mwm.pack(torch.ones(count, 3, 4, 4), torch.ones(count, 2, 2, dtype=torch.bool))

    def draw(order, epoch=2):
        with mwm.sparse.random_state(seed=5, ids=ids[order], epoch=epoch, view=0):
            return [x.unpack() for x in model(packed(len(order)))]

    everything, some = draw(torch.arange(40)), torch.tensor([31, 4, 17])
    before = torch.get_rng_state()
    for whole, part in zip(everything, draw(some), strict=True):
        assert torch.equal(whole[some], part)
    assert torch.equal(before, torch.get_rng_state())
    assert not torch.equal(everything[0], draw(torch.arange(40), epoch=3)[0])
    assert not torch.equal(everything[0][:, 0, 0, 0], everything[1][:, 0, 0, 0])  # layers differ
    with pytest.raises(ValueError, match="one number per image"), mwm.sparse.random_state(seed=5, ids=ids, epoch=0):
        model(packed(3))


@pytest.mark.filterwarnings("ignore:Grad strides do not match bucket view strides")
def test_data_parallel_wrapping_gives_the_same_gradients(tmp_path) -> None:
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        plain = mwm.sparsify(net()).train()
        wrapped = nn.parallel.DistributedDataParallel(copy.deepcopy(plain))
        for model in (plain, wrapped):
            sum(f.tiles.square().sum() for f in model(batch())).backward()
        for a, b in zip(plain.parameters(), wrapped.module.parameters(), strict=True):
            assert torch.equal(a.grad, b.grad)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("name", ["resnet18", "test_convnext", "torchvision/resnet18", "torchvision/densenet121", "torchvision/mobilenet_v3_small"])
def test_encoders_by_name_are_pyramids_with_the_weights_of_the_plain_model(name: str) -> None:
    torch.manual_seed(3)
    encoder = mwm.create_encoder(name, in_chans=3)
    torch.manual_seed(3)
    plain = torchvision.models.get_model(name.partition("/")[2]) if "/" in name else timm.create_model(name, features_only=True)
    state = plain.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in encoder.state_dict().items())
    dense = encoder.eval()(torch.randn(1, 3, 64, 64))
    assert [m.shape[1] for m in dense] == list(encoder.channels)
    assert [64 // m.shape[2] for m in dense] == list(encoder.strides) and len(set(encoder.strides)) == len(dense)
    maps = mwm.sparsify(encoder)(mwm.pack(torch.randn(1, 3, 64, 64), torch.ones(1, 2, 2, dtype=torch.bool)))
    assert [m.shape[1] for m in maps] == list(encoder.channels)


def test_encoders_take_any_number_of_channels_and_refuse_unknown_names() -> None:
    for name in ("test_resnet", "torchvision/resnet18"):
        assert len(mwm.create_encoder(name, in_chans=2)(torch.zeros(2, 2, 64, 64))) >= 4
    for name in ("resnet5000", "torchvision/resnet5000", "torchvision/vit_b_16"):
        with pytest.raises(ValueError, match="create_encoder"):
            mwm.create_encoder(name)


def test_no_name_of_torchvision_fetches_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda *_, **__: pytest.fail("weights are fetched"))
    with pytest.raises(ValueError, match="no classification model of torchvision"):
        mwm.create_encoder("torchvision/fcn_resnet50")
