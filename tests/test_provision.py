import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest
import typer
import yaml
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from typer.testing import CliRunner

from client.policy import SitePolicy, read_policy
from core.keys import (
    certificate_hosts,
    fingerprint,
    is_pair,
    new_request,
    new_site_key,
    open_authority,
    public_line,
    read_public_line,
    read_site_key,
)
from server.cli import register
from server.consortium import Consortium, read_consortium
from server.provision import provision

TEXT = """consortium: hills
server: fl.example.org:443
server_addresses: [192.0.2.7]
sites: [south, {name: hill, key: site}]
"""


def plan_of(text: str, folder: Path) -> Consortium:
    path = folder / "consortium.yaml"
    path.write_text(text)
    return read_consortium(path)


@pytest.fixture
def plan(tmp_path: Path) -> Consortium:
    return plan_of(TEXT, tmp_path)


@pytest.fixture
def hills(plan: Consortium, tmp_path: Path) -> Path:
    """The kits of two sites: `south`, whose key is made here, and `hill`, which makes its own and has not sent a request."""
    provision(plan, tmp_path / "hills")
    return tmp_path / "hills"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


def request_of(folder: Path, site: str) -> tuple[Path, ec.EllipticCurvePublicKey]:
    """What a site sends, and its public key."""
    folder.mkdir(exist_ok=True)
    key = new_site_key(folder / f"{site}-{len(list(folder.iterdir()))}.key")
    path = folder / f"{site}-{len(list(folder.iterdir()))}.csr"
    path.write_bytes(new_request(key, site))
    return path, key.public_key()


def sites_json(folder: Path) -> dict:
    return json.loads((folder / "server/sites.json").read_text())


def test_the_tree_is_what_the_readme_says(hills: Path):
    shared = {
        "kit.json",
        "ca.crt",
        "site.yaml",
        "start.sh",
        "Dockerfile",
        "compose.yaml",
        ".dockerignore",
        "README.md",
        "SHA256SUMS",
    }
    assert {path.name for path in hills.iterdir()} == {"authority", "server", "sites"}
    assert {path.name for path in (hills / "sites").iterdir()} == {"south", "south.zip", "hill", "hill.zip"}
    own = {"site.key", "site.pub", "isocenter-south.service"}
    assert {path.name for path in (hills / "sites/south").iterdir()} == shared | own
    assert {path.name for path in (hills / "sites/hill").iterdir()} == shared | {"isocenter-hill.service"}
    server = {"server.json", "ca.crt", "server.pem", "server.key", "sites.json", "nginx.conf", "start.sh"}
    server |= {"isocenter-server.service", "README.md", "SHA256SUMS"}
    assert {path.name for path in (hills / "server").iterdir()} == server


@pytest.mark.parametrize("umask", [0, 0o022])
def test_private_files_are_for_their_owner_alone(plan: Consortium, tmp_path: Path, umask: int):
    before = os.umask(umask)
    try:
        provision(plan, tmp_path / "hills")
    finally:
        os.umask(before)
    hills = tmp_path / "hills"
    private = {"authority/ca.key", "authority/ledger.json", "authority/ledger.lock", "server/server.key", "sites/south/site.key"}
    private |= {"sites/south.zip", "sites/hill.zip"}
    found = {path.relative_to(hills).as_posix(): mode(path) for path in hills.rglob("*") if path.is_file()}
    assert {name for name, bits in found.items() if bits == 0o600} == private - ({"authority/ledger.lock"} - set(found))
    assert {bits for name, bits in found.items() if name.endswith(".sh")} == {0o755}
    assert mode(hills / "authority") == 0o700
    assert not any(bits & 0o022 for bits in found.values()), "nobody else may change a file of a kit"


def test_private_keys_lie_where_they_must_and_nowhere_else(hills: Path):
    holders = {name for name, data in contents(hills).items() if b"PRIVATE KEY" in data}
    assert holders == {"authority/ca.key", "server/server.key", "sites/south/site.key", "sites/south.zip"}
    ca_key = (hills / "authority/ca.key").read_bytes()
    secret = ca_key.split(b"\n")[1]
    assert {name for name, data in contents(hills).items() if secret in data} == {"authority/ca.key"}


