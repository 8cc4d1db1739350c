"""Tables of regional features: read as they come, standardised from sums, and run through the real apps."""

import json
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from typer.testing import CliRunner

from client.app import app as client_app
from client.site import holdings, this_site
from core.checkpoint import load_checkpoint
from core.config import load_config
from core.data.manifest import UnusableScansError, check_problem_share
from core.data.site import SiteData
from core.data.table import Columns, FeatureRows, TableError, TableSource
from core.faults import SiteError
from core.models import MLP, build_pretrainer, split_constants
from core.scaling import input_sums, standardisation_from, without_rare_values
from core.settings import MomentPolicy
from server.app import app as server_app
from server.strategy import RunError
from simulations.cli import register
from simulations.in_process import run_in_process

pytestmark = pytest.mark.usefixtures("unpainted")

TABULAR = Path(__file__).parents[2] / "shared" / "data" / "tabular"
needs_data = pytest.mark.skipif(not TABULAR.is_dir(), reason="../shared/data/tabular is not here: public tables, not shipped")
ABIDE = TABULAR / "abide_fs" / "FS_features_ABIDE_males.csv"
IXI = (TABULAR / "ixi" / "IXI_aparc_thickness.csv", TABULAR / "ixi" / "ixi_sites.tsv")
OPEN = MomentPolicy(min_group=1, diagonal_subjects=1)
Rows = Sequence[Sequence[object]]

HEADER = ("participant_id", "age", "sex", "site", "diagnosis", "thick", "volume")
ROWS = (
    ("s1", 30, "F", "north", "control", 2.5, 1000),
    ("s2", 40.5, "male", "north", "Patient", 2.25, 1100),
    ("sub-s3", 50, "m", "south", "control", 3, 900),
)


def write(path: Path, header: Sequence[str] = HEADER, rows: Rows = ROWS, delimiter: str = ",") -> Path:
    path.write_text("\n".join(delimiter.join(map(str, row)) for row in (header, *rows)) + "\n", encoding="utf-8")
    return path


def source(table: Path, participants: Path | None = None, **columns: object) -> TableSource:
    return TableSource(table, participants, Columns(**columns))  # type: ignore[arg-type]


def changed(row: int, column: str, value: object) -> Rows:
    """The rows with one cell changed."""
    return [
        [value if (r, name) == (row, column) else cell for name, cell in zip(HEADER, cells, strict=True)]
        for r, cells in enumerate(ROWS)
    ]


def test_a_plain_table_becomes_manifests_and_features(tmp_path: Path) -> None:
    found = source(write(tmp_path / "t.csv"))
    assert found.sites() == ("north", "south")
    manifest, features = found.open("north")
    assert [(s.subject, s.session, s.site, s.scanner) for s in manifest.scans] == [
        ("sub-s1", "", "north", "north"), ("sub-s2", "", "north", "north")
    ]  # fmt: skip
    assert [(s.age_years, s.sex, s.diagnosis) for s in manifest.scans] == [(30.0, "F", "control"), (40.5, "M", "patient")]
    assert manifest.problems == ()
    assert features.names == ("thick", "volume")
    rows_BF = torch.empty(3, 2)
    features.fill(rows_BF, [1, 0, 1])
    assert rows_BF.tolist() == [[2.25, 1100], [2.5, 1000], [2.25, 1100]]
    assert features.values_NF.dtype == np.float32


