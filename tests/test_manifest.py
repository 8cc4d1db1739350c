"""The manifest's promises: sorted, without contradictions, split by subject, and silent about names."""

from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from core.data.manifest import Manifest, Problem, Scan, check_problem_share, split_by_subject

DIAGNOSES = ("control", "patient", None)


def scan(subject: str = "sub-01", session: str = "", name: str = "a", diagnosis: str | None = "control") -> Scan:
    path = Path(f"{subject}_{session}_{name}.nii")
    return Scan(subject, session, "north", "north", path, 40.0, "F", diagnosis)


def scans_of(subjects: dict[int, tuple[int, str | None]]) -> tuple[Scan, ...]:
    """Scans of {number of subject: (number of scans, diagnosis)}."""
    return tuple(
        scan(f"sub-{number}", f"ses-{session}", diagnosis=diagnosis)
        for number, (num_scans, diagnosis) in subjects.items()
        for session in range(num_scans)
    )


subjects = st.dictionaries(st.integers(0, 999), st.tuples(st.integers(1, 3), st.sampled_from(DIAGNOSES)), min_size=1, max_size=40)


def test_scans_are_sorted_by_subject_session_and_file_name() -> None:
    ordered = [scan("sub-01", "ses-1", "a"), scan("sub-01", "ses-1", "b"), scan("sub-01", "ses-2"), scan("sub-02")]

    manifest = Manifest("north", (ordered[2], ordered[3], ordered[1], ordered[0]))

    assert list(manifest.scans) == ordered
    assert manifest.num_subjects == 2


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (scan(), "must be listed once, got 2 times"),
        (replace(scan(name="b"), sex="M"), "sex must be the same in all scans"),
        (replace(scan(name="b"), diagnosis="patient"), "diagnosis must be the same in all scans"),
        (replace(scan(name="b"), split="train"), "split must be the same in all scans"),
        (replace(scan("sub-02"), site="south"), "site must be 'north', got 'south'"),
    ],
)
def test_contradictions_are_refused(second: Scan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Manifest("north", (scan(), second))


@pytest.mark.parametrize("age_years", [-1.0, 121.0, float("nan"), float("inf")])
def test_a_scan_refuses_an_age_that_no_one_has(age_years: float) -> None:
    with pytest.raises(ValueError, match="age_years must be from 0 to 120"):
        replace(scan(), age_years=age_years)


def test_targets_may_differ_between_the_scans_of_a_subject() -> None:
    scans = (replace(scan(session="ses-1"), targets=(("iq", "90"),)), replace(scan(session="ses-2"), targets=(("iq", ""),)))
    assert [s.targets for s in Manifest("north", scans).scans] == [(("iq", "90"),), (("iq", ""),)]
    assert len(set(scans)) == 2
    assert scan().targets == ()


def test_select_keeps_the_problems_and_healthy_keeps_controls() -> None:
    problems = (Problem("no_age", "sub-01", ""), Problem("bad_age", "sub-02", ""), Problem("no_age", "sub-03", ""))
    scans = (scan("sub-01"), scan("sub-02", diagnosis="patient"), scan("sub-03", diagnosis=None))
    manifest = Manifest("north", scans, problems)

    assert manifest.healthy().scans == (scan("sub-01"),)
    assert manifest.healthy().problem_counts() == {"bad_age": 1, "no_age": 2}


def test_five_percent_unusable_scans_pass_and_more_stop_the_site_without_a_name() -> None:
    def with_unusable(num_unusable: int) -> Manifest:
        scans = scans_of(dict.fromkeys(range(100 - num_unusable), (1, "control")))
        unusable = [Problem("unreadable", f"sub-secret{number}", "broken") for number in range(num_unusable)]
        return Manifest("north", scans, (*unusable, *[Problem("no_age", "sub-1", "")] * 50))

    check_problem_share(with_unusable(5))
    with pytest.raises(ValueError, match=r"at most 5%.*got 6 of 100, unreadable 6.*local log") as raised:
        check_problem_share(with_unusable(6))
    assert "sub-" not in str(raised.value)
    assert "no_age" not in str(raised.value)
    check_problem_share(with_unusable(6), max_share=0.06)


def test_a_site_without_a_scan_is_stopped() -> None:
    with pytest.raises(ValueError, match="leave at least one, got 0 of 0"):
        check_problem_share(Manifest("north", ()))


@given(subjects, st.integers(0, 5))
def test_a_split_parts_the_scans_and_never_a_subject(subjects: dict[int, tuple[int, str | None]], split_seed: int) -> None:
    manifest = Manifest("north", scans_of(subjects))

    splits = split_by_subject(manifest, split_seed=split_seed)

    assert list(splits) == ["train", "val", "test"]
    assert sorted(scan.path for split in splits.values() for scan in split.scans) == sorted(scan.path for scan in manifest.scans)
    assert sum(split.num_subjects for split in splits.values()) == manifest.num_subjects


@given(subjects)
def test_every_diagnosis_keeps_its_share_in_every_split(subjects: dict[int, tuple[int, str | None]]) -> None:
    splits = split_by_subject(Manifest("north", scans_of(subjects)))

    for diagnosis in DIAGNOSES:
        num_subjects = [
            split.select(lambda scan: scan.diagnosis == diagnosis).num_subjects  # noqa: B023
            for split in splits.values()
        ]
        total = sum(num_subjects)
        for count, fraction in zip(num_subjects, (0.6, 0.2, 0.2), strict=True):
            assert abs(count - fraction * total) <= 1.0
            assert count >= 1 or total < 3


@given(subjects, st.randoms(use_true_random=False))
def test_a_split_depends_on_who_the_subjects_are_and_not_on_order_sessions_or_others(
    subjects: dict[int, tuple[int, str | None]], random: object
) -> None:
    rows = list(scans_of(subjects))
    random.shuffle(rows)  # type: ignore[attr-defined]
    other = tuple(row for row in rows if row.diagnosis != "patient" and row.session == "ses-0")

    def controls(scans: tuple[Scan, ...]) -> dict[str, set[str]]:
        splits = split_by_subject(Manifest("north", scans)).items()
        return {name: {scan.subject for scan in split.healthy().scans} for name, split in splits}

    assert split_by_subject(Manifest("north", tuple(rows))) == split_by_subject(Manifest("north", scans_of(subjects)))
    assert controls(tuple(rows)) == controls(other)


def test_a_split_is_the_same_on_every_machine_and_another_seed_or_site_gives_another() -> None:
    scans = scans_of(dict.fromkeys(range(20), (1, "control")))

    def test_subjects(site: str, split_seed: int) -> list[str]:
        manifest = Manifest(site, tuple(replace(scan, site=site) for scan in scans))
        return [scan.subject for scan in split_by_subject(manifest, split_seed=split_seed)["test"].scans]

    # The last four of range(20) by sha256(json.dumps([0, "north", "control", "sub-<number>"])).
    assert test_subjects("north", 0) == ["sub-13", "sub-14", "sub-4", "sub-7"]
    assert test_subjects("north", 1) != test_subjects("north", 0)
    assert test_subjects("south", 0) != test_subjects("north", 0)


def test_one_more_subject_moves_few_others() -> None:
    before = split_by_subject(Manifest("north", scans_of(dict.fromkeys(range(50), (1, "control")))))
    after = split_by_subject(Manifest("north", scans_of(dict.fromkeys(range(51), (1, "control")))))

    moved = sum(
        scan.subject not in {other.subject for other in after[name].scans}
        for name, split in before.items()
        for scan in split.scans
    )
    assert moved <= 2


@pytest.mark.parametrize("fractions", [(0.6, 0.2, 0.3), (1.2, -0.1, -0.1)])
def test_fractions_that_are_no_shares_are_refused(fractions: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="fractions must be at least 0 and sum to 1"):
        split_by_subject(Manifest("north", (scan(),)), fractions=fractions)


def test_a_fraction_of_zero_gives_an_empty_split() -> None:
    scans = scans_of(dict.fromkeys(range(10), (1, "control")))

    splits = split_by_subject(Manifest("north", scans), fractions=(0.8, 0.0, 0.2))

    assert [len(split.scans) for split in splits.values()] == [8, 0, 2]


def test_a_split_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match=r"split must be one of .* or None, got 'later'"):
        replace(scan(), split="later")


