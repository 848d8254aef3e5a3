"""Messages to a prompt, by the chat template of a model folder; the same text as transformers' apply_chat_template.

    template = ChatTemplate.open(folder)
    prompt = template.render([{"role": "user", "content": "Hello"}])

A template is code of the model's author: it runs in jinja2's sandbox, and comes from the model folder only, never from
a request. What it may write and how often it may loop is bounded; the memory that one expression takes is not.

The text holds the BOS where the template writes one: encode it without adding special tokens, or there are two.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextvars import ContextVar
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from everybit.errors import FormatError, RequestError, reason
from everybit.formats.files import read_inside
from everybit.formats.jsontext import parse_object

TEMPLATE_BYTES_LIMIT = 1_000_000
RENDERED_LIMIT = 4_000_000  # characters
LOOP_LIMIT = 1_000_000  # turns of all loops of one render

_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
_REASONING = ("reasoning_content", "thinking", "reasoning")


class ChatTemplate:
    """The chat template of a model. Make one with `ChatTemplate.open`.

    `source`: the text of the template that renders tools. `supports_tools`: whether it does anything with them.
    """

    def __init__(self, sources: Mapping[str, str], tokens: Mapping[str, str] | None = None) -> None:
        """`sources` by name: "default", and "tool_use" where tools have a template of their own.

        Raises: FormatError (one that does not compile)
        """
        self.source = sources.get("tool_use", sources["default"])
        self.supports_tools = re.search(r"\btools\b", self.source) is not None
        self._tokens = dict(tokens or {})
        self._plain = _compile(sources["default"])
        self._with_tools = _compile(self.source)

    @classmethod
    def open(cls, folder: str | Path) -> ChatTemplate | None:
        """The template in `folder`: chat_template.jinja, or else that of tokenizer_config.json; None without either.

        Raises: FormatError
        """
        folder = Path(folder).expanduser()
        config = _settings(folder, "tokenizer_config.json")
        if (folder / "chat_template.jinja").is_file():
            try:
                text = read_inside(folder, "chat_template.jinja").decode("utf-8")
            except UnicodeDecodeError as error:
                raise FormatError(
                    f"{folder}/chat_template.jinja is not UTF-8 text (byte {error.start}): download it again"
                ) from None
            sources = {"default": text}
        else:
            found = config.get("chat_template")
            if found is None:
                return None
            sources = _named(found, folder)
        for text in sources.values():
            if len(text.encode("utf-8", "replace")) > TEMPLATE_BYTES_LIMIT:
                raise FormatError(
                    f"{folder} has a chat template of {len(text)} characters, expected at most "
                    f"{TEMPLATE_BYTES_LIMIT} bytes: download it again"
                )
        if "added_tokens_decoder" not in config:  # as transformers does, and our Tokenizer
            config = config | _settings(folder, "special_tokens_map.json")
        try:
            return cls(sources, {name: _content(config[name]) for name in _TOKENS if config.get(name)})
        except FormatError as error:
            raise FormatError(f"{folder}: {error}") from None

    def render(self, messages: Sequence[Mapping[str, Any]], tools: Sequence[Mapping[str, Any]] | None = None) -> str:
        """The prompt that asks for the assistant's next message.

        Raises: RequestError (the template refuses the messages, or fails on them)
        """
        if not messages:
            raise RequestError("messages", "is empty: expected at least one message")
        template = self._with_tools if tools is not None else self._plain
        pieces, length = [], 0
        running = _turns.set(_Turns())
        try:
            for piece in template.generate(
                **self._tokens,
                messages=[_message(message) for message in messages],
                tools=None if tools is None else [_data(tool) for tool in tools],
                documents=None,
                add_generation_prompt=True,
            ):
                length += len(piece)
                if length > RENDERED_LIMIT:
                    raise _BoundError(f"writes more than {RENDERED_LIMIT} characters")
                pieces.append(piece)
        except _RaisedError as error:
            raise RequestError("messages", f"are refused by the model's chat template: {reason(error)[:500]}") from None
        except _BoundError as error:
            raise RequestError("messages", f"cannot be rendered: the model's chat template {error}") from None
        except RecursionError:
            raise RequestError("messages", "are nested too deeply for the model's chat template") from None
        except Exception as error:  # the template's code fails in any way that Python code can
            what = f"{type(error).__name__}: {reason(error)[:500]}"
            raise RequestError(
                "messages", f"do not fit the model's chat template, which failed ({what}): check roles and content"
            ) from None
        finally:
            _turns.reset(running)
        return "".join(pieces)


class _RaisedError(jinja2.TemplateError):
    """The template called raise_exception."""


class _BoundError(Exception):
    """The template asks for too much."""


class _Turns:
    """Counts the turns of every loop and the calls of one render."""

    def __init__(self) -> None:
        self._count = 0

    def add(self) -> None:
        self._count += 1
        if self._count > LOOP_LIMIT:
            raise _BoundError(f"loops more than {LOOP_LIMIT} times")


_turns: ContextVar[_Turns] = ContextVar("turns")  # of the render that is running


class _Counted:
    """What a loop goes over; `loop.length` asks for its length."""

    def __init__(self, items: Any) -> None:
        self._items = items

    def __iter__(self) -> Iterator[Any]:
        turns = _turns.get()
        for item in self._items:
            turns.add()
            yield item

    def __len__(self) -> int:
        return len(self._items)


class _Sandbox(ImmutableSandboxedEnvironment):
    """The sandbox, where calls count too: a macro can repeat as much as a loop."""

    def call(self, /, *args: Any, **values: Any) -> Any:
        _turns.get().add()
        return super().call(*args, **values)


class _Generation(Extension):
    """`{% generation %}` marks what an assistant wrote, for training; here it is only its body."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return list(parser.parse_statements(("name:endgeneration",), drop_needle=True))


