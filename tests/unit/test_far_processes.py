"""Processes of a benchmark's cluster end with the one that started them, however it ends."""

import multiprocessing

from benchmarks.cacheless.cluster import heard


def test_questions_are_heard_as_they_were_asked() -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.send(("link", 5.0))
    assert heard(theirs) == ("link", 5.0)


def test_whoever_is_left_alone_stops() -> None:
    ours, theirs = multiprocessing.Pipe()
    ours.close()
    assert heard(theirs) == ("stop",)
