"""`mwm prompts`: lists, prints, and writes more with a small language model that lies in a folder, as a user's would."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mwm.cli import main
from mwm.localize.prompt_sets import load_prompt_set, resolve_prompts
from mwm.localize.prompt_writer import PromptWriter, as_yaml, clean, usable

TAUGHT = ["a dark mass inside the brain", "a tumour that shines brightly", "nothing of interest here", "a glioma with a bright rim"]


@pytest.fixture(scope="module")
def writer_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A GPT-2 of some ten thousand weights that has learnt to list four sentences."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

    vocabulary = dict.fromkeys(["<end>", "<other>", "\n", "▁-", "-", *(f"▁{word}" for text in TAUGHT for word in text.split())])
    tokenizer = Tokenizer(models.WordLevel({word: k for k, word in enumerate(vocabulary)}, unk_token="<other>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split("\n", "isolated"), pre_tokenizers.Metaspace(prepend_scheme="never")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", unk_token="<other>")
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(vocabulary), n_positions=96, n_embd=32, n_layer=1, n_head=2, eos_token_id=0, bos_token_id=0)
    model = GPT2LMHeadModel(config)
    order = torch.Generator().manual_seed(1)
    optimiser = torch.optim.AdamW(model.parameters(), 1e-2)
    for _ in range(60):
        rows = ["-" + "".join(f" {TAUGHT[k]}\n-" for k in torch.randperm(4, generator=order).repeat(3).tolist()) for _ in range(4)]
        tokens = torch.tensor([fast(row)["input_ids"][:80] for row in rows])
        loss = model(tokens, labels=tokens).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    assert float(loss.detach()) < 0.8
    folder = tmp_path_factory.mktemp("writer")
    model.save_pretrained(folder)
    fast.save_pretrained(folder)
    return folder


def test_model_writes_new_sentences_about_the_target_and_nothing_else(writer_folder: Path) -> None:
    target = load_prompt_set("brain_mri_tumour")
    writer = PromptWriter(writer_folder, "cpu")
    found = writer.write(target, "P2", count=3, seed=0)
    assert found and all(usable(text, target) for text in found) and len(set(found)) == len(found) <= 3
    assert set(found) & set(TAUGHT) and "nothing of interest here" not in found
    before = torch.random.get_rng_state()
    assert writer.write(target, "P2", count=3, seed=0) == found
    assert torch.equal(before, torch.random.get_rng_state())
    assert not set(found) & set(target.sentences("P2"))


def test_model_with_a_chat_template_is_asked_in_its_own_words(writer_folder: Path) -> None:
    writer = PromptWriter(writer_folder, "cpu")
    writer.tokenizer.chat_template = "{% for message in messages %}{{ message['content'] }}\n-{% endfor %}"
    asked = writer.tokenizer.decode(writer._question(load_prompt_set("brain_mri_tumour"), "P3", "glioma", ["a glioma"])[0])
    assert "a glioma" in asked.replace("  ", " ") and asked.rstrip().endswith("-")
    assert all(usable(text, load_prompt_set("brain_mri_tumour")) for text in writer.write(load_prompt_set("brain_mri_tumour"), "P2", 2))


def test_command_writes_a_set_that_localize_reads(writer_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    out = tmp_path / "more.yaml"
    asked = ["prompts", "brain_mri_tumour:P3/glioma", "--llm", str(writer_folder), "--count", "2", "--device", "cpu"]
    assert main([*asked, "--out", str(out)]) == 0
    assert "read them" in capsys.readouterr().out and out.read_text().startswith("# Written by") and str(writer_folder.parent) not in out.read_text()
    found, texts = resolve_prompts(f"{out}:P3/glioma")
    assert 1 <= len(texts) <= 2 and found.title == "tumour in brain MRI"
    assert main([*asked, "--out", str(out)]) == 2 and "must be a new .yaml file" in capsys.readouterr().err
    assert main(asked) == 0 and "glioma:" in capsys.readouterr().out


def test_lines_of_a_list_become_sentences() -> None:
    assert clean(' 12)  "A bright  mass in the brain."  ') == "A bright mass in the brain"
    assert clean("• a tumour;") == "a tumour" and clean("- - x") == "- x"


@pytest.mark.parametrize(("text", "level", "fits"), [
    ("a bright mass", "P1", True), ("a bright mass that is longer than eight words are", "P1", False), ("a bright cat", "P2", False),
    ("a mass, see https://x.org", "P2", False), ("mass " * 41, "P2", False), ("a mass <b>", "P2", False), ("", "P2", False),
])
def test_sentences_are_filtered_by_form(text: str, level: str, fits: bool) -> None:
    assert usable(text, load_prompt_set("brain_mri_tumour"), level) == fits


def test_sets_are_listed_and_printed(capsys: pytest.CaptureFixture) -> None:
    assert main(["prompts"]) == 0
    assert len(capsys.readouterr().out.splitlines()) >= 12
    assert main(["prompts", "wound:P1"]) == 0
    assert capsys.readouterr().out.splitlines() == load_prompt_set("wound").sentences("P1")
    assert main(["prompts", "wund"]) == 2
    assert "Did you mean wound?" in capsys.readouterr().err


def test_what_cannot_write_is_refused_in_one_sentence(tmp_path: Path, clipseg_folder: Path, writer_folder: Path, capsys: pytest.CaptureFixture) -> None:
    for model, sentence in [(tmp_path / "none", "local folder or a hub name"), (tmp_path, "config.json"), (clipseg_folder, "must be a text-generation model")]:
        with pytest.raises(ValueError, match=sentence):
            PromptWriter(model, "cpu")
    with pytest.raises(ValueError, match="wrote no sentence that names wound"):
        PromptWriter(writer_folder, "cpu").write(load_prompt_set("wound"), "P1", 2)
    with pytest.raises(ValueError, match="count must be"):
        PromptWriter(writer_folder, "cpu").write(load_prompt_set("wound"), "P1", 0)
    assert main(["prompts", "--llm", "x"]) == 2 and "SET must be given" in capsys.readouterr().err
    assert main(["prompts", "wound", "--out", "x.yaml"]) == 2 and "go with --llm" in capsys.readouterr().err
    with pytest.raises(ValueError, match="level must be one of"):
        as_yaml(load_prompt_set("wound"), "P7", ["a wound"], "x")
