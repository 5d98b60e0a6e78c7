"""Asking workers directly, as tests do: each has one owner, and is waited for to the end."""

import time

from raymoe.errors import ExpertUnavailableError
from raymoe.experts.call import ExpertAnswer
from raymoe.transport.client import WorkerClient
from raymoe.types import DeviceName


def gather(client: WorkerClient, requests: dict[int, DeviceName], timeout_s: float) -> dict[int, ExpertAnswer]:
    """The answers to all of these. Raises ExpertUnavailableError for a worker's error or silence."""
    answers: dict[int, ExpertAnswer] = {}
    deadline_s = time.monotonic() + timeout_s
    while open_requests := requests.keys() - answers.keys():
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            late = ", ".join(sorted({requests[request] for request in open_requests}))
            raise ExpertUnavailableError(f"no answer from worker {late} within {timeout_s:g} s")
        for received in client.receive(left_s, open_requests):
            if received.answer is None:
                raise ExpertUnavailableError(f'worker "{requests[received.request]}": {received.error}')
            answers[received.request] = received.answer
    return answers
