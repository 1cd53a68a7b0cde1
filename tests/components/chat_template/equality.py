"""Our prompts beside transformers', at one moment of the clock."""

from __future__ import annotations

from contextlib import closing
from datetime import datetime
from types import SimpleNamespace

import pytest
from tests.components.chat_template.conversations import BOS, CASES, EOS, as_client, expected
from transformers.utils import chat_template_utils

from vllm_di.components.chat_template import jinja
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.errors import RequestError

NOW = 1_700_000_000.0


class _Clock(datetime):
    @classmethod
    def now(cls, tz: object = None) -> datetime:  # type: ignore[override]
        return datetime.fromtimestamp(NOW)


def differences(
    source: str, monkeypatch: pytest.MonkeyPatch, *, renders: bool = True
) -> dict[str, str]:
    """The cases in which the server's prompt is not transformers', with both. An error of ours
    equals an error or a lost text of theirs; ``renders``: transformers makes a prompt of a case."""
    monkeypatch.setattr(chat_template_utils, "datetime", _Clock)
    monkeypatch.setattr(jinja, "time", SimpleNamespace(time=lambda: NOW))
    tokenizer = BytesTokenizer(vocab_size=300)
    assert (tokenizer.bos_token, tokenizer.eos_token) == (BOS, EOS)
    found = {}
    num_texts = 0
    with closing(
        jinja.JinjaChatTemplate(tokenizer, tokenizer_path=None, template=source, require_text=True)
    ) as ours:
        for name, case in CASES.items():
            right = expected(source, case)
            num_texts += right is not None
            got: str | None
            try:
                got = ours.render(
                    as_client(case),
                    tools=case.tools,
                    add_generation_prompt=case.add_generation_prompt,
                    continue_final_message=case.continue_final_message,
                    kwargs=case.kwargs,
                )
            except RequestError as error:
                got = None if right is None else f"error: {error}"
            if got != right:
                found[name] = f"expected {right!r}, got {got!r}"
    assert bool(num_texts) == renders
    return found
