"""Flower's ClientApp of a site: reads a task, calls core, packs the answer. No arithmetic lives here.

Nothing that names a subject or a path leaves: failures are logged at the site, and the server gets a number to ask for.
"""

import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

from client.site import Holdings, Site, holdings, this_site
from core.checkpoint import load_strictly
from core.config import ConfigError, RunConfig, load_config
from core.data.manifest import UnusableScansError
from core.data.site import SiteData
from core.data.table import TableError
from core.erasure import covariates, scanner_sums
from core.exchange import (
    ExchangeError,
    SiteError,
    State,
    content,
    fingerprint,
    pack,
    pack_embeddings,
    pack_groups,
    unpack,
    unpack_groups,
    unpack_reference,
    unpack_state,
)
from core.finetuning import Stage, diagnosis_codes, finetune
from core.models import CONSTANTS, Classifier, Pretrainer, Standardise, build_classifier, build_pretrainer, num_erased
from core.moments import GroupMoments, feature_sums, site_moments
from core.privacy import harden
from core.scaling import input_sums
from core.training import NotFiniteError, TrainResult, embed, pretrain

log = logging.getLogger("isocenter")
app = ClientApp()


@dataclass(frozen=True)
class Work:
    """What a task has at hand.

    Attributes:
        received: what the server sent.
        config: the run's.
        site: this one, with its policy.
        held: its scans.
        memory: what the site keeps for the run; Flower keeps it between messages.
    """

    received: RecordDict
    config: RunConfig
    site: Site
    held: Holdings
    memory: RecordDict


Task = Callable[[Work], RecordDict]
Handler = Callable[[Message, Context], Message]


def task(register: Callable[[Handler], Handler]) -> Callable[[Task], Task]:
    """Register a function of the work as the handler of a kind of message."""

    def decorate(function: Task) -> Task:
        register(at_site(function))
        return function

    return decorate


def at_site(function: Task) -> Handler:
    """Run a task as this node's site and let nothing but its answer, or a sentence made to be shared, leave."""

    def run(message: Message, context: Context) -> Message:
        try:
            config = load_config(str(context.run_config.get("overrides", "")))
            received = message.content
            if received.config_records["config"]["fingerprint"] != fingerprint():
                raise SiteError("code", "this site must run the server's code, got another; stop the old SuperLink.")
            site = this_site(context.node_config, config)
            if site.threads is not None:
                torch.set_num_threads(site.threads)
            work = Work(received, config, site, holdings(site, config), context.state)
            return Message(content=function(work), reply_to=message)
        except SiteError:
            raise
        except NotFiniteError as error:
            raise SiteError("not_finite", str(error)) from None
        except (UnusableScansError, TableError) as error:
            raise SiteError("data", str(error)) from None
        except (ConfigError, ExchangeError) as error:
            raise SiteError("exchange", str(error)) from None
        except Exception:
            incident = secrets.token_hex(4)
            log.exception("incident %s", incident)
            raise SiteError("incident", f"incident {incident}: see the site's local log.") from None

    return run


def healthy(data: SiteData) -> SiteData:
    """The controls among the scans."""
    return data.select(lambda scan: scan.diagnosis == "control")


def labelled(data: SiteData) -> SiteData:
    """The scans with a diagnosis to learn."""
    return data.select(lambda scan: scan.diagnosis in ("control", "patient"))


def round_number(work: Work) -> int:
    """The round a task belongs to."""
    return cast(int, work.received.config_records["config"]["round"])


def constants(work: Work) -> State:
    """The weights that no one trains, as the server told them at the start of the run; none for volumes."""
    if work.config.encoder.kind == "images":
        return {}
    if "constants" not in work.memory.array_records:
        raise SiteError("constants", "this site must be told the run's constants, it has none: it was started anew.")
    return unpack(work.memory.array_records["constants"], str(work.memory.config_records["constants-layout"]["layout"]))


def received_model(work: Work) -> Pretrainer:
    """The run's encoder and projector with the weights received."""
    told = constants(work)
    model = build_pretrainer(
        work.config.encoder,
        work.config.embedding_size,
        work.config.seed,
        num_classes=work.config.num_classes,
        num_inputs=work.held.store.num_inputs,
        num_erased=num_erased(told),
    )
    load_strictly(model, unpack_state(work.received) | told)
    return model.to(work.site.device)


def received_classifier(work: Work) -> Classifier:
    """The run's classifier with the weights received."""
    told = constants(work)
    model = build_classifier(
        work.config.encoder, 2, work.config.seed, num_inputs=work.held.store.num_inputs, num_erased=num_erased(told)
    )
    load_strictly(model, unpack_state(work.received) | told)
    return model.to(work.site.device)


def trained(result: TrainResult, work: Work) -> RecordDict:
    """The answer to a training task: every weight but the constants."""
    before = unpack_state(work.received)
    after = {name: result.state[name].detach().cpu() for name in before}
    arrays, layout = pack(harden(after, before, work.config.privacy))
    metrics = MetricRecord({"num-examples": result.num_scans, **result.metrics})
    return content(arrays=arrays, metrics=metrics, config=ConfigRecord({"layout": layout}))


@task(app.query("describe"))
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
                "healthy-train-subjects": len({scan.subject for scan in healthy(train).scans}),
                "classes-in-train": len({scan.diagnosis for scan in labelled(train).scans}),
                "num-inputs": held.store.num_inputs,
                "inputs": held.store.signature,
                "problems": [f"{kind}={count}" for kind, count in sorted(held.problem_counts.items())],
                "device": site.device.type,
                "share-per-scan": site.share_per_scan,
            }
        )
    )


