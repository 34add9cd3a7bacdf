"""Checkpoints of mamba_ssm and Hugging Face: there and back; foreign ones refused."""

import json

import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear, rms_norm
from transformers import (
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

from ssm._errors import ArgumentError
from ssm.layers.mamba import Mamba
from ssm.layers.mamba2 import Mamba2
from ssm.models.interop import (
    CheckpointConfig,
    Format,
    detect_format,
    from_hugging_face,
    from_mamba_ssm,
    to_hugging_face,
    to_mamba_ssm,
)

LAYERS = {"mamba": Mamba, "mamba2": Mamba2}


def hugging_face(mixer: str, **options):
    """A tiny model of theirs, all its weights random."""
    sizes = {
        "vocab_size": 11,
        "hidden_size": 12,
        "state_size": 5,
        "num_hidden_layers": 2,
        "layer_norm_epsilon": 1e-4,
    }
    torch.manual_seed(2)
    if mixer == "mamba":
        model = MambaForCausalLM(MambaConfig(**sizes | options))
    else:
        heads = {"num_heads": 6, "head_dim": 4, "n_groups": 2}
        model = Mamba2ForCausalLM(Mamba2Config(**sizes | heads | options))
    with torch.no_grad():
        for parameter in model.parameters():  # nothing at a symmetric value
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def logits(state: dict[str, Tensor], config: CheckpointConfig, tokens: Tensor):
    """The language model that our names describe, written out."""
    h = state["embedding.weight"][tokens]
    size, eps = (config.d_model,), config.norm_eps
    for i in range(config.n_layers):
        layer = LAYERS[config.mixer](config.d_model, **config.mixer_options)
        prefix = f"blocks.{i}.mixer."
        layer.load_state_dict(
            {n[len(prefix) :]: x for n, x in state.items() if n.startswith(prefix)}
        )
        h = h + layer(rms_norm(h, size, state[f"blocks.{i}.norm.weight"], eps))[0]
    h = rms_norm(h, size, state["norm.weight"], eps)
    return linear(h, state.get("head.weight", state["embedding.weight"]))


OPTIONS = [
    ("mamba", {}),
    ("mamba", {"tie_word_embeddings": False, "use_bias": True, "conv_kernel": 3}),
    ("mamba", {"use_conv_bias": False, "expand": 3, "time_step_rank": 4}),
    ("mamba2", {}),
    ("mamba2", {"tie_word_embeddings": True, "use_bias": True, "n_groups": 1}),
    ("mamba2", {"use_conv_bias": False, "time_step_limit": (0.01, 0.3)}),
]


@pytest.mark.parametrize(("mixer", "options"), OPTIONS)
def test_logits_of_a_converted_checkpoint_are_theirs(mixer, options):
    model = hugging_face(mixer, **options)
    state, config = from_hugging_face(model.state_dict(), model.config.to_dict())
    tokens = torch.arange(14).reshape(2, 7) % 11
    with torch.no_grad():
        expected = model(tokens).logits
        torch.testing.assert_close(
            logits(state, config, tokens), expected, atol=1e-4, rtol=1e-4
        )
    assert ("head.weight" in state) != model.config.tie_word_embeddings


@pytest.mark.parametrize(("mixer", "options"), OPTIONS)
def test_hugging_face_and_back(mixer, options, tmp_path):
    model = hugging_face(mixer, **options)
    theirs = model.state_dict()
    state, config = from_hugging_face(theirs, model.config.to_dict())
    again, written = to_hugging_face(state, config)
    assert again.keys() == theirs.keys()
    assert all(again[name] is theirs[name] for name in state if name in theirs)
    json.dumps(written, allow_nan=False)  # strict JSON
    kind = {"mamba": MambaForCausalLM, "mamba2": Mamba2ForCausalLM}[mixer]
    settings = type(model.config)(**written)
    rebuilt = kind(settings).eval()
    rebuilt.load_state_dict(again)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(rebuilt(tokens).logits, model(tokens).logits)
    # And through the config.json that transformers writes.
    model.config.save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert from_hugging_face(theirs, stored)[1] == config


@pytest.mark.parametrize(("mixer", "options"), OPTIONS)
def test_mamba_ssm_there_and_back(mixer, options):
    model = hugging_face(mixer, **options, layer_norm_epsilon=1e-5)
    ours, config = from_hugging_face(model.state_dict(), model.config.to_dict())
    theirs, written = to_mamba_ssm(ours, config)
    assert detect_format(theirs) == Format("mamba_ssm", mixer)
    assert theirs.keys() == {
        name.replace("backbone.embeddings.", "backbone.embedding.")
        for name in model.state_dict()
    }
    assert written["ssm_cfg"]["layer"] == {"mamba": "Mamba1", "mamba2": "Mamba2"}[mixer]
    again, config_again = from_mamba_ssm(theirs, json.loads(json.dumps(written)))
    assert again.keys() == ours.keys()
    assert all(again[name] is ours[name] for name in ours)
    tokens = torch.arange(6)[None]
    with torch.no_grad():
        assert torch.equal(
            logits(again, config_again, tokens), logits(ours, config, tokens)
        )


def published(mixer: str) -> tuple[dict[str, Tensor], dict]:
    """A checkpoint as mamba_ssm's authors publish them: a short config, a tied head."""
    options = {"d_state": 5} if mixer == "mamba" else {"d_state": 5, "headdim": 64}
    layer = LAYERS[mixer](32, **options)
    table = torch.randn(16, 32)
    state = {"backbone.embedding.weight": table, "lm_head.weight": table.clone()}
    state["backbone.norm_f.weight"] = torch.ones(32)
    for i in range(11):  # two digits
        state[f"backbone.layers.{i}.norm.weight"] = torch.full((32,), float(i))
        for name, x in layer.state_dict().items():
            state[f"backbone.layers.{i}.mixer.{name}"] = x
    config = {
        "d_model": 32,
        "n_layer": 11,
        "vocab_size": 13,  # rounded up to 16 rows
        "ssm_cfg": {"d_state": 5},
        "rms_norm": True,
        "residual_in_fp32": True,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 8,
    }
    if mixer == "mamba2":
        config |= {"tie_embeddings": True, "attn_layer_idx": [], "d_intermediate": 0}
        config["ssm_cfg"] |= {"layer": "Mamba2", "A_init_range": [1, 16]}
    return state, config


@pytest.mark.parametrize("mixer", ["mamba", "mamba2"])
def test_published_checkpoints_load(mixer):
    theirs, their_config = published(mixer)
    kept = dict(theirs)
    state, config = from_mamba_ssm(theirs, their_config)
    assert theirs == kept  # pure
    assert (config.vocab_size, config.n_layers, config.mixer) == (16, 11, mixer)
    assert config.tie_embeddings
    assert "head.weight" not in state
    assert state["blocks.10.norm.weight"] is theirs["backbone.layers.10.norm.weight"]


def test_formats_are_detected_and_said():
    assert str(detect_format(published("mamba2")[0])) == "mamba_ssm, Mamba-2"
    model = hugging_face("mamba")
    assert str(detect_format(model.state_dict())) == "Hugging Face, Mamba"
    ours, _ = from_hugging_face(model.state_dict(), model.config.to_dict())
    assert detect_format(ours) == Format("ssm", "mamba")
    jamba = ["embedding.weight", "blocks.0.mixer.qkv.weight"]
    assert detect_format(jamba) == Format("ssm", None)
    with pytest.raises(ArgumentError, match="2 names such as"):
        detect_format(["transformer.wte.weight", "lm_head.weight"])
    with pytest.raises(ArgumentError, match="whole state dict"):
        detect_format(model.backbone.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"rms_norm": False}, "rms_norm: got False"),
        ({"attn_layer_idx": [3]}, "attn_layer_idx"),
        ({"d_intermediate": 64}, "d_intermediate"),
        ({"ssm_cfg": {"layer": "Mamba3"}}, "layer: got 'Mamba3'"),
        (
            {"ssm_cfg": {"d_state": 5, "is_mimo": True}},
            r"unknown entries \['is_mimo'\]",
        ),
        ({"ssm_cfg": {"d_state": 5, "norm_before_gate": True}}, "norm_before_gate"),
        (
            {"ssm_cfg": {"d_state": 6}},
            r"backbone|A_log of shape|x_proj.weight of shape",
        ),
        ({"n_layer": 12}, "no blocks.11.mixer.A_log, .* and 7 more"),
        ({"n_layer": 10}, "also blocks.10.mixer.A_log"),
        ({"tie_embeddings": False}, None),
    ],
)
def test_what_we_do_not_compute_is_refused(change, message):
    state, config = published("mamba")
    if message is None:  # an untied head is simply kept
        assert "head.weight" in from_mamba_ssm(state, config | change)[0]
        return
    with pytest.raises(ArgumentError, match=message):
        from_mamba_ssm(state, config | change)