def test_no_kit_holds_a_path_of_this_machine(hills: Path, tmp_path: Path):
    kits = {name: data for name, data in contents(hills).items() if not name.startswith("authority/")}
    for word in (str(tmp_path), str(Path.home()), str(Path(__file__).parents[1])):
        assert [name for name, data in kits.items() if word.encode() in data and len(word) > 1] == []


@pytest.mark.parametrize("kit", ["server", "sites/south", "sites/hill"])
def test_sums_tell_every_file_of_a_kit(hills: Path, kit: str):
    sums = dict(reversed(line.split("  ")) for line in (hills / kit / "SHA256SUMS").read_text().splitlines())
    files = {name: hashlib.sha256(data).hexdigest() for name, data in contents(hills / kit).items() if name != "SHA256SUMS"}
    assert sums == files
    if shutil.which("sha256sum"):
        subprocess.run(["sha256sum", "-c", "--quiet", "--strict", "SHA256SUMS"], cwd=hills / kit, check=True)


@pytest.mark.parametrize("site", ["south", "hill"])
def test_a_zip_holds_the_kit_with_its_modes(hills: Path, site: str):
    with zipfile.ZipFile(hills / f"sites/{site}.zip") as archive:
        packed = {entry.filename: (archive.read(entry), entry.external_attr >> 16) for entry in archive.infolist()}
    kit = hills / "sites" / site
    assert packed == {f"{site}/{path.name}": (path.read_bytes(), path.stat().st_mode) for path in kit.iterdir()}


def test_a_kit_says_who_and_whom(hills: Path):
    about = json.loads((hills / "sites/south/kit.json").read_text())
    key = read_site_key(hills / "sites/south/site.key").public_key()
    ca = (hills / "sites/south/ca.crt").read_bytes()
    assert ca == (hills / "authority/ca.crt").read_bytes()
    assert (about["site"], about["consortium"], about["server"]) == ("south", "hills", "fl.example.org:443")
    assert (about["ca_sha256"], about["key"]) == (hashlib.sha256(ca).hexdigest(), fingerprint(key))
    assert about["flwr"].startswith("1.41.")
    assert read_public_line((hills / "sites/south/site.pub").read_text()) == key
    assert sites_json(hills) == {
        "sites": {"south": {"public_key": public_line(key), "fingerprint": fingerprint(key)}},
        "revoked": [],
    }
    assert json.loads((hills / "sites/hill/kit.json").read_text())["key"] is None


def test_the_server_certificate_names_what_sites_dial(hills: Path):
    pem, key = (hills / "server/server.pem").read_bytes(), (hills / "server/server.key").read_bytes()
    assert certificate_hosts(pem) == {"fl.example.org", "192.0.2.7", "localhost", "127.0.0.1"}
    assert is_pair(pem, key)


def test_running_it_again_changes_no_byte(plan: Consortium, hills: Path):
    before = contents(hills)
    lines = provision(plan, hills)
    assert contents(hills) == before
    assert [line.split(":")[0] for line in lines] == ["server", "south", "hill"]
    assert "has its key" in lines[1]
    assert "--request" in lines[2]


def test_another_site_changes_nothing_for_the_others(hills: Path, tmp_path: Path):
    before = contents(hills)
    provision(plan_of(TEXT.replace("[south,", "[north, south,"), tmp_path), hills)
    after = contents(hills)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"authority/ledger.json", "server/sites.json", "server/SHA256SUMS"}
    assert {Path(name).parts[1] for name in set(after) - set(before)} == {"north", "north.zip"}
    assert set(sites_json(hills)["sites"]) == {"south", "north"}


def test_kits_are_made_anew_from_what_was_issued(plan: Consortium, hills: Path):
    before = contents(hills)
    (hills / "sites/south/README.md").unlink()
    (hills / "sites/hill.zip").write_bytes(b"")
    provision(plan, hills)
    assert contents(hills) == before


def test_a_kit_whose_key_was_handed_over_stays_as_it_is(plan: Consortium, hills: Path):
    (hills / "sites/south/site.key").unlink()
    before = contents(hills)
    lines = provision(plan, hills)
    assert contents(hills) == before
    assert "no longer here" in lines[1]


