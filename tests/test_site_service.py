"""A site's kit in use, without Flower: what is checked, what its SuperNode's words mean, and what the commands say."""

import hashlib
import json
import stat
from datetime import UTC, datetime
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from client import cli
from client.service import CONNECTION, FORGET_S, Kit, Watch, describe_work, open_kit
from core.keys import fingerprint, read_request, read_site_key

POLICY = "site: hill\ndata: {root: /data}\n"


@pytest.fixture
def kit(tmp_path: Path) -> Path:
    """What of a kit the site's commands read; without a key."""
    folder = tmp_path / "kit"
    folder.mkdir()
    (folder / "ca.crt").write_bytes(b"an authority")
    about = {"site": "hill", "consortium": "hills", "server": "127.0.0.1:1", "flwr": "1.41.0"}
    about["ca_sha256"] = hashlib.sha256(b"an authority").hexdigest()
    (folder / "kit.json").write_text(json.dumps(about))
    (folder / "site.yaml").write_text(POLICY)
    return folder


def isocenter(*arguments: str) -> tuple[int, str]:
    """Exit code and words of an `isocenter site` command."""
    app = typer.Typer()
    cli.register(app)
    done = CliRunner().invoke(app, ["site", *arguments])
    return done.exit_code, done.output


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("kit.json", None, "site: kit.json must be in the kit"),
        ("ca.crt", None, "site: ca.crt must be in the kit"),
        ("kit.json", "{}", "site: kit.json must be what `isocenter provision` wrote"),
        ("ca.crt", "another authority", "site: ca.crt must be the one that kit.json names"),
        ("site.yaml", POLICY.replace("hill", "dale"), "site: site.yaml must be of hill, got dale"),
    ],
    ids=["no kit.json", "no ca.crt", "empty kit.json", "other ca.crt", "other site"],
)
def test_a_kit_that_is_not_whole_is_refused_in_a_sentence(kit: Path, name: str, text: str | None, reason: str) -> None:
    (kit / name).unlink()
    if text is not None:
        (kit / name).write_text(text)
    with pytest.raises(ValueError, match=reason):
        open_kit(kit).policy()


def test_a_folder_that_flower_would_misread_is_refused(kit: Path) -> None:
    with pytest.raises(ValueError, match="folder must have no quotation mark"):
        open_kit(kit.rename(kit.with_name('a"b')))


def test_a_site_makes_its_own_key_once_and_asks_to_be_let_in(kit: Path) -> None:
    code, told = isocenter("init", str(kit))
    key = read_site_key(kit / "site.key")
    assert code == 0
    assert "hill: new key, " + fingerprint(key.public_key()) in told
    assert stat.S_IMODE((kit / "site.key").stat().st_mode) == 0o600
    site, public = read_request((kit / "hill.csr").read_bytes())
    assert (site, fingerprint(public)) == ("hill", fingerprint(key.public_key()))
    assert "the key that was there, " + fingerprint(key.public_key()) in isocenter("init", str(kit))[1]


def test_a_site_without_a_key_or_with_an_open_state_does_not_start(kit: Path) -> None:
    code, told = isocenter("start", str(kit))
    assert code == 1
    assert "site.key" in told
    (kit / "state").chmod(0o755)
    code, told = isocenter("start", str(kit))
    assert code == 1
    assert "state folder must be its user's alone" in told


def test_commands_of_a_site_that_does_not_run_say_so(kit: Path) -> None:
    assert isocenter("stop", str(kit)) == (0, "did not run\n")
    code, told = isocenter("status", str(kit))
    assert code == 3
    assert "does not run" in told
    assert "0.0 MB in 0 answers; audit log whole" in told


def watch(kit: Path) -> tuple[Watch, list[str]]:
    (kit / "state").mkdir(mode=0o700)
    told: list[str] = []
    return Watch(open_kit(kit), "SHA256:abc", told.append), told


def standing(kit: Path) -> dict[str, str]:
    return json.loads((kit / "state" / CONNECTION).read_text())


def test_what_a_supernode_writes_is_told_in_words(kit: Path) -> None:
    seen, told = watch(kit)
    for _ in range(3):
        seen.line("WARNING : Connection attempt failed, retrying in 0.47 seconds")
    assert told == ["hill: runs, and is looking for 127.0.0.1:1, which does not answer; it goes on trying"]
    seen.line("isocenter| connected")
    seen.line("isocenter| app 12ab is not approved here: `isocenter site approve` shows it")
    assert told[1:] == [
        "hill: runs, and is connected to 127.0.0.1:1",
        "hill: app 12ab is not approved here: `isocenter site approve` shows it",
    ]
    assert standing(kit)["state"] == "connected"
    seen.ended(-9)
    assert told[-1].startswith("hill: is not connected: its SuperNode ended with exit code -9; it tries again")
    seen.line("[code: 2004] Failed to activate SuperNode.")
    seen.ended(1)
    assert "still holds the connection that was cut" in told[-1]
    assert standing(kit)["state"] == "refused"


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("[code: 2004] Failed to activate SuperNode.", "does not know this site's key, or it was revoked: SHA256:abc"),
        ("[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed", "does not have this consortium's certificate"),
    ],
    ids=["key", "certificate"],
)
def test_who_is_refused_is_told_why(kit: Path, line: str, reason: str) -> None:
    seen, told = watch(kit)
    seen.last_connected = -10 * FORGET_S
    seen.line(line)
    seen.ended(1)
    assert reason in told[-1]


def test_a_connected_site_that_is_shut_out_is_told_so_at_once_and_at_every_further_try(kit: Path) -> None:
    seen, told = watch(kit)
    seen.line("isocenter| connected")
    seen.ended(0)
    assert "does not know this site's key, or it was revoked: SHA256:abc" in told[-1]
    seen.line("[code: 2004] Failed to activate SuperNode.")
    seen.ended(305)
    assert len(told) == 2
    assert "or it was revoked" in standing(kit)["words"]


def test_work_outside_of_rounds_is_told_without_one() -> None:
    work = {"task": "query.describe", "what": "image", "done": 3, "total": 9, "told": "2026-03-01T09:00:00+00:00"}
    assert describe_work(work, datetime(2026, 3, 1, 9, 0, 5, tzinfo=UTC)) == "describe, image 3 of 9 (5 s ago)"


def test_a_kit_reads_what_its_processes_told(kit: Path) -> None:
    opened: Kit = open_kit(kit)
    assert opened.status("status.json") == {}
    opened.state.mkdir()
    (opened.state / "status.json").write_text('{"task": ""')
    assert opened.status("status.json") == {}