def with_splits(**numbers: tuple[str | None, int]) -> Manifest:
    """Subjects of each (split, number), two scans each."""
    return Manifest(
        "north",
        tuple(
            replace(row, split=split)
            for letter, (split, number) in numbers.items()
            for row in scans_of({ord(letter) * 1000 + i: (2, DIAGNOSES[i % 2]) for i in range(number)})
        ),
    )


def told(splits: dict[str, Manifest]) -> dict[str, dict[str | None, int]]:
    counts = {name: Counter(row.split for row in part.scans) for name, part in splits.items()}
    return {name: {split: number // 2 for split, number in found.items()} for name, found in counts.items()}


def test_subjects_go_where_their_split_tells() -> None:
    splits = split_by_subject(with_splits(a=("train", 20), b=("val", 4), c=("test", 6), d=(None, 10)))
    assert told(splits) == {"train": {None: 6, "train": 20}, "val": {None: 2, "val": 4}, "test": {None: 2, "test": 6}}


def test_training_subjects_are_cut_where_none_is_told_val() -> None:
    manifest = with_splits(a=("train", 16), c=("test", 6))
    assert told(split_by_subject(manifest)) == {"train": {"train": 12}, "val": {"train": 4}, "test": {"test": 6}}
    whole = split_by_subject(manifest, fractions=(0.6, 0.0, 0.4))
    assert told(whole) == {"train": {"train": 16}, "val": {}, "test": {"test": 6}}
    none = split_by_subject(manifest, fractions=(0.0, 0.0, 1.0))
    assert told(none) == {"train": {"train": 16}, "val": {}, "test": {"test": 6}}


def test_subjects_without_a_split_are_cut_as_if_the_others_were_not_there() -> None:
    free = with_splits(d=(None, 30))
    both = Manifest("north", free.scans + with_splits(a=("train", 20), c=("test", 5)).scans)
    for name, part in split_by_subject(both).items():
        assert part.select(lambda row: row.split is None) == split_by_subject(free)[name]
