"""Writes a checkpoint in the layout of the published code, so that weights can be exchanged both
ways: that of MeanFlow for a DiT, that of improved MeanFlow (orbax alone) for an imfDiT.

python -m scripts.export_checkpoint --from WORKDIR --to DIR [--step N] [--format msgpack|orbax]

From a run, its weights, their first average and Adam's state are written. A published checkpoint is
written as it is: that way one form becomes the other.
"""

import argparse
import sys

from formats import published, published_imf
from utils import checkpoint, signals


def export(source, folder, step=None, form=None):
    """Writes folder/checkpoint_STEP and returns its path.

    source: the workdir of a run, or a published checkpoint; step: of the run, default the newest;
    form: msgpack, the default, or orbax; for an imfDiT orbax, the default.
    Raises FileNotFoundError, FileExistsError or ValueError with one line.
    """
    if imf := published_imf.find(source):
        state = published_imf.load(imf)
    elif published.is_published(source):
        state = published.load(source)
    else:
        found = checkpoint.restore_weights(source, step, optimizer=True)
        state = {name: found[name] for name in ("step", "params", "opt_state")}
        state["ema_params"] = found["ema_params"][0]
    if "u_blocks" not in state["ema_params"]:
        return published.export(**state, folder=folder, form=form or "msgpack")
    if form not in (None, "orbax"):
        raise ValueError(f"--format={form}: the published improved MeanFlow reads orbax alone")
    return published_imf.export(**state, folder=folder)


def parse(argv):
    parser = argparse.ArgumentParser(
        prog="python -m scripts.export_checkpoint",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--from", dest="source", required=True, help="workdir or checkpoint")
    parser.add_argument("--to", dest="folder", required=True, help="folder to write into")
    parser.add_argument("--step", type=int, help="checkpoint of the run, default the newest")
    parser.add_argument("--format", dest="form", choices=("msgpack", "orbax"))
    return parser.parse_args(argv)


def main(argv=None):
    args = parse(argv)
    try:
        path = export(**vars(args))
    except (ValueError, OSError) as error:
        print(f"export_checkpoint: {error}", file=sys.stderr)
        return 1
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
