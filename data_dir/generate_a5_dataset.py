"""Write word problems, such as A5's: ``python data_dir/generate_a5_dataset.py --help``.

``data_dir.word_problem`` says what they are. To be run from the project's root, by path
or as ``python -m data_dir.generate_a5_dataset``; loaders call the same function when a
file is not there.
"""

import sys
from collections.abc import Sequence
from pathlib import Path


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: a line on each file written; exit status 2 for bad input."""
    from data_dir.word_problem import WordOptions, generate_words
    from experiments.common import one_line_errors, parameters_of, parse, progress_shown

    values = parse(
        "python data_dir/generate_a5_dataset.py",
        "Write running products in a finite group, such as A5, as CSV files.",
        parameters_of(generate_words),
        argv,
    )
    with one_line_errors(), progress_shown():
        for line in generate_words(WordOptions(**values)):
            print(line)
    return 0


if __name__ == "__main__":
    if not __package__:  # run by path: Python looks for modules here, not in the root
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    sys.exit(main())
