"""Benchmarks of dockerd.py, with the real dockerd beside it in the same run where the machine has one.

    python3 bench_dockerd.py [-n 300] [--json FILE]

Both daemons run at the same time, each in network and mount namespaces and on files of its own, and take
turns, so that what else the machine does falls on both.  A figure is a median, a ratio is theirs over ours:
above 1, we need less.  Needs root, util-linux, iproute2 and a static busybox; the standard library only.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import contextlib
import functools
import glob
import gzip
import hashlib
import io
import itertools
import json
import os
import random
import selectors
import shutil
import signal
import socket
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from typing import Any, Callable, Iterator, Optional

HERE = os.path.dirname(os.path.abspath(__file__))
PATH = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOLDER = "ip link set lo up && echo ready && exec cat"

# What the containers of the steady state alternate between.
VARIANTS: list[dict[str, Any]] = [
    {"Image": "one", "Cmd": ["true"]},
    {"Image": "two", "Cmd": ["sh", "-c", "exit 0"], "Env": ["A=b"], "Labels": {"a": "b"}},
    {"Image": "one", "Cmd": ["true"], "User": "1000:1000", "HostConfig": {"Memory": 64 << 20}},
    {
        "Image": "two",
        "Cmd": ["echo", "a line for the log"],
        "WorkingDir": "/tmp",
        "HostConfig": {"CapDrop": ["ALL"]},
    },
    {"Image": "one", "Cmd": ["true"], "Tty": True, "HostConfig": {"ReadonlyRootfs": True}},
]
STEPS = ("create", "start", "wait", "delete")
NETWORKS: dict[str, dict[str, Any]] = {
    "bridge network": {"NetworkMode": "bridge"},
    "published port": {"NetworkMode": "bridge", "PortBindings": {"80/tcp": [{}]}},
    "user network": {"NetworkMode": "own"},
}


class Connection:
    """A kept-alive HTTP connection to a Unix socket, made at the first call.

    http.client would take a quarter of the CPU time that the daemons are measured by, on the same machine."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.socket: Optional[socket.socket] = None

    def call(self, method: str, path: str, body: Any = None, raw: bool = False, headers: str = "") -> Any:
        """One request, JSON both ways (bytes are sent as they are, a `raw` answer too); RuntimeError when the
        daemon refuses, OSError when there is none."""
        if self.socket is None:
            self.socket = socket.socket(socket.AF_UNIX)
            self.answers = self.socket.makefile("rb")
            self.socket.settimeout(120)
            self.socket.connect(self.path)
        data = body if isinstance(body, bytes) or body is None else json.dumps(body).encode()
        if data is not None:
            kind = "x-tar" if isinstance(body, bytes) else "json"
            headers += f"Content-Type: application/{kind}\r\nContent-Length: {len(data)}\r\n"
        elif method == "POST":
            headers += "Content-Length: 0\r\n"
        self.socket.sendall(f"{method} {path} HTTP/1.1\r\nHost: localhost\r\n{headers}\r\n".encode())
        self.socket.sendall(data or b"")
        status, answer = self._answer()
        if status >= 300:
            raise RuntimeError(f"{method} {path}: {status} {answer!r}")
        return json.loads(answer) if not raw and answer[:1] in (b"{", b"[") else answer

    def _answer(self) -> tuple[int, bytes]:
        """The status and the whole body of an answer; ConnectionError when the connection ends before it."""
        status, fields = self.answers.readline().split()[1:2], {}
        if not status:
            raise ConnectionError(f"{self.path} was closed")
        while (line := self.answers.readline()) not in (b"\r\n", b""):
            name, _, value = line.lower().partition(b":")
            fields[name] = value.strip()
        if fields.get(b"transfer-encoding") == b"chunked":
            chunks = []
            while size := int(self.answers.readline(), 16):
                chunks.append(self.answers.read(size))
                self.answers.readline()
            self.answers.readline()
            body = b"".join(chunks)
        else:
            ends = b"content-length" not in fields and status[0] not in (b"204", b"304")
            body = self.answers.read(-1 if ends else int(fields.get(b"content-length", 0)))
        if fields.get(b"connection") == b"close":
            self.close()
        return int(status[0]), body

    def close(self) -> None:
        """Close it; the next call makes another."""
        if self.socket is not None:
            self.answers.close()
            self.socket.close()
            self.socket = None


