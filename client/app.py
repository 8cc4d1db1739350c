"""Flower's ClientApp of a site: reads a task, calls core, packs the answer. No arithmetic lives here.

Nothing that names a subject or a path leaves: failures are logged at the site, and the server gets a number to ask for.
"""

import logging
import math
import secrets
from collections.abc import Callable
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
from core.erasure import group_means
from core.evaluation.embeddings import Embeddings
from core.exchange import (
    ExchangeError,
    SiteError,
    content,
    fingerprint,
    pack,
    pack_embeddings,
    pack_groups,
    unpack_groups,
    unpack_reference,
    unpack_state,
)
from core.finetuning import Stage, diagnosis_codes, finetune
from core.models import Classifier, Pretrainer, build_classifier, build_pretrainer, constants
from core.moments import GroupMoments, feature_sums, site_moments
from core.privacy import harden
from core.scaling import input_sums
from core.training import NotFiniteError, TrainResult, embed, pretrain

log = logging.getLogger("isocenter")
app = ClientApp()

Task = Callable[[RecordDict, RunConfig, Site, Holdings], RecordDict]


def at_site(task: Task) -> Callable[[Message, Context], Message]:
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
            return Message(content=task(received, config, site, holdings(site, config)), reply_to=message)
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


def round_number(received: RecordDict) -> int:
    """The round a task belongs to."""
    return cast(int, received.config_records["config"]["round"])


