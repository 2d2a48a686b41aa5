"""Networks that train in a stack train as they would alone."""

from dataclasses import replace

import pytest
import torch
import yaml
from benchmark_zoo import train_alone
from reproduction import ROOT
from small_networks import RECIPE, SHAPE, Normed, build, seeded, training_data
from torch import nn
from torch.nn.functional import cross_entropy
from torch.optim.lr_scheduler import CosineAnnealingLR, StepLR

from stages.weightnet.tracing.program import trace
from stages.weightnet.zoo.architectures import ARCHITECTURES, zoo_program
from stages.weightnet.zoo.runs import draw_all, draw_run, draw_tensor, fit_to, learning_rates, pick
from stages.weightnet.zoo.training import shift, train_stack


@pytest.mark.parametrize("kind", [*ARCHITECTURES, Normed])
def test_a_stack_trains_as_torch_s_optimisers_train_each_alone(kind):
    images, labels = training_data()
    program = trace(build(kind), (1, 8, 8))
    drawn = [draw_run(f"it-{i}", 0, RECIPE) for i in range(4)]
    runs = [replace(run, dropout=0.0, tanh=False, sgd=i % 2 == 1) for i, run in enumerate(drawn)]
    assert len({run.steps for run in runs}) > 1
    stacked = train_stack(program, runs, images, labels)
    for i, run in enumerate(runs):
        model = train_alone(build(kind), run, program, images, labels)
        final = program.layout.unflatten(stacked[i, 2:3])
        for name, expected in model.state_dict().items():
            if expected.is_floating_point():
                torch.testing.assert_close(final[name][0], expected, rtol=1e-9, atol=1e-11)


def test_what_a_network_has_no_place_for_is_not_drawn():
    drawn = replace(draw_run("it-0", 0, RECIPE), tanh=True, dropout=0.3)
    for kind, expected in {"cnn3": (True, 0.3), "resnet18": (True, 0.0), "mobilenet_v2": (False, 0.3)}.items():
        run = fit_to(drawn, zoo_program(kind, *SHAPE)[0], 100)
        assert (run.tanh, run.dropout) == expected, kind


def test_a_run_does_not_depend_on_the_others_of_its_stack():
    images, labels = training_data()
    program, _ = zoo_program("cnn3", *SHAPE)
    runs = [draw_run(f"cnn3-{i}", 0, RECIPE) for i in range(6)]
    assert {bool(run.dropout) for run in runs} == {run.tanh for run in runs} == {False, True}
    together = train_stack(program, runs, images, labels)
    for i, run in enumerate(runs):
        alone = train_stack(program, [run], images, labels)[0]
        torch.testing.assert_close(together[i], alone, rtol=1e-9, atol=1e-11)
        torch.testing.assert_close(alone[0], draw_all(run, program, labels).weights.double())


WORLD = RECIPE.model_copy(
    update={
        "optimizers": ["sgd", "adam", "adamw"],
        "momenta": [0.0, 0.5, 0.9],
        "schedules": ["constant", "cosine", "step"],
    }
    | {"inits": ["he", "torch", "xavier", "orthogonal"], "shifts": [0, 2], "least_epochs": [0, 3]}
)


def test_choices_of_the_world_leave_the_other_draws_as_they_are():
    for name in ("cnn3-0", "flat-7"):
        plain, drawn = (
            draw_run(name, 3, RECIPE),
            draw_run(name, 3, WORLD.model_copy(update={"optimizers": RECIPE.optimizers})),
        )
        same = ("tanh", "sgd", "learning_rate", "weight_decay", "init_scale", "label_noise", "dropout", "steps")
        assert [getattr(plain, key) for key in same] == [getattr(drawn, key) for key in same]
    default = yaml.safe_load((ROOT / "params.yaml").read_text())["build_zoo"]["recipe"]
    plain = draw_run("cnn3-0", 0, RECIPE.model_validate(default))
    assert plain.config == "07efdab866a0"  # of the zoo that predictors are released of
    assert {pick(["a", "b"], u) for u in (0.0, 0.499)} == {"a"} and pick(["a", "b"], 0.999) == "b"


