"""Compare five ways to learn handwritten digits two classes at a time, starting from a pre-trained backbone.

    python examples/compare.py                                     # 5 methods x 3 seeds, minutes on two CPU cores
    python examples/compare.py --recipe mine.yaml --output results
    python examples/compare.py training.epochs=2 seeds=[0]         # change any value of the recipe

Does what ``firn compare`` does, through the Python API: copy it to start a study of your own. Runs that are finished
are kept, interrupted ones go on where they stopped; call it again with more seeds and only the new ones are trained.
"""

from __future__ import annotations

import argparse
import sys

from avalanche_firn.experiments.comparison import compare
from avalanche_firn.experiments.errors import ConfigError
from avalanche_firn.experiments.recipe import load_recipe


def main() -> int:
    """Parse the arguments, compare, print the table and the last accuracies of every seed."""
    parser = argparse.ArgumentParser(description="Compare the methods of a recipe over its seeds.")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="for example training.epochs=2 seeds=[0]")
    parser.add_argument(
        "--recipe", default="digits", help="a name of `firn recipes ls` or a YAML file (default: digits)"
    )
    parser.add_argument("--output", help="folder for the results (default: runs)")
    parser.add_argument("--fresh", action="store_true", help="delete earlier results of this comparison first")
    parser.add_argument("--quiet", action="store_true", help="only the table")
    arguments = parser.parse_args()

    overrides = list(arguments.overrides)
    if arguments.output:
        overrides.append(f"output={arguments.output!r}")
    try:
        # The recipe says everything: backbone, data, optimizer, methods, seeds. It is checked before anything loads.
        config = load_recipe(arguments.recipe, overrides)
        # One run per method and seed. Each leaves results.json, metrics.csv, TensorBoard events and a checkpoint.
        comparison = compare(config, fresh=arguments.fresh, quiet=arguments.quiet)
    except ConfigError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("\ninterrupted; the same command goes on where it stopped", file=sys.stderr)
        return 130

    print(comparison)

    # Results are plain dictionaries, the content of results.json: all figures, the matrix of tasks, the cost.
    print("\nlast accuracy of every seed, in percent:")
    for group in comparison.groups:
        values = [f"{100 * run['figures']['accuracy/last']:6.2f}" for run in group.runs]
        print(f"  {group.label:<14}", *values)
    return 0


if __name__ == "__main__":
    sys.exit(main())
