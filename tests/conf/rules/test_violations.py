"""All violations come in one message, and a rule that raises has not passed."""

from collections.abc import Iterator

import pytest

from conf.rules.violations import refuse_violations
from conf.system.errors import ConfigError


def says(*messages: str) -> Iterator[str]:
    yield from messages


def divides_by_zero(*messages: str) -> Iterator[str]:
    yield from messages
    yield str(1 / len(()))


def test_nothing_violated_passes() -> None:
    refuse_violations([says(), says()])


def test_one_violation_is_the_message() -> None:
    with pytest.raises(ConfigError, match=r"^a=0 must be positive$"):
        refuse_violations([says(), says("a=0 must be positive")])


def test_all_violations_are_numbered() -> None:
    with pytest.raises(ConfigError, match=r"(?s)^3 settings cannot work:.*1\. a.*2\. b.*3\. c$"):
        refuse_violations([says("a", "b"), says("c")])


def test_a_rule_that_raises_is_a_failed_rule_with_its_name() -> None:
    with pytest.raises(ZeroDivisionError) as caught:
        refuse_violations([says(), divides_by_zero()])
    assert caught.value.__notes__ == ["raised by the rule divides_by_zero"]


def test_what_a_raising_rule_and_others_reported_explains_it() -> None:
    with pytest.raises(ConfigError, match=r"(?s)2 settings.*a=0.*b=0"):
        refuse_violations([divides_by_zero("a=0"), says("b=0")])
