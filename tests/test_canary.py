"""What must not leave a site, planted where it lies, and looked for in every byte that crosses and that the server keeps."""

import asyncio
import base64
import gzip
import io
import json
import re
import ssl
import struct
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest
from typer.testing import CliRunner

from client import cli as site_cli
from client.audit import AuditLog
from core.cli import app as console
from core.flower_env import processes
from simulations.consortium import local_consortium

LIMIT_S = 600.0
RUN = (
    "experiment=tiny data=sites name=run num_rounds=2 local_steps=1 data.target_sites=[hill] finetune.stages=[linear_probe] "
    "finetune.local_steps=1 finetune.patience=1 evaluation=sums data.max_unusable=1 policy.min_group=2 "
    "policy.share_per_scan=false strategy.min_sites=2"
)
SUBJECT, FOLDER, CELL, FILE, COLUMN = "KanarieQx7", "OrdnerYv3", "AlterPm9", "BildWk5", "SpalteZr4"
AGE = 63.718204
CANARIES = (SUBJECT, FOLDER, CELL, FILE, COLUMN, str(AGE))
SMALLEST = 200  # letters of base64 that are looked into


def forms(canary: str) -> set[bytes]:
    """How a text may be written: in two encodings, hexadecimal, and base64 wherever in a longer text it stands."""
    plain = canary.encode()
    found = {plain, canary.encode("utf-16-le"), canary.encode("utf-16-be"), plain.hex().encode()}
    for before in range(3):
        whole = base64.b64encode(b"\0" * before + plain)
        # The first and last letters hold bits of what stands beside it.
        found.add(whole[4 * (before > 0) : len(whole) - 4])
    return found


def forms_of_age(age: float) -> set[bytes]:
    """A number as it stands in arrays."""
    return {struct.pack(kind, age) for kind in ("<d", "<f", ">d", ">f")}


FORMS = {canary: forms(canary) for canary in CANARIES} | {"the age as a number": forms_of_age(AGE)}


