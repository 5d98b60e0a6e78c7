"""One checkout with its cluster, asked through pipes: a script of ``sides``, run with that checkout on PYTHONPATH.

It knows of raymoe only what every release has: ``launch``, ``generate`` and the report of decode steps. A line of JSON
is a question, another the answer; standard output belongs to them, and whatever libraries print goes to standard error.
"""

import json
import os
import sys
from typing import Any, TextIO

APP = "survival"


def decode(moe: Any, asked: dict[str, Any]) -> dict[str, Any]:
    """The tokens of an answer, and the mean time of its decode steps."""
    before = moe.service.report()
    result = moe.generate(asked["prompt"], max_tokens=asked["tokens"], temperature=0.0, ignore_eos=True)
    after = moe.service.report()
    tpot_s = (after.decode_s - before.decode_s) / (after.steps - before.steps)
    return {"tpot_s": tpot_s, "tokens": list(result.token_ids)}


def serve(config: dict[str, Any], questions: TextIO, answers: TextIO) -> None:
    """Start a cluster, and answer until there are no more questions."""
    import ray

    import raymoe

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    with raymoe.launch(config, app=APP) as moe:
        print(json.dumps({"raymoe": raymoe.__file__}), file=answers, flush=True)
        for question in questions:
            print(json.dumps(decode(moe, json.loads(question))), file=answers, flush=True)
    ray.shutdown()


if __name__ == "__main__":
    with os.fdopen(os.dup(sys.stdout.fileno()), "w") as pipe:
        os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
        serve(json.loads(sys.argv[1]), sys.stdin, pipe)
