"""The tasks of a site: each reads what was received, calls core and packs the answer. No arithmetic lives here.

Nothing that names a subject or a path leaves: failures are logged at the site, and the server gets a number to ask for.
"""

import logging
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import cast

import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict

from client.door import Door
from client.jobs import Job
from client.site import Site, holdings, limit_resources, this_site
from core import progress
from core.checkpoint import load_strictly
from core.config import ConfigError, RunConfig, load_config
from core.data.holdings import Holdings
from core.data.manifest import SPLITS, UnusableScansError
from core.data.site import SiteData, join_splits
from core.data.table import TableError
from core.erasure import covariates, nearest_mean_hits, scanner_sums, told_scanners
from core.evaluation.age_sums import RidgeCandidates
from core.evaluation.class_sums import SiteProbe
from core.evaluation.federated_site import (
    CLASS_PROBES,
    Subjects,
    affordable_columns,
    group_means,
    let_out,
    probe_errors,
    probe_gradient,
    probe_moments,
    told_scores,
)
from core.evaluation.sums import standardised, subject_folds
from core.exchange import (
    PRIVACY,
    ExchangeError,
    State,
    check_finite,
    check_like,
    check_names,
    check_size,
    content,
    describe_answer,
    fingerprint,
    of_message,
    pack,
    pack_embeddings,
    pack_groups,
    pack_message,
    pack_predictions,
    tensor,
    unpack,
    unpack_eraser,
    unpack_groups,
    unpack_message,
    unpack_reference,
    unpack_state,
)
from core.faults import SiteError, incident
from core.files import NO_ROOM
from core.finetuning import averaged_logits, finetune, labelled, num_classes, predict, training_scans, validation_loss
from core.log_lines import StandardStream
from core.models import (
    CONSTANTS,
    Classifier,
    Pretrainer,
    Standardise,
    build_classifier,
    build_pretrainer,
    num_erased,
    split_constants,
)
from core.moments import GroupMoments, Reference, feature_sums, groups_of, site_moments, told_subjects
from core.privacy import harden
from core.scaling import input_sums, without_rare_values
from core.stages import StageName
from core.targets import TargetError
from core.training import NotFiniteError, TrainResult, embed, pretrain, pretraining_scans

log = logging.getLogger("isocenter")

if not log.handlers:
    # The site's own log, standard error: what was found, how far a long preparation is, what is wrong with which scan.
    log.addHandler(StandardStream("stderr"))
    log.setLevel(logging.INFO)


@dataclass(frozen=True)
class Work:
    """What a task has at hand.

    Attributes:
        received: what the server sent.
        config: the run's.
        site: this one, with its policy.
        held: its scans.
        memory: what the site keeps for the run, between messages.
    """

    received: RecordDict
    config: RunConfig
    site: Site
    held: Holdings
    memory: RecordDict


KEPT = "kept-"
"""What a site was told and keeps for the run has this before its name."""
Task = Callable[[Work], RecordDict]
TASKS: dict[str, Task] = {}
"""What a site does for a message, by Flower's message type."""


def task(message_type: str) -> Callable[[Task], Task]:
    """Register a function of the work as what is done for a type of message."""

    def decorate(function: Task) -> Task:
        TASKS[message_type] = function
        return function

    return decorate


def carry_out(job: Job) -> RecordDict:
    """Do a task as this node's site and let nothing but its answer, or a sentence made to be shared, leave.

    Raises:
        SiteError: it could not be done.
    """
    about = job.received.config_records.get("config", ConfigRecord())
    door = Door.of(job.node_config, job.message_type, job.run_id, job.run_config, about.get("round"))
    try:
        return answer(job, door)
    except SiteError as error:
        door.note(error)
        raise


