"""The demo from start to end: what is cheap first, so that there is something to see within a minute."""

from __future__ import annotations

import platform
import shlex
from dataclasses import dataclass
from pathlib import Path

import torch

import mwm
from mwm.data import PretrainDataset, ReadSettings
from mwm.demo import regions as parts
from mwm.demo import training
from mwm.demo.console import Console
from mwm.demo.page import DISCLAIMER, Findings, build_report, probe_chart
from mwm.demo.probe import run_probe
from mwm.demo.race import DENSE, MASKED, run_race
from mwm.demo.scans import ASPECT, Scans, load_scans, read_scans
from mwm.localize import localize_folder
from mwm.masking import Policy, stack_inside
from mwm.view import Chart, save


@dataclass(frozen=True)
class DemoConfig:
    """Settings of the demo.

    Attributes:
        out: folder of the report, the pictures and the run.
        train_seconds: time for the steps of pre-training; the number of epochs follows from it.
        quick: a few steps on a few scans, to see that everything runs; the figures then mean nothing.
        seed: of weights, masks and splits.
    """

    out: str = "demo"
    train_seconds: float = 150.0
    quick: bool = False
    seed: int = 0


def run_demo(config: DemoConfig | None = None) -> Path:
    """Run the pipeline and write the report.

    Returns:
        The report, an HTML file that needs nothing else.
    """
    return _Demo(config or DemoConfig()).run()


