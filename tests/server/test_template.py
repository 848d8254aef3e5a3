"""A chat template gives transformers' text; what it may do is bounded, and its failures have a reason."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest

from everybit.errors import FormatError, RequestError
from everybit.server.template import ChatTemplate
from tests.server.test_grammar import toy

USER = {"role": "user", "content": 'Grüß <b>"Gott"</b> & co'}
CHATS: dict[str, list[dict[str, Any]]] = {
    "user": [USER],
    "turns": [{"role": "system", "content": "Be brief."}, USER, {"role": "assistant", "content": "Hm."}, USER],
    "tools": [
        USER,
        {
            "role": "assistant",
            "content": None,
            "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"ü": "<x>", "n": 1.5}}}],
        },
        {"role": "tool", "content": "3 <ok>"},
    ],
    "thoughts": [USER, {"role": "assistant", "content": "a", "reasoning": "so"}, USER],
    "parts": [{"role": "user", "content": [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]}],
}
TOOLS = [
    {"type": "function", "function": {"name": "f", "description": "F <é>", "parameters": {"type": "object"}}},
]
TEMPLATES = {
    "chatml": "{% for m in messages %}\n  {% if m.role == 'user' %}\n<|u|>{{ m['content'] }}\n  {% endif %}\n"
    "{% endfor %}{% if add_generation_prompt %}<|a|>{% endif %}",
    "tokens": "{{ bos_token }}{% for m in messages %}{{ m.role }}{{ eos_token }}{{ pad_token is defined }}{% endfor %}",
    "json": "{{ tools | tojson }}{{ messages | tojson(indent=2) }}{{ {'b': 1, 'a': '<é>'} | tojson(sort_keys=true) }}",
    "loops": "{% for m in messages %}{{ loop.index }}/{{ loop.length }}{{ loop.last }}{{ loop.previtem is defined }}"
    "{% if loop.index == 2 %}{% break %}{% endif %}{% endfor %}{% for i in range(9) if i % 2 %}{{ i }}{% endfor %}"
    "{% for k, v in messages[0].items() %}{{ k }}{% else %}none{% endfor %}{% for x in undefined_thing %}{% endfor %}",
    "names": "{% set ns = namespace(n=0, self=2) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}"
    "{{ ns.n }}{{ ns.self }}{{ dict(a=1)['a'] }}{{ documents is none }}{{ date_string is defined }}",
    "generation": "a\n{% generation %}\n{% if messages %}b{% endif %}\n{% endgeneration %}\nc",
    "reasoning": "{% for m in messages %}{{ m.reasoning_content }}|{{ m.thinking }}|{{ 'content' in m }};{% endfor %}",
    "time": "{{ strftime_now('%Y-%m') }}",
    "macro": "{% macro show(x, y=1) %}[{{ x }}{{ y }}{{ caller() if caller }}]{% endmacro %}"
    "{% for m in messages %}{{ show(m.role) }}{% endfor %}{% call show(1) %}z{% endcall %}",
}


def folder_of(tmp_path: Path, config: dict[str, Any], jinja: str | None = None) -> Path:
    toy().save(str(tmp_path / "tokenizer.json"))
    base = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": {"content": "</s>"}}
    base["eos_token"] |= {"__type": "AddedToken", "lstrip": False, "rstrip": False, "normalized": False}  # type: ignore[operator]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(base | config))
    if jinja is not None:
        (tmp_path / "chat_template.jinja").write_text(jinja)
    return tmp_path


def theirs(folder: Path, chat: list[dict[str, Any]], tools: Any) -> str:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(folder)
    return str(tokenizer.apply_chat_template(chat, tools=tools, add_generation_prompt=True, tokenize=False))


def ours(folder: Path) -> ChatTemplate:
    template = ChatTemplate.open(folder)
    assert template is not None
    return template


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("where", ["config", "jinja"])
def test_renders_as_transformers(name: str, where: str, tmp_path: Path) -> None:
    text = TEMPLATES[name]
    folder = folder_of(tmp_path, {"chat_template": text if where == "config" else "unused"})
    if where == "jinja":
        (folder / "chat_template.jinja").write_text(text)
    template = ours(folder)
    for chat in CHATS.values():
        for tools in (None, TOOLS):
            assert template.render(chat, tools) == theirs(folder, chat, tools)


def test_named_templates(tmp_path: Path) -> None:
    named = [{"name": "default", "template": "plain"}, {"name": "tool_use", "template": "with {{ tools | length }}"}]
    folder = folder_of(tmp_path, {"chat_template": [*named, {"name": "rag", "template": "other"}]})
    template = ours(folder)
    assert template.supports_tools
    assert template.source == named[1]["template"]
    for tools in (None, TOOLS):
        assert template.render([USER], tools) == theirs(folder, [USER], tools)


def test_real_template(shared_data: Path) -> None:
    folder = shared_data / "tokenizers" / "minimind-6400"
    template = ours(folder)
    assert template.supports_tools
    for chat in CHATS.values():
        for tools in (None, TOOLS):
            assert template.render(chat, tools) == theirs(folder, chat, tools)


def test_special_tokens_map_counts_without_a_decoder(tmp_path: Path) -> None:
    folder = folder_of(tmp_path, {"chat_template": TEMPLATES["tokens"]})
    (folder / "special_tokens_map.json").write_text('{"bos_token": "<other>", "pad_token": {"content": "<pad>"}}')
    assert ours(folder).render([USER]) == theirs(folder, [USER], None) == "<other>user</s>True"


def test_no_template(tmp_path: Path) -> None:
    assert ChatTemplate.open(tmp_path) is None
    assert ChatTemplate.open(folder_of(tmp_path, {})) is None


def test_whether_tools_are_supported() -> None:
    assert ChatTemplate({"default": "{% if tools %}x{% endif %}"}).supports_tools
    assert not ChatTemplate({"default": "{{ messages }} mytools"}).supports_tools


@pytest.mark.parametrize(
    ("jinja", "config", "problem"),
    [
        ("{% if %}", {}, "does not compile"),
        ("{{ x | nofilter }}", {}, "does not compile"),
        ("{% include 'a' %}{% endfor %}", {}, "does not compile"),
        ("{{ " + "(" * 5000 + ")" * 5000 + " }}", {}, "does not compile"),
        ("x" * 1_000_001, {}, "expected at most 1000000 bytes"),
        (None, {"chat_template": 7}, "chat_template is a int"),
        (None, {"chat_template": [{"name": "rag", "template": "x"}]}, "named default"),
        (None, {"chat_template": [{"name": "default", "template": 3}]}, "named default"),
    ],
)
def test_broken_templates(jinja: str | None, config: dict[str, Any], problem: str, tmp_path: Path) -> None:
    with pytest.raises(FormatError, match=problem):
        ChatTemplate.open(folder_of(tmp_path, config, jinja))


def test_broken_files(tmp_path: Path) -> None:
    (tmp_path / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(FormatError, match="not UTF-8"):
        ChatTemplate.open(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "model").mkdir()
    (tmp_path / "elsewhere" / "secret").write_text("x")
    (tmp_path / "model" / "chat_template.jinja").symlink_to(tmp_path / "elsewhere" / "secret")
    with pytest.raises(FormatError, match="outside the folder"):
        ChatTemplate.open(tmp_path / "model")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("{{ raise_exception('roles must alternate') }}", "refused by the model's chat template: roles must alternate"),
        ("{{ messages[0].content + 1 }}", "which failed"),
        ("{{ missing.field }}", "'missing' is undefined"),
        ("{{ missing | tojson }}", "which failed"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ strftime_now.__globals__.os }}", "unsafe"),
        ("{{ dict.__call__.__globals__ }}", "unsafe"),
        ("{% set ns = namespace(__class__=1) %}", "begins with _"),
        ("{% set ns = namespace() %}{% set ns.__class__ = 1 %}", "begins with _"),
        ("{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}", "loops more than"),
        ("{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}", "loops more"),
        ("{% for i in [1] recursive %}{{ loop([1, 1]) }}{% endfor %}", "too deeply"),
        ("{% for i in range(99999) %}" + "x" * 100 + "{% endfor %}", "more than 4000000 characters"),
        ("{{ range(10 ** 9) | list }}", "which failed"),
    ],
)
def test_refused_renders(text: str, problem: str) -> None:
    template = ChatTemplate({"default": text})
    begin = time.process_time()
    with pytest.raises(RequestError, match=problem) as caught:
        template.render([USER])
    assert caught.value.parameter == "messages"
    assert "\n" not in str(caught.value)
    assert time.process_time() - begin < 20


def test_no_messages() -> None:
    with pytest.raises(RequestError, match="at least one"):
        ChatTemplate({"default": "x"}).render([])


def test_text_of_a_request_is_never_a_template() -> None:
    template = ChatTemplate({"default": "{% for m in messages %}{{ m.content }}{% endfor %}"})
    assert template.render([{"role": "user", "content": "{{ 1 + 1 }}{% raw %}"}]) == "{{ 1 + 1 }}{% raw %}"


def test_a_render_changes_nothing_of_ours() -> None:
    template = ChatTemplate({"default": "{% set ns = namespace(m=messages[0]) %}{% set ns.m = 3 %}{{ ns.m }}"})
    message = {"role": "user", "content": [{"type": "text"}]}
    assert template.render([message]) == template.render([message]) == "3"
    assert message == {"role": "user", "content": [{"type": "text"}]}
