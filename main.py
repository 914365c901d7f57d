"""Runs one job: train, evaluate or sample.

    python main.py --workdir=DIR --config=configs/load_config.py:NAME [--config.option=value ...]

The job is to train, unless `eval_only` or `sample_only` is set. Exit status: 0 finished, 1 the job
failed, 2 wrong options.
"""

import argparse
import logging
import os
import pathlib
import sys

from configs import load_config

# What people can cause and mend; anything else is a bug and shows its traceback.
USER_ERRORS = (ValueError, FileNotFoundError, FloatingPointError)


def run_job(config, workdir):
    """Runs the job that the config names in the folder `workdir`."""
    # Imported late: a wrong option is told at once, without waiting for jax.
    if config.eval_only:
        from evaluate import evaluate_job as job
    elif config.sample_only:
        from sample import sample_job as job
    else:
        from train import train_job as job
    job(config, open_workdir(workdir))


def open_workdir(workdir):
    """The folder of the run, made if need be.

    Raises:
      ValueError: it cannot be written to.
    """
    workdir = pathlib.Path(workdir)
    try:
        workdir.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--workdir {workdir} cannot be made: {error.strerror}") from error
    if not os.access(workdir, os.W_OK):
        raise ValueError(f"--workdir {workdir} cannot be written to")
    return workdir


def main(argv):
    """Runs the command line `argv`; returns the exit status."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("absl").setLevel(logging.WARNING)  # orbax and tfds tell every detail there
    try:
        config, rest = load_config.from_command_line(argv)
    except ValueError as error:
        return fail(error, 2)
    parser = argparse.ArgumentParser(
        usage="main.py --workdir=DIR --config=configs/load_config.py:NAME [--config.x.y=value ...]"
    )
    parser.add_argument("--workdir", required=True, help="folder of the run")
    flags = parser.parse_args(rest)
    try:
        run_job(config, flags.workdir)
    except USER_ERRORS as error:
        if os.environ.get("MEANFLOW_TRACEBACK"):
            raise
        return fail(error, 1)
    return 0


def fail(error, status):
    """Says in one line what is wrong; returns the exit status."""
    print(f"error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
