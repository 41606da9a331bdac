"""The demo's report: what was found, in the order in which it was found, on one page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from mwm.demo.probe import ProbeRow
from mwm.demo.race import DENSE, MASKED, OURS, Race
from mwm.view import Chart, Report, Sheet, interval_chart

DISCLAIMER = "A few minutes of training, not evidence."


@dataclass
class Training:
    """What pre-training left.

    Attributes:
        loss: curve over steps.
        shares: hidden share inside and outside the region, as bars.
        reconstruction: images, masked input, reconstruction.
        facts: (figure, what it is).
        settings: (name, value) rows.
    """

    loss: Chart
    shares: Chart
    reconstruction: Sheet
    facts: list[tuple[str, str]]
    settings: list[tuple[str, str]]


@dataclass
class Findings:
    """Everything the report shows; what is None has not run yet.

    Attributes:
        machine: one line on processor, threads and versions.
        scans: number of scans.
        prompts: one X-ray under several prompts.
        cases: prompt, heat map, region and mask, one scan of each kind.
        policies: uniform and region masks with equally many visible patches.
        policy_shares: their hidden shares inside and outside, as bars.
        race: sparse against mask-multiply and dense.
        training: what pre-training left.
        probe: one row per kind of features.
        attribution: (set, source, licence) rows.
        commands: what to type next: (what it does, command).
        seconds: how long the demo took.
    """

    machine: str
    scans: int
    attribution: Sequence[Sequence[str]]
    commands: Sequence[tuple[str, str]]
    prompts: Sheet | None = None
    cases: Sheet | None = None
    policies: Sheet | None = None
    policy_shares: Chart | None = None
    race: Race | None = None
    training: Training | None = None
    probe: list[ProbeRow] = field(default_factory=list)
    seconds: float | None = None


def build_report(found: Findings) -> Report:
    """Put the findings on a page."""
    took = f" It took {found.seconds / 60:.1f} minutes." if found.seconds else " It is still running; the rest of this page follows when it is done."
    report = Report("From a text prompt to a pre-trained encoder",
                    f"`mwm demo` ran the whole pipeline on {found.scans} real scans: brain MRI, chest CT and chest X‑ray.{took}")
    report.text(found.machine)
    if found.prompts is not None:
        _prompts(report, found)
    if found.policies is not None:
        _masks(report, found)
    if found.race is not None:
        _race(report, found.race)
    if found.training is not None:
        _training(report, found.training)
    if found.probe:
        _probe(report, found.probe)
    report.section("Your own images", "Only the last of these needs labels. Regions are cached, runs resume, and every flag is also a line of a YAML file.")
    for words, command in found.commands:
        report.text(words).command(command)
    report.section("The scans", "They ship with the package under the licences below, reduced in size. No image on this page was used to train the localizer "
                   "`tiny`. Research software: not for clinical use.")
    report.table(("Set", "Source", "Licence"), found.attribution)
    return report


def probe_chart(rows: Sequence[ProbeRow]) -> Chart:
    """The rows of the probe with their intervals."""
    return interval_chart([(row.name, row.auroc, row.low, row.high, f"{row.auroc:.2f} [{row.low:.2f}, {row.high:.2f}]") for row in rows],
                          x_label="AUROC, bacterial against viral pneumonia, test patients", reference=(0.5, "chance"))


def _prompts(report: Report, found: Findings) -> None:
    report.section("A prompt names a region",
                   "The localizer reads the text: on the same X-ray, another prompt marks another place, and a prompt for something that is not there marks "
                   "nothing. Left is the patient's left, which stands on the right of the picture.")
    report.sheet(found.prompts, "One chest X-ray under three prompts.")
    report.sheet(found.cases, "From prompt to mask. The heat map becomes a region (threshold and largest components), the region decides which patches are hidden "
                 "more often. Grey patches are hidden; the orange line is the region. The scans were chosen because the structure is easy to see; "
                 "the localizer errs on others, see its model card.")


def _masks(report: Report, found: Findings) -> None:
    report.section("The region decides what is hidden",
                   "Both masks leave exactly as many patches visible in each image. The uniform mask hides everywhere alike; the region mask hides more where the prompt points.")
    report.sheet(found.policies, "Uniform and region masks with equally many visible patches.")
    report.chart(found.policy_shares, "Share of patches hidden inside and outside the region, over all scans and four epochs. The uniform mask hides inside and outside "
                 "of one scan alike; "
                 "its two bars differ because scans with large regions hide more patches under both.")


def _race(report: Report, race: Race) -> None:
    report.section("The encoder pays only for what is visible",
                   f"The same ResNet-50, forward and backward, on {race.images} scans of {race.size} x {race.size} pixels with {race.hidden:.0%} of the patches hidden "
                   f"and {race.threads} CPU thread{'s' if race.threads > 1 else ''}. Mask-multiply is how sparse encoding is usually emulated: "
                   "dense convolutions, multiplied by the mask after every layer. "
                   "Packed tiles compute the same numbers and skip what is hidden.")
    report.facts([(f"{race.ratios[DENSE]:.2f} ×", "faster than the dense network"), (f"{race.ratios[MASKED]:.2f} ×", "faster than mask-multiply"),
                  (f"{race.difference:.0e}", "largest difference from mask-multiply, relative to the largest feature"),
                  (f"{race.seconds[OURS] / race.images * 1000:.0f} ms", "per scan, forward and backward")])
    report.table(("Side", "Median of one step", "Time against packed tiles"),
                 [(name, f"{1000 * race.seconds[name]:.0f} ms", "1" if name == OURS else f"{race.ratios[name]:.2f} ×") for name in (OURS, DENSE, MASKED)],
                 f"Medians of {race.pairs} interleaved rounds on this machine; other work on it at the same time moves them.")


def _training(report: Report, training: Training) -> None:
    report.section("Pre-training without labels",
                   "The encoder sees the visible patches only; a light decoder rebuilds the hidden ones. The loss compares hidden patches, "
                   "each normalised by its own mean and deviation.")
    report.facts(training.facts)
    report.chart(training.loss, "Loss over steps: every step pale, running median strong.")
    report.sheet(training.reconstruction, "Masked input and reconstruction after this short run. A rebuilt patch takes the mean and contrast of the patch it replaces, "
                 "because the model predicts neither; what it adds is structure.")
    report.chart(training.shares, "Share of patches hidden inside and outside the region during this run.")
    report.table(("Setting", "Value"), training.settings)


def _probe(report: Report, rows: Sequence[ProbeRow]) -> None:
    first = rows[0]
    report.section("What the features are worth so far",
                   f"A logistic regression on frozen, standardised features separates bacterial from viral pneumonia. It is fitted on {first.fit_images} X-rays of "
                   f"{first.fit_patients} patients and tested on {first.test_images} X-rays of {first.test_patients} other patients. The encoders' batch-norm statistics "
                   "are recalibrated on whole images. Pre-training saw all of these images, without labels.")
    report.note(f"**{DISCLAIMER}** With so few patients the intervals are wide, and whichever row leads, this figure says nothing about the method.", kind="warning")
    report.chart(probe_chart(rows), "AUROC with 95 % intervals (bootstrap over test patients).")
    report.table(("Features", "AUROC", "95 % interval", "n test images", "n test patients", "Features per image"),
                 [(r.name, f"{r.auroc:.3f}", f"{r.low:.3f} – {r.high:.3f}", str(r.test_images), str(r.test_patients), str(r.features)) for r in rows])