def layers(name: str, data: bytes) -> Iterator[tuple[str, bytes]]:
    """Bytes, and those that are packed in them: zip, gzip, base64."""
    yield name, data
    if data[:4] == b"PK\x03\x04":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for part in archive.namelist():
                yield f"{name}/{part}, its name", part.encode()
                yield from layers(f"{name}/{part}", archive.read(part))
    if data[:2] == b"\x1f\x8b":
        yield from layers(f"{name} unpacked", zlib.decompressobj(31).decompress(data))  # also of a file that is cut off
    for number, text in enumerate(re.findall(rb"[A-Za-z0-9+/]{%d,}" % SMALLEST, data)):
        yield f"{name} base64 {number}", base64.b64decode(text[: len(text) // 4 * 4])


def files(folder: Path) -> dict[str, bytes]:
    """Every file under a folder by its path, and the paths."""
    paths = [path for path in sorted(folder.rglob("*")) if path.is_file() and not path.is_symlink()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths} | {
        "the paths": "\n".join(map(str, paths)).encode()
    }


def sightings(places: Iterable[tuple[str, bytes]]) -> set[tuple[str, str]]:
    """Which canaries are where."""
    return {
        (canary, name)
        for place, whole in places
        for name, data in layers(place, whole)
        for canary, written in FORMS.items()
        if any(form in data for form in written)
    }


def canaries_in(places: Iterable[tuple[str, bytes]]) -> set[str]:
    return {canary for canary, _ in sightings(places)}


class Recorder:
    """Stands between sites and server with the server's own key, and keeps all that crosses, unencrypted.

    Attributes:
        streams: what crossed, of each connection and direction.
    """

    def __init__(self, server_kit: Path) -> None:
        self.kit = server_kit
        self.streams: list[bytearray] = []
        self.loop = asyncio.new_event_loop()
        self.thread = threading.Thread(target=self.loop.run_forever, daemon=True)
        self.port = 0
        self.tasks: set[asyncio.Task[None]] = set()

    def before(self, server_port: int) -> int:
        """The port at which it stands before the server's."""
        if not self.port:
            self.thread.start()
            self.port = asyncio.run_coroutine_threadsafe(self._listen(server_port), self.loop).result(30)
        return self.port

    async def _listen(self, server_port: int) -> int:
        near, far = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH), ssl.create_default_context(cafile=self.kit / "ca.crt")
        near.load_cert_chain(self.kit / "server.pem", self.kit / "server.key")

        async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self.tasks.add(asyncio.current_task())  # type: ignore[arg-type]
            with suppress(OSError, asyncio.IncompleteReadError):
                answers, questions = await asyncio.open_connection("127.0.0.1", server_port, ssl=far)
                await asyncio.gather(self._copy(reader, questions), self._copy(answers, writer))

        self.server = await asyncio.start_server(pass_on, "127.0.0.1", 0, ssl=near)
        return int(self.server.sockets[0].getsockname()[1])

    async def _copy(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        kept = bytearray()
        self.streams.append(kept)
        try:
            while data := await reader.read(1 << 18):
                kept += data
                writer.write(data)
                await writer.drain()
        except OSError:
            pass  # one end went away: then so does the other
        finally:
            writer.close()

    def close(self) -> None:
        """Cut all connections."""
        if not self.port:
            return

        async def end() -> None:
            self.server.close()
            for task in self.tasks:
                task.cancel()
            await asyncio.gather(*self.tasks, return_exceptions=True)
            await asyncio.sleep(0.1)

        asyncio.run_coroutine_threadsafe(end(), self.loop).result(30)
        self.loop.call_soon_threadsafe(self.loop.stop)
        self.thread.join()
        self.loop.close()


@pytest.mark.parametrize("canary", CANARIES)
def test_a_canary_is_found_however_it_is_written(canary: str) -> None:
    text = f'{{"a": "sub-{canary}_T1w.nii.gz"}}'
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("inner.gz", gzip.compress(text.encode()))
    page = b'<img src="data:;base64,' + base64.b64encode(b"x" * SMALLEST + text.encode()) + b'">'
    for shift in range(3):
        assert canaries_in([("base64", base64.b64encode(b"#" * shift + text.encode()))]) == {canary}
    for data in (text.encode(), text.encode("utf-16"), text.encode().hex().encode(), packed.getvalue(), page):
        assert canaries_in([("data", data)]) == {canary}
    assert canaries_in([("data", text.encode()[:9])]) == set()


@pytest.mark.parametrize("kind", ["<d", "<f"])
def test_an_age_is_found_in_an_array(kind: str) -> None:
    assert canaries_in([("array", struct.pack(f"{kind[0]}3{kind[1]}", 1.0, AGE, 2.0))]) == {"the age as a number"}


def plant(root: Path) -> None:
    """Canaries in a site's table and the names of its files: a scan that nothing can read, an age that is none, one that is."""
    table = root / "participants.tsv"
    lines = table.read_text().splitlines()
    for number, (subject, age) in enumerate([(SUBJECT, "31.0"), ("004", CELL), ("005", str(AGE))], 3):
        old, _, *others = lines[number + 1].split("\t")
        lines[number + 1] = "\t".join([f"sub-{subject}", age, *others])
        if subject == SUBJECT:
            (root / old).rename(root / f"sub-{SUBJECT}")
            for path in (root / f"sub-{SUBJECT}").rglob("*.nii.gz"):
                path.unlink()
                path.with_name(f"sub-{SUBJECT}_ses-01_acq-{FILE}_T1w.nii.gz").write_bytes(gzip.compress(b"no image")[:-9])
    lines[0] += f"\t{COLUMN}"
    table.write_text("\n".join([lines[0], *(f"{line}\t{CELL}" for line in lines[1:])]) + "\n")


@pytest.mark.slow
@pytest.mark.long
def test_no_subject_path_or_age_leaves_a_site(tmp_path: Path, write_site: Callable[..., None]) -> None:
    policies = {}
    for seed, site in enumerate(("fen", "hill", "south")):
        root = tmp_path / FOLDER / site
        write_site(root, seed=seed, patients=8 if site == "hill" else 0)
        plant(root)
        groups = {"min_group": 2, "diagonal_subjects": 4, "covariance_subjects_per_feature": 1}
        policies[site] = {
            "data": {"root": str(root)},
            "cache_root": str(tmp_path / FOLDER / "cache"),
            "groups": groups,
            "threads": 1,
        }
        policies[site]["max_unusable"] = 1.0
    # A cache under a file: whoever opens it gets an exception that nobody foresaw, with the path in its text.
    policies["fen"]["cache_root"] = str(tmp_path / FOLDER / "fen" / "participants.tsv" / "cache")
    consortium_folder = tmp_path / "consortium"
    recorder = Recorder(consortium_folder / "server")
    try:
        with local_consortium(consortium_folder, policies, start_s=LIMIT_S, nodes_at=recorder.before) as consortium:
            overrides, log = f"{RUN} output={consortium.server.state / 'runs'}", tmp_path / "log"
            outcome = consortium.run(overrides, log_path=log, deadline_s=LIMIT_S, on_line=lambda _: None)
            assert outcome.ok, (outcome, log.read_text()[-3000:])
    finally:
        recorder.close()
    assert not any(processes(folder) for folder in consortium.folders)

    run = consortium.server.state / "runs" / "run"
    assert (run / "report.html").is_file()
    site_cli.register(console)
    exported = {
        name: CliRunner().invoke(console, ["site", "audit", str(site.folder), "--json"]).output.encode()
        for name, site in consortium.sites.items()
    }
    looked_through = {
        "messages": {f"connection {number}": bytes(stream) for number, stream in enumerate(recorder.streams)},
        "what `isocenter run` prints": {"log": log.read_bytes()},
        "the server, its logs, database and runs": files(consortium_folder / "server"),
        "the kits": {path.name: path.read_bytes() for path in (consortium_folder / "sites").glob("*.zip")},
        "the authority": files(consortium_folder / "authority"),
        "audit logs": exported
        | {name: AuditLog(site.state / "audit.jsonl").path.read_bytes() for name, site in consortium.sites.items()},
    }
    assert {place: sightings(found.items()) for place, found in looked_through.items()} == {
        place: set() for place in looked_through
    }

    # The messages were read, the run's files found, and the canaries stand where they belong.
    crossed = b"".join(looked_through["messages"].values())
    for known in (b"train.pretrain", b"query.probes", b"train.finetune", b"incident", b"\x93NUMPY"):
        assert known in crossed
    assert {"state/runs/run/report.html", "state/state.db", "state/server.log"} <= set(looked_through[list(looked_through)[2]])
    assert all(b'"message"' in text for text in exported.values())
    assert {f"{site}.zip" for site in policies} == set(looked_through["the kits"])
    local = {name: files(site.state) for name, site in consortium.sites.items()}
    assert canaries_in(local["hill"].items()) >= {SUBJECT, FOLDER, FILE, CELL}
    assert FOLDER in canaries_in(local["fen"].items())
    held = files(tmp_path / FOLDER / "hill")
    assert canaries_in(held.items()) >= set(CANARIES)
    assert json.loads((run / "sites.json").read_text())
