"""`isocenter check` end to end: what it finds, what it says, what it writes, and what it never tells."""

import json
import re
import shlex
import struct
import weakref
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
from numpy.typing import NDArray
from typer.testing import CliRunner, Result

from core.cli import app
from core.config import load_config
from core.data import cache as cache_module
from core.data import preflight
from core.data.bids import ASIDE
from core.data.decode import VolumeError, decode, read_geometry
from core.data.manifest import UNUSABLE_KINDS, Manifest, Scan
from core.data.preflight import MEANINGS, MIN_TRAIN_CONTROLS, OUTLIER_KINDS, SiteCheck, shareable, suppressed
from core.data.site import Store
from core.report_check import _slices
from server.strategy import MIN_CONTRAST_SUBJECTS

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "data"
SHAPE = (24, 28, 22)
GRID = ["data.voxel_size_mm=6", f"data.shape=[{','.join(map(str, SHAPE))}]", "data.max_unusable=0.5"]
RUNNER = CliRunner()


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)


def head(number: int, shape: tuple[int, int, int] = SHAPE) -> NDArray[np.float32]:
    """A head (X, Y, Z) in RAS order that no two subjects share: bright below, dark and narrow in front, a cavity, 0 in air."""
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in shape], indexing="ij")
    values = 100 - 45 * z - 30 * y - 60 * ((x**2 + (y - 0.2) ** 2 + (z - 0.3) ** 2) < 0.1)
    noise = np.random.default_rng(number).normal(0, 3, shape)
    return np.where((x * (1 + 0.4 * y)) ** 2 + y**2 + (z * 1.1) ** 2 < 0.8, values + noise, 0).astype(np.float32)


