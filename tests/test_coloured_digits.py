"""Coloured digits: painted as promised, chosen without a look at the test, and run from end to end."""

import inspect
import json
import math
from pathlib import Path

import pytest
import torch
from typer import BadParameter

from core.losses import FairKL
from simulations import coloured_digits
from simulations.coloured_digits import (
    METHODS,
    NUM_TEST,
    PALETTE,
    WEIGHTS,
    Classifier,
    ColouredDigits,
    Setting,
    Trial,
    balanced_accuracy,
    biased_colours,
    biased_images,
    choose_setting,
    fit,
    image_numbers,
    main,
    painted,
    parse,
    run_trials,
    strokes,
    unbiased_images,
)


class Answers(Classifier):
    """Knows the answer to every image, whatever it shows."""

    def __init__(self, answers: list[int]) -> None:
        super().__init__(unit_length=False)
        self.answers = answers

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        assert len(images) == len(self.answers)
        return torch.nn.functional.one_hot(torch.tensor(self.answers), 10).float()


def blank(digit: list[int], colour: list[int]) -> ColouredDigits:
    return ColouredDigits(torch.zeros(len(digit), 3, 8, 8), torch.tensor(digit), torch.tensor(colour))


@pytest.mark.parametrize("correlation", [0.99, 0.95, 0.5])
def test_colours_agree_with_the_digit_as_often_as_asked(correlation: float) -> None:
    digit = torch.arange(10).repeat(2000)
    colour = biased_colours(digit, correlation, torch.Generator().manual_seed(0))
    share = float((colour == digit).float().mean())
    assert abs(share - correlation) < 4 * math.sqrt(correlation * (1 - correlation) / len(digit))
    # The nine other colours are equally likely.
    away = ((colour - digit) % 10)[colour != digit].bincount(minlength=10)[1:]
    expected = len(digit) * (1 - correlation) / 9
    assert ((away - expected).abs() < 5 * math.sqrt(expected)).all()


def test_ink_and_background_are_what_was_painted() -> None:
    train, _ = biased_images(0.9, seed=0)
    background = PALETTE[train.colour][:, :, None, None]
    ink = (train.images - background) / (1 - background)
    torch.testing.assert_close(ink, ink[:, :1].expand_as(ink), atol=1e-5, rtol=0)
    # Every image is one of scikit-learn's, with its digit, to the sixteenth.
    known = {tuple((16 * image).flatten().int().tolist()): int(digit) for image, digit in zip(*strokes(), strict=True)}
    recovered = (16 * ink[:, 0]).round().int().flatten(1).tolist()
    assert [known[tuple(image)] for image in recovered] == train.digit.tolist()
    # Where there is no ink the colour shows, and no two are alike.
    assert len(PALETTE.unique(dim=0)) == 10
    bare = ink[:, 0] == 0
    torch.testing.assert_close(train.images.movedim(1, -1)[bare], background.expand_as(train.images).movedim(1, -1)[bare])


def test_every_test_image_has_every_colour() -> None:
    test = unbiased_images()
    assert len(test.digit) == 10 * NUM_TEST
    seen = torch.zeros(10, 10, dtype=torch.long)
    seen.index_put_((test.digit, test.colour), torch.tensor(1), accumulate=True)
    assert (seen == seen[:, :1]).all()


def test_splits_share_no_image_and_change_with_the_seed() -> None:
    learning, testing = image_numbers()
    assert sorted(torch.cat([learning, testing]).tolist()) == list(range(1797))
    train, validation = biased_images(0.99, seed=0)
    assert len(train.digit) + len(validation.digit) == len(learning)
    digits = torch.cat([train.digit, validation.digit])
    assert digits.bincount().tolist() == strokes()[1][learning].bincount().tolist()
    assert not torch.equal(train.digit, biased_images(0.99, seed=1)[0].digit)
    # Less correlation only repaints: the same images, and what conflicted still does.
    looser, _ = biased_images(0.9, seed=0)
    assert torch.equal(train.digit, looser.digit)
    assert not (looser.aligned & ~train.aligned).any()


def test_few_conflicting_images_weigh_half() -> None:
    # Three of four aligned right, none of one conflicting: (3/4 + 0) / 2.
    images = blank(digit=[1, 2, 3, 4, 5], colour=[1, 2, 3, 4, 6])
    assert balanced_accuracy([Answers([1, 2, 3, 0, 6])], [images]) == pytest.approx(0.375)
    # Seeds are counted together, also one that has nothing conflicting: (5/6 + 0) / 2.
    more = blank(digit=[7, 8], colour=[7, 8])
    assert balanced_accuracy([Answers([1, 2, 3, 0, 6]), Answers([7, 8])], [images, more]) == pytest.approx(5 / 12)
    assert balanced_accuracy([Answers([7, 0])], [more]) == pytest.approx(0.5)


