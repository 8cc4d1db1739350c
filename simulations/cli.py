"""Commands of one machine: `isocenter run`, `isocenter resume`, `isocenter compare`, `isocenter phantom`."""

import json
import shlex
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from core.cli import Overrides, checked, decode_first

if TYPE_CHECKING:
    from server.superlink import Kit
    from simulations.launch import Outcome

APP = Path(__file__).parents[1]
RESUMES = 3
"""How often in a row, without a finished round between, a run at the sites is gone on with by itself."""
BACK_S = 600.0
"""How long the server may take to come back."""
LOOKS = 5
"""How often, a second apart, nobody must be seen to work in a run's folder until its process is taken for gone."""


def register(app: typer.Typer) -> None:
    """Add the commands to the console script."""
    app.command()(run)
    app.command()(resume)
    app.command()(compare)
    app.command()(phantom)


def run(
    overrides: Overrides = None,
    deadline_minutes: Annotated[float, typer.Option(help="Stop the run after this long, whatever it waits for.")] = 720,
    at: Annotated[
        Path | None, typer.Option(help="A server's kit: run at the sites that are connected to it.", show_default="simulate")
    ] = None,
) -> None:
    """Pretrain, fine-tune, evaluate, report: with virtual sites on this machine, or at the sites of a consortium.

    Without `data.root` the embedded phantom consortium is used: six hospitals, written to data/phantom on first use.
    Results go to runs/<name>. The exit code is 0 only when the run finished and its report was written.
    """
    folder = simulate_run(overrides or [], deadline_minutes) if at is None else run_at(at, overrides or [], deadline_minutes)
    typer.echo(f"open {folder / 'report.html'}")


def run_at(server: Path, overrides: list[str], deadline_minutes: float) -> Path:
    """Run at the sites of a consortium with progress on the screen, from its server's kit; exit 1 with the reason on failure."""
    from server.superlink import open_kit

    config = checked(overrides)
    if config.resume:
        fail("run: resume must be false, got True. Go on with a run by `isocenter resume`.")
    try:
        output = (config.output or open_kit(server).state / "runs").resolve()
    except ValueError as error:
        fail(str(error))
    folder = output / free_name(output, config.name)
    return submit_in(folder, server, [*overrides, *placed(folder)], deadline_minutes)


def submit_in(folder: Path, server: Path, overrides: list[str], deadline_minutes: float) -> Path:
    """Run these overrides at the sites of a consortium, in a folder at the server; exit 1 with the reason when it fails.

    Where the server's side breaks off, as when it is killed or its machine starts anew, the run is gone on with by itself.
    """
    from core.run_file import RUN_FILE
    from server.board import state_of
    from server.resume import read_lines
    from server.superlink import open_kit
    from simulations.launch import open_log, stop_run, submit
    from simulations.workplace import Workplace

    kit = open_kit(server)
    if not kit.service.is_running():
        fail(f"run: the server must run, got none. Start it with `isocenter server start {server}`.")
    check_checkout()
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / free_name(folder, "flower.log")
    typer.echo(f"run {folder.name} at the sites of {kit.about.consortium}; everything Flower says goes to {log_path}")
    place, deadline = Workplace(kit.state, kit.environment()), time.monotonic() + deadline_minutes * 60
    tries, before = 0, len(read_lines(folder))
    with open_log(log_path) as log:
        while True:
            outcome = submit(
                place,
                APP,
                overrides=shlex.join(overrides),
                log=log,
                deadline_s=deadline - time.monotonic(),
                on_line=typer.echo,
                gone=gone_from(folder),
            )
            finished = len(read_lines(folder))
            tries, before = (1 if finished > before else tries + 1), finished
            resumable = outcome.broke_off and (folder / RUN_FILE).is_file() and state_of(folder) != "stopped"
            if outcome.ok or not resumable or tries > RESUMES or not comes_back(kit, deadline):
                break
            rounds = f"{finished} finished round{'' if finished == 1 else 's'}"
            told = f"the server's side of the run broke off; it is gone on with by itself, after {rounds}"
            log.write(f"{told}: {outcome.details}\n")
            typer.echo(told)
            if outcome.run_id is not None:
                stop_run(place, outcome.run_id)
            overrides = [*overrides, *(["resume=true"] if "resume=true" not in overrides else [])]
    return ended_well(folder, outcome, log_path, f" --at {server}")


