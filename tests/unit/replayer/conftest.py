"""The service runs on uvloop, a library user may run on asyncio's own loop: the transport is tested on both."""

import asyncio

import uvloop


def pytest_asyncio_loop_factories(config, item):
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
