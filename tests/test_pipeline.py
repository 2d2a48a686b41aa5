"""dvc.yaml tells the truth: what a stage depends on is exactly what it imports and reads."""

import copy
import hashlib
import importlib
import json
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import dependencies
import pytest
import yaml
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.stage.cache import _get_cache_hash
from dvc.stage.serialize import to_single_stage_lockfile
from dvc_data.hashfile.hash_info import HashInfo
from dvc_data.hashfile.meta import Meta
from reproduction import ROOT, scale_overrides, set_params

from stages.bilinear import decompose_bilinear, train_bilinear, vary_regularisation
from stages.common.stage import Loader
from stages.forecast import (
    compress_trajectory,
    evaluate_forecaster,
    learn_world,
    nowcast_training,
    race_to_target,
    train_forecaster,
    train_lenet,
    train_world,
    tune_jump,
)
from stages.recall import (
    build_fleet,
    classify_masked,
    condense_changes,
    map_weight_space,
    recover_images,
    recover_memory,
    train_auditor,
    train_mae,
    vary_recipes,
)
from stages.vit_memory import diagnose_memory, extract_features, pretrain_backbone, train_continual, train_few_shot
from stages.weightnet import build_zoo, evaluate_weightnet, train_weightnet

TEXT = (ROOT / "dvc.yaml").read_text()
DVC_YAML = yaml.load(TEXT, Loader)["stages"]
PARAMS = yaml.load((ROOT / "params.yaml").read_text(), Loader)
COMMANDS = {
    "compare",
    "reproduce",
    "audit",
    "decompose",
    "forecast_snapshots",
    "leave_snapshots",
    "predict",
    "publish",
    "remember",
    "symmetry",
    "trace_answers",
    "gather_zoo",
}  # no stages: for users' own files, and for git
PIPED: dict[str, Any] = {"stdout": subprocess.PIPE, "text": True}
SCALES = sorted(path.stem for path in (ROOT / "stages/scales").glob("*.args"))


@pytest.fixture(scope="module")
def stages(tmp_path_factory: pytest.TempPathFactory) -> list[PipelineStage]:
    """Every stage of the default pipeline, its matrix resolved, and a stage of those that it leaves out."""
    folder = tmp_path_factory.mktemp("stages")
    for name in ("dvc.yaml", "dvc.lock", "params.yaml"):
        shutil.copy(ROOT / name, folder)
    set_params(folder / "params.yaml", ["pretrain_backbone.backbones=[glyphs]"])
    with Repo.init(folder, no_scm=True) as repo:
        return list(repo.index.stages)


def tracked() -> set[str]:
    """The paths that git tracks."""
    return set(subprocess.run(["git", "ls-files"], cwd=ROOT, check=True, **PIPED).stdout.splitlines())


def script(stage: PipelineStage) -> Path:
    """The file of `python -m stages.x.y`, relative to the project."""
    words = stage.cmd.split()
    assert words[:2] == ["python", "-m"], stage.cmd
    return Path(*words[2].split(".")).with_suffix(".py")


def test_stage_script_and_params_section_share_one_name(stages):
    scripts = {path.stem for path in (ROOT / "stages").rglob("*.py") if "def main()" in path.read_text()}
    assert set(DVC_YAML) == set(PARAMS) == scripts - COMMANDS
    for stage in stages:
        assert script(stage).stem == stage.name.split("@")[0]


def test_dvc_yaml_says_what_stages_import_and_read():
    notes = [edit.note for edit in dependencies.edits(TEXT, PARAMS)]
    assert not notes, "\n".join([*notes, f"run '{dependencies.COMMAND}'"])


@pytest.mark.parametrize(
    ("there", "planted"),
    [
        ("stages/forecast/pca.py, ", ""),  # an import that is not listed
        ("stages/forecast/pca.py", "stages/forecast/nowcast.py"),  # and one that there is not
        (", train_mae.dim", ""),
        ("train_mae.dim", "train_mae.dime"),
        (', "train_mae.overrides.${item.dataset}"', ""),
        ("variants.${key}", "variants"),
        ("sources.${item.dataset}", "sources"),
        (', "models/build_zoo/${item.dataset}-flat"', ""),  # a member
        ('"models/build_zoo/${item.dataset}-flat"', '"models/build_zoo/${item.dataset}-resnet18"'),
        ("models/build_fleet/rules/fleet.safetensors, ", ""),
        ("models/condense_changes/rules.safetensors, ", ""),
        (", ablations]", "]"),  # a variant
    ],
)
def test_whatever_dvc_yaml_should_not_say_is_found_and_mended(there, planted):
    text = TEXT.replace(there, planted)
    assert text != TEXT
    assert list(dependencies.edits(text, PARAMS))
    mended = dependencies.updated(text, PARAMS)
    assert yaml.load(mended, Loader) == yaml.load(TEXT, Loader)
    assert dependencies.updated(mended, PARAMS) == mended


