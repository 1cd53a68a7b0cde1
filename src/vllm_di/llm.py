"""The engine as a library: ``LLM(...).generate(prompts)``."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec

from vllm_di.components.messages import EngineRequest, SamplingParams, TokenOutput
from vllm_di.containers.assembly import Assembly, assemble
from vllm_di.containers.fill import Launcher, opened
from vllm_di.containers.overrides import model_overrides
from vllm_di.containers.slots import EngineContainer, ServerContainer, WorkerContainer
from vllm_di.errors import RequestError, nearest
from vllm_di.frontend.outputs import RequestOutput
from vllm_di.frontend.pooling import (
    EmbeddingOutput,
    EmbeddingRequestOutput,
    PoolingProcessor,
)
from vllm_di.frontend.processor import Generation, RequestProcessor
from vllm_di.frontend.scoring import Pairs, ScoringOutput, ScoringRequestOutput, scorer_of
from vllm_di.progress import print_line, shown

log = logging.getLogger(__name__)

Prompt = str | Sequence[int]
Message = Mapping[str, Any]


class LLM:
    """A model in this process. Use it in a ``with`` block, or call ``close``.

        with LLM("smollm2", overrides=["attention=sdpa"]) as llm:
            print(llm.generate("The capital of France is")[0].outputs[0].text)

    ``model`` is an option of the group ``model``, a folder, a ``.gguf`` file or a hub name.
    ``overrides`` are those of the command line. Keyword ``objects`` stand in for components (with
    ``executor=inline``): ``LLM("tiny", attention=FakeAttention())``. Raises ConfigError,
    CheckpointError.
    """

    def __init__(
        self,
        model: str | None = None,
        platform: str | None = None,
        overrides: Sequence[str] = (),
        *,
        config_dirs: Sequence[str | Path] = (),
        **objects: Any,
    ) -> None:
        chosen = [f"platform={platform}"] if platform else []
        chosen += model_overrides(model) if model else []
        self.assembly: Assembly = assemble([*chosen, *overrides], config_dirs)
        for warning in self.assembly.warnings:
            log.warning("%s", warning)
        apart = _by_container(objects)
        with ExitStack() as stack, shown(print_line):
            front = stack.enter_context(
                opened(
                    ServerContainer,
                    self.assembly,
                    only=["tokenizer", "chat_template"],
                    **apart[ServerContainer],
                )
            )
            launcher = Launcher(self.assembly, objects=apart[WorkerContainer])
            back = stack.enter_context(
                opened(EngineContainer, self.assembly, launcher=launcher, **apart[EngineContainer])
            )
            self._stack = stack.pop_all()
        self.engine = back.engine()
        self.tokenizer, self.chat_template = front.tokenizer(), front.chat_template()
        report = self.engine.report
        self._processor = RequestProcessor(self.tokenizer, report.max_model_len, report.vocab_size)
        self._numbers = itertools.count()
        self._report = report

    def get_default_sampling_params(self) -> SamplingParams:
        """What ``generate``, ``chat`` and ``stream`` take when they are given none: the values of
        the checkpoint's generation_config.json, unless ``generation_config=none``."""
        return SamplingParams(**self.assembly.settings["checkpoint"]["sampling"])

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Texts or lists of token ids in, one RequestOutput each out, in order.

        Raises RequestError for the first request that cannot run; the others are aborted.
        """
        listed = _listed(prompts)
        return self._run(listed, _params_for(listed, sampling_params), add_special_tokens=True)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        **template_kwargs: Any,
    ) -> list[RequestOutput]:
        """One conversation or several, through the chat template."""
        several = bool(messages) and not isinstance(messages[0], Mapping)
        conversations: Any = messages if several else [messages]
        prompts = [self.chat_template.render(c, kwargs=template_kwargs) for c in conversations]
        return self._run(prompts, _params_for(prompts, sampling_params), add_special_tokens=False)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        truncate_prompt_tokens: int | None = None,
    ) -> list[EmbeddingRequestOutput]:
        """Texts or lists of token ids in, a vector of each out, in order. ``dimensions`` cuts them,
        of a model that was trained for it; ``truncate_prompt_tokens`` cuts texts, -1 to what the
        model reads. Raises RequestError, of a model that generates too (``pooler``)."""
        processor = self._pooling()
        processor.check_embeds()
        processor.check_dimensions(dimensions)
        requests = [
            processor.request(f"llm-{next(self._numbers)}", text, max_tokens=truncate_prompt_tokens)
            for text in _listed(prompts)
        ]
        return [
            EmbeddingRequestOutput(
                request.request_id,
                request.prompt_token_ids,
                EmbeddingOutput(list(processor.vector(output, dimensions))),
            )
            for request, output in zip(requests, self._pool(requests), strict=True)
        ]

    def score(
        self,
        one: Prompt | Sequence[Prompt],
        other: Prompt | Sequence[Prompt],
        *,
        truncate_prompt_tokens: int | None = None,
    ) -> list[ScoringRequestOutput]:
        """How well each pair of texts goes together: the cosine of their vectors or, of a
        cross-encoder, its score. A single ``one`` goes with each of ``other``;
        ``truncate_prompt_tokens`` cuts each text, of a cross-encoder the pair. Raises
        RequestError."""
        others = _listed(other)
        pairs = Pairs(_listed(one), others, "one", "other")
        pairs.check()
        scorer, name = scorer_of(self._pooling()), f"llm-{next(self._numbers)}"
        requests = scorer.requests(name, pairs, max_tokens=truncate_prompt_tokens)
        scores = scorer.scores(self._pool(requests), pairs)
        last = requests[len(requests) - len(others) :]
        return [
            ScoringRequestOutput(request.request_id, request.prompt_token_ids, ScoringOutput(score))
            for request, score in zip(last, scores, strict=True)
        ]

    def stream(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        *,
        add_special_tokens: bool = True,
    ) -> Iterator[str]:
        """The text of one answer, as it comes. Leaving the loop early aborts the request."""
        generation = self._start(prompt, sampling_params, add_special_tokens)
        try:
            self._add(generation)
            while not generation.finished:
                for output in self.engine.step().outputs:
                    update = generation.feed(output)
                    if update.abort:
                        self.engine.abort(update.request_id)
                    if update.text and update.index == 0:
                        yield update.text
        finally:
            self._abort([generation])

    def close(self) -> None:
        """Stop the workers and close every component. May be called twice."""
        self._stack.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    # -- inside -------------------------------------------------------------------------------

    def _pooling(self) -> PoolingProcessor:
        name = str(self.assembly.settings["model_name"])
        return PoolingProcessor(self.tokenizer, self._report, name)

    def _pool(self, requests: Sequence[EngineRequest]) -> list[TokenOutput]:
        """The outputs of ``requests``, in order. Raises RequestError for one that is refused; the
        others are aborted."""
        found: dict[str, TokenOutput] = {}
        try:
            for request in requests:
                self.engine.add(request)
            while self.engine.has_work():
                found |= {o.request_id: o for o in self.engine.step().outputs}
        finally:
            for request in requests:
                if request.request_id not in found:
                    self.engine.abort(request.request_id)
        return [found[request.request_id] for request in requests]

    def _start(
        self, prompt: Prompt, params: SamplingParams | None, add_special_tokens: bool
    ) -> Generation:
        request_id, limit = f"llm-{next(self._numbers)}", None
        if params is None:
            params = self.get_default_sampling_params()
            if "max_tokens" in self.assembly.settings["checkpoint"]["sampling"]:
                limit = params.max_tokens  # a default: cut to what the context has left
                params = msgspec.structs.replace(params, max_tokens=None)
        return self._processor.start(
            request_id,
            prompt,
            params,
            add_special_tokens=add_special_tokens,
            default_max_tokens=limit,
        )

    def _add(self, generation: Generation) -> None:
        for request in generation.requests:
            self.engine.add(request)

    def _run(
        self,
        prompts: Sequence[Prompt],
        params: Sequence[SamplingParams | None],
        *,
        add_special_tokens: bool,
    ) -> list[RequestOutput]:
        generations = [
            self._start(prompt, one, add_special_tokens)
            for prompt, one in zip(prompts, params, strict=True)
        ]
        owner = {r.request_id: g for g in generations for r in g.requests}
        try:
            for generation in generations:
                self._add(generation)
            while self.engine.has_work():
                for output in self.engine.step().outputs:
                    update = owner[output.request_id].feed(output)
                    if update.abort:
                        self.engine.abort(update.request_id)
        finally:
            self._abort(generations)
        return [generation.result() for generation in generations]

    def _abort(self, generations: Sequence[Generation]) -> None:
        for generation in generations:
            if not generation.finished:
                for request in generation.requests:
                    self.engine.abort(request.request_id)


def _listed(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _params_for(
    prompts: Sequence[object], params: SamplingParams | Sequence[SamplingParams] | None
) -> list[SamplingParams | None]:
    if params is None or isinstance(params, SamplingParams):
        return [params] * len(prompts)
    if len(params) != len(prompts):
        raise RequestError(f"{len(prompts)} prompts, but {len(params)} sampling params")
    return list(params)


def _by_container(objects: dict[str, Any]) -> dict[Any, dict[str, Any]]:
    """Objects in place of components, sorted by the container that has their slot."""
    containers = (ServerContainer, EngineContainer, WorkerContainer)
    apart: dict[Any, dict[str, Any]] = {c: {} for c in containers}
    for name, value in objects.items():
        homes = [c for c in containers if name in c.providers]
        if not homes:
            known = [slot for c in containers for slot in c.providers]
            raise TypeError(f"LLM has no slot {name!r}{nearest(name, known)}")
        for home in homes:
            apart[home][name] = value
    return apart
