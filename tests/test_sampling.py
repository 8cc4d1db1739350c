"""Batches: whose scans they hold, and which scans the two views show."""

from collections import Counter
from pathlib import Path

import pytest
import torch

from core.data.manifest import Scan
from core.data.sampling import DrawnBatch, SamplingPolicy, subject_batches


def scan(subject: str, number: int, scanner: str = "x") -> Scan:
    return Scan(subject, f"ses-{number}", "north", scanner, Path(f"{subject}-{number}.nii.gz"), 40.0, "F", "control")


def batches(scans: list[Scan], size: int, number: int, **policy: bool) -> list[DrawnBatch]:
    generator = torch.Generator().manual_seed(0)
    return list(subject_batches(scans, batch_size=size, num_batches=number, policy=SamplingPolicy(**policy), generator=generator))


def subjects(scans: list[Scan], indices: list[int]) -> list[str]:
    return [scans[i].subject for i in indices]


@pytest.mark.parametrize("multi_instance", [False, True])
@pytest.mark.parametrize("balance_scanners", [False, True])
def test_two_scans_of_a_subject_are_never_negatives_of_each_other(multi_instance: bool, balance_scanners: bool) -> None:
    scans = [scan(f"s{i // 3:02d}", i % 3, "xy"[i % 2]) for i in range(30)]
    for batch in batches(scans, 6, 12, multi_instance=multi_instance, balance_scanners=balance_scanners):
        assert len(set(subjects(scans, batch.first))) == len(batch) == 6
        assert subjects(scans, batch.first) == subjects(scans, batch.second)


def test_every_subject_is_used_before_any_comes_again() -> None:
    scans = [scan(f"s{i // 2}", i % 2) for i in range(20)]  # ten subjects, two scans each
    drawn = batches(scans, 4, 5)
    assert all(batch.first == batch.second for batch in drawn)
    seen = [subject for batch in drawn for subject in subjects(scans, batch.first)]
    assert len(set(seen[:10])) == 10
    assert len(set(seen[10:20])) == 10
    assert {i % 2 for batch in drawn for i in batch.first} == {0, 1}


def test_a_small_site_uses_all_its_subjects() -> None:
    scans = [scan("a", 0), scan("b", 0), scan("b", 1)]
    assert [sorted(subjects(scans, batch.first)) for batch in batches(scans, 8, 2)] == [["a", "b"]] * 2


def test_multi_instance_views_show_two_scans_where_there_are_two() -> None:
    scans = [scan("one", 0), scan("two", 0), scan("two", 1), scan("three", 0), scan("three", 1), scan("three", 2)]
    pairs = [
        (scans[i], scans[j])
        for batch in batches(scans, 3, 200, multi_instance=True)
        for i, j in zip(batch.first, batch.second, strict=True)
    ]
    assert all((first == second) == (first.subject == "one") for first, second in pairs)
    # Every ordered pair of different scans comes, each about as often: 200 / 2 and 200 / 6.
    counts = Counter((first.path.name, second.path.name) for first, second in pairs if first.subject == "three")
    assert len(counts) == 6
    assert min(counts.values()) > 15
    assert len({(f.session, s.session) for f, s in pairs if f.subject == "two"}) == 2


def test_scanners_fill_equal_shares_of_a_batch() -> None:
    scans = [scan(f"x{i:02d}", 0, "x") for i in range(20)] + [scan(f"y{i}", 0, "y") for i in range(5)]
    drawn = batches(scans, 8, 10, balance_scanners=True)
    assert all(Counter(scans[i].scanner for i in batch.first) == {"x": 4, "y": 4} for batch in drawn)
    # Among the scanner's own subjects, none comes again before all have come.
    of_x = [i for batch in drawn for i in batch.first if scans[i].scanner == "x"]
    assert len(set(of_x[:20])) == 20
    unbalanced = [Counter(scans[i].scanner for i in batch.first)["y"] for batch in batches(scans, 8, 10)]
    assert sum(unbalanced) < 25


def test_a_scanner_with_fewer_subjects_than_its_share_gives_all_it_has() -> None:
    scans = [scan(f"x{i:02d}", 0, "x") for i in range(20)] + [scan(f"y{i}", 0, "y") for i in range(2)]
    for batch in batches(scans, 8, 5, balance_scanners=True):
        assert Counter(scans[i].scanner for i in batch.first) == {"x": 6, "y": 2}


def test_a_subject_of_two_scanners_shows_the_one_it_was_drawn_for() -> None:
    scans = [scan(f"s{i}", number, scanner) for i in range(6) for number, scanner in enumerate("xy")]
    for batch in batches(scans, 6, 10, balance_scanners=True):
        assert Counter(scans[i].scanner for i in batch.first) == {"x": 3, "y": 3}
        assert len(set(subjects(scans, batch.first))) == 6
    for batch in batches(scans, 6, 10, balance_scanners=True, multi_instance=True):
        assert all(scans[i].scanner != scans[j].scanner for i, j in zip(batch.first, batch.second, strict=True))


def test_the_same_generator_gives_the_same_batches() -> None:
    scans = [scan(f"s{i // 2}", i % 2, "xy"[i % 2]) for i in range(20)]
    for policy in ({}, {"multi_instance": True}, {"balance_scanners": True}):
        assert batches(scans, 4, 6, **policy) == batches(scans, 4, 6, **policy)
