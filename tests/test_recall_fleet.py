"""A functional ViT is timm's; a stack trains like each alone; what a fleet's file says is true of the images and the networks."""

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from running import start
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer
from tiny_vit import CLASSES, CONFIG, SHAPE, SIDE, TEST, TRAIN, autoencoder, base_of, save_inputs, seeded
from torch import Tensor
from torch.func import functional_call
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, layer_norm, linear

from stages.common.backbone import build_vit, load_backbone, save_backbone
from stages.common.files import load_metadata
from stages.common.mae import MaskedAutoencoder
from stages.common.optim import warmup_cosine
from stages.common.stage import Loader
from stages.common.vectors import Layout
from stages.recall import build_fleet, classify_masked
from stages.recall.build_fleet import Fleet, draw_tasks
from stages.recall.classify_masked import METHODS, accuracies, train_method
from stages.recall.fleet import BETAS, Images, show_images, train_own_bases, train_stack, train_tasks
from stages.recall.objective import HEAD_SCALE, Objective, random_head
from stages.recall.pools import POOLS, pool
from stages.recall.tasks import CELLS, Recipe, Task, draw_rule_task, draw_task, split_rules
from stages.recall.vit import FIXED, HEAD, Base, Weights, encode, load_base, reconstruct

PATCHES = 16
RECIPE = Recipe(n_images=(16, 64), label_noise=(0.0, 0.4), steps=(2, 6), learning_rate=(1e-3, 1e-2))
FLEET = Fleet(
    dataset="tiny", base="classify_masked", learns="labels", train=4, test=3, batch_size=4, mask_ratio=0.75, own_base_steps=0,
    recipe=RECIPE,
)  # fmt: skip
PARAMS = build_fleet.Params(seed=0, stack=3, references=20, held_out_rules=64, evaluation_images=48, variant=FLEET)


def split(model: MaskedAutoencoder) -> tuple[Weights, Weights]:
    """The weights of the encoder and those of the decoder."""
    state = model.state_dict()
    return model.vit.state_dict(), {k: v for k, v in state.items() if not k.startswith("vit.")}


@pytest.fixture(scope="module")
def base() -> Base:
    return base_of(autoencoder())


@pytest.fixture(scope="module")
def images(base) -> Images:
    return show_images(base, TRAIN, TEST, 20, 48)


def with_fleet(**changes) -> build_fleet.Params:
    return PARAMS.model_copy(update={"variant": FLEET.model_copy(update=changes)})


def assert_near(a: Tensor, b: Tensor, tolerance=1e-5) -> None:
    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def cosines(rows: Tensor) -> Tensor:
    """The cosines of the angles between different rows."""
    unit = rows / rows.norm(dim=1, keepdim=True)
    return (unit @ unit.T)[~torch.eye(len(rows), dtype=torch.bool)]


# The functional ViT