def test_foreign_and_truncated_checkpoints_are_refused():
    model = hugging_face("mamba")
    state, config = model.state_dict(), model.config.to_dict()
    with pytest.raises(ArgumentError, match="load it by from_hugging_face"):
        from_mamba_ssm(state, {})
    with pytest.raises(ArgumentError, match="model_type: got 'falcon_mamba'"):
        from_hugging_face(state, config | {"model_type": "falcon_mamba"})
    with pytest.raises(ArgumentError, match="hidden_act"):
        from_hugging_face(state, config | {"hidden_act": "gelu"})
    with pytest.raises(ArgumentError, match="no hidden_size"):
        from_hugging_face(state, {})
    with pytest.raises(ArgumentError, match="needs no conversion"):
        from_hugging_face(from_hugging_face(state, config)[0], config)
    short = {n: x for n, x in state.items() if n != "backbone.layers.1.mixer.D"}
    with pytest.raises(ArgumentError, match=r"no blocks\.1\.mixer\.D"):
        from_hugging_face(short, config)
    untied = state | {"lm_head.weight": torch.zeros(11, 12)}
    with pytest.raises(ArgumentError, match="other than the embedding's"):
        from_hugging_face(untied, config)


def test_what_they_cannot_hold_is_refused():
    model = hugging_face("mamba2", layer_norm_epsilon=1e-3)
    state, config = from_hugging_face(model.state_dict(), model.config.to_dict())
    with pytest.raises(ArgumentError, match=r"norm_eps: got 0\.001"):
        to_mamba_ssm(state, config)
    mixed = CheckpointConfig(
        **vars(config) | {"mixer_options": config.mixer_options | {"norm_eps": 1e-6}}
    )
    with pytest.raises(ArgumentError, match="norm_eps: got 1e-06 in the layers"):
        to_hugging_face(state, mixed)
    unknown = CheckpointConfig(**vars(config) | {"mixer_options": {"width": 3}})
    with pytest.raises(ArgumentError, match="width"):
        to_hugging_face(state, unknown)
