"""The one helper that turns ``run(...)`` into a command line.

Flags, types, defaults and help come from the signature and docstring of ``run``; the
output flags (``--plot``, ``--log``, …) are added here. Hyphens and underscores are the
same in flag names. Numbers may be negative or complex: ``--decays -0.5 0.8 0.9+0.3j``.
"""

import contextlib
import copy
import dataclasses
import difflib
import inspect
import io
import json
import re
import sys
import time
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Any

from experiments._figures import Picture, check_picture_path, save_figure
from experiments._inputs import InputError
from experiments._progress import progress_shown
from experiments._result import ExperimentResult
from experiments._runlog import RunLog, make_record

Run = Callable[..., ExperimentResult]
DEFAULT_LOG = "outputs/runs.jsonl"
EXIT_FAILED_CLAIM = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


@dataclasses.dataclass(frozen=True)
class Parameter:
    """One flag: its name, type, default (``MISSING`` if required), help and aliases.

    A positional one is given without its name.
    """

    name: str
    type: Any
    default: Any
    help: str = ""
    aliases: tuple[str, ...] = ()
    positional: bool = False


def parameters_of(run: Callable[..., Any]) -> list[Parameter]:
    """The parameters of ``run``: its arguments, or the fields of its one dataclass."""
    hints = typing.get_type_hints(run, include_extras=True)
    arguments = list(inspect.signature(run).parameters.values())
    helps = _argument_help(run)
    if len(arguments) == 1 and dataclasses.is_dataclass(hints.get(arguments[0].name)):
        return _fields_of(hints[arguments[0].name])
    return [
        Parameter(
            argument.name,
            hints[argument.name],
            dataclasses.MISSING
            if argument.default is inspect.Parameter.empty
            else argument.default,
            helps.get(argument.name, ""),
        )
        for argument in arguments
    ]


def call(run: Run, values: dict[str, Any]) -> ExperimentResult:
    """Call ``run`` with ``values``, through its config dataclass where it takes one."""
    hints = typing.get_type_hints(run)
    arguments = list(inspect.signature(run).parameters)
    if len(arguments) == 1 and dataclasses.is_dataclass(hints.get(arguments[0])):
        return run(hints[arguments[0]](**values))
    return run(**values)


def execute(
    run: Run, values: dict[str, Any], run_id: str | None = None
) -> tuple[ExperimentResult, dict[str, Any]]:
    """Run once; return the result and its log record."""
    started, clock = datetime.now(UTC), time.perf_counter()
    try:
        result = call(run, values)
    except MemoryError as error:
        raise InputError(
            f"not enough memory ({error or 'no more given'}); expected a smaller "
            "problem or a larger machine; lower the sizes"
        ) from None
    record = make_record(
        result,
        params=values,
        started=started,
        duration_s=time.perf_counter() - clock,
        run_id=run_id,
    )
    return result, record