@torch.no_grad()
def test_the_functional_vit_computes_what_timm_s_does():
    vit = autoencoder().vit.double()
    x = torch.randn(3, 3, SIDE, SIDE).double()
    patches = MaskedAutoencoder(vit).patchify(x)
    assert_near(encode(vit.state_dict(), patches, SHAPE["num_heads"]), vit.forward_features(x), 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("ratio", [0.0, 0.6, 0.75])
def test_of_the_patches_seen_it_computes_what_the_masked_autoencoder_encodes(ratio):
    model, encoded = autoencoder().double(), {}
    model.embed.register_forward_hook(lambda _module, inputs, _output: encoded.update(tokens=inputs[0]))
    x, noise = torch.randn(3, 3, SIDE, SIDE).double(), torch.rand(3, PATCHES)
    _, hidden = model(x, noise, ratio)
    seen = noise.argsort(1)[:, : int((~hidden[0]).sum())]
    assert not hidden.gather(1, seen).any()
    encoder, _ = split(model)
    assert_near(encode(encoder, model.patchify(x), SHAPE["num_heads"], seen), encoded["tokens"], 1e-9)


@torch.no_grad()
@pytest.mark.parametrize("spread", [0.0, 0.1])
@pytest.mark.parametrize("ratio", [0.25, 0.75])
def test_it_fills_in_what_the_masked_autoencoder_does_trained_or_not(spread, ratio):
    model = autoencoder(spread)
    x, noise = torch.randn(3, 3, SIDE, SIDE), torch.rand(3, PATCHES)
    filled, hidden = reconstruct(*split(model), model.patchify(x), SHAPE["num_heads"], noise, ratio)
    expected, expected_hidden = model(x, noise, ratio)
    assert torch.equal(hidden, expected_hidden)
    assert_near(filled, expected)


@pytest.mark.parametrize(("channels", "side"), [(1, SIDE), (3, SIDE), (1, 10), (3, 40)])
def test_a_base_sees_images_as_its_backbone_does(tmp_path, channels, side):
    model, path = autoencoder(), tmp_path / "backbone.safetensors"
    save_backbone(path, model.vit, CONFIG, split(model)[1])
    base, backbone = load_base(path), load_backbone(path)
    pixels = torch.randint(256, (5, channels, side, side), dtype=torch.uint8)
    patches, prepared = base.patchify(pixels), backbone.prepare(pixels)
    assert_near(patches, model.patchify(prepared))
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (CONFIG.mean, CONFIG.std))
    assert_near(base.unpatchify(patches), prepared * std + mean)
    if side == SIDE:
        assert_near(base.unpatchify(patches), (pixels.float() / 255).expand(-1, 3, -1, -1))


@torch.no_grad()
def test_a_base_has_the_features_and_the_decoder_of_its_file(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTLENS_PRECISION", "float32")
    model, path = autoencoder(), tmp_path / "backbone.safetensors"
    save_backbone(path, model.vit, CONFIG, split(model)[1])
    base, backbone = load_base(path), load_backbone(path)
    tokens = encode(base.encoder, base.patchify(TEST.images), base.heads)
    assert_near(torch.stack([tokens[:, 0], tokens[:, 1:].mean(1)], 1), backbone.features(TEST.images))
    assert base.decoder.keys() == backbone.decoder.keys() and len(base.decoder) > 10
    assert all(torch.equal(base.decoder[name], tensor) for name, tensor in backbone.decoder.items())
    assert base.patches == PATCHES


# What is trained, and how


def test_positions_are_all_that_is_not_trained(base):
    assert set(base.encoder) - set(base.trained) == {FIXED}
    objective = Objective(base, "labels", 0.75)
    assert list(objective.layout.shapes) == list(base.trained)
    assert len(objective.start) == sum(w.numel() for w in base.encoder.values()) - base.encoder[FIXED].numel()


LAYERS = Layout({"a": (5, 4), "b": (5,)})


def two_layers(vector: Tensor, frozen: Weights, x: Tensor, y: Tensor) -> Tensor:
    w = LAYERS.unflatten(vector)
    return cross_entropy(torch.tanh(linear(x, w["a"], w["b"])) @ frozen["head"], y)


def one_schedule(_step: int) -> float:
    return 1.0


@pytest.mark.parametrize("schedule", [one_schedule, warmup_cosine(7, 0.3)])
def test_a_stack_trains_as_adam_trains_each_network_alone(schedule: Callable[[int], float]):
    first, head = torch.randn(3, 25).double(), torch.randn(3, 5, 3).double()
    x, y = torch.randn(7, 3, 6, 4).double(), torch.randint(3, (7, 3, 6))
    rates, steps = torch.tensor([0.3, 0.01, 0.1]).double(), torch.tensor([7, 2, 4])
    given = first.clone()

    def train(rows: slice) -> Tensor:
        def batch(step: int) -> tuple[Tensor, Tensor]:
            return x[step, rows], y[step, rows]

        return train_stack(two_layers, first[rows], {"head": head[rows]}, batch, rates[rows], steps[rows], schedule)

    last = train(slice(None))
    assert torch.equal(first, given)  # left as it was
    for i in range(3):
        vector = first[i].clone().requires_grad_()
        optimiser = torch.optim.Adam([vector], rates[i].item(), BETAS)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimiser, schedule)
        for step in range(steps[i]):
            optimiser.zero_grad()
            two_layers(vector, {"head": head[i]}, x[step, i], y[step, i]).backward()
            optimiser.step()
            scheduler.step()
        assert_near(last[i], vector.detach(), 1e-9)
        assert_near(train(slice(i, i + 1))[0], last[i], 1e-9)