def gone_from(folder: Path) -> Callable[[], bool]:
    """Whether the server that worked in a run's folder ended without a word; asked again and again, about once a second."""
    from core.run_file import is_worked_in
    from server.board import state_of

    seen, looks = False, 0

    def gone() -> bool:
        nonlocal seen, looks
        if is_worked_in(folder):
            seen, looks = True, 0
        elif seen and state_of(folder) not in ("finished", "stopped"):
            looks += 1
        return looks >= LOOKS

    return gone


def comes_back(kit: "Kit", deadline: float) -> bool:
    """Wait until the server answers; False where it does not in time."""
    from core.flower_env import CONNECTION

    deadline = min(deadline, time.monotonic() + BACK_S)
    while not kit.ask("ls", CONNECTION).get("success"):
        if time.monotonic() > deadline:
            return False
        time.sleep(1)
    return True


def ended_well(folder: Path, outcome: "Outcome", log_path: Path, options: str = "") -> Path:
    """The folder of a run that finished and wrote its report; exit 1 with the reason where it did not."""
    from core.run_file import RUN_FILE

    if not outcome.ok or not (folder / "report.html").is_file():
        again = f"; `isocenter resume {folder}{options}` goes on with it" if (folder / RUN_FILE).is_file() else ""
        fail(f"the run did not finish: {outcome.status} {outcome.details}\nsee {log_path}{again}")
    typer.echo(f"finished in {outcome.seconds:.0f} s")
    return folder


def resume(
    run: Annotated[str, typer.Argument(help="A run's folder, or its name: then in runs/, or at the server.", show_default=False)],
    overrides: Overrides = None,
    deadline_minutes: Annotated[float, typer.Option(help="Stop the run after this long, whatever it waits for.")] = 720,
    at: Annotated[Path | None, typer.Option(help="The server's kit that it ran at.", show_default="a simulation")] = None,
) -> None:
    """Go on with a run that was stopped, after its last finished round.

    It ends with the weights of one that was never stopped, to the last bit, unless it draws noise for privacy. Configuration and
    code must be those it was started with; OVERRIDES may change how long the server waits, such as strategy.round_timeout_s=7200.
    The exit code is 0 only when the run finished and its report was written.
    """
    folder = resume_run(Path(run), overrides or [], deadline_minutes, at)
    typer.echo(f"open {folder / 'report.html'}")


def resume_run(run: Path, overrides: list[str], deadline_minutes: float, at: Path | None = None) -> Path:
    """Go on with the run in a folder, or of that name; its folder. Exit 1 with the reason when it fails."""
    from core.run_file import RUN_FILE, read_run
    from server.superlink import open_kit

    try:
        runs = Path("runs") if at is None else open_kit(at).state / "runs"
        folder = (run if (run / RUN_FILE).is_file() or len(run.parts) > 1 else runs / run).resolve()
        given = shlex.split(read_run(folder).overrides)
    except ValueError as error:
        fail(str(error))
    # The folder may have been moved since.
    again = [*given, *overrides, *placed(folder), "resume=true"]
    config = checked(again)
    if at is not None:
        return submit_in(folder, at, again, deadline_minutes)
    if config.data.root is None:
        fail(
            f"run {folder.name}: it must be a simulation, whose overrides tell data.{config.data.PLACES[0]}, they do not. Give "
            "the server's kit that it ran at: --at KIT."
        )
    return simulate_in(folder, again, deadline_minutes)


def placed(folder: Path) -> list[str]:
    """The overrides that make a folder the run's."""
    from core.config import quoted

    return [f"output={quoted(str(folder.parent))}", f"name={folder.name}"]


