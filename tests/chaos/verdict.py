"""What is wrong with a run: tokens, hangs, improper ends, needless errors, and what was left."""

from typing import Any

from tests.answers import Answer, Checker, check_answers
from tests.chaos.play import Run
from tests.chaos.report import needless_errors, summary


def judge(run: Run) -> dict[str, Any]:
    """The summary of a run, with everything that is wrong under ``failures``.

    Tokens that came before an error are checked as well: what a user has read must be right.
    """
    asked = run.client.asked
    checker = Checker()
    answers = [Answer(prompt=one.prompt, texts=one.texts) for one in asked if one.texts]
    failures = [*run.failures, *check_answers(answers, checker)]
    failures += [f"a request: {one.said}" for one in asked if one.outcome in ("improper", "hang")]
    failures += needless_errors(asked, run.happenings)
    if not any(one.outcome == "answered" for one in asked):
        failures.append("no request was answered")
    return summary(asked, run.happenings, wrong_tokens=checker.wrong_tokens, failures=failures)
