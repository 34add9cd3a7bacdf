"""Every experiment is reached by name, and nothing is imported before it is asked."""

import subprocess
import sys
from pathlib import Path

import pytest

from experiments import registry
from experiments.common import InputError, parameters_of

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("entry", registry.ENTRIES, ids=lambda entry: entry.short)
def test_every_experiment_loads_and_keeps_the_contract(entry):
    experiment = registry.load(entry)
    assert experiment.claim
    assert experiment.run.__doc__
    names = [parameter.name for parameter in parameters_of(experiment.run)]
    assert list(experiment.defaults()) == names
    for picture in experiment.pictures:
        assert Path(picture.path).parts[0] == "outputs"
    assert experiment.problems is not None


@pytest.mark.parametrize("entry", registry.ENTRIES, ids=lambda entry: entry.short)
def test_three_names_find_each_experiment(entry):
    last = entry.module.rpartition(".")[2]
    for name in (entry.short, entry.module, last):
        assert registry.find(name) is entry


def test_names_are_unique():
    names = [entry.short for entry in registry.ENTRIES]
    names += [entry.module for entry in registry.ENTRIES]
    assert len(set(names)) == len(names)


@pytest.mark.parametrize(
    ("name", "suggested"),
    [
        ("exp22b", "exp2b"),
        ("EXP3", "exp3"),
        ("exp6_attention_dul", "exp6_attention_dual"),
    ],
)
def test_an_unknown_name_suggests_the_nearest(name, suggested):
    with pytest.raises(InputError, match=rf"did you mean {suggested}\?"):
        registry.find(name)


def test_a_hopeless_name_lists_the_choices():
    with pytest.raises(InputError, match=r"exp1, exp2, .*choose one of those"):
        registry.find("zzzzzzzz")


class Blocker:
    """An import hook that makes a package look absent"""

    def __init__(self, name):
        self.name = name

    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == self.name:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


@pytest.fixture
def needy(tmp_path, monkeypatch):
    """An experiment that imports two packages which are not there"""

    def make(imported):
        (tmp_path / "needy_experiment.py").write_text(f"import {imported}\n")
        return registry.Entry(
            "needy", "needy_experiment", "", "torch", ("ssm_absent_torch",)
        )

    monkeypatch.syspath_prepend(tmp_path)
    for name in ("ssm_absent_torch", "ssm_absent_other"):
        monkeypatch.setattr(sys, "meta_path", [Blocker(name), *sys.meta_path])
    monkeypatch.delitem(sys.modules, "needy_experiment", raising=False)
    return make


def test_a_missing_package_names_the_extra_that_brings_it(needy):
    with pytest.raises(InputError, match="--extra torch") as caught:
        registry.load(needy("ssm_absent_torch.nn"))
    assert "without ssm_absent_torch" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_another_missing_package_is_a_fault_of_ours(needy):
    with pytest.raises(ModuleNotFoundError, match="ssm_absent_other"):
        registry.load(needy("ssm_absent_other"))


def test_the_registry_imports_no_experiment():
    code = (
        "import sys, experiments.registry as r; "
        "print([e.module for e in r.ENTRIES if e.module in sys.modules], "
        "[m for m in ('torch', 'jax', 'matplotlib') if m in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True
    )
    assert (done.stdout, done.stderr) == ("[] []\n", "")
