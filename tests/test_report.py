"""The report: what it says, that it is whole without a network, that it survives missing parts and hostile names."""

import re
from dataclasses import replace

import numpy as np
import pytest

from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import Evaluation
from core.evaluation.predictions import Predictions, confusion, evaluate_predictions, operating_points
from core.evaluation.words import verdict
from core.report import write_report
from core.report_record import RunRecord
from core.targets import Target

SECTIONS = ("ran", "losses", "embeddings", "site", "age", "diagnosis", "sites", "problems", "reading")
FIGURES = {
    "losses_pretraining.png",
    "losses_finetuning.png",
    "embeddings.png",
    "site_predictability.png",
    "age_error.png",
    "diagnosis_auc.png",
}


def figure(stage: str, task: str, metric: str, value: float, half: float = 0.08, site: str = "all") -> Evaluation:
    bounds = {"low": None, "high": None} if stage == "chance" else {"low": value - half, "high": value + half}
    return Evaluation(
        stage=stage, task=task, metric=metric, value=value, **bounds, regime="federated", site=site, num_subjects=17, seed=3
    )


EVALUATIONS = [
    figure("untrained", "site", "balanced_accuracy", 0.78),
    figure("untrained", "site", "balanced_accuracy_knn", 0.66),
    figure("pretrained", "site", "balanced_accuracy", 0.41),
    figure("pretrained", "site", "balanced_accuracy_knn", 0.39),
    figure("pretrained", "scanner", "balanced_accuracy", 0.37),
    figure("chance", "site", "balanced_accuracy", 0.25),
    figure("age_sex_floor", "site", "balanced_accuracy", 0.36),
    figure("untrained", "age", "mae", 6.2, 1.0),
    figure("pretrained", "age", "mae", 5.3, 1.0),
    figure("pretrained", "age", "mae", 5.7, 1.0, site="North"),
    figure("pretrained", "age", "mae_unseen", 7.9, 1.0),
    figure("pretrained", "age", "mae_unseen", 8.8, 1.0, site="South"),
    figure("pretrained", "sex", "auc", 0.81),
    figure("pretrained", "diagnosis", "auc", 0.62),
    figure("linear_probe", "diagnosis", "auc", 0.64),
    figure("full_finetuning", "diagnosis", "auc", 0.73),
    figure("full_finetuning", "diagnosis", "auc", 0.74, site="South"),
    figure("from_scratch", "diagnosis", "auc", 0.59),
]


