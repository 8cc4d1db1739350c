"""FairKL on real images without a network connection: handwritten digits that colour gives away.

Each of scikit-learn's 1,797 digits, 8 x 8, is painted on a coloured background. Among the images to learn from, the colour is the
digit's own with probability rho (bias-aligned), otherwise one of the nine others (bias-conflicting); every test image is painted
in all ten colours, so that colour tells nothing. This is Biased-MNIST (Bahng et al., ICML 2020) as Barbano et al. (ICLR 2023) use
it, small enough for a laptop: `python -m simulations.coloured_digits`.

What is alike for every method: the encoder, whose representation h is also the embedding z, so that what is debiased is what
is used; Adam with weight decay, gradients cut at a norm of 1, plain batches, one view of each image. Cross-entropy trains the
encoder with its own linear classifier; after a contrastive objective, logistic regression on the frozen h at unit length is
fitted to the same biased images.

A method's setting, the weight of its debiasing term out of `WEIGHTS` and a short or a long training, is the one that scores best
on validation images painted with the same rho as the training images: the mean of the accuracy on bias-aligned and on
bias-conflicting ones, all seeds together, so that the few conflicting images weigh half. Test images take no part: they are the
same for every seed, and painted after the settings are chosen. A seed draws which other images are for training, the colours and
the initialisation.

What to know of the choices: network, optimiser and the forms of the terms were chosen with other seeds on repainted validation
images. The short training was added after a first test of the long one alone, where it was the others that lost: at rho .99
EnD had .37, released FairKL .34, FairKL .66. One choice changes the order: with a linear head between h and z, rho .99 and .98,
EnD has .63 and .67, FairKL .58 and .69; without it EnD has .54 and .61, FairKL .66 and .72.

Shape legend: N images, F features of h.
"""

import io
import json
import math
import multiprocessing
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, TypeVar

import numpy as np
import numpy.typing as npt
import torch
import typer
from matplotlib import rc_context
from matplotlib.figure import Figure
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize

from core import seeding
from core.checkpoint import write_atomically
from core.losses import EmbeddedViews, EnD, EpsSupInfoNCE, FairKL, Kernel, Objective, ReleasedFairKL, SupCon
from core.report_figures import COLOURS, MARKERS, STYLE

# Red, green, blue of the background of digit 0, 1, ...; ink is white, so that no channel of a background may be 1.
PALETTE = 0.8 * torch.tensor(
    [[1, 0, 0], [0, 1, 0], [0, 0, 1], [1, 1, 0], [1, 0, 1], [0, 1, 1], [1, 0.5, 0], [0.5, 0, 1], [0, 0.5, 0.5], [0.5, 0.5, 0.5]]
)
NUM_TEST, NUM_VALIDATION = 357, 340
TEST_SEED = 12345
FEATURES, EMBEDDING_SIZE = 64, 32
BATCH_SIZE = 275  # a quarter of the training images
LEARNING_RATE, WEIGHT_DECAY, LARGEST_GRADIENT = 3e-3, 1e-4, 1.0
WEIGHTS = (10.0, 30.0, 100.0)
Number = TypeVar("Number", int, float)
Debias = EnD | FairKL | ReleasedFairKL


@dataclass(frozen=True, order=True)
class Setting:
    """What is chosen on validation images: the weight of the debiasing term, 0 without one, and how long to train."""

    weight: float
    num_epochs: int


@dataclass(frozen=True, kw_only=True)
class Method:
    """What an encoder is trained with: an objective, cross-entropy where there is none, and a debiasing term."""

    objective: Objective | None = None
    debias: Debias | None = None

    def settings(self, num_epochs: Sequence[int]) -> list[Setting]:
        """Settings that are tried."""
        return [Setting(weight, epochs) for weight in (WEIGHTS if self.debias else (0.0,)) for epochs in num_epochs]


_EPS = EpsSupInfoNCE(temperature=0.1, margin=0.25, label="digit")
_SAME_DIGIT = Kernel(bandwidths={"digit": 0})
METHODS: dict[str, Method] = {
    "cross-entropy": Method(),
    "SupCon": Method(objective=SupCon(temperature=0.1, label="digit")),
    "eps-SupInfoNCE": Method(objective=_EPS),
    "eps-SupInfoNCE + EnD": Method(objective=_EPS, debias=EnD(label="digit", bias="colour")),
    "eps-SupInfoNCE + FairKL (released)": Method(objective=_EPS, debias=ReleasedFairKL(label="digit", bias="colour")),
    "eps-SupInfoNCE + FairKL (paper)": Method(
        objective=_EPS, debias=FairKL(kernel=_SAME_DIGIT, bias="colour", statistics="per_batch", min_weight=1)
    ),
}


