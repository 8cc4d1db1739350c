"""Any folder of images beside a table. Images are empty files: the reader opens none."""

import json
import logging
import re
from pathlib import Path

import pytest

from core.data.files import detect_layout, layout_and_reason, list_file_sites, read_files
from core.data.labels import Columns
from core.data.manifest import Manifest, check_problem_share

SHARED = Path(__file__).parents[2] / "shared" / "data"
PATTERN = "raw/patient{subject}/study{session}_T1W.nii.gz"


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def told(manifest: Manifest) -> list[tuple[str, str, float | None]]:
    return [(scan.subject, scan.session, scan.age_years) for scan in manifest.scans]


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    root = tmp_path / "ms study"
    for name in ("01/study1", "01/study2", "12/study1", "3/study1"):
        write(root / f"raw/patient{name}_T1W.nii.gz")
    write(root / "people.csv", "patient_id,sex,patient_age_at_first_study\n1,F,20\n12,M,30\n7,M,50\n")
    return root


@pytest.mark.parametrize("pattern", [None, PATTERN])
def test_ids_are_numbers_in_the_path(patients: Path, pattern: str | None) -> None:
    assert list_file_sites(patients) == ("ms-study",)
    manifest = read_files(patients, "ms-study", pattern=pattern)
    assert told(manifest) == [("sub-1", "ses-1", 20.0), ("sub-1", "ses-2", 20.0), ("sub-12", "ses-1", 30.0)]
    assert manifest.problem_counts() == {"age_of_first_visit": 1, "no_image": 1, "no_row": 1}
    assert {scan.scanner for scan in manifest.scans} == {"ms-study"}


