"""Which scans make a batch."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from core.data.manifest import Scan


@dataclass(frozen=True, kw_only=True)
class SamplingPolicy:
    """How batches are drawn; whatever it says, two scans of one subject are never two of a batch, negatives of each other.

    Attributes:
        multi_instance: the two views come from two scans of a subject where there are two (MICLe, Azizi et al., ICCV 2021).
        balance_scanners: where a site has several scanners, each fills the same share of a batch.
    """

    multi_instance: bool = False
    balance_scanners: bool = False


@dataclass(frozen=True)
class DrawnBatch:
    """Indices of the scans that the first and the second view show, one entry a subject."""

    first: list[int]
    second: list[int]

    def __len__(self) -> int:
        return len(self.first)


def subject_batches(
    scans: Sequence[Scan], *, batch_size: int, num_batches: int, policy: SamplingPolicy, generator: torch.Generator
) -> Iterator[DrawnBatch]:
    """Batches of ``batch_size`` subjects each; every subject is used before any comes again.

    A site with fewer subjects uses all of them in every batch. With ``balance_scanners`` the turns are kept scanner by
    scanner: a subject of a scanner with few comes again before all those of the others have come.
    """
    scans_of: dict[str, list[int]] = {}
    for index, scan in enumerate(scans):
        scans_of.setdefault(scan.subject, []).append(index)
    subjects = sorted(scans_of)
    turns = {"": _Turns(subjects, generator)}
    if policy.balance_scanners:
        scanners = sorted({scan.scanner for scan in scans})
        turns = {
            scanner: _Turns([s for s in subjects if any(scans[i].scanner == scanner for i in scans_of[s])], generator)
            for scanner in scanners
        }
    size = min(batch_size, len(subjects))
    for _ in range(num_batches):
        picked: dict[str, str] = {}
        while len(picked) < size:
            for scanner, turn in turns.items():
                subject = turn.next(picked) if len(picked) < size else None
                if subject is not None:
                    picked[subject] = scanner
        first = []
        for (subject, scanner), pick in zip(picked.items(), torch.rand(size, generator=generator).tolist(), strict=True):
            own = [i for i in scans_of[subject] if scanner in ("", scans[i].scanner)]
            first.append(own[int(pick * len(own))])
        second = first
        if policy.multi_instance:
            second = []
            for index, pick in zip(first, torch.rand(size, generator=generator).tolist(), strict=True):
                others = [i for i in scans_of[scans[index].subject] if i != index] or [index]
                second.append(others[int(pick * len(others))])
        yield DrawnBatch(first, second)


class _Turns:
    """Subjects in random order, again and again; none comes twice before all came once."""

    def __init__(self, subjects: Sequence[str], generator: torch.Generator) -> None:
        self.subjects = subjects
        self.generator = generator
        self.waiting: list[str] = []

    def next(self, taken: dict[str, str]) -> str | None:
        """Whose turn it is among those not taken; None when all are."""
        if all(subject in taken for subject in self.waiting):
            # Who is in this batch already comes last in the next turn.
            fresh = [self.subjects[i] for i in torch.randperm(len(self.subjects), generator=self.generator).tolist()]
            self.waiting += sorted(fresh, key=taken.__contains__)
        for position, subject in enumerate(self.waiting):
            if subject not in taken:
                return self.waiting.pop(position)
        return None
