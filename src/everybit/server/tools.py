"""Tool calls: what a client's `tools` may be, a grammar that keeps calls valid, and a parser that finds them in text.

    tools = parse_tools(request["tools"])
    mode, tools = choose(request.get("tool_choice"), tools)
    format = ToolFormat.detect(template.source, tokenizer_json)
    constraint = grammars.tools(format.grammar(tools, mode, parallel=True)).start()
    parser = format.parser(tools, random.Random())
    for piece in ...: deltas = parser.feed(piece)
    deltas = parser.finish()

Three ways of writing a call are known: Hermes and Qwen (`<tool_call>` JSON `</tool_call>`), Mistral (`[TOOL_CALLS]` and
a JSON list), Llama 3 (nothing but the JSON, with "parameters" in place of "arguments").

The parser must see the tags. Where a tag is a token of its own the tokenizer may count it as special, which decoding
leaves out by default: the tokens of `ToolFormat.tags` are to be shown in the text given to the parser, always as the
text that `tags` has for them.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from tokenizers import Tokenizer as Backend

from everybit.errors import RequestError
from everybit.server.grammar import check_schema

Mode = Literal["none", "auto", "required"]
TOOLS_LIMIT = 128
_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TYPES = ("object", "array", "string", "number", "integer", "boolean", "null")
_OF_SCHEMAS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas")
_LISTS_OF_SCHEMAS = ("allOf", "anyOf", "oneOf", "prefixItems")
_SCHEMAS = ("items", "additionalProperties", "not", "if", "then", "else", "contains", "propertyNames")
_PYTHON_TAG = "<|python_tag|>"  # Llama writes it before some calls
_SPACES = " \t\r\n"
_HEADER_LIMIT = 1000  # characters between a tag and the arguments; a header has some 100


@dataclass(frozen=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    parameters: Mapping[str, Any]


def parse_tools(tools: Any) -> tuple[Tool, ...]:
    """The `tools` of a request. What only llguidance can judge of a schema (a `pattern`) shows when it compiles.

    Raises: RequestError
    """
    if not isinstance(tools, list) or not 1 <= len(tools) <= TOOLS_LIMIT:
        what = f"{len(tools)} tools" if isinstance(tools, list) else f"a {type(tools).__name__}"
        raise RequestError("tools", f"is {what}: expected a list of 1 to {TOOLS_LIMIT}")
    found: dict[str, Tool] = {}
    for place, tool in enumerate(tools):
        where = f"tools[{place}]"
        if not isinstance(tool, Mapping) or tool.get("type") != "function":
            raise RequestError(where, 'is not of "type": "function", the only one there is')
        function = tool.get("function")
        name = function.get("name") if isinstance(function, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(name, str) or not _NAME.fullmatch(name):
            raise RequestError(f"{where}.function.name", f"{str(name)[:80]!r}: expected 1 to 64 of a-z A-Z 0-9 _ -")
        if name in found:
            raise RequestError(f"{where}.function.name", f"{name!r} is there twice: give each function its own")
        if not isinstance(function.get("strict"), (bool, type(None))):
            raise RequestError(f"{where}.function.strict", "is neither true nor false")
        if not isinstance(function.get("description"), (str, type(None))):
            raise RequestError(f"{where}.function.description", "is not a text")
        found[name] = Tool(name, _parameters(function.get("parameters"), f"{where}.function.parameters"))
    return tuple(found.values())


def choose(choice: Any, tools: Sequence[Tool]) -> tuple[Mode, tuple[Tool, ...]]:
    """The mode of a `tool_choice` ("auto" where it is None), and the tools that may be called: of a name, that one.

    Raises: RequestError
    """
    if choice is None:
        return "auto", tuple(tools)
    if choice in ("none", "auto", "required"):
        return choice, tuple(tools)
    function = choice.get("function") if isinstance(choice, Mapping) and choice.get("type") == "function" else None
    if not isinstance(function, Mapping):
        raise RequestError("tool_choice", 'is not "none", "auto", "required" or {"type": "function", "function": ...}')
    named = tuple(tool for tool in tools if tool.name == function.get("name"))
    if not named:
        raise RequestError("tool_choice", f"names {str(function.get('name'))[:80]!r}: expected one of the tools")
    return "required", named


def plain_arguments(messages: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The messages with the arguments of past calls as objects, which is how chat templates expect them.

    Raises: RequestError (arguments that are not the JSON text of an object)
    """
    found = []
    for place, message in enumerate(messages):
        copy = dict(message)
        if message.get("role") == "assistant" and isinstance(message.get("tool_calls"), list):
            copy["tool_calls"] = [_with_arguments(call, f"messages[{place}].tool_calls") for call in copy["tool_calls"]]
        found.append(copy)
    return found


