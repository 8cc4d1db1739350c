"""Reader of a MedMNIST .npz: 2-D or 3-D images of 28 to 224 pixels with labels and official splits (Yang et al., Sci Data 2023).

The arrays are unpacked once to the cache and memory-mapped from there. Each image counts as a subject of its own: the file tells
no more. Errors name keys and counts, no path.
"""

import hashlib
import logging
import math
import re
import shutil
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from torch import Tensor

from core.data.manifest import SPLITS, Manifest, Problem, Scan

MAX_BYTES = 64 * 10**9  # of one array; the largest official one (PathMNIST at 224 pixels) has 16
CHUNK_BYTES = 2**24

_logger = logging.getLogger("isocenter")


@dataclass(frozen=True)
class Subset:
    """What is official about a subset: images in train, val and test, and the class without a finding, where there is one."""

    counts: tuple[int, int, int]
    healthy: int | None = None


# Counts of https://medmnist.com, v3; they do not depend on the size of the images.
SUBSETS: Mapping[str, Subset] = {
    "pathmnist": Subset((89996, 10004, 7180), 6),
    "chestmnist": Subset((78468, 11219, 22433)),
    "dermamnist": Subset((7007, 1003, 2005)),
    "octmnist": Subset((97477, 10832, 1000), 3),
    "pneumoniamnist": Subset((4708, 524, 624), 0),
    "retinamnist": Subset((1080, 120, 400), 0),
    "breastmnist": Subset((546, 78, 156), 1),
    "bloodmnist": Subset((11959, 1712, 3421)),
    "tissuemnist": Subset((165466, 23640, 47280)),
    "organamnist": Subset((34561, 6491, 17778)),
    "organcmnist": Subset((12975, 2392, 8216)),
    "organsmnist": Subset((13932, 2452, 8827)),
    "organmnist3d": Subset((971, 161, 610)),
    "nodulemnist3d": Subset((1158, 165, 310), 0),
    "adrenalmnist3d": Subset((1188, 98, 298), 0),
    "fracturemnist3d": Subset((1027, 103, 240)),
    "vesselmnist3d": Subset((1335, 191, 382), 0),
    "synapsemnist3d": Subset((1230, 177, 352)),
}


class MedMnistError(ValueError):
    """A file that is no MedMNIST subset; the text names keys and counts only and may leave the site."""


@dataclass(frozen=True, eq=False)
class Images:
    """The images of one site, of all splits behind each other, memory-mapped.

    Attributes:
        arrays: one array a split, (N, *grid) or (N, *grid, C), uint8.
        positions: which images of those, counted through, the site has.
        channels: C, 1 where the arrays have no axis for it.
    """

    arrays: tuple[NDArray[np.uint8], ...]
    positions: NDArray[np.int64]
    channels: int

    @property
    def num_inputs(self) -> int:
        """Number of channels."""
        return self.channels

    @property
    def shape(self) -> tuple[int, ...]:
        """Channels, then the grid."""
        return (self.channels, *self.grid)

    @property
    def dtype(self) -> torch.dtype:
        """Bytes."""
        return torch.uint8

    @property
    def grid(self) -> tuple[int, ...]:
        """Pixels along each axis of an image; the first axis of a flat image goes from left to right."""
        shape = self.arrays[0].shape[1:]
        grid = shape if self.channels == 1 else shape[:-1]
        return grid[::-1] if len(grid) == 2 else grid

    @property
    def unit(self) -> float:
        """What 1 in the stored numbers is worth."""
        return 1.0 / 255

    @property
    def signature(self) -> str:
        """Channels and grid."""
        return f"images {self.channels} {self.grid}"

    def fill(self, target: Tensor, indices: Sequence[int]) -> None:
        """Copy images to (B, C, *grid)."""
        wanted = self.positions[list(indices)]
        start = 0
        for array in self.arrays:
            here = (wanted >= start) & (wanted < start + len(array))
            if here.any():
                images = torch.from_numpy(array[wanted[here] - start])
                images = images[:, None] if self.channels == 1 else images.movedim(-1, 1)
                # Arrays of flat images hold rows.
                target[torch.from_numpy(here)] = (images.mT if images.ndim == 4 else images).to(target.dtype)
            start += len(array)