def answer(job: Job, door: Door) -> RecordDict:
    """What a task answers, as far as the site's policy lets it in and out.

    Raises:
        SiteError: whatever went wrong, in words that may leave the site.
    """
    try:
        config = load_config(str(job.run_config.get("overrides", "")))
        check_size(job.received, config.strategy.max_message_mb, "server")
        about = of_message(job.received.config_records, "config", "server")
        if about.get("fingerprint") != fingerprint():
            raise SiteError("code", "this site must run the server's code, got another; stop the old SuperLink.")
        site = this_site(job.node_config, config)
        door.enter(site.policy, config)
        limit_resources(site)
        limit = about.get("deadline-s")
        with progress.until(time.monotonic() + limit if isinstance(limit, float) else None):
            found = TASKS[job.message_type](Work(job.received, config, site, holdings(site, config), job.memory))
        door.leave(site.policy, config, describe_answer(found))
        return found
    except SiteError:
        raise
    except NotFiniteError as error:
        raise SiteError("not_finite", str(error)) from None
    except (UnusableScansError, TableError, TargetError) as error:
        raise SiteError("data", str(error)) from None
    except (ConfigError, ExchangeError) as error:
        raise SiteError("exchange", str(error)) from None
    except OSError as error:
        if error.errno not in NO_ROOM:
            raise incident() from None
        log.exception("the disk is full")
        raise SiteError("disk", "its disk must have room for what the site keeps, it is full; free some.") from None
    except Exception:
        raise incident() from None


def diagnosed(data: SiteData) -> SiteData:
    """The scans whose diagnosis is known."""
    return data.select(lambda scan: scan.diagnosis in ("control", "patient"))


def classes_in_train(work: Work) -> int:
    """Classes of the target among the training scans; 0, with the reason in the site's log, where its labels cannot be read."""
    target = work.config.finetune.target
    try:
        return num_classes(labelled(work.held.splits["train"], target), target)
    except TargetError as error:
        log.warning("site %s takes no part in fine-tuning: %s", work.site.name, error)
        return 0


def round_number(work: Work) -> int:
    """The round a task belongs to."""
    return cast(int, work.received.config_records["config"]["round"])


def constants(work: Work) -> State:
    """The weights that no one trains, as the server told them at the start of the run; none for volumes."""
    if work.config.encoder.kind == "images":
        return {}
    if "constants" not in work.memory.array_records:
        raise SiteError("constants", "this site must be told the run's constants, it has none: it was started anew.")
    return unpack(
        work.memory.array_records["constants"], work.memory.config_records["constants-layout"]["layout"], "server's constants"
    )


def received_model(work: Work) -> Pretrainer:
    """The run's encoder and projector with the weights received."""
    told = constants(work)
    model = build_pretrainer(
        work.config.encoder,
        work.config.embedding_size,
        work.config.seed,
        num_classes=work.config.num_classes,
        num_inputs=work.held.store.num_inputs,
        spatial_dims=work.config.data.spatial_dims,
        num_erased=num_erased(told),
    )
    load_strictly(model, received_weights(work, model) | told)
    return model.to(work.site.device)


def received_weights(work: Work, model: torch.nn.Module) -> State:
    """The weights received, which must be those that the model has, but for the constants."""
    own, _ = split_constants(model.state_dict())
    return unpack_state(work.received, where="server", expected=own)


def received_classifier(work: Work) -> Classifier:
    """The run's classifier with the weights received."""
    told = constants(work)
    model = build_classifier(
        work.config.encoder,
        work.config.finetune.target.num_outputs,
        work.config.seed,
        num_inputs=work.held.store.num_inputs,
        spatial_dims=work.config.data.spatial_dims,
        num_erased=num_erased(told),
    )
    load_strictly(model, received_weights(work, model) | told)
    return model.to(work.site.device)


