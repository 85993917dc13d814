"""Writes tests/fixtures/chat_templates.json: templates, conversations, and what transformers renders.

Most templates are small, one for an idiom of Jinja2 or Python; `FAMILIES` are written after the templates that
models of those families come with. A case is a template, a conversation and whether the assistant's turn is opened:
its text, or none where transformers refuses it. `continued` are conversations that end with an assistant's turn,
rendered with `continue_final_message`; `behind` is what follows an assistant's turn. The Rust tests compare and need no Python. Run by hand:

    python tests/oracle/chat_templates.py [more.jinja ...]

with transformers 4.57, jinja2 3.1. Templates of files named behind it are compared but not kept: the fixture then
goes to more.json beside the first of them.
"""

import json
import sys
from datetime import datetime
from pathlib import Path

from transformers.utils import chat_template_utils

FIXTURE = Path(__file__).parent.parent / "fixtures" / "chat_templates.json"
SPECIAL = dict(bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="<pad>")


class Day(datetime):
    """What `strftime_now` is told: 9 March 2026 at midnight."""

    @classmethod
    def now(cls, tz=None):
        return cls(2026, 3, 9)


chat_template_utils.datetime = Day


def turns(*contents, system=None, first="user"):
    roles = ["user", "assistant"] if first == "user" else ["assistant", "user"]
    said = [dict(role=roles[i % 2], content=content) for i, content in enumerate(contents)]
    return ([dict(role="system", content=system)] if system is not None else []) + said


# The keys of a turn are in the order in which flowrun has them: role, content, and the others.
CALL = dict(type="function", id="call00001", function=dict(name="weather", arguments=dict(
    city="Kyōto", days=3, exact=True, limit=None, ratio=0.5, tiny=1e-7, huge=1e22, more=[1, [], {}])))
CONVERSATIONS = [
    turns("Hi"),
    turns("Hi", "Hello!"),
    turns("Hi", "Hello!", "How are you?"),
    turns("Hi", system="Be brief."),
    turns("Hi", "Hello!", "And now?", "Now too.", "Well?", system="Be brief.\nBe kind."),
    turns("  A <b> & \"c\" 'd'  \n"),
    turns("line one\nline two\r\nline three\n\n"),
    turns("{{ messages }} {% if %} {# no #} %s %d"),
    turns("2 + 2 = 4; 100 %, \\n \\\\ \u00e4\u00f6 \u4f60\u597d \U0001f44b \u2028 \x1f \x7f"),
    turns(""),
    turns("Think.", "<think>\nSo it is.\n</think>\n\nYes.", "Sure?"),
    turns("Think.", "<think>a</think>b</think>c"),
    turns("Hello!", first="assistant"),
    turns("one", "two", first="user") + turns("three"),
    [dict(role="user", content="Weather?"), dict(role="assistant", content="", tool_calls=[CALL]),
     dict(role="tool", content="{\"sun\": true}", name="weather", tool_call_id="call00001"),
     dict(role="assistant", content="Sunny.")],
    [dict(role="user", content="Hi", name="ann"),
     dict(role="assistant", content="Hello!", reasoning_content="Easy."), dict(role="user", content="12")],
    [dict(role="developer", content="Answer in verse."), dict(role="user", content="7.9")],
    [],
]

# Conversations that end with an assistant's turn, to be continued.
CONTINUED = [
    turns("Hi", "Hello"),
    turns("Reply in JSON.", "{\"a\":"),
    turns("Hi", "  Hello, \n"),
    turns("Hi", "Hello", "Again", "Hello", system="Be brief."),
    turns("Hi", ""),
    turns("Hi", "<|im_end|>"),
    turns("Think.", "<think>\nSo"),
]

