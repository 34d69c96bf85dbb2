"""Decoding that only reads: a state, and a ring of the newest tokens that are not folded into it yet.

A state that takes in every token is read *and* rewritten for each; one that takes in L tokens at a time is read only, but for
every L-th token.  Until then the tokens stand in a ring of C = 2L places, as keys, values and gates, and attention over them is
added to what the state answers:

    y_i = (φ(q_i)ᵀS · exp(G_i) + Σ_j (q_i·k_j)^p exp(G_i − G_j) v_j) / (the same with s and 1)      G: log gates summed

When a token finds no place, the *oldest* L are folded, S ← exp(G_L) S + Σ_j exp(G_L − G_j) φ(k_j) v_jᵀ, and the newest L stay.
So the last L tokens can always be taken back: that is a subtraction on a counter, since nothing of them is in the state.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor

from power_retention.errors import ArgumentError, StateError
from power_retention.ops.backends import fused_decode
from power_retention.ops.chunk import state_noise
from power_retention.ops.heads import FORGET, from_heads, integer_power, ratio, scaled_queries
from power_retention.ops.layout import check_power, expand, multiplicity, state_width
from power_retention.ops.operator import check_heads, power_retention, without_padding
from power_retention.ops.state import PowerState

FOLD_SIZE = 32
"""Tokens folded at a time where nobody says otherwise."""

STATE_DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class RingState:
    """Memory of ``slots`` sequences for :func:`power_retention_decode`, which changes these tensors in place.

    Attributes:
        memory: ``[slots, H, D, e]``, float32, bfloat16 or float64, in the canonical layout.
        normalizer: ``[slots, H, D]``, float32 (float64 with a float64 memory).
        keys: ``[slots, H, C, d]``, the ring, in the model's dtype.
        values: ``[slots, H, C, e]``, likewise.
        gates: ``[slots, H, C]``, log gates a step, in the dtype of ``normalizer``.
        cursor: int32 ``[slots, H, 2]``: the place of the oldest token in the ring, and how many there are.  One a head, so that
            no part of a kernel has to wait for another head's; the heads of a slot always agree.
        arrived: int32 ``[slots, H]``, the kernel's count of finished programs: 0 between calls, of any stream.
        p: the power.
        head_width: key width d.
    """

    memory: Tensor
    normalizer: Tensor
    keys: Tensor
    values: Tensor
    gates: Tensor
    cursor: Tensor
    arrived: Tensor
    p: int
    head_width: int

    @classmethod
    def empty(
        cls,
        slots: int,
        heads: int,
        head_width: int,
        value_width: int | None = None,
        *,
        p: int = 2,
        fold_size: int = FOLD_SIZE,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> RingState:
        """Nothing read yet.

        Args:
            slots: sequences there is room for.
            heads, head_width, value_width: H, d and e (d unless given).
            p: the power.
            fold_size: L; the ring has 2L places.
            dtype: of keys and values, the model's.
            state_dtype: of the memory.
            device: where.
        """
        if not isinstance(fold_size, int) or fold_size < 1:
            raise ArgumentError(f"fold_size must be a positive number of tokens, not {fold_size!r}.")
        if state_dtype not in STATE_DTYPES:
            raise ArgumentError(
                f"state_dtype={state_dtype} cannot hold a state: float16 overflows, use float32 or bfloat16."
            )
        value_width, places = value_width or head_width, 2 * fold_size
        width = state_width(head_width, p)
        exact = torch.promote_types(state_dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(slots, heads, *shape, dtype=dtype, device=device)

        return cls(
            memory=zeros(width, value_width, dtype=state_dtype),
            normalizer=zeros(width, dtype=exact),
            keys=zeros(places, head_width, dtype=dtype),
            values=zeros(places, value_width, dtype=dtype),
            gates=zeros(places, dtype=exact),
            cursor=zeros(2, dtype=torch.int32),
            arrived=zeros(dtype=torch.int32),
            p=p,
            head_width=head_width,
        )

    @classmethod
    def from_state(
        cls,
        state: PowerState,
        *,
        fold_size: int = FOLD_SIZE,
        dtype: torch.dtype = torch.float32,
        state_dtype: torch.dtype = torch.float32,
    ) -> RingState:
        """A state, one slot a row, with nothing in the ring; a copy, options as in :meth:`empty`."""
        slots, heads, _, value_width = state.memory.shape
        ring = cls.empty(
            slots, heads, state.head_width, value_width, p=state.p, fold_size=fold_size, dtype=dtype,
            state_dtype=state_dtype, device=state.memory.device,
        )  # fmt: skip
        ring.memory.copy_(state.memory)
        ring.normalizer.copy_(state.normalizer)
        return ring

    def to_state(self) -> PowerState:
        """Everything read, as one state a slot; a copy, this ring stays as it is."""
        whole = self.clone()
        _fold(whole, whole.fill.clone(), self.capacity)
        return PowerState(whole.memory, whole.normalizer, self.p, self.head_width)

    def roll_back(self, tokens: int | Tensor, slot_indices: Tensor | None = None, *, check: bool = True) -> None:
        """Take back the last tokens, as if they had never been read: neither state nor ring keeps anything of them.

        The last L tokens read can be taken back, once.  A fold that the tokens taken back caused stays, since it held older
        tokens only: the state is then bit for bit that of a sequence which folded as early; without such a fold it is what it
        was before.

        Args:
            tokens: how many, a number or an integer tensor ``[B]``.
            slot_indices: ``[B]``, whose; all slots unless given.
            check: refuse more than the ring holds, which waits for the device; without it that is the caller's duty.

        Raises:
            StateError: the ring does not hold so many; nothing was changed.
        """
        fill = self.fill if slot_indices is None else self.fill[slot_indices.long()]
        wanted = torch.as_tensor(tokens, dtype=torch.int32, device=fill.device)
        wanted = wanted.reshape(-1, 1) if wanted.ndim else wanted
        if check and bool(((wanted < 0) | (wanted > fill)).any()):
            raise StateError(
                f"{int(wanted.max())} tokens cannot be taken back: the ring holds {int(fill.min())} that are not folded into "
                "the state yet. Take back fewer, or use a larger fold_size."
            )
        if slot_indices is None:
            self.fill.sub_(wanted)
        else:
            self.fill[slot_indices.long()] = fill - wanted

    def reset(self, slot_indices: Tensor | None = None) -> None:
        """Forget everything, in all slots or the given ones."""
        for tensor in (self.memory, self.normalizer, self.cursor):
            if slot_indices is None:
                tensor.zero_()
            else:
                tensor[slot_indices.long()] = 0

    def select(self, slot_indices: Tensor) -> RingState:
        """Copies of the given slots, in that order; a slot may be taken more than once."""
        indices = slot_indices.to(self.memory.device).long()
        return self._map(lambda tensor: tensor[indices])

    def clone(self) -> RingState:
        """An independent copy."""
        return self._map(Tensor.clone)

    def to(self, device: torch.device | str) -> RingState:
        """On another device."""
        return self._map(lambda tensor: tensor.to(device))

    def _map(self, change) -> RingState:  # type: ignore[no-untyped-def]
        return replace(self, **{name: change(tensor) for name, tensor in self._tensors().items()})

    def _tensors(self) -> dict[str, Tensor]:
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if isinstance(value, Tensor)}

    @property
    def fill(self) -> Tensor:
        """int32 ``[slots, H]``: tokens in the ring (a view)."""
        return self.cursor[..., 1]

    @property
    def capacity(self) -> int:
        """C = 2L, places in the ring."""
        return self.keys.shape[2]

    @property
    def fold_size(self) -> int:
        """L, tokens folded at a time, and tokens that can always be taken back."""
        return self.capacity // 2

    def fill_after(self, fill: int, tokens: int) -> int:
        """How many tokens the ring holds after a call with ``tokens`` more, ``fill`` being there before."""
        if tokens > self.fold_size:
            return self.fold_size
        return fill + tokens - (self.fold_size if fill + tokens > self.capacity else 0)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(tensor.nbytes for tensor in self._tensors().values())


def power_retention_decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    ring: RingState,
    *,
    slot_indices: Tensor | None = None,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    fresh: bool = False,
) -> Tensor:
    """Read T tokens of B sequences into a ring, and answer their queries.

    Equal to :func:`power_retention` with everything read before as ``initial_state``; ``ring`` is changed in place, and no
    gradient is recorded.  Up to L tokens are appended to the ring, the oldest L being folded first where they would find no
    place: one kernel launch where a backend has one, never a wait for the device, CUDA-graph safe.  More than L are read in
    chunks, all but the last L of them going into the state.

    Args:
        q: ``[B, T, Hq, d]``.
        k: ``[B, T, H, d]``.
        v: ``[B, T, H, e]``.
        log_g: ``[B, T, H]``, ≤ 0, or None.
        ring: of at least B slots (of exactly B without ``slot_indices``).
        slot_indices: int32 or int64 ``[B]``: the slot of each sequence, each at most once.  A negative one marks a row that is
            no sequence: its y is 0 and nothing is kept.
        mask: ``[B, T]``, False at padding, which takes a place in the ring and has no effect.
        chunk_size: of a prompt longer than L, see :func:`power_retention`.
        fresh: says that nothing was read yet, which spares a prompt the reading of an empty state.

    Returns:
        y ``[B, T, Hq, e]`` in the dtype of v.

    Raises:
        ArgumentError: an argument has the wrong shape, dtype or value.
        StateError: ``ring`` does not fit the call.
    """
    check_heads(q, k, v, log_g, axes="B, T")
    _check(q, k, v, ring, slot_indices, mask)
    if mask is not None:
        q, k, v, log_g = without_padding(q, k, v, log_g, mask)
    decode = torch.ops.power_retention.decode if torch.compiler.is_compiling() else _decode
    tensors = (ring.memory, ring.normalizer, ring.keys, ring.values, ring.gates, ring.cursor, ring.arrived)
    y: Tensor = decode(q, k, v, log_g, slot_indices, *tensors, ring.p, ring.head_width, chunk_size, fresh)
    return y


def _check(q: Tensor, k: Tensor, v: Tensor, ring: RingState, slot_indices: Tensor | None, mask: Tensor | None) -> None:
    if not isinstance(ring, RingState):
        raise StateError(
            f"ring must be a RingState, not {type(ring).__name__}; RingState.empty starts one, RingState.from_state "
            "takes a PowerState."
        )
    check_power(ring.p)
    batch, tokens, heads, d = k.shape
    shape = (heads, state_width(d, ring.p), v.shape[-1])
    if ring.head_width != d or tuple(ring.memory.shape[1:]) != shape:
        raise StateError(
            f"The ring's memory is {list(ring.memory.shape)} for keys {ring.head_width} wide; this call needs "
            f"[slots, {', '.join(map(str, shape))}] for keys {d} wide."
        )
    if ring.memory.device != q.device or ring.keys.dtype != k.dtype:
        raise StateError(
            f"The ring is on {ring.memory.device} with keys in {ring.keys.dtype}; the inputs are on {q.device} in {k.dtype}. "
            "Make the ring with the model's device and dtype."
        )
    if slot_indices is None and ring.memory.shape[0] != batch:
        raise StateError(
            f"The ring has {ring.memory.shape[0]} slots for {batch} sequences; say with slot_indices which are meant."
        )
    if slot_indices is not None and (
        tuple(slot_indices.shape) != (batch,) or slot_indices.dtype not in (torch.int32, torch.int64)
    ):
        raise ArgumentError(
            f"slot_indices must be an integer tensor [B] = [{batch}], not {list(slot_indices.shape)} in {slot_indices.dtype}."
        )
    if mask is not None and tuple(mask.shape) != (batch, tokens):
        raise ArgumentError(f"mask must be [B, T] = {[batch, tokens]}, not {list(mask.shape)}.")


def _decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    slot_indices: Tensor | None,
    memory: Tensor,
    normalizer: Tensor,
    keys: Tensor,
    values: Tensor,
    gates: Tensor,
    cursor: Tensor,
    arrived: Tensor,
    p: int,
    head_width: int,
    chunk_size: int | None,
    fresh: bool,
) -> Tensor:
    ring = RingState(memory, normalizer, keys, values, gates, cursor, arrived, p, head_width)
    with torch.no_grad():
        y = fused_decode(q, k, v, log_g, ring, slot_indices) if q.shape[1] <= ring.fold_size else None
        if y is not None:
            return y
        read = (
            _read_piece if q.shape[1] <= ring.fold_size else partial(_read_prompt, chunk_size=chunk_size, fresh=fresh)
        )
        return (
            read(q, k, v, log_g, ring) if slot_indices is None else _in_slots(read, q, k, v, log_g, ring, slot_indices)
        )


_decode_operator = torch.library.custom_op(
    "power_retention::decode",
    _decode,
    mutates_args=("memory", "normalizer", "keys", "values", "gates", "cursor", "arrived"),
)


@_decode_operator.register_fake
def _decode_fake(q, k, v, log_g, slot_indices, *ring):  # type: ignore[no-untyped-def]
    return v.new_empty(*q.shape[:-1], v.shape[-1])


# ── the same in plain PyTorch: one slot a row ────────────────────────────────────────────────────────────────────────


def _in_slots(
    read: Callable[..., Tensor],
    q: Tensor,
    k: Tensor,
    v: Tensor,
    log_g: Tensor | None,
    ring: RingState,
    slot_indices: Tensor,
) -> Tensor:
    """Slots are taken out, changed and put back; rows without a slot are left out."""
    rows = (slot_indices >= 0).nonzero().squeeze(-1)
    y = v.new_zeros(*q.shape[:-1], v.shape[-1])
    if rows.numel():
        slots = slot_indices.long()[rows]
        own = ring.select(slots)
        y[rows] = read(q[rows], k[rows], v[rows], None if log_g is None else log_g[rows], own)
        for tensor, changed in zip(ring._tensors().values(), own._tensors().values(), strict=True):
            tensor[slots] = changed
    return y


def _read_piece(q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, ring: RingState) -> Tensor:
    _make_room(ring, q.shape[1])
    _append(ring, k, v, log_g)
    cursor = _common_cursor(ring)
    if cursor is not None:
        return _answer(ring, q, *_window(ring, *cursor), last=None)
    order = torch.arange(q.shape[1], device=q.device)
    last = ring.fill.unsqueeze(-1) - q.shape[1] + order  # [slots, H, T]
    return _answer(ring, q, *_oldest(ring, ring.fill, ring.capacity), last=last)


def _common_cursor(ring: RingState) -> tuple[int, int] | None:
    """(place of the oldest token, tokens in the ring) where all slots agree and asking costs nothing."""
    if ring.cursor.device.type != "cpu" or ring.cursor.numel() == 0:
        return None
    start, fill = ring.cursor[0, 0].tolist()
    return (start, fill) if bool((ring.cursor == ring.cursor[0, 0]).all()) else None


def _window(ring: RingState, start: int, fill: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gates (these in float64) of a ring whose slots agree, oldest first."""
    dtype, over = ring.normalizer.dtype, start + fill - ring.capacity
    parts = (x[:, :, start : start + fill] for x in (ring.keys, ring.values, ring.gates))
    if over > 0:
        parts = (torch.cat((x[:, :, start:], x[:, :, :over]), 2) for x in (ring.keys, ring.values, ring.gates))
    keys, values, gates = parts
    return keys.to(dtype), values.to(dtype), gates.double()