def test_the_setting_is_chosen_on_validation_images_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    assert list(inspect.signature(choose_setting).parameters) == ["fitted", "validation"]
    assert list(inspect.signature(fit).parameters) == ["method", "setting", "train", "seed", "with_head"]
    monkeypatch.setattr(coloured_digits, "unbiased_images", lambda: pytest.fail("looked at the test"))
    images = blank(digit=[1, 2], colour=[1, 3])
    by_colour, by_shape, also_by_shape = Answers([1, 3]), Answers([1, 2]), Answers([1, 2])
    light, heavy, heavy_long = Setting(1.0, 60), Setting(3.0, 20), Setting(3.0, 60)
    setting, scores = choose_setting({heavy_long: [also_by_shape], light: [by_colour], heavy: [by_shape]}, [images])
    assert (setting, scores) == (heavy, {light: 0.5, heavy: 1.0, heavy_long: 1.0})


def test_test_images_are_painted_after_all_settings_are_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    trials = [Trial(name, setting, 0.5, 0) for name, method in METHODS.items() for setting in method.settings([1])[:2]]
    steps: list[str] = []

    def choose(*arguments: object) -> tuple[Setting, dict[Setting, float]]:
        steps.append("choose")
        return choose_setting(*arguments)

    def paint() -> ColouredDigits:
        steps.append("test")
        return unbiased_images()

    monkeypatch.setattr(coloured_digits, "choose_setting", choose)
    monkeypatch.setattr(coloured_digits, "unbiased_images", paint)
    results = coloured_digits.evaluate(trials, run_trials(trials, 1))
    assert steps == [*["choose"] * len(METHODS), "test"]
    assert [result.method for result in results] == list(METHODS)


def test_a_term_of_weight_changes_the_encoder_and_a_seed_repeats_it() -> None:
    train, _ = biased_images(0.9, seed=0)
    method = METHODS["eps-SupInfoNCE + FairKL (paper)"]
    assert isinstance(method.debias, FairKL)
    first, again, heavier = (fit(method, Setting(weight, 1), train, seed=0) for weight in (3.0, 3.0, 30.0))
    for one, two in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, two)
    assert not torch.equal(first.encoder[0].weight, heavier.encoder[0].weight)


def test_all_learn_digits_when_colour_is_no_help() -> None:
    train, validation = biased_images(0.1, seed=0)
    classifier = fit(METHODS["cross-entropy"], Setting(0.0, 15), train, seed=0)
    assert balanced_accuracy([classifier], [validation]) > 0.8


def test_a_head_changes_what_the_loss_sees_and_is_thrown_away() -> None:
    train, _ = biased_images(0.9, seed=0)
    method, setting = METHODS["eps-SupInfoNCE"], Setting(0.0, 1)
    plain, headed = (fit(method, setting, train, seed=0, with_head=with_head) for with_head in (False, True))
    assert list(plain.state_dict()) == list(headed.state_dict())
    assert not torch.equal(plain.encoder[0].weight, headed.encoder[0].weight)
    # Cross-entropy has its own classifier and no embedding.
    plain, headed = (fit(METHODS["cross-entropy"], setting, train, seed=0, with_head=w) for w in (False, True))
    assert torch.equal(plain.encoder[0].weight, headed.encoder[0].weight)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(seeds=1, correlations="0.9", output=tmp_path / "one", workers=1, epochs="1,2")
    printed = capsys.readouterr().out
    assert all(name in printed for name in METHODS)
    assert "rho 0.9" in printed
    png = (tmp_path / "one/coloured_digits.png").read_bytes()
    assert png.startswith(b"\x89PNG")
    content = json.loads((tmp_path / "one/coloured_digits.json").read_text())
    assert [result["method"] for result in content["results"]] == list(METHODS)
    for result in content["results"]:
        tried = [(row["weight"], row["num_epochs"]) for row in result["tried"]]
        weights = WEIGHTS if METHODS[result["method"]].debias else (0.0,)
        assert tried == [(weight, epochs) for weight in weights for epochs in (1, 2)]
        assert (result["weight"], result["num_epochs"]) in tried
        [accuracy] = result["accuracies"]
        assert 0 <= accuracy <= 1


@pytest.mark.slow
def test_processes_give_the_same_numbers() -> None:
    trials = [Trial(name, Setting(3.0, 1), 0.9, 0) for name in ("cross-entropy", "eps-SupInfoNCE + FairKL (paper)")]
    for one, two in zip(run_trials(trials, 1), run_trials(trials, 2), strict=True):
        assert list(one) == list(two)
        assert all((one[name] == two[name]).all() for name in one)


@pytest.mark.parametrize("text", ["", "a", "0.9,1.1", "-0.1", "0.9;0.8", "nan"])
def test_bad_numbers_are_refused(text: str) -> None:
    with pytest.raises(BadParameter, match=r"from 0\.0 to 1\.0, separated by commas"):
        parse(text, float, 0.0, 1.0)


def test_numbers_are_sorted_and_taken_once() -> None:
    assert parse("0.99, 0.95,0.99", float, 0.0, 1.0) == [0.95, 0.99]
    assert parse("60,20", int, 1, 100) == [20, 60]


def test_white_ink_hides_the_background() -> None:
    numbers = torch.arange(20)
    ink = strokes()[0][numbers]
    images = painted(numbers, torch.zeros(20, dtype=torch.long)).images
    torch.testing.assert_close(images.movedim(1, -1)[ink == 1], torch.ones(int((ink == 1).sum()), 3))
