"""The digits that scikit-learn brings along: no download, seconds to train on.

Source: scikit-learn's ``load_digits``, the test set of the UCI "Optical Recognition of Handwritten
Digits" (Alpaydin, Kaynak, 1998): 1,797 scans of 8×8 pixels with 17 grey levels, 10 classes.
"""

from collections import Counter

import numpy as np

from detrojan.datasets.base import RawImages, Source, Split, resize_all

TOTALS = (178, 182, 177, 183, 181, 182, 181, 179, 174, 180)  # scans of each digit
TEST_EVERY = 5  # the fifth, tenth, ... scan of each digit is for testing
WHITE = 16  # the brightest grey level of a scan


class Digits(Source):
    """Handwritten digits, white on black; every fifth scan of each digit is for testing."""

    def counts(self, split: Split) -> Counter[int]:
        """Return how many scans each digit has, known without reading them."""
        test = {digit: total // TEST_EVERY for digit, total in enumerate(TOTALS)}
        if split == "test":
            return Counter(test)
        return Counter({digit: total - test[digit] for digit, total in enumerate(TOTALS)})

    def read(self, split: Split, side: int) -> RawImages:
        """Return the scans of a split as RGB, in scikit-learn's order, grey levels stretched to 0 to 255."""
        # Takes a second, and planning needs the counts alone.
        from sklearn.datasets import load_digits

        bundled = load_digits()
        labels = bundled.target.astype(np.int64)
        rank = np.empty(len(labels), np.int64)  # of each scan within its digit
        for digit in range(len(TOTALS)):
            members = labels == digit
            rank[members] = np.arange(members.sum())
        is_test = rank % TEST_EVERY == TEST_EVERY - 1
        rows = is_test if split == "test" else ~is_test
        grey = np.rint(bundled.images[rows] * (255 / WHITE)).astype(np.uint8)
        images = np.repeat(grey[..., np.newaxis], 3, axis=-1)
        return RawImages(resize_all(images, side), labels[rows], tuple(map(str, range(len(TOTALS)))))
