"""Volumes: image files brought to one grid, each normalised by itself.

Axis names in comments: X left to right, Y back to front, Z bottom to top (RAS).
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from core.data.decode import Image, VolumeError, decode

SAME_VOXEL_SIZE = 1e-3  # relative difference under which a grid is cropped, not interpolated
FLOAT16_MAX = 65504.0
MAX_GRID_VOXELS = 2**25
"""The largest grid of a run; 256 x 256 x 256 is half of it."""


@dataclass(frozen=True, kw_only=True)
class VolumeSettings:
    """What every volume of a run looks like.

    Attributes:
        voxel_size_mm: Edge of the cubic voxels.
        shape: Voxels along X, Y and Z.
        normalisation: "robust" scales each scan to [0, 1] (see ``load_volume``); "none" keeps the stored values.
        mask: Image whose voxels other than 0 are kept; everything else becomes 0. It must cover the same field of view as
            every scan, so it is for scans on one template's grid.
        stored: Number type of a cached voxel; "uint8" needs values from 0 to 1, so normalisation "robust".
    """

    voxel_size_mm: float
    shape: tuple[int, int, int]
    normalisation: Literal["robust", "none"]
    mask: Path | None = None
    stored: Literal["float16", "uint8"] = "float16"

    def __post_init__(self) -> None:
        if not 0.05 <= self.voxel_size_mm <= 50.0:
            raise ValueError(f"VolumeSettings: voxel_size_mm must be from 0.05 to 50, got {self.voxel_size_mm!r}.")
        if not (
            isinstance(self.shape, tuple)
            and len(self.shape) == 3
            and all(type(size) is int and size > 0 for size in self.shape)
            and math.prod(self.shape) <= MAX_GRID_VOXELS
        ):
            raise ValueError(
                f"VolumeSettings: shape must be a tuple of three whole numbers over 0 with a product of at most "
                f"{MAX_GRID_VOXELS}, got {self.shape!r}."
            )
        if self.normalisation not in ("robust", "none"):
            raise ValueError(f"VolumeSettings: normalisation must be 'robust' or 'none', got {self.normalisation!r}.")
        if not (self.mask is None or isinstance(self.mask, Path)):
            raise ValueError(f"VolumeSettings: mask must be a Path or None, got {self.mask!r}.")
        if self.stored not in ("float16", "uint8"):
            raise ValueError(f"VolumeSettings: stored must be 'float16' or 'uint8', got {self.stored!r}.")
        if self.stored == "uint8" and self.normalisation != "robust":
            raise ValueError(
                f"VolumeSettings: stored must be 'float16' with normalisation {self.normalisation!r}, got 'uint8'. "
                "Set normalisation=robust, or store float16."
            )


def load_volume(path: Path, settings: VolumeSettings) -> NDArray[np.float32]:
    """Decode one image file onto the grid of the settings.

    The voxel axes are permuted and flipped to the nearest right-anterior-superior order (an oblique scan is not
    rotated). The centre of the image becomes the centre of the grid: voxels are averaged in blocks where the image is
    at least twice as fine, then interpolated linearly; an image of the wanted voxel size is only cropped. Outside the
    image, 0 is filled in.

    "robust" maps the intensities x of the part inside the grid (and inside the mask, if there is one) by

        y = clip((x - p2) / (q - p2), 0, 1)

    with p2 and p98 percentiles of x, the foreground x > p2 + 0.1 (p98 - p2) (the threshold of FSL BET), and q the 99.5
    percentile of the foreground. Gain and offset of the scanner drop out, air is near 0. Then all outside the mask is 0.

    Returns:
        Array of ``settings.shape`` (X, Y, Z) that float16 can hold; from 0 to 1 with "robust".

    Raises:
        VolumeError: The file or the mask cannot be decoded (see ``decode``); the two do not cover the same field of view,
            or share no voxel of the grid; values inside the grid that are equal, or too large for float16.
    """
    mask = None if settings.mask is None else load_mask(settings)
    image = decode(path)
    if mask is not None:
        _check_field_of_view(path, image, mask, settings)
    volume = _centre_on_grid(image.values, image.voxel_sizes_mm, settings)
    del image  # the largest array is not needed any more

    margins = [(size - inside) // 2 for size, inside in zip(settings.shape, volume.shape, strict=True)]
    region = tuple(slice(start, start + size) for start, size in zip(margins, volume.shape, strict=True))
    kept = None if mask is None else mask.inside[region]
    if settings.normalisation == "robust":
        _normalise(path, volume, kept)
    if kept is not None:
        volume[~kept] = 0
    low, high = float(volume.min()), float(volume.max())
    if volume.shape != settings.shape:
        padded = np.zeros(settings.shape, np.float32)
        padded[region] = volume
        volume, low, high = padded, min(low, 0.0), max(high, 0.0)

    largest = max(abs(low), abs(high))
    if largest > FLOAT16_MAX:
        raise VolumeError(
            f"{path}: values must be at most {FLOAT16_MAX:g} in size, got {largest:g}. Rescale the image, or use "
            "normalisation=robust."
        )
    if np.float16(low) == np.float16(high):
        raise VolumeError(
            f"{path}: values inside the grid must differ in float16, got {low:g} everywhere. Check that the head lies in the "
            "middle of the image, or use normalisation=robust."
        )
    return volume


@dataclass(frozen=True, eq=False)
class Mask:
    """A mask on the grid of a run.

    Attributes:
        inside: Array ``settings.shape`` (X, Y, Z), True where a volume is kept.
        corners_mm: Array (2, 3) of the first and last corner of the mask file's field of view.
    """

    inside: NDArray[np.bool_]
    corners_mm: NDArray[np.float64]


def load_mask(settings: VolumeSettings) -> Mask:
    """The mask of the settings on their grid, by nearest neighbour, placed as ``load_volume`` places a scan.

    A file that did not change is decoded once.

    Raises:
        VolumeError: The file cannot be decoded, or keeps no voxel of the grid.
    """
    path = settings.mask
    assert path is not None, "these settings have no mask"
    try:
        status = path.stat()
    except OSError:
        status = None  # decode says what is wrong
    return _mask(path, settings, status and (status.st_mtime_ns, status.st_size))


@lru_cache(maxsize=4)
def _mask(path: Path, settings: VolumeSettings, _version: tuple[int, int] | None) -> Mask:
    image = decode(path)
    values = _centre_on_grid(image.values, image.voxel_sizes_mm, settings, nearest=True)
    margins = [(size - inside) // 2 for size, inside in zip(settings.shape, values.shape, strict=True)]
    inside = np.zeros(settings.shape, np.bool_)
    inside[tuple(slice(start, start + size) for start, size in zip(margins, values.shape, strict=True))] = values != 0
    if not inside.any():
        raise VolumeError(f"{path}: the mask must keep a voxel of the grid, got 0 in all of it. Name another mask.")
    inside.flags.writeable = False
    return Mask(inside, _corners_mm(image))


def _corners_mm(image: Image) -> NDArray[np.float64]:
    corners = np.array([[-0.5] * 3, [size - 0.5 for size in image.values.shape]])
    return corners @ image.affine[:3, :3].T + image.affine[:3, 3]


def _check_field_of_view(path: Path, image: Image, mask: Mask, settings: VolumeSettings) -> None:
    corners_mm = _corners_mm(image)
    if np.abs(corners_mm - mask.corners_mm).max() > settings.voxel_size_mm:
        found, wanted = (
            f"{np.round(first, 1).tolist()} to {np.round(last, 1).tolist()}" for first, last in (corners_mm, mask.corners_mm)
        )
        raise VolumeError(
            f"{path}: the image must cover the field of view of the mask, {wanted} mm, to one voxel of the grid, got {found} mm. "
            "Use a mask only for scans on one template's grid."
        )


def _centre_on_grid(
    values: NDArray[np.float32], voxel_sizes_mm: NDArray[np.float64], settings: VolumeSettings, *, nearest: bool = False
) -> NDArray[np.float32]:
    """The part of the image inside the grid, at most ``settings.shape`` voxels (X, Y, Z), in memory of its own."""
    target_mm = settings.voxel_size_mm
    if np.abs(voxel_sizes_mm / target_mm - 1.0).max() <= SAME_VOXEL_SIZE:
        sizes = np.minimum(values.shape, settings.shape)
        starts = (np.asarray(values.shape) - sizes) // 2
        return values[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))].copy("C")

    covering = np.ceil(np.asarray(values.shape) * voxel_sizes_mm / target_mm - SAME_VOXEL_SIZE).astype(int)
    sizes = np.minimum(covering, settings.shape)
    sizes += (np.asarray(settings.shape) - sizes) % 2  # an odd margin would move the centre by half a voxel
    axes = list(zip(values.shape, voxel_sizes_mm.tolist(), sizes.tolist(), strict=True))
    if nearest:
        return values[np.ix_(*[_nearest(stored, stored_mm, size, target_mm) for stored, stored_mm, size in axes])]
    return _resample(values, [_weights(stored, stored_mm, size, target_mm) for stored, stored_mm, size in axes])


def _nearest(num_stored: int, stored_mm: float, num_wanted: int, wanted_mm: float) -> NDArray[np.intp]:
    """Along one axis, the stored voxel nearest to each wanted one; both axes have the same centre."""
    positions_mm = (np.arange(num_wanted) - (num_wanted - 1) / 2) * wanted_mm
    positions = positions_mm / stored_mm + (num_stored - 1) / 2
    return np.asarray(np.clip(np.floor(positions + 0.5), 0, num_stored - 1), dtype=np.intp)


def _weights(num_stored: int, stored_mm: float, num_wanted: int, wanted_mm: float) -> NDArray[np.float32]:
    """Along one axis, what each stored voxel gives to each wanted one (wanted, stored); both axes have the same centre.

    Averaged blocks of whole voxels keep fine noise from folding into a coarse grid; between the centres of two blocks the
    weight is shared linearly, beyond the last centre it is all the last block's.
    """
    block = min(max(1, math.floor(wanted_mm / stored_mm + SAME_VOXEL_SIZE)), num_stored)
    start = (num_stored % block) // 2
    num_blocks = num_stored // block
    first_mm = (start + (block - 1) / 2 - (num_stored - 1) / 2) * stored_mm
    positions_mm = (np.arange(num_wanted) - (num_wanted - 1) / 2) * wanted_mm
    positions = np.clip((positions_mm - first_mm) / (block * stored_mm), 0, num_blocks - 1)
    tents = np.maximum(0, 1 - np.abs(positions[:, None] - np.arange(num_blocks)))
    weights = np.zeros((num_wanted, num_stored), np.float32)
    weights[:, start : start + num_blocks * block] = np.repeat(tents / block, block, axis=1)
    return weights


def _resample(values: NDArray[np.float32], weights: list[NDArray[np.float32]]) -> NDArray[np.float32]:
    """The weights of each axis applied, plane by plane in the order of memory, so that no second image is made."""
    slow = int(np.argmax(np.abs(values.strides)))
    planes = np.moveaxis(values, slow, 0)
    slow_weights, first_weights, second_weights = weights[slow], *(weights[axis] for axis in range(3) if axis != slow)
    resampled = np.zeros((len(slow_weights), len(first_weights), len(second_weights)), np.float32)
    for plane, given in zip(planes, slow_weights.T, strict=True):
        receivers = np.flatnonzero(given)
        if receivers.size:
            resampled_plane = first_weights @ plane @ second_weights.T
            for receiver in receivers:
                resampled[receiver] += given[receiver] * resampled_plane
    return np.ascontiguousarray(np.moveaxis(resampled, 0, slow))


def _normalise(path: Path, volume: NDArray[np.float32], kept: NDArray[np.bool_] | None) -> None:
    """Scale the volume (X, Y, Z) to [0, 1] in place, by the intensities where it is kept."""
    intensities = volume if kept is None else volume[kept]
    if intensities.size == 0:
        raise VolumeError(f"{path}: the image must have a voxel inside the mask and the grid, got none. Name another mask.")
    p2, p98 = np.percentile(intensities, (2.0, 98.0))
    if p2 == p98:
        raise VolumeError(
            f"{path}: more than 2 % of the voxels inside the grid must be foreground, got {p2:g} in most. Choose a grid that "
            "fits the head."
        )
    high = np.percentile(intensities[intensities > p2 + 0.1 * (p98 - p2)], 99.5, overwrite_input=True)
    volume -= np.float32(p2)
    with np.errstate(over="ignore"):  # a far outlier becomes infinite, then 1
        volume /= np.float32(high - p2)
    np.clip(volume, 0.0, 1.0, out=volume)
