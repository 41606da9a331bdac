"""Reading images: lists, formats, intensities, data sets, joint transforms, regions on disk."""

from mwm.data.dataset import PretrainDataset, image_statistics
from mwm.data.errors import DataError, UnreadableImage
from mwm.data.image import read_image, read_mask
from mwm.data.records import COLUMNS, ImageList, Record, image_id, read_list
from mwm.data.regions import MaskFolder, RegionCache, open_regions
from mwm.data.sampler import EpochSampler
from mwm.data.scans import demo_folder
from mwm.data.settings import ReadSettings
from mwm.data.skipped import SkippedFiles
from mwm.data.transform import JointTransform

__all__ = [
    "COLUMNS",
    "DataError",
    "EpochSampler",
    "ImageList",
    "JointTransform",
    "MaskFolder",
    "PretrainDataset",
    "ReadSettings",
    "Record",
    "RegionCache",
    "SkippedFiles",
    "UnreadableImage",
    "demo_folder",
    "image_id",
    "image_statistics",
    "open_regions",
    "read_image",
    "read_list",
    "read_mask",
]