@given(
    delimiter=st.sampled_from(",;\t"),
    newline=st.sampled_from(["\n", "\r\n", "\r"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    shout=st.booleans(),
    order=st.permutations(range(len(HEADER))),
    quote=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_how_a_table_is_written_does_not_matter(
    tmp_path_factory: pytest.TempPathFactory,
    delimiter: str,
    newline: str,
    encoding: str,
    shout: bool,
    order: list[int],
    quote: bool,
) -> None:
    folder = tmp_path_factory.mktemp("tables")
    mark = '"' if quote else ""
    header = [name.upper() if shout else name for name in HEADER]
    lines = [delimiter.join(f"{mark}{row[i]}{mark}" for i in order) for row in (header, *ROWS)]
    (folder / "t").write_bytes((newline.join([*lines, ""]) + newline).encode(encoding))
    manifest, features = source(folder / "t").open("north")
    expected_manifest, expected = source(write(folder / "plain")).open("north")
    assert [replace(s, path=Path()) for s in manifest.scans] == [replace(s, path=Path()) for s in expected_manifest.scans]
    assert features.signature == expected.signature
    assert np.array_equal(features.values_NF, expected.values_NF)


@given(values=st.lists(st.one_of(st.none(), st.floats(width=32, allow_nan=False, allow_infinity=False)), min_size=2, max_size=12))
@settings(max_examples=40, deadline=None)
def test_every_number_is_read_back_and_every_gap_is_counted(
    tmp_path_factory: pytest.TempPathFactory, values: list[float | None]
) -> None:
    path = tmp_path_factory.mktemp("tables") / "one.csv"
    write(path, ("subject", "a", "b"), [(f"{i:03d}", "" if v is None else repr(v), 1) for i, v in enumerate(values)])
    manifest, features = source(path).open("any")
    expected = np.array([math.nan if v is None else v for v in values], np.float32)
    assert np.array_equal(features.values_NF[:, 0], expected, equal_nan=True)
    assert manifest.problem_counts().get("missing_features", 0) == values.count(None)
    assert len(manifest.scans) == len(values)


def test_a_table_without_sites_is_one_site_of_any_name(tmp_path: Path) -> None:
    table = write(tmp_path / "our table.csv", HEADER[:3] + HEADER[4:], [row[:3] + row[4:] for row in ROWS])
    assert source(table).sites() == ("our-table",)
    manifest, _ = source(table).open("hospital-7")
    assert {scan.site for scan in manifest.scans} == {"hospital-7"}
    assert len(manifest.scans) == 3


def test_a_site_may_be_the_beginning_of_an_id(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", ("FILE_ID", "age", "x"), [("UM_1_001", 5, 1), ("UM_2_001", 6, 2), ("KKI_007", 7, 3)])
    found = source(table, subject="file_id", site="FILE_ID", site_pattern=r"(.+)_\d+")
    assert found.sites() == ("KKI", "UM_1", "UM_2")
    assert [scan.subject for scan in found.open("UM_2")[0].scans] == ["sub-UM_2_001"]
    assert found.open("KKI")[1].names == ("x",)


def test_codes_of_labels_and_of_missing_values(tmp_path: Path) -> None:
    rows = [("a", 20, 1, 2, 1), ("b", 30, 2.0, "1.0", -9999), ("c", -9999, 3, "HC", 3), ("d", 50, "-9999.0", -9999, 4)]
    table = write(tmp_path / "t.csv", ("subject", "age", "sex", "dx", "x"), rows)
    columns = {"males": ("1",), "females": ("2",), "controls": ("1", "hc"), "patients": ("2",), "missing": ("-9999",)}
    manifest, features = source(table, **columns).open("any")
    assert [(s.age_years, s.sex, s.diagnosis) for s in manifest.scans] == [
        (20.0, "M", "patient"), (30.0, "F", "control"), (None, None, "control"), (50.0, None, None)
    ]  # fmt: skip
    assert manifest.problem_counts() == {"bad_sex": 1, "missing_features": 1, "no_age": 1, "no_diagnosis": 1}
    assert np.isnan(features.values_NF[:, 0]).tolist() == [False, True, False, False]


@pytest.mark.parametrize(
    ("column", "value", "kind"),
    [
        ("age", "", "no_age"),
        ("age", "n/a", "no_age"),
        ("age", "89+", "capped_age"),
        ("age", "999", "bad_age"),
        ("diagnosis", "7", "bad_diagnosis"),
        ("age", "250", "bad_age"),
        ("age", "inf", "bad_age"),
        ("sex", "x", "bad_sex"),
        ("diagnosis", "NaN", "no_diagnosis"),
        ("thick", "", "missing_features"),
        ("volume", "nan", "missing_features"),
        ("site", "", "no_site"),
    ],
)
def test_what_is_missing_or_wrong_is_counted_by_kind(tmp_path: Path, column: str, value: str, kind: str) -> None:
    manifest, _ = source(write(tmp_path / "t.csv", rows=changed(0, column, value))).open("north")
    assert manifest.problem_counts() == {kind: 1}
    assert len(manifest.scans) == (1 if kind == "no_site" else 2)
    check_problem_share(manifest)


def test_without_a_diagnosis_all_are_controls_and_the_log_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    table = write(tmp_path / "t.csv", ("subject", "x"), [("a", 1), ("b", 2)])
    with caplog.at_level(logging.WARNING, "isocenter"):
        manifest, _ = source(table).open("any")
    assert {scan.diagnosis for scan in manifest.scans} == {"control"}
    assert "no column 'diagnosis': every subject of site any counts as control" in caplog.text
    assert "no column 'age': every subject of site any has no age" in caplog.text


def test_a_split_and_a_data_dictionary_beside_the_table_are_read(tmp_path: Path) -> None:
    rows = [("a", 24, 1, 2, "internal_test", 5), ("b", 36, 2, 1, "training", 6), ("c", 36, 3, 1, "later", 7)]
    table = write(tmp_path / "t.csv", ("subject", "age", "sex", "dx", "split", "x"), rows)
    sex, diagnosis = {"1": "male", "2": {"Description": "Female"}}, {"1": "Healthy volunteer", "2": "patient with depression"}
    told = {"age": {"Units": "month"}, "sex": {"Levels": sex}, "dx": {"Levels": diagnosis}}
    table.with_suffix(".json").write_text(json.dumps(told))
    manifest, features = source(table).open("any")
    assert [(s.age_years, s.sex, s.diagnosis, s.split) for s in manifest.scans] == [
        (2.0, "M", "patient", "test"), (3.0, "F", "control", "train"), (3.0, None, "control", None)
    ]  # fmt: skip
    assert manifest.problem_counts() == {"bad_sex": 1, "bad_split": 1}
    assert features.names == ("x",)


def test_a_scanner_is_read_and_missing_ones_are_counted(tmp_path: Path) -> None:
    table = write(tmp_path / "t.csv", ("subject", "scanner", "x"), [("a", "prisma", 1), ("b", "", 2)])
    manifest, _ = source(table).open("any")
    assert [scan.scanner for scan in manifest.scans] == ["prisma", "any"]
    assert manifest.problem_counts()["no_scanner"] == 1


def test_participants_are_joined_and_what_has_no_partner_is_counted(tmp_path: Path) -> None:
    table = write(tmp_path / "f.csv", ("participant_id", "age", "x"), [("a", 99, 1), ("sub-b", 99, 2), ("c", 99, 3)])
    people = write(tmp_path / "p.tsv", ("subject_id", "age", "site", "iq"), [("sub-a", 20, "n", 1), ("b", 30, "n", 2)], "\t")
    with people.open("a") as file:
        file.write("d\t40\tn\t4\n")
    manifest, features = source(table, people).open("n")
    # An age in both counts as the participants have it, and is no feature; numbers of the participants are none either.
    assert [(scan.subject, scan.age_years) for scan in manifest.scans] == [("sub-a", 20.0), ("sub-b", 30.0)]
    assert features.names == ("x",)
    assert manifest.problem_counts() == {"no_features": 1, "no_site": 1}
    with pytest.raises(UnusableScansError, match="got 1 of 3, no_features 1"):
        check_problem_share(manifest)
    without_site = write(tmp_path / "p2.tsv", ("subject", "age"), [("a", 20), ("b", 30)], "\t")
    assert source(table, without_site).open("any")[0].problem_counts() == {"no_row": 1}


def test_features_are_all_other_numbers_or_those_asked_for(tmp_path: Path) -> None:
    table = write(
        tmp_path / "t.csv", ("", "subject", "lh_a", "rh_a", "LH_b", "note", "empty", "age"), [(0, "s", 1, 2, 3, "ok", "", 5)]
    )
    assert source(table).open("any")[1].names == ("empty", "lh_a", "lh_b", "rh_a")
    assert source(table, ignore=("RH_*", "empty")).open("any")[1].names == ("lh_a", "lh_b")
    assert source(table, features=("lh_*",)).open("any")[1].names == ("lh_a", "lh_b")
    with pytest.raises(TableError, match=r"data.columns.features: each pattern must match a column of the table, got 'th_\*'"):
        source(table, features=("th_*",)).open("any")
    with pytest.raises(TableError, match="column note: a feature must be a finite number"):
        source(table, features=("*",)).open("any")


def test_targets_of_both_files_are_read_and_never_features(tmp_path: Path) -> None:
    rows = [("a", "MCI", 7, 28, 1), ("b", "hc", 8, "na", 2)]
    table = write(tmp_path / "f.csv", ("subject", "dx", "iq", "MMSE", "x"), rows)
    people = write(tmp_path / "p.tsv", ("subject", "IQ"), [("a", 101.5), ("b", "1e2")], "\t")
    columns = {"targets": ("Iq", "dx", "mmse ")}
    manifest, features = source(table, people, **columns).open("any")
    assert [scan.targets for scan in manifest.scans] == [
        (("Iq", "101.5"), ("dx", "MCI"), ("mmse ", "28")), (("Iq", "1e2"), ("dx", "hc"), ("mmse ", ""))
    ]  # fmt: skip
    assert [scan.diagnosis for scan in manifest.scans] == ["patient", "control"]
    assert features.names == ("x",)
    with pytest.raises(TableError, match="each pattern must match a column of the table, got 'mmse'"):
        source(table, people, features=("mmse",), **columns).sites()
    assert source(table, people).open("any")[1].names == ("iq", "mmse", "x")


SECRET = "DOE_JOHN"


@pytest.mark.parametrize(
    ("text", "columns", "says"),
    [
        (f"subject,x\n{SECRET},1\nb,1,2\n", {}, "data.table: every row must have 2 cells"),
        (f"subject,x\n{SECRET},1\n{SECRET},2\n", {}, "column subject: a subject must have one row"),
        (f"subject,x\n,1\n{SECRET},2\n", {}, "column subject: it must be filled in every row"),
        (f"subject,x\n{SECRET},1\nb,{SECRET}\n", {}, "data.table: column x: a feature must be a finite number"),
        (f"subject;x;y\n{SECRET};1,5;2\nb;1;2\n", {}, "column x: .* with a decimal point, 1 of 2 cells are not"),
        (f"subject,x\n{SECRET},1e39\nb,1\n", {}, "column x: a feature must be a finite number"),
        (f"subject,x\n{SECRET},inf\nb,1\n", {}, "column x: a feature must be a finite number"),
        (f"subject,age_at_scan,age_at_visit,x\n{SECRET},1,1,1\n", {}, "one column must be the age, and 2 fit, got age_at_scan"),
        (f"{SECRET},1,1\nb,1,2\n", {}, "one column must be the subject's name, got 3 columns"),
        (f"subject,x,X\n{SECRET},1,2\n", {}, "each column must be named once .* got 'x' twice"),
        (f"subject,x\n{SECRET},text\n", {}, "must have a column of numbers that is a feature, got 1 columns of text"),
        (f"subject,site,x\n{SECRET},Our House,1\n", {}, "a site's name must be at most 64 letters.*site_pattern"),
        (f"subject,site,x\n{SECRET},n,1\n", {"site_pattern": r"(\d+)"}, "every cell must match site_pattern, 1 of 1 do not"),
        (
            f"subject,x\n{SECRET},1\n",
            {"age": "aje"},
            "data.columns.age: it must be a column of the table, got 'aje'; .*participants",
        ),
        (f"subject,age_y,x\n{SECRET},3,1\n", {"age": "age_x"}, "nearest: age_y"),
        (f"subject,mmse,x\n{SECRET},3,1\n", {"targets": ("MMZE",)}, "columns.targets: it must .*, got 'MMZE'; nearest: mmse; if"),
        (f'subject,x\n"{SECRET},1\n', {}, "must be UTF-8 text, separated by comma, semicolon or tab"),
        ("", {}, "one column must be the subject's name, got 0 columns"),
    ],
)
def test_a_table_that_cannot_be_understood_is_refused_without_naming_anyone(
    tmp_path: Path, text: str, columns: dict[str, object], says: str
) -> None:
    (tmp_path / "t.csv").write_text(text)
    with pytest.raises(TableError, match=says) as error:
        source(tmp_path / "t.csv", **columns).open("n")
    assert SECRET not in str(error.value)
    assert str(tmp_path) not in str(error.value)


def test_the_local_log_tells_what_the_error_does_not(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "t.csv").write_text(f"subject,x\n{SECRET},z\nb,1\n")
    with pytest.raises(TableError):
        source(tmp_path / "t.csv").sites()
    assert SECRET in caplog.text


def test_other_bytes_and_missing_files_and_sites_are_refused(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_bytes("subject,x\nJosé,1\n".encode("latin-1"))
    with pytest.raises(TableError, match="must be UTF-8 text"):
        source(tmp_path / "t.csv").sites()
    with pytest.raises(TableError, match=r"data.table: it must be an existing file"):
        source(tmp_path / "absent.csv").sites()
    table = write(tmp_path / "u.csv")
    with pytest.raises(TableError, match=r"data.participants: it must be an existing file"):
        source(table, tmp_path / "absent.tsv").sites()
    with pytest.raises(TableError, match=r"data.columns.site: the column must hold this site's name"):
        source(table).open("west")


def test_a_changed_file_is_read_again(tmp_path: Path) -> None:
    found = source(write(tmp_path / "t.csv"))
    assert len(found.sites()) == 2
    write(tmp_path / "t.csv", rows=ROWS[:2])
    assert len(found.sites()) == 1


@needs_data
def test_abide_is_read_as_it_is() -> None:
    config = load_config(f"experiment=abide data.table={ABIDE}")
    found = config.data.source(Path(), config.data.places)
    opened = [found.open(site) for site in found.sites()]
    scans = [scan for manifest, _ in opened for scan in manifest.scans]
    assert (len(opened), len(scans), {features.num_inputs for _, features in opened}) == (24, 915, {419})
    assert [manifest.problems for manifest, _ in opened] == [()] * 24
    assert (sum(s.diagnosis == "control" for s in scans), sum(s.diagnosis == "patient" for s in scans)) == (464, 451)
    assert {scan.sex for scan in scans} == {"M"}
    assert {"UM_1", "UM_2", "CMU_a", "Trinity"} < set(found.sites())


@needs_data
def test_ixi_is_joined_with_its_participants() -> None:
    config = load_config(f"experiment=ixi data.table={IXI[0]} data.participants={IXI[1]}")
    found = config.data.source(Path(), config.data.places)
    assert found.sites() == ("Guys", "HH", "IOP")
    opened = [found.open(site)[0] for site in found.sites()]
    assert [len(manifest.scans) for manifest in opened] == [313, 180, 68]
    assert sum(scan.age_years is not None for manifest in opened for scan in manifest.scans) == 558
    assert [manifest.problem_counts() for manifest in opened] == [
        {"no_age": 2, "no_features": 3, "no_site": 15},
        {"no_features": 1, "no_site": 15},
        {"no_age": 1, "no_features": 2, "no_site": 15},
    ]
    for manifest in opened:
        check_problem_share(manifest)


def sites_of_rows(seed: int = 0, sizes: Sequence[int] = (7, 30, 12), missing: float = 0.1) -> list[torch.Tensor]:
    random = np.random.default_rng(seed)
    rows = [random.normal(1e6, [1.0, 1e3, 1e5, 0.1, 10], (n, 5)) - [1e6, 0, 0, 1e6, 1e6] for n in sizes]
    for part in rows:
        part[random.random(part.shape) < missing] = np.nan
    return [torch.from_numpy(part) for part in rows]


@pytest.mark.parametrize("missing", [0.0, 0.1, 0.5])
def test_standardisation_from_sums_equals_the_pooled_one(missing: float) -> None:
    rows = sites_of_rows(missing=missing)
    found = standardisation_from([input_sums(part, OPEN) for part in rows])
    pooled = torch.cat(rows).numpy()
    assert found.mean_D.numpy() == pytest.approx(np.nanmean(pooled, axis=0), rel=1e-12)
    assert found.scale_D.numpy() == pytest.approx(np.nanstd(pooled, axis=0), rel=1e-5)


def test_the_policy_holds_for_each_feature() -> None:
    [rows] = sites_of_rows(sizes=(20,), missing=0.0)
    rows[:15, 1] = torch.nan  # 5 are left
    rows[:, 2] = torch.nan
    rows[:8, 3] = torch.nan  # 12 are left
    sums = input_sums(rows, MomentPolicy(min_group=10, diagonal_subjects=15))
    assert sums.isnan().tolist() == [[False, True, True, False, False], [False, True, True, False, False],
                                     [False, True, True, True, False]]  # fmt: skip
    assert input_sums(rows[:0], OPEN).isnan().all()


def test_a_feature_that_few_of_a_scanner_have_is_missing_there() -> None:
    scanner = torch.tensor([0] * 4 + [3] * 5)
    rows = torch.arange(18.0).reshape(9, 2)
    rows[0, 0] = rows[4:7, 0] = torch.nan  # 3 are left at the first scanner, 2 at the other
    before = rows.clone()
    found = without_rare_values(rows, scanner, MomentPolicy(min_group=3))
    expected = rows.clone()
    expected[4:, 0] = torch.nan
    torch.testing.assert_close(found, expected, equal_nan=True, rtol=0, atol=0)
    torch.testing.assert_close(rows, before, equal_nan=True, rtol=0, atol=0)


def test_sites_that_withhold_are_no_part_of_it_and_a_feature_that_nobody_tells_stops() -> None:
    small, large, _ = sites_of_rows(missing=0.0)
    policy = MomentPolicy(min_group=10, diagonal_subjects=20)
    together = standardisation_from([input_sums(part, policy) for part in (small, large)])
    alone = standardisation_from([input_sums(large, policy)])
    assert torch.equal(together.mean_D, alone.mean_D)
    with pytest.raises(ValueError, match=r"none for 5 of 5, the first is number 1 by name.*diagonal-subjects"):
        standardisation_from([input_sums(small, policy)])
    large[:, 2] = torch.nan
    with pytest.raises(ValueError, match="none for 1 of 5, the first is number 3 by name"):
        standardisation_from([input_sums(large, policy)])


def test_a_constant_feature_has_scale_1() -> None:
    found = standardisation_from([input_sums(torch.full((9, 1), 3.7), OPEN)])
    assert (float(found.mean_D), float(found.scale_D)) == (pytest.approx(3.7), 1.0)


def test_the_encoder_of_rows_begins_with_constants_that_no_one_trains() -> None:
    model = build_pretrainer(MLP(width=16, depth=3), 4, 0, num_inputs=5)
    assert set(constants(model.state_dict())) == {
        f"encoder.standardise.{name}" for name in ("mean", "scale", "directions", "erased_scale")
    }
    model.encoder.standardise.mean.copy_(torch.arange(5.0))
    model.encoder.standardise.scale.copy_(torch.full((5,), 2.0))
    h, z = model(torch.tensor([[0.0, 1, 2, 3, 4], [torch.nan] * 5, [2.0, 3, 4, 5, 6]]))
    assert (h.shape, z.shape) == ((3, 16), (3, 4))
    assert torch.equal(h[0], h[1])  # a missing feature is at its mean
    assert not torch.equal(h[0], h[2])
    z.square().sum().backward()
    untrained = [name for name, p in model.named_parameters() if p.grad is None]
    assert set(untrained) == set(constants(model.state_dict()))


def write_consortium(path: Path, *, sizes: Sequence[int] = (30, 26, 40, 3), missing: float = 0.02) -> Path:
    """A table of four sites, the last too small to contrast: features that follow age, and each site's own offset."""
    random = np.random.default_rng(0)
    rows: list[list[object]] = []
    for site, size in zip("abcd", sizes, strict=True):
        offset = random.normal(0, 1, 6)
        for number in range(size):
            age = 20 + 60 * random.random()
            x = 100 * (age / 20 * np.arange(1, 7) % 3 + offset + random.normal(0, 0.3, 6)) + 5000
            cells = ["n/a" if random.random() < missing else f"{value:.3f}" for value in x]
            patient = "patient" if site == "c" and number % 2 else "control"
            rows.append([f"{site}{number:02d}", f"{age:.1f}", "FM"[number % 2], site, patient, *cells])
    return write(path, ("participant_id", "age", "sex", "site", "diagnosis", *(f"f{i}" for i in range(6))), rows)


TINY = (
    "experiment=roi debias=fairkl num_rounds=2 local_steps=2 batch_size=8 warmup_rounds=0 encoder.width=8 embedding_size=4 "
    "debias.warmup_rounds=0 debias.exchange_every=1 debias.bin_years=10 policy.min_group=4 policy.diagonal_subjects=10 "
    "policy.share_per_scan=false"
)
NodeConfigs = dict[int, dict[str, str | int | bool | float]]


@pytest.fixture
def federate_table(tmp_path: Path) -> Callable[..., Path]:
    """Run the real apps over a table, in this process; the run's folder."""

    def run(table: Path, *overrides: str, name: str = "run", nodes: NodeConfigs | None = None) -> Path:
        sites = source(table).sites()
        virtual: NodeConfigs = {i + 1: {"partition-id": i, "num-partitions": len(sites)} for i in range(len(sites))}
        text = " ".join([TINY, f"data.table={table}", f"output={tmp_path / 'runs'}", f"name={name}", *overrides])
        run_in_process(server_app, client_app, text, nodes or virtual)
        return tmp_path / "runs" / name

    return run


def constants(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return split_constants(state)[1]


def last(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(max((folder / "checkpoints").glob("pretrain-*.safetensors")))


@pytest.mark.parametrize(
    ("override", "asked", "directions"),
    [
        ("debias.erase=h encoder.width=40", False, {2}),  # two of 40 features are few
        ("debias.erase=h encoder.width=39", True, {0, 1, 2}),
        ("debias.erase=auto encoder.width=40", True, {0, 1, 2}),
        ("debias.erase=h encoder.width=40 debias.erase_to=floor", True, {0, 1, 2}),
        ("debias.erase=h encoder.width=8 debias.erase_to=all", False, {2}),
        ("debias.erase=h encoder.width=40 debias.erase_to=1.0", True, {0}),
        ("debias.erase=h encoder.width=40 debias.erase_to=0.0", True, {2}),
    ],
)
def test_how_many_directions_of_h_are_erased(
    tmp_path: Path, federate_table: Callable[..., Path], override: str, asked: bool, directions: set[int]
) -> None:
    table = write_consortium(tmp_path / "t.csv")
    folder = federate_table(table, f"num_rounds=1 finetune=none evaluation=none {override}")
    eraser = load_file(folder / "checkpoints" / "eraser-0001.safetensors")
    assert len(eraser["directions_KF"]) in directions
    assert ("hits" in json.loads((folder / "traffic.json").read_text())) == asked


@pytest.mark.usefixtures("quick_probes", "few_resamples")
def test_a_federated_run_on_a_table(tmp_path: Path, federate_table: Callable[..., Path]) -> None:
    table = write_consortium(tmp_path / "t.csv")
    folder = federate_table(table, "policy.share_per_scan=true data.unseen_sites=[b] data.fractions=[0.6,0,0.4]", name="roi")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert set(rounds[0]["sites"]) == {"a", "c"}
    assert set(rounds[0]["sites"]["a"]) == {"loss", "objective", "fairkl"}
    assert rounds[0]["exchange"]["h"]["a"]["groups"] >= 1
    assert (folder / "checkpoints" / "eraser-0002.safetensors").is_file()
    found = {(row["stage"], row["task"], row["metric"]) for row in json.loads((folder / "metrics.json").read_text())}
    stages = ("untrained", "pretrained", "erased")
    assert found >= {(stage, "age", metric) for stage in stages for metric in ("mae", "mae_unseen")}
    report = (folder / "report.html").read_text()
    assert "to contrast: d (2). They count as unseen." in report
    assert "missing features" in report
    # All weights start from the same constants, which no round moves; the pooled mean and spread of all training subjects.
    untrained = load_checkpoint(folder / "checkpoints" / "untrained-0000.safetensors").state
    assert all(torch.equal(value, last(folder)[name]) for name, value in constants(untrained).items())
    assert not torch.equal(untrained["encoder.layers.0.0.weight"], last(folder)["encoder.layers.0.0.weight"])
    config = load_config(f"{TINY} data.table={table} data.fractions=[0.6,0,0.4]")
    rows = []
    for number, site in enumerate("abcd"):
        held = holdings(this_site({"partition-id": number, "num-partitions": 4}, config), config)
        data = held.splits["train"]
        rows += [data.inputs(range(len(data)), torch.device("cpu")).double().numpy()] if site in "ac" else []
    mean, scale = (untrained[f"encoder.standardise.{name}"].numpy() for name in ("mean", "scale"))
    assert mean == pytest.approx(np.nanmean(np.concatenate(rows), axis=0), rel=1e-6)
    assert scale == pytest.approx(np.nanstd(np.concatenate(rows), axis=0), rel=1e-4)


def test_the_same_run_twice_gives_the_same_weights_and_noise_leaves_the_constants_alone(
    tmp_path: Path, federate_table: Callable[..., Path]
) -> None:
    table = write_consortium(tmp_path / "t.csv")
    first, again = (last(federate_table(table, name=name)) for name in ("first", "again"))
    assert all(torch.equal(value, again[name]) for name, value in first.items())
    noise = "privacy=clip_and_noise privacy.clip_norm=1 privacy.noise_multiplier=1"
    noised = last(federate_table(table, noise, name="noised"))
    assert all(torch.equal(value, noised[name]) for name, value in constants(first).items())
    assert all(not torch.equal(value, noised[name]) for name, value in first.items() if name not in constants(first))


def test_fine_tuning_stages_all_stand_on_the_standardisation(tmp_path: Path, federate_table: Callable[..., Path]) -> None:
    table = write_consortium(tmp_path / "t.csv")
    stages = "finetune=both finetune.num_rounds=1 finetune.local_steps=1 data.target_sites=[c]"
    checkpoints = federate_table(table, stages, name="both") / "checkpoints"
    wanted = dict(constants(load_file(checkpoints / "untrained-0000.safetensors")).items())
    for stage in ("linear_probe", "full_finetuning", "from_scratch"):
        state = load_file(checkpoints / f"{stage}-0001.safetensors")
        assert all(torch.equal(value, state[name]) for name, value in wanted.items())


def test_separate_sites_with_a_table_each(tmp_path: Path, federate_table: Callable[..., Path]) -> None:
    """Columns in another order, a site column or none, another separator: the same federation."""
    table = write_consortium(tmp_path / "t.csv", sizes=(20, 20, 0, 0))
    header, *lines = [line.split(",") for line in table.read_text().splitlines()]
    order = [0, *range(len(header) - 1, 3, -1), 2, 1]
    own = tmp_path / "own.tsv"
    own.write_text("\n".join("\t".join(line[i] for i in order) for line in [header, *lines[20:]]))
    policy = {"min-group": 4, "diagonal-subjects": 8}
    nodes = {5: {"site": "a", "data-root": str(table), **policy}, 6: {"site": "b", "data-root": str(own), **policy}}
    separate = last(federate_table(table, "data.table=null", name="separate", nodes=nodes))
    same_policy = "policy.diagonal_subjects=8 policy.round_counts_to=5"
    together = last(federate_table(table, same_policy, name="together"))
    assert all(torch.equal(value, separate[name]) for name, value in together.items())


def test_sites_with_other_features_are_told_apart(tmp_path: Path, federate_table: Callable[..., Path]) -> None:
    table = write_consortium(tmp_path / "t.csv", sizes=(20, 20, 0, 0))
    other = tmp_path / "other.csv"
    other.write_text(table.read_text().replace("f5", "g5"))
    nodes = {5: {"site": "a", "data-root": str(table)}, 6: {"site": "b", "data-root": str(other)}}
    with pytest.raises(RunError, match=r"got 2 different sets: 6 at a; 6 at b. Name the common ones with data.columns.features"):
        federate_table(table, name="other", nodes=nodes)
    common = "data.columns.features=[f0,f1] policy.diagonal_subjects=1"
    for node in nodes.values():
        node["diagonal-subjects"] = 5
    assert len(last(federate_table(table, common, name="common", nodes=nodes))["encoder.standardise.mean"]) == 2


def test_nothing_but_columns_and_counts_leaves_a_site_with_a_broken_table(
    tmp_path: Path, federate_table: Callable[..., Path]
) -> None:
    table = write_consortium(tmp_path / "t.csv", sizes=(20, 20, 0, 0))
    broken = tmp_path / "broken.csv"
    broken.write_text(table.read_text().replace("b05,", f"{SECRET},").replace("\nb06", "\nb06", 1))
    lines = broken.read_text().splitlines()
    lines[-1] = lines[-1].rpartition(",")[0] + ",<0.1"
    broken.write_text("\n".join(lines))
    nodes = {5: {"site": "a", "data-root": str(table)}, 6: {"site": "b", "data-root": str(broken)}}
    with pytest.raises(RunError, match=r"data.table: column f5: a feature must be a finite number.* 1 of 40 cells") as error:
        federate_table(table, name="broken", nodes=nodes)
    for secret in (SECRET, "b19", "<0.1", str(tmp_path)):
        assert secret not in str(error.value)


def test_a_policy_that_nobody_meets_is_explained(tmp_path: Path, federate_table: Callable[..., Path]) -> None:
    table = write_consortium(tmp_path / "t.csv")
    with pytest.raises(
        RunError, match=r"standardisation: at least one site must tell .*none for 6 of 6.*policy.diagonal_subjects"
    ):
        federate_table(table, "policy.diagonal_subjects=60", name="closed")


def test_node_configs_of_the_other_kind_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SiteError, match="must not hold mask when the run reads table"):
        this_site({"site": "a", "data-root": str(tmp_path), "mask": "/m.nii"}, load_config("experiment=roi data.table=null"))
    with pytest.raises(SiteError, match=r"a simulation must know its data: add data.table=\.\.\. to the overrides"):
        this_site({"partition-id": 0, "num-partitions": 1}, load_config("experiment=roi data.table=null"))
    table = load_config("experiment=roi data.table=/config/table data.participants=/config/people")
    site = this_site({"site": "a", "data-root": "/own/table"}, table)
    assert site.source == TableSource(Path("/own/table"), None, Columns())


def test_run_says_what_is_wrong_with_a_table_before_anything_starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import typer

    app = typer.Typer()
    register(app)
    monkeypatch.chdir(tmp_path)
    for table, says in (("null", "run: data.table must name a file, got null."), ("x.csv", "data.table: it must be an existing")):
        done = CliRunner().invoke(app, ["run", "experiment=roi", f"data.table={table}"])
        assert done.exit_code == 1
        assert done.output.strip().startswith(says)
    assert list(tmp_path.iterdir()) == []


def test_rows_are_copies() -> None:
    rows = FeatureRows(("a",), np.ones((2, 1), np.float32))
    SiteData("a", (), (0,), rows).inputs([0], torch.device("cpu"))[:] = 5
    assert rows.values_NF.tolist() == [[1.0], [1.0]]
