"""Work that one process of many does."""

from collections.abc import Callable

import torch.distributed as dist

from conf.errors import UserError


def run_on_first_rank(action: Callable[[], object]) -> None:
    """Rank 0 runs `action` while the others wait. All ranks together.

    Raises: on every rank the UserError of rank 0, so that none waits in vain, whatever launched them.
    """
    failure: list[str | None] = [None]
    if dist.get_rank() == 0:
        try:
            action()
        except UserError as error:
            dist.broadcast_object_list([str(error)])
            raise
    dist.broadcast_object_list(failure)
    if failure[0] is not None:
        raise UserError(failure[0])
