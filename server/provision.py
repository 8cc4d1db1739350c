"""Kits for a consortium: one folder for the server, one for each site, and the authority that none of them contains.

What was issued stands in the authority's ledger and is never issued again: another site changes nothing for the others.
"""

import hashlib
import io
import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import jinja2
from cryptography.hazmat.primitives.asymmetric import ec
from filelock import FileLock, Timeout
from pydantic import BaseModel, ConfigDict, ValidationError

from core import __version__
from core.files import write_atomically
from core.flower_env import CONNECTION
from core.keys import (
    Authority,
    certificate_end,
    certificate_hosts,
    fingerprint,
    is_pair,
    new_authority,
    new_server_certificate,
    new_site_key,
    open_authority,
    public_line,
    read_request,
    read_site_key,
)
from server.consortium import Consortium, SitePlan

PUBLIC, PRIVATE, PROGRAM = 0o644, 0o600, 0o755
_SOON_DAYS = 60
_TEMPLATES = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / "kit"),
    undefined=jinja2.StrictUndefined,
    keep_trailing_newline=True,
    autoescape=False,  # no page for a browser, and every value is a checked name, address or number
)

Files = dict[str, tuple[bytes, int]]
"""The files of a kit: bytes and mode by name."""


class Issued(BaseModel):
    """A site's key that the authority let in, and when it was shut out again."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    site: str
    made: Literal["coordinator", "site"]
    public_key: str
    fingerprint: str
    issued: str
    revoked: str | None = None


class Certificate(BaseModel):
    """A certificate that the server got."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    hosts: tuple[str, ...]
    sha256: str
    issued: str


class Ledger(BaseModel):
    """All that was issued, in order."""

    model_config = ConfigDict(extra="forbid")

    consortium: str
    server: list[Certificate] = []
    sites: list[Issued] = []

    def valid(self, site: str) -> Issued | None:
        """The key that a site has now."""
        return next((entry for entry in self.sites if entry.site == site and entry.revoked is None), None)

    def known(self, key: ec.EllipticCurvePublicKey) -> Issued | None:
        """Who got this key, now or earlier."""
        return next((entry for entry in self.sites if entry.fingerprint == fingerprint(key)), None)

    def issue(self, site: str, made: Literal["coordinator", "site"], key: ec.EllipticCurvePublicKey) -> Issued:
        """Let a key in."""
        entry = Issued(site=site, made=made, public_key=public_line(key), fingerprint=fingerprint(key), issued=_now())
        self.sites.append(entry)
        return entry

    def revoke(self, site: str) -> None:
        """Shut out the key that a site has now."""
        self.sites = [
            entry.model_copy(update={"revoked": _now()}) if entry == self.valid(site) else entry for entry in self.sites
        ]


@dataclass(frozen=True)
class Asked:
    """What a call asks for beyond what the consortium's file says; sites by name."""

    requests: Mapping[str, ec.EllipticCurvePublicKey]
    renew: frozenset[str]
    revoke: frozenset[str]


def provision(
    plan: Consortium,
    folder: Path,
    *,
    requests: Sequence[Path] = (),
    renew: Sequence[str] = (),
    revoke: Sequence[str] = (),
) -> list[str]:
    """Bring the kits in `folder` to what the plan says; what was issued already stays as it is, byte for byte.

    Args:
        plan: The coordinator's file.
        folder: Of the consortium: gets `authority/`, `server/`, `sites/`.
        requests: Files that sites sent.
        renew: Sites that shall have a new key, or "server" for a new certificate.
        revoke: Sites whose key shall be shut out.

    Returns:
        A line for the authority, the server and each site: what was made, and what is to be done.

    Raises:
        ValueError: It contradicts what was issued before; nothing was changed.
    """
    authority_folder = folder / "authority"
    authority_folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    try:
        with FileLock(authority_folder / "ledger.lock", timeout=0, mode=PRIVATE):
            return _provision(plan, folder, _asked(plan, requests, renew, revoke))
    except Timeout:
        raise ValueError("provision: one process at a time must write the kits, got two. Wait for the other one.") from None


