"""dvc.yaml tells the truth: what a stage depends on is exactly what it imports and reads."""

import ast
import importlib
import json
import subprocess
from pathlib import Path

import pytest
import yaml
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.utils.hydra import apply_overrides
from reproduction import ROOT, scale_overrides

DVC_YAML = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]
PARAMS = yaml.safe_load((ROOT / "params.yaml").read_text())
SCALES = sorted(path.stem for path in (ROOT / "stages/scales").glob("*.args"))


@pytest.fixture(scope="module")
def stages() -> list[PipelineStage]:
    """Every stage of the default pipeline, its matrix resolved."""
    with Repo(ROOT) as repo:
        return list(repo.index.stages)


def script(stage: PipelineStage) -> Path:
    """The file of `python -m stages.x.y`, relative to the project."""
    words = stage.cmd.split()
    assert words[:2] == ["python", "-m"], stage.cmd
    return Path(*words[2].split(".")).with_suffix(".py")


def imports(path: Path) -> set[Path]:
    """The project's files that `path` imports, directly or not, and itself: DVC does not follow imports, so we do."""
    found, queue = set(), [path]
    while queue:
        path = queue.pop()
        if path in found:
            continue
        found.add(path)
        for node in ast.walk(ast.parse((ROOT / path).read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative imports escape this test"
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            candidates = [Path(*name.split(".")).with_suffix(".py") for name in names if name.startswith("stages.")]
            queue += [candidate for candidate in candidates if (ROOT / candidate).is_file()]
    return found


def arguments(stage: PipelineStage) -> dict[str, str]:
    """The `--item value` pairs of a stage's command."""
    words = stage.cmd.split()[3:]
    return {flag.removeprefix("--"): value for flag, value in zip(words[::2], words[1::2], strict=True)}


def test_stage_script_and_params_section_share_one_name(stages):
    scripts = {path.stem for path in (ROOT / "stages").rglob("*.py") if "def main()" in path.read_text()}
    assert set(DVC_YAML) == set(PARAMS) == scripts
    for stage in stages:
        assert script(stage).stem == stage.name.split("@")[0]


def test_code_dependencies_are_the_import_closure(stages):
    for stage in stages:
        listed = {Path(dep.def_path) for dep in stage.deps if dep.def_path.endswith(".py")}
        assert listed == imports(script(stage)), stage.name


def test_parameter_dependencies_are_the_keys_read(stages):
    for stage in stages:
        listed = {key for dep in stage.params for key in dep.params}
        module = importlib.import_module(".".join(script(stage).with_suffix("").parts))
        name, items = stage.name.split("@")[0], arguments(stage)
        if name == "fetch_data":  # a section for each data set, validated as a whole
            assert listed == {f"{module.SECTION}.{items['dataset']}"}
        else:
            assert listed == module.Params.dvc_keys(name, items.get("dataset"), items.get("variant")), stage.name


def test_data_dependencies_are_outputs_of_other_stages(stages):
    outputs = {Path(out.def_path) for stage in stages for out in stage.outs}
    for stage in stages:
        for dep in (Path(dep.def_path) for dep in stage.deps if Path(dep.def_path).parts[0] in ("data", "models")):
            assert dep in outputs, f"{stage.name}: {dep}"


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
            assert not out.persist, out.def_path
            assert out.use_cache or out.metric or out.plot, out.def_path


def test_nothing_cached_is_in_git_and_all_else_is(stages):
    tracked = set(subprocess.check_output(["git", "ls-files"], cwd=ROOT, text=True).splitlines())
    for out in (out for stage in stages for out in stage.outs):
        inside = {
            path for path in tracked if Path(path) == Path(out.def_path) or Path(out.def_path) in Path(path).parents
        }
        assert bool(inside) != out.use_cache, out.def_path


def test_reports_hold_what_the_pipeline_makes_and_nothing_else(stages):
    """The report depends on folders, so a leftover in one would make this copy differ from a fresh clone."""
    tracked = subprocess.check_output(["git", "ls-files", "reports"], cwd=ROOT, text=True).splitlines()
    assert set(tracked) == {out.def_path for stage in stages for out in stage.outs if not out.use_cache}


def test_lock_is_consistent(stages):
    """Every recorded hash is that of this code, these params and these outputs in git."""
    lock = yaml.safe_load((ROOT / "dvc.lock").read_text())["stages"]
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
def test_scales_set_keys_that_exist(scale, tmp_path):
    path = tmp_path / "params.yaml"
    path.write_text((ROOT / "params.yaml").read_text())
    apply_overrides(path, scale_overrides(scale))  # raises on a key that params.yaml lacks
    changed = yaml.safe_load(path.read_text())
    assert changed != PARAMS
    for section in ("train_bilinear", "build_report"):
        datasets = changed[section].get("datasets") or changed[section]["bilinear"]
        assert set(datasets) <= set(changed["fetch_data"]["datasets"]) <= set(changed["fetch_data"]["sources"])
    assert set(changed["train_bilinear"]["datasets"]) <= set(changed["train_bilinear"]["overrides"])
    assert set(changed["train_bilinear"]["datasets"]) <= set(changed["decompose_bilinear"]["overrides"])


def test_documents_name_files_that_exist():
    """Every path below the project that README names is there."""
    import re

    text = (ROOT / "README.md").read_text()
    named = set(re.findall(r"(?:stages|tests|reports)/[\w./-]+\.(?:py|args|json|png)", text))
    assert named
    assert not [path for path in named if not (ROOT / path).exists()]