class Daemon:
    """A daemon in namespaces and a CPU-accounting cgroup of its own."""

    def __init__(self, name: str, command: list[str], library_path: str = "") -> None:
        self.name = name
        self.directory = tempfile.mkdtemp(prefix="dockerd-bench-")
        self.parent = "/" + os.path.basename(self.directory)
        self.command = [part.format(dir=self.directory, parent=self.parent) for part in command]
        self.environment = (
            {**os.environ, "LD_LIBRARY_PATH": library_path} if library_path else dict(os.environ)
        )
        self.cgroup = _make_accounting_cgroup(self.parent)
        self.holder = subprocess.Popen(
            ["unshare", "-n", "-m", "--propagation", "private", "sh", "-c", HOLDER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert self.holder.stdout and self.holder.stdout.readline() == b"ready\n"
        self.connection = Connection(f"{self.directory}/sock")

    def start(self) -> float:
        """Start the daemon; returns the seconds until it answered a ping and `info`."""
        begin = time.perf_counter()
        with open(f"{self.directory}/log", "ab") as log:
            self.process = subprocess.Popen(
                ["nsenter", "-t", str(self.holder.pid), "-n", "-m", "--", *self.command],
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                preexec_fn=functools.partial(_join, self.cgroup),
            )
        self.connection = Connection(f"{self.directory}/sock")
        while True:
            try:
                self.connection.call("GET", "/_ping")
                self.connection.call("GET", "/info")
                return time.perf_counter() - begin
            except (OSError, ValueError):
                if self.process.poll() is not None or time.perf_counter() > begin + 60:
                    with open(f"{self.directory}/log") as log_file:
                        raise SystemExit(f"{self.name} does not start:\n{log_file.read()[-2000:]}")
                self.connection.close()
                time.sleep(0.002)

    def stop(self) -> None:
        """Stop the daemon and wait for its end."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        self.process.wait(60)

    def close(self) -> None:
        """Stop it and remove all that it used."""
        self.stop()
        assert self.holder.stdin
        self.holder.stdin.close()
        self.holder.wait()
        for top in glob.glob("/sys/fs/cgroup/*") + ["/sys/fs/cgroup"]:
            for directory, _, _ in os.walk(top + self.parent, topdown=False):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
        shutil.rmtree(self.directory)

    def wait_for_removals(self) -> None:
        """Wait until what goes on behind the answers to removals of layers is over."""
        while glob.glob(f"{self.directory}/data/overlay2/*-removing"):
            time.sleep(0.1)

    def cpu(self) -> float:
        """Seconds of CPU time that the daemon, its helpers and its containers have used so far."""
        if self.cgroup.startswith("/sys/fs/cgroup/cpuacct"):
            with open(os.path.join(os.path.dirname(self.cgroup), "cpuacct.usage")) as file:
                return int(file.read()) / 1e9
        with open(os.path.join(os.path.dirname(self.cgroup), "cpu.stat")) as file:
            return int(file.readline().split()[1]) / 1e6

    def pss(self) -> float:
        """MiB of memory (proportional set size) of all processes in the daemon's own mount namespace."""
        own, total = os.readlink(f"/proc/{self.holder.pid}/ns/mnt"), 0
        for pid in filter(str.isdigit, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if int(pid) != self.holder.pid and os.readlink(f"/proc/{pid}/ns/mnt") == own:
                    with open(f"/proc/{pid}/smaps_rollup") as file:
                        total += next(int(line.split()[1]) for line in file if line.startswith("Pss:"))
        return total / 1024

    def peak(self) -> float:
        """MiB that the daemon's own process has had at most."""
        with open(f"/proc/{self.process.pid}/status") as file:
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) / 1024

    def create(self, variant: dict[str, Any]) -> str:
        """Create a container without a network; returns its id."""
        body = {**variant, "HostConfig": {"NetworkMode": "none", **variant.get("HostConfig", {})}}
        return str(self.connection.call("POST", "/containers/create", body)["Id"])

    def run(self, variant: dict[str, Any]) -> list[float]:
        """Create, start, wait for and delete a container; returns the seconds that each step took."""
        call, times = self.connection.call, [time.perf_counter()]
        identity = self.create(variant)
        times.append(time.perf_counter())
        for method, path in (
            ("POST", f"/containers/{identity}/start"),
            ("POST", f"/containers/{identity}/wait"),
            ("DELETE", f"/containers/{identity}"),
        ):
            answer = call(method, path)
            times.append(time.perf_counter())
            if path.endswith("wait") and answer["StatusCode"] != 0:
                raise RuntimeError(f"{self.name}: {variant} ended with {answer}")
        return [later - earlier for earlier, later in zip(times, times[1:])]

    def run_together(self, variant: dict[str, Any], count: int) -> float:
        """Run `count` containers from create to delete, all at once; returns the seconds until the last."""
        def one(_: int) -> None:
            connection = Connection(f"{self.directory}/sock")
            identity = connection.call("POST", "/containers/create", variant)["Id"]
            for method, step in (("POST", "/start"), ("POST", "/wait"), ("DELETE", "")):
                connection.call(method, f"/containers/{identity}{step}")
            connection.close()

        begin = time.perf_counter()
        with concurrent.futures.ThreadPoolExecutor(count) as pool:
            list(pool.map(one, range(count)))
        return time.perf_counter() - begin

    def exec(self, identity: str) -> float:
        """Run `true` in a running container, as `docker exec` does; returns the seconds until its exit code
        is known."""
        begin = time.perf_counter()
        body = {"Cmd": ["true"], "AttachStdout": True, "AttachStderr": True}
        instance = self.connection.call("POST", f"/containers/{identity}/exec", body)["Id"]
        with socket.socket(socket.AF_UNIX) as sock:
            sock.connect(f"{self.directory}/sock")
            sock.sendall(
                f"POST /exec/{instance}/start HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\n"
                "Upgrade: tcp\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}".encode()
            )
            while sock.recv(4096):
                pass
        answer = self.connection.call("GET", f"/exec/{instance}/json")
        if answer["ExitCode"] != 0:
            raise RuntimeError(f"{self.name}: exec ended with {answer}")
        return time.perf_counter() - begin


def _make_accounting_cgroup(parent: str) -> str:
    """A cgroup that counts CPU time, below the one that the daemon's containers will be in; its directory."""
    top = "/sys/fs/cgroup/cpuacct" if os.path.isdir("/sys/fs/cgroup/cpuacct") else "/sys/fs/cgroup"
    directory = f"{top}{parent}/daemon"
    os.makedirs(directory)
    return directory


def _join(cgroup: str) -> None:
    with open(f"{cgroup}/cgroup.procs", "w") as file:
        file.write("0")


def our_daemon(python: str) -> Daemon:
    """dockerd.py of this folder, under the interpreter `python`."""
    return Daemon(
        "dockerd.py",
        [
            python,
            os.path.join(HERE, "dockerd.py"),
            "-d",
            "-H",
            "unix://{dir}/sock",
            "-g",
            "{dir}/data",
            "--exec-root",
            "{dir}/exec",
            "-p",
            "{dir}/pid",
            "--cgroup-parent",
            "{parent}",
        ],
    )


def real_daemon(program: str) -> Daemon:
    """The real dockerd at `program`, which may be unpacked somewhere with its libraries beside it."""
    root = os.path.dirname(os.path.dirname(os.path.dirname(os.path.realpath(program))))
    libraries = glob.glob(f"{root}/lib/*-linux-gnu") + glob.glob(f"{root}/usr/lib/*-linux-gnu")
    return Daemon(
        "dockerd",
        [
            program,
            "-H",
            "unix://{dir}/sock",
            "--data-root",
            "{dir}/data",
            "--exec-root",
            "{dir}/exec",
            "-p",
            "{dir}/pid",
            "--cgroup-parent",
            "{parent}",
        ],
        ":".join(libraries) if root != "/" else "",
    )


def root_file_system(mark: str) -> bytes:
    """A tar archive of a root file system from a static busybox; `mark` makes it another image."""
    busybox = shutil.which("busybox")
    if not busybox:
        raise SystemExit("no busybox in PATH: install the package busybox-static")
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for name in ("bin", "etc", "tmp"):
            directory = tarfile.TarInfo(name)
            directory.type, directory.mode = tarfile.DIRTYPE, 0o1777 if name == "tmp" else 0o755
            tar.addfile(directory)
        tar.add(os.path.realpath(busybox), "bin/busybox")
        for applet in ("sh", "true", "echo", "sleep"):
            link = tarfile.TarInfo("bin/" + applet)
            link.type, link.linkname = tarfile.SYMTYPE, "busybox"
            tar.addfile(link)
        content = f"root:x:0:0:{mark}:/root:/bin/sh\n".encode()
        passwd = tarfile.TarInfo("etc/passwd")
        passwd.size = len(content)
        tar.addfile(passwd, io.BytesIO(content))
    return stream.getvalue()


def plain_files(count: int, size: int, root: str = "", content: Callable[[], bytes] = bytes) -> bytes:
    """A tar archive of `count` files, a hundred in a directory: `size` bytes that nothing compresses, or else
    what `content()` gives, in each."""
    stream, same = io.BytesIO(), os.urandom(size)
    with tarfile.open(fileobj=stream, mode="w") as tar:
        for number in range(count):
            if number % 100 == 0:
                directory = tarfile.TarInfo(f"{root}{number // 100}")
                directory.type, directory.mode = tarfile.DIRTYPE, 0o755
                tar.addfile(directory)
            file = tarfile.TarInfo(f"{root}{number // 100}/{number}")
            data = same or content()
            file.size = len(data)
            tar.addfile(file, io.BytesIO(data))
    return stream.getvalue()


def kernel_threads() -> dict[int, int]:
    """Nanoseconds of CPU time of each kernel thread: where namespaces, mounts and cgroups are torn down."""
    times = {}
    for pid in map(int, filter(str.isdigit, os.listdir("/proc"))):
        with contextlib.suppress(OSError):
            with open(f"/proc/{pid}/stat") as file:
                if file.read().rpartition(") ")[2].split()[1] not in ("0", "2"):
                    continue
            with open(f"/proc/{pid}/schedstat") as file:
                times[pid] = int(file.read().split()[0])
    return times


def kernel_cpu(before: dict[int, int]) -> float:
    """Seconds of CPU time that kernel threads have used since `before`."""
    return sum(time - before.get(pid, 0) for pid, time in kernel_threads().items()) / 1e9


def settle(daemons: list[Daemon], seconds: float = 10) -> None:
    """Wait until the daemons and the kernel's threads have been all but idle for half a second."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        threads, before = kernel_threads(), sum(daemon.cpu() for daemon in daemons)
        time.sleep(0.5)
        if sum(daemon.cpu() for daemon in daemons) - before < 0.02 and kernel_cpu(threads) < 0.005:
            return


# The measurements.  Each takes the daemons and yields (what, unit, [the figure of each daemon]).

Rows = Iterator["tuple[str, str, list[float]]"]


def measure_idle(daemons: list[Daemon]) -> Rows:
    """Memory of a daemon that has done nothing yet."""
    settle(daemons)
    yield "memory, idle", "MiB", [daemon.pss() for daemon in daemons]


def measure_ping(daemons: list[Daemon], rounds: int = 5, requests: int = 400) -> Rows:
    """Time of an answered GET /_ping on one kept-alive connection."""
    times: list[list[float]] = [[] for _ in daemons]
    for _ in range(rounds):
        for daemon, found in zip(daemons, times):
            with socket.socket(socket.AF_UNIX) as sock:  # Connection takes longer than the daemons do
                sock.connect(f"{daemon.directory}/sock")
                begin = time.perf_counter()
                for _ in range(requests):
                    sock.sendall(b"GET /_ping HTTP/1.1\r\nHost: localhost\r\n\r\n")
                    answer = b""
                    while not answer.endswith(b"\r\n\r\nOK"):
                        answer += sock.recv(4096)
                found.append((time.perf_counter() - begin) / requests * 1e6)
    yield "GET /_ping, one connection", "us", [statistics.median(found) for found in times]


def measure_steady_state(daemons: list[Daemon], count: int) -> Rows:
    """Time of each step of a container's life, `count` containers in turns."""
    times: list[list[list[float]]] = [[] for _ in daemons]
    for number in range(-len(VARIANTS), count):
        for index in range(len(daemons)) if number % 2 else reversed(range(len(daemons))):
            steps = daemons[index].run(VARIANTS[number % len(VARIANTS)])
            if number >= 0:  # the first round warms up
                times[index].append(steps)
    for step, name in enumerate(STEPS):
        yield name, "ms", [statistics.median(steps[step] for steps in found) * 1e3 for found in times]
    totals = [sorted(sum(steps) for steps in found) for found in times]
    yield "create+start+wait+delete", "ms", [statistics.median(found) * 1e3 for found in totals]
    yield "  its worst of a hundred", "ms", [found[int(len(found) * 0.99)] * 1e3 for found in totals]


def network_variant(name: str, *command: str) -> dict[str, Any]:
    """A container on one of NETWORKS, as the CLI asks for it: what is published is exposed too, without which
    the real daemon publishes nothing."""
    host = NETWORKS[name]
    exposed: dict[str, Any] = {port: {} for port in host.get("PortBindings", ())}
    return {"Image": "one", "Cmd": list(command), "ExposedPorts": exposed, "HostConfig": host}


def measure_networks(daemons: list[Daemon], count: int, together: int = 20) -> Rows:
    """A container's life on each kind of network, and of many at once on the bridge."""
    for daemon in daemons:
        daemon.connection.call("POST", "/networks/create", {"Name": "own"})
    variants = {name: network_variant(name, "true") for name in NETWORKS}
    for name, variant in variants.items():
        times = [[sum(daemon.run(variant)) for _ in range(count)] for daemon in daemons]
        yield f"  with {name}", "ms", [statistics.median(found) * 1e3 for found in times]
    for name in ("bridge network", "published port"):
        turns = [[daemon.run_together(variants[name], together) for daemon in daemons] for _ in range(7)]
        yield f"  {together} at once, {name}", "ms", [statistics.median(found) * 1e3 for found in zip(*turns)]


FETCH = """import socket, sys, time
with socket.create_connection((sys.argv[1], int(sys.argv[2]))) as connection:
    begin, buffer, count = time.perf_counter(), bytearray(1 << 20), 0
    while size := connection.recv_into(buffer):
        count += size
    print(count, time.perf_counter() - begin)
"""


def measure_ports(daemons: list[Daemon], rounds: int = 7, megabytes: int = 512) -> Rows:
    """Time of much data from a published port: over the kernel's path and over the user-space proxy."""
    variant = network_variant("published port", "busybox", "nc", "-ll", "-p", "80", "-e",
                              "busybox", "dd", "if=/dev/zero", "bs=64k", f"count={megabytes << 4}")
    ports, identities = [], []
    for daemon in daemons:
        call = daemon.connection.call
        identity = call("POST", "/containers/create", variant)["Id"]
        call("POST", f"/containers/{identity}/start")
        found = call("GET", f"/containers/{identity}/json")["NetworkSettings"]["Ports"]["80/tcp"]
        ports.append(found[0]["HostPort"])
        identities.append(identity)

    def fetch(daemon: Daemon, host: str, port: str) -> float:
        enter = ["nsenter", "-t", str(daemon.holder.pid), "-n", "--", sys.executable, "-c", FETCH, host, port]
        while True:  # until the server listens
            done = subprocess.run(enter, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
            count, _, seconds = done.stdout.partition(" ")
            if count == str(megabytes << 20):
                return float(seconds) * 1e3

    for name, host in (("kernel's path", "172.17.0.1"), ("proxy", "127.0.0.1")):
        turns = [[fetch(daemon, host, port) for daemon, port in zip(daemons, ports)] for _ in range(rounds)]
        yield f"{megabytes} MB by a port, {name}", "ms", [statistics.median(found) for found in zip(*turns)]
    for daemon, identity in zip(daemons, identities):
        daemon.connection.call("DELETE", f"/containers/{identity}?force=1")


def measure_exec(daemons: list[Daemon], count: int) -> Rows:
    """Time of `true` in a container that runs, `count` times in turns."""
    identities = [daemon.create({"Image": "one", "Cmd": ["sleep", "100000"]}) for daemon in daemons]
    for daemon, identity in zip(daemons, identities):
        daemon.connection.call("POST", f"/containers/{identity}/start")
    times: list[list[float]] = [[] for _ in daemons]
    for number in range(-5, count):
        for daemon, identity, found in zip(daemons, identities, times):
            seconds = daemon.exec(identity)
            if number >= 0:
                found.append(seconds)
    for daemon, identity in zip(daemons, identities):
        daemon.connection.call("DELETE", f"/containers/{identity}?force=1")
    yield "exec of true", "ms", [statistics.median(found) * 1e3 for found in times]


def measure_cpu(daemons: list[Daemon], count: int, rounds: int = 4) -> Rows:
    """CPU time of a container's life, up to the end of what goes on behind the answer (the tail)."""
    own: list[list[float]] = [[] for _ in daemons]
    total: list[list[float]] = [[] for _ in daemons]
    for _ in range(rounds):
        for index, daemon in enumerate(daemons):
            settle(daemons)
            threads, before = kernel_threads(), daemon.cpu()
            for number in range(count):
                daemon.run(VARIANTS[number % len(VARIANTS)])
            settle(daemons)
            own[index].append((daemon.cpu() - before) / count * 1e3)
            total[index].append(own[index][-1] + kernel_cpu(threads) / count * 1e3)
    yield "CPU of its processes and containers", "ms", [statistics.median(found) for found in own]
    yield "  with the kernel's part of the tail", "ms", [statistics.median(found) for found in total]


def measure_running(daemons: list[Daemon], count: int = 20) -> Rows:
    """Memory on the daemon's side for each further container that runs."""
    figures = []
    for daemon in daemons:
        identities = [daemon.create({"Image": "one", "Cmd": ["sleep", "100000"]}) for _ in range(count + 5)]

        def start(some: list[str], call: Callable[..., Any] = daemon.connection.call) -> None:
            for identity in some:
                call("POST", f"/containers/{identity}/start")

        start(identities[:5])
        settle(daemons)
        before = daemon.pss()
        start(identities[5:])
        settle(daemons)
        figures.append((daemon.pss() - before) / count)
        for identity in identities:
            daemon.connection.call("DELETE", f"/containers/{identity}?force=1")
    yield "memory, each further container", "MiB", figures


def measure_hundred(daemons: list[Daemon], count: int = 100, seconds: float = 6) -> Rows:
    """Time of a list of `count` running containers, in turns; and CPU time of a daemon while a client follows
    the stats of each."""
    variant: dict[str, Any] = {"Image": "one", "Cmd": ["sleep", "100000"]}
    identities = [[daemon.create(variant) for _ in range(count)] for daemon in daemons]
    for daemon, own in zip(daemons, identities):
        for identity in own:
            daemon.connection.call("POST", f"/containers/{identity}/start")
    settle(daemons)
    times: list[list[float]] = [[] for _ in daemons]
    for _ in range(30):
        for daemon, found in zip(daemons, times):
            begin = time.perf_counter()
            with socket.socket(socket.AF_UNIX) as sock:  # as in measure_ping
                sock.connect(f"{daemon.directory}/sock")
                sock.sendall(b"GET /containers/json HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n")
                answer = b"".join(iter(lambda: sock.recv(1 << 17), b""))  # noqa: B023
            found.append((time.perf_counter() - begin) * 1e3)
            if answer.count(b'"Names"') != count:
                raise RuntimeError(f"{daemon.name} does not list its {count} containers")
    yield f"ps with {count} containers", "ms", [statistics.median(found) for found in times]
    figures = [_cpu_of_stats(daemon, own, seconds) for daemon, own in zip(daemons, identities)]
    yield "CPU of stats, a container and second", "ms", figures
    for daemon, own in zip(daemons, identities):
        for identity in own:
            daemon.connection.call("DELETE", f"/containers/{identity}?force=1")


def _cpu_of_stats(daemon: Daemon, identities: list[str], seconds: float) -> float:
    with contextlib.ExitStack() as stack, selectors.DefaultSelector() as selector:
        for identity in identities:
            sock = stack.enter_context(socket.socket(socket.AF_UNIX))
            sock.connect(f"{daemon.directory}/sock")
            sock.sendall(f"GET /containers/{identity}/stats HTTP/1.1\r\nHost: localhost\r\n\r\n".encode())
            selector.register(sock, selectors.EVENT_READ)
        begin, before = time.monotonic(), 0.0
        while time.monotonic() < begin + 3 + seconds:
            for key, _ in selector.select(0.1):
                key.fileobj.recv(1 << 16)  # type: ignore[union-attr]
            if not before and time.monotonic() > begin + 3:
                before = daemon.cpu()
        return (daemon.cpu() - before) / len(identities) / seconds * 1e3


def measure_after(daemons: list[Daemon]) -> Rows:
    """Memory of a daemon after all that."""
    settle(daemons)
    yield "memory, after the work", "MiB", [daemon.pss() for daemon in daemons]


def measure_logs(daemons: list[Daemon], rounds: int = 3, megabytes: int = 50) -> Rows:
    """Time of a container that prints lines of 80 bytes, from its start to its end, with json-file."""
    times: list[list[float]] = [[] for _ in daemons]
    script = f"busybox yes {'x' * 79} | busybox head -c {megabytes}000000"
    for _ in range(rounds):
        for daemon, found in zip(daemons, times):
            call = daemon.connection.call
            identity = daemon.create({"Image": "one", "Cmd": ["sh", "-c", script]})
            begin = time.perf_counter()
            call("POST", f"/containers/{identity}/start")
            call("POST", f"/containers/{identity}/wait")
            found.append(time.perf_counter() - begin)
            call("DELETE", f"/containers/{identity}?force=1")
    yield f"{megabytes} MB of log lines", "ms", [statistics.median(found) * 1e3 for found in times]


def measure_copies(daemons: list[Daemon], rounds: int = 5) -> Rows:
    """Time of cp into a container and out of it again, and of diff after one change to a large image."""
    loads = {"300 MB": plain_files(1, 300 << 20), "10,000 files": plain_files(10000, 1024)}
    for what, tree in loads.items():
        times: list[dict[str, list[float]]] = [{"PUT": [], "GET": []} for _ in daemons]
        for number in range(rounds):
            for index in range(len(daemons)) if number % 2 else reversed(range(len(daemons))):
                call, identity = daemons[index].connection.call, daemons[index].create(VARIANTS[0])
                for method, found in times[index].items():
                    begin = time.perf_counter()
                    call(method, f"/containers/{identity}/archive?path=/tmp",
                         tree if method == "PUT" else None)
                    found.append(time.perf_counter() - begin)
                call("DELETE", f"/containers/{identity}")
        for method, words in (("PUT", "in"), ("GET", "out")):
            yield f"cp of {what} {words}", "ms", [statistics.median(found[method]) * 1e3 for found in times]
    tree, change = plain_files(20000, 100, "files/"), plain_files(1, 1)
    figures: list[list[float]] = [[] for _ in daemons]
    for daemon, taken in zip(daemons, figures):
        call = daemon.connection.call
        call("POST", "/images/create?fromSrc=-&repo=large&tag=latest", tree)
        identity = daemon.create({"Image": "large", "Cmd": ["true"]})
        call("PUT", f"/containers/{identity}/archive?path=/files", change)
        for _ in range(rounds):
            begin = time.perf_counter()
            call("GET", f"/containers/{identity}/changes")
            taken.append(time.perf_counter() - begin)
        call("DELETE", f"/containers/{identity}")
    yield "diff in an image of 20,000 files", "ms", [statistics.median(taken) * 1e3 for taken in figures]


class Registry:
    """Debian's docker-registry on a port of one daemon's network, whose files this program writes itself."""

    def __init__(self, daemon: Daemon, port: int) -> None:
        self.name, self.directory = f"127.0.0.1:{port}", f"{daemon.directory}/registry-{port}"
        os.mkdir(self.directory)
        with open(f"{self.directory}/config", "w") as file:
            file.write(f"version: 0.1\nhttp: {{addr: '{self.name}'}}\n"
                       f"storage: {{filesystem: {{rootdirectory: {self.directory}/data}}}}\n")
        self.process = subprocess.Popen(
            ["nsenter", "-t", str(daemon.holder.pid), "-n", "--", "docker-registry", "serve",
             f"{self.directory}/config"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    def _write(self, path: str, data: bytes) -> None:
        path = f"{self.directory}/data/docker/registry/v2/{path}"
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with open(path, "wb") as file:
            file.write(data)

    def add(self, data: bytes, *links: str) -> str:
        """Keep a blob, and the repository's links to it; its digest."""
        digest = hashlib.sha256(data).hexdigest()
        self._write(f"blobs/sha256/{digest[:2]}/{digest}/data", data)
        for link in links or (f"_layers/sha256/{digest}",):
            self._write(f"repositories/bench/{link.format(digest)}/link", f"sha256:{digest}".encode())
        return f"sha256:{digest}"

    def add_image(self, layers: list[bytes]) -> None:
        """Keep bench:1 of these tar streams."""
        def blob(data: bytes, kind: str = "application/octet-stream") -> dict[str, Any]:
            return {"mediaType": kind, "size": len(data), "digest": self.add(data)}

        diff_ids = [f"sha256:{hashlib.sha256(layer).hexdigest()}" for layer in layers]
        config = {"architecture": "amd64", "os": "linux", "rootfs": {"type": "layers", "diff_ids": diff_ids}}
        kind = "application/vnd.docker.distribution.manifest.v2+json"
        named = blob(json.dumps(config).encode(), "application/vnd.docker.container.image.v1+json")
        manifest = {"schemaVersion": 2, "mediaType": kind, "config": named,
                    "layers": [blob(gzip.compress(layer, 6)) for layer in layers]}
        self.add(json.dumps(manifest).encode(), "_manifests/revisions/sha256/{}", "_manifests/tags/1/current")

    def close(self) -> None:
        """End it."""
        self.process.terminate()
        self.process.wait()


class PeakMemory(threading.Thread):
    """Looks at a daemon's memory again and again; `peak` is the most, in MiB, in a block."""

    def __init__(self, daemon: Daemon) -> None:
        super().__init__(daemon=True)
        self.watched, self.over, self.peak = daemon, threading.Event(), 0.0

    def run(self) -> None:
        """Look until it is over."""
        while not self.over.wait(0.05):
            self.peak = max(self.peak, self.watched.pss())

    def __enter__(self) -> PeakMemory:
        self.start()
        return self

    def __exit__(self, *facts: Any) -> None:
        self.over.set()
        self.join()


def measure_registry(daemons: list[Daemon], rounds: int = 3) -> Rows:
    """Time of a pull and of a push of 300 MB, 20,000 files and 6 layers, from and to a registry beside the
    daemon; the memory that each takes over the idle daemon's."""
    chance = random.Random(5)
    words = [chance.randbytes(6) for _ in range(4000)]  # text of a kind, which gzip halves
    layers = [plain_files(3334, 0, f"layer{number}/", lambda: b"".join(chance.choices(words, k=2500)))
              for number in range(6)]
    times: list[dict[str, list[float]]] = [{"pull": [], "push": []} for _ in daemons]
    memory: list[dict[str, float]] = [{"pull": 0.0, "push": 0.0} for _ in daemons]
    registries = [(Registry(daemon, 5000), Registry(daemon, 5001)) for daemon in daemons]
    for source, _ in registries:
        source.add_image(layers)
    for daemon, (source, target), found, used in [*zip(daemons, registries, times, memory)] * rounds:
        call = daemon.connection.call
        shutil.rmtree(f"{target.directory}/data", ignore_errors=True)
        for what, path in (("pull", f"/images/create?fromImage={source.name}/bench&tag=1"),
                           ("push", f"/images/{target.name}/bench/push?tag=1")):
            idle, begin = daemon.pss(), time.perf_counter()
            with PeakMemory(daemon) as watch:
                answer = call("POST", path, raw=True, headers="X-Registry-Auth: e30=\r\n")
            found[what].append(time.perf_counter() - begin)
            used[what] = max(used[what], watch.peak - idle)
            if b'"error"' in answer:
                raise RuntimeError(f"{daemon.name}: {answer[-300:]!r}")
            call("POST", f"/images/{source.name}/bench:1/tag?repo={target.name}/bench&tag=1")
        for name in (source.name, target.name):
            call("DELETE", f"/images/{name}/bench:1")
        daemon.wait_for_removals()
    for registry in itertools.chain.from_iterable(registries):
        registry.close()
    for what in ("pull", "push"):
        yield (f"{what} of 300 MB, 20,000 files", "ms",
               [statistics.median(found[what]) * 1e3 for found in times])
        yield f"  memory over idle during the {what}", "MiB", [used[what] for used in memory]


def measure_archives(daemons: list[Daemon], rounds: int = 2) -> Rows:
    """Time of import, save and load of 314 MB in 21,000 files, and how far the daemon grows in it."""
    tree, steps = plain_files(21000, 14 << 10), ("import", "save", "rmi", "load")
    times: list[list[list[float]]] = [[] for _ in daemons]
    before = [daemon.peak() for daemon in daemons]
    for daemon, found in [*zip(daemons, times)] * rounds:
        call, saved, at = daemon.connection.call, b"", [time.perf_counter()]
        for method, path, body in (("POST", "/images/create?fromSrc=-&repo=big&tag=1", tree),
                                   ("GET", "/images/big:1/get", None), ("DELETE", "/images/big:1", None),
                                   ("POST", "/images/load", None)):
            answer = call(method, path, saved if path.endswith("load") else body)
            saved = answer if method == "GET" else saved
            at.append(time.perf_counter())
        call("DELETE", "/images/big:1")
        daemon.wait_for_removals()
        found.append([later - earlier for earlier, later in zip(at, at[1:])])
    for step, name in enumerate(steps):
        yield f"{name} of 314 MB, 21,000 files", "ms", [
            statistics.median(run[step] for run in found) * 1e3 for found in times]
    yield "save, rmi and load together", "ms", [
        statistics.median(sum(run[1:4]) for run in found) * 1e3 for found in times]
    yield "  growth of the daemon at most", "MiB", [
        daemon.peak() - peak for daemon, peak in zip(daemons, before)]


def measure_commit(daemons: list[Daemon], rounds: int = 30) -> Rows:
    """Time of a commit of a container with one changed file."""
    change, times = plain_files(1, 1000), list[list[float]]([] for _ in daemons)
    for number in range(rounds):
        for daemon, found in zip(daemons, times):
            call, identity = daemon.connection.call, daemon.create(VARIANTS[0])
            call("PUT", f"/containers/{identity}/archive?path=/tmp", change)
            begin = time.perf_counter()
            call("POST", f"/commit?container={identity}&repo=made&tag={number}")
            found.append(time.perf_counter() - begin)
            call("DELETE", f"/containers/{identity}")
            call("DELETE", f"/images/made:{number}")
    yield "commit of one changed file", "ms", [statistics.median(found) * 1e3 for found in times]


BUILT_STEPS = "FROM one\n" + "".join(f"RUN echo {number} >/{number}\nCOPY 0/0 /to/{number}\n"
                                     for number in range(10))


def context(dockerfile: str, count: int, size: int) -> bytes:
    """A build context: the Dockerfile, and plain_files()."""
    stream = io.BytesIO(plain_files(count, size))
    with tarfile.open(fileobj=stream, mode="a") as tar:
        entry = tarfile.TarInfo("Dockerfile")
        entry.size = len(dockerfile)
        tar.addfile(entry, io.BytesIO(dockerfile.encode()))
    return stream.getvalue()


def measure_builds(daemons: list[Daemon], rounds: int = 5) -> Rows:
    """Time of builds: 20 small steps without and with the cache, and a context of 500 MB."""
    small, large = context(BUILT_STEPS, 1, 1000), context("FROM one\nCOPY . /all\n", 100, 5 << 20)
    for what, body, query, times in (("20 RUN and COPY steps", small, "?nocache=1", rounds),
                                     ("  all from the cache", small, "", rounds),
                                     ("context of 500 MB, COPY", large, "?nocache=1", 2)):
        found: list[list[float]] = [[] for _ in daemons]
        for _ in range(times):
            for daemon, each in zip(daemons, found):
                begin = time.perf_counter()
                if b"Successfully built" not in daemon.connection.call("POST", f"/build{query}", body, True):
                    raise RuntimeError(f"{daemon.name}: the build of {what} failed")
                each.append((time.perf_counter() - begin) * 1e3)
        yield f"build: {what}", "ms", [statistics.median(each) for each in found]


def measure_start(daemons: list[Daemon], rounds: int = 5) -> Rows:
    """Time from the start of the process to the first answered ping and `info`."""
    times: list[list[float]] = [[] for _ in daemons]
    for _ in range(rounds):
        for daemon, found in zip(daemons, times):
            daemon.stop()
            found.append(daemon.start() * 1e3)
    yield "start of the daemon", "ms", [statistics.median(found) for found in times]


def print_row(what: str, unit: str, figures: list[float]) -> None:
    """One line of the table; the last column is theirs over ours."""
    ratio = f"{figures[1] / figures[0]:10.1f} x" if len(figures) > 1 and figures[0] > 0 else ""
    print(f"{what:36} {unit:>3}" + "".join(f"{figure:12.2f}" for figure in figures) + ratio, flush=True)


def main() -> None:
    """Run all measurements and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "-n", type=int, default=300, metavar="COUNT", help="containers in steady state, each (300)"
    )
    parser.add_argument(
        "--real", default=shutil.which("dockerd"), metavar="FILE", help="the real dockerd; '' for none"
    )
    parser.add_argument(
        "--python", default=sys.executable, metavar="FILE", help="the interpreter of dockerd.py"
    )
    parser.add_argument("--json", metavar="FILE", help="write the figures there as well")
    options = parser.parse_args()
    figures: dict[str, Any] = {}
    with contextlib.ExitStack() as stack:
        daemons = [our_daemon(options.python)]
        stack.callback(daemons[0].close)
        if options.real:
            daemons.append(real_daemon(options.real))
            stack.callback(daemons[1].close)
        for daemon in daemons:
            daemon.start()
        versions = [daemon.connection.call("GET", "/version")["Version"] for daemon in daemons]
        print(f"{'median':40}" + "".join(f"{daemon.name:>12}" for daemon in daemons))
        print(f"{'':40}" + "".join(f"{version[:11]:>12}" for version in versions), flush=True)
        for measure in (
            measure_idle,
            _import_images,
            measure_ping,
            functools.partial(measure_steady_state, count=options.n),
            functools.partial(measure_networks, count=max(10, options.n // 10)),
            measure_ports,
            functools.partial(measure_exec, count=max(20, options.n // 3)),
            functools.partial(measure_cpu, count=max(5, options.n // 10)),
            measure_running,
            measure_hundred,
            measure_after,
            measure_logs,
            measure_copies,
            measure_registry,
            measure_builds,
            measure_commit,
            measure_archives,
            measure_start,
        ):
            for what, unit, row in measure(daemons):
                print_row(what, unit, row)
                figures[what.strip()] = {"unit": unit, **dict(zip((daemon.name for daemon in daemons), row))}
    if options.json:
        with open(options.json, "w") as file:
            json.dump(figures, file, indent=1)


def _import_images(daemons: list[Daemon]) -> Rows:
    """The two images, with the time that an import of busybox takes."""
    times: list[list[float]] = [[] for _ in daemons]
    for name in ("one", "two"):
        tree = root_file_system(name)
        for daemon, found in zip(daemons, times):
            begin = time.perf_counter()
            daemon.connection.call(
                "POST",
                f"/images/create?fromSrc=-&repo={name}&tag=latest&changes=ENV%20"
                + PATH.replace("=", "%3D").replace("/", "%2F"),
                tree,
            )
            found.append((time.perf_counter() - begin) * 1e3)
    yield "import of busybox (2 MB)", "ms", [statistics.median(found) for found in times]


if __name__ == "__main__":
    main()
