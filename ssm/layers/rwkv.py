"""RWKV-4 (Peng et al. 2023, arXiv:2305.13048) and the chapter's simpler recurrence."""

import math
from functools import partial
from typing import ClassVar, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from ssm.layers._base import KernelLayer, check_fits
from ssm.layers._padded import PaddedLayer
from ssm.layers.selective_ssm import wide_dtype
from ssm.ops._dtypes import compute_dtype
from ssm.ops._history import last_inputs
from ssm.ops.linear_scan import linear_scan

_NEVER = -1e38  # the running maximum before the first step


class WKVState(NamedTuple):
    """An average of the past v with weights e^(…), each (B, D).

    ``denominator * exp(maximum)`` is the sum of the weights and ``average`` that of
    e^(…) v over it. ``maximum`` only sets the scale: no gradient is formed of it, and
    none is missing.

    Differs: the authors keep the numerator. The gradients by numerator and denominator
    almost cancel, and what rounding leaves of them adds up over the sequence.
    """

    average: Tensor
    denominator: Tensor
    maximum: Tensor


class RWKVState(NamedTuple):
    """The input before (B, D), and the fields of :class:`WKVState`."""

    x_prev: Tensor
    average: Tensor
    denominator: Tensor
    maximum: Tensor


class RWKVChannelMixState(NamedTuple):
    """The input before, x_prev (B, D)."""

    x_prev: Tensor


class RWKVBlockState(NamedTuple):
    """The decayed sum of k v, s (B, D)."""

    s: Tensor


