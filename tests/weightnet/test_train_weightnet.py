"""How predictors are trained, and what is kept of them."""

import shutil
from dataclasses import replace

import pytest
import torch
from reproduction import set_params
from running import start
from small_networks import member, seeded, select

from stages.common.stage import InputError
from stages.datasets import fetch_data
from stages.weightnet import build_zoo, train_weightnet
from stages.weightnet.predictors.data import hyperparameters, prepare, statistics_of
from stages.weightnet.predictors.ensemble import Ensemble
from stages.weightnet.predictors.intervals import conformal_quantile
from stages.weightnet.predictors.splits import ALL, Task, split_zoos
from stages.weightnet.predictors.targets import from_scale
from stages.weightnet.train_weightnet import Fitting, Job, train_and_predict
from stages.weightnet.train_weightnet import Params as TrainParams
from stages.weightnet.zoo.properties import PROPERTIES


def settings_of(params: TrainParams) -> tuple:
    """What train_and_predict takes from a stage's params."""
    fractions = (params.validation_fraction, params.test_fraction)
    return Fitting.of(params), fractions, params.snapshots, params.tasks.main, params.seed


@pytest.mark.parametrize("n", [9, 16, 27])
def test_intervals_hold_as_many_new_networks_as_they_say(n):
    """Errors of validation networks and of a new one are alike: the new one's is among the smallest 90 % as often as that."""
    errors = torch.rand(n, 100_000, generator=seeded())
    held = (torch.rand(100_000, generator=seeded(1)) <= conformal_quantile(errors)).double().mean().item()
    assert 0.9 - 0.005 < held < 0.9 + 1 / (n + 1) + 0.005


def test_several_predictors_predict_their_mean_from_first_weights_of_their_own(built):
    zoos = {"cnn3": select(built.zoo, (built.zoo.run < 48).nonzero()[:, 0])}
    params = TrainParams.load("train_weightnet", "digits", "baselines")
    task, statistics = Task(["cnn3"], ["cnn3"], seeds=2), {("cnn3", True): statistics_of(zoos["cnn3"], True)}
    job = Job("it", member("stats"), ALL, task, 0)
    result = train_and_predict(job, zoos, statistics, *settings_of(params))
    fractions = (params.validation_fraction, params.test_fraction)
    split = split_zoos(zoos, ["cnn3"], ["cnn3"], fractions, params.snapshots, 1.0, params.seed)
    data = prepare(zoos, split, "stats", statistics, pooled=True)
    fitting = Fitting.of(params)
    models = [train_weightnet.train_predictor(job, number, data, fitting, params.seed)[0] for number in range(2)]
    alone = torch.stack([train_weightnet.predict([model], data, split.test) for model in models])
    assert (alone[0] - alone[1]).abs().min() > 0
    mean = from_scale(alone.mean(0) * data.scale["target_std"] + data.scale["target_mean"])
    (table,) = (table for table in result["tables"] if table["part"] == "test")
    torch.testing.assert_close(table["values"][1], mean)
    networks = zoos["cnn3"].networks(split.test["cnn3"])
    parts = (result["kept"]["errors"], data.inputs["cnn3"], data.names, data.targets["cnn3"])
    kept = Ensemble(models, data.scale, *parts)
    torch.testing.assert_close(kept.standardised(networks), alone.mean(0))
    low, center, high = kept.intervals(networks)
    torch.testing.assert_close(center, mean)
    assert ((low < center) & (center < high)).all()
    torch.testing.assert_close(torch.stack([low, center, high]), table["values"])


def test_large_networks_are_read_and_learnt_from_in_parts_as_if_at_once(built, monkeypatch):
    zoo = select(built.zoo, (built.zoo.run < 32).nonzero()[:, 0])
    params = TrainParams.load("train_weightnet", "digits", "weightnet")
    task = Task(["cnn3"], ["cnn3"], pooled=False)
    job = Job("it", member("weightnet", augment=False), "cnn3", task, 0)
    found = []
    for most in (1 << 22, 2100):  # all at once; 3 at a time
        monkeypatch.setattr("stages.weightnet.zoo.reading.MOST_PAIRS", most)
        statistics = {("cnn3", False): statistics_of(zoo, False)}
        assert zoo.at_a_time(32) == (32 if most > 2100 else 3)
        found.append(train_and_predict(job, {"cnn3": zoo}, statistics, *settings_of(params))["tables"])
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one["values"], other["values"], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("kind", ["weightnet", "stats", "gbm"])
def test_scrambled_metadata_changes_no_prediction_from_weights(built, kind):
    """What predictors may read is the weights and the activation: the other columns of the index could be anything."""
    few = built.zoo.run < 48
    zoo = select(built.zoo, few.nonzero()[:, 0])
    read = {"run", "snapshot", "activation", *PROPERTIES}
    scrambled = replace(zoo, index={k: v if k in read else v[::-1] for k, v in zoo.index.items()})
    assert hyperparameters(scrambled).ne(hyperparameters(zoo)).any()
    params = TrainParams.load("train_weightnet", "digits", "baselines")
    job = Job("it", member(kind), "cnn3", Task(["cnn3"], ["cnn3"], pooled=False), 0)
    results = [
        train_and_predict(job, {"cnn3": z}, {("cnn3", False): statistics_of(z, False)}, *settings_of(params))["tables"]
        for z in (zoo, scrambled)
    ]
    assert len(results[0]) == len(results[1]) == 2
    assert all(torch.equal(a["values"], b["values"]) for a, b in zip(*results, strict=True))


def test_a_killed_family_trains_only_the_rest_and_ends_with_the_same_bytes(project, monkeypatch):
    start(monkeypatch, fetch_data, dataset="digits")
    start(monkeypatch, build_zoo, dataset="digits", variant="cnn3")

    def dying(job, *rest):
        if job.name == "one_sided":
            raise InputError("killed")
        return train_and_predict(job, *rest)

    monkeypatch.setattr(train_weightnet, "train_and_predict", dying)
    with pytest.raises(InputError, match="killed"):
        start(monkeypatch, train_weightnet, dataset="digits", variant="ablations")
    finished = {
        path.parent.parent.name.partition("-")[0] for path in (project / ".work/train_weightnet").rglob("result.pt")
    }
    assert finished and "one_sided" not in finished
    again: list[str] = []
    monkeypatch.setattr(
        train_weightnet, "train_and_predict", lambda job, *r: (again.append(job.name), train_and_predict(job, *r))[1]
    )
    start(monkeypatch, train_weightnet, dataset="digits", variant="ablations")
    assert set(again) == {"no_cross", "no_intra", "no_augmentation", "canonical", "one_sided"} - finished
    predictions = project / "models/train_weightnet/digits-ablations/predictions.parquet"
    resumed = predictions.read_bytes()
    shutil.rmtree(".work/train_weightnet")
    start(monkeypatch, train_weightnet, dataset="digits", variant="ablations")
    assert predictions.read_bytes() == resumed


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ("variants.baselines.members.nfn.kind=nothing", "variants.baselines.members.nfn.kind"),
        ("variants.baselines.members.stats.epochs=0", "variants.baselines.members.stats.epochs"),
        ("member.heads=0", "member.heads"),
    ],
)
def test_a_mistake_in_a_member_is_named_where_it_was_made(project, setting, key):
    set_params(project / "params.yaml", [f"train_weightnet.{setting}"])
    params = TrainParams.load("train_weightnet", "digits", "baselines")
    with pytest.raises(InputError, match=rf"^params.yaml: train_weightnet.{key}: "):
        train_weightnet.parse_members(params.member, params.variant["members"], "digits", "baselines")
