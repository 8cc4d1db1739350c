"""What fine-tuning trains, which labels it uses, and that it goes on where it was killed."""

import json
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from core.checkpoint import load_checkpoint
from core.config import ConfigError, RunConfig, load_config, quoted
from core.data.holdings import open_holdings
from core.data.site import SiteData, default_cache_root
from core.finetune_command import FinetuneError, Job, first_encoder, open_job, prepared, tune
from core.finetuning import (
    averaged_logits,
    finetune,
    finetuning_views,
    labelled,
    parameter_groups,
    prediction_notes,
    trained_parts,
    training_scans,
)
from core.models import build_classifier
from core.rounds import average, run_rounds
from core.seeding import generator
from core.stages import StageName
from core.starts import RANDOM, StartError, load_start, read_start
from core.targets import TargetError
from core.training import NotFiniteError, TrainResult, embed

CPU = torch.device("cpu")
BASE = "experiment=tiny data=folder finetune.num_rounds=3 finetune.local_steps=2 finetune.batch_size=8"


def config_of(root: Path, *overrides: str) -> RunConfig:
    return load_config(f"{BASE} data.root={quoted(str(root))} " + " ".join(overrides))


@pytest.fixture
def site(consortium: Path) -> Callable[..., tuple[SiteData, RunConfig]]:
    """Training scans of site `c`, ten patients and ten controls in all, and a run's configuration."""

    def opened(*overrides: str) -> tuple[SiteData, RunConfig]:
        config = config_of(consortium, *overrides)
        source = config.data.source(default_cache_root(), config.data.places)
        held = open_holdings("c", source, 0.0, config.data.split_seed, config.data.fractions)
        return held.splits["train"], config

    return opened


@pytest.fixture
def job(consortium: Path, tmp_path: Path) -> Callable[..., Job]:
    """A fine-tuning from random weights at all sites of the small consortium that have patients."""

    def opened(*overrides: str, folder: str = "tuned", start: Path = RANDOM) -> Job:
        config, begin = prepared(start, [*BASE.split(), f"data.root={quoted(str(consortium))}", *overrides])
        return open_job(config, begin, tmp_path / folder, CPU, lambda _line: None)

    return opened


@pytest.mark.parametrize(
    ("stage", "changed"),
    [
        ("linear_probe", {"head"}),
        ("last_block", {"head", "encoder.stages.3"}),
        ("full_finetuning", {"head", *(f"encoder.stages.{i}" for i in range(4))}),
        ("from_scratch", {"head", *(f"encoder.stages.{i}" for i in range(4))}),
        ("frozen_then_unfrozen", {"head"}),
    ],
)
def test_a_stage_trains_what_it_says_and_leaves_the_rest_bit_for_bit(
    site: Callable[..., tuple[SiteData, RunConfig]], stage: StageName, changed: set[str]
) -> None:
    data, config = site("finetune.frozen_rounds=1", f"finetune.stages=[{stage}]")
    model = build_classifier(config.encoder, 1, 0)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = finetune(model, training_scans(data, config), config, stage=stage, round_number=1, device=CPU)
    after = model.state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == set(result.state)
    assert {name.rpartition(".")[0].rpartition(".")[0] for name in moved} == changed
    if stage == "frozen_then_unfrozen":
        assert trained_parts(model, stage, 2, config) == [model.head, *reversed(list(model.encoder.parts))]


def test_learning_rates_fall_from_part_to_part_for_a_pretrained_encoder_alone() -> None:
    config = load_config("finetune.layer_decay=0.5 finetune.learning_rate=0.8 finetune.head_learning_rate=3")
    model = build_classifier(config.encoder, 1, 0)
    stages: tuple[StageName, StageName] = ("full_finetuning", "from_scratch")
    rates = {
        stage: [group["lr"] for group in parameter_groups(trained_parts(model, stage, 1, config), stage, 1, config)]
        for stage in stages
    }
    assert rates["full_finetuning"] == pytest.approx([3, 0.8, 0.4, 0.2, 0.1])
    assert rates["from_scratch"] == pytest.approx([3, 0.8, 0.8, 0.8, 0.8])