def _read_prompt(
    q: Tensor, k: Tensor, v: Tensor, log_g: Tensor | None, ring: RingState, *, chunk_size: int | None, fresh: bool
) -> Tensor:
    """All but the last L tokens go into the state, in chunks."""
    head, tail = (
        (q[:, span], k[:, span], v[:, span], None if log_g is None else log_g[:, span])
        for span in (slice(None, -ring.fold_size), slice(-ring.fold_size, None))
    )
    state = None
    if not fresh:
        _fold(ring, ring.fill.clone(), ring.capacity)
        state = PowerState(ring.memory, ring.normalizer, ring.p, ring.head_width)
    options: dict[str, Any] = {"p": ring.p, "chunk_size": chunk_size or None}
    y, state = cast(
        "tuple[Tensor, PowerState]", power_retention(*head, initial_state=state, return_state=True, **options)
    )
    last = cast("Tensor", power_retention(*tail, initial_state=state, **options))
    ring.memory.copy_(state.memory)
    ring.normalizer.copy_(state.normalizer)
    _append(ring, *tail[1:])
    return torch.cat((y, last), 1)


def _make_room(ring: RingState, tokens: int) -> None:
    """Fold the oldest L of every sequence whose ring has no place for ``tokens`` more."""
    due = ring.fill + tokens > ring.capacity
    _fold(ring, due * ring.fold_size, ring.fold_size)


