"""Where the HTTP server listens, whom it lets in, and what it puts up with."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class ApiConfig:
    """Settings of the HTTP server. Keys are in files: a command line and an environment are readable by others."""

    host: str = "127.0.0.1"
    """Address to listen at; 0.0.0.0 for every IPv4 interface (set api_key_file then)."""
    port: int = 8000
    """TCP port; 0 for a free one, which is printed."""
    api_key_file: str | None = None
    """File of the keys that /v1/ asks for as `Authorization: Bearer KEY`, one a line; None lets everybody in."""
    admin_key_file: str | None = None
    """File of the keys that /admin/ asks for, one a line; without it there is no /admin/."""
    metrics_need_admin_key: bool = False
    """Ask for an admin key at /metrics too."""
    profile_dir: str = "profiles"
    """Folder of the traces that POST /admin/profile captures, each in one of its own."""
    max_body_bytes: int = 8 * 1024 * 1024
    """Largest body of a request; 413 beyond, before the rest is read."""
    max_choices: int = 128
    """Most sequences of one request: prompts times `n`."""
    stream_buffer: int = 1024
    """Tokens, times the choices of the request, that a stream's client may fall behind beyond what the sockets' own
    buffers hold; the request is then cancelled. At 1,000 tokens/s that is a second."""
    stall_seconds: float = 60.0
    """A client that takes nothing from its stream for this long, or sends nothing of its body, is dropped."""
    grace_seconds: float = 30.0
    """What runs when SIGTERM comes may finish within this; it is cancelled then."""

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"api.port={self.port} must be between 0 and 65535")
        for name in ("max_body_bytes", "max_choices", "stream_buffer"):
            if getattr(self, name) < 1:
                raise ValueError(f"api.{name}={getattr(self, name)} must be at least 1")
        if self.stall_seconds <= 0:
            raise ValueError(f"api.stall_seconds={self.stall_seconds} must be above 0")
        if self.grace_seconds < 0:
            raise ValueError(f"api.grace_seconds={self.grace_seconds} must be at least 0")
        if self.metrics_need_admin_key and self.admin_key_file is None:
            raise ValueError("api.metrics_need_admin_key=True needs api.admin_key_file")


def read_keys(path: str | None, setting: str) -> tuple[bytes, ...]:
    """Keys of a file, one a line, empty lines left out; () for no file. `setting` is named in errors.

    Raises ValueError if the file can't be read, holds no key or one that no header can carry.
    """
    if path is None:
        return ()
    try:
        with open(path, "rb") as file:
            lines = [line.strip() for line in file.read().splitlines()]
    except OSError as error:
        raise ValueError(f"{setting}={path} can't be read: {error.strerror}") from error
    keys = tuple(line for line in lines if line)
    if not keys:
        raise ValueError(f"{setting}={path} holds no key; write one a line, or unset {setting}")
    if any(not 33 <= byte <= 126 for key in keys for byte in key):
        raise ValueError(f"{setting}={path} holds a key with a character other than printable ASCII")
    return keys
