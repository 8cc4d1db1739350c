"""Encoders, the projector of pretraining, classifier and segmenter of fine-tuning. Nothing here couples scans: no BatchNorm."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, TypeVar

import torch
from torch import Tensor, nn

from core.seeding import seed

CONSTANTS = "encoder.standardise."
MAX_DECODER_CHANNELS = 128  # more would make the decoder of densenet121 ten times the encoder
CONVOLUTION = {2: nn.Conv2d, 3: nn.Conv3d}


class Block(nn.Sequential):
    """Convolution, group normalisation, ReLU; halves the grid when ``stride`` is 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int, spatial_dims: int) -> None:
        super().__init__(
            CONVOLUTION[spatial_dims](in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(math.gcd(8, out_channels), out_channels),
            nn.ReLU(),
        )


class Encoder(nn.Module):
    """A net from volumes (N, C, X, Y, Z), images (N, C, X, Y), or rows of I features (N, I), to representations h (N, F)."""

    num_features: int

    @property
    def parts(self) -> list[nn.Module]:
        """What it is made of, from the input on, without what has no weights to train: the layers that rates decay over."""
        raise NotImplementedError

    @property
    def input_scale(self) -> Tensor:
        """What counts as 1 in the inputs, the unit in which views add noise: (I,), or (1,) for all voxels."""
        return torch.ones(1, device=next(self.parameters()).device)

    @property
    def pyramid_channels(self) -> tuple[int, ...]:
        """Channels of each level of the `pyramid`; none where there is no pyramid: rows of features have no grid."""
        return ()

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """What the encoder makes of images on its way to h, (N, C, *grid): the finest level first, each next half its grid."""
        raise NotImplementedError


class SmallEncoder(Encoder):
    """Four strided stages of convolutions, then the mean over the grid: fast on two cores."""

    def __init__(self, num_inputs: int, width: int, spatial_dims: int) -> None:
        super().__init__()
        channels = [num_inputs, width, 2 * width, 4 * width, 16 * width]
        self.stages = nn.Sequential(*(Block(a, b, 2, spatial_dims) for a, b in pairwise(channels)))
        self.num_features = channels[-1]

    @property
    def parts(self) -> list[nn.Module]:
        """The stages."""
        return list(self.stages)

    def forward(self, images: Tensor) -> Tensor:
        """Representations h, (N, F), of volumes (N, C, X, Y, Z) or images (N, C, X, Y)."""
        h_NF: Tensor = self.stages(images).mean(dim=tuple(range(2, images.ndim)))
        return h_NF

    @property
    def pyramid_channels(self) -> tuple[int, ...]:
        """Of the four stages."""
        return tuple(stage[0].out_channels for stage in self.stages)  # type: ignore[index]

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """What each stage gives: half, a quarter, an eighth and a sixteenth of the grid of the images."""
        return _levels(images, self.parts)


class Standardise(nn.Module):
    """Rows as their difference from the mean over all sites, in standard deviations; 0 where a value is missing; site erased.

    All of it are constants of a run, weights that no one trains: a checkpoint carries them; they travel once, before the rounds.

    Args:
        num_inputs: features of a row.
        num_erased: directions of the standardised features that an eraser has taken out.
    """

    def __init__(self, num_inputs: int, num_erased: int = 0) -> None:
        super().__init__()
        self.mean = nn.Parameter(torch.zeros(num_inputs), requires_grad=False)
        self.scale = nn.Parameter(torch.ones(num_inputs), requires_grad=False)
        self.directions = nn.Parameter(torch.zeros(num_erased, num_inputs), requires_grad=False)
        self.erased_scale = nn.Parameter(torch.ones(num_inputs), requires_grad=False)

    def forward(self, rows_NI: Tensor) -> Tensor:
        """Standardised rows without the directions, (N, I), each feature in standard deviations of what is left of it."""
        standard_NI = ((rows_NI - self.mean) / self.scale).nan_to_num(nan=0.0)
        return (standard_NI - standard_NI @ self.directions.T @ self.directions) / self.erased_scale


class RowEncoder(Encoder):
    """Standardisation, then layers of equal width, each a linear map and GELU; h is what the last gives."""

    def __init__(self, num_inputs: int, width: int, depth: int) -> None:
        super().__init__()
        self.standardise = Standardise(num_inputs)
        sizes = [num_inputs, *[width] * depth]
        self.layers = nn.Sequential(*(nn.Sequential(nn.Linear(a, b), nn.GELU()) for a, b in pairwise(sizes)))
        self.num_features = width

    @property
    def parts(self) -> list[nn.Module]:
        """The layers; the standardisation is never trained."""
        return list(self.layers)

    @property
    def input_scale(self) -> Tensor:
        """The standard deviation of each feature, (I,)."""
        return self.standardise.scale

    def forward(self, rows_NI: Tensor) -> Tensor:
        """Representations h, (N, F), of rows (N, I) as the table has them."""
        h_NF: Tensor = self.layers(self.standardise(rows_NI))
        return h_NF


def split_constants(state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The weights of a model that are trained, and the constants that an encoder of rows begins with: none for volumes."""
    constants = {name: value for name, value in state.items() if name.startswith(CONSTANTS)}
    return {name: value for name, value in state.items() if name not in constants}, constants


def ordered_constants(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The constants of a model's weights that were read from a file, in the order that the model has them."""
    _, found = split_constants(state)
    if not found:
        return {}
    built = Standardise(found[f"{CONSTANTS}mean"].shape[-1], num_erased(found))
    return {f"{CONSTANTS}{name}": found[f"{CONSTANTS}{name}"] for name in built.state_dict()}


def num_erased(constants: Mapping[str, Tensor]) -> int:
    """How many directions the constants of an encoder of rows take out."""
    return len(constants.get(f"{CONSTANTS}directions", ()))


def _levels(images: Tensor, steps: Sequence[nn.Module]) -> list[Tensor]:
    """What is there after each step from the images on."""
    levels = [images]
    for step in steps:
        levels.append(step(levels[-1]))
    return levels[1:]


# The layers up to the end of each level of the pyramid, and their channels.
LEVELS: Mapping[str, Mapping[tuple[str, ...], int]] = {
    "resnet18": {
        ("conv1", "bn1", "act"): 64,
        ("maxpool", "layer1"): 64,
        ("layer2",): 128,
        ("layer3",): 256,
        ("layer4",): 512,
    },
    "densenet121": {
        ("features.conv0", "features.norm0", "features.relu0"): 64,
        ("features.pool0", "features.denseblock1"): 256,
        ("features.transition1", "features.denseblock2"): 512,
        ("features.transition2", "features.denseblock3"): 1024,
        ("features.transition3", "features.denseblock4", "features.norm5", "class_layers.relu"): 1024,
    },
}


class Headless(Encoder):
    """A MONAI classification net with its last linear layer taken off.

    Args:
        net: gives (N, F).
        num_features: F.
        levels: layers up to the end of each level of the pyramid, and their channels.
    """

    def __init__(self, net: nn.Module, num_features: int, levels: Mapping[tuple[str, ...], int]) -> None:
        super().__init__()
        self.net = net
        self.num_features = num_features
        self.levels = levels

    @property
    def parts(self) -> list[nn.Module]:
        """The net's layers and blocks as MONAI names them."""
        body = self.net.get_submodule("features") if hasattr(self.net, "features") else self.net
        return [part for part in body.children() if any(True for _ in part.parameters())]

    def forward(self, images: Tensor) -> Tensor:
        """Representations h, (N, F), of volumes (N, C, X, Y, Z) or images (N, C, X, Y)."""
        h_NF: Tensor = self.net(images)
        return h_NF

    @property
    def pyramid_channels(self) -> tuple[int, ...]:
        """Of the net's levels."""
        return tuple(self.levels.values())

    def pyramid(self, images: Tensor) -> list[Tensor]:
        """What the net gives before each halving of the grid: resnet18 begins with all of it, densenet121 with half."""
        return _levels(images, [nn.Sequential(*map(self.net.get_submodule, names)) for names in self.levels])


def _check_range(name: str, value: int, low: int, high: int) -> None:
    if not low <= value <= high:
        raise ValueError(f"{name} must be from {low} to {high}, got {value!r}")


@dataclass(frozen=True, kw_only=True)
class Small:
    """``encoder=small``."""

    name: Literal["small"] = "small"
    width: int = 8
    kind: ClassVar = "images"

    def __post_init__(self) -> None:
        _check_range("width", self.width, 2, 256)

    def build(self, num_inputs: int, spatial_dims: int) -> Encoder:
        """A small encoder with 16 ``width`` features."""
        return SmallEncoder(num_inputs, self.width, spatial_dims)


@dataclass(frozen=True, kw_only=True)
class DenseNet:
    """``encoder=densenet121``: MONAI's, with group normalisation, 1024 features."""

    name: Literal["densenet121"] = "densenet121"
    kind: ClassVar = "images"

    def build(self, num_inputs: int, spatial_dims: int) -> Encoder:
        """DenseNet121 without its classifier."""
        from monai.networks.nets import DenseNet121  # seconds to import: only by who asks for it

        net = DenseNet121(
            spatial_dims=spatial_dims,
            in_channels=num_inputs,
            out_channels=1,
            norm=("group", {"num_groups": 8}),
            act=("relu", {"inplace": False}),
        )
        num_features: int = net.class_layers.out.in_features
        net.class_layers.out = nn.Identity()
        return Headless(net, num_features, LEVELS[self.name])


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """``encoder=resnet18``: MONAI's, every BatchNorm (``norm="group"`` leaves 19 of 20) replaced by GroupNorm, 512 features."""

    name: Literal["resnet18"] = "resnet18"
    kind: ClassVar = "images"

    def build(self, num_inputs: int, spatial_dims: int) -> Encoder:
        """ResNet18 without its classifier."""
        from monai.networks.nets import resnet18  # seconds to import: only by who asks for it

        net = resnet18(spatial_dims=spatial_dims, n_input_channels=num_inputs, feed_forward=False)
        for parent in list(net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm2d | nn.BatchNorm3d):
                    setattr(parent, name, nn.GroupNorm(8, child.num_features))
        return Headless(net, 512, LEVELS[self.name])


@dataclass(frozen=True, kw_only=True)
class MLP:
    """``encoder=mlp``: for rows of features; ``width`` features after ``depth`` layers."""

    name: Literal["mlp"] = "mlp"
    width: int = 256
    depth: int = 2
    kind: ClassVar = "table"

    def __post_init__(self) -> None:
        _check_range("width", self.width, 2, 4096)
        _check_range("depth", self.depth, 1, 16)

    def build(self, num_inputs: int, spatial_dims: int) -> Encoder:
        """An encoder of rows with ``width`` features."""
        del spatial_dims
        return RowEncoder(num_inputs, self.width, self.depth)


EncoderChoice = Small | DenseNet | ResNet | MLP
Model = TypeVar("Model", "Pretrainer", "Classifier", "Segmenter")


def assert_no_batchnorm(model: nn.Module) -> None:
    """Refuse a net that mixes the scans of a batch or keeps statistics of them in buffers."""
    for name, module in model.named_modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            raise ValueError(
                f"model: every normalisation must act inside one scan, got {type(module).__name__} at {name!r}. "
                "Use GroupNorm: batch statistics leak between scans and are wrong when averaged over sites."
            )
    buffers = [name for name, buffer in model.named_buffers() if buffer.is_floating_point()]
    if buffers:
        raise ValueError(f"model: floating-point state must be trainable, got the buffers {buffers}. Use GroupNorm.")


class Projector(nn.Sequential):
    """Two-layer head from representation h to embedding z, used in pretraining only."""

    def __init__(self, num_features: int, embedding_size: int) -> None:
        super().__init__(nn.Linear(num_features, num_features), nn.ReLU(), nn.Linear(num_features, embedding_size))


class Pretrainer(nn.Module):
    """Encoder and projector: what travels in pretraining. With ``num_classes`` a linear classifier of h too, for `Joint`."""

    def __init__(self, encoder: Encoder, embedding_size: int, num_classes: int | None = None) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = Projector(encoder.num_features, embedding_size)
        self.classifier = None if num_classes is None else nn.Linear(encoder.num_features, num_classes)

    def forward(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Representation h (N, F) and embedding z (N, D)."""
        h_NF = self.encoder(inputs)
        return h_NF, self.projector(h_NF)


class Classifier(nn.Module):
    """Encoder and a linear head on the standardised representation: what travels in fine-tuning."""

    def __init__(self, encoder: Encoder, num_outputs: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.LayerNorm(encoder.num_features, elementwise_affine=False), nn.Linear(encoder.num_features, num_outputs)
        )

    def forward(self, inputs: Tensor) -> Tensor:
        """What the head tells of each scan, (N, outputs): logits, or a number in units of `core.targets.Target`."""
        logits_NK: Tensor = self.head(self.encoder(inputs))
        return logits_NK


class Decoder(nn.Module):
    """The way up of a U-Net: each level of the pyramid interpolated to the next finer one's grid, both together convolved twice.

    Ronneberger et al., MICCAI 2015, with the convolutions of nnU-Net (MONAI's `UnetBasicBlock`), group normalisation, and
    the image itself as the finest level. Grids need not be powers of two, because levels are interpolated and not padded.
    """

    def __init__(self, pyramid_channels: Sequence[int], num_inputs: int, num_classes: int, spatial_dims: int) -> None:
        from monai.networks.blocks import UnetBasicBlock  # seconds to import: only by who asks for it

        super().__init__()
        self.blocks = nn.ModuleList()
        below = pyramid_channels[-1]
        skips = [*pyramid_channels[-2::-1], num_inputs]
        # A level gives as many channels as the encoder has there, the image's own grid as many as the finest.
        for skip, wanted in zip(skips, [*skips[:-1], pyramid_channels[0]], strict=True):
            channels = min(wanted, MAX_DECODER_CHANNELS)
            norm = ("group", {"num_groups": math.gcd(8, channels)})
            self.blocks.append(UnetBasicBlock(spatial_dims, below + skip, channels, kernel_size=3, stride=1, norm_name=norm))
            below = channels
        self.classes = CONVOLUTION[spatial_dims](below, num_classes, 1)

    def forward(self, images: Tensor, pyramid: Sequence[Tensor]) -> Tensor:
        """Logits of the classes, (N, K, *grid of the images)."""
        mode = "bilinear" if images.ndim == 4 else "trilinear"
        level = pyramid[-1]
        for block, skip in zip(self.blocks, [*pyramid[-2::-1], images], strict=True):
            level = nn.functional.interpolate(level, skip.shape[2:], mode=mode, align_corners=False)
            level = block(torch.cat([level, skip], dim=1))
        logits: Tensor = self.classes(level)
        return logits


class Segmenter(nn.Module):
    """Encoder and a decoder of its pyramid as head: what travels in fine-tuning that tells of every voxel its class."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        channels = encoder.pyramid_channels
        if not channels:
            raise ValueError("encoder: to segment it must be one of images, small, densenet121 or resnet18, got one of rows.")
        first = next(encoder.parameters())  # of the first convolution: (channels out, channels in, *kernel)
        self.head = Decoder(channels, first.shape[1], num_classes, first.ndim - 2)

    def forward(self, images: Tensor) -> Tensor:
        """Logits of the classes, background first, (N, K, X, Y, Z), of volumes (N, C, X, Y, Z), or both without Z."""
        logits: Tensor = self.head(images, self.encoder.pyramid(images))
        return logits


def _seeded(build: Callable[[], Model], model_seed: int, num_inputs: int, num_erased: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_seed)
        model = build()
    if num_erased:
        assert isinstance(model.encoder, RowEncoder)
        model.encoder.standardise = Standardise(num_inputs, num_erased)
    assert_no_batchnorm(model)
    return model


def build_pretrainer(
    choice: EncoderChoice,
    embedding_size: int,
    run_seed: int,
    *,
    num_classes: int | None = None,
    num_inputs: int = 1,
    spatial_dims: int = 3,
    num_erased: int = 0,
) -> Pretrainer:
    """A freshly initialised encoder and projector, the same on every machine for the same seed.

    ``num_inputs`` is the number of channels of an image, or of features of a row, ``spatial_dims`` 3 for volumes and 2 for flat
    images, ``num_erased`` the number of directions which the constants of an encoder of rows take out.
    """
    return _seeded(
        lambda: Pretrainer(choice.build(num_inputs, spatial_dims), embedding_size, num_classes),
        seed(run_seed, "pretrainer"),
        num_inputs,
        num_erased,
    )


def build_classifier(
    choice: EncoderChoice,
    num_outputs: int,
    run_seed: int,
    *,
    num_inputs: int = 1,
    spatial_dims: int = 3,
    num_erased: int = 0,
    zero_head: bool = False,
) -> Classifier:
    """A freshly initialised classifier, the same on every machine for the same seed; inputs as in `build_pretrainer`.

    With ``zero_head`` the head begins with zeros: few steps of DP-SGD on few subjects cannot unlearn what a random head tells of
    them (near-zero initialisation: Mehta et al. 2022, arXiv 2205.02973).
    """
    model = _seeded(
        lambda: Classifier(choice.build(num_inputs, spatial_dims), num_outputs),
        seed(run_seed, "classifier"),
        num_inputs,
        num_erased,
    )
    if zero_head:
        for parameter in model.head.parameters():
            nn.init.zeros_(parameter)
    return model


def build_segmenter(
    choice: EncoderChoice, num_classes: int, run_seed: int, *, num_inputs: int = 1, spatial_dims: int = 3
) -> Segmenter:
    """A freshly initialised segmenter, the same on every machine for the same seed; inputs as in `build_pretrainer`.

    ``num_classes`` counts the background.

    Raises:
        ValueError: the encoder is for rows of features.
    """
    return _seeded(
        lambda: Segmenter(choice.build(num_inputs, spatial_dims), num_classes), seed(run_seed, "segmenter"), num_inputs, 0
    )
