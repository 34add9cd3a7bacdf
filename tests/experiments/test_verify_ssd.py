"""The suite runs end to end, needs no matplotlib, and can fail."""

import contextlib
import importlib
import io
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from experiments import verify_ssd
from experiments.common import parse_line
from experiments.registry import find

ROOT = Path(__file__).parent.parent.parent

# The one function of each experiment that builds its float kernel.
KERNELS = {
    "exp1": "exp1_scalar_equivalence.attention_kernel",
    "exp2": "exp2_diagonal_equivalence.attention_kernel",
    "exp2b": "exp2b_timevarying_diagonal.attention_kernel",
    "exp3": "exp3_rank_vs_state_dim.ssm_kernel",
    "exp3b": "exp3b_rank_vs_state_dim.ssm_kernel",
    "exp4": "exp4_time_scaling.explicit_kernel",
    "exp4b": "exp4_time_scaling.explicit_kernel",
    "exp5": "exp5_softmax_rank_growth.causal_softmax",
    "exp5b": "exp5_softmax_rank_growth.causal_softmax",
    "exp6": "exp6_attention_dual.dual_kernel",
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The status of one run of everything, what it printed, and its folder."""
    folder = tmp_path_factory.mktemp("whole")
    log, pictures = str(folder / "log.jsonl"), str(folder / "pictures")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        words = ["--seed", "5", "--log-path", log, "--plot-dir", pictures]
        status = verify_ssd.main(words)
    return status, printed.getvalue(), folder


def records(folder):
    return list(map(parse_line, (folder / "log.jsonl").read_text().splitlines()))


def test_every_claim_holds_and_is_logged(whole):
    status, printed, folder = whole
    assert status == 0
    logged = [record["experiment"] for record in records(folder)]
    assert len(logged) == len(set(logged)) == len(verify_ssd.QUICK)
    assert "FAILED" not in printed


def test_records_name_the_seed(whole):
    seeds = [record["seed"] for record in records(whole[-1])]
    assert set(seeds) == {5, None}


def test_pictures_are_written(whole):
    names = {path.stem for path in (whole[-1] / "pictures").glob("*.png")}
    assert {"exp3b_rank_vs_state_dim", "exp4_time_scaling"} <= names
    assert {"exp5b_rank_growth_gap", "exp6_attention_dual"} <= names


@pytest.mark.parametrize("short", sorted(verify_ssd.QUICK))
def test_a_kernel_off_by_1e_6_fails_its_claim(short, tmp_path, monkeypatch, capsys):
    module_name, _, function = KERNELS[short].rpartition(".")
    module = importlib.import_module(f"experiments.{module_name}")
    exact = getattr(module, function)

    def perturbed(*arguments, **options):
        kernel = exact(*arguments, **options)
        noise = np.random.default_rng(0).standard_normal(kernel.shape)
        return kernel * (1 + 1e-6 * noise)

    monkeypatch.setattr(module, function, perturbed)
    monkeypatch.setattr(verify_ssd, "QUICK", {short: verify_ssd.QUICK[short]})
    log = str(tmp_path / "log.jsonl")
    assert verify_ssd.main(["--no-plots", "--log-path", log]) == 1
    claimant = find(short).module.rpartition(".")[2]
    assert f"FAILED {claimant}" in capsys.readouterr().out


def test_passes_with_the_import_of_matplotlib_blocked(tmp_path):
    """Asked for pictures on a machine without matplotlib: noted, and exit status 0."""
    blocked = (
        "import sys; sys.modules['matplotlib'] = None\n"
        "from experiments import verify_ssd\n"
        "sys.exit(verify_ssd.main(sys.argv[1:]))"
    )
    log, folder = tmp_path / "log.jsonl", tmp_path / "pictures"
    words = ["--log-path", str(log), "--plot-dir", str(folder)]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "pictures left out" in done.stdout
    assert list(folder.iterdir()) == []
    assert len(log.read_text().splitlines()) == len(verify_ssd.QUICK)


def test_neither_torch_nor_jax_is_imported():
    """The base install is enough: no experiment of this package reaches for more."""
    code = (
        "import sys\n"
        "from experiments.registry import ENTRIES, load\n"
        "for entry in ENTRIES:\n"
        "    if entry.extra is None: load(entry)\n"
        "print([n for n in ('torch', 'jax', 'scipy') if n in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_an_unwritable_log_is_one_line_and_status_2(tmp_path, run_module):
    blocker = tmp_path / "file"
    blocker.write_text("not a folder")
    done = run_module("experiments.verify_ssd", "--log-path", blocker / "log.jsonl")
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1
    assert "cannot be written" in done.stderr
    assert blocker.read_text() == "not a folder"