def embeddings(sites=("North", "South"), scans=10) -> Embeddings:
    random = np.random.default_rng(0)
    num_scans = scans * len(sites)
    return Embeddings(
        h_NF=random.normal(size=(num_scans, 6)).astype(np.float32),
        subject=np.tile(np.arange(scans), len(sites)),
        site=np.repeat(np.array(sites), scans),
        scanner=np.full(num_scans, "3T"),
        sex=np.full(num_scans, "F"),
        diagnosis=np.tile(["control", "patient"], num_scans // 2),
        split=np.tile(["train", "test"], num_scans // 2),
        age_years=np.linspace(21, 67, num_scans),
    )


def record(**changes) -> RunRecord:
    rounds = [
        {"stage": "pretrain", "round": n, "seconds": 1.5, "sites": {"North": {"loss": 3 / n, "fairkl": 0.2 / n}}}
        for n in (1, 2, 3)
    ]
    rounds += [
        {"stage": stage, "round": n, "seconds": 1.0, "sites": {"South": {"loss": 1 / n}}}
        for stage in ("linear_probe", "full_finetuning", "from_scratch")
        for n in (1, 2)
    ]
    full = RunRecord(
        name="phantom",
        status="finished",
        config={"seed": 3, "objective": {"name": "yaware", "bandwidth_years": 4.5}, "debias": {"exchange": {"every": 5}}},
        sites=[
            {"name": "North", "scans": 112, "subjects": 91, "scanners": 2, "role": "pretraining", "problems": {}},
            {
                "name": "South",
                "scans": 41,
                "subjects": 40,
                "scanners": ["Prisma", "Skyra"],
                "age_range": "18 to 80",
                "role": "target",
                "problems": {"unreadable": "2", "age_missing": 0},
            },
        ],
        rounds=rounds,
        evaluations=EVALUATIONS,
        maps={"untrained": embeddings(), "pretrained": embeddings()},
        notes=["South has one scanner."],
    )
    return replace(full, **changes)


def text_of(page: str) -> str:
    """What a reader sees: no tags, no images, single spaces."""
    return " ".join(re.sub(r"<[^>]*>", " ", re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)).split())


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    assert write_report(folder, record()) == folder / "report.html"
    return folder


def test_report_shows_every_section_and_number(run_folder):
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert all(f'href="#{section}"' in page for section in SECTIONS)

    text = text_of(page)
    for expected in (
        "Site can be read from the pretrained representation with balanced accuracy 0.41 [0.33, 0.49]",
        "finished · 2 sites · pretraining 3 rounds in 4 s",
        "North pretraining 91 112 2 21 to 43 none",
        "South target 40 41 Prisma, Skyra 18 to 80 2 unreadable",
        "bandwidth_years 4.5",
        "exchange.every 5",
        "Untrained encoder site: balanced accuracy, 10-NN 0.66 [0.58, 0.74] 17 federated 3",
        "Chance site: balanced accuracy 0.25 constant 17",
        "Pretrained encoder age: MAE, years 5.3 [4.3, 6.3]",
        "North 5.7 [4.7, 6.7] n 17",
        "South 8.8 [7.8, 9.8] n 17, unseen",
        "From scratch diagnosis: AUC 0.59 [0.51, 0.67]",
        "Pretrained encoder sex: AUC 0.81",
        "South: 2 unreadable.",
        "South has one scanner.",
    ):
        assert expected in text, expected


def test_report_is_one_file_that_fetches_nothing(run_folder):
    page = (run_folder / "report.html").read_text(encoding="utf-8")
    assert {path.name for path in (run_folder / "figures").iterdir()} == FIGURES
    for path in (run_folder / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
        assert path.stat().st_size > 5000
    sources = re.findall(r'\b(?:src|href|action|data|poster)\s*=\s*"([^"]*)"', page)
    assert len([source for source in sources if source.startswith("data:image/png;base64,")]) == len(FIGURES)
    assert all(source.startswith(("data:image/png;base64,", "#")) for source in sources)
    assert not re.search(r"<script|<link|<iframe|@import|url\(|https?:", page, flags=re.IGNORECASE)
    assert "default-src 'none'" in page


def test_same_record_gives_the_same_bytes(run_folder, tmp_path):
    assert write_report(tmp_path, record()).read_bytes() == (run_folder / "report.html").read_bytes()


HOSTILE = ("<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "_hidden $\\frac{1}{$ {{ 7 * 7 }}", "a" * 90)


def test_hostile_names_are_only_text(tmp_path):
    first = HOSTILE[0]
    hostile = record(
        name=first,
        status=first,
        config={name: {name: name} for name in HOSTILE},
        sites=[{"name": n, "scans": 1, "subjects": 1, "scanners": n, "role": n, "problems": {n: 1}} for n in HOSTILE],
        rounds=[
            {
                "stage": stage,
                "round": 1,
                "seconds": 1.0,
                "sites": {name: {"loss": 1.0} for name in HOSTILE},
                "failures": {name: name for name in HOSTILE},
            }
            for stage in ("pretrain", HOSTILE[3])
        ],
        evaluations=[
            *EVALUATIONS,
            *(figure("pretrained", "age", "mae", 4.0, site=name) for name in HOSTILE),
            *(figure(name, "site", "balanced_accuracy", 0.5) for name in HOSTILE),
            *(figure(name, name, name, 0.5) for name in HOSTILE),
        ],
        maps={HOSTILE[3]: embeddings(sites=HOSTILE)},
        notes=HOSTILE,
    )
    page = write_report(tmp_path, hostile).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert " 49 " not in text_of(page)
    assert all(source.startswith("data:image/png") for source in re.findall(r'<img src="([^"]*)', page))


def test_report_without_any_result_says_so(tmp_path):
    page = write_report(tmp_path, RunRecord(name="empty", status="stopped: quorum not met")).read_text(encoding="utf-8")
    text = text_of(page)
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert "<img" not in page
    assert not (tmp_path / "figures").exists()
    for expected in (
        "stopped: quorum not met",
        "Site predictability of the pretrained encoder was not evaluated in this run.",
        "No site described itself.",
        "No configuration was recorded.",
        "No round was completed.",
        "No representation was shared with the server",
        "Age was not evaluated.",
        "Diagnosis was not evaluated.",
        "No figure was evaluated at a single site.",
        "No problem was reported.",
    ):
        assert expected in text, expected


@pytest.mark.parametrize("parts", [("config", "sites", "notes"), ("rounds",), ("evaluations",)])
def test_report_works_without_a_part(tmp_path, parts):
    """Here sites keep their embeddings at home, too."""
    empty = {part: {} if part == "config" else () for part in parts}
    page = write_report(tmp_path, record(maps={}, **empty)).read_text()
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert "No representation was shared with the server" in page


def test_maps_that_cannot_be_drawn_are_explained(tmp_path):
    flat = replace(embeddings(), h_NF=np.ones((20, 6), np.float32))
    ageless = replace(embeddings(), age_years=np.full(20, np.nan), diagnosis=np.full(20, ""))
    text = text_of(write_report(tmp_path, record(maps={"untrained": flat, "pretrained": ageless})).read_text())
    assert "Untrained encoder: planar_map: representations must differ between scans, got one value for all." in text
    assert (tmp_path / "figures" / "embeddings.png").exists()


def test_rounds_that_went_wrong_are_counted(tmp_path):
    rounds = [
        {
            "stage": "pretrain",
            "round": n,
            "seconds": 1.0,
            "sites": {"North": {"loss": float("nan") if n == 2 else 1.0}},
            "failures": {"South": "did not answer."},
        }
        for n in (1, 2, 3)
    ]
    text = text_of(write_report(tmp_path, record(rounds=rounds, maps={}, evaluations=())).read_text(encoding="utf-8"))
    assert "Pretraining, 3 rounds (1, 2, 3): South took no part: did not answer." in text
    assert "Pretraining, round 2: North reported a number that is not finite; it is not drawn." in text


def test_many_sites_and_several_seeds_are_told_apart(tmp_path):
    names = [f"site {i:02}" for i in range(30)]
    several = [
        *EVALUATIONS,
        *(replace(figure("pretrained", "site", "balanced_accuracy", 0.5), seed=seed) for seed in (4, 5)),
    ]
    rounds = [{"stage": "pretrain", "round": n, "seconds": 1.0, "sites": {s: {"loss": 1 / n} for s in names}} for n in (1, 2)]
    page = write_report(tmp_path, record(rounds=rounds, evaluations=several, maps={})).read_text(encoding="utf-8")
    assert len(re.findall("Pretrained encoder</td><td>site: balanced accuracy</td>", page)) == 3


@pytest.mark.parametrize(
    ("value", "place"), [(0.41, "not told apart from the floor"), (0.6, "above the floor"), (0.2, "below the floor")]
)
def test_verdict_compares_with_the_floor(value, place):
    others = [e for e in EVALUATIONS if (e.stage, e.task) != ("pretrained", "site")]
    sentence = verdict([*others, figure("pretrained", "site", "balanced_accuracy", value)])
    assert f"{value:.2f} [{value - 0.08:.2f}, {value + 0.08:.2f}], {place} (chance 0.25, floor from age and sex 0.36" in sentence
    assert sentence.endswith("before pretraining 0.78).")


def test_verdict_says_only_what_is_known():
    alone = [figure("pretrained", "site", "balanced_accuracy", 0.41)]
    assert verdict(alone) == ("Site can be read from the pretrained representation with balanced accuracy 0.41 [0.33, 0.49].")


# fine-tuning


def predicted(target: Target, seed: int, count: int = 120) -> Predictions:
    random = np.random.default_rng(seed)
    place = np.arange(count)
    values = random.integers(max(2, len(target.names)), size=(count, len(target.labels))).astype(float)
    if target.kind == "regression":
        values = random.uniform(20, 80, (count, 1))
        scores = values + random.normal(0, 8, (count, 1))
    elif target.kind == "multiclass":
        scores = random.dirichlet(np.ones(len(target.names)), count)
    else:
        scores = np.clip(0.3 * values + random.uniform(0, 0.7, values.shape), 0, 1)
    return Predictions(
        target=target,
        values_NL=values,
        scores_NK=scores,
        subject=place,
        site=np.array(["North", "South", "East"])[place % 3],
        sex=np.array(["F", "M"])[place // 3 % 2],
        split=np.where(place // 3 % 4 == 0, "val", "test"),
    )


def fine_tuned(target: Target, stages=("linear_probe", "full_finetuning")) -> RunRecord:
    """A run that fine-tuned at North and South, and kept East for the end."""
    told = {stage: predicted(target, seed) for seed, stage in enumerate(stages)}
    known = {"regime": "federated", "seed": 3, "known_sites": {"North", "South"}, "num_resamples": 30}
    found = [e for stage, of in told.items() for e in evaluate_predictions(of, stage=stage, **known)[0]]
    probe = figure("pretrained", "age", "mae", 5.3, 1.0)
    return RunRecord(name="tuned", status="finished", evaluations=[probe, *found], predictions=told)


@pytest.mark.parametrize(
    ("target", "figures", "texts"),
    [
        (
            Target(),
            {"diagnosis_auc.png", "predictions.png"},
            ("Fine-tuning: diagnosis", "patient: told", "control: taken for patient", "diagnosis: AUC, female subjects"),
        ),
        (
            Target(kind="multiclass", labels=("stage",), classes=("CN", "MCI", "AD")),
            {"target_1.png", "predictions.png"},
            ("Fine-tuning: stage", "Full fine-tuning: truly taken for CN taken for MCI taken for AD", "stage: calibration error"),
        ),
        (
            Target(kind="multilabel", labels=("lesion", "bleed")),
            {"target_1.png", "predictions.png"},
            ("Fine-tuning: lesion, bleed", "AUC of each label", "Linear probe, bleed", "findings: AUC at unseen sites"),
        ),
        (
            Target(kind="regression", labels=("volume",)),
            {"target_1.png", "predictions.png"},
            ("Fine-tuning: volume", "volume: RMSE", "volume: MAE at unseen sites", "Full fine-tuning: MAE"),
        ),
    ],
)
def test_fine_tuning_is_shown_for_any_target(tmp_path, target, figures, texts):
    run = fine_tuned(target)
    page = write_report(tmp_path, run).read_text(encoding="utf-8")
    assert re.findall(r'<section id="(\w+)">', page) == list(SECTIONS)
    assert {path.name for path in (tmp_path / "figures").iterdir()} == figures | {"age_error.png"}
    text = text_of(page)
    for expected in texts:
        assert expected in text, expected
    # An error in years is one of ages.
    assert f"{target.task}: MAE, years" not in text
    assert "Age error in years, pretrained encoder" in text
    if target.kind == "binary":
        for stage, words in (("linear_probe", "Linear probe"), ("full_finetuning", "Full fine-tuning")):
            at_known = run.predictions[stage].select(run.predictions[stage].site != "East")
            (counts,), ((threshold,), _) = confusion(at_known), operating_points(at_known)
            assert f"{words} {threshold:.3f} {counts[1, 1]} {counts[1, 0]} {counts[0, 0]} {counts[0, 1]}" in text
            assert counts.sum() == 60


def test_ages_that_are_fine_tuned_are_apart_from_those_of_the_probe(tmp_path):
    run = fine_tuned(Target(kind="regression", labels=("age_years",)), stages=("full_finetuning",))
    page = write_report(tmp_path, run).read_text(encoding="utf-8")
    by_section = {name: text_of(body) for name, body in re.findall(r'<section id="(\w+)">(.*?)</section>', page, flags=re.DOTALL)}
    assert "Full fine-tuning" not in by_section["age"]
    assert "Pretrained encoder age: MAE, years" in by_section["age"]
    assert "Full fine-tuning age: MAE, years" in by_section["diagnosis"]
    assert "Fine-tuning: age_years" in by_section["diagnosis"]
    assert "Pretrained encoder age" not in by_section["diagnosis"]


def test_predictions_of_few_or_of_one_class_are_drawn_without_what_they_lack(tmp_path):
    few = predicted(Target(), 0).select(np.arange(6))
    alone = replace(few, values_NL=np.zeros((6, 1)))
    unknown = replace(few, values_NL=np.full((6, 1), np.nan))
    for number, told in enumerate((few, alone, unknown)):
        page = write_report(
            tmp_path / str(number), RunRecord(name="few", status="finished", predictions={"full_finetuning": told})
        )
        assert "It was not evaluated." in text_of(page.read_text(encoding="utf-8"))
    assert not (tmp_path / "2" / "figures" / "predictions.png").exists()


def test_hostile_classes_and_labels_are_only_text(tmp_path):
    target = Target(kind="multiclass", labels=(HOSTILE[1],), classes=HOSTILE)
    page = write_report(tmp_path, fine_tuned(target, stages=("full_finetuning",))).read_text(encoding="utf-8")
    assert "<script" not in page
    assert "<img src=x" not in page
    assert " 49 " not in text_of(page)