def simulate_run(overrides: list[str], deadline_minutes: float) -> Path:
    """Run one simulation with progress on the screen and return its folder; exit 1 with the reason when it fails."""
    from core.config import quoted

    config = checked(overrides)
    if config.resume:
        fail("run: resume must be false, got True. Go on with a run by `isocenter resume`.")
    check_checkout()
    output = (config.output or Path("runs")).resolve()
    places = {key: path.resolve() for key, path in config.data.places.items() if path is not None}
    if config.data.root is None:
        if config.data.kind != "images":
            fail(f"run: data.{config.data.PLACES[0]} must name a file, got null.")
        places["root"] = Path("data/phantom").resolve()
        write_phantom(places["root"], seed=0, scale=1.0)
    # Quoted twice: for Hydra, whose values know = and spaces, and for the shell-like split of the whole line.
    here = [f"data.{key}={quoted(str(path))}" for key, path in places.items()]
    folder = output / free_name(output, config.name)
    return simulate_in(folder, [*overrides, *here, *placed(folder)], deadline_minutes)


def check_checkout() -> None:
    """Exit 1 where there is no app to send: Flower packs it from the checkout."""
    if not (APP / "pyproject.toml").is_file():
        fail("run: Isocenter must be installed from its checkout (pip install -e .), got a copy without pyproject.toml.")


def simulate_in(folder: Path, overrides: list[str], deadline_minutes: float) -> Path:
    """Run the simulation of these overrides, whose folder it is, or go on with it; exit 1 with the reason when it fails."""
    from core.data.site import default_cache_root
    from simulations.launch import choose_resources, simulate

    config = checked(overrides)
    try:
        source = config.data.source(default_cache_root(), config.data.places)
        num_sites = len(source.sites())
        decode_first(source)
    except ValueError as error:
        fail(str(error))
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / free_name(folder, "flower.log")
    typer.echo(f"starting {num_sites} virtual sites; everything Flower says goes to {log_path}")
    clients_at_once, gpus_per_client = choose_resources(num_sites)
    outcome = simulate(
        APP,
        overrides=shlex.join(overrides),
        num_sites=num_sites,
        log_path=log_path,
        deadline_s=deadline_minutes * 60,
        clients_at_once=clients_at_once,
        gpus_per_client=gpus_per_client,
        on_line=typer.echo,
    )
    return ended_well(folder, outcome, log_path)


def free_name(output: Path, name: str) -> str:
    """A name in a folder, with a number behind it when it is taken there."""
    taken = {path.name for path in output.iterdir()} if output.is_dir() else set()
    return next(n for n in (name, *(f"{name}-{i}" for i in range(2, 10_000))) if n not in taken)


def fail(text: str) -> None:
    """Say why on standard error and exit with 1."""
    typer.echo(text, err=True)
    raise typer.Exit(1)


def phantom(
    folder: Annotated[Path, typer.Argument(help="Where to write it; must not exist or hold the same cohort.")],
    seed: Annotated[int, typer.Option(help="Another seed gives other subjects.")] = 0,
    scale: Annotated[float, typer.Option(help="Factor on the number of subjects.")] = 1.0,
) -> None:
    """Write the embedded phantom consortium: brain-like volumes of six hospitals as BIDS NIfTI, with the ground truth."""
    write_phantom(folder.resolve(), seed, scale)


def write_phantom(folder: Path, seed: int, scale: float) -> None:
    """Write the cohort with a progress bar, unless it is there already."""
    import os

    from rich.progress import Progress

    from simulations.cohort import ensure_cohort

    with Progress(transient=True) as bar:
        task = bar.add_task("writing the phantom consortium", total=None)
        try:
            written = ensure_cohort(
                folder,
                seed=seed,
                scale=scale,
                progress=lambda done, total: bar.update(task, completed=done, total=total),
                num_workers=len(os.sched_getaffinity(0)),
            )
        except ValueError as error:
            fail(str(error))
    typer.echo(f"{'wrote' if written else 'found'} the phantom consortium in {folder}")


REPRESENTED = (
    ("site", "balanced_accuracy"),
    ("site", "balanced_accuracy_knn"),
    ("scanner", "balanced_accuracy"),
    ("age", "mae"),
    ("age", "mae_unseen"),
    ("sex", "auc"),
    ("diagnosis", "auc"),
)
COMPARED = (
    *((stage, *figure) for stage in ("pretrained", "final") for figure in REPRESENTED),
    ("age_sex_floor", "site", "balanced_accuracy"),
    ("linear_probe", "diagnosis", "auc"),
    ("full_finetuning", "diagnosis", "auc"),
    ("from_scratch", "diagnosis", "auc"),
)