def trained(result: TrainResult, work: Work) -> RecordDict:
    """The answer to a training task: the weights that it trained."""
    received = unpack_state(work.received, where="server")
    before = {name: value for name, value in received.items() if name in result.state}
    after = {name: result.state[name].detach().cpu() for name in before}
    arrays, layout = pack(harden(after, before, work.config.privacy))
    seen = {"seconds": result.seconds, "waited-seconds": result.waited_s, "steps": result.num_steps}
    metrics = MetricRecord({"num-examples": result.num_scans, **seen, **result.metrics})
    answer = content(arrays=arrays, metrics=metrics, config=ConfigRecord({"layout": layout}))
    # Flower takes one record of metrics in an answer.
    numbers = {f"{PRIVACY}{name}": value for name, value in result.privacy.items() if type(value) in (int, float)}
    answer.config_records["config"].update(numbers)
    return answer


@task("query.describe")
def describe(work: Work) -> RecordDict:
    """Who this site is and how much it holds: counts only."""
    site, held = work.site, work.held
    train = held.splits["train"]
    return content(
        config=ConfigRecord(
            {
                "site": site.name,
                "scans": held.num_scans,
                "subjects": held.num_subjects,
                "scanners": held.num_scanners,
                "pretraining-subjects": len({scan.subject for scan in pretraining_scans(train, work.config).scans}),
                "classes-in-train": classes_in_train(work),
                "num-inputs": held.store.num_inputs,
                "inputs": held.store.signature,
                "problems": [f"{kind}={count}" for kind, count in sorted(held.problem_counts.items())],
                "device": site.device.type,
                "share-per-scan": site.share_per_scan,
            }
        )
    )


@task("query.constants")
def keep_constants(work: Work) -> RecordDict:
    """Keep the weights that no one trains for the run."""
    num_inputs, told = work.held.store.num_inputs, unpack_state(work.received, "constants", where="server")
    directions = min(num_erased(told), num_inputs)
    expected = {f"{CONSTANTS}{name}": value for name, value in Standardise(num_inputs, directions).state_dict().items()}
    check_like(told, expected, "server: constants")
    work.memory.array_records["constants"] = work.received.array_records["constants"]
    work.memory.config_records["constants-layout"] = work.received.config_records["config"]
    return content()


def others_moments(work: Work) -> dict[str, ArrayRecord]:
    """Moments of the other sites' groups and references, as the server told them at the last exchange; the site keeps them."""
    exchange = cast(int, work.received.config_records["config"]["exchange"])
    kinds = ("moments", "reference")
    received = {name: record for name, record in work.received.array_records.items() if name.partition("-")[0] in kinds}
    if odd := set(received) - {f"{kind}-{space}" for kind in kinds for space in work.config.debias.spaces}:
        raise ExchangeError(f"server: moments must be of {list(work.config.debias.spaces)}, got {len(odd)} of something else.")
    kept = {name.removeprefix(KEPT): record for name, record in work.memory.array_records.items() if name.startswith(KEPT)}
    if received:
        for name in kept:
            del work.memory.array_records[f"{KEPT}{name}"]
        for name, record in received.items():
            work.memory.array_records[f"{KEPT}{name}"] = record
        work.memory.config_records["exchange"] = ConfigRecord({"round": exchange})
        return received
    if exchange == 0:
        return {}
    if "exchange" not in work.memory.config_records or work.memory.config_records["exchange"]["round"] != exchange:
        raise SiteError("moments", "this site must be told the other sites' moments, it has none: it was started anew.")
    return kept


@task("train.pretrain")
def train_pretrain(work: Work) -> RecordDict:
    """A round of contrastive pretraining on the site's healthy training scans."""
    model = received_model(work)
    widths = {"h": model.encoder.num_features, "z": work.config.embedding_size}
    told = others_moments(work)
    result = pretrain(
        model,
        pretraining_scans(work.held.splits["train"], work.config),
        work.config,
        round_number=round_number(work),
        device=work.site.device,
        remote={
            space: unpack_groups(GroupMoments, told[f"moments-{space}"], width, "server")
            for space, width in widths.items()
            if f"moments-{space}" in told
        },
        references={
            space: unpack_reference(told[f"reference-{space}"], width, "server")
            for space, width in widths.items()
            if f"reference-{space}" in told
        },
    )
    return trained(result, work)


