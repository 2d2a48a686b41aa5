"""Snapshots come in the order in which they were taken, whatever their names; where that cannot be known, they do not come."""

import os
import random
import re
from fractions import Fraction
from itertools import pairwise
from pathlib import Path

import pytest

from stages.common.stage import InputError
from stages.forecast.snapshots import Snapshots, even_subset, find_snapshots

N = 12  # snapshots
LEAST = 7
ACCURACY = [50 + (5 * i) % N for i in range(N)]  # of no order

PROGRESS = {  # names that say by a word what they count, and the interval in it if there is one
    "step": (lambda i: f"step_{20 * i}.pt", 20),
    "padded": (lambda i: f"ckpt-{i:05d}.pth", 1),
    "upper": (lambda i: f"CKPT_{i}.PT", 1),
    "word behind": (lambda i: f"{100 * i}steps.safetensors", 100),
    "metric behind": (lambda i: f"epoch{i}_acc{ACCURACY[i] / 100:.3f}.pt", 1),
    "metric in front": (lambda i: f"acc{ACCURACY[i]}_epoch{i}.pt", 1),
    "words run together": (lambda i: f"Epoch{i}ValLoss{ACCURACY[i] / 100}.pt", 1),
    "a number in the metric's name": (lambda i: f"epoch_{i}_top1_{ACCURACY[i]}.{i}.pt", 1),
    "f1": (lambda i: f"f1-{ACCURACY[i]}-e{i}.pt", 1),
    "learning rate": (lambda i: f"lr=1e-{1 + i % 3}_iter={i}.pt", 1),
    "Lightning": (lambda i: f"epoch={i // 3}-step={500 * i}.ckpt", 500),
    "Lightning's metric": (lambda i: f"epoch={i}-val_loss={ACCURACY[i] / 10:.2f}.ckpt", 1),
    "epoch and batch": (lambda i: f"batch{10 * (i % 4)}-epoch{i // 4}.pt", None),
    "percent": (lambda i: f"epoch_{1 + i // 10}_batch_{10 * (i % 10 + 1)}pct_acc_{ACCURACY[i]}.69.pt", 10),
    "decimal": (lambda i: f"epoch_{i / 2}.pt", Fraction(1, 2)),
    "unequal decimals": (lambda i: f"epoch_{i / 4}.pt", Fraction(1, 4)),
    "dotted": (lambda i: f"step.1.{i + 1}.pt", 1),
    "thousands": (lambda i: f"step_{100 * i}k.pt" if i < 10 else f"step_{i / 10}M.pt", 100_000),
    "exponent": (lambda i: f"step_{i}e3.pt", 1000),
    "a constant version": (lambda i: f"resnet18_v2_seed0_step{i}.pt", 1),
    "tar": (lambda i: f"checkpoint_{i}.pth.tar", 1),
    "date behind": (lambda i: f"epoch{i}_2024-01-{28 - i}.pt", None),
}
BARE = {  # names whose numbers no word explains
    "alone": (lambda i: f"{i}.pt", 1),
    "letter": (lambda i: f"m{i}.th", 1),
    "in front": (lambda i: f"{20 * i}_resnet18.bin", 20),
    "negative": (lambda i: f"m_{i - 5}.pt", 1),
    "date": (lambda i: f"2024-{1 + i // 6:02d}-{10 + i % 6:02d}T{9 + i}-00-{59 - i:02d}.pt", None),
    "compact date": (lambda i: f"w_2024{1 + i // 6:02d}{10 + i % 6:02d}.pt", None),
}


def write(folder: Path, names: list[str], times: list[int] | None = None) -> list[str]:
    """Write empty files, whose times grow by a minute in the order of their names if none are given."""
    for i, name in enumerate(names):
        path = folder / name
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(b"")
        os.utime(path, ns=((time := 10**18 + 60 * 10**9 * (i if times is None else times[i])), time))
    return names


def names_of(found: Snapshots) -> list[str]:
    return [snapshot.name for snapshot in found.snapshots]


def interval(found: Snapshots) -> Fraction | None:
    return None if found.steps is None else found.steps[1] - found.steps[0]


@pytest.mark.parametrize("kind", PROGRESS)
@pytest.mark.parametrize("times", ["true", "equal", "by name"])
def test_what_a_word_of_progress_counts_is_the_order_whatever_file_times_say(tmp_path, kind, times):
    name, step = PROGRESS[kind]
    names = [name(i) for i in range(N)]
    clock = {"true": list(range(N)), "equal": [0] * N, "by name": [sorted(names).index(n) for n in names]}
    write(tmp_path, names, clock[times])
    found = find_snapshots(tmp_path, LEAST)
    assert names_of(found) == names
    assert interval(found) == step