def test_computed_lists_are_written_for_a_stage_that_has_none():
    lists = re.compile(r"^ +(deps|params): \[[^]]*\]\n", re.MULTILINE)
    for name in ("train_mae", "build_fleet"):
        start = TEXT.index(f"  {name}:\n")
        text = TEXT[:start] + lists.sub("", TEXT[start:], count=2)
        mended = yaml.load(dependencies.updated(text, PARAMS), Loader)["stages"]
        stage, whole = (stages[name].get("do", stages[name]) for stages in (mended, DVC_YAML))
        assert stage["params"] == whole["params"]
        assert stage["deps"] == [dep for dep in whole["deps"] if dependencies.is_code(dep)]


def test_what_is_written_by_hand_stays():
    """Comments, data and formatting, even of lists beside those that are written anew."""
    comment = "  # a word on the masked autoencoder\n"
    text = TEXT.replace("  train_mae:\n", f"{comment}  train_mae:\n").replace(", train_mae.dim", "")
    assert dependencies.updated(text, PARAMS).replace(comment, "") == TEXT
    with pytest.raises(SystemExit, match=r"train_mae: params .* comment"):
        dependencies.updated(TEXT.replace(", train_mae.dim", ",  # a word\n      train_mae.dime"), PARAMS)


def test_fields_of_params_are_those_that_their_files_show(stages):
    """They are read from the source: a field that is inherited would be missed."""
    for stage in stages:
        module = importlib.import_module(".".join(script(stage).with_suffix("").parts))
        if hasattr(module, "Params"):
            fields = {f"x.{key}" for key in module.Params.model_fields if key != "variant"}
            assert dependencies.keys_read("x", script(stage), {}) == fields, stage.name


def run_cache_key(stage: PipelineStage) -> str:
    """The key under which DVC's run cache keeps what `stage` made: of its command, its dependencies' hashes and its params."""
    return _get_cache_hash(to_single_stage_lockfile(stage), key=True)


def leaves(node: Any, path: tuple = ()) -> Iterator[tuple]:
    """Yield the path of each value in nested mappings and lists; an empty one is a value."""
    children = dict(enumerate(node)) if isinstance(node, list) else node
    if not isinstance(children, dict) or not children:
        yield path
        return
    for key, value in children.items():
        yield from leaves(value, (*path, key))


def with_another_value(node: Any, path: tuple) -> Any:
    """Return a copy of `node` in which the value at `path` is another one."""
    if not path:
        return "another value"
    changed = copy.copy(node)
    changed[path[0]] = with_another_value(node[path[0]], path[1:])
    return changed


def test_no_parameter_has_a_name_that_the_run_cache_ignores():
    """DVC leaves keys called `size` and `nfiles` out of the run cache's key, at any depth, since it thinks of the sizes of
    outputs (treeverse/dvc #10296): for a new value the results of the old one would come back, and `dvc status` be content."""
    ignored = {Meta.PARAM_SIZE, Meta.PARAM_NFILES}
    assert ignored == {"size", "nfiles"}
    assert not [".".join(map(str, path)) for path in leaves(PARAMS) if ignored & set(path)]


def test_each_value_that_a_stage_reads_changes_the_run_caches_key(stages):
    for stage in stages:
        for dep in stage.params:
            values = dep.read_params()
            dep.hash_info = HashInfo(dep.PARAM_PARAMS, values)
            key, seen = run_cache_key(stage), 0
            for path in leaves(values):
                dep.hash_info = HashInfo(dep.PARAM_PARAMS, with_another_value(values, path))
                assert run_cache_key(stage) != key, f"{stage.name}: {'.'.join(map(str, path))}"
                seen += 1
            assert seen >= len(dep.params), stage.name


def test_the_run_cache_still_ignores_these_names(stages):
    """What the tests above look for can be found; once DVC has mended it, they and the rule may go."""
    stage = next(stage for stage in stages if stage.params)
    (dep,) = stage.params
    keys = set()
    for pixels in (16, 24):
        dep.hash_info = HashInfo(dep.PARAM_PARAMS, {"a": {"size": pixels}})
        keys.add(run_cache_key(stage))
    assert len(keys) == 1


def test_data_dependencies_are_outputs_of_other_stages_or_in_git(stages):
    outputs = {Path(out.def_path) for stage in stages for out in stage.outs}
    outputs |= {path.parent for path in outputs}  # all that a stage writes there: see below
    for stage in stages:
        for dep in (Path(dep.def_path) for dep in stage.deps if dep not in stage.params):
            assert dep.suffix == ".py" or dep in outputs or str(dep) in tracked(), f"{stage.name}: {dep}"


