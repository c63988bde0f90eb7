"""Requests of several threads, run together by one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

import numpy as np

Key = TypeVar("Key")


class Gathering(Generic[Key]):
    """Runs requests that threads make at the same time as one.

    A GPU wants more rows than one thread has at a time. While it works on some, the others' requests gather; those that
    agree in their key are its next work. One thread does all of it, as MLX's streams belong to threads.

    Args:
        compute: Given rows and the key that they share; returns a row for each.
    """

    def __init__(self, compute: Callable[[np.ndarray, Key], np.ndarray]):
        self._compute = compute
        self._lock = Lock()
        self._waiting: dict[Key, list[tuple[np.ndarray, Future[np.ndarray]]]] = {}
        self._worker = ThreadPoolExecutor(1, "mlx_marlin gathering")

    def run(self, key: Key, rows: np.ndarray) -> np.ndarray:
        """What compute makes of rows; waits for it, and raises what it raises."""
        result: Future[np.ndarray] = Future()
        with self._lock:
            self._waiting.setdefault(key, []).append((rows, result))
        self._worker.submit(self._serve)
        return result.result()

    def _serve(self) -> None:
        """Serve the requests that share the key of the one that has waited longest, if any still wait."""
        with self._lock:
            if not self._waiting:
                return
            key = next(iter(self._waiting))
            requests = self._waiting.pop(key)
        try:
            found = self._compute(np.concatenate([rows for rows, _ in requests]), key)
        except BaseException as failure:  # each thread that waits is told
            for _, result in requests:
                result.set_exception(failure)
            return
        ends = np.cumsum([len(rows) for rows, _ in requests])
        for (_, result), part in zip(requests, np.split(found, ends[:-1])):
            result.set_result(part)
