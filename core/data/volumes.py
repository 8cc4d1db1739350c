"""Volumes: NIfTI files decoded once, onto one grid, into a memory-mapped float16 cache.

The home of nibabel. Axis names in comments: X left to right, Y back to front, Z bottom to top (RAS), B scans.
``VolumeError`` names a file: catch it inside the site and log it there.
"""

import gzip
import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import BinaryIO, Literal, cast

import numpy as np
import torch
from nibabel import Nifti1Header, Nifti2Header
from nibabel.affines import voxel_sizes
from nibabel.arrayproxy import ArrayProxy
from nibabel.orientations import apply_orientation, inv_ornt_aff, io_orientation
from numpy.typing import NDArray

from core.data.manifest import Manifest, Problem, Scan

CODE_VERSION = 1
"""Part of every cache key: raise it whenever ``load_volume`` gives other values."""

MAX_VOXELS = 512**3
MAX_EXTRA_BYTES = 2**26  # between header and image, or after the image
SAME_VOXEL_SIZE = 1e-3  # relative difference under which a grid is cropped, not interpolated
FLOAT16_MAX = 65504.0

_logger = logging.getLogger("isocenter")


class VolumeError(ValueError):
    """An image file that cannot become a volume; the message names the file and the fault."""


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
    decoded, voxel_sizes_mm = _decode(path)
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


def _decode(path: Path) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
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


@dataclass(frozen=True)
class VolumeCache:
    """The volumes of a manifest's scans, in its order, on disk as one float16 file each.

    Attributes:
        paths: One .npy file per scan.
        shape: Voxels (X, Y, Z) of every volume.
    """

    paths: tuple[Path, ...]
    shape: tuple[int, int, int]
    _entries: dict[Path, NDArray[np.float16]] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    def __reduce__(self) -> tuple[object, ...]:
        # Mapped files stay behind: pickled, each would be a full copy.
        return VolumeCache, (self.paths, self.shape)

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float16]:
        """Copy volumes out of the cache.

        Args:
            indices: Numbers (B,) of scans, each from 0 to ``len(self) - 1``; repeats are allowed.

        Returns:
            Array (B, X, Y, Z), a copy.
        """
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= len(self))):
            raise ValueError(f"VolumeCache.read: indices must be a list of numbers from 0 to {len(self) - 1}, got {indices!r}.")
        volumes = np.empty((len(wanted), *self.shape), np.float16)
        for row, index in enumerate(wanted.tolist()):
            path = self.paths[index]
            if path not in self._entries:
                self._entries[path] = _open_entry(path, self.shape)
            volumes[row] = self._entries[path]
        return volumes


def open_cache(
    manifest: Manifest,
    settings: VolumeSettings,
    cache_root: Path,
    *,
    num_workers: int = 1,
    progress: Callable[[int, int], None] | None = None,
) -> tuple[VolumeCache, Manifest]:
    """Decode every scan that is not in the cache yet, and open the cache.

    An entry is ``cache_root/<hash of settings and CODE_VERSION>/<SHA-256 of the image file>.npy``. It appears whole or
    not at all, so that a stopped build goes on where it was and several processes may build at once; identical files
    share one. An entry of another shape or type is built again and logged.

    Args:
        manifest: The scans wanted.
        settings: What the volumes look like.
        cache_root: Folder of the cache; it holds images, so keep it where the site keeps its images.
        num_workers: Threads that decode.
        progress: Called with (scans ready, scans in all) after each image.

    Returns:
        The cache, and the manifest of the scans that are in it, in the same order. A scan that cannot be read is
        logged with its name and becomes a problem "unreadable".
    """
    folder = cache_root / _settings_key(settings)
    folder.mkdir(parents=True, exist_ok=True)
    faults: dict[Path, VolumeError] = {}
    scans_of: dict[str, list[Scan]] = {}
    with ThreadPoolExecutor(num_workers) as pool:
        for scan, digest in zip(manifest.scans, pool.map(_digest, (scan.path for scan in manifest.scans)), strict=True):
            if isinstance(digest, VolumeError):
                faults[scan.path] = digest
            else:
                scans_of.setdefault(digest, []).append(scan)
        num_ready = len(faults)
        build = partial(_build_entry, folder, settings)
        images = [scans[0].path for scans in scans_of.values()]
        for scans, fault in zip(scans_of.values(), pool.map(build, scans_of, images), strict=True):
            if fault is not None:
                faults.update((scan.path, fault) for scan in scans)
            num_ready += len(scans)
            if progress is not None:
                progress(num_ready, len(manifest.scans))

    for fault in faults.values():
        _logger.warning("site %s: unreadable: %s", manifest.site, fault)
    entry_of = {scan.path: _entry(folder, digest) for digest, scans in scans_of.items() for scan in scans}
    readable = tuple(scan for scan in manifest.scans if scan.path not in faults)
    problems = tuple(Problem("unreadable", str(path), str(fault)) for path, fault in faults.items())
    cache = VolumeCache(tuple(entry_of[scan.path] for scan in readable), settings.shape)
    return cache, replace(manifest, scans=readable, problems=manifest.problems + problems)


def _settings_key(settings: VolumeSettings) -> str:
    values = {"code": CODE_VERSION} | asdict(settings) | {"voxel_size_mm": float(settings.voxel_size_mm)}
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _entry(folder: Path, digest: str) -> Path:
    return folder / f"{digest}.npy"


def _digest(path: Path) -> str | VolumeError:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        return VolumeError(f"{path}: the image must be a readable file, got {error.strerror}. Fetch it or mend its rights.")


def _build_entry(folder: Path, settings: VolumeSettings, digest: str, image: Path) -> VolumeError | None:
    entry = _entry(folder, digest)
    if entry.exists():
        try:
            _open_entry(entry, settings.shape)
        except (ValueError, EOFError, OSError) as error:
            _logger.warning("cache entry %s is damaged (%s) and built again.", entry, error)
        else:
            return None
    try:
        volume = load_volume(image, settings)
    except VolumeError as error:
        return error
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        try:
            np.save(file, volume.astype(np.float16))
            file.flush()
            Path(file.name).replace(entry)
        except BaseException:
            Path(file.name).unlink()
            raise
    return None


def _open_entry(path: Path, shape: tuple[int, int, int]) -> NDArray[np.float16]:
    entry = np.lib.format.open_memmap(path, mode="r")
    if entry.shape != shape or entry.dtype != np.float16:
        raise ValueError(f"{path}: a cache entry must hold float16 of shape {shape}, got {entry.dtype} of {entry.shape}.")
    return entry
