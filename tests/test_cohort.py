"""The phantom consortium: its files are what its truth says, and each scanner knob does one thing."""

import csv
import gzip
import json
from dataclasses import replace
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest

from simulations import cohort
from simulations.cohort import (
    CONSORTIUM,
    Anatomy,
    Lesion,
    Pose,
    Scanner,
    Site,
    acquire,
    age_by,
    degrade,
    draw_anatomy,
    ensure_cohort,
    render,
    to_nifti,
    write_cohort,
)

TINY = 0.01
SCANNERS = [scanner for site in CONSORTIUM for scanner in site.scanners]


def subject(age_years: float = 50.0, seed: int = 0, patient: bool = False) -> Anatomy:
    return draw_anatomy(np.random.default_rng(seed), age_years, "F", patient)


def read_table(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def contents(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("tiny") / "cohort"
    write_cohort(root, scale=TINY)
    return root


@pytest.fixture
def clinic(monkeypatch: pytest.MonkeyPatch) -> None:
    """A consortium of one small site, for tests that write more than once."""
    site = Site(
        name="clinic",
        scanners=(Scanner(name="a", noise_sd=0.05), Scanner(name="b", noise_sd=0.02)),
        num_healthy=4,
        age_range_years=(20, 80),
    )
    monkeypatch.setattr(cohort, "CONSORTIUM", (site,))


def test_consortium_has_the_sites_of_the_design():
    sizes = {site.name: (site.num_healthy, site.num_patients, len(site.scanners)) for site in CONSORTIUM}
    assert sizes == {
        "north": (110, 0, 1),
        "east": (90, 0, 1),
        "south": (110, 0, 2),
        "west": (80, 0, 1),
        "harbor": (60, 60, 1),
        "hill": (50, 50, 1),
    }
    assert len({scanner.name for scanner in SCANNERS}) == len(SCANNERS)
    by_site = {site.name: site.scanners for site in CONSORTIUM}
    assert replace(by_site["harbor"][0], name="north-1") == by_site["north"][0]
    assert {scanner.scl_slope is None for scanner in SCANNERS} == {True, False}


def test_layout_is_bids_and_matches_the_truth(tiny: Path):
    truth = read_table(tiny / "truth.tsv")
    assert {row["site"] for row in truth} == {site.name for site in CONSORTIUM}
    for site in CONSORTIUM:
        description = json.loads((tiny / site.name / "dataset_description.json").read_text())
        assert {"Name", "BIDSVersion"} <= description.keys()
        first = [row for row in truth if row["site"] == site.name and row["session"] == "ses-01"]
        participants = read_table(tiny / site.name / "participants.tsv")
        assert list(participants[0]) == ["participant_id", "age", "sex", "diagnosis", "scanner"]
        assert participants == [{key: row[key] for key in participants[0]} for row in first]
        diagnoses = [row["diagnosis"] for row in participants]
        assert diagnoses.count("control") == 4
        assert diagnoses.count("patient") == (4 if site.num_patients else 0)
        assert {row["scanner"] for row in participants} == {scanner.name for scanner in site.scanners}
        assert {row["sex"] for row in participants} <= {"F", "M"}
        low, high = site.age_range_years
        assert all(low <= float(row["age"]) <= high for row in participants)


def test_every_row_of_the_truth_has_its_scan_and_no_scan_is_without_one(tiny: Path):
    expected = {
        Path(row["site"], row["participant_id"], row["session"], "anat") / f"{row['participant_id']}_{row['session']}_T1w.nii.gz"
        for row in read_table(tiny / "truth.tsv")
    }
    assert {path.relative_to(tiny) for path in tiny.rglob("*.nii.gz")} == expected
    description = json.loads((tiny / "cohort.json").read_text())
    assert description["num_scans"] == len(expected)
    assert description["num_files"] == len(contents(tiny))


def test_only_patients_have_a_lesion_and_atrophy(tiny: Path):
    for row in read_table(tiny / "truth.tsv"):
        assert (float(row["lesion_volume_ml"]) > 0) == (row["diagnosis"] == "patient")
        assert (10 <= float(row["atrophy_years"]) <= 30) == (row["diagnosis"] == "patient")


def test_the_tissue_of_a_patient_is_that_of_the_same_subject_grown_older():
    healthy, ill = subject(patient=False), subject(patient=True)
    older = age_by(healthy, ill.atrophy_years)
    assert ill == replace(older, age_years=50.0, lesion=ill.lesion, atrophy_years=ill.atrophy_years)
    assert ill.ventricle_volume_ml > 1.2 * healthy.ventricle_volume_ml
    assert ill.cortical_thickness_mm < healthy.cortical_thickness_mm


def test_scans_are_stored_as_their_scanner_stores(tiny: Path):
    scanners = {scanner.name: scanner for scanner in SCANNERS}
    for row in read_table(tiny / "truth.tsv"):
        folder = tiny / row["site"] / row["participant_id"] / row["session"] / "anat"
        image = nib.load(folder / f"{row['participant_id']}_{row['session']}_T1w.nii.gz")
        scanner = scanners[row["scanner"]]
        assert "".join(nib.aff2axcodes(image.affine)) == scanner.orientation
        canonical = nib.as_closest_canonical(image)
        np.testing.assert_allclose(canonical.header.get_zooms(), scanner.voxel_size_mm, rtol=1e-6)
        np.testing.assert_allclose(image.get_qform(), image.get_sform(), atol=1e-5)
        assert image.get_data_dtype() == np.int16
        assert (image.dataobj.slope, image.dataobj.inter) == (scanner.scl_slope or 1.0, 0.0)
        assert 70_000 < np.prod(image.shape) < 150_000


def test_second_session_is_the_same_subject_about_a_year_later(tiny: Path):
    truth = read_table(tiny / "truth.tsv")
    first = {(row["site"], row["participant_id"]): row for row in truth if row["session"] == "ses-01"}
    second = [row for row in truth if row["session"] == "ses-02"]
    assert len(second) == 8, "one in each of the eight groups"
    for row in second:
        before = first[row["site"], row["participant_id"]]
        assert 0.5 < float(row["age"]) - float(before["age"]) < 2
        assert {key: row[key] for key in ("sex", "scanner", "lesion_volume_ml")} == {
            key: before[key] for key in ("sex", "scanner", "lesion_volume_ml")
        }
        assert float(row["ventricle_volume_ml"]) > float(before["ventricle_volume_ml"])
        folder = tiny / row["site"] / row["participant_id"]
        sessions = read_table(folder / f"{row['participant_id']}_sessions.tsv")
        assert [(r["session_id"], r["age"]) for r in sessions] == [("ses-01", before["age"]), ("ses-02", row["age"])]
        scans = [next((folder / session / "anat").iterdir()).read_bytes() for session in ("ses-01", "ses-02")]
        assert scans[0] != scans[1]


def test_share_of_second_sessions():
    subjects = [s for site in CONSORTIUM for s in cohort._subjects(site, 1.0)]
    assert sum(s.num_sessions == 2 for s in subjects) / len(subjects) == pytest.approx(0.15, abs=0.01)


@pytest.mark.usefixtures("clinic")
def test_same_seed_gives_the_same_bytes_with_any_number_of_workers(tmp_path: Path):
    for name, num_workers in (("one", 1), ("again", 1), ("three", 3)):
        write_cohort(tmp_path / name, num_workers=num_workers)
    assert contents(tmp_path / "one") == contents(tmp_path / "again") == contents(tmp_path / "three")


@pytest.mark.usefixtures("clinic")
def test_another_seed_gives_other_subjects(tmp_path: Path):
    write_cohort(tmp_path / "a", seed=0)
    write_cohort(tmp_path / "b", seed=1)
    a, b = contents(tmp_path / "a"), contents(tmp_path / "b")
    scans = [name for name in a if name.endswith(".nii.gz")]
    assert a.keys() == b.keys()
    assert all(a[name] != b[name] for name in scans)
    assert gzip.decompress(a[scans[0]])[344:348] == b"n+1\0"


@pytest.mark.usefixtures("clinic")
def test_a_larger_scale_keeps_the_subjects_of_a_smaller(tmp_path: Path):
    write_cohort(tmp_path / "small")
    write_cohort(tmp_path / "large", scale=1.5)
    small, large = contents(tmp_path / "small"), contents(tmp_path / "large")
    scans = {name for name in small if name.endswith(".nii.gz")}
    assert len(read_table(tmp_path / "large" / "clinic" / "participants.tsv")) == 6
    assert all(large[name] == small[name] for name in scans)


@pytest.mark.usefixtures("clinic")
def test_progress_counts_every_scan(tmp_path: Path):
    calls: list[tuple[int, int]] = []
    write_cohort(tmp_path / "cohort", progress=lambda done, total: calls.append((done, total)), num_workers=2)
    assert calls == [(2, 5), (3, 5), (4, 5), (5, 5)]


@pytest.mark.usefixtures("clinic")
def test_interrupted_write_leaves_nothing(tmp_path: Path):
    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path / "cohort", progress=interrupt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("clinic")
def test_interrupted_rewrite_keeps_the_old_cohort(tmp_path: Path):
    def interrupt(*_: int) -> None:
        raise KeyboardInterrupt

    write_cohort(tmp_path / "cohort")
    before = contents(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        write_cohort(tmp_path / "cohort", seed=1, progress=interrupt)
    assert contents(tmp_path) == before


@pytest.mark.usefixtures("clinic")
def test_ensure_writes_once_and_again_when_asked_for_another(tmp_path: Path):
    root = tmp_path / "new" / "cohort"
    assert ensure_cohort(root)
    before = contents(root)
    assert not ensure_cohort(root)
    assert contents(root) == before
    assert ensure_cohort(root, seed=1)
    assert json.loads((root / "cohort.json").read_text())["seed"] == 1
    assert contents(root).keys() == before.keys()
    assert list(root.parent.iterdir()) == [root]


@pytest.mark.usefixtures("clinic")
def test_empty_folder_is_filled(tmp_path: Path):
    assert ensure_cohort(tmp_path)
    assert (tmp_path / "cohort.json").is_file()


@pytest.mark.usefixtures("clinic")
@pytest.mark.parametrize("write", [write_cohort, ensure_cohort])
def test_foreign_folder_is_refused_untouched(write, tmp_path: Path):
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match=r"must be missing, empty or an unchanged cohort.* Name another folder\.$"):
        write(tmp_path)
    assert contents(tmp_path) == {"thesis.txt": b"years of work"}


@pytest.mark.usefixtures("clinic")
def test_cohort_with_added_files_is_refused_untouched(tmp_path: Path):
    write_cohort(tmp_path / "cohort")
    (tmp_path / "cohort" / "clinic" / "notes.txt").write_text("added later")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match="must be missing, empty or an unchanged cohort"):
        ensure_cohort(tmp_path / "cohort", seed=1)
    assert contents(tmp_path) == before


def test_a_file_in_the_way_is_refused(tmp_path: Path):
    (tmp_path / "cohort").write_text("a file")
    with pytest.raises(ValueError, match="holds something else"):
        write_cohort(tmp_path / "cohort")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": 0.0}, "scale must be positive, got 0.0"),
        ({"scale": float("nan")}, "scale must be positive, got nan"),
        ({"num_workers": 0}, "num_workers must be 1 or more, got 0"),
    ],
)
def test_bad_arguments_are_refused_before_writing(arguments, message: str, tmp_path: Path):
    with pytest.raises(ValueError, match=message):
        write_cohort(tmp_path / "cohort", **arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "knob",
    [
        {"contrast_gamma": 0.0},
        {"gain": -1.0},
        {"bias_field_strength": -0.1},
        {"noise_sd": float("nan")},
        {"blur_fwhm_mm": -1.0},
        {"voxel_size_mm": (4.0, 0.0, 4.0)},
        {"orientation": "RLS"},
        {"orientation": "RA"},
        {"scl_slope": 0.0},
    ],
)
def test_impossible_scanners_are_refused(knob):
    with pytest.raises(ValueError, match=rf"scanner 'x': {next(iter(knob))} must .*, got "):
        Scanner(name="x", **knob)


