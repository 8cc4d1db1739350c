"""What a hospital should know of its scans before a run: which are used, which look odd, and what decoding them costs.

`check_site` reads the tables, then the headers, then decodes into the very cache that a run with the same settings uses. What it
holds in memory is a few numbers a scan. `shareable` is all that may be sent to a coordinator. S subjects of a group.
"""

import logging
import math
import shutil
import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from core.data.cache import CacheError, open_cache, plan_build
from core.data.decode import Geometry, VolumeError, read_geometry
from core.data.manifest import (
    MAX_AGE_YEARS,
    UNUSABLE_KINDS,
    Manifest,
    Problem,
    Scan,
    UnusableScansError,
    check_problem_share,
)
from core.data.site import ImageSource, Source, Store, VolumeStore

MIN_SCANS = 8
"""Fewer scans of a site have no typical value that one of them could be far from."""
MIN_ALIKE = 3
"""Fewer scans do not tell which of them is the odd one."""
MAX_Z = 5.0
MIN_LIKENESS = 0.5
MIN_FIELD_MM = 120.0
MAX_OBLIQUE_DEGREES = 20.0
MAX_SLICE_MM = 3.0
SAME_GEOMETRY = 0.1
"""Relative difference under which two voxel sizes or grids are alike."""
MAX_AT_EDGE = 0.05
FLIPS = {"upside down": (2,), "back to front": (1,), "upside down and back to front": (1, 2)}
"""Axes along which a scan may be stored the wrong way round; left and right look alike."""
MIN_GAIN = 0.02
"""Of a correlation by a flip; the right way round, real heads lose by every flip."""
COARSE = 16
"""Blocks along an axis of the volumes that are compared with their mean."""
MIN_TRAIN_CONTROLS = 4
"""Healthy subjects in train without which the server leaves a site out of pretraining."""
ROUND_TO = 5
HIDDEN_BELOW = 10


@dataclass(frozen=True)
class Meaning:
    """One kind of problem: what it is, in a plain sentence, and what can be done."""

    what: str
    remedy: str


