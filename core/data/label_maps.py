"""Label maps: an image beside each scan that tells of every voxel which structure or lesion it is in, on the grid of its volume.

A label map is placed as `core.data.volumes.load_volume` places its scan, so both must cover the same voxels; it is never moved
onto a scan that lies elsewhere. Problems name files: they are for the site's own eyes.
"""

import hashlib
import logging
import re
import zlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from glob import escape
from itertools import product
from pathlib import Path, PurePosixPath

import nibabel as nib
import numpy as np
import torch
from nibabel.filebasedimages import ImageFileError
from nibabel.orientations import inv_ornt_aff, io_orientation
from numpy.typing import NDArray
from torch import Tensor

from core.data.decode import VolumeError, _checked_header, _one_sentence, _opened, decode
from core.data.files import ENDINGS, FIELDS
from core.data.manifest import Problem, Scan
from core.data.site import SiteData
from core.data.volumes import VolumeSettings, _centre_on_grid

MAX_CLASSES = 255
MAX_CODE = 2**24
"""Up to here every whole number is a 32-bit float, as which images are decoded."""
SAME_PLACE = 0.1  # of the scan's smallest voxel edge: how far a corner of its label map may lie from its own
SAME_NUMBER = 1e-3  # how far a code may be from a whole number, by a slope that is not exact

_logger = logging.getLogger("isocenter")


@dataclass(frozen=True, kw_only=True)
class LabelChoice:
    """Where the label maps are and what is learnt of them.

    Attributes:
        codes: of each class the number, or numbers, that its voxels have in the label maps; all other voxels are background.
        names: of the classes; None: their codes.
        pattern: the label map of a scan, below ``data.root``: a path with {subject}, {session}, {site} (without ``sub-`` and
            ``ses-``) and ``*``, such as ``derivatives/lesions/sub-{subject}/*_mask.nii.gz``.
        suffix: what the label map beside a scan has behind the scan's name, such as ``_seg``; instead of a pattern.
    """

    codes: tuple[int | tuple[int, ...], ...] = (1,)
    names: tuple[str, ...] | None = None
    pattern: str | None = None
    suffix: str | None = None

    def __post_init__(self) -> None:
        all_codes = [code for group in self.groups for code in group]
        if not (0 < len(self.codes) <= MAX_CLASSES and all(self.groups) and len(set(all_codes)) == len(all_codes)):
            raise ValueError(f"codes must be those of 1 to {MAX_CLASSES} classes, none twice, got {list(self.codes)}")
        if not all(type(code) is int and -MAX_CODE <= code <= MAX_CODE for code in all_codes):
            raise ValueError(f"codes must be whole numbers of at most {MAX_CODE}, got {list(self.codes)}")
        if len(self.classes) != len(self.codes) or len(set(self.classes)) != len(self.classes) or not all(self.classes):
            raise ValueError(f"names must be {len(self.codes)} different ones, one for each class, got {list(self.classes)}")
        if (self.pattern is None) == (self.suffix is None):
            raise ValueError(
                f"one of pattern and suffix must tell where label maps are, got {self.pattern!r} and {self.suffix!r}"
            )
        if self.suffix is not None and (not self.suffix or "/" in self.suffix):
            raise ValueError(f"suffix must be the end of a file's name such as _seg, got {self.suffix!r}")
        if self.pattern is not None:
            fields = re.findall(r"\{([^{}]*)\}", self.pattern)
            path = PurePosixPath(self.pattern)
            if "subject" not in fields or not set(fields) <= set(FIELDS) or path.is_absolute() or ".." in path.parts:
                raise ValueError(
                    f"pattern must be a path below data.root with {{subject}}, it may have {{session}}, {{site}} and *, "
                    f"got {self.pattern!r}"
                )

    @property
    def groups(self) -> tuple[tuple[int, ...], ...]:
        """The codes of each class but the background."""
        return tuple((codes,) if isinstance(codes, int) else tuple(codes) for codes in self.codes)

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of all classes but the background, which is number 0."""
        return tuple("_".join(map(str, group)) for group in self.groups) if self.names is None else self.names

    @property
    def num_classes(self) -> int:
        """K, with the background."""
        return len(self.codes) + 1

    def files(self, scan: Scan, root: Path) -> list[Path]:
        """The files that may be a scan's label map, sorted; there should be one."""
        if self.pattern is None:
            ending = next((ending for ending in ENDINGS if scan.path.name.endswith(ending)), scan.path.suffix)
            stem = f"{scan.path.name.removesuffix(ending)}{self.suffix}"
            found: Iterable[Path] = (scan.path.with_name(stem + other) for other in ENDINGS)
        else:
            values = {
                "subject": scan.subject.removeprefix("sub-"),
                "session": scan.session.removeprefix("ses-"),
                "site": scan.site,
            }
            found = root.glob(re.sub(r"\{(\w+)\}", lambda field: escape(values[field[1]]), self.pattern))
        # A broken link is a label map that cannot be read, not one that is not there.
        return sorted(path for path in found if path != scan.path and (path.is_file() or path.is_symlink()))