def test_ventricles_grow_and_cortex_thins_with_age():
    rng = np.random.default_rng(0)
    people = [draw_anatomy(rng, age, "F", False) for age in rng.uniform(18, 85, 300)]
    ages = [person.age_years for person in people]
    assert 0.8 < np.corrcoef(ages, np.log([person.ventricle_volume_ml for person in people]))[0, 1] < 0.97
    assert -0.97 < np.corrcoef(ages, [person.cortical_thickness_mm for person in people])[0, 1] < -0.8


def test_ageing_keeps_what_is_the_subjects_own():
    young = subject(30.0, patient=True)
    old = age_by(young, 40.0)
    assert old.age_years == 70.0
    assert old.ventricle_volume_ml > young.ventricle_volume_ml
    assert old.cortical_thickness_mm < young.cortical_thickness_mm
    ageing = ("age_years", "ventricle_volume_ml", "cortical_thickness_mm", "sulcal_width_mm")
    assert replace(old, **{name: getattr(young, name) for name in ageing}) == young


def test_sex_scales_the_head_with_overlap():
    rng = np.random.default_rng(0)
    scale = {sex: np.array([draw_anatomy(rng, 50, sex, False).head_scale for _ in range(500)]) for sex in ("F", "M")}
    balanced_accuracy = ((scale["M"] > 1).mean() + (scale["F"] <= 1).mean()) / 2
    assert 0.8 < balanced_accuracy < 0.92


