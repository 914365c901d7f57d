"""The Inception score of logits in one piece: the sums of the product must give the same."""

import numpy as np


def inception_score(logits, splits=10, split_size=None):
    """Returns (mean, std) over `splits` consecutive parts of `logits` (N, classes), in float64.

    With `split_size`, parts of so many samples instead, the last of which may be smaller and
    counts as much as the others (ADM's 5,000).

    The logits are those without the bias of the last layer, in the order of the samples: so it
    is done in the first implementation, in ADM and in torch-fidelity.
    """
    if not 1 <= splits <= len(logits):
        raise ValueError(f"Inception score: {len(logits)} samples cannot make {splits} splits")
    ends = [len(logits) * i // splits for i in range(1, splits)]
    if split_size:
        ends = range(split_size, len(logits), split_size)
    scores = []
    for part in np.split(np.asarray(logits, np.float64), ends):
        part = part - part.max(1, keepdims=True)
        log_probs = part - np.log(np.exp(part).sum(1, keepdims=True))
        probs = np.exp(log_probs)
        marginal = np.maximum(probs.mean(0), np.finfo(np.float64).tiny)  # 0 log 0 is 0
        scores.append(np.exp((probs * (log_probs - np.log(marginal))).sum(1).mean()))
    return float(np.mean(scores)), float(np.std(scores))