@pytest.mark.parametrize("kind", BARE)
def test_a_number_without_a_word_is_the_order_where_file_times_agree_and_is_refused_where_they_do_not(tmp_path, kind):
    name, step = BARE[kind]
    names = write(tmp_path, [name(i) for i in range(N)])
    found = find_snapshots(tmp_path, LEAST)
    assert names_of(found) == names
    assert interval(found) == step
    write(tmp_path, names, [sorted(names).index(n) for n in names])  # as `cp *` leaves them
    assert names_of(find_snapshots(tmp_path, LEAST)) == names
    write(tmp_path, names, [(5 * i) % N for i in range(N)])
    with pytest.raises(
        InputError, match=r"do not grow with file time: .*--order '.*; if file times are, --order mtime"
    ):
        find_snapshots(tmp_path, LEAST)
    by_time = sorted(names, key=lambda n: (tmp_path / n).stat().st_mtime_ns)
    assert names_of(find_snapshots(tmp_path, LEAST, "mtime")) == by_time


def test_a_number_without_a_word_orders_within_an_epoch_wherever_it_stands(tmp_path):
    names = write(tmp_path, [f"{10 * (i % 4)}-epoch{i // 4}.pt" for i in range(N)])
    assert names_of(find_snapshots(tmp_path, LEAST)) == names


def test_the_regular_expression_of_a_refusal_is_a_remedy(tmp_path):
    names = write(tmp_path, [f"run_a.{i}-x.pt" for i in range(N)], [(5 * i) % N for i in range(N)])
    with pytest.raises(InputError) as error:
        find_snapshots(tmp_path, LEAST)
    pattern = re.search(r"--order '(.*?)'", str(error.value))[1]
    assert names_of(find_snapshots(tmp_path, LEAST, pattern)) == names


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (lambda i: f"model_{ACCURACY[i] / 100}.pt", "may be measured, or no order"),
        (lambda i: f"acc_{ACCURACY[i]}_lr0.{i + 1}.pt", "no number in names such as .* says when"),
        (lambda i: f"seed{i // 6}_step{i % 6}.pt", r"several runs \(seed 0, seed 1\): move each"),
        (lambda i: f"{i % 4}-{i}.pt", "may be measured, or no order"),
        (lambda i: f"step_{i // 2}_acc{i}.pt", "step_0_acc0.pt and step_0_acc1.pt have the same number: keep one"),
        (
            lambda i: f"step_{i}.pt" if i else "start.pt",
            r"no number in the name of start.pt.* --order 'step_\(\\d\+\)'",
        ),
        (lambda i: f"{'ab'[i % 2]}_step_{i}.pt", r"names of two kinds: .*--order 'a_step_\(\\d\+\)' or --order mtime"),
        (lambda i: f"{'abcdefghijkl'[i]}.pt", "no number in the name of a.pt, so its place is not known: .*mtime"),
    ],
)
def test_what_is_ambiguous_is_refused_in_one_line_that_names_a_remedy(tmp_path, name, message):
    write(tmp_path, [name(i) for i in range(N)], [0] * N)
    with pytest.raises(InputError, match=message) as error:
        find_snapshots(tmp_path, LEAST)
    assert "\n" not in str(error.value)


def test_days_before_months_are_refused_where_a_month_ends(tmp_path):
    names = write(tmp_path, [f"{1 + (24 + i) % 30:02d}-{4 + (24 + i) // 30:02d}-2024.pt" for i in range(N)])
    with pytest.raises(InputError, match="do not grow with file time"):
        find_snapshots(tmp_path, LEAST)
    assert names_of(find_snapshots(tmp_path, LEAST, r"(\d+)-(\d+)-(\d+)")) != names
    assert names_of(find_snapshots(tmp_path, LEAST, "mtime")) == names


def test_the_latest_copy_the_optimisers_and_hidden_files_are_left_out_and_said(tmp_path):
    names = write(tmp_path, [f"step_{i}.pt" for i in range(N)])
    others = ["best.pth", "best_acc_0.9.pt", "last.ckpt", "model.safetensors", "optimizer_3.pt", "scheduler.pt"]
    write(tmp_path, [*others, ".step_999.pt", "._step_1.pt", "notes.txt", "events.out.1", "7.json"])
    found = find_snapshots(tmp_path, LEAST)
    assert names_of(found) == names
    assert found.left_out == sorted(others)
    assert str(found) == (
        f"{N} snapshots by step, every 1: step_0.pt, step_1.pt, ..., step_11.pt\nleft out: best.pth and 5 more"
    )


def test_words_that_all_names_share_leave_nothing_out(tmp_path):
    names = write(tmp_path, [f"best_optimizer_step_{i}.pt" for i in range(N)])
    assert names_of(find_snapshots(tmp_path, LEAST)) == names


