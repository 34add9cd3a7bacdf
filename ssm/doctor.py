"""What runs on this machine, and why the rest does not.

    python -m ssm.doctor

Prints the versions of the libraries, the devices, and a table: for every operator, and
for real and complex numbers, the backend that ``backend="auto"`` takes and, for each
backend that does not run here, the reason in its own words. ``auto`` takes the first
backend of the operator's table (``ssm/ops/<op>/op.py``) that does not refuse. GPU
kernels refuse where the GPU is too old or a package is missing, and where their own
test, run once for each GPU and kept, found them wrong (``python -m ssm.warmup`` runs it
again).

Then the self-check: every backend that says it runs is run, forward and backward, on a
small random problem (:mod:`ssm._cases`) and held against the naive loop in double
precision: outputs, final state and all gradients. The first ("cold") call of a backend
may compile: Numba keeps what it compiled in ``__pycache__`` (or in the folder that the
variable NUMBA_CACHE_DIR names), so the next process starts fast. A backend that says it
runs but fails, or is wrong, makes the exit status 1.

Nothing here needs PyTorch to be imported: without it the doctor says so.
"""

import importlib
import importlib.metadata
import importlib.util
import json
import math
import os
import pkgutil
import platform
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

    from ssm._cases import OpCase
    from ssm.equivalence import Call, Results

LIBRARIES = {  # the package to import -> the distribution that has it
    "torch": "torch",
    "numba": "numba",
    "triton": "triton",
    "cuda.core": "cuda-core",
    "transformers": "transformers",
    "mamba_ssm": "mamba-ssm",
    "causal_conv1d": "causal-conv1d",
}
DTYPES = ("float32", "complex64")
LENGTH = 67  # of the self-check: more than one chunk, and no multiple of anything
HOW_CHECKED = f"""\
Errors of outputs, final states and gradients, relative to the largest entry of each,
against the naive loop in double precision at L = {LENGTH}. Times are of forward and
backward. Cold is the first call: Numba compiles, and keeps the code for the next
process; PyTorch imports its compiler at the first checkpoint of a process."""
NO_TORCH = "PyTorch cannot be imported: no operator runs; mend: uv sync --extra torch"


@dataclass(frozen=True)
class Choice:
    """The backends of one operator for one device and dtype.

    ``refusals``: backend -> why it does not run, None where it does, in the order in
    which ``auto`` tries them.
    """

    op: str
    device: str
    dtype: str
    refusals: Mapping[str, str | None]

    @property
    def running(self) -> list[str]:
        """The backends that say they run."""
        return [name for name, reason in self.refusals.items() if reason is None]

    @property
    def auto(self) -> str | None:
        """The backend that ``auto`` takes."""
        return next(iter(self.running), None)


@dataclass(frozen=True)
class Check:
    """What one backend gave on the small problem.

    ``failure`` is empty if it ran; ``worst`` names the result with the largest error.
    """

    case: str
    backend: str
    device: str
    dtype: str
    tolerance: float
    error: float | None = None
    worst: str = ""
    cold_s: float | None = None
    warm_s: float | None = None
    note: str = ""
    failure: str = ""

    @property
    def passed(self) -> bool:
        """It ran, and the error is within the tolerance (NaN is not)."""
        return self.error is not None and self.error <= self.tolerance

    @property
    def verdict(self) -> str:
        """One line on what is wrong; empty if nothing is."""
        if self.passed:
            return ""
        title = f"{self.case}, backend {self.backend!r}, {self.dtype} on {self.device}"
        if self.failure:
            return f"{title}: {self.failure}"
        return f"{title}: off by {self.error:.1e} in {self.worst}"


# --- the machine ----------------------------------------------------------------------


def versions() -> dict[str, str]:
    """Python and the libraries: the version, 'not installed', or why it is broken."""
    python = f"{platform.python_version()} on {platform.platform()}"
    return {"python": python} | {n: _version(n, d) for n, d in LIBRARIES.items()}