def test_a_new_server_certificate_is_of_the_same_authority(plan: Consortium, hills: Path):
    before = contents(hills)
    [line, *_] = provision(plan, hills, renew=["server"])
    after = contents(hills)
    changed = {name for name in before if after[name] != before[name]}
    assert changed == {"authority/ledger.json", "server/server.pem", "server/server.key", "server/SHA256SUMS"}
    assert is_pair(after["server/server.pem"], after["server/server.key"])
    assert line.startswith("server: new certificate")
    assert len(json.loads(after["authority/ledger.json"])["server"]) == 2


def test_another_address_needs_another_certificate(hills: Path, tmp_path: Path):
    before = contents(hills)
    moved = plan_of(TEXT.replace("fl.example.org", "new.example.org"), tmp_path)
    with pytest.raises(ValueError, match=r"got one without new\.example\.org\. Make a new one with --renew server\.$"):
        provision(moved, hills)
    assert contents(hills) == before
    provision(moved, hills, renew=["server"])
    assert "new.example.org" in certificate_hosts((hills / "server/server.pem").read_bytes())
    assert json.loads((hills / "sites/south/kit.json").read_text())["server"] == "new.example.org:443"


def test_a_key_without_its_certificate_is_made_anew_after_a_crash(plan: Consortium, hills: Path):
    """Stopped between the two files of a renewal: neither is good without the other."""
    (hills / "server/server.key").write_bytes((hills / "authority/ca.key").read_bytes())
    provision(plan, hills)
    assert is_pair((hills / "server/server.pem").read_bytes(), (hills / "server/server.key").read_bytes())
    assert (hills / "authority/ca.key").read_bytes() != (hills / "server/server.key").read_bytes()


def test_a_key_made_before_a_crash_is_used(plan: Consortium, tmp_path: Path):
    key = new_site_key(tmp_path / "hills/sites/south/site.key")
    provision(plan, tmp_path / "hills")
    assert sites_json(tmp_path / "hills")["sites"]["south"]["fingerprint"] == fingerprint(key.public_key())


def test_a_renewed_site_has_a_new_key_and_the_old_one_is_shut_out(plan: Consortium, hills: Path):
    old = sites_json(hills)["sites"]["south"]
    provision(plan, hills, renew=["south"])
    new = sites_json(hills)
    assert new["sites"]["south"]["public_key"] != old["public_key"]
    assert new["revoked"] == [{"site": "south", **old}]
    assert fingerprint(read_site_key(hills / "sites/south/site.key").public_key()) == new["sites"]["south"]["fingerprint"]
    with zipfile.ZipFile(hills / "sites/south.zip") as archive:
        assert archive.read("south/site.key") == (hills / "sites/south/site.key").read_bytes()


def test_a_revoked_site_stays_out_until_it_is_renewed(plan: Consortium, hills: Path):
    provision(plan, hills, revoke=["south"])
    assert sites_json(hills)["sites"] == {}
    assert [entry["site"] for entry in sites_json(hills)["revoked"]] == ["south"]
    before = contents(hills)
    lines = provision(plan, hills)
    assert contents(hills) == before
    assert "south: revoked; let it in again, with another key, with --renew south" in lines
    with pytest.raises(ValueError, match=r"^--revoke: the site must be one that has a key, got 'south', one that is revoked\.$"):
        provision(plan, hills, revoke=["south"])
    provision(plan, hills, renew=["south"])
    assert set(sites_json(hills)["sites"]) == {"south"}
    assert len(sites_json(hills)["revoked"]) == 1


def test_a_site_that_left_the_file_is_named_until_it_is_revoked(hills: Path, tmp_path: Path):
    rest = plan_of(TEXT.replace("south, ", ""), tmp_path)
    lines = provision(rest, hills)
    assert "south: not in the consortium's file, but let in by its key; shut it out with --revoke south" in lines
    assert set(sites_json(hills)["sites"]) == {"south"}
    assert "south: revoked" in provision(rest, hills, revoke=["south"])
    assert sites_json(hills)["sites"] == {}


