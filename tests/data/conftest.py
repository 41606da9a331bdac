"""Writers of small files in every format."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent))  # import-mode importlib does not; image_files.py is shared

Write = Callable[..., Path]


@pytest.fixture
def png(tmp_path: Path) -> Write:
    """png(name, array): 8-bit grey or colour, or 16-bit grey."""

    def write(name: str, array: np.ndarray) -> Path:
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(array).save(path)
        return path

    return write


@pytest.fixture
def dicom(tmp_path: Path) -> Write:
    """dicom(name, pixels uint16 [H, W] or [F, H, W], **elements): explicit little endian, secondary capture."""

    def write(name: str, pixels: np.ndarray | None, *, syntax: str | None = None, **elements: Any) -> Path:
        import pydicom
        from pydicom.dataset import FileDataset, FileMetaDataset
        from pydicom.uid import ExplicitVRLittleEndian, SecondaryCaptureImageStorage, generate_uid

        meta = FileMetaDataset()
        meta.MediaStorageSOPClassUID = SecondaryCaptureImageStorage
        meta.MediaStorageSOPInstanceUID = generate_uid()
        meta.TransferSyntaxUID = syntax or ExplicitVRLittleEndian
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            header = FileDataset(None, {}, file_meta=meta, preamble=b"\0" * 128)
            header.PatientName, header.PatientID = "Secret^Name", "SECRET-ID"
            header.PhotometricInterpretation, header.SamplesPerPixel = "MONOCHROME2", 1
            if pixels is not None:
                header.Rows, header.Columns = pixels.shape[-2:]
                if pixels.ndim == 3:
                    header.NumberOfFrames = len(pixels)
                header.BitsAllocated = header.BitsStored = 8 * pixels.dtype.itemsize
                header.HighBit, header.PixelRepresentation = header.BitsStored - 1, int(pixels.dtype.kind == "i")
                header.PixelData = pixels.tobytes()
                header["PixelData"].VR = "OW"
            for key, value in elements.items():
                setattr(header, key, value)
            path = tmp_path / name
            pydicom.dcmwrite(path, header, enforce_file_format=True)
        return path

    return write


@pytest.fixture
def nifti(tmp_path: Path) -> Write:
    """nifti(name, values, affine=identity)."""

    def write(name: str, values: np.ndarray, affine: np.ndarray | None = None) -> Path:
        import nibabel

        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        nibabel.save(nibabel.Nifti1Image(values, np.eye(4) if affine is None else affine), path)
        return path

    return write
