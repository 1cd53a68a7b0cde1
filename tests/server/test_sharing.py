"""What the texts of a request have in common crosses to the engine once, and is held once."""

from __future__ import annotations

from typing import Any

import pytest

from vllm_di.components.messages import EngineRequest, SamplingParams
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.transport import Codec
from vllm_di.frontend.processor import RequestProcessor
from vllm_di.server import wire
from vllm_di.server.sharing import Borrower, Lender

LONG = list(range(3000))
LISTS: list[dict[str, Any]] = [
    {},
    {"allowed_token_ids": LONG},
    {"logit_bias": dict.fromkeys(LONG, 1.0), "stop_token_ids": LONG[:900]},
    {"bad_words": ["a", "bc"], "stop": ["x", "yy"]},
    {"structured_output": {"regex": "a" * 3000}},
]


def requests(n: int, prompt: list[int], **params: Any) -> list[EngineRequest]:
    processor = RequestProcessor(BytesTokenizer(vocab_size=4000), 4096, 4000)
    return processor.start("r", prompt, SamplingParams(n=n, **params)).requests


class Line:
    """Both ends, with the codec between them."""

    def __init__(self) -> None:
        self.lender, self.borrower = Lender(), Borrower()
        self.codec: Codec[wire.ToEngine] = Codec(wire.ToEngine)
        self.num_bytes = 0

    def add(self, request: EngineRequest) -> EngineRequest:
        for message in self.lender.messages(request):
            frame = self.codec.frame(message)
            self.num_bytes += len(frame)
            there = self.codec.decode(frame[4:])
            if isinstance(there, wire.Keep):
                self.borrower.keep(there)
            else:
                assert isinstance(there, wire.Add)
                return self.borrower.request(there)
        raise AssertionError("no Add came")

    def end(self, request: EngineRequest) -> None:
        for message in self.lender.end(request.request_id):
            there = self.codec.decode(self.codec.frame(message)[4:])
            assert isinstance(there, wire.Drop)
            self.borrower.drop(there)

    @property
    def is_empty(self) -> bool:
        return not (self.lender._loans or self.lender._of or self.borrower._kept)


@pytest.mark.parametrize("lists", LISTS, ids=lambda lists: "+".join(lists) or "none")
@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("prompt", [[1, 2], LONG], ids=["short", "long"])
def test_requests_arrive_as_they_were_and_nothing_is_left(
    lists: dict[str, Any], seed: int | None, prompt: list[int]
) -> None:
    line = Line()
    asked = requests(3, prompt, seed=seed, max_tokens=4, **lists)
    arrived = [line.add(request) for request in asked]
    assert arrived == asked
    for request in asked:
        assert not line.is_empty or (not lists and len(prompt) < 256)
        line.end(request)
    assert line.is_empty


def test_it_is_sent_and_held_once() -> None:
    one, many = Line(), Line()
    params: dict[str, Any] = {"allowed_token_ids": LONG, "bad_words": ["a b c"], "seed": 1}
    for request in requests(1, LONG, **params):
        one.add(request)
    arrived = [many.add(request) for request in requests(64, LONG, **params)]
    assert many.num_bytes < one.num_bytes + 64 * 200
    first = arrived[0]
    for other in arrived[1:]:
        assert other.prompt_token_ids is first.prompt_token_ids
        assert other.params.allowed_token_ids is first.params.allowed_token_ids
        assert other.bad_words_token_ids is first.bad_words_token_ids
        assert other.params.seed != first.params.seed


def test_another_request_has_lists_of_its_own() -> None:
    line = Line()
    for i, length in enumerate((10, 20)):
        (request,) = requests(1, [1], allowed_token_ids=LONG[:length], max_tokens=2)
        named = EngineRequest(request_id=str(i), prompt_token_ids=[1], params=request.params)
        arrived = line.add(named)
        assert arrived.params.allowed_token_ids == LONG[:length]


def test_ids_that_come_again_are_taken_once() -> None:
    (request,) = requests(1, [1], allowed_token_ids=[7, 8, 7] * 1000, max_tokens=2)
    assert request.params.allowed_token_ids == [7, 8]
