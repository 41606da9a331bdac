"""Refinement by SAM, on small random SAM and SAM 2 checkpoints loaded through the public call."""

from __future__ import annotations

import functools
import json
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from mwm.localize.sam import SamRefiner, vote


@pytest.fixture(scope="module")
def sam_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import SamConfig, SamImageProcessor, SamModel, SamProcessor

    folder = tmp_path_factory.mktemp("sam")
    layers = {"num_hidden_layers": 1, "num_attention_heads": 2, "mlp_dim": 32}
    torch.manual_seed(0)
    SamModel(SamConfig(
        vision_config={**layers, "hidden_size": 16, "output_channels": 16, "image_size": 64, "patch_size": 8, "window_size": 4, "global_attn_indexes": [0], "num_pos_feats": 8},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 8, "mask_input_channels": 4},
        mask_decoder_config={**layers, "hidden_size": 16, "iou_head_hidden_dim": 16})).save_pretrained(folder)
    edge = {"height": 64, "width": 64}
    images = SamImageProcessor(size={"longest_edge": 64}, pad_size=edge, mask_size={"longest_edge": 16}, mask_pad_size={"height": 16, "width": 16})
    SamProcessor(images).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def sam2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """As the published SAM 2 checkpoints: of type sam2_video, though the image part alone is read."""
    from transformers import Sam2Config, Sam2ImageProcessor, Sam2Model, Sam2Processor

    folder = tmp_path_factory.mktemp("sam2")
    hiera = {"model_type": "sam2_hiera_det_model", "hidden_size": 8, "num_attention_heads": 1, "image_size": [64, 64], "blocks_per_stage": [1, 1, 2, 1],
             "embed_dim_per_stage": [8, 16, 32, 64], "num_attention_heads_per_stage": [1, 1, 2, 2], "window_size_per_stage": [4, 4, 4, 2], "global_attention_blocks": [3],
             "window_positional_embedding_background_size": [2, 2]}
    sizes = [[16, 16], [8, 8], [4, 4]]
    torch.manual_seed(0)
    Sam2Model(Sam2Config(
        vision_config={"backbone_config": hiera, "backbone_channel_list": [64, 32, 16, 8], "backbone_feature_sizes": sizes, "fpn_hidden_size": 16},
        prompt_encoder_config={"hidden_size": 16, "image_size": 64, "patch_size": 16, "mask_input_channels": 4},
        mask_decoder_config={"hidden_size": 16, "mlp_dim": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "iou_head_hidden_dim": 16})).save_pretrained(folder)
    Sam2Processor(Sam2ImageProcessor(size={"height": 64, "width": 64}, mask_size={"height": 16, "width": 16})).save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "sam2_video"}))
    return folder


@pytest.fixture
def folder(request: pytest.FixtureRequest) -> Path:
    return request.getfixturevalue(request.param)


EVERY = pytest.mark.parametrize("folder", ["sam_folder", "sam2_folder"], indirect=True)


@functools.cache
def refiner(folder: Path, **settings: object) -> SamRefiner:
    return SamRefiner(folder, "cpu", **{"min_agreement": 0.0, "max_area": 1.0, **settings})


def scans(batch: int = 2, channels: int = 1) -> torch.Tensor:
    return torch.rand(batch, channels, 48, 80, generator=torch.Generator().manual_seed(1))


def two_parts() -> torch.Tensor:
    region = torch.zeros(1, 48, 80)
    region[0, 10:22, 30:50] = 1
    region[0, 30:40, 5:15] = 0.4
    return region


@EVERY
def test_answer_is_a_mask_of_the_images_size(folder: Path) -> None:
    answer = refiner(folder)(scans(2), two_parts().repeat(2, 1, 1))
    assert answer.shape == (2, 48, 80) and answer.dtype == torch.float32 and set(answer.unique().tolist()) == {0.0, 1.0}
    assert not torch.equal(answer, (two_parts() > 0).float().repeat(2, 1, 1))