def _fold(ring: RingState, count: Tensor, most: int) -> None:
    """Fold the oldest ``count`` ``[slots, H]`` ≤ ``most`` tokens of each sequence into its state."""
    # On a GPU this look would be a wait; there nothing is added where nothing is due.
    if count.device.type == "cpu" and not bool(count.any()):
        return
    dtype = ring.normalizer.dtype
    keys, values, gates = _oldest(ring, count, most)
    weight = _sum_after(gates).exp().to(dtype).unsqueeze(-1)
    decay = gates.sum(-1).exp().to(dtype).unsqueeze(-1)
    phi = expand(keys, ring.p) * weight  # [slots, H, most, D]
    added = phi.mT @ values
    if ring.memory.dtype == dtype:
        ring.memory.mul_(decay.unsqueeze(-1)).add_(added)
    else:
        ring.memory.copy_(added.add_(ring.memory.to(dtype) * decay.unsqueeze(-1)))
    ring.normalizer.mul_(decay).add_(phi.sum(-2))
    ring.cursor[..., 0] = (ring.cursor[..., 0] + count) % ring.capacity
    ring.cursor[..., 1] -= count


def _append(ring: RingState, k: Tensor, v: Tensor, log_g: Tensor | None) -> None:
    tokens, cursor = k.shape[1], _common_cursor(ring)
    log_g = k.new_zeros(k.shape[:3], dtype=ring.gates.dtype) if log_g is None else log_g.clamp(min=FORGET)
    if tokens == 1 and cursor is not None:
        place = sum(cursor) % ring.capacity
        ring.keys[:, :, place], ring.values[:, :, place], ring.gates[:, :, place] = k[:, 0], v[:, 0], log_g[:, 0]
    else:
        places = torch.arange(tokens, device=k.device) + ring.cursor.sum(-1, keepdim=True)  # [slots, H, T]
        places = (places % ring.capacity).long()
        for stored, new in ((ring.keys, k), (ring.values, v)):
            new = new.transpose(1, 2).to(stored.dtype)
            stored.scatter_(2, places.unsqueeze(-1).expand(new.shape), new)
        ring.gates.scatter_(2, places, log_g.transpose(1, 2).to(ring.gates.dtype))
    ring.cursor[..., 1] += tokens


