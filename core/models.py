"""Encoders, the projector of pretraining and the classifier of fine-tuning. Nothing here couples scans: no BatchNorm."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated, Literal, TypeVar

import torch
from pydantic import Field
from torch import Tensor, nn

from core.seeding import seed


class Block(nn.Sequential):
    """Convolution, group normalisation, ReLU; halves the grid when ``stride`` is 2."""

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__(
            nn.Conv3d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False),
            nn.GroupNorm(min(8, out_channels), out_channels),
            nn.ReLU(),
        )


class Encoder(nn.Module):
    """A net from volumes (N, 1, X, Y, Z) to representations h (N, F)."""

    num_features: int


class SmallEncoder(Encoder):
    """Four strided stages of 3-D convolutions, then the mean over the grid: fast on two cores."""

    def __init__(self, width: int) -> None:
        super().__init__()
        channels = [1, width, 2 * width, 4 * width, 16 * width]
        self.stages = nn.Sequential(*(Block(a, b, stride=2) for a, b in pairwise(channels)))
        self.num_features = channels[-1]

    def forward(self, volumes_N1XYZ: Tensor) -> Tensor:
        """Representations h, (N, F), of volumes (N, 1, X, Y, Z)."""
        h_NF: Tensor = self.stages(volumes_N1XYZ).mean(dim=(2, 3, 4))
        return h_NF


class Headless(Encoder):
    """A MONAI classification net with its last linear layer taken off."""

    def __init__(self, net: nn.Module, num_features: int) -> None:
        super().__init__()
        self.net = net
        self.num_features = num_features

    def forward(self, volumes_N1XYZ: Tensor) -> Tensor:
        """Representations h, (N, F), of volumes (N, 1, X, Y, Z)."""
        h_NF: Tensor = self.net(volumes_N1XYZ)
        return h_NF


@dataclass(frozen=True, kw_only=True)
class Small:
    """``encoder=small``."""

    name: Literal["small"] = "small"
    width: Annotated[int, Field(ge=2, le=256)] = 8

    def build(self) -> Encoder:
        """A small encoder with 16 ``width`` features."""
        return SmallEncoder(self.width)


@dataclass(frozen=True, kw_only=True)
class DenseNet:
    """``encoder=densenet121``: MONAI's, with group normalisation, 1024 features."""

    name: Literal["densenet121"] = "densenet121"

    def build(self) -> Encoder:
        """DenseNet121 without its classifier."""
        from monai.networks.nets import DenseNet121  # seconds to import: only by who asks for it

        net = DenseNet121(
            spatial_dims=3,
            in_channels=1,
            out_channels=1,
            norm=("group", {"num_groups": 8}),
            act=("relu", {"inplace": False}),
        )
        num_features: int = net.class_layers.out.in_features
        net.class_layers.out = nn.Identity()
        return Headless(net, num_features)


@dataclass(frozen=True, kw_only=True)
class ResNet:
    """``encoder=resnet18``: MONAI's, every BatchNorm (``norm="group"`` leaves 19 of 20) replaced by GroupNorm, 512 features."""

    name: Literal["resnet18"] = "resnet18"

    def build(self) -> Encoder:
        """ResNet18 without its classifier."""
        from monai.networks.nets import resnet18  # seconds to import: only by who asks for it

        net = resnet18(spatial_dims=3, n_input_channels=1, feed_forward=False)
        for parent in list(net.modules()):
            for name, child in list(parent.named_children()):
                if isinstance(child, nn.BatchNorm3d):
                    setattr(parent, name, nn.GroupNorm(8, child.num_features))
        return Headless(net, 512)


EncoderChoice = Small | DenseNet | ResNet
Model = TypeVar("Model", bound=nn.Module)


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

    def forward(self, volumes_N1XYZ: Tensor) -> tuple[Tensor, Tensor]:
        """Representation h (N, F) and embedding z (N, D)."""
        h_NF = self.encoder(volumes_N1XYZ)
        return h_NF, self.projector(h_NF)


class Classifier(nn.Module):
    """Encoder and a linear head on the standardised representation: what travels in fine-tuning."""

    def __init__(self, encoder: Encoder, num_classes: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Sequential(
            nn.LayerNorm(encoder.num_features, elementwise_affine=False), nn.Linear(encoder.num_features, num_classes)
        )

    def forward(self, volumes_N1XYZ: Tensor) -> Tensor:
        """Logits, (N, classes)."""
        logits_NC: Tensor = self.head(self.encoder(volumes_N1XYZ))
        return logits_NC


def _seeded(build: Callable[[], Model], model_seed: int) -> Model:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(model_seed)
        model = build()
    assert_no_batchnorm(model)
    return model


def build_pretrainer(choice: EncoderChoice, embedding_size: int, run_seed: int, *, num_classes: int | None = None) -> Pretrainer:
    """A freshly initialised encoder and projector, the same on every machine for the same seed."""
    return _seeded(lambda: Pretrainer(choice.build(), embedding_size, num_classes), seed(run_seed, "pretrainer"))


def build_classifier(choice: EncoderChoice, num_classes: int, run_seed: int) -> Classifier:
    """A freshly initialised classifier, the same on every machine for the same seed."""
    return _seeded(lambda: Classifier(choice.build(), num_classes), seed(run_seed, "classifier"))
