"""Marks are of functions, not of weights; the consensus passes its own exam; kernel ridge leaves out exactly what it says."""

import copy
import hashlib
import json
import sys
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from reproduction import ROOT
from safetensors.torch import save_file
from small_networks import ask, relabelled, seeded, zoo_networks
from torch import nn
from torch.nn.functional import avg_pool2d

from stages.common.checkpoints import save_torch
from stages.common.stage import InputError
from stages.weightnet.as_classifier import adapted, as_classifier, how_given
from stages.weightnet.predict import describe_networks, load_known
from stages.weightnet.predictors.data import augmented
from stages.weightnet.predictors.exam import (
    AGREEMENT,
    PAPERS,
    READINGS,
    Exam,
    ExamParams,
    against_margin,
    agreement,
    asker,
    confidence,
    draw_by,
    draw_exam,
    jitter_of,
    mark,
    sit,
)
from stages.weightnet.predictors.examiner import Examiner, joined, load_examiner
from stages.weightnet.predictors.intervals import conformal_quantile
from stages.weightnet.predictors.kernel_ridge import fit_kernel_ridge, kernel, left_out_errors
from stages.weightnet.predictors.statistics import pooled_statistics, range_of_statistics, what_is_outside
from stages.weightnet.tracing.program import rescaled_input, run_stack
from stages.weightnet.user_networks import build_user_network
from stages.weightnet.zoo.architectures import ARCHITECTURES, build_network, zoo_program
from stages.weightnet.zoo.networks import Networks
from stages.weightnet.zoo.properties import PROPERTIES

PARAMS = ExamParams(
    inputs=24,
    grid=8,
    committees=2,
    members=4,
    better=0.5,
    steps=[4, 8],
    rate=0.2,
    jitter=0.3,
    decay=0.02,
    noise=0.8,
    attack=0.2,
    drawings=1,
)


def in_float32(networks: Networks) -> Networks:
    return replace(networks, weights={name: tensor.float() for name, tensor in networks.weights.items()})


def some(networks: Networks, places: torch.Tensor) -> Networks:
    weights = {name: tensor[places] for name, tensor in networks.weights.items()}
    return replace(networks, weights=weights, tanh=networks.tanh[places])


def draw(networks: Networks, start: torch.Tensor, labels: torch.Tensor, params: ExamParams = PARAMS) -> torch.Tensor:
    jitter = jitter_of(start, sorted(params.steps), seeded())
    return draw_by([[networks]], start[None], labels[None], [noise[None] for noise in jitter], params)[0]


def exam_by(networks: Networks, drawing: int = 0) -> Exam:
    single = in_float32(networks)
    return draw_exam(lambda places: [some(single, places)], len(networks), PARAMS, drawing)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_relabelled_and_rescaled_networks_get_the_same_marks_and_others_do_not(name):
    networks = zoo_networks(name, 8)
    exam = exam_by(networks)
    marks = mark(exam, networks)
    assert marks.shape[:2] == (8, len(PAPERS))
    spread = marks.std(0) + 1e-3
    for same in (relabelled(networks), augmented(networks, 0.3, seeded())):
        assert not torch.equal(next(iter(same.weights.values())), next(iter(networks.weights.values())))
        assert ((mark(exam, same) - marks).abs() / spread).max() < 1e-7
    other = replace(networks, weights={k: v.roll(1, -1) if v.dim() > 2 else v for k, v in networks.weights.items()})
    assert ((mark(exam, other) - marks).abs() / spread).max() > 0.1


def test_a_module_gets_the_marks_of_its_program():
    model = build_network("lenet", 1, 10, 8).eval()
    networks = zoo_networks("lenet", 1)
    weights = {name: model.state_dict()[name][None] for name in networks.weights}
    exam = exam_by(zoo_networks("cnn3", 8))
    marks = mark(exam, replace(networks, weights=weights, tanh=torch.tensor([False])))
    torch.testing.assert_close(mark(exam, model), marks, rtol=1e-3, atol=1e-3)


