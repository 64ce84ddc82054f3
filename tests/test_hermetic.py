"""The fixture that keeps tests to themselves does so."""

import os
import socket
import tempfile
from pathlib import Path

import pytest


def test_no_test_reaches_the_network():
    with pytest.raises(RuntimeError, match="tried to reach the network"), socket.socket() as guarded:
        guarded.connect(("192.0.2.1", 80))
    with pytest.raises(RuntimeError, match=r"tried to look up example\.org"):
        socket.create_connection(("example.org", 80))


def test_sockets_of_this_machine_still_connect():
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()):
        pass


@pytest.mark.parametrize(
    "name", ["HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME"]
)
def test_the_users_folders_are_out_of_reach(name: str):
    assert Path(os.environ[name]).is_relative_to(tempfile.gettempdir())


def test_the_users_settings_are_out_of_reach():
    ours = {name: value for name, value in os.environ.items() if name.startswith(("QCHAT_", "HF_"))}
    assert ours == {
        "HF_HUB_OFFLINE": "1",
        "QCHAT_COMPILE": "off",
        "QCHAT_DRAFTING": "off",
        "QCHAT_NATIVE": "off",
        "QCHAT_TUNE": "off",
    }
