"""Log lines as JSON."""

from __future__ import annotations

import json
import subprocess
import sys

SCRIPT = """
import logging, threading, warnings
from vllm_di.logs import configure, held_back

log = logging.getLogger("a.part")
with held_back() as held:
    log.warning("early %s", "one")
    held.format = "{format}"
log.info("not shown")
log.error("with a field", extra={{"fields": {{"request_id": "r-1", "odd": {{1, 2}}}}}})
log.warning("two\\nlines, \\udcff and \\u00e9")
warnings.warn("a warning")
try:
    raise ValueError("inside")
except ValueError:
    log.exception("caught")
thread = threading.Thread(target=lambda: 1 / 0, name="a thread of ours")
thread.start()
thread.join()
raise KeyError("the end")
"""


def lines(log_format: str) -> list[str]:
    script = SCRIPT.format(format=log_format)
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stdout == ""
    return done.stderr.splitlines()


def test_every_line_is_an_object() -> None:
    early, field, odd, warned, caught, thread, end = (json.loads(line) for line in lines("json"))
    assert (early["message"], early["logger"], early["level"]) == ("early one", "a.part", "warning")
    assert (early["process"], isinstance(early["pid"], int)) == ("api", True)
    assert (field["request_id"], field["odd"]) == ("r-1", "{1, 2}")
    assert odd["message"] == "two\nlines, \\udcff and é"
    assert "a warning" in warned["message"]
    assert caught["exception"].endswith("ValueError: inside")
    assert thread["message"].startswith("a thread of ours ends: division by zero")
    assert "ZeroDivisionError" in thread["exception"]
    assert (end["level"], end["message"]) == ("critical", "this process ends: 'the end'")


def test_text_is_as_before() -> None:
    found = lines("text")
    assert found[:2] == ["WARNING early one", "ERROR with a field"]
    assert found[-1] == "KeyError: 'the end'"
