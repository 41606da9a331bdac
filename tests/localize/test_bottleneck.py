"""`bottleneck` on small random CLIP-like models: equal to the authors' procedure, independent of the batch, and clear about what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from mwm.bench.authors_m2ib import authors_map
from tests.localize.clip_folders import DEPTH, make

import mwm
from mwm.data import ReadSettings, open_regions, read_image, read_list
from mwm.localize import localize_folder
from mwm.localize.bottleneck import BottleneckLocalizer, image_seed, to_maps
from mwm.localize.presets import PRESETS, preset
from mwm.localize.protocol import UnsupportedImage

LUNGS = "both lungs"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("clip", tmp_path_factory.mktemp("clip") / "checkpoint")


def localizer(folder: Path, **settings: object) -> BottleneckLocalizer:
    return mwm.create_localizer("bottleneck", checkpoint=folder, device="cpu", **settings)


def scans(batch: int = 3, channels: int = 1, height: int = 48, width: int = 48) -> torch.Tensor:
    return torch.rand(batch, channels, height, width, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("layer", "beta"), [(1, 0.1), (2, 1.0)])
def test_faithful_is_the_authors_map_under_the_same_noise(folder: Path, layer: int, beta: float) -> None:
    """Ten steps of ten copies through the library's own model with a hook, gradients of every parameter; ours with neither."""
    from transformers import AutoTokenizer, CLIPModel

    ours = localizer(folder, layer=layer, beta=beta)
    image = scans(1)
    noise = torch.Generator().manual_seed(image_seed(image[0], 0))
    theirs = authors_map(CLIPModel.from_pretrained(folder).eval(), ours.tower.preprocess(image), dict(AutoTokenizer.from_pretrained(folder)([LUNGS], return_tensors="pt")),
                         layer, lambda shape: torch.randn(shape, generator=noise), beta=beta)
    assert (ours(image, [LUNGS])[0] - theirs).abs().max() < 1e-4
    assert (localizer(folder, layer=layer, beta=beta, seed=1)(image, [LUNGS])[0] - theirs).abs().max() > 1e-3  # and not by being blind to the noise


@pytest.mark.parametrize("setting", ["faithful", "fast"])
def test_a_map_depends_neither_on_the_batch_nor_on_the_order(folder: Path, setting: str) -> None:
    images, prompts = scans(4), [LUNGS, "a brain tumour", "heart", LUNGS]
    ours = localizer(folder, setting=setting)
    together = ours(images, prompts)
    for few in (1, 3, 100):
        other = localizer(folder, setting=setting, in_flight=few)
        assert torch.allclose(other(images.flip(0), prompts[::-1]).flip(0), together, atol=1e-4)
    assert torch.allclose(torch.cat([ours(images[k : k + 1], prompts[k : k + 1]) for k in range(4)]), together, atol=1e-4)
    assert torch.equal(ours(images, prompts), together)


def test_many_prompts_are_the_single_ones(folder: Path) -> None:
    ours = localizer(folder, setting="fast")
    images, prompts = scans(2), [LUNGS, "a brain tumour"]
    many = ours.many(images, prompts)
    assert many.shape == (2, 2, 48, 48) and ours.similarity.shape == (2, 2)
    for k, prompt in enumerate(prompts):
        assert torch.allclose(many[k], ours(images, [prompt] * 2), atol=1e-4)


def test_text_image_seed_sigma_beta_layer_and_setting_change_the_map(folder: Path) -> None:
    base = {"setting": "fast", "layer": 1}
    first = localizer(folder, **base)(scans(1), [LUNGS])
    assert (localizer(folder, **base)(scans(1), ["a brain tumour"]) - first).abs().max() > 1e-3
    for change in ({"seed": 1}, {"sigma": 0.3}, {"beta": 5.0}, {"layer": 2}, {"setting": "faithful"}, {"copies": 4}, {"steps": 4}):
        other = localizer(folder, **{**base, **change})
        assert (other(scans(1), [LUNGS]) - first).abs().max() > 1e-3, change
        assert other.fingerprint != localizer(folder, **base).fingerprint, change