def _provision(plan: Consortium, folder: Path, asked: Asked) -> list[str]:
    ledger = _read_ledger(folder / "authority", plan)
    _check(plan, folder, ledger, asked)
    lines = []
    if not ledger.server and not ledger.sites:
        _write_ledger(folder, ledger)
        (folder / "authority" / "ca.key").unlink(missing_ok=True)  # of a call that was stopped before it issued anything
        (folder / "authority" / "ca.crt").unlink(missing_ok=True)
        authority = new_authority(folder / "authority", plan.consortium)
        lines.append(f"authority: made; keep {folder.name}/authority off the server, with a backup")
    else:
        authority = open_authority(folder / "authority")
    lines.append(_issue_server(plan, folder, authority, ledger, renewed="server" in asked.renew))
    for name in sorted((asked.renew | asked.revoke) - {"server"}):
        ledger.revoke(name)
    _write_ledger(folder, ledger)
    for site in plan.sites:
        lines.append(_issue_site(site, folder, ledger, asked))
        _write_ledger(folder, ledger)
        _write_site_kit(plan, site, folder, authority, ledger)
    named = {site.name for site in plan.sites}
    for name in dict.fromkeys(entry.site for entry in ledger.sites if entry.site not in named):
        state = f"not in the consortium's file, but let in by its key; shut it out with --revoke {name}"
        lines.append(f"{name}: {state if ledger.valid(name) else 'revoked'}")
    _write_server_kit(plan, folder / "server", authority, ledger)
    return lines


def ledger_path(folder: Path) -> Path:
    """Where the ledger of the consortium in `folder` is."""
    return folder / "authority" / "ledger.json"


def _asked(plan: Consortium, requests: Sequence[Path], renew: Sequence[str], revoke: Sequence[str]) -> Asked:
    keys: dict[str, ec.EllipticCurvePublicKey] = {}
    plans = {site.name: site for site in plan.sites}
    for path in requests:
        try:
            site, key = read_request(path.read_bytes())
        except OSError as error:
            raise ValueError(f"{path.name}: the request must be readable, got {error.strerror}.") from None
        except ValueError as error:
            raise ValueError(f"{path.name}: {error}") from None
        if site not in plans:
            raise ValueError(f"{path.name}: its site must be one of {', '.join(plans)}, got {site!r}. Add it to the file first.")
        if plans[site].key != "site":
            raise ValueError(f"{path.name}: {site} must have `key: site` in the consortium's file, got a key made here.")
        if site in keys:
            raise ValueError(f"{path.name}: each site must have one request, got a second one of {site}.")
        keys[site] = key
    if both := set(renew) & set(revoke):
        raise ValueError(f"provision: a site must be renewed or revoked, got both for {', '.join(sorted(both))}.")
    return Asked(keys, frozenset(renew), frozenset(revoke))


def _check(plan: Consortium, folder: Path, ledger: Ledger, asked: Asked) -> None:
    """All that can be refused, before anything is written."""
    plans = {site.name: site for site in plan.sites}
    issued = {entry.site for entry in ledger.sites}
    for site in sorted(asked.revoke):
        if ledger.valid(site) is None:
            state = "one that is revoked" if site in issued else "one without a key"
            raise ValueError(f"--revoke: the site must be one that has a key, got {site!r}, {state}.")
    for site in sorted(asked.renew - {"server"}):
        if site not in plans or site not in issued:
            raise ValueError(f"--renew: it must be server or a site of the file that has had a key, got {site!r}.")
        if plans[site].key == "site" and site not in asked.requests:
            raise ValueError(f"--renew: {site} makes its key itself and must send a new request, got none. Add --request FILE.")
    for site, key in asked.requests.items():
        known, valid = ledger.known(key), ledger.valid(site)
        if known and (known.site != site or known.revoked):
            raise ValueError(f"--request: the key of {site} must be new, got one that {known.site} had. Ask for another one.")
        if valid and not known and site not in asked.renew:
            raise ValueError(f"--request: {site} has a key and must keep it, got another one. Replace it with --renew {site}.")
        if site in issued and valid is None and site not in asked.renew:
            raise ValueError(f"--request: {site} is revoked and must be let in by name, got no --renew {site}.")
    if len({fingerprint(key) for key in asked.requests.values()}) < len(asked.requests):
        raise ValueError("--request: each site must have a key of its own, got one key twice.")
    for entry in ledger.sites:
        path = folder / "sites" / entry.site / "site.key"
        if entry.revoked or entry.made == "site" or entry.site in asked.renew or not path.exists():
            continue
        if (found := fingerprint(read_site_key(path).public_key())) != entry.fingerprint:
            raise ValueError(f"{entry.site}: its site.key must be {entry.fingerprint}, got {found}. Restore or --renew it.")
    pem = folder / "server" / "server.pem"
    if pem.exists() and "server" not in asked.renew and (missing := set(plan.hosts) - certificate_hosts(pem.read_bytes())):
        raise ValueError(
            f"server: its certificate must name all addresses of the file, got one without {', '.join(sorted(missing))}. "
            "Make a new one with --renew server."
        )


