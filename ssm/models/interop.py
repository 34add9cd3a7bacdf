"""Checkpoints of mamba_ssm and Hugging Face, and ours: the same tensors, other names.

Ours (``SequenceLM``): ``embedding.weight``, ``blocks.{i}.norm.weight``,
``blocks.{i}.mixer.<names>``, ``norm.weight`` (the last norm) and ``head.weight``, which
is absent where the head is tied to the embedding. Theirs, after ``backbone.``:

    ours                    mamba_ssm               Hugging Face
    embedding.weight        embedding.weight        embeddings.weight
    blocks.{i}.norm.weight  layers.{i}.norm.weight  layers.{i}.norm.weight
    blocks.{i}.mixer.*      layers.{i}.mixer.*      layers.{i}.mixer.*
    norm.weight             norm_f.weight           norm_f.weight
    head.weight             lm_head.weight          lm_head.weight   (no ``backbone.``)

The names under ``mixer.`` are mamba_ssm's everywhere. Tensors are passed on and never
copied or changed. The functions are pure: state dicts and configs in, the same out. A
checkpoint that this library would compute differently (other norms, activations, layers
that are not Mamba) is refused, and so is one with a tensor missing, left over or of
another shape than its config says.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from ssm._errors import ArgumentError, bad_argument
from ssm.layers.mamba import Mamba
from ssm.layers.mamba2 import Mamba2

Mixer = Literal["mamba", "mamba2"]
Layout = Literal["ssm", "mamba_ssm", "hugging_face"]
StateDict = Mapping[str, Tensor]

_LAYERS: dict[str, Callable[..., torch.nn.Module]] = {"mamba": Mamba, "mamba2": Mamba2}
_EMBEDDING: dict[Layout, str] = {
    "ssm": "embedding.weight",
    "mamba_ssm": "backbone.embedding.weight",
    "hugging_face": "backbone.embeddings.weight",
}
_HEAD: dict[Layout, str] = {
    "ssm": "head.weight",
    "mamba_ssm": "lm_head.weight",
    "hugging_face": "lm_head.weight",
}
# What only one of the two mixers has.
_MIXER_MARK: dict[str, Mixer] = {"x_proj.weight": "mamba", "dt_bias": "mamba2"}

_MAMBA2_OPTIONS = (
    "d_state",
    "d_conv",
    "expand",
    "headdim",
    "ngroups",
    "dt_limit",
    "chunk_size",
)
# Constructor arguments of our layers (left) as they stand in a config of theirs.
_MAMBA_SSM: dict[Mixer, dict[str, str]] = {
    "mamba": {n: n for n in ("d_state", "d_conv", "expand", "dt_rank")},
    "mamba2": {n: n for n in _MAMBA2_OPTIONS},
}
_HUGGING_FACE: dict[Mixer, dict[str, str]] = {
    "mamba": {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "expand": "expand",
        "dt_rank": "time_step_rank",
    },
    "mamba2": {
        "d_state": "state_size",
        "d_conv": "conv_kernel",
        "expand": "expand",
        "headdim": "head_dim",
        "ngroups": "n_groups",
        "dt_limit": "time_step_limit",
        "chunk_size": "chunk_size",
    },
}
_BOTH = {"bias": "bias", "conv_bias": "conv_bias"}
_BOTH_HUGGING_FACE = {"bias": "use_bias", "conv_bias": "use_conv_bias"}
# ssm_cfg's entries that bear on initialisation or speed only.
_NO_MEANING = frozenset(
    {"layer", "layer_idx", "process_group", "sequence_parallel"}
    | {"A_init_range", "conv_init", "dt_init", "dt_init_floor", "dt_scale"}
    | {"dt_min", "dt_max", "use_fast_path", "use_mem_eff_path"}
)
# The only values of these entries that mean what this library computes.
_ONLY: dict[str, Any] = {
    "D_has_hdim": False,
    "norm_before_gate": False,
    "rmsnorm": True,
    "d_ssm": None,
}


class Format(NamedTuple):
    """Whose names a checkpoint has, and which layer its blocks hold.

    mixer is None where the blocks of one of our own checkpoints hold something else.
    """

    layout: Layout
    mixer: Mixer | None

    def __str__(self) -> str:
        source = {
            "ssm": "ours",
            "mamba_ssm": "mamba_ssm",
            "hugging_face": "Hugging Face",
        }
        layer = {"mamba": "Mamba", "mamba2": "Mamba-2", None: "other layers"}
        return f"{source.get(self.layout, self.layout)}, {layer[self.mixer]}"


@dataclass(frozen=True)
class CheckpointConfig:
    """What a Mamba or Mamba-2 language model is, in our words.

    ``mixer_options`` are the keyword arguments of ``Mamba`` or ``Mamba2``;
    ``vocab_size`` is the number of rows of the embedding, padding rows included.
    """

    mixer: Mixer
    d_model: int
    n_layers: int
    vocab_size: int
    tie_embeddings: bool
    norm_eps: float = 1e-5
    residual_in_fp32: bool = True
    mixer_options: dict[str, Any] = field(default_factory=dict)


def detect_format(keys: Iterable[str]) -> Format:
    """Whose names these are; raises ArgumentError for names of nobody we know."""
    names = set(keys)
    mixers = {
        mixer
        for mark, mixer in _MIXER_MARK.items()
        if any(name.endswith(f".mixer.{mark}") for name in names)
    }
    mixer = mixers.pop() if len(mixers) == 1 else None
    for layout, embedding in _EMBEDDING.items():
        if embedding in names and (mixer or layout == "ssm"):
            return Format(layout, mixer)
    raise bad_argument(
        "checkpoint",
        f"{len(names)} names such as {sorted(names)[:3]}",
        f"one of {', '.join(_EMBEDDING.values())}, and Mamba or Mamba-2 layers",
        "pass a language model's whole state dict (with its head)",
    )


def from_mamba_ssm(
    state_dict: StateDict, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], CheckpointConfig]:
    """Our names and config for a checkpoint of mamba_ssm's ``MambaLMHeadModel``.

    ``config`` is its config.json. Raises ArgumentError for what cannot be loaded.
    """
    mixer = _expect(state_dict, "mamba_ssm")
    options = dict(config.get("ssm_cfg") or {})
    _check_mamba_ssm(config, options, mixer)
    names = _MAMBA_SSM[mixer] | _BOTH
    return _to_ours(
        state_dict,
        "mamba_ssm",
        CheckpointConfig(
            mixer=mixer,
            d_model=_entry(config, "d_model"),
            n_layers=_entry(config, "n_layer"),
            vocab_size=len(state_dict[_EMBEDDING["mamba_ssm"]]),
            tie_embeddings=config.get("tie_embeddings", True),
            residual_in_fp32=config.get("residual_in_fp32", True),
            mixer_options=_options(options, names, mixer),
        ),
    )


def to_mamba_ssm(
    state_dict: StateDict, config: CheckpointConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """mamba_ssm's names and config.json for one of our checkpoints."""
    _check_tensors(state_dict, config)
    names = _MAMBA_SSM[config.mixer] | _BOTH
    layer = {"mamba": "Mamba1", "mamba2": "Mamba2"}[config.mixer]
    for eps in (config.norm_eps, config.mixer_options.get("norm_eps", 1e-5)):
        if eps != 1e-5:
            mend = "save it as our own"
            raise bad_argument("norm_eps", eps, "1e-5, mamba_ssm's own", mend)
    return _from_ours(state_dict, "mamba_ssm", config), {
        "d_model": config.d_model,
        "n_layer": config.n_layers,
        "vocab_size": config.vocab_size,
        "ssm_cfg": {"layer": layer} | _theirs(config, names),
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": True,
        "pad_vocab_size_multiple": 1,  # vocab_size counts the padding rows already
        "tie_embeddings": config.tie_embeddings,
    }


