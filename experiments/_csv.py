"""Run records as a flat table, for spreadsheets; nothing is lost on the way back.

Columns are the fields of a record; the entries of ``meta`` and ``params`` have columns
of their own (``meta.T``, ``params.seed``). A cell holds JSON, except that a string
which could not be mistaken for JSON stands without quotes. An empty cell means that
the record has no such entry.
"""

import contextlib
import csv
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from experiments._inputs import InputError
from experiments._runlog import FIELDS, RunLog, refuse_constant, unwritable

_SPREAD = ("meta", "params")
_LONGEST_CELL = 2**31 - 1  # the reader's default, 131072, is short for arrays


def write_csv(log: RunLog, path: str | Path) -> None:
    """Rewrite ``path`` from the whole of ``log``: the new table or the old one.

    Raises InputError if the log holds a foreign line or the table cannot be written.
    """
    target = Path(path)
    partial = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with log.locked():  # a table from an older log must not replace a newer one
            rows = [_flat(record) for record in log.records()]
            with open(partial, "w", encoding="utf-8", newline="") as file:
                table = csv.DictWriter(file, _columns(rows))
                table.writeheader()
                table.writerows(rows)
            partial.replace(target)
    except OSError as error:
        raise unwritable(target, error) from None
    finally:
        _remove(partial)


def read_csv(path: str | Path) -> Iterator[tuple[int, dict[str, Any] | str]]:
    """(line number, record or what is wrong with the row) for each row of a table.

    Raises InputError if the file cannot be read.
    """
    csv.field_size_limit(_LONGEST_CELL)
    start = 2
    try:
        with open(path, encoding="utf-8", newline="") as file:
            table = csv.DictReader(file)
            for row in table:
                yield start, _record(row)
                start = table.line_num + 1
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror})") from None
    except (csv.Error, UnicodeDecodeError) as error:
        yield start, f"not a table of records ({error})"


def _remove(partial: Path) -> None:
    with contextlib.suppress(OSError):  # its folder may be no folder at all
        partial.unlink(missing_ok=True)


def _columns(rows: Iterable[dict[str, str]]) -> list[str]:
    """Fields in the record's order, those of meta and params sorted in their place."""
    names = {name for row in rows for name in row}
    columns: list[str] = []
    for field in FIELDS:
        if field in _SPREAD:
            columns += sorted(name for name in names if name.startswith(f"{field}."))
        else:
            columns.append(field)
    return columns


def _flat(record: dict[str, Any]) -> dict[str, str]:
    cells = {k: _cell(v) for k, v in record.items() if k not in _SPREAD}
    for field in _SPREAD:
        cells |= {f"{field}.{k}": _cell(v) for k, v in record[field].items()}
    return cells


def _cell(value: Any) -> str:
    if isinstance(value, str) and value and _value(value) is value:
        return value
    return json.dumps(value, allow_nan=False, ensure_ascii=False)


def _value(cell: str) -> Any:
    try:
        return json.loads(cell, parse_constant=refuse_constant)
    except ValueError:
        return cell


def _record(row: dict[str | None, Any]) -> dict[str, Any] | str:
    if None in row or None in row.values():
        return "the number of cells differs from the header's"
    record: dict[str, Any] = {field: {} for field in _SPREAD}
    for column, cell in row.items():
        if not cell or column is None:
            continue
        field, dot, name = column.partition(".")
        if dot and field in _SPREAD:
            record[field][name] = _value(cell)
        else:
            record[column] = _value(cell)
    return record
