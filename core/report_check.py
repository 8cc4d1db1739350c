"""What `isocenter check` says: tables on the screen, check.json, a picture of the scans, and what may be shared."""

import io
import json
import math
import shlex
import statistics
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import typer
from numpy.typing import NDArray
from rich import box
from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from core import __version__
from core.checkpoint import write_atomically
from core.config import DataConfig, RunConfig, load_config, quoted
from core.data.files import layout_and_reason
from core.data.manifest import UNUSABLE_KINDS, Problem, Scan, split_by_subject
from core.data.medmnist import image_axes
from core.data.preflight import (
    MEANINGS,
    MIN_TRAIN_CONTROLS,
    Cost,
    Meaning,
    SiteCheck,
    Steps,
    as_json,
    check_site,
    gathered_remarks,
    picture,
    scanner_summary,
    shareable,
)
from core.data.site import ImageSource, Source, default_cache_root

READY, STOPS = 0, 1
MIN_WIDTH, MAX_WIDTH = 100, 120
MAX_EXAMPLES = 3
MAX_NOTES = 12
BLOCKS = " ▁▂▃▄▅▆▇█"
_UNKNOWN = Meaning("See the examples.", "See the examples.")


def check_and_print(
    folder: Path,
    overrides: Sequence[str],
    *,
    as_json_only: bool,
    share: Path | None,
    output: Path | None,
    num_pictures: int,
    quick: bool,
) -> int:
    """Look at everything below a folder, say what was found, and write it.

    Returns:
        0 where a run would start, 1 where it would stop.

    Raises:
        ValueError: The folder or the overrides are not understood, or nothing can be written.
    """
    chosen = _chosen(folder, overrides)
    config = load_config(chosen)
    output = output or Path(f"check-{folder.resolve().stem if folder.is_file() else folder.resolve().name}")
    screen = Console(stderr=True, highlight=False, markup=False, emoji=False)
    with gathered_remarks() as remarks, _progress(screen) as (on_plan, steps):
        source = config.data.source(default_cache_root(), config.data.places)
        layout = _layout(source, config.data)
        checks, refusals = _checked_sites(source, config, quick, on_plan, steps)
    stops = {check.site: check.stop for check in checks if check.stop} | refusals
    want, alone_is_ready = _want_of_controls(checks, config)
    remarks += want
    command = _command("isocenter check", [str(folder), *overrides]) if stops else _command("isocenter run", chosen)
    summary = {
        "format": "isocenter-check-1",
        "version": __version__,
        "folder": str(folder.resolve()),
        "layout": layout[0],
        "reason": layout[1],
        "ready": not stops,
        "ready_alone": not stops and alone_is_ready,
        "stops": stops,
        "remarks": remarks,
        "quick": quick,
        "next": command,
        "sites": [as_json(check) for check in checks],
    }
    content = json.dumps(summary, indent=2)
    written = _written(output, "check.json", content.encode())
    png = montage(checks, num_pictures)
    wrote = [str(written)] + ([str(_written(output, "montage.png", png))] if png else [])
    if share is not None:
        told = json.dumps(shareable(checks), indent=2) + "\n"
        wrote.append(f"{_written(share.parent, share.name, told.encode())} (counts only: this may be sent)")
    if as_json_only:
        typer.echo(content)
        return STOPS if stops else READY
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a file's name may be no text
    page = Console(highlight=False, markup=False, emoji=False)
    page.width = min(max(page.width, MIN_WIDTH), MAX_WIDTH) if page.is_terminal else MAX_WIDTH
    for part in _page(folder, layout, checks, remarks, ascii_only=page.options.ascii_only):
        page.print(part)
    page.print(_verdict(checks, stops, command, wrote, alone_is_ready=alone_is_ready))
    return STOPS if stops else READY


# ---- what is checked