def test_a_smaller_fraction_is_part_of_a_larger_and_keeps_classes_in_proportion(
    site: Callable[..., tuple[SiteData, RunConfig]],
) -> None:
    kept = []
    for fraction in (0.34, 0.67, 1.0):
        data, config = site(f"finetune.label_fraction={fraction}")
        kept.append({(scan.subject, scan.diagnosis) for scan in training_scans(data, config).scans})
    assert kept[0] < kept[1] < kept[2]
    assert [sorted(diagnosis for _, diagnosis in part) for part in kept] == [["control"] * n + ["patient"] * n for n in (2, 4, 6)]
    other, config = site("finetune.label_fraction=0.34", "seed=1")
    assert {(scan.subject, scan.diagnosis) for scan in training_scans(other, config).scans} != kept[0]


def test_labels_that_cannot_be_learnt_from_are_refused_in_a_sentence(site: Callable[..., tuple[SiteData, RunConfig]]) -> None:
    data, config = site("finetune.label_fraction=0.05")
    with pytest.raises(TargetError, match=r"leave subjects of every class, 0\.05 leaves none of the 6 control"):
        training_scans(data, config)
    _, config = site()
    controls = data.select(lambda scan: scan.diagnosis == "control")
    with pytest.raises(TargetError, match="must show two classes of diagnosis or more, got 1 in 6 labelled scans"):
        training_scans(controls, config)
    unknown = replace(data, scans=tuple(replace(scan, diagnosis=None) for scan in data.scans))
    with pytest.raises(TargetError, match="got 0 in 0 labelled scans"):
        training_scans(unknown, config)
    _, config = site("finetune.target.labels=[iq]")
    with pytest.raises(TargetError, match=r"Name the column in data\.columns\.targets"):
        training_scans(data, config)


