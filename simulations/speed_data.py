"""How fast scans are fed, side by side with MONAI's data sets: `python -m simulations.speed data`.

Both sides bring every scan to the same grid, scale it by its own percentiles, and make two views of it by the policy
``views=brain``: a box cut out and a little noise. Ours is what training does: cache, the feed's thread, views of a whole batch.
Theirs are PersistentDataset and CacheDataset with MONAI's own transforms in a DataLoader with a lasting worker a core, which is
faster than none. What both make of each scan is compared first. Then all take turns in one run; a turn of cached epochs begins
with one that is not timed, for memory goes cold while others have their turn.
"""

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from core.config import load_config
from core.data.cache import open_cache
from core.data.feed import Ring, Waited, read_ahead
from core.data.manifest import Manifest, Scan
from core.data.site import SiteData, VolumeStore
from core.data.views import ViewPolicy
from core.data.volumes import VolumeSettings

if TYPE_CHECKING:
    from rich.table import Table

SETTINGS = VolumeSettings(voxel_size_mm=1.5, shape=(121, 145, 121), normalisation="robust")
SHARED = Path(__file__).parents[2] / "shared" / "data"
SETS = {"MCIC 1.5 mm": "mcic_vbm_1p5mm", "raw T1w": "ds*_t1w"}
BATCH_SIZE = 8
CPU = torch.device("cpu")
LEAST_CORRELATION = 0.95  # between the volumes that both sides make of a scan
Kind = Literal["ours", "persistent", "cache"]


class DifferentVolumesError(ValueError):
    """What both sides make of a scan is not alike, so their times would not compare."""


def find_scans(folder: Path) -> list[Path]:
    """The NIfTI images below a folder, only the T1w ones where names tell them."""
    images = sorted(path for ending in ("nii", "nii.gz") for path in folder.rglob(f"*.{ending}"))
    return [path for path in images if "_T1w." in path.name] or images


def usual_sets() -> dict[str, list[Path]]:
    """The sets in ``../shared/data``, where that is."""
    return {
        name: [path for folder in sorted(SHARED.glob(pattern)) for path in find_scans(folder)] for name, pattern in SETS.items()
    }


def as_manifest(paths: Sequence[Path]) -> Manifest:
    """Each image as the one scan of a subject."""
    rows = enumerate(paths)
    return Manifest("site", tuple(Scan(f"sub-{i:04d}", "", "site", "site", path, None, None, "control") for i, path in rows))


def policy() -> ViewPolicy:
    """``views=brain``."""
    views = load_config(["views=brain"]).views
    assert isinstance(views, ViewPolicy)
    return views


class Ours:
    """The cache, the feed and the views of training."""

    def __init__(self, paths: Sequence[Path], folder: Path) -> None:
        self.paths, self.folder = paths, folder
        self.data: SiteData | None = None
        # Kept from epoch to epoch, as in a round of training.
        self.ring, self.viewed = Ring(), torch.empty(2, BATCH_SIZE, 1, *SETTINGS.shape)

    def epoch(self) -> Iterator[Tensor]:
        """Both views of every scan, in batches (B, 2, 1, X, Y, Z); the first time all scans are decoded before."""
        if self.data is None:
            cache, manifest = open_cache(as_manifest(self.paths), SETTINGS, self.folder, progress=lambda *_: None)
            if manifest.problems:
                raise ValueError(f"{self.folder}: every scan must be readable, got {manifest.problem_counts()}.")
            self.data = SiteData("site", manifest.scans, tuple(range(len(manifest.scans))), VolumeStore(cache))
        data, views, generator, unit = self.data, policy(), torch.Generator().manual_seed(0), torch.ones(1)
        batches = [range(start, min(start + BATCH_SIZE, len(data))) for start in range(0, len(data), BATCH_SIZE)]
        for batch, stored in read_ahead(batches, lambda batch: data.read(batch, CPU, self.ring), Waited()):
            volumes, viewed = data.on_device(stored, CPU), self.viewed[:, : len(batch)]
            for out in viewed:
                views.draw(volumes.shape, generator).apply(volumes, unit, out)
            yield viewed.transpose(0, 1)

    def volume(self, index: int) -> Tensor:
        """A scan as it is before views."""
        assert self.data is not None
        return self.data.inputs([index], CPU)[0]