def _version(package: str, distribution: str) -> str:
    try:
        version = importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    try:
        importlib.import_module(package)
    except Exception as error:  # noqa: BLE001  # extensions raise whatever they like
        return f"{version}, but importing it fails: {_in_one_line(error)}"
    return version


def _in_one_line(error: Exception) -> str:
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"


def has_torch() -> bool:
    """Whether PyTorch can be imported."""
    try:
        import torch  # noqa: F401  # only whether it can be
    except (ImportError, OSError):
        return False
    return True


def devices() -> dict[str, str]:
    """The processor with its threads, and every CUDA device, or why there is none."""
    import torch

    threads = f"threads: PyTorch {torch.get_num_threads()}"
    if (numba := sys.modules.get("numba")) is not None:
        threads += f", Numba {numba.get_num_threads()}"
    found = {"cpu": f"{_cpu_model()}, {_cores()} cores for this process; {threads}"}
    if not torch.cuda.is_available():
        return found | {"cuda": f"none: {_why_no_cuda()}"}
    for i in range(torch.cuda.device_count()):
        seen = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = (
            f"{seen.name}, compute capability {seen.major}.{seen.minor}, "
            f"{seen.total_memory / 2**30:.0f} GiB (CUDA {torch.version.cuda})"
        )
    return found


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        lines = []
    named = (line.partition(":")[2] for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine()).strip()


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what this process may use
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _why_no_cuda() -> str:
    import torch

    if torch.version.cuda is None:
        return f"torch {torch.__version__} is built without CUDA"
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return _in_one_line(error)
    return "PyTorch sees no device (CUDA_VISIBLE_DEVICES?)"


# --- what runs ------------------------------------------------------------------------


def operators() -> list[str]:
    """The names of all operators: the folders of ssm/ops."""
    spec = importlib.util.find_spec("ssm.ops")  # finds it without importing PyTorch
    assert spec is not None, "ssm.ops lies beside this file"
    folders = spec.submodule_search_locations
    return [m.name for m in pkgutil.iter_modules(folders) if m.ispkg]


def places() -> list[str]:
    """The kinds of devices to ask for."""
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def choices(ops: Sequence[str]) -> list[Choice]:
    """What every backend of every operator says about this machine."""
    import torch

    from ssm.ops._dispatch import Request, explain

    found = []
    for op in ops:
        # By module: in ssm.ops the name of an operator is the function.
        table = importlib.import_module(f"ssm.ops.{op}.op").BACKENDS
        for place in places():
            for name in DTYPES:
                dtype = getattr(torch, name)
                request = Request(torch.device(place), dtype, needs_grad=True)
                found.append(Choice(op, place, name, explain(table, request)))
    return found


# --- the self-check -------------------------------------------------------------------


def self_checks(chosen: Sequence[Choice]) -> Iterator[Callable[[], Check]]:
    """A check for each backend that says it runs, wherever there is a case for it."""
    for choice in chosen:
        for case in cases(choice):
            for backend in choice.running:
                yield partial(check, case, backend, choice.device, choice.dtype)


def cases(choice: Choice) -> list["OpCase"]:
    """The small problems of this operator with numbers of this kind."""
    import torch

    from ssm._cases import OPS, TIMELESS

    dtype = getattr(torch, choice.dtype)
    every = (*OPS, *TIMELESS)
    return [c for c in every if operator_of(c) == choice.op and dtype in c.dtypes]


def operator_of(case: "OpCase") -> str:
    """The operator's name: that of the case up to what it adds behind a comma."""
    return case.name.partition(",")[0]


def unchecked(chosen: Sequence[Choice]) -> list[str]:
    """Where a backend says it runs, but there is no small problem to hold it to."""
    return [
        f"{choice.op} with {choice.dtype} on {choice.device}"
        for choice in chosen
        if choice.running and not cases(choice)
    ]