@dataclass(frozen=True, eq=False)
class LabelMaps:
    """The classes of all voxels of labelled scans, in memory: one byte a voxel, 0.1 MB a scan at 4 mm, 7 MB at 1 mm.

    Attributes:
        classes: names of the classes but the background.
        maps: by the scan's path, arrays (X, Y, Z) of class numbers on the grid of the run; 0 is background.
        problems: why other scans have none.
    """

    classes: tuple[str, ...]
    maps: Mapping[Path, NDArray[np.uint8]]
    problems: tuple[Problem, ...] = ()

    @property
    def num_classes(self) -> int:
        """K, with the background."""
        return len(self.classes) + 1

    def problem_counts(self) -> dict[str, int]:
        """Number of problems by kind, in alphabetical order: this is all of them that may leave the site."""
        return dict(sorted(Counter(problem.kind for problem in self.problems).items()))

    def digest(self) -> str:
        """SHA-256 of all maps: those of a run must stay the same."""
        digest = hashlib.sha256()
        for path in sorted(self.maps):
            digest.update(path.name.encode() + np.ascontiguousarray(self.maps[path]).tobytes())
        return digest.hexdigest()

    def labelled(self, data: SiteData) -> SiteData:
        """The scans that have a label map."""
        return data.select(lambda scan: scan.path in self.maps)

    def of(self, scans: Sequence[Scan]) -> Tensor:
        """Class numbers (N, X, Y, Z), uint8, of labelled scans."""
        return torch.from_numpy(np.stack([self.maps[scan.path] for scan in scans]))


class _UnusableError(Exception):
    """Kind and text of a problem."""


def read_label_maps(
    scans: Sequence[Scan], settings: VolumeSettings, choice: LabelChoice, root: Path, *, num_workers: int | None = None
) -> LabelMaps:
    """Find and read the label map of each scan.

    A scan without a label map that can be used is unlabelled: it becomes a problem, which the log names. Kinds are
    ``no_label_map``, ``label_maps`` (there are several), ``unreadable_label_map``, ``label_geometry`` (it does not lie where its
    scan lies) and ``label_values`` (not whole numbers, as a map of probabilities).

    Args:
        scans: of one site or several.
        settings: of the volumes.
        choice: where label maps are, and their classes.
        root: what the pattern is relative to.
        num_workers: threads; None: as many as `ThreadPoolExecutor` takes.
    """

    def read(scan: Scan) -> NDArray[np.uint8] | Problem:
        try:
            return _read(scan, settings, choice, root)
        except _UnusableError as fault:
            kind, what = fault.args
            return Problem(kind, str(scan.path), what)

    with ThreadPoolExecutor(num_workers) as pool:
        found = list(zip(scans, pool.map(read, scans), strict=True))
    problems = []
    for scan, result in found:
        if isinstance(result, Problem):
            _logger.warning("site %s: %s: %s: %s", scan.site, result.kind, result.where, result.what)
            problems.append(result)
    maps = {scan.path: result for scan, result in found if not isinstance(result, Problem)}
    return LabelMaps(choice.classes, maps, tuple(problems))


