"""Where a task starts from: random weights are those of pre-training, files of weights fit or are refused, the head is the same for every arm."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from mwm.data import UnreadableImage, read_list
from mwm.train import PretrainConfig, TrainError
from mwm.train.build import build_model
from mwm.train.distributed import World
from mwm.train.export import full_model, head_keys, name_map
from mwm.transfer import FinetuneConfig, TransferError
from mwm.transfer.images import decode_cases
from mwm.transfer.labelled import read_labelled
from mwm.transfer.start import initial_state, open_start, read_state


def settings(index: Path, tmp_path: Path, **changes) -> FinetuneConfig:
    return FinetuneConfig(**({"data": str(index), "encoder": "resnet10t", "init": "scratch", "image_size": 32, "out": str(tmp_path / "out"), "seed": 4} | changes))


def test_random_weights_are_those_that_pretraining_of_the_seed_starts_from() -> None:
    config = PretrainConfig(images="i", out="o", encoder="resnet10t", channels=1, image_size=64, decoder_width=32, seed=4)
    net = build_model(config, World(0, 1, torch.device("cpu"))).net
    names = name_map(net, full_model("resnet10t", 1, 1))
    found = initial_state("resnet10t", 1, 4)
    assert set(found) == set(names.values())
    assert all(torch.equal(value, found[names[key]]) for key, value in net.state_dict().items())
    assert not torch.equal(found["conv1.0.weight"], initial_state("resnet10t", 1, 5)["conv1.0.weight"])


def test_head_is_the_same_whatever_the_body_starts_from(run: Path, index: Path, tmp_path: Path) -> None:
    pretrained = open_start(FinetuneConfig(run=str(run), data=str(index), seed=4)).encoder(2)
    random = open_start(FinetuneConfig(run=str(run), data=str(index), seed=4, init="scratch")).encoder(2)
    alone = open_start(settings(index, tmp_path)).encoder(2)
    for name in pretrained.head:
        assert torch.equal(pretrained.model.state_dict()[name], random.model.state_dict()[name])
        assert torch.equal(pretrained.model.state_dict()[name], alone.model.state_dict()[name])
    assert not torch.equal(pretrained.model.conv1[0].weight, random.model.conv1[0].weight)
    assert torch.equal(random.model.conv1[0].weight, alone.model.conv1[0].weight)
    assert random.preprocessing == pretrained.preprocessing


def test_channels_are_those_of_the_first_image_that_can_be_read(index: Path, tmp_path: Path) -> None:
    paths = [record.path for record in read_list(index)]
    paths[0].write_bytes(b"no image")
    assert open_start(settings(index, tmp_path)).preprocessing.channels == 1
    with pytest.raises(UnreadableImage, match=paths[0].name):
        open_start(settings(index, tmp_path, strict=True))
    for path in paths:
        path.write_bytes(b"no image")
    with pytest.raises(TransferError, match=rf"at least one readable image, got {len(paths)} unreadable ones"):
        open_start(settings(index, tmp_path))


def test_without_a_run_pixels_are_standardised_by_the_training_images_alone(index: Path, tmp_path: Path) -> None:
    start = open_start(settings(index, tmp_path, aspect="crop"))
    assert (start.preprocessing.size, start.preprocessing.channels, start.preprocessing.read["aspect"]) == ((32, 32), 1, "crop")
    data = read_labelled(index)
    decoded, _ = decode_cases(data.cases, start.preprocessing)
    fed = start.fed(decoded, data.of("train")).preprocessing
    pixels = np.stack([np.asarray(Image.open(case.record.path), float) / 255 for case in data.of("train")])
    assert fed.mean[0] == pytest.approx(pixels.mean(), abs=1e-4)
    assert fed.std[0] == pytest.approx(pixels.std(), abs=1e-4)


@pytest.mark.parametrize("kind", ["safetensors", "bare", "nested"])
def test_imagenet_weights_of_three_channels_are_summed_for_grey_images(kind: str, index: Path, tmp_path: Path) -> None:
    torch.manual_seed(1)
    donor = timm.create_model("resnet10t", in_chans=3, num_classes=1000)
    path = tmp_path / ("weights.safetensors" if kind == "safetensors" else "weights.pth")
    if kind == "safetensors":
        save_file(donor.state_dict(), str(path))
    else:
        torch.save(donor.state_dict() if kind == "bare" else {"state_dict": {f"module.{k}": v for k, v in donor.state_dict().items()}}, path)
    model = open_start(settings(index, tmp_path, init=str(path))).encoder(2).model
    assert torch.allclose(model.conv1[0].weight, donor.conv1[0].weight.sum(1, keepdim=True), atol=1e-6)
    assert torch.equal(model.layer4[0].conv2.weight, donor.layer4[0].conv2.weight)
    assert model.fc.weight.shape == (2, 512)
    image = torch.rand(1, 1, 32, 32)
    with torch.no_grad():
        grey, colour = model.eval().forward_features(image), donor.eval().forward_features(image.expand(-1, 3, -1, -1))
    assert torch.allclose(grey, colour, atol=1e-4)


class Bomb:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("exploded"),)


def test_files_that_are_no_weights_of_the_network_are_refused_and_no_pickle_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = full_model("resnet10t", 1, 2)
    head = head_keys("resnet10t", model)
    Path("bomb.pth").write_bytes(pickle.dumps(Bomb(), protocol=2))
    torch.save({"weights": Bomb()}, "inner.pth")
    Path("junk.safetensors").write_bytes(b"junk" * 9)
    Path("text.pth").write_text("hello\n")
    torch.save({"a": 3}, "numbers.pth")
    torch.save(full_model("resnet14t", 1, 2).state_dict(), "other.pth")
    torch.save({k: v for k, v in model.state_dict().items() if k != "layer2.0.conv1.weight"}, "part.pth")
    for name, words in (("bomb.pth", "is neither"), ("inner.pth", "is neither"), ("junk.safetensors", "is neither"), ("text.pth", "is neither"),
                        ("numbers.pth", "named tensors only"), ("other.pth", "must hold .* of the network"), ("part.pth", r"must hold layer2\.0\.conv1\.weight .* lacks it")):
        with pytest.raises(TransferError, match=words) as caught:
            read_state(Path(name), model, head)
        assert "\n" not in str(caught.value)
    assert not Path("exploded").exists()


@pytest.mark.parametrize(("change", "words"), [
    ({"encoder": None}, "encoder must be the name of a network"), ({"init": None}, "init must be scratch, or a file"), ({"out": None}, "out must be a folder"),
    ({"run": "r"}, "encoder must be left out where RUN is given"), ({"image_size": 4}, "image_size must be 16"), ({"aspect": "squeeze"}, "aspect must be pad"),
])
def test_settings_without_a_run_must_be_whole(index: Path, tmp_path: Path, change: dict, words: str) -> None:
    with pytest.raises(TransferError, match=words):
        settings(index, tmp_path, **change)


def test_absent_files_and_unknown_networks_are_named(index: Path, tmp_path: Path) -> None:
    with pytest.raises(TransferError, match=r"got 'nowhere\.pth', which is no file"):
        open_start(settings(index, tmp_path, init="nowhere.pth"))
    with pytest.raises(TrainError, match="'resnet-ten' is no model of timm"):
        open_start(settings(index, tmp_path, encoder="resnet-ten"))