def test_folders_of_checkpoints_are_ordered_by_their_names_and_give_their_weights(tmp_path):
    inside = ["optimizer.pt", "scheduler.pt", "rng_state.pth", "training_args.bin", "trainer_state.json"]
    for i in range(N):
        weights = "model.safetensors" if i % 2 else "pytorch_model.bin"
        write(tmp_path, [f"checkpoint-{500 * i}/{name}" for name in [*inside, weights]], [i] * 6)
    write(tmp_path, ["pytorch_model.bin", "logs/x.pt", "forecasts/forecast-1.safetensors"])
    found = find_snapshots(tmp_path, LEAST)
    assert names_of(found) == [f"checkpoint-{500 * i}" for i in range(N)]
    assert {path.name for path in found.paths} == {"model.safetensors", "pytorch_model.bin"}
    (tmp_path / "checkpoint-0/pytorch_model.bin").unlink()
    write(tmp_path, ["checkpoint-0/model-1-of-2.safetensors", "checkpoint-0/model.safetensors.index.json"])
    assert find_snapshots(tmp_path, LEAST).paths[0].name == "model.safetensors.index.json"  # of shards


@pytest.mark.parametrize(
    ("folder", "inside", "weights"),
    [
        ("checkpoint-{}", ["latest", "rng_state_0.pth"], "global_step{}/mp_rank_00_model_states.pt"),  # DeepSpeed's
        (
            "epoch=0-step={}.ckpt",
            ["checkpoint/zero_pp_rank_0_optim_states.pt"],
            "checkpoint/mp_rank_00_model_states.pt",
        ),
        ("iter_{:07d}", [], "mp_rank_00/model_optim_rng.pt"),  # Megatron's
    ],
)
def test_weights_in_a_folder_of_a_checkpoints_folder_are_found(tmp_path, folder, inside, weights):
    for i in range(N):
        write(tmp_path, [f"{folder.format(i)}/{name.format(i)}" for name in (*inside, weights)])
    found = find_snapshots(tmp_path, LEAST)
    assert names_of(found) == [folder.format(i) for i in range(N)]
    assert [path.relative_to(tmp_path) for path in found.paths] == [
        Path(folder.format(i)) / weights.format(i) for i in range(N)
    ]
    for i in range(N):
        write(tmp_path, [f"{folder.format(i)}/{Path(weights.format(i)).parent}/text_encoder.pt"])
    with pytest.raises(InputError, match=r"got 0: .* holds several files of weights, .* and text_encoder.pt: leave"):
        find_snapshots(tmp_path, LEAST)


def test_shards_of_the_network_in_the_end_are_no_snapshots(tmp_path):
    write(tmp_path, [f"checkpoint-{500 * i}/model.safetensors" for i in range(N)])
    shards = write(tmp_path, [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)])
    found = find_snapshots(tmp_path, LEAST)
    assert names_of(found) == [f"checkpoint-{500 * i}" for i in range(N)]
    assert found.left_out == shards


def test_too_few_say_where_there_are_more(tmp_path):
    with pytest.raises(InputError, match="is no folder"):
        find_snapshots(tmp_path / "missing", LEAST)
    write(tmp_path, [f"step_{i}.pt" for i in range(3)])
    with pytest.raises(InputError, match=r"expected 7 snapshots or more .* got 3: save the run's weights more often"):
        find_snapshots(tmp_path, LEAST)
    write(tmp_path, [f"run/step_{i}.pt" for i in range(N)])
    with pytest.raises(InputError, match=r"got 3: hand over the folder that holds them, such as .*/run"):
        find_snapshots(tmp_path, LEAST)


@pytest.mark.parametrize(
    ("name", "remedy"),
    [
        ("weights.{}.h5", "convert them to .safetensors"),
        ("{}.ONNX", "convert them to .safetensors"),
        ("step-{}/__0_0.distcp", "dcp_to_torch_save"),
        ("checkpoint-{}/pytorch_model_fsdp_0/__0_0.distcp", "dcp_to_torch_save"),
        ("{}/default/manifest.ocdbt", "convert them to .safetensors"),
        ("rl_model_{}_steps.zip", "out of each"),
    ],
)
def test_files_of_other_kinds_are_named(tmp_path, name, remedy):
    write(tmp_path, [name.format(i) for i in range(N)])
    with pytest.raises(InputError, match=f"got 0: {Path(name).name.format(0)} is none .*{remedy}"):
        find_snapshots(tmp_path, LEAST)


