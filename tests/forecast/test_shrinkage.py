"""Forecasts shrunk by what the run's own past says of them: by nothing of its future, and never further than they go."""

from dataclasses import dataclass

import pytest
import torch

from stages.common.vectors import Layout
from stages.forecast.baselines import Extrapolation
from stages.forecast.shrinkage import (
    SAMPLE,
    Prior,
    causal_shrinkage,
    cautious,
    compare_with_past,
    evidence,
    sample_of,
    shrinkage,
    spread_over_weights,
    trust,
)
from stages.forecast.trajectory import WINDOW, Trajectory

LAYOUT = Layout({"a.weight": (4, 5), "a.bias": (4,), "b.weight": (3, 4)})
HORIZONS = (1, 3)


def walk(n=30, seed=0) -> Trajectory:
    steps = torch.randn(n, LAYOUT.size, generator=torch.Generator().manual_seed(seed))
    return Trajectory(LAYOUT, steps.cumsum(0), None)


@dataclass(frozen=True)
class Seer:
    """One that knows the future, and moves so many times as far."""

    run: Trajectory
    gain: float
    horizons: tuple[int, ...] = HORIZONS

    def movements(self, run, t, index):
        ends = [min(t + h, len(self.run) - 1) for h in self.horizons]
        return self.gain * (self.run.weights[ends][:, index] - run.weights[t, index])


def test_nothing_of_the_future_is_read():
    """What is said at t is the same whatever comes after t."""
    run = walk()
    for t in (WINDOW, WINDOW + 1, WINDOW + 4, 20):
        spoilt = run.weights.clone()
        spoilt[t + 1 :] = 1e3 * torch.randn_like(spoilt[t + 1 :])
        model = Extrapolation(HORIZONS)
        said, again = (
            shrinkage(compare_with_past(model, Trajectory(LAYOUT, w, None)).until(t), Prior.sceptical(2))
            for w in (run.weights, spoilt)
        )
        assert torch.equal(said, again)
    causal = causal_shrinkage(compare_with_past(model, run), Prior.sceptical(2))
    short = Trajectory(LAYOUT, run.weights[:21], None)
    said = shrinkage(compare_with_past(model, short), Prior.sceptical(2))
    assert torch.allclose(causal[20 - WINDOW], said)


def test_errors_are_those_of_the_shrunk_forecasts():
    run, model = walk(), Extrapolation(HORIZONS)
    agreement = compare_with_past(model, run)
    causal = causal_shrinkage(
        agreement, Prior(torch.tensor([0.5, 0.3]), torch.tensor([0.4, 0.4]), torch.zeros(2), torch.ones(2), 1.0)
    )
    for factors in (torch.ones_like(causal), causal):
        errors = agreement.errors(factors)
        for o in (0, 7, len(errors) - 1):
            for i, h in enumerate(HORIZONS):
                t = WINDOW + o
                if t + h >= len(run):
                    assert errors[o, i].isnan().all()
                    continue
                k = spread_over_weights(factors[o, i], LAYOUT)
                ahead = run.weights[t] + k * model.movements(run, t, torch.arange(LAYOUT.size))[i]
                direct = (ahead - run.weights[t + h]).square().sum()
                assert errors[o, i].sum().item() == pytest.approx(direct.item(), rel=1e-4)


def test_who_knows_is_trusted_more_and_more_and_who_goes_too_far_by_half():
    run = walk(80)
    for gain, trusted in ((1.0, 1.0), (2.0, 0.5), (-1.0, 0.0)):
        causal = causal_shrinkage(compare_with_past(Seer(run, gain), run), Prior.sceptical(2))
        assert ((causal >= 0) & (causal <= 1)).all()
        assert torch.equal(causal[0], torch.zeros_like(causal[0]))  # nothing is known yet: the prior's
        assert causal[-1].mean().item() == pytest.approx(trusted, abs=0.1)


def test_who_knows_nothing_is_shrunk_away():
    """Extrapolating a random walk has twice the error of keeping the last weights; shrunk, it has hardly more."""
    errors = torch.zeros(2, 2)
    for seed in range(5):
        run = walk(60, seed)
        agreement = compare_with_past(Extrapolation(HORIZONS), run)
        for i, factors in enumerate((torch.ones(1), causal_shrinkage(agreement, Prior.sceptical(2)))):
            errors[i] += (agreement.errors(factors).nansum((0, 2)) / agreement.energy.nansum((0, 2))).float() / 5
    assert (errors[0] > 1.8).all()
    assert (errors[1] < 1.03).all()


