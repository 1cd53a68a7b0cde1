"""All chat templates that llama.cpp collects x twelve conversations (``make test-templates``)."""

from __future__ import annotations

import pytest
from tests.components.chat_template.equality import differences
from tests.vendored import LLAMA_CPP

from vllm_di.errors import ConfigError

pytestmark = pytest.mark.templates

FOLDER = LLAMA_CPP.folder() / "templates" if LLAMA_CPP.archive.is_file() else None
NAMES = sorted(f.name for f in FOLDER.glob("*.jinja")) if FOLDER else []
NEEDS_MORE = {"fireworks-ai-llama-3-firefunction-v2.jinja": "'functions' is undefined"}
"""They render no conversation without variables of their own."""
NO_CASE = {"CohereForAI-c4ai-command-r-plus-tool_use.jinja"}
"""It raises without tools, and for tools in OpenAI's form, in transformers too."""


def test_all_are_here() -> None:
    LLAMA_CPP.folder()
    assert len(NAMES) == 70


@pytest.mark.parametrize("name", NAMES)
def test_equal_to_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert FOLDER is not None
    source = (FOLDER / name).read_text("utf-8")
    if name in NEEDS_MORE:
        with pytest.raises(ConfigError, match=NEEDS_MORE[name]):
            differences(source, monkeypatch)
    else:
        assert differences(source, monkeypatch, renders=name not in NO_CASE) == {}
