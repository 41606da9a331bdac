"""Prompts of the `tiny` localizer: those it is trained on, and the held-out paraphrases that only evaluation sees."""

from __future__ import annotations

import random

NOUNS: dict[str, list[str]] = {
    "brain_tumour": ["brain tumour", "brain tumor", "tumour", "tumor", "tumours", "brain tumors", "cerebral tumour", "intracranial tumor",
                     "tumour of the brain", "tumor in the brain", "brain neoplasm", "neoplasm", "brain mass", "brain lesion",
                     "cerebral mass", "lesion of the brain", "mass in the head", "tumour in the head", "intracranial mass", "tumorous tissue",
                     "brain growth", "neoplastic lesion", "tumoral mass"],
    "glioma": ["glioma", "gliomas", "glial tumour", "glial tumor", "brain glioma", "glioma tumour", "cerebral glioma", "glioblastoma",
               "glioma of the brain", "glioma mass", "astrocytoma", "glial neoplasm", "gbm", "tumour of glial tissue"],
    "meningioma": ["meningioma", "meningiomas", "meningioma tumour", "meningioma tumor", "meningeal tumour", "brain meningioma",
                   "intracranial meningioma", "meningeal mass", "meningioma of the brain", "meningioma lesion"],
    "pituitary_tumour": ["pituitary tumour", "pituitary tumor", "pituitary tumors", "tumour of the pituitary", "pituitary adenoma",
                         "pituitary mass", "pituitary macroadenoma", "hypophyseal tumour", "sellar tumor", "pituitary brain tumour",
                         "adenoma", "sellar mass"],
    "lungs": ["lungs", "lung", "both lungs", "the two lungs", "lung fields", "pulmonary fields", "left and right lung", "left and right lungs",
              "lung tissue", "pulmonary tissue", "bilateral lungs", "lungs in the chest", "pair of lungs", "both pulmonary fields",
              "right lung and left lung", "lung parenchyma", "chest lungs"],
    "left_lung": ["left lung", "lung on the left", "lung on the left side", "left-sided lung", "left lung field", "left pulmonary field",
                  "patient's left lung", "left lung tissue", "left lung of the chest"],
    "right_lung": ["right lung", "lung on the right", "lung on the right side", "right-sided lung", "right lung field", "right pulmonary field",
                   "patient's right lung", "right lung tissue", "right lung of the chest"],
}
SCANS = {
    "brain": ["MRI", "brain MRI", "MR image", "T1 MRI", "magnetic resonance image", "head MRI", "FLAIR image", "MRI slice"],
    "chest": ["X-ray", "chest X-ray", "radiograph", "chest radiograph", "CXR", "CT", "chest CT", "CT slice", "computed tomography scan"],
}
TEMPLATES = ["{n}", "{n}", "{n}", "the {n}", "a scan with the {n}", "segment the {n}", "{n} on {s}", "{n} in a {s}", "a {s} showing the {n}",
             "{s}: {n}", "where is the {n} in this {s}"]

# Content words in combinations that `training_prompt` cannot make (tested); six per structure.
HELD_OUT: dict[str, list[str]] = {
    "brain_tumour": ["neoplasm inside the patient's head", "highlight any intracranial neoplasm", "cerebral lesion, possibly malignant",
                     "an MRI slice highlighting the brain tumour in this patient", "growth within the cerebrum", "tumorous mass of the brain"],
    "glioma": ["glial lesion", "please outline the intracranial glioma", "high-grade glioblastoma in the brain",
               "oligodendroglioma", "glial neoplasm within the cerebrum", "cerebral astrocytoma"],
    "meningioma": ["meningeal neoplasm", "tumour of the meningeal tissue", "find the meningioma mass inside the head",
                   "meningeal lesion on contrast-enhanced MRI", "large cerebral meningioma", "intracranial meningeal growth"],
    "pituitary_tumour": ["neoplasm of the pituitary", "hypophyseal adenoma", "the mass in the sellar region", "pituitary microadenoma",
                         "sellar lesion in the pituitary", "tumour at the hypophysis"],
    "lungs": ["both of the patient's pulmonary fields on a chest film", "bilateral lung fields", "the pair of air-filled lungs in the thorax",
              "pulmonary parenchyma of both sides", "outline the whole lungs on this thoracic CT", "lung fields, left and right"],
    "left_lung": ["left pulmonary parenchyma", "parenchyma of the left lung", "the lung at the patient's left in the thorax",
                  "left thoracic lung", "show me the lung field on the left", "leftsided pulmonary tissue"],
    "right_lung": ["right pulmonary parenchyma", "parenchyma of the right lung", "the lung at the patient's right in the thorax",
                   "right thoracic lung", "show me the lung field on the right", "rightsided pulmonary tissue"],
}


def training_prompt(structure: str, rng: random.Random) -> str:
    """One random training prompt for a structure."""
    scans = SCANS["chest" if "lung" in structure else "brain"]
    if rng.random() < 0.1:
        scans = SCANS["brain" if "lung" in structure else "chest"]  # the image decides, not the scan that a prompt mentions
    return rng.choice(TEMPLATES).format(n=rng.choice(NOUNS[structure]), s=rng.choice(scans))


def possible_training_prompts(structure: str) -> set[str]:
    """Every string that `training_prompt` can return for a structure."""
    scans = SCANS["brain"] + SCANS["chest"]
    return {t.format(n=n, s=s) for t in TEMPLATES for n in NOUNS[structure] for s in scans}