def test_drawn_inputs_are_taken_for_their_labels_the_more_surely_the_more_steps():
    networks = in_float32(zoo_networks("cnn3", 4))
    labels, start = torch.arange(20) % 10, torch.randn(20, 1, 8, 8, generator=seeded())

    def sureness(inputs: torch.Tensor) -> torch.Tensor:
        logits = run_stack(networks.program, networks.weights, inputs, networks.tanh)
        return logits.log_softmax(-1)[:, torch.arange(20), labels].mean(0)

    drawn = draw(networks, start, labels)
    gained = sureness(drawn) - sureness(start)
    assert gained[:10].mean() > 0  # few steps
    assert gained[10:].mean() > gained[:10].mean()


def test_a_part_that_has_stopped_stays_where_it_is():
    networks, labels = in_float32(zoo_networks("cnn3", 4)), torch.arange(20) % 10
    start = torch.randn(20, 1, 8, 8, generator=seeded())
    longer = PARAMS.model_copy(update={"steps": [4, 12], "jitter": 0.0})
    short = PARAMS.model_copy(update={"steps": [4, 4], "jitter": 0.0})
    both = [draw(networks, start, labels, params) for params in (longer, short)]
    torch.testing.assert_close(both[0][:10], both[1][:10])
    assert not torch.allclose(both[0][10:], both[1][10:])


