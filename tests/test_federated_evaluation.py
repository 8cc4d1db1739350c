"""Evaluation from sums through the real apps: equal to pooled probes, and nothing of a single scan leaves a site."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, Message
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import roc_auc_score
from typer.testing import CliRunner

from client.app import app as client_app
from core.checkpoint import load_checkpoint
from core.cli import app as cli
from core.evaluation.age_sums import RIDGE_ALPHAS, AgeErrors, ErrorScore, FoldMoments, r2_interval
from core.evaluation.class_sums import ClassCounts, ClassMoments, SiteProbe
from core.evaluation.embeddings import Embeddings
from core.evaluation.federated_server import Scorer, check_codes, gathered, group_directions, num_seen, refused
from core.evaluation.federated_site import (
    GroupMeans,
    Subjects,
    affordable_columns,
    age_and_sex,
    group_means,
    let_out,
    probe_errors,
    told_scores,
)
from core.evaluation.intervals import Evaluation, NotEvaluableError
from core.evaluation.reading import read_representations
from core.evaluation.score_sums import ScoreCounts, area_variance
from core.evaluation.sums import random_directions, subject_folds
from core.exchange import ExchangeError, pack_message, unpack_message
from core.report import write_report
from core.report_record import RunRecord
from core.settings import MomentPolicy
from server.app import about_traffic, summary, traffic_by_kind
from server.app import app as server_app
from server.sites import RunError
from simulations.in_process import run_in_process

pytestmark = pytest.mark.usefixtures("unpainted")

OPEN = MomentPolicy(min_group=1, diagonal_subjects=1, covariance_subjects_per_feature=0, round_counts_to=1)
PERMISSIVE = " ".join(f"policy.{name}={value}" for name, value in vars(OPEN).items())
TINY = (
    "experiment=roi debias=none num_rounds=1 local_steps=1 batch_size=8 warmup_rounds=0 encoder.width=9 embedding_size=4 "
    "data.fractions=[0.6,0,0.4] data.unseen_sites=[d] evaluation.features=5"
)
SIZES = {"a": 61, "b": 83, "c": 71, "d": 37}
Federate = Callable[..., Path]
NodeConfigs = dict[int, dict[str, str | int | bool | float]]


def write_table(path: Path, sizes: dict[str, int] | None = None) -> Path:
    """Four sites: b has two scanners, c and d have patients; every feature follows age, site and scanner."""
    random = np.random.default_rng(0)
    lines = ["participant_id,age,sex,site,scanner,diagnosis,f0,f1,f2,f3,f4,f5"]
    for site, size in (sizes or SIZES).items():
        offset = random.normal(0, 0.8, (2, 6))
        for number in range(size):
            age, scanner = 20 + 60 * random.random(), number % 2 if site == "b" else 0
            patient = site in "cd" and number % 3 == 0
            x = age / 20 * np.arange(1, 7) % 3 + offset[scanner] + random.normal(0, 0.6, 6) + 0.9 * patient * np.arange(6) % 2
            diagnosis = "patient" if patient else "control"
            cells = [f"{site}{number:03d}", f"{age:.2f}", "FM"[number % 2], site, f"scanner{scanner}", diagnosis]
            lines.append(",".join([*cells, *(f"{value:.4f}" for value in x)]))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def federate(tmp_path: Path) -> Federate:
    """Run the real apps over the table, in this process; the run's folder."""
    table = write_table(tmp_path / "table.csv")

    def run(*overrides: str, name: str = "run", nodes: NodeConfigs | None = None, **grid: object) -> Path:
        virtual: NodeConfigs = {i + 1: {"partition-id": i, "num-partitions": len(SIZES)} for i in range(len(SIZES))}
        text = " ".join([TINY, f"data.table={table}", f"output={tmp_path / 'runs'}", f"name={name}", *overrides])
        run_in_process(server_app, client_app, text, nodes or virtual, **grid)
        return tmp_path / "runs" / name

    return run


def figures(folder: Path) -> dict[tuple[str, str, str, str], float]:
    rows = json.loads((folder / "metrics.json").read_text())
    return {(row["stage"], row["task"], row["metric"], row["site"]): row["value"] for row in rows}


