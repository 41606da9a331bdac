"""Reading images and regions: lists, formats, settings, data sets, caches."""

from __future__ import annotations

from .dataset import PretrainDataset, collate, default_cache_folder
from .errors import DataError, MissingRegion, UnreadableImage
from .image import content_digest, read_image
from .listing import read_list
from .masks import MaskFolder, match_size, read_mask, read_record_mask
from .records import ImageList, Record, assign_ids, image_id
from .regions import MaskColumn, RegionCache, RegionMaps, RegionStore, open_regions
from .sampler import EpochSampler
from .scans import demo_folder
from .settings import ReadSettings
from .skipped import SkippedFiles
from .statistics import image_statistics, scan
from .table import COLUMNS
from .transform import JointTransform

__all__ = [
    "COLUMNS",
    "DataError",
    "EpochSampler",
    "ImageList",
    "JointTransform",
    "MaskColumn",
    "MaskFolder",
    "MissingRegion",
    "PretrainDataset",
    "ReadSettings",
    "Record",
    "RegionCache",
    "RegionMaps",
    "RegionStore",
    "SkippedFiles",
    "UnreadableImage",
    "assign_ids",
    "collate",
    "content_digest",
    "default_cache_folder",
    "demo_folder",
    "image_id",
    "image_statistics",
    "match_size",
    "open_regions",
    "read_image",
    "read_list",
    "read_mask",
    "read_record_mask",
    "scan",
]