class RWKV(PaddedLayer, KernelLayer):
    """y_t = W_o (sigmoid(r_t) * wkv_t), wkv_t an average of v_s, s <= t, per channel.

    The weight of v_s is e^(k_s - (t-1-s) w) for s < t and e^(u + k_t) for s = t, over
    the sum of all weights; w = exp(time_decay) > 0, u = time_first. r, k, v are
    projections of mu * x_t + (1 - mu) * x_{t-1}, mu one learned vector each (RWKV-4
    time mixing, section 3.1). Keys of any size are safe: every exponential is taken
    relative to the largest one so far. ``kernel_matrix`` has one head a channel.

    ``layer_idx`` of ``n_layers`` sets the initialisation of time_decay, time_first and
    the mu, which is that of the authors' code (RWKV-v4/src/model.py): later layers mix
    less with x_{t-1}, and decays spread over the channels, from e^-5 to e^3 a step.

    Differs: projections start as ``nn.Linear`` does. The authors start those of k and r
    and W_o at zero, so that a new layer is exactly 0 and no test of it says anything.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"time_decay", "time_first"})

    def __init__(
        self,
        d_model: int,
        layer_idx: int = 0,
        n_layers: int = 1,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.backend = d_model, backend
        self.layer_idx, self.n_layers = layer_idx, n_layers

        def vector(dtype: torch.dtype | None) -> nn.Parameter:
            return nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))

        self.time_decay = vector(wide_dtype(dtype))
        self.time_first = vector(wide_dtype(dtype))
        self.mix_key, self.mix_value = vector(dtype), vector(dtype)
        self.mix_receptance = vector(dtype)

        def linear() -> nn.Linear:
            return nn.Linear(d_model, d_model, bias=False, device=device, dtype=dtype)

        self.key, self.value, self.receptance = linear(), linear(), linear()
        self.output = linear()
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """The authors' curves over the channels and the depth; see the class."""
        D, depth = self.d_model, self.layer_idx / max(self.n_layers - 1, 1)
        i = torch.arange(D, device=self.time_decay.device, dtype=torch.float32)
        fall = 1 - self.layer_idx / self.n_layers
        spread = (i / max(D - 1, 1)) ** (0.7 + 1.3 * depth)
        self.time_decay.copy_(-5 + 8 * spread)
        self.time_first.copy_(math.log(0.3) + 0.5 * ((i + 1) % 3 - 1))
        self.mix_key.copy_((i / D) ** fall)
        self.mix_value.copy_((i / D) ** fall + 0.3 * depth)
        self.mix_receptance.copy_((i / D) ** (0.5 * fall))

    def init_state(self, batch_size: int) -> RWKVState:
        """No input yet: zeros, and a maximum that any key exceeds."""
        x_prev = self.mix_key.new_zeros(batch_size, self.d_model)
        zero = x_prev.to(compute_dtype(x_prev))
        return RWKVState(x_prev, zero, zero, torch.full_like(zero, _NEVER))

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        past: RWKVState,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L D"], RWKVState]:
        """All averages by one scan."""
        r, k, v = self._project(x, past.x_prev)
        wkv, sums = wkv_scan(
            *(k, v, _rate(self.time_decay), self.time_first),
            WKVState(*past[1:]),
            lengths=lengths,
            backend=self.backend,
        )
        x_prev = last_inputs(x, past.x_prev[:, None], 1, lengths)[:, 0]
        return self.output(r * wkv.to(r.dtype)), RWKVState(x_prev, *sums)

    def step(
        self, x_t: Float[Tensor, "B D"], state: RWKVState
    ) -> tuple[Float[Tensor, "B D"], RWKVState]:
        """One step by the recurrence, in constant time and memory."""
        self.check_input(x_t[:, None])
        check_fits(self, state, len(x_t))
        r, k, v = self._project(x_t[:, None], state.x_prev)
        wkv, sums = wkv_step(
            *(k[:, 0], v[:, 0], _rate(self.time_decay), self.time_first),
            WKVState(*state[1:]),
        )
        x_prev = x_t.to(state.x_prev.dtype, copy=True)
        return self.output(r[:, 0] * wkv.to(r.dtype)), RWKVState(x_prev, *sums)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B D L L"], Float[Tensor, "B L D 1"]]:
        """The softmax over the past of each channel, and the values."""
        self.check_input(x)
        _, k, v = self._project(x, self.init_state(len(x)).x_prev)
        w, u = _rate(self.time_decay)[:, None, None], self.time_first[:, None, None]
        lags = _lags(x.shape[1], w)
        past = k.mT[:, :, None, :] - (lags - 1).clamp(min=0) * w
        weights = torch.where(lags == 0, k.mT[:, :, None, :] + u, past)
        weights = weights.masked_fill(lags < 0, -torch.inf).softmax(-1)
        return weights, v[..., None].to(weights.dtype)

    def readout(
        self, mixed: Float[Tensor, "B L D 1"], x: Float[Tensor, "B L D"]
    ) -> Float[Tensor, "B L D"]:
        """W_o (sigmoid(r) * mixed)."""
        r, _, _ = self._project(x, self.init_state(len(x)).x_prev)
        return self.output(r * mixed[..., 0].to(r.dtype))

    def _project(self, x: Tensor, x_prev: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """sigmoid(r), k and v, each (B, L, D)."""
        before = _shifted(x, x_prev)
        r = self.receptance(_mixed(x, before, self.mix_receptance)).sigmoid()
        k = self.key(_mixed(x, before, self.mix_key))
        return r, k, self.value(_mixed(x, before, self.mix_value))


class RWKVChannelMix(PaddedLayer):
    """y_t = sigmoid(r_t) * W_v relu(k_t)^2, with r and k of x_t mixed with x_{t-1}.

    RWKV-4 channel mixing (arXiv:2305.13048, section 3.1): r = W_r (mu * x_t + (1 - mu)
    * x_{t-1}) and k alike, of ``d_hidden`` (4 d_model) channels. The state is x_{t-1}.
    ``layer_idx`` of ``n_layers`` initialises mu as the authors' code does.

    Differs: projections start as ``nn.Linear`` does; see :class:`RWKV`.
    """

    def __init__(
        self,
        d_model: int,
        d_hidden: int | None = None,
        layer_idx: int = 0,
        n_layers: int = 1,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model = d_model
        self.d_hidden = 4 * d_model if d_hidden is None else d_hidden
        self.layer_idx, self.n_layers = layer_idx, n_layers

        def linear(n: int, m: int) -> nn.Linear:
            return nn.Linear(n, m, bias=False, device=device, dtype=dtype)

        self.mix_key = nn.Parameter(torch.empty(d_model, device=device, dtype=dtype))
        self.mix_receptance = nn.Parameter(torch.empty_like(self.mix_key))
        self.key = linear(d_model, self.d_hidden)
        self.receptance = linear(d_model, d_model)
        self.value = linear(self.d_hidden, d_model)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """mu rises over the channels, more so in early layers."""
        i = torch.arange(self.d_model, device=self.mix_key.device, dtype=torch.float32)
        curve = (i / self.d_model) ** (1 - self.layer_idx / self.n_layers)
        self.mix_key.copy_(curve)
        self.mix_receptance.copy_(curve)

    def init_state(self, batch_size: int) -> RWKVChannelMixState:
        """x before the first step: zeros."""
        return RWKVChannelMixState(self.mix_key.new_zeros(batch_size, self.d_model))

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        past: RWKVChannelMixState,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L D"], RWKVChannelMixState]:
        """Every step from x_t and x_{t-1}."""
        before = _shifted(x, past.x_prev)
        k = self.key(_mixed(x, before, self.mix_key)).relu().square()
        r = self.receptance(_mixed(x, before, self.mix_receptance)).sigmoid()
        last = last_inputs(x, past.x_prev[:, None], 1, lengths)[:, 0]
        return r * self.value(k), RWKVChannelMixState(last)


class RWKVBlock(PaddedLayer, KernelLayer):
    """y_t = W_o (sigmoid(r_t) * (u k_t v_t + s_{t-1})), s_t = a s_{t-1} + k_t v_t.

    The chapter's RWKV (section 19.7): linear attention without normalisation and
    without token shift, per channel; a = exp(-exp(time_decay)) and u = time_first, both
    drawn from a normal distribution, projections with biases. Computed by one linear
    scan. ``kernel_matrix`` has one head a channel.
    """

    no_weight_decay: ClassVar[frozenset[str]] = frozenset({"time_decay", "time_first"})

    def __init__(
        self,
        d_model: int,
        *,
        backend: str = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.backend = d_model, backend

        def linear() -> nn.Linear:
            return nn.Linear(d_model, d_model, device=device, dtype=dtype)

        self.time_decay = nn.Parameter(
            torch.empty(d_model, device=device, dtype=wide_dtype(dtype))
        )
        self.time_first = nn.Parameter(torch.empty_like(self.time_decay))
        self.key, self.value, self.receptance = linear(), linear(), linear()
        self.output = linear()
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The chapter's: standard normal."""
        nn.init.normal_(self.time_decay)
        nn.init.normal_(self.time_first)

    def init_state(self, batch_size: int) -> RWKVBlockState:
        """s = 0, in float32 at least."""
        weight = self.key.weight
        shape = (batch_size, self.d_model)
        return RWKVBlockState(weight.new_zeros(shape, dtype=compute_dtype(weight)))

    def advance(
        self,
        x: Float[Tensor, "B L D"],
        past: RWKVBlockState,
        lengths: Int[Tensor, " B"] | None,
    ) -> tuple[Float[Tensor, "B L D"], RWKVBlockState]:
        """All sums by one scan."""
        kv = (self.key(x) * self.value(x)).to(past.s.dtype)
        states, final = linear_scan(
            (-_rate(self.time_decay)).exp().to(kv.dtype).expand_as(kv),
            kv,
            initial_state=past.s,
            lengths=lengths,
            backend=self.backend,
        )
        mixed = self.time_first.to(kv.dtype) * kv + _shifted(states, past.s)
        return self.readout(mixed[..., None], x), RWKVBlockState(final)

    def step(
        self, x_t: Float[Tensor, "B D"], state: RWKVBlockState
    ) -> tuple[Float[Tensor, "B D"], RWKVBlockState]:
        """One step by the recurrence, in constant time and memory."""
        self.check_input(x_t[:, None])
        check_fits(self, state, len(x_t))
        kv = (self.key(x_t) * self.value(x_t)).to(state.s.dtype)
        a, u = (-_rate(self.time_decay)).exp(), self.time_first
        y = self.readout((u.to(kv.dtype) * kv + state.s)[..., None], x_t)
        return y, RWKVBlockState(a.to(kv.dtype) * state.s + kv)

    def kernel_matrix(
        self, x: Float[Tensor, "B L D"]
    ) -> tuple[Float[Tensor, "B D L L"], Float[Tensor, "B L D 1"]]:
        """M[t, s] = a^(t-1-s) k_s below the diagonal and u k_t on it; the values v."""
        self.check_input(x)
        k = self.key(x).mT[:, :, None, :]
        w = _rate(self.time_decay)[:, None, None]
        lags = _lags(x.shape[1], w)
        decay = (-(lags - 1).clamp(min=0) * w).exp()
        weight = torch.where(lags == 0, self.time_first[:, None, None], decay)
        matrix = weight.masked_fill(lags < 0, 0.0) * k
        return matrix, self.value(x)[..., None].to(matrix.dtype)

    def readout(
        self, mixed: Float[Tensor, "*B D 1"], x: Float[Tensor, "*B D"]
    ) -> Float[Tensor, "*B D"]:
        """W_o (sigmoid(r) * mixed)."""
        return self.output(self.receptance(x).sigmoid() * mixed[..., 0].to(x.dtype))


def wkv_scan(
    k: Float[Tensor, "B L D"],
    v: Float[Tensor, "B L D"],
    w: Float[Tensor, " D"],
    u: Float[Tensor, " D"],
    past: WKVState,
    *,
    lengths: Int[Tensor, " B"] | None = None,
    backend: str = "auto",
) -> tuple[Float[Tensor, "B L D"], WKVState]:
    """The averages of :class:`RWKV` and the state after them; L >= 1.

    With p_t = max(p_{t-1} - w, k_t) the running maximum, the denominators over e^p_t
    follow a scan with decays e^(p_{t-1} - w - p_t) <= 1 and inputs e^(k_t - p_t) <= 1,
    and the averages one whose decay is the past's share of the denominator. p cancels
    in the shares: it is a constant to the gradient.
    """
    dtype = compute_dtype(k, w, past.average)
    k, v, w, u = (tensor.to(dtype) for tensor in (k, v, w, u))
    after = _running_maximum(k.detach(), w.detach(), past.maximum.detach())
    before = _shifted(after, past.maximum)
    gain, carry = (k - after).exp(), (before - w - after).exp()
    scan = partial(linear_scan, lengths=lengths, backend=backend)
    denominators, denominator = scan(carry, gain, initial_state=past.denominator)
    # Only where a sequence has no steps at all is there nothing to divide by.
    total = denominators.masked_fill(denominators == 0, 1.0)
    kept = carry * _shifted(denominators, past.denominator) / total
    averages, average = scan(kept, gain / total * v, initial_state=past.average)
    earlier = WKVState(
        _shifted(averages, past.average),
        _shifted(denominators, past.denominator),
        before,
    )
    maximum = last_inputs(after, past.maximum[:, None], 1, lengths)[:, 0]
    return _with_present(earlier, u + k, v), WKVState(average, denominator, maximum)


def wkv_step(
    k: Float[Tensor, "B D"],
    v: Float[Tensor, "B D"],
    w: Float[Tensor, " D"],
    u: Float[Tensor, " D"],
    past: WKVState,
) -> tuple[Float[Tensor, "B D"], WKVState]:
    """One step of :func:`wkv_scan`."""
    dtype = compute_dtype(k, w, past.average)
    k, v, w, u = (tensor.to(dtype) for tensor in (k, v, w, u))
    after = torch.maximum(past.maximum - w, k).detach()
    gain, carry = (k - after).exp(), (past.maximum - w - after).exp()
    denominator = carry * past.denominator + gain
    average = past.average + gain / denominator * (v - past.average)
    state = WKVState(average, denominator, after)
    return _with_present(past, u + k, v), state


def _with_present(past: WKVState, bonus: Tensor, v: Tensor) -> Tensor:
    """The average over the past and the present value, of log-weight ``bonus``."""
    top = torch.maximum(past.maximum, bonus).detach()
    then, now = (past.maximum - top).exp(), (bonus - top).exp()
    share = now / (then * past.denominator + now)
    return past.average + share * (v - past.average)


def _running_maximum(
    k: Float[Tensor, "B L D"], w: Float[Tensor, " D"], p: Float[Tensor, "B D"]
) -> Float[Tensor, "B L D"]:
    """p_t = max(p_{t-1} - w, k_t) for every t, in log2 L sweeps."""
    maxima = torch.cat([p[:, None].to(k.dtype), k], 1)
    shift = 1
    while shift < maxima.shape[1]:
        reached = torch.maximum(maxima[:, shift:], maxima[:, :-shift] - shift * w)
        maxima = torch.cat([maxima[:, :shift], reached], 1)
        shift *= 2
    return maxima[:, 1:]


def _shifted(
    x: Float[Tensor, "B L *D"], x_prev: Float[Tensor, "B *D"]
) -> Float[Tensor, "B L *D"]:
    """x_{t-1} for every t."""
    return torch.cat([x_prev[:, None].to(x.dtype), x[:, :-1]], 1)


def _rate(time_decay: Float[Tensor, " D"]) -> Float[Tensor, " D"]:
    """w > 0, the decay of one step in logarithms, in float32 at least."""
    return time_decay.to(compute_dtype(time_decay)).exp()


def _mixed(x: Tensor, before: Tensor, mu: Tensor) -> Tensor:
    return before + mu * (x - before)


def _lags(L: int, like: Tensor) -> Float[Tensor, "L L"]:
    """t - s."""
    steps = torch.arange(L, device=like.device, dtype=like.dtype)
    return steps[:, None] - steps
