"""Which code may run: its content is compared, never its name; what is shown cannot play with the terminal."""

import io
import json
import stat
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from client import approval
from client.approval import ApprovalError, Approvals, difference, digest, files_in, installed_files, shown
from client.audit import AuditLog
from client.cli import register
from core.cli import app

register(app)
RUNNER = CliRunner()
ROOT = Path(__file__).parents[1]


def bundle(files: Mapping[str, bytes | str], *, date: int = 2020) -> bytes:
    """A bundle with these files."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        for name, content in files.items():
            archive.writestr(zipfile.ZipInfo(name, (date, 1, 1, 0, 0, 0)), content)
    return made.getvalue()


FIRST = bundle({"client/app.py": "x = 1\n", "core/a.py": "y = 1\n", "core/gone.py": "z = 1\n"})
SECOND = bundle({"client/app.py": "x = 2\n", "core/a.py": "y = 1\n", "core/new.py": "w = 1\n"})


def test_only_content_that_was_approved_is(tmp_path: Path) -> None:
    kept = Approvals(tmp_path)
    assert not kept.approves(FIRST)
    assert kept.keep_pending(FIRST) == digest(FIRST)
    assert kept.keep_pending(FIRST) == digest(FIRST)
    assert not kept.approves(FIRST)
    assert (kept.pending(), kept.approved()) == ([digest(FIRST)], [])
    kept.approve(digest(FIRST))
    assert (kept.pending(), kept.approved()) == ([], [digest(FIRST)])
    assert kept.approves(FIRST)
    # The same files in another zip, and a byte more, are other bundles.
    assert not kept.approves(bundle(files_in(FIRST), date=2021))
    assert not kept.approves(FIRST + b"\0")
    path = tmp_path / "approved" / f"{digest(FIRST)}.fab"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    kept.revoke(digest(FIRST))
    assert (kept.approves(FIRST), kept.approved(), kept.pending()) == (False, [], [])


def test_a_name_says_nothing(tmp_path: Path) -> None:
    """Other content under the name of an approved bundle approves neither."""
    kept = Approvals(tmp_path)
    kept.keep_pending(FIRST)
    kept.approve(digest(FIRST))
    (tmp_path / "approved" / f"{digest(FIRST)}.fab").write_bytes(SECOND)
    assert not kept.approves(FIRST)
    assert not kept.approves(SECOND)
    kept.keep_pending(SECOND)
    (tmp_path / "pending" / f"{digest(SECOND)}.fab").write_bytes(FIRST)
    with pytest.raises(ApprovalError, match="its content must be what its name says, it was changed"):
        kept.approve(digest(SECOND))


@given(st.binary(max_size=200))
def test_no_other_bytes_are_approved(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    kept = Approvals(tmp_path_factory.getbasetemp() / "one-approved")
    if not kept.approved():
        kept.keep_pending(FIRST)
        kept.approve(digest(FIRST))
    assert kept.approves(content) == (content == FIRST)


@pytest.mark.parametrize("name", ["", "../approved/x", "A" * 64, "0" * 63, "0" * 64 + "\n"])
def test_names_are_hashes(tmp_path: Path, name: str) -> None:
    with pytest.raises(ApprovalError, match="must be a SHA-256"):
        Approvals(tmp_path).approve(name)


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ApprovalError, match="it must be pending, there is none"):
        Approvals(tmp_path).approve("0" * 64)
    with pytest.raises(ApprovalError, match="it must be approved, there is none"):
        Approvals(tmp_path).revoke("0" * 64)


def twice() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # zipfile's, of a name that it writes twice
        made = io.BytesIO()
        with zipfile.ZipFile(made, "w") as archive:
            archive.writestr("a.py", "1")
            archive.writestr("a.py", "2")
    return made.getvalue()


def linked() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w") as archive:
        info = zipfile.ZipInfo("core")
        info.external_attr = (stat.S_IFLNK | 0o777) << 16
        archive.writestr(info, "/etc")
    return made.getvalue()


def understated() -> bytes:
    """A file that says to be of 3 bytes and unpacks to a million."""
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", b" " * 1_000_000)
    return made.getvalue().replace((1_000_000).to_bytes(4, "little"), (3).to_bytes(4, "little"))


def large() -> bytes:
    made = io.BytesIO()
    with zipfile.ZipFile(made, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.py", b" " * (approval.MAX_UNPACKED + 1))
    return made.getvalue()


BAD: dict[str, tuple[bytes, str]] = {
    "no zip": (b"not a zip", "it must be a zip file"),
    "truncated": (FIRST[:-30], "it must be a zip file"),
    "damaged": (FIRST.replace(b"x = 1", b"x = 3"), "it must be a zip file"),
    "absolute": (bundle({"/etc/passwd": ""}), "names must stay inside it"),
    "up": (bundle({"core/../../x.py": ""}), "names must stay inside it"),
    "dot": (bundle({"./x.py": ""}), "names must stay inside it"),
    "backslash": (bundle({"..\\x.py": ""}), "names must stay inside it"),
    "drive": (bundle({"C:x.py": ""}), "names must stay inside it"),
    "empty part": (bundle({"core//x.py": ""}), "names must stay inside it"),
    "twice": (twice(), "its names must differ"),
    "alike": (bundle({"core/A.py": "", "core/a.py": ""}), "its names must differ"),
    "link": (linked(), "must be a plain file"),
    "understated": (understated(), "it must be a zip file|as large as it is said"),
    "unpacked": (large(), "it must unpack to at most"),
    "many": (bundle({f"{i}.py": "" for i in range(approval.MAX_FILES + 1)}), "it must unpack to at most"),
    "huge": (b"\0" * (approval.MAX_BUNDLE + 1), "it must have at most"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_is_no_sane_bundle_is_not_kept(tmp_path: Path, kind: str) -> None:
    content, message = BAD[kind]
    with pytest.raises(ApprovalError, match=message) as raised:
        Approvals(tmp_path).keep_pending(content)
    assert "\n" not in str(raised.value)
    assert list(tmp_path.iterdir()) == []


def test_only_so_many_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(approval, "MAX_PENDING", 1)
    kept = Approvals(tmp_path)
    kept.keep_pending(FIRST)
    kept.keep_pending(FIRST)
    with pytest.raises(ApprovalError, match="at most 1 may wait"):
        kept.keep_pending(SECOND)


def test_a_difference_is_against_the_last_approved_bundle(tmp_path: Path) -> None:
    kept = Approvals(tmp_path)
    for content in (SECOND, FIRST):
        kept.keep_pending(content)
        kept.approve(digest(content))
    assert kept.approved() == [digest(SECOND), digest(FIRST)]
    lines = kept.difference(SECOND).splitlines()
    assert lines[0] == f"against the approved bundle {digest(FIRST)[:12]}: 1 files same, 1 changed, 1 added, 1 removed"
    assert lines[2:8] == ["changed client/app.py", "--- client/app.py", "+++ client/app.py", "@@ -1 +1 @@", "-x = 1", "+x = 2"]
    assert {"added core/new.py", "+w = 1", "removed core/gone.py (6 bytes)"} <= set(lines)
    assert "-z = 1" not in lines
    same = f"against the bundle {digest(SECOND)[:12]}: 3 files same, 0 changed, 0 added, 0 removed"
    assert kept.difference(SECOND, SECOND).splitlines() == [same]


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_bundle_that_flower_makes_differs_from_what_is_installed_by_its_papers_alone(tmp_path: Path) -> None:
    from flwr.cli.build import build_fab_from_disk

    made = build_fab_from_disk(ROOT)
    installed = installed_files()
    assert {"core/exchange.py", "client/policy.py", "server/app.py", "configs/run.yaml"} <= set(installed)
    text = Approvals(tmp_path).difference(made)
    assert text.startswith(
        f"against what is installed on this machine: {len(installed)} files same, 0 changed, 2 added, 0 removed"
    )
    assert {line for line in text.splitlines() if line.startswith("added ")} == {"added .info/CONTENT", "added pyproject.toml"}
    assert Approvals(tmp_path).keep_pending(made) == digest(made)
    changed = {**files_in(made), "client/app.py": files_in(made)["client/app.py"] + b"import os\n"}
    assert "+import os" in Approvals(tmp_path).difference(bundle(changed)).splitlines()


def test_what_is_shown_cannot_play_with_the_terminal() -> None:
    """Escape sequences, text that runs backwards, carriage returns that hide what stands before them."""
    text = difference({}, {"a\x1b[2J.py": "print(1)\rhidden\x1b[8m \u202e abc\n".encode(), "b.py": b"tab\there"}, "nothing")
    assert not {"\x1b", "\r", "\u202e"} & set(text)
    assert r"+print(1)\rhidden\x1b[8m \u202e abc" in text
    assert r"added a\x1b[2J.py" in text
    assert "+tab\there" in text
    assert shown("é ü") == "é ü"


def test_binary_large_and_otherwise_odd_files_are_named() -> None:
    before = {"a.bin": b"\0", "b.py": b"x\n", "c.py": b"x", "d.py": b"1\n"}
    after = {"a.bin": b"\0\1", "b.py": b"#" * (approval.MAX_SHOWN + 1), "c.py": b"x\n", "d.py": b"\xff"}
    assert difference(before, after, "before").splitlines()[2:] == [
        "changed a.bin: not shown, it is binary or large (1 bytes before, 2 now)",
        f"changed b.py: not shown, it is binary or large (2 bytes before, {approval.MAX_SHOWN + 1} now)",
        "changed c.py",
        "(the same but for the ends of lines)",
        "changed d.py: not shown, it is binary or large (2 bytes before, 1 now)",
    ]


def test_the_command_shows_asks_and_tells_the_log(tmp_path: Path) -> None:
    command = ["site", "approve", str(tmp_path)]
    nothing = RUNNER.invoke(app, command)
    assert (nothing.exit_code, nothing.output.strip()) == (0, "no code waits to be approved")
    kept, log = Approvals(tmp_path / "state"), AuditLog(tmp_path / "state" / "audit.jsonl")
    kept.keep_pending(FIRST)
    for answer in ("n\n", ""):
        refused = RUNNER.invoke(app, command, input=answer)
        assert refused.exit_code == 1
        assert "against what is installed on this machine: 0 files same" in refused.output
        assert (kept.pending(), kept.approved(), log.read()) == ([digest(FIRST)], [], ())
    done = RUNNER.invoke(app, command, input="y\n")
    assert done.exit_code == 0
    assert "+x = 1" in done.output
    assert f"approved {digest(FIRST)}" in done.output
    assert kept.approves(FIRST)
    assert [(entry["message"], entry["app"]) for entry in log.read()] == [("site.approve", digest(FIRST))]

    third = bundle({"client/app.py": "x = 3\n"})
    for content in (SECOND, third):
        kept.keep_pending(content)
    several = RUNNER.invoke(app, command)
    assert several.exit_code == 2
    assert digest(third) in several.output
    chosen = RUNNER.invoke(app, [*command, "--yes", digest(third)[:10]])
    assert chosen.exit_code == 0
    assert kept.approves(third)
    assert not kept.approves(SECOND)
    log.path.write_text(json.dumps({}) + "\n")
    broken = RUNNER.invoke(app, [*command, "--yes"])
    assert broken.exit_code == 1
    assert not kept.approves(SECOND)


def test_an_approved_bundle_is_unpacked_once_and_gone_when_it_is_revoked(tmp_path: Path) -> None:
    approvals = Approvals(tmp_path)
    content = bundle({"client/app.py": b"x = 1\n", "server/kit/a/b.py": b""})
    name = approvals.keep_pending(content)
    approvals.approve(name)
    (approvals.folder / "apps" / f"{name}.new").mkdir(parents=True)  # left by one that was interrupted
    (approvals.folder / "apps" / f"{name}.new" / "other.py").touch()
    folder = approvals.unpacked(content)
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert files == {"client/app.py": b"x = 1\n", "server/kit/a/b.py": b""}
    before = (folder / "client" / "app.py").stat().st_mtime_ns
    assert approvals.unpacked(content) == folder
    assert (folder / "client" / "app.py").stat().st_mtime_ns == before
    approvals.revoke(name)
    assert not folder.exists()