class _Demo:
    """The demo in flight."""

    def __init__(self, config: DemoConfig) -> None:
        self.config, self.out, self.console = config, Path(config.out), Console(5)

    def run(self) -> Path:
        self.out.mkdir(parents=True, exist_ok=True)
        scans = load_scans()
        self.found = Findings(_machine(), len(scans.records), scans.attribution, _commands(self.out))
        self.console.say(f"mwm {mwm.__version__} demo: {len(scans.records)} scans, {_threads()}; everything goes to {self.out}/")
        self._see_regions(scans)
        self._see_masks(scans)
        self._race(scans)
        self._train(scans)
        self._probe(scans)
        self.found.seconds = self.console.seconds
        report = build_report(self.found).write(self.out / "report.html")
        self._close(report)
        return report

    def _save(self, sheet_or_chart, name: str) -> None:
        self.console.wrote(save(sheet_or_chart.image(), self.out / name))

    def _see_regions(self, scans: Scans) -> None:
        self.console.begin("A prompt names a region")
        self.localizer = mwm.create_localizer("tiny")
        self.found.prompts, shares = parts.prompts_sheet(scans, self.localizer)
        for prompt, share in shares:
            self.console.say(f"       “{prompt}” marks {100 * share:.1f} % of the X-ray")
        self._save(self.found.prompts, "1_prompts.png")
        self.shown = parts.locate_shown(scans, self.localizer)
        self.policy, self.uniform = parts.policies()
        self.region_mask = parts.draw(self.policy, self.shown, seed=self.config.seed)
        self.found.cases = parts.cases_sheet(self.shown, self.region_mask, self.policy)
        self._save(self.found.cases, "2_prompt_to_mask.png")

    def _see_masks(self, scans: Scans) -> None:
        self.console.begin("The region decides what is hidden")
        uniform_mask = parts.draw(self.uniform, self.shown, seed=self.config.seed)
        self.found.policies = parts.policies_sheet(self.shown, self.region_mask, uniform_mask, self.policy)
        self._save(self.found.policies, "3_uniform_and_region.png")
        self.regions = self.out / "regions"
        localize_folder(scans.records, None, self.localizer, self.regions, parts.REFINE)
        chart = self.found.policy_shares = self._shares(scans, parts.SIZE, with_uniform=True)[1]
        self._save(chart, "4_hidden_shares.png")

    def _shares(self, scans: Scans, size: int, *, with_uniform: bool) -> tuple[Policy, Chart]:
        """The region policy completed with the share of empty regions, and the hidden shares of all scans at `size` pixels."""
        grid = (size // parts.PATCH, size // parts.PATCH)
        dataset = PretrainDataset(scans.records, ReadSettings(size=(size, size), aspect=ASPECT), str(self.regions), None)
        inside = stack_inside((dataset[k]["region"] for k in range(len(dataset))), grid, self.policy)
        policy = self.policy.with_empty_share(self.policy.mean_share(inside))
        named = {"region mask": policy, **({"uniform mask": mwm.create_policy("uniform", match=policy)} if with_uniform else {})}
        return policy, parts.shares_chart(inside, torch.tensor([record.id for record in scans.records]), grid, named, seed=self.config.seed)

    def _race(self, scans: Scans) -> None:
        self.console.begin("The encoder pays only for what is visible")
        count, size = (2, 128) if self.config.quick else (8, parts.SIZE)
        images = read_scans(scans.of("chest_xray")[:count], size)
        policy = mwm.create_policy("uniform", overall=0.6)
        active = policy(None, grid=(size // parts.PATCH, size // parts.PATCH), seed=self.config.seed, ids=torch.arange(count), epoch=0)
        race = self.found.race = run_race(images, active, budget=2.0 if self.config.quick else 20.0, seed=self.config.seed)
        self.console.say(f"       ResNet-50, forward and backward, {race.hidden:.0%} hidden: largest difference from mask-multiply {race.difference:.0e} "
                         "(relative to the largest feature)")
        self.console.say(f"       {race.ratios[DENSE]:.2f} x faster than dense, {race.ratios[MASKED]:.2f} x faster than mask-multiply (medians of {race.pairs} interleaved rounds)")
        report = build_report(self.found).write(self.out / "report.html")
        self.console.say(f"       {report} shows this much already; the rest follows")

    def _train(self, scans: Scans) -> None:
        self.console.begin("Pre-training without labels")
        config = training.configure(self.config.train_seconds, scans, self.regions, self.out / "run", quick=self.config.quick, seed=self.config.seed)
        run, seconds = training.train(config)
        shown = parts.locate_shown(scans, self.localizer, training.SIZE)
        policy, shares = self._shares(scans, training.SIZE, with_uniform=False)
        self.found.training = training.describe(config, run, seconds, shown, parts.draw(policy, shown, seed=self.config.seed), shares, policy)
        self.run_folder = run
        self._save(self.found.training.loss, "5_loss.png")
        self._save(self.found.training.reconstruction, "6_reconstruction.png")

    def _probe(self, scans: Scans) -> None:
        self.console.begin("What the features are worth so far")
        records, labels, patients = scans.probed()
        self.found.probe = run_probe(self.run_folder, read_scans(records, training.SIZE), labels, patients, seed=self.config.seed,
                                     rounds=200 if self.config.quick else 2000)
        first = self.found.probe[0]
        self.console.say(f"       bacterial against viral pneumonia, fitted on {first.fit_images} X-rays of {first.fit_patients} patients, tested on "
                         f"{first.test_images} of {first.test_patients} others")
        for row in self.found.probe:
            self.console.say(f"       {row.name:20} AUROC {row.auroc:.2f}  (95 % interval {row.low:.2f} to {row.high:.2f}, n = {row.test_images})")
        self.console.say(f"       {DISCLAIMER}")
        self._save(probe_chart(self.found.probe), "7_probe.png")

    def _close(self, report: Path) -> None:
        minutes, seconds = divmod(int(self.console.seconds), 60)
        self.console.say(f"\nDone in {minutes} min {seconds} s. The report: {report.resolve()}")
        self.console.say("\nNext, on your own images:")
        for words, command in self.found.commands[:2]:
            self.console.say(f"\n  {words}\n\n    {command}")
        self.console.say()


def _machine() -> str:
    cpu = next((line.split(":", 1)[1].strip() for line in _cpu_lines() if line.startswith("model name")), platform.machine())
    return f"Measured on this machine: {cpu}, {_threads()}, torch {torch.__version__}, mwm {mwm.__version__}."


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count} CPU thread{'s' if count > 1 else ''}"


def _cpu_lines() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []


def _commands(out: Path) -> list[tuple[str, str]]:
    """What to type next, in the order in which one would."""
    run = shlex.quote(str(out / "run"))
    return [
        ("Look at regions and masks of chest X-rays of your own:", 'mwm preview MY_XRAYS --prompt "both lungs"'),
        ("Pre-train on them:", 'mwm pretrain MY_XRAYS --prompt "both lungs" --encoder resnet50 --out runs/mine'),
        ("Other organs and other prompts need a localizer that knows them, or masks that you have:",
         'mwm pretrain MY_IMAGES --prompt "liver" --localizer clipseg --localizer-checkpoint CIDAS/clipseg-rd64-refined --out runs/liver'),
        ("Fine-tune the demo's own encoder on a folder with one sub-folder per class:", f"mwm finetune {run} MY_LABELLED_IMAGES --task classify"),
    ]