def check(case: "OpCase", backend: str, device: str, dtype: str) -> Check:
    """Run ``backend`` on the small problem; never raises what the backend raises.

    A backend that refuses an initial state is checked from zero, with its reason in
    ``note``.
    """
    from ssm._errors import BackendError

    try:
        return _measure(case, backend, device, dtype)
    except BackendError as refusal:
        note = str(refusal)
    except Exception as error:  # noqa: BLE001  # a diagnosis, whatever it is
        return _failed(case, backend, device, dtype, error)
    try:
        return _measure(case, backend, device, dtype, note=note)
    except Exception as error:  # noqa: BLE001  # as above
        return _failed(case, backend, device, dtype, error)


def _failed(
    case: "OpCase", backend: str, device: str, dtype: str, error: Exception
) -> Check:
    tolerance = _tolerance(dtype)
    failure = _in_one_line(error)
    return Check(case.name, backend, device, dtype, tolerance, failure=failure)


def _tolerance(dtype: str) -> float:
    import torch

    from ssm.equivalence import TOLERANCE

    return TOLERANCE[getattr(torch, dtype).to_real()]


def _measure(
    case: "OpCase", backend: str, device: str, dtype: str, note: str = ""
) -> Check:
    """The errors of a first and a second run; with a ``note`` from a zero state."""
    import torch

    from ssm._cases import Draw

    generator = torch.Generator().manual_seed(LENGTH)
    drawn = case.build(LENGTH, Draw(generator, getattr(torch, dtype)))
    reference = _run(case, "naive", "cpu", _doubled(drawn), from_zero=bool(note))
    seconds, worst = [], ("", -1.0)
    for _ in range(2):
        start = time.perf_counter()
        results = _run(case, backend, device, drawn, from_zero=bool(note))
        seconds.append(time.perf_counter() - start)
        worst = _worse(worst, _worst(results, reference))
    return Check(
        case.name,
        backend,
        device,
        dtype,
        _tolerance(dtype),
        error=worst[1],
        worst=worst[0],
        cold_s=seconds[0],
        warm_s=seconds[1],
        note=note,
    )


Named = tuple[str, float]


def _worst(results: "Results", reference: "Results") -> Named:
    """The result with the largest error, and that error."""
    from ssm.equivalence import relative_error

    largest = max(float(x.abs().max()) for x in reference.values())
    found: Named = ("", -1.0)
    for name, value in results.items():
        error = relative_error(value, reference[name], largest)
        found = _worse(found, (name, error))
    return found


def _worse(one: Named, other: Named) -> Named:
    """NaN is worse than any number."""
    if math.isnan(one[1]) or other[1] <= one[1]:
        return one
    return other


Operands = tuple["Results", "Results", "torch.Tensor"]


def _doubled(operands: Operands) -> Operands:
    import torch
    from torch.utils._pytree import tree_map

    def wider(x: torch.Tensor) -> torch.Tensor:
        return x.to(torch.promote_types(x.dtype, torch.float64))

    return tree_map(wider, operands)


def _run(
    case: "OpCase", backend: str, device: str, operands: Operands, *, from_zero: bool
) -> "Results":
    """Outputs, final state and gradients, on the CPU wherever they were computed."""
    from ssm.equivalence import op_results

    call = _moved(case, backend, device, from_zero=from_zero)
    return op_results(call, *operands)


def _moved(case: "OpCase", backend: str, device: str, *, from_zero: bool) -> "Call":
    """The operator on ``device``, its operands and results on the CPU."""

    def call(
        time: "Results", fixed: "Results", state: "torch.Tensor"
    ) -> "tuple[torch.Tensor, torch.Tensor]":
        if from_zero:
            state = state.new_zeros(state.shape)
        there = [{n: x.to(device) for n, x in named.items()} for named in (time, fixed)]
        y, final = case.run(*there, state.to(device), backend=backend)
        return y.cpu(), final.cpu()

    return call


# --- the report -----------------------------------------------------------------------


def footnotes(chosen: Sequence[Choice]) -> dict[str, int]:
    """Every reason of a refusal -> its number."""
    reasons = [r for choice in chosen for r in choice.refusals.values() if r]
    return {reason: i for i, reason in enumerate(dict.fromkeys(reasons), 1)}


def show_machine(libraries: Mapping[str, str], machine: Mapping[str, str]) -> None:
    """Print versions and devices."""
    for name, value in {**libraries, **machine}.items():
        print(f"{name:<14} {value}")