def received_model(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> Pretrainer:
    """The run's encoder and projector with the weights received."""
    model = build_pretrainer(
        config.encoder,
        config.embedding_size,
        config.seed,
        num_classes=config.num_classes,
        num_inputs=held.store.num_inputs,
    )
    load_strictly(model, unpack_state(received))
    return model.to(site.device)


def received_classifier(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> Classifier:
    """The run's classifier with the weights received."""
    model = build_classifier(config.encoder, 2, config.seed, num_inputs=held.store.num_inputs)
    load_strictly(model, unpack_state(received))
    return model.to(site.device)


def trained(result: TrainResult, received: RecordDict, config: RunConfig) -> RecordDict:
    """The answer to a training task."""
    before = unpack_state(received)
    after = {name: value.detach().cpu() for name, value in result.state.items()}
    # What no one trains tells nothing of the site, and noise would spoil it.
    arrays, layout = pack(harden(after, before, config.privacy) | constants(before))
    metrics = MetricRecord({"num-examples": result.num_scans, **result.metrics})
    return content(arrays=arrays, metrics=metrics, config=ConfigRecord({"layout": layout}))


@app.query("describe")
def describe(message: Message, context: Context) -> Message:
    """Who this site is and how much it holds: counts only."""

    def task(_: RecordDict, __: RunConfig, site: Site, held: Holdings) -> RecordDict:
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

    return at_site(task)(message, context)


@app.train("pretrain")
def train_pretrain(message: Message, context: Context) -> Message:
    """A round of contrastive pretraining on the site's healthy training scans."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        model = received_model(received, config, site, held)
        widths = {"h": model.encoder.num_features, "z": config.embedding_size}
        told = received.array_records
        result = pretrain(
            model,
            healthy(held.splits["train"]),
            config,
            round_number=round_number(received),
            device=site.device,
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
        return trained(result, received, config)

    return at_site(task)(message, context)


@app.query("inputs")
def query_inputs(message: Message, context: Context) -> Message:
    """Sums of the site's features as its table has them, for the standardisation, as far as the site's policy allows."""

    def task(_: RecordDict, __: RunConfig, site: Site, held: Holdings) -> RecordDict:
        data = healthy(held.splits["train"]).first_scans()
        rows_NI = data.inputs(range(len(data)), torch.device("cpu"))
        return content(sums=ArrayRecord({"sums": Array(input_sums(rows_NI, site.moments).numpy())}))

    return at_site(task)(message, context)


def features_of_subjects(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> tuple[SiteData, torch.Tensor]:
    """The healthy training subjects, one scan each, and their features (N, D) in the space asked for."""
    data = healthy(held.splits["train"]).first_scans()
    h_NF, z_ND = embed(received_model(received, config, site, held), data, site.device)
    return data, (h_NF if received.config_records["config"]["space"] == "h" else z_ND).double()


@app.query("sums")
def query_sums(message: Message, context: Context) -> Message:
    """Sums of the site's features for the reference that all sites standardise by, as far as the site's policy allows."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        _, features_ND = features_of_subjects(received, config, site, held)
        return content(sums=ArrayRecord({"sums": Array(feature_sums(features_ND, site.moments).numpy())}))

    return at_site(task)(message, context)


@app.query("moments")
def query_moments(message: Message, context: Context) -> Message:
    """Moments of the site's standardised features by scanner and age, as far as the site's policy allows."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        data, features_ND = features_of_subjects(received, config, site, held)
        reference = unpack_reference(received.array_records["reference"], features_ND.shape[1], "server")
        moments, withheld = site_moments(
            reference.rows(features_ND),
            data.ages(),
            data.scanner_codes(),
            bin_years=config.debias.bin_years,
            policy=site.moments,
        )
        return content(moments=pack_groups(moments), metrics=MetricRecord({"withheld-scans": withheld}))

    return at_site(task)(message, context)


@app.query("means")
def query_means(message: Message, context: Context) -> Message:
    """Means of the site's standardised features by scanner and age, for the eraser, as far as the site's policy allows."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        data, features_ND = features_of_subjects(received, config, site, held)
        means = group_means(
            features_ND,
            data.ages(),
            data.scanner_codes(),
            reference=unpack_reference(received.array_records["reference"], features_ND.shape[1], "server"),
            bin_years=config.debias.bin_years,
            policy=site.moments,
        )
        return content(means=pack_groups(means))

    return at_site(task)(message, context)


@app.train("finetune")
def train_finetune(message: Message, context: Context) -> Message:
    """A round of fine-tuning on the site's labelled training scans."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        result = finetune(
            received_classifier(received, config, site, held),
            labelled(held.splits["train"]),
            config,
            stage=cast(Stage, received.config_records["config"]["stage"]),
            round_number=round_number(received),
            device=site.device,
        )
        return trained(result, received, config)

    return at_site(task)(message, context)


def refuse_unless_shared(site: Site) -> None:
    """Single scans' results leave only a site that says so."""
    if not site.share_per_scan:
        raise SiteError("policy", "this site keeps the results of single scans at home (share-per-scan is not true).")


@app.query("embed")
def query_embed(message: Message, context: Context) -> Message:
    """Representations of the site's scans with the labels the probes need, without ids; only where the site shares them."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        refuse_unless_shared(site)
        model = received_model(received, config, site, held)
        subjects = sorted({scan.subject for data in held.splits.values() for scan in data.scans})
        parts = []
        for split in ("train", "test"):
            data = held.splits[split]
            h_NF, _ = embed(model, data, site.device)
            parts.append(
                Embeddings(
                    h_NF=h_NF.numpy(),
                    subject=np.array([subjects.index(scan.subject) for scan in data.scans]),
                    site=np.array([site.name] * len(data)),
                    scanner=np.array([scan.scanner for scan in data.scans]),
                    sex=np.array([scan.sex or "" for scan in data.scans]),
                    diagnosis=np.array([scan.diagnosis or "" for scan in data.scans]),
                    split=np.array([split] * len(data)),
                    age_years=np.array([math.nan if s.age_years is None else s.age_years for s in data.scans]),
                )
            )
        return content(embeddings=pack_embeddings(Embeddings.concatenate(parts)))

    return at_site(task)(message, context)


@app.query("predict")
def query_predict(message: Message, context: Context) -> Message:
    """Scores of a classifier on the site's test scans with their labels, without ids; only where the site shares them."""

    def task(received: RecordDict, config: RunConfig, site: Site, held: Holdings) -> RecordDict:
        refuse_unless_shared(site)
        data = labelled(held.splits["test"])
        (logits_NC,) = embed(received_classifier(received, config, site, held), data, site.device)
        subjects = sorted({scan.subject for scan in data.scans})
        scores = {
            "score": logits_NC.softmax(dim=1)[:, 1].double().numpy(),
            "label": diagnosis_codes(data).numpy(),
            "subject": np.array([subjects.index(scan.subject) for scan in data.scans]),
        }
        return content(predictions=ArrayRecord({name: Array(value) for name, value in scores.items()}))

    return at_site(task)(message, context)
