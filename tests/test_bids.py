"""What the reader of BIDS-like folders finds, and how it says what it cannot use. Images are empty files: it reads none."""

import json
import logging
import tarfile
from pathlib import Path

import pytest

from core.data.bids import ASIDE, list_sites, read_site, scanner_name
from core.data.files import detect_layout
from core.data.labels import Columns
from core.data.manifest import Manifest, check_problem_share, split_by_subject

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
        ("89+", 89.0, {"capped_age": 1}),
        ("-9999", None, {"bad_age": 1}),
        ("412", None, {"bad_age": 1}),
        ("inf", None, {"bad_age": 1}),
        ("6 months", 0.5, {}),
        ("30 gestational weeks", None, {"bad_age": 1}),
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
        with pytest.raises(ValueError, match=r"^data\.root: it must hold participants\.tsv or folders sub-\*, or one"):
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
        ("", "one column must be the subject's name, such as participant_id"),
        ("name\tage\nsub-01\t30\n", "one column must be the subject's name"),
        ("participant_id\tage\tAge\nsub-01\t30\t31\n", "each column must be named once"),
        ("participant_id\tage\nsub-01\n", "every row must have 2 cells, got 1 in row 2"),
        ('participant_id\tage\nsub-01\t"30\n', "must be UTF-8 text, separated by comma, semicolon or tab"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused(tmp_path: Path, text: str, message: str) -> None:
    write(tmp_path / "participants.tsv", text)

    with pytest.raises(ValueError, match=message):
        read_site(tmp_path, "north")


def test_a_table_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    (tmp_path / "participants.tsv").write_bytes("participant_id\tname\nsub-01\tJosé\n".encode("latin-1"))

    with pytest.raises(ValueError, match="must be UTF-8 text"):
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
    assert {scan.diagnosis for scan in manifest.scans} == {"control", "patient"}
    with pytest.raises(ValueError, match="got 62 of 72, no_image 62"):
        check_problem_share(manifest)


def ages(manifest: Manifest) -> dict[tuple[str, str], float | None]:
    return {(scan.subject, scan.session): scan.age_years for scan in manifest.scans}


def test_rows_without_id_or_site_and_second_rows_are_counted(tmp_path: Path) -> None:
    rows = ("sub-01 30 north F", "- 40 north F", "01 31 north F", "01 30 north F", "02 50 - M", "03 20 south M")
    table(tmp_path / "participants.tsv", "participant_id age site sex", *rows)
    image(tmp_path, "sub-01")
    image(tmp_path, "sub-02")

    manifest = read_site(tmp_path, "north")

    assert ages(manifest) == {("sub-01", ""): 30.0}
    assert manifest.problem_counts() == {"double_row": 1, "no_site": 1, "no_subject": 1}
    table(tmp_path / "participants.tsv", "participant_id age site sex", "01 30 north F", "01 40 north M")
    manifest = read_site(tmp_path, "north")
    assert (manifest.scans[0].age_years, manifest.scans[0].sex) == (None, None)
    counts = manifest.problem_counts()
    assert (counts["contradictory_age"], counts["contradictory_sex"], counts["double_row"]) == (1, 1, 1)


def test_a_subject_at_two_sites(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id age site", "01 30 north", "01 30 south", "02 40 north")
    image(tmp_path, "sub-01")
    image(tmp_path, "sub-02")
    for site, scans in (("north", ["sub-02"]), ("south", [])):
        manifest = read_site(tmp_path, site)
        assert [scan.subject for scan in manifest.scans] == scans
        assert manifest.problem_counts()["two_sites"] == 1
    for site in ("north", "south"):
        image(tmp_path / site, "sub-01")
        assert read_site(tmp_path, site).problem_counts()["shared_subject"] == 1
        assert ages(read_site(tmp_path, site))["sub-01", ""] == 30.0


@pytest.mark.parametrize(("row", "folder"), [("1", "sub-01"), ("sub-001", "sub-01"), ("SUB-a1", "sub-A01"), ("sub1", "sub-01")])
def test_an_id_may_differ_in_case_and_zeros_where_no_other_fits(tmp_path: Path, row: str, folder: str) -> None:
    table(tmp_path / "participants.tsv", "participant_id age", f"{row} 30")
    image(tmp_path, folder)
    manifest = read_site(tmp_path, "north")
    assert ages(manifest) == {(folder, ""): 30.0}
    assert manifest.problem_counts() == {"inexact_id": 1}
    image(tmp_path, folder.replace("0", "000"))
    assert read_site(tmp_path, "north").problem_counts() == {"no_image": 1, "no_row": 2}


def test_all_plain_images_are_read_and_the_others_put_aside(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    table(root / "participants.tsv", "participant_id age", "01 30")
    plain = [image(root, "sub-01", "", f"acq-x_run-{run}") for run in (1, 2)]
    plain.append(write(root / "sub-01/anat/sub-01_run-3_T1w.mgz"))
    plain.append(image(root, "sub-01", "", "part-mag"))
    first = [image(root, "sub-01", "", "echo-2"), image(root, "sub-01", "", "inv-1")]
    for entities in ("chunk-1", "ce-gadolinium", "part-phase", "echo-10", "inv-2", "space-MNI_desc-preproc"):
        image(root, "sub-01", "", entities)
    write(root / "sub-01/anat/sub-01_acq-x_run-1_T1w.nii")

    manifest = read_site(root, "clinic")

    # Of one image in two formats the first by name is read.
    plain[0] = plain[0].with_name("sub-01_acq-x_run-1_T1w.nii")
    assert {scan.path for scan in manifest.scans} == {*plain, *first}
    assert manifest.problem_counts() == dict.fromkeys(sorted(ASIDE), 1)
    check_problem_share(manifest)
    assert [scan.path.name for scan in read_site(root, "clinic", suffix="ce-gadolinium_T1w").scans] == [
        "sub-01_ce-gadolinium_T1w.nii.gz"
    ]


def test_a_subject_with_no_plain_image_has_none(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id age", "01 30")
    image(tmp_path, "sub-01", "", "chunk-1")
    manifest = read_site(tmp_path, "north")
    assert manifest.problem_counts() == {"chunk_image": 1, "no_image": 1}
    with pytest.raises(ValueError, match="got 1 of 1, no_image 1"):
        check_problem_share(manifest)


def test_derivatives_are_read_when_asked_for(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    table(root / "participants.tsv", "participant_id age", "01 30")
    write(root / "T1w.json", json.dumps({"Manufacturer": "GE"}))
    image(root, "sub-01", "ses-1")
    write(root / "sub-01/sub-01_sessions.tsv", "session_id\tage\nses-1\t30.5\n")
    folder = root / "derivatives" / "fmriprep"
    native = image(folder, "sub-01", "ses-1", "desc-preproc")
    standard = image(folder, "sub-01", "ses-1", "space-MNI_res-2_desc-preproc")

    for suffix, path in (("desc-preproc_T1w", native), ("space-MNI_desc-preproc_T1w", standard)):
        [scan] = read_site(root, "clinic", suffix=suffix, derivatives="fmriprep").scans
        assert (scan.path, scan.age_years, scan.scanner) == (path, 30.5, "ge")
    with pytest.raises(ValueError, match=r"must be of one version.*got desc-preproc, space-MNI_res-2_desc-preproc\. Name one"):
        read_site(root, "clinic", derivatives="fmriprep")
    with pytest.raises(ValueError, match=r"data\.derivatives: .* got 'spm'\. There are fmriprep"):
        read_site(root, "clinic", derivatives="spm")
    native.unlink()
    assert [scan.path for scan in read_site(root, "clinic", derivatives="fmriprep").scans] == [standard]


def test_a_data_set_without_a_table(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = tmp_path / "clinic"
    image(root, "sub-01")
    (root / "sub-02").mkdir()
    assert list_sites(root) == ("clinic",)
    with caplog.at_level(logging.WARNING, "isocenter"):
        manifest = read_site(root, "clinic")
    assert [(scan.subject, scan.age_years, scan.diagnosis) for scan in manifest.scans] == [("sub-01", None, "control")]
    assert manifest.problem_counts() == {"no_age": 1, "no_image": 1}
    assert "no participants.tsv: every subject of site clinic counts as control" in caplog.text
    image(tmp_path / "ward", "sub-07")
    assert list_sites(tmp_path) == ("clinic", "ward")


def test_a_table_in_another_place(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    image(root, "sub-01")
    people = write(tmp_path / "people.csv", "code,years,site\n1,30,Ward A\n")
    columns = Columns(subject="code", age="years", site_pattern=r"Ward (.)")
    assert list_sites(root, participants=people, columns=columns) == ("A",)
    manifest = read_site(root, "A", participants=people, columns=columns)
    assert ages(manifest) == {("sub-01", ""): 30.0}
    with pytest.raises(ValueError, match=r"data\.participants: it must be an existing file"):
        list_sites(root, participants=tmp_path / "gone.csv")


def test_rawdata_inside_the_folder_is_the_data_set(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    table(root / "rawdata" / "participants.tsv", "participant_id age", "01 30")
    image(root / "rawdata", "sub-01")
    image(root / "sourcedata", "sub-01")
    assert list_sites(root) == ("clinic",)
    assert len(read_site(root, "clinic").scans) == 1


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("clinic/sub-01", "must be the folder of all subjects, got .*data.root=.*clinic"),
        ("clinic/participants.tsv", "must be a folder, got the file .*Name its folder"),
        ("clinic.zip", "must be a folder, got the file .*Unpack it"),
        ("", "Name .*more.clinic or the folder above it"),
    ],
)
def test_a_wrong_folder_is_one_sentence(tmp_path: Path, given: str, says: str) -> None:
    table(tmp_path / "clinic" / "participants.tsv", "participant_id age", "01 30")
    image(tmp_path / "clinic", "sub-01")
    write(tmp_path / "clinic.zip")
    if not given:
        (tmp_path / "more").mkdir()
        (tmp_path / "clinic").rename(tmp_path / "more" / "clinic")
    with pytest.raises(ValueError, match=f"^data.root: it {says}" if given else says):
        list_sites(tmp_path / given)


def test_links_that_loop_or_break_are_listed_and_never_followed_for_ever(tmp_path: Path) -> None:
    root = tmp_path / "clinic"
    table(root / "participants.tsv", "participant_id age", "01 30", "02 40", "03 50", "04 60")
    image(root, "sub-01")
    (root / "sub-01" / "ses-1").symlink_to(root / "sub-01")
    (root / "sub-02").symlink_to(root / "sub-02")
    (root / "sub-03" / "anat").mkdir(parents=True)
    (root / "sub-03" / "anat" / "sub-03_T1w.nii.gz").symlink_to(root / ".git" / "annex" / "gone")
    image(tmp_path / "elsewhere", "sub-04")
    (root / "sub-04").symlink_to(tmp_path / "elsewhere" / "sub-04")

    manifest = read_site(root, "clinic")

    assert [scan.subject for scan in manifest.scans] == ["sub-01", "sub-03", "sub-04"]
    assert manifest.problem_counts() == {"no_image": 1, "wrong_name": 1}


def test_ages_of_sessions_count_before_those_of_subjects(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id age", "01 30", "02 30", "03 89+", "04 n/a", "05 30")
    for subject in ("sub-01", "sub-02", "sub-03", "sub-05"):
        for session in ("ses-1", "ses-2"):
            image(tmp_path, subject, session)
    write(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id\tage\nses-1\t30.4\nses-2\t33\n")
    write(tmp_path / "sub-02/ses-1/sub-02_ses-1_scans.tsv", "filename\tage\nanat/sub-02_ses-1_T1w.nii.gz\t40\n")
    write(tmp_path / "sub-02/ses-2/sub-02_ses-2_scans.tsv", "filename\tage\nanat/sub-02_ses-2_T1w.nii.gz\t44\n")
    write(tmp_path / "sub-03/ses-2/anat/sub-03_ses-2_T1w.json", '{"PatientAge": "093Y"}')
    write(tmp_path / "sub-05/ses-2/anat/sub-05_ses-2_T1w.json", '{"Age": 25}')
    image(tmp_path, "sub-04")
    write(tmp_path / "sub-04/anat/sub-04_T1w.json", '{"SubjectAge": "6 months"}')

    manifest = read_site(tmp_path, "north")

    assert ages(manifest) == {
        ("sub-01", "ses-1"): 30.4,
        ("sub-01", "ses-2"): 33.0,
        ("sub-02", "ses-1"): None,  # ten years older than the subject's age at the first session
        ("sub-02", "ses-2"): 44.0,
        ("sub-03", "ses-1"): 89.0,
        ("sub-03", "ses-2"): 93.0,
        ("sub-04", ""): 0.5,
        ("sub-05", "ses-1"): 30.0,
        ("sub-05", "ses-2"): None,  # younger than at the first session
    }
    assert manifest.problem_counts() == {"capped_age": 1, "contradictory_age": 2}


def test_sources_of_one_age_that_contradict_each_other_leave_it_missing(tmp_path: Path) -> None:
    for subject, age in (("sub-01", 31), ("sub-02", 1.5), ("sub-03", 1.1)):
        image(tmp_path, subject, "ses-1")
        write(tmp_path / subject / f"{subject}_sessions.tsv", "session_id\tage\n1\t" + ("30" if subject == "sub-01" else "1.0"))
        write(tmp_path / subject / f"ses-1/anat/{subject}_ses-1_T1w.json", json.dumps({"Age": age}))
    manifest = read_site(tmp_path, "north")
    assert list(ages(manifest).values()) == [30.0, None, 1.0]
    assert manifest.problem_counts() == {"contradictory_age": 1}


def test_an_age_at_the_first_visit_stands_in_for_later_ones_and_is_counted(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id age_at_first_scan_years", "01 30")
    for session in ("ses-2", "ses-10"):
        image(tmp_path, "sub-01", session)
    manifest = read_site(tmp_path, "north")
    assert set(ages(manifest).values()) == {30.0}
    [problem] = manifest.problems
    assert (problem.kind, "ses-10" in problem.where) == ("age_of_first_visit", True)


def test_targets_of_an_image_are_those_of_its_session_where_they_are_told(tmp_path: Path) -> None:
    table(tmp_path / "participants.tsv", "participant_id age MMSE apoe", "sub-01 60 29 e4", "sub-02 61 n/a e3")
    for session in ("ses-1", "ses-2", "ses-3", "ses-4"):
        image(tmp_path, "sub-01", session)
    image(tmp_path, "sub-02", "ses-1")
    image(tmp_path, "sub-02", "ses-2")
    rows = ("session_id mmse moca", "ses-1 28 25", "ses-2 -9 24", "ses-3 27 23")
    table(tmp_path / "sub-01/sub-01_sessions.tsv", *rows)
    scans = "filename mmse", "anat/sub-01_ses-3_T1w.nii.gz 26.5", "anat/sub-01_ses-3_T2w.nii.gz 1"
    table(tmp_path / "sub-01/ses-3/sub-01_ses-3_scans.tsv", *scans)
    table(tmp_path / "sub-02/sub-02_sessions.tsv", "session_id MMSE", "ses-1 20", "ses-1 21", "ses-2 22")
    columns = Columns(targets=("mmse", "MoCA", "APOE"), missing=("-9",))

    manifest = read_site(tmp_path, "north", columns=columns)

    assert [scan.targets for scan in manifest.scans] == [
        (("mmse", mmse), ("MoCA", moca), ("APOE", apoe))
        for mmse, moca, apoe in (
            ("28", "25", "e4"),
            ("", "24", "e4"),
            ("26.5", "23", "e4"),
            ("29", "", "e4"),
            ("", "", "e3"),
            ("22", "", "e3"),
        )
    ]
    assert manifest.problem_counts() == {"contradictory_target": 1}
    assert {scan.targets for scan in read_site(tmp_path, "north").scans} == {()}


def test_a_target_that_no_table_has_is_named_with_the_nearest_columns(tmp_path: Path) -> None:
    image(tmp_path, "sub-01", "ses-1")
    table(tmp_path / "sub-01/sub-01_sessions.tsv", "session_id mmse", "ses-1 20")
    assert read_site(tmp_path, "north", columns=Columns(targets=("MMSE",))).scans[0].targets == (("MMSE", "20"),)
    with pytest.raises(ValueError, match=r"data.columns.targets must be a column of the table, got 'mmze'. Nearest: mmse"):
        read_site(tmp_path, "north", columns=Columns(targets=("mmze",)))
    table(tmp_path / "participants.tsv", "participant_id iq_full", "sub-01 100")
    with pytest.raises(ValueError, match=r"participants.tsv: data.columns.targets must .*, got 'iqfull'. Nearest: iq_full"):
        read_site(tmp_path, "north", columns=Columns(targets=("mmse", "iqfull")))


def test_units_are_inherited_and_wrong_rows_and_tables_are_counted(tmp_path: Path) -> None:
    image(tmp_path, "sub-01", "ses-1")
    image(tmp_path, "sub-02", "ses-1")
    image(tmp_path, "sub-03", "ses-1")
    write(tmp_path / "scans.json", '{"Age": {"Units": "months"}}')
    write(tmp_path / "sub-02/sub-02_scans.json", "not json")
    rows = "filename\tAge\nsub-01_ses-1_T1w.nii.gz\t24\nanat/sub-09_ses-1_T1w.nii\t30\nanat/sub-01_ses-1_run-2_T1w.nii\t31\n"
    write(tmp_path / "sub-01/ses-1/sub-01_ses-1_scans.tsv", rows + "func/sub-01_ses-1_bold.nii\t90\n")
    write(tmp_path / "sub-02/ses-1/sub-02_ses-1_scans.tsv", "filename\tage\nanat/sub-02_ses-1_T1w.nii.gz\t36\n")
    write(tmp_path / "sub-03/sub-03_sessions.tsv", "visit number\tage\n1\t30\n")
    write(tmp_path / "sub-03/ses-1/sub-03_ses-1_scans.tsv", "filename\nx\ty\n")

    manifest = read_site(tmp_path, "north")

    assert list(ages(manifest).values()) == [2.0, 3.0, None]
    assert manifest.problem_counts() == {"bad_sidecar": 1, "bad_table": 2, "no_age": 1, "wrong_row": 2}
    assert {p.what.split(":")[0] for p in manifest.problems if p.kind == "wrong_row"} == {
        "it names a file of sub-09",
        "it names a file that is not there",
    }


def test_sites_of_the_table_get_names_that_a_run_can_hold(tmp_path: Path) -> None:
    text = "participant_id\tage\tinstitution_id\n01\t30\tSt. Mary's\n02\t40\tGuy's\n"
    people = write(tmp_path / "participants.tsv", text)
    image(tmp_path / "Guy's", "sub-02")
    image(tmp_path, "sub-01")
    assert list_sites(tmp_path) == ("Guy-s", "St-Mary-s")
    assert ages(read_site(tmp_path, "Guy-s")) == {("sub-02", ""): 40.0}
    assert ages(read_site(tmp_path, "St-Mary-s")) == {("sub-01", ""): 30.0}
    write(people, text + "03\t50\tGuy s\n")
    with pytest.raises(ValueError, match="column institution_id must tell sites apart by letters and digits"):
        list_sites(tmp_path)


def test_a_table_that_was_not_fetched_is_not_taken_for_none(tmp_path: Path) -> None:
    image(tmp_path, "sub-01")
    (tmp_path / "participants.tsv").symlink_to(tmp_path / ".git" / "annex" / "gone")
    with pytest.raises(ValueError, match=r"it must be a file, got a link to none\. Fetch the file"):
        read_site(tmp_path, "north")


def test_a_changed_data_dictionary_is_read_again(tmp_path: Path) -> None:
    people = table(tmp_path / "participants.tsv", "participant_id age", "01 24")
    image(tmp_path, "sub-01")
    assert ages(read_site(tmp_path, "north")) == {("sub-01", ""): 24.0}
    write(people.with_suffix(".json"), '{"age": {"Units": "months"}}')
    assert ages(read_site(tmp_path, "north")) == {("sub-01", ""): 2.0}


def test_scanners_are_told_by_the_table_else_by_the_images(tmp_path: Path) -> None:
    for number in range(1, 6):
        image(tmp_path, f"sub-0{number}", "", "acq-a" if number == 3 else "")
    make = {"Manufacturer": "SIEMENS ", "ManufacturersModelName": "Prisma fit", "MagneticFieldStrength": 3}
    write(tmp_path / "acq-a_T1w.json", json.dumps(make))
    for number, station in ((1, "MR1"), (2, "MR2")):
        write(tmp_path / f"sub-0{number}/anat/sub-0{number}_T1w.json", json.dumps(make | {"StationName": station}))
    table(tmp_path / "participants.tsv", "participant_id age scanner", *(f"0{i} 30 {'-' if i < 5 else 'b'}" for i in range(1, 6)))

    manifest = read_site(tmp_path, "north")

    one, two, three, four, five = (scan.scanner for scan in manifest.scans)
    assert (three, four, five) == ("siemens-prisma-fit-3.0t", "north", "b")
    assert one.startswith(three + "-")
    assert one != two
    assert "mr1" not in one
    assert manifest.problem_counts() == {"no_scanner": 1}


def test_a_scanner_without_a_description_has_no_name() -> None:
    assert scanner_name({"MagneticFieldStrength": True, "RepetitionTime": 2}) == ""
    assert scanner_name({"MagneticFieldStrength": 2.893}) == "2.9t"


# Layout: scans, and problems by kind; a sentence where the layout is no data set of images of this suffix.
EXAMPLES: dict[str, tuple[int, dict[str, int]] | str] = {
    "7t_trt": (22, {}),
    "asl001": (1, {"no_age": 1}),
    "atlas-AAL": "it must hold participants.tsv or folders sub-",
    "ds000001-fmriprep": "the images must be of one version",
    "ds000117": (16, {"no_image": 1}),
    "ds001": (16, {}),
    "ds003": (13, {}),
    "ds006": (28, {}),
    "ds007": (20, {}),
    "ds009": (24, {}),
    "ds011": (14, {}),
    "ds051": (27, {"no_age": 27}),
    "ds052": (25, {"no_age": 25}),
    "ds101": (21, {}),
    "ds102": (26, {"bad_sex": 9}),
    "ds107": (49, {"no_age": 49}),
    "ds110": (18, {}),
    "ds114": (20, {"no_age": 20}),
    "ds116": (17, {}),
    "ds210": (0, {"no_image": 15}),
    "eeg_rest_fmri": (6, {"no_age": 6}),
    "hcp_example_bids": (1, {"no_age": 1}),
    "mri_chunk": (0, {"chunk_image": 2, "no_image": 1}),
    "pet001": (1, {"no_age": 1}),
    "pheno004": (2, {"no_image": 1}),
    "qmri_mp2rage": (0, {"no_image": 1}),
    "synthetic": (10, {}),
    "volume_timing": (0, {"no_image": 1}),
}


def unpacked(name: str, folder: Path) -> Path:
    with tarfile.open(SHARED / "bids_layouts" / name) as archive:
        archive.extractall(folder, filter="fully_trusted")  # one holds absolute links, broken on purpose
    return folder


@pytest.mark.skipif(not (SHARED / "bids_layouts").is_dir(), reason="../shared/data/bids_layouts is not there")
def test_public_layouts(tmp_path: Path) -> None:
    root = unpacked("bids-examples_mri.tar.gz", tmp_path)
    assert sorted(path.name for path in root.iterdir()) == sorted(EXAMPLES)
    for name, expected in EXAMPLES.items():
        if isinstance(expected, str):
            with pytest.raises(ValueError, match=expected):
                read_site(root / name, name)
        else:
            manifest = read_site(root / name, name)
            assert (name, len(manifest.scans), manifest.problem_counts()) == (name, *expected)
            assert detect_layout(root / name) == "bids"
    for suffix in ("desc-preproc_T1w", "space-MNI152NLin2009cAsym_desc-preproc_T1w"):
        assert len(read_site(root / "ds000001-fmriprep", "x", suffix=suffix).scans) == 4


@pytest.mark.skipif(not (SHARED / "bids_layouts").is_dir(), reason="../shared/data/bids_layouts is not there")
def test_broken_links_a_capped_age_and_a_table_without_images(tmp_path: Path) -> None:
    oasis = read_site(unpacked("AFIDs-OASIS_broken_symlinks.tar.gz", tmp_path / "oasis"), "oasis")
    assert (len(oasis.scans), oasis.problem_counts()) == (30, {"capped_age": 1})
    assert max(scan.age_years or 0.0 for scan in oasis.scans) == 89.0
    bare = read_site(unpacked("ds004604_t1w_layout.tar.gz", tmp_path / "bare"), "bare")
    assert (len(bare.scans), bare.problem_counts()) == (0, {"no_image": 50})


@pytest.mark.skipif(not (SHARED / "dbc_bids_sessions").is_dir(), reason="../shared/data/dbc_bids_sessions is not there")
def test_ages_of_sessions_in_years_or_months() -> None:
    manifest = read_site(SHARED / "dbc_bids_sessions", "dbc")
    assert ages(manifest) == {
        ("sub-0001", "ses-V01"): 6.0,
        ("sub-0001", "ses-V02"): 6.0,
        ("sub-0006", "ses-V01"): None,
        ("sub-0007", "ses-V01"): pytest.approx(4 / 12),
        ("sub-0008", "ses-V01"): pytest.approx(1 / 12),
    }
    assert manifest.problem_counts() == {"doubtful_age": 2, "no_age": 1, "no_image": 5, "no_scanner": 3, "wrong_row": 5}
    fetal = read_site(SHARED / "dbc_bids_sessions", "dbc", suffix="T2w")
    assert (list(ages(fetal).values()), fetal.problem_counts()) == ([None], {"bad_age": 2, "no_image": 8})


@pytest.mark.skipif(not (SHARED / "ds000011_t1w").is_dir(), reason="../shared/data/ds000011_t1w is not there")
def test_another_real_data_set() -> None:
    manifest = read_site(SHARED / "ds000011_t1w", "any")
    assert (len(manifest.scans), manifest.problem_counts()) == (5, {"no_image": 9})
