"""The real server and client apps over tiny hospitals, in one process: identities, bad sites, bad input."""

import json
import re
import shutil
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy.strategy_utils import aggregate_arrayrecords
from safetensors.torch import load_file

from core.checkpoint import load_checkpoint, load_strictly
from core.config import load_config
from core.exchange import pack
from core.models import build_classifier, build_pretrainer
from core.training import pretrain, take_steps
from server.strategy import RunError
from simulations.in_process import InProcessGrid

Federate = Callable[..., Path]


def last(folder: Path) -> Path:
    return max((folder / "checkpoints").glob("pretrain-*.safetensors"))


def test_a_run_goes_from_scans_to_a_report(consortium: Path, federate: Federate) -> None:
    folder = federate(
        consortium,
        "policy.share_per_scan=true finetune=both finetune.num_rounds=1 data.pretrain_sites=[a,b] data.target_sites=[c]",
        name="whole",
        painted=True,
    )
    metrics = json.loads((folder / "metrics.json").read_text())
    assert {tuple(sorted(row)) for row in metrics} == {
        ("high", "low", "metric", "num_subjects", "regime", "seed", "site", "stage", "task", "value")
    }
    assert {(row["stage"], row["task"]) for row in metrics} >= {
        ("untrained", "site"),
        ("pretrained", "site"),
        ("erased", "site"),
        ("pretrained", "age"),
        ("untrained", "age"),
        ("chance", "site"),
        ("linear_probe", "diagnosis"),
        ("full_finetuning", "diagnosis"),
        ("from_scratch", "diagnosis"),
    }
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [(r["stage"], r["round"]) for r in rounds] == [
        ("pretrain", 1),
        ("pretrain", 2),
        ("linear_probe", 1),
        ("full_finetuning", 1),
        ("from_scratch", 1),
    ]
    assert set(rounds[0]["sites"]) == {"a", "b"}
    assert set(rounds[0]["sites"]["a"]) == {"loss", "objective", "fairkl"}
    assert set(rounds[2]["sites"]) == {"c"}
    assert rounds[0]["exchange"]["h"]["a"]["groups"] >= 1
    assert "<html" in (folder / "report.html").read_text()
    # The linear probe leaves the encoder alone; full fine-tuning does not.
    pretrained = load_checkpoint(last(folder)).state
    for stage, same in (("linear_probe", True), ("full_finetuning", False), ("from_scratch", False)):
        state = load_checkpoint(folder / "checkpoints" / f"{stage}-0001.safetensors").state
        encoder = {name: value for name, value in state.items() if name.startswith("encoder.")}
        assert all(torch.equal(value, pretrained[name]) for name, value in encoder.items()) == same


def test_same_run_twice_gives_the_same_checkpoint_bytes(consortium: Path, federate: Federate) -> None:
    """Identity 1; the name of the run is part of its configuration, so both have the same in different folders."""
    first = federate(consortium, name="twice")
    bytes_first = last(first).read_bytes()
    first.rename(first.with_name("before"))
    assert last(federate(consortium, name="twice")).read_bytes() == bytes_first


def test_order_of_sites_does_not_matter(consortium: Path, federate: Federate) -> None:
    """Identity 2: nodes listed and answering in another order, with other node numbers, give the same bytes."""
    first = federate(consortium, name="order")
    bytes_first = last(first).read_bytes()
    first.rename(first.with_name("before"))
    shuffled = {
        7: {"partition-id": 2, "num-partitions": 3},
        3: {"partition-id": 0, "num-partitions": 3},
        9: {"partition-id": 1, "num-partitions": 3},
    }
    assert last(federate(consortium, name="order", node_configs=shuffled, order=[9, 7, 3])).read_bytes() == bytes_first


