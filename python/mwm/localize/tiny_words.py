"""Word lists of the `tiny` localizer (see `tiny_text`)."""

from __future__ import annotations

# name: (example prompt, modality on which it can be present)
STRUCTURES: dict[str, tuple[str, str]] = {
    "brain_tumour": ("brain tumour", "brain MRI"),
    "glioma": ("glioma", "brain MRI"),
    "meningioma": ("meningioma", "brain MRI"),
    "pituitary_tumour": ("pituitary tumour", "brain MRI"),
    "lungs": ("both lungs", "chest X-ray, chest CT"),
    "left_lung": ("left lung", "chest X-ray, chest CT"),
    "right_lung": ("right lung", "chest X-ray, chest CT"),
}

CONCEPTS: dict[str, tuple[str, ...]] = {
    "tumour": ("tumour", "tumor", "tumours", "tumors", "neoplasm", "neoplasms", "neoplasia", "neoplastic", "tumoral", "tumorous"),
    "mass": ("mass", "masses", "lesion", "lesions", "growth", "growths"),
    "glioma": ("glioma", "gliomas", "glial", "glioblastoma", "glioblastomas", "gbm", "astrocytoma", "oligodendroglioma"),
    "meningioma": ("meningioma", "meningiomas", "meningeal"),
    "adenoma": ("adenoma", "adenomas", "macroadenoma", "microadenoma"),
    "pituitary": ("pituitary", "hypophyseal", "hypophysis", "sellar"),
    "brain": ("brain", "cerebral", "cerebrum", "intracranial", "cranial", "head", "intracerebral"),
    "lung": ("lung", "lungs"),
    "pulmonary": ("pulmonary",),
    "field": ("field", "fields", "parenchyma", "parenchymal", "tissue"),
    "left": ("left", "leftsided"),
    "right": ("right", "rightsided"),
    "both": ("both", "bilateral", "two", "pair"),
    "chest": ("chest", "thorax", "thoracic"),
    "modality": ("mri", "mr", "magnetic", "resonance", "t1w", "t2w", "flair", "ct", "computed", "tomography", "tomogram", "xray", "cxr",
                 "radiograph", "radiographs", "radiography", "roentgenogram"),
}

# Read as a word whose token was trained; the listed words among them have a token that no training prompt used.
ALIASES: dict[str, str] = {
    "cancer": "neoplasm", "cancers": "neoplasm", "malignancy": "neoplasm", "neoplasma": "neoplasm", "neoplasms": "neoplasm", "neoplasia": "neoplasm",
    "tumoural": "tumoral", "tumourous": "tumorous", "lesions": "lesion", "masses": "mass", "growths": "growth",
    "gliomatous": "glial", "glioblastomas": "glioblastoma", "astrocytomas": "astrocytoma", "oligoastrocytoma": "astrocytoma",
    "oligodendroglioma": "glioma", "oligodendrogliomas": "glioma", "adenomas": "adenoma", "microadenoma": "adenoma", "prolactinoma": "adenoma",
    "hypophysis": "pituitary", "hypophysial": "hypophyseal", "cerebrum": "brain", "cranial": "intracranial", "intracerebral": "cerebral",
    "lungfield": "lung", "lungfields": "lungs", "parenchymal": "parenchyma", "leftsided": "left", "rightsided": "right",
    "thorax": "chest", "thoracic": "chest", "thoracal": "chest", "xrays": "xray", "roentgen": "xray", "radiographs": "radiograph",
    "radiography": "radiograph", "roentgenogram": "radiograph", "tomogram": "tomography", "mris": "mri", "t2w": "mri", "cts": "ct",
}

NEGATIONS = frozenset("no not without non none absent absence free lacking negative except excluding outside exclude never nothing "
                      "normal healthy unaffected unremarkable minus besides".split())

FILLERS = frozenset("""
a an the this that these those it its their his her your our my i me we you he she they one and or of in on at to from for with within by as is
are was were be been being can could will would should may might do does did has have had there here where which what who whose when how that
if so then also only just please kindly now all any each every some whole entire complete full total single several more most very
show shows showing shown see sees seen find finds finding found locate locates located locating location locations highlight highlights
highlighted highlighting segment segments segmented segmenting segmentation mark marks marked marking outline outlines outlined outlining delineate
delineates delineated delineating detect detects detected detecting identify identifies identified identifying point points out draw draws
extract extracts select selects display displays displayed indicate indicates indicating indicated localize localizes localise
localises localized localised map maps give gives label labels trace contour contours look looks looking
image images picture pictures photo photos scan scans scanned slice slices film films view views study studies section sections exam
examination plane frame frames figure data
axial coronal sagittal frontal transverse posteroanterior anteroposterior pa ap portable erect supine plain contrast enhanced enhancing
weighted postcontrast gadolinium radiological radiologic medical clinical diagnostic imaging window mediastinal
area areas region regions zone zones pixels pixel extent boundary boundaries border borders position place site spot space volume shape
visible apparent present clear clearly bright dark grey gray large larger small smaller big round solid possible suspected known diagnosed
confirmed suspicious primary malignant benign grade high low
patient patients person people man woman men women male female child children kid boy girl infant adult adults baby newborn
subject subjects case cases human humans individual body year years month months old aged
side sides sided possibly probably likely origin maybe inside inner belonging using through across containing contains contain affected diseased sick ill air filled
aerated breathing
organ organs anatomy anatomical structure structures called named such like namely object target interest
want need like help thanks thank hello ok please precise precisely exact exactly accurate accurately careful carefully roughly around roi mask masks
hospital doctor radiologist upright focus focal attention size sized intensity abnormal pathological lying standing during after before
""".split())
