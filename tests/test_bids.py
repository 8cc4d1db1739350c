"""What the reader of BIDS-like folders finds, and how it says what it cannot use. Images are empty files: it reads none."""

import logging
from pathlib import Path

import pytest

from core.data.bids import list_sites, read_site
from core.data.manifest import check_problem_share, split_by_subject

SHARED = Path(__file__).parents[2] / "shared" / "data"


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())
    return path


def table(path: Path, *rows: str) -> Path:
    """A tab-separated table of rows written with blanks."""
    return write(path, "".join("\t".join(row.split()) + "\n" for row in rows))


def image(folder: Path, subject: str, session: str = "", entities: str = "") -> Path:
    inside = folder / subject / session / "anat" if session else folder / subject / "anat"
    return write(inside / "_".join(part for part in (subject, session, entities, "T1w.nii.gz") if part))


def test_a_folder_for_each_site(tmp_path: Path) -> None:
    header = "participant_id age sex diagnosis scanner"
    table(tmp_path / "south" / "participants.tsv", header, "sub-01 31.5 F control south-a", "sub-02 62 M Patient south-b")
    table(tmp_path / "north" / "participants.tsv", header, "sub-01 20 M control north")
    table(tmp_path / "derivatives" / "participants.tsv", header)
    first = image(tmp_path / "south", "sub-01", "ses-01")
    second = image(tmp_path / "south", "sub-01", "ses-02", "run-1")
    third = image(tmp_path / "south", "sub-02", "ses-01")

    assert list_sites(tmp_path) == ("north", "south")
    manifest = read_site(tmp_path, "south")

    assert [scan.path for scan in manifest.scans] == [first, second, third]
    assert [scan.session for scan in manifest.scans] == ["ses-01", "ses-02", "ses-01"]
    patient = manifest.scans[2]
    assert (patient.subject, patient.site, patient.scanner) == ("sub-02", "south", "south-b")
    assert (patient.age_years, patient.sex, patient.diagnosis) == (62.0, "M", "patient")
    assert manifest.problems == ()


