"""The command line: every command runs, and every refusal is one sentence with an exit code that is not 0."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file

from mwm.cli import COMMANDS, main
from mwm.cli.errors import sentence as sentence_of
from mwm.train import checkpoint


def run(*words: str | Path, cwd: Path | None = None, code: int | None = 0, threads: str = "1") -> subprocess.CompletedProcess[str]:
    """`mwm …` as a user types it."""
    done = subprocess.run([sys.executable, "-m", "mwm", *map(str, words)], capture_output=True, text=True, cwd=cwd, timeout=240, check=False,
                          env={**os.environ, "OMP_NUM_THREADS": threads, "PYTHONWARNINGS": "default"})
    if code is not None:
        assert done.returncode == code, f"{words}: exit code {done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six grey pictures with a bright disc, and a folder of masks of the discs."""
    root = tmp_path_factory.mktemp("cli")
    (root / "images").mkdir()
    (root / "masks").mkdir()
    generator = np.random.default_rng(0)
    rows, columns = np.mgrid[:64, :64]
    for k in range(6):
        disc = (rows - 24 - 3 * k) ** 2 + (columns - 32) ** 2 < 15**2
        pixels = generator.integers(20, 90, (64, 64)) + 120 * disc
        Image.fromarray(pixels.astype(np.uint8)).save(root / "images" / f"scan_{k}.png")
        Image.fromarray((255 * disc).astype(np.uint8)).save(root / "masks" / f"scan_{k}.png")
    return root


TINY_RUN = ("--encoder", "resnet18", "--image-size", "64", "--decoder-width", "32", "--batch-size", "3", "--epochs", "1", "--warmup-epochs", "0",
            "--workers", "0", "--panel-every", "0", "--no-progress")


@pytest.fixture(scope="module")
def trained(images: Path) -> Path:
    """A run of one epoch, made by the command."""
    out = images / "run"
    done = run("pretrain", images / "images", "--regions", images / "masks", "--out", out, *TINY_RUN)
    assert "encoder.safetensors" in done.stdout and "inside" in done.stdout
    return out


def sentence(done: subprocess.CompletedProcess[str]) -> str:
    """The refusal: one line on stderr that begins with the program's name, no traceback."""
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.strip().splitlines() if line.startswith("mwm: ")]
    assert len(lines) == 1, done.stderr
    return lines[0]


def test_help_and_version_do_not_import_torch() -> None:
    code = "import sys; from mwm.cli import main\ntry: main(['--help'])\nexcept SystemExit: pass\nsys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False).returncode == 0
    assert run("--version").stdout.startswith("mwm 0.")