MEANINGS: Mapping[str, Meaning] = {
    "no_image": Meaning(
        "The table lists a subject of whom no image was found.",
        "Fetch the images, take the rows out of the table, or check suffix, derivatives and pattern.",
    ),
    "no_row": Meaning("An image whose subject is not in the table.", "Add a row, or move the image away."),
    "no_features": Meaning("A participant without a row of features.", "Add the row, or take the participant out."),
    "wrong_name": Meaning("A file named for another subject or session than its folder.", "Find out whose it is and rename it."),
    "unreadable": Meaning("An image that cannot be decoded.", "Do what the example says, or unlist the scan."),
    "failed_qc": Meaning("qc.tsv has a verdict against the image.", "Nothing, if the verdict is right."),
    "two_sites": Meaning("A subject with rows at two sites.", "Leave one of the rows."),
    "duplicate": Meaning(
        "One picture that is told to be of different subjects; none of them is used.", "Find out whose it is; remove the others."
    ),
    "copy": Meaning("A picture that its subject has twice; one is used.", "Nothing, or remove the second file."),
    "twin": Meaning("An image equal to another of the set; both are used.", "Nothing: official sets are kept as they are."),
    "chunk_image": Meaning("An image of a part of the head (chunk-).", "Nothing, or name chunk- in data.suffix."),
    "phase_image": Meaning("An image that is no magnitude image (part-).", "Nothing, or name part- in data.suffix."),
    "contrast_image": Meaning("An image taken with a contrast agent (ce-).", "Nothing, or name ce- in data.suffix."),
    "echo_image": Meaning("A further echo of a scan that is read.", "Nothing, or name echo- in data.suffix."),
    "inversion_image": Meaning("A further inversion of a scan that is read.", "Nothing, or name inv- in data.suffix."),
    "derived_image": Meaning("Another version of a scan that is read.", "Nothing, or ask for it by data.suffix or data.pattern."),
    "double_image": Meaning("A scan that is there in two formats; one is read.", "Nothing, or remove one."),
    "label_image": Meaning("A mask or label map, by its name.", "Nothing, or name the scans with data.pattern."),
    "other_format": Meaning("An image in a format that is not read.", "Convert it as the example says, or leave it."),
    "other_contrast": Meaning("An image of another contrast, by its name.", "Nothing, or name the scans with data.pattern."),
    "no_age": Meaning("The scan's age is not known; it has no age label.", "Add the age to the table."),
    "bad_age": Meaning("An age that is no number of years from 0 to 120; it is left out.", "Mend the cell."),
    "doubtful_age": Meaning("An age whose unit or value is doubtful.", "Name the unit in the column or its .json."),
    "capped_age": Meaning("An age told as a bound, such as 89+; the bound is used.", "Nothing, or give the age."),
    "contradictory_age": Meaning("Sources of one age contradict each other; it is left out.", "Mend the wrong one."),
    "age_of_first_visit": Meaning(
        "The age at the first visit stands in for a later one.", "Add ages to sessions.tsv, or a row a session."
    ),
    "bad_sex": Meaning("A sex that is no known code; it is left out.", "Mend the cell, or tell data.columns.females and .males."),
    "contradictory_sex": Meaning("A subject with two sexes; it is left out.", "Mend the wrong one."),
    "no_diagnosis": Meaning("No diagnosis is told; the scan counts neither as control nor as patient.", "Fill the cell."),
    "bad_diagnosis": Meaning(
        "A diagnosis of unknown meaning; it is left out.", "Tell which codes are healthy: data.columns.controls and .patients."
    ),
    "contradictory_diagnosis": Meaning("A subject with two diagnoses; it is left out.", "Mend the wrong one."),
    "bad_split": Meaning("A split that is not train, val or test; it is left out.", "Mend the cell."),
    "contradictory_split": Meaning("A subject in two splits; it is left out.", "Mend the wrong one."),
    "contradictory_target": Meaning("Two values in a target's column for one scan; it is left out.", "Mend the wrong one."),
    "wrong_split": Meaning("An image in the folder of another split than its row; the row counts.", "Move it, if that is wrong."),
    "no_scanner": Meaning("The scanner is not known; the site's name stands in.", "Add a column scanner, or the .json files."),
    "no_site": Meaning("A row that names no site; it is at none.", "Fill the cell, or tell data.columns.site_pattern."),
    "no_subject": Meaning("A row without a subject; it is not read.", "Fill the cell, or remove the row."),
    "double_row": Meaning("A second row of one subject.", "Leave one, or tell them apart by a column session."),
    "inexact_id": Meaning("A subject that table and folder spell differently; taken as one.", "Nothing, or spell it alike."),
    "shared_subject": Meaning("A subject who is at another site too.", "Make sure that they are two persons."),
    "missing_features": Meaning("A row with features missing; their means stand in.", "Fill them, if they can be had."),
    "wrong_row": Meaning("A row of scans.tsv that names no image of this subject.", "Mend the row."),
    "bad_table": Meaning("A table beside the images that cannot be read.", "Mend the file, or remove it."),
    "bad_sidecar": Meaning("A .json beside an image that cannot be read.", "Mend the file, or remove it."),
    "odd_voxel_size": Meaning("Voxels unlike those of its scanner's others.", "Find out whether it is the same protocol."),
    "odd_grid": Meaning("A grid unlike that of its scanner's others.", "Find out whether it is the same protocol."),
    "odd_orientation": Meaning("Stored along other axes than its scanner's others.", "See in the montage that it is upright."),
    "small_field": Meaning("A field of view under 120 mm: a part of a head.", "Unlist it, if it is no whole head."),
    "oblique": Meaning("Tilted by more than 20 degrees; it is not turned upright.", "Register it, or leave it."),
    "thick_slices": Meaning("Slices over 3 mm along one axis.", "Make sure that it is the 3-D scan."),
    "odd_foreground": Meaning("The head fills another share of the volume.", "Look at the montage: cut off, or skull-stripped?"),
    "odd_mean": Meaning("Brighter or darker than the site's others.", "Look at the montage: another contrast?"),
    "odd_spread": Meaning("More or less contrast than the site's others.", "Look at the montage: another contrast?"),
    "odd_sharpness": Meaning("Edges sharper or more blurred than the site's others.", "Look at the montage: motion or noise?"),
    "turned": Meaning("Turned over, it would be more like the site's others.", "Look at the montage, and mend its affine."),
    "unlike_site": Meaning("Unlike the mean of the site's others.", "Look at the montage: cut off, another contrast, no head?"),
}
OUTLIER_KINDS = frozenset(
    {"odd_voxel_size", "odd_grid", "odd_orientation", "small_field", "oblique", "thick_slices"}
    | {"odd_foreground", "odd_mean", "odd_spread", "odd_sharpness", "turned", "unlike_site"}
)

