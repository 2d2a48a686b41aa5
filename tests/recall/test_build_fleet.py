"""What a fleet's file says is true of the images and the networks."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import start
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from tiny_vit import CLASSES, CONFIG, TEST, TRAIN
from torch import Tensor
from torch.nn.functional import linear

from stages.common.backbone import build_vit, load_backbone
from stages.common.files import load_metadata
from stages.common.mae import MaskedAutoencoder
from stages.common.stage import InputError, Loader
from stages.common.vectors import Layout
from stages.recall import build_fleet
from stages.recall.build_fleet import Variant
from stages.recall.fine_tunes import FineTune, Recipe, split_rules
from stages.recall.fleet import held_out_loss, patchify_pools, require_learned, train_own_bases
from stages.recall.functional_vit import FIXED, HEAD, load_base
from stages.recall.objective import Objective
from stages.recall.pools import pool

RECIPE = Recipe(n_images=(16, 64), label_noise=(0.0, 0.4), steps=(2, 6), learning_rate=(1e-3, 1e-2))
PATCHES = 16


def assert_near(a: Tensor, b: Tensor, tolerance=1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def draw_fleet(name: str, variant: Variant) -> list[FineTune]:
    return build_fleet.draw_fleet(name, variant, TRAIN, seed=0, held_out_rules=64)


def variant(**changes) -> Variant:
    given = {
        "dataset": "tiny", "base": "classify_masked", "learns": "labels", "train": 4, "test": 3, "batch_size": 4, "mask_ratio": 0.75,
        "own_base_steps": 0, "recipe": RECIPE.model_dump(),
    }  # fmt: skip
    if changes.get("learns") == "rule":
        given["base"] = "train_mae"
    return Variant(**given | changes)


def same(a: FineTune, b: FineTune) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.name, a.test, a.learning_rate, a.steps) == (b.name, b.test, b.learning_rate, b.steps)
        and all(np.array_equal(a.characteristics[k], b.characteristics[k]) for k in a.characteristics)
        and torch.equal(torch.rand(3, generator=a.random("batches")), torch.rand(3, generator=b.random("batches")))
    )


@pytest.mark.parametrize("learns", ["labels", "rule"])
def test_a_task_depends_on_its_name_and_on_no_other_task(learns):
    few, many = (draw_fleet("some", variant(learns=learns, train=train, test=test)) for train, test in ((3, 2), (6, 5)))
    by_name = {fine_tune.name: fine_tune for fine_tune in many}
    assert len(by_name) == 11 and len(few) == 5
    assert all(same(fine_tune, by_name[fine_tune.name]) for fine_tune in few)
    assert sum(fine_tune.test for fine_tune in many) == 5
    pairs = [(a, b) for a in many for b in many if a is not b]
    assert not any(torch.equal(a.images, b.images) for a, b in pairs)
    elsewhere = draw_fleet("other", variant(learns=learns, train=3, test=2))
    assert not any(same(replace(a, name=b.name), b) for a, b in zip(few, elsewhere, strict=True))
    assert few[0].random("batches").initial_seed() != few[0].random("base").initial_seed()


def build(monkeypatch, variant: str, stack=3) -> tuple[dict[str, Tensor], dict]:
    """Build a fleet of four fine-tunes to train decoders on and three to test them on; return its arrays and metadata."""
    params = yaml.load(Path("params.yaml").read_text(), Loader)
    own = params["build_fleet"]["variants"][variant]
    own |= {"dataset": "tiny", "train": 4, "test": 3, "batch_size": 4, "own_base_steps": min(3, own["own_base_steps"])}
    own["recipe"] |= {"steps": [2, 6], "n_images": [16, 32]}
    params["build_fleet"] |= {"references": 20, "evaluation_images": 48, "stack": stack}
    Path("params.yaml").write_text(yaml.dump(params))
    start(monkeypatch, build_fleet, variant=variant)
    path = Path(f"models/build_fleet/{variant}/fleet.safetensors")
    return load_file(path), load_metadata(path)


def tuned(arrays: dict[str, Tensor], metadata: dict, i: int) -> VisionTransformer:
    """The network that one gets from a fleet's file and its base's: timm's ViT, the change added to its weights."""
    vit = load_backbone(Path(metadata["base"])).vit
    change = Layout.from_metadata(metadata).unflatten(arrays["change"][i])
    vit.load_state_dict({name: w + change.get(name, 0) for name, w in vit.state_dict().items()})
    return vit