LOOP = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
IDIOMS = {
    "none is iterable": "{%- if tools is iterable and tools | length > 0 %}TOOLS{% endif %}" + LOOP,
    "iterable": "{% for m in messages %}{{ m.content is iterable }}{{ m is iterable }}{{ 3 is iterable }}"
                "{{ nothing is iterable }}{{ none is iterable }}{% endfor %}",
    "crlf": "{% for m in messages %}\r\n<{{ m.role }}>{{ m.content }}\r\n{% endfor %}\r\nend\r\n",
    "cr": "{% for m in messages %}\r  <{{ m.role }}>\r{% endfor %}\rend\r",
    "newline in a text": "{{ 'a\r\nb' }}{{ 'c\rd' | length }}",
    "raw": "{% raw %}\n{{ kept }}{% endraw %}" + LOOP,
    "raw and spaces": "a\n  {% raw %}  \n  {% if %} {# x #} '%s' % y\n  {% endraw %}\n\nb{%- raw -%}  c  {%- endraw -%}  d",
    "raw in a comment": "{# {% raw %}\n #}x{# {% endraw %} #}\n{{ '{% raw %}\n' }}",
    "comments": "a{# one\n two #}\n  {#- three -#}\n  b\n  {# four #}\nc",
    "spaces": "  {% if true %}\n  x\n  {%- if true -%}\n  y\n  {%+ if true +%}\n z\n{% endif %}{% endif %}\n\n{% endif %}\n\n",
    "generation": "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}\n{{ m.content }}\n{%- endgeneration -%}\n"
                  "{% else %}{{ m.content }}{% endif %}{% endfor %}",
    "percent": "{% for m in messages %}{{ '<|%s|>' % m.role }}{{ '%s: %s\n' % (m.role, m.content) }}{% endfor %}",
    "percent of a name": "{% set form = '[%s]' %}{% for m in messages %}{{ form % m.role ~ '!' }}{{ form % (loop.index,) }}{% endfor %}",
    "percent of kinds": "{{ '%d %5d %-5d| %05.2f %x %s %s %% %(a)s' % {'a': 1} if false else '%d|%5d|%-5d|%05.2f|%x|%s|%s|%%' % (3, 4, 5, 6.789, 255, none, [1, 'a']) }}"
                        "{{ '%(a)s-%(b)03d' % {'a': 'x', 'b': 7} }}",
    "percent of numbers": "{% set n = 3 %}{% for m in messages %}{{ loop.index0 % 2 }}{{ loop.index % n }}{{ -7 % n }}"
                          "{{ 7 * 5 % n }}{{ (7 - 9) % n }}{{ 7.5 % 2 }}{% endfor %}",
    "percent and filters": "{{ ('%s' % messages | length) | int + 1 }}{{ 'a' ~ '%s' % 'b' | upper ~ 'c' }}",
    "removeprefix": "{% for m in messages %}{{ m.content.removeprefix('H').removesuffix('!') }}|{{ m.content.removeprefix('') }}{% endfor %}",
    "partition": "{% for m in messages %}{{ m.content.partition('l') }}{{ m.content.rpartition('l')[2] }}"
                 "{% set a, b, c = m.content.partition('</think>') %}{{ a | trim }}/{{ c | trim }}{% endfor %}",
    "index": "{% for m in messages if 'l' in m.content %}{{ m.content.index('l') }}{{ m.content.rindex('l') }}"
             "{{ m.content.find('l', 3) }}{{ m.content.rfind('l', 0, -2) }}{% endfor %}",
    "index of nothing": "{{ 'abc'.index('z') }}",
    "index of a list": "{{ ['a', 'b'].index('b') }}{{ ['a', 'a', 'b'].count('a') }}",
    "split": "{% for m in messages %}{{ m.content.split() }}{{ m.content.split('l') }}{{ m.content.split(None, 1) }}"
             "{{ m.content.split('l', 1) }}{{ m.content.split(maxsplit=1) }}{{ m.content.split(sep='e', maxsplit=2) }}{% endfor %}",
    "rsplit": "{% for m in messages %}{{ m.content.rsplit() }}{{ m.content.rsplit('l', 1) }}{{ m.content.rsplit(None, 1) }}"
              "{{ m.content.rsplit('</think>', maxsplit=1)[-1] }}{% endfor %}",
    "splitlines": "{% for m in messages %}{{ m.content.splitlines() }}{{ m.content.splitlines(true) | length }}{% endfor %}",
    "zfill": "{% for m in messages %}{{ loop.index | string | length }}{{ '7'.zfill(3) }}{{ '-7'.zfill(4) }}{{ m.role.zfill(12) }}{% endfor %}",
    "justified": "{% for m in messages %}{{ m.role.ljust(12, '.') }}|{{ m.role.rjust(12) }}|{{ m.role.center(9, '*') }}|{{ m.role.center(12, '*') }}{% endfor %}",
    "strip": "{% for m in messages %}[{{ m.content.strip() }}][{{ m.content.lstrip() }}][{{ m.content.rstrip('\n ') }}][{{ m.content | trim }}]{% endfor %}",
    "case": "{% for m in messages %}{{ m.content.title() }}{{ m.content.capitalize() }}{{ m.content.swapcase() }}{{ m.role.upper() }}{{ \"they're\".title() }}{% endfor %}",
    "startswith": "{% for m in messages %}{{ m.content.startswith(('H', 'A')) }}{{ m.content.endswith('!') }}{{ m.content.startswith('e', 1) }}{{ m.content.count('l') }}{% endfor %}",
    "replace": "{% for m in messages %}{{ m.content.replace('l', 'L', 1) }}{{ m.content | replace('e', 'E') }}{% endfor %}",
    "format": "{% for m in messages %}{{ '{}: {!r} {0}'.format(m.role, m.content) if false else '{}-{}'.format(m.role, loop.index) }}"
              "{{ '%s|%s' | format(m.role, loop.index) }}{{ '{a:>6}{b}'.format(a=m.role, b=1) }}{% endfor %}",
    "default": "{{ none | default('x', boolean=true) }}{{ '' | default('y', true) }}{{ nothing | default }}"
               "{{ nothing | default('z') }}{{ none | default('w') }}{{ nothing | d(default_value='v') }}",
    "int": "{% for m in messages %}{{ m.content | int }}{{ m.content | int(default=7) }}{{ m.content | float }}{% endfor %}"
           "{{ ' 12 ' | int }}{{ '1_000' | int }}{{ '0x1f' | int(base=16) }}{{ '1e3' | int }}{{ none | int }}{{ [] | int }}{{ true | int }}{{ -3.9 | int }}",
    "callable": "{{ range is callable }}{{ messages is callable }}{{ 'a' is callable }}{{ raise_exception is callable }}"
                "{% macro f() %}x{% endmacro %}{{ f is callable }}{{ namespace is callable }}{{ nothing is callable }}",
    "cycler": "{% set c = cycler('a', 'b', 'c') %}{% for m in messages %}{{ c.next() }}{{ c.current }}{% endfor %}{{ c.reset() }}{{ c.next() }}",
    "joiner": "{% set j = joiner('; ') %}{% set k = joiner() %}{% for m in messages %}{{ j() }}{{ m.role }}{{ k() }}{% endfor %}",
    "sequence": "{% for m in messages %}{{ m.content is sequence }}{{ m is sequence }}{{ m is mapping }}{{ m.content is string }}{% endfor %}"
                "{{ messages is sequence }}{{ 3 is sequence }}{{ none is sequence }}{{ nothing is sequence }}{{ (1, 2) is sequence }}",
    "tojson": "{% for m in messages %}{{ m | tojson }}{{ m | tojson(indent=2) }}{{ m.content | tojson }}{% endfor %}",
    "tojson separators": "{% for m in messages %}{{ m | tojson(separators=(',', ':')) }}{{ m | tojson(separators=(', ', '='), indent=1) }}{% endfor %}",
    "tojson sort_keys": "{% for m in messages %}{{ m | tojson(sort_keys=true) }}{{ {'b': 1, 'a': [{'d': none, 'c': true}]} | tojson(sort_keys=true, indent=4) }}{% endfor %}",
    "tojson ensure_ascii": "{% for m in messages %}{{ m | tojson(ensure_ascii=true) }}{{ m | tojson(ensure_ascii=False) }}{% endfor %}",
    "tojson of kinds": "{{ [1, 2.0, 1e20, 1e-5, true, none, 'x', (1, 2), {}, [], {1: 2, none: 3, true: 4}] | tojson }}{{ [] | tojson(indent=2) }}{{ [[]] | tojson(indent='\t') }}{{ {'a': 1} | tojson(indent=0) }}",
    "tojson of nothing": "{{ nothing | tojson }}",
    "strftime_now": "{{ strftime_now('%d %b %Y') }}{{ strftime_now('%Y-%m-%d %H:%M:%S %A %B %-d %j') }}",
    "printed": "{% for m in messages %}{{ m }}{{ [m.role, 1, 2.5, none, true] }}{{ (m.role,) }}{{ m.content ~ [m.role] }}{% endfor %}",
    "slices": "{{ messages[::-1] | length }}{% for m in messages[1:] %}{{ m.role[:2] }}{{ m.content[-3:] }}{{ m.content[::2] }}{% endfor %}",
    "loop": "{% for m in messages %}{{ loop.index }}{{ loop.first }}{{ loop.last }}{{ loop.length }}{{ loop.revindex0 }}"
            "{% if loop.previtem is defined %}{{ loop.previtem.role }}{% endif %}{{ loop.cycle('a', 'b') }}{% if loop.index > 3 %}{% break %}{% endif %}{% endfor %}",
    "namespace": "{% set ns = namespace(n=0, last=none) %}{% for m in messages %}{% set ns.n = ns.n + m.content | length %}{% set ns.last = m %}{% endfor %}{{ ns.n }}{{ ns.last.role if ns.last }}",
    "select": "{{ messages | selectattr('role', 'equalto', 'user') | list | length }}{{ messages | rejectattr('role', 'in', ['user', 'tool']) | map(attribute='role') | join(',') }}"
              "{{ (messages | first).role if messages }}{{ messages | map(attribute='content') | map('upper') | join('|') }}",
    "items": "{% for m in messages %}{% for k, v in m.items() %}{{ k }}={{ v }};{% endfor %}{% for k in m %}{{ k }},{% endfor %}{{ m.get('name', 'nobody') }}{{ m.keys() | list }}{{ 'name' in m }}{% endfor %}",
    "dictsort": "{% for m in messages %}{% for k, v in m | dictsort %}{{ k }}:{{ v }} {% endfor %}{{ m | items | list | length }}{% endfor %}",
    "macro": "{% macro turn(m, end='!', open=false) -%}\n<{{ m.role }}>{{ m.content }}{{ end }}{% if open %}?{% endif %}\n{%- endmacro %}{% for m in messages %}{{ turn(m, open=true) }}{{ turn(m, '.') }}{% endfor %}",
    "call": "{% macro wrap(tag) %}<{{ tag }}>{{ caller() }}</{{ tag }}>{% endmacro %}{% for m in messages %}{% call wrap(m.role) %}{{ m.content }}{% endcall %}{% endfor %}",
    "set and filter blocks": "{% set text %}{% for m in messages %}{{ m.role }} {% endfor %}{% endset %}{{ text | upper }}{% filter upper %}abc{% endfilter %}",
    "raise": "{% if messages and messages[0].role != 'user' %}{{ raise_exception('Only users, please') }}{% endif %}" + LOOP,
    "arithmetic": "{{ 7 // 2 }}{{ -7 // 2 }}{{ 7 / 2 }}{{ 2 ** 10 }}{{ '-' * 5 }}{{ [1] + [2] }}{{ 1 < 2 < 3 }}{{ not 1 }}{{ 'a' in 'abc' }}{{ 3 in [1, 2] }}{{ 1 if false }}",
    "texts": "{{ 'a' 'b' }}{{ 'it\\'s' }}{{ \"tab\\there\" }}{{ '\\u00e4\\x41' }}{{ 'a\\\\b' }}",
    "escapes": "{{ '\\U0001f44b\\a\\v\\/\\0' }}{{ 'a\\\nb' }}{{ '\\q\\d' }}{{ \"\\\"'\" }}",
    "indent": "{% for m in messages %}{{ m.content | indent(4) }}|{{ m.content | indent(2, true) }}|"
              "{{ m.content | indent(width=3, first=true, blank=true) }}|{{ m.content | indent('>> ') }}{% endfor %}",
    "filters of texts": "{% for m in messages %}{{ m.role | center(12) }}{{ m.content | truncate(9) }}{{ m.content | truncate(7, true, '..', leeway=0) }}"
                        "{{ m.content | wordcount }}{{ m.content | escape }}{{ m.content | title }}{{ m.content | capitalize }}{% endfor %}",
    "undefined": "{% for m in messages %}{{ m.nothing }}{{ m.nothing is defined }}{{ m['name'] is defined }}{% if m.nothing %}x{% endif %}{{ (m.nothing or 'y') }}{% endfor %}",
    "undefined of undefined": "{{ nothing.more }}",
    "tool calls": "{% for m in messages %}{% if m.tool_calls %}{% for c in m.tool_calls %}{% set f = c.function %}"
                  "<tool_call>\n{\"name\": \"{{ f.name }}\", \"arguments\": {{ f.arguments | tojson }}}\n</tool_call>{{ f.arguments }}"
                  "{% for k, v in f.arguments.items() %}{{ k }}={{ v | tojson if v is mapping or (v is sequence and v is not string) else v | string }};{% endfor %}"
                  "{% endfor %}{% elif m.reasoning_content is defined and m.reasoning_content is string %}<think>{{ m.reasoning_content }}</think>{{ m.content }}"
                  "{% else %}{{ m.name | default(m.role) }}: {{ m.content }}{% endif %}{% endfor %}",
}

