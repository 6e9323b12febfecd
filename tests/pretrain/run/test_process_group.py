"""An environment that describes a group of processes by halves is one message, before torch waits for anybody."""

import pytest
import torch

from conf.system.errors import UserError
from pretrain.run.process_group import start_process_group

WHOLE = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 without RANK: start with torchrun"),
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE=abc, which is no whole number of at least 1"),
        ({"RANK": "0"}, "RANK=0 without WORLD_SIZE, MASTER_ADDR, MASTER_PORT: start with torchrun"),
        (WHOLE | {"MASTER_ADDR": ""}, "RANK=0 without MASTER_ADDR: start"),
        (WHOLE | {"RANK": "two"}, "RANK=two, which is no whole number of at least 0"),
        (WHOLE | {"RANK": "2"}, "RANK=2 of WORLD_SIZE=2: ranks begin at 0"),
        (WHOLE | {"MASTER_PORT": "port"}, "MASTER_PORT=port, which is no whole number"),
        (WHOLE | {"WORLD_SIZE": "2.0"}, "WORLD_SIZE=2.0, which is no whole number"),
    ],
)
def test_what_is_missing_or_wrong_is_named(environment, message, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in WHOLE:
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=message):
        start_process_group(torch.device("cpu"), 1)