def test_a_path_names_its_producer(stages):
    for stage in stages:
        name = stage.name.split("@")[0]
        for out in stage.outs:
            parts = Path(out.def_path).parts
            expected = {"fetch_data": ("data",), "build_report": ("reports",)}.get(name)
            assert parts[: len(expected)] == expected if expected else parts[1] == name, out.def_path


def test_outputs_keep_the_run_cache(stages):
    """`persist`, and plain outputs that are not cached, would silently disable DVC's run cache."""
    for stage in stages:
        for out in stage.outs:
            assert out.use_cache and not out.persist, out.def_path


def test_no_stage_writes_what_git_tracks(stages):
    """DVC deletes outputs before a stage runs, and another processor makes other bytes: git would call it a change."""
    outputs = {Path(out.def_path) for stage in stages for out in stage.outs}
    assert not [path for path in map(Path, tracked()) if outputs & {path, *path.parents}]
    ignored = subprocess.run(["git", "check-ignore", "--stdin"], cwd=ROOT, input="\n".join(map(str, outputs)), **PIPED)
    assert set(map(Path, ignored.stdout.splitlines())) == outputs


def test_no_stage_depends_on_a_folder_that_several_write(stages):
    """What a dropped member leaves behind in such a folder would change its hash."""
    outputs = {Path(out.def_path): stage.name for stage in stages for out in stage.outs}
    for stage in stages:
        for dep in (Path(dep.def_path) for dep in stage.deps):
            assert len({outputs[out] for out in outputs if dep in out.parents}) <= 1, f"{stage.name}: {dep}"


def test_lock_is_consistent(stages):
    """Every recorded hash is that of this code, these params and these outputs in git."""
    lock = yaml.load((ROOT / "dvc.lock").read_text(), Loader)["stages"]
    stages = [stage for stage in stages if stage.name != "pretrain_backbone@glyphs"]  # not of the default
    assert set(lock) == {stage.name for stage in stages}
    for stage in stages:
        entry = lock[stage.name]
        assert entry["cmd"] == stage.cmd
        assert {dep["path"] for dep in entry["deps"]} == {dep.def_path for dep in stage.deps if dep not in stage.params}
    status = subprocess.check_output(["dvc", "status", "--json"], cwd=ROOT, text=True)
    changed = {
        (stage, path)
        for stage, changes in json.loads(status).items()
        for change in changes
        if isinstance(change, dict)
        for path, state in change.get("changed deps", {}).items()
        if state != "deleted"  # data and models, in a clone that has not pulled them
    }
    assert not changed


@pytest.mark.parametrize("scale", SCALES)
def test_a_scale_says_first_how_long_it_takes(scale):
    first = (ROOT / f"stages/scales/{scale}.args").read_text().partition("\n")[0]
    assert re.match(r"# .*(second|minute|hour|day)s? on 2 cores", first), first