@pytest.mark.parametrize(
    ("pattern", "says"),
    [
        ("raw/{session}.nii", r"it must have \{subject\}, may have \{session\}, \{site\} and \*, got"),
        ("{subject}/{scan}.nii", "it must have"),
        ("raw/{subject}.nii", "which matches none of 4. One image is 'raw/patient01/study1_T1W.nii.gz'"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_one_sentence(patients: Path, pattern: str, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        list_file_sites(patients, pattern=pattern)


def test_a_pattern_chooses_and_tells_sites(tmp_path: Path) -> None:
    for name in ("north/a_1/a_T1.nii", "north/a_2/a_T1.nii", "south/b_1/b_T1.nii", "south/b_1/c_T1.nii", "south/b_1/b_seg.nii"):
        write(tmp_path / name)
    pattern = "{site}/{subject}_{session}/{subject}_T*.nii"
    assert list_file_sites(tmp_path, pattern=pattern) == ("north", "south")
    assert told(read_files(tmp_path, "north", pattern=pattern)) == [("sub-a", "ses-1", None), ("sub-a", "ses-2", None)]
    assert told(read_files(tmp_path, "south", pattern=pattern)) == [("sub-b", "ses-1", None)]
    assert [s.path.name for s in read_files(tmp_path, "x", pattern="**/{subject}_seg.nii").scans] == ["b_seg.nii"]
    with pytest.raises(ValueError, match="site: it must be one of north, south, got 'west'"):
        read_files(tmp_path, "west", pattern=pattern)


@pytest.mark.parametrize(
    ("ids", "path", "subject"),
    [
        (["1", "12"], "12/T1.nii.gz", "12"),
        (["1", "12"], "study1/P012_T1.nii.gz", "12"),
        (["IXI012", "IXI012-HH"], "IXI012-HH-1211-T1.nii", "IXI012-HH"),
        (["A7", "B7"], "b007_mprage.mgz", "B7"),
        (["sub-04"], "data/sub04/T1.npy", "04"),
        (["3", "4"], "sub-3/run-4/t1.nii", "3"),
        (["01", "1"], "01/t1.nii", "01"),
        (["3", "4"], "3/4.nii", None),
        (["AB"], "xABy.nii", None),
        (["5"], "15.nii", None),
    ],
)
def test_an_id_stands_in_a_path_as_a_whole(tmp_path: Path, ids: list[str], path: str, subject: str | None) -> None:
    root = tmp_path / "scans"
    write(root / path)
    table = write(tmp_path / "people.tsv", "id\tage\n" + "".join(f"{name}\t30\n" for name in ids))
    manifest = read_files(root, "x", table=table)
    assert [scan.subject for scan in manifest.scans] == ([f"sub-{subject}"] if subject else [])
    assert [p.kind for p in manifest.problems if p.kind == "no_row"] == ([] if subject else ["no_row"])
    if not subject:
        assert "data.pattern" in manifest.problems[0].what


def test_what_is_no_plain_scan_is_put_aside_by_its_own_words(tmp_path: Path) -> None:
    names = ("s1_T1.nii.gz", "s1_T1_DLMUSE.nii.gz", "s1_T1_brain.nii.gz", "s1_T1_2.nii.gz", "s1_FLAIR.nii", "s1_lesion.nii")
    for name in (*names, "labels/s1_T1.nii.gz", ".s1_T1.nii"):
        write(tmp_path / name)
    write(tmp_path / "t.csv", "subject,age\ns1,30\n")
    manifest = read_files(tmp_path, "x")
    assert [scan.path.name for scan in manifest.scans] == ["s1_T1.nii.gz", "s1_T1_2.nii.gz"]
    assert manifest.problem_counts() == {"derived_image": 1, "label_image": 3, "other_contrast": 1}
    check_problem_share(manifest)


def test_the_table_that_fits_best_is_taken(tmp_path: Path) -> None:
    for number in range(3):
        write(tmp_path / f"nifti/s{number}-T1.nii")
    write(tmp_path / "rois.csv", "MRID,hippocampus\ns0,1\ns1,1\ns2,1\n")
    write(tmp_path / "lists/people.csv", "MRID,Age,Sex\ns0,20,F\ns1,30,F\ns2,40,F\n")
    write(tmp_path / "notes.csv", "what,when\nx,y\n")
    assert [age for _, _, age in told(read_files(tmp_path, "x"))] == [20.0, 30.0, 40.0]
    copy = write(tmp_path / "copy.csv", "id;gender;age\ns0;F;20\ns1;F;30\ns2;F;40\n")
    assert len(read_files(tmp_path, "x").scans) == 3
    write(copy, "id;gender;age\ns0;F;20\ns1;F;30\ns2;F;41\n")
    with pytest.raises(ValueError, match=r"one table must fit best, got .*copy\.csv and .*people\.csv"):
        read_files(tmp_path, "x")
    assert len(read_files(tmp_path, "x", table=copy, columns=Columns(age="age")).scans) == 3
    with pytest.raises(ValueError, match=r"it must be an existing file, got .*none\.csv"):
        read_files(tmp_path, "x", table=tmp_path / "none.csv")


def test_without_a_table_subjects_are_read_from_the_names(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for name in ("a/IXI012-HH-T1.nii", "b/patient07/visit2.nii", "b/patient07/visit1.nii", "c9/T1.nii"):
        write(tmp_path / name)
    with caplog.at_level(logging.WARNING, "isocenter"):
        manifest = read_files(tmp_path, "x")
    assert told(manifest) == [
        ("sub-07", "ses-1", None),
        ("sub-07", "ses-2", None),
        ("sub-IXI012-HH", "", None),
        ("sub-c9", "", None),
    ]
    assert "no table: every subject of site x counts as control and has no age" in caplog.text


def test_sites_sessions_splits_and_scanners_of_the_table(tmp_path: Path) -> None:
    for name in ("a_v1", "b_v1", "c_v1", "c_v2", "d_v1"):
        write(tmp_path / f"{name.replace('_v', '/visit')}/t1.nii")
    text = (
        "subject,visit,age,site,split,scanner\na,1,20,north,,p\nb,1,30,south,test,\nc,1,40,south,train,q\nc,2,44,south,train,q\n"
    )
    write(tmp_path / "people.csv", text + "d,1,50,,,q\nd,1,50,south,,q\n")
    write(tmp_path / "b/visit1/t1.json", json.dumps({"Manufacturer": "GE", "MagneticFieldStrength": 3}))
    assert list_file_sites(tmp_path) == ("north", "south")
    manifest = read_files(tmp_path, "south")
    assert told(manifest) == [("sub-b", "ses-1", 30.0), ("sub-c", "ses-1", 40.0), ("sub-c", "ses-2", 44.0)]
    assert [(scan.split, scan.scanner) for scan in manifest.scans] == [("test", "ge-3.0t"), ("train", "q"), ("train", "q")]
    assert manifest.problem_counts() == {"no_site": 1, "two_sites": 1}


def test_targets_come_from_the_table_and_one_that_has_them_is_taken(tmp_path: Path) -> None:
    for name in ("1/study1.nii", "1/study2.nii", "2/study1.nii"):
        write(tmp_path / name)
    write(tmp_path / "people.csv", "id,age,sex\n1,30,F\n2,40,M\n")
    with pytest.raises(ValueError, match=r"people.csv: data.columns.targets must be a column of the table, got 'edss'. Nearest"):
        read_files(tmp_path, "x", columns=Columns(targets=("edss",)))
    write(tmp_path / "scores.csv", "id,visit,age,EDSS\n1,1,30,1.5\n1,2,33,2.0\n2,1,40,na\n")
    manifest = read_files(tmp_path, "x", columns=Columns(targets=("edss", "age")))
    assert [scan.targets for scan in manifest.scans] == [
        (("edss", "1.5"), ("age", "30")), (("edss", "2.0"), ("age", "33")), (("edss", ""), ("age", "40"))
    ]  # fmt: skip
    assert [scan.age_years for scan in manifest.scans] == [30.0, 33.0, 40.0]
    for path in tmp_path.glob("*.csv"):
        path.unlink()
    with pytest.raises(ValueError, match=r"a table that fits the images must have the columns of data.columns.targets, got none"):
        read_files(tmp_path, "x", columns=Columns(targets=("edss",)))


def test_links_are_followed_once_and_broken_ones_are_listed(tmp_path: Path) -> None:
    root = tmp_path / "scans"
    write(root / "a/t1.nii")
    (root / "a/loop").symlink_to(root)
    (root / "self").symlink_to(root / "self")
    (root / "b").mkdir()
    (root / "b/t1.nii").symlink_to(tmp_path / "gone.nii")
    write(root / "t.csv", "subject,age\na,1\nb,2\n")
    assert [scan.subject for scan in read_files(root, "x").scans] == ["sub-a", "sub-b"]


def test_a_folder_without_images_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"must hold images \(\.nii\.gz"):
        read_files(tmp_path, "x")
    with pytest.raises(ValueError, match="it must be an existing folder"):
        read_files(tmp_path / "none", "x")


def test_the_layout_is_known_by_what_the_folder_holds(tmp_path: Path) -> None:
    write(tmp_path / "bids/participants.tsv", "participant_id\n1\n")
    assert detect_layout(tmp_path / "bids") == "bids"
    write(tmp_path / "bids/scans/1.nii")
    assert layout_and_reason(tmp_path / "bids") == ("files", "it has participants.tsv, and images that have no BIDS names")
    write(tmp_path / "bids/sub-1/anat/sub-1_T2w.nii")
    assert detect_layout(tmp_path / "bids") == "bids"
    write(tmp_path / "plain/1.mgz")
    assert detect_layout(tmp_path / "plain") == "files"
    (tmp_path / "open/train/derivatives").mkdir(parents=True)
    assert detect_layout(tmp_path / "open") == "openbhb"
    (tmp_path / "empty").mkdir()
    for name in ("empty", "none"):
        with pytest.raises(ValueError, match=r"^data\.root: it must "):
            detect_layout(tmp_path / name)


@pytest.mark.skipif(not (SHARED / "open_ms_t1w").is_dir(), reason="../shared/data/open_ms_t1w is not there")
@pytest.mark.parametrize("pattern", [None, PATTERN])
def test_the_sclerosis_study_as_it_is(pattern: str | None) -> None:
    root = SHARED / "open_ms_t1w"
    assert detect_layout(root) == "files"
    manifest = read_files(root, "ljubljana", pattern=pattern)
    assert told(manifest) == [
        ("sub-1", "ses-1", 20.0),
        ("sub-1", "ses-2", 20.0),
        ("sub-12", "ses-1", 19.0),
        ("sub-12", "ses-2", 19.0),
        ("sub-20", "ses-2", 50.0),
    ]
    assert manifest.problem_counts() == {"age_of_first_visit": 3, "no_image": 17}


@pytest.mark.skipif(not (SHARED / "ixi_hh_2mm").is_dir(), reason="../shared/data/ixi_hh_2mm is not there")
def test_ixi_with_its_label_maps() -> None:
    root = SHARED / "ixi_hh_2mm"
    assert detect_layout(root) == "files"
    manifest = read_files(root, "HH")
    assert len(manifest.scans) == 10
    assert {scan.path.parent.name for scan in manifest.scans} == {"nifti"}
    assert manifest.scans[0].age_years == 38.78
    assert manifest.problem_counts() == {"label_image": 10}


def test_the_folder_of_one_subject_is_not_a_folder_of_files(tmp_path: Path) -> None:
    image = tmp_path / "sub-0101" / "anat" / "sub-0101_T1w.nii.gz"
    image.parent.mkdir(parents=True)
    image.touch()

    with pytest.raises(ValueError, match="must be the folder of all subjects"):
        detect_layout(tmp_path / "sub-0101")
    assert detect_layout(tmp_path) == "bids"


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("IM0001.dcm", "DICOM, which dcm2niix converts"),
        ("scan.HDR", "a pair of header and image"),
        ("a+orig.HEAD", "3dAFNItoNIFTI"),
        ("b.mnc", "mnc2nii"),
        ("c.PAR", "PAR/REC"),
        ("d.nrrd", "save it as .nii.gz"),
        ("e.nii.bz2", "compress it again"),
    ],
)
def test_images_in_other_formats_are_named_and_told_how_to_convert(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / name).touch()
    with pytest.raises(ValueError, match=rf"must hold images .*, got 1 files such as {re.escape(name)}: .*{re.escape(words)}"):
        detect_layout(tmp_path)

    (tmp_path / "sub1.nii.gz").touch()
    manifest = read_files(tmp_path, "here")
    assert [scan.path.name for scan in manifest.scans] == ["sub1.nii.gz"]
    (problem,) = (problem for problem in manifest.problems if problem.kind == "other_format")
    assert problem.where.endswith(name)
    assert words in problem.what
