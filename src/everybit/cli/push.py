"""`everybit push OVERLAY REPO`: an overlay to a Hugging Face hub."""

from __future__ import annotations

import argparse
import importlib.util

from everybit.errors import SourceError


def add_parser(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    parser = subparsers.add_parser(
        "push",
        help="publish an overlay on the Hugging Face hub",
        description="Verify every checksum of an overlay, then upload it by huggingface_hub, with its token.",
    )
    parser.add_argument("overlay", metavar="OVERLAY", help="a folder written by everybit quantize")
    parser.add_argument("repo", metavar="REPO", help="NAME or ORGANIZATION/NAME; made where there is none")
    parser.add_argument("--private", action="store_true", help="nobody else may see it")
    parser.add_argument("--revision", metavar="BRANCH", help="made where there is none (default: main)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if importlib.util.find_spec("huggingface_hub") is None:
        raise SourceError('push needs huggingface_hub, which is not installed: pip install "everybit[hub]"')
    from everybit.integrations.hub import push

    print(push(args.overlay, args.repo, private=args.private, revision=args.revision))
    return 0
