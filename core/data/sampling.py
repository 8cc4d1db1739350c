"""Which scans make a batch."""

from collections.abc import Iterator, Sequence

import torch


def subject_batches(
    subjects: Sequence[str], *, batch_size: int, num_batches: int, generator: torch.Generator
) -> Iterator[list[int]]:
    """Indices of scans, one scan of each of ``batch_size`` subjects a batch; every subject is used before any comes again.

    Two scans of one subject are never in one batch, where they would be negatives of each other. A site with fewer subjects
    uses all of them in every batch.
    """
    scans_of: dict[str, list[int]] = {}
    for index, subject in enumerate(subjects):
        scans_of.setdefault(subject, []).append(index)
    names = sorted(scans_of)
    size = min(batch_size, len(names))
    waiting: list[int] = []
    for _ in range(num_batches):
        if len(waiting) < size:
            fresh = torch.randperm(len(names), generator=generator).tolist()
            # Who is still waiting goes first now and last in the next turn, so that no batch holds a subject twice.
            waiting = waiting + sorted(fresh, key=waiting.__contains__)
        batch, waiting = waiting[:size], waiting[size:]
        picks = torch.rand(size, generator=generator).tolist()
        scans = [scans_of[names[name]] for name in batch]
        yield [own[int(pick * len(own))] for own, pick in zip(scans, picks, strict=True)]