@EVERY
@pytest.mark.parametrize("boxes", ["component", "joint"])
def test_masks_are_those_of_transformers_own_processor_voted(folder: Path, boxes: str) -> None:
    found = refiner(folder, boxes=boxes)
    pixels = (scans(1)[0, 0] * 255).round().to(torch.uint8).numpy()
    part = two_parts()[0] > 0
    prompts = [[30.0, 10.0, 50.0, 22.0], [5.0, 30.0, 15.0, 40.0]] if boxes == "component" else [[5.0, 10.0, 50.0, 40.0]]
    inputs = found.processor(images=Image.fromarray(pixels).convert("RGB"), input_boxes=[prompts], return_tensors="pt")
    with torch.no_grad():
        output = found.model(pixel_values=inputs["pixel_values"], input_boxes=inputs["input_boxes"].float(), multimask_output=True)
    sizes = [inputs["original_sizes"]] + ([inputs["reshaped_input_sizes"]] if "reshaped_input_sizes" in inputs else [])
    masks = found.processor.post_process_masks(output.pred_masks, *sizes)[0]
    expected = torch.zeros(48, 80, dtype=torch.bool)
    for (left, top, right, bottom), candidates, scores in zip(prompts, masks, output.iou_scores[0], strict=True):
        inside = torch.zeros_like(part)
        inside[int(top) : int(bottom), int(left) : int(right)] = True
        expected |= vote(candidates, scores, part & inside)
    answer = found(torch.from_numpy(pixels)[None, None].float() / 255, two_parts())[0] > 0
    assert expected.any() and not expected.all() and float((answer ^ expected).double().mean()) < 0.001


@EVERY
def test_empty_region_stays_empty_beside_others_and_the_batch_changes_nothing(folder: Path) -> None:
    images = scans(3)
    regions = torch.cat([two_parts(), torch.zeros(1, 48, 80), two_parts().flip(2)])
    together = refiner(folder)(images, regions)
    assert together[1].sum() == 0 and together[0].sum() > 0
    alone = torch.cat([refiner(folder)(images[i : i + 1], regions[i : i + 1]) for i in range(3)])
    assert float((together != alone).double().mean()) < 0.001


@EVERY
@pytest.mark.parametrize("setting", [{"min_agreement": 1.0}, {"max_area": 0.0}], ids=str)
def test_part_is_kept_where_the_answer_does_not_fit_it(folder: Path, setting: dict) -> None:
    found = SamRefiner(folder, "cpu", **setting)
    assert torch.equal(found(scans(1), two_parts()), (two_parts() > 0).float()) and found.kept == 2


@EVERY
def test_image_of_one_grey_value_keeps_its_region(folder: Path) -> None:
    assert torch.equal(refiner(folder)(torch.full((1, 1, 48, 80), 0.5), two_parts()), (two_parts() > 0).float())


def test_components_beyond_the_most_are_kept_as_they_are(sam_folder: Path) -> None:
    answer = refiner(sam_folder, most=1)(scans(1), two_parts())[0]
    assert answer[30:40, 5:15].min() == 1 and not torch.equal(answer, (two_parts()[0] > 0).float())


def test_margin_moves_the_boxes_sides_out_and_stays_in_the_image(sam_folder: Path) -> None:
    box = refiner(sam_folder, margin=0.5)._prompt((10, 0, 20, 40), torch.Size((48, 50)))
    assert box.tolist() == [0.0, 5.0, 50.0, 25.0]