def folds_of(e: Embeddings) -> np.ndarray:
    """The fold of each row from the names of the table: a subject's number counts its site's subjects."""
    names = [f"sub-{site}{number:03d}" for site, number in zip(e.site, e.subject, strict=True)]
    return np.array([int(subject_folds([name], str(site))[0]) for name, site in zip(names, e.site, strict=True)])


def directions_of_groups(x: np.ndarray, e: Embeddings, count: int) -> np.ndarray:
    """Explicit loops over scanners, diagnoses and cells of five years; of d only how its patients differ from its controls."""
    means, weights = [], []
    known = x[(e.site != "d") & (e.diagnosis == "control")], x[(e.site != "d")]
    centre = known[1].mean(axis=0)
    for site in "abcd":
        for scanner in ("scanner0", "scanner1"):
            for diagnosis in ("control", "patient"):
                for cell in range(30):
                    of = (e.site == site) & (e.scanner == scanner) & (e.diagnosis == diagnosis) & (e.age_years // 5 == cell)
                    if not of.any() or (site == "d" and diagnosis == "control"):
                        continue
                    shift = 0 if site != "d" else centre - x[(e.site == "d") & (e.diagnosis == "control")].mean(axis=0)
                    means.append(x[of].mean(axis=0) + shift)
                    weights.append(of.sum())
    offset = np.array(means) - np.average(means, axis=0, weights=weights)
    return np.linalg.svd(np.sqrt(weights)[:, None] * offset, full_matrices=False)[2][:count]


def recall(truth: np.ndarray, predicted: np.ndarray) -> float:
    return float(np.mean([(predicted[truth == k] == k).mean() for k in np.unique(truth)]))


def lda(train: np.ndarray, y: np.ndarray, test: np.ndarray, shrinkage: float = 0.1) -> np.ndarray:
    """Decisions of equally likely classes."""
    model = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=shrinkage).fit(train, y)
    if len(model.classes_) == 2:
        decision = test @ model.coef_[0] + model.intercept_[0] - math.log(model.priors_[1] / model.priors_[0])
        return np.stack([-decision / 2, decision / 2], axis=1)
    return test @ model.coef_.T + model.intercept_ - np.log(model.priors_)