@dataclass(frozen=True)
class ColouredDigits:
    """Painted digits.

    Attributes:
        images: (N, 3, 8, 8), from 0 to 1.
        digit: (N,) 0 to 9.
        colour: (N,) 0 to 9, the row of `PALETTE`.
    """

    images: Tensor
    digit: Tensor
    colour: Tensor

    @property
    def aligned(self) -> Tensor:
        """(N,) true where the colour is the digit's own."""
        return self.colour == self.digit


@cache
def strokes() -> tuple[Tensor, Tensor]:
    """Ink of every image, (1797, 8, 8) from 0 to 1, and its digit, (1797,)."""
    digits = load_digits()
    return torch.from_numpy(digits.images).float() / 16, torch.from_numpy(digits.target)


@cache
def image_numbers() -> tuple[Tensor, Tensor]:
    """Which images are for learning and which for testing, whatever the seed."""
    order = torch.from_numpy(np.random.default_rng(TEST_SEED).permutation(len(strokes()[0])))
    return order[NUM_TEST:], order[:NUM_TEST]


def painted(numbers: Tensor, colour: Tensor) -> ColouredDigits:
    """Images (N,), each on a background of its colour (N,): white ink covers the background as far as it is there."""
    ink, digit = strokes()
    background = PALETTE[colour][:, :, None, None]
    return ColouredDigits(background + (1 - background) * ink[numbers][:, None], digit[numbers], colour)


def biased_colours(digit: Tensor, correlation: float, draw: torch.Generator) -> Tensor:
    """(N,) the digit's own colour with probability `correlation`, otherwise one of the nine others, each as likely."""
    other = (digit + torch.randint(1, 10, digit.shape, generator=draw)) % 10
    return torch.where(torch.rand(digit.shape, generator=draw) < correlation, digit, other)


def biased_images(correlation: float, seed: int) -> tuple[ColouredDigits, ColouredDigits]:
    """Training and validation images of a seed, painted alike."""
    numbers = image_numbers()[0]
    numbers = numbers[torch.randperm(len(numbers), generator=seeding.generator(seed, "split"))]
    colour = biased_colours(strokes()[1][numbers], correlation, seeding.generator(seed, "colours"))
    validation, train = slice(NUM_VALIDATION), slice(NUM_VALIDATION, None)
    return painted(numbers[train], colour[train]), painted(numbers[validation], colour[validation])


def unbiased_images() -> ColouredDigits:
    """Every test image in every colour."""
    numbers = image_numbers()[1]
    return painted(numbers.repeat(10), torch.arange(10).repeat_interleave(len(numbers)))


class Classifier(nn.Module):
    """An encoder of 38 thousand parameters, images (N, 3, 8, 8) to h (N, F), and a linear map to the logits of ten digits."""

    def __init__(self, *, unit_length: bool) -> None:
        super().__init__()
        self.unit_length = unit_length
        self.encoder = nn.Sequential(
            *(nn.Conv2d(3, 16, kernel_size=3, padding=1), nn.ReLU()),
            *(nn.Conv2d(16, 32, kernel_size=3, stride=2, padding=1), nn.ReLU()),
            *(nn.Flatten(), nn.Linear(32 * 4 * 4, FEATURES)),
        )
        self.linear = nn.Linear(FEATURES, 10)

    def represent(self, images: Tensor) -> Tensor:
        """Representations (N, F)."""
        h_NF: Tensor = self.encoder(images)
        return normalize(h_NF, dim=1) if self.unit_length else h_NF

    def forward(self, images: Tensor) -> Tensor:
        """Logits (N, 10)."""
        logits: Tensor = self.linear(self.represent(images))
        return logits