def _read_ledger(authority: Path, plan: Consortium) -> Ledger:
    path = authority / "ledger.json"
    if not path.exists():
        if (authority / "ca.key").exists():
            raise ValueError("authority: ledger.json must be beside ca.key, got none. Restore it from your backup.")
        return Ledger(consortium=plan.consortium)
    try:
        ledger = Ledger.model_validate_json(path.read_bytes())
    except (OSError, ValidationError):
        raise ValueError("authority: ledger.json must be what this command wrote, got something else. Restore it.") from None
    if ledger.consortium != plan.consortium:
        raise ValueError(
            f"consortium: its name must stay {ledger.consortium!r}, got {plan.consortium!r}. Give another one another --output."
        )
    return ledger


def _write_ledger(folder: Path, ledger: Ledger) -> None:
    _write(ledger_path(folder), (ledger.model_dump_json(indent=1) + "\n").encode(), PRIVATE)


def _issue_server(plan: Consortium, folder: Path, authority: Authority, ledger: Ledger, *, renewed: bool) -> str:
    """The server's certificate, made where there is none or it shall be renewed; a line for the coordinator."""
    pem = folder / "server" / "server.pem"
    key = folder / "server" / "server.key"
    made = renewed or not (pem.exists() and key.exists() and is_pair(pem.read_bytes(), key.read_bytes()))
    if made:
        new = new_server_certificate(authority, plan.hosts)
        write_atomically(key, new.key, PRIVATE)
        write_atomically(pem, new.certificate, PUBLIC)
        ledger.server.append(Certificate(hosts=tuple(plan.hosts), sha256=_sha256(new.certificate), issued=_now()))
    end = certificate_end(pem.read_bytes())
    left = (end - datetime.now(UTC)).days
    line = f"server: {'new ' if made else ''}certificate for {plan.server.host} until {end:%Y-%m-%d}"
    if left < _SOON_DAYS:
        line += f", in {left} days; make a new one with --renew server"
    return line


def _issue_site(site: SitePlan, folder: Path, ledger: Ledger, asked: Asked) -> str:
    """A site's key, made or let in where it has none or shall have another; a line for the coordinator."""
    entry, kit = ledger.valid(site.name), f"sites/{site.name}.zip"
    if entry:
        whole = entry.made == "site" or (folder / "sites" / site.name / "site.key").exists()
        state = "" if whole else "; it is no longer here, so the kit stays as it was"
        return f"{site.name}: has its key, {entry.fingerprint}{state}"
    if any(old.site == site.name for old in ledger.sites) and site.name not in asked.renew:
        return f"{site.name}: revoked; let it in again, with another key, with --renew {site.name}"
    if site.key == "coordinator":
        entry = ledger.issue(site.name, "coordinator", _key_made_here(folder / "sites" / site.name / "site.key", ledger))
        return f"{site.name}: new key, {entry.fingerprint}; send {kit} where nobody else can read it"
    if site.name in asked.requests:
        entry = ledger.issue(site.name, "site", asked.requests[site.name])
        return f"{site.name}: key of its request, {entry.fingerprint}; ask the site on the phone whether it is theirs"
    return (
        f"{site.name}: waits for its request; send {kit}, let the site run `isocenter site init`, and give the file that it "
        "sends back with --request"
    )


def _key_made_here(path: Path, ledger: Ledger) -> ec.EllipticCurvePublicKey:
    """A new key, or the one that an interrupted call has made and not yet issued."""
    if path.exists():
        key = read_site_key(path).public_key()
        if ledger.known(key) is None:
            return key
        path.unlink()
    return new_site_key(path).public_key()


