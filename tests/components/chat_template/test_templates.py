"""Chat templates in both engines: what Hugging Face's templates rely on, and what must not harm
us."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests.frontend import smollm2

from vllm_di.components.chat_template.conversation import lost_user_text
from vllm_di.components.chat_template.jinja import JinjaChatTemplate
from vllm_di.components.chat_template.minijinja import MinijinjaChatTemplate
from vllm_di.components.chat_template.none import NoChatTemplate
from vllm_di.components.interfaces import ChatTemplate
from vllm_di.components.tokenizer.bytes import BytesTokenizer
from vllm_di.components.tokenizer.hf import HfTokenizer
from vllm_di.errors import CheckpointError, ConfigError, RequestError

CONF = Path(__file__).parents[3] / "conf" / "chat_template"
HI = [{"role": "user", "content": "Hi"}]


Make = Callable[..., ChatTemplate]


@pytest.fixture(params=["jinja", "minijinja"])
def template(request: pytest.FixtureRequest) -> Iterator[Make]:
    """``template(SOURCE or None, FOLDER, **keys)``, closed at the end."""
    with ExitStack() as stack:

        def make(source: str | None, folder: Path | str | None = None, **keys: Any) -> ChatTemplate:
            tokenizer = BytesTokenizer(vocab_size=300)
            path = None if folder is None else str(folder)
            if request.param == "minijinja":
                keys.setdefault("fuel", 1_000_000)
                return MinijinjaChatTemplate(
                    tokenizer, tokenizer_path=path, template=source, **keys
                )
            keys.setdefault("cpu_seconds", 0.5)
            made = JinjaChatTemplate(tokenizer, tokenizer_path=path, template=source, **keys)
            return stack.enter_context(closing(made))

        yield make


@pytest.fixture
def render(template: Make) -> Callable[..., str]:
    def once(source: str, messages: Any = HI, **options: Any) -> str:
        return template(source).render(messages, **options)

    return once


Render = Callable[..., str]


def test_smollm2() -> None:
    folder = smollm2.folder()
    made = MinijinjaChatTemplate(
        HfTokenizer(path=folder), tokenizer_path=folder, template=None, fuel=100_000
    )
    system = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
    assert made.render(HI) == (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_plain(template: Make) -> None:
    node = yaml.safe_load((CONF / "plain.yaml").read_text())
    assert (node["tokenizer_path"], node.keys()) == (
        None,
        {"_target_", "tokenizer_path", "template", "require_text", "fuel"},
    )
    made = template(node["template"], require_text=True)
    messages = [*HI, {"role": "assistant", "content": "Yo"}]
    assert made.render(messages) == "user: Hi\nassistant: Yo\nassistant:"
    assert made.render(messages, add_generation_prompt=False) == "user: Hi\nassistant: Yo\n"


def test_what_templates_use(render: Render) -> None:
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


def test_content_parts_are_joined_and_images_refused(render: Render) -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert render("{{ messages[0].content }}", [{"role": "user", "content": parts}]) == "ab"
    image = [{"type": "image_url", "image_url": {"url": "http://x"}}]
    with pytest.raises(RequestError, match="image_url") as error:
        render("{{ 1 }}", [{"role": "user", "content": image}])
    assert (error.value.param, error.value.code) == ("messages", "unsupported_parameter")


def test_earlier_tool_calls_have_decoded_arguments(render: Render) -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    messages = [{"role": "assistant", "content": None, "tool_calls": [call]}]
    source = "{{ messages[0].tool_calls[0].function.arguments.x }}{{ messages[0].content }}"
    assert render(source, messages) == "1"
    call["function"] = {"name": "f", "arguments": "{"}
    with pytest.raises(RequestError, match="not JSON"):
        render(source, messages)


def test_a_template_may_refuse(render: Render) -> None:
    with pytest.raises(RequestError, match="system role not supported") as error:
        render("{{ raise_exception('system role not supported') }}")
    assert error.value.param == "messages"


@pytest.mark.parametrize(
    ("content", "end"), [("The answer", "The answer"), ("  padded  ", "padded"), ("Hi", "Hi")]
)
def test_continue_final_message(render: Render, content: str, end: str) -> None:
    source = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<end>{% endfor %}"
    messages = [*HI, {"role": "assistant", "content": content}]
    text = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"[user]Hi<end>[assistant]{end}"
    kept = "{% for m in messages %}{{ m.content }}<end>{% endfor %}"
    text = render(kept, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == f"Hi<end>{content}"


def test_a_final_message_that_cannot_be_continued(render: Render) -> None:
    for content in ("ab", None):
        messages = [{"role": "assistant", "content": content}]
        with pytest.raises(RequestError, match="continue_final_message") as error:
            render(
                "{{ messages[0].content | upper }}",
                messages,
                add_generation_prompt=False,
                continue_final_message=True,
            )
        assert error.value.param == "continue_final_message"


def test_the_mark_of_a_continued_message_never_stays(render: Render) -> None:
    source = "{% for m in messages %}{{ m.content }}|{{ m.content | trim }}{% endfor %}<end>"
    messages = [{"role": "assistant", "content": "one "}]
    text = render(source, messages, add_generation_prompt=False, continue_final_message=True)
    assert text == "one |one"


HOSTILE = [
    "{% for a in range(10000) %}{% for b in range(10000) %}{% endfor %}{% endfor %}",
    "{{ messages[0].__class__.__mro__[0] }}",
    "{{ raise_exception.__globals__.x }}",
    "{{ 'x' * 100000000000 }}",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{% include 'x' %}",
]


@pytest.mark.parametrize("source", HOSTILE)
def test_hostile_templates_end_in_a_request_error(template: Make, source: str) -> None:
    guard = "{% if messages[0].content == 'Hi' %}"
    made = template(guard + source + "{% endif %}{{ eos_token }}")
    with pytest.raises(RequestError, match=r"chat template (cannot render|takes more than)"):
        made.render(HI)
    assert made.render([{"role": "user", "content": "Ho"}]) == "</s>"


@pytest.mark.parametrize("name", ["messages", "tools", "add_generation_prompt", "bos_token"])
def test_kwargs_must_not_replace_the_messages(render: Render, name: str) -> None:
    with pytest.raises(RequestError, match=name) as error:
        render("{{ 1 }}", kwargs={name: "y"})
    assert error.value.param == "chat_template_kwargs"
    assert render("{{ template_name }}{{ name }}", kwargs={"name": 1, "template_name": 2}) == "21"


def test_where_the_template_comes_from(template: Make, tmp_path: Path) -> None:
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
    (tmp_path / "additional_chat_templates").mkdir()
    (tmp_path / "additional_chat_templates" / "tool_use.jinja").write_text("file for tools")
    assert template(None, tmp_path).render(HI, tools=[{}]) == "file for tools"
    assert template(None, tmp_path).render(HI) == "file"
    own = tmp_path / "own.jinja"
    own.write_text("own")
    assert template(str(own), tmp_path).render(HI) == "own"


def test_missing_and_wrong_templates_say_what_to_do(template: Make, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match=r"chat_template\.template"):
        template(None, tmp_path).render(HI)
    with pytest.raises(RequestError, match=r"chat_template=plain"):
        template(None).render(HI)
    with pytest.raises(ConfigError, match=r"none\.jinja: the file cannot be read"):
        template(str(tmp_path / "none.jinja"))
    with pytest.raises(ConfigError, match=r"chat_template\.template: .*yntax.*chat_template=none"):
        template("{% if %}")
    (tmp_path / "tokenizer_config.json").write_text('{"chat_template": [{"name": "default"}]}')
    with pytest.raises(CheckpointError, match="chat_template"):
        template(None, tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match="is damaged"):
        template(None, tmp_path)


def test_what_the_tokenizer_lacks_is_undefined(template: Make, tmp_path: Path) -> None:
    config = {"add_bos_token": True, "pad_token": None, "sep_token": "<sep>"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    source = "{{ add_bos_token is defined }} {{ pad_token is defined }} {{ sep_token }}"
    assert template(source, tmp_path).render(HI).lower() == "false false <sep>"


LOST = [
    "{% for m in messages %}{{ m.role }}{% endfor %}",
    "{% for m in messages %}{{ m.text }}{% endfor %}",
    "{{ raise_exception('no user messages here') }}",
]


@pytest.mark.parametrize("source", LOST)
def test_a_template_that_loses_the_users_text_does_not_start(template: Make, source: str) -> None:
    with pytest.raises(ConfigError, match=r"(loses the text|no user mess).*chat_template=none"):
        template(source, require_text=True)
    template(source, require_text=False)


def test_the_form_that_keeps_the_text_is_used(template: Make) -> None:
    source = (
        "{% for m in messages %}{{ m.role }}:{% for part in m.content %}"
        "{% if part.type == 'text' %}{{ part.text }};{% endif %}{% endfor %}{% endfor %}"
    )
    made = template(source, require_text=True)
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    system = {"role": "system", "content": "s"}
    assert made.render([system, *HI]) == "system:s;user:Hi;"
    assert made.render([{"role": "user", "content": parts}]) == "user:a;b;"
    assert made.render([{"role": "tool", "content": "t"}]) == "tool:t;"
    both = "{% for m in messages %}{% if m.content is string %}{{ m.content }}{% else %}"
    both += "{{ m.content | map(attribute='text') | join('+') }}{% endif %}{% endfor %}"
    made = template(both, require_text=True)
    assert made.render(HI) + made.render([{"role": "user", "content": parts}]) == "Hia+b"
    written_out = template("{{ messages[-1].content }}", require_text=True)
    assert written_out.render([{"role": "user", "content": parts}]) == "ab"


def test_a_prompt_without_the_last_user_message_is_an_error(template: Make) -> None:
    source = "{% for m in messages %}{{ m.content.split('</think>')[-1] | trim }}\n{% endfor %}"
    made = template(source, require_text=True)
    old = {"role": "assistant", "content": "thought</think>said"}
    first = {"role": "user", "content": "a</think>b"}
    assert made.render([first, old, *HI]) == "b\nsaid\nHi\n", "what it drops earlier is its affair"
    assert made.render([{"role": "user", "content": " \n Hi\t"}]) == "Hi\n"
    with pytest.raises(RequestError, match=r"messages\[1\]: its text is missing") as error:
        made.render([old, first, old])
    assert error.value.param == "messages"
    with pytest.raises(RequestError, match=r"messages\[0\]"):
        made.render([{"role": "user", "content": [{"type": "text", "text": "a</think>"}]}])
    quoted = template("{{ messages[-1].content | tojson }}", require_text=True)
    assert quoted.render([{"role": "user", "content": 'é"\n'}]) == '"é\\"\\n"'


@pytest.mark.parametrize("calls", ["f", {"function": {}}, 1, [1], [{"function": "f"}]])
def test_tool_calls_that_are_none(render: Render, calls: Any) -> None:
    with pytest.raises(RequestError, match="tool_calls"):
        render("{{ 1 }}", [{"role": "assistant", "content": None, "tool_calls": calls}])


def test_no_chat() -> None:
    with pytest.raises(RequestError, match="chat_template=none") as error:
        NoChatTemplate().render(HI)
    assert (error.value.status, error.value.code) == (400, "chat_not_supported")


def test_the_options(tmp_path: Path) -> None:
    """Through the container, as the server starts: what does not compile ends it."""
    from vllm_di.containers.assembly import assemble
    from vllm_di.containers.fill import opened
    from vllm_di.containers.slots import ServerContainer

    def made(*overrides: str) -> ChatTemplate:
        assembly = assemble(["model=tiny", *overrides])
        with opened(ServerContainer, assembly, only=["chat_template"]) as container:
            filled = container.chat_template()
            assert isinstance(filled, ChatTemplate)
            with contextlib.suppress(RequestError):
                filled.render(HI)
            return filled

    (tmp_path / "bad.jinja").write_text("{% if %}")
    (tmp_path / "lost.jinja").write_text("nothing of it")
    assert isinstance(made(), MinijinjaChatTemplate)
    assert isinstance(made("chat_template=none"), NoChatTemplate)
    for option in ("jinja", "minijinja"):
        for name in ("bad", "lost"):
            file = tmp_path / f"{name}.jinja"
            with pytest.raises(ConfigError, match=rf"^command line: .*{name}.*chat_template=none"):
                made(f"chat_template={option}", f"chat_template.template={file}")


def test_a_config_of_0_1_is_told_where_fuel_went(
    template: Make, caplog: pytest.LogCaptureFixture
) -> None:
    template("{{ messages[0].content }}", fuel=1_000_000)
    told = [r.message for r in caplog.records if "fuel" in r.message]
    assert all("chat_template=minijinja" in message for message in told)


CALL = {"type": "function", "function": {"name": "f", "arguments": "{}"}}
NEEDS = "{% for m in messages %}{{ m['role'] + ':' + m['content'] }};{% endfor %}"
CAN_DO_WITHOUT = "{% for m in messages %}{{ m.content if 'content' in m else 'none' }};{% endfor %}"


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=str)
def test_calls_without_content(render: Render, content: dict[str, Any]) -> None:
    messages = [*HI, {"role": "assistant", "tool_calls": [CALL], **content}]
    assert render(NEEDS, messages) == "user:Hi;assistant:;"
    assert render(CAN_DO_WITHOUT, messages) == "Hi;none;"


@pytest.mark.parametrize("content", [{}, {"content": None}], ids=str)
def test_a_message_without_content_is_named(render: Render, content: dict[str, Any]) -> None:
    messages = [*HI, {"role": "user", **content}]
    with pytest.raises(RequestError, match=r"messages\[1\] has no content") as error:
        render(NEEDS, messages)
    assert error.value.param == "messages"
    assert render(CAN_DO_WITHOUT, messages) == "Hi;none;"


@pytest.mark.parametrize(
    ("texts", "prompt", "is_lost"),
    [
        (["a", "b", "a"], "user: a b a", False),
        (["a", "b"], "user: b and then a", False),  # a template may turn them round
        (["a", "far"], f"user: a{'.' * 9000}far", False),
        (['"é"', "\n\nb\n"], json.dumps(['"é"', "x\n\nb"]), False),
        (["a", "b", "c"], "user: a c", True),
        (["a", " "], "user: a", False),
    ],
)
def test_the_texts_of_a_message_are_looked_for(
    texts: list[str], prompt: str, is_lost: bool
) -> None:
    parts = [{"type": "text", "text": text} for text in texts]
    asked: dict[str, Any] = {"role": "user", "content": parts}
    messages = [*HI, asked, {"role": "assistant", "content": "b"}]
    assert lost_user_text(messages, prompt) == (1 if is_lost else None)