def fit(method: Method, setting: Setting, train: ColouredDigits, seed: int, *, with_head: bool = False) -> Classifier:
    """Train an encoder with a method in a setting, and a linear classifier behind it, on the same images.

    With a head, the embedding z of a contrastive objective is a linear map of h, which is thrown away afterwards.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seeding.seed(seed, "initialisation"))
        classifier = Classifier(unit_length=method.objective is not None)
        head = nn.Linear(FEATURES, EMBEDDING_SIZE) if with_head else nn.Identity()
    parameters = [*classifier.parameters(), *head.parameters()]
    order = seeding.generator(seed, "batches")
    optimiser = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    num_batches = math.ceil(len(train.digit) / BATCH_SIZE)
    num_steps = setting.num_epochs * num_batches
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, LEARNING_RATE, total_steps=num_steps, pct_start=0.1)
    for _ in range(setting.num_epochs):
        for batch in torch.randperm(len(train.digit), generator=order).chunk(num_batches):
            images, digit, colour = train.images[batch], train.digit[batch], train.colour[batch]
            if method.objective is None:
                loss = cross_entropy(classifier(images), digit)
            else:
                views = EmbeddedViews((head(classifier.encoder(images)),), {"digit": digit, "colour": colour})
                loss = method.objective.of(views)
                if method.debias is not None:
                    loss = loss + setting.weight * method.debias.of(views)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(parameters, LARGEST_GRADIENT)
            optimiser.step()
            schedule.step()
    if method.objective is not None:
        read_out(classifier, train)
    return classifier


@torch.no_grad()
def read_out(classifier: Classifier, train: ColouredDigits) -> None:
    """Fit the linear map to the frozen representations by logistic regression."""
    regression = LogisticRegression(max_iter=1000).fit(classifier.represent(train.images).numpy(), train.digit.numpy())
    classifier.linear.weight.copy_(torch.from_numpy(regression.coef_))
    classifier.linear.bias.copy_(torch.from_numpy(regression.intercept_))


@torch.no_grad()
def recognised(classifier: Classifier, images: ColouredDigits) -> Tensor:
    """(N,) true where the digit is recognised."""
    logits: Tensor = classifier(images.images)
    return logits.argmax(dim=1) == images.digit


def balanced_accuracy(classifiers: Sequence[Classifier], validation: Sequence[ColouredDigits]) -> float:
    """Mean of the accuracy on bias-aligned and on bias-conflicting images of all seeds together; of one if there is no other."""
    right = torch.cat([recognised(classifier, images) for classifier, images in zip(classifiers, validation, strict=True)])
    aligned = torch.cat([images.aligned for images in validation])
    return statistics.fmean(float(right[group].float().mean()) for group in (aligned, ~aligned) if group.any())


def choose_setting(
    fitted: Mapping[Setting, Sequence[Classifier]], validation: Sequence[ColouredDigits]
) -> tuple[Setting, dict[Setting, float]]:
    """The setting that scores best on the seeds' validation images, of equals the lightest, then the shortest; all scores.

    Args:
        fitted: for each setting the classifiers of the seeds.
        validation: the seeds' validation images, in the same order.
    """
    scores = {setting: balanced_accuracy(fitted[setting], validation) for setting in sorted(fitted)}
    return max(scores, key=lambda setting: scores[setting]), scores


@dataclass(frozen=True)
class Trial:
    """One training."""

    method: str
    setting: Setting
    correlation: float
    seed: int
    with_head: bool = False


State = dict[str, npt.NDArray[np.float32]]


def run_trial(trial: Trial) -> State:
    """The parameters of the trial's classifier; on one thread, so that they are the same however many trials run at once."""
    torch.set_num_threads(1)
    train, _ = biased_images(trial.correlation, trial.seed)
    classifier = fit(METHODS[trial.method], trial.setting, train, trial.seed, with_head=trial.with_head)
    return {name: values.numpy() for name, values in classifier.state_dict().items()}


def run_trials(trials: Sequence[Trial], num_workers: int) -> Iterator[State]:
    """What `run_trial` returns for each, in their order; with more than one worker each is a process."""
    if num_workers == 1:
        yield from map(run_trial, trials)
        return
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn")) as pool:
        yield from pool.map(run_trial, trials)


