"""Write the signature ("toy") data: ``python data_dir/generate_toy_dataset.py --help``.

``data_dir.toy`` says what they are. To be run from the project's root, by path or as
``python -m data_dir.generate_toy_dataset``; loaders call the same function when the
files are not there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: a line on each pair written; exit status 2 for bad input."""
    from data_dir.toy import ToyOptions, generate_toy
    from experiments.common import one_line_errors, parameters_of, parse, progress_shown

    values = parse(
        "python data_dir/generate_toy_dataset.py",
        "Write random walks and, as labels, one term of the signature of each.",
        parameters_of(generate_toy),
        argv,
    )
    with one_line_errors(), progress_shown():
        for line in generate_toy(ToyOptions(**values)):
            print(line)
    return 0


if __name__ == "__main__":
    if not __package__:  # run by path: Python looks for modules here, not in the root
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(main())