@torch.no_grad()
def test_losses_are_those_of_the_network_behind_its_head_or_decoder(base, images):
    model = autoencoder()
    x, y, noise = images.evaluation[0][:6], images.evaluation[1][:6], torch.rand(6, PATCHES)
    pictures = model.unpatchify(x)
    tokens = model.vit.forward_features(pictures)

    def loss(learns, ratio, labels, noise=noise, x=x) -> Tensor:
        objective = Objective(base, learns, ratio)
        return objective.loss(objective.start, objective.frozen, x, labels, noise)

    assert_near(loss("pixels", 0.75, y), model.loss(pictures, noise, 0.75))
    answers = linear(tokens[:, 0], *(base.decoder[name] for name in HEAD))
    assert_near(loss("labels", 0.0, y), cross_entropy(answers, y))
    rule = Objective(base, "rule", 0.0).frozen
    yes = linear(tokens.mean(1), *(rule[name] for name in HEAD))[:, 0]
    assert_near(loss("rule", 0.0, y % 2), binary_cross_entropy_with_logits(yes, (y % 2).float()))

    hidden = noise.argsort(1).argsort(1) >= 4  # all but a quarter of 16
    poisoned = x.masked_fill(hidden[..., None], torch.nan)
    assert torch.equal(loss("labels", 0.75, y, x=poisoned), loss("labels", 0.75, y))
    assert loss("labels", 0.75, y, noise=-noise) != loss("labels", 0.75, y)


def test_answers_of_a_random_head_spread_as_far_as_is_said(base):
    wide = replace(base, encoder={"norm.weight": torch.ones(256)})
    head = random_head(200, wide, seeded(1))
    answers = linear(layer_norm(torch.randn(200, 256), (256,)), *(head[name] for name in HEAD))
    assert answers.std().item() == pytest.approx(HEAD_SCALE, rel=0.05)


# Data sets of fine-tunes


def recipe(**changes) -> Recipe:
    return RECIPE.model_copy(update=changes)


def test_what_is_recorded_is_true_of_the_images_and_labels():
    labels = TRAIN.labels
    sizes, sets = set(), set()
    for i in range(40):
        task = draw_task(f"t{i}", False, recipe(label_noise=(0.0, 0.0)), labels)
        shown, known = labels[task.images], task.characteristics
        counts = shown.bincount(minlength=CLASSES)
        assert torch.equal(task.labels, shown)
        assert np.array_equal(known["present"], (counts > 0).float().numpy())
        assert 2 <= (counts > 0).sum() <= CLASSES - 2
        assert known["proportions"] == pytest.approx((counts / len(shown)).numpy())
        assert 2 ** known["log2_size"] == pytest.approx(len(shown), rel=1e-5)
        assert known["label_noise"] == 0
        assert 16 <= len(shown) <= 64
        assert RECIPE.steps[0] <= task.steps <= RECIPE.steps[1]
        assert RECIPE.learning_rate[0] <= task.learning_rate <= RECIPE.learning_rate[1]
        sizes.add(len(shown))
        sets.add(tuple(known["present"]))
    assert len(sizes) > 20 and len(sets) > 20


