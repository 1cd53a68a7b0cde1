"""From the command to the first token, and what the light commands take. Each run is a process of
its own."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

from benchmarks.figures import report, times

PYTHON = sys.executable


def main() -> None:
    """Second and later starts of the default model: the conversion and the kernels are cached."""
    report(
        "start-up, seconds",
        {
            "vllm-di serve to the first token": times(first_token, 5),
            "import vllm_di": times(lambda: process("-c", "import vllm_di") - bare(), 5),
            "vllm-di --help, whole process": times(
                lambda: process("-m", "vllm_di.cli", "--help"), 5
            ),
            "python alone, whole process": times(bare, 5),
        },
    )


def process(*arguments: str) -> float:
    begin = time.perf_counter()
    subprocess.run([PYTHON, *arguments], check=True, stdout=subprocess.DEVNULL)
    return time.perf_counter() - begin


def bare() -> float:
    return process("-c", "pass")


def first_token() -> float:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port = sock.getsockname()[1]
    begin = time.perf_counter()
    command = [PYTHON, "-m", "vllm_di.cli", "serve", f"server.port={port}"]
    server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
    try:
        body = json.dumps({"prompt": "Hello", "max_tokens": 1}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            body,
            {"Content-Type": "application/json"},
        )
        while True:
            try:
                urllib.request.urlopen(request).read()
                return time.perf_counter() - begin
            except (urllib.error.URLError, ConnectionError):
                if server.poll() is not None:
                    raise RuntimeError("the server ended") from None
                time.sleep(0.02)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