def test_a_request_lets_in_the_key_that_the_site_made(plan: Consortium, hills: Path, tmp_path: Path):
    request, key = request_of(tmp_path / "sent", "hill")
    south = contents(hills / "sites/south")
    lines = provision(plan, hills, requests=[request])
    assert any(line.startswith(f"hill: key of its request, {fingerprint(key)}; ask the site on the phone") for line in lines)
    assert sites_json(hills)["sites"]["hill"] == {"public_key": public_line(key), "fingerprint": fingerprint(key)}
    assert json.loads((hills / "sites/hill/kit.json").read_text())["key"] == fingerprint(key)
    assert b"PRIVATE KEY" not in b"".join(contents(hills / "sites/hill").values()) + (hills / "sites/hill.zip").read_bytes()
    assert contents(hills / "sites/south") == south
    before = contents(hills)
    provision(plan, hills, requests=[request])
    assert contents(hills) == before, "the same request again changes nothing"


def test_a_site_that_makes_its_key_is_renewed_by_a_new_request(plan: Consortium, hills: Path, tmp_path: Path):
    first, _ = request_of(tmp_path / "sent", "hill")
    second, key = request_of(tmp_path / "sent", "hill")
    provision(plan, hills, requests=[first])
    with pytest.raises(ValueError, match=r"^--request: hill has a key and must keep it, .* --renew hill\.$"):
        provision(plan, hills, requests=[second])
    with pytest.raises(ValueError, match=r"^--renew: hill makes its key itself and must send a new request, got none\."):
        provision(plan, hills, renew=["hill"])
    provision(plan, hills, requests=[second], renew=["hill"])
    assert sites_json(hills)["sites"]["hill"]["fingerprint"] == fingerprint(key)
    with pytest.raises(ValueError, match=r"^--request: the key of hill must be new, got one that hill had\."):
        provision(plan, hills, requests=[first], renew=["hill"])
    provision(plan, hills, revoke=["hill"])
    third, _ = request_of(tmp_path / "sent", "hill")
    with pytest.raises(ValueError, match=r"^--request: hill is revoked and must be let in by name, got no --renew hill\.$"):
        provision(plan, hills, requests=[third])


def tampered(request: Path) -> Path:
    """The same request with another name in it, as somebody on the way could write it."""
    text = request.read_text().splitlines()
    from base64 import b64decode, encodebytes

    der = b64decode("".join(text[1:-1])).replace(b"hill", b"hall")
    request.write_text(f"{text[0]}\n{encodebytes(der).decode()}{text[-1]}\n")
    return request


def test_requests_that_cannot_be_are_refused_and_change_nothing(plan: Consortium, hills: Path, tmp_path: Path):
    sent = tmp_path / "sent"
    request, _ = request_of(sent, "hill")
    provision(plan, hills, requests=[request])
    again = plan_of(TEXT.replace("[south,", "[{name: dale, key: site}, south,"), tmp_path)
    provision(again, hills)
    stolen = sent / "stolen.csr"
    stolen.write_bytes(new_request(read_site_key(next(sent.glob("hill-*.key"))), "dale"))
    refused = [
        ([tampered(request_of(sent, "hill")[0])], r"request: its signature must be its own key's"),
        ([request_of(sent, "nowhere")[0]], r"its site must be one of dale, south, hill, got 'nowhere'"),
        ([request_of(sent, "south")[0]], r"south must have `key: site` in the consortium's file"),
        (
            [request_of(sent, "dale")[0], request_of(sent, "dale")[0]],
            r"each site must have one request, got a second one of dale",
        ),
        ([stolen], r"the key of dale must be new, got one that hill had"),
        ([sent / "none.csr"], r"none\.csr: the request must be readable, got No such file or directory"),
    ]
    before = contents(hills)
    for requests, message in refused:
        with pytest.raises(ValueError, match=message) as error:
            provision(again, hills, requests=requests)
        assert "\n" not in str(error.value)
        assert contents(hills) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"revoke": ["north"]}, r"^--revoke: the site must be one that has a key, got 'north', one without a key\.$"),
        ({"revoke": ["hill"]}, r"^--revoke: .* got 'hill', one without a key\.$"),
        ({"renew": ["north"]}, r"^--renew: it must be server or a site of the file that has had a key, got 'north'\.$"),
        ({"renew": ["south"], "revoke": ["south"]}, r"^provision: a site must be renewed or revoked, got both for south\.$"),
    ],
)
def test_what_cannot_be_renewed_or_revoked_is_said(plan: Consortium, hills: Path, options: dict[str, list[str]], message: str):
    before = contents(hills)
    with pytest.raises(ValueError, match=message):
        provision(plan, hills, **options)
    assert contents(hills) == before


