"""Networks that train in a stack train as they would alone."""

from dataclasses import replace

import pytest
import torch
from benchmark_zoo import train_alone
from small_networks import RECIPE, SHAPE, Normed, build, training_data

from stages.weightnet.tracing.program import trace
from stages.weightnet.zoo.architectures import ARCHITECTURES, zoo_program
from stages.weightnet.zoo.runs import draw_all, draw_run, fit_to
from stages.weightnet.zoo.training import train_stack


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
        run = fit_to(drawn, zoo_program(kind, *SHAPE)[0])
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
