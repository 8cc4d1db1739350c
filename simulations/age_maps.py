"""The space of representations by age: SimCLR scatters ages, y-aware InfoNCE puts them in order (Dufumier et al., MICCAI 2021).

``python -m simulations.age_maps`` pretrains one encoder an objective across the sites of the phantom consortium, without
debiasing, and draws each representation as a plane, coloured by age.
"""

import json
import logging
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from sklearn.neighbors import KNeighborsRegressor
from sklearn.preprocessing import StandardScaler

from core.checkpoint import last_checkpoints, load_checkpoint, load_strictly
from core.config import RunConfig, load_config
from core.data.bids import list_sites
from core.evaluation.embeddings import Embeddings
from core.evaluation.intervals import subject_bootstrap
from core.evaluation.probes import planar_map
from core.models import build_pretrainer
from core.training import embed, pretraining_scans

NEIGHBOURS = 10


def pretrained_encoder(root: Path, overrides: Sequence[str]) -> tuple[RunConfig, dict[str, torch.Tensor]]:
    """Pretrain over the sites of a folder, in this process, and return the run's configuration and last weights."""
    from client.app import app as client_app
    from server.app import app as server_app
    from simulations.in_process import run_in_process

    with tempfile.TemporaryDirectory() as output:
        fixed = f"data.root={json.dumps(str(root))} output={output} name=age-maps finetune=none policy.share_per_scan=false"
        text = " ".join([*overrides, fixed])
        names = list_sites(root)
        nodes = {number + 1: {"partition-id": number, "num-partitions": len(names)} for number in range(len(names))}
        run_in_process(server_app, client_app, text, nodes)
        last = last_checkpoints(Path(output) / "age-maps")["pretrain"]
        return load_config(text), load_checkpoint(last).state


def healthy_embeddings(config: RunConfig, state: dict[str, torch.Tensor]) -> Embeddings:
    """Representations of one scan of every healthy subject of known age at the pretraining sites; train and test."""
    from client.site import holdings, this_site

    assert config.data.root is not None
    model = build_pretrainer(config.encoder, config.embedding_size, config.seed, num_classes=config.num_classes)
    load_strictly(model, state)
    names = list_sites(config.data.root)
    parts = []
    for number, name in enumerate(names):
        if config.data.pretrain_sites is not None and name not in config.data.pretrain_sites:
            continue
        site = this_site({"partition-id": number, "num-partitions": len(names)}, config)
        for split in ("train", "test"):
            healthy = pretraining_scans(holdings(site, config).splits[split], config)
            data = healthy.first_scans().select(lambda scan: scan.age_years is not None)
            h_NF, _ = embed(model, data, site.device)
            parts.append(
                Embeddings(
                    h_NF=h_NF.numpy(),
                    subject=np.arange(len(data)) + (10_000 if split == "test" else 0),
                    site=np.array([name] * len(data)),
                    scanner=np.array([scan.scanner for scan in data.scans]),
                    sex=np.array([scan.sex or "" for scan in data.scans]),
                    diagnosis=np.array([scan.diagnosis or "" for scan in data.scans]),
                    split=np.array([split] * len(data)),
                    age_years=data.ages().numpy(),
                )
            )
    return Embeddings.concatenate(parts)


def neighbour_error(embeddings: Embeddings, seed: int) -> tuple[float, float, float]:
    """Mean absolute error of held-out ages told by the 10 nearest training subjects in z-scored h, with its 95 % interval.

    In years; small where ages are in order, near their spread where they are not. The interval is over subjects.
    """
    train, test = (embeddings.select(np.flatnonzero(embeddings.split == split)) for split in ("train", "test"))
    scaler = StandardScaler().fit(train.h_NF)
    neighbours = KNeighborsRegressor(min(NEIGHBOURS, len(train))).fit(scaler.transform(train.h_NF), train.age_years)
    errors_N = np.abs(neighbours.predict(scaler.transform(test.h_NF)) - test.age_years)
    subjects_N = np.array([f"{site}/{subject}" for site, subject in zip(test.site, test.subject, strict=True)])
    return subject_bootstrap(subjects_N, lambda rows: float(errors_N[rows].mean()), seed=seed)


def draw_maps(found: dict[str, Embeddings], errors: dict[str, tuple[float, float, float]]) -> Figure:
    """One panel an objective: t-SNE of h, coloured by age; held-out subjects large."""
    figure = Figure(figsize=(5.2 * len(found), 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(found), squeeze=False)[0]
    ages = np.concatenate([embeddings.age_years for embeddings in found.values()])
    for axis, (objective, embeddings) in zip(axes, found.items(), strict=True):
        place_N2 = planar_map(embeddings)
        for held_out in (False, True):
            part = (embeddings.split == "test") == held_out
            points = axis.scatter(
                *place_N2[part].T,
                c=embeddings.age_years[part],
                s=34 if held_out else 16,
                linewidths=0.6 if held_out else 0.0,
                edgecolors="black",
                cmap="viridis",
                vmin=ages.min(),
                vmax=ages.max(),
            )
        error, low, high = errors[objective]
        axis.set(
            xticks=[],
            yticks=[],
            title=f"{objective}\nage from {NEIGHBOURS} neighbours: {error:.1f} years [{low:.1f}, {high:.1f}]",
        )
        axis.set_box_aspect(1)
    figure.colorbar(points, ax=axes, label="age, years (held-out subjects outlined)", shrink=0.8)
    return figure


def main(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="Hydra overrides of every run, e.g. num_rounds=40; data.root=/folder data=folder for other scans."),
    ] = None,
    objectives: Annotated[
        str, typer.Option(help="Objectives to compare, as in configs/objective, separated by commas.")
    ] = "ntxent,yaware",
    output: Annotated[Path, typer.Option(help="Folder for the figure and its numbers.")] = Path("runs/age-maps"),
) -> None:
    """Draw the space of representations by age for several objectives, pretrained alike."""
    from simulations.cli import write_phantom

    logging.getLogger("flwr").setLevel(logging.WARNING)  # our own lines tell the rounds
    config = load_config([*(overrides or []), "debias=none"])
    root = (config.data.root or Path("data/phantom")).resolve()
    if config.data.root is None:
        write_phantom(root, seed=0, scale=1.0)
    found, errors = {}, {}
    for objective in objectives.split(","):
        typer.echo(f"pretraining with {objective}")
        chosen, state = pretrained_encoder(root, [*(overrides or []), "debias=none", f"objective={objective}"])
        found[objective] = healthy_embeddings(chosen, state)
        errors[objective] = neighbour_error(found[objective], chosen.seed)
    output.mkdir(parents=True, exist_ok=True)
    draw_maps(found, errors).savefig(output / "age_maps.png", dpi=150)
    (output / "age_maps.json").write_text(json.dumps({name: list(values) for name, values in errors.items()}, indent=1))
    table = Table(title="age of held-out subjects from their nearest neighbours in h: mean absolute error, years")
    for heading in ("objective", "error", "95 % interval"):
        table.add_column(heading)
    for name, (error, low, high) in errors.items():
        table.add_row(name, f"{error:.2f}", f"[{low:.2f}, {high:.2f}]")
    Console().print(table)
    typer.echo(f"figure: {output / 'age_maps.png'}")


if __name__ == "__main__":
    typer.run(main)
