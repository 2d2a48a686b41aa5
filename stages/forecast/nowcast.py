"""Forecasts used while training: an optimiser that now and then jumps to better weights, if a validation batch agrees.

Axes: p weights, all that are trained.
"""

import math
import warnings
from collections import deque
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor

from stages.common.vectors import Layout
from stages.forecast.jump import JumpForecaster
from stages.forecast.layerwise import LayerForecaster
from stages.forecast.regimes import State, direction, knows_direction
from stages.forecast.trajectory import HISTORY, WINDOW, Trajectory

PROPOSALS = ("stay", "average", "jump")
PROGRESS = (
    "steps",
    "strikes",
    "charged_steps",
    "last",
    "chosen",
    "gains",
    "foretold",
)  # in a state_dict, beside the snapshots
GAIN_WORTH = 3.0  # proposals that the mean gain of unseen runs counts for, beside those of this run
FADING = 0.8  # of what a run's proposals told of gains, from one proposal to the next

Snapshot = tuple[
    Float[Tensor, " p"], Float[Tensor, " p"] | None
]  # weights, and the optimiser's direction if it is read


class NowcastOptimizer(torch.optim.Optimizer):
    """A drop-in around any torch.optim optimiser, for any model: `step()` steps, and proposes other weights now and then.

    Every `every` steps it takes a snapshot. After every WINDOW + 1 of them it proposes to stay, to move to their mean (latest
    weight averaging), or to go where the forecaster says, and takes what `validation_loss` likes best. A move starts the
    snapshots anew. A proposal is not worth its cost if the loss falls by less than training would have made it fall for as many steps,
    going by the loss since the proposal before; after `patience` such proposals in a row it switches itself off, and is then the bare
    optimiser.

    Of a forecaster whose gains in loss were measured on runs that it had not seen, as the default one's are, only those horizons are
    proposed whose expected gain is positive, going by these runs at about the same `every` and by what came of earlier proposals in
    this one, which count for less the older they are; if there is none, nothing is forecast. `record` says how often a gain so
    foretold came true.

    Groups, state and defaults are those of the bare optimiser, `self.optimizer`: schedulers and scalers may be given either.
    Only parameters that require a gradient, have one and moved since the last proposal are moved; others keep every bit.
    If parameters are added, frozen or unfrozen, the snapshots start anew. Where a model lies on several machines, each
    must get the same validation loss, since each chooses for itself.

    forecaster: `default_forecaster()`, which serves any run, or that of tune_jump, on the processor; None proposes the mean alone.
    The default proposes weights at each of its horizons, and knows strides of 5 to 400 steps. validation_loss: returns the model's
    loss, as it is now, on images that it is not trained on, the same at every call of a proposal. evaluation_cost, forecast_cost:
    in optimiser steps; `charged_steps` counts what was spent on them. decay: of an exponential average of the weights, of which
    snapshots are taken then: forecasts of an average go further than those of weights, whose noise they need not undo.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        forecaster: JumpForecaster | LayerForecaster | None,
        validation_loss: Callable[[], float | Tensor],
        every: int,
        patience: int = 3,
        evaluation_cost: float = 0.0,
        forecast_cost: float = 0.0,
        decay: float = 0.0,
    ) -> None:
        check_parts(optimizer, forecaster)
        if not 0 <= decay < 1:
            raise ValueError(f"expected decay in 0 to 1, got {decay}")
        if every < 1 or patience < 1:
            raise ValueError(f"expected positive every and patience, got {every} and {patience}")
        # All that Optimizer's own __init__ does, except that groups and state are not made: they are the bare optimiser's.
        self.__setstate__({"optimizer": optimizer, "defaults": optimizer.defaults})
        self.forecaster, self.validation_loss = forecaster, validation_loss
        self.every, self.patience = every, patience
        self.evaluation_cost, self.forecast_cost = evaluation_cost, forecast_cost
        self.decay = decay
        self.reads_state = forecaster is not None and forecaster.reads["with_state"]
        if self.reads_state and not knows_direction(optimizer):
            warnings.warn(
                f"{type(optimizer).__name__} keeps no direction that the forecaster knows, as Adam and SGD with momentum do: "
                "it forecasts from the weights alone",
                stacklevel=2,
            )
        self.tracked: list[Tensor] = []  # parameters of which snapshots are taken
        self.layout = Layout({})
        self.start: Snapshot | None = None
        self.smoothed: Float[Tensor, " p"] | None = None  # the exponential average, if snapshots are taken of it
        self.recent: deque[Snapshot] = deque(maxlen=HISTORY)
        self.steps, self.strikes, self.charged_steps = 0, 0, 0.0
        self.last: tuple[int, float] | None = None  # step and loss after the proposal before
        self.gains: dict[
            str, tuple[float, float]
        ] = {}  # by proposal: fading sum of the gains that were measured, and of their number
        self.foretold = (0, 0)  # how often a gain was, and came true
        self.chosen: list[str] = []  # of PROPOSALS, or "ahead <h>": one for each time that it proposed

    @property
    def param_groups(self) -> list[State]:
        """The bare optimiser's."""
        return self.optimizer.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[State]) -> None:
        self.optimizer.param_groups = groups

    @property
    def state(self) -> dict[Tensor, State]:
        """The bare optimiser's."""
        return self.optimizer.state

    @state.setter
    def state(self, state: dict[Tensor, State]) -> None:
        self.optimizer.state = state

    @property
    def record(self) -> str:
        """How often what it proposed was better than to stay, going by the validation loss."""
        moved = sum(choice != "stay" for choice in self.chosen)
        forecasts = moved - self.chosen.count("average")
        said = f"{len(self.chosen)} times it proposed; {moved} times it moved, {forecasts} of them to a forecast"
        times, right = self.foretold
        return f"{said}; {right} of {times} gains that were foretold came true" if times else said

    @property
    def on(self) -> bool:
        """Whether it still proposes."""
        return self.strikes < self.patience

    def __getstate__(self) -> dict[str, object]:
        """Return all of it but the `step` that a scheduler has wrapped, which is bound to this object."""
        return {name: value for name, value in vars(self).items() if name != "step"}

    def add_param_group(self, param_group: State) -> None:
        """Give the bare optimiser another group; snapshots start anew with it."""
        self.optimizer.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients."""
        self.optimizer.zero_grad(set_to_none)

    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Take a step of the bare optimiser, then perhaps a snapshot, then perhaps a move."""
        if self.start is None:
            self._start_anew()
        loss = self.optimizer.step(closure)
        self.steps += 1
        if self.on and self.decay:
            self._smooth()
        if self.on and self.steps % self.every == 0:
            self._record()
            if self.steps // self.every % (WINDOW + 1) == 0 and len(self.recent) > WINDOW:
                self._propose()
        return loss

    def _trained(self) -> list[Tensor]:
        """Return the parameters that may be moved: real ones that require a gradient."""
        parameters = [p for group in self.param_groups for p in group["params"]]
        return [p for p in parameters if p.requires_grad and p.is_floating_point() and p.numel()]

    def _start_anew(self) -> None:
        self.tracked = self._trained()
        self.layout = Layout.of({str(i): p for i, p in enumerate(self.tracked)})
        self.recent.clear()
        self.start = self._snapshot() if self.tracked else None
        self.smoothed = None

    def _same(self) -> bool:
        """Whether the parameters that may be moved are those of which snapshots are taken."""
        return list(map(id, self._trained())) == list(map(id, self.tracked))

    def _smooth(self) -> None:
        """Take the weights into the exponential average."""
        if self.start is None or not self._same():
            return
        weights = self._weights()
        self.smoothed = weights if self.smoothed is None else self.smoothed.lerp(weights, 1 - self.decay)

    def _record(self) -> None:
        if self.start is not None and self._same():
            weights, states = self._snapshot()
            self.recent.append((weights if self.smoothed is None else self.smoothed, states))
        else:
            self._start_anew()

    def _weights(self) -> Float[Tensor, " p"]:
        """Return weights in float32, or in float64 if some are: no bit of a parameter is lost."""
        device = self.tracked[0].device
        double = any(p.dtype == torch.float64 for p in self.tracked)
        dtype = torch.float64 if double else torch.float32
        return torch.cat([p.detach().reshape(-1).to(device, dtype) for p in self.tracked])

    def _snapshot(self) -> Snapshot:
        """Return weights, and directions in float32."""
        device, weights = self.tracked[0].device, self._weights()
        if not self.reads_state:
            return weights, None
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        known = knows_direction(self.optimizer)
        directions = [
            direction(p, self.state.get(p, {}) if known else {}, group_of[p]).reshape(-1) for p in self.tracked
        ]
        return weights, torch.cat([d.detach().to(device, torch.float32) for d in directions])

    @torch.no_grad()
    def _propose(self) -> None:
        weights = torch.stack([w for w, _ in (self.start, *self.recent)])
        movable = self._movable(weights[-WINDOW - 1 :])
        if not movable:
            return
        stay = weights[-1] if self.smoothed is None else self._weights()
        candidates = {"stay": stay, "average": weights[-WINDOW - 1 :].mean(0), **self._forecasts(weights)}
        try:
            losses = {}
            for name, candidate in candidates.items():
                self._move(movable, candidate)
                loss = float(self.validation_loss())
                losses[name] = loss if math.isfinite(loss) else math.inf
        except BaseException:
            self._move(movable, candidates["stay"])
            raise
        best = min(losses, key=losses.__getitem__)
        self._move(movable, candidates[best])
        self.chosen.append(best)
        self._learn_gains(losses)
        spent = self.evaluation_cost * len(candidates) + self.forecast_cost * (len(candidates) > 2)
        worth = losses["stay"] - losses[best] > spent * self._progress(losses["stay"])
        self.strikes = 0 if worth else self.strikes + 1
        self.charged_steps += spent
        self.last = (self.steps, losses[best])
        if best != "stay":
            self.recent.clear()  # the path before the move says nothing of the one after it
            self.smoothed = None if self.smoothed is None else candidates[best].clone()

    def _movable(self, window: Float[Tensor, "t p"]) -> list[tuple[Tensor, slice]]:
        """Return the parameters that have a gradient and moved in the window, and where they lie in it."""
        places = zip(self.tracked, self.layout.slices.values(), strict=True)
        return [
            (p, where) for p, where in places if p.grad is not None and (window[:, where] != window[-1, where]).any()
        ]

    def _forecasts(self, weights: Float[Tensor, "t p"]) -> dict[str, Float[Tensor, " p"]]:
        """Return where the forecaster, which is in float32 and on the processor, says to go: by a jump, or so many snapshots ahead."""
        tried = self._tried()
        if self.forecaster is None or not tried:
            return {}
        states = torch.stack([s for _, s in (self.start, *self.recent)]).cpu() if self.reads_state else None
        run = Trajectory(self.layout, weights.float().cpu(), states)
        t = len(run) - 1
        if isinstance(self.forecaster, JumpForecaster):
            proposals = {"jump": self.forecaster.propose(run, t)}
        else:
            ahead = self.forecaster.predict(run, t)
            proposals = {f"ahead {h}": row for h, row in zip(self.forecaster.horizons, ahead, strict=True)}
            proposals = {name: proposals[name] for name in tried}
        if weights.dtype == torch.float32:
            return {name: proposal.to(weights.device) for name, proposal in proposals.items()}
        last = run.weights[-1]
        return {name: weights[-1] + (proposal - last).to(weights) for name, proposal in proposals.items()}

    def _tried(self) -> list[str]:
        """Return the proposals of the forecaster that are expected to gain; all of them if nothing is known of its gains."""
        if not isinstance(self.forecaster, LayerForecaster):
            return ["jump"]
        names = [f"ahead {h}" for h in self.forecaster.horizons]
        known = self.forecaster.gains.get("average" if self.decay else "weights")
        if not known:
            return names
        nearest = min(known, key=lambda every: abs(math.log(every / self.every)))
        return [
            name
            for name, gain in zip(names, known[nearest], strict=True)
            if expected_gain(gain, self.gains.get(name)) > 0
        ]

    def _learn_gains(self, losses: dict[str, float]) -> None:
        """Remember by how much the loss of each forecast was below that of staying, over the latter."""
        stay = losses["stay"]
        self.gains = {name: (FADING * total, FADING * n) for name, (total, n) in self.gains.items()}
        for name, loss in losses.items():
            if name.startswith("ahead") and math.isfinite(stay) and stay > 0:
                total, n = self.gains.get(name, (0.0, 0.0))
                self.gains[name] = total + max(-1.0, 1 - loss / stay), n + 1
                times, right = self.foretold
                self.foretold = times + 1, right + (loss < stay)

    def _move(self, movable: list[tuple[Tensor, slice]], weights: Float[Tensor, " p"]) -> None:
        for parameter, where in movable:
            parameter.copy_(weights[where].view(parameter.shape))

    def _progress(self, loss: float) -> float:
        """Return by how much training lowered the loss in a step since the proposal before; 0 if it did not."""
        if self.last is None or not math.isfinite(self.last[1]):
            return 0.0
        step, before = self.last
        return max(0.0, (before - loss) / (self.steps - step))

    def state_dict(self) -> State:
        """Return everything that is needed to go on: the bare optimiser's state_dict, and under `nowcast` what is proposed from."""
        for hook in self._optimizer_state_dict_pre_hooks.values():
            hook(self)
        nowcast = {name: getattr(self, name) for name in PROGRESS} | {"chosen": list(self.chosen)}
        shapes = [list(shape) for shape in self.layout.shapes.values()]
        nowcast |= {"shapes": shapes, "start": self.start, "recent": list(self.recent), "smoothed": self.smoothed}
        state = self.optimizer.state_dict() | {"nowcast": nowcast}
        for hook in self._optimizer_state_dict_post_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else replaced
        return state

    def load_state_dict(self, state_dict: State) -> None:
        """Go on from a state; the model's weights are the model's own. From a bare optimiser's state, nowcasting begins anew."""
        state = dict(state_dict)
        for hook in self._optimizer_load_state_dict_pre_hooks.values():
            replaced = hook(self, state)
            state = state if replaced is None else dict(replaced)
        begun = {
            "steps": 0,
            "strikes": 0,
            "charged_steps": 0.0,
            "last": None,
            "chosen": [],
            "gains": {},
            "foretold": (0, 0),
        }
        nowcast = begun | state.pop("nowcast", {})
        self.optimizer.load_state_dict(state)
        self._start_anew()
        if self.start is not None:
            snapshots = [nowcast.get("start"), *nowcast.get("recent", [])]
            self._restore_snapshots(nowcast.get("shapes"), snapshots, nowcast.get("smoothed"))
        for name in PROGRESS:
            value = nowcast[name]
            setattr(self, name, list(value) if name == "chosen" else value)
        for hook in self._optimizer_load_state_dict_post_hooks.values():
            hook(self)

    def _restore_snapshots(
        self, shapes: list[list[int]] | None, snapshots: list[Snapshot | None], smoothed: Float[Tensor, " p"] | None
    ) -> None:
        """Take a state's snapshots, the run's first one in front; begin anew if they are of other parameters or lack what is read."""
        reference, _ = self.start
        self.start = None
        if shapes != [list(p.shape) for p in self.tracked] or snapshots[0] is None:
            return
        if self.reads_state and any(states is None for _, states in snapshots):
            return
        device = reference.device
        self.start, *recent = (
            (weights.to(reference), None if states is None else states.to(device)) for weights, states in snapshots
        )
        self.recent.extend(recent)
        self.smoothed = None if smoothed is None else smoothed.to(reference)