class Theirs:
    """A data set of MONAI in torch's DataLoader."""

    def __init__(self, kind: Kind, num_workers: int, paths: Sequence[Path], folder: Path) -> None:
        self.kind, self.num_workers, self.paths, self.folder = kind, num_workers, list(paths), folder
        self.loader: Any = None

    def epoch(self) -> Iterator[Tensor]:
        """Both views of every scan, in batches; the first time all scans are decoded before."""
        from monai.data import CacheDataset, DataLoader, PersistentDataset

        if self.loader is None:
            transform = monai_transform(policy())
            dataset = (
                PersistentDataset(self.paths, transform, cache_dir=self.folder)
                if self.kind == "persistent"
                else CacheDataset(self.paths, transform, num_workers=num_cores(), progress=False)
            )
            workers = {"num_workers": self.num_workers, "persistent_workers": self.num_workers > 0}
            self.loader = DataLoader(dataset, batch_size=BATCH_SIZE, **workers)
        yield from self.loader

    def volume(self, index: int) -> Tensor:
        """A scan as it is before views."""
        prepared: Tensor = monai_preparation()(self.paths[index]).as_tensor()
        return prepared


def monai_preparation() -> Any:
    """What both sides do to every scan once: MONAI's transforms for it."""
    from monai.transforms import (
        Compose,
        LoadImage,
        Orientation,
        ResizeWithPadOrCrop,
        ScaleIntensityRangePercentiles,
        Spacing,
    )

    return Compose(
        [
            LoadImage(image_only=True, ensure_channel_first=True),
            Orientation("RAS", labels=None),
            Spacing((SETTINGS.voxel_size_mm,) * 3, mode="bilinear"),
            ScaleIntensityRangePercentiles(2, 99.5, 0.0, 1.0, clip=True),
            ResizeWithPadOrCrop(SETTINGS.shape),
        ]
    )


def monai_transform(views: ViewPolicy) -> Any:
    """Preparation, then two random views by the same policy."""
    from monai.transforms import Compose, RandCoarseDropout, RandGaussianNoise, RandomizableTransform

    box = tuple(round(views.cutout_fraction * size) for size in SETTINGS.shape)
    one_view = Compose(
        [
            RandCoarseDropout(holes=1, spatial_size=box, fill_value=0.0, prob=1.0),
            RandGaussianNoise(prob=1.0, std=views.noise_sd, sample_std=True),
        ]
    )

    class TwoViews(RandomizableTransform):  # type: ignore[misc]
        def __call__(self, volume: Tensor) -> Tensor:
            return torch.stack([torch.as_tensor(one_view(volume)) for _ in range(2)])

    # Flat: a Compose inside counts as random, and nothing would be cached.
    return Compose([*monai_preparation().transforms, TwoViews()])


def num_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def check_alike(ours: Ours, theirs: Theirs) -> float:
    """The least correlation between what both sides make of a scan.

    Raises:
        DifferentVolumesError: it is below `LEAST_CORRELATION`.
    """
    pairs = [(ours.volume(i).flatten(), theirs.volume(i).flatten()) for i in range(0, len(ours.paths), 5)]
    least = min(float(torch.corrcoef(torch.stack(pair))[0, 1]) for pair in pairs)
    if least < LEAST_CORRELATION:
        raise DifferentVolumesError(f"both sides must make alike volumes of a scan, got a correlation of {least:.3f}.")
    return least


@dataclass(frozen=True, kw_only=True)
class Fed:
    """Scans a second, both views of each, of one side on one set; ratios are ours over theirs of the same turn.

    Attributes:
        scans: name of the set.
        side: whose.
        num_scans: scans in an epoch.
        first: scans a second in the epoch that decodes, each turn's.
        cached: in those after it, each turn's.
        first_ratio: of ours to this, median, least and greatest.
        cached_ratio: likewise.
        correlation: least one of the volumes of both sides; 1 for ours.
    """

    scans: str
    side: str
    num_scans: int
    first: tuple[float, ...]
    cached: tuple[float, ...]
    first_ratio: tuple[float, float, float]
    cached_ratio: tuple[float, float, float]
    correlation: float


def scans_a_second(epoch: Iterator[Tensor], num_scans: int) -> float:
    """Walk an epoch and time it."""
    started = time.perf_counter()
    seen = sum(map(len, epoch))
    taken = time.perf_counter() - started
    if seen != num_scans:
        raise RuntimeError(f"an epoch must hold {num_scans} scans, got {seen}.")
    return num_scans / taken