@dataclass(frozen=True)
class Text:
    """Text that belongs to no call."""

    text: str


@dataclass(frozen=True)
class CallStart:
    """A call begins; `index` counts the calls of the message from 0."""

    index: int
    id: str
    name: str


@dataclass(frozen=True)
class CallArguments:
    """A piece of a call's arguments; joined, the pieces are the JSON text of an object."""

    index: int
    text: str


Delta = Text | CallStart | CallArguments


@dataclass(frozen=True)
class ToolFormat:
    """How a model writes calls. `tags`: the tokens that must be shown in the text (see above), with their texts.

    `opening` and `closing` stand around a call (Mistral: all calls), `between` two; `key` names the arguments.
    """

    kind: Literal["hermes", "mistral", "llama"]
    opening: str
    closing: str
    between: str
    key: str
    tags: Mapping[int, str]
    named: Mapping[str, int]  # those of the tags that a grammar must name by token: no text of it gives them
    others: tuple[int, ...]  # such tokens that are no tags

    @classmethod
    def detect(cls, template: str, tokenizer_json: str) -> ToolFormat:
        """The format in which the chat template `template` shows calls; Hermes' where it shows none.

        Raises: RequestError (the template does nothing with tools)
        """
        if not re.search(r"\btools\b", template):
            raise RequestError("tools", "cannot be given to this model: its chat template does not mention any")
        kind: Literal["hermes", "mistral", "llama"] = "hermes"
        opening, closing, between, key = "<tool_call>", "</tool_call>", "\n", "arguments"
        if opening in template:
            pass
        elif "[TOOL_CALLS]" in template:
            kind, opening, closing, between = "mistral", "[TOOL_CALLS]", "", ", "
        elif re.search(r'\{\\?"name\\?": [^}\n]{0,80}"parameters\\?": ', template):
            kind, opening, closing, between, key = "llama", _PYTHON_TAG, "", "; ", "parameters"
        added = Backend.from_str(tokenizer_json).get_added_tokens_decoder()
        tags = {token: str(one.content) for token, one in added.items() if one.content in (opening, closing)}
        # llguidance takes an added token for special too where it looks like <this>.
        apart = {
            token: str(one.content)
            for token, one in added.items()
            if one.special or (one.content.startswith("<") and one.content.endswith(">"))
        }
        return cls(
            kind=kind,
            opening=opening,
            closing=closing,
            between=between,
            key=key,
            tags=tags,
            named={text: token for token, text in apart.items() if token in tags},
            others=tuple(sorted(token for token, text in apart.items() if text != opening)),
        )

    def grammar(self, tools: Sequence[Tool], mode: Mode, parallel: bool = True) -> str:
        """Lark for `Grammars.tools`: free text, then calls or none ("auto"), or calls alone ("required").

        A call has the spaces of Python's json.dumps up to its arguments, as in the models' training.
        """
        if not tools or mode == "none":
            raise RequestError("tools", "is empty or tool_choice is none: there is nothing to constrain")
        opening, closing = self._tag(self.opening), self._tag(self.closing)
        between = json.dumps(self.between)
        plain = self.kind != "llama" and self.opening not in self.named  # the tag is text among other text
        first = "found" if plain and mode == "auto" else opening
        if self.kind == "hermes":
            again = f" ({between} {opening} body)*" if parallel else ""
            calls, body = f"{first} body{again}", f'"\\n" call "\\n" {closing}'
        else:
            again = f" ({between} call)*" if parallel else ""
            calls, body = (f'{first} / ?\\[/ call{again} "]"' if self.kind == "mistral" else f"call{again}"), ""
        if self.kind == "llama" and self.opening in self.named:
            calls = f"{opening}? {calls}"
        lines = [f"calls: {calls}", "call: " + " | ".join(f"call_{i}" for i in range(len(tools)))]
        lines += [f"body: {body}"] if body else []
        for i, tool in enumerate(tools):
            head = json.dumps(f'{{"name": "{tool.name}", "{self.key}": ')
            lines += [f'call_{i}: {head} args_{i} "}}"', f"args_{i}: %json {check_schema(tool.parameters, 'tools')}"]
        return "\n".join([*(["start: calls"] if mode == "required" else self._free(plain)), *lines])

    def parser(self, tools: Sequence[Tool], ids: random.Random) -> ToolParser:
        """A parser for one message; `ids` is where the ids of its calls come from."""
        return ToolParser(self, {tool.name for tool in tools}, ids)

    def _tag(self, tag: str) -> str:
        return f"<[{self.named[tag]}]>" if tag in self.named else json.dumps(tag) if tag else ""

    def _free(self, plain: bool) -> list[str]:
        """Rules for text, also of tokens that no text gives (a model may think between such), before calls."""
        first = "OPENED" if self.kind == "llama" else "TEXT"  # Llama: a text that begins with { is a call
        lines = ["TEXT: /(?s:.+)/", r"OPENED: /\s*[^\s{](?s:.*)/"] if self.kind == "llama" else ["TEXT: /(?s:.+)/"]
        turns = ""
        if self.others:
            lines.append(f"other: <[{','.join(map(str, self.others))}]>")
            turns = f"{first}? other (TEXT? other)*"
        if self.kind == "llama":
            options = ["calls", f"{first}?", *([f"{turns} TEXT?"] if turns else [])]
            return [f"start: {' | '.join(options)}", *lines]
        if plain:  # the text before the tag and the tag are one lexeme, which ends where the tag does
            lines.append(f"found[lazy]: /(?s:.*)/ {json.dumps(self.opening)}")
        ending = "(calls | TEXT?)" if plain else "TEXT? calls?"
        return [f"start: ({turns})? {ending}" if turns else f"start: {ending}", *lines]


