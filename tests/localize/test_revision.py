"""Presets are pinned, and another commit is taken with --revision: on a copy of the hub's cache that holds small random models at several commits."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from tests.localize.clip_folders import make

import mwm
from mwm.cli import main
from mwm.data import open_regions
from mwm.localize.presets import PRESETS, pinned
from mwm.localize.sam import SamRefiner

OLD, NEW = "0" * 39 + "a", "0" * 39 + "b"


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, dict[str, Path]], None]:
    """Puts folders into the hub's cache as commits of a name; the last one is what `main` names. Nothing goes over the network."""
    cache = tmp_path / "hub"
    for module in ("towers", "pretrained", "clipseg", "train_towers"):
        monkeypatch.setattr(f"mwm.localize.{module}.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))

    def add(name: str, commits: dict[str, Path]) -> None:
        root = cache / f"models--{name.replace('/', '--')}"
        (root / "refs").mkdir(parents=True)
        for commit, folder in commits.items():
            shutil.copytree(folder, root / "snapshots" / commit)
            (root / "refs" / "main").write_text(commit)

    return add


def changed(folder: Path, where: Path) -> Path:
    """The same model with other weights."""
    from safetensors.torch import load_file, save_file

    shutil.copytree(folder, where)
    weights = load_file(str(where / "model.safetensors"))
    save_file({name: value + 0.05 if value.is_floating_point() else value for name, value in weights.items()}, where / "model.safetensors", {"format": "pt"})
    return where


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    folder = tmp_path_factory.mktemp("sam")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32}
    torch.manual_seed(0)
    SamModel(SamConfig(
        vision_config={**layers, "hidden_size": 16, "output_channels": 16, "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [0], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_depth": 1, "iou_head_hidden_dim": 16},
    )).save_pretrained(folder)
    SamProcessor(SamImageProcessor(size={"longest_edge": 64}, mask_size={"longest_edge": 16}, pad_size={"height": 64, "width": 64},
                                   mask_pad_size={"height": 16, "width": 16})).save_pretrained(folder)
    return folder


def as_bin(folder: Path, where: Path) -> Path:
    """The same model with its weights in pytorch_model.bin only."""
    from safetensors.torch import load_file

    shutil.copytree(folder, where)
    torch.save(load_file(str(where / "model.safetensors")), where / "pytorch_model.bin")
    (where / "model.safetensors").unlink()
    return where


def test_every_preset_names_a_whole_commit_and_each_another_one() -> None:
    commits = [known.revision for known in PRESETS.values()]
    assert all(len(commit) == 40 and set(commit) <= set("0123456789abcdef") for commit in commits) and len(set(commits)) == len(commits)


@pytest.mark.parametrize("name", ["bottleneck", "gradcam", "gscorecam", "clipseg"])
def test_a_hub_name_is_read_at_the_commit_that_was_asked_for(hub: Callable, name: str, clipseg_folder: Path, tmp_path: Path) -> None:
    folder = clipseg_folder if name == "clipseg" else make("clip", tmp_path / "clip")
    hub("owner/model", {OLD: folder, NEW: changed(folder, tmp_path / "changed")})
    newest, old, also = (mwm.create_localizer(name, checkpoint="owner/model", device="cpu", **more) for more in ({}, {"revision": OLD}, {"revision": "main"}))
    assert f"@{NEW}" in newest.fingerprint and f"@{OLD}" in old.fingerprint and also.fingerprint == newest.fingerprint
    images = torch.rand(1, 1, 48, 48, generator=torch.Generator().manual_seed(0))
    here = mwm.create_localizer(name, checkpoint=folder, device="cpu")
    assert torch.equal(old(images, ["lungs"]), here(images, ["lungs"])) and not torch.equal(old(images, ["lungs"]), newest(images, ["lungs"]))


def test_a_revision_goes_before_that_of_a_preset(hub: Callable, clipseg_folder: Path, tmp_path: Path) -> None:
    known = PRESETS["clipseg-rd64"]
    hub(known.hub, {known.revision: clipseg_folder, NEW: changed(clipseg_folder, tmp_path / "changed")})
    found = [mwm.create_localizer("clipseg", checkpoint=name, device="cpu", **more).fingerprint for name, more in
             (("clipseg-rd64", {}), (known.hub, {}), ("clipseg-rd64", {"revision": NEW}))]
    assert found == [f"clipseg {known.hub}@{known.revision}"] * 2 + [f"clipseg {known.hub}@{NEW}"]


def test_detector_is_pinned_by_a_revision(hub: Callable, sam_folder: Path, tmp_path: Path) -> None:
    hub("owner/detector", {OLD: sam_folder, NEW: sam_folder})
    shutil.rmtree(tmp_path / "hub" / "models--owner--detector" / "snapshots" / NEW)
    with pytest.raises(ValueError, match="of type 'sam'"):  # found at that commit, and then refused for what it is
        mwm.create_localizer("detector", checkpoint="owner/detector", device="cpu", revision=OLD)
    with pytest.raises(ValueError, match="neither a local folder nor could it be fetched"):
        mwm.create_localizer("detector", checkpoint="owner/detector", device="cpu", revision=NEW)


def test_preset_without_safetensors_is_read_as_bare_tensors_and_others_are_not(hub: Callable, sam_folder: Path, tmp_path: Path) -> None:
    medsam, plain = PRESETS["medsam"], PRESETS["sam-vit-b"]
    bare = as_bin(sam_folder, tmp_path / "bare")
    hub(medsam.hub, {medsam.revision: bare})
    hub(plain.hub, {plain.revision: bare})
    ours, safe = SamRefiner("medsam", device="cpu"), SamRefiner(sam_folder, device="cpu")
    assert medsam.revision in ours.fingerprint
    assert all(torch.equal(one, other) for one, other in zip(ours.model.state_dict().values(), safe.model.state_dict().values(), strict=True))
    for checkpoint in ("sam-vit-b", bare):
        with pytest.raises(ValueError, match="weights as safetensors"):
            SamRefiner(checkpoint, device="cpu")


