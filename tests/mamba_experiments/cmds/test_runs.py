"""Which runs are read, kept and compared, and what is refused."""

import pytest

from experiments.common import InputError, RunLog
from mamba_experiments.cmds import _runs
from mamba_experiments.cmds._runs import read_runs, select
from tests.mamba_experiments.cmds.helpers import curve, read, record, write

# --- reading --------------------------------------------------------------------------


def test_records_of_other_experiments_and_schemas_are_counted(tmp_path, capsys):
    other = record() | {"experiment": "exp1_scalar_equivalence"}
    foreign = {"schema": 7, "anything": [1]}
    runs = read(tmp_path, record(seed=3), other, foreign, record(seed=4))
    assert [run.seed for run in runs] == [3, 4]
    assert capsys.readouterr().err == "note: skipped 2 records of other experiments\n"


@pytest.mark.parametrize("line", ["not JSON", "[1]", '{"model": "x"}', '{"schema": 1}'])
def test_a_line_that_is_no_record_is_named(tmp_path, line):
    path = write(tmp_path / "runs.jsonl", record())
    path.write_text(path.read_text() + line + "\n")
    with pytest.raises(InputError, match=r"runs\.jsonl:2: "):
        read_runs(str(path))


def test_a_torn_last_line_is_left_out_and_said(tmp_path, capsys):
    path = write(tmp_path / "runs.jsonl", record(seed=1))
    path.write_text(path.read_text() + '{"schema": 1, "run_')
    assert [run.seed for run in read_runs(str(path))] == [1]
    assert "runs.jsonl:2: left out, a torn line" in capsys.readouterr().err


def without(key):
    def faulty(entry):
        entry["meta"] = {k: v for k, v in entry["meta"].items() if k != key}
        entry["params"] = {k: v for k, v in entry["params"].items() if k != key}
        return entry

    return faulty


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        (without("curve"), "'curve' is missing"),
        (without("n_params"), "'n_params' is missing"),
        (without("parts"), "'parts' is missing"),
        (without("task"), "'task' is missing"),
        (without("model"), "'model' is missing"),
        (without("dataset"), "'dataset' is missing"),
        (lambda entry: entry | {"seed": None}, "NoneType"),
        (lambda entry: entry | {"meta": entry["meta"] | {"curve": []}}, "is empty"),
        (lambda entry: entry | {"meta": entry["meta"] | {"curve": [{}]}}, "'epoch'"),
        (lambda entry: entry | {"started": "yesterday"}, "yesterday"),
    ],
)
def test_a_malformed_training_record_is_named(tmp_path, fault, said):
    with pytest.raises(InputError, match=r"runs\.jsonl:2: ") as caught:
        read(tmp_path, record(), fault(record(seed=1)))
    assert said in str(caught.value)


def test_a_missing_log_and_one_without_trainings_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such file"):
        read_runs(str(tmp_path / "none.jsonl"))
    with pytest.raises(InputError, match="no training runs, 1 records of other"):
        read(tmp_path, record() | {"experiment": "exp1_scalar_equivalence"})


def test_reading_leaves_the_log_alone(tmp_path):
    path = write(tmp_path / "runs.jsonl", record())
    before = path.read_bytes(), sorted(p.name for p in tmp_path.iterdir())
    read_runs(str(path))
    assert (path.read_bytes(), sorted(p.name for p in tmp_path.iterdir())) == before
    assert [r["seed"] for r in RunLog(path).records()] == [0]


# --- selection ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("asked", "seeds"),
    [
        ({"dataset": "recall"}, [2]),
        ({"models": ["s4d"]}, [1]),
        ({"where": ["lr=1e-2"]}, [1]),
        ({"where": ["compile=true"]}, [2]),
        ({"where": ["lr=0.001", "dataset=wikitext2"]}, [0]),
        ({"where": ["max-vocab=absent"]}, [0, 2]),
    ],
)
def test_runs_are_selected_by_what_they_are(tmp_path, asked, seeds):
    runs = read(
        tmp_path,
        record(seed=0),
        record("s4d", seed=1, lr=0.01, max_vocab=9),
        record(seed=2, dataset="recall", compile=True),
    )
    assert [run.seed for run in select(runs, "log", **asked)] == seeds


def test_nothing_left_says_what_the_log_has(tmp_path):
    runs = read(tmp_path, record(), record("s4d"), record("s4d", seed=1))
    with pytest.raises(InputError) as caught:
        select(runs, "a.jsonl", dataset="mqar", models=["jamba"])
    assert str(caught.value) == (
        "a.jsonl: no runs of dataset=mqar jamba; it has mamba_simple on wikitext2 "
        "(1 runs), s4d on wikitext2 (2 runs); ask for one of those"
    )