class ToolParser:
    """Finds calls in the text of one message, in whatever pieces it comes; the deltas do not depend on the cuts.

    Text that may be the beginning of a call is held back until it is one, or none; then it is text.
    """

    def __init__(self, format: ToolFormat, names: Collection[str], ids: random.Random) -> None:
        self._format, self._names, self._ids = format, names, ids
        self._held = ""
        self._lead = 0  # of the held text: what stands before a header
        self._listed = False  # whether a header begins with [
        self._depth, self._quoted, self._escaped = 0, False, False
        self._after_call = False  # nothing but spaces since
        self._state: Any = self._begin if format.kind == "llama" else self._text
        self.calls = 0

    def feed(self, piece: str) -> list[Delta]:
        """What the piece adds."""
        self._held += piece
        found: list[Delta] = []
        while self._state(found):
            pass
        return found

    def finish(self) -> list[Delta]:
        """What was held back: text after all. Half a call, and spaces between calls, are left out."""
        held, self._held = self._held, ""
        if not held or self._state == self._closing or (self._after_call and held.isspace()):
            return []
        return [Text(held)]

    # Each state takes what it can from the held text; true where another may go on at once.

    def _begin(self, found: list[Delta]) -> bool:
        """Llama: whether the message is a call is seen at its first character, or the second token."""
        text = self._held.lstrip(_SPACES)
        tag = self._format.opening
        if tag.startswith(text):
            if text != tag:
                return False
        elif not text.startswith((tag, "{")):
            self._state = self._rest
            return True
        self._lead = len(self._held) - len(text) + (len(tag) if text.startswith(tag) else 0)
        self._state = self._header
        return True

    def _rest(self, found: list[Delta]) -> bool:
        self._say(found, len(self._held))
        return False

    def _text(self, found: list[Delta]) -> bool:
        opening = self._format.opening
        place = self._held.find(opening)
        end = place if place >= 0 else len(self._held) - _overlap(self._held, opening)
        if self._after_call and not self._held[:end].strip(_SPACES):
            if place < 0:
                return False
            self._held = self._held[end:]
        else:
            self._say(found, end)
        if place < 0:
            return False
        self._lead, self._listed = len(opening), self._format.kind == "mistral"
        self._state = self._header
        return True

    def _header(self, found: list[Delta]) -> bool:
        name, end = _header(self._held[self._lead :], self._listed)
        if name is None and end < 0 and len(self._held) - self._lead <= _HEADER_LIMIT:
            return False
        if name not in self._names or end > _HEADER_LIMIT:
            self._say(found, self._lead)
            self._state = self._rest if self._format.kind == "llama" else self._text
            return True
        found.append(CallStart(self.calls, f"call_{self._ids.getrandbits(96):024x}", str(name)))
        self._held = self._held[self._lead + end :]
        self._depth = 0
        self._state = self._arguments
        return True

    def _arguments(self, found: list[Delta]) -> bool:
        done, end = self._object()
        if end:
            found.append(CallArguments(self.calls, self._held[:end]))
        self._held = self._held[end:]
        if done:
            self.calls += 1
            self._depth, self._after_call = 1, True
            self._state = self._outer
        return done

    def _outer(self, found: list[Delta]) -> bool:
        """The rest of the object that holds the arguments, of which nothing is told."""
        done, end = self._object()
        self._held = self._held[end:]
        if done:
            self._state = self._closing
        return done

    def _closing(self, found: list[Delta]) -> bool:
        """What stands after a call: its end, or a sign that another follows."""
        text = self._held.lstrip(_SPACES)
        if not text:
            return False
        kind, closing = self._format.kind, self._format.closing
        if kind == "hermes":
            if closing.startswith(text) and text != closing:
                return False
            if text.startswith(closing):
                self._held = text[len(closing) :]
            self._state = self._text
        elif text[0] == self._format.between[0]:
            self._lead, self._listed = len(self._held) - len(text) + 1, False
            self._state = self._header
        else:
            if kind == "mistral" and text[0] == "]":
                self._held = text[1:]
            self._state = self._text if kind == "mistral" else self._rest
        return True

    def _object(self) -> tuple[bool, int]:
        """Whether the object that is open ends in the held text, and where."""
        for place, character in enumerate(self._held):
            if self._escaped:
                self._escaped = False
            elif self._quoted:
                self._escaped = character == "\\"
                self._quoted = character != '"'
            elif character == '"':
                self._quoted = True
            elif character in "{[":
                self._depth += 1
            elif character in "}]":
                self._depth -= 1
                if not self._depth:
                    return True, place + 1
        return False, len(self._held)

    def _say(self, found: list[Delta], end: int) -> None:
        if end:
            found.append(Text(self._held[:end]))
            self._held, self._after_call = self._held[end:], False


