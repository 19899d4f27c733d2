"""What a model's own configuration says of it: timm's and Hugging Face's ``config.json``."""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

CONFIG = "config.json"
PREPROCESSOR = "preprocessor_config.json"  # Hugging Face's, beside it
MAX_BYTES = 10_000_000  # of a configuration; that of 21,843 classes has one
# Keys by which Hugging Face's library would run Python that lies beside the weights.
RUNS_CODE = ("auto_map", "trust_remote_code")

Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


@dataclasses.dataclass(frozen=True)
class Known:
    """What a file says of the model besides its tensors; None where it says nothing.

    Attributes:
        network: its name, as the library that wrote the file has it.
        num_classes: the length of a row of logits.
        class_names: in the order of the logits.
        mean, std: per channel (RGB), of pixels in [0, 1].
        image_size: side, pixels.
        interpolation: by which images are brought to that size.
        crop_share: of the side, what a centre crop keeps.
    """

    network: str | None = None
    num_classes: int | None = None
    class_names: tuple[str, ...] | None = None
    mean: tuple[float, float, float] | None = None
    std: tuple[float, float, float] | None = None
    image_size: int | None = None
    interpolation: str | None = None
    crop_share: float | None = None


class _Read(BaseModel):
    """What is read of a configuration; it has more, which is left alone."""

    model_config = ConfigDict(extra="ignore", frozen=True)


class _Pretrained(_Read):
    mean: tuple[Finite, Finite, Finite] | None = None
    std: tuple[Positive, Positive, Positive] | None = None
    input_size: tuple[int, int, int] | None = None  # channels, height, width
    interpolation: str | None = None
    crop_pct: Positive | None = None


class _Timm(_Read):
    architecture: str
    num_classes: int | None = Field(None, ge=1)
    label_names: list[str] | None = None
    pretrained_cfg: _Pretrained = _Pretrained()


class _HuggingFace(_Read):
    model_type: str
    id2label: dict[int, str] | None = None
    image_size: int | None = Field(None, ge=1)


class _Preprocessor(_Read):
    image_mean: tuple[Finite, Finite, Finite] | None = None
    image_std: tuple[Positive, Positive, Positive] | None = None


def beside(path: Path) -> Known:
    """Return what the configuration beside a file of weights says; nothing if there is none.

    Raises:
        ValueError: it is broken, or asks to run code.
    """
    file = path.with_name(CONFIG)
    raw = _read(file) if file.is_file() else {}
    if "architecture" in raw:
        return _of_timm(_Timm(**raw))
    if "model_type" in raw:
        more = path.with_name(PREPROCESSOR)
        return _of_hugging_face(_HuggingFace(**raw), _Preprocessor(**(_read(more) if more.is_file() else {})))
    return Known()


def _of_timm(read: _Timm) -> Known:
    pretrained = read.pretrained_cfg
    return Known(
        network=f"timm:{read.architecture}",
        num_classes=read.num_classes,
        class_names=tuple(read.label_names) if read.label_names else None,
        mean=pretrained.mean,
        std=pretrained.std,
        image_size=pretrained.input_size[1] if pretrained.input_size else None,
        interpolation=pretrained.interpolation,
        crop_share=pretrained.crop_pct,
    )


def _of_hugging_face(read: _HuggingFace, preprocessor: _Preprocessor) -> Known:
    names = None
    if read.id2label is not None:
        if sorted(read.id2label) != list(range(len(read.id2label))):
            raise ValueError(f"{CONFIG}: id2label should have the numbers from 0 to {len(read.id2label) - 1}")
        names = tuple(read.id2label[number] for number in range(len(read.id2label)))
    return Known(
        network=f"transformers:{read.model_type}",
        num_classes=len(names) if names else None,
        class_names=names,
        mean=preprocessor.image_mean,
        std=preprocessor.image_std,
        image_size=read.image_size,
    )


def _read(file: Path) -> dict[str, Any]:
    if file.stat().st_size > MAX_BYTES:
        raise ValueError(f"{file.name} beside it has more than {MAX_BYTES:,} bytes")
    try:
        raw = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file.name} beside it is no JSON") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{file.name} beside it should be an object")
    for key in RUNS_CODE:
        if key in raw:
            raise ValueError(f"{file.name} beside it has {key}, which runs code of others: not imported")
    return raw
