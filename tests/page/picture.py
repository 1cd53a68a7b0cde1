"""``python -m tests.page.picture FILE``: the picture of the page for the docs, of a server with the
demo model."""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

from tests.page.browser import browser
from tests.server.served import served

OVERRIDES = ["model=smollm2", "graph=tape"]
DONE = "document.querySelectorAll('.assistant:not(.busy)').length === {}"


def main(file: Path) -> None:
    with (
        tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile,
        served(OVERRIDES) as url,
        browser(Path(profile)) as running,
    ):
        page = running.open(f"{url}/", width=1300, height=720)
        page.wait("document.querySelectorAll('.slot').length > 20")
        page.run(
            "document.querySelector('#temperature').value = 0;"
            "document.querySelector('#max-tokens').value = 90;"
            "document.querySelector('#example').click();"
            "document.querySelector('#tool-choice').value = 'none'"
        )
        page.fill("#question", "What is the capital of France?")
        page.enter()
        page.wait(DONE.format(1))
        page.run("document.querySelector('#tool-choice').value = 'required'")
        page.fill("#question", "What is the weather there, in celsius?")
        page.enter()
        page.wait(DONE.format(2))
        page.run("document.querySelector('#tools').value = ''")
        page.run("document.querySelector('#max-tokens').value = 400")
        page.fill("#question", "Write a story about a lighthouse keeper.")
        page.enter()
        page.wait(
            "document.querySelector('.busy .text')?.textContent.length > 150 || " + DONE.format(3)
        )
        file.write_bytes(page.png())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