def read_figures(path: Path) -> dict[tuple[str, str, str], float]:
    """A run's figures over all sites; `final` is the representation it delivers: erased where it erases, else pretrained."""
    rows = [row for row in json.loads(path.read_text()) if row["site"] == "all"]
    figures = {(row["stage"], row["task"], row["metric"]): row["value"] for row in rows}
    delivered = "erased" if any(row["stage"] == "erased" for row in rows) else "pretrained"
    final = {("final", task, metric): v for (stage, task, metric), v in figures.items() if stage == delivered}
    return figures | final


def mean_of(runs: list[dict[tuple[str, str, str], float]], key: tuple[str, str, str]) -> float | None:
    """Mean of a figure over the runs that have it."""
    values = [run[key] for run in runs if key in run]
    return sum(values) / len(values) if values else None


def compare(
    overrides: Overrides = None,
    vary: Annotated[
        list[str] | None, typer.Option(help="Overrides of one variant, quoted; repeat for each. Default: debiasing off, on.")
    ] = None,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each variant, with seeds 0, 1, ...")] = 3,
    deadline_minutes: Annotated[float, typer.Option(help="Stop a single run after this long.")] = 720,
) -> None:
    """Run variants over several seeds and print them side by side; finished runs are not repeated.

    Example: isocenter compare --seeds 3 experiment=mcic data.root=/folder --vary debias=none --vary debias=fairkl
    """
    from rich.console import Console
    from rich.table import Table

    variants = vary or ["debias=none", "debias=fairkl"]
    base = overrides or []
    config = checked(base)
    output = (config.output or Path("runs")).resolve()
    figures: dict[str, list[dict[tuple[str, str, str], float]]] = {}
    for number, variant in enumerate(variants):
        for seed in range(seeds):
            name = f"{config.name}-compare-{number}-seed{seed}"
            chosen = [*base, *shlex.split(variant), f"seed={seed}", f"name={name}"]
            stamp = output / name / "compared.json"
            if not (stamp.is_file() and json.loads(stamp.read_text()) == chosen):
                typer.echo(f"\n{variant}, seed {seed}")
                folder = simulate_run(chosen, deadline_minutes)
                if folder != output / name:
                    fail(f"compare: {output / name} must be free or hold the same run, got another; remove it.")
                stamp.write_text(json.dumps(chosen))
            figures.setdefault(variant, []).append(read_figures(output / name / "metrics.json"))
    table = Table(title=f"{config.name}: mean (lowest, highest) over {seeds} seeds, held-out subjects")
    for heading in ("stage", "task", "metric", *variants):
        table.add_column(heading, no_wrap=True)
    summary: list[dict[str, object]] = []
    for key in COMPARED:
        cells = []
        for variant in variants:
            values = [run_figures[key] for run_figures in figures[variant] if key in run_figures]
            cells.append(f"{sum(values) / len(values):.3f} ({min(values):.3f}, {max(values):.3f})" if values else "-")
            summary.append({"stage": key[0], "task": key[1], "metric": key[2], "variant": variant, "values": values})
        if set(cells) != {"-"}:
            table.add_row(*key, *cells)
    Console(width=max(100, 55 + 26 * len(variants))).print(table)
    for task, metric in (("site", "balanced_accuracy"), ("age", "mae")):
        first, last = (mean_of(figures[variant], ("final", task, metric)) for variant in (variants[0], variants[-1]))
        if first is not None and last is not None:
            change = f"{last - first:+.3f}, {100 * (last / first - 1):+.1f} %"
            typer.echo(f"{task} {metric}: {variants[0]} {first:.3f}, {variants[-1]} {last:.3f} ({change})")
    path = output / f"{config.name}-compare.json"
    path.write_text(json.dumps(summary, indent=1))
    typer.echo(f"figures: {path}")