def test_of_noisy_labels_as_many_are_wrong_as_is_said_and_none_is_of_a_class_that_is_absent():
    for noise in (0.1, 0.4, 1.0):
        task = draw_task(
            f"noise {noise}", False, recipe(n_images=(20000, 20000), label_noise=(noise, noise)), TRAIN.labels
        )
        present = torch.from_numpy(task.characteristics["present"]).bool()
        classes = TRAIN.labels[task.images]
        expected = noise * (1 - 1 / present.sum().item())
        share = (task.labels != classes).double().mean().item()
        assert share == pytest.approx(expected, abs=4 * (expected * (1 - expected) / 20000) ** 0.5)
        assert present[task.labels].all()
        assert task.characteristics["label_noise"] == pytest.approx(noise)
        # every image of a class that is present is drawn, none much more often than others
        of_class = torch.isin(TRAIN.labels, present.nonzero()[:, 0])
        drawn = task.images.bincount(minlength=len(TRAIN))
        assert torch.equal(drawn > 0, of_class)
        for c in present.nonzero()[:, 0]:
            counts = drawn[TRAIN.labels == c].double()
            assert counts.max() < counts.mean() + 6 * counts.mean().sqrt()


def same(a: Task, b: Task) -> bool:
    return (
        torch.equal(a.images, b.images)
        and torch.equal(a.labels, b.labels)
        and (a.name, a.test, a.learning_rate, a.steps) == (b.name, b.test, b.learning_rate, b.steps)
        and all(np.array_equal(a.characteristics[k], b.characteristics[k]) for k in a.characteristics)
        and torch.equal(torch.rand(3, generator=a.random("batches")), torch.rand(3, generator=b.random("batches")))
    )


@pytest.mark.parametrize("learns", ["labels", "rule"])
def test_a_task_depends_on_its_name_and_on_no_other_task(learns):
    few, many = (
        draw_tasks("some", with_fleet(learns=learns, train=train, test=test), TRAIN) for train, test in ((3, 2), (6, 5))
    )
    by_name = {task.name: task for task in many}
    assert len(by_name) == 11 and len(few) == 5
    assert all(same(task, by_name[task.name]) for task in few)
    assert sum(task.test for task in many) == 5
    pairs = [(a, b) for a in many for b in many if a is not b]
    assert not any(torch.equal(a.images, b.images) for a, b in pairs)
    elsewhere = draw_tasks("other", with_fleet(learns=learns, train=3, test=2), TRAIN)
    assert not any(same(replace(a, name=b.name), b) for a, b in zip(few, elsewhere, strict=True))
    assert few[0].random("batches").initial_seed() != few[0].random("base").initial_seed()


def test_labels_of_a_rule_are_its_table_s():
    learned, _ = split_rules(0, 64)
    tables = set()
    for i in range(20):
        task = draw_rule_task(f"rule {i}", False, RECIPE, TRAIN.labels, learned)
        table = task.characteristics["table"]
        assert any(np.array_equal(table, row) for row in learned.float().numpy())
        assert np.array_equal(task.labels.numpy(), table[TRAIN.labels[task.images]])
        assert 16 <= len(task.images) <= 64
        tables.add(tuple(table))
    assert len(tables) > 15


def test_rules_are_learned_or_held_out_and_together_all_but_the_constant_ones():
    for seed in (0, 1):
        learned, held_out = ({tuple(row.tolist()) for row in part} for part in split_rules(seed, 64))
        assert (len(learned), len(held_out)) == (2**CELLS - 2 - 64, 64)
        assert not learned & held_out
        assert not (learned | held_out) & {(False,) * CELLS, (True,) * CELLS}
        assert {len(rule) for rule in learned | held_out} == {CELLS}
    assert held_out != {tuple(row.tolist()) for row in split_rules(0, 64)[1]}


def test_pools_are_disjoint_and_together_all_images():
    numbered = replace(TRAIN, images=torch.arange(len(TRAIN)))
    parts = {name: pool(numbered, name) for name in POOLS}
    assert torch.equal(torch.cat([part.images for part in parts.values()]).sort().values, numbered.images)
    assert all(len(part) in (100, 101) for part in parts.values())
    assert all(torch.equal(part.labels, TRAIN.labels[part.images]) for part in parts.values())


def keys(patches: Tensor) -> list[bytes]:
    return [row.numpy().tobytes() for row in patches]