@pytest.mark.parametrize(
    ("target", "cells"),
    [
        ("finetune.target.kind=multiclass finetune.target.classes=[x,y,z]", lambda i: [("grade", "xyz"[i % 3])]),
        (
            "finetune.target.kind=multilabel finetune.target.labels=[lesion,atrophy]",
            lambda i: [("lesion", str(i % 2)), ("atrophy", "" if i == 1 else str(i // 6 % 2))],
        ),
        ("finetune.target.kind=regression", lambda i: [("grade", f"{i / 4}")]),
    ],
)
def test_every_kind_of_head_learns(
    site: Callable[..., tuple[SiteData, RunConfig]], target: str, cells: Callable[[int], list[tuple[str, str]]]
) -> None:
    data, config = site(target, *([] if "labels" in target else ["finetune.target.labels=[grade]"]), "finetune.local_steps=30")
    told = {scan.subject: tuple(cells(i)) for i, scan in enumerate(data.scans)}
    data = replace(data, scans=tuple(replace(scan, targets=told[scan.subject]) for scan in data.scans))
    model = build_classifier(config.encoder, config.finetune.target.num_outputs, 0)
    losses = [
        finetune(model, labelled(data, config.finetune.target), config, stage="from_scratch", round_number=r, device=CPU).metrics
        for r in (1, 2, 3)
    ]
    assert losses[2]["supervised"] < 0.8 * losses[0]["supervised"]


def test_bfloat16_computes_in_it_and_keeps_weights_in_float32(site: Callable[..., tuple[SiteData, RunConfig]]) -> None:
    results = {}
    for precision in ("float32", "bfloat16"):
        data, config = site(f"precision={precision}")
        model = build_classifier(config.encoder, 1, 0)
        seen: list[torch.dtype] = []
        model.encoder.parts[0].register_forward_hook(lambda _m, _i, out, seen=seen: seen.append(out.dtype))
        result = finetune(model, data, config, stage="full_finetuning", round_number=1, device=CPU)
        assert {value.dtype for value in result.state.values()} == {torch.float32}
        assert set(seen) == {getattr(torch, precision)}
        results[precision] = result.metrics["loss"]
    assert results["float32"] == pytest.approx(results["bfloat16"], rel=0.05)
    assert results["float32"] != results["bfloat16"]


def test_a_loss_that_is_not_finite_stops_and_names_no_scan(job: Callable[..., Job], tmp_path: Path) -> None:
    save_file(
        {
            f"encoder.{n}": v
            for n, v in build_classifier(load_config("encoder.width=4").encoder, 1, 0).encoder.state_dict().items()
        },
        tmp_path / "huge.safetensors",
    )
    huge = {name: value * 1e30 for name, value in load_file(tmp_path / "huge.safetensors").items()}
    save_file(huge, tmp_path / "huge.safetensors")
    tried = job("finetune.stages=[full_finetuning]", "finetune.learning_rate=1e30", start=tmp_path / "huge.safetensors")
    with pytest.raises(NotFiniteError, match="site c, full_finetuning, round 1, local step") as caught:
        tune(tried)
    assert "sub-" not in str(caught.value)


def test_several_sites_are_averaged_by_their_scans_and_one_is_taken_as_it_is() -> None:
    def result(value: float, scans: int) -> TrainResult:
        return TrainResult({"w": torch.tensor([value])}, scans, {}, 0.0, 0.0, 1)

    state = {"w": torch.zeros(1), "frozen": torch.ones(1)}
    assert average(state, {"b": result(4.0, 1), "a": result(0.0, 3)})["w"].item() == 1.0
    alone = average(state, {"a": result(0.1, 3)})
    assert torch.equal(alone["w"], torch.tensor([0.1]))
    assert torch.equal(alone["frozen"], state["frozen"])


def counting(losses: list[float], made: list[int]) -> tuple[Callable[..., dict[str, TrainResult]], Callable[..., float]]:
    def train(state: dict[str, torch.Tensor], round_number: int) -> dict[str, TrainResult]:
        made.append(round_number)
        return {"a": TrainResult({"w": state["w"] + 1}, 1, {"loss": 0.0}, 0.0, 0.0, 1)}

    return train, lambda state: losses[int(state["w"]) - 1]


def test_rounds_stop_when_validation_does_not_improve_and_the_best_round_is_taken(tmp_path: Path) -> None:
    made: list[int] = []
    train, validate = counting([3.0, 2.0, 2.0, 2.5, 1.0], made)
    start = {"w": torch.zeros(1)}
    ended = run_rounds("s", start, train, num_rounds=5, validate=validate, patience=2, file=tmp_path / "progress")
    assert (made, ended.round_number, ended.state["w"].item()) == ([1, 2, 3, 4], 2, 2.0)
    again = run_rounds("s", start, train, num_rounds=5, validate=validate, patience=2, file=tmp_path / "progress")
    assert made == [1, 2, 3, 4]  # nothing is done twice
    assert torch.equal(again.state["w"], ended.state["w"])
    patient = run_rounds("s", start, train, num_rounds=5, validate=validate, patience=5)
    assert (patient.round_number, patient.state["w"].item()) == (5, 5.0)
    last = run_rounds("s", start, train, num_rounds=3)
    assert (last.round_number, last.state["w"].item()) == (3, 3.0)


KILLED = """
import os, signal, sys
from pathlib import Path
import torch
torch.set_num_threads(1)
import core.finetuning, core.report, core.rounds
from core.finetune_command import open_job, prepared, tune

def lived(where, folder, overrides):
    if where.startswith("step"):
        left = [int(where[4:])]
        def dying(losses, optimiser, num_steps, text):
            left[0] -= 1
            if left[0] == 0:
                next(iter(losses))
                os.kill(os.getpid(), signal.SIGKILL)
            return take_steps(losses, optimiser, num_steps, text)
        take_steps, core.finetuning.take_steps = core.finetuning.take_steps, dying
    if where == "writing":
        def cut(path, data):
            path.with_name("." + path.name + ".cut").write_bytes(data[: len(data) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        core.rounds.write_atomically = cut
    config, start = prepared(Path("random"), overrides)
    tune(open_job(config, start, Path(folder), torch.device("cpu"), print))

for where in ("step2", "writing", "step4", "nowhere"):
    child = os.fork()
    if child == 0:
        lived(where, sys.argv[1], sys.argv[2:])
        os._exit(0)
    print(where, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), file=sys.stderr, flush=True)
"""


@pytest.mark.slow
def test_killed_at_any_moment_it_ends_with_the_same_weights(job: Callable[..., Job], tmp_path: Path, consortium: Path) -> None:
    more = ["finetune.stages=[linear_probe,full_finetuning]", "finetune.patience=3"]
    tune(job(*more, folder="whole"))
    arguments = [str(tmp_path / "killed"), *BASE.split(), f"data.root={quoted(str(consortium))}", *more]
    command = [sys.executable, "-W", "ignore", "-c", KILLED, *arguments]
    done = subprocess.run(command, cwd=Path(__file__).parents[1], capture_output=True, text=True)
    killed = -signal.SIGKILL
    assert done.stderr.split() == ["step2", str(killed), "writing", str(killed), "step4", str(killed), "nowhere", "0"]
    for path in sorted((tmp_path / "whole" / "checkpoints").iterdir()):
        assert (tmp_path / "killed" / "checkpoints" / path.name).read_bytes() == path.read_bytes()


def test_a_folder_of_another_fine_tuning_is_left_as_it_is(job: Callable[..., Job], tmp_path: Path) -> None:
    stage = "finetune.stages=[linear_probe]"
    tune(job(stage))
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "tuned").rglob("*")}
    with pytest.raises(FinetuneError, match="holds a fine-tuning of another config"):
        tune(job(stage, "seed=5"))
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("dear")
    with pytest.raises(FinetuneError, match="holds other files"):
        tune(job(stage, folder="other"))
    assert before == {path: path.stat().st_mtime_ns for path in (tmp_path / "tuned").rglob("*")}
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "finetune.json").write_text("{}")  # of one that had nothing to show for itself
    tune(job(stage, folder="begun"))
    tune(job(stage))  # the same again: finished rounds stay as they are
    assert json.loads((tmp_path / "tuned" / "finetune.json").read_text())["version"]


