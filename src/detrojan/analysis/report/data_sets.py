"""What the page and the terminal say of data sets: what their cards count, in a row or a line each."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from detrojan.analysis.report.views import counted

Card = Mapping[str, Any]  # as the job `dataset` writes it beside the images


class DataSet(NamedTuple):
    """What was read as a data set.

    Attributes:
        name: of the data set.
        classes: how many there are.
        train: images to train on.
        pool: images that the defender's samples may come from, and no model has learned.
        test: images to measure with.
        again_in_train: images that the training split holds a second time, pixel for pixel.
        again_in_test: likewise, of the test split.
        test_in_train: test images that are in the training split too, pixel for pixel.
        left_out: files that lie there and were not read.
        remarks: what may be wrong, a line each.
    """

    name: str
    classes: int
    train: int
    pool: int
    test: int
    again_in_train: int
    again_in_test: int
    test_in_train: int
    left_out: int
    remarks: tuple[str, ...]

    def __str__(self) -> str:
        splits = f"{self.train:,} training, {self.pool:,} pool and {self.test:,} test images"
        again = {"in train": self.again_in_train, "in test": self.again_in_test}
        said = [
            f"{splits} of {self.classes:,} classes",
            ", ".join(f"{number:,} again {where}" for where, number in again.items() if number),
            f"{self.test_in_train:,} of test in train" if self.test_in_train else "",
            f"{counted(self.left_out, 'file')} left out" if self.left_out else "",
        ]
        return f"{self.name}: {'; '.join(filter(None, said))}"


def read(card: Card) -> DataSet:
    """Return what a card says of its data set."""
    images = {split: sum(numbers) for split, numbers in card["images"].items()}
    equal = card["equal"]
    return DataSet(
        name=card["dataset"],
        classes=len(card["classes"]),
        train=images["train"],
        pool=images["held_out"],
        test=images["test"],
        again_in_train=equal["in_train"],
        again_in_test=equal["in_test"],
        test_in_train=equal["test_in_train"],
        left_out=sum(files["number"] for files in card["left_out"].values()),
        remarks=tuple(card["remarks"]),
    )


def read_all(cards: Iterable[Card]) -> list[DataSet]:
    """Return what cards say, in the order of the data sets' names."""
    return sorted(map(read, cards))
