"""Checkpoints: the same numbers as transformers', round trips, and files gone wrong."""

import functools
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor

from ssm._errors import ArgumentError
from ssm.models import checkpoint
from ssm.models.config import SequenceLMConfig
from ssm.models.generate import generate
from ssm.models.lm import SequenceLM
from ssm.models.patterns import NAMED_PATTERNS
from tests.ssm.models.helpers import LETTERS, tiny, tiny_config, tokens

SIZES = {"vocab_size": 19, "hidden_size": 12, "num_hidden_layers": 2, "state_size": 5}
WEIGHTS, CONFIG = "model.safetensors", "config.json"


@functools.cache
def published(mixer: str) -> Any:
    """A model of transformers whose every parameter was moved at random."""
    with torch.random.fork_rng():
        torch.manual_seed(3)
        if mixer == "mamba":
            config = transformers.MambaConfig(**SIZES, layer_norm_epsilon=1e-3)
            model = transformers.MambaForCausalLM(config)
        else:
            heads = {"num_heads": 6, "head_dim": 4, "n_groups": 2, "chunk_size": 4}
            config = transformers.Mamba2Config(**SIZES, **heads)
            model = transformers.Mamba2ForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_logits_and_tokens_are_those_of_transformers(
    mixer: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    theirs, x = published(mixer), tokens(3, 21)
    theirs.save_pretrained(tmp_path)
    with caplog.at_level(logging.INFO):
        model = SequenceLM.from_pretrained(tmp_path).eval()
    assert model.checkpoint_format is not None
    assert model.checkpoint_format.startswith("Hugging Face, Mamba")
    assert model.checkpoint_format in caplog.text  # said
    with torch.no_grad():
        expected, actual = theirs(x).logits, model(x).logits
        assert expected.abs().max() > 1
        torch.testing.assert_close(actual, expected, atol=1e-4, rtol=0)
        new = generate(model, x[:1, :5], 8, greedy=True).tokens
        options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        theirs_new = theirs.generate(x[:1, :5], max_new_tokens=8, **options)
    assert torch.equal(new, theirs_new[:, 5:])


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_round_trips_through_every_layout(
    mixer: str, tied: bool, tmp_path: Path
) -> None:
    model, x = tiny(mixer, tie_embeddings=tied, dtype=torch.float32), tokens(2, 7)
    for layout in ("hugging_face", "mamba_ssm", "native"):
        folder = tmp_path / layout
        model.save_pretrained(folder, layout)  # type: ignore[arg-type]
        again = SequenceLM.from_pretrained(folder)
        assert torch.equal(again(x).logits, model(x).logits), layout
        assert again.config.tie_embeddings is tied
        assert sum("head" in name for name in load_file(folder / WEIGHTS)) == (not tied)
    kind = getattr(transformers, f"{mixer.capitalize()}ForCausalLM")
    theirs = kind.from_pretrained(tmp_path / "hugging_face").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(x).logits, model(x).logits, atol=1e-4, rtol=0)


def test_checkpoints_in_pieces(tmp_path: Path) -> None:
    theirs, x = published("mamba"), tokens(1, 5)
    theirs.save_pretrained(tmp_path, max_shard_size="5KB")
    pieces = sorted(tmp_path.glob("*.safetensors"))
    assert len(pieces) > 1
    with torch.no_grad():
        actual = SequenceLM.from_pretrained(tmp_path)(x).logits
        torch.testing.assert_close(actual, theirs(x).logits, atol=1e-4, rtol=0)
    pieces[0].unlink()
    with pytest.raises(ArgumentError, match=pieces[0].name):
        SequenceLM.from_pretrained(tmp_path)


@pytest.mark.parametrize("pattern", [*NAMED_PATTERNS, LETTERS])
def test_our_own_layout_keeps_everything(pattern: str, tmp_path: Path) -> None:
    model, x = tiny(pattern, dtype=torch.float32, tie_embeddings=False), tokens(2, 5)
    model.save_pretrained(tmp_path)
    random = torch.get_rng_state()
    again = SequenceLM.from_pretrained(tmp_path).eval()
    assert torch.equal(random, torch.get_rng_state())  # nothing was initialised
    assert again.config == model.config
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    assert torch.equal(again(x).logits, model(x).logits)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG, WEIGHTS]


def test_a_model_from_the_meta_device_takes_a_checkpoint(tmp_path: Path) -> None:
    model, x = tiny("M+"), tokens(2, 5)
    model.save_pretrained(tmp_path)
    with torch.device("meta"):
        empty = SequenceLM(model.config, dtype=torch.float64)
    assert all(parameter.is_meta for parameter in empty.parameters())
    empty.to_empty(device="cpu").load_state_dict(load_file(tmp_path / WEIGHTS))
    assert torch.equal(empty(x).logits, model(x).logits)