def test_an_authority_that_was_changed_is_refused(plan: Consortium, hills: Path, tmp_path: Path):
    with pytest.raises(ValueError, match=r"^consortium: its name must stay 'hills', got 'dales'\."):
        provision(plan_of(TEXT.replace("hills", "dales"), tmp_path), hills)
    ledger = (hills / "authority/ledger.json").read_bytes()
    (hills / "authority/ledger.json").unlink()
    with pytest.raises(ValueError, match=r"^authority: ledger\.json must be beside ca\.key, got none\."):
        provision(plan, hills)
    (hills / "authority/ledger.json").write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"^authority: ledger\.json must be what this command wrote"):
        provision(plan, hills)
    (hills / "authority/ledger.json").write_bytes(ledger)
    (hills / "sites/south/site.key").unlink()
    new_site_key(hills / "sites/south/site.key")
    with pytest.raises(ValueError, match=r"^south: its site\.key must be SHA256:.* Restore or --renew it\.$"):
        provision(plan, hills)
    (hills / "authority/ca.key").unlink()
    with pytest.raises(ValueError, match=r"^authority: ca\.crt and ca\.key must be"):
        provision(plan, hills, renew=["south"])


FAULTS = {
    "no file": (None, r"^consortium\.yaml: the file must be readable, got No such file or directory\.$"),
    "no yaml": ("a: [", r"^consortium\.yaml: the file must be YAML, got "),
    "a list": ("[a]", r"^consortium\.yaml: the file: "),
    "empty": ("", r"^consortium\.yaml: the file: .*, got None\.$"),
    "twice": (TEXT + "server: b.example.org:1\n", r"^consortium\.yaml: the file must be YAML, got server given twice\.$"),
    "unknown key": (TEXT + "port: 1\n", r"^consortium\.yaml: port: .*, got 1\.$"),
    "no name": (TEXT.replace("consortium: hills\n", ""), r"^consortium\.yaml: consortium: Field required\.$"),
    "bad name": (TEXT.replace("hills", "../hills"), r"^consortium\.yaml: consortium: .* got '\.\./hills'\.$"),
    "no port": (TEXT.replace(":443", ""), r"^consortium\.yaml: server: must be host:port, .* got 'fl\.example\.org'\.$"),
    "high port": (TEXT.replace(":443", ":70000"), r"^consortium\.yaml: server\.port: .* got 70000\.$"),
    "bad host": (
        TEXT.replace("fl.example.org", "fl_x"),
        r"^consortium\.yaml: server\.host: must be a host name .* got 'fl_x'\.$",
    ),
    "url": (TEXT.replace("fl.example", "https://fl.example"), r"^consortium\.yaml: server: must be host:port"),
    "one port": (TEXT + "control_port: 443\n", r"^consortium\.yaml: the file: control_port must differ from the port of server"),
    "bad address": (TEXT.replace("192.0.2.7", "192.0.2.777"), r"^consortium\.yaml: server_addresses\.0: must be a host name"),
    "no sites": (re.sub("sites: .*", "sites: []", TEXT), r"^consortium\.yaml: sites: List should have at least 1 item"),
    "site twice": (
        TEXT.replace("[south,", "[South, south,"),
        r"^consortium\.yaml: the file: sites: each must have a name of its own",
    ),
    "site server": (TEXT.replace("[south,", "[server,"), r"^consortium\.yaml: the file: sites: a name must not be the server's"),
    "bad site": (TEXT.replace("[south,", "[so uth,"), r"^consortium\.yaml: sites\.0\.name: .* got 'so uth'\.$"),
    "boolean": (TEXT.replace("[south,", "[no,"), r"^consortium\.yaml: sites\.0: .* got False\.$"),
    "bad key": (TEXT.replace("key: site", "key: theirs"), r"^consortium\.yaml: sites\.1\.key: .* got 'theirs'\.$"),
    "python": ("!!python/object/apply:os.system ['true']", r"^consortium\.yaml: the file must be YAML, got "),
}


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_of_the_file_is_one_line(tmp_path: Path, fault: str):
    text, message = FAULTS[fault]
    if text is not None:
        (tmp_path / "consortium.yaml").write_text(text)
    with pytest.raises(ValueError, match=message) as error:
        read_consortium(tmp_path / "consortium.yaml")
    assert "\n" not in str(error.value)


