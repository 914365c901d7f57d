"""Command lines of the scripts."""

import argparse


def parser(module, text):
    """Makes the parser of `python -m MODULE`; its help begins with a text, kept as it is."""
    return argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