def eligible(work: Work, data: SiteData) -> torch.Tensor:
    """Whether scanners may be compared by each subject, (N,): healthy, or a patient where the run says so."""
    diagnoses = ("control", "patient") if work.config.debias.erase_patients else ("control",)
    return torch.tensor([scan.diagnosis in diagnoses for scan in data.scans], dtype=torch.bool)


def compared(work: Work, data: SiteData) -> torch.Tensor:
    """Whether scanners are compared by each subject, (N,): eligible, of known age, on a scanner that has enough of these."""
    return told_subjects(eligible(work, data) & ~data.ages().isnan(), data.scanner_codes(), work.site.moments)


def input_rows(work: Work) -> tuple[SiteData, torch.Tensor]:
    """The training subjects and their inputs (N, I): as the table has them, or, with constants told, as the encoder sees them.

    Where sums by scanner are asked for, a feature that too few of a scanner's subjects have counts as missing for all of them.
    """
    data = work.held.splits["train"].first_scans()
    rows_NI = data.inputs(range(len(data)), torch.device("cpu"))
    if "input" in work.config.erased_spaces:
        told_N = compared(work, data)
        rows_NI[told_N] = without_rare_values(rows_NI[told_N], data.scanner_codes()[told_N], work.site.moments)
    if "constants" in work.memory.array_records:
        told = {name.removeprefix(CONSTANTS): value for name, value in constants(work).items()}
        standardise = Standardise(rows_NI.shape[1], len(told["directions"]))
        load_strictly(standardise, told)
        rows_NI = standardise(rows_NI)
    return data, rows_NI.detach()


@task("query.inputs")
def query_inputs(work: Work) -> RecordDict:
    """Sums of the site's inputs, for the standardisation, as far as the site's policy allows.

    Where sums by scanner follow, both are of the same subjects: their difference tells of no one.
    """
    data, rows_NI = input_rows(work)
    if "input" in work.config.erased_spaces:
        rows_NI = rows_NI[compared(work, data)]
    return content(sums=ArrayRecord({"sums": Array(input_sums(rows_NI, work.site.moments).numpy())}))


def features_of_subjects(work: Work, data: SiteData) -> torch.Tensor:
    """Features (N, D) of scans in the space asked for."""
    h_NF, z_ND = embed(received_model(work), data, work.site.device)
    return (h_NF if work.received.config_records["config"]["space"] == "h" else z_ND).double()


def kernel_labels(work: Work, data: SiteData) -> dict[str, torch.Tensor]:
    """The labels that groups of scans have in common, (N,) values by name, in the order of FairKL's kernel."""
    labels = {"age_years": data.ages(), "sex": data.sexes()}
    return {name: labels[name] for name in work.config.debias.kernel.labels}


@task("query.sums")
def query_sums(work: Work) -> RecordDict:
    """Sums of the site's features for the reference that all sites standardise by, as far as the site's policy allows.

    They are of the subjects that the moments or the sums by scanner, which follow, are about: their difference tells of no one.
    """
    train = work.held.splits["train"]
    if work.received.config_records["config"]["subjects"] == "scanners":
        data = train.first_scans()
        told_N = compared(work, data)
    else:
        data = pretraining_scans(train, work.config).first_scans()
        groups = groups_of(
            kernel_labels(work, data), data.scanner_codes(), bin_years=work.config.debias.bin_years, policy=work.site.moments
        )
        told_N = torch.zeros(len(data), dtype=torch.bool)
        told_N[[i for group in groups for i in group.tolist()]] = True
    features_ND = features_of_subjects(work, data)[told_N]
    return content(sums=ArrayRecord({"sums": Array(feature_sums(features_ND, work.site.moments).numpy())}))


