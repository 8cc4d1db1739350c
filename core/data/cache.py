"""The cache of preprocessed volumes: every image file is decoded once, onto disk, and memory-mapped from there. B scans."""

import hashlib
import json
import logging
import tempfile
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from core.data.decode import VolumeError
from core.data.manifest import Manifest, Problem, Scan
from core.data.volumes import VolumeSettings, load_volume

CODE_VERSION = 1
"""Part of every cache key: raise it whenever ``load_volume`` gives other values."""

_logger = logging.getLogger("isocenter")


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
