"""The contract that every experiment package shares, on one screen.

* :class:`ExperimentResult`: what each ``run(...)`` returns.
* :func:`command_line`: flags, help and outputs from the signature of ``run``.
* :class:`RunLog`: one strict JSON record per line, whole or not at all.
* :func:`random_stream`: an independent generator per seed and purpose.
* :class:`Picture`, :func:`new_figure`, :func:`save_figure`: one look for every figure.
* :class:`InputError`, ``check_*``: bad input answered in one line, exit status 2.
* :func:`track`, :func:`meter`: progress of long work, silent unless a command line
  shows it.
"""

from experiments._cli import (
    EXIT_BAD_INPUT,
    EXIT_FAILED_CLAIM,
    EXIT_INTERRUPTED,
    Parameter,
    command_line,
    execute,
    fail,
    one_line_errors,
    parameters_of,
    parse,
)
from experiments._figures import (
    COLORS,
    DIVERGING,
    MARKERS,
    SEQUENTIAL,
    Picture,
    check_picture_path,
    new_figure,
    save_figure,
)
from experiments._inputs import (
    InputError,
    bad_input,
    check_finite,
    check_increasing,
    check_integer,
    check_nonempty,
    check_powers_finite,
)
from experiments._progress import meter, progress_shown, track
from experiments._result import (
    ExperimentResult,
    format_complex,
    random_stream,
    to_json,
)
from experiments._runlog import (
    FIELDS,
    SCHEMA,
    RunLog,
    make_record,
    parse_line,
    unwritable,
)

__all__ = [
    "COLORS",
    "DIVERGING",
    "EXIT_BAD_INPUT",
    "EXIT_FAILED_CLAIM",
    "EXIT_INTERRUPTED",
    "FIELDS",
    "MARKERS",
    "SCHEMA",
    "SEQUENTIAL",
    "ExperimentResult",
    "InputError",
    "Parameter",
    "Picture",
    "RunLog",
    "bad_input",
    "check_finite",
    "check_increasing",
    "check_integer",
    "check_nonempty",
    "check_picture_path",
    "check_powers_finite",
    "command_line",
    "execute",
    "fail",
    "format_complex",
    "make_record",
    "meter",
    "new_figure",
    "one_line_errors",
    "parameters_of",
    "parse",
    "parse_line",
    "progress_shown",
    "random_stream",
    "save_figure",
    "to_json",
    "track",
    "unwritable",
]
