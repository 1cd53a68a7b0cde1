"""A server as the command line starts it, over HTTPS, with logs as JSON and traces: each line, each
span, and each name of the dashboard and the alerts."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import httpx2
import openai
import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families
from tests.components.tracing.collector import HAS_OTLP, attributes_of, collecting
from tests.server.certificates import Authority
from tests.server.test_live import wait_until

DOCS = Path(__file__).parents[2] / "docs"
TINY = ["model=tiny", "platform=cpu", "model.dtype=float32", "ops=torch", "graph=eager"]
TWO_RANKS = ["executor=multiprocess", "executor.tensor_parallel_size=2"]
SERVE = [sys.executable, "-m", "vllm_di.cli", "serve", *TINY]
READY = re.compile(r"ready: tiny on (https://[\d.:]+)")
TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@dataclass
class Run:
    """All that one server left behind."""

    lines: list[str]
    status: int
    scrape: str
    spans: list[Any]

    @property
    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]


pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="it makes certificates")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    authority = Authority(tmp_path_factory.mktemp("tls"))
    cert, key = authority.issue()
    said = tmp_path_factory.mktemp("log") / "stderr"
    with collecting() as collector:
        command = [*SERVE, *TWO_RANKS, "server.port=0", "server.tokenizer_info=true"]
        command += ["server.log_format=json", "server.access_log=true"]
        command += ["--ssl-certfile", str(cert), "--ssl-keyfile", str(key)]
        if HAS_OTLP:
            command += ["--otlp-traces-endpoint", collector.url, "tracing.delay_seconds=600"]
        with said.open("wb") as file, subprocess.Popen(command, stderr=file) as process:
            scrape = ""
            try:
                wait_until(
                    lambda: bool(READY.search(said.read_text())) or process.poll() is not None
                )
                if found := READY.search(said.read_text()):
                    scrape = ask(found[1], authority)
            finally:
                process.terminate()
        yield Run(said.read_text().splitlines(), process.returncode, scrape, collector.spans)


def ask(url: str, authority: Authority) -> str:
    """Some requests, good and bad -> a scrape."""
    parent = {"traceparent": f"00-{TRACE}-{PARENT}-01", "x-request-id": "mine"}
    with (
        httpx.Client(base_url=url, verify=authority.context(), timeout=60) as client,
        httpx2.Client(verify=authority.context()) as theirs,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", http_client=theirs) as typed,
    ):
        for stream in (False, True):
            body = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
            answer = client.post(
                "/v1/chat/completions", json={**body, "stream": stream}, headers=parent
            )
            assert (answer.status_code, answer.headers["x-request-id"]) == (200, "mine")
        typed.completions.create(model="tiny", prompt="a", max_tokens=2, n=2)
        assert client.post("/v1/completions", json={"prompt": 3}, headers=parent).status_code == 400
        assert client.get("/nothing").status_code == 404
        info = client.get("/tokenizer_info").json()
        assert info["eos_token"] == "</s>"
        assert "messages" in info["chat_template"]
        return client.get("/metrics").text


def test_it_ends_well(run: Run) -> None:
    assert (run.status, run.scrape != "") == (0, True), "\n".join(run.lines)


def test_every_line_is_an_object(run: Run) -> None:
    records = run.records
    for record in records:
        assert {"time", "level", "logger", "message", "process", "pid"} <= record.keys()
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", record["time"])
        assert record["level"] in ("debug", "info", "warning", "error", "critical")
    texts = [record["message"] for record in records]
    for text in ("model tiny", "tokenizer=bytes is a stand-in", "ready: tiny on https://"):
        assert any(text in one for one in texts), text
    assert any(text.startswith("stopping") for text in texts)
    asked = [(r["path"], r["status"]) for r in records if "path" in r]
    assert asked == [
        ("/v1/chat/completions", 200),
        ("/v1/chat/completions", 200),
        ("/v1/completions", 200),
        ("/v1/completions", 400),
        ("/nothing", 404),
        ("/tokenizer_info", 200),
        ("/metrics", 200),
    ]
    assert [r["request_id"] for r in records if "path" in r][:2] == ["mine", "mine"]


@pytest.mark.skipif(not HAS_OTLP, reason="pip install 'vllm-di[otlp]'")
def test_the_last_spans_are_sent(run: Run) -> None:
    """The batch would have been sent after ten minutes: what is here came with the end."""
    names = [span.name for span in run.spans]
    assert names == ["chat tiny", "chat tiny", "text_completion tiny", "text_completion tiny"]
    for span in run.spans[:2]:
        assert (span.trace_id.hex(), span.parent_span_id.hex()) == (TRACE, PARENT)
        found = attributes_of(span)
        assert found["gen_ai.usage.completion_tokens"] == 4
        assert 0 < found["gen_ai.latency.time_to_first_token"] < found["gen_ai.latency.e2e"]
    refused = attributes_of(run.spans[3])
    assert (refused["http.response.status_code"], refused["error.type"]) == (400, "invalid_type")


# -- dashboard and alerts -------------------------------------------------------------------------

_OPERATORS = {"and", "or", "unless", "bool", "offset", "group_left", "group_right"}
_NAME = r"[a-zA-Z_:][\w:]*"


def selectors(expression: str) -> tuple[dict[str, set[str]], set[str]]:
    """Of PromQL -> series with the labels that it asks of them, and the labels that it groups by.
    Strings and ranges are left out, so that every other word has a meaning."""
    text = re.sub(r'"[^"]*"', '""', expression)
    text = re.sub(r"\[[^\]]*\]", "", text)
    grouping = r"\b(?:by|without|on|ignoring)\s*\(([^)]*)\)"
    groups = {name.strip() for part in re.findall(grouping, text) for name in part.split(",")}
    text = re.sub(grouping, "", text)
    found: dict[str, set[str]] = {}
    for name, inside in re.findall(rf"({_NAME})\b(?!\s*\()\s*(?:\{{([^}}]*)\}})?", text):
        if name not in _OPERATORS:
            found.setdefault(name, set()).update(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", inside))
    return found, groups


def expressions() -> dict[str, str]:
    board = json.loads((DOCS / "grafana/dashboard.json").read_text())
    found = {
        f"{panel['title']} {target['refId']}": target["expr"]
        for panel in board["panels"]
        for target in panel["targets"]
    }
    for variable in board["templating"]["list"]:
        if variable["type"] == "query":
            query = re.fullmatch(r"label_values\((.*), (\w+)\)", variable["query"]["query"])
            assert query is not None
            found[variable["name"]] = f"sum by ({query[2]}) ({query[1]})"
    rules = yaml.safe_load((DOCS / "grafana/alerts.yaml").read_text())
    for group in rules["groups"]:
        found |= {rule["alert"]: rule["expr"] for rule in group["rules"]}
    return found


def labels_of(scrape: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(scrape):
        for sample in family.samples:
            found.setdefault(sample.name, set()).update(sample.labels)
    return found


def test_selectors_are_found() -> None:
    text = (
        'histogram_quantile(0.9, sum by (le, a) (rate(vllm:x_bucket{b=~"$b",c!="}"}[5m]))) / y > 1'
    )
    assert selectors(text) == ({"vllm:x_bucket": {"b", "c"}, "y": set()}, {"le", "a"})
    text = "avg_over_time(a:b[5m]) > 0.95 and on (c) rate(d[$__rate_interval]) > 0"
    assert selectors(text) == ({"a:b": set(), "d": set()}, {"c"})


def test_every_expression_finds_its_series(run: Run) -> None:
    there = labels_of(run.scrape)
    assert len(expressions()) > 30
    for title, expression in expressions().items():
        series, groups = selectors(expression)
        assert series, title
        for name, asked in series.items():
            assert name in there, f"{title}: no {name} in a scrape"
            assert asked <= there[name], f"{title}: {name} lacks {asked - there[name]}"
        known = set().union(*(there[name] for name in series))
        assert groups <= known, f"{title}: no label {groups - known}"


def test_every_panel_is_there_once() -> None:
    board = json.loads((DOCS / "grafana/dashboard.json").read_text())
    places = [(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in board["panels"]]
    assert len(places) == len(set(places))
    assert len({panel["id"] for panel in board["panels"]}) == len(places)
    for panel in board["panels"]:
        assert panel["title"], panel["id"]
        assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])


# -- errors that end the server -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("override", "status", "text"),
    [
        ("server.tls.cert=/none.pem", 2, "server.tls.cert=/none.pem: the file cannot be read"),
        ("engine.no_such_key=1", 2, "no_such_key"),
    ],
)
def test_an_error_at_the_start(override: str, status: int, text: str) -> None:
    """As JSON where the config could be read, else as text."""
    command = [*SERVE, "server.port=0", "server.log_format=json", override]
    done = subprocess.run(command, stderr=subprocess.PIPE, text=True)
    assert done.returncode == status
    lines = done.stderr.splitlines()
    if override.startswith("server"):
        last = [json.loads(line) for line in lines][-1]
        assert (last["level"], text in last["message"]) == ("critical", True)
    else:
        assert text in done.stderr
