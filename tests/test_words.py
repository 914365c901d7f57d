"""The words of the code: what a docstring begins with."""

import ast

from test_layout import FILES, parse

VERBS = set(
    """
Adds Asks Augments Averages Begins Brings Builds Calls Casts Checks Chooses Clips Compares
Compiles Computes Converts Convolves Copies Counts Crops Cuts Decides Decodes Deletes Describes
Digests Does Doubles Draws Drops Embeds Encodes Ends Evaluates Expands Fills Filters Finds Folds
Gathers Gives Goes Halves Has Holds Identifies Ignores Imports Integrates Inverts Joins Keeps Lays
Leaves Lets Limits Lists Loads Logs Looks Makes Maps Measures Merges Mixes Multiplies Names
Normalises Notes Numbers Opens Orders Pads Places Predicts Prints Profiles Puts Raises Reads
Reconstructs Reduces Refuses Removes Renames Reorders Repeats Replaces Resizes Resolves Returns
Rounds Runs Samples Saves Says Scales See Sees Serves Sets Settles Shortens Shows Sorts Spells
Splits Starts Steps Sums Takes Tells Thins Trains Turns Waits Warps Wraps Writes Yields
""".split()
)


def beginnings(tree):
    """Yields (line, first word) of the docstrings of functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            if docstring := ast.get_docstring(node):
                yield node.lineno, docstring.split()[0].strip(",.;:")


def test_a_docstring_begins_with_a_verb():
    """One of those in use; a new one belongs into `VERBS`, a noun does not."""
    others = [
        f"{path}:{line} {word}"
        for path in FILES
        for line, word in beginnings(parse(path))
        if word not in VERBS
    ]
    assert others == []


def test_the_search_for_beginnings_finds_nouns():
    tree = ast.parse('def f():\n    """Returns 1."""\n\n\ndef g():\n    """The number 2."""')
    assert [word for _, word in beginnings(tree) if word not in VERBS] == ["The"]