@pytest.mark.parametrize(
    ("text", "said"), [("lr", "SETTING=VALUE"), ("bach_size=3", "did you mean batch_s")]
)
def test_a_faulty_condition_is_answered(tmp_path, text, said):
    with pytest.raises(InputError, match=said):
        select(read(tmp_path, record()), "log", where=[text])


def test_a_repeated_seed_counts_once_the_latest(tmp_path, capsys):
    late = record(seed=5, second=9, curve=curve([1.0], [0.5]))
    runs = read(tmp_path, late, record(seed=5), record(seed=6))
    kept = _runs.latest(runs, lambda run: (run.model, run.seed))
    assert [(run.seed, run.curve[0]["val_loss"]) for run in kept] == [(5, 1.0), (6, 2)]
    said = capsys.readouterr().err
    assert said.startswith("note: 1 runs left out")
    assert said.endswith("mamba_simple, seed 5\n")


# --- equal settings -------------------------------------------------------------------


def check(runs, **options):
    _runs.check_equal_settings(runs, "a.jsonl", **options)


def test_a_mixture_names_every_key_its_values_and_a_mend_that_works(tmp_path):
    runs = read(
        tmp_path,
        record(seed=0),
        record(seed=1, lr=0.003),
        record(seed=2, lr=0.003, epochs=7),
        record(seed=3, lr=0.003),
    )
    with pytest.raises(InputError) as caught:
        check(runs)
    line = str(caught.value)
    assert "different settings: epochs: 5, 7; lr: 0.001, 0.003; expected" in line
    assert "may-differ" not in line
    mend = line.partition("--where ")[2].split()
    kept = select(runs, "a.jsonl", where=mend)
    assert [run.seed for run in kept] == [1, 3]
    check(kept)


def test_seed_model_device_and_places_may_differ(tmp_path):
    free = {"data_dir": "b", "plot_dir": "c", "log_path": "d", "device": "cuda"}
    check(read(tmp_path, record(), record("s4d", seed=1, save_plots=True, **free)))


@pytest.mark.parametrize("setting", ["dataset", "precision", "n_state", "new_flag"])
def test_every_other_flag_is_a_setting(tmp_path, setting):
    runs = read(tmp_path, record(), record(seed=1, **{setting: "other"}))
    with pytest.raises(InputError, match=f"{setting}: .*other"):
        check(runs)


def test_other_text_under_the_same_flags_is_another_setting(tmp_path):
    def on(*hashes):
        texts = zip(("train", "val"), hashes, strict=True)
        return {"corpus": {"texts": {split: {"sha256": h} for split, h in texts}}}

    same = [record(task=on("a" * 64, "b" * 64), seed=seed) for seed in (0, 1)]
    check(read(tmp_path, *same))
    other = record(task=on("a" * 64, "c" * 64), seed=2)
    with pytest.raises(InputError, match=r"text_sha256: a{8}-b{8}, a{8}-c{8};"):
        check(read(tmp_path / "2", *same, other))


def test_models_may_be_let_differ_but_not_the_seeds_of_one(tmp_path):
    apart = [record(d_model=64), record("s4d", d_model=70)]
    runs = read(tmp_path / "1", *apart)
    with pytest.raises(InputError, match=r"--may-differ d_model$"):
        check(runs)
    check(runs, may_differ=["d-model"])
    runs = read(tmp_path / "2", *apart, record("s4d", d_model=80, seed=1))
    with pytest.raises(InputError, match="d_model: 64, 70, 80"):
        check(runs, may_differ=["d_model"])
    with pytest.raises(InputError, match="did you mean d_model"):
        check(runs, may_differ=["dmodel"])


def test_equal_flags_with_other_sizes_are_refused(tmp_path):
    runs = read(tmp_path, record(n_params=100), record(seed=1, n_params=120))
    with pytest.raises(InputError, match="100, 120 parameters"):
        check(runs)
    sized = [record(n_params=n, n_state=n) for n in (100, 120)]
    check(read(tmp_path / "2", *sized), varied=["n_state"])


def test_different_seeds_are_said(tmp_path, capsys):
    runs = read(tmp_path, *(record(seed=s) for s in (0, 1, 2, 7)), record("s4d"))
    _runs.note_seeds(_runs.by_model(runs))
    said = capsys.readouterr().err
    assert (
        said == "note: the models have different seeds: mamba_simple: 0-2, 7; s4d: 0\n"
    )
    _runs.note_seeds(_runs.by_model(runs[:1] + runs[-1:]))
    assert capsys.readouterr().err == ""
