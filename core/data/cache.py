"""The cache of preprocessed volumes: every image file is decoded once, onto disk, and memory-mapped from there.

An entry is ``cache_root/<hash of settings and CODE_VERSION>/<SHA-256 of the image file>.npy``, with the SHA-256 of its own values
behind them. It appears whole or not at all, so that a stopped build goes on where it was; processes that want the same entry wait
for each other. B scans; X, Y, Z voxels.
"""

import hashlib
import io
import json
import logging
import math
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from core.data.decode import VolumeError
from core.data.manifest import Manifest, Problem, Scan
from core.data.volumes import VolumeSettings, load_mask, load_volume
from core.progress import tell as tell_progress

CODE_VERSION = 2
"""Part of every cache key: raise it whenever ``load_volume`` gives other values."""

KNOWN_FILES = "files.json"
SETTLED_S = 2.0  # a file younger than this may change again within the resolution of its time stamps
DIGEST_BYTES = hashlib.sha256().digest_size
SPARE = 1.05  # of the disk space that the entries need

_logger = logging.getLogger("isocenter")


class CacheError(ValueError):
    """The cache cannot be built; the text names its folder: log it at the site."""


@dataclass(frozen=True)
class BuildPlan:
    """What is left to do before the first epoch.

    Attributes:
        num_images: Different image files.
        num_missing: Those that the cache does not hold yet.
        missing_bytes: Size of their entries.
        free_bytes: Space on the cache's disk.
    """

    num_images: int
    num_missing: int
    missing_bytes: int
    free_bytes: int


Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class VolumeCache:
    """The volumes of a manifest's scans, in its order, on disk as one file each.

    Attributes:
        paths: One entry per scan.
        sources: The image file of each, from which a damaged entry is built again.
        settings: What the volumes look like.
    """

    paths: tuple[Path, ...]
    sources: tuple[Path, ...]
    settings: VolumeSettings
    _verified: set[Path] = field(default_factory=set, init=False, repr=False, compare=False)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def shape(self) -> tuple[int, int, int]:
        """Voxels (X, Y, Z) of every volume."""
        return self.settings.shape

    @property
    def unit(self) -> float:
        """What 1 in the stored numbers is worth: 1 for float16, 1 / 255 for uint8."""
        return 1.0 / 255 if self.settings.stored == "uint8" else 1.0

    def read(self, indices: Sequence[int] | NDArray[np.integer]) -> NDArray[np.float16] | NDArray[np.uint8]:
        """Volumes (B, X, Y, Z) as they are stored, in multiples of ``unit``, a copy; raises as `fill`."""
        volumes = np.empty((len(indices), *self.shape), self.settings.stored)
        self.fill(torch.from_numpy(volumes), indices)
        return volumes

    def fill(self, target: Tensor, indices: Sequence[int] | NDArray[np.integer]) -> None:
        """Copy volumes out of the cache; the first time in a process each is compared with its checksum.

        Args:
            target: CPU tensor (B, X, Y, Z) of any type; it gets the volumes in multiples of ``unit``.
            indices: Numbers (B,) of scans, each from 0 to ``len(self) - 1``; repeats are allowed.

        Raises:
            VolumeError: An entry is damaged and its image file has changed or cannot be read any more.
        """
        wanted = np.asarray(indices)
        if wanted.ndim != 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= len(self))):
            raise ValueError(f"VolumeCache: indices must be a list of numbers from 0 to {len(self) - 1}, got {indices!r}.")
        for row, index in zip(target, wanted.tolist(), strict=True):
            path = self.paths[index]
            entry = _map_entry(path, self.settings)
            if entry is None or (path not in self._verified and not _is_sound(entry)):
                entry = self._mend(index)
            self._verified.add(path)
            row.copy_(torch.from_numpy(entry.values))

    def _mend(self, index: int) -> "_Entry":
        """Build a damaged entry again."""
        path, source = self.paths[index], self.sources[index]
        _logger.warning("cache entry %s is damaged and built again.", path)
        if _file_digest(source) != path.stem:
            raise VolumeError(f"{source}: the image has changed since the run began. Start the run again.")
        path.unlink(missing_ok=True)
        fault = _build_entry(path, self.settings, source)
        entry = _map_entry(path, self.settings)
        if fault is not None or entry is None:
            raise fault or VolumeError(f"{source}: its cache entry cannot be written. Look at the disk.")
        return entry