def from_hugging_face(
    state_dict: StateDict, config: Mapping[str, Any]
) -> tuple[dict[str, Tensor], CheckpointConfig]:
    """Our names and config for ``MambaForCausalLM`` or ``Mamba2ForCausalLM``.

    ``config`` is its config.json, or ``model.config.to_dict()``. Raises ArgumentError
    for what cannot be loaded.
    """
    mixer = _expect(state_dict, "hugging_face")
    _only(config, "model_type", mixer)  # falcon_mamba has the same names, not meaning
    _only(config, "hidden_act", "silu")
    names = _HUGGING_FACE[mixer] | _BOTH_HUGGING_FACE
    eps = config.get("layer_norm_epsilon", 1e-5)
    options = _options(config, names, mixer)
    if mixer == "mamba2":
        options["norm_eps"] = eps
        options.setdefault("ngroups", 8)
    # Where config.json leaves it out, it has the default of the model's type.
    tied = config.get("tie_word_embeddings", mixer == "mamba")
    return _to_ours(
        state_dict,
        "hugging_face",
        CheckpointConfig(
            mixer=mixer,
            d_model=_entry(config, "hidden_size"),
            n_layers=_entry(config, "num_hidden_layers"),
            vocab_size=len(state_dict[_EMBEDDING["hugging_face"]]),
            tie_embeddings=tied,
            norm_eps=eps,
            residual_in_fp32=config.get("residual_in_fp32", True),
            mixer_options=options,
        ),
    )