@pytest.mark.parametrize("scale", SCALES)
def test_scales_set_keys_that_exist(scale, tmp_path, monkeypatch):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    set_params(path, scale_overrides(scale))  # raises on a key that params.yaml lacks
    changed = yaml.load(path.read_text(), Loader)
    assert changed != PARAMS
    monkeypatch.chdir(tmp_path)
    fetched, trained = changed["fetch_data"]["datasets"], changed["train_bilinear"]["datasets"]
    assert set(trained) <= set(fetched) <= set(changed["fetch_data"]["sources"])
    assert changed["build_report"]["bilinear"] in trained
    assert changed["build_report"]["forecast"] in changed["train_lenet"]["datasets"]
    for dataset in changed["train_lenet"]["datasets"]:
        assert dataset in fetched
        train_lenet.Params.load("train_lenet", dataset)
        for stage in (train_forecaster, compress_trajectory, tune_jump, evaluate_forecaster, nowcast_training):
            stage.Params.load(stage.__name__.rpartition(".")[2], dataset)
    for dataset in changed["train_world"]["datasets"]:
        assert dataset in fetched
        train_world.Params.load("train_world", dataset)
    for dataset in changed["vary_regularisation"]["datasets"]:
        assert dataset in fetched
        vary_regularisation.Params.load("vary_regularisation", dataset)
    for variant in changed["learn_world"]["variants"]:
        learn_world.Params.load("learn_world", variant=variant)
    assert set(changed["learn_world"]["learned"]) <= set(changed["learn_world"]["variants"])
    for variant in changed["race_to_target"]["raced"]:
        assert race_to_target.Params.load("race_to_target", variant=variant).variant.dataset in fetched
    assert changed["build_report"]["vit_memory"] in changed["extract_features"]["datasets"]
    for variant in changed["pretrain_backbone"]["variants"]:
        pretrain_backbone.Params.load("pretrain_backbone", variant=variant)
    for dataset in changed["extract_features"]["datasets"]:
        assert dataset in fetched
        for stage in (extract_features, train_few_shot, train_continual, diagnose_memory):
            stage.Params.load(stage.__name__.split(".")[-1], dataset)
    for dataset in changed["train_mae"]["datasets"]:
        assert dataset in fetched
        train_mae.Params.load("train_mae", dataset)
    assert changed["build_report"]["recall"] in changed["classify_masked"]["datasets"]
    for dataset in changed["classify_masked"]["datasets"]:
        classify_masked.Params.load("classify_masked", dataset)
    for variant, fleet in changed["build_fleet"]["variants"].items():
        assert fleet["dataset"] in changed[fleet["base"]]["datasets"]
        build_fleet.Params.load("build_fleet", variant=variant)
    of_fleet = changed["build_fleet"]["variants"]["classes"]["dataset"]
    assert changed["vary_recipes"]["dataset"] == changed["recover_images"]["dataset"] == of_fleet
    for stage in (vary_recipes, train_auditor, condense_changes, recover_memory, recover_images, map_weight_space):
        name = stage.__name__.rpartition(".")[2]
        stage.Params.load(name)
    assert changed["build_report"]["weightnet"] in changed["build_zoo"]["datasets"]
    for dataset in changed["build_zoo"]["datasets"]:
        assert dataset in fetched
        for variant in changed["build_zoo"]["variants"]:
            build_zoo.Params.load("build_zoo", dataset, variant)
        for variant in changed["train_weightnet"]["variants"]:
            train_weightnet.Params.load("train_weightnet", dataset, variant)
        evaluate_weightnet.Params.load("evaluate_weightnet", dataset)
    for dataset in trained:
        for stage in (train_bilinear, decompose_bilinear):
            stage.Params.load(stage.__name__.rpartition(".")[2], dataset)


def test_variants_are_the_same_everywhere():
    """The analysis names what params.yaml lists; dvc.yaml's lists are computed."""
    assert set(PARAMS["train_bilinear"]["variants"]) == set(decompose_bilinear.DEPTHS)
    assert set(PARAMS["train_forecaster"]["variants"]) == set(evaluate_forecaster.VARIANTS)
    assert set(PARAMS["train_weightnet"]["tasks"]["architectures"]) <= set(PARAMS["build_zoo"]["variants"])
    assert set(evaluate_weightnet.KEPT) <= set(PARAMS["train_weightnet"]["variants"])
    fleets = PARAMS["build_fleet"]["variants"]
    assert set(fleets) == set(condense_changes.FLEETS) == set(recover_memory.CHARACTERISTICS)
    depths = {name: variant["n_layer"] for name, variant in PARAMS["train_bilinear"]["variants"].items()}
    assert depths == decompose_bilinear.DEPTHS


def test_plots_at_the_top_are_of_outputs_and_have_their_templates(stages):
    outputs = {out.def_path for stage in stages for out in stage.outs}
    resolved = {key: str(value) for key, value in PARAMS["build_report"].items()}
    for (plot,) in (plot.items() for plot in yaml.load(TEXT, Loader)["plots"]):
        title, settings = plot
        assert (ROOT / ".dvc/plots" / f"{settings['template']}.json").is_file(), title
        for path in settings["y"]:
            for key, value in resolved.items():
                path = path.replace(f"${{build_report.{key}}}", value)
            assert path in outputs, path


def test_artifacts_are_released_models_with_cards():
    """A file has its card beside it, a folder inside it, by the same name; a card has the hash of every file but itself."""
    artifacts = {Path(artifact["path"]) for artifact in yaml.load(TEXT, Loader)["artifacts"].values()}
    released = {Path(path) for path in tracked() if path.startswith("models/released/")}
    for path in artifacts:
        whole = (ROOT / path).is_dir()
        place = path / f"{path.name}.json" if whole else path.with_suffix(".json")
        card = json.loads((ROOT / place).read_text())
        hashes = {path / name: value for name, value in card["sha256"].items()} if whole else {path: card["sha256"]}
        files = {one for one in released if one in (path, place) or path in one.parents}
        assert files == {place, *hashes}
        released -= files
        for file, value in hashes.items():
            assert value == hashlib.sha256((ROOT / file).read_bytes()).hexdigest()
        assert {"learned_from"} | (set() if whole else {"scores", "limits"}) <= set(card)
    assert not released
