"""What a site holds: its scans, read, checked and split by subject."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from core.data.manifest import check_problem_share, split_by_subject
from core.data.site import SiteData, Source, Store
from core.evaluation.embeddings import Embeddings


@dataclass(frozen=True)
class Holdings:
    """SiteData by split, their inputs, and the counts of what could not be used."""

    splits: dict[str, SiteData]
    store: Store
    problem_counts: dict[str, int]
    num_scans: int
    num_subjects: int
    num_scanners: int

    def embeddings(self, h: Mapping[str, npt.NDArray[np.float32]]) -> Embeddings:
        """The representations h (N, F) of the scans of some splits beside their labels, without ids."""
        subjects = sorted({scan.subject for data in self.splits.values() for scan in data.scans})
        parts = []
        for split, h_NF in h.items():
            data = self.splits[split]
            parts.append(
                Embeddings(
                    h_NF=h_NF,
                    subject=np.array([subjects.index(scan.subject) for scan in data.scans], dtype=np.int64),
                    site=np.array([data.site] * len(data), dtype=np.str_),
                    scanner=np.array([scan.scanner for scan in data.scans], dtype=np.str_),
                    sex=np.array([scan.sex or "" for scan in data.scans], dtype=np.str_),
                    diagnosis=np.array([scan.diagnosis or "" for scan in data.scans], dtype=np.str_),
                    split=np.array([split] * len(data), dtype=np.str_),
                    age_years=data.ages().numpy(),
                )
            )
        return Embeddings.concatenate(parts)


@lru_cache(maxsize=64)
def open_holdings(
    site_name: str, source: Source, max_unusable: float, split_seed: int, fractions: tuple[float, float, float]
) -> Holdings:
    """The site's scans, cached and split by subject; read once a process.

    Raises:
        UnusableScansError: more than ``max_unusable`` of the listed scans cannot be used, or none can.
    """
    manifest, store = source.open(site_name)
    check_problem_share(manifest, max_unusable)
    position = {scan.path: index for index, scan in enumerate(manifest.scans)}
    splits = {
        split: SiteData(site_name, part.scans, tuple(position[scan.path] for scan in part.scans), store)
        for split, part in split_by_subject(manifest, split_seed=split_seed, fractions=fractions).items()
    }
    return Holdings(
        splits,
        store,
        manifest.problem_counts(),
        len(manifest.scans),
        manifest.num_subjects,
        len({scan.scanner for scan in manifest.scans}),
    )
