"""The comparison of speeds: what is compared agrees, and what does not agree is found. No timing is asserted."""

import io
import json
import platform
import re
import socket
import subprocess
import sys
import threading
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from types import SimpleNamespace

import nibabel as nib
import numpy as np
import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

from simulations import speed, speed_data, speed_deployment
from simulations.peers import nvflare_client, nvflare_round
from simulations.relay import Relay

NUM_SCANS = 16


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither package is installed."""
    monkeypatch.setitem(sys.modules, "lightly.loss", None)
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", None)


@pytest.fixture
def stocked(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for the packages, which must be asked for the loss that ours is."""

    def of_two_views(loss: speed.Loss, **expected: float) -> object:
        def build(**given: float) -> object:
            assert given == expected
            return lambda z1, z2: loss(z1, z2, {})

        return build

    def of_labelled_rows(loss: speed.Loss) -> object:
        def build(temperature: float) -> object:
            assert temperature == speed.TEMPERATURE

            def call(rows_RD: Tensor, class_R: Tensor) -> Tensor:
                return loss(*rows_RD.chunk(2), {"diagnosis": class_R[: len(class_R) // 2]})

            return call

        return build

    temperature = {"temperature": speed.TEMPERATURE}
    lightly = {
        "NTXentLoss": of_two_views(speed.ntxent, **temperature),
        "DCLLoss": of_two_views(speed.dcl, **temperature),
        "BarlowTwinsLoss": of_two_views(speed.barlow_twins, lambda_param=speed.REDUNDANCY_WEIGHT),
    }
    metric_learning = {"SupConLoss": of_labelled_rows(speed.supcon), "NTXentLoss": of_labelled_rows(speed.supcon)}
    monkeypatch.setitem(sys.modules, "lightly.loss", SimpleNamespace(**lightly))
    monkeypatch.setitem(sys.modules, "pytorch_metric_learning.losses", SimpleNamespace(**metric_learning))


@pytest.mark.usefixtures("stocked")
def test_every_pair_agrees_and_is_timed() -> None:
    told = []
    timings, notes = speed.compare_losses(
        [NUM_SCANS], repeats=1, seconds=0, on_pair=lambda text, done, total: told.append((text, done, total))
    )
    measured = [(timing.loss, timing.against) for timing in timings]
    assert len(set(measured)) == len(measured) == len(speed.OURS) + 5
    assert {loss for loss, against in measured if against == "paper"} == set(speed.OURS)
    assert all(timing.repeats == 1 and timing.num_scans == NUM_SCANS for timing in timings)
    assert all(0 < timing.ratio_p10 <= timing.ratio <= timing.ratio_p90 < float("inf") for timing in timings)
    assert all(timing.ours_ms > 0 and timing.theirs_ms > 0 for timing in timings)
    assert told[0] == ("ntxent against paper, 16 scans", 0, len(timings))
    assert notes == []


def altered(loss: speed.Loss, by: float) -> speed.Loss:
    """The same value, with a gradient that is off by a factor."""

    def changed(z1: Tensor, z2: Tensor, metadata: speed.Metadata) -> Tensor:
        value = loss(z1, z2, metadata)
        return value + by * (value - value.detach())

    return changed


@pytest.mark.parametrize("name", speed.OURS)
def test_an_altered_transcription_is_found(name: str) -> None:
    ours, theirs, batch = speed.OURS[name], speed.PAPER[name], speed.Batch.random(NUM_SCANS)
    for what, other in (
        ("loss", lambda *given: theirs(*given) * 1.001),
        ("gradient", altered(theirs, 1e-3)),
        ("loss", lambda *given: theirs(*given) * torch.nan),
    ):
        pair = speed.Pair(name=name, against="paper", ours=ours, theirs=other)
        with pytest.raises(speed.DisagreementError, match=f"the {what} of"):
            speed.measure(pair, batch, repeats=1, seconds=0)


def test_a_pair_without_a_gradient_compares_nothing() -> None:
    def zero(z1: Tensor, z2: Tensor, _: speed.Metadata) -> Tensor:
        return 1.0 + 0.0 * (z1 + z2).sum()

    pair = speed.Pair(name="none", against="paper", ours=zero, theirs=zero)
    with pytest.raises(speed.DisagreementError, match="the gradient of none"):
        speed.check_agreement(pair, speed.Batch.random(NUM_SCANS))


@pytest.mark.usefixtures("bare")
def test_what_is_not_measured_is_said() -> None:
    pairs, notes = speed.all_pairs()
    assert {pair.against for pair in pairs} == {"paper"}
    assert notes == [
        "lightly: not installed (pip install lightly)",
        "pytorch-metric-learning: not installed (pip install pytorch-metric-learning)",
    ]
    assert [pair.name for pair in pairs if pair.most_scans] == ["threshold"]


@pytest.mark.usefixtures("bare")
def test_a_size_that_theirs_cannot_hold_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        speed,
        "all_pairs",
        lambda: (
            [speed.Pair(name="yaware", against="paper", ours=speed.OURS["yaware"], theirs=speed.yaware, most_scans=8)],
            ["a note"],
        ),
    )
    timings, notes = speed.compare_losses([8, 16], repeats=1, seconds=0)
    assert [timing.num_scans for timing in timings] == [8]
    assert notes == ["a note", "yaware against paper: only up to 8 scans, beyond which theirs takes gigabytes"]


@pytest.mark.usefixtures("bare")
def test_the_command_prints_a_table_and_writes_the_figures(tmp_path: Path) -> None:
    path = tmp_path / "speed.json"
    options = ["--sizes", "8", "--repeats", "2", "--seconds", "0", "--only", "yaware", "--only", "ntxent", "--output", str(path)]
    outcome = CliRunner().invoke(speed.app, ["losses", *options])
    assert outcome.exit_code == 0, outcome.output
    assert "yaware" in outcome.stdout
    assert "pip install lightly" in outcome.stdout
    figures = json.loads(path.read_text())
    assert figures["machine"]["threads"] == 1
    assert [(row["loss"], row["against"], row["num_scans"], row["repeats"]) for row in figures["timings"]] == [
        ("ntxent", "paper", 8, 2),
        ("yaware", "paper", 8, 2),
    ]


@pytest.mark.usefixtures("bare")
def test_the_command_fails_where_losses_differ(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(speed.PAPER, "exp", speed.yaware)
    outcome = CliRunner().invoke(speed.app, ["losses", "--sizes", "8", "--repeats", "1", "--seconds", "0", "--only", "exp"])
    assert outcome.exit_code == 1
    assert "the loss of exp must be that of paper" in outcome.stderr


def test_an_unknown_loss_is_refused() -> None:
    outcome = CliRunner().invoke(speed.app, ["losses", "--only", "simclr"])
    assert outcome.exit_code == 2
    assert "simclr" in outcome.stderr


def test_operators_of_torchvision_are_declared_where_its_build_does_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    imported = []

    def import_module(name: str) -> SimpleNamespace:
        imported.append(name)
        if len(imported) == 1:
            raise RuntimeError("operator torchvision::nms does not exist")
        losses = ("NTXentLoss", "DCLLoss", "BarlowTwinsLoss")
        return SimpleNamespace(**dict.fromkeys(losses, lambda **_: None))

    declared = []
    monkeypatch.setattr(speed.importlib, "import_module", import_module)
    monkeypatch.setattr(speed, "declare_torchvision_operators", lambda: declared.append(True))
    assert [pair.against for pair in speed.lightly_pairs()] == ["lightly"] * 3
    assert imported == ["lightly.loss"] * 2
    assert declared == [True]


@pytest.fixture
def few_scans(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Five small heads, and the small grid that both sides bring them to."""
    monkeypatch.setattr(speed_data, "SETTINGS", replace(speed_data.SETTINGS, voxel_size_mm=4.0, shape=(20, 24, 20)))
    x, y, z = np.meshgrid(*[np.linspace(-1, 1, size) for size in (20, 24, 20)], indexing="ij")
    for number in range(5):
        random = np.random.default_rng(number)
        values = 100 * (x**2 + y**2 + z**2 < 0.8) * (2 + x + 0.3 * y) + random.normal(0, 3, (20, 24, 20))
        nib.save(nib.Nifti1Image(values.astype(np.float32), np.diag([4.0, 4, 4, 1])), tmp_path / f"sub-{number}_T1w.nii.gz")
    nib.save(nib.Nifti1Image(np.ones((4, 4, 4), np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    return speed_data.find_scans(tmp_path)


@pytest.mark.filterwarnings("ignore")  # MONAI's and torch's own
def test_every_side_feeds_every_scan_in_two_views(few_scans: list[Path]) -> None:
    assert len(few_scans) == 5
    told: list[str] = []

    feeds = speed_data.compare_feeds("few", few_scans, first_turns=1, turns=2, on_turn=told.append)

    assert feeds[0].side == "ours"
    assert [feed.side for feed in feeds[1:]] == ["PersistentDataset", "CacheDataset"]
    assert all(len(feed.first) == 1 and len(feed.cached) == 2 and min(feed.first + feed.cached) > 0 for feed in feeds)
    assert feeds[0].cached_ratio == (1.0, 1.0, 1.0)
    assert feeds[1].correlation > 0.95
    assert any("cached epoch, PersistentDataset, turn 2 of 2" in text for text in told)
    assert "PersistentDataset" in printed(speed_data.as_table(feeds))


@pytest.mark.filterwarnings("ignore")
def test_views_of_both_sides_are_two_different_ones_of_each_scan(few_scans: list[Path], tmp_path: Path) -> None:
    sides = (
        speed_data.Ours(few_scans, tmp_path / "a"),
        speed_data.Theirs("persistent", 0, few_scans, tmp_path / "b"),
    )

    for side in sides:
        batch = torch.cat([views.clone() for views in side.epoch()])
        assert batch.shape == (5, 2, 1, 20, 24, 20)
        assert (batch[:, 0] != batch[:, 1]).flatten(1).any(1).all()
        # A box of .3 of each axis is blanked in each.
        assert np.mean([float(torch.corrcoef(torch.stack([v.flatten() for v in pair]))[0, 1]) > 0.3 for pair in batch]) > 0.9


@pytest.mark.filterwarnings("ignore")
def test_sides_that_do_not_do_the_same_are_not_timed(
    few_scans: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours, theirs = speed_data.Ours(few_scans, tmp_path / "a"), speed_data.Theirs("cache", 0, few_scans, tmp_path / "b")
    list(ours.epoch())
    assert speed_data.check_alike(ours, theirs) > 0.95
    monkeypatch.setattr(theirs, "volume", lambda index: ours.volume(index).flip(1))

    with pytest.raises(speed_data.DifferentVolumesError, match="must make alike volumes"):
        speed_data.check_alike(ours, theirs)


def test_memory_is_that_of_the_process_itself(few_scans: list[Path], tmp_path: Path) -> None:
    assert 50 < speed_data.memory_of_epochs(few_scans, "ours", tmp_path / "a") < 10_000
    table = printed(speed_data.as_memory_table("few", {"ours": [(3, 100.0), (5, 101.0)], "cache": [(3, 100.0), (5, 200.0)]}))
    assert "5 scans" in table
    assert "CacheDataset" in table


def printed(table: object) -> str:
    from rich.console import Console

    console = Console(width=150, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="the C library is not glibc")
def test_steps_use_the_memory_again_that_steps_before_them_freed() -> None:
    result = CliRunner().invoke(speed.app, ["steps", "--turns", "1", "--num-steps", "6"])
    assert result.exit_code == 0
    kept, given_back = (int(text) for text in re.findall(r"(\d+) page faults", result.output))
    assert 5 * kept < given_back
    assert re.search(r"given back / kept: \d+\.\d\d \(", result.output)


def logged(seconds: float, text: str, border: str = "-") -> str:
    """A line of NVFlare's log, whose clock is in local time."""
    asctime = datetime.fromtimestamp(1_800_000_000 + seconds).strftime("%Y-%m-%d %H:%M:%S,%f")[:-3]
    framed = f"\n{border * 80}\n{text:^80}\n{border * 80}\n" if text.endswith(".") else text
    return json.dumps({"asctime": asctime, "name": "FedAvg", "levelname": "INFO", "message": framed}) + "\n"


SERVER_LOG = (
    logged(0.0, "Start FedAvg.", "=")
    + logged(0.25, "Round 0 started.")
    + logged(0.5, "Sampled clients: ['north', 'south']")
    + logged(6.25, "Round 1 started.")
    + logged(9.0, "Aggregated 2/2 results")
    + logged(10.0, "Finished FedAvg.", "=")
    + logged(12.0, "Server app stopped")
)


def write_steps(folder: Path, steps: dict[str, list[tuple[int, float, float]]]) -> dict[str, Path]:
    for site, taken in steps.items():
        lines = [json.dumps({"round": number, "began": began, "ended": ended}) for number, began, ended in taken]
        (folder / f"{site}.jsonl").write_text("".join(f"{line}\n" for line in lines))
    return {site: folder / f"{site}.jsonl" for site in speed_deployment.SITES}


def test_rounds_of_nvflare_are_read_from_its_log_and_its_clients(tmp_path: Path) -> None:
    (tmp_path / "log.json").write_text(SERVER_LOG)
    times = write_steps(tmp_path, {"north": [(0, 1.0, 3.0), (1, 7.0, 7.25)], "south": [(0, 2.0, 2.5), (1, 7.5, 8.5)]})

    began, rounds = speed_deployment.read_nvflare(tmp_path / "log.json", times)

    assert began == pytest.approx(1_800_000_000.25)
    assert [each.seconds for each in rounds] == pytest.approx([6.0, 3.75])
    assert rounds[1].trained_seconds == {"north": 0.25, "south": 1.0}
    assert [each.overhead_s for each in rounds] == pytest.approx([4.0, 2.75])


@pytest.mark.parametrize(
    ("log", "steps", "refusal"),
    [
        (SERVER_LOG.partition(logged(10.0, "Finished FedAvg.", "="))[0], {}, "must finish, it ended in round 2"),
        (SERVER_LOG, {}, "all of north, south must train in round 0, got none"),
        (SERVER_LOG, {"north": [(0, 1, 2), (1, 1, 2)], "south": [(0, 1, 2)]}, "must train in round 1, got north"),
    ],
    ids=["unfinished", "no steps", "a site missing"],
)
def test_a_job_of_nvflare_that_is_not_whole_is_refused(
    tmp_path: Path, log: str, steps: dict[str, list[tuple[int, float, float]]], refusal: str
) -> None:
    (tmp_path / "log.json").write_text(log)
    with pytest.raises(speed_deployment.PeerError, match=refusal):
        speed_deployment.read_nvflare(tmp_path / "log.json", write_steps(tmp_path, steps))


def test_rounds_of_ours_are_read_from_what_the_run_told(tmp_path: Path) -> None:
    lines = [
        {"stage": "pretrain", "round": 1, "seconds": 9.5, "trained_seconds": {"north": 1.0, "south": 2.5}, "sites": {}},
        {"stage": "full", "round": 1, "seconds": 1.0, "trained_seconds": {"north": 1.0}, "sites": {}},
    ]
    (tmp_path / "rounds.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    [only] = speed_deployment.read_ours(tmp_path / "rounds.jsonl")
    assert only.overhead_s == 7.0


def test_what_a_client_of_nvflare_writes_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from monai.networks.nets import DenseNet121

    state = DenseNet121(spatial_dims=3, in_channels=1, out_channels=2).state_dict()
    received = [SimpleNamespace(params=state, current_round=number) for number in range(2)]
    sent: list[dict[str, Tensor]] = []
    flare = SimpleNamespace(
        init=lambda: None,
        is_running=lambda: bool(received),
        receive=lambda: received.pop(0),
        get_site_name=lambda: "north",
        FLModel=lambda params: params,
        send=sent.append,
    )
    monkeypatch.setitem(sys.modules, "nvflare", SimpleNamespace(client=flare))
    monkeypatch.setitem(sys.modules, "nvflare.client", flare)

    nvflare_client.main(tmp_path)

    (tmp_path / "log.json").write_text(SERVER_LOG)
    _, rounds = speed_deployment.read_nvflare(tmp_path / "log.json", {"north": tmp_path / "north.jsonl"})
    assert all(0 < each.trained_seconds["north"] < 60 for each in rounds)
    assert list(sent[0]) == list(state)
    assert any(not torch.equal(sent[0][name], state[name]) for name in state)


def test_nvflare_is_provisioned_at_the_port_and_for_the_sites_asked_for(tmp_path: Path) -> None:
    path = nvflare_round.write_project(tmp_path / "project.yml", 1234, ["north", "south"])
    participants = json.loads(path.read_text())["participants"]
    assert [each["fed_learn_port"] for each in participants if each["type"] == "server"] == [1234]
    assert [each["name"] for each in participants if each["type"] == "client"] == ["north", "south"]


def turn(system: speed_deployment.System, start_s: float, *seconds: float, peak_mb: float = 100.0) -> speed_deployment.Turn:
    rounds = tuple(speed_deployment.Round(seconds=each, trained_seconds={"north": 0.5, "south": 0.25}) for each in seconds)
    sizes = (4000, 8000) if system == "ours" else (None, None)
    return speed_deployment.Turn(
        system=system,
        start_s=start_s,
        rounds=rounds,
        peak_mb=peak_mb,
        others_cpus=0.0,
        bytes_to_sites=sizes[0],
        bytes_from_sites=sizes[1],
    )


TURNS = [
    turn("ours", 10, 2.5, 3.5, 4.5),
    turn("NVFlare", 20, 5.5, 6.5, 7.5, peak_mb=400),
    turn("ours", 30, 8.5, 8.5, 8.5),
    turn("NVFlare", 20, 4.5, 4.5, 4.5),
]


def test_figures_of_deployment_are_compared_in_the_same_turn() -> None:
    rows = {row.name: row for row in speed_deployment.compare(TURNS)}
    overhead = rows["overhead of a round, s"]
    assert overhead.ours == (6.0, 2.0, 8.0)
    assert overhead.theirs == (4.5, 4.0, 7.0)
    assert overhead.ratio == (1.25, 0.5, 2.0)  # of 3 to 6 and of 8 to 4
    assert rows["start-up, s"].ratio == (1.0, 0.5, 1.5)
    assert rows["most memory, MB"].ratio == (0.625, 0.25, 1.0)


def test_the_payload_is_what_a_message_carries_of_all_weights() -> None:
    found = speed_deployment.payload(TURNS, ["encoder=small"], wire=(2.0, 3.0))
    assert found.to_sites == 4000 / (4 * 2)  # three rounds and the one left out, two sites
    assert found.from_sites == 2 * found.to_sites
    assert found.weights < found.message < 1.1 * found.weights
    assert "On the wire" in printed(speed_deployment.as_table(TURNS, found))


def test_the_command_runs_both_systems_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[object] = []

    def ours(folder: Path, run: speed_deployment.OurRun, *_: object) -> speed_deployment.Turn:
        asked.append((folder.name, run.num_rounds, run.overrides))
        assert (run.cohort / "north").is_dir()
        return TURNS[0]

    def theirs(folder: Path, python: Path, num_rounds: int) -> speed_deployment.Turn:
        asked.append((folder.name, python.name, num_rounds))
        return TURNS[1]

    monkeypatch.setattr(speed_deployment, "our_turn", ours)
    monkeypatch.setattr(speed_deployment, "nvflare_turn", theirs)
    peers = tmp_path / "peers"
    home = peers / f"nvflare-{speed_deployment.NVFLARE}"
    home.mkdir(parents=True)
    (home / "installed").touch()
    options = ["--turns", "2", "--rounds", "4", "--override", "encoder=small"]
    outcome = CliRunner().invoke(
        speed.app, ["deployment", *options, "--peers", str(peers), "--output", str(tmp_path / "figures.json")]
    )
    assert outcome.exit_code == 0, outcome.output
    mine = [(f"{number}-ours", 4, ["encoder=small"]) for number in (1, 2)]
    yours = [(f"{number}-nvflare", "python", 4) for number in (1, 2)]
    assert asked == [mine[0], yours[0], mine[1], yours[1]]
    assert "overhead of a round" in outcome.stdout
    figures = json.loads((tmp_path / "figures.json").read_text())
    assert [each["system"] for each in figures["turns"]] == ["ours", "NVFlare"] * 2
    assert figures["payload"]["wire"] is None


def test_where_nvflare_cannot_be_installed_the_command_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_index(command: list[str], **_: object) -> None:
        raise subprocess.CalledProcessError(1, command, stderr="looking\nERROR: No matching distribution found")

    monkeypatch.setattr(speed_deployment.sysconfig, "get_path", lambda _: str(tmp_path))
    monkeypatch.setattr(speed_deployment.subprocess, "run", no_index)
    packages = f"lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages"
    monkeypatch.setattr(speed_deployment.venv, "create", lambda home, **_: (home / packages).mkdir(parents=True))
    outcome = CliRunner().invoke(speed.app, ["deployment", "--peers", str(tmp_path)])
    assert outcome.exit_code == 1
    assert outcome.stderr.startswith("installing NVFlare")
    assert "must be installable by pip" in outcome.stderr
    assert "ERROR: No matching distribution found" in outcome.stderr
    assert not list(tmp_path.rglob("installed"))


def test_memory_and_processor_time_are_those_of_living_processes() -> None:
    command = [sys.executable, "-c", "print(flush=True); input()"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as child:
        assert child.stdout is not None
        child.stdout.readline()
        assert 1 < speed_deployment.memory_mb(child.pid) < 1000
        assert 0 <= speed_deployment.used_s(child.pid) < speed_deployment.busy_s()
        child.communicate(b"\n")
    assert speed_deployment.memory_mb(child.pid) == speed_deployment.used_s(child.pid) == 0.0


def test_a_relay_passes_on_and_counts_what_it_passes() -> None:
    def answer(listener: socket.socket) -> None:
        connection, _ = listener.accept()
        with connection:
            while data := connection.recv(100_000):
                connection.sendall(2 * data)

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=answer, args=(listener,))
        thread.start()
        with Relay(listener.getsockname()[1]) as relay:
            with socket.create_connection(("127.0.0.1", relay.port)) as client, client.makefile("rb") as received:
                client.sendall(b"abc")
                assert received.read(6) == b"abcabc"
            thread.join()
            assert (relay.to_server, relay.from_server) == (3, 6)
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", relay.port)).close()