def test_local_fine_tuning_gives_each_site_a_model_and_federated_one_to_all(
    job: Callable[..., Job], consortium: Path, write_site: Callable[..., None], tmp_path: Path
) -> None:
    write_site(consortium / "d", seed=9, healthy=8, patients=8)
    own = tune(job("finetune.where=local", "finetune.stages=[linear_probe]", folder="own"))
    assert sorted(p.name for p in (tmp_path / "own" / "checkpoints").iterdir()) == [
        "linear_probe-c-0003.safetensors",
        "linear_probe-d-0003.safetensors",
    ]
    assert {e.regime for e in own.evaluations} == {"local-only"}
    alone = tune(job("data.target_sites=[c]", "finetune.stages=[linear_probe]", folder="alone"))
    [local] = [load_checkpoint(p).state for p in (tmp_path / "own" / "checkpoints").glob("*-c-*")]
    [single] = [load_checkpoint(p).state for p in (tmp_path / "alone" / "checkpoints").iterdir()]
    assert all(torch.equal(local[name], single[name]) for name in local)  # one site under FedAvg is local training
    assert {e.regime for e in alone.evaluations} == {"federated"}


def test_a_round_may_be_chosen_by_auc(job: Callable[..., Job]) -> None:
    chosen = job("finetune.stages=[full_finetuning]", "finetune.patience=3", "finetune.validate_by=figure")
    losses = [line["validation_loss"] for line in tune(chosen).lines]
    assert all(round(4 * loss, 6) == round(4 * loss) and 0 <= loss <= 1 for loss in losses)  # of 2 patients and 2 controls