def test_committees_draw_side_by_side_what_they_draw_one_after_the_other():
    zoos = [in_float32(zoo_networks(name, 6)) for name in ("cnn3", "residual")]
    zoos = [replace(some, tanh=torch.arange(6) % 2 == 0) for some in zoos]

    def choose(places: torch.Tensor) -> list[Networks]:
        chosen = [(zoo, places[places % 2 == kind] // 2) for kind, zoo in enumerate(zoos)]
        return [zoo.subset(own) for zoo, own in chosen if len(own)]

    alone, together = (draw_exam(choose, 12, PARAMS, 0, committees) for committees in (1, 2))
    torch.testing.assert_close(together.inputs, alone.inputs, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(together.consensus, alone.consensus, rtol=1e-3, atol=1e-4)
    other = draw_exam(choose, 12, PARAMS.model_copy(update={"committees": 1}), 0)
    assert not torch.allclose(other.inputs, alone.inputs, atol=0.1)


def test_the_consensus_of_alike_networks_is_their_answer_and_they_pass():
    one = zoo_networks("cnn3", 1)
    alike = some(one, torch.zeros(6, dtype=torch.long))
    exam = exam_by(alike)
    torch.testing.assert_close(exam.consensus[0], sit(exam, in_float32(one))[0, 0].softmax(-1), rtol=1e-4, atol=1e-5)
    assert (mark(exam, one)[0, [0, 3, 4], 0] == 1).all()  # all right, where the consensus is of the same inputs


def test_marks_say_right_and_sure():
    key = torch.eye(10).repeat(3, 1)
    sure, wrong = 50 * key[None], 50 * key.roll(1, 1)[None]
    assert agreement(sure, key)[0, :4].tolist() == pytest.approx([1, 0, 0, 0], abs=1e-5)
    assert agreement(wrong, key)[0, :4].tolist() == pytest.approx([0, -12, 2, 1], abs=1e-5)
    assert agreement(sure, key).shape[1] == AGREEMENT
    mixed, told = confidence(sure)[0, :2].tolist()
    assert mixed == told == pytest.approx(torch.tensor(10.0).log().item(), abs=1e-4)  # inputs tell all of answers
    assert confidence(torch.zeros(1, 30, 10))[0, 1].item() == pytest.approx(0, abs=1e-5)  # they tell nothing
    assert torch.equal(confidence(sure), confidence(wrong))  # whatever they say


def test_a_step_against_the_margin_lowers_it():
    networks = zoo_networks("residual", 3)
    inputs = torch.randn(3, 20, 1, 8, 8, generator=seeded()).double()
    run = asker(networks)
    logits, moved = against_margin(run, inputs, 1e-3)
    torch.testing.assert_close((moved - inputs).abs(), torch.full_like(moved, 1e-3))

    def margins(values: torch.Tensor) -> torch.Tensor:
        first, second = values.topk(2, -1).values.unbind(-1)
        return (first - second).mean(1)

    assert (margins(run(moved)) < margins(logits)).all()


def test_drawings_differ_and_a_drawing_is_the_same_again():
    networks = zoo_networks("cnn3", 6)
    first, again, other = exam_by(networks), exam_by(networks), exam_by(networks, 1)
    assert torch.equal(first.inputs, again.inputs) and torch.equal(first.consensus, again.consensus)
    assert not torch.isclose(first.inputs, other.inputs).any(-1).all()


def test_parts_of_the_marks_are_what_they_are_called():
    marks = torch.arange(2 * 5 * 35.0).view(2, 5, 35)
    assert READINGS["one_number"](marks).shape == (2, 1)
    assert READINGS["no_consensus"](marks).shape == (2, 5 * (35 - AGREEMENT))
    for name, paper in (("drawn_only", "drawn"), ("glyphs_only", "glyphs"), ("noise_only", "noise")):
        assert torch.equal(READINGS[name](marks), marks[:, PAPERS.index(paper)])


def toy(n: int = 40) -> tuple[torch.Tensor, torch.Tensor]:
    x = torch.randn(n, 5, generator=seeded()).double()
    y = torch.stack([x[:, 0].sin() + 0.1 * x[:, 1], x[:, 2] ** 2], 1)
    return x, y + 0.1 * torch.randn(n, 2, generator=seeded(1))


def test_errors_left_out_are_those_of_learning_again_without_each_network():
    x, y = toy()
    y, matrix, penalty = y - y.mean(0), kernel(x, x, 1.0), 0.1
    _, errors = left_out_errors(*torch.linalg.eigh(matrix), y, penalty)
    for i in (0, 7, 39):
        rest = [j for j in range(40) if j != i]
        part = matrix[rest][:, rest] + penalty * torch.eye(39)
        torch.testing.assert_close(y[i] - matrix[i, rest] @ torch.linalg.solve(part, y[rest]), errors[i])


def test_kernel_ridge_solves_its_equation_and_is_less_certain_far_away():
    x, y = toy()
    ridge = fit_kernel_ridge(x, y)
    for k, (length, penalty) in enumerate(ridge.settings.tolist()):
        matrix = kernel(ridge.known, ridge.known, length) + penalty * torch.eye(40)
        torch.testing.assert_close(matrix @ ridge.alpha[:, k], y[:, k] - y[:, k].mean())
    near, far = ridge.deviation(x), ridge.deviation(x + 3)
    assert (far.mean(0) > near.mean(0)).all()
    assert (near >= ridge.settings[:, 1].sqrt() - 1e-9).all()  # the noise stays
    assert ((ridge.predict(x) - y).square().mean(0) < 0.5 * y.var(0)).all()


def test_weighted_quantiles_count_by_weight():
    errors = torch.tensor([[1.0], [2.0], [3.0]]).repeat(100, 1)
    assert conformal_quantile(errors).item() == 3
    few = torch.tensor([0.45, 0.5, 0.05]).repeat(100)
    assert conformal_quantile(errors, few).item() == 2
    assert conformal_quantile(-errors, few).item() == 2


def test_a_join_takes_from_each_what_it_tells():
    truth = torch.randn(400, 2, generator=seeded()).double()
    noise = torch.randn(400, 2, generator=seeded(1)).double()
    prediction, image = truth + noise, (truth[:, 0] + noise[:, 1]).sigmoid()
    _, test = joined((prediction[:200], prediction[200:]), (image[:200], image[200:]), truth[:200])
    error = (test - truth[200:]).square().mean(0)
    assert error[0] < 0.8 * (prediction[200:] - truth[200:]).square().mean(0)[0]


def test_what_is_unlike_is_named():
    networks = zoo_networks("cnn3", 12)
    ranges = range_of_statistics(pooled_statistics(networks))
    assert what_is_outside(pooled_statistics(networks)[0], ranges) == []
    wild = dict(networks.weights)
    first = next(iter(wild))
    wild[first] = 30 * wild[first]
    (found,) = what_is_outside(pooled_statistics(replace(networks, weights=wild))[0], ranges)
    assert found.startswith("weights of the first layer: ")
    deeper = zoo_networks("cnn4", 1)
    assert any(
        said.startswith("layers with weights: 5, the zoo's 4 to 4")
        for said in what_is_outside(pooled_statistics(deeper)[0], ranges)
    )


def keep_exam(project, where: str = "models/train_weightnet/digits-exam/predictors.pt") -> Examiner:
    """Write an examiner as train_weightnet keeps it, whose networks were never trained."""
    networks = in_float32(zoo_networks("cnn3", 24))
    exam = exam_by(networks)
    marks = mark(exam, networks).flatten(1)
    targets = torch.randn(24, len(PROPERTIES), generator=seeded())
    scale = {f"target_{k}": f(len(PROPERTIES)) for k, f in (("mean", torch.zeros), ("std", torch.ones))}
    errors, names = torch.randn(20, len(PROPERTIES), generator=seeded(1)), [f"cnn3-{i}" for i in range(24)]
    parts = (scale, errors, 2 * errors, torch.ones(20), names, targets, torch.zeros(PARAMS.inputs))
    examiner = Examiner(exam, fit_kernel_ridge(marks, targets), *parts)
    zoo = {
        "input_shape": [1, 8, 8],
        "classes": 10,
        "ranges": range_of_statistics(pooled_statistics(networks)),
    }
    save_torch(project / where, {"exam": examiner.state() | zoo})
    return examiner


def test_a_kept_examiner_says_the_same(project):
    examiner = keep_exam(project)
    again = load_examiner(examiner.state())
    networks = zoo_networks("flat", 3)
    torch.testing.assert_close(again.intervals(networks), examiner.intervals(networks), rtol=1e-4, atol=1e-4)
    low, center, high = again.intervals(networks)
    assert ((low < center) & (center < high)).all()
    assert (again.half_width(familiar=True) < again.half_width(familiar=False)).all()


def test_a_zoo_s_networks_are_uncertain_as_if_their_own_architectures_were_not_known(project):
    one = keep_exam(project)
    assert torch.equal(one.uncertain, replace(one, weights=torch.full((24,), 1.0)).uncertain)  # each left out by itself
    several = replace(one, weights=torch.full((24,), 1 / 12, dtype=torch.float64))
    own = one.ridge.deviation_at(one.inputs)[:, one.skill]
    assert (own < one.uncertain).all() and (one.uncertain < several.uncertain + 1e-9).all()  # more networks tell more
    moved = one.inputs.clone()
    moved[0] += 0.5
    changed = replace(several, ridge=replace(one.ridge, known=moved)).uncertain != several.uncertain
    assert not changed[1:12].any() and changed[12:].all()
    assert several.unlike(one.inputs[:1]) == 0 and several.unlike(one.inputs[:1] + 100) == 1


def test_a_network_of_other_pixels_gets_the_marks_of_the_same_network_on_the_zoo_s():
    networks, (mean, std) = zoo_networks("flat", 2), (-0.7386, 0.6162)
    exam = exam_by(zoo_networks("cnn3", 8))
    other = replace(
        networks, program=rescaled_input(networks.program, -mean / std, 1 / std)
    )  # it learned pixels of this mean
    back = replace(other, program=rescaled_input(other.program, mean, std))
    torch.testing.assert_close(mark(exam, back), mark(exam, networks))


def test_a_user_s_network_sits_the_exam_and_its_relabelling_gets_the_same_answer(project, monkeypatch, capsys):
    keep_exam(project)
    networks = zoo_networks("residual", 1)
    for name, one in (("a", networks), ("b", relabelled(networks))):
        save_file({k: v[0].float().contiguous() for k, v in one.weights.items()}, project / f"{name}.safetensors")
    answer = ask(monkeypatch, capsys, ".", "--arch", "residual", "--allow-probe")
    assert answer["predictor"] == "exam" and answer["learned_from"] == 24
    assert set(answer["ranking"]) == set(answer["networks"])
    first, second = answer["networks"].values()
    for name, found in first["properties"].items():
        assert found["value"] == pytest.approx(second["properties"][name]["value"], rel=1e-3, abs=1e-3)
    assert len(first["nearest"]) == 3 and first["trusted"] == (first["unlike"] <= 0.95)


def test_the_released_exam_answers_where_nothing_was_trained_and_says_so(project, monkeypatch, capsys):
    keep_exam(project, "models/released/digits-exam.pt")
    save_file(build_network("cnn3", 1, 10, 8).state_dict(), project / "a.safetensors")
    words = ("a.safetensors", "--arch", "cnn3", "--allow-probe")
    assert ask(monkeypatch, capsys, *words)["file"] == "models/released/digits-exam.pt"
    keep_exam(project)
    assert ask(monkeypatch, capsys, *words)["file"] == "models/train_weightnet/digits-exam/predictors.pt"
    with pytest.raises(InputError, match=r"no predictor of a zoo of cifar10 is there \(there: digits\)"):
        ask(monkeypatch, capsys, *words, "--dataset", "cifar10")


def test_the_exam_needs_the_zoo_s_classes_and_images(project, monkeypatch, capsys):
    keep_exam(project)
    layers = [{"kind": "Flatten"}, {"kind": "Linear", "in_features": 64, "out_features": 8}, {"kind": "ReLU"}]
    layers += [{"kind": "Linear", "in_features": 8, "out_features": 5}]
    (project / "spec.json").write_text(json.dumps({"layers": layers}))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 5))
    save_file(network.state_dict(), project / "a.safetensors")
    words = ("a.safetensors", "--arch", "spec.json", "--allow-probe")
    with pytest.raises(InputError, match="the exam is in the zoo's 10 classes, not 5: leave --allow-probe out"):
        ask(monkeypatch, capsys, *words, "--dataset", "digits")
    with pytest.raises(InputError, match=r"cannot run on images \[1, 28, 28\] .* is that their shape"):
        ask(monkeypatch, capsys, *words, "--dataset", "digits", "--input-shape", "1", "28", "28")
    with pytest.raises(
        InputError, match=r"gives no logits for the images of a zoo \(digits 1x8x8, 10 classes.*\): say"
    ):
        ask(monkeypatch, capsys, *words)


class Sorted(nn.Module):
    """Steps that no tracer follows: rows of pixels are sorted by their sums."""

    def __init__(self, soft: bool = False) -> None:
        super().__init__()
        self.head, self.soft = nn.Linear(64, 10), soft

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        rows = x[:, 0].sort(1).values.flatten(1)
        return self.head(rows).softmax(1) if self.soft else self.head(rows)


def test_a_network_that_cannot_be_followed_is_judged_by_its_outputs(project, monkeypatch, capsys):
    examiner = keep_exam(project)
    module = Sorted().eval()
    save_file(module.state_dict(), project / "a.safetensors")
    words = ("a.safetensors", "--arch", "mine:build", "--allow-probe", "--allow-code")
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(build=Sorted))
    (result,) = ask(monkeypatch, capsys, *words)["networks"].values()
    expected = examiner.intervals(module)[1, 0, 0].clamp(0, 1).item()
    assert result["properties"]["test_acc"]["value"] == pytest.approx(expected, rel=1e-3)
    assert "its steps cannot be followed: judged by its outputs alone" in result["notes"]
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(build=lambda: Sorted(soft=True)))
    (soft,) = ask(monkeypatch, capsys, *words)["networks"].values()
    assert "its outputs are probabilities: their logarithms were taken for logits" in soft["notes"]
    for name, found in result["properties"].items():
        assert soft["properties"][name]["value"] == pytest.approx(found["value"], rel=1e-3, abs=1e-3)
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(build=lambda: nn.Sequential(Sorted(), nn.Linear(10, 10))))
    with pytest.raises(InputError, match=r"has no 0.head.weight"):
        ask(monkeypatch, capsys, *words)


