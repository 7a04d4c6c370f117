"""Renders chat templates with transformers, for crates/attn-data/tests/chat.rs.

    python3 -m venv /path/to/venv && /path/to/venv/bin/pip install transformers==5.23.0 jinja2
    /path/to/venv/bin/python scripts/make_chat_goldens.py

Writes crates/attn-data/tests/chat/goldens.json: templates, special tokens, conversations, and what transformers makes of
each, or the words with which the template refuses. The templates `llama-2` and `llama-3` are those that Meta publishes
in tokenizer_config.json of the chat models of these names; `tools` is written here for what they do not use.
"""

import json
from pathlib import Path

import jinja2
import transformers
from transformers.utils.chat_template_utils import render_jinja_template

LLAMA_2 = (
    "{% if messages[0]['role'] == 'system' %}{% set loop_messages = messages[1:] %}"
    "{% set system_message = messages[0]['content'] %}{% else %}{% set loop_messages = messages %}"
    "{% set system_message = false %}{% endif %}{% for message in loop_messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{% endif %}"
    "{% if loop.index0 == 0 and system_message != false %}"
    "{% set content = '<<SYS>>\\n' + system_message + '\\n<</SYS>>\\n\\n' + message['content'] %}"
    "{% else %}{% set content = message['content'] %}{% endif %}{% if message['role'] == 'user' %}"
    "{{ bos_token + '[INST] ' + content.strip() + ' [/INST]' }}{% elif message['role'] == 'assistant' %}"
    "{{ ' '  + content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
)
LLAMA_3 = (
    "{% set loop_messages = messages %}{% for message in loop_messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n'"
    "+ message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
# Whole lines of blocks, loop controls, namespaces, macros, JSON, methods of texts and tables, tests, slices.
TOOLS = """\
{{- bos_token }}
{%- set ns = namespace(n=0, seen=[]) %}
{% macro head(role) -%}
    <{{ role | upper }}>
{%- endmacro %}
{%- if tools is not none and tools is defined %}
    {{- raise_exception("no tools") }}
{%- endif %}
    {% for message in messages %}
    {% if message.role == 'skip' %}
        {% continue %}
    {% endif %}
    {% if message['content'].startswith('stop') %}
        {% break %}
    {% endif %}
{{ head(message.role) }} {{ message | tojson }}
    {%- set ns.n = ns.n + 1 %}
    {% endfor %}
{% for key, value in messages[-1].items() %}
{{ key }}={{ value.split(' ')[-1] | tojson }};
{%- endfor %}

{{ messages | length }} {{ ns.n }} {{ messages[0] | tojson(indent=2) }} {{ unk_token is defined }}
{{ messages[::-1][0].role.replace('u', 'U') }} {{ 'a' ~ 1 }} {{ [1, true, none] | tojson }}
{{ messages | map(attribute='role') | join(', ') }} {{ messages[0].get('name', 'nobody') }}
{% if add_generation_prompt %}go
{% endif %}
"""

TEMPLATES = {
    "llama-2": (LLAMA_2, {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}),
    "llama-3": (LLAMA_3, {"bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>"}),
    "tools": (TOOLS, {"bos_token": "<s>", "eos_token": "</s>"}),
}


def chat(*turns):
    return [{"role": role, "content": content} for role, content in turns]


CHATS = {
    "user": chat(("user", "  Is it <b>good</b> & \"new\"? \n")),
    "system": chat(("system", "Answer in one word."), ("user", "Warum nicht, Zoë? 🙂")),
    "turns": chat(("system", " S "), ("user", "one"), ("assistant", " two "), ("user", "stop\tthree\\n"), ("assistant", "four")),
    "answered": chat(("user", "it's"), ("assistant", "entailment")),
    "skips": chat(("skip", "a"), ("user", "b's \"c\"\n\u00a0\u200b\x07"), ("assistant", "d'")),
    "twice": chat(("user", "one"), ("user", "two")),
}


def main():
    goldens = {"transformers": transformers.__version__, "jinja2": jinja2.__version__, "templates": {}, "cases": []}
    for name, (source, tokens) in TEMPLATES.items():
        goldens["templates"][name] = {"source": source, "tokens": tokens}
        for title, messages in CHATS.items():
            for generate in [False, True]:
                case = {"template": name, "chat": title, "messages": messages, "add_generation_prompt": generate}
                try:
                    (text,), _ = render_jinja_template(
                        [messages], chat_template=source, add_generation_prompt=generate, **tokens
                    )
                    case["text"] = text
                except jinja2.exceptions.TemplateError as error:
                    case["error"] = str(error)
                case["repr"] = repr(messages)
                goldens["cases"].append(case)
    path = Path(__file__).parent.parent / "crates/attn-data/tests/chat/goldens.json"
    path.write_text(json.dumps(goldens, indent=1, ensure_ascii=True) + "\n")
    print(f"{len(goldens['cases'])} cases in {path}")


if __name__ == "__main__":
    main()