def test_volume_looks_like_a_head():
    volume = render(subject())
    assert volume.dtype == np.float32
    assert volume.shape == (46, 54, 44)
    assert volume.min() == 0
    assert volume.max() <= 1.1
    edge = [volume[0], volume[-1], volume[:, 0], volume[:, -1], volume[:, :, -1]]
    assert max(float(face.max()) for face in edge) < 0.05, "the head lies within the field of view, neck excepted"
    white_ml = 0.064 * np.count_nonzero(volume > 0.93)
    assert 250 < white_ml < 600


@pytest.mark.parametrize("voxel_mm", [3.0, 4.0])
def test_rendered_ventricles_grow_by_what_the_truth_says(voxel_mm: float):
    small = replace(subject(), ventricle_volume_ml=12.0)
    size = (voxel_mm, voxel_mm, voxel_mm)
    before, after = render(small, size), render(replace(small, ventricle_volume_ml=36.0), size)
    # Around the ventricles lies white matter, 1, with some deep grey matter, 0.74 to 0.84: on average about 0.95.
    grown_ml = voxel_mm**3 / 1000 * (before - after).sum() / (0.95 - cohort.CSF)
    assert grown_ml == pytest.approx(24.0, rel=0.06)


def test_rendered_grey_matter_shrinks_with_cortical_thickness():
    anatomy = subject()
    white = [
        np.count_nonzero(render(replace(anatomy, cortical_thickness_mm=thickness)) > 0.85) for thickness in (2.2, 2.7, 3.2, 3.7)
    ]
    assert white == sorted(white, reverse=True)
    assert white[0] > 1.1 * white[-1]