def open_cache(
    manifest: Manifest,
    settings: VolumeSettings,
    cache_root: Path,
    *,
    num_workers: int | None = None,
    progress: Progress | None = None,
) -> tuple[VolumeCache, Manifest]:
    """Decode every scan that is not in the cache yet, and open the cache.

    Before it decodes, the log tells how many images and bytes there are to go, and meanwhile how long that takes. An entry of
    another shape, type or length is built again and logged. An image file is hashed again only when its size, times or inode
    have changed.

    A picture that two scans share is used once, the second is a problem "copy"; where they are said to be of two subjects,
    whose it is cannot be known: none is used, each is a problem "duplicate". Pictures are compared as they are stored in the
    cache, so that another compression, type or order of axes hides nothing.

    Args:
        manifest: The scans wanted.
        settings: What the volumes look like.
        cache_root: Folder of the cache; it holds images, so keep it where the site keeps its images.
        num_workers: Threads that decode; None: as many as there are cores.
        progress: Called with (images ready, images in all) after each image, instead of the log's lines.

    Returns:
        The cache, and the manifest of the scans that are in it, in the same order. A scan that cannot be read is
        logged with its name and becomes a problem "unreadable".

    Raises:
        CacheError: The disk is too small for what is missing.
        VolumeError: The mask cannot be used.
    """
    if settings.mask is not None:
        load_mask(settings)  # a mask that cannot be used is told once, not for every scan
    folder = cache_root / _settings_key(settings)
    folder.mkdir(parents=True, exist_ok=True)
    faults: dict[Path, VolumeError] = {}
    with ThreadPoolExecutor(num_workers or _num_cores()) as pool:
        entry_of, unreadable = _entries(manifest, folder, cache_root, pool)
        faults.update(unreadable)
        sources: dict[Path, Path] = {}
        for source, path in entry_of.items():
            sources.setdefault(path, source)
        entries = {path: _map_entry(path, settings) for path in sources}
        plan = _plan(entries, settings, folder)
        _check_space(plan, folder)
        missing = {path: source for path, source in sources.items() if entries[path] is None}
        tell = progress or _logged_progress(plan, folder, manifest.site)
        tell(plan.num_images - len(missing), plan.num_images)
        futures = {pool.submit(_build_entry, path, settings, source): path for path, source in missing.items()}
        fault_of = _collect(futures, lambda ready: tell(plan.num_images - len(missing) + ready, plan.num_images))
    faults.update((source, fault_of[path]) for source, path in entry_of.items() if path in fault_of)

    readable = [scan for scan in manifest.scans if scan.path not in faults]
    problems = [Problem("unreadable", str(path), str(fault)) for path, fault in faults.items()]
    kept, twins = _without_duplicates(readable, entry_of, settings)
    problems += twins
    for problem in problems:
        _logger.warning("site %s: %s: %s", manifest.site, problem.kind, problem.what)
    cache = VolumeCache(tuple(entry_of[scan.path] for scan in kept), tuple(scan.path for scan in kept), settings)
    return cache, replace(manifest, scans=tuple(kept), problems=(*manifest.problems, *problems))


def plan_build(manifest: Manifest, settings: VolumeSettings, cache_root: Path) -> BuildPlan:
    """What `open_cache` would have to decode and write; image files are hashed where that was not done before."""
    folder = cache_root / _settings_key(settings)
    with ThreadPoolExecutor(_num_cores()) as pool:
        entry_of, _ = _entries(manifest, folder, cache_root, pool)
    return _plan({path: _map_entry(path, settings) for path in entry_of.values()}, settings, folder)


def mask_digest(settings: VolumeSettings) -> str:
    """SHA-256 of the mask's file; "" without a mask."""
    return "" if settings.mask is None else _file_digest(settings.mask)


