"""Known truth: the planted share is found, erasure takes the planted directions, images agree with their counterfactual."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from core.evaluation.embeddings import Embeddings
from core.settings import MomentPolicy
from simulations import planted
from simulations.planted_images import Counterfactual, components, counterfactual_share
from simulations.planted_measures import beyond, fitted_eraser, given_columns, planted_share, projector_gap, recovered_share
from simulations.planted_tables import RANK, Consortium, Plan, draw_consortium, judge, site_probes, study_apps, study_table


def test_the_share_by_hand() -> None:
    # Standardised: between 1/2 + 0, at one site 1/2 + 2/2; 0.5 of 2.
    found = planted_share(np.array([1.0, 0.0]), np.array([1.0, 2.0]), np.array([2.0, 2.0]))
    assert found == pytest.approx(0.25)


@pytest.mark.parametrize("wrong", [{"share": 1.0}, {"share": -0.1}, {"share": 0.1, "confounding": 1.0}])
def test_what_cannot_be_planted_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValueError, match="share and confounding must be from 0 to below 1"):
        Plan(**wrong)


@pytest.mark.parametrize("confounding", [0.0, 0.3, 0.6])
def test_what_is_drawn_is_what_is_planned(confounding: float) -> None:
    consortium = draw_consortium(Plan(share=0.2, confounding=confounding), seed=1)
    sites = [consortium.site_N == site for site in np.unique(consortium.site_N)]
    assert all(np.ptp(consortium.offset_NF[site_N], axis=0).max() == 0 for site_N in sites)
    directions_KF = consortium.directions_KF
    np.testing.assert_allclose(directions_KF @ directions_KF.T, np.eye(RANK), atol=1e-12)
    np.testing.assert_allclose(consortium.offset_NF @ directions_KF.T @ directions_KF, consortium.offset_NF, atol=1e-12)
    means_S = np.array([consortium.age_N[site_N].mean() for site_N in sites])
    assert means_S.var() / consortium.age_N.var() == pytest.approx(confounding, abs=0.06)
    # The truth once more, from variances as they came out.
    given_NQ = given_columns(consortium.age_N, consortium.male_N)
    between_F = np.square(beyond(consortium.offset_NF, given_NQ)).mean(axis=0)
    within_F = np.square(beyond(consortium.clean_NF, given_NQ)).mean(axis=0)
    total_F = consortium.rows().var(axis=0)
    assert (between_F / total_F).sum() / ((between_F + within_F) / total_F).sum() == pytest.approx(0.2, abs=0.015)


@pytest.mark.parametrize(
    "plan",
    [
        Plan(share=0.0),
        Plan(share=0.05),
        Plan(share=0.2),
        Plan(share=0.4),
        Plan(share=0.2, confounding=0.6),
        Plan(share=0.2, scale_spread=0.4),
    ],
)
def test_the_evaluation_finds_what_was_planted(plan: Plan) -> None:
    found = []
    for seed in range(4):
        consortium = draw_consortium(plan, seed)
        value, low, high = recovered_share(consortium.embeddings(consortium.rows()))
        found.append(value)
        assert value == pytest.approx(plan.share, abs=0.03)
        assert low < value < high
    assert np.mean(found) == pytest.approx(plan.share, abs=0.015)


def exact(consortium: Consortium) -> Consortium:
    """The same with noise that has no part in site, age or sex among training subjects, and a straight age effect."""
    train_N = ~consortium.test_N
    one_hot_NS = (consortium.site_N[:, None] == np.unique(consortium.site_N)).astype(np.float64)
    fixed_NP = np.stack([(consortium.age_N - 50) / 20, consortium.male_N], axis=1)
    random = np.random.default_rng(0)
    noise_NF = random.normal(size=consortium.clean_NF.shape)
    noise_NF[train_N] = beyond(noise_NF[train_N], np.hstack([one_hot_NS, fixed_NP])[train_N])
    return replace(consortium, clean_NF=noise_NF + fixed_NP @ random.normal(size=(2, noise_NF.shape[1])))


def test_exact_offsets_go_and_nothing_else() -> None:
    consortium = exact(draw_consortium(Plan(share=0.2), seed=0))
    about = consortium.embeddings(consortium.rows())
    eraser = fitted_eraser(consortium.rows(), about, MomentPolicy())
    found = judge(consortium, eraser)
    assert found.num_directions == RANK
    assert found.planted_left == pytest.approx(0, abs=1e-12)
    assert found.angle_degrees == pytest.approx(0, abs=1e-5)
    assert found.outside_kept == pytest.approx(1, rel=1e-6)
    # Not only as much is left outside of the planted directions, but the same.
    planted_FK = np.linalg.qr((consortium.directions_KF / eraser.scale_F.numpy()).T)[0]
    moved_NF = (eraser(torch.from_numpy(consortium.rows())).numpy() - consortium.rows()) / eraser.scale_F.numpy()
    outside_NF = moved_NF - moved_NF @ planted_FK @ planted_FK.T
    assert np.abs(outside_NF).max() < 1e-6 * np.abs(moved_NF).max()


@pytest.mark.parametrize("plan", [Plan(share=0.2), Plan(share=0.2, confounding=0.6)])
def test_erasure_takes_the_planted_directions_and_keeps_age(plan: Plan) -> None:
    result = study_table(plan, seed=0)
    for erased in result.erased.values():
        assert erased.share[0] == pytest.approx(0, abs=0.03)
        assert erased.planted_left is not None
        assert erased.planted_left < 0.05
        assert erased.angle_degrees is not None
        assert erased.angle_degrees < 15
        assert erased.age_r2 > result.oracle[0] - 0.02
        assert erased.age_mae < result.oracle[1] + 0.3
    # Told how many directions there are it takes no more; else it takes one less than sites, and noise with them.
    told, untold = (result.erased[name] for name in ("planted rank", "all"))
    assert (told.num_directions, untold.num_directions) == (2, 5)
    assert told.outside_kept == pytest.approx(1, abs=0.05)
    assert 0.5 < untold.outside_kept < 0.9


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_probes_of_held_out_subjects_are_at_the_floor_but_for_what_no_projection_removes(
    spread: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("core.evaluation.probes.LOGISTIC_C", (1e-2, 1.0))  # two strengths of five: a third of the time
    consortium = draw_consortium(Plan(share=0.2, scale_spread=spread), seed=0)
    eraser = fitted_eraser(consortium.rows(), consortium.embeddings(consortium.rows()), MomentPolicy())
    raw, erased, floor = site_probes(consortium, eraser).values()
    for metric in ("balanced_accuracy", "balanced_accuracy_heldout"):
        assert raw[metric] > floor[metric] + 0.3
        assert erased[metric] < floor[metric] + 0.08
    assert (erased["balanced_accuracy_boosting"] > floor["balanced_accuracy_boosting"] + 0.08) == (spread > 0)


def test_nothing_planted_leaves_nothing_to_measure() -> None:
    result = study_table(Plan(share=0.0), seed=0)
    assert {(e.planted_left, e.angle_degrees) for e in result.erased.values()} == {(None, None)}
    assert result.raw == result.oracle
    assert result.probes is None


def test_sites_too_small_to_tell_slopes_are_refused() -> None:
    consortium = draw_consortium(Plan(share=0.2), seed=0)
    few = np.arange(len(consortium.site_N)) < 150  # 15 training subjects a site
    about = consortium.embeddings(consortium.rows())
    with pytest.raises(ValueError, match=r"must tell how features change with age, got none. Lower policy.min_group"):
        fitted_eraser(consortium.rows()[few], about.select(few), MomentPolicy(diagonal_subjects=1))


def test_the_real_apps_erase_the_same() -> None:
    quick = "experiment=roi debias=erasure num_rounds=1 warmup_rounds=0 local_steps=1 encoder.width=32"
    found = study_apps(Plan(share=0.2), 0, quick)
    assert found.eraser_gap < 1e-5
    assert found.inputs[0] == pytest.approx(0.2, abs=0.03)
    assert found.inputs_erased[0] == pytest.approx(0, abs=0.03)
    assert found.h[0] > 0.08
    assert found.h_erased[0] == pytest.approx(0, abs=0.03)


def test_projections_on_one_space_are_the_same() -> None:
    rows = torch.linalg.qr(torch.randn(6, 2, generator=torch.Generator().manual_seed(0)).double())[0].T
    turned = torch.tensor([[0.6, 0.8], [-0.8, 0.6]]).double() @ rows
    assert projector_gap(rows, turned) < 1e-6
    assert projector_gap(rows, rows[:1]) > 0.1


def test_components_of_a_table_that_adds_up() -> None:
    anatomy_A, scanner_S = np.array([1.0, 2.0, 6.0]), np.array([0.0, 4.0])
    found = components((anatomy_A[:, None] + scanner_S)[:, :, None])
    assert (found.rest_F, found.scanner_F, found.anatomy_F) == (pytest.approx([0]), pytest.approx([8]), pytest.approx([7]))


def test_components_are_without_bias() -> None:
    random = np.random.default_rng(0)
    tables = [
        random.normal(0, 2, (8, 1, 50)) + random.normal(0, 1, (1, 5, 50)) + random.normal(0, 3, (8, 5, 50)) for _ in range(200)
    ]
    found = [components(table_ASF) for table_ASF in tables]
    means = [np.mean([getattr(f, f"{name}_F") for f in found]) for name in ("anatomy", "scanner", "rest")]
    assert means == pytest.approx([4, 1, 9], rel=0.05)


def scanned(seed: int, scanner_sd: float) -> tuple[np.ndarray, Counterfactual, Embeddings]:
    """A counterfactual table of 4 scanners, 12 features, and 400 other subjects, each on one, ages by scanner."""
    random = np.random.default_rng(seed)
    offset_SF, slope_F = random.normal(0, scanner_sd, (4, 12)), random.normal(size=12)

    def features(age_N: np.ndarray, scanner_N: np.ndarray, person_NF: np.ndarray) -> np.ndarray:
        return slope_F * (age_N[:, None] - 50) / 15 + person_NF + offset_SF[scanner_N] + random.normal(0, 0.5, (len(age_N), 12))

    scanner_N = np.arange(400) % 4
    age_N = random.uniform(20, 60, 400) + 6 * scanner_N
    seen = Embeddings(
        h_NF=features(age_N, scanner_N, random.normal(size=(400, 12))).astype(np.float32),
        subject=np.arange(400),
        site=(names_N := np.array(list("abcd"))[scanner_N]),
        scanner=names_N,
        sex=np.array(["F", "M"])[random.integers(0, 2, 400)],
        diagnosis=np.full(400, "control"),
        split=np.full(400, "test"),
        age_years=age_N,
    )
    age_A, person_AF = random.choice(age_N, 60), random.normal(size=(60, 12))
    table_ASF = np.stack([features(age_A, np.full(60, s), person_AF) for s in range(4)], axis=1)
    no_volumes = torch.zeros(60, 4, 1, 1, 1, 1)
    about = Counterfactual(volumes_AS1XYZ=no_volumes, scanners=tuple("abcd"), age_A=age_A, male_A=np.arange(60) % 2.0)
    return table_ASF, about, seen


@pytest.mark.parametrize("scanner_sd", [0.0, 0.3, 1.0])
def test_the_counterfactual_share_is_what_the_consortium_shows(scanner_sd: float) -> None:
    for seed in range(3):
        table_ASF, about, seen = scanned(seed, scanner_sd)
        truth, low, high = counterfactual_share(table_ASF, about, seen)
        assert low < truth < high
        assert high - low < 0.15
        assert recovered_share(seen)[0] == pytest.approx(truth, abs=0.05)
        if not scanner_sd:
            assert truth == pytest.approx(0, abs=0.01)


@pytest.mark.slow
@pytest.mark.usefixtures("quick_probes")
def test_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("ISOCENTER_CACHE", str(tmp_path / "cache"))
    for name, value in {
        "PLANS": (Plan(share=0.2),),
        "COHORT_SCALE": 0.35,
        "NUM_ANATOMIES": 16,
        "TABLE_RUN": "experiment=roi debias=erasure num_rounds=1 warmup_rounds=0 local_steps=1 encoder.width=16",
        "IMAGE_RUN": (
            "data.target_sites=[] debias=erasure debias.erase_to=all num_rounds=1 warmup_rounds=0 local_steps=1 batch_size=8 "
            "policy.min_group=3 policy.diagonal_subjects=3"
        ),
    }.items():
        monkeypatch.setattr(planted, name, value)
    planted.main(output=tmp_path / "out", seeds=1)
    printed = capsys.readouterr().out
    assert "│ table" in printed
    assert "images, pretrained" in printed
    assert (tmp_path / "out" / "planted.png").read_bytes().startswith(b"\x89PNG")
    told = json.loads((tmp_path / "out" / "planted.json").read_text())
    assert told["tables"][0]["plan"] == {"share": 0.2, "confounding": 0.3, "scale_spread": 0.0}
    assert told["apps"][0]["eraser_gap"] < 1e-5
    assert [image["encoder"] for image in told["images"]] == ["untrained", "pretrained"]
    for image in told["images"]:
        truth, low, high = image["planted"]
        assert low < truth < high
        assert image["recovered"][0] == pytest.approx(truth, abs=0.05)
        assert image["planted_erased"][0] < truth
        assert image["scanner_left"] < 0.8
        assert image["anatomy_kept"] > 0.5
        assert image["age_r2_erased"] > image["age_r2"] - 0.2
    assert told["images"][0]["eraser_gap"] is None
    assert told["images"][1]["eraser_gap"] < 1e-4
