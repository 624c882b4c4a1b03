"""The page's server: an address that is checked, a folder that goes with it, an end by Ctrl-C or SIGTERM."""

import contextlib
import errno
import importlib.util
import os
import signal
import socket
import tempfile
import threading
from collections.abc import Callable, Iterator
from types import FrameType

import numpy as np

from sgw_jax.data_pipelines.errors import InputError, extra_named
from sgw_jax.demo.uploads import LARGEST_FILE
from sgw_jax.prediction.predictor import Predictor

HOST, PORT = "127.0.0.1", 7860


def serve(
    predictor: Predictor,
    title: str = "sgw_jax",
    host: str = HOST,
    port: int = PORT,
    ready: Callable[[str], None] | None = None,
) -> None:
    """Serves the page of a network until Ctrl-C or SIGTERM.

    Nothing leaves the machine: no link from outside, no usage statistics, no fonts or scripts of other places. What
    visitors send lies in a temporary folder, which is removed at the end. One photograph is predicted at a time.

    Args:
      predictor: the network.
      title: of the page.
      host: the address to listen at: 127.0.0.1 is for this machine alone, 0.0.0.0 for all that reach it.
      port: of the address.
      ready: called with the page's address once it answers.

    Raises:
      InputError: an address that is none of this machine's; a port in use.
      MissingPackageError: gradio is not installed.
    """
    check_address(host, port)
    check_packages()
    with _surroundings(host):
        from sgw_jax.demo.page import build_page, look

        predictor(np.zeros((*predictor.size, 3), np.uint8))  # compiled before the first visitor waits
        page = build_page(predictor, title)
        try:
            _, address, _ = page.launch(
                server_name=f"[{_bare(host)}]" if ":" in host else host,  # of version 6, as a page's address has it
                server_port=port,
                share=False,
                inbrowser=False,
                quiet=True,
                show_error=False,
                prevent_thread_lock=True,
                footer_links=[],
                run_history=False,
                enable_monitoring=False,
                ssr_mode=False,
                pwa=False,
                mcp_server=False,
                max_file_size=LARGEST_FILE,
                **look(),
            )
        except OSError as error:  # taken since it was checked
            raise InputError(_in_use(host, port)) from error
        try:
            with _until_told() as told:
                if ready is not None:
                    ready(address)
                told.wait()
        finally:
            page.close(verbose=False)


def check_packages() -> None:
    """Raises without the page's package, before a network is loaded for it.

    Raises:
      MissingPackageError: names it and the extra.
    """
    with extra_named("The page", "demo"):
        if importlib.util.find_spec("gradio") is None:
            raise ModuleNotFoundError(name="gradio")


def check_address(host: str, port: int) -> None:
    """Raises unless a server can listen there.

    Raises:
      InputError: names the host or the port.
    """
    try:
        family = socket.getaddrinfo(_bare(host), port, type=socket.SOCK_STREAM)[0][0]
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server will: what just ended may wait
            probe.bind((_bare(host), port))
            probe.listen(1)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            raise InputError(_in_use(host, port)) from error
        if error.errno == errno.EACCES:
            raise InputError(f"--port: {port} is not yours to listen at; give one from 1024 on.") from error
        why = error.strerror or error
        raise InputError(
            f"--host: {host} is no address of this machine ({why}); give {HOST}, or 0.0.0.0 for all."
        ) from error


def _bare(host: str) -> str:
    """Without the brackets around an address of version 6."""
    return host.strip("[]")


def _in_use(host: str, port: int) -> str:
    return f"--port: {port} of {host} is in use; give another, or end what listens there."


@contextlib.contextmanager
def _surroundings(host: str) -> Iterator[None]:
    """A folder for all that gradio and the page write, and what gradio reads from the environment."""
    with tempfile.TemporaryDirectory(prefix="sgw_jax-demo-", ignore_cleanup_errors=True) as folder:
        direct = os.environ.get("no_proxy") or os.environ.get("NO_PROXY") or ""
        settings = {
            "GRADIO_TEMP_DIR": folder,
            "GRADIO_ANALYTICS_ENABLED": "False",
            # It asks its own server whether it answers; a proxy for the web does not know this machine.
            "no_proxy": ",".join(filter(None, [direct, host, "localhost", HOST])),
        }
        before = {name: os.environ.get(name) for name in settings}
        os.environ.update(settings)
        try:
            yield
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})


@contextlib.contextmanager
def _until_told() -> Iterator[threading.Event]:
    """An event that Ctrl-C and SIGTERM set; in a thread other than the first, where signals do not arrive, nothing."""
    told = threading.Event()

    def tell(number: int, frame: FrameType | None) -> None:
        del number, frame
        told.set()

    if threading.current_thread() is not threading.main_thread():
        yield told
        return
    before = {number: signal.signal(number, tell) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield told
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
