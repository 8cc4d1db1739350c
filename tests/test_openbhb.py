"""OpenBHB's own layout: two folders, one table, official splits."""

from pathlib import Path

import pytest

from core.data.files import detect_layout
from core.data.labels import Columns
from core.data.manifest import split_by_subject
from core.data.openbhb import list_openbhb_sites, read_openbhb

HEADER = "participant_id\tstudy\tsex\tage\tsite\tdiagnosis\ttiv\tmagnetic_field_strength\tsiteXacq\tsplit\n"
ROWS = (
    "101\t1\tfemale\t21.5\t7\tcontrol\t1\t3\t12\ttrain\n"
    "102\t1\tmale\t30\t7\tcontrol\t1\t3\t12.0\tinternal_test\n"
    "103\t1\tmale\t40\t7\tcontrol\t1\t3\t12\texternal_test\n"
    "104\t1\tmale\t50\t7\tcontrol\t1\t3\t3\ttrain\n"
    "105\t1\tmale\t60\t7\tcontrol\t1\t3\t12\ttrain\n"
)


def image(root: Path, part: str, subject: str, name: str = "preproc-cat12vbm_desc-gm_T1w") -> Path:
    path = root / part / "derivatives" / f"sub-{subject}" / "ses-1" / f"sub-{subject}_{name}.npy"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "participants.tsv").write_text(HEADER + ROWS)
    image(tmp_path, "train", "101")
    image(tmp_path, "train", "101", "preproc-quasiraw_T1w")
    image(tmp_path, "val", "102")
    image(tmp_path, "val", "103")
    image(tmp_path, "train", "104")
    return tmp_path


def test_sites_are_centres_with_one_setting(root: Path) -> None:
    assert list_openbhb_sites(root) == ("site-3", "site-12")
    assert detect_layout(root) == "openbhb"
    text = (HEADER + ROWS).replace("siteXacq", "else")
    (root / "participants.tsv").write_text(text)
    assert list_openbhb_sites(root) == ("site-7",)


def test_a_site_is_read_with_its_official_split(root: Path) -> None:
    manifest = read_openbhb(root, "site-12", "vbm")
    assert [(s.subject, s.session, s.age_years, s.sex, s.diagnosis, s.split) for s in manifest.scans] == [
        ("sub-101", "ses-1", 21.5, "F", "control", "train"),
        ("sub-102", "ses-1", 30.0, "M", "control", "test"),
        ("sub-103", "ses-1", 40.0, "M", "control", "test"),
    ]
    assert {scan.scanner for scan in manifest.scans} == {"site-12"}
    assert manifest.problem_counts() == {"no_image": 1}
    assert [scan.subject for scan in split_by_subject(manifest)["test"].scans] == ["sub-102", "sub-103"]
    assert [scan.path.name for scan in read_openbhb(root, "site-12", "quasiraw").scans] == ["sub-101_preproc-quasiraw_T1w.npy"]


def test_what_cannot_be_used_is_counted(root: Path) -> None:
    image(root, "val", "999")
    image(root, "train", "105")
    (root / "qc.tsv").write_text("participant_id\tsession\tqc\teuler\n101\t1\t0\t5\n102\t1\t1\t5\n103\t2\t0\t5\n105\t\tfail\t5\n")
    (root / "participants.tsv").write_text(HEADER + ROWS.replace("external_test", "train"))
    manifest = read_openbhb(root, "site-12")
    assert [scan.subject for scan in manifest.scans] == ["sub-102", "sub-103"]
    assert manifest.problem_counts() == {"failed_qc": 2, "no_row": 1, "wrong_split": 1}


def test_targets_and_told_columns_of_participants_are_read(root: Path) -> None:
    columns = Columns(targets=("TIV", "study"), missing=("1",))
    assert [scan.targets for scan in read_openbhb(root, "site-12", columns=columns).scans] == [(("TIV", ""), ("study", ""))] * 3
    found = read_openbhb(root, "site-7", columns=Columns(targets=("magnetic_field_strength",), site="site"))
    assert {scan.targets for scan in found.scans} == {(("magnetic_field_strength", "3"),)}
    with pytest.raises(ValueError, match=r"data.columns.targets must be a column of the table, got 'tivs'. Nearest: tiv"):
        list_openbhb_sites(root, Columns(targets=("tivs",)))


def test_metrics_without_a_verdict_leave_nothing_out(root: Path) -> None:
    (root / "qc.tsv").write_text("participant_id\tsession\teuler\n101\t1\t-300\n")
    assert len(read_openbhb(root, "site-12").scans) == 3
    (root / "qc.tsv").write_bytes(b"\xff\xfe\x00")
    assert read_openbhb(root, "site-12").problem_counts() == {"bad_table": 1, "no_image": 1}


def test_what_is_not_openbhb_is_one_sentence(root: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="site: it must be one of site-3, site-12, got 'site-4'"):
        read_openbhb(root, "site-4")
    (root / "participants.tsv").write_text("participant_id\tage\n1\t2\n")
    with pytest.raises(ValueError, match="one column must be siteXacq or site"):
        list_openbhb_sites(root)
    (root / "participants.tsv").unlink()
    with pytest.raises(ValueError, match=r"it must hold participants\.tsv, train/ and val/"):
        list_openbhb_sites(tmp_path)
