"""A forecast reads the past alone, treats relabelled neurons alike, and starts as no change."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from stages.common.vectors import Layout
from stages.forecast.baselines import BASELINES
from stages.forecast.diffusion import DiffusionForecaster
from stages.forecast.forecasters import build_forecaster
from stages.forecast.shared import RidgeForecaster, movement_target, random_coordinates, roll_out
from stages.forecast.trajectory import HISTORY, WINDOW, Trajectory, origins, read_features

HORIZONS = (1, 5)
SHAPES = {
    "c1.weight": (4, 1, 3, 3),
    "c1.bias": (4,),
    "f1.weight": (6, 4 * 4),  # 4 channels of 4 pixels
    "f1.bias": (6,),
    "f2.weight": (3, 6),
    "f2.bias": (3,),
}


def trajectory(length=20) -> Trajectory:
    layout = Layout(SHAPES)
    steps = 0.1 * torch.randn(length, layout.size)
    return Trajectory(layout, steps.cumsum(0), torch.randn(length, layout.size).half())


def untrained(kind, with_state=True, with_context=True):
    config = {"kind": kind, "horizons": HORIZONS, "with_state": with_state, "with_context": with_context}
    return build_forecaster(config | {"n_layers": len(SHAPES), "d_model": 8, "seed": 0})


def trained(kind, with_state=True, with_context=True):
    """A forecaster whose last layers are not zero any more."""
    model = untrained(kind, with_state, with_context)
    with torch.no_grad():
        for tensor in [*model.parameters(), *(t for t in model.buffers() if t.is_floating_point())]:
            tensor += 0.1 * torch.randn_like(tensor)
    return model


KINDS = ["transformer", "mlp", "ridge", "diffusion"]


def forecast(model, run, t) -> torch.Tensor:
    """What a forecaster of any kind says of a run."""
    return model.propose(run, t)[None] if hasattr(model, "propose") else model.predict(run, t)


@pytest.mark.parametrize("kind", [*KINDS, "jump"])
def test_a_forecast_is_bit_identical_when_the_future_changes(kind):
    run, t = trajectory(), 12
    weights, state = run.weights.clone(), run.state.clone()
    weights[t + 1 :] = torch.randn_like(weights[t + 1 :])
    state[t + 1 :] = 0
    other = Trajectory(run.layout, weights, state)
    model = trained(kind)
    assert torch.equal(forecast(model, run, t), forecast(model, other, t))
    assert not torch.equal(forecast(model, run, t), forecast(model, run, t - 1))
    for baseline in BASELINES.values():
        assert torch.equal(baseline(run, t, HORIZONS), baseline(other, t, HORIZONS))


@pytest.mark.parametrize("kind", [*KINDS, "jump"])
def test_relabelled_neurons_permute_the_forecast_and_change_nothing_else(kind):
    run = trajectory()
    channels, hidden = torch.randperm(4), torch.randperm(6)

    def relabel(vectors: torch.Tensor) -> torch.Tensor:
        out = []
        for vector in vectors:
            state = run.layout.unflatten(vector)
            first = state["f1.weight"].view(6, 4, 4)[hidden][:, channels].reshape(6, 16)
            relabelled = {
                "c1.weight": state["c1.weight"][channels],
                "c1.bias": state["c1.bias"][channels],
                "f1.weight": first,
                "f1.bias": state["f1.bias"][hidden],
                "f2.weight": state["f2.weight"][:, hidden],
                "f2.bias": state["f2.bias"],
            }
            out.append(run.layout.flatten(relabelled))
        return torch.stack(out)

    other = Trajectory(run.layout, relabel(run.weights), relabel(run.state))
    model = trained(kind)
    torch.testing.assert_close(forecast(model, other, 12), relabel(forecast(model, run, 12)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_forecaster_says_no_change(kind):
    run = trajectory()
    model = untrained(kind)
    assert torch.equal(model.predict(run, 10), run.weights[10].expand(2, -1))


def test_an_untrained_jump_is_the_mean_of_the_last_snapshots():
    run = trajectory()
    mean = run.weights[12 - WINDOW : 13].mean(0)
    torch.testing.assert_close(untrained("jump").propose(run, 12), mean, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", [*KINDS, "jump"])
def test_the_history_that_is_kept_forecasts_like_the_whole_run(kind):
    run, t = trajectory(HISTORY + 20), HISTORY + 10
    kept = run.until(t)
    assert len(kept) == HISTORY + 1
    model = trained(kind)
    assert torch.equal(forecast(model, kept, len(kept) - 1), forecast(model, run, t))


def test_rolling_out_repeats_the_first_horizon():
    run, t = trajectory(), 12
    model = trained("transformer", with_state=False)
    path = roll_out(model, run, t, 3)
    assert torch.equal(path[0], model.predict(run, t)[0])
    longer = Trajectory(run.layout, torch.cat([run.weights[: t + 1], path[:1]]), None)
    torch.testing.assert_close(path[1], model.predict(longer, t + 1)[0])
    assert torch.equal(roll_out(untrained("mlp"), run, t, 2), run.weights[t].expand(2, -1))


def test_attention_without_keys_and_values_is_attention():
    """The block's short cut equals scaled dot-product attention of the summary's query over all tokens."""
    model, run = trained("transformer"), trajectory()
    features = read_features(run, 12, torch.arange(run.layout.size), **model.reads)
    tokens = torch.cat([model.token(features.tokens), model.static(features.static)[:, None]], 1) + model.position
    normed = model.norm(tokens)
    attended = scaled_dot_product_attention(model.query(normed[:, -1:]), normed, model.value(normed))[:, 0]
    summary = tokens[:, -1] + attended
    torch.testing.assert_close(model.summarise(features), summary + model.feed_forward(summary), rtol=1e-4, atol=1e-4)


def test_a_denoiser_leaves_what_has_no_noise():
    model, run = trained("diffusion"), trajectory()
    assert isinstance(model, DiffusionForecaster)
    features = read_features(run, 12, torch.arange(50), **model.reads)
    z = torch.randn(50, 2)
    clean = model.denoise(z, torch.full((50, 1), 1e-6), model.read(features))
    torch.testing.assert_close(clean, z, rtol=1e-4, atol=1e-4)


def test_a_diffusion_model_finds_the_mean_of_what_it_learns():
    """Movements that are 2 +- 0.5 whatever the features: the mean of its samples comes near 2, not 0."""
    model, run = untrained("diffusion"), trajectory()
    optimizer, random = torch.optim.Adam(model.parameters(), 1e-2), torch.Generator().manual_seed(0)
    features = read_features(run, 12, torch.arange(run.layout.size), **model.reads)
    for _ in range(150):
        target = (2 + 0.5 * torch.randn(run.layout.size, 2, generator=random)) * model.units
        loss = model.denoising_loss(features, target, random)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        assert ((model(features) / model.units).mean(0) - 2).abs().max() < 0.4


def test_features_do_not_depend_on_the_size_of_the_movement():
    """In its units a run that moves eight times as far, along directions eight times as large, looks the same."""
    run = trajectory()
    larger = Trajectory(run.layout, 8 * run.weights, 8 * run.state)
    index = torch.arange(run.layout.size)
    a, b = (read_features(r, 12, index, with_state=True, with_context=True).flat for r in (run, larger))
    torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    targets = [movement_target(r, 12, index, HORIZONS) for r in (run, larger)]
    torch.testing.assert_close(*targets, rtol=1e-3, atol=1e-4)


def test_neuron_means_are_those_of_rows_and_columns():
    run = trajectory()
    rows, columns = run.neuron_means(run.weights)
    row_of, column_of = run.neurons_of
    matrix = run.layout.unflatten(run.weights[3])["f1.weight"]
    where = run.layout.slices["f1.weight"]
    torch.testing.assert_close(rows[3, row_of[where]].view(6, 16), matrix.mean(1, keepdim=True).expand(6, 16))
    torch.testing.assert_close(columns[3, column_of[where]].view(6, 16), matrix.mean(0, keepdim=True).expand(6, 16))
    assert (rows[:, row_of[run.layout.slices["f1.bias"]]] == 0).all()


def test_ridge_finds_a_linear_rule():
    run = trajectory(40)
    model = RidgeForecaster((1,), with_state=False, with_context=False, n_layers=len(SHAPES))
    rule = torch.randn(model.flat_size, 1)
    random = torch.Generator().manual_seed(0)
    for t in range(WINDOW, 38):
        features = read_features(run, t, random_coordinates(run.layout, 400, random), **model.reads)
        model.observe(features, features.flat @ rule)
    model.solve(1e-9)
    features = read_features(run, 38, torch.arange(run.layout.size), **model.reads)
    torch.testing.assert_close(model(features), features.flat @ rule, rtol=1e-2, atol=1e-2)


def test_baselines_are_exact_where_they_should_be():
    layout = Layout({"w": (5, 7)})
    t = torch.arange(40.0)[:, None]
    start, slope, bend = torch.randn(3, 1, 35)
    straight = Trajectory(layout, start + slope * t, None)
    bent = Trajectory(layout, start + slope * t + 0.01 * bend * t**2, None)
    for run, name in ((straight, "linear"), (straight, "quadratic"), (bent, "quadratic")):
        truth = torch.stack([run.weights[20 + h] for h in HORIZONS])
        torch.testing.assert_close(BASELINES[name](run, 20, HORIZONS), truth, rtol=1e-3, atol=1e-3)
    turning = torch.cat([torch.cos(0.3 * t), torch.sin(0.3 * t)], 1) * 0.95**t  # a linear system
    run = Trajectory(Layout({"w": (2, 1)}), turning, None)
    ahead = BASELINES["dmd"](run, 35, (1,), rank=2, window=36)
    assert (ahead[0] - turning[36]).norm() < 0.2 * (turning[35] - turning[36]).norm() + 0.02


def test_origins_leave_every_horizon_known():
    found = origins(81, 20, 6)
    assert min(found) == WINDOW + 1
    assert max(found) + 20 < 81
    assert {phase for t, phase in found.items() if t < 40} == {"early"}


def test_too_early_and_missing_states_are_refused():
    run = trajectory()
    with pytest.raises(ValueError, match=f"snapshot of {WINDOW} or later"):
        read_features(run, WINDOW - 1, torch.arange(3), with_state=False, with_context=False)
    bare = Trajectory(run.layout, run.weights, None)
    with pytest.raises(ValueError, match="no optimiser's state"):
        read_features(bare, 12, torch.arange(3), with_state=True, with_context=False)
    trained("transformer", with_state=False).predict(bare, 12)
