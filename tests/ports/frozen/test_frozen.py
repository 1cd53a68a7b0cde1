"""A whole port of interfaces 2.0, with a class of its own for every slot: it serves as it stands,
also when the interfaces grow."""

from __future__ import annotations

import ast
import json
import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.ports.frozen import package
from tests.ports.frozen.grown import grow, grown_engine
from tests.ports.frozen.package import NAME, PORT, files, frozen_port

from vllm_di import LLM, SamplingParams
from vllm_di.conformance.interface_record import SOURCES, changes, record
from vllm_di.containers.assembly import assemble
from vllm_di.containers.explain import explain
from vllm_di.containers.slots import SLOTS
from vllm_di.errors import ConfigError, RequestError

ASKED = [f"platform={NAME}"]
CPU = ["platform=cpu", "model=tiny", "model.dtype=float32", "ops=torch"]
PROMPTS = ["hello", "one two three " * 9, "x"]  # the second takes several chunks
PARAMS = [
    SamplingParams(temperature=0, max_tokens=9, ignore_eos=True),
    SamplingParams(temperature=0.9, seed=5, top_p=0.9, top_k=50, min_p=0.01, max_tokens=9),
    SamplingParams(
        temperature=1.1,
        seed=6,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.2,
        min_tokens=4,
        logit_bias={65: 3.0},
        allowed_token_ids=list(range(60, 300)),
        bad_words=["A", "bc"],
        max_tokens=9,
        logprobs=2,
    ),
]


def tokens(*overrides: str) -> list[list[int]]:
    """The answers to each prompt with each of the parameters, all in one batch."""
    with LLM(overrides=list(overrides)) as llm:
        done = llm.generate([p for p in PROMPTS for _ in PARAMS], PARAMS * len(PROMPTS))
        return [list(one.outputs[0].token_ids) for one in done]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    folder = tmp_path_factory.mktemp("site")
    with frozen_port(folder):
        yield folder


@pytest.fixture(scope="module")
def expected() -> list[list[int]]:
    return tokens(*CPU)


def test_every_slot_is_filled_by_a_class_of_its_own(site: Path) -> None:
    rows = explain(assemble(ASKED), ops=False).rows
    targets = {row.slot: row.target for row in rows if row.slot in SLOTS}
    assert targets.keys() == SLOTS.keys()
    assert {slot: t for slot, t in targets.items() if not t.startswith(f"{NAME}.")} == {}
    assert len(set(targets.values())) == len(SLOTS)


def test_it_imports_the_interfaces_alone() -> None:
    allowed = {"vllm_di.components.interfaces", "vllm_di.components.messages", "vllm_di.errors"}
    allowed |= {"torch", "torch.nn.functional", "msgspec"}
    for name, text in files().items():
        if not name.endswith(".py"):
            continue
        for node in ast.walk(ast.parse(text)):
            found = []
            if isinstance(node, ast.Import):
                found = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                assert not node.level, name
                found = [str(node.module)]
            foreign = [m for m in found if m.split(".")[0] not in sys.stdlib_module_names]
            assert set(foreign) <= allowed, name


def test_its_tokens_are_those_of_the_cpu(site: Path, expected: list[list[int]]) -> None:
    assert tokens(*ASKED) == expected
    assert tokens(*ASKED, "model=tiny") == expected  # our decoder on its parts


def test_more_requests_than_blocks(site: Path, expected: list[list[int]]) -> None:
    assert tokens(*ASKED, "worker.num_blocks=20") == expected
    assert tokens(*ASKED, "scheduler.max_num_seqs=1") == expected


def test_what_it_cannot_do_is_refused(site: Path) -> None:
    cases: list[tuple[dict[str, Any], str]] = [
        ({"structured_output": {"regex": "a"}}, "structured output"),
        ({"prompt_logprobs": 1}, "prompt_logprobs"),
        ({"stop_token_ids": [999]}, "stop_token_ids"),
    ]
    with LLM(overrides=ASKED) as llm:
        for fields, message in cases:
            with pytest.raises(RequestError, match=message):
                llm.generate("hello", SamplingParams(**fields))
        assert llm.generate("hello", PARAMS[0])[0].outputs[0].token_ids


def ask(port: int, path: str, **fields: Any) -> tuple[int, Any]:
    data = json.dumps(fields).encode() if fields else None
    request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data)
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            body = answer.read()
            return answer.status, json.loads(body) if path != "/metrics" else body.decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())


def await_ready(port: int, server: subprocess.Popen[str]) -> None:
    for _ in range(600):
        assert server.poll() is None, server.communicate()
        try:
            if ask(port, "/health")[0] == 200:
                return
        except OSError:
            pass
        time.sleep(0.1)
    raise AssertionError("the server is not ready")