def to_hugging_face(
    state_dict: StateDict, config: CheckpointConfig
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Hugging Face's names and config.json for one of our checkpoints."""
    _check_tensors(state_dict, config)
    mixer = config.mixer
    layer = _meta_layer(config)
    names = _HUGGING_FACE[mixer] | _BOTH_HUGGING_FACE
    theirs: dict[str, Any] = {
        "model_type": mixer,
        "architectures": [f"{mixer.capitalize()}ForCausalLM"],
        "hidden_size": config.d_model,
        "num_hidden_layers": config.n_layers,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "layer_norm_epsilon": config.norm_eps,
        "residual_in_fp32": config.residual_in_fp32,
        "hidden_act": "silu",
    } | _theirs(config, names)
    if isinstance(layer, Mamba2):
        if layer.norm.eps != config.norm_eps:
            raise bad_argument(
                "norm_eps",
                f"{layer.norm.eps} in the layers and {config.norm_eps} between them",
                "one epsilon, as Hugging Face has it",
                "save it as our own",
            )
        theirs["num_heads"] = layer.nheads
    return _from_ours(state_dict, "hugging_face", config), theirs


def _expect(state_dict: StateDict, layout: Layout) -> Mixer:
    found = detect_format(state_dict)
    if found.layout != layout or found.mixer is None:
        raise bad_argument(
            "checkpoint",
            f"one in the layout {found}",
            f"one in the layout of {layout}",
            f"load it by from_{found.layout}"
            if found.layout != "ssm"
            else "it needs no conversion",
        )
    return found.mixer


def _check_mamba_ssm(
    config: Mapping[str, Any], options: Mapping[str, Any], mixer: Mixer
) -> None:
    """Raise ArgumentError where mamba_ssm would compute something that we do not."""
    if not config.get("rms_norm", True):
        raise bad_argument("rms_norm", False, "True (RMSNorm)", "it uses LayerNorm")
    for name, empty in (("attn_layer_idx", []), ("d_intermediate", 0)):
        if config.get(name) not in (None, empty):
            raise bad_argument(
                name, config[name], f"{empty!r}", "only pure Mamba models are converted"
            )
    known = _NO_MEANING | _MAMBA_SSM[mixer].keys() | _BOTH.keys() | _ONLY.keys()
    if unknown := sorted(options.keys() - known):
        raise bad_argument(
            "ssm_cfg",
            f"unknown entries {unknown}",
            f"entries of {sorted(known)}",
            "they may change what the layer computes",
        )
    _only(options, "layer", {"mamba": "Mamba1", "mamba2": "Mamba2"}[mixer])
    for name, value in _ONLY.items():
        _only(options, name, value)


def _only(config: Mapping[str, Any], name: str, value: object) -> None:
    """Raise ArgumentError if ``config`` has another ``value`` under ``name``."""
    if config.get(name, value) != value:
        raise bad_argument(
            name,
            repr(config[name]),
            repr(value),
            "this library computes nothing else under these names",
        )


def _entry(config: Mapping[str, Any], name: str) -> Any:
    if name not in config:
        raise bad_argument(
            "config", f"no {name}", f"an entry {name}", "pass the whole config.json"
        )
    return config[name]


def _options(
    config: Mapping[str, Any], names: Mapping[str, str], mixer: Mixer
) -> dict[str, Any]:
    """Our constructor's arguments, as far as ``config`` gives them."""
    found = {ours: config[name] for ours, name in names.items() if name in config}
    if mixer == "mamba2":
        found.setdefault("headdim", 64)  # both have it so
        if "dt_limit" in found:
            found["dt_limit"] = tuple(_number(x) for x in found["dt_limit"])
    return found


def _number(value: Any) -> float:
    """A number as config.json has it; infinity is {"__float__": "Infinity"} there."""
    return float(value["__float__"] if isinstance(value, Mapping) else value)


def _theirs(config: CheckpointConfig, names: Mapping[str, str]) -> dict[str, Any]:
    """The layer's arguments under their names, every one resolved.

    Left out: a dt_limit without effect, whose infinity JSON does not have.
    """
    layer = _meta_layer(config)
    if getattr(layer, "dt_limit", None) == (0.0, float("inf")):
        names = {ours: name for ours, name in names.items() if ours != "dt_limit"}
    values: dict[str, Any] = {
        "expand": layer.get_parameter("out_proj.weight").shape[1] // config.d_model,
        "bias": layer.in_proj.bias is not None,
        "conv_bias": layer.conv1d.bias is not None,
    }
    return {
        theirs: values[ours] if ours in values else getattr(layer, ours)
        for ours, theirs in names.items()
    }


def _to_ours(
    state_dict: StateDict, layout: Layout, config: CheckpointConfig
) -> tuple[dict[str, Tensor], CheckpointConfig]:
    ours = {_ours(name, layout): tensor for name, tensor in state_dict.items()}
    head = ours.get("head.weight")
    if config.tie_embeddings and head is not None:
        if not _same(head, ours["embedding.weight"]):
            raise bad_argument(
                _HEAD[layout],
                "values other than the embedding's",
                "the embedding's, because the config ties them",
                "set tie_embeddings (tie_word_embeddings) to false in the config",
            )
        del ours["head.weight"]
    _check_tensors(ours, config)
    return ours, config


def _from_ours(
    state_dict: StateDict, layout: Layout, config: CheckpointConfig
) -> dict[str, Tensor]:
    theirs = {_theirs_name(name, layout): x for name, x in state_dict.items()}
    if config.tie_embeddings:  # their state dicts hold a tied head twice
        theirs[_HEAD[layout]] = state_dict["embedding.weight"]
    return theirs


def _ours(name: str, layout: Layout) -> str:
    if name == _EMBEDDING[layout]:
        return "embedding.weight"
    if name == _HEAD[layout]:
        return "head.weight"
    name = re.sub(r"^backbone\.layers\.(\d+)\.", r"blocks.\1.", name)
    return re.sub(r"^backbone\.norm_f\.", "norm.", name)


def _theirs_name(name: str, layout: Layout) -> str:
    if name == "embedding.weight":
        return _EMBEDDING[layout]
    if name == "head.weight":
        return _HEAD[layout]
    name = re.sub(r"^blocks\.(\d+)\.", r"backbone.layers.\1.", name)
    return re.sub(r"^norm\.", "backbone.norm_f.", name)


def _same(a: Tensor, b: Tensor) -> bool:
    return a is b or (a.shape == b.shape and torch.equal(a, b))


def _meta_layer(config: CheckpointConfig) -> Any:
    """The layer of the blocks, without memory: its shapes and resolved arguments."""
    try:
        return _LAYERS[config.mixer](
            config.d_model, **config.mixer_options, device="meta"
        )
    except (TypeError, KeyError) as error:
        raise bad_argument(
            "config", str(error), f"arguments of {config.mixer}", "drop it"
        ) from error


def _check_tensors(state_dict: StateDict, config: CheckpointConfig) -> None:
    """Raise ArgumentError unless ``state_dict``, in our names, is what config says."""
    d_model, table = config.d_model, (config.vocab_size, config.d_model)
    expected: dict[str, tuple[int, ...]] = {"embedding.weight": table}
    expected["norm.weight"] = (d_model,)
    if not config.tie_embeddings:
        expected["head.weight"] = table
    layer = {n: tuple(p.shape) for n, p in _meta_layer(config).named_parameters()}
    for i in range(config.n_layers):
        expected[f"blocks.{i}.norm.weight"] = (d_model,)
        expected |= {f"blocks.{i}.mixer.{n}": shape for n, shape in layer.items()}
    if missing := sorted(expected.keys() - state_dict.keys()):
        raise _differs(f"no {_some(missing)}", "every tensor of its config")
    if left_over := sorted(state_dict.keys() - expected.keys()):
        raise _differs(f"also {_some(left_over)}", "the tensors of its config only")
    for name, shape in expected.items():
        have = tuple(state_dict[name].shape)
        if have != shape:
            raise _differs(f"{name} of shape {have}", f"shape {shape} by its config")


def _differs(got: str, expected: str) -> ArgumentError:
    mend = "see that it is whole and that the config is its own"
    return bad_argument("checkpoint", got, expected, mend)


def _some(names: list[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more
