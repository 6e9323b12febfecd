"""Rules as generators of messages: all of them are collected, so that one attempt shows everything to mend."""

from collections.abc import Iterable, Iterator

from conf.system.errors import ConfigError

Violations = Iterator[str]  # each names keys, values and a remedy


def refuse_violations(rules: Iterable[Violations]) -> None:
    """Run every rule. Raises ConfigError listing all that is violated."""
    violations = [message for rule in rules for message in _collect(rule)]
    if len(violations) == 1:
        raise ConfigError(violations[0])
    if violations:
        numbered = "\n".join(f"  {number}. {message}" for number, message in enumerate(violations, 1))
        raise ConfigError(f"{len(violations)} settings cannot work:\n{numbered}")


def _collect(messages: Violations) -> list[str]:
    try:
        return list(messages)
    except ZeroDivisionError:  # a zero that broken_ranges has already reported
        return []
