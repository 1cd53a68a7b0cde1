"""The steps from a request to its bytes, each on its own: none needs those before it."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any

import pytest
from tests.server.fakes import EchoEngine, make_server

from vllm_di.components.interfaces import ParserRequest
from vllm_di.components.reasoning_parser.none import NoReasoningParser
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.errors import QueueFullError
from vllm_di.frontend.processor import Generation, Update
from vllm_di.server.chat import ChatAnswer
from vllm_di.server.completions import start_completion
from vllm_di.server.generation import running
from vllm_di.server.parsing import ChoiceParser
from vllm_di.server.protocol import ChatRequest, CompletionRequest, StreamOptions
from vllm_di.server.sending import EventWriter, send_events
from vllm_di.server.service import Service
from vllm_di.server.updates import Updates

UPDATES = [
    Update(request_id="r", index=0, text="a", token_ids=[97], num_cached_tokens=1),
    Update(request_id="r", index=0, text="bc", token_ids=[98, 99], finish_reason="length"),
]


def chat_answer() -> ChatAnswer:
    options = StreamOptions(include_usage=True, continuous_usage_stats=True)
    return ChatAnswer(
        ChatRequest(messages=[{}], stream_options=options),
        parsers=[ChoiceParser(NoReasoningParser(), None, ParserRequest({}, "hi"))],
        request_id="r",
        model="m",
        tokenizer=BytesTokenizer(vocab_size=300),
        prompts=[[104, 105]],
    )


def test_an_answer_needs_updates_alone() -> None:
    answer = chat_answer()
    for update in UPDATES:
        answer.add(0, update)
    body = answer.body()
    assert body["choices"][0]["message"]["content"] == "abc"
    assert body["usage"]["completion_tokens"] == 3
    assert body["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}


def test_sending_needs_an_answer_and_its_updates() -> None:
    """The usage in an event counts what was shown up to there, however much more waits."""
    sent: list[bytes] = []
    unsent: list[int] = []

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.body":
            unsent.append(writer.num_unsent() - len(message["body"]))
            sent.append(message["body"])

    async def main() -> None:
        updates = Updates()
        for update in UPDATES:
            updates.put(0, update)
        updates.end()
        await send_events(updates, chat_answer(), writer)

    writer = EventWriter(send)
    asyncio.run(main())
    *lines, done = [line for line in b"".join(sent).split(b"\n\n") if line]
    assert done == b"data: [DONE]"
    usages = [json.loads(line[6:])["usage"]["completion_tokens"] for line in lines]
    assert usages == [1, 1, 3, 3]
    assert set(unsent) == {0}
    assert writer.num_unsent() == 0


Body = Callable[[Updates, EchoEngine, Service], Awaitable[None]]


def run(body: Body, *, max_tokens: int, **settings: Any) -> EchoEngine:
    """``body`` inside ``running``, for two prompts with two choices each."""

    async def main() -> EchoEngine:
        engine = EchoEngine()
        service = make_server(engine, **settings)._service
        request = CompletionRequest(prompt=["ab", "cd"], n=2, max_tokens=max_tokens)
        generations: list[Generation] = (await start_completion(service, request))[0]
        silent = asyncio.Event()

        async def receive() -> MutableMapping[str, Any]:
            await silent.wait()
            return {"type": "http.disconnect"}

        try:
            async with running(service, generations, receive, lambda: 0, patience=None) as updates:
                await body(updates, engine, service)
        finally:
            assert service.admission.in_flight == 0
            assert len(asyncio.all_tasks()) == 1, "only this one is left"
        return engine

    return asyncio.run(main())


def test_a_run_ends_with_its_last_choice() -> None:
    async def body(updates: Updates, engine: EchoEngine, service: Service) -> None:
        items = [item async for item in updates]
        ends = [(item[0], item[1].index) for item in items if item and item[1].finish_reason]
        assert sorted(ends) == [(0, 0), (0, 1), (1, 0), (1, 1)]

    assert not run(body, max_tokens=3).aborted


def test_leaving_a_run_aborts_what_is_left_of_it() -> None:
    async def body(updates: Updates, engine: EchoEngine, service: Service) -> None:
        await anext(updates)
        assert service.admission.in_flight == 4

    assert len(run(body, max_tokens=200).aborted) == 4

    async def failing(updates: Updates, engine: EchoEngine, service: Service) -> None:
        await anext(updates)
        engines.append(engine)
        raise ValueError("of the reader")

    engines: list[EchoEngine] = []
    with pytest.raises(ValueError, match="of the reader"):
        run(failing, max_tokens=200)
    assert len(engines[0].aborted) == 4


def test_an_interrupt_ends_the_updates_ahead_of_those_that_wait() -> None:
    async def body(updates: Updates, engine: EchoEngine, service: Service) -> None:
        await anext(updates)
        service.admission.interrupt_all(ValueError("stop"))
        with pytest.raises(ValueError, match="stop"):
            await anext(updates)
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert service.admission.in_flight == 0, "before the block is left"

    assert len(run(body, max_tokens=200).aborted) == 4


def test_nothing_runs_where_the_queue_has_no_room() -> None:
    async def body(updates: Updates, engine: EchoEngine, service: Service) -> None:
        async def nothing(*args: object) -> None:
            raise AssertionError("unreachable")

        request = CompletionRequest(prompt="ab", n=1, max_tokens=1)
        generations, _ = await start_completion(service, request)
        with pytest.raises(QueueFullError):
            async with running(service, generations, nothing, lambda: 0, patience=None):  # type: ignore[arg-type]
                raise AssertionError("unreachable")
        assert len(engine.requests) <= 4

    run(body, max_tokens=3, max_queue=4)
