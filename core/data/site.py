"""The scans of one site, table rows beside what a net is given of them: volumes or features."""

import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal, Protocol

import torch
from torch import Tensor

from core.data.bids import list_sites, read_site
from core.data.cache import VolumeCache, mask_digest, open_cache
from core.data.feed import Ring
from core.data.files import Layout, detect_layout, list_file_sites, read_files
from core.data.labels import Columns, LabelError
from core.data.manifest import Manifest, Scan
from core.data.openbhb import list_openbhb_sites, read_openbhb
from core.data.volumes import VolumeSettings


def default_cache_root() -> Path:
    """``$ISOCENTER_CACHE``, else a folder in the user's cache."""
    return Path(os.environ.get("ISOCENTER_CACHE") or Path.home() / ".cache" / "isocenter")


class Store(Protocol):
    """Where the inputs of a site's scans are read from."""

    @property
    def num_inputs(self) -> int:
        """Channels of an image or features of a row: the first number of ``shape``."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of one input: (C, X, Y, Z), (C, X, Y) or (F,)."""

    @property
    def dtype(self) -> torch.dtype:
        """Type of the stored numbers."""

    @property
    def unit(self) -> float:
        """What 1 in the stored numbers is worth; 1 but where images are kept as bytes."""

    @property
    def signature(self) -> str:
        """The same text at sites whose inputs mean the same."""

    def fill(self, target: Tensor, indices: Sequence[int]) -> None:
        """Copy the inputs of the scans with these numbers, in multiples of ``unit``, to a CPU tensor (B, *shape) of any type."""


class Source(Protocol):
    """Where a site, or a simulation of several, finds its scans; equal sources hold the same."""

    def __hash__(self) -> int: ...

    def sites(self) -> tuple[str, ...]:
        """Names of the sites it holds, always in the same order."""

    def open(self, site: str) -> tuple[Manifest, Store]:
        """The scans of one site, and their inputs in the same order."""


@dataclass(frozen=True)
class EitherSource:
    """A source, or another where tables lack a column that the first asks for; both hold the same sites and scans."""

    source: Source
    otherwise: Source

    def sites(self) -> tuple[str, ...]:
        """Names of the sites, always in the same order."""
        return self.source.sites()

    def open(self, site: str) -> tuple[Manifest, Store]:
        """The scans of one site, and their inputs in the same order."""
        try:
            return self.source.open(site)
        except LabelError:
            return self.otherwise.open(site)


@dataclass(frozen=True)
class VolumeStore:
    """Preprocessed volumes with an axis for their one channel."""

    cache: VolumeCache

    @property
    def num_inputs(self) -> int:
        """One channel."""
        return 1

    @property
    def shape(self) -> tuple[int, ...]:
        """One channel, then the grid."""
        return (1, *self.cache.shape)

    @property
    def dtype(self) -> torch.dtype:
        """That of the cache."""
        return {"float16": torch.float16, "uint8": torch.uint8}[self.cache.settings.stored]

    @property
    def unit(self) -> float:
        """That of the cache."""
        return self.cache.unit

    @property
    def signature(self) -> str:
        """The grid, on which a run's configuration brings every site, and the mask."""
        return f"volumes {self.cache.shape} {mask_digest(self.cache.settings)}".strip()

    def fill(self, target: Tensor, indices: Sequence[int]) -> None:
        """Copy volumes to (B, 1, X, Y, Z)."""
        self.cache.fill(target[:, 0], indices)


@dataclass(frozen=True, kw_only=True)
class ImageSource:
    """A folder of images, decoded to a cache; the keys of `core.config.ImageData`, with the places of this machine."""

    root: Path
    layout: Literal["auto", "bids", "files", "openbhb"]
    suffix: str
    derivatives: str | None
    participants: Path | None
    pattern: str | None
    columns: Columns
    modality: Literal["vbm", "quasiraw"]
    settings: VolumeSettings
    cache_root: Path

    def sites(self) -> tuple[str, ...]:
        """Names of the sites below the folder, in order."""
        match self.known_layout:
            case "bids":
                return list_sites(self.root, participants=self.participants, columns=self.columns)
            case "openbhb":
                return list_openbhb_sites(self.root, self.columns)
            case "files":
                return list_file_sites(self.root, table=self.participants, pattern=self.pattern, columns=self.columns)

    @cached_property
    def known_layout(self) -> Layout:
        """``layout``, or what the folder looks like."""
        return detect_layout(self.root) if self.layout == "auto" else self.layout

    def manifest(self, site: str) -> Manifest:
        """The site's scans as its tables and file names tell them; no image is opened."""
        match self.known_layout:
            case "bids":
                return read_site(
                    self.root,
                    site,
                    suffix=self.suffix,
                    derivatives=self.derivatives,
                    participants=self.participants,
                    columns=self.columns,
                )
            case "openbhb":
                return read_openbhb(self.root, site, self.modality, self.columns)
            case "files":
                return read_files(self.root, site, table=self.participants, pattern=self.pattern, columns=self.columns)

    def open(self, site: str) -> tuple[Manifest, VolumeStore]:
        """The site's readable scans; the first time each is decoded."""
        cache, manifest = open_cache(self.manifest(site), self.settings, self.cache_root)
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
        """Volumes (N, C, X, Y, Z), images (N, C, X, Y) or rows (N, F), float32, on the device."""
        return self.on_device(self.read(indices, device), device)

    def read(self, indices: Sequence[int], device: torch.device, ring: Ring | None = None) -> Tensor:
        """What `inputs` begins with: read, and made ready for the way to the device; any thread may do this.

        With a ``ring`` the result is one of its tensors.
        """
        shape, on_cpu = (len(indices), *self.store.shape), device.type == "cpu"
        dtype = torch.float32 if on_cpu else self.store.dtype
        target = (ring or Ring(1)).turn(shape, dtype, pinned=device.type == "cuda")
        self.store.fill(target, [self.positions[i] for i in indices])
        return target

    def on_device(self, stored: Tensor, device: torch.device) -> Tensor:
        """What `inputs` ends with: numbers that `read` gave, float32, on the device, in their own unit; they may be changed."""
        inputs = stored.to(device, non_blocking=True).float()
        return inputs if self.store.unit == 1.0 else inputs.mul_(self.store.unit)

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


def join_splits(parts: Sequence[SiteData]) -> SiteData:
    """The scans of several splits of one site as one."""
    return SiteData(
        parts[0].site,
        tuple(scan for part in parts for scan in part.scans),
        tuple(position for part in parts for position in part.positions),
        parts[0].store,
    )