Steps = Callable[[str, int, int], None]
"""Called with what is done ("decoding", "looking"), how many scans are done, and of how many."""


@dataclass(frozen=True, kw_only=True)
class Intensity:
    """Numbers of one prepared volume.

    Attributes:
        foreground: Share of its voxels over a tenth of its range.
        mean: Of those voxels.
        spread: Their standard deviation.
        sharpness: Mean step between neighbours among them, in standard deviations.
        at_edge: Largest share of them on the left, right, back or upper face of the grid, where no neck or jaw belongs.
        likeness: Correlation with the sum of the site's others; NaN where there are too few.
        turned: How it seems to stand, where a flip makes it more like the others.
    """

    foreground: float
    mean: float
    spread: float
    sharpness: float
    at_edge: float
    likeness: float = math.nan
    turned: str = ""


@dataclass(frozen=True, kw_only=True)
class Cost:
    """What the cache of a site needs.

    Attributes:
        folder: Where it is.
        num_images: Different image files.
        num_missing: Those that were not there yet.
        bytes_in_all: Size of all entries.
        bytes_missing: Size of those that were not there.
        bytes_free: Space on that disk, before.
        decode_s: Seconds for all that were missing; NaN where none was, or none was decoded.
        read_s: Seconds to read one volume from the cache; NaN where none was read.
    """

    folder: Path
    num_images: int
    num_missing: int
    bytes_in_all: int
    bytes_missing: int
    bytes_free: int
    decode_s: float = math.nan
    read_s: float = math.nan


@dataclass(frozen=True, kw_only=True)
class SiteCheck:
    """All that was found at one site.

    Attributes:
        site: Its name.
        manifest: The scans that a run would use, and all problems.
        geometry: What the headers say, by image file; none for what is no image file.
        outliers: Scans that can be used and look odd.
        notes: What could not be looked at, and why.
        stop: Why a run would stop here; "" if it would not.
        cost: None where nothing is decoded.
        store: The prepared inputs; None where they were not prepared.
    """

    site: str
    manifest: Manifest
    geometry: Mapping[Path, Geometry] = field(default_factory=dict)
    outliers: tuple[Problem, ...] = ()
    notes: tuple[str, ...] = ()
    stop: str = ""
    cost: Cost | None = None
    store: Store | None = None

    @property
    def num_listed(self) -> int:
        """Scans that the site lists: those used and those that a problem kept out."""
        return len(self.manifest.scans) + sum(problem.kind in UNUSABLE_KINDS for problem in self.manifest.problems)