@dataclass(frozen=True)
class MedMnistSource:
    """One subset, as one site or cut into several virtual ones.

    Attributes:
        path: the .npz.
        num_sites: 1: the whole file is the site, under any name; more: its images are dealt to ``part-1``, ``part-2`` and so on.
        controls: classes that count as control, all others as patient; None: the class without a finding of an official subset.
            Where there is none either, every image counts as control. An image with several labels (ChestMNIST: findings) is a
            control when it has none of them.
        spatial_dims: axes that an image must have.
        cache_root: folder that gets the unpacked arrays.
    """

    path: Path
    num_sites: int
    controls: tuple[int, ...] | None
    spatial_dims: int
    cache_root: Path

    def sites(self) -> tuple[str, ...]:
        """Names of the sites, sorted."""
        if self.num_sites == 1:
            return (re.sub(r"[^A-Za-z0-9_-]", "-", self.path.stem),)
        width = len(str(self.num_sites))
        return tuple(f"part-{number:0{width}d}" for number in range(1, self.num_sites + 1))

    def open(self, site: str) -> tuple[Manifest, Images]:
        """The site's images and their classes, with the official splits.

        The targets of an image are ``label``, the number of its class, or of several findings ``label_0``, ``label_1`` and so on.

        Images that are equal stay in their splits, as in everybody's figures, and are problems "twin".

        Raises:
            MedMnistError: not an .npz of images and labels in train, val and test; an official subset with other counts; a site
                that is not one of several.
        """
        if self.num_sites > 1 and site not in self.sites():
            raise MedMnistError(
                f"site: it must be one of {', '.join(self.sites())}, got {site!r}. Mend the name or data.num_sites."
            )
        file = _File(self.path, self.cache_root)
        if (axes := len(file.grid)) != self.spatial_dims:
            raise MedMnistError(
                f"{file.name}: images must have {self.spatial_dims} axes, got {file.grid}. Set data.spatial={axes}."
            )
        counts = tuple(len(file.images[split]) for split in SPLITS)
        if file.official is not None and counts != file.official.counts:
            raise MedMnistError(
                f"{file.name}: train, val and test must have {file.official.counts} images, got {counts}. "
                "Fetch the file again, or rename it if it is a set of your own."
            )
        healthy = self.controls
        if healthy is None and file.official is not None and file.official.healthy is not None:
            healthy = (file.official.healthy,)
        if healthy is None and file.labels["train"].shape[1] == 1:
            _logger.warning("%s: no class is known to be healthy (data.controls): every image counts as control.", file.name)
        part = None if self.num_sites == 1 else self.sites().index(site)
        scans: list[Scan] = []
        positions: list[int] = []
        problems: list[Problem] = []
        seen: dict[bytes, str] = {}
        position = -1
        for split in SPLITS:
            for number, (image, label) in enumerate(zip(file.images[split], file.labels[split], strict=True)):
                position += 1
                subject = f"sub-{split}{number:06d}"
                digest = hashlib.sha256(image).digest()
                first = seen.setdefault(digest, subject)
                # By content, so that equal images are never at two sites.
                if part is not None and int.from_bytes(digest[:8], "big") % self.num_sites != part:
                    continue
                if first != subject:
                    problems.append(Problem("twin", f"{file.name}#{subject}", f"the image is equal to that of {first}"))
                diagnosis = "patient" if _is_patient(label, healthy) else "control"
                path = Path(f"{self.path}#{subject}")
                scans.append(Scan(subject, "", site, site, path, None, None, diagnosis, split, _targets(tuple(label.tolist()))))
                positions.append(position)
        for problem in problems:
            _logger.warning("site %s: %s: %s: %s.", site, problem.kind, problem.where, problem.what)
        manifest = Manifest(site, tuple(scans), tuple(problems))
        position_of = {scan.path: position for scan, position in zip(scans, positions, strict=True)}
        in_order = np.array([position_of[scan.path] for scan in manifest.scans], dtype=np.int64)
        return manifest, Images(tuple(file.images[split] for split in SPLITS), in_order, file.channels)


def _is_patient(label: NDArray[np.integer], healthy: Sequence[int] | None) -> bool:
    """Whether an image shows a finding: its class is not a healthy one, or of several findings (ChestMNIST) it has any."""
    return bool(label.any()) if len(label) > 1 else healthy is not None and int(label[0]) not in healthy


@lru_cache(maxsize=4096)
def _targets(label: tuple[int, ...]) -> tuple[tuple[str, str], ...]:
    """Name and text of what an image is labelled with; cached, since many images share one label."""
    names = ["label"] if len(label) == 1 else [f"label_{finding}" for finding in range(len(label))]
    return tuple(zip(names, map(str, label), strict=True))


