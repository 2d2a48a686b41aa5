"""torch's recurrent layers, written out step by step: their own forward is one function of the whole sequence."""

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.functional import linear

from stages.common.stage import InputError
from stages.weightnet.tracing.written_out import require_alike, write_out

State = tuple[Tensor, ...]  # the hidden state [b, h], and of an LSTM its cells' [b, h]


def write_out_recurrence(model: nn.Module) -> None:
    """Let a module's recurrent layers run by functions that are followed; what they give is compared with torch's own."""
    write_out(model, nn.RNNBase, recur)
    write_out(model, nn.RNNCellBase, one_step)


def lstm(given: Float[Tensor, "b 4h"], own: Float[Tensor, "b 4h"], state: State) -> State:
    """Return the next state of an LSTM (Hochreiter and Schmidhuber 1997; Gers et al. 2000)."""
    enter, keep, new, leave = (given + own).chunk(4, -1)
    cells = keep.sigmoid() * state[1] + enter.sigmoid() * new.tanh()
    return leave.sigmoid() * cells.tanh(), cells


def gru(given: Float[Tensor, "b 3h"], own: Float[Tensor, "b 3h"], state: State) -> State:
    """Return the next state of a gated recurrent unit (Cho et al. 2014)."""
    given_parts, own_parts = given.chunk(3, -1), own.chunk(3, -1)
    reset, keep = ((a + b).sigmoid() for a, b in zip(given_parts[:2], own_parts[:2], strict=True))
    new = (given_parts[2] + reset * own_parts[2]).tanh()
    return ((1 - keep) * new + keep * state[0],)


CELLS: dict[str, Callable[[Tensor, Tensor, State], State]] = {
    "LSTM": lstm,
    "GRU": gru,
    "RNN_TANH": lambda given, own, _: ((given + own).tanh(),),
    "RNN_RELU": lambda given, own, _: ((given + own).relu(),),
}


def recur(layer: nn.RNNBase, sequence: Tensor, state: Any = None) -> tuple[Tensor, Any]:
    """Return what the layer gives for a batch of sequences that start from a state of zeros: all outputs, and the last states.

    InputError if they start elsewhere, or what is given differs from torch's own.
    """
    with torch._C.DisableTorchFunction():
        own, last = type(layer).forward(layer, sequence)
        starts = [] if state is None else [state] if isinstance(state, Tensor) else list(state)
        if any(bool(start.any()) for start in starts):
            raise InputError(f"{type(layer).__name__} that does not start from zeros is not supported")
    if not isinstance(sequence, Tensor) or sequence.dim() != 3 or layer.proj_size:
        raise InputError(f"{type(layer).__name__} of packed or single sequences, or with projections, is not supported")
    x, ends = sequence if layer.batch_first else sequence.transpose(0, 1), []
    for number in range(layer.num_layers):
        ways = ("", "_reverse") if layer.bidirectional else ("",)
        found = [along(layer, x, f"_l{number}{way}", bool(way)) for way in ways]
        x = torch.cat([outputs for outputs, _ in found], -1) if layer.bidirectional else found[0][0]
        ends += [end for _, end in found]
    y = x if layer.batch_first else x.transpose(0, 1)
    states = [torch.stack(parts) for parts in zip(*ends, strict=True)]
    require_alike(layer, own, y)
    return y, tuple(states) if isinstance(last, tuple) else states[0]


def equations_of(cell: nn.RNNCellBase) -> Callable[[Tensor, Tensor, State], State]:
    """Return what gives a cell's next state."""
    if isinstance(cell, nn.LSTMCell):
        return CELLS["LSTM"]
    return CELLS["GRU" if isinstance(cell, nn.GRUCell) else f"RNN_{str(cell.nonlinearity).upper()}"]


def one_step(cell: nn.RNNCellBase, given: Float[Tensor, "b f"], state: Any = None) -> Any:
    """Return the next state of a cell that forward calls step by step, from a state of zeros at first."""
    with torch._C.DisableTorchFunction():
        own = type(cell).forward(cell, given, state)
    products = linear(given, cell.weight_ih, cell.bias_ih)
    zeros = 0 * products[:, : cell.hidden_size]
    before = (zeros, zeros) if state is None else state if isinstance(state, tuple) else (state,)
    # a constant is joined to what depends on images: else it is none of any image's
    before = tuple(part + zeros for part in before)
    after = equations_of(cell)(products, linear(before[0], cell.weight_hh, cell.bias_hh), before)
    found = after if isinstance(own, tuple) else after[0]
    for one, other in zip(own, found, strict=True) if isinstance(own, tuple) else [(own, found)]:
        require_alike(cell, one, other)
    return found


def along(layer: nn.RNNBase, x: Float[Tensor, "b t f"], name: str, back: bool) -> tuple[Float[Tensor, "b t h"], State]:
    """Return the outputs of one of a layer's recurrences, and its last state; name: how its tensors end; back: from the last on."""
    weight, bias = (
        [getattr(layer, f"{part}_{of}{name}") if part == "weight" or layer.bias else None for of in ("ih", "hh")]
        for part in ("weight", "bias")
    )
    given = linear(x, weight[0], bias[0])
    zeros = 0 * given[:, 0, : layer.hidden_size]
    state: State = (zeros, zeros) if layer.mode == "LSTM" else (zeros,)
    outputs = []
    for t in range(x.shape[1])[:: -1 if back else 1]:
        state = CELLS[layer.mode](given[:, t], linear(state[0], weight[1], bias[1]), state)
        outputs.append(state[0])
    return torch.stack(outputs[:: -1 if back else 1], 1), state