def _chosen(folder: Path, overrides: Sequence[str]) -> list[str]:
    """The overrides of a run on this folder or file: its kind of data, its place, then what was told."""
    told = {override.lstrip("+").partition("=")[0]: override.partition("=")[2] for override in overrides}
    given = str(folder)
    if not folder.exists():
        raise ValueError(f"check: FOLDER must be there, got {given!r}. Mend its name.")
    key = "root"
    if folder.is_dir():
        data = ["data=folder"]
    elif folder.suffix == ".npz":
        data = ["experiment=medmnist", f"data.spatial={image_axes(folder)}"]
    elif folder.suffix in (".csv", ".tsv"):
        data, key = ["experiment=roi"], "table"
    else:
        raise ValueError(
            f"check: FOLDER must be a folder of images, a MedMNIST .npz or a table of features (.csv, .tsv), got the file "
            f"{given!r}. Name the folder that holds it."
        )
    if "data" in told or "experiment" in told:
        data = []
    if f"data.{key}" in told:
        raise ValueError(f"check: FOLDER is data.{key}, got data.{key}={told[f'data.{key}']!r} too. Leave one out.")
    placed = f"data.{key}={quoted(str(folder.resolve()))}"
    return [*(item for item in data if item.partition("=")[0] not in told), placed, *overrides]


def _layout(source: Source, data: DataConfig) -> tuple[str, str]:
    """How the data are read, and why."""
    if not isinstance(source, ImageSource):
        return data.name, f"data={data.name}"
    if source.layout != "auto":
        return source.layout, f"data.layout={source.layout}"
    return layout_and_reason(source.root)


def _checked_sites(
    source: Source, config: RunConfig, quick: bool, on_plan: Any, steps: Steps
) -> tuple[list[SiteCheck], dict[str, str]]:
    """Every site that can be understood, and why the others cannot."""
    checks, refusals = [], {}
    sites = source.sites()
    for site in sites:
        try:
            checks.append(
                check_site(source, site, max_unusable=config.data.max_unusable, quick=quick, on_plan=on_plan, steps=steps)
            )
        except ValueError as error:
            refusals[site] = " ".join(str(error).split())
    if not checks:
        raise ValueError(next(iter(refusals.values()), "data.root: it must hold a site, got none."))
    return checks, refusals


def _want_of_controls(checks: Sequence[SiteCheck], config: RunConfig) -> tuple[list[str], bool]:
    """A sentence on the sites that pretraining would leave out, and whether any site is left without the help of others."""
    few = []
    for check in checks:
        train = split_by_subject(check.manifest, split_seed=config.data.split_seed, fractions=config.data.fractions)["train"]
        if not check.stop and (number := train.healthy().num_subjects) < MIN_TRAIN_CONTROLS:
            few.append(f"{check.site} ({number})")
    if not few:
        return [], True
    named = ", ".join(few[:MAX_EXAMPLES]) + (f" and {len(few) - MAX_EXAMPLES} more" if len(few) > MAX_EXAMPLES else "")
    text = (
        f"Pretraining takes {MIN_TRAIN_CONTROLS} healthy subjects in train, {_count(len(few), 'site')} with fewer: {named}. "
        "In a federation such a site is left out of pretraining and counts as unseen."
    )
    return [text], len(few) < len(checks)


def _command(name: str, arguments: Sequence[str]) -> str:
    return f"{name} {' '.join(shlex.quote(_bare(argument)) for argument in arguments)}"


def _bare(override: str) -> str:
    """An override without the quotes that its value does not need."""
    key, _, value = override.partition("=")
    inner = value[1:-1]
    plain = value[:1] == value[-1:] == '"' and inner and all(c.isalnum() or c in "/._-" for c in inner)
    return f"{key}={inner}" if plain else override


def _written(folder: Path, name: str, content: bytes) -> Path:
    try:
        write_atomically(folder / name, content)
    except OSError as error:
        raise ValueError(
            f"check: {folder / name} must be writable, got {error.strerror}. Name another folder with --output."
        ) from None
    return folder / name


