"""Volumes: image files brought to one grid, each normalised by itself.

Axis names in comments: X left to right, Y back to front, Z bottom to top (RAS).
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.decode import MAX_VOXELS, VolumeError, decode

SAME_VOXEL_SIZE = 1e-3  # relative difference under which a grid is cropped, not interpolated
FLOAT16_MAX = 65504.0


@dataclass(frozen=True, kw_only=True)
class VolumeSettings:
    """What every volume of a run looks like.

    Attributes:
        voxel_size_mm: Edge of the cubic voxels.
        shape: Voxels along X, Y and Z.
        normalisation: "robust" scales each scan to [0, 1] (see ``load_volume``); "none" keeps the stored values.
    """

    voxel_size_mm: float
    shape: tuple[int, int, int]
    normalisation: Literal["robust", "none"]

    def __post_init__(self) -> None:
        if not 0.05 <= self.voxel_size_mm <= 50.0:
            raise ValueError(f"VolumeSettings: voxel_size_mm must be from 0.05 to 50, got {self.voxel_size_mm!r}.")
        if not (
            isinstance(self.shape, tuple)
            and len(self.shape) == 3
            and all(type(size) is int and size > 0 for size in self.shape)
            and np.prod(self.shape) <= MAX_VOXELS
        ):
            raise ValueError(
                f"VolumeSettings: shape must be a tuple of three whole numbers over 0 with a product of at most "
                f"{MAX_VOXELS}, got {self.shape!r}."
            )
        if self.normalisation not in ("robust", "none"):
            raise ValueError(f"VolumeSettings: normalisation must be 'robust' or 'none', got {self.normalisation!r}.")


def load_volume(path: Path, settings: VolumeSettings) -> NDArray[np.float32]:
    """Decode one NIfTI file onto the grid of the settings.

    The voxel axes are permuted and flipped to the nearest right-anterior-superior order (an oblique scan is not
    rotated). The centre of the image becomes the centre of the grid: voxels are averaged in blocks where the image is
    at least twice as fine, then interpolated linearly; an image of the wanted voxel size is only cropped. Outside the
    image, 0 is filled in.

    "robust" maps the intensities x of the part inside the grid by

        y = clip((x - p2) / (q - p2), 0, 1)

    with p2 and p98 percentiles of x, the foreground x > p2 + 0.1 (p98 - p2) (the threshold of FSL BET), and q the 99.5
    percentile of the foreground. Gain and offset of the scanner drop out, air is near 0.

    Returns:
        Array of ``settings.shape`` (X, Y, Z) that float16 can hold.

    Raises:
        VolumeError: Not a readable NIfTI file of one real-valued 3-D image with a known orientation; values that are
            not finite, all equal, or too large for float16; a checksum that does not agree.
    """
    decoded, voxel_sizes_mm = decode(path)
    volume = _centre_on_grid(decoded, voxel_sizes_mm, settings)
    if settings.normalisation == "robust":
        volume = _normalise(path, volume)

    margins = [(size - inside) // 2 for size, inside in zip(settings.shape, volume.shape, strict=True)]
    padded = np.zeros(settings.shape, np.float32)
    padded[tuple(slice(start, start + size) for start, size in zip(margins, volume.shape, strict=True))] = volume

    largest = float(np.abs(padded).max())
    if largest > FLOAT16_MAX:
        raise VolumeError(
            f"{path}: values must be at most {FLOAT16_MAX:g} in size, got {largest:g}. Rescale the image, or use "
            "normalisation=robust."
        )
    if np.ptp(padded.astype(np.float16)) == 0:
        raise VolumeError(f"{path}: values inside the grid must differ in float16, got {padded.flat[0]:g} everywhere.")
    return padded


def _centre_on_grid(
    values: NDArray[np.float32], voxel_sizes_mm: NDArray[np.float64], settings: VolumeSettings
) -> NDArray[np.float32]:
    """The part of the image inside the grid, at most ``settings.shape`` voxels (X, Y, Z)."""
    target_mm = settings.voxel_size_mm
    if np.abs(voxel_sizes_mm / target_mm - 1.0).max() <= SAME_VOXEL_SIZE:
        sizes = np.minimum(values.shape, settings.shape)
        starts = (np.asarray(values.shape) - sizes) // 2
        return values[tuple(slice(start, start + size) for start, size in zip(starts, sizes, strict=True))]

    covering = np.ceil(np.asarray(values.shape) * voxel_sizes_mm / target_mm - SAME_VOXEL_SIZE).astype(int)
    sizes = np.minimum(covering, settings.shape)
    sizes += (np.asarray(settings.shape) - sizes) % 2  # an odd margin would move the centre by half a voxel

    from monai.data import MetaTensor  # seconds to import: only where an image is resampled
    from monai.transforms import SpatialResample

    # Averaged blocks keep fine noise from folding into the coarse grid. Positions are mm from the image's centre.
    blocks = np.maximum(1, np.floor(target_mm / voxel_sizes_mm + SAME_VOXEL_SIZE)).astype(int)
    blocks = np.minimum(blocks, values.shape)
    starts = (np.asarray(values.shape) % blocks) // 2
    trimmed = torch.from_numpy(np.ascontiguousarray(values[tuple(slice(start, None) for start in starts)]))
    averaged = torch.nn.functional.avg_pool3d(trimmed[None], tuple(blocks.tolist()))
    origin_mm = (starts + (blocks - 1) / 2 - (np.asarray(values.shape) - 1) / 2) * voxel_sizes_mm

    image = MetaTensor(averaged, affine=_diagonal_affine(blocks * voxel_sizes_mm, origin_mm))
    grid = _diagonal_affine(np.full(3, target_mm), -(sizes - 1) / 2 * target_mm)
    resample = SpatialResample(mode="bilinear", padding_mode="border", align_corners=True, dtype=torch.float32)
    resampled = resample(image, dst_affine=grid, spatial_size=sizes.tolist())
    return np.asarray(resampled[0].as_tensor().numpy(), dtype=np.float32)


def _diagonal_affine(spacing_mm: NDArray[np.float64], origin_mm: NDArray[np.float64]) -> torch.Tensor:
    affine = np.diag([*spacing_mm, 1.0])
    affine[:3, 3] = origin_mm
    return torch.from_numpy(affine)


def _normalise(path: Path, volume: NDArray[np.float32]) -> NDArray[np.float32]:
    p2, p98 = np.percentile(volume, (2.0, 98.0))
    if p2 == p98:
        raise VolumeError(f"{path}: more than 2 % of the voxels inside the grid must be foreground, got {p2:g} in most.")
    high = np.percentile(volume[volume > p2 + 0.1 * (p98 - p2)], 99.5)
    scaled: NDArray[np.float32] = np.clip((volume - np.float32(p2)) / np.float32(high - p2), 0.0, 1.0)
    return scaled