def test_dtypes_are_kept_or_chosen(tmp_path: Path) -> None:
    model = tiny("M+", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path)
    kept, wide = (
        SequenceLM.from_pretrained(tmp_path, dtype=d) for d in (None, torch.float64)
    )
    for name, tensor in model.state_dict().items():
        assert torch.equal(kept.state_dict()[name], tensor), name
        assert kept.state_dict()[name].dtype == tensor.dtype
        assert torch.equal(wide.state_dict()[name], tensor.double()), name


def test_a_tied_head_is_saved_once(tmp_path: Path) -> None:
    model = tiny("mamba", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    saved = load_file(tmp_path / WEIGHTS)
    assert sum(t.numel() for t in saved.values()) == model.num_parameters()


def test_how_to_compute_is_not_saved(tmp_path: Path) -> None:
    config = SequenceLMConfig(19, 8, 1, mixer={"mamba": {"backend": "torch"}})
    SequenceLM(config).save_pretrained(tmp_path)
    again = SequenceLM.from_pretrained(tmp_path)
    assert again.config.mixer["mamba"]["backend"] == "auto"


def test_files_may_be_read_by_whoever_may_read_others(tmp_path: Path) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    (tmp_path / "other").write_text("")
    modes = {path.stat().st_mode for path in tmp_path.iterdir()}
    assert len(modes) == 1


def test_a_save_that_fails_leaves_the_old_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("mamba").save_pretrained(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def broken(tensors: dict[str, Tensor], path: Path, metadata: object) -> None:
        path.write_bytes(b"half of")
        raise OSError("no space left on device")

    monkeypatch.setattr(checkpoint, "save_file", broken)
    with pytest.raises(OSError, match="no space"):
        tiny("mamba2").save_pretrained(tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_loaded_model_can_be_saved_over_its_own_files(tmp_path: Path) -> None:
    model = tiny("mamba", dtype=torch.float32)
    model.save_pretrained(tmp_path)
    for _ in range(2):
        again = SequenceLM.from_pretrained(tmp_path)
        again.save_pretrained(tmp_path)
    assert torch.equal(again.embedding.weight, model.embedding.weight)


def change_tensors(change: Callable[[dict[str, Tensor]], object]) -> Any:
    def spoil(folder: Path) -> None:
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return spoil


def change_config(**entries: object) -> Any:
    def spoil(folder: Path) -> None:
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps(config | entries))

    return spoil


def cut(name: str, keep: float) -> Any:
    def spoil(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * keep)])

    return spoil


def pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def foreign(folder: Path) -> None:
    save_file({"transformer.wte.weight": torch.ones(2, 2)}, folder / WEIGHTS)


@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (cut(WEIGHTS, 0.9), "whole safetensors file"),
        (cut(WEIGHTS, 0.01), "whole safetensors file"),
        (cut(WEIGHTS, 0.0), "whole safetensors file"),
        (cut(CONFIG, 0.5), "whole JSON file"),
        (cut(CONFIG, 0.0), "whole JSON file"),
        (lambda f: (f / CONFIG).write_bytes(b"\xff\xfe"), "whole JSON file"),
        (lambda f: (f / CONFIG).write_text("[1]"), "an object"),
        (lambda f: (f / CONFIG).unlink(), f"without {CONFIG}"),
        (lambda f: (f / WEIGHTS).unlink(), f"without {WEIGHTS}"),
        (shutil.rmtree, "a folder on this machine"),
        (pickle, "a pickle"),
        (foreign, "transformer.wte.weight"),
        (change_tensors(lambda t: t.pop("norm.weight")), "no tensor norm.weight"),
        (
            change_tensors(lambda t: t.update(more=torch.ones(1))),
            "also tensor more",
        ),
        (
            change_tensors(lambda t: t.update({"norm.weight": torch.ones(9)})),
            r"norm.weight of shape \(9,\); expected shape \(8,\)",
        ),
        (
            change_tensors(lambda t: t.update({"norm.weight": t["norm.weight"].int()})),
            "torch.int32",
        ),
        (change_config(model_type="gpt2"), "model_type"),
        (change_config(n_layers=3), "no tensor blocks.2"),
        (change_config(dropuot=0.1), "did you mean 'dropout'"),
        (change_config(mixer={"mamba": {"d_stat": 3}}), "did you mean 'd_state'"),
        (change_config(vocab_size="19"), "vocab_size"),
    ],
)
def test_files_gone_wrong_are_named_in_one_line(
    spoil: Callable[[Path], object], said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    tiny("mamba", dtype=torch.float32).save_pretrained(folder)
    spoil(folder)
    with pytest.raises(ArgumentError, match=said) as caught:
        SequenceLM.from_pretrained(folder)
    assert "\n" not in str(caught.value)


def test_layouts_of_others_are_for_their_models() -> None:
    for pattern in ("transformer", "M+", "M2", "s4d"):
        with pytest.raises(ArgumentError, match="layout='native'"):
            SequenceLM(tiny_config(pattern)).save_pretrained("unused", "mamba_ssm")
    with pytest.raises(ArgumentError, match="layout"):
        tiny("mamba").save_pretrained("unused", "pickle")  # type: ignore[arg-type]
    assert not Path("unused").exists()
