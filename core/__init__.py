"""Isocenter's concepts, each once, in reading order.

config      RunConfig and load_config: what a run is
closed      the base of every section of settings
settings    what a run and a site's policy share, without torch
seeding     where every random number comes from
data        what a site holds: manifest, labels, readers, decode, volumes, label maps, cache, site, holdings, sampling, feed,
            augment, views, preflight
models      encoders, projector, classifier, segmenter
losses      objectives, label kernels, FairKL; usable on their own
messages    what every message of a site is checked for
moments     what sites exchange to compute FairKL across sites
scaling     mean and spread of a table's features over all sites, from sums
erasure     site and scanner erased before or behind the encoder, from sums
combat      ComBat from sums, for comparison
training    the one local loop, and pretraining; memory: what its steps free is kept
targets     what fine-tuning learns to tell: classes, findings, a number
stages      the ways to fine-tune
starts      what training begins with
finetuning  encoder and head on labelled scans; segmentation: encoder inside a U-shaped net, Dice
rounds      rounds inside one process, resumable; finetune_command: `isocenter finetune`
privacy     DP-SGD for fine-tuning, hardening of what leaves a site
exchange    what crosses the wire; npy: arrays from a stranger
keys        who may take part: authority, certificates, keys of sites and requests
flower_env  how Flower's programs are started, asked and ended
files       written whole or not at all
run_file    run.json: what a run was started with, so that it can be gone on with
faults      failures in words that may leave a site; progress: how far long work is; log_lines: to where
checkpoint  weights on disk
export      encoders for others: load_encoder, TorchScript, model card, MONAI bundle
evaluation  site-effect removal, probes, intervals
report      evaluations to a page, from report_record by report_figures; report_check: what a folder of scans holds, to a screen
cli         the console script
"""

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from core.export import load_encoder as load_encoder


def __getattr__(name: str) -> Any:
    """``core.load_encoder``, imported when it is asked for: torch takes seconds."""
    if name == "load_encoder":
        from core.export import load_encoder

        return load_encoder
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
