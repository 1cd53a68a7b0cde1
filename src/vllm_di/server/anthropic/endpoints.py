"""``POST /v1/messages`` and ``/v1/messages/count_tokens``."""

from __future__ import annotations

import asyncio

import orjson
from starlette.requests import Request
from starlette.responses import Response

from vllm_di.frontend.processor import Generation
from vllm_di.server.anthropic.answer import MessagesAnswer
from vllm_di.server.anthropic.request import ConversationRequest, MessagesRequest, chat_request
from vllm_di.server.body import read_request
from vllm_di.server.chat import begin_chat, check_chat, render_chat
from vllm_di.server.service import Service


async def start_messages(
    service: Service, request: MessagesRequest
) -> tuple[list[Generation], MessagesAnswer]:
    """Check a decoded request, render and tokenise its prompt. Raises RequestError."""
    generation, (parser,) = await begin_chat(service, chat_request(request), "msg")
    answer = MessagesAnswer(
        parser,
        message_id=generation.request_id,
        model=service.config.name,
        num_prompt=len(generation.prompt_token_ids),
    )
    return [generation], answer


async def count_tokens(service: Service, request: Request) -> Response:
    """How many tokens a conversation has as a prompt."""
    body = chat_request(await read_request(request, service, ConversationRequest))
    check_chat(service, body)
    prompt = await render_chat(service, body)
    encode = service.tokenizer.encode
    ids = await asyncio.to_thread(encode, prompt, add_special_tokens=False)
    data = orjson.dumps({"input_tokens": len(ids)})
    return Response(data, headers={"content-type": "application/json"})