@dataclass(frozen=True, eq=False)
class _File:
    """An .npz, its arrays unpacked below ``cache_root``."""

    path: Path
    cache_root: Path

    @property
    def name(self) -> str:
        return self.path.name

    @property
    def official(self) -> Subset | None:
        return SUBSETS.get(re.sub(r"_(28|64|128|224)$", "", self.path.stem.lower()))

    @cached_property
    def images(self) -> dict[str, NDArray[np.uint8]]:
        """(N, *grid) or (N, *grid, 3) a split."""
        arrays: dict[str, NDArray[np.uint8]] = {split: self._array(f"{split}_images") for split in SPLITS}
        shapes = {array.shape[1:] for array in arrays.values()}
        shape = next(iter(shapes))
        if len(shapes) != 1 or len(shape) not in (2, 3, 4) or any(array.dtype != np.uint8 for array in arrays.values()):
            found = [f"{array.dtype} {array.shape}" for array in arrays.values()]
            raise MedMnistError(f"{self.name}: images must be uint8 of one size, 2-D or 3-D, in all splits, got {found}.")
        return arrays

    @property
    def channels(self) -> int:
        shape = self.images["train"].shape[1:]
        return 3 if len(shape) > 2 and shape[-1] == 3 else 1

    @property
    def grid(self) -> tuple[int, ...]:
        shape = self.images["train"].shape[1:]
        return shape if self.channels == 1 else shape[:-1]

    @cached_property
    def labels(self) -> dict[str, NDArray[np.integer]]:
        """(N, L) a split; L is 1 but where an image may have several findings."""
        labels: dict[str, NDArray[np.integer]] = {}
        for split in SPLITS:
            array = self._array(f"{split}_labels")
            if array.ndim == 1:
                array = array[:, None]
            if array.ndim != 2 or array.dtype.kind not in "iub" or len(array) != len(self.images[split]):
                raise MedMnistError(
                    f"{self.name}: {split}_labels must be whole numbers, one row for each of {len(self.images[split])} images, "
                    f"got {array.dtype} {array.shape}."
                )
            labels[split] = array.astype(np.int64)
        return labels

    @cached_property
    def _folder(self) -> Path:
        try:
            with self.path.open("rb") as file:
                return self.cache_root / "medmnist" / hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise MedMnistError(f"data.root: it must be a readable MedMNIST .npz file, got {error.strerror}. Name it.") from None

    def _array(self, key: str) -> NDArray[Any]:
        """One array, mapped."""
        unpacked = self._folder / f"{key}.npy"
        self._folder.mkdir(parents=True, exist_ok=True)
        with FileLock(self._folder / "lock"):
            if not unpacked.exists():
                self._unpack(key, unpacked)
        array: NDArray[Any] = np.load(unpacked, mmap_mode="r", allow_pickle=False)
        return array

    def _unpack(self, key: str, target: Path) -> None:
        """Copy one array out of the archive; its header is read before anything is written."""
        part = target.with_suffix(".part")
        try:
            with zipfile.ZipFile(self.path) as archive:
                with archive.open(f"{key}.npy") as member:
                    shape, dtype = _npy_header(member)
                size = 0 if dtype.hasobject else math.prod(shape) * dtype.itemsize
                limit = min(MAX_BYTES, shutil.disk_usage(target.parent).free)
                if not 0 < size <= limit:
                    raise MedMnistError(f"{self.name}: {key} must have 1 to {limit} bytes to fit the cache's disk, got {size}.")
                with archive.open(f"{key}.npy") as member, part.open("wb") as file:
                    written = sum(file.write(chunk) for chunk in _chunks(member, size + 2**20))
                if written > size + 2**20:
                    raise ValueError(f"more bytes than its header tells: {written}")
            np.load(part, mmap_mode="r", allow_pickle=False)
        except KeyError:
            wanted = ", ".join(f"{split}_{kind}" for split in SPLITS for kind in ("images", "labels"))
            raise MedMnistError(f"{self.name}: it must hold the arrays {wanted}, got none called {key}.") from None
        except MedMnistError:
            raise
        except (zipfile.BadZipFile, zlib.error, EOFError, OSError, ValueError, SyntaxError, NotImplementedError) as error:
            text = " ".join(str(error).split()).replace(str(self.path), self.name)
            raise MedMnistError(
                f"{self.name}: {key} must be readable, got {type(error).__name__} ({text}). Fetch the file again."
            ) from None
        else:
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)


def image_axes(path: Path) -> int:
    """Axes of the images of a file, 2 or 3: an axis of three is that of colours; 3 where the file does not tell."""
    try:
        with zipfile.ZipFile(path) as archive, archive.open("train_images.npy") as member:
            shape, _ = _npy_header(member)
    except (OSError, KeyError, ValueError, SyntaxError, zipfile.BadZipFile, zlib.error):
        return 3  # who opens it says what is wrong
    return 2 if len(shape) == 3 or (len(shape) == 4 and shape[-1] == 3) else 3


def _npy_header(member: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Shape and type of the array that a .npy in an archive claims to hold."""
    version = np.lib.format.read_magic(member)
    reader = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}.get(version)
    if reader is None:
        raise ValueError(f"its format is {version}, not 1.0 or 2.0")
    shape, _, dtype = reader(member)
    return shape, dtype


def _chunks(member: Any, limit: int) -> Iterator[bytes]:
    """What the member holds, no more than a little over the limit."""
    taken = 0
    while taken <= limit and (chunk := member.read(CHUNK_BYTES)):
        taken += len(chunk)
        yield chunk
