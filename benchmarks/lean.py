"""The proxy of `megido capture` without capture: the same master, fast path and collector settings, no addon of ours.

Only what `benchmarks.capture` compares with; not a way to run a proxy.
"""

import argparse
import asyncio
import logging
import sys

from megido_capture.__main__ import collect_seldom
from megido_capture.addon import MegidoAddon
from megido_capture.master import CaptureMaster
from megido_shared.service import stop_on_signals


async def serve(arguments: argparse.Namespace) -> None:
    stop = stop_on_signals("lean proxy", 10.0)
    master = CaptureMaster(MegidoAddon({}, hosted=False), ["regular"])
    master.options.update(
        listen_host="127.0.0.1",
        listen_port=0,
        confdir=arguments.confdir,
        ssl_verify_upstream_trusted_ca=arguments.trusted,
    )

    def ready() -> None:
        sys.stdout.write(f"proxy on 127.0.0.1:{master.proxyserver.listen_addrs()[0][1]}, metrics on nowhere:0\n")
        sys.stdout.flush()

    collect_seldom()
    await master.serve(stop, ready)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("confdir")
    parser.add_argument("trusted")
    logging.getLogger("mitmproxy").setLevel(logging.ERROR)
    asyncio.run(serve(parser.parse_args()))