def test_one_table_with_a_column_site_and_images_in_a_folder_for_each_site(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id Site age", "sub-A1 IA 30", "sub-B1 MGH 40", "sub-B2 MGH 50")
    write(tmp_path / "IA" / "sub-A1_space-MNI_desc-gm_T1w.nii.gz")
    wanted = write(tmp_path / "MGH" / "sub-B1_space-MNI_desc-gm_T1w.nii.gz")
    write(tmp_path / "MGH" / "sub-B1_space-MNI_desc-wm_T2w.nii.gz")

    assert list_sites(tmp_path) == ("IA", "MGH")
    manifest = read_site(tmp_path, "MGH")

    assert [(scan.subject, scan.path) for scan in manifest.scans] == [("sub-B1", wanted)]
    assert manifest.scans[0].scanner == "MGH"
    assert manifest.problem_counts() == {"no_image": 1}
    assert manifest.problems[0].where == "sub-B2"


def test_one_table_with_a_column_site_and_one_tree_of_images(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id site age", "sub-01 IA 30", "sub-02 MGH 40")
    image(tmp_path, "sub-01")
    wanted = image(tmp_path, "sub-02")
    image(tmp_path, "sub-03")

    manifest = read_site(tmp_path, "MGH")

    assert [scan.path for scan in manifest.scans] == [wanted]
    assert manifest.problem_counts() == {"no_row": 1}


def test_a_single_data_set_is_one_site_under_any_name(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    table(root / "participants.tsv", "participant_id age", "01 30")
    wanted = image(root, "sub-01")
    for place in ("derivatives/tool", "sourcedata"):
        image(root / place, "sub-01")

    assert list_sites(root) == ("clinic",)
    assert [scan.path for scan in read_site(root, "clinic").scans] == [wanted]
    assert read_site(root, "hospital-7").scans[0].site == "hospital-7"


@pytest.mark.parametrize(
    ("age", "age_years", "problems"),
    [
        ("34.5", 34.5, {}),
        ("n/a", None, {"no_age": 1}),
        ("", None, {"no_age": 1}),
        ("-", None, {"no_age": 1}),
        ("89+", None, {"bad_age": 1}),
        ("-9999", None, {"bad_age": 1}),
        ("412", None, {"bad_age": 1}),
        ("inf", None, {"bad_age": 1}),
        ("30 weeks", None, {"bad_age": 1}),
    ],
)
def test_a_scan_without_a_usable_age_stays_and_is_counted(
    tmp_path: Path, age: str, age_years: float | None, problems: dict[str, int]
) -> None:
    write(tmp_path / "participants.tsv", f"participant_id\tAGE\nsub-01\t{age}\n")
    image(tmp_path, "sub-01")

    manifest = read_site(tmp_path, "north")

    assert [scan.age_years for scan in manifest.scans] == [age_years]
    assert manifest.problem_counts() == problems


@pytest.mark.parametrize(
    ("text", "sex", "problems"),
    [("m", "M", {}), ("Female", "F", {}), ("n/a", None, {}), ("1", None, {"bad_sex": 1}), ("O", None, {"bad_sex": 1})],
)
def test_only_an_unambiguous_sex_is_read(tmp_path: Path, text: str, sex: str | None, problems: dict[str, int]) -> None:
    table(tmp_path / "participants.tsv", "participant_id gender age", f"sub-01 {text} 30")
    image(tmp_path, "sub-01")

    manifest = read_site(tmp_path, "north")

    assert [scan.sex for scan in manifest.scans] == [sex]
    assert manifest.problem_counts() == problems


def test_a_spreadsheet_export_with_mark_carriage_returns_quotes_and_blank_lines(tmp_path: Path) -> None:
    text = '\ufeffParticipant_ID\tAge\tDX\r\n"sub-01"\t 30 \tCONTROL\r\n\t\t\r\n02\t40\tPatient\r\n'
    write(tmp_path / "participants.tsv", text)
    image(tmp_path, "sub-01")
    image(tmp_path, "sub-02")

    scans = read_site(tmp_path, "north").scans

    assert [(scan.subject, scan.age_years, scan.diagnosis) for scan in scans] == [
        ("sub-01", 30.0, "control"),
        ("sub-02", 40.0, "patient"),
    ]


def test_a_missing_value_of_an_existing_column_is_counted_and_not_invented(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id age diagnosis scanner", "sub-01 30 n/a -")
    image(tmp_path, "sub-01")

    manifest = read_site(tmp_path, "north")

    assert (manifest.scans[0].diagnosis, manifest.scans[0].scanner) == (None, "north")
    assert manifest.problem_counts() == {"no_diagnosis": 1, "no_scanner": 1}


def test_without_a_column_diagnosis_all_are_controls_and_the_log_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path / "participants.tsv", "participant_id age", "sub-01 30")
    image(tmp_path, "sub-01")

    with caplog.at_level(logging.WARNING, "isocenter"):
        manifest = read_site(tmp_path, "north")

    assert manifest.scans[0].diagnosis == "control"
    assert "no column 'diagnosis': every subject of site north counts as control" in caplog.text


def test_rows_and_images_without_the_other_are_counted_and_named_in_the_local_log_only(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    table(tmp_path / "participants.tsv", "participant_id age diagnosis", "sub-01 30 control", "sub-02 40 control")
    image(tmp_path, "sub-01")
    stranger = image(tmp_path, "sub-03")
    foreign = image(tmp_path, "sub-01").rename(tmp_path / "sub-01" / "anat" / "sub-02_T1w.nii.gz")
    image(tmp_path, "sub-01")

    with caplog.at_level(logging.WARNING, "isocenter"):
        manifest = read_site(tmp_path, "north")

    assert manifest.problem_counts() == {"no_image": 1, "no_row": 1, "wrong_name": 1}
    for name in ("sub-02", str(stranger), str(foreign)):
        assert name in caplog.text
    with pytest.raises(ValueError, match="got 3 of 4, no_image 1, no_row 1, wrong_name 1") as raised:
        check_problem_share(manifest)
    assert "sub-" not in str(raised.value)


def test_a_missing_folder_and_an_empty_one_are_one_clear_line(tmp_path: Path) -> None:
    for ask in (list_sites, lambda root: read_site(root, "north")):
        with pytest.raises(ValueError, match=r"^data\.root: it must be an existing folder, got .*nowhere"):
            ask(tmp_path / "nowhere")
        with pytest.raises(ValueError, match=r"^data\.root: it must hold participants\.tsv, or one folder per site"):
            ask(tmp_path)


@pytest.mark.parametrize("site", ["east", "..", ""])
def test_an_unknown_site_is_answered_with_those_there_are(tmp_path: Path, site: str) -> None:
    table(tmp_path / "north" / "participants.tsv", "participant_id age")
    table(tmp_path / "south" / "participants.tsv", "participant_id age")

    with pytest.raises(ValueError, match=f"must be one of north, south, got '{site}'"):
        read_site(tmp_path, site)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "one be participant_id, got"),
        ("subject\tage\nsub-01\t30\n", "one be participant_id, got"),
        ("participant_id,age\nsub-01,30\n", "must be tab-separated"),
        ("participant_id\tage\tAge\nsub-01\t30\t31\n", "each named once"),
        ("participant_id\tage\nsub-01\n", "row 2 must have 2 fields, got 1"),
        ("participant_id\tage\nn/a\t30\n", "row 2 must have a participant_id"),
        ("participant_id\tage\nsub-01\t30\n01\t31\n", "participant_id must be unique, got 'sub-01' twice"),
        ('participant_id\tage\nsub-01\t"30\n', "must be tab-separated UTF-8 text"),
        ("participant_id\tsite\nsub-01\tnorth\nsub-02\tn/a\n", "site must be filled in every row"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "participants.tsv", text)

    with pytest.raises(ValueError, match=message):
        read_site(tmp_path, "north")


def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "participants.tsv").write_bytes("participant_id\tname\nsub-01\tJosé\n".encode("latin-1"))

    with pytest.raises(ValueError, match="must be tab-separated UTF-8 text"):
        read_site(tmp_path, "north")


@pytest.mark.skipif(not (SHARED / "mcic_vbm_4mm").is_dir(), reason="../shared/data/mcic_vbm_4mm is not there")
def test_four_real_sites() -> None:
    root = SHARED / "mcic_vbm_4mm"

    manifests = [read_site(root, site) for site in list_sites(root)]

    assert {manifest.site: len(manifest.scans) for manifest in manifests} == {
        "IA": 42,
        "MGH": 66,
        "UMN": 38,
        "site4": 53,
    }
    for manifest in manifests:
        check_problem_share(manifest)
        assert manifest.problems == ()
        assert {scan.diagnosis for scan in manifest.scans} == {"control", "patient"}
        for split in split_by_subject(manifest).values():
            assert {scan.diagnosis for scan in split.scans} == {"control", "patient"}


@pytest.mark.skipif(not (SHARED / "ds002748_t1w").is_dir(), reason="../shared/data/ds002748_t1w is not there")
def test_a_real_data_set_of_which_most_images_are_missing() -> None:
    root = SHARED / "ds002748_t1w"

    manifest = read_site(root, list_sites(root)[0])

    assert len(manifest.scans) == 10
    assert {scan.diagnosis for scan in manifest.scans} == {"control", "depr"}
    with pytest.raises(ValueError, match="got 62 of 72, no_image 62"):
        check_problem_share(manifest)
