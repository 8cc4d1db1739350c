"""Image files decoded: one 3-D picture as numbers, its axes in right-anterior-superior order, or one sentence that tells why not.

The home of nibabel. Axis names in comments: X left to right, Y back to front, Z bottom to top (RAS).
``VolumeError`` names a file: catch it inside the site and log it there.
"""

import gzip
from pathlib import Path
from typing import BinaryIO, cast

import numpy as np
from nibabel import Nifti1Header, Nifti2Header
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

MAX_VOXELS = 512**3
MAX_EXTRA_BYTES = 2**26  # between header and image, or after the image


class VolumeError(ValueError):
    """An image file that cannot become a volume; the message names the file and the fault."""


def decode(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Values (X, Y, Z) in RAS order, scaled as the header says, and the voxel sizes (3,) in mm."""
    if not path.name.endswith((".nii", ".nii.gz")):
        raise VolumeError(f"{path}: the image must be a .nii or .nii.gz file, got {path.suffix!r}.")
    try:
        with path.open("rb") as file:
            stream = cast(BinaryIO, gzip.GzipFile(fileobj=file)) if path.name.endswith(".gz") else file
            header = _read_header(stream)
            _check_header(path, header)
            with np.errstate(over="ignore", invalid="ignore"):  # what is not finite is refused below
                values = np.asarray(ArrayProxy(stream, header, mmap=False), dtype=np.float32)
            # gzip compares its checksum only at the end of the file.
            num_trailing = len(stream.read(MAX_EXTRA_BYTES + 1))
    except VolumeError:
        raise
    except Exception as error:
        raise VolumeError(
            f"{path}: the image must be a readable NIfTI file, got {type(error).__name__} "
            f"({' '.join(str(error).split())}). Fetch or export the file again."
        ) from error
    if num_trailing > MAX_EXTRA_BYTES:
        raise VolumeError(f"{path}: the file must end after its image, got more than {MAX_EXTRA_BYTES} bytes there.")
    values = values.reshape(values.shape[:3])
    low, high = values.min(), values.max()
    if not np.isfinite(low) or not np.isfinite(high):
        raise VolumeError(f"{path}: all values must be finite, got NaN or infinity. Replace them, by 0 for background.")
    if low == high:
        raise VolumeError(f"{path}: values must differ, got {low:g} everywhere.")

    affine = header.get_best_affine()
    orientation = io_orientation(affine)
    to_ras = inv_ornt_aff(orientation, values.shape)
    ras: NDArray[np.float32] = apply_orientation(values, orientation)
    return ras, voxel_sizes(affine @ to_ras)


def _read_header(stream: BinaryIO) -> Nifti1Header:
    """The header without its extensions, whose stated length cannot be trusted."""
    size_field = stream.read(4)
    for header_type, size in ((Nifti1Header, 348), (Nifti2Header, 540)):
        if size in (int.from_bytes(size_field, "little"), int.from_bytes(size_field, "big")):
            return header_type(size_field + stream.read(size - 4))
    raise ValueError(f"it starts with {size_field!r}, not with the size of a NIfTI header")


def _check_header(path: Path, header: Nifti1Header) -> None:
    """Refuse what nibabel would accept, before a voxel is allocated."""
    shape = header.get_data_shape()
    if len(shape) < 3 or min(shape[:3]) < 2 or any(size != 1 for size in shape[3:]):
        raise VolumeError(f"{path}: the image must be one 3-D volume of two slices or more, got shape {shape}.")
    if np.prod(shape, dtype=np.float64) > MAX_VOXELS:
        raise VolumeError(f"{path}: the image must have at most {MAX_VOXELS} voxels, got shape {shape}.")
    if header.get_data_dtype().kind not in "iuf":
        raise VolumeError(f"{path}: voxels must be real numbers, got {header.get_data_dtype()}.")
    if not 348 <= header["vox_offset"] <= MAX_EXTRA_BYTES:
        raise VolumeError(f"{path}: vox_offset must be from 348 to {MAX_EXTRA_BYTES}, got {header['vox_offset']}.")
    slope, intercept = float(header["scl_slope"]), float(header["scl_inter"])
    if not np.isfinite([slope, intercept]).all():
        raise VolumeError(f"{path}: scl_slope and scl_inter must be finite, got {slope} and {intercept}.")
    if header["sform_code"] <= 0 and header["qform_code"] <= 0:
        raise VolumeError(f"{path}: the image must have a qform or an sform, got neither, so left is unknown.")
    affine = header.get_best_affine()
    voxel_sizes_mm = voxel_sizes(affine)
    if not (
        np.isfinite(affine).all()
        and (voxel_sizes_mm >= 0.05).all()
        and (voxel_sizes_mm <= 50.0).all()
        and abs(np.linalg.det(affine[:3, :3] / voxel_sizes_mm)) > 0.1
    ):
        raise VolumeError(
            f"{path}: the affine must be invertible with voxel sizes from 0.05 to 50 mm, got {affine[:3].tolist()}."
        )
