"""Chat templates: what Hugging Face's templates rely on, and what must not harm us."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.frontend import smollm2

from vllm_di.components.chat_template.jinja import JinjaChatTemplate
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.errors import CheckpointError, ConfigError, RequestError

CONF = Path(__file__).parents[3] / "conf" / "chat_template"
HI = [{"role": "user", "content": "Hi"}]


def template(
    source: str | None, folder: Path | str | None = None, fuel: int = 1_000_000
) -> JinjaChatTemplate:
    return JinjaChatTemplate(
        BytesTokenizer(vocab_size=300),
        tokenizer_path=None if folder is None else str(folder),
        template=source,
        fuel=fuel,
    )


def render(source: str, messages: Any = HI, **options: Any) -> str:
    return template(source).render(messages, **options)


def test_smollm2() -> None:
    folder = smollm2.folder()
    made = JinjaChatTemplate(
        HfTokenizer(path=folder), tokenizer_path=folder, template=None, fuel=100_000
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert made.render(HI) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_plain() -> None:
    node = yaml.safe_load((CONF / "plain.yaml").read_text())
    assert (node["tokenizer_path"], node.keys()) == (
        None,
        {"_target_", "tokenizer_path", "template", "fuel"},
    )
    made = template(node["template"], fuel=node["fuel"])
    messages = [*HI, {"role": "assistant", "content": "Yo"}]
    assert made.render(messages) == "user: Hi\nassistant: Yo\nassistant:"
    assert made.render(messages, add_generation_prompt=False) == "user: Hi\nassistant: Yo\n"


def test_what_templates_use() -> None:
    assert render("{{ bos_token }}{{ messages[0]['content'] }}{{ eos_token }}") == "<s>Hi</s>"
    assert render("{{ {'a': '<é>'} | tojson }}") == '{"a": "<é>"}'
    assert render("{{ [1] | tojson(indent=1) }}") == "[\n 1\n]"
    assert render("{{ strftime_now('%Y') }}").startswith("2")
    assert render("{% if tools is none %}no{% endif %}") == "no"
    assert render("{% generation %}a {%- endgeneration %}b") == "ab"
    assert render("{% set x = namespace(a=1) %}{% set x.a = 2 %}{{ x.a }}") == "2"
    assert render("{{ ' a '.strip() }}{{ 'a,b'.split(',')[-1] }}{{ 'abc'[::-1] }}") == "abcba"
    assert (
        render("{% for m in messages %}\n  {% if true %}\nx\n  {% endif %}\n{% endfor %}") == "x\n"
    )
    assert render("{{ think }}", kwargs={"think": "yes"}) == "yes"
    assert render("{{ messages[0].content }}", [{"role": "u", "content": "<&>"}]) == "<&>"


def test_content_parts_are_joined_and_images_refused() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(RequestError, match="image_url") as error:
        render("{{ 1 }}", [{"role": "user", "content": image}])
    assert (error.value.param, error.value.code) == ("messages", "unsupported_parameter")


def test_earlier_tool_calls_have_decoded_arguments() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    source = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ messages[0].content }}"
    assert render(source, messages) == "1"
    call["function"] = {"name": "f", "arguments": "{"}
    with pytest.raises(RequestError, match="not JSON"):
        render(source, messages)


def test_a_template_may_refuse() -> None:
    with pytest.raises(RequestError, match="system role not supported") as error:
        render("{{ raise_exception('system role not supported') }}")
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    ("content", "end"), [("The answer", "The answer"), ("  padded  ", "padded"), ("Hi", "Hi")]
)
def test_continue_final_message(content: str, end: str) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    messages = [*HI, {"role": "assistant", "content": content}]
    text = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"[user]Hi<end>[assistant]{end}"
    kept = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    text = render(kept, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"Hi<end>{content}"


@pytest.mark.parametrize("content", ["", "   ", "ab"])
def test_a_final_message_that_cannot_be_continued(content: str) -> None:
    messages = [{"role": "assistant", "content": content}]
    with pytest.raises(RequestError, match="continue_final_message"):
        render(
            "{{ messages[0].content | upper }}",
            messages,
            add_generation_prompt=False,
            continue_final_message=True,
        )


HOSTILE = [
    "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
    "{{ messages[0].__class__.__mro__ }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ 'x' * 100000000000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end_in_a_request_error(source: str) -> None:
    made = template(source, fuel=100_000)
    with pytest.raises(RequestError, match="chat template cannot render"):
        made.render(HI)


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_kwargs_must_not_replace_the_messages(name: str) -> None:
    with pytest.raises(RequestError, match=name) as error:
        render("{{ 1 }}", kwargs={name: "y"})
    assert error.value.param == "chat_template_kwargs"
    assert render("{{ self }}{{ template_name }}", kwargs={"self": 1, "template_name": 2}) == "12"


def test_where_the_template_comes_from(tmp_path: Path) -> None:
    config = tmp_path / "tokenizer_config.json"
    named = [{"name": "default", "template": "D"}, {"name": "tool_use", "template": "T"}]
    config.write_text(json.dumps({"chat_template": named, "pad_token": {"content": "<p>"}}))
    assert template(None, tmp_path).render(HI) == "D"
    assert template(None, tmp_path).render(HI, tools=[{}]) == "T"
    assert template("{{ pad_token }}", tmp_path).render(HI) == "<p>"
    config.write_text(json.dumps({"chat_template": "one"}))
    assert template(None, tmp_path).render(HI) == "one"
    (tmp_path / "chat_template.jinja").write_text("file")
    assert template(None, tmp_path).render(HI) == "file"
    own = tmp_path / "own.jinja"
    own.write_text("own")
    assert template(str(own), tmp_path).render(HI) == "own"


def test_missing_and_wrong_templates_say_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"chat_template\.template"):
        template(None, tmp_path).render(HI)
    with pytest.raises(RequestError, match=r"chat_template=plain"):
        template(None).render(HI)
    with pytest.raises(ConfigError, match=r"none\.jinja: the file cannot be read"):
        template(str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match=r"chat_template\.template: syntax error"):
        template("{% if %}")
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        template(None, tmp_path)