def test_one_site_equals_local_training(consortium: Path, federate: Federate) -> None:
    """Identity 3, bit for bit."""
    from client.site import holdings, this_site

    own = "data.pretrain_sites=[b] debias.exchange_every=0"
    folder = federate(consortium, own, name="alone")
    config = load_config(f"experiment=tiny finetune=none data=folder data.root={consortium} {own}")
    site = this_site({"partition-id": 1, "num-partitions": 3}, config)
    data = holdings(site, config).splits["train"].select(lambda scan: scan.diagnosis == "control")
    model = build_pretrainer(config.encoder, config.embedding_size, config.seed)
    for round_number in range(1, config.num_rounds + 1):
        pretrain(model, data, config, round_number=round_number, device=torch.device("cpu"))
    federated = load_checkpoint(last(folder)).state
    assert all(torch.equal(value, federated[name]) for name, value in model.state_dict().items())


def test_sites_with_identical_data_equal_one(consortium: Path, federate: Federate) -> None:
    """Identity 4: sites that answer alike average to that answer, to the last place of float32."""

    def answer_as_the_first(reply: Message, message_type: str) -> Message:
        if message_type == "train.pretrain":
            arrays = reply.content.array_records["arrays"]
            first.setdefault(len(seen) // 4, {name: array.numpy().copy() for name, array in arrays.items()})
            for name, values in first[len(seen) // 4].items():
                arrays[name] = Array(values)
            reply.content.metric_records["metrics"]["num-examples"] = 8
            seen.append(1)
        return reply

    seen: list[int] = []
    first: dict[int, dict[str, np.ndarray]] = {}
    shutil.copytree(consortium / "a", consortium / "d")
    folder = federate(consortium, name="alike", tamper=answer_as_the_first)
    averaged = load_checkpoint(last(folder)).state
    assert len(seen) == 8
    config = load_config("experiment=tiny")
    in_order = {name: averaged[name] for name in build_pretrainer(config.encoder, config.embedding_size, 0).state_dict()}
    np.testing.assert_allclose(pack(in_order)[0]["float32"].numpy(), first[1]["float32"], rtol=2e-7, atol=0)


def test_one_full_batch_step_of_a_per_scan_loss_equals_the_pooled_step() -> None:
    """Identity 5: sites of different sizes, plain SGD, cross-entropy; the weighted average is the pooled step."""
    config = load_config("experiment=tiny")
    initial = build_classifier(config.encoder, 2, 0).double().state_dict()
    g = torch.Generator().manual_seed(0)
    sites = [(torch.rand(n, 1, 12, 12, 12, generator=g).double(), torch.arange(n) % 2) for n in (3, 5, 4)]

    def step(volumes: torch.Tensor, labels: torch.Tensor) -> dict[str, torch.Tensor]:
        model = build_classifier(config.encoder, 2, 0).double()
        model.load_state_dict(initial)
        take_steps(
            ({"cross_entropy": torch.nn.functional.cross_entropy(model(volumes), labels)} for _ in range(1)),
            torch.optim.SGD(model.parameters(), lr=0.5),
            1,
            "here",
        )
        return dict(model.state_dict())

    replies = [
        RecordDict({"arrays": pack(step(*site))[0], "metrics": MetricRecord({"num-examples": len(site[1])})}) for site in sites
    ]
    averaged = aggregate_arrayrecords(replies, "num-examples")["float64"].numpy()
    pooled = pack(step(torch.cat([v for v, _ in sites]), torch.cat([y for _, y in sites])))[0]["float64"].numpy()
    assert abs(pooled - pack(initial)[0]["float64"].numpy()).max() > 1e-3
    np.testing.assert_allclose(averaged, pooled, rtol=0, atol=1e-12)


def moments_told(folder: Path) -> int:
    """Bytes of the moments that went to sites."""
    told: int = json.loads((folder / "traffic.json").read_text())["moments"]["to sites"]
    return told


def test_moments_travel_once_an_exchange_and_a_site_that_lost_them_is_told_again(
    consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The site that was started anew takes part in the round all the same, and the weights are those of a run without a fault."""
    options = "num_rounds=3 warmup_rounds=0 debias.warmup_rounds=0 debias.exchange_every=5 debias=fairkl_only finetune=none"
    one = federate(consortium, *options.split(), "num_rounds=1", name="one")
    three = federate(consortium, *options.split(), name="three")
    assert moments_told(three) == moments_told(one) > 0
    original, rounds = InProcessGrid.push_messages, []

    def with_a_restart(self: InProcessGrid, messages: Iterable[Message]) -> Iterable[str]:
        messages = list(messages)
        if len(messages) > 1 and messages[0].metadata.message_type == "train.pretrain":
            rounds.append(len(messages))
            if len(rounds) == 2:
                self.contexts[1].state = RecordDict()
        return original(self, messages)

    monkeypatch.setattr(InProcessGrid, "push_messages", with_a_restart)
    restarted = federate(consortium, *options.split(), name="restarted")
    assert "failed and is asked again: this site must be told the other sites' moments" in capsys.readouterr().out
    assert moments_told(one) < moments_told(restarted) < 2 * moments_told(one)
    expected = load_file(last(three))
    assert all(torch.equal(value, expected[name]) for name, value in load_file(last(restarted)).items())


def test_a_linear_probe_leaves_the_encoder_without_noise(federate: Federate, consortium: Path) -> None:
    noise = "privacy=clip_and_noise privacy.clip_norm=1 privacy.noise_multiplier=1 num_rounds=1"
    checkpoints = federate(consortium, noise, "finetune.stages=[linear_probe]", "debias.erase=none") / "checkpoints"
    before = load_file(checkpoints / "pretrain-0001.safetensors")
    after = load_file(next(checkpoints.glob("linear_probe-*.safetensors")))
    encoder = [name for name in after if name.startswith("encoder.")]
    assert encoder
    assert all(torch.equal(after[name], before[name]) for name in encoder)


def test_no_privacy_equals_zero_noise_with_infinite_clip(consortium: Path, federate: Federate) -> None:
    """Identity 7, bit for bit; and a real clip changes the result."""
    plain = load_file(last(federate(consortium, name="plain")))
    loose = load_file(last(federate(consortium, "privacy=clip_and_noise privacy.clip_norm=inf", name="loose")))
    tight = load_file(last(federate(consortium, "privacy=clip_and_noise privacy.clip_norm=0.01", name="tight")))
    assert all(torch.equal(value, loose[name]) for name, value in plain.items())
    assert not all(torch.equal(value, tight[name]) for name, value in plain.items())


def test_debiasing_changes_the_weights_and_none_needs_no_exchange(consortium: Path, federate: Federate) -> None:
    on = load_file(last(federate(consortium, name="on")))
    folder = federate(consortium, "debias=none", name="off")
    assert not all(torch.equal(value, on[name]) for name, value in load_file(last(folder)).items())
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert all("exchange" not in r and set(r["sites"]["a"]) == {"loss", "objective"} for r in rounds)


def test_one_scanner_sites_without_exchange_have_fairkl_exactly_zero(
    consortium: Path, federate: Federate, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = federate(consortium, "debias.exchange_every=0 debias.kernel.bandwidths.age_years=40", name="alone")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert [r["sites"]["a"]["fairkl"] for r in rounds] == [0.0, 0.0]
    assert rounds[0]["sites"]["b"]["fairkl"] > 0  # two scanners: its own conflicting pairs
    assert "FairKL is exactly zero at one-scanner sites without exchange: a, c" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options",
    [
        "objective=ntxent",
        "objective=joint",
        "debias.space=z",
        "debias.space=both",
        "views=brain_affine",
        "encoder.width=2 embedding_size=4",
    ],
)
def test_options_of_pretraining_run(consortium: Path, federate: Federate, options: str) -> None:
    default = load_file(last(federate(consortium, name="default")))
    other = load_file(last(federate(consortium, options, name="other")))
    assert all(value.isfinite().all() for value in other.values())
    assert not all(torch.equal(value, default.get(name, torch.zeros(0))) for name, value in other.items())


def spoil(site_type: str, how: Callable[[Message], Message | None], node: int = 2) -> Callable[[Message, str], Message | None]:
    def tamper(reply: Message, message_type: str) -> Message | None:
        return how(reply) if (message_type, reply.metadata.src_node_id) == (site_type, node) else reply

    return tamper


def with_arrays(change: Callable[[ArrayRecord], None]) -> Callable[[Message], Message]:
    def apply(reply: Message) -> Message:
        change(reply.content.array_records["arrays"])
        return reply

    return apply


def poison(arrays: ArrayRecord) -> None:
    values = arrays["float32"].numpy().copy()
    values[5] = float("nan")
    arrays["float32"] = Array(values)


def shorten(arrays: ArrayRecord) -> None:
    arrays["float32"] = Array(arrays["float32"].numpy()[:-1].copy())


def retype(arrays: ArrayRecord) -> None:
    arrays["float32"] = Array(arrays["float32"].numpy().astype("float64"))


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        (with_arrays(poison), "finite"),
        (with_arrays(shorten), "too short"),
        (with_arrays(retype), "must be float32"),
        (lambda _: None, "no answer"),
    ],
    ids=["nan", "short", "dtype", "silent"],
)
def test_a_bad_answer_stops_the_run_without_quorum_and_not_with_one(
    consortium: Path, federate: Federate, how: Callable[[Message], Message | None], reason: str
) -> None:
    with pytest.raises(RunError, match=rf"(?s)round 1: at least 3 of 3 sites must answer.*b: .*{reason}"):
        federate(consortium, "strategy.round_timeout_s=1", name="strict", tamper=spoil("train.pretrain", how))
    options = "strategy.min_sites=2 strategy.round_timeout_s=1 num_rounds=1 evaluation=none finetune=none debias=none"
    folder = federate(consortium, *options.split(), name="quorum", tamper=spoil("train.pretrain", how))
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert reason in rounds[0]["failures"]["b"]
    assert set(rounds[0]["sites"]) == {"a", "c"}
    assert all(value.isfinite().all() for value in load_file(last(folder)).values())


def test_every_site_failing_is_no_finished_run(consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    def explode(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("client.tasks.pretrain", explode)
    with pytest.raises(RunError, match=r"(?s)0 did.*a: incident .*b: incident .*c: incident "):
        federate(consortium, "strategy.min_sites=1", name="failing")


def test_nan_loss_stops_with_round_and_site_and_keeps_the_checkpoint(
    consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    from core.losses import EmbeddedViews, YAware

    calls = []
    original = YAware.loss

    def sometimes_nan(self: YAware, views: EmbeddedViews) -> torch.Tensor:
        calls.append(1)
        return original(self, views) * (float("nan") if len(calls) == 9 else 1.0)

    monkeypatch.setattr(YAware, "loss", sometimes_nan)
    # Two local steps at three sites a round: the ninth loss is the first step of round 2 at the second site.
    with pytest.raises(RunError, match=r"(?s)pretrain, round 2: .*b: site b, round 2, local step 1: the loss must be finite"):
        federate(consortium, "strategy.min_sites=1", name="notfinite")
    assert load_checkpoint(last(consortium.parent / "runs" / "notfinite")).round_number == 1


def test_nothing_a_site_says_names_a_subject_or_a_path(consortium: Path, federate: Federate) -> None:
    """An unreadable scan is counted in the report; too many stop the run; neither tells which."""
    broken = consortium / "a" / "sub-003" / "ses-01" / "anat" / "sub-003_ses-01_T1w.nii.gz"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(RunError) as error:
        federate(consortium, name="broken")
    assert "unreadable 1" in str(error.value)
    assert not re.search(r"sub-003|nii|/", str(error.value).replace("1 of 12", ""))


def test_unreadable_scans_below_the_limit_are_counted(
    consortium: Path, federate: Federate, write_site: Callable[..., None]
) -> None:
    write_site(consortium / "d", seed=4, healthy=24)
    broken = consortium / "d" / "sub-003" / "ses-01" / "anat" / "sub-003_ses-01_T1w.nii.gz"
    broken.write_bytes(broken.read_bytes()[:60])
    report = (federate(consortium, name="counted") / "report.html").read_text()
    assert "unreadable" in report
    assert "sub-003" not in report


def test_scans_without_an_age_are_counted_and_take_part_without_it(consortium: Path, federate: Federate) -> None:
    table = consortium / "a" / "participants.tsv"
    lines = table.read_text().splitlines()
    lines[1:4] = ["\t".join([*line.split("\t")[:1], "n/a", *line.split("\t")[2:]]) for line in lines[1:4]]
    table.write_text("\n".join(lines) + "\n")
    folder = federate(consortium, name="ageless")
    assert all(value.isfinite().all() for value in load_file(last(folder)).values())
    assert "no age" in (folder / "report.html").read_text()


def test_an_unexpected_failure_leaves_an_incident_number_only(
    consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def explode(*_: object, **__: object) -> None:
        raise OSError("cannot open DOE^JOHN.nii.gz")

    monkeypatch.setattr("client.tasks.pretrain", explode)
    with pytest.raises(RunError) as error:
        federate(consortium, name="incident")
    assert "DOE" not in str(error.value)
    assert re.search(r"a: incident [0-9a-f]{8}: see the site's local log", str(error.value))


def test_a_site_with_other_code_is_refused(consortium: Path, federate: Federate, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("client.tasks.fingerprint", lambda: "0" * 64)
    with pytest.raises(RunError, match="must run the server's code"):
        federate(consortium, name="other")


def test_a_site_too_small_to_contrast_is_refused(consortium: Path, federate: Federate) -> None:
    table = consortium / "a" / "participants.tsv"
    table.write_text("\n".join(table.read_text().splitlines()[:2]) + "\n")
    for folder in sorted((consortium / "a").glob("sub-*"))[1:]:
        for file in folder.rglob("*.nii.gz"):
            file.unlink()
    with pytest.raises(RunError, match="site a: healthy training subjects must be at least 4 to contrast, got 1"):
        federate(consortium, "data.pretrain_sites=[a,b]", name="one")
    notes = (federate(consortium, name="rest") / "report.html").read_text()
    assert "4 healthy training subjects to contrast: a (1). They count as unseen." in notes


def test_unseen_sites_are_kept_out_of_pretraining(consortium: Path, federate: Federate) -> None:
    folder = federate(consortium, "data.unseen_sites=[b]", name="unseen")
    rounds = [json.loads(line) for line in (folder / "rounds.jsonl").read_text().splitlines()]
    assert set(rounds[0]["sites"]) == {"a", "c"}
    with pytest.raises(RunError, match=r"\['d'\] must be connected"):
        federate(consortium, "data.unseen_sites=[d]", name="misnamed")
    with pytest.raises(RunError, match=r"not be in data\.unseen_sites, got none of 3"):
        federate(consortium, "data.unseen_sites=[a,b,c]", name="nobody")


def test_sites_that_keep_their_scans_at_home_are_noted(consortium: Path, federate: Federate) -> None:
    folder = federate(consortium, name="home")
    assert json.loads((folder / "metrics.json").read_text()) == []
    assert "keeps the results of single scans at home" in (folder / "report.html").read_text()


def test_a_run_does_not_overwrite_another(consortium: Path, federate: Federate) -> None:
    federate(consortium, name="once")
    with pytest.raises(RunError, match="must not hold an earlier run"):
        federate(consortium, name="once")


def test_a_missing_site_is_named(consortium: Path, federate: Federate) -> None:
    with pytest.raises(RunError, match=r"\['d'\] must be connected, got \['a', 'b', 'c'\]"):
        federate(consortium, "data.pretrain_sites=[a,d]", name="missing")
    with pytest.raises(RunError, match=r"4 must connect within 1 s, 3 did"):
        federate(consortium, "data.pretrain_sites=[a,b,c,d] strategy.wait_for_sites_s=1", name="waiting")


def test_trained_weights_load_back(consortium: Path, federate: Federate) -> None:
    checkpoint = load_checkpoint(last(federate(consortium, name="back")))
    config = load_config("experiment=tiny data=folder data.root=/")
    model = build_pretrainer(config.encoder, config.embedding_size, 99)
    load_strictly(model, checkpoint.state)
    assert checkpoint.round_number == 2
    assert checkpoint.config["encoder"] == {"name": "small", "width": 4}
    with pytest.raises(RuntimeError, match="Missing key"):
        load_strictly(model, dict(list(checkpoint.state.items())[1:]))
