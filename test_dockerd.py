"""The tests of dockerd.py, in the order of its sections; run them with `make test`.

Each test host is a daemon in network and mount namespaces of its own, with its own data root, exec root and
cgroup parent: nothing of the machine is touched, and what a test makes is gone after it.  Tests talk to the
daemon through real clients (every Docker CLI found, docker-py, raw HTTP) and ask the kernel what happened.
A skipped test is a failed one.
"""
from __future__ import annotations

import base64
import bz2
import collections
import concurrent.futures
import contextlib
import ctypes
import errno
import fcntl
import functools
import glob
import gzip
import hashlib
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import lzma
import mmap
import operator
import os
import pty
import random
import re
import secrets
import select
import shlex
import shutil
import signal
import socket
import ssl
import stat
import struct
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import termios
import threading
import time
import tracemalloc
import types
import urllib.parse
import zipfile
import zlib
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional
from unittest.mock import Mock

import docker as docker_py
import pytest

import dockerd
from dockerd import (
    BadParameter,
    DockerError,
    Engine,
    IdMap,
    TarEntry,
    UnpackLimits,
    apply_layer,
    decompress,
    read_state,
    select_driver,
    write_state,
    write_tree,
)

# ------------------------------------------------------------------------------------------------------------
# Test hosts
#
# Host is dockerd.py, Peer the real dockerd of Debian, run the same way to compare with.  Docker is one CLI
# that talks to one of them.  A host's daemon lives in namespaces that a holder process keeps: a restarted one
# comes back to the same machine.  leaks() is what a stopped host left behind; the fixtures assert that it is
# nothing.
# ------------------------------------------------------------------------------------------------------------

HERE = os.path.dirname(os.path.abspath(__file__))
CACHE = os.path.join(HERE, ".cache")
PEER = os.path.join(CACHE, "peer")
PROGRAM = os.path.join(HERE, "dockerd.py")
API = "/v1.51"
PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOLDER = "ip link set lo up && echo ready && exec cat"
BEGAN = time.time()
KERNEL_TELLS_EXITS = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 15)  # of strangers, by pidfd
PATIENCE = int(os.environ.get("DOCKERD_TEST_PATIENCE", "1"))  # how many times longer to wait


def wait_for(condition: Callable[[], Any], what: str = "", seconds: float = 20) -> Any:
    """The first true answer of `condition`, asked again and again; AssertionError after `seconds`."""
    end = time.monotonic() + seconds * PATIENCE
    while True:
        answer = condition()
        if answer:
            return answer
        assert time.monotonic() < end, f"waited {seconds} s for {what or condition}"
        time.sleep(0.02)


def read_text(path: str) -> str:
    """The text of a file, as /proc and /sys have them; "" when it is gone."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as file:
            return file.read()
    except (OSError, ProcessLookupError):
        return ""


def processes() -> list[int]:
    """The pids of all processes."""
    return [int(name) for name in os.listdir("/proc") if name.isdigit()]


class Answer(NamedTuple):
    """An HTTP response, read to its end."""

    status: int
    headers: Any
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; None when there is none."""
        return json.loads(self.body) if self.body else None

    @property
    def lines(self) -> list[Any]:
        """The body as a stream of JSON lines."""
        return [json.loads(line) for line in self.body.splitlines() if line.strip()]


class UnixConnection(http.client.HTTPConnection):
    """An HTTP connection to a Unix socket; `timeout` in seconds."""

    def __init__(self, path: str, timeout: float = 60) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        """Connect, as http.client asks for it."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(self.timeout and self.timeout * PATIENCE)
        self.sock.connect(self.path)


class Hijacked:
    """A connection after an upgrade: raw bytes both ways, with what came behind the headers already."""

    def __init__(self, sock: socket.socket, head: bytes, rest: bytes) -> None:
        self.sock, self.head, self.buffer = sock, head, rest
        self.status = int(head.split()[1]) if head else 0

    def send(self, data: bytes) -> None:
        """Send all of `data`."""
        self.sock.sendall(data)

    def close_write(self) -> None:
        """Half-close: the container's stdin ends."""
        self.sock.shutdown(socket.SHUT_WR)

    def read_until(self, wanted: bytes) -> bytes:
        """All bytes up to and including `wanted`; AssertionError when the stream ends before it."""
        while wanted not in self.buffer:
            data = self.sock.recv(65536)
            assert data, f"the stream ended without {wanted!r}: {self.buffer!r}"
            self.buffer += data
        end = self.buffer.index(wanted) + len(wanted)
        data, self.buffer = self.buffer[:end], self.buffer[end:]
        return data

    def read_all(self) -> bytes:
        """All bytes up to the end of the stream."""
        while True:
            data = self.sock.recv(65536)
            if not data:
                data, self.buffer = self.buffer, b""
                return data
            self.buffer += data

    def close(self) -> None:
        """Close the connection."""
        self.sock.close()


def frames(stream: bytes) -> list[tuple[int, bytes]]:
    """The (stream number, data) frames of a multiplexed stream."""
    found = []
    while stream:
        size = int.from_bytes(stream[4:8], "big")
        found.append((stream[0], stream[8 : 8 + size]))
        stream = stream[8 + size :]
    return found


def demultiplex(stream: bytes) -> tuple[bytes, bytes]:
    """What a multiplexed stream holds of stdout and of stderr."""
    parts = frames(stream)
    return b"".join(data for number, data in parts if number == 1), b"".join(
        data for number, data in parts if number == 2
    )


class Host:
    """A daemon in namespaces of its own, on files of its own; `options` are further flags of the daemon."""

    running: list[Host] = []
    version = API  # what stands before a path of its API

    def __init__(
        self,
        *options: str,
        environment: Optional[dict[str, str]] = None,
        python: str = sys.executable,
        program: str = PROGRAM,
        cgroup_parent: Optional[str] = None,
    ) -> None:
        self.directory = tempfile.mkdtemp(prefix="dockerd-host-")
        self.options, self.python, self.program = list(options), python, program
        self.environment = {"PATH": PATH, "HOME": self.directory, **(environment or {})}
        name = os.path.basename(self.directory)
        self.cgroup_parent = "/" + name if cgroup_parent is None else cgroup_parent
        self.socket = self.path("docker.sock")
        self.url = "unix://" + self.socket
        self.data_root, self.exec_root = self.path("data"), self.path("exec")
        self.pidfile = self.path("docker.pid")
        self.log_path = self.path("log")
        self.process: Optional[subprocess.Popen[bytes]] = None
        self.holder = subprocess.Popen(
            ["unshare", "-n", "-m", "--propagation", "private", "sh", "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout and self.holder.stdout.read(6) == b"ready\n"

    def path(self, *names: str) -> str:
        """A path below the host's own directory."""
        return os.path.join(self.directory, *names)

    # The daemon's life

    def parent_options(self) -> list[str]:
        """The options of a daemon that has a cgroup parent of its own."""
        parent = ["--cgroup-parent", self.cgroup_parent] if self.cgroup_parent else []
        if self.cgroup_parent.startswith("/"):  # systemd, the default with cgroup v2, takes slices
            parent += ["--exec-opt", "native.cgroupdriver=cgroupfs"]
        return parent

    def command(self) -> list[str]:
        """The daemon's command line."""
        return [
            self.python,
            self.program,
            "-d",
            "-H",
            self.url,
            "-g",
            self.data_root,
            "--exec-root",
            self.exec_root,
            "-p",
            self.pidfile,
            *self.parent_options(),
            *self.options,
        ]

    def enter(self, *command: str, **options: Any) -> subprocess.Popen[Any]:
        """Start a command inside the host's namespaces."""
        return subprocess.Popen(
            ["nsenter", "-t", str(self.holder.pid), "-n", "-m", f"--wd={self.directory}", "--", *command],
            env=self.environment,
            **options,
        )

    def start(self, wait: bool = True) -> Host:
        """Start the daemon, and wait until it answers unless told not to."""
        with open(self.log_path, "ab") as log:
            self.process = self.enter(*self.command(), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.running.append(self)
        if wait:
            self.wait_ready()
        return self

    def wait_ready(self) -> None:
        """Wait until the daemon answers a ping; its log in the error when it does not."""
        assert self.process

        def answered() -> bool:
            assert self.process and self.process.poll() is None, f"the daemon ended:\n{self.log()}"
            with contextlib.suppress(OSError, http.client.HTTPException):
                return self.http("GET", "/_ping").status == 200
            return False

        wait_for(answered, f"the daemon to answer:\n{self.log()}", 120)

    def stop(self, number: int = signal.SIGTERM) -> int:
        """End the daemon by a signal, SIGTERM if none is named; returns its exit code."""
        assert self.process
        if self.process.poll() is None:
            self.process.send_signal(number)
        code = self.process.wait(60 * PATIENCE)
        if self in self.running:
            self.running.remove(self)
        return code

    def kill(self) -> None:
        """End the daemon as a crash does."""
        self.stop(signal.SIGKILL)

    def log(self) -> str:
        """All the daemon has logged so far."""
        return read_text(self.log_path)

    def close(self) -> None:
        """Stop the daemon, end what is left by force, remove every file; asserts that nothing had leaked."""
        code = self.stop() if self.process else 0
        log, found = self.log(), self.leaks() if code == 0 else []
        for pid in self.own_processes():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait_for(lambda: not self.own_processes(), "the left-over processes to end")
        assert self.holder.stdin and self.holder.stdout
        self.holder.stdin.close()
        self.holder.wait()
        self.holder.stdout.close()
        for directory in self.cgroups():
            with contextlib.suppress(OSError):
                os.rmdir(directory)
        shutil.rmtree(self.directory)
        assert code == 0, f"the daemon ended with {code}:\n{log}"
        assert not found, f"left behind by the daemon: {found}\n{log}"

    # What is left of it

    def own_processes(self) -> list[int]:
        """The host's processes but for daemon and holder: those that name its directory or mount it."""
        own = {os.getpid(), self.holder.pid}
        if self.process and self.process.poll() is None:
            own.add(self.process.pid)
        mark = self.directory
        return [
            pid
            for pid in processes()
            if pid not in own
            and (
                any(mark in read_text(f"/proc/{pid}/{name}") for name in ("cmdline", "environ", "mountinfo"))
                or f"/{os.path.basename(mark)}/" in read_text(f"/proc/{pid}/cgroup")
            )
        ]

    def cgroups(self) -> list[str]:
        """The host's cgroup directories, deepest first."""
        name = self.cgroup_parent.strip("/") or "docker"
        return [
            directory
            for top in ("", *os.listdir("/sys/fs/cgroup"))
            for directory, _, _ in os.walk(os.path.join("/sys/fs/cgroup", top, name), topdown=False)
        ]

    def leaks(self) -> list[str]:
        """What is left behind of a host whose daemon has ended: processes, mounts, cgroups, files."""

        def left() -> list[str]:
            found = [f"process {pid}: {read_text(f'/proc/{pid}/cmdline')!r}" for pid in self.own_processes()]
            found += [
                f"mount {line}"
                for line in read_text(f"/proc/{self.holder.pid}/mountinfo").splitlines()
                if self.directory in line
            ]
            found += [f"cgroup {path}" for path in self.cgroups() if not path.endswith(self.cgroup_parent)]
            found += [f"file {path}" for path in (self.socket, self.pidfile) if os.path.lexists(path)]
            return found

        with contextlib.suppress(AssertionError):  # the last teardown may run behind the daemon's exit
            wait_for(lambda: not left(), seconds=3)
        return left()

    # Clients

    def http(
        self,
        method: str,
        path: str,
        body: Any = None,
        headers: Optional[dict[str, str]] = None,
        timeout: float = 60,
    ) -> Answer:
        """One request on a connection of its own; a body that is not bytes is sent as JSON."""
        connection = UnixConnection(self.socket, timeout)
        headers = dict(headers or {})
        if body is not None and not isinstance(body, (bytes, bytearray)) and not hasattr(body, "read"):
            body = json.dumps(body).encode()
            headers.setdefault("Content-Type", "application/json")
        try:
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return Answer(response.status, response.headers, response.read())
        finally:
            connection.close()

    def api(self, method: str, path: str, body: Any = None, status: Optional[int] = None) -> Any:
        """One call of the newest API; returns its JSON, and asserts success or the status given."""
        answer = self.http(method, API + path, body)
        expected = answer.status == status if status else answer.status < 300
        assert expected, (method, path, answer.status, answer.body)
        return answer.json if answer.body[:1] in (b"{", b"[") else answer.body

    def hijack(self, path: str, method: str = "POST", body: bytes = b"", upgrade: bool = True) -> Hijacked:
        """Take over a connection as `docker attach` does; returns it behind the response's headers."""
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(60 * PATIENCE)
        sock.connect(self.socket)
        lines = [
            f"{method} {path} HTTP/1.1",
            "Host: localhost",
            "Content-Type: application/json",
            f"Content-Length: {len(body)}",
        ]
        lines += ["Connection: Upgrade", "Upgrade: tcp"] if upgrade else []
        sock.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        answer = b""
        while b"\r\n\r\n" not in answer:
            data = sock.recv(65536)
            assert data, f"no response: {answer!r}"
            answer += data
        head, _, rest = answer.partition(b"\r\n\r\n")
        return Hijacked(sock, head, rest)

    def create(
        self, *command: str, name: str = "", image: str = "busybox", version: str = API, **config: Any
    ) -> str:
        """Create a container without a network; returns its id. `config` is the body's further fields."""
        body = {"Image": image, "Cmd": list(command), **config}
        body["HostConfig"] = {"NetworkMode": "none", **config.get("HostConfig", {})}
        answer = self.http("POST", f"{version}/containers/create" + (f"?name={name}" if name else ""), body)
        assert answer.status == 201, answer.body
        return str(answer.json["Id"])

    def run(self, *command: str, **config: Any) -> tuple[int, bytes]:
        """Run a container to its end; returns its exit code and what it wrote to stdout and stderr."""
        identity = self.create(*command, **config)
        self.api("POST", f"/containers/{identity}/start")
        code = self.api("POST", f"/containers/{identity}/wait")["StatusCode"]
        logs = self.api("GET", f"/containers/{identity}/logs?stdout=1&stderr=1")
        self.api("DELETE", f"/containers/{identity}?force=1")
        return code, logs if config.get("Tty") else b"".join(data for _, data in frames(logs))

    def inspect(self, name: str) -> Any:
        """The inspection of a container."""
        return self.api("GET", f"/containers/{name}/json")

    def import_image(self, name: str, tree: bytes, *changes: str) -> str:
        """Import a root file system as an image; returns the image's id."""
        repository, _, tag = name.partition(":")
        query = "".join("&changes=" + change.replace(" ", "%20") for change in changes)
        path = f"{API}/images/create?fromSrc=-&repo={repository}&tag={tag or 'latest'}{query}"
        answer = self.http("POST", path, tree, {"Content-Type": "application/x-tar"})
        assert answer.status == 200, answer.body
        return str(answer.lines[-1]["status"])

    def remove_all(self) -> None:
        """Remove every container."""
        for container in self.api("GET", "/containers/json?all=1"):
            self.http("DELETE", f"{self.version}/containers/{container['Id']}?force=1&v=1")


class Peer(Host):
    """The real dockerd of the machine's Debian, from its packages unpacked beside the project."""

    version = ""

    def __init__(self, *options: str) -> None:
        libraries = [
            root
            for root, _, names in os.walk(PEER)
            if any(name.startswith(("libseccomp.so", "libdevmapper.so")) for name in names)
        ]
        assert libraries, f"{PEER} is missing: make peer"
        super().__init__(
            *options,
            environment={
                "LD_LIBRARY_PATH": ":".join(libraries),
                "PATH": f"{PEER}/usr/sbin:{PEER}/usr/bin:{PATH}",
            },
        )

    def command(self) -> list[str]:
        """The daemon's command line, without bridge and firewall."""
        return [
            f"{PEER}/usr/sbin/dockerd",
            "-H",
            self.url,
            "--data-root",
            self.data_root,
            "--exec-root",
            self.exec_root,
            "-p",
            self.pidfile,
            *self.parent_options(),
            "--iptables=false",
            "--ip6tables=false",
            "--ip-forward=false",
            "--ip-masq=false",
            "--bridge=none",
            *self.options,
        ]

    def api(self, method: str, path: str, body: Any = None, status: Optional[int] = None) -> Any:
        """One call of the API, unversioned: the peer's newest."""
        answer = self.http(method, path, body)
        expected = answer.status == status if status else answer.status < 300
        assert expected, (method, path, answer.status, answer.body)
        return answer.json if answer.body[:1] in (b"{", b"[") else answer.body

    def leaks(self) -> list[str]:
        """Nothing: what the peer leaves behind is not ours to judge, and goes with its namespaces."""
        return []

    def import_image(self, name: str, tree: bytes, *changes: str) -> str:
        """Import a root file system by the CLI, as the peer's API is older."""
        flags = [flag for change in changes for flag in ("-c", change)]
        done = subprocess.run(
            [f"{PEER}/usr/bin/docker", "-H", self.url, "import", *flags, "-", name],
            input=tree,
            stdout=subprocess.PIPE,
            check=True,
        )
        return done.stdout.decode().strip()


class Terminal:
    """A program on a terminal of its own, as a person uses it."""

    def __init__(self, command: list[str], environment: dict[str, str], rows: int, columns: int) -> None:
        self.master, slave = pty.openpty()
        self.resize(rows, columns)
        self.process = subprocess.Popen(
            ["setsid", "-c", "-w", *command], env=environment, stdin=slave, stdout=slave, stderr=slave
        )
        os.close(slave)
        self.seen = b""

    def resize(self, rows: int, columns: int) -> None:
        """Give the terminal another size."""
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("4H", rows, columns, 0, 0))

    def send(self, data: bytes) -> None:
        """Type `data`."""
        os.write(self.master, data)

    def expect(self, pattern: bytes, seconds: float = 20) -> bytes:
        """Wait for the regular expression on the screen; returns all up to its end."""
        end = time.monotonic() + seconds * PATIENCE
        while True:
            found = re.search(pattern, self.seen)
            if found:
                text, self.seen = self.seen[: found.end()], self.seen[found.end() :]
                return text
            assert time.monotonic() < end, f"no {pattern!r} in {self.seen!r}"
            assert self._read(), f"no {pattern!r} before the end: {self.seen!r}"

    def _read(self) -> bool:
        """Take what there is within half a second; False at the end."""
        if not select.select([self.master], [], [], 0.5)[0]:
            return True
        try:
            data = os.read(self.master, 65536)
        except OSError:  # EIO: nobody has the terminal any more
            return False
        self.seen += data
        return bool(data)

    def wait(self) -> int:
        """Read to the end; returns the exit code."""
        while self._read():
            pass
        return self.process.wait(20 * PATIENCE)

    def close(self) -> None:
        """End the program if it still runs, and close the terminal."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        os.close(self.master)


class Docker:
    """One Docker CLI at `program`, talking to one host; `leading` are the first arguments of each call."""

    def __init__(self, program: str, host: Host, *leading: str) -> None:
        self.command, self.host = [program, *leading], host
        self.environment = {"PATH": PATH, "HOME": host.directory, "DOCKER_HOST": host.url, "TERM": "xterm"}

    def run(
        self, *arguments: str, status: Optional[int] = 0, input: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """Run a command to its end; asserts its exit status, unless that is None."""
        done = subprocess.run(
            [*self.command, *arguments],
            env=self.environment,
            input=input,
            timeout=60 * PATIENCE,
            capture_output=True,
            text=True,
        )
        assert status is None or done.returncode == status, (arguments, done)
        return done

    def __call__(self, *arguments: str, **options: Any) -> str:
        """What the command prints on stdout, without white space around it."""
        return self.run(*arguments, **options).stdout.strip()

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start a command with pipes at its three streams."""
        return subprocess.Popen(
            [*self.command, *arguments],
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    @contextlib.contextmanager
    def terminal(self, *arguments: str, rows: int = 24, columns: int = 80) -> Iterator[Terminal]:
        """Run a command on a terminal."""
        terminal = Terminal([*self.command, *arguments], self.environment, rows, columns)
        try:
            yield terminal
        finally:
            terminal.close()


class Compose(Docker):
    """Compose of one major version, 1 (1.29) or 2, with a project in the host's directory."""

    def __init__(self, version: int, host: Host, text: str) -> None:
        file = host.path(f"compose-{version}.yaml")
        Path(file).write_text(text)
        words = [f"{CACHE}/newer/usr/libexec/docker/cli-plugins/docker-compose"]
        if version == 1:
            environment = read_text(f"{CACHE}/environments").split()[0]
            words = [os.path.join(HERE, environment, "bin/python"), "-m", "compose"]
        super().__init__(words[0], host, *words[1:], "-f", file, "-p", "project")
        self.environment.update(PYTHONPATH=f"{CACHE}/compose", PYTHONWARNINGS="ignore")


def docker_clis() -> dict[str, str]:
    """Every Docker CLI on the machine and among the unpacked packages: version to path."""
    found: dict[str, str] = {}
    for directory in [*os.environ.get("PATH", PATH).split(":"), *PATH.split(":"), f"{PEER}/usr/bin"]:
        program = os.path.join(directory, "docker")
        if os.access(program, os.X_OK):
            text = subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True).stdout
            match = re.search(r"version ([^,\s]+)", text)
            if match:
                found.setdefault(match.group(1), program)
    return found


# Root file systems

BUSYBOX_PASSWD = """root:x:0:0:root:/root:/bin/sh
daemon:x:1:1:daemon:/usr/sbin:/bin/false
bob:x:1000:1000:bob:/home/bob:/bin/sh
"""
BUSYBOX_GROUP = """root:x:0:
daemon:x:1:bob
wheel:x:10:root,bob
users:x:100:bob
bob:x:1000:
"""
BUSYBOX_CHANGES = ('CMD ["sh"]', f"ENV PATH={PATH}")


def tar_of(entries: dict[str, Any], mtime: int = 0) -> bytes:
    """A tar archive: path to bytes (a file, 0644), (bytes, mode), None (a directory), a TarInfo as it is but
    for the name; `mtime` is the time of those that have none."""
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for name, content in entries.items():
            information, data = tarfile.TarInfo(name), b""
            if isinstance(content, tarfile.TarInfo):
                information = content
                information.name = name
            elif content is None:
                information.type, information.mode = tarfile.DIRTYPE, 0o755
            else:
                data, information.mode = content if isinstance(content, tuple) else (content, 0o644)
                information.size = len(data)
            information.mtime = information.mtime or mtime
            tar.addfile(information, io.BytesIO(data))
    return stream.getvalue()


def busybox_entries() -> dict[str, Any]:
    """The entries of a busybox root file system: a static binary, its applets as links, users and groups."""
    with open(f"{PEER}/bin/busybox", "rb") as file:
        binary = file.read()
    directories = "bin dev etc home home/bob proc root sbin sys tmp usr var"
    entries: dict[str, Any] = dict.fromkeys(directories.split())
    entries["tmp"] = tarfile.TarInfo("tmp")
    entries["tmp"].type, entries["tmp"].mode = tarfile.DIRTYPE, 0o1777
    entries["bin/busybox"] = (binary, 0o755)
    applets = subprocess.run(
        [f"{PEER}/bin/busybox", "--list"], stdout=subprocess.PIPE, check=True, text=True
    ).stdout.split()
    for applet in sorted(set(applets) - {"busybox"}):
        link = entries["bin/" + applet] = tarfile.TarInfo("bin/" + applet)
        link.type, link.linkname = tarfile.SYMTYPE, "busybox"
    entries.update(
        {
            "etc/passwd": BUSYBOX_PASSWD.encode(),
            "etc/group": BUSYBOX_GROUP.encode(),
            "etc/plain": b"not a program\n",
            "bin/script": (b"#!/bin/sh\necho script: $*\n", 0o755),
        }
    )
    return entries


# Hooks and fixtures


def pytest_addoption(parser: pytest.Parser) -> None:
    """`--part=2/8` runs the second of eight parts of the tests, for machines that are slow."""
    parser.addoption("--part", default="1/1", help="K/N: run the Kth of N parts of the tests alone")


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Tests stay in their order, so that a part shares its hosts as all do."""
    part, parts = map(int, config.getoption("part").split("/"))
    items[:] = items[len(items) * (part - 1) // parts:len(items) * part // parts]


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    """A skipped test has failed, and a failed one shows what the running daemons have logged lately."""
    outcome = yield
    report = outcome.get_result()  # type: ignore[attr-defined]
    if report.skipped:
        report.outcome, report.longrepr = "failed", f"skipped: {report.longrepr}"
    if report.failed:
        report.sections += [(f"log of {host.directory}", host.log()[-6000:]) for host in Host.running]


@pytest.fixture(scope="session")
def busybox() -> bytes:
    """A busybox root file system as a tar archive."""
    return tar_of(busybox_entries())


@pytest.fixture(scope="session")
def debian() -> bytes:
    """A Debian root file system made by debootstrap, as a tar archive."""
    with open(os.path.join(CACHE, "debian.tar"), "rb") as file:
        return file.read()


@pytest.fixture
def new_host() -> Iterator[Callable[..., Host]]:
    """A function that starts another host, with the daemon's options; all are stopped and checked."""
    with contextlib.ExitStack() as stack:

        def make(*options: str, start: bool = True, **settings: Any) -> Host:
            host = Host(*options, **settings)
            stack.callback(host.close)
            return host.start() if start else host

        yield make


@pytest.fixture(scope="session")
def shared_host(busybox: bytes) -> Iterator[Host]:
    """The host that most tests share, with the image busybox."""
    host = Host("-D")
    try:
        host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        yield host
    finally:
        host.close()


@pytest.fixture
def host(shared_host: Host) -> Iterator[Host]:
    """The shared host; a test's containers are removed after it."""
    yield shared_host
    shared_host.remove_all()


@pytest.fixture(scope="session")
def bridgeless(busybox: bytes) -> Iterator[Host]:
    """A host without a bridge, as the peer has it."""
    host = Host("--bridge=none", "--iptables=false")
    try:
        host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        yield host
    finally:
        host.close()


@pytest.fixture(scope="session")
def shared_peer(busybox: bytes) -> Iterator[Host]:
    """The real dockerd, with the image busybox."""
    host = Peer()
    try:
        host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        yield host
    finally:
        host.close()


@pytest.fixture
def peer(shared_peer: Host) -> Iterator[Host]:
    """The real dockerd; a test's containers are removed after it."""
    yield shared_peer
    shared_peer.remove_all()


@pytest.fixture(params=sorted(docker_clis()))
def docker(request: pytest.FixtureRequest, host: Host) -> Docker:
    """Each Docker CLI found, on the shared host."""
    return Docker(docker_clis()[request.param], host)


# ------------------------------------------------------------------------------------------------------------
# Engine
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def engine() -> Engine:
    """An engine with nothing but its own handler."""
    return Engine()


def test_a_job_runs_its_handler_and_returns_the_reply(engine: Engine) -> None:
    engine.register("double", lambda job: job.reply([job.args[0] * 2, job.env.get_int("n")]))
    job = engine.job("double", "ab", n="7")
    assert job.run() == ["abab", 7]
    assert job.status == 0


def test_commands_lists_what_is_registered(engine: Engine) -> None:
    engine.register("zzz", lambda job: None)
    job = engine.job("commands")
    out = job.stdout.add(io.BytesIO())
    assert job.run() == ["commands", "zzz"]
    assert out.getvalue().startswith(b"commands\nzzz\n")


def test_a_job_runs_once(engine: Engine) -> None:
    job = engine.job("commands")
    job.run()
    with pytest.raises(dockerd.DockerError, match="^commands: job has already completed$"):
        job.run()


def test_an_unknown_job_is_status_127(engine: Engine) -> None:
    job = engine.job("nope")
    with pytest.raises(dockerd.DockerError, match="^nope: command not found$"):
        job.run()
    assert job.status == 127


def test_the_catchall_takes_what_has_no_handler_but_no_empty_name(engine: Engine) -> None:
    engine.register_catchall(lambda job: job.reply(job.name))
    assert engine.job("anything").run() == "anything"
    assert engine.job("commands").run() == ["commands"]
    with pytest.raises(dockerd.DockerError, match="command not found"):
        engine.job("").run()


def test_a_handler_cannot_be_overwritten(engine: Engine) -> None:
    with pytest.raises(dockerd.DockerError, match="Can't overwrite handler for command commands"):
        engine.register("commands", lambda job: None)


def test_global_handlers_are_copied_into_every_new_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dockerd.GLOBAL_HANDLERS, "everywhere", lambda job: job.reply(1))
    first, second = Engine(), Engine()
    assert first.job("everywhere").run() == second.job("everywhere").run() == 1
    first.register("here", lambda job: None)
    assert not second.has("here")
    assert first.id != second.id


def test_a_failed_job_raises_the_last_line_of_its_stderr(engine: Engine) -> None:
    def handler(job: dockerd.Job) -> int:
        job.error("first")
        return job.error("last")

    engine.register("fail", handler)
    job = engine.job("fail")
    with pytest.raises(dockerd.DockerError, match="^last$"):
        job.run()
    assert job.status == 1


def test_an_error_of_the_handler_passes_through(engine: Engine) -> None:
    def handler(job: dockerd.Job) -> None:
        raise dockerd.NotFound("No such container: x")

    engine.register("inspect", handler)
    job = engine.job("inspect")
    errors = job.stderr.add(io.BytesIO())
    with pytest.raises(dockerd.NotFound, match="No such container: x"):
        job.run()
    assert (job.status, errors.getvalue()) == (1, b"No such container: x\n")


def test_jobs_are_logged_with_their_status(engine: Engine, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dockerd")
    engine.register("start", lambda job: None)
    engine.job("start", "abc", "d").run()
    with pytest.raises(dockerd.DockerError):
        engine.job("nope").run()
    texts = [record.getMessage().partition("] ")[2] for record in caplog.records]
    assert texts[:2] == ["+job start(abc, d)", "-job start(abc, d) = OK (0)"]
    assert texts[-1] == "-job nope() = ERR (127)"
    caplog.clear()
    engine.logging = False
    engine.job("start").run()
    assert not caplog.records


def test_shutdown_refuses_new_jobs_and_runs_the_handlers_at_once(engine: Engine) -> None:
    meeting = threading.Barrier(2, timeout=10)
    met: list[int] = []
    for _ in range(2):
        engine.on_shutdown(lambda: met.append(meeting.wait()))
    engine.shutdown()
    assert sorted(met) == [0, 1]  # each waited for the other: they ran at the same time
    with pytest.raises(dockerd.Unavailable, match="^engine is shutdown$"):
        engine.job("commands").run()
    engine.shutdown()
    assert len(met) == 2


def test_shutdown_cancels_streaming_jobs_and_waits_for_the_others(engine: Engine) -> None:
    order: list[str] = []
    started = threading.Semaphore(0)
    release = threading.Event()

    def stream(job: dockerd.Job) -> None:
        job.ready()
        started.release()
        assert job.cancelled.wait(10)
        order.append("stream")
        release.set()

    def work(job: dockerd.Job) -> None:
        started.release()
        assert release.wait(10)
        order.append("work")

    engine.register("events", stream)
    engine.register("pull", work)
    threads = [threading.Thread(target=engine.job(name).run) for name in ("events", "pull")]
    for thread in threads:
        thread.start()
        started.acquire()
    assert engine.running == 2
    engine.on_shutdown(lambda: order.append("handler"))
    engine.shutdown()
    assert order == ["stream", "work", "handler"]
    for thread in threads:
        thread.join()


def test_serveapi_is_not_counted(engine: Engine) -> None:
    inside, leave = threading.Event(), threading.Event()

    def handler(job: dockerd.Job) -> None:
        inside.set()
        leave.wait(10)

    engine.register("serveapi", handler)
    thread = threading.Thread(target=engine.job("serveapi").run)
    thread.start()
    assert inside.wait(10)
    assert engine.running == 0
    engine.shutdown()  # does not wait for it
    leave.set()
    thread.join()


@pytest.mark.parametrize(
    "value, truth",
    [
        ("", False),
        ("0", False),
        ("no", False),
        ("False", False),
        (" none ", False),
        ("1", True),
        ("yes", True),
        (True, True),
        (None, False),
        (0, False),
    ],
)
def test_env_reads_booleans_as_docker_did(value: Any, truth: bool) -> None:
    assert dockerd.Env(key=value).get_bool("key") is truth


def test_env_reads_numbers_lists_and_json() -> None:
    env = dockerd.Env(n="12", bad="x", items='["a", "b"]', one="a", object='{"k": 1}', real=["c"])
    assert (env.get_int("n"), env.get_int("bad"), env.get_int("absent", 3)) == (12, -1, 3)
    assert (env.get_list("items"), env.get_list("one"), env.get_list("absent"), env.get_list("real")) == (
        ["a", "b"], ["a"], [], ["c"])
    assert env.get_json("object") == {"k": 1}


@pytest.mark.parametrize("text", [
    "[" * 65, "[" * 65 + "]" * 65, '{"a":' * 99999, "1e999", "NaN", "", '"', b"\xff"])  # fmt: skip
def test_documents_that_nobody_takes(text: Any) -> None:
    with pytest.raises(ValueError):
        dockerd.decode_json(text)
    assert dockerd.decode_json(b"[" * 64 + b"1.5" + b"]" * 64)


def test_install_registers_what_is_marked(engine: Engine) -> None:
    class Part:
        @dockerd.job("greet")
        def greet(self, job: dockerd.Job) -> None:
            """Say hello."""
            job.reply("hello " + job.args[0])

    engine.install(Part())
    assert engine.job("greet", "you").run() == "hello you"


TRAP = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import dockerd
calls = []
def clean_up():
    print("cleaning", flush=True)
    if sys.argv[2] == "hang":
        threading.Event().wait()
dockerd.SignalTrap(clean_up).install()
print("ready", flush=True)
while True:
    dockerd.signal.pause()
"""


class Trapped:
    """A process with the trap installed, and what it prints."""

    def __init__(self, manner: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", TRAP, os.path.dirname(os.path.abspath(dockerd.__file__)), manner],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, env={**os.environ, **environment}, text=True)
        self.expect("ready")

    def expect(self, line: str) -> None:
        """The next line that it prints."""
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == line + "\n"

    def end(self) -> tuple[int, str]:
        """(exit code, standard error) at its end."""
        errors = self.process.communicate(timeout=30)[1]
        return self.process.returncode, errors


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_trap_cleans_up_and_exits_0(number: signal.Signals) -> None:
    trapped = Trapped("quick")
    trapped.process.send_signal(number)
    trapped.expect("cleaning")
    assert trapped.end()[0] == 0


def test_the_third_repeat_forces_the_exit() -> None:
    trapped = Trapped("hang")
    trapped.process.send_signal(signal.SIGTERM)
    trapped.expect("cleaning")
    assert trapped.process.poll() is None
    while (
        trapped.process.poll() is None
    ):  # signals that come together count once: send until it has had its three
        trapped.process.send_signal(signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            trapped.process.wait(0.05)
    assert trapped.end()[0] == 128 + signal.SIGTERM


def test_sigquit_exits_without_cleanup() -> None:
    trapped = Trapped("quick", DEBUG="")
    trapped.process.send_signal(signal.SIGQUIT)
    code, errors = trapped.end()
    assert (code, "Thread" in errors) == (128 + signal.SIGQUIT, False)


def test_sigquit_with_debug_dumps_all_stacks_and_exits_2() -> None:
    trapped = Trapped("quick", DEBUG="1")
    trapped.process.send_signal(signal.SIGQUIT)
    code, errors = trapped.end()
    assert code == 2
    assert "most recent call first" in errors


def test_sigusr1_dumps_all_stacks_and_goes_on() -> None:
    trapped = Trapped("quick")
    trapped.process.send_signal(signal.SIGUSR1)
    assert trapped.process.stderr is not None
    assert "most recent call first" in trapped.process.stderr.readline()
    trapped.process.send_signal(signal.SIGTERM)
    assert trapped.end()[0] == 0


# ------------------------------------------------------------------------------------------------------------
# Clients
#
# The daemon as real clients see it: each command of every Docker CLI found, docker-py, and raw calls of the
# oldest and the newest API.
# ------------------------------------------------------------------------------------------------------------

NONE = ("--net", "none")
NEVER = "31449600"  # what `sleep` of a container that runs on is told: a year


def test_every_cli_is_found() -> None:
    """The unpacked packages bring one CLI at least, so that no test here runs over an empty list."""
    assert docker_clis()


def test_cli_import_images_history_rmi(docker: Docker, busybox: bytes, tmp_path: Any) -> None:
    archive = tmp_path / "root.tar"
    archive.write_bytes(busybox)
    identity = docker(
        "import", "-m", "by a test", "-c", 'CMD ["echo", "from the image"]', str(archive), "mine:one"
    )
    assert re.fullmatch("sha256:[0-9a-f]{64}", identity)
    assert docker("images", "-q", "--no-trunc", "mine") == identity
    assert docker("run", "--rm", *NONE, "-e", "PATH=/bin", "mine:one") == "from the image"
    assert "by a test" in docker("history", "mine:one")
    docker("tag", "mine:one", "mine:two")
    assert {"mine:one", "mine:two"} <= set(docker("images", "--format", "{{.Repository}}:{{.Tag}}").split())
    assert docker("rmi", "mine:two") == "Untagged: mine:two"
    assert docker("rmi", "mine:one").splitlines()[-1].startswith("Deleted: sha256:")
    assert "mine" not in docker("images")
    assert "No such image: mine:one" in docker.run("rmi", "mine:one", status=1).stderr


def test_cli_import_from_standard_input(docker: Docker, busybox: bytes) -> None:
    done = subprocess.run(
        [*docker.command, "import", "-", "piped"],
        env=docker.environment,
        input=busybox,
        stdout=subprocess.PIPE,
        check=True,
    )
    assert docker("images", "-q", "--no-trunc", "piped").encode() == done.stdout.strip()
    docker("rmi", "piped")


def test_cli_run_rm(docker: Docker) -> None:
    done = docker.run("run", "--rm", *NONE, "busybox", "sh", "-c", "echo out; echo err >&2; exit 3", status=3)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert docker("ps", "-aq") == ""


def test_cli_run_reads_standard_input(docker: Docker) -> None:
    assert (
        docker.run("run", "--rm", "-i", *NONE, "busybox", "wc", "-c", input="x" * 300000).stdout == "300000\n"
    )


def test_cli_run_passes_much_output(docker: Docker) -> None:
    script = "head -c 3000000 /dev/zero | tr '\\0' x; head -c 1000000 /dev/zero | tr '\\0' y >&2"
    done = docker.run("run", "--rm", *NONE, "busybox", "sh", "-c", script)
    assert (len(done.stdout), len(done.stderr)) == (3000000, 1000000)
    assert set(done.stdout) == {"x"} and set(done.stderr) == {"y"}


def test_cli_run_on_a_terminal(docker: Docker) -> None:
    command = ("run", "-it", "--rm", *NONE, "busybox", "sh")
    with docker.terminal(*command, rows=31, columns=97) as terminal:
        terminal.expect(rb"/ # ")
        terminal.send(b"tty; until stty size | grep -x '31 97'; do sleep .1; done\r")
        terminal.expect(rb"/dev/pts/0\r\n")
        terminal.expect(rb"31 97\r\n")
        terminal.send(b"sh -c \"trap 'echo cau''ght; exit' INT; echo beg''un; while :; do sleep .1; done\"\r")
        terminal.expect(rb"begun\r\n")
        terminal.send(b"\x03")
        terminal.expect(rb"caught\r\n")
        terminal.expect(rb"/ # ")
        terminal.send(b"echo $TERM; exit 7\r")
        terminal.expect(rb"\r\nxterm\r\n")
        assert terminal.wait() == 7
    assert docker("ps", "-aq") == ""


def test_cli_terminal_is_resized(docker: Docker) -> None:
    with docker.terminal("run", "-it", "--rm", *NONE, "busybox", "sh", rows=20, columns=60) as terminal:
        terminal.expect(rb"/ # ")
        terminal.send(b"until stty size | grep -x '20 60'; do sleep .1; done\r")
        terminal.expect(rb"20 60\r\n")
        terminal.send(b"until stty size | grep -x '40 90'; do sleep .1; done; exit\r")
        terminal.resize(40, 90)
        terminal.expect(rb"40 90\r\n")
        assert terminal.wait() == 0


def test_cli_detached_logs_stop(docker: Docker) -> None:
    script = "trap 'echo bye; exit 5' TERM; echo out; echo err >&2; while :; do sleep .1; done"
    identity = docker("run", "-d", "--name", "web", *NONE, "busybox", "sh", "-c", script)
    assert re.fullmatch("[0-9a-f]{64}", identity)
    assert (
        docker("ps", "--no-trunc", "--format", "{{.ID}} {{.Names}} {{.Image}}") == f"{identity} web busybox"
    )
    wait_for(lambda: "err" in docker.run("logs", "web").stderr)
    follow = docker.start("logs", "-f", identity[:10])
    assert follow.stdout and follow.stdout.readline() == "out\n"
    assert docker("stop", "web") == "web"
    assert follow.communicate(timeout=20) == ("bye\n", "err\n")
    assert docker.run("logs", "web").stdout == "out\nbye\n"
    assert docker.run("logs", "--tail", "1", "web").stdout == "bye\n"
    assert re.fullmatch(
        r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{9}Z bye\n", docker.run("logs", "-t", "--tail", "1", "web").stdout
    )
    assert docker("ps", "-q") == ""
    assert "Exited (5)" in docker("ps", "-a", "--format", "{{.Status}}")
    assert docker("wait", "web") == "5"
    assert docker("rm", "web") == "web"
    assert "No such container: web" in docker.run("logs", "web", status=1).stderr


def test_cli_stop_kills_after_its_timeout(docker: Docker) -> None:
    docker("run", "-d", "--name", "deaf", *NONE, "busybox", "sh", "-c", f"trap '' TERM; exec sleep {NEVER}")
    wait_for(lambda: int(caught_signals(docker.host, "deaf", "SigIgn"), 16) & 1 << signal.SIGTERM - 1)
    docker("stop", "-t", "1", "deaf")
    state = docker.host.inspect("deaf")["State"]
    assert (state["ExitCode"], state["Status"], state["OOMKilled"]) == (137, "exited", False)


def caught_signals(host: Host, name: str, field: str) -> str:
    """A signal mask of a container's first process, in hexadecimal, as /proc tells."""
    status = read_text(f"/proc/{host.inspect(name)['State']['Pid']}/status")
    found = re.search(rf"^{field}:\s*(\w+)", status, re.M)
    return found.group(1) if found else "0"


def test_cli_kill(docker: Docker) -> None:
    docker(
        "run",
        "-d",
        "--name",
        "box",
        *NONE,
        "busybox",
        "sh",
        "-c",
        "trap 'exit 9' USR1; while :; do sleep .1; done",
    )
    wait_for(lambda: int(caught_signals(docker.host, "box", "SigCgt"), 16) & 1 << signal.SIGUSR1 - 1)
    docker("kill", "-s", "USR1", "box")
    assert docker("wait", "box") == "9"
    assert "is not running" in docker.run("kill", "box", status=1).stderr
    docker("run", "-d", "--name", "box2", *NONE, "busybox", "sleep", NEVER)
    assert "Invalid signal: NOSUCH" in docker.run("kill", "-s", "NOSUCH", "box2", status=1).stderr
    docker("kill", "box2")
    assert docker("wait", "box2") == "137"


def test_cli_attach(docker: Docker) -> None:
    docker(
        "run",
        "-d",
        "-i",
        "--name",
        "box",
        *NONE,
        "busybox",
        "sh",
        "-c",
        "while read x; do echo got $x; echo e$x >&2; done",
    )
    attached = docker.start("attach", "box")
    assert attached.stdin and attached.stdout
    attached.stdin.write("one\n")
    attached.stdin.flush()
    assert attached.stdout.readline() == "got one\n"
    second = docker.start("attach", "--no-stdin", "box")
    wait_for(lambda: len(open_attachments(docker.host, "box")) == 2)
    attached.stdin.write("two\n")
    attached.stdin.flush()
    assert attached.stdout.readline() == "got two\n"
    docker("stop", "-t", "0", "box")
    assert attached.wait(20) == 137
    attached.communicate()
    second.communicate()


def open_attachments(host: Host, name: str) -> list[str]:
    """The attach jobs that have begun on a container and not ended, by the daemon's log."""
    identity = host.inspect(name)["Id"]
    begun = re.findall(rf"\+job attach\((?:{name}|{identity})", host.log())
    ended = re.findall(rf"-job attach\((?:{name}|{identity})", host.log())
    return begun[len(ended) :]


def test_cli_attach_and_detach_on_a_terminal(docker: Docker) -> None:
    docker("run", "-dit", "--name", "box", *NONE, "busybox", "sh")
    with docker.terminal("attach", "box") as terminal:
        terminal.send(b"\r")
        terminal.expect(rb"/ # ")
        terminal.send(b"echo $((20+3))\r")
        terminal.expect(rb"\r\n23\r\n")
        terminal.send(b"\x10\x11")
        terminal.expect(rb"read escape sequence")
    assert docker.host.inspect("box")["State"]["Running"]
    with docker.terminal("attach", "--detach-keys", "ctrl-x,z", "box") as terminal:
        terminal.send(b"echo $((30+3))\r")
        terminal.expect(rb"\r\n33\r\n")
        terminal.send(b"\x18z")
        terminal.expect(rb"read escape sequence")
    assert docker.host.inspect("box")["State"]["Running"]


def test_cli_exec(docker: Docker) -> None:
    """What a person does with exec; exit codes and messages are the real dockerd's."""
    docker("run", "-d", "--name", "box", *NONE, "-e", "X=y", "-w", "/tmp", "busybox", "sleep", NEVER)
    done = docker.run("exec", "box", "sh", "-c", "echo out; echo err >&2; exit 3", status=3)
    assert (done.stdout, done.stderr) == ("out\n", "err\n")
    assert docker("exec", "-i", "box", "cat", input="through\n") == "through"
    flags = ("-u", "bob", "-w", "/", "-e", "A=b")
    assert docker("exec", *flags, "box", "sh", "-c", "id -un; pwd; echo $A$X$HOME").split() == [
        "bob", "/", "by/home/bob"]  # fmt: skip
    docker("exec", "-d", "box", "sh", "-c", "echo detached >/tmp/file; exec sleep " + NEVER)
    wait_for(lambda: docker("exec", "box", "cat", "file") == "detached")
    for command, code, text in (
        ("nosuch", 127, 'exec: "nosuch": executable file not found in $PATH'),
        ("/etc", 126, 'exec: "/etc": permission denied'),
    ):
        done = docker.run("exec", "box", command, status=code)
        assert f"OCI runtime exec failed: exec failed: unable to start container process: {text}" in (
            done.stdout + done.stderr
        )
    assert "No such container: nosuch" in docker.run("exec", "nosuch", "true", status=1).stderr
    docker("pause", "box")
    assert "is paused, unpause the container before exec" in docker.run("exec", "box", "ls", status=1).stderr
    docker("unpause", "box")
    docker("stop", "-t", "0", "box")
    assert re.search(r"[Cc]ontainer \S+ is not running", docker.run("exec", "box", "ls", status=1).stderr)


def test_cli_exec_on_a_terminal(docker: Docker) -> None:
    docker("run", "-d", "--name", "box", *NONE, "busybox", "sleep", NEVER)
    with docker.terminal("exec", "-it", "box", "sh", rows=33, columns=44) as terminal:
        terminal.expect(rb"/ # ")
        wait_for(lambda: docker("exec", "box", "sh", "-c", "stty size </dev/pts/0") == "33 44")
        terminal.send(b"tty; echo $TERM; exit 7\r")
        terminal.expect(rb"/dev/pts/0\r\nxterm\r\n")
        assert terminal.wait() == 7
    with docker.terminal("exec", "-it", "--detach-keys", "ctrl-x,z", "box", "sleep", NEVER) as terminal:
        wait_for(lambda: docker("exec", "box", "sh", "-c", "cat /proc/[0-9]*/cmdline").count(NEVER) == 2)
        terminal.send(b"\x18z")
        terminal.expect(rb"read escape sequence|^$")
        terminal.wait()
    running = docker.host.inspect("box")["ExecIDs"]
    assert len(running) == 1 and docker.host.api("GET", f"/exec/{running[0]}/json")["Running"]


def test_cli_create_start_attached(docker: Docker) -> None:
    docker("create", "--name", "made", *NONE, "busybox", "sh", "-c", "echo started; exit 4")
    assert docker.host.inspect("made")["State"]["Status"] == "created"
    assert docker.run("start", "-a", "made", status=4).stdout == "started\n"
    assert docker.run("start", "-a", "made", status=4).stdout == "started\n"
    assert docker.run("logs", "made").stdout == "started\nstarted\n"


def test_cli_ps_and_inspect(docker: Docker) -> None:
    docker("run", "-d", "--name", "one", "-l", "kind=test", *NONE, "busybox", "sleep", NEVER)
    docker("run", "--name", "two", *NONE, "busybox", "true")
    names = ("--format", "{{.Names}}")
    assert docker("ps", *names) == "one"
    assert docker("ps", "-a", *names).split() == ["two", "one"]
    assert docker("ps", "-a", "-n", "1", *names) == "two"
    assert docker("ps", "-a", "-f", "label=kind=test", *names) == "one"
    assert docker("ps", "-a", "-f", "status=exited", *names) == "two"
    assert docker("ps", "-a", "-f", "name=tw", *names) == "two"
    assert re.fullmatch(
        r'\w{12}\s+busybox\s+"true"\s+.*ago\s+Exited \(0\) .* ago\s+two',
        docker("ps", "-a", "-f", "name=two").splitlines()[1],
    )
    assert (
        docker(
            "inspect", "-f", "{{.State.Status}} {{.Config.Labels.kind}} {{.HostConfig.NetworkMode}}", "one"
        )
        == "running test none"
    )
    assert docker("inspect", "-s", "-f", "{{.SizeRootFs}}", "one") != "<nil>"
    assert json.loads(docker("inspect", "busybox"))[0]["RepoTags"] == ["busybox:latest"]
    assert docker.run("inspect", "nobody", status=1).stdout == "[]\n"


def test_cli_wait_for_many(docker: Docker) -> None:
    docker("run", "-d", "-i", "--name", "waiting", *NONE, "busybox", "sh", "-c", "read x; exit $x")
    waiting = docker.start("wait", "waiting")
    attached = docker.start("attach", "waiting")
    out, _ = attached.communicate("6\n", timeout=20)
    assert waiting.communicate(timeout=20)[0] == "6\n"


def test_cli_rm(docker: Docker) -> None:
    docker("run", "-d", "--name", "gone", *NONE, "busybox", "sleep", NEVER)
    pid = docker.host.inspect("gone")["State"]["Pid"]
    assert "container is running" in docker.run("rm", "gone", status=1).stderr
    assert (
        "image is being used by running container"
        in docker.run("rmi", "-f", docker.host.inspect("gone")["Image"], status=1).stderr
    )
    assert docker("rm", "-f", "gone") == "gone"
    assert not os.path.exists(f"/proc/{pid}")
    assert docker("ps", "-aq") == ""


def test_cli_names(docker: Docker) -> None:
    docker("create", "--name", "taken", *NONE, "busybox")
    refused = docker.run("create", "--name", "taken", *NONE, "busybox", status=1).stderr
    assert 'The container name "/taken" is already in use by container' in refused
    assert (
        "Invalid container name (+)" in docker.run("create", "--name", "+", *NONE, "busybox", status=1).stderr
    )
    docker("create", *NONE, "busybox")
    assert re.fullmatch(r"[a-z]+_[a-z]+\d?", docker("ps", "-la", "--format", "{{.Names}}"))


def test_cli_info(docker: Docker) -> None:
    docker("run", "-d", *NONE, "busybox", "sleep", NEVER)
    done = docker.run("info")
    for line in (
        " Server Version: ",
        " Storage Driver: overlay2",
        "  Running: 1",
        "  Paused: 0",
        " Images: 1",
        " Logging Driver: json-file",
        "  seccomp",
        " Kernel Version: ",
        " Docker Root Dir: ",
    ):
        assert "\n" + line in done.stdout, (line, done.stdout)
    assert (
        docker("info", "-f", "{{.DockerRootDir}} {{.MemTotal}}")
        == f"{docker.host.data_root} {os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')}"
    )


def test_cli_version(docker: Docker) -> None:
    text = docker(
        "version", "-f", "{{.Server.Version}} {{.Server.APIVersion}} {{.Server.Os}}/{{.Server.Arch}}"
    )
    assert re.fullmatch(r"\S+ 1\.51 linux/\w+", text)


@pytest.mark.parametrize(
    ("code", "command", "text"),
    [
        (125, ["--nosuchflag", "busybox"], "unknown flag"),
        (125, ["-m", "1m", "busybox", "true"], "Minimum memory limit allowed is 6MB"),
        (125, ["-u", "nosuch", "busybox", "true"], "unable to find user nosuch"),
        (126, ["busybox", "/etc"], "permission denied"),
        (126, ["busybox", "/etc/plain"], "permission denied"),
        (127, ["busybox", "nosuch"], 'exec: "nosuch": executable file not found in $PATH'),
        (127, ["busybox", "/no/such"], 'exec: "/no/such": stat /no/such: no such file or directory'),
        (127, ["busybox", ""], "executable file not found"),
        (5, ["busybox", "sh", "-c", "exit 5"], ""),
    ],
)
def test_cli_exit_codes(docker: Docker, code: int, command: list[str], text: str) -> None:
    assert text in docker.run("run", "--rm", *NONE, *command, status=code).stderr
    assert docker("ps", "-aq") == ""


def test_cli_debian(docker: Docker, host: Host, debian: bytes) -> None:
    if not host.http("GET", f"{API}/images/debian/json").status == 200:
        host.import_image("debian", debian, 'CMD ["bash"]')
    run = ("run", "--rm", *NONE, "debian")
    assert docker(*run, "apt-get", "--version").startswith("apt ")
    listed = docker(*run, "dpkg", "-l")
    assert re.search(r"^ii  apt ", listed, re.M) and re.search(r"^ii  libc6", listed, re.M)
    assert docker(*run, "sh", "-c", "dpkg --verify; echo checked").endswith("checked")
    assert docker(*run, "stat", "-c", "%A %U", "/usr/bin/passwd") == "-rwsr-xr-x root"
    with docker.terminal("run", "-it", "--rm", *NONE, "debian") as terminal:
        terminal.expect(rb"root@\w{12}:/# ")
        terminal.send(b"echo $((6*7)); exit\r")
        terminal.expect(rb"[\r\n]42\r\n")
        assert terminal.wait() == 0


def test_cli_network_modes(docker: Docker) -> None:
    """none has a loopback alone; host has the daemon's own network, hosts file and name."""
    assert docker("run", "--rm", *NONE, "busybox", "ls", "/sys/class/net") == "lo"
    own = os.readlink(f"/proc/{docker.host.holder.pid}/ns/net")
    assert docker("run", "--rm", "--net", "host", "busybox", "readlink", "/proc/self/ns/net") == own
    assert docker("run", "--rm", "--net", "host", "busybox", "hostname") == os.uname().nodename
    made = docker("create", "--net", "host", "busybox", "true")
    assert docker("inspect", "-f", "{{.Config.Hostname}}", made) == os.uname().nodename


def test_containers_whose_network_is_disabled(host: Host, bridgeless: Host) -> None:
    """By themselves, be it the host's that they asked for, or as there is no bridge: they have a loopback."""
    cases: list[tuple[Host, dict[str, Any]]] = [(bridgeless, {"HostConfig": {"NetworkMode": ""}})]
    cases += [(host, {"NetworkDisabled": True, "HostConfig": {"NetworkMode": mode}})
              for mode in ("bridge", "host")]
    for daemon, config in cases:
        assert daemon.run("sh", "-c", "ls /sys/class/net; ip route", **config) == (0, b"lo\n")
    docker = Docker(docker_clis()[max(docker_clis())], bridgeless)
    assert docker("run", "--name", "cli", "-p", "80", "busybox", "ls", "/sys/class/net") == "lo"
    assert list(bridgeless.inspect("cli")["NetworkSettings"]["Networks"]) == ["none"]
    docker("rm", "cli")


def test_cli_limits_reach_the_cgroups(docker: Docker) -> None:
    flags = (
        "-m",
        "64m",
        "--memory-swap",
        "128m",
        "--cpu-shares",
        "512",
        "--cpu-period",
        "50000",
        "--cpu-quota",
        "25000",
        "--cpuset-cpus",
        "0",
        "--pids-limit",
        "33",
        "--oom-score-adj",
        "77",
        "--ulimit",
        "nofile=64:128",
    )
    docker("run", "-d", "--name", "limited", *NONE, *flags, "busybox", "sleep", NEVER)
    identity, pid = (docker.host.inspect("limited")[key] for key in ("Id", "State"))
    assert read_text(f"/proc/{pid['Pid']}/oom_score_adj") == "77\n"
    assert re.search(r"Max open files\s+64\s+128", read_text(f"/proc/{pid['Pid']}/limits"))
    wanted = {
        ("memory.limit_in_bytes", "memory.max"): {str(64 << 20)},
        ("memory.memsw.limit_in_bytes", "memory.swap.max"): {str(128 << 20), str(64 << 20), ""},
        ("cpu.shares", "cpu.weight"): {"512", "20", "59"},
        ("cpuset.cpus", "cpuset.cpus"): {"0"},
        ("cpu.cfs_quota_us", "cpu.max"): {"25000", "25000 50000"},
        ("pids.max", "pids.max"): {"33"},
    }
    for names, values in wanted.items():
        found = {
            read_text(os.path.join(directory, name)).strip()
            for directory in docker.host.cgroups()
            if directory.endswith(identity)
            for name in names
            if os.path.exists(os.path.join(directory, name))
        }
        assert found and found <= values, (names, found)


def test_cli_out_of_memory(docker: Docker) -> None:
    script = "x=xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx; while :; do x=$x$x; done"
    docker.run(
        "run",
        "--name",
        "greedy",
        "-m",
        "20m",
        "--memory-swap",
        "20m",
        *NONE,
        "busybox",
        "sh",
        "-c",
        script,
        status=137,
    )
    assert docker.host.inspect("greedy")["State"]["OOMKilled"] is True


def shape_of(value: Any) -> Any:
    """What a JSON value is made of: the keys of objects, the shape of a list's first element, types."""
    if isinstance(value, dict):
        return {key: shape_of(member) for key, member in value.items()}
    return [shape_of(item) for item in value[:1]] if isinstance(value, list) else type(value).__name__


def stats_of_one(daemon: Host, version: str) -> tuple[Any, Any]:
    """What /stats gives for a container never started, and the shape of what it gives for a running one."""
    limits = {"Memory": 64 << 20, "PidsLimit": 9}
    # One block past the page cache: else the lists of blkio are filled or empty as the cache has it.
    script = f"dd if=/dev/zero of=/block bs=4k count=1 oflag=direct && echo written; exec sleep {NEVER}"
    identity = daemon.create("sh", "-c", script, version="/v1.41", HostConfig=limits)
    path = f"{version}/containers/{identity}/stats?stream=0"
    stopped = daemon.http("GET", path.replace("1.20", "1.41")).json
    daemon.api("POST", f"/containers/{identity}/start")
    logs = f"/v1.41/containers/{identity}/logs?stdout=1"
    wait_for(lambda: b"written" in daemon.http("GET", logs).body, "the block is written")
    running = daemon.http("GET", path).json
    daemon.http("DELETE", f"/v1.41/containers/{identity}?force=1")
    assert stopped.pop("id", identity) == identity and stopped.pop("name", "/x")[0] == "/"
    assert running["memory_stats"]["limit"] == 64 << 20
    assert running["pids_stats"] == {"current": 1, "limit": 9}
    gone = running["cpu_stats"]["system_cpu_usage"] - running["precpu_stats"]["system_cpu_usage"]
    assert 0.5e9 < gone / running["cpu_stats"]["online_cpus"] < 5e9
    return stopped, shape_of(running)


@pytest.mark.parametrize("version", ["/v1.41", "/v1.20"])
def test_stats_have_the_real_daemons_shape(host: Host, peer: Host, version: str) -> None:
    assert stats_of_one(host, version) == stats_of_one(peer, version)


def test_the_processors_time_when_descriptors_have_run_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one thread that samples must go on."""
    monkeypatch.setattr(dockerd, "read_text", lambda path: "")
    assert dockerd.system_cpu() == {"system_cpu_usage": 0, "online_cpus": 0}


def test_stats_follow_a_container_until_it_is_removed(host: Host) -> None:
    identity = host.create("sleep", NEVER, name="measured")
    stream = host.hijack(f"{API}/containers/measured/stats", "GET", upgrade=False)
    refused = host.http("GET", f"{API}/containers/measured/stats?one-shot=1")
    assert refused.status == 400 and refused.json["message"] == "cannot have stream=true and one-shot=true"

    def sample() -> Any:
        stream.read_until(b"\r\n")
        return json.loads(stream.read_until(b"\r\n"))

    assert sample()["read"] == "0001-01-01T00:00:00Z"  # it does not run yet
    host.api("POST", "/containers/measured/start")
    first = wait_for(lambda: next(line for line in iter(sample, None) if line["pids_stats"]))
    assert first["precpu_stats"] == dockerd.NO_CPU_STATS
    second = sample()
    assert second["preread"] == first["read"] and second["precpu_stats"] == first["cpu_stats"]
    once = host.api("GET", "/containers/measured/stats?stream=0&one-shot=1")
    assert once["id"] == identity and once["preread"] == "0001-01-01T00:00:00Z" and once["read"][:3] == "202"
    host.api("DELETE", "/containers/measured?force=1")
    stream.read_until(b"0\r\n\r\n")
    stream.close()
    assert host.process
    threads = f"/proc/{host.process.pid}/task"
    wait_for(lambda: all(read_text(f"{threads}/{task}/comm") != "stats\n" for task in os.listdir(threads)))


@pytest.fixture(scope="module")
def devices(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory of device nodes, and of CDI specifications beside them."""
    top = tmp_path_factory.mktemp("devices")
    (top / "nodes/below").mkdir(parents=True)
    (top / "nodes/plain").write_text("no device")
    os.mknod(top / "nodes/null", 0o20666, os.makedev(1, 3))
    os.mknod(top / "nodes/below/fuse", 0o20600, os.makedev(10, 229))
    (top / "data").mkdir()
    (top / "data/file").write_text("from the host")
    for place in ("cdi", "later"):
        (top / place).mkdir()
        (top / place / "vendor.json").write_text(json.dumps({
            "cdiVersion": "0.6.0", "kind": "vendor.com/class",
            "containerEdits": {"env": ["COMMON=1"], "additionalGids": [4242]},
            "devices": [{"name": "one", "containerEdits": {
                "env": [f"FROM={place}"],
                "deviceNodes": [{"path": "/dev/card", "hostPath": str(top / "nodes/below/fuse"),
                                 "permissions": "r"}],
                "mounts": [{"hostPath": str(top / "data"), "containerPath": "/data",
                            "options": ["ro", "rbind"]}]}},
                {"name": "two"},
                {"name": "hooked", "containerEdits": {"hooks": [{"hookName": "createRuntime"}]}},
                {"name": "bad", "containerEdits": {"deviceNodes": [{"hostPath": "/dev/null"}]}},
                *([{"name": "twice"}] * 2)]}))
    (top / "cdi/broken.json").write_text("{")
    (top / "cdi/shapeless.json").write_text("[1]")
    return top


def test_devices_by_path_and_by_directory(host: Host, devices: Path) -> None:
    nodes = str(devices / "nodes")

    def run(script: str, *given: dict[str, str]) -> str:
        return host.run("sh", "-c", script, HostConfig={"Devices": list(given)})[1].decode()

    listing = ("find /dev/mine | sort; stat -c '%F %t:%T %a' /dev/mine/below/fuse; "
               "echo x > /dev/mine/null && echo on")
    assert run(listing, {"PathOnHost": nodes, "PathInContainer": "/dev/mine"}).splitlines() == [
        "/dev/mine", "/dev/mine/below", "/dev/mine/below/fuse", "/dev/mine/null",
        "character special file a:e5 600", "on"]
    one = {"PathOnHost": nodes + "/below/fuse", "PathInContainer": "/dev/one", "CgroupPermissions": "r"}
    assert "not permitted" in run("echo x > /dev/one", one)
    for path, text in ((nodes + "/plain", "not a device node"), ("/nosuch", "no such file or directory")):
        device = {"PathOnHost": path, "PathInContainer": "/dev/x"}
        identity = host.create("true", HostConfig={"Devices": [device]})
        assert host.api("POST", f"/containers/{identity}/start", status=500)["message"] == (
            f'error gathering device information while adding custom device "{path}": {text}')
        assert host.inspect(identity)["State"]["ExitCode"] == 128


def test_devices_by_name(new_host: Callable[..., Host], busybox: bytes, devices: Path) -> None:
    """Those of CDI specifications, and Docker's text for all others."""
    host = new_host(*(f"--cdi-spec-dir={devices / place}" for place in ("cdi", "none", "later")))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    found = host.api("GET", "/info")
    assert found["CDISpecDirs"][-1] == str(devices / "later")
    assert {"Source": "cdi", "ID": "vendor.com/class=one"} in found["DiscoveredDevices"]
    docker = Docker(docker_clis()[max(docker_clis(), key=lambda version: int(version.split(".")[0]))], host)
    script = "id -G; echo $COMMON $FROM; cat /data/file; touch /data/x; echo x > /dev/card; true"
    flags = ("--device", "vendor.com/class=one", "--device", "vendor.com/class=two")
    ran = docker.run("run", "--rm", *NONE, *flags, "busybox", "sh", "-c", script)
    assert ran.stdout.split() == ["0", "10", "4242", "1", "later", "from", "the", "host"]
    assert "x: Read-only file system" in ran.stderr and "/dev/card: Operation not permitted" in ran.stderr
    for request, text in (
        ({"Driver": "", "Count": -1, "Capabilities": [["gpu"]]},
         'could not select device driver "" with capabilities: [[gpu]]'),
        ({"Driver": "nvidia", "DeviceIDs": ["0"], "Capabilities": [["gpu", "x"], ["y"]]},
         'could not select device driver "nvidia" with capabilities: [[gpu x] [y]]'),
        ({"Driver": "cdi", "DeviceIDs": ["vendor.com/class=none", "vendor.com/class=twice"]},
         "CDI device injection failed: unresolvable CDI devices vendor.com/class=none, "
         "vendor.com/class=twice"),
        ({"Driver": "cdi", "DeviceIDs": ["vendor.com/class=hooked"]},
         "CDI device injection failed: the device needs hooks, which are not supported"),
        ({"Driver": "cdi", "DeviceIDs": ["vendor.com/class=bad"]},
         "CDI device injection failed: a malformed specification: KeyError('path')"),
    ):
        identity = host.create("true", HostConfig={"DeviceRequests": [request]})
        assert host.api("POST", f"/containers/{identity}/start", status=500)["message"] == text
    assert "broken.json is not one" in host.log() and "shapeless.json is not one" in host.log()


def test_limits_above_the_daemons_own(host: Host) -> None:
    """A hard limit that the daemon may not raise is cut to its own, as the log says; with the capability it
    is what was asked for."""
    own = read_text(f"/proc/{host.process.pid}/limits") if host.process else ""
    most = int(re.findall(r"Max open files\s+\S+\s+(\d+)", own)[0])
    limits = [{"Name": "nofile", "Soft": most + 1, "Hard": most + 2}, {"Name": "core", "Soft": 0, "Hard": 0}]
    code, printed = host.run("sh", "-c", "ulimit -Sn; ulimit -Hn; ulimit -c", HostConfig={"Ulimits": limits})
    may_raise = int(re.findall(r"CapEff:\s*(\w+)", read_text("/proc/self/status"))[0], 16) >> 24 & 1
    expected = [most + 1, most + 2] if may_raise else [most, most]
    assert printed.split() == [b"%d" % number for number in (*expected, 0)]
    assert may_raise or f"ulimit nofile={most + 2} becomes {most}" in host.log()


def test_a_shells_limit_of_descriptors_is_raised(new_host: Callable[..., Host], busybox: bytes) -> None:
    """For daemon and shim; containers keep it, as under the real daemon."""
    host = new_host(start=False)
    command = host.command()
    host.command = lambda: ["prlimit", "--nofile=500:2000", *command]  # type: ignore[method-assign]
    host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
    assert host.process
    assert host.run("sh", "-c", "ulimit -Sn; ulimit -Hn") == (0, b"500\n2000\n")
    for pid in (host.process.pid, *shims(host)):
        assert re.findall(r"open files +(\d+) +(\d+)", read_text(f"/proc/{pid}/limits")) == [("2000", "2000")]


def test_namespaces_of_another_container(host: Host) -> None:
    """--pid and --ipc container:NAME, by name or id; with Docker's text for what cannot be shared."""
    ids = {mode: host.create("sleep", NEVER, name=mode, HostConfig={"IpcMode": mode, "ShmSize": 1 << 20})
           for mode in ("shareable", "private")}
    joins = {"PidMode": "container:shareable", "IpcMode": "container:" + ids["shareable"][:12]}
    script = "cat /proc/1/cmdline; df -k /dev/shm | tail -1; echo x > /dev/shm/y; exec sleep 1000"
    host.create("sh", "-c", script, name="joining", HostConfig=joins)
    found = host.inspect("joining")["HostConfig"]
    assert found["PidMode"] == found["IpcMode"] == "container:" + ids["shareable"]
    refused = host.api("POST", "/containers/joining/start", status=500)
    assert refused["message"] == f"container {ids['shareable']} is not running"
    for name in ids:
        host.api("POST", f"/containers/{name}/start")
    host.api("POST", "/containers/joining/start")
    pids = {name: host.inspect(name)["State"]["Pid"] for name in ("shareable", "joining")}
    for kind in ("pid", "ipc"):
        assert len({os.readlink(f"/proc/{pid}/ns/{kind}") for pid in pids.values()}) == 1
    assert os.readlink(f"/proc/{pids['joining']}/ns/mnt") != os.readlink(f"/proc/{pids['shareable']}/ns/mnt")
    wait_for(lambda: os.path.exists(f"/proc/{pids['shareable']}/root/dev/shm/y"))
    output = host.api("GET", "/containers/joining/logs?stdout=1")
    assert b"sleep\0" in output and b" 1024 " in output
    host.api("POST", "/containers/shareable/kill")  # takes the namespace and all in it along
    wait_for(lambda: host.inspect("joining")["State"]["ExitCode"] == 137)
    for key, other, status, text in (
        ("IpcMode", "nosuch", 400, "No such container: nosuch"),
        ("PidMode", "nosuch", 400, "No such container: nosuch"),
        ("IpcMode", "", 400, "invalid IPC mode: container:"),
        ("PidMode", "", 400, "invalid PID mode: container:"),
        ("IpcMode", "private", 500, f"can't join IPC of container {ids['private']}: non-shareable IPC (hint: "
         "use IpcMode:shareable for the donor container)"),
        ("IpcMode", "shareable", 500, f"can't join IPC of container {ids['shareable']}: container "
         f"{ids['shareable']} is not running"),
    ):
        body = {"Image": "busybox", "HostConfig": {"NetworkMode": "none", key: f"container:{other}"}}
        answer = host.http("POST", f"{API}/containers/create", body)
        if status == 500:
            answer = host.http("POST", f"{API}/containers/{answer.json['Id']}/start")
        assert (answer.status, answer.json["message"]) == (status, text)


def test_thermal_interrupts_are_masked() -> None:
    """They tell a container of its neighbours' work, as /proc/interrupts does (GHSA-6fw5-f8r9-fgfm)."""
    program = "import glob; glob.glob = lambda text: [text]; import dockerd; print(dockerd.MASKED_PATHS[-1])"
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, check=True, text=True,
                          cwd=os.path.dirname(PROGRAM))
    assert done.stdout == "/sys/devices/system/cpu/cpu[0-9]*/thermal_throttle\n"


def test_sysctls_of_the_host_by_way_of_a_container(host: Host) -> None:
    """What a container joins of another one may be the host's own."""
    started(host, "donor", "sleep", NEVER, HostConfig={"NetworkMode": "host", "IpcMode": "host"})
    for mode, name, text in (
        ("NetworkMode", "net.ipv4.ip_default_ttl", "not allowed in host network namespace"),
        ("IpcMode", "kernel.shmmni", "is not allowed in the hosts ipc namespace"),
    ):  # fmt: skip
        value = read_text("/proc/sys/" + name.replace(".", "/")).strip()
        host.create("true", name=mode, HostConfig={mode: "container:donor", "Sysctls": {name: value}})
        answer = host.api("POST", f"/containers/{mode}/start", status=400)
        assert answer["message"] == f'sysctl "{name}" {text}'


def test_a_start_that_fails_keeps_no_descriptor(host: Host) -> None:
    def notes() -> int:
        assert host.process
        folder = f"/proc/{host.process.pid}/fd/"
        return sum(os.path.realpath(folder + fd).startswith("/memfd:notes") for fd in os.listdir(folder))

    host.create("true", name="donor")
    host.create("true", name="one", HostConfig={"NetworkMode": "container:donor"})
    before = notes()
    assert "non running" in host.api("POST", "/containers/one/start", status=500)["message"]
    assert notes() == before


def test_an_init_of_the_host_or_our_own(new_host: Callable[..., Host], busybox: bytes) -> None:
    ours = new_host("--init", "--init-path", "/nonexistent")
    host = new_host(environment={"PATH": f"{PEER}/usr/bin:{PATH}"})
    for daemon in (ours, host):
        daemon.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    code, printed = host.run("cat", "/proc/1/cmdline", HostConfig={"Init": True})
    assert (code, printed) == (0, b"/sbin/docker-init\0--\0cat\0/proc/1/cmdline\0")
    orphan = "sh -c 'sleep 0 & exec sleep 0.2' & wait; while ps -o stat | grep -q Z; do sleep 0.02; done"
    cases = (("exit 7", 7, b""), ("kill -9 $$", 137, b""), (orphan, 0, b""),
             ("grep -c CapEff:.*a80425fb /proc/1/status", 0, b"1\n"))
    looping = "trap 'echo got; exit 5' USR1; echo up; while :; do sleep 0.05; done"
    for daemon, config in ((host, {"HostConfig": {"Init": True}}), (ours, {"HostConfig": {}})):
        for script, wanted, text in cases:
            assert daemon.run("sh", "-c", script, **config) == (wanted, text), script
        name = daemon.create("sh", "-c", looping, **config)  # type: ignore[arg-type]
        daemon.api("POST", f"/containers/{name}/start")
        logs = functools.partial(daemon.api, "GET", f"/containers/{name}/logs?stdout=1")
        wait_for(lambda logs=logs: b"up" in logs())  # type: ignore[misc]
        children = "/proc/{0}/task/{0}/children".format(daemon.inspect(name)["State"]["Pid"])
        assert len(read_text(children).split()) == 1
        daemon.api("POST", f"/containers/{name}/kill?signal=USR1")
        assert daemon.api("POST", f"/containers/{name}/wait")["StatusCode"] == 5
        assert daemon.run("sh", "-c", "echo tty > /dev/tty; exit 3", Tty=True, **config) == (3, b"tty\r\n")
        identity = daemon.create("nosuch", **config)  # type: ignore[arg-type]
        answer = daemon.http("POST", f"{API}/containers/{identity}/start")
        assert answer.status == (204 if daemon is host else 400), answer  # the host's starts, and fails
    assert ours.run("sh", "-c", "echo $$", HostConfig={"Init": False})[1] == b"1\n"


# (what changes, the answer's status and message; "" for an update that is taken) of a container with a memory
# limit of 64 MB and a memory and swap limit of 128 MB, each as dockerd 20.10.24 answers it
UPDATES: list[tuple[dict[str, Any], int, str]] = [
    ({}, 200, ""), ({"Memory": 4 << 20}, 400, "Minimum memory limit allowed is 6MB"),
    ({"Memory": -1}, 400, "Minimum memory limit allowed is 6MB"),
    ({"Memory": 256 << 20}, 409, "Cannot update container ID: Memory limit should be smaller than already "
     "set memoryswap limit, update the memoryswap at the same time"),
    ({"Memory": 64 << 20, "MemorySwap": 32 << 20}, 400,
     "Minimum memoryswap limit should be larger than memory limit, see usage"),
    ({"Memory": 96 << 20, "MemoryReservation": 32 << 20, "MemorySwap": 192 << 20}, 200, ""),
    ({"MemoryReservation": 1000}, 400, "Minimum memory reservation allowed is 6MB"),
    ({"NanoCpus": 10**15}, 400,
     "Range of CPUs is from 0.01 to {cpus}.00, as there are only {cpus} CPUs available"),
    ({"NanoCpus": 10**9}, 200, ""),
    ({"CpuQuota": 50000}, 409, "Cannot update container ID: Conflicting options: CPU Quota cannot be "
     "updated as NanoCPUs has already been set"),
    ({"CpuShares": 512, "CpusetCpus": "0", "CpusetMems": "0", "PidsLimit": 33}, 200, ""),
    ({"CpusetCpus": "0,999"}, 400, "Requested CPUs are not available - requested 0,999, available: {online}"),
    ({"CpusetCpus": "x"}, 400, "Invalid value x for cpuset cpus: invalid format: x"),
    ({"RestartPolicy": {"Name": "bogus"}}, 400, "invalid restart policy 'bogus'"),
    ({"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}, 200, ""),
    ({"CpuRealtimePeriod": 1000, "CpuRealtimeRuntime": 2000}, 400,
     "cpu real-time runtime cannot be higher than cpu real-time period"),
    ({"PidsLimit": -1}, 200, ""),
]


def test_update_changes_what_the_kernel_enforces(host: Host) -> None:
    resources = {"Memory": 64 << 20, "MemorySwap": 128 << 20}
    identity = host.create("sleep", NEVER, name="changing", HostConfig=resources)
    host.api("POST", "/containers/changing/start")
    facts = {"cpus": os.cpu_count(), "online": read_text("/sys/devices/system/cpu/online").strip()}
    for change, status, text in UPDATES:
        answer = host.http("POST", f"{API}/containers/changing/update", change)
        message = text.format_map(facts).replace("ID", identity)
        assert answer.status == status, (change, answer)
        assert answer.json == dict([("message", message) if text else ("Warnings", None)]), change
    directories = [directory for directory in host.cgroups() if directory.endswith(identity)]
    for names, values in (
        (("memory.limit_in_bytes", "memory.max"), {str(96 << 20)}),
        (("memory.memsw.limit_in_bytes", "memory.swap.max"), {str(192 << 20), str(96 << 20)}),
        (("memory.soft_limit_in_bytes", "memory.low"), {str(32 << 20)}),
        (("cpu.cfs_quota_us", "cpu.max"), {"100000", "100000 100000"}),
        (("cpu.shares", "cpu.weight"), {"512", "20", "59"}), (("cpuset.cpus",), {"0"}),
        (("pids.max",), {"max"}),
    ):
        found = {read_text(f"{directory}/{name}").strip() for directory in directories for name in names}
        assert found - {""} and found - {""} <= values, (names, found)
    config = host.inspect("changing")["HostConfig"]
    assert (config["NanoCpus"], config["MemorySwap"], config["PidsLimit"]) == (10**9, 192 << 20, 0)
    assert config["RestartPolicy"] == {"Name": "on-failure", "MaximumRetryCount": 3}
    wrong = {"MemorySwap": 64 << 20, "CpuShares": 9}
    refused = host.http("POST", f"{API}/containers/changing/update", wrong)
    assert refused.status == 500 and "Invalid argument" in refused.json["message"]  # less than Memory
    assert host.inspect("changing")["HostConfig"] == config
    host.api("POST", "/containers/changing/update", {"RestartPolicy": {"Name": "no"}, "CpuQuota": -1})
    found = {read_text(f"{directory}/{name}").strip() for directory in directories
             for name in ("cpu.cfs_quota_us", "cpu.max")}
    assert found & {"-1", "max 100000"} and found <= {"-1", "max 100000", ""}


def test_update_of_what_removes_itself(host: Host) -> None:
    identity = host.create("true", name="own", HostConfig={"AutoRemove": True})
    answer = host.http("POST", f"{API}/containers/own/update", {"RestartPolicy": {"Name": "always"}})
    assert answer.status == 409 and answer.json["message"] == (
        f"Cannot update container {identity}: Restart policy cannot be updated because AutoRemove is "
        "enabled for the container")


def test_cli_update_and_stats(docker: Docker) -> None:
    docker("run", "-d", "--name", "seen", *NONE, "-m", "64m", "busybox", "sleep", NEVER)
    assert docker("update", "--memory", "32m", "--memory-swap", "32m", "--cpus", "0.5", "seen") == "seen"
    assert docker("stats", "--no-stream", "--format", "{{.Name}} {{.MemUsage}} {{.PIDs}}", "seen").endswith(
        "/ 32MiB 1")


def test_cli_users_and_directories(docker: Docker) -> None:
    run = ("run", "--rm", *NONE)
    assert (
        docker(*run, "-u", "bob", "busybox", "id")
        == "uid=1000(bob) gid=1000(bob) groups=1(daemon),10(wheel),100(users),1000(bob)"
    )
    assert (
        docker(*run, "-u", "12:34", "--group-add", "wheel", "busybox", "id")
        == "uid=12 gid=34 groups=10(wheel),34"
    )
    assert docker(*run, "-w", "/new/place", "busybox", "pwd") == "/new/place"
    assert docker(*run, "-u", "bob", "-e", "A=1", "-h", "box", "busybox", "env").splitlines() == [
        f"PATH={PATH}",
        "HOSTNAME=box",
        "A=1",
        "HOME=/home/bob",
    ]
    assert (
        docker(
            *run,
            "--cap-drop",
            "ALL",
            "--cap-add",
            "NET_RAW",
            "busybox",
            "grep",
            "CapEff",
            "/proc/self/status",
        )
        == "CapEff:\t0000000000002000"
    )
    assert "Read-only" in docker.run(*run, "--read-only", "busybox", "touch", "/x", status=1).stderr
    assert (
        docker(*run, "--security-opt", "no-new-privileges", "busybox", "grep", "NoNew", "/proc/self/status")
        == "NoNewPrivs:\t1"
    )
    assert docker(*run, "--entrypoint", "/bin/script", "busybox", "a", "b") == "script: a b"


def test_cli_privileged(docker: Docker) -> None:
    """As much as the daemon itself has: all its capabilities, no filter, nothing masked."""
    script = "grep -E 'CapEff|Seccomp:' /proc/self/status; test -w /proc/sys/kernel/hostname && echo writable"
    found = docker("run", "--rm", "--privileged", *NONE, "busybox", "sh", "-c", script).split()
    own = re.search(r"CapBnd:\s*(\w+)", read_text("/proc/self/status"))
    assert own and found == ["CapEff:", own.group(1), "Seccomp:", "0", "writable"]


def test_docker_py(host: Host) -> None:
    """The Python SDK: containers, images, streams, attach, wait, and its exceptions."""
    client = docker_py.DockerClient(base_url=host.url, version="auto", timeout=30)
    with contextlib.closing(client):
        assert client.ping() and client.version()["ApiVersion"] == API[2:]
        assert client.info()["Driver"] == "overlay2"
        none: dict[str, Any] = {"network_mode": "none"}
        assert client.containers.run("busybox", "echo hello", remove=True, **none) == b"hello\n"
        with pytest.raises(docker_py.errors.ContainerError) as failed:
            client.containers.run(
                "busybox", ["sh", "-c", "echo bad >&2; exit 3"], remove=True, stderr=True, **none
            )
        assert failed.value.exit_status == 3 and failed.value.stderr == b"bad\n"
        with pytest.raises(docker_py.errors.ImageNotFound):
            client.containers.create("nosuch", **none)
        container = client.containers.run(
            "busybox",
            ["sh", "-c", "echo up; exec sleep 1000"],
            detach=True,
            name="py",
            labels={"a": "b"},
            **none,
        )
        assert next(container.logs(stream=True, follow=True)) == b"up\n"
        assert [found.name for found in client.containers.list(filters={"label": "a=b"})] == ["py"]
        container.stop(timeout=0)
        assert container.wait()["StatusCode"] == 137
        container.reload()
        assert container.status == "exited" and container.attrs["State"]["ExitCode"] == 137
        container.remove()
        with pytest.raises(docker_py.errors.NotFound):
            client.containers.get("py")
        image = client.images.get("busybox")
        assert image.tag("other", "tag") and "other:tag" in client.images.get("busybox").tags
        client.images.remove("other:tag")
        assert [entry["Size"] for entry in image.history()]


def test_docker_py_lifecycle(host: Host) -> None:
    client = docker_py.DockerClient(base_url=host.url, version="auto", timeout=30)
    with contextlib.closing(client):
        container = client.containers.create("busybox", ["sleep", NEVER], network_mode="none", name="one",
                                             restart_policy={"Name": "always"}, labels={"a": "b"})
        policy = {"Name": "on-failure", "MaximumRetryCount": 5}
        container.update(restart_policy=policy)
        container.start()
        assert container.top()["Titles"][:2] == ["UID", "PID"]
        container.pause()
        assert client.containers.list(filters={"status": "paused"}) == [container]
        container.unpause()
        container.rename("two")
        container.restart(timeout=0)
        container.reload()
        assert (container.name, container.status) == ("two", "running")
        assert container.attrs["HostConfig"]["RestartPolicy"] == policy
        container.kill()
        assert container.wait()["StatusCode"] == 137
        assert client.containers.prune({"label": ["a=b"]})["ContainersDeleted"] == [container.id]


def test_docker_py_attach_socket(host: Host) -> None:
    client = docker_py.APIClient(base_url=host.url, version="auto", timeout=30)
    with contextlib.closing(client):
        config = client.create_host_config(network_mode="none")
        container = client.create_container("busybox", ["cat"], stdin_open=True, host_config=config)
        stream = client.attach_socket(container, params={"stdin": 1, "stdout": 1, "stream": 1})
        client.start(container)
        stream._sock.sendall(b"through\n")
        assert stream._sock.recv(8, 0x100) == b"\x01\0\0\0\0\0\0\x08"  # MSG_WAITALL
        assert stream._sock.recv(8, 0x100) == b"through\n"
        stream._response.close()
        stream.close()


# What Docker 1.2.0 answered, by its own documentation of API v1.14: the keys that its clients read.
V14_CONTAINER = {
    "Id": str,
    "Names": list,
    "Image": str,
    "Command": str,
    "Created": int,
    "Status": str,
    "Ports": list,
}
V14_INSPECT = {
    "Id": str,
    "Created": str,
    "Path": str,
    "Args": list,
    "Config": dict,
    "State": dict,
    "Image": str,
    "NetworkSettings": dict,
    "ResolvConfPath": str,
    "HostnamePath": str,
    "HostsPath": str,
    "Name": str,
    "Driver": str,
    "ExecDriver": str,
    "MountLabel": str,
    "ProcessLabel": str,
    "Volumes": dict,
    "VolumesRW": dict,
    "HostConfig": dict,
}
V14_STATE = {
    "Running": bool,
    "Paused": bool,
    "Pid": int,
    "ExitCode": int,
    "StartedAt": str,
    "FinishedAt": str,
}
V14_IMAGE = {"RepoTags": list, "Id": str, "Created": int, "Size": int, "VirtualSize": int, "ParentId": str}
V14_INFO = {
    "Containers": int,
    "Images": int,
    "Driver": str,
    "DriverStatus": list,
    "ExecutionDriver": str,
    "KernelVersion": str,
    "Debug": int,
    "NFd": int,
    "NGoroutines": int,
    "NEventsListener": int,
    "InitPath": str,
    "IndexServerAddress": str,
    "MemoryLimit": int,
    "SwapLimit": int,
    "IPv4Forwarding": int,
    "OperatingSystem": str,
}
V14_VERSION = {
    "Version": str,
    "ApiVersion": str,
    "GitCommit": str,
    "GoVersion": str,
    "Os": str,
    "Arch": str,
    "KernelVersion": str,
}


def assert_shape(value: dict[str, Any], shape: dict[str, Any]) -> None:
    """Each key of `shape` is in `value` with a value of its very type."""
    found = {key: type(value[key]) if key in value else None for key in shape}
    assert found == shape, value


def test_raw_oldest_api(host: Host) -> None:
    """Docker 1.2.0's way of life on v1.14: create, start with a host configuration, wait, logs, inspect."""
    old = "/v1.14"
    body = {
        "Image": "busybox",
        "Cmd": ["sh", "-c", "echo old; exit 2"],
        "Hostname": "old",
        "Tty": False,
        "AttachStdout": True,
        "Memory": 0,
        "NetworkDisabled": True,
    }
    created = host.http("POST", f"{old}/containers/create?name=old", body)
    assert created.status == 201 and set(created.json) == {"Id", "Warnings"}
    identity = created.json["Id"]
    started = host.http(
        "POST",
        f"{old}/containers/{identity}/start",
        {"Binds": None, "NetworkMode": "none", "RestartPolicy": {"Name": "", "MaximumRetryCount": 0}},
    )
    assert started.status == 204
    assert host.http("POST", f"{old}/containers/{identity}/wait").json == {"StatusCode": 2}
    logs = host.http("GET", f"{old}/containers/{identity}/logs?stdout=1&stderr=1")
    assert frames(logs.body) == [(1, b"old\n")]
    listed = host.http("GET", f"{old}/containers/json?all=1").json[0]
    assert_shape(listed, V14_CONTAINER)
    assert (listed["Names"], listed["Command"]) == (["/old"], "sh -c 'echo old; exit 2'")
    inspected = host.http("GET", f"{old}/containers/{identity}/json").json
    assert_shape(inspected, V14_INSPECT)
    assert_shape(inspected["State"], V14_STATE)
    assert inspected["Config"]["Hostname"] == "old" and inspected["Config"]["NetworkDisabled"] is True
    assert_shape(host.http("GET", f"{old}/images/json").json[0], V14_IMAGE)
    assert_shape(host.http("GET", f"{old}/info").json, V14_INFO)
    assert_shape(host.http("GET", f"{old}/version").json, V14_VERSION)
    missing = host.http("GET", f"{old}/containers/nobody/json")
    assert (missing.status, missing.body.strip()) == (404, b"No such container: nobody")
    assert missing.headers["Content-Type"].startswith("text/plain")
    assert host.http("DELETE", f"{old}/containers/{identity}").status == 204


def test_raw_newest_api(host: Host) -> None:
    """The shapes of today on v1.51, as the published specification has them."""
    identity = host.create("sh", "-c", "echo new; exit 2", name="new")
    assert host.http("POST", f"{API}/containers/{identity}/start").status == 204
    assert host.api("POST", f"/containers/{identity}/wait")["StatusCode"] == 2
    logs = host.http("GET", f"{API}/containers/{identity}/logs?stdout=1")
    assert logs.headers["Content-Type"] == "application/vnd.docker.multiplexed-stream"
    assert frames(logs.body) == [(1, b"new\n")]
    listed = host.api("GET", "/containers/json?all=1")[0]
    assert_shape(
        listed,
        {
            "Id": str,
            "Names": list,
            "Image": str,
            "ImageID": str,
            "Command": str,
            "Created": int,
            "Ports": list,
            "Labels": dict,
            "State": str,
            "Status": str,
            "HostConfig": dict,
            "NetworkSettings": dict,
            "Mounts": list,
        },
    )
    assert listed["State"] == "exited" and listed["Status"].startswith("Exited (2)")
    inspected = host.inspect(identity)
    assert_shape(
        inspected,
        {
            "Id": str,
            "Created": str,
            "Path": str,
            "Args": list,
            "State": dict,
            "Image": str,
            "Name": str,
            "RestartCount": int,
            "Driver": str,
            "Platform": str,
            "HostConfig": dict,
            "GraphDriver": dict,
            "Mounts": list,
            "Config": dict,
            "NetworkSettings": dict,
        },
    )
    assert not {"ID", "Volumes", "VolumesRW", "ExecDriver"} & set(inspected)
    image = host.api("GET", "/images/json")[0]
    assert "VirtualSize" not in image and image["ParentId"] == ""
    missing = host.http("GET", f"{API}/containers/nobody/json")
    assert (missing.status, missing.json) == (404, {"message": "No such container: nobody"})
    assert host.http("GET", f"{API}/info").json["Containers"] == 1


def test_raw_stop_kill_start_again(host: Host) -> None:
    """The status codes that clients rely on to know what was so already."""
    identity = host.create("sleep", NEVER)
    call = f"{API}/containers/{identity}"
    assert host.http("POST", f"{call}/stop").status == 304
    assert host.http("POST", f"{call}/kill").status == 409
    assert host.http("POST", f"{call}/start").status == 204
    assert host.http("POST", f"{call}/start").status == 304
    assert host.http("DELETE", call).status == 409
    assert host.http("POST", f"{call}/stop?t=0").status == 204
    assert host.http("POST", f"{call}/stop?t=0").status == 304
    assert host.http("DELETE", call).status == 204
    assert host.http("DELETE", call).status == 404


def test_raw_wait_answers_its_headers_at_once(host: Host) -> None:
    identity = host.create("sleep", NEVER)
    waiting = host.hijack(f"{API}/containers/{identity}/wait?condition=next-exit", upgrade=False)
    assert waiting.status == 200
    host.api("POST", f"/containers/{identity}/start")
    host.api("POST", f"/containers/{identity}/kill")
    assert b'"StatusCode":137' in waiting.read_until(b"}").replace(b" ", b"")
    waiting.close()


def test_who_gives_up_waiting_waits_for_no_lock() -> None:
    """One thread watches all clients: it must not wait until a container has been started.  And a client that
    does not read its headers keeps nobody from the container."""
    engine, container = Engine(), dockerd.Container.__new__(dockerd.Container)
    container.changed = threading.Condition()
    container.lock = container.changed  # type: ignore[assignment]
    container.state = dockerd.State()
    container.state.running = True
    container.parts = types.SimpleNamespace(background=dockerd.Workers(1).submit)  # type: ignore[assignment]
    job, ready = engine.job("wait"), threading.Event()

    def send_headers(facts: Any) -> None:
        other = threading.Thread(target=container._notify, daemon=True)
        other.start()
        other.join(10)
        if not other.is_alive():
            ready.set()

    def wait() -> None:
        with pytest.raises(dockerd.Unavailable):  # no exit code
            container.wait(job, "")
        given_up.set()

    job.on_ready, container.id, given_up = send_headers, "id", threading.Event()
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert ready.wait(20)
    with container.lock:
        cancel = threading.Thread(target=job.cancel, daemon=True)
        cancel.start()
        cancel.join(20)
        assert not cancel.is_alive()
    waiting.join()
    assert given_up.is_set()


def test_a_host_config_may_come_with_the_start(host: Host, peer: Host, tmp_path: Path) -> None:
    """As clients of Docker 1.2.0 send it, which give create none; as the real daemon takes it."""
    (tmp_path / "file").write_text("bound\n")
    answers = []
    for daemon in (host, peer):
        script = "cat /data/file; ls /kept; grep ^CapBnd /proc/self/status; touch /data/x"
        body = {"Image": "busybox", "Cmd": ["sh", "-c", script], "Volumes": {"/kept": {}}}
        identity = daemon.http("POST", "/v1.14/containers/create", body).json["Id"]
        config = {"Binds": [f"{tmp_path}:/data:ro"], "NetworkMode": "none", "CapDrop": ["ALL"]}
        assert daemon.http("POST", f"/v1.14/containers/{identity}/start", config).status == 204
        daemon.http("POST", f"/v1.41/containers/{identity}/wait")
        shown = daemon.http("GET", f"/v1.41/containers/{identity}/json").json
        answers.append((
            daemon.http("GET", f"/v1.41/containers/{identity}/logs?stdout=1").body,
            sorted((mount["Type"], mount["Destination"], mount["RW"]) for mount in shown["Mounts"]),
            list(shown["NetworkSettings"]["Networks"]), shown["HostConfig"]["Binds"],
            shown["State"]["ExitCode"]))
        assert daemon.http("POST", f"/v1.14/containers/{identity}/start", {"Links": ["nosuch"]}).status == 400
        assert daemon.http("DELETE", f"/v1.41/containers/{identity}?v=1").status == 204
    assert answers[0] == answers[1] and b"bound\n" in answers[0][0] and answers[0][4] == 1


def test_copies_of_docker_1_2(host: Host, peer: Host) -> None:
    """Before API 1.20 `docker cp` was a request of its own, which the real daemon still answers; a directory
    came under its name."""
    answers: list[tuple[Any, ...]] = []
    for daemon in (host, peer):
        daemon.http("POST", "/v1.41/containers/create?name=old", {
            "Image": "busybox", "Cmd": ["true"], "HostConfig": {"NetworkMode": "none"}})
        path, begun = "containers/old/copy", time.time()
        taken = daemon.http("POST", f"/v1.14/{path}", {"Resource": "etc/passwd"})
        answers.append((
            taken.status, taken.headers["Content-Type"],
            tarfile.open(fileobj=io.BytesIO(taken.body)).getnames(),
            daemon.http("POST", f"/v1.14/{path}", {"Resource": ""}).status,
            daemon.http("POST", f"/v1.24/{path}", {"Resource": "/etc"}).status,
            daemon.http("POST", f"/v1.14/{path}", {"Resource": "/nosuch"}).status))
        until = urllib.parse.quote(json.dumps({"container": ["old"], "event": ["copy", "archive-path"]}))
        told = daemon.http("GET", f"/v1.41/events?since={begun:.6f}&until={time.time():.6f}&filters={until}")
        answers[-1] += tuple(event["Action"] for event in told.lines),
        if daemon is host:
            taken = daemon.http("POST", f"/v1.14/{path}", {"Resource": "/etc"})
            assert "etc/passwd" in tarfile.open(fileobj=io.BytesIO(taken.body)).getnames()
        daemon.http("DELETE", "/v1.41/containers/old")
    assert answers[0] == answers[1] and answers[0][-1] == ("copy",)


def test_raw_wait_for_removal(host: Host) -> None:
    identity = host.create("sh", "-c", "exit 3", HostConfig={"AutoRemove": True})
    waiting = host.hijack(f"{API}/containers/{identity}/wait?condition=removed", upgrade=False)
    host.api("POST", f"/containers/{identity}/start")
    assert b'"StatusCode":3' in waiting.read_until(b"}").replace(b" ", b"")
    waiting.close()
    assert host.http("GET", f"{API}/containers/{identity}/json").status == 404


def test_raw_attach_keeps_what_came_with_the_request(host: Host) -> None:
    """Bytes sent together with the request's head reach the container; a half-close ends its stdin."""
    identity = host.create("cat", OpenStdin=True, StdinOnce=True, AttachStdin=True)
    stream = host.hijack(f"{API}/containers/{identity}/attach?stdin=1&stdout=1&stderr=1&stream=1")
    assert stream.status == 101 and b"\r\nUpgrade: tcp" in stream.head
    host.api("POST", f"/containers/{identity}/start")
    stream.send(b"early\n")
    assert frames(stream.read_until(b"early\n")) == [(1, b"early\n")]
    stream.close_write()
    assert stream.read_all() == b""
    stream.close()
    assert host.api("POST", f"/containers/{identity}/wait")["StatusCode"] == 0


def test_raw_attach_without_upgrade(host: Host) -> None:
    identity = host.create("sh", "-c", "echo out; echo err >&2")
    stream = host.hijack(f"{API}/containers/{identity}/attach?stdout=1&stderr=1&stream=1", upgrade=False)
    assert stream.status == 200 and b"application/vnd.docker.raw-stream" in stream.head
    host.api("POST", f"/containers/{identity}/start")
    assert demultiplex(stream.read_all()) == (b"out\n", b"err\n")
    stream.close()
    again = host.hijack(f"{API}/containers/{identity}/attach?stdout=1&stderr=1&logs=1")
    assert demultiplex(again.read_all()) == (b"out\n", b"err\n")
    again.close()


def test_attached_logs_miss_nothing(host: Host) -> None:
    """attach with logs and stream while the container writes: each line once, in order."""
    script = "i=0; while [ $i -lt 3000 ]; do echo $i; i=$((i+1)); done; read x"
    identity = host.create("sh", "-c", script, OpenStdin=True)
    host.api("POST", f"/containers/{identity}/start")
    streams = [host.hijack(f"{API}/containers/{identity}/attach?stdout=1&logs=1&stream=1") for _ in range(3)]
    for stream in streams:
        text, _ = demultiplex(stream.read_until(b"2999\n"))
        assert text.split() == [b"%d" % number for number in range(3000)]
        stream.close()
    with contextlib.closing(host.hijack(f"{API}/containers/{identity}/attach?stdout=1&logs=1")) as stream:
        assert all(data for _, data in frames(stream.read_all()))  # no client knows an empty frame


class Execs:
    """A running container, and exec instances in it through the raw API."""

    def __init__(self, host: Host, *command: str, **config: Any) -> None:
        self.host = host
        self.id = host.create(*(command or ("sleep", NEVER)), **config)
        host.api("POST", f"/containers/{self.id}/start")

    def create(self, *command: str, **config: Any) -> str:
        """Make an instance with all streams but stdin attached; returns its id."""
        body = {"Cmd": list(command), "AttachStdout": True, "AttachStderr": True, **config}
        return str(self.host.api("POST", f"/containers/{self.id}/exec", body, 201)["Id"])

    def start(self, identity: str, **check: Any) -> Hijacked:
        """Start an instance on a hijacked connection."""
        return self.host.hijack(f"{API}/exec/{identity}/start", body=json.dumps(check).encode())

    def run(self, *command: str, **config: Any) -> tuple[bytes, bytes]:
        """What a command writes to stdout and stderr."""
        with contextlib.closing(self.start(self.create(*command, **config))) as stream:
            return demultiplex(stream.read_all())

    def inspect(self, identity: str) -> Any:
        """GET /exec/ID/json."""
        return self.host.api("GET", f"/exec/{identity}/json")


def test_exec_life_events_and_conflicts(host: Host) -> None:
    """The shapes, events, conflicts and end of exec instances, as the real dockerd has them."""
    box = Execs(host, User="bob")
    since = time.time()
    identity = box.create("sh", "-c", "exit 5", DetachKeys="q")
    shown = {
        "ID": identity, "Running": False, "ExitCode": None, "OpenStdin": False, "OpenStderr": True,
        "ProcessConfig": {"tty": False, "entrypoint": "sh", "arguments": ["-c", "exit 5"],
                          "privileged": False, "user": "bob"},
        "OpenStdout": True, "CanRemove": False, "ContainerID": box.id, "DetachKeys": "cQ==", "Pid": 0,
    }  # fmt: skip
    assert box.inspect(identity) == shown and host.inspect(box.id)["ExecIDs"] == [identity]
    with contextlib.closing(box.start(identity)) as stream:
        assert stream.status == 101 and stream.read_all() == b""
    ended = box.inspect(identity)
    assert ended.pop("Pid") > 0 and ended == {key: value for key, value in shown.items() if key != "Pid"} | {
        "ExitCode": 5}  # fmt: skip
    assert host.inspect(box.id)["ExecIDs"] is None
    again = host.api("POST", f"/exec/{identity}/start", {"Detach": True}, 409)
    assert again["message"] == f"Error: Exec command {identity} has already run"
    running, fresh = box.create("sleep", NEVER), box.create("true")
    assert host.api("POST", f"/exec/{running}/start", {"Detach": True}, 200) == b""
    with contextlib.closing(box.start(running)) as stream:
        told = f"Error: Exec command {running} is already running\r\n".encode()
        assert frames(stream.read_all()) == [(1, told)]
    for method, path, body in (("GET", "json", None), ("POST", "start", {}), ("POST", "resize?h=1&w=1", {})):
        answer = host.api(method, f"/exec/{identity[:12]}/{path}", body, 404)
        assert answer["message"] == f"No such exec instance: {identity[:12]}"
    pid = box.inspect(running)["Pid"]
    host.api("POST", f"/containers/{box.id}/kill")
    assert not os.path.exists(f"/proc/{pid}") and box.inspect(running)["ExitCode"] == 137
    host.api("POST", f"/exec/{fresh}/start", {"Detach": True}, 404)
    host.api("POST", f"/containers/{box.id}/exec", {"Cmd": ["true"]}, 409)
    assert host.api("POST", f"/containers/{box.id}/exec", {}, 400)["message"] == "No exec command specified"
    path = f"/events?since={since}&until={time.time()}&filters=" + json.dumps({"container": [box.id]})
    lines = host.http("GET", API + path.replace('"', "%22").replace(" ", "")).lines
    events = [(line["Action"], line["Actor"]["Attributes"].get("execID"),
               line["Actor"]["Attributes"].get("exitCode")) for line in lines]  # fmt: skip
    assert events == [
        ("exec_create: sh -c exit 5", identity, None), ("exec_start: sh -c exit 5", identity, None),
        ("exec_die", identity, "5"), (f"exec_create: sleep {NEVER}", running, None),
        ("exec_create: true ", fresh, None), (f"exec_start: sleep {NEVER}", running, None),
        ("kill", None, None), ("exec_die", running, "137"), ("die", None, "137"),
    ]  # fmt: skip


def test_no_output_comes_with_the_head_of_an_exec(host: Host) -> None:
    """docker-py reads the head through a buffer and the rest past it: what comes with it is lost."""
    box = Execs(host)
    for command, config in (("true", {"User": "nosuch"}), ("echo", {}), ("nosuch", {})):
        with contextlib.closing(socket.socket(socket.AF_UNIX)) as client:
            identity = box.create(command, **config)
            client.connect(host.socket)
            client.sendall(f"POST {API}/exec/{identity}/start HTTP/1.1\r\nHost: x\r\nContent-Length: 2\r\n"
                           "Content-Type: application/json\r\n\r\n{}".encode())
            wait_for(lambda: box.inspect(identity)["ExitCode"] is not None)  # noqa: B023
            assert client.recv(8192).endswith(b"\r\n\r\n") and client.recv(8192)


def test_execs_end_before_their_container(host: Host) -> None:
    """Listeners hear of the end of an exec, whose output is still to be read, before the container's."""
    for _ in range(3):
        box = Execs(host)
        since = time.time()
        with contextlib.ExitStack() as opened:
            for _ in range(2):
                stream = opened.enter_context(contextlib.closing(box.start(box.create("yes"))))
                stream.read_until(b"y\n")
            host.api("POST", f"/containers/{box.id}/kill")
            filters = urllib.parse.quote(json.dumps({"container": [box.id], "event": ["exec_die", "die"]}))
            path = f"{API}/events?since={since}&until={time.time()}&filters={filters}"
        assert [line["Action"] for line in host.http("GET", path).lines] == ["exec_die", "exec_die", "die"]


def test_exec_is_confined_as_its_container_is(host: Host) -> None:
    """Namespaces, cgroups, capabilities, limits, filter and score are the container's, seen from the host."""
    box = Execs(host, User="bob", HostConfig={"CapDrop": ["ALL"], "CapAdd": ["CHOWN"], "OomScoreAdj": 500,
                "SecurityOpt": ["no-new-privileges"],
                "Ulimits": [{"Name": "nofile", "Soft": 100, "Hard": 200}]})  # fmt: skip
    identity = box.create("sleep", NEVER)
    host.api("POST", f"/exec/{identity}/start", {"Detach": True})
    pid, init = box.inspect(identity)["Pid"], host.inspect(box.id)["State"]["Pid"]
    for name in ("cgroup", "oom_score_adj", "limits", "loginuid"):
        assert read_text(f"/proc/{pid}/{name}") == read_text(f"/proc/{init}/{name}")
    for name in os.listdir(f"/proc/{init}/ns"):
        assert os.readlink(f"/proc/{pid}/ns/{name}") == os.readlink(f"/proc/{init}/ns/{name}")
    pattern = re.compile("^(?:Cap|NoNewPrivs|Seccomp:|Groups|[UG]id|Sig(?:Ign|Blk)).*$", re.MULTILINE)
    lines = [pattern.findall(read_text(f"/proc/{number}/status")) for number in (pid, init)]
    assert lines[0] == lines[1] and len(lines[0]) > 9
    assert [os.readlink(f"/proc/{pid}/fd/{fd}")[:5] for fd in sorted(os.listdir(f"/proc/{pid}/fd"))] == [
        "/dev/", "pipe:", "pipe:"]  # fmt: skip
    capabilities = box.run("grep", "CapBnd", "/proc/self/status", Privileged=True)[0].split()[1]
    ours = read_text("/proc/self/status").partition("CapBnd:")[2].split()[0]
    assert capabilities.decode() == ours
    for error, config in (
        ("unable to find user nosuch: no matching entries in passwd file", {"User": "nosuch"}),
        ('chdir to cwd ("/nosuch") set in config.json failed: no such file or directory: unknown',
         {"WorkingDir": "/nosuch"}),
        ("OCI runtime exec failed: exec failed: Cwd must be an absolute path: unknown", {"WorkingDir": "x"}),
        ("OCI runtime exec failed: exec failed: unable to start container process: environment variable name "
         "can't be empty: \"=x\": unknown", {"Env": ["A=b", "=x"]}),
    ):  # fmt: skip
        assert box.run("true", **config)[0].decode().endswith(error + "\r\n")


def test_exec_streams(host: Host) -> None:
    """Lost and half-closed clients, terminals, sizes, detach keys: what goes on and what ends."""
    box = Execs(host)
    stdin = {"AttachStdin": True}
    with contextlib.closing(box.start(box.create("cat", **stdin))) as stream:
        stream.send(b"there\n")
        assert demultiplex(stream.read_until(b"there\n"))[0] == b"there\n"
        stream.close_write()
        assert stream.read_all() == b""
    lost = box.create("sh", "-c", f"cat; touch /lost; sleep {NEVER}", **stdin)
    box.start(lost).close()  # its stdin ends, it goes on
    wait_for(lambda: box.run("ls", "/lost")[0] == b"/lost\n")
    assert box.inspect(lost)["Running"]
    for words, config in (("true", {"AttachStdout": False, "AttachStderr": False}), ("sleep 1", stdin)):
        with contextlib.closing(box.start(box.create(*words.split(), **config))) as stream:
            stream.close_write()
            assert stream.read_all() == b""
    held = box.create("sh", "-c", f"sleep {NEVER} & echo done")  # something behind holds its output
    with contextlib.closing(box.start(held)) as stream:
        stream.read_until(b"done\n")
        wait_for(lambda: box.inspect(held)["ExitCode"] == 0)
        assert stream.read_all() == b""
    terminal = box.create("sh", Tty=True, **stdin)
    assert host.http("POST", f"{API}/exec/{terminal}/resize?h=33&w=44").status == 200
    with contextlib.closing(box.start(terminal, Tty=True)) as stream:
        stream.send(b"stty size\n")
        stream.read_until(b"33 44\r\n")
        assert host.http("POST", f"{API}/exec/{terminal}/resize?h={'5' * 5000}&w=6").status == 400
        assert host.http("POST", f"{API}/exec/{terminal}/resize?h=65591&w=66").status == 200
        stream.send(b"stty size; echo >&2 err\n")
        stream.read_until(b"55 66\r\nerr\r\n")
        stream.send(b"\x10\x11")
        assert b"\x11" not in stream.read_all()
    assert box.inspect(terminal)["Running"]
    for size, shown in (([7, 8], b"7 8"), ([7], b"7 80"), ([7, 8, 9], b"7 8"), ([65543, 8], b"7 8")):
        sized = box.create("stty", "size", Tty=True, **stdin)
        with contextlib.closing(box.start(sized, Tty=True, ConsoleSize=size)) as stream:
            assert stream.read_all() == shown + b"\r\n"
    assert host.http("POST", f"{API}/exec/{sized}/resize?h=1&w=1").status == 404
    events = host.http("GET", f"{API}/events?since=1&until={time.time()}").lines
    assert [line["Actor"]["Attributes"]["execID"] for line in events if line["Action"] == "exec_detach"] == [
        terminal]  # fmt: skip


def test_execs_and_a_death_at_once(host: Host) -> None:
    """Many instances start while their container is paused, unpaused and killed: each ends, none is left."""
    box = Execs(host)
    codes: list[Any] = []

    def one() -> None:
        for _ in range(6):
            answer = host.http("POST", f"{API}/containers/{box.id}/exec", {"Cmd": ["sleep", NEVER]})
            if answer.status == 201:
                path = f"{API}/exec/{answer.json['Id']}/start"
                codes.append((host.http("POST", path, {"Detach": True}).status, answer.json["Id"]))

    threads = [threading.Thread(target=one) for _ in range(4)]
    for thread in threads:
        thread.start()
    for verb in ("pause", "unpause", "pause", "unpause", "kill"):
        wait_for(lambda: len(codes) > 1)
        host.api("POST", f"/containers/{box.id}/{verb}")
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    assert {status for status, _ in codes} <= {200, 404, 409, 500}
    for _, identity in codes:
        answer = host.http("GET", f"{API}/exec/{identity}/json")
        assert answer.status == 404 or not answer.json["Running"]
    assert host.inspect(box.id)["State"]["Status"] == "exited"
    wait_for(lambda: not [pid for pid in processes() if box.id in read_text(f"/proc/{pid}/cgroup")])


def attachment_of_two() -> Iterator[tuple[dockerd.Attachment, dockerd.Subscriber, socket.socket]]:
    """An attachment with its subscriber, and the client's end of its connection."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.setblocking(False)
        theirs.settimeout(20)
        streams, job = dockerd.Streams(None, None), Engine().job("attach")  # type: ignore[arg-type]
        job.hijacked = dockerd.HijackedStream(
            types.SimpleNamespace(buffer=bytearray(), sock=ours))  # type: ignore[arg-type]
        with contextlib.closing(streams.subscribe({1})) as subscriber:
            yield dockerd.Attachment(streams, job, subscriber, True, b""), subscriber, theirs


def test_no_log_waits_in_memory_for_a_slow_client() -> None:
    for attachment, subscriber, client in attachment_of_two():
        waiting: list[int] = []

        def past() -> Iterator[tuple[int, bytes]]:
            for _ in range(200):
                waiting.append(len(attachment.output))  # noqa: B023
                yield 1, b"x" * 100000
            subscriber.ended = True  # noqa: B023

        running = threading.Thread(target=attachment.run, args=(False, None, past()))
        running.start()
        received = 0
        while received < 200 * 100000:
            received += len(client.recv(1 << 16))
        running.join()
        assert max(waiting) < 1 << 19


def test_a_lost_clients_log_is_closed_at_once(tmp_path: Path) -> None:
    """Wherever it was, and who ever still holds the generator: no rotated file waits for a collection."""
    log = dockerd.FileLog(str(tmp_path / "log"), dockerd.JsonLines, dockerd.json_file_rotation)
    log.open(dockerd.LogInfo({}, "id", "/c", "", "", "", "", {}, []))
    log.write(dockerd.LogRecord(1, 1, b"one\ntwo\n"))
    streams = dockerd.Streams(Mock(), log)

    def opened() -> int:
        return sum(os.readlink(f"/proc/self/fd/{fd}") == log.path for fd in os.listdir("/proc/self/fd")
                   if os.path.islink(f"/proc/self/fd/{fd}"))

    for begun in (False, True):
        subscriber = streams.subscribe({1}, past=True)
        past = subscriber.past()
        assert opened() == 2 and (not begun or next(past) == (1, b"one\n"))
        subscriber.close()
        assert opened() == 1
    log.close()


def test_input_goes_to_no_other_file(tmp_path: Path) -> None:
    """What a client sends while the container ends, and its input's number is given to the next file."""
    for attachment, _, _ in attachment_of_two():
        reader, writer = os.pipe()
        attachment.input += b"for the container"
        attachment.streams.stdin = writer
        with open(tmp_path / "state", "wb") as state:
            with attachment.streams.lock:
                writing = threading.Thread(target=attachment._write_stdin)
                writing.start()
                writing.join(0.2)
                os.dup2(state.fileno(), writer)
                attachment.streams.stdin = -1
            writing.join()
            os.close(writer)
        assert os.read(reader, 100) == b"" and not (tmp_path / "state").read_bytes()
        os.close(reader)


def test_attach_ends_as_docker_ends_it(host: Host) -> None:
    """What the end of a client's input means to the attachment, to others and to the container."""
    script = "while read x; do echo got $x; done; echo eof; read y </dev/zero"
    path = f"{API}/containers/%s/attach?stream=1&stdin=1&stdout=1"
    once = Execs(host, "sh", "-c", script, OpenStdin=True, StdinOnce=True).id
    first, second = (host.hijack(path % once) for _ in range(2))
    first.send(b"one\n")
    assert b"got one" in first.read_until(b"one\n") and b"got one" in second.read_until(b"one\n")
    first.close()
    second.read_until(b"eof\n")  # the first one's end has ended the container's input
    second.close()
    more = Execs(host, "sh", "-c", script, OpenStdin=True).id
    first, second = (host.hijack(path % more) for _ in range(2))
    first.close_write()
    assert first.read_all() == b""  # it is over, the container's input is not
    second.send(b"two\n")
    second.read_until(b"got two\n")
    for stream in (first, second, host.hijack(f"{API}/containers/{more}/attach?stream=1")):
        stream.close_write()
        assert stream.read_all() == b""
        stream.close()
    assert host.inspect(more)["State"]["Running"]


def websocket(host: Host, name: str, query: str, version: str = API, origin: str = "") -> Hijacked:
    """An attachment over a WebSocket, behind the response's head."""
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(host.socket)
    sock.sendall(
        (
            f"GET {version}/containers/{name}/attach/ws?{query} HTTP/1.1\r\nHost: localhost\r\n"
            "Upgrade: websocket\r\nConnection: keep-alive, Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            f"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n{origin and f'Origin: {origin}'}\r\n\r\n"
        )
        .replace("\r\n\r\n\r\n", "\r\n\r\n")
        .encode()
    )
    stream = Hijacked(sock, b"", b"")
    stream.head = stream.read_until(b"\r\n\r\n")
    stream.status = int(stream.head.split()[1])
    return stream


def websocket_frame(opcode: int, data: bytes, final: bool = True, mask: bytes = b"mask") -> bytes:
    """A frame as a client sends it."""
    size = bytes((0x80 | len(data),)) if len(data) < 126 else b"\xfe" + len(data).to_bytes(2, "big") if (
        len(data) < 65536) else b"\xff" + len(data).to_bytes(8, "big")  # fmt: skip
    masked = bytes(byte ^ mask[at % 4] for at, byte in enumerate(data))
    return bytes((final << 7 | opcode,)) + size + mask + masked


@pytest.mark.parametrize("version, opcode", [(API, 0x82), ("/v1.28", 0x82), ("/v1.27", 0x81)])
def test_attach_over_a_websocket(host: Host, version: str, opcode: int) -> None:
    """RFC 6455: accept key, masks, fragments, all lengths, byte by byte too, ping, close."""
    box = Execs(host, "sh", "-c", "stty -echo raw; echo ready; cat", OpenStdin=True, Tty=True)
    wait_for(lambda: b"ready" in host.api("GET", f"/containers/{box.id}/logs?stdout=1"))
    stream = websocket(host, box.id, "stream=1&stdin=1&stdout=1&stderr=1", version)
    assert b"\r\nSec-WebSocket-Accept: s3pPLMBiTxaQ9kYGzzhZRbK+xOo=\r\n" in stream.head
    parts = (websocket_frame(1, b"one", False), websocket_frame(9, b"there?"), websocket_frame(0, b"two"))
    for byte in b"".join(parts):
        stream.send(bytes((byte,)))
    received = b""
    while not received.endswith(b"two"):
        received += stream.sock.recv(1)
    assert b"\x8a\x06there?" in received
    answered = received.replace(b"\x8a\x06there?", b"")
    assert re.sub(bytes((opcode,)) + b".", b"", answered) == b"onetwo"
    for size in (126, 65535, 65536, 200001):
        data = bytes(ord("a") + at % 26 for at in range(size))
        sender = threading.Thread(target=stream.send, args=(websocket_frame(2, data),))
        sender.start()
        got = bytearray()
        while len(got) < size:
            head = stream.sock.recv(2, socket.MSG_WAITALL)
            assert head[0] == opcode
            length = head[1]
            if length == 126:
                length = int.from_bytes(stream.sock.recv(2, socket.MSG_WAITALL), "big")
            got += stream.sock.recv(length, socket.MSG_WAITALL)
        sender.join()
        assert bytes(got) == data
    stream.send(websocket_frame(8, b"\x03\xe9bye"))
    assert stream.read_all() == b"\x88\x02\x03\xe9"
    stream.close()
    logs = websocket(host, box.id, "logs=1&stdout=1", version)
    assert logs.read_all().endswith(b"\x88\x02\x03\xe8")  # the daemon's own end
    logs.close()
    unmasked, unended = b"\x82\x01x", websocket_frame(9, b"", False)
    for bad in (unmasked, unended, websocket_frame(3, b""), websocket_frame(0, b"x")):
        stream = websocket(host, box.id, "stream=1&stdin=1", version)
        stream.send(bad)
        assert stream.read_all() == b"\x88\x02\x03\xea"
        stream.close()
    assert host.inspect(box.id)["State"]["Running"]


def test_websocket_refuses_other_sites(host: Host, new_host: Callable[..., Host], busybox: bytes) -> None:
    """A browser lets any page open a WebSocket: its Origin must be ours, unless CORS is enabled for it."""
    open_host = new_host("--api-enable-cors")
    open_host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    for each, origin, status in (
        (host, "http://localhost", 101), (host, "https://site", 403), (host, "null", 403),
        (host, "http://localhost.site", 403), (open_host, "https://site", 101),
    ):  # fmt: skip
        identity = each.create("true")
        stream = websocket(each, identity, "logs=1", origin=origin)
        assert stream.status == status, origin
        stream.close()
        each.api("DELETE", f"/containers/{identity}")
    assert host.http("GET", f"{API}/containers/nosuch/attach/ws").status == 400
    stream = websocket(host, "nosuch", "logs=1")
    assert stream.status == 404
    stream.close()


def test_a_restart_finds_its_containers(new_host: Callable[..., Host], busybox: bytes) -> None:
    """A clean restart stops what ran and knows everything afterwards: images, names, exit codes, logs."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    running = host.create("sh", "-c", "echo once; exec sleep 1000", name="running")
    host.api("POST", f"/containers/{running}/start")
    ended = host.create("sh", "-c", "exit 7", name="ended")
    host.api("POST", f"/containers/{ended}/start")
    host.api("POST", f"/containers/{ended}/wait")
    fresh = host.create("true", name="fresh")
    wait_for(lambda: frames(host.api("GET", "/containers/running/logs?stdout=1")))
    pid = host.inspect("running")["State"]["Pid"]
    assert host.stop() == 0
    assert not os.path.exists(f"/proc/{pid}")
    assert host.leaks() == []
    host.start()
    states = {name: host.inspect(name)["State"] for name in ("running", "ended", "fresh")}
    assert [host.inspect(name)["Id"] for name in states] == [running, ended, fresh]
    assert {name: (state["Status"], state["Pid"]) for name, state in states.items()} == {
        "running": ("exited", 0),
        "ended": ("exited", 0),
        "fresh": ("created", 0),
    }
    assert states["running"]["ExitCode"] in (137, 143) and states["ended"]["ExitCode"] == 7
    assert frames(host.api("GET", "/containers/running/logs?stdout=1")) == [(1, b"once\n")]
    host.api("POST", "/containers/running/start")
    assert host.inspect("running")["State"]["Running"]


def test_a_crash_leaves_nothing_that_stays(new_host: Callable[..., Host], busybox: bytes) -> None:
    """After kill -9 of the daemon, the next one ends what ran, and clears up behind it."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    for number in range(3):
        identity = host.create("sleep", "1000", name=f"crash{number}", StopTimeout=0)
        host.api("POST", f"/containers/{identity}/start")
    removed = host.create("sleep", "1000", name="removed", StopTimeout=0, HostConfig={"AutoRemove": True})
    host.api("POST", f"/containers/{removed}/start")
    pids = [host.inspect(f"crash{number}")["State"]["Pid"] for number in range(3)]
    host.kill()
    host.start()
    for number, pid in enumerate(pids):
        state = host.inspect(f"crash{number}")["State"]
        assert (state["Status"], state["Running"], state["Pid"]) == ("exited", False, 0)
        assert not os.path.exists(f"/proc/{pid}")
    wait_for(lambda: host.http("GET", f"{API}/containers/removed/json").status == 404)
    assert host.run("echo", "alive") == (0, b"alive\n")


def test_many_at_once(host: Host) -> None:
    """Twenty containers started by twenty clients at once: each has its own output and exit code."""

    def life(number: int) -> tuple[int, bytes]:
        return host.run("sh", "-c", f"echo {number}; exit {number}")

    with concurrent.futures.ThreadPoolExecutor(20) as pool:
        assert list(pool.map(life, range(20))) == [(number, b"%d\n" % number) for number in range(20)]


def test_networks_come_and_go_and_leave_nothing(host: Host) -> None:
    """Each time that a container came to its first user network its resolver's sockets were made anew, and
    those before kept its namespace alive."""
    host.api("POST", "/networks/create", {"Name": "come"})
    started(host, "one", "sleep", NEVER, HostConfig={"NetworkMode": "bridge"})

    def sockets() -> list[int]:
        assert host.process
        folders = [f"/proc/{pid}/fd/" for pid in (host.process.pid, *shims(host))]
        return [sum(os.path.realpath(folder + fd).startswith(folder + "socket:") for fd in os.listdir(folder))
                for folder in folders]

    def come_and_go() -> None:
        host.api("POST", "/networks/come/connect", {"Container": "one"})
        host.api("POST", "/networks/come/disconnect", {"Container": "one"})

    come_and_go()
    # The daemon may not have seen yet that a connection of the calls is over: it counts as one more.
    most = [count + 1 for count in sockets()]
    for _ in range(5):
        come_and_go()
    wait_for(lambda: all(map(operator.le, sockets(), most)), "no more sockets than after the first time")
    host.api("DELETE", "/containers/one?force=1")
    host.api("DELETE", "/networks/come")


def test_the_networks_of_a_new_container(host: Host) -> None:
    """Those that the request has settings for and no other, as many clients give no network mode with them;
    that of the mode is the first."""
    for name in ("some", "other"):
        host.api("POST", "/networks/create", {"Name": name})
    for mode, given, shown in (
            ("", ("some",), ["some"]), ("other", ("some",), ["some"]), ("", (), ["bridge"]),
            ("some", ("other", "some"), ["some", "other"]), ("", ("default",), ["bridge"])):
        made = host.api("POST", "/containers/create", {
            "Image": "busybox", "HostConfig": {"NetworkMode": mode},
            "NetworkingConfig": {"EndpointsConfig": {name: {} for name in given}}})["Id"]
        assert list(host.inspect(made)["NetworkSettings"]["Networks"]) == shown, (mode, given)
        host.api("DELETE", f"/containers/{made}")
    for name in ("some", "other"):
        host.api("DELETE", f"/networks/{name}")


def test_the_first_network_of_a_running_container(host: Host) -> None:
    host.api("POST", "/networks/create", {"Name": "come"})
    since, network = time.time(), urllib.parse.quote('{"type":["network"]}')
    host.create("sleep", NEVER, name="one", HostConfig={"NetworkMode": "bridge"})
    host.api("POST", "/networks/bridge/disconnect", {"Container": "one"})
    told = host.http("GET", f"/events?since={since:.6f}&until={time.time():.6f}&filters={network}").body
    assert [json.loads(line)["Action"] for line in told.splitlines()] == ["disconnect"]
    host.api("POST", "/containers/one/start")
    host.api("POST", "/networks/come/connect", {"Container": "one"})
    pid = host.inspect("one")["State"]["Pid"]
    assert "eth0:" in read_text(f"/proc/{pid}/net/dev")
    assert "127.0.0.11" in read_text(f"/proc/{pid}/root/etc/resolv.conf")
    host.api("DELETE", "/containers/one?force=1")
    host.api("DELETE", "/networks/come")


def test_the_shim_keeps_one_descriptor_of_a_name() -> None:
    with contextlib.ExitStack() as held:
        listener = held.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET))
        shim = dockerd.Shim(listener)
        held.callback(lambda: dockerd.close_fds([signal.set_wakeup_fd(-1), shim.orphans]))
        held.callback(shim.poll.close)
        first, second = (os.open("/dev/null", os.O_RDONLY) for _ in range(2))
        shim.processes["key"] = dockerd.ShimProcess("key", 0, -1, {"console": first})
        fds = {"console": second, "other": os.open("/dev/null", os.O_RDONLY)}
        shim.op_keep({"key": "key"}, fds, {})
        there = [os.path.exists(f"/proc/self/fd/{fd}") for fd in (first, second)]
        assert not fds and there == [False, True]
        answer: dict[str, Any] = {}
        for _ in range(2):  # asked again for want of an answer, which must not look like that of a start
            pidfd = os.pidfd_open(os.getpid())
            shim.op_take({"key": "taken", "pid": os.getpid()}, fds := {"pidfd": pidfd}, answer)
            dockerd.close_fds(fds.values())
        assert shim.processes["taken"].pid == os.getpid() and not answer
        shim.unwatch(shim.processes["taken"].pidfd)
        shim.processes["taken"].close()
        dockerd.close_fds(shim.processes["key"].keep.values())


def test_an_init_killed_before_it_has_a_terminal() -> None:
    """Its process was nobody's: never forgotten, and the shim never ended."""
    driver = dockerd.ExecutionDriver.__new__(dockerd.ExecutionDriver)
    for tty in (False, True):
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        theirs.close()
        process = dockerd.Process("key", None, 1)  # type: ignore[arg-type]
        with ours, (pytest.raises(dockerd.StartError) if tty else contextlib.nullcontext()):
            driver._await_execve(process, ours, "{}", tty)


def test_no_request_ends_the_shim(tmp_path: Path) -> None:
    """All containers depend on it: also where no thread is to be had it answers."""
    def fail(*arguments: Any) -> None:
        raise RuntimeError("can't start new thread")

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, theirs, socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        helper = dockerd.HelperProcess(listener)
        helper.connections[theirs.fileno()], helper.unsent[theirs.fileno()] = theirs, []
        helper.op_fail = fail  # type: ignore[attr-defined]
        ours.send(b'{"op": "fail", "seq": 7}')
        helper._serve(theirs)
        assert json.loads(ours.recv(4096)) == {"seq": 7, "error": "RuntimeError: can't start new thread"}
        helper.poll.close()


def test_many_requests_at_once_do_not_block_the_shim(tmp_path: Path) -> None:
    """The shim, which has one thread, waits until its answers are read, while callers wait for room in the
    socket: 450 starts at once were the end of all starts."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    theirs.settimeout(10)

    def answer() -> None:
        request = json.loads(theirs.recv(65536))
        theirs.send(json.dumps({"seq": request["seq"], "pid": 1}).encode())

    client = dockerd.ShimClient(str(tmp_path), lambda client: None)
    first = threading.Thread(target=answer)
    first.start()
    client._begin(ours)
    first.join()
    callers = [threading.Thread(target=client.call, args=("list",), daemon=True) for _ in range(600)]
    for caller in callers:
        caller.start()
    wait_for(lambda: not select.select([], [ours], [], 0)[1], "the socket to be full")
    for _ in range(2000):
        theirs.send(b'{"seq": 0}')
    for _ in callers:
        answer()
    for caller in callers:
        caller.join()
    theirs.close()
    wait_for(lambda: not client.connected)
    with pytest.raises(DockerError, match="the shim is gone"):
        client.call("list")


def shims(host: Host) -> list[int]:
    """The pids of the host's shims, the oldest first."""
    lines = {pid: read_text(f"/proc/{pid}/cmdline") for pid in processes()}
    return sorted(pid for pid, line in lines.items() if f"{host.exec_root}/shim-" in line)


def log_text(host: Host, name: str) -> bytes:
    """All that the container has printed, as far as its log has it."""
    return b"".join(text for _, text in frames(host.api("GET", f"/containers/{name}/logs?stdout=1&stderr=1")))


UNTIL_TERM = "trap 'exit 42' TERM; echo up; while :; do sleep .05; done"


def started(host: Host, name: str, *command: str, **config: Any) -> int:
    """Start a container of this name; returns its pid."""
    host.create(*command, name=name, **config)
    host.api("POST", f"/containers/{name}/start")
    return int(host.inspect(name)["State"]["Pid"])


def test_a_lost_shim_is_survived(new_host: Callable[..., Host], busybox: bytes) -> None:
    """Without its shim a container runs on under a new one: its end, its exit code and its output are known,
    also by the next daemon, and even when shim and daemon are killed together."""
    host = new_host("--live-restore")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    quiet = "exec >/dev/null 2>&1; trap 'exit 7' TERM; while :; do sleep .05; done"
    pids = [started(host, "running", "sh", "-c", "read x; echo $x; exit 42", OpenStdin=True),
            started(host, "quiet", "sh", "-c", quiet), started(host, "gone", "sleep", "1000")]
    old, = shims(host)
    os.kill(old, signal.SIGKILL)
    wait_for(lambda: "the shim is gone: 3 containers run on without it" in host.log())
    assert host.run("echo", "after")[1] == b"after\n"
    host.stop()
    assert all(os.path.exists(f"/proc/{pid}") for pid in pids)
    host.start()
    stream = host.hijack(f"{API}/containers/running/attach?stdin=1&stdout=1&stream=1")
    stream.send(b"heard\n")
    code = host.api("POST", "/containers/running/wait")["StatusCode"]
    assert code == 42 or code == 255 and not KERNEL_TELLS_EXITS
    stream.close()
    assert log_text(host, "running") == b"heard\n"
    assert ("is not known" in host.inspect("running")["State"]["Error"]) is (code == 255)
    new, = shims(host)
    assert new != old
    os.kill(new, signal.SIGSTOP)  # it is to see nothing of what follows
    host.kill()
    os.kill(new, signal.SIGKILL)
    os.kill(pids[2], signal.SIGKILL)
    wait_for(lambda: not os.path.exists(f"/proc/{pids[2]}"))
    host.start()
    lost = host.inspect("gone")["State"]
    assert (lost["Status"], lost["ExitCode"]) == ("exited", 255) and "is not known" in lost["Error"]
    assert host.inspect("quiet")["State"]["Pid"] == pids[1]
    host.api("POST", "/containers/quiet/stop")
    code = host.inspect("quiet")["State"]["ExitCode"]
    assert code == 7 or code == 255 and not KERNEL_TELLS_EXITS


def test_a_lost_shims_containers_are_handed_over_before_the_daemon_ends(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody else holds their streams then: a container would read the end of its input, and print for
    nobody."""
    driver, order, closing = dockerd.ExecutionDriver(str(tmp_path)), [], threading.Event()
    lock = driver._handing_over

    def opened() -> dockerd.ShimClient:
        closing.wait(10)
        return driver.shim

    def acquire(timeout: float) -> bool:
        closing.set()
        return lock.acquire(timeout=timeout)

    monkeypatch.setattr(driver, "open", opened)
    monkeypatch.setattr(driver.shim, "take", lambda process, streams: order.append(process.key))
    monkeypatch.setattr(driver.shim, "close", lambda: order.append("closed"))
    lost = dockerd.ShimClient("", driver._lost)
    lost.processes = {"one": dockerd.Process("one", lost, 1, 0), "given up": dockerd.Process("", lost, 1, -1)}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        handed = pool.submit(lost._gone)
        wait_for(lock.locked)
        waited = types.SimpleNamespace(acquire=acquire, release=lock.release)
        monkeypatch.setattr(driver, "_handing_over", waited)
        driver.close()
        handed.result()
    assert order == ["one", "closed"]


LINES = 30000 // PATIENCE  # of which a slow machine prints fewer while no daemon runs
PRINTS = (f"i=0; while [ $i -lt {LINES} ]; do echo line $i; i=$((i+1)); done; "
          "printf half; read x; echo :$x; exit 5")


@pytest.mark.parametrize("ending", ["stop", "kill", "upgrade"])
def test_live_restore(new_host: Callable[..., Host], busybox: bytes, tmp_path: Path, ending: str) -> None:
    """Containers outlive their daemon, stopped, killed or replaced by a newer file; the next one knows what
    they printed, how and when they ended, and controls those that run on."""
    program = tmp_path / "dockerd.py"
    shutil.copy(PROGRAM, program)
    host = new_host("--live-restore", program=str(program))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    pids = {
        "printing": started(host, "printing", "sh", "-c", PRINTS, OpenStdin=True),
        "terminal": started(host, "terminal", "sh", Tty=True, OpenStdin=True),
        "paused": started(host, "paused", "sleep", "1000", StopTimeout=0),
        "ends": started(host, "ends", "sh", "-c", UNTIL_TERM),
        "removed": started(host, "removed", "sh", "-c", UNTIL_TERM, HostConfig={"AutoRemove": True}),
    }
    assert host.api("GET", "/info")["LiveRestoreEnabled"] is True
    host.api("POST", "/containers/paused/pause")
    for name in ("ends", "removed"):
        wait_for(lambda: log_text(host, name) == b"up\n")  # noqa: B023
    wait_for(lambda: b"line 9\n" in log_text(host, "printing"))
    waiting = host.hijack(f"{API}/containers/paused/wait", upgrade=False)
    host.stop(signal.SIGKILL if ending == "kill" else signal.SIGTERM)
    assert waiting.read_all() == b""  # no exit code, as it has none, nor the end of an answer
    waiting.close()
    before = time.time_ns()
    for name in ("ends", "removed"):
        os.kill(pids[name], signal.SIGTERM)
    wait_for(lambda: not any(os.path.exists(f"/proc/{pids[name]}") for name in ("ends", "removed")))
    after = time.time_ns()
    if ending == "upgrade":
        program.write_text(program.read_text().replace("SHIM_PACKET = 1 << 16", "SHIM_PACKET = 65536"))
    host.start()
    state = host.inspect("ends")["State"]
    assert (state["Status"], state["ExitCode"], state["Error"]) == ("exited", 42, "")
    assert before < dockerd.parse_timestamp(state["FinishedAt"]) < after
    wait_for(lambda: host.http("GET", f"{API}/containers/removed/json").status == 404)
    events = host.http("GET", f"{API}/events?since=1&until={int(time.time()) + 1}").lines
    assert {(event["Actor"]["Attributes"]["name"], event["Actor"]["Attributes"].get("exitCode"))
            for event in events if event["Action"] == "die"} == {("ends", "42"), ("removed", "42")}
    for name in ("printing", "terminal", "paused"):
        assert host.inspect(name)["State"]["Pid"] == pids[name] and os.path.exists(f"/proc/{pids[name]}")
    assert host.inspect("paused")["State"]["Status"] == "paused"
    _check_terminal(host)
    _check_printing(host, ending)
    assert len(shims(host)) == (2 if ending == "upgrade" else 1)
    assert host.run("echo", "new") == (0, b"new\n")
    for name in ("terminal", "paused"):
        host.api("DELETE", f"/containers/{name}?force=1")
    wait_for(lambda: len(shims(host)) == 1)
    assert not any(os.path.exists(f"/proc/{pid}") for pid in pids.values())


def _check_terminal(host: Host) -> None:
    """The terminal takes input, gives output and has a size."""
    host.api("POST", "/containers/terminal/resize?h=17&w=71")
    stream = host.hijack(f"{API}/containers/terminal/attach?stdin=1&stdout=1&stream=1")
    stream.send(b"stty size; exit 3\n")
    assert b"17 71" in stream.read_until(b"17 71")
    stream.close()
    assert host.api("POST", "/containers/terminal/wait")["StatusCode"] == 3


def _check_printing(host: Host, ending: str) -> None:
    """Each line is in the log once, in order; after a kill the lines of one read may be missing."""
    stream = host.hijack(f"{API}/containers/printing/attach?stdin=1&stdout=1&stream=1")
    stream.send(b"whole\n")
    assert host.api("POST", "/containers/printing/wait")["StatusCode"] == 5
    stream.close()
    lines = log_text(host, "printing").split(b"\n")
    assert lines[-2:] == [b"half:whole", b""]
    numbers = [int(line.split()[-1]) for line in lines[:-2] if line.startswith(b"line ")]
    jumps = [next - number for number, next in zip(numbers, numbers[1:]) if next != number + 1]
    assert numbers[0] == 0 and numbers[-1] == LINES - 1
    assert len(lines) - 2 - len(numbers) <= (ending == "kill")  # one is torn where some are missing
    assert not jumps or (ending == "kill" and len(jumps) == 1 and 0 < jumps[0] < 10000)


def test_live_restore_is_switched_by_a_reload(new_host: Callable[..., Host], busybox: bytes,
                                              tmp_path: Path) -> None:
    """SIGHUP takes live-restore over from daemon.json, and back: then a clean stop ends the containers."""
    settings = tmp_path / "daemon.json"
    settings.write_text("{}")
    host = new_host("--config-file", str(settings))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    pid = started(host, "runs", "sh", "-c", UNTIL_TERM)
    wait_for(lambda: log_text(host, "runs") == b"up\n")

    def reload(value: bool) -> None:
        settings.write_text(json.dumps({"live-restore": value}))
        assert host.process
        host.process.send_signal(signal.SIGHUP)
        wait_for(lambda: host.api("GET", "/info")["LiveRestoreEnabled"] is value)

    reload(True)
    host.stop()
    assert os.path.exists(f"/proc/{pid}")
    host.start()
    reload(False)
    host.stop()
    assert not os.path.exists(f"/proc/{pid}")
    host.start()
    assert host.inspect("runs")["State"]["ExitCode"] == 42


def check(host: Host, *options: str) -> tuple[int, list[str]]:
    """The exit code and the lines of `dockerd.py --check` on the host's data root."""
    with host.enter(*host.command(), *options, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        assert process.stdout
        lines = process.stdout.read().decode().splitlines()
    return process.returncode, lines


def files(directory: str) -> dict[str, Any]:
    """All that is below a directory, with what tells a change of it."""
    paths = [os.path.join(place, name)
             for place, folders, names in os.walk(directory) for name in folders + names]
    return {path: (os.lstat(path).st_mtime_ns, os.lstat(path).st_ino) for path in paths}


def test_check_finds_what_is_planted_and_repair_mends_it(new_host: Callable[..., Host]) -> None:
    """Each kind of damage has its line; a check changes nothing, a repair all but what only a person may
    decide, and what is whole stays."""
    host = new_host()
    for name in ("busybox", "truncated", "missing"):
        tree = tar_of({**busybox_entries(), f"etc/{name}": name.encode() * 1000})
        host.import_image(name, tree, *BUSYBOX_CHANGES)
    kept, broken, left = (host.create("sleep", "1000", name=name) for name in ("kept", "broken", "left"))
    lost, ran = host.create("true", name="lost"), host.create("sh", "-c", UNTIL_TERM, name="ran")
    host.api("POST", "/containers/ran/start")
    pid = host.inspect("ran")["State"]["Pid"]
    assert check(host, "--check") == (0, [])
    code, lines = check(host, "--repair")
    assert code == 1 and "is in use by another daemon" in lines[0]
    images = {name: host.api("GET", f"/images/{name}/json") for name in ("truncated", "missing", "busybox")}
    host.kill()
    os.kill(pid, signal.SIGKILL)
    (shim,) = shims(host)
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    os.kill(shim, signal.SIGKILL)
    orphan = _plant(host, images, broken, left, lost)
    before = files(host.data_root)
    code, lines = check(host, "--check")
    assert code == 1 and files(host.data_root) == before
    expected = [
        r"/.tmp-planted was never finished", r"ignoring the layer \w+: .*damaged",
        r"ignoring the layer \w+: the driver has lost its directory", r"ignoring the image .*is missing",
        r"truncated:latest means the image \S+, which is missing",
        rf"ignoring the container {broken}, whose record is damaged", r"/0{64} has no record of a container",
        rf"the cgroup \S*{left} is there, .*: {orphan.pid}$", r"interrupted import left",
        r"merged is mounted", r"no record names the layer directory 1{64}", r"l/NOWHERE leads to no layer",
        r"has lost \d+ bytes",
        rf"the writable layer of the container {lost} is missing",
        rf"the container {ran} is recorded as running, but its process {pid} is gone"]
    for pattern in expected:
        assert [line for line in lines if re.search(pattern, line)], (pattern, lines)
    code, lines = check(host, "--repair")
    assert orphan.wait(20) == -signal.SIGKILL
    left_over = [line for line in lines if not line.startswith("mended: ")]
    assert code == 1 and len(left_over) == 1 and "has lost" in left_over[0]
    host.start()
    shown = {line["Names"][0]: line for line in host.api("GET", "/containers/json?all=1")}
    assert set(shown) == {"/kept", "/left", "/ran"} and shown["/kept"]["Id"] == kept
    state = host.inspect("ran")["State"]
    assert (state["Status"], state["ExitCode"]) == ("exited", 255)
    assert [image["RepoTags"] for image in host.api("GET", "/images/json")] == [["busybox:latest"]]
    host.api("POST", "/containers/kept/start")


def _plant(host: Host, images: dict[str, Any], broken: str, left: str, lost: str) -> subprocess.Popen[bytes]:
    """Damage of every kind in a stopped host's data root; returns the orphan of the container `left`."""
    layers, overlay = os.path.join(host.data_root, "image/overlay2/layerdb"), f"{host.data_root}/overlay2"

    def record(name: str, file: str) -> str:
        return os.path.join(layers, "sha256", images[name]["RootFS"]["Layers"][0][7:], file)

    os.truncate(record("truncated", "diff"), 30)
    shutil.rmtree(os.path.join(overlay, Path(record("missing", "cache-id")).read_text()))
    whole = os.path.join(overlay, Path(record("busybox", "cache-id")).read_text(), "diff")
    os.truncate(os.path.join(whole, "etc/busybox"), 10)
    Path(host.data_root, "containers", broken, "config.v2.json").write_text('{"ID": ')
    os.mkdir(os.path.join(host.data_root, "containers", "0" * 64))
    shutil.rmtree(os.path.join(overlay, Path(layers, "mounts", lost, "mount-id").read_text()))
    Path(host.data_root, ".tmp-planted").touch()
    for name in ("1" * 64, "2" * 64):
        os.makedirs(os.path.join(overlay, name, "diff"))
    os.makedirs(os.path.join(layers, "tmp", "planted", "2" * 64))
    os.symlink("../nowhere/diff", os.path.join(overlay, "l", "NOWHERE"))
    merged = os.path.join(overlay, Path(layers, "mounts", left, "mount-id").read_text(), "merged")
    os.makedirs(merged, exist_ok=True)
    host.enter("mount", "-t", "tmpfs", "none", merged).wait()
    orphan = subprocess.Popen(["sleep", "1000"])
    for top in ("pids", "freezer", "unified", ""):
        if os.path.exists(f"/sys/fs/cgroup/{top}/cgroup.procs"):
            place = f"/sys/fs/cgroup/{top}{host.cgroup_parent}/{left}"
            os.makedirs(place)
            Path(place, "cgroup.procs").write_text(str(orphan.pid))
    return orphan


def test_a_removal_goes_on_at_the_next_start(new_host: Callable[..., Host], busybox: bytes) -> None:
    """One that is killed half way; one that fails leaves the container to another attempt."""
    host = new_host(environment={"DOCKERD_FAILPOINTS": "container-remove=eio"})
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    one, two = host.create("true"), host.create("true")
    assert "Input/output error" in str(host.http("DELETE", f"{API}/containers/{one}").body)
    host.stop()
    host.environment["DOCKERD_FAILPOINTS"] = "container-remove=kill"
    host.start()
    assert host.api("GET", f"/containers/{one}/json")["State"]["Dead"]
    with pytest.raises((OSError, http.client.HTTPException)):
        host.http("DELETE", f"{API}/containers/{two}")
    host.kill()
    del host.environment["DOCKERD_FAILPOINTS"]
    host.start()
    assert [each["Id"] for each in host.api("GET", "/containers/json?all=1")] == [one]
    assert os.listdir(os.path.join(host.data_root, "containers")) == [one]
    host.api("DELETE", f"/containers/{one}")
    host.stop()
    assert check(host, "--check") == (0, [])


def test_a_data_root_goes_to_and_fro(new_host: Callable[..., Host], busybox: bytes) -> None:
    """What the real dockerd has left is there and works, and what is made of it works there again."""
    theirs = Peer()
    try:
        _leave_a_data_root(theirs.start(), busybox)
        docker = Docker(f"{PEER}/usr/bin/docker", theirs)
        lists = [("images", "--digests", "--no-trunc"), ("volume", "ls"), ("network", "ls", "--no-trunc"),
                 ("ps", "-a", "--no-trunc", "--format", "{{.ID}} {{.Image}} {{.Names}} {{.Command}}"),
                 ("logs", "left"), ("logs", "local"), ("diff", "left"), ("history", "--no-trunc", "made:it"),
                 ("inspect", "-f", "{{.Id}}{{.Parent}}{{.Created}}{{json .RootFS}}{{.Size}}", "made:it"),
                 ("volume", "inspect", "-f", "{{json .Labels}}{{json .Options}}{{.Mountpoint}}", "labelled",
                  "optional"), ("network", "inspect", "-f", "{{.Id}}{{.Created}}{{.Internal}}{{json .Labels}}"
                                "{{json .Options}}{{range .IPAM.Config}}{{.Subnet}}{{end}}",
                                "mine", "automatic")]
        told = [_steady(docker(*command)) for command in lists]
        layers = files_of(theirs.http("GET", "/images/made:it/get").body)
        ours = new_host("--iptables=false", "--bridge=none", start=False)
        ours.data_root = theirs.data_root
        ours.start(wait=False)
        assert ours.process and ours.process.wait(30) == 1
        assert f"the data root {theirs.data_root} is in use by another dockerd" in ours.log()
        theirs.stop()
        ours.start()
        docker.environment["DOCKER_HOST"] = ours.url
        for command, before in zip(lists, told):
            assert _steady(docker(*command)) == before
        saved = files_of(ours.http("GET", f"{API}/images/made:it/get").body)
        blobs = {sha256(data) for name, data in layers.items() if not name.endswith(("/json", "VERSION"))}
        assert blobs - {sha256(data) for data in saved.values()} == {
            sha256(layers[name]) for name in ("manifest.json", "repositories")}
        assert docker("start", "-a", "left", status=None) == "out"
        wait_for(lambda: ours.inspect("restarted")["State"]["Running"])
        docker("start", "networked", "local")
        assert docker("exec", "networked", "cat", "/v/file") == "in the volume"
        assert docker("exec", "networked", "hostname", "-i").startswith("10.77.5.")
        docker("commit", "networked", "ours:1")
        docker("run", "--name=ours", "--network=none", "-v=labelled:/v", "ours:1", "sh", "-c",
               "cat /v/file; echo >/x")
        ours.import_image("imported:1", busybox)
        assert ours.stop() == 0
        theirs.start()
        docker.environment["DOCKER_HOST"] = theirs.url
        assert docker("start", "-a", "ours") == "in the volume" and docker("diff", "ours").split()[-1] == "/x"
        assert docker("logs", "ours") == "in the volume\nin the volume"
        docker("start", "networked")
        assert docker("run", "--rm", "--network=none", "imported:1", "/bin/echo", "hi") == "hi"
        assert theirs.http("GET", "/images/get?names=ours:1&names=imported:1").status == 200
        docker("rm", "-f", "ours", "networked")
        docker("rmi", "ours:1", "imported:1")
    finally:
        theirs.close()


def test_a_damaged_bolt_database_is_passed_over(peer: Host, tmp_path: Path) -> None:
    whole = Path(peer.data_root, "network", "files", "local-kv.db").read_bytes()
    path = tmp_path / "db"
    path.write_bytes(whole)
    assert sorted(record["Name"] for record in dockerd.moby_networks(str(path))) == ["host", "none"]
    for seed in range(60):
        chance = random.Random(seed)
        damaged = bytearray(whole[:chance.randrange(len(whole))])
        for _ in range(seed):
            damaged[chance.randrange(len(damaged))] = chance.randrange(256)
        path.write_bytes(damaged)
        assert len(dockerd.moby_networks(str(path))) <= 2
    assert dockerd.read_bolt(str(tmp_path / "none"), b"x") == {}


def _leave_a_data_root(theirs: Host, busybox: bytes) -> None:
    """Images, containers, volumes and networks of the real dockerd."""
    theirs.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    docker = Docker(f"{PEER}/usr/bin/docker", theirs)
    for number in range(40):  # more than a page of its database holds
        theirs.api("POST", "/volumes/create", {"Name": f"v{number}", "Labels": {"number": "x" * 200}})
    docker("volume", "create", "--label=a=b", "labelled")
    docker("volume", "create", "-o=type=tmpfs", "-o=device=tmpfs", "optional")
    docker("network", "create", "--subnet=10.77.0.0/16", "--ip-range=10.77.5.0/24", "--label=x=y", "mine")
    docker("network", "create", "--internal", "automatic")
    docker("run", "--name=left", "--network=none", "-v=labelled:/v", "-v=/anonymous", "busybox", "sh", "-c",
           "echo out; echo in the volume >/v/file; echo x >/file; rm -f /etc/plain; mkdir -p /new")
    docker("commit", "-m", "why", "left", "made:it")
    docker("create", "--name=networked", "--network=mine", "-v=labelled:/v:ro", "--stop-timeout=1", "made:it",
           "sleep", NEVER)
    run = ("run", "-d", "--network=none", "--stop-timeout=1")
    docker(*run, "--name=restarted", "--restart=unless-stopped", "busybox", "sleep", NEVER)
    docker(*run, "--name=local", "--log-driver=local", "busybox", "sh", "-c", "echo local; sleep " + NEVER)
    wait_for(lambda: docker("logs", "local") == "local")


def _steady(text: str) -> str:
    """The lines that a client prints, without the times since."""
    text = re.sub(r"(About |Less than )?(an?|\d+) (second|minute)s?( ago)?|  +", " ", text)
    return "\n".join(sorted(text.splitlines()))


def test_a_start_deletes_no_layer_that_it_cannot_read(new_host: Callable[..., Host], busybox: bytes) -> None:
    """A container's mount-id that is not one is told of, and stays for a person to look at."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    name = host.create("true")
    host.stop()
    record = Path(host.data_root, "image/overlay2/layerdb/mounts", name)
    (record / "mount-id").write_text("unreadable")
    code, lines = check(host, "--check")
    assert code == 1 and any(line.endswith(f"{record} is not readable") for line in lines), lines
    host.start()
    assert (record / "mount-id").read_text() == "unreadable"


COUNTS = "i=0; while :; do echo $i; i=$((i+1)); sleep .1; done"


@pytest.mark.torture
def test_a_daemon_killed_at_random_moments_loses_nothing(new_host: Callable[..., Host],
                                                         busybox: bytes) -> None:
    """kill -9, 20 times, also while it starts, with 30 containers of all policies: those that run go on,
    those that end are started again by their policy, those that were stopped stay so; a check finds
    nothing."""
    chance = random.Random(20)
    host = new_host("--live-restore")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    policies = ("no", "always", "unless-stopped", "on-failure")

    def counts(name: str, **host_config: Any) -> int:
        return started(host, name, "sh", "-c", COUNTS, StopTimeout=0, HostConfig=host_config)

    pids = {f"{policy}.runs{number}": counts(f"{policy}.runs{number}", RestartPolicy={"Name": policy})
            for policy in policies for number in range(4)}
    pids["rm.runs"] = counts("rm.runs", AutoRemove=True)
    for policy in policies:
        for kind in ("stopped", "fails"):
            script = "sleep .5; exit 3" if kind == "fails" else COUNTS
            started(host, f"{policy}.{kind}", "sh", "-c", script, StopTimeout=0,
                    HostConfig={"RestartPolicy": {"Name": policy}})
        host.api("POST", f"/containers/{policy}.stopped/stop?t=0")
    for number in range(5):
        host.create("true", name=f"fresh{number}")
    for _ in range(20):
        if chance.random() < 0.7:
            host.wait_ready()
        time.sleep(chance.random())
        host.kill()
        host.start(wait=False)
    host.wait_ready()
    shown = {line["Names"][0][1:]: line["State"] for line in host.api("GET", "/containers/json?all=1")}
    assert len(shown) == 30
    for name, pid in pids.items():
        assert host.inspect(name)["State"]["Pid"] == pid and os.path.exists(f"/proc/{pid}"), name
        numbers = [int(line) for line in log_text(host, name).split()]
        assert numbers == sorted(set(numbers)) and len(numbers) >= numbers[-1] - 20 * 10, name
    assert all((shown[f"{policy}.fails"] == "exited") == (policy == "no") for policy in policies), shown
    assert shown["unless-stopped.stopped"] == shown["no.stopped"] == "exited"
    for policy in policies:
        host.api("POST", f"/containers/{policy}.fails/stop?t=0", status=204 if policy != "no" else 304)
    assert check(host, "--check") == (0, [])
    host.remove_all()


@pytest.mark.parametrize("stuck", ["silent", "full", "ended"])
def test_a_shim_that_does_not_answer_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                 stuck: str) -> None:
    """Each call ends with a clear error in bounded time, also while others wait; a late start is undone."""
    monkeypatch.setattr("dockerd.SHIM_TIMEOUT", 1)
    lost = threading.Event()
    client = dockerd.ShimClient(str(tmp_path / "shim.sock"), lambda client: lost.set())
    assert not client.connect()
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as listener:
        listener.bind(client.path)
        listener.listen(1)
        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            connected = pool.submit(client.connect)
            shim, _ = listener.accept()
            shim.recv(1 << 16)
            shim.send(b'{"seq": 1, "protocol": 1, "pid": 77}')
            assert connected.result()
            if stuck == "ended":
                shim.close()
            padding = "x" * 60000 if stuck == "full" else ""
            calls = [pool.submit(client.call, "start", key=padding) for _ in range(8)]
            errors = [str(call.exception()) for call in calls]
        if stuck == "ended":
            assert all("the shim is gone" in error for error in errors) and lost.wait(10)
            return
        assert all("the shim (pid 77" in error and "start within 1 s" in error for error in errors)
        child = subprocess.Popen(["sleep", "1000"])
        answer = json.dumps({"seq": 2, "pid": child.pid, "key": "late"}).encode()
        socket.send_fds(shim, [answer], [os.pidfd_open(child.pid)])
        assert child.wait(20) == -signal.SIGKILL
        client.close()
        shim.close()


# ------------------------------------------------------------------------------------------------------------
# Lifecycle
#
# The actions on a container, their events, restart policies, health.  The events and the states of each step
# are those that the real dockerd 20.10.24 was seen to give (without a network's connect and disconnect).
# ------------------------------------------------------------------------------------------------------------


def events_since(host: Host, start: float, **filters: list[str]) -> list[tuple[str, dict[str, str]]]:
    """(action, attributes without image and name) of the events of containers from `start` to now."""
    query = f"since={start:.6f}&until={time.time():.6f}&filters=" + urllib.parse.quote(
        json.dumps({"type": ["container"], **filters}))
    events = host.http("GET", f"{API}/events?{query}").lines
    hidden = ("image", "name", "execDuration", "dockerd.py.restart-unhealthy")
    return [(event["Action"], {key: value for key, value in event["Actor"]["Attributes"].items()
                               if key not in hidden}) for event in events]


def until_restarting(host: Host, name: str, count: int = 4) -> Any:
    """The container's inspection when it waits for its restart number `count` or a later one."""
    return wait_for(lambda: (shown := host.inspect(name))["RestartCount"] >= count
                    and shown["State"]["Status"] == "restarting" and shown)


DIE = ("die", {"exitCode": "137"})
TERM, KILL = ("kill", {"signal": "15"}), ("kill", {"signal": "9"})


@pytest.mark.parametrize("steps, expected", [
    (["restart?t=0"], [TERM, KILL, DIE, ("stop", {}), ("start", {}), ("restart", {})]),
    (["pause", "unpause", "kill?signal=USR1", "top"],
     [("pause", {}), ("unpause", {}), ("kill", {"signal": "10"}), ("top", {})]),
    (["pause", "stop?t=0"], [("pause", {}), TERM, ("unpause", {}), KILL, DIE, ("stop", {})]),
    (["pause", "kill?signal=HUP"], [("pause", {}), ("kill", {"signal": "1"}), ("unpause", {})]),
    (["pause", "kill"], [("pause", {}), KILL, DIE]),
    (["stop?t=0", "restart", "rename?name=other"],
     [TERM, KILL, DIE, ("stop", {}), ("start", {}), ("restart", {}), ("rename", {"oldName": "/one"})]),
])
def test_events_of_the_actions(host: Host, steps: list[str], expected: list[Any]) -> None:
    identity = host.create("sleep", NEVER, name="one")
    host.api("POST", f"/containers/{identity}/start")
    start = time.time()
    for step in steps:
        host.api("GET" if step == "top" else "POST", f"/containers/{identity}/{step}")
    assert events_since(host, start) == expected


def test_a_restart_keeps_what_rm_would_remove(host: Host) -> None:
    identity = host.create("sleep", NEVER, HostConfig={"AutoRemove": True})
    for _ in range(2):
        host.api("POST", f"/containers/{identity}/restart?t=0")
    assert host.inspect(identity)["State"]["Running"]
    host.api("POST", f"/containers/{identity}/stop?t=0")
    wait_for(lambda: host.http("GET", f"{API}/containers/{identity}/json").status == 404)


def test_copies_of_what_ends_at_this_moment(host: Host) -> None:
    """The process is dead, and the daemon may not know of it yet: the copy is one of a stopped container."""
    assert host.process
    own = f"/proc/{host.process.pid}/fd"
    host.create("sleep", NEVER, name="one", Volumes={"/v": {}})
    for path in ("archive?path=/v", "export", "archive?path=/etc/group", "export", "archive?path=/v"):
        host.api("POST", "/containers/one/start")
        os.kill(host.inspect("one")["State"]["Pid"], signal.SIGKILL)
        assert host.http("GET", f"{API}/containers/one/{path}").status == 200
        host.api("POST", "/containers/one/wait")
    wait_for(lambda: "/" not in [os.readlink(f"{own}/{fd}") for fd in os.listdir(own)
                                 if os.path.islink(f"{own}/{fd}")], "its root to be closed")


def test_a_restart_that_fails_names_its_container(host: Host) -> None:
    host.create("nosuch", name="one")
    text = host.api("POST", "/containers/one/restart", status=400)["message"]
    assert text == "Cannot restart container one: " + host.inspect("one")["State"]["Error"]


def test_on_failure_restarts_so_many_times(host: Host) -> None:
    policy = {"Name": "on-failure", "MaximumRetryCount": 2}
    start = time.time()
    for name, code in (("fails", 3), ("ends", 0)):
        host.create("sh", "-c", f"exit {code}", name=name, HostConfig={"RestartPolicy": policy})
        host.api("POST", f"/containers/{name}/start")
    wait_for(lambda: host.inspect("fails")["State"]["Status"] == "exited")
    for name in ("fails", "ends"):  # which answers when the end has been told
        host.api("POST", f"/containers/{name}/wait")
    shown = host.inspect("fails")
    assert (shown["RestartCount"], shown["State"]["ExitCode"]) == (2, 3)
    assert events_since(host, start, container=["fails"])[1:] == [
        ("start", {}), ("die", {"exitCode": "3"})] * 3
    assert host.inspect("ends")["RestartCount"] == 0
    assert not host.inspect("ends")["State"]["Running"]


def test_a_container_that_waits_for_its_restart(host: Host) -> None:
    """What the actions answer then; each way out of it leaves a container that stays stopped."""
    host.create("sh", "-c", "exit 3", name="one", HostConfig={"RestartPolicy": {"Name": "always"}})
    call = f"{API}/containers/one"
    host.api("POST", "/containers/one/start")
    state = until_restarting(host, "one")["State"]
    assert (state["Running"], state["Restarting"], state["Pid"], state["ExitCode"]) == (True, True, 0, 3)
    assert host.api("GET", "/containers/json")[0]["Status"].startswith("Restarting (3) ")
    assert host.http("POST", f"{call}/start").status == 304
    for method, action, text in (("POST", "/pause", "is restarting, wait until the container is running"),
                                 ("GET", "/top", "is restarting, wait until the container is running"),
                                 ("DELETE", "", "container is restarting: stop the container before")):
        answer = host.http(method, call + action)
        assert answer.status == 409 and text in answer.json["message"], answer.body
    start = time.time()
    assert host.http("POST", f"{call}/stop").status == 204
    assert events_since(host, start) == [("stop", {})]
    assert host.inspect("one")["State"]["Status"] == "exited"
    host.api("POST", "/containers/one/restart")
    assert until_restarting(host, "one")["State"]["Restarting"]
    assert host.http("POST", f"{call}/kill").status == 204
    assert host.inspect("one")["State"]["Status"] == "exited"
    host.api("POST", "/containers/one/start")
    until_restarting(host, "one")
    host.api("POST", "/containers/one/update", {"RestartPolicy": {"Name": "no"}})
    wait_for(lambda: host.inspect("one")["State"]["Status"] == "exited")
    host.api("POST", "/containers/one/update", {"RestartPolicy": {"Name": "always"}})
    host.api("POST", "/containers/one/start")
    until_restarting(host, "one")
    assert host.http("DELETE", call + "?force=1").status == 204


def test_update_of_the_restart_policy(host: Host) -> None:
    host.create("sleep", NEVER, name="kept")
    host.create("sleep", NEVER, name="brief", HostConfig={"AutoRemove": True})
    for name, policy, status, text in (
        ("kept", {"Name": "bogus"}, 400, "invalid restart policy 'bogus'"),
        ("kept", {"Name": "always", "MaximumRetryCount": 3}, 400, "maximum retry count cannot be used with"),
        ("brief", {"Name": "always"}, 409, "Restart policy cannot be updated because AutoRemove is enabled"),
    ):
        answer = host.http("POST", f"{API}/containers/{name}/update", {"RestartPolicy": policy})
        assert answer.status == status and text in answer.json["message"], answer.body
    start = time.time()
    policy = {"Name": "on-failure", "MaximumRetryCount": 4}
    host.api("POST", "/containers/kept/update", {"RestartPolicy": policy})
    host.api("POST", "/containers/kept/update", {})
    assert host.inspect("kept")["HostConfig"]["RestartPolicy"] == policy
    assert events_since(host, start) == [("update", {})] * 2


@pytest.mark.parametrize("crash", [False, True])
def test_the_daemon_starts_what_its_policy_says(
    new_host: Callable[..., Host], busybox: bytes, crash: bool
) -> None:
    """As the real one: a manual stop holds for unless-stopped, and what never ran is not started."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    for policy in ("always", "unless-stopped", "on-failure", "no"):
        for kind in ("running", "stopped", "fresh"):
            name = f"{policy}.{kind}"
            host.create("sleep", "1000", name=name, StopTimeout=0,
                        HostConfig={"RestartPolicy": {"Name": policy}})
            if kind != "fresh":
                host.api("POST", f"/containers/{name}/start")
            if kind == "stopped":
                host.api("POST", f"/containers/{name}/stop?t=0")
    host.create("sh", "-c", "exit 3", name="back-off", HostConfig={"RestartPolicy": {"Name": "always"}})
    host.api("POST", "/containers/back-off/start")
    until_restarting(host, "back-off", 3)
    host.kill() if crash else host.stop()
    host.start()
    assert host.inspect("back-off")["State"]["ExitCode"] in (0, 3)
    host.api("DELETE", "/containers/back-off?force=1")
    assert {shown["Names"][0] for shown in host.api("GET", "/containers/json")} == {
        "/always.running", "/always.stopped", "/unless-stopped.running", "/on-failure.running",
        "/on-failure.stopped"}


def test_containers_start_after_those_that_they_need() -> None:
    """Links and shared namespaces make an order; who needs nobody does not wait, and a circle is no end."""
    needs = {"web": ["db", "net"], "db": ["net"], "net": [], "own": ["stopped"], "a": ["b"], "b": ["a"]}
    order: list[str] = []
    containers = {name: types.SimpleNamespace(
        id=name, record={"HasBeenStartedBefore": name != "stopped"},
        state=types.SimpleNamespace(running=False), wants_restart=lambda: True,
        start=functools.partial(order.append, name),
        host_config={"NetworkMode": f"container:{names[0]}" if names else "none", "IpcMode": "private",
                     "PidMode": "", "Links": [f"{other}:alias" for other in names[1:]]})
        for name, names in {**needs, "stopped": []}.items()}
    daemon = dockerd.Daemon.__new__(dockerd.Daemon)
    daemon.containers = types.SimpleNamespace(  # type: ignore[assignment]
        all=lambda: list(containers.values()), find=lambda name: containers[name])
    daemon.workers = dockerd.Workers(2)
    daemon._start_wanted()
    assert sorted(order) == sorted(needs)
    assert order.index("net") < order.index("db") < order.index("web")


@pytest.mark.parametrize("own, given", [(0, 0), (90, 90), (-1, 10)])
def test_no_container_keeps_the_daemon_from_its_end(own: int, given: int) -> None:
    container = Mock(stop_timeout=own)
    dockerd.Daemon._stop_one(container)
    container.stop.assert_called_once_with(timeout=given, manually=False)


EXEC_EVENT = {"Type": "container", "Action": "exec_create: sh -c true", "scope": "local", "Actor": {
    "ID": "abcd", "Attributes": {"image": "host:5000/busybox:1", "name": "web1", "a": "b", "c": ""}}}
TAG_EVENT = {"Type": "image", "Action": "tag", "scope": "local", "Actor": {
    "ID": "sha256:1234", "Attributes": {"name": "busybox:latest"}}}


@pytest.mark.parametrize("event, filters, expected", [
    (EXEC_EVENT, {}, True), (EXEC_EVENT, {"unknown": ["x"]}, True), (EXEC_EVENT, {"container": []}, True),
    (EXEC_EVENT, {"container": ["web"]}, True), (EXEC_EVENT, {"container": ["ab", "x"]}, True),
    (EXEC_EVENT, {"container": ["eb1"]}, False), (TAG_EVENT, {"container": ["busy"]}, False),
    (EXEC_EVENT, {"image": ["host:5000/busybox"]}, True),
    (EXEC_EVENT, {"image": ["host:5000/busybox:1"]}, True),
    (EXEC_EVENT, {"image": ["host"]}, False), (TAG_EVENT, {"image": ["busybox"]}, True),
    (TAG_EVENT, {"image": ["sha256:1234"]}, True), (TAG_EVENT, {"image": ["busy"]}, False),
    (EXEC_EVENT, {"label": ["a=b", "c"]}, True), (EXEC_EVENT, {"label": ["a=b", "d"]}, False),
    (EXEC_EVENT, {"event": ["exec_create"]}, True), (EXEC_EVENT, {"event": ["exec"]}, False),
    (EXEC_EVENT, {"type": ["image", "container"], "scope": ["local"]}, True),
    (EXEC_EVENT, {"scope": ["swarm"]}, False), (EXEC_EVENT, {"daemon": ["x"]}, False),
    (EXEC_EVENT, {"service": ["web1"]}, False), (TAG_EVENT, {"plugin": ["x"]}, False),
    (EXEC_EVENT, {"type": ["container"], "event": ["die"]}, False),
])
def test_filters_of_events(event: Any, filters: Any, expected: bool) -> None:
    assert dockerd.event_matches(event, filters) is expected


def test_bounds_of_events(host: Host) -> None:
    start = time.time()
    host.create("true", name="one")
    end = time.time()
    assert [action for action, _ in events_since(host, start)] == ["create"]
    path = f"/events?since={start:.9f}&until="
    host.create("true", name="two")

    def told(query: str) -> list[str]:
        answer = host.http("GET", f"{API}/events?{query}")
        return [event["Actor"]["Attributes"].get("name", "") for event in answer.lines]

    assert told(path.partition("?")[2] + f"{end:.9f}") == ["one"]
    assert told(f"until={end:.9f}")[-1] == "one" and told("since=0&until=0")[-2:] == ["one", "two"]
    assert told("until=0")[-1] == told(f"since=0&until={time.time() + 0.01:.9f}")[-1] == "two"
    assert told("until=1") == []
    assert host.api("GET", path + "1", status=400)["message"] == (
        f"`since` time ({start:.9f}) cannot be after `until` time (1)")
    assert "invalid filter" in host.api("GET", path + "9999999999&filters=[1]", status=400)["message"]


def test_a_slow_listener_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    """It takes a bounded part of the memory, keeps nobody from publishing, and its stream ends."""
    monkeypatch.setattr(dockerd, "EVENT_BACKLOG", 10)
    engine, events = dockerd.Engine(), dockerd.Events()
    engine.install(events)
    job, blocked, go = engine.job("events"), threading.Event(), threading.Event()

    class Slow:
        def write(self, data: bytes) -> None:
            blocked.set()
            go.wait(20)

    job.stdout.add(Slow())
    listening = threading.Thread(target=job.run)
    listening.start()
    wait_for(lambda: events.count == 1)
    events.publish("container", "start", "id", {})
    assert blocked.wait(20)
    for _ in range(12):
        events.publish("container", "die", "id", {})
    assert engine.job("subscribers_count").run() == {"Count": 0}
    go.set()
    listening.join(20)
    assert not listening.is_alive()


def test_a_task_that_hangs_holds_up_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    def count() -> int:
        return sum(thread.name == "worker" for thread in threading.enumerate())

    monkeypatch.setattr(dockerd, "RELIEF", 0.05)
    before = count()
    workers, go, done = dockerd.Workers(2), threading.Event(), threading.Event()
    for _ in range(5):
        workers.submit(go.wait)
    workers.submit(done.set)
    assert done.wait(20) and not workers.drain(0)
    go.set()
    assert workers.drain(20)
    wait_for(lambda: count() == before + 2, "those who were relieved to end")


def test_timers_run_in_order_and_can_be_given_up() -> None:
    ran: list[str] = []
    workers, done = dockerd.Workers(1), threading.Event()
    workers.later(0.2, done.set)
    given_up = workers.later(0.1, ran.append, "never")
    workers.later(0.05, ran.append, "second")
    workers.later(0.0, ran.append, "first")
    given_up()
    assert done.wait(20) and ran == ["first", "second"]
    given_up()


def test_rename(host: Host) -> None:
    identity, other = host.create("true", name="old"), host.create("true", name="other")
    host.api("POST", "/containers/old/rename?name=/new")
    assert host.inspect("new")["Id"] == identity and host.inspect(identity)["Name"] == "/new"
    assert host.http("GET", f"{API}/containers/old/json").status == 404
    for name, status, text in (
        ("new", 400, "Renaming a container with the same name as its current name"),
        ("", 400, "Neither old nor new names may be empty"),
        ("!", 400, "Error when allocating new name: Invalid container name (/!), only "),
        ("other", 409, "Error when allocating new name: Conflict. The container name \"/other\" is already "
                       f"in use by container \"{other}\". "),
    ):
        answer = host.http("POST", f"{API}/containers/new/rename?name={name}")
        assert answer.status == status and answer.json["message"].startswith(text), answer.body
    host.create("true", name="old")


def test_prune(host: Host) -> None:
    names = {name: host.create("sh", "-c", "echo 12345 >/file", name=name, Labels={"kind": name})
             for name in ("one", "two", "three")}
    running = host.create("sleep", NEVER)
    host.api("POST", f"/containers/{running}/start")
    host.api("POST", "/containers/one/start")
    host.api("POST", "/containers/one/wait")
    start = time.time()

    def prune(filters: str, status: int = 200) -> Any:
        return host.api("POST", f"/containers/prune?filters={urllib.parse.quote(filters)}", status=status)

    assert prune('{"until": ["1h"]}') == {"ContainersDeleted": None, "SpaceReclaimed": 0}
    assert prune('{"label": ["kind=one"]}') == {"ContainersDeleted": [names["one"]], "SpaceReclaimed": 6}
    assert prune('{"label!": ["kind=two"]}')["ContainersDeleted"] == [names["three"]]
    assert [event for event in events_since(host, start) if event[0] == "prune"] == [
        ("prune", {"reclaimed": size}) for size in ("0", "6", "0")]
    for filters, text in (('{"until": ["x"]}', 'failed to parse value as time or duration: "x"'),
                          ('{"until": ["1h", "2h"]}', "more than one until filter specified"),
                          ('{"bogus": ["x"]}', "invalid filter 'bogus'")):
        assert prune(filters, 400)["message"] == text
    assert prune("{}")["ContainersDeleted"] == [names["two"]] and host.inspect(running)["State"]["Running"]


def test_a_container_without_a_size_hides_no_other(host: Host) -> None:
    """The list, an inspection and df go on where one is removed while it is measured; one that has its layer
    no more is not found."""
    names = {host.create("true", name=name): name for name in ("going", "staying")}
    upper = host.inspect("going")["GraphDriver"]["Data"]["UpperDir"]
    os.rename(upper, upper + ".away")
    try:
        for listed in (host.api("GET", "/containers/json?all=1&size=1"), host.api(
                "GET", "/system/df?type=container")["Containers"]):
            assert {names[one["Id"]]: one["SizeRootFs"] > 0 for one in listed} == {
                "going": False, "staying": True}
        assert host.api("GET", "/containers/going/json?size=1")["SizeRw"] == 0
    finally:
        os.rename(upper + ".away", upper)
    store = dockerd.LayerStore.__new__(dockerd.LayerStore)
    store._mounts = {}
    for ask in (store.rw_size, store.rw_changes):
        with pytest.raises(dockerd.NotFound):
            ask("gone")


# Requests about a container, and about one that is not there, for which the real dockerd looks at the request
# first.  Ours refuses with the same words; what the client got wrong is never 500, as in later versions.
REFUSED: list[tuple[str, str, Any]] = [
    *[("POST", path, None) for path in (
        "/stop?t=abc", "/restart?t=1.5", "/restart?t=99999999999999999999", "/rename?name=", "/rename",
        "/rename?name=a%20b", "/start?checkpoint=x", "/unpause")],
    *[("GET", path, None) for path in ("/logs", "/logs?stdout=1&since=abc", "/top?ps_args=-o%20comm")],
    ("POST", "/exec", {}), ("POST", "/exec", {"Cmd": []}), ("POST", "/exec", {"Cmd": "x"}),
    ("POST", "/update", {"Memory": "x"}), ("POST", "/update", {"Memory": 1}),
    ("POST", "/update", {"NanoCpus": 10**8, "CpuQuota": 1000}), ("POST", "/update", {"CpuPeriod": 1}),
    ("POST", "/update", {"RestartPolicy": {"Name": "bogus"}}), ("DELETE", "?link=1", None),
]
REFUSED_ELSEWHERE: list[tuple[str, str, Any]] = [
    *[("GET", "/containers/json?all=1&" + query, None) for query in (
        "limit=abc", "limit=99999999999999999999",
        *["filters=" + urllib.parse.quote(json.dumps({name: [value]})) for name, value in (
            ("bogus", "x"), ("status", "bogus"), ("is-task", "x"), ("label!", "a"),
            ("publish", "x"), ("publish", "90-80"), ("publish", "99999"), ("expose", "x"))])],
    *[("POST", "/containers/create", body) for body in (
        {"HostConfig": {}, "Image": 1}, {"Image": "busybox", "Env": "x"}, {"Image": "nosuch"})],
    *[("POST", "/containers/create", {"Image": "busybox", "HostConfig": host}) for host in (
        {"NanoCpus": 10**9, "CpuPeriod": 50000}, {"NanoCpus": -1}, {"NetworkMode": "container:"},
        {"Links": ["x:y:z"]}, {"ExtraHosts": ["x:bogus"]}, {"SecurityOpt": ["bogus"]},
        {"RestartPolicy": {"Name": "always", "MaximumRetryCount": 3}}, {"Isolation": "bogus"})],
    ("POST", "/containers/create?name=/x/y", {"Image": "busybox"}),
]


def test_refusals_have_the_real_daemons_words(host: Host, peer: Host) -> None:
    asked = [(method, f"/containers/{name}{path}", body) for name in ("judged", "nosuch")
             for method, path, body in REFUSED] + REFUSED_ELSEWHERE
    found = {}
    for daemon in (host, peer):
        daemon.http("POST", "/v1.41/containers/create?name=judged",
                    {"Image": "busybox", "Cmd": ["true"], "HostConfig": {"NetworkMode": "none"}})
        try:
            answers = [daemon.http(method, "/v1.41" + path, body) for method, path, body in asked]
            identity = daemon.http("GET", "/v1.41/containers/judged/json").json["Id"]
        finally:
            daemon.http("DELETE", "/v1.41/containers/judged?force=1")
        found[daemon] = [
            (answer.status, (answer.json or {}).get("message", "").replace(identity, "ID").lower())
            for answer in answers]
    assert [] == [(request, ours, theirs) for request, ours, theirs in zip(asked, found[host], found[peer])
                  if ours[1] != theirs[1] or ours[0] not in (theirs[0], 400, 409) or ours[0] < 300]


def test_lists_with_filters_are_the_real_daemons(host: Host, peer: Host) -> None:
    """What the filters choose by an id is a beginning of it; `label!` of a prune spares what has all."""
    def listed(daemon: Host, query: str) -> list[str]:
        names = [each["Names"][0] for each in daemon.http("GET", f"/v1.41/containers/json?{query}").json]
        return sorted(name for name in names if name.startswith("/f-"))

    found = {}
    for daemon in (host, peer):
        identity = ""
        for name, labels in (("f-one", {"a": "1", "b": "1"}), ("f-two", {"a": "1"})):
            identity = daemon.http("POST", f"/v1.41/containers/create?name={name}", {
                "Image": "busybox", "Labels": {**labels, "f": ""}, "HostConfig": {"NetworkMode": "none"},
                "Cmd": ["true"]}).json["Id"]
        daemon.http("POST", "/v1.41/networks/create", {"Name": "f-net"})
        daemon.http("POST", "/v1.41/containers/create?name=f-net", {
            "Image": "busybox", "Cmd": ["sleep", NEVER], "ExposedPorts": {"80/tcp": {}, "90/udp": {}},
            "HostConfig": {"NetworkMode": "f-net", "PortBindings": {"90/udp": [{"HostPort": "8099"}]}}})
        daemon.http("POST", "/v1.41/containers/f-net/start")
        queries: list[Any] = [{"id": [text]} for text in (
            identity, identity[:9], identity[1:], "^" + identity[:9])]
        queries += [{"expose": [text]} for text in ("80", "80/udp", "79-90/udp")]
        queries += [{"publish": [text]} for text in ("80", "90/udp", "8099", "8099/udp", "8000-9000/udp")]
        queries += [{"network": [text]} for text in ("f-net", "none")]
        queries += [{"label": ["a", "b"]}, {"is-task": ["true"]}, {"is-task": ["false"]}, {"name": ["f-o"]},
                    {"since": ["f-one"]}, {"before": ["f-two"]}, {"status": {"created": False}}]
        found[daemon] = [listed(daemon, "all=1&filters=" + urllib.parse.quote(json.dumps(query)))
                         for query in queries]
        found[daemon] += [listed(daemon, query) for query in ("since=f-one", "before=f-two", "limit=0")]
        spared = urllib.parse.quote(json.dumps({"label": ["f"], "label!": ["a", "b"]}))
        daemon.http("POST", f"/v1.41/containers/prune?filters={spared}")
        found[daemon].append(listed(daemon, "all=1"))
        daemon.http("DELETE", "/v1.41/containers/f-one?force=1")
        daemon.http("DELETE", "/v1.41/containers/f-net?force=1")
        daemon.http("DELETE", "/v1.41/networks/f-net")
    assert found[host] == found[peer] and found[host][-1] == ["/f-net", "/f-one"]


@pytest.mark.parametrize("arguments, status, expected", [
    ("", 200, ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]),
    ("aux", 200, ["USER", "PID", "%CPU", "%MEM", "VSZ", "RSS", "TTY", "STAT", "START", "TIME", "COMMAND"]),
    ("-eo pid,args", 200, ["PID", "COMMAND"]),
    ("-eo args", 500, "Couldn't find PID field in ps output"),
    ("--bogus", 500, "ps: error: unknown gnu long option"),
    ("-eo ppid=PID", 400, 'specifying "ppid=PID" is not allowed'),
])
def test_top(host: Host, arguments: str, status: int, expected: Any) -> None:
    identity = host.create("sh", "-c", "sleep 1000 & exec sleep 999")
    host.api("POST", f"/containers/{identity}/start")
    wait_for(lambda: sorted(row[-1] for row in host.api("GET", f"/containers/{identity}/top")["Processes"])
             == ["sleep 1000", "sleep 999"])
    path = f"/containers/{identity}/top?ps_args={urllib.parse.quote(arguments)}"
    shown = host.api("GET", path, status=status)
    if status != 200:
        assert shown["message"] == expected
        return
    assert shown["Titles"] == expected
    assert {row[-1] for row in shown["Processes"]} == {"sleep 999", "sleep 1000"}
    pid = str(host.inspect(identity)["State"]["Pid"])
    assert pid in [row[expected.index("PID")] for row in shown["Processes"]]


def test_top_without_ps(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc tells what ps would: here of this very process.  Both take its start from two clocks, and may be
    a second, and so a minute, apart for part of each second."""
    monkeypatch.setenv("COLUMNS", "10000")

    def told(path: str) -> dict[str, str]:
        monkeypatch.setenv("PATH", path)
        titles, [row] = dockerd.list_processes("-ef", [os.getpid()])
        return {title: field for title, field in zip(titles, row) if title not in ("C", "TIME")}

    wait_for(lambda: told(PATH) == told("/nonexistent"), f"{told(PATH)} to be {told('/nonexistent')}")
    with pytest.raises(dockerd.DockerError, match="ps: No such file"):
        dockerd.list_processes("aux", [os.getpid()])


def test_cli_lifecycle(docker: Docker) -> None:
    docker("create", "--name", "one", "--label", "a=b", "busybox", "sleep", NEVER)
    assert docker("update", "--restart", "on-failure:3", "one").strip() == "one"
    docker("start", "one")
    assert "sleep" in docker("top", "one")
    assert docker("top", "one", "-o", "pid,comm").split()[:2] == ["PID", "COMMAND"]
    docker("pause", "one")
    assert "(Paused)" in docker("ps")
    docker("unpause", "one")
    docker("rename", "one", "two")
    docker("restart", "-t", "0", "two")
    assert docker("ps", "--format", "{{.Names}}").split() == ["two"]
    docker("stop", "-t", "0", "two")
    assert docker("container", "prune", "-f", "--filter", "label=a=c").split()[-1] == "0B"
    assert "Deleted Containers" in docker("container", "prune", "-f", "--filter", "label=a=b")


def health_check(*test: str, **milliseconds: int) -> dict[str, Any]:
    """Healthcheck of Config: a probe every 50 ms unless told otherwise; Retries is a number."""
    given = {"Interval": 50, "Timeout": 10000, **milliseconds}
    return {"Test": list(test), "Retries": given.pop("Retries", 2),
            **{key: value * 10**6 for key, value in given.items()}}


def health(host: Host, name: str = "one") -> Any:
    """State.Health of a container."""
    return host.inspect(name)["State"].get("Health")


def test_health(host: Host) -> None:
    """From starting to unhealthy to healthy; a pause, a stop and a restart on the way."""
    host.create("sleep", NEVER, name="one", Healthcheck=health_check("CMD-SHELL", "echo looked; test -e /ok"))
    start = time.time()
    threads = host.api("GET", "/info")["NGoroutines"]
    host.api("POST", "/containers/one/start")
    assert health(host)["Status"] in ("starting", "unhealthy")
    unhealthy = wait_for(lambda: (shown := health(host))["Status"] == "unhealthy" and shown)
    assert unhealthy["FailingStreak"] >= 2 and len(unhealthy["Log"]) >= 2
    assert {(entry["ExitCode"], entry["Output"]) for entry in unhealthy["Log"]} == {(1, "looked\n")}
    wait_for(lambda: health(host)["FailingStreak"] > 5)
    assert len(health(host)["Log"]) == 5
    wait_for(lambda: host.api("GET", "/info")["NGoroutines"] <= threads, "no thread for a container")
    listed = host.api("GET", "/containers/json?filters=" + urllib.parse.quote('{"health": ["unhealthy"]}'))
    assert [shown["Status"].endswith("(unhealthy)") for shown in listed] == [True]
    touch = host.api("POST", "/containers/one/exec", {"Cmd": ["touch", "/ok"]})["Id"]
    host.api("POST", f"/exec/{touch}/start", {"Detach": True})
    wait_for(lambda: health(host)["Status"] == "healthy")
    assert health(host)["FailingStreak"] == 0
    assert host.api("GET", "/containers/json")[0]["Status"].endswith("(healthy)")
    host.api("POST", "/containers/one/pause")
    paused = health(host)
    assert paused["Status"] == "unhealthy" and health(host)["Log"] == paused["Log"]
    host.api("POST", "/containers/one/unpause")
    wait_for(lambda: health(host)["Status"] == "healthy")
    host.api("POST", "/containers/one/stop?t=0")
    assert health(host)["Status"] == "unhealthy"
    assert [action for action, _ in events_since(host, start) if action.startswith("health")] == [
        "health_status: unhealthy", "health_status: healthy", "health_status: healthy"]
    told = [(action.partition(":")[0], list(attributes)) for action, attributes in events_since(host, start)]
    assert told[:4] == [("start", []), ("exec_create", ["execID"]), ("exec_start", ["execID"]),
                        ("exec_die", ["execID", "exitCode"])]


@pytest.mark.parametrize("check, code, output", [
    (health_check("CMD", "nosuch"), -1, "OCI runtime exec failed: exec failed: unable to start container "
     'process: exec: "nosuch": executable file not found in $PATH: unknown'),
    (health_check("CMD-SHELL", "echo out; exec sleep 100", Timeout=300), -1,
     "Health check exceeded timeout (300ms): out\n"),
    (health_check("CMD-SHELL", "head -c 200000 /dev/zero | tr '\\0' x; exit 3"), 3, "x" * 4096 + "..."),
    (health_check("CMD", "sh", "-c", "echo err >&2; exit 0"), 0, "err\n"),
])
def test_results_of_probes(host: Host, check: dict[str, Any], code: int, output: str) -> None:
    host.create("sleep", NEVER, name="one", Healthcheck=check)
    host.api("POST", "/containers/one/start")
    shown = wait_for(lambda: health(host)["Log"] and health(host))
    assert (shown["Log"][0]["ExitCode"], shown["Log"][0]["Output"]) == (code, output)
    assert shown["Status"] == "healthy" if code == 0 else shown["FailingStreak"] >= 1


def test_a_container_that_stops_its_probes(host: Host) -> None:
    """Its root may stop a probe on its way to execve, where it would have waited for ever."""
    stop = "for p in /proc/[0-9]*; do p=${p#/proc/}; [ $p = 1 ] || kill -STOP $p 2>/dev/null; done"
    check = health_check("CMD", "true", Timeout=200)
    host.create("sh", "-c", f"while :; do {stop}; done", name="one", Healthcheck=check)
    host.api("POST", "/containers/one/start")
    wait_for(lambda: any("exceeded timeout" in entry["Output"] for entry in health(host)["Log"]))


@pytest.mark.parametrize("test", [["NONE"], [], ["CMD"], ["BOGUS", "x"]])
def test_no_health_check(host: Host, test: list[str]) -> None:
    host.create("sleep", NEVER, name="one", Healthcheck=health_check(*test))
    host.api("POST", "/containers/one/start")
    assert health(host) is None


def test_failures_do_not_count_in_the_start_period(host: Host) -> None:
    """There the start interval holds, and the first success ends it."""
    hour = 3600 * 1000
    host.create("sleep", NEVER, name="one", Healthcheck=health_check(
        "CMD", "test", "-e", "/ok", Interval=hour, StartPeriod=hour, StartInterval=50))
    host.api("POST", "/containers/one/start")
    shown = wait_for(lambda: len(health(host)["Log"]) == 5 and health(host))
    assert (shown["Status"], shown["FailingStreak"]) == ("starting", 0)
    touch = host.api("POST", "/containers/one/exec", {"Cmd": ["touch", "/ok"]})["Id"]
    host.api("POST", f"/exec/{touch}/start", {"Detach": True})
    wait_for(lambda: health(host)["Status"] == "healthy")


def test_the_health_check_of_an_image(host: Host, busybox: bytes) -> None:
    host.import_image("checked", busybox, 'HEALTHCHECK --interval=50ms CMD ["true"]')
    host.create("sleep", NEVER, name="one", image="checked")
    host.create("sleep", NEVER, name="none", image="checked", Healthcheck={"Test": ["NONE"]})
    for name in ("one", "none"):
        host.api("POST", f"/containers/{name}/start")
    wait_for(lambda: health(host)["Status"] == "healthy")
    assert health(host, "none") is None
    host.remove_all()
    host.api("DELETE", "/images/checked")


def test_health_under_another_daemon(new_host: Callable[..., Host], busybox: bytes) -> None:
    """With live restore the next daemon goes on with the probes, from the state that was."""
    host = new_host("--live-restore")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    host.create("sleep", "1000", name="one", StopTimeout=0, Healthcheck=health_check("CMD", "true"))
    host.api("POST", "/containers/one/start")
    wait_for(lambda: health(host)["Status"] == "healthy")
    host.kill()
    host.start()
    start = time.time()
    assert health(host)["Status"] == "healthy"
    wait_for(lambda: [event for event in events_since(host, start) if event[0].startswith("exec_die")])
    assert health(host)["Status"] == "healthy"
    host.api("DELETE", "/containers/one?force=1")


def test_an_unhealthy_container_is_restarted(host: Host) -> None:
    """Where its label asks for it: by force in the end, without a policy, until somebody stops it."""
    host.create("sleep", NEVER, name="one", StopTimeout=0, Labels={"dockerd.py.restart-unhealthy": "true"},
                Healthcheck=health_check("CMD", "false", Retries=1))
    start = time.time()
    host.api("POST", "/containers/one/start")
    wait_for(lambda: host.inspect("one")["RestartCount"] >= 2)
    host.api("POST", "/containers/one/stop")
    assert host.inspect("one")["State"]["Status"] == "exited"
    assert [event for event in events_since(host, start) if "exec" not in event[0]][:6] == [
        ("start", {}), ("health_status: unhealthy", {}), TERM, KILL, DIE, ("start", {})]


@pytest.mark.parametrize("seconds, text", [
    (1, "1s"), (0.3, "300ms"), (90, "1m30s"), (3600, "1h0m0s"), (1.5, "1.5s")])
def test_go_durations(seconds: float, text: str) -> None:
    assert dockerd.go_duration(seconds) == text


def test_pauses_between_probes(host: Host) -> None:
    """A pause at any moment of a probe holds no worker: ends of containers are seen all the while."""
    for number in range(6):
        host.create("sleep", NEVER, name=f"one{number}", Healthcheck=health_check("CMD", "true", Interval=1))
        host.api("POST", f"/containers/one{number}/start")
    with concurrent.futures.ThreadPoolExecutor(6) as pool:
        for action in ["pause", "unpause"] * 4 + ["pause"]:
            list(pool.map(functools.partial(host.api, "POST"),
                          [f"/containers/one{number}/{action}" for number in range(6)]))
    assert host.run("echo", "alive") == (0, b"alive\n")


def test_delays_of_restarts() -> None:
    """From 100 ms doubled to a minute; 10 seconds of running begin anew."""
    container, delays = dockerd.Container.__new__(dockerd.Container), []
    container._delay = 0.0
    container.state = types.SimpleNamespace(restarting=True, finished_at="then")  # type: ignore[assignment]
    container.parts = types.SimpleNamespace(  # type: ignore[assignment]
        later=lambda seconds, *task: delays.append(seconds))
    for ran in [0] * 12 + [9, 10, 0]:
        container._plan_restart("then", ran)
    assert delays == [0.1 * 2 ** number for number in range(10)] + [60.0] * 3 + [0.1, 0.2]
    container._plan_restart("another end", 0)
    assert len(delays) == 15


def test_wait_returns_at_every_end(host: Host) -> None:
    """Also where a restart follows, for not-running and next-exit alike, as in Docker."""
    host.create("sh", "-c", "read x; exit 3", name="one", OpenStdin=True,
                HostConfig={"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 1}})
    host.api("POST", "/containers/one/start")
    waiting = [host.hijack(f"{API}/containers/one/wait?condition={condition}", upgrade=False)
               for condition in ("not-running", "next-exit")]
    stream = host.hijack(f"{API}/containers/one/attach?stdin=1&stream=1")
    stream.send(b"x\n")
    for wait in waiting:
        assert b'"StatusCode":3' in wait.read_until(b"}").replace(b" ", b"")
        wait.close()
    stream.close()
    wait_for(lambda: (shown := host.inspect("one"))["RestartCount"] == 1 and shown["State"]["Pid"])
    host.create("nosuch", name="never")  # why it does not run is told to who asks then, as in Docker
    host.http("POST", f"{API}/containers/never/start")
    assert host.api("POST", "/containers/never/wait") == {
        "StatusCode": 127, "Error": {"Message": host.inspect("never")["State"]["Error"]}}


def race_on_one_container(host: Host, clients: int, count: int) -> None:
    """So many clients do so many actions on one container at random: each gets one of Docker's answers, and
    nothing is left."""
    actions = {  # (method, path): what Docker may answer
        ("POST", "/containers/one/start"): (204, 304, 404, 409),
        ("POST", "/containers/one/stop?t=0"): (204, 304, 404),
        ("POST", "/containers/one/restart?t=0"): (204, 404, 409),
        ("POST", "/containers/one/kill"): (204, 404, 409),
        ("POST", "/containers/one/pause"): (204, 404, 409),
        ("POST", "/containers/one/unpause"): (204, 404, 409),
        ("POST", "/containers/one/rename?name=two"): (204, 400, 404, 409),
        ("POST", "/containers/two/rename?name=one"): (204, 400, 404, 409),
        ("DELETE", "/containers/one"): (204, 404, 409),
        ("DELETE", "/containers/two?force=1"): (204, 404, 409),
        ("POST", "/containers/create?name=one"): (201, 409),
    }
    body = {"Image": "busybox", "Cmd": ["sleep", "1000"], "HostConfig": {
        "NetworkMode": "none", "RestartPolicy": {"Name": "always"}}}

    def client(seed: int) -> list[Any]:
        chance, wrong = random.Random(seed), []
        for _ in range(count):
            (method, path), allowed = chance.choice(list(actions.items()))
            answer = host.http(method, API + path, body if "create" in path else None)
            if answer.status not in allowed:
                wrong.append((method, path, answer.status, answer.body))
        return wrong

    with concurrent.futures.ThreadPoolExecutor(clients) as pool:
        assert list(pool.map(client, range(clients))) == [[]] * clients
    host.remove_all()
    assert host.api("GET", "/containers/json?all=1") == []
    assert os.listdir(os.path.join(host.data_root, "containers")) == []
    wait_for(lambda: not [path for path in host.cgroups() if not path.endswith(host.cgroup_parent)])
    assert not [pid for pid in host.own_processes() if "sleep" in read_text(f"/proc/{pid}/cmdline")]


def test_races_on_one_container(host: Host) -> None:
    race_on_one_container(host, 6, 40)


def test_a_container_that_is_killed_is_not_paused(host: Host) -> None:
    """In the freezer of cgroup v1 it would not die."""
    identity = host.create("sleep", NEVER)
    host.api("POST", f"/containers/{identity}/start")
    path, freeze, thaw = next(
        (directory + name, freeze, thaw) for directory in host.cgroups() if identity in directory
        for name, freeze, thaw in (("/freezer.state", "FROZEN", "THAWED"), ("/cgroup.freeze", "1", "0"))
        if os.path.exists(directory + name))
    Path(path).write_text(freeze)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        killed = pool.submit(host.http, "POST", f"{API}/containers/{identity}/kill")
        wait_for(lambda: "kill" in dict(events_since(host, 1, container=[identity])))
        answer = host.http("POST", f"{API}/containers/{identity}/pause")
        with contextlib.suppress(OSError):
            Path(path).write_text(thaw)
        assert (answer.status, killed.result().status) == (409, 204)
    assert host.api("POST", f"/containers/{identity}/wait")["StatusCode"] == 137
    host.api("DELETE", f"/containers/{identity}")


@pytest.mark.parametrize("whose", ["daemon", "shim"])
def test_no_process_is_left_where_descriptors_run_out(new_host: Callable[..., Host], busybox: bytes,
                                                      whose: str) -> None:
    """Starts and execs with ever fewer descriptors: each fails or not, and what failed leaves nothing."""
    import resource
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    box = Execs(host)
    assert host.process
    shim, = shims(host)
    pid = shim if whose == "shim" else host.process.pid
    limits, statuses = resource.prlimit(pid, resource.RLIMIT_NOFILE), set()
    held = len(os.listdir(f"/proc/{pid}/fd"))
    first = held + 2 if whose == "daemon" else 3  # not one, not even to look for orphans
    for limit in range(first, first + 30):
        identity, dying = host.create("sleep", NEVER), Execs(host)
        victim = host.inspect(dying.id)["State"]["Pid"]
        instance = host.api("POST", f"/containers/{box.id}/exec", {"Cmd": ["sleep", NEVER]})["Id"]
        resource.prlimit(pid, resource.RLIMIT_NOFILE, (limit, limits[1]))
        os.kill(victim, signal.SIGKILL)
        for path in (f"/containers/{identity}/start", f"/exec/{instance}/start"):
            with contextlib.suppress(OSError, http.client.HTTPException):  # not even a connection
                body = {"Detach": True} if "exec" in path else None
                statuses.add(host.http("POST", API + path, body).status)
        resource.prlimit(pid, resource.RLIMIT_NOFILE, limits)
        host.api("POST", f"/containers/{dying.id}/wait")
        runs = host.inspect(identity)["State"]["Running"]
        lives = host.api("GET", f"/exec/{instance}/json")["Running"]
        children = f"/proc/{shim}/task/{shim}/children"
        wait_for(lambda: len(read_text(children).split()) == 1 + runs + lives)  # noqa: B023
        host.api("DELETE", f"/containers/{identity}?force=1")
        if lives:
            os.kill(host.api("GET", f"/exec/{instance}/json")["Pid"], signal.SIGKILL)
        wait_for(lambda: len(read_text(children).split()) == 1)  # noqa: B023
    assert {204, 200, 500} <= statuses, statuses
    wait_for(lambda: len(os.listdir(f"/proc/{pid}/fd")) <= held + 2)
    assert shims(host) == [shim]
    host.api("DELETE", f"/containers/{box.id}?force=1")


def test_a_root_lingers_behind_the_end_of_a_run(host: Host) -> None:
    """One in which nothing was written is unmounted with others a moment later, but before the next run or a
    copy mounts it anew."""
    def roots() -> int:
        assert host.process
        place, found = f"/proc/{host.process.pid}/fd", 0
        for fd in os.listdir(place):
            with contextlib.suppress(FileNotFoundError):
                found += dockerd.FILE_SYSTEMS.get(dockerd.statfs_type(f"{place}/{fd}")) == "overlayfs"
        return found

    wait_for(lambda: roots() == 0)
    for command in ("true", "echo run >> /file"):
        identity = host.create("sh", "-c", command)
        for _ in range(3):
            host.api("POST", f"/containers/{identity}/start")
            host.api("POST", f"/containers/{identity}/wait")
        assert roots() <= 1
        copied = host.http("GET", f"{API}/containers/{identity}/export").body
        with tarfile.open(fileobj=io.BytesIO(copied)) as archive:
            written = [archive.extractfile(entry).read() for entry in archive if entry.name == "file"]  # type: ignore
        assert (roots(), written) == (0, [b"run\n" * 3] if "file" in command else [])
        host.api("POST", f"/containers/{identity}/start")
        host.api("POST", f"/containers/{identity}/wait")
        host.api("DELETE", f"/containers/{identity}")
        wait_for(lambda: roots() == 0)


@pytest.mark.torture
def test_many_races_on_one_container(host: Host) -> None:
    def descriptors() -> int:
        return len(os.listdir(f"/proc/{host.process.pid}/fd")) if host.process else 0

    race_on_one_container(host, 4, 50)
    before = descriptors()
    for _ in range(5):
        race_on_one_container(host, 16, 200)
    wait_for(lambda: descriptors() <= before + 2, "no descriptor is left")


# Whole sessions


CLI_SESSION = r"""
create --name one --net none busybox sh -c 'echo out; sleep .1; echo err >&2; exit 3'
create --name one --net none busybox true
create --pull never --name a nosuchimage:1 true
start one
wait one
logs one
logs --tail 1 one
logs --tail x one
logs --since 1h one
logs --since bad one
logs --until 1h one
logs --details one
logs -t nosuch
logs
start -a one
start -ai one
start one one
start nosuch
start one nosuch
ps -a --format '{{.Names}} {{.Image}} {{.Command}} {{.Ports}} {{.Mounts}} {{.Networks}} {{.Labels}}'
ps -aq --filter name=one
ps -a --format '{{.Status}}' --filter name=one
inspect one --format '{{.State.Status}} {{.State.ExitCode}} {{.State.Error}} {{.Path}} {{.Args}}'
inspect nosuch
inspect one nosuch --format '{{.Name}}'
container inspect nosuch
rename one two
rename two two
rename two ""
rename two 'bad name'
rename nosuch x
rename two one
run --name one --net none busybox true
once busybox sh -c 'exit 7'
once busybox nosuchcommand
once busybox /etc/passwd
once busybox /nosuch/dir
once -w relative busybox true
once -u nosuch busybox id
once -u bob busybox id
once -u bob:wheel busybox id
once -u 5:6 --group-add 7 --group-add wheel busybox id
once --group-add nosuch busybox id
once -e A=b -e C busybox env
once --entrypoint echo busybox x y
once --entrypoint '' busybox echo x
once -h name --domainname dom busybox hostname -f
once --read-only busybox touch /x
once --tmpfs /t:size=1m busybox df /t
once --cap-drop ALL busybox chown bob /tmp
once --cap-add NOSUCH busybox true
once --security-opt nosuch busybox true
once --security-opt seccomp=/nosuch busybox true
once --security-opt no-new-privileges busybox grep NoNewPrivs /proc/self/status
once --ulimit nofile=99:100 busybox sh -c 'ulimit -n; ulimit -Hn'
once --ulimit nofile=100:99 busybox true
once --sysctl net.ipv4.ip_forward=1 busybox cat /proc/sys/net/ipv4/ip_forward
once --sysctl kernel.nosuch=1 busybox true
once --shm-size 1m busybox df /dev/shm
once --init busybox true
once --pid host --name p busybox true
once --pid container:nosuch busybox true
once --ipc none busybox ls /dev/shm
once --ipc bad busybox true
once --uts bad busybox true
once --userns bad busybox true
once --cgroupns bad busybox true
once --device /dev/nosuch busybox true
once --device /dev/zero:/dev/mine:r busybox ls /dev/mine
once --device /dev/zero:/dev/mine:x busybox true
once --device-cgroup-rule bad busybox true
once --gpus all busybox true
once --runtime nosuch busybox true
once --isolation hyperv busybox true
once --stop-signal NOSUCH busybox true
once --memory 1m busybox true
once --memory 8m --memory-swap 7m busybox true
once --memory-swap 7m busybox true
once --memory-reservation 9m --memory 8m busybox true
once --memory-swappiness 101 busybox true
once --cpus 1000 busybox true
once --cpus 1 --cpu-period 1000 busybox true
once --cpu-period 1 busybox true
once --cpu-quota 1 busybox true
once --cpuset-cpus 99 busybox true
once --cpuset-cpus x busybox true
once --cpuset-mems 9 busybox true
once --cpu-shares 2 busybox true
once --pids-limit 5 busybox true
once --blkio-weight 5 busybox true
once --device-read-bps /dev/nosuch:1m busybox true
once --oom-score-adj 1001 busybox true
once --oom-score-adj 5 busybox cat /proc/self/oom_score_adj
once --restart always busybox true
run --name r --net none --restart nosuch busybox true
run --name r --net none --restart no:3 busybox true
run --name r --net none --restart on-failure:-1 busybox true
once --log-driver nosuch busybox true
once --log-opt nosuch=1 busybox true
once --log-opt max-size=x busybox true
once --log-driver none busybox echo x
run --name nolog --net none --log-driver none busybox echo x
logs nolog
once --health-interval 1ns busybox true
once --health-cmd true --no-healthcheck busybox true
once -v /nosuch:relative busybox true
once -v relative/x:/x busybox true
once -v x:/y:bad busybox true
once --mount type=bind,src=/nosuch,dst=/x busybox true
once --mount type=nosuch,dst=/x busybox true
once --mount type=tmpfs,dst=/x,tmpfs-size=1m busybox df /x
run --rm --net nosuch busybox true
once -p 1:1 --name published busybox true
once -p x:1 busybox true
once --link nosuch:x busybox true
once --volumes-from nosuch busybox true
once --annotation a=b busybox true
once -l k=v --label-file /nosuch busybox true
run -d --rm --net none -a stdout busybox true
run -d -it --net none --name tty busybox sh
run -d --net none --name runs -l role=web --stop-timeout 0 busybox sleep 1000
run -d --net none --name stops busybox sh -c 'trap "exit 9" TERM; while :; do sleep .05; done'
exec runs echo x
exec runs sh -c 'exit 5'
exec runs /etc/passwd
exec -w /nosuch runs true
exec -w /etc runs pwd
exec -u bob runs id
exec -u nosuch runs id
exec -e A=b -e C=d runs sh -c 'echo $A $C $HOSTNAME' --
exec -e =x runs true
exec -d runs sleep 1000
exec -t runs tty
exec -it runs sh
hello | exec -i runs cat
exec nosuch true
exec one true
exec runs
exec --detach-keys bad runs true
top runs
top runs -o pid,comm
top runs -o nosuch
top runs aux
top one
top nosuch
ps --filter status=running --format '{{.Names}}'
ps -a --filter status=nosuch
ps -a --filter nosuch=1
ps -a --filter exited=3 --format '{{.Names}}'
ps -a --filter exited=x
ps -a --filter label=role=web --format '{{.Names}}'
ps -a --filter label=role --format '{{.Names}}'
ps -a --filter ancestor=busybox --format '{{.Names}}' --no-trunc
ps -a --filter ancestor=nosuch --format '{{.Names}}'
ps -a --filter before=runs --format '{{.Names}}'
ps -a --filter since=runs --format '{{.Names}}'
ps -a --filter since=nosuch
ps -a --filter health=none --format '{{.Names}}'
ps -a --filter health=nosuch
ps -a --filter volume=/x
ps -a --filter network=none --format '{{.Names}}'
ps -a --filter network=nosuch
ps -a --filter is-task=x
ps -a --filter publish=80
ps -a --filter publish=x
ps -a --filter expose=80/tcp
ps -a --filter id=nosuch
ps -n 2 --format '{{.Names}}'
ps -l --format '{{.Names}}'
ps -as --format '{{.Names}}' --filter name=runs
pause runs
pause runs
exec runs true
top runs -o pid
stop runs -t 0 --time 0
start runs
pause runs
restart -t 0 runs
unpause runs
pause one
unpause one
pause nosuch
pause runs
kill runs
ps -a --filter name=runs --format '{{.Status}}'
kill runs
kill nosuch
kill -s NOSUCH stops
kill -s 0 stops
kill -s USR1 one
kill -s 99 stops
stop stops
inspect stops --format '{{.State.ExitCode}}'
stop stops
stop nosuch
stop -t -5 one
start stops
stop -s KILL stops
start stops
restart -t 1 stops nosuch
wait nosuch
wait one stops2
update --memory 64m runs
update --memory 1m runs
update --restart always --memory 64m --memory-swap -1 one
update --restart nosuch one
update --cpus 1000 one
update nosuch
update nosuch --memory 64m
update --cpuset-cpus 99 one
update --pids-limit 7 one
update --restart no one
update --memory-swap 32m one
inspect one --format '{{.HostConfig.RestartPolicy.Name}} {{.HostConfig.Memory}} {{.HostConfig.PidsLimit}}'
attach one
attach nosuch
attach --no-stdin --sig-proxy=false one
port one
port one 80
port runs
port nosuch
diff one
diff nosuch
stats --no-stream --format '{{.Name}} {{.PIDs}}' stops
stats --no-stream --format '{{.Name}} {{.PIDs}} {{.CPUPerc}} {{.MemUsage}}' one
stats --no-stream nosuch
events --since 0 --until 1
events --until bad
events --filter nosuch=1 --until 1 --since 0
events --filter type=nosuch --until 1 --since 0
cp one:/nosuch -
cp nosuch:/x -
cp one:/etc/group /nosuch/dir/x
export nosuch
commit nosuch
commit one 'Bad Name'
rm runs2
rm stops
rm -f stops
rm one one
rm nosuch
rm -f nosuch
rm -v runs
rm -f tty
rm -l one
container prune -f --filter nosuch=1
container prune -f --filter until=bad
container prune -f --filter label=nosuch
run -d --net none --name aa busybox true
wait aa
container prune -f
run --net none --name h1 --health-cmd 'exit 0' --health-interval 200ms -d busybox sleep 1000
inspect h1 --format '{{json .Config.Healthcheck}}'
rm -f h1
run --net none --name o1 --restart on-failure:2 busybox sh -c 'echo x; exit 4'
rm -f o1
run --rm -i --net none busybox cat
in put | run --rm -i --net none busybox cat
in put | run --rm -i -a stdin --net none busybox cat
run --rm -t --net none busybox sh -c 'tty; stty size'
run --rm -it --net none busybox true
once --sig-proxy=false busybox echo x
once --cidfile /nosuch/x busybox true
once --env-file /nosuch busybox true
once --expose x busybox true
once --dns x busybox true
once --add-host x busybox true
once --add-host a:1.2.3.4 busybox cat /etc/hosts
once --mac-address bad busybox true
once --ip 1.2.3.4 busybox true
info --format '{{.Containers}} {{.ContainersRunning}} {{.OSType}} {{.CgroupVersion}} {{.CgroupDriver}}'
volume inspect nosuch
network inspect nosuch
"""
PY_SESSION = r"""
c.ping()
c.containers.run("busybox", "echo x", network_mode="none", remove=True)
c.containers.run("busybox", ["sh", "-c", "echo err >&2; exit 3"], network_mode="none", remove=True)
c.containers.run("busybox", "sleep 1000", network_mode="none", detach=True, name="py").status
py.status
c.containers.get("nosuch")
py.attrs["State"]["Status"]
sorted(py.attrs)
sorted(py.attrs["State"])
py.exec_run("echo x")
py.exec_run("sh -c 'echo o; echo e >&2; exit 4'", demux=True)
py.exec_run("id", user="bob")
py.exec_run("id", user="nosuch")
py.exec_run("pwd", workdir="/etc", environment={"A": "b"})
py.exec_run("true", detach=True)
py.exec_run("cat", tty=True, stdin=False, detach=True)
py.top()["Titles"]
py.top(ps_args="nosuch")
py.pause()
py.exec_run("true")
py.pause()
c.containers.list(filters={"status": "paused"})[0].name
py.unpause()
py.rename("py2")
py2.rename("a b")
py2.update(mem_limit="64m", memswap_limit="128m")
py2.update(mem_limit="1m")
py2.update(restart_policy={"Name": "on-failure", "MaximumRetryCount": 2})
py2.update(restart_policy={"Name": "nosuch"})
py2.resize(10, 20)
py2.logs()
py2.logs(stdout=False, stderr=False)
py2.stop(timeout=0)
py2.stop()
py2.wait()
py2.wait(condition="nosuch")
py2.start()
py2.restart(timeout=0)
py2.remove()
sorted(py2.stats(stream=False))
py2.remove(force=True)
py2.remove(force=True)
c.containers.prune(filters={"label": "nosuch"})
c.containers.prune(filters={"nosuch": "x"})
c.containers.list(filters={"nosuch": "x"})
c.containers.list(all=True, filters={"exited": "x"})
c.containers.list(all=True, before="nosuch")
create(name="py3", healthcheck={"test": ["CMD", "true"], "interval": 5}).attrs["Name"]
create(name="py3", healthcheck={"test": ["CMD", "true"]}).attrs["Config"]["Healthcheck"]
create(name="py3")
create(name="/py/4")
create(mem_limit="1m")
create(restart_policy={"Name": "always"}, auto_remove=True)
create(cap_add=["NOSUCH"])
create(log_config=types.LogConfig(type="nosuch"))
create(pid_mode="container:nosuch").start()
create(stop_signal="NOSUCH")
create(mounts=[types.Mount("/x", "/nosuch", type="bind")])
py3.export().__class__.__name__
py3.get_archive("/etc/group")[1]["name"]
py3.put_archive("/tmp", tar_of({"x": b"y"}))
py3.commit("py", "1", message="m", author="a", changes="ENV A=b").attrs["Config"]["Env"]
py3.remove(v=True)
py3.reload()
c.api.exec_inspect("nosuch")
c.api.exec_start("nosuch")
c.api.exec_create("nosuch", "true")
c.api.wait("nosuch")
c.api.port("nosuch", 1)
"""


class NewerPeer(Peer):
    """The real dockerd of a later Debian, with the runtime of this one's."""

    def command(self) -> list[str]:
        """The daemon's command line, without bridge and firewall."""
        self.environment["PATH"] = f"{CACHE}/newer/usr/bin:{self.environment['PATH']}"
        return [f"{CACHE}/newer/usr/sbin/dockerd", *super().command()[1:]]


def without_chance(text: str, host: Host) -> str:
    """What was printed, without what no two daemons have in common, and what the machine decides."""
    for pattern, replacement in (
            (re.escape(host.directory), "DIR"), (r"\b([0-9a-f]{64}|[0-9a-f]{12})\b", "ID"),
            (r"(?m)^(warning: )?ipv4 forwarding is disabled.*\n|', 'ipv4 forwarding.*working", ""),
            (r"\['ipv4 forwarding[^]]*\]", "none"), (r"(?m)^time=.*\n", ""),
            ("http.docker://localhost|see 'docker run --help'.\n", ""),
            ("runc create failed: |failed to create task for container: |: unknown(?=[^\\w ]|$)", ""),
            (r"less than a second|about a minute|\d+ (second|minute)s?", "SOME"),
            (r"(?m)^(root *)?\d+( .*(sleep)|$)", r"\3")):
        text = re.sub(pattern, replacement, text.lower() if replacement == "DIR" else text)
    return text


def cli_session(host: Host, program: str) -> list[tuple[str, Any]]:
    """Each line of CLI_SESSION with what came of it: exit code, stdout, stderr."""
    docker, found = Docker(program, host), []
    for line in filter(None, CLI_SESSION.split("\n")):
        typed, _, command = line.rpartition(" | ")
        words = shlex.split(command.replace("once ", "run --rm --net none "))
        done = docker.run(*words, input=typed, status=None)
        printed = [without_chance(text, host) for text in (done.stdout, done.stderr)]
        found.append((line, (done.returncode, printed)))
    return found


def py_session(host: Host, program: str) -> list[tuple[str, Any]]:
    """Each line of PY_SESSION with its value, or its error."""
    found = []
    client = docker_py.DockerClient(base_url=host.url, version="1.41", timeout=60)

    class Names(dict[str, Any]):
        def __missing__(self, name: str) -> Any:
            if name[:2] != "py":
                raise KeyError(name)
            return client.containers.get(name)

    names = Names(c=client, types=docker_py.types, tar_of=tar_of, create=functools.partial(
        client.containers.create, "busybox", "true", network_mode="none"))
    for line in filter(None, PY_SESSION.split("\n")):
        try:
            value = repr(eval(line, {}, names))
        except docker_py.errors.DockerException as error:
            value = f"{type(error).__name__}: {error}"
        found.append((line, without_chance(value, host)))
    client.close()
    return found


@pytest.mark.torture
@pytest.mark.timeout(900)
@pytest.mark.parametrize("session", [*sorted(docker_clis()), "docker-py"])
def test_whole_sessions_are_the_real_daemons(
        bridgeless: Host, peer: Host, busybox: bytes, session: str) -> None:
    """Each line through a real client has the result that one of the real daemons, 20.10 and 26.1, gives."""
    newer = NewerPeer()
    try:
        newer.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        run = functools.partial(cli_session if session in docker_clis() else py_session,
                                program=docker_clis().get(session, ""))
        with concurrent.futures.ThreadPoolExecutor() as pool:
            ours, *theirs = pool.map(run, (bridgeless, peer, newer))
        wrong = [(own, *others) for own, *others in zip(ours, *theirs) if own not in others]
        assert not wrong, "\n".join(map(str, wrong))
    finally:
        newer.remove_all()
        newer.close()
        bridgeless.remove_all()


# ------------------------------------------------------------------------------------------------------------
# Inside a container
#
# What a container sees is what it sees under the real dockerd: the same script runs under both, and each line
# that differs must stand in DIFFERENCES, with the reason why nobody can use it.
# ------------------------------------------------------------------------------------------------------------

INSIDE = r"""
section() { echo "## $*"; }
section id; id
section env; env | grep -v ^SHLVL
section hostname; hostname; cat /etc/hostname
section hosts; cat /etc/hosts
section resolv.conf; cat /etc/resolv.conf
section mounts; cat /proc/self/mountinfo
section dev; ls -l /dev /dev/pts /dev/shm /dev/mqueue
section status; cat /proc/self/status
section cgroup; cat /proc/self/cgroup
section ulimit; ulimit -a; cat /proc/self/limits
section fd; ls -l /proc/self/fd; ls -l /proc/$$/fd
section attributes; cat /proc/self/attr/current; cat /proc/self/sessionid /proc/self/loginuid; echo; umask
section scheduling; cat /proc/self/oom_score_adj /proc/self/timerslack_ns /proc/$$/coredump_filter; nice
section stat1; cut -d' ' -f2,4-9 /proc/$$/stat; cat /proc/$$/comm
section signals; grep -E '^Sig(Blk|Ign|Cgt)' /proc/$$/status
section namespaces; for n in cgroup ipc mnt net pid pid_for_children time time_for_children user uts
  do echo $n $(readlink /proc/self/ns/$n); done
section root; pwd; ls -la / /etc
section masked; ls -ld /proc/kcore /proc/keys /proc/timer_list /proc/sysrq-trigger /proc/scsi /proc/acpi \
  /sys/firmware; wc -c /proc/keys /proc/timer_list; ls /proc/acpi /sys/firmware | wc -l
section cgroups; ls -ld /sys/fs/cgroup /sys/fs/cgroup/*
section sysctls; for x in net/ipv4/ip_unprivileged_port_start net/ipv4/ping_group_range net/ipv4/ip_forward \
  kernel/hostname kernel/domainname; do echo $x $(cat /proc/sys/$x); done
section network; ip addr; ip route; cat /proc/net/dev
section modes; stat -c '%n %a %u:%g %F %t,%T' / /dev /dev/* /dev/pts/* /proc /sys /tmp /etc/hosts \
  /etc/hostname /etc/resolv.conf /etc/mtab /.dockerenv; df -P /dev /dev/shm | awk '{print $1, $2, $6}'
section attempts; mount -t tmpfs x /tmp; mknod /tmp/n b 8 0 && head -c1 /tmp/n
  echo x > /proc/sys/kernel/hostname; echo x > /proc/sysrq-trigger; date -s 00:00 >/dev/null
  unshare -m true; unshare -U true; hostname foo; touch /sys/x
  mkdir /sys/fs/cgroup/memory/x; head -c1 /dev/mem; chroot / true && echo chroot; nice -n -5 true; swapoff -a
  mknod /dev/x c 1 3 && echo mknod; chown 1:1 /tmp && echo chown
  ping -c1 -W1 127.0.0.1 >/dev/null && echo ping
  echo 0 > /proc/self/oom_score_adj && echo oom; dmesg | wc -l; insmod /x; losetup -f; renice -n -1 $$
section end
"""

# What stands for values that are other ones in each container.
NORMALISED = [
    (r"\b[0-9a-f]{64}\b", "ID"),
    (r"\b[0-9a-f]{12}\b", "SHORT"),
    (r"/tmp/dockerd-host-\w+", "DIRECTORY"),
    (r"dockerd-host-\w+", "HOST"),
    (r"(lowerdir|upperdir|workdir)=[^, \n]*", r"\1=LAYERS"),
    (r"pipe:\[\d+\]", "pipe"),
    (r"[A-Z][a-z][a-z] +\d+ +\d\d:\d\d", "DATE"),
    (r"^\d+ \d+ 0:\d+ ", "MOUNT 0:N "),
    (r"^\d+ \d+ (\d+:\d+) ", r"MOUNT \1 "),
    (r"^(Vm\w+|Rss\w+|voluntary_ctxt_switches|nonvoluntary_ctxt_switches|SigQ|HugetlbPages):.*", r"\1"),
    # Signals 32 and 33 are the C library's own: the peer passes on that a parent of the tests ignores them.
    (r"^(SigIgn:\s+0{7})[01][08]", r"\g<1>00"),
    (r"^(PPid|NSsid|NSpgid):\s+\d{3,}$", r"\1 of the host"),
    (r"^(Tgid|Pid|NStgid|NSpid|Ngid|NSpgid):\s+\d+$", r"\1"),
    (r"^(dr-xr-xr-x) +\d+( .* (proc|sys))$", r"\1 N\2"),
    (r"^\(sh\) \d{3,} \d{3,} \d{3,} ", "(sh) of the host "),
    (r"^((?:dr|l|-|c)\S+ +)\d+( +root +root +)\d+( DATE \.{0,2}$)", r"\1N\2N\3"),
]

# (section, what only we have, what only the peer has, why nobody can use it): regular expressions of one
# line, "" for none.
DIFFERENCES = [
    (
        "mounts",
        r"MOUNT 0:N / / r[ow],relatime - overlay overlay rw(,\w+dir=LAYERS){3}(,uuid=on)?",
        r"MOUNT 0:N / / r[ow],relatime master:\d+ - overlay overlay rw(,\w+dir=LAYERS){3}",
        "private, as nothing of it was ever mounted on the host; the kernel's choice of a file system id",
    ),
    (
        "mounts",
        r"MOUNT 0:N /null /proc/interrupts rw,nosuid - tmpfs tmpfs rw,size=65536k,mode=755(,inode64)?",
        "",
        "masked since Docker 28: it tells about the host",
    ),
    (
        "network",
        r"    inet6 ::1/128 scope host ?|       valid_lft forever preferred_lft forever",
        "",
        "loopback has ::1 since Docker 26, as /etc/hosts says of localhost",
    ),
]
if not os.path.exists("/sys/fs/cgroup/cgroup.controllers"):  # several hierarchies
    DIFFERENCES += [
        (
            "cgroups",
            r"drwxr-xr-x   11 root     root           220 DATE /sys/fs/cgroup",
            r"dr-xr-xr-x   11 root     root           220 DATE /sys/fs/cgroup",
            "a mode without the owner's w does not bind root, who owns the directory under both",
        ),
        (
            "mounts",
            r"MOUNT 0:N / /sys/fs/cgroup ro,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,mode=755",
            r"MOUNT 0:N / /sys/fs/cgroup rw,nosuid,nodev,noexec,relatime - tmpfs tmpfs rw,mode=755",
            "nobody has anything to write beside the hierarchies",
        ),
    ]

# Options of `docker run` under which the inside is compared.
SITUATIONS = {
    "plain": ["--net", "none", "-h", "box"],
    "terminal": ["-t", "--net", "none", "-h", "box"],
    "host-network": ["--net", "host"],
    "user": ["--net", "none", "-h", "box", "-u", "bob", "--group-add", "44", "-w", "/home/bob", "-e", "X=1"],
    "limits": [
        "--net",
        "none",
        "-h",
        "box.example.com",
        "--cap-drop",
        "all",
        "--cap-add",
        "net_raw",
        "--read-only",
        "-m",
        "100m",
        "--cpus",
        ".5",
        "--pids-limit",
        "50",
        "--ulimit",
        "nofile=100:200",
        "--shm-size",
        "10m",
        "--oom-score-adj",
        "100",
        "--security-opt",
        "no-new-privileges",
    ],
    "namespaces": ["--net", "none", "--pid", "host", "--ipc", "host", "--uts", "host"],
    "standard-input": ["-i", "--net", "none", "-h", "box", "--entrypoint", "/bin/sh"],
}


def see_inside(docker: Docker, options: list[str]) -> dict[str, list[str]]:
    """The script's sections, what differs by nature replaced; each namespace is "own" or "shared"."""
    command = ["-c", INSIDE] if "--entrypoint" in options else ["sh", "-c", INSIDE]
    done = docker.run("run", "--rm", *options, "busybox", *command)
    text = re.sub(r"\r\n", "\n", done.stdout + done.stderr)
    for kind in ("cgroup", "ipc", "mnt", "net", "pid", "time", "user", "uts"):
        shared = os.readlink(f"/proc/{docker.host.holder.pid}/ns/{kind}")
        text = text.replace(shared, "shared")
    text = re.sub(r"\w+:\[\d{10}\]", "own", text)
    for pattern, replacement in NORMALISED:
        text = re.sub(pattern, replacement, text, flags=re.M)
    sections: dict[str, list[str]] = {}
    for part in text.split("## ")[1:]:
        name, *lines = part.splitlines()
        sections[name] = sorted(lines)
    return sections


def only_in(lines: list[str], others: list[str]) -> list[str]:
    """The lines that stand more often in `lines` than in `others`."""
    left = list(others)
    found = []
    for line in lines:
        if line in left:
            left.remove(line)
        else:
            found.append(line)
    return found


def explanations(section: str, side: int, line: str) -> list[str]:
    """Why a line that only one side has is accepted: side 1 is ours, 2 the peer's."""
    return [
        accepted[3]
        for accepted in DIFFERENCES
        if accepted[0] == section and accepted[side] and re.fullmatch(accepted[side], line)
    ]


@pytest.mark.parametrize("situation", sorted(SITUATIONS))
def test_inside_is_as_under_the_real_dockerd(bridgeless: Host, peer: Host, situation: str) -> None:
    cli = sorted(docker_clis().items())[0][1]
    ours, theirs = (see_inside(Docker(cli, each), SITUATIONS[situation]) for each in (bridgeless, peer))
    assert list(ours) == list(theirs) and "end" in ours
    unexplained, used = [], set()
    for section in ours:
        for side, lines in (
            (1, only_in(ours[section], theirs[section])),
            (2, only_in(theirs[section], ours[section])),
        ):
            for line in lines:
                reasons = explanations(section, side, line)
                used.update(reasons)
                if not reasons:
                    unexplained.append(f"{section}: {' +-'[side]} {line}")
    assert not unexplained, "\n".join(unexplained)
    if situation == "plain":
        assert used == {reason for _, _, _, reason in DIFFERENCES}, "a difference that is none any more"


# ------------------------------------------------------------------------------------------------------------
# Attacks
#
# Known ways out of a container, each tried for real: first against a daemon whose defence is switched off (by
# the failpoint hook), where it must succeed, then against the daemon as it is.
# ------------------------------------------------------------------------------------------------------------

OFF_AND_ON = pytest.mark.parametrize("defended", [False, True], ids=["defence-off", "defence-on"])


def switched(defence: str, defended: bool) -> dict[str, str]:
    """The daemon's environment with a defence on, or off."""
    return {} if defended else {"DOCKERD_FAILPOINTS": f"{defence}=off"}


def interpreter_copy(directory: str) -> str:
    """A Python whose executable is a file of its own, so that an attack overwrites nothing of the machine."""
    subprocess.run([sys.executable, "-m", "venv", "--copies", "--without-pip", directory], check=True)
    python = os.path.join(directory, "bin", "python3")
    assert not os.path.islink(python)
    return python


def python_entries(python: str) -> dict[str, Any]:
    """The files that the interpreter needs inside an image: libraries, enough of the standard library."""
    listed = subprocess.run(["ldd", python], stdout=subprocess.PIPE, text=True, check=True).stdout
    paths = re.findall(r"(/\S+) \(0x", listed)
    library = sysconfig.get_paths()["stdlib"]
    paths += [
        os.path.join(folder, name)
        for folder in (
            library,
            *(os.path.join(library, part) for part in ("encodings", "collections", "importlib")),
        )
        for name in os.listdir(folder)
        if name.endswith(".py")
    ]
    entries: dict[str, Any] = {}
    for path in paths:
        with open(path, "rb") as file:
            entries[path.lstrip("/")] = (file.read(), 0o755)
    return entries


# Executed as the container's program, this makes the kernel run what the init runs: the host's interpreter.
# It changes the file's mode through /proc/self/exe, and keeps the file open; then, as another program, it
# overwrites it as soon as nobody executes it any more.
EXE_ATTACK = rb"""#!/proc/self/exe -S
import operator
import os
exe = os.open("/proc/self/exe", os.O_RDONLY)
def tell(what):
    with open("/result", "a") as file:
        file.write(what + "\n")
try:
    os.chmod("/proc/self/exe", 0o4755)
    tell("mode changed")
except OSError as error:
    tell("chmod: " + error.strerror)
os.set_inheritable(exe, True)
os.execv("/bin/sh", ["sh", "-c", "exec 2>>/result; n=0; while [ $n -lt 600 ]; do n=$((n+1)); "
    "echo evil > /proc/self/fd/%d && break; tail -n 1 /result | grep -q 'Text file busy' || break; "
    "sleep .05; done; "
    "echo done >> /result; exec sleep 1000" % exe])
"""


@OFF_AND_ON
def test_overwriting_the_runtime_cve_2019_5736(
    new_host: Callable[..., Host], defended: bool, tmp_path: Any
) -> None:
    """A container that runs /proc/self/exe gets the host's interpreter, and tries to overwrite it."""
    python = interpreter_copy(str(tmp_path / "python"))
    with open(python, "rb") as file:
        original, mode = file.read(), os.fstat(file.fileno()).st_mode
    host = new_host("-D", python=python, environment=switched("exe-seal", defended))
    host.import_image(
        "evil",
        tar_of({**busybox_entries(), **python_entries(python), "attack": (EXE_ATTACK, 0o755)}),
        f"ENV PATH={PATH} PYTHONHOME={sys.base_prefix}",
        'CMD ["/attack"]',
    )
    identity = host.create(image="evil", Cmd=None)
    host.api("POST", f"/containers/{identity}/start")
    result = f"/proc/{host.inspect(identity)['State']['Pid']}/root/result"
    wait_for(lambda: "\n" in read_text(result), "the container to get hold of the interpreter")
    host.kill()  # with the shim: from now on nobody executes the file
    for pid in host.own_processes():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it ends by itself as well
            if os.readlink(f"/proc/{pid}/ns/mnt") == os.readlink(f"/proc/{host.holder.pid}/ns/mnt"):
                os.kill(pid, 9)
    wait_for(lambda: "done\n" in read_text(result), f"the attack to end: {read_text(result)}", 40)
    told = read_text(result)
    with open(python, "rb") as file:
        now, now_mode = file.read(), os.fstat(file.fileno()).st_mode
    if defended:
        assert (now, now_mode) == (original, mode), told
        assert "Read-only file system" in told
    else:
        assert now == b"evil\n" and now_mode & 0o4000, told
        with open(python, "wb") as file:
            file.write(original)
        os.chmod(python, mode)
    host.start()  # which finds the container that its predecessor left, and clears up


@OFF_AND_ON
def test_working_directory_behind_a_descriptor_cve_2024_21626(
    new_host: Callable[..., Host], busybox: bytes, defended: bool
) -> None:
    """WORKDIR /proc/self/fd/N must not lead to a directory of the host that the runtime has open."""
    host = new_host(environment=switched("fd-close", defended))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    secret = host.path("secret")
    with open(secret, "w") as file:
        file.write("the host's secret")
    box, script = Execs(host), f"cat ./{secret} {'../' * 12}{secret}"
    places = (f"/proc/self/fd/{number}" for number in range(3, 24))
    outputs = [box.run("sh", "-c", script, WorkingDir=place)[0] for place in places]
    leaks = any(b"the host's secret" in output for output in outputs)
    assert leaks != defended, outputs  # on hosts of cgroup v1 alone no directory is open that could leak
    outputs = []
    for number in range(3, 24):
        identity = host.create(
            "sh", "-c", f"cat ./{secret} ../../../..{secret}", WorkingDir=f"/proc/self/fd/{number}"
        )
        if host.http("POST", f"{API}/containers/{identity}/start").status == 204:
            host.api("POST", f"/containers/{identity}/wait")
            outputs.append(host.api("GET", f"/containers/{identity}/logs?stdout=1&stderr=1") or b"")
        host.api("DELETE", f"/containers/{identity}")
    assert any(b"the host's secret" in output for output in outputs) != defended, outputs


# Run by a container's first process: what it gets of a process that joins it and is not yet the command.
JOIN_ATTACK = """
while :; do
    for place in /proc/[0-9]*; do
        case $(readlink $place/exe) in
        "" | /bin/busybox) ;;
        *) cat $place/maps >>/loot;;
        esac
    done
done 2>/dev/null
"""


@OFF_AND_ON
def test_spying_on_the_joining_process_cve_2016_9962(
    new_host: Callable[..., Host], busybox: bytes, defended: bool
) -> None:
    """A container waits for an exec's process and looks into it while it still is the runtime."""
    host = new_host(environment=switched("undumpable", defended))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    box = Execs(host, "sh", "-c", JOIN_ATTACK,  # AppArmor alone would stop it
                HostConfig={"SecurityOpt": ["apparmor=unconfined"]})  # fmt: skip
    slow = "PATH=" + "/x:" * 40000 + "/bin"  # it looks for its command for a while, its privileges given up
    loot = b""
    for _ in range(3 if defended else 20):
        box.run("true", Env=[slow])
        loot = box.run("cat", "/loot")[0]
        if loot:
            break
    assert (b"[heap]" in loot) != defended, loot


@OFF_AND_ON
def test_overwriting_the_runtime_by_exec_cve_2019_5736(
    new_host: Callable[..., Host], defended: bool, tmp_path: Any
) -> None:
    """The same as above, by a command that the operator runs in the hostile container."""
    python = interpreter_copy(str(tmp_path / "python"))
    mode = os.stat(python).st_mode
    host = new_host(python=python, environment=switched("exe-seal", defended))
    attack = b"#!/proc/self/exe -S\nimport os\nos.chmod('/proc/self/exe', 0o4755)\n"
    host.import_image(
        "evil",
        tar_of({**busybox_entries(), **python_entries(python), "attack": (attack, 0o755)}),
        f"ENV PATH={PATH} PYTHONHOME={sys.base_prefix}",
    )
    errors = Execs(host, image="evil").run("/attack")[1]
    assert (b"Read-only file system" in errors) == defended, errors
    assert (os.stat(python).st_mode == mode) == defended


# Run in a mount namespace of its own: the state in which the init finds a root whose /dev/null an accomplice
# has just replaced, and what a container could then do with the masked path.
MASK_ATTACK = """
import os, sys
sys.path.insert(0, sys.argv[1])
import dockerd
dockerd.mount("tmpfs", sys.argv[2], "tmpfs")
os.chroot(sys.argv[2])
os.chdir("/")
os.mkdir("/dev")
for path, text in (("/core_pattern", "core"), ("/masked", "hidden")):
    with open(path, "w") as file:
        file.write(text)
os.symlink("/core_pattern", "/dev/null")
try:
    dockerd.Init({"readonly_paths": [], "masked_paths": ["/masked"]}, {})._protect_paths()
    with open("/masked", "w") as file:
        file.write("|/evil")
except dockerd.InitError as error:
    print("refused:", error)
with open("/core_pattern") as file:
    print(file.read())
"""


@OFF_AND_ON
def test_masked_path_behind_a_link_cve_2025_31133(defended: bool, tmp_path: Any) -> None:
    """With /dev/null replaced by a link, masking a path must not make the link's target writable there."""
    done = subprocess.run(
        ["unshare", "-m", "--propagation", "private", sys.executable, "-c", MASK_ATTACK, HERE, str(tmp_path)],
        env={**os.environ, **switched("mask-check", defended)},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    if defended:
        assert done.stdout.startswith("refused: ") and done.stdout.endswith("core\n")
    else:
        assert done.stdout == "|/evil\n"


# Copies, volumes, mounts

IN_ROOT_OFF = ('return openat2(root, path.lstrip("/") or ".", flags, 0, resolve)',
               'return os.open(path.lstrip("/") or ".", flags | os.O_CLOEXEC, dir_fd=root)')
IMPORTS_OFF = ("join = start_confined(directory, unpacker.run,",  # unpack where the content goes
               "join = start_confined(directory, lambda: (setattr(unpacker.reader, '_stream', "
               "decompress(feed)), unpacker.run())[1],")
UNCONFINED_OFF = ("unpack_confined(decompress(stream), view", "unpack_confined(stream, view")


def weakened(directory: Path, *changes: tuple[str, str]) -> str:
    """A copy of the program without a defence that is no step of its own: what its text has, and what stands
    there instead."""
    text = Path(PROGRAM).read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    path = directory / "dockerd.py"
    path.write_text(text)
    return str(path)


@contextlib.contextmanager
def flipping(first: str, second: str) -> Iterator[None]:
    """The two names exchanged again and again, as fast as a container can."""
    ended = threading.Event()
    arguments = -100, os.fsencode(first), -100, os.fsencode(second), 2  # AT_FDCWD, RENAME_EXCHANGE

    def flip() -> None:
        library = ctypes.CDLL(None, use_errno=True)
        while not ended.is_set():
            library.renameat2(*arguments)

    thread = threading.Thread(target=flip)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


@OFF_AND_ON
def test_masks_of_a_container_with_its_own_dev_cve_2025_31133(
    new_host: Callable[..., Host], busybox: bytes, defended: bool
) -> None:
    """In a volume for /dev somebody exchanges the null device for a link to what is to be masked, which would
    then be its own mask."""
    host = new_host(environment=switched("mask-check", defended))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    null = tarfile.TarInfo("null")
    null.type, null.mode, null.devmajor, null.devminor = tarfile.CHRTYPE, 0o666, 1, 3
    name = host.create("true", HostConfig={"Binds": ["devices:/d"]})
    assert put(host, name, "/d", {"null": null, "link": link_entry("link", "/proc/interrupts")}).status == 200
    places, seen, refused = f"{host.data_root}/volumes/devices/_data/", 0, 0
    with flipping(places + "null", places + "link"):
        for _ in range(30 if defended else 300):
            name = host.create("cat", "/proc/interrupts", HostConfig={"Binds": ["devices:/dev:nocopy"]})
            answer = host.http("POST", f"{API}/containers/{name}/start")
            if answer.status == 204:
                host.api("POST", f"/containers/{name}/wait")
                seen += b"CPU0" in host.api("GET", f"/containers/{name}/logs?stdout=1")
            else:
                assert "/dev/null in the container is not the null device" in answer.json["message"]
                refused += 1
            host.api("DELETE", f"/containers/{name}?force=1")
            if seen and not defended:
                break
    assert bool(seen) != defended and bool(refused) == defended


@OFF_AND_ON
def test_a_mount_place_flipped_into_proc_cve_2019_19921(new_host: Callable[..., Host], busybox: bytes,
                                                        defended: bool) -> None:
    """In a shared volume somebody exchanges another mount's place for a link to what labels processes."""
    host = new_host(environment=switched("proc-cover", defended))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    name = host.create("true", HostConfig={"Binds": ["shared:/v"]})
    assert put(host, name, "/v", {"d": None, "link": link_entry("link", "/proc/1/attr")}).status == 200
    places, seen, made, refused = f"{host.data_root}/volumes/shared/_data/", 0, 0, 0
    with flipping(places + "d", places + "link"):
        while min(made, refused) < 3 if defended else not seen and made < 300:
            name = host.create("grep", "-c", " /proc/1/attr ", "/proc/self/mountinfo",
                               HostConfig={"Binds": ["shared:/v:nocopy", "other:/v/d:nocopy"]})
            answer = host.http("POST", f"{API}/containers/{name}/start")
            if answer.status == 204:
                made += 1
                seen += host.api("POST", f"/containers/{name}/wait")["StatusCode"] == 0
            else:
                assert "cannot be mounted because it is inside /proc" in answer.json["message"]
                refused += 1
            host.api("DELETE", f"/containers/{name}?force=1")
    assert bool(seen) != defended


@OFF_AND_ON
def test_links_flipped_during_cp_cve_2018_15664_2021_41089_2026_41568_2026_42306(
    new_host: Callable[..., Host], busybox: bytes, defended: bool, tmp_path: Path
) -> None:
    """A running container exchanges a directory, in which it has a volume, for a link to the host's: cp would
    read there, write, change modes, and make the volume's mount point."""
    host = new_host(**({} if defended else {"environment": switched("chroot", False),
                                            "program": weakened(tmp_path, IN_ROOT_OFF)}))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    secret = host.path("secret")
    os.makedirs(secret + "/own", 0o700)
    Path(secret, "file").write_text("the host's")
    name = host.create("sh", "-c", f"echo own >/w/file; ln -s {secret} /x; exec sleep 1000", name="evil",
                       HostConfig={"Binds": ["vol:/w/v"]})
    host.api("POST", f"/containers/{name}/start")
    top = f"/proc/{host.inspect(name)['State']['Pid']}/root"
    wait_for(lambda: os.path.islink(top + "/x"))
    path, done = f"{API}/containers/evil/archive?path=", set()
    with flipping(top + "/w", top + "/x"):
        for _ in range(40 if defended else 2000):
            if b"the host's" in host.http("GET", path + "/w/file").body:
                done.add("read")
            put(host, "evil", "/w/", {"written": b""})
            put(host, "evil", "/", {"w/own": owned_entry("w/own", 0, 0, 0o777)})
            done |= {what for what in ("written", "v") if os.path.exists(f"{secret}/{what}")}
            done |= {"mode"} if os.stat(secret + "/own").st_mode & 0o777 != 0o700 else set()
            if len(done) == 4:
                break
    host.remove_all()
    assert done == (set() if defended else {"read", "written", "mode", "v"})


@OFF_AND_ON
def test_links_flipped_during_copy_up(new_host: Callable[..., Host], defended: bool, tmp_path: Path) -> None:
    """A container that has the empty volume already puts a link in the place of a directory that copy-up has
    just made there."""
    host = new_host(environment=switched("chroot", defended))
    files = {f"data/sub/{number}": b"x" for number in range(3000)}
    host.import_image("evil", tar_of({**busybox_entries(), "data": None, "data/sub": None, **files}),
                      *BUSYBOX_CHANGES)
    secret = host.path("secret")
    os.mkdir(secret)
    name = host.create("sleep", "1000", image="evil", HostConfig={"Binds": ["shared:/v"]})
    host.api("POST", f"/containers/{name}/start")
    inside = f"/proc/{host.inspect(name)['State']['Pid']}/root/v"

    def replace() -> None:
        while not os.path.exists(inside + "/sub"):
            pass
        os.symlink(secret, inside + "/link")
        paths = [os.fsencode(f"{inside}/{each}") for each in ("link", "sub")]
        arguments = -100, paths[0], -100, paths[1], 2  # AT_FDCWD, RENAME_EXCHANGE
        assert ctypes.CDLL(None).renameat2(*arguments) == 0

    with concurrent.futures.ThreadPoolExecutor() as pool:
        replaced = pool.submit(replace)
        body = {"Image": "evil", "Cmd": ["true"],
                "HostConfig": {"NetworkMode": "none", "Binds": ["shared:/data"]}}
        answer = host.http("POST", f"{API}/containers/create", body)
        replaced.result()
    host.remove_all()
    assert bool(os.listdir(secret)) != defended, answer


@OFF_AND_ON
def test_mount_points_behind_links_cve_2021_30465_2026_41579(
    new_host: Callable[..., Host], defended: bool, tmp_path: Path
) -> None:
    """What is mounted finds links to the host's directories in its place, the image's or put there after the
    creation, and makes no mount point there."""
    host = new_host(**({} if defended else {"program": weakened(tmp_path, IN_ROOT_OFF)}))
    secret = host.path("secret")
    host.import_image("evil", tar_of({**busybox_entries(), "v": link_entry("v", secret + "/v")}),
                      *BUSYBOX_CHANGES)
    for place, made in (("v", "new"), ("etc", "hosts"), ("dev", ""), ("sys", "")):
        os.makedirs(f"{secret}/{place}")
        name = host.create("true", image="evil", HostConfig={"Binds": ["one:/v/new"] if place == "v" else []})
        if place != "v":
            assert put(host, name, "/", {place: link_entry(place, f"{secret}/{place}")}).status == 200
        host.http("HEAD", f"{API}/containers/{name}/archive?path=/bin")
        host.http("POST", f"{API}/containers/{name}/start")
        assert (made in os.listdir(f"{secret}/{place}")) == bool(made and not defended), place


LOADED_LIBRARY = """#include <fcntl.h>
__attribute__((constructor)) static void loaded(void) { creat("/loaded", 0600); }
"""


def hostile_library(directory: Path) -> bytes:
    """A shared library that leaves the file /loaded when a process loads it."""
    (directory / "evil.c").write_text(LOADED_LIBRARY)
    subprocess.run(["cc", "-shared", "-fPIC", "-o", directory / "evil.so", directory / "evil.c"], check=True)
    return (directory / "evil.so").read_bytes()


def hostile_entries(python: str, directory: Path) -> dict[str, Any]:
    """Files of an image in the place of all that the daemon's interpreter could load: its modules, the C
    library's name services, converters and unwinder, programs that unpack."""
    evil = b"open('/loaded', 'w').close()\n"
    library = hostile_library(directory)
    entries: dict[str, Any] = {name: evil for name in python_entries(python) if name.endswith(".py")}
    modules = sysconfig.get_paths()["stdlib"].lstrip("/")
    entries.update({f"{modules}/{name}.py": evil for name in
                    ("bz2", "lzma", "pwd", "grp", "compression/__init__", "compression/zstd")})
    for name in ("libgcc_s.so.1", "libnss_files.so.2", "libnss_compat.so.2", "libzstd.so.1"):
        entries.update({f"{place}/{name}": (library, 0o755) for place in
                        ("lib", "usr/lib", "lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu")})
    entries.update({f"{place}/{name}": (b"#!/bin/sh\necho >/loaded\n", 0o755)
                    for place in ("usr/bin", "usr/sbin") for name in ("xz", "unpigz", "bzip2", "tar")})
    return entries


@OFF_AND_ON
def test_cp_runs_nothing_of_the_container_cve_2014_9357_2019_14271_2026_41567(
    new_host: Callable[..., Host], defended: bool, tmp_path: Path
) -> None:
    """A container has its own in the place of every module, library and program that a copy could need."""
    host = new_host(**({} if defended else {"program": weakened(tmp_path, IMPORTS_OFF, UNCONFINED_OFF)}))
    evil = {**busybox_entries(), **hostile_entries(sys.executable, tmp_path)}
    host.import_image("evil", tar_of(evil), *BUSYBOX_CHANGES)
    name = host.create("sleep", "1000", image="evil", User="bob", HostConfig={"Binds": ["vol:/v"]})
    for running in (False, True):
        if running:
            host.api("POST", f"/containers/{name}/start")
        content = tar_of({"file": b"content"})
        for number, tree in enumerate((content, gzip.compress(content), bz2.compress(content),
                                       lzma.compress(content), b"\x28\xb5\x2f\xfd" + content)):
            path = f"{API}/containers/{name}/archive?path=/v&copyUIDGID=1"
            assert (host.http("PUT", path, tree).status == (400 if number == 4 else 200)) or not defended
        assert b"content" in host.http("GET", f"{API}/containers/{name}/archive?path=/v").body or not defended
        host.api("GET", f"/containers/{name}/changes")
        assert host.http("GET", f"{API}/containers/{name}/export").status == 200
    answer = host.http("HEAD", f"{API}/containers/{name}/archive?path=/loaded")
    host.remove_all()
    assert (answer.status == 404) == defended


# A program that embeds the daemon's functions ends while a thread of it is confined to a hostile tree.
EXIT_ATTACK = """
import sys, threading
sys.path.insert(0, sys.argv[1])
import dockerd
inside = threading.Event()
def work():
    inside.set()
    while True:
        sum(range(1000))
dockerd.start_confined(sys.argv[2], work)
inside.wait()
"""


@OFF_AND_ON
def test_the_end_of_a_confined_thread_loads_nothing_cve_2019_14271(defended: bool, tmp_path: Path) -> None:
    """The C library loads its unwinder to end a thread: from the tree, had it not been loaded before.  (From
    Python 3.14 on threads are not ended, and nothing is loaded.)"""
    library = hostile_library(tmp_path)
    for place in ("lib", "usr/lib", "lib64", "lib/x86_64-linux-gnu", "usr/lib/x86_64-linux-gnu"):
        (tmp_path / "tree" / place).mkdir(parents=True)
        (tmp_path / "tree" / place / "libgcc_s.so.1").write_bytes(library)
    subprocess.run([sys.executable, "-c", EXIT_ATTACK, HERE, str(tmp_path / "tree")],
                   env={**os.environ, **switched("unwinder", defended)}, stderr=subprocess.DEVNULL)
    assert (tmp_path / "tree/loaded").exists() == (not defended and sys.version_info < (3, 14))


def test_a_hard_link_to_the_host_through_a_bind(host: Host) -> None:
    """An archive's link leads to the host's files, and its hard link would take one of them into a bind,
    where the container could write it."""
    secret, shared = Path(host.path("secret")), host.path("shared-by-bind")
    os.mkdir(shared)
    secret.write_text("the host's")
    name = host.create("true", HostConfig={"Binds": [f"{shared}:/b"]})
    for target in ("l/secret", "../secret", str(secret)):
        assert put(host, name, "/b", {"l": link_entry("l", host.directory),
                                      "h": link_entry("h", target, tarfile.LNKTYPE)}).status >= 400
    assert secret.stat().st_nlink == 1 and os.listdir(shared) == ["l"]


@OFF_AND_ON
def test_a_setuid_file_of_an_image_for_the_hosts_users_cve_2021_41091(
    new_host: Callable[..., Host], busybox: bytes, defended: bool
) -> None:
    """Nobody but root reaches what images, containers and volumes have, to execute a setuid program there."""
    host = new_host()
    host.import_image("evil", tar_of({**busybox_entries(), "su": (b"#!/bin/sh\n", 0o4755)}), *BUSYBOX_CHANGES)
    host.create("true", image="evil", name="evil", HostConfig={"Binds": ["vol:/v"]})
    assert put(host, "evil", "/v", {"su": (b"#!/bin/sh\n", 0o4755)}).status == 200
    assert put(host, "evil", "/", {"su": (b"#!/bin/sh\n", 0o4755)}).status == 200
    os.chmod(host.directory, 0o755)
    paths = [f"{host.data_root}/volumes/vol/_data/su", *glob.glob(f"{host.data_root}/overlay2/*/diff/su")]
    if not defended:
        for path in (host.data_root, host.data_root + "/overlay2", *map(os.path.dirname, paths)):
            while path != host.directory:
                os.chmod(path, 0o755)
                path = os.path.dirname(path)
    user = ["setpriv", "--reuid=1000", "--regid=1000", "--clear-groups"]
    reached = [subprocess.run([*user, "test", "-x", path]).returncode == 0 for path in paths]
    assert len(reached) == 3 and set(reached) == {not defended}


@OFF_AND_ON
def test_writes_to_proc_are_not_redirected_cve_2025_52881(
    new_host: Callable[..., Host], busybox: bytes, defended: bool
) -> None:
    """A volume over a part of /proc/sys would catch what the start writes there, and lead it elsewhere."""
    host = new_host(environment=switched("proc-cover", defended))
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    name = host.create("true", HostConfig={"Binds": ["vol:/x"]})
    put(host, name, "/x", {"ip_unprivileged_port_start": link_entry("ip_unprivileged_port_start", "victim"),
                           "victim": b""})
    name = host.create("true", HostConfig={"Binds": ["vol:/proc/sys/net/ipv4:nocopy"],
                                           "Sysctls": {"net.ipv4.ip_unprivileged_port_start": "7"}})
    answer = host.http("POST", f"{API}/containers/{name}/start")
    assert (b"cannot be mounted because it is inside /proc" in answer.body) == defended, answer.body
    victim = Path(host.data_root, "volumes/vol/_data/victim").read_text()
    assert victim == ("" if defended else "7")


# Run in a mount namespace of its own: a root in which an accomplice has put a link in the place of the
# terminal just before it becomes the console.
CONSOLE_ATTACK = """
import os, pty, sys
sys.path.insert(0, sys.argv[1])
import dockerd
dockerd.mount("tmpfs", sys.argv[2], "tmpfs")
root = os.open(sys.argv[2], os.O_RDONLY)
os.makedirs(sys.argv[2] + "/dev/pts")
with open(sys.argv[2] + "/core_pattern", "w") as file:
    file.write("core")
os.symlink("/core_pattern", sys.argv[2] + "/dev/pts/0")
init = dockerd.Init({}, {})
init.root, init.slave = root, pty.openpty()[1]
init._mount_console()
with open(sys.argv[2] + "/dev/console", "w") as file:
    file.write("|/evil")
with open(sys.argv[2] + "/core_pattern") as file:
    print(file.read())
"""


@OFF_AND_ON
def test_the_console_is_the_terminal_itself_cve_2025_52565(defended: bool, tmp_path: Path) -> None:
    """What stands at /dev/pts/0 by then must not become /dev/console, which nothing masks."""
    by_path = ('open_tree(self.slave, "", AT_EMPTY_PATH',
               'open_tree(_open_in_root(self.root, "/dev/pts/0"), "", AT_EMPTY_PATH')
    directory = HERE if defended else os.path.dirname(weakened(tmp_path, by_path))
    (tmp_path / "root").mkdir()
    done = subprocess.run(["unshare", "-m", "--propagation", "private", sys.executable, "-c", CONSOLE_ATTACK,
                           directory, str(tmp_path / "root")], stdout=subprocess.PIPE, text=True, check=True)
    assert done.stdout == ("core\n" if defended else "|/evil\n")


def test_exec_as_user_1_is_not_root_cve_2026_30892(host: Host) -> None:
    """crun took the user "1" for root."""
    box = Execs(host, "sleep", "1000")
    for user, expected in (("1", b"1:1\n"), ("1:2", b"1:2\n"), ("01", b"1:1\n"), ("0", b"0:0\n")):
        assert box.run("sh", "-c", "echo $(id -u):$(id -g)", User=user)[0] == expected


def link(name: str, target: str) -> tarfile.TarInfo:
    """A symbolic link as an entry of an archive."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.linkname = tarfile.SYMTYPE, target
    return entry


def test_a_container_holds_up_nobody_who_joins_it(host: Host) -> None:
    """A start in the PID namespace of a container that stops all it sees fails, and so does an exec.
    AppArmor's docker-default keeps it from doing so."""
    box = Execs(host, "sh", "-c", "while :; do kill -STOP -1; done",
                HostConfig={"SecurityOpt": ["apparmor=unconfined"]})
    joins = host.create("true", HostConfig={"PidMode": "container:" + box.id})
    answer = host.api("POST", f"/containers/{joins}/start", status=500)
    assert "it was stopped before its execve" in answer["message"], answer
    assert b"it was stopped before its execve" in box.run("true")[0]
    assert host.inspect(joins)["State"]["Status"] == "created"


@pytest.mark.parametrize("name, odd", [
    ("etc/resolv.conf", link("etc/resolv.conf", "../run/systemd/resolve/stub-resolv.conf")),
    ("etc/hosts", link("etc/hosts", "hosts")), ("etc/hostname", link("etc/hostname", "/dev/null")),
    ("etc", link("etc", "../../../etc")), ("etc", b"no directory"), ("dev", link("dev", "/proc")),
    ("proc", link("proc", "/etc")), ("proc", b"no directory"), ("sys", link("sys", "/proc")),
])
def test_what_an_image_has_where_docker_mounts_gives_way(host: Host, name: str, odd: Any) -> None:
    """As under the real dockerd: a root file system of a systemd machine has a dangling resolv.conf."""
    entries = {path: entry for path, entry in busybox_entries().items() if f"{path}/".find(f"{name}/") != 0}
    host.import_image("odd", tar_of({**entries, name: odd}), *BUSYBOX_CHANGES)
    try:
        code, output = host.run("sh", "-c", "cd /etc; for f in hosts hostname resolv.conf; do test -f $f -a "
                                "! -L $f -a -s $f || exit 1; done; readlink mtab; readlink /dev/fd; "
                                "ls -d /sys/fs/*up", image="odd")
    finally:
        host.api("DELETE", "/images/odd?force=1")
    assert (code, output) == (0, b"/proc/mounts\n/proc/self/fd\n/sys/fs/cgroup\n")


def test_a_device_in_place_of_a_default_one(host: Host) -> None:
    devices = [{"PathOnHost": source, "PathInContainer": to, "CgroupPermissions": "rwm"}
               for source, to in (("/dev/null", "/dev/null"), ("/dev/zero", "/dev/full"))]
    _, output = host.run("stat", "-c", "%t:%T", "/dev/null", "/dev/full", HostConfig={"Devices": devices})
    assert output == b"1:3\n1:5\n"


def test_create_reads_its_image_as_go_does(host: Host) -> None:
    """In any case, and of no other type; and another platform's image is none."""
    path = "/containers/create"
    assert host.api("POST", path, {"image": "busybox", "hostconfig": {"networkmode": "none"}}, 201)["Id"]
    answer = host.api("POST", path, {"Image": ["busybox"]}, status=400)
    assert answer["message"] == ("json: cannot unmarshal array into Go struct field "
                                 "ContainerConfigWrapper.Image of type string")
    answer = host.api("POST", path + "?platform=linux/s390x", {"Image": "busybox"}, status=404)
    assert answer["message"].startswith("image with reference busybox was found but its platform (linux/")


def test_a_full_disk_keeps_no_container_running(new_host: Callable[..., Host], busybox: bytes) -> None:
    """What runs ends, is waited for, stopped and removed while no state can be written, and nothing is lost
    or left behind once there is room again."""
    host = new_host(start=False)
    os.mkdir(host.data_root)
    host.enter("mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", host.data_root).wait()
    host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
    ends, stopped, removed, later = (host.create("sh", "-c", command) for command in
                                     ("exit 3", "exec sleep 1000", "exec sleep 1000", "echo again"))
    for identity in (stopped, removed):
        host.api("POST", f"/containers/{identity}/start")
    filling = host.create("sh", "-c", "cat /dev/zero >/full; exit 7")
    host.api("POST", f"/containers/{filling}/start")
    assert host.api("POST", f"/containers/{filling}/wait")["StatusCode"] == 7
    assert host.http("POST", f"{API}/containers/{later}/start").status == 500
    assert host.inspect(later)["State"]["Status"] == "created"
    host.api("POST", f"/containers/{stopped}/stop?t=0")
    assert host.inspect(stopped)["State"]["ExitCode"] == 137
    assert host.http("POST", f"{API}/containers/create", {"Image": "busybox"}).status == 500
    for identity in (removed, filling):
        host.api("DELETE", f"/containers/{identity}?force=1")
    for identity, code in ((ends, 3), (later, 0)):
        host.api("POST", f"/containers/{identity}/start")
        assert host.api("POST", f"/containers/{identity}/wait")["StatusCode"] == code
    host.kill()
    host.start()
    assert {each["Id"] for each in host.api("GET", "/containers/json?all=1")} == {ends, stopped, later}
    host.remove_all()
    assert host.stop() == 0
    host.enter("umount", host.data_root).wait()


def test_odd_account_files_cost_nothing(host: Host) -> None:
    """A directory for passwd is none, as in Docker; a working directory that is a file is told of."""
    fds = f"/proc/{host.process.pid}/fd" if host.process else ""
    entries = {**busybox_entries(), "etc/passwd": None, "etc/group": None}
    host.import_image("odd", tar_of(entries), *BUSYBOX_CHANGES)
    try:
        host.run("true", image="odd")
        before = len(os.listdir(fds))
        for _ in range(4):
            assert host.run("true", image="odd") == (0, b"")
        wait_for(lambda: len(os.listdir(fds)) <= before, "the descriptors to be closed")
    finally:
        host.api("DELETE", "/images/odd?force=1")
    answer = host.api("POST", f"/containers/{host.create('true', WorkingDir='/etc/plain')}/start", status=500)
    assert answer["message"].endswith(": Cannot mkdir: /etc/plain is not a directory")


# ------------------------------------------------------------------------------------------------------------
# The house
#
# What is around the file: one copied file is enough, the compiled helper does what its twins do, and
# `make install` puts everything in place.
# ------------------------------------------------------------------------------------------------------------


def system_python() -> str:
    """The machine's own Python where that is new enough, else the one that runs the tests."""
    for python in ("/usr/bin/python3", sys.executable):
        check = [python, "-c", "import sys; sys.exit(sys.version_info < (3, 9))"]
        if os.path.exists(python) and subprocess.run(check).returncode == 0:
            return python
    raise AssertionError("no Python")


def test_one_copied_file_is_enough(new_host: Callable[..., Host], busybox: bytes, tmp_path: Any) -> None:
    """The file alone, in a directory of any name, run by the machine's own Python without any package."""
    directory = tmp_path / "a place of its own"
    directory.mkdir()
    program = shutil.copy(os.path.join(HERE, "dockerd.py"), directory / "engine.py")
    host = new_host(python=system_python(), program=str(program), cgroup_parent="")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    assert host.run("echo", "alone") == (0, b"alone\n")


def test_a_helper_of_another_version_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    helper = types.ModuleType("_native")
    monkeypatch.setitem(sys.modules, "_native", helper)
    found = []
    for version in (dockerd.NATIVE_VERSION, dockerd.NATIVE_VERSION - 1):
        helper.lib = types.SimpleNamespace(HELPER_VERSION=version)  # type: ignore[attr-defined]
        found.append(dockerd.load_native() is helper.lib)
    helper.lib = types.SimpleNamespace()  # type: ignore[attr-defined]
    assert found == [True, False] and dockerd.load_native() is None


@pytest.fixture(params=["python", "compiled"])
def native(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """dockerd with the functions in Python, and with those of the compiled helper."""
    monkeypatch.delenv("DOCKERD_NATIVE", raising=False)
    library = dockerd.load_native() if request.param == "compiled" else None
    assert library or request.param == "python", "the helper is not built: make native"
    monkeypatch.setattr(dockerd, "native", library)


@pytest.mark.usefixtures("native")
@pytest.mark.parametrize("abstract", [False, True])
def test_sd_notify(abstract: bool, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"@dockerd-test-{os.getpid()}" if abstract else str(tmp_path / "notify")
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind("\0" + name[1:] if abstract else name)
        listener.settimeout(10)
        monkeypatch.setenv("NOTIFY_SOCKET", name)
        assert dockerd.sd_notify("READY=1\nSTATUS=well") is True
        assert listener.recv(100) == b"READY=1\nSTATUS=well"
    monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "nobody"))
    assert dockerd.sd_notify("READY=1") is False
    monkeypatch.delenv("NOTIFY_SOCKET")
    assert dockerd.sd_notify("READY=1") is False


@pytest.mark.usefixtures("native")
def test_netlink_batch() -> None:
    """A batch is sent, and its first failure comes with the kernel's errno."""
    message = dockerd.netlink_message(dockerd.RTM_NEWLINK, struct.pack("=BxHiII", 0, 0, 0x7FFFFFF, 0, 0))
    with pytest.raises(OSError) as failed:
        dockerd.netlink_batch([message, message])
    assert failed.value.errno == errno.ENODEV


def test_the_helper_is_logged_and_never_needed(new_host: Callable[..., Host], busybox: bytes) -> None:
    """With and without the compiled helper the daemon works, and its log says which it uses."""
    logs = []
    for setting in ("0", "1"):
        host = new_host(environment={"DOCKERD_NATIVE": setting})
        host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
        assert host.run("echo", setting)[1] == setting.encode() + b"\n"
        logs += [
            line.split("msg=")[1] for line in host.log().splitlines() if "helper" in line or "native" in line
        ]
    assert len(set(logs)) >= 2, logs


def test_make_install(tmp_path: Any) -> None:
    """Everything is put in place, and nothing of it names the build's directory."""
    subprocess.run(
        ["make", "-s", "-C", HERE, "install", f"DESTDIR={tmp_path}", f"PYTHON={sys.executable}"], check=True
    )
    found = sorted(
        os.path.relpath(path, tmp_path)
        for path in glob.glob(f"{tmp_path}/**", recursive=True)
        if os.path.isfile(path)
    )
    local = "usr/local"
    assert found == [
        f"{local}/lib/systemd/system/docker.service",
        f"{local}/lib/systemd/system/docker.socket",
        f"{local}/sbin/dockerd.py",
        f"{local}/share/bash-completion/completions/dockerd.py",
        f"{local}/share/doc/dockerd.py/daemon.json",
        f"{local}/share/doc/dockerd.py/openrc",
        f"{local}/share/doc/dockerd.py/sysvinit",
        f"{local}/share/fish/vendor_completions.d/dockerd.py.fish",
        f"{local}/share/man/man8/dockerd.py.8",
        f"{local}/share/zsh/site-functions/_dockerd.py",
    ]
    for path in found:
        with open(tmp_path / path) as file:
            text = file.read()
        assert str(tmp_path) not in text and HERE not in text
    with open(tmp_path / local / "lib/systemd/system/docker.service") as file:
        assert "/usr/local/sbin/dockerd.py" in file.read()


# ------------------------------------------------------------------------------------------------------------
# The start, clause by clause
#
# The seed walks through Docker 1.2.0's mainDaemon.  SEED maps each of its clauses to the tests that fail when
# the code of the clause is taken out.
# ------------------------------------------------------------------------------------------------------------

SEED = {
    "3 docker -d, -d=true, --daemon=true": ["test_daemon_mode_in_every_spelling"],
    "3.1 config: flags with their aliases and defaults": [
        "test_flags_of_docker_1_2_0_and_of_dockerd_20_10_to_28_are_known",
        "test_defaults",
        "test_flags",
        "test_deprecated_spellings_work_with_docker_s_line",
    ],
    "3.2 a left-over argument prints the usage and ends": [
        "test_a_left_over_argument",
        "test_a_left_over_argument_prints_the_usage_on_stderr",
    ],
    "3.3 engine: handlers, catchall, id, logging; commands; global handlers are copied": [
        "test_commands_lists_what_is_registered",
        "test_the_catchall_takes_what_has_no_handler_but_no_empty_name",
        "test_global_handlers_are_copied_into_every_new_engine",
        "test_a_handler_cannot_be_overwritten",
    ],
    "3.4 trap: SIGINT and SIGTERM once, the third repeat, SIGQUIT, DEBUG": [
        "test_the_trap_cleans_up_and_exits_0",
        "test_the_third_repeat_forces_the_exit",
        "test_sigquit_exits_without_cleanup",
        "test_sigquit_with_debug_dumps_all_stacks_and_exits_2",
    ],
    "3.4 shutdown: refuse, wait, handlers at the same time, a second call returns": [
        "test_shutdown_refuses_new_jobs_and_runs_the_handlers_at_once",
        "test_shutdown_cancels_streaming_jobs_and_waits_for_the_others",
    ],
    "3.5 builtins: every handler is registered before the daemon is there": [
        "test_builtins_register_the_handlers_that_the_seed_names"
    ],
    "3.5.1 init_networkdriver and what it registers": ["test_the_network_s_jobs_of_1_2_0"],
    "3.5.2 serveapi and acceptconnections": [
        "test_requests_wait_until_connections_are_accepted",
        "test_acceptconnections_tells_the_service_manager",
    ],
    "3.5.3 events, log, subscribers_count": ["test_events_are_published_and_counted"],
    "3.5.4 version's fields": ["test_version_has_the_fields_of_the_seed"],
    "3.5.5 auth and search": ["test_login"],
    "3.6 the daemon loads in the background while requests wait": [
        "test_a_request_waits_while_the_daemon_loads"
    ],
    "3.6.1 NewDaemon checks the host": [
        "test_an_unfit_host_is_refused",
        "test_options_that_contradict_each_other",
    ],
    "3.6.1 NewDaemon sets up directories, drivers and DNS": [
        "test_the_directories_of_a_start",
        "test_a_second_daemon_is_refused_by_name",
        "test_a_storage_driver_that_is_not_there_stops_the_start",
        "test_name_servers_on_loopback_are_told",
    ],
    "3.6.2 Install registers the daemon's jobs and leaves the global variable": [
        "test_install_registers_the_jobs_of_the_seed"
    ],
    "3.6.3 a job: name, args, env, streams; unknown name; runs once; log lines; the last line of stderr": [
        "test_a_job_runs_its_handler_and_returns_the_reply",
        "test_an_unknown_job_is_status_127",
        "test_a_job_runs_once",
        "test_jobs_are_logged_with_their_status",
        "test_a_failed_job_raises_the_last_line_of_its_stderr",
        "test_serveapi_is_not_counted",
    ],
    "3.7 the log line": ["test_the_start_logs_its_version_and_drivers"],
    "3.8 serveapi's env": [
        "test_the_start_logs_its_version_and_drivers",
        "test_cors_headers_are_sent_when_asked_for",
        "test_group_of_the_socket",
    ],
}


def test_every_clause_of_the_seed_has_its_tests() -> None:
    here = sys.modules[__name__]
    missing = [name for names in SEED.values() for name in names if not callable(getattr(here, name, None))]
    assert missing == []


def run_dockerd(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """What dockerd.py prints and returns when it does not come to serve."""
    return subprocess.run(
        [sys.executable, dockerd.__file__, *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, **environment},
    )


def test_a_left_over_argument_prints_the_usage_on_stderr() -> None:
    done = run_dockerd("-d", "left-over")
    assert done.returncode != 0 and done.stdout == ""
    assert "accepts no argument" in done.stderr.splitlines()[0] and "--storage-driver" in done.stderr


@pytest.fixture
def builtins() -> dockerd.Engine:
    """An engine as it is before the daemon has loaded."""
    made = dockerd.Engine()
    dockerd.register_builtins(made)
    return made


def test_builtins_register_the_handlers_that_the_seed_names(builtins: dockerd.Engine) -> None:
    assert {"init_networkdriver", "serveapi", "acceptconnections", "auth", "search"} <= set(
        builtins.job("commands").run())


NETWORK_JOBS = """
import sys, time
import dockerd
engine = dockerd.Engine()
engine.variables["config"] = dockerd.parse_options(sys.argv[1:])
dockerd.register_builtins(engine)
engine.job("init_networkdriver").run()
first = engine.job("allocate_interface", "one").run()
second = engine.job("allocate_interface", "two", RequestedIP="172.17.0.9").run()
port = engine.job("allocate_port", "one", Proto="udp", ContainerPort=53, HostIP="127.0.0.1").run()
print(first["IP"], first["IPPrefixLen"], first["Gateway"], first["Bridge"], second["IP"], port["HostIP"],
      int(port["HostPort"]) > 1024)
engine.job("link", Action="-A", ParentIP="172.17.0.2", ChildIP="172.17.0.9", Ports=["80/tcp"]).run()
for name in ("one", "two"):
    engine.job("release_interface", name).run()
for _ in range(500):  # the address is free when the rules are gone
    third = engine.job("allocate_interface", "three").run()["IP"]
    if third == first["IP"]:
        break
    engine.job("release_interface", "three").run()
    time.sleep(0.02)
print(third)
"""


def test_the_network_s_jobs_of_1_2_0(tmp_path: Any) -> None:
    """init_networkdriver registers the others; what one takes another gives back."""
    options = ["-g", str(tmp_path / "data"), "--exec-root", str(tmp_path / "exec"), "--userland-proxy=false",
               "--firewall-backend", "nftables"]
    (tmp_path / "data").mkdir()
    (tmp_path / "exec").mkdir()
    inside = ["unshare", "-n", "-m", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    done = subprocess.run([*inside, sys.executable, "-c", NETWORK_JOBS, *options], check=True, cwd=HERE,
                          stdout=subprocess.PIPE, text=True)
    assert done.stdout.split("\n")[:2] == [
        "172.17.0.2 16 172.17.0.1 docker0 172.17.0.9 127.0.0.1 True", "172.17.0.2"]


def test_the_program_of_the_readme_that_embeds_the_engine(tmp_path: Any, busybox: bytes) -> None:
    """As it stands there, but for the places and for an image to have."""
    text = read_text(os.path.join(HERE, "README.md")).partition("Embedded in a program")[2]
    lines = [line[4:] for line in text.splitlines()[2:]]
    program = "\n".join(lines[:lines.index("engine.shutdown()") + 1])
    for place in ("/srv", "/run"):
        program = program.replace(f'"{place}/', f'"{tmp_path}{place}/')
    image = 'job = engine.job("import", "-", "busybox")\njob.stdin = sys.stdin.buffer\njob.run()\n'
    program = "import sys\n" + program.replace("made = ", image + "made = ", 1)
    done = subprocess.run(["unshare", "-n", "-m", sys.executable, "-c", program], check=True, cwd=HERE,
                          input=busybox, stdout=subprocess.PIPE)
    assert done.stdout == b"{'Error': None, 'StatusCode': 0}\n"


def test_events_are_published_and_counted() -> None:
    made, events = dockerd.Engine(), dockerd.Events()
    made.install(events)
    made.job("log", "start", "abc", "busybox").run()
    told: list[bytes] = []

    class Sink:
        def write(self, data: bytes) -> None:
            told.append(data)
            if b"stop" in data:
                listening.cancel()

    listening = made.job("events", since="1")
    listening.stdout.add(Sink())

    def ready(facts: dict[str, Any]) -> None:
        assert made.job("subscribers_count").run() == {"Count": 1}
        made.job("log", "stop", "abc", "busybox").run()

    listening.on_ready = ready
    listening.run()
    assert [b"start" in told[0], b"stop" in told[1], len(told)] == [True, True, 2]
    assert made.job("subscribers_count").run() == {"Count": 0}
    with pytest.raises(BadParameter, match="usage: log"):
        made.job("log", "one").run()


def test_version_has_the_fields_of_the_seed(host: Host) -> None:
    told = host.api("GET", "/version")
    assert told["Version"] == dockerd.VERSION and told["ApiVersion"] == dockerd.API_VERSION
    assert told["Os"] == "linux" and told["KernelVersion"] == os.uname().release
    assert (
        told["GoVersion"].startswith("python3.") and told["Arch"] in ("amd64", "arm64") and told["GitCommit"]
    )


def test_a_request_waits_while_the_daemon_loads(new_host: Callable[..., Host]) -> None:
    """The socket is there before the daemon is: a request sent at once is answered, not refused."""
    host = new_host()
    host.stop()
    host.start(wait=False)
    wait_for(lambda: os.path.exists(host.path("docker.sock")) and can_connect(host.path("docker.sock")))
    assert host.http("GET", "/info").status == 200


def can_connect(path: str) -> bool:
    """Whether somebody listens at the Unix socket."""
    with socket.socket(socket.AF_UNIX) as client:
        return client.connect_ex(path) == 0


class Uname:
    """os.uname()'s answer on another host."""

    def __init__(self, sysname: str = "Linux", machine: str = "x86_64", release: str = "6.1.0") -> None:
        self.sysname, self.machine, self.release = sysname, machine, release


@pytest.mark.parametrize("uname, uid, text", [
    (Uname(sysname="Darwin"), 0, "runs on Linux"), (Uname(machine="mips"), 0, "not on Linux mips"),
    (Uname(), 1000, "root privileges"), (Uname(release="5.4.0-42"), 0, "the kernel 5.4.0-42 is too old"),
])
def test_an_unfit_host_is_refused(monkeypatch: pytest.MonkeyPatch, uname: Uname, uid: int, text: str) -> None:
    monkeypatch.setattr(dockerd.os, "uname", lambda: uname)
    monkeypatch.setattr(dockerd.os, "geteuid", lambda: uid)
    with pytest.raises(DockerError, match=text):
        dockerd.check_host_system()


@pytest.mark.parametrize("values, text", [
    ({"bridge": "br0", "bip": "10.0.0.1/24"}, "You specified -b & --bip, mutually exclusive options"),
    ({"iptables": False, "icc": False}, "ICC uses iptables to function"),
    ({"log_opts": {"x": "1"}}, "failed to set log opts: unknown log opt 'x' for json-file log driver"),
])
def test_options_that_contradict_each_other(values: dict[str, Any], text: str) -> None:
    with pytest.raises(DockerError, match=text):
        dockerd.check_configuration(dockerd.Config(**values))


def test_name_servers_on_loopback_are_told(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    told = "Local (127.0.0.1) DNS resolver found in resolv.conf"
    monkeypatch.setattr(dockerd, "read_text", lambda path: "nameserver 127.0.0.53\n")
    dockerd.check_configuration(dockerd.Config())
    assert told in caplog.text
    caplog.clear()
    dockerd.check_configuration(dockerd.Config(dns=["10.0.0.1"]))
    monkeypatch.setattr(dockerd, "read_text", lambda path: "nameserver 10.0.0.2\n")
    dockerd.check_configuration(dockerd.Config())
    assert told not in caplog.text


def test_the_directories_of_a_start(host: Host) -> None:
    data = host.path("data")
    assert os.stat(data).st_mode & 0o7777 == 0o710
    assert {"containers", "image", "overlay2"} <= set(os.listdir(data))
    if dockerd.FILE_SYSTEMS.get(dockerd.statfs_type(data)) == "extfs":
        spread = [f"{data}/{name}" for name in ("containers", "overlay2", "image/overlay2/layerdb/mounts")]
        shown = subprocess.check_output(["lsattr", "-d", *spread], text=True)
        assert [flags.count("T") for flags in shown.split()[::2]] == [1, 1, 1], shown
    assert os.stat(host.path("docker.sock")).st_mode & 0o777 == 0o660
    with open(host.path("docker.pid")) as file:
        assert os.path.exists(f"/proc/{int(file.read())}")


@pytest.mark.parametrize("change, text", [
    (["-p", "{pidfile}", "-g", "{other}"], "is still running: is another daemon using the pid file"),
    (["-p", "{other}.pid", "-g", "{data}"], "is in use by another daemon"),
    (["-p", "{data}", "-g", "{other}"], "ensure docker is not running or delete {data}: "),
])
def test_a_second_daemon_is_refused_by_name(host: Host, tmp_path: Any, change: list[str], text: str) -> None:
    places = {"pidfile": host.path("docker.pid"), "data": host.path("data"), "other": str(tmp_path / "other")}
    arguments = [part.format(**places) for part in change]
    second = host.enter(
        sys.executable,
        dockerd.__file__,
        "-d",
        "-H",
        f"unix://{tmp_path}/second.sock",
        "--exec-root",
        f"{tmp_path}/exec",
        *arguments,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    output = second.communicate(timeout=60)[0].decode()
    assert second.returncode == 1 and text.format(**places) in output
    assert host.http("GET", "/_ping").status == 200


def test_a_storage_driver_that_is_not_there_stops_the_start(tmp_path: Any) -> None:
    done = run_dockerd(
        "-d",
        "-s",
        "nosuch",
        "-H",
        f"unix://{tmp_path}/s",
        "-g",
        f"{tmp_path}/g",
        "--exec-root",
        f"{tmp_path}/e",
        "-p",
        f"{tmp_path}/p",
    )
    assert done.returncode == 1
    assert "nosuch" in done.stderr.splitlines()[-1]


def test_install_registers_the_jobs_of_the_seed(tmp_path: Any) -> None:
    """In a process of its own, because a Daemon lasts as long as its process."""
    program = (
        "import sys; sys.path.insert(0, sys.argv[1]); import dockerd\n"
        "engine = dockerd.Engine(); dockerd.register_builtins(engine)\n"
        "config = dockerd.Config(data_root=sys.argv[2] + '/data', exec_root=sys.argv[2] + '/exec')\n"
        "daemon = dockerd.Daemon(config, engine); daemon.install()\n"
        "assert engine.variables['httpapi.daemon'] is daemon\n"
        "print(*engine.job('commands').run()); engine.shutdown()\n")
    done = subprocess.run(
        [
            "unshare",
            "-n",
            "-m",
            sys.executable,
            "-c",
            program,
            os.path.dirname(dockerd.__file__),
            str(tmp_path),
        ],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert {
        "attach",
        "containers",
        "container_inspect",
        "create",
        "delete",
        "events",
        "history",
        "image_delete",
        "image_inspect",
        "images",
        "import",
        "info",
        "kill",
        "log",
        "logs",
        "pause",
        "resize",
        "restart",
        "start",
        "stop",
        "subscribers_count",
        "tag",
        "unpause",
        "version",
        "wait",
    } <= set(done.stdout.split()), done.stderr


def test_the_start_logs_its_version_and_drivers(new_host: Callable[..., Host]) -> None:
    host = new_host()
    assert (
        f"docker daemon: {dockerd.VERSION} {dockerd.GIT_COMMIT}; execdriver: native; graphdriver:"
        in host.log()
    )
    assert "+job serveapi(unix://" in host.log()


def test_sighup_reloads_and_the_watchdog_is_fed(new_host: Callable[..., Host], tmp_path: Any) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        manager.settimeout(30)
        file = tmp_path / "daemon.json"
        file.write_text("{}")
        host = new_host("--config-file", str(file),
                        environment={"NOTIFY_SOCKET": str(tmp_path / "notify"), "WATCHDOG_USEC": "1000000"})
        seen: set[bytes] = set()
        while not {b"READY=1", b"WATCHDOG=1"} <= seen:
            seen.add(manager.recv(4096))
        file.write_text('{"debug": true, "labels": ["a=b"]}')
        assert host.process
        host.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "reloaded the configuration: debug, labels" in host.log())
        info = host.api("GET", "/info")
        assert info["Labels"] == ["a=b"]
        path = f"{API}/events?since=1&until={int(time.time()) + 1}&filters=" + urllib.parse.quote(
            json.dumps({"type": ["daemon"], "event": ["reload"], "daemon": [info["Name"]]}))
        told = wait_for(lambda: host.http("GET", path).lines)[0]["Actor"]
        assert told["ID"] == info["ID"]
        assert {"debug": "true", "labels": '["a=b"]', "live-restore": "false", "default-runtime": "runc",
                "default-shm-size": "67108864", "name": info["Name"]}.items() <= told["Attributes"].items()
        file.write_text("{")
        host.process.send_signal(signal.SIGHUP)
        wait_for(lambda: "the configuration is not reloaded" in host.log())
        host.stop()
        while manager.recv(4096) != b"STOPPING=1":
            pass


# ------------------------------------------------------------------------------------------------------------
# API server
#
# FakeApi is an API server on a Unix socket whose jobs are functions of the test; Raw is a client that sends
# and reads bytes, so that the tests see the protocol and not what a library makes of it.
# ------------------------------------------------------------------------------------------------------------


class Raw:
    """A client on a connected socket."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.sock.settimeout(20)
        self.buffer = b""

    def send(self, text: str, body: bytes = b"") -> None:
        """Send `text`, its line ends made CRLF, and `body`."""
        self.sock.sendall(text.replace("\r\n", "\n").replace("\n", "\r\n").encode() + body)

    def fill(self) -> bool:
        """Read once more; False at the end."""
        data = self.sock.recv(65536)
        self.buffer += data
        return bool(data)

    def until(self, mark: bytes) -> bytes:
        """What comes up to and with `mark`."""
        while mark not in self.buffer:
            assert self.fill(), f"the connection ended before {mark!r}: {self.buffer!r}"
        data, _, self.buffer = self.buffer.partition(mark)
        return data + mark

    def exactly(self, size: int) -> bytes:
        """The next `size` bytes."""
        while len(self.buffer) < size:
            assert self.fill(), f"the connection ended early: {self.buffer!r}"
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def rest(self) -> bytes:
        """All that comes until the other side ends."""
        while self.fill():
            pass
        data, self.buffer = self.buffer, b""
        return data

    def head(self) -> tuple[int, dict[str, str]]:
        """A response's status and headers (lower case)."""
        lines = self.until(b"\r\n\r\n").decode().split("\r\n")
        return int(lines[0].split(" ")[1]), {
            name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:] if line)
        }

    def chunk(self) -> bytes:
        """The next chunk of a chunked body, b"" the last."""
        size = int(self.until(b"\r\n"), 16)
        data = self.exactly(size)
        assert self.exactly(2) == b"\r\n"
        return data

    def response(self, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
        """A whole response."""
        status, headers = self.head()
        if status in (204, 304) or method == "HEAD":
            return status, headers, b""
        if headers.get("transfer-encoding") == "chunked":
            return status, headers, b"".join(iter(self.chunk, b""))
        if "content-length" in headers:
            return status, headers, self.exactly(int(headers["content-length"]))
        return status, headers, self.rest()

    def ask(self, line: str, body: Any = None, *headers: str) -> tuple[int, dict[str, str], bytes]:
        """Send the request `line` ("GET /path"), with `body` as JSON or bytes, and return the response."""
        fields = ["Host: docker", *headers]
        data = b""
        if body is not None:
            data = body if isinstance(body, bytes) else json.dumps(body).encode()
            fields += [f"Content-Length: {len(data)}"]
            if not any(field.startswith("Content-Type") for field in fields):
                fields += ["Content-Type: application/json"]
        self.send(f"{line} HTTP/1.1\n" + "".join(field + "\n" for field in fields) + "\n", data)
        return self.response(line.split(" ")[0])

    def json(self, line: str, body: Any = None, *headers: str) -> tuple[int, Any]:
        """ask(), the body decoded."""
        status, _, data = self.ask(line, body, *headers)
        return status, json.loads(data) if data else None


class FakeApi:
    """An API server whose jobs are `handlers`: functions of the job; their result is the reply."""

    def __init__(self, host: str, **env: Any) -> None:
        self.engine = dockerd.Engine()
        self.server = dockerd.ApiServer(self.engine)
        self.engine.install(self.server)
        self.host, self.seen = host, []  # type: tuple[str, list[Any]]
        self.thread = threading.Thread(
            target=self._serve, args=({"Logging": True, "SocketGroup": "", **env},), daemon=True
        )
        self.failure: Optional[BaseException] = None
        self.thread.start()
        end = time.monotonic() + 10
        while not self.server.listeners and not self.failure and time.monotonic() < end:
            time.sleep(0.01)

    def _serve(self, env: dict[str, Any]) -> None:
        try:
            self.engine.job("serveapi", self.host, **env).run()
        except BaseException as error:
            self.failure = error

    def job(self, name: str, handler: Callable[[Any], Any] = lambda job: None) -> None:
        """Register `handler` for the job `name`; the jobs run are kept in `seen`."""

        def run(job: Any) -> None:
            self.seen.append(job)
            result = handler(job)
            if result is not None:
                job.reply(result)

        self.engine.register(name, run)

    def connect(self) -> Raw:
        """A client of its first listener."""
        listener = self.server.listeners[0].socket
        sock = socket.socket(listener.family)
        sock.connect(listener.getsockname())
        return Raw(sock)


@pytest.fixture
def fake_api(tmp_path: Any) -> Iterator[FakeApi]:
    """A server on a Unix socket."""
    api = FakeApi(f"unix://{tmp_path}/docker.sock")
    yield api
    api.server.close()
    api.thread.join(5)


@pytest.fixture
def raw(fake_api: FakeApi) -> Iterator[Raw]:
    """A client of fake_api."""
    client = fake_api.connect()
    yield client
    client.sock.close()


# The parser


def test_head_is_parsed() -> None:
    head = dockerd.parse_head(b"POST /a?b=c HTTP/1.1\r\nHost: x\r\nAccept:  a \r\nACCEPT: b\r\nEmpty:\r\n")
    assert head.method == "POST" and head.target == "/a?b=c" and head.minor == 1
    assert head.headers == {"host": "x", "accept": "a, b", "empty": ""}


@pytest.mark.parametrize(
    "data",
    [
        b"GET /\r\n",
        b"GET / HTTP/1.1\n",
        b"GET  / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\nA : b\r\n",
        b"G(T / HTTP/1.1\r\n",
        b"GET / HTTP/1.1\r\n a: b\r\n",
        b"GET / HTTP/1.1\r\na: b\r\n folded\r\n",
        b"GET / HTTP/1.1\r\na: b\nc: d\r\n",
        b"GET / HTTP/1.1\r\na: \0\r\n",
        b"GET / HTTP/1.1\r\nno colon\r\n",
        b"GET / HTTP/1.1\r\n: x\r\n",
        b"GET / HTTP/1.1\r\nContent-Length: 1\r\nContent-Length: 1\r\n",
        b"GET / HTTP/1.1\r\nHost: a\r\nhost: b\r\n",
    ],
)
def test_head_that_two_parsers_could_read_in_two_ways_is_refused(data: bytes) -> None:
    with pytest.raises(dockerd.ProtocolError) as error:
        dockerd.parse_head(data)
    assert error.value.status == 400


@pytest.mark.parametrize(
    "fields, length",
    [
        ("", 0),
        ("Content-Length: 12\n", 12),
        ("Transfer-Encoding: chunked\n", -1),
        ("Transfer-Encoding: Chunked\n", -1),
    ],
)
def test_body_length(fields: str, length: int) -> None:
    data = ("POST / HTTP/1.1\n" + fields).replace("\n", "\r\n").encode()
    assert dockerd.body_length(dockerd.parse_head(data)) == length


@pytest.mark.parametrize(
    "fields, status",
    [
        ("Content-Length: 3\nTransfer-Encoding: chunked\n", 400),
        ("Transfer-Encoding: gzip\n", 501),
        ("Transfer-Encoding: gzip, chunked\n", 501),
        ("Content-Length: -1\n", 400),
        ("Content-Length: +1\n", 400),
        ("Content-Length: 1_0\n", 400),
        ("Content-Length: 0x1\n", 400),
        ("Content-Length: 1, 1\n", 400),
        ("Content-Length: " + "9" * 30 + "\n", 400),
        ("Content-Length:\n", 400),
        ("Transfer-Encoding: chunked\nTransfer-Encoding: chunked\n", 400),
    ],
)
def test_smuggled_bodies_are_refused_and_the_connection_ends(raw: Raw, fields: str, status: int) -> None:
    raw.send("POST /version HTTP/1.1\nHost: x\n" + fields + "\nGET /_ping HTTP/1.1\nHost: x\n\n")
    data = raw.rest()
    assert data.startswith(b"HTTP/1.1 %d " % status) and data.count(b"HTTP/1.1 ") == 1


def test_chunked_encoding_of_http_1_0_is_refused(raw: Raw) -> None:
    raw.send("POST /version HTTP/1.0\nTransfer-Encoding: chunked\n\n0\n\n")
    assert raw.rest().startswith(b"HTTP/1.1 400 ")


@pytest.mark.parametrize(
    "data, status",
    [
        (b"GET / HTTP/1.1\n\n", 400),
        (b"\x16\x03\x01\x02\x00", 400),
        (b"GET / HTTP/2.0\r\n\r\n", 505),
        (b"GET / HTTP/1.1\r\nA: " + b"x" * 70000, 431),
        (b"GET /" + b"x" * 70000, 431),
        (b"GET / HTTP/1.1\r\n" + b"A: b\r\n" * 300 + b"\r\n", 431),
        (b"GET / HTTP/1.1\r\nExpect: x\r\n\r\n", 417),
        (b"GET /a%00b HTTP/1.1\r\n\r\n", 400),
    ],
)
def test_bad_heads_are_answered_at_once(raw: Raw, data: bytes, status: int) -> None:
    raw.sock.sendall(data)
    assert raw.rest().startswith(b"HTTP/1.1 %d " % status)


def test_pipelined_requests_are_answered_in_turn(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("auth", lambda job: job.env["body"])
    post = 'POST /auth HTTP/1.1\nContent-Type: application/json\nContent-Length: 7\n\n{"a":%d}'
    raw.send("\n" + post % 1 + "GET /_ping HTTP/1.1\n\n" + post % 2)
    assert [raw.response()[2] for _ in range(3)] == [b'{"a":1}\n', b"OK", b'{"a":2}\n']


def test_unread_body_is_dropped_before_the_next_request(raw: Raw) -> None:
    assert raw.ask("POST /nothing", b"x" * 1000)[0] == 404
    assert raw.ask("GET /_ping")[2] == b"OK"


def test_a_large_unread_body_ends_the_connection_after_the_answer(raw: Raw) -> None:
    status, headers, _ = raw.ask("POST /nothing", b"x" * 3000000)
    assert status == 404 and headers["connection"] == "close"


def test_http_1_0(raw: Raw, fake_api: FakeApi) -> None:
    raw.send("GET /_ping HTTP/1.0\nConnection: keep-alive\n\n")
    status, headers, body = raw.response()
    assert (status, headers["connection"], body) == (200, "keep-alive", b"OK")
    fake_api.job("stats", lambda job: job.stdout.write(b'{"a": 1}\n{"a": 2}\n') and None)
    raw.send("GET /containers/x/stats HTTP/1.0\n\n")
    status, headers, body = raw.response()
    assert "transfer-encoding" not in headers and body == b'{"a":1}\n{"a":2}\n'


def test_connection_close_is_obeyed(raw: Raw) -> None:
    raw.send("GET /_ping HTTP/1.1\nConnection: close\n\n")
    assert raw.response()[1]["connection"] == "close" and raw.rest() == b""


def test_chunked_body_with_extensions_and_trailer(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("auth", lambda job: job.env["body"])
    raw.send(
        "POST /auth HTTP/1.1\nContent-Type: application/json; charset=utf-8\nTransfer-Encoding: chunked\n\n"
        '3;x="y"\n{"a\n004\n":1}\n0\nTrailer: x\n\nGET /_ping HTTP/1.1\n\n'
    )
    assert raw.response()[2] == b'{"a":1}\n' and raw.response()[2] == b"OK"


@pytest.mark.parametrize(
    "chunks", ["x\n", "-1\n", "1 1\na\n", "1\nab\n0\n\n", "\n", "0x1\na\n", "1" * 16 + "\n"]
)
def test_bad_chunks_are_refused(fake_api: FakeApi, raw: Raw, chunks: str) -> None:
    fake_api.job("auth", lambda job: job.env["body"])
    raw.send("POST /auth HTTP/1.1\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n" + chunks)
    assert raw.rest().startswith(b"HTTP/1.1 400 ")


def test_expect_100_continue(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("auth", lambda job: job.env["body"])
    raw.send(
        "POST /auth HTTP/1.1\nContent-Type: application/json\nContent-Length: 2\nExpect: 100-continue\n\n"
    )
    assert raw.until(b"\r\n\r\n") == b"HTTP/1.1 100 Continue\r\n\r\n"
    raw.sock.sendall(b"{}")
    assert raw.response()[0] == 200
    raw.send("POST /nothing HTTP/1.1\nContent-Length: 9\nExpect: 100-continue\n\n")
    status, headers, _ = raw.response()
    assert status == 404 and headers["connection"] == "close"  # the body may come or not


# Limits


def test_slow_and_silent_clients_time_out(fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd, "HEAD_SECONDS", 0.3)
    monkeypatch.setattr(dockerd, "JSON_SECONDS", 0.3)
    fake_api.job("auth", lambda job: job.env["body"])
    silent, slow, slow_body, idle = (fake_api.connect() for _ in range(4))
    assert idle.ask("GET /_ping")[0] == 200
    slow_body.send("POST /auth HTTP/1.1\nContent-Type: application/json\nContent-Length: 20\n\n{")
    with contextlib.suppress(OSError):
        for byte in b"GET /_ping HTTP/1.1\r\n\r\n":
            slow.sock.sendall(bytes([byte]))
            time.sleep(0.03)
    assert silent.rest() == b""
    assert slow.rest().startswith(b"HTTP/1.1 408 ") and slow_body.rest().startswith(b"HTTP/1.1 408 ")
    assert idle.ask("GET /_ping")[0] == 200


def test_the_longest_idle_connection_makes_room(fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd, "IDLE_CONNECTIONS", 2)
    clients = [fake_api.connect() for _ in range(3)]
    for client in clients:
        assert client.ask("GET /_ping")[0] == 200
        time.sleep(0.05)
    assert clients[0].rest() == b""
    assert clients[1].ask("GET /_ping")[0] == clients[2].ask("GET /_ping")[0] == 200


def test_too_many_connections_are_refused(fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch) -> None:
    first = fake_api.connect()
    assert first.ask("GET /_ping")[0] == 200
    monkeypatch.setattr(dockerd, "CONNECTIONS", 1)
    assert fake_api.connect().rest().startswith(b"HTTP/1.1 503 ")
    assert first.ask("GET /_ping")[0] == 200


@pytest.mark.parametrize(
    "text, reason",
    [
        (b"[" * 65 + b"]" * 65, "nested deeper"),
        (b"[" * 100000, "nested deeper"),
        (b'{"a":' * 65 + b"1" + b"}" * 65, "nested"),
        (b"[]]", "invalid JSON: unexpected content after JSON"),
        *[(text, "invalid JSON: unexpected EOF") for text in (
            b"{", b'{"a"', b'{"a":', b'{"a":1,', b'"a', b"[" * 60, b"[1, ")],
        *[(text, f"invalid JSON: invalid character '{character}' {where}$") for text, character, where in (
            (b"x", "x", "looking for beginning of value"), (b"[1,]", "]", "looking for beginning of value"),
            (b"NaN", "N", "looking for beginning of value"),
            (b"{a}", "a", "looking for beginning of object key string"),
            (b'{"a":1,}', "}", "looking for beginning of object key string"),
            (b'{"a" 1}', "1", "after object key"), (b'{"a":01}', "1", "after object key:value pair"),
            (b'{"a":"\\x"}', "x", "in string escape code"), (b'"\n"', r"\\n", "in string literal"))],
        (b"\xff", "invalid JSON"),
        (b'{"a": 1} {}', "invalid JSON: unexpected content after JSON"),
        (b'"\\' * 999999, "invalid JSON"),  # would take hours where each were looked at from each
        (b'"' * 999999, "invalid JSON"),
    ],
)
def test_json_that_is_refused(text: bytes, reason: str) -> None:
    with pytest.raises(dockerd.BadParameter, match=reason):
        dockerd.parse_json(text)


def test_json_that_is_accepted() -> None:
    assert dockerd.parse_json(b"[" * 64 + b"]" * 64)
    assert dockerd.parse_json(b'"' + b"[{" * 999 + b'"') == "[{" * 999
    assert dockerd.parse_json(rb'["\"[", "\\", "]"]') == ['"[', "\\", "]"]
    assert dockerd.parse_json(rb'"a\ud800b\ud83d\ude00"') == "a\ufffdb\U0001f600"


def test_odd_requests_are_answered(host: Host) -> None:
    """What Go's decoder takes, and numbers that are too large for a clock or a packet."""
    body = {"Image": "busybox", "hostConfig": {"NetworkMode": "none", "ReadonlyRootfs": True}}
    assert host.inspect(host.api("POST", "/containers/create", body)["Id"])["HostConfig"]["ReadonlyRootfs"]
    for odd in (["x"], "x", 5, True):
        host.api("POST", "/containers/create", {"Image": "busybox", "HostConfig": odd}, 400)
    allow = 'seccomp={"defaultAction":"SCMP_ACT_ALLOW",'
    call = '"syscalls":[{"name":"read","action":"SCMP_ACT_LOG","args":[{"index":0.5,"op":"SCMP_CMP_EQ"}]}]}'
    for host_config, status in (
        ({"Tmpfs": {"/a\0b": ""}}, 400),
        ({"SecurityOpt": [allow + '"flags":5}']}, 201), ({"SecurityOpt": [allow + call]}, 201),
    ):
        made = host.http("POST", f"{API}/containers/create", {"Image": "busybox", "HostConfig": host_config})
        assert made.status == status
        if made.status == 201:
            host.api("POST", f"/containers/{made.json['Id']}/start", status=400)
    name = host.create("x" * 100000)
    assert "exec: \"xxx" in host.api("POST", f"/containers/{name}/start", status=400)["message"]
    box = Execs(host, "sh", "-c", "echo up; trap 'exit 3' TERM; while :; do sleep .05; done")
    assert host.api("POST", f"/exec/{box.create('true')}/start", {"detach": True}, 200) == b""
    wait_for(lambda: log_text(host, box.id))
    for tail in ("%C2%B2", "9" * 5000):
        assert host.http("GET", f"{API}/containers/{box.id}/logs?stdout=1&tail={tail}").body.endswith(b"up\n")
    events = host.hijack(f"{API}/events?until=999999999999999", "GET", upgrade=False)
    with contextlib.closing(events) as stream:
        host.api("POST", f"/containers/{box.id}/stop?t={(1 << 63) - 1}")
        stream.read_until(b'"Action":"stop"')
    assert host.inspect(box.id)["State"]["ExitCode"] == 3


def test_deep_documents_end_no_daemon(host: Host) -> None:
    """The decoder recurses, on the small stack of a thread: clients, images and Dockerfiles could kill it."""
    deep, tar = "[" * 50000, {"Content-Type": "application/x-tar"}
    seccomp = {"HostConfig": {"SecurityOpt": ["seccomp=" + deep]}}
    item = b'[{"Config":"c.json","Layers":[]}]'
    config = b'{"rootfs":{"type":"layers","diff_ids":[]},"x":' + deep.encode()
    for path, body, headers in (
        ("/images/load", tar_of({"manifest.json": deep.encode()}), tar),
        ("/images/load", tar_of({"manifest.json": item, "c.json": config}), tar),
        ("/containers/create", {"Image": "busybox", **seccomp}, {}),
    ):  # fmt: skip
        answer = host.http("POST", API + path, body, headers)
        assert (answer.status, b"deeper than 64 levels" in answer.body) == (400, True), answer.body[-200:]
    assert host.http("GET", f"{API}/containers/json?filters={deep}").status == 400
    dockerfile = tar_of({"Dockerfile": b"FROM scratch\nCMD " + deep.encode() + b"\n"})
    assert b"reading build args" in host.http("POST", f"{API}/build?buildargs={deep}", dockerfile, tar).body
    built = host.http("POST", f"{API}/build", dockerfile, tar).body
    image = re.search(rb"Successfully built (\w+)", built)
    assert image, built[-200:]
    host.api("DELETE", "/images/" + image[1].decode())


def test_credentials_that_are_no_object(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("push")
    for text in (b"5", b"[1]", b'"x"', b"null", b"{}", b'{"a":'):
        header = "X-Registry-Auth: " + base64.urlsafe_b64encode(text).decode()
        raw.send(f"POST /images/x/push HTTP/1.1\nHost: x\n{header}\nContent-Length: 0\n\n")
        assert raw.response()[0] == 200
    assert [job.env["authConfig"] for job in fake_api.seen] == [{}] * 6


def test_json_body_rules(fake_api: FakeApi, raw: Raw, monkeypatch: pytest.MonkeyPatch) -> None:
    fake_api.job("auth", lambda job: job.env["body"])
    assert raw.json("POST /auth", b"{}", "Content-Type: text/plain") == (
        400,
        {"message": "unsupported Content-Type header (text/plain): must be 'application/json'"},
    )
    raw.send("POST /auth HTTP/1.1\nContent-Length: 2\n\n{}")
    assert b"malformed Content-Type header" in raw.response()[2]
    assert raw.json("POST /auth", b"[]")[0] == 400
    assert raw.json("POST /auth") == (200, {})
    monkeypatch.setattr(dockerd, "JSON_BYTES", 100)
    raw.send(
        "POST /auth HTTP/1.1\nContent-Type: application/json\nTransfer-Encoding: chunked\n\n"
        "70\n" + "x" * 0x70 + "\n0\n\n"
    )
    assert raw.rest().startswith(b"HTTP/1.1 413 ")


# Routes and versions


def test_every_route_is_found_by_its_path() -> None:
    for row in dockerd.ROUTES:
        path = (
            row.path.replace("{name}", "reg.io:5000/a/b:c")
            .replace("{id}", "abc")
            .replace("{checkpoint}", "c")
        )
        found = dockerd.find_route(row.method, path)
        assert found and found[0].path == row.path, (row.method, path)
        assert all("/json" not in name for name in found[1])
    slashed = dockerd.find_route("GET", "/containers//x/json")
    assert slashed and slashed[1] == ("/x",)
    for method, path in (
        ("GET", "/containers/json/"),
        ("PUT", "/info"),
        ("GET", "/"),
        ("GET", "/containers//json"),
    ):
        assert dockerd.find_route(method, path) is None, path


@pytest.mark.parametrize(
    "line, status, message",
    [
        ("GET /v1.99/version", 400, "client version 1.99 is too new. Maximum supported API version is 1.51"),
        ("GET /nothing", 404, "page not found"),
        ("PUT /version", 404, "page not found"),
        ("GET /info", 501, "info: this feature is not supported by this daemon"),
        ("POST /swarm/leave", 503, "This node is not part of a swarm"),
        ("GET /plugins/x/y/json", 404, 'plugin "x/y" not found'),
        ("GET /v1.40/containers/x/logs", 400, "Bad parameters: you must choose at least one stream"),
        ("POST /containers/x/resize?h=1&w=x", 400, 'invalid resize width "x": invalid syntax'),
        ("GET /containers/json?limit=x", 400, 'strconv.Atoi: parsing "x": invalid syntax'),
    ],
)
def test_errors(raw: Raw, line: str, status: int, message: Optional[str]) -> None:
    answer = raw.json(line)
    assert answer[0] == status and message in (None, answer[1]["message"])


def test_old_version_is_refused_in_plain_text(raw: Raw) -> None:
    status, headers, body = raw.ask("GET /v1.11/version")
    assert status == 400 and headers["content-type"] == "text/plain; charset=utf-8"
    assert body == (
        b"client version 1.11 is too old. Minimum supported API version is 1.12, please upgrade your "
        b"client to a newer version\n"
    )
    assert raw.ask("GET /v1.23/nothing")[2] == b"page not found\n"
    assert raw.ask("GET /v1.24/nothing")[2] == b'{"message":"page not found"}\n'


def test_ping_and_the_headers_of_every_response(raw: Raw) -> None:
    for method, body in (("GET", b"OK"), ("HEAD", b"")):
        for path in ("/_ping", "/v1.24/_ping", "http://docker/_ping"):
            status, headers, data = raw.ask(f"{method} {path}")
            assert (status, data) == (200, body)
            assert headers["content-length"] == str(len(body))
            assert headers["api-version"] == "1.51" and headers["ostype"] == "linux"
            assert headers["docker-experimental"] == "false" and headers["builder-version"] == "1"
            assert headers["server"] == f"Docker/{dockerd.VERSION} (linux)" and headers["swarm"] == "inactive"
            assert headers["cache-control"] == "no-cache, no-store, must-revalidate"
            assert headers["pragma"] == "no-cache" and headers["content-type"] == "text/plain; charset=utf-8"


def test_every_error_class_has_its_status(fake_api: FakeApi, raw: Raw) -> None:
    def fail(job: Any) -> None:
        raise next(kind for kind in dockerd.HTTP_STATUS if kind.__name__ == job.args[0])("it went\u2028wrong")

    fake_api.job("container_inspect", fail)
    for kind, status in dockerd.HTTP_STATUS.items():
        answer = raw.json(f"GET /containers/{kind.__name__}/json")
        assert answer == (status, None if status == 304 else {"message": "it went\u2028wrong"})


def test_an_unforeseen_exception_is_a_500_and_the_connection_goes_on(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("info", lambda job: 1 / 0)
    assert raw.json("GET /info") == (500, {"message": "division by zero"})
    assert raw.ask("GET /_ping")[0] == 200


def test_parameters_are_converted(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("containers", lambda job: [dict(job.env)])
    fake_api.job("stop", lambda job: None)
    query = "all=1&limit=5&size=False&filters=%7B%22status%22%3A%7B%22a+b%22%3Atrue%7D%7D&since=&x=y"
    assert raw.json("GET /containers/json?" + query) == (
        200, [{"all": True, "limit": 5, "size": False, "filters": '{"status":{"a b":true}}'}])
    raw.ask("GET /v1.23/containers/json?since=x&limit=2")
    assert dict(fake_api.seen[-1].env) == {"filters": '{"since": ["x"]}', "all": True, "limit": 2}
    raw.ask("GET /v1.24/containers/json?since=x")
    assert dict(fake_api.seen[-1].env) == {}
    assert raw.json("GET /containers/json?limit=x")[0] == 400
    assert raw.ask("GET /v1.23/containers/json?since=x&filters=%7B")[0] == 400
    assert raw.ask("POST /v1.41/containers/a%2Fb/stop?t=3&signal=INT")[0] == 204
    assert fake_api.seen[-1].args == ["a/b"] and dict(fake_api.seen[-1].env) == {"t": 3}
    assert (
        raw.ask("POST /containers/x/stop?signal=INT")[0] == 204 and fake_api.seen[-1].env["signal"] == "INT"
    )


def test_cors_headers_are_sent_when_asked_for(tmp_path: Any) -> None:
    for env, origin in (({"EnableCors": True}, "*"), ({"CorsHeaders": "http://a"}, "http://a"), ({}, None)):
        api = FakeApi(f"unix://{tmp_path}/docker.sock", **env)
        status, headers, _ = api.connect().ask("OPTIONS /any/thing")
        assert status == 200 and headers.get("access-control-allow-origin") == origin
        api.server.close()


# Version gates

NEW_CONTAINER: dict[str, Any] = {
    "Id": "c" * 64,
    "Created": "2024-01-01T00:00:00Z",
    "Path": "sh",
    "Args": ["-c"],
    "Image": "sha256:" + "a" * 64,
    "State": {
        "Status": "exited",
        "Running": False,
        "Paused": False,
        "Restarting": False,
        "OOMKilled": False,
        "Dead": False,
        "Pid": 0,
        "ExitCode": 3,
        "Error": "",
        "StartedAt": "a",
        "FinishedAt": "b",
    },
    "ResolvConfPath": "/r",
    "HostnamePath": "/h",
    "HostsPath": "/o",
    "LogPath": "/l",
    "Name": "/n",
    "RestartCount": 0,
    "Driver": "overlay2",
    "Platform": "linux",
    "MountLabel": "",
    "ProcessLabel": "",
    "AppArmorProfile": "",
    "ExecIDs": None,
    "GraphDriver": {"Name": "overlay2", "Data": {}},
    "HostConfig": {
        "Binds": ["/a:/b"],
        "Memory": 5,
        "CpusetCpus": "0",
        "NetworkMode": "none",
        "Dns": [],
        "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0},
        "ShmSize": 1,
    },
    "Mounts": [{"Type": "bind", "Source": "/a", "Destination": "/b", "RW": False}],
    "Config": {
        "Hostname": "x",
        "Tty": True,
        "Env": ["A=b"],
        "Labels": {},
        "Image": "busybox",
        "ExposedPorts": None,
    },
    "NetworkSettings": {
        "Bridge": "",
        "SandboxID": "s",
        "Ports": {},
        "IPAddress": "",
        "Networks": {"net": {"Aliases": ["a"], "DNSNames": ["d"]}},
    },
}


def test_container_inspect_of_1_14_is_docker_1_2_0_s(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("container_inspect", lambda job: NEW_CONTAINER)
    status, old = raw.json("GET /v1.14/containers/x/json")
    assert status == 200 and list(old) == [
        "Id",
        "Created",
        "Path",
        "Args",
        "Config",
        "State",
        "Image",
        "NetworkSettings",
        "ResolvConfPath",
        "HostnamePath",
        "HostsPath",
        "Name",
        "Driver",
        "ExecDriver",
        "MountLabel",
        "ProcessLabel",
        "Volumes",
        "VolumesRW",
        "HostConfig",
    ]
    assert old["State"] == {
        "Running": False,
        "Paused": False,
        "Restarting": False,
        "Pid": 0,
        "ExitCode": 3,
        "StartedAt": "a",
        "FinishedAt": "b",
    }
    assert old["Image"] == "a" * 64 and old["Volumes"] == {"/b": "/a"} and old["VolumesRW"] == {"/b": False}
    assert (
        old["Config"]["Memory"] == 5 and old["Config"]["Cpuset"] == "0" and old["Config"]["PortSpecs"] is None
    )
    assert old["HostConfig"]["LxcConf"] == [] and "ShmSize" not in old["HostConfig"]
    assert set(old["NetworkSettings"]) == {
        "IPAddress",
        "IPPrefixLen",
        "Gateway",
        "Bridge",
        "PortMapping",
        "Ports",
    }


def test_container_inspect_between(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("container_inspect", lambda job: NEW_CONTAINER)
    shapes = {
        version: raw.json(f"GET /v{version}/containers/x/json")[1]
        for version in ("1.19", "1.20", "1.21", "1.22", "1.43", "1.44", "1.45", "1.51")
    }
    assert shapes["1.51"] == NEW_CONTAINER == raw.json("GET /containers/x/json")[1]
    assert "Mounts" not in shapes["1.19"] and "Mounts" in shapes["1.20"]
    assert (
        "Networks" not in shapes["1.20"]["NetworkSettings"]
        and "Networks" in shapes["1.21"]["NetworkSettings"]
    )
    assert shapes["1.21"]["ExecDriver"] == "native-0.2" and "ExecDriver" not in shapes["1.22"]
    aliases = {
        version: shape["NetworkSettings"]["Networks"]["net"]
        for version, shape in shapes.items()
        if version >= "1.21"
    }
    assert aliases["1.44"]["Aliases"] == ["a", "c" * 12] and aliases["1.45"]["Aliases"] == ["a"]
    assert "DNSNames" not in aliases["1.43"] and "DNSNames" in aliases["1.44"]


def test_list_shapes(fake_api: FakeApi, raw: Raw) -> None:
    listed = {
        "Id": "c",
        "Names": ["/n"],
        "Image": "sha256:" + "a" * 64,
        "ImageID": "sha256:" + "a" * 64,
        "Command": "sh",
        "Created": 1,
        "Ports": [],
        "Labels": {},
        "State": "created",
        "Status": "Created",
        "SizeRw": 3,
        "HostConfig": {"NetworkMode": "none", "Annotations": {}},
        "NetworkSettings": {},
        "Mounts": [],
    }
    fake_api.job("containers", lambda job: [listed])
    keys = {
        version: set(raw.json(f"GET /v{version}/containers/json")[1][0])
        for version in ("1.14", "1.17", "1.18", "1.19", "1.20", "1.21", "1.22", "1.23", "1.51")
    }
    assert keys["1.14"] == {"Id", "Names", "Image", "Command", "Created", "Status", "Ports", "SizeRw"}
    assert keys["1.18"] - keys["1.17"] == {"Labels"} and keys["1.20"] - keys["1.19"] == {"HostConfig"}
    assert keys["1.21"] - keys["1.20"] == {"ImageID"} and keys["1.22"] - keys["1.21"] == {"NetworkSettings"}
    assert keys["1.23"] - keys["1.22"] == {"State", "Mounts"} and keys["1.51"] == set(listed)
    old = raw.json("GET /v1.14/containers/json")[1][0]
    assert old["Status"] == "" and old["Image"] == "a" * 12
    for name, shown in (("busybox", "busybox:latest"), ("host:5000/a", "host:5000/a:latest"), ("a:b", "a:b")):
        listed["Image"] = name
        assert raw.json("GET /v1.14/containers/json")[1][0]["Image"] == shown
    assert "Annotations" not in raw.json("GET /v1.45/containers/json")[1][0]["HostConfig"]


def test_image_shapes(fake_api: FakeApi, raw: Raw) -> None:
    identity = "sha256:" + "a" * 64
    fake_api.job(
        "images",
        lambda job: [
            {
                "Id": identity,
                "ParentId": "",
                "RepoTags": [],
                "RepoDigests": [],
                "Created": 1,
                "Size": 7,
                "SharedSize": -1,
                "Labels": None,
                "Containers": 2,
                "env": dict(job.env),
            }
        ],
    )
    old = raw.json("GET /v1.14/images/json?filter=bu*&shared-size=1")[1][0]
    assert old == {
        "ParentId": "",
        "RepoTags": ["<none>:<none>"],
        "Id": "a" * 64,
        "Created": 1,
        "Size": 7,
        "VirtualSize": 7,
    }
    assert json.loads(fake_api.seen[-1].env["filters"]) == {"reference": ["bu*"]}
    v43, v44 = (raw.json(f"GET /v{version}/images/json")[1][0] for version in ("1.43", "1.44"))
    assert raw.json("GET /v1.51/images/json")[1][0]["Containers"] == 2
    assert v44["Containers"] == v43["Containers"] == -1
    assert v43["VirtualSize"] == 7 and v43["RepoTags"] == [] and "VirtualSize" not in v44
    fake_api.job(
        "image_inspect",
        lambda job: {
            "Id": identity,
            "Parent": "",
            "RepoTags": [],
            "RepoDigests": [],
            "Size": 1,
            "Config": {"Cmd": ["sh"]},
            "RootFS": {},
            "Metadata": {},
            "GraphDriver": {},
            "Created": "c",
            "Os": "linux",
            "Architecture": "amd64",
        },
    )
    old = raw.json("GET /v1.14/images/a/b/json")[1]
    assert (
        set(old)
        == {
            "Id",
            "Parent",
            "Comment",
            "Created",
            "Container",
            "ContainerConfig",
            "DockerVersion",
            "Author",
            "Config",
            "Architecture",
            "Os",
            "Size",
        }
        and old["Id"] == "a" * 64
    )
    assert fake_api.seen[-1].args == ["a/b"]
    v49, v50 = (raw.json(f"GET /v{version}/images/x/json")[1] for version in ("1.49", "1.50"))
    assert v49["Config"]["Hostname"] == "" and v50["Config"] == {"Cmd": ["sh"]}


def test_info_and_version_shapes(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job(
        "info",
        lambda job: {
            "ID": "x",
            "Containers": 2,
            "Images": 1,
            "Driver": "overlay2",
            "DriverStatus": [["a", "b"]],
            "MemoryLimit": True,
            "Debug": False,
            "KernelVersion": "",
            "SecurityOptions": ["name=seccomp,profile=builtin"],
            "Warnings": [],
            "Runtimes": {"runc": {"path": "x", "status": {}}},
            "FirewallBackend": {},
            "RuncCommit": {"ID": "1"},
        },
    )
    v14, v18, v24, v43, v51 = (
        raw.json(f"GET /v{version}/info")[1] for version in ("1.14", "1.18", "1.24", "1.43", "1.51")
    )
    assert (
        set(v14) == set(dockerd.INFO_1_14)
        and v14["MemoryLimit"] == 1
        and v14["ExecutionDriver"] == "native-0.2"
    )
    assert v18["Debug"] == 0 and v18["Debug"] is not False and v18["ID"] == "x"
    assert (
        v24["SecurityOptions"] == ["seccomp"]
        and v24["KernelVersion"] == "<unknown>"
        and "Warnings" not in v24
    )
    assert v43["Runtimes"] == {"runc": {"path": "x"}} and v43["RuncCommit"] == {"ID": "1", "Expected": "1"}
    assert v51["Runtimes"]["runc"]["status"] == {} and "Expected" not in v51["RuncCommit"]
    fake_api.job(
        "version",
        lambda job: {
            "Platform": {},
            "Components": [],
            "Version": "v",
            "ApiVersion": "1.51",
            "MinAPIVersion": "1.12",
            "GitCommit": "g",
            "Os": "linux",
            "BuildTime": "t",
        },
    )
    assert set(raw.json("GET /v1.14/version")[1]) == set(dockerd.VERSION_1_14)
    assert (
        "Components" not in raw.json("GET /v1.34/version")[1]
        and "MinAPIVersion" in raw.json("GET /v1.25/version")[1]
    )


def test_create_is_brought_to_the_newest_shape(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("create", lambda job: {"Id": "x", "Warnings": []})
    sent: dict[str, Any] = {
        "Image": "busybox",
        "Cmd": "ls",
        "Memory": 5000000,
        "Cpuset": "0",
        "CpuShares": 1,
        "Healthcheck": {"StartInterval": 1},
        "HostConfig": {
            "AutoRemove": True,
            "Annotations": {"a": "b"},
            "ConsoleSize": [1, 2],
            "Mounts": [{"Type": "bind", "BindOptions": {"NonRecursive": True}, "TmpfsOptions": {}}],
        },
    }
    assert raw.json("POST /v1.14/containers/create?name=n&platform=linux", sent) == (
        201,
        {"Id": "x", "Warnings": None},
    )
    job = fake_api.seen[-1]
    body, host = job.env["body"], job.env["body"]["HostConfig"]
    assert job.args == ["n"] and "platform" not in job.env and job.env["defaultReadOnlyNonRecursive"]
    assert body["Cmd"] == "ls" and "Memory" not in body and body["Healthcheck"] == {}
    assert host["Memory"] == 5000000 and host["CpusetCpus"] == "0" and host["CpuShares"] == 1
    assert "AutoRemove" not in host and "Annotations" not in host and host["IpcMode"] == "shareable"
    assert host["Mounts"] == [{"Type": "bind", "BindOptions": {}}]
    assert raw.json("POST /containers/create?name=n&platform=linux", sent) == (
        201,
        {"Id": "x", "Warnings": []},
    )
    job = fake_api.seen[-1]
    assert job.env["body"] == sent and job.env["platform"] == "linux"


@pytest.mark.parametrize(
    "version, part, message",
    [
        (
            "1.43",
            {"NetworkingConfig": {"EndpointsConfig": {"a": {}, "b": {}}}},
            "Container cannot be created with multiple network endpoints: a, b",
        ),
        (
            "1.44",
            {"HostConfig": {"Mounts": [{"Type": "volume", "VolumeOptions": {"Subpath": "x"}}]}},
            "VolumeOptions.Subpath needs API v1.45 or newer",
        ),
        (
            "1.47",
            {"HostConfig": {"Mounts": [{"Type": "image"}]}},
            'Mount type "Image" needs API v1.48 or newer',
        ),
    ],
)
def test_create_refuses_what_an_old_client_would_get_wrong(
    fake_api: FakeApi, raw: Raw, version: str, part: dict[str, Any], message: str
) -> None:
    fake_api.job("create", lambda job: {"Id": "x", "Warnings": []})
    part = {"Image": "busybox", **part}
    assert raw.json(f"POST /v{version}/containers/create", part) == (400, {"message": message})
    assert raw.json("POST /containers/create", part)[0] == 201


@pytest.mark.parametrize("body", [{}, {"HostConfig": {}}])
@pytest.mark.parametrize("version", ["1.24", "1.40", "1.51"])
def test_create_needs_a_configuration(raw: Raw, version: str, body: Any) -> None:
    assert raw.json(f"POST /v{version}/containers/create", body)[0] == 400


def test_create_needs_a_body(raw: Raw) -> None:
    assert raw.json("POST /containers/create") == (
        400,
        {"message": "invalid JSON: got EOF while reading request body"},
    )


def test_start_takes_a_host_config_before_1_24(fake_api: FakeApi, raw: Raw) -> None:
    fake_api.job("start")
    assert raw.ask("POST /v1.23/containers/x/start", {"Binds": ["/a:/b"]})[0] == 204
    assert fake_api.seen[-1].env == {"hostconfig": {"Binds": ["/a:/b"]}}
    assert raw.ask("POST /v1.24/containers/x/start", {"Binds": ["/a:/b"]})[0] == 400
    assert raw.ask("POST /v1.24/containers/x/start", b"{}")[0] == 204 and not fake_api.seen[-1].env
    assert raw.ask("POST /containers/x/start?detachKeys=a")[0] == 204


def test_kill_of_a_stopped_container_was_no_error_before_1_20(fake_api: FakeApi, raw: Raw) -> None:
    def stopped(job: Any) -> None:
        raise dockerd.Conflict("container is not running")

    fake_api.job("kill", stopped)
    assert raw.ask("POST /v1.19/containers/x/kill?signal=9")[0] == 204 and fake_api.seen[-1].args == [
        "x",
        "9",
    ]
    assert raw.ask("POST /v1.20/containers/x/kill")[0] == 409


# Streams


def test_wait_sends_its_headers_at_once(fake_api: FakeApi, raw: Raw) -> None:
    gone = threading.Event()

    def wait(job: Any) -> Any:
        job.ready()
        assert gone.wait(10)
        return {"StatusCode": 7, "Error": None}

    fake_api.job("wait", wait)
    raw.send("POST /v1.30/containers/x/wait?condition=next-exit HTTP/1.1\n\n")
    status, headers = raw.head()
    assert status == 200 and headers["content-type"] == "application/json"
    assert fake_api.seen[-1].env == {"condition": "next-exit"}
    gone.set()
    assert json.loads(b"".join(iter(raw.chunk, b""))) == {"StatusCode": 7}
    assert raw.json("POST /v1.29/containers/x/wait?condition=removed") == (200, {"StatusCode": 7})
    assert fake_api.seen[-1].env == {}


def test_wait_for_a_missing_container_is_an_error(fake_api: FakeApi, raw: Raw) -> None:
    def missing(job: Any) -> None:
        raise dockerd.NotFound("No such container: x")

    fake_api.job("wait", missing)
    assert raw.json("POST /containers/x/wait") == (404, {"message": "No such container: x"})


@pytest.mark.parametrize(
    "version, tty, kind",
    [("1.41", False, "raw"), ("1.42", False, "multiplexed"), ("1.42", True, "raw"), ("1.14", False, "raw")],
)
def test_logs(fake_api: FakeApi, raw: Raw, version: str, tty: bool, kind: str) -> None:
    def logs(job: Any) -> None:
        job.ready(tty=tty)
        job.stdout.write(b"out")
        job.stderr.write(b"error")

    fake_api.job("logs", logs)
    status, headers, body = raw.ask(f"GET /v{version}/containers/x/logs?stdout=1&stderr=1&tail=5")
    assert status == 200 and headers["content-type"] == f"application/vnd.docker.{kind}-stream"
    assert body == (b"outerror" if tty else b"\1\0\0\0\0\0\0\3out\2\0\0\0\0\0\0\5error")
    assert fake_api.seen[-1].env["tail"] == "5"


@pytest.mark.parametrize(
    "line, name",
    [
        ("POST /containers/x/wait", "wait"),
        ("GET /events", "events"),
        ("GET /containers/x/logs?stdout=1&follow=1", "logs"),
        ("POST /images/create?fromImage=x", "pull"),
    ],
)
def test_a_job_is_cancelled_when_its_client_hangs_up(fake_api: FakeApi, line: str, name: str) -> None:
    cancelled = threading.Event()

    def last(job: Any) -> Any:
        job.ready(tty=True)
        with contextlib.suppress(ConnectionError):
            job.stdout.write(b'{"status":"x"}\n')
        if job.cancelled.wait(10):
            cancelled.set()
        return {"StatusCode": 0} if name == "wait" else None

    fake_api.job(name, last)
    client = fake_api.connect()
    client.send(f"{line} HTTP/1.1\n\n")
    assert client.head()[0] == 200
    client.sock.close()
    assert cancelled.wait(5)


def test_no_job_is_cancelled_for_who_had_its_descriptor_before() -> None:
    """What epoll told of a connection is heard when that has ended and another has got its number."""
    watcher, called = dockerd.DisconnectWatcher(), list[str]()
    ours, theirs = socket.socketpair()
    turns = iter(["stale", "hung up"])

    def poll() -> list[tuple[int, int]]:
        if next(turns) == "hung up":
            theirs.close()
        else:
            assert not called
        return [(ours.fileno(), select.EPOLLRDHUP)]

    watcher._epoll = Mock(poll=poll)
    watcher._running = True
    with ours, watcher.watching(ours.fileno(), lambda: called.append(f"with {next(turns, 'none')} to come")):
        with pytest.raises(StopIteration):
            watcher._run()
    assert called == ["with none to come"]


def test_a_thread_that_was_refused_is_started_for_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the host has no thread to give, one client fails; the next has its samples and is watched."""
    def refuse(thread: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    watcher, statistics, gone = dockerd.DisconnectWatcher(), dockerd.Statistics(Mock()), threading.Event()
    container = Mock(state=Mock(removed=False), usage=lambda system: {"read": "now"})
    ours, theirs = socket.socketpair()
    begin = [lambda: watcher.watching(ours.fileno(), gone.set), lambda: statistics._listening(container)]
    with monkeypatch.context() as patched:
        patched.setattr(threading.Thread, "start", refuse)
        for each in begin:
            with pytest.raises(RuntimeError), each():
                pass
    with ours, begin[0](), begin[1]():
        assert next(statistics._follow(container, threading.Event())) == {"read": "now"}
        theirs.close()
        assert gone.wait(20)
    wait_for(lambda: not statistics._sampling)


def test_events_have_the_client_s_shape(fake_api: FakeApi, raw: Raw) -> None:
    def events(job: Any) -> None:
        job.ready()
        for kind, action in (("container", "start"), ("network", "create"), ("image", "create")):
            event = {
                "status": action,
                "id": "x",
                "from": "i",
                "Type": kind,
                "Action": action,
                "Actor": {},
                "time": 1,
                "timeNano": 2,
            }
            job.stdout.write(json.dumps(event).encode() + b"\n")

    fake_api.job("events", events)
    newest, v45, v14 = (
        [json.loads(line) for line in raw.ask(f"GET /v{version}/events?until=5")[2].splitlines()]
        for version in ("1.51", "1.45", "1.14")
    )
    assert [event["Type"] for event in newest] == ["container", "network", "image"]
    assert [event["Type"] for event in v45] == ["container", "network"]
    assert v14 == [{"status": "start", "id": "x", "from": "i", "time": 1, "timeNano": 2}]


def test_import_streams_progress_and_an_error_line(fake_api: FakeApi, raw: Raw) -> None:
    def load(job: Any) -> None:
        data = b"".join(iter(lambda: job.stdin.read(10000), b""))
        if data == b"bad":
            raise dockerd.BadParameter("not a tar")
        job.progress(status="Importing", size=len(data))
        if data == b"late":
            raise dockerd.DockerError("disk full")

    fake_api.job("import", load)
    body = os.urandom(300000)
    raw.send(
        "POST /v1.41/images/create?fromSrc=-&repo=a&tag=b&changes=CMD+x&changes=ENV+y&platform=linux"
        " HTTP/1.1\n"
        "Transfer-Encoding: chunked\nContent-Type: application/tar\n\n"
    )
    for start in range(0, len(body), 65536):
        part = body[start : start + 65536]
        raw.sock.sendall(b"%x\r\n%b\r\n" % (len(part), part))
    raw.sock.sendall(b"0\r\n\r\n")
    status, headers, data = raw.response()
    assert status == 200 and headers["content-type"] == "application/json"
    assert data == b'{"status":"Importing","size":300000}\r\n'
    job = fake_api.seen[-1]
    assert job.args == ["-", "a", "b"] and job.env == {"changes": ["CMD x", "ENV y"], "platform": "linux"}
    assert raw.json("POST /images/create?fromSrc=-", b"bad") == (400, {"message": "not a tar"})
    data = raw.ask("POST /images/create?fromSrc=-", b"late")[2]
    assert data.endswith(b'\r\n{"errorDetail":{"message":"disk full"},"error":"disk full"}\r\n')
    assert raw.ask("GET /_ping")[0] == 200


def test_a_body_that_ends_early_fails_the_job(fake_api: FakeApi, raw: Raw) -> None:
    ended = threading.Event()

    def load(job: Any) -> None:
        try:
            job.stdin.read()
        except ConnectionError:
            ended.set()
            raise

    fake_api.job("import", load)
    raw.send("POST /images/create?fromSrc=- HTTP/1.1\nContent-Length: 1000\n\nabc")
    raw.sock.shutdown(socket.SHUT_WR)
    assert ended.wait(5) and raw.rest() == b""


def test_an_error_in_a_download_cuts_it_off(fake_api: FakeApi, raw: Raw) -> None:
    def export(job: Any) -> None:
        job.stdout.write(b"part")
        raise dockerd.DockerError("lost")

    fake_api.job("export", export)
    raw.send("GET /containers/x/export HTTP/1.1\n\n")
    assert raw.head()[1]["content-type"] == "application/octet-stream"
    assert raw.rest() == b"4\r\npart\r\n"  # no last chunk


# Hijacked connections


def echo_until_end(job: Any) -> None:
    """A job attach that answers in capitals."""
    job.ready(tty=job.env.get("tty", False))
    stream = job.hijacked
    assert stream.fileno() >= 0
    while True:
        data = stream.read_some()
        if data is None:
            assert not stream.pending()
            time.sleep(0.005)
        elif data:
            data = data.upper()
            while data:
                data = data[stream.write_some(data) :]
        else:
            break
    while not stream.write_some(b"bye"):
        time.sleep(0.005)
    stream.close_write()


@pytest.mark.parametrize(
    "version, upgrade, status, kind",
    [
        ("1.51", True, b"101 UPGRADED", b"multiplexed"),
        ("1.41", True, b"101 UPGRADED", b"raw"),
        ("1.51", False, b"200 OK", b"raw"),
        ("1.14", False, b"200 OK", b"raw"),
    ],
)
def test_attach_hijacks(
    fake_api: FakeApi, raw: Raw, version: str, upgrade: bool, status: bytes, kind: bytes
) -> None:
    fake_api.job("attach", echo_until_end)
    fields = "Connection: Upgrade\nUpgrade: tcp\n" if upgrade else ""
    raw.send(f"POST /v{version}/containers/x/attach?stdin=1&stream=1 HTTP/1.1\n{fields}\nearly ")
    head = raw.until(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 " + status + b"\r\n")
    assert b"Content-Type: application/vnd.docker." + kind + b"-stream\r\n" in head
    assert (b"Connection: Upgrade\r\nUpgrade: tcp\r\n" in head) == upgrade
    assert raw.exactly(6) == b"EARLY "
    raw.sock.sendall(b"late")
    assert raw.exactly(4) == b"LATE"
    raw.sock.shutdown(socket.SHUT_WR)
    assert raw.rest() == b"bye"
    assert fake_api.seen[-1].env == {"stdin": True, "stream": True}


def test_attach_that_fails_is_an_error_response(fake_api: FakeApi, raw: Raw) -> None:
    def missing(job: Any) -> None:
        raise dockerd.NotFound("No such container: x")

    fake_api.job("attach", missing)
    assert raw.json("POST /containers/x/attach", None, "Connection: Upgrade", "Upgrade: tcp") == (
        404,
        {"message": "No such container: x"},
    )


def test_output_is_not_lost_when_the_client_goes_on_writing(fake_api: FakeApi, raw: Raw) -> None:
    def deaf(job: Any) -> None:
        job.ready(tty=True)
        time.sleep(0.1)  # unread input in the socket at its close would make the kernel reset it
        assert job.hijacked.write_some(b"last words") == 10

    fake_api.job("attach", deaf)
    raw.send("POST /containers/x/attach HTTP/1.1\n\n" + "unread " * 1000)
    assert raw.rest().endswith(b"last words")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A CA, and a certificate with key that it signed for 127.0.0.1 and for the registries' names."""
    folder = tmp_path_factory.mktemp("tls")
    new = ["openssl", "req", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    for command in (
        [
            *new,
            "-x509",
            "-keyout",
            "ca.key",
            "-out",
            "ca.pem",
            "-subj",
            "/CN=ca",
            "-days",
            "2",
            "-addext",
            "keyUsage=critical,keyCertSign",
        ],
        [*new, "-keyout", "key.pem", "-out", "request.pem", "-subj", "/CN=localhost"],
        [
            "openssl",
            "x509",
            "-req",
            "-in",
            "request.pem",
            "-CA",
            "ca.pem",
            "-CAkey",
            "ca.key",
            "-CAcreateserial",
            "-out",
            "cert.pem",
            "-days",
            "2",
            "-extfile",
            "names",
        ],
    ):
        (folder / "names").write_text(
            f"subjectAltName=IP:127.0.0.1,DNS:{NAMES.replace(' ', ',DNS:')}\n"
            "subjectKeyIdentifier=hash\nauthorityKeyIdentifier=keyid\n"
        )
        subprocess.run(command, cwd=folder, check=True, capture_output=True)
    return folder


@pytest.fixture
def tls_api(certificates: Any) -> Iterator[FakeApi]:
    """A server on a TCP port with TLS that wants client certificates."""
    api = FakeApi(
        "tcp://127.0.0.1:0",
        TlsVerify=True,
        TlsCa=f"{certificates}/ca.pem",
        TlsCert=f"{certificates}/cert.pem",
        TlsKey=f"{certificates}/key.pem",
    )
    assert api.failure is None
    yield api
    api.server.close()


def over_tls(api: FakeApi, certificates: Any, authenticated: bool = True) -> Raw:
    """A TLS client of `api`."""
    context = ssl.create_default_context(cafile=f"{certificates}/ca.pem")
    if authenticated:
        context.load_cert_chain(f"{certificates}/cert.pem", f"{certificates}/key.pem")
    return Raw(context.wrap_socket(api.connect().sock, server_hostname="127.0.0.1"))


def test_tls_serves_clients_with_a_certificate_only(tls_api: FakeApi, certificates: Any) -> None:
    assert over_tls(tls_api, certificates).ask("GET /_ping")[2] == b"OK"
    with pytest.raises(OSError):
        over_tls(tls_api, certificates, authenticated=False).ask("GET /_ping")
    plain = tls_api.connect()
    plain.sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: x\r\n\r\n")
    assert plain.rest().endswith(b"Client sent an HTTP request to an HTTPS server.\n")


def test_a_silent_tls_client_hinders_nobody(
    tls_api: FakeApi, certificates: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dockerd, "HANDSHAKE_SECONDS", 0.3)
    silent = tls_api.connect()
    assert over_tls(tls_api, certificates).ask("GET /_ping")[2] == b"OK"
    assert silent.rest() == b""


def test_attach_over_tls(tls_api: FakeApi, certificates: Any) -> None:
    def echo(job: Any) -> None:
        job.ready(tty=True)
        stream, left = job.hijacked, 200000
        while left:
            data = stream.read_some(1000)
            if data is None:
                time.sleep(0.002)
                continue
            left -= len(data)
            while data:
                data = data[stream.write_some(data) :]
        stream.close_write()

    tls_api.job("attach", echo)
    client = over_tls(tls_api, certificates)
    client.send("POST /containers/x/attach HTTP/1.1\nConnection: Upgrade\nUpgrade: tcp\n\n")
    assert client.until(b"\r\n\r\n").startswith(b"HTTP/1.1 101 UPGRADED\r\n")
    for _ in range(10):
        sent = os.urandom(20000)
        client.sock.sendall(sent)
        assert client.exactly(len(sent)) == sent
    assert client.rest() == b""


@pytest.mark.parametrize(
    "env, message",
    [
        ({"TlsCert": "/nothing", "TlsKey": "/nothing"}, "Couldn't load X509 key pair"),
        ({"TlsCa": "/nothing"}, "Couldn't read CA certificate /nothing"),
    ],
)
def test_tls_files_that_cannot_be_read(certificates: Any, env: dict[str, str], message: str) -> None:
    files = {
        "TlsCa": f"{certificates}/ca.pem",
        "TlsCert": f"{certificates}/cert.pem",
        "TlsKey": f"{certificates}/key.pem",
    }
    api = FakeApi("tcp://127.0.0.1:0", TlsVerify=True, **{**files, **env})
    api.thread.join(5)
    assert message in str(api.failure) and api.server.closed


# Listeners


def test_requests_wait_until_connections_are_accepted(tmp_path: Any) -> None:
    api = FakeApi(f"unix://{tmp_path}/docker.sock", BufferRequests=True)
    client = api.connect()
    client.send("GET /version HTTP/1.1\n\n")
    time.sleep(0.3)
    client.sock.setblocking(False)
    with pytest.raises(BlockingIOError):
        client.sock.recv(1)
    client.sock.settimeout(10)
    api.job("version", lambda job: {"Version": "x"})
    api.engine.job("acceptconnections").run()
    assert client.response()[0] == 200
    api.server.close()


def test_acceptconnections_tells_the_service_manager(
    tmp_path: Any, fake_api: FakeApi, monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"{tmp_path}/notify")
        manager.settimeout(5)
        monkeypatch.setenv("NOTIFY_SOCKET", f"{tmp_path}/notify")
        fake_api.engine.job("acceptconnections").run()
        assert manager.recv(100).startswith(b"READY=1")


def test_unix_socket_is_never_open_to_others(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    modes = []
    chown = os.chown

    def spying_chown(path: Any, *owner: int) -> None:
        modes.append(stat.S_IMODE(os.stat(path).st_mode))
        chown(path, *owner)

    monkeypatch.setattr(os, "chown", spying_chown)
    umask = os.umask(0)
    try:
        listener = dockerd.listen_unix(f"{tmp_path}/s", str(os.getgid()))
    finally:
        os.umask(umask)
    status = os.stat(f"{tmp_path}/s")
    assert modes == [0o600] and stat.S_IMODE(status.st_mode) == 0o660 and status.st_gid == os.getgid()
    listener.close()


def test_stale_socket_is_replaced_and_a_live_one_refused(tmp_path: Any) -> None:
    path = f"{tmp_path}/s"
    dockerd.listen_unix(path, "").close()
    live = dockerd.listen_unix(path, "")
    with pytest.raises(dockerd.Conflict, match=f"unix://{path}: another daemon serves it"):
        dockerd.listen_unix(path, "")
    live.close()
    os.unlink(path)
    (tmp_path / "s").write_text("precious")
    with pytest.raises(dockerd.Conflict, match="no socket"):
        dockerd.listen_unix(path, "")
    assert (tmp_path / "s").read_text() == "precious"


def test_group_of_the_socket(caplog: pytest.LogCaptureFixture) -> None:
    assert dockerd.group_id("root") == 0 and dockerd.group_id("7") == 7 and dockerd.group_id("") == -1
    with pytest.raises(dockerd.NotFound, match="Group no-such-group not found"):
        dockerd.group_id("no-such-group")


@pytest.mark.parametrize(
    "address, verified, loud",
    [
        ("127.0.0.1:0", False, False),
        ("0.0.0.0:0", False, True),
        ("0.0.0.0:0", True, False),
        ("[::1]:0", False, False),
    ],
)
def test_tcp_without_tls_is_warned_of(
    address: str,
    verified: bool,
    loud: bool,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dockerd.log, "propagate", True)
    with caplog.at_level(logging.WARNING):
        try:
            dockerd.listen_tcp(address, verified, verified).close()
        except dockerd.DockerError as error:
            assert ":" in address and "Cannot assign" in str(error)  # a host without IPv6
            return
    assert ("DON'T BIND ON ANOTHER IP ADDRESS" in caplog.text) == loud
    assert (
        "gives root access on this machine to everyone who has access to your network" in caplog.text
    ) == loud


def test_tcp_address_in_use_is_named() -> None:
    with dockerd.listen_tcp("127.0.0.1:0", False, False) as listener:
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with pytest.raises(dockerd.DockerError, match=f"can't listen on tcp://{address}: .*in use"):
            dockerd.listen_tcp(address, False, False)


@pytest.mark.parametrize(
    "number, printed",
    [("", "4 True"), ("3", "1 True"), ("*", "4 True"), ("9", "too few"), ("x", "should be a number")],
)
def test_sockets_of_the_service_manager(tmp_path: Any, number: str, printed: str) -> None:
    sockets = [dockerd.listen_unix(f"{tmp_path}/{name}", "") for name in "ab"]
    program = (
        f"import dockerd\ntry:\n  found = dockerd.passed_sockets({number!r})\n"
        "  print(len(found), all(not s.get_inheritable() for s in found))\n"
        "except dockerd.DockerError as error:\n  print(error)"
    )
    first, second = (listener.fileno() for listener in sockets)
    shell = (
        f"exec {sys.executable} - <<'END'\nimport os\n"
        + (
            f"for at, fd in enumerate(({first}, {second}, {first}, {second})): os.dup2(fd, 100 + at)\n"
            "for at in range(4): os.dup2(100 + at, 3 + at)\n"
            "os.environ.update(LISTEN_FDS='4', LISTEN_PID=str(os.getpid()))\n"
        )
        + program
        + "\nEND\n"
    )
    done = subprocess.run(
        ["sh", "-c", shell],
        pass_fds=(first, second),
        capture_output=True,
        text=True,
        timeout=30,
        env={**os.environ, "PYTHONPATH": os.path.dirname(dockerd.__file__)},
    )
    assert printed in done.stdout, done.stderr
    for listener in sockets:
        listener.close()


def test_no_sockets_were_passed() -> None:
    with pytest.raises(dockerd.DockerError, match="no sockets found via socket activation"):
        dockerd.passed_sockets("")


@pytest.mark.parametrize(
    "host, message",
    [
        ("/var/run/docker.sock", "usage: serveapi PROTO://ADDR [PROTO://ADDR ...]"),
        ("npipe://x", "Invalid protocol format: npipe://x; use unix://, tcp:// or fd://"),
        ("unix:///nothing/docker.sock", "can't listen on unix:///nothing/docker.sock: "),
    ],
)
def test_hosts_that_cannot_be_served(host: str, message: str) -> None:
    api = FakeApi(host)
    api.thread.join(5)
    assert message in str(api.failure)


def test_listeners_are_closed_when_one_fails_and_at_shutdown(tmp_path: Any) -> None:
    engine = dockerd.Engine()
    server = dockerd.ApiServer(engine)
    engine.install(server)
    with pytest.raises(dockerd.DockerError):
        engine.job("serveapi", f"unix://{tmp_path}/s", "unix:///nothing/s").run()
    assert not os.listdir(tmp_path)
    api = FakeApi(f"unix://{tmp_path}/s")
    assert os.listdir(tmp_path) == ["s"]
    api.engine.shutdown()
    assert not os.listdir(tmp_path)


def test_frames() -> None:
    assert dockerd.stream_frame(2, b"abc") == struct.pack(">BBBBI", 2, 0, 0, 0, 3) + b"abc"


def test_every_listed_plain_route_is_registered() -> None:
    methods = {(row.method, row.path) for row in dockerd.ROUTES}
    assert len(methods) == len(dockerd.ROUTES) and len(methods) > 110


# ------------------------------------------------------------------------------------------------------------
# Archives
# ------------------------------------------------------------------------------------------------------------


def make_tar(*members: tuple[Any, ...], format: int = tarfile.PAX_FORMAT) -> bytes:
    """A tar of (name, content or type, attributes) members: bytes are a file's content, a text is a type."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format) as tar:
        for name, what, *more in members:
            info = tarfile.TarInfo(name)
            content = what if isinstance(what, bytes) else b""
            info.type = what.encode() if isinstance(what, str) else tarfile.REGTYPE
            info.size = len(content)
            for key, value in (more[0] if more else {}).items():
                setattr(info, key, value)
            tar.addfile(info, io.BytesIO(content))
    return out.getvalue()


def unpack(data: bytes, directory: Path, whiteouts: str = "overlay", idmap: Optional[IdMap] = None,
           **options: Any) -> dockerd.LayerStats:
    directory.mkdir(exist_ok=True)
    return apply_layer(io.BytesIO(data), str(directory), whiteouts, idmap or IdMap(), **options)


def pack(directory: Path | str, **options: Any) -> bytes:
    out = io.BytesIO()
    write_tree(str(directory), out.write, **options)
    return out.getvalue()


def snapshot(root: Path | str) -> dict[str, Any]:
    """All that a tar can keep of a tree, but for directories' times where they are no part of it."""
    found: dict[str, Any] = {}
    inodes: dict[int, str] = {}
    for directory, folders, files in os.walk(str(root)):
        for name in sorted(folders + files):
            path = os.path.join(directory, name)
            facts = os.lstat(path)
            relative = os.path.relpath(path, str(root))
            content: Any = None
            if stat.S_ISREG(facts.st_mode):
                content = Path(path).read_bytes()
            elif stat.S_ISLNK(facts.st_mode):
                content = os.readlink(path)
            xattrs = {key: os.getxattr(path, key, follow_symlinks=False)
                      for key in os.listxattr(path, follow_symlinks=False)}
            found[relative] = (
                oct(facts.st_mode),
                facts.st_uid,
                facts.st_gid,
                facts.st_mtime_ns,
                facts.st_rdev,
                content,
                xattrs,
                inodes.setdefault(facts.st_ino, relative),
            )
        folders.sort()
    return found


CAPABILITY = bytes.fromhex("0100000200200000000000000000000000000000")  # cap_net_raw=ep


def make_tree(root: Path) -> None:
    """A tree with one of each kind."""
    root.mkdir()
    (root / "bin").mkdir()
    (root / "bin/su").write_bytes(b"program")
    os.chown(root / "bin/su", 7, 8)
    os.chmod(root / "bin/su", 0o6755)
    os.link(root / "bin/su", root / "bin/zz-su")
    (root / "bin/ping").write_bytes(b"x" * 1000)
    os.setxattr(root / "bin/ping", "security.capability", CAPABILITY)
    os.symlink("../bin/su", root / "bin/link")
    os.chown(root / "bin/link", 1, 2, follow_symlinks=False)
    os.mkfifo(root / "fifo", 0o640)
    os.mknod(root / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    os.mknod(root / "loop", stat.S_IFBLK | 0o660, os.makedev(7, 258))
    (root / "tmp").mkdir()
    os.chmod(root / "tmp", 0o1777)
    deep = root / ("d" * 90) / ("e" * 90) / ("f" * 90)
    deep.mkdir(parents=True)
    (deep / ("long" * 30)).write_bytes(b"long")
    os.symlink("t" * 150, root / "far")
    (root / "näme \n x").write_bytes(b"unicode")
    Path(os.fsdecode(os.fsencode(str(root)) + b"/latin\xe9")).write_bytes(b"bytes")
    (root / "empty").write_bytes(b"")
    (root / "big").write_bytes(random.Random(1).randbytes(3 << 20))
    with open(root / "sparse", "wb") as sparse:
        sparse.truncate(8 << 20)
        sparse.seek(1 << 20)
        sparse.write(b"in the middle")
    for path in [*root.rglob("*")]:
        os.utime(path, ns=(10**18, 10**18 + len(path.name) * 1_000_000_001), follow_symlinks=False)


GNU_TAR = ["tar", "-C", "SOURCE", "--numeric-owner", "--sort=name", "-cf", "-"]


@pytest.mark.parametrize("options", [
    ["--format=pax", "--xattrs", "--xattrs-include=*"],
    ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.0"],
    ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=0.1"],
    ["--format=pax", "--xattrs", "--xattrs-include=*", "--sparse", "--sparse-version=1.0"],
], ids=["pax", "sparse-0.0", "sparse-0.1", "sparse-1.0"])
def test_every_attribute_survives_gnu_tar_in_pax_format(tmp_path: Path, options: list[str]) -> None:
    make_tree(tmp_path / "source")
    command = [str(tmp_path / "source") if word == "SOURCE" else word for word in GNU_TAR] + options + ["."]
    data = subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout
    stats = unpack(data, tmp_path / "target")
    assert snapshot(tmp_path / "target") == snapshot(tmp_path / "source")
    assert stats.entries == 20
    if "--sparse" in options:
        assert os.stat(tmp_path / "target/sparse").st_blocks * 512 < 1 << 20


@pytest.mark.parametrize(
    "options", [["--format=gnu"], ["--format=gnu", "--sparse"], ["--format=oldgnu", "--sparse"]]
)
def test_gnu_format_with_whole_seconds_and_no_xattrs(tmp_path: Path, options: list[str]) -> None:
    make_tree(tmp_path / "source")
    os.removexattr(tmp_path / "source/bin/ping", "security.capability")
    with open(tmp_path / "source/holes", "wb") as file:  # more extents than a header and one more block hold
        for at in range(60):
            file.seek(at * 131072)
            file.write(b"%d" % at)
    for path in [*(tmp_path / "source").rglob("*")]:
        os.utime(path, (1e9, 1e9), follow_symlinks=False)
    command = [str(tmp_path / "source") if word == "SOURCE" else word for word in GNU_TAR] + options + ["."]
    unpack(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout, tmp_path / "target")
    assert snapshot(tmp_path / "target") == snapshot(tmp_path / "source")


def test_small_reads_and_a_trailer_are_read_to_the_end(tmp_path: Path) -> None:
    class Trickle(io.BytesIO):
        def read(self, size: Optional[int] = -1) -> bytes:
            return super().read(min(size or 1, 700))

    stream = Trickle(make_tar(("a", b"x" * 5000), ("b/c", b"y")) + bytes(100_000) + b"rubbish")
    tmp_path.joinpath("t").mkdir()
    apply_layer(stream, str(tmp_path / "t"), "overlay", IdMap())
    assert stream.tell() == len(stream.getvalue())
    assert (tmp_path / "t/a").read_bytes() == b"x" * 5000 and (tmp_path / "t/b/c").read_bytes() == b"y"


def test_the_observer_sees_every_byte_in_order(tmp_path: Path) -> None:
    data = make_tar(("a", b"x" * 5000), ("d", "5"), ("n" * 200, b"y" * 513)) + b"tail"
    seen: list[tuple[Optional[bytes], bytes]] = []
    unpack(data, tmp_path / "t", observer=lambda entry, piece: seen.append((entry and entry.name, piece)))
    assert b"".join(piece for _, piece in seen) == data
    assert b"".join(piece for name, piece in seen if name == b"a") == b"x" * 5000


@pytest.mark.usefixtures("native")
def test_the_sum_of_tar_split() -> None:
    def slowly(data: bytes) -> int:
        crc = dockerd.CRC_ONES
        for byte in data:
            crc ^= byte
            for _ in range(8):
                crc = crc >> 1 ^ (0xD800000000000000 if crc & 1 else 0)
        return crc ^ dockerd.CRC_ONES

    assert dockerd.crc64(b"123456789") == 0xB90956C775A41001
    for size in (*range(40), 511, 512, 513, 5000, dockerd.CRC_PIECE + 1):
        data = random.Random(size).randbytes(size)
        assert dockerd.crc64(data) == slowly(data), size
        assert dockerd.crc64(memoryview(data)[size // 3:], dockerd.crc64(data[:size // 3])) == slowly(data)


def odd_archives() -> dict[str, bytes]:
    """Streams that a plain writer would not have written the same way."""
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "empty").touch()
        Path(directory, os.fsdecode(b"no-utf8-\xff")).write_bytes(b"n" * 700)
        with open(f"{directory}/sparse", "wb") as file:
            for at in range(0, 1 << 20, 1 << 16):
                file.seek(at)
                file.write(b"data")
        gnu = ["tar", "-C", directory, "-S", "--sort=name", "--owner=someone:7", "-c", "."]
        made = {name: subprocess.run([*gnu, "--format", name], stdout=subprocess.PIPE, check=True).stdout
                for name in ("gnu", "pax")}
    plain = make_tar(("a", b"x" * 5000), ("d", "5"), ("./d/../n" + "n" * 200, b"y" * 513), ("link", "2", {
        "linkname": "a"}), (".wh.b", b"what a whiteout has"), ("d/.wh..wh..opq", b""), ("empty", b""))
    padded = bytearray(make_tar(("f", b"abc")))
    padded[512 + 3:1024] = b"rubbish".ljust(509, b"!")  # in the padding
    return {**made, "plain": plain, "trailer": plain + b"behind the end" * 100000, "padding": bytes(padded),
            "truncated end": plain[:-700], "nothing": bytes(1024), "no end": make_tar(("f", b"abc"))[:1024]}


@pytest.mark.parametrize("name", sorted(odd_archives()))
def test_a_layers_stream_is_rebuilt_byte_for_byte(rig: ImageRig, name: str) -> None:
    data = odd_archives()[name]
    rig.add("a", archive=data)
    with rig.layers.tar(rig.images.resolve("a").chain_id) as stream:
        assert b"".join(iter(stream.read, b"")) == data


def test_a_shared_layer_whose_maker_was_killed_is_made_anew(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the containers of an image have in common is not used before it is whole."""
    rig = ImageRig(str(tmp_path), "overlay2")
    rig.add("a", "1", tar_of({"f": b"1"}))
    chain = rig.images.resolve("a:1").chain_id

    def fill(directory: str, content: bytes = b"whole") -> None:
        Path(directory, "filled").write_bytes(content)

    def kill(cache_id: str) -> None:
        if cache_id.endswith("-filled"):  # else it is the layer below that is used from now on
            raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(rig.layers.driver, "_commit", kill)
        with pytest.raises(KeyboardInterrupt):
            rig.layers.create_rw("c" * 64, chain, lambda directory: fill(directory, b"half"))
    shared, = Path(rig.layers.driver.layers()).glob("*-filled")
    assert not (shared / "committed").exists() and (shared / "diff/filled").read_bytes() == b"half"
    rig.layers.create_rw("d" * 64, chain, fill)
    assert (shared / "committed").exists() and (shared / "diff/filled").read_bytes() == b"whole"


@pytest.mark.parametrize("point", ["layer-share", "layer-create=kill@2"])
def test_a_daemon_killed_while_it_fills_a_shared_layer(new_host: Callable[..., Host], busybox: bytes,
                                                       point: str) -> None:
    """It is there by half, or whole and used by no container yet: the next ones have all that they need."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    host.stop()
    host.environment["DOCKERD_FAILPOINTS"] = point if "=" in point else f"{point}=kill"
    host.start()
    with pytest.raises((OSError, http.client.HTTPException)):
        host.create("true")
    del host.environment["DOCKERD_FAILPOINTS"]
    host.kill()
    shared = Path(host.data_root, "overlay2").glob("*-filled/committed")
    assert len(list(shared)) == (point != "layer-share")
    host.start()
    for _ in range(2):
        assert host.run("sh", "-c", "test -f /etc/mtab -o -L /etc/mtab; cat /etc/hostname") [0] == 0
    assert host.api("GET", "/containers/json?all=1") == []
    host.stop()
    assert check(host, "--check") == (0, [])


def test_what_cannot_be_rebuilt_is_told(rig: ImageRig) -> None:
    rig.add("a", archive=tar_of({"f": b"12345", "g": b"6"}))
    layer = rig.layers.get(rig.images.resolve("a").chain_id)

    def refusal() -> str:
        with pytest.raises(dockerd.DockerError) as failure, rig.layers.tar(layer.chain_id) as stream:
            while stream.read():
                pass
        return str(failure.value)

    path = Path(rig.layers.driver.diff_dir(layer.cache_id), "f")
    path.write_bytes(b"12346")
    assert refusal().endswith("is damaged: remove its images and pull them again")
    path.write_bytes(b"123")
    assert refusal() == 'the layer has lost 2 bytes of "f"'
    path.unlink()
    path.symlink_to("g")
    assert refusal() == 'the layer has lost "f": it is no file any more'
    path.unlink()
    os.mknod(path, stat.S_IFCHR | 0o666, os.makedev(1, 5))  # has what the file had, and is not even opened
    assert refusal() == 'the layer has lost "f": it is no file any more'
    os.unlink(os.path.join(rig.layers._path(layer.chain_id), dockerd.TAR_SPLIT))
    assert "has no record of the archive that it was made of" in refusal()
    rig.run("image_delete", "a")
    rig.assert_whole()


def test_the_records_of_streams_are_the_real_daemons(peer: Host, tmp_path: Path) -> None:
    """Each daemon's record names the same files with the same sums, and ours rebuilds from theirs."""
    rig = ImageRig(str(tmp_path), "overlay2")
    data = tar_of({"d": None, "d/f": b"x" * 100000, "\xfcml\xe4ut": b"y" * 700, "empty": b"", "last": b"z"})
    rig.add("a", archive=data)
    layer = rig.layers.get(rig.images.resolve("a").chain_id)
    peer.import_image("split", data)
    ours, theirs = (Path(root, "image/overlay2/layerdb/sha256", layer.chain_id[7:], dockerd.TAR_SPLIT)
                    for root in (rig.root, peer.data_root))
    found = [[json.loads(line) for line in gzip.decompress(path.read_bytes()).splitlines()]
             for path in (ours, theirs)]
    files = [[(line["name"], line["size"], line["payload"]) for line in lines if line.get("size")]
             for lines in found]
    assert files[0] == files[1] and len(files[0]) == 3
    assert [line["position"] for line in found[0]] == list(range(len(found[0])))
    shutil.copy(theirs, ours)
    peer.http("DELETE", "/images/split")
    with rig.layers.tar(layer.chain_id) as stream:
        assert b"".join(iter(stream.read, b"")) == data


def test_base_256_numbers_and_v7_headers(tmp_path: Path) -> None:
    data = make_tar(("f", b"abc", {"uid": 3_000_000, "mtime": 5}), ("dir/", b""), format=tarfile.GNU_FORMAT)
    header = bytearray(data[1024:1536])
    header[156] = 0
    header[257:265] = bytes(8)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    unpack(data[:1024] + bytes(header) + data[1536:], tmp_path / "t")
    facts = os.stat(tmp_path / "t/f")
    assert (facts.st_uid, facts.st_mtime) == (3_000_000, 5)
    assert (tmp_path / "t/dir").is_dir()


def test_modes_do_not_depend_on_the_umask_and_times_are_bounded(tmp_path: Path) -> None:
    old = os.umask(0o077)
    try:
        unpack(
            make_tar(("f", b"x", {"mode": 0o666, "mtime": -5.5}), ("d", "5", {"mode": 0o777}), ("i/f", b"")),
            tmp_path / "t",
        )
        assert os.umask(0o077) == 0o077
    finally:
        os.umask(old)
    modes = [stat.S_IMODE(os.stat(tmp_path / "t" / name).st_mode) for name in ("f", "d", "i")]
    assert modes == [0o666, 0o777, 0o755]
    assert os.stat(tmp_path / "t/f").st_mtime == 0


# Whiteouts


def overlay_kind(path: Path) -> str:
    facts = os.lstat(path)
    if stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0:
        return "whiteout"
    return "opaque" if "trusted.overlay.opaque" in os.listxattr(path, follow_symlinks=False) else "plain"


def test_whiteouts_as_overlay_wants_them(tmp_path: Path) -> None:
    unpack(
        make_tar(
            (".wh.gone", b""),
            ("d", "5"),
            ("d/.wh..wh..opq", b""),
            ("d/kept", b"k"),
            ("e/.wh.x", b""),
            (".wh..wh.plnk/1", b""),
        ),
        tmp_path / "t",
    )
    assert sorted(os.listdir(tmp_path / "t")) == ["d", "e", "gone"]
    assert overlay_kind(tmp_path / "t/gone") == "whiteout"
    assert overlay_kind(tmp_path / "t/d") == "opaque"
    assert os.listdir(tmp_path / "t/d") == ["kept"]
    assert overlay_kind(tmp_path / "t/e/x") == "whiteout"


def test_a_whiteout_and_what_replaces_it_in_one_layer(tmp_path: Path) -> None:
    unpack(make_tar((".wh.a", b""), ("a", "5"), (".wh.b", b""), ("b/f", b"x"), ("c", "5"), (".wh.c", b""),
                    ("f", b"file"), (".wh.f", b""), (".wh.g", b""), ("g", b"new")), tmp_path / "t")
    assert [overlay_kind(tmp_path / "t" / name) for name in "abcfg"] == ["opaque"] * 3 + ["plain"] * 2
    assert (tmp_path / "t/f").read_bytes() == b"file" and (tmp_path / "t/g").read_bytes() == b"new"


def test_whiteouts_applied_to_a_tree(tmp_path: Path) -> None:
    tree = tmp_path / "t"
    unpack(make_tar(("gone/x", b"1"), ("d/old", b"1"), ("d/both", b"1"), ("keep", b"1")), tree, "apply")
    unpack(
        make_tar(
            (".wh.gone", b""),
            ("d/both", b"2"),
            ("d/new", b"2"),
            ("d/.wh..wh..opq", b""),
            (".wh.absent", b""),
            ("keep", b"2"),
            (".wh.keep", b""),
        ),
        tree,
        "apply",
    )
    assert sorted(snapshot(tree)) == ["d", "d/both", "d/new", "keep"]
    assert (tree / "d/both").read_bytes() == b"2"


@pytest.mark.parametrize("name", [".wh.", ".wh..", ".wh...", "d/.wh.."])
def test_whiteouts_of_nothing_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadParameter, match="^invalid whiteout entry "):
        unpack(make_tar((name, b"")), tmp_path / "t")


def test_entries_replace_one_another_and_directories_merge(tmp_path: Path) -> None:
    unpack(
        make_tar(
            ("x", b"1"),
            ("x", "5"),
            ("x/y", b"1"),
            ("x", "2", {"linkname": "z"}),
            ("x", b"3"),
            ("d", "5", {"mode": 0o700}),
            ("d/f", b"1"),
            ("d", "5", {"mode": 0o755}),
            ("l", "2", {"linkname": "d"}),
            ("l", "5"),
        ),
        tmp_path / "t", "",
    )
    assert (tmp_path / "t/x").read_bytes() == b"3"
    assert (tmp_path / "t/d/f").exists() and stat.S_IMODE(os.stat(tmp_path / "t/d").st_mode) == 0o755
    assert not (tmp_path / "t/l").is_symlink() and os.listdir(tmp_path / "t/l") == []


# Hostile archives


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A directory beside the one that is unpacked into, and a file in it that must stay as it is."""
    path = tmp_path / "outside"
    path.mkdir()
    (path / "passwd").write_bytes(b"s3cret")
    return path


ATTACKS: dict[str, Callable[[str], tuple[tuple[Any, ...], ...]]] = {
    "absolute link": lambda out: (("l", "2", {"linkname": out}), ("l/passwd", b"owned")),
    "climbing link": lambda out: (("l", "2", {"linkname": "../outside"}), ("l/passwd", b"owned")),
    "link to link": lambda out: (
        ("a", "2", {"linkname": ".."}),
        ("b", "2", {"linkname": "a/outside"}),
        ("b/passwd", b"owned"),
    ),
    "hard link through a link": lambda out: (
        ("l", "2", {"linkname": out}),
        ("h", "1", {"linkname": "l/passwd"}),
    ),
    "whiteout through a link": lambda out: (("l", "2", {"linkname": out}), ("l/.wh.passwd", b"")),
    "opaque through a link": lambda out: (("l", "2", {"linkname": out}), ("l/.wh..wh..opq", b"")),
    "directory over a link": lambda out: (
        ("l", "2", {"linkname": out}),
        ("l/", "5", {"mode": 0o777}),
        ("l/passwd", b"owned"),
    ),
    "directory time through a link": lambda out: (("d", "5", {"mtime": 1}), ("d", "2", {"linkname": out})),
}


@pytest.mark.parametrize("attack", ATTACKS)
@pytest.mark.parametrize("whiteouts", ["overlay", "apply", ""])
def test_links_lead_nowhere_out_of_the_tree(
    tmp_path: Path, outside: Path, attack: str, whiteouts: str
) -> None:
    before = snapshot(tmp_path), os.stat(outside).st_mtime_ns, os.stat(outside / "passwd").st_nlink
    try:
        unpack(make_tar(*ATTACKS[attack](str(outside))), tmp_path / "t", whiteouts)
    except DockerError:
        pass
    after = snapshot(outside)
    assert after == {"passwd": (*before[0]["outside/passwd"][:-1], "passwd")}
    assert (os.stat(outside).st_mtime_ns, os.stat(outside / "passwd").st_nlink) == before[1:]


@pytest.mark.parametrize(
    "attack",
    ["absolute link", "climbing link", "link to link", "hard link through a link", "whiteout through a link",
     "opaque through a link"],
)
def test_the_same_attacks_succeed_without_the_chroot(tmp_path: Path, outside: Path, attack: str,
                                                     monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(dockerd.FAILPOINTS, "chroot", ("off", 1))
    unpack(make_tar(*ATTACKS[attack](str(outside))), tmp_path / "t", "apply")
    passwd = outside / "passwd"
    assert not passwd.exists() or passwd.read_bytes() == b"owned" or passwd.stat().st_nlink == 2


@pytest.mark.parametrize(
    "member, text",
    [
        (("../x", b"1"), 'invalid entry name "../x"'),
        (("a/../../x", b"1"), 'invalid entry name "a/../../x"'),
        (("/../x", b"1"), 'invalid entry name "/../x"'),
        (("h", "1", {"linkname": "../outside/passwd"}), 'invalid hardlink target "../outside/passwd"'),
        (("h", "1", {"linkname": "/../outside/passwd"}), 'invalid hardlink target "/../outside/passwd"'),
        (("h", "1", {"linkname": "h"}), 'invalid hardlink target "h"'),
        (("x", "V"), "unhandled tar header type 86"),
        (
            ("x", b"x", {"pax_headers": {"SCHILY.xattr.trusted.overlay.redirect": "/etc"}}),
            'invalid xattr "trusted.overlay.redirect" of "x": it belongs to the storage driver',
        ),
        (("x", b"x", {"pax_headers": {"size": "-1"}}), "archive/tar: invalid tar header"),
        (("x", b"x", {"pax_headers": {"size": "9" * 30}}), "archive/tar: invalid tar header"),
        (("x", b"x", {"pax_headers": {"size": "99999999999"}}), "unexpected EOF"),
        (("x", b"x", {"pax_headers": {"uid": "-1"}}), "archive/tar: invalid tar header"),
        (("x", b"x", {"pax_headers": {"mtime": "soon"}}), "archive/tar: invalid tar header"),
        (
            ("x", b"x", {"pax_headers": {"GNU.sparse.map": "0,1,0,1", "GNU.sparse.size": "9"}}),
            "archive/tar: invalid tar header",
        ),
        (
            ("x", b"x", {"pax_headers": {"GNU.sparse.map": "0,1,5,9", "GNU.sparse.size": "9"}}),
            "archive/tar: invalid tar header",
        ),
        (
            ("x", b"x", {"pax_headers": {"GNU.sparse.major": "1", "GNU.sparse.minor": "0"}}),
            "archive/tar: invalid tar header",
        ),
        (("x", b"x", {"pax_headers": {"comment": "x" * (1 << 20)}}), "archive/tar: header field too long"),
    ],
)
def test_hostile_entries_are_refused_with_a_clear_text(tmp_path: Path, outside: Path, member: tuple[Any, ...],
                                                       text: str) -> None:
    with pytest.raises(BadParameter) as caught:
        unpack(make_tar(member), tmp_path / "t")
    assert str(caught.value) == text
    assert os.stat(outside / "passwd").st_nlink == 1 and not (tmp_path / "x").exists()


def test_attributes_that_the_host_has_not_and_empty_records_are_passed_over(tmp_path: Path) -> None:
    """Archives of macOS bring its attributes along; an empty record leaves the header's value, as in Go."""
    records = {"SCHILY.xattr.com.apple.provenance": "x", "SCHILY.xattr.user.kept": "y", "path": "", "uid": "",
               "mtime": ""}
    unpack(make_tar(("x", b"x", {"pax_headers": records, "mtime": 7})), tmp_path)
    assert os.listxattr(tmp_path / "x") == ["user.kept"] and os.stat(tmp_path / "x").st_mtime == 7


def test_absolute_names_and_link_targets_are_those_of_the_tree(tmp_path: Path) -> None:
    unpack(
        make_tar(("/etc/x", b"1"), ("y", "1", {"linkname": "/etc/x"}), ("./a/./b", b"2"), ("a/../c", b"3")),
        tmp_path / "t",
    )
    assert sorted(snapshot(tmp_path / "t")) == ["a", "a/b", "c", "etc", "etc/x", "y"]


def test_truncated_and_damaged_streams(tmp_path: Path) -> None:
    data = make_tar(("a", b"x" * 5000), ("b", b"y"))
    for size in (100, 512, 3000, 5700):
        with pytest.raises(BadParameter, match="^unexpected EOF$"):
            unpack(data[:size], tmp_path / "t", "apply")
    for rubbish in (b"no tar at all" * 100, b"\xff" * 2048, data[:512] + data[600:], bytes(512) + data):
        with pytest.raises(BadParameter, match="^archive/tar: invalid tar header$|^unexpected EOF$"):
            unpack(rubbish, tmp_path / "t", "apply")
    unpack(b"", tmp_path / "t")
    for size in (5632, 6144 + 100, 6656, 6656 + 512):  # at an entry's end it is none, as in Go
        unpack(data[:size], tmp_path / "t", "apply")


@pytest.mark.parametrize("whiteouts", ["overlay", "apply"])
def test_a_name_twice_is_refused_as_docker_does(tmp_path: Path, whiteouts: str) -> None:
    """But what a layer only implies, or hides of those below, may come."""
    file, again, directory = ("x", b"1"), ("x", b"2"), ("d", "5")
    refused: tuple[tuple[Any, ...], ...] = (
            (file, again), (file, ("./x", b"2")), (file, ("x", "2", {"linkname": "y"})), (file, ("x", "5")),
            (directory, ("d/f", b""), directory), (directory, ("d", b"")),
            (file, ("y", "1", {"linkname": "x"}), ("y", "1", {"linkname": "x"})))
    taken: tuple[tuple[Any, ...], ...] = (
            (("d/f", b"1"), directory), ((".wh.x", b""), file), ((".wh.d", b""), ("d/f", b""), directory),
            (("d/f", b""), ("d", b"")))
    for number, members in enumerate(refused):
        with pytest.raises(BadParameter, match='^duplicates of file paths not supported: "[dxy]"$'):
            unpack(make_tar(*members), tmp_path / str(number), whiteouts)
    for number, members in enumerate(taken):
        unpack(make_tar(*members), tmp_path / f"good{number}", whiteouts)
    unpack(make_tar(file, directory, ("d/f", b"")), tmp_path / "below", "apply")
    unpack(make_tar(again, directory, ("d/f", b"2")), tmp_path / "below", "apply")
    assert (tmp_path / "below/x").read_bytes() == (tmp_path / "below/d/f").read_bytes() == b"2"


@pytest.mark.parametrize("directory", ["/tmp", "/proc"])
def test_names_and_sorted_items_beyond_memory(monkeypatch: pytest.MonkeyPatch, directory: str) -> None:
    """What a dict and sorted() hold, also where the file system has no files without names."""
    monkeypatch.setattr(dockerd, "HELD", 50)
    dice = random.Random(3)
    with dockerd.opened(directory) as scratch:
        known: dict[bytes, bytes] = {}
        with contextlib.closing(dockerd.NameTable(3, scratch)) as table:
            assert table.get(b"none") is None
            for _ in range(3000):
                name, value = b"name%d" % dice.randrange(2000), dice.randbytes(3)
                known[name] = table[name] = value
                assert table.get(name) == value
            for name in (b"name%d" % number for number in range(2100)):
                assert table.get(name) == known.get(name)
        for count in (0, 1, 49, 50, 51, 1000):
            items = [dice.randbytes(3).replace(b"\0", b"\n") for _ in range(count)] + [b"", b"\n", b"\1"]
            assert list(dockerd.sorted_on_disk(items, scratch)) == sorted(items)


@pytest.mark.parametrize("whiteouts", ["overlay", "apply", ""])
def test_memory_does_not_grow_with_the_entries(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, whiteouts: str
) -> None:
    """Of directories, which get their times at the end, and of names that whiteouts may concern."""
    monkeypatch.setattr(dockerd, "HELD", 50)
    members = ((f"{number % 20}/{number}", "5", {"mtime": number}) for number in range(4000))
    data = io.BytesIO(make_tar(*members))
    unpacker = dockerd.Unpacker(dockerd.TarReader(data), whiteouts, IdMap(), UnpackLimits())
    tracemalloc.start()
    try:
        assert dockerd.confined(str(tmp_path), unpacker.run).entries == 4000
        assert tracemalloc.get_traced_memory()[1] < 5 * dockerd.CHUNK // 2
    finally:
        tracemalloc.stop()
    assert all(os.stat(tmp_path / f"{number % 20}/{number}").st_mtime == number for number in range(4000))


def test_random_damage_never_leaves_the_tree_or_raises_anything_else(tmp_path: Path, outside: Path) -> None:
    make_tree(tmp_path / "source")
    (tmp_path / "source/big").unlink()
    data = subprocess.run(
        ["tar", "-C", str(tmp_path / "source"), "--format=pax", "--sparse", "-cf", "-", "."],
        check=True,
        stdout=subprocess.PIPE,
    ).stdout
    dice = random.Random(2)
    for _ in range(150):
        damaged = bytearray(data[:dice.randrange(len(data))] if dice.random() < 0.3 else data)
        for _ in range(dice.randrange(1, 20)):
            if damaged:
                damaged[dice.randrange(len(damaged))] = dice.randrange(256)
        try:
            unpack(bytes(damaged), tmp_path / "t", "apply")
        except DockerError:
            pass
    assert sorted(os.listdir(tmp_path)) == ["outside", "source", "t"]


def test_limits_and_remapped_owners(tmp_path: Path) -> None:
    many = make_tar(*((f"f{number}", b"") for number in range(20)))
    with pytest.raises(BadParameter, match="more than 10 entries"):
        unpack(many, tmp_path / "t", limits=UnpackLimits(entries=10))
    large = make_tar(*((f"f{n}", b"x" * 600_000) for n in range(9)))
    with pytest.raises(BadParameter, match="files come to more than 1048576 bytes"):
        unpack(large, tmp_path / "u", limits=UnpackLimits(size=1 << 20))
    assert os.listdir(tmp_path / "u") == ["f0"]
    sparse = {"GNU.sparse.map": "0,1", "GNU.sparse.size": str(15 << 40)}
    with pytest.raises(BadParameter, match="files come to more than"):  # else of all images no list were read
        unpack(make_tar(*((name, b"x", {"pax_headers": sparse}) for name in map(str, range(70)))),
               tmp_path / "v")
    ranges = [(0, 100_000, 65536)]
    unpack(
        make_tar(("i/f", b"x", {"uid": 5, "gid": 6}), ("c", "3", {"devmajor": 1, "devminor": 3}), ("p", "6")),
        tmp_path / "r",
        idmap=IdMap(ranges, ranges),
    )
    assert [os.lstat(tmp_path / "r" / name).st_uid for name in ("i", "i/f", "p")] == [
        100_000,
        100_005,
        100_000,
    ]
    assert not (tmp_path / "r/c").exists()
    with pytest.raises(BadParameter, match="container ID 70000 cannot be mapped to a host ID"):
        unpack(make_tar(("f", b"x", {"uid": 70_000})), tmp_path / "s", idmap=IdMap(ranges, ranges))


def test_a_full_file_system_is_told_by_name_and_a_failing_source_as_it_is(tmp_path: Path) -> None:
    small = tmp_path / "small"
    small.mkdir()
    dockerd.mount("tmpfs", str(small), "tmpfs", 0, "size=256k")
    try:
        with pytest.raises(DockerError, match='failed to unpack "big/file": no space left on device'):
            unpack(make_tar(("big/file", b"x" * (4 << 20)), ("other", b"y" * (9 << 20))), small)
    finally:
        dockerd.umount(str(small), dockerd.MNT_DETACH)  # the thread that wrote may not be gone yet

    class Broken(io.BytesIO):
        def read(self, size: Optional[int] = -1) -> bytes:
            return super().read(size) or self._fail()

        def _fail(self) -> bytes:
            raise BadParameter("the client went away")

    with pytest.raises(BadParameter, match="the client went away"):
        apply_layer(Broken(make_tar(("f", b"x"))[:512]), str(tmp_path), "", IdMap())
    with pytest.raises(FileNotFoundError):
        apply_layer(io.BytesIO(make_tar(("f", b"x" * (20 << 20)))), str(tmp_path / "absent"), "", IdMap())


def test_a_sparse_map_without_end_is_no_work(tmp_path: Path) -> None:
    """A million lines, of which each block was looked at again with all before it."""
    records = b"22 GNU.sparse.major=1\n22 GNU.sparse.minor=0\n"
    content = b"600000\n" + b"0\n" * 520000
    entries = [TarEntry(b"x", ord("x"), size=len(records)), TarEntry(b"f", size=len(content))]
    parts = [dockerd.tar_header(entry) + data + bytes(-len(data) % 512)
             for entry, data in zip(entries, (records, content))]
    start = time.monotonic()
    with pytest.raises(BadParameter, match="invalid tar header"):
        apply_layer(io.BytesIO(b"".join(parts)), str(tmp_path), "", IdMap())
    assert time.monotonic() - start < 5


# Compression


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress, bytes])
def test_decompression_is_detected(compress: Callable[[bytes], bytes]) -> None:
    plain = random.Random(3).randbytes(200_000) + bytes(3 << 20) + b"end"
    for data in (
        compress(plain),
        compress(plain) + (compress(b"more") + bytes(1000) if compress is not bytes else b""),
    ):
        stream = decompress(io.BytesIO(data))
        parts = list(iter(functools.partial(stream.read, 70_000), b""))
        assert b"".join(parts) in (plain, plain + b"more") and max(map(len, parts)) <= 70_000
    if compress is not bytes:
        for damaged in (compress(plain)[:-100], compress(plain)[:1000]):
            with pytest.raises(BadParameter):
                stream = decompress(io.BytesIO(damaged))
                while stream.read(1 << 20):
                    pass
    assert decompress(io.BytesIO(b"ab")).read(10) == b"ab"
    assert decompress(io.BytesIO(b"")).read(10) == b""


def test_bombs_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd.Decompressor, "HONEST", 1 << 20)
    stream = decompress(io.BytesIO(bz2.compress(bytes(64 << 20))), ratio=1000)
    with pytest.raises(BadParameter, match="more than 1000 times its size"):
        while stream.read(1 << 20):
            pass


@pytest.mark.parametrize("kind", ["gz", "bz2", "xz"])
def test_members_of_every_length_are_one_stream(kind: str) -> None:
    """With padding between them, read in pieces of any size."""
    dice = random.Random(5)
    compressors: dict[str, Callable[[bytes], bytes]] = {
        "gz": gzip.compress, "bz2": bz2.compress, "xz": lzma.compress}
    plain = [dice.randbytes(dice.choice((0, 1, 700, 40_000, 1 << 20))) for _ in range(60)] + [bytes(5 << 20)]
    dice.shuffle(plain)
    packed = b"".join(compressors[kind](part) + bytes(dice.choice((0, 0, 3, 2000))) for part in plain)
    stream, found = decompress(io.BytesIO(packed)), bytearray()
    while data := stream.read(dice.choice((1000, 1 << 17, 1 << 19))):
        found += data
    assert found == b"".join(plain)


def test_empty_members_cost_no_more_than_their_length() -> None:
    offered = [0]

    class Counting:
        def __init__(self) -> None:
            self.decoder = zlib.decompressobj(31)

        def decompress(self, data: bytes, size: int) -> bytes:
            offered[0] += len(data)
            return self.decoder.decompress(data, size)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.decoder, name)

    packed = gzip.compress(b"") * 20_000 + gzip.compress(b"end")
    assert dockerd.Decompressor(io.BytesIO(packed), Counting, 1000).read() == b"end"
    assert offered[0] < 64 * len(packed)


# Packing


def test_what_is_packed_is_read_back_by_us_and_by_gnu_tar(tmp_path: Path) -> None:
    make_tree(tmp_path / "source")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "source/socket"))
    data = pack(tmp_path / "source")
    assert data == pack(tmp_path / "source")
    os.unlink(tmp_path / "source/socket")
    for path in [*(tmp_path / "source").rglob("*")]:
        seconds = os.lstat(path).st_mtime_ns // 10**9 * 10**9
        os.utime(path, ns=(seconds, seconds), follow_symlinks=False)
    unpack(data, tmp_path / "ours")
    assert snapshot(tmp_path / "ours") == snapshot(tmp_path / "source")
    (tmp_path / "gnu").mkdir()
    subprocess.run(
        ["tar", "-C", str(tmp_path / "gnu"), "--xattrs", "--xattrs-include=*", "-xpf", "-"],
        input=data,
        check=True,
    )
    assert snapshot(tmp_path / "gnu") == snapshot(tmp_path / "source")


def test_the_order_is_depth_first_by_name_and_the_header_ustar_where_it_can_be(tmp_path: Path) -> None:
    for name in ("b/x", "a/y", "a-b"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"1")
    data = pack(tmp_path)
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [member.name for member in tar] == ["a", "a/y", "a-b", "b", "b/x"]
    assert data[257:265] == b"ustar\00000" and data[100:108] == b"0000755\0" and data[:3] == b"a/\0"
    assert data.endswith(bytes(1024)) and not data.endswith(bytes(1024 + 512))


@pytest.mark.parametrize("length", [99, 100, 101, 150, 155, 156, 200, 254, 255, 256, 300])
def test_names_of_every_length(length: int) -> None:
    for name in (
        b"d/" * ((length - 1) // 2) + b"f" * (2 - length % 2),
        b"e" * 90 + b"/" + b"x" * (length - 91),
        b"y" * length,
    ):
        header = dockerd.tar_header(TarEntry(name, 0x30, link=b"l" * length))
        with tarfile.open(fileobj=io.BytesIO(header + bytes(1024))) as tar:
            member = tar.next()
        assert member and member.name == name.decode().rstrip("/") and member.linkname == "l" * length
        assert next(iter(dockerd.TarReader(io.BytesIO(header)))).name == name


def test_an_upper_directory_becomes_a_layer_and_back(tmp_path: Path) -> None:
    upper = tmp_path / "upper"
    layer = make_tar(
        (".wh.gone", b"", {"mode": 0o600}),
        ("d", "5", {"mode": 0o755}),
        ("d/.wh..wh..opq", b""),
        ("d/f", b"x"),
    )
    unpack(layer, upper)
    os.link(upper / "gone", upper / "gone2")  # overlay links its whiteouts
    data = pack(upper, whiteouts="overlay")
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert [(member.name, member.type) for member in tar] == [
            ("d", b"5"), ("d/.wh..wh..opq", b"0"), ("d/f", b"0"), (".wh.gone", b"0"), (".wh.gone2", b"0")]
    unpack(data, tmp_path / "again")
    assert [overlay_kind(tmp_path / "again" / name) for name in ("d", "gone", "gone2")] == [
        "opaque",
        "whiteout",
        "whiteout",
    ]


def test_packing_stays_inside_and_stops_with_its_reader(tmp_path: Path, outside: Path) -> None:
    (tmp_path / "t").mkdir()
    os.symlink(outside, tmp_path / "t/l")
    assert b"s3cret" not in pack(tmp_path / "t")
    (tmp_path / "t/big").write_bytes(bytes(64 << 20))

    def write(data: bytes) -> None:
        raise BrokenPipeError("closed")

    with pytest.raises(BrokenPipeError):
        write_tree(str(tmp_path / "t"), write)
    with pytest.raises(FileNotFoundError):
        pack(tmp_path / "absent")


# Removing trees


def test_removing_a_tree_that_is_deep_immutable_and_full_of_links(tmp_path: Path, outside: Path) -> None:
    tree = tmp_path / "tree"
    tree.mkdir()
    os.symlink(outside, tree / "link")
    (tree / "locked").mkdir()
    (tree / "locked/f").write_bytes(b"x")
    flags = subprocess.run(
        ["chattr", "+i", str(tree / "locked/f"), str(tree / "locked")], stderr=subprocess.DEVNULL
    )
    assert flags.returncode == 0
    here = os.getcwd()
    os.chdir(tree)
    try:
        for _ in range(3000):
            os.mkdir("deeper")
            os.chdir("deeper")
        Path("f").write_bytes(b"x")
    finally:
        os.chdir(here)
    dockerd.remove_tree(str(tree))
    dockerd.remove_tree(str(tree))
    assert sorted(os.listdir(tmp_path)) == ["outside"] and (outside / "passwd").exists()


# ------------------------------------------------------------------------------------------------------------
# Execution driver: cgroups
# ------------------------------------------------------------------------------------------------------------

V1_MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw,relatime shared:9 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/me\\040mory rw,relatime - cgroup cgroup rw,memory
36 31 0:33 /outer /sys/fs/cgroup/pids rw,relatime - cgroup cgroup rw,pids
40 31 0:37 / /sys/fs/cgroup/systemd rw,relatime - cgroup cgroup rw,xattr,name=systemd
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw
42 31 0:32 / /elsewhere/memory rw,relatime - cgroup cgroup rw,memory
"""
V1_MEMBERSHIP = "4:memory:/api/x\n3:pids:/outer/own\n2:name=systemd:/\n1:cpuacct,cpu:/\n0::/me\n"
V2_MOUNTS = "30 23 0:26 / /sys/fs/cgroup rw,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"


def test_hierarchies_are_read_from_the_kernels_tables() -> None:
    assert dockerd.read_hierarchies(V1_MOUNTS, V1_MEMBERSHIP) == [
        (("cpu", "cpuacct"), "/sys/fs/cgroup/cpu,cpuacct", "/"),
        (("memory",), "/sys/fs/cgroup/me mory", "/api/x"),
        (("pids",), "/sys/fs/cgroup/pids", "/own"),
        (("name=systemd",), "/sys/fs/cgroup/systemd", "/"),
        ((), "/sys/fs/cgroup/unified", "/me"),
    ]
    assert dockerd.read_hierarchies(V2_MOUNTS, "0::/\n") == [((), "/sys/fs/cgroup", "/")]
    assert dockerd.read_hierarchies("", "") == []


@pytest.mark.parametrize(
    "parent, own, place",
    [
        ("/docker", "/x", "/docker"),
        ("docker", "/x", "/x/docker"),
        ("/", "/x", ""),
        ("/../../etc", "/", "/etc"),
        ("../..", "/a/b", ""),
        ("//a//b", "/", "/a/b"),
    ],
)
def test_the_parent_stays_inside_the_hierarchy(parent: str, own: str, place: str) -> None:
    assert dockerd.CgroupManager.place(parent, own) == place


def manager_of(tmp_path: Path, mountinfo: str, membership: str = "0::/\n", parent: str = "") -> Any:
    (tmp_path / "mountinfo").write_text(mountinfo)
    (tmp_path / "cgroup").write_text(membership)
    return dockerd.CgroupManager(parent, str(tmp_path / "mountinfo"), str(tmp_path / "cgroup"))


RESOURCES = {
    "Memory": 64 << 20,
    "MemorySwap": 96 << 20,
    "MemoryReservation": 32 << 20,
    "MemorySwappiness": 0,
    "CpuShares": 512,
    "NanoCpus": 1_500_000_000,
    "CpusetCpus": "0-1",
    "CpusetMems": "0",
    "PidsLimit": 20,
    "BlkioWeight": 500,
    "OomKillDisable": True,
}


def test_settings_of_version_1() -> None:
    written = [(setting.file, setting.text) for setting in dockerd.v1_settings(RESOURCES)]
    assert written == [
        ("memory.limit_in_bytes", "67108864"),
        ("memory.memsw.limit_in_bytes", "100663296"),
        ("memory.soft_limit_in_bytes", "33554432"),
        ("memory.swappiness", "0"),
        ("memory.oom_control", "1"),
        ("cpu.shares", "512"),
        ("cpu.cfs_period_us", "100000"),
        ("cpu.cfs_quota_us", "150000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "20"),
        ("blkio.weight", "500"),
    ]
    assert dockerd.v1_settings({}) == []
    unset = {"PidsLimit": None, "MemorySwappiness": -1, "Memory": 0, "MemorySwap": -1}
    assert dockerd.v1_settings(unset) == [("memory", "memory.memsw.limit_in_bytes", "-1")]
    assert dockerd.v1_settings({"PidsLimit": -1}) == [("pids", "pids.max", "max")]


def test_settings_of_version_2() -> None:
    written = [(setting.file, setting.text) for setting in dockerd.v2_settings(RESOURCES)]
    assert written == [
        ("memory.max", "67108864"),
        ("memory.swap.max", "33554432"),
        ("memory.low", "33554432"),
        ("cpu.weight", "20"),
        ("cpu.max", "150000 100000"),
        ("cpuset.cpus", "0-1"),
        ("cpuset.mems", "0"),
        ("pids.max", "20"),
        ("io.bfq.weight", "default 500"),
        ("io.weight", "default 4950"),
    ]
    swaps = [
        {setting.file: setting.text for setting in dockerd.v2_settings({"Memory": 100, "MemorySwap": swap})}
        for swap in (100, -1, 0, 150)
    ]
    assert [entry.get("memory.swap.max") for entry in swaps] == ["0", "max", None, "50"]
    weights = [dockerd.v2_settings({"CpuShares": shares})[0].text for shares in (1, 2, 1024, 262144, 1 << 30)]
    assert weights == ["1", "1", "39", "10000", "10000"]
    assert dockerd.v2_settings({"CpuPeriod": 50000})[0].text == "max 50000"
    assert dockerd.v2_settings({"BlkioWeight": 10})[1].text == "default 1"


def test_device_rules() -> None:
    assert dockerd.device_rules({}) == [
        "b *:* m",
        "c *:* m",
        "c 1:3 rwm",
        "c 1:5 rwm",
        "c 1:7 rwm",
        "c 1:8 rwm",
        "c 1:9 rwm",
        "c 5:0 rwm",
        "c 5:1 rwm",
        "c 5:2 rwm",
        "c 10:200 rwm",
        "c 136:* rwm",
    ]
    assert dockerd.device_rules({"Privileged": True}) == ["a *:* rwm"]
    more = dockerd.device_rules(
        {
            "Devices": [{"PathOnHost": "/dev/null", "CgroupPermissions": "r"}],
            "DeviceCgroupRules": ["b 8:* rw"],
        }
    )
    assert more[:2] == ["b *:* m", "b 8:* rw"] and "c 1:3 r" in more
    for wrong in ("c 1:3", "x 1:1 r", "c 1:1 rwmr", "c 1:1 q", "c 1:1 r\n", "c ١:1 r"):
        with pytest.raises(DockerError, match="invalid device cgroup rule format"):
            dockerd.device_rules({"DeviceCgroupRules": [wrong]})
    with pytest.raises(DockerError, match='adding custom device "/dev/nope": no such file'):
        dockerd.device_rules({"Devices": [{"PathOnHost": "/dev/nope"}]})


def run_ebpf(program: bytes, kind: int, access: int, major: int, minor: int) -> int:
    """What the device program answers the kernel."""
    context = struct.pack("=III", access << 16 | kind, major, minor)
    code = list(struct.iter_unpack("=BBhi", program))
    registers, position = [0] * 10, 0
    while True:
        operation, both, offset, value = code[position]
        target, source = both & 15, both >> 4
        position += 1
        if operation == 0x95:
            return registers[0]
        if operation == 0x61:
            (registers[target],) = struct.unpack_from("=I", context, offset)
        elif operation == 0xBC:
            registers[target] = registers[source]
        elif operation == 0x54:
            registers[target] &= value
        elif operation == 0x74:
            registers[target] >>= value
        elif operation == 0xB7:
            registers[target] = value
        elif operation == 0x55:
            position += offset if registers[target] != value else 0
        else:
            raise AssertionError(hex(operation))


def test_device_program_does_what_the_rules_say() -> None:
    rules = dockerd.device_rules({"DeviceCgroupRules": ["b 8:* r", "c 42:7 w"]})
    program = dockerd.device_program(rules)
    for kind in (1, 2):
        for major, minor in (
            (1, 3),
            (1, 4),
            (1, 11),
            (5, 2),
            (8, 0),
            (8, 5),
            (10, 200),
            (42, 7),
            (42, 8),
            (136, 99),
        ):
            for access in range(1, 8):
                wanted = any(
                    {"b": 1, "c": 2}[rule[0]] == kind
                    and place.split(":")[0] in ("*", str(major))
                    and place.split(":")[1] in ("*", str(minor))
                    and {name for bit, name in ((1, "m"), (2, "r"), (4, "w")) if access & bit} <= set(letters)
                    for rule, place, letters in (rule.split() for rule in rules)
                )
                assert run_ebpf(program, kind, access, major, minor) == wanted, (kind, major, minor, access)
    assert run_ebpf(dockerd.device_program(["a *:* rwm"]), 1, 7, 3, 3) == 1


@pytest.mark.parametrize(
    "resources, text",
    [
        ({"Memory": 1000}, "Minimum memory limit allowed is 6MB"),
        ({"Memory": 64 << 20, "MemorySwap": 32 << 20}, "Minimum memoryswap limit should be larger"),
        ({"MemorySwap": 32 << 20}, "You should always set the Memory limit when using Memoryswap"),
        ({"MemorySwappiness": 101}, "Invalid value: 101, valid memory swappiness range is 0-100"),
        ({"Memory": 64 << 20, "MemoryReservation": 65 << 20}, "can not be less than memory reservation"),
        ({"NanoCpus": 10**9, "CpuQuota": 5000}, "Nano CPUs and CPU Quota cannot both be set"),
        ({"NanoCpus": 10**13}, "Range of CPUs is from 0.01 to"),
        ({"Memory": -1}, "Minimum memory limit allowed is 6MB"),
        ({"KernelMemory": 1}, "Minimum kernel memory limit allowed is 6MB"),
        ({"CpuPeriod": 10}, "CPU cfs period can not be less than 1ms"),
        ({"CpuQuota": 10}, "CPU cfs quota can not be less than 1ms"),
        ({"BlkioWeight": 5}, "Range of blkio weight is from 10 to 1000"),
        ({"CpusetCpus": "a"}, "Invalid value a for cpuset cpus"),
        ({"CpusetCpus": "0-99999999999"}, "Invalid value 0-99999999999 for cpuset cpus"),
        ({"CpusetCpus": "0,8000"}, "Requested CPUs are not available - requested 0,8000, available: "),
        ({"CpusetMems": "77"}, "Requested memory nodes are not available - requested 77, available: "),
    ],
)
def test_resources_that_no_host_can_give(resources: dict[str, Any], text: str) -> None:
    with pytest.raises(dockerd.BadParameter, match=text):
        dockerd.check_resources(resources)


def test_a_host_without_cgroups_is_told_of_and_never_a_crash(tmp_path: Path) -> None:
    manager = manager_of(tmp_path, "", "")
    assert manager.info() == {
        "MemoryLimit": False,
        "SwapLimit": False,
        "KernelMemoryTCP": False,
        "CpuCfsPeriod": False,
        "CpuCfsQuota": False,
        "CPUShares": False,
        "CPUSet": False,
        "PidsLimit": False,
        "OomKillDisable": False,
        "CgroupDriver": "none",
        "CgroupVersion": "1",
    }
    assert manager.warnings()[:2] == ["WARNING: No memory limit support", "WARNING: No swap limit support"]
    host_config = {"Memory": 64 << 20, "CpuShares": 5, "PidsLimit": -1, "CpusetCpus": "0"}
    assert manager.adapt(host_config) == [
        "Your kernel does not support memory limit capabilities or the cgroup is not mounted. "
        "Limitation discarded.",
        "Your kernel does not support CPU shares or the cgroup is not mounted. Shares discarded.",
        "Your kernel does not support cpuset or the cgroup is not mounted. Cpuset discarded.",
    ]
    assert host_config == {"Memory": 0, "CpuShares": 0, "PidsLimit": -1, "CpusetCpus": "", "MemorySwap": 0}
    cgroup = manager.create("x", host_config)
    assert (
        cgroup.join == []
        and cgroup.directory_fd is None
        and cgroup.processes() == []
        and cgroup.stats()["cpu_stats"] == dockerd.NO_CPU_STATS
    )
    assert not cgroup.oom_killed()
    cgroup.kill()
    with pytest.raises(dockerd.NotSupported):
        cgroup.freeze()
    cgroup.remove()
    manager.kill_leftover("x")
    manager.close()


def test_memory_without_swap_accounting(tmp_path: Path) -> None:
    root = tmp_path / "memory"
    root.mkdir()
    for name in ("memory.limit_in_bytes", "memory.oom_control"):
        (root / name).write_text("")
    manager = manager_of(tmp_path, f"35 31 0:32 / {root} rw - cgroup cgroup rw,memory\n", "4:memory:/\n")
    assert "WARNING: No swap limit support" in manager.warnings()
    host_config: dict[str, Any] = {"Memory": 64 << 20}
    assert manager.adapt(host_config) == [
        "Your kernel does not support swap limit capabilities or the cgroup is not "
        "mounted. Memory limited without swap."
    ]
    assert host_config["MemorySwap"] == -1


def test_swap_is_twice_the_memory_and_oom_warnings(tmp_path: Path) -> None:
    manager = dockerd.CgroupManager()
    host_config: dict[str, Any] = {"Memory": 64 << 20}
    assert manager.adapt(host_config) == [] and host_config["MemorySwap"] == 128 << 20
    if manager.support["OomKillDisable"]:
        assert manager.adapt({"OomKillDisable": True}) == [
            "OOM killer is disabled for the container, but no memory limit is set, this can result in the "
            "system running out of resources."
        ]


def fake_v2(tmp_path: Path) -> Any:
    root = tmp_path / "v2"
    root.mkdir()
    (root / "cgroup.controllers").write_text("cpuset cpu io memory pids\n")
    (root / "cgroup.subtree_control").write_text("cpuset cpu\n")
    return manager_of(tmp_path, f"30 23 0:26 / {root} rw - cgroup2 cgroup2 rw\n")


def test_version_2(tmp_path: Path) -> None:
    manager = fake_v2(tmp_path)
    assert manager.version == 2 and manager.warnings() == []
    assert manager.info()["CgroupVersion"] == "2" and not manager.info()["OomKillDisable"]
    cgroup = dockerd.Cgroup(manager, "/docker", "x")
    assert cgroup.join == []
    assert [mount["type"] for mount in cgroup.mounts(True, True)] == ["cgroup2"]


def test_version_2_without_controllers(tmp_path: Path) -> None:
    """In dockerd 20.10's words for a host whose cgroups v2 have only pids."""
    root = tmp_path / "v2"
    root.mkdir()
    (root / "cgroup.controllers").write_text("pids\n")
    manager = manager_of(tmp_path, f"30 23 0:26 / {root} rw - cgroup2 cgroup2 rw\n")
    assert manager.warnings() == [f"WARNING: No {what} support" for what in (
        "memory limit", "swap limit", "cpu cfs quota", "cpu cfs period", "cpu shares", "cpuset", "io.weight",
        "io.weight (per device)", "io.max (rbps)", "io.max (wbps)", "io.max (riops)", "io.max (wiops)")]
    with pytest.raises(BadParameter, match="^Your kernel does not support cgroup cpu real-time runtime$"):
        manager.adapt({"CpuRealtimeRuntime": 1000})


def test_stats_of_version_2(tmp_path: Path) -> None:
    """The texts are those of a Debian 12; the shape is what dockerd makes of containerd's v2 metrics."""
    cgroup = dockerd.Cgroup(fake_v2(tmp_path), "/docker", "x")
    directory = Path(cgroup.of[""])
    directory.mkdir(parents=True)
    for name, text in {
        "cpu.stat": "usage_usec 36\nuser_usec 12\nsystem_usec 24\nnr_periods 3\nnr_throttled 2\n"
                    "throttled_usec 5\n", "pids.current": "2\n", "pids.max": "max\n",
        "memory.current": "8192\n", "memory.max": "max\n", "memory.events": "low 0\noom 1\noom_kill 1\n",
        "memory.stat": "anon 4096\nfile 2048\nsomething_new 7\n",
        "io.stat": "8:0 rbytes=10 wbytes=20 rios=1 wios=2 dbytes=0 dios=0\n7:1 \n"}.items():
        (directory / name).write_text(text)
    stats = cgroup.stats()
    assert stats["cpu_stats"] == {
        "cpu_usage": {"total_usage": 36000, "usage_in_kernelmode": 24000, "usage_in_usermode": 12000},
        "throttling_data": {"periods": 3, "throttled_periods": 2, "throttled_time": 5000}}
    assert stats["pids_stats"] == {"current": 2, "limit": 18446744073709551615}
    memory = stats["memory_stats"]
    assert (memory["usage"], memory["limit"], memory["failcnt"]) == (8192, dockerd.machine_memory(), 1)
    assert len(memory["stats"]) == 31 and memory["stats"]["anon"] == 4096
    assert "something_new" not in memory["stats"] and "max_usage" not in memory
    assert stats["blkio_stats"]["io_service_bytes_recursive"] == [
        {"major": 8, "minor": 0, "op": "read", "value": 10},
        {"major": 8, "minor": 0, "op": "write", "value": 20}]
    assert stats["blkio_stats"]["io_serviced_recursive"] is None


# The real kernel's

PARENT = f"/dockerdpy-test-{os.getpid()}"


def places(name: str) -> list[str]:
    """Where the kernel's cgroup trees have a directory `name`, by walking them."""
    found = []
    for root, directories, _ in os.walk("/sys/fs/cgroup"):
        found += [os.path.join(root, directory) for directory in directories if directory == name]
    return found


@pytest.fixture
def manager() -> Iterator[Any]:
    """A manager under a parent of the test's own, which is gone after it."""
    manager = dockerd.CgroupManager(PARENT)
    yield manager
    manager.close()
    assert places(PARENT[1:]) == []


@contextlib.contextmanager
def joined(cgroup: Any, code: str) -> Iterator[Any]:
    """A process inside `cgroup` that runs `code`; killed at the end."""
    enter = [*cgroup.join, *([[cgroup.of[""] + "/cgroup.procs", "0"]] if "" in cgroup.of else [])]
    program = f"for path, text in {enter!r}:\n open(path, 'w').write(text)\nprint('in', flush=True)\n{code}"
    process = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == b"in\n"
        yield process
    finally:
        cgroup.thaw()
        process.kill()
        process.communicate(timeout=10)


def text_of(cgroup: Any, controller: str, file: str) -> str:
    with open(f"{cgroup.of[controller]}/{file}") as opened:
        return opened.read().strip()


needs_v1 = pytest.mark.v1


@needs_v1
def test_limits_are_the_kernels(manager: Any) -> None:
    resources = {**RESOURCES, "OomKillDisable": False, "CgroupParent": PARENT, "CpusetCpus": "0"}
    cgroup = manager.create("limits", resources)
    try:
        for controller, file, wanted in (
            ("memory", "memory.limit_in_bytes", "67108864"),
            ("memory", "memory.memsw.limit_in_bytes", "100663296"),
            ("memory", "memory.swappiness", "0"),
            ("cpu", "cpu.shares", "512"),
            ("cpu", "cpu.cfs_quota_us", "150000"),
            ("cpuset", "cpuset.cpus", "0"),
            ("cpuset", "cpuset.mems", "0"),
            ("pids", "pids.max", "20"),
            ("blkio", "blkio.bfq.weight", "500"),
            ("devices", "devices.list", "\n".join(dockerd.device_rules({}))),
        ):
            assert text_of(cgroup, controller, file) == wanted, file
        assert {os.path.dirname(place) for place in places("limits")} == set(places(PARENT[1:]))
        assert len(places("limits")) == len(manager.hierarchies)
        more = {**resources, "Memory": 256 << 20, "MemorySwap": 512 << 20, "PidsLimit": 0}
        cgroup.update(resources, more)
        assert text_of(cgroup, "memory", "memory.limit_in_bytes") == str(256 << 20)
        less = {**more, "Memory": 32 << 20, "MemorySwap": 32 << 20}
        cgroup.update(more, less)
        assert text_of(cgroup, "memory", "memory.memsw.limit_in_bytes") == str(32 << 20)
        assert text_of(cgroup, "pids", "pids.max") == "max"
        stats = cgroup.stats()
        assert stats["memory_stats"]["limit"] == 32 << 20 and stats["pids_stats"] == {}
        with pytest.raises(dockerd.DockerError, match="cannot write '4000': .*cpuset.cpus"):
            cgroup.update(less, {**less, "CpuShares": 100, "CpusetCpus": "4000"})
        assert text_of(cgroup, "cpu", "cpu.shares") == "512"  # all or none
    finally:
        cgroup.remove()
    assert places("limits") == []


@needs_v1
def test_real_time_is_shared_out_from_the_parent() -> None:
    manager = dockerd.CgroupManager(PARENT)
    manager.real_time = (500000, 20000)
    cgroup = manager.create("timely", {"CpuRealtimePeriod": 500000, "CpuRealtimeRuntime": 10000})
    try:
        assert text_of(cgroup, "cpu", "cpu.rt_runtime_us") == "10000"
        assert text_of(cgroup, "cpu", "cpu.rt_period_us") == "500000"
        assert text_of(cgroup, "cpu", "../cpu.rt_runtime_us") == "20000"
        with pytest.raises(DockerError, match="cpu.rt_runtime_us"):
            manager.create("greedy", {"CpuRealtimePeriod": 500000, "CpuRealtimeRuntime": 30000})
    finally:
        cgroup.remove()
        manager.close()
    assert places(PARENT[1:]) == []


@needs_v1
def test_a_refused_limit_leaves_nothing(manager: Any) -> None:
    with pytest.raises(dockerd.DockerError, match="cannot make the container's cgroups: .*cpuset.cpus"):
        manager.create("refused", {"CpusetCpus": "4000"})
    assert places("refused") == []


@needs_v1
def test_joining_freezing_killing(manager: Any) -> None:
    cgroup = manager.create("freeze", {})
    with joined(cgroup, "import time\nwhile True: time.sleep(0.001)") as process:
        assert cgroup.processes() == [process.pid]
        with open(f"/proc/{process.pid}/cgroup") as membership:
            assert {line.strip().split(":")[2] for line in membership} == {PARENT + "/freeze"}
        cgroup.freeze()
        with open(f"/proc/{process.pid}/stat") as status:
            before = status.read()
        time.sleep(0.05)
        with open(f"/proc/{process.pid}/stat") as status:
            assert status.read() == before
        cgroup.kill()
        assert process.wait(5) == -signal.SIGKILL
    cgroup.remove()


@needs_v1
def test_kill_without_cgroup_kill_and_removal_of_what_is_busy(manager: Any) -> None:
    cgroup = manager.create("busy", {})
    os.mkdir(cgroup.of["pids"] + "/nested")
    del cgroup.of[""]  # as on a kernel without v2
    code = "import os, time\nos.fork(); os.fork()\ntime.sleep(60)"
    with joined(cgroup, code) as process:
        deadline = time.monotonic() + 5
        while len(cgroup.processes()) < 4 and time.monotonic() < deadline:
            time.sleep(0.01)
        cgroup.remove()  # answers at once; a process is inside
        process.wait(5)
        again = manager.create("busy", {})  # waits until the old one is gone
        assert again.processes() == []
        again.remove()
    assert places("busy") == []


@needs_v1
def test_leftovers(manager: Any) -> None:
    first = manager.create("left", {"Memory": 64 << 20})
    with joined(first, "import time\ntime.sleep(60)") as process:
        other = dockerd.CgroupManager(PARENT)
        second = other.create("left", {})  # an earlier daemon's is ended and made anew
        assert process.wait(5) == -signal.SIGKILL
        assert text_of(second, "memory", "memory.limit_in_bytes") != str(64 << 20)
    with joined(second, "import time\ntime.sleep(60)") as process:
        manager.kill_leftover("another")
        assert process.poll() is None
        manager.kill_leftover("left")
        assert process.wait(5) == -signal.SIGKILL
    for removed in (first, second):
        removed.remove()
    wait_for(lambda: places("left") == [], "the removal of the cgroups")
    for directory in places(PARENT[1:]):
        os.rmdir(directory)
    manager.create("left", {}).remove()  # the parent had gone


@needs_v1
def test_out_of_memory_is_seen(manager: Any) -> None:
    cgroup = manager.create("oom", {"Memory": 24 << 20, "MemorySwap": 24 << 20})
    with joined(cgroup, "x = b'x' * (200 << 20)") as process:
        assert process.wait(20) == -signal.SIGKILL
    assert cgroup.oom_killed()
    cgroup.remove()


@needs_v1
def test_devices_are_confined(manager: Any) -> None:
    """By v1's controller, and in a v2 directory by our program: any node can be made, few be opened."""
    code = (
        "import os, sys, tempfile\nd = tempfile.mkdtemp()\n"
        "for minor in (3, 11):\n p = f'{d}/{minor}'\n os.mknod(p, 0o20600, os.makedev(1, minor))\n"
        " try: os.close(os.open(p, os.O_RDONLY | os.O_NONBLOCK)); print('ok', flush=True)\n"
        " except PermissionError: print('refused', flush=True)\n os.unlink(p)\nos.rmdir(d)"
    )
    cgroup = manager.create("devices", {})
    with joined(cgroup, code) as process:
        assert process.communicate(timeout=10)[0] == b"ok\nrefused\n"
    cgroup.remove()
    cgroup = manager.create("devices", {"Privileged": True})
    with joined(cgroup, code) as process:
        assert process.communicate(timeout=10)[0] == b"ok\nok\n"
    dockerd.attach_device_program(cgroup.directory_fd, dockerd.device_rules({}))
    with joined(cgroup, code) as process:
        assert process.communicate(timeout=10)[0] == b"ok\nrefused\n"
    cgroup.remove()


@needs_v1
def test_the_mounts_inside(manager: Any) -> None:
    cgroup = manager.create("mounts", {})
    entries = cgroup.mounts(False, True)
    assert entries[0]["type"] == "tmpfs" and entries[0]["readonly_last"]
    assert {"from": cgroup.of["memory"], "to": "/sys/fs/cgroup/memory", "attributes": 0xF} in entries
    assert not any(entry["to"].endswith("unified") for entry in entries)
    private = {entry["to"]: entry for entry in cgroup.mounts(True, False)}
    assert private["/sys/fs/cgroup/memory"]["options"] == (("memory", ""),)
    assert private["/sys/fs/cgroup/systemd"]["options"] == (("name", "systemd"),)
    cgroup.remove()


def test_the_apparmor_profile_denies_the_kernels_knobs() -> None:
    """Its rules, read as apparmor.d(5) says: ** is anything, {a,b} alternatives, [^x] another character."""
    rules = re.findall(r"^  deny (\S+) (\S+),$", dockerd.apparmor_profile(), re.MULTILINE)

    def denied(path: str, access: str) -> bool:
        def matches(pattern: str) -> bool:
            pattern = pattern.replace("@{PROC}", "/proc").replace("**", ".*")
            pattern = pattern.replace("{", "(?:").replace("}", ")").replace(",", "|")
            return re.fullmatch(pattern, path) is not None

        return any(access in allowed and matches(pattern) for pattern, allowed in rules)

    for path in ("/proc/sys/kernel/core_pattern", "/proc/sys/vm/panic_on_oom", "/proc/sysrq-trigger",
                 "/proc/kcore", "/proc/irq/1/smp_affinity", "/sys/kernel/uevent_helper",
                 "/sys/fs/bpf/x", "/sys/class/x", "/sys/firmware/efi/vars", "/proc/acpi/x"):
        assert denied(path, "w"), path
    for path in ("/proc/1/attr/exec", "/proc/23/oom_score_adj", "/proc/sys/kernel/shmmax",
                 "/sys/fs/cgroup/memory/x", "/etc/passwd"):
        assert not denied(path, "w"), path
    assert denied("/sys/kernel/security/apparmor/profiles", "r") and denied("/proc/kcore", "r")
    assert not denied("/proc/sys/kernel/core_pattern", "r") and not denied("/sys/class/net/eth0", "r")


# OCI runtimes


@pytest.fixture(scope="module", params=["runc", "crun"])
def runtime_host(request: pytest.FixtureRequest, busybox: bytes,
                 tmp_path_factory: pytest.TempPathFactory) -> Iterator[Host]:
    """A host whose default runtime is another program."""
    program = tmp_path_factory.mktemp("runtimes") / request.param
    found = glob.glob(f"{PEER}/usr/*bin/{request.param}")
    libraries = {os.path.dirname(path) for path in glob.glob(f"{PEER}/**/lib*.so.*", recursive=True)}
    assert found, f"{PEER} has no {request.param}: make peer"
    program.write_text(f"#!/bin/sh\nLD_LIBRARY_PATH={':'.join(libraries)} exec {found[0]} \"$@\"\n")
    program.chmod(0o755)
    host = Host("--add-runtime", f"other={program}", "--default-runtime", "other", "--live-restore")
    host.enter("umount", "/sys/fs/cgroup/unified", stderr=subprocess.DEVNULL).wait()  # hybrid is not for crun
    try:
        host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        yield host
    finally:
        host.close()


def test_containers_of_an_oci_runtime(runtime_host: Host) -> None:
    """Streams, terminal, exit code, limits, exec, pause, stop and restart are as with the native driver."""
    host, limits = runtime_host, {"Memory": 64 << 20, "PidsLimit": 33}
    assert host.api("GET", "/info")["DefaultRuntime"] == "other"
    script = "id -u; hostname; grep Seccomp: /proc/self/status; echo lost >&2; exit 3"
    code, output = host.run("sh", "-c", script, Hostname="alpha", User="bob")
    assert (code, output.split()) == (3, b"1000 alpha Seccomp: 2 lost".split())
    assert host.run("sh", "-c", "tty; stty size", Tty=True, HostConfig={"ConsoleSize": [33, 44]}) == (
        0, b"/dev/pts/0\r\n33 44\r\n")
    identity = host.create("sleep", NEVER, HostConfig=limits)
    host.api("POST", f"/containers/{identity}/start")
    assert host.inspect(identity)["HostConfig"]["Runtime"] == "other"
    state = host.exec_root + "/oci/state"
    assert os.listdir(state) == [identity]
    values = {read_text(f"{path}/{name}").strip() for path in host.cgroups() if path.endswith(identity)
              for name in ("memory.limit_in_bytes", "memory.max", "pids.max")}
    assert {str(64 << 20), "33"} <= values
    docker = Docker(docker_clis()[min(docker_clis())], host)
    assert docker("exec", identity, "cat", "/proc/1/cmdline") == f"sleep\0{NEVER}\0"
    for action in ("pause", "unpause", "restart?t=0", "stop?t=0"):
        host.api("POST", f"/containers/{identity}/{action}")
    assert host.inspect(identity)["State"]["ExitCode"] == 137
    host.remove_all()
    assert os.listdir(state) == [] and os.listdir(host.exec_root + "/oci") == ["state"]


@pytest.mark.parametrize("command, code", [("nosuch", 127), ("/etc/plain", 126)])
def test_what_an_oci_runtime_cannot_start(runtime_host: Host, command: str, code: int) -> None:
    identity = runtime_host.create(command)
    message = runtime_host.api("POST", f"/containers/{identity}/start", status=400)["message"]
    assert "OCI runtime create failed: " in message
    assert {127: "nosuch", 126: "ermission denied"}[code] in message
    assert runtime_host.inspect(identity)["State"]["ExitCode"] == code
    runtime_host.remove_all()
    assert os.listdir(runtime_host.exec_root + "/oci/state") == []


def test_an_oci_runtimes_container_outlives_the_daemon(runtime_host: Host) -> None:
    """The shim inherits it: the next daemon has its output and exit code, and clears up behind it."""
    host = runtime_host
    script = "trap 'echo late; exit 7' TERM; echo early; while :; do sleep 0.1; done"
    identity = host.create("sh", "-c", script)
    host.api("POST", f"/containers/{identity}/start")
    wait_for(lambda: b"early" in host.api("GET", f"/containers/{identity}/logs?stdout=1"), "its output")
    host.kill()
    host.start()
    host.api("POST", f"/containers/{identity}/kill?signal=TERM")
    assert host.api("POST", f"/containers/{identity}/wait")["StatusCode"] == 7
    logs = host.api("GET", f"/containers/{identity}/logs?stdout=1")
    assert demultiplex(logs)[0] == b"early\nlate\n"
    host.remove_all()
    assert os.listdir(host.exec_root + "/oci/state") == []


def test_the_shim_reaps_orphans(host: Host) -> None:
    """What a container with the host's processes leaves to the shim does not stay as a zombie."""
    identity = host.create("sh", "-c", "(sleep 0.05 &) ; exec sleep " + NEVER, HostConfig={"PidMode": "host"})
    host.api("POST", f"/containers/{identity}/start")
    pid = host.inspect(identity)["State"]["Pid"]
    shim = int(read_text(f"/proc/{pid}/stat").rpartition(")")[2].split()[1])
    wait_for(lambda: not any(f") Z {shim} " in read_text(f"/proc/{pid}/stat") or
                             read_text(f"/proc/{pid}/cmdline") == "sleep\0000.05\0" for pid in processes()))


def test_an_unknown_runtime(host: Host) -> None:
    body = {"Image": "busybox", "HostConfig": {"Runtime": "zz"}}
    assert host.api("POST", "/containers/create", body, status=400) == {
        "message": "unknown or invalid runtime name: zz"}


# User namespaces


@pytest.mark.parametrize("asked, subuid, subgid, maps", [
    ("default", "x:1:2\ndockremap:100000:65536\n", "dockremap:200000:65536\n",
     ([(0, 100000, 65536)], [(0, 200000, 65536)])),
    ("daemon", "daemon:5:10\n1:50:3\n", "daemon:7:1\n", ([(0, 5, 10), (10, 50, 3)], [(0, 7, 1)])),
    ("1:bin", "daemon:5:10\n", "bin:7:1\ndaemon:9:9\n", ([(0, 5, 10)], [(0, 7, 1)])),
    ("root", "root:1:1\n", "root:1:1\n", "User namespaces: root cannot be remapped with itself"),
    ("a:b:c", "", "", 'Invalid user/group specification in --userns-remap: "a:b:c"'),
    ("nosuch", "", "",
     'Error during uid lookup for "nosuch": unable to find entry "nosuch" in passwd database'),
    ("daemon:65000", "", "",
     'Gid 65000 has no entry in /etc/group: unable to find entry "65000" in group database'),
    ("default", "", "", "Can't create ID mappings: no subuid ranges found for \"dockremap\": add a line such "
     "as dockremap:100000:65536 to {etc}/subuid"),
])
def test_whom_a_remapped_root_is(tmp_path: Path, asked: str, subuid: str, subgid: str, maps: Any) -> None:
    (tmp_path / "subuid").write_text(subuid)
    (tmp_path / "subgid").write_text(subgid)
    try:
        found: Any = dockerd.remapped_ids(asked, str(tmp_path))
        assert (found.uids, found.gids) == maps
    except DockerError as error:
        assert str(error) == maps.format(etc=tmp_path)


REMAPPED = """id -u; cat /proc/self/uid_map; stat -c %u /bin/sh /etc/hosts /.dockerenv
touch /made && echo made; head -c 3 /dev/zero | wc -c; chown bob /made && echo given; ulimit -n
cat /proc/self/oom_score_adj; echo out >/dev/stdout; ip link set lo down && echo own network; chroot / true
"""


def test_remapped_containers(new_host: Callable[..., Host], busybox: bytes, tmp_path: Path) -> None:
    """--userns-remap: a container's root is nobody on the host and all in its own namespaces, its layers
    belong to it, and what Docker refuses then is refused; --userns=host has the host's."""
    host = new_host("--userns-remap", "default", start=False)
    for name in ("subuid", "subgid"):
        (tmp_path / name).write_text("dockremap:100000:65536\n")
        assert host.enter("mount", "--bind", str(tmp_path / name), f"/etc/{name}").wait() == 0
    host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
    information = host.api("GET", "/info")
    assert "name=userns" in information["SecurityOptions"]
    assert information["DockerRootDir"] == host.data_root + "/100000.100000"
    limits = {"Ulimits": [{"Name": "nofile", "Soft": 100, "Hard": 200}], "OomScoreAdj": 77}
    identity = host.create("sh", "-c", REMAPPED + "exec sleep " + NEVER, HostConfig={
        **limits, "CapAdd": ["NET_ADMIN"],
        "Devices": [{"PathOnHost": "/dev/full", "PathInContainer": "/dev/mine"}]})
    host.api("POST", f"/containers/{identity}/start")
    wanted = b"0 0 100000 65536 0 0 0 made 3 given 100 77 out own network".split()
    wait_for(lambda: len(demultiplex(host.api(
        "GET", f"/containers/{identity}/logs?stdout=1"))[0].split()) >= len(wanted), "all of the output")
    assert demultiplex(host.api("GET", f"/containers/{identity}/logs?stdout=1"))[0].split() == wanted
    inspected = host.inspect(identity)
    status = read_text(f"/proc/{inspected['State']['Pid']}/status")
    assert re.search(r"Uid:\t100000\t100000\t", status) and re.search(r"Gid:\t100000\t", status)
    made = os.stat(inspected["GraphDriver"]["Data"]["UpperDir"] + "/made")
    assert (made.st_uid, made.st_gid) == (101000, 100000)
    procs = [read_text(path + "/cgroup.procs") for path in host.cgroups() if path.endswith(identity)]
    assert all(str(inspected["State"]["Pid"]) in text.split() for text in procs) and procs
    docker = Docker(docker_clis()[min(docker_clis())], host)
    script = "id -u; stat -c %u /bin/sh; ulimit -n; tty"
    assert docker.run("exec", identity, "sh", "-c", script, status=None).stdout.split() == [
        "0", "0", "100", "not", "a", "tty"]
    seen = docker("exec", "-u", "bob", identity, "sh", "-c", script + "; cat /proc/self/cgroup")
    assert seen.split("\n")[4:] == docker("exec", identity, "cat", "/proc/1/cgroup").split("\n")
    with docker.terminal("exec", "-it", identity, "sh") as terminal:
        terminal.send(b"stat -c %u $(tty); exit\n")
        terminal.expect(rb"\n0\r\n")
    assert host.run("sh", "-c", "id -u; stat -c %u /bin/sh; tty", Tty=True, User="bob") == (
        0, b"1000\r\n0\r\n/dev/pts/0\r\n")
    assert host.run("sh", "-c", "stat -c %u /bin/sh", HostConfig={"UsernsMode": "host"}) == (0, b"100000\n")
    assert host.run("stat", "-c", "%a:%u:%g", "/root", "/new", "/own", HostConfig={
        "Tmpfs": {"/root": "", "/new": "", "/own": "uid=5,mode=700"}}) == (0, b"755:0:0\n1777:0:0\n700:5:0\n")
    secret = tarfile.TarInfo("d")
    secret.type, secret.mode, secret.uid = tarfile.DIRTYPE, 0o700, 70000
    dockerfile = (b"FROM busybox\nCOPY d /copied\n"
                  b"RUN --mount=target=/m ls /m/d /copied; stat -c %u:%g /m/d /copied")
    built = post_build(host, tar_of({"Dockerfile": dockerfile, "d": secret, "d/file": (b"", 0o600)}), {})
    assert "/copied:\\nfile" in built.body.decode() and built.body.decode().count("0:0") == 2, built.body
    for refused, text in (
            ({"Privileged": True}, "privileged mode is incompatible with user namespaces.  You must run the "
             "container in the host namespace when running privileged mode"),
            ({"NetworkMode": "host"},
             "cannot share the host's network namespace when user namespaces are enabled"),
            ({"PidMode": "host"}, "cannot share the host PID namespace when user namespaces are enabled")):
        body: dict[str, Any] = {"Image": "busybox", "HostConfig": refused}
        assert host.api("POST", "/containers/create", body, status=400) == {"message": text}
        body["HostConfig"] = {**refused, "UsernsMode": "host"}
        host.api("POST", "/containers/create", body, status=201)
    host.remove_all()


# The systemd cgroup driver


SCOPE_CALL = (
    b"l\1\0\1\x78\0\0\0\1\0\0\0\xb6\0\0\0"
    b"\1\1o\0\x19\0\0\0/org/freedesktop/systemd1\0" + bytes(6)
    + b"\2\1s\0\x20\0\0\0org.freedesktop.systemd1.Manager\0" + bytes(7)
    + b"\3\1s\0\x12\0\0\0StartTransientUnit\0" + bytes(5)
    + b"\6\1s\0\x18\0\0\0org.freedesktop.systemd1\0" + bytes(7)
    + b"\x08\1g\0\x10ssa(sv)a(sa(sv))\0" + bytes(2)
    + b"\7\0\0\0x.scope\0\4\0\0\0fail\0" + bytes(3)
    + b"\x50\0\0\0\0\0\0\0\4\0\0\0PIDs\0\2au\0" + bytes(3) + b"\4\0\0\0\1\0\0\0"
    + b"\x08\0\0\0Delegate\0\1b\0\1\0\0\0" + bytes(4)
    + b"\x09\0\0\0MemoryMax\0\1t\0" + bytes(7) + b"\5\0\0\0\0\0\0\0" + bytes(8))


def test_a_call_of_systemd_on_the_wire() -> None:
    """The bytes of a call, as systemd 252 took them, and the way back."""
    properties = [("PIDs", ("au", [1])), ("Delegate", ("b", True)), ("MemoryMax", ("t", 5))]
    values = ("x.scope", "fail", properties, ())
    assert dockerd.dbus_call(1, "StartTransientUnit", "ssa(sv)a(sa(sv))", values) == SCOPE_CALL
    body, end = dockerd.dbus_unpack(SCOPE_CALL[-0x78:], "ssa(sv)a(sa(sv))")
    assert body == ["x.scope", "fail", [["PIDs", [1]], ["Delegate", 1], ["MemoryMax", 5]], []] and end == 0x78


@contextlib.contextmanager
def systemd_at(path: str, *answers: bytes) -> Iterator[list[bytes]]:
    """A manager of units on a socket of the test's own, which sends `answers` to the first call; yields what
    it was sent."""
    heard: list[bytes] = []

    def serve() -> None:
        with contextlib.suppress(OSError), listener.accept()[0] as connection:
            heard.append(connection.recv(4096))
            connection.sendall(b"OK 0123\r\n")
            while len(heard) == 1 or not heard[-1].endswith(b"\0"):
                heard.append(connection.recv(4096))
            connection.sendall(b"".join(answers))

    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(path)
        listener.listen()
        thread = threading.Thread(target=serve)
        thread.start()
        yield heard
        thread.join(10)


def from_systemd(kind: int, signature: str, values: Any, *fields: tuple[int, tuple[str, Any]]) -> bytes:
    """A message of systemd's."""
    body = dockerd.dbus_pack(bytearray(), signature, values)
    start = bytearray(struct.pack("<4B2I", ord("l"), kind, 0, 1, len(body), 9))
    head = dockerd.dbus_pack(start, "a(yv)", [[*fields, (8, ("g", signature))]])
    return bytes(head + bytes(-len(head) % 8) + body)


JOB = "/org/freedesktop/systemd1/job/7"


@pytest.mark.parametrize("answer, text", [
    (from_systemd(3, "s", ["Unit x.scope already exists."], (4, ("s", "org.x.UnitExists")), (5, ("u", 1))),
     "systemd refuses StartTransientUnit: Unit x.scope already exists."),
    (from_systemd(2, "o", [JOB], (5, ("u", 1)))
     + from_systemd(4, "uoss", [6, JOB + "0", "y.scope", "done"], (3, ("s", "JobRemoved")))
     + from_systemd(4, "uoss", [7, JOB, "x.scope", "failed"], (3, ("s", "JobRemoved"))),
     "systemd could not start x.scope: failed"),
    (from_systemd(2, "o", [JOB], (5, ("u", 1)))
     + from_systemd(4, "uoss", [7, JOB, "x.scope", "done"], (3, ("s", "JobRemoved"))), ""),
    (b"", "systemd does not answer StartTransientUnit: it has closed the connection"),
])
def test_what_systemd_answers(tmp_path: Path, answer: bytes, text: str) -> None:
    with systemd_at(str(tmp_path / "private"), answer) as heard:
        try:
            with dockerd.Systemd(str(tmp_path / "private")) as systemd:
                job, = systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", "x.scope", "fail", [], ())
                systemd.finish(job)
            assert not text
        except DockerError as error:
            assert str(error) == text
    assert b"".join(heard).startswith(b"\0AUTH EXTERNAL 30\r\nBEGIN\r\nl\1\0\1")


@pytest.mark.parametrize("parent, place", [("system.slice", "/system.slice"), ("-.slice", ""),
                                           ("a-b-c.slice", "/a.slice/a-b.slice/a-b-c.slice")])
def test_slices_lie_in_slices(parent: str, place: str) -> None:
    assert dockerd.SystemdManager.place(parent, "/own") == place


@pytest.mark.parametrize("parent, text", [
    ("", "the cgroup driver systemd cannot be used: systemd does not run on this host"),
    ("/x", 'cgroup-parent for systemd cgroup should be a valid slice named as "xxx.slice"')])
def test_systemd_where_it_does_not_run(parent: str, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd, "systemd_runs", lambda: False)
    with pytest.raises(DockerError) as refused:
        dockerd.cgroup_manager(parent, ["native.cgroupdriver=systemd"])
    assert str(refused.value).startswith(text)
    assert dockerd.cgroup_manager("/x", []).driver == "cgroupfs"


@pytest.mark.booted
def test_containers_are_scopes(new_host: Callable[..., Host], busybox: bytes) -> None:
    """Under systemd, as by default with cgroup v2, also with an OCI runtime: limits are the kernel's and
    systemd's, before and after an update and a reload; a container started again finds its name free, and
    nothing stays of it.  It is not spared by the kernel's killer as the daemon is by its unit."""
    score = Path("/proc/self/oom_score_adj")
    score.write_text("-500")
    host = new_host("--add-runtime", f"other={shutil.which('runc')}", cgroup_parent="")
    score.write_text("0")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    assert host.api("GET", "/info")["CgroupDriver"] == "systemd"
    limits = {"Memory": 64 << 20, "CpuShares": 512, "CpuPeriod": 50000, "CpuQuota": 25000, "PidsLimit": 33}
    for runtime, parent, place in (("", "", "/system.slice"), ("", "t-u.slice", "/t.slice/t-u.slice"),
                                   ("other", "", "/system.slice")):
        identity = host.create("sleep", NEVER, HostConfig={
            **limits, "CgroupParent": parent, "Runtime": runtime})
        host.api("POST", f"/containers/{identity}/start")
        pid = host.inspect(identity)["State"]["Pid"]
        cgroup = read_text(f"/proc/{pid}/cgroup").strip()
        assert cgroup == f"0::{place}/docker-{identity}.scope"
        assert read_text(f"/proc/{pid}/oom_score_adj") == "0\n"
        host.api("POST", f"/containers/{identity}/update", {"Memory": 128 << 20, "MemorySwap": 256 << 20})
        subprocess.run(["systemctl", "daemon-reload"], check=True)
        wanted = {"memory.max": str(128 << 20), "cpu.weight": "20", "cpu.max": "25000 50000",
                  "pids.max": "33"}
        assert {name: read_text(f"/sys/fs/cgroup{cgroup[3:]}/{name}").strip() for name in wanted} == wanted
        show = ["systemctl", "show", f"docker-{identity}.scope"]
        shown = subprocess.run(show, stdout=subprocess.PIPE, text=True)
        assert {f"MemoryMax={128 << 20}", "TasksMax=33", "Delegate=yes", "CPUQuotaPerSecUSec=500ms",
                f"Slice={parent or 'system.slice'}"} <= set(shown.stdout.split("\n"))
        for action in ("restart?t=0", "pause", "unpause", "kill"):
            host.api("POST", f"/containers/{identity}/{action}")
        host.api("DELETE", f"/containers/{identity}?force=1")
        wait_for(functools.partial(lambda path: not os.path.exists(path), f"/sys/fs/cgroup{cgroup[3:]}"))
    units = subprocess.run(["systemctl", "list-units", "--all", "docker-*"], capture_output=True, text=True)
    assert "0 loaded units" in units.stdout


# ------------------------------------------------------------------------------------------------------------
# Conformance with the published specifications
#
# `make conformance SPECS=DIR` walks through each vX.Y.yaml (Swagger 2.0) in DIR: every route that the daemon
# implements is called in that version, and what it answers must have the form that the specification gives.
# Go writes null for an empty list or map and for a missing object, which the specifications do not say.
# ------------------------------------------------------------------------------------------------------------

KINDS: dict[str, Any] = {
    "string": str,
    "integer": int,
    "number": (int, float),
    "boolean": bool,
    "array": list,
    "object": dict,
}

# Docker's own answers differ from its specification here: what dockerd 20.10.24 sends for v1.25 and v1.41.
TOLERATED = re.compile(
    r"(MemorySwappiness|PidsLimit|OomKillDisable|Init|ExitCode|ExecIDs): null for|"
    r"NetworkSettings\.Ports: .* is no array|: BuilderSize is not in|events: (status|id|from|scope) is not in"
)
STRICT_FROM = (1, 41)  # to older clients Docker sends members that came later too


class Specification:
    """One published specification: its version ("1.41") and what it promises."""

    def __init__(self, path: str) -> None:
        import yaml

        with open(path, encoding="utf-8") as file:
            self.document = yaml.load(file, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
        self.version = re.sub(r"^v|\.ya?ml$", "", os.path.basename(path))
        self.strict = tuple(map(int, self.version.split("."))) >= STRICT_FROM

    def operations(self) -> Iterator[tuple[str, str]]:
        """(method, path) of every operation."""
        for path, methods in self.document["paths"].items():
            for method in methods:
                if method != "parameters":
                    yield method.upper(), path

    def schema(self, method: str, path: str, status: int) -> Any:
        """The schema of the body that the operation answers with `status`; None when it has none."""
        operation = self.document["paths"].get(path, {}).get(method.lower())
        if operation is None:
            return None
        responses = {
            int(code): response for code, response in operation["responses"].items() if str(code).isdigit()
        }
        return responses.get(status, {}).get("schema")

    def resolve(self, schema: Any) -> Any:
        """`schema` without references, those of allOf merged into it."""
        merged = dict(schema)
        while "$ref" in merged:
            target = self.document["definitions"][merged.pop("$ref").rpartition("/")[2]]
            merged = {**target, **merged}
        for part in merged.pop("allOf", ()):
            part = self.resolve(part)
            merged = {
                **part,
                **merged,
                "properties": {**part.get("properties", {}), **merged.get("properties", {})},
                "required": [*part.get("required", ()), *merged.get("required", ())],
            }
        if "properties" in merged:
            merged.setdefault("type", "object")
        if isinstance(merged.get("type"), list):  # of a kind and "null"
            merged["type"] = next(kind for kind in merged["type"] if kind != "null")
            merged["x-nullable"] = True
        return merged

    def faults(self, schema: Any, value: Any, where: str = "") -> Iterator[str]:
        """Where and how `value` does not follow `schema`."""
        schema = self.resolve(schema)
        kind = schema.get("type")
        if value is None:
            if kind in ("string", "integer", "number", "boolean") and not schema.get("x-nullable"):
                yield f"{where}: null for a {kind}"
            return
        if kind and (not isinstance(value, KINDS[kind]) or kind != "boolean" and isinstance(value, bool)):
            yield f"{where}: {json.dumps(value)[:60]} is no {kind}"
            return
        if self.strict and "enum" in schema and value not in schema["enum"] and value != "":
            yield f"{where}: {value!r} is none of {schema['enum']}"
        if kind == "array" and "items" in schema:
            for number, item in enumerate(value):
                yield from self.faults(schema["items"], item, f"{where}[{number}]")
        if kind == "object":
            yield from self._members(schema, value, where)

    def _members(self, schema: Any, value: dict[str, Any], where: str) -> Iterator[str]:
        properties, others = schema.get("properties", {}), schema.get("additionalProperties")
        for name in schema.get("required", ()):
            if name not in value:
                yield f"{where}: {name} is missing"
        for name, item in value.items():
            if name in properties:
                yield from self.faults(properties[name], item, f"{where}.{name}")
            elif isinstance(others, dict):
                yield from self.faults(others, item, f"{where}.{name}")
            elif properties and not others and self.strict:
                yield f"{where}: {name} is not in the specification"


Ask = Callable[[str, str, Any], tuple[int, bytes]]


class Walk:
    """Calls the routes of one version: `ask(method, path, body)` gives the status and body of a response.

    `faults` are the places where an answer does not follow the specification, `lacking` the operations that
    the daemon refuses with 501, `checked` those that were compared."""

    def __init__(self, specification: Specification, ask: Ask) -> None:
        self.specification, self._ask = specification, ask
        self.faults: list[str] = []
        self.lacking: list[str] = []
        self.checked: list[str] = []

    def call(
        self, method: str, path: str, query: str = "", body: Any = None, lines: bool = False, **names: str
    ) -> Any:
        """Call an operation, compare its answer, and return that; None where it is refused or unknown."""
        operation = f"v{self.specification.version} {method} {path}"
        if (method, path) not in set(self.specification.operations()):
            return None
        target = f"/v{self.specification.version}{path.format(**names)}{query and '?' + query}"
        status, data = self._ask(method, target, body)
        if status == 501:
            self.lacking.append(operation)
            return None
        if status >= 400:
            self.faults.append(f"{operation}: {status} {data.decode(errors='replace')[:200]}")
            return None
        self.checked.append(operation)
        schema = self.specification.schema(method, path, status)
        values = (
            [json.loads(line) for line in data.splitlines()] if lines else [json.loads(data)] if data else []
        )
        if schema and schema.get("type") not in ("string", "file"):
            found = (
                f"{operation}{fault}"
                for value in values
                for fault in self.specification.faults(schema, value)
            )
            self.faults += [fault for fault in found if not TOLERATED.search(fault)]
        return values[0] if values and not lines else values

    def everything(self, image: str) -> None:
        """Call each operation that shows something, with a container of `image` (which has sleep) to show."""
        for path in ("/info", "/version", "/system/df", "/volumes", "/networks", "/plugins"):
            self.call("GET", path)
        self.call("GET", "/images/json", "all=1")
        self.call("GET", "/images/{name}/json", name=image)
        self.call("GET", "/images/{name}/history", name=image)
        created = self.call(
            "POST",
            "/containers/create",
            body={
                "Image": image,
                "Cmd": ["sleep", "60"],
                "Labels": {"a": "b"},
                "HostConfig": {"NetworkMode": "none", "Memory": 64 << 20, "CapAdd": ["SYS_TIME"]},
            },
        )
        if created:
            try:
                self._container(created["Id"])
            finally:
                self._ask(
                    "DELETE", f"/v{self.specification.version}/containers/{created['Id']}?force=1", None
                )
        self.call("GET", "/events", f"since=1&until={int(time.time())}", lines=True)

    def _container(self, identity: str) -> None:
        """Call what shows one container in each of its states."""
        self.call("POST", "/containers/{id}/start", id=identity)
        for running in (True, False):
            self.call("GET", "/containers/json", "all=1&size=1")
            self.call("GET", "/containers/{id}/json", "size=1", id=identity)
            self.call("GET", "/containers/{id}/changes", id=identity)
            if running:
                self.call("GET", "/containers/{id}/top", id=identity)
                self.call("GET", "/containers/{id}/stats", "stream=0&one-shot=1", id=identity)
                self._exec(identity)
                self.call("POST", "/containers/{id}/kill", id=identity)
                self.call("POST", "/containers/{id}/wait", id=identity)

    def _exec(self, identity: str) -> None:
        """Call what shows an exec instance."""
        made = self.call("POST", "/containers/{id}/exec", body={"Cmd": ["true"]}, id=identity)
        if made:
            self.call("POST", "/exec/{id}/start", body={"Detach": True}, id=made["Id"])
            self.call("GET", "/exec/{id}/json", id=made["Id"])


def specifications() -> list[Specification]:
    """Those in the folder that DOCKERD_SPECS names."""
    folder = os.environ["DOCKERD_SPECS"]
    names = [name for name in sorted(os.listdir(folder)) if re.fullmatch(r"v1\.\d+\.ya?ml", name)]
    assert names, f"{folder} has no vX.Y.yaml"
    return [Specification(os.path.join(folder, name)) for name in names]


@pytest.mark.conformance
def test_every_operation_of_the_specifications_has_a_route() -> None:
    for specification in specifications():
        lacking = [
            operation for operation in specification.operations() if not dockerd.find_route(*operation)
        ]
        assert not lacking, (specification.version, lacking)


@pytest.mark.conformance
def test_responses_follow_the_specifications(host: Host) -> None:
    def ask(method: str, path: str, body: Any) -> tuple[int, bytes]:
        answer = host.http(method, path, body)
        return answer.status, answer.body

    faults = []
    for specification in specifications():
        walk = Walk(specification, ask)
        walk.everything("busybox")
        print(f"v{walk.specification.version}: {len(walk.checked)} checked, lacking: {walk.lacking}")
        faults += walk.faults
    assert not faults, "\n".join(faults)


# ------------------------------------------------------------------------------------------------------------
# Network driver
# ------------------------------------------------------------------------------------------------------------

OUTSIDE = "10.99.0.254"   # a neighbour of the host's, which routes to the containers' networks by the host
HOST_ADDRESS = "10.99.0.1"


def dns_question(name: str, kind: int = dockerd.DNS_A, number: int = 7) -> bytes:
    """A DNS question as a stub resolver sends it."""
    head = struct.pack(">HHHHHH", number, 0x0100, 1, 0, 0, 0)
    return head + dockerd.dns_name(name) + struct.pack(">HH", kind, 1)


class NameServer:
    """A name server of the world at the address of a network namespace, by UDP and TCP: it refuses
    refused.test, leaves silent.test without an answer, has 40 addresses of big.test, which it tells by TCP
    alone, and the one of known.test; false answers come before that of spoofed.test.  `asked` are the names
    that it was asked for, `ports` those from which, by UDP."""

    def __init__(self, namespace: int, address: str) -> None:
        def bind() -> list[socket.socket]:
            sockets = [socket.socket(type=kind) for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM)]
            sockets[1].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            for each in sockets:
                each.bind((address, 53))
            sockets[1].listen()
            return [*sockets, socket.socket(type=socket.SOCK_DGRAM)]

        self.sockets = dockerd.in_network(namespace, bind)
        self.asked: list[str] = []
        self.ports: list[int] = []
        for serve in (self._serve_udp, self._serve_tcp):
            threading.Thread(target=serve, daemon=True).start()

    def _answer(self, message: bytes, tcp: bool) -> bytes:
        query = dockerd.parse_query(message)
        self.asked.append(query.name)
        if query.name == "big.test" and not tcp:
            cut = dockerd.dns_answer(query)
            return cut[:2] + bytes([cut[2] | 2]) + cut[3:]
        count = {"big.test": 40, "known.test": 1, "spoofed.test": 1}.get(query.name, 0)
        code = 0 if count else 5 if query.name == "refused.test" else 3
        return dockerd.dns_answer(query, [bytes([192, 0, 2, last]) for last in range(count)], code)

    def _serve_udp(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                message, client = self.sockets[0].recvfrom(4096)
                query = dockerd.parse_query(message)
                self.ports.append(client[1])
                if b"spoofed" in message:
                    false = dockerd.dns_answer(query, [bytes(4)] * 2)
                    self.sockets[2].sendto(false, client)
                    for data in (bytes([false[0] ^ 1]) + false[1:], false.replace(b"spoofed", b"another"),
                                 message, false[:11]):
                        self.sockets[0].sendto(data, client)
                if b"silent" not in message:
                    self.sockets[0].sendto(self._answer(message, False), client)

    def _serve_tcp(self) -> None:
        with contextlib.suppress(OSError, ValueError):
            while True:
                with self.sockets[1].accept()[0] as client, client.makefile("rb") as file:
                    answer = self._answer(dockerd._read_framed(file), True)
                    client.sendall(struct.pack(">H", len(answer)) + answer)

    def close(self) -> None:
        """End it."""
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)
            each.close()


class Networked:
    """A host with a network beside loopback and a neighbour in it, which is its name server, and a CLI."""

    def __init__(self, *options: str) -> None:
        self.host = Host("-D", *options)
        self.neighbour = subprocess.Popen(
            ["unshare", "-n", "sh", "-c", HOLDER], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self.neighbour.stdout and self.neighbour.stdout.read(6) == b"ready\n"
        pid = self.neighbour.pid
        self.shell(f"ip link add up0 type veth peer name up1 netns {pid} && ip addr add {HOST_ADDRESS}/24 "
                   "dev up0 && "
                   f"ip link set up0 up && ip route add default via {OUTSIDE}")
        subprocess.run(["nsenter", "-t", str(pid), "-n", "sh", "-c", f"ip addr add {OUTSIDE}/24 dev up1 && "
                                                                     "ip link set "
                        f"up1 up && ip route add 172.16.0.0/12 via {HOST_ADDRESS}"], check=True)
        with open(f"/proc/{pid}/ns/net") as namespace:
            self.server = NameServer(namespace.fileno(), OUTSIDE)
        self.shell(f"printf 'nameserver nonsense\\nnameserver {OUTSIDE}\\n' > resolv.conf && mount --bind "
                   "resolv.conf /etc/resolv.conf")
        self.docker = Docker(docker_clis()[max(docker_clis())], self.host)

    def socket_in(self, name: str, kind: int) -> socket.socket:
        """A socket that a process in the container would have."""
        with open(f"/proc/{self.docker('inspect', '-f', '{{.State.Pid}}', name)}/ns/net") as namespace:
            found = dockerd.in_network(namespace.fileno(), lambda: socket.socket(type=kind))
        found.settimeout(15)
        return found

    def ask(self, name: str, question: str, kind: int = dockerd.DNS_A, tcp: bool = False) -> bytes:
        """The resolver's answer to a container's question."""
        message = dns_question(question, kind)
        with self.socket_in(name, socket.SOCK_STREAM if tcp else socket.SOCK_DGRAM) as sock:
            sock.connect((dockerd.RESOLVER_ADDRESS, 53))
            if not tcp:
                sock.send(message)
                return sock.recv(4096)
            sock.sendall(struct.pack(">H", len(message)) + message)
            with sock.makefile("rb") as file:
                return dockerd._read_framed(file)

    def shell(self, command: str, check: bool = True) -> str:
        """What a shell command prints in the host's namespaces."""
        process = self.host.enter("sh", "-c", command, stdout=subprocess.PIPE, text=True)
        output = process.communicate(timeout=60)[0]
        assert not check or process.returncode == 0, (command, output)
        return str(output)

    def from_outside(self, command: str) -> str:
        """What a shell command prints at the neighbour."""
        return subprocess.run(["nsenter", "-t", str(self.neighbour.pid), "-n", "sh", "-c", command],
                              stdout=subprocess.PIPE, text=True, check=False, timeout=60).stdout

    def seen_outside(self, container: str) -> str:
        """The address under which the neighbour sees a container that connects to it."""
        with open(f"/proc/{self.neighbour.pid}/ns/net") as namespace:
            listener = dockerd.in_network(namespace.fileno(), socket.create_server, (OUTSIDE, 9998))
        with listener:
            self.docker("exec", "-d", container, "nc", OUTSIDE, "9998")
            listener.settimeout(20 * PATIENCE)
            client, address = listener.accept()
            client.close()
            return str(address[0])

    def state(self) -> list[str]:
        """What containers might leave: links but for bridges, rules, listening sockets."""
        links = [line for line in self.shell("ip -o link").splitlines() if "veth" in line
                 or "macvlan" in line]
        rules = [line for line in self.shell("iptables-save; nft list table ip dockerd "
                                             "2>/dev/null", False).splitlines()
                 if "DNAT" in line or "/32" in line or "elements" in line]
        return links + rules + self.shell("ss -Hlntu").split("\n")

    def start(self, busybox: bytes) -> None:
        """Start the daemon, with the image busybox."""
        self.host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        self.idle = self.state()

    def await_idle(self) -> None:
        """Wait until all is as it was before the first container, nothing more and nothing less."""
        wait_for(lambda: self.state() == self.idle, "what containers have left")

    def close(self) -> None:
        """Stop everything."""
        self.host.remove_all()
        self.shell("umount /etc/resolv.conf")
        self.host.close()
        self.server.close()
        for stream in (self.neighbour.stdin, self.neighbour.stdout):
            assert stream is not None
            stream.close()
        self.neighbour.wait(10)


BACKENDS = {"iptables": ("--firewall-backend=iptables",), "nftables": ("--firewall-backend=nftables",),
            "none": ("--iptables=false",)}
IPTABLES = "nft" if sys.version_info >= (3, 12) else "legacy"   # one with the newest, one with the oldest
SERVE = ("busybox", "nc", "-ll", "-p", "80", "-e", "cat", "/etc/hostname")
FETCH = f"{PEER}/bin/busybox nc -w 2 {{}} {{}} < /dev/null"


def iptables_path(variant: str, directory: str) -> str:
    """Fill the directory with the PATH's programs, and of iptables' with those of a variant: legacy, nft, or
    "" for none at all; a PATH with these alone."""
    os.makedirs(directory)
    for program in itertools.chain.from_iterable(map(os.scandir, filter(os.path.isdir, PATH.split(":")))):
        if not re.match("ip6?tables|xtables", program.name):
            with contextlib.suppress(FileExistsError):
                os.symlink(program.path, os.path.join(directory, program.name))
    for family, kind in itertools.product(("iptables", "ip6tables"), ("", "-save", "-restore")):
        if variant:
            os.symlink(f"/usr/sbin/xtables-{variant}-multi", os.path.join(directory, family + kind))
    return directory


def backend_of(networked: Networked) -> str:
    """The firewall back end of a networked host."""
    return str(networked.host.api("GET", "/info")["FirewallBackend"]["Driver"])


@pytest.fixture(scope="module", params=sorted(BACKENDS))
def networked(request: pytest.FixtureRequest, busybox: bytes) -> Iterator[Networked]:
    """A networked host with each firewall back end; nftables is what it chooses where no iptables is."""
    made = Networked(*BACKENDS[request.param] if request.param != "nftables" else ())
    variant = "" if request.param == "nftables" else IPTABLES
    made.host.environment["PATH"] = iptables_path(variant, made.host.path("programs"))
    try:
        made.start(busybox)
        assert backend_of(made) == request.param
        yield made
    finally:
        made.close()


def test_a_published_port_is_reached_from_everywhere(networked: Networked) -> None:
    """From the host's loopback and its other address, from a neighbour, from the container itself and from
    one on another network; the neighbour reaches no other port and not the container's own address."""
    docker = networked.docker
    docker("network", "create", "other")
    docker("run", "-d", "--name", "web", "--hostname", "web", "-p", "8080:80", "-p", "127.0.0.1:8081:80",
           "-p", "0.0.0.0:8082:80", "-p", "[::]:8082:81", *SERVE)
    docker("run", "-d", "--name", "user", "--net", "other", "busybox", "sleep", NEVER)
    own = docker("inspect", "-f", "{{.NetworkSettings.IPAddress}}", "web")
    assert docker("ps", "--format", "{{.Ports}}", "-f", "name=web") == (
        "0.0.0.0:8080->80/tcp, 0.0.0.0:8082->80/tcp, 127.0.0.1:8081->80/tcp, [::]:8080->80/tcp, "
        "[::]:8082->81/tcp")
    for version, listed in (("v1.27", ["user"]), ("v1.28", [])):  # since then only inspect has containers
        other = next(network for network in networked.host.http("GET", f"/{version}/networks").json
                     if network["Name"] == "other")
        assert [container["Name"] for container in other["Containers"].values()] == listed
    assert networked.shell(FETCH.format("127.0.0.1", 8080)) == "web\n"
    assert networked.shell(FETCH.format("127.0.0.1", 8081)) == "web\n"
    assert networked.shell(FETCH.format("::1", 8080)) == "web\n"
    assert networked.shell(FETCH.format(HOST_ADDRESS, 8080)) == "web\n"
    assert networked.from_outside(FETCH.format(HOST_ADDRESS, 8080)) == "web\n"
    for name in ("web", "user"):
        fetch = f"nc -w 2 {HOST_ADDRESS} 8080 < /dev/null"
        assert docker("exec", name, "sh", "-c", fetch) == "web"
    assert networked.from_outside(FETCH.format(HOST_ADDRESS, 8081)) == ""
    if backend_of(networked) != "none":
        assert networked.from_outside(FETCH.format(own, 80)) == ""
        assert docker("exec", "user", "sh", "-c", f"nc -w 1 {own} 80 < /dev/null", status=None) == ""
    docker("rm", "-f", "web", "user")
    docker("network", "rm", "other")
    networked.await_idle()


def test_gateway_modes(networked: Networked) -> None:
    """nat-unprotected: a neighbour reaches what is not published, other networks do not; isolated: the host
    has no part in the network."""
    docker, option = networked.docker, "com.docker.network.bridge.gateway_mode_ipv4="
    docker("network", "create", "-o", option + "nat-unprotected", "open")
    docker("network", "create", "--internal", "-o", option + "isolated", "shut")
    docker("network", "create", "other")
    docker("run", "-d", "--name", "web", "--hostname", "web", "--net", "open", *SERVE)
    docker("network", "connect", "shut", "web")
    docker("run", "-d", "--name", "user", "--net", "other", "busybox", "sleep", NEVER)
    own, inner = (docker("inspect", "-f", f"{{{{.NetworkSettings.Networks.{name}.IPAddress}}}}", "web")
                  for name in ("open", "shut"))
    assert networked.from_outside(FETCH.format(own, 80)) == "web\n"
    if backend_of(networked) != "none":
        assert docker("exec", "user", "sh", "-c", f"nc -w 1 {own} 80 < /dev/null", status=None) == ""
    fetch = f"nc -w 2 {inner} 80 < /dev/null"
    assert docker("run", "--rm", "--net", "shut", "busybox", "sh", "-c", fetch) == "web"
    bridge = "br-" + docker("network", "inspect", "-f", "{{.Id}}", "shut")[:12]
    assert "inet " not in networked.shell(f"ip addr show {bridge}")
    docker("rm", "-f", "web", "user")
    docker("network", "rm", "open", "shut", "other")
    networked.await_idle()


def test_how_a_network_goes_out(networked: Networked) -> None:
    """Under the host's address that an option names, by links of the name that another one begins."""
    docker, option = networked.docker, "com.docker.network."
    networked.shell("ip addr add 10.99.0.77/24 dev up0")
    docker("network", "create", "-o", option + "host_ipv4=10.99.0.77",
           "-o", option + "container_iface_prefix=lan", "out")
    docker("run", "-d", "--name", "one", "--net", "out", "busybox", "sleep", NEVER)
    docker("network", "connect", "bridge", "one")
    assert re.findall(r": (\w+\d)@", docker("exec", "one", "ip", "link")) == ["lan0", "eth0"]
    docker("network", "disconnect", "bridge", "one")
    assert (networked.seen_outside("one") == "10.99.0.77") == (backend_of(networked) != "none")
    docker("rm", "-f", "one")
    docker("network", "rm", "out")
    networked.shell("ip addr del 10.99.0.77/24 dev up0")
    networked.await_idle()


def test_a_network_that_is_routed_to(networked: Networked) -> None:
    """Others reach the published ports of a container, and no port of the host's, from outside and from other
    networks; the container goes out under its own address.  A port of the host's is taken as soon as the
    container's way to the world needs one, and what it shows is as Docker 28 has it."""
    docker, option = networked.docker, "com.docker.network.bridge.gateway_mode_ipv"
    docker("network", "create", "--ipv6", "-o", option + "4=routed", "-o", option + "6=routed", "wide")
    docker("network", "create", "--ipv6", "-o", option + "6=routed", "mixed")
    docker("network", "create", "--internal", "in")
    for name, network in ("web", "wide"), ("twin", "wide"), ("half", "mixed"), ("shut", "in"):
        port = "127.0.0.1:8083:80" if name == "shut" else "8080:80"
        docker("run", "-d", "--name", name, "--hostname", name, "--net", network, "-p", port, *SERVE)
    docker("run", "-d", "--name", "user", "busybox", "sleep", NEVER)
    docker("exec", "-d", "web", "nc", "-ll", "-p", "81", "-e", "hostname")

    def ports(name: str) -> list[tuple[str, str]]:
        listed = networked.host.api("GET", f"/containers/{name}/json")["NetworkSettings"]["Ports"]["80/tcp"]
        return [(place["HostIp"], place["HostPort"]) for place in listed or []]

    own = docker("inspect", "-f", "{{.NetworkSettings.Networks.wide.IPAddress}}", "web")
    assert ports("web") == ports("twin") == [("0.0.0.0", ""), ("::", "")]
    assert ports("half") == [("0.0.0.0", "8080"), ("::", "")] and ports("shut") == []
    listed = {container["Names"][0]: container["Ports"]
              for container in networked.host.api("GET", "/containers/json")}
    assert listed["/web"] == [{"IP": place, "PrivatePort": 80, "Type": "tcp"} for place in ("0.0.0.0", "::")]
    assert networked.shell(FETCH.format("127.0.0.1", 8080)) == "half\n"
    assert networked.from_outside(FETCH.format(own, 80)) == "web\n"
    assert " 0% packet loss" in networked.from_outside(f"{PEER}/bin/busybox ping -c 1 -W 2 {own}")
    assert docker("exec", "user", "sh", "-c", f"nc -w 2 {own} 80 < /dev/null") == "web"
    if backend_of(networked) != "none":
        assert networked.from_outside(FETCH.format(own, 81)) == ""
        assert docker("exec", "user", "sh", "-c", f"nc -w 1 {own} 81 < /dev/null", status=None) == ""
    assert networked.seen_outside("web") == own
    networked.host.api("POST", "/networks/bridge/connect", {"Container": "shut"})
    assert ports("shut") == [("127.0.0.1", "8083")]
    assert networked.shell(FETCH.format("127.0.0.1", 8083)) == "shut\n"
    docker("network", "disconnect", "bridge", "shut")
    assert ports("shut") == []
    docker("run", "--rm", "-p", "8083:80", "busybox", "true")
    prefer = {"Container": "web", "EndpointConfig": {"GwPriority": 1}}
    taken = networked.host.http("POST", "/networks/bridge/connect", prefer).json["message"]
    assert "port is already allocated" in taken and ports("web") == ports("twin")
    docker("rm", "-f", "half")
    networked.host.api("POST", "/networks/bridge/connect", prefer)
    assert ports("web") == [("0.0.0.0", "8080"), ("::", "")]
    assert networked.from_outside(FETCH.format(HOST_ADDRESS, 8080)) == "web\n"
    docker("network", "disconnect", "bridge", "web")
    assert ports("web") == [("0.0.0.0", ""), ("::", "")]
    assert networked.from_outside(FETCH.format(HOST_ADDRESS, 8080)) == ""
    assert networked.from_outside(FETCH.format(own, 80)) == "web\n"
    docker("rm", "-f", "web", "twin", "shut", "user")
    docker("network", "rm", "wide", "mixed", "in")
    networked.await_idle()


ECHO = ("import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.bind(('', 53)); print(flush=True)\n"
        "while True: s.sendto(*s.recvfrom(100))")
ASK = ("import socket; s = socket.socket(type=socket.SOCK_DGRAM); s.settimeout(5); "
       "s.sendto(b'hello', ('{}', 5353)); print(s.recv(100).decode())")


def test_udp_through_a_published_port(networked: Networked) -> None:
    """Datagrams go both ways, by loopback through the proxy and by the neighbour through the kernel, also to
    the next container that has the port, from a client that the kernel knows."""
    docker = networked.docker
    known = ASK.replace("s.settimeout", "s.bind(('', 4444)); s.settimeout")
    for name, ports in ("one", ()), ("two", ("-p", "5354:54/udp")), ("three", ("-p", "5354:54/udp")):
        docker("run", "-d", "--name", name, "-p", "5353:53/udp", *ports, "busybox", "sleep", NEVER)
        pid = docker("inspect", "-f", "{{.State.Pid}}", name)
        server = subprocess.Popen(["nsenter", "-t", pid, "-n", sys.executable, "-c", ECHO],
                                  stdout=subprocess.PIPE)
        try:
            assert server.stdout and server.stdout.readline()
            for place in ("127.0.0.1", HOST_ADDRESS) if name == "one" else ():
                assert networked.shell(f'{sys.executable} -c "{ASK.format(place)}"') == "hello\n"
            assert networked.from_outside(f'{sys.executable} -c "{known.format(HOST_ADDRESS)}"') == "hello\n"
        finally:
            server.kill()
            server.communicate()
        docker("rm", "-f", name)
        docker("run", "-d", "--name", "not" + name, "busybox", "sleep", NEVER)  # has its address now
    docker("rm", "-f", "notone", "nottwo", "notthree")


def test_user_networks_resolve_and_are_apart(networked: Networked) -> None:
    """Names, aliases and addresses resolve on a common network alone, before and after it is left; the
    container's own port 53 is free."""
    docker = networked.docker
    for name in ("left", "right"):
        docker("network", "create", name)
    docker("run", "-d", "--name", "one", "--net", "left", "--net-alias", "uno", "busybox", "sleep", NEVER)
    docker("run", "-d", "--name", "two", "--net", "left", "--link-local-ip", "169.254.7.8", "--link-local-ip",
           "fe80::77", "busybox", "sleep", NEVER)
    docker("run", "-d", "--name", "three", "--net", "right", "--cap-add=NET_ADMIN", "busybox", "sleep", NEVER)
    address = docker("inspect", "-f", "{{.NetworkSettings.Networks.left.IPAddress}}", "one")
    for name in ("one", "uno", "one.left", "ONE"):
        assert address in docker("exec", "two", "nslookup", "-type=a", name)
    assert "one.left" in docker("exec", "two", "nslookup", address)
    assert docker("exec", "two", "ping", "-c", "1", "-W", "2", "one")
    assert address not in docker("exec", "three", "nslookup", "-type=a", "one", status=None)
    if backend_of(networked) != "none":
        docker("exec", "three", "ping", "-c", "1", "-W", "1", address, status=1)
    place = {"IPAMConfig": {"LinkLocalIPs": ["169.254.7.9"]}, "MacAddress": "0242.0000.aBcD"}
    networked.host.api("POST", "/networks/left/connect", {"Container": "three", "EndpointConfig": place})
    assert address in docker("exec", "three", "nslookup", "-type=a", "one")
    assert docker("exec", "three", "ping", "-c", "1", "-W", "2", "-I", "eth1", "169.254.7.8")
    assert "fe80::77/64" in docker("exec", "two", "ip", "address")
    shown = docker("exec", "three", "ip", "address", "show", "eth1")
    assert "inet6" not in shown and " 02:42:00:00:ab:cd " in shown
    docker("network", "disconnect", "left", "three")
    assert address not in docker("exec", "three", "nslookup", "-type=a", "one", status=None)
    docker("exec", "-d", "two", "nc", "-l", "-p", "53")
    wait_for(lambda: ":53 " in docker("exec", "two", "netstat", "-lnt"), "the container's own port 53")
    docker("network", "connect", "left", "three")
    docker("exec", "three", "ip", "link", "del", "eth1")  # by which its way to the world would lead
    docker("network", "disconnect", "right", "three")
    assert networked.host.api("GET", "/networks/right")["Containers"] == {}
    docker("rm", "-f", "one", "two", "three")
    docker("network", "rm", "left", "right")


def dns_facts(answer: bytes) -> tuple[int, bool, int]:
    """(code, whether it is cut off, how many records) of an answer."""
    return answer[3] & 15, bool(answer[2] & 2), struct.unpack_from(">H", answer, 6)[0]


def test_other_names_come_from_the_hosts_servers(networked: Networked) -> None:
    """By UDP and TCP, cut off as they come; a server that refuses is followed by the next.  Who has no way to
    the world is answered at once, and nobody is asked for it; who asks much holds up nobody else.  Each
    question has a port of its own, and none but its answer is taken (RFC 5452)."""
    docker, ask, asked = networked.docker, networked.ask, networked.server.asked
    docker("network", "create", "out")
    docker("network", "create", "--internal", "in")
    asked.clear()
    own = ["--dns", "10.99.0.253", "--dns", OUTSIDE]
    networked.shell("ip addr add 10.99.0.253/24 dev up0")  # nobody listens there
    docker("run", "-d", "--name", "one", "--net", "out", "busybox", "sleep", NEVER)
    docker("run", "-d", "--name", "two", "--net", "out", *own, "busybox", "sleep", NEVER)
    docker("run", "-d", "--name", "shut", "--net", "in", "busybox", "sleep", NEVER)
    assert dns_facts(ask("two", "known.test")) == (0, False, 1)
    assert dns_facts(ask("two", "big.test", tcp=True)) == (0, False, 40)
    assert dns_facts(ask("one", "big.test")) == (0, True, 0)
    assert dns_facts(ask("one", "big.test", tcp=True)) == (0, False, 40)
    assert dns_facts(ask("one", "refused.test"))[0] == 5
    assert dns_facts(ask("two", "one", tcp=True)) == dns_facts(ask("one", "two")) == (0, False, 1)
    assert dns_facts(ask("two", "one", dockerd.DNS_AAAA)) == (0, False, 0)
    assert set(asked) == {"known.test", "big.test", "refused.test"}
    for name in ("one", "two"):
        networked.server.ports.clear()
        assert {dns_facts(ask(name, "spoofed.test")) for _ in range(8)} == {(0, False, 1)}
        assert len(set(networked.server.ports)) > 5, networked.server.ports
    asked.clear()
    for tcp in (False, True):
        assert dns_facts(ask("shut", "known.test", tcp=tcp))[0] == dockerd.DNS_SERVFAIL
    assert not asked
    with networked.socket_in("two", socket.SOCK_DGRAM) as flood:
        flood.connect((dockerd.RESOLVER_ADDRESS, 53))
        for number in range(3000):
            flood.send(dns_question("silent.test", number=number))
            flood.send(random.Random(number).randbytes(number % 600))
        assert dns_facts(ask("one", "known.test")) == (0, False, 1)
    docker("network", "connect", "out", "shut")
    assert dns_facts(ask("shut", "known.test")) == (0, False, 1)
    docker("rm", "-f", "one", "two", "shut")
    docker("network", "rm", "in", "out")
    networked.shell("ip addr del 10.99.0.253/24 dev up0")


def test_dns_messages() -> None:
    """What is no question is refused as such, whatever it is; answers that are too long for a datagram are
    cut off; names keep their labels short."""
    whole = dns_question("Web.Example.com", 28)
    query = dockerd.parse_query(whole + b"more")
    assert (query.name, query.kind, query.end) == ("web.example.com", 28, len(whole))
    answer = dockerd.dns_answer(query, [bytes([10, 0, 0, 2])])
    assert answer[:12] == struct.pack(">HHHHHH", 7, 0x8180, 1, 1, 0, 0) and answer.endswith(b"\n\0\0\2")
    generator = random.Random(1)
    for _ in range(20000):
        data = bytearray(whole)
        for _ in range(generator.randrange(1, 6)):
            data[generator.randrange(len(data))] = generator.randrange(256)
        with contextlib.suppress(ValueError):
            dockerd.parse_query(bytes(data[:generator.randrange(len(data) + 1)]))
    for bad in (b"", whole[:-1], answer, whole[:12] + b"\xff" * 20, whole[:4] + b"\0\2" + whole[6:],
                whole[:2] + b"\x80" + whole[3:], whole[:12] + b"\xc0\x0c" + whole[14:]):
        with pytest.raises(ValueError):
            dockerd.parse_query(bad)
    many = dockerd.dns_answer(query, [bytes(16)] * 40)
    assert dns_facts(dockerd._cut(query, many)) == (0, True, 0)
    assert dns_facts(dockerd._cut(query, many[:512])) == (0, False, 40)
    assert dockerd.dns_name("a" * 300 + "..b") == b"\x3f" + b"a" * 63 + b"\1b\0"


def test_the_resolver_outlives_what_one_question_meets() -> None:
    """An error that nobody has thought of costs that answer alone."""
    answers: list[Any] = [[bytes(4)], RuntimeError("changed size"), [bytes(4)] * 9000]

    def lookup(name: str, kind: int) -> list[bytes]:
        if isinstance(answers[-1], Exception):
            raise answers.pop()
        return answers.pop()

    sockets = [socket.socket(type=socket.SOCK_DGRAM), socket.socket(), socket.socket(type=socket.SOCK_DGRAM)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    sockets[1].listen()
    seat, resolver = dockerd.ResolverSeat(lookup, list, sockets), dockerd.Resolver()
    resolver.add(seat)
    resolver.begin()
    question = dns_question("a")
    with socket.create_connection(sockets[1].getsockname()) as client, client.makefile("rb") as file:
        client.sendall(struct.pack(">H", len(question)) + question)
        assert dns_facts(dockerd._read_framed(file)) == (0, False, 200)
    with socket.socket(type=socket.SOCK_DGRAM) as client:
        client.settimeout(10)
        client.connect(sockets[0].getsockname())
        client.send(question)
        client.send(question)
        assert dns_facts(client.recv(512)) == (0, False, 1)
    resolver.remove(seat)


def test_the_proxy_neither_spins_nor_leaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that has ended its stream and is reset is not waited for; without descriptors for its pipes a
    connection leaves nothing."""
    places = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
    with socket.socket(socket.AF_UNIX) as control, places[0] as server, places[1] as listener:
        control.bind("")
        control.listen()
        proxy = dockerd.Proxy(control)
        port = dockerd.ProxyPort(proxy, listener, {"target": "127.0.0.1",
                                                   "target_port": server.getsockname()[1]})

        def turn() -> int:
            events = [event for event in proxy.poll.poll(0.02) if event[0] in proxy.handlers]
            for fd, mask in events:
                proxy.handlers[fd](mask)
            return len(events)

        client = socket.create_connection(listener.getsockname())
        client.sendall(b"x")
        client.shutdown(socket.SHUT_WR)
        while turn():
            pass
        ours, _ = server.accept()
        assert ours.recv(2) == b"x" and ours.recv(2) == b""
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        client.close()
        wait_for(lambda: not turn(), "the proxy to be at rest")
        assert len(port.connections) == 1
        ours.close()
        wait_for(lambda: turn() == 0 and not port.connections, "the end of the connection")
        held, pipe, calls = len(os.listdir("/proc/self/fd")), os.pipe2, itertools.count()

        def scarce(flags: int) -> tuple[int, int]:
            if next(calls):
                raise OSError(errno.EMFILE, "Too many open files")
            return pipe(flags)

        monkeypatch.setattr(os, "pipe2", scarce)
        with socket.create_connection(listener.getsockname()) as client:
            turn()
            assert client.recv(1) == b"" and not port.connections
        server.accept()[0].close()
        assert next(calls) == 2 and len(os.listdir("/proc/self/fd")) == held
        port.close()


def test_the_proxy_leads_datagrams_to_where_the_container_is_now() -> None:
    """A client that goes on sending does not stay with the address of before, which is another's by now."""
    places = [socket.socket(type=socket.SOCK_DGRAM) for _ in range(3)]
    with socket.socket(socket.AF_UNIX) as control, contextlib.ExitStack() as held:
        control.bind("")
        control.listen()
        for each in places:
            held.enter_context(each).bind(("127.0.0.1", 0))
            each.settimeout(10)
        listener, *servers = places
        proxy, copy = dockerd.Proxy(control), listener.dup().detach()
        for server, fds in zip(servers, ({"listener": copy}, {})):
            place = {"target": "127.0.0.1", "target_port": server.getsockname()[1]}
            proxy.op_publish({"key": "a", "place": place}, fds, {})
            control_port = proxy.ports["a"]
            servers[0].sendto(b"hello", listener.getsockname())
            control_port.receive(0)
            assert server.recv(10) == b"hello"
        assert len(control_port.flows) == 1
        control_port.close()


def test_what_a_daemon_leaves_it_finds_again(busybox: bytes) -> None:
    """A crash with live restore: the log tells where it was; ports, names and addresses serve on; what is
    gone is given back."""
    networked = Networked("--live-restore")
    docker, host = networked.docker, networked.host
    try:
        networked.start(busybox)
        docker("network", "create", "mine")
        docker("run", "-d", "--name", "web", "--hostname", "web", "--net", "mine", "-p", "8080:80", *SERVE)
        docker("run", "-d", "--name", "user", "--net", "mine", "busybox", "sleep", NEVER)
        docker("network", "create", "-o", "com.docker.network.bridge.gateway_mode_ipv4=routed", "wide")
        docker("run", "-d", "--name", "wide", "--hostname", "wide", "--net", "wide", "-p", "0.0.0.0:8080:80",
               *SERVE)
        shown, own = (docker("inspect", "-f", "{{.NetworkSettings." + what + "}}", "wide")
                      for what in ("Ports", "Networks.wide.IPAddress"))
        question = networked.socket_in("user", socket.SOCK_DGRAM)
        assert host.stop(signal.SIGSEGV) == -signal.SIGSEGV
        assert re.search("Segmentation fault.*most recent call first.*in serve", host.log(), re.DOTALL)
        assert networked.shell(FETCH.format("127.0.0.1", 8080)) == "web\n"
        assert networked.from_outside(FETCH.format(HOST_ADDRESS, 8080)) == "web\n"
        question.sendto(dns_question("web"), (dockerd.RESOLVER_ADDRESS, 53))
        host.start()
        with question:
            assert dns_facts(question.recv(4096)) == (0, False, 1)
        assert dns_facts(networked.ask("user", "web", tcp=True)) == (0, False, 1)
        for reach in (networked.shell, networked.from_outside):
            assert reach(FETCH.format(HOST_ADDRESS, 8080)) == "web\n"
        assert networked.from_outside(FETCH.format(own, 80)) == "wide\n"
        assert docker("inspect", "-f", "{{.NetworkSettings.Ports}}", "wide") == shown
        assert shown == "map[80/tcp:[{0.0.0.0 }]]"
        assert docker("exec", "user", "ping", "-c", "1", "-W", "2", "web")
        assert "already allocated" in docker.run("run", "-p", "8080:80", "busybox", "true", status=125).stderr
        third = docker("run", "-d", "--net", "mine", "busybox", "sleep", NEVER)
        taken = [each["IPv4Address"] for each in host.api("GET", "/networks/mine")["Containers"].values()]
        assert len(set(taken)) == 3, taken
        for change in ("disconnect", "connect"):
            docker("network", change, "mine", "web")
            shown = "80/tcp -> 0.0.0.0:8080\n80/tcp -> [::]:8080" if change == "connect" else ""
            assert docker("port", "web") == shown
        assert networked.shell(FETCH.format("127.0.0.1", 8080)) == "web\n"
        docker("rm", "-f", "web", "user", "wide", third)
        docker("network", "rm", "mine", "wide")
        networked.await_idle()
    finally:
        networked.close()


def test_a_connection_that_fails_or_is_killed(busybox: bytes) -> None:
    """Half way, of a running container with live restore: a failure leaves nothing; after a kill the next
    daemon makes what is missing, and a check finds nothing."""
    networked = Networked("--live-restore")
    docker, host = networked.docker, networked.host
    try:
        networked.start(busybox)
        docker("network", "create", "--ipv6", "mine")
        docker("run", "-d", "--name", "one", "busybox", "sleep", NEVER)
        ip = f"nsenter -n -t {docker('inspect', '-f', '{{.State.Pid}}', 'one')} ip"
        hosts = docker("exec", "one", "cat", "/etc/hosts")
        networked.shell(f"{ip} addr del 127.0.0.1/8 dev lo")
        assert "annot assign requested address" in docker.run("network", "connect", "mine", "one",
                                                              status=1).stderr
        assert "eth1" not in networked.shell(f"{ip} link")
        assert docker("exec", "one", "cat", "/etc/hosts") == hosts
        assert host.api("GET", "/networks/mine")["Containers"] == {}
        assert list(host.api("GET", "/containers/one/json")["NetworkSettings"]["Networks"]) == ["bridge"]
        networked.shell(f"{ip} addr add 127.0.0.1/8 dev lo")
        host.kill()
        host.environment["DOCKERD_FAILPOINTS"] = "network-join=kill"
        host.start()
        docker.run("network", "connect", "mine", "one", status=1)
        host.kill()
        del host.environment["DOCKERD_FAILPOINTS"]
        host.start()
        taken, = host.api("GET", "/networks/mine")["Containers"].values()
        docker("run", "-d", "--name", "two", "--net", "mine", "busybox", "sleep", NEVER)
        addresses = [each["IPv4Address"] for each in
                     host.api("GET", "/networks/mine")["Containers"].values()]
        assert taken["IPv4Address"] in addresses and len(set(addresses)) == 2
        assert docker("exec", "one", "ping", "-c", "1", "-W", "2", "two")
        assert taken["IPv4Address"].partition("/")[0] in docker("exec", "one", "cat", "/etc/hosts")
        docker("network", "disconnect", "bridge", "one")
        host.kill()
        host.start()  # which finds the link that is left by its address
        docker("network", "disconnect", "mine", "one")
        assert "eth" not in networked.shell(f"{ip} link")
        docker("rm", "-f", "one", "two")
        docker("network", "rm", "mine")
        networked.await_idle()
        host.stop()
        assert check(host, "--check") == (0, [])
        host.start()
    finally:
        networked.close()


BUS = """<busconfig><listen>unix:path=/run/dbus/system_bus_socket</listen><auth>EXTERNAL</auth>
<policy context="default"><allow user="*"/><allow own="*"/><allow send_type="signal"/>
<allow send_type="method_call"/><allow receive_type="signal"/><allow receive_type="method_return"/></policy>
</busconfig>"""
RELOADED = ("dbus-send --bus=unix:path=/run/dbus/system_bus_socket --type=signal / "
            "org.fedoraproject.FirewallD1.Reloaded")


def test_networks_heal(busybox: bytes) -> None:
    """A proxy that is killed is followed by another; flushed rules come back at a reload, the daemon's or
    firewalld's; names follow a rename; and what a container's end leaves while there is no daemon goes at its
    start."""
    networked = Networked("--live-restore")
    docker, host = networked.docker, networked.host

    def proxy() -> int:
        found = re.search(r"proxy.,pid=(\d+)", networked.shell("ss -Hlntp"))
        return int(found[1]) if found else 0

    Path(host.path("bus")).write_text(BUS)
    networked.shell("mount -t tmpfs run /run && mkdir /run/dbus")
    bus = host.enter("dbus-daemon", "--nofork", "--config-file=" + host.path("bus"))
    try:
        wait_for(lambda: networked.shell("ls /run/dbus"), "the message bus")
        networked.start(busybox)
        docker("network", "create", "mine")
        docker("run", "-d", "--name", "web", "--hostname", "server", "--net", "mine", "-p", "8080:80", *SERVE)
        docker("run", "-d", "--name", "user", "--net", "mine", "--add-host", "gw:host-gateway", "busybox",
               "sleep", NEVER)
        assert "172.17.0.1\tgw" in docker("exec", "user", "cat", "/etc/hosts")
        assert docker("run", "--rm", "--net", "container:web", "busybox", "hostname") == "server"
        docker("rename", "web", "site")
        docker("exec", "user", "nslookup", "-type=a", "site")
        docker("exec", "user", "nslookup", "-type=a", "web", status=1)
        assert host.api("GET", "/containers/site/json")["NetworkSettings"]["Networks"]["mine"][
            "DNSNames"][0] == "site"
        first, reach = proxy(), FETCH.format("127.0.0.1", 8080)
        os.kill(first, signal.SIGKILL)
        wait_for(lambda: networked.shell(reach, False) == "server\n", "another proxy")
        assert proxy() != first
        networked.shell("iptables -F; iptables -t nat -F")
        assert host.process
        host.process.send_signal(signal.SIGHUP)
        wait_for(lambda: networked.from_outside(FETCH.format(HOST_ADDRESS, 8080)) == "server\n", "its rules")
        networked.shell("iptables -F; iptables -t nat -F")
        wait_for(lambda: networked.shell(f"{RELOADED}; iptables-save | grep DNAT", False), "its rules again")
        host.kill()
        wait_for(lambda: not any("tables" in read_text(f"/proc/{pid}/cmdline")
                                 for pid in host.own_processes()), "the daemon's iptables-restore to end")
        os.kill(proxy(), signal.SIGKILL)
        host.start()
        assert networked.shell(reach) == "server\n"
        process = int(docker("inspect", "-f", "{{.State.Pid}}", "site"))
        host.kill()
        os.kill(process, signal.SIGKILL)
        host.start()
        docker("rm", "-f", "site", "user")
        docker("network", "rm", "mine")
        networked.await_idle()
    finally:
        bus.kill()
        bus.wait()
        networked.close()


@pytest.mark.parametrize("variant", ["legacy", "nft"])
def test_one_iptables_restore_is_kept(
        variant: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """It carries out change after change on what stands then, and holds no lock in between; one that is
    killed, or finds that rules have been flushed, is followed by another that makes all right."""
    monkeypatch.setenv("PATH", iptables_path(variant, str(tmp_path / "programs")))
    target, everywhere = ipaddress.ip_address("172.17.0.2"), ipaddress.ip_address("0.0.0.0")
    ports = [dockerd.PortRule("docker0", "tcp", everywhere, port, target, 80) for port in range(8000, 8005)]
    many: list[Any] = [dockerd.PortRule("docker0", "tcp", everywhere, port, target, port)
                       for port in range(1, dockerd.MANY_RULES + 3)]

    def run(*command: str) -> str:
        return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout

    def published() -> list[str]:
        return re.findall(r"--dport (80\d\d) -j DNAT", run("iptables", "-t", "nat", "-S", "DOCKER"))

    def changes() -> None:
        dockerd.unshare(dockerd.CLONE_NEWNET)
        firewall = dockerd.Iptables(True, False)
        firewall.rebuild()
        firewall.change(ports[:1])
        kept = firewall.kept["iptables-restore"].process
        run("iptables", "-I", "DOCKER", "-s", "10.9.8.7", "-j", "DROP")
        run("iptables", "-t", "nat", "-I", "DOCKER", "-s", "10.9.8.7", "-j", "RETURN")
        firewall.change(ports[1:2], ports[:1])
        assert published() == ["8001"] and kept.poll() is None
        assert "10.9.8.7" in run("iptables", "-S", "DOCKER")
        for table in ("filter", "nat"):
            run("iptables", "-t", table, "-F")
        firewall.change(ports[2:3], ports[1:2])
        assert published() == ["8002"] and kept.returncode
        firewall.kept["iptables-restore"].process.kill()
        firewall.change(ports[3:4])
        assert sorted(published()) == ["8002", "8003"]
        with pytest.raises(dockerd.DockerError, match="cannot set the firewall's rules: .*nonsense"):
            firewall.change([ports[4]._replace(bridge="-m nonsense")])
        assert sorted(published()) == ["8002", "8003"]
        firewall.change(many)
        firewall.change((), many[1:])
        assert len(run("iptables", "-t", "nat", "-S", "DOCKER").splitlines()) == 4  # the chain's own line too
        firewall.change((), ports + many)
        kept = firewall.kept["iptables-restore"].process
        firewall.close()
        assert not published() and kept.returncode is not None

    dockerd.in_thread(changes)


def published_cycle(host: Host, port: str = "") -> None:
    """Run a container with a published port from its creation to its removal."""
    name = host.api("POST", "/containers/create", {
        "Image": "busybox", "Cmd": ["true"], "ExposedPorts": {"80/tcp": {}, "53/udp": {}},
        "HostConfig": {"PortBindings": {"80/tcp": [{"HostPort": port}], "53/udp": [{}]}}})["Id"]
    host.api("POST", f"/containers/{name}/start")
    host.api("POST", f"/containers/{name}/wait")
    host.api("DELETE", f"/containers/{name}")


def assert_given_back(networked: Networked) -> None:
    """No link, rule, socket, namespace, process or address is left of any container."""
    networked.await_idle()
    host = networked.host
    assert host.api("GET", "/networks/bridge")["Containers"] == {}
    wait_for(lambda: networked.docker("run", "--rm", "busybox", "hostname", "-i") == "172.17.0.2")
    held = [os.readlink(f"/proc/{pid}/fd/{fd}") for pid in [*host.own_processes(), host.process.pid]  # type: ignore
            for fd in os.listdir(f"/proc/{pid}/fd") if os.path.lexists(f"/proc/{pid}/fd/{fd}")]
    assert not [name for name in held if name.startswith("net:")], held
    assert all(re.search("shim|proxy|tables-restore", read_text(f"/proc/{pid}/cmdline"))
               for pid in host.own_processes())
    published_cycle(host, "8080")


def test_nftables_takes_as_many_ports_as_there_are() -> None:
    """In one change, however many of netlink's messages and bytes that is."""
    bridge = dockerd.BridgeRule("br0", ipaddress.ip_network("172.17.0.0/16"), True, True, False)
    host, target = map(ipaddress.ip_address, ("192.0.2.1", "172.17.0.2"))
    ports: list[Any] = [dockerd.PortRule("br0", "tcp", host, number, target, number)
                        for number in range(1, 6000)]

    def elements() -> int:
        listed = subprocess.check_output(["nft", "list", "map", "ip", "dockerd", "ports_at"])
        return listed.count(b" . tcp . ")

    def change() -> None:
        dockerd.unshare(dockerd.CLONE_NEWNET)
        firewall = dockerd.Nftables()
        firewall.rebuild()
        firewall.change([bridge, *ports])
        assert elements() == len(ports)
        firewall.rebuild()
        firewall.change((), ports[1:])
        assert elements() == 1

    dockerd.in_thread(change)


def test_cycles_leave_nothing(networked: Networked) -> None:
    """Forty containers with published ports, eight at a time."""
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: published_cycle(networked.host), range(40)))
    assert_given_back(networked)


@pytest.mark.torture
@pytest.mark.timeout(1800)
def test_a_thousand_cycles_leave_nothing(networked: Networked) -> None:
    """The same a thousand times, then with kill -9 of the daemon in the midst of it, ten times."""
    host = networked.host
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda _: published_cycle(host), range(1000)))
    assert_given_back(networked)
    killed = threading.Event()

    def cycles(_: int) -> None:
        with contextlib.suppress(OSError, http.client.HTTPException):
            while not killed.is_set():
                published_cycle(host)

    for attempt in range(10):
        killed.clear()
        with concurrent.futures.ThreadPoolExecutor(8) as pool:
            running = [pool.submit(cycles, number) for number in range(8)]
            time.sleep(0.5 + random.Random(attempt).random())
            host.kill()
            killed.set()
        host.start()
        host.remove_all()
        for each in running:
            each.result()
        assert_given_back(networked)


@pytest.mark.parametrize("backend", ["iptables", "nftables"])
def test_without_the_proxy(busybox: bytes, backend: str) -> None:
    """--userland-proxy=false: the kernel alone leads to a published port, from loopback, from the neighbour,
    from the container itself and from others on its bridge and on another; there is no proxy process, and
    loopback, which the bridge's packets may have as their source now, is no target of theirs."""
    networked = Networked("--userland-proxy=false", *BACKENDS[backend])
    docker, host = networked.docker, networked.host
    try:
        networked.shell("echo 0 > /proc/sys/net/bridge/bridge-nf-call-iptables", False)  # where it is loaded
        networked.start(busybox)
        docker("network", "create", "other")
        docker("run", "-d", "--name", "web", "--hostname", "web", "-p", "8080:80", *SERVE)
        docker("run", "-d", "--name", "near", "busybox", "sleep", NEVER)
        docker("run", "-d", "--name", "far", "--net", "other", "busybox", "sleep", NEVER)
        docker("network", "create", "--internal", "in")
        docker("run", "-d", "--name", "lost", "--net", "in", "busybox", "sleep", NEVER)
        for place in ("127.0.0.1", HOST_ADDRESS, "172.17.0.1"):
            assert networked.shell(FETCH.format(place, 8080)) == "web\n", place
        assert networked.from_outside(FETCH.format(HOST_ADDRESS, 8080)) == "web\n"
        for name in ("web", "near", "far"):
            fetch = f"nc -w {2 * PATIENCE} {HOST_ADDRESS} 8080 < /dev/null"
            assert docker("exec", name, "sh", "-c", fetch) == "web", name
        gate = docker("network", "inspect", "-f", "{{(index .IPAM.Config 0).Gateway}}", "in")
        assert docker("exec", "lost", "sh", "-c", f"nc -w 1 {gate} 8080 < /dev/null", status=None) == ""
        assert not [pid for pid in host.own_processes() if "proxy" in read_text(f"/proc/{pid}/cmdline")]
        with open(f"/proc/{host.holder.pid}/ns/net") as namespace:
            listener = dockerd.in_network(namespace.fileno(), socket.create_server, ("127.0.0.1", 9999))
        pid, reach = docker("inspect", "-f", "{{.State.Pid}}", "near"), ("nc", "-w", "1", "127.0.0.1", "9999")
        networked.shell(f"nsenter -n -t {pid} sh -c 'echo 1 > /proc/sys/net/ipv4/conf/eth0/route_localnet; "
                        "ip addr del 127.0.0.1/8 dev lo; ip route add 127.0.0.1 via 172.17.0.1'")
        with listener:
            listener.setblocking(False)
            docker("exec", "near", *reach, status=1)
            with pytest.raises(BlockingIOError):
                listener.accept()
            networked.shell("iptables -D INPUT -i docker0 -d 127.0.0.0/8 -m conntrack --ctstate NEW "
                            "-j DROP || nft flush chain ip dockerd input")
            docker("exec", "-d", "near", *reach)
            listener.settimeout(20)
            listener.accept()[0].close()  # so it was that rule
        assert "already allocated" in docker.run("run", "-p", "8080:80", "busybox", "true", status=125).stderr
        docker("rm", "-f", "web", "near", "far", "lost")
        docker("network", "rm", "other", "in")
        networked.await_idle()
    finally:
        networked.close()


def test_sctp_ports(networked: Networked) -> None:
    """They are led by the kernel's rules; a kernel that has no sctp itself has no proxy for them."""
    docker = networked.docker
    docker("run", "-d", "--name", "sctp", "-p", "7000:80/sctp", "busybox", "sleep", NEVER)
    assert docker("port", "sctp").splitlines()[0] == "80/sctp -> 0.0.0.0:7000"
    rules = networked.shell("iptables-save; nft list table ip dockerd 2>/dev/null", False)
    address = docker("inspect", "-f", "{{.NetworkSettings.Networks.bridge.IPAddress}}", "sctp").strip()
    expected = {"iptables": f"-p sctp -m sctp --dport 7000 -j DNAT --to-destination {address}:80",
                "nftables": f"sctp . 7000 : {address} . 80"}.get(backend_of(networked), "")
    assert expected in rules, rules
    docker.run("run", "-p", "7000:80/sctp", "busybox", "true", status=125)
    docker("rm", "-f", "sctp")
    networked.await_idle()


def test_macvlan(networked: Networked) -> None:
    """A container with a place of its own in the host's network, reached from a neighbour, with names."""
    docker = networked.docker
    docker("network", "create", "-d", "macvlan", "-o", "parent=up0", "--subnet", "10.99.0.0/24",
           "--gateway", OUTSIDE, "--ip-range", "10.99.0.64/26", "lan")
    docker("run", "-d", "--name", "one", "--net", "lan", "busybox", "sleep", NEVER)
    docker("run", "-d", "--name", "two", "--net", "lan", "--ip", "10.99.0.90", "busybox", "sleep", NEVER)
    assert "macvlan mode bridge" in networked.shell(
        f"nsenter -n -t {docker('inspect', '-f', '{{.State.Pid}}', 'one')} ip -d link show eth0")
    assert "1 packets received" in docker("exec", "one", "ping", "-c", "1", "-W", "2", OUTSIDE)
    assert "1 packets received" in docker("exec", "one", "ping", "-c", "1", "-W", "2", "two")
    assert " 0% packet loss" in networked.from_outside(f"{PEER}/bin/busybox ping -c 1 -W 2 10.99.0.90")
    assert "default via " + OUTSIDE in docker("exec", "one", "ip", "route")
    assert "Address already in use" in docker.run(
        "run", "--net", "lan", "--ip", "10.99.0.90", "busybox", "true", status=125).stderr
    docker("network", "create", "-d", "macvlan", "-o", "parent=up0", "--ipam-driver", "null", "free")
    assert "inet " not in docker("run", "--rm", "--net", "free", "busybox", "ip", "addr", "show", "eth0")
    docker("rm", "-f", "one", "two")
    docker("network", "rm", "lan", "free")
    assert "up0" in networked.shell("ip link show up0")
    networked.await_idle()


def test_link_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    """The messages for links that not every kernel has: ipvlan, VLANs, a parent of the network's own."""
    def made(message: bytes) -> tuple[dict[int, bytes], str, dict[int, bytes]]:
        values = dockerd.attributes(message[32:])
        info = dockerd.attributes(values[dockerd.IFLA_LINKINFO])
        kind = info[dockerd.IFLA_INFO_KIND].rstrip(b"\0").decode()
        return values, kind, dockerd.attributes(info.get(dockerd.IFLA_INFO_DATA, b""))

    def network(driver: str, **options: str) -> dockerd.Network:
        body = {"IPAM": {"Config": [{"Subnet": "10.1.0.0/24"}]}, "Options": options}
        return dockerd.Network(dockerd.network_record("n", driver, body))

    settings = {**dockerd.ENDPOINT, "EndpointID": "e" * 64, "MacAddress": "02:42:0a:01:00:02"}
    for driver, mode, data in (
            ("macvlan", "private", struct.pack("=I", 1)), ("macvlan", "vepa", struct.pack("=I", 2)),
            ("macvlan", "passthru", struct.pack("=I", 8)), ("macvlan", "", struct.pack("=I", 4)),
            ("ipvlan", "", struct.pack("=H", 0)), ("ipvlan", "l3", struct.pack("=H", 1)),
            ("ipvlan", "l3s", struct.pack("=H", 2))):
        endpoint = dockerd.Endpoint(network(driver, parent="lo", **{f"{driver}_mode": mode}), dict(settings))
        endpoint.link = "eth0"
        values, kind, found = made(endpoint.message(5))
        assert (kind, found[1]) == (driver, data)
        assert values[dockerd.IFLA_LINK] == struct.pack("=I", 1) and values[dockerd.IFLA_IFNAME] == b"eth0\0"
        assert values[dockerd.IFLA_NET_NS_FD] == struct.pack("=I", 5)
        assert (dockerd.IFLA_ADDRESS in values) == (driver == "macvlan")
    sent: list[bytes] = []
    monkeypatch.setattr(dockerd, "netlink_batch", lambda messages: sent.extend(messages))
    for own, wanted in (("lo.10", "vlan"), ("dm-0123456789ab", "dummy")):
        below = network("ipvlan", parent=own)
        below.record["OwnLink"] = own
        dockerd.Networks._make_links(None, below)  # type: ignore[arg-type]
        values, kind, found = made(sent.pop())
        assert kind == wanted and values[dockerd.IFLA_IFNAME] == own.encode() + b"\0"
        if kind == "vlan":
            assert found[dockerd.IFLA_VLAN_ID] == struct.pack("=H", 10)
            assert values[dockerd.IFLA_LINK] == struct.pack("=I", 1)


COMPOSED = """
version: "3.7"
services:
  web:
    image: busybox
    command: nc -ll -p 80 -e hostname
    hostname: web
    ports: ["8080:80"]
    networks:
      front: {aliases: [site]}
      back: {ipv4_address: 10.98.0.80}
  user: {image: busybox, command: "sleep 1000", networks: [front]}
  base: {image: busybox, command: "sleep 1000", networks: [back]}
networks:
  front:
  back:
    internal: true
    ipam: {config: [{subnet: 10.98.0.0/24}]}
"""


@pytest.mark.parametrize("version", [1, 2])
def test_compose_with_two_networks(networked: Networked, version: int) -> None:
    """up, up again, restart and down: services reach each other by name and alias on their networks alone."""
    docker = networked.docker
    compose = Compose(version, networked.host, COMPOSED)
    compose("up", "-d")
    compose("up", "-d")
    names = {service: compose("ps", "-q", service) for service in ("web", "user", "base")}
    fetch = "nc -w 2 {} 80 < /dev/null"
    for name, places in (("user", ("web", "site", "web.project_front")), ("base", ("web", "10.98.0.80"))):
        for place in places:
            assert docker("exec", names[name], "sh", "-c", fetch.format(place)) == "web", place
    assert networked.shell(FETCH.format("127.0.0.1", 8080)) == "web\n"
    docker("exec", names["base"], "nslookup", "-type=a", "user", status=1)
    docker("exec", names["base"], "nslookup", "-type=a", "site", status=1)
    compose("restart", "-t", "0", "web")
    assert docker("exec", names["user"], "sh", "-c", fetch.format("web")) == "web"
    compose("up", "-d", "--scale", "user=2")
    compose("down", "-t", "0")
    assert docker("network", "ls", "-q", "-f", "label=com.docker.compose.project=project") == ""
    networked.await_idle()


def test_links_open_what_icc_closes(busybox: bytes) -> None:
    """With --icc=false only a linked container reaches another, by the variables and names it is given; a
    restart of the target is followed.  And networks have the daemon's default options."""
    mtu = "com.docker.network.driver.mtu"
    networked = Networked("--icc=false", "--default-network-opt", f"bridge={mtu}=1234")
    docker = networked.docker
    try:
        networked.host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        for option, shown in ((), f"map[{mtu}:1234]"), (("-o", f"{mtu}=1400"), f"map[{mtu}:1400]"):
            docker("network", "create", *option, "other")
            assert docker("network", "inspect", "-f", "{{.Options}}", "other") == shown
            docker("network", "rm", "other")
        docker("run", "-d", "--name", "web", "--expose", "80", *SERVE)
        docker("run", "-d", "--name", "user", "--link", "web:db", "--link", "web:twice", "busybox", "sleep",
               NEVER)
        docker("run", "-d", "--name", "stranger", "busybox", "sleep", NEVER)
        assert docker("ps", "--format", "{{.Names}} {{.Ports}}").splitlines() == [
            "stranger ", "user ", "web 80/tcp"]
        fetch, own = "nc -w 1 {} 80 < /dev/null", docker("inspect", "-f", "{{.Config.Hostname}}", "web")
        assert docker("exec", "user", "sh", "-c", fetch.format("db")) == own
        assert docker("exec", "user", "sh", "-c", "echo $DB_NAME $DB_PORT_80_TCP_PORT $DB_PORT") == (
            "/user/db 80 tcp://172.17.0.2:80")
        assert docker("exec", "stranger", "sh", "-c", fetch.format("172.17.0.2"), status=None) == ""
        docker("stop", "-t", "0", "web")
        docker("run", "-d", "--name", "thief", "busybox", "sleep", NEVER)
        docker("start", "web")
        wait_for(lambda: docker("exec", "user", "sh", "-c", fetch.format("db"), status=None) == own,
                 "the new address")
        assert docker("inspect", "-f", "{{.HostConfig.Links}}", "user") == "[/web:/user/db /web:/user/twice]"
        docker("rm", "-f", "user")
        assert "/32 " not in networked.shell("iptables -S")
        docker("network", "create", "mine")
        docker("run", "-d", "--name", "apart", "--net", "mine", "--link", "later:db", "busybox", "sleep",
               NEVER)
        assert docker("inspect", "-f", "{{.HostConfig.Links}}", "apart") == "[]"
        docker("exec", "apart", "nslookup", "-type=a", "db", status=1)
        docker("run", "-d", "--name", "later", "--net", "mine", "busybox", "sleep", NEVER)
        docker("exec", "apart", "nslookup", "-type=a", "db")
        docker("create", "--name", "user", "--link", "later:db", "busybox", "true")
        assert "Cannot link to /later, as it does not belong to the default network" in docker.run(
            "start", "user", status=1).stderr
        docker("network", "disconnect", "bridge", "user")
        docker("start", "-a", "user")
    finally:
        networked.close()


@pytest.mark.parametrize("arguments, text", [
    (("network", "rm", "bridge"), "bridge is a pre-defined network and cannot be removed"),
    (("network", "rm", "nix"), "network nix not found"),
    (("network", "create", "bridge"), "operation is not permitted on predefined bridge network"),
    (("network", "create", "-d", "foo", "x"), 'could not find plugin foo in v1 plugin registry: plugin "foo" '
                                              'not found'),
    (("network", "create", "--subnet", "172.17.0.0/24", "x"),
     "invalid pool request: Pool overlaps with other one on this address space"),
    (("network", "create", "--subnet", "10.55.9.1/24", "x"),
     "invalid network config:\ninvalid subnet 10.55.9.1/24: it should be 10.55.9.0/24"),
    (("network", "create", "-o", "com.docker.network.bridge.gateway_mode_ipv6=odd", "x"),
     "unknown gateway mode"),
    (("network", "create", "-o", "com.docker.network.bridge.gateway_mode_ipv4=isolated", "x"),
     "gateway mode 'isolated' can only be used for an internal network"),
    (("network", "create", "-o", "com.docker.network.bridge.name=lo", "x"),
     "existing interface lo is not a bridge"),
    (("network", "create", "-d", "macvlan", "-o", "parent=lo.5000", "x"),
     "invalid subinterface vlan name lo.5000, example formatting is eth0.10"),
    (("run", "--net", "nix", "busybox", "true"), "network nix not found"),
    (("run", "--net", "container:nix", "busybox", "true"), "No such container: nix"),
    (("run", "--ip", "172.17.0.9", "busybox", "true"), "invalid config for network bridge: invalid endpoint "
                                                       "settings:\n"
     "user specified IP address is supported on user defined networks only"),
    (("run", "--mac-address", "01:00:00:00:00:00", "busybox", "true"), "cannot make the links of "),
    (("run", "--ip", "fd00::1", "busybox", "true"), "* invalid IPv4 address: fd00::1"),
    (("network", "ls", "--filter", "dangling=x"), "invalid filter 'dangling=x'"),
    (("run", "--link-local-ip", "10.1.1.1", "busybox", "true"), "invalid config for network bridge: invalid "
     "endpoint settings:\ninvalid link-local IP address: 10.1.1.1"),
    (("run", "--link", "nix", "busybox", "true"), "could not get container for nix: No such container: nix"),
    (("run", "-p", "10.1.1.1:7000:80", "busybox", "true"), "cannot assign requested address"),
    (("run", "--net", "host", "--link", "nix", "busybox", "true"),
     "conflicting options: host type networking can't be used with links. This would result in undefined "
     "behavior"),
])
def test_network_errors_are_docker_s(host: Host, arguments: tuple[str, ...], text: str) -> None:
    docker = Docker(docker_clis()[max(docker_clis())], host)
    done = docker.run(*arguments, status=125 if arguments[0] == "run" else 1)
    assert text in done.stderr


def test_networks_that_cannot_be(host: Host) -> None:
    """What a request asks for is looked at before anything is made; nothing is left of what fails later."""
    mtu, bridge = "com.docker.network.driver.mtu", "com.docker.network.bridge."

    def links() -> str:
        process = host.enter("ip", "-o", "link", stdout=subprocess.PIPE, text=True)
        return re.sub(r"(?m)^(\d+: [^:@]+).*", r"\1", str(process.communicate()[0]))

    before = links()
    for options, status, text in (
            ({mtu: "abc"}, 400,
             f'failed to parse {mtu} value: abc (strconv.Atoi: parsing "abc": invalid syntax)'),
            ({mtu: "-5"}, 400, f"failed to parse {mtu} value: -5 (invalid MTU number)"),
            ({mtu: "9" * 20}, 400, "value out of range"),
            ({mtu: "99999"}, 500, "greater than device maximum"),
            ({bridge + "enable_icc": "maybe"}, 400, f"failed to parse {bridge}enable_icc value: maybe "
             '(strconv.ParseBool: parsing "maybe": invalid syntax)'),
            ({bridge + "host_binding_ipv4": "nix"}, 400, "failed to parse"),
            ({"com.docker.network.host_ipv4": "nix"}, 400, "failed to parse"),
            ({"com.docker.network.container_iface_prefix": "a/b"}, 400, "no beginning of a link's name"),
            *(({bridge + "name": name}, 400, "invalid bridge name " + name)
              for name in ("br%d", "br+", "a b", "a\nb", "..", "-x", '"x', "!x", "a" * 16))):
        answer = host.http("POST", "/networks/create", {"Name": "odd", "Options": options})
        assert answer.status == status and text in answer.json["message"], (options, answer)
    fault, other = "invalid network config:\ninvalid ", "AuxiliaryAddresses"
    text = "parent subnet 10.55.0.0/24 doesn't contain "
    for settings, status, words in (
            ({"Subnet": "10.55.0.0"}, 400, fault + "subnet 10.55.0.0: invalid CIDR block notation"),
            ({"Subnet": "10.55.0.0/255.255.255.0"}, 400, "invalid CIDR block notation"),
            ({"Gateway": "10.55.0.1"}, 400, fault + "subnet : invalid CIDR block notation"),
            ({"IPRange": "10.55.0.9"}, 400, fault + "ip-range 10.55.0.9: invalid CIDR block notation"),
            ({"IPRange": "10.55.0.9/25"}, 400, fault + "ip-range 10.55.0.9/25: it should be 10.55.0.0/25"),
            ({"IPRange": "10.55.0.0/16"}, 400, text + "ip-range"),
            ({"Gateway": "10.56.0.1"}, 400, fault + "gateway 10.56.0.1: " + text + "this address"),
            ({"Gateway": "10.55.0.1/24"}, 400, fault + "gateway 10.55.0.1/24: invalid address"),
            ({"Gateway": "10.55.0.0"}, 403, "failed to allocate gateway 10.55.0.0: Address already in use"),
            ({"Gateway": "10.55.0.255"}, 403, "Address already in use"),
            ({other: {"a": "10.55.0.5/24"}}, 400, fault + "auxiliary address a: invalid address"),
            ({other: {"a": ""}}, 400, fault + "auxiliary address a: invalid address"),
            ({other: {"a": "10.56.0.5"}}, 400, fault + "auxiliary address a: " + text + "this address"),
            ({"Gateway": "10.55.0.3", other: {"a": "10.55.0.3"}}, 403,
             "failed to allocate auxiliary address a: Address already in use")):
        given = settings if "subnet :" in words else {"Subnet": "10.55.0.0/24", **settings}
        answer = host.http("POST", "/networks/create", {"Name": "odd", "IPAM": {"Config": [given]}})
        assert answer.status == status and words in answer.json["message"], (settings, answer)
    for body, text in (({"IPAM": {"Driver": "null"}}, "ipv4 pool is empty"),
                       ({"EnableIPv4": False}, "IPv4 or IPv6 must be enabled"),
                       ({"ConfigFrom": {"Network": "x"}}, 'configuration network "x" does not exist')):
        assert text in host.http("POST", "/networks/create", {"Name": "odd", **body}).json["message"]
    for mac in ("zz", "02:42-00:00:00:01", "02:42:00:00:00"):
        answer = host.http("POST", "/containers/create", {"Image": "busybox", "NetworkingConfig": {
            "EndpointsConfig": {"bridge": {"MacAddress": mac}}}})
        assert answer.status == 400 and answer.json["message"].endswith(f"invalid MAC address {mac}"), answer
    assert links() == before
    assert not [network for network in host.api("GET", "/networks") if network["Name"] == "odd"]


def test_ports_that_are_none(host: Host) -> None:
    """An image or a request may name what is no port: it keeps nobody from running, or from listing; a port
    is found by any name that it has."""
    body = {"Image": "busybox", "Cmd": ["sleep", NEVER], "ExposedPorts": dict.fromkeys(
        ("80", "82/UDP", "83-85/tcp", "foo", "0/tcp", "99999", "7/odd", "\u0669/tcp"), {}), "HostConfig": {
            "PublishAllPorts": True, "PortBindings": {"80/TCP": [{"HostPort": "8101"}]}}}
    made = host.api("POST", "/containers/create?name=odd", body)["Id"]
    host.api("POST", f"/containers/{made}/start")
    shown = host.api("GET", f"/containers/{made}/json")["NetworkSettings"]["Ports"]
    assert set(shown) == {"80/tcp", "82/udp"} and shown["80/tcp"][0]["HostPort"] == "8101"
    listed, = (each for each in host.api("GET", "/containers/json?all=1") if each["Id"] == made)
    assert {port["PrivatePort"] for port in listed["Ports"]} == {80, 82}
    assert len(host.api("GET", "/containers/json?filters=%7B%22expose%22:[%2282/udp%22]%7D")) == 1
    host.api("DELETE", f"/containers/{made}?force=1")
    body["HostConfig"] = {"PortBindings": {"80/foo": [{}]}}
    assert "invalid proto: foo" in host.http("POST", "/containers/create", body).json["message"]


def test_addresses_of_a_pool() -> None:
    """The lowest free one is given out, never the gateway's, an auxiliary or a taken one."""
    pool = dockerd.AddressPool({"Subnet": "10.0.0.0/29", "Gateway": "10.0.0.1",
                                "AuxiliaryAddresses": {"a": "10.0.0.3"}})
    taken = [str(pool.take().ip) for _ in range(4)]
    assert taken == ["10.0.0.2", "10.0.0.4", "10.0.0.5", "10.0.0.6"]
    with pytest.raises(dockerd.Conflict, match="no available IPv4 addresses"):
        pool.take()
    pool.give_back(ipaddress.ip_address("10.0.0.4"))
    with pytest.raises(dockerd.Forbidden, match="Address already in use"):
        pool.take(ipaddress.ip_address("10.0.0.5"))
    assert str(pool.take()) == "10.0.0.4/29"
    pool.give_back(ipaddress.ip_address("10.0.0.2"), "lo")  # its link is still there
    with pytest.raises(dockerd.Conflict):
        pool.take()


def test_free_subnets_avoid_what_is_used() -> None:
    used = [ipaddress.ip_network(text) for text in ("172.17.3.0/24", "172.18.0.0/16", "fd00::/8")]
    assert str(dockerd.free_subnet(dockerd.DEFAULT_POOLS, used)) == "172.19.0.0/16"
    with pytest.raises(dockerd.Forbidden, match="all predefined address pools have been fully subnetted"):
        dockerd.free_subnet([("172.17.0.0/16", 17)], [ipaddress.ip_network("172.16.0.0/12")])
    wide = [ipaddress.ip_network(text) for text in ("fd00::/10", "fd40::/64", "fd40:0:0:1::/65", "::/128")]
    assert str(dockerd.free_subnet([("fd00::/8", 64)], wide)) == "fd40:0:0:2::/64"


# ------------------------------------------------------------------------------------------------------------
# Volumes
# ------------------------------------------------------------------------------------------------------------


def link_entry(name: str, target: str, kind: bytes = tarfile.SYMTYPE) -> tarfile.TarInfo:
    """A link as an entry of an archive."""
    link = tarfile.TarInfo(name)
    link.type, link.linkname = kind, target
    return link


def owned_entry(name: str, uid: int, gid: int, mode: int) -> tarfile.TarInfo:
    """A directory with an owner as an entry of an archive."""
    entry = tarfile.TarInfo(name)
    entry.type, entry.uid, entry.gid, entry.mode = tarfile.DIRTYPE, uid, gid, mode
    return entry


def data_entries() -> dict[str, Any]:
    """A busybox with files at /data, and links."""
    hard = link_entry("data/hard", "data/sub/file", tarfile.LNKTYPE)
    hard.mode = 0o604  # which the file gets, as in Docker
    return {**busybox_entries(), "data": owned_entry("data", 7, 8, 0o2750), "data/sub": None,
            "data/sub/file": (b"hello\n", 0o640), "data/link": link_entry("data/link", "sub/file"),
            "data/out": link_entry("data/out", "/etc/passwd"), "dlink": link_entry("dlink", "/data/sub"),
            "data/hard": hard}


@pytest.fixture(scope="module")
def data_image(shared_host: Host) -> str:
    """An image with data_entries(), on the shared host."""
    shared_host.import_image("data", tar_of(data_entries()), *BUSYBOX_CHANGES)
    return "data"


def volume_names(host: Host) -> set[str]:
    """The names of the volumes."""
    return {volume["Name"] for volume in host.api("GET", "/volumes")["Volumes"]}


def archive(host: Host, name: str, path: str) -> dict[str, bytes]:
    """What cp out of a container gives: name to content."""
    answer = host.http("GET", f"{API}/containers/{name}/archive?path={path}")
    assert answer.status == 200, answer.body
    with tarfile.open(fileobj=io.BytesIO(answer.body)) as tar:
        return {entry.name: (tar.extractfile(entry).read() if entry.isreg() else b"")  # type: ignore[union-attr]
                for entry in tar.getmembers()}


def put(host: Host, name: str, path: str, entries: dict[str, Any], options: str = "") -> Answer:
    """cp into a container."""
    return host.http("PUT", f"{API}/containers/{name}/archive?path={path}{options}", tar_of(entries))


# Lines of a shell, `docker` left out, that both daemons answer alike: what is printed, and the exit code.
# {dir} is the host's directory, {mounts} DATA_MOUNTS, "$ " a command of the shell's own, and what begins with
# "<NAME " has one of data_tars() as its input.
DATA_MOUNTS = ("'{{range .Mounts}}{{println .Type .Name .Source .Destination .Driver .Mode .RW .Propagation}}"
               "{{end}}'")
DATA_LINES = """
volume create one
volume create one
volume create --name two --label a=b --label c
volume create x
volume create 'a b'
volume create ../up
volume create -o bad=1 four
volume create -o type=tmpfs five
volume create -o device=tmpfs five
volume create -o o=size=1m five
volume create -o size=10m five
volume create -o type=tmpfs -o device=tmpfs -o o=size=1m,uid=1000 mem
volume create -o type=none -o device={dir}/nowhere -o o=bind nowhere
volume ls -q -f name=o -f dangling=true
volume ls -q -f driver=local -f name=two
volume ls -q -f label=a
volume ls -q -f label=a=c
volume ls -q -f label!=a -f name=one
volume ls -q -f dangling=maybe
volume ls -q -f nope=1
volume ls -f name=one --format '{{json .}}'
volume inspect one two
volume inspect mem nope
volume rm one nope
volume rm -f nope
volume prune -f --filter nope=1
volume prune -f --filter label=zzz
create --name anon -v /anon -v two:/two -v {dir}/src:/m:ro,z --tmpfs /t data
inspect -f {mounts} anon | sort
inspect -f '{{range .HostConfig.Binds}}{{println .}}{{end}}' anon | sort
inspect -f '{{json .Config.Volumes}} {{json .HostConfig.Tmpfs}}' anon
create --name from --volumes-from anon:ro data
inspect -f {mounts} from | sort
ps -a -f volume=two --format '{{.Names}}'
ps -aq -f volume=/nope
rm -v from
volume rm two
rm -v anon
volume ls -q -f dangling=true
create -v {dir}/src:/m:zz busybox
create -v {dir}/src:/m:ro,rw busybox
create -v {dir}/src:/m:z,Z busybox
create -v {dir}/src:/m:nocopy busybox
create -v {dir}/src:m busybox
create -v {dir}/src:/ busybox
create -v {dir}/src: busybox
create -v :/m busybox
create -v ::: busybox
create -v m busybox
create -v a:b busybox
create -v {dir}/src:/m:ro:x busybox
create -v {dir}/src:/m -v {dir}/src:/m/ busybox
create -v {dir}/src:/m --tmpfs /m busybox
create -v {dir}/src:/m:shared,slave busybox
create -v v1:/m:shared busybox
create -v ../x:/m busybox
create --volumes-from nope busybox
create --volumes-from '' busybox
create --volumes-from nope:zz busybox
create --mount type=bind,src={dir}/src,dst=/m,readonly=maybe busybox
create --mount type=bind,src={dir}/nope,dst=/m busybox
create --mount type=bind,src=rel,dst=/m busybox
create --mount type=bind,dst=/m busybox
create --mount type=bind,src={dir}/src busybox
create --mount type=bind,src={dir}/src,dst=m busybox
create --mount type=bind,src={dir}/src,dst=/ busybox
create --mount type=bind,src={dir}/src,dst=/m,bind-propagation=what busybox
create --mount type=bind,src={dir}/src,dst=/m,volume-nocopy busybox
create --mount type=volume,dst=/m,ro busybox
create --mount type=volume,src=/abs,dst=/m busybox
create --mount type=tmpfs,src=x,dst=/m busybox
create --mount type=tmpfs,dst=/m,tmpfs-size=x busybox
create --mount type=tmpfs,dst=/m,tmpfs-mode=9 busybox
create --mount type=what,dst=/m busybox
create --mount type=bind,nope=1,dst=/m busybox
create --mount type=npipe,src=a,dst=/m busybox
create --mount dst=/m,type=bind,src={dir}/src --mount dst=/m,type=tmpfs busybox
create --name mounts --mount type=bind,src={dir}/src,dst=/m,ro --mount src=v1,dst=/v busybox
inspect -f {mounts} mounts | sort
inspect -f '{{json .HostConfig.Mounts}}' mounts
create --name tmpfs --mount type=tmpfs,dst=/t,tmpfs-size=1m,tmpfs-mode=0700 busybox
inspect -f '{{json .HostConfig.Mounts}}{{json .Mounts}}' tmpfs
create --mount type=bind,src={dir}/src,dst=/m,bind-propagation=rshared --name bound busybox
inspect -f '{{json .HostConfig.Mounts}}{{json .Mounts}}' bound
create -v /b:ro busybox
create --tmpfs m busybox
create --tmpfs / busybox
rm mounts bound tmpfs
"""
# The same, which the real daemon takes half a second or more for.
DATA_RUNS = """
run --rm -v mem:/m busybox sh -c "grep ' /m ' /proc/mounts; df -k /m | tail -1; stat -c %u:%g:%a /m"
run --rm -v nowhere:/m busybox true
run --rm -v {dir}/src:/m:ro busybox touch /m/x
run --rm -v {dir}/src:/m:Z,ro busybox cat /m/file
run --rm -v {dir}/src:/m:delegated busybox cat /m/file
run --rm -v {dir}/src/file:/etc/passwd:ro busybox cat /etc/passwd
run --rm -v {dir}/src/file:/new/deep/file busybox cat /new/deep/file
run --rm -v {dir}/src/file:/etc busybox true
run --rm -v {dir}/src:/etc/passwd busybox true
run --rm -v {dir}/made/deep:/m busybox stat -c %u:%g:%a:%F /m
$ stat -c %u:%g:%a:%F made made/deep; rm -r made
run --rm -v {dir}/sock:/s.sock busybox stat -c %F /s.sock
run --rm -v {dir}/dangling:/m busybox true
run --rm -v {dir}/link:/m busybox cat /m/file
run --rm -v {dir}/src:/m:rshared busybox true
run --rm -v {dir}/src:/m:rslave busybox true
run --rm -v v1:/data data sh -c 'stat -c "%n %a %u:%g %h" /data /data/*'
run --rm -v v2:/data:nocopy data ls -A /data
run --rm -v v3:/data/sub data cat /data/sub/file
run --rm -v v4:/data -v v4:/other data ls /other
create --name vfrom -v v1:/v1 -v {dir}/src:/m:ro -v /anon --tmpfs /t busybox
run --rm --volumes-from vfrom busybox sh -c "grep -c ' /v1 ' /proc/mounts; grep ' /t ' /proc/mounts"
run --rm --volumes-from vfrom busybox touch /m/x
run --rm --volumes-from vfrom:ro busybox touch /v1/x
run --rm --volumes-from vfrom -v v2:/v1 busybox grep -c " /v1 " /proc/mounts
rm -v vfrom
run --rm --mount type=bind,src={dir}/src,dst=/m,bind-propagation=rslave busybox true
run --rm --mount type=volume,dst=/m busybox grep -c ' /m ' /proc/mounts
run --rm --mount type=volume,src=v5,dst=/data,volume-nocopy data ls /data
run --rm --mount type=volume,src=v5,dst=/data data ls /data
create --mount src=v6,dst=/m,volume-label=a=b,volume-opt=type=tmpfs,volume-opt=device=x data
run --rm -v v6:/m busybox sh -c "grep ' /m ' /proc/mounts | cut -d' ' -f3"
volume inspect v6
run --rm --mount type=tmpfs,dst=/m,tmpfs-size=1m,tmpfs-mode=0700 busybox grep ' /m ' /proc/mounts
run --rm --mount type=tmpfs,dst=/data data stat -c %a:%u:%g /data
run --rm --mount type=tmpfs,dst=/m,ro busybox touch /m/x
run --rm --tmpfs /m busybox grep ' /m ' /proc/mounts
run --rm --tmpfs /m:size=64k,mode=1700,uid=1000,gid=100 busybox grep ' /m ' /proc/mounts
run --rm --tmpfs /m:exec,suid,dev busybox grep ' /m ' /proc/mounts
run --rm --tmpfs /m:ro busybox touch /m/x
run --rm --tmpfs /m:nope busybox true
run --rm --tmpfs /m:size=1x busybox true
run --rm --tmpfs /m:nr_inodes=10 busybox grep ' /m ' /proc/mounts
run --rm --tmpfs /m:noatime,strictatime busybox grep ' /m ' /proc/mounts
run --rm --tmpfs /data data stat -c %a:%u:%g /data
run --rm --tmpfs /data:uid=5 data stat -c %a:%u:%g /data
run --rm --read-only --tmpfs /m busybox sh -c "touch /m/x && touch /x"
run --rm --read-only -v v1:/m busybox sh -c "touch /m/x && echo yes"
run --rm -v {dir}/src:/dev/shm busybox ls /dev/shm
run --rm -v {dir}/src:/sys busybox ls /sys
run --rm -v v5:/sys/fs/cgroup busybox ls /sys/fs/cgroup
run --rm -v {dir}/src:/dev/pts busybox ls /dev/pts
run --rm -v {dir}/src/file:/etc/hosts busybox cat /etc/hosts
"""
DATA_COPIES = """
create --name cc -v vol:/v -v vol:/vr:ro -v {dir}/src:/b:ro -v {dir}/src/file:/etc/single data sleep 1000
START cc
cp cc:/data/sub out/
$ mkdir out
cp cc:/data/sub out
cp cc:/data/sub/. out
cp cc:/data/sub/file out/renamed
cp cc:/data/link out
cp -L cc:/data/link out/followed
cp cc:/dlink out
cp -L cc:/dlink out/followed-too
cp cc:/dlink/. out/dot
cp -L cc:/data/out out/passwd
cp -a cc:/data out/archived
cp cc:/data out/plain
cp cc:/v out/volume
cp cc:/b out/bound
cp cc:/etc/single out
cp cc:etc/passwd out/relative
cp cc:/../../etc/passwd out/climbed
cp cc:/dev/null out/null
cp cc:/etc/hostname out
cp cc:/nope out
cp cc:/etc/passwd/x out
cp cc:/etc/passwd out/nodir/deep
cp nope:/etc/passwd out
cp cc:/etc/passwd cc:/x
cp cc: out
cp cc:/data src/file
$ cd out; find . -printf '%p %y %m %U:%G %l\\n' | sort; wc -c <hostname; cd ..; rm -r out
cp src/file cc:/in1
cp src/file cc:/data/
cp src/file cc:/nope/deep
cp src/file cc:/etc/passwd/x
cp src cc:/in2
cp src cc:/in2
cp src/. cc:/in3
cp src cc:/etc/passwd
cp src/file cc:/dlink
cp src cc:/dlink
cp link cc:/in4
cp -L link cc:/in5
cp link/. cc:/in6
cp dangling cc:/in7
cp -L dangling cc:/in8
cp sock cc:/in9
cp fifo cc:/in10
cp src/file cc:/data/link
cp src/file cc:/data/out
cp -a owned cc:/in11
cp owned cc:/in12
cp src/file cc:/v
cp src/file cc:/v/deep/x
cp src/file cc:/vr
cp src/file cc:/b/x
cp src/file cc:/dev/x
cp src/file cc:/proc/x
cp src/file cc:/etc/hosts
cp src/file cc:relative
cp nofile cc:/x
cp src/file nope:/x
cp - cc:/x
<tar cp - cc:/tmp
<tar cp - cc:/etc/passwd
<gzip cp -a - cc:/tmp
<junk cp - cc:/tmp
<directory cp - cc:/data
<file cp - cc:/data
cp cc:/data/sub - | tar -t
cp cc:/data/link - | tar -t
cp -L cc:/data/link - | tar -t
cp cc:/nope -
diff cc | sort
diff nope
commit -m message -a author -c 'CMD ["a"]' -c 'ENV X=y' cc committed
commit -c 'FROM x' cc committed
commit nope committed
commit cc BAD
inspect -f '{{json .Config.Cmd}}{{json .Config.Env}}{{.Comment}}{{.Author}}' committed
export cc | tar -t | sort
export nope
rm -f cc
create --name ro --read-only -v vol:/v -v rov:/r:ro data sleep 1000
START ro
cp src/file ro:/x
cp src/file ro:/v/x
cp src/file ro:/r/x
cp ro:/v/x - | tar -xO
rm -f ro
rmi committed
"""
# The real daemon's wording, and ours for the same.
DATA_WORDING = (
    ("time=.*(context canceled|closed pipe).*\n", ""), (r"\b[0-9a-f]{64}\b", "ID"),
    (r"\b[0-9a-f]{12}\b", "id"), (r"\d{4}-\d\d-\d\dT[0-9:.]+(Z|[+-]\d\d:\d\d)", "TIME"),
    ("DIR/data/overlay2/ID/merged", ""), ("Invalid filter", "invalid filter"),
    ("failed to create (task for container: failed to create )?shim task: OCI runtime create failed: (runc "
     "create failed: )?unable to start container process: (error during container init: )?", ""),
    (r": mount \S+ \(via [^)]*\), flags: 0x[0-9a-f]+(, data: [^:]+)?", ""), (": unknown", ""),
    (r"Error processing tar file\(exit status 1\): ", ""), ("pathcannot", "path cannot"),
    (r"unlinkat \S+: device|failed to unpack \S+: device", "device"))


def data_tars() -> dict[str, bytes]:
    """What the lines of DATA_COPIES have as their input."""
    tree = tar_of({"one": b"1", "two": (b"2", 0o600)})
    return {"tar": tree, "gzip": gzip.compress(tree), "junk": b"junk" * 300, "file": tar_of({"sub": b""}),
            "directory": tar_of({"link": None})}


def data_files(host: Host) -> None:
    """The files that the lines name, and the image data."""
    host.import_image("data", tar_of(data_entries()), *BUSYBOX_CHANGES)
    for name in ("src/deep", "owned"):
        os.makedirs(host.path(name), exist_ok=True)
    for name, text in (("src/file", "content\n"), ("src/deep/x", ""), ("owned/file", "")):
        Path(host.path(name)).write_text(text)
    os.chown(host.path("owned/file"), 1234, 4321)
    os.chmod(host.path("owned/file"), 0o4751)
    for name, target in (("link", "src"), ("dangling", "nowhere/at/all")):
        os.symlink(target, host.path(name))
    os.mkfifo(host.path("fifo"))
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(host.path("sock"))


def data_answer(host: Host, program: str, line: str, running: bool) -> str:
    """What one of the lines comes to: the exit code, stdout and stderr, in one wording."""
    line = line.replace("{dir}", host.directory).replace("{mounts}", DATA_MOUNTS)
    content = b""
    if line.startswith("START "):
        line = line.replace("START", "start") if running else "$ true"
    if line.startswith("<"):
        name, _, line = line[1:].partition(" ")
        content = data_tars()[name]
    line = line[2:] if line.startswith("$ ") else f"{program} {line}"
    line = re.sub(r"^(\S+ (run|create)) ", r"\1 --net none ", line)
    done = subprocess.run(["sh", "-c", line], cwd=host.directory, input=content, capture_output=True,
                          env={"PATH": PATH, "HOME": host.directory, "DOCKER_HOST": host.url}, timeout=60)
    return worded(f"{done.returncode}\n{done.stdout.decode()}\n{done.stderr.decode()}", host)


def worded(text: str, host: Host) -> str:
    """What a host says, in the wording that both have."""
    text = text.replace(host.directory, "DIR")
    for pattern, word in DATA_WORDING:
        text = re.sub(pattern, word, text)
    return text


@contextlib.contextmanager
def data_hosts(*hosts: Host) -> Iterator[None]:
    """A block in which the hosts have what the lines need, and nothing of it after."""
    try:
        for host in hosts:
            data_files(host)
        yield
    finally:
        for host in hosts:
            host.remove_all()
            for volume in host.api("GET", "/volumes")["Volumes"] or ():
                host.api("DELETE", f"/volumes/{volume['Name']}")
            host.api("DELETE", "/images/data")
            for name in ("src", "owned", "out", "made"):
                shutil.rmtree(host.path(name), ignore_errors=True)
            for name in ("link", "dangling", "fifo", "sock"):
                os.unlink(host.path(name))


def compare_data(ours: Host, peer: Host, program: str, lines: str, running: bool) -> None:
    """AssertionError with all lines that the two answer differently."""
    asked = lines.strip().split("\n")
    with data_hosts(ours, peer), concurrent.futures.ThreadPoolExecutor() as pool:
        answers = pool.map(lambda host: [data_answer(host, program, line, running) for line in asked],
                           (ours, peer))
        assert [found for found in zip(asked, *answers) if found[1] != found[2]] == []


def test_data_as_the_real_daemon_has_it(bridgeless: Host, peer: Host) -> None:
    compare_data(bridgeless, peer, docker_clis()[max(docker_clis())], DATA_LINES, False)


def data_calls(client: Any, directory: str) -> Iterator[Callable[[], Any]]:
    """Calls of docker-py, whose results both daemons give alike."""
    made: list[Any] = []
    mount = docker_py.types.Mount

    def create(**options: Any) -> Any:
        made.append(client.containers.create("data", "sleep 100", network_mode="none", **options))
        made[-1].reload()
        facts = made[-1].attrs
        asked = {key: facts["HostConfig"].get(key) for key in ("Binds", "Mounts", "Tmpfs", "VolumesFrom")}
        shown = sorted(facts["Mounts"], key=lambda point: str(point["Destination"]))
        return [sorted(point.items()) for point in shown], asked, facts["Config"]["Volumes"]

    def get(path: str) -> Any:
        stream, facts = made[0].get_archive(path)
        with tarfile.open(fileobj=io.BytesIO(b"".join(stream))) as tar:
            return facts["name"], facts["size"], facts["mode"], facts["linkTarget"], [
                (item.name, item.type, item.mode & 0o7777, item.uid, item.gid, item.size, item.linkname)
                for item in tar.getmembers()]

    options = {"type": "tmpfs", "device": "tmpfs", "o": "size=1m"}
    yield lambda: sorted(client.volumes.create("one", driver_opts=options,
                                               labels={"a": "b"}).attrs.items(), key=str)
    yield lambda: sorted(client.volumes.create("two").attrs.items(), key=str)
    yield lambda: client.volumes.create("x")
    yield lambda: client.volumes.create("bad", driver_opts={"bad": "1"})
    yield lambda: sorted(volume.name for volume in client.volumes.list(filters={"dangling": True}))
    yield lambda: client.volumes.list(filters={"bad": "1"})
    yield lambda: client.volumes.get("nope")
    yield lambda: create(volumes={directory + "/src": {"bind": "/m", "mode": "ro"},
                                  "two": {"bind": "/w", "mode": "rw"}}, tmpfs={"/t": "size=1m"})
    yield lambda: create(volumes=["/anonymous", directory + "/src:/m:z", "two:/w:nocopy"])
    yield lambda: create(volumes_from=[made[0].id + ":ro"])
    yield lambda: create(mounts=[mount("/m", directory + "/src", type="bind", read_only=True),
                                 mount("/w", "two", no_copy=True, labels={"x": "y"}),
                                 mount("/t", None, type="tmpfs", tmpfs_size="1m", tmpfs_mode=0o700)])
    yield lambda: create(mounts=[mount("/m", "relative", type="bind")])
    yield lambda: create(mounts=[mount("relative", "two")])
    yield from (functools.partial(get, path)
                for path in ("/data", "/data/link", "/nope", "/m/.", "etc/plain"))
    yield from (lambda path=path: made[0].put_archive(path, tar_of({"new": b"1"}))
                for path in ("/w", "/m", "/nope", "/data", ""))
    yield lambda: sorted(made[0].diff(), key=str)
    yield lambda: made[0].commit("data", "again", changes="FROM x")
    yield lambda: len(client.volumes.prune()["VolumesDeleted"] or ())
    yield lambda: [each.remove(v=True) for each in made]
    yield lambda: sorted(volume.name for volume in client.volumes.list())


def test_data_by_docker_py_as_the_real_daemon_has_it(bridgeless: Host, peer: Host) -> None:
    def outcome(call: Callable[[], Any]) -> Any:
        try:
            return call()
        except docker_py.errors.APIError as error:
            return error.status_code, error.explanation

    with data_hosts(bridgeless, peer):
        answers = [[worded(repr(outcome(call)), host) for call in data_calls(
            docker_py.DockerClient(base_url=host.url, version="1.41"), host.directory)]
            for host in (bridgeless, peer)]
    assert [pair for pair in zip(*answers) if pair[0] != pair[1]] == []


@pytest.mark.torture
@pytest.mark.parametrize("lines", [DATA_LINES.rstrip() + DATA_RUNS, DATA_COPIES], ids=["volumes", "cp"])
@pytest.mark.parametrize("version", sorted(docker_clis()))
def test_all_data_as_the_real_daemon_has_it(bridgeless: Host, peer: Host, version: str, lines: str) -> None:
    for running in (False, True)[lines != DATA_COPIES:]:
        compare_data(bridgeless, peer, docker_clis()[version], lines, running)


def test_binds_volumes_and_tmpfs_inside(host: Host, data_image: str) -> None:
    """Each kind is what was asked for, the kernel says; a -v makes its source; anonymous volumes go."""
    before = volume_names(host)
    source, made = host.path("source"), host.path("made", "deep")
    os.makedirs(source, exist_ok=True)
    Path(source, "one").write_text("1")
    name = host.create("sleep", "100", image=data_image, name="data", Volumes={"/anonymous": {}}, HostConfig={
        "Binds": [f"{source}:/ro:ro", f"{made}:/made", "named:/data", f"{source}/one:/etc/single"],
        "Tmpfs": {"/tmp/t": "size=1m,exec,mode=700"},
        "Mounts": [{"Type": "tmpfs", "Target": "/mt", "TmpfsOptions": {"SizeBytes": 65536}},
                   {"Type": "volume", "Source": "named", "Target": "/below",
                    "VolumeOptions": {"Subpath": "sub"}, "ReadOnly": True},
                   {"Type": "image", "Source": "busybox", "Target": "/image"}]})
    host.api("POST", f"/containers/{name}/start")
    shown = host.inspect(name)
    mounts = {line.split()[4]: line for line in
              read_text(f"/proc/{shown['State']['Pid']}/mountinfo").splitlines()}
    assert " ro," in mounts["/ro"] and " rw," in mounts["/made"] and " ro," in mounts["/below"]
    assert "nosuid,nodev,relatime" in mounts["/tmp/t"] and "size=1024k,mode=700" in mounts["/tmp/t"]
    assert "noexec" in mounts["/mt"] and "size=64k" in mounts["/mt"] and "/etc/single" in mounts
    assert os.path.isdir(made) and " ro," in mounts["/image"]
    assert {point["Destination"]: point["Type"] for point in shown["Mounts"]}["/anonymous"] == "volume"
    kept = Path(host.data_root, "volumes", "named", "_data")
    facts = kept.stat()
    assert (facts.st_uid, facts.st_gid, facts.st_mode & 0o7777) == (7, 8, 0o2750)
    assert (kept / "sub").stat().st_mode & 0o7777 == 0o755  # below a setgid directory
    assert os.readlink(kept / "out") == "/etc/passwd" and (kept / "sub/file").stat().st_mode & 0o777 == 0o604
    assert (kept / "hard").stat().st_ino == (kept / "sub/file").stat().st_ino
    refused = host.http("DELETE", f"{API}/volumes/named").json["message"]
    assert refused == f"remove named: volume is in use - [{name}]"
    other = host.create("cat", "/data/sub/file", HostConfig={"VolumesFrom": ["data:ro"]})
    assert host.inspect(other)["Mounts"][0]["RW"] is False
    host.api("DELETE", f"/containers/{other}?v=1")
    host.api("DELETE", f"/containers/{name}?force=1&v=1")
    assert volume_names(host) - before == {"named"}
    host.api("DELETE", "/volumes/named")
    assert not kept.exists()


def test_volumes_are_listed_filtered_renamed_pruned_and_survive(new_host: Callable[..., Host],
                                                                busybox: bytes) -> None:
    host = new_host(environment={"DOCKERD_FAILPOINTS": "volume-rename=kill"})
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    made = host.api("POST", "/volumes/create", {"Name": "one", "Labels": {"a": "b"}})
    assert (made["Driver"], made["Labels"], made["Scope"]) == ("local", {"a": "b"}, "local")
    host.api("POST", "/volumes/create", {"Name": "mem", "DriverOpts": {"type": "tmpfs", "device": "tmpfs",
                                                                       "o": "size=1m"}})
    anonymous = host.api("POST", "/volumes/create", {})["Name"]
    name = host.create("sh", "-c", "echo kept > /one/file; grep ' /mem ' /proc/mounts",
                       HostConfig={"Binds": ["one:/one", "mem:/mem"]})
    host.api("POST", f"/containers/{name}/start")
    assert host.api("POST", f"/containers/{name}/wait")["StatusCode"] == 0
    data = os.path.join(host.data_root, "volumes", "mem", "_data")
    wait_for(lambda: data not in read_text(f"/proc/{host.process.pid}/mountinfo"))  # type: ignore[union-attr]

    def killed() -> bool:
        """By the rename, when it is unmounted: between the directory and the containers' records."""
        with contextlib.suppress(OSError, http.client.HTTPException):
            host.http("POST", f"{API}/volumes/one/rename?name=two")
        return host.process is not None and host.process.poll() is not None

    wait_for(killed, "the daemon to be killed")
    del host.environment["DOCKERD_FAILPOINTS"]
    host.kill()
    for _ in range(2):
        host.start()
        assert host.inspect(name)["Mounts"][1]["Name"] == "two"
        assert {volume["Name"] for volume in host.api("GET", "/volumes")["Volumes"]} == {
            "two", "mem", anonymous}
        host.kill()
    host.start()
    assert archive(host, name, "/one/file") == {"file": b"kept\n"}
    long = host.http("POST", "/volumes/create", {"Name": "a" * 300}).json["message"]
    assert long.endswith(": file name too long") and "Errno" not in long
    costly = urllib.parse.quote(json.dumps({"name": ["(.+)+!"]}))
    assert "is too costly" in host.http("GET", "/volumes?filters=" + costly).json["message"]
    deep = urllib.parse.quote(json.dumps({"name": ["(" * 500 + ")" * 500]}))
    assert not host.api("GET", "/volumes?filters=" + deep)["Volumes"]
    filters = {"label": ["a=b"], "dangling": ["false"]}
    listed = host.api("GET", "/volumes?filters=" + urllib.parse.quote(json.dumps(filters)))
    assert [volume["Name"] for volume in listed["Volumes"]] == ["two"]
    assert host.api("POST", "/volumes/prune")["VolumesDeleted"] == [anonymous]
    host.api("DELETE", f"/containers/{name}?v=1")
    everything = urllib.parse.quote(json.dumps({"all": ["1"]}))
    assert host.api("POST", f"/volumes/prune?filters={everything}")["VolumesDeleted"] == ["two"]
    host.api("DELETE", "/volumes/mem")  # with options it may be another host's: prune spares it
    assert os.listdir(os.path.join(host.data_root, "volumes")) == []
    assert os.stat(os.path.join(host.data_root, "volumes")).st_mode & 0o777 == 0o701  # CVE-2021-41091


def test_propagation_and_recursive_read_only(host: Host) -> None:
    """What is mounted on the host later shows through a shared bind alone; read-only goes down the tree."""
    source = host.path("shared")
    os.makedirs(source + "/deep", exist_ok=True)
    script = "mount --bind {0} {0}; mount --make-shared {0}; mount -t tmpfs none {0}/deep"
    host.enter("sh", "-c", script.format(source)).wait()
    name = host.create("sleep", "100", HostConfig={
        "Binds": [f"{source}:/slave:rslave", f"{source}:/private", f"{source}:/ro:ro"]})
    host.api("POST", f"/containers/{name}/start")
    host.enter("sh", "-c", f"mkdir {source}/late; mount -t tmpfs none {source}/late").wait()
    mounts = read_text(f"/proc/{host.inspect(name)['State']['Pid']}/mountinfo")
    assert " /slave/late " in mounts and " /private/late " not in mounts
    assert re.search(r" /ro/deep ro,", mounts) and re.search(r" /private/deep rw,", mounts)
    name = host.create("true", HostConfig={"Binds": [f"{host.directory}:/x:rshared"]})
    text = host.http("POST", f"{API}/containers/{name}/start").json["message"]
    assert "but it is not a shared mount" in text
    host.enter("umount", "-R", source).wait()


def test_a_container_of_a_limited_size(new_host: Callable[..., Host], host: Host, busybox: bytes,
                                       tmp_path: Path) -> None:
    """--storage-opt size=, on a data root that can, and Docker's refusal on one that cannot."""
    with loop_file_system("btrfs", tmp_path) as root:
        limited = new_host("-s", "btrfs", "-g", str(root))
        limited.import_image("busybox", busybox, *BUSYBOX_CHANGES)
        script = "dd if=/dev/urandom of=/big bs=64k count=640 2>&1; stat -c %s /big"
        _, output = limited.run("sh", "-c", script, HostConfig={"StorageOpt": {"size": "10m"}})
        assert b"Disk quota exceeded" in output and int(output.split()[-1]) < 10 << 20
        assert limited.run("sh", "-c", script)[1].endswith(b"\n41943040\n")
    for program in docker_clis().values():
        for option, text in (("size=1g", "--storage-opt is supported only for overlay over xfs with 'pquota' "
                                         "mount option, or over ext4 with 'prjquota'"),
                             ("size=x", "invalid size: 'x'"), ("bogus=1", "unknown option bogus")):
            done = Docker(program, host).run("create", "--storage-opt", option, "--net=none", "busybox",
                                             status=1)
            assert done.stderr.strip() == f"Error response from daemon: {text}"


def test_binds_with_mapped_owners(host: Host) -> None:
    source = host.path("mapped")
    os.makedirs(source, exist_ok=True)
    Path(source, "file").write_text("")
    mode = "idmap=uids=0-1000-1#gids=0-100-1"
    code, output = host.run("stat", "-c", "%u:%g", "/m/file", HostConfig={"Binds": [f"{source}:/m:{mode}"]})
    assert (code, output) == (0, b"1000:100\n")


def test_a_view_opens_no_device(tmp_path: Path) -> None:
    """A running container may put one where a file was seen."""
    for name in ("root", "volume"):
        (tmp_path / name / "v").mkdir(parents=True)
        os.mknod(tmp_path / name / "null", stat.S_IFCHR | 0o666, os.makedev(1, 3))
    (tmp_path / "place").mkdir()
    flags = dockerd.OPEN_TREE_CLONE | dockerd.OPEN_TREE_CLOEXEC
    with contextlib.ExitStack() as held:
        root, volume = (held.enter_context(dockerd.closing_fd(dockerd.open_tree(
            dockerd.AT_FDCWD, str(tmp_path / name), flags))) for name in ("root", "volume"))

        def tried(path: str) -> int:
            assert os.stat(path).st_rdev == os.makedev(1, 3)
            try:
                return os.open(path, os.O_RDONLY) and 0
            except OSError as error:
                return error.errno or 0

        view = dockerd.View(str(tmp_path / "place"), root, [(volume, "/v")])
        assert dockerd.confined(view, lambda: [*map(tried, ("null", "v/null"))]) == [errno.EACCES] * 2


def test_a_rename_holds_no_lock_while_containers_take_theirs(tmp_path: Path) -> None:
    """A start takes its container's lock, then the volume's."""
    volumes = dockerd.Volumes(str(tmp_path), lambda *event: None)
    volumes.create("one")
    free: list[bool] = []
    volumes.renamed = lambda volume, old: free.append(volume.lock.acquire(blocking=False))
    engine = Engine()
    engine.install(volumes)
    engine.job("volume_rename", "one", name="two").run()
    assert free == [True] and volumes.get("two")


def test_a_copy_up_that_comes_to_no_end_leaves_the_volume_empty(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    """So that the next container fills it; what a container that uses it has written stays."""
    volumes = dockerd.Volumes(str(tmp_path), lambda *event: None)
    volume = volumes.create("one")

    def fail(directory: str) -> None:
        os.makedirs(directory + "/half/way")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        volume.fill(fail)
    assert os.listdir(volume.data) == [] and not volume.lock.locked()
    monkeypatch.setattr(volume, "clear_unfilled", lambda: None)  # the daemon is killed
    with pytest.raises(OSError, match="No space left"):
        volume.fill(fail)
    assert os.listdir(volume.data) == ["half"]
    volume = dockerd.Volumes(str(tmp_path), lambda *event: None).get("one")
    assert os.listdir(volume.data) == []
    volume.mount("user")
    with pytest.raises(OSError, match="No space left"):
        volume.fill(fail)
    assert os.listdir(volume.data) == ["half"]
    volume.fill(fail)  # it is not empty: nothing is copied


def test_labels_of_binds(tmp_path: Path) -> None:
    """z and Z, as far as a kernel without SELinux has it: each file's attribute, never through a link."""
    (tmp_path / "bound/sub").mkdir(parents=True)
    (tmp_path / "outside").write_text("")
    (tmp_path / "bound/sub/file").write_text("")
    os.symlink(tmp_path / "outside", tmp_path / "bound/link")
    for shared, level in ((False, b"s0:c1,c2"), (True, b"s0")):
        dockerd.relabel(str(tmp_path / "bound"), "system_u:object_r:container_file_t:s0:c1,c2", shared)
        labels = {os.getxattr(tmp_path / name, "security.selinux", follow_symlinks=False)
                  for name in ("bound", "bound/sub", "bound/sub/file", "bound/link")}
        assert labels == {b"system_u:object_r:container_file_t:" + level}
    assert "security.selinux" not in os.listxattr(tmp_path / "outside")
    with pytest.raises(DockerError, match="^SELinux relabeling of /usr is not allowed$"):
        dockerd.relabel("/usr/../usr", "a:b:c:s0", True)


COMPOSED_DATA = """
version: "3.7"
services:
  app:
    image: busybox
    command: sleep 1000
    network_mode: none
    stop_grace_period: 0s
    environment: {STEP: "%s"}
    volumes:
      - data:/data
      - ./bound:/bound
      - /anonymous
      - {type: tmpfs, target: /memory}
    tmpfs: [/scratch]
volumes:
  data: {labels: {kept: "yes"}}
"""


@pytest.mark.parametrize("version", [1, 2])
def test_compose_with_data(host: Host, version: int) -> None:
    """What is in volumes and binds survives recreation, what is in a tmpfs does not; down -v removes them."""
    compose = Compose(version, host, COMPOSED_DATA % "one")
    compose("up", "-d")
    docker = Docker(docker_clis()[max(docker_clis())], host)
    places = ("data", "bound", "anonymous", "memory", "scratch")
    write = "; ".join(f"echo {place} >/{place}/file" for place in places)
    first = compose("ps", "-q", "app")
    docker("exec", first, "sh", "-c", write)
    compose = Compose(version, host, COMPOSED_DATA % "two")
    compose("up", "-d")
    second = compose("ps", "-q", "app")
    read = "; ".join(f"cat /{place}/file" for place in places)
    shown = docker.run("exec", second, "sh", "-c", read + "; true").stdout.split()
    assert first != second and shown == ["data", "bound", "anonymous"]
    assert Path(host.path("bound", "file")).read_text() == "bound\n"
    compose("down")
    assert "project_data" in volume_names(host)
    compose("up", "-d")
    assert docker("exec", compose("ps", "-q", "app"), "cat", "/data/file") == "data"
    compose("down", "-v")
    assert docker("volume", "ls", "-q", "-f", "label=kept=yes") == ""
    assert "project_data" not in volume_names(host)
    shutil.rmtree(host.path("bound"))


def test_places_of_mounts(host: Host, data_image: str) -> None:
    """As in Docker: a link that leads nowhere has its target made; what is no place for it is told of."""
    host.import_image("places", tar_of({**busybox_entries(), "dangling": link_entry("dangling", "no/where")}),
                      *BUSYBOX_CHANGES)
    _, output = host.run("ls", "/no/where", image="places", HostConfig={"Mounts": [
        {"Type": "volume", "Source": "place", "Target": "/dangling"},
        {"Type": "tmpfs", "Target": "/dangling/below"}]})
    assert output == b"below\n"
    file = host.path("a-file")
    Path(file).write_text("")
    for bind, code, text in (
            (f"{file}:/etc", 127, f'error mounting "{file}" to rootfs at "/etc": not a directory'),
            ("place:/proc", 128, '"/proc" cannot be mounted because it is not of type proc'),
            ("place:/proc/new", 128, '"/proc/new" cannot be mounted because it is inside /proc'),
            ("place:/sys/new", 128, '/sys/new": read-only file system'),
            ("place:/dev", 127, "stat /dev/null: no such file or directory")):
        name = host.create("true", HostConfig={"Binds": [bind + ":nocopy" if bind[0] == "p" else bind]})
        answer = host.api("POST", f"/containers/{name}/start", status=500 if code == 128 else 400)
        assert text in answer["message"] and host.inspect(name)["State"]["ExitCode"] == code, answer
    host.remove_all()
    host.api("DELETE", "/images/places")
    host.api("DELETE", "/volumes/place")


@pytest.mark.parametrize("running", [False, True], ids=["stopped", "running"])
def test_cp_diff_and_export(host: Host, data_image: str, running: bool) -> None:
    name = host.create("sleep", "100", image=data_image, name="copied", User="bob",
                       HostConfig={"Binds": ["cp-volume:/v", "cp-volume:/vr:ro"]})
    if running:
        host.api("POST", f"/containers/{name}/start")
    assert archive(host, name, "/data/sub") == {"sub": b"", "sub/file": b"hello\n"}
    assert archive(host, name, "/dlink") == {"dlink": b""}
    assert set(archive(host, name, "/dlink/.")) == {".", "./file"}
    stat_header = host.http("HEAD", f"{API}/containers/{name}/archive?path=/data/link").headers
    facts = json.loads(base64.b64decode(stat_header["X-Docker-Container-Path-Stat"]))
    assert (facts["name"], facts["mode"], facts["linkTarget"]) == ("link", 1 << 27 | 0o777, "/data/sub/file")
    assert put(host, name, "/v", {"file": b"in the volume"}).status == 200
    kept = Path(host.data_root, "volumes", "cp-volume", "_data", "file")
    assert kept.read_bytes() == b"in the volume"
    assert archive(host, name, "/v/file") == {"file": b"in the volume"}
    assert put(host, name, "/v", {"own": b""}, "&copyUIDGID=1").status == 200
    assert (kept.parent / "own").stat().st_uid == 1000
    for path, status, text in (("/etc/passwd/x", 500, "lstat /etc/passwd/x: not a directory"),
                               ("/a%00b", 400, 'lstat "/a\\u0000b": invalid argument'),
                               ("/a%0ab", 404, f"Could not find the file /a\nb in container {name}"),
                               ("", 400, "bad parameter: path cannot be empty")):
        answer = host.http("GET", f"{API}/containers/{name}/archive?path={path}")
        assert (answer.status, answer.json["message"]) == (status, text)
    for path, status, text in (("/vr", 500, "mounted volume is marked read-only"),
                               ("/etc/passwd", 400, "extraction point is not a directory"),
                               ("/nope", 404, f"Could not find the file /nope in container {name}")):
        answer = put(host, name, path, {"file": b""})
        assert (answer.status, answer.json["message"]) == (status, text)
    assert put(host, name, "/data", {"sub": b""}, "&noOverwriteDirNonDir=1").status == 400
    assert put(host, name, "/data/sub", {"new": b"1"}).status == 200
    changes = {change["Path"]: change["Kind"] for change in host.api("GET", f"/containers/{name}/changes")}
    assert changes == {"/data": 0, "/data/sub": 0, "/data/sub/new": 1, "/v": 1, "/vr": 1}
    exported = host.http("GET", f"{API}/containers/{name}/export").body
    with tarfile.open(fileobj=io.BytesIO(exported)) as tar:
        assert {"data/sub/new", "v", "etc/passwd"} <= set(tar.getnames()) and "v/file" not in tar.getnames()
    host.api("DELETE", f"/containers/{name}?force=1")
    host.api("DELETE", "/volumes/cp-volume")


def test_an_entry_that_somebody_else_makes_at_the_same_time() -> None:
    """Two copies to one place: what the other has put there again is removed again."""
    refusals = [FileExistsError, FileExistsError]

    def make() -> int:
        if refusals:
            raise refusals.pop()
        return 7

    assert dockerd.Unpacker(dockerd.TarReader(None), "", IdMap(), UnpackLimits())._place(b"/none", make) == 7


def test_copies_that_end_badly_and_at_the_same_time(new_host: Callable[..., Host], busybox: bytes) -> None:
    """A disk that is full, a client that goes, another copy to the same place: a clear error, whole files,
    and nothing stays open or mounted."""
    host = new_host(start=False)
    os.mkdir(host.data_root)
    host.enter("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", host.data_root).wait()
    host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
    full, name = host.create("true"), host.create("true")
    assert archive(host, name, "/etc/plain") and archive(host, full, "/etc/plain")
    table = f"/proc/{host.process.pid}/fd"  # type: ignore[union-attr]
    before = len(os.listdir(table))
    answer = put(host, full, "/tmp", {"large": bytes(20 << 20)})
    assert (answer.status, answer.json["message"]) == (
        500, 'failed to unpack "large": no space left on device')
    host.api("DELETE", f"/containers/{full}")
    files = [f"file{number}" for number in range(300)]
    trees = [tar_of(dict.fromkeys(files, letter * 5000)) for letter in (b"a", b"b")]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        path = f"{API}/containers/{name}/archive?path=/tmp"
        answers = list(pool.map(lambda tree: host.http("PUT", path, tree), trees * 2))
    assert [answer.status for answer in answers] == [200] * 4
    found = archive(host, name, "/tmp")
    assert {found[f"tmp/{file}"] for file in files} <= {b"a" * 5000, b"b" * 5000}
    with socket.socket(socket.AF_UNIX) as client:
        client.connect(host.socket)
        client.sendall(f"PUT {path} HTTP/1.1\r\nHost: x\r\nContent-Length: 99999999\r\n\r\n".encode()
                       + tar_of({"whole": b"", "half": bytes(1 << 20)})[:1 << 20])
        wait_for(lambda: len(os.listdir(table)) > before)
    wait_for(lambda: len(os.listdir(table)) <= before, "everything to be closed")
    assert "unexpected EOF" in host.log()
    host.api("DELETE", f"/containers/{name}")
    assert host.stop() == 0
    host.enter("umount", host.data_root).wait()


def test_diff_of_replaced_directories(host: Host, data_image: str) -> None:
    """Deletions, also by directories that were replaced, and links that became directories."""
    name = host.create("sh", "-c", "rm -r /data/sub /dlink; mkdir -p /data/sub /dlink; echo >/dlink/file",
                       image=data_image)
    host.api("POST", f"/containers/{name}/start")
    host.api("POST", f"/containers/{name}/wait")
    changes = {change["Path"]: change["Kind"] for change in host.api("GET", f"/containers/{name}/changes")}
    assert changes == {"/data": 0, "/data/sub": 0, "/data/sub/file": 2, "/dlink": 0, "/dlink/file": 1} or \
        changes == {"/data": 0, "/data/sub/file": 2, "/dlink": 0, "/dlink/file": 1}


@OFF_AND_ON
def test_cp_follows_no_link_out_cve_2018_15664_2014_6407(
    new_host: Callable[..., Host], busybox: bytes, defended: bool
) -> None:
    """Links of the container and of the archive lead to the host's files, to read and to write, unless the
    copying thread is confined (also CVE-2014-9357, CVE-2021-41089)."""
    host = new_host(environment=switched("chroot", defended))
    secret = host.path("secret")
    os.makedirs(secret)
    Path(secret, "file").write_text("the host's")
    tree = {**busybox_entries(), "evil": link_entry("evil", secret)}
    host.import_image("evil", tar_of(tree), *BUSYBOX_CHANGES)
    name = host.create("sleep", "100", image="evil")
    answer = host.http("GET", f"{API}/containers/{name}/archive?path=/evil/file")
    assert (b"the host's" in answer.body) != defended
    put(host, name, "/evil/", {"written": b""})
    assert os.path.exists(secret + "/written") != defended
    put(host, name, "/tmp", {"x": link_entry("x", secret), "x/through": b""})
    assert os.path.exists(secret + "/through") != defended


@OFF_AND_ON
def test_volumes_spare_proc_cve_2019_16884_2019_19921_2021_30465(
    new_host: Callable[..., Host], defended: bool, tmp_path: Path
) -> None:
    """A volume whose place is a link into /proc, or an image's own for all of it, would hide what protects
    the container, and cp through a bound /proc would follow a process's links to the host's root."""
    own_proc = ('if entry["to"] == "/proc" and statfs_type(made) != PROC_SUPER_MAGIC:', "if False:")
    host = new_host(**({} if defended else {
        "environment": {"DOCKERD_FAILPOINTS": "proc-cover=off,view-proc=off"},
        "program": weakened(tmp_path, own_proc)}))
    tree = {**busybox_entries(), "x": link_entry("x", "/proc/self/attr")}
    host.import_image("evil", tar_of(tree), *BUSYBOX_CHANGES, 'VOLUME ["/proc"]')
    name = host.create("sleep", "1000", image="evil")
    files = ("own", "sys/net/ipv4/ip_unprivileged_port_start", "sys/net/ipv4/ping_group_range")
    assert put(host, name, "/proc", dict.fromkeys(files, b"")).status == 200
    answer = host.http("POST", f"{API}/containers/{name}/start")
    assert (answer.status != 204) == defended, answer.body
    if defended:
        assert '"/proc" cannot be mounted because it is not of type proc' in answer.json["message"]
    else:  # the image's files, where its labels and limits would be written and what is masked would be
        own = Path(host.data_root, "volumes", host.inspect(name)["Mounts"][0]["Name"], "_data", files[1])
        assert own.read_bytes() == b"0"  # was written into the volume
    host.remove_all()
    host.import_image("evil", tar_of(tree), *BUSYBOX_CHANGES)
    for place in ("/x", "/proc/self/attr"):
        name = host.create("true", image="evil", HostConfig={"Binds": [f"v1:{place}"]})
        answer = host.http("POST", f"{API}/containers/{name}/start")
        assert (answer.status != 204) == defended, answer.body
        if defended:
            assert "cannot be mounted because it is inside /proc" in answer.json["message"]
    name = host.create("true", image="evil", HostConfig={"Binds": ["/proc:/host"]})
    path = f"/host/{host.process.pid}/root/etc/passwd"  # type: ignore[union-attr]
    answer = host.http("GET", f"{API}/containers/{name}/archive?path={path}")
    assert (answer.status == 200) != defended


# ------------------------------------------------------------------------------------------------------------
# Logs
#
# Log files are compared byte for byte with those of the real dockerd; what goes to a server is read from a
# socket that a server would have, in the host's namespaces, and decoded by the wire format's own rules.
# ------------------------------------------------------------------------------------------------------------

LOG_SCRIPT = (
    "printf 'a\\tb<&>\"\\\\\\033\\b\\f\\r\\n\\n\\377\\303\\342\\200\\250\\342\\200\\251'; "
    "printf '\\357\\277\\275\\177\\303\\251\\n'; "
    "for n in 16383 16384 16385 40000; do head -c $n /dev/zero | tr '\\0' x; echo; done; printf end"
)
LOG_LABELS: dict[str, Any] = {"Labels": {"one": "<1", "two": "2", "three": "3"},
                              "Env": ["A=a", "B=b c", "C=c"]}
LOG_CHOICE = {"labels": "one,none", "labels-regex": "^tw", "env": "A", "env-regex": "^B",
              "tag": "{{.Name}}|{{.DaemonName}}|{{ .ImageName }}"}


def logged(host: Host, script: str, kind: str, options: dict[str, str], **config: Any) -> str:
    """Run a shell script to its end with a log driver; returns the container's id."""
    host.http("DELETE", "/containers/logged?force=1")
    log = {"Type": kind, "Config": options}
    body = {"Image": "busybox", "Cmd": ["sh", "-c", script], **config,
            "HostConfig": {"NetworkMode": "none", "LogConfig": log, **config.get("HostConfig", {})}}
    answer = host.http("POST", "/v1.41/containers/create?name=logged", body)
    assert answer.status == 201, answer.body
    started = host.http("POST", "/v1.41/containers/logged/start")
    assert started.status == 204, started.body
    assert host.http("POST", "/v1.41/containers/logged/wait").status == 200
    return str(answer.json["Id"])


def log_file(host: Host, identity: str, kind: str) -> bytes:
    """The log on the disk, without what differs in each run: times and the identities of long lines."""
    name = {"json-file": f"{identity}-json.log", "local": "local-logs/container.log"}[kind]
    with open(os.path.join(host.data_root, "containers", identity, name), "rb") as file:
        data = re.sub(rb'"time":"[^"]*"', b'"time":""', file.read())
    return re.sub(rb"[0-9a-f]{64}", b"ID", re.sub(rb"\x10[\x80-\xff]{8}[\x00-\x7f]", b"\x10T", data))


@pytest.mark.parametrize("redirect", ["", " >&2"], ids=["stdout", "stderr"])
@pytest.mark.parametrize("kind, options", [("json-file", {}), ("json-file", LOG_CHOICE), ("local", {})],
                         ids=["json-file", "attributes", "local"])
def test_log_files_are_the_real_ones(
    host: Host, peer: Host, kind: str, options: dict[str, str], redirect: str
) -> None:
    """Escapes, bad UTF-8, lines around and above 16 KiB, a last line without its end, attributes.

    `logs` of local is better here: the peer's forgets the newline at the end of a long line."""
    script, found = f"{{ {LOG_SCRIPT}; }}{redirect}", []
    for daemon in (host, peer):
        identity = logged(daemon, script, kind, options, **LOG_LABELS)
        answers = [daemon.http("GET", f"/v1.41/containers/logged/logs?stdout=1&stderr=1&{query}").body
                   for query in ("details=1", "tail=2")]
        found.append((log_file(daemon, identity, kind), answers if kind == "json-file" else []))
    assert found[0] == found[1]
    assert len(found[0][0]) > 80000


@pytest.mark.parametrize("kind", ["json-file", "local"])
@pytest.mark.parametrize("compress", ["false", "true"])
def test_logs_rotate(host: Host, kind: str, compress: str) -> None:
    """Files of max-size and one entry at most, not more than max-file; read as one log, from any tail on."""
    options = {"max-size": "10000", "max-file": "3", "compress": compress}
    identity = logged(host, "seq 1000 4999", kind, options)
    directory = os.path.join(host.data_root, "containers", identity, "local-logs" if kind == "local" else "")
    names = sorted(name for name in os.listdir(directory) if "log" in name and name != "local-logs")
    assert [name.partition("log")[2] for name in names] == ["", *[
        f".{number}{'.gz' if compress == 'true' else ''}" for number in (1, 2)]]
    for name in names[1:]:
        with open(os.path.join(directory, name), "rb") as file:
            data = file.read()
        if compress == "true":
            data = gzip.decompress(data)
        assert 10000 <= len(data) < 10100
    lines = logged_lines(host)
    assert lines == [b"%d" % number for number in range(5000 - len(lines), 5000)]
    assert 200 < len(lines) < 1000
    for tail in (0, 1, 150, 500, len(lines), 9999):
        assert logged_lines(host, f"&tail={tail}") == lines[max(0, len(lines) - tail):]


def logged_lines(host: Host, query: str = "") -> list[bytes]:
    """What `logs` answers of stdout, in lines."""
    answer = host.http("GET", "/v1.41/containers/logged/logs?stdout=1" + query)
    assert answer.status == 200, answer.body
    return demultiplex(answer.body)[0].splitlines()


def test_a_log_that_cannot_rotate_keeps_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without room for a new file nothing is renamed and nothing goes, however often it is tried."""
    log = dockerd.FileLog(str(tmp_path / "log"), dockerd.JsonLines, dockerd.json_file_rotation)
    log.open(dockerd.LogInfo({"max-size": "300", "max-file": "3"}, "id", "/c", "", "", "", "", {}, []))

    def write(words: str) -> None:
        for word in words.split():
            log.write(dockerd.LogRecord(dockerd.STDOUT, 1, word.encode() * 100 + b"\n"))

    write("a b c d e")
    kept, real = {entry.text[:1] for entry in log.read()}, os.open
    assert len(log.files()) == 3

    def full(path: Any, flags: int, *arguments: Any, **options: Any) -> int:
        if flags & os.O_CREAT:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, flags, *arguments, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "open", full)
        write("f g h i j")
    assert {entry.text[:1] for entry in log.read()} == kept | {b"%c" % letter for letter in b"fghij"}
    write("k")
    assert sorted(os.listdir(tmp_path)) == ["log", "log.1", "log.2"]
    log.close()


@pytest.mark.parametrize("kind, options", [
    ("json-file", {"max-size": "5k", "max-file": "2"}), ("json-file", {"max-size": "5k"}),
    ("local", {"max-size": "5k", "max-file": "3"})], ids=["two", "one", "compressed"])
def test_following_over_rotations_misses_nothing(host: Host, kind: str, options: dict[str, str]) -> None:
    """A follower gets each line once, whatever has rotated meanwhile; and until and since cut by time."""
    identity = host.create("sh", "-c", "echo begin; read x; seq 1 5000", OpenStdin=True, name="logged",
                           HostConfig={"LogConfig": {"Type": kind, "Config": options}})
    host.api("POST", f"/containers/{identity}/start")
    follower = host.hijack(f"{API}/containers/{identity}/logs?stdout=1&follow=1", method="GET")
    assert b"begin\n" in follower.read_until(b"begin\n")
    stdin = host.hijack(f"{API}/containers/{identity}/attach?stdin=1&stream=1")
    stdin.send(b"\n")
    text = follower.read_until(b"\r\n0\r\n\r\n").split(b"\n")
    assert [line for line in text if line.isdigit() and line != b"0"] == []
    numbers = re.findall(rb"\x01\0\0\0\0\0\0.([0-9]+)\n", b"\n".join(text), re.S)
    assert numbers == [b"%d" % number for number in range(1, 5001)]
    stdin.close()
    follower.close()
    assert logged_lines(host, f"&until={time.time() - 3600:.0f}") == []
    assert logged_lines(host, f"&since={time.time() + 3600:.0f}") == []


@pytest.mark.parametrize("kind, name", [("json-file", "{}-json.log"), ("local", "local-logs/container.log")])
def test_a_log_that_somebody_empties(host: Host, kind: str, name: str) -> None:
    """It goes on from there, rotates by what is in it, and who follows it gets all that comes."""
    config = {"Type": kind, "Config": {"max-size": "1k", "max-file": "2"}}
    identity = host.create("sh", "-c", "while read x; do echo $x; done", OpenStdin=True, name="logged",
                           HostConfig={"LogConfig": config})
    path = os.path.join(host.data_root, "containers", identity, name.format(identity))
    host.api("POST", f"/containers/{identity}/start")
    streams = [host.hijack(f"{API}/containers/logged/{query}", method) for method, query in (
        ("POST", "attach?stdin=1&stream=1"), ("GET", "logs?stdout=1&follow=1"))]
    with contextlib.closing(streams[0]) as stdin, contextlib.closing(streams[1]) as follower:
        for text in (b"x" * 700, b"y" * 500, b"z" * 300):
            stdin.send(text + b"\n")
            follower.read_until(text + b"\n")
            assert logged_lines(host) == [text]
            os.truncate(path, 0)
    assert not [other for other in os.listdir(os.path.dirname(path)) if ".log." in other]


def test_a_torn_log_is_mended(host: Host) -> None:
    """What a power cut tore at the end of a log goes with the next start, and the rest is read."""
    for kind, name in (("json-file", "{}-json.log"), ("local", "local-logs/container.log")):
        identity = logged(host, "echo one", kind, {})
        path = os.path.join(host.data_root, "containers", identity, name.format(identity))
        with open(path, "ab") as file:
            file.write(b'\0\0\0\x20{"log":"tor')
        host.api("POST", "/containers/logged/start")
        host.api("POST", "/containers/logged/wait")
        assert logged_lines(host) == [b"one", b"one"]


# What the real dockerd 20.10.24 says: at the creation, at the start.

LOG_REFUSALS: list[tuple[str, dict[str, str], str]] = [
    ("awslogs", {}, 'error looking up logging plugin awslogs: plugin "awslogs" not found'),
    ("local", {"x": ""}, "unknown log opt 'x' for log driver local"),
    ("syslog", {"x": ""}, "unknown log opt 'x' for syslog log driver"),
    ("journald", {"x": ""}, "unknown log opt 'x' for journald log driver"),
    ("fluentd", {"x": ""}, "unknown log opt 'x' for fluentd log driver"),
    ("gelf", {"gelf-address": "udp://h:1", "x": ""}, 'unknown log opt "x" for gelf log driver'),
    ("gelf", {}, "gelf-address is a required parameter"),
    ("gelf", {"gelf-address": "http://x"}, "gelf-address should be in form proto://address, got http://x"),
    ("gelf", {"gelf-address": "udp://"}, "gelf: please provide gelf-address as proto://host:port"),
    ("gelf", {"gelf-address": "udp://h:1", "gelf-compression-type": "x"},
     'unknown value "x" for log opt "gelf-compression-type" for gelf log driver'),
    ("gelf", {"gelf-address": "tcp://h:1", "gelf-compression-level": "1"},
     "compression is only supported on UDP"),
    ("gelf", {"gelf-address": "udp://h:1", "gelf-tcp-max-reconnect": "1"},
     '"gelf-tcp-max-reconnect" is only valid for TCP'),
    ("gelf", {"gelf-address": "tcp://h:1", "gelf-tcp-max-reconnect": "x"},
     '"gelf-tcp-max-reconnect" must be a positive integer'),
    ("fluentd", {"fluentd-address": "foo:bar"},
     'invalid fluentd-address foo:bar: strconv.Atoi: parsing "bar": invalid syntax'),
    ("fluentd", {"fluentd-retry-wait": "x"}, 'time: invalid duration "x"'),
    ("fluentd", {"fluentd-async": "x"}, 'strconv.ParseBool: parsing "x": invalid syntax'),
    ("fluentd", {"fluentd-max-retries": "x"}, 'strconv.ParseUint: parsing "x": invalid syntax'),
    ("syslog", {"syslog-address": "x://y"}, "syslog-address should be in form proto://address, got x://y"),
    ("syslog", {"syslog-address": "unix:///nonexist"}, "stat /nonexist: no such file or directory"),
    ("syslog", {"syslog-facility": "x"}, "invalid syslog facility"),
    ("syslog", {"syslog-format": "x"}, "Invalid syslog format"),
    ("json-file", {"mode": "x"}, "logger: logging mode not supported: x"),
    ("json-file", {"max-buffer-size": "1m"},
     "logger: max-buffer-size option is only supported with 'mode=non-blocking'"),
    ("json-file", {"max-buffer-size": "x", "mode": "non-blocking"},
     "error parsing option max-buffer-size: invalid size: 'x'"),
    ("syslog", {"cache-disabled": "x"}, "invalid value for option cache-disabled: x"),
]
LOG_START_REFUSALS: list[tuple[str, dict[str, str], str]] = [
    ("fluentd", {}, "dial tcp 127.0.0.1:24224: connect: connection refused"),
    ("fluentd", {"fluentd-address": "unix://"}, "dial unix: missing address"),
    ("gelf", {"gelf-address": "tcp://127.0.0.1:5"},
     "gelf: cannot connect to GELF endpoint: 127.0.0.1:5 dial tcp 127.0.0.1:5: connect: connection refused"),
    ("syslog", {}, "Unix syslog delivery error"),
    ("syslog", {"syslog-address": "tcp://"}, "dial tcp :514: connect: connection refused"),
    ("syslog", {"syslog-address": "tcp+tls://127.0.0.1:1", "syslog-tls-ca-cert": "/nope"},
     'could not read CA certificate "/nope": open /nope: no such file or directory'),
    ("journald", {}, "journald is not enabled on this host"),
    ("json-file", {"max-size": "x"}, "invalid size: 'x'"),
    ("json-file", {"max-size": "0"}, "max-size must be a positive number"),
    ("json-file", {"max-file": "0"}, "max-file cannot be less than 1"),
    ("json-file", {"max-file": "x"}, 'strconv.Atoi: parsing "x": invalid syntax'),
    ("json-file", {"compress": "true"},
     "compress cannot be true when max-file is less than 2 or max-size is not set"),
    ("json-file", {"tag": "{{.Nope}}"}, 'template: log-tag:1:2: executing "log-tag" at <.Nope>: '
     "can't evaluate field Nope in type *logger.Info"),
    ("json-file", {"tag": "{{"}, "template: log-tag:1: unclosed action"),
    ("local", {"max-size": "x"}, "invalid value for max-size: x: invalid size: 'x'"),
    ("local", {"max-file": "1"}, "compression cannot be enabled when max file count is 1"),
]


def test_log_options_are_refused_as_docker_does(host: Host) -> None:
    """Each row by itself; after a failed start the container shows why, and nothing of it is left."""
    hidden = [path for path in ("/dev/log", "/run/systemd/journal/socket") if not host.enter(
        "sh", "-c", f"test -S {path} && mount --bind /dev/null {path}").wait()]
    for refusals, start in ((LOG_REFUSALS, False), (LOG_START_REFUSALS, True)):
        for kind, options, text in refusals:
            body = {"Image": "busybox", "Cmd": ["true"],
                    "HostConfig": {"NetworkMode": "none", "LogConfig": {"Type": kind, "Config": options}}}
            answer = host.http("POST", f"{API}/containers/create", body)
            if start:
                identity = answer.json["Id"]
                answer = host.http("POST", f"{API}/containers/{identity}/start")
                text = "failed to initialize logging driver: " + text
                state = host.inspect(identity)["State"]
                assert (state["Error"], state["ExitCode"], state["Status"]) == (text, 128, "created")
            assert (answer.status, answer.json["message"]) == (500 if start else 400, text)
    for path in hidden:
        host.enter("umount", path).wait()
    assert host.cgroups() == [path for path in host.cgroups() if path.endswith(host.cgroup_parent)]


def test_logs_are_followed_to_the_end_of_the_container(host: Host) -> None:
    """Also where it has closed its streams long before."""
    identity = host.create("sh", "-c", "echo one; exec >&- 2>&-; read x; sleep .2", OpenStdin=True)
    host.api("POST", f"/containers/{identity}/start")
    following = host.hijack(f"{API}/containers/{identity}/logs?stdout=1&follow=1", "GET", upgrade=False)
    seen: list[Any] = []
    thread = threading.Thread(target=lambda: seen.extend([
        following.read_until(b"\r\n0\r\n\r\n"), host.inspect(identity)["State"]["Status"]]))
    thread.start()
    pid = host.inspect(identity)["State"]["Pid"]
    wait_for(lambda: not {"1", "2"} & set(os.listdir(f"/proc/{pid}/fd")))
    with contextlib.closing(host.hijack(f"{API}/containers/{identity}/attach?stream=1&stdin=1")) as stream:
        stream.send(b"x\n")
        thread.join()
    assert b"one\n" in seen[0] and seen[1] == "exited"
    following.close()


def test_the_daemon_s_log_options(new_host: Callable[..., Host], busybox: bytes) -> None:
    """They are the default of containers with the same driver."""
    host = new_host("--log-driver", "local", "--log-opt", "max-size=5k", "--log-opt", "max-file=2")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    identity = host.create("true", HostConfig={"LogConfig": {"Type": "", "Config": {"max-file": "4"}}})
    assert host.inspect(identity)["HostConfig"]["LogConfig"] == {
        "Type": "local", "Config": {"max-size": "5k", "max-file": "4"}}
    identity = host.create("true", HostConfig={"LogConfig": {"Type": "json-file"}})
    assert host.inspect(identity)["HostConfig"]["LogConfig"] == {"Type": "json-file", "Config": {}}


class LogServer:
    """A socket in a host's network that keeps what it receives, and can stop reading or drop its clients."""

    def __init__(
        self, host: Host, kind: str, path: str = "", answer: Any = None, context: Any = None
    ) -> None:
        self.host, self.kind, self.answer, self.context = host, kind, answer, context
        self.parts: list[tuple[socket.socket, bytes]] = []
        self.clients: list[socket.socket] = []
        self.reading = threading.Event()
        self.reading.set()
        self.socket: Any = None
        thread = threading.Thread(target=self._listen, args=(path,))
        thread.start()
        thread.join()
        self.port = 0 if path or not self.socket else self.socket.getsockname()[1]
        threading.Thread(target=self._serve, daemon=True).start()

    def _listen(self, path: str) -> None:
        """In a thread of its own, which alone changes its namespace."""
        family = socket.AF_UNIX if path else socket.AF_INET
        with open(f"/proc/{self.host.holder.pid}/ns/net") as namespace:
            dockerd.setns(namespace.fileno(), dockerd.CLONE_NEWNET)
        self.socket = socket.socket(family, socket.SOCK_STREAM if self.kind == "tcp" else socket.SOCK_DGRAM)
        self.socket.bind(path or ("127.0.0.1", 0))
        if self.kind == "tcp":
            self.socket.listen(5)

    def _serve(self) -> None:
        with contextlib.suppress(OSError):
            while self.kind == "tcp":
                client, _ = self.socket.accept()
                if self.context:
                    client = self.context.wrap_socket(client, server_side=True)
                self.clients.append(client)
                threading.Thread(target=self._read, args=(self.clients[-1],), daemon=True).start()
            self._read(self.socket)

    def _read(self, source: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                self.reading.wait()
                data, files, _, _ = (source.recv(1 << 17), [], 0, 0) if self.context else source.recvmsg(
                    1 << 17, socket.CMSG_SPACE(4))
                for _, _, content in files:  # a memfd of the journal's protocol
                    with open(struct.unpack("i", content)[0], "rb") as file:
                        file.seek(0)
                        data = file.read()
                if not data:
                    return
                self.parts.append((source, data))
                if self.answer:
                    source.send(self.answer(data))

    @property
    def received(self) -> list[bytes]:
        """What was received, piece by piece."""
        return [data for _, data in self.parts]

    @property
    def text(self) -> bytes:
        """All that was received."""
        return b"".join(self.received)

    def text_of(self, client: socket.socket) -> bytes:
        """All that was received from one client."""
        return b"".join(data for source, data in self.parts if source is client)

    def wait_for(self, condition: Callable[[bytes], Any], seconds: float = 20) -> None:
        """Wait until what was received fulfils a condition, which an incomplete message does not."""

        def fulfilled() -> bool:
            with contextlib.suppress(IndexError):
                return bool(condition(self.text))
            return False

        wait_for(fulfilled, f"messages, there are {self.text[-300:]!r}", seconds)

    def close(self) -> None:
        """End it and its connections."""
        for sock in (self.socket, *self.clients):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)
            sock.close()


@pytest.fixture
def log_server(host: Host) -> Iterator[Callable[..., LogServer]]:
    """A function that opens log servers in the host's network."""
    with contextlib.ExitStack() as stack:

        def make(*arguments: Any, **settings: Any) -> LogServer:
            server = LogServer(host, *arguments, **settings)
            stack.callback(server.close)
            return server

        yield make


SYSLOG_HEADS = {
    "": rb"<(\d+)>[A-Z][a-z]{2} [ \d]\d [\d:]{8} logged/([0-9a-f]{12})\[\d+\]: ",
    "rfc3164": rb"<(\d+)>[A-Z][a-z]{2} [ \d]\d [\d:]{8} \S+ logged/([0-9a-f]{12})\[\d+\]: ",
    "rfc5424": rb"<(\d+)>1 \d{4}-\d\d-\d\dT[\d:]{8}(?:Z|[+-]\d\d:\d\d) \S+ "
               rb"logged/([0-9a-f]{12}) \d+ logged/\2 - ",
    "rfc5424micro": rb"<(\d+)>1 \d{4}-\d\d-\d\dT[\d:]{8}\.\d{6}(?:Z|[+-]\d\d:\d\d) \S+ "
                    rb"logged/([0-9a-f]{12}) \d+ logged/\2 - ",
}
TWO_LINES = "echo one; echo; head -c 16390 /dev/zero | tr '\\0' x; echo; echo two >&2"


@pytest.mark.parametrize("style", sorted(SYSLOG_HEADS))
def test_syslog(host: Host, log_server: Callable[..., LogServer], style: str, tmp_path: Any) -> None:
    """Every transport and format: facility, priority, tag, pieces of long lines; `logs` reads the cache."""
    options = {"syslog-facility": "local3", "tag": "{{.Name}}/{{.ID}}", "syslog-format": style}
    paths = [str(tmp_path / name) for name in ("gram", "stream")]
    for address, kind, path in (
        (f"unixgram://{paths[0]}", "udp", paths[0]), ("udp://127.0.0.1:{}", "udp", ""),
        (f"unix://{paths[1]}", "tcp", paths[1]), ("tcp://127.0.0.1:{}", "tcp", ""),
    ):
        server = log_server(kind, path)
        options["syslog-address"] = address.format(server.port)
        identity = logged(host, TWO_LINES, "syslog", options)
        server.wait_for(lambda text: text.count(b"\n") == 4)
        found = [re.fullmatch(SYSLOG_HEADS[style] + b"(.*)", line) for line in server.text.splitlines()]
        assert sorted(match.groups() if match else () for match in found) == sorted([
            (b"158", identity[:12].encode(), b"one"), (b"158", identity[:12].encode(), b"x" * 16384),
            (b"158", identity[:12].encode(), b"x" * 6), (b"155", identity[:12].encode(), b"two")])
        assert logged_lines(host) == [b"one", b"", b"x" * 16390]
    logged(host, "echo one", "syslog", {**options, "cache-disabled": "true"})
    answer = host.http("GET", "/v1.41/containers/logged/logs?stdout=1")
    assert answer.status == 501
    assert answer.json["message"] == "configured logging driver does not support reading"


def test_syslog_over_tls(host: Host, log_server: Callable[..., LogServer], tmp_path: Any) -> None:
    """RFC 5425: each message behind its length; the server's certificate is checked."""
    key, certificate = str(tmp_path / "key"), str(tmp_path / "cert")
    command = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", key, "-out",
               certificate, "-days", "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    subprocess.run(command, check=True, stderr=subprocess.DEVNULL)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    server = log_server("tcp", context=context)
    options = {"syslog-address": f"tcp+tls://127.0.0.1:{server.port}", "syslog-format": "rfc5424",
               "syslog-tls-ca-cert": certificate}
    logged(host, "echo one; echo two", "syslog", options)
    wait_for(lambda: b"two\n" in server.text)
    match = re.fullmatch(rb"(\d+) (<30>1 .* - one\n)(\d+) (<30>1 .* - two\n)", server.text)
    assert match and int(match[1]) == len(match[2]) and int(match[3]) == len(match[4])
    unchecked = {**options, "syslog-tls-skip-verify": "1", "syslog-tls-ca-cert": ""}
    logged(host, "echo three", "syslog", unchecked)
    wait_for(lambda: b"three" in server.text)


def unpack_msgpack(data: bytes, position: int = 0) -> tuple[Any, int]:
    """A MessagePack value (arrays, maps, strings, int32 and the ext types of 8 bytes) and where it ends."""
    kind = data[position]
    if kind >> 4 in (8, 9):
        position, items = position + 1, []
        for _ in range((kind & 15) * (2 if kind >> 4 == 8 else 1)):
            item, position = unpack_msgpack(data, position)
            items.append(item)
        return dict(zip(items[::2], items[1::2])) if kind >> 4 == 8 else items, position
    width = {0xD9: 1, 0xDA: 2, 0xDB: 4}.get(kind, 0)
    if kind >> 5 == 5 or width:
        size = int.from_bytes(data[position + 1:position + 1 + width], "big") if width else kind & 31
        position += 1 + width
        return data[position:position + size], position + size
    assert kind in (0xD2, 0xD7), hex(kind)
    end = position + (5 if kind == 0xD2 else 10)
    return int.from_bytes(data[position + 1:end], "big"), end


def forwarded(data: bytes) -> list[Any]:
    """The messages of Fluentd's forward protocol."""
    found, position = [], 0
    while position < len(data):
        message, position = unpack_msgpack(data, position)
        found.append(message)
    return found


def test_fluentd(host: Host, log_server: Callable[..., LogServer], tmp_path: Any) -> None:
    """Messages, pieces of lines, exact times, acknowledgements."""
    server = log_server("tcp", str(tmp_path / "fluentd"))
    address = {"fluentd-address": f"unix://{tmp_path}/fluentd"}
    identity = logged(host, TWO_LINES, "fluentd", {**address, "env": "A"}, **LOG_LABELS).encode()
    server.wait_for(lambda text: len(forwarded(text)) == 5)
    messages = sorted(forwarded(server.text), key=lambda message: message[2][b"log"])
    base = {b"container_id": identity, b"container_name": b"/logged", b"source": b"stdout", b"A": b"a"}
    assert [message[2][b"log"] for message in messages] == [b"", b"one", b"two", b"x" * 6, b"x" * 16384]
    assert all(message[0] == identity[:12] and abs(message[1] - time.time()) < 60 for message in messages)
    assert messages[1][2] == {**base, b"log": b"one"}
    assert messages[2][2] == {**base, b"source": b"stderr", b"log": b"two"}
    pieces = [messages[4][2], messages[3][2]]
    names = (b"partial_message", b"partial_ordinal", b"partial_last")
    assert [[piece[name] for name in names] for piece in pieces] == [
        [b"true", b"1", b"false"], [b"true", b"2", b"true"]]
    assert pieces[0][b"partial_id"] == pieces[1][b"partial_id"]

    def acknowledge(data: bytes) -> bytes:
        return b"\x81\xa3ack\xb8" + forwarded(data)[-1][3][b"chunk"]

    acknowledging = log_server("tcp", str(tmp_path / "acknowledging"), answer=acknowledge)
    logged(host, "echo one; echo two", "fluentd", {
        "fluentd-address": f"unix://{tmp_path}/acknowledging", "fluentd-request-ack": "true",
        "fluentd-sub-second-precision": "true", "tag": "t"})
    wait_for(lambda: len(acknowledging.received) == 2)
    one, two = (forwarded(data)[0] for data in acknowledging.received)
    assert (one[0], one[2][b"log"], two[2][b"log"]) == (b"t", b"one", b"two")
    assert acknowledging.received[0][3:5] == b"\xd7\x00"


def test_a_log_server_comes_and_goes(host: Host, log_server: Callable[..., LogServer], tmp_path: Any) -> None:
    """What is printed while no server is there is sent to the next one; nobody waits for it."""
    path = str(tmp_path / "server")
    identity = host.create("sh", "-c", "while read x; do echo $x; done", OpenStdin=True, name="logged",
                           HostConfig={"LogConfig": {"Type": "fluentd", "Config": {
                               "fluentd-address": "unix://" + path, "fluentd-async": "true",
                               "fluentd-retry-wait": "50ms"}}})
    host.api("POST", f"/containers/{identity}/start")
    stdin = host.hijack(f"{API}/containers/{identity}/attach?stdin=1&stdout=1&stream=1")
    for line in (b"before", b"between", b"after"):
        stdin.send(line + b"\n")
        assert demultiplex(stdin.read_until(line + b"\n"))[0] == line + b"\n"
        server = log_server("tcp", path)
        server.wait_for(functools.partial(lambda line, text: forwarded(text)[-1][2][b"log"] == line, line))
        server.close()
        os.unlink(path)
    assert logged_lines(host) == [b"before", b"between", b"after"]
    stdin.close()


def gelf_messages(datagrams: list[bytes]) -> list[dict[str, Any]]:
    """GELF over UDP: datagrams put together from their chunks, and inflated."""
    chunks: dict[bytes, dict[int, bytes]] = {}
    whole = [data for data in datagrams if data[:2] != b"\x1e\x0f"]
    for data in datagrams:
        if data[:2] == b"\x1e\x0f":
            chunks.setdefault(data[2:10], {})[data[10]] = data[12:]
            if len(chunks[data[2:10]]) == data[11]:
                whole.append(b"".join(content for _, content in sorted(chunks[data[2:10]].items())))
    return [json.loads(data if data[:1] == b"{" else zlib.decompress(data, 47)) for data in whole]


@pytest.mark.parametrize("kind, compression", [
    ("udp", ""), ("udp", "gzip"), ("udp", "zlib"), ("udp", "none"), ("tcp", "")])
def test_gelf(host: Host, log_server: Callable[..., LogServer], kind: str, compression: str) -> None:
    """The fields of each message, in chunks where it is too long for a datagram."""
    server = log_server(kind)
    options = {"gelf-address": f"{kind}://127.0.0.1:{server.port}", "labels": "one", "tag": "{{.Name}}"}
    identity = logged(host, TWO_LINES, "gelf", {
        **options, **({"gelf-compression-type": compression} if compression else {})}, **LOG_LABELS)

    def messages() -> list[dict[str, Any]]:
        return gelf_messages(server.received if kind == "udp" else server.text.split(b"\0")[:-1])

    wait_for(lambda: len(messages()) == 4, "four messages")
    found = sorted(messages(), key=lambda message: str(message["short_message"]))
    assert [message["short_message"] for message in found] == ["one", "two", "x" * 6, "x" * 16384]
    assert abs(found[0].pop("timestamp") - time.time()) < 60
    info = host.inspect(identity)
    assert found[0] == {
        "version": "1.1", "host": socket.gethostname(), "short_message": "one", "level": 6, "_one": "<1",
        "_command": "sh -c " + TWO_LINES, "_container_id": identity, "_container_name": "logged",
        "_created": info["Created"], "_image_id": info["Image"], "_image_name": "busybox", "_tag": "logged"}
    assert found[1]["level"] == 3


def journal_fields(data: bytes) -> dict[str, bytes]:
    """A message of systemd's native journal protocol."""
    fields = {}
    while data:
        name, separator, rest = re.split(rb"([=\n])", data, maxsplit=1)
        if separator == b"=":
            value, _, data = rest.partition(b"\n")
        else:
            size = int.from_bytes(rest[:8], "little")
            value, data = rest[8:8 + size], rest[9 + size:]
        fields[name.decode()] = value
    return fields


def test_journald(host: Host, log_server: Callable[..., LogServer], tmp_path: Any) -> None:
    """Docker's fields, priorities, pieces; what is too long for a datagram comes as a memfd."""
    server = log_server("udp", str(tmp_path / "socket"))
    server.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    script = "mount -t tmpfs none /run && mkdir -p /run/systemd/journal && "
    script += f"mount --bind {tmp_path} /run/systemd/journal"
    assert host.enter("sh", "-c", script).wait() == 0
    try:
        options = {"labels-regex": ".*", "env": "A", "tag": "{{.Name}}"}
        big = {"Labels": {"a.b-c": "v", "_under": "l\nm", "big": "y" * 300000}, "Env": ["A=a"]}
        identity = logged(host, TWO_LINES, "journald", options, **big)
        wait_for(lambda: len(server.received) == 5)
    finally:
        assert host.enter("sh", "-c", "umount /run/systemd/journal /run").wait() == 0
    found = sorted(map(journal_fields, server.received), key=lambda fields: fields["MESSAGE"])
    assert [fields["MESSAGE"] for fields in found] == [b"", b"one", b"two", b"x" * 6, b"x" * 16384]
    assert found[1] == {
        "MESSAGE": b"one", "PRIORITY": b"6", "CONTAINER_ID": identity[:12].encode(), "A": b"a", "A_B_C": b"v",
        "CONTAINER_ID_FULL": identity.encode(), "CONTAINER_NAME": b"logged", "CONTAINER_TAG": b"logged",
        "IMAGE_NAME": b"busybox", "SYSLOG_IDENTIFIER": b"logged", "UNDER": b"l\nm", "BIG": b"y" * 300000}
    assert found[2]["PRIORITY"] == b"3"
    assert found[4]["CONTAINER_PARTIAL_MESSAGE"] == b"true"
    assert found[3]["CONTAINER_PARTIAL_ORDINAL"] == b"2" and found[3]["CONTAINER_PARTIAL_LAST"] == b"true"


def test_a_log_server_that_does_not_read(host: Host, log_server: Callable[..., LogServer]) -> None:
    """Blocking, its container waits, and no other; non-blocking, what exceeds the buffer is dropped."""
    server = log_server("tcp")
    server.reading.clear()
    options = {"gelf-address": f"tcp://127.0.0.1:{server.port}", "cache-disabled": "true"}
    script = "yes $(head -c 1000 /dev/zero | tr '\\0' x) | head -n 6000; echo the end"
    waiting = host.create("sh", "-c", script, HostConfig={"LogConfig": {"Type": "gelf", "Config": options}})
    host.api("POST", f"/containers/{waiting}/start")
    logged(host, "seq 1 50000", "json-file", {})
    assert len(logged_lines(host)) == 50000
    logged(host, script, "gelf", {**options, "mode": "non-blocking", "max-buffer-size": "64k"})
    assert host.inspect(waiting)["State"]["Running"]
    server.reading.set()
    host.api("POST", f"/containers/{waiting}/wait")

    def messages() -> list[bytes]:
        """The whole ones of that container: one may come in part before, over another connection."""
        return [message for client in server.clients for message in server.text_of(client).split(b"\0")[:-1]
                if waiting.encode() in message]

    wait_for(lambda: b'"short_message":"the end"' in b"".join(messages()[-1:]), "the last line", 60)
    assert len(messages()) == 6001


# Attached clients of different speeds


def memory_of(host: Host) -> int:
    """The daemon's own memory in bytes."""
    assert host.process
    return int(re.findall(r"Pss_Anon:\s+(\d+)", read_text(f"/proc/{host.process.pid}/smaps_rollup"))[0]) << 10


@pytest.mark.parametrize("megabytes", [
    24, pytest.param(1024, marks=[pytest.mark.torture, pytest.mark.timeout(900)])])
def test_three_clients_at_different_speeds(
    new_host: Callable[..., Host], busybox: bytes, megabytes: int
) -> None:
    """One reads at once, one slowly, one only after the end: the container waits for none, each gets every
    byte, the log has every line, and the daemon's memory stays small."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    line = b"0123456789abcdef" * 7 + b"0123456789a\377<\n"  # 126 bytes, one of them not UTF-8
    script = "read x; yes \"$(printf '%s\\377<' \"$x\")\" | head -c " + str(megabytes << 20)
    identity = host.create("sh", "-c", script, OpenStdin=True, HostConfig={
        "LogConfig": {"Type": "json-file", "Config": {"max-size": "-1"}}})
    host.api("POST", f"/containers/{identity}/start")
    clients = [host.hijack(f"{API}/containers/{identity}/attach?stdout=1&stdin={index == 0:d}&stream=1")
               for index in range(3)]
    idle, peak = memory_of(host), [0]
    counts: list[Any] = [None] * 3

    def count(index: int, pause: float) -> None:
        total, rest, bad, expected = 0, clients[index].buffer, 0, line * 4200
        sock = clients[index].sock
        while True:
            if len(rest) >= 8 and len(rest) >= 8 + int.from_bytes(rest[4:8], "big"):
                size = int.from_bytes(rest[4:8], "big")
                start = total % len(line)
                bad += rest[8:8 + size] != expected[start:start + size]
                total, rest = total + size, rest[8 + size:]
                continue
            data = sock.recv(1 << 18)
            if not data:
                break
            rest += data
            time.sleep(pause)
        counts[index] = (total, bad, rest)

    clients[0].send(line[:-3] + b"\n")
    threads = [threading.Thread(target=count, args=(index, pause)) for index, pause in ((0, 0), (1, 0.001))]
    for thread in threads:
        thread.start()

    def ended() -> bool:
        peak[0] = max(peak[0], memory_of(host))
        return not host.inspect(identity)["State"]["Running"]

    wait_for(ended, "the container's end", 600)
    threads.append(threading.Thread(target=count, args=(2, 0)))
    threads[2].start()
    for thread in threads:
        while thread.is_alive():
            peak[0] = max(peak[0], memory_of(host))
            thread.join(0.05)
    assert counts == [(megabytes << 20, 0, b"")] * 3
    print(f"{megabytes} MiB: memory over idle {(peak[0] - idle) / (1 << 20):.1f} MiB")
    assert peak[0] - idle < 40 << 20
    path = os.path.join(host.data_root, "containers", identity, identity + "-json.log")
    with open(path, "rb") as file:
        texts = collections.Counter(entry[:entry.index(b'"time"')] for entry in file)
    whole, rest = divmod(megabytes << 20, len(line))
    assert texts.most_common(1)[0] == (
        b'{"log":"' + line[:-3] + b'\\ufffd\\u003c\\n","stream":"stdout",', whole)
    assert sum(texts.values()) == whole + (1 if rest else 0)
    for client in clients:
        client.close()


def test_a_slow_client_without_a_log_is_disconnected(host: Host) -> None:
    """It gets what was kept for it, then a line that says why it is the last."""
    identity = host.create("sh", "-c", "read x; yes | head -c 6000000", OpenStdin=True, HostConfig={
        "LogConfig": {"Type": "none"}})
    host.api("POST", f"/containers/{identity}/start")
    path = f"{API}/containers/{identity}/attach?stdout=1&stdin=1&stream=1"
    slow, fast = host.hijack(path), host.hijack(path)
    fast.send(b"\n")
    out, _ = demultiplex(fast.read_all())
    out_slow, error = demultiplex(slow.read_all())
    assert out_slow == b"y\n" * (len(out_slow) // 2) and len(out_slow) < 6000000
    assert error == (b"docker: disconnected, as this client reads too slowly: "
                     b"the log driver none keeps nothing from which it could go on\n")
    assert host.api("POST", f"/containers/{identity}/wait")["StatusCode"] == 0
    assert len(out) == 6000000
    for client in (slow, fast):
        client.close()


# ------------------------------------------------------------------------------------------------------------
# Containers: what is pure
#
# The configuration of a new container, names, the words and filters of the list.  What a row expects is what
# the real dockerd 20.10.24 answered, but for the shapes that newer API versions have changed.
# ------------------------------------------------------------------------------------------------------------

IMAGE_CONFIG = {"Env": ["PATH=/bin", "A=image"], "Cmd": ["sh"], "Entrypoint": ["/init"], "WorkingDir": "/w",
                "Labels": {"a": "1", "b": "2"}, "ExposedPorts": {"80/tcp": {}}, "User": "bob",
                "StopSignal": "INT"}


def new_container(body: dict[str, Any], image: Optional[dict[str, Any]] = None) -> Any:
    """(Config, HostConfig, NetworkingConfig, warnings) as `create` makes them, with the daemon's defaults."""
    return dockerd.container_config(body, image if image is not None else {"Cmd": ["sh"]}, dockerd.Config())


def refusal(body: dict[str, Any]) -> str:
    """The text with which a body is refused."""
    with pytest.raises(dockerd.DockerError) as caught:
        new_container(body)
    assert dockerd.http_status(caught.value) == 400
    return str(caught.value)


def test_config_of_a_bare_body():
    config, host, networking, warnings = new_container({"Image": "busybox",
                                                        "HostConfig": {"NetworkMode": "none"}})
    assert list(config) == ["Hostname", "Domainname", "User", "AttachStdin", "AttachStdout", "AttachStderr",
                            "Tty",
                            "OpenStdin", "StdinOnce", "Env", "Cmd", "Image", "Volumes", "WorkingDir",
                            "Entrypoint",
                            "OnBuild", "Labels"]
    assert (config["Cmd"], config["Labels"], config["Volumes"]) == (["sh"], {}, None)
    expected = {"NetworkMode": "none", "LogConfig": {"Type": "json-file", "Config": {}}, "IpcMode": "private",
                "ShmSize": 64 << 20, "Runtime": "runc", "ConsoleSize": [0, 0], "MemorySwappiness": None,
                "PidsLimit": None, "OomKillDisable": False, "Binds": None, "Privileged": False,
                "RestartPolicy": {"Name": "no", "MaximumRetryCount": 0}, "CgroupnsMode": host["CgroupnsMode"],
                "MaskedPaths": list(dockerd.MASKED_PATHS), "ReadonlyPaths": list(dockerd.READONLY_PATHS)}
    assert {key: host[key] for key in expected} == expected
    assert host["CgroupnsMode"] in ("host", "private")
    assert (networking, warnings) == ({"EndpointsConfig": None}, [])


def test_config_of_the_cli():
    host = new_container({"HostConfig": {
        "LogConfig": {"Type": "", "Config": {}}, "MemorySwappiness": -1, "PidsLimit": 0,
        "NetworkMode": "default",
        "PortBindings": {}, "Unknown": 1}, "NetworkingConfig": {"EndpointsConfig": {"default": None}}})[1]
    assert host["MemorySwappiness"] is None and host["PidsLimit"] is None and "Unknown" not in host
    assert host["NetworkMode"] == "bridge"


def test_config_names_match_in_any_case():
    config, host, _, _ = new_container({"cmd": "true", "hostconfig": {"networkmode": "host"}})
    assert config["Cmd"] == ["true"] and host["NetworkMode"] == "host"


@pytest.mark.parametrize("body,command,entrypoint", [
    ({}, ["sh"], ["/init"]), ({"Cmd": ["x"]}, ["x"], ["/init"]), ({"Entrypoint": ["y"]}, None, ["y"]),
    ({"Entrypoint": []}, ["sh"], []), ({"Entrypoint": [""]}, None, None), ({"Cmd": []}, ["sh"], ["/init"]),
])
def test_config_command_merges_with_the_images(body, command, entrypoint):
    if body == {"Entrypoint": [""]}:
        body = {**body, "Cmd": ["z"]}
        command = ["z"]
    config = new_container(body, IMAGE_CONFIG)[0]
    assert (config["Cmd"], config["Entrypoint"]) == (command, entrypoint)


def test_config_merges_with_the_images():
    config = new_container({"Env": ["A=mine", "NONE"], "Labels": {"a": "9"}, "ExposedPorts": {"81/udp": {}},
                            "Healthcheck": {"Retries": 3}},
                           {**IMAGE_CONFIG, "Healthcheck": {"Test": ["CMD", "x"], "Retries": 1}})[0]
    assert config["Env"] == ["A=mine", "NONE", "PATH=/bin"]
    assert config["Labels"] == {"a": "9", "b": "2"}
    assert config["ExposedPorts"] == {"80/tcp": {}, "81/udp": {}}
    assert (config["User"], config["WorkingDir"], config["StopSignal"]) == ("bob", "/w", "INT")
    assert config["Healthcheck"] == {"Test": ["CMD", "x"], "Retries": 3}
    assert IMAGE_CONFIG["Labels"] == {"a": "1", "b": "2"}, "the image's own is untouched"


def test_config_masked_paths():
    def paths(**host: Any) -> Any:
        shown = new_container({"HostConfig": host})[1]
        return shown["MaskedPaths"], shown["ReadonlyPaths"]
    assert paths(Privileged=True) == (None, None)
    assert paths(MaskedPaths=[], ReadonlyPaths=[]) == ([], [])
    assert paths(SecurityOpt=["systempaths=unconfined"]) == ([], [])


@pytest.mark.parametrize("given,options", [
    ({"Privileged": True}, ["label=disable"]), ({"IpcMode": "host"}, ["label=disable"]),
    ({"PidMode": "host"}, ["label=disable"]), ({"PidMode": "host", "SecurityOpt": []}, []), ({}, None),
    ({"Privileged": True, "SecurityOpt": ["label=type:x"]}, ["label=type:x"]),
])
def test_config_has_no_labels_in_the_hosts_namespaces(given, options):
    assert new_container({"HostConfig": given})[1]["SecurityOpt"] == options


@pytest.mark.parametrize("body,text", [
    ({"Tty": "yes"}, "json: cannot unmarshal string into Go struct field ContainerConfigWrapper."
     "Tty of type bool"),
    ({"Env": "x"}, "json: cannot unmarshal string into Go struct field ContainerConfigWrapper."
     "Env of type []string"),
    ({"Env": [1]}, "json: cannot unmarshal number into Go struct field ContainerConfigWrapper."
     "Env of type string"),
    ({"WorkingDir": "rel"}, "the working directory 'rel' is invalid, it needs to be an absolute path"),
    ({"Cmd": [], "Entrypoint": [""]}, "No command specified"),
    ({"Env": ["=x"]}, "invalid environment variable: =x"), ({"Env": [""]}, "invalid environment variable: "),
    ({"StopSignal": "SIGBOGUS"}, "Invalid signal: SIGBOGUS"),
    ({"Cmd": ["a\0b"]}, "invalid Cmd: it contains a NUL byte"),
    ({"Healthcheck": {"Interval": 1}}, "Interval in Healthcheck cannot be less than 1ms"),
    ({"Healthcheck": {"Retries": -1}}, "Retries in Healthcheck cannot be negative"),
])
def test_config_refusals(body, text):
    assert refusal(body) == text


def test_config_that_is_no_object():
    with pytest.raises(dockerd.BadParameter,
                       match="cannot unmarshal array into Go value of type runconfig.Container"):
        dockerd.decode_struct([], "ContainerConfigWrapper")


@pytest.mark.parametrize("host,text", [
    ({"Memory": "1"}, "json: cannot unmarshal string into Go struct field HostConfig."
     "HostConfig.Memory of type int64"),
    ({"Memory": 1.5}, "json: cannot unmarshal number 1.5 into Go struct field HostConfig."
     "HostConfig.Memory of type int64"),
    ({"BlkioWeight": 1 << 16}, "json: cannot unmarshal number 65536 into Go struct field "
     "HostConfig.HostConfig.BlkioWeight of type uint16"),
    ({"OomScoreAdj": 2000}, "Invalid value 2000, range for oom score adj is [-1000, 1000]"),
    ({"ShmSize": -1}, "SHM size can not be less than 0"),
    ({"PortBindings": {"99999/tcp": []}, "NetworkMode": "host"}, 'invalid port specification: "99999"'),
    ({"PortBindings": {"x": []}, "NetworkMode": "none"}, 'invalid port specification: "x"'),
    ({"PortBindings": {"80": [{"HostPort": "9-8"}]}, "NetworkMode": "none"},
     'invalid port specification: "9-8"'),
    ({"RestartPolicy": {"Name": "sometimes"}}, "invalid restart policy 'sometimes'"),
    ({"RestartPolicy": {"Name": "always", "MaximumRetryCount": 2}},
     "maximum retry count cannot be used with restart policy 'always'"),
    ({"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": -1}},
     "maximum retry count cannot be negative"),
    ({"AutoRemove": True, "RestartPolicy": {"Name": "always"}},
     "can't create 'AutoRemove' container with restart policy"),
    ({"CapAdd": ["BOGUS"]}, 'invalid CapAdd: unknown capability: "CAP_BOGUS"'),
    ({"CapDrop": ["cap_bogus"]}, 'invalid CapDrop: unknown capability: "CAP_BOGUS"'),
    ({"SecurityOpt": ["bogus"]}, 'invalid --security-opt 1: "bogus"'),
    ({"SecurityOpt": ["bogus=1"]}, 'invalid --security-opt 2: "bogus=1"'),
    ({"SecurityOpt": ["no-new-privileges:maybe"]}, 'invalid --security-opt 2: "no-new-privileges:maybe"'),
    ({"SecurityOpt": ["seccomp=1"]}, "Decoding seccomp profile failed: it must be a JSON object"),
    ({"CgroupnsMode": "x"}, "invalid cgroup namespace mode: x"), ({"IpcMode": "x"}, "invalid IPC mode: x"),
    ({"PidMode": "x"}, "invalid PID mode: x"), ({"UTSMode": "x"}, "invalid UTS mode: x"),
    ({"Isolation": "x"}, "Invalid isolation: \"x\" - linux only supports 'default'"),
    ({"LogConfig": {"Type": "bogus"}}, 'error looking up logging plugin bogus: plugin "bogus" not found'),
    ({"LogConfig": {"Type": "json-file", "Config": {"bogus": "1"}}},
     "unknown log opt 'bogus' for json-file log driver"),
    ({"ExtraHosts": ["x"]}, 'bad format for add-host: "x"'),
    ({"ExtraHosts": ["a:b"]}, 'invalid IP address in add-host: "b"'),
    ({"DeviceRequests": [{"Driver": "cdi", "Count": 1, "DeviceIDs": ["a/b=c"]}]},
     "cannot set both Count and DeviceIDs on device request"),
    ({"Ulimits": [{"Name": "bogus", "Soft": 1, "Hard": 1}]}, "invalid ulimit type: bogus"),
    ({"CgroupParent": "../../x"}, "invalid cgroup parent ../../x: it leads upwards"),
    ({"Sysctls": {"kernel.panic": "1"}}, 'sysctl "kernel.panic" is not in a separate kernel namespace'),
    ({"Sysctls": {"net/../kernel/panic": "1"}},
     'sysctl "net/../kernel/panic" is not in a separate kernel namespace'),
    ({"Sysctls": {"net.core.somaxconn": "1"}, "NetworkMode": "host"},
     'sysctl "net.core.somaxconn" not allowed in host network namespace'),
    ({"Sysctls": {"kernel.shmmax": "1"}, "IpcMode": "host"},
     'sysctl "kernel.shmmax" is not allowed in the hosts ipc namespace'),
])
def test_host_config_refusals(host, text):
    assert refusal({"HostConfig": host}) == text


def test_hostname_and_the_hosts_uts_namespace_conflict():
    assert refusal({"Hostname": "x", "HostConfig": {"UTSMode": "host"}}) == \
        "conflicting options: hostname and the UTS mode"


@pytest.mark.parametrize("host", [
    {"SecurityOpt": ["seccomp=unconfined", "apparmor=unconfined", "label:disable", "no-new-privileges"]},
    {"CapAdd": ["ALL"], "CapDrop": ["net_raw", "CAP_CHOWN"]}, {"Sysctls": {"net.ipv4.ip_forward": "1"}},
    {"IpcMode": "host", "PidMode": "host", "UTSMode": "host", "UsernsMode": "host"}, {"Init": False},
    {"PortBindings": {"80/tcp": [{"HostPort": "8000-8010"}]}, "NetworkMode": "none"},
    {"PublishAllPorts": True},
    {"LogConfig": {"Type": "json-file", "Config": {"max-size": "10m", "max-file": "3"}}},
    {"RestartPolicy": {"Name": "on-failure", "MaximumRetryCount": 3}}, {"Dns": ["1.1.1.1"]},
])
def test_host_config_that_is_taken(host):
    assert new_container({"HostConfig": host})[3] == []


def test_selinux_contexts(monkeypatch):
    """The policy's, with categories of the container's own; label options change their parts."""
    files = {"/etc/selinux/config": "SELINUX=enforcing\nSELINUXTYPE=mcs\n",
             "/etc/selinux/mcs/contexts/lxc_contexts":
             'process = "system_u:system_r:container_t:s0"\nfile = "system_u:object_r:container_file_t:s0"\n'}
    monkeypatch.setattr(dockerd, "read_text", lambda path, limit=0: files.get(path, ""))
    process, file = dockerd.selinux_contexts([])
    assert re.fullmatch(r"system_u:system_r:container_t:s0:c\d+,c\d+", process)
    assert file == process.replace("system_r:container_t", "object_r:container_file_t")
    assert dockerd.selinux_contexts(["type:spc_t", "level:s0:c1", "filetype:mine_t", "user:u", "role:r"]) == (
        "u:r:spc_t:s0:c1", "system_u:object_r:mine_t:s0:c1")
    assert dockerd.selinux_contexts(["disable"]) == ("", "")
    with pytest.raises(BadParameter, match='^bad label option "foo:bar", valid options'):
        dockerd.selinux_contexts(["foo:bar"])
    files.clear()
    assert dockerd.selinux_contexts([]) == ("", "")


def test_config_warnings():
    host = {"NetworkMode": "host", "PortBindings": {"80/tcp": [{"HostPort": "80"}]}}
    warnings = new_container({"HostConfig": host})[3]
    assert warnings == ["Published ports are discarded when using host network mode"]


def test_security_options():
    profile = {"defaultAction": "SCMP_ACT_ALLOW"}
    options = dockerd.parse_security_options(["seccomp=" + json.dumps(profile), "label=user:x",
                                              "label:role:y",
                                              "no-new-privileges=false", "apparmor=unconfined"])
    assert options == (False, profile, "unconfined", ("user:x", "role:y"), "")
    assert dockerd.parse_security_options(["seccomp=builtin", "no-new-privileges"]) == (True, None, "", (),
                                                                                        "")


# Signals, times, names


@pytest.mark.parametrize("text,number", [("9", 9), ("KILL", 9), ("sigterm", 15), ("SIGRTMIN+3", 37),
                                         ("RTMAX", 64),
                                         ("rtmax-1", 63), ("SIGSTKFLT", 16), ("CLD", 17)])
def test_signals(text, number):
    assert dockerd.parse_signal(text) == number


@pytest.mark.parametrize("text", ["0", "", "BOGUS", "SIG", "-1", "99", "RTMIN+99", "\u0663"])
def test_signals_that_are_none(text):
    with pytest.raises(dockerd.BadParameter):
        dockerd.parse_signal(text)


@pytest.mark.parametrize("nanoseconds,text", [
    (0, "1970-01-01T00:00:00Z"), (1_500_000_000, "1970-01-01T00:00:01.5Z"),
    (1795478963_773701079, "2026-11-24T00:09:23.773701079Z"), (1, "1970-01-01T00:00:00.000000001Z"),
])
def test_times_round_trip(nanoseconds, text):
    assert dockerd.rfc3339nano(nanoseconds) == text
    assert dockerd.parse_timestamp(text) == nanoseconds


def test_times():
    parse = dockerd.parse_timestamp
    assert dockerd.rfc3339nano(0, padded=True) == "1970-01-01T00:00:00.000000000Z"
    assert dockerd.rfc3339nano(parse(dockerd.ZERO_TIME)) == dockerd.ZERO_TIME
    assert parse("12.5") == 12_500_000_000 and parse("12") == 12 * 10**9
    assert parse("1970-01-01T02:00:00+02:00") == 0 == parse("1969-12-31T23:30:00-00:30")
    assert abs(time.time_ns() - 90 * 10**9 - parse("1m30s")) < 10**9
    assert parse("2026-11-24") == int(time.mktime((2026, 11, 24, 0, 0, 0, 0, 0, -1))) * 10**9
    for text in ("x", "", "2026-13-01T00:00:00Z", "1e3"):
        with pytest.raises(dockerd.BadParameter, match="strconv.ParseInt: parsing .*: invalid syntax"):
            parse(text)


@pytest.mark.parametrize("seconds,words", [
    (0.4, "Less than a second"), (1.9, "1 second"), (59, "59 seconds"), (60, "About a minute"),
    (150, "2 minutes"),
    (3599, "59 minutes"), (3600, "About an hour"), (47 * 3600, "47 hours"), (48 * 3600, "2 days"),
    (14 * 86400, "2 weeks"), (61 * 86400, "2 months"), (731 * 86400, "2 years"),
])
def test_durations_in_words(seconds, words):
    assert dockerd.human_duration(seconds) == words


def state_of(**changes: Any) -> dict[str, Any]:
    """A container's state as inspect shows it."""
    return {"Status": "", "Running": False, "Paused": False, "Restarting": False, "Dead": False,
            "ExitCode": 0,
            "StartedAt": dockerd.ZERO_TIME, "FinishedAt": dockerd.ZERO_TIME, **changes}


@pytest.mark.parametrize("changes,text", [
    ({"Status": "created"}, "Created"), ({"Status": "removing"}, "Removal In Progress"),
    ({"Dead": True}, "Dead"),
    ({"Running": True, "StartedAt": "1970-01-01T00:16:35Z"}, "Up 5 seconds"),
    ({"Running": True, "Paused": True, "StartedAt": "1970-01-01T00:15:40Z"}, "Up About a minute (Paused)"),
    ({"Running": True, "StartedAt": "1970-01-01T00:16:35Z", "Health": {"Status": "starting"}},
     "Up 5 seconds (health: starting)"),
    ({"Running": True, "StartedAt": "1970-01-01T00:16:35Z", "Health": {"Status": "healthy"}},
     "Up 5 seconds (healthy)"),
    ({"Restarting": True, "Running": True, "ExitCode": 1, "FinishedAt": "1970-01-01T00:16:38Z"},
     "Restarting (1) 2 seconds ago"),
    ({"ExitCode": 137, "StartedAt": "1970-01-01T00:00:00Z", "FinishedAt": "1970-01-01T00:13:40Z"},
     "Exited (137) 3 minutes ago"),
])
def test_status_text(changes, text):
    assert dockerd.status_text(state_of(**changes), 1000 * 10**9) == text


def test_names():
    assert len(dockerd.ADJECTIVES) >= 60 and len(dockerd.SCIENTISTS) >= 110
    for name in {dockerd.random_name() for _ in range(50)}:
        assert dockerd.NAME_PATTERN.fullmatch(name) and name.count("_") == 1
    assert all(not dockerd.NAME_PATTERN.fullmatch(name) for name in ("a", "_a!", "-x", "a/b", ""))
    error = dockerd.name_conflict("e1", "515d")
    assert dockerd.http_status(error) == 409
    assert str(error) == ('Conflict. The container name "/e1" is already in use by container "515d". You '
                          "have to remove (or rename) that container to be able to reuse that name.")


# Filters


class ListedState(NamedTuple):
    running: bool = False
    status: str = "exited"
    started_at: str = "2026-11-24T00:00:00Z"
    exit_code: int = 3

    def to_api(self) -> dict[str, Any]:
        return {"Health": {"Status": "healthy"}}


class Listed(NamedTuple):
    """As much of a container as the filters look at."""

    id: str = "2b11b7010211"
    name: str = "run1"
    config: Any = {"Labels": {"l": "v"}, "ExposedPorts": {"80/tcp": {}, "53/udp": {}}}
    state: Any = ListedState()
    record: Any = {"NetworkSettings": {"Networks": {"none": {"NetworkID": "7547f7"}}, "Ports": {
        "80/tcp": [{"HostPort": "8080"}], "81/tcp": None}}, "MountPoints": {"/data": {"Name": "vol"}}}
    image_id: str = "sha256:51a9"


class ImageTable:
    @staticmethod
    def resolve(name: str) -> Any:
        parents = {"sha256:51a9": "sha256:ba5e", "sha256:ba5e": ""}
        identity = {"busybox": "sha256:51a9", "base": "sha256:ba5e"}.get(name, name)
        if identity not in parents:
            raise dockerd.NotFound("No such image")
        return types.SimpleNamespace(id=identity, parent=parents[identity])


@pytest.mark.parametrize("name,yes,no", [
    ("id", "2b11", "ffff"), ("name", "^/run", "^un"), ("name", "run1", "["), ("label", "l=v", "l=w"),
    ("label", "l", "m"), ("status", "exited", "running"), ("exited", "3", "0"),
    ("health", "healthy", "none"), ("is-task", "false", "true"), ("network", "none", "host"),
    ("network", "7547", "75470"), ("publish", "8080", "80"), ("publish", "8079-8081/tcp", "8080/udp"),
    ("expose", "81", "53/udp"), ("volume", "vol", "x"), ("volume", "/data", "/"),
    ("ancestor", "busybox", "debian"), ("ancestor", "base", "debian"),
])
def test_container_filters(name, yes, no):
    assert name in dockerd.CONTAINER_FILTERS
    for value, expected in ((yes, True), (no, False)):
        filters = dockerd.check_container_filters({name: [value]})
        assert dockerd.container_matches(Listed(), filters, ImageTable) is expected
    both = dockerd.container_matches(Listed(), {name: [yes, no]}, ImageTable)
    assert both is not name.startswith("label"), "values are alternatives, but for labels"


@pytest.mark.parametrize("name,value,text", [
    ("status", "bogus", "invalid filter 'status=bogus'"),
    ("health", "x", "unrecognized filter value for health: x"),
    ("exited", "x", "invalid filter 'exited=x': strconv.Atoi: parsing \"x\": invalid syntax"),
    *[("publish", value, f"error while looking up for publish {value}: {text}") for value, text in (
        ("x", 'strconv.ParseUint: parsing "x": invalid syntax'),
        ("99999", 'strconv.ParseUint: parsing "99999": value out of range'),
        ("90-80", "Invalid range specified for the Port: 90-80"))],
    ("publish", "80:80", "filter for 'publish' should not contain ':': 80:80"),
    ("is-task", "maybe", "invalid filter 'is-task=[maybe]'"),
    *[("name", value, f"Invalid filter 'name={value[:100]}': the expression is too costly")
      for value in ("(a+)+b", "(?x)(a+) +b", "(?i-x:b)", ".*" * 9 + "x", "(aa|a)" * 50, "a" * 1025)],
])
def test_container_filters_refuse(name, value, text):
    with pytest.raises(dockerd.BadParameter) as caught:
        dockerd.check_container_filters({name: [value]})
    assert str(caught.value) == text


@pytest.mark.parametrize("text", ['{"name":["a"]}', '{"name":{"a":true}}'])
def test_container_filters_in_both_forms(text):
    for pattern in ("^/(web|db)_[0-9]+$", "a|b|c", r"^/a\.b\+\*$", "foo.*bar", "[(+*]+"):
        dockerd.check_container_filters({"name": [pattern]})
    assert dockerd.parse_filters(text, dockerd.CONTAINER_FILTERS) == {"name": ["a"]}
    with pytest.raises(dockerd.BadParameter, match="(?i)invalid filter 'bad'"):
        dockerd.parse_filters('{"bad":["a"]}', dockerd.CONTAINER_FILTERS)


# ------------------------------------------------------------------------------------------------------------
# Images
#
# What stands in the tables here was recorded from the real dockerd 20.10.24: configurations, ids, messages.
# ------------------------------------------------------------------------------------------------------------

A64 = "a" * 64


@pytest.mark.parametrize(
    "text, full, familiar",
    [
        ("busybox", "docker.io/library/busybox", "busybox"),
        ("library/busybox:1", "docker.io/library/busybox:1", "busybox:1"),
        ("index.docker.io/busybox", "docker.io/library/busybox", "busybox"),
        ("docker.io/me/x:v1.0-a_b", "docker.io/me/x:v1.0-a_b", "me/x:v1.0-a_b"),
        ("a/library/x", "docker.io/a/library/x", "a/library/x"),
        ("localhost/x", "localhost/x", "localhost/x"),
        ("localhost:5000/x:t", "localhost:5000/x:t", "localhost:5000/x:t"),
        ("host:5000/x", "host:5000/x", "host:5000/x"),
        ("UP.io/x", "UP.io/x", "UP.io/x"),
        ("[::1]:5000/x", "[::1]:5000/x", "[::1]:5000/x"),
        ("foo__bar/x--y", "docker.io/foo__bar/x--y", "foo__bar/x--y"),
        ("x:t@sha256:" + A64, f"docker.io/library/x:t@sha256:{A64}", f"x:t@sha256:{A64}"),
    ],
)
def test_references_are_completed_and_shortened(text: str, full: str, familiar: str) -> None:
    reference = dockerd.parse_reference(text)
    assert (str(reference), reference.familiar) == (full, familiar)
    assert dockerd.parse_reference(full) == reference


@pytest.mark.parametrize(
    "repo, tag, message",
    [
        ("Foo", "", "invalid reference format: repository name must be lowercase"),
        ("localhost/Foo", "", "invalid reference format: repository name must be lowercase"),
        ("foo", "a b", "invalid tag format"),
        ("foo", ":x", "invalid tag format"),
        ("foo", "a" * 129, "invalid tag format"),
        ("foo:" + "a" * 129, "", "invalid reference format"),
        ("foo/", "", "invalid reference format"),
        ("foo:", "", "invalid reference format"),
        ("foo___bar", "", "invalid reference format"),
        ("-foo", "", "invalid reference format"),
        ("foo//bar", "", "invalid reference format"),
        ("http://foo", "", "invalid reference format"),
        ("foo\n", "", "invalid reference format"),
        ("\u00e9", "", "invalid reference format"),
        ("foo@sha256:aa", "", "invalid reference format"),
        ("docker.io/foo@x", "", "invalid reference format"),
        ("../../etc", "", "invalid reference format"),
        ("a:b:c", "", "invalid reference format"),
        ("x@md5:" + "a" * 32, "", "unsupported digest algorithm"),
        ("x@sha256:" + "a" * 40, "", "invalid checksum digest length"),
        ("a" * 256, "", "repository name must not be more than 255 characters"),
        ("foo@sha256:" + A64, "", "cannot import digest reference"),
        (A64, "", f"invalid repository name ({A64}), cannot specify 64-byte hexadecimal strings"),
        ("sha256", "", "refusing to create an ambiguous tag using digest algorithm as name"),
        ("sha256", "x", "refusing to create an ambiguous tag using digest algorithm as name"),
    ],
)
def test_malformed_references_are_refused_in_dockers_words(repo: str, tag: str, message: str) -> None:
    with pytest.raises(dockerd.BadParameter) as refused:
        dockerd.parse_repo_tag(repo, tag)
    assert str(refused.value) == message


CHANGES: list[tuple[str, Any]] = [
    ("CMD sh", {"Cmd": ["/bin/sh", "-c", "sh"]}),
    ('CMD ["a","b"]', {"Cmd": ["a", "b"]}),
    ("CMD", {"Cmd": ["/bin/sh", "-c"]}),
    ("CMD []", {"Cmd": []}),
    ("ENTRYPOINT", {}),
    ("ENTRYPOINT []", {}),
    ("ENTRYPOINT foo bar", {"Entrypoint": ["/bin/sh", "-c", "foo bar"]}),
    ('CMD a\nENTRYPOINT ["x"]', {"Cmd": ["/bin/sh", "-c", "a"], "Entrypoint": ["x"]}),
    ('ENTRYPOINT ["x"]\nCMD a', {"Cmd": ["/bin/sh", "-c", "a"], "Entrypoint": ["x"]}),
    ("CMD []\nENTRYPOINT x", {"Entrypoint": ["/bin/sh", "-c", "x"]}),
    ('ENV a=b c="d e" f=g\\ h', {"Env": ["a=b", "c=d e", "f=g h"]}),
    ("ENV a b c d", {"Env": ["a=b c d"]}),
    ("ENV a", "ENV must have two arguments"),
    ("ENV", "ENV requires at least one argument"),
    ("ENV =b", "ENV names can not be blank"),
    ("ENV a=b c", 'Syntax error - can\'t find = in "c". Must be of the form: name=value'),
    (
        "ENV A=1\nENV B=$A-${A:-x}-${C:-d}-${A:+y}\nLABEL l=$B '$A'=\"$A\" z='$A'",
        {"Env": ["A=1", "B=1-1-d-y"], "Labels": {"$A": "1", "l": "1-1-d-y", "z": "$A"}},
    ),
    ("EXPOSE 80 443/tcp 53/udp", {"ExposedPorts": {"443/tcp": {}, "53/udp": {}, "80/tcp": {}}}),
    ("EXPOSE $nope 80$nope", {"ExposedPorts": {"80/tcp": {}}}),
    ("EXPOSE 8000-8002", {"ExposedPorts": {"8000/tcp": {}, "8001/tcp": {}, "8002/tcp": {}}}),
    ("EXPOSE foo", "Invalid containerPort: foo"),
    ("EXPOSE 80/foo", "Invalid proto: foo"),
    ("EXPOSE 99999", "Invalid containerPort: 99999"),
    ("EXPOSE", "EXPOSE requires at least one argument"),
    ('ENV P="1 2"\nEXPOSE $P', {"ExposedPorts": {"1/tcp": {}, "2/tcp": {}}, "Env": ["P=1 2"]}),
    ("EXPOSE 1.2.3.4:80:90", {"ExposedPorts": {"90/tcp": {}}}),
    ("EXPOSE 80:90", {"ExposedPorts": {"90/tcp": {}}}),
    ("EXPOSE 80/TCP", {"ExposedPorts": {"80/tcp": {}}}),
    ("EXPOSE 80-70", "Invalid containerPort: 80-70"),
    ("EXPOSE 80-", "Invalid containerPort: 80-"),
    ("EXPOSE /tcp", "No port specified: /tcp<empty>"),
    ('EXPOSE ["80"]', "Invalid containerPort: [80]"),
    ("LABEL a=b", {"Labels": {"a": "b"}}),
    ("LABEL a", "LABEL must have two arguments"),
    ("LABEL a b", {"Labels": {"a": "b"}}),
    ("LABEL", "LABEL requires at least one argument"),
    ('LABEL "a b"=<c>&"d"', {"Labels": {"a b": "<c>&d"}}),
    ("ONBUILD RUN x  y", {"OnBuild": ["RUN x  y"]}),
    ("ONBUILD", "ONBUILD requires at least one argument"),
    ("ONBUILD ONBUILD RUN x", "Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed"),
    ("ONBUILD FROM x", "FROM isn't allowed as an ONBUILD trigger"),
    ("onbuild foo x", {"OnBuild": ["foo x"]}),
    ("ONBUILD MAINTAINER x", "MAINTAINER isn't allowed as an ONBUILD trigger"),
    ("ONBUILD ENV a", "ENV must have two arguments"),
    ("USER bob:grp", {"User": "bob:grp"}),
    ("USER", "USER requires exactly one argument"),
    ("USER $X", {}),
    ("USER a b", {"User": "a b"}),
    ("VOLUME /a /b", {"Volumes": {"/a": {}, "/b": {}}}),
    ('VOLUME ["/a", "/c"]', {"Volumes": {"/a": {}, "/c": {}}}),
    ("VOLUME", "VOLUME requires at least one argument"),
    ('VOLUME [""]', "VOLUME specified can not be an empty string"),
    ("VOLUME []", "VOLUME requires at least one argument"),
    ("VOLUME [1]", "when using JSON array syntax, arrays must be comprised of strings only"),
    ("WORKDIR /a\nWORKDIR b", {"WorkingDir": "/a/b"}),
    ("WORKDIR rel", {"WorkingDir": "/rel"}),
    ("WORKDIR", "WORKDIR requires exactly one argument"),
    ("WORKDIR /a/../b/", {"WorkingDir": "/a/../b/"}),
    ('WORKDIR ""', "cannot normalize nothing"),
    ("WORKDIR $X", "cannot normalize nothing"),
    ("HEALTHCHECK CMD foo", {"Healthcheck": {"Test": ["CMD-SHELL", "foo"]}}),
    (
        'HEALTHCHECK --interval=5s --timeout=1m --retries=3 --start-period=1h2m3.5s CMD ["a","b"]',
        {
            "Healthcheck": {
                "Test": ["CMD", "a", "b"],
                "Interval": 5000000000,
                "Timeout": 60000000000,
                "StartPeriod": 3723500000000,
                "Retries": 3,
            }
        },
    ),
    ("HEALTHCHECK NONE", {"Healthcheck": {"Test": ["NONE"]}}),
    ("HEALTHCHECK NONE x", "HEALTHCHECK NONE takes no arguments"),
    ("HEALTHCHECK", "HEALTHCHECK requires at least one argument"),
    ("HEALTHCHECK foo", 'Unknown type "FOO" in HEALTHCHECK (try CMD)'),
    ("HEALTHCHECK CMD", "Missing command after HEALTHCHECK CMD"),
    ("HEALTHCHECK --interval=1us CMD x", 'Interval "interval" cannot be less than 1ms'),
    ("HEALTHCHECK --foo=1 CMD x", "Unknown flag: foo"),
    ("HEALTHCHECK --interval CMD x", "Missing a value on flag: interval"),
    ("HEALTHCHECK --retries=0 CMD x", "--retries must be at least 1 (not 0)"),
    ("HEALTHCHECK --retries=x CMD x", 'strconv.ParseInt: parsing "x": invalid syntax'),
    ("HEALTHCHECK --interval=5 CMD x", 'time: missing unit in duration "5"'),
    ("HEALTHCHECK --interval=foo CMD x", 'time: invalid duration "foo"'),
    ("HEALTHCHECK --interval=1s --interval=2s CMD x", "Duplicate flag specified: interval"),
    ("HEALTHCHECK --interval=0s CMD x", 'Interval "interval" cannot be less than 1ms'),
    ("HEALTHCHECK --interval= CMD x", {"Healthcheck": {"Test": ["CMD-SHELL", "x"]}}),
    ("RUN x", "run is not a valid change command"),
    ("FROM x", "from is not a valid change command"),
    ("MAINTAINER me", "maintainer is not a valid change command"),
    ("ARG x", "arg is not a valid change command"),
    ("foo bar", "foo is not a valid change command"),
    ("COPY a b", "copy is not a valid change command"),
    ("", "file with no instructions"),
    ("# c", "file with no instructions"),
    ("env a=b", {"Env": ["a=b"]}),
    ("CMD a \\\nb", {"Cmd": ["/bin/sh", "-c", "a b"]}),
    ("CMD --x a", "Unknown flag: x"),
    (
        "ENV a='b",
        'failed to process "\'b": unexpected end of statement while looking for matching single-quote',
    ),
    (
        'ENV a="b',
        'failed to process "\\"b": unexpected end of statement while looking for matching double-quote',
    ),
    ("ENV a=${b", "failed to process \"${b\": missing ':' in substitution"),
    ("ENV a=${}", 'failed to process "${}": syntax error: bad substitution'),
    ("ENV a=${b:x}", 'failed to process "${b:x}": unsupported modifier (x) in substitution'),
    ("ENV a=${b:?}", 'failed to process "${b:?}": b: is not allowed to be unset'),
    ("ENV a=${b:?no}", 'failed to process "${b:?no}": b: no'),
    ("ENV a=${b?}", 'failed to process "${b?}": b: is not allowed to be unset'),
    ("ENV a=${b.c}", "failed to process \"${b.c}\": missing ':' in substitution"),
    ('CMD ["a"', {"Cmd": ["/bin/sh", "-c", '["a"']}),
    ("CMD [1]", "when using JSON array syntax, arrays must be comprised of strings only"),
    ("ENV a=b\nCMD x", {"Env": ["a=b"], "Cmd": ["/bin/sh", "-c", "x"]}),
    ("CMD a\nCMD b", {"Cmd": ["/bin/sh", "-c", "b"]}),
    ('CMD ["a"] x', {"Cmd": ["a"]}),
    (
        'LABEL a=b\\tc d="x\\ty" e="x\\\\y" f="x\\$y" g=\'x\\\'',
        {"Labels": {"a": "btc", "d": "x\\ty", "e": "x\\y", "f": "x$y", "g": "x\\"}},
    ),
    ("ENV a=1 a=2\nENV b=$a$$c${a}x", {"Env": ["a=2", "b=2c2x"]}),
    ("USER  x  ", {"User": "x"}),
    ("CMD   a   b ", {"Cmd": ["/bin/sh", "-c", "a   b"]}),
    ("ENV a   b   c ", {"Env": ["a=b   c"]}),
    ("WORKDIR /a b", {"WorkingDir": "/a b"}),
    (
        'VOLUME "/a b"',
        'failed to process "\\"/a": unexpected end of statement while looking for matching double-quote',
    ),
    ("EXPOSE 80\t90", {"ExposedPorts": {"80/tcp": {}, "90/tcp": {}}}),
    (
        'HEALTHCHECK --interval=1h CMD ["a"] x',
        {"Healthcheck": {"Test": ["CMD", "a"], "Interval": 3600000000000}},
    ),
    ("CMD\ta", {"Cmd": ["/bin/sh", "-c", "a"]}),
    ("CMD é\u2028<&>\x08\x0c\x7f", {"Cmd": ["/bin/sh", "-c", "é\u2028<&>\x08\x0c\x7f"]}),
    ("ENV a=\\\nb", {"Env": ["a=b"]}),
    ("#escape=`\nCMD a `\nb", {"Cmd": ["/bin/sh", "-c", "a b"]}),
    ("ENV a=b\\", {"Env": ["a=b"]}),
    ("CMD # x", {"Cmd": ["/bin/sh", "-c", "# x"]}),
    ("ENV a=b # c", 'Syntax error - can\'t find = in "#". Must be of the form: name=value'),
    ("ENV a=b c=# d", 'Syntax error - can\'t find = in "d". Must be of the form: name=value'),
    ("LABEL a.b=c $X=y", {"Labels": {"": "y", "a.b": "c"}}),
    ("STOPSIGNAL SIGTERM", {"StopSignal": "SIGTERM"}),
    ("STOPSIGNAL rtmin+1", {"StopSignal": "rtmin+1"}),
    ("STOPSIGNAL foo", "Invalid signal: foo"),
    ("STOPSIGNAL", "STOPSIGNAL requires exactly one argument"),
    ("SHELL []", "shell is not a valid change command"),
    (
        "HEALTHCHECK --start-interval=2s CMD x",
        {"Healthcheck": {"Test": ["CMD-SHELL", "x"], "StartInterval": 2000000000}},
    ),
]


@pytest.mark.parametrize("changes, expected", CHANGES)
def test_changes_give_dockers_configuration_or_dockers_error(changes: str, expected: Any) -> None:
    if isinstance(expected, str):
        with pytest.raises(dockerd.BadParameter) as refused:
            dockerd.apply_changes({}, changes.split("\n"))
        assert str(refused.value) == expected
    else:
        config = dockerd.apply_changes({}, changes.split("\n"))
        empty = dockerd.full_config({})
        full = dockerd.full_config(config)
        assert {
            name: value for name, value in full.items() if name not in empty or empty[name] != value
        } == expected


def test_changes_leave_the_given_configuration_alone() -> None:
    config = {"Env": ["A=1"], "Cmd": ["x"], "Labels": {"l": "1"}}
    changed = dockerd.apply_changes(config, ["ENV B=$A", "LABEL m=2", "ENTRYPOINT y"])
    assert config == {"Env": ["A=1"], "Cmd": ["x"], "Labels": {"l": "1"}}
    assert (changed["Env"], changed["Labels"], changed["Cmd"]) == (["A=1", "B=1"], {"l": "1", "m": "2"}, None)


RECORDED_CONFIG = (
    b'{"architecture":"amd64","comment":"Imported from -","config":{"Hostname":"","Domainname":"","User":"",'
    b'"AttachStdin":false,"AttachStdout":false,"AttachStderr":false,"Tty":false,"OpenStdin":false,"StdinOnce":false,'
    b'"Env":["PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"],"Cmd":["sh"],"Image":"",'
    b'"Volumes":null,"WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":null},"container_config":'
    b'{"Hostname":"","Domainname":"","User":"","AttachStdin":false,"AttachStdout":false,"AttachStderr":false,'
    b'"Tty":false,"OpenStdin":false,"StdinOnce":false,"Env":null,"Cmd":null,"Image":"","Volumes":null,'
    b'"WorkingDir":"","Entrypoint":null,"OnBuild":null,"Labels":null},"created":"2026-11-24T00:05:20.733618235Z",'
    b'"docker_version":"20.10.24+dfsg1","history":[{"created":"2026-11-24T00:05:20.733618235Z",'
    b'"comment":"Imported from -"}],"os":"linux","rootfs":{"type":"layers","diff_ids":'
    b'["sha256:1b9adea80f8a6cd84e8530d8eb10d560d120923ab0dd4224afad8d2188a5162b"]}}'
)


def test_an_imported_images_configuration_is_that_of_the_real_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd, "VERSION", "20.10.24+dfsg1")
    config = dockerd.apply_changes(
        {}, ["ENV PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin", 'CMD ["sh"]']
    )
    document = dockerd.import_document(
        config,
        "sha256:1b9adea80f8a6cd84e8530d8eb10d560d120923ab0dd4224afad8d2188a5162b",
        dockerd.Platform("linux", "amd64"),
        "Imported from -",
        1795478720733618235,
    )
    assert document == RECORDED_CONFIG
    assert hashlib.sha256(document).hexdigest().startswith("51a9332a1da1db4d9c6674f81a8e1e93c4546020c1c32d7")


def test_json_is_escaped_as_go_does() -> None:
    text = '\u00e9\u2028\u2029<&>\b\f\n\t\x01\x7f\\b"' + "\udcff"
    escaped = '"\u00e9\\u2028\\u2029\\u003c\\u0026\\u003e\\u0008\\u000c\\n\\t\\u0001\x7f\\\\b\\"\ufffd"'
    assert dockerd.docker_json(text) == escaped.encode()


@pytest.mark.parametrize(
    "pattern, matching, others",
    [
        ("a*", ["a", "ab", "a:x"], ["ba", "a/b"]),
        ("*/*", ["a/b"], ["a", "a/b/c"]),
        ("b:v[0-9]", ["b:v1"], ["b:vx"]),
        ("[^a]?", ["bc"], ["ac", "b/"]),
        (r"a\*", ["a*"], ["ab"]),
        ("[a-", None, []),
        ("[]a]", None, []),
        ("[", None, []),
        ("a\\", None, []),
        (r"[\]]", ["]"], ["a"]),
        ("a.c", ["a.c"], ["abc"]),
        ("[[]", ["["], ["a"]),
        ("*a?*/b*c*", ["bac/bc", "aaa/bbcc"], ["a/bc", "ab/b/c"]),
        ("**[b-c]*d", ["bd", "abcd"], ["d/d", "ad"]),
        ("*a" * 20 + "*b", ["a" * 200 + "b"], ["a" * 255]),
    ],
)
def test_patterns_match_as_gos_do(pattern: str, matching: Optional[list[str]], others: list[str]) -> None:
    if matching is None:
        with pytest.raises(dockerd.BadParameter, match="^syntax error in pattern$"):
            dockerd.compile_pattern(pattern)
        return
    compiled = dockerd.compile_pattern(pattern)
    assert [text for text in matching if not compiled.fullmatch(text)] == []
    assert [text for text in others if compiled.fullmatch(text)] == []


@pytest.mark.parametrize(
    "text, platform",
    [
        ("linux/amd64", "linux/amd64"),
        ("linux/x86_64", "linux/amd64"),
        ("arm64", "linux/arm64"),
        ("linux/arm64/v8", "linux/arm64"),
        ("linux/aarch64", "linux/arm64"),
        ("linux/arm", "linux/arm/v7"),
        ("linux/arm/v6", "linux/arm/v6"),
        ("Windows/amd64", "windows/amd64"),
        ("linux", f"linux/{dockerd.host_platform().architecture}"),
    ],
)
def test_platforms_are_read_and_normalised(text: str, platform: str) -> None:
    assert str(dockerd.parse_platform(text)) == platform


@pytest.mark.parametrize("text", ["foo", "linux/", "/", "linux/a/b/c", "li nux/amd64", ""])
def test_malformed_platforms_are_refused(text: str) -> None:
    with pytest.raises(dockerd.BadParameter):
        dockerd.parse_platform(text)


# The stores and the jobs, on each driver that the machine has


def file_tar(name: str = "hello", data: bytes = b"hi\n") -> bytes:
    """A tar with one file."""
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w") as tar:
        entry = tarfile.TarInfo(name)
        entry.size = len(data)
        tar.addfile(entry, io.BytesIO(data))
    return archive.getvalue()


class ImageRig:
    """The image jobs on a data root of their own, with containers that the test declares."""

    options: dict[str, Any] = {}

    def __init__(self, root: str, driver: str) -> None:
        self.root, self.driver = root, driver
        self.containers: dict[str, tuple[str, bool]] = {}  # container id: (image id, running)
        self.events: list[tuple[str, str, dict[str, str]]] = []
        self.restart()

    def restart(self) -> None:
        """Load everything from disk again."""
        config = dockerd.Config(data_root=self.root, storage_driver=self.driver, **self.options)
        self.images = dockerd.Images(
            config,
            lambda *event: self.events.append(event),
            lambda image: [
                (container, running)
                for container, (used, running) in self.containers.items()
                if used == image
            ],
        )
        self.layers = self.images.layers
        self.engine = dockerd.Engine()
        self.engine.logging = False
        self.engine.install(self.images)
        os.makedirs(os.path.join(self.root, "tmp"), exist_ok=True)
        self.engine.install(dockerd.ImageArchives(config, self.images))

    def run(self, name: str, *arguments: str, stdin: Any = b"", **env: Any) -> Any:
        """The reply of a job, else the last line of its progress."""
        job = self.engine.job(name, *arguments, **env)
        job.stdin = io.BytesIO(stdin) if isinstance(stdin, bytes) else stdin
        out = job.stdout.add(io.BytesIO())
        reply = job.run()
        return reply if reply is not None else out.getvalue().decode().splitlines()[-1:]

    def add(self, repo: str = "", tag: str = "", archive: Optional[bytes] = None, **env: Any) -> str:
        """The id of a freshly imported image."""
        (line,) = self.run("import", "-", repo, tag, stdin=file_tar() if archive is None else archive, **env)
        return json.loads(line)["status"]

    def refused(self, status: int, name: str, *arguments: str, **env: Any) -> str:
        """The message of a job that must fail with this HTTP status."""
        with pytest.raises(dockerd.DockerError) as failure:
            self.run(name, *arguments, **env)
        assert dockerd.http_status(failure.value) == status
        return str(failure.value)

    def listed(self, **filters: Any) -> list[str]:
        """The ids of the images that the filters let through."""
        return [image["Id"] for image in self.run("images", filters=filters)]

    def image_files(self, *names: str) -> list[str]:
        """A directory of image/<driver>."""
        return sorted(os.listdir(os.path.join(self.root, "image", self.driver, *names)))

    def assert_whole(self) -> None:
        """Nothing on disk that the tables do not name, and the other way round."""
        assert dockerd.REMOVALS.wait(60)
        store, layers = self.images.store.all(), self.layers
        known = {layers.get(chain) for image in store for chain in image.chain_ids}
        mounts = [layers._mount(container) for container in layers.rw_ids()]
        known |= {layer for mount in mounts for layer in layers.lineage(mount.parent)}
        names = {layer.cache_id for layer in known} | {mount.mount_id for mount in mounts}
        names |= {mount.init_id for mount in mounts if mount.init_id}
        there = {name.removesuffix("-filled") for name in os.listdir(layers.driver.layers())}
        assert there - {"l"} == names
        assert self.image_files("layerdb", "sha256") == sorted(layer.chain_id[7:] for layer in known)
        assert self.image_files("layerdb", "tmp") == []
        assert self.image_files("layerdb", "mounts") == sorted(layers.rw_ids())
        assert self.image_files("imagedb", "content", "sha256") == sorted(image.id[7:] for image in store)
        assert set(self.image_files("imagedb", "metadata", "sha256")) <= {image.id[7:] for image in store}
        tags = json.loads(
            read_or_none(os.path.join(self.root, "image", self.driver, "repositories.json"))
            or ('{"Repositories":{}}')
        )["Repositories"]
        assert {image for known in tags.values() for image in known.values()} <= {image.id for image in store}
        for layer in known:
            assert os.listdir(layers.driver.diff_dir(layer.cache_id)) != []


def read_or_none(path: str) -> Optional[str]:
    """The text of a file, or None."""
    with contextlib.suppress(FileNotFoundError), open(path) as file:
        return file.read()
    return None


@pytest.fixture(params=["overlay2", "vfs"])
def rig(request: pytest.FixtureRequest, tmp_path: Any) -> ImageRig:
    """The image jobs on an empty data root."""
    return ImageRig(str(tmp_path), request.param)


def test_import_lists_inspects_and_tells_the_history(rig: ImageRig) -> None:
    archive = file_tar("x", b"1" * 1000)
    image = rig.add("b", "v1", archive, message="hello & <bye>", changes=["LABEL x=1", 'CMD ["/x"]'])
    digest = "sha256:" + hashlib.sha256(archive).hexdigest()
    (listed,) = rig.run("images")
    assert listed == {
        "Id": image,
        "ParentId": "",
        "RepoTags": ["b:v1"],
        "RepoDigests": [],
        "Created": listed["Created"],
        "Size": 1000,
        "SharedSize": -1,
        "Labels": {"x": "1"},
        "Containers": 0,
    }
    told = rig.run("image_inspect", "b:v1")
    assert abs(told["Metadata"].pop("LastTagTime") > told["Created"])
    assert told.pop("GraphDriver")["Name"] == rig.driver
    assert dockerd.parse_timestamp(told.pop("Created")) // 10**9 == listed["Created"]
    assert told == {
        "Id": image,
        "RepoTags": ["b:v1"],
        "RepoDigests": [],
        "Parent": "",
        "Comment": "hello & <bye>",
        "DockerVersion": dockerd.VERSION,
        "Author": "",
        "Architecture": dockerd.host_platform().architecture,
        "Os": "linux",
        "Size": 1000,
        "RootFS": {"Type": "layers", "Layers": [digest]},
        "Metadata": {},
        "Config": {
            "User": "",
            "Env": None,
            "Entrypoint": None,
            "Cmd": ["/x"],
            "Volumes": None,
            "WorkingDir": "",
            "Labels": {"x": "1"},
            "OnBuild": None,
        },
    }
    assert rig.run("history", "b:v1") == [
        {
            "Id": image,
            "Created": listed["Created"],
            "CreatedBy": "",
            "Tags": ["b:v1"],
            "Size": 1000,
            "Comment": "hello & <bye>",
        }
    ]
    assert [(action, attributes["name"]) for action, _, attributes in rig.events] == [
        ("tag", "b:v1"),
        ("import", image),
    ]
    layer = rig.layers.get(digest)
    assert os.listdir(rig.layers.driver.diff_dir(layer.cache_id)) == ["x"]
    record = os.path.join(rig.root, "image", rig.driver, "layerdb", "sha256", digest[7:])
    assert sorted(os.listdir(record)) == ["cache-id", "diff", "size", "tar-split.json.gz"]
    assert list(dockerd.read_facts(record, ("cache-id", "diff", "size"))) == [layer.cache_id, digest, "1000"]
    assert read_or_none(os.path.join(rig.root, "image", rig.driver, "repositories.json")) == (
        '{"Repositories":{"b":{"b:v1":"' + image + '"}}}'
    )
    rig.restart()
    assert rig.run("images") == [listed]
    rig.assert_whole()


def test_what_stands_behind_the_archive_belongs_to_the_diff_id(rig: ImageRig) -> None:
    archive = file_tar() + b"\0" * 5000 + b"trailing"
    rig.add("a", archive=archive)
    assert rig.run("image_inspect", "a")["RootFS"]["Layers"] == [
        "sha256:" + hashlib.sha256(archive).hexdigest()
    ]


def test_images_are_found_by_every_name_they_have(rig: ImageRig) -> None:
    image = rig.add("a")
    for name in (
        "a",
        "a:latest",
        "docker.io/a",
        "library/a:latest",
        image,
        image[7:],
        image[:14],
        image[7:10],
    ):
        assert rig.images.resolve(name).id == image
    for name, complaint in (
        ("nosuch", "nosuch:latest"),
        ("a:t", "a:t"),
        ("x/y", "x/y:latest"),
        (f"a@sha256:{A64}",) * 2,
        (A64, f"sha256:{A64}"),
        (f"sha256:{A64}",) * 2,
        ("sha256:abcdeg",) * 2,
    ):
        assert rig.refused(404, "image_inspect", name) == f"No such image: {complaint}"
    assert rig.refused(400, "image_inspect", "Foo").endswith("repository name must be lowercase")
    assert rig.refused(400, "image_inspect", "") == "invalid reference format"
    with pytest.raises(dockerd.NotFound, match=r"does not match the specified platform \(linux/s390x\)$"):
        rig.images.resolve("a", "linux/s390x")


def test_an_ambiguous_beginning_of_an_id_names_no_image(rig: ImageRig) -> None:
    ids = [rig.add(message=str(number)) for number in range(17)]
    digit = collections.Counter(image[7] for image in ids).most_common(1)[0][0]
    assert rig.refused(404, "image_inspect", digit) == f"No such image: {digit}:latest"
    assert rig.refused(400, "image_delete", "") == "invalid reference format"


def test_the_list_is_filtered(rig: ImageRig) -> None:
    old = rig.add("a", changes=["LABEL x=1 y=2"])
    middle, newest = rig.add("b", "v1"), rig.add()
    assert rig.listed() == [newest, middle, old]
    for filters, expected in (
        ({"dangling": ["true"]}, [newest]),
        ({"dangling": {"1": True}}, [newest]),
        ({"dangling": ["false"]}, [middle, old]),
        ({"label": ["x"]}, [old]),
        ({"label": ["x=1", "y"]}, [old]),
        ({"label": ["x=2"]}, []),
        ({"before": ["b:v1"]}, [old]),
        ({"since": ["b:v1"]}, [newest]),
        ({"reference": ["b*"]}, [middle]),
        ({"reference": ["*:v1", "a"]}, [middle, old]),
        ({"reference": ["*/*"]}, []),
        ({"until": ["2000-01-01T00:00:00Z"]}, []),
    ):
        assert rig.listed(**filters) == expected, filters
    for wrong, status, message in (
        ({"dangling": ["x"]}, 400, "invalid filter 'dangling=[x]'"),
        ({"foo": ["x"]}, 400, "invalid filter 'foo'"),
        ({"before": ["nosuch"]}, 404, "No such image: nosuch:latest"),
        ({"reference": ["["]}, 400, "syntax error in pattern"),
        ({"label": "x"}, 400, "invalid filter 'label'"),
    ):
        assert rig.refused(status, "images", filters=wrong) == message
    assert rig.refused(400, "images", filters="[]") == "invalid filter"
    assert {image["SharedSize"] for image in rig.run("images", **{"shared-size": True})} == {3}


def test_tags_move_and_are_refused_in_dockers_words(rig: ImageRig) -> None:
    first, second = rig.add("a"), rig.add("b")
    rig.run("tag", "a", "c", "t")
    rig.run("tag", first[7:19], "f/g")
    rig.run("tag", "a", "e:x", "y")
    assert rig.run("image_inspect", "a")["RepoTags"] == ["f/g:latest", "a:latest", "c:t", "e:y"]
    rig.run("tag", "b", "c", "t")
    assert rig.images.resolve("c:t").id == second
    for repo, tag, message in (
        ("D", "", "invalid reference format: repository name must be lowercase"),
        ("d", "b c", "invalid tag format"),
        ("", "", "invalid reference format"),
        ("sha256", "", "refusing to create an ambiguous tag using digest algorithm as name"),
    ):
        assert rig.refused(400, "tag", "a", repo, tag) == message
    assert rig.refused(404, "tag", "nosuch", "d") == "No such image: nosuch:latest"


def test_a_name_is_untagged_and_its_last_one_deletes(rig: ImageRig) -> None:
    image = rig.add("a")
    chain = rig.images.resolve("a").chain_id
    rig.run("tag", "a", "a", "2")
    rig.run("tag", "a", "b")
    assert rig.run("image_delete", "b") == [{"Untagged": "b:latest"}]
    assert rig.refused(409, "image_delete", image[:19]) == (
        f"conflict: unable to delete {image[7:19]} (must be forced) - "
        "image is referenced in multiple repositories"
    )
    assert rig.run("image_delete", "a:2") == [{"Untagged": "a:2"}]
    assert rig.run("image_delete", "a") == [{"Untagged": "a:latest"}, {"Deleted": image}, {"Deleted": chain}]
    assert [event[0] for event in rig.events[4:]] == ["untag"] * 3 + ["delete"]
    assert rig.refused(404, "image_delete", "a") == "No such image: a:latest"
    rig.assert_whole()


def test_a_name_that_begins_the_id_is_a_name(rig: ImageRig) -> None:
    image = rig.add("x")
    rig.run("tag", "x", image[7:9])
    assert rig.run("image_delete", image[7:9]) == [{"Untagged": f"{image[7:9]}:latest"}]


def test_force_deletes_all_names(rig: ImageRig) -> None:
    image = rig.add("a")
    rig.run("tag", "a", "b")
    records = rig.run("image_delete", image, force=True)
    assert records[:3] == [{"Untagged": "a:latest"}, {"Untagged": "b:latest"}, {"Deleted": image}]
    rig.assert_whole()


def test_digests_go_with_the_last_tag_of_their_repository(rig: ImageRig) -> None:
    image = rig.images.resolve(rig.add("a"))
    for name in (f"a@sha256:{A64}", f"b@sha256:{A64}"):
        rig.images.tags.set(dockerd.parse_reference(name), image.id)
    assert rig.run("images")[0]["RepoDigests"] == [f"a@sha256:{A64}", f"b@sha256:{A64}"]
    assert rig.images.resolve(f"a:any@sha256:{A64}") is image
    assert rig.run("image_delete", "a") == [{"Untagged": "a:latest"}, {"Untagged": f"a@sha256:{A64}"}]
    assert rig.run("image_delete", f"b@sha256:{A64}")[:2] == [
        {"Untagged": f"b@sha256:{A64}"},
        {"Deleted": image.id},
    ]


def test_containers_keep_an_image(rig: ImageRig) -> None:
    image = rig.add("b", "v1")
    short, container = image[7:19], "c" * 64
    chain = rig.images.resolve(image).chain_id
    rig.containers[container] = (image, False)
    rig.layers.create_rw(container, chain, lambda directory: None)
    assert rig.refused(409, "image_delete", "b:v1") == (
        'conflict: unable to remove repository reference "b:v1" (must force) - '
        f"container {container[:12]} is using its referenced image {short}"
    )
    assert rig.refused(409, "image_delete", image) == (
        f"conflict: unable to delete {short} (must be forced) - "
        f"image is being used by stopped container {container[:12]}"
    )
    rig.containers[container] = (image, True)
    for force in (False, True):
        assert rig.refused(409, "image_delete", image, force=force) == (
            f"conflict: unable to delete {short} (cannot be forced) - "
            f"image is being used by running container {container[:12]}"
        )
    assert rig.run("images")[0]["Containers"] == 1
    rig.containers[container] = (image, False)
    assert rig.run("image_delete", image, force=True) == [{"Untagged": "b:v1"}, {"Deleted": image}]
    rig.assert_whole()
    rig.restart()
    assert rig.layers.lineage(chain) != []
    del rig.containers[container]
    rig.layers.remove_rw(container)
    assert rig.image_files("layerdb", "sha256") == []
    rig.assert_whole()


def add_child(rig: ImageRig, parent: str, comment: str) -> str:
    """The id of an image without a layer of its own, made from another as commit does it."""
    document = {**rig.images.resolve(parent).document, "comment": comment}
    document["history"] = document["history"] + [
        {"created": document["created"], "created_by": comment, "empty_layer": True}
    ]
    return rig.images.store.create(dockerd.docker_json(document), parent).id


def test_children_keep_their_parents_and_take_them_along(rig: ImageRig) -> None:
    parent = rig.add("a")
    first, second = add_child(rig, parent, "first"), add_child(rig, parent, "second")
    rig.images.set_tag(dockerd.parse_reference("kid"), rig.images.resolve(first))
    assert rig.run("history", "kid")[0]["Id"] == first and rig.run("history", "kid")[1]["Tags"] == [
        "a:latest"
    ]
    rig.restart()
    assert rig.run("image_inspect", first)["Parent"] == parent
    assert rig.run("image_delete", "a") == [{"Untagged": "a:latest"}]
    assert rig.refused(409, "image_delete", parent, force=True) == (
        f"conflict: unable to delete {parent[7:19]} (cannot be forced) - image has dependent child images"
    )
    assert parent not in [image["Id"] for image in rig.run("images")]
    assert parent in [image["Id"] for image in rig.run("images", all=True)]
    assert rig.listed(dangling=["true"]) == [second]
    assert rig.run("image_delete", second, noprune=True) == [{"Deleted": second}]
    deleted = [record["Deleted"] for record in rig.run("image_delete", "kid")[1:]]
    assert deleted[:2] == [first, parent] and len(deleted) == 3
    rig.assert_whole()


def test_an_image_is_removed_for_its_platform_alone(rig: ImageRig) -> None:
    platforms = [json.dumps({"os": "linux", "architecture": name, "variant": ""})
                 for name in ("s390x", dockerd.host_platform().architecture)]
    rig.add("a")
    for asked in (platforms[:1], platforms):
        assert "does not match the specified platform (linux/s390x)" in rig.refused(
            404, "image_delete", "a", platforms=asked)
    assert rig.refused(400, "image_delete", "a", platforms=["linux/s390x"]).startswith(
        "failed to parse platform: ")
    assert len(rig.run("image_delete", "a", platforms=platforms[1:])) > 1


def test_images_share_a_layer_until_the_last_is_gone(rig: ImageRig) -> None:
    first, second = rig.add("a"), rig.add("b")
    assert rig.run("image_delete", "a") == [{"Untagged": "a:latest"}, {"Deleted": first}]
    rig.assert_whole()
    assert len(rig.run("image_delete", "b")) == 3
    assert second not in rig.listed()
    rig.assert_whole()


def test_prune_removes_what_nobody_needs(rig: ImageRig) -> None:
    """Untagged heads by default, all with dangling=false; never what a container has, or others are made
    of."""

    def prune(**filters: Any) -> Any:
        answer = rig.run("image_prune", filters=filters)
        return list(answer["ImagesDeleted"] or ()), answer["SpaceReclaimed"]

    base = rig.add("base", archive=file_tar("base", b"x" * 100))
    child = add_child(rig, base, "child")
    untagged, used = rig.add(archive=file_tar("u", b"x" * 30)), rig.add(archive=file_tar("c", b"x" * 7))
    labelled = rig.add(archive=file_tar("l", b"x" * 5), changes=["LABEL keep=1"])
    rig.run("tag", base, "base", "2")
    rig.containers["c"] = (used, False)
    assert prune(until=["1h"]) == ([], 0)
    records, size = prune(**{"label!": ["keep"]})
    assert {"Deleted": untagged} in records and {"Deleted": child} in records and size == 30
    assert rig.listed() and set(rig.listed()) == {base, used, labelled}
    records, size = prune(dangling=["false"])
    assert {"Untagged": "base:2"} in records and {"Deleted": base} in records and size == 105
    assert rig.listed() == [used]
    assert rig.events[-1] == ("prune", "", {"reclaimed": "105"})
    assert rig.refused(400, "image_prune", filters={"dangling": ["x"]}) == "invalid filter 'dangling=[x]'"
    rig.assert_whole()


def test_what_takes_space(host: Host, peer: Host) -> None:
    shapes = []
    for each in (host, peer):
        each.http("POST", "/v1.41/containers/create?name=sized", {
            "Image": "busybox", "Cmd": ["sh", "-c", "echo 12345 >/file; echo 123 >/v/file"],
            "HostConfig": {"NetworkMode": "none", "Binds": ["sized:/v"]}})
        for step in ("start", "wait"):
            each.http("POST", f"/v1.41/containers/sized/{step}")
        found = each.http("GET", "/v1.41/system/df").json
        container, = found["Containers"]
        volume, = [volume for volume in found["Volumes"] if volume["Name"] == "sized"]
        image, = [image for image in found["Images"] if "busybox:latest" in image["RepoTags"]]
        assert container["SizeRw"] == 6 and container["SizeRootFs"] == image["Size"] + 6
        assert volume["UsageData"] == {"RefCount": 1, "Size": 4} and image["Containers"] == 1
        assert found["LayersSize"] >= image["Size"] >= image["SharedSize"] >= 0
        assert found["BuildCache"] in ([], None) and found["BuilderSize"] == 0
        shapes.append([sorted(found), sorted(container), sorted(volume), sorted(image)])
        each.http("DELETE", "/v1.41/containers/sized")
        each.http("DELETE", "/v1.41/volumes/sized")
    assert shapes[0] == shapes[1]
    some = host.api("GET", "/system/df?type=volume&type=build-cache")
    assert some.items() >= {"Images": None, "Containers": None, "LayersSize": 0, "BuildCache": []}.items()
    assert host.api("GET", "/system/df?type=x", status=400)["message"] == "unknown object type: x"
    docker = Docker(docker_clis()[max(docker_clis())], host)
    lines = docker("system", "df").splitlines()
    assert {"Images", "Containers", "Local"} <= {line.split()[0] for line in lines}
    assert "VOLUME NAME" in docker("system", "df", "-v")


@pytest.mark.parametrize(
    "archive",
    [file_tar()[:514], b"notatar" * 1000, b"x", b"\x1f\x8b\x08xx"],
    ids=["truncated", "text", "byte", "gzip"],
)
def test_a_bad_archive_leaves_nothing(rig: ImageRig, archive: bytes) -> None:
    with pytest.raises((dockerd.DockerError, OSError)):
        rig.add("a", archive=archive)
    assert rig.run("images") == []
    rig.assert_whole()


def test_refusals_come_before_the_body_is_read(rig: ImageRig) -> None:
    class Unread:
        def read(self, size: int) -> bytes:
            raise AssertionError("the body was read")

    for env, repo, message in (
        ({"platform": "windows/amd64"}, "", "operating system is not supported"),
        ({"platform": "foo"}, "", '"foo": unknown operating system or architecture: invalid argument'),
        ({"changes": ["RUN x"]}, "", "run is not a valid change command"),
        ({}, "sha256", "refusing to create an ambiguous tag using digest algorithm as name"),
    ):
        assert rig.refused(400, "import", "-", repo, stdin=Unread(), **env) == message
    rig.add("a", platform="linux/arm64/v8")
    assert rig.run("image_inspect", "a")["Architecture"] == "arm64"


class ImageFiles(http.server.BaseHTTPRequestHandler):
    """Serves one archive, a redirect to a file, and nothing else."""

    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "file:///etc/passwd")
            self.end_headers()
            return
        self.send_response(200 if self.path == "/image.tar" else 404)
        body = file_tar("big", b"z" * 2000000)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments: Any) -> None:
        pass


@pytest.fixture
def image_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """HOST:PORT of a web server."""
    monkeypatch.setenv("no_proxy", "*")
    server = http.server.HTTPServer(("127.0.0.1", 0), ImageFiles)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_a_body_ends_where_its_length_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever follows, and though the server does not hang up."""
    monkeypatch.setenv("no_proxy", "*")
    with socket.create_server(("127.0.0.1", 0)) as server:
        def answer() -> socket.socket:
            connection, _ = server.accept()
            connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nabcdef")
            return connection

        ends = dockerd.start_thread(answer)
        address, start = f"http://127.0.0.1:{server.getsockname()[1]}/", time.monotonic()
        with dockerd.open_url(address, Engine().job("import")) as body, ends():
            assert dockerd.read_chunk(body) == b"abc" and body.total == 3
        assert time.monotonic() - start < 10


def test_import_from_a_url(rig: ImageRig, image_server: str) -> None:
    job = rig.engine.job("import", f"{image_server}/image.tar", "web")
    out = job.stdout.add(io.BytesIO())
    job.run()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert lines[0] == {"status": f"Downloading from http://{image_server}/image.tar"}
    total = len(file_tar("big", b"z" * 2000000))
    assert lines[-2] == {"status": "Importing", "progressDetail": {"current": total, "total": total}}
    assert lines[-1] == {"status": rig.images.resolve("web").id}
    assert rig.run("image_inspect", "web")["Comment"] == f"Imported from {image_server}/image.tar"
    for source, complaint in (
        (f"http://{image_server}/none", "with status 404 Not Found: big"),
        (f"http://{image_server}/moved", ""),
        ("file:///etc/passwd", 'Get "file:///etc/passwd": unsupported protocol scheme "file"'),
        ("http://127.0.0.1:1/x",
         'Get "http://127.0.0.1:1/x": dial tcp 127.0.0.1:1: connect: connection refused'),
        ("", ""),
    ):
        with pytest.raises(dockerd.DockerError) as failure:
            rig.run("import", source)
        assert complaint in str(failure.value).partition("\0")[0]
    rig.assert_whole()


# Layers


def test_a_chain_of_layers_is_made_in_one_transaction(rig: ImageRig) -> None:
    depth = dockerd.MAX_LAYERS if rig.driver == "overlay2" else 5
    with rig.layers.transaction() as transaction:
        chain = ""
        diffs = []
        for number in range(depth):
            layer = transaction.unpack(io.BytesIO(file_tar(str(number), b"x" * number)), chain)
            assert layer.chain_id == dockerd.chain_id(chain, layer.diff_id)
            chain = layer.chain_id
            diffs.append(layer.diff_id)
        if depth == dockerd.MAX_LAYERS:
            with pytest.raises(dockerd.DockerError, match="^max depth exceeded$"):
                transaction.unpack(io.BytesIO(file_tar()), chain)
        transaction.sync()
        image = rig.images.store.create(
            dockerd.docker_json({"rootfs": {"type": "layers", "diff_ids": diffs}})
        )
    assert image.chain_id == chain and rig.layers.size(chain) == sum(range(depth))
    rig.layers.create_rw("c", chain)
    fd = rig.layers.mount_rw("c")
    assert sorted(os.listdir(f"/proc/self/fd/{fd}"), key=int) == [str(number) for number in range(depth)]
    os.close(fd)
    rig.layers.remove_rw("c")
    rig.restart()
    rig.assert_whole()
    assert len(rig.images.store.delete(rig.images.resolve(image.id))) == depth
    rig.assert_whole()


def test_layers_that_no_image_names_go_with_their_transaction(rig: ImageRig) -> None:
    rig.add("a", archive=file_tar("base"))
    base = rig.images.resolve("a").chain_id
    with pytest.raises(ZeroDivisionError), rig.layers.transaction() as transaction:
        layer = transaction.unpack(io.BytesIO(file_tar("above")), base)
        assert rig.layers.get(layer.chain_id) == layer
        raise ZeroDivisionError
    assert not rig.layers.has(layer.chain_id) and rig.layers.has(base)
    rig.assert_whole()


def test_a_held_layer_outlives_its_image(rig: ImageRig) -> None:
    rig.add("a")
    with rig.layers.transaction() as transaction:
        layer = transaction.unpack(io.BytesIO(file_tar()))
        assert rig.run("image_delete", "a")[-1]["Deleted"] != layer.chain_id
        rig.images.store.create(
            dockerd.docker_json({"rootfs": {"type": "layers", "diff_ids": [layer.diff_id]}})
        )
    assert rig.layers.has(layer.chain_id)
    rig.assert_whole()


def test_imports_and_removals_of_one_layer_at_the_same_time(rig: ImageRig) -> None:
    failures = []

    def work(name: str) -> None:
        try:
            for _ in range(8):
                rig.add(name)
                rig.run("image_delete", name)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(f"x{number}",)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == [] and rig.run("images") == []
    rig.assert_whole()


def test_a_containers_layer_is_mounted_measured_and_removed(rig: ImageRig) -> None:
    rig.add("a", archive=file_tar("x", b"1" * 1000))
    chain = rig.images.resolve("a").chain_id

    def set_up(directory: str) -> None:
        assert os.listdir(directory) == ["x"]
        os.mkdir(os.path.join(directory, "dev"))

    rig.layers.create_rw("c", chain, set_up)
    assert rig.layers.rw_size("c") == (0, 1000)
    fd = rig.layers.mount_rw("c")
    path = f"/proc/self/fd/{fd}"
    assert sorted(os.listdir(path)) == ["dev", "x"]
    with open(f"{path}/new", "w") as file:
        file.write("z" * 77)
    os.link(f"{path}/new", f"{path}/again")
    os.symlink("12345", f"{path}/link")
    with open(f"{path}/x", "a") as file:
        file.write("2")
    os.close(fd)
    assert rig.layers.rw_size("c") == (77 + 5 + 1001, 1000 + 77 + 5 + 1001)
    fd = rig.layers.mount_rw("c", readonly=True)
    with pytest.raises(OSError):
        open(f"/proc/self/fd/{fd}/new", "w")
    os.close(fd)
    mounts = os.path.join("layerdb", "mounts", "c")
    assert rig.image_files(mounts) == ["init-id", "mount-id", "parent"]
    rig.restart()
    assert rig.layers.rw_ids() == ["c"] and rig.layers.rw_size("c")[0] == 1083
    assert rig.driver == "vfs" or "UpperDir" in (rig.layers.rw_metadata("c") or {})
    with pytest.raises(dockerd.Conflict):
        rig.layers.create_rw("c", chain)
    rig.layers.remove_rw("c")
    rig.layers.remove_rw("c")
    rig.assert_whole()


def test_commit_makes_a_layer_of_what_has_changed(rig: ImageRig) -> None:
    rig.add("a", archive=tar_of({"same": b"1", "gone": b"2", "changed": b"3", "d": None, "d/f": b"4"}))
    image = rig.images.resolve("a")
    rig.layers.create_rw("c", image.chain_id, lambda directory: os.mkdir(f"{directory}/dev"))
    same = rig.images.commit("c", image, config={}, container_config={"Cmd": ["true"]})
    assert (same.chain_ids, same.parent) == (image.chain_ids, image.id)
    assert same.document["history"][-1].items() >= {"created_by": "true", "empty_layer": True}.items()
    fd = rig.layers.mount_rw("c")
    root = Path(f"/proc/self/fd/{fd}")
    (root / "gone").unlink()
    (root / "changed").write_text("5")
    shutil.rmtree(root / "d")
    (root / "new").mkdir()
    (root / "new" / "file").write_text("6")
    os.close(fd)
    made = rig.images.commit("c", image, config={}, container_config={})
    assert made.chain_ids[:-1] == image.chain_ids and rig.layers.get(made.chain_id).size == 2
    rig.layers.remove_rw("c")
    rig.layers.create_rw("c", made.chain_id)
    fd = rig.layers.mount_rw("c")
    found = {str(path.relative_to(f"/proc/self/fd/{fd}")): path.read_text() if path.is_file() else None
             for path in Path(f"/proc/self/fd/{fd}").rglob("*")}
    os.close(fd)
    found.pop("dev", None)  # of the init layer: a whole tree shows it
    assert found == {"same": "1", "changed": "5", "new": None, "new/file": "6"}
    rig.layers.remove_rw("c")
    rig.restart()
    rig.assert_whole()


def normal_document(host: Host, image: str) -> Any:
    """An image's configuration as it stands on disk, without what differs from one daemon to another.

    20.10 packs a file's kind into its mode, later ones and ours do not: a layer that is packed differs."""
    path = host.path("data", "image", "overlay2", "imagedb", "content", "sha256", image.partition(":")[2])
    return json.loads(read_text(path), object_pairs_hook=lambda pairs: [
        (name, len(value) if name == "diff_ids" else value) for name, value in pairs
        if name not in ("Hostname", "container", "created", "docker_version")])


def test_commit_is_the_real_daemons(host: Host, peer: Host) -> None:
    script = "cd /; mkdir -p d/e; echo hi >d/file; ln d/file d/hard; ln -s file d/link; chown 7:9 d/e; " \
             "chmod 4711 d/file; echo x >>etc/passwd; touch -hd '2020-01-01 00:00:00' d/* d etc/passwd etc"
    queries = ["&author=Me+%3Cme%3E&comment=why%26how&changes=" + urllib.parse.quote(
        'ENV B="2 3"\nENTRYPOINT ["x"]\nLABEL l=m\nEXPOSE 80\nVOLUME /v'), "&pause=0"]
    bodies = [None, {"Cmd": ["other"], "Env": ["C=4"], "WorkingDir": "/w"}]
    made: list[list[Any]] = []
    for each in (host, peer):
        body = {"Image": "busybox", "Cmd": ["sh", "-c", script], "Env": ["A=1"], "Labels": {"a": "b"},
                "Healthcheck": {"Test": ["NONE"]}, "HostConfig": {"NetworkMode": "none"}}
        each.http("POST", "/v1.41/containers/create?name=source", body)
        for step in ("start", "wait"):
            each.http("POST", f"/v1.41/containers/source/{step}")
        made.append([])
        for query, given in zip(queries, bodies):
            answer = each.http("POST", "/v1.41/commit?container=source&repo=made&tag=it" + query, given)
            assert answer.status == 201, answer.body
            made[-1] += [normal_document(each, answer.json["Id"])]
        assert each.http("GET", "/v1.41/images/made:it/json").json["Parent"] == each.http(
            "GET", "/v1.41/images/busybox/json").json["Id"]
        history = each.http("GET", "/v1.41/images/made:it/history").json
        made[-1].append([[step[key] for key in ("CreatedBy", "Comment", "Size", "Tags")] for step in history])
        for text in ("?container=source&repo=UPPER", "?container=source&changes=RUN+x", "?container=nosuch",
                     "?container=source&repo=a&tag=%3A"):
            answer = each.http("POST", "/v1.41/commit" + text)
            assert answer.status >= 400
            made[-1].append(answer.json["message"])
        each.http("DELETE", "/v1.41/containers/source")
        each.http("DELETE", "/v1.41/images/made:it")
    for ours, theirs in zip(*made):
        assert ours == theirs


def test_commit_of_a_running_container(docker: Docker, host: Host) -> None:
    started(host, "busy", "sh", "-c", "until [ -e /tmp/go ]; do sleep 0.01; done; while sleep 0.01; do "
            "echo line >>/file; done", HostConfig={"Tmpfs": {"/tmp": ""}})
    assert docker("diff", "busy") == ""
    docker("exec", "busy", "touch", "/tmp/go")
    wait_for(lambda: "/file" in docker("diff", "busy"))
    start = time.time()
    image = docker("commit", "-m", "why", "busy", "made:run")
    assert events_since(host, start) == [("pause", {}), ("unpause", {}), (
        "commit", {"comment": "why", "imageID": image, "imageRef": "made:run"})]
    assert docker("run", "--rm", "--network=none", "made:run", "head", "-n", "1", "/file") == "line"
    docker("pause", "busy")
    start = time.time()
    docker("commit", "busy", "made:run")
    assert [action for action, _ in events_since(host, start)] == ["commit"]
    assert host.inspect("busy")["State"]["Paused"]
    docker("rm", "-f", "busy")
    docker("rmi", "made:run", image)


def test_a_container_stays_until_its_image_is_made(host: Host) -> None:
    started(host, "full", "sh", "-c", "dd if=/dev/zero of=/zeroes bs=1M count=200; sleep 1000")
    wait_for(lambda: host.api("GET", "/containers/full/json?size=1")["SizeRw"] == 200 << 20)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        made = pool.submit(host.api, "POST", "/commit?container=full&pause=0")
        wait_for(lambda: os.listdir(os.path.join(host.data_root, "image/overlay2/layerdb/tmp")))
        host.api("DELETE", "/containers/full?force=1")
        image = made.result()["Id"]
    assert host.run("stat", "-c", "%s", "/zeroes", image=image) == (0, b"%d\n" % (200 << 20))
    host.api("DELETE", f"/images/{image}")


def test_a_containers_layer_that_fails_leaves_nothing(rig: ImageRig) -> None:
    rig.add("a")

    def set_up(directory: str) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        rig.layers.create_rw("c", rig.images.resolve("a").chain_id, set_up)
    with pytest.raises(dockerd.DockerError):
        rig.layers.create_rw("c", "sha256:" + A64, set_up)
    assert rig.layers.rw_ids() == []
    rig.assert_whole()


# Damage


def test_damaged_records_are_passed_over_and_healed_by_a_new_import(rig: ImageRig, caplog: Any) -> None:
    for name in "xyz":
        rig.add(name, archive=file_tar(name))
    image, layer = rig.images.resolve("x"), rig.layers.get(rig.images.resolve("y").chain_id)
    root = os.path.join(rig.root, "image", rig.driver)
    with open(os.path.join(root, "imagedb", "content", "sha256", image.id[7:]), "ab") as file:
        file.write(b" ")
    shutil.rmtree(os.path.join(rig.layers.driver.layers(), layer.cache_id))
    record = os.path.join(root, "layerdb", "sha256", rig.images.resolve("z").chain_id[7:])
    with open(os.path.join(record, "diff"), "w") as file:
        file.write("sha256:" + A64)
    rig.restart()
    assert rig.run("images") == []
    assert caplog.text.count("ignoring the image") == 3 and caplog.text.count("ignoring the layer") == 2
    for name in "xyz":
        assert rig.refused(404, "image_inspect", name) == f"No such image: {name}:latest"
        rig.add(name, archive=file_tar(name))
    rig.restart()
    tags = sorted(tag for image in rig.run("images") for tag in image["RepoTags"])
    assert tags == ["x:latest", "y:latest", "z:latest"]


@pytest.mark.parametrize(
    "raw",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b"{}",
        b'{"rootfs":3}',
        b'{"rootfs":{"diff_ids":["x"]}}',
        b"[" * 100000,
        b'{"rootfs":{"diff_ids":3}}',
        b'{"rootfs":{},"history":[{}]}',
        b'{"rootfs":{},"history":[3]}',
        b'{"rootfs":{},"config":[]}',
        b'{"rootfs":{},"created":"yesterday"}',
        b'{"rootfs":{},"created":5}',
        b'{"rootfs":{"diff_ids":["sha256:../../x"]}}',
        b'{"rootfs":{},"config":{"Labels":[1]}}',
    ],
)
def test_what_is_no_images_configuration_is_refused(tmp_path: Any, raw: bytes) -> None:
    rig = ImageRig(str(tmp_path), "vfs")
    with pytest.raises(dockerd.BadParameter):
        rig.images.store.create(raw)
    assert rig.image_files("imagedb", "content", "sha256") == []


def test_unreadable_tags_stop_the_start_with_a_line(rig: ImageRig) -> None:
    path = os.path.join(rig.root, "image", rig.driver, "repositories.json")
    for text in ("{", "[]", '{"Repositories":[1]}', "null"):
        with open(path, "w") as file:
            file.write(text)
        with pytest.raises(dockerd.DockerError, match=f"^cannot read {path}: "):
            rig.restart()


def test_only_what_is_unfinished_is_cleaned_up(rig: ImageRig) -> None:
    """moby's broken transactions go; layers that no record names are BuildKit's and stay."""
    rig.add("a")
    driver, tmp = rig.layers.driver, rig.layers.tmp
    broken, foreign = "b" * 64, "f" * 64
    driver.create(broken)
    driver.create(foreign)
    os.mkdir(os.path.join(tmp, "write-set-123"))
    with open(os.path.join(tmp, "write-set-123", "cache-id"), "w") as file:
        file.write(broken)
    os.mkdir(os.path.join(tmp, "write-set-124"))
    with open(os.path.join(tmp, "write-set-124", "cache-id"), "w") as file:
        file.write(rig.layers.get(rig.images.resolve("a").chain_id).cache_id)
    os.mkdir(os.path.join(tmp, "write-set-125"))
    with open(os.path.join(tmp, "write-set-125", "cache-id"), "w") as file:
        file.write("../../../x")
    rig.restart()
    assert (driver.exists(broken), driver.exists(foreign)) == (False, True)
    driver.remove(foreign)
    rig.assert_whole()


@pytest.mark.parametrize(
    "point", ["layer-create", "layer-publish", "layers-sync", "image-create", "state-rename", "state-write"]
)
def test_a_full_disk_at_every_step_of_an_import_leaves_nothing(
    rig: ImageRig, point: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig.add("old", archive=file_tar("old"))
    for passage in range(1, 10):
        monkeypatch.setitem(dockerd.FAILPOINTS, point, ("enospc", passage))
        try:
            rig.add("new", archive=file_tar("new"))
        except OSError:
            monkeypatch.delitem(dockerd.FAILPOINTS, point)
            rig.assert_whole()
            assert len(rig.run("images")) <= 2
            with contextlib.suppress(dockerd.NotFound):  # an image without its name, or with it, is whole
                for image in rig.run("images", filters={"since": ["old"]}):
                    rig.run("image_delete", image["Id"])
        else:
            assert passage > 1
            return
    raise AssertionError("the import never ended")


# ------------------------------------------------------------------------------------------------------------
# Registry
#
# The client against a registry in this process, which cuts, delays, redirects and lies on demand, and against
# Debian's docker-registry through the CLI.
# ------------------------------------------------------------------------------------------------------------

MANIFEST = "application/vnd.docker.distribution.manifest.v2+json"
MANIFEST_LIST = "application/vnd.docker.distribution.manifest.list.v2+json"


def sha256(data: bytes) -> str:
    return "sha256:" + hashlib.sha256(data).hexdigest()


class FakeRegistry(http.server.ThreadingHTTPServer):
    """A registry: `blobs` by digest, `manifests` by (repository, tag or digest) as (type, bytes).

    `fault(handler)` runs before each answer and returns whether it has answered itself; `seen` are the
    requests as (method, path, headers); `linked` has the (repository, digest) of what was pushed."""

    daemon_threads = True

    def __init__(self, host: Optional[Host] = None) -> None:
        """On the loopback of a `host`, else of the machine."""
        def bind() -> None:
            if host:
                with open(f"/proc/{host.holder.pid}/ns/net") as namespace:
                    dockerd.setns(namespace.fileno(), dockerd.CLONE_NEWNET)
            super(FakeRegistry, self).__init__(("127.0.0.1", 0), FakeRegistryHandler)

        dockerd.in_thread(bind)
        self.name = f"127.0.0.1:{self.server_port}"
        self.blobs: dict[str, bytes] = {}
        self.manifests: dict[tuple[str, str], tuple[str, bytes]] = {}
        self.linked: set[tuple[str, str]] = set()
        self.uploads: dict[str, bytes] = {}
        self.seen: list[tuple[str, str, Any]] = []
        self.fault: Callable[[Any], bool] = lambda handler: False
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def blob(self, data: bytes, **facts: Any) -> dict[str, Any]:
        """Keep a blob; its descriptor."""
        self.blobs[sha256(data)] = data
        return {"mediaType": "application/octet-stream", "size": len(data), "digest": sha256(data), **facts}

    def manifest(self, repository: str, tag: str, document: Any, kind: str = MANIFEST) -> str:
        """Keep a manifest; its digest."""
        raw = json.dumps({"schemaVersion": 2, "mediaType": kind, **document}).encode()
        self.manifests[repository, tag] = self.manifests[repository, sha256(raw)] = kind, raw
        return sha256(raw)

    def image(self, repository: str = "a/b", tag: str = "1", archives: Any = None, **config: Any) -> str:
        """Keep an image of these layers; its manifest's digest."""
        archives = archives or [file_tar("one"), file_tar("two")]
        return self.manifest(repository, tag, self.document(archives, **config))

    def document(self, archives: list[bytes], compress: Any = functools.partial(gzip.compress, mtime=0),
                 **config: Any) -> dict[str, Any]:
        """The manifest of an image of these layers, whose blobs are kept."""
        rootfs = {"type": "layers", "diff_ids": [sha256(archive) for archive in archives]}
        raw = json.dumps({"architecture": "amd64", "os": "linux", "rootfs": rootfs, **config}).encode()
        kind = "application/vnd.docker.image.rootfs.diff.tar.gzip"
        return {"config": self.blob(raw),
                "layers": [self.blob(compress(archive), mediaType=kind) for archive in archives]}

    def requests(self, text: str) -> list[Any]:
        """The headers of the requests whose path has `text`."""
        return [headers for _, path, headers in self.seen if text in path]


class FakeRegistryHandler(http.server.BaseHTTPRequestHandler):
    """One connection of FakeRegistry."""

    server: Any
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *arguments: Any) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """The whole answer; header names have _ for -."""
        self.send_response(status)
        for name, value in {"Content_Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(b"" if self.command == "HEAD" else body)

    def refuse(self, status: int, code: str, **headers: str) -> None:
        """An error as registries write it."""
        text = code.lower().replace("_", " ")
        self.answer(status, json.dumps({"errors": [{"code": code, "message": text}]}).encode(), **headers)

    def do_GET(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers))
        if self.server.fault(self):
            return
        found = re.fullmatch(r"/v2/(.*)/(blobs|manifests|tags)/([^/?]*)(\?.*)?", self.path)
        if self.path == "/v2/":
            self.answer(200)
        elif found and found[2] == "tags":
            tags = [tag for name, tag in self.server.manifests if name == found[1] and ":" not in tag]
            self.answer(200, json.dumps({"tags": tags}).encode())
        elif found and found[2] == "manifests" and (found[1], found[3]) in self.server.manifests:
            kind, raw = self.server.manifests[found[1], found[3]]
            self.answer(200, raw, Content_Type=kind, Docker_Content_Digest=sha256(raw))
        elif found and found[3] in self.server.blobs and (
                self.command == "GET" or (found[1], found[3]) in self.server.linked):
            first = int(self.headers.get("Range", "bytes=0-")[6:-1])
            self.answer(206 if first else 200, self.server.blobs[found[3]][first:])
        else:
            self.refuse(404, "BLOB_UNKNOWN" if found and found[2] == "blobs" else "MANIFEST_UNKNOWN")

    do_HEAD = do_GET

    def do_CONNECT(self) -> None:
        """It is no proxy that leads anywhere."""
        self.server.seen.append((self.command, self.path, self.headers))
        self.answer(403)

    def body(self) -> bytes:
        """The request's body."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        self.server.seen.append((self.command, self.path, self.headers))
        if self.server.fault(self):
            return
        path, _, query = self.path.partition("?")
        asked = dict(urllib.parse.parse_qsl(query))
        repository, kind, last = re.findall("/v2/(.*)/(blobs/uploads|manifests)/(.*)", path)[0]
        uploads, data, place = self.server.uploads, self.body(), last
        if self.command == "POST":
            if (asked.get("from"), asked.get("mount")) in self.server.linked:
                self.server.linked.add((repository, asked["mount"]))
                return self.answer(201)
            place = secrets.token_hex(8)
            uploads[place] = b""
        elif self.command == "DELETE":
            del uploads[place]
            return self.answer(204)
        elif self.command == "PATCH":
            uploads[place] += data
        elif kind == "manifests":
            self.server.manifests[repository, last] = self.headers["Content-Type"], data
            return self.answer(201)
        else:
            blob = uploads.pop(place) + data
            assert sha256(blob) == asked["digest"]
            self.server.blobs[sha256(blob)] = blob
            self.server.linked.add((repository, sha256(blob)))
            return self.answer(201)
        self.answer(202, Location=f"/v2/{repository}/blobs/uploads/{place}?state=1")

    do_PATCH = do_PUT = do_DELETE = do_POST


@pytest.fixture
def registry() -> Iterator[FakeRegistry]:
    """A registry of the test's own."""
    server = FakeRegistry()
    yield server
    server.shutdown()
    server.server_close()


class PullRig(ImageRig):
    """The image jobs and those of registries."""

    def restart(self) -> None:
        super().restart()
        os.makedirs(os.path.join(self.root, "tmp"), exist_ok=True)
        config = dockerd.Config(data_root=self.root, max_download_attempts=2)
        self.registry = dockerd.Registry(config)
        self.pulls = dockerd.Pulls(self.registry, self.images)
        for part in (self.registry, self.pulls, dockerd.Pushes(self.registry, self.images)):
            self.engine.install(part)

    def lines(self, name: str, *arguments: str, **env: Any) -> list[dict[str, Any]]:
        """All progress lines of a job."""
        job = self.engine.job(name, *arguments, **env)
        out = job.stdout.add(io.BytesIO())
        job.run()
        return [json.loads(line) for line in out.getvalue().splitlines()]

    def assert_bytes(self, name: str) -> None:
        """Every layer of an image has all its bytes."""
        for chain in self.images.resolve(name).chain_ids:
            with self.layers.tar(chain) as stream:
                while stream.read():
                    pass

    def assert_clean(self) -> None:
        """The store is whole, and nothing of a download is left."""
        wait_for(lambda: not self.pulls.blobs._table and "download" not in {
            thread.name for thread in threading.enumerate()}, "the downloads to end")
        self.assert_whole()
        assert os.listdir(os.path.join(self.root, "tmp")) == []
        for path in glob.glob("/proc/self/fd/*"):
            with contextlib.suppress(FileNotFoundError):
                assert not os.readlink(path).startswith(os.path.join(self.root, "tmp"))


@pytest.fixture
def pull_rig(tmp_path: Path) -> Iterator[PullRig]:
    """The jobs of images and registries on an empty data root; nothing may be left half-done."""
    made = PullRig(str(tmp_path), "overlay2")
    yield made
    made.assert_clean()


def test_pull_tells_what_docker_tells(pull_rig: PullRig, registry: FakeRegistry) -> None:
    digest = registry.image("a/b", "1")
    name = f"{registry.name}/a/b"
    lines = pull_rig.lines("pull", name, "1")
    layers = json.loads(registry.manifests["a/b", "1"][1])["layers"]
    ids = [layer["digest"][7:19] for layer in layers]
    assert lines[0] == {"status": "Pulling from a/b", "id": "1"}
    assert lines[1:3] == [{"status": "Pulling fs layer", "progressDetail": {}, "id": each} for each in ids]
    for each, layer in zip(ids, layers):
        told = [line["status"] for line in lines if line.get("id") == each]
        assert [status for status in dict.fromkeys(told) if status != "Waiting"] == [
            "Pulling fs layer", "Downloading", "Verifying Checksum", "Download complete", "Extracting",
            "Pull complete"]
        assert all(line["progressDetail"]["total"] == layer["size"] for line in lines
                   if line.get("id") == each and line["status"] == "Downloading")
    assert dockerd.progress_bar(1_234_567, 4_938_268) == {
        "progressDetail": {"current": 1234567, "total": 4938268},
        "progress": f"[{'=' * 12}>{' ' * 38}]  1.235MB/4.938MB"}
    assert lines[-2:] == [{"status": f"Digest: {digest}"},
                          {"status": f"Status: Downloaded newer image for {name}:1"}]
    image = pull_rig.run("image_inspect", f"{name}:1")
    assert image["RepoDigests"] == [f"{name}@{digest}"] and pull_rig.events[-1] == (
        "pull", f"{name}:1", {"name": name})
    assert pull_rig.images.blobs_of(image["RootFS"]["Layers"][0]) == [
        {"Digest": layers[0]["digest"], "SourceRepository": name, "HMAC": ""}]
    registry.image("a/b", "2", [file_tar("one"), file_tar("three")])
    assert pull_rig.lines("pull", f"{name}:1") == [
        lines[0], lines[-2], {"status": f"Status: Image is up to date for {name}:1"}]
    everything = pull_rig.lines("pull", name)
    assert {"status": "Already exists", "progressDetail": {}, "id": ids[0]} in everything
    assert everything[-1] == {"status": f"Status: Downloaded newer image for {name}"}
    assert pull_rig.lines("pull", name, digest)[-1]["status"].endswith(f"up to date for {name}@{digest}")
    assert len(pull_rig.listed()) == 2
    pull_rig.restart()
    assert len(pull_rig.listed()) == 2


def test_pull_resumes_where_the_connection_broke(pull_rig: PullRig, registry: FakeRegistry) -> None:
    registry.image(archives=[file_tar("big", secrets.token_bytes(3_000_000))])

    def cut(handler: Any) -> bool:
        if "/blobs/" not in handler.path or len(registry.requests("/blobs/")) > 4:
            return False
        blob = registry.blobs[handler.path.rpartition("/")[2]]
        if len(blob) < 100_000:
            return False
        first = int(handler.headers.get("Range", "bytes=0-")[6:-1])
        handler.send_response(206 if first else 200)
        handler.send_header("Content-Length", str(len(blob) - first))
        handler.end_headers()
        handler.wfile.write(blob[first:first + 500_000])
        handler.close_connection = True
        return True

    registry.fault = cut
    assert pull_rig.lines("pull", f"{registry.name}/a/b:1")[-1]["status"].startswith("Status: Downloaded")
    assert [headers.get("Range") for headers in registry.requests("/blobs/")][1:] == [
        None, "bytes=500000-", "bytes=1000000-", "bytes=1500000-"]


def test_a_pull_without_progress_gives_up(pull_rig: PullRig, registry: FakeRegistry) -> None:
    registry.image(archives=[file_tar("one")])

    def fail(handler: Any) -> bool:
        if not ("/blobs/" in handler.path and len(registry.requests("/blobs/")) > 1):
            return False
        handler.refuse(503, "UNAVAILABLE")
        return True

    registry.fault = fail
    assert pull_rig.refused(500, "pull", f"{registry.name}/a/b:1") == "unavailable: unavailable"
    assert len(registry.requests("/blobs/")) == 3  # the configuration, and two attempts


def _spoiled(name: str, document: dict[str, Any], registry: FakeRegistry) -> None:
    layer = document["layers"][1]
    if name == "content":
        registry.blobs[layer["digest"]] = registry.blobs[layer["digest"]][:-1] + b"x"
    elif name == "size":
        layer["size"] -= 1
    elif name == "config":
        digest = document["config"]["digest"]
        registry.blobs[digest] = b"{}" + registry.blobs[digest][2:]
    elif name == "diff":
        document["layers"][1] = registry.blob(gzip.compress(file_tar("other"), mtime=0))
    elif name == "count":
        del document["layers"][1]
    elif name == "list":
        document["manifests"] = []
    elif name == "digest":
        layer["digest"] = "sha256:../../../../etc/passwd"
    elif name == "negative":
        layer["size"] = -1
    elif name == "larger":
        layer["size"] += 1
    elif name == "cut gzip":
        document["layers"][1] = registry.blob(gzip.compress(file_tar("two"), mtime=0)[:-9])
    elif name == "cut tar":
        document["layers"][1] = registry.blob(gzip.compress(file_tar("two")[:300], mtime=0))
    elif name == "artifact":
        document["config"]["mediaType"] = "application/vnd.x"
    elif name == "type":
        document["mediaType"] = MANIFEST_LIST


@pytest.mark.parametrize("name, text", [
    ("content", "filesystem layer verification failed for digest sha256:"), ("size", "is longer than the"),
    ("config", "image config verification failed"), ("count", "layers from manifest don't match image"),
    ("diff", "layers from manifest don't match image configuration"), ("list", "is of two types at once"),
    ("digest", "invalid descriptor: invalid checksum digest format"), ("negative", "no number of bytes"),
    ("larger", "unexpected EOF"), ("cut gzip", "unexpected EOF"), ("cut tar", "unexpected EOF"),
    ("artifact", 'Encountered remote "application/vnd.x"(unknown) when fetching'),
    ("type", f"mediaType in manifest should be '{MANIFEST}' not '{MANIFEST_LIST}'"),
])
def test_what_a_registry_lies_about_is_refused(pull_rig: PullRig, registry: FakeRegistry, name: str,
                                               text: str) -> None:
    document = registry.document([file_tar("one"), file_tar("two")])
    _spoiled(name, document, registry)
    raw = json.dumps({"schemaVersion": 2, **document}).encode()
    registry.manifests["a/b", "1"] = MANIFEST, raw
    assert text in pull_rig.refused(400 if name.startswith("cut") else 500, "pull", f"{registry.name}/a/b:1")
    assert pull_rig.listed() == []
    pull_rig.assert_clean()


def test_pull_errors_in_dockers_words(pull_rig: PullRig, registry: FakeRegistry) -> None:
    name, hint = f"{registry.name}/x/y", "repository does not exist or may require 'docker login'"
    assert pull_rig.refused(404, "pull", name, "9") == (
        f"manifest for {name}:9 not found: manifest unknown: manifest unknown")
    for code, text in (("NAME_UNKNOWN", f"repository {name} not found: name unknown: name unknown"),
                       ("DENIED", f"pull access denied for {name}, {hint}: denied: denied")):
        registry.fault = functools.partial(lambda code, handler: handler.refuse(403, code) or True, code)
        assert pull_rig.refused(404, "pull", name, "9") == text
    registry.fault = lambda handler: handler.answer(401, WWW_Authenticate='Basic realm="x"') or True
    assert pull_rig.refused(401, "pull", name, "9").endswith("/manifests/9\": no basic auth credentials")
    assert pull_rig.refused(400, "pull", "scratch") == "'scratch' is a reserved name"
    refusal = "dial tcp 127.0.0.1:1: connect: connection refused"
    assert refusal in pull_rig.refused(500, "pull", "127.0.0.1:1/x", "1")
    registry.fault = lambda handler: False
    kind = {"platform": {"os": "linux", "architecture": "s390x"}, "digest": sha256(b""), "size": 1}
    registry.manifest("x/y", "9", {"manifests": [kind]}, MANIFEST_LIST)
    assert pull_rig.refused(404, "pull", name, "9", platform="linux/arm64") == (
        "no matching manifest for linux/arm64 in the manifest list entries")


def test_tokens_are_got_renewed_and_never_shown_to_others(pull_rig: PullRig, registry: FakeRegistry) -> None:
    elsewhere = FakeRegistry()
    registry.image()
    elsewhere.blobs = registry.blobs
    tokens: list[str] = []

    def guard(handler: Any) -> bool:
        if handler.path.startswith("/token?"):
            tokens.append(f"t{len(tokens)}")
            handler.answer(200, json.dumps({"token": tokens[-1]}).encode())
        elif handler.headers.get("Authorization") != f"Bearer {tokens[-1] if tokens else ''}" or (
                len(tokens) == 1 and "/blobs/" in handler.path):  # the first token expires before the blobs
            realm = f'Bearer realm="http://{registry.name}/token",service="s",scope="repository:a/b:pull"'
            handler.refuse(401, "UNAUTHORIZED", WWW_Authenticate=realm)
        elif "/blobs/" in handler.path:
            handler.answer(307, Location=f"http://{elsewhere.name}{handler.path}")
        else:
            return False
        return True

    registry.fault = guard
    login = {"username": "me", "password": "secret"}
    pull_rig.run("pull", f"{registry.name}/a/b:1", authConfig=login)
    assert tokens == ["t0", "t1"]
    asked = registry.requests("/token?")
    basic = "Basic " + base64.b64encode(b"me:secret").decode()
    assert [headers["Authorization"] for headers in asked] == [basic, basic]
    assert "account=me" in next(path for _, path, _ in registry.seen if path.startswith("/token"))
    assert len(elsewhere.seen) == 3 and not any(headers["Authorization"] for _, _, headers in elsewhere.seen)
    challenge = f'Bearer realm="http://{elsewhere.name}/token"'  # it asks for them itself
    elsewhere.fault = lambda handler: handler.answer(401, WWW_Authenticate=challenge) or True
    registry.image("a/b", "2", [file_tar("three")])
    pull_rig.refused(500, "pull", f"{registry.name}/a/b:2", authConfig=login)
    assert not any("/token" in path for _, path, _ in elsewhere.seen)
    elsewhere.shutdown()
    elsewhere.server_close()


def test_identity_and_registry_tokens(pull_rig: PullRig, registry: FakeRegistry) -> None:
    """The one buys access from the token server, the other is access."""
    registry.image()
    bodies: list[bytes] = []

    def guard(handler: Any) -> bool:
        if handler.path == "/token":
            bodies.append(handler.body())
            handler.answer(200, b'{"access_token":"T"}')
        elif handler.headers.get("Authorization") != "Bearer T":
            challenge = f'Bearer realm="http://{registry.name}/token",service="s"'
            handler.refuse(401, "UNAUTHORIZED", WWW_Authenticate=challenge)
        else:
            return False
        return True

    registry.fault = guard
    for login in ({"identitytoken": "I"}, {"registrytoken": "T"}):
        pull_rig.run("pull", f"{registry.name}/a/b:1", authConfig=login)
        pull_rig.run("image_delete", f"{registry.name}/a/b:1")
    (body,) = bodies
    assert urllib.parse.parse_qs(body.decode()) == {
        "service": ["s"], "scope": ["repository:a/b:pull"], "grant_type": ["refresh_token"],
        "client_id": ["docker"], "refresh_token": ["I"]}


def test_foreign_layers_are_not_fetched_from_their_urls(pull_rig: PullRig, registry: FakeRegistry) -> None:
    """CVE-2020-15157: the credentials went to a URL that a manifest named."""
    document = registry.document([file_tar("one")])
    document["layers"][0].update(mediaType="application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
                                 urls=[f"http://{registry.name}/thief"])
    del registry.blobs[document["layers"][0]["digest"]]
    registry.manifest("a/b", "1", document)
    pull_rig.refused(500, "pull", f"{registry.name}/a/b:1", authConfig={"username": "u", "password": "p"})
    assert not registry.requests("/thief")


def test_login(pull_rig: PullRig, registry: FakeRegistry) -> None:
    good = "Basic " + base64.b64encode(b"me:secret").decode()
    registry.fault = lambda handler: handler.headers.get("Authorization") != good and (
        handler.answer(401, WWW_Authenticate='Basic realm="r"') or True)
    body = {"username": "me", "password": "secret", "serveraddress": registry.name}
    assert pull_rig.run("auth", body=body) == {"Status": "Login Succeeded", "IdentityToken": ""}
    body["password"] = ""
    assert "unauthorized: authentication required" in pull_rig.refused(401, "auth", body=body)


def test_a_cancelled_pull_leaves_nothing(pull_rig: PullRig, registry: FakeRegistry) -> None:
    registry.image(archives=[file_tar("one"), file_tar("big", secrets.token_bytes(2_000_000))])
    started, over = threading.Event(), threading.Event()

    def stall(handler: Any) -> bool:
        blob = registry.blobs.get(handler.path.rpartition("/")[2], b"")
        if len(blob) < 100_000:
            return False
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(blob)))
        handler.end_headers()
        handler.wfile.write(blob[:300_000])
        started.set()
        over.wait(20)
        with contextlib.suppress(OSError):
            handler.wfile.write(blob[300_000:])
        return True

    registry.fault = stall
    job = pull_rig.engine.job("pull", f"{registry.name}/a/b", "1")
    join = dockerd.start_thread(job.run)
    assert started.wait(20)
    job.cancel()
    with pytest.raises(DockerError, match="context canceled"):
        join()
    over.set()
    assert pull_rig.listed() == []


def test_many_pulls_fetch_each_blob_once(pull_rig: PullRig, registry: FakeRegistry) -> None:
    registry.image(archives=[file_tar(f"layer{number}", secrets.token_bytes(200_000)) for number in range(4)])
    barrier = threading.Barrier(20)

    def together(handler: Any) -> bool:
        if "/manifests/" in handler.path:
            barrier.wait(20)
        return False

    registry.fault = together
    joins = [dockerd.start_thread(pull_rig.run, "pull", f"{registry.name}/a/b:1") for _ in range(20)]
    for join in joins:
        join()
    fetched = collections.Counter(path for _, path, _ in registry.seen if "/blobs/" in path)
    layers = json.loads(registry.manifests["a/b", "1"][1])["layers"]
    assert [fetched[f"/v2/a/b/blobs/{layer['digest']}"] for layer in layers] == [1] * 4


def zstd(data: bytes) -> bytes:
    """`data` as a frame of zstd."""
    library = ctypes.CDLL("libzstd.so.1")
    library.ZSTD_compress.restype = ctypes.c_size_t
    room = ctypes.create_string_buffer(len(data) + 1000)
    size = library.ZSTD_compress(room, ctypes.c_size_t(len(room)), data, ctypes.c_size_t(len(data)), 3)
    return room.raw[:size]


def test_layers_compressed_by_zstd(pull_rig: PullRig, registry: FakeRegistry) -> None:
    archives = [file_tar("noise", secrets.token_bytes(1_500_000)), file_tar("text", b"text " * 400_000)]
    registry.manifest("a/b", "1", registry.document(archives, zstd))
    pull_rig.run("pull", f"{registry.name}/a/b:1")
    assert len(pull_rig.listed()) == 1
    for damage in (lambda data: data[:-9], lambda data: data[:4] + b"\xff" * 20 + data[24:]):
        with pytest.raises(BadParameter):
            stream = decompress(io.BytesIO(damage(zstd(archives[0]))))
            while stream.read():
                pass


def test_platforms_are_chosen_as_docker_chooses() -> None:
    texts = ("linux/arm/v6 linux/amd64 windows/amd64 linux/arm/v7 linux/arm64/v8 linux/amd64/v3").split()
    entries = [{"digest": sha256(text.encode()), "size": 1, "platform": dict(zip(
        ("os", "architecture", "variant"), text.split("/")))} for text in texts]
    for wanted, chosen in (("linux/amd64", "linux/amd64"), ("linux/arm/v7", "linux/arm/v7"),
                           ("linux/arm/v6", "linux/arm/v6"), ("linux/arm64", "linux/arm64/v8"),
                           ("linux/arm", "linux/arm/v7")):
        found = dockerd.choose_platform(entries, dockerd.parse_platform(wanted))
        assert found.digest == sha256(chosen.encode()), wanted
    arm64 = dockerd.parse_platform("arm64")
    assert dockerd.choose_platform(entries[:1], arm64).digest == entries[0]["digest"]
    with pytest.raises(dockerd.NotFound):
        dockerd.choose_platform(entries, dockerd.parse_platform("linux/arm/v5"))


def test_endpoints_of_mirrors_and_hosts_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd, "CERTIFICATES", str(tmp_path))
    config = dockerd.Config(registry_mirrors=["http://m:5000/"], insecure_registries=["in:1", "10.0.0.0/8"])

    def bases(domain: str, writing: bool = False) -> list[str]:
        return [place.base for place in dockerd.endpoints(domain, config, writing)]

    assert bases("docker.io") == ["http://m:5000/v2", "https://registry-1.docker.io/v2"]
    assert bases("docker.io", True) == ["https://registry-1.docker.io/v2"]
    assert bases("in:1") == ["https://in:1/v2", "http://in:1/v2"]
    assert bases("10.9.9.9:4") == ["https://10.9.9.9:4/v2", "http://10.9.9.9:4/v2"]
    assert bases("11.9.9.9:4") == ["https://11.9.9.9:4/v2"]
    place = tmp_path / "r.example"
    place.mkdir()
    for name in ("ca.crt", "me.cert", "me.key"):
        (place / name).write_text("")
    (found,) = dockerd.endpoints("r.example", config)
    assert found.authorities == (str(place / "ca.crt"),)
    assert found.certificates == ((str(place / "me.cert"), str(place / "me.key")),)
    (place / "me.key").unlink()
    with pytest.raises(DockerError, match="missing key me.key for client certificate me.cert"):
        dockerd.endpoints("r.example", config)
    (place / "hosts.toml").write_text('server = "https://up"\n# a comment\n[host."https://mirror:9"]\n'
                                      '  capabilities = ["pull", "resolve"] # no push\n  skip_verify = true\n'
                                      '  ca = "x.crt"\n[host."http://odd/base"]\n override_path = true\n')
    first, second, last = dockerd.endpoints("r.example", config)
    assert first == dockerd.RegistryHost("https://mirror:9/v2", True, False, (str(place / "x.crt"),))
    assert (second.base, last.base, last.mirror) == ("http://odd/base", "https://up/v2", False)
    assert bases("r.example", True) == ["http://odd/base", "https://up/v2"]
    for line in ("[[oops]]", "ca = ['a', oops]"):
        (place / "hosts.toml").write_text(line + "\n")
        with pytest.raises(DockerError, match="cannot read .*hosts.toml: .*oops"):
            dockerd.endpoints("r.example", config)


def test_a_name_server_makes_no_registry_insecure(monkeypatch: pytest.MonkeyPatch) -> None:
    """The Hub never, and no other by an address of the loopback beside others."""
    answers = {"lo.test": ["127.0.0.1", "::1"], "both.test": ["127.0.0.1", "192.0.2.1"],
               "registry-1.docker.io": ["127.0.0.1"], "index.docker.io": ["127.0.0.1"]}
    monkeypatch.setattr(socket, "getaddrinfo", lambda name, port: [
        (0, 0, 0, "", (address, 0)) for address in answers[name]])
    config = dockerd.Config()
    assert {name for name in answers if dockerd.is_insecure(name, config)} == {"lo.test"}
    for domain in ("docker.io", "both.test", "index.docker.io"):
        assert [(place.base[:6], place.verify) for place in dockerd.endpoints(domain, config)] == [
            ("https:", True)]
    assert dockerd.is_insecure(
        "registry-1.docker.io", dockerd.Config(insecure_registries=["registry-1.docker.io"]))


def test_a_mirror_that_fails_is_passed_over(pull_rig: PullRig, registry: FakeRegistry, tmp_path: Path,
                                            monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd, "CERTIFICATES", str(tmp_path / "certs"))
    mirror = FakeRegistry()
    directory = tmp_path / "certs" / registry.name
    directory.mkdir(parents=True)
    (directory / "hosts.toml").write_text(f'[host."http://{mirror.name}"]\n')
    registry.image()
    login = {"username": "me", "password": "secret"}
    pull_rig.run("pull", f"{registry.name}/a/b:1", authConfig=login)
    assert len(mirror.seen) == 1 and registry.seen and not mirror.seen[0][2]["Authorization"]
    mirror.shutdown()
    mirror.server_close()


def test_search(pull_rig: PullRig, registry: FakeRegistry) -> None:
    found = [{"name": "a", "star_count": 7, "is_official": True}, {"name": "b", "star_count": 3},
             {"name": "c"}]
    registry.fault = lambda handler: handler.path.startswith("/v1/search") and (
        handler.answer(200, json.dumps({"results": found}).encode()) or True)
    term = f"{registry.name}/some thing"

    def names(**env: Any) -> str:
        return "".join(entry["name"] for entry in pull_rig.run("search", term, **env))

    assert names() == "abc" and names(filters={"stars": ["3"]}) == "ab"
    assert [names(filters={"is-official": [text]}) for text in ("true", "false")] == ["a", "bc"]
    assert [path for _, path, _ in registry.seen][0] == "/v1/search?q=some%20thing&n=25"
    assert "outside the range of [1, 100]" in pull_rig.refused(400, "search", term, limit=101)
    assert "invalid filter" in pull_rig.refused(400, "search", term, filters={"x": ["1"]})


def test_distribution_inspect(pull_rig: PullRig, registry: FakeRegistry) -> None:
    digest = registry.image("a/b", "1")
    told = pull_rig.run("distribution_inspect", f"{registry.name}/a/b:1")
    assert told == {"Descriptor": {"mediaType": MANIFEST, "digest": digest, "size": len(
        registry.manifests["a/b", "1"][1])}, "Platforms": [{"architecture": "amd64", "os": "linux"}]}
    platforms = [{"os": "linux", "architecture": name} for name in ("amd64", "arm64")]
    entries = [{"platform": platform, "digest": digest, "size": 1} for platform in platforms]
    registry.manifest("a/b", "2", {"manifests": entries}, MANIFEST_LIST)
    assert pull_rig.run("distribution_inspect", f"{registry.name}/a/b:2")["Platforms"] == platforms
    assert "not found" in pull_rig.refused(404, "distribution_inspect", f"{registry.name}/a/b:3")


def test_proxies(pull_rig: PullRig, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """The registry here stands in for the proxy, which sees whole URLs."""
    for name in ("http_proxy", "https_proxy", "no_proxy"):
        monkeypatch.setenv(name, "")
        monkeypatch.setenv(name.upper(), "")
    config = dockerd.Config(
        data_root=pull_rig.root, http_proxy=f"http://u:p@{registry.name}", no_proxy="plain.test,10.0.0.0/8",
        https_proxy=f"http://{registry.name}", insecure_registries=["far.test:81"])
    client = dockerd.Registry(config)

    def asked(name: str) -> list[str]:
        registry.seen.clear()
        with contextlib.suppress(DockerError):
            client.attempt(pull_rig.engine.job("pull"), dockerd.parse_reference(f"{name}/x"), None,
                           lambda client: client.tags())
        return [f"{method} {path}" for method, path, _ in registry.seen]

    assert asked("far.test:81") == ["CONNECT far.test:81", "GET http://far.test:81/v2/x/tags/list"]
    assert registry.seen[1][2]["Proxy-Authorization"] == "Basic " + base64.b64encode(b"u:p").decode()
    for name in ("127.0.0.1:1", "[::1]:1", "localhost:1", "plain.test"):
        assert asked(name) == []
    assert dockerd.in_networks("10.255.255.1:1", config.no_proxy.split(","))


@pytest.mark.parametrize("part", ["manifests/1", "manifests/sha256", "blobs", "tags", "/token", "/v1/search"])
def test_an_answer_of_a_gigabyte_is_not_read(pull_rig: PullRig, registry: FakeRegistry, part: str) -> None:
    sent = [0]
    digest = registry.image("a/b", "1")

    def flood(handler: Any) -> bool:
        if part == "/token" and "/token" not in handler.path:
            handler.refuse(401, "UNAUTHORIZED", WWW_Authenticate=f'Bearer realm="http://{registry.name}/token"')
            return True
        if part not in handler.path:
            return False
        handler.send_response(200)
        handler.send_header("Content-Type", MANIFEST)
        handler.end_headers()
        handler.close_connection = True
        with contextlib.suppress(OSError):
            while sent[0] < 1 << 30:
                sent[0] += handler.wfile.write(b'{"tags":[' + b"[" * 65536)
        return True

    registry.fault = flood
    job = ["search", f"{registry.name}/x"] if part == "/v1/search" else ["pull", f"{registry.name}/a/b"]
    tags = {"manifests/sha256": [digest], "tags": []}.get(part, ["1"])
    text = pull_rig.refused(500, *job, *(tags if job[0] == "pull" else []))
    assert "is larger than" in text or "than the" in text
    assert sent[0] < 32 << 20


def test_a_list_of_tags_without_end(registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    """No more are taken than a repository may have, and no page that brings nothing new is followed."""
    monkeypatch.setattr(dockerd, "TAG_LIMIT", 20)
    client = dockerd.RegistryClient(dockerd.RegistryHost(f"http://{registry.name}/v2"), "a/b")
    for pages, count in (("t{0} u{0}", 10), ("t u t", 2), ("", 1), ("-bad", 1)):
        registry.seen.clear()
        registry.fault = lambda handler: handler.answer(200, json.dumps(
            {"tags": pages.format(len(registry.seen)).split()}).encode(),  # noqa: B023
            Link=f'</v2/a/b/tags/list?n={len(registry.seen)}>; rel="next"') or True
        assert len(client.tags()) == {10: 20, 2: 2, 1: 0}[count] and len(registry.seen) == count


@pytest.mark.parametrize("part", ["manifests/1", "tags", "/token", "config", "head"])
def test_a_pull_ends_with_its_job(pull_rig: PullRig, registry: FakeRegistry, part: str) -> None:
    """Whatever the registry is slow with: it sends something always."""
    begun, over = threading.Event(), threading.Event()
    registry.image("a/b", "1")
    config = json.loads(registry.manifests["a/b", "1"][1])["config"]["digest"]

    def drip(handler: Any) -> bool:
        if part == "/token" and "/token" not in handler.path:
            handler.refuse(401, "UNAUTHORIZED", WWW_Authenticate=f'Bearer realm="http://{registry.name}/token"')
            return True
        if (config if part == "config" else "/v2/" if part == "head" else part) not in handler.path:
            return False
        head = b"HTTP/1.1 200 OK\r\n" + b"Content-Length: 90000\r\n\r\n" * (part != "head")
        with contextlib.suppress(OSError):
            handler.wfile.write(head)
            begun.set()
            while not over.wait(0.05):
                handler.wfile.write(b".")
        handler.close_connection = True
        return True

    registry.fault = drip
    job = pull_rig.engine.job("pull", f"{registry.name}/a/b", *([] if part == "tags" else ["1"]))
    ends = dockerd.start_thread(job.run)
    try:
        assert begun.wait(10)
        job.cancel()
        job.cancel()  # also where the connection was not yet known at the first
        with concurrent.futures.ThreadPoolExecutor(1) as pool, pytest.raises(DockerError):
            pool.submit(ends).result(10)
    finally:
        over.set()


@pytest.mark.parametrize("document, text", [
    ({"layers": 5}, "does not list objects"), ({"layers": ["x"]}, "does not list objects"),
    ({"layers": [{"platform": "x"}]}, "does not list objects"),
    ({"layers": [], "config": 7}, "invalid descriptor"),
    ({"manifests": {"a": 1}}, "does not list objects"),
    ({"manifests": [{"platform": ["linux"]}]}, "does not list objects"),
    ({"manifests": [{"platform": {"os": "linux", "architecture": "arm", "variant": "vx"}}]}, "no matching"),
])
def test_manifests_of_odd_shapes(pull_rig: PullRig, registry: FakeRegistry, document: Any, text: str) -> None:
    kind = MANIFEST_LIST if "manifests" in document else MANIFEST
    registry.manifest("a/b", "1", document, kind)
    with pytest.raises(DockerError, match=text):
        pull_rig.run("pull", f"{registry.name}/a/b:1", platform="linux/arm/v7")


def test_an_image_of_too_many_layers_is_not_begun(pull_rig: PullRig, registry: FakeRegistry) -> None:
    archive = file_tar("one")
    registry.image("a/b", "1", [archive] * (dockerd.MAX_LAYERS + 1))
    assert pull_rig.refused(500, "pull", f"{registry.name}/a/b:1") == "max depth exceeded"
    assert len(registry.requests("/blobs/")) == 1


def test_refusals_that_break_off_and_blobs_of_no_length(pull_rig: PullRig, registry: FakeRegistry) -> None:
    def broken(handler: Any) -> bool:
        handler.close_connection = True
        handler.send_response(404)
        handler.send_header("Transfer-Encoding", "chunked")
        handler.end_headers()
        handler.wfile.write(b"ffff\r\n{")
        return True

    registry.fault = broken
    assert "404" in pull_rig.refused(500, "pull", f"{registry.name}/a/b:1")
    client = dockerd.RegistryClient(dockerd.RegistryHost(f"http://{registry.name}/v2"), "a/b")
    registry.fault = lambda handler: handler.answer(200, Content_Length="many") or True
    with pytest.raises(DockerError, match="does not say how long"):
        client.blob_size(sha256(b""))


def test_a_layer_is_taken_for_what_it_is_not_for_what_its_type_says(pull_rig: PullRig,
                                                                   registry: FakeRegistry) -> None:
    archives = [file_tar(name, name.encode() * 1000) for name in "abc"]
    document = registry.document(archives)
    kinds = ("application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip",
             "application/vnd.docker.image.rootfs.diff.tar.gzip")
    packers: tuple[Any, ...] = (functools.partial(gzip.compress, mtime=0), zstd, bytes)
    document["layers"] = [registry.blob(pack(archive), mediaType=kind)
                          for archive, pack, kind in zip(archives, packers, kinds)]
    registry.manifest("a/b", "1", document)
    pull_rig.run("pull", f"{registry.name}/a/b:1")
    layers = pull_rig.run("image_inspect", f"{registry.name}/a/b:1")["RootFS"]["Layers"]
    assert layers == [sha256(archive) for archive in archives]
    pull_rig.run("push", f"{registry.name}/a/b:1")
    pushed = json.loads(registry.manifests["a/b", "1"][1])["layers"]
    assert [gzip.decompress(registry.blobs[layer["digest"]]) for layer in pushed] == archives


def test_bombs_are_refused_unless_an_option_allows_them(pull_rig: PullRig, registry: FakeRegistry,
                                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd.Decompressor, "HONEST", 1 << 20)
    entries = tar_of({f"f{number}": b"" for number in range(300)})
    registry.image("a/entries", "1", [entries])
    registry.image("a/zeroes", "1", [file_tar("zeroes", bytes(24 << 20))])
    for name, option, text in (
            ("entries", "max_layer_entries", "the archive has more than 200 entries"),
            ("zeroes", "max_layer_ratio", "the compressed stream unpacks to more than 200 times its size")):
        pull_rig.options = {option: 200}
        pull_rig.restart()
        assert pull_rig.refused(400, "pull", f"{registry.name}/a/{name}:1") == text
        if name == "entries":
            with pytest.raises(BadParameter, match="more than 200 entries"):
                pull_rig.add("imported", archive=entries)
        pull_rig.assert_clean()
        for more in (2000, 0):
            pull_rig.options = {option: more}
            pull_rig.restart()
            pull_rig.run("pull", f"{registry.name}/a/{name}:1")
            pull_rig.run("image_delete", f"{registry.name}/a/{name}:1")


HOSTILE: dict[str, tuple[tuple[Any, ...], ...]] = {
    "an entry that climbs": (("../outside/passwd", b"owned"),),
    "a hard link to outside": (("h", "1", {"linkname": "../../../../outside/passwd"}), ("h", b"owned")),
    "a whiteout outside": (("../outside/.wh.passwd", b""),),
    "a file over a parent's symlinked directory": (("link/passwd", b"owned"),),
    "a hard link through a parent's link": (("h", "1", {"linkname": "link/passwd"}), ("h", b"owned")),
    "an overlay redirect": (("d", "5", {"pax_headers": {"SCHILY.xattr.trusted.overlay.redirect": "/x"}}),),
    "a negative size": (("x", b"x", {"pax_headers": {"size": "-1"}}),),
    "a huge size": (("x", b"x", {"pax_headers": {"size": str(1 << 62)}}),),
    "an entry twice": (("x", b"1"), ("x", "2", {"linkname": "../outside/passwd"}), ("x", b"owned")),
}


@pytest.mark.parametrize("attack", HOSTILE)
def test_hostile_layers_of_a_registry_leave_the_host_as_it_is(registry: FakeRegistry, tmp_path: Path,
                                                              attack: str) -> None:
    """Above a layer whose links lead to the host's files, as an image's layers may be stacked."""
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "passwd").write_bytes(b"s3cret")
    link = make_tar(("link", "2", {"linkname": str(outside)}))
    registry.image("a/b", "1", [link, make_tar(*HOSTILE[attack])])
    for driver in ("overlay2", "vfs"):
        (tmp_path / driver).mkdir()
        rig = PullRig(str(tmp_path / driver), driver)
        with contextlib.suppress(DockerError):
            rig.run("pull", f"{registry.name}/a/b:1")
        assert (outside / "passwd").read_bytes() == b"s3cret"
        assert [path.name for path in outside.iterdir()] == ["passwd"]
        assert os.stat(outside / "passwd").st_nlink == 1


# Automatic garbage collection


def pull(host: Host, image: str) -> None:
    """Pull IMAGE:TAG over the API."""
    name, _, tag = image.rpartition(":")
    answer = host.http("POST", f"{API}/images/create?fromImage={name}&tag={tag}")
    assert answer.status == 200 and "error" not in answer.lines[-1], answer.body


def set_last_use(rig: ImageRig, name: str, days: float) -> None:
    """Let the last use of an image be so many days ago."""
    fact = os.path.join(rig.root, "image", rig.driver, "imagedb", "metadata", "sha256",
                        rig.images.resolve(name).id[7:], "lastUsed")
    dockerd.write_state(fact, dockerd.rfc3339nano(time.time_ns() - int(days * 86400e9)).encode())


def test_images_that_nobody_uses_go_by_themselves(pull_rig: PullRig, registry: FakeRegistry) -> None:
    rig, names = pull_rig, {}
    config: Any = dockerd.Config()
    for name in ("old", "used", "young", "parent", "noted"):
        registry.image(f"a/{name}", "1", [file_tar(name, bytes(1000))])
        names[name] = f"{registry.name}/a/{name}:1"
        rig.run("pull", names[name])
    rig.run("tag", names["old"], "another/name")
    rig.add("local", archive=file_tar("local"))
    dangling = rig.add(archive=file_tar("dangling"))
    parent = rig.images.resolve(names["parent"])
    rig.layers.create_rw("c", parent.chain_id)
    rig.images.commit("c", parent, dockerd.parse_reference("child"), config={}, container_config={})
    rig.layers.remove_rw("c")
    rig.containers["c"] = (rig.images.resolve(names["used"]).id, False)
    garbage = dockerd.ImageGarbage(config, rig.images)
    config.image_gc_days = 10
    assert garbage.collect() == []  # it has seen them now
    for name in (*names.values(), "local", dangling, "child"):
        set_last_use(rig, name, 9 if name == names["young"] else 11)
    garbage.note_use(rig.images.resolve(names["noted"]).id)
    config.image_gc_days = 0
    assert garbage.collect() == []
    config.image_gc_days = 10
    gone = {record["Untagged"] for record in garbage.collect() if "Untagged" in record}
    assert {"another/name:latest", names["old"]} < gone and len(gone) == 3
    left = {tag for image in rig.run("images") for tag in image["RepoTags"]}
    assert left == {"local:latest", "child:latest", *names.values()} - {names["old"]}
    assert dangling not in rig.listed() and len(rig.listed()) == 6
    rig.restart()
    rig.assert_whole()


def test_unused_images_go_when_all_take_too_much_space(pull_rig: PullRig, registry: FakeRegistry) -> None:
    base, config = file_tar("base", bytes(100_000)), types.SimpleNamespace(
        image_gc_days=0, image_gc_space=250_000)
    names = [f"{registry.name}/a/{name}:1" for name in "xyz"]
    garbage = dockerd.ImageGarbage(config, pull_rig.images)
    for name, days in zip(names, (2, 3, 1)):
        registry.image(f"a/{name[-3]}", "1", [base, file_tar(name[-3], bytes(50_000))])
        pull_rig.run("pull", name)
        assert garbage.collect() == []
        set_last_use(pull_rig, name, days)
    assert garbage.collect() == []  # the base is counted once
    config.image_gc_space = 200_000
    assert {record.get("Untagged") for record in garbage.collect()} >= {names[1]}
    assert len(pull_rig.listed()) == 2
    config.image_gc_space = 1
    garbage.collect()
    assert pull_rig.listed() == []


def test_a_daemon_collects_images_as_its_options_say(new_host: Callable[..., Host]) -> None:
    host = new_host()
    registry = FakeRegistry(host)
    registry.image("a/b", "1")
    pull(host, f"{registry.name}/a/b:1")
    registry.shutdown()
    registry.server_close()
    host.import_image("local", file_tar("local"))
    host.stop()
    host.options += ["--image-gc-space", "1b"]
    host.start()
    images = Path(host.data_root, "image/overlay2/imagedb/metadata/sha256")
    wait_for(lambda: len(list(images.glob("*/lastUsed"))) == 2, "the first look")
    assert len(host.api("GET", "/images/json")) == 2
    host.stop()
    host.start()
    wait_for(lambda: [image["RepoTags"] for image in host.api("GET", "/images/json")] == [["local:latest"]])


# Crashes

CRASH_SCRIPT = """
import io, json, os, sys
sys.path[:0] = json.loads(sys.argv[1])
import dockerd

def act(root, action, source, archive):
    dockerd.STATE_SYNC = dockerd.StateSync()  # threads do not outlive a fork
    dockerd.REMOVALS = dockerd.Removals()
    config = dockerd.Config(data_root=root, storage_driver="overlay2")
    images = dockerd.Images(config)
    engine = dockerd.Engine()
    for part in (images, dockerd.Pulls(dockerd.Registry(config), images)):
        engine.install(part)
    dockerd.FAILPOINTS.update(points)
    old = images.resolve("old")
    if action == "mount":
        images.layers.create_rw("c", old.chain_id, lambda directory: os.mkdir(directory + "/dev"))
        images.layers.remove_rw("c")
    elif action == "commit":
        images.commit("c", old, dockerd.parse_reference("new"), config={}, container_config={})
    elif action == "pull":
        engine.job("pull", source).run()
        images.set_tag(dockerd.parse_reference("new"), images.resolve(source))
    elif action == "image_delete":
        engine.job("image_delete", "old").run()
    else:
        job = engine.job("import", "-", "new")
        job.stdin = io.BytesIO(bytes.fromhex(archive))
        job.run()
    dockerd.STATE_SYNC.flush()

for line in sys.stdin:
    points, *arguments = json.loads(line)
    child = os.fork()
    if not child:
        act(*arguments)
        print(json.dumps({point: -left for point, (action, left) in dockerd.FAILPOINTS.items()}), flush=True)
        os._exit(0)
    print(json.dumps(os.waitpid(child, 0)[1]), flush=True)
"""
FAILPOINTS = ("layer-create", "layer-publish", "layer-retire", "layers-sync", "image-create", "image-delete",
              "state-rename", "state-write", "state-sync")


class Crasher:
    """Does things with images in processes that are killed at a failpoint, forked from one that has loaded
    the daemon."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", CRASH_SCRIPT, json.dumps(sys.path)], stdin=subprocess.PIPE,
            stdout=subprocess.PIPE)

    def run(self, root: str, action: str, source: str, points: dict[str, tuple[str, int]]) -> Any:
        """How often it passed the points; None when it was killed at one."""
        assert self.process.stdin and self.process.stdout
        request = [points, root, action, source, file_tar("new").hex()]
        self.process.stdin.write(json.dumps(request).encode() + b"\n")
        self.process.stdin.flush()
        told = json.loads(self.process.stdout.readline())
        if isinstance(told, dict):
            assert json.loads(self.process.stdout.readline()) == 0
            return told
        assert told == signal.SIGKILL
        return None


@pytest.fixture(scope="module")
def crasher() -> Iterator[Crasher]:
    """The process that is killed in its children."""
    made = Crasher()
    yield made
    with made.process:
        made.process.kill()


def set_up_crash(rig: PullRig, action: str) -> None:
    """The image old and, to be committed, a container that has changed a file of it."""
    for container in rig.layers.rw_ids():
        rig.layers.remove_rw(container)
    for image in rig.run("images"):
        rig.run("image_delete", image["Id"], force=True)
    rig.add("old", archive=file_tar("old"))
    if action == "commit":
        rig.layers.create_rw("c", rig.images.resolve("old").chain_id)
        with dockerd.closing_fd(rig.layers.mount_rw("c")) as fd:
            Path(f"/proc/self/fd/{fd}/old").write_bytes(b"changed")


@pytest.mark.parametrize("every", [False, pytest.param(True, marks=[
    pytest.mark.torture, pytest.mark.timeout(1800)])], ids=["some", "all"])
@pytest.mark.parametrize("action", ["import", "pull", "commit", "image_delete", "mount"])
def test_a_kill_at_every_rename_and_sync_leaves_a_whole_store(
        pull_rig: PullRig, registry: FakeRegistry, crasher: Crasher, action: str, every: bool) -> None:
    """Of each step the first and the last passage, or `every` one."""
    rig, source = pull_rig, f"{registry.name}/a/b:1"
    registry.image("a/b", "1", [file_tar("one"), file_tar("two", b"2" * 100_000), file_tar("three")])
    set_up_crash(rig, action)
    passages = crasher.run(rig.root, action, source, dict.fromkeys(FAILPOINTS, ("count", 0)))
    assert sum(map(bool, passages.values())) >= 3
    for point, passage in [(point, passage) for point, count in passages.items()
                           for passage in range(1, count + 1) if every or passage in (1, count)]:
        rig.restart()
        set_up_crash(rig, action)
        survived = crasher.run(rig.root, action, source, {point: ("kill", passage)})
        assert survived is None or point == "state-sync", (point, passage)  # which is done in groups
        rig.restart()
        for container in rig.layers.rw_ids() if action == "mount" else ():
            rig.layers.remove_rw(container)  # the daemon does so, where it has no record
        rig.assert_whole()
        assert action == "image_delete" or rig.images.resolve("old")
        if action == "pull":
            rig.run("pull", source)
            rig.assert_bytes(source)
        elif action != "image_delete" and rig.images.tags.get(dockerd.parse_reference("new")):
            rig.assert_bytes("new")
    set_up_crash(rig, "import")


def test_an_image_that_is_removed_meanwhile_leaves_no_name(rig: ImageRig,
                                                           monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those who ask for it each is told that there is none."""
    rig.add("a")
    image, late, remove = rig.images.resolve("a"), dockerd.parse_reference("late"), rig.images.store.delete

    def delete(doomed: Any) -> Any:
        rig.images.set_tag(late, doomed)
        return remove(doomed)

    monkeypatch.setattr(rig.images.store, "delete", delete)
    records = rig.run("image_delete", "a")
    assert {"Untagged": "late:latest"} in records and rig.images.tags.images() == []
    for use in (lambda: rig.images.set_tag(late, image), lambda: image.document):
        with pytest.raises(dockerd.NotFound, match=f"No such image: {image.id}"):
            use()
    with pytest.raises(dockerd.NotFound):
        rig.layers.create_rw("c", image.chain_id)
    assert rig.images.tags.images() == []
    rig.assert_whole()


def test_a_creation_that_races_with_the_removal_of_its_image(new_host: Callable[..., Host],
                                                             busybox: bytes) -> None:
    host = new_host()
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for number in range(12):
            host.import_image("raced", file_tar(str(number)), "CMD true")
            removed = pool.submit(host.http, "DELETE", f"{API}/images/raced?force=1")
            answer = host.http("POST", f"{API}/containers/create", {"Image": "raced"})
            assert removed.result().status in (200, 409)
            assert answer.status == 201 or (
                answer.status == 404 and answer.json["message"].startswith("No such image: ")), answer.body
            host.remove_all()


@pytest.mark.parametrize("lost", [False, True])
def test_a_commit_that_a_power_cut_took_is_gone_whole(pull_rig: PullRig, lost: bool) -> None:
    """Its one sync had not ended: the names may have reached the disk before the files."""
    rig = pull_rig
    set_up_crash(rig, "commit")
    made = rig.images.commit("c", rig.images.resolve("old"), dockerd.parse_reference("new"), config={},
                             container_config={})
    layer, begun = rig.layers.get(made.chain_id), Path(rig.layers.tmp, "begun")
    begun.mkdir()
    (begun / f"{layer.chain_id[7:]}-published").symlink_to(layer.cache_id)
    if lost:
        os.truncate(Path(rig.layers.driver.diff_dir(layer.cache_id), "old"), 3)
    rig.restart()
    assert rig.images.damages
    assert {name for image in rig.run("images") for name in image["RepoTags"]} == (
        {"old:latest"} if lost else {"new:latest", "old:latest"})
    rig.layers.remove_rw("c")
    rig.assert_whole()
    rig.restart()
    assert rig.images.damages == []


def test_a_layer_that_has_lost_its_content_is_pulled_again(pull_rig: PullRig,
                                                           registry: FakeRegistry) -> None:
    """As a power cut leaves a layer that another daemon has unpacked and not synced (moby 49784)."""
    archives = [file_tar(name, name.encode() * 1000) for name in ("one", "two", "three")]
    registry.image("a/b", "1", archives)
    source = f"{registry.name}/a/b:1"
    pull_rig.run("pull", source)
    pull_rig.add("other", archive=archives[0])
    image = pull_rig.images.resolve(source)
    pull_rig.layers.create_rw("c", image.chain_id)
    directories = [Path(pull_rig.layers.driver.diff_dir(pull_rig.layers.get(chain).cache_id))
                   for chain in image.chain_ids]
    os.truncate(directories[1] / "two", 0)
    pull_rig.restart()
    registry.seen.clear()
    statuses = [line["status"] for line in pull_rig.lines("pull", source)]
    assert statuses.count("Already exists") == 1 and statuses.count("Pull complete") == 2
    assert len(registry.requests("/blobs/")) == 3  # the configuration, and what is at and above the loss
    assert [path.read_bytes() for path in map(next, map(Path.iterdir, directories))] == [
        b"one" * 1000, b"two" * 1000, b"three" * 1000]
    with dockerd.closing_fd(pull_rig.layers.mount_rw("c")) as fd:
        assert Path(f"/proc/self/fd/{fd}/two").read_bytes() == b"two" * 1000
    pull_rig.layers.remove_rw("c")
    os.unlink(directories[0] / "one")
    pull_rig.restart()
    pull_rig.add("other", archive=archives[0])
    assert (directories[0] / "one").read_bytes() == b"one" * 1000
    registry.seen.clear()
    pull_rig.run("pull", source)
    assert len(registry.requests("/blobs/")) == 1


@pytest.mark.torture
@pytest.mark.timeout(3600)
def test_a_daemon_killed_at_every_step_of_a_pull_a_commit_and_a_removal(new_host: Callable[..., Host],
                                                                        busybox: bytes) -> None:
    """After the next start a check finds nothing, and a second pull heals the image."""
    host = new_host()
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)
    container = host.create("sh", "-c", "echo x >/x")
    host.api("POST", f"/containers/{container}/start")
    host.api("POST", f"/containers/{container}/wait")
    registry = FakeRegistry(host)
    registry.image("a/b", "1", [busybox, file_tar("two", b"2" * 100_000)])
    image = f"{registry.name}/a/b:1"
    for point in FAILPOINTS:
        for passage in itertools.count(1):
            host.stop()
            host.environment["DOCKERD_FAILPOINTS"] = f"{point}=kill@{passage}"
            host.start(wait=False)
            with contextlib.suppress(AssertionError, OSError, http.client.HTTPException):
                host.wait_ready()
                pull(host, image)
                host.api("POST", f"/commit?container={container}&repo=committed")
                host.api("DELETE", f"/images/{image}")
            assert host.process
            with contextlib.suppress(subprocess.TimeoutExpired):
                host.process.wait(0.2)
            survived = host.process.poll() is None
            host.kill()
            del host.environment["DOCKERD_FAILPOINTS"]
            host.start()
            pull(host, image)
            assert host.run("wc", "-c", "/two", image=image) == (0, b"100000 /two\n"), (point, passage)
            if host.http("GET", f"{API}/images/committed/json").status == 200:
                assert host.run("cat", "/x", image="committed") == (0, b"x\n"), (point, passage)
                host.api("DELETE", "/images/committed")
            host.api("DELETE", f"/images/{image}")
            host.stop()
            assert check(host, "--check") == (0, []), (point, passage)
            host.start()
            if survived:
                assert passage > 1, point
                break
    registry.shutdown()
    registry.server_close()


def test_a_pull_onto_a_disk_that_is_full_leaves_nothing(new_host: Callable[..., Host],
                                                        busybox: bytes) -> None:
    """Whatever write finds no room: the pull fails with the reason and leaves nothing, or is whole."""
    host = new_host(start=False)
    assert host.enter("mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", "/mnt").wait() == 0
    host.data_root = "/mnt/data"
    host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
    registry = FakeRegistry(host)
    registry.image("a/b", "1", [file_tar(name, secrets.token_bytes(300_000)) for name in "abc"])
    assert host.process
    root = Path(f"/proc/{host.process.pid}/root/mnt")
    before = sorted(os.listdir(root / "data/overlay2"))
    outcomes = set()
    for free in [*range(0, 160, 8), *range(160, 2200, 120)]:  # KiB
        with open(root / "filler", "wb") as filler:
            facts = os.statvfs(root)
            os.posix_fallocate(filler.fileno(), 0, facts.f_bavail * facts.f_bsize - (free << 10))
        answer = host.http("POST", f"{API}/images/create?fromImage={registry.name}/a/b&tag=1")
        os.unlink(root / "filler")
        error = answer.lines[-1].get("error", "") if answer.status == 200 else answer.json["message"]
        outcomes.add(error.lower().partition(":")[2] if error else "whole")
        assert not error or "no space left on device" in error.lower(), error
        for image in host.api("GET", "/images/json?all=1"):
            if "busybox:latest" not in image["RepoTags"]:
                host.api("DELETE", f"/images/{image['Id']}?force=1")
        assert sorted(os.listdir(root / "data/overlay2")) == before, free
        wait_for(lambda: os.listdir(root / "data/image/overlay2/layerdb/tmp") == [])
    assert "whole" in outcomes and len(outcomes) > 1
    host.stop()
    assert check(host, "--check") == (0, [])
    registry.shutdown()
    registry.server_close()


# Pushing


def pushable(rig: PullRig, registry: FakeRegistry, *names: str) -> list[str]:
    """The layers' digests, from the bottom, of an image that was pulled and has these names at a registry."""
    layers = [file_tar(name, data) for name, data in (
        ("one", b"1" * 3000), ("two", secrets.token_bytes(1_000_000)), ("one", b"1"))]
    source = FakeRegistry()
    source.image("from/here", "1", layers, config={"Labels": {"a": "b"}})
    rig.run("pull", f"{source.name}/from/here:1")
    for name in names:
        repository, _, tag = name.partition(":")
        rig.run("tag", f"{source.name}/from/here:1", f"{registry.name}/{repository}", tag)
    rig.run("image_delete", f"{source.name}/from/here:1")
    source.shutdown()
    source.server_close()
    return [sha256(layer) for layer in layers]


def test_push_tells_what_docker_tells(pull_rig: PullRig, registry: FakeRegistry) -> None:
    diff_ids = pushable(pull_rig, registry, "a/b:1", "a/b:2", "c/d:1")
    ids = [diff_id[7:19] for diff_id in reversed(diff_ids)]
    (image,) = pull_rig.listed()
    name = f"{registry.name}/a/b"
    lines = pull_rig.lines("push", name, tag="1")
    assert lines[0] == {"status": f"The push refers to repository [{name}]"}
    assert lines[1:4] == [{"status": "Preparing", "progressDetail": {}, "id": layer} for layer in ids]
    for layer in ids:
        told = [line for line in lines[4:-2] if line["id"] == layer]
        assert told[-1] == {"status": "Pushed", "progressDetail": {}, "id": layer}
        assert {line["status"] for line in told[:-1]} == {"Pushing"}
        done = [line["progressDetail"]["current"] for line in told[:-1]]
        assert done == sorted(done) and done[-1] % 512 == 0
    kind, raw = registry.manifests["a/b", "1"]
    digest = sha256(raw)
    assert lines[-2:] == [
        {"status": f"1: digest: {digest} size: {len(raw)}"},
        {"progressDetail": {}, "aux": {"Tag": "1", "Digest": digest, "Size": len(raw)}}]
    document = json.loads(raw)
    assert raw == json.dumps(document, indent=3).encode() and kind == document["mediaType"] == MANIFEST
    assert document["config"] == {"mediaType": "application/vnd.docker.container.image.v1+json",
                                  "size": len(registry.blobs[image]), "digest": image}
    for diff_id, layer in zip(diff_ids, document["layers"]):
        assert layer["mediaType"] == "application/vnd.docker.image.rootfs.diff.tar.gzip"
        assert len(registry.blobs[layer["digest"]]) == layer["size"]
        assert sha256(gzip.decompress(registry.blobs[layer["digest"]])) == diff_id
    assert pull_rig.events[-1] == ("push", f"{name}:1", {"a": "b", "name": name})
    assert f"{name}@{digest}" in pull_rig.run("image_inspect", f"{name}:1")["RepoDigests"]
    assert registry.uploads == {}

    def short(*arguments: str, **env: Any) -> list[str]:
        return [f"{line['id']}: {line['status']}" for line in pull_rig.lines("push", *arguments, **env)
                if "id" in line and line["status"] != "Preparing"]

    registry.seen.clear()
    tags = [line["aux"]["Tag"] for line in pull_rig.lines("push", name) if "aux" in line]
    assert tags == ["1", "2"] and registry.manifests["a/b", "2"][1] == raw
    assert sorted(short(f"{name}:1")) == sorted(f"{layer}: Layer already exists" for layer in ids)
    assert {method for method, _, _ in registry.seen} == {"GET", "HEAD", "PUT"}
    assert sorted(short(f"{registry.name}/c/d:1")) == sorted(f"{layer}: Mounted from a/b" for layer in ids)
    pull_rig.run("image_delete", image, force=True)
    pull_rig.run("pull", f"{registry.name}/c/d:1")
    assert pull_rig.listed() == [image]


def test_push_errors_in_dockers_words(pull_rig: PullRig, registry: FakeRegistry) -> None:
    pushable(pull_rig, registry, "a/b:1")
    name = f"{registry.name}/a/b"
    for status, text, arguments, env in (
            (404, f"tag does not exist: {name}:9", [name], {"tag": "9"}),
            (404, f"tag does not exist: {name}:9", [f"{name}:1"], {"tag": "9"}),
            (404, f"An image does not exist locally with the tag: {name}c", [f"{name}c"], {}),
            (400, "invalid reference format: repository name must be lowercase", [f"{registry.name}/A"], {}),
            (400, "invalid tag format", [name], {"tag": "a:b"}),
            (400, "cannot push a digest reference", [f"{name}@sha256:{A64}"], {}),
            (404, "does not match the specified platform", [f"{name}:1"], {"platform": "linux/s390x"})):
        assert text in pull_rig.refused(status, "push", *arguments, **env)
    assert {method for method, _, _ in registry.seen} == {"GET"}

    def guard(handler: Any, **challenge: str) -> bool:
        handler.body()
        handler.answer(401, **challenge)
        return True

    registry.fault = functools.partial(guard, WWW_Authenticate='Basic realm="r"')
    assert pull_rig.refused(401, "push", name, tag="1") == "no basic auth credentials"
    login = {"username": "me", "password": "wrong"}
    assert pull_rig.refused(500, "push", name, tag="1", authConfig=login) == (
        "unauthorized: authentication required")

    def deny(handler: Any) -> bool:
        if handler.command != "POST":
            return False
        handler.body()
        handler.refuse(403, "DENIED")
        return True

    registry.fault = deny
    assert pull_rig.refused(500, "push", name, tag="1") == "denied: denied"
    pull_rig.run("tag", f"{name}:1", "127.0.0.1:1/x")
    assert pull_rig.refused(500, "push", "127.0.0.1:1/x") == (
        'Get "http://127.0.0.1:1/v2/": dial tcp 127.0.0.1:1: connect: connection refused')


def test_a_push_goes_on_after_a_failure(pull_rig: PullRig, registry: FakeRegistry,
                                        monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd.Upload, "PAUSE", 1)
    diff_ids = pushable(pull_rig, registry, "a/b:1")
    broken: list[Any] = []

    def fail(handler: Any) -> bool:
        if handler.command == "PATCH" and len(broken) < 2:
            broken.append(handler)
            if len(broken) == 1:
                handler.rfile.read(10)
                handler.close_connection = True
            else:
                handler.body()
                handler.refuse(503, "UNAVAILABLE")
            return True
        return False

    registry.fault = fail
    lines = pull_rig.lines("push", f"{registry.name}/a/b")
    assert lines[-1]["aux"]["Tag"] == "1"
    assert sum(line.get("status") == "Retrying in 1 second" for line in lines) in (1, 2)
    assert registry.uploads == {} and len(broken) == 2
    assert [sha256(gzip.decompress(registry.blobs[layer["digest"]]))
            for layer in json.loads(registry.manifests["a/b", "1"][1])["layers"]] == diff_ids


def test_a_push_that_gives_up_or_is_cancelled_leaves_nothing(
        pull_rig: PullRig, registry: FakeRegistry, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dockerd.Upload, "PAUSE", 0)
    pushable(pull_rig, registry, "a/b:1")
    failing, over = threading.Event(), threading.Event()

    def refuse(handler: Any) -> bool:
        if handler.command == "PATCH":
            handler.body()
            handler.refuse(503, "UNAVAILABLE")
        return handler.command == "PATCH"

    registry.fault = refuse
    assert pull_rig.refused(500, "push", f"{registry.name}/a/b:1") == "unavailable: unavailable"
    assert registry.uploads == {} and registry.manifests == {}

    def stall(handler: Any) -> bool:
        if handler.command == "PATCH":
            failing.set()
            over.wait(20)
        return False

    registry.fault = stall
    job = pull_rig.engine.job("push", f"{registry.name}/a/b:1")
    join = dockerd.start_thread(job.run)
    assert failing.wait(20)
    job.cancel()
    over.set()
    with pytest.raises(DockerError, match="context canceled"):
        join()
    assert registry.uploads == {} and registry.manifests == {}


def test_a_layer_that_has_changed_on_disk_is_not_pushed(pull_rig: PullRig, registry: FakeRegistry) -> None:
    pushable(pull_rig, registry, "a/b:1")
    layer = pull_rig.layers.get(pull_rig.images.resolve(f"{registry.name}/a/b:1").chain_ids[0])
    path = os.path.join(pull_rig.layers.driver.diff_dir(layer.cache_id), "one")
    Path(path).write_bytes(b"2" * 3000)
    assert "is damaged: remove its images" in pull_rig.refused(500, "push", f"{registry.name}/a/b:1")
    assert registry.manifests == {} and registry.uploads == {}


def test_uploads_go_only_as_many_at_a_time_as_allowed(pull_rig: PullRig, registry: FakeRegistry) -> None:
    pushable(pull_rig, registry, "a/b:1")
    pull_rig.registry.config.max_concurrent_uploads = 1
    running, most = [0], [0]

    def count(handler: Any) -> bool:
        running[0] += handler.command == "POST"
        most[0] = max(most[0], running[0])
        running[0] -= handler.command == "PUT" and "/uploads/" in handler.path
        return False

    registry.fault = count
    lines = pull_rig.lines("push", f"{registry.name}/a/b")
    assert most == [1] and running == [0]
    assert sum(line.get("status") == "Waiting" for line in lines) >= 1


def test_tokens_of_a_push_are_renewed_and_never_shown_to_others(pull_rig: PullRig,
                                                               registry: FakeRegistry) -> None:
    """A token that expires while a layer is sent is followed by another; where an upload goes on elsewhere,
    no secret is sent."""
    pushable(pull_rig, registry, "a/b:1")
    elsewhere = FakeRegistry()
    elsewhere.blobs, elsewhere.uploads, elsewhere.linked = registry.blobs, registry.uploads, registry.linked
    good: list[str] = []
    expired: list[str] = []

    def guard(handler: Any) -> bool:
        if handler.path.startswith("/token?"):
            good[:] = [secrets.token_hex(4)]
            handler.answer(200, json.dumps({"token": good[0]}).encode())
        elif handler.headers.get("Authorization") != f"Bearer {''.join(good)}":
            handler.body()
            handler.refuse(401, "UNAUTHORIZED", WWW_Authenticate=(
                f'Bearer realm="http://{registry.name}/token",service="s",scope="repository:a/b:pull,push"'))
        elif handler.command == "POST":
            place = secrets.token_hex(8)
            registry.uploads[place] = b""
            handler.answer(202, Location=f"http://{elsewhere.name}/v2/a/b/blobs/uploads/{place}")
        elif handler.command == "PUT" and "/manifests/" in handler.path and not expired:
            expired.append(good.pop())
            return guard(handler)
        else:
            return False
        return True

    registry.fault = guard
    login = {"username": "me", "password": "secret"}
    pull_rig.run("push", f"{registry.name}/a/b:1", authConfig=login)
    asked = [(path, headers["Authorization"]) for _, path, headers in registry.seen if "/token?" in path]
    basic = "Basic " + base64.b64encode(b"me:secret").decode()
    assert len(asked) == 2 and all(secret == basic for _, secret in asked)
    assert "scope=repository%3Aa%2Fb%3Apull%2Cpush" in asked[0][0] and expired
    assert len(elsewhere.seen) == 8 and not any(headers["Authorization"] for _, _, headers in elsewhere.seen)

    def thief(handler: Any) -> bool:
        handler.body()
        handler.answer(401, WWW_Authenticate=f'Bearer realm="http://{elsewhere.name}/token"')
        return True

    elsewhere.fault, elsewhere.seen = thief, []
    registry.linked.clear()
    assert "unauthorized" in pull_rig.refused(500, "push", f"{registry.name}/a/b:1", authConfig=login)
    assert not any("/token" in path for _, path, _ in elsewhere.seen)
    elsewhere.shutdown()
    elsewhere.server_close()


# Debian's registry

REGISTRY_CONFIG = """version: 0.1
storage: {{filesystem: {{rootdirectory: {data}}}, delete: {{enabled: true}}}}
http: {{addr: "{address}", {http}}}
{rest}
"""
HTPASSWD = "me:$2y$05$abcdefghijklmnopqrstuuOQiyCxlgf/oeuTqixKmWdcYUh4Hjl0a\n"  # secret
NAMES = "registry.test registry-1.docker.io index.docker.io"
OVER_ETC = f"""set -e
for place in /mnt /run /dev/shm /var/lib; do mount -t tmpfs tmpfs $place; done
mkdir /mnt/upper /mnt/work
mount -t overlay -o lowerdir=/etc,upperdir=/mnt/upper,workdir=/mnt/work overlay /etc
echo "127.0.0.1 {NAMES}" >>/etc/hosts
cat "$1/ca.pem" >>/etc/ssl/certs/ca-certificates.crt
"""


class Registries:
    """docker-registry in a host's namespaces: plain and open at `plain`, which is a mirror of the Hub
    too; at `guarded`, with TLS by the authority and for the certificate in certs.d and a password; and as the
    Hub, with TLS by the system's authorities.

    The host's /etc is a copy of the machine's."""

    plain, guarded = "127.0.0.1:5000", "registry.test:5443"

    def __init__(self, host: Host, certificates: Path) -> None:
        self.host, self.certificates = host, certificates
        assert host.enter("sh", "-c", OVER_ETC, "sh", str(certificates)).wait() == 0
        folder = self.etc("docker/certs.d", self.guarded)
        folder.mkdir(parents=True)
        for name, there in (("ca.pem", "ca.crt"), ("cert.pem", "me.cert"), ("key.pem", "me.key")):
            shutil.copy(certificates / name, folder / there)
        self.etc("htpasswd").write_text(HTPASSWD)
        tls = f"tls: {{certificate: {certificates}/cert.pem, key: {certificates}/key.pem%s}}"
        both = tls % f", clientcas: [{certificates}/ca.pem]"
        guard = "auth: {htpasswd: {realm: here, path: /etc/htpasswd}}"
        self.processes = [self.start("plain", self.plain), self.start("hub", "127.0.0.1:443", tls % ""),
                          self.start("guarded", "127.0.0.1:5443", both, guard)]

    def etc(self, *names: str) -> Path:
        """A path in the host's own /etc."""
        return Path(f"/proc/{self.host.holder.pid}/root/etc", *names)

    def start(self, name: str, address: str, http: str = "", rest: str = "", data: str = "",
              host: Optional[Host] = None) -> subprocess.Popen[Any]:
        """Start one registry, and wait until it listens; on another `host` with another's `data`."""
        config = Path(self.host.path(name))
        data = self.host.path(f"{data or name}-data")
        config.write_text(REGISTRY_CONFIG.format(data=data, address=address, http=http, rest=rest))
        with open(self.host.path(name + "-log"), "wb") as log:
            process = (host or self.host).enter(f"{PEER}/usr/bin/docker-registry", "serve", str(config),
                                                stdout=log, stderr=log)
        wait_for(lambda: "listening on" in read_text(self.host.path(name + "-log")), name)
        return process

    def close(self) -> None:
        """End them."""
        for process in self.processes:
            process.terminate()
            process.wait()

    def run(self, *command: str) -> str:
        """What another client of registries prints, in the host's namespaces."""
        policy = Path(self.host.path(".config/containers/policy.json"))
        policy.parent.mkdir(parents=True, exist_ok=True)
        policy.write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
        environment = f"LD_LIBRARY_PATH={PEER}/usr/lib/x86_64-linux-gnu"
        process = self.host.enter("env", environment, f"{PEER}/usr/bin/{command[0]}", *command[1:],
                                  stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0, (command, err)
        return out.decode().strip()


@pytest.fixture(scope="module")
def registries(certificates: Path, busybox: bytes) -> Iterator[Registries]:
    """A host with Debian's registry beside it, and the image busybox."""
    host = Host("-D", f"--registry-mirror=http://{Registries.plain}")
    made = Registries(host, certificates)
    try:
        host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
        yield made
    finally:
        made.close()
        host.close()


@pytest.mark.parametrize("version", sorted(docker_clis()))
def test_a_push_and_a_pull_through_debians_registry(registries: Registries, version: str) -> None:
    docker, repository = Docker(docker_clis()[version], registries.host), "a" + version.replace("+", "-")
    docker("login", "-u", "me", "--password-stdin", registries.guarded, input="secret")
    image = docker("inspect", "-f", "{{.Id}}", "busybox")
    ids = []
    for place in (registries.plain, registries.guarded, "docker.io/someone"):
        for tag in "12":
            docker("tag", "busybox", f"{place}/{repository}:{tag}")
        told = docker("push", f"{place}/{repository}:1").splitlines()
        name = f"{place}/{repository}"
        assert told[0] == f"The push refers to repository [{name}]"
        assert re.fullmatch("[0-9a-f]{12}: Preparing", told[1]), told
        assert re.fullmatch("[0-9a-f]{12}: (Pushed|Mounted from .*)", told[-2]), told
        digest = re.fullmatch(r"1: digest: (sha256:\w{64}) size: \d+", told[-1])
        assert digest, told
        assert docker("push", "-q", "-a", name) == name
        docker("rmi", f"{name}:1", f"{name}:2")
        assert f"Digest: {digest[1]}" in docker("pull", f"{name}:1")
        assert docker("pull", "-q", f"{name}@{digest[1]}") == f"{name}@{digest[1]}"
        ids.append(docker("inspect", "-f", "{{.Id}}", f"{name}:1"))
    assert set(ids) == {image}
    docker("logout", registries.guarded)
    refused = docker.run("push", f"{registries.guarded}/{repository}:1", status=1).stderr
    assert refused.strip() == "no basic auth credentials"


def test_a_push_by_docker_py(registries: Registries) -> None:
    client = docker_py.DockerClient(base_url=registries.host.url, version="auto", timeout=60)
    name = f"{registries.guarded}/by/py"
    client.images.get("busybox").tag(name, "1")
    right, wrong = ({"username": "me", "password": password} for password in ("secret", "x"))
    lines = list(client.images.push(name, "1", auth_config=right, stream=True, decode=True))
    assert lines[-1]["aux"]["Tag"] == "1" and lines[-1]["aux"]["Size"] > 400
    lines.append(*list(client.images.push(name, "1", auth_config=wrong, stream=True, decode=True))[-1:])
    assert lines[-1]["error"] == "unauthorized: authentication required"
    data = client.images.get_registry_data(f"{name}:1", auth_config=right)
    assert data.id == lines[-2]["aux"]["Digest"]
    client.images.remove(f"{name}:1")
    pulled = client.images.pull(name, "1", auth_config=right)
    assert pulled.id == client.images.get("busybox").id
    client.close()


def test_the_hub_is_pulled_from_its_mirror_and_never_pushed_there(registries: Registries) -> None:
    docker = Docker(docker_clis()[max(docker_clis())], registries.host)
    for name in (f"{registries.plain}/library/mirrored", "pushed"):
        docker("tag", "busybox", name)
        docker("push", "-q", name)
        docker("rmi", name)
    docker("pull", "mirrored")
    docker("pull", "pushed")
    hub, plain = (read_text(registries.host.path(name + "-log")) for name in ("hub", "plain"))
    assert "library/mirrored" not in hub and "PUT /v2/library/pushed" not in plain
    assert "GET /v2/library/pushed/manifests/latest" in hub and "GET /v2/library/pushed/manifests" in plain
    told = docker("pull", "-a", f"{registries.plain}/library/mirrored")
    assert "Image is up to date" in told or "Downloaded newer image" in told


def test_a_pull_whose_client_leaves_leaves_nothing(registries: Registries) -> None:
    host = registries.host
    fake, started, over = FakeRegistry(host), threading.Event(), threading.Event()
    fake.image("a/b", "1", [file_tar("one"), file_tar("big", secrets.token_bytes(2_000_000))])

    def stall(handler: Any) -> bool:
        blob = fake.blobs.get(handler.path.rpartition("/")[2], b"")
        if len(blob) > 100_000:
            handler.send_response(200)
            handler.send_header("Content-Length", str(len(blob)))
            handler.end_headers()
            handler.wfile.write(blob[:300_000])
            started.set()
            over.wait(30)
        return len(blob) > 100_000

    fake.fault = stall
    before = sorted(os.listdir(os.path.join(host.data_root, "overlay2")))
    docker = Docker(docker_clis()[max(docker_clis())], host)
    pull = docker.start("pull", f"{fake.name}/a/b:1")
    assert started.wait(20)
    pull.send_signal(signal.SIGINT)
    pull.communicate(timeout=20)
    layers = os.path.join(host.data_root, "image", "overlay2", "layerdb", "tmp")
    wait_for(lambda: os.listdir(layers) == [], "the pull to end")
    assert sorted(os.listdir(os.path.join(host.data_root, "overlay2"))) == before
    over.set()
    assert host.process
    files = Path(f"/proc/{host.process.pid}/fd")
    wait_for(lambda: not any(os.path.join(host.data_root, "tmp") in str(file.resolve())
                             for file in files.iterdir()), "the blob to go")
    fake.shutdown()
    fake.server_close()


def podman_of(host: Host) -> tuple[str, ...]:
    """podman's command line on files below a host's directory."""
    return ("podman", "--root", host.path("pod"), "--runroot", host.path("podrun"), "--storage-driver", "vfs",
            "--cgroup-manager", "cgroupfs", "--events-backend", "none", "--conmon", f"{PEER}/usr/bin/conmon",
            "--runtime", f"{PEER}/usr/sbin/runc")


def test_the_real_dockerd_pulls_what_is_pushed_and_pushes_it(registries: Registries, peer: Host) -> None:
    ours, theirs = (Docker(docker_clis()[max(docker_clis())], host) for host in (registries.host, peer))
    image = ours("inspect", "-f", "{{.Id}}", "busybox")
    ours("tag", "busybox", f"{registries.plain}/ours")
    ours("push", "-q", f"{registries.plain}/ours")
    process = registries.start("theirs", registries.plain, data="plain", host=peer)
    theirs("pull", "-q", f"{registries.plain}/ours")
    assert theirs("inspect", "-f", "{{.Id}}", f"{registries.plain}/ours") == image
    theirs("tag", f"{registries.plain}/ours", f"{registries.plain}/theirs")
    assert "Mounted from ours" in theirs("push", f"{registries.plain}/theirs")
    theirs("rmi", f"{registries.plain}/ours", f"{registries.plain}/theirs")
    process.terminate()
    process.wait()
    ours("pull", "-q", f"{registries.plain}/theirs")
    assert ours("inspect", "-f", "{{.Id}}", f"{registries.plain}/theirs") == image


def test_what_is_pushed_goes_round_through_skopeo_and_podman(registries: Registries) -> None:
    host, plain = registries.host, registries.plain
    image = host.api("GET", "/images/busybox/json")
    host.api("POST", f"/images/busybox/tag?repo={plain}/round&tag=1")
    host.http("POST", f"{API}/images/{plain}/round/push?tag=1", headers={"X-Registry-Auth": "e30="})
    for target in ("dir:" + host.path("dir"), "oci:" + host.path("oci:1")):
        registries.run("skopeo", "copy", "--src-tls-verify=false", f"docker://{plain}/round:1", target)
    registries.run("skopeo", "copy", "--dest-tls-verify=false", "dir:" + host.path("dir"),
                   f"docker://{plain}/docker:1")
    registries.run("skopeo", "copy", "--dest-tls-verify=false", "oci:" + host.path("oci:1"),
                   f"docker://{plain}/oci:1")
    podman = podman_of(host)
    found = registries.run(*podman, "pull", "-q", "--tls-verify=false", f"{plain}/round:1")
    assert "sha256:" + found == image["Id"]
    registries.run(*podman, "push", "-q", "--tls-verify=false", found, f"{plain}/podman:1")
    for name in ("docker", "oci", "podman"):
        pull(host, f"{plain}/{name}:1")
        there = host.api("GET", f"/images/{plain}/{name}:1/json")
        assert there["RootFS"] == image["RootFS"]
        assert name != "docker" or there["Id"] == image["Id"]
        assert host.run("echo", name, image=f"{plain}/{name}:1") == (0, name.encode() + b"\n")


# ------------------------------------------------------------------------------------------------------------
# Images: archives
#
# What we save the real dockerd, podman, skopeo and umoci read, and we read what they save, with equal ids.
# ------------------------------------------------------------------------------------------------------------


def saved(rig: ImageRig, *names: str) -> bytes:
    """An archive of images."""
    job, out = rig.engine.job("image_export", *names), io.BytesIO()
    job.stdout.add(out)
    job.run()
    return out.getvalue()


def files_of(archive: bytes) -> dict[str, bytes]:
    """The files of a tar archive, a link's content being where it leads."""
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar  # type: ignore[union-attr]
                if not entry.isdir()}


def two_images(rig: ImageRig) -> list[str]:
    """The ids of an image a:1, a:2 and of the image b:1 made from it, with a layer more."""
    rig.add("a", "1", tar_of({"bin": None, "bin/one": b"1" * 3000}))
    rig.run("tag", "a:1", "a", "2")
    parent = rig.images.resolve("a:1")
    rig.layers.create_rw("c", parent.chain_id)
    with dockerd.closing_fd(rig.layers.mount_rw("c")) as fd:
        Path(f"/proc/self/fd/{fd}/two").write_text("2")
    child = rig.images.commit("c", parent, config={"Cmd": ["two"]}, container_config={})
    rig.layers.remove_rw("c")
    rig.run("tag", child.id, "b", "1")
    return [parent.id, child.id]


def names_of(rig: ImageRig) -> dict[str, tuple[str, list[str]]]:
    """Parents and tags of all images, by id."""
    return {image["Id"]: (image["ParentId"], image["RepoTags"]) for image in rig.run("images", all=True)}


@pytest.mark.parametrize("driver, compress", [
    ("overlay2", bytes), ("vfs", gzip.compress), ("overlay2", lzma.compress), ("overlay2", zstd)])
def test_what_is_saved_is_loaded(tmp_path: Path, driver: str, compress: Callable[[bytes], bytes]) -> None:
    rig = ImageRig(str(tmp_path), driver)
    ids = two_images(rig)
    before, archive = names_of(rig), saved(rig, "a", ids[1], "b:1")
    files = files_of(archive)
    for image in reversed(ids):
        rig.run("image_delete", image, force=True)
    rig.assert_whole()
    job, out = rig.engine.job("load"), io.BytesIO()
    job.stdin = io.BytesIO(compress(archive))
    job.stdout.add(out)
    job.run()
    lines = [json.loads(line) for line in out.getvalue().splitlines()]
    assert [line["stream"] for line in lines if "stream" in line] == [
        f"Loaded image: {name}\n" for name in ("a:1", "a:2", "b:1")]
    assert lines[0].keys() == {"status", "progressDetail", "progress", "id"}
    assert names_of(rig) == before and saved(rig, "a", ids[1], "b:1") == archive
    rig.restart()
    rig.assert_whole()
    assert names_of(rig) == before
    assert set(files) == {"index.json", "manifest.json", "oci-layout", "repositories", *(
        f"blobs/sha256/{sha256(data)[7:]}" for name, data in files.items() if name.startswith("blobs/"))}
    assert rig.events[-1][:2] == ("save", ids[1])


def test_save_takes_what_docker_takes(tmp_path: Path) -> None:
    rig = ImageRig(str(tmp_path), "overlay2")
    ids = two_images(rig)
    for names, tags in ((["a"], [["a:1", "a:2"]]), (["a:2", "b"], [["a:2"], ["b:1"]]), ([ids[0]], [None]),
                        ([ids[1][7:19], "a:1"], [None, ["a:1"]])):
        items = json.loads(files_of(saved(rig, *names))["manifest.json"])
        assert [item["RepoTags"] for item in items] == tags
    assert rig.refused(404, "image_export", "nosuch") == "No such image: nosuch:latest"
    assert rig.refused(404, "image_export", "a:1", "b:2") == "No such image: b:2"
    assert "does not match" in rig.refused(404, "image_export", "a:1", platform="linux/s390x")
    layer = rig.layers.get(rig.images.resolve("b:1").chain_ids[1])
    Path(rig.layers.driver.diff_dir(layer.cache_id), "two").write_text("3")
    assert "is damaged" in rig.refused(500, "image_export", "b:1")


def other_form(rig: ImageRig, form: str) -> bytes:
    """The archive of the two images as others write it."""
    files = files_of(saved(rig, "a", "b"))
    items = json.loads(files["manifest.json"])
    if form == "layout":
        del files["manifest.json"], files["repositories"]
        return tar_of({f"./{name}" if name.startswith("blobs/") else f"//{name}": data
                       for name, data in files.items()})
    if form == "nested":  # as containerd writes one of several platforms, its layers compressed
        inner, manifests = json.loads(files["index.json"]), []
        for entry in inner["manifests"]:
            manifest = json.loads(files[f"blobs/sha256/{entry['digest'][7:]}"])
            for layer in manifest["layers"]:
                data = gzip.compress(files[f"blobs/sha256/{layer['digest'][7:]}"])
                layer.update(digest=sha256(data), size=len(data))
                files[f"blobs/sha256/{sha256(data)[7:]}"] = data
            data = json.dumps(manifest).encode()
            files[f"blobs/sha256/{sha256(data)[7:]}"] = data
            listed = [{"mediaType": MANIFEST, "digest": "sha256:" + "0" * 64, "size": 1, "platform": {
                "os": "linux", "architecture": "s390x"}}, {**entry, "digest": sha256(data)}]
            data = json.dumps({"schemaVersion": 2, "manifests": listed}).encode()
            files[f"blobs/sha256/{sha256(data)[7:]}"] = data
            manifests.append({"digest": sha256(data), "size": len(data),
                              "annotations": entry["annotations"]})
        files["index.json"] = json.dumps({"manifests": manifests}).encode()
        del files["manifest.json"]
        return tar_of(files)
    links: dict[str, Any] = {}
    for number, item in enumerate(items):  # a layer that two images have is a link, as 20.10 writes it
        for place, layer in enumerate(item["Layers"]):
            name = f"{number}{place}/layer.tar"
            links[name] = files[layer] if (number, place) != (1, 0) else link_entry(name, "../00/layer.tar")
            item["Layers"][place] = name
        links[f"{number}.json"], item["Config"] = files[item["Config"]], f"{number}.json"
    return tar_of({"manifest.json": json.dumps(items).encode(), **links})


@pytest.mark.parametrize("form", ["layout", "nested", "links"])
def test_other_forms_are_loaded(tmp_path: Path, form: str) -> None:
    rig = ImageRig(str(tmp_path), "overlay2")
    ids = two_images(rig)
    before, archive = names_of(rig), other_form(rig, form)
    for image in reversed(ids):
        rig.run("image_delete", image, force=True)
    rig.run("load", stdin=archive, quiet=True)
    expected = before if form == "links" else {key: ("", tags) for key, (_, tags) in before.items()}
    assert names_of(rig) == expected
    rig.assert_whole()


def old_archive(**documents: Any) -> bytes:
    """An archive as Docker before 1.10 wrote it, with an image `one` and `two` made from it."""
    one = {"id": "one", "created": "2014-01-01T00:00:00Z", "container_config": {"Cmd": ["/bin/sh", "x"]},
           "config": {"Env": ["A=1"]}, "architecture": "amd64", "os": "linux", "Size": 5}
    two = {**one, "id": "two", "parent": "one", "author": "me", "docker_version": "1.2.0"}
    return tar_of({"two/json": json.dumps({**two, **documents.get("two", {})}).encode(),
                   "two/layer.tar": file_tar("two"),
                   "one/json": json.dumps({**one, **documents.get("one", {})}).encode(),
                   "one/layer.tar": file_tar("one"), "one/VERSION": b"1.0",
                   "repositories": json.dumps(documents.get("repositories", {"old": {"1": "two"}})).encode()})


def test_archives_of_docker_before_1_10(tmp_path: Path, peer: Host) -> None:
    rig = ImageRig(str(tmp_path), "overlay2")
    rig.run("load", stdin=old_archive())
    made = rig.images.resolve("old:1")
    assert len(made.chain_ids) == 2 and rig.images.resolve(made.parent).chain_ids == made.chain_ids[:1]
    peer.http("POST", "/images/load", old_archive(), {"Content-Type": "application/x-tar"})
    assert peer.api("GET", "/images/old:1/json")["Id"] == made.id
    peer.api("DELETE", "/images/old:1")


def hostile_archives() -> dict[str, tuple[bytes, str]]:
    """Archives that must not be loaded, and what is said of them."""
    config = dockerd.docker_json({"os": "linux", "rootfs": {"type": "layers", "diff_ids": [
        sha256(file_tar())]}})

    def manifest(**changes: Any) -> bytes:
        item = {"Config": "c.json", "RepoTags": ["x:1"], "Layers": ["l"], **changes.pop("item", {})}
        return tar_of({"manifest.json": json.dumps(changes.pop("items", [item])).encode(), "c.json": config,
                       "l": file_tar(), **changes})

    odd = {f"{key} {value}": (manifest(**{"c.json": config.replace(
        b"{", dockerd.docker_json({"config": {key: value}})[:-1] + b",", 1)}), f"its {key} is of")
        for key, value in (("Labels", {"a": 1}), ("Labels", [1]), ("Env", {"a": "b"}), ("Env", ["a", 1]),
                           ("Volumes", ["/a"]), ("ExposedPorts", ["80"]), ("Healthcheck", 5), ("User", 5),
                           ("Cmd", [["a"]]))}
    loop = {name: dockerd.docker_json({"os": name, "rootfs": {"type": "layers"}}) for name in ("", "linux")}
    ids = {name: sha256(data) for name, data in loop.items()}
    index = {"manifests": [{"mediaType": MANIFEST, "digest": "sha256:" + "1" * 64, "size": 2}]}
    return {
        **odd,
        "nothing": (tar_of({}), "the archive has no images"),
        "no tar": (b"x" * 2000, "archive/tar: invalid tar header"),
        "cut off": (manifest()[:1300], "unexpected EOF"),
        "no manifest": (tar_of({"manifest.json": b"{"}), "manifest.json is no JSON"),
        "another shape": (tar_of({"manifest.json": b"[7]"}), "invalid archive of images"),
        "deep JSON": (tar_of({"manifest.json": b"[" * 100000}), "manifest.json is no JSON"),
        "much JSON": (tar_of({"manifest.json": bytes(17 << 20)}), "is larger than"),
        "outside": (manifest(item={"Config": "../../etc/passwd"}), "open ../../etc/passwd: no such"),
        "link outside": (manifest(item={"Config": "p"}, p=link_entry("p", "/etc/passwd")), "open p: no such"),
        "link loop": (manifest(item={"Config": "p"}, p=link_entry("p", "p")), "open p: no such"),
        "no config": (manifest(item={"Config": "nosuch"}), "open nosuch: no such"),
        "no layer": (manifest(item={"Layers": ["nosuch"]}), "open nosuch: no such"),
        "too few layers": (manifest(item={"Layers": []}), "layers length mismatch: expected 0, got 1"),
        "another layer": (manifest(l=file_tar("other")), "invalid diffID for layer 0: expected"),
        "hostile layer": (manifest(l=tar_of({"../x": b""})), 'invalid entry name "../x"'),
        "no rootfs": (manifest(**{"c.json": b"{}"}), "no RootFS key"),
        "windows": (manifest(**{"c.json": config.replace(b"linux", b"windows")}), "cannot load windows"),
        "digest for a tag": (manifest(item={"RepoTags": ["x@sha256:" + "0" * 64]}), 'invalid tag "x@sha256'),
        "no reference": (manifest(item={"RepoTags": ["X:1"]}), "must be lowercase"),
        "parents in a loop": (manifest(items=[
            {"Config": f"{name}.json", "Parent": ids["" if name else "linux"]} for name in loop],
            **{f"{name}.json": data for name, data in loop.items()}), "is not a valid parent for"),
        "another digest": (tar_of({"index.json": json.dumps(index).encode(),
                                   "blobs/sha256/" + "1" * 64: b"{}"}), "does not have its digest"),
        "old parents in a loop": (old_archive(one={"parent": "two"}), "are not in the archive"),
        "old parent with slashes": (old_archive(one={"parent": "../../etc"}), "are not in the archive"),
        "old tag with slashes": (old_archive(repositories={"x": {"1": "../one"}}), "target ID: ../one"),
        "old tag of nothing": (old_archive(repositories={"x": {"1": "three"}}), "invalid target ID: three"),
    }


@pytest.mark.parametrize("name", sorted(hostile_archives()))
def test_hostile_archives_of_images(tmp_path: Path, name: str) -> None:
    archive, text = hostile_archives()[name]
    rig = ImageRig(str(tmp_path), "overlay2")
    assert text in rig.refused(400, "load", stdin=archive)
    for image in rig.run("images", all=True):  # whole ones that came before their refused tag or parent
        rig.run("image_delete", image["Id"], force=True)
    rig.assert_whole()


def test_a_loaded_tag_moves(tmp_path: Path) -> None:
    rig = ImageRig(str(tmp_path), "overlay2")
    two_images(rig)
    archive, before = saved(rig, "a:1"), rig.images.resolve("b:1")
    rig.run("tag", "b:1", "a", "1")
    job, out = rig.engine.job("load", quiet=True), io.BytesIO()
    job.stdin = io.BytesIO(archive)
    job.stdout.add(out)
    job.run()
    assert [json.loads(line)["stream"] for line in out.getvalue().splitlines()] == [
        f"The image a:1 already exists, renaming the old one with ID {before.id} to empty string\n",
        "Loaded image: a:1\n"]


def test_the_image_jobs_of_docker_1_2_0(tmp_path: Path) -> None:
    rig = ImageRig(str(tmp_path), "overlay2")
    ids = two_images(rig)
    facts = rig.run("image_get", "b:1")
    assert facts.items() >= {"Id": ids[1], "Parent": ids[0], "Os": "linux", "Author": ""}.items()
    assert rig.run("image_get", "nosuch") == {}
    assert rig.refused(400, "image_set", "x") == "mandatory key 'json' is not set"
    made = rig.run("image_set", "x", stdin=file_tar("three"), json=json.dumps(
        {"id": "x", "parent": ids[0][7:], "author": "me", "os": "linux"}))["Id"]
    assert rig.run("image_get", made).items() >= {"Parent": ids[0], "Author": "me"}.items()
    assert rig.images.resolve(made).chain_ids[:-1] == rig.images.resolve("a:1").chain_ids
    empty = rig.run("image_set", "y", json='{"id": "y", "os": "linux"}')["Id"]
    assert rig.images.resolve(empty).chain_ids == []
    out = io.BytesIO()
    job = rig.engine.job("image_tarlayer", made)
    job.stdout.add(out)
    job.run()
    assert out.getvalue() == file_tar("three")
    out = io.BytesIO()
    job = rig.engine.job("viz")
    job.stdout.add(out)
    job.run()
    graph, short = out.getvalue().decode(), [image[7:19] for image in ids]
    assert graph.startswith("digraph docker {\n") and graph.endswith(" base [style=invisible]\n}\n")
    assert f' "{short[0]}" -> "{short[1]}"\n' in graph and f' base -> "{short[0]}" [style=invis]\n' in graph
    assert f'[label="{short[0]}\\na:1\\na:2",shape=box' in graph


def test_archives_that_grow_in_memory(tmp_path: Path) -> None:
    """A configuration that is named again and again, and a chain of directories that no image can be."""
    rig = ImageRig(str(tmp_path), "overlay2")
    items = [{"Config": "config", "Layers": []}] * 200
    archive = tar_of({"config": b" " * (2 << 20), "manifest.json": json.dumps(items).encode()})
    assert "take more than" in rig.refused(400, "load", stdin=archive)
    chain = {f"{number:03}/{name}": data for number in range(200) for name, data in (
        ("json", json.dumps({"parent": f"{number - 1:03}" if number else ""}).encode()),
        ("layer.tar", bytes(1024)))}
    assert rig.refused(400, "load", stdin=tar_of(dict(reversed(chain.items())))) == "max depth exceeded"
    rig.assert_whole()


@pytest.mark.parametrize("way", ["to the peer", "from the peer"])
def test_archives_between_daemons(docker: Docker, host: Host, peer: Host, tmp_path: Path, way: str) -> None:
    """Through the CLI, with an image that was committed."""
    theirs, shown = Docker(f"{PEER}/usr/bin/docker", peer), "{{.Id}} {{.RootFS}} {{.Config.Cmd}}"
    first, second = (docker, theirs) if way == "to the peer" else (theirs, docker)
    first("run", "--network=none", "--name=made", "busybox", "sh", "-c", "echo x >/new; rm /etc/plain")
    first("commit", "-c", "CMD ls /etc/plain; cat /new", "made", "made:it")
    first("rm", "made")
    first("save", "-o", str(tmp_path / "archive"), "made:it")
    known = first("inspect", "-f", shown, "made:it")
    assert second("load", "-i", str(tmp_path / "archive")) == "Loaded image: made:it"
    assert second("inspect", "-f", shown, "made:it") == known
    assert second("run", "--rm", "--network=none", "made:it") == "x"
    for each in (first, second):
        each("rmi", "made:it")


def test_archives_of_and_for_podman_skopeo_and_umoci(registries: Registries) -> None:
    host, at = registries.host, registries.host.path
    image = host.api("GET", "/images/busybox/json")
    Path(at("ours")).write_bytes(host.http("GET", f"{API}/images/busybox/get").body)
    ours, layout = at("ours"), at("layout")
    registries.run("skopeo", "copy", f"docker-archive:{ours}", f"docker-archive:{at('skopeo')}:skopeo:1")
    registries.run("skopeo", "copy", f"docker-archive:{ours}", f"oci-archive:{at('skopeo-oci')}:skopeo:oci")
    registries.run("skopeo", "copy", f"oci-archive:{ours}:latest", f"oci:{layout}:latest")
    registries.run("umoci", "config", "--image", layout + ":latest", "--config.workingdir=/tmp", "--tag=u")
    podman, name = podman_of(host), "docker.io/library/busybox"
    assert "busybox" in registries.run(*podman, "load", "-i", ours)
    registries.run(*podman, "save", "-o", at("podman"), name)
    registries.run(*podman, "save", "--format=oci-archive", "-o", at("podman-oci"), name)
    for name in ("skopeo", "podman", "skopeo-oci", "podman-oci"):
        answer = host.http("POST", f"{API}/images/load", Path(at(name)).read_bytes())
        assert answer.lines[-1]["stream"].startswith("Loaded image: "), (name, answer.body)
    assert [host.api("GET", f"/images/{name}/json")["Id"] == image["Id"]
            for name in ("skopeo:1", "busybox", "skopeo:oci")] == [True, True, False]  # OCI's is written anew
    archive = subprocess.run(["tar", "-C", layout, "-c", "."], stdout=subprocess.PIPE).stdout
    answer = host.http("POST", f"{API}/images/load", archive)
    made = [line["stream"].split()[-1] for line in answer.lines]
    assert len(made) == 2 and all(re.fullmatch("sha256:[0-9a-f]{64}", each) for each in made), answer.body
    assert sorted(host.run("pwd", image=each) for each in made) == [(0, b"/\n"), (0, b"/tmp\n")]
    assert all(host.api("GET", f"/images/{each}/json")["RootFS"] == image["RootFS"] for each in made)


# ------------------------------------------------------------------------------------------------------------
# Options
#
# Pure: the table, the values, the command line in Docker 1.2.0's and in today's spelling, daemon.json, what
# is refused and why, and what is made from the table.  The expected texts are dockerd 20.10's.
# ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def configure(tmp_path, monkeypatch):
    """configure(*flags, json=...) parses them with a daemon.json of the test's own."""
    for name in ("DOCKER_CERT_PATH", "DOCKER_CONFIG", "DOCKER_TLS_VERIFY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(dockerd, "DEFAULT_CONFIG_FILE", str(tmp_path / "none.json"))

    def parse(*flags, **file):
        if "json" in file:
            text = file["json"] if isinstance(file["json"], str) else json.dumps(file["json"])
            (tmp_path / "daemon.json").write_text(text, encoding="utf-8")
            flags = (*flags, "--config-file", str(tmp_path / "daemon.json"))
        return dockerd.parse_options(list(flags))
    return parse


def failure(error, call, *arguments, **keywords):
    """The text of the `error` that the call raises; it is one line."""
    with pytest.raises(error) as caught:
        call(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("text, seconds", [
    ("0", 0), ("+5s", 5), ("1h2m3s", 3723), ("1.5h", 5400), ("-300ms", -0.3), (".5s", 0.5), ("1us", 1e-6),
    ("2ns", 2e-9),
    ("1\u00b5s", 1e-6), ("1m30s", 90)])
def test_durations_as_go_reads_them(text, seconds):
    assert dockerd.parse_duration(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text, fault", [
    ("", 'invalid duration ""'), ("5", 'missing unit in duration "5"'),
    ("5x", 'unknown unit "x" in duration "5x"'),
    ("s", "invalid duration"), ("-", "invalid duration"), ("1h-5m", "invalid duration"),
    ("1 s", "invalid duration")])
def test_bad_durations(text, fault):
    assert fault in failure(dockerd.BadParameter, dockerd.parse_duration, text)


@pytest.mark.parametrize("text, size", [
    ("0", 0), ("64M", 64 << 20), ("64mb", 64 << 20), ("64MiB", 64 << 20), ("1.5g", 3 << 29), ("32 k", 32768),
    ("7b", 7),
    ("1t", 1 << 40), ("1P", 1 << 50), ("100", 100)])
def test_sizes_as_go_units_reads_them(text, size):
    assert dockerd.parse_size(text) == size


@pytest.mark.parametrize("text",
                         ["", "M", "x", "-1", "1x", "1mib b", "1ki", "1bb", "1e400m", "\u0661m", "1  k"])
def test_bad_sizes(text):
    assert "invalid s" in failure(dockerd.BadParameter, dockerd.parse_size, text)


@pytest.mark.parametrize("text", ["9" * 400, "8" * 25, "9999999999g"])
def test_sizes_that_no_number_holds(text):
    assert "value out of range" in failure(dockerd.BadParameter, dockerd.parse_size, text)


def test_booleans_as_go_reads_them():
    assert all(dockerd.parse_bool(text) for text in ("1", "t", "T", "TRUE", "true", "True"))
    assert not any(dockerd.parse_bool(text) for text in ("0", "f", "F", "FALSE", "false", "False"))
    for text in ("", "yes", "tRUE", "2"):
        assert f'parsing "{text}"' in failure(dockerd.BadParameter, dockerd.parse_bool, text)


def test_ulimits():
    assert dockerd.parse_ulimit("nofile=1024:2048") == {"Name": "nofile", "Soft": 1024, "Hard": 2048}
    assert dockerd.parse_ulimit("core=-1") == {"Name": "core", "Soft": -1, "Hard": -1}
    assert dockerd.parse_ulimit("nproc=5:-1")["Hard"] == -1
    for text, fault in (("nofile", "invalid ulimit argument"), ("as=1", "invalid ulimit type: as"),
                        ("core=1:2:3", "too many"),
                        ("nofile=2:1", "2 > 1"), ("nofile=-1:1", "soft: -1"), ("nofile=x", "ParseInt")):
        assert fault in failure(dockerd.BadParameter, dockerd.parse_ulimit, text)


@pytest.mark.parametrize("host, normal", [
    ("", "unix:///var/run/docker.sock"), ("unix://", "unix:///var/run/docker.sock"),
    ("unix:///tmp/x", "unix:///tmp/x"),
    ("tcp://", "tcp://localhost:2375"), ("tcp://:7", "tcp://localhost:7"),
    ("0.0.0.0:2376", "tcp://0.0.0.0:2376"),
    ("tcp://[::1]:5", "tcp://[::1]:5"), ("fd://", "fd://"), ("fd://*", "fd://*"), ("fd://3", "fd://3")])
def test_hosts(configure, host, normal):
    assert configure("-H", host).hosts == [normal]


@pytest.mark.parametrize("host, fault", [
    ("bad://x", "unsupported proto 'bad'"), ("tcp://h:0", "invalid port: 0"),
    ("tcp://h:99999", "invalid port"),
    ("tcp://h:1/v1", "should not contain a path element"), ("unix://tcp://x", "invalid unix address"),
    ("tcp://h:x", "expected")])
def test_bad_hosts(configure, host, fault):
    text = failure(dockerd.UsageError, configure, "--host", host)
    assert text.startswith(f'invalid argument "{host}" for "-H, --host" flag: invalid bind address ({host})')
    assert fault in text


# The table


def test_every_flag_and_key_stands_once_in_the_table():
    flags = [flag.lstrip("#") for option in dockerd.OPTIONS for flag in option.flags.split()]
    keys = [key for option in dockerd.OPTIONS for key in option.key.split()]
    assert len(flags) == len(set(flags)) and len(keys) == len(set(keys))
    for option in dockerd.OPTIONS:
        assert option.kind in dockerd.KINDS and option.help
        assert option.status[0] in ("served", "ignored", "refused", "unlanded")
        assert option.status[0] == "served" or option.status[1], f"{option.name} has no reason"


def test_every_option_that_is_served_is_looked_at():
    """But for two that have done their work when they are parsed: the logs have neither colours nor short
    times."""
    source = read_text(PROGRAM)
    unread = [option.name for option in dockerd.OPTIONS if option.status[0] == "served"
              and not re.search(rf'\.{option.attribute}\b|"{option.attribute}"', source)]
    assert unread == ["config-file", "raw-logs"]


FLAGS_OF_1_2_0 = """
-v --version -d --daemon -D --debug -G --group --api-enable-cors --tls --tlsverify --tlscacert --tlscert
--tlskey -H --host -p --pidfile -g --graph -r --restart --iptables --ip-forward --ip-masq --bip -b
--bridge --fixed-cidr --icc -s --storage-driver -e --exec-driver --selinux-enabled --mtu --ip
--storage-opt --dns --dns-search --registry-mirror
""".split()
FLAGS_OF_DOCKERD = """
add-runtime allow-direct-routing allow-nondistributable-artifacts api-cors-header authorization-plugin bip
bip6 bridge bridge-accept-fwmark cdi-spec-dir cgroup-parent cluster-advertise cluster-store
cluster-store-opt config-file containerd containerd-namespace containerd-plugins-namespace cpu-rt-period
cpu-rt-runtime cri-containerd data-root debug default-address-pool default-cgroupns-mode default-gateway
default-gateway-v6 default-ipc-mode default-network-opt default-runtime default-shm-size default-ulimit
dns dns-opt dns-search exec-opt exec-root experimental feature firewall-backend fixed-cidr fixed-cidr-v6
graph group help host host-gateway-ip http-proxy https-proxy icc init init-path insecure-registry ip
ip-forward ip-forward-no-drop ip-masq ip6tables iptables ipv6 label live-restore log-driver log-format
log-level log-opt max-concurrent-downloads max-concurrent-uploads max-download-attempts metrics-addr mtu
network-control-plane-mtu network-diagnostic-port no-new-privileges no-proxy node-generic-resource
oom-score-adjust pidfile raw-logs registry-mirror restart rootless seccomp-profile selinux-enabled
shutdown-timeout storage-driver storage-opt swarm-default-advertise-addr tls tlscacert tlscert tlskey
tlsverify userland-proxy userland-proxy-path userns-remap validate version
""".split()
KEYS_OF_DOCKERD = """
allow-direct-routing allow-nondistributable-artifacts api-cors-header authorization-plugins bip bip6
bridge builder cdi-spec-dirs cgroup-parent cluster-advertise cluster-store cluster-store-opts containerd
containerd-namespace containerd-plugin-namespace cpu-rt-period cpu-rt-runtime cri-containerd data-root
debug default-address-pools default-cgroupns-mode default-gateway default-gateway-v6 default-ipc-mode
default-network-opts default-runtime default-shm-size default-ulimits deprecated-key-path dns dns-opts
dns-search exec-opts exec-root experimental features fixed-cidr fixed-cidr-v6 graph group host-gateway-ip
host-gateway-ips hosts http-proxy https-proxy icc init init-path insecure-registries ip ip-forward
ip-forward-no-drop ip-masq ip6tables iptables ipv6 labels live-restore log-driver log-format log-level
log-opts max-concurrent-downloads max-concurrent-uploads max-download-attempts metrics-addr mtu
network-control-plane-mtu network-diagnostic-port no-new-privileges no-proxy node-generic-resources
oom-score-adjust pidfile raw-logs registry-mirrors rootless runtimes seccomp-profile selinux-enabled
shutdown-timeout storage-driver storage-opts swarm-default-advertise-addr swarm-raft-election-tick
swarm-raft-heartbeat-tick tls tlscacert tlscert tlskey tlsverify userland-proxy userland-proxy-path
userns-remap
""".split()


def test_flags_of_docker_1_2_0_and_of_dockerd_20_10_to_28_are_known():
    known = {flag.lstrip("#") for option in dockerd.OPTIONS for flag in option.flags.split()}
    assert set(FLAGS_OF_1_2_0) <= known
    assert {"--" + flag for flag in FLAGS_OF_DOCKERD} <= known


def test_daemon_json_keys_of_dockerd_20_10_to_28_are_known(configure):
    known = {key for option in dockerd.OPTIONS if option.in_file for key in option.key.split()}
    assert set(KEYS_OF_DOCKERD) <= known
    for key in KEYS_OF_DOCKERD:
        configure(json={key: None})


def test_an_option_set_to_its_default_is_never_refused(configure):
    for option in dockerd.OPTIONS:
        if option.in_file and option.kind != "size":
            config = configure(json={option.name: option.empty})
            assert not config.warnings, option.name


def test_reload_list_is_that_of_dockerd():
    assert {"debug", "labels", "live-restore", "shutdown-timeout", "registry-mirrors", "insecure-registries",
            "max-concurrent-downloads", "max-concurrent-uploads", "max-download-attempts", "default-runtime",
            "runtimes",
            "default-shm-size", "features", "authorization-plugins"} <= dockerd.RELOADABLE
    assert not {"hosts", "data-root", "storage-driver", "group", "tls"} & dockerd.RELOADABLE


# The command line


def test_defaults(configure):
    config = configure()
    assert config.hosts == ["unix:///var/run/docker.sock"] and config.group == "docker"
    assert (config.data_root, config.exec_root) == ("/var/lib/docker", "/var/run/docker")
    assert config.pidfile == "/var/run/docker.pid"
    assert (config.exec_driver, config.log_driver) == ("native", "json-file")
    assert config.daemon and config.icc and config.iptables and not config.tls and not config.debug
    assert config.tlscacert == os.path.expanduser("~/.docker/ca.pem") and config.seccomp_profile == "builtin"
    assert config.default_shm_size == 64 << 20 and config.shutdown_timeout == 15 and not config.warnings


@pytest.mark.parametrize("flags", [["-d"], ["-d=true"], ["--daemon=true"], ["--daemon"], []])
def test_daemon_mode_in_every_spelling(configure, flags):
    assert configure(*flags).daemon


@pytest.mark.parametrize("flags, attribute, value", [
    (["-D"], "debug", True), (["--debug"], "debug", True), (["-D=0"], "debug", False),
    (["-dD"], "debug", True),
    (["-G", "adm"], "group", "adm"), (["--group="], "group", ""), (["-p/x.pid"], "pidfile", "/x.pid"),
    (["-g", "/g"], "data_root", "/g"), (["--graph=/g"], "data_root", "/g"),
    (["--data-root", "/g"], "data_root", "/g"),
    (["-s", "vfs"], "storage_driver", "vfs"), (["-l=debug"], "log_level", "debug"),
    (["-Dlerror"], "log_level", "error"),
    (["--icc=false"], "icc", False), (["-b", "none"], "bridge", "none"), (["--mtu", "1400"], "mtu", 1400),
    (["--dns", "8.8.8.8", "--dns=2001:DB8::1"], "dns", ["8.8.8.8", "2001:db8::1"]),
    (["--ip=127.0.0.1"], "ip", "127.0.0.1"),
    (["--dns-search", "example.com."], "dns_search", ["example.com"]),
    (["--dns-search=."], "dns_search", ["."]),
    (["--storage-opt", "a=b", "--storage-opt=c=d"], "storage_opts", ["a=b", "c=d"]),
    (["--log-opt", "max-size=1m", "--log-opt", "max-file=3"], "log_opts",
     {"max-size": "1m", "max-file": "3"}),
    (["--default-ulimit=nofile=1:2"], "default_ulimits",
     {"nofile": {"Name": "nofile", "Soft": 1, "Hard": 2}}),
    (["--default-shm-size", "1g"], "default_shm_size", 1 << 30),
    (["--registry-mirror=http://m"], "registry_mirrors", ["http://m/"]),
    (["--insecure-registry=http://r:5000"], "insecure_registries", ["r:5000"]),
    (["--label=\"a=b\""], "labels", ["a=b"]),
    (["-H", "fd://", "-H", "tcp://h:1", "-H=fd://"], "hosts", ["fd://", "tcp://h:1"]),
    (["--default-address-pool", "base=10.0.0.0/8,size=24"], "default_address_pools",
     [{"base": "10.0.0.0/8", "size": 24}]),
    (["--default-network-opt", "bridge=a=1", "--default-network-opt=bridge=b=2"], "default_network_opts",
     {"bridge": {"a": "1", "b": "2"}}),
    (["--feature", "cdi", "--feature=buildkit=false"], "features", {"cdi": True, "buildkit": False}),
    (["--exec-opt", "native.cgroupdriver=cgroupfs"], "exec_opts", ["native.cgroupdriver=cgroupfs"]),
    (["--seccomp-profile="], "seccomp_profile", "builtin"), (["-D", "--"], "debug", True)])
def test_flags(configure, flags, attribute, value):
    assert getattr(configure(*flags), attribute) == value


@pytest.mark.parametrize("flag, line", [
    ("-iptables=false",
     "Warning: '-iptables' is deprecated, it will be replaced by '--iptables' soon. See usage."),
    ("-bip=10.0.0.1/8", "Warning: '-bip' is deprecated, it will be replaced by '--bip' soon. See usage."),
    ("-icc", "Warning: '-icc' is deprecated, it will be replaced by '--icc' soon. See usage."),
    ("-r", "Warning: '-r' is deprecated, it will be removed soon. See usage."),
    ("--restart", "Warning: '--restart' is deprecated, it will be removed soon. See usage.")])
def test_deprecated_spellings_work_with_docker_s_line(configure, flag, line):
    assert configure(flag).warnings[0] == line


@pytest.mark.parametrize("flags, text", [
    (["--bogus"], "unknown flag: --bogus"), (["-x"], "unknown shorthand flag: 'x' in -x"),
    (["-Dx"], "unknown shorthand flag: 'x' in -x"), (["--label"], "flag needs an argument: --label"),
    (["--debug=maybe"],
     'invalid argument "maybe" for "-D, --debug" flag: strconv.ParseBool: parsing "maybe": invalid syntax'),
    (["--mtu", "x"], 'invalid argument "x" for "--mtu" flag: strconv.ParseInt: parsing "x": invalid syntax'),
    (["--dns", "foo"], 'invalid argument "foo" for "--dns" flag: foo is not an ip address'),
    (["--dns-search=*"], 'invalid argument "*" for "--dns-search" flag: * is not a valid domain'),
    (["--label", "a"], 'invalid argument "a" for "--label" flag: bad attribute format: a'),
    (["--default-shm-size=x"], "invalid argument \"x\" for \"--default-shm-size\" flag: invalid size: 'x'"),
    (["--log-level=foo"], 'invalid argument "foo" for "-l, --log-level" flag: invalid logging level: foo'),
    (["--default-address-pool=foo"],
     'invalid argument "foo" for "--default-address-pool" flag: '
     "invalid field 'foo' must be a key=value pair"),
    (["--add-runtime=foo"], 'invalid argument "foo" for "--add-runtime" flag: invalid runtime argument: foo'),
    (["--add-runtime=runc=/x"],
     'invalid argument "runc=/x" for "--add-runtime" flag: runtime name \'runc\' is reserved')])
def test_command_lines_refused_in_dockerd_s_words(configure, flags, text):
    assert failure(dockerd.UsageError, configure, *flags) == text


@pytest.mark.parametrize("flags", [
    ["-d=false"], ["-e", "lxc"], ["--log-driver=splunk"], ["--exec-opt=native.cgroupdriver=none"],
    ["--exec-opt=x"],
    ["--default-ipc-mode=host"], ["--default-cgroupns-mode=x"], ["--registry-mirror=foo"],
    ["--registry-mirror=ftp://x"],
    ["--registry-mirror=http://u:p@x/"], ["--registry-mirror=http://x/?q"], ["--label=com.docker.x=1"],
    ["--mtu=-1"],
    ["--default-address-pool=base=10.0.0.0/24,size=8"], ["--firewall-backend=pf"],
    ["--default-network-opt=x"]])
def test_bad_values_on_the_command_line(configure, flags):
    assert failure(dockerd.UsageError, configure, *flags).startswith("invalid argument ")


@pytest.mark.parametrize("flags", [["foo"], ["-D", "foo", "-d"], ["--", "foo"], ["-d", "true"], [""]])
def test_a_left_over_argument(configure, flags):
    assert failure(dockerd.LeftoverArgument, configure, *flags) == '"dockerd" accepts no argument(s).'


def test_no_credentials_of_a_mirror_in_the_error(configure):
    text = failure(dockerd.ConfigError, configure, json={"registry-mirrors": ["http://user:secret@x/"]})
    assert "registry-mirrors" in text and "secret" not in text


def test_tls_verifies_unless_told_not_to(configure, monkeypatch):
    def seen(*flags, **file):
        config = configure(*flags, **file)
        return config.tls, config.tlsverify
    assert seen("--tls") == seen("--tlsverify") == seen(json={"tls": True}) == (True, True)
    for unverified in (seen("--tlsverify=false"), seen("--tls", "--tlsverify=false"),
                       seen(json={"tlsverify": False})):
        assert unverified == (True, False)
    assert seen("--tls=false") == (False, False)
    monkeypatch.setenv("DOCKER_TLS_VERIFY", "1")
    monkeypatch.setenv("DOCKER_CERT_PATH", "/certs")
    assert seen() == (True, True)
    assert configure("--tlskey=/k").tlskey == "/k" and configure().tlscert == "/certs/cert.pem"


def test_docker_host_is_not_the_daemon_s(configure, monkeypatch):
    monkeypatch.setenv("DOCKER_HOST", "tcp://elsewhere:1")
    assert configure().hosts == ["unix:///var/run/docker.sock"]


# What is refused, and what is said of the rest


@pytest.mark.parametrize("key, value", [
    ("authorization-plugins", ["x"]), ("api-cors-header", "*"),
    ("metrics-addr", "127.0.0.1:1"), ("rootless", True), ("cluster-store", "etcd://x")])
def test_options_that_must_not_be_ignored_are_refused(configure, key, value):
    assert failure(dockerd.ConfigError, configure, json={key: value}).startswith(f"{key} in /")
    attribute = key.replace("-", "_")
    assert "is refused: " in failure(dockerd.ConfigError, dockerd.Config, **{attribute: value})


def test_an_authorization_plugin_is_refused_as_a_flag(configure):
    text = failure(dockerd.ConfigError, configure, "--authorization-plugin", "guard")
    assert text.startswith("--authorization-plugin is refused: ")


def test_what_has_no_effect_is_said_once(configure):
    config = configure("--oom-score-adjust=5", "--containerd=/run/x.sock",
                       json={"network-control-plane-mtu": 1400})
    assert [line.partition(" has no effect: ")[0].partition(" in ")[0] for line in config.warnings] == [
        "--oom-score-adjust", "--containerd", "network-control-plane-mtu"]
    assert not configure("--bridge=none", "--iptables").warnings


# daemon.json


@pytest.mark.parametrize("document, text", [
    ({"nope": 1, "aa": 2}, "the following directives don't match any configuration option: nope, aa"),
    ({"host": "x"}, "the following directives don't match any configuration option: host"),
    ({"config-file": "x"}, "the following directives don't match any configuration option: config-file"),
    ({"debug": "yes"}, "json: cannot unmarshal string into Go struct field Config.debug of type bool"),
    ({"hosts": "x"}, "json: cannot unmarshal string into Go struct field Config.hosts of type []string"),
    ({"labels": [1]}, "json: cannot unmarshal number into Go struct field Config.labels of type string"),
    ({"mtu": "x"}, "json: cannot unmarshal string into Go struct field Config.mtu of type int"),
    ({"mtu": True}, "json: cannot unmarshal bool into Go struct field Config.mtu of type int"),
    ({"mtu": 1.5}, "json: cannot unmarshal number into Go struct field Config.mtu of type int"),
    ({"log-driver": 1},
     "json: cannot unmarshal number into Go struct field Config.log-driver of type string"),
    ({"log-opts": {"max-size": 1}},
     "json: cannot unmarshal number into Go struct field Config.log-opts of type string"),
    ({"log-opts": []},
     "json: cannot unmarshal array into Go struct field Config.log-opts of type map[string]string"),
    ([], "json: cannot unmarshal array into Go value of type map[string]interface {}"),
    ({"labels": ["a"]}, "configuration validation from file failed: labels: bad attribute format: a"),
    ({"dns": ["1.2.3.400"]},
     "configuration validation from file failed: dns: 1.2.3.400 is not an ip address"),
    ({"data-root": "/a", "graph": "/b"}, "graph and data-root must not both be specified in the config file"),
    ("{bad", "Expecting property name enclosed in double quotes: line 1 column 2 (char 1)")])
def test_a_wrong_daemon_json_is_told_in_one_line(configure, tmp_path, document, text):
    prefix = f"unable to configure the Docker daemon with file {tmp_path}/daemon.json: "
    assert failure(dockerd.ConfigError, configure, json=document) == prefix + text


@pytest.mark.parametrize("document", [
    {"default-ulimits": {"nofile": {"Hard": 1, "Soft": 2}}}, {"default-ulimits": {"nofile": {"Soft": "x"}}},
    {"default-address-pools": [{"base": 5}]}, {"default-address-pools": [{"base": "10.0.0.0/8", "size": 99}]},
    {"default-shm-size": 5}, {"proxies": 1}, "[" * 100000, "\xff", '{"debug": tru}', {"hosts": ["bad://x"]}])
def test_other_wrong_documents(configure, document):
    failure(dockerd.ConfigError, configure, json=document)


def test_a_key_that_is_also_a_flag(configure):
    text = failure(dockerd.ConfigError, configure, "-H", "unix:///tmp/y.sock",
                   json={"hosts": ["unix:///tmp/x.sock"]})
    assert text.endswith(": the following directives are specified both as a flag and in the configuration "
                         "file: hosts: (from flag: [unix:///tmp/y.sock], from file: [unix:///tmp/x.sock])")
    text = failure(dockerd.ConfigError, configure, "-D", "--storage-opt", "y",
                   json={"storage-opts": ["x"], "debug": True})
    assert text.endswith(": debug: (from flag: true, from file: true), "
                         "storage-opts: (from flag: [y], from file: [x])")
    text = failure(dockerd.ConfigError, configure, "--http-proxy=http://a:secret@p",
                   json={"http-proxy": "http://b:secret@q"})
    assert "secret" not in text


def test_values_from_daemon_json(configure):
    config = configure(json={
        "debug": True, "icc": False, "graph": "/g", "hosts": ["fd://"], "default-shm-size": "1G",
        "log-opts": {"a": "b"},
        "default-ulimits": {"nofile": {"name": "nofile", "hard": 2, "soft": 1}},
        "host-gateway-ip": "10.0.0.1",
        "proxies": {"http-proxy": "http://p"}, "labels": ["a=b", "a=b"], "tlskey": "/k"})
    assert config.debug and config.data_root == "/g" and config.hosts == ["fd://"] and config.icc is False
    assert config.default_shm_size == 1 << 30 and config.log_opts == {"a": "b"}
    assert config.http_proxy == "http://p"
    assert config.default_ulimits == {"nofile": {"Name": "nofile", "Hard": 2, "Soft": 1}}
    assert config.host_gateway_ips == ["10.0.0.1"] and config.labels == ["a=b"] and config.tlskey == "/k"
    assert config.given["debug"].startswith("debug in /") and "group" not in config.given


def test_labels_that_disagree(configure):
    text = failure(dockerd.ConfigError, configure, "--label=a=1", "--label=a=2")
    assert text == "conflict labels for a=2 and a=1"


def test_a_missing_default_file_is_fine_and_a_missing_explicit_one_is_not(configure):
    configure("--validate")
    assert failure(dockerd.ConfigError, configure, "--config-file", "/nope/daemon.json") == (
        "unable to configure the Docker daemon with file /nope/daemon.json: "
        "open /nope/daemon.json: no such file or directory")
    assert "is a directory" in failure(dockerd.ConfigError, configure, "--config-file", "/")


def test_an_empty_file_and_a_byte_order_mark(configure):
    assert configure(json="").hosts and configure(json=" \n").hosts
    assert configure(json='\ufeff{"debug": true}').debug


def test_reload_reads_the_file_again(configure, tmp_path):
    config = configure("--label=a=b", json={"debug": True, "group": "adm"})
    (tmp_path / "daemon.json").write_text('{"debug": false, "group": "root", "shutdown-timeout": 30}')
    assert dockerd.changed_options(config) == {"debug": False, "shutdown_timeout": 30}
    (tmp_path / "daemon.json").write_text('{"live-restore": true, "authorization-plugins": ["x"]}')
    failure(dockerd.ConfigError, dockerd.changed_options, config)


def test_configurations_of_embedding_programs():
    config = dockerd.Config(data_root="/x", debug=True)
    assert config.data_root == "/x" and config.group == "docker"
    assert config.given == {"data-root": "data_root", "debug": "debug"}
    config.hosts.append("fd://")
    assert dockerd.Config().hosts == ["unix:///var/run/docker.sock"]
    failure(dockerd.ConfigError, dockerd.Config, no_such=1)
    with pytest.raises(AttributeError):
        config.no_such  # noqa: B018


# What is made from the table


def test_help_names_every_flag(capsys):
    assert dockerd.answer_at_once(dockerd.parse_options(["--help", "--config-file=/nope"]))
    text = capsys.readouterr().out
    assert text.startswith("Usage:  dockerd.py [OPTIONS]\n")
    for option in dockerd.OPTIONS:
        assert all(re.search(rf"(^|\s){re.escape(flag)}\b", text) for flag in option.spellings), option.name
    assert max(map(len, text.splitlines())) <= 110 and "--restart" not in text.split()


def test_version_print_and_validate(configure, capsys):
    assert dockerd.answer_at_once(configure("-v"))
    assert capsys.readouterr().out == f"Docker version {dockerd.VERSION}, build {dockerd.GIT_COMMIT}\n"
    assert dockerd.answer_at_once(configure("--validate", json={"debug": True}))
    assert capsys.readouterr().err == "configuration OK\n"
    assert dockerd.answer_at_once(configure("--print=man")) and ".TH DOCKERD.PY 8" in capsys.readouterr().out
    assert "use one of bash" in failure(dockerd.UsageError, dockerd.answer_at_once, configure("--print=x"))
    assert not dockerd.answer_at_once(configure("-d"))


def test_the_commented_daemon_json_is_the_defaults(configure):
    text = dockerd.print_asset("daemon.json")
    assert vars(configure(json=text))["given"] == {"config-file": "--config-file"}
    for entry in re.findall(r'// ("[a-z0-9-]+": .*)', text):
        (name, value), = json.loads("{" + entry + "}").items()
        assert name in [*KEYS_OF_DOCKERD, "api-enable-cors", "exec-driver",  # of 1.2.0, and of 29
                        "bridge-accept-fwmark", "firewall-backend", "image-gc-days", "image-gc-space",
                        "max-layer-entries", "max-layer-ratio"]
        configure(json={name: value})


@pytest.mark.parametrize("what", ["openrc", "sysvinit", "bash"])
def test_shell_assets_are_valid_shell(what):
    text = dockerd.print_asset(what, "/opt/dockerd.py")
    subprocess.run(["bash", "-n"] if what != "sysvinit" else ["sh", "-n"], input=text, text=True, check=True)
    assert "@" not in text


def test_units_and_completions_name_the_program_and_every_flag():
    service = dockerd.print_asset("systemd-service", "/opt/dockerd.py")
    assert "ExecStart=/usr/bin/env python3 /opt/dockerd.py -H fd://\n" in service
    assert "ListenStream=/run/docker.sock\n" in dockerd.print_asset("systemd-socket")
    for option in dockerd.OPTIONS:
        for flag in option.spellings:
            assert flag in dockerd.print_asset("bash") and f"'*{flag}[" in dockerd.print_asset("zsh")
            assert f"-{'l' if flag[:2] == '--' else 's'} {flag.lstrip('-')} " in dockerd.print_asset("fish")
            assert flag.replace("-", "\\-") in dockerd.print_asset("man")


# ------------------------------------------------------------------------------------------------------------
# Execution driver: capabilities, users, seccomp
#
# The compiled programs are run by a BPF interpreter for every system call of every calling convention, and
# checked against a naive reading of the JSON profile; then for real, in forked children, by all entries.
# ------------------------------------------------------------------------------------------------------------

AUDIT = {
    "SCMP_ARCH_X86_64": 0xC000003E,
    "SCMP_ARCH_X86": 0x40000003,
    "SCMP_ARCH_X32": 0xC000003E,
    "SCMP_ARCH_AARCH64": 0xC00000B7,
    "SCMP_ARCH_ARM": 0x40000028,
}
CONVENTIONS = {
    "x86_64": ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32"),
    "aarch64": ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"),
}
GO_NAMES = {"x86_64": "amd64", "aarch64": "arm64"}
RETURNS = {
    "SCMP_ACT_ALLOW": 0x7FFF0000,
    "SCMP_ACT_ERRNO": 0x50000,
    "SCMP_ACT_KILL": 0,
    "SCMP_ACT_LOG": 0x7FFC0000,
    "SCMP_ACT_TRAP": 0x30000,
    "SCMP_ACT_TRACE": 0x7FF00000,
    "SCMP_ACT_KILL_PROCESS": 0x80000000,
}
ENOSYS = RETURNS["SCMP_ACT_ERRNO"] | errno.ENOSYS
DEFAULT_NAMES = {dockerd.CAPABILITIES[number] for number in dockerd.DEFAULT_CAPABILITIES}


def run_bpf(program: bytes, number: int, audit: int, arguments: tuple[int, ...]) -> int:
    """What the kernel would be told; every jump must stay inside the program, every path end in a return."""
    data = struct.pack("=IIQ6Q", number, audit, 0, *arguments)
    code = list(struct.iter_unpack("=HBBI", program))
    accumulator = position = 0
    while True:
        operation, true, false, k = code[position]
        position += 1
        if operation == 0x06:
            return k
        if operation == 0x20:
            (accumulator,) = struct.unpack_from("=I", data, k)
        elif operation == 0x54:
            accumulator &= k
        elif operation == 0x05:
            position += k
        else:
            holds = {0x15: accumulator == k, 0x25: accumulator > k, 0x35: accumulator >= k}[operation]
            position += true if holds else false


def argument_holds(argument: dict, arguments: tuple[int, ...], wide: bool) -> bool:
    mask = (1 << 64) - 1 if wide else (1 << 32) - 1
    value, second = argument.get("value", 0) & mask, argument.get("valueTwo", 0) & mask
    given = arguments[argument["index"]] & mask
    return {
        "NE": given != value,
        "LT": given < value,
        "LE": given <= value,
        "EQ": given == value,
        "GE": given >= value,
        "GT": given > value,
        "MASKED_EQ": given & value == second,
    }[argument["op"][9:]]


def applicable(
    profile: dict[str, Any], capabilities: set[str], machine: str, kernel: str
) -> list[dict[str, Any]]:
    """The rows of the profile that stand for this container, word by word."""
    rows = []
    for call in profile["syscalls"]:
        includes, excludes = call.get("includes") or {}, call.get("excludes") or {}
        if GO_NAMES[machine] in excludes.get("arches", ()) or capabilities & set(excludes.get("caps", ())):
            continue
        if includes.get("arches") and GO_NAMES[machine] not in includes["arches"]:
            continue
        if not set(includes.get("caps", ())) <= capabilities:
            continue
        minimum = includes.get("minKernel", "0.0")
        if tuple(map(int, minimum.split("."))) <= tuple(map(int, kernel.split("."))):
            rows.append(call)
    return rows


def returned(action: str, code: int | None) -> int:
    """What a filter returns for an action."""
    return RETURNS[action] | (1 if code is None else code) * (action in ("SCMP_ACT_ERRNO", "SCMP_ACT_TRACE"))


def naive(
    profile: dict[str, Any],
    rows: list[dict[str, Any]],
    highest: int,
    wide: bool,
    number: int,
    arguments: tuple[int, ...],
) -> int:
    """The answer to one call, given the rows that name it and the highest number that any row names."""
    default = returned(profile["defaultAction"], profile.get("defaultErrnoRet"))
    answers, unconditional = [], []
    for call in rows:
        result = returned(call["action"], call.get("errnoRet"))
        if not call.get("args"):
            unconditional.append(result)
        elif len({argument["index"] for argument in call["args"]}) < len(call["args"]):
            answers += [result for argument in call["args"] if argument_holds(argument, arguments, wide)]
        elif all(argument_holds(argument, arguments, wide) for argument in call["args"]):
            answers.append(result)
    if number > highest > 0 and profile["defaultAction"] not in (
        "SCMP_ACT_ALLOW",
        "SCMP_ACT_LOG",
        "SCMP_ACT_TRACE",
    ):
        return ENOSYS
    return next((answer for answer in unconditional + answers if answer != default), default)


def probes(*values: int) -> list[tuple[int, ...]]:
    """Argument lists that try the neighbourhood of `values` as first and second argument, in both words."""
    near = {
        0,
        1,
        *((value + step) & (1 << 64) - 1 for value in values for step in (-1, 0, 1)),
        *(value | 1 << 32 for value in values),
    }
    firsts: list[tuple[int, ...]] = [(value, 0, 0, 0, 0, 0) for value in near]
    return firsts + [(0, value, 7, 0, 0, 0) for value in near]


def check_program(
    profile: dict[str, Any],
    program: bytes,
    capabilities: set[str],
    machine: str,
    kernel: str,
    calls: list[tuple[int, ...]],
    conventions: tuple[str, ...],
) -> None:
    """Ask the program about every number of every calling convention, known or not."""
    rows = [
        (set(call.get("names") or [call["name"]]), call)
        for call in applicable(profile, capabilities, machine, kernel)
    ]
    for convention in conventions:
        numbers = dockerd.syscall_numbers(convention)
        wide = convention in ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
        named: dict[int, list[dict[str, Any]]] = {}
        for names, call in rows:
            for number in {numbers[name] for name in names if name in numbers}:
                named.setdefault(number, []).append(call)
        start = 0x40000000 if convention == "SCMP_ARCH_X32" else 0
        for number in {
            *range(start, start + 560),
            *numbers.values(),
            max(numbers.values()) + 1,
            start + 0x3FFFFFFF,
        }:
            said = named.get(number, [])
            for arguments in calls if any(call.get("args") for call in said) else calls[:1]:
                expected = naive(profile, said, max(named, default=0), wide, number, arguments)
                assert run_bpf(program, number, AUDIT[convention], arguments) == expected, (
                    convention,
                    number,
                    list(map(hex, arguments)),
                )


def published_profile() -> dict:
    """The profile that DOCKERD_SECCOMP_PROFILE names, else ours: then the compiler alone is under test."""
    path = os.environ.get("DOCKERD_SECCOMP_PROFILE")
    if not path:
        return dockerd.default_seccomp_profile()
    with open(path) as file:
        return json.load(file)


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(
    "capabilities",
    [
        DEFAULT_NAMES,
        set(),
        set(dockerd.CAPABILITIES),
        {"CAP_SYS_ADMIN"},
        {"CAP_BPF", "CAP_SYS_PTRACE", "CAP_SYS_TIME"},
    ],
    ids=len,
)
@pytest.mark.parametrize("kernel", ["6.1", "4.7"])
def test_seccomp_default_profile(machine: str, capabilities: set[str], kernel: str) -> None:
    """Every system call of every calling convention, known or not, has the published profile's answer."""
    calls = probes(38, 39, 40, 8, 0x20000, 0x20008, 0xFFFFFFFF, 0x10000000, 0x7E020000, 0x40000000)
    program = dockerd.compile_seccomp(None, capabilities, machine, kernel)
    check_program(published_profile(), program, capabilities, machine, kernel, calls, CONVENTIONS[machine])
    assert len(program) // 8 <= 400


@pytest.mark.parametrize(
    "convention, known",
    [
        ("SCMP_ARCH_X86_64", {"read": 0, "execve": 59, "openat": 257, "statx": 332, "clone3": 435}),
        ("SCMP_ARCH_X86", {"restart_syscall": 0, "socketcall": 102, "futex_time64": 422, "mseal": 462}),
        ("SCMP_ARCH_X32", {"read": 0x40000000, "execve": 0x40000208, "pwritev2": 0x40000223}),
        ("SCMP_ARCH_AARCH64", {"io_setup": 0, "openat": 56, "clone": 220, "statx": 291, "pidfd_open": 434}),
        ("SCMP_ARCH_ARM", {"exit": 1, "openat": 322, "sync_file_range2": 341, "set_tls": 983045}),
    ],
)
def test_system_call_numbers(convention: str, known: dict[str, int]) -> None:
    """Spot checks, and where the headers of x86 are at hand every number that they have."""
    numbers = dockerd.syscall_numbers(convention)
    assert {name: numbers[name] for name in known} == known
    header = {"SCMP_ARCH_X86_64": "64", "SCMP_ARCH_X86": "32", "SCMP_ARCH_X32": "x32"}.get(convention)
    path = f"/usr/include/x86_64-linux-gnu/asm/unistd_{header}.h"
    if os.path.exists(path):
        with open(path) as file:
            lines = re.findall(r"#define __NR_(\w+) \(?(__X32_SYSCALL_BIT \+ )?(\d+)", file.read())
        for name, bit, number in lines:
            assert numbers[name] == int(number) | (0x40000000 if bit else 0), name


def test_seccomp_other_architecture_is_killed() -> None:
    program = dockerd.compile_seccomp(None, DEFAULT_NAMES, "x86_64", "6.1")
    assert run_bpf(program, 0, 0xC00000B7, (0,) * 6) == 0


def test_seccomp_random_profiles() -> None:
    """Programs of custom profiles, with every operator, 64-bit values and far jumps, do what they should."""
    source = random.Random(7)
    names = sorted(
        set(dockerd.syscall_numbers("SCMP_ARCH_X86_64"))
        - {name for row in dockerd._I386_MULTIPLEXED.values() for name in row.split()}
        | {"nonsense"}
    )
    operators = ["NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ"]
    values = [0, 1, 5, 0xFFFFFFFF, 1 << 32, 0x1_0000_0005, (1 << 64) - 1, 0xFF00FF00FF00FF00]
    for turn in range(8):
        actions = source.sample(sorted(RETURNS), 3)
        calls = []
        for name in source.sample(names, 40 if turn else 200):
            row = {"names": [name], "action": source.choice(actions), "errnoRet": source.randrange(1, 130)}
            if source.random() < 0.4:
                row["args"] = [
                    {
                        "index": source.randrange(2),
                        "value": source.choice(values),
                        "valueTwo": source.choice(values),
                        "op": "SCMP_CMP_" + source.choice(operators),
                    }
                    for _ in range(source.randrange(1, 4))
                ]
            calls.append(row)
        profile = {"defaultAction": source.choice(sorted(RETURNS)), "syscalls": calls}
        if turn % 2:
            profile["architectures"] = list(CONVENTIONS["x86_64"])
        program = dockerd.compile_seccomp(profile, set(), "x86_64", "6.1")
        conventions = CONVENTIONS["x86_64"] if turn % 2 else ("SCMP_ARCH_X86_64",)
        check_program(profile, program, set(), "x86_64", "6.1", probes(*values), conventions)
        if not turn % 2:
            assert run_bpf(program, 0x40000000, AUDIT["SCMP_ARCH_X32"], (0,) * 6) == 0
            assert run_bpf(program, 4, AUDIT["SCMP_ARCH_X86"], (0,) * 6) == 0


def test_seccomp_multiplexed_calls() -> None:
    """What is forbidden by name cannot be had through i386's socketcall and ipc, whatever the upper half."""
    profile = {
        "defaultAction": "SCMP_ACT_ALLOW",
        "architectures": ["SCMP_ARCH_X86"],
        "syscalls": [
            {"name": "socket", "action": "SCMP_ACT_ERRNO"},
            {"name": "shmat", "action": "SCMP_ACT_ERRNO"},
        ],
    }
    program = dockerd.compile_seccomp(profile, set(), "x86_64", "6.1")
    for number, first, allowed in (
        (359, 2, False),
        (102, 1, False),
        (102, 2, True),
        (117, 21, False),
        (117, 0x10015, False),
        (117, 22, True),
    ):
        answer = run_bpf(program, number, AUDIT["SCMP_ARCH_X86"], (first, 0, 0, 0, 0, 0))
        assert answer == (RETURNS["SCMP_ACT_ALLOW"] if allowed else RETURNS["SCMP_ACT_ERRNO"] | 1), (
            number,
            first,
        )


@pytest.mark.parametrize(
    "profile, text",
    [
        (
            {"defaultAction": "SCMP_ACT_MAYBE", "syscalls": []},
            "string SCMP_ACT_MAYBE is not a valid action for seccomp",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    {"names": ["read"], "action": "SCMP_ACT_ERRNO", "args": [{"index": 0, "op": "EQ"}]}
                ],
            },
            "string EQ is not a valid operator for seccomp",
        ),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["VAX"]},
            "string VAX is not a valid arch for seccomp",
        ),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "architectures": ["SCMP_ARCH_X86"], "archMap": [{}]},
            "use either 'architectures' or",
        ),
        (
            {"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"name": "read", "names": ["read"]}]},
            "use either 'name' or 'names'",
        ),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    {"name": "read", "action": "SCMP_ACT_ERRNO", "args": [{"index": 6, "op": "SCMP_CMP_EQ"}]}
                ],
            },
            "argument 6",
        ),
        ({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": 5}, "Decoding seccomp profile failed"),
        ({"defaultAction": 3, "syscalls": []}, "Decoding seccomp profile failed"),
        ("[", "Decoding seccomp profile failed"),
        ("[]", "Decoding seccomp profile failed"),
        ("[" * 100000, "Decoding seccomp profile failed"),
        (
            {
                "defaultAction": "SCMP_ACT_ALLOW",
                "syscalls": [
                    {
                        "name": "read",
                        "action": "SCMP_ACT_ERRNO",
                        "args": [{"index": 0, "op": "SCMP_CMP_EQ", "value": value} for value in range(2000)],
                    }
                ],
            },
            "the kernel takes 4096",
        ),
    ],
)
def test_seccomp_bad_profiles(profile: Any, text: str) -> None:
    with pytest.raises(dockerd.BadParameter, match=text.replace("(", r"\(")):
        dockerd.compile_seccomp(profile, set(), "x86_64", "6.1")


def test_seccomp_empty_profile_confines_nothing() -> None:
    assert dockerd.compile_seccomp({}, set(), "x86_64", "6.1") == b""
    assert dockerd.compile_seccomp(None, set(), "vax", "6.1") == b""


def test_seccomp_flags() -> None:
    assert dockerd.seccomp_flags() == 4
    assert dockerd.seccomp_flags({"flags": ["SECCOMP_FILTER_FLAG_LOG", "SECCOMP_FILTER_FLAG_TSYNC"]}) == 3
    assert dockerd.seccomp_flags({"flags": []}) == 0
    with pytest.raises(dockerd.BadParameter, match="SECCOMP_FILTER_FLAG_X"):
        dockerd.seccomp_flags({"flags": ["SECCOMP_FILTER_FLAG_X"]})


# mov eax, edi; mov ebx, esi; mov ecx, edx; int 0x80; cdqe; ret, with rbx kept
INT_80 = bytes.fromhex("53 89f8 89f3 89d1 cd80 4898 5b c3".replace(" ", ""))


def confined_answers(program: bytes, calls: list[tuple[str, int, int, int]]) -> list[int]:
    """The results (or minus errno) of (entry, number, first, second) calls in a child under `program`."""
    libc = ctypes.CDLL(None, use_errno=True)
    page = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
    page.write(INT_80)
    address = ctypes.addressof(ctypes.c_char.from_buffer(page))
    int_80 = ctypes.CFUNCTYPE(ctypes.c_long, ctypes.c_long, ctypes.c_long, ctypes.c_long)(address)
    read, write = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            dockerd.seccomp_load(program, dockerd.seccomp_flags())
            results = []
            for entry, number, first, second in calls:
                if entry == "int80":
                    results.append(int_80(number, first, second))
                else:
                    result = libc.syscall(
                        ctypes.c_long(number), ctypes.c_long(first), ctypes.c_long(second), 0, 0, 0
                    )
                    results.append(-ctypes.get_errno() if result == -1 else result)
            os.write(write, json.dumps(results).encode())
        finally:
            os._exit(0)
    os.close(write)
    with open(read, "rb") as pipe:
        text = pipe.read()
    assert os.waitpid(pid, 0)[1] == 0
    return json.loads(text)


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="machine code of x86-64")
def test_seccomp_for_real() -> None:
    """The kernel takes the program, and 32-bit and x32 entries are no way around it (pitfall 23)."""
    program = dockerd.compile_seccomp(None, DEFAULT_NAMES)
    calls = [
        ("syscall", 39, 0, 0),
        ("syscall", 272, 0, 0),
        ("syscall", 135, 0xFFFFFFFF, 0),
        ("syscall", 135, 4, 0),
        ("syscall", 41, 40, 1),
        ("syscall", 56, 0x10000000, 0),
        ("syscall", 435, 0, 0),
        ("syscall", 169, 0, 0),
        ("syscall", 500, 0, 0),
        ("int80", 20, 0, 0),
        ("int80", 310, 0, 0),
        ("int80", 88, 0, 0),
        ("int80", 435, 0, 0),
        ("syscall", 0x40000000 | 272, 0, 0),
        ("syscall", 0x40000000 | 435, 0, 0),
        ("syscall", 0x40000000 | 900, 0, 0),
    ]
    answers = confined_answers(program, calls)
    assert answers[0] > 0 and answers[2] >= 0 and answers[9] > 0, answers
    refused = [-errno.EPERM, -errno.EPERM, -errno.EPERM, -errno.ENOSYS, -errno.EPERM, -errno.ENOSYS]
    assert [answers[3], answers[4], answers[5], answers[6], answers[7], answers[8]] == refused
    assert answers[1] == answers[10] == answers[11] == answers[13] == -errno.EPERM
    assert answers[12] == answers[14] == answers[15] == -errno.ENOSYS


def test_capabilities() -> None:
    everything = set(range(len(dockerd.CAPABILITIES)))
    number = dockerd.CAPABILITIES.index
    sets = dockerd.capability_sets
    default = set(dockerd.DEFAULT_CAPABILITIES)
    assert len(dockerd.CAPABILITIES) == 41 and len(default) == 14
    assert sets([], [], False, everything) == default
    assert sets(["net_admin"], ["CAP_KILL"], False, everything) == default - {number("CAP_KILL")} | {
        number("CAP_NET_ADMIN")
    }
    assert sets(["ALL"], ["kill"], False, everything) == everything - {number("CAP_KILL")}
    assert sets(["ALL"], ["ALL"], False, everything) == everything
    assert sets(["CHOWN"], ["all"], False, everything) == {number("CAP_CHOWN")}
    assert sets([], ["ALL"], False, everything) == set()
    lacking = everything - {number("CAP_SYS_RESOURCE")}
    assert sets([], [], True, lacking) == lacking == sets(["ALL"], [], False, lacking)
    for add, drop, text in (
        (["X"], [], 'invalid CapAdd: unknown capability: "CAP_X"'),
        ([], ["CAP_Y"], 'invalid CapDrop: unknown capability: "CAP_Y"'),
        (["SYS_RESOURCE"], [], "not available in the current environment"),
    ):
        with pytest.raises(dockerd.BadParameter, match=text):
            sets(add, drop, False, lacking)
    with open("/proc/self/status") as status:
        masks = dict(line.split(":\t") for line in status.read().splitlines() if line.startswith("Cap"))
    assert sum(1 << bit for bit in dockerd.bounding_capabilities()) == int(masks["CapBnd"], 16) & int(
        masks["CapPrm"], 16
    )


PASSWD = (b"root:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/var/www:/bin/sh\n\n2000:x:7:8::/odd:\n"
          b"toor:x:0:5::/toor:\nbad\n")
GROUP = b"root:x:0:\nweb:x:34:\naudio:x:29:web,mail\nmail:x:8:web\nnum:x:50:2000"


@pytest.mark.parametrize(
    "spec, extra, wanted",
    [
        ("", [], (0, 0, [0], "/root")),
        ("0", [], (0, 0, [0], "/root")),
        ("web", [], (33, 34, [34, 29, 8], "/var/www")),
        ("33", ["audio", "4000"], (33, 34, [34, 29, 8, 4000], "/var/www")),
        ("web:audio", [], (33, 29, [29], "/var/www")),
        ("web:99", [], (33, 99, [99], "/var/www")),
        ("1000", [], (1000, 0, [0], "/")),
        ("1000:1000", ["50"], (1000, 1000, [1000, 50], "/")),
        ("2000", [], (2000, 0, [0], "/")),
        ("toor", [], (0, 5, [5], "/root")),
        ("bad", [], (0, 0, [0], "/root")),
    ],
)
def test_users(spec: str, extra: list[str], wanted: tuple) -> None:
    assert dockerd.lookup_user(spec, PASSWD, GROUP, extra) == wanted


@pytest.mark.parametrize(
    "spec, extra, text",
    [
        ("nobody", [], "unable to find user nobody: no matching entries in passwd file"),
        ("web:nobody", [], "unable to find group nobody: no matching entries in group file"),
        ("", ["nobody"], "Unable to find group nobody: no matching entries in group file"),
        ("-1", [], "uids and gids must be in range 0-2147483647"),
        ("2147483648", [], "uids and gids must be in range 0-2147483647"),
        ("1:2147483648", [], "uids and gids must be in range 0-2147483647"),
    ],
)
def test_users_not_found(spec: str, extra: list[str], text: str) -> None:
    with pytest.raises(dockerd.BadParameter, match=text):
        dockerd.lookup_user(spec, PASSWD, GROUP, extra)
    if spec != "web:nobody":
        with pytest.raises(dockerd.BadParameter, match=text):
            dockerd.lookup_user(spec, None, None, extra)


@pytest.mark.parametrize("number", ["-5", "2147483648", "9" * 20, "9" * 100_000])
def test_users_whose_number_is_none(number: str) -> None:
    for account, text in ((f"x:x:{number}:0::/:", "x"), (f"x:x:0:{number}::/:", "x")):
        with pytest.raises(dockerd.BadParameter, match="uids and gids must be in range 0-2147483647"):
            dockerd.lookup_user(text, account.encode(), None)


def test_the_lines_of_accounts_have_an_end() -> None:
    """A container that makes them endless made the daemon read them for minutes, at each exec."""
    lines = b":\n" * (2 << 20)
    start = time.monotonic()
    with pytest.raises(dockerd.BadParameter):
        dockerd.lookup_user("web:mail", lines + PASSWD, lines + GROUP)
    assert time.monotonic() - start < 5
    assert dockerd.lookup_user("web", b"x:\n" * 40000 + PASSWD, None)[0] == 33


def test_accounts_are_read_from_files_alone(tmp_path: Path) -> None:
    """A container may have a device there, and the daemon is bound by no device rules."""
    os.mkfifo(tmp_path / "passwd")
    threads: list[int] = []

    def write() -> None:
        threads.append(threading.get_native_id())
        os.close(os.open(tmp_path / "passwd", os.O_WRONLY))

    def waits() -> bool:  # in open(2) for somebody who reads
        number = read_text(f"/proc/self/task/{threads[0]}/syscall").split(" ")[0] if threads else ""
        return number == str(dockerd.syscall_numbers(dockerd._MACHINES[os.uname().machine][1][0])["openat"])

    writer = threading.Thread(target=write)
    writer.start()
    wait_for(waits)
    with dockerd.opened(str(tmp_path)) as root:
        assert dockerd._read_in_root(root, "/passwd") == b"" and waits()
        os.close(os.open(tmp_path / "passwd", os.O_RDONLY))
        writer.join()
        (tmp_path / "link").symlink_to("/file")
        (tmp_path / "file").write_bytes(b"content")
        assert dockerd._read_in_root(root, "/link") == b"content"


# ------------------------------------------------------------------------------------------------------------
# Storage drivers
# ------------------------------------------------------------------------------------------------------------


def new_id() -> str:
    return secrets.token_hex(32)


@contextlib.contextmanager
def mounted(driver: Any, cache_id: str, readonly: bool = False) -> Iterator[Path]:
    """A layer's mount, by its descriptor alone."""
    fd = driver.mount(cache_id, readonly=readonly)
    try:
        yield Path(f"/proc/self/fd/{fd}")
    finally:
        os.close(fd)


MAKE_FILE_SYSTEM = {"btrfs": ["mkfs.btrfs", "-q"], "xfs": ["mkfs.xfs", "-q"],
                    "ext4": ["mkfs.ext4", "-q", "-O", "quota,project", "-E", "quotatype=prjquota"]}


@contextlib.contextmanager
def loop_file_system(kind: str, directory: Path) -> Iterator[Path]:
    """A file system of our own, on a loop device, with quotas of projects where it and the kernel have
    them."""
    image, target = directory / f"{kind}.img", directory / kind
    with open(image, "wb") as file:
        file.truncate((256 if kind == "btrfs" else 320) << 20)
    target.mkdir()
    subprocess.run([*MAKE_FILE_SYSTEM[kind], str(image)], check=True, stderr=subprocess.DEVNULL)
    if kind == "btrfs" or subprocess.run(["mount", "-o", "loop,prjquota", str(image), str(target)],
                                         stderr=subprocess.DEVNULL).returncode:
        if kind == "ext4":  # this kernel refuses the very feature
            subprocess.run(["mkfs.ext4", "-q", str(image)], check=True)
        subprocess.run(["mount", "-o", "loop", str(image), str(target)], check=True)
    try:
        yield target
    finally:
        subprocess.run(["umount", "-l", str(target)], check=True)


@pytest.fixture
def btrfs(tmp_path: Path) -> Iterator[Path]:
    """A btrfs of our own."""
    with loop_file_system("btrfs", tmp_path) as path:
        yield path


@pytest.fixture(params=["overlay2", "btrfs", "vfs"])
def driver(request: pytest.FixtureRequest, tmp_path: Path) -> dockerd.StorageDriver:
    """Each driver, on a root of its own."""
    root = request.getfixturevalue("btrfs") if request.param == "btrfs" else tmp_path
    return select_driver(str(root), request.param, [], IdMap())


def make_layer(driver: dockerd.StorageDriver, parent: str | None = None, **files: str) -> str:
    cache_id = new_id()
    driver.create(cache_id, parent)
    for name, content in files.items():
        Path(driver.diff_dir(cache_id), name).write_text(content)
    return cache_id


def test_a_stack_of_layers_and_a_container_on_it(driver: dockerd.StorageDriver) -> None:
    base = make_layer(driver, lower="1", both="1")
    os.link(Path(driver.diff_dir(base), "lower"), Path(driver.diff_dir(base), "link"))
    top = make_layer(driver, base, both="2")
    container = new_id()
    driver.create(container + "-init", top, writable=True)
    driver.create(container, container + "-init", writable=True)
    before = Path("/proc/self/mountinfo").read_text()
    with mounted(driver, container) as root:
        assert {name: (root / name).read_text() for name in os.listdir(root)} == {
            "lower": "1",
            "link": "1",
            "both": "2",
        }
        assert (root / "lower").stat().st_ino == (root / "link").stat().st_ino
        (root / "new").write_text("3")
        (root / "lower").unlink()
        assert Path("/proc/self/mountinfo").read_text() == before  # detached: in no mount table
    with mounted(driver, container) as root:
        assert sorted(os.listdir(root)) == ["both", "link", "new"]
    with mounted(driver, top) as root:
        assert sorted(os.listdir(root)) == ["both", "link", "lower"]
    with mounted(driver, container, readonly=True) as root, pytest.raises(OSError, match="Read-only"):
        (root / "x").write_text("")
    assert stat.S_IMODE(os.stat(driver.home).st_mode) == 0o710
    assert sorted(driver.ids()) == sorted([base, top, container, container + "-init"])
    for cache_id in (container, container + "-init", top, base, base):
        driver.remove(cache_id)
    assert not driver.exists(base) and driver.ids() == []
    left = {name for name in os.listdir(driver.layers()) if name != "l"}
    assert not left and not (driver.name == "overlay2" and os.listdir(os.path.join(driver.home, "l")))


def test_what_many_layers_are_filled_with(driver: dockerd.StorageDriver) -> None:
    """overlay2 keeps it once: made again where its maker failed or was killed, gone with the layer below,
    even if moby removed that."""
    base, filled = make_layer(driver, file="1"), []

    def fill(directory: str) -> None:
        filled.append(Path(directory, "place").write_text(""))

    def fail(directory: str) -> None:
        fill(directory)
        raise OSError(errno.ENOSPC, "no space")

    def container() -> str:
        made = new_id()
        driver.create_filled(made + "-init", base, fill)
        driver.create(made, made + "-init", writable=True)
        return made

    shared = os.path.join(driver.layers(), base + "-filled")
    with pytest.raises(OSError, match="no space"):
        driver.create_filled(new_id(), base, fail)
    if driver.name == "overlay2":
        driver.create_filled(new_id(), base, fill)
        os.unlink(os.path.join(shared, "committed"))
        driver = select_driver(os.path.dirname(driver.home), "overlay2", [], IdMap())
    containers = [container() for _ in range(3)]
    assert driver.name != "overlay2" or len(filled) == 3
    for each in containers:
        with mounted(driver, each) as root:
            assert sorted(os.listdir(root)) == ["file", "place"], each
        assert driver.changes(each, each + "-init") == []
        driver.remove(each)
        driver.remove(each + "-init")
    assert os.path.exists(shared) == (driver.name == "overlay2")
    for each in driver.ids():
        driver.remove(each)
    assert not os.path.exists(shared)
    if driver.name == "overlay2":
        base = make_layer(driver)
        driver.remove(container())
        shutil.rmtree(os.path.join(driver.home, base))
        for damage in driver.leftovers():
            assert damage.safe and damage.mend
            damage.mend()
        assert len(os.listdir(driver.home)) == 2 and len(os.listdir(driver.home + "/l")) == 1  # its init


def test_what_moby_finds_on_disk(tmp_path: Path) -> None:
    driver = select_driver(str(tmp_path), "overlay2", [], IdMap())
    one = make_layer(driver)
    two = make_layer(driver, one)
    three = make_layer(driver, two)
    home = tmp_path / "overlay2"
    links = {cache_id: (home / cache_id / "link").read_text() for cache_id in (one, two, three)}
    assert all(
        len(link) == 26 and os.readlink(home / "l" / link) == f"../{cache_id}/diff"
        for cache_id, link in links.items()
    )
    assert sorted(os.listdir(home / one)) == ["committed", "diff", "link"]
    assert sorted(name for name in os.listdir(home / three) if "previous" not in name) == [
        "diff",
        "link",
        "lower",
        "work",
    ]
    assert (home / three / "lower").read_text() == f"l/{links[two]}:l/{links[one]}"
    data = driver.metadata(three)
    assert data == {"LowerDir": f"{home}/{two}/diff:{home}/{one}/diff", "MergedDir": f"{home}/{three}/merged",
                    "UpperDir": f"{home}/{three}/diff", "WorkDir": f"{home}/{three}/work"}
    assert driver.metadata(one) and "LowerDir" not in (driver.metadata(one) or {})
    assert [[name, value] for name, value in driver.status()][1] == ["Supports d_type", "true"]


@pytest.mark.parametrize("new_api", [True, False])
def test_128_layers(tmp_path: Path, new_api: bool) -> None:
    driver = select_driver(str(tmp_path), "overlay2", [], IdMap())
    assert isinstance(driver, dockerd.Overlay)
    assert driver.appends == (tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 5))
    driver.appends = driver.appends and new_api
    parent = None
    for number in range(128):
        parent = make_layer(driver, parent, **{f"f{number}": str(number)})
    top = new_id()
    driver.create(top, parent, writable=True)
    before = Path("/proc/self/mountinfo").read_text()
    with mounted(driver, top) as root:
        assert len(os.listdir(root)) == 128
        (root / "f0").write_text("changed")
    assert Path("/proc/self/mountinfo").read_text() == before
    assert os.listdir(driver.diff_dir(top)) == ["f0"] and not os.path.exists(
        os.path.join(driver.home, top, "merged")
    )
    with pytest.raises(BadParameter, match="^max depth exceeded$"):
        driver.create(new_id(), top)
    assert len(driver.ids()) == 129


def test_a_hostile_id_or_a_missing_parent_makes_nothing(driver: dockerd.StorageDriver) -> None:
    for cache_id in ("../x", "", "a/b", ".", "x\n"):
        with pytest.raises(BadParameter, match="invalid layer id"):
            driver.create(cache_id)
        with pytest.raises(BadParameter):
            driver.remove(cache_id)
    with pytest.raises(DockerError, match="does not exist"):
        driver.create(new_id(), new_id())
    assert driver.ids() == []


def fill(path: Path) -> int:
    """Write to a new file until the kernel refuses, without CAP_SYS_RESOURCE, to which ext4's limits do not
    apply; the bytes that it took, up to 64 MiB."""

    def write() -> int:
        effective, permitted, inheritable = dockerd.capget()
        dockerd.capset(effective & ~(1 << 24), permitted, inheritable)
        written = 0
        with contextlib.suppress(OSError), open(path, "wb", 0) as file:
            while written < 64 << 20:
                written += file.write(os.urandom(1 << 18))
        return written

    return int(dockerd.in_thread(write))


def has_project_quota(path: Path) -> bool:
    """Whether the kernel says that a file system is mounted with quotas of projects."""
    return any(line.split()[1] == str(path) and "prjquota" in line.split()[3].split(",")
               for line in read_text("/proc/mounts").splitlines())


@pytest.mark.parametrize("kind, name", [("ext4", "overlay2"), ("ext4", "vfs"), ("xfs", "overlay2"),
                                        ("btrfs", "btrfs")])
def test_a_limited_layer_takes_no_more(tmp_path: Path, kind: str, name: str) -> None:
    """Where the file system has quotas, and a clear error where not: in `make vmtest` all have them."""
    with loop_file_system(kind, tmp_path) as root:
        driver, layer, limit = select_driver(str(root), name, [], IdMap()), new_id(), 8 << 20
        base = make_layer(driver, lower="1")
        if kind == "ext4":
            flags = subprocess.check_output(["lsattr", "-d", driver.layers()], text=True)
            assert "T" in flags.split()[0]  # layers are spread over the disk
        if kind != "btrfs" and not has_project_quota(root):
            with pytest.raises(DockerError, match="Filesystem does not support, or has not enabled quotas|"
                                                  "over xfs with 'pquota' mount option, or over ext4 with"):
                driver.create(layer, base, writable=True, size=limit)
            with pytest.raises(DockerError, match="the storage option size is not supported"):
                select_driver(str(root), name, ["overlay2.size=1g" if name == "overlay2" else "size=1g"],
                              IdMap())
            assert driver.ids() == [base]
            return
        driver.create(layer, base, writable=True, size=limit)
        with mounted(driver, layer) as top:
            assert 0 < fill(top / "big") <= limit and (top / "lower").read_text() == "1"
            if kind != "btrfs":
                assert os.statvfs(top).f_blocks * os.statvfs(top).f_frsize == limit
            (top / "big").unlink()
            os.rename(top / "lower", top / "moved")  # within one project
        driver.create(other := new_id(), base, writable=True)
        with mounted(driver, other) as top:
            assert fill(top / "big") == 64 << 20
        driver.remove(layer)
        driver.remove(other)


@pytest.mark.parametrize("kind", ["ext4", "xfs"])
def test_a_limited_volume_takes_no_more(tmp_path: Path, kind: str) -> None:
    with loop_file_system(kind, tmp_path) as root:
        volumes = dockerd.Volumes(str(root), lambda *event: None)
        for size, text in (("x", "invalid size: 'x'"), ("", "invalid size: ''")):
            with pytest.raises(BadParameter, match=f"^create one: {text}$"):
                volumes.create("one", options={"size": size})
        if not has_project_quota(root):
            with pytest.raises(BadParameter, match="^create one: quota size requested but no quota support$"):
                volumes.create("one", options={"size": "1m"})
            assert os.listdir(root / "volumes") == []
            return
        one = volumes.create("one", options={"size": "2m"})
        assert 0 < fill(Path(one.data, "big")) <= 2 << 20
        assert fill(Path(volumes.create("two").data, "big")) == 64 << 20
        assert json.loads(Path(one.path, "opts.json").read_text())["Quota"] == {"Size": 2 << 20}
        volumes.remove("one")


def test_what_a_failed_or_killed_creation_and_removal_leave(driver: dockerd.StorageDriver,
                                                            monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_layer(driver, f="1")

    def fail(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(dockerd, "make_directory" if driver.name != "btrfs" else "failpoint", fail)
    with pytest.raises(OSError, match="No space left"):
        driver.create(new_id(), base)
    monkeypatch.undo()
    assert driver.ids() == [base]
    monkeypatch.setattr(driver, "destroy", lambda path, until: None)
    driver.remove(base)
    assert driver.ids() == [] and any(name.endswith("-removing") for name in os.listdir(driver.layers()))
    monkeypatch.undo()
    again = select_driver(os.path.dirname(driver.home), driver.name, [], IdMap())
    assert not any(name.endswith("-removing") for name in os.listdir(again.layers()))


@pytest.mark.parametrize("patience", [0, 1000])
def test_a_large_or_deep_layer_goes_behind_the_answer(driver: dockerd.StorageDriver, patience: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    """And what the daemon's end interrupts goes at the next start, behind it too."""
    def left() -> list[str]:
        return [name for directory in (driver.layers(), os.path.join(driver.home, "l"))
                if os.path.isdir(directory) for name in os.listdir(directory) if name != "l"]

    held = threading.Event()
    dockerd.REMOVALS.add(held.wait)
    monkeypatch.setattr(dockerd.Removals, "PATIENCE", patience)
    layer = make_layer(driver, f="1")
    deep = driver.diff_dir(layer)
    for _ in range(60):
        os.mkdir(deep := deep + "/d")
    driver.remove(layer)
    assert driver.ids() == []
    assert bool(left()) == (driver.name != "btrfs")  # which removes in one step
    select_driver(os.path.dirname(driver.home), driver.name, [], IdMap())
    assert bool(left()) == (driver.name != "btrfs")
    assert not dockerd.REMOVALS.wait(0)
    held.set()
    assert dockerd.REMOVALS.wait(60) and not left()


def test_remapped_roots_own_their_directories(tmp_path: Path) -> None:
    ranges = [(0, 100_000, 65536)]
    for name in ("overlay2", "vfs"):
        driver = select_driver(str(tmp_path), name, [], IdMap(ranges, ranges))
        layer = make_layer(driver, make_layer(driver))
        assert os.stat(driver.diff_dir(layer)).st_uid == 100_000 and os.stat(driver.home).st_gid == 100_000
        with mounted(driver, layer) as root:
            assert os.stat(root).st_uid == 100_000


def test_vfs_copies_every_attribute(tmp_path: Path) -> None:
    driver = select_driver(str(tmp_path), "vfs", [], IdMap())
    base = new_id()
    driver.create(base)
    os.rmdir(driver.diff_dir(base))
    make_tree(Path(driver.diff_dir(base)))
    top = new_id()
    driver.create(top, base)
    assert snapshot(driver.diff_dir(top)) == snapshot(driver.diff_dir(base))
    assert os.stat(os.path.join(driver.diff_dir(top), "sparse")).st_blocks * 512 < 1 << 20


def test_a_subvolume_inside_a_layer_is_removed_with_it(btrfs: Path) -> None:
    driver = select_driver(str(btrfs), "", [], IdMap())
    assert driver.name == "btrfs" or driver.name == "overlay2"
    driver = select_driver(str(btrfs), "btrfs", [], IdMap())
    base = make_layer(driver, f="1")
    subprocess.run(["btrfs", "-q", "subvolume", "create", driver.diff_dir(base) + "/nested"], check=True)
    Path(driver.diff_dir(base), "nested/f").write_text("1")
    driver.remove(base)
    assert os.listdir(driver.layers()) == []


# Selection


def test_what_a_killed_daemon_leaves_of_overlay_goes(tmp_path: Path) -> None:
    home = tmp_path / "overlay2"
    driver = select_driver(str(tmp_path), "overlay2", [], IdMap())
    driver.create(layer := new_id())
    os.symlink(f"../{new_id()}/diff", home / "l" / ("A" * 26))
    (home / "check-overlayfs-support" / "upper").mkdir(parents=True)
    select_driver(str(tmp_path), "", [], IdMap())
    assert sorted(os.listdir(home)) == sorted([layer, "l"])
    assert os.listdir(home / "l") == [(home / layer / "link").read_text()]


def test_a_layer_that_cannot_be_made_leaves_no_short_name(tmp_path: Path, monkeypatch: Any) -> None:
    driver = select_driver(str(tmp_path), "overlay2", [], IdMap())

    def full(*arguments: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    for function in ("dockerd.write_new_state", "os.symlink"):
        with monkeypatch.context() as patch, pytest.raises(OSError, match="No space left"):
            patch.setattr(function, full)
            driver.create(new_id())
        assert os.listdir(driver.home) == ["l"] and not os.listdir(os.path.join(driver.home, "l"))


def test_detection_takes_overlay_first_and_prior_state_before_it(tmp_path: Path) -> None:
    assert select_driver(str(tmp_path), "", [], IdMap()).name == "overlay2"
    fresh = tmp_path / "other"
    fresh.mkdir()
    make_layer(select_driver(str(fresh), "vfs", [], IdMap()))
    assert (
        select_driver(str(fresh), "", [], IdMap()).name == "overlay2"
    )  # moby leaves vfs out of what counts as prior
    (fresh / "btrfs/subvolumes").mkdir(parents=True)
    with pytest.raises(
        DockerError,
        match="contains several valid graphdrivers: overlay2, btrfs; cleanup or explicitly "
        r"choose storage driver \(-s <DRIVER>\)$",
    ):
        select_driver(str(fresh), "", [], IdMap())
    assert select_driver(str(fresh), "overlay2", [], IdMap()).name == "overlay2"


def test_a_prior_driver_that_fails_stops_the_start(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "btrfs/subvolumes").mkdir(parents=True)
    with (
        caplog.at_level(logging.ERROR),
        pytest.raises(DockerError, match="prerequisites for driver not satisfied"),
    ):
        select_driver(str(tmp_path), "", [], IdMap())
    assert (
        "[graphdriver] prior storage driver btrfs failed: prerequisites for driver not satisfied"
        in caplog.text
    )


def test_overlay_on_overlay_and_on_tmpfs(tmp_path: Path) -> None:
    driver = select_driver(str(tmp_path), "overlay2", [], IdMap())
    layer = make_layer(driver, make_layer(driver))
    fd = driver.mount(layer)
    target = tmp_path / "target"
    target.mkdir()
    dockerd.move_mount(fd, "", dockerd.AT_FDCWD, str(target), dockerd.MOVE_MOUNT_F_EMPTY_PATH)
    os.close(fd)
    try:
        with pytest.raises(DockerError, match=r"driver not supported: overlay2 \(failed to mount overlay: "):
            select_driver(str(target), "overlay2", [], IdMap())
        nested = select_driver(str(target), "", [], IdMap())
        assert nested.name == "vfs" and nested.backing == "overlayfs"
        assert sorted(os.listdir(target)) == ["vfs"]
    finally:
        dockerd.umount(str(target), dockerd.MNT_DETACH)


@pytest.mark.parametrize(
    "name, options, text",
    [
        ("aufs", [], "the aufs storage-driver has been deprecated and removed"),
        ("zfs", [], "driver not supported: zfs"),
        (
            "btrfs",
            [],
            r"driver not supported: btrfs \(prerequisites for driver not satisfied \(wrong filesystem\?\)\)",
        ),
        (
            "overlay2",
            ["overlay2.size=10G"],
            "the storage option size is not supported: Filesystem does not support, or has not enabled",
        ),
        ("overlay2", ["dm.fs=xfs"], "overlay2: unknown option dm.fs$"),
        ("overlay2", ["nothing"], "unable to parse storage-opt key/value: nothing$"),
        ("vfs", ["x=y"], "unknown option x for vfs$"),
    ],
)
def test_what_is_refused(tmp_path: Path, name: str, options: list[str], text: str) -> None:
    with pytest.raises(DockerError, match="^error initializing graphdriver: .*" + text):
        select_driver(str(tmp_path), name, options, IdMap())
    assert os.listdir(tmp_path) == []


def test_an_option_of_old_is_accepted(tmp_path: Path) -> None:
    assert (
        select_driver(str(tmp_path), "overlay2", ["overlay2.override_kernel_check=true"], IdMap()).name
        == "overlay2"
    )


# State


def test_the_state_is_synced_when_there_are_descriptors_again(tmp_path: Path, monkeypatch: Any) -> None:
    """A thread that died of it would take every later change of state along."""
    tries = iter([OSError(errno.EMFILE, "Too many open files")] * 2)
    sync = dockerd._sync_file
    monkeypatch.setattr(dockerd, "STATE_SYNC", dockerd.StateSync())

    def failing(path: str) -> None:
        for error in tries:
            raise error
        sync(path)

    monkeypatch.setattr(dockerd, "_sync_file", failing)
    write_state(str(tmp_path / "state"), b"1", durable=False)
    wait_for(lambda: not dockerd.STATE_SYNC._pending, "the state to be synced")
    write_state(str(tmp_path / "state"), b"2", durable=False)
    wait_for(lambda: not dockerd.STATE_SYNC._pending, "the state to be synced")


def test_state_is_replaced_as_a_whole(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    write_state(str(path), {"a": [1, "ü"]})
    assert json.loads(read_state(str(path))) == {"a": [1, "ü"]}
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_state(str(path), b"plain", mode=0o644, durable=False)
    assert read_state(str(path)) == path.read_bytes() == b"plain"
    assert stat.S_IMODE(path.stat().st_mode) == 0o644
    dockerd.STATE_SYNC.flush()
    assert os.listdir(tmp_path) == ["state.json"]
    with pytest.raises(FileNotFoundError):
        read_state(str(tmp_path / "absent"))


def test_an_unsynced_version_keeps_the_synced_one_beside_it_for_100_ms(tmp_path: Path) -> None:
    path = tmp_path / "s"
    write_state(str(path), b"synced")
    for number in range(3):
        write_state(str(path), b"%d" % number, durable=False)
    assert Path(f"{path}.previous").read_bytes() == b"synced"
    deadline = time.monotonic() + 2
    while os.path.exists(f"{path}.previous") and time.monotonic() < deadline:
        time.sleep(0.01)
    assert os.listdir(tmp_path) == ["s"] and read_state(str(path)) == b"2"


@pytest.mark.parametrize("damage", [b"", b"\0" * 100, b"{\"half", None])
def test_a_power_cut_finds_the_version_before(tmp_path: Path, damage: bytes | None) -> None:
    path = tmp_path / "s"
    write_state(str(path), b"whole")
    write_state(str(path), b"newer", durable=False)
    with open(path, "r+b") as file:  # the name and the attribute reached the disk, the content did not
        if damage is None:
            file.truncate(3)
        else:
            file.truncate(0)
            file.write(damage)
    assert read_state(str(path)) == b"whole"
    dockerd.STATE_SYNC.flush()
    with pytest.raises(OSError, match="the file is damaged"):
        read_state(str(path))


def test_a_record_that_goes_away_does_not_stop_the_sync(tmp_path: Path) -> None:
    (tmp_path / "d").mkdir()
    write_state(str(tmp_path / "d/s"), b"1", durable=False)
    write_state(str(tmp_path / "kept"), b"1", durable=False)
    dockerd.remove_tree(str(tmp_path / "d"))
    dockerd.STATE_SYNC.flush()
    assert os.listdir(tmp_path) == ["kept"] and not dockerd.STATE_SYNC._pending


def test_what_is_written_together_is_synced_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At the end of the block; until then the version before stays beside it, and goes behind the block: at
    the latest when there is a newer one.  Other threads do as ever."""
    synced: list[str] = []
    monkeypatch.setattr(dockerd, "STATE_SYNC", dockerd.StateSync())
    monkeypatch.setattr(dockerd, "STATE_SYNC_INTERVAL", 1000)
    monkeypatch.setattr(dockerd, "syncfs", lambda fd: synced.append(os.readlink(f"/proc/self/fd/{fd}")))
    paths = [str(tmp_path / name) for name in "abc"]
    write_state(paths[0], b"old")
    with dockerd.STATE_SYNC.together(str(tmp_path)):
        write_state(paths[0], b"new")
        write_state(paths[1], b"new")
        dockerd.in_thread(write_state, paths[2], b"new")
        assert sorted(dockerd.STATE_SYNC._pending) == paths[:2] and synced == []
        assert Path(f"{paths[0]}.previous").read_bytes() == b"old"
    assert synced == [str(tmp_path)]
    write_state(paths[0], b"newer", durable=False)
    assert Path(f"{paths[0]}.previous").read_bytes() == b"new"
    files = list[str]()
    with monkeypatch.context() as watched:
        watched.setattr(dockerd, "_sync_file", files.append)
        dockerd.STATE_SYNC.flush()
    assert files == [paths[0], str(tmp_path)] and not dockerd.STATE_SYNC._pending
    assert sorted(os.listdir(tmp_path)) == ["a", "b", "c"]
    with pytest.raises(KeyError), dockerd.STATE_SYNC.together(str(tmp_path)):
        write_state(paths[1], b"newer")
        raise KeyError
    assert len(synced) == 2 and set(dockerd.STATE_SYNC._pending.values()) == {0}
    dockerd.STATE_SYNC.flush()
    write_state(paths[0], b"newest")  # is durable again
    assert not dockerd.STATE_SYNC._pending


WRITER = """
import sys
import dockerd
dockerd.write_state(sys.argv[1], b"old" * 1000)
try:
    dockerd.write_state(sys.argv[1], b"new" * 1000, durable=sys.argv[2] == "durable")
except OSError as error:
    print(error.strerror)
"""


@pytest.mark.parametrize("durable", ["durable", "grouped"])
@pytest.mark.parametrize("point", ["state-write", "state-rename"])
@pytest.mark.parametrize("action", ["kill", "enospc"])
def test_failing_at_every_step_leaves_the_old_version(
    tmp_path: Path, point: str, action: str, durable: str
) -> None:
    path = tmp_path / "s"
    environment = {**os.environ, "DOCKERD_FAILPOINTS": f"{point}={action}@2",
                   "PYTHONPATH": os.path.dirname(os.path.abspath(dockerd.__file__))}
    done = subprocess.run(
        [sys.executable, "-c", WRITER, str(path), durable], env=environment, capture_output=True, text=True
    )
    assert read_state(str(path)) == b"old" * 1000
    left = [name for name in os.listdir(tmp_path) if name != "s"]
    if action == "kill":
        assert done.returncode == -signal.SIGKILL and all(name.startswith(".tmp-s") for name in left)
    else:
        assert done.stdout == "No space left on device\n" and left == [], done.stderr


# ------------------------------------------------------------------------------------------------------------
# Builder
#
# The corpus: Dockerfiles, each built by us and by the real dockerd 20.10.24 from the same context.  What both
# print, the image's configuration, history and files, and the containers that stay are compared; then the
# last one is built again, from the cache.  What BuildKit alone can do is checked by the Dockerfile reference.
# ------------------------------------------------------------------------------------------------------------

BUILD_API = "/v1.41"  # the newest that both speak
CONTEXT_TIME = 1_600_000_000


class Build(NamedTuple):
    """One POST /build: the Dockerfile (None: there is none), the other files of the context, the query."""

    dockerfile: Any
    files: dict[str, Any]
    query: dict[str, Any]


def build(dockerfile: Any, files: Optional[dict[str, Any]] = None, /, **query: Any) -> Build:
    """A Build; `query` takes lists for what may be repeated and dictionaries for JSON."""
    return Build(dockerfile, files or {}, query)


def based(dockerfile: str, files: Optional[dict[str, Any]] = None, /, **query: Any) -> Build:
    """A Build of these instructions on busybox."""
    return build("FROM busybox\n" + dockerfile, files, **query)


def special(kind: bytes, link: str = "", mode: int = 0o644, **facts: Any) -> tarfile.TarInfo:
    """A tar entry without data; `facts` are further attributes of TarInfo."""
    entry = tarfile.TarInfo()
    entry.type, entry.linkname, entry.mode = kind, link, mode
    for name, value in facts.items():
        setattr(entry, name, value)
    return entry


def symlink(target: str) -> tarfile.TarInfo:
    """A symbolic link, as an entry of tar_of."""
    return special(tarfile.SYMTYPE, target, 0o777)


def context_of(dockerfile: Any, files: dict[str, Any]) -> bytes:
    """The tar archive of a build's context."""
    if dockerfile is not None:
        files = {"Dockerfile": dockerfile.encode() if isinstance(dockerfile, str) else dockerfile, **files}
    return tar_of(files, CONTEXT_TIME)


def post_build(host: Host, context: Any, query: dict[str, Any], **headers: str) -> Answer:
    """POST /build as a client of 20.10 sends it."""
    text = {name: json.dumps(value) if isinstance(value, dict) else value for name, value in query.items()}
    return host.http("POST", f"{BUILD_API}/build?{urllib.parse.urlencode(text, doseq=True)}", context,
                     {"Content-Type": "application/x-tar", **headers})


class Ids:
    """Identities by the order in which they are seen: what differs in each run becomes comparable."""

    def __init__(self, host: Host) -> None:
        self.host, self.seen = host, {}  # type: ignore[var-annotated]

    def replace(self, text: str) -> str:
        """`text` with its identities numbered; what tells of the daemon's own files is cut off."""
        text = re.sub(r"(?<=:)[^:\"]*" + re.escape(self.host.data_root) + r"[^\"]*", " ...", text)
        text = re.sub(r"(failed to copy files: )[^\"]+", r"\1...", text)
        text = text.replace("Error processing tar file(exit status 1): ", "")
        text = re.sub(r"(registry-1\.docker\.io/)[^}]*(network is unreachable|no such host)", r"\1...", text)
        return re.sub(r"\b(sha256:)?([0-9a-f]{12})([0-9a-f]{52})?\b", self._number, text)

    def _number(self, found: Any) -> str:
        return f"<{self.seen.setdefault(found[2], len(self.seen))}>"


def printed(answer: Answer, ids: Ids) -> list[Any]:
    """The lines of a build's stream: text that follows text becomes one, as its pieces mean nothing, and
    downloads are left out."""
    lines: list[Any] = [answer.status]
    for line in answer.lines:
        if not line or "progressDetail" in line:
            continue
        line = json.loads(ids.replace(json.dumps(line)))
        if list(line) == ["stream"] and isinstance(lines[-1], str):
            lines[-1] = (lines[-1] + line["stream"]).replace("\x1b[0m\x1b[91m", "")
        else:
            lines.append(line["stream"] if list(line) == ["stream"] else line)
    return lines


class Seen(NamedTuple):
    """A file of an image; its time is "now" for a new one, its data a digest where there is much."""

    kind: bytes
    mode: str
    uid: int
    gid: int
    link: str
    time: Any
    attributes: dict[str, str]
    data: Optional[bytes]


def seen_file(tar: tarfile.TarFile, entry: tarfile.TarInfo) -> Seen:
    """The file of an exported archive's entry."""
    data = tar.extractfile(entry).read() if entry.isreg() else None  # type: ignore[union-attr]
    if data and len(data) > 200:
        data = hashlib.sha256(data).digest()
    return Seen(entry.type, oct(stat.S_IMODE(entry.mode)), entry.uid, entry.gid, entry.linkname,
                "now" if BEGAN - 600 < entry.mtime < time.time() + 600 else int(entry.mtime),
                {key: value for key, value in entry.pax_headers.items() if "xattr" in key}, data)


@functools.cache
def image_tree(host: Host, image: str) -> dict[str, Seen]:
    """The files of an image, as a container that is not started exports them."""
    made = host.http("POST", f"{BUILD_API}/containers/create", {"Image": image, "Cmd": ["x"]})
    assert made.status == 201, made.body
    path = f"{BUILD_API}/containers/{made.json['Id']}"
    archive = host.http("GET", f"{path}/export").body
    assert host.http("DELETE", f"{path}?v=1").status == 204
    with tarfile.open(fileobj=io.BytesIO(archive)) as tar:
        return {entry.name.rstrip("/"): seen_file(tar, entry) for entry in tar}


@functools.cache
def base_image(host: Host) -> dict[str, Any]:
    """The inspection of the image that nearly all Dockerfiles start from."""
    return host.http("GET", f"{BUILD_API}/images/busybox/json").json


def seen_image(host: Host, image: str) -> dict[str, Any]:
    """What is told of an image, without what differs in each run; its history; how its files differ from the
    base's."""
    told = host.http("GET", f"{BUILD_API}/images/{image}/json").json
    created = abs(time.time() - dockerd.parse_timestamp(told.pop("Created")) / 1e9) < 600
    tree: dict[str, Optional[Seen]] = {}
    if told["RootFS"].get("Layers") and told["RootFS"] != base_image(host)["RootFS"]:
        found, base = image_tree(host, image), image_tree(host, base_image(host)["Id"])
        tree = {path: found.get(path) for path in {**base, **found} if found.get(path) != base.get(path)}
    for name in ("Id", "DockerVersion", "GraphDriver", "Metadata"):
        told.pop(name)
    for name in ("Container", "ContainerConfig"):  # which no Docker tells any more
        told.pop(name)
    for name in ("Hostname", "Image"):  # nor these
        told["Config"].pop(name)
    told.update(created=created, RootFS=len(told["RootFS"].get("Layers") or []), Parent=told["Parent"][:7],
                RepoTags=sorted(told["RepoTags"]))
    history = host.http("GET", f"{BUILD_API}/images/{image}/history").json
    for line in history:
        line.update(Id=line["Id"][:7], CreatedBy=re.sub("[0-9a-f]{64}", "DIGEST", line["CreatedBy"]))
        del line["Created"]
    return {"inspect": told, "history": history, "tree": tree}


def seen_build(host: Host, step: Build, name: str) -> dict[str, Any]:
    """Build, and all that there is to see of it: the stream, the image, the containers left."""
    context = None if "remote" in step.query else context_of(step.dockerfile, step.files)
    answer = post_build(host, context, {"t": name, **step.query})
    containers = host.http("GET", f"{BUILD_API}/containers/json?all=1").json
    seen = {"printed": printed(answer, Ids(host)),
            "containers": [(container["Command"], container["State"]) for container in containers]}
    for container in containers:
        host.http("DELETE", f"{BUILD_API}/containers/{container['Id']}?v=1")
    images = re.findall(rb"sha256:[0-9a-f]{64}", answer.body)
    if images and b'"error"' not in answer.body:
        seen.update(seen_image(host, images[-1].decode()))
    return seen


TREE_TAR = tar_of({"f": b"f", "d": None, "d/x": (b"x", 0o755), "l": symlink("f"),
                   "o": special(tarfile.REGTYPE, uid=1000, gid=100, mode=0o600),
                   "h": special(tarfile.LNKTYPE, "f")}, 1_400_000_000)
BOB_TREE = {"d": None, "d/one": b"1", "d/sub": None, "d/sub/two": (b"2", 0o755)}
CORPUS: dict[str, list[Build]] = {
    # The language
    "comments": [build("# first\n   # indented\n\nFROM busybox\n\n  LABEL a=1 \\\n# between\n\n"
        "    # indented\n" "  b=2\nCMD echo \\\n  # kept out\n  # again\n   a  b\n#last")],
    "lower-case": [build("from busybox as x\nLabel a=1\ncMd [\"a\"]")],
    "escape-directive": [build("# escape=`\nFROM busybox\nWORKDIR c:\\x`\n  y\nENV a=`\"q`\" b=\\n")],
    "escape-after-comment": [build("# comment\n# escape=`\nFROM busybox\nLABEL a=1 \\\n b=2")],
    "syntax-directive": [build("# syntax=docker/dockerfile:1\n# escape=`\nFROM busybox\nLABEL a=1 `\n b=2")],
    "crlf": [build("FROM busybox\r\nLABEL a=1 \\\r\n  b=2\r\n# x\r\nCMD echo hi\r\nENV x y")],
    "bom": [build(b"\xef\xbb\xbfFROM busybox\nLABEL a=1")],
    "tabs": [build("\tFROM\tbusybox\n\tLABEL\ta=1\tb=2\n ENV\tx\ty\tz")],
    "no-dockerfile": [build(None, {"x": b""})],
    "other-dockerfile": [build(None, {"sub/D.x": b"FROM busybox\nLABEL x=1\nCOPY sub/D.x /"},
        dockerfile="sub/D.x")],
    "dockerfile-outside": [build("FROM busybox", dockerfile="../Dockerfile")],
    "lower-case-dockerfile": [build(None, {"dockerfile": b"FROM busybox\nLABEL x=y\n"})],
    "continued-at-the-end": [based("LABEL a=1 \\\n")],
    "long-line": [based("LABEL a=" + "x" * 65536)],
    "json-broken": [based("CMD [ \"a\", 'b' ]\nENTRYPOINT [\"x\" \"y\"]")],

    # FROM
    "from-alone": [based("")],
    "from-scratch-alone": [build("FROM scratch")],
    "from-scratch-label": [build("FROM scratch\nLABEL a=1")],
    "from-bad-reference": [build("FROM Busy_Box!")],
    "from-argument": [build("ARG base=busy\nARG more=${base}box\nFROM $more\nARG base\n"
        "LABEL b=$base m=$more")],
    "from-argument-given": [build("ARG base=none\nFROM ${base}", buildargs={"base": "busybox"})],
    "from-argument-missing": [build("FROM ${base}")],
    "from-platform": [build("FROM --platform=linux/amd64 busybox\nLABEL p=1")],
    "from-stage": [build("FROM busybox AS one\nLABEL a=1\nFROM one\nLABEL b=2\nFROM ONE AS Three\n"
        "LABEL c=3")],
    "from-stage-twice": [build("FROM busybox AS one\nLABEL a=1\nFROM busybox AS one\nLABEL a=2\n"
        "FROM one\nLABEL c=3")],

    # RUN
    "run": [based("RUN echo out; sleep 0.2; echo err >&2; sleep 0.2; echo data >/file; mkdir -m 700 /d; "
        "ln -s file /l; ln file /h; chown 5:6 /d; printf end")],
    "run-exec": [based('ENV x=1\nRUN ["/bin/sh", "-c", "echo $x \\"q\\"; rm /etc/plain; rm -r /home"]')],
    "run-fails": [based("LABEL a=1\nRUN echo bad; exit 3\nRUN echo never")],
    "run-fails-exec": [based('RUN ["sh", "-c", "exit 4"]')],
    "run-fails-kept": [based("RUN exit 5", forcerm="1")],
    "run-keeps-containers": [based("RUN true\nLABEL a=1", rm="0")],
    "run-nothing": [based("RUN")],
    "run-environment": [based("ARG a=1\nENV b=2 PATH=/bin\nARG b=3\nUSER bob:users\nWORKDIR /tmp\n"
        "RUN echo $a $b $HOME; id; pwd; env | sort | grep -v HOSTNAME; umask")],
    "run-user-unknown": [based("USER nobody\nRUN true")],
    "run-continued": [based("RUN echo a && \\\n    # why\n    echo   'b  c' \\\n\n && echo d")],

    # COPY
    "copy": [based("COPY a /\nCOPY b /x\nCOPY b /new/dir/\nCOPY c /new/c", {"a": b"1", "b": (b"22", 0o4755),
        "c": (b"", 0o600)})],
    "copy-directory": [based("COPY d /e\nCOPY d /f/\nCOPY d/sub d/one /g/", BOB_TREE)],
    "copy-all": [based("WORKDIR /w/x\nCOPY . .\nCOPY ./ ../y/", BOB_TREE)],
    "copy-owners": [based("COPY . /x/", {"f": special(tarfile.REGTYPE, uid=1000, gid=5, mode=0o2640),
        "d": special(tarfile.DIRTYPE, uid=7, mode=0o1770)})],
    "copy-json": [based('COPY ["a b", "c", "/x y/"]', {"a b": b"1", "c": b"2"})],
    "copy-wildcards": [based("COPY *.txt /t/\nCOPY d?/[ab] /u/\nCOPY d* /v/\nCOPY d1/[^a] /w", {"a.txt": b"1",
        "b.txt": b"2", "c.tx": b"3", "d1/a": b"4", "d2/b": b"5", "d1/c": b"6"})],
    "copy-wildcard-escaped": [based("COPY a[[]1] /x\nCOPY b\\* /y", {"a[1]": b"1", "b*": b"2", "bx": b"3"})],
    "copy-wildcard-matches-nothing": [based("COPY x* /", {"a": b"1"})],
    "copy-missing": [based("COPY x /", {"a": b"1"})],
    "copy-one-argument": [based("COPY x", {"x": b"1"})],
    "copy-many-to-file": [based("COPY a b /x", {"a": b"1", "b": b"2"})],
    "copy-wildcard-to-file": [based("COPY * /x", {"a": b"1", "b": b"2"})],
    "copy-over-directory": [based("COPY a /bin\nCOPY a /etc/\nCOPY a /etc/plain", {"a": b"1"})],
    "copy-directory-over-file": [based("COPY d /etc/plain", BOB_TREE)],
    "copy-below-file": [based("COPY d/one /etc/plain/x", BOB_TREE)],
    "copy-through-links": [based("RUN mkdir -p /real/in && echo r >/real/f && ln -s real /link && "
        "ln -s /real/f /flink && ln -s ../../out /real/in/up && ln -s gone /dangling\n"
        "COPY d/one /link/x\nCOPY d/one /flink\nCOPY d /real/in/up/\nCOPY d /link\n" "COPY d/one /dangling",
        BOB_TREE)],
    "copy-links": [based("COPY link /a\nCOPY dlink /b\nCOPY dlink /c/\nCOPY dlink/sub /s\nCOPY . /d",
        {**BOB_TREE, "link": symlink("d/one"), "dlink": symlink("d"), "d/dangling": symlink("nowhere")})],
    "copy-hard-links": [based("COPY . /x", {"a": b"1", "b": special(tarfile.LNKTYPE, "a"),
        "c/d": special(tarfile.LNKTYPE, "a")})],
    "copy-special": [based("COPY . /x", {"fifo": special(tarfile.FIFOTYPE), "cap": special(tarfile.REGTYPE,
        pax_headers={"SCHILY.xattr.security.capability": "\1\0\0\2\1" + "\0" * 15})})],
    "copy-empty-directory": [based("COPY e /e\nCOPY e /f/", {"e": special(tarfile.DIRTYPE, mode=0o700)})],
    "copy-chown": [based("COPY --chown=bob a /1\nCOPY --chown=bob:users a /2\nCOPY --chown=7 a /3\n"
        "COPY --chown=7:100 d /new/4\nCOPY --chown=1000:wheel d /5/\nARG who=daemon\n"
        "COPY --chown=$who a /6\nCOPY --chown=bob a /7/8/9", {"a": b"1", **BOB_TREE})],
    "copy-chown-unknown": [based("COPY --chown=nobody a /1", {"a": b"1"})],
    "copy-chown-unknown-group": [based("COPY --chown=bob:nobody a /1", {"a": b"1"})],
    "copy-chown-scratch": [build("FROM scratch\nCOPY --chown=3:4 d /x/\nCOPY --chown=5 d/one /y", BOB_TREE)],
    "copy-chown-scratch-name": [build("FROM scratch\nCOPY --chown=bob d /x/", BOB_TREE)],
    "copy-chown-replaces": [based("COPY --chown=bob d /home\nCOPY --chown=daemon d/one /etc/plain",
        BOB_TREE)],
    "copy-flag": [based("COPY --what a /", {"a": b"1"})],
    "copy-flag-twice": [based("COPY --chown=1 --chown=2 a /", {"a": b"1"})],
    "copy-flag-empty": [based("COPY --chown a /", {"a": b"1"})],
    "copy-after-user": [based("USER bob\nWORKDIR /w\nCOPY a .\nCOPY a b/c/\nRUN id -un", {"a": b"1"})],
    "copy-expands": [based("ARG s=a\nENV t=/x/ u='q r'\nCOPY ${s} $t\nCOPY $s \"$t$u\"", {"a": b"1"})],

    # ADD
    "add": [based("ADD a /\nADD d /e/\nADD --chown=bob:bob a /x/y", {"a": b"1", **BOB_TREE})],
    "add-archives": [based("ADD t.tar /t\nADD t.tar.gz /u/\nADD *.bz2 *.xz /v/\nADD bad.tar /b/\n"
        "COPY t.tar /c/\n" "ADD t.zip /z/", {"t.tar": TREE_TAR, "t.tar.gz": gzip.compress(TREE_TAR, mtime=0),
        "t.bz2": bz2.compress(TREE_TAR), "t.xz": lzma.compress(TREE_TAR), "bad.tar": b"no archive",
        "t.zip": b"PK\3\4"})],
    "add-archive-chown": [based("ADD --chown=bob t.tar /t", {"t.tar": TREE_TAR})],
    "add-archive-over": [based("ADD t.tar /\nADD t.tar /etc/plain/", {"t.tar": tar_of({"etc/plain": b"new",
        "home/x": b"1"})})],
    "add-compressed-file": [based("ADD x.gz /y.gz", {"x.gz": gzip.compress(b"text", mtime=0)})],
    "add-missing": [based("ADD x /")],
    "add-file-url": [based("ADD file:///etc/passwd /x")],
    "add-bad-url": [based("ADD http://127.0.0.1:1/x /x")],
    "add-url": [based("ADD http://127.0.0.1:8000/dir/file.txt /x\n"
        "ADD http://127.0.0.1:8000/dir/file.txt?q=1 /d/\n"
        "ADD --chown=bob http://127.0.0.1:8000/t.tar /d/\nADD http://127.0.0.1:8000/named /d/")],
    "add-url-missing": [based("ADD http://127.0.0.1:8000/gone /x")],
    "add-url-redirected": [based("ADD http://127.0.0.1:8000/moved /x")],
    "copy-url": [based("COPY http://127.0.0.1:8000/dir/file.txt /x")],

    # Contexts that come from elsewhere
    "remote-dockerfile": [build(None, remote="http://127.0.0.1:8000/Dockerfile")],
    "remote-context": [build(None, remote="http://127.0.0.1:8000/context.tar")],
    "remote-missing": [build(None, remote="http://127.0.0.1:8000/gone")],
    "remote-else": [build(None, remote="http://127.0.0.1:8000/named")],
    "remote-unknown": [build(None, remote="ftp://127.0.0.1/x")],

    # Contexts that mean harm
    "hostile-link-out": [based("COPY d/passwd /x", {"d": symlink("/etc")})],
    "hostile-link-up": [based("COPY d/passwd /x", {"d": symlink("../../../../../../../etc")})],
    "hostile-link-to-file": [based("COPY passwd /x", {"passwd": symlink("/etc/passwd")})],
    "hostile-link-kept": [based("COPY . /x", {"passwd": symlink("/etc/passwd"), "loop": symlink("loop")})],
    "hostile-loop": [based("COPY loop /x", {"loop": symlink("loop")})],
    "hostile-through-link": [based("COPY . /x", {"l": symlink("/"), "l/evil": b"1", "up": symlink("../.."),
        "up/evil2": b""})],
    "hostile-names": [based("COPY . /x", {"a\nb": b"1", "\x1b[31m": b"2", "b\udcff": b"3", "-rf": b"",
        " ": b"", "\\": b""})],
    "hostile-name-copied": [based('COPY ["a\\nb", "/x\\ny"]', {"a\nb": b"1"})],
    "hostile-up": [based("COPY ../x /x", {"x": b"1"})],
    "hostile-entry-absolute": [based("COPY . /x", {"/abs/f": b"1"})],
    "hostile-dockerfile-link": [build(None, {"Dockerfile": symlink("/etc/passwd")})],
    "hostile-dockerfile-directory": [build(None, {"Dockerfile": None, "Dockerfile/x": b""})],
    "hostile-ignore-link": [based("COPY . /x", {".dockerignore": symlink("/etc/passwd"), "a": b""})],
    "dockerfile-link": [build(None, {"Dockerfile": symlink("d/real"),
        "d/real": b"FROM busybox\nLABEL linked=1\n"})],
    "destination-link-out": [based("RUN ln -s /../../../etc /out && ln -s /proc/1/root /proot\n"
        "COPY a /out/\nCOPY a /proot/b", {"a": b"1"})],

    # .dockerignore
    "ignore": [based("COPY . /x",
        {".dockerignore": b"# comment\n\n*.o\n!keep.o\n**/*.tmp\nd/sub\n!d/sub/two\n/rooted\n./dotted\n"
        b"  spaced  \nq/\nz/*/y\n**/deep/**\nDockerfile\n.dockerignore", "a.o": b"", "keep.o": b"",
        "s/b.o": b"", "s/c.tmp": b"", "c.tmp": b"", **BOB_TREE, "d/sub/three": b"", "rooted": b"",
        "dotted": b"", "spaced": b"", "q/x": b"", "z/1/y": b"", "z/1/w": b"", "m/deep/n/o": b"",
        "m/p": b""})],
    "ignore-all-but": [based("COPY . /x", {".dockerignore": b"*\n!d\nd/one", "a": b"", **BOB_TREE})],
    "ignore-bad-pattern": [based("COPY . /x", {".dockerignore": b"[a", "a": b""})],

    # ENV and ARG
    "env": [based('ENV a=1 b="x y" c=z\\ w d=\'$a\'\nENV e $a and  more\n'
        'ENV a=2 f=$a g=${a}b h=${b:-n} i=${n:-d} '
        'j=${a:+p} k=${n:+p} l=\\$a m="\\"$a\\""\nENV PATH=$PATH:/x')],
    "env-unclosed": [based("ENV a=${b")],
    "env-quote-unclosed": [based("ENV a='b")],
    "arg": [based("ARG a\nARG b=1\nARG c=$b\nARG d=x\nENV d=env\nLABEL a=$a b=$b c=$c d=$d\n"
        "RUN echo $a,$b,$c,$d", buildargs={"a": "A", "d": "D"}),
        based("ARG a\nARG b=1\nARG c=$b\nARG d=x\nENV d=env\nLABEL a=$a b=$b c=$c d=$d\n"
        "RUN echo $a,$b,$c,$d", buildargs={"a": "B", "d": "D"})],
    "arg-not-declared": [based("LABEL x=$a", buildargs={"a": "1"})],
    "arg-predefined": [based("RUN echo $HTTP_PROXY $no_proxy", buildargs={"HTTP_PROXY": "http://p",
        "no_proxy": "x"}), based("RUN echo $HTTP_PROXY $no_proxy", buildargs={"HTTP_PROXY": "http://q"}),
        based("ARG HTTP_PROXY\nRUN echo $HTTP_PROXY $no_proxy", buildargs={"HTTP_PROXY": "http://q"})],
    "arg-null": [based("ARG a=1\nENV a=$a", buildargs={"a": None})],
    "arg-per-stage": [build("ARG g=G\nFROM busybox\nARG g\nARG a=1\nLABEL x=$g-$a\nFROM busybox\n"
        "LABEL x=$g-$a\nARG g=other\nLABEL y=$g")],
    "arg-two": [based("ARG a=1 b=2\nLABEL x=$a$b")],
    "arg-two-words": [based("ARG a b")],

    # What changes the configuration alone
    "label": [based('LABEL a=1 "b c"="d e" f=\'g h\' i=j\\ k\nLABEL old form  here\nLABEL a=2 n=\n'
        'LABEL "q"=\'"\'')],
    "maintainer": [based("MAINTAINER Bob <bob@example.com>")],
    "commands": [based('CMD a b\nENTRYPOINT ["x", "y"]\nCMD ["c"]\nENTRYPOINT z $HOME')],
    "entrypoint-resets": [based('ENTRYPOINT ["x"]')],
    "entrypoint-empty": [based('ENTRYPOINT []\nCMD []')],
    "command-nothing": [based("CMD")],
    "entrypoint-nothing": [based("ENTRYPOINT")],
    "shell": [based('SHELL ["/bin/busybox", "sh", "-c"]\nRUN echo $0\nCMD x\nENTRYPOINT y\n'
        'HEALTHCHECK CMD z')],
    "stopsignal": [based("ARG s=SIGUSR1\nSTOPSIGNAL $s\nSTOPSIGNAL 9")],
    "stopsignal-bad": [based("STOPSIGNAL SIGFOO")],
    "stopsignal-two": [based("STOPSIGNAL 1 2")],
    "user": [based("ENV u=bob\nUSER $u\nUSER 1:2")],
    "user-two": [based("USER a b")],
    "expose": [based("ENV p=7000-7002\nEXPOSE 80 443/tcp 53/UDP\nEXPOSE $p/tcp 8080:90 127.0.0.1:1:2")],
    "expose-bad": [based("EXPOSE foo")],
    "expose-proto": [based("EXPOSE 80/foo")],
    "healthcheck": [based("HEALTHCHECK --interval=5m --timeout=3s --start-period=1s --retries=2 "
        "CMD a  b || c\n" 'HEALTHCHECK cmd ["x", "y"]')],
    "healthcheck-none": [based("HEALTHCHECK CMD a\nHEALTHCHECK NONE")],
    "workdir": [based("WORKDIR /a\nWORKDIR b\nENV d=c/../e\nWORKDIR $d\nWORKDIR ../f\nWORKDIR /home/bob\n"
        "RUN pwd")],
    "workdir-owner": [based("USER bob\nWORKDIR /w/x")],
    "workdir-file": [based("WORKDIR /etc/plain")],
    "workdir-link": [based("RUN ln -s /new/place /l && mkdir -p /new/place\nWORKDIR /l/sub\nRUN pwd")],
    "workdir-scratch": [build("FROM scratch\nWORKDIR /a/b")],
    "volume": [based("RUN mkdir /v && echo before >/v/a\nVOLUME /v\nRUN echo after >/v/b; ls /v\n"
        "COPY c /v/\nRUN ls /v", {"c": b"1"})],
    "volume-forms": [based('ENV v=/e\nVOLUME /a /b\nVOLUME ["/c d", "$v"]')],
    "volume-relative": [based("VOLUME rel")],

    # ONBUILD
    "onbuild": [based("ONBUILD COPY a /a\nONBUILD RUN echo triggered\nONBUILD LABEL x=1\nONBUILD ARG q\n"
        "LABEL base=1"), build("FROM corpus:onbuild\nLABEL y=2", {"a": b"1"}, t="corpus:onbuild-2"),
        build("FROM corpus:onbuild-2\nLABEL z=3", t="corpus:onbuild-3")],
    "onbuild-one": [based("ONBUILD label x=1"), build("FROM corpus:onbuild-one as base\nFROM base\nLABEL y=2",
        t="corpus:onbuild-one-2")],
    "onbuild-fails": [based("ONBUILD COPY gone /a"), build("FROM corpus:onbuild-fails", t="corpus:x")],
    "onbuild-unknown": [based("ONBUILD FOO x")],

    # Stages
    "stages": [build("FROM busybox AS one\n"
        "RUN mkdir /o && echo 1 >/o/f && chown -R bob:users /o && ln -s f /o/l\nFROM scratch AS two\n"
        "COPY --from=one /o /p\nCOPY --from=0 --chown=9:9 /o/f /o/l /q/\nFROM busybox\n"
        "COPY --from=two p/* /r/\nCOPY --from=ONE o /s\nLABEL x=1")],
    "stages-target": [build("FROM busybox AS one\nLABEL a=1\nFROM busybox AS Two\nLABEL b=2\n"
        "FROM busybox\nRUN exit 1", target="two")],
    "stages-from-image": [build("FROM scratch\nCOPY --from=busybox /etc/plain /bin/sh /x/")],
    "stages-from-missing-file": [build("FROM busybox AS one\nFROM busybox\nCOPY --from=one /none /x")],
    "stages-from-self": [build("FROM busybox AS one\nCOPY --from=one /etc/plain /x")],
    "stages-from-number": [build("FROM busybox AS one\nCOPY --from=5 /etc/plain /x")],
    "stages-from-negative": [build("FROM busybox AS one\nCOPY --from=-1 /etc/plain /x")],
    "stages-from-bad": [build("FROM busybox AS one\nCOPY --from=A! /etc/plain /x")],
    "stages-from-scratch": [build("FROM busybox AS one\nCOPY --from=scratch /etc/plain /x")],

    # The cache
    "cache-content": [based("COPY a /\nLABEL x=1", {"a": b"1"}), based("COPY a /\nLABEL x=1", {"a": b"2"})],
    "cache-mode": [based("COPY a /", {"a": b"1"}), based("COPY a /", {"a": (b"1", 0o755)})],
    "cache-owner": [based("COPY d /", {"d/a": special(tarfile.REGTYPE)}), based("COPY d /",
        {"d/a": special(tarfile.REGTYPE, uid=5)})],
    "cache-time": [based("COPY d /", {"d": None, "d/t": special(tarfile.REGTYPE)}), based("COPY d /",
        {"d": special(tarfile.DIRTYPE, mode=0o755, mtime=5), "d/t": special(tarfile.REGTYPE, mtime=1)})],
    "cache-name": [based("COPY . /x", {"a": b"1"}), based("COPY . /x", {"b": b"1"})],
    "cache-env": [based("ENV a=1\nRUN echo $a"), based("ENV a=2\nRUN echo $a")],
    "cache-off": [based("RUN echo a"), based("RUN echo a", nocache="1")],
    "cache-other-image": [based("LABEL o=1", t="corpus:c1"), based("LABEL o=1", cachefrom='["corpus:c1"]'),
        based("LABEL o=1\nLABEL o=2", cachefrom='["busybox"]')],
    "cache-stage": [build("FROM busybox AS s\nCOPY a /\nFROM busybox\nCOPY --from=s /a /b", {"a": b"1"}),
        build("FROM busybox AS s\nCOPY a /\nFROM busybox\nCOPY --from=s /a /b", {"a": b"3"})],
    "cache-middle": [based("LABEL a=1\nLABEL b=2\nLABEL c=3"), based("LABEL a=1\nLABEL b=4\nLABEL c=3")],

    # The query
    "quiet": [based("RUN echo unheard", q="1")],
    "quiet-fails": [based("RUN echo heard; exit 2", q="1")],
    "tags": [based("LABEL t=1", t=["corpus:t1", "corpus:t2", "other"])],
    "tag-none": [based("LABEL t=none", t="")],
    "labels": [based("LABEL a=1 b=2", labels={"b": "3", "z": "$a", "c": "x'y"})],
    "limits": [based("RUN ulimit -n; df -k /dev/shm | tail -n 1 | awk '{print $2}'; cat /etc/hosts | grep h1",
        ulimits='[{"Name":"nofile","Soft":512,"Hard":600}]', shmsize="1048576", memory="67108864",
        networkmode="none", extrahosts="h1:1.2.3.4")],
    "network-host": [based("RUN ls /sys/class/net", networkmode="host")],
    "network-unknown": [based("RUN echo no network", networkmode="nowhere")],
}

REFUSED_FILES: list[Any] = [  # on busybox, unless it is a whole Build
    build("# escape=`\n# escape=\\\nFROM busybox"), build("# escape=x\nFROM busybox"), build(""),
    build("# nothing\n"), "RUNN echo", build("FORM busybox"), build("LABEL a=1\nFROM busybox"),
    "STOPSIGNAL\nCMD x\nFOO", "CMD [\"a\", 1]", build("FROM"), build("FROM busybox x"),
    build("FROM busybox AS 1a"), build("FROM --what=x busybox"), "COPY", "ENV a", "ENV =1", "ENV a=1 b",
    "ENV", "ENV a=${b:?must be}", "ARG", "ARG =x", "LABEL", "LABEL a", "MAINTAINER", "SHELL /bin/sh -c",
    "SHELL", "SHELL []", "USER", "EXPOSE", "HEALTHCHECK FOO a", "HEALTHCHECK", "HEALTHCHECK CMD",
    "HEALTHCHECK NONE x", "HEALTHCHECK --what=1 CMD a", "HEALTHCHECK --interval=x CMD a",
    "HEALTHCHECK --retries=0 CMD a", "WORKDIR", "VOLUME", 'VOLUME [""]', "ONBUILD", "ONBUILD ONBUILD RUN x",
    "ONBUILD FROM x", "ONBUILD MAINTAINER x",
    build("FROM busybox AS one\nLABEL a=1", target="x"),
    build("FROM busybox AS one\nFROM busybox\nADD --from=one /etc/plain /x"),
    based("RUN true", isolation="hyperv"),
]


WEB_FILES = {
    "/": b"root", "/dir/file.txt": b"text", "/t.tar": TREE_TAR, "/named": b"named", "/short": b"short",
    "/dateless": b"dateless",
    "/Dockerfile": b"FROM busybox\nLABEL remote=1",
    "/context.tar": context_of("FROM busybox\nCOPY a /\n", {"a": b"remote"}),
}
WEB = f"""
import http.server, time

class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path.startswith("/slow"):
            self.send_response(200)
            self.end_headers()
            open("asked", "w").close()
            while True:
                self.wfile.write(b".")
                time.sleep(0.05)
        place = {{"/moved": "/dir/file.txt", "/evil": "file:///etc/passwd"}}.get(self.path)
        data = {WEB_FILES!r}.get(self.path.partition("?")[0])
        self.send_response(302 if place else 404 if data is None else 200)
        headers = {{"Location": place, "Content-Length": "9" if self.path == "/short" else None,
                   "Last-Modified": "soon" if self.path == "/dateless" else "Fri, 01 Jan 2016 00:00:00 GMT",
                   "Content-Type": "application/x-tar" if "tar" in self.path else "text/plain",
                   "Content-Disposition": 'attachment; filename="given"' if self.path == "/named" else None}}
        for name, value in headers.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        self.wfile.write(data or b"")

    do_HEAD = do_GET

server = http.server.ThreadingHTTPServer(("127.0.0.1", 8000), Handler)
print("ready", flush=True)
server.serve_forever()
"""


@contextlib.contextmanager
def building(host: Host) -> Iterator[Host]:
    """A host that forwards as a bridge would have it, with a web server at 127.0.0.1:8000."""
    host.enter("sh", "-c", "echo 1 >/proc/sys/net/ipv4/ip_forward").wait()
    with host.enter(sys.executable, "-c", WEB, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as server:
        assert server.stdout and server.stdout.readline() == b"ready\n"
        yield host
        server.kill()


@pytest.fixture(scope="session")
def builder(bridgeless: Host) -> Iterator[Host]:
    """The host that builds."""
    with building(bridgeless) as host:
        yield host


@pytest.fixture(scope="session")
def real_builder(shared_peer: Host) -> Iterator[Host]:
    """The real dockerd that builds."""
    with building(shared_peer) as host:
        yield host


def on_both(action: Callable[[Host], Any], *hosts: Host) -> list[Any]:
    """What `action` gives on each host, done at the same time."""
    with concurrent.futures.ThreadPoolExecutor() as pool:
        return list(pool.map(action, hosts))


def differences(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two of what seen_build gives differ, down to single values."""
    if isinstance(ours, dict) and isinstance(theirs, dict):
        pairs = [(name, ours.get(name), theirs.get(name)) for name in sorted({*ours, *theirs})]
    elif isinstance(ours, list) and isinstance(theirs, list) and len(ours) == len(theirs):
        pairs = [(str(index), *pair) for index, pair in enumerate(zip(ours, theirs))]
    else:
        same = ours == theirs or str(theirs).endswith(" ...") and str(ours).startswith(theirs[:-3])
        return [] if same else [f"{place}: {ours!r} instead of {theirs!r}"]
    return [line for name, one, other in pairs for line in differences(one, other, f"{place}/{name}")]


def assert_same(ours: Any, theirs: Any) -> None:
    """AssertionError with all differences."""
    found = differences(ours, theirs)
    assert not found, "\n".join(found)


@pytest.mark.parametrize("name", CORPUS)
def test_dockerfiles_build_as_under_the_real_dockerd(builder: Host, real_builder: Host, name: str) -> None:
    """Each Build, and the last one again from the cache."""
    def build_all(host: Host) -> list[Any]:
        seen = [seen_build(host, step, "corpus:" + name) for step in CORPUS[name]]
        if "inspect" in seen[-1]:
            seen.append(seen_build(host, CORPUS[name][-1], "corpus:" + name))
        return seen

    assert_same(*on_both(build_all, builder, real_builder))


def test_dockerfiles_are_refused_as_by_the_real_dockerd(builder: Host, real_builder: Host) -> None:
    steps = [step if isinstance(step, Build) else based(step) for step in REFUSED_FILES]
    ours, theirs = on_both(lambda host: [seen_build(host, step, "")["printed"] for step in steps],
                           builder, real_builder)
    assert {printed[0] for printed in theirs} == {400}
    ours = json.loads(re.sub(r" \(did you mean \w+\?\)", "", json.dumps(ours)))
    assert_same(ours, theirs)


@pytest.mark.parametrize("compress", [gzip.compress, bz2.compress, lzma.compress])
def test_contexts_are_decompressed(
    builder: Host, real_builder: Host, compress: Callable[[bytes], bytes]
) -> None:
    context = compress(context_of("FROM busybox\nCOPY a /\nLABEL compressed=1", {"a": b"1"}))
    answers = on_both(lambda host: printed(post_build(host, context, {}), Ids(host)), builder, real_builder)
    assert answers[0] == answers[1] and "Successfully built" in answers[0][-1]


def test_bodies_that_are_no_context(builder: Host, real_builder: Host) -> None:
    good = context_of("FROM busybox", {"a": b"1" * 5000})
    bodies = [b"", b"nonsense" * 1000, good[:3000], gzip.compress(good)[:60], b"FROM busybox\n"]
    assert_same(*on_both(lambda host: [printed(post_build(host, body, {}), Ids(host))[1:] for body in bodies],
                         builder, real_builder))


# What only BuildKit has, by the Dockerfile reference: the Build, a part of what is printed, and of files that
# the image has: data, with mode, uid and gid as far as they are told, or None where it must have none.
LISTED = {"a": b"A", "b.txt": b"B", "d/c.txt": b"C", "d/e/f": b"F"}
REFERENCE: dict[str, tuple[Build, str, dict[str, Any]]] = {
    # Here-documents
    "heredoc-run": (based("RUN <<EOF\necho $((1 + 1)) >/x\n# no comment here\necho b \\\n  c >>/x\nEOF\n"
        "RUN cat /x"), "b c", {"x": b"2\nb c\n"}),
    "heredoc-run-tabs": (based("RUN <<-EOF\n\techo a >/x\n\tEOF\nLABEL z=1"), "LABEL z=1", {"x": b"a\n"}),
    "heredoc-run-interpreter": (based("RUN <<EOF\n#!/bin/awk -f\nBEGIN { print \"by awk\" }\nEOF"),
        "by awk", {}),
    "heredoc-run-argument": (based("ARG v=1\nRUN cat <<EOF >/x && cat <<\"END\" >/y\na $v\nEOF\nb $v\nEND"),
        "", {"x": b"a 1\n", "y": b"b $v\n"}),
    "heredoc-copy": (based("ENV v=1\nCOPY <<EOF /d/x\na $v\n\\$v \"q\"\nEOF\nCOPY <<'EOF' /d/y\na $v\nEOF"),
        "", {"d/x": (b"a 1\n$v \"q\"\n", 0o644, 0, 0), "d/y": b"a $v\n"}),
    "heredoc-copy-two": (based("COPY --chown=bob --chmod=600 <<a.txt <<-\"b.txt\" a /d/\n1\na.txt\n\t2\n"
        "\tb.txt", LISTED), "", {"d/a.txt": (b"1\n", 0o600, 1000, 1000), "d/b.txt": (b"2\n", 0o600),
        "d/a": b"A"}),
    "heredoc-add": (based("ADD <<EOF /x\n\n # kept\nEOF"), "", {"x": b"\n # kept\n"}),
    "heredoc-open": (based("RUN <<EOF\necho a"), "unterminated heredoc", {}),

    # Flags of COPY and ADD
    "chmod": (based("COPY --chmod=751 a /x\nCOPY --chmod=0640 d /d\nARG m=700\nCOPY --chmod=$m a /y\n"
        "ADD --chmod=4755 --chown=bob a /z", LISTED), "", {"x": (b"A", 0o751), "d/c.txt": (b"C", 0o640),
        "d/e": (None, 0o640), "y": (b"A", 0o700), "z": (b"A", 0o4755, 1000, 1000)}),
    "chmod-symbolic": (based("COPY --chmod=u=rwX,go=rX a d /x/", LISTED), "", {"x/a": (b"A", 0o644),
        "x/e": (None, 0o755), "x/e/f": (b"F", 0o644)}),
    "chmod-bad": (based("COPY --chmod=9 a /x", LISTED), "chmod", {}),
    "link": (based("COPY --link a /n/x\nCOPY --link=true --chown=1:2 d /n/d/\nCOPY --link=false a /y",
        LISTED), "", {"n/x": b"A", "n/d/c.txt": (b"C", 0o644, 1, 2), "y": b"A"}),
    "parents": (based("COPY --parents a d/e/f /x/\nCOPY --parents ./d/./*/f /y/\n"
        "COPY --parents d/**/*.txt /z/", LISTED), "", {"x/a": b"A", "x/d/e/f": b"F",
        "x/d/c.txt": None, "y/e/f": b"F", "y/d": None, "z/d/c.txt": b"C", "z/d/e": None}),
    "exclude": (based("COPY --exclude=*.txt --exclude=d/e . /x/\nADD --exclude=d . /y/\n"
        "COPY --exclude=**/*.txt . /z/\nCOPY --exclude=w a /w", LISTED), "",
        {"x/a": b"A", "x/b.txt": None, "x/d/c.txt": b"C", "x/d/e": None,
        "y/a": b"A", "y/d": None, "z/d/c.txt": None, "z/d/e/f": b"F", "w": b"A"}),
    "checksum": (based(f"ADD --checksum={sha256(b'text')} http://127.0.0.1:8000/dir/file.txt /x"), "",
        {"x": (b"text", 0o600)}),
    "checksum-wrong": (based(f"ADD --checksum={sha256(b'other')} http://127.0.0.1:8000/dir/file.txt /x"),
        "digest", {}),
    "checksum-bad": (based("ADD --checksum=md5:1 http://127.0.0.1:8000/dir/file.txt /x"), "md5", {}),
    "checksum-local": (based(f"ADD --checksum={sha256(b'other')} a /x", LISTED), "checksum", {}),
    "unpack": (based("ADD --unpack=false t.tar /x/\nADD --unpack=true http://127.0.0.1:8000/t.tar /y/",
        {"t.tar": TREE_TAR}), "",
        {"x/t.tar": hashlib.sha256(TREE_TAR).digest(), "x/f": None, "y/f": b"f", "y/d/x": (b"x", 0o755)}),
    "destination-up": (based("COPY a /../../../x\nCOPY a ../../y", LISTED), "", {"x": b"A", "y": b"A"}),

    # Flags of RUN
    "mount-bind": (build("FROM busybox AS s\nRUN mkdir /o && echo s >/o/x\nFROM busybox\n"
        "RUN --mount=target=/m "
        "--mount=type=bind,from=s,source=/o,target=/n cat /m/a /n/x >/x; touch /m/z || echo read-only\n"
        "RUN --mount=type=bind,source=d,target=/m,rw echo z >/m/z && ls /m >/y", LISTED), "read-only",
        {"x": b"As\n", "y": b"c.txt\ne\nz\n", "m/a": None, "m/z": None}),
    "mount-cache": (based("RUN --mount=type=cache,target=/c,id=one,uid=5,mode=700 stat -c '%u %a' /c; "
        "echo 1 >>/c/f\nRUN --mount=type=cache,id=one,target=/e cat /e/f >/x\n"
        "RUN --mount=type=cache,id=two,target=/e ls /e >/y"), "5 700", {"x": b"1\n", "y": b"",
        "c/f": None}),
    "mount-cache-from": (based("RUN --mount=type=cache,target=/c,from=busybox,source=/etc cat /c/plain"),
        "not a program", {}),
    "mount-cache-twice": (based("RUN --mount=type=cache,id=l,target=/c,sharing=locked "
        "--mount=type=cache,id=l,target=/e,sharing=locked echo 1 >/c/f; cat /e/f >/x"), "", {"x": b"1\n"}),
    "mount-tmpfs": (based("RUN --mount=type=tmpfs,target=/t,size=1m echo 1 >/t/f && df -k /t | tail -n 1"),
        "1024", {"t/f": None}),
    "mount-secret": (based("RUN --mount=type=secret,id=s cat /run/secrets/s || echo no secret"), "no secret",
        {}),
    "mount-secret-required": (based("RUN --mount=type=secret,id=s,required cat /run/secrets/s"), "s", {}),
    "mount-ssh": (based("RUN --mount=type=ssh echo sock=$SSH_AUTH_SOCK"), "sock=\n", {}),
    "mount-unknown": (based("RUN --mount=type=floppy,target=/x true"), "floppy", {}),
    "network": (based("RUN --network=none ls /sys/class/net\nRUN --network=default true\n"
        "RUN --network=host true"), "lo", {}),
    "network-unknown": (based("RUN --network=moon true"), "moon", {}),
    "security": (based("RUN --security=sandbox echo sandboxed"), "sandboxed", {}),
    "security-insecure": (based("RUN --security=insecure true"), "insecure", {}),

    # Words
    "modifiers": (based("ENV p=a/b/c.tar.gz e=\n"
        "LABEL a=${p#*/} b=${p##*/} c=${p%.*} d=${p%%.*} e=${p/a/x} f=${p//\\//_} "
        "g=${u-d} h=${e-d} i=${e:-d} j=${e+s} k=${u+s}"),
        "LABEL a=b/c.tar.gz b=c.tar.gz c=a/b/c.tar d=a/b/c e=x/b/c.tar.gz f=a_b_c.tar.gz g=d h= i=d j=s k=",
        {}),
    "modifier-required": (based("LABEL a=\"${b:?is needed}\""), "b: is needed", {}),
    "platform": (build("ARG TARGETARCH\nFROM --platform=$BUILDPLATFORM busybox\nARG TARGETPLATFORM\n"
        "ARG BUILDOS\nARG TARGETARCH\nRUN echo $TARGETPLATFORM:$BUILDOS:$TARGETARCH"), "linux/", {}),
    "start-interval": (based("HEALTHCHECK --start-interval=2s --interval=1m CMD true"), "", {}),

    # Stages
    "stage-not-needed": (build("FROM busybox AS broken\nRUN exit 1\nFROM busybox AS good\nRUN echo fine\n"
        "FROM good\nLABEL a=1"), "fine", {}),
    "stage-named-later": (build("FROM busybox AS s\nCOPY --from=later /etc/plain /x\nFROM busybox AS later\n"
        "FROM s"),
        "later", {}),

    # Errors
    "typing-error": (based("RUNN true"), "unknown instruction: RUNN (did you mean RUN?)", {}),
    "squash": (based("RUN echo 1 >/a\nRUN rm /a; echo 2 >/b", squash="1"), "Successfully built",
        {"a": None, "b": b"2\n"}),
    "target-number": (build("FROM busybox\nLABEL n=0\nFROM busybox\nRUN exit 1", target="0"), "n=0", {}),
    "tag": (based("LABEL t=1", t="A:b"), "invalid reference format", {}),
    "version": (based("", version="2"), "DOCKER_BUILDKIT=0", {}),

    # What the real one takes for good, or tells of in words of its own
    "entry-up": (based("COPY . /x", {"../../evil": b"1"}), 'invalid entry name', {}),
    "url-without-name": (based("ADD http://127.0.0.1:8000/ /x/"), "cannot determine filename for source", {}),
    "url-redirected-to-file": (based("ADD http://127.0.0.1:8000/evil /x"), "ADD failed: ", {}),
    "url-cut-off": (based("ADD http://127.0.0.1:8000/short /x"), "ADD failed: unexpected EOF", {}),
    "url-without-date": (based("ADD http://127.0.0.1:8000/dateless /x"), "Successfully",
        {"x": b"dateless"}),
    "ignored-deep": (based("COPY . /", {".dockerignore": b"**/" * 3000 + b"x\n", "f": b"1"}), "Successfully",
        {"f": b"1"}),
    "variable-grows": (based("ENV a=12345678" + ("\nENV a=" + "$a" * 200) * 4), "expands to more than", {}),
    "pattern-slow": (based(f"ENV a={'a' * 4000}\nENV b=${{a%*{'a' * 2000}b}}"), "too long for its", {}),
    "directive-slow": (based("#syntax=a" + " " * 65000 + "b\nLABEL l=1"), "LABEL l=1", {}),
    "hard-link-out": (based("COPY . /x", {"h": special(tarfile.LNKTYPE, "/etc/passwd")}), "no such file", {}),
    "check-directive": (build("# check=skip=all;error=true\nFROM busybox\nLABEL c=1"), "LABEL c=1", {}),
}
REFERENCE_FAILS = (
    "url-cut-off variable-grows pattern-slow heredoc-open chmod-bad checksum-wrong checksum-bad "
    "checksum-local mount-secret-required mount-unknown network-unknown security-insecure modifier-required "
    "stage-named-later typing-error tag version entry-up hard-link-out url-without-name "
    "url-redirected-to-file").split()


@pytest.mark.parametrize("name", REFERENCE)
def test_what_only_buildkit_has(builder: Host, name: str) -> None:
    step, text, files = REFERENCE[name]
    seen = seen_build(builder, step, "reference:" + name)
    assert ("inspect" in seen) != (name in REFERENCE_FAILS), seen["printed"]
    assert text in "".join(map(str, seen["printed"])) + str(seen.get("history"))
    for path, expected in files.items():
        found = seen["tree"].get(path)
        if not isinstance(expected, tuple):
            assert (found and found.data) == expected, path
        else:
            facts = (found.data, int(found.mode, 8), found.uid, found.gid)
            assert facts[:len(expected)] == expected, path


# Clients

IGNORED = b"""# comment

*.o
!keep.o
**/*.tmp
d/sub
!d/sub/two
/rooted
./dotted
  spaced\x20\x20
q/
z/*/y
**/deep/**
Dockerfile
x?
[ab]1
\\#sharp
"""
CLI_CONTEXT: dict[str, Any] = {
    ".dockerignore": IGNORED, **BOB_TREE, **{name: name.encode() for name in (
        "a.o keep.o s/b.o s/c.tmp c.tmp d/sub/three rooted s/rooted dotted spaced q/x z/1/y z/1/w m/deep/n/o "
        "m/p x1 x12 a1 c1 #sharp").split()},
    "Dockerfile": b"FROM busybox AS first\nARG v=none\nLABEL v=$v\nCOPY . /x\nFROM first\nARG v\nRUN exit $v",
}


@pytest.fixture(params=sorted(docker_clis()))
def clis(request: pytest.FixtureRequest, builder: Host, real_builder: Host, tmp_path: Path) -> list[Docker]:
    """One Docker CLI, talking to us and to the real dockerd; its home is a directory of the test's."""
    program = docker_clis()[request.param]
    found = [Docker(program, host) for host in (builder, real_builder)]
    for docker in found:
        docker.environment.update(HOME=str(tmp_path), DOCKER_BUILDKIT="0")
    return found


def write_context(directory: Path, files: dict[str, Any]) -> str:
    """Write a context's files; returns the directory's name."""
    for name, content in files.items():
        place = directory / name
        (place if content is None else place.parent).mkdir(parents=True, exist_ok=True)
        if content is not None:
            data, mode = content if isinstance(content, tuple) else (content, 0o644)
            place.write_bytes(data)
            place.chmod(mode)
    return str(directory)


@pytest.mark.parametrize("first, second, files", [
    ("ADD t.tar /x/", "ADD --unpack=false t.tar /x/", {"x/t.tar": TREE_TAR, "x/f": None}),
    ("COPY --parents d/./e/f /x/", "COPY --parents d/e/./f /x/", {"x/f": b"F", "x/e": None}),
    ("ARG v\nCOPY --exclude=$v . /x/", "ARG v\nCOPY --exclude=$v . /x/", {"x/a": b"A", "x/b.txt": None}),
    ("RUN <<EOF\n#!/bin/sh\necho 1 >/x\nEOF", "RUN <<EOF\n#!/bin/sh\necho 2 >/x\nEOF", {"x": b"2\n"}),
])
def test_the_cache_tells_apart_what_only_buildkit_has(
    builder: Host, first: str, second: str, files: dict[str, Optional[bytes]]
) -> None:
    for dockerfile, value in ((first, "a"), (second, "b.txt")):
        context = context_of(f"FROM busybox\n{dockerfile}", {**LISTED, "t.tar": TREE_TAR})
        answer = post_build(builder, context, {"t": "apart", "buildargs": {"v": value}})
        assert b"Successfully tagged apart" in answer.body
    for path, content in files.items():
        code, found = builder.run("cat", f"/{path}", image="apart")
        assert (code, found) == (0, content) if content is not None else code == 1


def test_steps_that_lock_caches_in_any_order_all_end(builder: Host) -> None:
    mounts = [f"--mount=type=cache,id={name},target=/{name},sharing=locked" for name in "pq"]
    stages = [f"FROM busybox AS s{number}\n" + f"RUN {' '.join(order)} echo {number}\n" * 4
              for number, order in enumerate((mounts, mounts[::-1]))]
    context = context_of("".join(stages) + "FROM s0\nCOPY --from=s1 /etc/plain /x", {})
    assert b"Successfully built" in post_build(builder, context, {"nocache": "1"}).body


def test_the_cli_builds(clis: list[Docker], tmp_path: Path) -> None:
    """Its output, exit codes and what .dockerignore leaves are the same with both daemons."""
    context = write_context(tmp_path / "context", CLI_CONTEXT)
    plain = "FROM busybox\nLABEL from=stdin"

    def build_all(docker: Docker) -> list[Any]:
        ids, seen = Ids(docker.host), []
        identity = tmp_path / os.path.basename(docker.host.directory)
        for arguments, text in (
            (["--target=first", "-t", "cli:1", "--label", "l=1", "--iidfile", str(identity), context], ""),
            (["-t", "cli:2", "--build-arg", "v=0", "--rm=false", "--force-rm", context], ""),
            (["--build-arg", "v=7", context], ""),
            (["-q", "--target", "first", "--no-cache", context], ""),
            (["-"], plain),
            (["-f", "-", "--build-arg", "unused=1", context], plain + "\nCOPY d /"),
            (["-f", "gone", context], ""),
            (["--network=none", "--add-host=h:1.2.3.4", "--ulimit=nofile=99", "--memory=64m", "-"],
             "FROM busybox\nRUN ulimit -n; grep h /etc/hosts"),
        ):
            done = docker.run("build", *arguments, input=text, status=None)
            seen.append((done.returncode, ids.replace(done.stdout), ids.replace(done.stderr)))
        history = docker("history", "--no-trunc", "--format", "{{.CreatedBy}} {{.Size}}", "cli:1")
        return [*seen, image_tree(docker.host, identity.read_text()), ids.replace(history)]

    with concurrent.futures.ThreadPoolExecutor() as pool:
        ours, theirs = pool.map(build_all, clis)
    assert_same(ours, theirs)
    assert [seen[0] for seen in theirs[:8]] == [0, 0, 7, 0, 0, 0, 1, 0]


def test_asked_for_buildkit_the_error_says_what_to_set(clis: list[Docker], tmp_path: Path) -> None:
    """With buildx as a plugin, which CLIs from 23 on take unless told not to, and without."""
    docker, context = clis[0], write_context(tmp_path / "context", {"Dockerfile": b"FROM busybox\n"})
    plugins = tmp_path / ".docker/cli-plugins"
    plugins.mkdir(parents=True)
    (plugins / "docker-buildx").symlink_to(f"{CACHE}/newer/usr/libexec/docker/cli-plugins/docker-buildx")
    docker.environment["DOCKER_BUILDKIT"] = "1"
    done = docker.run("build", context, status=None)
    assert done.returncode != 0 and "DOCKER_BUILDKIT=0" in done.stdout + done.stderr
    docker.environment["DOCKER_BUILDKIT"] = "0"
    docker("build", context)


def test_docker_py_builds(builder: Host, tmp_path: Path) -> None:
    client = docker_py.DockerClient(base_url=builder.url, version="auto", timeout=30)
    try:
        context = write_context(tmp_path, CLI_CONTEXT)
        image, lines = client.images.build(
            path=context, tag="py:1", buildargs={"v": "0"}, labels={"l": "2"}, rm=True, shmsize=1 << 20)
        assert "py:1" in image.tags and image.labels == {"v": "0", "l": "2"}
        assert {"aux": {"ID": image.id}} in list(lines)
        first, _ = client.images.build(path=context, target="first", nocache=True)
        assert first.labels == {"v": "none"} and first.tags == []
        plain, _ = client.images.build(fileobj=io.BytesIO(b"FROM busybox\nLABEL py=1"), quiet=True)
        assert plain.labels == {"py": "1"}
        archive = gzip.compress(context_of("FROM busybox\nCOPY a /", {"a": b"1"}))
        client.images.build(fileobj=io.BytesIO(archive), custom_context=True, encoding="gzip", tag="py:2")
        assert client.containers.run("py:2", ["cat", "/a"], network_mode="none", remove=True) == b"1"
        with pytest.raises(docker_py.errors.BuildError) as failed:
            client.images.build(path=context, buildargs={"v": "9"})
        assert str(failed.value) == "The command '/bin/sh -c exit $v' returned a non-zero code: 9"
        assert any("Step 7/7 : RUN exit" in line.get("stream", "") for line in failed.value.build_log)
        with pytest.raises(docker_py.errors.APIError, match="dockerfile parse error"):
            client.images.build(fileobj=io.BytesIO(b"FOO bar"))
    finally:
        client.close()


COMPOSED_BUILD = """
version: "3.7"
services:
  app:
    build:
      context: {context}
      dockerfile: sub/D
      target: app
      args: {{v: "1"}}
      labels: {{l: "2"}}
    image: composed:1
    network_mode: none
  other:
    build: {context}
    network_mode: none
"""
COMPOSED_CONTEXT = {
    "sub/D": b"FROM busybox AS app\nARG v\nENV v=$v\nCOPY a /\nCMD cat /a; echo v=$v; sleep 1000\n"
             b"FROM busybox\nRUN exit 1\n",
    "Dockerfile": b"FROM busybox\nCMD sleep 1000\n", "a": b"before\n",
}


@pytest.mark.parametrize("version", [1, 2])
def test_compose_builds(builder: Host, tmp_path: Path, version: int) -> None:
    """build, then up --build after a change: the service runs the new image."""
    context = write_context(tmp_path, COMPOSED_CONTEXT)
    compose = Compose(version, builder, COMPOSED_BUILD.format(context=context))
    compose.environment["DOCKER_BUILDKIT"] = "0"
    compose("build")
    labels = builder.api("GET", "/images/composed:1/json")["Config"]["Labels"]
    assert labels["l"] == "2"
    try:
        compose("up", "-d", "--build")
        assert "before" in wait_for(lambda: compose("logs", "app"))
        (tmp_path / "a").write_text("after\n")
        compose("up", "-d", "--build")
        wait_for(lambda: "after" in compose("logs", "app"), "the new image's output")
        assert "v=1" in compose("logs", "app")
    finally:
        compose("down", "-t", "0")
    if version == 2:
        compose.environment["DOCKER_BUILDKIT"] = "1"
        done = compose.run("build", status=None)
        assert done.returncode != 0 and "DOCKER_BUILDKIT=0" in done.stderr + done.stdout


# Builds that end early, and what they leave

def open_build(host: Host, dockerfile: str) -> socket.socket:
    """Begin a build, and return its connection when it has printed "ready"."""
    context = context_of(dockerfile, {})
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(60)
    sock.connect(host.socket)
    head = f"POST {BUILD_API}/build HTTP/1.1\r\nHost: x\r\nContent-Length: {len(context)}\r\n\r\n"
    sock.sendall(head.encode() + context)
    said = b""
    while b'"stream":"ready' not in said:
        data = sock.recv(65536)
        assert data, said
        said += data
    return sock


def build_leftovers(host: Host) -> list[str]:
    """What is there that only lasts as long as a build: containers, their layers, contexts, transactions."""
    names = ("tmp", "containers", "image/overlay2/layerdb/tmp", "image/overlay2/layerdb/mounts")
    return sorted(path for name in names for path in os.listdir(os.path.join(host.data_root, name)))


LASTING = "FROM busybox\nRUN echo {0} >/first\nRUN echo ready; trap '' TERM; sleep " + NEVER


@pytest.mark.parametrize("rules,hidden,kept", [
    ("a/**/b", "a/b a/x/b a/x/y/b/below", "a x/a/b a/bb"), ("**/b", "b a/b a/b/c", "bb a/bb"),
    ("a/**", "a/b a/b/c a", "b/a"), ("**/a/**/b/*c", "a/b/c x/a/y/b/cc/z", "a/b a/c"),
    ("*\n!d\nd/one", "x d/one d/one/more", "d d/two"), ("[^a]/b", "x/b", "a/b b"),
    ("a?/*", "ab/c", "a/c ab")])
def test_rules_of_dockerignore(rules: str, hidden: str, kept: str) -> None:
    found = dockerd.IgnoreRules(rules.split("\n"))
    assert [path for path in hidden.split() if not found.hides(path)] == []
    assert [path for path in kept.split() if found.hides(path)] == []


def test_no_rule_of_dockerignore_tries_every_split_of_a_path() -> None:
    """Each took more than the age of the world, or the square of its megabyte."""
    found = dockerd.IgnoreRules(["**/a/" * 100 + "b", "*a" * 100 + "b", "a" * 1_000_000, "**/x/*.o"])
    assert not found.hides("a/" * 1000 + "c") and not found.hides("a" * 250) and found.hides("x/1.o")


def test_a_build_ends_with_its_connection(new_host: Callable[..., Host], busybox: bytes) -> None:
    """The step that runs is stopped and leaves nothing; the steps before it are in the cache.  The same after
    the daemon's end; after a crash nothing of the build is there."""
    host = new_host("--bridge=none", "--iptables=false")
    host.import_image("busybox", busybox, *BUSYBOX_CHANGES)

    def images() -> int:
        return len(host.api("GET", "/images/json?all=1"))

    open_build(host, LASTING.format("gone")).close()
    wait_for(lambda: not build_leftovers(host) and images() == 2, "the build to end")
    answer = post_build(host, context_of("FROM busybox\nRUN echo gone >/first", {}), {})
    assert b"Using cache" in answer.body
    sock = open_build(host, LASTING.format("stopped"))
    assert host.stop() == 0
    host.start()
    assert (build_leftovers(host), images()) == ([], 3)
    layers = set(os.listdir(os.path.join(host.data_root, "overlay2")))
    sock = open_build(host, LASTING.format("killed"))
    host.kill()
    sock.close()
    host.start()
    assert "failed to exit within 0 s" in host.log()  # it has no time to stop
    wait_for(lambda: not build_leftovers(host), "what the crash left to go")
    assert images() == 3
    assert set(os.listdir(os.path.join(host.data_root, "overlay2"))) == layers


@pytest.mark.parametrize("place", ["slow", "slow.git"])
def test_a_build_waits_for_no_server_when_it_ends(builder: Host, place: str) -> None:
    """Neither for a file that comes without end, nor for git."""
    before, asked = build_leftovers(builder), Path(builder.path("asked"))
    sock = open_build(builder, f"FROM busybox\nRUN echo ready {place}\nADD http://127.0.0.1:8000/{place} /x")
    wait_for(asked.exists, "the server to be asked")
    asked.unlink()
    sock.close()
    wait_for(lambda: {*build_leftovers(builder)} <= {*before}, "the build to end", 10)


def test_stages_are_built_side_by_side(builder: Host) -> None:
    """Each waits for what the other has written, so that neither could be first; they print in their order.
    A failure of one ends the other."""
    wait = "RUN --mount=type=cache,target=/c,id=meeting touch /c/{0}; " \
           "while ! [ -e /c/{1} ]; do sleep 0.01; done; echo {0} >/met\n"
    stages = "FROM busybox AS a\n" + wait.format("a", "b") + "FROM busybox AS b\n" + wait.format("b", "a")
    last = "FROM busybox\nCOPY --from=a /met /a\nCOPY --from=b /met /b\n"
    answer = post_build(builder, context_of(stages + last, {}), {"t": "met", "nocache": "1"})
    assert re.findall(rb"Step (\d)/7", answer.body) == [b"%d" % number for number in range(1, 8)]
    assert {path: file.data for path, file in image_tree(builder, "met").items() if len(path) == 1} == {
        "a": b"a\n", "b": b"b\n"}
    before = build_leftovers(builder)
    stages = "FROM busybox AS a\nRUN sleep 0.2; exit 9\nFROM busybox AS b\nRUN sleep " + NEVER + "\n"
    answer = post_build(builder, context_of(stages + last, {}), {"forcerm": "1"})
    assert answer.lines[-1]["errorDetail"]["code"] == 9
    wait_for(lambda: {*build_leftovers(builder)} <= {*before}, "what the build has used to go")


def test_a_cache_in_use_is_not_pruned(builder: Host) -> None:
    builder.http("POST", f"{BUILD_API}/build/prune")
    sock = open_build(builder, "FROM busybox\nRUN --mount=type=cache,target=/used echo 1 >/used/f; "
                               "echo ready; sleep " + NEVER)
    post_build(builder, context_of("FROM busybox\nRUN --mount=type=cache,target=/free echo 22 >/free/f", {}),
               {"nocache": "1"})
    told = builder.http("POST", f"{BUILD_API}/build/prune").json
    assert len(told["CachesDeleted"]) == 1 and told["SpaceReclaimed"] == 3
    sock.close()
    wait_for(lambda: builder.http("POST", f"{BUILD_API}/build/prune").json["CachesDeleted"], "the use to end")
    assert os.listdir(os.path.join(builder.data_root, "builder")) == []


def test_a_prune_of_some_caches(builder: Host) -> None:
    """By their last use, oldest first as far as they take more than is to be kept, by type and id."""
    def prune(filters: Any = None, **parameters: int) -> Any:
        query = urllib.parse.urlencode({**parameters, "filters": json.dumps(filters or {})})
        return builder.http("POST", f"{BUILD_API}/build/prune?{query}".replace("_", "-"))

    prune()
    caches = os.path.join(builder.data_root, "builder")
    names: list[str] = []
    for name, size in (("old", 100), ("new", 10), ("old", 0)):
        step = f"RUN --mount=type=cache,target=/{name} head -c {size} /dev/zero >>/{name}/f"
        post_build(builder, context_of(f"FROM busybox\n{step}", {}), {"nocache": "1"})
        names += set(os.listdir(caches)) - set(names)
    for filters in ({"until": ["1h"]}, {"unused-for": ["1h"]}, {"type": ["source.local"]}, {"id": ["x"]},
                    {"private": ["true"]}):
        assert prune(filters).json == {"CachesDeleted": None, "SpaceReclaimed": 0}
    assert prune(keep_storage=110).json["CachesDeleted"] is None
    assert prune(reserved_space=109).json == {"CachesDeleted": [names[1]], "SpaceReclaimed": 10}
    assert prune({"id": [names[0][:5]], "type": ["exec.cachemount"]}).json["CachesDeleted"] == [names[0]]
    for bad in ({"bogus": ["x"]}, {"until": ["x"]}):
        assert (answer := prune(bad)).status == 400
        assert answer.json["message"].startswith("failed to prune build cache: ")


REPOSITORY = {
    "Dockerfile": "FROM busybox\nCOPY . /r\nRUN find /r | sort | tr '\\n' ' '\n", ".dockerignore": "*.o\n",
    "x.o": "", "sub/Dockerfile": "FROM busybox\nLABEL sub=1\n",
    ".gitconfig": "[core]\n\tfsmonitor = touch {0}/evil\n[alias]\n\tsubmodule = !touch {0}/evil\n",
    ".gitmodules": '[submodule "s"]\n\tpath = s\n\turl = ext::touch {0}/evil\n\tupdate = !touch {0}/evil\n'}


def test_contexts_from_git(builder: Host, tmp_path: Path) -> None:
    """Branches, tags, directories; what a repository brings along configures nothing."""
    for name, text in REPOSITORY.items():
        (tmp_path / "repo" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "repo" / name).write_text(text.format(tmp_path) if name.startswith(".git") else text)
    who = {"PATH": PATH, "HOME": str(tmp_path), **{f"GIT_{role}_{what}": "a@b" for role in (
        "AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}}
    for command in ("init -q -b master", "add .", "commit -qm first", "tag v1", "branch other",
                    "update-server-info"):
        subprocess.run(["git", *command.split()], cwd=tmp_path / "repo", env=who, check=True)
    url, before = "http://127.0.0.1:8002/repo/.git", build_leftovers(builder)

    def said(remote: str) -> str:
        return str(printed(post_build(builder, None, {"remote": remote, "nocache": "1"}), Ids(builder)))

    files = "/r /r/.dockerignore /r/.gitconfig /r/.gitmodules /r/Dockerfile /r/sub /r/sub/Dockerfile"
    with builder.enter(sys.executable, "-m", "http.server", "8002", "--bind", "127.0.0.1", "-d",
                       str(tmp_path), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        wait_for(lambda: ":1F42 " in read_text(f"/proc/{builder.holder.pid}/net/tcp"), "the server to listen")
        try:
            assert files in said(url) and files in said(url + "#v1")
            assert "LABEL sub=1" in said(url + "#other:sub")
            assert "error checking out nosuch" in said(url + "#nosuch")
            assert "nosuch not within git root" in said(url + "#:nosuch")
            assert "invalid refspec" in said(url + "#--upload-pack=touch%20/evil")
            assert "error fetching" in said("http://127.0.0.1:8002/gone.git")
            added = said_of(builder, f"ADD {url}#master:sub /s/\nADD --keep-git-dir {url} /g/\n"
                                     "RUN ls -A /s /g | tr '\\n' ' '")
            assert "/g: .dockerignore .git .gitconfig .gitmodules Dockerfile sub x.o  /s: Dockerfile" in added
        finally:
            server.kill()
    assert not (tmp_path / "evil").exists()
    wait_for(lambda: {*build_leftovers(builder)} <= {*before}, "what the build has used to go")


def said_of(host: Host, dockerfile: str) -> str:
    """What a build on busybox prints."""
    answer = post_build(host, context_of("FROM busybox\n" + dockerfile, {}), {"nocache": "1"})
    return str(printed(answer, Ids(host)))


# What is large

def wheel(name: str, source: str) -> bytes:
    """A wheel of one module."""
    stream, about = io.BytesIO(), f"{name}-1.0.dist-info"
    members = {f"{name}.py": source,
               f"{about}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n",
               f"{about}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"}
    members[f"{about}/RECORD"] = "".join(f"{member},,\n" for member in [*members, f"{about}/RECORD"])
    with zipfile.ZipFile(stream, "w") as archive:
        for member, text in members.items():
            archive.writestr(member, text)
    return stream.getvalue()


HELLO = b"""#include <stdio.h>
int main(int count, char **words) { printf("hello from C, %s\\n", words[1]); return 7; }
"""
GREETER = """
from http.server import BaseHTTPRequestHandler, HTTPServer

class Greeter(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"greeted by " + self.path.encode())

HTTPServer(("127.0.0.1", 8081), Greeter).serve_forever()
"""
SOFTWARE: dict[str, tuple[str, dict[str, Any]]] = {  # image: Dockerfile and files
    "tools": ("""FROM debian
COPY *.deb /debs/
RUN dpkg --unpack --force-depends --force-unsafe-io /debs/*.deb && dpkg --configure -a
""", {}),
    "hello": ("""FROM tools AS compile
WORKDIR /src
COPY hello.c .
RUN gcc -O2 -static -o hello hello.c && strip hello
FROM scratch
COPY --from=compile /src/hello /hello
ENTRYPOINT ["/hello"]
""", {"hello.c": HELLO}),
    "greeter": ("""FROM tools
COPY *.whl /wheels/
RUN pip install --no-index --break-system-packages /wheels/*.whl
USER nobody
CMD ["python3", "-m", "greeter"]
""", {"greeter-1.0-py3-none-any.whl": wheel("greeter", GREETER)}),
    "nginx": ("""FROM tools
COPY --chown=www-data index.html /var/www/html/
RUN sed -i s/80/8082/ /etc/nginx/sites-enabled/default && nginx -t
STOPSIGNAL SIGQUIT
CMD ["nginx", "-g", "daemon off;"]
""", {"index.html": b"a page"}),
}


@pytest.mark.torture
@pytest.mark.timeout(900)
def test_real_software_is_built_and_runs(builder: Host, debian: bytes) -> None:
    """A C program that ends in scratch, a Python service from a wheel, nginx with a page."""
    def serves(image: str, port: int) -> str:
        identity = builder.create(image=image, HostConfig={"NetworkMode": "host"})
        builder.api("POST", f"/containers/{identity}/start")
        sockets = f"/proc/{builder.holder.pid}/net/tcp"
        wait_for(lambda: f":{port:04X} " in read_text(sockets), f"{image} to listen")
        page, _ = builder.enter(f"{PEER}/bin/busybox", "wget", "-q", "-O", "-", f"http://127.0.0.1:{port}/",
                                stdout=subprocess.PIPE, text=True).communicate()
        builder.api("POST", f"/containers/{identity}/stop")
        builder.api("DELETE", f"/containers/{identity}")
        return str(page)

    builder.import_image("debian", debian)
    packages = {path.name: path.read_bytes() for path in Path(CACHE, "software").glob("*.deb")}
    for image, (dockerfile, files) in SOFTWARE.items():
        context = context_of(dockerfile, packages if image == "tools" else files)
        answer = post_build(builder, context, {"t": image})
        assert b"Successfully built" in answer.body, answer.body[-2000:]
    assert builder.run("there", image="hello") == (7, b"hello from C, there\n")
    assert serves("greeter", 8081) == "greeted by /"
    assert serves("nginx", 8082) == "a page"


def context_of_many(path: Path, count: int) -> None:
    """Write a context's archive with `count` empty files in a thousand directories."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        dockerfile = b"FROM busybox\nCOPY d /d\nRUN find /d -type f | wc -l >/count"
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(dockerfile)
        tar.addfile(entry, io.BytesIO(dockerfile))
        for number in range(count):
            tar.addfile(tarfile.TarInfo(f"d/{number % 1000}/{number}"))


@pytest.mark.parametrize("count", [
    2000, pytest.param(1_000_000, marks=[pytest.mark.torture, pytest.mark.timeout(1800)])])
def test_a_context_of_many_files(builder: Host, tmp_path: Path, count: int) -> None:
    """All arrive; the daemon's memory does not grow with them; from the cache it is built without a copy."""
    context_of_many(tmp_path / "context", count)
    before = memory_of(builder)
    for cached in (False, True):
        with open(tmp_path / "context", "rb") as context:
            answer = builder.http("POST", f"{BUILD_API}/build?t=many", context,
                                  {"Content-Type": "application/x-tar"}, timeout=1700)
        assert b"Successfully tagged many" in answer.body and (b"Using cache" in answer.body) == cached
    assert memory_of(builder) - before < 100 << 20
    assert builder.run("cat", "/count", image="many") == (0, b"%d\n" % count)


def test_a_context_that_does_not_fit(new_host: Callable[..., Host], busybox: bytes) -> None:
    """A bomb fills the disk, is told of, and is gone; the next build works."""
    host = new_host("--bridge=none", "--iptables=false", start=False)
    os.makedirs(host.data_root)
    host.enter("mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", host.data_root).wait()
    host.start().import_image("busybox", busybox, *BUSYBOX_CHANGES)
    packer, bomb = zlib.compressobj(9, zlib.DEFLATED, 31), []
    entry = tarfile.TarInfo("bomb")
    entry.size = 1 << 30
    for block in (entry.tobuf(), *[bytes(1 << 20)] * 1024):
        bomb.append(packer.compress(block))
    answer = post_build(host, b"".join([*bomb, packer.flush()]), {})
    assert answer.status == 500 or b"errorDetail" in answer.body
    assert b"no space left on device" in answer.body
    full = context_of("FROM busybox\nRUN head -c 100000000 /dev/zero >/big", {})
    answer = post_build(host, full, {"forcerm": "1"})
    assert b"errorDetail" in answer.body
    answer = post_build(host, context_of("FROM busybox\nCOPY a /", {"a": b"1" * (20 << 20)}), {"t": "fits"})
    assert b"Successfully tagged fits" in answer.body
    assert host.api("GET", "/containers/json?all=1") == []
    assert host.stop() == 0
    host.enter("umount", host.data_root).wait()


# ------------------------------------------------------------------------------------------------------------
# A machine of its own
#
# `make vmtest` boots a Debian under qemu, with cgroup v2 alone, systemd and AppArmor, and runs this file's
# tests inside.  The guest reads one disk, a tar archive with the sources, the unpacked packages and a script,
# and writes the script's output to its second serial port.  All tests take several boots, two at a time.
# ------------------------------------------------------------------------------------------------------------

VM = os.path.join(CACHE, "vm")
VM_SECONDS = 2 * 3600  # without hardware support every instruction is emulated
VM_PARTS = 12
VM_MARK = "vmtest: exit code "
VM_SCRIPT = f"""exec >/dev/ttyS1 2>&1 </dev/null
stty -F /dev/ttyS1 -opost
cd /srv/source; ulimit -n $(ulimit -Hn)
export HOME=/root PATH={PATH} PYTHONDONTWRITEBYTECODE=1 DOCKERD_TEST_PATIENCE=10
echo "$(uname -r), $(python3 -V), $(systemctl --version | head -n 1)"
echo "$(stat -f -c %T /sys/fs/cgroup), AppArmor $(cat /sys/module/apparmor/parameters/enabled)"
python3 _native/build.py
mkdir -p .venv/bin && ln -s /usr/bin/python3 .venv/bin/python && echo .venv >.cache/environments
python3 -m pytest -q -p test_dockerd -p no:cacheprovider --timeout=900 --color=no \\
    -m "not conformance and not torture and not v1" -W ignore::pytest.PytestUnknownMarkWarning \\
    --basetemp=/var/tmp/tests "$@" test_dockerd.py
echo "{VM_MARK}$?"
"""


def write_vm_disk(path: str) -> None:
    """What guests unpack to /srv/source, but for what is to be done: what is tested, and what tests need."""
    clis = sorted(set(docker_clis().values()) - {f"{PEER}/usr/bin/docker"})
    with tarfile.open(path, "w") as archive:
        for name in ("dockerd.py", "test_dockerd.py", "bench_dockerd.py", "Makefile", "README.md",
                     "_native/__init__.py", "_native/build.py", ".cache/peer", ".cache/debian.tar",
                     ".cache/newer/usr/libexec", ".cache/compose"):
            archive.add(os.path.join(HERE, name), name)
        for program in clis[:1]:
            archive.add(os.path.realpath(program), "docker")


def vm_command(disk: str, output: str, console: str) -> list[str]:
    """The command line of qemu: the disks stay as they are, and there is no network."""
    boot = ("mkdir -p /srv/source && tar -C /srv/source -xf /dev/vdb && { [ ! -e /srv/source/docker ] || "
            "ln -s /srv/source/docker /usr/local/bin/docker; } && exec sh /srv/source/run")
    # Without hardware support defences against its faults cost time, and the clock's other sources are slow.
    kernel = ["root=/dev/vda", "rw", "console=ttyS0", "mitigations=off", "tsc=reliable", "clocksource=tsc",
              "systemd.run_success_action=poweroff-force", "systemd.run_failure_action=poweroff-force",
              f'"systemd.run=/bin/sh -c \'{boot}\'"']
    return ["qemu-system-x86_64", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "4096",
            "-nodefaults", "-no-reboot", "-display", "none", "-nic", "none",
            "-kernel", f"{VM}/vmlinuz", "-initrd", f"{VM}/initrd.img", "-append", " ".join(kernel),
            "-drive", f"file={VM}/root.ext4,format=raw,if=virtio,snapshot=on",
            "-drive", f"file={disk},format=raw,if=virtio,readonly=on",
            "-serial", f"file:{console}", "-serial", f"file:{output}"]


def boot_vm(files: str, arguments: list[str]) -> Iterator[str]:
    """Boot the machine and run pytest with the arguments there on the archive `files`; yields what it prints,
    piece by piece, and the console's last lines when the machine does not come to its end."""
    with tempfile.TemporaryDirectory(prefix="dockerd-vm-") as directory:
        disk, output, console = (os.path.join(directory, name) for name in ("disk.tar", "output", "console"))
        shutil.copyfile(files, disk)
        script = VM_SCRIPT.replace('"$@"', " ".join(map(shlex.quote, arguments))).encode()
        entry = tarfile.TarInfo("run")
        entry.size = len(script)
        with tarfile.open(disk, "a") as archive:
            archive.addfile(entry, io.BytesIO(script))
        open(output, "wb").close()
        end = time.monotonic() + VM_SECONDS
        with subprocess.Popen(vm_command(disk, output, console)) as machine, \
                open(output, errors="replace") as lines:
            try:
                last, running = "", True
                while running and VM_MARK not in last:
                    running = machine.poll() is None and time.monotonic() < end
                    text = lines.read()
                    yield text
                    last = (last + text)[-200:]
                    time.sleep(0.5)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    machine.wait(20)
            finally:
                machine.kill()
        if VM_MARK not in last:
            yield "\n".join(["", *read_text(console).splitlines()[-30:], "vmtest: no end\n"])


def vmtest(arguments: list[str]) -> int:
    """The tests that pytest's arguments pick in one machine, or all of them in parts, with the sum of
    pytest's closing lines; 0 when all have passed.  All parts test the files as they are at the beginning."""
    with tempfile.NamedTemporaryFile(prefix="dockerd-vm-", suffix=".tar") as files:
        write_vm_disk(files.name)
        return vmtest_part(files.name, arguments) if arguments else vmtest_parts(files.name)


def vmtest_part(files: str, arguments: list[str]) -> int:
    """One boot, shown while it runs."""
    shown = ""
    for text in boot_vm(files, arguments):
        print(text, end="", flush=True)
        shown += text
    return int(VM_MARK + "0" not in shown)


def vmtest_parts(files: str) -> int:
    """All tests, two boots at a time."""
    good, counts = True, collections.Counter[str]()
    parts = [f"--part={number}/{VM_PARTS}" for number in range(1, VM_PARTS + 1)]
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        for part, text in zip(parts, pool.map(lambda part: "".join(boot_vm(files, [part])), parts)):
            print(f"== pytest {part}\n{text}", flush=True)
            good = good and VM_MARK + "0" in text
            closing = text.partition(VM_MARK)[0].splitlines()[-1:]
            for number, outcome in re.findall(r"(\d+) (failed|passed|error)", "".join(closing)):
                counts[outcome] += int(number)
    print("==", ", ".join(f"{number} {outcome}" for outcome, number in counts.items()), "in all")
    return int(not good)


if __name__ == "__main__" and sys.argv[1:2] == ["--vmtest"]:
    sys.exit(vmtest(sys.argv[2:]))
