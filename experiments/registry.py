"""Every experiment of every package by name; a package is imported only when asked."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from experiments._cli import nearest
from experiments.common import (
    ExperimentResult,
    InputError,
    Picture,
    parameters_of,
)


@dataclass(frozen=True)
class Entry:
    """One experiment: short name, module, what it shows, and the extra it needs.

    ``needs`` names the importable packages that the extra brings.
    """

    short: str
    module: str
    summary: str
    extra: str | None = None
    needs: tuple[str, ...] = ()


@dataclass(frozen=True)
class Experiment:
    """A loaded experiment: its entry and what its module offers."""

    entry: Entry
    run: Callable[..., ExperimentResult]
    pictures: tuple[Picture, ...]
    problems: Callable[[dict[str, Any]], list[str]] | None
    claim: str

    def defaults(self) -> dict[str, Any]:
        """The default of every parameter of ``run``."""
        return {each.name: each.default for each in parameters_of(self.run)}


def _ssd(short: str, name: str, summary: str) -> Entry:
    return Entry(short, f"experiments.{name}", summary)


ENTRIES: tuple[Entry, ...] = (
    _ssd("exp1", "exp1_scalar_equivalence", "scalar SSM = 1-semiseparable attention"),
    _ssd("exp2", "exp2_diagonal_equivalence", "diagonal SSM = sum of N heads"),
    _ssd(
        "exp2b", "exp2b_timevarying_diagonal", "the same with A, B, C varying in time"
    ),
    _ssd("exp3", "exp3_rank_vs_state_dim", "three ranks of a kernel against theory"),
    _ssd("exp3b", "exp3b_rank_vs_state_dim", "semiseparable rank against state size"),
    _ssd("exp4", "exp4_time_scaling", "time of recurrence, chunked form, full kernel"),
    _ssd("exp4b", "exp4b_time_scaling_errorbars", "the same with confidence intervals"),
    _ssd("exp5", "exp5_softmax_rank_growth", "rank of softmax attention as T grows"),
    _ssd("exp5b", "exp5b_softmax_rank_growth", "the same over seeds, with rank gaps"),
    _ssd("exp6", "exp6_attention_dual", "which kernels have an attention dual"),
    Entry(
        "hippo",
        "scaling_experiments.hippo_conditioning",
        "why nobody diagonalises LegS directly",
        extra="torch",
        needs=("torch",),
    ),
    Entry(
        "train_lm",
        "scaling_experiments.train_lm",
        "document 3's models, or any pattern, on WikiText-2 in GPT-2's tokens",
        extra="torch",
        needs=("torch", "transformers", "safetensors", "accelerate"),
    ),
    Entry(
        "scaling",
        "scaling_experiments.benchmark_scaling",
        "time and memory against length: SSM forms, document 3's loop, attention",
        extra="torch",
        needs=("torch", "numba"),
    ),
    Entry(
        "generation",
        "scaling_experiments.benchmark_generation",
        "time per token and cache bytes against context: Mamba, transformer",
        extra="torch",
        needs=("torch", "numba"),
    ),
    Entry(
        "attention_cost",
        "scaling_experiments.attention_cost",
        "a chapter's table of attention's cost, the whole count, and measured bytes",
        extra="torch",
        needs=("torch", "numba"),
    ),
    Entry(
        "views",
        "scaling_experiments.views",
        "every layer's matrix, the ranks below its diagonal, its forms agreeing",
        extra="torch",
        needs=("torch", "numba"),
    ),
    Entry(
        "copy_recall",
        "scaling_experiments.copy_recall",
        "copying, recall and a needle: attention, SSMs by state size, a hybrid",
        extra="torch",
        needs=("torch", "accelerate"),
    ),
    Entry(
        "gradients",
        "scaling_experiments.gradients",
        "gradient against lag for an RNN, a GRU, S4D, Mamba and attention",
        extra="torch",
        needs=("torch",),
    ),
    Entry(
        "speculative",
        "scaling_experiments.speculative",
        "draft and target: acceptance rate, tokens a call against theory, time",
        extra="torch",
        needs=("torch", "accelerate"),
    ),
    Entry(
        "mamba_train",
        "mamba_experiments.train",
        "one model on recall, MQAR or text: loss and accuracy over the epochs",
        extra="torch",
        needs=("torch", "safetensors"),
    ),
    Entry(
        "lcde_toy",
        "lcde.toy",
        "a random Linear CDE and least squares on signature terms",
        extra="jax",
        needs=("jax", "equinox", "diffrax", "signax", "sklearn"),
    ),
    Entry(
        "lcde_a5",
        "lcde.a5",
        "a trained Linear CDE on the word problem of A5",
        extra="jax",
        needs=("jax", "equinox", "optax", "safetensors"),
    ),
    Entry(
        "sm_toy",
        "lcde.sm_toy",
        "S4, S5, Mamba and others on signature terms",
        extra="torch",
        needs=("torch", "safetensors"),
    ),
    Entry(
        "sm_a5",
        "lcde.sm_a5",
        "RNN, Transformer, S4, Mamba and others on the word problem of A5",
        extra="torch",
        needs=("torch", "safetensors"),
    ),
    Entry(
        "synthetic_decays",
        "time_series_experiments.exp_synthetic_ndecay",
        "regression on mixtures of decays, against the bound of N states",
        extra="torch",
        needs=("torch", "scipy"),
    ),
    Entry(
        "real_series",
        "time_series_experiments.exp_real_series",
        "forecasts of sunspots and of CO2, beside seasonal-naive and AR",
        extra="torch",
        needs=("torch", "statsmodels"),
    ),
)


def find(name: str) -> Entry:
    """The entry called ``name``: short name, module, or the module's last part.

    Raises InputError that suggests the nearest name.
    """
    for entry in ENTRIES:
        if name in (entry.short, entry.module, entry.module.rpartition(".")[2]):
            return entry
    known = [entry.short for entry in ENTRIES]
    modules = [entry.module.rpartition(".")[2] for entry in ENTRIES]
    near = nearest(name, known + modules)
    hint = f"did you mean {near}?" if near else "choose one of those"
    raise InputError(f"experiment: got {name!r}; expected {', '.join(known)}; {hint}")


def load(entry: Entry) -> Experiment:
    """Import the experiment's module.

    Raises InputError that names the extra to install where a package is missing.
    """
    try:
        module: ModuleType = importlib.import_module(entry.module)
    except ModuleNotFoundError as error:
        missing = (error.name or "").partition(".")[0]
        if entry.extra is None or missing not in entry.needs:
            raise
        raise InputError(
            f"{entry.short}: got an environment without {missing}; expected the extra "
            f"'{entry.extra}'; run with `uv run --extra {entry.extra} …`"
        ) from None
    return Experiment(
        entry,
        module.run,
        getattr(module, "PICTURES", ()),
        getattr(module, "problems", None),
        getattr(module, "CLAIM", entry.summary),
    )
