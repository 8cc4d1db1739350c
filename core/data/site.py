"""The scans of one site, table rows beside what a net is given of them: volumes or features."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from numpy.typing import NDArray
from torch import Tensor

from core.data.bids import list_sites, read_site
from core.data.cache import VolumeCache, open_cache
from core.data.manifest import Manifest, Scan
from core.data.volumes import VolumeSettings


class Store(Protocol):
    """Where the inputs of a site's scans are read from."""

    @property
    def num_inputs(self) -> int:
        """Channels of a volume or features of a row: the size of axis 1."""

    @property
    def signature(self) -> str:
        """The same text at sites whose inputs mean the same."""

    def read(self, indices: Sequence[int]) -> NDArray[Any]:
        """Inputs (B, num_inputs, ...) of the scans with these numbers, a copy."""


class Source(Protocol):
    """Where a site, or a simulation of several, finds its scans; equal sources hold the same."""

    def __hash__(self) -> int: ...

    def sites(self) -> tuple[str, ...]:
        """Names of the sites it holds, sorted."""

    def open(self, site: str) -> tuple[Manifest, Store]:
        """The scans of one site, and their inputs in the same order."""


@dataclass(frozen=True)
class VolumeStore:
    """Preprocessed volumes with an axis for their one channel."""

    cache: VolumeCache

    @property
    def num_inputs(self) -> int:
        """One channel."""
        return 1

    @property
    def signature(self) -> str:
        """The grid, on which a run's configuration brings every site."""
        return f"volumes {self.cache.shape}"

    def read(self, indices: Sequence[int]) -> NDArray[Any]:
        """Volumes (B, 1, X, Y, Z), float16."""
        return self.cache.read(indices)[:, None]


@dataclass(frozen=True)
class ImageSource:
    """BIDS folders, decoded to a cache; see ``bids`` and ``volumes``."""

    root: Path
    suffix: str
    settings: VolumeSettings
    cache_root: Path

    def sites(self) -> tuple[str, ...]:
        """Names of the sites below the folder."""
        return list_sites(self.root)

    def open(self, site: str) -> tuple[Manifest, VolumeStore]:
        """The site's readable scans; the first time each is decoded."""
        cache, manifest = open_cache(read_site(self.root, site, suffix=self.suffix), self.settings, self.cache_root)
        return manifest, VolumeStore(cache)


@dataclass(frozen=True)
class SiteData:
    """The scans of one site that a stage may train on, with their inputs.

    Attributes:
        site: name of the site.
        scans: table rows, aligned with ``positions``.
        positions: number of each scan in ``store``.
        store: volumes or rows of features.
    """

    site: str
    scans: tuple[Scan, ...]
    positions: tuple[int, ...]
    store: Store

    def __len__(self) -> int:
        return len(self.scans)

    def select(self, keep: Callable[[Scan], bool]) -> "SiteData":
        """The scans for which ``keep`` holds."""
        kept = [i for i, scan in enumerate(self.scans) if keep(scan)]
        return SiteData(self.site, tuple(self.scans[i] for i in kept), tuple(self.positions[i] for i in kept), self.store)

    def first_scans(self) -> "SiteData":
        """One scan a subject: the first."""
        first = {scan.subject: index for index, scan in reversed(list(enumerate(self.scans)))}
        return self.select(lambda scan: self.scans[first[scan.subject]] == scan)

    def inputs(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """Volumes (N, 1, X, Y, Z) or rows (N, F), float32, on the device."""
        array = self.store.read([self.positions[i] for i in indices])
        return torch.from_numpy(array).to(device).float()

    def ages(self) -> Tensor:
        """(N,) years, float64, NaN where unknown."""
        return torch.tensor([math.nan if s.age_years is None else s.age_years for s in self.scans], dtype=torch.float64)

    def sexes(self) -> Tensor:
        """(N,) 0 for F, 1 for M, NaN where unknown."""
        return torch.tensor([{"F": 0.0, "M": 1.0, None: math.nan}[scan.sex] for scan in self.scans])

    def patients(self) -> Tensor:
        """(N,) 1 for patients, 0 for all others."""
        return torch.tensor([float(scan.diagnosis == "patient") for scan in self.scans])

    def scanner_codes(self) -> Tensor:
        """(N,) integer code of each scan's scanner, in the order of their names."""
        names = sorted({scan.scanner for scan in self.scans})
        return torch.tensor([names.index(scan.scanner) for scan in self.scans])