def parse(
    name: str,
    description: str,
    parameters: Sequence[Parameter],
    argv: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Parse ``argv`` into one value per parameter.

    Bad input ends the process: one line on standard error, exit status 2.
    """
    import tyro

    positional: Any = tyro.conf.Positional
    fields = []
    for parameter in parameters:
        about = tyro.conf.arg(help=parameter.help, aliases=parameter.aliases or None)
        kind: Any = Annotated[parameter.type, about]
        if parameter.positional:
            kind = positional[kind]
        default = _default_field(parameter.default)
        fields.append((parameter.name, kind, default))
    form = dataclasses.make_dataclass("Arguments", fields, kw_only=True, frozen=True)
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint):
            values: Any = tyro.cli(form, prog=name, description=description, args=argv)
    except SystemExit as stop:
        if stop.code:
            flags = [parameter.name.replace("_", "-") for parameter in parameters]
            fail(_one_line(complaint.getvalue(), name, flags))
        raise
    return {
        field.name: getattr(values, field.name) for field in dataclasses.fields(form)
    }


def command_line(
    run: Run, *, pictures: Sequence[Picture] = (), argv: Sequence[str] | None = None
) -> int:
    """Parse the command line of one experiment, run it, show and store the outcome.

    Returns the exit status: 0, or 1 if the experiment's claim failed. Bad input exits
    with status 2, an interrupt with 130; neither shows a traceback.
    """
    module = inspect.getmodule(run)
    spec = getattr(module, "__spec__", None)
    name = f"python -m {spec.name}" if spec else "experiment"
    own = parameters_of(run)
    values = parse(name, _description(run), own + _output_flags(pictures), argv)
    inputs = {parameter.name: values.pop(parameter.name) for parameter in own}
    with one_line_errors(), progress_shown():
        return _run_and_show(run, inputs, values, pictures)


@contextlib.contextmanager
def one_line_errors() -> Iterator[None]:
    """Turn bad input and interrupts into one line and an exit status."""
    try:
        yield
    except InputError as error:
        fail(str(error))
    except KeyboardInterrupt:
        print("interrupted; what was logged before is whole", file=sys.stderr)
        sys.exit(EXIT_INTERRUPTED)


def fail(line: str) -> typing.NoReturn:
    """Print one line on standard error and exit with status 2."""
    print(f"error: {line}", file=sys.stderr)
    sys.exit(EXIT_BAD_INPUT)


def _run_and_show(
    run: Run,
    inputs: dict[str, Any],
    outputs: dict[str, Any],
    pictures: Sequence[Picture],
) -> int:
    log = RunLog(outputs["log_path"]) if outputs["log"] else None
    wanted = [
        (picture, outputs[f"{picture.flag}_path".replace("-", "_")])
        for picture in pictures
        if outputs[picture.flag.replace("-", "_")]
    ]
    for _, path in wanted:  # fail before the work, not after it
        check_picture_path(path)
    if log and (notice := log.prepare()):
        print(f"note: {notice}", file=sys.stderr)
    result, record = execute(run, inputs)
    if log:
        log.append(record)
    verdict = {True: "PASS", False: "FAIL", None: "measured"}[result.passed]
    if outputs["json"]:
        print(json.dumps(record, allow_nan=False, ensure_ascii=False))
    else:
        print(f"[{verdict}] {result.name}: {result.details}")
    for picture, path in wanted:
        print(f"saved {save_figure(picture.render([result]), path)}", file=sys.stderr)
    return EXIT_FAILED_CLAIM if result.passed is False else 0


def _output_flags(pictures: Sequence[Picture]) -> list[Parameter]:
    flags = []
    for picture in pictures:
        flag, alias = picture.flag, picture.alias
        flags += [
            Parameter(
                flag.replace("-", "_"),
                bool,
                picture.by_default,
                "Draw the picture.",
                (f"--{alias}",) if alias else (),
            ),
            Parameter(
                f"{flag}_path".replace("-", "_"),
                str,
                picture.path,
                "Where the picture goes (.png, .pdf or .svg).",
                (f"--{alias}-path",) if alias else (),
            ),
        ]
    return [
        *flags,
        Parameter("log", bool, False, "Append the record to the run log."),
        Parameter("log_path", str, DEFAULT_LOG, "The run log, one JSON record a line."),
        Parameter("json", bool, False, "Print the whole record as JSON."),
    ]


def _fields_of(config: type) -> list[Parameter]:
    hints = typing.get_type_hints(config, include_extras=True)
    helps = _argument_help(config)
    parameters = []
    for field in dataclasses.fields(config):
        default = field.default
        if field.default_factory is not dataclasses.MISSING:
            default = field.default_factory()
        about = helps.get(field.name, "")
        parameters.append(Parameter(field.name, hints[field.name], default, about))
    return parameters


def _argument_help(documented: Callable[..., Any]) -> dict[str, str]:
    import docstring_parser

    parsed = docstring_parser.parse(inspect.getdoc(documented) or "")
    return {
        entry.arg_name: re.sub(r"\s+", " ", entry.description or "")
        for entry in parsed.params
    }


def _default_field(default: Any) -> Any:
    if isinstance(default, list | dict | set):  # a config's default_factory made it
        return dataclasses.field(default_factory=lambda: copy.copy(default))
    return dataclasses.field(default=default)


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The entry of ``known`` that ``name`` most likely meant, whatever its case."""
    folded = {entry.lower(): entry for entry in known}
    close = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.5)
    return folded[close[0]] if close else None


def _description(run: Run) -> str:
    """The docstring of ``run`` up to its argument list."""
    text = inspect.getdoc(run) or ""
    return re.split(r"\n(?:Args|Returns|Raises):", text)[0].strip()


def _one_line(complaint: str, name: str, flags: Sequence[str]) -> str:
    """The parser's box as one line: its message, its suggestion, the way to help."""
    if unknown := re.search(r"Unrecognized options: --([^\s,]+)", complaint):
        near = nearest(unknown[1].replace("_", "-"), flags)
        hint = f"; did you mean --{near}?" if near else ""
        return f"unknown flag --{unknown[1]}{hint}; see {name} --help"
    lines = [line.strip("│╭╰╮╯─ ") for line in complaint.splitlines()]
    written = (line for line in lines[1:] if line.strip("-"))  # rules, where ASCII
    boxed = [line for line in written if not line.startswith("For full")]
    stop = next((i for i, t in enumerate(boxed) if t == "Argument helptext:"), None)
    message = re.sub(r"\s+", " ", " ".join(boxed[:stop])).rstrip(".")
    if stop is not None and stop + 1 < len(boxed):
        message += f"; expected {boxed[stop + 1]}"
    return f"{message or complaint.strip()}; see {name} --help"
