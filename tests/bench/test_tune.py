"""`mwm tune`: what it says without a GPU, the tables it would write, and that the shipped tables serve every layer."""

from __future__ import annotations

import json

import pytest
import torch

pytest.importorskip("triton")

from mwm.bench import tune
from mwm.kernels import conv_configs

from mwm.cli import main

KINDS = ("16", "tf32", "32")


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is visible here")
def test_without_a_gpu_it_says_so_in_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune"]) == 2
    assert capsys.readouterr().err == "mwm: tune: it needs a GPU and triton, but no CUDA device is visible. `mwm tune --list` shows the shipped table.\n"


def test_the_list_shows_the_table_and_the_candidates(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["tune", "--list", "--ops", "forward"]) == 0
    out = capsys.readouterr().out
    assert "block_m" in out and "candidates" in out and "grad_weight" not in out


@pytest.mark.parametrize("device", conv_configs.DEVICES)
@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_every_layer_has_a_rule_with_all_sizes(direction: str, device: str) -> None:
    wanted = {"block_m", "block_n", "block_k", "num_warps", "num_stages", "programs" if direction == "grad_weight" else "group_m"}
    for kind in KINDS:
        for rows in (1, 4096, 2**30):
            for columns in (1, 16, 17, 64, 4096):
                for depth in (1, 15, 16, 48, 4096):
                    for odd in (False, True):
                        rule = conv_configs.pick("tile_conv", direction, kind, rows, columns, depth, device, odd)
                        assert wanted <= set(rule)
                        assert all(rule[size] >= 16 and rule[size] & (rule[size] - 1) == 0 for size in wanted if size.startswith("block"))


@pytest.mark.parametrize("device", conv_configs.DEVICES)
@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_every_shipped_rule_serves_some_layer(direction: str, device: str) -> None:
    assert list(conv_configs.examples("tile_conv", direction))
    for kind in KINDS:
        assert conv_configs.table(device)["tile_conv"][direction][kind]


def test_tables_never_know_of_a_dense_way_in_the_generic_table() -> None:
    assert "dense_from" not in json.dumps(conv_configs.table("generic"))


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
def test_measured_rules_are_found_again_by_their_layers(direction: str, monkeypatch: pytest.MonkeyPatch) -> None:
    shipped = conv_configs.table("generic")["tile_conv"][direction]["16"]
    found = []
    for number, layer in enumerate(tune.LAYERS):
        config = tune.candidates(direction, layer)[0] | {"mark": number}
        found.append((layer.size(direction, 2560), config))
    table = json.loads(tune.dump({"device": "some GPU", "tile_conv": {direction: {"16": tune.rules(found, shipped)}}}))
    plain = conv_configs.table
    monkeypatch.setattr(conv_configs, "table", lambda device: table if device == "tried" else plain(device))
    conv_configs.pick.cache_clear()
    for number, (size, _) in enumerate(found):
        rule = conv_configs.pick("tile_conv", direction, "16", *size, "tried")
        assert rule["mark"] == [other for other, _ in found].index(size), (number, size, rule)
    assert conv_configs.pick("tile_conv", direction, "16", 2**25, 4096, 4096, "tried") == shipped[-1]
    assert conv_configs.pick("tile_conv", direction, "16", 100, 64, 64, "tried", True).get("odd")
    conv_configs.pick.cache_clear()


@pytest.mark.parametrize("direction", tune.DIRECTIONS)
@pytest.mark.parametrize("layer", tune.LAYERS, ids=str)
def test_quick_candidates_are_few_and_none_is_larger_than_the_layer(direction: str, layer: tune.TuneLayer) -> None:
    all_of_them, quick = tune.candidates(direction, layer), tune.candidates(direction, layer, quick=True)
    assert 1 <= len(quick) <= len(all_of_them) / 2 and len(quick) <= 12
    columns = layer.channels if direction == "grad_input" else layer.filters
    assert all(config["block_n"] <= max(64, columns) for config in all_of_them)