def test_a_new_seed_may_be_set_afterwards(folder: Path) -> None:
    ours = localizer(folder, setting="fast")
    before = ours.fingerprint
    ours.seed = 7
    assert torch.equal(ours(scans(1), [LUNGS]), localizer(folder, setting="fast", seed=7)(scans(1), [LUNGS])) and ours.fingerprint != before


def test_bf16_comes_near_float32(folder: Path) -> None:
    exact, coarse = (localizer(folder, precision=precision)(scans(2), [LUNGS] * 2).flatten(1) for precision in ("fp32", "bf16"))
    assert min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in zip(exact, coarse, strict=True)) > 0.95


def test_similarity_is_the_models_cosine_and_refuses_what_does_not_match(folder: Path) -> None:
    ours = localizer(folder, setting="fast")
    images, prompts = scans(2), [LUNGS, "heart"]
    expected = torch.cosine_similarity(ours.tower.whole(ours.tower.preprocess(images)), ours.tower.text(prompts))
    found = ours.explain(images, prompts)
    assert torch.allclose(found.cosine, expected, atol=1e-5) and torch.allclose(ours.cosine(images, prompts), expected, atol=1e-5)
    assert torch.equal(ours.similarity, found.cosine) and "over 2 images" in ours.summary()
    strict = localizer(folder, setting="fast", min_similarity=float(expected.max()) + 0.01)
    with pytest.raises(UnsupportedImage, match="cosine of at least") as caught:
        strict(images, prompts)
    assert "\n" not in str(caught.value)
    localizer(folder, setting="fast", min_similarity=float(expected.min()) - 0.01)(images, prompts)


def test_an_image_of_one_colour_gets_an_empty_map(folder: Path) -> None:
    images = torch.cat([scans(1), torch.full((1, 1, 48, 48), 0.5), torch.zeros(1, 1, 48, 48)])
    for name, settings in (("bottleneck", {"setting": "fast"}), ("gradcam", {}), ("gscorecam", {})):
        maps = mwm.create_localizer(name, checkpoint=folder, device="cpu", **settings)(images, [LUNGS] * 3)
        assert maps[0].any() and not maps[1:].any(), name


def test_a_map_that_is_not_finite_is_an_error_and_not_a_region() -> None:
    broken = torch.ones(1, 3, 3)
    broken[0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match="must be finite"):
        to_maps(broken, scans(1), "bottleneck")
    assert not to_maps(torch.ones(1, 3, 3), scans(1), "bottleneck").any()  # and no contrast is no region


@pytest.mark.parametrize(("settings", "words"), [
    ({"layer": DEPTH - 1}, r"layer must be in 0 … 2 for a tower of 4 blocks, got 3"),
    ({"layer": -1}, "layer must be in"),
    ({"setting": "best"}, "setting must be faithful or fast"),
    ({"precision": "fp8"}, "precision must be fp32 or bf16"),
    ({"beta": 0}, "beta must be positive"),
    ({"sigma": float("nan")}, "sigma must be positive"),
    ({"copies": 0}, "copies must be whole numbers"),
    ({"copies": [2, 2], "steps": 10}, "one number per step but the last"),
    ({"steps": 1}, "steps must be a whole number from 2 on"),
    ({"in_flight": 0}, "in_flight must be a whole number of at least 1"), ({"in_flight": 1.5}, "in_flight must be"), ({"in_flight": "many"}, "in_flight must be"),
    ({"seed": 1.5}, "seed must be a whole number"), ({"seed": "x" * 80}, "seed must be"), ({"seed": -1}, "seed must be"),
    ({"min_similarity": "high"}, "min_similarity must be a cosine"), ({"min_similarity": float("nan")}, "min_similarity must be a cosine"),
    ({"min_similarity": True}, "min_similarity must be"),
    ({"setting": ["fast"]}, "setting must be"),
    ({"trust_remote_code": "never"}, "trust_remote_code must be true or false"), ({"offline": "no way"}, "offline must be true or false"),
])
def test_settings_that_do_not_fit_are_refused_before_the_model_is_asked(folder: Path, settings: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words) as caught:
        localizer(folder, **settings)
    assert "\n" not in str(caught.value)