@pytest.fixture(scope="module")
def port(site: Path) -> Iterator[int]:
    """Of a server in processes of its own."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        number: int = sock.getsockname()[1]
    command = [sys.executable, "-m", "vllm_di.cli", "serve", *ASKED, f"server.port={number}"]
    server = subprocess.Popen(
        command,
        env=os.environ | {"PYTHONPATH": str(site)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        await_ready(number, server)
        yield number
        server.terminate()
        out, _ = server.communicate(timeout=60)
        assert (server.returncode, "Traceback" in out) == (0, False), out
        assert f"listening on http://127.0.0.1:{number}" in out
    finally:
        server.kill()
        server.communicate()


def test_it_serves(port: int, expected: list[list[int]]) -> None:
    for i, prompt in enumerate(PROMPTS):
        for params, wanted in zip(PARAMS[:2], expected[3 * i :], strict=False):
            fields = {n: getattr(params, n) for n in params.__struct_fields__}
            fields = {n: v for n, v in fields.items() if v != getattr(SamplingParams(), n)}
            status, body = ask(port, "/v1/completions", prompt=prompt, **fields)
            assert (status, body["choices"][0]["token_ids"]) == (200, wanted), body
    status, body = ask(port, "/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert (status, body["choices"][0]["message"]["role"]) == (200, "assistant")
    assert body["usage"]["completion_tokens"] == len(body["choices"][0]["token_ids"])
    assert "frozen_2_0_finished 7\n" in ask(port, "/metrics")[1]


def test_it_answers_bad_requests(port: int) -> None:
    bad: list[tuple[str, dict[str, Any], int]] = [
        ("/nowhere", {"a": 1}, 404),
        ("/v1/completions", {"prompt": "a", "temperature": -1}, 400),
        ("/v1/completions", {"prompt": "a", "temprature": 1}, 400),
        ("/v1/completions", {"max_tokens": 1}, 400),
        ("/v1/completions", {"prompt": [999999]}, 400),
        ("/v1/chat/completions", {"messages": [{}]}, 400),
        ("/v1/completions", {"prompt": "a", "model": "other"}, 404),
    ]
    for path, fields, wanted in bad:
        status, body = ask(port, path, **fields)
        assert (status, bool(body["error"]["message"])) == (wanted, True), (fields, body)
    assert ask(port, "/health")[0] == 200


def test_it_passes_the_conformance_of_its_parts(site: Path) -> None:
    checks = "manifest imports device ops prefill decode kv communicator"
    command = [sys.executable, "-m", "vllm_di.cli", "conform", *ASKED, "--only", checks]
    done = subprocess.run(
        command,
        env=os.environ | {"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr


def test_a_checkpoint_is_not_replaced_by_random_weights(site: Path) -> None:
    with pytest.raises(ConfigError, match="loader=frozen_2_0 reads no checkpoint"):
        tokens(*ASKED, "checkpoint.weights=model.safetensors")


# -- growth ------------------------------------------------------------------------------------

RUN = """
from tests.ports.frozen.test_frozen import ASKED, tokens
from vllm_di.components import interfaces, messages

assert interfaces.ModelStep.__dataclass_fields__["added_later"].default == 0
assert "added_later" in messages.StepPlan.__struct_fields__
print(tokens(*ASKED))
"""


def test_it_runs_when_every_interface_has_grown(
    site: Path, tmp_path: Path, expected: list[list[int]]
) -> None:
    """One more field in each message and value, one more optional method in each interface."""
    engine = grown_engine(tmp_path)
    path = [str(engine), str(site), str(Path(__file__).parents[3])]
    done = subprocess.run(
        [sys.executable, "-c", RUN],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(path)},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == expected


def test_the_record_says_that_growth_breaks_nothing(tmp_path: Path) -> None:
    copies = []
    for source in SOURCES:
        copies.append(tmp_path / source.name)
        copies[-1].write_text(grow(source.read_text(encoding="utf-8")), encoding="utf-8")
    found = changes(record(), record(tuple(copies)))
    assert {c.name for c in found if c.breaks} == set()
    assert {c.what for c in found} == {"added"}
    added = {c.name.removesuffix(".added_later") for c in found}
    assert {"ModelStep", "StepInput", "BatchPlan", "StepPlan", "SampledTokens"} <= added
    assert {"EngineRequest", *(kind.__name__ for kind in SLOTS.values())} <= added


# -- the hash ----------------------------------------------------------------------------------


def test_it_is_as_it_was_frozen() -> None:
    """While there is no hash the README says so; from then on nothing may change."""
    says = (PORT / "README.md").read_text(encoding="utf-8")
    if package.HASH.exists():
        assert "**Frozen.**" in says
        assert package.HASH.read_text().split() == [package.digest()], (
            "the frozen port was edited: a later engine must run it as it stands"
        )
    else:
        assert "**Not frozen yet.**" in says


def test_the_command_freezes_it(tmp_path: Path) -> None:
    copy = tmp_path / "2_0"
    for name, text in files().items():
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text(text, encoding="utf-8")
    package.freeze(tmp_path / "hash", copy)
    assert (tmp_path / "hash").read_text().split() == [package.digest()]
    for name in files():
        text = (copy / name).read_text(encoding="utf-8")
        (copy / name).write_text(f"{text}# more\n", encoding="utf-8")
        assert package.digest(copy) != package.digest(), name
        (copy / name).write_text(text, encoding="utf-8")