@contextmanager
def _progress(screen: Console) -> Iterator[tuple[Any, Steps]]:
    """A bar on standard error where that is a screen; a line a site where it is not."""
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=screen, transient=True, disable=not screen.is_terminal) as bar:
        site_of: list[str] = [""]

        def on_plan(site: str, cost: Cost) -> None:
            site_of[0] = site
            todo = f"decoding {cost.num_missing} of {cost.num_images} images, {_bytes(cost.bytes_missing)} into"
            where = f"{_plain(str(cost.folder))}, where {_bytes(cost.bytes_free)} are free"
            screen.print(f"{_plain(site)}: {todo if cost.num_missing else 'nothing to decode in'} {where}", soft_wrap=True)

        tasks: dict[tuple[str, str], Any] = {}

        def steps(what: str, done: int, total: int) -> None:
            key = (site_of[0], what)
            if key not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[key] = bar.add_task(f"{_plain(site_of[0])}: {what}", total=total)
            bar.update(tasks[key], completed=done, total=total)

        yield on_plan, steps


# ---- what is said


def _page(
    folder: Path, layout: tuple[str, str], checks: Sequence[SiteCheck], remarks: Sequence[str], *, ascii_only: bool
) -> Iterator[RenderableType]:
    scans = [scan for check in checks for scan in check.manifest.scans]
    subjects = sum(check.manifest.num_subjects for check in checks)
    sessions = len({(scan.site, scan.subject, scan.session) for scan in scans if scan.session})
    listed = sum(check.num_listed for check in checks)
    yield Text.assemble(("Isocenter check ", "bold"), _plain(str(folder.resolve())))
    yield Text(f"read as {layout[0]}: {layout[1]}")
    yield Text.assemble(
        (f"{_count(len(checks), 'site')}, {_count(subjects, 'subject')}, ", ""),
        (f"{_count(sessions, 'session')}, " if sessions else "no sessions, ", ""),
        (f"{len(scans)} of {_count(listed, 'scan')} listed can be used", "bold"),
    )
    if scans:
        yield _scanner_table(checks)
        yield _ages(checks, ascii_only=ascii_only)
        yield Text()
    problems = [problem for check in checks for problem in check.manifest.problems]
    if problems:
        yield _problem_table("Problems", problems, folder)
    else:
        yield Text("no problems")
    outliers = [problem for check in checks for problem in check.outliers]
    if outliers:
        yield _problem_table("Used, and odd: look at them", outliers, folder)
    yield from _costs(checks)
    sites_of: dict[str, list[str]] = {}
    for check in checks:
        for note in check.notes:
            sites_of.setdefault(note, []).append(check.site)
    notes = [note if len(sites) == len(checks) else f"{', '.join(sites)}: {note}" for note, sites in sites_of.items()]
    told = [_plain(_below(note, folder)) for note in (*remarks, *notes)]
    for note in told[:MAX_NOTES]:
        yield Text.assemble(("note  ", "dim"), note)
    if len(told) > MAX_NOTES:
        yield Text(f"and {len(told) - MAX_NOTES} more notes: see check.json", style="dim")


