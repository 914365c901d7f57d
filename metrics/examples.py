"""Metrics of one's own of the worked examples (docs/conditions.md): `metrics.examples:...`."""

import functools

from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression


@functools.cache
def _reader():
    digits = load_digits()
    return LogisticRegression(max_iter=1000).fit(digits.data / 16, digits.target)


def read_as_class(samples, conditions, truth):
    """Returns the share of digits that a logistic regression on the real ones reads as theirs."""
    found = _reader().predict(samples.reshape(len(samples), -1) / 255)
    return float((found == conditions["label"]).mean())


read_as_class.higher_is_better = True