def test_reading_a_bin_file_asks_nobody_for_a_conversion(hub: Callable, sam_folder: Path, clipseg_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers would, in a thread of its own, have the hub convert the repository; only what was named is to be fetched."""
    asked: list[object] = []
    monkeypatch.setattr("transformers.modeling_utils.auto_conversion", lambda *args, **kwargs: asked.append(args) or (None, "main", False))
    monkeypatch.setattr("transformers.modeling_utils.has_file", lambda *args, **kwargs: False)
    hub(PRESETS["medsam"].hub, {PRESETS["medsam"].revision: as_bin(sam_folder, tmp_path / "sam")})
    hub("owner/clipseg", {"c" * 40: as_bin(clipseg_folder, tmp_path / "clipseg")})
    SamRefiner("medsam", device="cpu")
    mwm.create_localizer("clipseg", checkpoint="owner/clipseg", device="cpu")
    assert asked == [] and "DISABLE_SAFETENSORS_CONVERSION" not in os.environ


class _Touch:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


def test_bin_file_of_a_preset_cannot_run_code(hub: Callable, sam_folder: Path, tmp_path: Path) -> None:
    evil = as_bin(sam_folder, tmp_path / "evil")
    torch.save({"weight": _Touch(tmp_path / "ran")}, evil / "pytorch_model.bin")
    hub(PRESETS["medsam"].hub, {PRESETS["medsam"].revision: evil})
    with pytest.raises(ValueError, match="cannot be read"):
        SamRefiner("medsam", device="cpu")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("wrong", ["", " ", "../../etc", "a..b", "a b", "/etc", "a/../b", "-x", "main\n", 7])
def test_a_revision_that_is_none_is_refused_in_one_sentence(wrong: object) -> None:
    with pytest.raises(ValueError, match="clipseg: revision must be a commit, branch or tag") as caught:
        pinned("owner/model", "clipseg", wrong)
    assert "\n" not in str(caught.value)


def test_a_revision_of_a_local_folder_and_one_without_a_checkpoint_are_refused(clipseg_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "a.png")
    asked = ["localize", str(tmp_path / "a.png"), "--prompt", "lungs", "--out", str(tmp_path / "out"), "--device", "cpu"]
    for more, sentence in [(["--localizer", "clipseg", "--checkpoint", str(clipseg_folder), "--revision", OLD], "must be left out for a local folder"),
                           (["--revision", OLD], "--revision must go with --checkpoint"), (["--sam-revision", OLD], "--sam-revision must go with --sam"),
                           (["--localizer", "clipseg", "--checkpoint", "a/b", "--revision", "../x"], "revision must be a commit, branch or tag")]:
        assert main([*asked, *more]) == 2 and sentence in capsys.readouterr().err
    assert pinned("refs", "sam", "refs/pr/17")[1] == "refs/pr/17" and not (tmp_path / "out").exists()


def test_command_line_takes_revisions_of_localizer_and_sam(hub: Callable, clipseg_folder: Path, sam_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    hub("owner/clipseg", {OLD: clipseg_folder, NEW: changed(clipseg_folder, tmp_path / "changed")})
    hub("owner/sam", {OLD: sam_folder, NEW: changed(sam_folder, tmp_path / "redrawn")})
    (tmp_path / "scans").mkdir()
    for index in range(2):
        Image.fromarray(np.random.default_rng(index).integers(0, 255, (40, 40), dtype=np.uint8)).save(tmp_path / "scans" / f"{index}.png")
    asked = [str(tmp_path / "scans"), "--prompt", "lungs", "--localizer", "clipseg", "--checkpoint", "owner/clipseg", "--revision", OLD, "--device", "cpu"]
    assert main(["localize", *asked, "--method", "kmeans", "--sam", "owner/sam", "--sam-revision", OLD, "--force", "--out", str(tmp_path / "regions")]) == 0
    meta = open_regions(tmp_path / "regions").meta
    assert meta["localizer"].endswith(f"owner/clipseg@{OLD}") and f"owner/sam@{OLD}" in meta["sam"]
    assert main(["localize", "check", *asked, "--out", str(tmp_path / "check")]) in (0, 2)
    assert main(["localize", "choose", *asked, "--vary", "threshold=0.3,0.5", "--out", str(tmp_path / "choose")]) in (0, 2)
    assert main(["preview", *asked, "--method", "kmeans", "--image-size", "64", "--out", str(tmp_path / "preview")]) == 0
    assert json.loads((tmp_path / "preview" / "regions" / "regions.json").read_text())["meta"]["localizer"].endswith(OLD)
    capsys.readouterr()


def test_pretrain_hands_the_commit_to_its_localizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import mwm.localize
    from mwm.cli.pretrain import localize_for
    from mwm.train import PretrainConfig

    told: dict = {}
    monkeypatch.setattr(mwm.localize, "run_localize", lambda **given: told.update(given))
    config = PretrainConfig(images=str(tmp_path), out=str(tmp_path / "run"), prompt="lungs", localizer="clipseg", localizer_checkpoint="somebody/clipseg", localizer_revision="v2")
    localize_for(config, {})
    assert (told["checkpoint"], told["revision"]) == ("somebody/clipseg", "v2")
