"""What we compare with: plain FedAvg is the real apps' to the last places, and every other method does what it says."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from client.app import app as client_app
from core.config import RunConfig, load_config
from core.data.feed import Ring
from core.data.site import SiteData
from core.evaluation.embeddings import Embeddings
from core.models import build_pretrainer
from server.app import app as server_app
from simulations.baselines import (
    BASELINES,
    CPU,
    GRIDS,
    SitesData,
    join,
    of_method,
    open_sites,
    pooled_batches,
    raw,
    run_baseline,
    without_scanners,
)
from simulations.in_process import run_in_process
from simulations.methods import (
    FedBN,
    FedDAPL,
    FedHarmony,
    FedProx,
    Gaussian,
    LocalRound,
    Method,
    Trained,
    confusion,
    distance,
    federate,
    reverse_gradient,
)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
with_golden = pytest.mark.skipif(
    not GOLDEN.is_dir(), reason="../shared/golden is not here: the authors' numbers lie beside the checkout, not in it"
)
TINY_TABLE = (
    "experiment=roi debias=none num_rounds=3 local_steps=2 batch_size=8 warmup_rounds=0 encoder.width=8 embedding_size=4 "
    "policy.min_group=4 policy.diagonal_subjects=6 data.fractions=[0.6,0,0.4] data.unseen_sites=[d]"
)
TINY_VOLUMES = "experiment=tiny finetune=none debias=none data=folder"
METADATA = ("subject", "site", "scanner", "sex", "diagnosis", "split", "age_years")


def quiet(_done: int, _rounds: int) -> None:
    """No progress."""


def write_table(path: Path, sizes: Sequence[int] = (30, 26, 40, 12, 3), missing: float = 0.02) -> Path:
    """Sites `a` to `e`: features that follow age, each site's own offset and gain; half of `c` are patients."""
    random = np.random.default_rng(0)
    rows = [["participant_id", "age", "sex", "site", "diagnosis", *(f"f{i}" for i in range(6))]]
    for site, size in zip("abcde", sizes, strict=True):
        offset, gain = random.normal(0, 1, 6), random.uniform(0.7, 1.4, 6)
        for number in range(size):
            age = 20 + 60 * random.random()
            x = 100 * (gain * (np.sin(age / 20 + np.arange(6)) + random.normal(0, 0.3, 6)) + offset) + 5000
            cells = ["n/a" if random.random() < missing else f"{value:.3f}" for value in x]
            patient = "patient" if site == "c" and number % 2 else "control"
            rows.append([f"{site}{number:02d}", f"{age:.1f}", "FM"[number // 2 % 2], site, patient, *cells])
    path.write_text("\n".join(",".join(row) for row in rows) + "\n")
    return path


@pytest.fixture
def table(tmp_path: Path) -> str:
    """Overrides of a run on a tiny table."""
    return f"{TINY_TABLE} data.table={write_table(tmp_path / 't.csv')}"


def opened(overrides: str, *more: str) -> SitesData:
    return open_sites(load_config(" ".join([overrides, *more])))


def assert_same_scans(first: Embeddings, second: Embeddings) -> None:
    for column in METADATA:
        assert np.array_equal(getattr(first, column), getattr(second, column), equal_nan=column == "age_years"), column


def assert_like_the_run(data: SitesData, folder: Path) -> None:
    """The last weights and the tables of representations are those of the real apps."""
    found = run_baseline("fedavg", data)
    state = data.trained[Method()].state
    expected = load_file(max((folder / "checkpoints").glob("pretrain-*.safetensors")))
    assert {name: value.shape for name, value in state.items()} == {name: value.shape for name, value in expected.items()}
    assert max(float((value - expected[name]).abs().max()) for name, value in state.items() if value.numel()) < 1e-6
    for stage, ours in (("untrained", data.table), ("pretrained", found)):
        theirs = Embeddings.load(folder / f"embeddings-{stage}.npz")
        assert_same_scans(ours, theirs)
        assert ours.h_NF == pytest.approx(theirs.h_NF, abs=1e-5)


@pytest.mark.usefixtures("unprobed")
def test_fedavg_is_the_real_apps_on_volumes(consortium: Path, federate: Callable[..., Path]) -> None:
    overrides = "debias=none policy.share_per_scan=true data.unseen_sites=[a]"
    folder = federate(consortium, overrides)
    data = opened(TINY_VOLUMES, f"data.root={consortium} data.unseen_sites=[a]")
    assert data.known == ("b", "c")
    assert_like_the_run(data, folder)


def run_apps(folder: Path, overrides: str) -> Path:
    nodes: dict[int, dict[str, str | int | bool | float]] = {
        number + 1: {"partition-id": number, "num-partitions": 5} for number in range(5)
    }
    run_in_process(server_app, client_app, f"{overrides} output={folder} name=run", nodes)
    return folder / "run"


@pytest.mark.usefixtures("unprobed")
def test_fedavg_is_the_real_apps_on_a_table(tmp_path: Path, table: str) -> None:
    folder = run_apps(tmp_path, table)
    data = opened(table)
    assert data.known == ("a", "b", "c")
    assert [note for note in data.notes if "e (2)" in note]
    assert_like_the_run(data, folder)


@pytest.mark.usefixtures("unprobed")
def test_the_encoder_of_a_run_that_erases_its_inputs_can_be_compared(tmp_path: Path, table: str) -> None:
    folder = run_apps(tmp_path, f"{table} debias=erasure")
    state = load_file(max((folder / "checkpoints").glob("pretrain-*.safetensors")))
    assert len(state["encoder.standardise.directions"]) > 0
    found, theirs = opened(table).embed(Trained(state, {}), CPU), Embeddings.load(folder / "embeddings-pretrained.npz")
    assert_same_scans(found, theirs)
    assert found.h_NF == pytest.approx(theirs.h_NF, abs=1e-5)


def test_named_sites_alone_take_part(table: str) -> None:
    data = opened(table, "data.unseen_sites=[] data.pretrain_sites=[b,a] data.target_sites=[c]")
    assert data.known == ("a", "b")
    assert list(data.splits) == ["a", "b", "c"]


@pytest.mark.parametrize("name", BASELINES)
def test_every_baseline_represents_the_same_scans_of_a_table(table: str, name: str) -> None:
    data = opened(table)
    found = run_baseline(name, data)
    assert_same_scans(found, data.table)
    assert set(found.site) == set("abcde")
    assert np.isfinite(found.h_NF).all()
    assert np.ptp(found.h_NF, axis=0).max() > 0
    assert np.array_equal(found.h_NF, run_baseline(name, opened(table)).h_NF)


@pytest.mark.parametrize("name", BASELINES)
def test_a_site_of_one_scan_has_a_row(tmp_path: Path, name: str) -> None:
    data = opened(f"{TINY_TABLE} num_rounds=1 data.table={write_table(tmp_path / 't.csv', sizes=(30, 26, 40, 1, 0))}")
    found = run_baseline(name, data)
    assert (found.site == "d").sum() == 1
    assert_same_scans(found, data.table)


@pytest.mark.parametrize("name", [name for name in BASELINES if name != "combat_input"])
def test_every_baseline_represents_the_same_scans_of_volumes(consortium: Path, name: str) -> None:
    data = opened(TINY_VOLUMES, f"data.root={consortium}")
    rounds: list[tuple[int, int]] = []
    found = run_baseline(name, data, progress=lambda *done: rounds.append(done))
    assert_same_scans(found, data.table)
    assert np.isfinite(found.h_NF).all()
    assert rounds == ([] if name in ("raw", "untrained", "combat_raw") else [(1, 2), (2, 2)])


def test_what_cannot_be_run_is_refused(consortium: Path, table: str) -> None:
    volumes = opened(TINY_VOLUMES, f"data.root={consortium}")
    with pytest.raises(ValueError, match=r"combat_input: data must be a table, got 'images'. Use combat_raw or combat_h"):
        run_baseline("combat_input", volumes)
    with pytest.raises(ValueError, match=r"baselines: name must be one of \['raw', .*got 'moon'"):
        run_baseline("moon", volumes)
    with pytest.raises(ValueError, match="baselines: privacy must be none, as theirs is, got 'clip_and_noise'"):
        opened(table, "privacy=clip_and_noise")
    with pytest.raises(ValueError, match=r"baselines: data\.table must name the data, got null"):
        opened("experiment=roi data.table=null")


def test_raw_rows_are_standardised_over_the_training_scans(table: str) -> None:
    data = opened(table)
    found = raw(data, CPU, quiet)
    fitted = found.h_NF[np.isin(found.site, data.known) & (found.split == "train")]
    # A missing value is 0 and no part of the standardisation.
    known = np.where(fitted == 0, np.nan, fitted)
    assert np.nanmean(known, axis=0) == pytest.approx(0, abs=1e-3)
    assert np.nanstd(known, axis=0) == pytest.approx(1, abs=1e-3)


def test_raw_volumes_are_principal_components_of_the_training_scans(consortium: Path) -> None:
    data = opened(TINY_VOLUMES, f"data.root={consortium}")
    voxels = np.concatenate([part.inputs(range(len(part)), CPU).flatten(1).numpy() for part in data.parts()])
    fit = data.table.split == "train"
    h = raw(data, CPU, quiet).h_NF
    assert h.shape[1] == fit.sum() - 1
    assert h[fit].mean(axis=0) == pytest.approx(0, abs=1e-3)
    # All components there are keep the distances between the scans they were fitted on.
    distances = np.linalg.norm(voxels[fit][:, None] - voxels[fit][None], axis=2)
    assert np.linalg.norm(h[fit][:, None] - h[fit][None], axis=2) == pytest.approx(distances, rel=1e-3, abs=1e-2)


def views_drawn(data: SitesData, name: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Scans read while a baseline trains, each shown in two views."""
    drawn: list[int] = []
    read = SiteData.read

    def spy(self: SiteData, indices: Sequence[int], device: torch.device, ring: Ring | None = None) -> torch.Tensor:
        drawn.append(len(indices))
        return read(self, indices, device, ring)

    monkeypatch.setattr(SitesData, "embed", lambda self, _trained, _device: self.table)
    monkeypatch.setattr(SiteData, "read", spy)
    run_baseline(name, data)
    monkeypatch.undo()
    return sum(drawn)


def test_pooled_sees_as_many_views_as_all_sites_together(table: str, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(table)
    assert pooled_batches(data) == (8, 6)
    assert views_drawn(data, "pooled", monkeypatch) == views_drawn(data, "fedavg", monkeypatch) == 3 * 2 * 3 * 8
    assert views_drawn(data, "local_only", monkeypatch) == 3 * 2 * 8
    larger = opened(table, "batch_size=32")  # 18, 16 and 12 healthy training subjects
    assert pooled_batches(larger) == (15, 6)


def test_joined_scans_are_the_sites_own_with_names_of_their_own(table: str) -> None:
    parts = list(opened(table).training.values())
    joined = join(parts)
    expected = torch.cat([part.inputs(range(len(part)), CPU) for part in parts])
    order = [len(joined) - 1, 0, len(parts[0]), len(parts[0]) - 1]
    assert torch.equal(joined.inputs(order, CPU).nan_to_num(), expected[order].nan_to_num())
    assert joined.store.num_inputs == 6
    assert joined.store.signature == parts[0].store.signature
    assert (
        {scan.subject.split("/")[0] for scan in joined.scans}
        == {scan.scanner.split("/")[0] for scan in joined.scans}
        == set("abc")
    )
    same = join([parts[0], replace(parts[0], site="z")])
    assert len({scan.subject for scan in same.scans}) == 2 * len(parts[0])


def test_local_only_is_the_largest_site_alone(table: str) -> None:
    data = opened(table)
    sites = data.training
    assert [len(part) for part in sites.values()] == [18, 16, 12]
    alone = federate(data.model(), {"a": sites["a"]}, data.config, Method(), device=CPU, progress=quiet)
    assert np.array_equal(run_baseline("local_only", data).h_NF, data.embed(alone, CPU).h_NF)


def trained(data: SitesData, method: Method) -> Trained:
    of_method(method)(data, CPU, quiet)
    return data.trained[method]


def length(data: SitesData, state: dict[str, torch.Tensor]) -> float:
    return float(torch.cat([(state[name] - value).flatten() for name, value in data.initial.items()]).norm())


def test_fedprox_without_weight_is_fedavg_and_with_a_huge_one_stays_at_the_start(table: str) -> None:
    data = opened(table, "local_steps=20 num_rounds=1")
    free, held = trained(data, Method()).state, trained(data, FedProx(proximal_weight=1e6)).state
    same = trained(data, FedProx(proximal_weight=0.0)).state
    assert all(torch.equal(value, same[name]) for name, value in free.items())
    assert length(data, held) < 0.1 * length(data, free)


def test_fedbn_keeps_the_normalisation_of_volumes_at_the_sites(consortium: Path) -> None:
    data = opened(TINY_VOLUMES, f"data.root={consortium}")
    found = trained(data, FedBN())
    norms = {f"encoder.stages.{stage}.1.{part}" for stage in range(4) for part in ("weight", "bias")}
    assert {frozenset(own) for own in found.own.values()} == {frozenset(norms)}
    for name in norms:
        assert not torch.equal(found.own["a"][name], found.own["b"][name])
        share = [len(part) for part in data.training.values()]
        mean = sum(n * own[name] for n, own in zip(share, found.own.values(), strict=True)) / sum(share)
        assert torch.allclose(found.at("unseen")[name], mean, atol=1e-6)
        assert torch.equal(found.at("a")[name], found.own["a"][name])


def test_fedbn_standardises_rows_by_the_sites_own_subjects_shrunken(tmp_path: Path) -> None:
    data = opened(f"{TINY_TABLE} data.table={write_table(tmp_path / 't.csv', missing=0.0)}")
    found = trained(data, FedBN(prior_subjects=5.0))
    whole = {part: data.initial[f"encoder.standardise.{part}"].double() for part in ("mean", "scale")}
    for site, part in data.training.items():
        rows, n = part.inputs(range(len(part)), CPU).double(), len(part)
        mean = (rows.sum(dim=0) + 5 * whole["mean"]) / (n + 5)
        variance = ((rows - mean).square().sum(dim=0) + 5 * whole["scale"].square()) / (n + 5)
        assert torch.allclose(found.own[site]["encoder.standardise.mean"].double(), mean, rtol=1e-6)
        assert torch.allclose(found.own[site]["encoder.standardise.scale"].double(), variance.sqrt(), rtol=1e-5)
    for part, value in whole.items():
        assert torch.equal(found.at("d")[f"encoder.standardise.{part}"].double(), value)
    strong = trained(data, FedBN(prior_subjects=1e12))
    plain = trained(data, Method())
    for name, value in plain.state.items():
        assert torch.allclose(strong.at("a")[name], value, atol=1e-4, rtol=1e-4)


def test_the_reversed_gradient_is_turned_round() -> None:
    x = torch.randn(4, 3, requires_grad=True)
    y = reverse_gradient(x, 2.5)
    assert torch.equal(y, x)
    (y * torch.arange(12.0).reshape(4, 3)).sum().backward()
    assert x.grad is not None
    assert torch.equal(x.grad, -2.5 * torch.arange(12.0).reshape(4, 3))


def planted(how: str) -> tuple[float, float, float]:
    """Two sites that differ in one of two inputs: what a linear encoder that must keep the other leaves of the site.

    The classifier's accuracy, the distance between the sites' means, and the correlation of the kept input with its decoding.
    """
    torch.manual_seed(1)
    site_N = torch.arange(200) % 2
    x_N2 = torch.stack([torch.randn(200), 2.0 * site_N - 1 + 0.3 * torch.randn(200)], dim=1)
    encoder, decoder, head = nn.Linear(2, 2), nn.Linear(2, 1), nn.Linear(2, 2)
    optimiser = torch.optim.SGD([*encoder.parameters(), *decoder.parameters(), *head.parameters()], lr=0.1)
    for _ in range(500):
        h_N2 = encoder(x_N2)
        loss = (decoder(h_N2)[:, 0] - x_N2[:, 0]).square().mean()
        seen = reverse_gradient(h_N2, 1.0) if how == "reversed" else h_N2.detach()
        loss = loss + nn.functional.cross_entropy(head(seen), site_N)
        if how == "confused":
            fixed = {name: value.detach() for name, value in head.named_parameters()}
            loss = loss + confusion(torch.func.functional_call(head, fixed, (h_N2,)).softmax(dim=1)) / len(h_N2)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    h_N2 = encoder(x_N2).detach()
    accuracy = float((head(h_N2).argmax(dim=1) == site_N).float().mean())
    apart = float((h_N2[site_N == 1].mean(dim=0) - h_N2[site_N == 0].mean(dim=0)).norm())
    return accuracy, apart, float(torch.corrcoef(torch.stack([decoder(h_N2).detach()[:, 0], x_N2[:, 0]]))[0, 1])


@pytest.mark.parametrize("how", ["reversed", "confused"])
def test_an_adversary_hides_a_planted_site(how: str) -> None:
    plain, hidden = planted("plain"), planted(how)
    assert plain[0] > 0.99
    assert hidden[0] < 0.6
    assert hidden[1] < 0.2 * plain[1]
    assert hidden[2] > 0.99


def local_round(told: tuple[Gaussian, ...] = (), ramp: float = 0.5) -> tuple[LocalRound, torch.Tensor]:
    """A round at site 1 of 3, and the representations of 6 views."""
    config = load_config("experiment=roi data.table=/t encoder.width=5 embedding_size=4")
    model = build_pretrainer(config.encoder, 4, 0, num_inputs=3)
    FedDAPL().extend(model, 3, 0)
    start = {name: value.detach().clone() for name, value in model.named_parameters()}
    torch.manual_seed(3)
    return LocalRound(model, start, 1, ramp, told, torch.Generator().manual_seed(1)), torch.randn(6, 5, requires_grad=True)


def test_feddapl_teaches_the_classifier_and_turns_the_encoder() -> None:
    local, h_RF = local_round()
    terms = FedDAPL(weight=3.0, proximal_weight=0.2, label_smoothing=0.0).terms(h_RF, local)
    assert terms["proximal"].item() == 0
    expected = nn.functional.cross_entropy(local.site_classifier(h_RF), torch.full((6,), 1))
    assert terms["site"].item() == pytest.approx(expected.item())
    head = list(local.site_classifier.parameters())
    plain = torch.autograd.grad(expected, [h_RF, *head])
    turned = torch.autograd.grad(terms["site"], [h_RF, *head])
    assert torch.allclose(turned[0], -1.5 * plain[0])
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(turned[1:], plain[1:], strict=True))
    with torch.no_grad():
        head[0] += 0.1
    moved = FedDAPL(proximal_weight=0.2).terms(h_RF, local)["proximal"].item()
    assert moved == pytest.approx(0.2 / 2 * 0.01 * head[0].numel(), rel=1e-4)


def test_fedharmony_gives_each_loss_to_its_own_weights() -> None:
    told = tuple(Gaussian(torch.full((5,), float(site)), torch.full((5,), 0.1)) for site in range(3))
    local, h_RF = local_round(told)
    terms = FedHarmony(weight=2.0, proximal_weight=0.1).terms(h_RF, local)
    head = list(local.site_classifier.parameters())
    of_site = torch.autograd.grad(terms["site"], [h_RF, *head], allow_unused=True)
    assert of_site[0] is None
    assert all(gradient is not None and gradient.abs().sum() > 0 for gradient in of_site[1:])
    of_confusion = torch.autograd.grad(terms["confusion"], [h_RF, *head], allow_unused=True)
    assert of_confusion[0].abs().sum() > 0
    assert all(gradient is None for gradient in of_confusion[1:])
    expected = confusion(local.site_classifier(h_RF).softmax(dim=1)) / 6
    assert terms["confusion"].item() == pytest.approx(2.0 * 0.5 * expected.item(), rel=1e-6)
    of_weights = torch.autograd.grad(terms["proximal"], head)
    assert all(gradient.isfinite().all() for gradient in of_weights)


def test_fedharmony_tells_the_gaussian_of_healthy_subjects(table: str) -> None:
    data = opened(table)
    told = FedHarmony().tell(data.model(), data.training["c"], CPU)
    mask = (data.table.site == "c") & (data.table.split == "train") & (data.table.diagnosis == "control")
    assert told.mean_F.numpy() == pytest.approx(data.table.h_NF[mask].mean(axis=0), abs=1e-5)
    assert told.sd_F.numpy() == pytest.approx(data.table.h_NF[mask].std(axis=0), abs=1e-5)
    draws = told.draw(20_000, torch.Generator().manual_seed(0))
    assert torch.allclose(draws.mean(dim=0), told.mean_F, atol=0.02)
    assert torch.allclose(draws.std(dim=0), told.sd_F, atol=0.02)


@pytest.mark.parametrize("method", [FedDAPL(weight=2.0), FedHarmony(weight=2.0)], ids=["feddapl", "fedharmony"])
def test_the_classifier_travels_and_is_no_part_of_what_represents(table: str, method: Method) -> None:
    data = opened(table)
    found = trained(data, method)
    heads = {name for name in found.state if name.startswith("site_classifier.")}
    assert heads == {f"site_classifier.{layer}.{part}" for layer in (1, 3) for part in ("weight", "bias")}
    assert found.at("a").keys() == data.initial.keys()
    # It has learned: its weights are an average of the sites', none of which stayed where they began.
    model = data.model()
    method.extend(model, 3, data.config.seed)
    assert all(not torch.equal(found.state[name], model.state_dict()[name]) for name in heads)
    assert not np.array_equal(run_baseline("fedavg", data).h_NF, data.embed(found, CPU).h_NF)


def golden(family: str) -> list[tuple[dict[str, Any], Any]]:
    index = json.loads((GOLDEN / f"{family}.json").read_text())["cases"]
    return [(case, np.load(GOLDEN / f"{family}.npz")) for case in index]


@with_golden
def test_confusion_is_the_released_one() -> None:
    cases = golden("fedharmony_confusion")
    assert len(cases) == 5
    for case, arrays in cases:
        x = torch.from_numpy(arrays[f"{case['id']}/in/x"]).requires_grad_()
        loss = confusion(x)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
        assert x.grad is not None
        assert x.grad.numpy() == pytest.approx(arrays[f"{case['id']}/grad/x"], rel=1e-6)


@with_golden
def test_the_proximal_distance_is_the_released_one_and_finite_where_nothing_moved() -> None:
    cases = golden("fedharmony_fedprox")
    assert len(cases) == 3
    for case, arrays in cases:
        given = {name: torch.from_numpy(arrays[f"{case['id']}/in/{name}"]) for name in case["inputs"]}
        w2 = given["w2"].requires_grad_()
        moved = torch.cat([(w2 - given["w"]).flatten(), (given["b2"] - given["b"]).flatten()])
        error = nn.functional.mse_loss(given["x"], given["target"])
        loss = error + case["args"]["mu"] * distance(moved)
        loss.backward()
        assert loss.item() == pytest.approx(case["loss"], rel=1e-6)
        assert w2.grad is not None
        if case["grad_w2_finite"]:
            assert w2.grad.numpy() == pytest.approx(arrays[f"{case['id']}/grad/w2"], rel=1e-6)
        else:
            assert torch.equal(w2.grad, torch.zeros_like(w2))


def test_combat_takes_the_offset_of_sites_and_leaves_unseen_sites(table: str) -> None:
    data = opened(table)
    before, after = raw(data, CPU, quiet), run_baseline("combat_raw", data)
    unknown = np.isin(before.site, ["d", "e"])
    assert np.array_equal(before.h_NF[unknown], after.h_NF[unknown])

    def spread(table: Embeddings) -> float:
        means = [table.h_NF[(table.site == site) & (table.split == "test")].mean(axis=0) for site in data.known]
        return float(np.std(means, axis=0).mean())

    assert spread(after) < 0.5 * spread(before)


def test_combat_knows_no_held_out_age(table: str) -> None:
    data = opened(table)
    before = raw(data, CPU, quiet)
    aged = replace(before, age_years=np.where(before.split == "test", 99.0, before.age_years))
    other = replace(
        aged, **{column: np.where(before.split == "test", "", getattr(before, column)) for column in ("sex", "diagnosis")}
    )
    notes: list[str] = []
    expected, found = without_scanners(before, data.known, notes), without_scanners(other, data.known, notes)
    assert np.array_equal(expected.h_NF, found.h_NF)
    assert notes == []


def test_combat_says_what_takes_no_part(table: str) -> None:
    data = opened(table)
    before = raw(data, CPU, quiet)
    scanner = np.where((before.site == "a") & (before.subject == before.subject[0]), "rare", before.scanner)
    males = replace(before, sex=np.full(len(before), "M"), scanner=scanner.astype(str))
    notes: list[str] = []
    after = without_scanners(males, data.known, notes)
    assert np.array_equal(after.h_NF[scanner == "rare"], before.h_NF[scanner == "rare"])
    assert notes == [
        "combat: sex does not vary inside any scanner and is no covariate",
        "combat: scanners without 2 training subjects of known age, sex and diagnosis stay: a/rare",
    ]


def test_combat_input_keeps_missing_values_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = opened(f"{TINY_TABLE} data.table={write_table(tmp_path / 't.csv', missing=0.1)}")
    seen: list[SitesData] = []
    embed = SitesData.embed
    monkeypatch.setattr(SitesData, "embed", lambda self, *rest: seen.append(self) or embed(self, *rest))
    run_baseline("combat_input", data)
    for before, after in zip(data.parts(), seen[-1].parts(), strict=True):
        old, new = (part.inputs(range(len(part)), CPU) for part in (before, after))
        assert before.scans == after.scans
        assert torch.equal(old.isnan(), new.isnan())
        same = torch.allclose(old.nan_to_num(), new.nan_to_num(), rtol=1e-5, atol=1e-2)
        assert same == (before.site in "de" or not len(before))


def test_settings_are_chosen_among_training_scans(table: str) -> None:
    data = opened(table)
    inner = data.for_validation()
    assert set(inner.table.site) == set(data.known)
    both = list(zip(inner.table.site.tolist(), inner.table.subject.tolist(), strict=True))
    outer = data.table
    train = {(s, n) for s, n, t in zip(outer.site, outer.subject, outer.split, strict=True) if t == "train"}
    assert set(both) <= train
    assert len(both) == len(set(both)) == sum(len(data.splits[site]["train"]) for site in data.known)
    num_test = int((inner.table.split == "test").sum())
    assert 0.2 < num_test / len(both) < 0.3
    for part, split in zip(inner.parts(), ["train", "test"] * 3, strict=True):
        rows = inner.table.select((inner.table.site == part.site) & (inner.table.split == split))
        assert rows.age_years.tolist() == [scan.age_years for scan in part.scans]
    assert not torch.equal(inner.initial["encoder.standardise.mean"], data.initial["encoder.standardise.mean"])
    for name, methods in GRIDS.items():
        found = [of_method(method)(inner, CPU, quiet).h_NF for method in methods]
        assert all(h_NF.shape == inner.table.h_NF.shape and np.isfinite(h_NF).all() for h_NF in found)
        assert [np.array_equal(h_NF, run_baseline(name, inner).h_NF) for h_NF in found].count(True) == 1


def test_the_same_seed_gives_the_same_and_another_another(table: str) -> None:
    def found(*more: str) -> RunConfig | Any:
        return run_baseline("fedharmony", opened(table, *more)).h_NF

    assert np.array_equal(found(), found())
    assert not np.array_equal(found(), found("seed=1"))