@contextmanager
def gathered_remarks() -> Iterator[list[str]]:
    """What the readers log meanwhile, but for single problems, which a manifest holds; nothing goes to the screen."""
    remarks: list[str] = []

    class Gather(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            told_elsewhere = str(record.msg).startswith(("site %s: %s: ", "%s: read as data.layout"))
            if not told_elsewhere and (text := record.getMessage()) not in remarks:
                remarks.append(text)

    logger = logging.getLogger("isocenter")
    handler, level = Gather(), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield remarks
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def check_site(
    source: Source,
    site: str,
    *,
    max_unusable: float,
    quick: bool = False,
    on_plan: Callable[[str, Cost], None] | None = None,
    steps: Steps | None = None,
) -> SiteCheck:
    """Look at every scan of one site.

    Args:
        source: Where the scans are.
        site: One of ``source.sites()``.
        max_unusable: Share of the listed scans that may be unusable.
        quick: Read tables and headers only.
        on_plan: Called with the site and the cost before anything is decoded.
        steps: Told how far it is.

    Raises:
        ValueError: The site's tables or the settings cannot be understood.
    """
    if not isinstance(source, ImageSource):
        manifest, store = source.open(site)
        notes = ["Odd scans were not looked for: that is done in folders of images only."]
        return SiteCheck(site=site, manifest=manifest, notes=tuple(notes), stop=_stop(manifest, max_unusable), store=store)
    manifest = source.manifest(site)
    geometry: dict[Path, Geometry] = {}
    faults: dict[Path, Problem] = {}
    for scan in manifest.scans:
        try:
            geometry[scan.path] = read_geometry(scan.path)
        except VolumeError as fault:
            faults[scan.path] = Problem("unreadable", str(scan.path), str(fault))
    cost = _cost(manifest, source)
    if quick or not manifest.scans:
        readable = replace(manifest.select(lambda scan: scan.path not in faults), problems=(*manifest.problems, *faults.values()))
        outliers, notes = _odd_geometry(readable.scans, geometry)
        if quick:
            notes.append("--quick: no image was decoded; damage behind a header, copies and odd intensities were not looked for.")
        stop = _stop(readable, max_unusable)
        return SiteCheck(
            site=site, manifest=readable, geometry=geometry, outliers=outliers, notes=tuple(notes), stop=stop, cost=cost
        )
    try:
        source.cache_root.mkdir(parents=True, exist_ok=True)
        plan = plan_build(manifest, source.settings, source.cache_root)
        cost = replace(cost, num_images=plan.num_images, num_missing=plan.num_missing, bytes_missing=plan.missing_bytes)
        if on_plan:
            on_plan(site, cost)
        started = time.perf_counter()
        cache, used = open_cache(
            manifest,
            source.settings,
            source.cache_root,
            progress=None if steps is None else lambda done, total: steps("decoding", done, total),
        )
        decode_s = (time.perf_counter() - started) if plan.num_missing else math.nan
    except (CacheError, OSError) as fault:
        text = str(fault) if isinstance(fault, CacheError) else _unusable_cache(source.cache_root, fault)
        outliers, notes = _odd_geometry(manifest.scans, geometry)
        return SiteCheck(
            site=site, manifest=manifest, geometry=geometry, outliers=outliers, notes=tuple(notes), stop=text, cost=cost
        )
    store = VolumeStore(cache)
    started = time.perf_counter()
    intensities = _intensities(store, used.scans, steps)
    read_s = (time.perf_counter() - started) / max(1, 2 * len(used.scans))
    outliers, notes = _odd_geometry(used.scans, geometry)
    odd_intensity, more_notes = _odd_intensity(used.scans, intensities)
    cut = sum(intensity.at_edge > MAX_AT_EDGE for intensity in intensities)
    if cut:
        more_notes.append(
            f"The head reaches the left, right, back or upper edge of the grid in {cut} of {len(used.scans)} scans: where the "
            f"montage shows it cut off, take a larger data.shape, now {_by(source.settings.shape)} of "
            f"{source.settings.voxel_size_mm:g} mm."
        )
    return SiteCheck(
        site=site,
        manifest=used,
        geometry=geometry,
        outliers=outliers + odd_intensity,
        notes=(*notes, *more_notes),
        stop=_stop(used, max_unusable),
        cost=replace(cost, decode_s=decode_s, read_s=read_s if used.scans else math.nan),
        store=store,
    )


def _unusable_cache(folder: Path, fault: OSError) -> str:
    return (
        f"{folder}: the cache's folder must be writable, got {fault.strerror}. Name another with ISOCENTER_CACHE "
        "(cache-root in a site's node config)."
    )


def _cost(manifest: Manifest, source: ImageSource) -> Cost:
    """What all images would need, were none in the cache."""
    size = math.prod(source.settings.shape) * np.dtype(source.settings.stored).itemsize
    folder = source.cache_root.absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    num_images = len({scan.path for scan in manifest.scans})
    return Cost(
        folder=folder,
        num_images=num_images,
        num_missing=num_images,
        bytes_in_all=num_images * size,
        bytes_missing=num_images * size,
        bytes_free=shutil.disk_usage(existing).free,
    )


def _stop(manifest: Manifest, max_unusable: float) -> str:
    """Why a run would stop at this site, and what would help."""
    try:
        check_problem_share(manifest, max_unusable)
    except UnusableScansError:
        counts = {kind: count for kind, count in manifest.problem_counts().items() if kind in UNUSABLE_KINDS}
        by_kind = ", ".join(f"{kind} {count}" for kind, count in counts.items())
        num_unusable = sum(counts.values())
        num_listed = len(manifest.scans) + num_unusable
        if not num_listed:
            return "no scan is listed: no row of a table, no image of the kind looked for."
        if not manifest.scans:
            return f"no scan is left: none of {num_listed} listed can be used ({by_kind})."
        enough = math.ceil(100 * num_unusable / num_listed) / 100
        return (
            f"{num_unusable} of {num_listed} scans listed cannot be used ({by_kind}), more than "
            f"data.max_unusable={max_unusable:g} allows. Mend or unlist them; where they are missing for good reason, allow it "
            f"with data.max_unusable={enough:g} or more, up to 1 (a real site: max_unusable of its own policy too)."
        )
    return ""


def _intensities(store: VolumeStore, scans: Sequence[Scan], steps: Steps | None) -> list[Intensity]:
    """Numbers of each volume: one pass for them and the site's sum, one to compare each with the sum of the others."""
    first: list[Intensity] = []
    total: NDArray[np.float64] | None = None
    for number in range(len(scans)):
        volume = picture(store, number)[0]
        coarse = _coarse(volume)
        total = coarse if total is None else total + coarse
        first.append(_intensity(volume))
        if steps:
            steps("looking", number + 1, 2 * len(scans))
    if total is None or len(scans) < MIN_ALIKE:
        return first
    found = []
    for number, intensity in enumerate(first):
        coarse = _coarse(picture(store, number)[0])
        others = total - coarse
        likeness = _correlation(coarse, others)
        flipped = {name: _correlation(np.flip(coarse, axes), others) for name, axes in FLIPS.items()}
        best = max(flipped, key=lambda name: flipped[name])
        gain = f"{best}: correlation with the others {likeness:.3g}, {flipped[best]:.3g} when flipped"
        turned = gain if flipped[best] > likeness + MIN_GAIN else ""
        found.append(replace(intensity, likeness=likeness, turned=turned))
        if steps:
            steps("looking", len(scans) + number + 1, 2 * len(scans))
    return found


def picture(store: Store, number: int) -> NDArray[np.float32]:
    """The input of one scan, of ``store.shape``, in its own unit."""
    filled = torch.empty((1, *store.shape))
    store.fill(filled, [number])
    return filled[0].numpy() * np.float32(store.unit)


def _intensity(volume: NDArray[np.float32]) -> Intensity:
    low, high = np.percentile(volume.ravel()[:: max(1, volume.size // 100_000)], (2.0, 98.0))
    inside = volume > low + 0.1 * (high - low)
    if not inside.any():
        return Intensity(foreground=0.0, mean=0.0, spread=0.0, sharpness=0.0, at_edge=0.0)
    values = volume[inside].astype(np.float64)
    spread = float(values.std())
    steps = []
    for axis in range(3):
        both = np.take(inside, range(1, volume.shape[axis]), axis) & np.take(inside, range(volume.shape[axis] - 1), axis)
        differences = np.abs(np.diff(volume, axis=axis)[both])
        steps.append(float(differences.mean()) if differences.size else 0.0)
    return Intensity(
        foreground=float(inside.mean()),
        mean=float(values.mean()),
        spread=spread,
        sharpness=statistics.fmean(steps) / spread if spread else 0.0,
        at_edge=max(float(face.mean()) for face in (inside[0], inside[-1], inside[:, 0], inside[:, :, -1])),
    )


def _coarse(volume: NDArray[np.float32]) -> NDArray[np.float64]:
    """Means of at most COARSE blocks along each axis."""
    coarse = volume.astype(np.float64)
    for axis, size in enumerate(volume.shape):
        starts = np.linspace(0, size, min(size, COARSE), endpoint=False).astype(int)
        lengths = np.diff(np.append(starts, size)).reshape([-1 if other == axis else 1 for other in range(3)])
        coarse = np.add.reduceat(coarse, starts, axis) / lengths
    return coarse


def _correlation(first: NDArray[np.float64], second: NDArray[np.float64]) -> float:
    a, b = (values.ravel() - values.mean() for values in (first, second))
    scale = math.sqrt(float(a @ a) * float(b @ b))
    return float(a @ b) / scale if scale else 0.0


def _robust_z(values: Sequence[float]) -> tuple[float, list[float]]:
    """The median, and each value's distance from it in robust standard deviations, these at least a hundredth of it.

    >>> _robust_z([1.0, 2.0, 3.0, 4.0, 100.0])[0]
    3.0
    """
    median = statistics.median(values)
    deviation = max(1.4826 * statistics.median(abs(value - median) for value in values), 0.01 * abs(median), 1e-9)
    return median, [(value - median) / deviation for value in values]


def _odd_intensity(scans: Sequence[Scan], intensities: Sequence[Intensity]) -> tuple[tuple[Problem, ...], list[str]]:
    names = {
        "foreground": "share of foreground",
        "mean": "mean of the foreground",
        "spread": "spread of the foreground",
        "sharpness": "edge sharpness",
        "likeness": "correlation with the others",
    }
    if len(scans) < MIN_ALIKE:
        return (), [f"No scan was compared with the site's others: that takes {MIN_ALIKE} scans, the site has {len(scans)}."]
    outliers = []
    for scan, intensity in zip(scans, intensities, strict=True):
        if intensity.turned:
            outliers.append(Problem("turned", str(scan.path), intensity.turned))
    for name, words in names.items():
        values = [float(getattr(intensity, name)) for intensity in intensities]
        median, z = _robust_z(values)
        for scan, value, distance in zip(scans, values, z, strict=True):
            is_far = len(scans) >= MIN_SCANS and (distance < -MAX_Z if name == "likeness" else abs(distance) > MAX_Z)
            if is_far or (name == "likeness" and value < MIN_LIKENESS):
                kind = "unlike_site" if name == "likeness" else f"odd_{name}"
                outliers.append(Problem(kind, str(scan.path), f"{words} {value:.3g}, usually {median:.3g}"))
    if len(scans) < MIN_SCANS:
        return tuple(outliers), [f"Odd intensities were not looked for: that takes {MIN_SCANS} scans, the site has {len(scans)}."]
    return tuple(outliers), []


def _odd_geometry(scans: Sequence[Scan], geometry: Mapping[Path, Geometry]) -> tuple[tuple[Problem, ...], list[str]]:
    """Scans that differ from their scanner's others, or from any head."""
    outliers = []
    by_scanner: dict[str, list[Scan]] = {}
    for scan in scans:
        if scan.path in geometry:
            by_scanner.setdefault(scan.scanner, []).append(scan)
    for scanner_scans in by_scanner.values():
        found = [geometry[scan.path] for scan in scanner_scans]
        usual_mm = np.median([g.voxel_sizes_mm for g in found], axis=0)
        usual_shape = np.median([g.shape for g in found], axis=0)
        usual_axes = Counter(g.stored_orientation for g in found).most_common(1)[0][0]
        for scan, g in zip(scanner_scans, found, strict=True):
            where = str(scan.path)
            if len(found) >= MIN_ALIKE:
                if _differs(g.voxel_sizes_mm, usual_mm):
                    what = f"voxels of {_by(g.voxel_sizes_mm)} mm, on this scanner {_by(usual_mm)}"
                    outliers.append(Problem("odd_voxel_size", where, what))
                if _differs(g.shape, usual_shape):
                    what = f"{_by(g.shape)}, on this scanner {_by(usual_shape)}"
                    outliers.append(Problem("odd_grid", where, what))
                if g.stored_orientation != usual_axes:
                    what = f"stored {g.stored_orientation}, on this scanner {usual_axes}"
                    outliers.append(Problem("odd_orientation", where, what))
            field_mm = [size * number for size, number in zip(g.voxel_sizes_mm, g.shape, strict=True)]
            if min(field_mm) < MIN_FIELD_MM:
                outliers.append(Problem("small_field", where, f"a field of view of {_by(np.round(field_mm))} mm"))
            if g.oblique_degrees > MAX_OBLIQUE_DEGREES:
                outliers.append(Problem("oblique", where, f"tilted by {g.oblique_degrees:.0f} degrees"))
            ordered_mm = sorted(g.voxel_sizes_mm)
            # Cubes of 4 mm are a grid that somebody chose, not slices.
            if ordered_mm[2] > MAX_SLICE_MM * (1 + 1e-3) and ordered_mm[2] > (1 + SAME_GEOMETRY) * ordered_mm[0]:
                outliers.append(Problem("thick_slices", where, f"voxels of {_by(g.voxel_sizes_mm)} mm"))
    few = sum(len(scanner_scans) < MIN_ALIKE for scanner_scans in by_scanner.values())
    notes = []
    if few:
        whose = "the scanner" if few == len(by_scanner) == 1 else f"{few} of {len(by_scanner)} scanners"
        notes.append(f"Geometry was not compared within {whose}: that takes {MIN_ALIKE} scans of a scanner.")
    return tuple(outliers), notes


def _differs(values: Sequence[float], usual: NDArray[np.float64]) -> bool:
    return bool((np.abs(np.asarray(values) / usual - 1.0) > SAME_GEOMETRY).any())


def _by(values: Iterable[float]) -> str:
    return "x".join(f"{float(value):.3g}" for value in values)


def voxel_size(geometry: Geometry) -> tuple[float, float, float]:
    """Voxel sizes rounded to a tenth of a millimetre."""
    x, y, z = (round(size, 1) for size in geometry.voxel_sizes_mm)
    return x, y, z


def age_band(age_years: float | None) -> str:
    """The ten years that an age lies in.

    >>> age_band(39.9), age_band(None)
    ('30-39', 'unknown')
    """
    return "unknown" if age_years is None else f"{(low := 10 * int(age_years // 10))}-{low + 9}"


AGE_BANDS = tuple(age_band(float(low)) for low in range(0, int(MAX_AGE_YEARS) + 1, 10))


def suppressed(counts: Mapping[str, int]) -> dict[str, int | str]:
    """Counts of one table as they may be told: rounded to ROUND_TO, those under HIDDEN_BELOW, none included, as "<10".

    Where those hidden are few together, so that a total less the others would tell them, the smallest other is "hidden" too.

    >>> suppressed({"F": 43, "M": 38, "unknown": 0})
    {'F': 45, 'M': 40, 'unknown': '<10'}
    >>> suppressed({"control": 30, "patient": 3})
    {'control': 'hidden', 'patient': '<10'}
    """
    hidden = {name for name, count in counts.items() if count < HIDDEN_BELOW}
    beside: set[str] = set()
    if 0 < sum(counts[name] for name in hidden) < HIDDEN_BELOW and len(hidden) < len(counts):
        beside = {min((name for name in counts if name not in hidden), key=lambda name: counts[name])}
    return {name: "hidden" if name in beside else rounded(count) for name, count in counts.items()}


def rounded(count: int) -> int | str:
    """A count as it may be told.

    >>> rounded(9), rounded(12), rounded(13)
    ('<10', 10, 15)
    """
    return f"<{HIDDEN_BELOW}" if count < HIDDEN_BELOW else ROUND_TO * math.floor(count / ROUND_TO + 0.5)


def shareable(checks: Sequence[SiteCheck]) -> dict[str, Any]:
    """What may be sent to a coordinator: rounded counts without the small ones, no name of anything.

    Every list of counts has the same rows whatever was found, so that its rows tell nothing. Subjects are counted once at each
    site, by their first scan.
    """
    first: dict[tuple[str, str], Scan] = {}
    for check in checks:
        for scan in check.manifest.scans:
            first.setdefault((check.site, scan.subject), scan)
    subjects = list(first.values())
    geometry = {path: found for check in checks for path, found in check.geometry.items()}
    problems = Counter(p.kind for check in checks for p in (*check.manifest.problems, *check.outliers))
    sizes = Counter(voxel_size(geometry[scan.path]) for scan in subjects if scan.path in geometry)
    told_sizes = suppressed({str(list(size)): count for size, count in sizes.items()})
    told_by_size = {size: told_sizes[str(list(size))] for size in sizes}
    return {
        "format": "isocenter-check-share-1",
        "counts": f"rounded to {ROUND_TO}; <{HIDDEN_BELOW}: fewer than that, or none; hidden: withheld to protect such a count",
        "scanners": rounded(len({(scan.site, scan.scanner) for check in checks for scan in check.manifest.scans})),
        "subjects": rounded(len(subjects)),
        "sex": suppressed(_counted(("F", "M", "unknown"), (scan.sex for scan in subjects))),
        "diagnosis": suppressed(_counted(("control", "patient", "unknown"), (scan.diagnosis for scan in subjects))),
        "age_years": suppressed(_counted((*AGE_BANDS, "unknown"), (age_band(scan.age_years) for scan in subjects))),
        "voxel_sizes_mm": [
            {"voxel_size_mm": list(size), "subjects": told}
            for size, told in sorted(told_by_size.items())
            if not isinstance(told, str)
        ],
        "problems": {kind: rounded(problems.get(kind, 0)) for kind in MEANINGS},
    }


def _counted(names: Sequence[str], values: Iterable[str | None]) -> dict[str, int]:
    counts = Counter("unknown" if value is None else value for value in values)
    return {name: counts.get(name, 0) for name in names}


def as_json(check: SiteCheck) -> dict[str, Any]:
    """A site's findings with ids and paths, for the hospital's own machine."""
    scans = check.manifest.scans
    cost = check.cost
    subjects = {scan.subject: scan for scan in reversed(scans)}.values()
    return {
        "site": check.site,
        "stop": check.stop,
        "listed": check.num_listed,
        "scans": len(scans),
        "subjects": check.manifest.num_subjects,
        "sessions": len({(scan.subject, scan.session) for scan in scans if scan.session}),
        "scanners": [scanner_summary(name, check) for name in sorted({scan.scanner for scan in scans})],
        "age_years": _counted((*AGE_BANDS, "unknown"), (age_band(scan.age_years) for scan in subjects)),
        "problem_counts": check.manifest.problem_counts(),
        "problems": [{"kind": p.kind, "where": p.where, "what": p.what} for p in check.manifest.problems],
        "outliers": [{"kind": p.kind, "where": p.where, "what": p.what} for p in check.outliers],
        "notes": list(check.notes),
        "cache": None
        if cost is None
        else {
            "folder": str(cost.folder),
            "images": cost.num_images,
            "missing": cost.num_missing,
            "bytes": cost.bytes_in_all,
            "bytes_missing": cost.bytes_missing,
            "bytes_free": cost.bytes_free,
            "decode_seconds": _finite(cost.decode_s),
            "read_seconds_a_scan": _finite(cost.read_s),
        },
        "used": [
            {
                "subject": scan.subject,
                "session": scan.session,
                "scanner": scan.scanner,
                "path": str(scan.path),
                "age_years": scan.age_years,
                "sex": scan.sex,
                "diagnosis": scan.diagnosis,
                "split": scan.split,
            }
            for scan in scans
        ],
    }


def _finite(value: float) -> float | None:
    return round(value, 4) if math.isfinite(value) else None


def scanner_summary(scanner: str, check: SiteCheck) -> dict[str, Any]:
    """Who was scanned on one scanner, and how: subjects are counted once, by their first scan there."""
    scans = [scan for scan in check.manifest.scans if scan.scanner == scanner]
    subjects = list({scan.subject: scan for scan in reversed(scans)}.values())
    ages = sorted(scan.age_years for scan in scans if scan.age_years is not None)
    found = [check.geometry[scan.path] for scan in scans if scan.path in check.geometry]
    return {
        "scanner": scanner,
        "subjects": len(subjects),
        "scans": len(scans),
        "sex": _counted(("F", "M", "unknown"), (scan.sex for scan in subjects)),
        "diagnosis": _counted(("control", "patient", "unknown"), (scan.diagnosis for scan in subjects)),
        "age_years": [ages[0], statistics.median(ages), ages[-1]] if ages else None,
        "ages_known": len(ages),
        "voxel_sizes_mm": [[list(size), count] for size, count in Counter(map(voxel_size, found)).most_common()],
        "grids": [[list(shape), count] for shape, count in Counter(g.shape for g in found).most_common()],
    }