@task("query.moments")
def query_moments(work: Work) -> RecordDict:
    """Moments of the site's standardised features by scanner and labels, as far as the site's policy allows."""
    data = pretraining_scans(work.held.splits["train"], work.config).first_scans()
    features_ND = features_of_subjects(work, data)
    moments, withheld = site_moments(
        unpack_reference(work.received.array_records["reference"], features_ND.shape[1], "server").rows(features_ND),
        kernel_labels(work, data),
        data.scanner_codes(),
        bin_years=work.config.debias.bin_years,
        policy=work.site.moments,
    )
    return content(moments=pack_groups(moments), metrics=MetricRecord({"withheld-scans": withheld}))


def scanner_features(work: Work) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Standardised features (N, F) of the subjects an eraser is fitted to, their covariates (N, P) and scanners (N,)."""
    debias = work.config.debias
    if work.received.config_records["config"]["space"] == "input":
        data, standard_NF = input_rows(work)
    else:
        data = work.held.splits["train"].first_scans()
        features_NF = features_of_subjects(work, data)
        reference = unpack_reference(work.received.array_records["reference"], features_NF.shape[1], "server")
        standard_NF = reference.standard(features_NF)
    taken_N = eligible(work, data)
    given_NP = covariates(data.ages(), data.sexes(), data.patients(), age_degree=debias.erase_age_degree)
    return standard_NF.double()[taken_N], given_NP[taken_N], data.scanner_codes()[taken_N]


@task("query.scanners")
def query_scanners(work: Work) -> RecordDict:
    """Sums of the site's standardised features by scanner, beside covariates, for the eraser, as far as the policy allows."""
    sums, withheld = scanner_sums(*scanner_features(work), policy=work.site.moments)
    return content(scanners=pack_groups(sums), metrics=MetricRecord({"withheld-subjects": withheld}))


@task("query.hits")
def query_hits(work: Work) -> RecordDict:
    """How often a subject of the site is nearest to its own scanner's mean, by how many directions are erased."""
    standard_NF, given_NP, scanner_N = scanner_features(work)
    candidates = work.received.array_records["candidates"]
    check_names(candidates, ("means", "directions"), "server: candidates")
    arrays = {name: tensor(array, f"server: the {name}", ndim=2) for name, array in candidates.items()}
    told = told_scanners(given_NP, scanner_N, work.site.moments)
    first = cast(int, work.received.config_records["config"]["first"])
    check_finite(arrays, "server: candidates")
    if any(value.shape[1] != standard_NF.shape[1] for value in arrays.values()) or not (
        0 <= first <= len(arrays["means"]) - len(told)
    ):
        raise ExchangeError(f"server: candidates must be means and directions of {standard_NF.shape[1]} features, with our rows.")
    hits_SK = nearest_mean_hits(standard_NF, told, arrays["means"], arrays["directions"], first=first, policy=work.site.moments)
    return content(hits=ArrayRecord({"hits": Array(hits_SK.numpy())}))


@task("train.finetune")
def train_finetune(work: Work) -> RecordDict:
    """A round of fine-tuning on the site's labelled training scans."""
    result = finetune(
        received_classifier(work),
        training_scans(work.held.splits["train"], work.config),
        work.config,
        stage=cast(StageName, work.received.config_records["config"]["stage"]),
        round_number=round_number(work),
        device=work.site.device,
    )
    return trained(result, work)


def refuse_unless_shared(site: Site) -> None:
    """Single scans' results leave only a site that says so."""
    if not site.share_per_scan:
        raise SiteError("policy", "this site keeps the results of single scans at home (share-per-scan is not true).")


@task("query.embed")
def query_embed(work: Work) -> RecordDict:
    """Representations of the site's scans with the labels the probes need, without ids; only where the site shares them."""
    refuse_unless_shared(work.site)
    model = received_model(work)
    h = {split: embed(model, work.held.splits[split], work.site.device)[0].numpy() for split in ("train", "test")}
    return content(embeddings=pack_embeddings(work.held.embeddings(h)))