def test_a_layers_own_past_counts():
    run = walk(80)

    class OneLayer(Seer):
        def movements(self, run, t, index):
            sign = torch.where(LAYOUT.layer_of[index] == 0, 1.0, -1.0)
            return sign * super().movements(run, t, index)

    factors = shrinkage(compare_with_past(OneLayer(run, 1.0), run), Prior.sceptical(2))
    assert (factors[:, 0] > 0.8).all()
    assert (factors[:, 1:] < 0.2).all()


def test_large_layers_are_checked_by_a_sample_that_stands_for_all():
    layout = Layout({"a": (4 * SAMPLE,), "b": (7,)})
    index = sample_of(layout)
    assert len(index) == SAMPLE + 7
    steps = torch.randn(WINDOW + 3, layout.size, generator=torch.Generator().manual_seed(0))
    run = Trajectory(layout, steps.cumsum(0), None)
    agreement = compare_with_past(Extrapolation((1,)), run)
    exact = (run.weights[WINDOW + 1] - run.weights[WINDOW])[: 4 * SAMPLE].square().sum()
    assert agreement.energy[0, 0, 0].item() == pytest.approx(exact.item(), rel=0.05)


def test_what_stands_still_is_neither_forecast_nor_judged():
    weights = walk(20).weights.clone()
    weights[:, :20] = weights[0, :20]
    agreement = compare_with_past(Seer(walk(20), 1.0), Trajectory(LAYOUT, weights, None))
    assert agreement.square[0, :, 0].sum() == agreement.energy[0, :, 0].sum() == 0
    assert shrinkage(agreement, Prior.sceptical(2)).isfinite().all()


def test_trust_is_said_in_words():
    assert "too few" in trust({}, {}, 7)
    said = trust({1: 1.0, 5: 0.8}, {1: 30, 5: 26}, 40)
    assert "0.80 at 5" in said and "1 ahead it knows little more" in said and "short" not in said
    assert "5 ahead the past is short" in trust({1: 1.0, 5: 0.8}, {1: 9, 5: 5}, 16)


def test_a_prior_holds_until_the_past_speaks():
    run = walk(60)
    sure = Prior(torch.ones(2), torch.full((2,), 0.2), torch.zeros(2), torch.ones(2), 2.0)
    agreement = compare_with_past(Seer(run, -1.0), run)
    assert torch.equal(shrinkage(agreement.until(WINDOW), sure), torch.ones(2, 3, dtype=torch.float64))
    assert (shrinkage(agreement, sure) < 0.05).all()


def test_caution_only_shrinks_and_goes_as_a_good_past_gets_longer():
    run = walk(80)
    agreement = compare_with_past(Seer(run, 1.0), run)
    bold, careful = (
        Prior(torch.ones(2), torch.ones(2), torch.full((2,), spread), torch.full((2,), 0.2), 2.0)
        for spread in (0.0, 0.5)
    )
    most, safe = (causal_shrinkage(agreement, prior) for prior in (bold, careful))
    assert (safe <= most).all()
    assert (safe[0] == 0).all()  # 1 of 0.5 either way: it might be none
    assert (safe[1:] >= safe[:-1] - 1e-9).all()  # of a seer, each origin tells the same
    assert (safe[-1] > 0.9).all()


def test_what_is_surely_safe_is_as_bad_as_not_to_move():
    """Of a movement that is too far, g d, the factor 2 / g has exactly the error of keeping the last weights."""
    run = walk(80)
    for gain in (3.0, 4.0, 10.0):
        agreement = compare_with_past(Seer(run, gain), run)
        unsure = Prior(torch.ones(2), torch.ones(2), torch.full((2,), 1e3), torch.full((2,), 1e-6), 2.0)
        safe = cautious(evidence(agreement).sum(1), unsure)
        assert torch.allclose(safe, torch.full((2,), 2 / gain, dtype=torch.float64), atol=1e-4)
        kept = agreement.energy.nansum((0, 2))
        assert torch.allclose(agreement.errors(safe[:, None]).nansum((0, 2)), kept, rtol=1e-3)
        assert (agreement.errors(1.01 * safe[:, None]).nansum((0, 2)) > kept).all()
