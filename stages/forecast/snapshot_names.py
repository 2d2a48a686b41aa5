"""What names of snapshots say: words, and numbers that count something, measure something, or tell the time."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

SUFFIXES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".th", ".tar")

LEVELS = {  # words of progress: what changes least comes first
    0: "task phase stage cycle era round generation gen",
    1: "epoch epochs ep e",
    2: "step steps s iter iters iteration iterations it itr i batch batches update updates checkpoint ckpt chkpt snapshot snap "
    "save tick kimg images samples examples tokens pct percent",
}
PROGRESS = {word: level for level, words in LEVELS.items() for word in words.split()}


def vocabulary(text: str) -> frozenset[str]:
    """Return the words of a text as a set."""
    return frozenset(text.split())


MEASURED = vocabulary(  # or set by hand
    "acc accuracy loss lr auc err error f map miou iou ppl perplexity bleu rouge cer wer psnr ssim fid mse mae rmse nll elbo "
    "reward return dice kappa corr metric precision recall score grad norm wd decay temperature temp bs dropout momentum"
)
MEASURED_ENDS = ("loss", "acc", "accuracy", "error", "score", "auc")  # of words run together: valacc
RUNS = vocabulary("seed fold run rank gpu worker version v trial exp experiment split replica member")
COPIES = vocabulary("best last latest final current")  # of some other snapshot
GENERIC = vocabulary("model checkpoint ckpt weights pytorch net network state dict")  # and no number: the latest one
COMPANIONS = vocabulary("optimizer optimiser optim scheduler sched scaler rng args")  # not weights

# top1, f1, map50: a name of a measure with a number in it, before the measured number itself
MEASURE = re.compile(r"(?i)(?<![a-z])(?:top|f|r|map|acc|prec|recall)[@-]?\d{1,2}(?=[_=:@ -]+\d)")
MEASURED_NUMBER = "measured"  # the word of one
NUMBER = (  # with a sign where no hyphen would stand: m_-5
    r"(?P<sign>(?:(?<=[_= (])|^)-)?(?P<digits>\d+{fraction})"
    r"(?P<exponent>[eE][+-]?\d{{1,2}}(?![0-9A-Za-z]))?(?P<unit>[kKmMbB](?![0-9A-Za-z]))?"
)
UNITS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9}
CLOCK = re.compile(  # a date from 1900 on, a second since 1970 in 10 or 13 digits: of when, not of how far
    r"(?<!\d)(?:(?:19|20)\d\d[-_.]?(?:0[1-9]|1[0-2])[-_.]?(?:0[1-9]|[12]\d|3[01])(?:\d{6})?|1\d{9}(?:\d{3})?)(?!\d)"
)


@dataclass(frozen=True)
class Number:
    """A number in a name. word: the known one next to it, or ""; start: of the words before it; begin, end: its own place."""

    value: Fraction
    word: str
    start: int
    begin: int
    end: int
    fraction: str  # its digits behind the point

    @property
    def level(self) -> int | None:
        """The level of progress that it counts, or None if it counts none."""
        return PROGRESS.get(self.word)


def stem(name: str) -> str:
    """Return a name without the suffixes of files of weights."""
    while (path := Path(name)).suffix.lower() in SUFFIXES:
        name = path.stem
    return name


def show(value: Fraction) -> str:
    """Return a number as people write it."""
    return str(value) if value.denominator == 1 else f"{float(value):g}"


def words_in(text: str) -> list[str]:
    """Return the words of a text in lower case; valLoss has two."""
    return [word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", text)]


def meaning(words: Sequence[str]) -> str:
    """Return the first of some words that is known, MEASURED_NUMBER for that of a measure, or ""."""
    for word in words:
        if word in MEASURED or (word not in PROGRESS and word.endswith(MEASURED_ENDS)):
            return MEASURED_NUMBER
        if word in PROGRESS or word in RUNS:
            return word
    return ""


def read_numbers(name: str, dotted: bool) -> list[Number]:
    """Return the numbers of a name without suffixes. dotted: 1.10 is two of them, not a decimal one."""
    text = MEASURE.sub(lambda match: "lr".ljust(len(match[0]), "_"), name)  # a measure of letters alone, as long
    numbers, start = [], 0
    for match in re.finditer(NUMBER.format(fraction="" if dotted else r"(?:\.\d+)?"), text):
        before = words_in(text[start : match.start()])[::-1]
        touches = text[: match.start()][-1:].isalpha()
        # a letter alone counts where the number follows at once: e10, but not t_e_10
        word = meaning([w for i, w in enumerate(before) if len(w) > 1 or (i == 0 and touches)])
        start_of_words, start = start, match.end()
        attached = re.match(r"[A-Za-z]{2,}", text[match.end() :])  # 500steps, 10pct
        if not word and attached and (word := meaning(words_in(attached[0])[:1])):
            start += attached.end()
        value = Fraction(match["digits"] + (match["exponent"] or "")) * UNITS[(match["unit"] or "").lower()]
        fraction = match["digits"].partition(".")[2]
        sign = -1 if match["sign"] else 1
        numbers.append(Number(sign * value, word, start_of_words, match.start(), match.end(), fraction))
    return numbers


def read_names(names: list[str]) -> list[list[Number]]:
    """Return the numbers of all names; 1.9 and 1.10 are decimals unless some of them is written as no decimal would be."""
    numbers = [read_numbers(name, dotted=False) for name in names]
    fractions = [number.fraction for row in numbers for number in row if number.fraction and not is_measured(number)]
    if len({len(f) for f in fractions}) > 1 and any(len(f) > 1 and f.endswith("0") for f in fractions):
        return [read_numbers(name, dotted=True) for name in names]
    return numbers


def is_measured(number: Number) -> bool:
    """Whether a number was measured or set, so that it is no order."""
    return number.word == MEASURED_NUMBER


def kind_of(name: str, numbers: list[Number]) -> str:
    """Return what a name has besides numbers."""
    pieces, end = [], 0
    for number in numbers:
        pieces.append(name[end : number.begin])
        end = number.end
    return "#".join([*pieces, name[end:]])


def pattern_of(name: str, numbers: list[Number]) -> str:
    """Return a regular expression for `--order` that finds these numbers of a name."""
    pieces = [
        re.escape(name[n.start : n.begin]).replace(r"\-", "-")
        + ("(-?" if n.value < 0 else "(")
        + (r"\d+\.\d+)" if n.fraction else r"\d+)")
        for n in numbers
    ]
    return ".*".join(pieces)