def test_addresses_are_read_as_people_write_them(tmp_path: Path):
    text = TEXT.replace("fl.example.org", "FL.Example.org").replace("[192.0.2.7]", "['[2001:DB8::7]', localhost]")
    plan = plan_of(text, tmp_path)
    assert plan.hosts == ["fl.example.org", "2001:db8::7", "localhost", "127.0.0.1"]
    assert plan.control_port == 8443
    assert (
        str(plan_of(TEXT.replace("fl.example.org", "'[2001:db8::7]").replace(":443", ":443'"), tmp_path).server)
        == "[2001:db8::7]:443"
    )


def test_a_policy_names_the_site_and_leaves_the_rest_to_it(hills: Path, tmp_path: Path):
    """The kit's file is a policy as it stands, and with all of its examples and defaults taken in; no setting is without one."""
    path = hills / "sites/south/site.yaml"
    assert read_policy(path) == SitePolicy.model_validate({"site": "south", "data": {"root": "/data"}})
    head, options = path.read_text().split("\n\n", 1)
    shown = head.replace("\n#   ", "\n  ") + "\n" + re.sub(r"^# ", "", options, flags=re.MULTILINE)
    (tmp_path / "all.yaml").write_text(shown)
    everything = read_policy(tmp_path / "all.yaml")
    assert everything.hours == "19:00-07:00"
    assert set(yaml.safe_load(shown)) == set(SitePolicy.model_fields)
    for group in ("data", "groups", "allow"):
        assert set(yaml.safe_load(shown)[group]) == set(type(getattr(everything, group)).model_fields)


def test_a_container_sees_the_scans_read_only_and_one_address(hills: Path):
    compose = yaml.safe_load((hills / "sites/south/compose.yaml").read_text())
    site, way = compose["services"]["site"], compose["services"]["way"]
    assert compose["networks"]["inside"] == {"internal": True}
    assert site["networks"] == ["inside"]
    assert site["links"] == ["way:fl.example.org"]
    assert way["entrypoint"] == ["socat", "TCP-LISTEN:443,fork,reuseaddr", "TCP:fl.example.org:443"]
    assert [volume.rsplit(":", 1)[1] for volume in site["volumes"] if "/data" in volume or volume.startswith(".:")] == [
        "ro",
        "ro",
    ]
    for service in (site, way):
        assert service["read_only"] is True
        assert service["cap_drop"] == ["ALL"]
        assert service["security_opt"] == ["no-new-privileges:true"]
        assert "ports" not in service
    assert (hills / "sites/south/.dockerignore").read_text().splitlines() == ["*", "!isocenter"], "no key goes into an image"


def test_a_server_without_a_name_has_no_container_and_says_why(tmp_path: Path):
    plan = plan_of(TEXT.replace("fl.example.org", "192.0.2.1"), tmp_path)
    provision(plan, tmp_path / "hills")
    kit = tmp_path / "hills/sites/south"
    assert not {"compose.yaml", "Dockerfile", ".dockerignore"} & {path.name for path in kit.iterdir()}
    assert "There is no compose.yaml in this kit" in (kit / "README.md").read_text()