@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
@pytest.mark.parametrize("schedule", ["constant", "cosine", "step"])
def test_optimisers_and_schedules_are_those_of_torch(optimizer, schedule):
    images, labels = training_data()
    program, _ = zoo_program("flat", *SHAPE)
    changes = {"sgd": optimizer == "sgd", "adamw": optimizer == "adamw", "schedule": schedule, "momentum": 0.5}
    run = replace(draw_run("it-0", 0, RECIPE), dropout=0.0, tanh=False, steps=9, weight_decay=0.1, **changes)
    draws = draw_all(run, program, labels)
    model = build("flat").double().eval()
    model.load_state_dict({k: v[0].double() for k, v in program.layout.unflatten(draws.weights[None]).items()})
    options = {"lr": run.learning_rate, "weight_decay": 0.1}
    kinds = {"sgd": torch.optim.SGD, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
    theirs = kinds[optimizer](model.parameters(), **options | ({"momentum": 0.5} if optimizer == "sgd" else {}))
    scheduler = {"cosine": lambda: CosineAnnealingLR(theirs, 9), "step": lambda: StepLR(theirs, 3)}.get(
        schedule, lambda: None
    )()
    for batch in draws.batches:
        theirs.zero_grad()
        cross_entropy(model(images[draws.images[batch]]), draws.labels[batch]).backward()
        theirs.step()
        if scheduler:
            scheduler.step()
    final = program.layout.unflatten(train_stack(program, [run], images, labels)[:, 2])
    for name, expected in model.state_dict().items():
        torch.testing.assert_close(final[name][0], expected, rtol=1e-9, atol=1e-11)
    assert len(learning_rates(run)) == 9


@pytest.mark.parametrize("layer", [nn.Conv2d(16, 32, 5), nn.Linear(300, 200)])
def test_first_weights_have_the_moments_of_torch_s_own(layer):
    shapes = {name: tuple(value.shape) for name, value in layer.state_dict().items()}
    filled = {
        "torch": lambda w: w,
        "he": lambda w: nn.init.kaiming_normal_(w),
        "xavier": lambda w: nn.init.xavier_uniform_(w),
        "orthogonal": lambda w: nn.init.orthogonal_(w),
    }
    torch.manual_seed(0)
    for init, fill in filled.items():
        run = replace(draw_run("it-0", 0, WORLD), init=init, init_scale=1.0)
        weight, bias = (draw_tensor(run, name, shapes, seeded()) for name in ("weight", "bias"))
        expected = fill(layer.weight.detach().clone())
        for power in (2, 4):
            assert weight.pow(power).mean().item() == pytest.approx(expected.pow(power).mean().item(), rel=0.05), init
        top = layer.bias.abs().max().item() if init == "torch" else 0.0
        assert bias.abs().max().item() == pytest.approx(top, rel=0.1), init


def test_images_are_moved_around_their_edges_each_by_its_own_pixels():
    images, moves = torch.randn(2, 3, 1, 5, 5), torch.randint(-2, 3, (2, 3, 2))
    for i in range(2):
        for j in range(3):
            assert torch.equal(shift(images, moves)[i, j], images[i, j].roll(moves[i, j].tolist(), (1, 2)))


def test_a_run_of_the_world_does_not_depend_on_its_stack_and_is_as_long_as_its_epochs():
    images, labels = training_data()
    program, _ = zoo_program("flat", *SHAPE)
    runs = [fit_to(draw_run(f"flat-{i}", 0, WORLD), program, len(labels)) for i in range(8)]
    assert {run.shift for run in runs} == {0, 2} and len({run.init for run in runs}) > 1
    assert all(run.steps * run.batch_size >= run.epochs * round(run.train_fraction * len(labels)) for run in runs)
    together = train_stack(program, runs, images, labels)
    for i, run in enumerate(runs):
        torch.testing.assert_close(together[i], train_stack(program, [run], images, labels)[0], rtol=1e-9, atol=1e-11)