@task(app.query("constants"))
def keep_constants(work: Work) -> RecordDict:
    """Keep the weights that no one trains for the run."""
    unpack_state(work.received, "constants")
    work.memory.array_records["constants"] = work.received.array_records["constants"]
    work.memory.config_records["constants-layout"] = work.received.config_records["config"]
    return content()


@task(app.train("pretrain"))
def train_pretrain(work: Work) -> RecordDict:
    """A round of contrastive pretraining on the site's healthy training scans."""
    model = received_model(work)
    widths = {"h": model.encoder.num_features, "z": work.config.embedding_size}
    told = work.received.array_records
    result = pretrain(
        model,
        healthy(work.held.splits["train"]),
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


def input_rows(work: Work) -> tuple[SiteData, torch.Tensor]:
    """The training subjects and their inputs (N, I): as the table has them, or, with constants told, as the encoder sees them."""
    data = work.held.splits["train"].first_scans()
    rows_NI = data.inputs(range(len(data)), torch.device("cpu"))
    if "constants" in work.memory.array_records:
        told = {name.removeprefix(CONSTANTS): value for name, value in constants(work).items()}
        standardise = Standardise(rows_NI.shape[1], len(told["directions"]))
        load_strictly(standardise, told)
        rows_NI = standardise(rows_NI)
    return data, rows_NI.detach()


@task(app.query("inputs"))
def query_inputs(work: Work) -> RecordDict:
    """Sums of the site's inputs, for the standardisation, as far as the site's policy allows."""
    _, rows_NI = input_rows(work)
    return content(sums=ArrayRecord({"sums": Array(input_sums(rows_NI, work.site.moments).numpy())}))


def features_of_subjects(work: Work, data: SiteData) -> torch.Tensor:
    """Features (N, D) of scans in the space asked for."""
    h_NF, z_ND = embed(received_model(work), data, work.site.device)
    return (h_NF if work.received.config_records["config"]["space"] == "h" else z_ND).double()


@task(app.query("sums"))
def query_sums(work: Work) -> RecordDict:
    """Sums of the site's features for the reference that all sites standardise by, as far as the site's policy allows."""
    features_ND = features_of_subjects(work, healthy(work.held.splits["train"]).first_scans())
    return content(sums=ArrayRecord({"sums": Array(feature_sums(features_ND, work.site.moments).numpy())}))


@task(app.query("moments"))
def query_moments(work: Work) -> RecordDict:
    """Moments of the site's standardised features by scanner and age, as far as the site's policy allows."""
    data = healthy(work.held.splits["train"]).first_scans()
    features_ND = features_of_subjects(work, data)
    moments, withheld = site_moments(
        unpack_reference(work.received.array_records["reference"], features_ND.shape[1], "server").rows(features_ND),
        data.ages(),
        data.scanner_codes(),
        bin_years=work.config.debias.bin_years,
        policy=work.site.moments,
    )
    return content(moments=pack_groups(moments), metrics=MetricRecord({"withheld-scans": withheld}))


@task(app.query("scanners"))
def query_scanners(work: Work) -> RecordDict:
    """Sums of the site's standardised features by scanner, beside covariates, for the eraser, as far as the policy allows."""
    debias = work.config.debias
    if work.received.config_records["config"]["space"] == "input":
        data, standard_NF = input_rows(work)
    else:
        data = work.held.splits["train"].first_scans()
        features_NF = features_of_subjects(work, data)
        standard_NF = unpack_reference(work.received.array_records["reference"], features_NF.shape[1], "server").standard(
            features_NF
        )
    taken = [
        i
        for i, scan in enumerate(data.scans)
        if scan.diagnosis == "control" or (debias.erase_patients and scan.diagnosis == "patient")
    ]
    given_NP = covariates(data.ages(), data.sexes(), data.patients(), age_degree=debias.erase_age_degree)
    sums, withheld = scanner_sums(
        standard_NF.double()[taken], given_NP[taken], data.scanner_codes()[taken], policy=work.site.moments
    )
    return content(scanners=pack_groups(sums), metrics=MetricRecord({"withheld-subjects": withheld}))


@task(app.train("finetune"))
def train_finetune(work: Work) -> RecordDict:
    """A round of fine-tuning on the site's labelled training scans."""
    result = finetune(
        received_classifier(work),
        labelled(work.held.splits["train"]),
        work.config,
        stage=cast(Stage, work.received.config_records["config"]["stage"]),
        round_number=round_number(work),
        device=work.site.device,
    )
    return trained(result, work)


def refuse_unless_shared(site: Site) -> None:
    """Single scans' results leave only a site that says so."""
    if not site.share_per_scan:
        raise SiteError("policy", "this site keeps the results of single scans at home (share-per-scan is not true).")


@task(app.query("embed"))
def query_embed(work: Work) -> RecordDict:
    """Representations of the site's scans with the labels the probes need, without ids; only where the site shares them."""
    refuse_unless_shared(work.site)
    model = received_model(work)
    h = {split: embed(model, work.held.splits[split], work.site.device)[0].numpy() for split in ("train", "test")}
    return content(embeddings=pack_embeddings(work.held.embeddings(h)))


@task(app.query("predict"))
def query_predict(work: Work) -> RecordDict:
    """Scores of a classifier on the site's test scans with their labels, without ids; only where the site shares them."""
    refuse_unless_shared(work.site)
    data = labelled(work.held.splits["test"])
    (logits_NC,) = embed(received_classifier(work), data, work.site.device)
    subjects = sorted({scan.subject for scan in data.scans})
    scores = {
        "score": logits_NC.softmax(dim=1)[:, 1].double().numpy(),
        "label": diagnosis_codes(data).numpy(),
        "subject": np.array([subjects.index(scan.subject) for scan in data.scans]),
    }
    return content(predictions=ArrayRecord({name: Array(value) for name, value in scores.items()}))