def test_gscorecam_asks_for_channels_that_exist(folder: Path) -> None:
    with pytest.raises(ValueError, match="channels must be in 1 … 32"):
        mwm.create_localizer("gscorecam", checkpoint=folder, device="cpu", channels=33)
    with pytest.raises(ValueError, match="batch_size must be a whole number of at least 1"):
        mwm.create_localizer("gradcam", checkpoint=folder, device="cpu", batch_size=0)


@pytest.mark.parametrize(("name", "settings"), [
    ("gradcam", {"batch_size": "a"}), ("gscorecam", {"batch_size": 2.5}), ("gradcam", {"trust_remote_code": "never"}), ("clipseg", {"batch_size": 0}),
    ("clipseg", {"batch_size": "a"}), ("clipseg", {"offline": "off the net"}), ("detector", {"batch_size": "a"}), ("detector", {"relative": "maybe"}),
])
def test_settings_of_another_type_are_refused_by_their_name(tmp_path: Path, name: str, settings: dict) -> None:
    """They come from --setting NAME=VALUE; a word that merely counts as true must not switch remote code on."""
    (argument,) = settings
    with pytest.raises(ValueError, match=f"^{name}: {argument} must be"):
        mwm.create_localizer(name, checkpoint=tmp_path, device="cpu", **settings)


@pytest.mark.parametrize("name", ["gradcam", "gscorecam"])
def test_cheap_maps_do_not_depend_on_the_batch(folder: Path, name: str) -> None:
    ours = mwm.create_localizer(name, checkpoint=folder, device="cpu", batch_size=2)
    images, prompts = scans(3), [LUNGS, "heart", "a brain tumour"]
    assert torch.allclose(ours(images, prompts), torch.cat([ours(images[k : k + 1], prompts[k : k + 1]) for k in range(3)]), atol=1e-5)


def test_gradcam_is_what_a_hook_on_the_library_gives(folder: Path) -> None:
    from transformers import CLIPModel

    ours = mwm.create_localizer("gradcam", checkpoint=folder, device="cpu")
    model, image = CLIPModel.from_pretrained(folder).eval(), scans(1)
    seen: list[torch.Tensor] = []
    handle = model.vision_model.encoder.layers[ours.layer].register_forward_hook(lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output))
    embedding = model.get_image_features(pixel_values=ours.tower.preprocess(image))
    handle.remove()
    embedding = embedding if isinstance(embedding, torch.Tensor) else embedding.pooler_output
    (gradient,) = torch.autograd.grad(torch.cosine_similarity(embedding, ours.tower.text([LUNGS])).sum(), seen[0])
    expected = ((gradient[:, 1:].mean(1, keepdim=True) * seen[0][:, 1:]).sum(-1).relu()).reshape(1, 3, 3)
    assert torch.allclose(ours(image, [LUNGS]), to_maps(expected.detach(), image, "gradcam"), atol=1e-4)


def test_presets_are_found_by_short_and_by_hub_name_and_kept_to_their_localizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    known = PRESETS["biomedclip"]
    for name in ("biomedclip", known.hub, "microsoft/BiomedCLIP-PubMedBERT_256-vit_base_patch16_224"):
        assert preset(name, "bottleneck") is known and preset(name, "gradcam") is known
    assert preset("owner/other", "bottleneck") is None
    with pytest.raises(ValueError, match="which is for clipseg"):
        preset("clipseg-rd64", "bottleneck")
    assert all(found.revision is None or len(found.revision) == 40 for found in PRESETS.values())
    monkeypatch.chdir(tmp_path)
    (tmp_path / "biomedclip").mkdir()
    assert preset("biomedclip", "bottleneck") is None  # a folder of that name is the user's own