@task("query.validation")
def query_validation(work: Work) -> RecordDict:
    """The loss of a classifier on the site's labelled validation scans, where these are of as many subjects as a group needs."""
    data = labelled(work.held.splits["val"], work.config.finetune.target)
    subjects = len({scan.subject for scan in data.scans})
    if subjects < work.site.moments.min_group:
        return content(metrics=MetricRecord({"subjects": 0, "loss": 0.0}))
    loss = validation_loss(received_classifier(work), data, work.config, work.site.device)
    if math.isnan(loss):
        return content(metrics=MetricRecord({"subjects": 0, "loss": 0.0}))
    return content(metrics=MetricRecord({"subjects": work.site.moments.rounded(subjects), "loss": loss}))


@task("query.predict")
def query_predict(work: Work) -> RecordDict:
    """Scores of a classifier on the site's held-out scans with their labels, without ids; only where the site shares them."""
    refuse_unless_shared(work.site)
    splits = work.held.splits
    held_out = {split: splits[split] for split in ("val", "test")}
    if work.received.config_records["config"]["unseen"] is True:
        held_out = {"test": join_splits([splits[split] for split in SPLITS])}
    found = predict(received_classifier(work), held_out, work.config, work.site.device)
    return content(predictions=pack_predictions(found))


def probed(work: Work, split: str) -> SiteData:
    """The first scan of each subject whose diagnosis is known: who takes part in the evaluation from sums."""
    return diagnosed(work.held.splits[split]).first_scans()


def keep_for_probes(work: Work, train_NF: torch.Tensor, test_NF: torch.Tensor) -> None:
    """Keep what the probes see of the site's subjects, at the site, for the next questions."""
    rows = {"train": Array(train_NF.double().numpy()), "test": Array(test_NF.double().numpy())}
    work.memory.array_records["probed"] = ArrayRecord(rows)


def kept_for_probes(work: Work, split: str) -> Subjects:
    """What was kept of a split, beside the labels."""
    if "probed" not in work.memory.array_records:
        raise SiteError("probes", "this site must embed its scans before it evaluates, it was started anew; run it again.")
    data = probed(work, split)
    scanners = sorted({scan.scanner for part in work.held.splits.values() for scan in part.scans})
    return Subjects(
        x_NF=tensor(work.memory.array_records["probed"][split], f"kept {split}", dtypes=("<f8",), ndim=2),
        age_N=data.ages(),
        male_N=data.sexes(),
        patient_N=data.patients(),
        scanner_N=torch.tensor([scanners.index(scan.scanner) for scan in data.scans], dtype=torch.long),
        fold_N=subject_folds([scan.subject for scan in data.scans], data.site),
    )


def received_probes(work: Work) -> dict[str, SiteProbe]:
    """The probes of classes in a message, by name."""
    told = {name.partition("-")[2]: record for name, record in work.received.array_records.items()}
    return {name: unpack_message(SiteProbe, told[name], "server") for name in CLASS_PROBES if name in told}


@task("query.features")
def query_features(work: Work) -> RecordDict:
    """Sums of the site's representations for the probes' reference; the representations stay here for the next questions."""
    model = received_model(work)
    records = work.received.array_records
    rows = []
    for split in ("train", "test"):
        data = probed(work, split)
        h_NF = embed(model, data, work.site.device)[0].double() if len(data) else torch.zeros(0, model.encoder.num_features)
        rows.append(unpack_eraser(records["eraser"], h_NF.shape[1], "server")(h_NF) if "eraser" in records else h_NF)
    keep_for_probes(work, *rows)
    train = let_out(kept_for_probes(work, "train"), work.site.moments)
    fitted_NF = train.healthy().x_NF if work.received.config_records["config"]["known"] is True else rows[0][:0]
    sums_3F = feature_sums(fitted_NF, work.site.moments)
    columns = affordable_columns(train, sums_3F.shape[1] + 1, work.site.moments)
    return content(sums=ArrayRecord({"sums": Array(sums_3F.numpy())}), metrics=MetricRecord({"columns": columns}))


