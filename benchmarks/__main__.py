"""Speed of training, evaluation and data on the devices at hand, with made-up data and weights.

    python -m benchmarks train --config=configs/load_config.py:NAME
    python -m benchmarks evaluation --config=configs/load_config.py:NAME
    python -m benchmarks data
    python -m benchmarks compile --config=... --topology v5e:4x4 (or h200), without having it
    python -m benchmarks hosts [--against PATH]     what a person waits for, beside other programs
    python -m benchmarks check      whether the card's kernels compute the right thing

Options of the config follow as for main.py (`--config.training.batch_size=64`); `--json FILE` also
writes what is printed. Times on busy or shared processors mean little; ratios of one run mean more.
"""

import sys

import parts
from benchmarks import check, compile, costs, data, evaluation, hosts, train
from utils import commands, environment, signals

COMMANDS = {
    "train": (train, "the train step"),
    "evaluation": (evaluation, "the evaluation's stages"),
    "data": (data, "the data iterator"),
    "compile": (compile, "the steps compiled for chips that are not at hand"),
    "hosts": (hosts, "what a person waits for on a host"),
    "check": (check, "the kernels of the card beside float32"),
}
WITHOUT_CONFIG = (data, hosts, check)


def main(argv=None):
    """Runs the command line; returns the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = commands.parser("benchmarks", __doc__)
    subparsers = parser.add_subparsers(dest="command", required=True)
    for name, (module, text) in COMMANDS.items():
        command = subparsers.add_parser(name, help=text)
        module.add_arguments(command)
        command.add_argument("--json", help="also write the results to this file")
    if not argv or {"-h", "--help"}.intersection(argv):
        parser.parse_args(argv)
    environment.pin()
    try:
        module = COMMANDS.get(argv[0], [None])[0] if argv else None
        if module in WITHOUT_CONFIG:
            args = parser.parse_args(argv)
            costs.check_writable(args.json)
            results = module.run(args)
        else:
            config, rest = costs.config_without_data(argv)
            args = parser.parse_args(rest)
            parts.check(config)
            costs.check_writable(args.json)
            results = COMMANDS[args.command][0].run(config, args)
        costs.write_json(args.json, results)
    except (ValueError, OSError) as error:
        print(f"measure: {error}", file=sys.stderr)
        return 2 if argv[:1] == ["compile"] else 1
    return 0 if results.get("passed", True) and results.get("fits", True) else 1


if __name__ == "__main__":
    signals.outlive_readers()
    sys.exit(main())
