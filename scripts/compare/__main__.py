"""Runs side by side: the options that differ, last and best metrics, images/s.

    python -m scripts.compare RUN [RUN ...] [--html FILE]

A RUN is the folder of a run, finished, running or broken off. `--html` also writes one page with
the curves, the sample grids over time and all results. It needs nothing beside it: it can be sent
to someone. docs/monitoring.md.
"""

import shutil
import sys

from scripts.compare import page, runs, tables
from utils import commands, files, signals


def main(argv=None):
    """Runs the command line; returns the exit status."""
    parser = commands.parser("scripts.compare", __doc__)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="folder of a run")
    parser.add_argument("--html", metavar="FILE", help="also write a page to this file")
    parser.add_argument(
        "--grids", type=int, default=24, metavar="N",
        help="sample grids of each run in the page, spread over time (%(default)s)",
    )  # fmt: skip
    args = parser.parse_args(argv)
    try:
        files.check_arguments(vars(args))
    except ValueError as error:
        parser.error(str(error))
    shown, left_out = runs.read_all(args.runs)
    for line in left_out:
        print(f"left out: {line}", file=sys.stderr)
    if not shown:
        print("error: there is no run to show", file=sys.stderr)
        return 1
    for run in shown:
        if run.notes:
            print(f"{run.name}: {'; '.join(run.notes)}", file=sys.stderr)
    print(tables.text(shown, shutil.get_terminal_size().columns))
    try:
        if args.html:
            files.write_text(args.html, page.page(shown, max(args.grids, 1)))
            print(f"\n{args.html}")
    except (ValueError, OSError) as error:
        reason = getattr(error, "strerror", None) or error
        print(f"error: {args.html}: {reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
