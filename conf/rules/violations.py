"""Rules as generators of messages, all of which are collected, so that one attempt shows everything to fix."""

from collections.abc import Iterable, Iterator

from conf.system.errors import ConfigError

Violations = Iterator[str]  # each names keys, values and a remedy


def refuse_violations(rules: Iterable[Violations]) -> None:
    """Run every rule.

    Raises: ConfigError listing all that is violated. If nothing is, what a rule itself raised: a rule that fails (such
    as a division by a zero, which broken_ranges reports) has checked nothing, so the configuration must not pass.
    """
    violations: list[str] = []
    failures: list[Exception] = []
    for rule in rules:
        try:
            violations.extend(rule)
        except Exception as error:
            error.add_note(f"raised by the rule {getattr(rule, '__name__', rule)}")
            failures.append(error)
    if len(violations) == 1:
        raise ConfigError(violations[0])
    if violations:
        numbered = "\n".join(f"  {number}. {message}" for number, message in enumerate(violations, 1))
        raise ConfigError(f"{len(violations)} settings cannot work:\n{numbered}")
    if failures:
        raise failures[0]
