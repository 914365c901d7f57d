"""Reads EDM2's reference statistics (`img512.pkl`, `img64.pkl`) without running their pickle.

Such a file is a pickle of {"num_images": int, "fid": {"mu", "sigma"}, "fd_dinov2": {"mu",
"sigma"}}, numpy arrays. It needs three globals, and every other is refused by name.
"""

import numpy as np

from formats import pickles

METRICS = ("fid", "fd_dinov2")
ARRAYS = (
    ("numpy.core.multiarray", "_reconstruct"),
    ("numpy._core.multiarray", "_reconstruct"),  # numpy 2
    ("numpy", "ndarray"),
    ("numpy", "dtype"),
)


def load(path):
    """Reads the statistics of a file: {"fid": (mu (D,), sigma (D, D)), "fd_dinov2": ...}, float64.

    A metric that the file lacks is left out.

    Returns:
      The statistics, and the number of images, or None where the file does not say.

    Raises:
      ValueError: in one line, a global that is not allowed, damage, or another content.
    """
    with open(path, "rb") as file:
        try:
            content = pickles.plain(pickles.Unpickler(file, path, ARRAYS).load(), None)
            moments = {name: _moments(content[name]) for name in METRICS if name in content}
            if not moments:
                raise ValueError(f"it holds {', '.join(map(str, content))}")
            return moments, content.get("num_images")
        except pickles.RefusedError:
            raise
        except Exception as error:  # unpickling raises nearly all kinds
            reason = " ".join(str(error).split()) or type(error).__name__
            raise ValueError(f"{path}: not EDM2's reference statistics ({reason})") from error


def _moments(part):
    mu, sigma = part["mu"], part["sigma"]
    if mu.ndim != 1 or sigma.shape != mu.shape * 2:
        raise ValueError(f"mu {mu.shape} and sigma {sigma.shape}")
    return mu.astype(np.float64), sigma.astype(np.float64)