def _num_cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _settings_key(settings: VolumeSettings) -> str:
    values = {"code": CODE_VERSION} | asdict(settings) | {"voxel_size_mm": float(settings.voxel_size_mm)}
    values["mask"] = mask_digest(settings)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def _file_digest(path: Path) -> str:
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise VolumeError(
            f"{path}: the image must be a readable file, got {error.strerror}. Fetch it or mend its rights."
        ) from error


def _unreadable(path: Path, error: OSError) -> VolumeError:
    return VolumeError(f"{path}: the image must be a readable file, got {error.strerror}. Fetch it or mend its rights.")


def _entries(
    manifest: Manifest, folder: Path, cache_root: Path, pool: ThreadPoolExecutor
) -> tuple[dict[Path, Path], dict[Path, VolumeError]]:
    """The entry of each scan's image file, and why there is none for some."""
    known = _known_files(cache_root)
    fresh: dict[str, list[object]] = {}
    now_ns = time.time_ns()

    def digest(path: Path) -> str | VolumeError:
        try:
            stat = path.stat()
            # The same stamps as git's index: whoever changes a file changes one of them.
            stamp = [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns, stat.st_ino]
            if known.get(str(path), [])[:4] == stamp:
                return str(known[str(path)][4])
            digest = _file_digest(path)
        except OSError as error:
            return _unreadable(path, error)
        except VolumeError as error:
            return error
        if now_ns - max(stat.st_mtime_ns, stat.st_ctime_ns) > SETTLED_S * 1e9:
            fresh[str(path)] = [*stamp, digest]
        return digest

    paths = [scan.path for scan in manifest.scans]
    found = dict(zip(paths, pool.map(digest, paths), strict=True))
    if fresh:
        with FileLock(cache_root / f"{KNOWN_FILES}.lock"):
            _write_whole(cache_root / KNOWN_FILES, [json.dumps(_known_files(cache_root) | fresh).encode()])
    entries = {path: folder / f"{digest}.npy" for path, digest in found.items() if isinstance(digest, str)}
    return entries, {path: digest for path, digest in found.items() if isinstance(digest, VolumeError)}


def _known_files(cache_root: Path) -> dict[str, list[object]]:
    """Size, times, inode and SHA-256 of the files hashed before; none where the list cannot be read: it only saves time."""
    try:
        known = json.loads((cache_root / KNOWN_FILES).read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _plan(entries: Mapping[Path, "_Entry | None"], settings: VolumeSettings, folder: Path) -> BuildPlan:
    num_missing = sum(entry is None for entry in entries.values())
    size = math.prod(settings.shape) * np.dtype(settings.stored).itemsize
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.is_dir())
    return BuildPlan(len(entries), num_missing, num_missing * size, shutil.disk_usage(existing).free)


def _check_space(plan: BuildPlan, folder: Path) -> None:
    if plan.missing_bytes * SPARE > plan.free_bytes:
        raise CacheError(
            f"{folder}: the cache must have {plan.missing_bytes * SPARE / 1e9:.2f} GB for {plan.num_missing} images, "
            f"got {plan.free_bytes / 1e9:.2f} GB free. Free some, name another folder (cache-root of the node config, "
            "ISOCENTER_CACHE in simulation), or halve it with data.stored=uint8."
        )


def _logged_progress(plan: BuildPlan, folder: Path, site: str) -> Progress:
    """Lines of the log: what there is to do, then how far it is every half minute, at most."""
    started = told = time.monotonic()
    if plan.num_missing:
        _logger.info(
            "site %s: preparing %d of %d images, %.1f MB in %s, where %.1f GB are free",
            site,
            plan.num_missing,
            plan.num_images,
            plan.missing_bytes / 1e6,
            folder,
            plan.free_bytes / 1e9,
        )

    def tell(ready: int, total: int) -> None:
        nonlocal told
        done, now = ready - (total - plan.num_missing), time.monotonic()
        tell_progress("image", ready, total)
        if done and now - told > 30:
            told = now
            left = (now - started) / done * (total - ready)
            _logger.info("site %s: %d of %d images are ready, %.0f s left", site, ready, total, left)

    return tell