@dataclass(frozen=True)
class Result:
    """A method at one correlation.

    Attributes:
        method: its name in `METHODS`.
        correlation: rho.
        setting: the one chosen.
        validation: the score of each setting tried.
        accuracies: on the unbiased test images, of each seed.
    """

    method: str
    correlation: float
    setting: Setting
    validation: dict[Setting, float]
    accuracies: list[float]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.accuracies)

    @property
    def deviation(self) -> float:
        """Standard deviation over the seeds; 0 of a single one."""
        return statistics.stdev(self.accuracies) if len(self.accuracies) > 1 else 0.0

    def to_json(self) -> dict[str, object]:
        """As it is written."""
        return {
            "method": self.method,
            "correlation": self.correlation,
            **asdict(self.setting),
            "accuracies": self.accuracies,
            "tried": [{**asdict(setting), "validation": score} for setting, score in self.validation.items()],
        }


def evaluate(trials: Iterable[Trial], states: Iterable[State]) -> list[Result]:
    """Choose each method's setting at each correlation on validation images, and only then test what was chosen."""
    fitted: dict[tuple[str, float], dict[Setting, list[Classifier]]] = {}
    seeds: dict[float, list[int]] = {}
    for trial, state in zip(trials, states, strict=True):
        classifier = Classifier(unit_length=METHODS[trial.method].objective is not None)
        classifier.load_state_dict({name: torch.from_numpy(values) for name, values in state.items()})
        fitted.setdefault((trial.method, trial.correlation), {}).setdefault(trial.setting, []).append(classifier)
        if trial.seed not in seeds.setdefault(trial.correlation, []):
            seeds[trial.correlation].append(trial.seed)
    validation = {correlation: [biased_images(correlation, seed)[1] for seed in seeds[correlation]] for correlation in seeds}
    chosen = {key: choose_setting(by_setting, validation[key[1]]) for key, by_setting in fitted.items()}
    test = unbiased_images()
    return [
        Result(*key, setting, scores, [float(recognised(one, test).float().mean()) for one in fitted[key][setting]])
        for key, (setting, scores) in chosen.items()
    ]


def num_conflicting(correlation: float, num_seeds: int) -> float:
    """Bias-conflicting training images, mean over the seeds."""
    return statistics.fmean(float((~biased_images(correlation, seed)[0].aligned).sum()) for seed in range(num_seeds))


def tabulate(results: Sequence[Result], num_seeds: int) -> Table:
    """A row for each method, a column for each correlation, the best in bold."""
    table = Table(
        title=f"coloured digits: accuracy when colour tells nothing, mean ± standard deviation over {num_seeds} seeds",
        caption="\\[weight of the debiasing term, epochs]: chosen on validation images as biased as the training images,\n"
        "by the mean of the accuracy on bias-aligned and on bias-conflicting ones; no test image took part",
    )
    table.add_column("", no_wrap=True)
    correlations = sorted({result.correlation for result in results}, reverse=True)
    for correlation in correlations:
        table.add_column(
            f"rho {correlation:g}\n{num_conflicting(correlation, num_seeds):.0f} conflicting", no_wrap=True, justify="right"
        )
    best = {rho: max(result.mean for result in results if result.correlation == rho) for rho in correlations}
    by_key = {(result.method, result.correlation): result for result in results}
    for method in METHODS:
        cells = []
        for rho in correlations:
            result = by_key[method, rho]
            figure = f"{result.mean:.3f} ± {result.deviation:.3f}"
            weight = f"{result.setting.weight:g}, " if METHODS[method].debias else ""
            setting = f"[{weight}{result.setting.num_epochs}]".rjust(9).replace("[", r"\[")
            cells.append(f"{f'[bold]{figure}[/bold]' if result.mean == best[rho] else figure} {setting}")
        table.add_row(method, *cells)
    return table


