"""Counts what torch.compile compiles, step by step, and finds what is compiled again when it should not be.

A kernel here is what torch.compile makes of one function for one form of its inputs, the backward pass by itself.
On the CPU a training compiles nothing unless its code asks for it, and all counts stay 0.
"""

import logging
import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from pretrain.run.kernel_cache import KernelCache
from pretrain.run.run_status import KernelCounts

logger = logging.getLogger(__name__)

FIRST_STEPS = 20  # of a process, in which kernels are compiled; batches of every form have been seen by then
MOST_RECORDS = 4096  # that torch holds between two reads; it would drop all but 64
ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Compilation:
    """Describes one kernel. function: name and place. is_loaded: found in a cache. reason: torch's, for another form.

    is_late: compiled after the first steps, or in an evaluation after the first.
    """

    function: str
    seconds: float
    is_loaded: bool
    reason: str | None
    is_late: bool

    def __str__(self) -> str:
        what = f"{self.function} was compiled {'again ' if self.reason else ''}in {self.seconds:.1f} s"
        return f"{what} because this changed: {self.reason}" if self.reason else what


class CompilationCounter:
    """Counts compilations from torch's own records of them, and hands new kernels to the cache.

    first_step: steps done before this process. cache: saves what was compiled as soon as a step compiles nothing more.

    Attributes:
        counts: Of this process so far; whoever knows other ranks adds their late kernels.
        is_pending: Whether read_step has something to do. torch sets it while it compiles, so an ordinary step costs
            nothing but looking at it.
        new: What was counted and not taken yet.
    """

    def __init__(self, cache: KernelCache | None = None, first_step: int = 0) -> None:
        self.counts, self.is_pending = KernelCounts(), False
        self.new: list[Compilation] = []
        self._cache, self._is_unsaved = cache, False
        self._first_step, self._num_evaluations = first_step, 0
        self._functions: dict[str, str] = {}
        self._take_records = _find_records(self._note)
        self._take_records()

    def read_step(self, steps_done: int) -> int:
        """Count what the step after so many compiled. Returns how many kernels were late."""
        return self._read(steps_done - self._first_step >= FIRST_STEPS)

    def read_evaluation(self) -> int:
        """Count what the evaluation that ends compiled. Returns how many kernels were late."""
        self._num_evaluations += 1
        return self._read(self._num_evaluations > 1)

    def take_new(self) -> list[Compilation]:
        """Return what was counted since the last call."""
        new, self.new = self.new, []
        return new

    def save(self) -> None:
        """Save what was compiled since the last time; a step without compilations does so by itself."""
        if self._is_unsaved and self._cache is not None:
            self._cache.save()
        self._is_unsaved = False

    def _note(self, event: Any) -> None:
        self.is_pending = True

    def _read(self, is_late: bool) -> int:
        records = self._take_records()
        if not records:
            self.save()
            self.is_pending = False
            return 0
        found = [self._describe(record, is_late) for record in records if _made_kernel(record)]
        compiled = [one for one in found if not one.is_loaded]
        self.counts.compiled_kernels += len(compiled)
        self.counts.loaded_kernels += len(found) - len(compiled)
        self.counts.compile_seconds += sum(map(_seconds, records))
        self.new += found
        is_needed = bool(compiled) or (self._cache is not None and not self._cache.has_file)
        self._is_unsaved |= bool(found) and is_needed
        return sum(one.is_late for one in found)

    def _describe(self, record: Any, is_late: bool) -> Compilation:
        hits = (record.aotautograd_local_cache_hit_count or 0) + (record.inductor_fx_local_cache_hit_count or 0)
        is_loaded = hits > 0 and not record.inductor_fx_local_cache_miss_count
        return Compilation(self._name(record), _seconds(record), is_loaded, _reason(record), is_late)

    def _name(self, record: Any) -> str:
        """Return function and place; records of a backward pass have its forward's number alone."""
        if record.is_forward is False:
            return f"{self._functions.get(record.compile_id, 'a function')}, backward"
        name = f"{record.co_name} ({_place(record)})"
        self._functions[record.compile_id] = name
        return name


def describe_compilations(new: Iterable[Compilation]) -> str:
    """Return one line: how many kernels were compiled or loaded, how long it took, and of which functions."""
    new = list(new)
    compiled = sum(not one.is_loaded for one in new)
    parts = [f"compiled {compiled} kernels"] if compiled else []
    parts += [f"loaded {len(new) - compiled} compiled kernels"] if compiled < len(new) else []
    names = Counter(one.function.split(" ")[0] for one in new)
    of = ", ".join(f"{name} {number}" for name, number in names.items())
    return f"{' and '.join(parts)} in {sum(one.seconds for one in new):.1f} s ({of})"


def _find_records(on_compilation: Callable[[Any], None]) -> Callable[[], list[Any]]:
    """Return a function that takes torch's records since its last call; they are internals, which may move.

    on_compilation: torch calls it at the end of every compilation, before there is a record of it.
    """
    try:
        from torch._dynamo import utils
        from torch._dynamo.callback import callback_handler

        utils.set_compilation_metrics_limit(MOST_RECORDS)
        get, clear = utils.get_compilation_metrics, utils.clear_compilation_metrics
        callback_handler.register_end_callback(on_compilation)
    except (ImportError, AttributeError) as error:
        logger.warning(f"compiled kernels are not counted: torch {torch.__version__} keeps no such records ({error})")
        return list

    def take() -> list[Any]:
        records = get()
        clear()
        return records

    return take


def _made_kernel(record: Any) -> bool:
    """Return whether a record is of a kernel: neither a measurement while it ran nor a function without tensor code."""
    return not record.is_runtime and not record.fail_type and (record.is_forward is False or record.graph_op_count)


def _place(record: Any) -> str:
    path = Path(record.co_filename or "")
    path = path.relative_to(ROOT) if path.is_relative_to(ROOT) else Path(*path.parts[-2:])
    return f"{path}:{record.co_firstlineno}"


def _reason(record: Any) -> str | None:
    """Return torch's condition that no longer holds, without the kernel's number, the source line and the stack."""
    if not record.recompile_reason:
        return None
    line = record.recompile_reason.splitlines()[0].partition("  #")[0]
    return re.sub(r"^\d+/\d+: ", "", line).strip()


def _seconds(record: Any) -> float:
    return (record.duration_us or 0) / 1e6