def received_reference(work: Work, features: int) -> Reference:
    """What the probes' features are standardised by."""
    record = of_message(work.received.array_records, "probes-reference", "server")
    return unpack_message(Reference, record, "server", mean_D=(features,), scale_D=(features,))


@task("query.groups")
def query_groups(work: Work) -> RecordDict:
    """Means of groups of the site's standardised representations, from which the directions that probes see are chosen."""
    train = let_out(kept_for_probes(work, "train"), work.site.moments)
    reference = received_reference(work, train.x_NF.shape[1])
    means = group_means(replace(train, x_NF=standardised(train.x_NF, reference)), work.site.moments)
    return content(**{"probes-groups": pack_message(means)})


@task("query.probes")
def query_probes(work: Work) -> RecordDict:
    """Project the representations that were kept, and tell the moments that the probes asked for are fitted from."""
    records = work.received.array_records
    kept = [kept_for_probes(work, split).x_NF for split in ("train", "test")]
    features = kept[0].shape[1]
    directions_KF = tensor(records["probes-directions"]["directions"], "server: directions", ndim=2)
    if directions_KF.shape[1] != features:
        raise ExchangeError(f"server: directions must be of {features} features, got {directions_KF.shape[1]}.")
    check_finite({"directions": directions_KF}, "server")
    train, test = (standardised(x_NF, received_reference(work, features), directions_KF) for x_NF in kept)
    keep_for_probes(work, train, test)
    about = work.received.config_records["config"]
    wanted, seen = cast(list[str], about["probes"]), cast(int, about["seen"])
    told = probe_moments(let_out(kept_for_probes(work, "train"), work.site.moments), wanted, seen, work.site.moments)
    return content(**{f"probes-{name}": pack_message(moments) for name, moments in told.items()})


@task("query.gradient")
def query_gradient(work: Work) -> RecordDict:
    """The site's part of a step of a logistic probe."""
    train = let_out(kept_for_probes(work, "train"), work.site.moments)
    class_weight_K = tensor(work.received.array_records["probes-weights"]["weights"], "server: weights of classes", ndim=1)
    check_finite({"weights of classes": class_weight_K}, "server")
    [(name, probe)] = received_probes(work).items()
    part = probe_gradient(name, probe, class_weight_K, train, site=work.site.name, policy=work.site.moments)
    return content(**{"probes-gradient": pack_message(part)})


@task("query.errors")
def query_errors(work: Work) -> RecordDict:
    """How the probes do on the site's held-out subjects."""
    known = work.received.config_records["config"]["known"] is True
    train = kept_for_probes(work, "train")
    age = work.received.array_records.get("probes-age")
    found = probe_errors(
        None if age is None else unpack_message(RidgeCandidates, age, "server"),
        received_probes(work),
        let_out(train, work.site.moments) if known else train,
        kept_for_probes(work, "test"),
        site=work.site.name,
        known=known,
        policy=work.site.moments,
    )
    return content(**{f"probes-{name}": pack_message(errors) for name, errors in found.items()})


@task("query.scores")
def query_scores(work: Work) -> RecordDict:
    """Histograms of a classifier's scores of the site's test subjects, as far as the site's policy allows."""
    target = work.config.finetune.target
    data = labelled(work.held.splits["test"], target).first_scans()
    logits_NK = averaged_logits(received_classifier(work), data, work.config, work.site.device)
    class_N = target.values(data.scans)[:, 0].long()
    counts = told_scores(target.scores(logits_NK)[:, 0], class_N, work.site.moments)
    return content(**{"probes-diagnosis": pack_message(counts)})
