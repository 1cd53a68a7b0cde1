"""A dozen templates of our own writing x the twelve conversations, equal to transformers: each uses
what some engine of templates renders otherwise."""

from __future__ import annotations

import pytest
from tests.components.chat_template.equality import differences

CHATML = """
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\n' + (message.content or '') + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\n' }}
{%- endif %}"""

GUARDED_TOOLS = """{{ bos_token }}
{%- if tools is iterable and tools | length > 0 %}
Tools: {% for tool in tools %}{{ tool.function | tojson(indent=2) }};{% endfor %}
{% endif %}
{% for m in messages %}
[{{ m.role }}] {{ m.content if m.content is defined else '-' }}
{% for call in m.tool_calls or [] %}
call {{ call.function.name }} {{ call.function.arguments | tojson(sort_keys=true) }}
{% for key, value in call.function.arguments | items %}<{{ key }}={{ value }}>{% endfor +%}
{% endfor %}
{% endfor %}"""

ALTERNATING = """{%- if messages[0]['role'] == 'system' %}
    {%- set system, turns = messages[0]['content'] ~ '\n\n', messages[1:] %}
{%- else %}
    {%- set system, turns = '', messages %}
{%- endif %}
{%- for m in turns %}
    {%- if (m['role'] == 'user') != (loop.index0 % 2 == 0) %}
        {{- raise_exception('Roles must alternate: ' + m.role) }}
    {%- endif %}
    {%- if loop.first %}{{ system }}{% endif %}
    {{- '[INST] ' ~ m.content | trim ~ ' [/INST]' if m['role'] == 'user' else m.content }}
    {{- eos_token if m.role == 'assistant' }}
{%- endfor %}"""

PARTS_ALONE = """{% for m in messages %}{{ m.role }}:
{%- for part in m.content %}{% if part['type'] == 'text' %} {{ part.text }}{% endif %}{% endfor %}
{% endfor %}"""

PARTS_OR_STRING = """{% for m in messages %}<{{ m.role }}>
{% if m.content is string %}{{ m.content }}{% else %}
{% for part in m.content %}{{ part.text }}|{% endfor %}{% endif %}
</{{ m.role }}>
{% endfor %}"""

PYTHON_METHODS = """{% for m in messages %}{% set text = messages[0].content %}
{{ '%-10s|%3d%%' % (m.role, loop.index) }} {{ m.content or '' }}
{{ text.strip().split(' ', 1)[-1] }}
{{ text.rsplit('+', 1)[0] }}/{{ text.partition('+')[2] }}/{{ text.upper().title().swapcase() }}
{{ text.startswith(('W', 'T')) }} {{ text.replace('2', 'two', 1) }} {{ '{:>8}'.format(m.role) }}
{{ text[::-1] }} {{ text.encode('utf-8') | length }} {{ text.find('2') }}{{ text.isdigit() }}
{% endfor %}"""

TYPES = """{{ messages[-1].content }}
{{ 'x' is sequence }}{{ none is iterable }}{{ {} is mapping }}{{ 1.0 }}{{ 1e20 }}
{{ 7 // 2 }}{{ 7 / 2 }}{{ 1.0 | tojson }} {{ none }} {{ true }} {{ [1, 'a', none, 1.5] }}
{{ {'k': 'ü'} }}
{{ 'ü' | tojson }}{{ 'ü' | tojson(ensure_ascii=true) }}
{{ {'b': 1, 'a': [2]} | tojson(separators=(',', ':')) }}
{{ undefined_name is defined }}{{ undefined_name }}{{ 2 ** 70 }}{{ -7 % 3 }}{{ 3 | string }}"""

LOOPS = """{% for m in messages %}
{% if m.role == 'system' %}{% continue %}{% endif %}
{{ loop.index }}{{ loop.revindex0 }}{{ loop.last }}{{ loop.previtem.role if loop.previtem }}
{{ m.content }}
{% if loop.index > 9 %}{% break %}{% endif %}
{% endfor %}{% for i in range(5) if i % 2 %}{{ i }}{% else %}none{% endfor %}"""

GENERATION = """{% set seen = namespace(n=0, last='') %}
{% for m in messages %}
{% if m.role == 'assistant' %}
{% generation %}
{% set seen.n = seen.n + 1 %}{% set inner = 'set here' %}
{{ m.content }}<end>
{%- endgeneration %}{{ inner }}
{% else %}
{{ m.role }}: {{ m.content }}
{% endif %}
{% endfor %}{{ seen.n }} answers{{ '\n' if add_generation_prompt }}"""

MACROS = """{% macro show(message, mark='-') %}{{ mark }} {{ message.content }}
{{- caller() if caller }}
{% endmacro %}
{% set head %}Today is {{ strftime_now('%d %b %Y, %H:%M') }}.{% endset %}
{{ head | trim | upper }}
{% for m in messages %}{{ show(m, mark=m.role[0]) }}
{% call show(m) %}!{% endcall %}{% endfor %}
{{ dict(a=1, b=2) | dictsort }}{{ dict.fromkeys(['x']) }}{{ cycler('a', 'b').next() }}"""

THINKING = """{% set ns = namespace(last=-1) %}
{% for m in messages if m.role == 'user' %}{% set ns.last = loop.index0 %}{% endfor %}
{% for m in messages %}
{% if m.role == 'assistant' and m.reasoning_content is string and loop.index0 > ns.last %}
<think>{{ m.reasoning_content.strip() }}</think>
{% elif m.thinking %}
({{ m.thinking.split('\n')[-1].rstrip('.') }})
{% endif %}
{{ m.role }}: {{ (m.content or '').split('</nothing>')[-1].lstrip('\n') }}
{% endfor %}{{ 'no thoughts' if enable_thinking is defined and enable_thinking is false }}"""

FILTERS = """{{ messages | selectattr('role', 'equalto', 'user') | map(attribute='role') | list }}
{{ messages | map(attribute='role') | unique | join(',') }}
{{ messages | groupby('role') | length }}
{{ messages | rejectattr('role', 'eq', 'tool') | list | last | tojson }}
{{ documents is none }}{{ messages | tojson }}{{ tools | tojson if tools }}
{{ ['b', 'A'] | sort | first }} {{ '<&>' | e }}
{{ 'a b' | replace(' ', '_') | capitalize }} {{ [3, 1] | sum }} {{ 3.7 | round | int }}
{{ 'x' | indent }}{{ messages[-1].content | default('-', true) | length }}
{{ [1, 2, 3] | batch(2) | list }}"""

TEMPLATES = {
    "chatml": CHATML,
    "guarded tools": GUARDED_TOOLS,
    "alternating": ALTERNATING,
    "parts alone": PARTS_ALONE,
    "parts or string": PARTS_OR_STRING,
    "methods": PYTHON_METHODS,
    "types": TYPES,
    "loops": LOOPS,
    "generation": GENERATION,
    "macros": MACROS,
    "thinking": THINKING,
    "filters": FILTERS,
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_equal_to_transformers(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    assert differences(TEMPLATES[name], monkeypatch) == {}