# Written after the templates of these families, with what is particular to each.
FAMILIES = {
    "chatml": "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
              "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    "gemma": "{{ bos_token }}{% if messages and messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
             "{% for message in messages %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
             "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
             "{% if (message['role'] == 'assistant') %}{% set role = 'model' %}{% else %}{% set role = message['role'] %}{% endif %}"
             "{{ '<start_of_turn>' + role + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
             "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}",
    "phi": "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
           "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}",
    "llama 3": "{{- bos_token }}\n{%- if messages and messages[0]['role'] == 'system' %}\n    {%- set system_message = messages[0]['content']|trim %}\n"
               "    {%- set messages = messages[1:] %}\n{%- else %}\n    {%- set system_message = '' %}\n{%- endif %}\n"
               "{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}\n{{- 'Today Date: ' + strftime_now('%d %b %Y') + '\\n\\n' }}\n"
               "{{- system_message }}\n{{- '<|eot_id|>' }}\n{%- for message in messages %}\n"
               "    {%- if not (message.role == 'ipython' or message.role == 'tool' or 'tool_calls' in message) %}\n"
               "        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim + '<|eot_id|>' }}\n"
               "    {%- elif 'tool_calls' in message %}\n        {%- set call = message.tool_calls[0].function %}\n"
               "        {{- '{\"name\": \"' + call.name + '\", \"parameters\": ' + (call.arguments | tojson) + '}' + '<|eot_id|>' }}\n"
               "    {%- else %}\n        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + (message.content | tojson if message.content is mapping or message.content is iterable else message.content) + '<|eot_id|>' }}\n"
               "    {%- endif %}\n{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}\n{%- endif %}\n",
    "mistral": "{%- if messages and messages[0]['role'] == 'system' %}{%- set system = messages[0]['content'] %}{%- set loop_messages = messages[1:] %}"
               "{%- else %}{%- set loop_messages = messages %}{%- endif %}{{- bos_token }}{%- for message in loop_messages %}"
               "{%- if message['role'] == 'user' %}{%- if loop.last and system is defined %}{{- '[INST] ' + system + '\n\n' + message['content'] + '[/INST]' }}"
               "{%- else %}{{- '[INST] ' + message['content'] + '[/INST]' }}{%- endif %}"
               "{%- elif message['role'] == 'assistant' %}{{- ' ' + message['content']|trim + eos_token }}{%- else %}{{- raise_exception('Only user and assistant roles') }}{%- endif %}{%- endfor %}",
    "qwen 3": "{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}\n{%- for message in messages[::-1] %}\n"
              "    {%- set index = (messages|length - 1) - loop.index0 %}\n    {%- if ns.multi_step_tool and message.role == 'user' and message.content is string and not(message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}\n"
              "        {%- set ns.multi_step_tool = false %}\n        {%- set ns.last_query_index = index %}\n    {%- endif %}\n{%- endfor %}\n"
              "{%- for message in messages %}\n    {%- set content = message.content if message.content is string else '' %}\n"
              "    {%- if message.role in ['user', 'system'] %}\n        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}\n"
              "    {%- elif message.role == 'assistant' %}\n        {%- set reasoning_content = '' %}\n        {%- if message.reasoning_content is string %}\n            {%- set reasoning_content = message.reasoning_content %}\n"
              "        {%- elif '</think>' in content %}\n            {%- set reasoning_content = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}\n            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}\n        {%- endif %}\n"
              "        {%- if loop.index0 > ns.last_query_index and (loop.last or reasoning_content) %}\n            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning_content.strip('\\n') + '\\n</think>\\n\\n' + content.lstrip('\\n') }}\n"
              "        {%- else %}\n            {{- '<|im_start|>assistant\\n' + content }}\n        {%- endif %}\n"
              "        {%- for call in message.tool_calls or [] %}\n            {{- '\\n<tool_call>\\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{- call.function.arguments if call.function.arguments is string else call.function.arguments | tojson }}{{- '}\\n</tool_call>' }}\n        {%- endfor %}\n        {{- '<|im_end|>\\n' }}\n"
              "    {%- elif message.role == 'tool' %}\n        {%- if loop.first or (messages[loop.index0 - 1].role != 'tool') %}\n            {{- '<|im_start|>user' }}\n        {%- endif %}\n        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}\n        {%- if loop.last or (messages[loop.index0 + 1].role != 'tool') %}\n            {{- '<|im_end|>\\n' }}\n        {%- endif %}\n    {%- endif %}\n{%- endfor %}\n"
              "{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n    {%- if enable_thinking is defined and enable_thinking is false %}\n        {{- '<think>\\n\\n</think>\\n\\n' }}\n    {%- endif %}\n{%- endif %}",
    "zephyr": "{% for message in messages %}\n{% if message['role'] == 'user' %}\n{{ '<|user|>\n' + message['content'] + eos_token }}\n{% elif message['role'] == 'system' %}\n{{ '<|system|>\n' + message['content'] + eos_token }}\n"
              "{% elif message['role'] == 'assistant' %}\n{{ '<|assistant|>\n'  + message['content'] + eos_token }}\n{% endif %}\n{% if loop.last and add_generation_prompt %}\n{{ '<|assistant|>' }}\n{% endif %}\n{% endfor %}",
}


def render(template, messages, **options):
    try:
        texts, _ = chat_template_utils.render_jinja_template(
            conversations=[messages], chat_template=template, **options, **SPECIAL)
        return dict(text=texts[0])
    except Exception as error:  # whatever a template or Jinja2 says no with
        return dict(text=None, error=f"{type(error).__name__}: {error}"[:160])


def cases(template):
    for conversation, messages in enumerate(CONVERSATIONS):
        for opened in (False, True):
            yield dict(conversation=conversation, add_generation_prompt=opened,
                       **render(template, messages, add_generation_prompt=opened))


def continued(template):
    for conversation, messages in enumerate(CONTINUED):
        yield dict(conversation=conversation, **render(template, messages, continue_final_message=True))


def behind(template):
    """What stands behind an assistant's turn that is the last, and behind one that another follows."""
    answer = "THE-ANSWER"
    talk = turns("Well?", answer)
    texts = [render(template, talk + more)["text"] for more in ([], turns("And now?"))]
    return [text.rsplit(answer, 1)[1] for text in texts]


def main(files):
    templates = {**IDIOMS, **FAMILIES} if not files else {path: Path(path).read_bytes().decode() for path in files}
    entries = [dict(name=name, template=template, cases=list(cases(template)),
                    continued=list(continued(template)) if files or name in FAMILIES else [],
                    behind=behind(template) if name in FAMILIES else [])
               for name, template in templates.items()]
    fixture = dict(special=SPECIAL, conversations=CONVERSATIONS, continued=CONTINUED, templates=entries)
    out = Path(files[0]).with_name("more.json") if files else FIXTURE
    out.write_text(json.dumps(fixture, ensure_ascii=False, indent=1) + "\n")
    print(f"{out}: {len(entries)} templates, {sum(len(e['cases']) for e in entries)} cases, "
          f"{sum(c['text'] is None for e in entries for c in e['cases'])} refused")


if __name__ == "__main__":
    main(sys.argv[1:])