def test_age_shows_in_the_image():
    rng = np.random.default_rng(5)
    people = [draw_anatomy(rng, age, "F", False) for age in np.linspace(20, 84, 24)]
    # Fluid and grey matter in a box around the lateral ventricles.
    darkness = [float((render(person)[17:29, 15:37, 20:30] < 0.6).mean()) for person in people]
    assert np.corrcoef([person.age_years for person in people], darkness)[0, 1] > 0.8


@pytest.mark.parametrize("side", [-1, 1])
def test_lesion_darkens_its_own_temporal_lobe_and_nothing_else(side: int):
    lesion_mm = np.array((27.0 * side, -14.0, -16.0))
    healthy = subject()
    patient = replace(healthy, lesion=Lesion(centre_mm=tuple(lesion_mm), volume_ml=8.0))
    darkening = render(healthy) - render(patient)
    axes = [(np.arange(n) - (n - 1) / 2) * 4.0 for n in darkening.shape]
    where_mm = np.array([(darkening * axis).sum() for axis in np.meshgrid(*axes, indexing="ij")]) / darkening.sum()
    assert np.linalg.norm(where_mm - lesion_mm * healthy.head_scale * healthy.aspect) < 8
    assert darkening.max() > 0.2
    other_side = darkening[:22] if side > 0 else darkening[24:]
    assert np.abs(other_side).max() < 1e-3