def _oldest(ring: RingState, count: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Keys, values and gates (these in float64) of the oldest ``count`` ``[slots, H]`` ≤ ``most`` tokens, zeros after them."""
    order = torch.arange(most, device=count.device)
    place = ((order + ring.cursor[..., :1]) % ring.capacity).long()
    # What stands elsewhere is left over and may be anything: 0 times an infinity is no 0.
    other = order >= count.unsqueeze(-1)
    keys, values = (
        x.gather(2, place.unsqueeze(-1).expand(*place.shape, x.shape[-1]))
        .to(ring.normalizer.dtype)
        .masked_fill(other.unsqueeze(-1), 0)
        for x in (ring.keys, ring.values)
    )
    return keys, values, ring.gates.gather(2, place).double().masked_fill(other, 0)


def _sum_after(gates: Tensor) -> Tensor:
    """Per token the sum of the later gates: of tokens that still matter, the small ones alone."""
    later = torch.cat((gates[..., 1:], torch.zeros_like(gates[..., :1])), -1)
    return later.flip(-1).cumsum(-1).flip(-1)


def _answer(ring: RingState, q: Tensor, keys: Tensor, values: Tensor, gates: Tensor, last: Tensor | None) -> Tensor:
    """y ``[slots, T, Hq, e]``.

    Args:
        keys, values, gates: n tokens of the ring, oldest first, the T new ones among them.
        last: ``[slots, H, T]``, which those are; None where they are the last T of the n.
    """
    (slots, tokens), heads, dtype, p = q.shape[:2], ring.keys.shape[1], ring.normalizer.dtype, ring.p
    within, before = (decay.to(dtype).flatten(0, 1) for decay in _decays(gates, last, tokens))  # [N, T, n], [N, T]
    queries, _ = scaled_queries(q, heads, dtype)  # [N, r·T, d]
    groups = queries.shape[1] // tokens
    if tokens > 1:
        within, before = within.repeat(1, groups, 1), before.repeat(1, groups)
    weights = integer_power(queries @ keys.flatten(0, 1).mT, p) * within
    memory, normalizer = ring.memory.flatten(0, 1), ring.normalizer.flatten(0, 1)
    phi = expand(queries, p) * multiplicity(queries.shape[-1], p, queries)
    num = weights @ values.flatten(0, 1) + (phi @ memory.to(dtype)) * before.unsqueeze(-1)
    den = weights.sum(-1) + (phi @ normalizer.unsqueeze(-1)).squeeze(-1) * before
    y = ratio(torch.cat((num, den.unsqueeze(-1)), -1), state_noise(queries, normalizer, p) * before)
    return from_heads(y, slots, tokens).to(q.dtype)


def _decays(gates: Tensor, last: Tensor | None, tokens: int) -> tuple[Tensor, Tensor]:
    """exp(G_i − G_j) of T new tokens and n in the ring ``[slots, H, T, n]``, 0 for later ones; exp(G_i) ``[slots, H, T]``."""
    after, total = _sum_after(gates), gates.sum(-1, keepdim=True)
    if last is None and tokens == 1:
        return after.exp().unsqueeze(-2), total.exp()
    count = gates.shape[-1]
    if last is None:
        last = torch.arange(count - tokens, count, device=gates.device).expand(*gates.shape[:2], tokens)
    after_own = after.gather(-1, last.long())
    future = torch.arange(count, device=gates.device) > last.unsqueeze(-1)
    within = (after.unsqueeze(-2) - after_own.unsqueeze(-1)).masked_fill(future, -torch.inf).exp()
    return within, (total - after_own).exp()