class Answers(nn.Module):
    """A small network with a choice of what it takes and returns."""

    def __init__(self, takes=lambda x: x, returns=lambda y: y, inputs=64) -> None:
        super().__init__()
        self.body, self.takes, self.returns = (
            nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, 10)),
            takes,
            returns,
        )

    def forward(self, x: torch.Tensor):
        return self.returns(self.body(self.takes(x)))


def of_colours(x: torch.Tensor) -> torch.Tensor:
    assert x.shape[1:] == (3, 8, 8)
    return x.mean(1).flatten(1)


FLAT = partial(torch.flatten, start_dim=1)
with torch.random.fork_rng(devices=[]):
    torch.manual_seed(0)
    PLAIN = Answers(FLAT)
OTHERS = {  # the same function of the zoo's images, as people write it: all have the weights of PLAIN
    "a network itself": PLAIN,
    "flat": Answers(),
    "rows": Answers(lambda x: x.reshape(len(x), 64) if x.dim() == 3 else x[:, :, :, :, 0]),
    "colours": Answers(of_colours),
    "with features": Answers(FLAT, lambda y: (y, y.new_ones(len(y), 7))),
    "features first": Answers(FLAT, lambda y: [y.new_ones(len(y), 7), y]),
    "with a loss": Answers(FLAT, lambda y: (y, None)),
    "mapping": Answers(FLAT, lambda y: {"features": y + 1, "logits": y}),
    "object": Answers(FLAT, lambda y: SimpleNamespace(logits=y)),
    "one pixel": Answers(FLAT, lambda y: y[:, :, None, None]),
    "log-probabilities": Answers(FLAT, lambda y: y.log_softmax(1)),
    "probabilities": Answers(FLAT, lambda y: y.softmax(1)),
    "exponentials": Answers(FLAT, lambda y: y.log_softmax(1).exp()),
    "by hand": Answers(
        FLAT, lambda y: (y - y.amax(1, keepdim=True)).exp() / (y - y.amax(1, keepdim=True)).exp().sum(1, keepdim=True)
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_a_network_takes_and_returns_is_no_matter(project, monkeypatch, capsys, name):
    keep_exam(project)
    save_file(PLAIN.state_dict(), project / "a.safetensors")
    found = []
    for build in (
        lambda: Answers(FLAT),
        OTHERS[name] if OTHERS[name] is PLAIN else lambda: copy.deepcopy(OTHERS[name]),
    ):
        monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(build=build))
        answer = ask(monkeypatch, capsys, "a.safetensors", "--arch", "mine:build", "--allow-probe", "--allow-code")
        found.append(answer["networks"]["a.safetensors"])
    for key, value in found[0]["properties"].items():
        assert value["value"] == pytest.approx(found[1]["properties"][key]["value"], rel=1e-3, abs=1e-3)
    given = [note for note in found[1]["notes"] if note.startswith("images are given to it as")]
    assert len(given) == (name in ("flat", "rows", "colours"))


def test_a_resized_image_is_torchvision_s_and_the_first_fitting_shape_is_taken():
    images, module = torch.randn(2, 1, 8, 8), Answers(FLAT, inputs=3 * 32 * 32)
    assert as_classifier(module, (1, 8, 8), 10)(images).shape == (2, 10)
    assert how_given(module, (1, 8, 8)) == [
        "images are given to it as 3x32x32, the zoo's are 1x8x8: --input-shape says otherwise"
    ]
    assert torch.equal(adapted(images, (3, 8, 8)), images.repeat(1, 3, 1, 1)) and torch.equal(
        adapted(images, (64,)), images.flatten(1)
    )
    constant = torch.full((2, 3, 8, 8), 0.5)
    for takes in ((1, 5, 5), (3, 19, 19), (19, 19)):
        assert torch.allclose(adapted(constant, takes), torch.tensor(0.5)) and adapted(images, takes).shape == (
            2,
            *takes,
        )
    with pytest.raises(
        InputError, match="images of 64 cannot be given as 63: expected C H W, H W, or as many numbers in a row"
    ):
        adapted(images, (63,))


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (
            lambda y: (y, y + 1),
            "it returns a tuple of .10., .10. for an image: expected a tensor of one number for each class",
        ),
        (lambda y: {"a": y, "b": 2 * y}, "it returns a dict of .10., .10. for an image"),
    ],
)
def test_several_logits_are_refused(build, message):
    with pytest.raises(InputError, match=message):
        as_classifier(Answers(FLAT, build), (1, 8, 8), 10)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            lambda width: nn.Linear(width, 1),
            r"mine:build is called without arguments \(.*'width'.*\): give them defaults",
        ),
        (lambda: 3, "mine:build is a int: expected a torch.nn.Module"),
    ],
)
def test_code_that_makes_no_network_is_told_so(monkeypatch, made, message):
    monkeypatch.setitem(sys.modules, "mine", SimpleNamespace(build=made))
    with pytest.raises(InputError, match=message):
        build_user_network("mine:build", (1, 8, 8), 10, True)


