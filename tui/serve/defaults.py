"""What a server and those who ask it agree on; imports nothing that an extra brings."""

HOST, PORT = "127.0.0.1", 8080
MAX_WAITING = 64  # requests, before more are refused
KEY_VARIABLE = "QCHAT_API_KEY"


def url_of(host: str, port: int) -> str:
    """Return the URL of a server at an address or name; IPv6 addresses get their brackets."""
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"