def test_pose_moves_the_head():
    anatomy = subject()
    still, moved = render(anatomy), render(anatomy, pose=Pose(translation_mm=(4.0, -8.0, 0.0)))
    np.testing.assert_allclose(moved[1:, :-2], still[:-1, 2:], atol=1e-5)
    turned = render(anatomy, pose=Pose(rotation_deg=(0.0, 0.0, 180.0)))
    np.testing.assert_allclose(turned, still[::-1, ::-1], atol=2e-4)


def test_voxel_size_does_not_change_the_anatomy():
    coarse, fine = render(subject(), (4.0, 4.0, 4.0)), render(subject(), (2.0, 2.0, 2.0))
    pooled = fine.reshape(46, 2, 54, 2, 44, 2).mean(axis=(1, 3, 5))
    assert np.corrcoef(coarse.ravel(), pooled.ravel())[0, 1] > 0.98
    assert coarse.mean() == pytest.approx(pooled.mean(), rel=0.01)


def test_neutral_scanner_changes_no_bit():
    volume = render(subject())
    np.testing.assert_array_equal(degrade(volume, Scanner(name="neutral"), np.random.default_rng(0)), volume)


@pytest.mark.parametrize(
    "knob",
    [
        {"contrast_gamma": 1.2},
        {"gain": 1.5},
        {"bias_field_strength": 0.2},
        {"noise_sd": 0.05},
        {"blur_fwhm_mm": 4.0},
    ],
    ids=lambda knob: next(iter(knob)),
)
def test_each_knob_alone_changes_the_volume(knob):
    volume = render(subject())
    changed = degrade(volume, Scanner(name="one knob", **knob), np.random.default_rng(0))
    assert changed.dtype == np.float32
    assert changed.shape == volume.shape
    assert np.abs(changed - volume).max() > 0.05
    assert np.corrcoef(changed.ravel(), volume.ravel())[0, 1] > 0.9


def test_contrast_keeps_white_matter_and_gain_scales_it():
    tissue = np.array([[[0.0, 0.25, 0.5, 1.0]]], np.float32)
    rng = np.random.default_rng(0)
    np.testing.assert_allclose(
        degrade(tissue, Scanner(name="x", contrast_gamma=2.0), rng), [[[0.0, 0.0625, 0.25, 1.0]]], rtol=1e-6
    )
    np.testing.assert_allclose(degrade(tissue, Scanner(name="x", gain=3.0), rng), 3 * tissue, rtol=1e-6)


def test_noise_is_rician():
    # Without signal the magnitude is Rayleigh: mean sd * sqrt(pi / 2), mean square 2 sd^2; with it, variance sd^2.
    rng = np.random.default_rng(0)
    background = cohort.rician_noise(np.zeros((60, 60, 60), np.float32), 0.1, rng)
    assert background.mean() == pytest.approx(0.1 * np.sqrt(np.pi / 2), rel=0.01)
    assert np.square(background).mean() == pytest.approx(0.02, rel=0.01)
    assert cohort.rician_noise(np.ones((60, 60, 60), np.float32), 0.1, rng).std() == pytest.approx(0.1, rel=0.02)