def test_code_may_be_named_by_its_file(tmp_path, monkeypatch):
    (tmp_path / "their_network.py").write_text("from torch import nn\nnet = nn.Linear(3, 2)\n")
    monkeypatch.setattr(sys, "path", list(sys.path))
    assert build_user_network(f"{tmp_path}/their_network.py:net", (1, 8, 8), 10, True).in_features == 3


@pytest.mark.parametrize(
    ("name", "side"), [("digits-exam", 8), ("digits-weightnet", 8), ("mnist-exam", 28), ("fashion_mnist-exam", 28)]
)
def test_a_released_predictor_is_as_small_as_it_says_and_answers(name, side):
    card = json.loads((ROOT / f"models/released/{name}.json").read_text())
    path, family = ROOT / "models/released" / card["file"], name.rpartition("-")[2]
    assert hashlib.sha256(path.read_bytes()).hexdigest() == card["sha256"]
    assert path.stat().st_size < 1.5e6
    known = load_known(path, family)
    assert known.dataset == name.removesuffix(f"-{family}")
    assert card["learned_from"].startswith(f"{len(known.predictor.names)} networks")
    assert known.shape == (1, side, side) and known.classes == 10
    networks = in_float32(zoo_networks("cnn3", 1))  # weights as no training leaves them
    program, symmetry = zoo_program("cnn3", 1, 10, side)
    result = describe_networks(known, replace(networks, program=program, symmetry=symmetry))
    assert set(result["properties"]) == set(PROPERTIES)
    assert result["properties"]["test_acc"]["value"] < 0.5 or not result["trusted"]


def test_inputs_on_a_coarse_grid_are_smooth():
    networks, labels = in_float32(zoo_networks("cnn3", 4)), torch.arange(20) % 10
    start = torch.randn(20, 1, 4, 4, generator=seeded())
    drawn = draw(networks, start, labels)
    assert drawn.shape == (20, 1, 8, 8)
    coarse = avg_pool2d(drawn, 2)  # what varies between neighbours is a small part of what varies between cells
    fine = drawn - coarse.repeat_interleave(2, 2).repeat_interleave(2, 3)
    noise = torch.randn(20, 1, 8, 8, generator=seeded())
    rough = noise - avg_pool2d(noise, 2).repeat_interleave(2, 2).repeat_interleave(2, 3)
    assert fine.var() / drawn.var() < 0.3 < rough.var() / noise.var()
