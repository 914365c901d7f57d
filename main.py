"""Runs one job: train, evaluate or sample.

    python main.py --workdir=DIR --config=configs/load_config.py:NAME [--config.option=value ...]
    python main.py --workdir=DIR --config=FILE.yml [--config.option=value ...]
    python main.py --list

NAME is one of those that --list shows, FILE.yml any file like them, such as the config.yml of a
run's folder; docs/options.md has all options. The job is to train, unless `eval_only` or
`sample_only` is set. Of several processes each runs this command; on a TPU slice and under SLURM
they find each other, elsewhere --coordinator_address, --num_processes and --process_id say how
(docs/pods.md). Exit status: 0 finished, 1 the job failed, 2 wrong options, 75 stopped from outside
or left alone by another process: start it again.
"""

import argparse
import logging
import os
import sys
import traceback

from configs import listing
from run import spent
from utils import signals  # and late what takes long: a signal in the first second is heard

# What people can cause and mend; anything else is a bug and shows its traceback.
USER_ERRORS = (ValueError, OSError, FloatingPointError)


def run_job(config, flags, about):
    """Runs the job that the config names; returns the exit status.

    Args:
      config: the whole config.
      flags: from `parse_flags`.
      about: where its options come from, `load_config.source` and `load_config.given`.
    """
    # Imported late: a wrong option is told at once, without waiting for jax.
    from configs import load_config
    from run import layout, report, workdirs
    from utils import compiling, environment, files, processes

    try:
        processes.join(
            flags.coordinator_address, flags.num_processes, flags.process_id, flags.join_timeout
        )
        processes.listen()
        if not processes.is_writer():
            logging.getLogger().setLevel(logging.WARNING)
        options = load_config.options(config)
        processes.check_same("configuration", options | {"workdir": flags.workdir})
        processes.check_same("environment", environment.describe())
        if config.eval_only:
            from evaluate import evaluate_job as job
        elif config.sample_only:
            from sample import sample_job as job
        else:
            from train import train_job as job
        workdir = workdirs.make(flags.workdir)
        compiling.keep(workdir / layout.COMPILED)
        workdirs.follow_output(workdir)
        report.tell(report.job(options, *about, workdir))
        job(config, workdir)
    except processes.Preempted as reason:
        logging.info("%s", reason)
        signals.ignore()
        processes.leave()
        return processes.RESTART
    except KeyboardInterrupt:
        return processes.fail("interrupted", 130)
    except Exception as error:
        if processes.lost_peer(error):
            reason = str(error).splitlines()[0]
            return processes.fail(f"lost another process ({reason})", processes.RESTART)
        if os.environ.get("MEANFLOW_TRACEBACK") or not isinstance(error, USER_ERRORS):
            traceback.print_exc()
        return processes.fail(files.line(error), 1)
    processes.leave()
    return 0


def parse_flags(argv):
    """Reads the flags beside --config, as a namespace."""
    parser = argparse.ArgumentParser(
        usage="main.py --workdir=DIR --config=configs/load_config.py:NAME [--config.x.y=value ...]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="show the configs there are, and stop")
    parser.add_argument("--workdir", required=True, help="folder of the run, shared by all hosts")
    several = parser.add_argument_group("several processes, where they do not find each other")
    several.add_argument("--coordinator_address", help="HOST:PORT of process 0")
    several.add_argument("--num_processes", type=int, help="how many there are")
    several.add_argument("--process_id", type=int, help="number of this one, from 0")
    several.add_argument(
        "--join_timeout", type=int, default=300, help="seconds to wait for the others (%(default)s)"
    )
    return parser.parse_args(argv)


def main(argv):
    """Runs the command line `argv`; returns the exit status."""
    spent.begin()
    if "--list" in argv:
        print(listing.table())
        return 0
    if {"-h", "--help"}.intersection(argv):
        parse_flags(["--help"])
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for name in ("absl", "jax"):  # orbax and tfds tell every detail in the former
        logging.getLogger(name).setLevel(logging.WARNING)
    from configs import load_config

    try:
        config, rest = load_config.from_command_line(argv)
        flags = parse_flags(rest)
        # With jax, which a wrong option or flag need not wait for.
        from utils import environment

        environment.pin()
        from run import config as run_config

        about = load_config.source(argv), load_config.given(argv)
        config = run_config.settle(config, flags.workdir, about[1])
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    from utils import files, processes

    processes.at_exit.append(files.finish)
    try:
        return run_job(config, flags, about)
    finally:
        files.finish()


if __name__ == "__main__":
    signals.outlive_readers()
    signals.end_at_once(signals.RESTART)
    sys.exit(main(sys.argv[1:]))
