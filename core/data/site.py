"""The scans of one site, table rows beside volumes."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from core.data.manifest import Scan
from core.data.volumes import VolumeCache


@dataclass(frozen=True)
class SiteData:
    """The scans of one site that a stage may train on, with their volumes.

    Attributes:
        site: name of the site.
        scans: table rows, aligned with ``volume_indices``.
        volume_indices: position of each scan in ``cache``.
        cache: preprocessed volumes.
    """

    site: str
    scans: tuple[Scan, ...]
    volume_indices: tuple[int, ...]
    cache: VolumeCache

    def __len__(self) -> int:
        return len(self.scans)

    def select(self, keep: Callable[[Scan], bool]) -> "SiteData":
        """The scans for which ``keep`` holds."""
        kept = [i for i, scan in enumerate(self.scans) if keep(scan)]
        return SiteData(self.site, tuple(self.scans[i] for i in kept), tuple(self.volume_indices[i] for i in kept), self.cache)

    def first_scans(self) -> "SiteData":
        """One scan a subject: the first."""
        first = {scan.subject: index for index, scan in reversed(list(enumerate(self.scans)))}
        return self.select(lambda scan: self.scans[first[scan.subject]] == scan)

    def volumes(self, indices: Sequence[int], device: torch.device) -> Tensor:
        """Volumes (N, 1, X, Y, Z), float32, on the device."""
        array = self.cache.read([self.volume_indices[i] for i in indices])
        return torch.from_numpy(array).to(device).float()[:, None]

    def ages(self) -> Tensor:
        """(N,) years, float64, NaN where unknown."""
        return torch.tensor([math.nan if s.age_years is None else s.age_years for s in self.scans], dtype=torch.float64)

    def sexes(self) -> Tensor:
        """(N,) 0 for F, 1 for M, NaN where unknown."""
        return torch.tensor([{"F": 0.0, "M": 1.0, None: math.nan}[scan.sex] for scan in self.scans])

    def scanner_codes(self) -> Tensor:
        """(N,) integer code of each scan's scanner, in the order of their names."""
        names = sorted({scan.scanner for scan in self.scans})
        return torch.tensor([names.index(scan.scanner) for scan in self.scans])