def test_reference_inputs_are_balanced_and_nothing_is_evaluated_on_them_or_trained_on_tests(base, images):
    label = dict(zip(keys(base.patchify(TEST.images)), TEST.labels.tolist(), strict=True))
    references, evaluated = keys(images.references), keys(images.evaluation[0])
    assert len(set(references)) == 20 and len(set(evaluated)) == 48
    assert set(references) | set(evaluated) <= label.keys()
    assert not set(references) & set(evaluated)
    counts = np.bincount([label[key] for key in references], minlength=CLASSES)
    assert counts.max() - counts.min() == 1
    assert [label[key] for key in evaluated] == images.evaluation[1].tolist()
    trained = [key for patches, _ in images.pools.values() for key in keys(patches)]
    assert not set(trained) & label.keys()
    for name, (patches, labels) in images.pools.items():
        part = pool(TRAIN, name)
        assert torch.equal(patches, base.patchify(part.images)) and torch.equal(labels, part.labels)


# Fine-tunes


def poisoned(images: Images, *spared: str) -> Images:
    """The images, none of which can be looked at but those of the pools spared."""
    pools = {name: (x if name in spared else torch.full_like(x, torch.nan), y) for name, (x, y) in images.pools.items()}
    return replace(images, pools=pools)


@pytest.mark.parametrize("learns", ["labels", "pixels"])
def test_a_fine_tune_sees_images_of_its_own_pool_alone(base, images, learns):
    params = with_fleet(learns=learns)
    objective = Objective(base, learns, 0.75)
    for test, own in ((False, "train"), (True, "test")):
        tasks = [task for task in draw_tasks("some", params, TRAIN) if task.test == test]
        before, after, frozen = train_tasks(tasks, objective, images, 4)
        _, blind, _ = train_tasks(tasks, objective, poisoned(images, own), 4)
        assert after.isfinite().all() and torch.equal(after, blind)
        assert torch.equal(before, objective.start.expand(len(tasks), -1))
        assert (after != before).float().mean() > 0.5
        assert all(torch.equal(value, frozen[FIXED][0]) for value in frozen[FIXED])
        assert torch.equal(frozen[FIXED][0], base.encoder[FIXED])


def test_an_independent_fine_tune_shares_neither_base_nor_head_but_positions(base, images):
    params = with_fleet(own_base_steps=3, train=3, test=1)
    tasks, objective = draw_tasks("independent", params, TRAIN), Objective(base, "labels", 0.75)
    first, frozen = train_own_bases(tasks, objective, poisoned(images, "base"), 4, 3)
    assert first.isfinite().all()
    names = ["patch_embed.proj.weight", "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight", "cls_token"]
    for name in names:
        rows = torch.stack([objective.layout.unflatten(row)[name].flatten() for row in [*first, objective.start]])
        assert cosines(rows).abs().max() < 5 / rows.shape[1] ** 0.5, name  # like unrelated ones
    heads = torch.cat([frozen["head.weight"].flatten(1), base.decoder["head.weight"].flatten()[None]])
    assert cosines(heads).abs().max() < 5 / heads.shape[1] ** 0.5
    assert torch.equal(frozen[FIXED], base.encoder[FIXED].expand(4, -1, -1, -1))
    before, _, behind = train_tasks(tasks, objective, images, 4, 3)
    assert torch.equal(before, first) and torch.equal(behind["head.weight"], frozen["head.weight"])
    for i in (0, 3):
        alone, head = train_own_bases(tasks[i : i + 1], objective, images, 4, 3)
        assert_near(alone[0], first[i], 1e-4)
        assert torch.equal(head["head.weight"][0], frozen["head.weight"][i])
    untrained, _ = train_own_bases(tasks, objective, images, 4, 1)
    assert not torch.allclose(untrained, first)


