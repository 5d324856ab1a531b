"""A rank that trains one recipe after another, so that many tests pay for starting Python and importing torch once.

Reads JSON lines {"arguments": [...], "variables": {...}} and answers each with {"code": ..., "printed": ...}.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import traceback


def main() -> None:
    answers = sys.stdout
    for line in sys.stdin:
        request = json.loads(line)
        for name, value in request["variables"].items():
            os.environ[name] = value
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            try:
                from pretrain.train import main as train

                code = train(request["arguments"])
            except BaseException:
                traceback.print_exc()
                code = 1
        answers.write(json.dumps({"code": code, "printed": printed.getvalue()}) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