def test_an_order_by_hand_takes_what_it_finds_and_its_mistakes_are_said(tmp_path):
    names = write(tmp_path, [f"a{i}_b{(5 * i) % N}.pt" for i in range(N)] + ["c.pt"])
    found = find_snapshots(tmp_path, LEAST, r"b(\d+)")
    assert [int(re.findall(r"\d+", name)[1]) for name in names_of(found)] == list(range(N))
    assert (found.left_out, interval(found)) == (["c.pt"], 1)
    texts = find_snapshots(tmp_path, LEAST, r"^(a\d+)")
    assert (names_of(texts), texts.steps) == (names[:N], None)  # a2 before a10
    for order, message in [
        (r"b\d+", "has no group: put what orders"),
        ("b(", "is no regular expression"),
        (r"d(\d+)", "is found in no name in .*, such as a0_b0.pt: mend"),
        (r"(b)", "a0_b0.pt and a10_b2.pt have the same groups in --order"),
        (r"b(\d)$", "is found in no name"),
    ]:
        with pytest.raises(InputError, match=message) as error:
            find_snapshots(tmp_path, LEAST, order)
        assert "\n" not in str(error.value)
    write(tmp_path, names, [0] * len(names))
    with pytest.raises(InputError, match="have the same file time: give the order by --order 'REGEX'"):
        find_snapshots(tmp_path, LEAST, "mtime")


def test_uneven_steps_are_refused_and_the_subset_that_is_named_is_even(tmp_path):
    steps = [1, 2, 3, 5, 9, 13, 17, 21, 25, 29, 30]
    write(tmp_path, [f"step_{20 * s}.pt" for s in steps])
    with pytest.raises(
        InputError, match=r"8 snapshots every 80, step_20.pt to step_580.pt, are: take these alone by --even"
    ):
        find_snapshots(tmp_path, LEAST)
    found = find_snapshots(tmp_path, LEAST, even=True)
    assert found.steps == list(range(20, 581, 80))
    assert found.left_out == ["step_40.pt", "step_60.pt", "step_600.pt"]
    assert len(find_snapshots(tmp_path, LEAST, "mtime").paths) == len(steps)  # by hand: no steps are known
    with pytest.raises(InputError, match="--even: the names do not tell steps"):
        find_snapshots(tmp_path, LEAST, "mtime", even=True)
    with pytest.raises(InputError, match=r"uneven steps .* no 9 snapshots are evenly spaced"):
        find_snapshots(tmp_path, 9)


def test_rounded_steps_count_as_even(tmp_path):
    names = write(tmp_path, [f"epoch_{i * 0.33:.1f}.pt" for i in range(N)])
    with pytest.raises(InputError, match="uneven steps"):
        find_snapshots(tmp_path, LEAST)
    for name in names:
        (tmp_path / name).unlink()
    names = write(tmp_path, [f"epoch_{i / 3:.2f}.pt" for i in range(N)])
    assert names_of(find_snapshots(tmp_path, LEAST)) == names


def test_an_even_subset_is_the_longest_progression_and_of_several_the_last():
    generator = random.Random(0)
    for _ in range(30):
        steps = sorted(generator.sample(range(40), 12))
        places = even_subset([Fraction(step) for step in steps])
        chosen = [steps[i] for i in places]
        assert len({b - a for a, b in pairwise(chosen)}) == 1
        longest, last = 0, 0
        for start in steps:
            for gap in range(1, 40):
                length = next(n for n in range(1, 50) if start + n * gap not in steps)
                longest, last = max((longest, last), (length, start + (length - 1) * gap))
        assert (len(chosen), chosen[-1]) == (longest, last)


def test_any_names_give_each_snapshot_once_or_one_line(tmp_path):
    """Names drawn from pieces that people use: the order is a permutation of what is not left out, or is refused."""
    generator = random.Random(0)
    words = [
        "step",
        "epoch",
        "batch",
        "acc",
        "loss",
        "model",
        "ckpt",
        "v",
        "seed",
        "best",
        "run",
        "lr",
        "top1",
        "e",
        "s",
    ]
    words += ["2024-01-", "_", "-"]
    answers = 0
    for trial in range(200):
        folder = tmp_path / str(trial)
        pieces = [generator.choice(words) + generator.choice(["", "_", "=", "-", "."]) for _ in range(3)]
        scale = [generator.choice([0, 1, 7, 0.1, -3]) for _ in pieces]
        start = [generator.choice([0, 5]) for _ in pieces]
        names = {
            "".join(p + f"{a + b * i:g}" for p, a, b in zip(pieces, start, scale, strict=True)) + ".pt"
            for i in range(9)
        }
        write(folder, sorted(names - {".pt"}), [generator.randrange(5) for _ in names])
        try:
            found = find_snapshots(folder, LEAST)
        except InputError as error:
            assert "\n" not in str(error), error
            assert ": " in str(error), error
            continue
        answers += 1
        assert sorted(names_of(found) + found.left_out) == sorted(n for n in names if not n.startswith("."))
    assert 20 < answers < 180