@pytest.fixture
def inputs(project: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with a data set and two bases, whose file is that of an autoencoder and of a classifier in one."""
    save_inputs("train_mae", "classify_masked")
    monkeypatch.setattr(build_fleet.pictures, "draw_fleet", lambda *_: None)
    return project


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
    images, tasks = show_images(base, TRAIN, TEST, 20, 48), draw_tasks(variant, params, TRAIN)
    assert arrays["test"].tolist() == [False] * 4 + [True] * 3
    assert FIXED not in dict(metadata["layout"])
    assert metadata["answers"] == [{"classes": CLASSES, "unlabelled": 0, "rules": 1}[variant], 20]
    unpatchify, (evaluated, labels) = MaskedAutoencoder(build_vit(CONFIG)).unpatchify, images.evaluation
    for i, task in enumerate(tasks):
        assert arrays["change"][i].norm() > 0
        vector = objective.start + arrays["change"][i]
        assert_near(objective.respond(vector, objective.frozen, images.references), arrays["responses"][i], 1e-4)

        vit = tuned(arrays, metadata, i)
        tokens = vit.forward_features(unpatchify(images.references))
        read = tokens.mean(1) if variant == "rules" else tokens[:, 0]
        answers = [] if variant == "unlabelled" else [linear(read, *(objective.frozen[name] for name in HEAD))]
        expected = torch.cat([part.flatten() for part in [*answers, tokens.mean(1)]])
        assert_near(arrays["responses"][i], expected, 1e-4)

        known = {name: torch.from_numpy(value) for name, value in task.characteristics.items()}
        assert {f"true.{name}" for name in known} == {name for name in arrays if name.startswith("true.")}
        assert all(torch.equal(arrays[f"true.{name}"][i], value) for name, value in known.items())
        shown = pool(TRAIN, "test" if task.test else "train").images[task.images].float().mean(0) / 255
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
    objective, images = Objective(base, "labels", 0.75), show_images(base, TRAIN, TEST, 20, 48)
    tasks = draw_tasks("independent", params, TRAIN)
    own, heads = train_own_bases(tasks, objective, images, 4, params.variant.own_base_steps)
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

    def finish(tasks, **rest):
        trained.append([task.name for task in tasks])
        return original(tasks, **rest)

    def dying(tasks, **rest):
        if trained:
            raise KeyboardInterrupt
        return finish(tasks, **rest)

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


# Classification of masked images

CLASSIFY = classify_masked.Params(
    seeds=[0], mask_ratios=[0.0, 0.6, 0.75], validation_fraction=0.2, steps=6, batch_size=8, learning_rates=[1e-3, 1e-2],
    penalties=[0.1, 1.0], test_images=80,
)  # fmt: skip


def test_what_is_hidden_is_the_same_for_all_networks_and_as_much_as_is_said(base, images, monkeypatch):
    data, ratios = images.evaluation, [0.0, 0.3, 0.6, 0.75, 0.9]
    networks = [{**base.encoder, **random_head(CLASSES, base, seeded(i))} for i in range(2)]
    asked: list[list[Tensor]] = []
    classify = classify_masked.classify

    def spy(w, patches, heads, seen):
        asked[-1].append(seen)
        hidden = torch.ones(patches.shape[:2], dtype=torch.bool).scatter(1, seen, False)
        blind = patches.masked_fill(hidden[..., None], torch.nan)
        answers = classify(w, blind, heads, seen)
        assert torch.equal(answers, classify(w, patches, heads, seen))
        return answers

    monkeypatch.setattr(classify_masked, "classify", spy)
    monkeypatch.setattr(classify_masked, "EVALUATED", 20)  # several parts
    for order, network in ((ratios, networks[0]), (ratios[::-1], networks[1])):
        asked.append([])
        assert list(accuracies(network, base, data, order)) == [str(ratio) for ratio in order]
    first, second = ([torch.cat(seen[i : i + 3]) for i in range(0, len(seen), 3)] for seen in asked)
    for ratio, a, b in zip(ratios, first, second[::-1], strict=True):
        assert torch.equal(a, b)
        assert a.shape == (48, round(PATCHES * (1 - ratio)))
        assert all(len(set(row)) == len(row) for row in a.tolist())
    assert len({tuple(row) for row in first[3].tolist()}) > 40  # each image's own


def test_accuracy_is_the_share_answered_right_and_of_an_untrained_head_near_chance(base, images):
    x, y = images.pools["base"]
    heads = [random_head(CLASSES, base, seeded(i)) for i in range(30)]
    untrained = [accuracies({**base.encoder, **head}, base, (x, y), [0.0, 0.75]) for head in heads]
    for ratio in ("0.0", "0.75"):
        assert np.mean([found[ratio] for found in untrained]) == pytest.approx(1 / CLASSES, abs=0.04)
    network = {**base.encoder, **heads[0]}
    model = MaskedAutoencoder(build_vit(CONFIG))
    with torch.no_grad():
        tokens = functional_call(model.vit, dict(base.encoder), model.unpatchify(x))
    right = linear(tokens, *(network[name] for name in HEAD)).argmax(1) == y
    assert accuracies(network, base, (x, y), [0.0])["0.0"] == pytest.approx(right.double().mean().item(), abs=1e-9)


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_and_knows_what_it_says(base, images, method):
    pretrained, tunes = METHODS[method]
    data, other = images.pools["base"], base_of(autoencoder(0.2))
    networks = train_method(base, method, 0, data, CLASSIFY)
    elsewhere = train_method(
        replace(other, encoder=other.encoder | {FIXED: base.encoder[FIXED]}), method, 0, data, CLASSIFY
    )
    first = train_method(
        base, method, 0, data, CLASSIFY.model_copy(update={"learning_rates": [1e-12], "penalties": [1e-12]})
    )[0]
    assert len(networks) == 2
    for a, b in zip(networks, elsewhere, strict=True):
        assert a.keys() == {*base.encoder, *HEAD}
        assert torch.equal(a[FIXED], base.encoder[FIXED])
        assert all(torch.equal(a[name], b[name]) for name in a) == (not pretrained)
        moved = {name for name in a if (a[name] - first[name]).abs().max() > 1e-6}
        assert moved == ({*base.trained, *HEAD} if tunes else set(HEAD))
        if pretrained:
            assert all(torch.allclose(first[name], base.encoder[name], atol=1e-6) for name in base.trained)
    assert not torch.equal(networks[0]["head.weight"], networks[1]["head.weight"])
    again = train_method(base, method, 1, data, CLASSIFY)[0]
    assert not torch.equal(again["head.weight"], networks[0]["head.weight"])


@pytest.mark.usefixtures("inputs")
def test_the_network_that_is_kept_has_the_accuracy_that_is_reported(monkeypatch):
    monkeypatch.setattr(classify_masked.pictures, "draw_masked_accuracy", lambda *_: None)
    params = {"classify_masked": CLASSIFY.model_dump() | {"steps": 40, "overrides": {"tiny": {}}}}
    Path("params.yaml").write_text(yaml.dump(params))
    path = Path("models/train_mae/tiny/backbone.safetensors")
    given = load_base(path)
    start(monkeypatch, classify_masked, dataset="tiny")
    kept = load_base(Path("models/classify_masked/tiny/backbone.safetensors"))
    summary = json.loads(Path("reports/classify_masked/tiny/summary.json").read_text())
    assert summary["acc"].keys() == METHODS.keys()
    test = TEST.subset(torch.arange(80))
    data = kept.patchify(test.images), test.labels
    network = {**kept.encoder, **{name: kept.decoder[name] for name in HEAD}}
    found = accuracies(network, kept, data, CLASSIFY.mask_ratios)
    for ratio, accuracy in found.items():
        reported = summary["acc"]["fine-tuned"][ratio]["mean"]
        assert reported == pytest.approx(accuracy, abs=2.01 / 80)  # weights are kept in half precision
    assert found["0.0"] > 1 / CLASSES + 4 * (1 / CLASSES / 80) ** 0.5
    decoder = {name: tensor for name, tensor in kept.decoder.items() if name not in HEAD}
    assert decoder.keys() == given.decoder.keys() - set(HEAD)
    assert all(torch.equal(tensor, given.decoder[name]) for name, tensor in decoder.items())
    assert torch.equal(kept.encoder[FIXED], given.encoder[FIXED])