def _write_site_kit(plan: Consortium, site: SitePlan, folder: Path, authority: Authority, ledger: Ledger) -> None:
    entry = ledger.valid(site.name)
    kit = folder / "sites" / site.name
    if entry is None and any(old.site == site.name for old in ledger.sites):
        return  # revoked: its last kit stays as it was
    made_here = entry is not None and entry.made == "coordinator"
    if made_here and not (kit / "site.key").exists():
        return  # handed over and removed here, as it should be: nothing to make a whole kit from
    values = {**_values(plan), "site": site.name, "made_here": made_here, "fingerprint": entry.fingerprint if entry else None}
    about = _about(plan, authority) | {"site": site.name, "key": values["fingerprint"]}
    files: Files = {"kit.json": (_json(about), PUBLIC), "ca.crt": (authority.pem, PUBLIC)}
    if entry:
        files["site.pub"] = (f"{entry.public_key}\n".encode(), PUBLIC)
    if made_here:
        files["site.key"] = ((kit / "site.key").read_bytes(), PRIVATE)
    names = {"isocenter.service": f"isocenter-{site.name}.service", "dockerignore": ".dockerignore"}
    containers = () if plan.server.is_name else ("Dockerfile", "compose.yaml", "dockerignore")
    files |= {names.get(name, name): file for name, file in _rendered("site", values).items() if name not in containers}
    _write_kit(kit, files)
    _write(folder / "sites" / f"{site.name}.zip", _zip(site.name, _with_sums(files)), PRIVATE)


def _write_server_kit(plan: Consortium, kit: Path, authority: Authority, ledger: Ledger) -> None:
    host = {"host": plan.server.host, "port": plan.server.port, "control_port": plan.control_port}
    valid = {e.site: {"public_key": e.public_key, "fingerprint": e.fingerprint} for e in ledger.sites if e.revoked is None}
    revoked = [{"site": e.site, "public_key": e.public_key, "fingerprint": e.fingerprint} for e in ledger.sites if e.revoked]
    files: Files = {
        "server.json": (_json(_about(plan, authority) | host), PUBLIC),
        "sites.json": (_json({"sites": valid, "revoked": revoked}), PUBLIC),
        "ca.crt": (authority.pem, PUBLIC),
        "server.pem": ((kit / "server.pem").read_bytes(), PUBLIC),
        "server.key": ((kit / "server.key").read_bytes(), PRIVATE),
        **_rendered("server", _values(plan)),
    }
    _write_kit(kit, files)


def _values(plan: Consortium) -> dict[str, Any]:
    """What the kits' templates know."""
    return {
        "consortium": plan.consortium,
        "server": str(plan.server),
        "host": plan.server.host,
        "port": plan.server.port,
        "is_name": plan.server.is_name,
        "has_ipv6": any(":" in host for host in plan.hosts),
        "control_port": plan.control_port,
        "connection": CONNECTION,
        "isocenter": __version__,
        "flwr": version("flwr"),
    }


def _about(plan: Consortium, authority: Authority) -> dict[str, Any]:
    """What every kit says of itself."""
    return {
        "format": 1,
        "consortium": plan.consortium,
        "server": str(plan.server),
        "ca_sha256": _sha256(authority.pem),
        "isocenter": __version__,
        "flwr": version("flwr"),
    }


def _rendered(kind: Literal["site", "server"], values: Mapping[str, Any]) -> Files:
    files: Files = {}
    for template in _TEMPLATES.list_templates(filter_func=lambda name: name.startswith(f"{kind}/")):
        name = template.removeprefix(f"{kind}/").removesuffix(".jinja")
        text = _TEMPLATES.get_template(template).render(values)
        files[name] = (text.encode(), PROGRAM if name.endswith(".sh") else PUBLIC)
    return files


def _with_sums(files: Files) -> Files:
    """The files, and the list of their hashes that `sha256sum -c` checks."""
    sums = "".join(f"{_sha256(data)}  {name}\n" for name, (data, _) in sorted(files.items()))
    return {**files, "SHA256SUMS": (sums.encode(), PUBLIC)}


def _write_kit(folder: Path, files: Files) -> None:
    for name, (data, mode) in _with_sums(files).items():
        _write(folder / name, data, mode)


def _write(path: Path, data: bytes, mode: int) -> None:
    """Write the file unless it holds just that."""
    if not (path.exists() and path.read_bytes() == data):
        write_atomically(path, data, mode)


def _zip(folder: str, files: Files) -> bytes:
    """An archive of a kit: the same bytes for the same files, whenever and wherever it is made."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name, (data, mode) in sorted(files.items()):
            entry = zipfile.ZipInfo(f"{folder}/{name}", date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system = 3  # Unix, which alone keeps modes
            entry.external_attr = (0o100_000 | mode) << 16
            archive.writestr(entry, data)
    return buffer.getvalue()


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