def save(path: Path, values: NDArray[np.float32], sizes_mm: tuple[float, float, float] = (6, 6, 6)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    affine = np.diag([*sizes_mm, 1.0])
    nib.save(nib.Nifti1Image(values, affine), path)


def hospital(folder: Path, num_scans: int = 10) -> Path:
    """A BIDS data set of one site: ages 20, 23, 26, ..., sexes and diagnoses by turns."""
    rows = ["participant_id\tage\tsex\tdiagnosis"]
    for number in range(num_scans):
        name = f"sub-PLANTED{number:02d}"
        save(image_of(folder, number), head(number))
        rows.append(f"{name}\t{20 + 3 * number}\t{'FM'[number % 2]}\t{'patient' if number % 5 == 4 else 'control'}")
    (folder / "participants.tsv").write_text("\n".join(rows) + "\n")
    return folder


def image_of(folder: Path, number: int) -> Path:
    return folder / f"sub-PLANTED{number:02d}" / "anat" / f"sub-PLANTED{number:02d}_T1w.nii.gz"


def check(*arguments: object) -> Result:
    pictures = [] if {"--montage", "--quick"} & {*arguments} else ["--montage", "1"]
    result = RUNNER.invoke(app, ["check", *map(str, arguments), *pictures])
    assert result.exception is None or isinstance(result.exception, SystemExit)
    assert "Traceback" not in result.output
    return result


def found(*arguments: object) -> dict:
    """What --json says of the one site of a folder."""
    result = check(*arguments, "--json", "--montage", 0)
    told = json.loads(result.stdout)
    assert len(told["sites"]) == 1
    return told["sites"][0]


def outliers(told: dict) -> set[tuple[str, str]]:
    return {(problem["kind"], Path(problem["where"]).name[4:13]) for problem in told["outliers"]}


def test_a_good_folder_is_ready_and_the_next_command_is_told(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north")

    result = check(folder, *GRID)

    assert result.exit_code == 0
    assert "10 of 10 scans listed can be used" in result.stdout
    assert "no problems" in result.stdout
    assert "ready to train: 10 scans of 10 subjects" in result.stdout
    assert f"isocenter run data=folder data.root={folder}" in result.stdout
    assert "decoding 10 of 10 images" in result.stderr
    assert (tmp_path / "check-north" / "check.json").is_file()
    assert "\x1b" not in result.stdout


def test_what_was_decoded_is_what_a_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hospital(tmp_path / "north", 3)
    check(folder, *GRID)
    monkeypatch.setattr(cache_module, "load_volume", lambda *_: pytest.fail("decoded again"))

    again = check(folder, *GRID)

    assert "nothing to decode" in again.stderr
    assert "in the cache already" in again.stdout


def test_the_json_says_all_of_it_and_nothing_else_is_printed(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north")
    result = check(folder, *GRID, "--json")
    told = json.loads(result.stdout)

    assert told == json.loads((tmp_path / "check-north" / "check.json").read_text())
    assert (told["format"], told["ready"], told["layout"]) == ("isocenter-check-1", True, "bids")
    site = told["sites"][0]
    assert (site["site"], site["listed"], site["scans"], site["subjects"]) == ("north", 10, 10, 10)
    assert site["age_years"]["20-29"] == 4
    assert sum(site["age_years"].values()) == 10
    scanner = site["scanners"][0]
    assert scanner["sex"] == {"F": 5, "M": 5, "unknown": 0}
    assert scanner["diagnosis"] == {"control": 8, "patient": 2, "unknown": 0}
    assert scanner["age_years"] == [20, 33.5, 47]
    assert (scanner["voxel_sizes_mm"], scanner["grids"]) == ([[[6.0, 6.0, 6.0], 10]], [[[24, 28, 22], 10]])
    assert site["cache"]["images"] == site["cache"]["missing"] == 10
    assert site["cache"]["bytes"] == 10 * 24 * 28 * 22 * 2
    assert {scan["subject"] for scan in site["used"]} == {f"sub-PLANTED{number:02d}" for number in range(10)}


def test_the_picture_is_a_png_of_as_many_scans_as_wanted(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north")
    sizes = {}
    for number in (1, 12):
        check(folder, *GRID, "--montage", number, "--output", tmp_path / str(number))
        content = (tmp_path / str(number) / "montage.png").read_bytes()
        assert content[:8] == b"\x89PNG\r\n\x1a\n"
        sizes[number] = struct.unpack(">II", content[16:24])
    assert all(100 < side < 4000 for size in sizes.values() for side in size)
    assert sizes[1][1] < sizes[12][1]

    check(folder, *GRID, "--montage", 0, "--output", tmp_path / "none")
    assert [path.name for path in (tmp_path / "none").iterdir()] == ["check.json"]


def test_odd_scans_are_shown_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from core import report_check

    folder = hospital(tmp_path / "north")
    save(image_of(folder, 7), head(7)[:, :, ::-1])
    shown = []
    picked = report_check._picked
    monkeypatch.setattr(report_check, "_picked", lambda *args: shown.extend(picked(*args)) or picked(*args))

    check(folder, *GRID, "--montage", 3)

    assert [check.manifest.scans[number].subject for check, number, _ in shown] == [
        "sub-PLANTED07",
        "sub-PLANTED00",
        "sub-PLANTED09",
    ]
    assert [bool(why) for *_, why in shown] == [True, False, False]


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        (lambda values: values[:, :, ::-1], "unlike_site"),
        (lambda values: values[:, ::-1], "turned"),
        (lambda values: np.where(values > 0, 1, 0) * np.float32(200) - 0.9 * values, "unlike_site"),
        (lambda values: values * (np.indices(values.shape).sum(axis=0) % 2), "odd_sharpness"),
    ],
    ids=["upside down", "back to front", "inverted", "noise"],
)
def test_a_planted_picture_is_found(tmp_path: Path, change, kind: str) -> None:
    folder = hospital(tmp_path / "north")
    save(image_of(folder, 3), change(head(3)).astype(np.float32))

    assert (kind, "PLANTED03") in outliers(found(folder, *GRID))


def test_few_scans_tell_which_is_upside_down(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north", 4)
    assert found(folder, *GRID)["outliers"] == []

    save(image_of(folder, 3), head(3)[:, :, ::-1])
    told = found(folder, *GRID)["outliers"]

    assert [problem["what"].split(":")[0] for problem in told if problem["kind"] == "turned"] == ["upside down"]


def test_a_constant_offset_is_found_where_it_stays(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north")
    save(image_of(folder, 3), head(3) + 300)

    assert outliers(found(folder, *GRID, "data.normalisation=none")) >= {("odd_mean", "PLANTED03")}
    assert ("odd_mean", "PLANTED03") not in outliers(found(folder, *GRID))


def test_like_scans_have_no_outlier(tmp_path: Path) -> None:
    assert found(hospital(tmp_path / "north"), *GRID)["outliers"] == []


@pytest.mark.parametrize(
    ("shape", "sizes_mm", "flip", "kinds"),
    [
        (SHAPE, (6.7, 6.7, 6.7), False, {"odd_voxel_size"}),
        (SHAPE, (6.5, 6.5, 6.5), False, set()),
        ((24, 28, 34), (6, 6, 6), False, {"odd_grid"}),
        ((24, 28, 19), (6, 6, 6), False, {"odd_grid", "small_field"}),
        (SHAPE, (-6, 6, 6), True, {"odd_orientation"}),
        ((48, 56, 24), (3, 3, 5.5), False, {"odd_voxel_size", "odd_grid", "thick_slices"}),
    ],
)
def test_planted_geometry_is_found(
    tmp_path: Path, shape: tuple[int, int, int], sizes_mm: tuple[float, float, float], flip: bool, kinds: set[str]
) -> None:
    folder = hospital(tmp_path / "north")
    values = head(3, shape)
    save(image_of(folder, 3), values[::-1] if flip else values, sizes_mm)

    told = found(folder, *GRID, "--quick")

    assert outliers(told) == {(kind, "PLANTED03") for kind in kinds}


def test_an_oblique_scan_is_found(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north")
    turn = np.eye(4)
    turn[1:3, 1:3] = [[np.cos(0.4), -np.sin(0.4)], [np.sin(0.4), np.cos(0.4)]]
    nib.save(nib.Nifti1Image(head(3), turn @ np.diag([6, 6, 6, 1])), image_of(folder, 3))

    told = found(folder, *GRID, "--quick")

    assert outliers(told) == {("oblique", "PLANTED03")}
    assert "tilted by 23 degrees" in told["outliers"][0]["what"]


def test_a_quick_check_decodes_nothing_and_finds_what_headers_tell(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hospital(tmp_path / "north")
    image_of(folder, 2).write_bytes(b"")
    monkeypatch.setattr(cache_module, "load_volume", lambda *_: pytest.fail("decoded"))

    result = check(folder, *GRID, "--quick")

    assert result.exit_code == 0
    assert "9 of 10 scans listed can be used" in result.stdout
    assert "unreadable" in result.stdout
    assert "--quick: no image was decoded" in " ".join(result.stdout.split())
    assert not (tmp_path / "cache").exists()
    assert [path.name for path in (tmp_path / "check-north").iterdir()] == ["check.json"]


def test_an_unusable_share_stops_a_run_and_the_remedy_works(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north", 8)
    with (folder / "participants.tsv").open("a") as file:
        file.write("sub-GONE1\t50\tF\tcontrol\nsub-GONE2\t50\tF\tcontrol\n")

    result = check(folder, *GRID[:2], "--montage", 0)
    words = " ".join(result.stdout.split())

    assert result.exit_code == 1
    assert "a run would stop: 2 of 10 scans listed cannot be used (no_image 2), more than data.max_unusable=0.05" in words
    assert "data.max_unusable=0.2 or more" in words
    assert check(folder, *GRID[:2], "data.max_unusable=0.2", "--quick").exit_code == 0
    assert check(folder, *GRID[:2], "data.max_unusable=0.19", "--quick").exit_code == 1


@pytest.mark.parametrize("quick", [[], ["--quick"]])
def test_no_scan_left_stops_a_run(tmp_path: Path, quick: list[str]) -> None:
    folder = hospital(tmp_path / "north", 3)
    for number in range(3):
        image_of(folder, number).write_bytes(b"")

    result = check(folder, *GRID, "data.max_unusable=1", *quick)

    assert result.exit_code == 1
    assert "a run would stop: no scan is left: none of 3 listed can be used (unreadable 3)" in " ".join(result.stdout.split())


def test_copies_and_duplicates_are_told(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "north")
    image_of(folder, 8).write_bytes(image_of(folder, 9).read_bytes())

    told = found(folder, *GRID)

    assert told["problem_counts"] == {"duplicate": 2}
    assert told["scans"] == 8


def test_sites_that_cannot_be_understood_stop_a_run_and_the_others_are_checked(tmp_path: Path) -> None:
    hospital(tmp_path / "all" / "north", 6)
    hospital(tmp_path / "all" / "south", 2)
    (tmp_path / "all" / "south" / "participants.tsv").write_text("age\tsex\n30\tF\n")

    result = check(tmp_path / "all", *GRID)

    assert result.exit_code == 1
    assert "6 of 6 scans listed can be used" in result.stdout
    assert "a run would stop: south:" in result.stdout


def test_too_few_controls_to_pretrain_alone_are_told(tmp_path: Path) -> None:
    result = check(hospital(tmp_path / "north", 4), *GRID)

    assert result.exit_code == 0
    assert "alone it cannot pretrain" in result.stdout
    assert MIN_TRAIN_CONTROLS == MIN_CONTRAST_SUBJECTS


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["missing"], "FOLDER must be there, got 'missing'"),
        (["empty"], "data.root: it must hold"),
        (["empty", "data.voxel=2"], "nearest: data.voxel_size_mm"),
        (["empty", "data.root=/tmp"], "Leave one out"),
        (["north", "data.shape=[0,1,1]"], "data.shape"),
        (["north", "data.layout=openbhb"], "north"),
        (["north", "data.mask=nowhere.nii"], "nowhere.nii"),
        (["north/participants.tsv", "data.columns.age=years"], "years"),
        (["north/sub-PLANTED00/anat/sub-PLANTED00_T1w.nii.gz"], "Name the folder that holds it"),
        (["bad.npz"], "bad.npz"),
    ],
)
def test_what_is_not_understood_is_one_sentence(tmp_path: Path, arguments: list[str], says: str) -> None:
    hospital(tmp_path / "north", 2)
    (tmp_path / "empty").mkdir()
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04")

    result = check(*arguments, "--output", "out")

    assert result.exit_code == 2
    assert result.stdout == ""
    assert says in result.stderr


def test_a_cache_that_cannot_be_written_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hospital(tmp_path / "north", 6)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "file" / "cache"))

    result = check(folder, *GRID)

    assert result.exit_code == 1
    assert "ISOCENTER_CACHE" in result.stdout


def test_flat_pictures_are_checked_too(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    arrays = {f"{split}_images": random.integers(0, 255, (8, 28, 28), np.uint8) for split in ("train", "val", "test")}
    labels = {f"{split}_labels": np.arange(8)[:, None] % 2 for split in ("train", "val", "test")}
    np.savez(tmp_path / "mine.npz", **arrays, **labels)

    result = check("mine.npz", "data.num_sites=1")

    assert result.exit_code == 0
    assert "24 of 24 scans" in result.stdout
    assert "experiment=medmnist data.spatial=2" in result.stdout
    assert (tmp_path / "check-mine" / "montage.png").is_file()


def test_pictures_stand_upright() -> None:
    flat = np.zeros((1, 3, 2), np.float32)
    flat[0, 2, 0] = 1
    np.testing.assert_array_equal(_slices(flat), [[0, 0, 1], [0, 0, 0]])
    assert _slices(np.repeat(flat, 3, axis=0)).shape == (2, 3, 3)

    volume = np.zeros((1, 5, 5, 5), np.float32)
    volume[0, 4, 2, 2] = volume[0, 2, 4, 2] = volume[0, 2, 2, 4] = 1
    seen = _slices(volume)
    above, front, left = seen[:, :5], seen[:, 6:11], seen[:, 12:17]
    # Right is right, front and top are up; the face looks to the right.
    assert [above[2, 4], above[0, 2], front[2, 4], front[0, 2], left[2, 4], left[0, 2]] == [1.0] * 6
    assert seen.sum() == 6


def test_a_table_of_features_is_checked_too(tmp_path: Path) -> None:
    rows = "".join(f"p{number},{20 + number},F,{number * 0.1},{number * 0.2}\n" for number in range(9))
    (tmp_path / "mine.csv").write_text("subject,age,sex,thick_a,thick_b\n" + rows)

    result = check("mine.csv")

    assert result.exit_code == 0
    assert "2 features" in result.stdout
    assert not (tmp_path / "check-mine" / "montage.png").exists()


def test_names_that_steer_a_terminal_or_a_markup_are_shown_as_text(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "[bold]north", 6)
    strange = folder / "sub-PLANTED00" / "anat" / "sub-\x1b[31mX_T1w.nii.gz"
    strange.write_bytes(b"no image")

    result = check(folder, *GRID)

    assert "\x1b" not in result.stdout + result.stderr
    assert "[bold]north" in result.stdout


def test_the_shared_file_tells_no_name_and_no_small_count(tmp_path: Path) -> None:
    folder = hospital(tmp_path / "SECRETSITE", 14)
    with (folder / "participants.tsv").open("a") as file:
        file.write("sub-PLANTED99\t50\tF\tcontrol\n")

    check(folder, *GRID, "--share", tmp_path / "share.json", "--quick")
    text = (tmp_path / "share.json").read_text()
    told = json.loads(text)

    assert not re.search(r"PLANTED|SECRET|sub-|/|\\", text)
    assert told["subjects"] == 15
    # 7 women and 7 men, 11 controls and 3 patients: the controls would tell the patients.
    assert told["sex"] == {"F": "<10", "M": "<10", "unknown": "<10"}
    assert told["diagnosis"] == {"control": "hidden", "patient": "<10", "unknown": "<10"}
    assert told["voxel_sizes_mm"] == [{"voxel_size_mm": [6.0, 6.0, 6.0], "subjects": 15}]
    assert told["problems"]["no_image"] == "<10"
    numbers = [int(number) for number in re.findall(r": (\d+)\b", text)]
    assert all(number % 5 == 0 and number >= 10 for number in numbers)


def test_the_rows_of_the_shared_file_tell_nothing(tmp_path: Path) -> None:
    empty = shareable([SiteCheck(site="north", manifest=Manifest("north", ()))])
    scans = [Scan(f"s{n}", "", "north", "m", tmp_path / str(n), 30.0, "F", "control") for n in range(40)]
    full = shareable([SiteCheck(site="north", manifest=Manifest("north", tuple(scans)))])

    assert [list(empty[key]) for key in ("sex", "diagnosis", "age_years", "problems")] == [
        list(full[key]) for key in ("sex", "diagnosis", "age_years", "problems")
    ]
    assert full["age_years"]["30-39"] == full["subjects"] == 40


@pytest.mark.parametrize("counts", [(100, 9), (10, 1), (9, 9), (50, 5, 5), (50, 0), (30, 20, 3), (12, 11, 1, 1)])
def test_the_total_less_what_is_shown_is_never_a_small_group(counts: tuple[int, ...]) -> None:
    told = suppressed({str(index): count for index, count in enumerate(counts)})
    hidden = sum(count for count, shown in zip(counts, told.values(), strict=True) if isinstance(shown, str))
    assert hidden == 0 or hidden >= 10
    for count, shown in zip(counts, told.values(), strict=True):
        assert shown in ("hidden", "<10") or (isinstance(shown, int) and abs(shown - count) <= 2 and count >= 10)
        assert (shown == "<10") == (count < 10)


def test_every_kind_of_problem_has_its_sentence() -> None:
    sources = "".join(path.read_text() for path in (ROOT / "core" / "data").glob("*.py"))
    kinds = set(re.findall(r"(?:Problem|Flaw)\(\s*\"(\w+)\"", sources)) | set(ASIDE) | UNUSABLE_KINDS | OUTLIER_KINDS
    kinds |= {"double_row", "bad_sex", "bad_split", *(f"contradictory_{name}" for name in ("sex", "diagnosis", "split"))}
    kinds |= {f"odd_{name}" for name in ("foreground", "mean", "spread", "sharpness")}

    assert kinds == set(MEANINGS)
    assert all(meaning.what.endswith(".") and meaning.remedy.endswith((".", "?")) for meaning in MEANINGS.values())


def test_memory_holds_no_volume_of_a_site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hospital(tmp_path / "north")
    read = preflight.picture
    volumes: list[weakref.ref[NDArray[np.float32]]] = []
    alive = []

    def counted(store: Store, number: int) -> NDArray[np.float32]:
        volume = read(store, number)
        volumes.append(weakref.ref(volume))
        alive.append(sum(volume() is not None for volume in volumes))
        return volume

    monkeypatch.setattr(preflight, "picture", counted)

    found(folder, *GRID)

    assert len(alive) == 20
    assert max(alive) <= 2


def test_geometry_is_what_decoding_finds(tmp_path: Path) -> None:
    values = head(0)
    affine = np.zeros((4, 4))
    affine[0, 2], affine[1, 0], affine[2, 1], affine[3, 3] = -1.5, 2, 3, 1
    path = tmp_path / "a.nii.gz"
    nib.save(nib.Nifti1Image(values, affine), path)

    geometry, image = read_geometry(path), decode(path)

    assert geometry.shape == image.values.shape == (22, 24, 28)
    np.testing.assert_allclose(geometry.voxel_sizes_mm, image.voxel_sizes_mm)
    assert geometry.voxel_sizes_mm == (1.5, 2.0, 3.0)
    assert (geometry.stored_orientation, geometry.stored_dtype) == (image.stored_orientation, image.stored_dtype)
    assert geometry.oblique_degrees == image.oblique_degrees

    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    assert read_geometry(path) == geometry
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: "):
        decode(path)
    path.write_bytes(b"no image")
    with pytest.raises(VolumeError, match=r"a\.nii\.gz: "):
        read_geometry(path)


@pytest.mark.skipif(not (SHARED / "ds002748_t1w").is_dir(), reason="../shared/data is not there")
@pytest.mark.parametrize(
    ("name", "overrides", "code"),
    [
        ("ds002748_t1w", [], 1),
        ("ds002748_t1w", ["data.max_unusable=1"], 0),
        ("open_ms_t1w", ["data.max_unusable=1"], 0),
        ("ixi_hh_2mm", [], 0),
        ("mcic_vbm_4mm", [], 0),
        ("nifti_corner_cases", [], 1),
        ("medmnist/breastmnist.npz", [], 0),
        ("medmnist", [], 2),
    ],
)
def test_real_folders_get_their_verdict(name: str, overrides: list[str], code: int) -> None:
    assert check(SHARED / name, *overrides, "--quick").exit_code == code


@pytest.mark.parametrize("name", ["hôpital nord", "it's [1] {2}", "a,b=c", 'say "x"', "$x ~y", "back\\slash"])
def test_any_name_of_a_folder_is_read_and_its_next_command_too(tmp_path: Path, name: str) -> None:
    folder = hospital(tmp_path / name, 6)

    told = json.loads(check(folder, *GRID, "--quick", "--json").stdout)

    assert told["folder"] == str(folder)
    overrides = shlex.split(told["next"])[2:]
    assert load_config(overrides).data.root == folder