def _header(text: str, listed: bool) -> tuple[str | None, int]:
    """The function's name and where its arguments begin; (None, -1) where more must come, (None, 0) for no call."""
    place, name = 0, ""
    for part in (*(("[",) if listed else ()), "{", '"name"', ":", '"', "", '",', '"arguments"', ":", "{"):
        if part == "":
            match = _NAME.match(text, place)
            if match is None:
                return None, -1 if place == len(text) else 0
            name, place = match.group(), match.end()
            continue
        if part != '",':
            place = len(text) - len(text[place:].lstrip(_SPACES))
        parts = (part, '"parameters"') if part == '"arguments"' else (part,)
        chosen = next((one for one in parts if text.startswith(one, place)), None)
        if chosen is None:
            return None, -1 if any(one.startswith(text[place:]) for one in parts) else 0
        place += len(chosen)
    return name, place - 1


def _overlap(text: str, tag: str) -> int:
    """How many of the last characters of `text` may be the first of `tag`."""
    return next((n for n in range(min(len(tag) - 1, len(text)), 0, -1) if text.endswith(tag[:n])), 0)


def _with_arguments(call: Any, where: str) -> Any:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"] or "{}")
    except (ValueError, RecursionError):
        arguments = None
    if not isinstance(arguments, dict):
        raise RequestError(where, "holds arguments that are not the JSON text of an object")
    return {**call, "function": {**function, "arguments": arguments}}


def _parameters(schema: Any, where: str) -> Mapping[str, Any]:
    if schema is None:
        return {"type": "object"}
    check_schema(schema, where)
    if schema.get("type", "object") != "object":
        raise RequestError(where, 'is a schema of another type, expected "type": "object"')
    for one in _schemas(schema):
        kinds = one.get("type", [])
        if not all(kind in _TYPES for kind in (kinds if isinstance(kinds, list) else [kinds])):
            raise RequestError(where, f"holds the type {str(kinds)[:80]!r}: expected of {', '.join(_TYPES)}")
        if not isinstance(one.get("pattern", ""), str):
            raise RequestError(where, f"holds the pattern {str(one['pattern'])[:80]!r}: expected a text")
    return {"type": "object", **schema}


def _schemas(schema: Any) -> Iterator[Mapping[str, Any]]:
    """The schema and those inside it; not what only looks like one, say a property named `type`."""
    if not isinstance(schema, Mapping):
        return
    yield schema
    for key, value in schema.items():
        if key in _OF_SCHEMAS and isinstance(value, Mapping):
            inside = list(value.values())
        elif key in _LISTS_OF_SCHEMAS and isinstance(value, list):
            inside = value
        else:
            inside = [value] if key in _SCHEMAS else []
        for one in inside:
            yield from _schemas(one)
