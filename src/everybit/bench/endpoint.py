"""Where requests go: the address, the key, TLS, and which of the OpenAI-compatible interfaces is spoken."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field, replace
from pathlib import Path
from urllib.parse import urlsplit

from everybit.errors import SourceError

PATHS = {"completions": "/completions", "chat": "/chat/completions", "responses": "/responses"}


@dataclass(frozen=True)
class Endpoint:
    """`prefix` is the path before `/completions`, usually `/v1`; `address` the resolved host."""

    host: str
    port: int
    tls: bool
    prefix: str
    key: str | None = field(default=None, repr=False)
    headers: tuple[tuple[str, str], ...] = ()
    ca_file: Path | None = None
    insecure: bool = False
    address: str = ""

    @property
    def url(self) -> str:
        shown = f"[{self.host}]" if ":" in self.host else self.host
        return f"http{'s' if self.tls else ''}://{shown}:{self.port}{self.prefix}"

    @property
    def local(self) -> bool:
        """Whether the endpoint is on this machine."""
        return self.address.startswith("127.") or self.address == "::1"

    def masked(self, text: str) -> str:
        """Without the key, which servers repeat in their errors."""
        return text.replace(self.key, "[key]") if self.key else text

    def resolved(self) -> Endpoint:
        """With an address, so that no request waits for a name server. Raises: SourceError"""
        try:
            found = socket.getaddrinfo(self.host, self.port, type=socket.SOCK_STREAM)
        except (OSError, UnicodeError) as error:
            raise SourceError(f"{self.host}: the name has no address ({error})") from None
        found.sort(key=lambda one: one[0] != socket.AF_INET)
        for family, kind, protocol, _, address in found:  # the first that lets us in, else the first
            with socket.socket(family, kind, protocol) as probe:
                probe.settimeout(5)
                if probe.connect_ex(address) == 0:
                    return replace(self, address=str(address[0]))
        return replace(self, address=str(found[0][4][0]))

    def context(self) -> ssl.SSLContext | None:
        """Raises: SourceError for a certificate file that cannot be read"""
        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=str(self.ca_file) if self.ca_file else None)
        except (OSError, ssl.SSLError) as error:
            raise SourceError(f"{self.ca_file}: no certificates that can be read ({error})") from None
        if self.insecure:
            context.check_hostname = False
            context.verify_mode = ssl.CERT_NONE
        return context

    def head(self, method: str, path: str, length: int, extra: tuple[tuple[str, str], ...] = ()) -> bytes:
        """The request's head. Answers are asked for as they are: a compressed stream has no piece times."""
        shown = f"[{self.host}]" if ":" in self.host else self.host
        lines = [f"{method} {self.prefix}{path} HTTP/1.1", f"Host: {shown}:{self.port}", "User-Agent: everybit-bench"]
        lines += ["Accept: text/event-stream, application/json", "Accept-Encoding: identity"]
        if length:
            lines += ["Content-Type: application/json", f"Content-Length: {length}"]
        if self.key:
            lines.append(f"Authorization: Bearer {self.key}")
        lines += [f"{name}: {value}" for name, value in (*self.headers, *extra)]
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


def parse_url(url: str) -> tuple[Endpoint, str | None]:
    """The endpoint, and the interface where the URL names one (its path ends in /chat/completions, ...).

    Raises: SourceError
    """
    try:
        parts = urlsplit(url if "://" in url else f"http://{url}")
        port = parts.port
    except ValueError as error:
        raise SourceError(f"{url}: not an address ({error})") from None
    if port == 0:
        raise SourceError(f"{url}: the port is not a number of 1 to 65535")
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise SourceError(f"{url}: expected an address such as http://127.0.0.1:8000/v1")
    if parts.username or parts.password:
        raise SourceError(f"{parts.hostname}: a key in the address ends up in logs; give --key-env NAME instead")
    if parts.query or parts.fragment:
        raise SourceError(f"{url}: expected an address without a ? or #; give headers with --header")
    path, api = parts.path.rstrip("/"), None
    for name in ("chat", "completions", "responses"):
        if path.endswith(PATHS[name]):
            path, api = path.removesuffix(PATHS[name]), name
            break
    if not all(0x20 < ord(c) < 0x7F for c in path):
        raise SourceError(f"{url!r}: the path has characters that an address cannot have")
    tls = parts.scheme == "https"
    endpoint = Endpoint(parts.hostname, port or (443 if tls else 80), tls, path if path or api else "/v1")
    return endpoint, api