class _Namespace(Namespace):
    """A namespace without names of Python's internals."""

    def __init__(*args: Any, **values: Any) -> None:
        self, rest = args[0], args[1:]  # a template may write namespace(self=...)
        found = dict(*rest, **values)
        for name in found:
            _check_name(name)
        Namespace.__init__(self, found)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


class _Dict:
    """dict, without its attributes."""

    def __call__(self, *args: Any, **values: Any) -> dict[Any, Any]:
        return dict(*args, **values)

    def fromkeys(self, keys: Iterable[Any], value: Any = None) -> dict[Any, Any]:
        return dict.fromkeys(keys, value)


def _environment() -> _Sandbox:
    environment = _Sandbox(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols])
    environment.filters["tojson"] = _tojson
    environment.filters["_counted"] = _Counted
    environment.globals |= {
        "raise_exception": _raise,
        "strftime_now": lambda format: datetime.now().strftime(format),
        "dict": _Dict(),
        "namespace": _Namespace,
    }
    return environment


def _compile(source: str) -> jinja2.Template:
    environment = _environment()
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "_counted", [], [], None, None)
        tree.set_environment(environment)
        code = environment.compile(tree)
        return environment.template_class.from_code(environment, code, dict(environment.globals))
    except jinja2.TemplateSyntaxError as error:
        raise FormatError(
            f"the chat template does not compile (line {error.lineno}: {reason(error)}): download it again"
        ) from None
    except (jinja2.TemplateError, RecursionError, SyntaxError, ValueError, OverflowError, MemoryError) as error:
        raise FormatError(f"the chat template does not compile ({reason(error)}): download it again") from None


def _settings(folder: Path, name: str) -> dict[str, Any]:
    return parse_object(read_inside(folder, name), str(folder / name)) if (folder / name).is_file() else {}


def _named(found: Any, folder: Path) -> dict[str, str]:
    """The templates of tokenizer_config.json by name."""
    if isinstance(found, str):
        return {"default": found}
    if isinstance(found, list):
        named = {str(one.get("name")): one.get("template") for one in found if isinstance(one, dict)}
        texts = {name: text for name, text in named.items() if isinstance(text, str)}
        if "default" in texts:
            return {name: texts[name] for name in ("default", "tool_use") if name in texts}
    raise FormatError(
        f"{folder}/tokenizer_config.json: chat_template is a {type(found).__name__}, expected a text, or a list of "
        'objects with "name" and "template" of which one is named default: download it again'
    )


def _content(token: Any) -> str:
    return str(token.get("content", "")) if isinstance(token, dict) else str(token)


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """As templates expect one: without fields that are null, reasoning under the names that are in use."""
    plain = {key: _data(value) for key, value in message.items() if value is not None}
    thought = next((plain[key] for key in _REASONING if key in plain), None)
    return plain if thought is None else {"thinking": thought, **plain, "reasoning_content": thought}


def _data(value: Any) -> Any:
    """A copy in plain JSON types: nothing else is the sandbox's business, nor can a template change what is ours."""
    if isinstance(value, Mapping):
        return {str(key): _data(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_data(item) for item in value]
    if value is None or type(value) in (str, int, float, bool):
        return value
    return f"<{type(value).__name__}>"


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace holds no name that begins with _, and {name!r} arrived")


def _raise(message: Any) -> NoReturn:
    raise _RaisedError(str(message))


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