def expected_gain(elsewhere: float, here: tuple[float, float] | None) -> float:
    """Return the mean gain that is expected of a proposal: of unseen runs, worth GAIN_WORTH proposals, and of this one's sum and number."""
    total, n = here or (0.0, 0.0)
    return (GAIN_WORTH * elsewhere + total) / (GAIN_WORTH + n)


def check_parts(optimizer: object, forecaster: object) -> None:
    """ValueError if the optimiser or the forecaster is not one with which NowcastOptimizer can work."""
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise ValueError(f"expected a torch.optim.Optimizer to wrap, got {type(optimizer).__name__}")
    if any(hasattr(p, "to_local") for group in optimizer.param_groups for p in group["params"]):
        raise ValueError(
            "parameters are sharded over machines (DTensor), and only whole ones can be moved: use the bare optimiser"
        )
    if forecaster is None:
        return
    if not isinstance(forecaster, (JumpForecaster, LayerForecaster)):
        raise ValueError(
            "expected default_forecaster(), the forecaster of load_forecaster('models/tune_jump/.../forecaster.pt')[0], or None, "
            f"got {type(forecaster).__name__}"
        )
    if any(p.device.type != "cpu" or p.dtype != torch.float32 for p in forecaster.parameters()):
        raise ValueError("expected the forecaster in float32 on the processor: hand over forecaster.float().cpu()")