@pytest.mark.usefixtures("inputs")
@torch.no_grad()
@pytest.mark.parametrize("variant", ["classes", "unlabelled", "rules"])
def test_the_base_and_a_change_give_the_responses_and_scores_of_the_file(monkeypatch, variant):
    arrays, metadata = build(monkeypatch, variant)
    params = build_fleet.Params.load("build_fleet", variant=variant)
    base = load_base(Path(metadata["base"]))
    objective = Objective(base, params.variant.learns, params.variant.mask_ratio)
    images = patchify_pools(base, TRAIN, TEST, 20, 48)
    fine_tunes = build_fleet.draw_fleet(variant, params.variant, TRAIN, params.seed, params.held_out_rules)
    assert arrays["test"].tolist() == [False] * 4 + [True] * 3
    assert FIXED not in dict(metadata["layout"])
    assert metadata["answers"] == [{"classes": CLASSES, "unlabelled": 0, "rules": 1}[variant], 20]
    unpatchify, (evaluated, labels) = MaskedAutoencoder(build_vit(CONFIG)).unpatchify, images.evaluation
    for i, fine_tune in enumerate(fine_tunes):
        assert arrays["change"][i].norm() > 0
        vector = objective.start + arrays["change"][i]
        assert_near(objective.respond(vector, objective.frozen, images.references), arrays["responses"][i], 1e-4)

        vit = tuned(arrays, metadata, i)
        tokens = vit.forward_features(unpatchify(images.references))
        read = tokens.mean(1) if variant == "rules" else tokens[:, 0]
        answers = [] if variant == "unlabelled" else [linear(read, *(objective.frozen[name] for name in HEAD))]
        expected = torch.cat([part.flatten() for part in [*answers, tokens.mean(1)]])
        assert_near(arrays["responses"][i], expected, 1e-4)

        known = {name: torch.from_numpy(value) for name, value in fine_tune.characteristics.items()}
        assert {f"true.{name}" for name in known} == {name for name in arrays if name.startswith("true.")}
        assert all(torch.equal(arrays[f"true.{name}"][i], value) for name, value in known.items())
        shown = pool(TRAIN, "test" if fine_tune.test else "train").images[fine_tune.images].float().mean(0) / 255
        assert_near(arrays["mean_image"][i], shown.expand(3, -1, -1))

        for when, network in (("before", load_backbone(Path(metadata["base"])).vit), ("after", vit)):
            tokens = network.forward_features(unpatchify(evaluated))
            if variant == "classes":
                right = linear(tokens[:, 0], *(objective.frozen[name] for name in HEAD)).argmax(1) == labels
                right = right[known["present"][labels] > 0]
            elif variant == "rules":
                yes = linear(tokens.mean(1), *(objective.frozen[name] for name in HEAD))[:, 0] > 0
                right = yes == (known["table"][labels] > 0)
            else:
                continue
            assert arrays[f"score_{when}"][i].item() == pytest.approx(
                right.float().mean().item(), abs=1.01 / len(right)
            )
    if variant == "rules":
        _, held_out = split_rules(params.seed, params.held_out_rules)
        among = (arrays["true.table"][:, None] == held_out.float()).all(2).any(1)
        assert torch.equal(among, arrays["test"])


@pytest.mark.usefixtures("inputs")
@torch.no_grad()
def test_to_an_independent_fine_tune_the_base_is_a_stranger(monkeypatch):
    arrays, metadata = build(monkeypatch, "independent")
    params = build_fleet.Params.load("build_fleet", variant="independent")
    base = load_base(Path(metadata["base"]))
    objective, images = Objective(base, "labels", 0.75), patchify_pools(base, TRAIN, TEST, 20, 48)
    fine_tunes = build_fleet.draw_fleet("independent", params.variant, TRAIN, params.seed, params.held_out_rules)
    own, heads = train_own_bases(fine_tunes, objective, images, 4, params.variant.own_base_steps)
    for i, (change, responses) in enumerate(zip(arrays["change"], arrays["responses"], strict=True)):
        head = {name: w[i] for name, w in heads.items()}
        assert_near(objective.respond(own[i] + change, head, images.references), responses, 1e-3)
        for frozen in (head, objective.frozen):
            added = objective.respond(objective.start + change, frozen, images.references)
            assert (added - responses).norm() > 0.5 * responses.norm()


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("variant", ["unlabelled", "independent"])
def test_how_many_train_together_changes_nothing(monkeypatch, variant):
    alone, together = (build(monkeypatch, variant, stack)[0] for stack in (1, 7))
    for name, values in alone.items():
        tolerance = 1.01 / 4 if name.startswith("score") else 1e-3
        assert_near(values.double(), together[name].double(), tolerance)
    difference = (alone["change"] - together["change"]).norm(dim=1)
    assert (difference < 0.01 * alone["change"].norm(dim=1)).all()


