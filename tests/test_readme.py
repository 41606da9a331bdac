"""The README's Python runs as printed, on shipped scans; only names of folders, the encoder and the epochs are made small."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mwm.data import ReadSettings, demo_folder, read_image, read_list

README = Path(__file__).resolve().parents[1] / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), flags=re.S)


@pytest.fixture(scope="module")
def xrays(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class with sixteen X-rays."""
    folder = tmp_path_factory.mktemp("readme")
    records = [r for r in read_list(demo_folder() / "index.csv") if r.name.startswith("chest_xray")]
    for label in ("bacterial_pneumonia", "viral_pneumonia"):
        (folder / "DATA" / label).mkdir(parents=True)
        for record in [r for r in records if r.label == label][:8]:
            shutil.copy(record.path, folder / "DATA" / label / Path(record.name).name)
    return folder


def test_every_block_is_at_most_ten_lines() -> None:
    assert len(BLOCKS) >= 4
    for block in BLOCKS:
        assert len([line for line in block.splitlines() if line.strip()]) <= 10


def test_the_ten_lines_and_the_model_run() -> None:
    records = [r for r in read_list(demo_folder() / "index.csv") if r.name.startswith("chest_xray")][:2]
    images = torch.stack([read_image(r, ReadSettings(size=(224, 224)), 1) for r in records])
    names = {"images": images, "ids": torch.tensor([r.id for r in records])}
    import mwm

    names["region"] = mwm.create_localizer("tiny")(images, ["both lungs"] * 2)
    for block in BLOCKS[:2]:
        exec(block.replace("resnet50", "resnet18"), names)
    assert names["feats"][-1].shape[1:] == (512, 1, 1)
    assert [f.shape[0] for f in names["dense"]] == [2] * 5
    assert torch.isfinite(names["loss"]) and names["loss"].ndim == 0


@pytest.mark.slow
def test_the_run_in_python_leads_to_a_plain_classifier(xrays: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mwm.localize import localize_folder

    monkeypatch.chdir(xrays)
    localize_folder("DATA", "both lungs", out="REGIONS", progress=False)
    code = BLOCKS[2].replace('"IMAGES"', '"DATA"').replace("resnet50", "resnet18")
    code = code.replace("epochs=100", "epochs=1, batch_size=8, decoder_width=64, image_size=(64, 64), progress=False")
    names: dict = {}
    exec(code, names)
    assert Path("RUN/encoder.safetensors").is_file()
    exec("import timm\nmodel = " + BLOCKS[3].split("#")[0], names)
    held, stored = names["model"].state_dict(), load_file("RUN/encoder.safetensors")
    assert set(held) - set(stored) == {"fc.weight", "fc.bias"} and [name for name, value in stored.items() if not torch.equal(held[name], value)] == []
    assert names["model"](torch.zeros(1, 1, 64, 64)).shape == (1, 3)