@pytest.mark.parametrize("directions", ["random", "between_groups"])
@pytest.mark.parametrize("debias", ["debias=none", "debias=erasure debias.erase=h"])
@pytest.mark.usefixtures("unprobed")
def test_figures_from_sums_are_those_of_pooled_representations(federate: Federate, directions: str, debias: str) -> None:
    """Identity 9: the same run once from sums and once with all representations at the server."""
    options = f"{debias} evaluation.directions={directions} {PERMISSIVE}"
    found = figures(federate(options, "evaluation=sums", name="sums"))
    folder = federate(options, "evaluation=per_scan", name="scans")
    stages = ["untrained", "pretrained"] + (["erased"] if "erasure" in debias else [])
    assert {stage for stage, *_ in found} == {*stages, "chance", "age_sex_floor"}
    for stage in stages:
        e = Embeddings.load(folder / f"embeddings-{stage if stage != 'erased' else 'pretrained'}.npz")
        h = e.h_NF.astype(np.float64)
        if stage == "erased":
            eraser = load_checkpoint(next((folder / "checkpoints").glob("eraser-*"))).state
            mean, scale, rows = (eraser[name].double().numpy() for name in ("mean_F", "scale_F", "directions_KF"))
            h = h - (h - mean) / scale @ rows.T @ rows * scale
        train, healthy, known = e.split == "train", e.diagnosis == "control", e.site != "d"
        fitted = train & healthy & known
        varies = h[fitted].std(axis=0) > 1e-6
        x = (h - h[fitted].mean(axis=0)) / np.where(varies, h[fitted].std(axis=0), 1.0)
        if directions == "random":
            rows = random_directions(h.shape[1], 5, seed=0).numpy()
        else:
            rows = directions_of_groups(x[train], e.select(train), 5)
        x = x @ rows.T

        age, fold = e.age_years, folds_of(e)
        error = {alpha: [] for alpha in RIDGE_ALPHAS}
        for alpha in RIDGE_ALPHAS:
            for k in range(5):
                model = Ridge(alpha=alpha, solver="cholesky").fit(x[fitted & (fold != k)], age[fitted & (fold != k)])
                error[alpha].append(np.abs(model.predict(x[fitted & (fold == k)]) - age[fitted & (fold == k)]).mean())
        alpha = min(RIDGE_ALPHAS, key=lambda alpha: np.mean(error[alpha]))
        ridge = Ridge(alpha=alpha, solver="cholesky").fit(x[fitted], age[fitted])
        test = ~train & healthy & known
        miss = age - ridge.predict(x)
        expected = {
            ("age", "mae_sums", "all"): np.abs(miss[test]).mean(),
            ("age", "r2_sums", "all"): 1 - np.square(miss[test]).mean() / age[test].var(),
            ("age", "mae_sums_unseen", "all"): np.abs(miss[healthy & ~known]).mean(),
            ("age", "mae_sums_unseen", "d"): np.abs(miss[healthy & ~known]).mean(),
        }
        expected |= {("age", "mae_sums", site): np.abs(miss[test & (e.site == site)]).mean() for site in "abc"}
        for task, label in (("site", e.site), ("scanner", np.char.add(e.site, e.scanner))):
            code = np.unique(label, return_inverse=True)[1]
            predicted = lda(x[fitted], code[fitted], x[test]).argmax(axis=1)
            expected[task, "balanced_accuracy_lda", "all"] = recall(code[test], predicted)
            centre = np.array([x[fitted & (code == k)].mean(axis=0) for k in np.unique(code[fitted])])
            predicted = np.square(x[test][:, None] - centre).sum(axis=2).argmin(axis=1)
            expected[task, "balanced_accuracy_nearest", "all"] = recall(code[test], predicted)
        both = np.isin(e.site, ["c", "d"])
        decision = lda(x[train & both], ~healthy[train & both], x[~train & both])
        score = 1 / (1 + np.exp(decision[:, 0] - decision[:, 1]))
        expected["diagnosis", "auc_lda", "all"] = roc_auc_score(~healthy[~train & both], np.minimum(score * 20 // 1, 19))
        of_stage = {key[1:]: value for key, value in found.items() if key[0] == stage}
        assert of_stage == pytest.approx(expected, abs=1e-8)
    floor = age_and_sex(torch.from_numpy(e.age_years), torch.from_numpy((e.sex == "M").astype(float))).numpy()
    code = np.unique(e.site, return_inverse=True)[1]
    predicted = lda(floor[fitted], code[fitted], floor[test], shrinkage=0.01).argmax(axis=1)
    assert found["age_sex_floor", "site", "balanced_accuracy_lda", "all"] == pytest.approx(
        recall(code[test], predicted), abs=1e-8
    )
    assert found["chance", "site", "balanced_accuracy_lda", "all"] == pytest.approx(1 / 3)
    assert found["chance", "scanner", "balanced_accuracy_nearest", "all"] == pytest.approx(1 / 4)


@pytest.mark.usefixtures("unprobed")
def test_a_logistic_site_probe_is_scikit_learns(federate: Federate) -> None:
    options = f"evaluation.directions=random {PERMISSIVE}"
    found = figures(federate(options, "evaluation=sums evaluation.site_probe=logistic", name="sums"))
    e = Embeddings.load(federate(options, "evaluation=per_scan", name="scans") / "embeddings-pretrained.npz")
    healthy = (e.diagnosis == "control") & (e.site != "d")
    fitted, test = healthy & (e.split == "train"), healthy & (e.split == "test")
    varies = e.h_NF[fitted].std(axis=0) > 1e-6
    x = (e.h_NF - e.h_NF[fitted].mean(axis=0)) / np.where(varies, e.h_NF[fitted].std(axis=0), 1.0)
    x = x @ random_directions(x.shape[1], 5, seed=0).numpy().T
    model = LogisticRegression(class_weight="balanced", tol=1e-8, max_iter=1000).fit(x[fitted], e.site[fitted])
    expected = recall(e.site[test], model.predict(x[test]))
    assert found["pretrained", "site", "balanced_accuracy_logistic", "all"] == pytest.approx(expected, abs=1e-8)
    assert ("age_sex_floor", "site", "balanced_accuracy_logistic", "all") in found
    assert ("chance", "site", "balanced_accuracy_logistic", "all") in found


def test_one_site_that_keeps_its_scans_makes_all_figures_sums(tmp_path: Path, federate: Federate) -> None:
    """Real node configs; every array that leaves is too short, or known, to be a row a scan."""
    sizes = {"a": 131, "b": 127}
    table = write_table(tmp_path / "two.csv", sizes)
    policy: dict[str, str | int | bool | float] = {"min-group": 5, "covariance-subjects-per-feature": 3, "diagonal-subjects": 10}
    nodes: NodeConfigs = {}
    for node, site in ((4, "a"), (5, "b")):
        header, *lines = table.read_text().splitlines()
        own = tmp_path / f"{site}.csv"
        own.write_text("\n".join([header, *(line for line in lines if line.startswith(site))]) + "\n")
        nodes[node] = {"site": site, "data-root": str(own), "share-per-scan": site == "a", **policy}
    left: list[tuple[str, str, tuple[int, ...]]] = []

    def watch(reply: Message, message_type: str) -> Message:
        left.extend(
            (message_type, record, tuple(array.shape))
            for record, arrays in reply.content.array_records.items()
            for array in arrays.values()
        )
        return reply

    folder = federate("data.table=null data.unseen_sites=[]", name="mixed", nodes=nodes, tamper=watch)
    assert {message for message, *_ in left} >= {"query.features", "query.groups", "query.probes", "query.errors"}
    assert not {message for message, *_ in left} & {"query.embed", "query.predict"}
    # Folds, groups, scanners, classes, columns, candidates: 26 rows at most; 51 to 131 subjects are in a split or site.
    of_probes = [shape for message, record, shape in left if message.startswith("query") and not record.endswith("arrays")]
    assert max(shape[0] for shape in of_probes if len(shape) > 1) < 40
    assert not list(folder.glob("embeddings-*"))
    found = figures(folder)
    assert {metric for _, task, metric, _ in found if task == "site"} == {"balanced_accuracy_lda", "balanced_accuracy_nearest"}
    report = (folder / "report.html").read_text()
    assert "b: keeps the results of single scans at home (share-per-scan is not true), so all figures are from sums" in report
    assert "see 5 of 9 directions" in report
    assert "Site can be read from the pretrained representation with balanced accuracy" in report
    assert "site_predictability" not in report or "data:image/png" in report


def test_a_policy_that_few_meet_leaves_nearest_means_and_says_why(federate: Federate) -> None:
    folder = federate("evaluation=sums policy.min_group=8 policy.round_counts_to=2 policy.diagonal_subjects=10")
    found = figures(folder)
    assert ("pretrained", "site", "balanced_accuracy_nearest", "all") in found
    assert ("pretrained", "site", "balanced_accuracy_lda", "all") in found  # of a few directions
    report = (folder / "report.html").read_text()
    assert "those that need a covariance see the first" in report
    large = "evaluation=sums policy.min_group=24 policy.covariance_subjects_per_feature=30 policy.diagonal_subjects=10"
    strict = federate(large, name="strict")
    assert {metric for _, _, metric, _ in figures(strict)} == {"balanced_accuracy_nearest"}
    report = (strict / "report.html").read_text()
    assert "got columns that sites can tell: a 1, b 0, c 0." in report
    assert "site by nearest mean: c: the site is not scored: that needs 24 held-out subjects." in report


def test_no_evaluation_and_evaluation_of_scans_alone(federate: Federate) -> None:
    folder = federate("evaluation=none policy.diagonal_subjects=10", name="none")
    assert figures(folder) == {}
    assert "Nothing was evaluated: evaluation=none." in (folder / "report.html").read_text()
    folder = federate("evaluation=per_scan policy.share_per_scan=false policy.diagonal_subjects=10", name="scans")
    assert figures(folder) == {}
    assert "a: this site keeps the results of single scans at home" in (folder / "report.html").read_text()


@pytest.mark.usefixtures("unprobed")
def test_fine_tuned_classifiers_are_scored_from_histograms(federate: Federate) -> None:
    # Without validation subjects a patient is told from 0.5 on, as the histograms do.
    stages = f"finetune=both finetune.num_rounds=1 finetune.local_steps=1 data.target_sites=[c,d] {PERMISSIVE}"
    stages += " data.fractions=[0.6,0,0.4]"
    binned = figures(federate(stages, "evaluation=sums", name="sums"))
    exact = figures(federate(stages, "evaluation=per_scan", name="scans"))
    for stage in ("linear_probe", "full_finetuning", "from_scratch"):
        area = binned[stage, "diagnosis", "auc_binned", "all"]
        assert area == pytest.approx(exact[stage, "diagnosis", "auc", "all"], abs=0.1)
        accuracy = binned[stage, "diagnosis", "balanced_accuracy_binned", "all"]
        assert accuracy == pytest.approx(exact[stage, "diagnosis", "balanced_accuracy", "all"], abs=1e-12)


@pytest.mark.usefixtures("unprobed", "quick_probes", "few_resamples")
def test_what_crossed_the_wire_and_who_had_which_role_are_written(federate: Federate) -> None:
    folder = federate("policy.min_group=4 policy.diagonal_subjects=10", "evaluation=per_scan", name="run")
    traffic = json.loads((folder / "traffic.json").read_text())
    assert next(iter(traffic)) == "weights"
    assert traffic["embeddings"]["to sites"] == 0 < traffic["embeddings"]["from sites"]
    write_report(folder, RunRecord(name="run", status="finished", traffic=traffic))
    page = (folder / "report.html").read_text()
    assert "What crossed the wire" in page
    assert "Representations of single scans, where sites share them" in page
    roles = json.loads((folder / "roles.json").read_text())
    assert roles == {"pretraining": ["a", "b", "c"], "target": ["c", "d"], "unseen": ["d"]}
    assert read_representations(folder).unseen == ("d",)
    (folder / "embeddings-untrained.npz").unlink()
    done = CliRunner().invoke(cli, ["evaluate", str(folder)])
    assert done.exit_code == 0
    assert "mae_unseen" in done.output
    assert "Unseen in pretraining, as the run says: d." in done.output
    (folder / "roles.json").write_text('{"unseen": 3}')
    with pytest.raises(ValueError, match=r"roles\.json: it must list the unseen sites"):
        read_representations(folder)


def test_traffic_in_words() -> None:
    counted = {("weights", "to sites"): 3_000_000, ("weights", "from sites"): 1_000_000, ("probes", "from sites"): 60_000}
    counted |= {("embeddings", "from sites"): 5_000_000, ("moments", "to sites"): 20_000}
    traffic = traffic_by_kind(counted)
    assert list(traffic) == ["weights", "embeddings", "probes", "moments"]
    assert traffic["probes"] == {"to sites": 0, "from sites": 60_000}
    assert about_traffic(traffic) == "constants, exchange, erasure and probes: 0.08 MB of arrays, 2.0% of the weights' bytes"
    assert about_traffic({}) == "constants, exchange, erasure and probes: 0.00 MB of arrays"


def test_the_summary_shows_what_is_looked_for_first() -> None:
    def row(stage: str, task: str, metric: str, site: str = "all") -> Evaluation:
        bounds = (None, None) if stage == "chance" else (0.1, 0.9)
        return Evaluation(
            stage=stage, task=task, metric=metric, value=0.5, low=bounds[0], high=bounds[1], regime="federated", site=site,
            num_subjects=9, seed=0,
        )  # fmt: skip

    lines = summary(
        [
            row("chance", "site", "balanced_accuracy"),
            row("pretrained", "site", "ilisi"),
            row("pretrained", "age", "mae"),
            row("pretrained", "age", "mae", "north"),
            row("pretrained", "site", "balanced_accuracy_boosting"),
        ]
    )
    assert [line.split()[:3] for line in lines[1:]] == [
        ["pretrained", "site", "balanced_accuracy_boosting"],
        ["pretrained", "age", "mae"],
        ["chance", "site", "balanced_accuracy"],
    ]
    assert len({line.index("0.500") for line in lines[1:]}) == 1
    assert summary([row("pretrained", "age", "mae", "north")]) == ["no figures over all sites; the report says why"]


# Answers that are not what was asked.


def spoil(query: str, record: str, name: str, value: np.ndarray) -> Callable[[Message, str], Message]:
    def tamper(reply: Message, message_type: str) -> Message:
        if message_type == query and reply.metadata.src_node_id == 2:
            reply.content.array_records[record][name] = Array(value)
        return reply

    return tamper


@pytest.mark.parametrize(
    ("query", "record", "name", "value", "reason"),
    [
        ("features", "sums", "sums", np.zeros((3, 4)), "sums must be 3 rows of 9"),
        ("groups", "probes-groups", "mean_GF", np.zeros((2, 4)), r"mean_GF of GroupMeans must have shape \(None, 9\)"),
        ("groups", "probes-groups", "patient_G", np.full(3, np.nan), "must be finite float64 arrays"),
        ("probes", "probes-site", "count_C", np.array([1e9]), "counts of at most"),
        ("probes", "probes-site", "scanner_C", np.array([-4.0]), "codes must be different and the site's own"),
        ("probes", "probes-age", "fold_G", np.arange(5.0) + 7777, "codes must be different and the site's own"),
        ("probes", "probes-site", "mean_CF", np.zeros((1, 5), np.float32), "ClassMoments must be float64, got float32"),
        ("errors", "probes-site", "class_C", np.array([0.0]), "codes must be different and the site's own"),
        ("errors", "probes-age", "absolute_A", np.zeros(3), "absolute_A must have shape"),
        ("errors", "probes-site", "texts", np.frombuffer(b'{"withheld": ["a\\nb"]}', np.uint8).copy(), "texts must be short"),
        ("errors", "probes-site", "texts", np.frombuffer(b"{", np.uint8).copy(), "ClassCounts: "),
    ],
)  # fmt: skip
def test_a_bad_answer_stops_the_run_and_names_the_site(
    federate: Federate, query: str, record: str, name: str, value: np.ndarray, reason: str
) -> None:
    options = f"evaluation=sums {PERMISSIVE}"
    with pytest.raises(RunError, match=rf"(?s)evaluation: every site must answer, 1 did not\.\n  b: .*{reason}"):
        federate(options, tamper=spoil(f"query.{query}", record, name, value))


def test_a_site_that_was_started_anew_says_so(federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.tasks.keep_for_probes", lambda *_: None)
    monkeypatch.setattr("client.tasks.let_out", lambda train, _: train)
    with pytest.raises(RunError, match=r"a: this site must embed its scans before it evaluates, it was started anew"):
        federate("evaluation=sums", PERMISSIVE)


def test_messages_survive_and_unknown_fields_do_not() -> None:
    probe = SiteProbe((("a", 0), ("b", 1)), torch.randn(2, 3).double(), torch.randn(2).double(), ("a: a reason",))
    back = unpack_message(SiteProbe, pack_message(probe), "server", weight_KF=(None, 3))
    assert (back.classes, back.notes) == (probe.classes, probe.notes)
    assert torch.equal(back.weight_KF, probe.weight_KF)
    arrays = pack_message(probe)
    arrays["more"] = Array(np.zeros(2))
    with pytest.raises(ExchangeError, match="got another 'more'"):
        unpack_message(SiteProbe, arrays, "server")
    del arrays["more"], arrays["intercept_K"]
    with pytest.raises(ExchangeError, match=r"server: SiteProbe: .*intercept_K"):
        unpack_message(SiteProbe, arrays, "server")


# Arithmetic.


def subjects(patient: Sequence[int], scanner: Sequence[int], age: Sequence[float]) -> Subjects:
    n = len(patient)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, generator=g).double()
    return Subjects(
        x, torch.tensor(age).double(), torch.zeros(n), torch.tensor(patient), torch.tensor(scanner), torch.arange(n) % 5
    )


def test_no_sum_is_of_a_few_subjects_more_than_another() -> None:
    """3 of one scanner and 2 of unknown age are left out of everything."""
    train = subjects([0] * 15 + [1] * 5, [0] * 12 + [1] * 3 + [0] * 5, [30.0] * 10 + [math.nan] * 2 + [40.0] * 8)
    policy = MomentPolicy(min_group=4, round_counts_to=1)
    assert torch.equal(let_out(train, policy).x_NF, train.x_NF[[*range(10), *range(15, 20)]])
    assert len(let_out(train, OPEN)) == 20
    means = group_means(let_out(train, policy), policy)
    assert (means.count_G.tolist(), means.patient_G.tolist()) == ([10, 5], [0, 1])
    torch.testing.assert_close(means.mean_GF[0], train.x_NF[:10].mean(dim=0))
    assert len(group_means(train.select(torch.zeros(20, dtype=torch.bool)), policy).count_G) == 0


@pytest.mark.parametrize(("each", "min_group", "columns"), [(12, 10, 2), (1, 10, 4), (0, 10, 4), (1, 31, 0)])
def test_columns_that_a_site_can_tell(each: int, min_group: int, columns: int) -> None:
    policy = MomentPolicy(min_group=min_group, covariance_subjects_per_feature=each)
    assert affordable_columns(subjects([0] * 30, [0] * 30, [30.0] * 30), 4, policy) == columns


def test_shares_are_exact_where_counts_are_rounded() -> None:
    """Of 8 subjects 3 are recognised, 5 are taken for 5 others: rounded one by one, all counts but one would vanish."""
    eye = torch.eye(6).double()
    probe = SiteProbe(tuple((site, 0) for site in "abcdef"), eye, torch.zeros(6).double())
    test = replace(subjects([0] * 8, [0] * 8, [30.0] * 8), x_NF=eye[[0, 0, 0, 1, 2, 3, 4, 5]])
    policy = MomentPolicy(min_group=5, round_counts_to=5)
    told = probe_errors(None, {"site": probe}, test, test, site="a", known=True, policy=policy)["site"]
    assert isinstance(told, ClassCounts)
    torch.testing.assert_close(told.count_CK, 10 / 8 * torch.tensor([[3, 1, 1, 1, 1, 1]]).double())
    scores = told_scores(torch.tensor([0.1, 0.1, 0.6] * 4), torch.tensor([0, 0, 1] * 4), replace(policy, min_group=4))
    assert scores.count_2E.sum(dim=1).tolist() == [10, 5]
    assert told_scores(torch.rand(3), torch.zeros(3), policy).withheld == ("scores need 5 held-out subjects of each label",)


def test_probes_see_what_two_sites_can_tell() -> None:
    assert num_seen({"a": 9, "b": 4, "c": 2}, 16) == 3
    assert num_seen({"a": 9, "b": 9}, 5) == 5
    assert num_seen({"a": 9, "b": 1}, 5) == 0
    assert num_seen({"a": 9}, 5) == 0


def test_directions_do_not_show_that_an_unseen_site_is_another_site() -> None:
    known = GroupMeans(torch.ones(2).double(), torch.tensor([[1.0, 0, 0], [-1, 0, 0]]).double(), torch.zeros(2).double())
    patients = torch.tensor([0.0, 1]).double()
    unseen = GroupMeans(torch.ones(2).double(), torch.tensor([[0, 50.0, 0], [0, 50, 0.2]]).double(), patients)
    found = group_directions({"a": known, "d": unseen}, {"a"}, 3)
    assert len(found) == 2
    torch.testing.assert_close(found[:, 1], torch.zeros(2).double())
    assert abs(float(found[1, 2])) > 0.9
    with pytest.raises(NotEvaluableError, match="must be told for the choice of directions, got none"):
        group_directions({"d": unseen}, set(), 3)
    with pytest.raises(NotEvaluableError, match="at least two group means must differ"):
        group_directions({"a": replace(known, mean_GF=torch.zeros(2, 3).double())}, {"a"}, 3)


def test_group_means_that_make_no_sense_are_refused() -> None:
    one = torch.ones(1).double()
    for bad in ((one, torch.zeros(2, 3), one), (one * 0, torch.zeros(1, 3), one), (one, torch.zeros(1, 3), one * 2)):
        with pytest.raises(ValueError, match=r"group means: "):
            GroupMeans(*bad)


def test_the_interval_of_an_area_is_delongs() -> None:
    """Against the paper's sums over pairs: placements of each positive and each negative score."""
    random = np.random.default_rng(0)
    negative, positive = random.integers(0, 8, 37), random.integers(2, 10, 23)
    pairs = (positive[:, None] > negative).astype(float) + (positive[:, None] == negative) / 2
    expected = pairs.mean(axis=1).var(ddof=1) / 23 + pairs.mean(axis=0).var(ddof=1) / 37
    counts = torch.stack([torch.from_numpy(np.bincount(part, minlength=20)) for part in (negative, positive)]).double()
    assert area_variance(counts) == pytest.approx(expected, rel=1e-12)
    [figure], _ = Scorer(stage="pretrained", seed=0).diagnosis("auc_lda", {"a": ScoreCounts(counts)})
    assert figure.value == pytest.approx(pairs.mean())
    tied = (positive[:, None] == negative).mean() / 2
    assert figure.high - figure.value == pytest.approx(min(1.959964 * math.sqrt(expected) + tied, 1 - figure.value))


def test_the_interval_of_r2_covers_at_least_as_often_as_it_says() -> None:
    random = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        age = random.normal(50, 10, 60)
        predicted = 50 + 0.5 * (age - 50) + random.normal(0, 5, 60)
        r2 = 1 - np.square(age - predicted).mean() / age.var()
        low, high = r2_interval(ErrorScore(1.0, 1.0, 1.0, r2, 60))
        covered += low <= 0.5 <= high
    assert covered / 400 > 0.95


def test_codes_of_others_are_refused() -> None:
    one = torch.ones(1).double()
    probe = SiteProbe((("a", 0), ("b", 0)), torch.zeros(2, 1), torch.zeros(2))
    check_codes(ClassCounts(one, torch.ones(1, 2)), "b", probe)
    with pytest.raises(ValueError, match=r"ClassCounts: codes must be different and the site's own, got"):
        check_codes(ClassCounts(one, torch.ones(1, 2)), "a", probe)
    with pytest.raises(ValueError, match=r"ClassMoments"):
        check_codes(ClassMoments(torch.zeros(2), torch.ones(2), torch.zeros(2, 1), torch.zeros(0, 0)), "a")
    with pytest.raises(ValueError, match="FoldMoments"):
        check_codes(FoldMoments(-2 * one, one, torch.zeros(1, 2), torch.zeros(1, 2, 2)), "a")


def test_notes_name_a_reason_once_with_its_sites() -> None:
    notes = ["a: scanner 0 is no class: too few", "c: scanner 0 is no class: too few", "scale: fits"]
    assert gathered("site", notes, ["a", "b", "c"]) == ["site: a, c: the site is no class: too few.", "site: scale: fits."]
    reason = NotEvaluableError("site: classes told must be at least 2, got 0. a: scanner 1 is no class; b: scanner 1 is no class")
    assert refused("diagnosis", reason, ["a", "b"]) == [
        "Not evaluated: diagnosis: classes told must be at least 2, got 0.",
        "diagnosis: a, b: the label patient is no class.",
    ]
    assert refused("site_nearest_floor", NotEvaluableError("site: it must."), []) == [
        "Not evaluated: floor of site by nearest mean: it must."
    ]


def test_unseen_sites_that_withhold_are_named_beside_the_figures_of_the_others() -> None:
    def part(count: float) -> AgeErrors:
        one = torch.tensor([count]).double()
        return AgeErrors(one, one[:, None], one, one, one * 2, torch.tensor([40.0, 9.0]), () if count else ("too few",))

    found, notes = Scorer(stage="pretrained", seed=0).age({"a": part(9.0)}, {"d": part(0.0)})
    assert [e.metric for e in found] == ["mae_sums", "mae_sums", "r2_sums"]
    assert notes == ["d: too few", "no unseen site is scored"]