def test_scores_are_means_over_views_that_are_the_same_for_every_scan(site: Callable[..., tuple[SiteData, RunConfig]]) -> None:
    data, config = site("finetune.test_time_views=3", "views.rotation_degrees=20", "views.noise_sd=0.5")
    torch.manual_seed(0)
    model = build_classifier(config.encoder, 1, 0, num_inputs=1).eval()
    found_NK = averaged_logits(model, data, config, CPU)
    about, views, image = data.scans[5], finetuning_views(config), data.inputs([5], CPU)
    assert views is not None
    with torch.no_grad():
        each = [model(image)]
        for turn in range(3):
            drawn = views.draw(image.shape, generator(config.seed, "test-time views", turn))
            each.append(model(drawn.apply(image, model.encoder.input_scale)))
    assert len({float(one) for one in each}) == 4
    torch.testing.assert_close(found_NK[5, 0], torch.stack(each).double().mean(), rtol=1e-5, atol=1e-6)
    alone_NK = averaged_logits(model, data.select(lambda scan: scan.subject == about.subject), config, CPU)
    torch.testing.assert_close(found_NK[5:6], alone_NK, rtol=1e-5, atol=1e-6)
    plain = config.model_copy(update={"finetune": config.finetune.model_copy(update={"test_time_views": 0})})
    torch.testing.assert_close(averaged_logits(model, data, plain, CPU), embed(model, data, CPU)[0].double(), rtol=0, atol=0)
    assert prediction_notes(plain) == []
    assert "3 random views" in prediction_notes(config)[0]


@pytest.mark.parametrize("overrides", ["finetune.views=none", "finetune.label_maps={suffix:_seg,codes:[[1]],names:[x]}"])
def test_test_time_views_need_views_and_no_label_maps(overrides: str) -> None:
    with pytest.raises(ConfigError, match="test_time_views must be 0"):
        load_config(["experiment=tiny", "finetune.test_time_views=2", overrides])


def test_pretraining_again_sees_every_training_scan_and_moves_the_encoder(job: Callable[..., Job], tmp_path: Path) -> None:
    again = job("num_rounds=1", "objective=ntxent", "finetune.stages=[linear_probe]", folder="again")
    encoder, begin = first_encoder(again), first_encoder(job("finetune.stages=[linear_probe]", folder="none"))
    assert encoder.keys() == begin.keys()
    assert not any(torch.equal(encoder[name], begin[name]) for name in encoder if encoder[name].ndim > 1)
    line = load_checkpoint(tmp_path / "again" / "checkpoints" / "pretrain-0001.safetensors")
    assert line.config["data"]["pretrain_on"] == "all"