def test_a_hub_name_without_a_way_to_the_hub_is_one_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mwm.localize.towers.hub_answers", lambda: False)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("clip-vit-b16", "owner/model"):
        with pytest.raises(ValueError, match="neither a local folder nor could it be fetched") as caught:
            mwm.create_localizer("bottleneck", checkpoint=name, device="cpu")
        assert "\n" not in str(caught.value)


def test_a_folder_of_images_becomes_regions(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for k, scan in enumerate(scans(3)):
        Image.fromarray((scan[0] * 255).to(torch.uint8).numpy()).save(tmp_path / f"{k}.png")
    report = localize_folder(tmp_path, LUNGS, localizer(folder, setting="fast"), tmp_path.with_name("regions"), progress=False)
    assert report.images == 3 == len(list(read_list(tmp_path))) and 0 < report.area < 1


def test_gscorecam_is_the_papers_formula_written_out_on_the_library(folder: Path) -> None:
    """Channels by their signed mean gradient, each scored by the model's own logit of the image seen through it (Chen et al. 2022, section 3; the authors' gscore_cam.py)."""
    from transformers import CLIPModel

    ours = mwm.create_localizer("gscorecam", checkpoint=folder, device="cpu", channels=6)
    model, image = CLIPModel.from_pretrained(folder).eval(), scans(1)
    layer, text = model.vision_model.encoder.layers[ours.layer], ours.tower.text([LUNGS])
    pixels, black = ours.tower.preprocess(image), (0 - ours.tower.mean) / ours.tower.std

    def logit(x: torch.Tensor) -> torch.Tensor:
        embedding = model.get_image_features(pixel_values=x)
        embedding = embedding if isinstance(embedding, torch.Tensor) else embedding.pooler_output
        return model.logit_scale.exp() * torch.cosine_similarity(embedding, text)

    seen: list[torch.Tensor] = []
    handle = layer.register_forward_hook(lambda module, inputs, output: seen.append(output[0] if isinstance(output, tuple) else output))
    (gradient,) = torch.autograd.grad(logit(pixels).sum(), seen[0])
    handle.remove()
    order = gradient[0, 1:].mean(0).argsort(descending=True)[:6]
    assert float(gradient[0, 1:].mean(0).abs().topk(6).values.min()) > 0 and set(order.tolist()) != set(gradient[0, 1:].mean(0).abs().topk(6).indices.tolist())
    maps = seen[0][0, 1:, order].detach().T.reshape(6, 3, 3)
    scores = []
    for one in maps:
        part = torch.nn.functional.interpolate(((one - one.min()) / (one.max() - one.min()))[None, None], pixels.shape[2:], mode="bilinear", align_corners=False)
        scores.append(float(logit(black + part * (pixels - black)).detach()))
    weights = torch.softmax(torch.tensor(scores), 0)
    expected = (weights[:, None, None] * maps).sum(0).relu()[None]
    assert torch.allclose(ours(image, [LUNGS]), to_maps(expected, image, "gscorecam"), atol=1e-4)


def test_soft_regions_of_a_folder_are_kept_as_grids_and_found_again(folder: Path, tmp_path: Path) -> None:
    from PIL import Image

    for k, scan in enumerate(scans(3, height=280, width=300)):
        Image.fromarray((scan[0] * 255).to(torch.uint8).numpy()).save(tmp_path / f"{k}.png")
    out, settings = tmp_path.with_name("soft"), mwm.localize.RefineSettings(soft=True, method="otsu")
    ours = localizer(folder, setting="fast")
    localize_folder(tmp_path, LUNGS, ours, out, settings, progress=False)
    assert ours.map_grid == (3, 3) and json.loads((out / "regions.json").read_text())["format"] == "mwm regions 2"
    assert max(path.stat().st_size for path in out.rglob("*.region")) < 3000
    again = localizer(folder, setting="fast")
    assert localize_folder(tmp_path, LUNGS, again, out, settings, progress=False).made == 0
    regions = open_regions(out)
    for record in read_list(tmp_path):
        heat = again(read_image(record, ReadSettings())[None], [LUNGS])
        assert float((regions.region(record) - mwm.localize.refine(heat, settings)[0]).abs().max()) <= 1 / 255 + 1e-3
