"""The whole server inside one Serve replica."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from starlette.types import Receive, Scope, Send

from everybit.errors import EverybitError, ModelError
from everybit.integrations.ray_serve.log import Sender
from everybit.integrations.ray_serve.peers import Peers
from everybit.server.app import Server, Settings
from everybit.server.log import log_to
from everybit.server.opening import Opening, close
from everybit.server.served import Served


@dataclass(frozen=True)
class Order:
    """What every replica gets; can be pickled. `folder`: only the server's user can enter it."""

    opening: Opening
    settings: Settings
    folder: Path

    @property
    def log(self) -> Path:
        return self.folder / "log"

    @property
    def failed(self) -> Path:
        """Why a replica could not start."""
        return self.folder / "failed"

    @property
    def about(self) -> Path:
        """What runs, in words."""
        return self.folder / "about"


_server: Server | None = None  # of this process


class Application:
    """Finds the server of the process that it is called in: Serve pickles an application before there is a server."""

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        assert _server is not None
        await _server.app(scope, receive, send)


class Replica:
    """The class that Serve deploys."""

    def __init__(self, order: Order) -> None:
        from ray import serve

        global _server
        _keep_local()
        lines = log_to(Sender(order.log))
        self._opened: dict[str, Served] = {}
        try:
            self._opened = order.opening.open()
        except EverybitError as error:
            order.failed.write_text(str(error))
            raise
        settings = replace(order.settings, lost_lines=lambda: lines.lost)
        self._server = _server = Server(self._opened, settings)
        name = str(serve.get_replica_context().replica_id.unique_id)
        Peers(_server.edge, name, order.folder)
        order.about.write_text(order.opening.about(self._opened))

    def check_health(self) -> None:
        """Serve replaces a replica for which this raises. Raises: ModelError"""
        worker = self._server.worker
        if worker is not None and not worker.alive:
            raise ModelError("the thread that runs the models has ended: the replica must be replaced")

    def __del__(self) -> None:
        opened, self._opened = self.__dict__.get("_opened", {}), {}
        close(opened)


def _keep_local() -> None:
    """Serve gives each replica a port on every address, for other machines; it takes pickles. Ours stays here.

    Ray's token guards it too; where a new Ray has no such function, the token alone does.
    """
    module: Any = importlib.import_module("ray.serve._private.replica")
    add = getattr(module, "add_port_to_grpc_server", None)
    if add is not None:
        module.add_port_to_grpc_server = lambda server, address: add(server, address.replace("[::]", "127.0.0.1"))


def deployment(order: Order, options: dict[str, Any]) -> Any:
    """A Serve application. Ray must have been set up before: driver.py."""
    from ray import serve

    wrapped = serve.ingress(Application())(Replica)
    return serve.deployment(**options)(wrapped).bind(order)