def test_starts_of_others_are_renamed_and_wrong_ones_told_in_a_sentence(tmp_path: Path) -> None:
    encoder = build_classifier(load_config("encoder.width=2").encoder, 1, 0).encoder
    theirs = {f"backbone.{name}": value for name, value in encoder.state_dict().items()} | {"fc.weight": torch.ones(2, 2)}
    file = tmp_path / "theirs.safetensors"
    save_file(theirs, file)
    start = read_start(file, ["backbone.:encoder.", "fc.:"])
    other = build_classifier(load_config("encoder.width=2").encoder, 1, 1).encoder
    load_start(other, start)
    assert all(torch.equal(value, encoder.state_dict()[name]) for name, value in other.state_dict().items())
    wider = build_classifier(load_config("encoder.width=4").encoder, 1, 0).encoder
    refused = {
        r"must hold weights whose names begin with encoder\., got backbone": lambda: read_start(file),
        r"must say what becomes of every name in theirs.safetensors, got none for fc": lambda: read_start(file, ["backbone.:x"]),
        "two names must not become one": lambda: read_start(file, ["backbone.:encoder.", "fc.weight:encoder.stages.0.0.weight"]),
        "must be an encoder of the run's architecture, got one with .* of another shape": lambda: load_start(wider, start),
        "there is none": lambda: read_start(tmp_path / "nowhere"),
        "it has neither": lambda: read_start(tmp_path),
    }
    for text, call in refused.items():
        with pytest.raises(StartError, match=text):
            call()
    (tmp_path / "torn.safetensors").write_bytes(file.read_bytes()[:100])
    with pytest.raises(StartError, match=r"must be a readable \.safetensors file"):
        read_start(tmp_path / "torn.safetensors")
    save_file({"encoder.w": torch.tensor([float("nan")])}, tmp_path / "nan.safetensors")
    with pytest.raises(StartError, match=r"must be finite, encoder\.w and 0 others are not"):
        read_start(tmp_path / "nan.safetensors")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("data.root=null", "data.root must name the scans, got null"),
        ("data.target_sites=[a]", "target sites must show two classes of diagnosis in training .* a cannot"),
        ("data.target_sites=[x]", "sites must be among a, b, c, got x"),
        ("finetune.target.labels=[sex] data.target_sites=[a] data.unseen_sites=[a]", "a cannot"),
    ],
)
def test_a_job_that_cannot_be_is_told_in_a_sentence(job: Callable[..., Job], overrides: str, message: str) -> None:
    with pytest.raises(FinetuneError, match=message):
        job(*overrides.split())


def test_debiasing_and_no_stage_are_refused(consortium: Path) -> None:
    for override, message in (("debias=fairkl", "debias must be none"), ("finetune=none", "must name one stage or more")):
        with pytest.raises(ConfigError, match=message):
            prepared(RANDOM, [*BASE.split(), f"data.root={consortium}", override])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ("privacy=dp_sgd", "for fine-tuning alone, got num_rounds=20: contrastive losses couple scans"),
        ("privacy=dp_sgd start=/x num_rounds=0 debias=none", "class_weights must be none"),
        ("privacy=dp_sgd start=/x num_rounds=0 finetune.class_weights=none", "debias must be none"),
        (
            "privacy=dp_sgd start=/x num_rounds=0 finetune.class_weights=none debias=none finetune.patience=2",
            "patience must be null",
        ),
        ("privacy=dp_sgd start=/x num_rounds=0 finetune.class_weights=none debias=none finetune.label_fraction=0.5", "must be 1"),
    ],
)
def test_privacy_that_would_be_false_is_refused_with_the_reason(overrides: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(overrides)


def test_private_fine_tuning_counts_all_stages_and_tells_no_loss(job: Callable[..., Job]) -> None:
    private = "privacy=dp_sgd finetune.class_weights=none privacy.delta=0.01 privacy.target_epsilon=4"
    tuned = tune(job(*private.split(), "finetune.stages=[linear_probe,last_block]"))
    assert all(metrics == {} for line in tuned.lines for metrics in line["sites"].values())
    told = [line["privacy"]["c"] for line in tuned.lines if "privacy" in line and line["privacy"]["c"]]
    assert [about["steps"] for about in told] == [6, 12]
    assert 3.8 < told[1]["epsilon"] <= 4.0
    assert any("differentially private" in note for note in tuned.notes)
    assert any(note.startswith("Not covered") for note in tuned.notes)
    assert all(not parameter.any() for parameter in job(*private.split()).classifier({}).head.parameters())
    assert job().classifier({}).head[1].weight.all()


def test_pseudonyms_stand_for_subjects(job: Callable[..., Job], tmp_path: Path) -> None:
    from core.finetune_command import write_results

    done = job("finetune.stages=[linear_probe]")
    write_results(done, tune(done))
    text = (tmp_path / "tuned" / "predictions-linear_probe.csv").read_text()
    assert "sub-" not in text
    assert (tmp_path / "tuned" / "pseudonyms.key").stat().st_mode & 0o077 == 0
    assert (tmp_path / "tuned" / "report.html").is_file()