def test_a_killed_fleet_trains_only_the_rest_and_ends_with_the_same_bytes(inputs, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 1)  # one stack after the other
    original, trained = build_fleet.finish, []

    def finish(fine_tunes, **rest):
        trained.append([fine_tune.name for fine_tune in fine_tunes])
        return original(fine_tunes, **rest)

    def dying(fine_tunes, **rest):
        if trained:
            raise KeyboardInterrupt
        return finish(fine_tunes, **rest)

    monkeypatch.setattr(build_fleet, "finish", dying)
    with pytest.raises(KeyboardInterrupt):
        build(monkeypatch, "classes")
    fleet = inputs / "models/build_fleet/classes/fleet.safetensors"
    assert not fleet.exists() and len(trained) == 1
    monkeypatch.setattr(build_fleet, "finish", finish)
    build(monkeypatch, "classes")
    assert [len(names) for names in trained] == [3, 3, 1]
    assert len({name for names in trained for name in names}) == 7
    resumed = fleet.read_bytes()

    pieces = sorted((inputs / ".work/build_fleet/classes").rglob("*.safetensors"))
    assert len(pieces) == 3
    pieces[1].unlink()
    build(monkeypatch, "classes")
    assert trained[3:] == trained[1:2]
    assert fleet.read_bytes() == resumed
    for piece in pieces:
        piece.unlink()
    build(monkeypatch, "classes")
    assert len(trained) == 7
    assert fleet.read_bytes() == resumed


@pytest.mark.usefixtures("inputs")
@pytest.mark.parametrize("variant", ["classes", "rules", "unlabelled"])
def test_a_fleet_that_diverges_is_named_and_leaves_no_result(monkeypatch, variant):
    params = yaml.load(Path("params.yaml").read_text(), Loader)
    params["build_fleet"]["variants"][variant]["recipe"]["learning_rate"] = [1e30, 1e30]
    Path("params.yaml").write_text(yaml.dump(params))
    remedy = f"lower build_fleet.variants.{variant}.recipe.learning_rate"
    with pytest.raises(InputError, match=rf"^fleet {variant}: training diverged, its loss is not finite: {remedy}$"):
        build(monkeypatch, variant)
    assert not Path(f"models/build_fleet/{variant}").exists()
    assert not Path(f"reports/build_fleet/{variant}").exists()


@torch.no_grad()
def test_the_held_out_loss_is_that_of_the_images_that_count(base, images):
    objective, (x, y) = Objective(base, "labels", 0.0), images.evaluation
    frozen = {name: w[None] for name, w in objective.frozen.items()}
    counted, noise = (y < 3).float()[None], torch.zeros(len(x), base.patches)
    found = held_out_loss(objective, objective.start[None], frozen, x, y[None], counted, noise)
    alone = objective.loss(objective.start, objective.frozen, x[y < 3], y[y < 3], noise[y < 3])
    assert_near(found[0], alone)


def test_fine_tunes_may_lose_what_guessing_loses_but_not_twice_as_much(base):
    objective = Objective(base, "labels", 0.0)
    losses = {"loss_before": np.array([0.1, 0.3]), "loss_after": np.array([2.0, 3.0])}
    require_learned(losses, objective, "fleet", "lower it")  # eight classes: guessing loses 2.1
    for after in (np.array([4.0, 5.0]), np.array([1.0, np.nan])):
        with pytest.raises(InputError, match=r"fleet: training diverged, its loss is .*: lower it"):
            require_learned(losses | {"loss_after": after}, objective, "fleet", "lower it")
    with pytest.raises(InputError, match="diverged"):  # of pixels nothing is guessed
        require_learned(losses, Objective(base, "pixels", 0.75), "fleet", "lower it")