def _scanner_table(checks: Sequence[SiteCheck]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, title="Scans by scanner", title_justify="left", title_style="bold", pad_edge=False)
    several = len(checks) > 1
    if several:
        table.add_column("site", overflow="fold")
    table.add_column("scanner", overflow="fold")
    for name in ("subjects", "scans", "F/M/?", "control/\npatient/?", "age: least-\nmedian-most", "known"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("voxels, mm", no_wrap=True)
    table.add_column("grid", no_wrap=True)
    for check in checks:
        for name in sorted({scan.scanner for scan in check.manifest.scans}):
            row = scanner_summary(name, check)
            age = "-".join(map(_years, row["age_years"])) if row["age_years"] else "unknown"
            table.add_row(
                *([_plain(check.site)] if several else []),
                _plain(name),
                str(row["subjects"]),
                str(row["scans"]),
                "/".join(map(str, row["sex"].values())),
                "/".join(map(str, row["diagnosis"].values())),
                age,
                str(row["ages_known"]),
                _usual(row["voxel_sizes_mm"]) or "-",
                _usual(row["grids"]) or _inputs(check),
            )
    return table


def _usual(counted: Sequence[Any]) -> str:
    """The most frequent triple, and how many others there are."""
    if not counted:
        return ""
    text = "x".join(f"{size:g}" for size in counted[0][0])
    return text if len(counted) == 1 else f"{text} +{len(counted) - 1}"


def _inputs(check: SiteCheck) -> str:
    """What one scan is where no header tells it: a picture or a row of features."""
    shape = () if check.store is None else check.store.shape
    return f"{shape[0]} features" if len(shape) == 1 else "x".join(map(str, shape[1:])) or "-"


def _years(age: float) -> str:
    return f"{age:.0f}" if age >= 10 or age == int(age) else f"{age:.1f}"


def _ages(checks: Sequence[SiteCheck], *, ascii_only: bool) -> Text:
    """Youngest and oldest, and a bar a decade, of the subjects at their first scan."""
    first: dict[tuple[str, str], Scan] = {}
    for check in checks:
        for scan in check.manifest.scans:
            first.setdefault((check.site, scan.subject), scan)
    ages = [scan.age_years for scan in first.values() if scan.age_years is not None]
    missing = len(first) - len(ages)
    unknown = f", {missing} unknown" if missing else ""
    if not ages:
        return Text(f"ages  none known{unknown}")
    decades = Counter(int(age // 10) for age in ages)
    low, high = min(decades), max(decades)
    blocks = " .:-=+*#@" if ascii_only else BLOCKS
    most = max(decades.values())
    bars = "".join(blocks[math.ceil((len(blocks) - 1) * decades[decade] / most)] for decade in range(low, high + 1))
    return Text(
        f"ages  {_years(min(ages))} to {_years(max(ages))} years{unknown}   {10 * low} |{bars}| {10 * high + 9}, by decade"
    )


def _problem_table(title: str, problems: Sequence[Problem], folder: Path) -> Table:
    """A row a kind, those that keep scans out first."""
    kinds: dict[str, list[Problem]] = {}
    for problem in problems:
        kinds.setdefault(problem.kind, []).append(problem)
    ordered = sorted(kinds, key=lambda kind: (kind not in UNUSABLE_KINDS, list(MEANINGS).index(kind) if kind in MEANINGS else 99))
    table = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", title_style="bold", pad_edge=False, show_lines=False)
    table.add_column("", justify="right", no_wrap=True)
    table.add_column("kind", no_wrap=True)
    table.add_column("what it means, what to do", ratio=5)
    table.add_column("for example", ratio=6, overflow="fold")
    num_out = sum(kind in UNUSABLE_KINDS for kind in ordered)
    for number, kind in enumerate(ordered):
        meaning = MEANINGS.get(kind, _UNKNOWN)
        is_out = kind in UNUSABLE_KINDS
        what = Text.assemble(meaning.what, " ", (meaning.remedy, "italic"))
        table.add_row(
            str(len(kinds[kind])),
            Text(kind, style="red" if is_out else "yellow"),
            what if not is_out else Text.assemble(("Not used. ", "red"), what),
            _examples(kinds[kind], folder),
            end_section=0 < num_out == number + 1 < len(ordered),
        )
    return table


def _examples(problems: Sequence[Problem], folder: Path) -> Text:
    """The first problems of a kind: where, and what, unless that is the same for all."""
    found = [tuple(_plain(_below(text, folder)) for text in (problem.where, problem.what)) for problem in problems]
    told = {what.removeprefix(where).lstrip(": "): where for where, what in reversed(found)}
    lines = [(where, what) for what, where in reversed(told.items())]
    if len(lines) == 1 < len(found) and problems[0].kind != "duplicate":
        lines = [(where, "") for where, _ in found]
    shown = lines[:MAX_EXAMPLES]
    parts: list[str | tuple[str, str]] = []
    for where, what in shown:
        parts += [where, (f"\n{what}" if what else "", "dim"), "\n"]
    if len(found) > len(shown):
        parts.append(f"and {len(found) - len(shown)} more")
    else:
        parts.pop()
    return Text.assemble(*parts)


def _below(text: str, folder: Path) -> str:
    """A text with paths told from the folder on."""
    return text.replace(f"{folder.resolve()}/", "")


def _costs(checks: Sequence[SiteCheck]) -> Iterator[Text]:
    costs = [check.cost for check in checks if check.cost is not None]
    if not any(cost.num_images for cost in costs):
        return
    images = sum(cost.num_images for cost in costs)
    size = sum(cost.bytes_in_all for cost in costs)
    free = costs[0].bytes_free
    yield Text(f"disk  {_bytes(size)} for {_count(images, 'image')} in {_plain(str(costs[0].folder))}; {_bytes(free)} were free")
    decoded = [cost for cost in costs if math.isfinite(cost.decode_s)]
    reads = [cost.read_s for cost in costs if math.isfinite(cost.read_s)]
    from_cache = f"; from the cache {1e3 * statistics.fmean(reads):.0f} ms a scan" if reads else ""
    if decoded:
        seconds, number = sum(cost.decode_s for cost in decoded), sum(cost.num_missing for cost in decoded)
        each = seconds / number
        yield Text(
            f"time  {number} decoded in {_seconds(seconds)}, {_seconds(each)} each{from_cache}. A first epoch here finds them "
            f"decoded; elsewhere it waits about {_seconds(each * images)}."
        )
    elif reads:
        yield Text(f"time  all were in the cache already{from_cache}. The first epoch of a run here decodes nothing.")


def _verdict(
    checks: Sequence[SiteCheck], stops: Mapping[str, str], command: str, wrote: Sequence[str], *, alone_is_ready: bool
) -> RenderableType:
    scans = sum(len(check.manifest.scans) for check in checks)
    subjects = sum(check.manifest.num_subjects for check in checks)
    lines: list[RenderableType] = [Text(f"wrote {_plain(', '.join(wrote))}", style="dim"), Text()]
    if stops:
        several = len({check.site for check in checks} | stops.keys()) > 1
        for site, why in list(stops.items())[:MAX_NOTES]:
            lines.append(Text.assemble(("a run would stop: ", "bold red"), f"{_plain(site)}: " if several else "", _plain(why)))
        if len(stops) > MAX_NOTES:
            lines.append(Text(f"and so at {len(stops) - MAX_NOTES} more sites: see check.json"))
        lines.append(Text.assemble(("next  ", "dim"), "mend that, then  ", _plain(command)))
    else:
        ready = f"ready to train: {_count(scans, 'scan')} of {_count(subjects, 'subject')}"
        lines.append(Text(ready, style="bold green"))
        if alone_is_ready:
            lines.append(Text.assemble(("next  ", "dim"), _plain(command)))
        else:
            alone = (
                "as a site of a federation; alone it cannot pretrain, since no site has enough healthy subjects (see the note)"
            )
            lines.append(Text(alone, style="yellow"))
    return Padding(Group(*lines), (1, 0, 0, 0))


def _plain(text: str) -> str:
    """A text without what would steer a terminal."""
    return "".join(c if c.isprintable() or c == "\n" else "?" for c in text)


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _bytes(number: float) -> str:
    return f"{number / 1e9:.1f} GB" if number >= 1e9 else f"{number / 1e6:.1f} MB" if number >= 1e5 else f"{number / 1e3:.1f} kB"


def _seconds(number: float) -> str:
    return f"{number:.2g} s" if number < 10 else f"{number:.0f} s" if number < 120 else f"{number / 60:.0f} min"


# ---- the picture


def montage(checks: Sequence[SiteCheck], num_pictures: int) -> bytes | None:
    """A PNG of the middle slices of some scans from the cache: outliers first, then evenly through the others.

    Returns:
        None where there is no picture to show.
    """
    shown = _picked(checks, num_pictures)
    if not shown:
        return None
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    from core.report_figures import INK, SOFT, STYLE

    is_flat = all(check.store is not None and len(check.store.shape) == 3 for check, _, _ in shown)
    across = min(6 if is_flat else 3, len(shown))
    down = math.ceil(len(shown) / across)
    with rc_context(STYLE):
        pictures = [_slices(picture(check.store, number)) for check, number, _ in shown if check.store is not None]
        height, width = pictures[0].shape[:2]
        inches = 2.1 if is_flat else 4.1
        row = inches * min(height / width, 1.0) + 0.45 + 0.17 * max((len(why) for _, _, why in shown), default=0)
        spacing = ConstrainedLayoutEngine(wspace=0.03, hspace=0.02)
        figure = Figure(figsize=(inches * across + 0.3, row * down + 0.4), layout=spacing)
        told = "As a net is given them" + ("" if is_flat else "; left is left")
        figure.suptitle(told, fontsize=9, color=SOFT, x=0.008, ha="left")
        axes = figure.subplots(down, across, squeeze=False).ravel()
        for axis in axes[len(shown) :]:
            axis.set_axis_off()
        for axis, image, (check, number, why) in zip(axes, pictures, shown, strict=False):
            scan = check.manifest.scans[number]
            axis.imshow(image, cmap="gray", vmin=0.0, vmax=1.0, interpolation="nearest", aspect="equal")
            axis.set(xticks=[], yticks=[])
            age = "age unknown" if scan.age_years is None else f"{scan.age_years:.3g} years"
            name = _shortened(" ".join(filter(None, (scan.subject, scan.session))), 22 if is_flat else 44)
            axis.set_title(f"{name}\n{age}, {_shortened(scan.scanner, 14 if is_flat else 36)}", fontsize=8, pad=4, color=INK)
            for spine in axis.spines.values():
                spine.set(visible=bool(why), color="#D00000", linewidth=3.0)
            if why:
                axis.set_xlabel("\n".join(_shortened(text, 72) for text in why), fontsize=7.5, color="#D00000", loc="left")
        content = io.BytesIO()
        figure.savefig(content, format="png", dpi=120, metadata={"Software": None})
    return content.getvalue()


def _picked(checks: Sequence[SiteCheck], num_pictures: int) -> list[tuple[SiteCheck, int, list[str]]]:
    """Scans to show, each as its site, its number there and the reasons why it is odd."""
    odd: list[tuple[SiteCheck, int, list[str]]] = []
    plain: list[tuple[SiteCheck, int, list[str]]] = []
    for check in checks:
        if check.store is None or len(check.store.shape) < 3:
            continue
        reasons: dict[str, list[str]] = {}
        for problem in check.outliers:
            reasons.setdefault(problem.where, []).append(f"{problem.kind.replace('_', ' ')}: {problem.what}")
        for number, scan in enumerate(check.manifest.scans):
            why = reasons.get(str(scan.path), [])
            (odd if why else plain).append((check, number, why))
    odd.sort(key=lambda entry: -len(entry[2]))
    kept = odd[:num_pictures]
    room = min(num_pictures - len(kept), len(plain))
    return kept + [plain[round(index)] for index in np.linspace(0, len(plain) - 1, room)]


def _slices(image: NDArray[np.float32]) -> NDArray[np.float32]:
    """A volume (C, X, Y, Z) as its middle slices beside each other, seen from above, the front and the left.

    Returns:
        Array (height, width) from 0 to 1; of a flat picture (C, X, Y) that picture, (Y, X) or (Y, X, 3), X from left to right.
    """
    if image.ndim == 3:
        flat = image.T if len(image) == 3 else image[0].T
        return np.clip(flat, 0.0, 1.0)
    volume = image.mean(axis=0) if len(image) > 1 else image[0]
    x, y, z = (size // 2 for size in volume.shape)
    faces = [np.flipud(face.T) for face in (volume[:, :, z], volume[:, y, :], volume[x, :, :])]
    height = max(len(face) for face in faces)
    padded = []
    for face in faces:
        above = (height - len(face)) // 2
        padded.append(np.pad(face, ((above, height - len(face) - above), (0, 1))))
    canvas = np.concatenate(padded, axis=1)
    low, high = float(canvas.min()), float(np.percentile(canvas, 99.5))
    return np.clip((canvas - low) / max(high - low, 1e-9), 0.0, 1.0)


def _shortened(text: str, length: int) -> str:
    text = _plain(" ".join(text.split()))
    return text if len(text) <= length else text[: length - 1] + "…"