def test_the_help_lists_every_command_and_each_explains_itself(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    overview = capsys.readouterr().out
    for command in COMMANDS:
        assert f"\n  {command} " in overview
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert "usage: mwm " + command in capsys.readouterr().out


@pytest.mark.parametrize("words", [["frobnicate"], ["--frobnicate"], ["pretrain", "--frobnicate"], ["pretrain", "x", "--epochs", "many"],
                                   ["preview"], ["bench", "frobnicate"]])
def test_unknown_words_end_in_one_sentence(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main(words)
    except SystemExit as stop:
        code = stop.code
    captured = capsys.readouterr()
    assert code == 2
    assert captured.err.startswith("mwm: ") and captured.err.count("\n") == 1


def test_bench_lists_its_benches_with_what_they_measure() -> None:
    assert "mwm bench encoder" in run("bench").stdout


def test_localize_lists_localizers_and_words(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["localize", "--list"]) == 0
    assert "tiny" in capsys.readouterr().out
    assert main(["localize", "--vocabulary"]) == 0
    assert "left lung" in capsys.readouterr().out


def test_localize_with_masks_finds_everything_done_the_second_time(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("localize", str(images / "images"), "--localizer", "maps", "--maps", str(images / "masks"), "--out", str(tmp_path / "regions"))
    assert "6 computed" in run(*words).stdout
    assert main(words) == 0
    assert "0 computed, 6 from the cache" in capsys.readouterr().out


def test_preview_draws_a_gallery_and_prints_the_statistics(images: Path, tmp_path: Path) -> None:
    done = run("preview", images / "images", "--regions", images / "masks", "--image-size", "64", "--patch-size", "16", "--out", tmp_path, "--count", "3")
    assert "region patches per image" in done.stdout and "hidden:  inside" in done.stdout
    page = (tmp_path / "preview.html").read_text()
    assert page.count("<img") == 9 and "scan_0" not in page, "file names have no place in a figure that may be shared"
    with Image.open(tmp_path / "preview.png") as picture:
        assert picture.width > 600


def test_preview_of_the_foreground_policy_takes_its_map_and_misses_it(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", str(images / "images"), "--regions", str(images / "masks"), "--image-size", "64", "--patch-size", "16", "--out", str(tmp_path)]
    assert main([*words, "--policy", "foreground", "--foreground", str(images / "masks")]) == 0
    assert "--foreground FOREGROUND" in (tmp_path / "preview.html").read_text()
    for wrong in (["--policy", "foreground"], ["--foreground", str(images / "masks")]):
        assert main([*words, *wrong]) == 2
        assert "foreground must be given with --policy foreground, and only there" in capsys.readouterr().err


def test_the_page_of_a_preview_names_no_folder_of_the_user(images: Path, tmp_path: Path) -> None:
    patient = tmp_path / "JANE_DOE"
    shutil.copytree(images / "images", patient)
    assert main(["preview", str(patient), f"--regions={images / 'masks'}", "--image-size", "64", "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "preview.html").read_text()
    assert "JANE_DOE" not in page and str(tmp_path) not in page
    assert "mwm preview IMAGES --regions=REGIONS --image-size 64 --out OUT" in page
    (tmp_path / "list.txt").write_text("\n".join(path.name for path in patient.iterdir()) + "\n")
    words = ["preview", str(tmp_path / "list.txt"), "--root", str(patient), "--regions", str(images / "masks"), "--image-size", "64", "--out", str(tmp_path / "out")]
    assert main(words) == 0
    page = (tmp_path / "out" / "preview.html").read_text()
    assert "JANE_DOE" not in page and "mwm preview IMAGES --root ROOT --regions REGIONS" in page


def test_a_file_name_cannot_write_to_the_terminal(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A name with an escape sequence had reached the terminal as it is."""
    scans = tmp_path / "scans"
    shutil.copytree(images / "images", scans)
    (scans / "a\x1b[31m\x07.png").write_bytes(b"no image")
    words = ["localize", str(scans), "--localizer", "maps", "--maps", str(images / "masks"), "--out", str(tmp_path / "out"), "--strict"]
    assert main(words) == 2
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out and "\\x1b[31m" in said.err
    (scans / "b\x1b[31m.png").write_bytes(b"no image")
    assert main(["preview", str(scans), "--policy", "uniform", "--image-size", "64", "--out", str(tmp_path / "preview")]) == 0
    said = capsys.readouterr()
    assert "\x1b" not in said.err + said.out and "\\x1b[31m" in said.out


def test_a_preview_without_regions_says_nothing_of_regions(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """It had warned that all regions were empty, and advised another prompt."""
    assert main(["preview", str(images / "images"), "--policy", "uniform", "--image-size", "64", "--patch-size", "16", "--out", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    page = (tmp_path / "preview.html").read_text()
    assert "% of the patches, by uniform; " in said and "grid 4x4" in said
    for text in (said, page):
        assert "prompt" not in text and "empty" not in text and "orange" not in text and "are region" not in text
    assert "hidden: 6" in page  # the default's share, under each mask


def test_a_warning_is_one_line_without_the_place_in_our_code(images: Path, tmp_path: Path) -> None:
    regions = tmp_path / "regions"
    run("localize", images / "images", "--localizer", "maps", "--maps", images / "masks", "--out", regions, "--intensity", "minmax")
    done = run("preview", images / "images", "--regions", regions, "--image-size", "64", "--out", tmp_path / "out")
    told = [line for line in done.stderr.splitlines() if "intensity" in line]
    assert len(told) == 1 and told[0].startswith("mwm: warning: ") and "UserWarning" not in done.stderr


def test_preview_warns_with_the_remedy_where_regions_are_smaller_than_a_patch(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    masks = tmp_path / "masks"
    masks.mkdir()
    for k in range(6):
        dot = np.zeros((64, 64), np.uint8)
        dot[10:13, 10:13] = 255
        Image.fromarray(dot).save(masks / f"scan_{k}.png")
    assert main(["preview", str(images / "images"), "--regions", str(masks), "--image-size", "64", "--out", str(tmp_path / "out")]) == 0
    text = capsys.readouterr().out
    assert "warning" in text and "finer grid" in text


def test_pretrain_leaves_what_the_next_command_needs(trained: Path) -> None:
    assert {"encoder.safetensors", "config.yaml", "run.json", "metrics.csv", "model.safetensors", "config.json"} <= {p.name for p in trained.iterdir()}


def test_pretrain_refuses_to_overwrite_and_loses_nothing(images: Path, trained: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}
    assert main(["pretrain", str(images / "images"), "--regions", str(images / "masks"), "--out", str(trained), *TINY_RUN]) == 2
    assert "overwrite" in capsys.readouterr().err
    assert before == {p.name: p.read_bytes() for p in trained.iterdir() if p.is_file()}


def test_pretrain_takes_a_file_and_flags_override_it(images: Path, trained: Path, tmp_path: Path) -> None:
    import yaml

    assert main(["pretrain", "--config", str(trained / "config.yaml"), "--out", str(tmp_path / "again"), "--seed", "5", "--no-flip"]) == 0
    settings = yaml.safe_load((tmp_path / "again" / "config.yaml").read_text())
    assert (settings["seed"], settings["flip"], settings["image_size"], settings["encoder"]) == (5, False, 64, "resnet18")


def test_resume_of_a_finished_run_changes_no_weight(trained: Path) -> None:
    before = load_file(trained / "encoder.safetensors")
    run("pretrain", "--resume", "--out", trained, "--no-progress")  # in a process of its own: as many threads as the run began with
    after = load_file(trained / "encoder.safetensors")
    assert before.keys() == after.keys() and all((before[name] == after[name]).all() for name in before)


def test_finetune_probes_a_run(images: Path, trained: Path, tmp_path: Path) -> None:
    tree = tmp_path / "labelled"
    generator = np.random.default_rng(1)
    for label, level in (("dark", 60), ("light", 150)):
        (tree / label).mkdir(parents=True)
        for k in range(12):
            Image.fromarray(generator.integers(level - 40, level + 40, (64, 64)).astype(np.uint8)).save(tree / label / f"{k}.png")
    done = run("finetune", trained, tree, "--task", "classify", "--linear-probe", "--out", tmp_path / "probe", "--bootstrap", "50")
    assert "AUROC" in done.stdout or "auroc" in done.stdout
    assert (tmp_path / "probe" / "confusion.png").exists()


@pytest.mark.parametrize(("words", "part"), [
    (("pretrain", "nowhere", "--regions", "masks", "--out", "bad"), "nowhere"),
    (("pretrain", "empty", "--regions", "masks", "--out", "bad"), "empty"),
    (("pretrain", "images", "--regions", "masks", "--out", "bad", "--image-size", "100"), "patch_size must divide"),
    (("pretrain", "images", "--regions", "masks", "--out", "bad", "--mask-ratio", "1"), "[0, 1)"),
    (("pretrain", "images", "--regions", "masks", "--out", "bad", "--encoder", "resnet-eighteen"), "resnet-eighteen"),
    (("pretrain", "images", "--regions", "masks"), "out must be"),
    (("pretrain", "--config", "nofile.yaml", "--out", "bad"), "nofile.yaml"),
    (("pretrain", "--resume", "--out", "nothing"), "nothing"),
    (("pretrain", "--resume"), "--out RUN"),
    (("preview", "images"), "prompt"),
    (("preview", "images", "--regions", "masks", "--patch-size", "30"), "patch_size must divide"),
    (("preview", "images", "--policy", "uniform", "--mask-ratio", "1.5"), "[0, 1)"),
    (("localize", "images"), "prompt"),
    (("localize",), "IMAGES"),
    (("localize", "images", "--prompt", "a purple giraffe"), "giraffe"),
    (("localize", "images", "--prompt", "lungs", "--localizer", "huge"), "huge"),
    (("localize", "images", "--prompt", "lungs", "--threshold", "3"), "threshold"),
    (("localize", "images", "--localizer", "maps", "--maps", "masks", "--out", "images"), "holds other files"),
    (("localize", "images", "--prompt", "lungs", "--device", "teapot"), "cpu, cuda"),
    (("pretrain", "images", "--mask-ratio", "0.5", "--out", "bad", "--device", "teapot"), "cpu, cuda"),
    (("pretrain", "images", "--regions", "masks", "--prompt", "lungs", "--out", "bad"), "got both"),
    (("pretrain", "images", "--regions", "masks", "--expand", "1.2", "--out", "bad"), "--expand"),
    (("pretrain", "images", "--expand", "1.2", "--out", "bad"), "--expand must go with a prompt that is localized now, got no prompt"),
    (("pretrain", "images", "--high", "0.9", "--low", "0.2", "--out", "bad"), "high must be left out with masks that are uniform"),
    (("preview", "images", "--regions", "masks", "--prompt", "lungs"), "got both"),
    (("preview", "images", "--regions", "masks", "--threshold", "0.2"), "--threshold"),
    (("finetune", "nowhere", "labelled"), "nowhere"),
    (("finetune", "labelled", "labelled"), "labelled"),
], ids=lambda value: " ".join(value) if isinstance(value, tuple) else None)
def test_bad_input_ends_in_one_sentence_that_says_what_to_do(words: tuple[str, ...], part: str, images: Path, monkeypatch: pytest.MonkeyPatch,
                                                             capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(images)
    (images / "empty").mkdir(exist_ok=True)
    for name in ("a", "b"):
        (images / "labelled" / name).mkdir(parents=True, exist_ok=True)
        for k in range(6):
            shutil.copy(images / "images" / f"scan_{k}.png", images / "labelled" / name / f"{name}{k}.png")
    assert main(list(words)) == 2
    captured = capsys.readouterr().err
    lines = [line for line in captured.splitlines() if line.startswith("mwm: ")]
    assert len(lines) == 1 and part in lines[0] and lines[0].rstrip().endswith((".", ")", "`")), captured
    assert "Traceback" not in captured and not (images / "bad").exists()


def test_an_unreadable_file_is_skipped_counted_and_listed(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "images"
    folder.mkdir()
    for file in (images / "images").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    (folder / "cut.png").write_bytes((images / "images" / "scan_0.png").read_bytes()[:200])
    assert main(["pretrain", str(folder), "--mask-ratio", "0.6", "--out", str(tmp_path / "run"), *TINY_RUN]) == 0
    assert "skipped: 1" in capsys.readouterr().out
    assert "cut.png" in (tmp_path / "run" / "skipped.csv").read_text()
    refused = sentence(run("pretrain", folder, "--mask-ratio", "0.6", "--out", tmp_path / "strict", "--strict", *TINY_RUN, code=2))
    assert "cut.png" in refused and not (tmp_path / "strict").exists()


def test_ctrl_c_ends_in_one_sentence_and_leaves_a_whole_run(images: Path, tmp_path: Path) -> None:
    words = ["pretrain", images / "images", "--mask-ratio", "0.5", "--out", tmp_path / "run", *TINY_RUN, "--epochs", "5000", "--checkpoint-steps", "2", "--log-every", "1"]
    # Tests that were started in the background (`make test &`) ignore interrupts, and so would what they start.
    process = subprocess.Popen([sys.executable, "-m", "mwm", *map(str, words)], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))
    deadline = time.monotonic() + 120
    while not (tmp_path / "run" / "checkpoint.pt").exists() and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.2)
    try:
        for _ in range(6):  # Python drops an interrupt that comes while an object is finalised; a user types it again
            process.send_signal(signal.SIGINT)
            with contextlib.suppress(subprocess.TimeoutExpired):
                _, complaint = process.communicate(timeout=20)
                break
    finally:
        process.kill()
    assert process.returncode == 130, complaint
    assert "stopped by Ctrl-C" in complaint and "--resume" in complaint and "Traceback" not in complaint
    assert checkpoint.load(tmp_path / "run" / "checkpoint.pt")["step"] >= 2


@pytest.mark.parametrize(("error", "words"), [
    (OSError(errno.ENOSPC, "No space left on device", "run/checkpoint.pt"), "the disk is full: run/checkpoint.pt"),
    (PermissionError(errno.EACCES, "Permission denied", "run"), "no permission: run"),
    (FileNotFoundError(errno.ENOENT, "No such file or directory", "scan.png"), "no such file or folder: scan.png"),
    (ValueError("Caught DataError in DataLoader worker process 0.\nOriginal Traceback:\n  …\nmwm.data.errors.DataError: read: a.png is truncated."), "read: a.png is truncated."),
    (FileExistsError(errno.EEXIST, "File exists", "regions"), "choose another path"),
    (MemoryError(), "the memory does not suffice"),
], ids=lambda value: type(value).__name__ if isinstance(value, Exception) else None)
def test_errors_of_the_machine_become_sentences_with_a_remedy(error: Exception, words: str) -> None:
    text, code = sentence_of(error)
    assert code == 2 and words in text and "\n" not in text


def test_debug_raises_the_error_itself() -> None:
    with pytest.raises(ValueError, match="nowhere"):
        main(["preview", "nowhere", "--policy", "uniform", "--debug"])


def test_preview_does_not_keep_the_regions_of_all_images(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten thousand regions of 224 pixels are two gigabytes."""
    import gc
    import weakref

    from mwm.data import PretrainDataset

    item, given, most = PretrainDataset.__getitem__, [], [0]

    def watched(self: PretrainDataset, key: int) -> dict[str, object]:
        gc.collect()
        most[0] = max(most[0], sum(found() is not None for found in given))
        sample = item(self, key)
        given.append(weakref.ref(sample["region"]))
        return sample

    monkeypatch.setattr(PretrainDataset, "__getitem__", watched)
    assert main(["preview", str(images / "images"), "--regions", str(images / "masks"), "--image-size", "64", "--count", "1", "--out", str(tmp_path)]) == 0
    assert len(given) == 7 and most[0] <= 2