def _read(scan: Scan, settings: VolumeSettings, choice: LabelChoice, root: Path) -> NDArray[np.uint8]:
    files = choice.files(scan, root)
    if not files:
        raise _UnusableError("no_label_map", "it has no label map; mend the pattern or suffix, or leave it unlabelled.")
    if len(files) > 1:
        names = ", ".join(map(str, files))
        raise _UnusableError("label_maps", f"its label map must be one file, got {names}; mend the pattern.")
    (path,) = files
    try:
        _check_place(path, scan.path)
        values = _on_grid(path, settings)
    except VolumeError as error:
        raise _UnusableError("unreadable_label_map", str(error)) from error
    classes = np.zeros(settings.shape, np.uint8)
    for number, group in enumerate(choice.groups, start=1):
        classes[np.isin(values, group)] = number
    return classes


def _corners_mm(path: Path) -> tuple[tuple[int, ...], NDArray[np.float64], float]:
    """Voxels along X, Y and Z, the centres (8, 3) of the corner voxels, and the smallest voxel edge, from the header alone."""
    with _one_sentence(path), _opened(path) as (stream, num_bytes):
        header = _checked_header(stream, num_bytes, path)
    orientation = io_orientation(header.affine)
    affine = header.affine @ inv_ornt_aff(orientation, header.shape)
    order = np.argsort(orientation[:, 0])
    shape = tuple(header.shape[axis] for axis in order)
    corners = np.array(list(product(*[(0, size - 1) for size in shape])))
    edges_mm = np.linalg.norm(affine[:3, :3], axis=0)
    return shape, corners @ affine[:3, :3].T + affine[:3, 3], float(edges_mm.min())


def _check_place(path: Path, scan_path: Path) -> None:
    shape, corners_mm, _ = _corners_mm(path)
    scan_shape, scan_corners_mm, edge_mm = _corners_mm(scan_path)
    if shape != scan_shape:
        what = f"must have the voxels of its scan, {list(scan_shape)} along right, front and top, got {list(shape)}"
    elif (apart_mm := float(np.abs(corners_mm - scan_corners_mm).max())) > SAME_PLACE * edge_mm:
        what = f"must lie where its scan lies to {SAME_PLACE:g} voxels, got corners {apart_mm:.3g} mm apart"
    else:
        return
    raise _UnusableError("label_geometry", f"{path}: the label map {what}. Resample it onto its scan, by nearest neighbour.")


def _on_grid(path: Path, settings: VolumeSettings) -> NDArray[np.float32]:
    """The codes (X, Y, Z) on the grid of the volumes, placed as `load_volume` places them, by nearest neighbour; 0 outside."""
    on_grid = np.zeros(settings.shape, np.float32)
    try:
        image = decode(path)
    except VolumeError:
        if _is_blank(path):
            return on_grid
        raise
    whole = np.rint(image.values)
    if np.abs(image.values - whole).max() > SAME_NUMBER:
        raise _UnusableError("label_values", f"{path}: a label map must hold whole numbers, got others. Name a map of labels.")
    inside = _centre_on_grid(whole, image.voxel_sizes_mm, settings, nearest=True)
    starts = [(size - part) // 2 for size, part in zip(settings.shape, inside.shape, strict=True)]
    on_grid[tuple(slice(start, start + part) for start, part in zip(starts, inside.shape, strict=True))] = inside
    return on_grid


def _is_blank(path: Path) -> bool:
    """Whether an image is 0 everywhere, which `decode` refuses of a scan; in a map it says that there is no lesion."""
    try:
        image = nib.load(path)
        return not np.asanyarray(image.dataobj).any()
    except (ImageFileError, OSError, EOFError, ValueError, zlib.error):
        return False