def compare_feeds(
    name: str, paths: Sequence[Path], *, first_turns: int, turns: int, on_turn: Callable[[str], None] = lambda _: None
) -> list[Fed]:
    """Time every side on one set of scans: first epochs from nothing, then cached ones, all sides in turn.

    Raises:
        DifferentVolumesError: the sides do not do the same to a scan.
    """
    sides: dict[str, Callable[[Path], Ours | Theirs]] = {"ours": lambda folder: Ours(paths, folder)}
    theirs: tuple[tuple[Kind, str], ...] = (("persistent", "PersistentDataset"), ("cache", "CacheDataset"))
    for kind, label in theirs:
        sides[label] = partial(Theirs, kind, num_cores(), paths)
    first: dict[str, list[float]] = {side: [] for side in sides}
    cached: dict[str, list[float]] = {side: [] for side in sides}
    with TemporaryDirectory() as temporary:
        feeds: dict[str, Ours | Theirs] = {}
        for turn in range(first_turns):
            for side, build in sides.items():
                on_turn(f"{name}: first epoch, {side}, turn {turn + 1} of {first_turns}")
                feeds[side] = build(Path(temporary) / f"{turn} {side}")
                first[side].append(scans_a_second(feeds[side].epoch(), len(paths)))
        ours = feeds["ours"]
        assert isinstance(ours, Ours)
        other = next(feed for feed in feeds.values() if isinstance(feed, Theirs))
        correlation = check_alike(ours, other)
        for turn in range(turns):
            for side, feed in feeds.items():
                on_turn(f"{name}: cached epoch, {side}, turn {turn + 1} of {turns}")
                scans_a_second(feed.epoch(), len(paths))
                cached[side].append(scans_a_second(feed.epoch(), len(paths)))
    return [
        Fed(
            scans=name,
            side=side,
            num_scans=len(paths),
            first=tuple(first[side]),
            cached=tuple(cached[side]),
            first_ratio=_ratios(first["ours"], first[side]),
            cached_ratio=_ratios(cached["ours"], cached[side]),
            correlation=1.0 if side == "ours" else correlation,
        )
        for side in sides
    ]


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
    ratios = [mine / yours for mine, yours in zip(ours, theirs, strict=True)]
    return median(ratios), min(ratios), max(ratios)


def memory_of_epochs(paths: Sequence[Path], kind: Kind, folder: Path) -> float:
    """Megabytes of its own that a fresh process holds after two epochs; pages of mapped files are not its own."""
    feed = Ours(paths, folder) if kind == "ours" else Theirs(kind, 0, paths, folder)
    for _ in range(2):
        for _ in feed.epoch():
            pass
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return float(status["RssAnon"].split()[0]) / 1024


def measure_memory(paths: Sequence[Path]) -> dict[Kind, list[tuple[int, float]]]:
    """Megabytes after two epochs over a third, two thirds and all of the scans, each in a process of its own."""
    kinds: tuple[Kind, ...] = ("ours", "persistent", "cache")
    sizes = [max(1, len(paths) * part // 3) for part in (1, 2, 3)]
    with TemporaryDirectory() as temporary:
        found: dict[Kind, list[tuple[int, float]]] = {}
        for kind in kinds:
            found[kind] = []
            for size in sizes:
                with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as fresh:
                    used = fresh.submit(memory_of_epochs, paths[:size], kind, Path(temporary) / kind).result()
                found[kind].append((size, used))
    return found


def as_table(feds: Sequence[Fed]) -> "Table":
    """Scans a second and ratios, a section for each set."""
    from rich.table import Table

    table = Table(title="Scans a second, two augmented views of each; ratios with least and greatest turn")
    table.add_column("scans")
    table.add_column("side", no_wrap=True)
    for heading in ("first epoch", "ours / theirs", "cached epoch", "ours / theirs"):
        table.add_column(heading, justify="right", no_wrap=True)
    for fed, following in zip(feds, [*feds[1:], None], strict=True):
        own = fed.side == "ours"
        table.add_row(
            f"{fed.scans} ({fed.num_scans})" if own else "",
            fed.side,
            f"{median(fed.first):.2f}",
            "" if own else _spread(fed.first_ratio),
            f"{median(fed.cached):.1f}",
            "" if own else _spread(fed.cached_ratio),
            end_section=following is None or following.scans != fed.scans,
        )
    return table


def _spread(ratio: tuple[float, float, float]) -> str:
    return f"{ratio[0]:.1f} ({ratio[1]:.1f} to {ratio[2]:.1f})"


def as_memory_table(name: str, memory: Mapping[Kind, Sequence[tuple[int, float]]]) -> "Table":
    """Megabytes by number of scans."""
    from rich.table import Table

    table = Table(title=f"MB of its own that a process holds after two epochs: {name}")
    table.add_column("side")
    for size, _ in next(iter(memory.values())):
        table.add_column(f"{size} scans", justify="right")
    for kind, found in memory.items():
        table.add_row(
            {"ours": "ours", "persistent": "PersistentDataset", "cache": "CacheDataset"}[kind], *(f"{mb:.0f}" for _, mb in found)
        )
    return table


def facts() -> dict[str, str | int | float]:
    """What the figures depend on, without saying which machine it is."""
    import monai

    views = policy()
    return {
        "torch": torch.__version__,
        "monai": monai.__version__,
        "cores": num_cores(),
        "grid": "x".join(map(str, SETTINGS.shape)),
        "batch": BATCH_SIZE,
        "cutout": views.cutout_fraction,
        "noise": views.noise_sd,
    }