def _collect(futures: Mapping[Future[VolumeError | None], Path], tell: Callable[[int], None]) -> dict[Path, VolumeError]:
    """The faults of builds as they end; what is still waiting is dropped when one ends in an error of another kind."""
    faults = {}
    try:
        for ready, future in enumerate(as_completed(futures), start=1):
            if (fault := future.result()) is not None:
                faults[futures[future]] = fault
            tell(ready)
    except BaseException:
        for future in futures:
            future.cancel()
        raise
    return faults


def _build_entry(path: Path, settings: VolumeSettings, source: Path) -> VolumeError | None:
    """Decode one image file into its entry, unless another process did so meanwhile."""
    lock = path.with_suffix(".lock")
    try:
        with FileLock(lock):
            if _map_entry(path, settings) is not None:
                return None
            if path.exists():
                _logger.warning("cache entry %s is damaged and built again.", path)
            try:
                volume = load_volume(source, settings)
            except VolumeError as error:
                return error
            values = np.rint(volume * 255).astype(np.uint8) if settings.stored == "uint8" else volume.astype(np.float16)
            _write_whole(path, [_npy_header(settings), values.tobytes(), hashlib.sha256(values.data).digest()])
            return None
    finally:
        # Whoever still waits for it finds the entry; who comes later makes a new lock.
        with suppress(OSError):
            lock.unlink()


@lru_cache(maxsize=64)
def _npy_header(settings: VolumeSettings) -> bytes:
    """What every entry begins with: an .npy of the settings' shape and type."""
    header = io.BytesIO()
    about = {"descr": np.dtype(settings.stored).str, "fortran_order": False, "shape": settings.shape}
    np.lib.format.write_array_header_1_0(header, about)
    return header.getvalue()


def _write_whole(path: Path, parts: Iterable[bytes]) -> None:
    """A file that appears whole or not at all."""
    with tempfile.NamedTemporaryFile(dir=path.parent, suffix=".tmp", delete=False) as file:
        try:
            file.writelines(parts)
            file.flush()
            Path(file.name).replace(path)
        except BaseException:
            Path(file.name).unlink(missing_ok=True)
            raise


@dataclass(frozen=True)
class _Entry:
    """A mapped entry: its values (X, Y, Z), and the SHA-256 they had when written."""

    values: NDArray[np.float16] | NDArray[np.uint8]
    digest: bytes


def _map_entry(path: Path, settings: VolumeSettings) -> _Entry | None:
    """The entry, or None where there is none of the right shape, type and length."""
    header = _npy_header(settings)
    size = math.prod(settings.shape) * np.dtype(settings.stored).itemsize
    try:
        with path.open("rb") as file:
            if file.read(len(header)) != header or os.fstat(file.fileno()).st_size != len(header) + size + DIGEST_BYTES:
                return None
            # Copy on write, because torch warns of memory that must not be written; nothing is.
            mapped = np.memmap(file, settings.stored, mode="c", offset=len(header), shape=settings.shape)
            file.seek(len(header) + size)
            return _Entry(mapped, file.read())
    except OSError:
        return None


def _is_sound(entry: _Entry) -> bool:
    return hashlib.sha256(entry.values.data).digest() == entry.digest


def _without_duplicates(
    scans: Sequence[Scan], entry_of: Mapping[Path, Path], settings: VolumeSettings
) -> tuple[list[Scan], list[Problem]]:
    """The scans that may be used, and a problem for each of the others."""
    same: dict[bytes, list[Scan]] = {}
    for scan in scans:
        entry = _map_entry(entry_of[scan.path], settings)
        assert entry is not None  # just built
        same.setdefault(entry.digest, []).append(scan)
    kept: set[Path] = set()
    problems = []
    for twins in same.values():
        first = twins[0]
        if len({scan.subject for scan in twins}) == 1:
            kept.add(first.path)
            what = f"it holds the same picture as {first.path}, which is used."
            problems += [Problem("copy", str(scan.path), f"{scan.path}: {what}") for scan in twins[1:]]
            continue
        names = ", ".join(str(scan.path) for scan in twins)
        what = f"the same picture is told to be of different subjects, and none is used: {names}. Find out whose it is."
        problems += [Problem("duplicate", str(scan.path), f"{scan.path}: {what}") for scan in twins]
    return [scan for scan in scans if scan.path in kept], problems
