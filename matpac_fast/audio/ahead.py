"""Work done ahead in threads and handed over in order: decoding beside whoever uses the audio."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

T = TypeVar("T")

# So many jobs a worker are done ahead; and of more than one a worker only so many bytes of files, for a long recording
# is a gigabyte when decoded.
_JOBS = 8
_BYTES = 64 << 20


def in_order(jobs: Iterable[tuple[int, Callable[[], T]]], workers: int) -> Generator[T, None, None]:
    """Run jobs, each given with the size of its file, in threads; yield their results in the order of the jobs.

    Close it to drop the jobs that have not begun. An exception in a job is raised in its turn.
    """
    waiting: deque[tuple[int, Future[T]]] = deque()
    ahead = 0
    pool = ThreadPoolExecutor(workers, thread_name_prefix="decode")
    try:
        for size, job in jobs:
            waiting.append((size, pool.submit(job)))
            ahead += size
            while len(waiting) > workers and (len(waiting) > _JOBS * workers or ahead > _BYTES):
                size, future = waiting.popleft()
                ahead -= size
                yield future.result()
        while waiting:
            yield waiting.popleft()[1].result()
    finally:
        pool.shutdown(cancel_futures=True)