def show_choices(chosen: Sequence[Choice]) -> None:
    """Print the table of backends and the reasons below it."""
    from rich.table import Table

    notes = footnotes(chosen)
    table = Table("operator", "on", "numbers", "auto takes", "also run", "do not run")
    for choice in chosen:
        others = [name for name in choice.running if name != choice.auto]
        refusing = [f"{n} ({notes[r]})" for n, r in choice.refusals.items() if r]
        table.add_row(
            choice.op,
            choice.device,
            choice.dtype,
            choice.auto or "none",
            ", ".join(others),
            ", ".join(refusing),
        )
    _print_table(table)
    for reason, i in notes.items():
        print(f"({i}) {reason}")


def show_checks(checks: Sequence[Check], without: Sequence[str]) -> None:
    """Print the table of the self-check and what it says."""
    from rich.table import Table

    table = Table("self-check", "backend", "on", "numbers", "worst error")
    for name in ("cold (ms)", "warm (ms)"):
        table.add_column(name, justify="right")
    for row in checks:
        failed = "[bold red]failed[/]"
        error = failed if row.error is None else f"{row.error:.1e}"
        if row.error is not None and not row.passed:
            error += " " + failed
        seconds = (row.cold_s, row.warm_s)
        times = ["" if s is None else f"{1e3 * s:.1f}" for s in seconds]
        table.add_row(row.case, row.backend, row.device, row.dtype, error, *times)
    _print_table(table)
    print(HOW_CHECKED)
    for note in dict.fromkeys(row.note for row in checks if row.note):
        print(f"checked from a zero state: {note}")
    for what in without:
        print(f"not checked: {what} (ssm._cases has no problem for it)")
    for row in checks:
        if not row.passed:
            print(f"FAILED {row.verdict}")
    print(f"{sum(row.passed for row in checks)} of {len(checks)} self-checks passed")


def _print_table(table: Any) -> None:
    from rich.console import Console

    console = Console()
    console.width = max(console.width, 100)
    console.print(table)


def as_json(
    libraries: Mapping[str, str],
    machine: Mapping[str, str],
    chosen: Sequence[Choice],
    checks: Sequence[Check],
) -> str:
    """The whole diagnosis as one JSON object."""
    from experiments.common import to_json

    diagnosis = {
        "versions": libraries,
        "devices": machine,
        "backends": [{**asdict(c), "auto": c.auto} for c in chosen],
        "self_check": [{**asdict(c), "passed": c.passed} for c in checks],
        "not_checked": unchecked(chosen),
    }
    return json.dumps(to_json(diagnosis), allow_nan=False, ensure_ascii=False)


def main(argv: Sequence[str] | None = None) -> int:
    """Print the diagnosis; return 1 if a backend does not do what it says."""
    from experiments import common

    parameters = (
        common.Parameter("quick", bool, False, "Leave the self-check out."),
        common.Parameter("json", bool, False, "Print one JSON object instead."),
        common.Parameter("only", str, "", "Only operators whose name contains this."),
    )
    about = (__doc__ or "").strip()
    options = common.parse("python -m ssm.doctor", about, parameters, argv)
    ops = [op for op in operators() if options["only"] in op]
    if not ops:
        common.fail(f"no operator matches; expected one of {', '.join(operators())}")
    libraries = versions()
    if not has_torch():
        show_machine(libraries, {})
        print(NO_TORCH)
        return 1
    machine, chosen = devices(), choices(ops)
    wanted = [] if options["quick"] else list(self_checks(chosen))
    with common.one_line_errors(), common.progress_shown():
        checks = [run() for run in common.track(wanted, "self-checks")]
    if options["json"]:
        print(as_json(libraries, machine, chosen, checks))
    else:
        show_machine(libraries, machine)
        show_choices(chosen)
        if checks:
            show_checks(checks, unchecked(chosen))
    return 0 if all(row.passed for row in checks) else 1


if __name__ == "__main__":
    sys.exit(main())