def test_votes_weigh_predicted_iou_by_agreement_with_the_part() -> None:
    part = torch.tensor([[1, 1, 0, 0]], dtype=torch.bool)
    masks = torch.tensor([[[1, 1, 1, 0]], [[1, 0, 0, 0]], [[0, 0, 0, 1]]], dtype=torch.bool)
    # Dice 0.8, 2/3 and 0; with weights 0.72 and 0.2 the first decides alone, the third never counts.
    assert vote(masks, torch.tensor([0.9, 0.3, 9.0]), part).tolist() == [[True, True, True, False]]
    assert vote(masks, torch.tensor([0.3, 0.9, 9.0]), part).tolist() == [[True, False, False, False]]
    assert not vote(masks[2:], torch.tensor([1.0]), part).any()
    assert vote(masks, torch.tensor([-1.0, -1.0, -1.0]), part).tolist() == [[True, True, True, False]]  # no trust in any: agreement alone


@pytest.mark.parametrize("wrong", [torch.zeros(1, 48, 79), torch.zeros(2, 48, 80), two_parts() * float("nan")], ids=["size", "number", "nan"])
def test_regions_that_do_not_fit_are_refused(sam_folder: Path, wrong: torch.Tensor) -> None:
    with pytest.raises(ValueError, match="sam: regions must be finite maps"):
        refiner(sam_folder)(scans(1), wrong)


def test_other_checkpoints_and_settings_end_in_one_sentence(sam_folder: Path, clipseg_folder: Path, tmp_path: Path) -> None:
    bare = shutil.copytree(sam_folder, tmp_path / "bare")
    (bare / "model.safetensors").unlink()
    cases = [({"checkpoint": clipseg_folder}, "of type 'clipseg'"), ({"checkpoint": tmp_path / "none"}, "hub name"), ({"checkpoint": bare}, "safetensors"),
             ({"checkpoint": sam_folder, "boxes": "all"}, "component or joint"), ({"checkpoint": sam_folder, "margin": -1}, "margin must be in"),
             ({"checkpoint": sam_folder, "most": 0}, "at least 1"), ({"checkpoint": "biomedclip"}, "which is for bottleneck")]
    for arguments, sentence in cases:
        with pytest.raises(ValueError, match=sentence) as caught:
            SamRefiner(device="cpu", **arguments)
        assert str(caught.value).startswith("sam: ") and "\n" not in str(caught.value)


def test_fingerprint_follows_weights_and_settings(sam_folder: Path, sam2_folder: Path) -> None:
    assert len({refiner(sam_folder).fingerprint, refiner(sam2_folder).fingerprint, refiner(sam_folder, boxes="joint").fingerprint}) == 3


def test_command_draws_regions_with_a_sam_and_its_boxes(sam_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    from mwm.data import open_regions, read_list
    from mwm.localize import run_localize

    (tmp_path / "scans").mkdir()
    for index in range(2):
        pixels = (scans(1)[0, 0] * 60).to(torch.uint8).numpy()
        pixels[10:30, 20 + index : 50] = 220
        Image.fromarray(pixels).save(tmp_path / "scans" / f"{index}.png")
    report = run_localize(tmp_path / "scans", out=tmp_path / "regions", localizer="maps", checkpoint=tmp_path / "scans", sam=sam_folder, sam_boxes="joint", device="cpu",
                          progress=False)
    regions = open_regions(tmp_path / "regions")
    assert report.images == 2 and "joint" in regions.meta["sam"] and all(regions.has(record) for record in read_list(tmp_path / "scans"))
    assert "2 images, 2 computed" in capsys.readouterr().out


@pytest.mark.parametrize("attribute", ["size", "pad_size"])
def test_a_processor_that_would_take_all_memory_is_refused(sam_folder: Path, tmp_path: Path, attribute: str) -> None:
    folder = shutil.copytree(sam_folder, tmp_path / "sam")
    (path,) = folder.glob("*processor*.json")
    stored = json.loads(path.read_text())
    images = stored.get("image_processor", stored)
    images[attribute] = {"longest_edge": 10**6} if attribute == "size" else {"height": 10**6, "width": 64}
    path.write_text(json.dumps(stored))
    with pytest.raises(ValueError, match=rf"^sam: {attribute} of the image processor must be in 1 … 4096 pixels"):
        SamRefiner(folder, "cpu")