@pytest.mark.parametrize("kit", ["sites/south", "sites/hill", "server"])
def test_a_readme_is_one_page_with_few_commands(hills: Path, kit: str):
    text = (hills / kit / "README.md").read_text()
    blocks = re.findall(r"^```\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert 0 < len(blocks[0].splitlines()) < 10
    assert len(text.splitlines()) <= 60
    assert max(map(len, text.splitlines())) <= 140
    assert "{{" not in text
    assert "{%" not in text


@pytest.mark.parametrize("kit", ["sites/south", "server"])
@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")
def test_systemd_takes_the_unit(hills: Path, tmp_path: Path, kit: str):
    [unit] = (hills / kit).glob("*.service")
    text = unit.read_text().replace("/opt/isocenter/venv/bin/isocenter", shutil.which("true") or "")
    (tmp_path / unit.name).write_text(text)
    done = subprocess.run(["systemd-analyze", "verify", tmp_path / unit.name], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


NGINX = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")


@pytest.mark.skipif(NGINX is None, reason="nginx is not installed")
def test_nginx_takes_its_configuration(hills: Path):
    (hills / "server/state/nginx").mkdir(parents=True)
    command = [str(NGINX), "-t", "-p", f"{hills}/server/", "-c", f"{hills}/server/nginx.conf"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def has_compose() -> bool:
    return (
        shutil.which("docker") is not None
        and not subprocess.run(["docker", "compose", "version"], capture_output=True, check=False).returncode
    )


@pytest.mark.skipif(not has_compose(), reason="docker compose is not installed")
def test_docker_compose_takes_its_configuration(hills: Path):
    environment = {**os.environ, "DATA": "/data", "KIT_UID": "1000", "KIT_GID": "1000"}
    command = ["docker", "compose", "--project-directory", str(hills / "sites/south"), "config", "--quiet"]
    done = subprocess.run(command, env=environment, cwd=hills / "sites/south", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("kit", ["sites/south", "server"])
def test_start_runs_the_command_on_its_own_folder(hills: Path, tmp_path: Path, kit: str):
    folder = (hills / kit).rename(tmp_path / "a kit")
    environment = {**os.environ, "ISOCENTER": "echo"}
    done = subprocess.run([folder / "start.sh", "--more"], env=environment, capture_output=True, text=True, check=True, cwd="/")
    assert done.stdout.split()[1:2] == ["start"]
    assert done.stdout.rstrip().endswith(f"{folder} --more")


def command() -> typer.Typer:
    app = typer.Typer()
    register(app)
    return app


def test_the_command_makes_the_kits_and_says_what_is_to_be_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "consortium.yaml").write_text(TEXT)
    done = CliRunner().invoke(command(), ["provision", "consortium.yaml"])
    assert done.exit_code == 0, done.output
    assert [line.split(":")[0] for line in done.stdout.splitlines()] == ["authority", "server", "south", "hill"]
    assert open_authority(tmp_path / "hills/authority").pem == (tmp_path / "hills/server/ca.crt").read_bytes()
    request, key = request_of(tmp_path / "sent", "hill")
    options = ["--output", str(tmp_path / "hills"), "--request", str(request), "--renew", "server", "--revoke", "south"]
    done = CliRunner().invoke(command(), ["provision", "consortium.yaml", *options])
    assert done.exit_code == 0, done.output
    assert set(sites_json(tmp_path / "hills")["sites"]) == {"hill"}
    assert fingerprint(key) in done.stdout


def test_the_command_says_a_fault_in_one_line(tmp_path: Path):
    (tmp_path / "consortium.yaml").write_text(TEXT + "more: 1\n")
    done = CliRunner().invoke(command(), ["provision", str(tmp_path / "consortium.yaml")])
    assert done.exit_code == 1
    assert len(done.stderr.splitlines()) == 1
    assert not (tmp_path / "hills").exists()


def test_two_processes_do_not_write_the_same_kits(plan: Consortium, hills: Path):
    from filelock import FileLock

    with FileLock(hills / "authority/ledger.lock"), pytest.raises(ValueError, match=r"one process at a time must write the kits"):
        provision(plan, hills)


def test_a_public_key_of_a_kit_is_of_its_private_one(hills: Path):
    private = serialization.load_ssh_private_key((hills / "sites/south/site.key").read_bytes(), None)
    with zipfile.ZipFile(io.BytesIO((hills / "sites/south.zip").read_bytes())) as archive:
        assert serialization.load_ssh_public_key(archive.read("south/site.pub")) == private.public_key()