def draw(results: Sequence[Result]) -> bytes:
    """PNG: what is seen in training, and accuracy against correlation with its range over the seeds."""
    correlations = sorted({result.correlation for result in results}, reverse=True)
    with rc_context(STYLE):
        figure = Figure(figsize=(11, 4.2), layout="constrained")
        seen, lines = figure.subplots(1, 2, width_ratios=(4, 5))
        first_of_digit = torch.stack([(strokes()[1] == digit).nonzero()[0, 0] for digit in range(10)])
        rows = [painted(first_of_digit, (torch.arange(10) + shift) % 10).images for shift in (0, 3)]
        framed = nn.functional.pad(torch.stack(rows), (1, 1, 1, 1), value=1.0)
        seen.imshow(framed.permute(0, 3, 1, 4, 2).reshape(20, 100, 3).numpy(), interpolation="nearest")
        seen.spines[:].set_visible(False)
        seen.set_xticks([])
        seen.set_yticks([4.5, 14.5], ["bias-aligned", "bias-conflicting"])
        seen.set_title("In training, colour nearly always agrees with the digit")
        for number, method in enumerate(METHODS):
            of_method = {result.correlation: result for result in results if result.method == method}
            ordered = [of_method[correlation] for correlation in correlations]
            means = [result.mean for result in ordered]
            ranges = [
                [result.mean - min(result.accuracies) for result in ordered],
                [max(result.accuracies) - result.mean for result in ordered],
            ]
            places = [place + 0.05 * (number - 2.5) for place in range(len(correlations))]
            look = {"color": COLOURS[number], "marker": MARKERS[number]}
            lines.errorbar(places, means, yerr=ranges, label=method, capsize=2, linewidth=1.5, markersize=5, **look)
        lines.set_xticks(range(len(correlations)), [f"{correlation:g}" for correlation in correlations])
        lines.set_xlabel("correlation rho of colour and digit in training")
        lines.set_ylabel("accuracy when colour tells nothing")
        lines.set_ylim(0, 1)
        lines.set_title("Mean, lowest and highest of the seeds")
        seen.legend(*lines.get_legend_handles_labels(), loc="upper center", bbox_to_anchor=(0.5, -0.2))
        content = io.BytesIO()
        figure.savefig(content, dpi=150, format="png")
    return content.getvalue()


def parse(text: str, kind: type[Number], low: Number, high: Number) -> list[Number]:
    """Numbers from low to high, separated by commas; each once, in order."""
    try:
        numbers = [kind(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    if not numbers or not all(low <= number <= high for number in numbers):
        raise typer.BadParameter(f"must be numbers from {low} to {high}, separated by commas, got {text!r}.")
    return sorted(set(numbers))


def main(
    seeds: Annotated[int, typer.Option(min=1, help="Repetitions: split, colours and initialisation 0, 1, ...")] = 5,
    correlations: Annotated[
        str, typer.Option(help="Shares of the training images whose colour is their digit's own, separated by commas.")
    ] = "0.99,0.98,0.97,0.95",
    output: Annotated[Path, typer.Option(help="Folder for the figure and its numbers.")] = Path("runs/coloured-digits"),
    workers: Annotated[
        int, typer.Option(min=1, help="Trainings at once, each on one core. Default: one a core.")
    ] = os.cpu_count() or 1,
    epochs: Annotated[
        str, typer.Option(help="Lengths of training to try, in passes over the 1,100 training images, separated by commas.")
    ] = "20,60",
    with_head: Annotated[
        bool, typer.Option("--with-head", help="Embed h by a linear head, as in SimCLR, instead of taking h as the embedding.")
    ] = False,
) -> None:
    """Learn digits whose colour gives them away, then test where it does not: does debiasing find the shape?

    Trains cross-entropy, SupCon and eps-SupInfoNCE, the last also with EnD and with FairKL, as the authors' code and as the paper
    have it. The weight of a debiasing term and the length of training are chosen on images as biased as those of training.

    Prints a table and writes coloured_digits.png and coloured_digits.json. The same options give the same numbers.

    For a first look: --seeds 1 --correlations 0.99
    """
    started = time.monotonic()
    chosen, lengths = parse(correlations, float, 0.0, 1.0), parse(epochs, int, 1, 10_000)
    trials = [
        Trial(name, setting, correlation, seed, with_head)
        for correlation in chosen
        for name, method in METHODS.items()
        for setting in method.settings(lengths)
        for seed in range(seeds)
    ]
    with Progress(transient=True) as bar:
        tracked = bar.track(run_trials(trials, workers), total=len(trials), description="training")
        results = evaluate(trials, tracked)
    Console(width=max(100, 42 + 28 * len(chosen))).print(tabulate(results, seeds))
    write_atomically(output / "coloured_digits.png", draw(results))
    content = {"seeds": seeds, "with_head": with_head, "results": [result.to_json() for result in results]}
    write_atomically(output / "coloured_digits.json", (json.dumps(content, indent=1) + "\n").encode())
    typer.echo(f"{len(trials)} trainings in {time.monotonic() - started:.0f} s")
    typer.echo(f"figure: {output / 'coloured_digits.png'}")
    typer.echo(f"figures: {output / 'coloured_digits.json'}")


if __name__ == "__main__":
    typer.run(main)
