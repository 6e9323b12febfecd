"""Every figure of the benchmark has a name, a place in the results and, for some, a bound that it should meet.

tests/bench/GPU.md has a row for each, by these names.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from tests.bench.gpu.attention import FLASH
from tests.bench.gpu.attention import WAYS as ATTENTION_WAYS
from tests.bench.gpu.head import FORMED, RECOMPUTED, RECOMPUTED_CHUNK
from tests.bench.gpu.head import list_ways as list_head_ways
from tests.bench.gpu.operators import list_ways as list_operator_ways
from tests.bench.gpu.steps import AGAIN, CONTRIBUTIONS, FP8, RECIPE
from tests.bench.joint.sides import AR, OURS

NOT_YET = "not yet"
GIGABYTE = 1e9
TIMES, TERAFLOPS, GIGABYTES, MILLISECONDS, WHOLE, SHARE, SMALL = (
    "{:.2f}x", "{:.0f}", "{:.2f} GB", "{:.2f} ms", "{:.0f}", "{:.1%}", "{:.1e}"
)  # fmt: skip
Read = Callable[[Any], Any]
FASTER, LEANER = {4096: 1.1, 16384: 1.2}, {0: 0.6}  # than the recipe


@dataclass(frozen=True)
class Figure:
    """A figure is read from the results of one part at one length.

    read: raises KeyError where it was not measured, Failed where it failed.
    at_least, at_most: bounds by length; 0 is for every length that is not named.
    """

    name: str
    part: str
    read: Read
    form: str
    at_least: Mapping[int, float] = field(default_factory=dict)
    at_most: Mapping[int, float] = field(default_factory=dict)

    def wanted(self) -> str:
        """Return the bounds as a cell of the table."""
        bounds = [(">=", self.at_least), ("<=", self.at_most)]
        return ", ".join(
            f"{sign} {bound}x" + (f" at {length}" if length else "")
            for sign, by_length in bounds
            for length, bound in by_length.items()
        )

    def cell(self, results: Mapping[str, Any], length: int) -> str:
        """Return what was measured, with met or missed where there is a bound, or why there is nothing."""
        try:
            value = self.read(results[self.part][str(length)])
        except KeyError:
            return NOT_YET
        except Failed as failure:
            return f"failed: {failure}"
        if value is None:
            return "unknown"
        return self.form.format(value) + self._verdict(value, length)

    def _verdict(self, value: float, length: int) -> str:
        low, high = (by_length.get(length, by_length.get(0)) for by_length in (self.at_least, self.at_most))
        if low is None and high is None:
            return ""
        met = (low is None or value >= low) and (high is None or value <= high)
        return " (met)" if met else " (missed)"


class Failed(Exception):
    """A figure's input could not be measured; the message is the error's kind."""


def take(name: str, key: str, scale: float = 1.0) -> Read:
    """Return a function that reads results[name][key] / scale."""

    def read(results: Any) -> Any:
        if "error" in results:
            raise Failed(results["error"].split(":")[0])
        found = results[name]
        if "error" in found:
            raise Failed(found["error"].split(":")[0])
        return found[key] if not isinstance(found[key], int | float) else found[key] / scale

    return read


def divide(above: Read, below: Read) -> Read:
    """Return a function that divides what `above` reads by what `below` reads."""
    return lambda results: above(results) / below(results)


def build_figures() -> list[Figure]:
    """Build all figures, in the order of the table."""
    return [*_steps(), *_recompute(), *_contributions(), *_attention(), *_head(), *_operators(), *_saved(), *_fp8()]


def compare(key: str, above: str, below: str) -> Read:
    """Return a function that reads results[above][key] / results[below][key]."""
    return divide(take(above, key), take(below, key))


def _steps() -> list[Figure]:
    figures = [
        Figure(
            "joint step, ours over recipe: tokens/s", "steps", compare("tokens_per_second", OURS, RECIPE), TIMES,
            at_least=FASTER,
        ),
        Figure(
            "joint step, ours over recipe: memory", "steps", compare("peak_bytes", OURS, RECIPE), TIMES,
            at_most=LEANER,
        ),
        Figure("joint step, ours against recipe: difference of results", "steps", take(OURS, "difference"), SMALL),
        Figure("joint step over AR step, ours: time", "steps", compare("seconds", OURS, AR), TIMES),
    ]  # fmt: skip
    for name, label in ((AR, "AR step, ours"), (OURS, "joint step, ours"), (RECIPE, "joint step, recipe")):
        figures += [
            Figure(f"{label}: tokens/s", "steps", take(name, "tokens_per_second"), WHOLE),
            Figure(f"{label}: MFU", "steps", take(name, "mfu"), SHARE),
            Figure(f"{label}: memory", "steps", take(name, "peak_bytes", GIGABYTE), GIGABYTES),
        ]
    return figures


def _recompute() -> list[Figure]:
    label, part = f"joint step, {AGAIN}", "recompute"
    speed, memory = (compare(key, AGAIN, RECIPE) for key in ("tokens_per_second", "peak_bytes"))
    return [
        Figure(f"{label}, over recipe: tokens/s", part, speed, TIMES, at_least=FASTER),
        Figure(f"{label}, over recipe: memory", part, memory, TIMES, at_most=LEANER),
        Figure(f"{label}, over ours: time", part, compare("seconds", AGAIN, OURS), TIMES),
        Figure(f"{label}, over ours: memory", part, compare("peak_bytes", AGAIN, OURS), TIMES),
        Figure(f"{label}, against ours: difference of results", part, take(AGAIN, "difference"), SMALL),
    ]


def _contributions() -> list[Figure]:
    figures = []
    for before, name in pairwise(CONTRIBUTIONS):
        label = "joint step, + trainer with megatron-core's modules" if name == OURS else f"joint step, {name}"
        speed_up = divide(take(before, "seconds"), take(name, "seconds"))
        memory = divide(take(name, "peak_bytes"), take(before, "peak_bytes"))
        figures += [
            Figure(f"{label}: speed-up by it", "contributions", speed_up, TIMES),
            Figure(f"{label}: memory by it", "contributions", memory, TIMES),
        ]
    return figures


def _attention() -> list[Figure]:
    def fastest(results: Any) -> str:
        if results["fastest"] is None:
            raise Failed("none works")
        return results["fastest"]

    def over_dense(results: Any) -> float:
        return take(fastest(results), "tflops")(results) / take(FLASH, "tflops")(results)

    ways = [Figure(f"attention, {way}: TFLOP/s", "attention", take(way, "tflops"), TERAFLOPS) for way in ATTENTION_WAYS]
    return [
        *ways,
        Figure("attention of the joint mask: fastest", "attention", fastest, "{}"),
        Figure(f"attention, the fastest over {FLASH}: TFLOP/s", "attention", over_dense, TIMES),
    ]


def _head() -> list[Figure]:
    figures = []
    for way in list_head_ways():
        figures.append(Figure(f"head, {way}: time", "head", take(way, "seconds", 1e-3), MILLISECONDS))
        figures.append(Figure(f"head, {way}: memory", "head", take(way, "peak_bytes", GIGABYTE), GIGABYTES))
    formed, again = (f"{way}, chunks of {RECOMPUTED_CHUNK}" for way in (FORMED, RECOMPUTED))
    for key, label in (("seconds", "time"), ("peak_bytes", "memory")):
        name = f"head, {FORMED} over {RECOMPUTED}: {label}"
        figures.append(Figure(name, "head", divide(take(formed, key), take(again, key)), TIMES))
    return figures


def _operators() -> list[Figure]:
    return [
        Figure(f"{way}: time", "operators", take(way, "seconds", 1e-3), MILLISECONDS) for way in list_operator_ways()
    ]


SAVED = "saved for the backward by"


def _saved() -> list[Figure]:
    sides = (RECIPE, OURS, AGAIN)
    return [
        Figure(f"{SAVED} {what}, {name}: tensors of [2L, hidden]", "saved", take(name, what), "{:.1f}")
        for what in ("layer", "head")
        for name in sides
    ]


def _fp8() -> list[Figure]:
    speed_up = divide(take(FP8, "tokens_per_second"), take(OURS, "tokens_per_second"))
    return [
        Figure("joint step, fp8 over bf16: tokens/s", "fp8", speed_up, TIMES),
        Figure("joint step, fp8: MFU of the bf16 peak", "fp8", take(FP8, "mfu"), SHARE),
    ]


def list_failures(results: Mapping[str, Any]) -> list[str]:
    """List every error in full, with where it happened."""
    found = []
    for part, by_length in results.items():
        for length, names in by_length.items():
            if "error" in names:
                found.append(f"{part}, L {length}: {names['error']}")
                continue
            errors = {name: item["error"] for name, item in names.items() if isinstance(item, dict) and "error" in item}
            found += [f"{part}, L {length}, {name}: {error}" for name, error in errors.items()]
    return found