def test_blur_has_the_stated_width_in_mm():
    # Second moment of a Gaussian: sd = FWHM / sqrt(8 ln 2), the same in mm along voxels of 2 and of 4 mm.
    point = np.zeros((41, 41, 41), np.float32)
    point[20, 20, 20] = 1
    spread = cohort.blur(point, 12.0, (2.0, 4.0, 4.0))
    offset = np.arange(41) - 20
    for axis, size in ((0, 2.0), (1, 4.0)):
        profile = spread.sum(axis=tuple({0, 1, 2} - {axis}))
        sd_mm = size * np.sqrt((profile * offset**2).sum() / profile.sum())
        assert sd_mm == pytest.approx(12.0 / np.sqrt(8 * np.log(2)), rel=0.05)


def test_bias_field_belongs_to_the_coil():
    def log_field(coil: int, seed: int) -> np.ndarray:
        field = cohort.bias_field((20, 22, 18), (8.0, 8.0, 8.0), 0.3, coil, np.random.default_rng(seed))
        assert np.log(field).std() == pytest.approx(0.3, rel=1e-3)
        return np.log(field).ravel()

    same = np.corrcoef([log_field(3, seed) for seed in range(4)])
    assert same.min() > 0.7
    assert not np.array_equal(log_field(3, 0), log_field(3, 1))
    assert abs(np.corrcoef(log_field(3, 0), log_field(5, 0))[0, 1]) < 0.5


@pytest.mark.parametrize("orientation", ["RAS", "LAS", "PSR", "LPS", "ASL", "IRP"])
def test_reorienting_gives_the_same_anatomy_at_the_same_place(orientation: str):
    size = (3.6, 4.0, 4.4)
    volume = render(subject(), size)
    scanner = Scanner(name="x", voxel_size_mm=size, orientation=orientation)
    image = nib.Nifti1Image.from_bytes(to_nifti(volume, scanner))
    assert "".join(nib.aff2axcodes(image.affine)) == orientation
    canonical = nib.as_closest_canonical(image)
    np.testing.assert_allclose(canonical.get_fdata() / cohort.WHITE_MATTER_STORED, volume, atol=0.5 / 500 + 1e-6)
    # The centre of the grid is the origin of the world.
    centre = canonical.affine @ [*((np.array(volume.shape) - 1) / 2), 1]
    np.testing.assert_allclose(centre, [0, 0, 0, 1], atol=1e-4)
    np.testing.assert_allclose(np.diag(canonical.affine), [*size, 1], rtol=1e-6)


def test_intensity_scale_changes_storage_not_intensity():
    volume = render(subject())
    plain, scaled = (nib.Nifti1Image.from_bytes(to_nifti(volume, Scanner(name="x", scl_slope=slope))) for slope in (None, 0.5))
    np.testing.assert_allclose(plain.get_fdata(), scaled.get_fdata(), atol=0.75)
    assert scaled.dataobj.get_unscaled().max() > 1.9 * plain.dataobj.get_unscaled().max()


@pytest.mark.parametrize("scanner", SCANNERS, ids=lambda scanner: scanner.name)
def test_every_scanner_sees_the_anatomy(scanner: Scanner):
    anatomy = subject()
    image = nib.as_closest_canonical(nib.Nifti1Image.from_bytes(acquire(anatomy, scanner, np.random.default_rng(0))))
    data = image.get_fdata()
    assert data.max() < np.iinfo(np.int16).max
    truth = render(anatomy, scanner.voxel_size_mm)
    assert truth.shape == data.shape
    assert 0.75 < np.corrcoef(truth.ravel(), data.ravel())[0, 1] < 0.995
