"""Run a worker process: it takes tasks from the pipe it was started with, one after another, until the pipe closes.

Started as `python -m data_pipeline.prepare.worker FD` by pool.py. It imports no torch and encodes on one thread. When
the parent is gone, the next report fails and the worker ends.
"""

import sys
import time
import traceback
from multiprocessing.connection import Connection

from conf.system.errors import UserError
from data_pipeline.encoder import RecordEncoder
from data_pipeline.prepare.shards import Advance, Done, Failed, Job, TokenizeTask, tokenize_part

REPORT_SECONDS = 0.2


class _Reporter:
    """Adds up what is reported and sends the sum now and then."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._sum: Advance | None = None
        self._sent = time.monotonic()

    def __call__(self, advance: Advance) -> None:
        if self._sum is None:
            self._sum = advance
        else:
            self._sum.progress += advance.progress
            self._sum.tokens += advance.tokens
            self._sum.skipped += advance.skipped
        if time.monotonic() - self._sent >= REPORT_SECONDS:
            self.flush()

    def flush(self) -> None:
        if self._sum is not None:
            self._connection.send(self._sum)
        self._sum, self._sent = None, time.monotonic()


def main(descriptor: int) -> None:
    """Serve the parent at the other end of a pipe: first a Job comes, then tasks."""
    connection = Connection(descriptor)
    try:
        job: Job = connection.recv()
        encoder: RecordEncoder | None = None
        while True:
            task: TokenizeTask = connection.recv()
            try:
                if encoder is None:
                    encoder = job.build_encoder()
                reporter = _Reporter(connection)
                tokenize_part(job, task, encoder, reporter)
                reporter.flush()
                connection.send(Done())
            except UserError as error:
                connection.send(Failed(str(error), is_user_error=True))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        return  # the parent has no more to do, or is gone
    except BaseException:
        connection.send(Failed(traceback.format_exc(), is_user_error=False))


if __name__ == "__main__":
    main(int(sys.argv[1]))
