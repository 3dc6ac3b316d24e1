#!/usr/bin/env python3
"""dockerd.py: a Docker daemon in one file.

``sudo python3 dockerd.py -d`` serves the Docker API, v1.12 to v1.51; ``import dockerd`` embeds the engine in
a program.  The standard library and ctypes only, Python 3.9 or newer, Linux on x86-64 and aarch64.

A section uses only what stands above it:

    Constants           kernel and protocol numbers
    Errors              one exception class per HTTP meaning
    Kernel calls        one small wrapper per system call
    Netlink             links, addresses and routes over rtnetlink
    Options             one table: flags, daemon.json, --help, man page
    Engine              Engine, Job, Env, streams, shutdown, signal trap
    Archives            tar streams: read, write, apply a layer, diff
    Storage drivers     overlay2, btrfs and vfs behind one small interface; the writer of all state
    Images              content-addressed layers, image configs, tags
    Registry            the registry's jobs
    Execution driver    container spec to running process: shim, init, cgroups, seccomp, console
    Network driver      what a container's network namespace is given
    Volumes             what is mounted into a container beside its root
    Logs                json-file; follow, since, until, tail
    Containers          state machine, monitor, attach, logs
    Builder             Dockerfiles
    Daemon              puts the parts together: load, recover, job handlers, events, info
    API server          listeners, HTTP, one route table, version gates, hijack
    Builtins and main   register the jobs, run

Work flows one way: request -> route -> Job -> Daemon -> Container/Image -> driver -> kernel call.
"""
from __future__ import annotations

import base64
import collections
import contextlib
import copy
import ctypes
import errno
import fcntl
import functools
import glob
import hashlib
import io
import ipaddress
import itertools
import json
import logging
import os
import queue
import re
import secrets
import select
import shlex
import signal
import socket
import stat
import struct
import sys
import threading
import time
import types
import weakref
import zlib
from typing import Any, BinaryIO, Callable, Iterable, Iterator, NamedTuple, Optional, Union

__all__ = ["Engine", "Job", "Env", "DockerError", "VERSION", "API_VERSION", "main"]

VERSION = "28.2.2"
GIT_COMMIT = "dockerd.py"
API_VERSION = "1.51"
MIN_API_VERSION = "1.12"

SOURCE = os.path.realpath((lambda: None).__code__.co_filename)  # this file, also when run from its bytecode

log = logging.getLogger("dockerd")


# ------------------------------------------------------------------------------------------------------------
# Constants
#
# Numbers of the kernel's and the protocols' interfaces, alphabetical, each group with the header it comes
# from. What os, socket, signal or stat already name is not repeated here.
# ------------------------------------------------------------------------------------------------------------

# <dirent.h>
DT_UNKNOWN = 0

# <fcntl.h>, <linux/fcntl.h>
AT_EMPTY_PATH = 0x1000
AT_FDCWD = -100
AT_RECURSIVE = 0x8000
F_SETPIPE_SZ = 1031
SPLICE_F_MOVE = 1
SPLICE_F_NONBLOCK = 2

# <linux/bpf.h>
BPF_CGROUP_DEVICE = 6
BPF_F_ALLOW_MULTI = 2
BPF_PROG_ATTACH = 8
BPF_PROG_LOAD = 5
BPF_PROG_TYPE_CGROUP_DEVICE = 15

# <linux/sched.h>
CLONE_FS = 0x00000200
CLONE_INTO_CGROUP = 0x200000000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWNET = 0x40000000
CLONE_NEWNS = 0x00020000
CLONE_NEWPID = 0x20000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWUTS = 0x04000000
CLONE_PARENT = 0x00008000
CLONE_PIDFD = 0x00001000

# <linux/close_range.h>
CLOSE_RANGE_CLOEXEC = 4

# <linux/mount.h>
FSCONFIG_CMD_CREATE = 6
FSCONFIG_SET_FLAG = 0
FSCONFIG_SET_STRING = 1
FSMOUNT_CLOEXEC = 1
FSOPEN_CLOEXEC = 1
MNT_DETACH = 2
MOUNT_ATTR_NODEV = 0x4
MOUNT_ATTR_NOEXEC = 0x8
MOUNT_ATTR_NOSUID = 0x2
MOUNT_ATTR_RDONLY = 0x1
MOUNT_ATTR_STRICTATIME = 0x20
MOVE_MOUNT_F_EMPTY_PATH = 0x4
MOVE_MOUNT_T_EMPTY_PATH = 0x40
MS_PRIVATE = 1 << 18
MS_REC = 16384
MS_SLAVE = 1 << 19
OPEN_TREE_CLOEXEC = os.O_CLOEXEC
OPEN_TREE_CLONE = 1

# <linux/btrfs.h>
BTRFS_IOC_SNAP_CREATE_V2 = 0x50009417
BTRFS_IOC_SNAP_DESTROY = 0x5000940F
BTRFS_IOC_SUBVOL_CREATE = 0x5000940E

# <linux/fs.h>
FICLONE = 0x40049409
FS_APPEND_FL = 0x20
FS_IMMUTABLE_FL = 0x10
FS_IOC_GETFLAGS = 0x80086601
FS_IOC_SETFLAGS = 0x40086602

# <linux/ioctl.h> families: <asm-generic/ioctls.h>, <linux/sockios.h>
SIOCGSKNS = 0x894C
TIOCGPTPEER = 0x5441
TIOCSCTTY = 0x540E
TIOCSWINSZ = 0x5414

# <linux/openat2.h>
RESOLVE_IN_ROOT = 0x10
RESOLVE_NO_MAGICLINKS = 0x02
RESOLVE_NO_SYMLINKS = 0x04

# <linux/capability.h>
LINUX_CAPABILITY_VERSION_3 = 0x20080522

# <linux/magic.h>
BTRFS_SUPER_MAGIC = 0x9123683E
DEVPTS_SUPER_MAGIC = 0x1CD1

# <linux/keyctl.h>
KEYCTL_JOIN_SESSION_KEYRING = 1

# <linux/prctl.h>
PR_CAPBSET_DROP = 24
PR_CAPBSET_READ = 23
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4
PR_SET_CHILD_SUBREAPER = 36
PR_SET_DUMPABLE = 4
PR_SET_KEEPCAPS = 8
PR_SET_NAME = 15
PR_SET_NO_NEW_PRIVS = 38

# <linux/pidfd.h>: _IOWR(0xFF, 11, struct pidfd_info of 64 bytes)
PIDFD_GET_INFO = 0xC040FF0B
PIDFD_INFO_EXIT = 1 << 3

# <linux/seccomp.h>
SECCOMP_SET_MODE_FILTER = 1

# <linux/rtnetlink.h>, <linux/netlink.h>, <linux/if.h>, <linux/if_link.h>, <linux/if_addr.h>, <linux/veth.h>
IFA_ADDRESS = 1
IFA_BROADCAST = 4
IFA_F_NODAD = 2
IFA_LOCAL = 2
IFF_UP = 1
IFLA_ADDRESS = 1
IFLA_IFNAME = 3
IFLA_INFO_DATA = 2
IFLA_INFO_KIND = 1
IFLA_LINK = 5
IFLA_LINKINFO = 18
IFLA_MASTER = 10
IFLA_MTU = 4
IFLA_NET_NS_FD = 28
IFLA_VLAN_ID = 1
NETLINK_CAP_ACK = 10
NETLINK_EXT_ACK = 11
NETLINK_NETFILTER = 12
NETLINK_ROUTE = 0
NLA_F_NESTED = 0x8000
NLMSG_DONE = 3
NLMSG_ERROR = 2
NLM_F_ACK = 4
NLM_F_APPEND = 0x800
NLM_F_CREATE = 0x400
NLM_F_DUMP = 0x300
NLM_F_EXCL = 0x200
NLM_F_REPLACE = 0x100
NLM_F_REQUEST = 1
RTA_DST = 1
RTA_GATEWAY = 5
RTA_OIF = 4
RTM_DELADDR = 21
RTM_DELLINK = 17
RTM_DELROUTE = 25
RTM_GETADDR = 22
RTM_GETLINK = 18
RTM_GETROUTE = 26
RTM_NEWADDR = 20
RTM_NEWLINK = 16
RTM_NEWROUTE = 24
RTPROT_BOOT = 3
RT_SCOPE_LINK = 253
RT_TABLE_MAIN = 254
SOL_NETLINK = 270
VETH_INFO_PEER = 1

# <linux/netfilter.h>, <linux/netfilter/nfnetlink.h>, nf_tables.h, nfnetlink_conntrack.h
CTA_PROTO_DST_PORT = 3
CTA_PROTO_NUM = 1
CTA_TUPLE_ORIG = 1
CTA_TUPLE_PROTO = 2
IPCTNL_MSG_CT_DELETE = 1 << 8 | 2
IPCTNL_MSG_CT_GET = 1 << 8 | 1
IPS_DST_NAT = 1 << 5
NFNL_MSG_BATCH_BEGIN = 16
NFNL_MSG_BATCH_END = 17
NFT_MSG_DELRULE = 10 << 8 | 8
NFT_MSG_DELSETELEM = 10 << 8 | 14
NFT_MSG_DELTABLE = 10 << 8 | 2
NFT_MSG_NEWCHAIN = 10 << 8 | 3
NFT_MSG_NEWRULE = 10 << 8 | 6
NFT_MSG_NEWSET = 10 << 8 | 9
NFT_MSG_NEWSETELEM = 10 << 8 | 12
NFT_MSG_NEWTABLE = 10 << 8 | 0
NFT_RETURN = -5
NF_ACCEPT = 1
NF_DROP = 0
NF_INET_FORWARD = 2
NF_INET_LOCAL_OUT = 3
NF_INET_POST_ROUTING = 4
NF_INET_PRE_ROUTING = 0

# <asm/unistd.h>: system calls that the C library of the oldest host served does not wrap, by machine
SYSCALLS = {
    "x86_64": {"bpf": 321, "capget": 125, "capset": 126, "getdents64": 217, "keyctl": 250, "pivot_root": 155,
               "rt_sigaction": 13, "seccomp": 317},
    "aarch64": {"bpf": 280, "capget": 90, "capset": 91, "getdents64": 61, "keyctl": 219, "pivot_root": 41,
                "rt_sigaction": 134, "seccomp": 277},
}
SYSCALL_CLONE3 = 435
SYSCALL_CLOSE_RANGE = 436
SYSCALL_FSCONFIG = 431
SYSCALL_FSMOUNT = 432
SYSCALL_FSOPEN = 430
SYSCALL_MOUNT_SETATTR = 442
SYSCALL_MOVE_MOUNT = 429
SYSCALL_OPENAT2 = 437
SYSCALL_OPEN_TREE = 428


# ------------------------------------------------------------------------------------------------------------
# Errors
#
# One exception class per HTTP meaning, and one table that maps class to status.  Everything below raises
# these (or OSError, which is a 500); only the API server reads the table.  The failpoints, by which the tests
# make a step fail or take a defence away, stand here too, because every section asks them.
# ------------------------------------------------------------------------------------------------------------


class DockerError(Exception):
    """A failure that the client is told of; its text is one line.  The daemon's own fault: 500."""


class BadParameter(DockerError):
    """The request itself is wrong: 400."""


class Unauthorized(DockerError):
    """Credentials are missing or refused: 401."""


class Forbidden(DockerError):
    """The request is understood and not allowed: 403."""


class NotFound(DockerError):
    """The object asked for does not exist: 404."""


class Conflict(DockerError):
    """The object's state does not allow it: 409."""


class NotModified(DockerError):
    """The object already is in the state asked for: 304."""


class NotSupported(DockerError):
    """This daemon does not have the feature: 501."""


class Unavailable(DockerError):
    """The daemon cannot serve this now: 503."""


HTTP_STATUS: dict[type, int] = {
    BadParameter: 400, Unauthorized: 401, Forbidden: 403, NotFound: 404, Conflict: 409, NotModified: 304,
    NotSupported: 501, Unavailable: 503, DockerError: 500,
}


def http_status(error: BaseException) -> int:
    """The HTTP status of `error`: that of the nearest of its classes in HTTP_STATUS, else 500."""
    return next((HTTP_STATUS[kind] for kind in type(error).__mro__ if kind in HTTP_STATUS), 500)


def _parse_failpoints(text: str) -> dict[str, tuple[str, int]]:
    """NAME=ACTION[@N],... as {NAME: (ACTION, N)}: the action happens at the Nth passage, by default the
    first."""
    points = {}
    for item in filter(None, text.split(",")):
        name, _, action = item.partition("=")
        action, _, count = action.partition("@")
        points[name] = (action, int(count or 1))
    return points


FAILPOINTS = _parse_failpoints(os.environ.get("DOCKERD_FAILPOINTS", ""))
_failpoint_passages: dict[str, int] = {}


def failpoint(name: str) -> None:
    """A step that a test can make fail: `kill` ends the process on the spot, `enospc` and `eio` raise
    OSError."""
    if name not in FAILPOINTS:
        return
    action, at = FAILPOINTS[name]
    passage = _failpoint_passages[name] = _failpoint_passages.get(name, 0) + 1
    if passage != at:
        return
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    number = {"enospc": errno.ENOSPC, "eio": errno.EIO}.get(action)
    if number:
        raise OSError(number, os.strerror(number), name)


def defended(name: str) -> bool:
    """Whether the security defence `name` stands; a test takes it away by DOCKERD_FAILPOINTS="NAME=off"."""
    return FAILPOINTS.get(name, ("", 0))[0] != "off"


# ------------------------------------------------------------------------------------------------------------
# Kernel calls
#
# One small wrapper per system call: arguments in, OSError with the path out.  ctypes lives here and nowhere
# else. What os, fcntl or signal already offer on Python 3.9 is used from there.  Sources: the man pages of
# section 2, Documentation/filesystems/mount_api.rst for the mount calls that have none.
# ------------------------------------------------------------------------------------------------------------

_libc = ctypes.CDLL(None, use_errno=True)
_libc_with_gil = ctypes.PyDLL(None, use_errno=True)
_syscall_function = _libc.syscall
_syscall_function.restype = ctypes.c_long
_MACHINE = os.uname().machine
_NUMBERS = SYSCALLS.get(_MACHINE, SYSCALLS["x86_64"])


def _check(result: int, path: Union[str, bytes, int, None] = None) -> int:
    """`result`, or the OSError that errno tells of when it is negative."""
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), path if path != "" else None)
    return result


def _pointer(value: Any) -> Any:
    """One argument of a raw system call as ctypes wants it: str and bytes by address, None as NULL, int as
    long."""
    if isinstance(value, int):
        return ctypes.c_long(value)
    if isinstance(value, str):
        return ctypes.c_char_p(os.fsencode(value))
    return ctypes.c_char_p(value) if isinstance(value, bytes) else value


def _syscall(number: int, *arguments: Any, path: Union[str, bytes, int, None] = None) -> int:
    """syscall(2): the result, or OSError naming `path`."""
    return _check(_syscall_function(ctypes.c_long(number), *map(_pointer, arguments)), path)


def bpf(command: int, attributes: bytes) -> int:
    """bpf(2) with the union's bytes; what the command returns, often a descriptor."""
    return _syscall(_NUMBERS["bpf"], command, attributes, len(attributes))


def bpf_load(program_type: int, program: bytes) -> int:
    """A descriptor of the eBPF `program` (8 bytes an instruction) of BPF_PROG_TYPE_*; bpf(2),
    BPF_PROG_LOAD."""
    code, license_name = map(ctypes.create_string_buffer, (program, b"Apache-2.0"))
    return bpf(BPF_PROG_LOAD, struct.pack("=IIQQ", program_type, len(program) // 8, ctypes.addressof(code),
                                          ctypes.addressof(license_name)))


def capget() -> tuple[int, int, int]:
    """The calling thread's (effective, permitted, inheritable) capabilities as bit masks; capget(2)."""
    data = ctypes.create_string_buffer(24)
    _syscall(_NUMBERS["capget"], struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0), data)
    low = struct.unpack("=6I", data.raw)
    return low[0] | low[3] << 32, low[1] | low[4] << 32, low[2] | low[5] << 32


def capset(effective: int, permitted: int, inheritable: int) -> None:
    """Set the calling thread's capabilities from bit masks; capset(2)."""
    sets = (effective, permitted, inheritable)
    data = struct.pack("=6I", *(mask & 0xFFFFFFFF for mask in sets), *(mask >> 32 for mask in sets))
    _syscall(_NUMBERS["capset"], struct.pack("=Ii", LINUX_CAPABILITY_VERSION_3, 0), data)


def clone3(flags: int, cgroup: Optional[int] = None) -> tuple[int, int]:
    """Fork into the namespaces of `flags` (CLONE_NEW*), in the cgroup v2 directory `cgroup` when given; with
    CLONE_PARENT the child is the caller's brother.

    Returns (0, -1) in the child and (pid, pidfd) in the parent.  The interpreter is told, as os.fork tells
    it; glibc's own fork handlers do not run, so the caller must be single-threaded (pitfall 5).
    clone3(2)."""
    pidfd = ctypes.c_int(-1)
    flags |= CLONE_PIDFD | (0 if cgroup is None else CLONE_INTO_CGROUP)
    arguments = struct.pack(
        "=11Q", flags, ctypes.addressof(pidfd), 0, 0, 0 if flags & CLONE_PARENT else signal.SIGCHLD, 0, 0, 0,
        0, 0, cgroup or 0)
    api = ctypes.pythonapi
    api.PyOS_BeforeFork()
    pid = _libc_with_gil.syscall(ctypes.c_long(SYSCALL_CLONE3), ctypes.c_char_p(arguments),
                                 ctypes.c_long(len(arguments)))
    number = ctypes.get_errno()
    if pid == 0:
        api.PyOS_AfterFork_Child()
        return 0, -1
    api.PyOS_AfterFork_Parent()
    if pid < 0:
        raise OSError(number, "clone3: " + os.strerror(number))
    return pid, pidfd.value


def close_range(first: int, last: int = 0xFFFFFFFF, flags: int = 0) -> None:
    """Close the descriptors `first` to `last`, or mark them with CLOSE_RANGE_CLOEXEC; close_range(2)."""
    _syscall(SYSCALL_CLOSE_RANGE, first, last, flags)


@contextlib.contextmanager
def closing_fd(fd: int) -> Iterator[int]:
    """The descriptor `fd` for the block, closed at its end."""
    try:
        yield fd
    finally:
        os.close(fd)


def directory_types(path: str) -> set[int]:
    """The d_type values (DT_*) that the file system gives the entries of a directory; getdents64(2)."""
    with opened(path) as fd:
        buffer, at, types = ctypes.create_string_buffer(32768), 0, set()
        size = _syscall(_NUMBERS["getdents64"], fd, buffer, 32768, path=path)
        while at < size:
            length, kind = struct.unpack_from("=HB", buffer.raw, at + 16)
            types.add(kind)
            at += length
        return types


def fsconfig_create(fd: int) -> None:
    """Make the superblock that the context `fd` describes; an error carries the kernel's own log lines."""
    try:
        _syscall(SYSCALL_FSCONFIG, fd, FSCONFIG_CMD_CREATE, None, None, 0)
    except OSError as error:
        with contextlib.suppress(OSError):
            detail = os.read(fd, 4096).decode(errors="replace").strip()
            error = OSError(error.errno, f"{error.strerror} ({detail})")
        raise error


def fsconfig_flag(fd: int, key: str) -> None:
    """Set the valueless parameter `key` of the context `fd`."""
    _syscall(SYSCALL_FSCONFIG, fd, FSCONFIG_SET_FLAG, key, None, 0, path=key)


def fsconfig_string(fd: int, key: str, value: str) -> None:
    """Give the parameter `key` of the context `fd` a string of fewer than 256 bytes."""
    _syscall(SYSCALL_FSCONFIG, fd, FSCONFIG_SET_STRING, key, value, 0, path=value)


def fsmount(fd: int, flags: int = FSMOUNT_CLOEXEC, attributes: int = 0) -> int:
    """A descriptor of a detached mount of the context `fd`, with MOUNT_ATTR_* attributes."""
    return _syscall(SYSCALL_FSMOUNT, fd, flags, attributes)


def fsopen(filesystem: str, flags: int = FSOPEN_CLOEXEC) -> int:
    """A descriptor of a new configuration context for `filesystem`."""
    return _syscall(SYSCALL_FSOPEN, filesystem, flags, path=filesystem)


def keyctl_join_session() -> None:
    """Give the process an anonymous session keyring of its own; keyctl(2), KEYCTL_JOIN_SESSION_KEYRING."""
    _syscall(_NUMBERS["keyctl"], KEYCTL_JOIN_SESSION_KEYRING, None, 0, 0, 0)


def mount(source: str, target: str, fstype: str = "", flags: int = 0, data: str = "") -> None:
    """mount(2); `data` is the file system's option string of at most one page."""
    _check(_libc.mount(os.fsencode(source), os.fsencode(target), os.fsencode(fstype) or None,
                       ctypes.c_ulong(flags), os.fsencode(data) or None), target)


def mount_setattr(fd: int, path: str, flags: int = 0, set: int = 0, clear: int = 0, propagation: int = 0,
                  userns_fd: int = 0) -> None:
    """Change MOUNT_ATTR_* and the propagation of a mount, with AT_RECURSIVE of its whole tree;
    mount_setattr(2)."""
    attributes = struct.pack("=4Q", set, clear, propagation, userns_fd)
    _syscall(SYSCALL_MOUNT_SETATTR, fd, path, flags, attributes, len(attributes), path=path)


def move_mount(from_fd: int, from_path: str, to_fd: int, to_path: str, flags: int = 0) -> None:
    """Attach the mount `from` at `to`; an empty path with MOVE_MOUNT_{F,T}_EMPTY_PATH means the
    descriptor."""
    _syscall(SYSCALL_MOVE_MOUNT, from_fd, from_path, to_fd, to_path, flags, path=to_path)


def new_mount(fstype: str, attributes: int = 0, source: str = "",
              options: Iterable[tuple[str, str]] = ()) -> int:
    """A descriptor of a detached mount of a new `fstype` with its options: fsopen, fsconfig, fsmount in
    one."""
    with closing_fd(fsopen(fstype)) as context:
        if source:
            fsconfig_string(context, "source", source)
        for key, value in options:
            if value:
                fsconfig_string(context, key, value)
            else:
                fsconfig_flag(context, key)
        fsconfig_create(context)
        return fsmount(context, FSMOUNT_CLOEXEC, attributes)


def open_tree(dirfd: int, path: str, flags: int = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC) -> int:
    """A descriptor of the mount at `path`, with OPEN_TREE_CLONE of a detached copy of it; open_tree(2)."""
    return _syscall(SYSCALL_OPEN_TREE, dirfd, path, flags, path=path)


def openat2(dirfd: int, path: str, flags: int, mode: int = 0, resolve: int = 0) -> int:
    """openat2(2): open `path` with RESOLVE_* rules; O_CLOEXEC is always set."""
    how = struct.pack("=3Q", flags | os.O_CLOEXEC, mode, resolve)
    while True:
        try:
            return _syscall(SYSCALL_OPENAT2, dirfd, path, how, len(how), path=path)
        except BlockingIOError:  # EAGAIN: a rename raced with the resolution; the man page says to try again
            continue


def opened(path: Any, flags: int = os.O_RDONLY | os.O_DIRECTORY, mode: int = 0o600,
           dir_fd: Optional[int] = None) -> contextlib.AbstractContextManager[int]:
    """A descriptor of `path`, by default of a directory, for the block; it is closed by exec; open(2)."""
    return closing_fd(os.open(path, flags | os.O_CLOEXEC, mode, dir_fd=dir_fd))


def pidfd_exit_code(pidfd: int) -> Optional[int]:
    """The wait status of the ended process behind `pidfd`, ours or not; None where the kernel (before 6.15)
    or the process does not tell.  Linux Documentation: struct pidfd_info in <linux/pidfd.h>."""
    info = bytearray(struct.pack("=Q", PIDFD_INFO_EXIT) + bytes(56))
    try:
        fcntl.ioctl(pidfd, PIDFD_GET_INFO, info)
    except OSError:
        return None
    mask, = struct.unpack_from("=Q", info, 0)
    return struct.unpack_from("=i", info, 60)[0] if mask & PIDFD_INFO_EXIT else None


def pivot_root(new_root: str, put_old: str) -> None:
    """pivot_root(2)."""
    _syscall(_NUMBERS["pivot_root"], new_root, put_old, path=new_root)


def prctl(operation: int, *arguments: int) -> int:
    """prctl(2) with integer arguments."""
    values = [ctypes.c_ulong(argument) for argument in (*arguments, 0, 0, 0, 0)[:4]]
    return _check(_libc.prctl(operation, *values))


def close_fds(fds: Iterable[int]) -> None:
    """Close all these descriptors."""
    for fd in fds:
        os.close(fd)


def receive_fds(connection: socket.socket, size: int, most: int) -> tuple[bytes, list[int]]:
    """Up to `size` bytes and `most` descriptors, close-on-exec from the start; unix(7), SCM_RIGHTS.

    socket.recv_fds loses its flags on all Python versions served here."""
    data, ancillary, _, _ = connection.recvmsg(size, socket.CMSG_SPACE(most * 4), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, content in ancillary:
        if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
            fds += struct.unpack(f"={len(content) // 4}i", content[:len(content) & ~3])
    return data, fds


def reset_signal(number: int) -> None:
    """Give the signal its default action, also where the C library keeps it for itself; rt_sigaction(2)."""
    _syscall(_NUMBERS["rt_sigaction"], number, bytes(32), None, 8)


def seccomp_load(program: bytes, flags: int = 0) -> None:
    """Install the classic BPF `program` (8 bytes an instruction) as this thread's filter; seccomp(2)."""
    code = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(program) // 8, ctypes.addressof(code))
    _syscall(_NUMBERS["seccomp"], SECCOMP_SET_MODE_FILTER, flags, header)


def set_process_name(name: str) -> None:
    """The name that ps shows for this thread, cut at 15 bytes; PR_SET_NAME."""
    _check(_libc.prctl(PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]), 0, 0, 0))


def setdomainname(name: str) -> None:
    """The NIS domain name of the UTS namespace; setdomainname(2)."""
    _check(_libc.setdomainname(name.encode(), ctypes.c_size_t(len(name.encode()))))


def setns(fd: int, kind: int = 0) -> None:
    """Move the calling thread into the namespace (or those of a pidfd) behind `fd`; setns(2)."""
    _check(_libc.setns(fd, kind))


def splice(source: int, target: int, count: int) -> int:
    """Move up to `count` bytes between two descriptors, one of them a pipe, without copying them; the number
    moved, 0 at the end.  BlockingIOError when a side is not ready; splice(2)."""
    flags = SPLICE_F_MOVE | SPLICE_F_NONBLOCK
    return _check(_libc.splice(source, None, target, None, ctypes.c_size_t(count), flags))


def statfs_type(place: Union[str, int]) -> int:
    """The magic number of the file system of a path or descriptor (os.statvfs does not tell); statfs(2)."""
    buffer = ctypes.create_string_buffer(120)
    if isinstance(place, int):
        _check(_libc.fstatfs(place, buffer))
    else:
        _check(_libc.statfs(os.fsencode(place), buffer), place)
    return struct.unpack_from("=Q", buffer.raw)[0] & 0xFFFFFFFF


def syncfs(fd: int) -> None:
    """Write the whole file system behind `fd` out, and tell of errors; syncfs(2)."""
    _check(_libc.syncfs(fd))


def trim_memory() -> None:
    """Give the kernel back what the C library keeps of freed memory; malloc_trim(3), which only glibc has."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(ctypes.c_size_t(0))


def umount(path: str, flags: int = 0) -> None:
    """umount2(2)."""
    _check(_libc.umount2(os.fsencode(path), flags), path)


def unshare(flags: int) -> None:
    """Give the calling thread new namespaces, or a file system context of its own (CLONE_FS); unshare(2)."""
    _check(_libc.unshare(flags))


def start_thread(function: Callable[..., Any], *arguments: Any) -> Callable[[], Any]:
    """Start `function(*arguments)` in a thread that ends with it; the result is a function that waits for the
    outcome, and returns or raises it."""
    outcome: dict[str, Any] = {}

    def body() -> None:
        try:
            outcome["result"] = function(*arguments)
        except BaseException as error:
            outcome["error"] = error

    def join() -> Any:
        thread.join()
        if "error" in outcome:
            raise outcome["error"]
        return outcome["result"]

    thread = threading.Thread(target=body, name="confined", daemon=True)
    thread.start()
    return join


def in_thread(function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises in a thread of its own: for calls whose effect on the
    thread (setns, unshare, chroot) must not outlive them (pitfall 8)."""
    return start_thread(function, *arguments)()


def start_confined(root: Union[str, int], function: Callable[..., Any], *arguments: Any,
                   failed: Callable[[BaseException], Any] = lambda error: None) -> Callable[[], Any]:
    """start_thread() with `root` (a path or a descriptor) as the thread's root directory.

    The kernel resolves every path of it inside `root`: no link and no `..` leads out.  The function must not
    import, nor load anything by name (pitfalls 3 and 8).  `failed(error)` is called at once on an error."""

    def body() -> Any:
        try:
            unshare(CLONE_FS)
            os.fchdir(root) if isinstance(root, int) else os.chdir(root)
            if defended("chroot"):
                os.chroot(".")
            return function(*arguments)
        except BaseException as error:
            failed(error)
            raise

    return start_thread(body)


def confined(root: Union[str, int], function: Callable[..., Any], *arguments: Any) -> Any:
    """What `function(*arguments)` returns or raises when it is confined to `root` as by start_confined()."""
    return start_confined(root, function, *arguments)()


def read_text(path: str, limit: int = 1 << 20) -> str:
    """The text of one of the host's files, above all of /proc and /sys; "" where it cannot be read."""
    try:
        with open(path, encoding="utf-8", errors="replace") as file:
            return file.read(limit)
    except OSError:
        return ""


def load_native() -> Any:
    """The compiled helper `_native` beside this file, or None: every function in it has a twin in Python
    here."""
    if os.environ.get("DOCKERD_NATIVE") == "0":
        return None
    if os.path.dirname(SOURCE) not in sys.path:  # run from bytecode, which lies elsewhere
        sys.path.append(os.path.dirname(SOURCE))
    try:
        from _native import lib
    except ImportError:
        return None
    return lib


native: Any = None  # set by main and by Engine users who want it: native = load_native()


def sd_notify(state: str) -> bool:
    """Tell the service manager `state` (READY=1, STOPPING=1, WATCHDOG=1, ...); whether one listens.

    Source: sd_notify(3): one datagram to the Unix socket that $NOTIFY_SOCKET names, '@' for an abstract
    one."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address.startswith(("/", "@")):
        return False
    if native is not None:
        return native.sd_notify(address.encode(), state.encode()) >= 0
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as notify:
        try:
            notify.sendto(state.encode(), "\0" + address[1:] if address[0] == "@" else address)
        except OSError as error:
            log.warning("cannot notify %s of %s: %s", address, state, error)
            return False
    return True


# ------------------------------------------------------------------------------------------------------------
# Netlink
#
# Requests to the kernel's networking over rtnetlink: one socket, one round trip per batch, errors with the
# kernel's own text (extended ack).  RFC 3549, rtnetlink(7), Documentation/userspace-api/netlink.
# ------------------------------------------------------------------------------------------------------------


def netlink_message(kind: int, payload: bytes, flags: int = 0, sequence: int = 1) -> bytes:
    """One request with its header, acknowledged by the kernel; `payload` is the family's fixed part and
    attributes."""
    flags |= NLM_F_REQUEST | (0 if flags & NLM_F_DUMP == NLM_F_DUMP else NLM_F_ACK)
    head = struct.pack("=IHHII", 16 + len(payload), kind, flags, sequence, 0)
    return head + payload + bytes(-len(payload) % 4)


def attribute(kind: int, *values: Union[bytes, int, str]) -> bytes:
    """One attribute of a request: bytes as they are, an int as a u32 of this machine, a text with its NUL;
    several are one after the other, which is how attributes nest."""
    data = b"".join(struct.pack("=I", value) if isinstance(value, int) else
                    value.encode() + b"\0" if isinstance(value, str) else value for value in values)
    return struct.pack("=HH", 4 + len(data), kind) + data + bytes(-len(data) % 4)


def attributes(data: bytes) -> dict[int, bytes]:
    """The attributes in `data` by their kind."""
    found, offset = {}, 0
    while offset + 4 <= len(data):
        length, kind = struct.unpack_from("=HH", data, offset)
        if length < 4:
            break
        found[kind & 0x3FFF] = data[offset + 4:offset + length]
        offset += (length + 3) & ~3
    return found


def _netlink_socket(protocol: int) -> socket.socket:
    link = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, protocol)
    for option in (NETLINK_EXT_ACK, NETLINK_CAP_ACK):
        with contextlib.suppress(OSError):
            link.setsockopt(SOL_NETLINK, option, 1)
    return link


def netlink_batch(messages: list[bytes], protocol: int = NETLINK_ROUTE) -> None:
    """Send `messages` in one call and read their acknowledgements.

    Raises OSError with the kernel's extended text for the first that failed."""
    if native is not None:
        _netlink_batch_native(b"".join(messages), len(messages), protocol)
        return
    with _netlink_socket(protocol) as link:
        link.send(b"".join(messages))
        waiting = len(messages)
        while waiting:
            for kind, _, body in _netlink_answers(link.recv(65536)):
                if kind == NLMSG_ERROR:
                    _raise_error(body)
                    waiting -= 1


def _netlink_batch_native(data: bytes, count: int, protocol: int) -> None:
    from _native import ffi
    text = ffi.new("char[256]")
    number = -native.netlink_batch(protocol, data, len(data), count, text, 256)
    if number:
        words = ffi.string(text).decode(errors="replace")
        raise OSError(number, f"{os.strerror(number)}{': ' + words if words else ''}")


def netlink_dump(kind: int, payload: bytes, protocol: int = NETLINK_ROUTE) -> Iterator[bytes]:
    """What the kernel lists for the request: the payload of each answer; OSError where it refuses."""
    with _netlink_socket(protocol) as link:
        link.send(netlink_message(kind, payload, NLM_F_DUMP))
        while True:
            for answer, _, body in _netlink_answers(link.recv(1 << 18)):
                if answer == NLMSG_DONE:
                    return
                if answer == NLMSG_ERROR:
                    _raise_error(body)
                yield body


def _netlink_answers(data: bytes) -> Iterator[tuple[int, int, bytes]]:
    """(type, flags, payload) of each message in `data`."""
    offset = 0
    while offset + 16 <= len(data):
        length, kind, flags = struct.unpack_from("=IHH", data, offset)
        yield kind, flags, data[offset + 16:offset + length]
        offset += (length + 3) & ~3


def _raise_error(body: bytes) -> None:
    """OSError for an NLMSG_ERROR that is no mere acknowledgement, with NLMSGERR_ATTR_MSG (1) where the kernel
    says more."""
    number = -struct.unpack_from("=i", body)[0]
    if number:
        text = attributes(body[20:]).get(1, b"").rstrip(b"\0").decode(errors="replace")
        raise OSError(number, f"{os.strerror(number)}{': ' + text if text else ''}")


def link_change(index: int, *settings: bytes, up: bool = True, kind: int = RTM_NEWLINK) -> bytes:
    """The request that changes the link (loopback is 1 in every namespace) and brings it up or down."""
    head = struct.pack("=BxHiII", 0, 0, index, IFF_UP * up, IFF_UP)
    return netlink_message(kind, head + b"".join(settings))


def link_up(index: int) -> None:
    """Bring the link with this interface index up."""
    netlink_batch([link_change(index)])


# ------------------------------------------------------------------------------------------------------------
# Netlink: links, addresses, routes, flows and rules
#
# What the network driver asks of the kernel; the shim needs none of it.  rtnetlink(7),
# linux/netfilter/nfnetlink_conntrack.h, linux/netfilter/nf_tables.h.
# ------------------------------------------------------------------------------------------------------------

IPAddress = Union[ipaddress.IPv4Address, ipaddress.IPv6Address]
IPInterface = Union[ipaddress.IPv4Interface, ipaddress.IPv6Interface]
IPNetwork = Union[ipaddress.IPv4Network, ipaddress.IPv6Network]


def ip_family(version: int) -> socket.AddressFamily:
    """The socket's family of IP version 4 or 6."""
    return socket.AF_INET if version == 4 else socket.AF_INET6


def link_message(name: str, kind: str, *settings: bytes, data: bytes = b"", up: bool = True) -> bytes:
    """The request that makes a link of `kind` (bridge, veth, macvlan, ...) with further attributes."""
    info = attribute(IFLA_LINKINFO | NLA_F_NESTED, attribute(IFLA_INFO_KIND, kind),
                     attribute(IFLA_INFO_DATA | NLA_F_NESTED, data) if data else b"")
    head = struct.pack("=BxHiII", 0, 0, 0, IFF_UP * up, IFF_UP * up)
    return netlink_message(RTM_NEWLINK, head + attribute(IFLA_IFNAME, name) + b"".join(settings) + info,
                           NLM_F_CREATE | NLM_F_EXCL)


def address_message(kind: int, index: int, address: IPInterface) -> bytes:
    """The request that adds (RTM_NEWADDR) or takes away (RTM_DELADDR) a link's address; an IPv6 address is
    usable at once, without duplicate address detection."""
    body = struct.pack("=BBBBI", ip_family(address.version), address.network.prefixlen,
                       IFA_F_NODAD * (address.version == 6), 0, index)
    body += attribute(IFA_LOCAL, address.ip.packed) + attribute(IFA_ADDRESS, address.ip.packed)
    if address.version == 4 and address.network.prefixlen < 31:
        body += attribute(IFA_BROADCAST, address.network.broadcast_address.packed)
    return netlink_message(kind, body, NLM_F_CREATE | NLM_F_REPLACE if kind == RTM_NEWADDR else 0)


def route_message(kind: int, index: int, to: IPNetwork, gateway: Optional[IPAddress] = None) -> bytes:
    """The request that sets (RTM_NEWROUTE) or takes away (RTM_DELROUTE) the route to `to`."""
    body = struct.pack("=BBBBBBBBI", ip_family(to.version), to.prefixlen, 0, 0, RT_TABLE_MAIN, RTPROT_BOOT,
                       0 if gateway else RT_SCOPE_LINK, 1, 0) + attribute(RTA_OIF, index)
    body += attribute(RTA_DST, to.network_address.packed) if to.prefixlen else b""
    body += attribute(RTA_GATEWAY, gateway.packed) if gateway else b""
    return netlink_message(kind, body, NLM_F_CREATE | NLM_F_REPLACE if kind == RTM_NEWROUTE else 0)


class Link(NamedTuple):
    """One of the links of this thread's network namespace."""
    number: int    # its interface index
    name: str
    kind: str      # "" for hardware and loopback
    mac: bytes
    mtu: int
    master: int


def list_links() -> dict[str, Link]:
    """All links by name."""
    found = {}
    for body in netlink_dump(RTM_GETLINK, bytes(16)):
        values, index = attributes(body[16:]), struct.unpack_from("=i", body, 4)[0]
        name = values[IFLA_IFNAME].rstrip(b"\0").decode(errors="replace")
        kind = attributes(values.get(IFLA_LINKINFO, b"")).get(IFLA_INFO_KIND, b"").rstrip(b"\0").decode()
        mtu, master = (int.from_bytes(values.get(key, b""), sys.byteorder) for key in (IFLA_MTU, IFLA_MASTER))
        found[name] = Link(index, name, kind, values.get(IFLA_ADDRESS, b""), mtu, master)
    return found


def list_addresses(index: int = 0) -> list[IPInterface]:
    """The addresses of the link, or of all."""
    found = []
    for body in netlink_dump(RTM_GETADDR, bytes(8)):
        family, prefix, _, _, link = struct.unpack_from("=BBBBI", body)
        values = attributes(body[8:])
        packed = values.get(IFA_LOCAL) or values.get(IFA_ADDRESS)
        if packed and link == (index or link):
            found.append(ipaddress.ip_interface((packed, prefix)))
    return found


def list_routes() -> list[tuple[IPNetwork, int]]:
    """(destination, interface index) of each route of the main table."""
    found = []
    for body in netlink_dump(RTM_GETROUTE, bytes(12)):
        family, prefix, _, _, table = struct.unpack_from("=BBBBB", body)
        values = attributes(body[12:])
        if table == RT_TABLE_MAIN and RTA_OIF in values and family in (socket.AF_INET, socket.AF_INET6):
            packed = values.get(RTA_DST, bytes(4 if family == socket.AF_INET else 16))
            found.append((ipaddress.ip_network((packed, prefix)), struct.unpack("=i", values[RTA_OIF])[0]))
    return found


def in_network(namespace: int, function: Callable[..., Any], *arguments: Any) -> Any:
    """Run `function` in a throwaway thread that is in the network namespace behind the descriptor: sockets it
    makes, and /proc/sys/net as it sees it, are of that namespace."""

    def body() -> Any:
        setns(namespace, CLONE_NEWNET)
        return function(*arguments)

    return in_thread(body)


def forget_flows(protocol: int, port: int) -> None:
    """Make the kernel forget the flows to `port` of this machine that it translates or passes: those of UDP
    would otherwise never see a new rule.  Source: nfnetlink_conntrack.h."""
    wanted = (bytes([protocol]), struct.pack(">H", port))
    for body in list(netlink_dump(IPCTNL_MSG_CT_GET, bytes(4), NETLINK_NETFILTER)):
        flow = attributes(body[4:]).get(CTA_TUPLE_ORIG, b"")
        parts = attributes(attributes(flow).get(CTA_TUPLE_PROTO, b""))
        if (parts.get(CTA_PROTO_NUM), parts.get(CTA_PROTO_DST_PORT)) == wanted:
            doomed = body[:4] + attribute(CTA_TUPLE_ORIG | NLA_F_NESTED, flow)
            with contextlib.suppress(OSError):  # it may have ended meanwhile
                netlink_batch([netlink_message(IPCTNL_MSG_CT_DELETE, doomed)], NETLINK_NETFILTER)


# nf_tables.  A table's messages go in one batch, which the kernel carries out as a whole or not at all.  An
# expression reads packets into 32-bit registers (8 and up, named r0, r1, ... here) and looks at these; all
# values are big-endian, a port fills one register.  linux/netfilter/nf_tables.h, nft(8).

NFT_REGISTER = 8  # NFT_REG32_00


def nft_batch(family: int, messages: list[tuple[int, int, bytes]]) -> None:
    """Carry out (type, flags, attributes) of `messages` for the tables of an address family in one
    transaction; OSError where the kernel refuses, and nothing is changed."""
    head = struct.pack("=BBH", family, 0, 0)
    edge = struct.pack(">BBH", socket.AF_UNSPEC, 0, 10)  # NFNL_SUBSYS_NFTABLES
    packets = [netlink_message(kind, head + body, flags, number)
               for number, (kind, flags, body) in enumerate(messages, 2)]
    begin, end = (struct.pack("=IHHII", 20, kind, NLM_F_REQUEST, 1, 0) + edge
                  for kind in (NFNL_MSG_BATCH_BEGIN, NFNL_MSG_BATCH_END))
    packets[0], packets[-1] = begin + packets[0], packets[-1] + end
    netlink_batch(packets, NETLINK_NETFILTER)


def _be32(number: int) -> bytes:
    return struct.pack(">i", number)


def nft_table(name: str) -> bytes:
    """The attributes that name a table."""
    return attribute(1, name)


def nft_chain(table: str, name: str, kind: str, hook: int, priority: int, policy: int) -> bytes:
    """A base chain of `kind` (filter, nat) at a hook."""
    place = attribute(1, _be32(hook)) + attribute(2, _be32(priority))
    return attribute(1, table) + attribute(3, name) + attribute(4 | NLA_F_NESTED, place) + attribute(
        5, _be32(policy)) + attribute(7, kind)


def nft_map(table: str, number: int, name: str, key_type: int, key: int, value_type: int = 0,
            value: int = 0) -> bytes:
    """A set of keys of `key` bytes, or a map to values of `value` bytes; the types are for nft(8)."""
    body = attribute(1, table) + attribute(2, name) + attribute(3, _be32(8 if value else 0))  # NFT_SET_MAP
    body += attribute(4, _be32(key_type)) + attribute(5, _be32(key)) + attribute(10, _be32(number))
    return body + (attribute(6, _be32(value_type)) + attribute(7, _be32(value)) if value else b"")


def nft_elements(table: str, name: str, elements: Iterable[tuple[bytes, bytes]]) -> bytes:
    """(key, value) of a map, or of a set with empty values, to add or to take away."""
    def data(kind: int, value: bytes) -> bytes:
        return attribute(kind | NLA_F_NESTED, attribute(1, value)) if value else b""

    listed = [attribute(1 | NLA_F_NESTED, data(1, key) + data(2, value)) for key, value in elements]
    return attribute(1, table) + attribute(2, name) + attribute(3 | NLA_F_NESTED, *listed)


def nft_rule(table: str, chain: str, *expressions: bytes) -> bytes:
    """A rule at the end of the chain; without expressions: all its rules, to take away."""
    body = attribute(1, table) + attribute(2, chain)
    return body + attribute(4 | NLA_F_NESTED, *expressions) if expressions else body


def nft_expression(name: str, **values: Union[int, bytes, str]) -> bytes:
    """One expression; each argument is a<N>, the attribute N: an int goes as a big-endian u32."""
    body = [attribute(int(key[1:]) | (NLA_F_NESTED if isinstance(value, bytes) else 0),
                      _be32(value) if isinstance(value, int) else value) for key, value in values.items()]
    return attribute(1 | NLA_F_NESTED, attribute(1, name), attribute(2 | NLA_F_NESTED, *body))


def nft_payload(offset: int, length: int, register: int = 0, transport: bool = False) -> bytes:
    """Read `length` bytes at `offset` of the network header, or of the transport header."""
    return nft_expression("payload", a1=NFT_REGISTER + register, a2=2 if transport else 1, a3=offset,
                          a4=length)


def nft_compare(value: bytes, same: bool = True, register: int = 0) -> bytes:
    """Go on where the register has this value, or where it has not."""
    return nft_expression("cmp", a1=NFT_REGISTER + register, a2=0 if same else 1, a3=attribute(1, value))


def nft_masked(mask: bytes, register: int = 0) -> bytes:
    """Keep those bits of the register that are set in `mask`."""
    return nft_expression("bitwise", a1=NFT_REGISTER + register, a2=NFT_REGISTER + register, a3=len(mask),
                          a4=attribute(1, mask), a5=attribute(1, bytes(len(mask))))


def nft_immediate(value: bytes, register: int = 0) -> bytes:
    """Put the value into the register."""
    return nft_expression("immediate", a1=NFT_REGISTER + register, a2=attribute(1, value))


def nft_verdict(code: int) -> bytes:
    """End with NF_ACCEPT, NF_DROP or -5, return."""
    return nft_expression("immediate", a1=0, a2=attribute(2 | NLA_F_NESTED, attribute(1, _be32(code))))


def nft_interface(name: str, out: bool = False, same: bool = True) -> bytes:
    """Go on where the packet comes in (or goes out) by the link `name`."""
    return nft_expression("meta", a2=7 if out else 6, a1=NFT_REGISTER) + nft_compare(
        name.encode().ljust(16, b"\0"), same)


def nft_ct(key: int, bits: int) -> bytes:
    """Go on where one of `bits` is set in the flow's state (key 0) or status (key 2)."""
    return nft_expression("ct", a2=key, a1=NFT_REGISTER) + nft_masked(struct.pack("=I", bits)) + nft_compare(
        bytes(4), same=False)


def nft_network(network: IPNetwork, destination: bool, same: bool = True) -> bytes:
    """Go on where the packet's source, or destination, is in `network`."""
    length = network.max_prefixlen // 8
    offset = (16 if length == 4 else 24) if destination else (12 if length == 4 else 8)
    return nft_payload(offset, length) + nft_masked(network.netmask.packed) + nft_compare(
        network.network_address.packed, same)


# ------------------------------------------------------------------------------------------------------------
# Options
#
# ONE table of options.  From it come the flags with every spelling that Docker took since 1.2.0, daemon.json,
# --help, the reload list, the man page and the shell completions.  Every flag and every key of dockerd 20.10
# to 28 has its row: it is served, ignored or refused, and the row says why; nothing is silently ignored.
# Sources: docker 1.2.0's flags.go, daemon/config.go and pkg/mflag; dockerd(8); "Daemon configuration file" of
# https://docs.docker.com/reference/cli/dockerd/.  The texts of errors are dockerd's, because tools show them.
# ------------------------------------------------------------------------------------------------------------

DEFAULT_HOST = "unix:///var/run/docker.sock"
DEFAULT_CONFIG_FILE = "/etc/docker/daemon.json"


class UsageError(DockerError):
    """The command line is wrong; one line, as dockerd words it."""


class LeftoverArgument(UsageError):
    """An argument that is no flag: the caller prints the usage too."""


class ConfigError(DockerError):
    """The configuration, from wherever it comes, does not allow the daemon to start; one line."""


# Values, as Go's strconv and time and Docker's go-units read them


def parse_bool(text: str) -> bool:
    """1, t, T, TRUE, true, True, and their opposites (Go: strconv.ParseBool); BadParameter for all else."""
    if text in ("1", "t", "T", "TRUE", "true", "True"):
        return True
    if text in ("0", "f", "F", "FALSE", "false", "False"):
        return False
    raise BadParameter(f'strconv.ParseBool: parsing "{text}": invalid syntax')


def parse_int(text: str) -> int:
    """A decimal or 0x, 0o, 0b integer; BadParameter for all else."""
    try:
        return int(text, 0)
    except ValueError:
        raise BadParameter(f'strconv.ParseInt: parsing "{text}": invalid syntax') from None


_DURATION_UNITS = {"ns": 1e-9, "us": 1e-6, "\u00b5s": 1e-6, "\u03bcs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0,
                   "h": 3600.0}
_DURATION_PART = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+)([a-z\u00b5\u03bc]*)", re.ASCII)


def parse_duration(text: str) -> float:
    """'1h2m3.5s', '-1.5h', '300ms' or '0' in seconds (Go: time.ParseDuration); BadParameter for all else."""
    body = text[1:] if text[:1] in ("-", "+") else text
    if body == "0":
        return 0.0
    parts = _DURATION_PART.findall(body)
    if not body or "".join(number + unit for number, unit in parts) != body:
        raise BadParameter(f'time: invalid duration "{text}"')
    seconds = 0.0
    for number, unit in parts:
        if unit not in _DURATION_UNITS:
            fault = f'unknown unit "{unit}"' if unit else "missing unit"
            raise BadParameter(f'time: {fault} in duration "{text}"')
        seconds += float(number) * _DURATION_UNITS[unit]
    return -seconds if text[0] == "-" else seconds


_SIZE_TEXT = re.compile(r"([0-9]+\.?[0-9]*|\.[0-9]+) ?([a-z]*)", re.ASCII | re.IGNORECASE)


def parse_size(text: str, base: int = 1024) -> int:
    """'64M', '1.5 GiB', '512kb' or '1024' in bytes (go-units: RAMInBytes; with base 1000 FromHumanSize);
    BadParameter for all else."""
    match = _SIZE_TEXT.fullmatch(text)
    if not match:
        raise BadParameter(f"invalid size: '{text}'")
    suffix = match.group(2).lower()
    if not re.fullmatch(r"b?|[kmgtp](i?b)?", suffix):
        raise BadParameter(f"invalid suffix: '{suffix}'")
    exponent = " kmgtp".find(suffix[:1]) if suffix not in ("", "b") else 0
    return int(float(match.group(1)) * base ** exponent)


ULIMITS = ("core", "cpu", "data", "fsize", "locks", "memlock", "msgqueue", "nice", "nofile", "nproc", "rss",
           "rtprio", "rttime", "sigpending", "stack")


def check_ulimit(limit: dict[str, Any]) -> dict[str, Any]:
    """{"Name", "Soft", "Hard"} of the API, unchanged; -1 is unlimited.  BadParameter where it cannot be."""
    name, soft, hard = limit.get("Name"), limit.get("Soft", 0), limit.get("Hard", 0)
    if name not in ULIMITS:
        raise BadParameter(f"invalid ulimit type: {name}")
    if not isinstance(soft, int) or not isinstance(hard, int):
        raise BadParameter(f"invalid ulimit {name}: its limits must be integers")
    if hard != -1 and (soft == -1 or soft > hard):
        shown = f"soft: -1 (unlimited), hard: {hard}" if soft == -1 else f"{soft} > {hard}"
        raise BadParameter(f"ulimit soft limit must be less than or equal to hard limit: {shown}")
    return limit


def parse_ulimit(text: str) -> dict[str, Any]:
    """'nofile=1024:2048' (soft, hard; hard defaults to soft) as {"Name", "Soft", "Hard"}."""
    name, equals, limits = text.partition("=")
    if not equals:
        raise BadParameter(f"invalid ulimit argument: {text}")
    numbers = limits.split(":")
    if len(numbers) > 2:
        raise BadParameter(f"too many limit value arguments - {limits}, can only have up to two, "
                           "`soft[:hard]`")
    return check_ulimit({"Name": name, "Soft": parse_int(numbers[0]), "Hard": parse_int(numbers[-1])})


def parse_ip(text: str) -> str:
    """The address in canonical form, '' for none; BadParameter for what is no IP address."""
    try:
        return str(ipaddress.ip_address(text.strip())) if text else ""
    except ValueError:
        raise BadParameter(f"{text} is not an ip address") from None


def _parse_pair(text: str) -> dict[str, Any]:
    key, _, value = text.partition("=")
    return {key: value}


def _parse_switch(text: str) -> dict[str, Any]:
    name, _, value = text.partition("=")
    return {name: parse_bool(value or "true")}


def _parse_named_ulimit(text: str) -> dict[str, Any]:
    limit = parse_ulimit(text)
    return {limit["Name"]: limit}


def _parse_network_option(text: str) -> dict[str, Any]:
    driver, equals, option = text.partition("=")
    if not equals or "=" not in option:
        raise BadParameter(f"invalid value {text}: must be DRIVER=OPTION=VALUE")
    return {driver: _parse_pair(option)}


def _parse_address_pool(text: str) -> dict[str, Any]:
    pool: dict[str, Any] = {}
    for field in text.split(","):
        key, equals, value = field.lower().partition("=")
        if not equals:
            raise BadParameter(f"invalid field '{field}' must be a key=value pair")
        if key not in ("base", "size"):
            raise BadParameter(f"unexpected key '{key}' in '{field}'")
        pool[key] = parse_int(value) if key == "size" else value
    return pool


# What a value must be, beyond its kind: each check returns the value in the form the daemon uses


def check_host(host: str) -> str:
    """A listening address as unix://PATH, tcp://HOST:PORT or fd://[N], with Docker's defaults filled in."""
    host = host.strip()
    protocol, separator, address = host.partition("://")
    if host and not separator:
        protocol, address = "tcp", host
    if protocol == "unix" and "://" in address:
        raise BadParameter(f"invalid bind address ({host}): invalid unix address: {address}")
    if not host or protocol == "unix":
        return "unix://" + address if address else DEFAULT_HOST
    if protocol == "tcp":
        return _check_tcp_address(host, address)
    if protocol != "fd":
        raise BadParameter(f"invalid bind address ({host}): unsupported proto '{protocol}'")
    return host


def _check_tcp_address(host: str, address: str) -> str:
    match = re.fullmatch(r"(\[[^]/]*\]|[^]\[:/]*)(?::(\d*))?", address)
    if not match:
        fault = "should not contain a path element" if "/" in address else "expected tcp://HOST:PORT"
        raise BadParameter(f"invalid bind address ({host}): {fault}")
    port = match.group(2) or "2375"
    if not 0 < int(port) < 65536:
        raise BadParameter(f"invalid bind address ({host}): invalid port: {port}")
    return f"tcp://{match.group(1) or 'localhost'}:{port}"


_DOMAIN_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_SEARCH_DOMAIN = re.compile(rf"((?=.*[a-zA-Z]){_DOMAIN_LABEL}(?:\.{_DOMAIN_LABEL})*)\.?\s*")


def check_dns_search(domain: str) -> str:
    """A search domain without its last dot; '.' stands for none."""
    domain = domain.strip(" ")
    match = _SEARCH_DOMAIN.fullmatch(domain)
    if domain != "." and (not match or len(match.group(1)) >= 255):
        raise BadParameter(f"{domain} is not a valid domain")
    return match.group(1) if match else domain


def check_label(label: str) -> str:
    """A daemon label KEY=VALUE outside the reserved name spaces."""
    if "=" not in label:
        raise BadParameter(f"bad attribute format: {label}")
    if label.lower().startswith(("com.docker.", "io.docker.", "org.dockerproject.")):
        raise BadParameter(f"label {label} is not allowed: the namespaces com.docker.*, io.docker.*, and "
                           "org.dockerproject.* are reserved for internal use")
    return label


def check_mirror(mirror: str) -> str:
    """The URL of a registry mirror, with one slash at its end."""
    scheme, separator, _ = mirror.partition("://")
    if not separator or not scheme:
        raise BadParameter(f'invalid mirror: no scheme specified for "{mirror}": must use either '
                           "'https://' or 'http://'")
    if not re.fullmatch(r"https?://[^/?#@]+(/[^?#]*)?", mirror):
        raise BadParameter(f'invalid mirror: "{_go_text(mirror)}" must be an http or https URL without user '
                           "name, query and fragment")
    return mirror.rstrip("/") + "/"


def check_insecure_registry(registry: str) -> str:
    """A registry's HOST[:PORT] or a CIDR range; a scheme is taken off, as dockerd does."""
    return re.sub(r"^https?://", "", registry, flags=re.IGNORECASE)


def _check_exec_option(option: str) -> str:
    name, _, value = (part.strip() for part in option.partition("="))
    if not name or not value:
        raise BadParameter(f"invalid exec-opt ({option}): must be formatted 'opt=value'")
    if name.lower() != "native.cgroupdriver":
        raise BadParameter(f"invalid exec-opt ({option}): unknown option: '{name.lower()}'")
    if value not in ("cgroupfs", "systemd"):
        why = "is internally used and cannot be specified manually" if value == "none" else "not supported"
        raise BadParameter(f"native.cgroupdriver option {value} {why}")
    return f"native.cgroupdriver={value}"


NATIVE_RUNTIMES = ("runc", "io.containerd.runc.v2")     # the names that this daemon's own goes by


def _parse_runtime(text: str) -> dict[str, Any]:
    name, _, path = (part.strip() for part in text.partition("="))
    if not name or not path:
        raise BadParameter(f"invalid runtime argument: {text}")
    return {name: {"path": path}}


def _check_runtimes(runtimes: dict[str, Any]) -> dict[str, Any]:
    """Names are not the native one's, and each has a program: containerd's own kinds cannot be had here."""
    for name, runtime in runtimes.items():
        if name in NATIVE_RUNTIMES:
            raise BadParameter(f"runtime name '{name}' is reserved")
        if not runtime.get("path") or set(runtime) - {"path", "runtimeArgs"}:
            raise BadParameter(f"runtime '{name}' needs a path, and perhaps runtimeArgs, and nothing else")
    return runtimes


def _check_ulimits(limits: dict[str, Any]) -> dict[str, Any]:
    """By name; the keys of each limit may be in any case, as Go's JSON takes them."""
    return {name: check_ulimit({"Name": name, **{field.capitalize(): limit[field] for field in limit}})
            for name, limit in limits.items()}


def _check_pool(pool: dict[str, Any]) -> dict[str, Any]:
    try:
        base = ipaddress.ip_network(str(pool.get("base")), strict=False)
    except ValueError:
        raise BadParameter("invalid base prefix in default-address-pools: " + str(pool.get("base"))) from None
    size = pool.get("size", 0)
    if not isinstance(size, int) or not base.prefixlen <= size <= base.max_prefixlen:
        raise BadParameter(f"invalid default address pool {base}: size {size} is below the prefix's length")
    return {"base": str(base), "size": size}


def _at_least_zero(name: str, value: int) -> int:
    if value < 0:
        raise BadParameter(f"invalid {name}: {value}")
    return value


def _one_of(choices: tuple[Any, ...], text: str, value: Any) -> Any:
    if value not in choices:
        raise BadParameter(text.format(value))
    return value


def _choice(text: str, *choices: Any) -> Callable[[Any], Any]:
    return functools.partial(_one_of, choices, text)


class Kind(NamedTuple):
    """How a value is written: on the command line (one text for each occurrence) and in daemon.json."""

    placeholder: str                 # in --help; "" for a switch
    container: type                  # bool, int or str: one value; list, dict: each occurrence adds to it
    item: type                       # what JSON must have, inside the container
    parse: Callable[[str], Any]      # text to value, or to the dict that is merged in
    go_type: str                     # as dockerd names it when JSON has something else


KINDS = {
    "bool": Kind("", bool, bool, parse_bool, "bool"),
    "int": Kind("int", int, int, parse_int, "int"),
    "string": Kind("string", str, str, str, "string"),
    "ip": Kind("ip", str, str, parse_ip, "string"),
    "size": Kind("bytes", int, str, parse_size, "string"),
    "list": Kind("list", list, str, str, "[]string"),
    "ips": Kind("list", list, str, parse_ip, "[]string"),
    "map": Kind("map", dict, str, _parse_pair, "map[string]string"),
    "switches": Kind("map", dict, bool, _parse_switch, "map[string]bool"),
    "ulimits": Kind("ulimit", dict, dict, _parse_named_ulimit, "map[string]*units.Ulimit"),
    "pools": Kind("pool-options", list, dict, _parse_address_pool, "[]*ipamutils.NetworkToSplit"),
    "runtimes": Kind("runtime", dict, dict, _parse_runtime, "map[string]types.Runtime"),
    "network-options": Kind("mapmap", dict, dict, _parse_network_option, "map[string]map[string]string"),
    "object": Kind("object", dict, object, _parse_pair, "map[string]interface {}"),
}

# What becomes of an option that is given a value other than its default: (status, reason)
SERVED = ("served", "")
SWARM = ("ignored", "this daemon has no swarm mode")
CONTAINERD = ("ignored", "this daemon works without containerd")
CLASSIC_SWARM = ("refused", "Swarm classic and its cluster stores were removed from Docker")


class Option(NamedTuple):
    """One row of the table.

    `key` is the name in daemon.json and, with '_' for '-', the attribute of Config; further words are older
    names of the key.  `flags` are the spellings, the preferred long one last; '#' marks a deprecated one."""

    key: str
    flags: str
    kind: str
    help: str
    default: Any = None              # None: the kind's empty value
    check: Callable[[Any], Any] = lambda value: value  # of each item of a list, of the whole value otherwise
    reload: bool = False
    status: tuple[str, str] = SERVED
    in_file: bool = True             # whether daemon.json may have it

    @property
    def name(self) -> str:
        return self.key.partition(" ")[0]

    @property
    def attribute(self) -> str:
        return self.name.replace("-", "_")

    @property
    def spellings(self) -> list[str]:
        """The flags that are shown to users: no deprecated one."""
        return [flag for flag in self.flags.split() if flag[0] != "#"]

    @property
    def empty(self) -> Any:
        """The default, in a copy of its own."""
        return KINDS[self.kind].container() if self.default is None else copy.copy(self.default)


OPTIONS = (
    # about the command itself
    Option("help", "-h --help", "bool", "Print usage", in_file=False),
    Option("version", "-v --version", "bool", "Print version information and quit", in_file=False),
    Option("daemon", "-d --daemon", "bool", "Enable daemon mode, as Docker 1.2.0 had it", True,
           _choice("this program is the daemon only; the client is docker", True), in_file=False),
    Option("config-file", "--config-file", "string", "Daemon configuration file", DEFAULT_CONFIG_FILE,
           in_file=False),
    Option("validate", "--validate", "bool", "Validate daemon configuration and exit", in_file=False),
    Option("print", "--print", "string", "Write an asset to standard output and exit: daemon.json, man, "
           "openrc, systemd-service, systemd-socket, sysvinit, or bash, fish, zsh for completions",
           in_file=False),
    Option("check", "--check", "bool", "Compare the state on disk and in the kernel with the records, print "
           "what does not agree, and exit (1 if there is any)", in_file=False),
    Option("repair", "--repair", "bool", "Like --check, and mend what does not agree; while no daemon runs",
           in_file=False),
    Option("restart", "#-r #--restart", "bool", "Deprecated in favor of --restart policies on docker run",
           True, in_file=False, status=("ignored", "restart policies are given to docker run")),
    # listening, TLS, logging of the daemon
    Option("hosts", "-H --host", "list",
           "Daemon socket(s) to listen on: unix://PATH, tcp://HOST:PORT, fd:// or fd://N (default "
           f"{DEFAULT_HOST})",
           check=check_host),
    Option("group", "-G --group", "string", "Group for the unix socket; '' for none", "docker"),
    Option("tls", "--tls", "bool", "Use TLS; implied by --tlsverify"),
    Option("tlsverify", "--tlsverify", "bool", "Use TLS and verify the remote"),
    Option("tlscacert", "--tlscacert", "string", "Trust certs signed only by this CA (default "
           "~/.docker/ca.pem)"),
    Option("tlscert", "--tlscert", "string", "Path to TLS certificate file (default ~/.docker/cert.pem)"),
    Option("tlskey", "--tlskey", "string", "Path to TLS key file (default ~/.docker/key.pem)"),
    Option("api-enable-cors", "--api-enable-cors", "bool", "Enable CORS headers in the remote API"),
    Option("api-cors-header", "--api-cors-header", "string", "Set CORS headers in the Engine API",
           status=("refused", "Docker removed it in 28.0; use a reverse proxy if you need CORS headers")),
    Option("authorization-plugins", "--authorization-plugin", "list", "Authorization plugins to load",
           reload=True, status=("refused", "there are no plugins here, and starting without the one that "
           "guards this host would leave it open")),
    Option("debug", "-D --debug", "bool", "Enable debug mode", reload=True),
    Option("log-level", "-l --log-level", "string", "Set the logging level", "info",
           _choice("invalid logging level: {}", "debug", "info", "warn", "error", "fatal", "panic", "trace")),
    Option("log-format", "--log-format", "string", "Set the logging format", "text",
           _choice("invalid log format: {}", "text", "json")),
    Option("raw-logs", "--raw-logs", "bool", "Full timestamps without ANSI coloring"),
    Option("pidfile", "-p --pidfile", "string", "Path to use for daemon PID file; '' for none",
           "/var/run/docker.pid"),
    Option("oom-score-adjust", "--oom-score-adjust", "int", "Set the oom_score_adj for the daemon",
           status=("ignored", "Docker removed it in 25.0; the service unit sets OOMScoreAdjust=")),
    Option("shutdown-timeout", "--shutdown-timeout", "int", "Set the default shutdown timeout, in seconds",
           15, reload=True),
    Option("experimental", "--experimental", "bool", "Enable experimental features"),
    Option("labels", "--label", "list", "Set key=value labels to the daemon", check=check_label, reload=True),
    Option("features", "--feature", "switches", "Enable a feature in the daemon", reload=True,
           status=("ignored", "the features of BuildKit and containerd do not exist here")),
    Option("metrics-addr", "--metrics-addr", "string", "Address and port to serve the metrics api on",
           status=("unlanded", "the metrics API")),
    Option("rootless", "--rootless", "bool", "Enable rootless mode", status=("unlanded", "rootless mode")),
    Option("deprecated-key-path", "", "string", "Formerly the key of the daemon's identity",
           status=("ignored", "Docker removed it in 20.10")),
    # state on disk
    Option("data-root graph", "-g --graph --data-root", "string", "Root directory of persistent Docker state",
           "/var/lib/docker"),
    Option("exec-root", "--exec-root", "string", "Root directory for execution state files",
           "/var/run/docker"),
    Option("storage-driver", "-s --storage-driver", "string", "Storage driver to use: overlay2, btrfs, vfs"),
    Option("storage-opts", "--storage-opt", "list", "Storage driver options"),
    Option("live-restore", "--live-restore", "bool", "Keep containers running while the daemon is down",
           reload=True),
    Option("userns-remap", "--userns-remap", "string", "User/Group setting for user namespaces"),
    # execution
    Option("exec-driver", "-e --exec-driver", "string", "Execution driver to use", "native",
           _choice("unsupported exec driver {}: the only one here is native", "native")),
    Option("exec-opts", "--exec-opt", "list", "Runtime execution options", check=_check_exec_option),
    Option("cgroup-parent", "--cgroup-parent", "string", "Set parent cgroup for all containers"),
    Option("default-ulimits", "--default-ulimit", "ulimits", "Default ulimits for containers",
           check=_check_ulimits),
    Option("default-shm-size", "--default-shm-size", "size", "Default shm size for containers", 64 << 20,
           reload=True),
    Option("default-ipc-mode", "--default-ipc-mode", "string", "Default mode for containers ipc", "private",
           _choice('IPC mode "{}" is not supported as default value; use "shareable" or "private"',
                   "private", "shareable"),
           reload=True),
    Option("default-cgroupns-mode", "--default-cgroupns-mode", "string", "Default mode for containers cgroup "
           "namespace (default private on cgroup v2, host on v1)", "",
           _choice('invalid default cgroup namespace ({}): use "host" or "private"', "", "host", "private"),
           reload=True),
    Option("seccomp-profile", "--seccomp-profile", "string", 'Path to seccomp profile; "unconfined" for none',
           "builtin"),
    Option("no-new-privileges", "--no-new-privileges", "bool", "Set no-new-privileges by default for new "
           "containers"),
    Option("selinux-enabled", "--selinux-enabled", "bool", "Enable selinux support"),
    Option("init", "--init", "bool", "Run an init in the container to forward signals and reap processes"),
    Option("init-path", "--init-path", "string", "Path to the docker-init binary"),
    Option("cpu-rt-period", "--cpu-rt-period", "int", "CPU real-time period of the parent cgroup, in "
           "microseconds"),
    Option("cpu-rt-runtime", "--cpu-rt-runtime", "int", "CPU real-time runtime of the parent cgroup, in "
           "microseconds"),
    Option("default-runtime", "--default-runtime", "string", "Default OCI runtime for containers", "runc",
           reload=True),
    Option("runtimes", "--add-runtime", "runtimes", "Register an additional OCI compatible runtime",
           check=_check_runtimes, reload=True),
    Option("cdi-spec-dirs", "--cdi-spec-dir", "list", "CDI specification directories to use (default "
           "/etc/cdi and /var/run/cdi)"),
    Option("containerd", "--containerd", "string", "containerd grpc address", status=CONTAINERD),
    Option("containerd-namespace", "--containerd-namespace", "string", "Containerd namespace to use", "moby",
           status=CONTAINERD),
    Option("containerd-plugins-namespace containerd-plugin-namespace", "--containerd-plugins-namespace",
           "string", "Containerd namespace to use for plugins", "plugins.moby", status=CONTAINERD),
    Option("cri-containerd", "--cri-containerd", "bool", "Start containerd with cri", status=CONTAINERD),
    # logs of containers
    Option("log-driver", "--log-driver", "string", "Default driver for container logs", "json-file",
           _choice("logger: no log driver named '{}' is registered", "fluentd", "gelf", "journald",
                   "json-file", "local", "none", "syslog")),
    Option("log-opts", "--log-opt", "map", "Default log driver options for containers"),
    # images and registries
    Option("insecure-registries", "--insecure-registry", "list", "Enable insecure registry communication",
           check=check_insecure_registry, reload=True),
    Option("registry-mirrors", "--registry-mirror", "list", "Preferred Docker registry mirror",
           check=check_mirror, reload=True),
    Option("max-concurrent-downloads", "--max-concurrent-downloads", "int", "Set max concurrent downloads", 3,
           functools.partial(_at_least_zero, "max concurrent downloads"), reload=True),
    Option("max-concurrent-uploads", "--max-concurrent-uploads", "int", "Set max concurrent uploads", 5,
           functools.partial(_at_least_zero, "max concurrent uploads"), reload=True),
    Option("max-download-attempts", "--max-download-attempts", "int", "Set the max download attempts for "
           "each pull", 5, functools.partial(_at_least_zero, "max download attempts"), reload=True),
    Option("allow-nondistributable-artifacts", "--allow-nondistributable-artifacts", "list",
           "Allow push of nondistributable artifacts to registry", status=("ignored", "they always are")),
    Option("http-proxy", "--http-proxy", "string", "HTTP proxy URL to use for outgoing traffic"),
    Option("https-proxy", "--https-proxy", "string", "HTTPS proxy URL to use for outgoing traffic"),
    Option("no-proxy", "--no-proxy", "string", "Comma-separated list of hosts or IP addresses for which the "
           "proxy is skipped"),
    Option("builder", "", "object", "Settings of the builder's cache",
           status=("ignored", "the settings of BuildKit's cache do not exist here")),
    # name resolution and networks
    Option("dns", "--dns", "ips", "DNS server to use"),
    Option("dns-opts", "--dns-opt", "list", "DNS options to use"),
    Option("dns-search", "--dns-search", "list", "DNS search domains to use", check=check_dns_search),
    Option("host-gateway-ips host-gateway-ip", "--host-gateway-ip", "ips", "IP addresses that the special "
           "'host-gateway' string in --add-host resolves to"),
    Option("bridge", "-b --bridge", "string", "Attach containers to a network bridge; 'none' turns bridge "
           "networking off"),
    Option("bip", "--bip", "string", "IPv4 address for the default bridge, with its prefix; not with -b"),
    Option("bip6", "--bip6", "string", "IPv6 address for the default bridge"),
    Option("fixed-cidr", "--fixed-cidr", "string", "IPv4 subnet for the default bridge network"),
    Option("fixed-cidr-v6", "--fixed-cidr-v6", "string", "IPv6 subnet for the default bridge network"),
    Option("default-gateway", "--default-gateway", "ip", "Default gateway IPv4 address for the default "
           "bridge network"),
    Option("default-gateway-v6", "--default-gateway-v6", "ip", "Default gateway IPv6 address for the default "
           "bridge network"),
    Option("icc", "--icc", "bool", "Enable inter-container communication for the default bridge network",
           True),
    Option("ip", "--ip", "ip", "Host IP for port publishing from the default bridge network", "0.0.0.0"),
    Option("ip-forward", "--ip-forward", "bool", "Enable IP forwarding in system configuration", True),
    Option("ip-forward-no-drop", "--ip-forward-no-drop", "bool", "Do not set the filter-FORWARD policy to "
           "DROP when enabling IP forwarding"),
    Option("ip-masq", "--ip-masq", "bool", "Enable IP masquerading for the default bridge network", True),
    Option("iptables", "--iptables", "bool", "Enable addition of iptables rules", True),
    Option("ip6tables", "--ip6tables", "bool", "Enable addition of ip6tables rules", True),
    Option("firewall-backend", "--firewall-backend", "string", "Firewall backend to use", "auto",
           _choice('invalid firewall-backend "{}": use auto, iptables, nftables or none',
                   "auto", "", "iptables", "nftables", "none")),
    Option("allow-direct-routing", "--allow-direct-routing", "bool", "Allow remote access to published ports "
           "on container IP addresses"),
    Option("bridge-accept-fwmark", "--bridge-accept-fwmark", "string", "In bridge networks, accept packets "
           "with this firewall mark/mask"),
    Option("ipv6", "--ipv6", "bool", "Enable IPv6 networking for the default bridge network"),
    Option("mtu", "--mtu", "int", "Set the MTU of the default bridge network; 0 for the default route's", 0,
           functools.partial(_at_least_zero, "default MTU")),
    Option("default-address-pools", "--default-address-pool", "pools", "Default address pools for node "
           "specific local networks", check=_check_pool),
    Option("default-network-opts", "--default-network-opt", "network-options", "Default network options"),
    Option("userland-proxy", "--userland-proxy", "bool", "Use userland proxy for loopback traffic", True),
    Option("userland-proxy-path", "--userland-proxy-path", "string", "Path to the userland proxy binary",
           status=("ignored", "the proxy is part of this program")),
    # swarm
    Option("swarm-default-advertise-addr", "--swarm-default-advertise-addr", "string", "Default address or "
           "interface for swarm advertised address", status=SWARM),
    Option("swarm-raft-heartbeat-tick", "", "int", "Ticks of swarm's raft heartbeat", status=SWARM),
    Option("swarm-raft-election-tick", "", "int", "Ticks of swarm's raft election", status=SWARM),
    Option("node-generic-resources", "--node-generic-resource", "list", "Advertise user-defined resource",
           status=SWARM),
    Option("network-control-plane-mtu", "--network-control-plane-mtu", "int", "Network Control plane MTU",
           1500, status=SWARM),
    Option("network-diagnostic-port", "--network-diagnostic-port", "int", "TCP port number of the network "
           "diagnostic server", reload=True, status=SWARM),
    Option("cluster-store", "--cluster-store", "string", "URL of the distributed storage backend",
           status=CLASSIC_SWARM),
    Option("cluster-store-opts", "--cluster-store-opt", "map", "Set cluster store options",
           status=CLASSIC_SWARM),
    Option("cluster-advertise", "--cluster-advertise", "string", "Address or interface name to advertise",
           status=CLASSIC_SWARM),
)

RELOADABLE = frozenset(option.name for option in OPTIONS if option.reload)
_BY_FLAG = {flag.lstrip("#"): option for option in OPTIONS for flag in option.flags.split()}
_BY_KEY = {key: option for option in OPTIONS if option.in_file for key in option.key.split()}


class Config:
    """The daemon's configuration: one attribute for each row of OPTIONS, '_' for '-'.

    `Config(data_root="/srv/docker")` is the defaults with some values changed, for programs that embed the
    daemon.  `given` says where each option that is set was set ("--debug", "debug in /some/daemon.json");
    `warnings` are lines that the caller shows to the user; `argv` is the command line that it was made from.
    ConfigError: an option that this version does not serve, or options that disagree."""

    tls: bool
    tlsverify: bool
    hosts: list[str]
    labels: list[str]
    seccomp_profile: str
    default_cgroupns_mode: str

    data_root: str
    exec_root: str

    def __init__(self, given: Optional[dict[str, str]] = None, /, **values: Any) -> None:
        self.argv: list[str] = []
        self.warnings: list[str] = []
        self.given = given or {row.name: row.attribute for row in OPTIONS if row.attribute in values}
        for option in OPTIONS:
            setattr(self, option.attribute, values.pop(option.attribute, option.empty))
        if values:
            raise ConfigError(f"no such option: {', '.join(sorted(values))}")
        _apply_status(self)
        _complete_config(self)

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"no option {name.replace('_', '-')}")


def parse_options(argv: list[str]) -> Config:
    """The configuration from the command line `argv` (without the program's name) and daemon.json.

    UsageError: the command line is wrong.  ConfigError: daemon.json is wrong, sets what a flag sets too, or
    an option that this version does not serve is asked for.  --help, --version and --print read no file."""
    warnings: list[str] = []
    values = _parse_flags(argv, warnings)
    at_once = {name: values[name] for name in ("help", "version", "print") if values.get(name, ("", ""))[1]}
    values = at_once or {**values, **_read_config_file(values)}
    given = {name: where for name, (where, _) in values.items()}
    config = Config(given, **{name.replace("-", "_"): value for name, (_, value) in values.items()})
    config.argv, config.warnings = list(argv), warnings + config.warnings
    return config


def changed_options(config: Config) -> dict[str, Any]:
    """What a reload (SIGHUP) changes: {attribute: new value} of the RELOADABLE options that differ by now.

    Reads the same daemon.json again; raises as parse_options, and then nothing is to be changed.  What a
    flag or an embedding program has set stays."""
    fresh = parse_options(config.argv)
    free = [row for row in OPTIONS if row.reload and " in " in config.given.get(row.name, " in ")]
    values = {option.attribute: getattr(fresh, option.attribute) for option in free}
    return {name: value for name, value in values.items() if value != getattr(config, name)}


# The command line: Docker 1.2.0's (pkg/mflag) and today's (pflag) in one grammar


def _parse_flags(argv: list[str], warnings: list[str]) -> dict[str, tuple[str, Any]]:
    """{option name: (spelling, value)} of the flags in `argv`; deprecated spellings add to `warnings`."""
    flags: dict[str, tuple[str, Any]] = {}
    words = collections.deque(argv)
    while words:
        word = words.popleft()
        if word == "--" and not words:
            break
        if len(word) < 2 or word[0] != "-" or word == "--":
            raise LeftoverArgument('"dockerd" accepts no argument(s).')
        spelling, option, text = _next_flag(word, words)
        _note_deprecation(spelling, option, warnings)
        spelling = "-" + spelling if "-" + spelling in _BY_FLAG else spelling
        try:
            value = _parse_occurrence(option, text, flags.get(option.name, ("", option.empty))[1])
        except BadParameter as error:
            shown = ", ".join(option.spellings) or spelling
            raise UsageError(f'invalid argument "{text}" for "{shown}" flag: {error}') from None
        flags[option.name] = (spelling, value)
    return flags


def _next_flag(word: str, words: collections.deque[str]) -> tuple[str, Option, str]:
    """The flag that `word` is, its row and its text, which may be the next of `words`.

    A word of one dash is a flag by its own name (-D), a long one as Go writes them (-iptables=false), or
    letters with the last one's value attached (-Dlerror)."""
    spelling, equals, text = word.partition("=")
    option = _BY_FLAG.get(spelling) or _BY_FLAG.get("-" + spelling)
    if option is None and spelling.startswith("--"):
        raise UsageError(f"unknown flag: {spelling}")
    if option is None:
        spelling = word[:2]
        option = _BY_FLAG.get(spelling)
        if option is None:
            raise UsageError(f"unknown shorthand flag: '{word[1]}' in {word}")
        if option.kind == "bool":
            words.appendleft("-" + word[2:])
        else:
            equals, text = "=", word[2:]
    if not equals and option.kind == "bool":
        text = "true"
    elif not equals and not words:
        raise UsageError(f"flag needs an argument: {spelling}")
    elif not equals:
        text = words.popleft()
    elif len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]   # as mflag: options files quote, and no shell takes the quotes away
    return spelling, option, text


def _note_deprecation(spelling: str, option: Option, warnings: list[str]) -> None:
    """Docker 1.2.0's line for a spelling that is on its way out."""
    if "#" + spelling in option.flags.split():
        warnings.append(f"Warning: '{spelling}' is deprecated, it will be removed soon. See usage.")
    elif spelling not in _BY_FLAG:
        warnings.append(f"Warning: '{spelling}' is deprecated, it will be replaced by '-{spelling}' soon. "
                        "See usage.")


def _parse_occurrence(option: Option, text: str, before: Any) -> Any:
    """The value of `option` after one more occurrence, with `text`, where it was `before`."""
    kind = KINDS[option.kind]
    value = kind.parse(text)
    if option.kind == "network-options":
        value = {driver: {**before.get(driver, {}), **options} for driver, options in value.items()}
    if kind.container is dict:
        value = {**before, **value}
    value = option.check(value)
    return [*before, value] if kind.container is list else value


# daemon.json


def _read_config_file(flags: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    """{option name: (where, value)} of daemon.json; empty where the default file does not exist."""
    path = flags.get("config-file", ("", DEFAULT_CONFIG_FILE))[1]
    try:
        with open(path, encoding="utf-8-sig") as file:
            return _parse_config(file.read(), path, flags)
    except OSError as error:
        if isinstance(error, FileNotFoundError) and "config-file" not in flags:
            return {}
        fault = f"open {path}: {(error.strerror or '').lower()}"
    except (BadParameter, ValueError, RecursionError) as error:
        fault = str(error)
    raise ConfigError(f"unable to configure the Docker daemon with file {path}: {fault}")


def _parse_config(text: str, path: str, flags: dict[str, tuple[str, Any]]) -> dict[str, tuple[str, Any]]:
    text = re.sub(r"(?m)^\s*//.*$", "", text)  # the comments of `--print daemon.json`; JSON has no such line
    document = json.loads(text) if text.strip() else {}
    if not isinstance(document, dict):
        raise BadParameter(f"json: cannot unmarshal {_json_type(document)} into Go value of type "
                           "map[string]interface {}")
    if isinstance(document.get("proxies"), dict):
        document.update(document.pop("proxies"))
    unknown = [key for key in document if key not in _BY_KEY]
    if unknown:
        raise BadParameter("the following directives don't match any configuration option: "
                           + ", ".join(unknown))
    _refuse_duplicates(document, flags)
    return {_BY_KEY[key].name: (f"{key} in {path}", _decode_option(_BY_KEY[key], key, value))
            for key, value in document.items() if value is not None}


def _refuse_duplicates(document: dict[str, Any], flags: dict[str, tuple[str, Any]]) -> None:
    names: dict[str, str] = {}
    conflicts = []
    for key in sorted(document):
        name = _BY_KEY[key].name
        if name in names:
            raise BadParameter(f"{key} and {names[name]} must not both be specified in the config file")
        names[name] = key
        if name in flags:
            in_flag, in_file = _go_text(flags[name][1]), _go_text(document[key])
            conflicts.append(f"{key}: (from flag: {in_flag}, from file: {in_file})")
    if conflicts:
        raise BadParameter("the following directives are specified both as a flag and in the configuration "
                           "file: " + ", ".join(conflicts))


def _decode_option(option: Option, key: str, value: Any) -> Any:
    """What the JSON `value` of `key` stands for; BadParameter, which names `key`, where it is wrong."""
    try:
        return _decode_value(option, key, value)
    except BadParameter as error:
        if str(error).startswith("json: "):
            raise
        raise BadParameter(f"configuration validation from file failed: {key}: {error}") from None


def _decode_value(option: Option, key: str, value: Any) -> Any:
    kind = KINDS[option.kind]
    if key == "host-gateway-ip" and isinstance(value, str):
        value = [value]
    if kind.container in (list, dict):
        _expect_json(key, value, kind.container, kind.go_type)
    items = value.values() if kind.container is dict else value if kind.container is list else [value]
    for item in items:
        _expect_json(key, item, kind.item, kind.go_type.partition("]")[2] or kind.go_type)
    if kind.container is dict:
        return option.check(value)
    decoded = [option.check(kind.parse(item) if kind.item is str else item) for item in items]
    return decoded if kind.container is list else decoded[0]


def _expect_json(key: str, value: Any, wanted: type, go_type: str) -> None:
    if not isinstance(value, wanted) or (wanted is int and isinstance(value, bool)):
        raise BadParameter(f"json: cannot unmarshal {_json_type(value)} into Go struct field Config.{key} of "
                           f"type {go_type}")


def _json_type(value: Any) -> str:
    """The type of a decoded JSON value by Go's name."""
    names = {bool: "bool", str: "string", list: "array", dict: "object", type(None): "null"}
    return names.get(type(value), "number")


def _go_text(value: Any) -> str:
    """`value` as Go's %v prints it; the credentials of a proxy's URL are masked."""
    if isinstance(value, list):
        return f"[{' '.join(map(_go_text, value))}]"
    if isinstance(value, dict):
        return f"map[{' '.join(f'{key}:{_go_text(value[key])}' for key in sorted(value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return re.sub(r"//[^/@]*@", "//xxxxx:xxxxx@", str(value))


# What follows from the values


def _apply_status(config: Config) -> None:
    """Refuse what is not served (ConfigError), and add a line to the warnings for what has no effect."""
    for option in OPTIONS:
        value = getattr(config, option.attribute)
        harmless = value == option.empty or not (value or option.kind == "bool")
        if option.name not in config.given or harmless:
            continue
        where, (status, reason) = config.given[option.name], option.status
        if status == "unlanded":
            reason = f"this version does not support {reason} yet"
        if status in ("refused", "unlanded"):
            raise ConfigError(f"{where} is refused: {reason}")
        if status == "ignored":
            config.warnings.append(f"{where} has no effect: {reason}")


def _complete_config(config: Config) -> None:
    """Fill in what depends on the host, the environment or other options; ConfigError where they disagree."""
    # --tlsverify, true or false, asks for TLS; it verifies clients unless told not to: as in dockerd 20.10
    if "tlsverify" not in config.given:
        config.tlsverify = config.tls or bool(os.environ.get("DOCKER_TLS_VERIFY"))
    config.tls = config.tls or config.tlsverify or "tlsverify" in config.given
    folder = os.path.expanduser(
        os.environ.get("DOCKER_CERT_PATH") or os.environ.get("DOCKER_CONFIG") or "~/.docker")
    for attribute, name in (("tlscacert", "ca.pem"), ("tlscert", "cert.pem"), ("tlskey", "key.pem")):
        setattr(config, attribute, getattr(config, attribute) or os.path.join(folder, name))
    config.seccomp_profile = config.seccomp_profile or "builtin"   # '' is not "unconfined"
    config.hosts = list(dict.fromkeys(config.hosts or [DEFAULT_HOST]))
    if not config.default_cgroupns_mode:
        unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        config.default_cgroupns_mode = "private" if unified else "host"
    if config.default_runtime not in (*NATIVE_RUNTIMES, *config.runtimes):
        raise ConfigError(f"specified default runtime '{config.default_runtime}' does not exist")
    labels: dict[str, str] = {}
    for key, _, value in (label.partition("=") for label in config.labels):
        if labels.setdefault(key, value) != value:
            raise ConfigError(f"conflict labels for {key}={value} and {key}={labels[key]}")
    config.labels = [f"{key}={value}" for key, value in labels.items()]


# What is made from the table: help, man page, completions; and the service files that belong to the program


def _flag_text(option: Option) -> str:
    """'-H, --host list': the spellings and the placeholder."""
    placeholder = KINDS[option.kind].placeholder
    return ", ".join(option.spellings) + (" " + placeholder if placeholder else "")


def _help_text(option: Option) -> str:
    """The row's help with choices, default and, where it is not served, its status."""
    choices = option.check.args[0] if isinstance(option.check, functools.partial) else ""
    listed = option.kind == "string" and isinstance(choices, tuple)
    text = option.help + (f" ({' | '.join(filter(None, choices))})" if listed else "")
    if option.default not in (None, "", 0, False):
        text += f" (default {json.dumps(option.default)})"
    note = {"served": "", "ignored": "ignored", "refused": "refused", "unlanded": "not supported yet"}
    return text + ("; " if note[option.status[0]] else "") + note[option.status[0]]


def _shown_options() -> list[Option]:
    """The rows that have a flag to show, by that flag's name."""
    return sorted((option for option in OPTIONS if option.spellings), key=lambda option: option.spellings[-1])


def usage() -> str:
    """The text of --help."""
    import textwrap

    lines = ["Usage:  dockerd.py [OPTIONS]", "", "A self-sufficient runtime for containers.", "", "Options:"]
    for option in _shown_options():
        flags = ("  " if option.spellings[0][1] != "-" else "      ") + _flag_text(option)
        wrapped = textwrap.wrap(_help_text(option), 64)
        lines.append(f"{flags:<44}  {wrapped[0]}" if len(flags) < 45 else f"{flags}\n{'':46}{wrapped[0]}")
        lines.extend(" " * 46 + line for line in wrapped[1:])
    return "\n".join(lines) + "\n"


def answer_at_once(config: Config) -> bool:
    """Do what --help, --version, --print and --validate ask for; False where the daemon is to be started."""
    if config.help:
        sys.stdout.write(usage())
    elif config.version:
        sys.stdout.write(f"Docker version {VERSION}, build {GIT_COMMIT}\n")
    elif config.print:
        sys.stdout.write(print_asset(config.print))
    elif config.validate:
        sys.stderr.write("configuration OK\n")
    return bool(config.help or config.version or config.print or config.validate)


def _man_page() -> str:
    def roff(text: str) -> str:
        return text.replace("\\", "\\e").replace("-", "\\-").replace("'", "\\(aq")

    entries = []
    for option in _shown_options():
        place = f"\ndaemon.json: {option.name}." if option.in_file else ""
        entries.append(f".TP\n.B {roff(_flag_text(option))}\n{roff(_help_text(option))}.{roff(place)}")
    return _MAN_TEMPLATE.replace("@VERSION@", VERSION).replace("@OPTIONS@", "\n".join(entries)).replace(
        "@RELOADABLE@", roff(", ".join(sorted(RELOADABLE))))


def _commented_config() -> str:
    entries = [f"  // {_help_text(option)}\n  // {json.dumps(option.name)}: {json.dumps(option.empty)}"
               for option in OPTIONS if option.in_file and option.status[0] == "served"]
    return ("{\n  // Remove the slashes before an option to set it; put commas between options.\n"
            + "\n".join(entries) + "\n}\n")


def _bash_completion() -> str:
    words = " ".join(flag for option in _shown_options() for flag in option.spellings)
    return f"complete -o default -W '{words}' dockerd.py\n"


def _zsh_completion() -> str:
    rows = ["#compdef dockerd.py", "_arguments -S"]
    for option in _shown_options():
        value = "" if option.kind == "bool" else f":{KINDS[option.kind].placeholder}:_files"
        text = re.sub(r"[]\[:'\\]", "", option.help)
        rows.extend(f"    '*{flag}[{text}]{value}'" for flag in option.spellings)
    return rows[0] + "\n" + " \\\n".join(rows[1:]) + "\n"


def _fish_completion() -> str:
    rows = []
    for option in _shown_options():
        names = " ".join(re.sub("^-(.)$", r"-s \1", flag).replace("--", "-l ") for flag in option.spellings)
        text = option.help.replace("'", "\\'")
        rows.append(f"complete -c dockerd.py {names}{'' if option.kind == 'bool' else ' -r'} -d '{text}'\n")
    return "".join(rows)


def print_asset(what: str, program: str = "") -> str:
    """The text of the asset `what`, one of ASSETS, for this file at the path `program` (default: its own)."""
    if what not in ASSETS:
        names = ", ".join(ASSETS)
        raise UsageError(f'invalid argument "{what}" for "--print" flag: use one of {names}')
    program = program or os.path.abspath(__file__)
    asset = ASSETS[what]
    return asset.replace("@PROGRAM@", program) if isinstance(asset, str) else asset()


_SYSTEMD_SERVICE = """\
[Unit]
Description=Docker Application Container Engine (dockerd.py)
Documentation=man:dockerd.py(8)
After=network-online.target nss-lookup.target docker.socket firewalld.service time-set.target
Wants=network-online.target
Requires=docker.socket
StartLimitBurst=3
StartLimitIntervalSec=60

[Service]
Type=notify
NotifyAccess=main
ExecStart=/usr/bin/env python3 @PROGRAM@ -H fd://
ExecReload=/bin/kill -s HUP $MAINPID
TimeoutStartSec=0
RestartSec=2
Restart=always
LimitNPROC=infinity
LimitCORE=infinity
LimitNOFILE=1048576
TasksMax=infinity
# The containers' cgroups are the daemon's, and the shim outlives it
Delegate=yes
KillMode=process
OOMScoreAdjust=-500

[Install]
WantedBy=multi-user.target
"""

_SYSTEMD_SOCKET = """\
[Unit]
Description=Docker Socket for the API

[Socket]
ListenStream=/run/docker.sock
SocketMode=0660
SocketUser=root
SocketGroup=docker

[Install]
WantedBy=sockets.target
"""

_OPENRC = """\
#!/sbin/openrc-run
# Options go to DOCKER_OPTS in /etc/conf.d/docker
description="Docker Application Container Engine (dockerd.py)"
command="@PROGRAM@"
pidfile="${DOCKER_PIDFILE:-/run/docker.pid}"
command_args="-p ${pidfile} ${DOCKER_OPTS}"
command_background="no"
DOCKER_LOGFILE="${DOCKER_LOGFILE:-/var/log/docker.log}"
start_stop_daemon_args="--background --stderr ${DOCKER_LOGFILE} --stdout ${DOCKER_LOGFILE}"
rc_ulimit="${DOCKER_ULIMIT:--c unlimited -n 1048576 -u unlimited}"
retry="${DOCKER_RETRY:-TERM/60/KILL/10}"
extra_started_commands="reload"

depend() {
\tneed localmount
\tafter net firewall
}

reload() {
\tebegin "Reloading ${RC_SVCNAME}"
\tstart-stop-daemon --signal HUP --pidfile "${pidfile}"
\teend $?
}
"""

_SYSVINIT = """\
#!/bin/sh
### BEGIN INIT INFO
# Provides:          docker
# Required-Start:    $local_fs $syslog
# Required-Stop:     $local_fs $syslog
# Should-Start:      $network
# Should-Stop:       $network
# Default-Start:     2 3 4 5
# Default-Stop:      0 1 6
# Short-Description: Docker Application Container Engine (dockerd.py)
### END INIT INFO
# Options go to DOCKER_OPTS in /etc/default/docker
PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin
PIDFILE=/var/run/docker.pid
LOGFILE=/var/log/docker.log
DOCKER_OPTS=
[ -r /etc/default/docker ] && . /etc/default/docker

running() {
    [ -s "$PIDFILE" ] && kill -0 "$(cat "$PIDFILE")" 2>/dev/null
}

start() {
    running && return 0
    umask 022
    ulimit -n 1048576 2>/dev/null
    # shellcheck disable=SC2086
    setsid python3 @PROGRAM@ -p "$PIDFILE" $DOCKER_OPTS >>"$LOGFILE" 2>&1 </dev/null &
    left=60
    until running; do
        left=$((left - 1))
        [ $left -gt 0 ] || { echo "docker did not start; see $LOGFILE" >&2; return 1; }
        sleep 1
    done
}

stop() {
    running || return 0
    pid=$(cat "$PIDFILE")
    kill -TERM "$pid"
    left=60
    while kill -0 "$pid" 2>/dev/null; do
        left=$((left - 1))
        [ $left -gt 0 ] || { kill -KILL "$pid"; break; }
        sleep 1
    done
}

case "$1" in
start) start ;;
stop) stop ;;
restart|force-reload) stop; start ;;
reload) running && kill -HUP "$(cat "$PIDFILE")" ;;
status) if running; then echo "docker is running"; else echo "docker is not running"; exit 3; fi ;;
*) echo "Usage: $0 {start|stop|restart|reload|force-reload|status}" >&2; exit 2 ;;
esac
"""

_MAN_TEMPLATE = """\
.TH DOCKERD.PY 8 "" "dockerd.py @VERSION@" "System administration"
.SH NAME
dockerd.py \\- a Docker daemon in one file
.SH SYNOPSIS
.B dockerd.py
[OPTIONS]
.SH DESCRIPTION
Serves the Docker Engine API, v1.12 to v1.51, to every Docker client.
Options are given on the command line or in daemon.json, never the same one in both.
.SH OPTIONS
@OPTIONS@
.SH FILES
.TP
.I /etc/docker/daemon.json
The configuration; a missing file is an empty one.
.TP
.I /var/lib/docker
Images, containers, volumes and networks.
.TP
.I /var/run/docker.sock
The socket of the API.
.SH ENVIRONMENT
.TP
.B DOCKER_CERT_PATH
Where ca.pem, cert.pem and key.pem are, instead of ~/.docker.
.TP
.B DOCKER_TLS_VERIFY
Not empty: as \\-\\-tlsverify.
.SH SIGNALS
.TP
.B SIGINT, SIGTERM
Shut down; the third repeat ends the daemon at once.
.TP
.B SIGHUP
Read daemon.json again. Takes effect at once: @RELOADABLE@.
.TP
.B SIGUSR1
Write the stacks of all threads to the log.
.SH EXIT STATUS
0 after a shutdown that was asked for; another number where the daemon did not start.
.SH SEE ALSO
.BR docker (1)
"""

ASSETS: dict[str, Union[str, Callable[[], str]]] = {
    "bash": _bash_completion, "daemon.json": _commented_config, "fish": _fish_completion, "man": _man_page,
    "openrc": _OPENRC, "systemd-service": _SYSTEMD_SERVICE, "systemd-socket": _SYSTEMD_SOCKET,
    "sysvinit": _SYSVINIT, "zsh": _zsh_completion,
}


# ------------------------------------------------------------------------------------------------------------
# Engine
#
# The core that Docker 1.2.0 named: everything the daemon can do is a Job, started from the API server, the
# command line or an embedding program in the same way: ``engine.job("start", id).run()``.  A job has a name,
# arguments, an environment, standard streams and a status, like a Unix process.  The engine keeps the
# handlers and ends orderly.
# ------------------------------------------------------------------------------------------------------------

STATUS_OK, STATUS_ERROR, STATUS_NOT_FOUND = 0, 1, 127
GLOBAL_HANDLERS: dict[str, Handler] = {}  # every new Engine starts with a copy of these

JobMethod = Callable[..., Any]


class Env(dict):
    """A job's environment: keys are the API's names, values are of JSON's types.

    The getters read strings too, as a query string or a program of 1.2.0's times gives them."""

    def get_bool(self, key: str) -> bool:
        """False for an absent value and for '', 0, no, false and none in any case; true for all else."""
        value = self.get(key)
        if isinstance(value, str):
            return value.strip(" \t").lower() not in ("", "0", "no", "false", "none")
        return bool(value)

    def get_int(self, key: str, default: int = -1) -> int:
        """The integer value of `key`; `default` where it is absent or is none."""
        try:
            return int(self.get(key, default))
        except (TypeError, ValueError):
            return default

    def get_list(self, key: str) -> list[Any]:
        """A list: of a list, of a JSON list in a string, or of the single other value; [] where absent."""
        value = self.get_json(key)
        if value in (None, ""):
            return []
        return list(value) if isinstance(value, (list, tuple)) else [value]

    def get_json(self, key: str) -> Any:
        """The value of `key`, decoded when it is a string that holds a JSON document."""
        value = self.get(key)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):
                return json.loads(value)
        return value


class Output:
    """A job's output stream: what is written goes to every destination (an object with write(bytes))."""

    def __init__(self) -> None:
        self.destinations: list[Any] = []
        self._lock = threading.Lock()

    def add(self, destination: Any) -> Any:
        """Also write to `destination` from now on; returns it."""
        self.destinations.append(destination)
        return destination

    def write(self, data: bytes) -> int:
        """Write `data` to all destinations; raises what a destination raises."""
        with self._lock:
            for destination in self.destinations:
                destination.write(data)
        return len(data)


class Job:
    """One unit of the engine's work; see the section's head.

    `name`, `args` (strings), `env` (Env), `stdin` (an object with read(n)), `stdout`, `stderr` (Output),
    `status` (None before the end, then 0, 1 or 127), `cancelled` (an Event that streaming handlers watch)."""

    def __init__(self, engine: Engine, name: str, arguments: tuple[str, ...], env: dict[str, Any]) -> None:
        self.engine, self.name, self.args, self.env = engine, name, list(arguments), Env(env)
        self.stdin: Any = io.BytesIO()
        self.stdout, self.stderr = Output(), Output()
        self.hijacked: Any = None
        self.status: Optional[int] = None
        self.streaming = False
        self.cancelled = threading.Event()
        self.on_ready: Callable[[dict[str, Any]], None] = lambda facts: None
        self._on_cancel: list[Callable[[], None]] = []
        self._result: Any = None

    def __str__(self) -> str:
        return f"{self.name}({', '.join(self.args)})"

    def run(self) -> Any:
        """Run the job to its end and return what its handler gave to reply().

        Raises Unavailable after the engine's shutdown, DockerError when the job has run before or its handler
        is missing or failed; the handler's own exception passes through.  The text is the last line of
        stderr."""
        with self.engine.counted(self):
            if self.status is not None:
                raise DockerError(f"{self.name}: job has already completed")
            self.engine.log(f"+job {self}")
            errors = self.stderr.add(io.BytesIO())
            failure = self._handle()
            verdict = "OK" if self.status == STATUS_OK else "ERR"
            self.engine.log(f"-job {self} = {verdict} ({self.status})")
        if failure is not None:
            raise failure
        if self.status:
            raise DockerError(errors.getvalue().decode(errors="replace").rstrip("\n").rpartition("\n")[2])
        return self._result

    def _handle(self) -> Optional[BaseException]:
        """Call the handler and set the status; the exception that it ended with."""
        handler = self.engine.handler(self.name)
        if handler is None:
            self.error(f"{self.name}: command not found")
            self.status = STATUS_NOT_FOUND
            return None
        try:
            self.status = handler(self) or STATUS_OK
        except BaseException as error:
            self.error(str(error))
            self.status = STATUS_ERROR
            return error
        return None

    def error(self, text: str) -> int:
        """Write `text` as a line to stderr; returns the status of failure, for a handler to return."""
        self.stderr.write(text.encode(errors="replace") + b"\n")
        return STATUS_ERROR

    def printf(self, text: str) -> None:
        """Write `text` to stdout."""
        self.stdout.write(text.encode())

    def reply(self, result: Any) -> None:
        """Give the caller of run() a structured result; it also goes to stdout as a line of JSON."""
        self._result = result
        if self.stdout.destinations:
            self.stdout.write(json.dumps(result).encode() + b"\n")

    def progress(self, **line: Any) -> None:
        """Write one line of Docker's JSON message stream to stdout."""
        self.stdout.write(json.dumps(line, separators=(",", ":")).encode() + b"\r\n")

    def ready(self, **facts: Any) -> None:
        """The job has accepted its arguments and streams from now on: the caller's on_ready(facts) runs."""
        self.streaming = True
        if self.engine.is_shutdown:
            self.cancel()
        self.on_ready(facts)

    def cancel(self) -> None:
        """Ask a streaming job to end; it then returns as at the end of its stream."""
        self.cancelled.set()
        for callback in list(self._on_cancel):
            callback()

    def on_cancel(self, callback: Callable[[], None]) -> None:
        """Call `callback` when the job is cancelled; at once if it is already."""
        self._on_cancel.append(callback)
        if self.cancelled.is_set():
            callback()


Handler = Callable[[Job], Optional[int]]


def job(name: str) -> Callable[[JobMethod], JobMethod]:
    """Mark a method as the handler of the job `name`; Engine.install registers it."""

    def mark(method: JobMethod) -> JobMethod:
        method.job_name = name  # type: ignore[attr-defined]
        return method

    return mark


class Engine:
    """Keeps the handlers of all jobs, and ends them.

    `logging` tells whether jobs are logged; `shutdown_timeout` is how long (seconds) the shutdown handlers
    may take together; `variables` are the named objects that parts leave for each other (httpapi.daemon,
    ...)."""

    UNCOUNTED = frozenset(["serveapi"])  # runs as long as the daemon: shutdown must not wait for it

    def __init__(self) -> None:
        self.id = secrets.token_hex(16)
        self.logging = True
        self.shutdown_timeout = 10.0
        self.variables: dict[str, Any] = {}
        self._handlers: dict[str, Handler] = dict(GLOBAL_HANDLERS)
        self._catchall: Optional[Handler] = None
        self._running: set[Job] = set()
        self._on_shutdown: list[Callable[[], None]] = []
        self._condition = threading.Condition()
        self.is_shutdown = False
        self.register("commands", self._commands)

    def log(self, text: str) -> None:
        """Write one line to the daemon's log, marked with the engine's id."""
        if self.logging:
            log.info("[%s] %s", self.id[:8], text)

    def register(self, name: str, handler: Handler) -> None:
        """Make `handler` the one of the job `name`; DockerError when the name has one."""
        if name in self._handlers:
            raise DockerError(f"Can't overwrite handler for command {name}")
        self._handlers[name] = handler

    def register_catchall(self, handler: Handler) -> None:
        """Make `handler` the one of every job whose name has none."""
        self._catchall = handler

    def install(self, part: Any) -> None:
        """Register every method of `part` that is marked with @job."""
        for attribute in dir(type(part)):
            name = getattr(getattr(type(part), attribute), "job_name", None)
            if name:
                self.register(name, getattr(part, attribute))

    def handler(self, name: str) -> Optional[Handler]:
        """The handler of the job `name`, the catch-all, or None; an empty name has none."""
        return self._handlers.get(name, self._catchall) if name else None

    def has(self, name: str) -> bool:
        """Whether the job `name` has a handler of its own."""
        return name in self._handlers

    def job(self, name: str, /, *arguments: str, **env: Any) -> Job:
        """A new job, not yet run."""
        new = Job(self, name, arguments, env)
        if self.logging:
            new.stderr.add(self)
        return new

    def write(self, data: bytes) -> None:
        """Take a job's stderr into the log."""
        for line in data.decode(errors="replace").splitlines():
            log.log(logging.INFO, "[%s] %s", self.id[:8], line)

    def _commands(self, job: Job) -> None:
        names = sorted(self._handlers)
        job.printf("".join(name + "\n" for name in names))
        job.reply(names)

    @contextlib.contextmanager
    def counted(self, job: Job) -> Iterator[None]:
        """Count `job` among the running while the block runs; Unavailable after shutdown."""
        with self._condition:
            if self.is_shutdown:
                raise Unavailable("engine is shutdown")
            if job.name not in self.UNCOUNTED:
                self._running.add(job)
        try:
            yield
        finally:
            with self._condition:
                self._running.discard(job)
                self._condition.notify_all()

    @property
    def running(self) -> int:
        """How many jobs run now, those that last as long as the daemon left out."""
        return len(self._running)

    def on_shutdown(self, handler: Callable[[], None]) -> None:
        """Have `handler` called by shutdown()."""
        self._on_shutdown.append(handler)

    def shutdown(self) -> None:
        """End the engine: refuse new jobs at once, cancel the streaming ones, wait at most 5 s for the rest,
        run all shutdown handlers at the same time within `shutdown_timeout`.  A second call returns at
        once."""
        with self._condition:
            if self.is_shutdown:
                return
            self.is_shutdown = True
            streaming = [job for job in self._running if job.streaming]
        for running in streaming:
            running.cancel()
        with self._condition:
            self._condition.wait_for(lambda: not self._running, timeout=5)
        threads = [threading.Thread(target=handler, name="shutdown", daemon=True)
                   for handler in self._on_shutdown]
        for thread in threads:
            thread.start()
        deadline = time.monotonic() + self.shutdown_timeout
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))


class SignalTrap:
    """The daemon's signals.  SIGINT and SIGTERM run `cleanup` once and exit 0; the third repeat forces the
    exit with 128+n.  SIGQUIT exits 128+3 without cleanup; with DEBUG in the environment it dumps all stacks
    and exits 2, as a Go program does.  SIGUSR1 dumps them and goes on.  SIGHUP runs `reload`.  Call install()
    in the main thread.

    A thread of its own acts on them: the interpreter runs handlers in the main thread alone, and one that
    comes while that goes to sleep waits there for the next signal."""

    NAMES = {signal.SIGINT: "interrupt", signal.SIGTERM: "terminated", signal.SIGQUIT: "quit"}

    def __init__(self, cleanup: Callable[[], None], reload: Callable[[], None] = lambda: None) -> None:
        self.cleanup, self.reload = cleanup, reload
        self.interrupts = 0

    def install(self) -> None:
        """Take the signals over; ValueError outside the main thread."""
        reader, writer = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        threading.Thread(target=self._run, args=(reader,), name="signals", daemon=True).start()
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGQUIT, signal.SIGUSR1, signal.SIGHUP):
            signal.signal(number, lambda number, frame: None)
        signal.signal(signal.SIGPIPE, signal.SIG_IGN)

    def _run(self, reader: int) -> None:
        while True:
            for number in os.read(reader, 64):
                self._handle(number)

    def _handle(self, number: int) -> None:
        debugging = number == signal.SIGQUIT and os.environ.get("DEBUG")
        if number == signal.SIGUSR1 or debugging:
            import faulthandler
            faulthandler.dump_traceback(all_threads=True)
        if number == signal.SIGHUP:
            threading.Thread(target=self.reload, name="reload", daemon=True).start()
        elif number == signal.SIGQUIT:
            os._exit(2 if debugging else 128 + number)
        elif number != signal.SIGUSR1:
            self._interrupted(number)

    def _interrupted(self, number: int) -> None:
        log.info("Received signal '%s', starting shutdown of docker...", self.NAMES[signal.Signals(number)])
        self.interrupts += 1
        if self.interrupts == 1:
            threading.Thread(target=self._clean_up_and_exit, name="shutdown", daemon=True).start()
        elif self.interrupts > 3:
            log.warning("Force shutdown of docker, interrupting cleanup")
            os._exit(128 + number)

    def _clean_up_and_exit(self) -> None:
        try:
            self.cleanup()
        except Exception:
            log.exception("the shutdown failed")
        logging.shutdown()
        os._exit(0)


# Values as the API writes them: quoted text, times, signals


def go_quote(text: str) -> str:
    """`text` in double quotes, as Go's %q prints it in error messages."""
    return json.dumps(text, ensure_ascii=False)


ZERO_TIME = "0001-01-01T00:00:00Z"
_TIMESTAMP = re.compile(r"(\d{4}-\d\d-\d\d)(?:T(\d\d:\d\d)(:\d\d)?(?:\.(\d{1,9})\d*)?(Z|[+-]\d\d:\d\d)?)?",
                        re.ASCII)
_UNIX_TIME = re.compile(r"(-?\d{1,15})(?:\.(\d{1,9})\d*)?", re.ASCII)


@functools.lru_cache(maxsize=64)
def _date_text(seconds: int) -> str:
    moment = time.gmtime(seconds)
    return f"{moment.tm_year:04d}-" + time.strftime("%m-%dT%H:%M:%S", moment)


@functools.lru_cache(maxsize=64)
def _date_seconds(text: str, utc: bool) -> int:
    import calendar
    moment = time.strptime(text, "%Y-%m-%dT%H:%M:%S")
    return calendar.timegm(moment) if utc else int(time.mktime(moment))


def go_duration(seconds: float) -> str:
    """A length of time as Go prints it: 1h0m0s, 1.5s, 20ms."""
    if seconds < 1:
        return f"{seconds * 1000:.9g}ms"
    minutes, rest = divmod(seconds, 60)
    hours, minutes = divmod(int(minutes), 60)
    return (f"{hours}h" * bool(hours)) + (f"{minutes}m" * bool(hours or minutes)) + f"{rest:.9g}s"


def rfc3339nano(nanoseconds: int, padded: bool = False) -> str:
    """Nanoseconds since 1970 as Go's RFC3339Nano in UTC: without trailing zeros, or `padded` to nine
    digits."""
    seconds, fraction = divmod(nanoseconds, 10**9)
    digits = f".{fraction:09d}"
    return _date_text(seconds) + (digits if padded else digits.rstrip("0").rstrip(".")) + "Z"


def parse_timestamp(text: str) -> int:
    """The nanoseconds since 1970 of a time as the API's since and until take it; else BadParameter.

    Unix seconds with a fraction, RFC 3339 (also shortened to minutes or the day; without a zone in the local
    one), or a Go duration, which is so long before now."""
    match = _UNIX_TIME.fullmatch(text)
    if match:
        fraction = int((match[2] or "").ljust(9, "0"))
        return int(match[1]) * 10**9 + (-fraction if text.startswith("-") else fraction)
    match = _TIMESTAMP.fullmatch(text)
    try:
        if match:
            date, minutes, seconds, digits, zone = match.groups()
            whole = _date_seconds(f"{date}T{minutes or '00:00'}{seconds or ':00'}", zone is not None)
            if zone and zone != "Z":
                whole -= int(zone[0] + "1") * (int(zone[1:3]) * 3600 + int(zone[4:]) * 60)
            return whole * 10**9 + int((digits or "").ljust(9, "0"))
        return time.time_ns() - int(parse_duration(text) * 10**9)
    except (ValueError, OverflowError, BadParameter):
        raise BadParameter(f"strconv.ParseInt: parsing {go_quote(text)}: invalid syntax") from None


SIGNALS = {"STKFLT": 16, **{name[3:]: int(number) for name, number in signal.Signals.__members__.items()},
           **{f"RTMIN+{n}": signal.SIGRTMIN + n for n in range(1, 16)},
           **{f"RTMAX-{n}": signal.SIGRTMAX - n for n in range(1, 15)}}


def parse_signal(text: str) -> int:
    """The number of a signal that is written "9", "KILL", "SIGKILL" or "rtmin+3"; else BadParameter."""
    if text.isascii() and text.isdigit() and len(text) < 10 and int(text):
        if int(text) > signal.SIGRTMAX:
            raise BadParameter(f"The linux daemon does not support signal {text}")
        return int(text)
    name = text.upper()
    number = SIGNALS.get(name[3:] if name.startswith("SIG") else name)
    if number is None:
        raise BadParameter(f"Invalid signal: {text}")
    return number
# ------------------------------------------------------------------------------------------------------------
# Archives
#
# Tar streams in and out: reading headers, unpacking a layer or any archive, packing a directory or an
# overlay's upper directory as a layer.  Nothing here trusts its input: whatever touches files runs in a
# thread that the kernel confines to the one directory (pitfalls 3 and 8), while the stream itself is read and
# written by the caller's thread outside of it, and names are bytes, owners numbers.  Formats: POSIX.1-2017
# pax (ustar and extended headers), GNU tar's manual ("Basic Tar Format", "Storing Sparse Files"), the
# SCHILY.xattr keyword of star; layers by the OCI image specification, "Image Layer Filesystem Changeset".
# ------------------------------------------------------------------------------------------------------------

CHUNK = 1 << 19  # bytes read or written at a time
TAR_BLOCK = 512
TAR_HEADER = struct.Struct("100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12s")
TAR_SPECIAL_LIMIT = 1 << 20  # bytes of an extended header, long name or sparse map, as in Go's archive/tar
INVALID_TAR_HEADER = "archive/tar: invalid tar header"
TAR_ZEROES = bytes(TAR_BLOCK)
WHITEOUT = b".wh."
WHITEOUT_OPAQUE = b".wh..wh..opq"
OVERLAY_OPAQUE = "trusted.overlay.opaque"
NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
SUBDIRECTORY = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW
UNFOLLOWED = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK  # a file, whatever it is, not what a link leads to


class UnpackLimits(NamedTuple):
    """What an archive may ask for: `entries` in it, `size` in bytes of the tar stream; 0 is no limit."""

    entries: int = 4_000_000
    size: int = 0


class LayerStats(NamedTuple):
    """What was unpacked: `size` in bytes as Docker counts a layer (files once and link texts), and
    `entries`."""

    size: int
    entries: int


class IdMap:
    """Whose files an image's users are on the host: identity, or the ranges of --userns-remap.

    `uids` and `gids` are (first in the container, first on the host, count) triples; none is identity."""

    def __init__(self, uids: Iterable[tuple[int, int, int]] = (),
                 gids: Iterable[tuple[int, int, int]] = ()) -> None:
        self.uids, self.gids = list(uids), list(gids)

    def __bool__(self) -> bool:
        return bool(self.uids)

    @property
    def root(self) -> tuple[int, int]:
        """(uid, gid) on the host of the container's root."""
        return self.to_host(0, 0)

    def to_host(self, uid: int, gid: int) -> tuple[int, int]:
        """A container's (uid, gid) on the host; BadParameter when it has none there."""
        return self._shift(uid, gid, 0, 1, "container ID {} cannot be mapped to a host ID")

    def to_container(self, uid: int, gid: int) -> tuple[int, int]:
        """A host's (uid, gid) in the container; BadParameter when it has none there."""
        return self._shift(uid, gid, 1, 0, "host ID {} cannot be mapped to a container ID")

    def _shift(self, uid: int, gid: int, source: int, target: int, refusal: str) -> tuple[int, int]:
        def shift(ranges: list[tuple[int, int, int]], number: int) -> int:
            for extent in ranges:
                if 0 <= number - extent[source] < extent[2]:
                    return number - extent[source] + extent[target]
            raise BadParameter(refusal.format(number))

        return (shift(self.uids, uid), shift(self.gids, gid)) if self.uids else (uid, gid)


def _host_account(text: str, database: Any, kind: str, file: str) -> list[str]:
    """[name, number] of a user ("uid", "passwd") or group ("gid", "group") by its name or number; DockerError
    in Docker's words."""
    by_number, by_name = (getattr(database, f"get{'pw' if kind == 'uid' else 'gr'}{key}")
                          for key in (kind, "nam"))
    try:
        entry = by_number(int(text)) if text.isdigit() else by_name(text)
        return [entry[0], str(entry[2])]
    except (KeyError, OverflowError):
        asked = (f"{kind.capitalize()} {text} has no entry in /etc/{file}" if text.isdigit() else
                 f"Error during {kind} lookup for {json.dumps(text)}")
        raise DockerError(f"{asked}: unable to find entry {json.dumps(text)} in {file} database") from None


def remapped_ids(asked: str, etc: str = "/etc") -> IdMap:
    """Whose files a container's are with --userns-remap: USER, USER:GROUP, by name or number, or "default"
    for dockremap, which needs no entry in passwd.

    The ranges are those of subuid(5) and subgid(5), in their order.  DockerError when there are none."""
    import grp
    import pwd
    user, colon, group = asked.partition(":")
    if ":" in group or not user or colon and not group:
        raise DockerError(f'Invalid user/group specification in --userns-remap: "{asked}"')
    if asked == "default":
        users = groups = ["dockremap"]
    else:
        users = _host_account(user, pwd, "uid", "passwd")
        groups = _host_account(group or users[0], grp, "gid", "group")
    if "0" in users:
        raise DockerError("User namespaces: root cannot be remapped with itself")
    maps: list[list[tuple[int, int, int]]] = []
    for file, names in (("subuid", users), ("subgid", groups)):
        extents, first = [], 0
        for name, start, count in (line.split(":") for line in read_text(f"{etc}/{file}").split()
                                   if re.fullmatch(r"[^:]+:\d+:\d+", line, re.ASCII)):
            if name in names:
                extents.append((first, int(start), int(count)))
                first += int(count)
        if not extents:
            raise DockerError(f"Can't create ID mappings: no {file} ranges found for {json.dumps(names[0])}: "
                              f"add a line such as {names[0]}:100000:65536 to {etc}/{file}")
        maps.append(extents)
    return IdMap(*maps)


def write_all(fd: int, data: Union[bytes, memoryview]) -> None:
    """Write the whole of `data` to the descriptor; write(2) may take only a part."""
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view):]


def quoted(name: bytes) -> str:
    """A file name from an archive as error messages show it: in quotes, what is no text escaped."""
    return json.dumps(name.decode("utf-8", "backslashreplace"), ensure_ascii=False)


class Feed:
    """Chunks of bytes on their way from one thread to another, a few megabytes at most.

    One thread calls put() and finish(), the other read(); stop() by the reader ends the writer's put() for
    good."""

    def __init__(self, depth: int = 6) -> None:
        self._queue: queue.Queue[Any] = queue.Queue(depth)
        self._stopped = self._ended = False

    def put(self, data: bytes) -> bool:
        """Hand `data` over, waiting for room; False when the reader has stopped."""
        if not self._stopped and data:
            self._queue.put(data)
        return not self._stopped

    def finish(self, error: Optional[BaseException] = None) -> None:
        """Nothing more comes; the reader gets `error`, or the end."""
        if not self._stopped:
            self._queue.put(error or b"")

    def fill(self, stream: Any) -> None:
        """Put all that `stream` holds, small pieces joined, and finish with what reading it raises."""
        try:
            while self.put(data := read_chunk(stream)):
                if not data:
                    break
            self.finish()
        except BaseException as error:
            self.finish(error)

    def read(self, size: int = -1) -> bytes:
        """The next chunk, of whatever size; b"" at the end; raises what the writer finished with."""
        if self._ended:
            return b""
        data = self._queue.get()
        if isinstance(data, BaseException):
            self._ended = True
            raise data
        self._ended = not data
        return bytes(data)

    def stop(self) -> None:
        """The reader wants nothing more: let the writer go on without it."""
        self._stopped = self._ended = True
        with contextlib.suppress(queue.Empty):
            while True:
                self._queue.get_nowait()


def read_chunk(stream: Any, least: int = CHUNK, piece: int = CHUNK, head: bytes = b"") -> bytes:
    """`head` and what follows it in a stream that hands out small pieces, at most `piece` bytes at a time:
    `least` bytes or more, fewer only at the stream's end."""
    parts, have = [head] if head else [], len(head)
    while have < least:
        data = stream.read(piece)
        if not data:
            break
        parts.append(data)
        have += len(data)
    return parts[0] if len(parts) == 1 else b"".join(parts)


# Compression

class Decompressor:
    """A readable stream of what a compressed `stream` holds; read(n) gives at most n bytes.

    `make` makes a decoder with decompress(data, max_length), eof and unused_data, as zlib, bz2 and lzma have
    them; several compressed members after one another are one stream.  BadParameter on damage, a truncated
    stream, or when more than `ratio` bytes come from each compressed one (above a gigabyte, which zeroes
    reach honestly)."""

    HONEST = 1 << 30

    def __init__(self, stream: Any, make: Callable[[], Any], ratio: int) -> None:
        self._stream, self._make, self._ratio = stream, make, ratio
        self._decoder = make()
        self._taken = self._given = 0
        self._left: bytes = b""  # input that the decoder has not taken yet
        self._ended = False

    def read(self, size: int = CHUNK) -> bytes:
        """At most `size` bytes; b"" at the end."""
        size = max(size, 1) if size >= 0 else CHUNK
        while not self._ended:
            if self._decoder.eof and not self._next_member():
                break
            data = self._decode(size)
            if data:
                return data
        return b""

    def _decode(self, size: int) -> bytes:
        source = self._left
        if not source and getattr(self._decoder, "needs_input", True):
            source = self._input()
        try:
            data: bytes = self._decoder.decompress(source, size)
        except Exception as error:  # zlib.error, OSError, lzma.LZMAError, by the format
            raise BadParameter(f"the compressed stream is damaged: {error}") from error
        self._left = getattr(self._decoder, "unconsumed_tail", b"")
        self._given += len(data)
        if self._given > max(self.HONEST, self._taken * self._ratio):
            raise BadParameter(f"the compressed stream unpacks to more than {self._ratio} times its size")
        if not source and not data and not self._decoder.eof and getattr(self._decoder, "needs_input", True):
            raise BadParameter("unexpected EOF")
        return data

    def _input(self) -> bytes:
        data: bytes = self._stream.read(CHUNK)
        self._taken += len(data)
        return data

    def _next_member(self) -> bool:
        """Begin with what follows a complete member: another one, or padding of zeroes and the end."""
        rest = self._decoder.unused_data.lstrip(b"\0")
        while not rest:
            data = self._input()
            if not data:
                self._ended = True
                return False
            rest = data.lstrip(b"\0")
        self._decoder, self._left = self._make(), rest
        return True


class _Prefixed:
    """`stream` with `head`, which was read from it already, in front."""

    def __init__(self, head: bytes, stream: Any) -> None:
        self._head, self._stream = head, stream

    def read(self, size: int = CHUNK) -> bytes:
        if self._head:
            data, self._head = (self._head, b"") if size < 0 else (self._head[:size], self._head[size:])
            return data
        return self._stream.read(size)


def decompress(stream: Any, ratio: int = 1000) -> Any:
    """A readable stream of what `stream` holds, uncompressed: gzip, bzip2 and xz are recognised by their
    first bytes (RFC 1952, the formats' own documents), all else passes as it is.

    NotSupported for zstd, which Python has from 3.14 on; BadParameter as Decompressor says."""
    head = read_chunk(stream, 10, 10)
    whole = _Prefixed(head, stream)
    if head.startswith(b"\x1f\x8b\x08"):
        return Decompressor(whole, lambda: zlib.decompressobj(31), ratio)
    if head.startswith(b"BZh"):
        import bz2
        return Decompressor(whole, bz2.BZ2Decompressor, ratio)
    if head.startswith(b"\xfd7zXZ\0"):
        import lzma
        return Decompressor(whole, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=1 << 29), ratio)
    if head.startswith(b"\x28\xb5\x2f\xfd"):
        raise NotSupported("zstd archives are not supported yet: compress the archive with gzip or xz")
    return whole


# Reading tar

class TarEntry:
    """One entry of an archive.  Names are bytes as they stand there, `kind` is the type flag's character
    code, times are in nanoseconds, `size` is the file's length and `stored` how many bytes of it the archive
    holds; `sparse` lists (offset, length) of what those are, or is None when they are the whole file."""

    __slots__ = ("name", "kind", "mode", "uid", "gid", "size", "mtime", "atime", "link", "device", "xattrs",
                 "sparse", "stored")

    def __init__(self, name: bytes, kind: int = ord("0"), mode: int = 0o644, uid: int = 0, gid: int = 0,
                 size: int = 0, mtime: int = 0, link: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        self.name, self.kind, self.mode, self.uid, self.gid, self.size = name, kind, mode, uid, gid, size
        self.mtime, self.atime, self.link, self.device = mtime, 0, link, device
        self.xattrs: dict[bytes, bytes] = {}
        self.sparse: Optional[list[tuple[int, int]]] = None
        self.stored = size


REGULAR, HARD_LINK, SYMLINK, CHARACTER, BLOCK, DIRECTORY, FIFO = b"0123456"
HEADER_ONLY = b"123456"
TAR_KINDS = {stat.S_IFREG: REGULAR, stat.S_IFDIR: DIRECTORY, stat.S_IFLNK: SYMLINK, stat.S_IFCHR: CHARACTER,
             stat.S_IFBLK: BLOCK, stat.S_IFIFO: FIFO}


def _number(field: bytes) -> int:
    """A number of a header: octal text, or base 256 with the top bit set (GNU); ValueError when it is
    neither."""
    try:
        return int(field.rstrip(b"\0 "), 8)
    except ValueError:
        if not field[0] & 0x80:
            return int(field.partition(b"\0")[0].strip() or b"0", 8)
    value = int.from_bytes(field, "big") & (1 << 8 * len(field) - 1) - 1
    return value - (1 << 8 * len(field) - 1) if field[0] & 0x40 else value


_repeated_number = functools.lru_cache(1024)(_number)  # modes and owners are the same in most headers


def _nanoseconds(text: bytes) -> int:
    """A pax time ("-1.25") in nanoseconds; ValueError."""
    whole, _, fraction = text.partition(b".")
    value = int(fraction[:9].ljust(9, b"0") or b"0")
    return int(whole or b"0") * 1_000_000_000 + (-value if whole.startswith(b"-") else value)


PAX_FIELDS: dict[bytes, tuple[str, Callable[[bytes], Any]]] = {  # the keywords that overrule the header
    b"path": ("name", bytes), b"linkpath": ("link", bytes), b"uid": ("uid", int), b"gid": ("gid", int),
    b"size": ("size", int), b"mtime": ("mtime", _nanoseconds), b"atime": ("atime", _nanoseconds),
}


def _pax_records(data: bytes) -> list[tuple[bytes, bytes]]:
    """The ("keyword", value) records of an extended header, in order; ValueError."""
    records, at, size = [], 0, len(data)
    while at < size:
        space = data.index(b" ", at, at + 21)
        end = at + int(data[at:space])
        if not space < end <= size or data[end - 1] != 10:
            raise ValueError("no pax record")
        keyword, equals, value = data[space + 1:end - 1].partition(b"=")
        named = keyword in (b"path", b"linkpath")
        if not keyword or not equals or b"\0" in keyword or (b"\0" in value and named):
            raise ValueError("no keyword or name")
        records.append((keyword, value))
        at = end
    return records


class TarReader:
    """The entries of the tar stream `stream`, in order, in bounded memory.

    `observer(entry, data)` is told of every byte in order: entry is None for headers, padding and what
    follows the end, so that the stream can be rebuilt from it and the files.  BadParameter with Go's texts on
    damage."""

    def __init__(self, stream: Any,
                 observer: Optional[Callable[[Optional[TarEntry], bytes], None]] = None) -> None:
        self._stream, self._observer = stream, observer
        self._buffer, self._view, self._at = b"", memoryview(b""), 0
        self._entry: Optional[TarEntry] = None
        self._left = self._padding = 0  # of the current entry: what the archive still holds of it
        self.offset = 0  # bytes of the stream behind us, less what is in the buffer

    def __iter__(self) -> Iterator[TarEntry]:
        while True:
            self.copy(-1, self._left)
            self._take(self._padding)
            self._padding = 0
            try:
                self._entry = self._parse()
            except (ValueError, OverflowError) as error:
                raise BadParameter(INVALID_TAR_HEADER) from error
            if self._entry is None:
                return
            yield self._entry

    def copy(self, fd: int, size: int) -> None:
        """Write the next `size` bytes of the current entry's content to a descriptor."""
        while size:
            if self._at == len(self._buffer) and not self._fill(1):
                raise BadParameter("unexpected EOF")
            piece = self._view[self._at:self._at + size]
            done = os.write(fd, piece) if fd >= 0 else len(piece)
            if self._observer:
                self._observer(self._entry, bytes(piece[:done]))
            self._at += done
            self._left -= done
            size -= done

    def drain(self) -> None:
        """Read the stream to its very end, which the archive's end need not be."""
        while self._fill(1):
            self._take(len(self._buffer) - self._at)

    def _fill(self, size: int) -> bool:
        """Have at least `size` bytes in the buffer; False when the stream ends before."""
        self.offset += self._at
        self._buffer = read_chunk(self._stream, size, head=self._buffer[self._at:])
        self._view, self._at = memoryview(self._buffer), 0
        return len(self._buffer) >= size

    def _take(self, size: int) -> bytes:
        """The next `size` bytes that are no content; fewer only at the stream's end."""
        if self._at + size > len(self._buffer):
            self._fill(size)
        data = self._buffer[self._at:self._at + size]
        self._at += len(data)
        if self._observer and data:
            self._observer(None, data)
        return data

    def _special(self, size: int) -> bytes:
        """The content of an extended header or a long name, with its padding."""
        if not 0 <= size <= TAR_SPECIAL_LIMIT:
            raise BadParameter("archive/tar: header field too long")
        data = self._take(size + -size % TAR_BLOCK)
        if len(data) < size:
            raise BadParameter("unexpected EOF")
        return data[:size]

    def _parse(self) -> Optional[TarEntry]:
        """The next entry with its extended headers; None at the archive's end; ValueError when it is no
        header."""
        records: list[tuple[bytes, bytes]] = []
        longs: dict[int, bytes] = {}
        while True:
            header = self._header(bool(records or longs))
            if header is None:
                return None
            kind = header[7][0]
            if kind in b"xgLK":
                data = self._special(_number(header[4]))
                if kind == ord("x"):
                    records = _pax_records(data)
                elif kind != ord("g"):  # global headers are read over, as Docker does
                    longs[kind] = data.partition(b"\0")[0]
                continue
            return self._finish(header, records, longs)

    def _header(self, needed: bool) -> Optional[tuple[bytes, ...]]:
        """The fields of the next header block; None at the end, which two blocks of zeroes or the stream's
        end mark."""
        block = self._take(TAR_BLOCK)
        if not block and not needed:
            return None
        if len(block) < TAR_BLOCK:
            raise BadParameter("unexpected EOF")
        if block == TAR_ZEROES:
            if self._take(TAR_BLOCK) not in (TAR_ZEROES, b""):
                raise ValueError("a lone block of zeroes")
            return None
        self._check_sum(block)
        return TAR_HEADER.unpack(block)

    @staticmethod
    def _check_sum(block: bytes) -> None:
        """ValueError when the header's sum is wrong; the sum counts its own field as spaces.

        Adler-32's low half is one plus the sum modulo 65521, in a tenth of sum()'s time; old programs summed
        signed bytes."""
        field = block[148:156]
        told, spaces = _number(field), 256
        if ((zlib.adler32(block) & 0xFFFF) - 1 - sum(field) + spaces - told) % 65521 == 0:
            return
        if sum(struct.unpack("512b", block[:148] + b" " * 8 + block[156:])) != told:
            raise ValueError("wrong sum")

    def _finish(self, header: tuple[bytes, ...], records: list[tuple[bytes, bytes]],
                longs: dict[int, bytes]) -> TarEntry:
        """The entry that a header and what stood before it describe."""
        name = header[0].partition(b"\0")[0]
        if header[14][0] and header[9][:6] == b"ustar\0":
            star = header[15][-4:] == b"tar\0"  # which keeps times behind a shorter prefix
            prefix = header[14][:131] if star else header[14]
            name = prefix.partition(b"\0")[0] + b"/" + name
        kind = header[7][0]
        owner = _repeated_number(header[2]), _repeated_number(header[3])
        mode = _repeated_number(header[1]) & 0o7777
        entry = TarEntry(name, kind or ord("0"), mode, *owner, _number(header[4]),
                         _number(header[5]) * 1_000_000_000, header[8].partition(b"\0")[0])
        if kind in b"34":
            entry.device = _number(header[12]), _number(header[13])
        sparse = self._apply_records(entry, records)
        entry.name, entry.link = longs.get(ord("L"), entry.name), longs.get(ord("K"), entry.link)
        if kind == 0 and entry.name.endswith(b"/"):
            entry.kind = DIRECTORY
        entry.stored = 0 if entry.kind in HEADER_ONLY else entry.size
        self._left, self._padding = entry.stored, -entry.stored % TAR_BLOCK
        if kind == ord("S"):
            self._old_sparse(entry, header)
        elif sparse:
            self._pax_sparse(entry, records)
        in_range = 0 <= entry.size < 1 << 63 and 0 <= entry.uid < 1 << 32 and 0 <= entry.gid < 1 << 32
        if not in_range or not entry.name:
            raise ValueError("a number out of range")
        return entry

    @staticmethod
    def _apply_records(entry: TarEntry, records: list[tuple[bytes, bytes]]) -> bool:
        """Let the pax records overrule the header; whether they tell of a sparse file."""
        sparse = False
        for keyword, value in records:
            field = PAX_FIELDS.get(keyword)
            if field and not value:
                continue  # the header's own value stands
            if field:
                setattr(entry, field[0], field[1](value))
            elif keyword.startswith(b"SCHILY.xattr."):
                entry.xattrs[keyword[13:]] = value
            elif keyword.startswith(b"GNU.sparse."):
                sparse = True
        return sparse

    def _old_sparse(self, entry: TarEntry, header: tuple[bytes, ...]) -> None:
        """GNU's old sparse format: four extents in the header (at byte 386), then blocks of 21."""
        area = header[14] + header[15]
        pairs, more, entry.size = [area[41:137]], area[137], _number(area[138:150])
        while more:
            block = self._take(TAR_BLOCK)
            if len(block) < TAR_BLOCK or len(pairs) * TAR_BLOCK > TAR_SPECIAL_LIMIT:
                raise ValueError("no end of the sparse map")
            pairs.append(block[:504])
            more = block[504]
        extents = [chunk[at:at + 24] for chunk in pairs for at in range(0, len(chunk), 24)]
        self._set_sparse(entry, [(_number(pair[:12]), _number(pair[12:])) for pair in extents if pair[0]])

    def _pax_sparse(self, entry: TarEntry, records: list[tuple[bytes, bytes]]) -> None:
        """GNU's pax sparse formats: 0.0 (repeated keywords), 0.1 (one keyword) and 1.0 (the map before the
        content)."""
        keywords = dict(records)
        entry.name = keywords.get(b"GNU.sparse.name", entry.name)
        size = keywords.get(b"GNU.sparse.realsize") or keywords.get(b"GNU.sparse.size")
        if b"GNU.sparse.map" in keywords:
            numbers = [int(number) for number in keywords[b"GNU.sparse.map"].split(b",") if number]
        elif keywords.get(b"GNU.sparse.major") == b"1":
            numbers = self._sparse_map_in_content(entry)
        else:
            numbers = [int(value) for keyword, value in records
                       if keyword in (b"GNU.sparse.offset", b"GNU.sparse.numbytes")]
        entry.size = int(size) if size else entry.size
        self._set_sparse(entry, list(zip(numbers[::2], numbers[1::2])))

    def _sparse_map_in_content(self, entry: TarEntry) -> list[int]:
        data, lines = b"", [b""]
        while len(lines) < 2 or len(lines) < 2 * int(lines[0]) + 2:  # the count, its pairs, what follows
            block = self._take(TAR_BLOCK)
            data += block
            self._left -= len(block)
            if len(block) < TAR_BLOCK or self._left < 0 or len(data) > TAR_SPECIAL_LIMIT:
                raise ValueError("no end of the sparse map")
            lines = data.split(b"\n")
        entry.stored = self._left
        return [int(line) for line in lines[1:2 * int(lines[0]) + 1]]

    @staticmethod
    def _set_sparse(entry: TarEntry, extents: list[tuple[int, int]]) -> None:
        end = 0
        for offset, length in extents:
            if length < 0 or offset < end:
                raise ValueError("extents out of order")
            end = offset + length
        if end > entry.size or sum(length for _, length in extents) != entry.stored:
            raise ValueError("extents that do not fit the file")
        entry.kind, entry.sparse = REGULAR, [extent for extent in extents if extent[1]]


# Unpacking

def apply_layer(stream: Any, directory: Union[str, int], whiteouts: str, idmap: IdMap,
                limits: UnpackLimits = UnpackLimits(), observer: Any = None) -> LayerStats:
    """Unpack the tar `stream` into `directory` (a path or a descriptor) in one pass, reading it to its end.

    `whiteouts`: "overlay" turns them into overlay's (character device 0:0, trusted.overlay.opaque), "apply"
    deletes what they name, "" takes them for ordinary files.  Owners are mapped by `idmap`.  The stream is
    read in the calling thread; files are made in one that the kernel confines to the directory.  BadParameter
    for a damaged or hostile archive, DockerError for what the file system refuses; what is there by then is
    the caller's to remove."""
    feed = Feed()
    unpacker = Unpacker(TarReader(feed, observer), whiteouts, idmap, limits)
    join = start_confined(directory, unpacker.run, failed=lambda error: feed.stop())
    feed.fill(stream)
    stats: LayerStats = join()
    if unpacker.refused:
        log.warning("ignored xattrs that the kernel refused: %s", ", ".join(sorted(unpacker.refused)))
    return stats


class Unpacker:
    """Makes the entries of an archive below the current directory of a confined thread.

    `made` holds, where whiteouts are applied, the names that this archive made, with all above them."""

    def __init__(self, reader: TarReader, whiteouts: str, idmap: IdMap, limits: UnpackLimits) -> None:
        self.reader, self.whiteouts, self.idmap, self.limits = reader, whiteouts, idmap, limits
        self.size = self.entries = 0
        self.made: set[bytes] = set()
        self.refused: set[str] = set()
        self._directories: dict[bytes, tuple[int, int]] = {}
        self._makers: dict[int, Callable[[bytes, TarEntry], None]] = {
            REGULAR: self._file, HARD_LINK: self._hard_link, SYMLINK: self._symlink,
            DIRECTORY: self._directory, CHARACTER: self._node, BLOCK: self._node, FIFO: self._node}

    def run(self) -> LayerStats:
        """Unpack everything; the modes of what is made are as asked, whatever the daemon's umask is."""
        os.umask(0)  # of this thread alone: confined() has unshared CLONE_FS
        for entry in self.reader:
            self._count()
            try:
                self._unpack(entry)
            except OSError as error:
                reason = (error.strerror or str(error)).lower()
                raise DockerError(f"failed to unpack {quoted(entry.name)}: {reason}") from error
        self._set_directory_times()
        self.reader.drain()
        return LayerStats(self.size, self.entries)

    def _count(self) -> None:
        self.entries += 1
        if self.limits.entries and self.entries > self.limits.entries:
            raise BadParameter(f"the archive has more than {self.limits.entries} entries")
        if self.limits.size and self.reader.offset > self.limits.size:
            raise BadParameter(f"the archive is longer than {self.limits.size} bytes")

    def _unpack(self, entry: TarEntry) -> None:
        name = self._clean(entry.name, "entry name")
        if name == b"." or (self.whiteouts and name.startswith(b".wh..wh.") and name != WHITEOUT_OPAQUE):
            return  # the root itself, and aufs' own files, as Docker leaves them out
        if self.whiteouts and WHITEOUT in name:
            base = name[name.rfind(b"/") + 1:]
            if base.startswith(WHITEOUT):
                return self._whiteout(name, base)
        make = self._makers.get(entry.kind)
        if make is None:
            raise BadParameter(f"unhandled tar header type {entry.kind}")
        make(name, entry)
        if self.whiteouts == "apply":
            self._remember(name)

    @staticmethod
    def _clean(name: bytes, what: str) -> bytes:
        """A name relative to the root, without empty, '.' and '..' parts; BadParameter when it leads out."""
        clean = name.strip(b"/")
        if b"//" in clean or b"/." in clean or clean[:1] == b"." or not clean:
            clean = os.path.normpath(name.lstrip(b"/") or b".")
            if clean == b".." or clean.startswith(b"../"):
                raise BadParameter(f"invalid {what} {quoted(name)}")
        return clean

    def _remember(self, name: bytes) -> None:
        while name and name not in self.made:
            self.made.add(name)
            name = name.rpartition(b"/")[0]

    # What stands in the way

    def _place(self, name: bytes, make: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call `make`, which makes `name`; make its parents, or remove what is in its place, if it must
        be."""
        try:
            return make(*arguments, **options)
        except FileExistsError:
            self._directories.pop(name, None)
            remove_entry(name)
        except (FileNotFoundError, NotADirectoryError):
            self._make_parents(name)
        return make(*arguments, **options)

    def _make_parents(self, name: bytes) -> None:
        at = name.find(b"/")
        while at >= 0:
            parent = name[:at]
            try:
                os.mkdir(parent, 0o755)
                os.chown(parent, *self.idmap.root)
            except FileExistsError:
                if not stat.S_ISDIR(os.stat(parent).st_mode):
                    self._replace_whiteout(parent)
            at = name.find(b"/", at + 1)

    def _replace_whiteout(self, name: bytes) -> None:
        """A whiteout in the same layer hides what lies below, and the directory made in its place must
        too."""
        if self.whiteouts != "overlay" or not is_whiteout(os.lstat(name)):
            raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), name)
        os.unlink(name)
        os.mkdir(name, 0o755)
        os.chown(name, *self.idmap.root)
        os.setxattr(name, OVERLAY_OPAQUE, b"y")

    # Whiteouts

    def _whiteout(self, name: bytes, base: bytes) -> None:
        directory = name[:-len(base)]
        target = directory + base[len(WHITEOUT):]
        if base in (WHITEOUT, WHITEOUT + b".", WHITEOUT + b".."):
            raise BadParameter(f"invalid whiteout entry {quoted(name)}")
        if self.whiteouts == "overlay":
            return self._overlay_whiteout(name, target, base == WHITEOUT_OPAQUE)
        if base != WHITEOUT_OPAQUE:
            return self._hide(target)
        self._make_parents(name)
        for child in os.listdir(directory or b"."):
            self._hide(directory + child)

    def _overlay_whiteout(self, name: bytes, target: bytes, opaque: bool) -> None:
        """A whiteout concerns the layers below alone: what this one has made in its place stays."""
        self._make_parents(name)
        if opaque:
            os.setxattr(os.path.dirname(name) or b".", OVERLAY_OPAQUE, b"y")
            return
        try:
            os.mknod(target, stat.S_IFCHR, 0)
            os.chown(target, *self.idmap.root, follow_symlinks=False)
        except FileExistsError:
            if stat.S_ISDIR(os.lstat(target).st_mode):
                os.setxattr(target, OVERLAY_OPAQUE, b"y")

    def _hide(self, name: bytes) -> None:
        """Remove what lower layers have at `name`, and keep what this one has made there."""
        if name not in self.made:
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                remove_entry(name)
        elif stat.S_ISDIR(os.lstat(name).st_mode):
            for child in os.listdir(name):
                self._hide(name + b"/" + child)

    # The kinds of entries

    def _file(self, name: bytes, entry: TarEntry) -> None:
        with closing_fd(self._place(name, os.open, name, NEW_FILE, entry.mode & 0o777)) as fd:
            if entry.sparse is None:
                self.reader.copy(fd, entry.stored)
            else:
                for offset, length in entry.sparse:
                    os.lseek(fd, offset, os.SEEK_SET)
                    self.reader.copy(fd, length)
                os.ftruncate(fd, entry.size)
            os.chown(fd, *self.idmap.to_host(entry.uid, entry.gid))
            for key, value in entry.xattrs.items():
                self._set_xattr(fd, key, value, entry)
            if entry.mode & 0o7000:  # after chown, which takes setuid away
                os.chmod(fd, entry.mode)
            os.utime(fd, ns=self._times(entry))
        self.size += entry.size

    def _directory(self, name: bytes, entry: TarEntry) -> None:
        fresh = True
        try:
            os.mkdir(name, entry.mode & 0o777)
        except FileExistsError:
            fresh = self._clear_for_directory(name, entry)
        except (FileNotFoundError, NotADirectoryError):
            self._make_parents(name)
            os.mkdir(name, entry.mode & 0o777)
        self._attributes(name, entry)
        if not fresh or entry.mode & 0o7000:
            os.chmod(name, entry.mode)
        self._directories[name] = self._times(entry)

    def _clear_for_directory(self, name: bytes, entry: TarEntry) -> bool:
        """Make way for a directory where something is; False when that is a directory, which is kept."""
        known = os.lstat(name)
        if stat.S_ISDIR(known.st_mode):
            return False
        os.unlink(name)
        os.mkdir(name, entry.mode & 0o777)
        if self.whiteouts == "overlay" and is_whiteout(known):
            os.setxattr(name, OVERLAY_OPAQUE, b"y")
        return True

    def _hard_link(self, name: bytes, entry: TarEntry) -> None:
        """A second name of a file in this archive, which has its attributes already."""
        target = self._clean(entry.link, "hardlink target")
        if target in (b".", name):
            raise BadParameter(f"invalid hardlink target {quoted(entry.link)}")
        self._place(name, os.link, target, name, follow_symlinks=False)

    def _symlink(self, name: bytes, entry: TarEntry) -> None:
        self._place(name, os.symlink, entry.link, name)
        self._attributes(name, entry)
        os.utime(name, ns=self._times(entry), follow_symlinks=False)
        self.size += len(entry.link)

    def _node(self, name: bytes, entry: TarEntry) -> None:
        if self.idmap and entry.kind != FIFO:
            return  # a remapped root may not make devices, and an image must not make them for it
        kind = {number: mode for mode, number in TAR_KINDS.items()}[entry.kind]
        if not all(0 <= number < 1 << 32 for number in entry.device):
            raise BadParameter(INVALID_TAR_HEADER)
        device = os.makedev(entry.device[0] & 0xFFF, entry.device[1] & 0xFFFFF)  # the kernel's widths
        self._place(name, os.mknod, name, kind | entry.mode & 0o777, device)
        self._attributes(name, entry)
        if entry.mode & 0o7000:
            os.chmod(name, entry.mode)
        os.utime(name, ns=self._times(entry), follow_symlinks=False)

    def _attributes(self, name: bytes, entry: TarEntry) -> None:
        """Owner and xattrs of what is no regular file."""
        os.chown(name, *self.idmap.to_host(entry.uid, entry.gid), follow_symlinks=False)
        for key, value in entry.xattrs.items():
            self._set_xattr(name, key, value, entry)

    def _set_xattr(self, target: Union[bytes, int], key: bytes, value: bytes, entry: TarEntry) -> None:
        """Set one attribute.  Those of overlay itself could make a layer show what is not the image's."""
        if key.startswith(b"trusted.overlay.") and defended("overlay-xattrs"):
            raise BadParameter(f"invalid xattr {quoted(key)} of {quoted(entry.name)}: "
                               "it belongs to the storage driver")
        try:
            os.setxattr(target, key, value, **({} if isinstance(target, int) else {"follow_symlinks": False}))
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EACCES, errno.EOPNOTSUPP):
                raise
            self.refused.add(os.fsdecode(key))

    @staticmethod
    def _times(entry: TarEntry) -> tuple[int, int]:
        """(access, modification) in ns; what is before 1970 or beyond 64 bits is 1970, as Docker has it."""
        modified = entry.mtime if 0 <= entry.mtime < 1 << 63 else 0
        return (entry.atime if modified < entry.atime < 1 << 63 else modified), modified

    def _set_directory_times(self) -> None:
        """At the end, because every file made in a directory changes its time."""
        for name, times in self._directories.items():
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.utime(name, ns=times, follow_symlinks=False)


def is_whiteout(facts: os.stat_result) -> bool:
    """Whether lstat's answer is an overlay whiteout: the character device 0:0."""
    return stat.S_ISCHR(facts.st_mode) and facts.st_rdev == 0


def remove_entry(name: bytes) -> None:
    """Remove the file or tree `name`; the last component is never followed."""
    try:
        os.unlink(name)
    except IsADirectoryError:
        remove_tree(name)


# Removing trees

def remove_tree(path: Union[str, bytes]) -> None:
    """Remove a directory with all below it, or a file; nothing when there is none.

    Goes by descriptors and never through a link, holds few of them however deep the tree is, and takes
    immutable and append-only flags away.  OSError for what stays, after everything else has gone."""
    parent, base = os.path.split(os.path.abspath(path))
    try:
        directory = opened(parent)
    except FileNotFoundError:
        return
    names: list[Any] = [base]
    with directory as fd:
        while names:
            _remove_below(fd, names.pop(), 0, fd, names)


def _remove_below(directory: int, name: Any, depth: int, top: int, moved: list[Any]) -> None:
    """Remove `name` in the open `directory`; what lies deep is moved into the directory `top` and added to
    `moved`."""
    with contextlib.suppress(IsADirectoryError):
        return _forcing(directory, name, lambda: os.unlink(name, dir_fd=directory))
    if depth > 40:
        moved.append(f".{secrets.token_hex(16)}-removing")
        return os.rename(name, moved[-1], src_dir_fd=directory, dst_dir_fd=top)
    failure: Optional[OSError] = None
    with contextlib.suppress(FileNotFoundError), opened(name, SUBDIRECTORY, dir_fd=directory) as fd:
        for child in os.listdir(fd):
            try:
                _remove_below(fd, child, depth + 1, top, moved)
            except OSError as error:
                failure = error
    if failure:
        raise failure
    _forcing(directory, name, lambda: os.rmdir(name, dir_fd=directory))


def _forcing(directory: int, name: Any, remove: Callable[[], None]) -> None:
    """Call `remove`; where the kernel forbids it, once more without inode flags on the thing and on its
    directory."""
    with contextlib.suppress(FileNotFoundError):
        try:
            return remove()
        except PermissionError:
            _clear_flags(directory)
            with contextlib.suppress(OSError), opened(name, UNFOLLOWED, dir_fd=directory) as fd:
                _clear_flags(fd)
        remove()


def _clear_flags(fd: int) -> None:
    """Take the immutable and append-only flags of a file away, where its file system has them;
    ioctl_iflags(2)."""
    with contextlib.suppress(OSError):
        value = bytearray(8)
        fcntl.ioctl(fd, FS_IOC_GETFLAGS, value)
        flags, = struct.unpack_from("=I", value)
        if flags & (FS_IMMUTABLE_FL | FS_APPEND_FL):
            struct.pack_into("=I", value, 0, flags & ~(FS_IMMUTABLE_FL | FS_APPEND_FL))
            fcntl.ioctl(fd, FS_IOC_SETFLAGS, value)


# Writing tar

def tar_header(entry: TarEntry) -> bytes:
    """The header of an entry as Go's archive/tar writes it: ustar where all fits, pax records before it where
    not.

    Times are cut to seconds, user and group names are left empty, as Docker does."""
    name, split = entry.name, _split_name(entry.name)
    seconds = entry.mtime // 1_000_000_000
    records = {b"SCHILY.xattr." + key: value for key, value in entry.xattrs.items()}
    numbers = {"uid": (entry.uid, 7), "gid": (entry.gid, 7), "size": (entry.size, 11), "mtime": (seconds, 11)}
    records.update({keyword.encode(): b"%d" % value for keyword, (value, digits) in numbers.items()
                    if not 0 <= value < 8 ** digits})
    if len(entry.link) > 100 or not entry.link.isascii():
        records[b"linkpath"] = entry.link
    if split is None or (records and (len(name) > 100 or not name.isascii())):
        records[b"path"] = name
    if not records:
        prefix, name = split or (b"", name)
        return _tar_block(entry, name, prefix)
    data = b"".join(_pax_record(key, value) for key, value in sorted(records.items()))
    directory, base = os.path.split(name)
    beside = os.path.join(directory, b"PaxHeaders.0", base).rstrip(b"/")
    extended = _tar_block(TarEntry(beside, ord("x"), 0, 0, 0, len(data)), beside)
    return extended + data + bytes(-len(data) % TAR_BLOCK) + _tar_block(entry, name)


def _split_name(name: bytes) -> Optional[tuple[bytes, bytes]]:
    """A name as ustar's (prefix, name), or None where it does not fit."""
    if not name.isascii():
        return None
    if len(name) <= 100:
        return b"", name
    slash = name.rfind(b"/", 0, min(len(name) - name.endswith(b"/"), 156))
    fits = 0 < slash <= 155 and 0 < len(name) - slash - 1 <= 100
    return (name[:slash], name[slash + 1:]) if fits else None


def _pax_record(keyword: bytes, value: bytes) -> bytes:
    """"LENGTH KEYWORD=VALUE\n", its length counting its own digits."""
    body = b" %s=%s\n" % (keyword, value)
    length = len(body) + len(str(len(body)))
    length = len(body) + len(str(length))
    return b"%d" % length + body


def _tar_block(entry: TarEntry, name: bytes, prefix: bytes = b"") -> bytes:
    """One ustar header block; what does not fit is cut or zero, because a pax record tells it."""

    def octal(value: int, digits: int) -> bytes:
        return b"%0*o\0" % (digits, value if 0 <= value < 8 ** digits else 0)

    def text(value: bytes, size: int = 100) -> bytes:
        value = value.decode("ascii", "ignore").encode()
        return value if len(value) <= size else value[:size].rstrip(b"/")  # a slash would make it a directory

    device = (b"", b"") if entry.kind == ord("x") else tuple(octal(number, 7) for number in entry.device)
    fields = [text(name), octal(entry.mode, 7), octal(entry.uid, 7), octal(entry.gid, 7),
              octal(entry.size, 11), octal(entry.mtime // 1_000_000_000, 11), b" " * 8, bytes([entry.kind]),
              text(entry.link), b"ustar\00000", b"", b"", *device, prefix, b""]
    total = sum(TAR_HEADER.pack(*fields))
    fields[6] = b"%06o\0 " % total
    return TAR_HEADER.pack(*fields)


def write_tree(directory: Union[str, int], write: Callable[[bytes], Any], idmap: IdMap = IdMap(),
               whiteouts: str = "") -> None:
    """Pack what is below `directory` (a path or a descriptor) as a tar stream, with names relative to it.

    Sorted by name in each directory, hard links kept, sockets left out, of the xattrs security.capability
    alone, as Docker packs.  `whiteouts` "overlay" packs an overlay's upper directory as a layer, its
    whiteouts as .wh. files. Files that vanish meanwhile are left out.  The tree is read in a confined thread,
    `write(data)` is called in the caller's; what it raises ends the packing, OSError tells of what cannot be
    read."""
    feed = Feed()
    join = start_confined(directory, TreePacker(feed, idmap, whiteouts).run, failed=feed.finish)
    try:
        while data := feed.read():
            write(data)
    finally:
        feed.stop()
        with contextlib.suppress(Exception):  # the feed has told of it
            join()


class TreePacker:
    """Packs the tree below the current directory of a confined thread into a feed."""

    def __init__(self, feed: Feed, idmap: IdMap, whiteouts: str) -> None:
        self.feed, self.idmap, self.whiteouts = feed, idmap, whiteouts
        self._pending: list[bytes] = []
        self._pending_size = 0
        self._inodes: dict[tuple[int, int], bytes] = {}

    def run(self) -> None:
        """Pack everything and finish the feed."""
        names = sorted(os.listdir(b"."), reverse=True)
        while names:
            name = names.pop()
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):  # it vanished meanwhile
                if self._add(name):
                    names += [name + b"/" + child for child in sorted(os.listdir(name), reverse=True)]
        self._put(TAR_ZEROES * 2)
        self._flush()
        self.feed.finish()

    def _put(self, data: bytes) -> None:
        self._pending.append(data)
        self._pending_size += len(data)
        if self._pending_size >= CHUNK:
            self._flush()

    def _flush(self) -> None:
        if not self.feed.put(b"".join(self._pending)):
            raise BrokenPipeError(errno.EPIPE, "nobody reads the archive any more")
        self._pending, self._pending_size = [], 0

    def _add(self, name: bytes) -> bool:
        """Pack one name; whether it is a directory."""
        facts = os.lstat(name)
        kind = TAR_KINDS.get(stat.S_IFMT(facts.st_mode))
        if kind is None:  # a socket
            return False
        if self.whiteouts == "overlay" and is_whiteout(facts):
            self._put(tar_header(self._whiteout(name, facts)))
            return False
        entry = self._entry(name, kind, facts)
        if entry.kind == REGULAR and entry.size:
            self._add_file(name, entry)
        else:
            self._put(tar_header(entry))
        if kind == DIRECTORY and self.whiteouts == "overlay" and _xattr(name, OVERLAY_OPAQUE) == b"y":
            opaque = entry.name + WHITEOUT_OPAQUE
            self._put(tar_header(TarEntry(opaque, REGULAR, entry.mode & 0o777, entry.uid, entry.gid)))
        return kind == DIRECTORY

    def _entry(self, name: bytes, kind: int, facts: os.stat_result) -> TarEntry:
        uid, gid = self.idmap.to_container(facts.st_uid, facts.st_gid)
        entry = TarEntry(name, kind, stat.S_IMODE(facts.st_mode), uid, gid, 0, int(facts.st_mtime_ns))
        if kind == DIRECTORY:
            entry.name += b"/"
        elif kind == SYMLINK:
            entry.link = os.readlink(name)
        elif kind == REGULAR:
            entry.size = facts.st_size
        elif kind in (CHARACTER, BLOCK):
            entry.device = os.major(facts.st_rdev), os.minor(facts.st_rdev)
        capability = _xattr(name, "security.capability") if kind == REGULAR else b""
        if capability:
            entry.xattrs[b"security.capability"] = _without_root_id(capability)
        if facts.st_nlink > 1 and kind != DIRECTORY:
            first = self._inodes.setdefault((facts.st_dev, facts.st_ino), name)
            if first != name:
                entry.kind, entry.link, entry.size = HARD_LINK, first, 0
        return entry

    @staticmethod
    def _whiteout(name: bytes, facts: os.stat_result) -> TarEntry:
        directory, base = os.path.split(name)
        return TarEntry(os.path.join(directory, WHITEOUT + base), REGULAR, 0o600, facts.st_uid, facts.st_gid,
                        mtime=int(facts.st_mtime_ns))

    def _add_file(self, name: bytes, entry: TarEntry) -> None:
        """A file's header and content: as long as the header says, whatever is written to it meanwhile."""
        with opened(name, UNFOLLOWED) as fd:
            self._put(tar_header(entry))
            left = entry.size
            while left:
                data = os.read(fd, min(left, CHUNK)) or bytes(min(left, CHUNK))
                self._put(data)
                left -= len(data)
            self._put(bytes(-entry.size % TAR_BLOCK))


def _xattr(name: Union[bytes, int], key: str) -> bytes:
    """One extended attribute of a file, which is not followed when it is a link; b"" when it has none."""
    try:
        return os.getxattr(name, key, **({} if isinstance(name, int) else {"follow_symlinks": False}))
    except OSError:
        return b""


def _without_root_id(capability: bytes) -> bytes:
    """A file capability without its user namespace's root (<linux/capability.h>: revision 3 becomes 2)."""
    return capability[:3] + b"\2" + capability[4:20] if capability[3:4] == b"\3" else capability
# ------------------------------------------------------------------------------------------------------------
# Storage drivers
#
# The one writer of state files, and the three drivers that keep layers: overlay2, btrfs and vfs behind one
# small interface.  On disk everything stands where moby's drivers of the same names put it (DESIGN section
# 5).  A driver knows directories and mounts, and neither images nor containers.  Sources: the kernel's
# Documentation/filesystems/overlayfs.rst, <linux/btrfs.h>, rename(2), fsync(2).
# ------------------------------------------------------------------------------------------------------------

STATE_SYNC_INTERVAL = 0.05  # seconds between a background sync's first record and its work
STATE_CHECKSUM = "trusted.dockerd.crc32"  # of a state file that was renamed before it was synced
STATE_PREVIOUS = ".previous"


class StateSync(threading.Thread):
    """Brings state files that were renamed without a sync to the disk, in groups, within 100 ms.

    Until then the version before, which is on the disk, stays beside each as NAME.previous."""

    def __init__(self) -> None:
        super().__init__(name="state-sync", daemon=True)
        self._locks = [threading.Lock() for _ in range(64)]  # by path: no two records wait for each other
        self._pending: dict[str, int] = {}
        self._versions = itertools.count()
        self._wanted = threading.Event()
        self._flushing = threading.Lock()
        self._starting = threading.Lock()

    def _lock(self, path: str) -> threading.Lock:
        return self._locks[hash(path) % len(self._locks)]

    def publish(self, temporary: str, path: str) -> None:
        """Rename a whole, unsynced file to `path`, keep the version before, and sync it soon."""
        with self._lock(path):
            if path not in self._pending:
                with contextlib.suppress(FileNotFoundError, FileExistsError):
                    os.link(path, path + STATE_PREVIOUS)
            os.rename(temporary, path)
            self._pending[path] = next(self._versions)
        with self._starting:
            if not self.is_alive():
                self.start()
        self._wanted.set()

    def forget(self, path: str, version: Optional[int] = None) -> None:
        """`path` is on the disk as it is, or as it was in `version`: the version before it may go."""
        with self._lock(path):
            if version is not None and self._pending.get(path) != version:
                return  # a newer one waits, and needs the version before
            self._pending.pop(path, None)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path + STATE_PREVIOUS)

    def run(self) -> None:
        """The thread: gather what is written together, then sync it."""
        while True:
            self._wanted.wait()
            time.sleep(STATE_SYNC_INTERVAL)
            self._wanted.clear()
            try:
                self.flush()
            except OSError as error:  # out of descriptors, say: what is pending is synced when there are some
                log.error("cannot sync the state: %s", error)
                self._wanted.set()

    def flush(self) -> None:
        """Sync everything that is pending; on return it is on the disk."""
        with self._flushing:
            pending = list(self._pending.items())
            directories = set()
            for path, _ in pending:
                with contextlib.suppress(FileNotFoundError):
                    _sync_file(path)
                    directories.add(os.path.dirname(path))
            for directory in directories:
                with contextlib.suppress(FileNotFoundError):
                    _sync_file(directory)
            for path, version in pending:
                self.forget(path, version)


STATE_SYNC = StateSync()


def _sync_file(path: str) -> None:
    """fsync a file or a directory; FileNotFoundError when it is gone, anything else is logged."""
    with opened(path, os.O_RDONLY) as fd:
        try:
            os.fsync(fd)
        except OSError as error:
            log.error("cannot sync %s: %s", path, error.strerror)


def write_state(path: str, data: Union[bytes, dict[str, Any], list[Any]], mode: int = 0o600,
                durable: bool = True) -> None:
    """Replace the state file `path` as a whole: the only writer of state; dict and list become JSON.

    Durable: it is on the disk on return.  Else the new version is there for every reader at once, also after
    a kill, and on the disk within 100 ms; read_state() finds a whole version after a power cut too.  OSError,
    and then the old version stands."""
    if not isinstance(data, bytes):
        data = json.dumps(data, separators=(",", ":")).encode()
    directory, base = os.path.split(os.path.abspath(path))
    path = os.path.join(directory, base)
    temporary = os.path.join(directory, f".tmp-{base}{secrets.token_hex(4)}")
    try:
        durable = _write_whole(temporary, data, mode, durable)
        failpoint("state-rename")
        if not durable:
            return STATE_SYNC.publish(temporary, path)
        os.rename(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_file(directory)
    STATE_SYNC.forget(path)


def _write_whole(path: str, data: bytes, mode: int, durable: bool) -> bool:
    """Write a new file; whether it is on the disk, as it must be where a checksum cannot be kept with it."""
    with opened(path, NEW_FILE, mode) as fd:
        write_all(fd, data[:len(data) // 2])
        failpoint("state-write")
        write_all(fd, data[len(data) // 2:])
        os.fchmod(fd, mode)
        if not durable:
            try:
                os.setxattr(fd, STATE_CHECKSUM, b"%08x" % zlib.crc32(data))
            except OSError:
                durable = True
        if durable:
            os.fsync(fd)
    return durable


def read_state(path: str) -> bytes:
    """The newest whole version of a state file; FileNotFoundError when there is none, OSError EIO when it was
    lost."""
    data = _read_whole(path)
    if data is None:
        with contextlib.suppress(FileNotFoundError):
            data = _read_whole(path + STATE_PREVIOUS)
        if data is None:
            raise OSError(errno.EIO, "the file is damaged, and no version before it is there", path)
        log.warning("%s is damaged: taking the version before it", path)
    return data


def _read_whole(path: str) -> Optional[bytes]:
    """A file's content, or None when it is not what was written: by its checksum, or empty where it has
    none."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    with open(fd, "rb") as file:
        data = file.read()
        checksum = _xattr(fd, STATE_CHECKSUM)
    whole = b"%08x" % zlib.crc32(data) == checksum if checksum else bool(data)
    return data if whole else None


class Damage(NamedTuple):
    """Something that does not agree with the records, and what mends it: without, only a person can choose.

    `safe`: a crash leaves such, nothing is lost by mending it, and each start does."""

    text: str
    mend: Optional[Callable[[], Any]] = None
    safe: bool = False


def unfinished(directory: str) -> list[Damage]:
    """Temporary files in `directory` of state files whose writer was killed."""
    paths = [os.path.join(directory, name) for name in os.listdir(directory) if name.startswith(".tmp-")]
    return [Damage(f"{path} was never finished", functools.partial(os.unlink, path), True) for path in paths]


def mend_what_is_safe(damages: Iterable[Damage]) -> None:
    """What each start does about damages; the others are logged."""
    for damage in damages:
        log.warning("%s", damage.text)
        if damage.mend and damage.safe:
            try:
                damage.mend()
            except (OSError, DockerError) as error:
                log.error("cannot mend that: %s", error)


def make_directory(path: str, mode: int, uid: int = 0, gid: int = 0) -> None:
    """Make a directory with these rights, or give them to the one that is there."""
    with contextlib.suppress(FileExistsError):
        os.mkdir(path, mode)
    os.chmod(path, mode)
    os.chown(path, uid, gid)


# The drivers

FILE_SYSTEMS = {  # f_type of statfs(2): the name that Docker shows
    0x9123683E: "btrfs",
    0xEF53: "extfs",
    0xF2F52010: "f2fs",
    0x65735546: "fuse",
    0x3153464A: "jfs",
    0x6969: "nfs",
    0x794C7630: "overlayfs",
    0x52654973: "reiserfs",
    0x73717368: "squashfs",
    0x01021994: "tmpfs",
    0x58465342: "xfs",
    0x2FC12FC1: "zfs",
    0xCA451A4E: "bcachefs",
    0xE0F5E1E2: "erofs",
}
OVERLAY_DEPTH = 128  # layers below one; moby's maxDepth


class DriverNotSupported(NotSupported):
    """The host cannot run a storage driver; auto-detection then tries the next one."""


class StorageDriver:
    """Layers in directories under `root`/`name`, each known by its cache id; options are KEY=VALUE texts.

    A subclass says where a layer's directory is (diff_dir), makes and removes it, and how a stack is mounted.
    `whiteouts` is what apply_layer must do with them.  DriverNotSupported when the host cannot run it,
    BadParameter for an option it does not know."""

    name = ""
    whiteouts = "apply"
    options: tuple[str, ...] = ()  # those it takes
    unknown_option = "unknown option {} for {}"
    no_size = "the storage driver {} has no size limits: leave out --storage-opt size"

    def __init__(self, root: str, options: Optional[list[str]], idmap: IdMap) -> None:
        self.home, self.idmap = os.path.join(root, self.name), idmap
        if options is None:  # only to look at what is there
            return
        self.backing = FILE_SYSTEMS.get(statfs_type(self._existing()), "<unknown>")
        for key, value in map(parse_storage_option, options):
            if key not in self.options:
                raise BadParameter(self.unknown_option.format(key, self.name))
            self.take_option(key, value)
        self.detect(self._existing())
        make_directory(self.home, 0o710, 0, idmap.root[1])
        make_directory(self.layers(), 0o710, 0, idmap.root[1])

    def _existing(self) -> str:
        """The driver's directory, or the root while there is none: what holds the layers."""
        return self.home if os.path.isdir(self.home) else os.path.dirname(self.home)

    def take_option(self, key: str, value: str) -> None:
        """One of `options`; BadParameter when its value cannot be had."""

    def detect(self, directory: str) -> None:
        """DriverNotSupported when layers cannot be kept on the file system of `directory`."""

    def status(self) -> list[list[str]]:
        """What docker info shows of it."""
        return []

    def layers(self) -> str:
        """The directory whose entries are the cache ids."""
        return self.home

    def _path(self, cache_id: str) -> str:
        """A layer's directory; BadParameter for what is no name, because names come from files."""
        if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]*", cache_id):
            raise BadParameter(f"invalid layer id {cache_id!r}")
        return os.path.join(self.layers(), cache_id)

    def exists(self, cache_id: str) -> bool:
        """Whether the driver has this layer."""
        return os.path.isdir(self._path(cache_id))

    def ids(self) -> list[str]:
        """The cache ids of all that is there, half-made layers too."""
        return [name for name in os.listdir(self.layers()) if re.fullmatch("[0-9a-f]{64}(-init)?", name)]

    def diff_dir(self, cache_id: str) -> str:
        """Where a layer is unpacked, and what is packed of it."""
        return self._path(cache_id)

    def create(self, cache_id: str, parent: Optional[str] = None, writable: bool = False,
               size: int = 0) -> None:
        """Make the directories of a layer on top of `parent`; `size` limits a writable one's bytes (0: no
        limit).

        DockerError or OSError, and then nothing of it is there."""
        if size:
            raise BadParameter(self.no_size.format(self.name))
        if parent is not None and not self.exists(parent):
            raise NotFound(f"parent layer {parent} does not exist")
        if self.exists(cache_id):
            raise Conflict(f"layer {cache_id} already exists")
        try:
            failpoint("layer-create")
            self.make(cache_id, parent)
        except BaseException:
            self.remove(cache_id)
            raise

    def make(self, cache_id: str, parent: Optional[str]) -> None:
        """Make the layer's directories; create() undoes what a failure leaves."""
        raise NotImplementedError

    def remove(self, cache_id: str) -> None:
        """Remove a layer, whole or half-made; nothing when there is none.  It is renamed first, so that a
        crash leaves no half layer under its name."""
        path = self._path(cache_id)
        doomed = os.path.join(self.layers(), f"{cache_id}-{secrets.token_hex(4)}-removing")
        try:
            os.rename(path, doomed)
        except FileNotFoundError:
            return
        except OSError as error:  # a mount that another daemon left in it
            if error.errno != errno.EBUSY:
                raise
            doomed = path
        self.destroy(doomed)

    def destroy(self, path: str) -> None:
        """Remove a layer's directory."""
        remove_tree(path)

    def leftovers(self) -> list[Damage]:
        """What remove() was about to remove when the daemon ended."""
        paths = [os.path.join(self.layers(), name) for name in os.listdir(self.layers())]
        return [Damage(f"the removal of {path} was interrupted", functools.partial(self.destroy, path), True)
                for path in paths if path.endswith("-removing")]

    def mount(self, cache_id: str, readonly: bool = False, label: str = "") -> int:
        """A descriptor of a detached mount of the layer with all below it: it stands in no mount table, and
        goes with its last user.  `label` is the SELinux context of all its files, where the driver can."""
        fd = open_tree(AT_FDCWD, self.diff_dir(cache_id))
        if readonly:
            mount_setattr(fd, "", AT_EMPTY_PATH, set=MOUNT_ATTR_RDONLY)
        return fd

    def metadata(self, cache_id: str) -> Optional[dict[str, str]]:
        """The GraphDriver.Data of inspect."""
        return None


def parse_storage_option(option: str) -> tuple[str, str]:
    """A --storage-opt as (key in lower case, value); BadParameter."""
    key, equals, value = option.partition("=")
    if not equals:
        raise BadParameter(f"unable to parse storage-opt key/value: {option}")
    return key.strip().lower(), value.strip()


class Overlay(StorageDriver):
    """overlay2: a directory a layer, stacked by the kernel's overlay file system.

    <id>/diff holds the layer, <id>/link its short name (a link of that name in l/ leads to diff), <id>/lower
    the short names of those below it, uppermost first; work is overlay's own, `committed` marks a layer with
    others above."""

    name = "overlay2"
    whiteouts = "overlay"
    options = ("overlay2.override_kernel_check", "overlay2.size")
    unknown_option = "{1}: unknown option {0}"
    no_size = "--storage-opt is supported only for overlay over xfs with 'pquota' mount option"
    OFF = ("index", "metacopy", "redirect_dir")  # features that tie a layer to its neighbours

    def __init__(self, root: str, options: Optional[list[str]], idmap: IdMap) -> None:
        super().__init__(root, options, idmap)
        if options is not None:
            make_directory(os.path.join(self.home, "l"), 0o700)

    def take_option(self, key: str, value: str) -> None:
        if key == "overlay2.size":
            raise BadParameter("Storage Option overlay2.size only supported for backingFS XFS with project "
                               f"quota, which is not supported yet. Found {self.backing}")

    def detect(self, directory: str) -> None:
        """Mount an overlay of two layers for real: what it says holds for nested overlays and for users'
        kernels."""
        parameters = "/sys/module/overlay/parameters/"
        check = os.path.join(directory, "check-overlayfs-support")
        remove_tree(check)  # of a daemon that was killed
        os.mkdir(check, 0o700)
        try:
            paths = [os.path.join(check, name) for name in ("upper", "work", "lower2", "lower1", "merged")]
            for path in paths:
                os.mkdir(path)
            if DT_UNKNOWN in directory_types(check):
                raise DriverNotSupported(self._no_types())
            self.appends = True
            os.close(self._try_mount(paths))  # which loads the module; its parameters are there from then on
            self.off = [name for name in self.OFF if os.path.exists(parameters + name)]
        except OSError as error:
            raise DriverNotSupported(f"failed to mount overlay: {error.strerror or error}") from error
        finally:
            remove_tree(check)

    def _try_mount(self, paths: list[str]) -> int:
        """Mount the test directories, with lowerdir+ where the kernel has it (6.5)."""
        upper, work, *lowers, merged = paths
        with contextlib.suppress(OSError):
            return new_mount("overlay", 0, "overlay", [("lowerdir+", lower) for lower in lowers] + [
                ("upperdir", upper), ("workdir", work)])
        self.appends = False
        options = f"lowerdir={':'.join(lowers)},upperdir={upper},workdir={work}"
        return in_thread(self._mount_by_options, os.path.dirname(merged), "merged", options)

    def _no_types(self) -> str:
        hint = {"xfs": " Reformat the filesystem with ftype=1 to enable d_type support.",
                "extfs": " Reformat the filesystem (or use tune2fs) with -O filetype to enable it."}
        return (f"overlay2: the backing {self.backing} filesystem is formatted without d_type support, which "
                f"leads to incorrect behavior.{hint.get(self.backing, '')} Backing filesystems without "
                "d_type support are not supported.")

    def status(self) -> list[list[str]]:
        return [["Backing Filesystem", self.backing], ["Supports d_type", "true"],
                ["Using metacopy", "false"], ["Native Overlay Diff", "true"], ["userxattr", "false"]]

    def diff_dir(self, cache_id: str) -> str:
        return os.path.join(self._path(cache_id), "diff")

    def make(self, cache_id: str, parent: Optional[str]) -> None:
        path, (uid, gid) = self._path(cache_id), self.idmap.root
        make_directory(path, 0o710, 0, gid)
        make_directory(os.path.join(path, "diff"), 0o755, uid, gid)
        short = base64.b32encode(secrets.token_bytes(17)).decode()[:26]
        write_state(os.path.join(path, "link"), short.encode(), 0o644, durable=False)  # for destroy
        os.symlink(f"../{cache_id}/diff", os.path.join(self.home, "l", short))
        if parent is None:
            return
        make_directory(os.path.join(path, "work"), 0o700, uid, gid)
        above = read_state(os.path.join(self._path(parent), "link")).decode()
        lowers = [f"l/{above}", *self._lowers(parent)]
        if len(lowers) > OVERLAY_DEPTH:
            raise BadParameter("max depth exceeded")
        write_state(os.path.join(path, "lower"), ":".join(lowers).encode(), 0o644, durable=False)
        committed = os.path.join(self._path(parent), "committed")
        os.close(os.open(committed, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o600))

    def _lowers(self, cache_id: str) -> list[str]:
        """The layers below one as paths relative to the driver's directory, uppermost first."""
        try:
            return read_state(os.path.join(self._path(cache_id), "lower")).decode().split(":")
        except FileNotFoundError:
            return []

    def leftovers(self) -> list[Damage]:
        """A crash may also leave short names that lead nowhere."""
        paths = [os.path.join(self.home, "l", name) for name in os.listdir(os.path.join(self.home, "l"))]
        return super().leftovers() + [
            Damage(f"{path} leads to no layer", functools.partial(os.unlink, path), True)
            for path in paths if not os.path.exists(path)]

    def destroy(self, path: str) -> None:
        """The short name goes last: without its layer it leads nowhere, and the next start sees that."""
        short = ""
        with contextlib.suppress(OSError):
            short = read_state(os.path.join(path, "link")).decode()
        with contextlib.suppress(OSError):
            umount(os.path.join(path, "merged"), MNT_DETACH)
        remove_tree(path)
        if re.fullmatch("[A-Z0-9]+", short):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(self.home, "l", short))

    def mount(self, cache_id: str, readonly: bool = False, label: str = "") -> int:
        path, lowers = self._path(cache_id), self._lowers(cache_id)
        readonly = readonly or os.path.exists(os.path.join(path, "committed"))
        if not lowers:
            return super().mount(cache_id, readonly)
        upper = [] if readonly else [("upperdir", f"{path}/diff"), ("workdir", f"{path}/work")]
        if readonly:
            lowers = [f"{cache_id}/diff", *lowers]
        fd = self._mount(cache_id, lowers, upper + ([("context", label)] if label else []))
        if upper and self.idmap:  # overlay in a user namespace needs to move directories through it
            os.chown(f"{path}/work/work", *self.idmap.root)
        return fd

    def _mount(self, cache_id: str, lowers: list[str], upper: list[tuple[str, str]]) -> int:
        """A stack as one lowerdir where the parameter holds it, so that a container sees the mount that it
        sees under moby; else layer by layer; by mount(2) where the kernel cannot."""
        paths = [os.path.join(self.home, lower) for lower in lowers]
        settings = upper + [(name, "off") for name in self.off]
        whole = ":".join(paths)
        if (self.appends or len(whole) < 256) and all(len(value) < 256 for _, value in upper):
            layers = [("lowerdir", whole)] if len(whole) < 256 else [("lowerdir+", path) for path in paths]
            return new_mount("overlay", 0, "overlay", layers + settings)
        options = ",".join(f"{key}=" + (os.path.relpath(value, self.home) if value[:1] == "/" else
                                        f'"{value}"' if key == "context" else value)
                           for key, value in [("lowerdir", ":".join(lowers)), *settings])
        merged = os.path.join(self._path(cache_id), "merged")
        make_directory(merged, 0o700, *self.idmap.root)
        try:
            return in_thread(self._mount_by_options, self.home, f"{cache_id}/merged", options)
        finally:
            os.rmdir(merged)

    @staticmethod
    def _mount_by_options(home: str, target: str, options: str) -> int:
        """mount(2) with names relative to `home`, since its options must fit a page, and a detached copy of
        that."""
        unshare(CLONE_FS)
        os.chdir(home)
        mount("overlay", target, "overlay", 0, options)
        try:
            return open_tree(AT_FDCWD, target)
        finally:
            umount(target, MNT_DETACH)

    def metadata(self, cache_id: str) -> Optional[dict[str, str]]:
        path, data = self._path(cache_id), {}
        lowers = [os.path.realpath(os.path.join(self.home, lower)) for lower in self._lowers(cache_id)]
        if lowers:
            data["LowerDir"] = ":".join(lowers)
        return {**data, "MergedDir": f"{path}/merged", "UpperDir": f"{path}/diff", "WorkDir": f"{path}/work"}


class Btrfs(StorageDriver):
    """btrfs: a subvolume a layer, made as a snapshot of the one below."""

    name = "btrfs"
    unknown_option = "unknown option {}"

    def detect(self, directory: str) -> None:
        if statfs_type(directory) != BTRFS_SUPER_MAGIC:
            raise DriverNotSupported("prerequisites for driver not satisfied (wrong filesystem?)")

    def status(self) -> list[list[str]]:
        return [["Btrfs", ""]]

    def layers(self) -> str:
        return os.path.join(self.home, "subvolumes")

    def make(self, cache_id: str, parent: Optional[str]) -> None:
        if parent is None:
            self._ioctl(BTRFS_IOC_SUBVOL_CREATE, struct.pack("=q4088s", 0, cache_id.encode()))
        else:
            with opened(self._path(parent)) as source:
                # struct btrfs_ioctl_vol_args_v2: fd, transid, flags, 4 unused, name
                self._ioctl(BTRFS_IOC_SNAP_CREATE_V2, struct.pack("=q48x4040s", source, cache_id.encode()))
        if parent is None or self.idmap:
            make_directory(self._path(cache_id), 0o755, *self.idmap.root)

    def _ioctl(self, number: int, argument: bytes) -> None:
        with opened(self.layers()) as fd:
            fcntl.ioctl(fd, number, bytearray(argument))

    def destroy(self, path: str) -> None:
        """In one step where no other subvolume is in it, else file by file."""
        with contextlib.suppress(OSError):
            name = os.fsencode(os.path.basename(path))
            self._ioctl(BTRFS_IOC_SNAP_DESTROY, struct.pack("=q4088s", 0, name))
        remove_tree(path)


class Vfs(StorageDriver):
    """vfs: a directory a layer, a copy of the one below; blocks are shared where the file system can."""

    name = "vfs"

    def layers(self) -> str:
        return os.path.join(self.home, "dir")

    def make(self, cache_id: str, parent: Optional[str]) -> None:
        make_directory(self._path(cache_id), 0o755, *self.idmap.root)
        if parent is not None:
            copy_tree(self._path(parent), self._path(cache_id))

    def metadata(self, cache_id: str) -> Optional[dict[str, str]]:
        return {"SourceDir": self._path(cache_id)}


# Choosing one

DRIVERS: dict[str, type[StorageDriver]] = {driver.name: driver for driver in (Overlay, Btrfs, Vfs)}
REMOVED_DRIVERS = ("aufs", "devicemapper", "overlay")


def select_driver(root: str, name: str, options: list[str], idmap: IdMap) -> StorageDriver:
    """The storage driver `name`; for '' the one whose layers are there, else the first that the host can run.

    DockerError with Docker's text when it cannot be used, or when the layers of several are there."""
    try:
        driver = _select(root, name or os.environ.get("DOCKER_DRIVER", ""), options, idmap)
    except (DockerError, OSError) as error:
        raise DockerError(f"error initializing graphdriver: {error}") from error
    mend_what_is_safe(driver.leftovers())
    return driver


def _select(root: str, name: str, options: list[str], idmap: IdMap) -> StorageDriver:
    if name:
        return _configured(root, name, options, idmap)
    prior = [name for name in DRIVERS if name != "vfs" and _has_layers(os.path.join(root, name))]
    if prior:
        return _prior(root, prior, options, idmap)
    for name, driver in DRIVERS.items():
        try:
            return driver(root, options, idmap)
        except DriverNotSupported as error:
            log.info("[graphdriver] %s cannot be used: %s", name, error)
    raise DriverNotSupported("no supported storage driver found")


def existing_driver(root: str, name: str, idmap: IdMap) -> StorageDriver:
    """The storage driver `name`, or for '' the one whose images are there, only to look at what it has."""
    names = [name] if name else [name for name in DRIVERS if os.path.isdir(os.path.join(root, "image", name))]
    if len(names) != 1 or names[0] not in DRIVERS or not os.path.isdir(os.path.join(root, names[0])):
        raise DockerError(f"{root} has the images of {' and '.join(names) or 'no storage driver'}: name the "
                          "one to check by -s")
    return DRIVERS[names[0]](root, None, idmap)


def _has_layers(path: str) -> bool:
    try:
        return bool(os.listdir(path))
    except OSError:
        return False


def _configured(root: str, name: str, options: list[str], idmap: IdMap) -> StorageDriver:
    log.info("[graphdriver] trying configured driver: %s", name)
    if name in REMOVED_DRIVERS:
        raise DriverNotSupported(f"[graphdriver] ERROR: the {name} storage-driver has been deprecated and "
                                 "removed; visit https://docs.docker.com/go/storage-driver/ for more "
                                 "information")
    if name not in DRIVERS:
        raise DriverNotSupported(f"driver not supported: {name}; this daemon has {', '.join(DRIVERS)}")
    try:
        return DRIVERS[name](root, options, idmap)
    except DriverNotSupported as error:
        raise DriverNotSupported(f"driver not supported: {name} ({error})") from error


def _prior(root: str, prior: list[str], options: list[str], idmap: IdMap) -> StorageDriver:
    """Go on with the driver whose images are there: with another one they would seem lost."""
    try:
        driver = DRIVERS[prior[0]](root, options, idmap)
    except DockerError as error:
        log.error("[graphdriver] prior storage driver %s failed: %s", prior[0], error)
        raise
    if len(prior) > 1:
        raise DockerError(f"{root} contains several valid graphdrivers: {', '.join(prior)}; cleanup or "
                          "explicitly choose storage driver (-s <DRIVER>)")
    log.info("[graphdriver] using prior storage driver: %s", prior[0])
    return driver


# Copying trees

def copy_tree(source: str, target: str) -> None:
    """Copy all of the directory `source` into the directory `target`, which is empty: hard links, holes,
    devices, owners, xattrs and times too, sockets not.  Goes by descriptors and follows no link.  OSError."""
    with opened(source, SUBDIRECTORY) as read, opened(target, SUBDIRECTORY) as write:
        _copy_below(read, write, target, {})


def _copy_below(source: int, target: int, path: str, copied: dict[tuple[int, int], str]) -> None:
    """Copy what is in the open directory `source` into `target`, whose path is `path`, and its attributes."""
    for name in os.listdir(source):
        facts = os.stat(name, dir_fd=source, follow_symlinks=False)
        made = os.path.join(path, name)
        if stat.S_ISDIR(facts.st_mode):
            os.mkdir(name, 0o700, dir_fd=target)
            with opened(name, SUBDIRECTORY, dir_fd=source) as read:
                with opened(name, SUBDIRECTORY, dir_fd=target) as write:
                    _copy_below(read, write, made, copied)
        elif facts.st_nlink > 1 and (facts.st_dev, facts.st_ino) in copied:
            os.link(copied[facts.st_dev, facts.st_ino], name, dst_dir_fd=target, follow_symlinks=False)
        elif not stat.S_ISSOCK(facts.st_mode):
            copied[facts.st_dev, facts.st_ino] = made
            _copy_entry(source, target, name, facts)
    _copy_attributes(f"/proc/self/fd/{source}", f"/proc/self/fd/{target}", os.fstat(source), True)


def _copy_entry(source: int, target: int, name: str, facts: os.stat_result) -> None:
    """Copy one entry that is no directory between two open directories."""
    if stat.S_ISLNK(facts.st_mode):
        os.symlink(os.readlink(name, dir_fd=source), name, dir_fd=target)
    elif stat.S_ISREG(facts.st_mode):
        with opened(name, UNFOLLOWED, dir_fd=source) as read, opened(name, NEW_FILE, dir_fd=target) as write:
            copy_content(read, write, facts.st_size)
    else:
        os.mknod(name, stat.S_IFMT(facts.st_mode) | 0o600, facts.st_rdev, dir_fd=target)
    _copy_attributes(f"/proc/self/fd/{source}/{name}", f"/proc/self/fd/{target}/{name}", facts, False)


def _copy_attributes(source: str, target: str, facts: os.stat_result, follow: bool) -> None:
    """Owner, xattrs, mode and times, in the order in which none undoes another."""
    os.chown(target, facts.st_uid, facts.st_gid, follow_symlinks=follow)
    for key in os.listxattr(source, follow_symlinks=follow):
        os.setxattr(target, key, os.getxattr(source, key, follow_symlinks=follow), follow_symlinks=follow)
    if not stat.S_ISLNK(facts.st_mode):
        os.chmod(target, stat.S_IMODE(facts.st_mode))
    os.utime(target, ns=(facts.st_atime_ns, facts.st_mtime_ns), follow_symlinks=follow)


def copy_content(source: int, target: int, size: int) -> None:
    """Copy a file's `size` bytes between descriptors: its blocks shared where the file system can, else in
    the kernel, its holes kept; ioctl_ficlone(2), copy_file_range(2)."""
    try:
        fcntl.ioctl(target, FICLONE, source)
        return
    except OSError:
        os.ftruncate(target, size)
    at = 0
    while at < size:
        try:
            at = os.lseek(source, at, os.SEEK_DATA)
        except OSError:  # ENXIO: nothing but a hole is left
            return
        end = min(os.lseek(source, at, os.SEEK_HOLE), size)
        while at < end:
            done = _copy_range(source, target, at, end - at)
            if not done:
                return
            at += done


def _copy_range(source: int, target: int, at: int, size: int) -> int:
    try:
        return os.copy_file_range(source, target, size, at, at)
    except OSError as error:
        if error.errno not in (errno.EXDEV, errno.EINVAL, errno.EOPNOTSUPP, errno.ENOSYS):
            raise
        return os.pwrite(target, os.pread(source, min(size, CHUNK), at), at)


# ------------------------------------------------------------------------------------------------------------
# Images
#
# What the daemon knows of images: references (the grammar of the distribution project), content-addressed
# layers, image configurations, tags, and the image jobs.  Everything lies under image/<driver> as moby keeps
# it: layerdb, imagedb and repositories.json, so that a real dockerd finds our images and we find its.  A
# layer's diff id is the sha256 of its tar stream, its chain id covers its parents too, an image's id is the
# sha256 of its configuration (OCI image specification, config.md).  Whether a layer is still needed is
# computed from the tables, never stored.
#
# One lock guards the tables of all three stores and is never held across I/O; the writers of one store go one
# at a time through that store's writer lock.  The order is: writer of images, writer of layers, tables.
# ------------------------------------------------------------------------------------------------------------

HEX64 = re.compile(r"[0-9a-f]{64}\Z")
MAX_LAYERS = 125  # moby's: 127 is the most some drivers take, and a container adds two

_NAME_PART = r"[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*"
_HOST_PART = r"(?:[a-zA-Z0-9]|[a-zA-Z0-9][a-zA-Z0-9-]*[a-zA-Z0-9])"
_TAG = r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}"
_REFERENCE = re.compile(
    rf"((?:{_HOST_PART}(?:\.{_HOST_PART})*|\[[a-fA-F0-9:]+\])(?::[0-9]+)?)/({_NAME_PART}(?:/{_NAME_PART})*)"
    rf"(?::({_TAG}))?(?:@([A-Za-z][A-Za-z0-9]*(?:[-_+.][A-Za-z][A-Za-z0-9]*)*:[0-9a-fA-F]{{32,}}))?\Z")
_DIGEST_LENGTHS = {"sha256": 64, "sha384": 96, "sha512": 128}
_GO_JSON = {"\\b": "\\u0008", "\\f": "\\u000c", "<": "\\u003c", ">": "\\u003e", "&": "\\u0026",
            "\u2028": "\\u2028", "\u2029": "\\u2029"}
_GO_DIFFERS = re.compile("\\\\\\\\|\\\\b|\\\\f|[<>&\u2028\u2029]")


def docker_json(value: Any, sort: bool = False) -> bytes:
    """`value` as Go's encoding/json writes it, byte for byte, so that ids computed over it are Docker's too.

    Dictionaries keep their order (a Go struct) unless `sort` (a Go map).  Text that is no UTF-8 becomes
    U+FFFD."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"), sort_keys=sort)
    text = _GO_DIFFERS.sub(lambda match: _GO_JSON.get(match[0], match[0]), text)
    return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def parse_filters(value: Any, accepted: Optional[Iterable[str]] = None) -> dict[str, list[str]]:
    """The API's `filters`, {name: {value: true}} or the old {name: [value]}, as {name: [value, ...]}.

    `value` is JSON text or the decoded object.  BadParameter when it is no such object, or names one that is
    not in `accepted`."""
    try:
        filters = json.loads(value or "{}") if isinstance(value, (str, bytes)) else value or {}
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"invalid filter: {error}") from None
    if not isinstance(filters, dict):
        raise BadParameter("invalid filter")
    for name, values in filters.items():
        if not isinstance(values, (list, dict)) or (accepted is not None and name not in accepted):
            raise BadParameter(f"invalid filter '{name}'")
    return {name: [str(text) for text in values] for name, values in filters.items()}


def until_filter(filters: dict[str, list[str]]) -> int:
    """What the filter `until` of a prune allows at most as the time of making, in nanoseconds since 1970."""
    texts = filters.get("until") or []
    if len(texts) > 1:
        raise BadParameter("more than one until filter specified")
    try:
        return parse_timestamp(texts[0]) if texts else 1 << 63
    except BadParameter:
        raise BadParameter(f"failed to parse value as time or duration: {go_quote(texts[0])}") from None


def matches_labels(wanted: Iterable[str], labels: Optional[dict[str, str]]) -> bool:
    """Whether `labels` has every KEY or KEY=VALUE of `wanted`."""
    known = labels or {}
    pairs = (item.partition("=") for item in wanted)
    return all(key in known and (not equals or known[key] == value) for key, equals, value in pairs)


def compile_pattern(pattern: str) -> re.Pattern[str]:
    """A shell pattern of Go's path.Match (`*` and `?` do not match a slash) as an expression for fullmatch().

    BadParameter("syntax error in pattern") where Go says so.  What stands between two stars is taken where it
    is found first, for good: no pattern makes the daemon try every split of a name."""
    parts, rest = [""], pattern
    while rest:
        part = re.match(r"\*|\?|\\(.)|\[(\^?)((?:\\.|[^\\\]])+)\]|[^\\\[]", rest, re.DOTALL)
        if part is None:
            raise BadParameter("syntax error in pattern")
        if part[3]:
            members = re.sub(r"\\(.)|([\[&~|^])", lambda match: re.escape(match[1] or match[2]), part[3])
            parts[-1] += f"[{part[2]}{members}]"
        elif part[0] == "*":
            parts.append("")
        else:
            parts[-1] += "[^/]" if part[0] == "?" else re.escape(part[1] or part[0])
        rest = rest[part.end():]
    between = "".join(f"(?=(?P<p{number}>[^/]*?{text}))(?P=p{number})"
                      for number, text in enumerate(parts[1:-1]))
    try:
        return re.compile("[^/]*".join([parts[0] + between, *parts[1:][-1:]]), re.DOTALL)
    except re.error:
        raise BadParameter("syntax error in pattern") from None


# References


class Reference(NamedTuple):
    """The name of an image: `domain` (docker.io), `path` (library/busybox), and a `tag` and a `digest`, or
    ''."""

    domain: str
    path: str
    tag: str = ""
    digest: str = ""

    @property
    def name(self) -> str:
        """The full name of the repository."""
        return f"{self.domain}/{self.path}"

    @property
    def familiar_name(self) -> str:
        """The repository's name as users write it: without docker.io and library."""
        if self.domain != "docker.io":
            return self.name
        first, _, rest = self.path.partition("/")
        return rest if first == "library" and "/" not in rest else self.path

    @property
    def suffix(self) -> str:
        """The tag and the digest with their separators."""
        return (f":{self.tag}" if self.tag else "") + (f"@{self.digest}" if self.digest else "")

    @property
    def familiar(self) -> str:
        """The reference as users write it."""
        return self.familiar_name + self.suffix

    def __str__(self) -> str:
        return self.name + self.suffix

    def with_default_tag(self) -> Reference:
        """The same with the tag latest, where it has neither tag nor digest."""
        return self if self.tag or self.digest else self._replace(tag="latest")

    def with_tag(self, tag: str) -> Reference:
        """The same with another tag; BadParameter when `tag` is none."""
        if not re.fullmatch(_TAG, tag):
            raise BadParameter("invalid tag format")
        return self._replace(tag=tag)

    def stored(self) -> Reference:
        """The form that repositories.json knows: a digest wins over a tag, the default tag is written out."""
        return self._replace(tag="") if self.digest else self.with_default_tag()


def parse_digest(text: str) -> str:
    """`text` when it is a digest (algorithm:hex); BadParameter otherwise."""
    algorithm, _, value = text.partition(":")
    if not re.fullmatch(r"[0-9a-f]{32,}", value) or not algorithm:
        raise BadParameter("invalid checksum digest format")
    if algorithm not in _DIGEST_LENGTHS:
        raise BadParameter("unsupported digest algorithm")
    if len(value) != _DIGEST_LENGTHS[algorithm]:
        raise BadParameter("invalid checksum digest length")
    return text


def parse_reference(text: str) -> Reference:
    """The reference that a user wrote, made complete with docker.io and library (distribution's
    ParseNormalizedNamed); BadParameter with Docker's text when it is none."""
    if HEX64.match(text):
        raise BadParameter(f"invalid repository name ({text}), cannot specify 64-byte hexadecimal strings")
    domain, slash, remainder = text.partition("/")
    if not slash or not (re.search("[.:A-Z]", domain) or domain == "localhost"):
        domain, remainder = "docker.io", text
    if domain == "index.docker.io":
        domain = "docker.io"
    if domain == "docker.io" and "/" not in remainder:
        remainder = "library/" + remainder
    if re.search("[A-Z]", remainder.partition(":")[0].partition("@")[0]):
        raise BadParameter("invalid reference format: repository name must be lowercase")
    match = _REFERENCE.match(f"{domain}/{remainder}")
    if match is None:
        raise BadParameter("invalid reference format")
    if len(match[2]) > 255:
        raise BadParameter("repository name must not be more than 255 characters")
    return Reference(match[1], match[2], match[3] or "", parse_digest(match[4]) if match[4] else "")


def parse_repo_tag(repo: str, tag: str) -> Optional[Reference]:
    """The reference that the parameters `repo` and `tag` of import, tag and commit name; None without `repo`.

    BadParameter when they are malformed or name a digest."""
    if not repo:
        return None
    reference = parse_reference(repo)
    if reference.digest:
        raise BadParameter("cannot import digest reference")
    if reference.familiar_name == "sha256":
        raise BadParameter("refusing to create an ambiguous tag using digest algorithm as name")
    return reference.with_tag(tag) if tag else reference.with_default_tag()


# Platforms

_ARCHITECTURES = {"x86_64": "amd64", "x86-64": "amd64", "aarch64": "arm64", "i386": "386", "i486": "386",
                  "i686": "386", "armhf": "arm", "armel": "arm"}
_KNOWN_ARCHITECTURES = frozenset(
    "386 amd64 arm arm64 loong64 mips mips64 mips64le mipsle ppc64 ppc64le riscv64 s390x wasm".split())
_KNOWN_SYSTEMS = frozenset("aix android darwin dragonfly freebsd illumos ios js linux netbsd openbsd plan9 "
                           "solaris wasip1 windows".split())
_PLATFORM_KEYS = ("os", "architecture", "variant")


class Platform(NamedTuple):
    """What an image runs on, in Go's words: linux, arm64, v8."""

    os: str
    architecture: str
    variant: str = ""

    def __str__(self) -> str:
        return "/".join(filter(None, self))


def host_platform() -> Platform:
    """The platform of this machine."""
    machine = os.uname().machine
    return Platform("linux", _ARCHITECTURES.get(machine, machine))


def parse_platform(text: str) -> Platform:
    """OS, ARCH, OS/ARCH or OS/ARCH/VARIANT; BadParameter when it is none of these."""
    parts = text.lower().split("/")
    if not all(re.fullmatch("[a-z0-9_.-]+", part) for part in parts) or len(parts) > 3:
        raise BadParameter(f"{go_quote(text)} is an invalid platform specifier: invalid argument")
    if len(parts) == 1:
        if parts[0] in _KNOWN_SYSTEMS:
            return host_platform()._replace(os=parts[0])
        parts = ["linux", *parts]
        if _ARCHITECTURES.get(parts[1], parts[1]) not in _KNOWN_ARCHITECTURES:
            raise BadParameter(f"{go_quote(text)}: unknown operating system or architecture: "
                               "invalid argument")
    architecture = _ARCHITECTURES.get(parts[1], parts[1])
    variant = parts[2] if len(parts) == 3 else {"arm": "v7"}.get(architecture, "")
    return Platform(parts[0], architecture, "" if (architecture, variant) == ("arm64", "v8") else variant)


# Configurations

# The fields of Docker's container.Config in the order in which Go writes them; those without a value for
# "absent" are left out when empty.
_OMITTED = object()
_CONFIG_FIELDS: dict[str, Any] = {
    "Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False,
    "AttachStderr": False, "ExposedPorts": _OMITTED, "Tty": False, "OpenStdin": False, "StdinOnce": False,
    "Env": None, "Cmd": None, "Healthcheck": _OMITTED, "ArgsEscaped": _OMITTED, "Image": "", "Volumes": None,
    "WorkingDir": "", "Entrypoint": None, "NetworkDisabled": _OMITTED, "MacAddress": _OMITTED,
    "OnBuild": None, "Labels": None, "StopSignal": _OMITTED, "StopTimeout": _OMITTED, "Shell": _OMITTED,
}
_IMAGE_CONFIG_FIELDS = {name: _CONFIG_FIELDS[name] for name in (
    "User ExposedPorts Env Entrypoint Cmd Volumes WorkingDir Labels StopSignal ArgsEscaped Healthcheck "
    "OnBuild Shell").split()}


def _fill(values: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
    full = {name: values.get(name, default) for name, default in fields.items()
            if default is not _OMITTED or values.get(name)}
    for name in ("ExposedPorts", "Volumes", "Labels"):
        if full.get(name):
            full[name] = dict(sorted(full[name].items()))
    return full


def full_config(values: dict[str, Any]) -> dict[str, Any]:
    """A container.Config with every field that Docker always writes, in Go's order; others of `values` are
    dropped."""
    return _fill(values, _CONFIG_FIELDS)


# Dockerfile instructions, as far as `changes` of import and commit go


class DockerfileLine(NamedTuple):
    """One instruction: its line number, name in lower case, flags (--x=y), arguments, and the line as
    written."""

    number: int
    instruction: str
    flags: list[str]
    rest: str
    original: str


def parse_dockerfile(text: str) -> tuple[list[DockerfileLine], str]:
    """The instructions of a Dockerfile, and its escape character; BadParameter when there is none at all.

    Comments are dropped, continued lines joined, the `escape` directive obeyed."""
    escape, lines, pending, start, directives = "\\", [], "", 0, True
    for number, line in enumerate(text.lstrip("\ufeff").split("\n"), 1):
        directive = re.match(r"#\s*(escape|syntax|check)\s*=\s*(.+?)\s*$", line.lstrip(), re.IGNORECASE)
        directives = directives and directive is not None
        if directives and directive and directive[1].lower() == "escape":
            escape = directive[2]
            if escape not in ("\\", "`"):
                raise BadParameter(f"invalid escape token '{escape}' does not match ` or \\")
        if line.lstrip().startswith("#") or not line.strip():
            continue
        start = start or number
        joined = re.sub(rf"(^|[^{re.escape(escape)}]){re.escape(escape)}[ \t\r]*$", r"\1", line)
        pending += joined if pending else joined.lstrip()
        if joined == line:
            lines.append(_split_instruction(pending, start))
            pending, start = "", 0
    if pending.strip():
        lines.append(_split_instruction(pending, start))
    if not lines:
        raise BadParameter("file with no instructions")
    return lines, escape


def _split_instruction(line: str, number: int) -> DockerfileLine:
    name, _, rest = re.sub(r"[\t\v\f\r ]+", " ", line.strip(), count=1).partition(" ")
    rest, flags = rest.strip(), []
    while rest.startswith("--"):
        flag = re.match(r"""(?:\\.|"(?:\\.|[^"\\])*"|'[^']*'|[^\s\\"'])*\S*""", rest)
        assert flag is not None
        rest = rest[flag.end():].lstrip()
        if flag[0] == "--":
            break
        flags.append(re.sub(r"""\\(.)|["']""", lambda match: match[1] or "", flag[0]))
    return DockerfileLine(number, name.lower(), flags, rest, line.strip())


def split_words(text: str, escape: str) -> list[str]:
    """The words of an instruction, separated by blanks; quotes and escapes hold a word together and stay in
    it."""
    mark = re.escape(escape)
    quoted = rf"""'[^']*(?:'|$)|"(?:{mark}.|[^"{mark}])*(?:"|{mark}?$)"""
    return re.findall(rf"""(?s:{mark}.|{quoted}|[^\s"'{mark}])+""", text)


def json_words(text: str) -> Optional[list[str]]:
    """The strings of the JSON array that `text` begins with (the exec form); None when there is no array.

    BadParameter for an array of anything else."""
    if not text.startswith("["):
        return None
    try:
        words, _ = json.JSONDecoder().raw_decode(text)
    except ValueError:
        return None
    if not all(isinstance(word, str) for word in words):
        raise BadParameter("when using JSON array syntax, arrays must be comprised of strings only")
    return words


class ShellWord:
    """Quotes and $variables of a Dockerfile's word, as Docker's shell lexer treats them.

    `environment` is a list of NAME=VALUE.  BadParameter names the word and what is wrong with it."""

    _UNCLOSED = {"'": "unexpected end of statement while looking for matching single-quote",
                 '"': "unexpected end of statement while looking for matching double-quote",
                 "}": "syntax error: missing '}'"}

    def __init__(self, text: str, environment: list[str], escape: str) -> None:
        self.text, self.escape, self.at = text, escape, 0
        self.environment = dict(item.partition("=")[::2] for item in environment)
        try:
            self._parsed = self._pieces("")
        except BadParameter as error:
            raise BadParameter(f"failed to process {go_quote(text)}: {error}") from None

    def expand(self) -> str:
        """The word with its quotes removed and its variables replaced."""
        return "".join(text for text, _ in self._parsed)

    def split(self) -> list[str]:
        """The words that result when blanks outside of quotes separate, those in variables' values too."""
        words = [""]
        for text, splits in self._parsed:
            first, *rest = re.split(r"\s+", text) if splits else [text]
            words[-1] += first
            words += rest
        return list(filter(None, words))

    def _next(self) -> str:
        character = self.text[self.at:self.at + 1]
        self.at += 1
        return character

    def _peek(self) -> str:
        return self.text[self.at:self.at + 1]

    def _pieces(self, stop: str) -> list[tuple[str, bool]]:
        """What stands before `stop` ('' is the end), as pieces and whether blanks in them separate words.

        Between double quotes only $ and some escapes are special, between single ones nothing is."""
        pieces: list[tuple[str, bool]] = []
        while self._peek():
            character = self._next()
            if character == stop:
                return pieces
            if stop == "'":
                pieces.append((character, False))
            elif character == "$":
                pieces.append((self._dollar(), True))
            elif character == self.escape and (stop != '"' or self._peek() in ("", '"', "$", self.escape)):
                pieces.append((self._next(), False))
            elif character in ("'", '"') and stop != '"':
                pieces.append((self._text(character), False))
            else:
                pieces.append((character, True))
        if stop:
            raise BadParameter(self._UNCLOSED[stop])
        return pieces

    def _text(self, stop: str) -> str:
        return "".join(text for text, _ in self._pieces(stop))

    def _name(self) -> str:
        match = re.compile(r"[0-9]+|[@*#?\-$!]|\w+").match(self.text, self.at)
        self.at = match.end() if match else self.at
        return match[0] if match else ""

    def _dollar(self) -> str:
        if self._peek() != "{":
            name = self._name()
            return self.environment.get(name, "") if name else "$"
        self.at += 1
        if self._peek() in ("", "{", "}", ":"):
            raise BadParameter("syntax error: " + ("bad substitution" if self._peek() else "missing '}'"))
        name, separator = self._name(), self._next()
        if separator == "}":
            return self.environment.get(name, "")
        if separator not in (":", "?"):
            raise BadParameter("missing ':' in substitution")
        modifier = self._next() if separator == ":" else "?"
        return self._modified(name, modifier, self._text("}"), empty_counts=separator == ":")

    def _modified(self, name: str, modifier: str, word: str, empty_counts: bool) -> str:
        """${name:+word}, ${name:-word}, ${name:?word} and ${name?word}."""
        value = self.environment.get(name)
        if modifier == "+":
            return word if value else ""
        if modifier == "-":
            return value or word
        if modifier != "?":
            raise BadParameter(f"unsupported modifier ({modifier}) in substitution")
        if value is None or (empty_counts and not value):
            problem = "is not allowed to be " + ("unset" if value is None else "empty")
            raise BadParameter(f"{name}: {word or problem}")
        return value


def parse_ports(specification: str) -> list[str]:
    """The container ports of [[ADDRESS:]HOST:]PORT[-PORT][/PROTOCOL] as PORT/PROTOCOL; BadParameter with
    Docker's text."""
    ports, _, protocol = specification.rpartition(":")[2].partition("/")
    if not ports:
        raise BadParameter(f"No port specified: {specification}<empty>")
    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", ports)
    first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
    if not first <= last <= 65535:
        raise BadParameter(f"Invalid containerPort: {ports}")
    if (protocol.lower() or "tcp") not in ("tcp", "udp", "sctp"):
        raise BadParameter(f"Invalid proto: {protocol}")
    return [f"{port}/{protocol.lower() or 'tcp'}" for port in range(first, last + 1)]


_BLANKS = r"[\t\v\f\r ]+"


def required(line: DockerfileLine, arguments: Any, count: str = "at least one") -> Any:
    """`arguments`, which the instruction must have; BadParameter where there are none."""
    if not arguments:
        raise BadParameter(f"{line.instruction.upper()} requires {count} argument")
    return arguments


class Instructions:
    """Applies the instructions that change nothing but an image's configuration; the builder adds the others.

    `config` is changed in place.  Every method takes a DockerfileLine and raises BadParameter with Docker's
    text."""

    def __init__(self, config: dict[str, Any], escape: str = "\\") -> None:
        self.config, self.escape = config, escape
        self._command_set = False

    def apply(self, line: DockerfileLine) -> None:
        """Carry `line` out."""
        if line.flags and line.instruction != "healthcheck":
            raise BadParameter("Unknown flag: " + line.flags[0][2:].partition("=")[0])
        getattr(self, "do_" + line.instruction)(line)

    def expand(self, word: str) -> str:
        """`word` with its variables replaced from the ENV that stands so far."""
        return ShellWord(word, self.config.get("Env") or [], self.escape).expand()

    def words(self, line: DockerfileLine) -> list[str]:
        """The arguments, of which there must be some, in exec form or separated by blanks."""
        words = json_words(line.rest)
        return required(line, re.split(_BLANKS, line.rest) if words is None and line.rest else words)

    def one(self, line: DockerfileLine) -> str:
        """The single argument, expanded."""
        return self.expand(required(line, line.rest, "exactly one"))

    def pairs(self, line: DockerfileLine) -> list[tuple[str, str]]:
        """The pairs of NAME=VALUE ..., or of the old form NAME VALUE."""
        name, words = line.instruction.upper(), required(line, split_words(line.rest, self.escape))
        if "=" not in words[0]:
            words = ["=".join(re.split(_BLANKS, line.rest, maxsplit=1))]
            if "=" not in words[0]:
                raise BadParameter(f"{name} must have two arguments")
        for word in words:
            if "=" not in word:
                raise BadParameter(f"Syntax error - can't find = in {go_quote(word)}. "
                                   "Must be of the form: name=value")
            if word.startswith("="):
                raise BadParameter(f"{name} names can not be blank")
        return [(self.expand(word.partition("=")[0]), self.expand(word.partition("=")[2])) for word in words]

    def command(self, line: DockerfileLine) -> list[str]:
        """The command of CMD, ENTRYPOINT and RUN: the exec form, or the text as an argument of the shell."""
        words = json_words(line.rest)
        if words is not None:
            return words
        return (self.config.get("Shell") or ["/bin/sh", "-c"]) + ([line.rest] if line.rest else [])

    def do_cmd(self, line: DockerfileLine) -> None:
        self.config["Cmd"] = self.command(line)
        self._command_set = self._command_set or json_words(line.rest) != [] and bool(line.rest)

    def do_entrypoint(self, line: DockerfileLine) -> None:
        self.config["Entrypoint"] = (self.command(line) if line.rest else None) or None
        if not self._command_set:
            self.config["Cmd"] = None

    def do_env(self, line: DockerfileLine) -> None:
        environment = {item.partition("=")[0]: item for item in self.config.get("Env") or []}
        environment.update((name, f"{name}={value}") for name, value in self.pairs(line))
        self.config["Env"] = list(environment.values())

    def do_label(self, line: DockerfileLine) -> None:
        self.config["Labels"] = {**(self.config.get("Labels") or {}), **dict(self.pairs(line))}

    def do_expose(self, line: DockerfileLine) -> None:
        ports: dict[str, Any] = dict(self.config.get("ExposedPorts") or {})
        for word in re.split(_BLANKS, required(line, line.rest)):
            for specification in ShellWord(word, self.config.get("Env") or [], self.escape).split():
                ports.update((port, {}) for port in parse_ports(specification))
        self.config["ExposedPorts"] = ports

    def do_user(self, line: DockerfileLine) -> None:
        self.config["User"] = self.one(line)

    def do_workdir(self, line: DockerfileLine) -> None:
        directory = self.one(line)
        if not directory:
            raise BadParameter("cannot normalize nothing")
        if not directory.startswith("/"):
            joined = os.path.normpath(os.path.join("/", self.config.get("WorkingDir") or "", directory))
            directory = "/" + joined.lstrip("/")
        self.config["WorkingDir"] = directory

    def do_volume(self, line: DockerfileLine) -> None:
        volumes = [self.expand(word.strip()) for word in self.words(line)]
        if not all(volumes):
            raise BadParameter("VOLUME specified can not be an empty string")
        self.config["Volumes"] = {**(self.config.get("Volumes") or {}), **{volume: {} for volume in volumes}}

    def do_stopsignal(self, line: DockerfileLine) -> None:
        name = self.one(line)
        parse_signal(name)
        self.config["StopSignal"] = name

    def do_shell(self, line: DockerfileLine) -> None:
        words = json_words(line.rest)
        if words is None and line.rest:
            raise BadParameter(f"SHELL requires the arguments to be in JSON form: {line.original}")
        self.config["Shell"] = required(line, words)

    def do_onbuild(self, line: DockerfileLine) -> None:
        trigger = _split_instruction(required(line, line.rest), line.number)
        name = trigger.instruction.upper()
        if name == "ONBUILD":
            raise BadParameter("Chaining ONBUILD via `ONBUILD ONBUILD` isn't allowed")
        if name in ("MAINTAINER", "FROM"):
            raise BadParameter(f"{name} isn't allowed as an ONBUILD trigger")
        if name in ("ENV", "LABEL"):
            self.pairs(trigger)  # their syntax is checked where they are written
        self.config["OnBuild"] = (self.config.get("OnBuild") or []) + [line.rest]

    def do_healthcheck(self, line: DockerfileLine) -> None:
        kind, _, rest = re.sub(r"\s+", " ", required(line, line.rest), count=1).partition(" ")
        if kind.upper() == "NONE":
            if rest:
                raise BadParameter("HEALTHCHECK NONE takes no arguments")
            self.config["Healthcheck"] = {"Test": ["NONE"]}
            return
        options = self._health_options(line.flags)
        if kind.upper() != "CMD":
            raise BadParameter(f"Unknown type {go_quote(kind.upper())} in HEALTHCHECK (try CMD)")
        words = json_words(rest)
        test = ["CMD", *words] if words is not None else ["CMD-SHELL", rest]
        if not rest or words == []:
            raise BadParameter("Missing command after HEALTHCHECK CMD")
        self.config["Healthcheck"] = {"Test": test, **options}

    _HEALTH_OPTIONS = {"interval": "Interval", "timeout": "Timeout", "start-period": "StartPeriod",
                       "start-interval": "StartInterval", "retries": "Retries"}

    def _health_options(self, flags: list[str]) -> dict[str, int]:
        texts: dict[str, str] = {}
        for flag in flags:
            name, equals, value = flag[2:].partition("=")
            if name not in self._HEALTH_OPTIONS:
                raise BadParameter(f"Unknown flag: {name}")
            if name in texts:
                raise BadParameter(f"Duplicate flag specified: {name}")
            if not equals:
                raise BadParameter(f"Missing a value on flag: {name}")
            texts[name] = value
        return {key: self._health_option(name, texts[name])
                for name, key in self._HEALTH_OPTIONS.items() if texts.get(name)}

    @staticmethod
    def _health_option(name: str, text: str) -> int:
        if name == "retries":
            if not re.fullmatch("[+-]?[0-9]+", text):
                raise BadParameter(f"strconv.ParseInt: parsing {go_quote(text)}: invalid syntax")
            if int(text) < 1:
                raise BadParameter(f"--retries must be at least 1 (not {int(text)})")
            return int(text)
        duration = round(parse_duration(text) * 1e9)
        if duration < 10**6:
            raise BadParameter(f'Interval "{name}" cannot be less than 1ms')
        return duration


CHANGE_INSTRUCTIONS = frozenset(
    "cmd entrypoint healthcheck env expose label onbuild stopsignal user volume workdir".split())


def apply_changes(config: dict[str, Any], changes: list[str]) -> dict[str, Any]:
    """`config` after the Dockerfile instructions `changes` of import and commit; the given one stays as it
    is.

    BadParameter with Docker's text when one of them is not allowed there or is malformed."""
    config = copy.deepcopy(config)
    if not changes:
        return config
    lines, escape = parse_dockerfile("\n".join(changes))
    for line in lines:
        if line.instruction not in CHANGE_INSTRUCTIONS:
            raise BadParameter(f"{line.instruction} is not a valid change command")
    instructions = Instructions(config, escape)
    for line in lines:
        instructions.apply(line)
    return config


# Stores


class HashingReader:
    """Reads `stream` and computes the digest of what has been read."""

    def __init__(self, stream: Any) -> None:
        self.stream, self._hash = stream, hashlib.sha256()

    def read(self, size: int = 65536) -> bytes:
        """At most `size` bytes; b"" at the end."""
        data = self.stream.read(size)
        self._hash.update(data)
        return data

    @property
    def digest(self) -> str:
        """The digest of what has been read."""
        return "sha256:" + self._hash.hexdigest()


class Layer(NamedTuple):
    """A read-only layer: its chain id, diff id, the chain id of its parent or '', the driver's name for it,
    and the bytes of its own files."""

    chain_id: str
    diff_id: str
    parent: str
    cache_id: str
    size: int


class ReadWriteLayer(NamedTuple):
    """A container's writable layer: the driver's names of it and of its init layer, the chain id below or
    ''."""

    mount_id: str
    init_id: str
    parent: str


def chain_id(parent: str, diff_id: str) -> str:
    """The chain id of the layer `diff_id` on top of the chain `parent`, which may be ''."""
    return "sha256:" + hashlib.sha256(f"{parent} {diff_id}".encode()).hexdigest() if parent else diff_id


def chain_ids(diff_ids: Iterable[str]) -> list[str]:
    """The chain ids of a root file system, from the bottom."""
    return list(itertools.accumulate(diff_ids, chain_id))


def read_facts(directory: str, names: Iterable[str]) -> Iterator[str]:
    """The texts of the small files of a record, in the order of their `names`; "" for one that cannot be
    read."""
    for name in names:
        try:
            yield read_state(os.path.join(directory, name.replace("_", "-"))).decode().strip()
        except OSError:
            yield ""


def write_facts(directory: str, **facts: str) -> None:
    """Write a record's small files in the order given, without those that are empty; they are synced in the
    background."""
    for name, text in facts.items():
        if text:
            write_state(os.path.join(directory, name.replace("_", "-")), text.encode(), durable=False)


class LayerStore:
    """layerdb: the read-only layers and the containers' writable ones.

    A layer is unpacked under a transaction and found by others from then on; the transaction's directory in
    layerdb/tmp tells the next start what a crash left.  It is kept while an image, a container, a layer above
    or a transaction needs it.  `retained(chain_id)` says whether an image does; the image store sets it."""

    def __init__(self, root: str, driver: Any, idmap: Any, tables: threading.RLock) -> None:
        self.driver, self.idmap, self._tables = driver, idmap, tables
        self._writer = threading.Lock()
        self.retained: Callable[[str], bool] = lambda chain: False
        self.held: collections.Counter[str] = collections.Counter()
        self._directory, self._mounts_directory, self.tmp = (
            os.path.join(root, "layerdb", name) for name in ("sha256", "mounts", "tmp"))
        for path in (self._directory, self._mounts_directory, self.tmp):
            os.makedirs(path, 0o700, exist_ok=True)
        self.retired = {f"sha256:{name[:64]}" for name in os.listdir(self._directory)
                        if name.endswith("-removing")}  # the chain ids of what an interrupted removal left
        self.damages: list[Damage] = []
        self._layers = self._load_layers()
        self._mounts = self._load_mounts()

    # What is on disk

    def _load_layers(self) -> dict[str, Layer]:
        found = {}
        for name in filter(HEX64.match, os.listdir(self._directory)):
            try:
                layer = self._read_layer("sha256:" + name)
            except ValueError as error:
                self._ignore(name, str(error))
                continue
            found[layer.chain_id] = layer
        for chain in list(found):  # a layer whose parents are not all there is of no use
            below = chain
            while below in found and found[below].parent:
                below = found[below].parent
            if below not in found:
                self._ignore(chain[7:], f"the layer {below} below it is missing")
                del found[chain]
        return found

    def _ignore(self, name: str, reason: str) -> None:
        self.damages.append(Damage(f"ignoring the layer {name}: {reason}",
                                   functools.partial(self._discard, name)))

    def _read_layer(self, chain: str) -> Layer:
        """The record of one layer; ValueError when it is not whole or contradicts itself."""
        names = ("diff", "parent", "cache-id", "size")
        diff_id, parent, cache_id, size = read_facts(self._path(chain), names)
        if chain_id(parent, diff_id) != chain or not HEX64.match(cache_id) or not size.isdecimal():
            raise ValueError("its record is damaged")
        layer = Layer(chain, diff_id, parent, cache_id, int(size))
        if not self.driver.exists(layer.cache_id):
            raise ValueError(f"the driver has lost its directory {layer.cache_id}")
        return layer

    def _load_mounts(self) -> dict[str, ReadWriteLayer]:
        found = {}
        for container in os.listdir(self._mounts_directory):
            directory = os.path.join(self._mounts_directory, container)
            mount = ReadWriteLayer(*read_facts(directory, ReadWriteLayer._fields))
            if re.fullmatch("[0-9a-f]{64}(-init)?", mount.mount_id):
                found[container] = mount
            else:  # the mount id is written last, and only then the driver is asked for anything
                unmade = not os.path.lexists(os.path.join(directory, "mount-id"))  # else it cannot be read
                what = "was never finished" if unmade else "is not readable"
                self.damages.append(Damage(f"{directory} {what}", functools.partial(remove_tree, directory),
                                           unmade))
        return found

    def _path(self, chain: str) -> str:
        return os.path.join(self._directory, chain.partition(":")[2])

    def leftovers(self) -> list[Damage]:
        """What a crash left half-made.  Ask when the images are loaded, before anything else runs.

        Only what our records or moby's call unfinished: BuildKit keeps layers of its own beside these."""
        imports = [Damage(f"an interrupted import left {os.path.join(self.tmp, name)}",
                          functools.partial(self._undo, name), True) for name in os.listdir(self.tmp)]
        removals = [Damage(f"the removal of the layer {name[:64]} was interrupted",
                           functools.partial(self._discard, name), True)
                    for name in os.listdir(self._directory) if name.endswith("-removing")]
        return imports + removals + self.driver.leftovers()

    def _used(self) -> set[str]:
        return {layer.cache_id for layer in self._layers.values()}

    def _undo(self, name: str) -> None:
        """Remove the layers of an interrupted transaction that are in no image."""
        directory = os.path.join(self.tmp, name)
        entries = os.listdir(directory) if os.path.isdir(directory) else []
        entries += read_facts(directory, ["cache-id"])  # which moby writes
        for cache_id in filter(HEX64.match, set(entries) - self._used()):
            self.driver.remove(cache_id)
        for entry in entries:
            if entry.endswith("-published"):
                self.collect("sha256:" + entry[:64])
        remove_tree(directory)

    def _discard(self, name: str) -> None:
        self._erase(os.path.join(self._directory, name), self._used())

    def mismatches(self) -> Iterator[Damage]:
        """What only a check looks for: directories that no record names, files that have become shorter."""
        used = self._used() | {name for mount in self._mounts.values() for name in mount}
        for cache_id in sorted(set(self.driver.ids()) - used):
            yield Damage(f"no record names the layer directory {cache_id}",
                         functools.partial(self.driver.remove, cache_id))
        for layer in list(self._layers.values()) if self.driver.whiteouts == "overlay" else ():
            files = confined(self.driver.diff_dir(layer.cache_id), _file_sizes)
            missing = layer.size - sum(size for _, size, _ in files)
            if missing > 0:
                yield Damage(f"the layer {layer.chain_id} has lost {missing} bytes of its files: remove its "
                             "images and pull or import them again")
        for container, mount in list(self._mounts.items()):
            if not self.driver.exists(mount.mount_id):
                yield Damage(f"the writable layer of the container {container} is missing",
                             functools.partial(self.remove_rw, container))

    # Read-only layers

    def has(self, chain: str) -> bool:
        """Whether there is a layer of this chain id."""
        return chain in self._layers

    def get(self, chain: str) -> Layer:
        """The layer of this chain id; DockerError when it does not exist."""
        layer = self._layers.get(chain)
        if layer is None:
            raise DockerError(f"layer does not exist: {chain}")
        return layer

    def lineage(self, chain: str) -> list[Layer]:
        """The layers of a chain from the top; [] for ''."""
        layers = []
        with self._tables:
            while chain:
                layers.append(self.get(chain))
                chain = layers[-1].parent
        return layers

    def size(self, chain: str) -> int:
        """The bytes of all layers of a chain together."""
        return sum(layer.size for layer in self.lineage(chain))

    def metadata(self, chain: str) -> Optional[dict[str, str]]:
        """What the driver tells of a chain's top layer."""
        return self.driver.metadata(self.get(chain).cache_id) if chain else None

    def transaction(self) -> contextlib.closing[LayerTransaction]:
        """A block in which layers are made; those that no image names at its end are removed again."""
        return contextlib.closing(LayerTransaction(self))

    def publish(self, layer: Layer, record: str) -> Layer:
        """Let `layer`, whose record stands in the directory `record`, be found, and hold it.

        Where another was faster with the same chain id, that one is held and returned."""
        with self._writer:
            with self._tables:
                known = self._layers.get(layer.chain_id)
                self.held[layer.chain_id] += 1
            if known is not None:
                return known
            try:
                if os.path.exists(self._path(layer.chain_id)):  # damaged, and ignored at the start
                    self._rename_away(layer.chain_id)
                failpoint("layer-publish")
                os.rename(record, self._path(layer.chain_id))
            except BaseException:
                self.release(layer.chain_id)
                raise
            with self._tables:
                self._layers[layer.chain_id] = layer
            return layer

    def hold(self, chain: str) -> Layer:
        """Keep a layer and those below it until release(); DockerError when it does not exist."""
        with self._tables:
            layer = self.get(chain)
            self.held[chain] += 1
            return layer

    def release(self, chain: str) -> None:
        """Undo one hold()."""
        with self._tables:
            self.held[chain] -= 1
            if not self.held[chain]:
                del self.held[chain]

    def retire(self, chain: str) -> list[tuple[Layer, str]]:
        """Take a chain's layers out of the store from the top, as far down as nobody needs them.

        What is taken can no longer be found, neither now nor after a crash; erase() frees its space."""
        with self._writer:
            taken = []
            with self._tables:
                while chain in self._layers and not self._needed(chain):
                    taken.append(self._layers.pop(chain))
                    chain = taken[-1].parent
            return [(layer, self._rename_away(layer.chain_id)) for layer in taken]

    def _needed(self, chain: str) -> bool:
        return (self.held[chain] > 0 or self.retained(chain)
                or any(layer.parent == chain for layer in self._layers.values())
                or any(mount.parent == chain for mount in self._mounts.values()))

    def _rename_away(self, chain: str) -> str:
        """Mark a layer's record as moby marks those under removal; its new path."""
        path = f"{self._path(chain)}-{secrets.token_hex(32)}-removing"
        failpoint("layer-retire")
        os.rename(self._path(chain), path)
        return path

    def erase(self, taken: list[tuple[Layer, str]]) -> list[Layer]:
        """Remove what retire() took, from disk; what cannot be removed now goes at the next start."""
        for layer, path in taken:
            try:
                self._erase(path, ())
            except OSError as error:
                log.error("cannot remove the layer %s: %s", layer.chain_id, error)
        return [layer for layer, path in taken]

    def _erase(self, path: str, used: Iterable[str]) -> None:
        with contextlib.suppress(FileNotFoundError):
            cache_id = read_state(os.path.join(path, "cache-id")).decode().strip()
            if HEX64.match(cache_id) and cache_id not in used:
                self.driver.remove(cache_id)
        remove_tree(path)

    def collect(self, chain: str) -> list[Layer]:
        """Remove a chain's layers as far down as nobody needs them; those removed, from the top."""
        return self.erase(self.retire(chain))

    # Containers' layers

    def rw_parent(self, container_id: str) -> str:
        """The chain id of the image layers under a container's own, or ''."""
        return self._mount(container_id).parent

    def rw_ids(self) -> list[str]:
        """The ids of the containers that have a writable layer."""
        with self._tables:
            return list(self._mounts)

    def create_rw(self, container_id: str, chain: str, setup: Optional[Callable[[str], None]] = None,
                  size: int = 0) -> None:
        """Make a container's writable layer of at most `size` bytes (0: no limit) on top of the image's
        `chain`.

        `setup(directory)` fills the init layer between them, mounted at `directory`.  Nothing stays on
        failure."""
        mount_id = secrets.token_hex(32)
        mount = ReadWriteLayer(mount_id, f"{mount_id}-init" if setup else "", chain)
        with self._tables:
            if container_id in self._mounts:
                raise Conflict(f"the container {container_id} already has a writable layer")
            below: Optional[str] = self.get(chain).cache_id if chain else None
            self._mounts[container_id] = mount
        try:
            directory = os.path.join(self._mounts_directory, container_id)
            os.mkdir(directory, 0o700)
            write_facts(directory, parent=chain, init_id=mount.init_id, mount_id=mount_id)
            if setup:
                self.driver.create(mount.init_id, below, writable=True)
                with closing_fd(self.driver.mount(mount.init_id)) as fd:
                    setup(f"/proc/self/fd/{fd}")
                below = mount.init_id
            self.driver.create(mount_id, below, writable=True, size=size)
        except BaseException:
            self.remove_rw(container_id)
            raise

    def _mount(self, container_id: str) -> ReadWriteLayer:
        mount = self._mounts.get(container_id)
        if mount is None:
            raise DockerError(f"the container {container_id} has no writable layer")
        return mount

    def mount_rw(self, container_id: str, readonly: bool = False, label: str = "") -> int:
        """A descriptor of a detached mount of the container's root."""
        return self.driver.mount(self._mount(container_id).mount_id, readonly, label)

    def remove_rw(self, container_id: str) -> None:
        """Remove a container's writable layer, and image layers that only it still needed; nothing where it
        has none."""
        mount = self._mounts.get(container_id)
        if mount is None:
            return
        for cache_id in filter(None, (mount.mount_id, mount.init_id)):
            self.driver.remove(cache_id)
        with self._tables:
            self._mounts.pop(container_id, None)
        taken = self.retire(mount.parent)  # first, so that a crash leaves nothing that no record names
        remove_tree(os.path.join(self._mounts_directory, container_id))
        self.erase(taken)

    def rw_metadata(self, container_id: str) -> Optional[dict[str, str]]:
        """What the driver tells of the container's layer (GraphDriver.Data)."""
        return self.driver.metadata(self._mount(container_id).mount_id)

    def rw_size(self, container_id: str) -> tuple[int, int]:
        """(SizeRw, SizeRootFs): the bytes that the container wrote, and those with its image's."""
        mount = self._mount(container_id)
        files = confined(self.driver.diff_dir(mount.mount_id), _file_sizes)
        if self.driver.whiteouts != "overlay":  # the directory is a whole tree: take off what lies below
            below = mount.init_id or (self.get(mount.parent).cache_id if mount.parent else "")
            files -= confined(self.driver.diff_dir(below), _file_sizes) if below else set()
        written = sum(size for _, size, _ in files)
        return written, written + self.size(mount.parent)


def _file_sizes() -> set[tuple[str, int, int]]:
    """(path, bytes, mtime in ns) of all that is no directory below the current one, an inode counted once."""
    pending, files, inodes = ["."], set(), set()
    while pending:
        with contextlib.suppress(OSError), os.scandir(pending.pop()) as entries:
            for entry in entries:
                facts = entry.stat(follow_symlinks=False)
                if stat.S_ISDIR(facts.st_mode):
                    pending.append(entry.path)
                elif facts.st_ino not in inodes:
                    inodes.add(facts.st_ino)
                    files.add((entry.path, facts.st_size, facts.st_mtime_ns))
    return files


class LayerTransaction:
    """Layers on their way into the store, and the directory in layerdb/tmp that a crash leaves of them.

    Its entries are the driver's names of layers that are being unpacked, and HEX-published for those that are
    in the store but not yet named by an image."""

    def __init__(self, store: LayerStore) -> None:
        self.store = store
        self._directory = os.path.join(store.tmp, secrets.token_hex(8))
        self._chains: list[str] = []
        os.mkdir(self._directory, 0o700)

    def unpack(self, stream: Any, parent: str = "", **limits: Any) -> Layer:
        """Unpack the tar `stream` as the layer above the chain `parent`, hash it, and put it into the store.

        DockerError, OSError or what the stream raises; then nothing is left of the layer."""
        store = self.store
        if len(store.lineage(parent)) >= MAX_LAYERS:
            raise DockerError("max depth exceeded")
        below = self._keep(store.hold(parent)).cache_id if parent else None
        cache_id = secrets.token_hex(32)
        record = os.path.join(self._directory, cache_id)
        os.mkdir(record, 0o700)
        published = False
        try:
            store.driver.create(cache_id, below)
            reader = HashingReader(stream)
            directory = store.driver.diff_dir(cache_id)
            stats = apply_layer(reader, directory, store.driver.whiteouts, store.idmap, **limits)
            layer = Layer(chain_id(parent, reader.digest), reader.digest, parent, cache_id, stats.size)
            published = self._publish(layer, record)
            return store.get(layer.chain_id)
        finally:
            if not published:
                store.driver.remove(cache_id)
                remove_tree(record)

    def _publish(self, layer: Layer, record: str) -> bool:
        """Write the layer's record and put it into the store; False when its like was there."""
        write_facts(record, diff=layer.diff_id, size=str(layer.size), cache_id=layer.cache_id,
                    parent=layer.parent)
        with contextlib.suppress(FileExistsError):
            os.mkdir(os.path.join(self._directory, f"{layer.chain_id[7:]}-published"), 0o700)
        return self._keep(self.store.publish(layer, record)) is layer

    def _keep(self, layer: Layer) -> Layer:
        self._chains.append(layer.chain_id)
        return layer

    def sync(self) -> None:
        """Bring everything to the disk that the layers need; call it once, before an image names them."""
        failpoint("layers-sync")
        directories = [self.store.driver.diff_dir(self.store.get(chain).cache_id) for chain in self._chains]
        for path in {os.stat(path).st_dev: path for path in [self.store.tmp, *directories]}.values():
            with opened(path) as fd:
                syncfs(fd)

    def close(self) -> None:
        """Give the layers up: those that nobody names are removed."""
        for chain in self._chains:
            self.store.release(chain)
        for chain in reversed(self._chains):
            self.store.collect(chain)
        remove_tree(self._directory)


class Image:
    """An image as the tables know it: `id`, `parent` (an image's id or ''), `created` (text or ''), `labels`,
    `platform`, `chain_ids` of its layers from the bottom; `document`, its configuration, is read when it is
    used."""

    def __init__(self, path: str, raw: bytes, parent: str) -> None:
        """Check a configuration: ValueError when it is none."""
        try:
            document = json.loads(raw)
            rootfs, history = document.get("rootfs"), document.get("history") or []
            if rootfs is None:
                raise ValueError("invalid image JSON, no RootFS key")
            diff_ids = [parse_digest(diff_id) for diff_id in rootfs.get("diff_ids") or []]
            if sum(not entry.get("empty_layer") for entry in history) > len(diff_ids):
                raise ValueError("too many non-empty layers in History section")
            config = document.get("config")
            self.labels: Optional[dict[str, str]] = None if config is None else config.get("Labels")
            if not isinstance(self.labels, (dict, type(None))):
                raise ValueError("invalid image JSON: its labels are no object")
            self.platform = Platform(*(str(document.get(name) or "") for name in _PLATFORM_KEYS))
            self.created: str = document.get("created") or ""
            self.created_ns = parse_timestamp(self.created) if self.created else 0
        except (AttributeError, TypeError, DockerError, RecursionError) as error:
            raise ValueError(f"invalid image JSON: {error}") from None
        self.id = "sha256:" + hashlib.sha256(raw).hexdigest()
        self.parent, self._path = parent, path
        self.chain_ids = chain_ids(diff_ids)

    @property
    def chain_id(self) -> str:
        """The chain id of the whole root file system; '' when it has no layers."""
        return self.chain_ids[-1] if self.chain_ids else ""

    @property
    def raw(self) -> bytes:
        """The configuration, byte for byte; DockerError when the file no longer has the image's digest."""
        raw = read_state(self._path)
        if "sha256:" + hashlib.sha256(raw).hexdigest() != self.id:
            raise DockerError(f"failed to verify: {self.id}")
        return raw

    @property
    def document(self) -> dict[str, Any]:
        """The configuration (OCI image specification, config.md)."""
        return json.loads(self.raw)

    @property
    def config(self) -> dict[str, Any]:
        """What the image sets for its containers: Env, Cmd, Entrypoint, ..."""
        return self.document.get("config") or {}

    @property
    def short_id(self) -> str:
        """The twelve digits that messages name it by."""
        return self.id[7:19]


class ImageStore:
    """imagedb: image configurations by digest, and beside each its parent and the time of its last tag."""

    def __init__(self, root: str, layers: LayerStore, tables: threading.RLock) -> None:
        self._layers, self._tables, self._writer = layers, tables, threading.Lock()
        self._content = os.path.join(root, "imagedb", "content", "sha256")
        self._metadata = os.path.join(root, "imagedb", "metadata", "sha256")
        for path in (self._content, self._metadata):
            os.makedirs(path, 0o700, exist_ok=True)
        self._images: dict[str, Image] = {}
        self.damages: list[Damage] = []
        layers.retained = lambda chain: any(image.chain_id == chain for image in self._images.values())
        for name in filter(HEX64.match, os.listdir(self._content)):
            self._load("sha256:" + name, layers.retired)
        for name in set(os.listdir(self._metadata)) - set(os.listdir(self._content)):
            self.damages.append(Damage(f"{name} has metadata, and is no image",
                                       functools.partial(self._remove_files, "sha256:" + name), True))

    def _load(self, image_id: str, retired: set[str]) -> None:
        path = os.path.join(self._content, image_id[7:])
        try:
            image = Image(path, read_state(path), self._fact(image_id, "parent"))
            if image.id != image_id:
                raise ValueError("its content does not have its digest")
            missing = next((chain for chain in image.chain_ids if not self._layers.has(chain)), "")
            if missing and image.chain_id in retired:
                self.damages.append(Damage(f"the removal of the image {image_id} was interrupted",
                                           functools.partial(self._remove_files, image_id), True))
            elif missing:
                raise ValueError(f"the layer {missing} is missing")
            else:
                self._images[image_id] = image
        except (OSError, ValueError) as error:
            self.damages.append(Damage(f"ignoring the image {image_id}: {error}",
                                       functools.partial(self._remove_files, image_id)))

    def _fact(self, image_id: str, name: str) -> str:
        return next(read_facts(os.path.join(self._metadata, image_id[7:]), [name]))

    def _write_fact(self, image_id: str, name: str, value: str) -> None:
        directory = os.path.join(self._metadata, image_id[7:])
        os.makedirs(directory, 0o700, exist_ok=True)
        write_state(os.path.join(directory, name), value.encode())

    def create(self, raw: bytes, parent: str = "") -> Image:
        """Store the configuration `raw`, whose layers are in the layer store and held; durable on return.

        BadParameter when it is no image's configuration, DockerError when a layer is missing."""
        path = os.path.join(self._content, hashlib.sha256(raw).hexdigest())
        try:
            image = Image(path, raw, parent)
        except ValueError as error:
            raise BadParameter(str(error)) from None
        self._layers.lineage(image.chain_id)
        with self._writer:
            if image.id in self._images:
                return self._images[image.id]
            failpoint("image-create")
            if parent:
                self._write_fact(image.id, "parent", parent)
            write_state(path, raw)
            with self._tables:
                self._images[image.id] = image
        return image

    def delete(self, image: Image) -> list[Layer]:
        """Remove an image, and the layers that nobody else needs; those layers, from the top."""
        with self._writer:
            with self._tables:
                if self._images.pop(image.id, None) is None:
                    raise NotFound(f"No such image: {image.id}")
            taken = self._layers.retire(image.chain_id)
            failpoint("image-delete")
            self._remove_files(image.id)
        return self._layers.erase(taken)

    def _remove_files(self, image_id: str) -> None:
        remove_tree(os.path.join(self._metadata, image_id[7:]))
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(self._content, image_id[7:]))

    def get(self, image_id: str) -> Optional[Image]:
        """The image of this id, or None."""
        return self._images.get(image_id)

    def search(self, prefix: str) -> Optional[Image]:
        """The one image whose id begins with `prefix`, written with sha256: or without; None for none and for
        several."""
        digits = prefix[7:] if prefix.startswith("sha256:") else prefix
        found = [image for image in self.all() if digits and image.id.startswith(digits, 7)]
        return found[0] if len(found) == 1 else None

    def all(self) -> list[Image]:
        """All images."""
        with self._tables:
            return list(self._images.values())

    def children(self, image: Image) -> list[Image]:
        """The images that were made from this one."""
        return [other for other in self.all() if other.parent == image.id]

    def touch(self, image: Image) -> None:
        """Note that the image was tagged now."""
        with self._writer:
            if image.id in self._images:
                self._write_fact(image.id, "lastUpdated", rfc3339nano(time.time_ns()))

    def last_updated(self, image: Image) -> str:
        """When the image was last tagged here, in RFC 3339; Go's zero time when it never was."""
        return self._fact(image.id, "lastUpdated") or ZERO_TIME


class TagStore:
    """repositories.json: which image a reference means.  The table is replaced as a whole when the file is
    written."""

    def __init__(self, path: str, tables: threading.RLock) -> None:
        self._path, self._tables, self._writer = path, tables, threading.Lock()
        try:
            loaded = json.loads(read_state(path))["Repositories"]
            repositories = {name: dict(known) for name, known in (loaded or {}).items() if known}
        except FileNotFoundError:
            repositories = {}
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DockerError(f"cannot read {path}: {error}; restore it, or move it away to lose all tags")
        self._use(repositories)

    def _use(self, repositories: dict[str, dict[str, str]]) -> None:
        references: dict[str, list[Reference]] = {}
        for name, image_id in itertools.chain.from_iterable(known.items() for known in repositories.values()):
            with contextlib.suppress(BadParameter):
                references.setdefault(image_id, []).append(parse_reference(name))
        for known in references.values():
            known.sort(key=str)
        with self._tables:
            self._repositories, self._references = repositories, references

    def get(self, reference: Reference) -> str:
        """The id of the image that `reference` means, latest where it has no tag; '' for none."""
        stored = reference.stored()
        return self._repositories.get(stored.familiar_name, {}).get(stored.familiar, "")

    def references(self, image_id: str) -> list[Reference]:
        """All references to an image, in the order of their full names."""
        return list(self._references.get(image_id, ()))

    def images(self) -> list[str]:
        """The ids of all images that have a reference."""
        return list(self._references)

    def set(self, reference: Reference, image_id: str) -> None:
        """Let `reference` mean the image, whatever it meant; BadParameter for a name that would be
        ambiguous."""
        if reference.familiar_name == "sha256":
            raise BadParameter("refusing to create an ambiguous tag using digest algorithm as name")
        self._change({reference.stored(): image_id})

    def remove(self, references: Iterable[Reference]) -> None:
        """Forget references; those that are not known are passed over."""
        self._change({reference.stored(): "" for reference in references})

    def _change(self, changes: dict[Reference, str]) -> None:
        with self._writer:
            repositories = {name: dict(references) for name, references in self._repositories.items()}
            for reference, image_id in changes.items():
                known = repositories.setdefault(reference.familiar_name, {})
                known[reference.familiar] = image_id
                if not image_id:
                    del known[reference.familiar]
                if not known:
                    del repositories[reference.familiar_name]
            if repositories != self._repositories:
                write_state(self._path, docker_json({"Repositories": repositories}, sort=True))
                self._use(repositories)


# Jobs

IMAGE_FILTERS = frozenset(["dangling", "label", "before", "since", "reference", "until"])
_IMPORT_PROGRESS = 1 << 19  # bytes between two progress lines


class Images:
    """The image jobs, over the three stores.

    `users(image_id)` lists the containers made from an image as (id, running); `event(action, id,
    attributes)` is told what happens."""

    def __init__(self, config: Any, event: Callable[[str, str, dict[str, str]], None] = lambda *facts: None,
                 users: Callable[[str], list[tuple[str, bool]]] = lambda image_id: [],
                 idmap: IdMap = IdMap(), readonly: bool = False) -> None:
        """Load all that is there.  What a crash left is mended, unless it is to be `readonly`: then it stands
        in `damages`."""
        driver = existing_driver(config.data_root, config.storage_driver, idmap) if readonly else \
            select_driver(config.data_root, config.storage_driver, config.storage_opts, idmap)
        root = os.path.join(config.data_root, "image", driver.name)
        tables = threading.RLock()
        os.makedirs(root, 0o700, exist_ok=True)
        self.event, self.users = event, users
        self.layers = LayerStore(root, driver, idmap, tables)
        self.store = ImageStore(root, self.layers, tables)
        self.tags = TagStore(os.path.join(root, "repositories.json"), tables)
        self.damages = [*self.layers.damages, *self.store.damages, *self.layers.leftovers(),
                        *(damage for directory, _, _ in os.walk(root) for damage in unfinished(directory))]
        if not readonly:
            mend_what_is_safe(self.damages)

    def mismatches(self) -> Iterator[Damage]:
        """What only a check looks for."""
        yield from self.layers.mismatches()
        for image_id in self.tags.images():
            if self.store.get(image_id) is None:
                references = self.tags.references(image_id)
                names = ", ".join(reference.familiar for reference in references)
                yield Damage(f"{names} means the image {image_id}, which is missing",
                             functools.partial(self.tags.remove, references))

    def count(self) -> int:
        """How many images there are."""
        return len(self.store.all())

    def resolve(self, name: str, platform: str = "") -> Image:
        """The image that `name` means: a reference, an id, or an unambiguous beginning of one.

        BadParameter when it is no name at all; NotFound when there is no such image, or not of the
        `platform`."""
        image, _ = self._find(name)
        wanted = parse_platform(platform) if platform else image.platform
        if wanted[:2] != image.platform[:2] or wanted.variant not in ("", image.platform.variant):
            raise NotFound(f"image with reference {name} was found but its platform ({image.platform}) does "
                           f"not match the specified platform ({wanted})")
        return image

    def _find(self, name: str) -> tuple[Image, Optional[Reference]]:
        """The image that `name` means, and the reference that it was found by, if not by its id."""
        reference = None
        if HEX64.match(name) or (name.startswith("sha256:") and HEX64.match(name[7:])):
            name = "sha256:" + name[-64:]
            image = self.store.get(name)
        else:
            reference = parse_reference(name).with_default_tag()
            image = self.store.get(self.tags.get(reference))
            if image is None:
                image, name, reference = self.store.search(name), reference.familiar, None
        if image is None:
            raise NotFound(f"No such image: {name}")
        return image, reference

    def _log(self, action: str, image: Image, name: str) -> None:
        self.event(action, image.id, {**(image.labels or {}), "name": name})

    @staticmethod
    def _names(references: Iterable[Reference]) -> tuple[list[str], list[str]]:
        """RepoTags and RepoDigests."""
        names: tuple[list[str], list[str]] = ([], [])
        for reference in references:
            names[bool(reference.digest)].append(reference.familiar)
        return names

    # List and tell

    @job("images")
    def list_images(self, job: Job) -> None:
        """The images, newest first.  env: all, filters, shared-size."""
        filters = parse_filters(job.env.get("filters"), IMAGE_FILTERS)
        dangling = self._dangling(filters.get("dangling"))
        patterns = [compile_pattern(pattern) for pattern in filters.get("reference", ())]
        in_time = self._in_time(filters)
        images = sorted(self.store.all(), key=lambda image: image.created_ns, reverse=True)
        parents = {image.parent for image in images}
        shared = self._shared_layers() if job.env.get_bool("shared-size") else None
        listed = []
        for image in images:
            if not in_time(image) or not matches_labels(filters.get("label", ()), image.labels):
                continue
            names = self._names(
                reference for reference in self.tags.references(image.id) if not patterns or any(
                    pattern.fullmatch(reference.familiar) or pattern.fullmatch(reference.familiar_name)
                    for pattern in patterns))
            if dangling:
                shown = not names[0] and image.id not in parents
            else:
                shown = names != ([], []) or not (patterns or dangling is False or (
                    image.id in parents and not job.env.get_bool("all")))
            if shown:
                with contextlib.suppress(DockerError):  # removed meanwhile
                    listed.append(self._summary(image, names, shared))
        job.reply(listed)

    @staticmethod
    def _dangling(values: Optional[list[str]]) -> Optional[bool]:
        if values is None:
            return None
        known = {"true": True, "1": True, "false": False, "0": False}
        if len(values) != 1 or values[0] not in known:
            raise BadParameter(f"invalid filter 'dangling=[{' '.join(values)}]'")
        return known[values[0]]

    def _in_time(self, filters: dict[str, list[str]]) -> Callable[[Image], bool]:
        """Whether an image is older than all of `before` and `until`, and younger than all of `since`."""
        before = [self.resolve(name).created_ns for name in filters.get("before", ())]
        before += [parse_timestamp(text) for text in filters.get("until", ())]
        since = [self.resolve(name).created_ns for name in filters.get("since", ())]
        return lambda image: image.created_ns < min(before, default=1 << 64) and (
            image.created_ns > max(since, default=-1 << 64))

    def _shared_layers(self) -> set[str]:
        """The chain ids that more than one image has."""
        counts = collections.Counter(chain for image in self.store.all() for chain in image.chain_ids)
        return {chain for chain, count in counts.items() if count > 1}

    def _summary(self, image: Image, names: tuple[list[str], list[str]],
                 shared: Optional[set[str]]) -> dict[str, Any]:
        shared_size = -1 if shared is None else sum(
            self.layers.get(chain).size for chain in image.chain_ids if chain in shared)
        return {"Id": image.id, "ParentId": image.parent, "RepoTags": names[0], "RepoDigests": names[1],
                "Created": image.created_ns // 10**9, "Size": self.layers.size(image.chain_id),
                "SharedSize": shared_size, "Labels": image.labels, "Containers": len(self.users(image.id))}

    @job("image_inspect")
    def inspect(self, job: Job) -> None:
        """All about the image named by the argument.  env: platform."""
        image = self.resolve(job.args[0], self._platform(job))
        document = image.document
        tags, digests = self._names(self.tags.references(image.id))
        history = document.get("history") or [{}]
        described = {
            "Id": image.id, "RepoTags": tags, "RepoDigests": digests, "Parent": image.parent,
            "Comment": document.get("comment") or history[-1].get("comment", ""), "Created": image.created,
            "DockerVersion": document.get("docker_version", ""), "Author": document.get("author", ""),
            "Config": _fill(document.get("config") or {}, _IMAGE_CONFIG_FIELDS),
            "Architecture": image.platform.architecture, "Variant": image.platform.variant,
            "Os": image.platform.os or "linux",
            "OsVersion": document.get("os.version", ""), "Size": self.layers.size(image.chain_id),
            "GraphDriver": {"Data": self.layers.metadata(image.chain_id), "Name": self.layers.driver.name},
            "RootFS": {"Type": "layers", "Layers": document["rootfs"].get("diff_ids") or []},
            "Metadata": {"LastTagTime": self.store.last_updated(image)}}
        optional = ("Created", "Variant", "OsVersion")
        job.reply({key: value for key, value in described.items() if value or key not in optional})

    @staticmethod
    def _platform(job: Job) -> str:
        """The env's platform: OS/ARCH, or the object of API 1.49."""
        value = job.env.get_json("platform") or ""
        if isinstance(value, dict):
            value = "/".join(str(value[name]) for name in _PLATFORM_KEYS if value.get(name))
        return str(value)

    @job("history")
    def history(self, job: Job) -> None:
        """How the image named by the argument was made, the last step first."""
        image: Optional[Image] = self.resolve(job.args[0], self._platform(job))
        assert image is not None
        sizes = iter([self.layers.get(chain).size for chain in image.chain_ids])
        steps: list[dict[str, Any]] = []
        for entry in image.document.get("history") or []:
            created = parse_timestamp(entry["created"]) // 10**9 if entry.get("created") else 0
            steps.insert(0, {
                "Id": "<missing>", "Created": created, "CreatedBy": entry.get("created_by", ""), "Tags": None,
                "Size": 0 if entry.get("empty_layer") else next(sizes), "Comment": entry.get("comment", "")})
        for step in steps:
            if image is None:
                break
            step.update(Id=image.id, Tags=self._names(self.tags.references(image.id))[0] or None)
            image = self.store.get(image.parent)
        job.reply(steps)

    # Make

    @job("tag")
    def tag(self, job: Job) -> None:
        """Give the image named by the first argument another name: the others are the repository and the
        tag."""
        repo, tag = (job.args[1:] + ["", ""])[:2]
        reference = parse_repo_tag(repo, tag)
        if reference is None:
            raise BadParameter("invalid reference format")
        self.set_tag(reference, self.resolve(job.args[0]))

    def set_tag(self, reference: Reference, image: Image) -> None:
        """Let `reference` mean `image`."""
        self.tags.set(reference, image.id)
        self.store.touch(image)
        self._log("tag", image, reference.with_default_tag().familiar)

    @job("import")
    def import_image(self, job: Job) -> None:
        """Make an image of one layer: args are the source ('-': stdin, or a URL), the repository and the tag.

        env: changes, message, platform.  The last line on stdout is the image's id."""
        source, repo, tag = (job.args + ["", ""])[:3]
        reference = parse_repo_tag(repo, tag)
        platform = parse_platform(self._platform(job)) if job.env.get("platform") else host_platform()
        if platform.os != "linux":
            raise BadParameter("operating system is not supported")
        config = apply_changes({}, job.env.get_list("changes"))
        message = job.env.get("message") or f"Imported from {source}"
        with contextlib.ExitStack() as opened:
            stream = job.stdin if source == "-" else opened.enter_context(self._download(job, source))
            transaction = opened.enter_context(self.layers.transaction())
            layer = transaction.unpack(decompress(stream))
            transaction.sync()
            document = import_document(config, layer.diff_id, platform, message, time.time_ns())
            image = self.store.create(document)
        if reference is not None:
            self.set_tag(reference, image)
        self._log("import", image, image.id)
        job.progress(status=image.id)

    @contextlib.contextmanager
    def _download(self, job: Job, source: str) -> Iterator[Any]:
        """The body of a URL, with progress lines as it is read."""
        address = source if "://" in source else "http://" + source
        with open_url(address) as response:
            job.progress(status=f"Downloading from {address}")
            total = int(response.headers.get("Content-Length") or -1)
            yield ProgressReader(response, lambda current: job.progress(
                status="Importing", progressDetail={"current": current, "total": total}))

    # Remove

    @job("image_delete")
    def delete(self, job: Job) -> None:
        """Remove the reference or the image named by the argument.  env: force, noprune.

        The reply lists what was untagged and deleted.  Conflict, as Docker has it, when something needs the
        image."""
        name, force, prune = job.args[0], job.env.get_bool("force"), not job.env.get_bool("noprune")
        image, reference = self._find(name)
        references = self.tags.references(image.id)
        records: list[dict[str, str]] = []
        if reference is None:
            if one_repository(references):
                self._check_conflicts(image, force, references=False)
                self._untag(image, references, records)
        else:
            self._delete_reference(image, reference, name, force, records)
        if reference is None or not self.tags.references(image.id):
            self._delete_image(image, force, prune, reference is not None, records)
        job.reply(records)

    def _delete_reference(self, image: Image, reference: Reference, name: str, force: bool,
                          records: list[dict[str, str]]) -> None:
        """Remove a reference, which the client calls `name`, and with a repository's last tag its digests."""
        users = self.users(image.id)
        if users and not force and one_repository(self.tags.references(image.id)):
            raise Conflict(f"conflict: unable to remove repository reference {go_quote(name)} (must force) - "
                           f"container {users[0][0][:12]} is using its referenced image {image.short_id}")
        self._untag(image, [reference], records)
        rest = [other for other in self.tags.references(image.id) if other.name == reference.name]
        if not reference.digest and all(other.digest for other in rest):
            self.tags.remove(rest)
            records += [{"Untagged": other.familiar} for other in rest]

    def _untag(self, image: Image, references: list[Reference], records: list[dict[str, str]]) -> None:
        self.tags.remove(references)
        for reference in references:
            self._log("untag", image, image.id)
            records.append({"Untagged": reference.familiar})

    def _delete_image(self, image: Image, force: bool, prune: bool, quiet: bool,
                      records: list[dict[str, str]]) -> None:
        """Remove the image and, with `prune`, its parents as far as nothing needs them.

        With `quiet`, a conflict leaves the image where it is, unless it would be dangling and unused."""
        try:
            self._check_conflicts(image, force)
        except ImageConflict as conflict:
            if quiet and (conflict.used or self.tags.references(image.id) or self.store.children(image)):
                return
            raise
        self._untag(image, self.tags.references(image.id), records)
        layers = self.store.delete(image)
        self._log("delete", image, image.id)
        records += [{"Deleted": name} for name in (image.id, *(layer.chain_id for layer in layers))]
        parent = self.store.get(image.parent)
        if prune and parent is not None:
            self._delete_image(parent, False, True, True, records)

    def _check_conflicts(self, image: Image, force: bool, references: bool = True) -> None:
        """Conflict when something needs the image: children and running containers always, tags (not without
        `references`) and stopped containers unless `force`."""
        users = sorted(self.users(image.id), key=lambda user: not user[1])
        if self.store.children(image):
            raise ImageConflict(image, "cannot be forced", "image has dependent child images")
        if users and users[0][1]:
            raise ImageConflict(image, "cannot be forced", "image is being used by running container",
                                users[0][0])
        if force:
            return
        if references and self.tags.references(image.id):
            raise ImageConflict(image, "must be forced", "image is referenced in multiple repositories")
        if users:
            raise ImageConflict(image, "must be forced", "image is being used by stopped container",
                                users[0][0])


class ImageConflict(Conflict):
    """Something needs an image that is to be removed; `used` when it is a container."""

    def __init__(self, image: Image, remedy: str, reason: str, container_id: str = "") -> None:
        super().__init__(f"conflict: unable to delete {image.short_id} ({remedy}) - {reason} "
                         f"{container_id[:12]}".rstrip())
        self.used = bool(container_id)


def one_repository(references: list[Reference]) -> bool:
    """Whether `references`, at least one, are of one repository and at most one of them is a tag."""
    tags = [reference for reference in references if not reference.digest]
    return len({reference.name for reference in references}) == 1 and len(tags) <= 1


def import_document(config: dict[str, Any], diff_id: str, platform: Platform, comment: str,
                    created: int) -> bytes:
    """The configuration of an imported image, made at `created` (ns), byte for byte as moby writes it: keys
    sorted at the top, in the order of Go's structs below."""
    when = rfc3339nano(created)
    document = {
        "architecture": platform.architecture, "variant": platform.variant, "os": platform.os,
        "comment": comment, "config": full_config(config), "container_config": full_config({}),
        "created": when, "docker_version": VERSION, "history": [{"created": when, "comment": comment}],
        "rootfs": {"type": "layers", "diff_ids": [diff_id]}}
    return docker_json({key: document[key] for key in sorted(document) if document[key]})


class ProgressReader:
    """Reads `stream` and calls `report(bytes so far)` now and then, and at the end."""

    def __init__(self, stream: Any, report: Callable[[int], None]) -> None:
        self._stream, self._report, self._current, self._reported = stream, report, 0, 0

    def read(self, size: int = 65536) -> bytes:
        """At most `size` bytes; b"" at the end."""
        data = self._stream.read(size)
        self._current += len(data)
        if self._current - self._reported > _IMPORT_PROGRESS or not data:
            self._reported = self._current
            self._report(self._current)
        return data


@contextlib.contextmanager
def open_url(address: str, timeout: float = 30) -> Iterator[Any]:
    """The response to a GET of an http or https URL, proxies of the environment respected; `timeout` in s per
    read.

    BadParameter for another scheme, also after a redirect; DockerError when there is no successful answer."""
    import http.client
    import urllib.error
    import urllib.request as request
    scheme = address.partition("://")[0].lower()
    if scheme not in ("http", "https"):
        raise BadParameter(f'Get "{address}": unsupported protocol scheme "{scheme}"')
    opener = request.OpenerDirector()
    for handler in (request.ProxyHandler, request.UnknownHandler, request.HTTPHandler, request.HTTPSHandler,
                    request.HTTPDefaultErrorHandler, request.HTTPRedirectHandler, request.HTTPErrorProcessor):
        opener.add_handler(handler())
    try:
        response = opener.open(address, timeout=timeout)
    except urllib.error.HTTPError as error:
        raise DockerError(f"failed to GET {address} with status {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise DockerError(f'Get "{address}": {getattr(error, "reason", error)}') from None
    with response:
        yield response


# ------------------------------------------------------------------------------------------------------------
# Registry
#
# What reaches out to a registry (OCI distribution specification).  The client is not there yet: its jobs
# refuse with a line that says so, and what is here already can be used without it.
# ------------------------------------------------------------------------------------------------------------


class Registry:
    """The registry jobs."""

    @job("auth")
    def auth(self, job: Job) -> None:
        """Log in to a registry."""
        self._refuse("login", "a login")

    @job("search")
    def search(self, job: Job) -> None:
        """Search a registry."""
        self._refuse("search", "searching a registry")

    @job("pull")
    def pull(self, job: Job) -> None:
        """Fetch an image; args: its name and tag."""
        self._refuse("pull", f"fetching {job.args[0] if job.args else 'an image'} from a registry")

    @job("push")
    def push(self, job: Job) -> None:
        """Send an image to its registry; args: its name."""
        self._refuse("push", f"sending {job.args[0] if job.args else 'an image'} to a registry")

    @staticmethod
    def _refuse(name: str, what: str) -> None:
        raise NotSupported(f"{name}: {what} is not supported by this version yet; import brings an image in")


# ------------------------------------------------------------------------------------------------------------
# Execution driver
#
# From a container's settings to a running process, first part: what confines it.  Capabilities by name, the
# user looked up in the image's own files, and the seccomp profile compiled to classic BPF.  The daemon
# compiles all of it to plain numbers and bytes; the init only loads them.  Sources: capabilities(7),
# passwd(5), group(5), seccomp(2), <linux/filter.h>, the profile format of Docker and of runtime-spec's
# config-linux.md.
# ------------------------------------------------------------------------------------------------------------

# <linux/capability.h>, in the order of their numbers
CAPABILITIES = tuple("CAP_" + name for name in (
    "CHOWN DAC_OVERRIDE DAC_READ_SEARCH FOWNER FSETID KILL SETGID SETUID SETPCAP LINUX_IMMUTABLE "
    "NET_BIND_SERVICE NET_BROADCAST NET_ADMIN NET_RAW IPC_LOCK IPC_OWNER SYS_MODULE SYS_RAWIO SYS_CHROOT "
    "SYS_PTRACE SYS_PACCT SYS_ADMIN SYS_BOOT SYS_NICE SYS_RESOURCE SYS_TIME SYS_TTY_CONFIG MKNOD LEASE "
    "AUDIT_WRITE AUDIT_CONTROL SETFCAP MAC_OVERRIDE MAC_ADMIN SYSLOG WAKE_ALARM BLOCK_SUSPEND AUDIT_READ "
    "PERFMON BPF CHECKPOINT_RESTORE").split())
DEFAULT_CAPABILITIES = frozenset(CAPABILITIES.index("CAP_" + name) for name in (
    "CHOWN DAC_OVERRIDE FSETID FOWNER MKNOD NET_RAW SETGID SETUID SETFCAP SETPCAP NET_BIND_SERVICE "
    "SYS_CHROOT KILL AUDIT_WRITE").split())


@functools.cache
def bounding_capabilities() -> frozenset[int]:
    """The numbers of the capabilities that the daemon can give: those of its bounding and its permitted
    set."""
    _, permitted, _ = capget()
    given = set()
    for number in range(len(CAPABILITIES)):
        with contextlib.suppress(OSError):  # EINVAL: a capability that this kernel does not know
            if prctl(PR_CAPBSET_READ, number) and permitted >> number & 1:
                given.add(number)
    if len(given) < len(CAPABILITIES):
        missing = " ".join(name for number, name in enumerate(CAPABILITIES) if number not in given)
        log.info("capabilities that this daemon lacks, and privileged containers with it: %s", missing)
    return frozenset(given)


def _capability_numbers(names: Iterable[str], option: str) -> set[int]:
    """The numbers of capability names with or without CAP_; ALL is every one."""
    numbers: set[int] = set()
    for name in map(str.upper, names):
        full = name if name.startswith("CAP_") else "CAP_" + name
        if name == "ALL":
            numbers.update(range(len(CAPABILITIES)))
        elif full in CAPABILITIES:
            numbers.add(CAPABILITIES.index(full))
        else:
            raise BadParameter(f'invalid {option}: unknown capability: "{full}"')
    return numbers


def capability_sets(add: Iterable[str], drop: Iterable[str], privileged: bool,
                    bounding: Iterable[int]) -> set[int]:
    """The numbers of the capabilities of a container, of which none is outside `bounding`.

    `add` and `drop` are CapAdd and CapDrop, with ALL and with or without CAP_, as Docker reads them.
    BadParameter for an unknown name, and for one asked for by its own name that this host cannot give."""
    add, drop, given = list(add), list(drop), set(bounding)
    added, dropped = _capability_numbers(add, "CapAdd"), _capability_numbers(drop, "CapDrop")
    everything = _capability_numbers(["ALL"], "")
    if privileged:
        return given
    if added == everything:
        return given - (set() if dropped == everything else dropped)
    for number in sorted(added - given):
        raise BadParameter("invalid CapAdd: capability not supported by your kernel or not available in the "
                           f'current environment: "{CAPABILITIES[number]}"')
    return added if dropped == everything else set(DEFAULT_CAPABILITIES - dropped | added) & given


# Users and groups, by the image's own files: the C library's name service would load the host's plugins

MAXIMUM_ID = (1 << 31) - 1


class _Account(NamedTuple):
    """A line of passwd or group: `members` is the home directory there and the member list here."""

    name: str
    number: int
    group: int
    members: str


def _go_integer(text: str) -> Optional[int]:
    """The number that Go's strconv.Atoi reads, cut off where nothing real is as large, or None."""
    return int(text[:20]) if re.fullmatch(r"[+-]?[0-9]+", text, re.ASCII) else None


def _accounts(content: Optional[bytes], last: int) -> list[_Account]:
    """The lines of a passwd (`last` 5) or group file (`last` 3); what is no number counts as 0, as runc has
    it."""
    accounts = []
    for line in (content or b"").decode("utf-8", "surrogateescape").split("\n"):
        if line.strip():
            fields = line.strip().split(":") + [""] * 6
            uid, gid = (_go_integer(field) or 0 for field in fields[2:4])
            accounts.append(_Account(fields[0], uid, gid, fields[last]))
    return accounts


def _find_account(accounts: list[_Account], asked: str) -> Optional[_Account]:
    """The first account with that number, when `asked` is one, else with that name."""
    number = _go_integer(asked)
    return next((account for account in accounts
                 if (account.number == number if number is not None else account.name == asked)), None)


def _checked_id(asked: str, what: str, file: str) -> int:
    """The number of a user or group that its file does not have: only a number in range will do."""
    number = _go_integer(asked)
    if number is None:
        raise BadParameter(f"{what} {asked}: no matching entries in {file} file")
    if not 0 <= number <= MAXIMUM_ID:
        raise BadParameter(f"uids and gids must be in range 0-{MAXIMUM_ID}")
    return number


def lookup_user(spec: str, passwd: Optional[bytes], group: Optional[bytes],
                extra_groups: Iterable[str] = ()) -> tuple[int, int, list[int], str]:
    """(uid, gid, supplementary gids, home) of `spec`, "user" or "user:group" by name or number, "" for root.

    `passwd` and `group` are the contents of the image's files, `extra_groups` HostConfig's GroupAdd.  A
    number need not be in the files; a name must: BadParameter with runc's text.  An explicit group takes the
    place of the memberships.  The first of several matching lines counts."""
    user, _, asked_group = spec.partition(":")
    users, groups = _accounts(passwd, 5), _accounts(group, 3)
    found = _find_account(users, user or "0")
    uid = found.number if found else _checked_id(user or "0", "unable to find user", "passwd")
    gid = found.group if found else 0
    supplementary: list[int] = []
    if asked_group:
        match = _find_account(groups, asked_group)
        gid = match.number if match else _checked_id(asked_group, "unable to find group", "group")
    elif found:
        supplementary = [entry.number for entry in groups if found.name in entry.members.split(",")]
    for asked in extra_groups:
        extra = next((entry.number for entry in groups if asked in (entry.name, str(entry.number))), None)
        supplementary.append(_checked_id(asked, "Unable to find group", "group") if extra is None else extra)
    home = next((entry.members for entry in users if entry.number == uid), "") or "/"
    if not (0 <= uid <= MAXIMUM_ID and 0 <= gid <= MAXIMUM_ID):  # as the image's files have it
        raise BadParameter(f"uids and gids must be in range 0-{MAXIMUM_ID}")
    return uid, gid, list(dict.fromkeys([gid, *supplementary])), home


# seccomp: the numbers of system calls.  One string per calling convention, in the order of the numbers: a
# number sets the next one.  Facts of the kernel's headers, Linux 6.18; the last two rows are common to
# several.

_SYSCALL_NAMES = {
    "SCMP_ARCH_X86_64":
        "read write open close stat fstat lstat poll lseek mmap mprotect munmap brk rt_sigaction "
        "rt_sigprocmask rt_sigreturn ioctl pread64 pwrite64 readv writev access pipe select sched_yield "
        "mremap msync mincore madvise shmget shmat shmctl dup dup2 pause nanosleep getitimer alarm "
        "setitimer getpid sendfile socket connect accept sendto recvfrom sendmsg recvmsg shutdown bind "
        "listen getsockname getpeername socketpair setsockopt getsockopt clone fork vfork execve exit wait4 "
        "kill uname semget semop semctl shmdt msgget msgsnd msgrcv msgctl fcntl flock fsync fdatasync "
        "truncate ftruncate getdents getcwd chdir fchdir rename mkdir rmdir creat link unlink symlink "
        "readlink chmod fchmod chown fchown lchown umask gettimeofday getrlimit getrusage sysinfo times "
        "ptrace getuid syslog getgid setuid setgid geteuid getegid setpgid getppid getpgrp setsid setreuid "
        "setregid getgroups setgroups setresuid getresuid setresgid getresgid getpgid setfsuid setfsgid "
        "getsid capget capset rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigsuspend sigaltstack utime "
        "mknod uselib personality ustat statfs fstatfs sysfs getpriority setpriority sched_setparam "
        "sched_getparam sched_setscheduler sched_getscheduler sched_get_priority_max sched_get_priority_min "
        "sched_rr_get_interval mlock munlock mlockall munlockall vhangup modify_ldt pivot_root _sysctl "
        "prctl arch_prctl adjtimex setrlimit chroot sync acct settimeofday mount umount2 swapon swapoff "
        "reboot sethostname setdomainname iopl ioperm create_module init_module delete_module "
        "get_kernel_syms query_module quotactl nfsservctl getpmsg putpmsg afs_syscall tuxcall security "
        "gettid readahead setxattr lsetxattr fsetxattr getxattr lgetxattr fgetxattr listxattr llistxattr "
        "flistxattr removexattr lremovexattr fremovexattr tkill time futex sched_setaffinity "
        "sched_getaffinity set_thread_area io_setup io_destroy io_getevents io_submit io_cancel "
        "get_thread_area lookup_dcookie epoll_create epoll_ctl_old epoll_wait_old remap_file_pages "
        "getdents64 set_tid_address restart_syscall semtimedop fadvise64 timer_create timer_settime "
        "timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres "
        "clock_nanosleep exit_group epoll_wait epoll_ctl tgkill utimes vserver mbind set_mempolicy "
        "get_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load "
        "waitid add_key request_key keyctl ioprio_set ioprio_get inotify_init inotify_add_watch "
        "inotify_rm_watch migrate_pages openat mkdirat mknodat fchownat futimesat newfstatat unlinkat "
        "renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list "
        "get_robust_list splice tee sync_file_range vmsplice move_pages utimensat epoll_pwait signalfd "
        "timerfd_create eventfd fallocate timerfd_settime timerfd_gettime accept4 signalfd4 eventfd2 "
        "epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg "
        "fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs "
        "sendmmsg setns getcpu process_vm_readv process_vm_writev kcmp finit_module sched_setattr "
        "sched_getattr renameat2 seccomp getrandom memfd_create kexec_file_load bpf execveat userfaultfd "
        "membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx "
        "io_pgetevents rseq uretprobe uprobe",
    "SCMP_ARCH_X86":
        "restart_syscall exit fork read write open close waitpid creat link unlink execve chdir time mknod "
        "chmod lchown break oldstat lseek getpid mount umount setuid getuid stime ptrace alarm oldfstat "
        "pause utime stty gtty access nice ftime sync kill rename mkdir rmdir dup pipe times prof brk "
        "setgid getgid signal geteuid getegid acct umount2 lock ioctl fcntl mpx setpgid ulimit oldolduname "
        "umask chroot ustat dup2 getppid getpgrp setsid sigaction sgetmask ssetmask setreuid setregid "
        "sigsuspend sigpending sethostname setrlimit getrlimit getrusage gettimeofday settimeofday "
        "getgroups setgroups select symlink oldlstat readlink uselib swapon reboot readdir mmap munmap "
        "truncate ftruncate fchmod fchown getpriority setpriority profil statfs fstatfs ioperm socketcall "
        "syslog setitimer getitimer stat lstat fstat olduname iopl vhangup idle vm86old wait4 swapoff "
        "sysinfo ipc fsync sigreturn clone setdomainname uname modify_ldt adjtimex mprotect sigprocmask "
        "create_module init_module delete_module get_kernel_syms quotactl getpgid fchdir bdflush sysfs "
        "personality afs_syscall setfsuid setfsgid _llseek getdents _newselect flock msync readv writev "
        "getsid fdatasync _sysctl mlock munlock mlockall munlockall sched_setparam sched_getparam "
        "sched_setscheduler sched_getscheduler sched_yield sched_get_priority_max sched_get_priority_min "
        "sched_rr_get_interval nanosleep mremap setresuid getresuid vm86 query_module poll nfsservctl "
        "setresgid getresgid prctl rt_sigreturn rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait "
        "rt_sigqueueinfo rt_sigsuspend pread64 pwrite64 chown getcwd capget capset sigaltstack sendfile "
        "getpmsg putpmsg vfork ugetrlimit mmap2 truncate64 ftruncate64 stat64 lstat64 fstat64 lchown32 "
        "getuid32 getgid32 geteuid32 getegid32 setreuid32 setregid32 getgroups32 setgroups32 fchown32 "
        "setresuid32 getresuid32 setresgid32 getresgid32 chown32 setuid32 setgid32 setfsuid32 setfsgid32 "
        "pivot_root mincore madvise getdents64 fcntl64 224 gettid readahead setxattr lsetxattr fsetxattr "
        "getxattr lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr "
        "tkill sendfile64 futex sched_setaffinity sched_getaffinity set_thread_area get_thread_area "
        "io_setup io_destroy io_getevents io_submit io_cancel fadvise64 252 exit_group lookup_dcookie "
        "epoll_create epoll_ctl epoll_wait remap_file_pages set_tid_address timer_create timer_settime "
        "timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime clock_getres "
        "clock_nanosleep statfs64 fstatfs64 tgkill utimes fadvise64_64 vserver mbind get_mempolicy "
        "set_mempolicy mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify mq_getsetattr kexec_load "
        "waitid 286 add_key request_key keyctl ioprio_set ioprio_get inotify_init inotify_add_watch "
        "inotify_rm_watch migrate_pages openat mkdirat mknodat fchownat futimesat fstatat64 unlinkat "
        "renameat linkat symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list "
        "get_robust_list splice sync_file_range tee vmsplice move_pages getcpu epoll_pwait utimensat "
        "signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime signalfd4 eventfd2 "
        "epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg "
        "fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime syncfs "
        "sendmmsg setns process_vm_readv process_vm_writev kcmp finit_module sched_setattr sched_getattr "
        "renameat2 seccomp getrandom memfd_create bpf execveat socket socketpair bind connect listen "
        "accept4 getsockopt setsockopt getsockname getpeername sendto sendmsg recvfrom recvmsg shutdown "
        "userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free "
        "statx arch_prctl io_pgetevents rseq 393 semget semctl shmget shmctl shmat shmdt msgget msgsnd "
        "msgrcv msgctl",
    "SCMP_ARCH_AARCH64":
        "io_setup io_destroy io_submit io_cancel io_getevents setxattr lsetxattr fsetxattr getxattr "
        "lgetxattr fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr getcwd "
        "lookup_dcookie eventfd2 epoll_create1 epoll_ctl epoll_pwait dup dup3 fcntl inotify_init1 "
        "inotify_add_watch inotify_rm_watch ioctl ioprio_set ioprio_get flock mknodat mkdirat unlinkat "
        "symlinkat linkat renameat umount2 mount pivot_root nfsservctl statfs fstatfs truncate ftruncate "
        "fallocate faccessat chdir fchdir chroot fchmod fchmodat fchownat fchown openat close vhangup pipe2 "
        "quotactl getdents64 lseek read write readv writev pread64 pwrite64 preadv pwritev sendfile "
        "pselect6 ppoll signalfd4 vmsplice splice tee readlinkat newfstatat fstat sync fsync fdatasync "
        "sync_file_range timerfd_create timerfd_settime timerfd_gettime utimensat acct capget capset "
        "personality exit exit_group waitid set_tid_address unshare futex set_robust_list get_robust_list "
        "nanosleep getitimer setitimer kexec_load init_module delete_module timer_create timer_gettime "
        "timer_getoverrun timer_settime timer_delete clock_settime clock_gettime clock_getres "
        "clock_nanosleep syslog ptrace sched_setparam sched_setscheduler sched_getscheduler sched_getparam "
        "sched_setaffinity sched_getaffinity sched_yield sched_get_priority_max sched_get_priority_min "
        "sched_rr_get_interval restart_syscall kill tkill tgkill sigaltstack rt_sigsuspend rt_sigaction "
        "rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo rt_sigreturn setpriority getpriority "
        "reboot setregid setgid setreuid setuid setresuid getresuid setresgid getresgid setfsuid setfsgid "
        "times setpgid getpgid getsid setsid getgroups setgroups uname sethostname setdomainname getrlimit "
        "setrlimit getrusage umask prctl getcpu gettimeofday settimeofday adjtimex getpid getppid getuid "
        "geteuid getgid getegid gettid sysinfo mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify "
        "mq_getsetattr msgget msgctl msgrcv msgsnd semget semctl semtimedop semop shmget shmctl shmat shmdt "
        "socket socketpair bind listen accept connect getsockname getpeername sendto recvfrom setsockopt "
        "getsockopt shutdown sendmsg recvmsg readahead brk munmap mremap add_key request_key keyctl clone "
        "execve mmap fadvise64 swapon swapoff mprotect msync mlock munlock mlockall munlockall mincore "
        "madvise remap_file_pages mbind get_mempolicy set_mempolicy migrate_pages move_pages "
        "rt_tgsigqueueinfo perf_event_open accept4 recvmmsg 260 wait4 prlimit64 fanotify_init fanotify_mark "
        "name_to_handle_at open_by_handle_at clock_adjtime syncfs setns sendmmsg process_vm_readv "
        "process_vm_writev kcmp finit_module sched_setattr sched_getattr renameat2 seccomp getrandom "
        "memfd_create bpf execveat userfaultfd membarrier mlock2 copy_file_range preadv2 pwritev2 "
        "pkey_mprotect pkey_alloc pkey_free statx io_pgetevents rseq kexec_file_load",
    "SCMP_ARCH_ARM":
        "restart_syscall exit fork read write open close 8 creat link unlink execve chdir 14 mknod chmod "
        "lchown 19 lseek getpid mount 23 setuid getuid 26 ptrace 29 pause 33 access nice 36 sync kill "
        "rename mkdir rmdir dup pipe times 45 brk setgid getgid 49 geteuid getegid acct umount2 54 ioctl "
        "fcntl 57 setpgid 60 umask chroot ustat dup2 getppid getpgrp setsid sigaction 70 setreuid setregid "
        "sigsuspend sigpending sethostname setrlimit 77 getrusage gettimeofday settimeofday getgroups "
        "setgroups 83 symlink 85 readlink uselib swapon reboot 91 munmap truncate ftruncate fchmod fchown "
        "getpriority setpriority 99 statfs fstatfs 103 syslog setitimer getitimer stat lstat fstat 111 "
        "vhangup 114 wait4 swapoff sysinfo 118 fsync sigreturn clone setdomainname uname 124 adjtimex "
        "mprotect sigprocmask 128 init_module delete_module 131 quotactl getpgid fchdir bdflush sysfs "
        "personality 138 setfsuid setfsgid _llseek getdents _newselect flock msync readv writev getsid "
        "fdatasync _sysctl mlock munlock mlockall munlockall sched_setparam sched_getparam "
        "sched_setscheduler sched_getscheduler sched_yield sched_get_priority_max sched_get_priority_min "
        "sched_rr_get_interval nanosleep mremap setresuid getresuid 168 poll nfsservctl setresgid getresgid "
        "prctl rt_sigreturn rt_sigaction rt_sigprocmask rt_sigpending rt_sigtimedwait rt_sigqueueinfo "
        "rt_sigsuspend pread64 pwrite64 chown getcwd capget capset sigaltstack sendfile 190 vfork "
        "ugetrlimit mmap2 truncate64 ftruncate64 stat64 lstat64 fstat64 lchown32 getuid32 getgid32 "
        "geteuid32 getegid32 setreuid32 setregid32 getgroups32 setgroups32 fchown32 setresuid32 getresuid32 "
        "setresgid32 getresgid32 chown32 setuid32 setgid32 setfsuid32 setfsgid32 getdents64 pivot_root "
        "mincore madvise fcntl64 224 gettid readahead setxattr lsetxattr fsetxattr getxattr lgetxattr "
        "fgetxattr listxattr llistxattr flistxattr removexattr lremovexattr fremovexattr tkill sendfile64 "
        "futex sched_setaffinity sched_getaffinity io_setup io_destroy io_getevents io_submit io_cancel "
        "exit_group lookup_dcookie epoll_create epoll_ctl epoll_wait remap_file_pages 256 set_tid_address "
        "timer_create timer_settime timer_gettime timer_getoverrun timer_delete clock_settime clock_gettime "
        "clock_getres clock_nanosleep statfs64 fstatfs64 tgkill utimes arm_fadvise64_64 pciconfig_iobase "
        "pciconfig_read pciconfig_write mq_open mq_unlink mq_timedsend mq_timedreceive mq_notify "
        "mq_getsetattr waitid socket bind connect listen accept getsockname getpeername socketpair send "
        "sendto recv recvfrom shutdown setsockopt getsockopt sendmsg recvmsg semop semget semctl msgsnd "
        "msgrcv msgget msgctl shmat shmdt shmget shmctl add_key request_key keyctl semtimedop vserver "
        "ioprio_set ioprio_get inotify_init inotify_add_watch inotify_rm_watch mbind get_mempolicy "
        "set_mempolicy openat mkdirat mknodat fchownat futimesat fstatat64 unlinkat renameat linkat "
        "symlinkat readlinkat fchmodat faccessat pselect6 ppoll unshare set_robust_list get_robust_list "
        "splice arm_sync_file_range tee vmsplice move_pages getcpu epoll_pwait kexec_load utimensat "
        "signalfd timerfd_create eventfd fallocate timerfd_settime timerfd_gettime signalfd4 eventfd2 "
        "epoll_create1 dup3 pipe2 inotify_init1 preadv pwritev rt_tgsigqueueinfo perf_event_open recvmmsg "
        "accept4 fanotify_init fanotify_mark prlimit64 name_to_handle_at open_by_handle_at clock_adjtime "
        "syncfs sendmmsg setns process_vm_readv process_vm_writev kcmp finit_module sched_setattr "
        "sched_getattr renameat2 seccomp getrandom memfd_create bpf execveat userfaultfd membarrier mlock2 "
        "copy_file_range preadv2 pwritev2 pkey_mprotect pkey_alloc pkey_free statx rseq io_pgetevents "
        "migrate_pages kexec_file_load 983041 breakpoint cacheflush usr26 usr32 set_tls get_tls",
    "time64":
        "403 clock_gettime64 clock_settime64 clock_adjtime64 clock_getres_time64 clock_nanosleep_time64 "
        "timer_gettime64 timer_settime64 timerfd_gettime64 timerfd_settime64 utimensat_time64 "
        "pselect6_time64 ppoll_time64 416 io_pgetevents_time64 recvmmsg_time64 mq_timedsend_time64 "
        "mq_timedreceive_time64 semtimedop_time64 rt_sigtimedwait_time64 futex_time64 "
        "sched_rr_get_interval_time64",
    "common":
        "424 pidfd_send_signal io_uring_setup io_uring_enter io_uring_register open_tree move_mount fsopen "
        "fsconfig fsmount fspick pidfd_open clone3 close_range openat2 pidfd_getfd faccessat2 "
        "process_madvise epoll_pwait2 mount_setattr quotactl_fd landlock_create_ruleset landlock_add_rule "
        "landlock_restrict_self memfd_secret process_mrelease futex_waitv set_mempolicy_home_node cachestat "
        "fchmodat2 map_shadow_stack futex_wake futex_wait futex_requeue statmount listmount "
        "lsm_get_self_attr lsm_set_self_attr lsm_list_modules mseal setxattrat getxattrat listxattrat "
        "removexattrat open_tree_attr file_getattr file_setattr",
}
# x32 is x86-64 with a bit in the number: it lacks some calls and numbers others anew (pitfall 23)
X32_SYSCALL_BIT = 0x40000000
_X32_LACKS = ("_sysctl create_module epoll_ctl_old epoll_wait_old get_kernel_syms get_thread_area "
              "map_shadow_stack nfsservctl query_module set_thread_area uprobe uretprobe uselib vserver")
_X32_FROM_512 = (
    "rt_sigaction rt_sigreturn ioctl readv writev recvfrom sendmsg recvmsg execve ptrace rt_sigpending "
    "rt_sigtimedwait rt_sigqueueinfo sigaltstack timer_create mq_notify kexec_load waitid set_robust_list "
    "get_robust_list vmsplice move_pages preadv pwritev rt_tgsigqueueinfo recvmmsg sendmmsg process_vm_readv "
    "process_vm_writev setsockopt getsockopt io_setup io_submit execveat preadv2 pwritev2")

# Calls that i386 also reaches through a multiplexer, which tells them apart by the low half of its first
# argument
_I386_MULTIPLEXED = {
    "socketcall": "1 socket bind connect listen accept getsockname getpeername socketpair send recv sendto "
                  "recvfrom shutdown setsockopt getsockopt sendmsg recvmsg accept4 recvmmsg sendmmsg",
    "ipc": "1 semop semget semctl semtimedop 11 msgsnd msgrcv msgget msgctl 21 shmat shmdt shmget shmctl",
}


class _Machine(NamedTuple):
    """What a machine calls itself in Go, and the calling conventions its kernel offers, its own first."""

    go_name: str
    conventions: tuple[str, ...]


_MACHINES = {"x86_64": _Machine("amd64", ("SCMP_ARCH_X86_64", "SCMP_ARCH_X86", "SCMP_ARCH_X32")),
             "aarch64": _Machine("arm64", ("SCMP_ARCH_AARCH64", "SCMP_ARCH_ARM"))}
# AUDIT_ARCH_* of <linux/audit.h>, by which the kernel tells a filter of the calling convention
_AUDIT_ARCHITECTURES = {"SCMP_ARCH_X86_64": 0xC000003E, "SCMP_ARCH_X32": 0xC000003E,
                        "SCMP_ARCH_X86": 0x40000003, "SCMP_ARCH_AARCH64": 0xC00000B7,
                        "SCMP_ARCH_ARM": 0x40000028}
_OTHER_ARCHITECTURES = frozenset("SCMP_ARCH_" + name for name in (
    "LOONGARCH64 M68K MIPS MIPS64 MIPS64N32 MIPSEL MIPSEL64 MIPSEL64N32 PARISC PARISC64 PPC PPC64 PPC64LE "
    "RISCV64 S390 S390X SH SHEB").split())


def _numbered(names: str) -> dict[str, int]:
    """{name: number} of a row of names in which a number sets the next one's."""
    numbers, number = {}, 0
    for word in names.split():
        if word.isdigit():
            number = int(word)
        else:
            numbers[word] = number
            number += 1
    return numbers


@functools.cache
def syscall_numbers(convention: str) -> dict[str, int]:
    """The number of each system call by name under the calling convention `convention` (SCMP_ARCH_*)."""
    if convention == "SCMP_ARCH_X32":
        numbers = dict(syscall_numbers("SCMP_ARCH_X86_64"))
        for name in _X32_LACKS.split():
            del numbers[name]
        numbers.update(_numbered("512 " + _X32_FROM_512))
        return {name: number | X32_SYSCALL_BIT for name, number in numbers.items()}
    numbers = _numbered(f"{_SYSCALL_NAMES[convention]} {_SYSCALL_NAMES['common']}")
    if convention in ("SCMP_ARCH_X86", "SCMP_ARCH_ARM"):
        numbers.update(_numbered(_SYSCALL_NAMES["time64"]))
    if convention == "SCMP_ARCH_ARM":
        numbers["sync_file_range2"] = numbers["arm_sync_file_range"]
    return numbers


# Docker's default profile: what every process may call, then what depends on something.  Rows for machines
# that this daemon does not run on are left out.

_DEFAULT_ALLOWED = (
    "_llseek _newselect accept accept4 access adjtimex alarm bind brk cachestat capget capset chdir chmod "
    "chown chown32 clock_adjtime clock_adjtime64 clock_getres clock_getres_time64 clock_gettime "
    "clock_gettime64 clock_nanosleep clock_nanosleep_time64 close close_range connect copy_file_range creat "
    "dup dup2 dup3 epoll_create epoll_create1 epoll_ctl epoll_ctl_old epoll_pwait epoll_pwait2 epoll_wait "
    "epoll_wait_old eventfd eventfd2 execve execveat exit exit_group faccessat faccessat2 fadvise64 "
    "fadvise64_64 fallocate fanotify_mark fchdir fchmod fchmodat fchmodat2 fchown fchown32 fchownat fcntl "
    "fcntl64 fdatasync fgetxattr flistxattr flock fork fremovexattr fsetxattr fstat fstat64 fstatat64 "
    "fstatfs fstatfs64 fsync ftruncate ftruncate64 futex futex_requeue futex_time64 futex_wait futex_waitv "
    "futex_wake futimesat get_robust_list get_thread_area getcpu getcwd getdents getdents64 getegid "
    "getegid32 geteuid geteuid32 getgid getgid32 getgroups getgroups32 getitimer getpeername getpgid getpgrp "
    "getpid getppid getpriority getrandom getresgid getresgid32 getresuid getresuid32 getrlimit getrusage "
    "getsid getsockname getsockopt gettid gettimeofday getuid getuid32 getxattr getxattrat inotify_add_watch "
    "inotify_init inotify_init1 inotify_rm_watch io_cancel io_destroy io_getevents io_pgetevents "
    "io_pgetevents_time64 io_setup io_submit ioctl ioprio_get ioprio_set ipc kill landlock_add_rule "
    "landlock_create_ruleset landlock_restrict_self lchown lchown32 lgetxattr link linkat listen listmount "
    "listxattr listxattrat llistxattr lremovexattr lseek lsetxattr lstat lstat64 madvise map_shadow_stack "
    "membarrier memfd_create memfd_secret mincore mkdir mkdirat mknod mknodat mlock mlock2 mlockall mmap "
    "mmap2 mprotect mq_getsetattr mq_notify mq_open mq_timedreceive mq_timedreceive_time64 mq_timedsend "
    "mq_timedsend_time64 mq_unlink mremap mseal msgctl msgget msgrcv msgsnd msync munlock munlockall munmap "
    "name_to_handle_at nanosleep newfstatat open openat openat2 pause pidfd_open pidfd_send_signal pipe "
    "pipe2 pkey_alloc pkey_free pkey_mprotect poll ppoll ppoll_time64 prctl pread64 preadv preadv2 prlimit64 "
    "process_mrelease pselect6 pselect6_time64 pwrite64 pwritev pwritev2 read readahead readlink readlinkat "
    "readv recv recvfrom recvmmsg recvmmsg_time64 recvmsg remap_file_pages removexattr removexattrat rename "
    "renameat renameat2 restart_syscall riscv_hwprobe rmdir rseq rt_sigaction rt_sigpending rt_sigprocmask "
    "rt_sigqueueinfo rt_sigreturn rt_sigsuspend rt_sigtimedwait rt_sigtimedwait_time64 rt_tgsigqueueinfo "
    "sched_get_priority_max sched_get_priority_min sched_getaffinity sched_getattr sched_getparam "
    "sched_getscheduler sched_rr_get_interval sched_rr_get_interval_time64 sched_setaffinity sched_setattr "
    "sched_setparam sched_setscheduler sched_yield seccomp select semctl semget semop semtimedop "
    "semtimedop_time64 send sendfile sendfile64 sendmmsg sendmsg sendto set_robust_list set_thread_area "
    "set_tid_address setfsgid setfsgid32 setfsuid setfsuid32 setgid setgid32 setgroups setgroups32 setitimer "
    "setpgid setpriority setregid setregid32 setresgid setresgid32 setresuid setresuid32 setreuid setreuid32 "
    "setrlimit setsid setsockopt setuid setuid32 setxattr setxattrat shmat shmctl shmdt shmget shutdown "
    "sigaltstack signalfd signalfd4 sigprocmask sigreturn socketcall socketpair splice stat stat64 statfs "
    "statfs64 statmount statx symlink symlinkat sync sync_file_range syncfs sysinfo tee tgkill time "
    "timer_create timer_delete timer_getoverrun timer_gettime timer_gettime64 timer_settime timer_settime64 "
    "timerfd_create timerfd_gettime timerfd_gettime64 timerfd_settime timerfd_settime64 times tkill truncate "
    "truncate64 ugetrlimit umask uname unlink unlinkat uretprobe utime utimensat utimensat_time64 utimes "
    "vfork vmsplice wait4 waitid waitpid write writev")
_DEFAULT_CONDITIONAL = (
    ("minKernel", "4.8", "process_vm_readv process_vm_writev ptrace"),
    ("arches", "arm arm64", "arm_fadvise64_64 arm_sync_file_range sync_file_range2 breakpoint cacheflush "
     "set_tls"),
    ("arches", "amd64 x32", "arch_prctl"),
    ("arches", "amd64 x32 x86", "modify_ldt"),
    ("caps", "CAP_DAC_READ_SEARCH", "open_by_handle_at"),
    ("caps", "CAP_SYS_ADMIN", "bpf clone clone3 fanotify_init fsconfig fsmount fsopen fspick lookup_dcookie "
     "lsm_get_self_attr lsm_list_modules lsm_set_self_attr mount mount_setattr move_mount open_tree "
     "perf_event_open quotactl quotactl_fd setdomainname sethostname setns syslog umount umount2 unshare"),
    ("caps", "CAP_SYS_BOOT", "reboot"),
    ("caps", "CAP_SYS_CHROOT", "chroot"),
    ("caps", "CAP_SYS_MODULE", "delete_module init_module finit_module"),
    ("caps", "CAP_SYS_PACCT", "acct"),
    ("caps", "CAP_SYS_PTRACE", "kcmp pidfd_getfd process_madvise process_vm_readv process_vm_writev ptrace"),
    ("caps", "CAP_SYS_RAWIO", "iopl ioperm"),
    ("caps", "CAP_SYS_TIME", "settimeofday stime clock_settime clock_settime64"),
    ("caps", "CAP_SYS_TTY_CONFIG", "vhangup"),
    ("caps", "CAP_SYS_NICE", "get_mempolicy mbind set_mempolicy set_mempolicy_home_node"),
    ("caps", "CAP_SYSLOG", "syslog"),
    ("caps", "CAP_BPF", "bpf"),
    ("caps", "CAP_PERFMON", "perf_event_open"),
)
# (system call, SCMP_CMP_*, value of its first argument): no AF_VSOCK (40) and no family 38, AF_ALG; the
# personalities Linux, UNAME26, ADDR_NO_RANDOMIZE, both, and the query
_DEFAULT_ARGUMENTS = (("socket", "LT", 38), ("socket", "EQ", 39), ("socket", "GT", 40),
                      *(("personality", "EQ", value) for value in (0, 8, 0x20000, 0x20008, 0xFFFFFFFF)))
_NEW_NAMESPACES = 0x7E020000  # CLONE_NEW{NS,CGROUP,UTS,IPC,USER,PID,NET}


def default_seccomp_profile() -> dict[str, Any]:
    """Docker's default profile in the JSON format, for this daemon's machines."""
    def rule(names: str, action: str = "SCMP_ACT_ALLOW", **more: Any) -> dict[str, Any]:
        return {"names": names.split(), "action": action, **more}

    without_admin = {"caps": ["CAP_SYS_ADMIN"]}
    no_namespaces = {"index": 0, "value": _NEW_NAMESPACES, "op": "SCMP_CMP_MASKED_EQ"}
    return {
        "defaultAction": "SCMP_ACT_ERRNO", "defaultErrnoRet": errno.EPERM,
        "archMap": [{"architecture": own, "subArchitectures": others}
                    for own, *others in (machine.conventions for machine in _MACHINES.values())],
        "syscalls": [
            rule(_DEFAULT_ALLOWED),
            *(rule(name, args=[{"index": 0, "value": value, "op": "SCMP_CMP_" + operator}])
              for name, operator, value in _DEFAULT_ARGUMENTS),
            *(rule(names, includes={key: value if key == "minKernel" else value.split()})
              for key, value, names in _DEFAULT_CONDITIONAL),
            rule("clone", args=[no_namespaces], excludes=without_admin),
            rule("clone3", "SCMP_ACT_ERRNO", errnoRet=errno.ENOSYS, excludes=without_admin),
        ],
    }


# <linux/seccomp.h>: the action in the upper half of what a filter returns, an errno or a tracer's message
# below
_SECCOMP_ACTIONS = {"KILL": 0, "KILL_THREAD": 0, "KILL_PROCESS": 0x80000000, "TRAP": 0x00030000,
                    "ERRNO": 0x00050000, "TRACE": 0x7FF00000, "LOG": 0x7FFC0000, "ALLOW": 0x7FFF0000}
_SECCOMP_FLAGS = {"SECCOMP_FILTER_FLAG_TSYNC": 1, "SECCOMP_FILTER_FLAG_LOG": 2,
                  "SECCOMP_FILTER_FLAG_SPEC_ALLOW": 4}
_SECCOMP_OPERATORS = ("NE", "LT", "LE", "EQ", "GE", "GT", "MASKED_EQ")
_BAD_ARCHITECTURE = _SECCOMP_ACTIONS["KILL_THREAD"]
_UNKNOWN_SYSCALL = _SECCOMP_ACTIONS["ERRNO"] | errno.ENOSYS
BPF_MAXIMUM_LENGTH = 4096

# <linux/filter.h>
BPF_AND, BPF_JEQ, BPF_JGE, BPF_JGT, BPF_JUMP, BPF_LOAD, BPF_RETURN = 0x54, 0x15, 0x35, 0x25, 0x05, 0x20, 0x06


class Condition(NamedTuple):
    """A test of one argument (64 bits): `argument OPERATOR value`, or `argument & value == second`."""

    argument: int
    operator: str
    value: int
    second: int


class Rule(NamedTuple):
    """What becomes of a call whose arguments meet all of the conditions."""

    conditions: tuple[Condition, ...]
    action: int


class Choice(NamedTuple):
    """What becomes of a call that depends on its arguments: the first rule that holds, else `default`."""

    rules: tuple[Rule, ...]
    default: int
    wide: bool  # whether the calling convention has 64-bit arguments


_Decision = Union[int, Choice]
_Ranges = list[tuple[int, _Decision]]   # (first number of a range, decision), in order


class _Assembler:
    """A classic BPF program, written from its end to its start: then every jump goes to what is there
    already.

    A label is the number of instructions from the labelled one to the end."""

    def __init__(self) -> None:
        self.code: list[bytes] = []
        self._returns: dict[_Decision, int] = {}

    def emit(self, operation: int, k: int, true: int = 0, false: int = 0) -> int:
        """Put an instruction in front; its label."""
        self.code.append(struct.pack("=HBBI", operation, true, false, k))
        return len(self.code)

    def _near(self, label: int) -> int:
        """`label`, or that of a long jump to it where a conditional jump would not reach."""
        distance = len(self.code) - label
        return label if distance < 255 else self.emit(BPF_JUMP, distance)

    def jump(self, operation: int, k: int, true: int, false: int) -> int:
        """Compare the accumulator with `k` and go to one of two labels."""
        true, false = self._near(true), self._near(false)
        return self.emit(operation, k, len(self.code) - true, len(self.code) - false)

    def before(self, label: int, operation: int, k: int) -> int:
        """An instruction that runs on into `label`."""
        if label != len(self.code):
            self.emit(BPF_JUMP, len(self.code) - label)
        return self.emit(operation, k)

    def decide(self, decision: _Decision) -> int:
        """The code of an action or a choice; what is near is used again."""
        label = self._returns.get(decision)
        if label is None or len(self.code) - label > 200:
            label = self.emit(BPF_RETURN, decision) if isinstance(decision, int) else self._choose(decision)
            self._returns[decision] = label
        return label

    def _choose(self, choice: Choice) -> int:
        label = self.decide(choice.default)
        for rule in reversed(choice.rules):
            target = self.decide(rule.action)
            for condition in reversed(rule.conditions):
                target = self._test(condition, target, label, choice.wide)
            label = target
        return label

    def _test(self, condition: Condition, true: int, false: int, wide: bool) -> int:
        """One condition, lower word last; a calling convention of 32 bits has only that.  seccomp_data,
        seccomp(2)."""
        argument, operator, value, second = condition
        if operator in ("NE", "LT", "LE"):
            operator, true, false = {"NE": "EQ", "LT": "GE", "LE": "GT"}[operator], false, true
        masked = operator == "MASKED_EQ"
        compare = {"GE": BPF_JGE, "GT": BPF_JGT}.get(operator, BPF_JEQ)
        word = 16 + 8 * argument
        goal = second if masked else value
        label = self.jump(compare, goal & 0xFFFFFFFF, true, false)
        if masked:
            label = self.emit(BPF_AND, value & 0xFFFFFFFF)
        label = self.emit(BPF_LOAD, word)
        if not wide or masked and not (value | second) >> 32:
            return label
        label = self.jump(BPF_JEQ, goal >> 32, label, false)
        if masked:
            self.emit(BPF_AND, value >> 32)
        elif compare != BPF_JEQ:
            label = self.jump(BPF_JGT, goal >> 32, true, label)
        return self.emit(BPF_LOAD, word + 4)

    def tree(self, ranges: _Ranges) -> int:
        """A balanced search for the range (first number, decision) that the accumulator lies in."""
        if len(ranges) == 1:
            return self.decide(ranges[0][1])
        middle = len(ranges) // 2
        upper, lower = self.tree(ranges[middle:]), self.tree(ranges[:middle])
        return self.jump(BPF_JGE, ranges[middle][0], upper, lower)


def _seccomp_action(name: str, code: Optional[int]) -> int:
    """The return value of a filter for SCMP_ACT_*; `code` is the errno, or the message to a tracer, 1 by
    default."""
    action = name.partition("SCMP_ACT_")[2]
    if action == "NOTIFY":
        raise NotSupported("the seccomp action SCMP_ACT_NOTIFY needs a listener, and this daemon has none")
    if action not in _SECCOMP_ACTIONS or not name.startswith("SCMP_ACT_"):
        raise BadParameter(f"string {name} is not a valid action for seccomp")
    data = (errno.EPERM if code is None else code & 0xFFFF) if action in ("ERRNO", "TRACE") else 0
    return _SECCOMP_ACTIONS[action] | data


def _seccomp_condition(argument: dict[str, Any]) -> Condition:
    operator = argument.get("op", "")
    if operator.partition("SCMP_CMP_")[2] not in _SECCOMP_OPERATORS or not operator.startswith("SCMP_CMP_"):
        raise BadParameter(f"string {operator} is not a valid operator for seccomp")
    index, value, second = (argument.get(key, 0) for key in ("index", "value", "valueTwo"))
    if not 0 <= index <= 5:
        raise BadParameter(f"seccomp rule for the argument {index}: a system call has the arguments 0 to 5")
    if not (0 <= value < 1 << 64 and 0 <= second < 1 << 64):
        raise ValueError(f"the value of an argument is not an unsigned number of 64 bits: {argument}")
    return Condition(index, operator[9:], value, second)


def _kernel_version(text: str) -> tuple[int, int]:
    match = re.match(r"(\d+)\.(\d+)", text)
    if not match:
        raise BadParameter(f"invalid kernel version in the seccomp profile: {text}")
    return int(match[1]), int(match[2])


def _applicable(profile: dict[str, Any], capabilities: frozenset[str], machine: _Machine,
                kernel: str) -> list[dict[str, Any]]:
    """The rows of a profile whose includes and excludes let them stand for this container, machine and
    kernel."""
    def tests(only: dict[str, Any]) -> Iterator[bool]:
        yield from (name in capabilities for name in only.get("caps") or ())
        if only.get("arches"):
            yield machine.go_name in only["arches"]
        if only.get("minKernel"):
            yield _kernel_version(only["minKernel"]) <= _kernel_version(kernel)

    return [call for call in profile.get("syscalls") or ()
            if not any(tests(call.get("excludes") or {})) and all(tests(call.get("includes") or {}))]


def _call_rules(call: dict[str, Any]) -> list[Rule]:
    """The rules of a row; conditions on one and the same argument are alternatives, as runc has it."""
    action = _seccomp_action(call.get("action", ""), call.get("errnoRet"))
    conditions = [_seccomp_condition(argument) for argument in call.get("args") or ()]
    if len({condition.argument for condition in conditions}) < len(conditions):
        return [Rule((condition,), action) for condition in conditions]
    return [Rule(tuple(conditions), action)]


def _conventions(profile: dict[str, Any], machine: _Machine) -> list[str]:
    """The calling conventions that the profile lets in, of those that the kernel offers; its own always."""
    if profile.get("architectures") and profile.get("archMap"):
        raise BadParameter("both 'architectures' and 'archMap' are specified in the seccomp profile, use "
                           "either 'architectures' or 'archMap'")
    named = list(profile.get("architectures") or ()) + next(
        (entry.get("subArchitectures") or [] for entry in profile.get("archMap") or ()
         if entry["architecture"] == machine.conventions[0]), [])
    for name in named:
        if name not in _AUDIT_ARCHITECTURES and name not in _OTHER_ARCHITECTURES:
            raise BadParameter(f"string {name} is not a valid arch for seccomp")
    return [name for name in machine.conventions if name == machine.conventions[0] or name in named]


def _named_calls(call: dict[str, Any]) -> list[str]:
    if call.get("name") and call.get("names"):
        raise BadParameter("both 'name' and 'names' are specified in the seccomp profile, use either 'name' "
                           "or 'names'")
    return [call["name"]] if call.get("name") else list(call.get("names") or ())


def _multiplexed(name: str) -> Optional[tuple[str, Rule]]:
    """(multiplexer, rule without its action) by which i386 reaches the call `name` as well."""
    for multiplexer, calls in _I386_MULTIPLEXED.items():
        number = _numbered(calls).get(name)
        if number is not None:
            return multiplexer, Rule((Condition(0, "MASKED_EQ", 0xFFFF, number),), 0)
    return None


def _syscall_ranges(convention: str, rows: list[tuple[list[str], list[Rule]]], default: int) -> _Ranges:
    """The ranges (first number, decision) of one calling convention, in order, from its number 0 on.

    Of several rules for a call one without conditions counts, else the first that holds; those that say what
    the default says are no rules: libseccomp's ways.  Above the last call that the profile names the answer
    is ENOSYS, as runc has it, so that programs fall back from calls that are newer than the profile."""
    numbers, calls = syscall_numbers(convention), {}  # type: dict[str, int], dict[int, list[Rule]]
    for names, rules in rows:
        for name in names:
            if name not in numbers:
                continue
            calls.setdefault(numbers[name], []).extend(rule for rule in rules if rule.action != default)
            other = _multiplexed(name) if convention == "SCMP_ARCH_X86" else None
            if other is not None:
                calls.setdefault(numbers[other[0]], []).extend(
                    other[1]._replace(action=rule.action) for rule in rules if rule.action != default)
    wide = convention in ("SCMP_ARCH_X86_64", "SCMP_ARCH_AARCH64")
    number = X32_SYSCALL_BIT if convention == "SCMP_ARCH_X32" else 0
    ranges: _Ranges = [(number, default)]
    for number in sorted(calls):
        always = next((rule.action for rule in calls[number] if not rule.conditions), None)
        choice = Choice(tuple(calls[number]), default, wide) if calls[number] else default
        ranges += [(number, choice if always is None else always), (number + 1, default)]
    permissive = {_SECCOMP_ACTIONS[name] for name in ("ALLOW", "LOG", "TRACE")}
    if calls and default & 0xFFFF0000 not in permissive:
        ranges[-1] = (number + 1, _UNKNOWN_SYSCALL)
    return ranges


def _merged(ranges: _Ranges) -> _Ranges:
    """The ranges without empty ones and without those that go on as the one before."""
    merged: _Ranges = []
    for (first, decision), (following, _) in zip(ranges, [*ranges[1:], (-1, 0)]):
        if first != following and not (merged and merged[-1][1] == decision):
            merged.append((first, decision))
    return merged


@functools.lru_cache(maxsize=64)
def _compiled(text: Optional[str], capabilities: frozenset[str], machine_name: str, kernel: str) -> bytes:
    profile = default_seccomp_profile() if text is None else json.loads(text)
    if not profile.get("defaultAction") and not profile.get("syscalls"):
        return b""
    machine = _MACHINES[machine_name]
    default = _seccomp_action(profile.get("defaultAction", ""), profile.get("defaultErrnoRet"))
    rows = [(_named_calls(call), _call_rules(call))
            for call in _applicable(profile, capabilities, machine, kernel)]
    conventions = _conventions(profile, machine)
    spaces: dict[int, _Ranges] = {}
    for name in conventions:
        spaces.setdefault(_AUDIT_ARCHITECTURES[name], []).extend(_syscall_ranges(name, rows, default))
    if machine_name == "x86_64" and "SCMP_ARCH_X32" not in conventions:
        spaces[_AUDIT_ARCHITECTURES["SCMP_ARCH_X86_64"]].append((X32_SYSCALL_BIT, _BAD_ARCHITECTURE))
    return _assemble(spaces)


def _assemble(spaces: dict[int, _Ranges]) -> bytes:
    """The program for the ranges of each AUDIT_ARCH_*; any other is killed."""
    program = _Assembler()
    entries = [(audit, program.before(program.tree(_merged(ranges)), BPF_LOAD, 0))
               for audit, ranges in reversed(spaces.items())]
    label = program.decide(_BAD_ARCHITECTURE)
    for audit, entry in entries:
        label = program.jump(BPF_JEQ, audit, entry, label)
    program.before(label, BPF_LOAD, 4)
    if len(program.code) > BPF_MAXIMUM_LENGTH:
        raise BadParameter(f"the seccomp profile needs {len(program.code)} BPF instructions, and the kernel "
                           f"takes {BPF_MAXIMUM_LENGTH}: name fewer system calls with conditions")
    return b"".join(reversed(program.code))


def compile_seccomp(profile: Union[str, dict[str, Any], None], capabilities: Iterable[str], machine: str = "",
                    kernel: str = "") -> bytes:
    """The classic BPF program of a profile for a container with these capabilities ("CAP_..."), for
    seccomp_load.

    `profile` is None for Docker's default, or the JSON format as text or decoded; `machine` and `kernel` are
    uname's, by default this host's.  Empty for a profile that confines nothing, and on a machine without
    tables.  BadParameter for what is no profile.  Unknown system calls are passed over.  Programs are kept
    and given again."""
    uname = os.uname()
    machine, kernel = machine or uname.machine, kernel or uname.release
    text = profile if profile is None or isinstance(profile, str) else json.dumps(profile)
    if machine not in _MACHINES:
        return b""
    try:
        return _compiled(text, frozenset(capabilities), machine, kernel)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise BadParameter(f"Decoding seccomp profile failed: {error}") from None


def oci_seccomp(profile: Optional[dict[str, Any]], capabilities: Iterable[str]) -> dict[str, Any]:
    """A profile (None: Docker's default) for a container with these capabilities as runtime-spec has it."""
    uname, given = os.uname(), frozenset(capabilities)
    profile = default_seccomp_profile() if profile is None else profile
    kept = {key: profile[key] for key in ("defaultAction", "defaultErrnoRet", "flags") if key in profile}
    machine = _MACHINES[uname.machine]
    calls = _applicable(profile, given, machine, uname.release)
    return {**kept, "architectures": list(_conventions(profile, machine)),
            "syscalls": [{"names": list(_named_calls(call)), **{
                key: call[key] for key in ("action", "errnoRet", "args") if call.get(key) is not None}}
                for call in calls]}


def seccomp_flags(profile: Union[str, dict[str, Any], None] = None) -> int:
    """The SECCOMP_FILTER_FLAG_* that a profile asks for; one that names none leaves speculation alone, as
    runc."""
    names = ((json.loads(profile) if isinstance(profile, str) else profile) or {}).get("flags")
    if names is None:
        return _SECCOMP_FLAGS["SECCOMP_FILTER_FLAG_SPEC_ALLOW"]
    unknown = [name for name in names if name not in _SECCOMP_FLAGS]
    if unknown:
        raise BadParameter(f"seccomp flag {unknown[0]} is not a valid flag for seccomp")
    return functools.reduce(int.__or__, (_SECCOMP_FLAGS[name] for name in names), 0)


# ------------------------------------------------------------------------------------------------------------
# Execution driver: cgroups
#
# A container's place in the cgroup file systems, version 1, version 2, or both at once (hybrid: controllers
# of v1, and a v2 tree that only groups).  What a host lacks is found out once, logged once, shown by info,
# and left out.  The daemon makes the directories and writes the limits; the init joins by writing "0" to
# `tasks` of v1 (cgroup.procs waits for a grace period) and is born into the v2 directory.  Sources:
# cgroups(7), the kernel's Documentation/admin-guide/cgroup-v1 and cgroup-v2.rst; conversions from v1's units
# to v2's as runc makes them.
# ------------------------------------------------------------------------------------------------------------

# What every container may do with devices, as v1's devices.allow takes it: make any node, use the harmless
# ones
_DEVICE_RULES = ("b *:* m", "c *:* m", "c 1:3 rwm", "c 1:5 rwm", "c 1:7 rwm", "c 1:8 rwm", "c 1:9 rwm",
                 "c 5:0 rwm", "c 5:1 rwm", "c 5:2 rwm", "c 10:200 rwm", "c 136:* rwm")
_DEVICE_RULE = re.compile(r"([acb]) ([0-9]+|\*):([0-9]+|\*) ([rwm]{1,3})", re.ASCII)
_REMOVE_SECONDS = 10.0
_FREEZE_SECONDS = 10.0
_MINIMUM_MEMORY = 6 << 20


# (HostConfig's key, v1's file, v2's key in io.max) of the limits by device
_BLKIO_RATES = (("BlkioDeviceReadBps", "blkio.throttle.read_bps_device", "rbps"),
                ("BlkioDeviceWriteBps", "blkio.throttle.write_bps_device", "wbps"),
                ("BlkioDeviceReadIOps", "blkio.throttle.read_iops_device", "riops"),
                ("BlkioDeviceWriteIOps", "blkio.throttle.write_iops_device", "wiops"))


class _Support(NamedTuple):
    """Something that a host's cgroups may lack: where v1 and v2 have it, and info's warning."""

    flag: str
    controller: str
    file: str           # in a v1 hierarchy's root; "" for what only children have; alternatives with spaces
    unified: str        # the v2 controller, "" where v2 has no such thing
    warning: str = ""
    v2_warning: str = ""    # where it is another one


_SUPPORT = (
    _Support("MemoryLimit", "memory", "memory.limit_in_bytes", "memory", "No memory limit support"),
    _Support("SwapLimit", "memory", "memory.memsw.limit_in_bytes", "memory", "No swap limit support"),
    _Support("KernelMemoryTCP", "memory", "memory.kmem.tcp.limit_in_bytes", "",
             "No kernel memory TCP limit support"),
    _Support("OomKillDisable", "memory", "memory.oom_control", "", "No oom kill disable support"),
    _Support("CpuCfsQuota", "cpu", "cpu.cfs_quota_us", "cpu", "No cpu cfs quota support"),
    _Support("CpuCfsPeriod", "cpu", "cpu.cfs_period_us", "cpu", "No cpu cfs period support"),
    _Support("CPUShares", "cpu", "cpu.shares", "cpu", "No cpu shares support"),
    _Support("CPUSet", "cpuset", "cpuset.cpus", "cpuset", "No cpuset support"),
    _Support("PidsLimit", "pids", "", "pids"),
    _Support("MemorySwappiness", "memory", "memory.swappiness", ""),
    _Support("MemoryReservation", "memory", "memory.soft_limit_in_bytes", "memory"),
    _Support("RealTime", "cpu", "cpu.rt_runtime_us", ""),
    _Support("BlkioWeight", "blkio", "blkio.weight blkio.bfq.weight", "io", "", "No io.weight support"),
    _Support("BlkioWeightDevice", "blkio", "blkio.weight_device blkio.bfq.weight_device", "io", "",
             "No io.weight (per device) support"),
    *(_Support(key, "blkio", file, "io", f"No {file.replace('.', ' ', 1)} support",
               f"No io.max ({name}) support") for key, file, name in _BLKIO_RATES),
)
_INFO_FLAGS = ("MemoryLimit", "SwapLimit", "KernelMemoryTCP", "CpuCfsPeriod", "CpuCfsQuota", "CPUShares",
               "CPUSet", "PidsLimit", "OomKillDisable")
# (HostConfig's keys, what they need, the middle and the end of Docker's warning, what the keys become)
_DISCARDS: tuple[tuple[str, str, str, str, Any], ...] = (
    ("Memory", "MemoryLimit", "memory limit capabilities", "Limitation", 0),
    ("MemorySwappiness", "MemorySwappiness", "memory swappiness capabilities", "Memory swappiness", None),
    ("MemoryReservation", "MemoryReservation", "memory soft limit capabilities", "Limitation", 0),
    ("OomKillDisable", "OomKillDisable", "OomKillDisable", "OomKillDisable", None),
    ("PidsLimit", "PidsLimit", "PIDs limit capabilities", "PIDs limit", None),
    ("CpuShares", "CPUShares", "CPU shares", "Shares", 0),
    ("CpuPeriod", "CpuCfsPeriod", "CPU CFS scheduler", "Period", 0),
    ("CpuQuota", "CpuCfsQuota", "CPU CFS scheduler", "Quota", 0),
    ("CpusetCpus CpusetMems", "CPUSet", "cpuset", "Cpuset", ""),
    ("BlkioWeight", "BlkioWeight", "Block I/O weight", "Weight", 0),
    ("BlkioWeightDevice", "BlkioWeightDevice", "Block I/O weight_device", "Weight-device", []),
    ("BlkioDeviceReadBps", "BlkioDeviceReadBps", "BPS Block I/O read limit", "Block I/O BPS read limit", []),
    ("BlkioDeviceWriteBps", "BlkioDeviceWriteBps", "BPS Block I/O write limit",
     "Block I/O BPS write limit", []),
    ("BlkioDeviceReadIOps", "BlkioDeviceReadIOps", "IOPS Block read limit",
     "Block I/O IOPS read limit", []),
    ("BlkioDeviceWriteIOps", "BlkioDeviceWriteIOps", "IOPS Block write limit",
     "Block I/O IOPS write limit", []),
)
# The members of the memory_stats.stats of GET /containers/ID/stats: of v1 each also as total_*, of v2
_V1_MEMORY = tuple(f"{prefix}{name}" for prefix in ("", "total_") for name in (
    "active_anon active_file cache dirty inactive_anon inactive_file mapped_file pgfault pgmajfault pgpgin "
    "pgpgout rss rss_huge unevictable writeback").split()) + tuple(
    f"hierarchical_{name}_limit" for name in ("memory", "memsw"))
_V2_MEMORY = tuple("""
    active_anon active_file anon anon_thp file file_dirty file_mapped file_writeback inactive_anon
    inactive_file kernel_stack pgactivate pgdeactivate pgfault pglazyfree pglazyfreed pgmajfault pgrefill
    pgscan pgsteal shmem slab slab_reclaimable slab_unreclaimable sock thp_collapse_alloc thp_fault_alloc
    unevictable workingset_activate workingset_nodereclaim workingset_refault""".split())
_BLKIO_STATS = ("io_service_bytes_recursive", "io_serviced_recursive", "io_queue_recursive",
                "io_service_time_recursive", "io_wait_time_recursive", "io_merged_recursive",
                "io_time_recursive", "sectors_recursive")
NO_CPU_STATS: dict[str, Any] = {
    "cpu_usage": {"total_usage": 0, "usage_in_kernelmode": 0, "usage_in_usermode": 0},
    "throttling_data": {"periods": 0, "throttled_periods": 0, "throttled_time": 0}}
NO_STATS: dict[str, Any] = {  # of a container that does not run
    "pids_stats": {}, "blkio_stats": dict.fromkeys(_BLKIO_STATS), "num_procs": 0, "storage_stats": {},
    "cpu_stats": NO_CPU_STATS, "memory_stats": {}}


class Setting(NamedTuple):
    """A text to write into a file of a cgroup."""

    controller: str     # of v1; "" on v2
    file: str
    text: str


class Hierarchy(NamedTuple):
    """A mounted cgroup tree."""

    controllers: tuple[str, ...]  # of v1, a named tree has "name=..."; () is the tree of v2
    path: str                       # where it is mounted
    own: str                        # the daemon's own cgroup in it, from `path` on


def read_hierarchies(mountinfo: str, membership: str) -> list[Hierarchy]:
    """The cgroup trees in the order of their mounts, from /proc/self/mountinfo and /proc/self/cgroup;
    proc(5).

    Of several mounts of one tree the first counts."""
    own = {}
    for line in membership.splitlines():
        _, names, path = line.split(":", 2)
        own[names] = path
    known = ",".join(own).split(",")
    found: dict[str, Hierarchy] = {}
    for line in mountinfo.splitlines():
        place, _, rest = line.partition(" - ")
        kind, _, options = rest.split(" ", 2)
        names = ",".join(name for name in options.split(",") if name in known) if kind == "cgroup" else ""
        if kind != "cgroup2" and not names:
            continue
        mounted_root, mount_point = place.split(" ")[3:5]
        mount_point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), mount_point)
        mine = next((path for key, path in own.items() if set(key.split(",")) == set(names.split(","))), "/")
        if mounted_root != "/":
            mine = mine[len(mounted_root):] if mine.startswith(mounted_root) else "/"
        found.setdefault(names, Hierarchy(tuple(filter(None, names.split(","))), mount_point, mine or "/"))
    return list(found.values())


def _read_file(path: str) -> str:
    """The text of a kernel's file; "" where there is none."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)  # a third of what open() takes: stats reads many
    except OSError:
        return ""
    try:
        return b"".join(iter(lambda: os.read(fd, 1 << 16), b"")).decode("ascii", "replace")
    except OSError:  # ENODEV: the cgroup went away meanwhile
        return ""
    finally:
        os.close(fd)


def _read_number(path: str, unlimited: int = 0) -> int:
    """The number in a kernel's file; `unlimited` for "max", 0 where there is none."""
    text = _read_file(path).strip()
    return int(text) if text.isdigit() else unlimited if text == "max" else 0


def _read_numbers(path: str) -> dict[str, int]:
    """The numbers in a kernel's file of lines "KEY NUMBER"."""
    words = _read_file(path).split()
    return dict(zip(words[::2], map(int, words[1::2])))


@functools.cache
def machine_memory() -> int:
    """Bytes of memory in this machine."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _write_file(path: str, *texts: str) -> None:
    """Write each text with one write(2) to a kernel's file."""
    fd = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    try:
        for text in texts:
            os.write(fd, text.encode())
    except OSError as error:
        raise OSError(error.errno, f"cannot write {text!r}: {error.strerror}", path)
    finally:
        os.close(fd)


def host_devices(devices: Optional[list[dict[str, Any]]]) -> list[tuple[str, os.stat_result, str, str]]:
    """(path in the container, the host's node, "rwm" or less, its path) of HostConfig's Devices; a directory
    stands for all nodes below it.  DockerError for what is no device."""
    found = []
    for device in devices or ():
        source = os.path.realpath(device["PathOnHost"])
        text = f"error gathering device information while adding custom device \"{device['PathOnHost']}\": "
        nodes, below = [], (os.path.join(top, name) for top, _, names in os.walk(source) for name in names)
        for path in [source, *below]:
            try:
                facts = os.lstat(path)
            except OSError as error:
                raise DockerError(text + (error.strerror or "").lower()) from None
            if stat.S_ISCHR(facts.st_mode) or stat.S_ISBLK(facts.st_mode):
                inside = device.get("PathInContainer") or device["PathOnHost"]
                access = device.get("CgroupPermissions") or "rwm"
                nodes.append((inside + path[len(source):], facts, access, path))
        if not nodes:
            raise DockerError(text + "not a device node")
        found += nodes
    return found


def device_rules(host_config: dict[str, Any]) -> list[str]:
    """What a container may do with devices, "c MAJOR:MINOR rwm" each, in the order in which the kernel lists
    them.

    From HostConfig's Privileged, Devices and DeviceCgroupRules; DockerError for one that is none."""
    if host_config.get("Privileged"):
        return ["a *:* rwm"]
    if not host_config.get("Devices") and not host_config.get("DeviceCgroupRules"):
        return list(_DEVICE_RULES)
    rules = set(_DEVICE_RULES)
    for _, facts, access, _ in host_devices(host_config.get("Devices")):
        kind = "b" if stat.S_ISBLK(facts.st_mode) else "c"
        rules.add(f"{kind} {os.major(facts.st_rdev)}:{os.minor(facts.st_rdev)} {access}")
    rules.update(host_config.get("DeviceCgroupRules") or ())
    for rule in rules:
        if not _DEVICE_RULE.fullmatch(rule):
            raise DockerError(f"invalid device cgroup rule format: '{rule}'")
    return sorted(rules, key=lambda rule: [int(part) if part.isdigit() else -1 if part == "*" else part
                                           for part in re.split("[ :]", rule)])


def device_program(rules: Iterable[str]) -> bytes:
    """The eBPF program (BPF_PROG_TYPE_CGROUP_DEVICE) that allows what one of the rules covers whole.

    Its context: the type in the lower half of a word, the access in the upper, then major and minor;
    <linux/bpf.h>."""
    def instruction(operation: int, target: int, value: int, source: int = 0, offset: int = 0) -> bytes:
        return struct.pack("=BBhi", operation, target | source << 4, offset, value)

    code = [instruction(0x61, 3, 0, 1), instruction(0xBC, 2, 0, 3), instruction(0x54, 2, 0xFFFF),  # r2: type
            instruction(0x74, 3, 16),  # r3: access
            instruction(0x61, 4, 0, 1, 4), instruction(0x61, 5, 0, 1, 8)]  # r4: major, r5: minor
    for rule in rules:
        kind, major, minor, access = re.split("[ :]", rule)
        refused = 7 & ~sum(bit for letter, bit in zip("mrw", (1, 2, 4)) if letter in access)
        tests = [(2, {"b": 1, "c": 2}[kind])] if kind != "a" else []
        tests += [(register, int(number)) for register, number in ((4, major), (5, minor)) if number != "*"]
        body = [instruction(0xB7, 0, 1), instruction(0x95, 0, 0)]
        for register, value in reversed(tests):
            body.insert(0, instruction(0x55, register, value, 0, len(body)))
        if refused:
            body[:0] = [instruction(0xBC, 1, 0, 3), instruction(0x54, 1, refused),
                        instruction(0x55, 1, 0, 0, len(body))]
        code += body
    return b"".join([*code, instruction(0xB7, 0, 0), instruction(0x95, 0, 0)])


def attach_device_program(directory: int, rules: Iterable[str]) -> None:
    """Have the v2 cgroup behind the descriptor `directory` allow only the devices of `rules`."""
    program = bpf_load(BPF_PROG_TYPE_CGROUP_DEVICE, device_program(rules))
    try:
        bpf(BPF_PROG_ATTACH, struct.pack("=IIII", directory, program, BPF_CGROUP_DEVICE, BPF_F_ALLOW_MULTI))
    finally:
        os.close(program)


def _device_lines(entries: Optional[list[dict[str, Any]]], key: str) -> list[tuple[str, Any]]:
    """("MAJOR:MINOR", value) of HostConfig's limits by device path."""
    lines = []
    for entry in entries or ():
        try:
            number = os.stat(entry["Path"]).st_rdev
        except OSError as error:
            raise DockerError(f"stat {entry['Path']}: {(error.strerror or '').lower()}") from None
        lines.append((f"{os.major(number)}:{os.minor(number)}", entry[key]))
    return lines


def _cpu_time(resources: dict[str, Any]) -> tuple[int, int]:
    """(period, quota) in microseconds; 0 for what is not set."""
    if resources.get("NanoCpus"):
        return 100000, resources["NanoCpus"] // 10000
    return resources.get("CpuPeriod") or 0, resources.get("CpuQuota") or 0


def _pids_limit(resources: dict[str, Any]) -> str:
    limit = resources.get("PidsLimit")
    return "" if limit is None else str(limit) if limit > 0 else "max"


# (HostConfig's key, v1's file)
_V1_FILES = (
    ("Memory", "memory.limit_in_bytes"), ("MemorySwap", "memory.memsw.limit_in_bytes"),
    ("MemoryReservation", "memory.soft_limit_in_bytes"),
    ("KernelMemoryTCP", "memory.kmem.tcp.limit_in_bytes"), ("MemorySwappiness", "memory.swappiness"),
    ("OomKillDisable", "memory.oom_control"),
    ("CpuShares", "cpu.shares"), ("CpuPeriod", "cpu.cfs_period_us"), ("CpuQuota", "cpu.cfs_quota_us"),
    ("CpuRealtimePeriod", "cpu.rt_period_us"), ("CpuRealtimeRuntime", "cpu.rt_runtime_us"),
    ("CpusetCpus", "cpuset.cpus"), ("CpusetMems", "cpuset.mems"), ("PidsLimit", "pids.max"),
    ("BlkioWeight", "blkio.weight"))


def v1_settings(resources: dict[str, Any]) -> list[Setting]:
    """What to write for HostConfig's resources on version 1; what is not set (0, None, "") is left as it
    is, but PidsLimit 0 is no limit: an update takes the limit away by it."""
    period, quota = _cpu_time(resources)
    swappiness = resources.get("MemorySwappiness")
    given = {**resources, "CpuPeriod": period, "CpuQuota": quota, "PidsLimit": _pids_limit(resources),
             "MemorySwappiness": "" if swappiness in (None, -1) else str(swappiness),
             "OomKillDisable": int(bool(resources.get("OomKillDisable")))}
    values = [(file, given.get(key)) for key, file in _V1_FILES]
    for entries, key, file in (("BlkioWeightDevice", "Weight", "blkio.weight_device"),
                               *((entries, "Rate", file) for entries, file, _ in _BLKIO_RATES)):
        values += [(file, f"{device} {value}") for device, value in _device_lines(given.get(entries), key)]
    return [Setting(file.partition(".")[0], file, str(value)) for file, value in values if value]


def v2_settings(resources: dict[str, Any]) -> list[Setting]:
    """What to write for HostConfig's resources on version 2, where swap counts without memory."""
    get = resources.get
    period, quota = _cpu_time(resources)
    memory, swap, shares = get("Memory") or 0, get("MemorySwap") or 0, get("CpuShares") or 0
    weights: list[tuple[str, Any]] = [("default", get("BlkioWeight"))] if get("BlkioWeight") else []
    weights += _device_lines(get("BlkioWeightDevice"), "Weight")
    values = (
        ("memory.max", "max" if memory < 0 else memory),
        ("memory.swap.max", "max" if swap < 0 else str(swap - memory) if swap else ""),
        ("memory.low", get("MemoryReservation")),
        ("cpu.weight", 1 + (min(max(shares, 2), 1 << 18) - 2) * 9999 // 262142 if shares else ""),
        ("cpu.max", f"{quota if quota > 0 else 'max'} {period or 100000}" if period or quota else ""),
        ("cpuset.cpus", get("CpusetCpus")),
        ("cpuset.mems", get("CpusetMems")),
        ("pids.max", _pids_limit(resources)),
        *(("io.bfq.weight", f"{device} {weight}") for device, weight in weights),
        *(("io.weight", f"{device} {1 + (weight - 10) * 9999 // 990}") for device, weight in weights),
        *(("io.max", f"{device} {name}={rate}") for key, _, name in _BLKIO_RATES
          for device, rate in _device_lines(get(key), "Rate")))
    return [Setting("", file, str(value)) for file, value in values if value]


class Cgroup:
    """The cgroups of one container, one directory a hierarchy."""

    def __init__(self, manager: CgroupManager, parent: str, name: str) -> None:
        self.manager = manager
        self.path = f"{parent}/{name}"
        self.directories = {tree: f"{place}/{name}" for tree, place in manager.places(parent).items()}
        self.of = {controller: directory for hierarchy, directory in self.directories.items()
                   for controller in hierarchy.controllers or ("",)}
        self.directory_fd: Optional[int] = None  # of the v2 directory, to be born in
        self.enter: Optional[Callable[[int], None]] = None  # puts a process into it that was not born there

    @property
    def join(self) -> list[list[str]]:
        """The writes [path, text] that put the caller, a process of one thread, into the v1 hierarchies."""
        return [[directory + "/tasks", "0"] for hierarchy, directory in self.directories.items()
                if hierarchy.controllers]

    def _make(self, rules: list[str], settings: list[Setting]) -> None:
        for directory in self.directories.values():
            self._make_directory(directory)
        if "" in self.of:
            self.directory_fd = os.open(self.of[""], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        if "cpuset" in self.of:
            inherit_cpuset(self.of["cpuset"], {setting.file for setting in settings})
        self.apply(settings)
        if rules != ["a *:* rwm"]:
            if "devices" in self.of:
                _write_file(self.of["devices"] + "/devices.deny", "a")
                _write_file(self.of["devices"] + "/devices.allow", *rules)
            elif self.directory_fd is not None:
                attach_device_program(self.directory_fd, rules)

    def _make_directory(self, directory: str) -> None:
        """mkdir; what an earlier run left there is ended and removed first."""
        try:
            os.mkdir(directory, 0o755)
        except FileExistsError:
            if not _remove_directory(directory):
                self.kill()
                _wait_until(lambda: _remove_directory(directory), _REMOVE_SECONDS)
            os.mkdir(directory, 0o755)

    def apply(self, settings: Iterable[Setting]) -> None:
        """Write limits.  Those that the kernel finds invalid are written again after the others: memory and
        memory with swap may never pass each other.  Those whose controller is not there are left out."""
        late = []
        for controller, file, text in settings:
            path = f"{self.of.get(controller)}/{self.manager.file_names.get(file, file)}"
            if not os.path.exists(path):
                log.debug("cgroups: no %s here", file)
                continue
            try:
                _write_file(path, text)
            except OSError as error:
                if error.errno != errno.EINVAL:
                    raise
                late.append((path, text))
        for path, text in late:
            _write_file(path, text)

    def update(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Change the limits of a running container from those of the HostConfig `before` to those of `after`;
        all or none.  DockerError with what the kernel refused."""
        old, new = self.manager.settings(before), self.manager.settings(after)
        try:
            self.apply(setting for setting in new if setting not in old)
        except OSError as error:
            files = {setting.file for setting in new}
            with contextlib.suppress(OSError):
                self.apply(setting for setting in old if setting.file in files and setting not in new)
            raise DockerError(f"{error.strerror}: {error.filename}") from None

    def processes(self) -> list[int]:
        """The pids of all processes in the container, also in cgroups that it made itself."""
        directory = self.of.get("", self.of.get("pids")) or next(iter(self.directories.values()), "")
        pids: list[int] = []
        for place, _, _ in os.walk(directory):
            pids += map(int, _read_file(place + "/cgroup.procs").split())
        return pids

    def kill(self) -> None:
        """Kill every process in it: by cgroup.kill (Linux 5.14) where there is v2, else frozen, so that none
        forks."""
        try:
            _write_file(self.of[""] + "/cgroup.kill", "1")
        except (OSError, KeyError):
            with contextlib.suppress(OSError, DockerError):
                self.freeze()
            for pid in self.processes():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        self.thaw()  # v1's freezer holds even who is killed

    def freeze(self) -> None:
        """Stop all its processes; DockerError when they have not stopped after some seconds."""
        if "freezer" in self.of:
            state = self.of["freezer"] + "/freezer.state"
            _write_file(state, "FROZEN")
            frozen = _wait_until(lambda: _read_file(state).strip() == "FROZEN", _FREEZE_SECONDS)
        elif "" in self.of:
            _write_file(self.of[""] + "/cgroup.freeze", "1")
            events = self.of[""] + "/cgroup.events"
            frozen = _wait_until(lambda: "frozen 1" in _read_file(events), _FREEZE_SECONDS)
        else:
            raise NotSupported("cannot pause: this host has no freezer cgroup")
        if not frozen:
            self.thaw()
            raise DockerError(f"the processes in {self.path} did not freeze within {_FREEZE_SECONDS:.0f} s")

    def thaw(self) -> None:
        """Let its processes go on."""
        with contextlib.suppress(FileNotFoundError):
            if "freezer" in self.of:
                _write_file(self.of["freezer"] + "/freezer.state", "THAWED")
            elif "" in self.of:
                _write_file(self.of[""] + "/cgroup.freeze", "0")

    def oom_killed(self) -> bool:
        """Whether the kernel has killed one of its processes for want of memory."""
        text = _read_file(self.of["memory"] + "/memory.oom_control") if "memory" in self.of else _read_file(
            self.of.get("", "") + "/memory.events")
        match = re.search(r"^oom_kill (\d+)", text, re.MULTILINE)
        return bool(match and int(match[1]))

    def stats(self) -> dict[str, Any]:
        """What it uses now: the members of GET /containers/ID/stats that are about cgroups.

        As containerd's metrics become Docker's: with v2 less is known, and memory has other names."""
        if self.manager.version == 2:
            return self._v2_stats(self.of[""])
        pids, memory, cpu, blkio, accounting = (
            self.of.get(name, "") for name in ("pids", "memory", "cpu", "blkio", "cpuacct"))
        times, throttled = _read_numbers(accounting + "/cpuacct.stat"), _read_numbers(cpu + "/cpu.stat")
        each = list(map(int, _read_file(accounting + "/cpuacct.usage_percpu").split()))
        operations = [_blkio_entries(f"{blkio}/blkio.throttle.{name}")
                      for name in ("io_service_bytes", "io_serviced")]
        return _stats(
            (_read_number(pids + "/pids.current"), _read_number(pids + "/pids.max")),
            {name: operations.pop(0) if operations else [] for name in _BLKIO_STATS},
            (sum(each), times.get("system", 0) * 10**7, times.get("user", 0) * 10**7),  # of USER_HZ, 100
            tuple(throttled.get(name, 0) for name in ("nr_periods", "nr_throttled", "throttled_time")),
            {name: _read_number(f"{memory}/memory.{name}{'' if name == 'failcnt' else '_in_bytes'}")
             for name in ("usage", "max_usage", "failcnt", "limit")},
            _V1_MEMORY, _read_numbers(memory + "/memory.stat"), each)

    @staticmethod
    def _v2_stats(directory: str) -> dict[str, Any]:
        cpu = _read_numbers(directory + "/cpu.stat")
        transferred = []
        for line in _read_file(directory + "/io.stat").splitlines():
            device, *pairs = line.split()
            values = dict(pair.partition("=")[::2] for pair in pairs)
            major, minor = map(int, device.split(":"))
            transferred += [{"major": major, "minor": minor, "op": operation, "value": int(values[key])}
                            for operation, key in (("read", "rbytes"), ("write", "wbytes")) if key in values]
        return _stats(
            (_read_number(directory + "/pids.current"), _read_number(directory + "/pids.max", (1 << 64) - 1)),
            {**dict.fromkeys(_BLKIO_STATS), _BLKIO_STATS[0]: transferred or None},
            tuple(cpu.get(name, 0) * 1000 for name in ("usage_usec", "system_usec", "user_usec")),
            (cpu.get("nr_periods", 0), cpu.get("nr_throttled", 0), cpu.get("throttled_usec", 0) * 1000),
            {"usage": _read_number(directory + "/memory.current"),
             "failcnt": _read_numbers(directory + "/memory.events").get("oom", 0),
             "limit": _read_number(directory + "/memory.max", 1 << 64)},
            _V2_MEMORY, _read_numbers(directory + "/memory.stat"), [])

    def mounts(self, private: bool, readonly: bool) -> list[dict[str, Any]]:
        """The mounts of /sys/fs/cgroup inside the container, for the init's plan.

        `private` tells of a cgroup namespace of its own.  The tmpfs of v1 has "readonly_last": it is to be
        made read-only when the mounts inside it stand."""
        quiet = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC
        attributes = quiet | (MOUNT_ATTR_RDONLY if readonly else 0)
        if self.manager.version == 2:
            return [{"type": "cgroup2", "source": "cgroup", "to": "/sys/fs/cgroup", "attributes": attributes,
                     "options": []}]
        entries: list[dict[str, Any]] = [{
            "type": "tmpfs", "source": "tmpfs", "to": "/sys/fs/cgroup", "attributes": quiet,
            "options": [["mode", "755"]], "readonly_last": readonly}]
        for hierarchy, directory in self.directories.items():
            name = os.path.basename(hierarchy.path)
            to = "/sys/fs/cgroup/" + name
            if private and hierarchy.controllers:
                entries.append({"type": "cgroup", "source": "cgroup", "to": to, "attributes": attributes,
                                "options": [list(key.partition("=")[::2]) for key in hierarchy.controllers]})
            elif hierarchy.controllers:
                entries.append({"from": directory, "to": to, "attributes": attributes})
            if "," in name:
                entries += [{"to": "/sys/fs/cgroup/" + part, "link": name} for part in name.split(",")]
        return entries

    def remove(self) -> None:
        """Remove the directories; what is still busy is ended and removed in the background."""
        fd, self.directory_fd = self.directory_fd, None
        if fd is not None:
            os.close(fd)
        busy = [directory for directory in self.directories.values() if not _remove_directory(directory)]
        if busy:
            self.manager.remove_later(self, busy)


def _blkio_entries(path: str) -> list[dict[str, Any]]:
    """The lines "MAJOR:MINOR OPERATION NUMBER" of a v1 file."""
    lines = re.findall(r"^(\d+):(\d+) (\w+) (\d+)$", _read_file(path), re.MULTILINE)
    return [{"major": int(major), "minor": int(minor), "op": operation, "value": int(value)}
            for major, minor, operation, value in lines]


def _stats(pids: tuple[int, int], blkio: dict[str, Any], cpu: tuple[int, ...], throttling: tuple[int, ...],
           memory: dict[str, int], names: tuple[str, ...], stat: dict[str, int],
           each: list[int]) -> dict[str, Any]:
    """Docker's shape of a sample; limits of 0 and other members that Go's encoder omits are left out."""
    memory["limit"] = min(memory["limit"], machine_memory())
    usage = dict(zip(NO_CPU_STATS["cpu_usage"], cpu))
    return {
        "pids_stats": {key: number for key, number in zip(("current", "limit"), pids) if number},
        "blkio_stats": blkio, "num_procs": 0, "storage_stats": {},
        "cpu_stats": {"cpu_usage": {**usage, "percpu_usage": each} if each else usage,
                      "throttling_data": dict(zip(NO_CPU_STATS["throttling_data"], throttling))},
        "memory_stats": {**{key: number for key, number in memory.items() if number},
                         **({"stats": {name: stat.get(name, 0) for name in names}} if stat else {})}}


def _wait_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Ask `condition` again and again, ever less often; whether it came true in time."""
    end, pause = time.monotonic() + seconds, 0.0005
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(pause)
        pause = min(pause * 2, 0.05)
    return True


def _remove_directory(directory: str) -> bool:
    """rmdir a cgroup and those that were made inside it; False while one of them is busy."""
    try:
        os.rmdir(directory)
        return True
    except FileNotFoundError:
        return True
    except OSError:
        for place, _, _ in os.walk(directory, topdown=False):
            with contextlib.suppress(OSError):
                os.rmdir(place)
        return not os.path.exists(directory)


def inherit_cpuset(directory: str, given: Iterable[str] = ()) -> None:
    """Give a v1 cpuset its parent's processors and memory nodes, but for the files that are `given` contents:
    without any it takes no process."""
    for file in ("cpuset.cpus", "cpuset.mems"):
        if file not in given:
            text = _read_file(f"{os.path.dirname(directory)}/{file}").strip()
            if text:
                _write_file(f"{directory}/{file}", text)


class CgroupManager:
    """The host's cgroup hierarchies, and the containers' places under `cgroup_parent` in them.

    A parent that starts with "/" counts from the root of each hierarchy, another from the daemon's own
    cgroup."""

    driver, default_parent, naming = "cgroupfs", "/docker", "{}"
    real_time = (0, 0)  # (period, runtime) in microseconds that parents on v1 are given

    def __init__(self, cgroup_parent: str = "", mountinfo: str = "/proc/self/mountinfo",
                 membership: str = "/proc/self/cgroup") -> None:
        self.parent = cgroup_parent or self.default_parent
        hierarchies = read_hierarchies(_read_file(mountinfo), _read_file(membership))
        self.version = 2 if any(not hierarchy.controllers for hierarchy in hierarchies) and not any(
            name[:5] != "name=" for hierarchy in hierarchies for name in hierarchy.controllers) else 1
        self.hierarchies = [tree for tree in hierarchies if self.version == 1 or not tree.controllers]
        self._lock = threading.Lock()
        self._places: dict[str, dict[Hierarchy, str]] = {}
        self._prepared: set[str] = set()
        self._made: list[str] = []
        self._removing: dict[str, threading.Event] = {}
        self.support = self._detect()
        self.file_names = self._blkio_names()

    @staticmethod
    def place(parent: str, own: str) -> str:
        """The path of the parent cgroup from a hierarchy's mount on; `..` does not lead out of it."""
        path = os.path.normpath("/" + (parent if parent.startswith("/") else own + "/" + parent))
        return "" if path.strip("/") == "" else "/" + path.strip("/")

    def places(self, parent: str) -> dict[Hierarchy, str]:
        """The directory of the parent cgroup in each hierarchy."""
        if parent not in self._places:
            self._places[parent] = {tree: tree.path + self.place(parent, tree.own)
                                    for tree in self.hierarchies}
        return self._places[parent]

    def _detect(self) -> dict[str, bool]:
        """What this host's cgroups can do; what they cannot is logged."""
        paths = {name: tree.path for tree in self.hierarchies for name in tree.controllers or ("",)}
        unified = _read_file(paths.get("", "") + "/cgroup.controllers").split()
        support = {
            flag: over in unified if self.version == 2 else controller in paths and any(
                os.path.exists(f"{paths[controller]}/{name}") for name in (file or ".").split(" "))
            for flag, controller, file, over, *_ in _SUPPORT}
        if self.version == 2 and support["SwapLimit"]:
            groups = [entry.path + "/memory.swap.max" for entry in os.scandir(paths[""]) if entry.is_dir()]
            support["SwapLimit"] = not groups or any(map(os.path.exists, groups))
        missing = [flag for flag, there in support.items() if not there]
        if missing:
            log.info("cgroups: version %d, without %s: such limits are left out", self.version,
                     " ".join(missing))
        return support

    def _blkio_names(self) -> dict[str, str]:
        """v1's names of the I/O weights where only the BFQ scheduler offers them."""
        root = next((tree.path for tree in self.hierarchies if "blkio" in tree.controllers), "")
        if not root or os.path.exists(root + "/blkio.weight"):
            return {}
        return {"blkio.weight": "blkio.bfq.weight", "blkio.weight_device": "blkio.bfq.weight_device"}

    def settings(self, resources: dict[str, Any]) -> list[Setting]:
        """What to write for HostConfig's resources on this host."""
        return v2_settings(resources) if self.version == 2 else v1_settings(resources)

    def create(self, container_id: str, host_config: dict[str, Any]) -> Cgroup:
        """Make a container's cgroups with its limits and device rules; DockerError when the kernel refuses
        one, and then nothing stays."""
        parent = host_config.get("CgroupParent") or self.parent
        cgroup = self.cgroup(container_id, parent)
        if removing := self._removing.get(cgroup.path):
            removing.wait(_REMOVE_SECONDS)
        rules, settings = device_rules(host_config), self.settings(host_config)
        try:
            if parent not in self._prepared:
                self._prepare(parent)
            try:
                cgroup._make(rules, settings)
            except FileNotFoundError:  # somebody has removed the parent
                cgroup.remove()
                self._prepare(parent)
                cgroup._make(rules, settings)
        except OSError as error:
            cgroup.remove()
            raise DockerError(f"cannot make the container's cgroups: {error}")
        return cgroup

    def cgroup(self, container_id: str, parent: str = "") -> Cgroup:
        """A container's cgroups, made or not."""
        return Cgroup(self, parent or self.parent, self.naming.format(container_id))

    def existing(self, container_id: str, host_config: dict[str, Any]) -> Cgroup:
        """The cgroups of a container that an earlier daemon has started."""
        cgroup = self.cgroup(container_id, host_config.get("CgroupParent") or "")
        with contextlib.suppress(OSError, KeyError):
            cgroup.directory_fd = os.open(cgroup.of[""], os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        return cgroup

    def _prepare(self, parent: str) -> None:
        """Make the parent in every hierarchy, and ready to have children."""
        with self._lock:
            for hierarchy in self.hierarchies:
                directory = hierarchy.path
                for name in filter(None, self.place(parent, hierarchy.own).split("/")):
                    self._delegate(hierarchy, directory)
                    directory += "/" + name
                    with contextlib.suppress(FileExistsError):
                        os.mkdir(directory, 0o755)
                        self._made.append(directory)
                    if "cpuset" in hierarchy.controllers:
                        inherit_cpuset(directory, [file for file in ("cpuset.cpus", "cpuset.mems")
                                                   if _read_file(f"{directory}/{file}").strip()])
                    for file, value in zip(("cpu.rt_period_us", "cpu.rt_runtime_us"), self.real_time):
                        if value and "cpu" in hierarchy.controllers:
                            _write_file(f"{directory}/{file}", str(value))
                self._delegate(hierarchy, directory)
            self._prepared.add(parent)

    def _delegate(self, hierarchy: Hierarchy, directory: str) -> None:
        """v2: let the children of `directory` have its controllers; EBUSY where it has processes of its
        own."""
        if hierarchy.controllers:
            return
        given = _read_file(directory + "/cgroup.subtree_control").split()
        for name in _read_file(directory + "/cgroup.controllers").split():
            if name not in given:
                try:
                    _write_file(directory + "/cgroup.subtree_control", "+" + name)
                except OSError as error:
                    log.warning("cgroups: containers cannot have the controller %s: %s", name, error)

    def remove_later(self, cgroup: Cgroup, directories: list[str]) -> None:
        """Go on removing busy directories in the background; a new cgroup of that name waits for it."""
        done = self._removing[cgroup.path] = threading.Event()

        def work() -> None:
            cgroup.kill()
            for directory in directories:
                if not _wait_until(functools.partial(_remove_directory, directory), _REMOVE_SECONDS):
                    log.warning("the cgroup %s stays: its processes do not end", directory)
            self._removing.pop(cgroup.path, None)
            done.set()

        threading.Thread(target=work, name="cgroup", daemon=True).start()

    def kill_leftover(self, container_id: str, parent: str = "") -> None:
        """End and remove what an earlier daemon left of a container's cgroups, if anything."""
        cgroup = self.cgroup(container_id, parent)
        if any(map(os.path.exists, cgroup.directories.values())):
            cgroup.kill()
            cgroup.remove()

    def close(self) -> None:
        """Remove the parents that this daemon made and that nobody uses."""
        for removing in list(self._removing.values()):
            removing.wait(_REMOVE_SECONDS)
        with self._lock:
            for directory in reversed(self._made):
                with contextlib.suppress(OSError):
                    os.rmdir(directory)
            self._made.clear()
            self._prepared.clear()

    def info(self) -> dict[str, Any]:
        """The fields of GET /info about cgroups."""
        driver = self.driver if self.hierarchies else "none"
        return {**{flag: self.support[flag] for flag in _INFO_FLAGS},
                "CgroupDriver": driver, "CgroupVersion": str(self.version)}

    def warnings(self) -> list[str]:
        """What GET /info warns of, in Docker's words."""
        texts = [(entry.warning if self.version == 1 or entry.unified and not entry.v2_warning
                  else entry.v2_warning) for entry in _SUPPORT if not self.support[entry.flag]]
        return ["WARNING: " + text for text in texts if text]

    def check_parent(self, parent: str) -> None:
        """BadParameter for a cgroup parent that the driver cannot serve; "" is the default one."""

    def adapt(self, host_config: dict[str, Any], update: bool = False) -> list[str]:
        """Check HostConfig's resources, take out what this host cannot do, and set what follows from the
        rest; with `update` they are changes to those of a container.

        Returns Docker's warnings; BadParameter with Docker's text for what no host can do."""
        self.check_parent(host_config.get("CgroupParent") or "")
        warnings = self._discard(host_config)
        memory = host_config.get("Memory") or 0
        if not memory and not self.support["MemoryLimit"]:
            host_config["MemorySwap"] = 0
        if memory > 0 and host_config.get("MemorySwap") != -1 and not self.support["SwapLimit"]:
            host_config["MemorySwap"] = -1
            warnings.append("Your kernel does not support swap limit capabilities or the cgroup is not "
                            "mounted. Memory limited without swap.")
        check_resources(host_config, update)
        for key in ("CpuRealtimePeriod", "CpuRealtimeRuntime"):
            if host_config.get(key) and not self.support["RealTime"]:
                raise BadParameter(f"Your kernel does not support cgroup cpu real-time {key[11:].lower()}")
        if memory > 0 and not host_config.get("MemorySwap") and not update:
            host_config["MemorySwap"] = 2 * memory
        if host_config.get("OomKillDisable") and not memory:
            warnings.append("OOM killer is disabled for the container, but no memory limit is set, this can "
                            "result in the system running out of resources.")
        return warnings

    def _discard(self, host_config: dict[str, Any]) -> list[str]:
        """Empty the keys that this host cannot serve; Docker's warning for each that asked for something."""
        warnings = []
        for keys, flag, what, lost, empty in _DISCARDS:
            asked = [key for key in keys.split(" ") if host_config.get(key) not in (None, 0, -1, "", [])]
            if asked and not self.support[flag]:
                host_config.update(dict.fromkeys(asked, copy.copy(empty)))
                unmounted = "" if what == lost else " or the cgroup is not mounted"
                warnings.append(f"Your kernel does not support {what}{unmounted}. {lost} discarded.")
        return warnings


# (what no host can give, of HostConfig's numbers and the keys update and processors; what Docker says of it,
# {0} being the processors and {1} the swappiness)
_RESOURCE_FAULTS: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda of: of["Memory"] and of["Memory"] < _MINIMUM_MEMORY, "Minimum memory limit allowed is 6MB"),
    (lambda of: of["Memory"] > 0 and 0 < of["MemorySwap"] < of["Memory"],
     "Minimum memoryswap limit should be larger than memory limit, see usage"),
    (lambda of: of["Memory"] == 0 and of["MemorySwap"] > 0 and not of["update"],
     "You should always set the Memory limit when using Memoryswap limit, see usage"),
    (lambda of: not -1 <= of["MemorySwappiness"] <= 100,
     "Invalid value: {1}, valid memory swappiness range is 0-100"),
    (lambda of: 0 < of["MemoryReservation"] < _MINIMUM_MEMORY, "Minimum memory reservation allowed is 6MB"),
    (lambda of: 0 < of["Memory"] < of["MemoryReservation"],
     "Minimum memory limit can not be less than memory reservation limit, see usage"),
    (lambda of: 0 < of["KernelMemory"] < _MINIMUM_MEMORY, "Minimum kernel memory limit allowed is 6MB"),
    (lambda of: of["NanoCpus"] > 0 and of["CpuPeriod"] > 0,
     "Conflicting options: Nano CPUs and CPU Period cannot both be set."),
    (lambda of: of["NanoCpus"] > 0 and of["CpuQuota"] > 0,
     "Conflicting options: Nano CPUs and CPU Quota cannot both be set."),
    (lambda of: of["NanoCpus"] and not 10**7 <= of["NanoCpus"] <= of["processors"] * 10**9,
     "Range of CPUs is from 0.01 to {0}.00, as there are only {0} CPUs available"),
    (lambda of: of["CpuPeriod"] and not 1000 <= of["CpuPeriod"] <= 1000000,
     "CPU cfs period can not be less than 1ms (i.e. 1000) or larger than 1s (i.e. 1000000)"),
    (lambda of: 0 < of["CpuQuota"] < 1000, "CPU cfs quota can not be less than 1ms (i.e. 1000)"),
    (lambda of: of["CpuRealtimeRuntime"] > of["CpuRealtimePeriod"] > 0,
     "cpu real-time runtime cannot be higher than cpu real-time period"),
    (lambda of: of["BlkioWeight"] and not 10 <= of["BlkioWeight"] <= 1000,
     "Range of blkio weight is from 10 to 1000"),
)


def check_resources(host_config: dict[str, Any], update: bool = False) -> None:
    """BadParameter with Docker's text for resources that no host can give."""
    given = collections.defaultdict(int, {key: value for key, value in host_config.items() if value})
    processors = os.cpu_count() or 1
    given.update(update=update, processors=processors)
    for wrong, text in _RESOURCE_FAULTS:
        if wrong(given):
            raise BadParameter(text.format(processors, given["MemorySwappiness"]))
    for key, what, available in (("CpusetCpus", "CPUs", "/sys/devices/system/cpu/online"),
                                 ("CpusetMems", "memory nodes", "/sys/devices/system/node/online")):
        _check_list(host_config.get(key) or "", key, what, _read_file(available).strip() or "0")


def _check_list(asked: str, key: str, what: str, available: str) -> None:
    """BadParameter when a list such as "0-3,7" is none, or names more than is available."""
    if not asked:
        return
    try:
        missing = _number_set(asked) - _number_set(available)
    except ValueError:
        raise BadParameter(f"Invalid value {asked} for cpuset {key[6:].lower()}: invalid format: {asked}")
    if missing:
        raise BadParameter(f"Requested {what} are not available - requested {asked}, available: {available}")


def _number_set(text: str) -> set[int]:
    """The numbers of a list such as "0-3,7", cpuset(7)."""
    numbers: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        if not (first + (last or "0")).isdecimal() or len(part) > 11 or int(last or first) > 8191:
            raise ValueError(text)
        numbers.update(range(int(first), int(last or first) + 1))
    return numbers


# systemd: a container's cgroup is a transient scope that it makes when asked over D-Bus, and whose delegated
# directory is ours.  The manager answers root on a socket of its own, so no message bus is needed.  Sources:
# the D-Bus specification (type system, marshalling, EXTERNAL); org.freedesktop.systemd1(5);
# systemd.resource-control(5).

_DBUS_FIXED = {"y": "B", "b": "I", "i": "i", "u": "I", "x": "q", "t": "Q"}
_DBUS_ALIGNED = {"s": 4, "o": 4, "a": 4, "(": 8, "{": 8}   # beside the fixed ones; "g" and "v" are not
_SYSTEMD_SOCKET = "/run/systemd/private"
# The fields of a message's header, from number 1 on: name, type, what ours have there
_DBUS_FIELDS = (("path", "o", "/org/freedesktop/systemd1"),
                ("interface", "s", "org.freedesktop.systemd1.Manager"), ("member", "s", ""),
                ("error", "s", ""), ("reply", "u", ""), ("destination", "s", "org.freedesktop.systemd1"),
                ("sender", "s", ""), ("signature", "g", ""))
_SYSTEMD_SECONDS = 30.0
# The unit's properties of those files: systemd writes its own values again when it is reloaded
_UNIT_PROPERTIES = {"memory.max": "MemoryMax", "memory.swap.max": "MemorySwapMax", "memory.low": "MemoryLow",
                    "cpu.weight": "CPUWeight", "cpu.shares": "CPUShares", "pids.max": "TasksMax",
                    "memory.limit_in_bytes": "MemoryLimit"}


def _dbus_types(signature: str) -> list[str]:
    """The single complete types of a signature."""
    structure = r"\((?:[^()]|\([^()]*\)|\([^()]*\([^()]*\)[^()]*\))*\)"  # three levels will do
    return re.findall(rf"a*(?:[b-z]|{structure}|\{{[^{{}}]*\}})", signature)


def _dbus_alignment(kind: str) -> int:
    return struct.calcsize("=" + _DBUS_FIXED[kind]) if kind in _DBUS_FIXED else _DBUS_ALIGNED.get(kind[0], 1)


def dbus_pack(data: bytearray, signature: str, values: Iterable[Any]) -> bytearray:
    """Append `values` of the types of `signature` to `data`, whose begin is a multiple of 8; little endian.

    A variant is the pair (signature, value)."""
    for kind, value in zip(_dbus_types(signature), values):
        data += bytes(-len(data) % _dbus_alignment(kind))
        if kind in _DBUS_FIXED:
            data += struct.pack("<" + _DBUS_FIXED[kind], value)
        elif kind in ("s", "o", "g"):
            text = value.encode()
            data += struct.pack("<B" if kind == "g" else "<I", len(text)) + text + b"\0"
        elif kind == "v":
            dbus_pack(dbus_pack(data, "g", [value[0]]), value[0], [value[1]])
        elif kind[0] == "a":
            length = len(data)
            data += bytes(4)
            data += bytes(-len(data) % _dbus_alignment(kind[1:]))
            start = len(data)
            for item in value:
                dbus_pack(data, kind[1:], [item])
            struct.pack_into("<I", data, length, len(data) - start)
        else:
            dbus_pack(data, kind[1:-1], value)
    return data


def dbus_unpack(data: bytes, signature: str, at: int = 0) -> tuple[list[Any], int]:
    """(the values of the types of `signature` in `data` from `at` on, where they end); see dbus_pack."""
    values: list[Any] = []
    for kind in _dbus_types(signature):
        at += -at % _dbus_alignment(kind)
        if kind in _DBUS_FIXED:
            value, = struct.unpack_from("<" + _DBUS_FIXED[kind], data, at)
            at += _dbus_alignment(kind)
        elif kind in ("s", "o", "g"):
            size, head = (data[at], 1) if kind == "g" else (*struct.unpack_from("<I", data, at), 4)
            value = data[at + head:at + head + size].decode(errors="replace")
            at += head + size + 1
        elif kind == "v":
            (inner,), at = dbus_unpack(data, "g", at)
            (value,), at = dbus_unpack(data, inner, at)
        elif kind[0] == "a":
            size, = struct.unpack_from("<I", data, at)
            at += 4 + -(at + 4) % _dbus_alignment(kind[1:])
            value, end = [], at + size
            while at < end:
                item, at = dbus_unpack(data, kind[1:], at)
                value += item
        else:
            value, at = dbus_unpack(data, kind[1:-1], at)
        values.append(value)
    return values, at


def dbus_call(serial: int, member: str, signature: str, values: Iterable[Any]) -> bytes:
    """The message that calls a method of systemd's manager."""
    body = dbus_pack(bytearray(), signature, values)
    given = {"member": member, "signature": signature}
    fields = [(number, (kind, given.get(name, value)))
              for number, (name, kind, value) in enumerate(_DBUS_FIELDS, 1) if given.get(name, value)]
    head = dbus_pack(bytearray(struct.pack("<4B2I", ord("l"), 1, 0, 1, len(body), serial)), "a(yv)", [fields])
    return bytes(head + bytes(-len(head) % 8) + body)


class Systemd:
    """One conversation with systemd's manager; DockerError with what it says when it refuses."""

    def __init__(self, path: str = _SYSTEMD_SOCKET) -> None:
        self._connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_CLOEXEC)
        self._connection.settimeout(_SYSTEMD_SECONDS)
        self._serial = itertools.count(1)
        try:
            self._connection.connect(path)
            self._stream = self._connection.makefile("rb")
            self._connection.sendall(b"\0AUTH EXTERNAL %s\r\n" % str(os.geteuid()).encode().hex().encode())
            if not self._stream.readline(1024).startswith(b"OK "):
                raise PermissionError(errno.EACCES, "it does not accept root")
            self._connection.sendall(b"BEGIN\r\n")
        except OSError as error:
            self._connection.close()
            raise DockerError(f"cannot talk to systemd at {path}: {error.strerror or error}") from None

    def __enter__(self) -> Systemd:
        return self

    def __exit__(self, *_: Any) -> None:
        self._stream.close()
        self._connection.close()

    def call(self, member: str, signature: str, *values: Any) -> list[Any]:
        """Call a method of the manager; what it returns."""
        serial, fields = next(self._serial), {}  # type: int, dict[str, Any]
        try:
            self._connection.sendall(dbus_call(serial, member, signature, values))
            while fields.get("reply") != serial:
                fields, body = self._receive()
        except OSError as error:
            raise DockerError(f"systemd does not answer {member}: {error}") from None
        if "error" in fields:
            raise DockerError(f"systemd refuses {member}: {(body or [fields['error']])[0]}")
        return body

    def finish(self, job: str) -> None:
        """Wait until systemd has done the job of this path; DockerError when it has failed."""
        fields, body = {}, []  # type: dict[str, Any], list[Any]
        try:
            while fields.get("member") != "JobRemoved" or body[1] != job:
                fields, body = self._receive()
        except OSError as error:
            raise DockerError(f"systemd does not finish its job: {error}") from None
        if body[3] != "done":
            raise DockerError(f"systemd could not start {body[2]}: {body[3]}")

    def _receive(self) -> tuple[dict[str, Any], list[Any]]:
        head = self._read(16)
        size, _, fields_size = struct.unpack_from("<3I", head, 4)
        rest = self._read(fields_size + -fields_size % 8 + size)
        (pairs,), _ = dbus_unpack(head + rest, "a(yv)", 12)
        fields = {_DBUS_FIELDS[number - 1][0]: value for number, value in pairs
                  if 0 < number <= len(_DBUS_FIELDS)}
        return fields, dbus_unpack(rest[-size:] if size else b"", fields.get("signature", ""))[0]

    def _read(self, size: int) -> bytes:
        data = self._stream.read(size)
        if len(data) < size:
            raise ConnectionResetError(errno.ECONNRESET, "it has closed the connection")
        return data


def unit_properties(settings: Iterable[Setting]) -> list[tuple[str, tuple[str, Any]]]:
    """What a unit must know of limits, so that systemd keeps them."""
    properties: list[tuple[str, tuple[str, Any]]] = []
    for _, file, text in settings:
        if file in _UNIT_PROPERTIES:
            value = (1 << 64) - 1 if text in ("max", "-1") else int(text)
            properties.append((_UNIT_PROPERTIES[file], ("t", value)))
        elif file == "cpu.max":
            quota, period = text.split(" ")
            share = (1 << 64) - 1 if quota == "max" else int(quota) * 1000000 // int(period)
            properties += [("CPUQuotaPerSecUSec", ("t", share)), ("CPUQuotaPeriodUSec", ("t", int(period)))]
    return properties


class Scope(Cgroup):
    """A container's cgroup under systemd: there once a process is put into it."""

    def _make(self, rules: list[str], settings: list[Setting]) -> None:
        self.enter = functools.partial(self._start, rules, settings)

    def _start(self, rules: list[str], settings: list[Setting], pid: int) -> None:
        """Have systemd make the scope around the process, then set what is ours."""
        unit, parent = os.path.basename(self.path), os.path.dirname(self.path)
        properties = [("Description", ("s", f"container {unit[7:-6]}")), ("Slice", ("s", parent)),
                      ("PIDs", ("au", [pid])), ("CollectMode", ("s", "inactive-or-failed")),
                      ("Delegate", ("b", True)), ("DefaultDependencies", ("b", False)),
                      *((name + "Accounting", ("b", True)) for name in ("CPU", "Memory", "Tasks", "IO")),
                      *unit_properties(settings)]
        with Systemd() as systemd:
            job, = systemd.call("StartTransientUnit", "ssa(sv)a(sa(sv))", unit, "fail", properties, ())
            systemd.finish(job)
        try:
            super()._make(rules, settings)
        except OSError as error:
            raise DockerError(f"cannot make the container's cgroups: {error}")

    def _make_directory(self, directory: str) -> None:
        os.makedirs(directory, 0o755, exist_ok=True)

    def update(self, before: dict[str, Any], after: dict[str, Any]) -> None:
        """Change the limits of a running container, and what systemd knows of them."""
        super().update(before, after)
        with Systemd() as systemd:
            systemd.call("SetUnitProperties", "sba(sv)", os.path.basename(self.path), True,
                         unit_properties(self.manager.settings(after)))


class SystemdManager(CgroupManager):
    """The cgroup driver systemd: parents are slices, a container is the scope docker-ID.scope.

    BadParameter for a parent that is no slice, DockerError where systemd does not run."""

    driver, default_parent, naming = "systemd", "system.slice", "docker-{}.scope"

    def __init__(self, cgroup_parent: str = "", *files: str) -> None:
        self.check_parent(cgroup_parent)
        if not systemd_runs():
            raise DockerError("the cgroup driver systemd cannot be used: systemd does not run on this host "
                              "(native.cgroupdriver=cgroupfs needs none)")
        super().__init__(cgroup_parent, *files)

    def check_parent(self, parent: str) -> None:
        """BadParameter, with Docker's text, for what is no slice's name."""
        if parent and not re.fullmatch(r"[^/]+\.slice", parent):
            raise BadParameter("cgroup-parent for systemd cgroup should be a valid slice named as "
                               '"xxx.slice"')

    @staticmethod
    def place(parent: str, own: str) -> str:
        """The path of a slice: a-b.slice lies in a.slice."""
        parts = parent[:-len(".slice")].split("-")
        names = ["-".join(parts[:count]) for count in range(1, len(parts) + 1)] if parent != "-.slice" else []
        return "".join(f"/{name}.slice" for name in names)

    def cgroup(self, container_id: str, parent: str = "") -> Cgroup:
        """A container's scope."""
        return Scope(self, parent or self.parent, self.naming.format(container_id))

    def _prepare(self, parent: str) -> None:
        if self.version == 1:  # systemd makes slices in its own hierarchy alone
            super()._prepare(parent)


def systemd_runs() -> bool:
    """Whether this host was booted by systemd; sd_booted(3)."""
    return os.path.isdir("/run/systemd/system")


def cgroup_manager(cgroup_parent: str, options: Iterable[str]) -> CgroupManager:
    """The cgroup driver that --exec-opt names; else, as in Docker, systemd where that runs with version 2
    alone."""
    named = next((option.partition("=")[2] for option in options), "")
    unified = os.path.exists("/sys/fs/cgroup/cgroup.controllers")
    systemd = named == "systemd" or not named and unified and systemd_runs()
    return (SystemdManager if systemd else CgroupManager)(cgroup_parent)


# ------------------------------------------------------------------------------------------------------------
# Execution driver: shim and init
#
# The shim is one process for all containers.  It forks every container's init, reaps it, and keeps the
# daemon's ends of its streams open while no daemon runs.  It does no I/O of its own, has one thread and
# imports nothing else: its code is this section with the constants, errors, kernel calls and netlink above,
# run from cached bytecode.
#
# The daemon and the shim talk over a Unix SEQPACKET socket: one JSON object a packet, descriptors by
# SCM_RIGHTS in the order of its "fds".  Requests carry "op" and "seq", answers "seq" and perhaps "error", the
# end of a process is the packet {"exit": key, "status": n, "time": ns}, with "error" where nobody can say how
# it ended.  A shim serves any later daemon: operations and fields are only ever added.  A daemon whose own
# source has another shim in it starts that one for new processes beside it.
#
# The init is the child on its way to execve.  It carries out a plan, a JSON document made by the daemon, and
# tells its end on the descriptor "sync": end of file is success, else one JSON object with "error".  It
# leaves nothing open. What must happen in which order is specified by runtime-spec's config-linux.md and the
# man pages namespaces(7), pivot_root(2), capabilities(7), seccomp(2), pts(4).
# ------------------------------------------------------------------------------------------------------------

SHIM_PROTOCOL = 3       # 1: no "take", 2: no "exec"
SHIM_PACKET = 1 << 16
TIOCSPTLCK = 0x40045431


class InitError(Exception):
    """What kept the init from execve: one line, with the exit code that Docker records for it."""

    def __init__(self, text: str, code: int = 128) -> None:
        super().__init__(text)
        self.code = code


@contextlib.contextmanager
def _init_step(what: str) -> Iterator[None]:
    """An OSError of the block becomes an InitError that says what was being done."""
    try:
        yield
    except OSError as error:
        raise InitError(f"{what}: {(error.strerror or str(error)).lower()}") from None


def _open_in_root(root: int, path: str, flags: int = os.O_PATH, links: bool = True) -> int:
    """A descriptor of `path` inside the container's root: links lead nowhere else, and magic links
    nowhere."""
    resolve = RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS | (0 if links else RESOLVE_NO_SYMLINKS)
    return openat2(root, path.lstrip("/") or ".", flags, 0, resolve)


def _mount_point(root: int, path: str, directory: bool, links: bool = True) -> int:
    """A descriptor of the place `path` to mount on, made (0755, or an empty file) where it is missing."""
    with contextlib.suppress(FileNotFoundError):
        return _open_in_root(root, path, links=links)
    above, name = os.path.split(path.rstrip("/"))
    parent = _mount_point(root, above, True, links)
    try:
        if directory:
            os.mkdir(name, 0o755, dir_fd=parent)
        else:
            os.mknod(name, stat.S_IFREG | 0o755, dir_fd=parent)
        return os.open(name, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC, dir_fd=parent)
    finally:
        os.close(parent)


def _attach(mount_fd: int, root: int, path: str, links: bool = True) -> None:
    """Attach the detached mount at `path` inside the root, and close it."""
    directory = stat.S_ISDIR(os.fstat(mount_fd).st_mode)
    target = _mount_point(root, path, directory, links)
    try:
        if directory != stat.S_ISDIR(os.fstat(target).st_mode):
            raise OSError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), path)
        move_mount(mount_fd, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
    finally:
        os.close(target)
        os.close(mount_fd)


class Init:
    """The steps from a fresh child to execve; `plan` is what the daemon decided, `fds` the named
    descriptors."""

    def __init__(self, plan: dict[str, Any], fds: dict[str, int]) -> None:
        self.plan, self.fds = plan, fds
        self.root = self.host_root = self.proc = self.slave = self.devpts = -1
        self.cgroups: list[int] = []

    def prepare(self) -> None:
        """What needs the host's own /proc and /sys: the out-of-memory score, descriptors of the cgroups."""
        for path, _ in self.plan["cgroup_join"]:
            with _init_step(f"cannot join the cgroup {path}"):
                self.cgroups.append(os.open(path, os.O_WRONLY | os.O_CLOEXEC))
        if self.plan.get("oom_score_adj") is not None:
            with _init_step("cannot set oom_score_adj"), open("/proc/self/oom_score_adj", "wb", 0) as file:
                file.write(str(self.plan["oom_score_adj"]).encode())
        self.proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        if self.plan.get("remapped"):  # while it may raise them
            self._set_limits()

    def _set_limits(self) -> None:
        import resource
        for number, soft, hard in self.plan["rlimits"]:
            with _init_step(f"error setting rlimit type {number}"):
                resource.setrlimit(number, (soft, hard))

    def run(self) -> None:
        """Carry the plan out; returns only by an exception."""
        plan = self.plan
        if plan.get("wait") and not os.read(self.fds["sync"], 1):
            raise InitError("the daemon has gone before it let the container start")
        if plan["bare"]:
            self._run_bare()
        self.prepare()
        self._be_root()
        self._enter_cgroups()
        os.setsid()
        if "join" in plan:
            self._join(plan["join"])
        if plan.get("cgroup_namespace"):
            unshare(CLONE_NEWCGROUP)
        if plan.get("hostname"):
            with _init_step("sethostname"):
                socket.sethostname(plan["hostname"])
        if plan.get("domainname"):
            setdomainname(plan["domainname"])
        if plan["loopback"]:
            with _init_step("cannot bring the loopback up"):
                link_up(1)
        self._mount_all()
        if plan["tty"]:
            self._open_terminal()
            with _init_step("cannot make /dev/console"):
                _attach(open_tree(self.slave, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC),
                        self.root, "/dev/console")
        self._enter_root()
        if plan.get("await_network") and not os.read(self.fds["sync"], 1):
            raise InitError("the daemon has gone before the container had its network")
        self._set_sysctls()
        self._protect_paths()
        if plan["readonly_root"]:
            with _init_step("cannot make the root read-only"):
                mount_setattr(AT_FDCWD, "/", 0, set=MOUNT_ATTR_RDONLY)
        self._become()

    def _run_bare(self) -> None:
        """Execute a program of the host, an OCI runtime, that finds the root at its place and shares that
        mount with nobody."""
        with _init_step("cannot attach the root file system"):
            mount("", "/", "", MS_REC | MS_SLAVE)
            move_mount(self.fds["root"], "", AT_FDCWD, self.plan["root_place"], MOVE_MOUNT_F_EMPTY_PATH)
        os.setsid()
        self._take_streams()
        self._close_all()
        self._execute(b"")

    def run_joined(self) -> None:
        """The same for a further process, a child that has joined its container's namespaces: what it finds
        there is hostile."""
        self._be_root()
        self._enter_cgroups()
        os.setsid()
        if self.plan["tty"]:
            self._open_devpts()
            self._open_terminal()
        self._become()

    def _be_root(self) -> None:
        """Be the root of a user namespace, whose map is there by now."""
        if self.plan.get("remapped"):
            with _init_step("cannot become the user namespace's root"):
                os.setgroups([])
                os.setresgid(0, 0, 0)
                os.setresuid(0, 0, 0)

    def _enter_cgroups(self) -> None:
        for fd, (path, text) in zip(self.cgroups, self.plan["cgroup_join"]):
            with _init_step(f"cannot join the cgroup {path}"):
                os.write(fd, text.encode())
                os.close(fd)
        for name, text in self.plan["labels"]:  # by the host's /proc: a container's may lie (CVE-2019-16884)
            with _init_step(f"cannot write {text!r} to /proc/self/attr/{name}"):
                fd = os.open(f"self/attr/{name}", os.O_WRONLY | os.O_CLOEXEC, dir_fd=self.proc)
                os.write(fd, text.encode())
                os.close(fd)

    def _join(self, names: list[str]) -> None:
        """Join the namespaces behind the descriptors `names`, of another container or the host; the mounts'
        is for a mount of its own."""
        for name in set(names) - {"mnt"}:
            with _init_step(f"cannot join the namespace {name}"):
                setns(self.fds[name])

    def _mount_all(self) -> None:
        """Put the root at its place in a mount namespace that no longer tells the host, and all else below
        it."""
        with _init_step("cannot make the mounts private"):
            mount("", "/", "", MS_REC | MS_SLAVE)
        place = self.plan["root_place"]
        self.root = self.fds.pop("root")
        with _init_step("cannot attach the root file system"):
            self.host_root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
            move_mount(self.root, "", AT_FDCWD, place, MOVE_MOUNT_F_EMPTY_PATH)
            mount_setattr(self.root, "", AT_EMPTY_PATH, propagation=MS_PRIVATE)
        for entry in self.plan["mounts"]:
            self._mount(entry)
        for entry in self.plan["mounts"]:
            if entry.get("readonly_last"):
                with _init_step(f"cannot make {entry['to']} read-only"):
                    place = _open_in_root(self.root, entry["to"])
                    mount_setattr(place, "", AT_EMPTY_PATH, set=MOUNT_ATTR_RDONLY)
                    os.close(place)

    def _mount(self, entry: dict[str, Any]) -> None:
        to = entry["to"]
        source = entry.get("from", entry.get("type", ""))
        with _init_step(f'error mounting "{source}" to rootfs at "{to}"'):
            if "node" in entry or "link" in entry:
                with contextlib.suppress(FileExistsError):  # --device comes before the default ones
                    self._make_node(to, entry)
            elif "shared" in entry:
                self._share(entry["shared"])
            elif "from" in entry:
                self._bind(entry)
            else:
                made = new_mount(source, entry["attributes"], entry.get("source", source), entry["options"])
                if to == "/dev/pts":
                    self.devpts = os.dup(made)
                _attach(made, self.root, to, links=entry["type"] not in ("proc", "sysfs"))

    def _bind(self, entry: dict[str, Any]) -> None:
        flags = OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | (AT_RECURSIVE if entry.get("recursive") else 0)
        given = self.fds.pop(entry["from"], -1)  # what a remapped root may not reach by its path
        made = open_tree(AT_FDCWD, entry["from"], flags) if given < 0 else given
        if entry.get("attributes") or entry.get("propagation"):
            mount_setattr(made, "", AT_EMPTY_PATH | (AT_RECURSIVE if entry.get("recursive") else 0),
                          set=entry.get("attributes", 0), propagation=entry.get("propagation", 0))
        _attach(made, self.root, entry["to"])

    def _share(self, path: str) -> None:
        """Have the mount at `path` of the container whose mount namespace is the descriptor "mnt"; its links
        lead nowhere out of that one."""
        own = os.open("/proc/self/ns/mnt", os.O_RDONLY | os.O_CLOEXEC)
        setns(self.fds["mnt"], CLONE_NEWNS)
        shared = open_tree(AT_FDCWD, path)
        setns(own, CLONE_NEWNS)
        os.close(own)
        _attach(shared, self.root, path)

    def _make_node(self, path: str, entry: dict[str, Any]) -> None:
        """Make a device node or a link; FileExistsError where something is."""
        parent = _mount_point(self.root, os.path.dirname(path), True)
        name = os.path.basename(path)
        try:
            if "link" in entry:
                return os.symlink(entry["link"], name, dir_fd=parent)
            os.mknod(name, entry["node"], entry["rdev"], dir_fd=parent)
            os.chmod(name, stat.S_IMODE(entry["node"]), dir_fd=parent)
            if entry.get("owner"):
                os.chown(name, *entry["owner"], dir_fd=parent, follow_symlinks=False)
        finally:
            os.close(parent)

    def _open_devpts(self) -> None:
        """The running container's devpts, unless something else stands in its place by now (pitfall 11)."""
        with _init_step("cannot open /dev/pts"):
            self.devpts = openat2(AT_FDCWD, "/dev/pts", os.O_PATH | os.O_DIRECTORY, 0, RESOLVE_NO_SYMLINKS)
            if statfs_type(self.devpts) != DEVPTS_SUPER_MAGIC:
                raise OSError(errno.ENODEV, "it is not a devpts file system")

    def _open_terminal(self) -> None:
        """A terminal of the container's own devpts: the daemon gets the master, we the slave, which comes
        from the master and not from a path."""
        with _init_step("cannot open the terminal"):
            master = os.open("ptmx", os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC, dir_fd=self.devpts)
            fcntl.ioctl(master, TIOCSPTLCK, struct.pack("i", 0))
            self.slave = fcntl.ioctl(master, TIOCGPTPEER, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
            height, width = self.plan.get("console_size") or (0, 0)
            if height or width:
                fcntl.ioctl(master, TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))
            os.fchown(self.slave, self.plan["uid"], -1)
            sync = socket.socket(fileno=os.dup(self.fds["sync"]))
            socket.send_fds(sync, [b'{"console": true}'], [master])
            sync.close()
            os.close(master)

    def _enter_root(self) -> None:
        with _init_step("pivot_root"):
            os.fchdir(self.root)
            pivot_root(".", ".")
            os.fchdir(self.host_root)
            umount(".", MNT_DETACH)
            os.chdir("/")

    def _protect_paths(self) -> None:
        """Make the read-only paths read-only and hide the masked ones, each where it exists (CVE-2025-31133:
        the mask is the null device itself, checked by its number, whatever /dev/null may have become)."""
        for path in self.plan["readonly_paths"]:
            with _init_step(f"cannot make {path} read-only"):
                self._cover(path)
        flags = os.O_PATH | os.O_CLOEXEC | (os.O_NOFOLLOW if defended("mask-check") else 0)
        null = os.open("/dev/null", flags)
        facts = os.fstat(null)
        if defended("mask-check") and (stat.S_IFMT(facts.st_mode), facts.st_rdev) != (
                stat.S_IFCHR, os.makedev(1, 3)):
            raise InitError("cannot mask paths: /dev/null in the container is not the null device")
        for path in self.plan["masked_paths"]:
            with _init_step(f"cannot mask {path}"):
                self._cover(path, null)
        os.close(null)

    def _cover(self, path: str, null: int = -1) -> None:
        """Lay a read-only mount of the same over `path`, or with the null device that one, or over a
        directory an empty one; nothing where there is no such path."""
        try:
            target = openat2(AT_FDCWD, path, os.O_PATH, 0, RESOLVE_NO_SYMLINKS)
        except FileNotFoundError:
            return
        if null < 0:
            cover = open_tree(target, "", AT_EMPTY_PATH | AT_RECURSIVE | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
            mount_setattr(cover, "", AT_EMPTY_PATH | AT_RECURSIVE, set=MOUNT_ATTR_RDONLY)
        elif stat.S_ISDIR(os.fstat(target).st_mode):
            cover = new_mount("tmpfs", MOUNT_ATTR_RDONLY, "tmpfs", [("ro", "")])
        else:
            cover = open_tree(null, "", AT_EMPTY_PATH | OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC)
        move_mount(cover, "", target, "", MOVE_MOUNT_F_EMPTY_PATH | MOVE_MOUNT_T_EMPTY_PATH)
        os.close(cover)
        os.close(target)

    def _set_sysctls(self) -> None:
        for key, value in self.plan["sysctls"]:
            place = "/proc/sys/" + key.replace(".", "/")
            with _init_step(f"cannot set the sysctl {key}"), open(place, "r+b", 0) as file:
                file.write(value.encode())

    def _become(self) -> None:
        """Take on the limits, identity and confinement of the container's process, and execute it."""
        plan = self.plan
        if not plan.get("remapped"):
            self._set_limits()
        with contextlib.suppress(OSError):  # a kernel without keyrings has none to leak
            keyctl_join_session()
        self._take_streams()
        self._close_all()
        entered = self._enter_workdir()
        seccomp = bytes.fromhex(plan["seccomp"]) if plan.get("seccomp") else b""
        capabilities = plan["capabilities"]
        self._take_identity(capabilities, None if plan["no_new_privileges"] else seccomp)
        if not entered:
            self._change_directory()
        if plan["no_new_privileges"]:
            prctl(PR_SET_NO_NEW_PRIVS, 1)
        self._execute(seccomp if plan["no_new_privileges"] else b"")

    def _enter_workdir(self) -> bool:
        """Enter the working directory, which a container's first process makes where it is missing; False
        when only its user may enter it."""
        cwd = self.plan["cwd"]
        if self.root >= 0 and not os.path.isdir(cwd):
            with _init_step(f"mkdir {cwd}"):
                root = os.open("/", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
                os.close(_mount_point(root, cwd, True))
                os.close(root)
        try:
            os.chdir(cwd)
        except PermissionError:
            return False
        except OSError as error:  # of a further process the next line tells
            if self.root >= 0 and error.errno == errno.ENOTDIR:
                raise InitError(f"Cannot mkdir: {cwd} is not a directory") from None
        self._change_directory()
        return True

    def _take_streams(self) -> None:
        """The terminal or the pipes become descriptors 0, 1 and 2, and belong to the container's user."""
        if self.plan["tty"]:
            fcntl.ioctl(self.slave, TIOCSCTTY, 0)
            streams = [self.slave] * 3
        else:
            streams = [self.fds[name] for name in ("stdin", "stdout", "stderr")]
            if self.plan["uid"] and not self.plan.get("remapped"):
                for fd in streams:
                    if stat.S_ISFIFO(os.fstat(fd).st_mode):
                        os.fchown(fd, self.plan["uid"], -1)
        for number, fd in enumerate(streams):
            os.dup2(fd, number, inheritable=True)

    def _take_identity(self, capabilities: dict[str, int], seccomp: Optional[bytes]) -> None:
        """Drop what the bounding set does not name, change the user, load the filter, drop the rest."""
        plan = self.plan
        for number in range(capabilities["last"] + 1):
            if not capabilities["bounding"] >> number & 1:
                prctl(PR_CAPBSET_DROP, number)
        prctl(PR_SET_KEEPCAPS, 1)
        with _init_step("cannot change the user"):
            os.setgroups(plan["groups"])
            os.setresgid(plan["gid"], plan["gid"], plan["gid"])
            os.setresuid(plan["uid"], plan["uid"], plan["uid"])
        prctl(PR_SET_KEEPCAPS, 0)
        if seccomp:  # without no_new_privs only CAP_SYS_ADMIN may load a filter: now, or never
            permitted = capget()[1]
            capset(permitted, permitted, 0)
            with _init_step("cannot load the seccomp filter"):
                seccomp_load(seccomp, plan.get("seccomp_flags", 0))
        with _init_step("unable to apply caps"):
            capset(capabilities["effective"], capabilities["permitted"], 0)
        with contextlib.suppress(OSError):
            prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)

    def _close_all(self) -> None:
        """Close everything but 0, 1, 2 and the descriptor that tells of success (CVE-2024-21626)."""
        sync = self.fds["sync"]
        if defended("fd-close"):
            close_range(3, sync - 1)
            close_range(sync + 1)
        else:
            for fd in {self.host_root, self.fds.get("cgroup", -1)} - {-1}:
                os.set_inheritable(fd, True)

    def _change_directory(self) -> None:
        cwd = self.plan["cwd"]
        with _init_step(f"chdir to cwd (\"{cwd}\") set in config.json failed"):
            os.chdir(cwd)
            inside = os.getcwd() if defended("fd-close") else "/"
        if not inside.startswith("/"):
            raise InitError("current working directory is outside of container mount namespace root -- "
                            "possible container breakout attempt")

    def _execute(self, seccomp: bytes) -> None:
        plan = self.plan
        arguments = [os.fsencode(argument) for argument in plan["args"]]
        environment = dict(os.fsencode(item).partition(b"=")[::2] for item in plan["env"])
        program = _find_program(plan["args"][0], environment.get(b"PATH", b""))
        os.umask(0o022)
        if seccomp:
            with _init_step("cannot load the seccomp filter"):
                seccomp_load(seccomp, plan.get("seccomp_flags", 0))
        if plan.get("resident"):
            self._stay()
        try:
            os.execve(program, arguments, environment)
        except OSError as error:
            code = 126 if error.errno in (errno.EACCES, errno.ENOEXEC) else 127
            raise InitError(f"exec {os.fsdecode(program)}: {str(error.strerror).lower()}", code) from None

    def _stay(self) -> None:
        """Go on in a child, a process group of its own; this process stays as pid 1: it passes signals on,
        reaps whatever ends, and ends as the child does."""
        everything = signal.valid_signals()
        signal.pthread_sigmask(signal.SIG_BLOCK, everything)
        child = os.fork()
        if not child:
            os.setpgid(0, 0)
            if self.plan["tty"]:
                os.tcsetpgrp(0, os.getpid())
            signal.pthread_sigmask(signal.SIG_SETMASK, ())
            return
        close_range(3)
        while True:
            number = signal.sigwait(everything)
            if number not in (signal.SIGCHLD, signal.SIGTTIN, signal.SIGTTOU):
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, number)
            while number == signal.SIGCHLD:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == child:
                    code = os.waitstatus_to_exitcode(status)
                    os._exit(code if code >= 0 else 128 - code)
                if not pid:
                    break


def _find_program(name: str, path: bytes) -> bytes:
    """The file that `name` means: itself when it has a slash, else the first executable one in `path`.

    Raises InitError with Go's os/exec texts, by which the CLI chooses exit code 126 or 127."""
    if "/" in name:
        try:
            found = os.stat(name)
        except OSError as error:
            raise InitError(f"exec: \"{name}\": stat {name}: {str(error.strerror).lower()}", 127) from None
        if stat.S_ISDIR(found.st_mode) or not found.st_mode & 0o111:
            raise InitError(f"exec: \"{name}\": permission denied", 126)
        return os.fsencode(name)
    for directory in path.split(b":") if name else []:
        candidate = os.path.join(directory or b".", os.fsencode(name))
        with contextlib.suppress(OSError):
            found = os.stat(candidate)
            if stat.S_ISREG(found.st_mode) and found.st_mode & 0o111:
                return candidate
    raise InitError(f"exec: \"{name}\": executable file not found in $PATH", 127)


@contextlib.contextmanager
def _child(sync: int) -> Iterator[None]:
    """A child's whole life: it ends by execve, or by telling on `sync` what stood in the way."""
    try:
        yield
    except BaseException as error:
        code = error.code if isinstance(error, InitError) else 128
        text = str(error) if isinstance(error, InitError) else f"{type(error).__name__}: {error}"
        with contextlib.suppress(OSError):
            os.write(sync, json.dumps({"error": text, "code": code}).encode()[:SHIM_PACKET])
    finally:
        os._exit(127)


def _read_plan(fds: dict[str, int]) -> dict[str, Any]:
    """The plan behind the descriptor `plan`: read before the fork, where it costs no page faults."""
    with open(fds.pop("plan"), "rb") as file:
        file.seek(0)
        plan: dict[str, Any] = json.load(file)
    return plan


def _let_go(fds: dict[str, int]) -> None:
    """A fresh child lets go of all that is the shim's but `fds` (pitfalls 3 and 4)."""
    signal.set_wakeup_fd(-1)
    for name in ("PIPE", "XFSZ", "INT", "TERM", "HUP", "CHLD"):
        signal.signal(getattr(signal, "SIG" + name), signal.SIG_DFL)
    _close_others(set(fds.values()))
    prctl(PR_SET_DUMPABLE, 0 if defended("undumpable") else 1)
    sys.path.clear()
    sys.meta_path.clear()
    sys.path_hooks.clear()


def _init_main(plan: dict[str, Any], fds: dict[str, int]) -> None:
    """The life of a container's first process."""
    with _child(fds["sync"]):
        _let_go(fds)
        Init(plan, fds).run()


def _join_main(plan: dict[str, Any], fds: dict[str, int], flags: int) -> None:
    """The life of the helper that joins the namespaces `flags` of the process behind the descriptor `target`
    and forks the process asked for into them.  What it tells on `told` is the pid of that one, its brother:
    the shim's own child (pitfall 6)."""
    with _child(fds["sync"]):
        _let_go(fds)
        init = Init(plan, fds)
        init.prepare()
        with _init_step("cannot join the container's namespaces"):
            setns(fds["target"], flags)
            pid = clone3(CLONE_PARENT, fds.get("cgroup"))[0]
        if pid:
            os.write(fds["told"], b"%d" % pid)
            os._exit(0)
        for name in ("told", "target"):
            os.close(fds.pop(name))
        init.run_joined()


def _close_others(kept: set[int]) -> None:
    """Close every descriptor above 2 that is not among `kept`: the shim holds those of all containers
    (pitfall 4)."""
    first = 3
    for fd in sorted(kept):
        if fd > first:
            close_range(first, fd - 1)
        first = max(first, fd + 1)
    close_range(first)


def strange_exit_code(pid: int, pidfd: int) -> Optional[int]:
    """How somebody else's child has ended, in the shell's way: 128 and the signal's number where one killed
    it.

    None where the kernel does not tell: it does of a zombie, and since 6.15 by the pidfd.
    proc_pid_stat(5)."""
    status = pidfd_exit_code(pidfd)
    if status is None:
        with contextlib.suppress(OSError, ValueError):
            with open(f"/proc/{pid}/stat", "rb") as file:
                fields = file.read().rpartition(b")")[2].split()
            signal.pidfd_send_signal(pidfd,
                                     0)  # type: ignore[attr-defined]  # still it, and no later one's pid
            status = int(fields[49]) if fields[0] == b"Z" else None
    if status is None:
        status = pidfd_exit_code(pidfd)  # somebody has reaped it meanwhile
    code = None if status is None else os.waitstatus_to_exitcode(status)
    return code if code is None or code >= 0 else 128 - code


class ShimProcess:
    """A process that the shim watches: its pid and pidfd, the kept descriptors by name, and its end once
    known."""

    def __init__(self, key: str, pid: int, pidfd: int, keep: dict[str, int]) -> None:
        self.key, self.pid, self.pidfd, self.keep = key, pid, pidfd, keep
        self.end: Optional[dict[str, Any]] = None

    def close(self) -> None:
        """Let all its descriptors go."""
        close_fds([self.pidfd, *self.keep.values()])
        self.keep.clear()


class HelperProcess:
    """The loop of a process that serves daemons and outlives them: a listening socket, the daemons'
    connections, and whatever else is watched.  A request OP is carried out by the method op_OP."""

    idle = -1.0     # seconds after which on_idle is called

    def __init__(self, listener: socket.socket) -> None:
        self.listener = listener
        self.connections: dict[int, socket.socket] = {}
        self.unsent: dict[int, list[tuple[bytes, list[int]]]] = {}  # by connection: packets and descriptors
        self.handlers: dict[int, Callable[[int], None]] = {}
        self.poll = select.epoll()
        self.finished = False
        self.watch(listener.fileno(), select.EPOLLIN, self._accept)

    def run(self) -> None:
        """Serve until told to quit."""
        while not self.finished:
            for fd, events in self.poll.poll(self.idle):
                if fd in self.handlers:
                    self.handlers[fd](events)
            self.on_idle()

    def watch(self, fd: int, events: int, handler: Callable[[int], None]) -> None:
        """Have `handler` called with what of `events` has come for the descriptor."""
        (self.poll.modify if fd in self.handlers else self.poll.register)(fd, events)
        self.handlers[fd] = handler

    def unwatch(self, fd: int) -> None:
        """The descriptor is about to be closed."""
        if self.handlers.pop(fd, None) is not None:
            self.poll.unregister(fd)

    def on_idle(self) -> None:
        """Called now and then."""

    def is_busy(self) -> bool:
        """Whether it must not quit."""
        return False

    def _accept(self, events: int) -> None:
        try:
            connection, _ = self.listener.accept()
        except OSError:  # the daemon has gone again, or has to try again when there are descriptors
            return
        self.connections[connection.fileno()], self.unsent[connection.fileno()] = connection, []
        self._await(connection)

    def _await(self, connection: socket.socket) -> None:
        def serve(events: int) -> None:
            self._send(connection) if events & select.EPOLLOUT else self._serve(connection)

        waiting = self.unsent[connection.fileno()]
        self.watch(connection.fileno(), select.EPOLLIN | (select.EPOLLOUT if waiting else 0), serve)

    def _send(self, connection: socket.socket, data: bytes = b"", fds: Iterable[int] = ()) -> None:
        """Send `data`, if any, behind what waits already: a daemon that does not read holds nobody up."""
        waiting = self.unsent[connection.fileno()]
        if data:
            waiting.append((data, [os.dup(fd) for fd in fds]))
        try:
            while waiting:
                socket.send_fds(connection, [waiting[0][0]], waiting[0][1], socket.MSG_DONTWAIT)
                close_fds(waiting.pop(0)[1])
        except BlockingIOError:
            pass
        except OSError:  # the daemon is gone: its end of file follows
            self._drop_unsent(waiting)
        self._await(connection)

    @staticmethod
    def _drop_unsent(waiting: list[tuple[bytes, list[int]]]) -> None:
        close_fds(fd for _, fds in waiting for fd in fds)
        waiting.clear()

    def _serve(self, connection: socket.socket) -> None:
        """Answer one request; a daemon that is gone is forgotten, its containers are not."""
        fds: list[int] = []
        try:
            data, fds = receive_fds(connection, SHIM_PACKET, 64)
            if not data:
                raise ConnectionResetError
            request = json.loads(data)
        except OSError:
            del self.connections[connection.fileno()]
            self._drop_unsent(self.unsent.pop(connection.fileno()))
            self.unwatch(connection.fileno())
            connection.close()
            return
        named = dict(zip(request.get("fds", ()), fds))
        answer: dict[str, Any] = {"seq": request["seq"]}
        sent: list[int] = []
        try:
            sent = getattr(self, "op_" + request["op"])(request, named, answer) or []
        except (OSError, KeyError, ValueError, AttributeError) as error:
            answer["error"] = f"{type(error).__name__}: {error}"
        close_fds(named.values())
        self._send(connection, json.dumps(answer).encode(), sent)

    def op_hello(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """Who the process is."""
        answer.update(protocol=SHIM_PROTOCOL, pid=os.getpid())

    def op_quit(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """End the process, unless it is busy."""
        answer["quitting"] = self.finished = not self.is_busy()
        if self.finished:
            with contextlib.suppress(OSError):
                os.unlink(self.listener.getsockname())


class Shim(HelperProcess):
    """The loop over the pidfds of all processes."""

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener)
        self.processes: dict[str, ShimProcess] = {}
        self.orphans, wakeup = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.watch(self.orphans, select.EPOLLIN, self._reap_orphans)
        signal.signal(signal.SIGCHLD, lambda number, frame: None)
        signal.set_wakeup_fd(wakeup, warn_on_full_buffer=False)

    def is_busy(self) -> bool:
        """Whether it has processes, or ends that no daemon has recorded."""
        return bool(self.processes)

    def _reap_orphans(self, events: int) -> None:
        """Reap what nobody else does: as a subreaper, for the sake of OCI runtimes' containers, the shim is
        given every process below it whose parent has ended."""
        with contextlib.suppress(BlockingIOError):
            os.read(self.orphans, 4096)
        own = {process.pid for process in self.processes.values() if process.end is None}
        with open("/proc/thread-self/children") as file:
            children = set(map(int, file.read().split()))
        for pid in children - own:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)

    def op_start(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> list[int]:
        """Fork a process into new namespaces; `keep:NAME` descriptors are held for later daemons."""
        if request["key"] in self.processes:
            raise KeyError(f"{request['key']} is running")
        plan = _read_plan(fds)
        pid, pidfd = self._clone(request["flags"], fds.get("cgroup"), fds.get("pid"))
        if pid == 0:
            _init_main(plan, {name: fd for name, fd in fds.items()
                              if name not in ("cgroup", "pid") and not name.startswith("keep:")})
        return self._follow(request, fds, answer, pid, pidfd)

    def op_exec(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> list[int]:
        """Fork a process into the namespaces `flags` of the process behind the descriptor `target`; where
        that fails there is no pid in the answer, and the reason comes on "sync"."""
        plan = _read_plan(fds)
        reader, writer = os.pipe()
        helper, helper_fd = clone3(0)
        if helper == 0:
            own = {name: fd for name, fd in fds.items() if not name.startswith("keep:")}
            _join_main(plan, {**own, "told": writer}, request["flags"])
        os.close(writer)
        told = os.read(reader, 16)  # not to its end: the process may be born frozen
        close_fds([reader, helper_fd])
        os.waitpid(helper, 0)
        if not told:
            return []
        return self._follow(request, fds, answer, int(told), os.pidfd_open(int(told)))

    def op_take(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """Watch and keep a process whose own shim is gone; it is no child of this one."""
        if request["key"] in self.processes:
            raise KeyError(f"{request['key']} is running")
        self._follow(request, fds, answer, request["pid"], fds.pop("pidfd"))

    def _follow(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any], pid: int,
                pidfd: int) -> list[int]:
        """Watch a process and keep its descriptors `keep:NAME`; completes the answer."""
        key, keep = request["key"], {name[5:]: fds.pop(name) for name in list(fds) if name[:5] == "keep:"}
        process = self.processes[key] = ShimProcess(key, pid, pidfd, keep)
        self.watch(pidfd, select.EPOLLIN, lambda events: self._reap(process))
        answer.update(pid=pid, key=key)
        return [pidfd]

    @staticmethod
    def _clone(flags: int, cgroup: Optional[int], processes: Optional[int]) -> tuple[int, int]:
        """clone3, into the PID namespace behind the descriptor `processes` where there is one: joining it
        counts for children, and the shim itself stays where it is."""
        own, pid = os.open("/proc/self/ns/pid", os.O_RDONLY | os.O_CLOEXEC), -1
        try:
            if processes is not None:
                setns(processes, CLONE_NEWPID)
            pid, pidfd = clone3(flags, cgroup)
            return pid, pidfd
        finally:
            if processes is not None and pid:
                setns(own, CLONE_NEWPID)
            os.close(own)

    def op_keep(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """Hold further descriptors for a process (its terminal)."""
        process = self.processes[request["key"]]
        for name in list(fds):
            process.keep[name] = fds.pop(name)

    def op_drop(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """Close one kept descriptor: a stdin that has ended."""
        fd = self.processes[request["key"]].keep.pop(request["name"], None)
        if fd is not None:
            os.close(fd)

    def op_fetch(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> list[int]:
        """The pid, pidfd and kept descriptors of a process, for a daemon that did not start it."""
        process = self.processes[request["key"]]
        answer.update(pid=process.pid, end=process.end, fds=["pidfd", *process.keep])
        return [process.pidfd, *process.keep.values()]

    def op_list(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """The keys of all processes that are not forgotten, in pages: those greater than `after`."""
        answer["keys"] = sorted(key for key in self.processes if key > request.get("after", ""))[:256]

    def op_forget(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """The end of a process has been recorded: drop all that is kept of it."""
        process = self.processes.get(request["key"])
        if process is not None and process.end is not None:
            del self.processes[process.key]
            process.close()

    def _reap(self, process: ShimProcess) -> None:
        """Take the exit status and tell every daemon that listens; forgotten only when a daemon says so."""
        try:
            ended: Any = os.waitid(os.P_PIDFD, process.pidfd, os.WEXITED)
            code: Optional[int] = ended.si_status + (0 if ended.si_code == os.CLD_EXITED else 128)
        except ChildProcessError:  # it was taken over from another shim
            code = strange_exit_code(process.pid, process.pidfd)
        process.end = {"exit": process.key, "pid": process.pid, "status": 255 if code is None else code,
                       "time": time.time_ns()}
        if code is None:
            process.end["error"] = "the exit code is not known: the shim that had started it was lost"
        self.unwatch(process.pidfd)
        packet = json.dumps(process.end).encode()
        for connection in self.connections.values():
            self._send(connection, packet)


def helper_main(listener_fd: int, role: str) -> None:
    """The process of the role `shim` or `proxy` from its start: `listener_fd` is the bound, listening
    SEQPACKET socket."""
    import gc
    import resource  # noqa: F401  the init's: nothing is imported after pivot_root (pitfall 3)
    os.chdir("/")
    set_process_name("docker-" + role)
    prctl(PR_SET_DUMPABLE, 0)
    prctl(PR_SET_CHILD_SUBREAPER, 1)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for real_time in (32, 33):  # posix_spawn leaves the C library's own ignored; containers would too
        reset_signal(real_time)
    helper = (Shim if role == "shim" else Proxy)(socket.socket(fileno=listener_fd))
    gc.collect()
    trim_memory()
    gc.freeze()
    if role == "shim":
        gc.disable()
    helper.run()


# ------------------------------------------------------------------------------------------------------------
# Execution driver: the daemon's side
#
# A spec in, a process out; it knows nothing of containers.  `build_plan` turns a Spec into the init's plan,
# the Shim client starts the shim from cached bytecode and a read-only image of the interpreter, or finds the
# one that runs. What a container is given by default (mounts, devices, masked and read-only paths) is
# Docker's, in its order.
# ------------------------------------------------------------------------------------------------------------

SHIM_SECTIONS = ("Constants", "Errors", "Kernel calls", "Netlink", "Execution driver: shim and init",
                 "Network driver: the proxy")
SHIM_HEAD = (
    "from __future__ import annotations\nimport contextlib, ctypes, errno, fcntl, json, os, select, signal, "
    "socket, stat, struct, sys, time"
)
SHIM_TIMEOUT = 10               # seconds that a shim has to take a request and to answer it
JOINED_NAMESPACES = (       # of a further process: all that its container has, shared with the host or not
    CLONE_NEWNS | CLONE_NEWPID | CLONE_NEWNET | CLONE_NEWIPC | CLONE_NEWUTS | CLONE_NEWCGROUP)
DEFAULT_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
_QUIET = MOUNT_ATTR_NOSUID | MOUNT_ATTR_NODEV | MOUNT_ATTR_NOEXEC

MASKED_PATHS = (
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
)
READONLY_PATHS = ("/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger")
DEVICE_NODES = (
    ("null", 1, 3),
    ("zero", 1, 5),
    ("full", 1, 7),
    ("tty", 5, 0),
    ("random", 1, 8),
    ("urandom", 1, 9),
)
DEVICE_LINKS = (("/dev/ptmx", "pts/ptmx"), ("/dev/fd", "/proc/self/fd"), ("/dev/stdin", "/proc/self/fd/0"),
                ("/dev/stdout", "/proc/self/fd/1"), ("/dev/stderr", "/proc/self/fd/2"))


APPARMOR = "/sys/kernel/security/apparmor"
APPARMOR_DEFAULT = "docker-default"


def _deny_beside(top: str, kept: str, access: str) -> list[str]:
    """AppArmor rules that deny `access` to all below `top` whose path there does not begin with `kept`."""
    return [f"deny {top}/{kept[:end]}[^{kept[end]}]** {access}," for end in range(len(kept))]


def apparmor_profile() -> str:
    """The profile docker-default: what a container's root may do but for the kernel's and the host's knobs in
    /proc and /sys, mounts, and processes outside.  apparmor.d(5)."""
    rules = [
        "#include <abstractions/base>", "network,", "capability,", "file,", "umount,", "deny mount,",
        "signal (receive) peer=unconfined,", f"signal (send,receive) peer={APPARMOR_DEFAULT},",
        f"ptrace (trace,read,tracedby,readby) peer={APPARMOR_DEFAULT},",
        "deny @{PROC}/[^s0-9]** w,", *_deny_beside("@{PROC}", "sys/kernel/shm", "w")[1:],
        "deny @{PROC}/{kcore,sysrq-trigger} rwklx,",
        *_deny_beside("/sys", "fs/cgroup/", "wklx"),
        "deny /sys/{firmware,kernel/security,devices/virtual/powercap}/** rwklx,"]
    return "\n  ".join(["#include <tunables/global>\n\n"
                        f"profile {APPARMOR_DEFAULT} flags=(attach_disconnected,mediate_deleted) {{", *rules]
                       ) + "\n}\n"


@functools.cache
def apparmor_default() -> str:
    """The profile of containers that name none, loaded where it was not; "" without AppArmor."""
    if not os.path.isdir(APPARMOR) or read_text("/sys/module/apparmor/parameters/enabled")[:1] != "Y":
        return ""
    if f"{APPARMOR_DEFAULT} (" not in read_text(APPARMOR + "/profiles"):
        import subprocess
        try:
            subprocess.run(["apparmor_parser", "-Kr"], input=apparmor_profile().encode(), check=True,
                           stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        except (OSError, subprocess.CalledProcessError) as error:
            log.warning("containers are not confined by AppArmor: its profile %s cannot be loaded: %s %s",
                        APPARMOR_DEFAULT, error, getattr(error, "output", ""))
            return ""
    return APPARMOR_DEFAULT


START_FAILED = ("failed to create task for container: failed to create shim task: OCI runtime create failed: "
                "unable to start container process: {}")
EXEC_FAILED = "OCI runtime exec failed: exec failed: unable to start container process: {}: unknown"


class StartError(DockerError):
    """The process did not come to execve; `code` is the exit code that Docker records (126, 127 or 128)."""

    def __init__(self, text: str, code: int) -> None:
        super().__init__(text)
        self.code = code


class CommandError(StartError, BadParameter):
    """The command is not there or not executable: the client's mistake, 400."""


class Spec(NamedTuple):
    """All that the execution driver must know to start one process in a container of its own."""

    key: str                                        # names the process towards the shim: the container's id
    args: list[str]
    env: list[str]
    cwd: str
    uid: int
    gid: int
    groups: list[int]
    capabilities: set[int]                        # numbers; bounding, permitted and effective set alike
    root_fd: int                                    # a detached mount of the root file system
    tty: bool = False
    console_size: tuple[int, int] = (0, 0)        # (height, width) in characters
    hostname: str = ""
    domainname: str = ""
    namespaces: int = 0                             # CLONE_NEW* to make
    join: dict[str, int] = {}                     # namespace descriptors to join, by name
    cgroup_join: list[list[str]] = []             # [path, text] writes that put the caller into its cgroups
    labels: list[list[str]] = []                  # [file of /proc/PID/attr, text]: its LSMs' from execve on
    mount_label: str = ""                           # the SELinux context of its own file systems
    cgroup_fd: Optional[int] = None                 # the v2 directory to be born in
    cgroup_enter: Optional[Callable[[int], None]] = None  # puts the waiting process into its cgroups
    idmap: IdMap = IdMap()                          # of the user namespace; identity without one
    runtime: tuple[str, ...] = ()                 # the OCI runtime that is to run it; none: this driver
    resources: dict[str, Any] = {}                # "linux" members of its config.json
    bare: bool = False                              # a program of the host's, with the root at its place
    network_enter: Optional[Callable[[int], None]] = None  # gives the waiting process's namespace its links
    cgroup_namespace: bool = False
    cgroup_mounts: list[dict[str, Any]] = []
    mounts: list[dict[str, Any]] = []             # further mounts, in order
    devices: list[dict[str, Any]] = []            # further device nodes
    privileged: bool = False
    readonly_root: bool = False
    masked_paths: tuple[str, ...] = MASKED_PATHS
    readonly_paths: tuple[str, ...] = READONLY_PATHS
    seccomp: bytes = b""                            # a classic BPF program; empty for none
    seccomp_flags: int = 0
    no_new_privileges: bool = False
    rlimits: list[tuple[int, int, int]] = []      # (RLIMIT_*, soft, hard)
    resident: bool = False                        # the init stays as pid 1
    sysctls: list[tuple[str, str]] = []
    oom_score_adj: Optional[int] = None
    shm_size: int = 64 << 20                        # bytes; 0 for no /dev/shm of its own


def default_mounts(spec: Spec) -> list[dict[str, Any]]:
    """The file systems that every container gets, in Docker's order."""
    context = [("context", spec.mount_label)] if spec.mount_label else []
    readonly: list[tuple[str, str]] = [] if spec.privileged else [("ro", "")]
    sys_attributes = _QUIET | (0 if spec.privileged else MOUNT_ATTR_RDONLY)

    def filesystem(kind: str, to: str, attributes: int, *options: tuple[str, str],
                   source: str = "") -> dict[str, Any]:
        return {"type": kind, "source": source or kind, "to": to, "attributes": attributes,
                "options": options}

    mounts = [
        filesystem("proc", "/proc", _QUIET),
        filesystem("tmpfs", "/dev", MOUNT_ATTR_NOSUID | MOUNT_ATTR_STRICTATIME, ("mode", "755"),
                   ("size", "65536k"), *context),
        filesystem("devpts", "/dev/pts", MOUNT_ATTR_NOSUID | MOUNT_ATTR_NOEXEC, ("newinstance", ""),
                   ("ptmxmode", "0666"), ("mode", "0620"), ("gid", "5"), *context),
        filesystem("sysfs", "/sys", sys_attributes, *readonly),
        *spec.cgroup_mounts,
        filesystem("mqueue", "/dev/mqueue", _QUIET)]
    if spec.shm_size:
        mounts.append(filesystem("tmpfs", "/dev/shm", _QUIET, ("mode", "1777"), ("size", f"{spec.shm_size}"),
                                 *context, source="shm"))
    return mounts


def device_mounts() -> list[dict[str, Any]]:
    """The nodes and links of a container's /dev."""
    nodes = [{"to": "/dev/" + name, "node": stat.S_IFCHR | 0o666, "rdev": os.makedev(major, minor),
              "host_node": "/dev/" + name}
             for name, major, minor in DEVICE_NODES]
    core = [("/dev/core", "/proc/kcore")] if os.path.exists("/proc/kcore") else []
    return nodes + [{"to": to, "link": target} for to, target in (*DEVICE_LINKS, *core)]


# What the init is told of a Spec as it is
_PLAN_FIELDS = """args env uid gid groups tty console_size hostname domainname cgroup_join labels bare
    cgroup_namespace readonly_root seccomp_flags no_new_privileges rlimits resident sysctls
    oom_score_adj""".split()


def build_plan(spec: Spec, root_place: str, joins: bool = False) -> dict[str, Any]:
    """The init's plan for `spec`, ready for JSON; `root_place` is an empty directory of the host to mount
    on.  A process that `joins` a container finds everything mounted."""
    mask = sum(1 << number for number in spec.capabilities)
    masks = {"bounding": mask, "permitted": mask, "effective": mask, "last": last_capability()}
    return {
        **{name: getattr(spec, name) for name in _PLAN_FIELDS},
        "cwd": spec.cwd or "/", "capabilities": masks, "seccomp": spec.seccomp.hex(),
        "join": [name for name in spec.join if name != "pid"],
        "loopback": bool(spec.namespaces & CLONE_NEWNET),
        "wait": spec.cgroup_enter is not None, "remapped": bool(spec.idmap), "root_place": root_place,
        "mounts": [] if joins else default_mounts(spec) + spec.devices + device_mounts() + spec.mounts,
        "masked_paths": () if spec.privileged else spec.masked_paths,
        "readonly_paths": () if spec.privileged else spec.readonly_paths}


# Namespaces and mount attributes as runtime-spec names them
_OCI_NAMESPACES = {"mount": CLONE_NEWNS, "pid": CLONE_NEWPID, "ipc": CLONE_NEWIPC, "uts": CLONE_NEWUTS,
                   "network": CLONE_NEWNET, "user": CLONE_NEWUSER}
_OCI_MOUNT_OPTIONS = (("ro", MOUNT_ATTR_RDONLY), ("nosuid", MOUNT_ATTR_NOSUID), ("nodev", MOUNT_ATTR_NODEV),
                      ("noexec", MOUNT_ATTR_NOEXEC), ("strictatime", MOUNT_ATTR_STRICTATIME))
_OCI_SECONDS = 60.0     # that a runtime may take for one command


def oci_config(spec: Spec, root: str) -> dict[str, Any]:
    """config.json for an OCI runtime that is to start `spec` on the root file system at `root`.

    Source: opencontainers/runtime-spec, config.md and config-linux.md, 1.0."""
    names = sorted(CAPABILITIES[number] for number in spec.capabilities)
    spaces = [{"type": name} for name, flag in _OCI_NAMESPACES.items() if spec.namespaces & flag]
    spaces += [{"type": name, "path": f"/proc/{os.getpid()}/fd/{fd}"} for name, fd in spec.join.items()
               if name in _OCI_NAMESPACES]
    spaces += [{"type": "cgroup"}] if spec.cgroup_namespace else []
    own = default_mounts(spec._replace(cgroup_mounts=[{
        "type": "cgroup", "source": "cgroup", "to": "/sys/fs/cgroup", "options": [],
        "attributes": _QUIET | (0 if spec.privileged else MOUNT_ATTR_RDONLY)}]))
    mounts = [{"destination": entry["to"], "type": entry.get("type", "bind"),
               "source": entry.get("from") or entry.get("source") or entry["type"],
               "options": [name for name, flag in _OCI_MOUNT_OPTIONS if entry.get("attributes", 0) & flag]
               + ([f"{key}={value}" if value else key for key, value in entry["options"]] if "type" in entry
                  else ["rbind" if entry.get("recursive") else "bind"])}
              for entry in own + spec.mounts if "type" in entry or "from" in entry]
    devices = [{"path": node["to"], "type": "b" if stat.S_ISBLK(node["node"]) else "c",
                "major": os.major(node["rdev"]), "minor": os.minor(node["rdev"]),
                "fileMode": stat.S_IMODE(node["node"]), "uid": node["owner"][0], "gid": node["owner"][1]}
               for node in spec.devices if "node" in node]
    process: dict[str, Any] = {
        "terminal": spec.tty, "args": spec.args, "env": spec.env, "cwd": spec.cwd,
        "user": {"uid": spec.uid, "gid": spec.gid, "additionalGids": spec.groups},
        "capabilities": dict.fromkeys(("bounding", "effective", "permitted"), names),
        "rlimits": [{"type": _rlimit_name(number), "soft": soft, "hard": hard}
                    for number, soft, hard in spec.rlimits],
        "noNewPrivileges": spec.no_new_privileges}
    for _, text in spec.labels:
        if text.startswith("exec "):
            process["apparmorProfile"] = text[5:]
    if spec.tty and any(spec.console_size):
        process["consoleSize"] = dict(zip(("height", "width"), spec.console_size))
    if spec.oom_score_adj is not None:
        process["oomScoreAdj"] = spec.oom_score_adj
    linux = {"namespaces": spaces, "devices": devices, "sysctl": dict(spec.sysctls), **spec.resources,
             "maskedPaths": () if spec.privileged else spec.masked_paths,
             "readonlyPaths": () if spec.privileged else spec.readonly_paths}
    for name, ranges in (("uidMappings", spec.idmap.uids), ("gidMappings", spec.idmap.gids)):
        if ranges:
            linux[name] = [dict(zip(("containerID", "hostID", "size"), extent)) for extent in ranges]
    return {"ociVersion": "1.0.2", "process": process, "mounts": mounts, "linux": linux,
            "root": {"path": root, "readonly": spec.readonly_root}, "hostname": spec.hostname,
            **({"domainname": spec.domainname} if spec.domainname else {})}


def _rlimit_name(number: int) -> str:
    import resource
    return next(name for name in dir(resource)
                if name.startswith("RLIMIT_") and getattr(resource, name) == number)


def open_sources(mounts: list[dict[str, Any]]) -> dict[str, int]:
    """Open what is bound from the host, for an init whose root is nobody there: {name: descriptor}.

    The entries of `mounts` then name the descriptors; device nodes, which it may not make, are bound too.
    Cgroups are left to it: they may not be there yet, and anybody reaches them."""
    opened: dict[str, int] = {}
    try:
        for number, entry in enumerate(mounts):
            path = entry.get("from") or entry.get("host_node")
            if path and not path.startswith("/sys/fs/cgroup/"):
                recursive = AT_RECURSIVE if entry.get("recursive") else 0
                entry["from"] = f"source:{number}"
                opened[entry["from"]] = open_tree(AT_FDCWD, path,
                                                  OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC | recursive)
                entry.pop("node", None)
    except OSError as error:
        _close_all_of(opened)
        raise StartError(f'error mounting "{path}": {(error.strerror or "").lower()}', 128) from None
    return opened


@functools.cache
def last_capability() -> int:
    """The highest capability that the kernel knows; /proc/sys/kernel/cap_last_cap."""
    with open("/proc/sys/kernel/cap_last_cap") as file:
        return int(file.read())


def shim_source(text: str) -> str:
    """The shim's program: its sections of `text`, each on the lines where the whole file has it."""
    lines = text.splitlines()
    banners = [number for number in range(1, len(lines)) if lines[number].startswith("# -----")
               and lines[number + 1][:2] == "# " and lines[number - 1][:1] != "#"]
    program = [""] * len(lines)
    program[:2] = SHIM_HEAD.splitlines()
    for start, end in zip(banners, banners[1:] + [len(lines)]):
        if lines[start + 1][2:] in SHIM_SECTIONS:
            program[start:end] = lines[start:end]
    return "\n".join(program) + "\nhelper_main(int(sys.argv[1]), sys.argv[2])\n"


def shim_bytecode(directory: str) -> str:
    """The path of the shim's bytecode in `directory`, compiled when these sections and this interpreter have
    none there (pitfall 1)."""
    with open(SOURCE, encoding="utf-8") as file:
        program = shim_source(file.read())
    digest = hashlib.sha256(program.strip().encode() + sys.version.encode()).hexdigest()[:16]
    path = os.path.join(directory, f"shim-{digest}.pyc")
    if not os.path.exists(path):
        for stale in glob.glob(os.path.join(glob.escape(directory), "shim-*.pyc")):
            os.unlink(stale)
        write_bytecode(path, compile(program, SOURCE, "exec", dont_inherit=True, optimize=2))
    return path


def write_bytecode(path: str, code: types.CodeType) -> None:
    """A .pyc file that Python runs directly, readable by root alone; PEP 552 for its head."""
    import importlib.util
    import marshal
    write_state(path, importlib.util.MAGIC_NUMBER + bytes(12) + marshal.dumps(code), durable=False)


def sealed_interpreter() -> int:
    """A descriptor of this interpreter's file through a detached read-only mount: a container that reaches it
    by /proc/self/exe cannot write to it (CVE-2019-5736, pitfall 2)."""
    program = os.path.realpath(sys.executable)
    if not defended("exe-seal"):
        return os.open(program, os.O_PATH | os.O_CLOEXEC)
    sealed = open_tree(AT_FDCWD, program)
    mount_setattr(sealed, "", AT_EMPTY_PATH, set=MOUNT_ATTR_RDONLY)
    return sealed


class Process:
    """A process that `shim` watches: `pid` (the host's), `pidfd`, `end` (None, then {"status", "time"} and
    perhaps "error").

    `kept` are the streams of one that was adopted, by name; `streams()` gives copies of those that a new shim
    is to keep where the old one is lost."""

    def __init__(self, key: str, shim: ShimClient, pid: int = 0, pidfd: int = -1) -> None:
        self.key, self.shim, self.pid, self.pidfd = key, shim, pid, pidfd
        self.console = -1
        self.kept: dict[str, int] = {}
        self.streams: Callable[[], dict[str, int]] = dict
        self.end: Optional[dict[str, Any]] = None
        self.ended = threading.Event()
        self._lock = threading.Lock()
        self._on_end: Optional[Callable[[Process], None]] = None

    def deliver(self, on_end: Callable[[Process], None]) -> None:
        """Have `on_end` called once with this process when it has ended; at once if it has."""
        with self._lock:
            self._on_end = on_end
            ended = self.end is not None
        if ended:
            on_end(self)

    def finish(self, end: dict[str, Any]) -> None:
        """The shim tells that the process has ended."""
        with self._lock:
            if self.end is not None:
                return
            self.end = end
            on_end = self._on_end
        self.ended.set()
        if on_end is not None:
            on_end(self)

    def send_signal(self, number: int) -> None:
        """Send the signal; ProcessLookupError when the process has ended."""
        signal.pidfd_send_signal(self.pidfd, number)  # type: ignore[attr-defined]

    def forget(self) -> None:
        """Its end has been recorded everywhere: let go all that is kept of it."""
        self.shim.processes.pop(self.key, None)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1
        close_fds(self.kept.values())
        self.kept = {}
        self.shim.forgotten(self.key)


class HelperClient:
    """The daemon's connection to the helper process of a role at `path`: requests from any thread."""

    role = ""

    def __init__(self, path: str) -> None:
        self.path = path
        self.pid = 0
        self._socket: Optional[socket.socket] = None
        self._sequence = itertools.count(1)
        self._waiting: dict[int, queue.SimpleQueue[Any]] = {}

    @property
    def connected(self) -> bool:
        """Whether there is a process to talk to."""
        return self._socket is not None

    def connect(self) -> bool:
        """Connect to the process; False when none listens, DockerError when it does not answer."""
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, struct.pack("ll", SHIM_TIMEOUT, 0))
        try:
            connection.connect(self.path)
        except OSError:
            connection.close()
            return False
        self._begin(connection)
        return True

    def _begin(self, connection: socket.socket) -> None:
        self._socket = connection
        threading.Thread(target=self._read, args=(connection,), name=self.role, daemon=True).start()
        self.pid = self.call("hello")[0]["pid"]

    def spawn(self, bytecode: str) -> None:
        """Start the process, in a session of its own, with nothing of the daemon's but its listening socket,
        and connect to it; DockerError when that fails."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
        listener.bind(self.path)
        os.chmod(self.path, 0o600)
        listener.listen(16)
        log_path = os.path.join(os.path.dirname(self.path), self.role + ".log")
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        errors = os.open(log_path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        program = sealed_interpreter()
        environment = {"LC_ALL": "C.UTF-8", "LD_LIBRARY_PATH": os.path.join(sys.base_prefix, "lib")}
        if "DOCKERD_FAILPOINTS" in os.environ:
            environment["DOCKERD_FAILPOINTS"] = os.environ["DOCKERD_FAILPOINTS"]
        try:
            os.posix_spawn(
                f"/proc/self/fd/{program}", [sys.executable, "-I", "-S", bytecode, "3", self.role],
                environment,
                file_actions=[(os.POSIX_SPAWN_DUP2, fd, number)
                              for number, fd in enumerate((null, errors, errors, listener.fileno()))],
                setsid=True, setsigmask=())
            connected = self.connect()
        finally:
            listener.close()
            close_fds([null, errors, program])
        if not connected:
            raise DockerError(f"cannot start the {self.role}: see {log_path}")

    def _read(self, connection: socket.socket) -> None:
        """The reader thread: answers go to their callers, what comes unasked to `_told`."""
        while True:
            try:
                data, fds = receive_fds(connection, SHIM_PACKET, 64)
            except OSError:
                data = b""
            if not data:
                break
            packet = json.loads(data)
            slot = self._waiting.pop(packet.get("seq"), None)
            if slot is not None:
                slot.put((packet, fds))
            else:
                self._told(packet, fds)
        self._socket = None
        for sequence in list(self._waiting):
            self._waiting.pop(sequence).put(None)
        connection.close()
        self._gone()

    def _told(self, packet: dict[str, Any], fds: list[int]) -> None:
        """A packet that answers nobody who still waits."""
        close_fds(fds)

    def _gone(self) -> None:
        """The process is gone."""

    def _send(self, operation: str, sequence: int, fds: dict[str, int], fields: dict[str, Any]) -> None:
        """Send one request; a packet is whole or not sent at all, so that no lock is needed."""
        packet = json.dumps({"op": operation, "seq": sequence, "fds": list(fds), **fields}).encode()
        connection = self._socket
        if connection is None:
            raise DockerError(f"the {self.role} is gone")
        try:
            socket.send_fds(connection, [packet], list(fds.values()))
        except BlockingIOError:
            raise DockerError(self._stuck(operation)) from None
        except OSError as error:
            raise DockerError(f"the {self.role} is gone: {error.strerror}") from None

    def _stuck(self, operation: str) -> str:
        return (f"the {self.role} (pid {self.pid or 'not known'}, {self.path}) has not answered {operation} "
                f"within {SHIM_TIMEOUT} s")

    def call(self, operation: str, fds: Optional[dict[str, int]] = None,
             **fields: Any) -> tuple[dict[str, Any], list[int]]:
        """Send one request and wait for its answer: (fields, descriptors).  DockerError when the process
        refuses, is gone, or does not answer in time."""
        sequence = next(self._sequence)
        slot: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._waiting[sequence] = slot
        try:
            self._send(operation, sequence, fds or {}, fields)
            received = slot.get(timeout=SHIM_TIMEOUT)
        except queue.Empty:
            if self._waiting.pop(sequence, None) is not None:
                raise DockerError(self._stuck(operation)) from None
            received = slot.get()  # it came at the last moment
        finally:
            self._waiting.pop(sequence, None)
        if received is None:
            raise DockerError(f"the {self.role} is gone")
        answer, descriptors = received
        if "error" in answer:
            raise DockerError(f"the {self.role} refused {operation}: {answer['error']}")
        return answer, descriptors

    def post(self, operation: str, **fields: Any) -> None:
        """Send one request whose answer does not matter."""
        with contextlib.suppress(DockerError):
            self._send(operation, 0, {}, fields)

    def keys(self) -> list[str]:
        """The keys of all processes that it runs or whose end it still remembers."""
        keys: list[str] = []
        while True:
            page = self.call("list", after=keys[-1] if keys else "")[0]["keys"]
            if not page:
                return keys
            keys += page

    def close(self) -> None:
        """Ask the process to end, if it is not busy, and let the connection go."""
        with contextlib.suppress(DockerError):
            self.call("quit")
        connection = self._socket
        if connection is not None:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class ShimClient(HelperClient):
    """The connection to the shim at `path`: ends of processes go to their on_end, and `on_loss(self)` is
    called in a thread of its own when the shim is gone."""

    role = "shim"

    def __init__(self, path: str, on_loss: Callable[[ShimClient], None]) -> None:
        super().__init__(path)
        self.on_loss = on_loss
        self.retired = False    # another one starts what is new: this one quits when it has no process
        self.processes: dict[str, Process] = {}

    def _told(self, packet: dict[str, Any], fds: list[int]) -> None:
        """The end of a process, or an answer that comes too late: what was started after all has to end."""
        if packet.get("exit") in self.processes:
            self.processes[packet["exit"]].finish(packet)
        elif "key" in packet and fds:
            process = Process(packet["key"], self, packet["pid"], fds.pop(0))
            self.processes[process.key] = process
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.deliver(Process.forget)
        super()._told(packet, fds)

    def _gone(self) -> None:
        self.on_loss(self)

    def adopt(self, key: str) -> Process:
        """The process `key` that an earlier daemon started, with its kept streams."""
        process = self.processes[key] = Process(key, self)
        answer, fds = self.call("fetch", key=key)
        process.pid = answer["pid"]
        process.kept = dict(zip(answer["fds"], fds))
        process.pidfd = process.kept.pop("pidfd")
        process.console = process.kept.get("console", -1)
        if answer["end"]:
            process.finish(answer["end"])
        return process

    def take(self, process: Process, streams: dict[str, int]) -> None:
        """Watch a process that no shim watches, and keep copies of its `streams`."""
        process.shim, self.processes[process.key] = self, process
        self.call("take", {"pidfd": process.pidfd, **{"keep:" + name: fd for name, fd in streams.items()}},
                  key=process.key, pid=process.pid)

    def forgotten(self, key: str) -> None:
        """Nothing more is wanted of the process `key`; the last one of a retired shim ends it."""
        self.post("forget", key=key)
        if self.retired and not self.processes:
            self.post("quit")

    def close(self) -> None:
        """Ask the shim to end, if it has no process, and let the connection go."""
        self.on_loss = lambda client: None
        super().close()


class ExecutionDriver:
    """Starts processes through the shim; `name` is what info and the start's log line call it.

    `shim` is the one of this very source, which starts what is new; those of other versions go on with what
    they have."""

    name = "native"

    def __init__(self, exec_root: str) -> None:
        os.makedirs(exec_root, 0o711, exist_ok=True)
        self.exec_root = exec_root
        self.bytecode = shim_bytecode(exec_root)
        self.shim = ShimClient(self.bytecode[:-3] + "sock", self._lost)
        self._older: list[ShimClient] = []
        self._opening = threading.Lock()
        self.root_place = os.path.join(exec_root, "rootfs")
        os.makedirs(self.root_place, 0o700, exist_ok=True)

    def open(self) -> ShimClient:
        """The shim that starts processes, started itself where it does not run; DockerError where it
        cannot."""
        with self._opening:
            if not self.shim.connected:
                self.shim = ShimClient(self.shim.path, self._lost)
                if not self.shim.connect():
                    self.shim.spawn(self.bytecode)
            return self.shim

    def adopt(self) -> dict[str, Process]:
        """All processes that shims of earlier daemons run or remember, by key; a shim that does not answer is
        passed over."""
        found: dict[str, Process] = {}
        for path in glob.glob(os.path.join(glob.escape(self.exec_root), "shim*.sock")):
            shim = self.shim if path == self.shim.path else ShimClient(path, self._lost)
            try:
                if not shim.connect():
                    os.unlink(path)
                    continue
                found.update((key, shim.adopt(key)) for key in shim.keys())
            except DockerError as error:
                log.error("passing over a shim: %s", error)
                continue
            if shim is not self.shim:
                self._older.append(shim)
                shim.retired = True
                if not shim.processes:
                    shim.close()
        return found

    def rescue(self, key: str, pid: int, pidfd: int) -> Process:
        """Watch a running process that has lost both its shim and its daemon, with what is left of its
        streams: the pipes that it still holds itself."""
        process = Process(key, self.open(), pid, pidfd)
        for number, name in enumerate(("stdin", "stdout", "stderr")):
            with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
                place = os.open(f"/proc/{pid}/fd/{number}", os.O_PATH | os.O_CLOEXEC)
                stack.callback(os.close, place)
                if stat.S_ISFIFO(os.fstat(place).st_mode):
                    mode = (os.O_RDONLY if number else os.O_WRONLY) | os.O_NONBLOCK | os.O_CLOEXEC
                    process.kept[name] = os.open(f"/proc/self/fd/{place}", mode)
        process.shim.take(process, process.kept)
        return process

    def _lost(self, client: ShimClient) -> None:
        """A shim is gone, its processes run on: another one watches them and keeps their streams."""
        orphans = [process for process in list(client.processes.values())
                   if process.end is None and process.pidfd >= 0]
        if orphans:
            log.error("the shim is gone: %d containers run on without it", len(orphans))
        pause = 0.1
        while orphans:
            try:
                self._hand_over(orphans[-1])
                orphans.pop()
            except (DockerError, OSError) as error:
                log.error("cannot watch the process of %s: %s", orphans[-1].key[:12], error)
                time.sleep(pause)
                pause = min(2 * pause, 60)

    def _hand_over(self, process: Process) -> None:
        streams = process.streams()
        try:
            self.open().take(process, streams)
        finally:
            close_fds(streams.values())

    def close(self) -> None:
        """Let all shims go; those without a process end."""
        for shim in (self.shim, *self._older):
            shim.close()

    def start(self, spec: Spec, streams: dict[str, int], keep: dict[str, int], target: int = -1) -> Process:
        """Start `spec` and return once its execve has succeeded; with `target`, a pidfd, as a further process
        in that one's namespaces.

        `streams` are the process's own stdin, stdout and stderr (none with a terminal), `keep` the daemon's
        ends of them, which the shim holds too.  With a terminal the result's `console` is its master.  Raises
        StartError, CommandError (exit codes 126 and 127) or DockerError; then no process is left."""
        if spec.runtime and target < 0:
            return self._start_by_runtime(spec, streams, keep)
        shim, joins = self.open(), target >= 0
        process = shim.processes[spec.key] = Process(spec.key, shim)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        plan = os.memfd_create("plan", os.MFD_CLOEXEC)
        opened = [plan]
        try:
            with theirs:
                document = build_plan(spec, self.root_place, joins)
                fds = {"plan": plan, "sync": theirs.fileno(), **streams}
                fds.update({"target": target} if joins else {"root": spec.root_fd, **spec.join})
                if spec.idmap and not joins:
                    sources = open_sources(document["mounts"])
                    opened += sources.values()
                    fds.update(sources)
                    document.update(cgroup_join=[], rlimits=[], oom_score_adj=None, wait=True, root_place="/")
                os.write(plan, json.dumps(document).encode())
                for fd in streams.values() if spec.idmap else ():
                    if stat.S_ISFIFO(os.fstat(fd).st_mode):
                        os.fchown(fd, *spec.idmap.to_host(spec.uid, spec.gid))
                if spec.cgroup_fd is not None:
                    fds["cgroup"] = spec.cgroup_fd
                fds.update({"keep:" + name: fd for name, fd in keep.items()})
                answer, received = shim.call(
                    "exec" if joins else "start", fds, key=spec.key, flags=spec.namespaces)
            if received:
                process.pid, process.pidfd = answer["pid"], received[0]
            failed = EXEC_FAILED if joins else START_FAILED
            if document["wait"]:
                self._enter(process, ours, functools.partial(self._admit, spec), failed)
            if spec.network_enter:
                self._enter(process, ours, spec.network_enter, failed)
            self._await_execve(process, ours, failed)
            return process
        except BaseException:
            self._abandon(process)
            raise
        finally:
            ours.close()
            close_fds(opened)

    # OCI runtimes: each container has a bundle, which also tells what command its runtime is

    def _bundle(self, key: str) -> str:
        return os.path.join(self.exec_root, "oci", key[:16])  # short: a socket's path has at most 107 bytes

    def _runtime(self, key: str, *arguments: str) -> tuple[int, str]:
        """Have the runtime of a container do something; (exit code, its last error)."""
        import subprocess
        bundle = self._bundle(key)
        with open(bundle + "/runtime.json", encoding="utf-8") as file:
            command = [*json.load(file), *arguments]
        try:
            code = subprocess.run(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                                  stderr=subprocess.DEVNULL, timeout=_OCI_SECONDS).returncode
        except (OSError, subprocess.SubprocessError) as error:
            return 255, str(error)
        return code, self._runtime_error(bundle)

    @staticmethod
    def _runtime_error(bundle: str) -> str:
        error = "the OCI runtime does not say why"
        for line in read_text(bundle + "/log").splitlines():
            with contextlib.suppress(ValueError):
                entry = json.loads(line)
                error = entry["msg"] if entry.get("level") in ("error", "fatal") else error
        return error

    def _start_by_runtime(self, spec: Spec, streams: dict[str, int], keep: dict[str, int]) -> Process:
        """Start `spec` by an OCI runtime: `create` under the shim, which inherits the container's first
        process and tells its end as it does of its own, then `start`."""
        self.discard(spec.key)
        bundle = self._bundle(spec.key)
        os.makedirs(bundle, 0o700)
        command = [*spec.runtime, "--root", os.path.join(self.exec_root, "oci", "state"),
                   "--log", bundle + "/log", "--log-format", "json"]
        for name, content in (("runtime", command), ("config", oci_config(spec, self.root_place))):
            write_state(f"{bundle}/{name}.json", json.dumps(content).encode(), durable=False)
        create = ["create", "--bundle", bundle, "--pid-file", bundle + "/pid"]
        with contextlib.ExitStack() as held, contextlib.ExitStack() as undo:
            undo.callback(self.discard, spec.key)
            listener = held.enter_context(socket.socket(socket.AF_UNIX))
            if spec.tty:
                listener.bind(bundle + "/tty")
                listener.listen()
                listener.settimeout(_OCI_SECONDS)
                create += ["--console-socket", bundle + "/tty"]
            self._create_by_runtime(spec, [*command, *create, spec.key], streams)
            pid, shim = int(read_text(bundle + "/pid")), self.open()
            process = Process(spec.key, shim, pid, os.pidfd_open(pid))
            shim.take(process, keep)
            undo.callback(self._abandon, process)
            if spec.tty:
                with listener.accept()[0] as connection:
                    process.console, = receive_fds(connection, 4096, 1)[1]
                shim.call("keep", {"console": process.console}, key=spec.key)
            if spec.network_enter:
                spec.network_enter(pid)
            code, error = self._runtime(spec.key, "start", spec.key)
            if code:
                self._refuse(error)
            undo.pop_all()
            return process

    def _create_by_runtime(self, spec: Spec, command: list[str], streams: dict[str, int]) -> None:
        """Run the runtime's `create` where it finds the root; what it is given as streams is the
        container's."""
        null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
        try:
            creator = self.start(spec._replace(
                key=spec.key + "-create", args=command, env=["PATH=" + DEFAULT_PATH], bare=True, runtime=(),
                namespaces=CLONE_NEWNS, join={}, cgroup_join=[], cgroup_fd=None, cgroup_enter=None,
                network_enter=None, idmap=IdMap(), tty=False, uid=0),
                {name: streams.get(name, null) for name in ("stdin", "stdout", "stderr")}, {})
        finally:
            os.close(null)
        if not creator.ended.wait(_OCI_SECONDS):
            creator.send_signal(signal.SIGKILL)
            creator.ended.wait(10)
        creator.forget()
        if creator.end is None or creator.end["status"]:
            self._refuse(self._runtime_error(self._bundle(spec.key)))

    @staticmethod
    def _refuse(error: str) -> None:
        codes = (("executable file", 127), ("no such file", 127), ("permission denied", 126))
        code = next((code for text, code in codes if text in error.lower()), 128)
        raise (CommandError if code != 128 else StartError)(
            "failed to create task for container: failed to create shim task: OCI runtime create failed: "
            + error, code)

    def discard(self, key: str) -> None:
        """Have the OCI runtime of a container that has ended, if it had one, forget it too."""
        bundle = self._bundle(key)
        if os.path.exists(bundle + "/runtime.json"):
            code, error = self._runtime(key, "delete", "--force", key)
            if code:
                log.debug("the OCI runtime does not delete %s: %s", key[:12], error)
        if os.path.exists(bundle):
            remove_tree(bundle)

    @staticmethod
    def _admit(spec: Spec, pid: int) -> None:
        """Do for the waiting init what only the host's root may: its cgroups and, for a remapped one, its
        map and its limits."""
        if spec.cgroup_enter:
            spec.cgroup_enter(pid)
        if not spec.idmap:
            return
        import resource
        try:
            for path, _ in spec.cgroup_join:
                _write_file(path, str(pid))
            for number, soft, hard in spec.rlimits:
                resource.prlimit(pid, number, (soft, hard))
            if spec.oom_score_adj is not None:
                _write_file(f"/proc/{pid}/oom_score_adj", str(spec.oom_score_adj))
            for name, ranges in (("uid_map", spec.idmap.uids), ("gid_map", spec.idmap.gids)):
                _write_file(f"/proc/{pid}/{name}", "".join(f"{a} {b} {count}\n" for a, b, count in ranges))
        except (OSError, ValueError) as error:
            raise StartError(f"cannot set the user namespace up: {error}", 128) from None

    def _enter(self, process: Process, sync: socket.socket, enter: Callable[[int], None],
               failed: str) -> None:
        """Do for the waiting init what only the daemon can, and let it go on; where that fails because the
        init has failed, its own reason is told."""
        try:
            enter(process.pid)
            sync.send(b"\0")
        except OSError:
            if process.ended.wait(0.1):
                self._await_execve(process, sync, failed)
            raise

    def _await_execve(self, process: Process, sync: socket.socket, failed: str) -> None:
        """Read what the init tells until its end of file: its terminal, and perhaps what stood in the way."""
        while True:
            data, fds = receive_fds(sync, SHIM_PACKET, 1)
            if not data:
                break
            message = json.loads(data)
            if "console" in message:
                process.console = fds[0]
                process.shim.call("keep", {"console": process.console}, key=process.key)
            else:
                kind = CommandError if message["code"] in (126, 127) else StartError
                raise kind(failed.format(message["error"]), message["code"])
        if not process.pid:
            raise StartError(failed.format("the container has ended"), 128)

    def _abandon(self, process: Process) -> None:
        """A start that failed leaves no process: wait for the child's end, by force, and forget it."""
        if process.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                process.send_signal(signal.SIGKILL)
            process.ended.wait(10)
        if process.console >= 0:
            os.close(process.console)
        process.forget()


# ------------------------------------------------------------------------------------------------------------
# Network driver
#
# Networks and what a container has of them: address pools, bridges and veth pairs, the firewall's back ends,
# published ports with their proxy, and the resolver of user networks.  A Network owns its bridge and its
# addresses, a Sandbox is one container's share: addresses and ports are taken before its process exists, and
# its links made when there is a namespace to put them in.  Interfaces: rtnetlink(7), veth(4),
# linux/netfilter/nf_tables.h, iptables-extensions(8), RFC 1035 (DNS), splice(2); what is called what, and
# which rules stand where, is Docker's.
# ------------------------------------------------------------------------------------------------------------

HOSTS_HEAD = ("127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost ip6-loopback\nfe00::0\tip6-localnet\n"
              "ff00::0\tip6-mcastprefix\nff02::1\tip6-allnodes\nff02::2\tip6-allrouters\n")
DEFAULT_NAME_SERVERS = ("8.8.8.8", "8.8.4.4")
RESOLVER_ADDRESS = "127.0.0.11"


def hosts_text(host_config: dict[str, Any], lines: Iterable[str] = (), gateways: Iterable[str] = ()) -> str:
    """The container's /etc/hosts: the host's own in its network, else the standard names; then --add-host
    (`gateways` is what host-gateway stands for), and `lines`.  BadParameter where it stands for nothing."""
    text = read_text("/etc/hosts") if host_config["NetworkMode"] == "host" else HOSTS_HEAD
    for entry in host_config.get("ExtraHosts") or []:
        name, _, address = entry.partition(":")
        if address == "host-gateway" and not gateways:
            raise BadParameter("unable to derive the IP value for host-gateway")
        for value in gateways if address == "host-gateway" else (address.strip("[]"),):
            text += f"{value}\t{name}\n"
    return text + "".join(line + "\n" for line in lines)


def edit_hosts(path: str, stale: Iterable[str], fresh: Iterable[str]) -> None:
    """Take the lines `stale` out of a running container's hosts file and add `fresh`.  In place: the file is
    bound into the container, a new one would not be seen there."""
    gone = set(stale)
    with contextlib.suppress(OSError):
        with os.fdopen(os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC), "r+b") as file:
            kept = [line for line in file.read(1 << 20).splitlines()
                    if line.decode(errors="replace") not in gone]
            file.seek(0)
            file.write(b"".join(line + b"\n" for line in kept + [line.encode() for line in fresh]))
            file.truncate()


def host_resolv() -> dict[str, list[str]]:
    """What the host's resolv.conf says: "nameserver", "search" and "options"."""
    found: dict[str, list[str]] = {"nameserver": [], "search": [], "options": []}
    for line in read_text("/etc/resolv.conf").splitlines():
        word, *values = line.split()[:8] or [""]
        if word in found and values:
            found[word] = found[word] + values[:1] if word == "nameserver" else values
    return found


def resolv_text(host_config: dict[str, Any], config: Any, resolver: bool = False) -> str:
    """The container's /etc/resolv.conf: --dns, --dns-search and --dns-option of the container, else of the
    daemon, else the host's.  Outside the host's network its loopback servers are of no use and are left out;
    with `resolver` the one name server is ours, and the others are its upstreams."""
    host = host_resolv()
    searches = host_config.get("DnsSearch") or config.dns_search or host["search"]
    options = list(host_config.get("DnsOptions") or config.dns_opts or host["options"])
    servers = [RESOLVER_ADDRESS] if resolver else name_servers(host_config, config)
    if resolver and not any(option.startswith("ndots:") for option in options):
        options.append("ndots:0")
    lines = [f"search {' '.join(searches)}"] if searches and searches != ["."] else []
    lines += [f"nameserver {server}" for server in servers]
    lines += [f"options {' '.join(options)}"] if options else []
    return "\n".join(lines) + "\n"


def name_servers(host_config: dict[str, Any], config: Any) -> list[str]:
    """The servers that a container asks, or that our resolver asks for it."""
    servers = host_config.get("Dns") or config.dns
    if not servers:
        servers = host_resolv()["nameserver"]
        if host_config["NetworkMode"] != "host":
            servers = [server for server in servers if not _is_loopback(server)] or list(DEFAULT_NAME_SERVERS)
    return servers


def _is_loopback(address: str) -> bool:
    try:
        return ipaddress.ip_address(address.partition("%")[0]).is_loopback
    except ValueError:
        return False


def write_setting(path: str, value: str) -> None:
    """Write one of the kernel's settings where it is there and may be written."""
    with contextlib.suppress(OSError), open(path, "w") as file:
        file.write(value)


# Address pools

DEFAULT_POOLS = (("172.17.0.0/16", 16), ("172.18.0.0/16", 16), ("172.19.0.0/16", 16), ("172.20.0.0/14", 16),
                 ("172.24.0.0/14", 16), ("172.28.0.0/14", 16), ("192.168.0.0/16", 20))


class AddressPool:
    """The addresses of one subnet of a network: the lowest free one is given out.  The network's lock guards
    it."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.subnet = ipaddress.ip_network(settings["Subnet"])
        self.range = ipaddress.ip_network(settings.get("IPRange") or settings["Subnet"])
        gateway, aside = settings.get("Gateway"), settings.get("AuxiliaryAddresses") or {}
        self.taken = {int(ipaddress.ip_address(value)) for value in aside.values()}
        self.taken.add(int(self.subnet.network_address))
        if self.subnet.version == 4 and self.subnet.prefixlen < 31:
            self.taken.add(int(self.subnet.broadcast_address))
        self.lowest = int(self.range.network_address)
        self.leaving: dict[int, str] = {}  # given back, by the link that must be gone first
        self.gateway = ipaddress.ip_address(gateway.partition("/")[0]) if gateway else self.take().ip
        self.taken.add(int(self.gateway))
        route = aside.get(f"DefaultGatewayIPv{self.subnet.version}")
        self.route = ipaddress.ip_address(route) if route else self.gateway  # what its containers are given

    def take(self, wanted: Optional[IPAddress] = None) -> IPInterface:
        """The lowest free address, or the one wanted; Forbidden when it is taken, Conflict when none is
        left."""
        if wanted is not None:
            number = int(wanted)
            if number in self.taken:
                raise Forbidden("Address already in use")
        else:
            number = next((number for number in range(self.lowest, int(self.range.broadcast_address) + 1)
                           if number not in self.taken and not self._is_leaving(number)), -1)
            if number < 0:
                raise Conflict(f"no available IPv{self.subnet.version} addresses on this network's address "
                               "pools")
            self.lowest = min([number + 1, *self.leaving])
        self.leaving.pop(number, None)
        self.taken.add(number)
        return self.interface(self.subnet[number - int(self.subnet.network_address)])

    def _is_leaving(self, number: int) -> bool:
        """Whether the link that had the address is still there: the kernel takes a namespace down after the
        end of its last process, and two must not answer for one address."""
        link = self.leaving.get(number)
        return link is not None and link_exists(link)

    def give_back(self, address: IPAddress, link: str = "") -> None:
        """The address is free again, once the link is gone."""
        self.taken.discard(int(address))
        if link:
            self.leaving[int(address)] = link
        if address in self.range:
            self.lowest = min(self.lowest, int(address))

    def interface(self, address: IPAddress) -> IPInterface:
        """The address with the subnet's prefix."""
        return ipaddress.ip_interface(f"{address}/{self.subnet.prefixlen}")


def link_exists(name: str) -> bool:
    """Whether this thread's network namespace has the link."""
    try:
        return socket.if_nametoindex(name) > 0
    except OSError:
        return False


def used_networks() -> list[IPNetwork]:
    """What a new subnet must not overlap: the host's routes, and its name servers."""
    routes = [network for network, _ in list_routes() if network.prefixlen]
    servers = [ipaddress.ip_network(server) for server in host_resolv()["nameserver"]
               if not _is_loopback(server)
               and "%" not in server]
    return routes + servers


def free_subnet(pools: Iterable[tuple[str, int]], used: Iterable[IPNetwork]) -> IPNetwork:
    """The first subnet of `pools`, (base, prefix length), that overlaps none of `used`; Forbidden when there
    is none."""
    used = list(used)
    for base, size in pools:
        for subnet in ipaddress.ip_network(base).subnets(new_prefix=size):
            if not any(subnet.version == other.version and subnet.overlaps(other) for other in used):
                return subnet
    raise Forbidden("all predefined address pools have been fully subnetted")


# Published ports

PROTOCOLS = {"tcp": 6, "udp": 17, "sctp": 132}


class PortRule(NamedTuple):
    """A published port: what comes to the host's address and port goes to the target."""
    bridge: str
    protocol: str
    host: IPAddress
    port: int
    target: IPAddress
    target_port: int

    @property
    def version(self) -> int:
        """The IP version that the kernel can pass it by; other pairs take the proxy."""
        return self.target.version if self.target.version == self.host.version else 0


class PortAllocator:
    """The host ports that containers hold, each bound so that nobody else takes it."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.taken: dict[tuple[str, int], set[IPAddress]] = {}
        self._next = 0

    @staticmethod
    def ephemeral() -> tuple[int, int]:
        """The kernel's range of ports that nobody names; Docker's own where it cannot be read."""
        words = read_text("/proc/sys/net/ipv4/ip_local_port_range").split()
        return (int(words[0]), int(words[1])) if len(words) == 2 else (49153, 65535)

    def take(self, protocol: str, hosts: list[IPAddress], first: int,
             last: int) -> tuple[int, list[socket.socket]]:
        """(port, bound sockets, one for each of `hosts`): the first of the range that is free on all, of the
        ephemeral range when `first` is 0.  DockerError with Docker's text when none is."""
        low, high = (first, last) if first else self.ephemeral()
        start = low if first or not low <= self._next <= high else self._next
        for port in itertools.chain(range(start, high + 1), range(low, start)):
            where = f"{_bracketed(hosts[0])}:{port}"
            if not self._reserve(protocol, hosts, port):
                if first == last and first:
                    raise DockerError(f"Bind for {where} failed: port is already allocated")
                continue
            try:
                bound = _bind_all(protocol, hosts, port)
            except OSError as error:
                self.give_back(protocol, hosts, port)
                if error.errno != errno.EADDRINUSE or (first == last and first):
                    raise DockerError(f"failed to bind host port for {where}/{protocol}: "
                                      f"{(error.strerror or str(error)).lower()}") from None
                continue
            if not first:
                self._next = port + 1
            return port, bound
        raise DockerError("all ports are allocated")

    def _reserve(self, protocol: str, hosts: list[IPAddress], port: int) -> bool:
        with self.lock:
            taken = self.taken.setdefault((protocol, port), set())
            clash = any(host.version == other.version
                        and (host == other or host.is_unspecified or other.is_unspecified)
                        for host, other in itertools.product(hosts, taken))
            if not clash:
                taken.update(hosts)
            return not clash

    def hold(self, protocol: str, hosts: list[IPAddress], port: int) -> None:
        """Take a port that a container has had under an earlier daemon."""
        self._reserve(protocol, hosts, port)

    def give_back(self, protocol: str, hosts: Iterable[IPAddress], port: int) -> None:
        """The port is free again on `hosts`."""
        with self.lock:
            taken = self.taken.get((protocol, port), set())
            taken.difference_update(hosts)
            if not taken:
                self.taken.pop((protocol, port), None)


def _bracketed(host: IPAddress) -> str:
    return f"[{host}]" if host.version == 6 else str(host)


def _bind_all(protocol: str, hosts: list[IPAddress], port: int) -> list[socket.socket]:
    """Sockets bound, and listening, at the port of each of `hosts`; none for a protocol that the kernel does
    not have."""
    with contextlib.ExitStack() as undo:
        bound = []
        for host in hosts:
            kind = socket.SOCK_DGRAM if protocol == "udp" else socket.SOCK_STREAM
            try:
                listener = socket.socket(ip_family(host.version), kind | socket.SOCK_CLOEXEC,
                                         PROTOCOLS[protocol])
            except OSError as error:
                if error.errno not in (errno.EPROTONOSUPPORT, errno.ESOCKTNOSUPPORT, errno.EAFNOSUPPORT):
                    raise
                log.warning("the kernel has no %s over IPv%d: port %d has no proxy", protocol, host.version,
                            port)
                continue
            bound.append(undo.enter_context(listener))
            if host.version == 6:
                listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
            if protocol != "udp":
                listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind((str(host), port))
            if protocol != "udp":
                listener.listen(1024)
        undo.pop_all()
        return bound


# Firewall.  What stands in the kernel follows from entries; each back end writes them its own way, and can
# write them all anew when somebody has flushed its rules.


class BridgeRule(NamedTuple):
    """What holds for one subnet of a bridge."""
    bridge: str
    subnet: IPNetwork
    icc: bool            # its containers reach each other
    masquerade: bool     # they reach the world under the host's address
    internal: bool       # they reach nothing else

    @property
    def version(self) -> int:
        """The IP version."""
        return self.subnet.version


class LinkRule(NamedTuple):
    """One container may use another's port on a bridge without inter-container communication."""
    bridge: str
    parent: IPAddress
    child: IPAddress
    protocol: str
    port: int

    @property
    def version(self) -> int:
        """The IP version."""
        return self.child.version


FirewallRule = Union[BridgeRule, PortRule, LinkRule]


class Firewall:
    """The back end `none`: no rule is touched.  The others write what `rules` says.

    `proxied`: connections from this machine's loopback and from the bridges take the user-space proxy;
    `forwarding`: it was this daemon that made the host a router, so it passes nothing but its bridges'."""

    name = "none"

    def __init__(self, proxied: bool = True, forwarding: bool = False) -> None:
        self.proxied, self.forwarding = proxied, forwarding
        self.rules: dict[FirewallRule, None] = {}
        self.lock = threading.Lock()

    def change(self, added: Iterable[FirewallRule] = (), removed: Iterable[FirewallRule] = ()) -> None:
        """Make the rules of `added` stand and those of `removed` gone, together; DockerError when the kernel
        refuses, and then nothing is changed."""
        with self.lock:
            fresh = [rule for rule in added if rule.version and rule not in self.rules]
            stale = [rule for rule in removed if rule in self.rules]
            before = dict(self.rules)
            for rule in stale:
                del self.rules[rule]
            self.rules.update(dict.fromkeys(fresh))
            try:
                for version in sorted({rule.version for rule in fresh + stale}):
                    of_version = [[rule for rule in rules if rule.version == version]
                                  for rules in (fresh, stale)]
                    self._change(version, *of_version)
            except (OSError, DockerError) as error:
                log.info("the firewall's rules are not there as they should be, writing them anew: %s", error)
                try:
                    self._rebuild()
                except (OSError, DockerError) as reason:
                    self.rules = before
                    raise DockerError(f"cannot set the firewall's rules: {reason}") from None

    def rebuild(self) -> None:
        """Write all rules anew, after a start or when somebody has flushed them, and clear left-overs."""
        with self.lock:
            self._rebuild()

    def _change(self, version: int, fresh: list[Any], stale: list[Any]) -> None:
        """Write the difference for one IP version."""

    def _rebuild(self) -> None:
        """Write everything."""

    def _of_kind(self, version: int, kind: type) -> list[Any]:
        return [rule for rule in self.rules if isinstance(rule, kind) and rule.version == version]


class Iptables(Firewall):
    """Rules in Docker's chains, one iptables-restore a change."""

    name = "iptables"
    CHAINS = {"filter": ("DOCKER", "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2"),
              "nat": ("DOCKER",)}
    FIRST = ("DOCKER-ISOLATION-STAGE-1", "DOCKER-USER")
    LEFT_OVER = re.compile(r"-A (?:FORWARD|PREROUTING|OUTPUT|POSTROUTING) .*(?:-j DOCKER\b|-[io] (?:docker0|"
                           r"br-[0-9a-f]{12})\b)|-A POSTROUTING -s (\S+) -d \1 .*-j MASQUERADE")

    def _change(self, version: int, fresh: list[Any], stale: list[Any]) -> None:
        lines = [line for rule in stale for line in self._lines(rule, remove=True)]
        lines += [line for rule in fresh for line in self._lines(rule)]
        if any(isinstance(rule, BridgeRule) for rule in fresh):  # these stay at the head of the chain
            lines += [("filter", f"{how} FORWARD -j {chain}\n") for chain in self.FIRST
                      for how in ("-D", "-I")]
        self._restore(version, lines)

    def _restore(self, version: int, lines: list[tuple[str, str]]) -> None:
        """Carry out (table, line) in one transaction a table."""
        text = "".join(f"*{table}\n{''.join(line for name, line in lines if name == table)}COMMIT\n"
                       for table in ("filter", "nat", "raw") if any(name == table for name, _ in lines))
        run_tool(["iptables-restore" if version == 4 else "ip6tables-restore", "-w", "--noflush"], text)

    def _lines(self, rule: FirewallRule, remove: bool = False) -> list[tuple[str, str]]:
        """(table, line) that add the rule, or that take it away."""
        if isinstance(rule, BridgeRule):
            listed = self._bridge_lines(rule)
        elif isinstance(rule, PortRule):
            listed = self._port_lines(rule)
        else:
            within = f"-i {rule.bridge} -o {rule.bridge} -p {rule.protocol} -m {rule.protocol}"
            listed = [("filter", "-I", "DOCKER",
                       f"-s {one} -d {other} {within} --{side} {rule.port} -j ACCEPT")
                      for one, other, side in ((rule.parent, rule.child, "dport"),
                                               (rule.child, rule.parent, "sport"))]
        return [(table, f"{'-D' if remove else how} {chain} {text}\n") for table, how, chain, text in listed]

    def _bridge_lines(self, rule: BridgeRule) -> list[tuple[str, str, str, str]]:
        name, one, two = rule.bridge, "DOCKER-ISOLATION-STAGE-1", "DOCKER-ISOLATION-STAGE-2"
        within = ("filter", "-I", "FORWARD", f"-i {name} -o {name} -j {'ACCEPT' if rule.icc else 'DROP'}")
        if rule.internal:
            return [within, ("filter", "-I", one, f"! -s {rule.subnet} -o {name} -j DROP"),
                    ("filter", "-I", one, f"! -d {rule.subnet} -i {name} -j DROP")]
        lines = [within, ("filter", "-I", "FORWARD", f"-i {name} ! -o {name} -j ACCEPT"),
                 ("filter", "-I", "FORWARD", f"-o {name} -j DOCKER"),
                 ("filter", "-I", "FORWARD",
                  f"-o {name} -m conntrack --ctstate RELATED,ESTABLISHED -j ACCEPT"),
                 ("filter", "-A", "DOCKER", f"! -i {name} -o {name} -j DROP"),
                 ("filter", "-I", one, f"-i {name} ! -o {name} -j {two}"),
                 ("filter", "-I", two, f"-o {name} -j DROP")]
        if rule.masquerade:
            lines.append(("nat", "-I", "POSTROUTING", f"-s {rule.subnet} ! -o {name} -j MASQUERADE"))
        return lines + ([("nat", "-I", "DOCKER", f"-i {name} -j RETURN")] if self.proxied else [])

    def _port_lines(self, rule: PortRule) -> list[tuple[str, str, str, str]]:
        host = "" if rule.host.is_unspecified else f"-d {rule.host} "
        outside = f"! -i {rule.bridge} " if self.proxied else ""
        match = f"-p {rule.protocol} -m {rule.protocol} --dport"
        to = f"{_bracketed(rule.target)}:{rule.target_port}"
        return [("nat", "-A", "DOCKER", f"{host}{outside}{match} {rule.port} -j DNAT --to-destination {to}"),
                ("nat", "-A", "POSTROUTING",
                 f"-s {rule.target} -d {rule.target} {match} {rule.target_port} -j MASQUERADE"),
                ("filter", "-I", "DOCKER", f"-d {rule.target} ! -i {rule.bridge} -o {rule.bridge} {match} "
                 f"{rule.target_port} -m conntrack --ctstate DNAT -j ACCEPT")]

    def _rebuild(self) -> None:
        """Our chains emptied and filled, what points at them put back at its place; other rules stay."""
        for version in (4, 6):
            rules = [rule for rule in self.rules if rule.version == version]
            standing = self._standing(version)
            if standing is None or (version == 6 and not rules and "DOCKER" not in standing):
                continue
            lines = [(table, f"-D{line[2:]}\n") for table, line in self._left_over(standing)]
            lines += [(table, f":{chain} - [0:0]\n") for table, chains in self.CHAINS.items()
                      for chain in chains]
            if ":DOCKER-USER " not in standing:
                lines += [("filter", ":DOCKER-USER - [0:0]\n"), ("filter", "-A DOCKER-USER -j RETURN\n")]
            loopback = "! -d 127.0.0.0/8" if version == 4 else "! -d ::1"
            local = "-m addrtype --dst-type LOCAL -j DOCKER\n"
            lines += [("filter", "-A DOCKER-ISOLATION-STAGE-1 -j RETURN\n"),
                      ("filter", "-A DOCKER-ISOLATION-STAGE-2 -j RETURN\n"),
                      ("nat", f"-A PREROUTING {local}"),
                      ("nat", f"-A OUTPUT {loopback + ' ' if self.proxied else ''}{local}")]
            if self.forwarding:
                lines.append(("filter", ":FORWARD DROP [0:0]\n"))
            lines += [line for rule in rules for line in self._lines(rule)]
            lines += [("filter", f"-I FORWARD -j {chain}\n") for chain in self.FIRST]
            # a chain must be declared before a line names it
            self._restore(version, sorted(lines, key=lambda line: not line[1].startswith(":")))

    def _standing(self, version: int) -> Optional[str]:
        """What iptables-save prints, or None where there is no such firewall."""
        try:
            return run_tool(["iptables-save" if version == 4 else "ip6tables-save"])
        except DockerError as error:
            if version == 4 or self._of_kind(version, BridgeRule):
                raise
            log.info("no rules for IPv6: %s", error)
            return None

    def _left_over(self, standing: str) -> Iterator[tuple[str, str]]:
        """(table, rule) of the built-in chains that Docker, or an earlier daemon of ours, has left."""
        table, bridges = "", {rule.bridge for rule in self.rules}
        for line in standing.splitlines():
            if line.startswith("*"):
                table = line[1:]
            words = line.split()
            ours = any(word in ("-i", "-o") and name in bridges for word, name in zip(words, words[1:]))
            if line.startswith("-A ") and table in self.CHAINS and (self.LEFT_OVER.match(line) or (
                    ours and words[1] in ("FORWARD", "POSTROUTING"))):
                yield table, line


def run_tool(command: list[str], text: str = "") -> str:
    """The output of one of the host's programs; DockerError with its words when it fails."""
    import subprocess
    try:
        done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise DockerError(f"{command[0]}: {error}") from None
    if done.returncode:
        raise DockerError(f"{command[0]}: {' '.join(done.stderr.split())[:500]}")
    return done.stdout


class Nftables(Firewall):
    """The same policy in a table of our own for each IP version, written over netlink.  Bridges are rules,
    written anew when one comes or goes; ports and links are elements of sets, so that a change costs one
    message however many there are."""

    name = "nftables"
    TABLE = "dockerd"

    def _change(self, version: int, fresh: list[Any], stale: list[Any]) -> None:
        messages = []
        for kind, flags, rules in ((NFT_MSG_DELSETELEM, 0, stale), (NFT_MSG_NEWSETELEM, NLM_F_CREATE, fresh)):
            for name, elements in self._elements(rules, gone=rules is stale).items():
                messages.append((kind, flags, nft_elements(self.TABLE, name, elements)))
        if any(isinstance(rule, BridgeRule) for rule in fresh + stale):
            messages += [(NFT_MSG_DELRULE, 0, nft_rule(self.TABLE, chain)) for chain in self._chains()]
            messages += self._all_rules(version)
        nft_batch(ip_family(version), messages)

    def _rebuild(self) -> None:
        for version in (4, 6):
            table, rules = nft_table(self.TABLE), [rule for rule in self.rules if rule.version == version]
            if version == 6 and not rules:
                with contextlib.suppress(OSError):  # one of an earlier daemon's
                    nft_batch(socket.AF_INET6, [(NFT_MSG_DELTABLE, 0, table)])
                continue
            address, size = (7, 4) if version == 4 else (8, 16)  # the types by which nft(8) prints them
            at, to = address << 12 | 12 << 6 | 13, address << 6 | 13  # with protocol and port, with port
            sets: tuple[Any, ...] = (("ports", 12 << 6 | 13, 8, to, size + 4),
                                     ("ports_at", at, size + 8, to, size + 4),
                    ("published", at, size + 8), ("linked", address << 18 | at, 2 * size + 8))
            messages = [(NFT_MSG_NEWTABLE, NLM_F_CREATE, table), (NFT_MSG_DELTABLE, 0, table),
                        (NFT_MSG_NEWTABLE, NLM_F_CREATE, table)]
            messages += [(NFT_MSG_NEWSET, NLM_F_CREATE, nft_map(self.TABLE, number, *values))
                         for number, values in enumerate(sets, 1)]
            messages += [(NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain) for chain in self._chains().values()]
            messages += self._all_rules(version)
            messages += [(NFT_MSG_NEWSETELEM, NLM_F_CREATE, nft_elements(self.TABLE, name, elements))
                         for name, elements in self._elements(rules).items()]
            nft_batch(ip_family(version), messages)

    def _chains(self) -> dict[str, bytes]:
        """The base chains by name."""
        nat, policy = NF_ACCEPT, NF_DROP if self.forwarding else NF_ACCEPT
        table = (("prerouting", "nat", NF_INET_PRE_ROUTING, -100, nat),
                 ("output", "nat", NF_INET_LOCAL_OUT, -100, nat),
                 ("postrouting", "nat", NF_INET_POST_ROUTING, 100, nat),
                 ("forward", "filter", NF_INET_FORWARD, 0, policy))
        return {row[0]: nft_chain(self.TABLE, *row) for row in table}

    def _all_rules(self, version: int) -> list[tuple[int, int, bytes]]:
        """The messages that fill the chains.  What goes to a bridge is judged before what comes from one, so
        that no bridge reaches another."""
        bridges, lines = self._of_kind(version, BridgeRule), []
        accept, drop, leave = (nft_verdict(code) for code in (NF_ACCEPT, NF_DROP, NFT_RETURN))
        if self.proxied:
            loopback = ipaddress.ip_network("127.0.0.0/8" if version == 4 else "::1/128")
            lines += [("prerouting", nft_interface(rule.bridge) + leave) for rule in bridges]
            lines.append(("output", nft_network(loopback, True) + leave))
        lines += [(chain, self._translation(version, exact))
                  for chain in ("prerouting", "output") for exact in (True, False)]
        lines.append(("forward", nft_ct(0, 2 | 4) + accept))  # established or related
        published = nft_ct(2, IPS_DST_NAT) + self._lookup(version, "published") + accept
        for rule in bridges:
            inward, inside = nft_interface(rule.bridge, out=True), nft_interface(rule.bridge)
            if not rule.icc:
                lines.append(("forward", inward + inside + self._lookup(version, "linked") + accept))
            lines.append(("forward", inward + inside + (accept if rule.icc else drop)))
            if rule.internal:
                lines.append(("forward", inside + nft_interface(rule.bridge, out=True, same=False) + drop))
            else:
                lines.append(("forward", inward + published))
            lines.append(("forward", inward + drop))
            source = nft_network(rule.subnet, False)
            if rule.masquerade and not rule.internal:
                lines.append(("postrouting", source + nft_interface(rule.bridge, True, False)
                              + nft_expression("masq")))
            if not self.proxied:  # a container that reaches itself or a neighbour by the host's port
                lines.append(("postrouting", source + inward + nft_ct(2, IPS_DST_NAT)
                              + nft_expression("masq")))
        lines += [("forward", nft_interface(rule.bridge) + accept) for rule in bridges]
        return [(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, nft_rule(self.TABLE, chain, line))
                for chain, line in lines]

    def _lookup(self, version: int, name: str, to: int = -1) -> bytes:
        """Go on where the set has the packet's (source and) destination, protocol and port; a map's value
        goes to the registers from `to`."""
        size = 4 if version == 4 else 16
        source, destination = (12, 16) if version == 4 else (8, 24)
        reads, register = b"", 0
        if name == "linked":
            reads, register = nft_payload(source, size), size // 4
        if name != "ports":
            reads, register = reads + nft_payload(destination, size, register), register + size // 4
        reads += nft_expression("meta", a2=16, a1=NFT_REGISTER + register)  # NFT_META_L4PROTO
        reads += nft_payload(2, 2, register + 1, transport=True)
        into = {"a3": NFT_REGISTER + to} if to >= 0 else {}
        return reads + nft_expression("lookup", a1=name, a2=NFT_REGISTER, **into)

    def _translation(self, version: int, exact: bool) -> bytes:
        """Send what comes to a published port of this machine to its target."""
        local = nft_expression("fib", a1=NFT_REGISTER, a2=3, a3=2) + nft_compare(struct.pack("=I", 2))
        to = 8
        return local + self._lookup(version, "ports_at" if exact else "ports", to) + nft_expression(
            "nat", a1=1, a2=int(ip_family(version)), a3=NFT_REGISTER + to,
            a5=NFT_REGISTER + to + (1 if version == 4 else 4))

    def _elements(self, rules: list[Any], gone: bool = False) -> dict[str, list[tuple[bytes, bytes]]]:
        """(key, value) for each set; of rules that are gone, without what others still need."""
        found: dict[str, dict[bytes, bytes]] = collections.defaultdict(dict)
        for rule in rules:
            if isinstance(rule, PortRule):
                place = struct.pack(">B3xH2x", PROTOCOLS[rule.protocol], rule.port)
                value = rule.target.packed + struct.pack(">H2x", rule.target_port)
                name, head = ("ports", b"") if rule.host.is_unspecified else ("ports_at", rule.host.packed)
                found[name][head + place] = value
                inner = struct.pack(">B3xH2x", PROTOCOLS[rule.protocol], rule.target_port)
                found["published"][rule.target.packed + inner] = b""
            elif isinstance(rule, LinkRule):
                port = struct.pack(">B3xH2x", PROTOCOLS[rule.protocol], rule.port)
                found["linked"][rule.parent.packed + rule.child.packed + port] = b""
        if gone:
            kept = self._elements(list(self.rules))
            for name, elements in kept.items():
                for key, _ in elements:
                    found[name].pop(key, None)
        return {name: list(elements.items()) for name, elements in found.items() if elements}


def choose_firewall(config: Any, forwarding: bool) -> Firewall:
    """The back end that the options ask for, or that this host has: iptables where its programs are, else
    nf_tables, else none with a line in the log.  DockerError when the one asked for cannot work."""
    wanted, proxied = config.firewall_backend or "auto", config.userland_proxy
    if not config.iptables:
        wanted = "none"
    failures = []
    for kind in (Iptables, Nftables):
        if wanted not in ("auto", kind.name):
            continue
        firewall = kind(proxied, forwarding)
        try:
            firewall.rebuild()
            return firewall
        except (OSError, DockerError) as error:
            failures.append(f"{kind.name}: {error}")
            if wanted != "auto":
                raise DockerError(f"the firewall back end cannot work: {failures[0]}") from None
    if failures:
        log.warning("no firewall: networks are not isolated, and published ports take the proxy (%s)",
                    "; ".join(failures))
    return Firewall(proxied, forwarding)


class ProxyClient(HelperClient):
    """The connection to the proxy, which is started when the first port needs it, and again when it was
    killed."""

    role = "proxy"

    def __init__(self, exec_root: str) -> None:
        super().__init__(os.path.join(exec_root, "proxy.sock"))
        self.exec_root = exec_root
        self.ports: dict[str, PortRule] = {}   # what it is to serve
        self.served: set[str] = set()          # what it has sockets of
        self._opening = threading.Lock()
        self._closing = False

    def publish(self, key: str, rule: PortRule, listener: Optional[socket.socket] = None) -> None:
        """Serve the bound socket as the rule says; without one, that which the proxy has by `key`, or a new
        one."""
        with self._opening:
            if not self.connected:
                if not self.connect():
                    self.spawn(shim_bytecode(self.exec_root))
                self.served = set(self.keys())
        self.ports[key] = rule
        bound = [listener] if listener else [] if key in self.served else _bind_all(
            rule.protocol, [rule.host], rule.port)
        if bound or key in self.served:  # the kernel may not have the protocol
            place = {"target": str(rule.target), "target_port": rule.target_port}
            self.call("publish", {"listener": bound[0].fileno()} if bound else {}, key=key, place=place)
            self.served.add(key)
        for each in bound:
            each.close()

    def unpublish(self, key: str) -> None:
        """Stop to serve the port."""
        self.ports.pop(key, None)
        self.served.discard(key)
        self.post("unpublish", key=key)

    def forget_strangers(self) -> None:
        """Take back what an earlier daemon's containers have left; all that run have published theirs."""
        with contextlib.suppress(DockerError):
            if self.connected or self.connect():
                for key in set(self.keys()) - self.ports.keys():
                    self.unpublish(key)

    def _gone(self) -> None:
        """It was killed: another one serves its ports."""
        for key, rule in [] if self._closing else list(self.ports.items()):
            try:
                self.publish(key, rule)
            except (OSError, DockerError) as error:
                log.error("the port %d/%s is not published any more: %s", rule.port, rule.protocol, error)

    def close(self) -> None:
        """Let it go; with ports it serves on."""
        self._closing = True
        super().close()


# The resolver of user networks


class Query(NamedTuple):
    """A DNS question: its message, the name in small letters without its last dot, and the type asked for."""
    message: bytes
    name: str
    kind: int
    end: int     # where the question ends in the message


DNS_A, DNS_PTR, DNS_AAAA = 1, 12, 28
DNS_SERVFAIL = 2
DNS_TTL = 600  # seconds, as Docker's
DNS_UDP_SIZE = 512
DNS_TIMEOUT = 4.0  # seconds that an upstream has to answer


def parse_query(message: bytes) -> Query:
    """The one question of `message`; ValueError when there is not just one, or it is not whole."""
    if len(message) < 17 or message[2] & 0x80 or struct.unpack_from(">H", message, 4)[0] != 1:
        raise ValueError("no query")
    labels, offset = [], 12
    while offset < len(message) and message[offset]:
        length = message[offset]
        if length > 63 or offset + 1 + length > len(message):
            raise ValueError("no name")
        labels.append(message[offset + 1:offset + 1 + length].decode("latin-1"))
        offset += 1 + length
    if offset + 5 > len(message):
        raise ValueError("cut off")
    kind = struct.unpack_from(">H", message, offset + 1)[0]
    return Query(message, ".".join(labels).lower(), kind, offset + 5)


def dns_answer(query: Query, records: Iterable[bytes] = (), code: int = 0) -> bytes:
    """The answer with the data of the records asked for, or a failure."""
    listed = [struct.pack(">HHHIH", 0xC00C, query.kind, 1, DNS_TTL, len(data)) + data for data in records]
    flags = 0x8080 | (struct.unpack_from(">H", query.message, 2)[0] & 0x0100) | code
    head = query.message[:2] + struct.pack(">HHHHH", flags, 1, len(listed), 0, 0)
    return head + query.message[12:query.end] + b"".join(listed)


def dns_name(name: str) -> bytes:
    """A name as labels."""
    return b"".join(bytes([len(label)]) + label.encode("latin-1", "replace")
                    for label in name.split(".")) + b"\0"


def upstream_socket() -> socket.socket:
    """A socket that asks servers of both IP versions, from this thread's namespace."""
    family = socket.AF_INET6 if socket.has_ipv6 else socket.AF_INET
    try:
        upstream = socket.socket(family, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    except OSError:
        upstream = socket.socket(socket.AF_INET, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
    if upstream.family == socket.AF_INET6:
        upstream.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    upstream.setblocking(False)
    return upstream


class Forward(NamedTuple):
    """A question that an upstream has been asked."""
    seat: ResolverSeat
    query: Query
    client: Any
    servers: list[str]   # those not yet asked
    deadline: float


class ResolverSeat:
    """The resolver's place in one container: sockets at 127.0.0.11 in its network namespace, the servers to
    ask with a socket to ask by, and how names are found.  Made in the container's namespace."""

    def __init__(self, lookup: Callable[[str, int], Optional[list[bytes]]], servers: list[str],
                 upstream: Optional[socket.socket]) -> None:
        self.lookup, self.servers = lookup, servers
        self.upstream = upstream or upstream_socket()
        self.udp, self.tcp = (socket.socket(socket.AF_INET, kind | socket.SOCK_CLOEXEC)
                              for kind in (socket.SOCK_DGRAM, socket.SOCK_STREAM))
        for server in (self.udp, self.tcp):
            server.bind((RESOLVER_ADDRESS, 0))
            server.setblocking(False)
        self.tcp.listen(64)

    @property
    def sockets(self) -> tuple[socket.socket, ...]:
        """All of them."""
        return self.udp, self.tcp, self.upstream

    def redirect(self) -> None:
        """Send what the container asks at port 53 to the sockets, whose ports are random: its own port 53 is
        free for it (pitfall 17).  Called in its namespace."""
        table, rules = "dockerd", []
        for protocol, server in ((6, self.tcp), (17, self.udp)):
            rules.append(nft_network(ipaddress.ip_network(RESOLVER_ADDRESS), True)
                         + nft_expression("meta", a2=16, a1=NFT_REGISTER) + nft_compare(bytes([protocol]))
                         + nft_payload(2, 2, transport=True) + nft_compare(struct.pack(">H", 53))
                         + nft_immediate(socket.inet_aton(RESOLVER_ADDRESS))
                         + nft_immediate(struct.pack(">H", server.getsockname()[1]), 1)
                         + nft_expression("nat", a1=1, a2=int(socket.AF_INET), a3=NFT_REGISTER,
                                          a5=NFT_REGISTER + 1))
        chain = nft_chain(table, "output", "nat", NF_INET_LOCAL_OUT, -100, NF_ACCEPT)
        try:
            nft_batch(socket.AF_INET, [(NFT_MSG_NEWTABLE, NLM_F_CREATE, nft_table(table)),
                                       (NFT_MSG_NEWCHAIN, NLM_F_CREATE, chain),
                                       (NFT_MSG_DELRULE, 0, nft_rule(table, "output"))] + [
                (NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND,
                 nft_rule(table, "output", rule)) for rule in rules])
        except OSError:
            ports = "".join(f"-A OUTPUT -d {RESOLVER_ADDRESS} -p {name} --dport 53 -j DNAT --to-destination "
                            f"{RESOLVER_ADDRESS}:{server.getsockname()[1]}\n"
                            for name, server in (("tcp", self.tcp), ("udp", self.udp)))
            run_tool(["iptables-restore", "-w", "--noflush"], f"*nat\n{ports}COMMIT\n")


class Resolver:
    """Answers what containers on user networks ask: names of their networks at once, the rest by the upstream
    servers.  One thread for all; a TCP question has a thread of its own while it lasts."""

    def __init__(self) -> None:
        self.seats: dict[int, tuple[ResolverSeat, Callable[[ResolverSeat], None]]] = {}
        self.pending: dict[tuple[int, bytes], Forward] = {}
        self.poll = select.epoll()
        self.lock = threading.Lock()
        self.tcp_slots = threading.BoundedSemaphore(64)
        self._thread: Optional[threading.Thread] = None

    def add(self, seat: ResolverSeat) -> None:
        """Serve the seat from now on."""
        with self.lock:
            for each, serve in zip(seat.sockets, (self._serve_udp, self._serve_tcp, self._serve_upstream)):
                self.seats[each.fileno()] = seat, serve
                self.poll.register(each, select.EPOLLIN)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="resolver", daemon=True)
                self._thread.start()

    def remove(self, seat: ResolverSeat) -> None:
        """The container is gone."""
        with self.lock:
            for each in seat.sockets:
                if self.seats.pop(each.fileno(), None):
                    self.poll.unregister(each)
                each.close()
            self.pending = {key: forward for key, forward in self.pending.items() if forward.seat is not seat}

    def _run(self) -> None:
        while True:
            for fd, _ in self.poll.poll(1.0 if self.pending else -1):
                with self.lock:
                    seat, serve = self.seats.get(fd, (None, None))
                    if seat is not None and serve is not None:
                        with contextlib.suppress(OSError):
                            serve(seat)
            self._retry(time.monotonic())

    def _serve_udp(self, seat: ResolverSeat) -> None:
        message, client = seat.udp.recvfrom(4096)
        with contextlib.suppress(ValueError):
            query = parse_query(message)
            found = seat.lookup(query.name, query.kind)
            if found is not None:
                seat.udp.sendto(_cut(query, dns_answer(query, found)), client)
            else:
                self._forward(Forward(seat, query, client, list(seat.servers), 0))

    def _forward(self, forward: Forward) -> None:
        """Ask the next upstream, under a number of our own; without one, say that it failed."""
        seat, servers = forward.seat, list(forward.servers)
        while servers and len(self.pending) < 4096:
            server, number = servers.pop(0), secrets.token_bytes(2)
            with contextlib.suppress(OSError):
                mapped = "." in server and seat.upstream.family == socket.AF_INET6
                place = (f"::ffff:{server}" if mapped else server, 53)
                seat.upstream.sendto(number + forward.query.message[2:], place)
                deadline = time.monotonic() + DNS_TIMEOUT
                self.pending[seat.upstream.fileno(), number] = forward._replace(servers=servers,
                                                                                deadline=deadline)
                return
        with contextlib.suppress(OSError):
            seat.udp.sendto(dns_answer(forward.query, code=DNS_SERVFAIL), forward.client)

    def _serve_upstream(self, seat: ResolverSeat) -> None:
        message, (address, port, *_) = seat.upstream.recvfrom(65535)
        server = address[7:] if address.startswith("::ffff:") else address
        forward = self.pending.get((seat.upstream.fileno(), message[:2]))
        asked = forward and forward.query.message[12:forward.query.end].lower()
        if forward is None or port != 53 or server not in seat.servers or len(message) < 12 or (
                message[12:forward.query.end].lower() != asked):
            return
        del self.pending[seat.upstream.fileno(), message[:2]]
        if message[3] & 0x0F in (DNS_SERVFAIL, 5) and forward.servers:  # failed, refused: the next may know
            self._forward(forward)
        else:
            seat.udp.sendto(forward.query.message[:2] + message[2:], forward.client)

    def _retry(self, now: float) -> None:
        with self.lock:
            late = [key for key, forward in self.pending.items() if forward.deadline <= now]
            for forward in [self.pending.pop(key) for key in late]:
                self._forward(forward)

    def _serve_tcp(self, seat: ResolverSeat) -> None:
        client, _ = seat.tcp.accept()
        if not self.tcp_slots.acquire(blocking=False):
            client.close()
            return
        threading.Thread(target=self._answer_tcp, args=(seat, client), name="resolver-tcp",
                         daemon=True).start()

    def _answer_tcp(self, seat: ResolverSeat, client: socket.socket) -> None:
        """Answer the questions of one connection; each is two bytes of length and the message (RFC 1035)."""
        try:
            client.settimeout(10)
            with client, client.makefile("rb") as file:
                while True:
                    query = parse_query(_read_framed(file))
                    found = seat.lookup(query.name, query.kind)
                    answer = self._ask_tcp(seat, query) if found is None else dns_answer(query, found)
                    client.sendall(struct.pack(">H", len(answer)) + answer)
        except (OSError, ValueError):
            pass
        finally:
            self.tcp_slots.release()

    @staticmethod
    def _ask_tcp(seat: ResolverSeat, query: Query) -> bytes:
        """The first upstream's answer, by TCP, from the container's namespace."""
        def ask(server: str) -> bytes:
            with socket.create_connection((server, 53), DNS_TIMEOUT) as upstream:
                upstream.sendall(struct.pack(">H", len(query.message)) + query.message)
                with upstream.makefile("rb") as file:
                    return _read_framed(file)

        for server in seat.servers:
            with contextlib.suppress(OSError, ValueError):
                namespace = fcntl.ioctl(seat.upstream, SIOCGSKNS)
                try:
                    return in_network(namespace, ask, server)
                finally:
                    os.close(namespace)
        return dns_answer(query, code=DNS_SERVFAIL)


def _read_framed(file: Any) -> bytes:
    """A DNS message behind its length; ValueError at the end."""
    head = file.read(2)
    message = file.read(struct.unpack(">H", head)[0]) if len(head) == 2 else b""
    if not message:
        raise ValueError("the end")
    return message


def _cut(query: Query, answer: bytes) -> bytes:
    """The answer, or where it is too long for a datagram its head with the mark that tells to ask by TCP."""
    if len(answer) <= DNS_UDP_SIZE:
        return answer
    cut = dns_answer(query)
    return cut[:2] + bytes([cut[2] | 0x02]) + cut[3:]


# Networks


BRIDGE_OPTION = "com.docker.network.bridge."
DEFAULT_BRIDGE = "docker0"
PREDEFINED_NETWORKS = {"bridge": "bridge", "host": "host", "none": "null"}
NETWORK_DRIVERS = ("bridge", "host", "ipvlan", "macvlan", "null")
LINK_MODES = {"macvlan": {"": 4, "bridge": 4, "passthru": 8, "private": 1, "vepa": 2},
              "ipvlan": {"": 0, "l2": 0, "l3": 1, "l3s": 2}}  # linux/if_link.h
ENDPOINT_STATUS = {"EndpointID": "", "Gateway": "", "IPAddress": "", "IPPrefixLen": 0, "IPv6Gateway": "",
                   "GlobalIPv6Address": "", "GlobalIPv6PrefixLen": 0, "MacAddress": ""}
ENDPOINT = {"IPAMConfig": None, "Links": None, "Aliases": None, "MacAddress": "", "DriverOpts": None,
            "GwPriority": 0, "NetworkID": "", **ENDPOINT_STATUS, "DNSNames": None}


class Endpoint:
    """A container's place on a network; `settings` is its EndpointSettings in the container's record."""

    def __init__(self, network: Network, settings: dict[str, Any]) -> None:
        self.network, self.settings = network, settings
        self.id: str = settings["EndpointID"]
        self.addresses = [ipaddress.ip_interface(f"{settings[address]}/{settings[length]}")
                          for address, length in (("IPAddress", "IPPrefixLen"),
                                                  ("GlobalIPv6Address", "GlobalIPv6PrefixLen"))
                          if settings[address]]
        self.gateways = [ipaddress.ip_address(settings[key]) for key in ("Gateway", "IPv6Gateway")
                         if settings[key]]
        self.link = ""  # its name in the container

    @property
    def names(self) -> list[str]:
        """What it is called on its network."""
        return self.settings["DNSNames"] or []

    @property
    def small_names(self) -> set[str]:
        """These in small letters, for the resolver."""
        return {name.lower() for name in self.names}

    @property
    def host_link(self) -> str:
        """The name of the veth's end on the bridge."""
        return "veth" + self.id[:7]

    @property
    def preference(self) -> tuple[int, int, str]:
        """The endpoint with the least one gives the container its default gateway."""
        return -(self.settings.get("GwPriority") or 0), -len(self.gateways), self.network.name

    def address(self, version: int) -> Optional[IPAddress]:
        """Its address of this IP version."""
        return next((address.ip for address in self.addresses if address.version == version), None)

    def message(self, namespace: int) -> bytes:
        """The request that makes its link, or the pair whose other end is on the bridge."""
        network = self.network
        mac = bytes.fromhex(self.settings["MacAddress"].replace(":", ""))
        mtu = attribute(IFLA_MTU, network.mtu) if network.mtu else b""
        inside = [attribute(IFLA_NET_NS_FD, namespace), mtu]
        if network.driver == "bridge":
            peer = attribute(VETH_INFO_PEER | NLA_F_NESTED, bytes(16), attribute(IFLA_IFNAME, self.link),
                             attribute(IFLA_ADDRESS, mac), *inside)
            master = attribute(IFLA_MASTER, socket.if_nametoindex(network.bridge))
            return link_message(self.host_link, "veth", master, mtu, data=peer)
        mode = LINK_MODES[network.driver][network.options.get(f"{network.driver}_mode", "")]
        parent = attribute(IFLA_LINK, socket.if_nametoindex(network.parent))
        if network.driver == "macvlan":
            return link_message(self.link, "macvlan", parent, attribute(IFLA_ADDRESS, mac), *inside, up=False,
                                data=attribute(1, mode))
        return link_message(self.link, "ipvlan", parent, *inside, up=False,
                            data=attribute(1, struct.pack("=H", mode)))

    def set_ipv6(self) -> None:
        """Have IPv6 on its link, in the container's namespace, only where it has an address."""
        write_setting(f"/proc/sys/net/ipv6/conf/{self.link}/disable_ipv6", "0" if self.address(6) else "1")

    def configure(self) -> list[bytes]:
        """The requests that set its link up, in the container's namespace."""
        index = socket.if_nametoindex(self.link)
        return [*(address_message(RTM_NEWADDR, index, address) for address in self.addresses),
                link_change(index)]


class Network:
    """One network: `record` is what inspect shows of it and what is kept on disk.  `lock` guards its pools
    and endpoints."""

    def __init__(self, record: dict[str, Any]) -> None:
        self.record = record
        self.id, self.name, self.driver = record["Id"], record["Name"], record["Driver"]
        self.options: dict[str, str] = record["Options"]
        self.internal: bool = record["Internal"]
        self.lock = threading.Lock()
        self.removed = False
        self.pools = [AddressPool(settings) for settings in record["IPAM"]["Config"] or []]
        self.endpoints: dict[str,
                             tuple[str, str, Endpoint]] = {}  # by id: container's id, its name, the endpoint

    @property
    def is_user_defined(self) -> bool:
        """Whether names resolve on it."""
        return self.name not in PREDEFINED_NETWORKS

    @property
    def configured(self) -> bool:
        """Whether its subnets were asked for, so that addresses may be."""
        return not self.record.get("Automatic")

    @property
    def bridge(self) -> str:
        """The name of its bridge."""
        return self.options.get(BRIDGE_OPTION + "name") or "br-" + self.id[:12]

    @property
    def parent(self) -> str:
        """The host's link below a macvlan or ipvlan network; without one, a dummy of its own."""
        return self.options.get("parent") or "dm-" + self.id[:12]

    @property
    def own_link(self) -> str:
        """The link that comes and goes with it: a bridge, a dummy or a VLAN; "" where it was there before."""
        return str(self.record.get("OwnLink", ""))

    @property
    def mtu(self) -> int:
        """The MTU of its links, 0 for the kernel's default."""
        return int(self.options.get("com.docker.network.driver.mtu") or 0)

    def switch(self, name: str, default: bool) -> bool:
        """A yes-or-no option of the bridge driver."""
        value = self.options.get(BRIDGE_OPTION + name)
        return default if value is None else value.lower() in ("1", "t", "true")

    def rules(self) -> list[FirewallRule]:
        """What the firewall must hold for it."""
        if self.driver != "bridge":
            return []
        return [BridgeRule(self.bridge, pool.subnet, self.switch("enable_icc", True),
                           self.switch("enable_ip_masquerade", True), self.internal) for pool in self.pools]

    def to_api(self, containers: bool = True) -> dict[str, Any]:
        """The network as inspect shows it; a list leaves the containers out."""
        listed = {}
        if containers:
            with self.lock:
                for owner, name, endpoint in self.endpoints.values():
                    by_version = {address.version: str(address) for address in endpoint.addresses}
                    listed[owner] = {"Name": name, "EndpointID": endpoint.id,
                                     "MacAddress": endpoint.settings["MacAddress"],
                                     "IPv4Address": by_version.get(4, ""), "IPv6Address": by_version.get(6,
                                                                                                         "")}
        shown = {key: value for key, value in self.record.items() if key not in ("Automatic", "OwnLink")}
        return {**shown, "Containers": listed}

    def all_endpoints(self) -> list[Endpoint]:
        """The endpoints that are there now."""
        with self.lock:
            return [endpoint for _, _, endpoint in self.endpoints.values()]

    def join(self, owner: str, name: str, settings: dict[str, Any]) -> Endpoint:
        """Take addresses for a container and write them into its `settings`.

        Forbidden when an address that it asks for is taken, Conflict when there is none left."""
        wanted = settings["IPAMConfig"] or {}
        asked = [ipaddress.ip_address(wanted[key]) for key in ("IPv4Address", "IPv6Address")
                 if wanted.get(key)]
        taken: list[IPInterface] = []
        with self.lock, contextlib.ExitStack() as undo:
            undo.callback(lambda: self._give_back(taken, ""))
            if self.removed:
                raise NotFound(f"network {self.name} not found")
            for version in (4, 6):
                pools = [pool for pool in self.pools if pool.subnet.version == version]
                address = next((one for one in asked if one.version == version), None)
                if address is not None:
                    pools = [pool for pool in pools if address in pool.subnet]
                if pools:
                    taken.append(_take_first(pools, address, self))
            settings.update(ENDPOINT_STATUS, EndpointID=secrets.token_hex(32), NetworkID=self.id)
            for address in taken:
                keys = ("IPAddress", "IPPrefixLen", "Gateway") if address.version == 4 else (
                    "GlobalIPv6Address", "GlobalIPv6PrefixLen", "IPv6Gateway")
                gateway = next(str(pool.route) for pool in self.pools if address.ip in pool.subnet)
                values = (str(address.ip), address.network.prefixlen, "" if self.internal else gateway)
                settings.update(zip(keys, values))
            settings["MacAddress"] = settings.get("DesiredMacAddress") or _mac_address(taken)
            endpoint = Endpoint(self, settings)
            self.endpoints[endpoint.id] = owner, name, endpoint
            undo.pop_all()
        return endpoint

    def adopt(self, owner: str, name: str, settings: dict[str, Any]) -> Endpoint:
        """The endpoint of a container that an earlier daemon started; its addresses are taken again."""
        endpoint = Endpoint(self, settings)
        with self.lock:
            for pool, address in itertools.product(self.pools, endpoint.addresses):
                if address.ip in pool.subnet:
                    pool.taken.add(int(address.ip))
            self.endpoints[endpoint.id] = owner, name, endpoint
        return endpoint

    def leave(self, endpoint: Endpoint) -> None:
        """The endpoint is gone: its addresses are free as soon as its link is."""
        with self.lock:
            if self.endpoints.pop(endpoint.id, None):
                self._give_back(endpoint.addresses, endpoint.host_link if self.driver == "bridge" else "")

    def _give_back(self, addresses: list[IPInterface], link: str) -> None:
        for pool, address in itertools.product(self.pools, addresses):
            if address.ip in pool.subnet:
                pool.give_back(address.ip, link)


def _take_first(pools: list[AddressPool], address: Optional[IPAddress], network: Network) -> IPInterface:
    """An address of the first pool that has one."""
    for pool in pools:
        with contextlib.suppress(Conflict):
            return pool.take(address)
    raise Conflict(f"no available IPv{pools[0].subnet.version} addresses on this network's address pools: "
                   f"{network.name} ({network.id})")


def _mac_address(addresses: list[IPInterface]) -> str:
    """Docker's: 02:42 and the IPv4 address, so that a neighbour's table stays right when it comes back."""
    tail = next((address.ip.packed for address in addresses if address.version == 4), secrets.token_bytes(4))
    return (b"\x02\x42" + tail).hex(":")


class Published(NamedTuple):
    """A container's port with the host's places of it."""
    name: str                     # of the container's port, such as 80/tcp
    hosts: list[IPAddress]
    port: int

    @property
    def protocol(self) -> str:
        """tcp, udp or sctp."""
        return self.name.partition("/")[2] or "tcp"


class Sandbox:
    """A container's share of the networks during one run.

    `join` and `publish` take addresses and ports before there is a process, `enter` makes the links in its
    namespace, `close` gives everything back, however far it had come.  Its container's lock guards it."""

    def __init__(self, networks: Networks, key: str, name: str) -> None:
        self.networks, self.key, self.name = networks, key, name
        self.endpoints: dict[str, Endpoint] = {}   # by the network's name
        self.published: list[Published] = []
        self.sockets: dict[tuple[IPAddress, str, int],
                           socket.socket] = {}  # bound, not handed to the proxy yet
        self.rules: list[FirewallRule] = []
        self.links: list[FirewallRule] = []                # what container links ask of the firewall
        self.aliases: dict[str, str] = {}          # names that links give to others, by the others' own
        self.seat: Optional[ResolverSeat] = None
        self.namespace = -1

    @property
    def id(self) -> str:
        """SandboxID."""
        return hashlib.sha256(self.key.encode()).hexdigest()

    def join(self, network: Network, settings: dict[str, Any]) -> Endpoint:
        """Take a place on the network; with a namespace its link is made at once."""
        endpoint = network.join(self.key, self.name, settings)
        self.endpoints[network.name] = endpoint
        try:
            if self.namespace >= 0:
                self._make_links([endpoint])
                self._choose_routes()
                self.republish()
        except BaseException:
            self.leave(network.name)
            raise
        return endpoint

    def leave(self, name: str) -> None:
        """Give the place on the network back, with its link."""
        endpoint = self.endpoints.pop(name)
        if self.namespace >= 0:
            with contextlib.suppress(OSError):
                in_network(self.namespace, lambda: netlink_batch([link_change(
                    socket.if_nametoindex(endpoint.link), kind=RTM_DELLINK)]))
            self._choose_routes()
            self.republish()
        endpoint.network.leave(endpoint)
        endpoint.settings.update(ENDPOINT_STATUS)

    def gateway(self, version: int) -> Optional[Endpoint]:
        """The endpoint through which it reaches the world."""
        able = [endpoint for endpoint in self.endpoints.values()
                if any(gateway.version == version for gateway in endpoint.gateways)]
        return min(able, key=lambda endpoint: endpoint.preference, default=None)

    # Ports

    def publish(self, bindings: dict[str, list[dict[str, str]]]) -> None:
        """Take the host's ports: those asked for by number first, then free ones; DockerError with Docker's
        text when one is not free."""
        gate = self.gateway(4) or self.gateway(6)
        if gate is None or gate.network.driver != "bridge":
            return
        asked = [(name, binding.get("HostIp") or "", *_port_range(binding.get("HostPort") or ""))
                 for name, listed in sorted(bindings.items()) for binding in listed or [{}]]
        for name, host, first, last in sorted(asked, key=lambda each: each[2] == 0):
            hosts = self.networks.host_addresses(host, gate.network)
            protocol = name.partition("/")[2] or "tcp"
            try:
                port, bound = self.networks.ports.take(protocol, hosts, first, last)
            except DockerError as error:
                raise DockerError("failed to set up container networking: driver failed programming external "
                                  f"connectivity on endpoint {self.name} ({gate.id}): {error}") from None
            self.published.append(Published(name, hosts, port))
            for each in bound:
                self.sockets[ipaddress.ip_address(each.getsockname()[0]), protocol, port] = each

    def _port_rules(self) -> list[FirewallRule]:
        """A rule for each published place, to the address that the container has for the world."""
        rules: list[FirewallRule] = []
        for published in self.published:
            for host in published.hosts:
                gate = self.gateway(host.version) or self.gateway(4) or self.gateway(6)
                if gate is None or gate.network.driver != "bridge":
                    continue
                target = gate.address(host.version) or gate.address(4) or gate.address(6)
                if target is not None:
                    rules.append(PortRule(gate.network.bridge, published.protocol, host, published.port,
                                          target,
                                          int(published.name.partition("/")[0])))
        return rules

    def republish(self) -> None:
        """Make the firewall and the proxy agree with where the container is now."""
        networks, rules = self.networks, self._port_rules() + self.links
        stale = [rule for rule in self.rules if rule not in rules]
        fresh = [rule for rule in rules if rule not in self.rules]
        if fresh or stale:
            networks.firewall.change(fresh, stale)
        self.rules = rules
        for rule in fresh:
            if isinstance(rule, PortRule):
                if networks.firewall.proxied:
                    networks.proxy.publish(self._proxy_key(rule), rule, self.sockets.pop(
                        (rule.host, rule.protocol, rule.port), None))
                if rule.protocol == "udp":
                    forget_flows(PROTOCOLS["udp"], rule.port)

    def _proxy_key(self, rule: PortRule) -> str:
        return f"{self.key}/{rule.protocol}/{_bracketed(rule.host)}:{rule.port}"

    def link(self, rules: list[FirewallRule]) -> None:
        """Let the container use others' ports, and others its own, as links say."""
        self.links = rules
        if self.namespace >= 0:
            self.republish()

    @property
    def port_map(self) -> dict[str, list[dict[str, str]]]:
        """Ports as inspect shows them."""
        listed: dict[str, list[dict[str, str]]] = {}
        for published in self.published:
            listed.setdefault(published.name, []).extend(
                {"HostIp": str(host), "HostPort": str(published.port)} for host in published.hosts)
        return listed

    def rename(self, name: str) -> None:
        """Its container has got another name."""
        self.name = name
        for endpoint in self.endpoints.values():
            with endpoint.network.lock:
                endpoint.network.endpoints[endpoint.id] = self.key, name, endpoint

    # The namespace

    def enter(self, pid: int, servers: list[str], from_host: bool) -> None:
        """Make everything in the network namespace of `pid`: rules first, then links.  A container on a user
        network gets the resolver, which asks `servers` for other names, from the host's network when they are
        the host's own."""
        self.namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self.republish()
        self._make_links(list(self.endpoints.values()), first=True)
        self._choose_routes()
        if self.has_resolver:
            self.open_resolver(servers, from_host)

    def _make_links(self, endpoints: list[Endpoint], first: bool = False) -> None:
        """Make the links, and set them up inside in one go."""
        numbers = itertools.count()
        used = {endpoint.link for endpoint in self.endpoints.values()}
        for endpoint in endpoints:
            endpoint.link = next(name for name in (f"eth{number}" for number in numbers) if name not in used)
        messages = [endpoint.message(self.namespace) for endpoint in endpoints]
        if messages:
            netlink_batch(messages)
            if not self.networks.firewall.proxied:
                for endpoint in endpoints:
                    write_setting(f"/sys/class/net/{endpoint.host_link}/brport/hairpin_mode", "1")

        def configure() -> None:
            six = any(endpoint.address(6) for endpoint in self.endpoints.values())
            for name in ("all", "default"):  # this sets all links, so each is set again
                write_setting(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "0" if six else "1")
            for endpoint in self.endpoints.values():
                endpoint.set_ipv6()
            listed = [message for endpoint in endpoints for message in endpoint.configure()]
            netlink_batch(([link_change(1)] if first else []) + listed)

        in_network(self.namespace, configure)

    def _choose_routes(self) -> None:
        """Set the default routes by the endpoints that lead to the world."""
        def configure() -> None:
            for version in (4, 6):
                everywhere = ipaddress.ip_network("0.0.0.0/0" if version == 4 else "::/0")
                gate = self.gateway(version)
                if gate is not None:
                    gateway = next(gateway for gateway in gate.gateways if gateway.version == version)
                    index = socket.if_nametoindex(gate.link)
                    netlink_batch([route_message(RTM_NEWROUTE, index, everywhere, gateway)])

        if self.endpoints:
            in_network(self.namespace, configure)

    @property
    def has_resolver(self) -> bool:
        """Whether it is on a user network, where names resolve."""
        return any(endpoint.network.is_user_defined for endpoint in self.endpoints.values())

    def adopt(self, network: Network, settings: dict[str, Any]) -> None:
        """Take the place again that the container has had under an earlier daemon."""
        if settings["EndpointID"]:
            self.endpoints[network.name] = network.adopt(self.key, self.name, settings)

    def resume(self, pid: int, ports: dict[str, Optional[list[dict[str, str]]]], servers: list[str],
               from_host: bool) -> None:
        """Go on with a run that an earlier daemon began: its rules, ports and resolver; `ports` are those of
        its record."""
        networks = self.networks
        by_port: dict[tuple[str, int], list[IPAddress]] = {}
        for name, listed in ports.items():
            for binding in listed or []:
                hosts = by_port.setdefault((name, int(binding["HostPort"])), [])
                hosts.append(ipaddress.ip_address(binding["HostIp"]))
        for (name, port), hosts in by_port.items():
            self.published.append(Published(name, hosts, port))
            networks.ports.hold(self.published[-1].protocol, hosts, port)
        try:
            self.namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
            for number, endpoint in enumerate(self.endpoints.values()):
                endpoint.link = f"eth{number}"
            self.republish()
            if self.has_resolver:
                self.open_resolver(servers, from_host)
        except (OSError, DockerError) as error:  # it has ended, or is about to
            log.info("the network of %s is not as it was: %s", self.name, error)

    def open_resolver(self, servers: list[str], from_host: bool) -> None:
        """Give the container the resolver."""
        upstream = upstream_socket() if from_host else None

        def seat() -> ResolverSeat:
            made = ResolverSeat(self.lookup, servers, upstream)
            made.redirect()
            return made

        self.seat = in_network(self.namespace, seat)
        self.networks.resolver.add(self.seat)

    def lookup(self, name: str, kind: int) -> Optional[list[bytes]]:
        """What the resolver answers for a name (or, for PTR, an address) of the container's user networks, in
        changing order; None when it is none of theirs."""
        networks = [endpoint.network for endpoint in self.endpoints.values()
                    if endpoint.network.is_user_defined]
        if kind == DNS_PTR:
            found = [dns_name(f"{endpoint.names[0]}.{network.name}") for network in networks
                     for endpoint in network.all_endpoints() if endpoint.names and name in
                     (address.ip.reverse_pointer for address in endpoint.addresses)]
            return found or None
        wanted = self.aliases.get(name, name)
        addresses: list[IPAddress] = []
        for network in networks:
            short = wanted[:-len(network.name) - 1] if wanted.endswith("." + network.name.lower()) else wanted
            addresses += [address.ip for endpoint in network.all_endpoints() for address in endpoint.addresses
                          if short in endpoint.small_names]
        if not addresses:
            return None
        version = {DNS_A: 4, DNS_AAAA: 6}.get(kind)
        packed = [address.packed for address in addresses if address.version == version]
        start = secrets.randbelow(len(packed)) if packed else 0
        return packed[start:] + packed[:start]

    def close(self, linger: bool = False) -> None:
        """Give everything back; with `linger` the namespace lives on in another container, and the links are
        taken out of it.  Nothing here fails: what the kernel has lost already is lost."""
        networks = self.networks
        if self.seat is not None:
            networks.resolver.remove(self.seat)
            self.seat = None
        if self.rules:
            with contextlib.suppress(DockerError):
                networks.firewall.change((), self.rules)
        for rule in self.rules:
            if isinstance(rule, PortRule) and networks.firewall.proxied:
                networks.proxy.unpublish(self._proxy_key(rule))
        self.rules = []
        for bound in self.sockets.values():
            bound.close()
        self.sockets.clear()
        for published in self.published:
            networks.ports.give_back(published.protocol, published.hosts, published.port)
            if published.protocol == "udp":
                with contextlib.suppress(OSError):
                    forget_flows(PROTOCOLS["udp"], published.port)
        self.published = []
        for endpoint in self.endpoints.values():
            if linger and self.namespace >= 0:
                with contextlib.suppress(OSError):
                    netlink_batch([link_change(socket.if_nametoindex(endpoint.host_link), kind=RTM_DELLINK)])
            endpoint.network.leave(endpoint)
            endpoint.settings.update(ENDPOINT_STATUS)
        self.endpoints.clear()
        if self.namespace >= 0:
            os.close(self.namespace)
            self.namespace = -1


def _port_range(text: str) -> tuple[int, int]:
    """(first, last) of a host port or a range of them, (0, 0) for any."""
    first, _, last = text.partition("-")
    try:
        return int(first or 0), int(last or first or 0)
    except ValueError:
        raise BadParameter(f"invalid port specification: {go_quote(text)}") from None


class Networks:
    """All networks, and what they share: the firewall, the ports, the proxy, the resolver.

    `lock` guards the table; a network's own lock its addresses."""

    def __init__(self, config: Any) -> None:
        self.config = config
        self.path = os.path.join(config.data_root, "networks.json")
        self.lock = threading.Lock()
        self.table: dict[str, Network] = {}      # by id
        self.ports = PortAllocator()
        self.resolver = Resolver()
        self.proxy = ProxyClient(config.exec_root)
        self.firewall = Firewall()
        self.allocated: dict[str, Sandbox] = {}  # what the jobs of Docker 1.2.0 hold, by their ids

    def load(self) -> None:
        """Read the networks, make the predefined ones, bring the bridges up and the rules in place."""
        records: list[dict[str, Any]] = []
        with contextlib.suppress(OSError, ValueError):
            records = json.loads(read_state(self.path))
        for record in records if isinstance(records, list) else []:
            self.table[record["Id"]] = Network(record)
        self.firewall = choose_firewall(self.config, self._enable_forwarding(4))
        self._load_predefined()
        for network in self.table.values():
            try:
                self._make_links(network)
            except OSError as error:
                if not network.is_user_defined:
                    raise
                log.error("the network %s cannot be used: %s", network.name, error)
        self.firewall.change([rule for network in self.table.values() for rule in network.rules()])
        self.save()

    def save(self) -> None:
        """Write the table; durable when it returns."""
        write_state(self.path, [network.record for network in self.table.values()])

    def all(self) -> list[Network]:
        """All networks, the newest first."""
        with self.lock:
            return sorted(self.table.values(), key=lambda network: network.record["Created"], reverse=True)

    def find(self, name: str) -> Network:
        """The network by its name, id, or an id's unique beginning; NotFound, or BadParameter when several
        begin so."""
        networks = self.all()
        exact = [network for network in networks if name in (network.id, network.name)]
        found = exact[:1] or [network for network in networks if name and network.id.startswith(name)]
        if len(found) > 1:
            raise BadParameter(f"network {name} is ambiguous ({len(found)} matches found on ID prefix)")
        if not found:
            raise NotFound(f"network {name} not found")
        return found[0]

    # Making and removing

    def create(self, body: dict[str, Any]) -> Network:
        """Make a network as asked; Conflict, Forbidden or BadParameter with Docker's text."""
        name, driver = body["Name"], body["Driver"] or "bridge"
        if not name.strip():
            raise BadParameter("network name cannot be empty or blank" if name else "invalid network name")
        if name in (*PREDEFINED_NETWORKS, "default"):
            raise Forbidden(f"operation is not permitted on predefined {name} network")
        if driver not in NETWORK_DRIVERS:
            raise NotFound(f'could not find plugin {driver} in v1 plugin registry: plugin "{driver}" not '
                           'found')
        if driver in ("host", "null"):
            raise Forbidden(f'only one instance of "{driver}" network is allowed')
        with self.lock:
            if any(network.name == name for network in self.table.values()):
                raise Conflict(f"network with name {name} already exists")
            record = network_record(name, driver, body)
            settings = record["IPAM"]["Config"]
            record["Automatic"] = not settings
            for version in [4] * record["EnableIPv4"] + [6] * record["EnableIPv6"]:
                if not any(ipaddress.ip_network(each["Subnet"]).version == version for each in settings):
                    settings.append({"Subnet": str(self._free_subnet(version))})
            self._check_overlap(settings)
            network = Network(record)
            for each, pool in zip(settings, network.pools):
                each.setdefault("Gateway", str(pool.gateway))
            self._check_links(network)
            try:  # the record first: what a crash leaves is a whole network, found at the next start
                self.table[network.id] = network
                self.save()
                self._make_links(network)
                self.firewall.change(network.rules())
            except BaseException as error:
                self._take_down(network)
                if isinstance(error, OSError):
                    raise DockerError(f"cannot make the links of the {driver} network {name}: "
                                      f"{error.strerror or error}") from None
                raise
        return network

    def remove(self, network: Network) -> None:
        """Remove it with its bridge and rules; Forbidden when it is predefined or in use."""
        if not network.is_user_defined:
            raise Forbidden(f"{network.name} is a pre-defined network and cannot be removed")
        with self.lock:
            with network.lock:
                if network.endpoints:
                    listed = ", ".join(f'name:"{name}" id:"{endpoint.id[:12]}"'
                                       for _, name, endpoint in network.endpoints.values())
                    raise Forbidden(f"error while removing network: network {network.name} has active "
                                    "endpoints "
                                    f"({listed})")
                network.removed = True
            self._take_down(network)

    def _take_down(self, network: Network) -> None:
        """Its rules and links, however far they had come, and last its record."""
        with contextlib.suppress(DockerError):
            self.firewall.change((), network.rules())
        if network.own_link:
            with contextlib.suppress(OSError):
                netlink_batch([link_change(socket.if_nametoindex(network.own_link), kind=RTM_DELLINK)])
        self.table.pop(network.id, None)
        self.save()

    def _free_subnet(self, version: int) -> IPNetwork:
        used = used_networks() + [pool.subnet for network in self.table.values() for pool in network.pools]
        if version == 4:
            pools = [(pool["Base"], pool["Size"]) for pool in self.config.default_address_pools or []]
            return free_subnet([pool for pool in pools if "." in pool[0]] or DEFAULT_POOLS, used)
        pools = [(pool["Base"], pool["Size"]) for pool in self.config.default_address_pools or []
                 if ":" in pool["Base"]]
        local = hashlib.sha256(read_text("/etc/machine-id").encode()
                               or socket.gethostname().encode()).digest()[:5]
        unique = str(ipaddress.IPv6Address(b"\xfd" + local + bytes(10))) + "/48"  # RFC 4193
        return free_subnet(pools or [(unique, 64)], used)

    def _check_overlap(self, settings: list[dict[str, Any]]) -> None:
        known = [pool.subnet for network in self.table.values() for pool in network.pools]
        for each in settings:
            subnet = ipaddress.ip_network(each["Subnet"])
            if any(subnet.version == other.version and subnet.overlaps(other) for other in known):
                raise Forbidden("invalid pool request: Pool overlaps with other one on this address space")
            known.append(subnet)

    def _check_links(self, network: Network) -> None:
        """A bridge's name is nobody else's, and a macvlan's parent is there or can be made."""
        driver, name = network.driver, network.bridge if network.driver == "bridge" else network.parent
        there = list_links().get(name)
        if there is None:
            network.record["OwnLink"] = name
        if driver == "bridge":
            if len(name) > 15 or "/" in name:
                raise BadParameter(f"invalid bridge name {name}")
            if any(other.driver == driver and other.bridge == name for other in self.table.values()):
                raise Forbidden(f"networks have same bridge name: {name}")
            if there and there.kind != "bridge":
                raise Forbidden(f"existing interface {name} is not a bridge")
        else:
            mode, (base, _, number) = network.options.get(f"{driver}_mode", ""), name.rpartition(".")
            if mode not in LINK_MODES[driver]:
                raise BadParameter(f"requested {driver} mode '{mode}' is not valid, "
                                   f"'{'bridge' if driver == 'macvlan' else 'l2'}' mode is the default")
            if not there and network.options.get("parent") and not (
                    link_exists(base) and number.isdecimal() and 0 < int(number) < 4095):
                raise BadParameter(f"invalid subinterface vlan name {name}, example formatting is eth0.10")

    # The host's side

    def _enable_forwarding(self, version: int) -> bool:
        """Make the host a router, which bridges need; whether it was none before, and may be none but for
        them."""
        path = f"/proc/sys/net/{'ipv4/ip_forward' if version == 4 else 'ipv6/conf/all/forwarding'}"
        if not self.config.ip_forward or self.config.bridge == "none" or read_text(path).strip() != "0":
            return False
        write_setting(path, "1")
        if read_text(path).strip() == "1":
            return not self.config.ip_forward_no_drop
        log.warning("IP forwarding is disabled and %s cannot be written: containers reach nothing beyond "
                    "this host",
                    path)
        return False

    def _make_links(self, network: Network) -> None:
        """The network's bridge with its addresses, or the link below macvlan and ipvlan, where missing."""
        if network.driver == "bridge":
            self._make_bridge(network)
        elif network.own_link and not link_exists(network.own_link):
            base, _, number = network.own_link.rpartition(".")
            if base:
                vlan = attribute(IFLA_VLAN_ID, struct.pack("=H", int(number)))
                below = attribute(IFLA_LINK, socket.if_nametoindex(base))
                netlink_batch([link_message(network.own_link, "vlan", below, data=vlan)])
            else:
                netlink_batch([link_message(network.own_link, "dummy")])

    def _make_bridge(self, network: Network) -> None:
        name = network.bridge
        if not link_exists(name):
            mac = attribute(IFLA_ADDRESS, b"\x02\x42" + secrets.token_bytes(4))
            mtu = attribute(IFLA_MTU, network.mtu) if network.mtu else b""
            netlink_batch([link_message(name, "bridge", mac, mtu)])
        index = socket.if_nametoindex(name)
        six = any(pool.subnet.version == 6 for pool in network.pools)
        if six:
            self._enable_forwarding(6)
        write_setting(f"/proc/sys/net/ipv6/conf/{name}/accept_ra", "0")
        write_setting(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6", "0" if six else "1")
        if not self.firewall.proxied:
            write_setting(f"/proc/sys/net/ipv4/conf/{name}/route_localnet", "1")
        if not network.switch("enable_icc", True):
            load_module("br_netfilter")
            write_setting("/proc/sys/net/bridge/bridge-nf-call-iptables", "1")
        there = list_addresses(index)
        wanted = [pool.interface(pool.gateway) for pool in network.pools] if not network.switch(
            "inhibit_ipv4", False) else []
        netlink_batch([*(address_message(RTM_NEWADDR, index, address) for address in wanted
                         if address not in there),
                       link_change(index)])

    def _load_predefined(self) -> None:
        """The networks bridge, host and none; the first as the daemon's options have it now."""
        names = {network.name: network for network in self.table.values()}
        for name, driver in PREDEFINED_NETWORKS.items():
            record = network_record(name, driver, {})
            record["IPAM"]["Options"] = None
            if name in names:
                record.update(Id=names[name].id, Created=names[name].record["Created"])
                del self.table[names[name].id]
            if name == "bridge":
                if self.config.bridge == "none":
                    continue
                record.update(self._default_bridge())
            self.table[record["Id"]] = Network(record)

    def _default_bridge(self) -> dict[str, Any]:
        """What the options say of the network bridge: its name, subnet, addresses and switches."""
        config = self.config
        name = config.bridge or DEFAULT_BRIDGE
        if config.bridge and not link_exists(name):
            raise DockerError("bridge not found")
        standing = [address for address in (list_addresses(socket.if_nametoindex(name)) if link_exists(name)
                                            else [])
                    if not address.ip.is_link_local]
        settings = [self._default_pool(4, standing)]
        if config.ipv6:
            settings.append(self._default_pool(6, standing))
        options = {"default_bridge": True, "enable_icc": config.icc, "enable_ip_masquerade": config.ip_masq,
                   "host_binding_ipv4": config.ip, "name": name}
        texts = {BRIDGE_OPTION + key: str(value).lower() if isinstance(value, bool) else value
                 for key, value in options.items()}
        texts["com.docker.network.driver.mtu"] = str(config.mtu or default_mtu())
        return {"IPAM": {"Driver": "default", "Options": None, "Config": settings}, "Options": texts,
                "EnableIPv6": config.ipv6}

    def _default_pool(self, version: int, standing: list[IPInterface]) -> dict[str, Any]:
        """The default bridge's IPAM configuration; `standing` are the addresses that the bridge has."""
        config = self.config
        bip, fixed, gateway = ((config.bip, config.fixed_cidr, config.default_gateway) if version == 4 else
                               (config.bip6, config.fixed_cidr_v6, config.default_gateway_v6))
        there = next((address for address in standing if address.version == version), None)
        if bip:
            wanted = ipaddress.ip_interface(bip)
            if config.bridge and there and there != wanted:
                raise DockerError(f"bridge ip ({there}) does not match existing bridge configuration {bip}")
            there = wanted
        if there is None:
            subnet = ipaddress.ip_network(fixed) if fixed and version == 6 else self._free_subnet(version)
            there = ipaddress.ip_interface((int(subnet.network_address) + 1, subnet.prefixlen))
        subnet = there.network
        settings: dict[str, Any] = {"Subnet": str(subnet), "Gateway": str(there.ip)}
        if fixed:
            inner = ipaddress.ip_network(fixed, strict=False)
            if not _is_inside(inner, subnet):
                raise DockerError(f"fixed-cidr {fixed} is not inside the bridge's network {subnet}")
            settings["IPRange"] = str(inner)
        if gateway:
            if ipaddress.ip_address(gateway) not in subnet:
                raise DockerError(f"default gateway {gateway} is not inside the bridge's network {subnet}")
            settings["AuxiliaryAddresses"] = {f"DefaultGatewayIPv{version}": gateway}
        return settings

    def host_addresses(self, text: str, network: Network) -> list[IPAddress]:
        """The host's addresses that a published port is bound to: the one named, else the network's or the
        daemon's default, which is every address of both IP versions."""
        text = text.strip("[]") or network.options.get(BRIDGE_OPTION + "host_binding_ipv4") or self.config.ip
        try:
            host = ipaddress.ip_address(text)
        except ValueError:
            raise BadParameter(f"invalid IP address {go_quote(text)}") from None
        both = str(host) == "0.0.0.0" and read_text("/proc/net/if_inet6")
        return [host, ipaddress.ip_address("::")] if both else [host]

    def gateway_addresses(self) -> list[str]:
        """What host-gateway in --add-host stands for."""
        pools = next((network.pools for network in self.table.values() if network.name == "bridge"), [])
        return self.config.host_gateway_ips or [str(pool.gateway) for pool in pools]


    # The jobs of Docker 1.2.0, for programs that embed the engine

    def _held(self, job: Job) -> Sandbox:
        if job.args[0] not in self.allocated:
            raise NotFound(f"No network information for {job.args[0]}")
        return self.allocated[job.args[0]]

    @job("allocate_interface")
    def allocate_interface(self, job: Job) -> None:
        """Take an address on the bridge, perhaps env `RequestedIP`, for the id in the argument: the reply has
        IP, Mask, Gateway, MacAddress, Bridge and IPPrefixLen."""
        wanted, settings = job.env.get("RequestedIP") or "", {**ENDPOINT}
        settings["IPAMConfig"] = {"IPv4Address": wanted} if wanted else None
        sandbox = Sandbox(self, job.args[0], job.args[0])
        network = self.find("bridge")
        address = sandbox.join(network, settings).addresses[0]
        self.allocated[job.args[0]] = sandbox
        job.reply({"IP": str(address.ip), "Mask": str(address.netmask), "Gateway": settings["Gateway"],
                   "MacAddress": settings["MacAddress"], "Bridge": network.bridge,
                   "IPPrefixLen": address.network.prefixlen})

    @job("release_interface")
    def release_interface(self, job: Job) -> None:
        """Give back what allocate_interface and allocate_port took for the id."""
        self._held(job).close()
        del self.allocated[job.args[0]]

    @job("allocate_port")
    def allocate_port(self, job: Job) -> None:
        """Publish env `ContainerPort` of the id's address at env `HostPort` and `HostIP`, by `Proto`: the
        reply has HostIP and HostPort."""
        sandbox, env = self._held(job), job.env
        name = f"{env.get_int('ContainerPort')}/{env.get('Proto') or 'tcp'}"
        sandbox.publish({name: [{"HostIp": env.get("HostIP") or "",
                                 "HostPort": str(env.get("HostPort") or "")}]})
        sandbox.republish()
        job.reply({"HostIP": sandbox.port_map[name][-1]["HostIp"],
                   "HostPort": sandbox.port_map[name][-1]["HostPort"]})

    @job("link")
    def link(self, job: Job) -> None:
        """Let env `ParentIP` use the `Ports` (such as 80/tcp) of `ChildIP` on the bridge; `Action` -D takes
        that back."""
        env, bridge = job.env, self.find("bridge").bridge
        parent, child = (ipaddress.ip_address(env.get(key) or "") for key in ("ParentIP", "ChildIP"))
        ports = [name.partition("/") for name in env.get_list("Ports")]
        rules = [LinkRule(bridge, parent, child, protocol or "tcp", int(port)) for port, _, protocol in ports]
        self.firewall.change((), rules) if env.get("Action") == "-D" else self.firewall.change(rules)


def init_networkdriver(job: Job) -> None:
    """The job init_networkdriver of Docker 1.2.0: make the networks as the engine's variable `config` has
    them, and register their jobs."""
    networks = Networks(job.engine.variables["config"])
    networks.load()
    job.engine.variables["networks"] = networks
    job.engine.install(networks)


def network_record(name: str, driver: str, body: dict[str, Any]) -> dict[str, Any]:
    """The record of a new network, from its request; BadParameter where the IPAM configuration is wrong."""
    ipam = body.get("IPAM") or {}
    if (ipam.get("Driver") or "default") not in ("default", "null"):
        raise NotFound(f'could not find plugin {ipam["Driver"]} in v1 plugin registry: plugin '
                       f'"{ipam["Driver"]}" not found')
    settings = [{key: value for key, value in each.items() if value} for each in ipam.get("Config") or []]
    for each in settings:
        _check_ipam(each)
    return {"Name": name, "Id": secrets.token_hex(32), "Created": rfc3339nano(time.time_ns()),
            "Scope": "local",
            "Driver": driver, "EnableIPv4": body.get("EnableIPv4") is not False,
            "EnableIPv6": body.get("EnableIPv6") or False,
            "IPAM": {"Driver": ipam.get("Driver") or "default", "Options": ipam.get("Options") or {},
                     "Config": settings},
            "Internal": body.get("Internal") or False, "Attachable": body.get("Attachable") or False,
            "Ingress": False, "ConfigFrom": {"Network": ""}, "ConfigOnly": False,
            "Options": body.get("Options") or {}, "Labels": body.get("Labels") or {}}


def _is_inside(inner: IPNetwork, outer: IPNetwork) -> bool:
    return inner.version == outer.version and inner.overlaps(outer) and inner.prefixlen >= outer.prefixlen


def _check_ipam(settings: dict[str, Any]) -> None:
    """BadParameter with Docker's text where a subnet, range, gateway or auxiliary address is wrong."""
    text = settings.get("Subnet", "")
    try:
        subnet = ipaddress.ip_network(text, strict=False)
    except ValueError:
        raise BadParameter(f"invalid network config:\ninvalid subnet {text}: invalid CIDR block "
                           "notation") from None
    if "/" not in text or str(subnet) != str(ipaddress.ip_interface(text)):
        raise BadParameter(f"invalid network config:\ninvalid subnet {text}: it should be {subnet}")
    values = [("ip-range", settings.get("IPRange")), ("gateway", settings.get("Gateway"))]
    values += [("auxiliary address", value) for value in (settings.get("AuxiliaryAddresses") or {}).values()]
    for what, value in values:
        try:
            inside = not value or _is_inside(ipaddress.ip_network(value, strict=False), subnet)
        except ValueError:
            raise BadParameter(f"invalid network config:\ninvalid {what} {value}: invalid address") from None
        if not inside:
            raise BadParameter(f"invalid network config:\ninvalid {what} {value}: parent subnet {subnet} "
                               "doesn't "
                               f"contain {what}")


def default_mtu() -> int:
    """The MTU of the default route's link, or 1500."""
    with contextlib.suppress(OSError, StopIteration):
        number = next(number for network, number in list_routes() if not network.prefixlen
                      and network.version == 4)
        return next(link.mtu for link in list_links().values() if link.number == number)
    return 1500


def load_module(name: str) -> None:
    """Have the kernel load a module that a feature needs; a kernel without modules is left alone."""
    with contextlib.suppress(DockerError):
        run_tool(["modprobe", "-q", name])


def network_settings(record: dict[str, Any], sandbox: Optional[Sandbox], pid: int) -> dict[str, Any]:
    """NetworkSettings of a container as inspect shows them, from its record and, while it runs, its sandbox
    and the process by which its namespace is found."""
    networks = {name: {key: settings.get(key, value) for key, value in ENDPOINT.items()}
                for name, settings in record["Networks"].items()}
    first = networks.get("bridge") or ENDPOINT
    return {"Bridge": "", "SandboxID": sandbox.id if sandbox else "",
            "SandboxKey": f"/proc/{pid}/ns/net" if pid else "", "Ports": record.get("Ports") or {},
            "HairpinMode": False, "LinkLocalIPv6Address": "", "LinkLocalIPv6PrefixLen": 0,
            "SecondaryIPAddresses": None, "SecondaryIPv6Addresses": None,
            **{key: first[key] for key in ENDPOINT_STATUS}, "Networks": networks}


# ------------------------------------------------------------------------------------------------------------
# Network driver: the proxy
#
# One process for all published ports that need user space: what comes from this machine's loopback or from a
# bridge, what crosses from one IP version to the other, and everything where no firewall is used.  It is
# handed the bound sockets and outlives the daemon, with its connections, as the shim does.  Bytes go by
# splice(2) from socket to pipe to socket and are never copied here; udp(7) flows are forgotten after 90 s of
# silence, as Docker's.
# ------------------------------------------------------------------------------------------------------------

PROXY_CHUNK = 1 << 18
PROXY_UDP_TIMEOUT = 90.0  # seconds
PROXY_UDP_FLOWS = 4096    # of one port; then the one that was silent longest goes


def _family_of(target: tuple[str, int]) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in target[0] else socket.AF_INET


class ProxyHalf:
    """One direction of a connection: socket to pipe to socket."""

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self.source, self.target = source, target
        self.pipe = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        with contextlib.suppress(OSError):
            fcntl.fcntl(self.pipe[0], F_SETPIPE_SZ, PROXY_CHUNK)
        self.held = 0         # bytes in the pipe
        self.ended = self.closed = False

    def move(self) -> None:
        """Pass on what there is; at its end close the other side's input.  OSError when a side is gone."""
        while not self.closed:
            if not self.held and not self.ended:
                try:
                    self.held = splice(self.source.fileno(), self.pipe[1], PROXY_CHUNK)
                except BlockingIOError:
                    return
                self.ended = self.held == 0
            if self.held:
                try:
                    self.held -= splice(self.pipe[0], self.target.fileno(), self.held)
                except BlockingIOError:
                    return
            elif self.ended:
                self.closed = True
                self.target.shutdown(socket.SHUT_WR)


class ProxyConnection:
    """A connection through a published port: the client's socket, and ours to the container."""

    def __init__(self, port: ProxyPort, client: socket.socket) -> None:
        self.port, self.proxy, self.client = port, port.proxy, client
        kind, target = socket.SOCK_STREAM | socket.SOCK_CLOEXEC, port.target
        self.server = socket.socket(_family_of(target), kind,
                                    port.listener.proto)
        port.connections.add(self)
        self.halves: list[ProxyHalf] = []
        for end in (client, self.server):
            end.setblocking(False)
        self.connecting = self.server.connect_ex(target) == errno.EINPROGRESS
        self.halves = [ProxyHalf(client, self.server), ProxyHalf(self.server, client)]
        self.interests: dict[int, int] = {}
        self.serve()

    def serve(self, events: int = 0) -> None:
        """Something can be read or written, or has failed: go on, and say what to wait for next."""
        try:
            if self.connecting:
                self.connecting = not self._connected()
            if not self.connecting:
                for half in self.halves:
                    half.move()
        except OSError:
            self.close()
            return
        if all(half.closed for half in self.halves):
            self.close()
        else:
            self._watch()

    def _connected(self) -> bool:
        number = self.server.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if number:
            raise OSError(number, os.strerror(number))
        try:
            self.server.getpeername()
        except OSError:
            return False
        return True

    def _watch(self) -> None:
        forth, back = self.halves
        for end, reads, writes in ((self.client, forth, back), (self.server, back, forth)):
            wanted = select.EPOLLIN * (not reads.ended and not reads.held and not self.connecting)
            wanted |= select.EPOLLOUT * bool(writes.held or (self.connecting and end is self.server))
            if self.interests.get(end.fileno()) != wanted:
                self.proxy.watch(end.fileno(), wanted, self.serve)
                self.interests[end.fileno()] = wanted

    def close(self) -> None:
        """Both sides and the pipes between them."""
        self.port.connections.discard(self)
        for end in (self.client, self.server):
            self.proxy.unwatch(end.fileno())
            end.close()
        for half in self.halves:
            for fd in half.pipe:
                os.close(fd)


class ProxyPort:
    """A published port's bound socket, and where it leads: `place` is what the daemon said of it."""

    def __init__(self, proxy: Proxy, listener: socket.socket, place: dict[str, Any]) -> None:
        self.proxy, self.listener, self.place = proxy, listener, place
        self.target = (place["target"], place["target_port"])
        self.flows: dict[Any, tuple[socket.socket, float]] = {}  # of UDP, by client; oldest first
        self.connections: set[ProxyConnection] = set()
        listener.setblocking(False)
        proxy.watch(listener.fileno(), select.EPOLLIN, self.receive if listener.type == socket.SOCK_DGRAM
                    else self.accept)

    def accept(self, events: int) -> None:
        """Take a connection, and begin one to the container."""
        with contextlib.ExitStack() as undo:
            try:
                client = undo.enter_context(self.listener.accept()[0])
                ProxyConnection(self, client)
                undo.pop_all()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM):
                    time.sleep(0.01)  # it stays in the queue until others have ended

    def receive(self, events: int) -> None:
        """Pass on a client's datagrams, each client's by a socket of its own."""
        with contextlib.suppress(OSError):
            for _ in range(64):
                data, client = self.listener.recvfrom(65536)
                flow = self.flows.pop(client, None)
                server = flow[0] if flow else self._begin(client)
                self.flows[client] = (server, time.monotonic())
                with contextlib.suppress(OSError):
                    server.send(data)

    def _begin(self, client: Any) -> socket.socket:
        if len(self.flows) >= PROXY_UDP_FLOWS:
            self._end(next(iter(self.flows)))
        server = socket.socket(_family_of(self.target), socket.SOCK_DGRAM
                               | socket.SOCK_CLOEXEC)
        server.setblocking(False)
        server.connect(self.target)
        self.proxy.watch(server.fileno(), select.EPOLLIN, lambda events: self._answer(client, server))
        return server

    def _answer(self, client: Any, server: socket.socket) -> None:
        with contextlib.suppress(OSError):
            for _ in range(64):
                self.listener.sendto(server.recv(65536), client)
                self.flows[client] = (self.flows.pop(client)[0], time.monotonic())

    def _end(self, client: Any) -> None:
        server, _ = self.flows.pop(client)
        self.proxy.unwatch(server.fileno())
        server.close()

    def sweep(self, now: float) -> None:
        """End the UDP flows that have been silent."""
        while self.flows and now - next(iter(self.flows.values()))[1] > PROXY_UDP_TIMEOUT:
            self._end(next(iter(self.flows)))

    def close(self) -> None:
        """Stop to listen, and end what goes through it: the container is gone."""
        for client in list(self.flows):
            self._end(client)
        for connection in list(self.connections):
            connection.close()
        self.proxy.unwatch(self.listener.fileno())
        self.listener.close()


class Proxy(HelperProcess):
    """The loop over the ports and their connections."""

    idle = 30.0

    def __init__(self, listener: socket.socket) -> None:
        super().__init__(listener)
        self.ports: dict[str, ProxyPort] = {}

    def op_publish(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """Serve the bound socket `listener` as the port `key`; one that is known gets a new target."""
        key, place = request["key"], request["place"]
        if key in self.ports and not fds:
            self.ports[key].place = place
            self.ports[key].target = (place["target"], place["target_port"])
        else:
            self.ports[key] = ProxyPort(self, socket.socket(fileno=fds.pop("listener")), place)

    def op_unpublish(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """The port is no longer published."""
        port = self.ports.pop(request["key"], None)
        if port is not None:
            port.close()

    def op_list(self, request: dict[str, Any], fds: dict[str, int], answer: dict[str, Any]) -> None:
        """The keys of the ports, in pages: those greater than `after`."""
        answer["keys"] = sorted(key for key in self.ports if key > request.get("after", ""))[:256]

    def on_idle(self) -> None:
        """Forget silent flows."""
        for port in self.ports.values():
            port.sweep(time.monotonic())

    def is_busy(self) -> bool:
        """Whether it must not quit."""
        return bool(self.ports)


# ------------------------------------------------------------------------------------------------------------
# Logs
#
# What containers print: one pump thread reads the streams of all containers; a cutter makes records of them,
# lines cut at 16 KiB as Docker cuts them; a log driver keeps these.  json-file and local write files in
# moby's formats (a JSON object a line; length-prefixed protobuf messages), which rotate.  The others send to
# a server (RFC 3164, RFC 5424 and RFC 5425; Fluentd's forward protocol; GELF 1.1; systemd's native journal
# protocol), each from a queue and a thread of its own, and keep a local copy for `logs`.  Clients attach to
# Streams: for one that reads slowly its share waits on the disk, so that neither the container nor another
# client waits for it.
# ------------------------------------------------------------------------------------------------------------

LOG_LINE_LIMIT = 16384          # bytes of a line that go into one log entry
SUBSCRIBER_LIMIT = 1 << 20      # bytes that wait in memory for one attached client
SPOOL_LIMIT = 4 << 30           # bytes that wait on the disk for one attached client
PATIENCE = 3                    # seconds for which a container without a log waits for a client
SENDER_LIMIT = 1 << 20          # bytes that wait for one log server, unless max-buffer-size says otherwise
FOLLOWED_FILES = 100            # rotated files that are kept open for one reader that falls behind
STDIN, STDOUT, STDERR = 0, 1, 2
STREAM_NAMES = {STDOUT: "stdout", STDERR: "stderr"}


class LogPump:
    """One thread that reads every container's output when there is some, and hands it on.

    A callback gets what was read, b"" at the end of the stream; its descriptor is then closed by the pump."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[bytes], None]] = {}
        self._reading = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="logs", daemon=True)
        self._thread.start()

    def add(self, fd: int, callback: Callable[[bytes], None]) -> None:
        """Read `fd`, which the pump owns from now on, until its end."""
        os.set_blocking(fd, False)
        self._callbacks[fd] = callback
        self._epoll.register(fd, select.EPOLLIN)

    def watch(self, fd: int, wanted: bool) -> None:
        """Read `fd` from now on, or leave what it has where it is."""
        with contextlib.suppress(OSError):
            self._epoll.modify(fd, select.EPOLLIN if wanted else 0)

    def stop(self) -> None:
        """Read no more: what has been read stands in the logs on return, the rest waits in its pipe."""
        if not self._reading.acquire(timeout=5):
            log.error("a container's log does not take its output: some of it may be lost")

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                with self._reading:
                    self._read(fd)

    def _read(self, fd: int) -> None:
        try:
            data = os.read(fd, 1 << 18)
        except BlockingIOError:
            return
        except OSError:  # EIO: the last slave of a terminal is closed
            data = b""
        callback = self._callbacks[fd]
        if not data:
            del self._callbacks[fd]
            self._epoll.unregister(fd)
        try:
            callback(data)
        except Exception:
            log.exception("a container's output could not be handled")
        finally:
            if not data:
                os.close(fd)


# Records: what goes into a log, cut from the streams


class Partial(NamedTuple):
    """Which piece of a line that is too long for one entry, or that its stream's end cut off."""

    id: str
    ordinal: int
    last: bool


class LogRecord(NamedTuple):
    """Whole lines of one stream, or one piece of a long line: then `partial` tells which."""

    stream: int
    when: int                        # nanoseconds since 1970
    data: bytes                      # each line with its newline; a piece that is not the last has none
    partial: Optional[Partial] = None

    def lines(self) -> list[bytes]:
        """The entries, without their newlines."""
        return self.data[:-1].split(b"\n") if self.data.endswith(b"\n") else [self.data]


class LineCutter:
    """Cuts one stream into records.  What it keeps between two chunks: `rest`, the beginning of a line; for a
    line of which pieces have gone out also `partial`, the last of these, and `when` the first was read."""

    def __init__(self, stream: int) -> None:
        self.stream, self.rest, self.when = stream, b"", 0
        self.partial: Optional[Partial] = None

    def feed(self, data: bytes) -> Iterator[LogRecord]:
        """The records that `data`, the stream's next bytes, completes; b"" is its end."""
        now, ending, data = time.time_ns(), not data, self.rest + data
        begin = position = 0
        self.rest = b""
        while position < len(data):
            window = position + LOG_LINE_LIMIT
            if self.partial is None:  # one search goes over all lines that end in the window
                newline = data.rfind(b"\n", position, window)
                if newline >= 0:
                    position = newline + 1
                    continue
                if begin < position:
                    yield LogRecord(self.stream, now, data[begin:position])
            else:
                newline = data.find(b"\n", position, window)
            begin = position
            if newline < 0 and len(data) < window and not ending:
                self.rest = data[position:]
                return
            position = newline + 1 if newline >= 0 else window
            yield self._piece(data[begin:position], now, newline >= 0)
            begin = position
        if begin < position and self.partial is None:
            yield LogRecord(self.stream, now, data[begin:])
        if ending:
            self.partial = None

    def _piece(self, data: bytes, now: int, last: bool) -> LogRecord:
        if self.partial is None:
            self.partial, self.when = Partial(secrets.token_hex(32), 0, False), now
        piece = self.partial._replace(ordinal=self.partial.ordinal + 1, last=last)
        self.partial = None if last else piece
        return LogRecord(self.stream, self.when, data, piece)


class LogInfo(NamedTuple):
    """What a log driver is told of its container, and the options that it was given."""

    options: dict[str, str]
    id: str
    name: str                        # with its slash
    image_id: str
    image: str
    created: str
    command: str
    labels: dict[str, str]
    env: list[str]

    def attributes(self, rename: Callable[[str], str] = str) -> dict[str, str]:
        """The labels and variables that labels, labels-regex, env and env-regex choose."""
        variables = dict(item.split("=", 1) for item in self.env if "=" in item)
        found: dict[str, str] = {}
        for option, values in (("labels", self.labels), ("env", variables)):
            names, pattern = (self.options.get(option) or "").split(","), self.options.get(option + "-regex")
            try:
                matches = re.compile(pattern or "(?!)").search
            except re.error as error:
                raise DockerError(f"error parsing regexp: {error.msg}: `{pattern}`") from None
            found.update((rename(name), values[name]) for name in values if name in names or matches(name))
        return found

    def tag(self, default: str = "{{.ID}}") -> str:
        """The option tag, a Go template of which fields are understood; DockerError for another."""
        fields = {"ID": self.id[:12], "FullID": self.id, "ContainerID": self.id, "Name": self.name[1:],
                  "ContainerName": self.name, "ImageID": self.image_id[:12], "ImageFullID": self.image_id,
                  "ContainerImageID": self.image_id, "ImageName": self.image,
                  "ContainerImageName": self.image, "DaemonName": "docker", "Command": self.command,
                  "Hostname": socket.gethostname()}

        def value(match: re.Match[str]) -> str:
            if match[1] is None:
                raise DockerError("template: log-tag:1: " + (
                    f"{match[0]} is not understood here: a tag may name fields only"
                    if match[0].endswith("}}") else "unclosed action"))
            if match[1] not in fields:
                raise DockerError(f'template: log-tag:1:{match.start(1) - 1}: executing "log-tag" at '
                                  f"<.{match[1]}>: can't evaluate field {match[1]} in type *logger.Info")
            return fields[match[1]]

        return re.sub(r"\{\{\s*\.(\w+)\s*\}\}|\{\{.*?(?:\}\}|$)", value, self.options.get("tag") or default)


# The formats of log files


class LogEntry(NamedTuple):
    """An entry as it is read back; `text` ends with its newline, if the line ended there."""

    stream: int
    when: int
    text: bytes
    attributes: dict[str, str]


# What Go escapes and Python does not: (character, what stands for it until the rest is escaped, escape)
_GO_CONTROLS = (("\t", "\ud809", "\\u0009"), ("\b", "\ud808", "\\u0008"), ("\f", "\ud80c", "\\u000c"))
_GO_ESCAPES = (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("\u2028", "\\u2028"),
               ("\u2029", "\\u2029"), ("\udc80", "\\ufffd"))


class JsonLines:
    """The format of json-file, byte for byte as moby's encoder writes it."""

    def __init__(self, attributes: dict[str, str]) -> None:
        self._attributes = ',"attrs":' + docker_json(attributes, sort=True).decode() if attributes else ""

    def encode(self, record: LogRecord) -> bytes:
        """The record's entries.  All lines are escaped in one go, as a call per line would take most of the
        time; what stands for the newlines is a character that the text has not."""
        try:
            text = record.data.decode()
        except UnicodeDecodeError:  # U+FFFD for every single byte that is not UTF-8
            text = re.sub("[\udc80-\udcff]", "\udc80", record.data.decode("utf-8", "surrogateescape"))
        newline = "\ud80a" if "\x7f" in text else "\x7f"
        text = text.replace("\n", newline)
        for character, mark, _ in _GO_CONTROLS:
            text = text.replace(character, mark)
        text = json.encoder.encode_basestring(text)  # the C implementation where there is one
        for mark, escape in *[pair[1:] for pair in _GO_CONTROLS], *_GO_ESCAPES:
            text = text.replace(mark, escape)
        tail = (f'","stream":"{STREAM_NAMES[record.stream]}"{self._attributes},'
                f'"time":"{rfc3339nano(record.when)}"}}\n')
        if not text.endswith(newline + '"'):
            return ('{"log":' + text[:-1] + tail).encode()
        return ('{"log":' + text[:-1].replace(newline, "\\n" + tail + '{"log":"'))[:-8].encode()

    @staticmethod
    def decode(line: bytes) -> Optional[LogEntry]:
        """The entry; None for a line that is torn."""
        try:
            entry = json.loads(line)
            return LogEntry(STDERR if entry["stream"] == "stderr" else STDOUT, parse_timestamp(entry["time"]),
                            entry["log"].encode("utf-8", "surrogatepass"), entry.get("attrs") or {})
        except (ValueError, KeyError, TypeError, AttributeError, DockerError):
            return None

    @staticmethod
    def split(data: bytes) -> tuple[list[bytes], bytes]:
        """The raw entries that `data` begins with, and the rest."""
        *lines, rest = data.split(b"\n")
        return lines, rest

    @staticmethod
    def cut(data: bytes, size: int) -> int:
        """How many bytes the first entries have that make up `size` bytes or more."""
        return data.index(b"\n", size - 1) + 1

    @staticmethod
    def before(fd: int, end: int) -> int:
        """Where the entry begins that ends at `end`."""
        size = 1 << 12
        while True:
            start = max(0, end - size)
            newline = os.pread(fd, end - 1 - start, start).rfind(b"\n")
            if newline >= 0 or not start:
                return start + newline + 1
            size *= 4


def _varint(number: int) -> bytes:
    """A protobuf varint."""
    return bytes((number & 127 | 128,)) + _varint(number >> 7) if number > 127 else bytes((number,))


def _protobuf(data: bytes) -> dict[int, Any]:
    """The fields of a protobuf message of varints and bytes: {number: value}; ValueError or IndexError for
    another."""
    fields: dict[int, Any] = {}
    stream = io.BytesIO(data)

    def varint() -> int:
        number = shift = 0
        while (byte := stream.read(1)[0]) > 127:
            number |= (byte & 127) << shift
            shift += 7
        return number | byte << shift

    while stream.tell() < len(data):
        key, value = varint(), varint()
        if key & 7 not in (0, 2):
            raise ValueError("neither varint nor bytes")
        fields[key >> 3] = stream.read(value) if key & 7 else value
    return fields


class LocalEntries:
    """The format of local: moby's LogEntry messages (entry.proto), each between two copies of its length."""

    def __init__(self, attributes: dict[str, str]) -> None:
        """It keeps no attributes."""

    @staticmethod
    def encode(record: LogRecord) -> bytes:
        """The record's entries."""
        name, tail = STREAM_NAMES[record.stream].encode(), b""
        head = b"\x0a" + _varint(len(name)) + name + b"\x10" + _varint(record.when)
        if record.partial:
            identity, ordinal, last = record.partial
            tail = b"\x08\x01" if last else b""
            tail += b"\x12\x40" + identity.encode() + b"\x18" + _varint(ordinal)
            tail = b"\x20\x01\x2a" + _varint(len(tail)) + tail
        out = bytearray()
        for line in record.lines():
            text = b"\x1a" + _varint(len(line)) + line if line else b""
            length = (len(head) + len(text) + len(tail)).to_bytes(4, "big")
            out += b"".join((length, head, text, tail, length))
        return bytes(out)

    @staticmethod
    def decode(message: bytes) -> Optional[LogEntry]:
        """The entry; None for a message that is none."""
        try:
            fields = _protobuf(message)
            unfinished = fields.get(4) and not _protobuf(fields.get(5, b"")).get(1)
            return LogEntry(STDERR if fields.get(1) == b"stderr" else STDOUT, fields.get(2, 0),
                            fields.get(3, b"") + (b"" if unfinished else b"\n"), {})
        except (ValueError, IndexError, TypeError):
            return None

    @staticmethod
    def split(data: bytes) -> tuple[list[bytes], bytes]:
        """The raw entries that `data` begins with, and the rest."""
        entries, position = [], 0
        while position + 8 <= len(data):
            end = position + 8 + int.from_bytes(data[position:position + 4], "big")
            if end > len(data):
                break
            entries.append(data[position + 4:end - 4])
            position = end
        return entries, data[position:]

    @staticmethod
    def cut(data: bytes, size: int) -> int:
        """How many bytes the first entries have that make up `size` bytes or more."""
        position = 0
        while position < size:
            position += 8 + int.from_bytes(data[position:position + 4], "big")
        return position

    @staticmethod
    def before(fd: int, end: int) -> int:
        """Where the entry begins that ends at `end`."""
        return max(0, end - 8 - int.from_bytes(os.pread(fd, 4, max(0, end - 4)), "big"))


# Log files


class Rotation(NamedTuple):
    """When a log goes on in a new file: at `size` bytes (-1: never); how many files there may be."""

    size: int
    files: int
    compress: bool


def parse_count(text: str) -> int:
    """A decimal integer (Go: strconv.Atoi); BadParameter for all else."""
    if not re.fullmatch(r"[+-]?[0-9]{1,18}", text, re.ASCII):
        raise BadParameter(f'strconv.Atoi: parsing "{text}": invalid syntax')
    return int(text)


def json_file_rotation(options: dict[str, str]) -> Rotation:
    """json-file's options; without max-size a log is bounded all the same, as Docker's is not."""
    size = -1 if options.get("max-size") == "-1" else parse_size(options.get("max-size", "100m"), 1000)
    if not size:
        raise DockerError("max-size must be a positive number")
    files = parse_count(options.get("max-file", "1" if "max-size" in options else "2"))
    if files < 1:
        raise DockerError("max-file cannot be less than 1")
    compress = parse_bool(options.get("compress", "false"))
    if compress and (files < 2 or size < 0 or "max-size" not in options):
        raise DockerError("compress cannot be true when max-file is less than 2 or max-size is not set")
    return Rotation(size, files, compress)


# local's options: (name, parser, default, what is wrong with a text)
_LOCAL_OPTIONS: tuple[tuple[str, Callable[[str], Any], str, str], ...] = (
    ("max-size", parse_size, "20m", "invalid value for max-size: {}: {}"),
    ("max-file", parse_count, "5", "invalid value for max-file: {}: {}"),
    ("compress", parse_bool, "true", "error reading compress log option: {1}"))


def local_rotation(options: dict[str, str]) -> Rotation:
    """local's options."""
    values = []
    for name, parse, default, fault in _LOCAL_OPTIONS:
        try:
            values.append(parse(options.get(name, default)))
        except BadParameter as error:
            raise DockerError(fault.format(options[name], error)) from None
    size, files, compress = values
    if files < 0:
        raise DockerError("max file count cannot be less than 0")
    if compress and files <= 1:
        raise DockerError("compression cannot be enabled when max file count is 1")
    return Rotation(size or -1, max(files, 1), compress)


class FileLog:
    """A log in files: `path` and the rotated ones, PATH.1 (the newest) to PATH.N, or PATH.1.gz.

    write() is the pump's, read() any thread's.  A disk that is full loses entries, says so once in the
    daemon's log, and stops no container."""

    full = False

    def __init__(self, path: str, form: Any, rotation: Callable[[dict[str, str]], Rotation]) -> None:
        self.path, self.form, self._parse = path, form, rotation
        self.file: Optional[FileLog] = self
        self.closed = True
        self.condition = threading.Condition()
        self.followers: weakref.WeakSet[LogReader] = weakref.WeakSet()
        self._fd = -1
        self._size = self._last = 0
        self._failing = False
        self._compressor: Optional[threading.Thread] = None

    def open(self, info: LogInfo, connect: bool = True) -> None:
        """Begin to write; DockerError for options that are wrong, or when the file cannot be made."""
        self._rotation = self._parse(info.options)
        attributes = info.attributes()
        if info.options.get("tag"):
            attributes["tag"] = info.tag()
        with self.condition:
            self._form = self.form(attributes)
            try:
                os.makedirs(os.path.dirname(self.path), 0o700, exist_ok=True)
                self._open_file()
            except OSError as error:
                raise DockerError(f"open {self.path}: {(error.strerror or '').lower()}") from None
            self.closed = False

    def _open_file(self) -> None:
        """Go on in `path`; an entry that a power cut tore goes."""
        self._fd = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o640)
        self._size = os.fstat(self._fd).st_size
        start = self.form.before(self._fd, self._size) if self._size else 0
        entries, rest = self.form.split(os.pread(self._fd, self._size - start, start))
        if self._size and (len(entries) != 1 or rest):
            with open(self.path, "rb") as file:
                rest = b""
                for block in iter(lambda: file.read(1 << 16), b""):
                    rest = self.form.split(rest + block)[1]
            self._size -= len(rest)
            os.ftruncate(self._fd, self._size)

    def position(self) -> str:
        """Where the log ends."""
        return f"{os.fstat(self._fd).st_ino}:{self._size}" if self._fd >= 0 else ""

    def write(self, record: LogRecord) -> None:
        """Append the record's entries."""
        if self._fd < 0:
            return
        data = self._form.encode(record)
        with self.condition:
            while data and self._fd >= 0:
                room = self._rotation.size - self._size
                if self._rotation.size > 0 and room <= 0 and self._rotate():
                    continue
                cut = self.form.cut(data, room) if 0 < room < len(data) else len(data)
                self._append(data[:cut])
                self._last, data = record.when, data[cut:]
            self.condition.notify_all()

    def _append(self, data: bytes) -> None:
        try:
            write_all(self._fd, data)
            self._size += len(data)
            self._failing = False
        except OSError as error:
            with contextlib.suppress(OSError):
                os.ftruncate(self._fd, self._size)
            if not self._failing:
                log.error("cannot write the log %s: %s", self.path, error.strerror)
            self._failing = True

    def _rotate(self) -> bool:
        """Go on in a new file; False when that must wait for a compression, or is not possible."""
        if self._compressor and self._compressor.is_alive():
            return False
        try:
            for number, path in self.files():
                if number + 1 >= self._rotation.files:  # readers that are not through have it open
                    os.unlink(path)
                else:
                    os.rename(path, f"{self.path}.{number + 1}{'.gz' if path.endswith('.gz') else ''}")
            old_fd = self._fd
            self._open_file()
            os.close(old_fd)
            for reader in self.followers:
                reader.add(open(self.path, "rb"))
        except OSError as error:
            log.error("cannot rotate the log %s: %s", self.path, error.strerror)
            return False
        if self._rotation.compress:
            self._compressor = threading.Thread(target=self._compress, args=(self._last,), daemon=True)
            self._compressor.start()
            if self._rotation.size <= 1 << 20:
                self._compressor.join()
        return True

    def _compress(self, last: int) -> None:
        """PATH.1 as PATH.1.gz; moby keeps the time of the last entry in the header (RFC 1952, FEXTRA)."""
        extra = docker_json({"lastTime": rfc3339nano(last)})
        deflate, checksum, size = zlib.compressobj(wbits=-15), 0, 0
        temporary = self.path + ".gz.tmp"
        try:
            with open(self.path + ".1", "rb") as source, open(temporary, "wb") as target:
                os.fchmod(target.fileno(), 0o640)
                target.write(b"\x1f\x8b\x08\x04\0\0\0\0\0\xff" + struct.pack("<H", len(extra)) + extra)
                for block in iter(lambda: source.read(1 << 18), b""):
                    checksum, size = zlib.crc32(block, checksum), size + len(block)
                    target.write(deflate.compress(block))
                target.write(deflate.flush() + struct.pack("<II", checksum, size & 0xFFFFFFFF))
            os.rename(temporary, self.path + ".1.gz")
            os.unlink(self.path + ".1")
        except OSError as error:  # the file is gone with its container, or stays as it is
            log.debug("cannot compress %s.1: %s", self.path, error.strerror)
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def close(self) -> None:
        """No more is written; readers that follow come to their end."""
        with self.condition:
            fd, self._fd, self.closed = self._fd, -1, True
            if fd >= 0:
                os.close(fd)
            self.condition.notify_all()

    def wake(self) -> None:
        """Let readers that wait look whether they have been cancelled."""
        with self.condition:
            self.condition.notify_all()

    def files(self) -> list[tuple[int, str]]:
        """(number, path) of the files that there are, the oldest first; the one that is written is 0."""
        directory, base = os.path.split(self.path)
        found: dict[int, str] = {}
        for name in sorted(os.listdir(directory), reverse=True) if os.path.isdir(directory) else ():
            match = re.fullmatch(re.escape(base) + r"(?:\.([0-9]+)(?:\.gz)?)?", name)
            if match:  # where a crash left both, the uncompressed one is whole
                found[int(match[1] or 0)] = os.path.join(directory, name)
        return sorted(found.items(), reverse=True)

    def read(self, tail: int = -1, since: int = 0, until: int = 0, follow: bool = False,
             cancelled: Optional[threading.Event] = None) -> Iterator[LogEntry]:
        """What the log has at this call: the last `tail` entries or all (-1), between two times (ns, 0: any);
        with `follow` also what comes, until the log is closed or `cancelled` is set."""
        return LogReader(self, follow, cancelled or threading.Event()).entries(tail, since, until)


class LogReader:
    """One reading of a FileLog.  It holds the files open, so that no rotation takes away what it has not
    read; of one that falls too far behind, the oldest go."""

    def __init__(self, source: FileLog, follow: bool, cancelled: threading.Event) -> None:
        self.source, self.cancelled = source, cancelled
        self.files: collections.deque[Any] = collections.deque()
        with source.condition:
            self.follow = follow and not source.closed
            for _, path in source.files():
                with contextlib.suppress(FileNotFoundError):
                    self.files.append(open(path, "rb"))
            self._end = os.fstat(self.files[-1].fileno()).st_size if self.files else 0
            if self.follow:
                source.followers.add(self)

    def add(self, file: BinaryIO) -> None:
        """The log goes on in `file`; the log's lock is held."""
        self.files.append(file)
        if len(self.files) > FOLLOWED_FILES:
            self.files[1].close()
            del self.files[1]

    def entries(self, tail: int, since: int, until: int) -> Iterator[LogEntry]:
        """See FileLog.read."""
        try:
            if tail >= 0:
                self._skip(tail)
            while self.files:
                self._unpack(0)
                for raw in self._raw(self.files[0]):
                    entry = self.source.form.decode(raw)
                    if entry and until and entry.when > until:
                        return
                    if entry and entry.when >= since:
                        yield entry
                with self.source.condition:
                    self.files.popleft().close()
        finally:
            with self.source.condition:
                self.source.followers.discard(self)
                while self.files:
                    self.files.pop().close()

    def _skip(self, count: int) -> None:
        """Go to where the last `count` entries begin."""
        last = len(self.files) - 1
        for index in range(last, -1, -1):
            fd = self._unpack(index)
            end = self._end if index == last else os.fstat(fd).st_size
            while end > 0 and count:
                end = self.source.form.before(fd, end)
                count -= 1
            self.files[index].seek(end)
            if not count:
                with self.source.condition:
                    for _ in range(index):
                        self.files.popleft().close()
                return

    def _unpack(self, index: int) -> int:
        """The descriptor of the file of that index; a compressed one is replaced by its content first."""
        file = self.files[index]
        if os.pread(file.fileno(), 2, 0) == b"\x1f\x8b":
            import gzip
            import shutil
            import tempfile
            plain = self.files[index] = tempfile.TemporaryFile(dir=os.path.dirname(self.source.path))
            with file, contextlib.suppress(EOFError, zlib.error, OSError):  # one that is damaged ends early
                shutil.copyfileobj(gzip.GzipFile(fileobj=file), plain, 1 << 18)
            plain.seek(0)
        return self.files[index].fileno()

    def _raw(self, file: BinaryIO) -> Iterator[bytes]:
        rest = b""
        while not self.cancelled.is_set():
            with self.source.condition:
                last, closed = len(self.files) == 1, self.source.closed or not self.follow
            limit = self._end - file.tell() if last and not self.follow else 1 << 16
            data = file.read(max(0, min(1 << 16, limit)))
            if data:
                entries, rest = self.source.form.split(rest + data)
                yield from entries
            elif not last or closed:
                return
            else:
                with self.source.condition:
                    self.source.condition.wait_for(
                        lambda: self.source.closed or self.cancelled.is_set() or len(self.files) > 1
                        or os.fstat(file.fileno()).st_size > file.tell())


# Log servers


_TRANSPORT = re.compile(r"(tcp|tcp\+tls|udp|unix|unixgram)://(.*)", re.S)


def host_and_port(address: str, default: Optional[int] = None) -> tuple[str, int]:
    """'host:port', '[::1]:port' or (with a default) 'host'; BadParameter for a port that is no number."""
    match = re.fullmatch(r"(\[[^\]]*\]|[^:]*)(?::(.*))?", address)
    if not match or (not match[2] and default is None):
        raise BadParameter(f"address {address}: missing port in address")
    return match[1].strip("[]"), parse_count(match[2]) if match[2] else default or 0


def dial(protocol: str, address: Any) -> socket.socket:
    """A socket connected to a path or to (host, port); DockerError, in Go's words, after at most 10 s."""
    unix, datagram = protocol.startswith("unix"), protocol in ("udp", "unixgram")
    kind = socket.SOCK_DGRAM if datagram else socket.SOCK_STREAM
    if not address:
        raise DockerError(f"dial {protocol}: missing address")
    try:
        family, target = socket.AF_UNIX, address
        if not unix:
            family, _, _, _, target = socket.getaddrinfo(address[0] or "127.0.0.1", address[1], type=kind)[0]
        with contextlib.ExitStack() as undo:
            connection = undo.enter_context(socket.socket(family, kind))
            connection.settimeout(10)
            connection.connect(target)
            undo.pop_all()
            return connection
    except socket.gaierror:
        raise DockerError(f"dial {protocol}: lookup {address[0]}: no such host") from None
    except OSError as error:
        timeout, shown = isinstance(error, socket.timeout), address if unix else ":".join(map(str, address))
        reason = "i/o timeout" if timeout else f"connect: {(error.strerror or '').lower()}"
        raise DockerError(f"dial {protocol} {shown}: {reason}") from None


class LogServer:
    """The protocol of one kind of log server: made of its options, of which LOG_OPTIONS has the names;
    BadParameter for a value that cannot be."""

    unknown = "unknown log opt '{}' for {} log driver"
    retry_wait, retries, limit, asynchronous = 0.1, 1 << 31, SENDER_LIMIT, False
    empty_lines = True               # whether it is told of lines that are empty
    socket: Any = None

    def __init__(self, options: dict[str, str]) -> None:
        self.options = options

    def begin(self, info: LogInfo) -> None:
        """Serve the container of `info`; DockerError for a tag or pattern that is wrong."""
        self.info, self.tag, self.attributes = info, info.tag(), info.attributes(self.attribute)

    def attribute(self, name: str) -> str:
        """What a label's or variable's name becomes."""
        return name

    def dial(self) -> Any:
        """A connected socket; DockerError in Docker's words."""
        raise NotImplementedError

    def message(self, record: LogRecord, line: bytes) -> bytes:
        """The bytes that tell of one line."""
        raise NotImplementedError

    def connect(self) -> None:
        """Make the connection; DockerError in Docker's words."""
        self.socket = self.dial()
        self.socket.settimeout(30)

    def send(self, message: bytes) -> None:
        """Send what message() made; OSError."""
        self.socket.sendall(message)

    def close(self) -> None:
        """Give the connection up."""
        if self.socket is not None:
            self.socket.close()
            self.socket = None

    def finish(self) -> None:
        """End the connection behind what was sent: to close it with something unread would be a reset."""
        with contextlib.suppress(OSError):
            if self.socket is not None and self.socket.type == socket.SOCK_STREAM:
                self.socket.settimeout(2)
                self.socket.shutdown(socket.SHUT_WR)
                while self.socket.recv(4096):
                    pass
        self.close()


_FACILITIES = ("kern user mail daemon auth syslog lpr news uucp cron authpriv ftp 12 13 14 15 local0 local1 "
               "local2 local3 local4 local5 local6 local7").split()


class Syslog(LogServer):
    """Syslog, local or remote: RFC 3164, RFC 5424, with TLS framed after RFC 5425."""

    empty_lines = False

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        address, facility = options.get("syslog-address"), options.get("syslog-facility") or "daemon"
        match = _TRANSPORT.fullmatch(address or "")
        if address and not match:
            raise BadParameter(f"syslog-address should be in form proto://address, got {address}")
        self.protocol, place = match.groups() if match else ("", "")
        if self.protocol.startswith("unix") and not os.path.exists(place):
            raise BadParameter(f"stat {place}: no such file or directory")
        self.target: Any = place if self.protocol.startswith("unix") else host_and_port(place, 514)
        number = _FACILITIES.index(facility) if facility in _FACILITIES else facility
        if not str(number).isdecimal() or int(number) > 23:
            raise BadParameter("invalid syslog facility")
        self.priorities = {STDOUT: int(number) * 8 + 6, STDERR: int(number) * 8 + 3}
        self.format = options.get("syslog-format", "")
        if self.format not in ("", "rfc3164", "rfc5424", "rfc5424micro"):
            raise BadParameter("Invalid syslog format")
        self.framed = self.protocol == "tcp+tls" and self.format.startswith("rfc5424")

    def dial(self) -> Any:
        """A connected socket; DockerError in Docker's words."""
        if not self.protocol:
            for place in itertools.product(("unixgram", "unix"),
                                           ("/dev/log", "/var/run/syslog", "/var/run/log")):
                with contextlib.suppress(DockerError):
                    return dial(*place)
            raise DockerError("Unix syslog delivery error")
        if self.protocol != "tcp+tls":
            return dial(self.protocol, self.target)
        context, connection = self._tls(), dial("tcp", self.target)
        try:
            return context.wrap_socket(connection, server_hostname=self.target[0])
        except OSError as error:
            connection.close()
            raise DockerError(f"tls: {error}") from None

    def _tls(self) -> Any:
        import ssl
        authority, certificate, key = (
            self.options.get(f"syslog-tls-{name}") or None for name in ("ca-cert", "cert", "key"))
        try:
            context = ssl.create_default_context(cafile=authority)
        except OSError as error:
            raise DockerError(f'could not read CA certificate "{authority}": open {authority}: '
                              f"{(error.strerror or str(error)).lower()}") from None
        if "syslog-tls-skip-verify" in self.options:
            context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        try:
            if certificate:
                context.load_cert_chain(certificate, key)
        except OSError as error:
            raise DockerError(
                f"Could not load X509 key pair: {error}. Make sure the key is not encrypted") from None
        return context

    def message(self, record: LogRecord, line: bytes) -> bytes:
        """The bytes that tell of one line."""
        host, tag, pid = socket.gethostname(), self.tag, os.getpid()
        moment = time.localtime(record.when // 10 ** 9)
        if self.format.startswith("rfc5424"):
            digits = f".{record.when // 1000 % 10 ** 6:06d}" if self.format.endswith("micro") else ""
            stamp = time.strftime(f"%Y-%m-%dT%H:%M:%S{digits}%z", moment)
            stamp = f"{stamp[:-2]}:{stamp[-2:]}".replace("+00:00", "Z")
            head = f"1 {stamp} {host} {tag} {pid} {tag} - "
        else:
            head = f"{time.asctime(moment)[4:19]} {host + ' ' if self.format else ''}{tag}[{pid}]: "
        text = f"<{self.priorities[record.stream]}>{head}".encode() + line + b"\n"
        return b"%d %b" % (len(text), text) if self.framed else text


_GELF_VALUES = {"gelf-compression-level": ("-1", *"0123456789"),
                "gelf-compression-type": ("gzip", "zlib", "none")}


class Gelf(LogServer):
    """GELF 1.1 in UDP datagrams, compressed and in chunks, or over TCP."""

    unknown = 'unknown log opt "{}" for {} log driver'
    empty_lines = False
    CHUNK = 1420                     # bytes of a datagram

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        address = options.get("gelf-address")
        match = _TRANSPORT.fullmatch(address or "")
        if not match:
            raise BadParameter(f"gelf-address should be in form proto://address, got {address}" if address
                               else "gelf-address is a required parameter")
        self.protocol, self.address = match.groups()
        if self.protocol not in ("udp", "tcp"):
            raise BadParameter("gelf: endpoint needs to be TCP or UDP")
        if not re.search(r":[^:]*$", self.address):
            raise BadParameter("gelf: please provide gelf-address as proto://host:port")
        self.target = host_and_port(self.address)
        for name, value in sorted(options.items()):
            if name.startswith("gelf-compression") and self.protocol != "udp":
                raise BadParameter("compression is only supported on UDP")
            if value not in _GELF_VALUES.get(name, (value,)):
                raise BadParameter(f'unknown value "{value}" for log opt "{name}" for gelf log driver')
            if name.startswith("gelf-tcp") and self.protocol != "tcp":
                raise BadParameter(f'"{name}" is only valid for TCP')
            if name.startswith("gelf-tcp") and not value.isdecimal():
                raise BadParameter(f'"{name}" must be a positive integer')

    def begin(self, info: LogInfo) -> None:
        """Serve the container of `info`; DockerError for a tag or pattern that is wrong."""
        super().begin(info)
        extra = {"_command": info.command, "_container_id": info.id, "_container_name": info.name[1:],
                 "_created": info.created, "_image_id": info.image_id, "_image_name": info.image,
                 "_tag": self.tag}
        self.extra = dict(sorted({**extra, **self.attributes}.items()))

    def attribute(self, name: str) -> str:
        """What a label's or variable's name becomes."""
        return name if name.startswith("_") else "_" + name

    def dial(self) -> Any:
        """A connected socket; DockerError in Docker's words."""
        try:
            return dial(self.protocol, self.target)
        except DockerError as error:
            raise DockerError(f"gelf: cannot connect to GELF endpoint: {self.address} {error}") from None

    def message(self, record: LogRecord, line: bytes) -> bytes:
        """The bytes that tell of one line."""
        data = docker_json({"version": "1.1", "host": socket.gethostname(),
                            "short_message": line.decode("utf-8", "surrogateescape"),
                            "timestamp": record.when // 10 ** 6 / 1000,
                            "level": 3 if record.stream == STDERR else 6, **self.extra})
        compression = self.options.get("gelf-compression-type", "gzip")
        if self.protocol == "tcp" or compression == "none":
            return data + b"\0" if self.protocol == "tcp" else data
        level = int(self.options.get("gelf-compression-level", 1))
        deflate = zlib.compressobj(level, wbits=31 if compression == "gzip" else 15)
        return deflate.compress(data) + deflate.flush()

    def send(self, message: bytes) -> None:
        """Send what message() made; OSError."""
        size = self.CHUNK - 12
        parts = [message[begin:begin + size] for begin in range(0, len(message), size)]
        if self.protocol == "tcp" or len(message) <= self.CHUNK:
            self.socket.sendall(message)
        elif len(parts) > 128:
            raise OSError(errno.EMSGSIZE, os.strerror(errno.EMSGSIZE))
        else:
            identity = b"\x1e\x0f" + secrets.token_bytes(8)
            for number, part in enumerate(parts):
                self.socket.send(identity + bytes((number, len(parts))) + part)


def _msgpack(value: Any) -> bytes:
    """A str, bytes (as a string), an int below 2^63, or a dict of these, in MessagePack."""
    if isinstance(value, int):
        return b"\xd2" + struct.pack(">i", value) if value < 1 << 31 else b"\xd3" + struct.pack(">q", value)
    if isinstance(value, dict):
        data = b"".join(_msgpack(part) for pair in value.items() for part in pair)
        count, short, limit, long = len(value), 0x80, 16, 0xDF
    else:
        data = value if isinstance(value, bytes) else value.encode("utf-8", "replace")
        count, short, limit, long = len(data), 0xA0, 32, 0xDB
    return (bytes((short | count,)) if count < limit else struct.pack(">BI", long, count)) + data


_FLUENTD_OPTIONS: tuple[tuple[str, Callable[[str], Any], Any], ...] = (  # (name, parser, default)
    ("buffer-limit", parse_size, SENDER_LIMIT), ("retry-wait", parse_duration, 1.0),
    ("async", parse_bool, False), ("async-connect", parse_bool, False), ("request-ack", parse_bool, False),
    ("sub-second-precision", parse_bool, False))


class Fluentd(LogServer):
    """Fluentd's forward protocol, message mode."""

    def __init__(self, options: dict[str, str]) -> None:
        super().__init__(options)
        given = {name[8:]: value for name, value in options.items() if name[:8] == "fluentd-" and value}
        address = given.get("address", "")
        match = _TRANSPORT.fullmatch(address)
        protocol, place = match.groups() if match else ("tcp", address)
        try:
            self.target: Any = protocol, place
            if not protocol.startswith("unix"):
                host, port = host_and_port(place, 24224)
                self.target = protocol, (host or "127.0.0.1", port)
        except BadParameter as error:
            raise BadParameter(f"invalid fluentd-address {address}: {error}") from None
        self.limit, self.retry_wait, asynchronous, later, self.acknowledged, self.precise = (
            parse(given[name]) if name in given else default for name, parse, default in _FLUENTD_OPTIONS)
        self.asynchronous = asynchronous or later
        retries = given.get("max-retries", str(self.retries))
        if not retries.isdecimal():
            raise BadParameter(f'strconv.ParseUint: parsing "{retries}": invalid syntax')
        self.retries = int(retries)
        if "async" in given and "async-connect" in given:
            raise BadParameter("conflicting options: cannot specify both 'fluentd-async' and "
                               "'fluentd-async-connect")

    def dial(self) -> Any:
        """A connected socket; DockerError in Docker's words."""
        return dial(*self.target)

    def message(self, record: LogRecord, line: bytes) -> bytes:
        """The bytes that tell of one line."""
        fields: dict[str, Any] = {"container_id": self.info.id, "container_name": self.info.name,
                                  "source": STREAM_NAMES[record.stream], "log": line, **self.attributes}
        if record.partial:
            identity, ordinal, last = record.partial
            fields.update(partial_message="true", partial_id=identity, partial_ordinal=str(ordinal),
                          partial_last=str(last).lower())
        seconds, fraction = divmod(record.when, 10 ** 9)
        when = b"\xd7\0" + struct.pack(">II", seconds, fraction) if self.precise else _msgpack(seconds)
        option = {"chunk": base64.b64encode(secrets.token_bytes(16)).decode()} if self.acknowledged else {}
        return b"\x94" + _msgpack(self.tag) + when + _msgpack(fields) + _msgpack(option)

    def send(self, message: bytes) -> None:
        """Send what message() made, and wait for its acknowledgement where that is asked for; OSError."""
        self.socket.sendall(message)
        answer = b""
        while self.acknowledged and message[-24:] not in answer:
            data = self.socket.recv(4096)
            if not data:
                raise ConnectionResetError
            answer += data


class Journald(LogServer):
    """systemd's journal by its native protocol; what is too long for a datagram goes as a sealed memfd."""

    def begin(self, info: LogInfo) -> None:
        """Serve the container of `info`; DockerError for a tag or pattern that is wrong."""
        super().begin(info)
        fields = {"CONTAINER_ID": info.id[:12], "CONTAINER_ID_FULL": info.id, "CONTAINER_NAME": info.name[1:],
                  "CONTAINER_TAG": self.tag, "IMAGE_NAME": info.image, "SYSLOG_IDENTIFIER": self.tag}
        self.fields = self._encode({**fields, **self.attributes})

    def attribute(self, name: str) -> str:
        """What a label's or variable's name becomes: upper case, digits and '_', which is not the first."""
        return re.sub(r"[^A-Z0-9]", "_", re.sub(r"[a-z]", lambda match: match[0].upper(), name)).lstrip("_")

    @staticmethod
    def _encode(fields: dict[str, Any]) -> bytes:
        data = b""
        for name, value in fields.items():
            value = value if isinstance(value, bytes) else str(value).encode("utf-8", "surrogateescape")
            long = b"\n" + struct.pack("<Q", len(value)) if b"\n" in value else b"="
            data += name.encode() + long + value + b"\n"
        return data

    def dial(self) -> Any:
        """A connected socket; DockerError in Docker's words."""
        try:
            return dial("unixgram", "/run/systemd/journal/socket")
        except DockerError:
            raise DockerError("journald is not enabled on this host") from None

    def message(self, record: LogRecord, line: bytes) -> bytes:
        """The bytes that tell of one line."""
        fields: dict[str, Any] = {"MESSAGE": line, "PRIORITY": 3 if record.stream == STDERR else 6}
        if record.partial:
            identity, ordinal, last = record.partial
            fields.update(CONTAINER_PARTIAL_ID=identity, CONTAINER_PARTIAL_ORDINAL=ordinal,
                          CONTAINER_PARTIAL_LAST=str(last).lower())
            fields.update({} if last else {"CONTAINER_PARTIAL_MESSAGE": "true"})
        return self._encode(fields) + self.fields

    def send(self, message: bytes) -> None:
        """Send what message() made; OSError."""
        try:
            self.socket.send(message)
        except OSError as error:
            if error.errno not in (errno.EMSGSIZE, errno.ENOBUFS):
                raise
            with open(os.memfd_create("journal", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING), "wb", 0) as file:
                write_all(file.fileno(), message)
                fcntl.fcntl(file, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK
                            | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE)
                fds = struct.pack("i", file.fileno())
                self.socket.sendmsg([b""], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, fds)])


class Sender:
    """A log server's queue and the thread that empties it.  A server that is slow holds up its container, if
    that blocks; one that is lost loses what exceeds `limit` bytes, and is sought until the run's end."""

    active: set[Sender] = set()

    def __init__(self, server: LogServer, blocking: bool, limit: int, drained: Callable[[], None]) -> None:
        self.server, self.blocking, self.limit, self.drained = server, blocking, limit, drained
        self._queue: collections.deque[LogRecord] = collections.deque()
        self._size = 0
        self._lost = self._closing = False
        self._condition = threading.Condition()
        self._thread = threading.Thread(target=self._run, name="log sender", daemon=True)
        self.active.add(self)
        self._thread.start()

    @property
    def full(self) -> bool:
        """Whether the container is to wait."""
        return self.blocking and not self._lost and self._size > self.limit

    def put(self, record: LogRecord) -> None:
        """Queue a record; where the queue is full and nobody waits, it is dropped."""
        with self._condition:
            room = self._size + len(record.data) <= self.limit or not self._queue
            if room or self.blocking and not self._lost:
                self._queue.append(record)
                self._size += len(record.data)
                self._condition.notify()

    def close(self) -> None:
        """Send what waits, then end; returns at once."""
        with self._condition:
            self._closing = True
            self._condition.notify()

    @classmethod
    def flush(cls, seconds: float) -> None:
        """Wait until all that are closed have sent what they had."""
        deadline = time.monotonic() + seconds
        for sender in [sender for sender in cls.active if sender._closing]:
            sender._thread.join(max(0.0, deadline - time.monotonic()))

    def _run(self) -> None:
        while True:
            with self._condition:
                self._condition.wait_for(lambda: self._queue or self._closing)
                if not self._queue:
                    break
                record = self._queue[0]
            messages = (self.server.message(record, line) for line in record.lines()
                        if line or self.server.empty_lines)
            if not all(map(self._deliver, messages)) and self._closing:
                break  # the rest would wait for the same lost server
            with self._condition:
                self._queue.popleft()
                self._size -= len(record.data)
            self.drained()
        self.server.finish()
        self.active.discard(self)

    def _deliver(self, message: bytes) -> bool:
        """Send a message, if need be over a new connection; False when it is given up."""
        delay, tries = 0.0, 0
        while True:
            try:
                if self.server.socket is None:
                    self.server.connect()
                self.server.send(message)
                self._lost = False
                return True
            except (OSError, DockerError) as error:
                if getattr(error, "errno", 0) == errno.EMSGSIZE:
                    return True
                self.server.close()
                if tries and not self._lost:
                    self._lost = True
                    log.error("the log server of container %s is lost: %s", self.server.info.id[:12], error)
                    self.drained()
            tries += 1
            with self._condition:
                if tries > self.server.retries or self._closing and tries > 2:
                    return False
                self._condition.wait_for(lambda: self._closing, delay)
            delay = min(max(delay * 1.5, self.server.retry_wait), 30)


class RemoteLog:
    """A log that goes to a server, with a copy in `path` that `logs` reads, unless that is not wanted."""

    def __init__(self, path: str, server: type[LogServer]) -> None:
        self._server = server
        self.file = FileLog(path, LocalEntries, local_rotation) if path else None
        self._sender: Optional[Sender] = None
        self.drained: Callable[[], None] = lambda: None

    def open(self, info: LogInfo, connect: bool = True) -> None:
        """Begin to send; DockerError when the server is not there, unless it may come later."""
        server, options = self._server(info.options), info.options
        server.begin(info)
        if connect and not server.asynchronous:
            server.connect()
        try:
            if self.file is not None:
                cached = {name[6:]: options[name] for name in options if name.startswith("cache-")}
                self.file.open(info._replace(options=cached))
        except BaseException:
            server.close()
            raise
        limit = parse_size(options.get("max-buffer-size") or str(server.limit))
        blocking = options.get("mode") != "non-blocking" and not server.asynchronous
        self._sender = Sender(server, blocking, limit, lambda: self.drained())

    def position(self) -> str:
        """Where the local copy ends."""
        return self.file.position() if self.file is not None else ""

    @property
    def full(self) -> bool:
        """Whether the container is to wait."""
        return self._sender is not None and self._sender.full

    def write(self, record: LogRecord) -> None:
        """Queue the record, and keep it."""
        if self._sender is not None:
            self._sender.put(record)
        if self.file is not None:
            self.file.write(record)

    def close(self) -> None:
        """No more is written."""
        sender, self._sender = self._sender, None
        for part in (sender, self.file):
            if part is not None:
                part.close()


# What --log-opt may name: with each driver but none, and beside these the driver's own
_COMMON_LOG_OPTIONS = ("mode", "max-buffer-size", "cache-compress", "cache-disabled", "cache-max-file",
                       "cache-max-size")
_LOG_OPTIONS = {
    "fluentd": ("env env-regex labels labels-regex tag fluentd-address fluentd-async fluentd-async-connect "
                "fluentd-buffer-limit fluentd-max-retries fluentd-request-ack fluentd-retry-wait "
                "fluentd-sub-second-precision"),
    "gelf": ("env env-regex labels labels-regex tag gelf-address gelf-compression-level "
             "gelf-compression-type gelf-tcp-max-reconnect gelf-tcp-reconnect-delay"),
    "journald": "env env-regex labels labels-regex tag",
    "json-file": "env env-regex labels labels-regex tag compress max-file max-size",
    "local": "compress max-file max-size",
    "none": "",
    "syslog": ("env env-regex labels labels-regex tag syslog-address syslog-facility syslog-format "
               "syslog-tls-ca-cert syslog-tls-cert syslog-tls-key syslog-tls-skip-verify"),
}
LOG_DRIVERS = tuple(_LOG_OPTIONS)


LOG_SERVERS: dict[str, type[LogServer]] = {
    "fluentd": Fluentd, "gelf": Gelf, "journald": Journald, "syslog": Syslog}


def check_log_options(kind: str, options: dict[str, str]) -> None:
    """BadParameter, in Docker's words, for a log driver that is not there or options that it cannot have.
    What json-file and local say of their own options' values comes with the start, as with Docker."""
    if kind == "none":
        return
    mode = options.get("mode", "")
    if mode not in ("", "blocking", "non-blocking"):
        raise BadParameter(f"logger: logging mode not supported: {mode}")
    if "max-buffer-size" in options:
        if mode != "non-blocking":
            raise BadParameter("logger: max-buffer-size option is only supported with 'mode=non-blocking'")
        try:
            parse_size(options["max-buffer-size"])
        except BadParameter as error:
            raise BadParameter(f"error parsing option max-buffer-size: {error}") from None
    _cache_disabled(options)
    if kind not in LOG_DRIVERS:
        raise BadParameter(f"logger: no log driver named '{kind}' is registered")
    server = LOG_SERVERS.get(kind, LogServer)
    unknown = "unknown log opt '{}' for log driver {}" if kind == "local" else server.unknown
    for name in options:
        if name not in (*_COMMON_LOG_OPTIONS, *_LOG_OPTIONS[kind].split()):
            raise BadParameter(unknown.format(name, kind))
    server(options)


def _cache_disabled(options: dict[str, str]) -> bool:
    try:
        return parse_bool(options.get("cache-disabled") or "false")
    except BadParameter:
        raise BadParameter(f"invalid value for option cache-disabled: {options['cache-disabled']}") from None


def container_log(log_config: dict[str, Any], directory: str, container_id: str) \
        -> Union[FileLog, RemoteLog, None]:
    """The log of the container whose record stands in `directory`; None for the driver none."""
    kind, options = log_config["Type"], log_config["Config"] or {}
    if kind == "local":
        return FileLog(os.path.join(directory, "local-logs/container.log"), LocalEntries, local_rotation)
    if kind in LOG_SERVERS:
        cache = "" if _cache_disabled(options) else os.path.join(directory, "container-cached.log")
        return RemoteLog(cache, LOG_SERVERS[kind])
    path = os.path.join(directory, f"{container_id}-json.log")
    return None if kind == "none" else FileLog(path, JsonLines, json_file_rotation)


# The streams of a run


class Subscriber:
    """An attached client's share of the output: chunks that wait for it, and a descriptor that tells of
    them.  For one that reads slowly they wait in an unlinked file beside the log: the log itself would not
    do, for it rotates, and json-file keeps no bytes that are not UTF-8."""

    def __init__(self, streams: Streams, wanted: set[int]) -> None:
        self.streams, self.wanted = streams, wanted
        file = streams.driver.file if streams.driver is not None else None
        self._past = file.read() if file is not None else iter(())
        self._partial = [(stream, cutter.rest) for stream, cutter in streams.cutters.items() if file]
        self.chunks: collections.deque[tuple[int, bytes]] = collections.deque()
        self.size = 0
        self.ended = False
        self._spool: Any = None
        self._read = self._written = 0
        self._message = b""
        self._timer: Optional[threading.Timer] = None
        self._reader, self._writer = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)

    def fileno(self) -> int:
        """Readable when there is something to take()."""
        return self._reader

    @property
    def waiting(self) -> bool:
        """Whether there is something to take()."""
        return bool(self.chunks or self._message) or self._spool is not None

    def past(self) -> Iterator[tuple[int, bytes]]:
        """(stream, bytes) of all that was printed before it subscribed, as far as the log has it."""
        yield from ((entry.stream, entry.text) for entry in self._past)
        yield from self._partial

    def wake(self) -> None:
        """Make fileno() readable."""
        with contextlib.suppress(OSError):
            os.write(self._writer, b"x")

    def offer(self, stream: int, data: bytes) -> bool:
        """Queue `data`; whether the container is to wait for the client.  The streams' lock is held."""
        if stream not in self.wanted or self.ended:
            return False
        waits, was_full = not self.streams.spool, self.full
        if self._spool is None and (waits or not was_full):
            self.chunks.append((stream, data))
            self.size += len(data)
        else:
            self._keep(stream, data)
        self.wake()
        if self.full and not was_full and self.streams.spool == "":
            self._timer = threading.Timer(PATIENCE, self._give_up)
            self._timer.daemon = True
            self._timer.start()
        return waits and self.full

    @property
    def full(self) -> bool:
        """Whether no more should wait for it in memory."""
        return self.size > SUBSCRIBER_LIMIT and not self.ended

    def _give_up(self) -> None:
        with self.streams.lock:
            if self.full:
                self._disconnect("the log driver none keeps nothing from which it could go on")
        self.streams.drained()

    def _disconnect(self, reason: str) -> None:
        self._message = f"docker: disconnected, as this client reads too slowly: {reason}\n".encode()
        self.ended = True
        self.wake()

    def _keep(self, stream: int, data: bytes) -> None:
        """Let `data` wait on the disk; a client for which it cannot is told so and disconnected."""
        try:
            if self._spool is None:
                import tempfile
                self._spool = tempfile.TemporaryFile(dir=self.streams.spool, buffering=0)
                self._read = self._written = 0
            if self._written > SPOOL_LIMIT:
                raise OSError(f"more than {SPOOL_LIMIT >> 30} GiB wait for it")
            write_all(self._spool.fileno(), struct.pack(">BI", stream, len(data)) + data)
            self._written += 5 + len(data)
        except OSError as error:
            self._disconnect(error.strerror or str(error))

    def take(self) -> list[tuple[int, bytes]]:
        """Chunks that wait, as (stream, bytes); they then wait no longer."""
        with contextlib.suppress(BlockingIOError):
            os.read(self._reader, 4096)
        with self.streams.lock:
            chunks = list(self.chunks)
            self.chunks.clear()
            self.size = 0
            if self._timer:
                self._timer.cancel()
            if self._spool is not None:
                chunks += self._kept()
            if self._spool is not None:
                self.wake()
            elif self._message:
                chunks.append((STDERR, self._message))
                self._message = b""
        self.streams.drained()
        return chunks

    def _kept(self) -> list[tuple[int, bytes]]:
        """The next chunks that wait on the disk; after the last one they wait in memory again."""
        chunks: list[tuple[int, bytes]] = []
        fd, end = self._spool.fileno(), self._read + SUBSCRIBER_LIMIT // 4
        while self._read < min(self._written, end):
            stream, size = struct.unpack(">BI", os.pread(fd, 5, self._read))
            chunks.append((stream, os.pread(fd, size, self._read + 5)))
            self._read += 5 + size
        if self._read >= self._written:
            self._spool.close()
            self._spool = None
        return chunks

    def close(self) -> None:
        """Unsubscribe."""
        with self.streams.lock:
            self.streams.subscribers.discard(self)
            os.close(self._reader)
            os.close(self._writer)
            self._reader = self._writer = -1
            if self._timer:
                self._timer.cancel()
            if self._spool is not None:
                self._spool.close()
        self.streams.drained()


class Streams:
    """The standard streams of one container or exec instance: its log, its attached clients, its input.

    It outlives the runs: clients may attach before a start; `connect` gives it the descriptors of a run.
    `spool` is the directory in which output waits for clients that read slowly; None where whatever prints
    it waits for them, "" where it does so for PATIENCE seconds and then disconnects them.  What a restarted
    daemon needs to go on with the log stands in `cutters`."""

    def __init__(self, pump: LogPump, driver: Union[FileLog, RemoteLog, None],
                 spool: Optional[str] = None) -> None:
        self.pump, self.driver, self.spool = pump, driver, spool
        self.lock = threading.Lock()
        self.subscribers: set[Subscriber] = set()
        self.cutters = {stream: LineCutter(stream) for stream in STREAM_NAMES}
        self.stdin = -1
        self._open: dict[int, int] = {}  # stream -> descriptor that the pump reads
        self._paused: set[int] = set()
        self._terminal = False
        self._notes = -1                 # a file in memory, see _note_partial
        self._noted = False
        self.finished = threading.Event()
        self.finished.set()
        self.on_finished: Callable[[], None] = lambda: None
        if isinstance(driver, RemoteLog):
            driver.drained = self.drained

    def connect(self, ours: dict[str, int]) -> None:
        """A run begins, or another daemon's is taken over: `ours` are our ends of its streams by the names
        under which a shim keeps them, and "notes", a file in memory that outlives this daemon."""
        self._terminal = "console" in ours
        if self._terminal:
            ours = {**ours, "stdout": ours["console"], "stdin": os.dup(ours["console"])}
        outputs = {number: ours[name] for number, name in STREAM_NAMES.items() if name in ours}
        if outputs:
            self.finished.clear()
        self.stdin, self._notes = ours.get("stdin", -1), ours.get("notes", -1)
        self._open = dict(outputs)
        if self.driver is not None:
            self._read_notes(self.driver.position())
        for stream, fd in outputs.items():
            self.pump.add(fd, functools.partial(self._feed, stream))
        with self.lock:
            for subscriber in self.subscribers:  # their input has somewhere to go now
                subscriber.wake()
        if not outputs:
            self._finish()

    def copies(self) -> dict[str, int]:
        """Duplicates of the descriptors of this run, by the names under which a shim keeps them."""
        with self.lock:
            fds = {STREAM_NAMES[stream]: fd for stream, fd in self._open.items()}
            fds.update({"stdin": self.stdin, "notes": self._notes})
            if self._terminal:
                fds = {"console": fds.get("stdout", -1), "notes": self._notes}
            return {name: os.dup(fd) for name, fd in fds.items() if fd >= 0}

    def _note_partial(self, position: str) -> None:
        """Write down what the cutters keep, and where the log then ended: a later daemon goes on with it,
        unless more was written between this note and the kill."""
        kept = [(cutter.stream, cutter.rest.decode("latin-1"), cutter.when, cutter.partial)
                for cutter in self.cutters.values() if cutter.rest or cutter.partial]
        if self._notes >= 0 and (kept or self._noted):
            data = json.dumps([position, kept]).encode()
            os.pwrite(self._notes, struct.pack("=II", zlib.crc32(data), len(data)) + data, 0)
            self._noted = bool(kept)

    def _read_notes(self, end: str) -> None:
        self.cutters = {stream: LineCutter(stream) for stream in STREAM_NAMES}
        data = os.pread(self._notes, 1 << 20, 0) if self._notes >= 0 else b""
        checksum, size = struct.unpack_from("=II", data.ljust(8, b"\0"))
        data = data[8:8 + size]
        position, kept = json.loads(data) if data and zlib.crc32(data) == checksum else ("", [])
        if position == end:
            self._noted = bool(kept)
            for stream, rest, when, partial in kept:
                cutter = self.cutters[stream]
                cutter.rest, cutter.when = rest.encode("latin-1"), when
                cutter.partial = Partial(*partial) if partial else None

    def subscribe(self, wanted: set[int]) -> Subscriber:
        """A new client that gets what the streams `wanted` print from now on."""
        with self.lock:  # nothing is written between what past() tells and what take() gives
            subscriber = Subscriber(self, wanted)
            self.subscribers.add(subscriber)
        return subscriber

    def _feed(self, stream: int, data: bytes) -> None:
        """The pump's callback: to the log first, then to the clients."""
        with self.lock:
            if self.driver is not None:
                for record in self.cutters[stream].feed(data):
                    self.driver.write(record)
                self._note_partial(self.driver.position())
            if not data:
                self._open.pop(stream, None)
            elif sum(subscriber.offer(stream, data) for subscriber in self.subscribers) or self._log_full:
                self._paused.add(self._open[stream])
                self.pump.watch(self._open[stream], False)
            last = not self._open
        if last:
            self._finish()

    @property
    def _log_full(self) -> bool:
        return self.driver is not None and self.driver.full

    def drained(self) -> None:
        """A client or the log has room again, or has gone: go on reading, unless another is full."""
        with self.lock:
            if self._paused and not self._log_full and (self.spool or not any(
                    subscriber.full for subscriber in self.subscribers)):
                for fd in self._paused:
                    self.pump.watch(fd, True)
                self._paused.clear()

    def _finish(self) -> None:
        """All output of the run has been read: end the log and the clients."""
        with self.lock:
            if self._notes >= 0:
                os.close(self._notes)
            self._notes = -1
        if self.driver is not None:
            self.driver.close()
        self.finished.set()
        self.on_finished()

    def end_subscribers(self) -> None:
        """Tell every client that the run is over."""
        with self.lock:
            for subscriber in self.subscribers:
                subscriber.ended = True
                subscriber.wake()

    def resize(self, height: int, width: int) -> None:
        """Give the terminal that they are another size in characters."""
        with self.lock, contextlib.suppress(OSError):
            if self.stdin >= 0:
                fcntl.ioctl(self.stdin, TIOCSWINSZ, struct.pack("4H", height, width, 0, 0))

    def close_stdin(self) -> None:
        """End the container's standard input."""
        with self.lock:
            if self.stdin >= 0:
                os.close(self.stdin)
                self.stdin = -1


# ------------------------------------------------------------------------------------------------------------
# Containers
#
# One class, Container: its record, its state machine, its lock, the monitor of its process, attach and logs;
# every step has its undo, and a failure runs the undos of what was done.  First what is pure: the words of
# the list, names, the configuration of a new container (tables of members and of rules), filters.  Shapes and
# texts are Docker's (API 1.51, POST /containers/create), because clients match on them.
# ------------------------------------------------------------------------------------------------------------


def human_duration(seconds: float) -> str:
    """A length of time in words (go-units: HumanDuration): "Less than a second" to "2 years"."""
    minutes, hours = int(seconds / 60), int(seconds / 3600 + 0.5)
    steps = (  # (whether this step serves, its words)
        (seconds < 1, "Less than a second"), (seconds < 2, "1 second"),
        (seconds < 60, f"{int(seconds)} seconds"), (minutes == 1, "About a minute"),
        (minutes < 60, f"{minutes} minutes"), (hours == 1, "About an hour"),
        (hours < 48, f"{hours} hours"), (hours < 24 * 14, f"{hours // 24} days"),
        (hours < 24 * 60, f"{hours // 168} weeks"), (hours < 24 * 730, f"{hours // 720} months"),
    )
    return next((words for serves, words in steps if serves), f"{int(seconds / 3600) // 24 // 365} years")


def status_text(state: dict[str, Any], now: int) -> str:
    """The STATUS of `docker ps` from `state` as inspect shows it; `now` in nanoseconds since 1970."""
    def since(key: str) -> str:
        return human_duration((now - parse_timestamp(state[key])) / 10**9)

    if state["Restarting"]:
        return f"Restarting ({state['ExitCode']}) {since('FinishedAt')} ago"
    if state["Running"]:
        health = (state.get("Health") or {}).get("Status", "none")
        suffix = {"starting": " (health: starting)", "none": "", "": ""}.get(health, f" ({health})")
        return f"Up {since('StartedAt')}" + (" (Paused)" if state["Paused"] else suffix)
    if state["Status"] == "removing":
        return "Removal In Progress"
    if state["Dead"]:
        return "Dead"
    if state["StartedAt"] == ZERO_TIME:
        return "Created"
    if state["FinishedAt"] == ZERO_TIME:
        return ""
    return f"Exited ({state['ExitCode']}) {since('FinishedAt')} ago"


# Names: what one may be, and one at random for a container that is given none

NAME_PATTERN = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.-]+")
ADJECTIVES = """
    able agile amber ample bold brave breezy bright brisk calm candid cheerful clever cosmic crisp curious
    daring deft eager earnest elated epic fair festive fluent focused frank gentle gifted glad golden
    grand happy hardy honest hopeful jolly keen kind lively lucid lucky mellow merry modest nimble noble
    patient peaceful playful polite proud quiet rapid serene sharp sincere steady sunny swift tidy upbeat
    vivid warm wise witty zealous
""".split()
SCIENTISTS = """
    abel agnesi al-biruni ampere archimedes aryabhata avicenna avogadro babbage banneker bardeen bell
    bernoulli bhabha bohr boltzmann bose boyle brahmagupta brattain burnell cannon cantor carson carver
    cauchy cavendish cerf chandrasekhar chatelet church clarke copernicus cori coulomb crick curie dalton
    darwin dijkstra dirac easley edison ehrlich einstein elion erdos euclid euler faraday fermat fermi
    feynman fibonacci fleming fourier franklin galileo galois gauss germain gibbs godel goodall hamilton
    hawking heisenberg herschel hertz hilbert hodgkin hopper hubble huygens hypatia jacobi jemison jenner
    johnson joliot joule kalam kepler khayyam khwarizmi knuth kovalevsky lagrange lamarr landau laplace
    lavoisier leavitt leibniz linnaeus lovelace maxwell mayer mcclintock meitner mendel mendeleev
    mirzakhani montalcini napier nash newton nobel noether ohm pascal pasteur pauli pauling payne planck
    poincare ptolemy pythagoras raman ramanujan riemann ritchie rubin rutherford sagan salk shannon
    somerville tesla turing volta wiles wu yalow zhang
""".split()


def random_name() -> str:
    """A name such as "brave_curie" for a container."""
    return f"{secrets.choice(ADJECTIVES)}_{secrets.choice(SCIENTISTS)}".replace("-", "")


def name_conflict(name: str, container_id: str) -> Conflict:
    """The error for a name (without its slash) that the container `container_id` has already."""
    return Conflict(f'Conflict. The container name "/{name}" is already in use by container "{container_id}".'
                    " You have to remove (or rename) that container to be able to reuse that name.")


# The members of a container's configuration: their names, Go types and order, as moby's structs have them.
# A type that ends in "?" is left out when it is empty; one that begins with "*" may be null.  API 1.51

_STRUCTS = {
    "ContainerConfigWrapper": """
        Hostname string  Domainname string  User string  AttachStdin bool  AttachStdout bool
        AttachStderr bool  ExposedPorts map[string]object?  Tty bool  OpenStdin bool  StdinOnce bool
        Env []string  Cmd strslice  Healthcheck *HealthConfig?  ArgsEscaped bool?  Image string
        Volumes map[string]object  WorkingDir string  Entrypoint strslice  NetworkDisabled bool?
        MacAddress string?  OnBuild []string  Labels map[string]string  StopSignal string?
        StopTimeout *int?  Shell strslice?""",
    "HealthConfig": """
        Test []string?  Interval int64?  Timeout int64?  StartPeriod int64?  StartInterval int64?
        Retries int?""",
    "HostConfig": """
        Binds []string  ContainerIDFile string  LogConfig LogConfig  NetworkMode string
        PortBindings map[string][]PortBinding  RestartPolicy RestartPolicy  AutoRemove bool
        VolumeDriver string  VolumesFrom []string  ConsoleSize []uint  Annotations map[string]string?
        CapAdd strslice  CapDrop strslice  CgroupnsMode string  Dns []string  DnsOptions []string
        DnsSearch []string  ExtraHosts []string  GroupAdd []string  IpcMode string  Cgroup string
        Links []string  OomScoreAdj int  PidMode string  Privileged bool  PublishAllPorts bool
        ReadonlyRootfs bool  SecurityOpt []string  StorageOpt map[string]string?  Tmpfs map[string]string?
        UTSMode string  UsernsMode string  ShmSize int64  Sysctls map[string]string?  Runtime string
        Isolation string  CpuShares int64  Memory int64  NanoCpus int64  CgroupParent string
        BlkioWeight uint16  BlkioWeightDevice []WeightDevice  BlkioDeviceReadBps []ThrottleDevice
        BlkioDeviceWriteBps []ThrottleDevice  BlkioDeviceReadIOps []ThrottleDevice
        BlkioDeviceWriteIOps []ThrottleDevice  CpuPeriod int64  CpuQuota int64  CpuRealtimePeriod int64
        CpuRealtimeRuntime int64  CpusetCpus string  CpusetMems string  Devices []DeviceMapping
        DeviceCgroupRules []string  DeviceRequests []DeviceRequest  KernelMemory int64?
        KernelMemoryTCP int64  MemoryReservation int64  MemorySwap int64  MemorySwappiness *int64
        OomKillDisable *bool  PidsLimit *int64  Ulimits []Ulimit  CpuCount int64  CpuPercent int64
        IOMaximumIOps uint64  IOMaximumBandwidth uint64  Mounts []object?  MaskedPaths []string
        ReadonlyPaths []string  Init *bool?""",
    "UpdateConfig": """
        CpuShares int64  Memory int64  NanoCpus int64  BlkioWeight uint16  CpuPeriod int64  CpuQuota int64
        CpuRealtimePeriod int64  CpuRealtimeRuntime int64  CpusetCpus string  CpusetMems string
        KernelMemory int64?  MemoryReservation int64  MemorySwap int64  MemorySwappiness *int64
        OomKillDisable *bool  PidsLimit *int64  CpuPercent int64  RestartPolicy RestartPolicy""",
    "LogConfig": "Type string  Config map[string]string",
    "PortBinding": "HostIp string  HostPort string",
    "RestartPolicy": "Name string  MaximumRetryCount int",
    "WeightDevice": "Path string  Weight uint16",
    "ThrottleDevice": "Path string  Rate uint64",
    "DeviceMapping": "PathOnHost string  PathInContainer string  CgroupPermissions string",
    "DeviceRequest": """
        Driver string  Count int  DeviceIDs []string  Capabilities [][]string  Options map[string]string""",
    "Ulimit": "Name string  Hard int64  Soft int64",
    "NetworkingConfig": "EndpointsConfig map[string]EndpointSettings",
    "EndpointSettings": """
        IPAMConfig *EndpointIPAMConfig  Links []string  Aliases []string  MacAddress string
        DriverOpts map[string]string  GwPriority int""",
    "EndpointIPAMConfig": "IPv4Address string?  IPv6Address string?  LinkLocalIPs []string?",
    "NetworkCreate": """
        Name string  Driver string  Scope string  EnableIPv4 *bool  EnableIPv6 *bool  IPAM IPAM
        Internal bool  Attachable bool  Ingress bool  ConfigOnly bool  Options map[string]string
        Labels map[string]string""",
    "IPAM": "Driver string  Options map[string]string  Config []IPAMConfig",
    "IPAMConfig": "Subnet string?  IPRange string?  Gateway string?  AuxiliaryAddresses map[string]string?",
    "NetworkConnect": "Container string  EndpointConfig EndpointSettings",
    "NetworkDisconnect": "Container string  Force bool",
    "ExecConfig": """
        User string  Privileged bool  Tty bool  ConsoleSize *[]uint  AttachStdin bool  AttachStderr bool
        AttachStdout bool  Detach bool  DetachKeys string  Env []string  WorkingDir string  Cmd []string""",
    "ExecStartCheck": "Detach bool  Tty bool  ConsoleSize *[]uint",
}
STRUCTS = {name: dict(zip(text.split()[::2], text.split()[1::2])) for name, text in _STRUCTS.items()}
_INTEGERS: dict[str, tuple[int, int]] = {
    "int": (-1 << 63, 1 << 63), "int64": (-1 << 63, 1 << 63), "uint": (0, 1 << 64), "uint16": (0, 1 << 16),
    "uint64": (0, 1 << 64)}
_SCALARS: dict[str, tuple[type, Any]] = {"string": (str, ""), "bool": (bool, False),
                                         **dict.fromkeys(_INTEGERS, (int, 0))}


def decode_struct(value: Any, name: str, path: str = "") -> dict[str, Any]:
    """`value`, of JSON, as the struct `name` of STRUCTS: every member with its zero value, and no other.

    Names match in any case, as in Go.  BadParameter, with Go's text, for a member of another type."""
    if value is not None and not isinstance(value, dict):
        raise _wrong_type(value, name, path)
    given = {key.lower(): member for key, member in (value or {}).items()}
    decoded = {}
    for key, kind in STRUCTS[name].items():
        member = _decode(given.get(key.lower()), kind.rstrip("?"), f"{path or name}.{key}")
        if member or not kind.endswith("?") or kind.startswith("*") and member is not None:
            decoded[key] = member
    return decoded


def _decode(value: Any, kind: str, path: str) -> Any:
    """`value`, of JSON, as the Go type `kind`; null is the type's zero value."""
    if kind in STRUCTS:
        return decode_struct(value, kind, path)
    if kind in _SCALARS:
        return _decode_scalar(value, kind, path)
    if value is None:
        return None
    if kind.startswith("*"):
        return _decode(value, kind[1:], path)
    if kind == "strslice":
        value, kind = [value] if isinstance(value, str) else value, "[]string"
    if kind.startswith("[]") and isinstance(value, list):
        return [_decode(item, kind[2:], path) for item in value]
    if kind.startswith("map[string]") and isinstance(value, dict):
        return {key: _decode(item, kind[11:], path) for key, item in value.items()}
    if kind == "object" and isinstance(value, dict):
        return value
    raise _wrong_type(value, kind, path)


def _decode_scalar(value: Any, kind: str, path: str) -> Any:
    python_type, zero = _SCALARS[kind]
    if value is None:
        return zero
    low, high = _INTEGERS.get(kind, (0, 0))
    if type(value) is not python_type or (isinstance(value, int) and low != high and not low <= value < high):
        raise _wrong_type(value, kind, path)
    if isinstance(value, str) and "\0" in value:
        raise BadParameter(f"invalid {path.partition('.')[2]}: it contains a NUL byte")
    return value


def _wrong_type(value: Any, kind: str, path: str) -> BadParameter:
    words = {bool: "bool", str: "string", list: "array", dict: "object", float: f"number {value}"}
    word = words.get(type(value), f"number {value}" if kind in _INTEGERS else "number")
    place = f"Go struct field {path} of type {kind}" if path else f"Go value of type runconfig.{kind}"
    return BadParameter(f"json: cannot unmarshal {word} into {place}")


# Security options


class SecurityOptions(NamedTuple):
    """A container's --security-opt; `seccomp` is None (default), "unconfined" or the profile."""

    no_new_privileges: bool = False
    seccomp: Any = None
    apparmor: str = ""
    label: tuple[str, ...] = ()
    systempaths: str = ""


_SECURITY_SHORTHANDS = {"no-new-privileges": "no-new-privileges=true", "disable": "label=disable"}


def parse_security_options(options: list[str]) -> SecurityOptions:
    """KEY=VALUE, KEY:VALUE, "no-new-privileges" and "disable" as SecurityOptions; else BadParameter."""
    found = SecurityOptions()
    for option in options:
        text = _SECURITY_SHORTHANDS.get(option, option)
        key, separator, value = text.partition("=" if "=" in text else ":")
        if not separator:
            raise BadParameter(f"invalid --security-opt 1: {go_quote(option)}")
        if key == "seccomp":
            found = found._replace(seccomp=_parse_profile(value))
        elif key == "label":
            found = found._replace(label=(*found.label, value))
        elif key == "apparmor":
            found = found._replace(apparmor=value)
        elif (key, value) == ("systempaths", "unconfined"):
            found = found._replace(systempaths=value)
        elif key == "no-new-privileges" and value.lower() in ("1", "t", "true", "0", "f", "false"):
            found = found._replace(no_new_privileges=value.lower() in ("1", "t", "true"))
        else:
            raise BadParameter(f"invalid --security-opt 2: {go_quote(option)}")
    return found


def _parse_profile(text: str) -> Any:
    """A seccomp profile's document; "unconfined" as it is and None for "builtin"."""
    if text in ("unconfined", "builtin"):
        return None if text == "builtin" else text
    try:
        profile = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadParameter(f"Decoding seccomp profile failed: {error}") from None
    if not isinstance(profile, dict):
        raise BadParameter("Decoding seccomp profile failed: it must be a JSON object")
    return profile


# The rules: what a configuration may not be, and what Docker says then

RESTART_POLICIES = ("no", "always", "on-failure", "unless-stopped")

POLICY_RULES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda c: c["RestartPolicy"]["Name"] not in RESTART_POLICIES,
     "invalid restart policy '{RestartPolicy[Name]}'"),
    (lambda c: c["RestartPolicy"]["Name"] != "on-failure" and c["RestartPolicy"]["MaximumRetryCount"],
     "maximum retry count cannot be used with restart policy '{RestartPolicy[Name]}'"),
    (lambda c: c["RestartPolicy"]["MaximumRetryCount"] < 0, "maximum retry count cannot be negative"),
)
# What an update changes, beside PidsLimit and RestartPolicy; it checks more than that
UPDATED = """BlkioWeight CpuShares NanoCpus CpuPeriod CpuQuota CpuRealtimePeriod CpuRealtimeRuntime CpusetCpus
    CpusetMems Memory MemoryReservation MemorySwap""".split()
# (what an update sets, what the container has, the text) of updates that contradict what is there
UPDATE_CONFLICTS: tuple[tuple[Callable[[dict[str, Any], dict[str, Any]], Any], str], ...] = (
    *((lambda new, old, to=to, has=has: new[to] > 0 and old[has] > 0,
       f"Conflicting options: {what} cannot be updated as {other} has already been set")
      for to, what, has, other in (("NanoCpus", "Nano CPUs", "CpuPeriod", "CPU Period"),
                                   ("NanoCpus", "Nano CPUs", "CpuQuota", "CPU Quota"),
                                   ("CpuPeriod", "CPU Period", "NanoCpus", "NanoCPUs"),
                                   ("CpuQuota", "CPU Quota", "NanoCpus", "NanoCPUs"))),
    (lambda new, old: 0 != new["Memory"] > old["MemorySwap"] and not new["MemorySwap"],
     "Memory limit should be smaller than already set memoryswap limit, update the memoryswap at the same "
     "time"),
    (lambda new, old: old["AutoRemove"] and new["RestartPolicy"]["Name"] not in ("", "no"),
     "Restart policy cannot be updated because AutoRemove is enabled for the container"),
)

# (what is wrong, the text), in the order in which Docker looks; `c` is Config and HostConfig in one.
# What the cgroups are asked for is checked where they are (CgroupManager.adapt).
RULES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda c: c["WorkingDir"] and not c["WorkingDir"].startswith("/"),
     "the working directory '{WorkingDir}' is invalid, it needs to be an absolute path"),
    (lambda c: c["UTSMode"] == "host" and c["Hostname"], "conflicting options: hostname and the UTS mode"),
    (lambda c: _shares(c) and c["Hostname"], "conflicting options: hostname and the network mode"),
    (lambda c: _shares(c) and c["Links"],
     "conflicting options: container type network can't be used with links. "
     "This would result in undefined behavior"),
    (lambda c: c["NetworkMode"] == "host" and c["Links"],
     "conflicting options: host type networking can't be used "
     "with links. This would result in undefined behavior"),
    (lambda c: _shares(c) and c["Dns"], "conflicting options: dns and the network mode"),
    (lambda c: _shares(c) and c["ExtraHosts"],
     "conflicting options: custom host-to-IP mapping and the network mode"),
    (lambda c: (_shares(c) or c["NetworkMode"] == "host") and c.get("MacAddress"),
     "conflicting options: mac-address and the network mode"),
    (lambda c: _shares(c) and (c["PortBindings"] or c["PublishAllPorts"]),
     "conflicting options: port publishing and the container type network mode"),
    (lambda c: _shares(c) and c["ExposedPorts"],
     "conflicting options: port exposing and the container type network mode"),
    (lambda c: not _is_mac(c.get("MacAddress")), "invalid MAC address: {MacAddress}"),
    (lambda c: c["StopTimeout"] is not None and c["StopTimeout"] < -1, "invalid stop timeout: {StopTimeout}"),
    (lambda c: c["AutoRemove"] and c["RestartPolicy"]["Name"] != "no",
     "can't create 'AutoRemove' container with restart policy"),
    *POLICY_RULES,
    (lambda c: c["Isolation"].lower() not in ("", "default"),
     "Invalid isolation: \"{Isolation}\" - linux only supports 'default'"),
    (lambda c: "" in (c["Annotations"] or ()),
     "invalid Annotations: the empty string is not permitted as an annotation key"),
    (lambda c: c["IOMaximumIOps"] or c["IOMaximumBandwidth"],
     "Invalid QoS settings: linux does not support Maximum IO Bandwidth or Maximum IO IOps"),
    (lambda c: not re.fullmatch("none|private|shareable|host|container:.+", c["IpcMode"], re.DOTALL),
     "invalid IPC mode: {IpcMode}"),
    (lambda c: not re.fullmatch("|host|container:.+", c["PidMode"], re.DOTALL),
     "invalid PID mode: {PidMode}"),
    (lambda c: c["UTSMode"] not in ("", "host"), "invalid UTS mode: {UTSMode}"),
    (lambda c: c["UsernsMode"] not in ("", "host"), "invalid user namespace mode: {UsernsMode}"),
    (lambda c: c["CgroupnsMode"] not in ("host", "private"), "invalid cgroup namespace mode: {CgroupnsMode}"),
    (lambda c: ".." in c["CgroupParent"].split("/"),
     "invalid cgroup parent {CgroupParent}: it leads upwards"),
    (lambda c: c["ShmSize"] < 0, "SHM size can not be less than 0"),
    (lambda c: not -1000 <= c["OomScoreAdj"] <= 1000,
     "Invalid value {OomScoreAdj}, range for oom score adj is [-1000, 1000]"),
    (lambda c: len(c["ConsoleSize"]) != 2 or max(c["ConsoleSize"]) > 65535,
     "invalid console size {ConsoleSize}"),
    (lambda c: any(request["Count"] and request["DeviceIDs"] for request in c["DeviceRequests"] or ()),
     "cannot set both Count and DeviceIDs on device request"),
    (lambda c: c["StorageOpt"],
     "--storage-opt is supported only for overlay over xfs with 'pquota' mount option"),
    (lambda c: not c["Entrypoint"] and not c["Cmd"], "No command specified"),
)


def _shares(config: dict[str, Any]) -> bool:
    return config["NetworkMode"].startswith("container:")


def _is_mac(text: Optional[str]) -> bool:
    return not text or re.fullmatch(r"[0-9a-fA-F]{2}([:-][0-9a-fA-F]{2}){5}", text) is not None


# (whether it is asked for, what has not landed): what to ignore would be wrong
UNLANDED: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda c: c["Binds"] or c["Mounts"], "mounts (-v, --mount)"),
    (lambda c: c["Tmpfs"], "--tmpfs"),
    (lambda c: c["VolumesFrom"], "--volumes-from"),
)


def container_config(body: dict[str, Any], image_config: Optional[dict[str, Any]], defaults: Any) \
        -> tuple[dict[str, Any], dict[str, Any], dict[str, Any], list[str]]:
    """(Config, HostConfig, NetworkingConfig, warnings) of a new container, complete as inspect shows them.

    `body` is that of POST /containers/create in the newest API's shape, `image_config` its image's Config,
    `defaults` the daemon's Config.  Limits are CgroupManager.adapt's to check and to adapt to the host.
    BadParameter, with Docker's text, for what cannot be; NotSupported for what this daemon cannot do."""
    config = decode_struct(body, "ContainerConfigWrapper")
    members = {key.lower(): value for key, value in body.items()}
    host = decode_struct(members.get("hostconfig"), "HostConfig", "HostConfig.HostConfig")
    networking = decode_struct(members.get("networkingconfig"), "NetworkingConfig")
    _merge_image(config, image_config or {})
    _apply_defaults(host, defaults)
    left_out = dict.fromkeys("Annotations ExposedPorts Init Mounts StopTimeout StorageOpt Tmpfs".split())
    everything = {**left_out, **config, **host, "cpus": os.cpu_count()}
    for asked, text in UNLANDED:
        if asked(everything):
            feature = text.format_map(everything)
            raise NotSupported(f"{feature} cannot be used: this version of the daemon does not have it yet")
    check_rules(RULES, everything)
    _check_config(config)
    _check_host_config(host)
    if config["WorkingDir"]:
        config["WorkingDir"] = "/" + os.path.normpath(config["WorkingDir"]).lstrip("/")
    return config, host, networking, _warnings(host)


# Those of a container in a user namespace of its own
USERNS_RULES: tuple[tuple[Callable[[dict[str, Any]], Any], str], ...] = (
    (lambda c: c["Privileged"], "privileged mode is incompatible with user namespaces.  You must run the "
     "container in the host namespace when running privileged mode"),
    (lambda c: c["NetworkMode"] == "host",
     "cannot share the host's network namespace when user namespaces are enabled"),
    (lambda c: any(c[key].startswith("container:") for key in ("PidMode", "IpcMode")),
     "cannot share another container's namespaces when user namespaces are enabled: run both in the host's"),
    (lambda c: c["PidMode"] == "host",
     "cannot share the host PID namespace when user namespaces are enabled"),
)


def oci_runtime(config: Any, name: str) -> tuple[str, ...]:
    """The command of the OCI runtime of this name, none for the native one; BadParameter for an unknown
    one."""
    if name in NATIVE_RUNTIMES:
        return ()
    if name not in config.runtimes:
        raise BadParameter(f"unknown or invalid runtime name: {name}")
    return (config.runtimes[name]["path"], *(config.runtimes[name].get("runtimeArgs") or ()))


def check_rules(rules: Iterable[tuple[Callable[..., Any], str]], members: dict[str, Any]) -> None:
    """BadParameter with the text of the first rule that `members` break."""
    for wrong, text in rules:
        if wrong(members):
            raise BadParameter(text.format_map(members))


def _merge_image(config: dict[str, Any], image: dict[str, Any]) -> None:
    """Complete `config` with its image's, as moby's merge does; a command of its own hides the image's."""
    if not config["Entrypoint"]:
        config["Cmd"] = config["Cmd"] or image.get("Cmd")
        if config["Entrypoint"] is None:
            config["Entrypoint"] = image.get("Entrypoint")
    if config["Entrypoint"] == [""]:
        config["Entrypoint"] = None
    for key in ("User", "WorkingDir", "StopSignal", "Shell"):
        config[key] = config.get(key) or image.get(key)
    names = {item.partition("=")[0] for item in config["Env"] or []}
    inherited = [item for item in image.get("Env") or [] if item.partition("=")[0] not in names]
    config["Env"] = (config["Env"] or []) + inherited
    config["Labels"] = {**(image.get("Labels") or {}), **(config["Labels"] or {})}
    for key in ("ExposedPorts", "Volumes"):
        # A volume of the image is a plain directory of the container's own layer here.
        config[key] = {**(config.get(key) or {}), **(image.get(key) or {})} or None
    health = {**(image.get("Healthcheck") or {}), **(config.get("Healthcheck") or {})}
    config["Healthcheck"] = health or None
    merged = decode_struct(config, "ContainerConfigWrapper")  # the order and the empty members again
    config.clear()
    config.update(merged)


def _apply_defaults(host: dict[str, Any], defaults: Any) -> None:
    """Fill in what the client left to the daemon."""
    host["RestartPolicy"]["Name"] = host["RestartPolicy"]["Name"] or "no"
    if host["NetworkMode"] in ("", "default"):
        host["NetworkMode"] = "bridge"
    host["IpcMode"] = host["IpcMode"] or defaults.default_ipc_mode
    if not host["CgroupnsMode"]:
        shared = host["Privileged"] and not os.path.exists("/sys/fs/cgroup/cgroup.controllers")
        host["CgroupnsMode"] = "host" if shared else defaults.default_cgroupns_mode
    host["ShmSize"] = host["ShmSize"] or defaults.default_shm_size
    host["Runtime"] = host["Runtime"] or defaults.default_runtime
    host["ConsoleSize"] = host["ConsoleSize"] or [0, 0]
    if host["MemorySwappiness"] == -1:
        host["MemorySwappiness"] = None
    host["OomKillDisable"] = bool(host["OomKillDisable"])
    host["PidsLimit"] = host["PidsLimit"] if (host["PidsLimit"] or 0) > 0 else None
    kind, options = host["LogConfig"]["Type"] or defaults.log_driver, host["LogConfig"]["Config"] or {}
    inherited = {name: value for name, value in (defaults.log_opts or {}).items()
                 if kind == defaults.log_driver or name.startswith("cache-")}
    host["LogConfig"] = {"Type": kind, "Config": {**inherited, **options}}
    unconfined = bool(parse_security_options(host["SecurityOpt"] or []).systempaths)
    for key, paths in (("MaskedPaths", MASKED_PATHS), ("ReadonlyPaths", READONLY_PATHS)):
        if host[key] is None and not host["Privileged"]:
            host[key] = [] if unconfined else list(paths)


def _check_config(config: dict[str, Any]) -> None:
    """What RULES cannot say of Config."""
    if config.get("StopSignal"):
        parse_signal(config["StopSignal"])
    for item in config["Env"] or []:
        if not item.partition("=")[0]:
            raise BadParameter(f"invalid environment variable: {item}")
    health = config.get("Healthcheck") or {}
    for key in ("Interval", "Timeout", "StartPeriod", "StartInterval"):
        if health.get(key) and health[key] < 10**6:
            raise BadParameter(f"{key} in Healthcheck cannot be less than 1ms")
    if health.get("Retries", 0) < 0:
        raise BadParameter("Retries in Healthcheck cannot be negative")


def _check_host_config(host: dict[str, Any]) -> None:
    """What RULES cannot say of HostConfig."""
    _check_ports(host["PortBindings"] or {})
    for key in ("CapAdd", "CapDrop"):
        _capability_numbers(host[key] or [], key)
    for limit in host["Ulimits"] or []:
        check_ulimit(limit)
    for entry in host["ExtraHosts"] or []:
        name, colon, address = entry.partition(":")
        if not (name and colon):
            raise BadParameter(f"bad format for add-host: {go_quote(entry)}")
        if address != "host-gateway":
            parse_ip(address or "?")
    for address in host["Dns"] or []:
        parse_ip(address or "?")
    check_log_options(host["LogConfig"]["Type"], host["LogConfig"]["Config"])
    check_sysctls(host)


def _check_ports(bindings: dict[str, Any]) -> None:
    """Ports are "80", "80/udp"; those of the host may be a range or empty.  Else BadParameter."""
    for key, places in bindings.items():
        asked = [(key, r"(\d+)"), *((place["HostPort"], r"(?:(\d+)(?:-(\d+))?)?") for place in places or [])]
        for text, pattern in asked:
            port = text.partition("/")[0]
            match = re.fullmatch(pattern, port, re.ASCII)
            groups = match.groups() if match and len(port) < 16 else ("65536",)
            numbers = [int(number) for number in groups if number]
            if numbers != sorted(numbers) or numbers[-1:] > [65535]:
                raise BadParameter(f"invalid port specification: {go_quote(port)}")


_IPC_SYSCTLS = ["kernel." + name for name in
                "msgmax msgmnb msgmni sem shmall shmmax shmmni shm_rmid_forced".split()]


def check_sysctls(host: dict[str, Any]) -> None:
    """BadParameter, with runc's text, for a sysctl of a namespace that the container has not for itself.

    Nothing else keeps a container's configuration from changing the host; also asked at every start."""
    for name in host.get("Sysctls") or {}:
        dotted = name.replace("/", ".")
        if re.fullmatch(r"[\w-]+(\.[\w:@-]+)+", dotted, re.ASCII):
            if dotted in _IPC_SYSCTLS or dotted.startswith("fs.mqueue."):
                if host["IpcMode"] != "host":
                    continue
                raise BadParameter(f"sysctl {go_quote(name)} is not allowed in the hosts ipc namespace")
            if dotted.startswith("net."):
                if host["NetworkMode"] != "host":
                    continue
                raise BadParameter(f"sysctl {go_quote(name)} not allowed in host network namespace")
            if dotted == "kernel.domainname" and host["UTSMode"] != "host":
                continue
        raise BadParameter(f"sysctl {go_quote(name)} is not in a separate kernel namespace")


def _warnings(host: dict[str, Any]) -> list[str]:
    """What the client is to know of a configuration that is otherwise good."""
    warnings = []
    if host.get("NetworkMode") == "host" and host["PortBindings"]:
        warnings.append("Published ports are discarded when using host network mode")
    if host["CpuPercent"]:
        host["CpuPercent"] = 0
        warnings.append("linux does not support CPU percent. Percent discarded.")
    return warnings


# The filters of the list of containers: {name: whether `value` holds of `container`}.  Several values of a
# filter are alternatives, but for labels.  `since` and `before` are bounds, which the daemon applies.

CONTAINER_STATES = ("created", "running", "paused", "restarting", "removing", "exited", "dead")
HEALTH_STATES = ("none", "starting", "healthy", "unhealthy")


def _found(pattern: str, text: str) -> bool:
    try:
        return pattern == text or re.search(pattern, text) is not None
    except re.error:
        return False


def _member(container: Any, *keys: str) -> dict[str, Any]:
    """A table of the container's record, down the `keys`; {} for null or none."""
    return functools.reduce(lambda table, key: table.get(key) or {}, keys, container.record)


def _health(container: Any) -> str:
    return (container.state.to_api().get("Health") or {}).get("Status") or "none"


def _exited_with(container: Any, value: str) -> bool:
    state = container.state
    return not state.running and state.started_at != ZERO_TIME and state.exit_code == int(value)


def _port_is_among(ports: Iterable[str], value: str) -> bool:
    """Whether a port such as "80/tcp" is within "80", "80/udp" or "8000-8080/tcp"."""
    numbers, _, protocol = value.partition("/")
    low, _, high = numbers.partition("-")
    split = [port.partition("/") for port in ports]
    return any(number.isdecimal() and int(low) <= int(number) <= int(high or low)
               and (kind or "tcp") == (protocol or "tcp") for number, _, kind in split)


CONTAINER_MATCHES: dict[str, Callable[[Any, str], bool]] = {
    "exited": _exited_with,
    "expose": lambda container, value: _port_is_among(container.config.get("ExposedPorts") or {}, value),
    "health": lambda container, value: _health(container) == value,
    "id": lambda container, value: _found(value, container.id),
    "is-task": lambda container, value: value.lower() in ("0", "false"),
    "isolation": lambda container, value: True,
    "name": lambda container, value: _found(value, container.name) or _found(value, "/" + container.name),
    "network": lambda container, value: any(
        value == name or value and (endpoint or {}).get("NetworkID", "").startswith(value)
        for name, endpoint in _member(container, "NetworkSettings", "Networks").items()),
    "publish": lambda container, value: _port_is_among(
        [port for port, places in _member(container, "NetworkSettings", "Ports").items() if places], value),
    "status": lambda container, value: container.state.status == value,
    "volume": lambda container, value: any(
        value in (point.get("Name"), place) for place, point in _member(container, "MountPoints").items()),
}
CONTAINER_FILTERS = frozenset(CONTAINER_MATCHES) | {"ancestor", "before", "label", "label!", "since"}

_PORT_RANGE = r"\d{1,5}(-\d{1,5})?(/\w+)?"
_FILTER_VALUES = {"expose": _PORT_RANGE, "health": "|".join(HEALTH_STATES), "is-task": "(?i:0|1|true|false)",
                  "publish": _PORT_RANGE, "status": "|".join(CONTAINER_STATES)}


def container_matches(container: Any, filters: dict[str, list[str]], images: Any) -> bool:
    """Whether `container` is among those that `filters` ask for; `images` resolves the names of ancestors."""
    labels = container.config.get("Labels") or {}
    if not matches_labels(filters.get("label", ()), labels):
        return False
    if any(matches_labels([value], labels) for value in filters.get("label!", ())):
        return False
    ancestors = filters.get("ancestor")
    if ancestors and not any(_descends(container, value, images) for value in ancestors):
        return False
    return all(any(matches(container, value) for value in filters[name])
               for name, matches in CONTAINER_MATCHES.items() if filters.get(name))


def _tries(pattern: str) -> float:
    """About how often Python, which goes back where Go's expressions do not, tries before it gives up."""
    plain = re.sub(r"\\.|\[\^?\]?[^]]*\]", "x", pattern)
    if re.search(r"\)[*+?{]", plain):
        return 1e99
    repeats, groups = len(re.findall("[*+?{]", plain)), plain.count("(")
    return 64.0 ** min(9, repeats) * (plain.count("|") + 1.0) ** min(9, groups)


def check_container_filters(filters: dict[str, list[str]]) -> dict[str, list[str]]:
    """`filters` unchanged; BadParameter for a value that its filter cannot have."""
    for name, values in filters.items():
        for value in values:
            if name in ("id", "name") and (len(value) > 1024 or _tries(value) > 64 ** 4):
                raise BadParameter(f"Invalid filter '{name}={value[:100]}': the expression is too costly")
            if name == "exited" and not re.fullmatch(r"[+-]?\d{1,9}", value, re.ASCII):
                raise BadParameter(f"strconv.Atoi: parsing {go_quote(value)}: invalid syntax")
            if name in _FILTER_VALUES and not re.fullmatch(_FILTER_VALUES[name], value, re.ASCII):
                raise BadParameter(f"Invalid filter '{name}={value}'")
    return filters


def _descends(container: Any, name: str, images: Any) -> bool:
    """Whether the container's image is the one called `name`, or made from it."""
    with contextlib.suppress(DockerError):
        wanted, image_id = images.resolve(name).id, container.image_id
        while image_id and image_id != wanted:
            image_id = images.resolve(image_id).parent
        return bool(image_id)
    return False


CONTAINER_STOP_TIMEOUT = 10     # seconds between the stop signal and SIGKILL
RESTART_DELAY = (0.1, 60.0)     # seconds until a first restart, doubled at each, and the longest
RESTART_RESET = 10              # seconds of running after which a restart is a first one again
EXEC_KEPT = 300                 # seconds after which an ended exec instance may go; it goes after twice that
STOPPED, RUNNING, PAUSED, REMOVING, DEAD = "stopped", "running", "paused", "removing", "dead"


class Parts(NamedTuple):
    """What a container is built from: the daemon's parts."""

    config: Any
    layers: Any                                 # LayerStore
    driver: ExecutionDriver
    cgroups: Any                                # CgroupManager
    pump: LogPump
    seccomp_profile: Any                        # None for the built-in, "unconfined", or a document
    log_event: Callable[..., None]              # (action, container, **attributes)
    log_network: Callable[..., None]            # (action, network, **attributes)
    background: Callable[..., None]             # run a function soon, on a worker thread
    later: Callable[..., Callable[[], None]]    # the same in so many seconds; call the result to give that up
    networks: Networks
    removed: Callable[[Container], None]      # takes a removed container out of the table
    find: Callable[[str], Container]          # of another container, by name or id
    idmap: IdMap                              # of --userns-remap
    others: Callable[[], list[Container]]


class State:
    """A container's state as moby keeps it; `changed` is notified at every change."""

    def __init__(self, changed: threading.Condition) -> None:
        self.changed = changed
        self.running = self.paused = self.restarting = self.oom_killed = self.removing = self.dead = False
        self.removed = False
        self.pid = 0
        self.exit_code = 0
        self.error = ""
        self.removal_error = ""
        self.started_at = self.finished_at = ZERO_TIME
        self.health: Any = None  # as inspect shows it; replaced, never changed
        self.runs = 0   # ends seen so far: a waiter for the next exit compares it

    @property
    def status(self) -> str:
        """Docker's word for the state."""
        words = (
            (self.removing, "removing"),
            (self.dead, "dead"),
            (self.restarting, "restarting"),
            (self.paused, "paused"),
            (self.running, "running"),
            (self.started_at == ZERO_TIME, "created"),
        )
        return next((word for holds, word in words if holds), "exited")

    def to_api(self) -> dict[str, Any]:
        """State as inspect shows it."""
        return {
            "Status": self.status,
            "Running": self.running,
            "Paused": self.paused,
            "Restarting": self.restarting,
            "OOMKilled": self.oom_killed,
            "Dead": self.dead,
            "Pid": self.pid,
            "ExitCode": self.exit_code,
            "Error": self.error,
            "StartedAt": self.started_at,
            "FinishedAt": self.finished_at,
            **({"Health": self.health} if self.health else {}),
        }

    def to_disk(self) -> dict[str, Any]:
        """State as config.v2.json keeps it."""
        disk = {**self.to_api(), "RemovalInProgress": self.removing, "Health": self.health}
        del disk["Status"]
        return disk

    def from_disk(self, disk: dict[str, Any]) -> None:
        """Take over what to_disk wrote."""
        self.running, self.paused, self.restarting = disk["Running"], disk["Paused"], disk["Restarting"]
        self.oom_killed, self.dead, self.pid = disk["OOMKilled"], disk["Dead"], disk["Pid"]
        self.removing, self.health = disk["RemovalInProgress"], disk.get("Health")
        self.exit_code, self.error = disk["ExitCode"], disk["Error"]
        self.started_at, self.finished_at = disk["StartedAt"], disk["FinishedAt"]


def endpoint_settings(given: dict[str, Any]) -> dict[str, Any]:
    """The EndpointSettings of a container that is not up yet, of those in a request; the address it asks for
    as its link's is kept apart from the one it has."""
    return {**ENDPOINT, **given, "MacAddress": "", "DesiredMacAddress": given.get("MacAddress", "")}


def container_networks(mode: str, given: dict[str, dict[str, Any]], mac: str,
                       networks: Networks) -> dict[str, dict[str, Any]]:
    """The networks of a new container by name: that of its network mode first, then others that its request
    has settings for."""
    if mode.startswith("container:"):
        return {}
    named: dict[str, dict[str, Any]] = {}
    for name, settings in {mode: given.get("default") or {}, **given}.items():
        with contextlib.suppress(NotFound):
            name = networks.find("bridge" if name == "default" else name).name
        named[name] = endpoint_settings({**named.get(name, {}), **settings})
    first = next(iter(named))
    named[first]["DesiredMacAddress"] = named[first]["DesiredMacAddress"] or mac
    return named


def check_endpoint(network: Network, settings: dict[str, Any]) -> None:
    """BadParameter, with Docker's text, for settings that the network does not take."""
    wanted, faults = settings.get("IPAMConfig") or {}, []
    asked = [wanted[key] for key in ("IPv4Address", "IPv6Address") if wanted.get(key)]
    if asked and not network.is_user_defined:
        faults.append("user specified IP address is supported on user defined networks only")
    if settings.get("Aliases") and not network.is_user_defined:
        faults.append("network-scoped alias is supported only for containers in user defined networks")
    for text in asked:
        try:
            address = ipaddress.ip_address(text)
        except ValueError:
            faults.append(f"invalid IP address: {text}")
            continue
        if not network.configured:
            faults.append("user specified IP address is supported only when connecting to networks with user "
                          "configured subnets")
        elif not any(address in pool.subnet for pool in network.pools):
            faults.append(f"no configured subnet contains IP address {text}")
    if faults:
        listed = faults[0] if len(faults) == 1 else "\n".join("* " + fault for fault in faults)
        raise BadParameter(f"invalid config for network {network.name}: invalid endpoint settings:\n{listed}")


def link_environment(parent: str, alias: str, address: str, ports: list[tuple[int, str]],
                     environment: Optional[list[str]]) -> dict[str, str]:
    """The variables by which a linked container is found, as Docker has named them since 0.7."""
    prefix = alias.replace("-", "_").upper()
    values = {}
    for first, (port, protocol) in zip(itertools.chain([True], itertools.repeat(False)), ports):
        url, name = f"{protocol}://{address}:{port}", f"{prefix}_PORT_{port}_{protocol.upper()}"
        values.update({f"{prefix}_PORT": url} if first else {})
        values.update({name: url, name + "_ADDR": address, name + "_PORT": str(port), name
                       + "_PROTO": protocol})
    values[f"{prefix}_NAME"] = f"/{parent}/{alias}"
    for item in environment or []:
        key, equals, value = item.partition("=")
        if equals and key not in ("HOME", "PATH"):
            values[f"{prefix}_ENV_{key}"] = value
    return values


class Container:
    """One container: its record, its state machine, its streams.

    `lock` is held while the state changes and during start; reading for inspect and ps takes no lock.  Every
    public method raises DockerError with Docker's text."""

    def __init__(self, parts: Parts, record: dict[str, Any], host_config: dict[str, Any]) -> None:
        self.parts = parts
        self.record = record
        self.host_config = host_config
        self.id: str = record["ID"]
        self.config: dict[str, Any] = record["Config"]
        self.lock = threading.RLock()
        self.changed = threading.Condition(self.lock)
        self.state = State(self.changed)
        self.process: Optional[Process] = None
        self.cgroup: Any = None
        self._root_fd = -1
        self.execs: dict[str, ExecInstance] = {}    # those that have not ended
        self._edits = DeviceEdits([], [], [], [])
        self.sandbox: Optional[Sandbox] = None
        self._link_lines: list[str] = []                # what links add to /etc/hosts
        self._link_environment: dict[str, str] = {}     # and to the environment
        driver = container_log(host_config["LogConfig"], self.directory, self.id)
        self.streams = Streams(parts.pump, driver, self.directory if driver is not None else "")
        self.streams.on_finished = self._streams_finished
        self._health: Optional[HealthMonitor] = None
        self._again = False         # this run is not to be the last, whatever the restart policy says
        self._stopping = False      # this run is to be the last, whatever the restart policy says
        self._clearing = False      # the last run has ended, and what it has left is being cleared away
        self._kept = False          # "restart" stops it: no time for --rm
        self._delay = 0.0           # seconds before the last restart
        self._give_up_restart: Callable[[], None] = lambda: None

    # The record

    @classmethod
    def create(cls, parts: Parts, container_id: str, name: str, image: Any, config: dict[str, Any],
               host_config: dict[str, Any], networks: dict[str, dict[str, Any]]) -> Container:
        """A new container on disk: its directory, its writable layer, its record.  All or nothing."""
        directory = os.path.join(parts.config.data_root, "containers", container_id)
        command = (config.get("Entrypoint") or []) + (config.get("Cmd") or [])
        log_path = os.path.join(directory, f"{container_id}-json.log")
        record = {
            "StreamConfig": {},
            "State": {},
            "ID": container_id,
            "Created": rfc3339nano(time.time_ns()),
            "Managed": False,
            "Path": command[0],
            "Args": command[1:],
            "Config": config,
            "Image": image.id,
            "NetworkSettings": {"Networks": networks, "Ports": {}},
            "LogPath": log_path if host_config["LogConfig"]["Type"] == "json-file" else "",
            "Name": "/" + name,
            "Driver": parts.layers.driver.name,
            "OS": "linux",
            "MountLabel": "",
            "ProcessLabel": "",
            "RestartCount": 0,
            "HasBeenStartedBefore": False,
            "HasBeenManuallyStopped": False,
            "MountPoints": {},
            "SecretReferences": None,
            "ConfigReferences": None,
            "AppArmorProfile": "",
            "HostnamePath": os.path.join(directory, "hostname"),
            "HostsPath": os.path.join(directory, "hosts"),
            "ShmPath": "",
            "ResolvConfPath": os.path.join(directory, "resolv.conf"),
            "SeccompProfile": "",
            "NoNewPrivileges": False,
        }
        container = cls(parts, record, host_config)
        record["ProcessLabel"], record["MountLabel"] = container._selinux_labels()
        with contextlib.ExitStack() as undo:
            undo.callback(remove_tree, directory)
            os.mkdir(directory, 0o710)
            parts.layers.create_rw(container_id, image.chain_id,
                                   functools.partial(_fill_init_layer, owner=parts.idmap.root))
            undo.callback(parts.layers.remove_rw, container_id)
            container._save_host_config()
            container.save(needed=True)
            undo.pop_all()
        return container

    @classmethod
    def load(cls, parts: Parts, record: dict[str, Any], host_config: dict[str, Any]) -> Container:
        """The container of these records, from disk."""
        container = cls(parts, record, host_config)
        container.state.from_disk(record["State"])
        return container

    @property
    def name(self) -> str:
        """The name without its slash."""
        return self.record["Name"][1:]

    @property
    def directory(self) -> str:
        """Where the record stands."""
        return os.path.join(self.parts.config.data_root, "containers", self.id)

    @property
    def image_id(self) -> str:
        """The id of the image that it was made of."""
        return self.record["Image"]

    def save(self, needed: bool = False) -> None:
        """Write the record: renamed at once, synced with the next group.  OSError only if it is `needed`: a
        full disk keeps no container from ending, nor from being stopped or removed, as in Docker."""
        self.record["State"] = self.state.to_disk()
        try:
            write_state(os.path.join(self.directory, "config.v2.json"), self.record, durable=False)
        except OSError as error:
            if needed:
                raise
            log.error("cannot save the state of the container %s: %s", self.id, error.strerror)

    def _save_host_config(self) -> None:
        write_state(os.path.join(self.directory, "hostconfig.json"), self.host_config, durable=False)

    def event(self, action: str, **attributes: str) -> None:
        """Tell the daemon's listeners."""
        self.parts.log_event(action, self, **attributes)

    # Start

    def start(self) -> None:
        """Start the container; returns when its execve has succeeded.

        NotModified when it runs, Conflict when it is paused or being removed, CommandError when the command
        cannot be executed.  A failure leaves nothing of the run behind and is kept in the state."""
        with self.lock:
            self._await_clearing()
            if self.state.paused:
                raise Conflict("cannot start a paused container, try unpause instead")
            if self.state.running:
                raise NotModified(f"container {self.id} is already started")
            if self.state.removing or self.state.dead:
                raise Conflict("container is marked for removal and cannot be started")
            self.record["RestartCount"], self._delay = 0, 0.0
            self._start_or_fail()

    def _start_or_fail(self) -> None:
        """Start; a failure leaves the container stopped, with the reason in its state."""
        try:
            self._start()
        except Exception as error:
            self.state.exit_code = getattr(error, "code", 128)
            self.state.error = str(error)
            self.state.running = self.state.restarting = False
            self.save()
            self._end_waiters()
            if self.host_config["AutoRemove"]:
                self._auto_remove()
            raise
        self.event("start")

    def _start(self) -> None:
        """The steps of a start; each leaves its undo, and a failure runs the undos of what was done."""
        parts = self.parts
        with contextlib.ExitStack() as undo:
            undo.callback(self._close_sandbox)
            self._open_sandbox()
            self._write_network_files()
            self._root_fd = parts.layers.mount_rw(self.id, label=self.record["MountLabel"])
            undo.callback(self._close_root)
            user = self._user()
            self._edits = requested_devices(
                self.host_config.get("DeviceRequests"), parts.config.cdi_spec_dirs or CDI_DIRECTORIES)
            self.cgroup = parts.cgroups.create(self.id, self._with_devices())
            undo.callback(self.cgroup.remove)
            self._open_log()
            if self.streams.driver is not None:
                undo.callback(self.streams.driver.close)
            notes = os.memfd_create("notes", os.MFD_CLOEXEC)
            with contextlib.ExitStack() as held:
                spec = self._spec(user, self._joined(held))
                process, ours = launch(parts.driver, spec, self.config["OpenStdin"], notes=notes)
            undo.pop_all()
        self._record_ports()
        self._log_networks("connect")
        self.state.running, self.state.restarting, self.state.pid = True, False, process.pid
        self.state.exit_code, self.state.error, self.state.oom_killed = 0, "", False
        self.state.started_at = rfc3339nano(time.time_ns())
        self.record["HasBeenStartedBefore"] = True
        self.record["HasBeenManuallyStopped"] = False
        self._stopping = self._again = False
        self._watch_health(fresh=True)
        self.save()
        self.changed.notify_all()
        self._connect(process, ours)
        for parent in parts.others():
            if parent.host_config["Links"] and parent.state.running:
                parts.background(parent.relink)

    def resume(self, process: Process) -> None:
        """Take over a run that an earlier daemon began: its output, and its end, even if that has come."""
        with self.lock:
            self.cgroup = self.parts.cgroups.existing(self.id, self.host_config)
            self.state.running, self.state.restarting, self.state.pid = True, False, process.pid
            with contextlib.suppress(OSError):  # it has ended
                flags = os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC
                self._root_fd = os.open(f"/proc/{process.pid}/root", flags)
            self._resume_sandbox(process.pid)
            kept, process.kept = process.kept, {}
            try:
                self._open_log(connect=False)
            except DockerError as error:
                log.error("container %s runs on without a log: %s", self.id[:12], error)
            self._watch_health()
            self._connect(process, kept)

    def _connect(self, process: Process, ours: dict[str, int]) -> None:
        """Let the streams and the end of a run come to this container; `ours` are our ends, by name."""
        self.process = process
        self.streams.connect(ours)
        process.streams = self.streams.copies
        process.deliver(self._process_ended)

    def _open_log(self, connect: bool = True) -> None:
        driver, record = self.streams.driver, self.record
        if driver is None:
            return
        info = LogInfo(
            self.host_config["LogConfig"]["Config"] or {}, self.id, record["Name"], record["Image"],
            self.config["Image"], record["Created"], " ".join([record["Path"], *record["Args"]]),
            self.config["Labels"] or {}, self.config["Env"] or [])
        try:
            driver.open(info, connect)
        except DockerError as error:
            raise DockerError(f"failed to initialize logging driver: {error}") from None

    # Networks

    def _open_sandbox(self) -> None:
        """Take addresses and ports for a run."""
        recorded = self.record["NetworkSettings"]
        if not self._namespaces() & CLONE_NEWNET:
            return
        self.sandbox = Sandbox(self.parts.networks, self.id, self.name)
        for name, settings in list(recorded["Networks"].items()):
            network = self.parts.networks.find(name)
            if network.driver not in ("host", "null"):
                self._join(network, settings)
        self.sandbox.publish(self._port_bindings())
        self._link()

    def _join(self, network: Network, settings: dict[str, Any]) -> Endpoint:
        """Take a place on the network under the container's names."""
        assert self.sandbox is not None
        settings["DNSNames"] = self._dns_names(settings) if network.is_user_defined else None
        for link in settings["Links"] or []:
            target, _, alias = link.partition(":")
            self.sandbox.aliases[(alias or target).lower()] = target.lower()
        check_endpoint(network, settings)
        return self.sandbox.join(network, settings)

    def _dns_names(self, settings: dict[str, Any]) -> list[str]:
        names = [self.name, *(settings["Aliases"] or []), self.id[:12], self.config["Hostname"]]
        return list(dict.fromkeys(filter(None, names)))

    def take_name(self, name: str) -> None:
        """Be called `name` (with its slash) from now on, by the resolver too."""
        self.record["Name"] = name
        for settings in self.record["NetworkSettings"]["Networks"].values():
            if settings["DNSNames"]:
                settings["DNSNames"] = self._dns_names(settings)
        if self.sandbox is not None:
            self.sandbox.rename(self.name)

    def _port_bindings(self) -> dict[str, list[dict[str, str]]]:
        """The ports to publish: those asked for, with -P also those exposed."""
        exposed = dict.fromkeys(self.config.get("ExposedPorts")
                                or {}) if self.host_config["PublishAllPorts"] else {}
        bindings = {**exposed, **(self.host_config["PortBindings"] or {})}
        return {name if "/" in name else name + "/tcp": listed or [{}] for name, listed in bindings.items()}

    def _enter_network(self, pid: int) -> None:
        """Make the network in the namespace of the process, which waits for that."""
        assert self.sandbox is not None
        own = self.host_config.get("Dns") or self.parts.config.dns
        servers = own or host_resolv()["nameserver"] or list(DEFAULT_NAME_SERVERS)
        self.sandbox.enter(pid, servers, not own)

    def _record_ports(self) -> None:
        exposed: dict[str, Any] = dict.fromkeys(self.config.get("ExposedPorts") or {})
        ports = {**exposed, **self.sandbox.port_map} if self.sandbox and self.sandbox.endpoints else {}
        self.record["NetworkSettings"]["Ports"] = ports

    def _close_sandbox(self) -> None:
        """Give addresses and ports back."""
        sandbox, self.sandbox = self.sandbox, None
        self.record["NetworkSettings"]["Ports"] = {}
        if sandbox is not None:
            shared = any(other.state.running and other.host_config["NetworkMode"] == f"container:{self.id}"
                         for other in self.parts.others())
            sandbox.close(linger=shared)

    def _log_networks(self, action: str) -> None:
        """Tell the listeners that it has come to its networks, or gone from them."""
        for name in self.record["NetworkSettings"]["Networks"]:
            with contextlib.suppress(NotFound):
                self.parts.log_network(action, self.parts.networks.find(name), container=self.id)

    def _resume_sandbox(self, pid: int) -> None:
        """Take the addresses and ports of a run that an earlier daemon began."""
        recorded = self.record["NetworkSettings"]
        if self._namespaces() & CLONE_NEWNET:
            self.sandbox = Sandbox(self.parts.networks, self.id, self.name)
            for name, settings in recorded["Networks"].items():
                with contextlib.suppress(NotFound):
                    self.sandbox.adopt(self.parts.networks.find(name), settings)
            own = self.host_config.get("Dns") or self.parts.config.dns
            self.sandbox.resume(pid, recorded["Ports"], own or host_resolv()["nameserver"], not own)

    def _write_network_files(self) -> None:
        """Write hostname, hosts and resolv.conf, which are bound into the container; one that shares
        another's network has the other's."""
        if self.host_config["NetworkMode"].startswith("container:"):
            other = self.parts.find(self.host_config["NetworkMode"].partition(":")[2])
            self.record.update({key: other.record[key]
                                for key in ("HostnamePath", "HostsPath", "ResolvConfPath")})
            self.config.update({key: other.config[key] for key in ("Hostname", "Domainname")})
            return
        lines = self._own_lines() + self._link_lines
        gateways = self.parts.networks.gateway_addresses()
        resolver = self.sandbox is not None and self.sandbox.has_resolver
        texts = {"hostname": self._hostname() + "\n", "hosts": hosts_text(self.host_config, lines, gateways),
                 "resolv.conf": resolv_text(self.host_config, self.parts.config, resolver)}
        for name, text in texts.items():
            write_state(os.path.join(self.directory, name), text.encode(), mode=0o644, durable=False)
            if self.idmap:
                os.chown(os.path.join(self.directory, name), *self.idmap.root)

    def _own_lines(self) -> list[str]:
        """Its own addresses, as lines of /etc/hosts."""
        domain = self.config.get("Domainname")
        name = f"{self._hostname()}.{domain} {self._hostname()}" if domain else self._hostname()
        endpoints = self.sandbox.endpoints.values() if self.sandbox else ()
        return [f"{address.ip}\t{name}" for endpoint in endpoints for address in endpoint.addresses]

    def _edit_hosts(self, change: Callable[[], Any]) -> None:
        """Bring /etc/hosts of the running container up to date after a change of its own addresses."""
        before = self._own_lines()
        change()
        edit_hosts(self.record["HostsPath"], before, self._own_lines())

    def connect(self, network: Network, given: dict[str, Any]) -> None:
        """Put the container on the network, at once where it runs; Forbidden or Conflict with Docker's
        text."""
        with self.lock:
            networks = self._check_networks(network)
            if self.state.running and network.name in networks:
                raise Forbidden(f"endpoint with name {self.name} already exists in network {network.name}")
            settings = endpoint_settings(given)
            check_endpoint(network, settings)
            if self.state.running and self.sandbox is not None:
                had_resolver = self.sandbox.has_resolver
                self._edit_hosts(lambda: self._join(network, settings))
                if not had_resolver and self.sandbox.has_resolver:
                    self._enter_resolver()
                self._record_ports()
                self.parts.log_network("connect", network, container=self.id)
            networks[network.name] = {**settings, "NetworkID": network.id}
            if self.sandbox is not None and network.name in self.sandbox.endpoints:
                networks[network.name] = self.sandbox.endpoints[network.name].settings
            self.save()

    def _enter_resolver(self) -> None:
        """A container that came to its first user network gets the resolver."""
        assert self.sandbox is not None
        own = self.host_config.get("Dns") or self.parts.config.dns
        self.sandbox.open_resolver(own or host_resolv()["nameserver"], not own)
        text = resolv_text(self.host_config, self.parts.config, True).encode()
        with contextlib.suppress(OSError), open(self.record["ResolvConfPath"], "r+b") as file:
            file.write(text)
            file.truncate()

    def disconnect(self, network: Network) -> None:
        """Take the container off the network, at once where it runs."""
        with self.lock:
            networks, sandbox = self._check_networks(network), self.sandbox
            if network.name not in networks:
                raise Forbidden(f"container {self.id} is not connected to the network {network.name}")
            if sandbox is not None and network.name in sandbox.endpoints:
                self._edit_hosts(lambda: sandbox.leave(network.name))
                self._record_ports()
                self.parts.log_network("disconnect", network, container=self.id)
            del networks[network.name]
            self.save()

    def _check_networks(self, network: Network) -> dict[str, Any]:
        """The container's networks, where one may come or go."""
        mode = self.host_config["NetworkMode"]
        if self.state.removing or self.state.dead:
            raise Conflict(f"Container {self.id} is marked for removal and cannot be connected or "
                           "disconnected to "
                           "the network")
        if mode == "host" or network.driver == "host":
            raise Forbidden("container cannot be disconnected from host network or connected to host network")
        if mode.startswith("container:"):
            raise Forbidden("container sharing network namespace with another container or host cannot be "
                            "connected "
                            "to any other network")
        networks: dict[str, Any] = self.record["NetworkSettings"]["Networks"]
        if network.driver == "null" and set(networks) != {network.name} or (
                network.driver != "null" and "none" in networks):
            raise Forbidden("container cannot be connected to multiple networks with one of the networks in "
                            "private "
                            "(none) mode")
        return networks

    # Links of the default bridge

    def links(self) -> list[tuple[Container, str]]:
        """(container, alias) of each container that it is linked to."""
        if self.host_config["NetworkMode"] != "bridge":
            return []
        pairs = [link.partition(":")[::2] for link in self.host_config["Links"] or []]
        return [(self.parts.find(target.lstrip("/")), alias.rpartition("/")[2] or target.lstrip("/"))
                for target, alias in pairs]

    def _link(self) -> None:
        """Find out what the links give: variables, lines of /etc/hosts, and rules where the bridge keeps its
        containers apart."""
        lines: list[str] = []
        environment: dict[str, str] = {}
        rules: list[FirewallRule] = []
        for child, alias in self.links():
            there = child.sandbox.endpoints.get("bridge") if child.sandbox else None
            if not child.state.running or there is None or not there.addresses:
                raise Conflict(f"Cannot link to a non running container: /{child.name} AS "
                               f"/{self.name}/{alias}")
            assert self.sandbox is not None
            here, target = self.sandbox.endpoints["bridge"], there.addresses[0].ip
            names = dict.fromkeys((alias, child.config["Hostname"], child.name))
            lines.append(f"{target}\t{' '.join(names)}")
            ports = sorted(child.exposed_ports())
            environment.update(link_environment(self.name, alias, str(target), ports, child.config["Env"]))
            if not here.network.switch("enable_icc", True):
                rules += [LinkRule(here.network.bridge, here.addresses[0].ip, target, protocol, port)
                          for port, protocol in ports]
        self._link_lines, self._link_environment = lines, environment
        if self.sandbox is not None:
            self.sandbox.link(rules)

    def exposed_ports(self) -> set[tuple[int, str]]:
        """(port, protocol) of each port that it exposes or publishes."""
        names = {**(self.config.get("ExposedPorts") or {}), **(self.host_config["PortBindings"] or {})}
        return {(int(port), protocol or "tcp") for port, _, protocol in (name.partition("/")
                                                                         for name in names)}

    def relink(self) -> None:
        """One that it is linked to has been started again: its hosts file and rules follow."""
        with self.lock, contextlib.suppress(DockerError):
            if self.state.running and self.sandbox is not None:
                before = self._link_lines
                self._link()
                edit_hosts(self.record["HostsPath"], before, self._link_lines)

    def _hostname(self) -> str:
        host = self.host_config["NetworkMode"] == "host" or self.host_config.get("UTSMode") == "host"
        return socket.gethostname() if host and not self.config.get("Hostname") else self.config["Hostname"]

    def _user(self, user: str = "") -> Any:
        """(uid, gid, groups, home) by the image's own files, read through the root's descriptor."""
        passwd, group = (_read_in_root(self._root_fd, path) for path in ("/etc/passwd", "/etc/group"))
        return lookup_user(
            user or self.config.get("User") or "", passwd, group, self.host_config.get("GroupAdd") or []
        )

    def _with_devices(self) -> dict[str, Any]:
        """HostConfig with the devices that were asked for by name among the others."""
        devices = [*(self.host_config.get("Devices") or []), *self._edits.devices]
        return {**self.host_config, "Devices": devices}

    def _environment(self, home: str, tty: bool, further: Iterable[str] = ()) -> list[str]:
        """A process's environment in Docker's order: what Docker sets, the container's own, HOME."""
        values = {"PATH": DEFAULT_PATH, "HOSTNAME": self._hostname(), **self._link_environment}
        if tty:
            values["TERM"] = "xterm"
        for item in (*(self.config.get("Env") or []), *further):
            key, equals, value = item.partition("=")
            if equals:
                values[key] = value
            else:
                values.pop(key, None)
        values.setdefault("HOME", home)
        return [f"{key}={value}" for key, value in values.items()]

    def _namespaces(self) -> int:
        """The CLONE_NEW* flags of what the container does not share with the host."""
        host = self.host_config
        shared = {
            CLONE_NEWPID: host["PidMode"],
            CLONE_NEWIPC: host["IpcMode"],
            CLONE_NEWUTS: host["UTSMode"],
            CLONE_NEWNET: host["NetworkMode"],
        }
        own = CLONE_NEWNS | (CLONE_NEWUSER if self.idmap else 0)
        return own | sum(flag for flag, mode in shared.items()
                         if mode != "host" and not mode.startswith("container:"))

    def _joined(self, undo: contextlib.ExitStack) -> dict[str, int]:
        """Descriptors, which `undo` closes, of the namespaces that it shares with other containers: "pid",
        "net", "ipc", and "mnt" for the shared memory.  DockerError, with Docker's text, where that cannot
        be."""
        joined = {}
        for key, names, text in (("PidMode", ("pid",), "{1}"),
                                 ("IpcMode", ("ipc", "mnt"), "can't join IPC of container {0}: {1}"),
                                 ("NetworkMode", ("net",),
                                  "cannot join network of a non running container: {0}")):
            kind, _, other = self.host_config[key].partition(":")
            if kind != "container":
                continue
            try:
                joined.update(self.parts.find(other).namespaces(names, undo))
            except DockerError as error:
                raise DockerError(text.format(other, error)) from None
        return joined

    def namespaces(self, names: Iterable[str], undo: contextlib.ExitStack) -> dict[str, int]:
        """Descriptors, which `undo` closes, of this container's namespaces by the names of /proc/PID/ns."""
        process, fds = self.process, {}
        try:
            if process is None:
                raise ProcessLookupError
            if "ipc" in names and self.host_config["IpcMode"] in ("private", "none"):
                raise DockerError("non-shareable IPC (hint: use IpcMode:shareable for the donor container)")
            for name in names:
                fds[name] = os.open(f"/proc/{process.pid}/ns/{name}", os.O_RDONLY | os.O_CLOEXEC)
                undo.callback(os.close, fds[name])
            process.send_signal(0)  # it has not ended meanwhile: the pid was its own
        except (FileNotFoundError, ProcessLookupError):
            raise DockerError(f"container {self.id} is not running") from None
        return fds

    @property
    def idmap(self) -> IdMap:
        """Who its users are on the host."""
        return IdMap() if self.host_config["UsernsMode"] == "host" else self.parts.idmap

    def _seccomp(self, options: SecurityOptions, capabilities: set[int]) -> tuple[bytes, int]:
        """The filter's program and flags: the container's own profile, else the daemon's; none when
        privileged."""
        profile = self.parts.seccomp_profile if options.seccomp is None else options.seccomp
        if self.host_config["Privileged"] or profile == "unconfined":
            return b"", 0
        names = {CAPABILITIES[number] for number in capabilities}
        return compile_seccomp(profile, names), seccomp_flags(profile)

    def _selinux_labels(self) -> tuple[str, str]:
        """The contexts of its processes and files: those of a container whose namespaces it joins, else some
        of its own; none where it is privileged, shares the host's namespaces or there is no SELinux."""
        host = self.host_config
        for mode in (host["IpcMode"], host["PidMode"]):
            if mode.startswith("container:"):
                donor = self.parts.find(mode[10:]).record
                return donor["ProcessLabel"], donor["MountLabel"]
        shares = host["Privileged"] or "host" in (host["IpcMode"], host["PidMode"])
        if shares or not selinux_runs(self.parts.config):
            return "", ""
        return selinux_contexts(parse_security_options(host["SecurityOpt"] or []).label)

    def _labels(self, options: SecurityOptions) -> list[list[str]]:
        """What the process is to write for its SELinux context and its AppArmor profile."""
        default = apparmor_default()
        profile = options.apparmor or ("unconfined" if self.host_config["Privileged"] else default)
        self.record["AppArmorProfile"] = profile if default else ""
        context = self.record["ProcessLabel"]
        if context:
            return [["exec", context]]
        place = "apparmor/exec" if os.path.exists("/proc/self/attr/apparmor/exec") else "exec"
        return [[place, f"exec {profile}"]] if default and profile != "unconfined" else []

    def _sysctls(self, namespaces: int) -> list[tuple[str, str]]:
        """Those asked for, and Docker's for a network namespace of the container's own."""
        check_sysctls(self.host_config)
        sysctls = dict(self.host_config.get("Sysctls") or {})
        if namespaces & CLONE_NEWNET:
            if os.path.exists("/proc/sys/net/ipv6") and not (self.sandbox and self.sandbox.endpoints):
                sysctls.setdefault("net.ipv6.conf.all.disable_ipv6", "1")
            sysctls.setdefault("net.ipv4.ip_unprivileged_port_start", "0")
            if not self.idmap:  # which has not that many groups
                sysctls.setdefault("net.ipv4.ping_group_range", "0 2147483647")
        return sorted(sysctls.items())

    def _mounts(self) -> list[dict[str, Any]]:
        """What is bound from the host: its shared memory where that is shared, and the three network
        files."""
        readonly = MOUNT_ATTR_RDONLY if self.host_config["ReadonlyRootfs"] else 0
        places = {
            "ResolvConfPath": "/etc/resolv.conf",
            "HostnamePath": "/etc/hostname",
            "HostsPath": "/etc/hosts",
        }
        files = [{"from": self.record[key], "to": to, "attributes": readonly} for key, to in places.items()]
        for entry in files if self.record["MountLabel"] else ():
            os.setxattr(entry["from"], "security.selinux", self.record["MountLabel"].encode())
        ipc = self.host_config["IpcMode"].partition(":")[0]
        shm = {"host": [{"from": "/dev/shm", "to": "/dev/shm"}],
               "container": [{"shared": "/dev/shm", "to": "/dev/shm"}]}.get(ipc, [])
        init = [{"from": init_program(self.parts.config), "to": INIT_PLACE, "attributes": MOUNT_ATTR_RDONLY}]
        return shm + (init if self._has_init and init[0]["from"] else []) + self._edits.mounts + files

    @property
    def _has_init(self) -> bool:
        """Whether an init is its first process; only a PID namespace of its own can have one."""
        wanted = self.host_config.get("Init")
        return (self.parts.config.init if wanted is None else wanted) and not self.host_config["PidMode"]

    def _confinement(self, user: Any) -> dict[str, Any]:
        """The Spec's fields that hold for every process in the container, run by `user`."""
        host = self.host_config
        uid, gid, groups, _ = user
        options = parse_security_options(host.get("SecurityOpt") or [])
        capabilities = capability_sets(
            host.get("CapAdd") or [], host.get("CapDrop") or [], host["Privileged"], bounding_capabilities())
        seccomp, seccomp_mode = self._seccomp(options, capabilities)
        return {
            "uid": uid,
            "gid": gid,
            "groups": groups + self._edits.groups,
            "capabilities": capabilities,
            "root_fd": self._root_fd,
            "cgroup_join": self.cgroup.join,
            "labels": self._labels(options),
            "cgroup_fd": self.cgroup.directory_fd,
            "idmap": self.idmap,
            "seccomp": seccomp,
            "seccomp_flags": seccomp_mode,
            "no_new_privileges": options.no_new_privileges or self.parts.config.no_new_privileges,
            "rlimits": container_limits(host, self.parts.config),
            "oom_score_adj": host["OomScoreAdj"] or None,
        }

    def _oci_resources(self) -> dict[str, Any]:
        """Cgroup, limits and filter as an OCI runtime is told of them."""
        host = self.host_config
        devices: list[dict[str, Any]] = [{"allow": False, "access": "rwm"}]
        for rule in device_rules(self._with_devices()):
            kind, *numbers, access = re.split("[ :]", rule)
            devices.append({"allow": True, "type": kind, "access": access, **{
                key: int(number) for key, number in zip(("major", "minor"), numbers) if number != "*"}})
        period, quota = _cpu_time(host)
        groups = {
            "memory": {"limit": host["Memory"], "swap": host["MemorySwap"],
                       "reservation": host["MemoryReservation"]},
            "cpu": {"shares": host["CpuShares"], "period": period, "quota": quota,
                    "cpus": host["CpusetCpus"], "mems": host["CpusetMems"]},
            "pids": {"limit": host["PidsLimit"]}}
        limits = {name: {key: value for key, value in values.items() if value}
                  for name, values in groups.items()}
        linux: dict[str, Any] = {"cgroupsPath": self.cgroup.path, "resources": {
            "devices": devices, **{name: values for name, values in limits.items() if values}}}
        options = parse_security_options(host.get("SecurityOpt") or [])
        profile = self.parts.seccomp_profile if options.seccomp is None else options.seccomp
        if not host["Privileged"] and profile != "unconfined":
            given = capability_sets(host.get("CapAdd") or [], host.get("CapDrop") or [], False,
                                    bounding_capabilities())
            linux["seccomp"] = oci_seccomp(profile, [CAPABILITIES[number] for number in given])
        return linux

    def _spec(self, user: Any, join: dict[str, int]) -> Spec:
        """What the execution driver must know, from the record; `join` are the namespaces of others."""
        host = self.host_config
        privileged, namespaces = host["Privileged"], self._namespaces()
        own_names = bool(namespaces & CLONE_NEWUTS)
        program = init_program(self.parts.config) if self._has_init else ""
        runtime = oci_runtime(self.parts.config, host["Runtime"])
        return Spec(
            runtime=runtime,
            resources=self._oci_resources() if runtime else {},
            **self._confinement(user),
            key=self.id,
            args=[*([INIT_PLACE, "--"] if program else []), self.record["Path"], *self.record["Args"]],
            resident=self._has_init and not program,
            env=self._environment(user[3], self.config["Tty"], self._edits.env),
            cwd=self.config.get("WorkingDir") or "/",
            tty=self.config["Tty"],
            console_size=tuple(host.get("ConsoleSize") or (0, 0)),
            hostname=self._hostname() if own_names else "",
            domainname=(self.config.get("Domainname") or "") if own_names else "",
            namespaces=namespaces,
            join=join,
            mount_label=self.record["MountLabel"],
            cgroup_enter=self.cgroup.enter,
            network_enter=self._enter_network if self.sandbox and self.sandbox.endpoints else None,
            cgroup_namespace=host["CgroupnsMode"] == "private",
            cgroup_mounts=self.cgroup.mounts(host["CgroupnsMode"] == "private", not privileged),
            mounts=self._mounts(),
            devices=container_devices(self._with_devices()),
            privileged=privileged,
            readonly_root=host["ReadonlyRootfs"],
            masked_paths=tuple(host.get("MaskedPaths") or ()),
            readonly_paths=tuple(host.get("ReadonlyPaths") or ()),
            sysctls=self._sysctls(namespaces),
            shm_size=host["ShmSize"] if host["IpcMode"] in ("private", "shareable") else 0,
        )

    def _close_root(self) -> None:
        if self._root_fd >= 0:
            os.close(self._root_fd)
            self._root_fd = -1

    # The end of a run: when the process has ended and its output has been read, whichever comes last

    def _process_ended(self, process: Process) -> None:
        if self.host_config["PidMode"]:  # no pid namespace took the rest with it
            self.parts.background(self.cgroup.kill)
        if self.streams.finished.is_set():
            self.parts.background(self._finish, process)

    def _streams_finished(self) -> None:
        process = self.process
        if process is not None and process.end is not None:
            self.parts.background(self._finish, process)

    def _finish(self, process: Process) -> None:
        """Record the end of a run once, tell everybody, and clear up behind it."""
        with self.lock:
            if self.process is not process or process.end is None or not self.streams.finished.is_set():
                return
            self.process = None
            state = self.state
            state.oom_killed = self.cgroup.oom_killed()
            state.pid, state.exit_code = 0, process.end["status"]
            state.error = process.end.get("error", "")
            state.finished_at = rfc3339nano(process.end["time"])
            ran = max(0, process.end["time"] - parse_timestamp(state.started_at)) // 10**9
            self.streams.close_stdin()
            self._end_health()
            state.paused = False
            state.restarting = not self._stopping and (self._again or self.wants_restart())
            state.running = state.restarting  # Docker's: what comes back has not stopped
            self.record["RestartCount"] += state.restarting
            self.save()
            if state.oom_killed:
                self.event("oom")
            self.event("die", exitCode=str(state.exit_code), execDuration=str(ran))
            self._close_sandbox()
            self._log_networks("disconnect")
            cgroup, self.cgroup = self.cgroup, None
            self._close_root()
            self.execs.clear()
            self._end_waiters()
            self.streams.end_subscribers()
            remove = self.host_config["AutoRemove"] and not (self._kept or state.restarting)
            self._clearing = True
        try:
            process.forget()
            self.parts.driver.discard(self.id)
            cgroup.remove()
        finally:
            with self.lock:
                self._clearing = False
                self.changed.notify_all()
                self._plan_restart(state.finished_at, ran)
        if remove:
            self._auto_remove()

    # Restarts: the daemon's timer calls _restart; whoever stops the container before gives it up

    def wants_restart(self) -> bool:
        """Whether the policy asks for a start after this end of the container."""
        policy = self.host_config["RestartPolicy"]
        most = policy["MaximumRetryCount"]
        return {"always": True, "unless-stopped": not self.record["HasBeenManuallyStopped"],
                "on-failure": self.state.exit_code != 0 and not 0 < most <= self.record["RestartCount"],
                }.get(policy["Name"], False)

    def _plan_restart(self, finished_at: str, ran: int) -> None:
        """Start again after the delay, if the policy wanted that at this end; `ran` in seconds."""
        if self._awaits_restart(finished_at):
            first, longest = RESTART_DELAY
            self._delay = min(2 * self._delay, longest) if self._delay and ran < RESTART_RESET else first
            self._give_up_restart = self.parts.later(self._delay, self._restart, finished_at)

    def _awaits_restart(self, finished_at: str) -> bool:
        return self.state.restarting and self.state.finished_at == finished_at

    def _restart(self, finished_at: str) -> None:
        """The delay is over: start, unless the container has been stopped meanwhile."""
        with self.lock:
            if self._awaits_restart(finished_at):
                try:
                    self._start_or_fail()
                except DockerError as error:
                    log.error("cannot restart the container %s: %s", self.id, error)

    def restart_unhealthy(self) -> None:
        """End this run, by force after the stop timeout, and start again; who stops it meanwhile has the last
        word."""
        with self.lock:
            if self.process is not None and not self._stopping:
                self._again = True
                self._signal(self._stop_signal(), last=False, manually=False)
                self.parts.later(max(0, self.stop_timeout), self._kill_unhealthy, self.process)

    def _kill_unhealthy(self, process: Process) -> None:
        with self.lock:
            if self.process is process and not self._stopping:
                self._signal(signal.SIGKILL, last=False, manually=False)

    def _stop_restarting(self) -> None:
        """The restart that is waited for will not come."""
        self._give_up_restart()
        self.state.running = self.state.restarting = False
        self.save()
        self._end_waiters()

    def _await_clearing(self) -> None:
        """Wait, with the lock given up, until what the last run has left behind is gone."""
        self.changed.wait_for(lambda: not self._clearing)

    def _end_waiters(self) -> None:
        self.state.runs += 1
        self.changed.notify_all()

    def _auto_remove(self) -> None:
        try:
            self.remove(force=True)
        except Conflict:  # a client removes it
            pass
        except DockerError as error:
            log.warning("cannot remove the container %s: %s", self.id, error)

    # Changes

    def update(self, body: dict[str, Any]) -> list[str]:
        """Change resources and restart policy as `body`, of POST /containers/ID/update, asks, at once if it
        runs; returns Docker's warnings.  A refused change changes nothing."""
        changes = decode_struct(body, "UpdateConfig")
        if changes["RestartPolicy"]["Name"]:
            check_rules(POLICY_RULES, changes)
        warnings = _warnings(changes) + self.parts.cgroups.adapt(changes, update=True)
        with self.lock:
            try:
                self._update(changes)
            except DockerError as error:
                raise type(error)(f"Cannot update container {self.id}: {error}") from None
            self.event("update")
        return warnings

    def _update(self, changes: dict[str, Any]) -> None:
        old = self.host_config
        if self.state.removing or self.state.dead:
            raise Conflict('container is marked for removal and cannot be "update"')
        for conflicts, text in UPDATE_CONFLICTS:
            if conflicts(changes, old):
                raise Conflict(text)
        new = {**old, **{key: changes[key] for key in UPDATED if changes.get(key)}}
        if changes["PidsLimit"] is not None:
            new["PidsLimit"] = max(changes["PidsLimit"], 0)
        if changes["RestartPolicy"]["Name"]:
            new["RestartPolicy"] = changes["RestartPolicy"]
        if self.cgroup is not None:
            self.cgroup.update(old, new)
        self.host_config = new
        self._save_host_config()

    # Health

    def _watch_health(self, fresh: bool = False) -> None:
        """Begin the health checks of a run, or go on with them after a pause or under another daemon; the log
        of earlier runs stays."""
        command, state = health_command(self.config), self.state
        known = (state.health if command else None) or {"Log": []}
        if fresh or "Status" not in known:
            known = {"Status": "starting", "FailingStreak": 0, "Log": known["Log"]}
        state.health = known if command else None
        self._health = HealthMonitor(self, command) if command and not state.paused else None

    def _end_health(self) -> None:
        if self._health is not None:
            self._health.stop()
            self._health = None

    def label_is_set(self, name: str) -> bool:
        """Whether the container has the label `name` with a true value."""
        return str((self.config.get("Labels") or {}).get(name)).lower() in ("1", "true")

    # Signals

    def _require_running(self, what: str) -> Process:
        if not self.state.running or self.process is None:
            raise Conflict(f"{what}Container {self.id} is not running")
        return self.process

    def _signal(self, number: int, last: bool, manually: bool = True) -> None:
        """Send a signal to the container's process and tell of it.  After one that is to be the `last` thing
        of the run, a paused container goes on, to end, and none is started again."""
        self._stopping |= last
        if manually:
            self.record["HasBeenManuallyStopped"] = True
            self.save()
        if self.state.restarting:
            if last:
                self._stop_restarting()
            return
        with contextlib.suppress(ProcessLookupError):
            self._require_running("").send_signal(number)
        self.event("kill", signal=str(int(number)))
        if last and self.state.paused:
            self.cgroup.thaw()
            self.state.paused = False
            self._watch_health()
            if number != signal.SIGKILL:
                self.event("unpause")

    def kill(self, number: int) -> None:
        """Send the signal to the container's process; with SIGKILL wait for its end.  Conflict when it does
        not run."""
        with self.lock:
            if not self.state.restarting:
                self._require_running(f"Cannot kill container: {self.name}: ")
            own = self.config.get("StopSignal")
            self._signal(number, number == signal.SIGKILL or not own or number == parse_signal(own))
            if number == signal.SIGKILL:
                self._wait_end(10)

    def stop(self, number: Optional[int] = None, timeout: Optional[int] = None, manually: bool = True) \
            -> None:
        """Send the stop signal and, after `timeout` seconds (-1: never), SIGKILL.  NotModified when it does
        not run.  One that is not stopped `manually` runs again when the daemon does."""
        number = number or self._stop_signal()
        timeout = self.stop_timeout if timeout is None else timeout
        with self.lock:
            if not self.state.running:
                raise NotModified(f"container {self.id} is already stopped")
            process = self.process
            self._signal(number, True, manually)
            if not self._wait_end(None if timeout < 0 else timeout):
                log.info("Container %s failed to exit within %d s of signal %d - using the force",
                         self.id, timeout, number)
                if self.process is process:
                    self._signal(signal.SIGKILL, True, manually)
                if not self._wait_end(10):
                    raise DockerError(
                        f"cannot stop container {self.name}: it did not die of SIGKILL within 10 s"
                    )
            self.event("stop")

    def _stop_signal(self) -> int:
        return parse_signal(self.config.get("StopSignal") or "SIGTERM")

    @property
    def stop_timeout(self) -> int:
        """Seconds that the container has between its stop signal and SIGKILL."""
        timeout = self.config.get("StopTimeout")
        return CONTAINER_STOP_TIMEOUT if timeout is None else timeout

    def _wait_end(self, timeout: Optional[float]) -> bool:
        """Wait, with the lock given up, for the end of this run; False when the time is over."""
        runs = self.state.runs
        return self.changed.wait_for(lambda: self.state.runs > runs or not self.state.running, timeout)

    def restart(self, number: Optional[int] = None, timeout: Optional[int] = None) -> None:
        """Stop it if it runs, and start it."""
        with self.lock:
            self._kept = True
            try:
                with contextlib.suppress(NotModified):
                    self.stop(number, timeout)
            finally:
                self._kept = False
            with contextlib.suppress(NotModified):  # somebody else has been quicker
                self.start()
            self.event("restart")

    def pause(self) -> None:
        """Freeze all its processes; Conflict when it does not run or is paused."""
        with self.lock:
            self._require_pausable()
            while self._health is not None:
                health = self._health
                self._end_health()
                health.settle()
                self._require_pausable()
            try:
                self.cgroup.freeze()
            except (DockerError, OSError):
                self._watch_health()
                raise
            self.state.paused = True
            self.save()
            self.event("pause")

    def _require_pausable(self) -> None:
        if self.state.restarting:
            raise Conflict(f"Container {self.id} is restarting, wait until the container is running")
        self._require_running("")
        if self.state.paused:
            raise Conflict(f"Container {self.id} is already paused")

    def unpause(self) -> None:
        """Thaw its processes; Conflict when it is not paused."""
        with self.lock:
            if not self.state.paused:
                raise Conflict(f"Container {self.id} is not paused")
            self.cgroup.thaw()
            self.state.paused = False
            self._watch_health()
            self.save()
            self.event("unpause")

    def top(self, arguments: str) -> dict[str, Any]:
        """Its processes, as the host's ps shows them with these arguments; the API's answer."""
        if self.state.restarting:
            raise Conflict(f"Container {self.id} is restarting, wait until the container is running")
        with self.lock:
            self._require_running("")
            pids = self.cgroup.processes()
        titles, rows = list_processes(arguments or "-ef", pids)
        self.event("top")
        return {"Titles": titles, "Processes": rows or None}

    def resize(self, height: int, width: int) -> None:
        """Set the terminal's size in characters; Conflict when the container does not run."""
        with self.lock:
            self._require_running("")
            if self.config["Tty"]:
                self.streams.resize(height, width)
            self.event("resize", height=str(height), width=str(width))

    def wait(self, job: Job, condition: str) -> dict[str, Any]:
        """Wait for `condition` (not-running, next-exit or removed) or the job's cancellation; the API's
        answer."""
        with self.lock:
            runs = self.state.runs
            conditions: dict[str, Callable[[], bool]] = {
                "not-running": lambda: not self.state.running or self.state.runs > runs or self.state.removed,
                "next-exit": lambda: self.state.runs > runs or self.state.removed,
                "removed": lambda: self.state.removed or bool(self.state.removal_error),
            }
            if condition not in conditions:
                raise BadParameter(f"invalid condition: \"{condition}\"")
            job.on_cancel(self._notify)
            job.ready()
            self.changed.wait_for(lambda: conditions[condition]() or job.cancelled.is_set())
            error = {"Message": self.state.removal_error} if self.state.removal_error else None
            return {"Error": error, "StatusCode": self.state.exit_code}

    def close_stdin(self) -> None:
        """End the container's standard input: our end of it, and the one that the shim holds."""
        self.streams.close_stdin()
        if self.process is not None:
            self.process.shim.post("drop", key=self.id, name="stdin")

    # Further processes

    def require_exec(self, name: str) -> Process:
        """The container's process where another may join it; Conflict, which calls the container `name`."""
        process = self._require_running("")
        if self.state.paused:
            raise Conflict(f"Container {name} is paused, unpause the container before exec")
        if self.state.restarting:
            raise Conflict(f"Container {name} is restarting, wait until the container is running")
        return process

    def exec_spec(self, key: str, config: dict[str, Any], size: list[int]) -> Spec:
        """What the execution driver must know to run the exec instance of this configuration."""
        user = self._user(config["User"])
        confinement = self._confinement(user)
        if config["Privileged"]:
            confinement["capabilities"] = bounding_capabilities()
        if self.idmap and confinement["cgroup_fd"] is not None:  # whose root may not be born there
            confinement["cgroup_join"] += [[self.cgroup.of[""] + "/cgroup.procs", "0"]]
            confinement["cgroup_fd"] = None
        return Spec(
            **confinement,
            key=key,
            args=config["Cmd"],
            env=self._environment(user[3], config["Tty"], config["Env"] or ()),
            cwd=config["WorkingDir"] or self.config.get("WorkingDir") or "/",
            tty=config["Tty"],
            console_size=(size[0], size[1]),
            namespaces=JOINED_NAMESPACES | (CLONE_NEWUSER if self.idmap else 0),
        )

    def _notify(self) -> None:
        with self.lock:
            self.changed.notify_all()

    # Remove

    def remove(self, force: bool = False) -> None:
        """Remove the container and all that belongs to it; Conflict when it runs and `force` is not given."""
        with self.lock:
            if self.state.removing:
                raise Conflict(f"removal of container {self.name} is already in progress")
            if self.state.running and not force:
                advice = "unpause and then stop the container" if self.state.paused else "stop the container"
                raise Conflict(f"cannot remove container \"/{self.name}\": container is {self.state.status}: "
                               f"{advice} before removing or force remove")
            self.state.removing = True  # from here on nobody starts it
            try:
                if self.state.running:
                    self._kill_for_removal()
                self._await_clearing()
                self.save()
                self.parts.layers.remove_rw(self.id)
                remove_tree(self.directory)
            except OSError as error:
                self.state.dead = True
                self._removal_failed(f"unable to remove filesystem for {self.id}: {error.strerror}: "
                                     f"{error.filename}")
            except DockerError as error:
                self._removal_failed(str(error))
            self.state.removed = True
            self.parts.removed(self)
            self.event("destroy")
            self.changed.notify_all()

    def _kill_for_removal(self) -> None:
        self.kill(signal.SIGKILL)
        if self.state.running:
            raise DockerError(
                f"cannot remove container \"/{self.name}\": it did not die of SIGKILL within 10 s")

    def _removal_failed(self, text: str) -> None:
        """Leave what is there to another attempt, and tell why."""
        self.state.removing, self.state.removal_error = False, text
        self.save()
        self.changed.notify_all()
        raise DockerError(text) from None

    # Streams

    def logs(self, job: Job) -> None:
        """The job logs: what the container printed, and with `follow` what it prints from now on."""
        env = job.env
        wanted = {number for number, name in STREAM_NAMES.items() if env.get_bool(name)}
        if not wanted:
            raise BadParameter("Bad parameters: you must choose at least one stream")
        file = self.streams.driver.file if self.streams.driver is not None else None
        if file is None:
            raise NotSupported("configured logging driver does not support reading")
        since, until = (parse_timestamp(str(env[key])) if env.get(key) not in (None, "", "0", 0) else 0
                        for key in ("since", "until"))
        job.on_cancel(file.wake)
        job.ready(tty=self.config["Tty"])
        tail = env.get("tail", "all")
        count = int(tail) if str(tail).isdigit() else -1
        from urllib.parse import urlencode
        follow, stamps, details = env.get_bool("follow"), env.get_bool("timestamps"), env.get_bool("details")
        for stream, when, text, attributes in file.read(count, since, until, follow, job.cancelled):
            if stream in wanted:
                stamp = rfc3339nano(when, padded=True) + " " if stamps else ""
                pairs = urlencode(sorted(attributes.items())).replace("&", ",") if details else ""
                head = stamp + pairs + " " if details else stamp
                (job.stderr if stream == STDERR else job.stdout).write(head.encode() + text)

    def attach(self, job: Job) -> None:
        """The job attach: the client's connection becomes the container's streams."""
        env = job.env
        wanted = {number for number, name in STREAM_NAMES.items() if env.get_bool(name)}
        keys = parse_detach_keys(env.get("detachKeys") or DETACH_KEYS)
        if self.state.paused:
            raise Conflict(f"Container {self.name} is paused, unpause the container before attach")
        if self.state.restarting:
            raise Conflict(f"Container {self.name} is restarting, wait until the container is running")
        subscriber = self.streams.subscribe(wanted if env.get_bool("stream") else set())
        try:
            job.ready(tty=self.config["Tty"])
            self.event("attach")
            tty = self.config["Tty"]
            attachment = Attachment(self.streams, job, subscriber, tty or env.get_bool("raw"),
                                    keys if tty else b"")
            if env.get_bool("logs"):
                for stream, text in subscriber.past():
                    if stream in wanted:
                        attachment.queue(stream, text)
            stdin = env.get_bool("stream") and env.get_bool("stdin") and self.config["OpenStdin"]
            attachment.run(stdin, self.close_stdin if self.config["StdinOnce"] and not tty else None)
            if attachment.detached:
                self.event("detach")
        finally:
            subscriber.close()

    # Shapes

    def inspect(self, size: bool) -> dict[str, Any]:
        """The container as GET /containers/ID/json of the newest API shows it."""
        record = self.record
        shown = {
            "Id": self.id,
            "Created": record["Created"],
            "Path": record["Path"],
            "Args": record["Args"],
            "State": self.state.to_api(),
            "Image": record["Image"],
            "ResolvConfPath": record["ResolvConfPath"],
            "HostnamePath": record["HostnamePath"],
            "HostsPath": record["HostsPath"],
            "LogPath": record["LogPath"],
            "Name": record["Name"],
            "RestartCount": record["RestartCount"],
            "Driver": record["Driver"],
            "Platform": record["OS"],
            "MountLabel": record["MountLabel"],
            "ProcessLabel": record["ProcessLabel"],
            "AppArmorProfile": record["AppArmorProfile"],
            "ExecIDs": list(self.execs) or None,
            "HostConfig": self.host_config,
            "GraphDriver": {"Data": self.parts.layers.rw_metadata(self.id), "Name": record["Driver"]},
            "Mounts": [],
            "Config": self.config,
            "NetworkSettings": network_settings(record["NetworkSettings"], self.sandbox, self.state.pid),
        }
        if size:
            shown["SizeRw"], shown["SizeRootFs"] = self.parts.layers.rw_size(self.id)
        return shown

    def usage(self, system: dict[str, int]) -> dict[str, Any]:
        """One sample of what it uses, in the shape of GET /containers/ID/stats, with `system` among its
        cpu_stats; nothing but zeros when it does not run."""
        who = {"name": self.record["Name"], "id": self.id}
        process, cgroup = self.process, self.cgroup
        if process is None or cgroup is None:
            return {"read": ZERO_TIME, **NO_STATS, **who}
        sample = {"read": rfc3339nano(time.time_ns()), **cgroup.stats(), **who}
        sample["cpu_stats"].update(system)
        networks = self.host_config["NetworkMode"] != "host" and interface_counters(process.pid)
        return {**sample, "networks": networks} if networks else sample

    def summary(self, size: bool, image_name: str) -> dict[str, Any]:
        """The container as GET /containers/json of the newest API lists it."""
        record = self.record
        command = " ".join(_shell_word(word) for word in [record["Path"], *record["Args"]])
        listed = {
            "Id": self.id,
            "Names": [record["Name"]],
            "Image": image_name,
            "ImageID": record["Image"],
            "Command": command,
            "Created": parse_timestamp(record["Created"]) // 10**9,
            "Ports": [],
            "Labels": self.config.get("Labels") or {},
            "State": self.state.status,
            "Status": status_text(self.state.to_api(), time.time_ns()),
            "HostConfig": {"NetworkMode": self.host_config["NetworkMode"]},
            "NetworkSettings": {"Networks": record["NetworkSettings"]["Networks"]},
            "Mounts": [],
        }
        if size:
            listed["SizeRw"], listed["SizeRootFs"] = self.parts.layers.rw_size(self.id)
        return listed


def selinux_runs(config: Any) -> bool:
    """Whether containers get SELinux contexts: asked for, and the kernel has it on."""
    return bool(config.selinux_enabled) and os.path.exists("/sys/fs/selinux/enforce")


def selinux_contexts(options: Iterable[str]) -> tuple[str, str]:
    """(the context of the processes, of the files) of a new container, with two categories of its own, by the
    policy's lxc_contexts; `options` are those of --security-opt label=.  ("", "") for "disable" and where the
    policy knows no containers."""
    policy = re.search(r"^SELINUXTYPE=(\w+)", read_text("/etc/selinux/config"), re.M)
    text = read_text(f"/etc/selinux/{policy[1] if policy else 'targeted'}/contexts/lxc_contexts")
    given = dict(re.findall(r'^(\w+)\s*=\s*"([^"]*)"', text, re.M))
    process, file = (given.get(name, "").split(":", 3) for name in ("process", "file"))
    if "disable" in options or min(len(process), len(file)) < 4:
        return "", ""
    low, high = sorted(secrets.SystemRandom().sample(range(1024), 2))
    process[3] = file[3] = f"s0:c{low},c{high}"
    for option in options:
        key, _, value = option.partition(":")
        if key not in ("user", "role", "type", "level", "filetype") or not value:
            raise BadParameter(f"bad label option {go_quote(option)}, valid options 'disable' or \n'user, "
                               "role, level, type, filetype' followed by ':' and a value")
        if key == "filetype":
            file[2] = value
        else:
            process[("user", "role", "type", "level").index(key)] = value
            file[3] = value if key == "level" else file[3]
    return ":".join(process), ":".join(file)


CDI_DIRECTORIES = ("/etc/cdi", "/var/run/cdi")
_MOUNT_WORDS = {"ro": MOUNT_ATTR_RDONLY, "nosuid": MOUNT_ATTR_NOSUID, "nodev": MOUNT_ATTR_NODEV,
                "noexec": MOUNT_ATTR_NOEXEC}


class DeviceEdits(NamedTuple):
    """What devices asked for by name add to a container."""

    devices: list[dict[str, Any]]       # as HostConfig's Devices
    env: list[str]
    mounts: list[dict[str, Any]]        # for the init's plan
    groups: list[int]

    def add(self, edits: dict[str, Any]) -> None:
        """Take over one containerEdits of a specification."""
        if edits.get("hooks"):
            raise DockerError("CDI device injection failed: the device needs hooks, which are not supported")
        self.devices.extend({
            "PathOnHost": node.get("hostPath") or node["path"], "PathInContainer": node["path"],
            "CgroupPermissions": node.get("permissions")} for node in edits.get("deviceNodes", ()))
        self.env.extend(edits.get("env", ()))
        self.mounts.extend({
            "from": mount["hostPath"], "to": mount["containerPath"],
            "recursive": "rbind" in mount.get("options", ()),
            "attributes": sum({_MOUNT_WORDS.get(word, 0) for word in mount.get("options", ())})}
            for mount in edits.get("mounts", ()))
        self.groups.extend(edits.get("additionalGids", ()))


def cdi_devices(directories: Iterable[str]) -> dict[str, list[dict[str, Any]]]:
    """The containerEdits, the whole file's first, of each device "VENDOR/CLASS=NAME" of the JSON files in the
    directories; a later directory goes before, and what one has twice has none.  Container Device Interface
    specification 0.8."""
    found: dict[str, list[dict[str, Any]]] = {}
    for directory in directories:
        here: dict[str, list[dict[str, Any]]] = {}
        names = sorted(os.listdir(directory)) if os.path.isdir(directory) else []
        for path in (os.path.join(directory, name) for name in names if name.endswith(".json")):
            try:
                specification = json.loads(read_text(path))
                common = specification.get("containerEdits", {})
                for device in specification["devices"]:
                    name = f"{specification['kind']}={device['name']}"
                    here[name] = [] if name in here else [common, device.get("containerEdits", {})]
            except (ValueError, LookupError, TypeError, AttributeError) as error:
                log.warning("the CDI specification %s is not one: %s", path, error)
        found.update(here)
    return found


def requested_devices(requests: Optional[list[dict[str, Any]]], directories: Iterable[str]) -> DeviceEdits:
    """What HostConfig's DeviceRequests come to; DockerError, with Docker's text, for what is not there."""
    edits = DeviceEdits([], [], [], [])
    names: list[str] = []
    for request in requests or ():
        if request["Driver"] != "cdi":
            wanted = " ".join(f"[{' '.join(group)}]" for group in request["Capabilities"] or [])
            raise DockerError(f"could not select device driver {go_quote(request['Driver'])} with "
                              f"capabilities: [{wanted}]")
        names += request["DeviceIDs"] or []
    known = cdi_devices(directories) if names else {}
    missing = [name for name in names if not known.get(name)]
    if missing:
        raise DockerError("CDI device injection failed: unresolvable CDI devices " + ", ".join(missing))
    parts = {id(part): part for name in names for part in known[name]}  # a file's common one once
    for part in parts.values():
        try:
            edits.add(part)
        except (LookupError, TypeError, AttributeError) as error:
            raise DockerError(f"CDI device injection failed: a malformed specification: {error!r}") from None
    return edits


INIT_PLACE = "/sbin/docker-init"    # where a container has the host's


def init_program(config: Any) -> str:
    """The host's program for --init, which must be a static one; "" where it has none, and then the
    container's first process stays with it instead."""
    path = os.fsencode(os.environ.get("PATH", DEFAULT_PATH))
    for name in [config.init_path] if config.init_path else ["docker-init", "tini-static"]:
        with contextlib.suppress(InitError):
            return os.fsdecode(_find_program(name, path))
    return ""


NETWORK_STATS = ("rx_bytes", "rx_packets", "rx_errors", "rx_dropped",
                 "tx_bytes", "tx_packets", "tx_errors", "tx_dropped")


def interface_counters(pid: int) -> dict[str, dict[str, int]]:
    """What has gone through each network interface that a process sees, but for those that Docker has not
    given it; proc_pid_net(5)."""
    rows = (line.split() for line in read_text(f"/proc/{pid}/net/dev").replace(":", " ").splitlines()[2:])
    return {row[0]: dict(zip(NETWORK_STATS, map(int, row[1:5] + row[9:13])))
            for row in rows if row[0].startswith("eth")}


def list_processes(arguments: str, pids: list[int]) -> tuple[list[str], list[list[str]]]:
    """(titles, rows) of the processes `pids` from ps with `arguments`, which must show a column PID.

    Where ps is missing or too small to know the common arguments, /proc tells what `ps -ef` would."""
    for key, title in re.findall(r"\s+([^\s]*)=\s*(PID[^\s]*)", arguments):
        if key != "pid":
            raise BadParameter(f'specifying "{key}={title}" is not allowed')
    try:
        chosen = "-q" + ",".join(map(str, pids))
        text = _ps([*arguments.split(" "), chosen]) or _ps(arguments.split(" "))  # some do not go with -q
    except (DockerError, OSError) as error:
        if arguments == "-ef":
            return PROCESS_TITLES, list(filter(None, map(_process_row, pids)))
        raise DockerError(f"ps: {getattr(error, 'strerror', None) or error}") from None
    head, *lines = text.split("\n")
    titles = head.split()
    if "PID" not in titles:
        raise DockerError("Couldn't find PID field in ps output")
    column, last, rows, wanted = titles.index("PID"), len(titles) - 1, [], False
    for fields in filter(None, map(str.split, lines)):
        pid = fields[column] if column < len(fields) else ""
        if pid != "-":  # with "m" the lines below a process are its threads
            wanted = pid.isdecimal() and int(pid) in pids
        if wanted:
            rows.append([*fields[:last], " ".join(fields[last:])])
    return titles, rows


def _ps(arguments: list[str]) -> str:
    """What ps prints; "" when it takes no -q among `arguments`, else DockerError with the first line of its
    complaint."""
    import subprocess
    done = subprocess.run(["ps", *arguments], stdin=subprocess.DEVNULL, capture_output=True, errors="replace",
                          check=False)
    if done.returncode and arguments[-1].startswith("-q"):
        return ""
    if done.returncode:
        raise DockerError(done.stderr.partition("\n")[0] or f"exit status {done.returncode}")
    return done.stdout


PROCESS_TITLES = ["UID", "PID", "PPID", "C", "STIME", "TTY", "TIME", "CMD"]


def _process_row(pid: int) -> Optional[list[str]]:
    """A line of `ps -ef`, from proc(5); None when the process has ended."""
    import pwd
    name, _, text = read_text(f"/proc/{pid}/stat").rpartition(")")
    if not text:
        return None
    fields = text.split()
    uid = re.search(r"^Uid:\s+\d+\s+(\d+)", read_text(f"/proc/{pid}/status"), re.MULTILINE)
    user = uid[1] if uid else "?"
    with contextlib.suppress(KeyError, ValueError):
        user = pwd.getpwuid(int(user)).pw_name
    terminal, ticks = int(fields[4]), os.sysconf("SC_CLK_TCK")
    used = (int(fields[11]) + int(fields[12])) // ticks
    age = max(1, int(time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / ticks))
    started = time.localtime(time.time() - age)
    words = read_text(f"/proc/{pid}/cmdline").replace("\0", " ").strip()
    return [user, str(pid), fields[1], str(100 * used // age),
            time.strftime("%H:%M" if age < 86400 else "%b%d", started),
            f"pts/{os.minor(terminal)}" if 136 <= os.major(terminal) <= 143 else "?",
            f"{used // 3600:02}:{used // 60 % 60:02}:{used % 60:02}", words or f"[{name.partition('(')[2]}]"]


class ExecInstance:
    """A further process in a running container: made, started once, and known for a while after its end.

    `config` is the body of POST /containers/NAME/exec, `exit_code` None until the process has ended or could
    not be started."""

    def __init__(self, container: Container, config: dict[str, Any]) -> None:
        self.id = secrets.token_hex(32)
        self.container, self.config = container, config
        self.command = " ".join([config["Cmd"][0], " ".join(config["Cmd"][1:])])
        self.keys = parse_detach_keys(config["DetachKeys"] or DETACH_KEYS, "escape")
        self.streams = Streams(container.parts.pump, None)
        self.streams.on_finished = self._streams_finished
        self.size: list[int] = config["ConsoleSize"] or [0, 0]
        self.running = False
        self.exit_code: Optional[int] = None
        self.ended_at = 0.0     # by the monotonic clock
        self.pid = 0
        self._process: Optional[Process] = None
        self.on_end: Callable[[], None] = lambda: None  # its output is complete then; may not wait
        self._give_up_timer: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    @property
    def key(self) -> str:
        """What names it towards the shim."""
        return f"{self.container.id}/{self.id}"

    def event(self, action: str, **attributes: str) -> None:
        """Tell the daemon's listeners."""
        self.container.event(action, execID=self.id, **attributes)

    def start(self) -> None:
        """Start the process; returns when its execve has succeeded.

        Conflict where the container does not run or this is not the first start, CommandError where the
        command cannot be executed."""
        with self.container.lock:
            self.container.require_exec(self.container.id)
            if self.running or self.exit_code is not None:
                state = "is already running" if self.running else "has already run"
                raise Conflict(f"Error: Exec command {self.id} {state}")
            self.running = True
        self.event("exec_start: " + self.command)
        try:
            self._start()
        except BaseException as error:
            self._set_end(127 if getattr(error, "code", 0) == 127 else 126)
            raise

    def _start(self) -> None:
        container, parts = self.container, self.container.parts
        if not (self.config["WorkingDir"] or "/").startswith("/"):
            raise StartError("OCI runtime exec failed: exec failed: Cwd must be an absolute path: unknown",
                             126)
        with contextlib.ExitStack() as held:
            with container.lock:  # not during the start: a container may be paused or killed meanwhile
                target = os.dup(container.require_exec(container.id).pidfd)
                held.callback(os.close, target)
                spec = container.exec_spec(self.key, self.config, self.size)
                if spec.cgroup_fd is not None:
                    cgroup = os.dup(spec.cgroup_fd)
                    held.callback(os.close, cgroup)
                    spec = spec._replace(cgroup_fd=cgroup)
            wanted = {number for number, name in STREAM_NAMES.items() if self.config["Attach" + name.title()]}
            process, ours = launch(parts.driver, spec, self.config["AttachStdin"], wanted, target)
        self._process, self.pid = process, process.pid
        self.streams.connect(ours)
        process.streams = self.streams.copies
        if spec.tty and tuple(self.size) != spec.console_size:  # resized meanwhile
            self.streams.resize(*self.size)
        process.deliver(self._process_ended)

    def resize(self, height: int, width: int) -> None:
        """Set the terminal's size in characters, before the start too; NotFound after the end."""
        if self.exit_code is not None:
            raise NotFound("no such exec")
        self.size = [height, width]
        self.streams.resize(height, width)

    def attach(self, job: Job, raw: bool) -> None:
        """Start the process with the client's connection as its streams; what keeps it from starting is told
        there."""
        config = self.config
        subscriber = self.streams.subscribe(
            {number for number, name in STREAM_NAMES.items() if config["Attach" + name.title()]})
        attachment = Attachment(self.streams, job, subscriber, raw, self.keys if config["Tty"] else b"")
        try:
            try:
                self.start()
            except (DockerError, OSError) as error:
                attachment.queue(STDOUT, f"{error}\r\n".encode())
                subscriber.wanted, subscriber.ended = set(), True
            attachment.run(config["AttachStdin"], None if config["Tty"] else self.close_stdin)
            if attachment.detached:
                self.event("exec_detach")
        finally:
            subscriber.close()

    def close_stdin(self) -> None:
        """End the process's standard input."""
        self.streams.close_stdin()
        process = self._process
        if process is not None:
            process.shim.post("drop", key=self.key, name="stdin")

    # The end: when the process has ended and its output has been read, or 2 seconds later where something in
    # the background still holds it.  Threads that must not wait come through here.

    def _process_ended(self, process: Process) -> None:
        assert process.end is not None
        self._set_end(process.end["status"])
        if self.streams.finished.is_set():
            self._finish()
        else:
            self._give_up_timer = self.container.parts.later(2, self._finish)

    def _streams_finished(self) -> None:
        if self.exit_code is not None:
            self._finish()

    def _set_end(self, code: int) -> None:
        self.container.execs.pop(self.id, None)
        self.ended_at, self.exit_code, self.running = time.monotonic(), code, False

    def _finish(self) -> None:
        with self._lock:
            process, self._process = self._process, None
        if process is not None:
            self._give_up_timer()
            self.event("exec_die", exitCode=str(self.exit_code))
            self.streams.close_stdin()
            self.streams.end_subscribers()
            self.container.parts.background(process.forget)
            self.on_end()

    def inspect(self) -> dict[str, Any]:
        """The instance as GET /exec/ID/json of the newest API shows it."""
        config = self.config
        return {
            "ID": self.id,
            "Running": self.running,
            "ExitCode": self.exit_code,
            "ProcessConfig": {
                "tty": config["Tty"],
                "entrypoint": config["Cmd"][0],
                "arguments": config["Cmd"][1:],
                "privileged": config["Privileged"],
                **({"user": config["User"]} if config["User"] else {}),
            },
            "OpenStdin": config["AttachStdin"],
            "OpenStderr": config["AttachStderr"],
            "OpenStdout": config["AttachStdout"],
            "CanRemove": self.age() > EXEC_KEPT,
            "ContainerID": self.container.id,
            "DetachKeys": base64.b64encode(self.keys if config["DetachKeys"] else b"").decode(),
            "Pid": self.pid,
        }

    def age(self) -> float:
        """Seconds since its end; 0 before."""
        return 0 if self.exit_code is None else time.monotonic() - self.ended_at

    @property
    def gone(self) -> bool:
        """Whether nobody is told of it any more: its container has ended before its start, or has been
        removed, or its end is long past."""
        never = self.exit_code is None and self.id not in self.container.execs
        return never or self.container.state.removed or self.age() > 2 * EXEC_KEPT


# Health checks

HEALTH_LOG = 5                  # results that are kept
HEALTH_OUTPUT = 4096            # bytes of a probe's output that are
HEALTH_DEFAULTS = {"Interval": 30.0, "Timeout": 30.0, "StartPeriod": 0.0, "StartInterval": 5.0}  # seconds
HEALTH_RETRIES = 3
RESTART_UNHEALTHY = "dockerd.py.restart-unhealthy"  # the label of a container that is to be restarted then


def health_command(config: dict[str, Any]) -> list[str]:
    """The command of the health check in a container's Config; [] where there is none."""
    kind, *words = (config.get("Healthcheck") or {}).get("Test") or ["NONE"]
    if kind == "CMD-SHELL":
        return [*(config.get("Shell") or ["/bin/sh", "-c"]), *words]
    if kind not in ("CMD", "NONE"):
        log.warning("Unknown healthcheck type '%s' (expected 'CMD')", kind)
    return words if kind == "CMD" else []


class Beginning(Subscriber):
    """A subscriber that keeps up always: it keeps the first `limit` bytes, and one that tells of more."""

    def __init__(self, streams: Streams, limit: int) -> None:
        super().__init__(streams, set(STREAM_NAMES))
        self.limit, self._kept_bytes = limit, bytearray()
        with streams.lock:
            streams.subscribers.add(self)

    def wake(self) -> None:
        """Take what has just been queued; the streams' lock is held."""
        for _, data in self.chunks:
            self._kept_bytes += data[:self.limit + 1 - len(self._kept_bytes)]
        self.chunks.clear()
        self.size = 0

    @property
    def text(self) -> str:
        """What has been kept, with an ellipsis for what has not."""
        text = self._kept_bytes[:self.limit].decode(errors="replace")
        return text + "..." * (len(self._kept_bytes) > self.limit)


class Probe(ExecInstance):
    """One run of a health check: an exec whose output is kept."""

    def __init__(self, container: Container, command: list[str]) -> None:
        super().__init__(container, decode_struct({
            "Cmd": command, "AttachStdout": True, "AttachStderr": True,
            "User": container.config.get("User") or ""}, "ExecConfig"))
        self.begun = time.time_ns()
        self.late = False
        self.output = Beginning(self.streams, HEALTH_OUTPUT)

    def end(self) -> None:
        """Its time is over."""
        self.late = True
        with self._lock:
            if self._process is not None:
                with contextlib.suppress(ProcessLookupError):
                    self._process.send_signal(signal.SIGKILL)


class HealthMonitor:
    """The health checks of a container while it runs: one probe after the other, by the daemon's timers and
    workers.  What they find is the state's `health`; the container's lock guards it."""

    def __init__(self, container: Container, command: list[str]) -> None:
        self.container, self.command = container, command
        self._stopped = False
        self._probe: Optional[Probe] = None
        self._launching = False
        self._plan()

    def _seconds(self, key: str) -> float:
        return (self.container.config["Healthcheck"].get(key) or 0) / 1e9 or HEALTH_DEFAULTS[key]

    def _starts(self, now: int) -> bool:
        """Whether failures do not count yet: within the start period, before the first success."""
        state = self.container.state
        age = (now - parse_timestamp(state.started_at)) / 1e9
        return state.health["Status"] == "starting" and age < self._seconds("StartPeriod")

    def _plan(self) -> None:
        delay = self._seconds("StartInterval" if self._starts(time.time_ns()) else "Interval")
        self._give_up = self.container.parts.later(delay, self._run)

    def stop(self) -> None:
        """No further probe, and an end to one that runs; who is not watched counts as unhealthy."""
        self._stopped = True
        self._give_up()
        if self._probe is not None:
            self._probe.end()
        self.container.state.health = {**self.container.state.health, "Status": "unhealthy"}

    def _run(self) -> None:
        """A worker's: begin a probe.  Its end brings _ended, be it its own or by force when it is late."""
        container = self.container
        with container.lock:
            if self._stopped:
                return
            probe = self._probe = Probe(container, self.command)
            self._launching = True
            probe.on_end = functools.partial(container.parts.background, self._ended, probe)
            container.execs[probe.id] = probe
            self._give_up = container.parts.later(self._seconds("Timeout"), probe.end)
        probe.event("exec_create: " + probe.command)
        try:
            probe.start()
        except (DockerError, OSError) as error:
            self._record(probe, -1, str(error))
        finally:
            if probe.late:
                probe.end()
            with container.lock:
                self._launching = False
                container.changed.notify_all()

    def settle(self) -> None:
        """Wait, with the lock given up, while a probe is being launched: in a cgroup that freezes meanwhile
        it would hold a worker for as long."""
        self.container.changed.wait_for(lambda: not self._launching, 10)

    def _ended(self, probe: Probe) -> None:
        if probe.late:
            text = f"Health check exceeded timeout ({go_duration(self._seconds('Timeout'))})"
            self._record(probe, -1, ": ".join(filter(None, (text, probe.output.text))))
        else:
            self._record(probe, probe.exit_code or 0, probe.output.text)

    def _record(self, probe: Probe, code: int, output: str) -> None:
        """Keep the result, tell when the status changes, and go on."""
        container, state = self.container, self.container.state
        probe.output.close()
        with container.lock:
            if self._stopped:
                return
            self._give_up()
            old, streak = state.health, 0
            status = "healthy" if code == 0 else old["Status"]
            if code:
                streak = old["FailingStreak"] + (not self._starts(probe.begun))
                if streak >= (container.config["Healthcheck"].get("Retries") or HEALTH_RETRIES):
                    status = "unhealthy"
            result = {"Start": rfc3339nano(probe.begun), "End": rfc3339nano(time.time_ns()), "ExitCode": code,
                      "Output": output}
            state.health = {"Status": status, "FailingStreak": streak,
                            "Log": [*old["Log"], result][-HEALTH_LOG:]}
            self._plan()
            if status != old["Status"]:
                container.save()
                container.event("health_status: " + status)
                if status == "unhealthy" and container.label_is_set(RESTART_UNHEALTHY):
                    container.restart_unhealthy()


def make_pipes(stdin: bool, outputs: Iterable[int]) -> tuple[dict[str, int], dict[str, int]]:
    """(a process's ends, ours) of its streams by name; /dev/null for those that nobody is to have."""
    theirs, ours = {}, {}
    for number, name in STREAM_NAMES.items():
        if number in outputs:
            ours[name], theirs[name] = os.pipe2(os.O_CLOEXEC)
            with contextlib.suppress(OSError):  # above pipe-user-pages-soft a pipe keeps its 64 KiB
                fcntl.fcntl(ours[name], F_SETPIPE_SZ, 1 << 20)
        else:
            theirs[name] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    if stdin:
        theirs["stdin"], ours["stdin"] = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(ours["stdin"], False)
    else:
        theirs["stdin"] = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
    return theirs, ours


def launch(driver: ExecutionDriver, spec: Spec, stdin: bool, outputs: Iterable[int] = (STDOUT, STDERR),
           target: int = -1, **kept: int) -> tuple[Process, dict[str, int]]:
    """Start `spec`; returns the process and what the shim keeps of it: our ends of its streams, or its
    "console", and what is in `kept`.  Raises what ExecutionDriver.start raises, with all of it closed."""
    theirs, ours = ({}, {}) if spec.tty else make_pipes(stdin, outputs)
    ours.update(kept)
    try:
        process = driver.start(spec, theirs, ours, target)
    except BaseException:
        _close_all_of(ours)
        raise
    finally:
        _close_all_of(theirs)
    if spec.tty:
        ours["console"] = process.console
    return process, ours


def _shell_word(word: str) -> str:
    """A word of a command as the list of containers shows it: quoted when it has spaces or a quote."""
    return "'" + word.replace("'", "\\'") + "'" if " " in word or "'" in word else word


def _close_all_of(fds: dict[str, int]) -> None:
    for fd in fds.values():
        os.close(fd)
    fds.clear()


def _read_in_root(root: int, path: str, limit: int = 16 << 20) -> bytes:
    """The content of a regular file inside a container's root, never of one outside; b"" where there is
    none."""
    try:
        fd = openat2(root, path.lstrip("/"), os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY, 0,
                     RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS)
    except OSError:
        return b""
    try:
        facts = os.fstat(fd)
        return os.read(fd, min(facts.st_size, limit)) if stat.S_ISREG(facts.st_mode) else b""
    finally:
        os.close(fd)


def _fill_init_layer(directory: str, owner: tuple[int, int]) -> None:
    """What Docker puts under every container's own layer: the places that it will mount on.

    What the image has there and above gives way where it is no directory: many a root file system's
    resolv.conf is a link to what systemd makes when it runs.  The kernel keeps it all inside `directory`."""
    confined(directory, _make_mount_places, owner)


def _make_mount_places(owner: tuple[int, int]) -> None:
    directories = ("dev/pts", "dev/shm", "proc", "sys")
    for name in (*directories, "etc/hostname", "etc/hosts", "etc/resolv.conf", "dev/console", ".dockerenv",
                 "etc/mtab"):
        for place in itertools.accumulate(name.split("/"), os.path.join):
            with contextlib.suppress(OSError):  # a directory, which stays, or nothing
                os.unlink(place)
        os.makedirs(name if name in directories else os.path.dirname(name) or ".", 0o755, exist_ok=True)
        with contextlib.suppress(FileExistsError):
            if name == "etc/mtab":
                os.symlink("/proc/mounts", name)
            elif name not in directories:
                os.close(os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY | os.O_CLOEXEC, 0o755))
        for place in itertools.accumulate(name.split("/") if owner != (0, 0) else (), os.path.join):
            if os.lstat(place).st_uid == 0:  # made here: nothing else belongs to the host's root
                os.chown(place, *owner, follow_symlinks=False)


def container_limits(host_config: dict[str, Any], config: Any) -> list[tuple[int, int, int]]:
    """(RLIMIT_*, soft, hard) of a container: the daemon's defaults, overridden by its own.

    A hard limit above the daemon's is cut to that where it may not raise any: without CAP_SYS_RESOURCE."""
    import resource

    limits = {
        **{name: (limit["Soft"], limit["Hard"]) for name, limit in (config.default_ulimits or {}).items()},
        **{limit["Name"]: (limit["Soft"], limit["Hard"]) for limit in host_config.get("Ulimits") or []},
    }
    bounded = CAPABILITIES.index("CAP_SYS_RESOURCE") not in bounding_capabilities()
    taken = []
    for name, (soft, hard) in sorted(limits.items()):
        number = getattr(resource, "RLIMIT_" + name.upper())
        own = resource.getrlimit(number)[1] if bounded else -1
        if own != -1 and not 0 <= hard <= own:
            log.warning("ulimit %s=%d becomes %d: without CAP_SYS_RESOURCE none can be raised", name, hard,
                        own)
            soft, hard = own if soft == -1 else min(soft, own), own
        taken.append((number, soft, hard))
    return taken


def device_node(path: str, facts: os.stat_result, source: str = "") -> dict[str, Any]:
    """A node like the host's `source` at `path`, for the init's plan."""
    return {"to": path, "node": facts.st_mode, "rdev": facts.st_rdev, "owner": [facts.st_uid, facts.st_gid],
            "host_node": source or path}


def container_devices(host_config: dict[str, Any]) -> list[dict[str, Any]]:
    """The nodes of --device, and of all the host's devices for a privileged container."""
    nodes = [device_node(path, facts, source)
             for path, facts, _, source in host_devices(host_config.get("Devices"))]
    if host_config["Privileged"]:
        nodes += _all_host_devices({node["to"] for node in nodes})
    return nodes


def _all_host_devices(taken: set[str]) -> list[dict[str, Any]]:
    """Every node under the host's /dev that no container has by default, except terminals' and mounts'
    own."""
    given = {"/dev/" + name for name, _, _ in DEVICE_NODES} | {"/dev/console", "/dev/ptmx"} | taken
    nodes = []
    for directory, names, files in os.walk("/dev"):
        names[:] = [
            name
            for name in names
            if name not in ("pts", "shm", "mqueue", "fd", ".lxc", ".lxd-mounts", ".udev")
        ]
        for path in (os.path.join(directory, name) for name in files):
            with contextlib.suppress(OSError):
                information = os.lstat(path)
                if path not in given and (
                    stat.S_ISCHR(information.st_mode) or stat.S_ISBLK(information.st_mode)
                ):
                    nodes.append(device_node(path, information))
    return nodes


DETACH_KEYS = "ctrl-p,ctrl-q"
_CONTROL_KEYS = frozenset("abcdefghijklmnopqrstuvwxyz@[\\]^_")


def parse_detach_keys(text: str, what: str = "detach") -> bytes:
    """The bytes of a key sequence such as "ctrl-p,ctrl-q" or "a,b"; BadParameter when it is none."""
    keys = bytearray()
    for key in text.split(","):
        if len(key) == 1:
            keys += key.encode()
        elif len(key) == 6 and key.startswith("ctrl-") and key[5] in _CONTROL_KEYS:
            keys.append(ord(key[5].upper()) - 64)
        else:
            raise BadParameter(f"Invalid {what} keys ({text}) provided")
    return bytes(keys)


class Attachment:
    """One attached client: a loop in its connection's thread between its connection and a process's streams.

    With `raw` the client gets all output as it is.  Nothing in it blocks: input goes on while output waits
    for a slow client, and the other way round."""

    def __init__(self, streams: Streams, job: Job, subscriber: Subscriber, raw: bool,
                 detach_keys: bytes) -> None:
        self.streams, self.job, self.subscriber, self.detach_keys = streams, job, subscriber, detach_keys
        self.stream = job.hijacked
        self.raw = raw
        self.output = bytearray()
        self.input = bytearray()
        self.input_open = True
        self.detached = False
        self._matched = 0
        job.on_cancel(subscriber.wake)

    def queue(self, stream: int, data: bytes) -> None:
        """Frame `data` for the client: raw with a terminal, else behind the 8-byte stream header."""
        if not self.raw:
            self.output += struct.pack(">BxxxI", stream, len(data))
        self.output += data

    def run(self, stdin: bool, close_stdin: Optional[Callable[[], None]]) -> None:
        """Copy until the run is over, the client is gone or detaches, or the job is cancelled.

        With `stdin` the client's input goes to the process; its end calls `close_stdin`, and without one it
        ends the attachment."""
        try:
            while not self.detached and not self.job.cancelled.is_set():
                ended = stdin and not self.input_open and not self.input
                if ended and close_stdin:
                    close_stdin()
                    stdin = ended = False
                over = self.subscriber.ended or ended or not (self.subscriber.wanted or stdin)
                if over and not self.subscriber.waiting and not self.output:
                    return
                self._step(stdin and not over)
        except (BrokenPipeError, ConnectionError):
            if stdin and close_stdin:
                close_stdin()

    def _step(self, stdin: bool) -> None:
        """Wait for whatever can go on, and do it."""
        streams = self.streams
        poll = select.poll()
        client = 0
        if self.input_open and len(self.input) < 1 << 16 and (not stdin or streams.stdin >= 0):
            client |= select.POLLIN
        if self.output:
            client |= select.POLLOUT
        poll.register(self.stream, client)
        if len(self.output) < 1 << 18:
            poll.register(self.subscriber, select.POLLIN)
        if self.input and streams.stdin >= 0:
            poll.register(streams.stdin, select.POLLOUT)
        ready = dict(poll.poll(0 if client & select.POLLIN and self.stream.pending() else None))
        events = ready.get(self.stream.fileno(), 0)
        if events & (select.POLLERR | select.POLLHUP) and not events & select.POLLIN:
            raise ConnectionResetError
        if client & select.POLLIN and (events & select.POLLIN or self.stream.pending()):
            self._read_client(stdin)
        if self.subscriber.fileno() in ready:
            for stream, data in self.subscriber.take():
                self.queue(stream, data)
        self._write_stdin()
        if self.output:
            sent = self.stream.write_some(bytes(memoryview(self.output)[:1 << 16]))
            del self.output[:sent]

    def _read_client(self, stdin: bool) -> None:
        data = self.stream.read_some(1 << 16)
        if data is None:
            return
        if not data:
            self.input_open = False
        elif stdin:
            self.input += self._without_detach_keys(data) if self.detach_keys else data

    def _without_detach_keys(self, data: bytes) -> bytes:
        """`data` up to the detach keys; keys that turn out not to be the sequence are passed on."""
        passed = bytearray()
        for position in range(len(data)):
            byte = data[position]
            if byte == self.detach_keys[self._matched]:
                self._matched += 1
                if self._matched == len(self.detach_keys):
                    self.detached = True
                    break
                continue
            passed += self.detach_keys[:self._matched]
            self._matched = 1 if byte == self.detach_keys[0] else 0
            if not self._matched:
                passed.append(byte)
        return bytes(passed)

    def _write_stdin(self) -> None:
        """Pass the client's input on."""
        if self.input and self.streams.stdin >= 0:
            try:
                del self.input[:os.write(self.streams.stdin, self.input)]
            except BlockingIOError:
                pass
            except OSError:  # the container has closed its end
                self.input.clear()


# ------------------------------------------------------------------------------------------------------------
# Daemon
#
# Puts the parts together: checks the host, locks the data root, loads what is on disk, recovers from what a
# crash left, and declares the jobs that are about containers, events and the system.  Policy and order stand
# here; what a step does stands in the parts.
# ------------------------------------------------------------------------------------------------------------

MINIMUM_KERNEL = (5, 10)        # clone3 into cgroups, close_range, openat2, pidfds
EVENTS_KEPT = 256               # how many past events a new listener can ask for
EVENT_BACKLOG = 4096            # events that may wait for one listener before it is cut off
WORKERS = 4
END_NOT_SEEN = "the exit code is not known: neither daemon nor shim saw the end"


class Workers:
    """A few threads that do what no client waits for: ends of containers, clearing up; and one that hands
    them what is to be done later: restarts, probes."""

    def __init__(self, count: int) -> None:
        import queue
        import sched
        self._tasks: queue.SimpleQueue[tuple[Callable[..., None], tuple[Any, ...]]] = queue.SimpleQueue()
        self._idle = threading.Condition()
        self._unfinished = 0
        self._timers = sched.scheduler(time.monotonic)
        self._numbers = itertools.count()  # no two timers are equal
        self._earlier = threading.Event()
        for number in range(count):
            threading.Thread(target=self._run, name=f"worker-{number}", daemon=True).start()
        threading.Thread(target=self._run_timers, name="timers", daemon=True).start()

    def later(self, seconds: float, function: Callable[..., None], *arguments: Any) -> Callable[[], None]:
        """Submit `function(*arguments)` in so many seconds; a call of the result gives that up."""
        timer = self._timers.enter(seconds, next(self._numbers), self.submit, (function, *arguments))
        self._earlier.set()

        def cancel() -> None:
            with contextlib.suppress(ValueError):  # its time has come
                self._timers.cancel(timer)

        return cancel

    def _run_timers(self) -> None:
        while True:
            self._earlier.clear()
            self._earlier.wait(self._timers.run(blocking=False))

    def submit(self, function: Callable[..., None], *arguments: Any) -> None:
        """Run `function(*arguments)` soon."""
        with self._idle:
            self._unfinished += 1
        self._tasks.put((function, arguments))

    def drain(self, timeout: float) -> bool:
        """Return when all that was submitted is done; False when that takes more than `timeout` seconds."""
        with self._idle:
            return self._idle.wait_for(lambda: not self._unfinished, timeout)

    def _run(self) -> None:
        while True:
            function, arguments = self._tasks.get()
            try:
                function(*arguments)
            except Exception:
                log.exception("a background task failed")
            with self._idle:
                self._unfinished -= 1
                self._idle.notify_all()


class Events:
    """What happened, newest last, and who listens.  A listener that falls too far behind is cut off."""

    def __init__(self) -> None:
        self._lock = threading.Condition()
        self._past: collections.deque[dict[str, Any]] = collections.deque(maxlen=EVENTS_KEPT)
        self._listeners: list[collections.deque[dict[str, Any]]] = []

    def publish(self, kind: str, action: str, actor: str, attributes: dict[str, str]) -> None:
        """Record one event of the API's newest shape and hand it to the listeners."""
        now = time.time_ns()
        event: dict[str, Any] = {
            "Type": kind,
            "Action": action,
            "Actor": {"ID": actor, "Attributes": dict(sorted(attributes.items()))},
            "scope": "local",
            "time": now // 10**9,
            "timeNano": now,
        }
        if kind in ("container", "image"):
            event = {
                "status": action,
                "id": actor,
                **({"from": attributes["image"]} if "image" in attributes else {}),
                **event,
            }
        with self._lock:
            self._past.append(event)
            for listener in self._listeners:
                listener.append(event)
            self._listeners = [listener for listener in self._listeners if len(listener) <= EVENT_BACKLOG]
            self._lock.notify_all()

    def network_event(self, action: str, network: Network, **attributes: str) -> None:
        """An event about a network, with its name and driver."""
        self.publish("network", action, network.id, {**attributes, "name": network.name,
                                                     "type": network.driver})

    def container_event(self, action: str, container: Container, **attributes: str) -> None:
        """An event about a container, with its labels, image and name."""
        labels = container.config.get("Labels") or {}
        image = container.config.get("Image") or container.image_id
        self.publish("container", action, container.id,
                     {**labels, **attributes, "image": image, "name": container.name})

    def image_event(self, action: str, image: str, attributes: dict[str, str]) -> None:
        """An event about an image."""
        self.publish("image", action, image, attributes)

    @job("events")
    def get(self, job: Job) -> None:
        """Past events from `since`, then new ones as they come, until `until` or the client goes."""
        since, until = (self._time(job.env.get(key)) for key in ("since", "until"))
        filters = parse_filters(job.env.get("filters"))
        if until and since > until:
            raise BadParameter(f"`since` time ({since // 10**9}) cannot be after `until` time "
                               f"({until // 10**9})")
        listener: collections.deque[dict[str, Any]] = collections.deque()
        with self._lock:
            past = [event for event in self._past if since and event["timeNano"] >= since]
            self._listeners.append(listener)
        try:
            job.on_cancel(self._wake)
            job.ready()
            for event in itertools.chain(past, self._follow(listener, until, job.cancelled)):
                if until and event["timeNano"] > until:
                    break
                if event_matches(event, filters):
                    job.stdout.write(json.dumps(event, separators=(",", ":")).encode() + b"\n")
        finally:
            with self._lock:
                self._listeners = [other for other in self._listeners if other is not listener]

    @staticmethod
    def _time(value: Any) -> int:
        return parse_timestamp(str(value)) if value not in (None, "", "0", 0) else 0

    def _wake(self) -> None:
        with self._lock:
            self._lock.notify_all()

    def _listens(self, listener: collections.deque[dict[str, Any]]) -> bool:
        return any(other is listener for other in self._listeners)

    def _follow(self, listener: collections.deque[dict[str, Any]], until: int,
                cancelled: threading.Event) -> Iterator[dict[str, Any]]:
        """Events as they come, in batches that are taken under the lock and sent without it."""
        while True:
            with self._lock:
                remaining = max(0.0, (until - time.time_ns()) / 1e9) if until else None
                self._lock.wait_for(
                    lambda: listener or cancelled.is_set() or not self._listens(listener), remaining
                )
                batch = list(listener)
                listener.clear()
                over = cancelled.is_set() or not self._listens(listener)
            yield from batch
            if over or (until and time.time_ns() >= until):
                return

    @job("log")
    def log(self, job: Job) -> None:
        """Publish an event from outside: args are action, id and where it comes from, as in Docker 1.2.0."""
        if len(job.args) != 3:
            raise BadParameter(f"usage: {job.name} ACTION ID FROM")
        action, actor, image = job.args
        self.publish("container", action, actor, {"image": image})

    @job("subscribers_count")
    def subscribers_count(self, job: Job) -> None:
        """How many listeners there are now."""
        job.reply({"Count": self.count})

    @property
    def count(self) -> int:
        """How many listeners there are now."""
        return len(self._listeners)


def event_matches(event: dict[str, Any], filters: dict[str, list[str]]) -> bool:
    """Whether `event` is among those that `filters` of GET /events ask for: all keys, and any value of each,
    but every label.  Objects go by a beginning of their id or name, images by id or name with or without a
    tag."""
    actor, kind, action = event["Actor"]["ID"], event["Type"], event["Action"]
    attributes = event["Actor"]["Attributes"]
    name = attributes.get("name", "")
    image = name if kind == "image" else attributes.get("image", "")
    untagged = image[:image.find(":", image.rfind("/") + 1)] if ":" in image[image.rfind("/") + 1:] else image

    def of_kind(wanted: str) -> Callable[[str], bool]:
        return lambda value: kind == wanted and (actor.startswith(value) or name.startswith(value))

    matches: dict[str, Callable[[str], bool]] = {
        "daemon": lambda value: kind == "daemon" and value in (actor, name),
        "event": lambda value: value == action or action.startswith(value + ":"),
        "image": lambda value: kind in ("container", "image") and value in (actor, image, untagged),
        "scope": lambda value: value == event["scope"],
        "type": lambda value: value == kind,
        **{key: of_kind(key) for key in ("container", "network", "volume")},
    }
    return matches_labels(filters.get("label", ()), attributes) and all(
        any(map(one, filters[key])) for key, one in matches.items() if filters.get(key))


class ContainerTable:
    """All containers by id and name; its lock is held for look-ups only."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._by_id: dict[str, Container] = {}
        self._names: dict[str, str] = {}  # name -> id; reserved before the container exists

    def find(self, name: str) -> Container:
        """The container of this id, name (with or without a slash) or unambiguous id prefix; NotFound."""
        with self._lock:
            found = self._by_id.get(name) or self._by_id.get(self._names.get(name.lstrip("/"), ""))
            if found is not None:
                return found
            matching = [container for key, container in self._by_id.items() if name and key.startswith(name)]
        if len(matching) > 1:
            raise BadParameter(f"Multiple IDs found with provided prefix: {name}")
        if not matching:
            raise NotFound(f"No such container: {name or ' '}")
        return matching[0]

    def reserve(self, name: str, container_id: str) -> None:
        """Take `name`, perhaps with a slash, for a container; BadParameter when it is none, Conflict when it
        is taken."""
        bare = name[name.startswith("/"):]
        if not NAME_PATTERN.fullmatch(bare):
            raise BadParameter(
                f"Invalid container name ({name}), only [a-zA-Z0-9][a-zA-Z0-9_.-] are allowed")
        with self._lock:
            holder = self._names.setdefault(bare, container_id)
        if holder != container_id:
            raise name_conflict(bare, holder)

    def release(self, name: str) -> None:
        """Give a reserved name back."""
        with self._lock:
            self._names.pop(name, None)

    def rename(self, container: Container, name: str) -> None:
        """Give it another name; Conflict when that is taken."""
        with container.lock:
            old = container.name
            if container.state.removing or container.state.dead:
                raise Conflict("container is marked for removal and cannot be renamed")
            if name == old:
                raise BadParameter("Renaming a container with the same name as its current name")
            try:
                self.reserve("/" + name, container.id)
            except (BadParameter, Conflict) as error:
                raise type(error)(f"Error when allocating new name: {error}") from None
            container.take_name("/" + name)
            try:
                container.save(needed=True)
            except OSError:
                container.take_name("/" + old)
                self.release(name)
                raise
            self.release(old)
            container.event("rename", oldName="/" + old)

    def add(self, container: Container) -> None:
        """Let the container be found."""
        with self._lock:
            self._by_id[container.id] = container
            self._names[container.name] = container.id

    def discard(self, container: Container) -> None:
        """The container has been removed."""
        with self._lock:
            self._by_id.pop(container.id, None)
            if self._names.get(container.name) == container.id:
                del self._names[container.name]

    def all(self) -> list[Container]:
        """All containers, the newest first."""
        with self._lock:
            return sorted(
                self._by_id.values(), key=lambda container: container.record["Created"], reverse=True
            )


class ContainerJobs:
    """The jobs about containers: each finds its container and lets it act."""

    def __init__(self, parts: Parts, images: Any, table: ContainerTable, events: Events) -> None:
        self.parts, self.images, self.table, self.events = parts, images, table, events
        self._pruning = threading.Lock()

    @job("create")
    def create(self, job: Job) -> None:
        """Make a container of env `body`, the body of POST /containers/create; args: perhaps its name."""
        body = job.env.get("body") or {}
        name = (job.args[0] if job.args else "").lstrip("/")
        asked = decode_struct(body, "ContainerConfigWrapper")["Image"]
        image = self.images.resolve(asked or "", job.env.get("platform") or "")
        config, host_config, networking, warnings = container_config(body, image.config, self.parts.config)
        oci_runtime(self.parts.config, host_config["Runtime"])
        if self.parts.idmap and host_config["UsernsMode"] != "host":
            check_rules(USERNS_RULES, host_config)
        warnings = warnings + self.parts.cgroups.adapt(host_config)
        for key in ("IpcMode", "NetworkMode", "PidMode"):
            kind, _, other = host_config[key].partition(":")
            if other:
                try:
                    host_config[key] = f"{kind}:{self.table.find(other).id}"
                except NotFound as error:
                    raise BadParameter(str(error)) from None
        container_id = secrets.token_hex(32)
        if not config.get("Hostname"):
            config["Hostname"] = "" if host_config["NetworkMode"] == "host" else container_id[:12]
        name = self._reserve_name(name, container_id)
        try:
            networks = container_networks(host_config["NetworkMode"], networking["EndpointsConfig"] or {},
                                          config.get("MacAddress") or "", self.parts.networks)
            self._check_links(host_config, name)
            container = Container.create(self.parts, container_id, name, image, config, host_config, networks)
        except BaseException:
            self.table.release(name)
            raise
        self.table.add(container)
        container.event("create")
        job.reply({"Id": container_id, "Warnings": warnings})

    def _check_links(self, host_config: dict[str, Any], name: str) -> None:
        """Write links as inspect shows them; BadParameter for one whose target there is not."""
        links = []
        for link in host_config["Links"] or []:
            target, _, alias = link.partition(":")
            try:
                child = self.table.find(target.lstrip("/"))
            except NotFound as error:
                raise BadParameter(f"could not get container for {target}: {error}") from None
            links.append(f"/{child.name}:/{name}/{alias.rpartition('/')[2] or child.name}")
        host_config["Links"] = links or host_config["Links"]

    def _reserve_name(self, name: str, container_id: str) -> str:
        """The name asked for, or a random one that is free."""
        if name:
            self.table.reserve(name, container_id)
            return name
        while True:
            with contextlib.suppress(Conflict):
                name = random_name()
                self.table.reserve(name, container_id)
                return name

    @job("start")
    def start(self, job: Job) -> None:
        """Start the container named by the argument."""
        self.table.find(job.args[0]).start()

    @job("stop")
    def stop(self, job: Job) -> None:
        """Stop it: env `t` seconds, `signal`."""
        self.table.find(job.args[0]).stop(*self._stop_arguments(job))

    @job("restart")
    def restart(self, job: Job) -> None:
        """Stop and start it: env `t` seconds, `signal`."""
        self.table.find(job.args[0]).restart(*self._stop_arguments(job))

    @staticmethod
    def _stop_arguments(job: Job) -> tuple[Optional[int], Optional[int]]:
        wanted = job.env.get("signal")
        timeout = job.env.get("t")
        return parse_signal(wanted) if wanted else None, None if timeout in (None, "") else job.env.get_int(
            "t", 10
        )

    @job("kill")
    def kill(self, job: Job) -> None:
        """Send it a signal: the second argument, by default KILL."""
        try:
            container = self.table.find(job.args[0])
        except NotFound as error:
            raise NotFound(f"Cannot kill container: {job.args[0]}: {error}") from None
        container.kill(parse_signal(job.args[1]) if len(job.args) > 1 and job.args[1] else signal.SIGKILL)

    @job("pause")
    def pause(self, job: Job) -> None:
        """Freeze its processes."""
        self.table.find(job.args[0]).pause()

    @job("unpause")
    def unpause(self, job: Job) -> None:
        """Thaw its processes."""
        self.table.find(job.args[0]).unpause()

    @job("update")
    def update(self, job: Job) -> None:
        """Change its resources and restart policy to those of env `body`."""
        job.reply({"Warnings": self.table.find(job.args[0]).update(job.env.get("body") or {}) or None})

    @job("top")
    def top(self, job: Job) -> None:
        """Its processes; env `ps_args`."""
        job.reply(self.table.find(job.args[0]).top(job.env.get("ps_args") or ""))

    @job("rename")
    def rename(self, job: Job) -> None:
        """Give it env `name`."""
        container, name = self.table.find(job.args[0]), job.env.get("name") or ""
        if not name:
            raise BadParameter("Neither old nor new names may be empty")
        self.table.rename(container, name[name.startswith("/"):])

    @job("container_prune")
    def prune(self, job: Job) -> None:
        """Remove what does not run and matches env `filters`: until, label, label!."""
        filters = parse_filters(job.env.get("filters"), ("label", "label!", "until"))
        latest = until_filter(filters)
        if not self._pruning.acquire(blocking=False):
            raise Conflict("a prune operation is already running")
        deleted, reclaimed = [], 0
        with contextlib.ExitStack() as stack:
            stack.callback(self._pruning.release)
            for container in self.table.all():
                if job.cancelled.is_set():
                    break
                if container.state.running or parse_timestamp(container.record["Created"]) > latest \
                        or not container_matches(container, filters, self.images):
                    continue
                try:
                    size = container.parts.layers.rw_size(container.id)[0]
                    container.remove()
                except DockerError as error:  # started or removed meanwhile
                    log.warning("failed to prune container %s: %s", container.id, error)
                    continue
                deleted.append(container.id)
                reclaimed += size
        self.events.publish("container", "prune", "", {"reclaimed": str(reclaimed)})
        job.reply({"ContainersDeleted": deleted or None, "SpaceReclaimed": reclaimed})

    @job("wait")
    def wait(self, job: Job) -> None:
        """Wait for env `condition`; the reply is the exit code."""
        job.reply(self.table.find(job.args[0]).wait(job, job.env.get("condition") or "not-running"))

    @job("attach")
    def attach(self, job: Job) -> None:
        """Connect job.hijacked with its streams."""
        self.table.find(job.args[0]).attach(job)

    @job("logs")
    def logs(self, job: Job) -> None:
        """Write what it printed to stdout and stderr."""
        self.table.find(job.args[0]).logs(job)

    @job("resize")
    def resize(self, job: Job) -> None:
        """Set the size of its terminal: env `h` and `w` in characters."""
        self.table.find(job.args[0]).resize(job.env.get_int("h", 0), job.env.get_int("w", 0))

    @job("delete")
    def delete(self, job: Job) -> None:
        """Remove it: env `force`, `v`, `link`."""
        if job.env.get_bool("link"):
            raise NotSupported("removing links is not supported yet")
        self.table.find(job.args[0]).remove(job.env.get_bool("force"))

    @job("container_inspect")
    def inspect(self, job: Job) -> None:
        """All about it; env `size` adds its sizes."""
        job.reply(self.table.find(job.args[0]).inspect(job.env.get_bool("size")))

    @job("containers")
    def containers(self, job: Job) -> None:
        """The list of containers: env all, limit, size, filters, since, before."""
        env = job.env
        filters = check_container_filters(parse_filters(env.get("filters") or {}, CONTAINER_FILTERS))
        for key in ("since", "before"):
            if env.get(key):
                filters.setdefault(key, []).append(env[key])
        limit = env.get_int("limit", 0)
        everything = env.get_bool("all") or limit > 0 or "status" in filters or any(
            env.get(key) for key in ("since", "before"))  # before 1.20 these were no filters
        bounds = {key: max(self.table.find(name).record["Created"] for name in filters.pop(key))
                  for key in ("since", "before") if key in filters}
        listed = [container for container in self.table.all()
                  if (everything or container.state.running)
                  and container.record["Created"] > bounds.get("since", "")
                  and ("before" not in bounds or container.record["Created"] < bounds["before"])
                  and container_matches(container, filters, self.images)]
        job.reply([container.summary(env.get_bool("size"), self._image_name(container))
                   for container in listed[:limit if limit > 0 else None]])

    def _image_name(self, container: Container) -> str:
        """The name that the container was made with, while that still means its image; else the id."""
        name = container.config.get("Image") or ""
        try:
            return name if self.images.resolve(name).id == container.image_id else container.image_id
        except DockerError:
            return container.image_id


class Statistics:
    """The job `stats`: one thread takes a sample of every container that somebody listens to, once a second,
    and only while somebody does.  A slow listener misses samples, and holds up nobody."""

    def __init__(self, table: ContainerTable) -> None:
        self.table = table
        self._changed = threading.Condition()
        self._listened: collections.Counter[Container] = collections.Counter()
        self._samples: dict[Container, dict[str, Any]] = {}
        self._sampling = False

    @job("stats")
    def stats(self, job: Job) -> None:
        """Write a sample a second; without env `stream` one, which knows the one before it, and with env
        `one-shot` one at once, which does not."""
        container = self.table.find(job.args[0])
        stream, once = job.env.get_bool("stream"), job.env.get_bool("one-shot")
        if stream and once:
            raise BadParameter("cannot have stream=true and one-shot=true")
        if once or not (stream or container.state.running):
            self._write(job, container.usage(system_cpu()), {})
            return
        job.on_cancel(self._wake)
        if stream:
            job.ready()
        before: dict[str, Any] = {}
        with self._listening(container):
            for sample in self._follow(container, job.cancelled):
                if stream or before:
                    self._write(job, sample, before)
                if before and not stream:
                    return
                before = sample

    @staticmethod
    def _write(job: Job, sample: dict[str, Any], before: dict[str, Any]) -> None:
        line = {**sample, "preread": before.get("read", ZERO_TIME),
                "precpu_stats": before.get("cpu_stats", NO_CPU_STATS)}
        job.stdout.write(json.dumps(line, separators=(",", ":")).encode() + b"\n")

    @contextlib.contextmanager
    def _listening(self, container: Container) -> Iterator[None]:
        with self._changed:
            self._listened[container] += 1
            if not self._sampling:
                self._sampling = True
                threading.Thread(target=self._sample, name="stats", daemon=True).start()
        try:
            yield
        finally:
            with self._changed:
                self._listened[container] -= 1
                self._listened += collections.Counter()  # forgets who has no listener

    def _follow(self, container: Container, cancelled: threading.Event) -> Iterator[dict[str, Any]]:
        """The container's samples as they come, until it is removed or the listener has gone."""
        seen: dict[str, Any] = {}
        while True:
            with self._changed:
                while not (cancelled.is_set() or container.state.removed
                           or self._samples.get(container, seen) is not seen):
                    self._changed.wait()
                seen = self._samples.get(container, seen)
            if cancelled.is_set() or container.state.removed:
                return
            yield seen

    def _wake(self) -> None:
        with self._changed:
            self._changed.notify_all()

    def _sample(self) -> None:
        while True:
            begin, system = time.monotonic(), system_cpu()
            with self._changed:
                containers = list(self._listened)
            samples = {}
            for container in containers:
                with contextlib.suppress(OSError, ValueError, LookupError):  # it ends at this moment
                    samples[container] = container.usage(system)
            with self._changed:
                self._samples = samples
                self._sampling = bool(self._listened)
                self._changed.notify_all()
                if not self._sampling:
                    return
            time.sleep(max(0.1, begin + 1 - time.monotonic()))


def system_cpu() -> dict[str, int]:
    """Nanoseconds that all processors have worked and waited, and how many there are; proc_stat(5)."""
    total, *rest = read_text("/proc/stat").splitlines()
    return {"system_cpu_usage": sum(map(int, total.split()[1:8])) * 10**7,
            "online_cpus": sum(line.startswith("cpu") for line in rest)}


class ExecJobs:
    """The exec instances of all containers, and the jobs about them."""

    def __init__(self, table: ContainerTable) -> None:
        self.table = table
        self._lock = threading.Lock()
        self._by_id: dict[str, ExecInstance] = {}

    def _find(self, name: str) -> ExecInstance:
        found = self._by_id.get(name)
        if found is None or found.gone:
            raise NotFound(f"No such exec instance: {name}")
        return found

    @job("exec_create")
    def create(self, job: Job) -> None:
        """Make an instance of env `body`, an ExecConfig, in the container named by the argument."""
        container, config = self.table.find(job.args[0]), decode_struct(job.env.get("body"), "ExecConfig")
        if not config["Cmd"]:
            raise BadParameter("No exec command specified")
        config["User"] = config["User"] or container.config.get("User") or ""
        instance = ExecInstance(container, config)
        with container.lock:
            container.require_exec(container.name)
            container.execs[instance.id] = instance
        with self._lock:
            self._by_id = {key: other for key, other in self._by_id.items() if not other.gone}
            self._by_id[instance.id] = instance
        instance.event("exec_create: " + instance.command)
        job.reply({"Id": instance.id})

    @job("exec_start")
    def start(self, job: Job) -> None:
        """Start it as env `body`, an ExecStartCheck, says: detached, or with job.hijacked as its streams."""
        instance, check = self._find(job.args[0]), decode_struct(job.env.get("body"), "ExecStartCheck")
        with instance.container.lock:
            instance.container.require_exec(instance.container.id)
        if check["Tty"] and check["ConsoleSize"]:
            instance.size = check["ConsoleSize"]
        if check["Detach"]:
            instance.start()
        else:
            job.ready(tty=check["Tty"])
            instance.attach(job, check["Tty"])

    @job("exec_resize")
    def resize(self, job: Job) -> None:
        """Set the size of its terminal: env `h` and `w` in characters."""
        self._find(job.args[0]).resize(job.env.get_int("h", 0), job.env.get_int("w", 0))

    @job("exec_inspect")
    def inspect(self, job: Job) -> None:
        """All about it."""
        job.reply(self._find(job.args[0]).inspect())


NETWORK_FILTERS = {
    "driver": lambda network, value: value == network.driver,
    "id": lambda network, value: value in network.id,
    "name": lambda network, value: value in network.name,
    "scope": lambda network, value: value == "local",
    "type": lambda network, value: (value == "custom") == network.is_user_defined,
    "dangling": lambda network, value: (value in ("1", "true")) == (
        network.is_user_defined and not network.endpoints),
}


class NetworkJobs:
    """The jobs about networks, and the network driver's of Docker 1.2.0."""

    def __init__(self, networks: Networks, table: ContainerTable, events: Events) -> None:
        self.networks, self.table, self.events = networks, table, events

    @job("networks")
    def networks_list(self, job: Job) -> None:
        """The networks that match env `filters`."""
        filters = parse_filters(job.env.get("filters"), (*NETWORK_FILTERS, "label"))
        for value in filters.get("type", []):
            if value not in ("custom", "builtin"):
                raise BadParameter(f"invalid filter 'type={value}'")
        found = [network for network in self.networks.all() if matches_labels(
            filters.get("label", ()), network.record["Labels"]) and all(
            any(NETWORK_FILTERS[name](network, value) for value in values)
            for name, values in filters.items() if name != "label")]
        job.reply([network.to_api(containers=False) for network in found])

    @job("network_inspect")
    def inspect(self, job: Job) -> None:
        """One network; env `scope`."""
        if job.env.get("scope") not in (None, "", "local"):
            raise NotFound(f"network {job.args[0]} not found")
        job.reply(self.networks.find(job.args[0]).to_api())

    @job("network_create")
    def create(self, job: Job) -> None:
        """Make a network of env `body`."""
        body = decode_struct(job.env.get("body"), "NetworkCreate")
        if body["Ingress"] or body["Scope"] == "swarm" or body["ConfigOnly"]:
            raise Unavailable("This node is not a swarm manager. Use \"docker swarm init\" or \"docker swarm "
                              "join\" "
                              "to connect this node to swarm and try again.")
        network = self.networks.create(body)
        self.events.network_event("create", network)
        job.reply({"Id": network.id, "Warning": ""})

    @job("network_delete")
    def delete(self, job: Job) -> None:
        """Remove a network."""
        network = self.networks.find(job.args[0])
        self.networks.remove(network)
        self.events.network_event("destroy", network)

    @job("network_prune")
    def prune(self, job: Job) -> None:
        """Remove the networks that no container is on and that match env `filters`."""
        filters = parse_filters(job.env.get("filters"), ("label", "label!", "until"))
        latest, deleted = until_filter(filters), []
        named = {name for container in self.table.all()
                 for name in container.record["NetworkSettings"]["Networks"]}
        for network in self.networks.all():
            labels = network.record["Labels"]
            if (network.is_user_defined and network.name not in named
                    and parse_timestamp(network.record["Created"]) <= latest
                    and matches_labels(filters.get("label", ()), labels)
                    and not any(matches_labels([value], labels) for value in filters.get("label!", ()))):
                with contextlib.suppress(DockerError):  # taken meanwhile
                    self.networks.remove(network)
                    self.events.network_event("destroy", network)
                    deleted.append(network.name)
        self.events.publish("network", "prune", "", {"reclaimed": "0"})
        job.reply({"NetworksDeleted": deleted or None})

    @job("network_connect")
    def connect(self, job: Job) -> None:
        """Put the container of env `body` on the network."""
        body = decode_struct(job.env.get("body"), "NetworkConnect")
        network = self.networks.find(job.args[0])
        self.table.find(body["Container"]).connect(network, body["EndpointConfig"])

    @job("network_disconnect")
    def disconnect(self, job: Job) -> None:
        """Take the container of env `body` off the network."""
        body = decode_struct(job.env.get("body"), "NetworkDisconnect")
        network = self.networks.find(job.args[0])
        try:
            container = self.table.find(body["Container"])
        except NotFound:
            if body["Force"]:
                raise NotFound(f"endpoint {body['Container']} not found") from None
            raise
        container.disconnect(network)


class SystemJobs:
    """The jobs about the daemon itself: info and version."""

    def __init__(self, daemon: Daemon) -> None:
        self.daemon = daemon

    @job("info")
    def info(self, job: Job) -> None:
        """GET /info of the newest API."""
        daemon = self.daemon
        config, uname = daemon.config, os.uname()
        containers = daemon.containers.all()
        states = [container.state.status for container in containers]
        release = _os_release()
        cdi_directories = config.cdi_spec_dirs or CDI_DIRECTORIES
        forwards = read_text("/proc/sys/net/ipv4/ip_forward").strip() == "1"
        job.reply(
            {
                "ID": daemon.id,
                "Containers": len(containers),
                "ContainersRunning": states.count("running"),
                "ContainersPaused": states.count("paused"),
                "ContainersStopped": len(states) - states.count("running") - states.count("paused"),
                "Images": daemon.images.count(),
                "Driver": daemon.layers.driver.name,
                "DriverStatus": daemon.layers.driver.status(),
                "Plugins": {
                    "Volume": ["local"],
                    "Network": list(NETWORK_DRIVERS),
                    "Authorization": None,
                    "Log": [name for name in LOG_DRIVERS if name != "none"],
                },
                **daemon.cgroups.info(),
                "IPv4Forwarding": forwards,
                "Debug": config.debug,
                "NFd": len(os.listdir("/proc/self/fd")),
                "NGoroutines": threading.active_count(),
                "SystemTime": rfc3339nano(time.time_ns()),
                "LoggingDriver": config.log_driver,
                "NEventsListener": daemon.events.count,
                "KernelVersion": uname.release,
                "OperatingSystem": release.get("PRETTY_NAME", "Linux"),
                "OSVersion": release.get("VERSION_ID", ""),
                "OSType": "linux",
                "Architecture": uname.machine,
                "IndexServerAddress": "https://index.docker.io/v1/",
                "RegistryConfig": _registry_config(config),
                "NCPU": len(os.sched_getaffinity(0)),
                "MemTotal": machine_memory(),
                "GenericResources": None,
                "DockerRootDir": config.data_root,
                "HttpProxy": config.http_proxy,
                "HttpsProxy": config.https_proxy,
                "NoProxy": config.no_proxy,
                "Name": uname.nodename,
                "Labels": list(config.labels),
                "ExperimentalBuild": config.experimental,
                "ServerVersion": VERSION,
                "Runtimes": {"runc": {"path": "native"}, **config.runtimes},
                "DefaultRuntime": config.default_runtime,
                "Swarm": {
                    "NodeID": "",
                    "NodeAddr": "",
                    "LocalNodeState": "inactive",
                    "ControlAvailable": False,
                    "Error": "",
                    "RemoteManagers": None,
                },
                "LiveRestoreEnabled": config.live_restore,
                "Isolation": "",
                "InitBinary": config.init_path or "docker-init",
                "ContainerdCommit": {"ID": ""},
                "RuncCommit": {"ID": ""},
                "InitCommit": {"ID": ""},
                "SecurityOptions": daemon.security_options,
                "CDISpecDirs": list(cdi_directories),
                "FirewallBackend": {"Driver": daemon.networks.firewall.name},
                "DiscoveredDevices": [{"Source": "cdi", "ID": name} for name in cdi_devices(cdi_directories)],
                "Warnings": daemon.cgroups.warnings() + (
                    [] if forwards else ["WARNING: IPv4 forwarding is disabled"]),
            }
        )

    @job("version")
    def version(self, job: Job) -> None:
        """GET /version of the newest API; Docker 1.2.0's fields are among them."""
        uname = os.uname()
        details = {
            "ApiVersion": API_VERSION,
            "Arch": _go_architecture(),
            "BuildTime": "",
            "Experimental": "false",
            "GitCommit": GIT_COMMIT,
            "GoVersion": _runtime_version(),
            "KernelVersion": uname.release,
            "MinAPIVersion": MIN_API_VERSION,
            "Os": "linux",
        }
        job.reply(
            {
                "Platform": {"Name": "dockerd.py"},
                "Components": [{"Name": "Engine", "Version": VERSION, "Details": details}],
                "Version": VERSION,
                "ApiVersion": API_VERSION,
                "MinAPIVersion": MIN_API_VERSION,
                "GitCommit": GIT_COMMIT,
                "GoVersion": details["GoVersion"],
                "Os": "linux",
                "Arch": details["Arch"],
                "KernelVersion": uname.release,
                "BuildTime": "",
            }
        )


def _runtime_version() -> str:
    """What runs the daemon, where clients look for the version of Go."""
    return "python" + ".".join(map(str, sys.version_info[:3]))


def _go_architecture() -> str:
    return {"x86_64": "amd64", "aarch64": "arm64"}.get(os.uname().machine, os.uname().machine)


def _os_release() -> dict[str, str]:
    """os-release(5) as a dictionary."""
    text = read_text("/etc/os-release") or read_text("/usr/lib/os-release")
    pairs = (line.partition("=") for line in text.splitlines() if "=" in line and not line.startswith("#"))
    return {key: "".join(shlex.split(value)) for key, _, value in pairs}


def _registry_config(config: Any) -> dict[str, Any]:
    hub = {"Name": "docker.io", "Mirrors": list(config.registry_mirrors), "Secure": True, "Official": True}
    networks = [entry for entry in config.insecure_registries if "/" in entry]
    return {
        "InsecureRegistryCIDRs": ["::1/128", "127.0.0.0/8", *networks],
        "Mirrors": list(config.registry_mirrors),
        "IndexConfigs": {
            "docker.io": hub,
            **{
                host: {"Name": host, "Mirrors": [], "Secure": False, "Official": False}
                for host in config.insecure_registries
                if host not in networks
            },
        },
    }


class Survey:
    """What stands in the data root and in the kernel, compared with the records; nothing is changed by it.

    `records`: the whole ones of containers, (record, host configuration) by id.  `damages`: what a start
    looks for."""

    def __init__(self, config: Any, images: Images, cgroups: CgroupManager) -> None:
        self.images, self.cgroups = images, cgroups
        self.root, self.containers = config.data_root, os.path.join(config.data_root, "containers")
        self.records: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
        self.damages = unfinished(self.root)
        names = sorted(os.listdir(self.containers)) if os.path.isdir(self.containers) else []
        for name in names:
            self._read(name, os.path.join(self.containers, name))
        for name in sorted(set(images.layers.rw_ids()) - set(names)):
            self.damages.append(Damage(f"the layer of the container {name} has no record",
                                       functools.partial(images.layers.remove_rw, name), True))
        for name in {*names, *images.layers.rw_ids()}:
            self._look_for_cgroups(name)
        self._look_for_mounts()

    def _read(self, name: str, directory: str) -> None:
        """The records of one container.  Those that were never written are what a crash leaves; one that was
        is not thrown away at a start, whatever it has become."""
        remove = functools.partial(self._remove, name, directory)
        try:
            self.damages += unfinished(directory)
            record, host_config = (json.loads(read_state(os.path.join(directory, file)))
                                   for file in ("config.v2.json", "hostconfig.json"))
            State(threading.Condition()).from_disk(record["State"])
            if (record["ID"], type(record["Config"]), type(host_config)) != (name, dict, dict):
                raise ValueError("it is not this container's")
            self.records[name] = record, host_config
        except (FileNotFoundError, NotADirectoryError):
            self.damages.append(Damage(f"{directory} has no record of a container", remove, True))
        except (OSError, ValueError, KeyError, TypeError) as error:
            self.damages.append(Damage(f"ignoring the container {name}, whose record is damaged: {error}",
                                       remove))

    def _remove(self, name: str, directory: str) -> None:
        self.images.layers.remove_rw(name)
        remove_tree(directory)

    def _look_for_cgroups(self, name: str) -> None:
        record, host_config = self.records.get(name, ({}, {}))
        parent = host_config.get("CgroupParent") or ""
        cgroup = self.cgroups.cgroup(name, parent)
        running = record.get("State", {}).get("Running")
        if not running and any(map(os.path.exists, cgroup.directories.values())):
            pids = " ".join(map(str, sorted(cgroup.processes()))) or "none"
            self.damages.append(Damage(
                f"the cgroup {cgroup.path} is there, but its container does not run; processes in it: {pids}",
                functools.partial(self.cgroups.kill_leftover, name, parent), True))

    def _look_for_mounts(self) -> None:
        """Mounts that another daemon has left among layers and containers: ours stand in no mount table."""
        places = (self.images.layers.driver.home + "/", self.containers + "/")
        for line in reversed(read_text("/proc/self/mountinfo").splitlines()):
            path = re.sub(r"\\(\d{3})", lambda octal: chr(int(octal[1], 8)), line.split()[4])
            if path.startswith(places):
                self.damages.append(Damage(f"{path} is mounted",
                                           functools.partial(umount, path, MNT_DETACH), True))

    def mismatches(self) -> Iterator[Damage]:
        """What only a check looks for: a start finds it out on its way."""
        yield from self.images.mismatches()
        for name, (record, _) in self.records.items():
            state, layers = record["State"], self.images.layers
            if name not in layers.rw_ids():
                yield Damage(f"the writable layer of the container {name} is missing",
                             functools.partial(self._remove, name, os.path.join(self.containers, name)))
            elif not all(map(layers.has, filter(None, [layers.rw_parent(name)]))):
                yield Damage(f"the container {name} stands on the layer {layers.rw_parent(name)}, which is "
                             "missing: save what it wrote, and remove it")
            started = state["Running"] and not state.get("Restarting")
            if started and name not in read_text(f"/proc/{state['Pid']}/cgroup"):
                yield Damage(f"the container {name} is recorded as running, but its process {state['Pid']} "
                             "is gone", functools.partial(self._record_end, name, record))

    def _record_end(self, name: str, record: dict[str, Any]) -> None:
        record["State"].update(Running=False, Paused=False, Pid=0, ExitCode=255,
                               FinishedAt=rfc3339nano(time.time_ns()), Error=END_NOT_SEEN)
        write_state(os.path.join(self.containers, name, "config.v2.json"), record)


def check_root(config: Config, repair: bool) -> int:
    """The options --check and --repair: a line for each thing that does not agree; 1 when such is left.

    A repair is refused while a daemon serves the data root; under a check things change meanwhile, so what
    is found must be found twice."""
    check_host_system()
    idmap = remapped_ids(config.userns_remap) if config.userns_remap else IdMap()
    root = config.data_root = remapped_root(os.path.realpath(config.data_root), idmap)
    if not os.path.isdir(os.path.join(root, "image")):
        raise DockerError(f"there is nothing to check: {root} has never been a data root")
    if repair:
        lock_data_root(root)

    cgroups = cgroup_manager(config.cgroup_parent, config.exec_opts)

    def find() -> dict[str, Damage]:
        images = Images(config, idmap=idmap, readonly=True)
        survey = Survey(config, images, cgroups)
        return {damage.text: damage for damage in (*images.damages, *survey.damages, *survey.mismatches())}

    found = find()
    for _ in range(4 if repair else 1):
        if found:
            if repair:
                _mend_all(found.values())
                cgroups.close()
            else:
                time.sleep(0.5)
            again = find()
            found = {text: damage for text, damage in again.items() if repair or text in found}
    print("".join(text + "\n" for text in found), end="")
    return 1 if found else 0


def _mend_all(damages: Iterable[Damage]) -> None:
    for damage in damages:
        if damage.mend:
            try:
                damage.mend()
                print(f"mended: {damage.text}")
            except (OSError, DockerError) as error:
                print(f"cannot mend: {damage.text}: {error}")


def remapped_root(root: str, idmap: IdMap) -> str:
    """The data root of those owners: below the one that is named, as in Docker."""
    return os.path.join(root, "{}.{}".format(*idmap.root)) if idmap else root


def lock_data_root(root: str) -> int:
    """The descriptor of the lock that keeps a second daemon away; DockerError where one has it."""
    fd = os.open(os.path.join(root, "dockerd.lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        holder = os.pread(fd, 32, 0).decode(errors="replace").strip()
        os.close(fd)
        raise DockerError(f"the data root {root} is in use by another daemon (pid {holder})") from None
    os.ftruncate(fd, 0)
    os.pwrite(fd, b"%d\n" % os.getpid(), 0)
    return fd


class Daemon:
    """The daemon: `Daemon(config, engine)` loads it, `install()` gives the engine its jobs.

    Raises DockerError with one line when this host, this configuration or the data root does not allow it."""

    def __init__(self, config: Config, engine: Engine) -> None:
        check_host_system()
        check_configuration(config)
        self.config, self.engine = config, engine
        self.idmap = remapped_ids(config.userns_remap) if config.userns_remap else IdMap()
        self._prepare_directories()
        self.id = self._engine_id()
        self.events = Events()
        self.containers = ContainerTable()
        self.workers = Workers(WORKERS)
        self.cgroups = cgroup_manager(config.cgroup_parent, config.exec_opts)
        self.cgroups.real_time = (config.cpu_rt_period, config.cpu_rt_runtime)
        self.driver = ExecutionDriver(config.exec_root)
        self.images = Images(config, self.events.image_event, self._image_users, self.idmap)
        self.layers = self.images.layers
        engine.variables["config"] = config
        engine.job("init_networkdriver").run()
        self.networks: Networks = engine.variables["networks"]
        self.parts = Parts(
            config,
            self.layers,
            self.driver,
            self.cgroups,
            LogPump(),
            self._seccomp_profile(),
            self.events.container_event,
            self.events.network_event,
            self.workers.submit,
            self.workers.later,
            self.networks,
            self.containers.discard,
            self.containers.find,
            self.idmap,
            self.containers.all,
        )
        self._load_containers()
        self.networks.proxy.forget_strangers()
        self.driver.open()
        self._start_wanted()
        engine.on_shutdown(self.shutdown)

    def install(self) -> None:
        """Register every part's jobs with the engine, and leave the daemon where old parts look for it."""
        for part in (
            self.events,
            self.images,
            ContainerJobs(self.parts, self.images, self.containers, self.events),
            NetworkJobs(self.networks, self.containers, self.events),
            Statistics(self.containers),
            ExecJobs(self.containers),
            SystemJobs(self),
        ):
            self.engine.install(part)
        self.engine.variables["httpapi.daemon"] = self

    # Set-up

    def _prepare_directories(self) -> None:
        """The data root and the exec root, locked against a second daemon."""
        config = self.config
        try:
            config.data_root = os.path.realpath(config.data_root)
            config.exec_root = os.path.realpath(config.exec_root)
            if self.idmap:  # a root of its own for these owners, as in Docker, who go through the one above
                os.makedirs(config.data_root, 0o711, exist_ok=True)
                os.chmod(config.data_root, 0o711)
                config.data_root = remapped_root(config.data_root, self.idmap)
            os.makedirs(config.data_root, 0o710, exist_ok=True)
            os.chmod(config.data_root, 0o710)
            os.chown(config.data_root, 0, self.idmap.root[1])
            for name in ("containers", "tmp"):
                os.makedirs(os.path.join(config.data_root, name), 0o710, exist_ok=True)
            os.makedirs(config.exec_root, 0o711, exist_ok=True)
        except OSError as error:
            raise DockerError(f"cannot make the directory {error.filename}: {error.strerror}") from None
        self._lock_file = lock_data_root(config.data_root)

    def _engine_id(self) -> str:
        """The daemon's lasting id, a UUID in the data root."""
        path = os.path.join(self.config.data_root, "engine-id")
        with contextlib.suppress(OSError):
            known = read_state(path).decode().strip()
            if known:
                return known
        import uuid
        fresh = str(uuid.uuid4())
        write_state(path, fresh.encode() + b"\n")
        return fresh

    def _seccomp_profile(self) -> Any:
        """The profile of containers that name none: None for the built-in, "unconfined", or a JSON
        document."""
        name = self.config.seccomp_profile
        if name in ("", "builtin"):
            return None
        if name == "unconfined":
            return name
        try:
            with open(name, encoding="utf-8") as file:
                profile = json.load(file)
            compile_seccomp(profile, set())
            return profile
        except (OSError, ValueError) as error:
            raise DockerError(f"opening seccomp profile ({name}) failed: {error}") from None

    @property
    def security_options(self) -> list[str]:
        """What confines containers here, as info shows it."""
        profile = {"": "builtin"}.get(self.config.seccomp_profile, self.config.seccomp_profile)
        options = ["name=apparmor"] if apparmor_default() else []
        options += [f"name=seccomp,profile={profile}"] if os.path.exists("/proc/sys/kernel/seccomp") else []
        if selinux_runs(self.config):
            options.append("name=selinux")
        if self.config.default_cgroupns_mode == "private":
            options.append("name=cgroupns")
        if self.idmap:
            options.append("name=userns")
        if self.config.no_new_privileges:
            options.append("name=no-new-privileges")
        return options

    def _image_users(self, image_id: str) -> list[tuple[str, bool]]:
        return [(container.id, container.state.running) for container in self.containers.all()
                if container.image_id == image_id]

    # Load and recover

    def _load_containers(self) -> None:
        """Mend what a crash has left, and load every record.  What ran is taken over, and stopped unless
        containers are to outlive the daemon."""
        survey = Survey(self.config, self.images, self.cgroups)
        mend_what_is_safe(survey.damages)
        processes = self.driver.adopt()
        for record, host_config in survey.records.values():
            container = Container.load(self.parts, record, host_config)
            self.containers.add(container)
            self._settle(container, processes)
        for process in processes.values():
            self._settle_stranger(process)
        self._settle_runs([container for container in self.containers.all() if container.state.running])

    def _settle(self, container: Container, processes: dict[str, Process]) -> None:
        """Bring one loaded container into the state that holds after a restart of the daemon."""
        state = container.state
        if state.running:
            process = processes.pop(container.id, None)
            if state.restarting and process is None:
                state.running = state.restarting = False
                container.save()
            else:
                container.resume(process or self._without_shim(container))
        elif state.removing or container.host_config["AutoRemove"]:
            state.removing = False
            try:
                container.remove()
            except DockerError as error:
                log.warning("cannot remove the container %s: %s", container.id, error)

    def _without_shim(self, container: Container) -> Process:
        """The process of a container that no shim knows: it runs on without one, or nobody can tell how it
        ended."""
        pid = container.state.pid
        with contextlib.suppress(OSError, DockerError):
            pidfd = os.pidfd_open(pid)
            if container.id in read_text(f"/proc/{pid}/cgroup"):
                return self.driver.rescue(container.id, pid, pidfd)
            os.close(pidfd)
        process = Process(container.id, self.driver.shim)
        process.finish({"status": 255, "time": time.time_ns(),
                        "error": END_NOT_SEEN})
        return process

    def _settle_stranger(self, process: Process) -> None:
        """What a shim runs besides: an exec goes on in its container, and nobody reads what it prints; a
        start that a crash has interrupted is ended."""
        found = re.search("[0-9a-f]{64}", read_text(f"/proc/{process.pid}/cgroup"))
        with contextlib.suppress(NotFound):
            if found and self.containers.find(found[0]).state.running:
                for name in {"stdout", "stderr", "console"} & process.kept.keys():
                    self.parts.pump.add(process.kept.pop(name), lambda data: None)
                return process.deliver(Process.forget)
        with contextlib.suppress(ProcessLookupError):
            process.send_signal(signal.SIGKILL)
        process.ended.wait(10)
        process.forget()

    def _settle_runs(self, running: list[Container]) -> None:
        """Return when the ends of those that have ended are recorded and, without live restore, the rest is
        stopped."""
        ended = [(container, container.process) for container in running
                 if container.process and container.process.end]
        alive = set(running) - {container for container, _ in ended}
        if alive and not self.config.live_restore:
            log.warning("stopping %d containers that ran under an earlier daemon", len(alive))
            self._stop_all(alive)
        for container, process in ended:
            with container.lock:
                container.changed.wait_for(lambda: container.process is not process, 10)  # noqa: B023

    def _start_wanted(self) -> None:
        """Start the containers whose policy asks for it, at the same time, but each after those it needs."""
        wanted = {container.id: container for container in self.containers.all()
                  if container.record["HasBeenStartedBefore"] and not container.state.running
                  and container.wants_restart()}
        waiting = {key: self._needs(container) & set(wanted) for key, container in wanted.items()}
        unfinished = set(waiting)
        ended: queue.SimpleQueue[str] = queue.SimpleQueue()
        while unfinished:
            ready = [key for key, needs in waiting.items() if not needs & unfinished]
            if not ready and len(waiting) == len(unfinished):  # they need each other: somebody is to be first
                ready = list(waiting)
            for key in ready:
                del waiting[key]
                self.workers.submit(self._start_one, wanted[key], ended)
            unfinished.discard(ended.get())

    def _needs(self, container: Container) -> set[str]:
        """The ids of the containers that must run before this one, which is linked to them or shares their
        namespaces."""
        host = container.host_config
        modes = (host[key].partition(":") for key in ("NetworkMode", "IpcMode", "PidMode"))
        names = [name for kind, _, name in modes if kind == "container"]
        names += [link.partition(":")[0] for link in host["Links"] or ()]
        found = set()
        for name in names:
            with contextlib.suppress(DockerError):
                found.add(self.containers.find(name).id)
        return found - {container.id}

    @staticmethod
    def _start_one(container: Container, ended: queue.SimpleQueue[str]) -> None:
        try:
            container.start()
        except DockerError as error:
            log.error("failed to start container %s: %s", container.id, error)
        finally:
            ended.put(container.id)

    def shutdown(self) -> None:
        """Stop all containers at the same time, each within its own time, unless they are to outlive the
        daemon; write everything out; end the shim."""
        if not self.config.live_restore:
            self._stop_all([container for container in self.containers.all() if container.state.running])
        self.parts.pump.stop()
        self.workers.drain(5)
        self.cgroups.close()
        self.networks.proxy.close()
        self.driver.close()
        STATE_SYNC.flush()
        os.ftruncate(self._lock_file, 0)

    def _stop_all(self, running: Iterable[Container]) -> None:
        threads = [
            threading.Thread(target=self._stop_one, args=(container,), daemon=True) for container in running
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        Sender.flush(2)

    @staticmethod
    def _stop_one(container: Container) -> None:
        try:
            with contextlib.suppress(NotModified):
                container.stop(manually=False)
        except DockerError as error:
            log.error("cannot stop the container %s: %s", container.id, error)

    def shutdown_timeout(self) -> float:
        """How long shutdown may take, in seconds: --shutdown-timeout, or the longest stop timeout and 5 s."""
        longest = max(
            (container.stop_timeout for container in self.containers.all() if container.state.running),
            default=0,
        )
        return max(10, self.config.shutdown_timeout, longest + 5)


def check_configuration(config: Config) -> None:
    """DockerError for options that contradict each other, in Docker 1.2.0's words; a warning where all name
    servers of the host are on its loopback."""
    if config.bridge and config.bip:
        raise DockerError("You specified -b & --bip, mutually exclusive options. Please specify only one.")
    try:
        check_log_options(config.log_driver, config.log_opts or {})
    except BadParameter as error:
        raise DockerError(f"failed to set log opts: {error}") from None
    if not config.iptables and not config.icc:
        raise DockerError("You specified --iptables=false with --icc=false. ICC uses iptables to function. "
                          "Please set --icc or --iptables to true.")
    if config.selinux_enabled and not selinux_runs(config):
        log.warning("Docker could not enable SELinux on the host system")
    servers = re.findall(r"^nameserver\s+(\S+)", read_text("/etc/resolv.conf"), re.M)
    if not config.dns and all(map(_is_loopback, servers)):
        log.warning("Local (127.0.0.1) DNS resolver found in resolv.conf and containers can't use it. "
                    "Using default external servers: %s", ", ".join(DEFAULT_NAME_SERVERS))


def check_host_system() -> None:
    """DockerError unless this is Linux on a machine served here, with root's rights and a kernel that is new
    enough."""
    uname = os.uname()
    if uname.sysname != "Linux" or uname.machine not in SYSCALLS:
        raise DockerError(
            f"dockerd.py runs on Linux on {' and '.join(SYSCALLS)}, not on {uname.sysname} {uname.machine}"
        )
    if os.geteuid() != 0:
        raise DockerError(
            "dockerd needs to be started with root privileges. To see how to run dockerd in rootless mode "
            "with unprivileged user, see the documentation"
        )
    version = tuple(int(number) for number in re.findall(r"\d+", uname.release)[:2])
    if version < MINIMUM_KERNEL:
        raise DockerError(f"the kernel {uname.release} is too old: dockerd.py needs "
                          f"{'.'.join(map(str, MINIMUM_KERNEL))} or newer")


# ------------------------------------------------------------------------------------------------------------
# API server
#
# Listeners (Unix, TCP, TLS, passed descriptors), a strict and fast HTTP/1 parser on a thread a connection,
# ONE table of routes, version gates beside them, streams and hijacked connections.  Handlers translate HTTP
# to jobs and back; below them there is one shape, that of the newest API.  RFC 9112, Docker's Engine API
# v1.12 to v1.51.
# ------------------------------------------------------------------------------------------------------------

# What a client may cost: sizes in bytes, times in seconds.
HEAD_BYTES = 64 * 1024
HEAD_FIELDS = 200
HEAD_SECONDS = 30.0
JSON_BYTES = 4 * 1024 * 1024
JSON_DEPTH = 64
JSON_SECONDS = 60.0
STALL_SECONDS = 600.0  # of a streamed body: docker import from a slow pipe is no attack
DRAIN_BYTES = 256 * 1024
LINGER_SECONDS = 2.0
HANDSHAKE_SECONDS = 10.0
IDLE_CONNECTIONS = 1024
CONNECTIONS = 4096

RAW_STREAM = "application/vnd.docker.raw-stream"
MULTIPLEXED_STREAM = "application/vnd.docker.multiplexed-stream"
TAR = "application/x-tar"

REASONS = {
    100: "Continue", 101: "UPGRADED", 200: "OK", 201: "Created", 204: "No Content", 304: "Not Modified",
    400: "Bad Request", 401: "Unauthorized", 403: "Forbidden", 404: "Not Found", 408: "Request Timeout",
    409: "Conflict", 413: "Request Entity Too Large", 417: "Expectation Failed",
    431: "Request Header Fields Too Large", 500: "Internal Server Error", 501: "Not Implemented",
    503: "Service Unavailable", 505: "HTTP Version Not Supported",
}

_TOKEN = rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_HEAD = re.compile(rb"(" + _TOKEN + rb") ([^\x00-\x20\x7f]+) HTTP/([0-9])\.([0-9])\r\n"
                   rb"((?:" + _TOKEN + rb":[^\x00-\x08\x0a-\x1f\x7f]*\r\n)*)")
_NOT_HTTP = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|(?<!\r)\n")
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})[ \t]*(?:;[^\x00-\x08\x0a-\x1f\x7f]*)?")
_VERSIONED = re.compile(r"/v([0-9.]{1,20})(/.*)", re.DOTALL)
_SURROGATE = re.compile(rb"\\u[dD][89a-fA-F]")


class ProtocolError(Exception):
    """What the client sent is no request that can be served: answered with `status`, then the connection
    ends."""

    def __init__(self, status: int, text: str) -> None:
        super().__init__(text)
        self.status = status


class ClientGone(ConnectionError):
    """The client closed its connection; what is being done for it alone may end."""


class Head(NamedTuple):
    """A request's first part, checked: `minor` is that of HTTP/1.x, the names of `headers` are in lower
    case."""

    method: str
    target: str
    minor: int
    headers: dict[str, str]


def parse_head(data: bytes) -> Head:
    """The request line and the header fields in `data`, each ended by CRLF (RFC 9112, sections 3 and 5).

    Raises ProtocolError for all that two parsers might read in two ways: bare line feeds, folded lines,
    blanks before the colon, and a repeated Content-Length, Transfer-Encoding or Host."""
    match = _HEAD.fullmatch(data)
    if match is None:
        raise ProtocolError(400, "malformed HTTP request")
    method, target, major, minor, fields = match.groups()
    if major != b"1":
        raise ProtocolError(505, "only HTTP/1.0 and HTTP/1.1 are served")
    headers: dict[str, str] = {}
    lines = fields.decode("latin-1").split("\r\n")
    if len(lines) > HEAD_FIELDS:
        raise ProtocolError(431, f"more than {HEAD_FIELDS} header fields")
    for line in lines[:-1]:
        name, _, value = line.partition(":")
        name, value = name.lower(), value.strip(" \t")
        if name in headers:
            if name in ("content-length", "transfer-encoding", "host"):
                raise ProtocolError(400, f"repeated {name} header")
            value = f"{headers[name]}, {value}"
        headers[name] = value
    return Head(method.decode(), target.decode("utf-8", "replace"), int(minor), headers)


def body_length(head: Head) -> int:
    """The bytes that the request's body has, -1 when it comes in chunks (RFC 9112, section 6.3).

    Both Content-Length and Transfer-Encoding is how requests are smuggled past a proxy: ProtocolError."""
    coding, length = head.headers.get("transfer-encoding"), head.headers.get("content-length")
    if coding is not None:
        if length is not None or head.minor == 0:
            raise ProtocolError(400, "Transfer-Encoding with Content-Length, or in HTTP/1.0")
        if coding.lower() != "chunked":
            raise ProtocolError(501, f"unsupported transfer encoding {coding!r}")
        return -1
    if length is None:
        return 0
    if not (length.isascii() and length.isdigit() and len(length) < 19):
        raise ProtocolError(400, f"bad Content-Length {length[:40]!r}")
    return int(length)


class Body:
    """A request's body as a stream, whether its length was announced or it comes in chunks.

    `length` is the announced one, -1 for chunks.  Reading raises ClientGone where the client ends too
    early and ProtocolError for a bad chunk or a client that stalls."""

    def __init__(self, connection: Connection, length: int, expects: bool) -> None:
        self.length = length
        self.deadline: Optional[float] = None
        self._connection, self._expects = connection, expects
        self._left = max(length, 0)
        self.ended = length == 0

    @property
    def drainable(self) -> bool:
        """Whether the connection can serve another request once the rest of this body is read and dropped."""
        return self.ended or (self.length >= 0 and self._left <= DRAIN_BYTES and not self._expects)

    def read1(self, size: int = 65536) -> bytes:
        """What is there, at most `size` bytes; waits for the first.  b"" at the end."""
        if self.ended:
            return b""
        if self._expects:
            self._expects = False
            self._connection.send(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._left == 0 and not self._next_chunk():
            return b""
        data = self._connection.take(min(size, self._left), self._deadline())
        self._left -= len(data)
        if self._left == 0:
            if self.length >= 0:
                self.ended = True
            elif self._connection.take_line(self._deadline()):
                raise ProtocolError(400, "a chunk is longer than its announced size")
        return data

    def read(self, size: int = -1) -> bytes:
        """Exactly `size` bytes, fewer only at the end; all that is left where `size` is negative."""
        parts = []
        while size:
            data = self.read1(65536 if size < 0 else min(size, 1 << 20))
            if not data:
                break
            parts.append(data)
            if size > 0:
                size -= len(data)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def read_whole(self, limit: int) -> bytes:
        """The whole body; ProtocolError(413) when it is longer than `limit` bytes, 408 when it takes too
        long."""
        self.deadline = time.monotonic() + JSON_SECONDS
        data = self.read(limit + 1) if self.length <= limit else b""
        if len(data) > limit or self.length > limit:
            raise ProtocolError(413, f"the request's body is larger than {limit} bytes")
        return data

    def _deadline(self) -> float:
        return self.deadline or time.monotonic() + STALL_SECONDS

    def _next_chunk(self) -> bool:
        """Read a chunk's size line; after the last chunk also the trailer, which is dropped, and return
        False."""
        match = _CHUNK_SIZE.fullmatch(self._connection.take_line(self._deadline()))
        if match is None:
            raise ProtocolError(400, "bad chunk size")
        self._left = int(match.group(1), 16)
        if self._left == 0:
            fields = 0
            while self._connection.take_line(self._deadline()):
                fields += 1
                if fields > HEAD_FIELDS:
                    raise ProtocolError(431, f"more than {HEAD_FIELDS} trailer fields")
            self.ended = True
        return not self.ended


def parse_json(data: bytes) -> Any:
    """The JSON document in `data`; BadParameter when it is none or nests deeper than JSON_DEPTH.

    The depth is checked before the decoder, which recurses, sees it.  A lone surrogate becomes U+FFFD, as
    in Go."""
    outside = b"".join(data.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2])
    nesting = re.sub(rb"[^][{}]+", b"", outside)
    for _ in range(JSON_DEPTH):
        if not nesting:
            break
        nesting = nesting.replace(b"[]", b"").replace(b"{}", b"")
    if nesting:
        raise BadParameter(f"invalid JSON: unbalanced, or nested deeper than {JSON_DEPTH} levels")
    try:
        value = json.loads(data, parse_constant=lambda name: json.loads("?"))
        if _SURROGATE.search(data):
            text = json.dumps(value, ensure_ascii=False)
            value = json.loads(text.encode("utf-16", "surrogatepass").decode("utf-16", "replace"))
    except ValueError as error:
        raise BadParameter(f"invalid JSON: {error}") from None
    return value


def to_json(value: Any) -> bytes:
    """`value` as one line of JSON in UTF-8; what is no Unicode becomes a question mark."""
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode("utf-8", "replace") + b"\n"


def stream_frame(number: int, data: bytes) -> bytes:
    """`data` as a frame of a multiplexed stream: 0 stdin, 1 stdout, 2 stderr, 3 an error of the daemon's."""
    return struct.pack(">BxxxL", number, len(data)) + data


class Frames:
    """A destination of a job's output that writes it to `stream` in frames of the given number."""

    def __init__(self, stream: Any, number: int) -> None:
        self.stream, self.number = stream, number

    def write(self, data: bytes) -> None:
        """Write `data` as one frame."""
        self.stream.write(stream_frame(self.number, data))


def take_from(buffer: bytearray, size: int) -> bytes:
    """The first `size` bytes of `buffer`, or fewer, which are removed from it."""
    data = bytes(buffer[:size])
    del buffer[:size]
    return data


class Connection:
    """One client's connection: its socket and the one buffer in front of it, from which requests are read in
    turn.

    Nobody else reads the socket, so pipelined requests and what follows an upgrade are never lost."""

    def __init__(self, server: ApiServer, sock: socket.socket) -> None:
        self.server, self.sock = server, sock
        self.buffer = bytearray()
        self.served = 0
        self.hijacked = False
        self._timeout: Optional[float] = None

    def serve(self) -> None:
        """Answer requests until the client or an error ends the connection, and close it."""
        try:
            while self._serve_one():
                self.served += 1
        except ClientGone:
            pass
        except ProtocolError as error:
            self.refuse(error)
        finally:
            self.sock.close()

    def _serve_one(self) -> bool:
        """Read and answer one request; whether another may follow."""
        data = self._read_head()
        if not data:
            return False
        request = Request(self, parse_head(data))
        self.server.answer(request)
        if self.hijacked or not request.keep_alive:
            self.linger()
            return False
        if not request.body.ended:
            request.body.deadline = time.monotonic() + HEAD_SECONDS
            request.body.read()
        return True

    def refuse(self, error: ProtocolError) -> None:
        """Answer what cannot be understood, as Go's server does, and hang up."""
        log.debug("refused a request: %s", error)
        text = f"{error.status} {REASONS[error.status]}: {error}".encode()
        with contextlib.suppress(ClientGone):
            self.send(f"HTTP/1.1 {error.status} {REASONS[error.status]}\r\n"
                      f"Content-Type: text/plain; charset=utf-8\r\n"
                      f"Content-Length: {len(text)}\r\nConnection: close\r\n\r\n".encode() + text)
            self.linger()

    def _read_head(self) -> bytes:
        """The next request's head without its last empty line; b"" when there is none.

        A client that has been served may stay idle as long as it likes; one that has begun must end in
        time."""
        buffer = self.buffer
        deadline = None if self.served else time.monotonic() + HEAD_SECONDS
        while True:
            end = buffer.find(b"\r\n\r\n")
            if 0 <= end <= HEAD_BYTES:
                head = take_from(buffer, end + 4)[:-2].lstrip(b"\r\n")
                if head:
                    return head
                continue
            if len(buffer) > HEAD_BYTES:
                raise ProtocolError(431, f"the request's header is larger than {HEAD_BYTES} bytes")
            if _NOT_HTTP.search(buffer):
                raise ProtocolError(400, "malformed HTTP request")
            if buffer and deadline is None:
                deadline = time.monotonic() + HEAD_SECONDS
            try:
                data = self._wait_idle() if deadline is None else self._receive(65536, deadline)
            except ProtocolError:
                if buffer:
                    raise
                return b""
            if not data:
                return b""
            buffer += data

    def _wait_idle(self) -> bytes:
        """Wait, among the connections that may be closed when there are too many, for a request to begin."""
        idle = self.server.idle
        idle[self] = None
        if len(idle) > IDLE_CONNECTIONS:
            with contextlib.suppress(KeyError, OSError):
                idle.popitem(last=False)[0].sock.shutdown(socket.SHUT_RDWR)
        try:
            return self._receive(65536, None)
        finally:
            idle.pop(self, None)

    def _set_timeout(self, seconds: Optional[float]) -> None:
        if seconds != self._timeout:
            self.sock.settimeout(seconds)
            self._timeout = seconds

    def _receive(self, size: int, deadline: Optional[float]) -> bytes:
        """At most `size` bytes from the socket, b"" at the end; ProtocolError(408) after the deadline."""
        left = None if deadline is None else deadline - time.monotonic()
        try:
            if left is not None and left <= 0:
                raise socket.timeout
            self._set_timeout(left)
            return self.sock.recv(size)
        except socket.timeout:
            raise ProtocolError(408, "the request was not complete in time") from None
        except OSError as error:
            raise ClientGone(str(error)) from None

    def take(self, size: int, deadline: float) -> bytes:
        """Between 1 and `size` bytes of the body; ClientGone at the end of the connection."""
        if self.buffer:
            return take_from(self.buffer, size)
        data = self._receive(size, deadline)
        if not data:
            raise ClientGone("unexpected EOF")
        return data

    def take_line(self, deadline: float) -> bytes:
        """A line of chunked framing without its CRLF."""
        while True:
            end = self.buffer.find(b"\n")
            if end >= 0:
                line = take_from(self.buffer, end + 1)
                if not line.endswith(b"\r\n"):
                    raise ProtocolError(400, "bad chunk: a bare line feed")
                return line[:-2]
            if len(self.buffer) > 4096:
                raise ProtocolError(400, "bad chunk: a line without end")
            data = self._receive(4096, deadline)
            if not data:
                raise ClientGone("unexpected EOF")
            self.buffer += data

    def send(self, data: bytes) -> None:
        """Send all of `data`; waits for a slow client as long as it stays."""
        try:
            self._set_timeout(None)
            self.sock.sendall(data)
        except OSError as error:
            raise ClientGone(str(error)) from None

    def hijack(self, head: bytes) -> HijackedStream:
        """Send `head` and give the raw connection away; no further request is read from it."""
        self.send(head)
        self.hijacked = True
        self._set_timeout(0.0)
        return HijackedStream(self)

    def linger(self) -> None:
        """End our side and wait a little for the client to end its own: closing a socket that holds unread
        input makes the kernel reset it, and the client lose our last bytes."""
        deadline = time.monotonic() + LINGER_SECONDS
        with contextlib.suppress(ClientGone, ProtocolError, OSError, ValueError):
            self._set_timeout(0.0)
            HijackedStream(self).close_write()
            while self._receive(65536, deadline):
                pass


class HijackedStream:
    """A client's connection after the hijack, not blocking: for one poll loop in the connection's own
    thread."""

    def __init__(self, connection: Connection) -> None:
        self._buffer, self._sock = connection.buffer, connection.sock
        self._pending = getattr(connection.sock, "pending", lambda: 0)

    def fileno(self) -> int:
        """The descriptor to poll; ask pending() first, since poll sees neither buffer nor TLS record."""
        return self._sock.fileno()

    def pending(self) -> bool:
        """Whether input waits above the socket: bytes that came with the request, or a decrypted record's
        rest."""
        return bool(self._buffer) or self._pending() > 0

    def _attempt(self, operation: Callable[[Any], Any], argument: Any, blocked: Any) -> Any:
        """operation(argument), or `blocked` where it would have to wait (TLS: in either direction)."""
        try:
            return operation(argument)
        except BlockingIOError:
            return blocked
        except OSError as error:
            if hasattr(error, "reason") and error.errno in (2, 3):  # SSL_ERROR_WANT_READ, _WRITE
                return blocked
            raise ClientGone(str(error)) from None

    def read_some(self, size: int = 65536) -> Optional[bytes]:
        """At most `size` bytes; None when nothing is there yet, b"" when the client has ended its side or
        is gone."""
        if self._buffer:
            return take_from(self._buffer, size)
        try:
            return self._attempt(self._sock.recv, size, None)
        except ClientGone:
            return b""

    def write_some(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """Send a first part of `data` and return its size, 0 when the client does not read; ClientGone.

        TLS wants a write that was put off repeated with the same bytes in front."""
        return self._attempt(self._sock.send, data[:16384], 0)

    def close_write(self) -> None:
        """End our side: FIN, under TLS close_notify before it.  Reading goes on."""
        with contextlib.suppress(OSError, ValueError):
            if hasattr(self._sock, "unwrap"):
                self._sock.unwrap()
        with contextlib.suppress(OSError):
            socket.socket.shutdown(self._sock, socket.SHUT_WR)  # SSLSocket's would drop the TLS layer

    def close(self) -> None:
        """End both sides; the descriptor itself is closed with the connection's thread."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_RDWR)


class WebSocketStream:
    """A WebSocket with the manners of a HijackedStream: the client's messages are one stream of bytes, ours
    go out with `opcode` (1 text, 2 binary).  Pings are answered, fragments joined, and a frame that breaks
    RFC 6455 ends the stream with status 1002."""

    def __init__(self, stream: HijackedStream, opcode: int) -> None:
        self._stream, self._opcode = stream, opcode
        self._raw = bytearray()         # received, and not yet the whole of a head or control frame
        self._left = 0                  # bytes of the data frame under way that have not come yet
        self._mask = b""
        self._fragmented = self._ended = False
        self._frame = b""               # what of a frame of ours has not gone out yet
        self._payload = 0               # how many bytes of the output it carries
        self._reply = b""               # a pong or a close, sent before our next frame
        self.fileno = stream.fileno

    def pending(self) -> bool:
        """Whether read_some has something to tell that poll does not see."""
        return self._ended or self._stream.pending()

    def read_some(self, size: int = 65536) -> Optional[bytes]:
        """As HijackedStream's: data, None, or b"" at the end."""
        data = b"" if self._ended else self._stream.read_some(size)
        if not data:
            return data
        self._raw += data
        found = bytearray()
        try:
            while not self._ended and self._take_frame(found):
                pass
        except ProtocolError as error:
            self._close(error.status)
        self._flush()
        return bytes(found) or (b"" if self._ended else None)

    def _take_frame(self, found: bytearray) -> bool:
        """Take what has come of one frame out of the buffer, its data into `found`; False when that is too
        little."""
        raw = self._raw
        if self._left:
            part = take_from(raw, self._left)
            found += self._unmasked(part)
            self._left -= len(part)
            return bool(raw)
        if len(raw) < 2:
            return False
        final, opcode, length = raw[0] >> 7, raw[0] & 15, raw[1] & 127
        start = 2 + {126: 2, 127: 8}.get(length, 0)
        control = opcode >= 8
        misplaced = length > 125 or not final if control else self._fragmented != (not opcode)
        if raw[0] & 0x70 or not raw[1] & 128 or opcode not in (0, 1, 2, 8, 9, 10) or misplaced:
            raise ProtocolError(1002, "a frame that RFC 6455 does not allow")
        if len(raw) < start + 4 + (length if control else 0):
            return False
        if start > 2:
            length = int.from_bytes(raw[2:start], "big")
        self._mask = take_from(raw, start + 4)[start:]
        if control:
            self._answer(opcode, self._unmasked(take_from(raw, length)))
        else:
            self._left, self._fragmented = length, not final
        return bool(raw)

    def _unmasked(self, part: bytes) -> bytes:
        mask, size = self._mask, len(part)
        self._mask = mask[size % 4:] + mask[:size % 4]  # the next part of the frame goes on with it
        key = (mask * (size // 4 + 1))[:size]
        return (int.from_bytes(part, "big") ^ int.from_bytes(key, "big")).to_bytes(size, "big")

    def _answer(self, opcode: int, data: bytes) -> None:
        if opcode == 8:
            self._close(int.from_bytes(data[:2], "big") if len(data) > 1 else 1000)
        elif opcode == 9:  # of several pings the last one is answered
            self._reply = bytes((0x8A, len(data))) + data

    def _close(self, status: int) -> None:
        self._ended, self._reply = True, struct.pack(">BBH", 0x88, 2, status)

    def _flush(self) -> bool:
        """Send what is on its way; whether all of it has gone."""
        while self._frame or self._reply:
            if not self._frame:
                self._frame, self._reply = self._reply, b""
            sent = self._stream.write_some(self._frame)
            if not sent:
                return False
            self._frame = self._frame[sent:]
        return True

    def write_some(self, data: Union[bytes, bytearray, memoryview]) -> int:
        """As HijackedStream's; what was put off must be repeated with the same bytes in front."""
        if self._ended:
            raise ClientGone("the WebSocket is closed")
        if not self._payload and self._flush():
            part = bytes(data[:16000])
            self._payload = len(part)
            size = bytes((len(part),)) if len(part) < 126 else struct.pack(">BH", 126, len(part))
            self._frame = bytes((0x80 | self._opcode,)) + size + part
        if not self._flush():
            return 0
        sent, self._payload = self._payload, 0
        return sent

    def finish(self) -> None:
        """Tell the client that the stream is over, unless it has told us."""
        if not self._ended:
            self._close(1000)
            with contextlib.suppress(ClientGone):
                self._flush()


class DisconnectWatcher:
    """One thread that watches the connections of jobs that last, and calls back when a client hangs up."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._epoll: Any = None
        self._callbacks: dict[int, Callable[[], None]] = {}

    @contextlib.contextmanager
    def watching(self, fd: int, callback: Callable[[], None]) -> Iterator[None]:
        """While the block runs, `callback` is called once if the other side of the socket `fd` closes."""
        with self._lock:
            if self._epoll is None:
                self._epoll = select.epoll()
                threading.Thread(target=self._run, name="disconnects", daemon=True).start()
            self._callbacks[fd] = callback
            self._epoll.register(fd, select.EPOLLRDHUP | select.EPOLLONESHOT)
        try:
            yield
        finally:
            with self._lock:  # also waits for a callback that is under way
                self._epoll.unregister(fd)
                del self._callbacks[fd]

    def _run(self) -> None:
        while True:
            for fd, _ in self._epoll.poll():
                with self._lock:
                    callback = self._callbacks.get(fd)
                    if callback:
                        callback()


# -- requests, responses, routes

class Response(NamedTuple):
    """What a handler answers: `body` is bytes, or an object that is sent as JSON; None is no body at all."""

    status: int = 200
    body: Any = None
    headers: tuple[tuple[str, str], ...] = ()
    content_type: str = "application/json"


@functools.lru_cache(maxsize=256)
def parse_version(text: str) -> tuple[int, int]:
    """"1.24" as (1, 24); what is missing or no number counts as 0, as in Docker."""
    major, _, minor = text.partition(".")
    minor = minor.partition(".")[0]
    return int(major or 0), int(minor or 0)


NEWEST, OLDEST = parse_version(API_VERSION), parse_version(MIN_API_VERSION)
_CONVERSIONS: dict[str, Callable[[str], Any]] = {
    "": str, "int": int, "bool": lambda text: Env(flag=text).get_bool("flag"),
    "json": lambda text: parse_json(text.encode()),
}


class Request:
    """One request as a handler sees it.

    `version` is the API's as (1, 24), `named_version` whether the path says so, `body` the unread body.
    Gates change `query` and the decoded body before the handler looks at them."""

    def __init__(self, connection: Connection, head: Head) -> None:
        self.connection, self.server, self.head = connection, connection.server, head
        self.method, self.headers = head.method, head.headers
        path, _, self._query_string = head.target.partition("?")
        if not path.startswith("/"):  # absolute form, of a client that takes us for a proxy; or "*"
            path = "/" + path.partition("://")[2].partition("/")[2]
        if "%" in path:
            from urllib.parse import unquote
            path = unquote(path)
            if "\0" in path:
                raise ProtocolError(400, "a NUL in the path")
        versioned = _VERSIONED.fullmatch(path)
        self.named_version = versioned is not None
        self.version, self.path = (parse_version(versioned[1]), versioned[2]) if versioned else (NEWEST, path)
        expects = self.headers.get("expect", "")
        if expects and expects.lower() != "100-continue":
            raise ProtocolError(417, f"unknown expectation {expects!r}")
        self.body = Body(connection, body_length(head), bool(expects) and head.minor > 0)
        options = self.headers.get("connection", "").lower().replace(" ", "").split(",")
        self.keep_alive = "close" not in options if head.minor else "keep-alive" in options
        self.route: Optional[Route] = None
        self.started: Optional[Stream] = None
        self.host_config: Any = None
        self.early = True
        self.forgiving = False

    @functools.cached_property
    def query(self) -> dict[str, list[str]]:
        """The query string's parameters."""
        if not self._query_string:
            return {}
        from urllib.parse import parse_qs
        try:
            return parse_qs(self._query_string, keep_blank_values=True, max_num_fields=1000)
        except ValueError as error:
            raise BadParameter(f"invalid query: {error}") from None

    def parameters(self, names: str) -> dict[str, Any]:
        """The query's parameters that `names` lists ("all:bool limit:int since"), converted; absent and
        empty ones are left out.  Types: int, bool, json, list (of strings); BadParameter for a wrong
        value."""
        found: dict[str, Any] = {}
        for item in names.split():
            name, _, kind = item.partition(":")
            values = self.query.get(name)
            if not values or (values == [""] and kind != "bool"):
                continue
            try:
                found[name] = values if kind == "list" else _CONVERSIONS[kind](values[0])
            except ValueError:
                raise BadParameter(f"invalid value {values[0][:100]!r} of parameter {name}") from None
        return found

    @functools.cached_property
    def json(self) -> Any:
        """The body as JSON, None where there is none; BadParameter, as Docker words it, where it is
        something else."""
        kind = self.headers.get("content-type", "")
        if self.body.ended:
            return None
        if kind.partition(";")[0].strip().lower() != "application/json":
            if not kind:
                raise BadParameter("malformed Content-Type header (): mime: no media type")
            raise BadParameter(f"unsupported Content-Type header ({kind}): must be 'application/json'")
        data = self.body.read_whole(JSON_BYTES)
        return parse_json(data) if data.strip() else None

    @property
    def object(self) -> dict[str, Any]:
        """The body as a JSON object, {} where there is none."""
        if self.json is not None and not isinstance(self.json, dict):
            raise BadParameter("invalid JSON: the request's body must be an object")
        return self.json or {}

    def header_json(self, name: str) -> Any:
        """A header whose value is JSON in URL-safe base64; {} where it is absent or cannot be read, as in
        Docker."""
        try:
            return parse_json(base64.urlsafe_b64decode(self.headers.get(name, "") + "==")) or {}
        except (ValueError, BadParameter):
            return {}

    def job(self, name: str, /, *arguments: str, **env: Any) -> Job:
        """A job of the engine; NotSupported while no part of the daemon has registered its handler."""
        engine = self.server.engine
        if engine.handler(name) is None:
            raise NotSupported(f"{name.replace('_', ' ')}: this feature is not supported by this daemon")
        return engine.job(name, *arguments, **env)

    def reshape(self, value: Any) -> Any:
        """`value`, an object or a list of them of the newest API's shape, in that of the client's version.

        An object that the version does not know becomes {}."""
        shapes = self.route.shapes if self.route else []
        gates = [gate.function for gate in shapes if self.version < gate.version]
        if isinstance(value, list):
            return [self.reshape(item) for item in value]
        if not gates or not isinstance(value, dict):
            return value
        value = copy.deepcopy(value)
        for gate in gates:
            changed = gate(value)
            value = value if changed is None else changed
            if not value:
                break
        return value

    def run(self, job: Job) -> Any:
        """Run a job that lasts: it is cancelled when the client hangs up."""
        with self.server.watcher.watching(self.connection.sock.fileno(), job.cancel):
            return job.run()

    def stream(self, content_type: str = "application/json", **headers: str) -> Stream:
        """The response's body as a stream; the head goes out with its first byte, or by start()."""
        self.started = Stream(self, content_type, headers)
        return self.started

    def hijack(self, job: Job) -> None:
        """Run `job` with the raw connection as job.hijacked, which it gets when it is ready(tty=...)."""

        def ready(facts: dict[str, Any]) -> None:
            multiplexed = "upgrade" in self.headers and not facts.get("tty") and self.version >= (1, 42)
            status, upgrade = "200 OK", ""
            if "upgrade" in self.headers:
                status, upgrade = "101 UPGRADED", "Connection: Upgrade\r\nUpgrade: tcp\r\n"
            kind = MULTIPLEXED_STREAM if multiplexed else RAW_STREAM
            head = f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{upgrade}\r\n"
            job.hijacked = self.connection.hijack(head.encode())

        job.on_ready = ready
        job.run()

    def progress(self, job: Job) -> None:
        """Run `job` with its JSON progress lines as the response; an error after the first goes out as a
        line."""
        stream = self.stream()
        stream.error_line = lambda error: to_json(
            {"errorDetail": {"message": str(error)}, "error": str(error)}).rstrip() + b"\r\n"
        job.stdout.add(stream)
        job.stdin = self.body
        self.run(job)


class Stream:
    """A response's body that is sent while it is made: in chunks, or to HTTP/1.0 until the connection's end.

    `error_line` makes of an error what tells the client of it inside the stream; where it makes nothing,
    the stream is cut off instead."""

    def __init__(self, request: Request, content_type: str, headers: dict[str, str]) -> None:
        self.request, self.content_type, self.headers = request, content_type, headers
        self.running = False
        self.error_line: Callable[[BaseException], bytes] = lambda error: b""
        self._chunked = request.head.minor > 0
        self._lock = threading.RLock()

    def start(self) -> None:
        """Send the head now, unless it has been sent."""
        with self._lock:
            if self.running:
                return
            self.running = True
            request = self.request
            framing = (("Transfer-Encoding", "chunked"),) if self._chunked else ()
            request.keep_alive = request.keep_alive and self._chunked and request.body.drainable
            request.connection.send(request.server.head(
                request, 200, (("Content-Type", self.content_type), *self.headers.items(), *framing)))

    def write(self, data: bytes) -> int:
        """Send `data`, as one chunk, before it returns."""
        with self._lock:
            self.start()
            if data and self.request.method != "HEAD":
                chunk = b"%x\r\n%b\r\n" % (len(data), data) if self._chunked else bytes(data)
                self.request.connection.send(chunk)
        return len(data)

    def finish(self) -> None:
        """Send what ends the stream."""
        if self._chunked and self.request.method != "HEAD":
            self.request.connection.send(b"0\r\n\r\n")

    def fail(self, error: BaseException) -> None:
        """End the stream after an error: with its error line, or by cutting the connection off."""
        line = self.error_line(error)
        if line:
            self.write(line)
            self.finish()
        else:
            self.request.keep_alive = False


class Lines:
    """A destination of JSON lines that writes each in the shape of the client's version, if it has one."""

    def __init__(self, request: Request, stream: Stream) -> None:
        self.request, self.stream = request, stream

    def write(self, data: bytes) -> None:
        """Write whole lines."""
        lines = (self.request.reshape(json.loads(line)) for line in data.splitlines() if line.strip())
        self.stream.write(b"".join(to_json(line) for line in lines if line))


class Gate(NamedTuple):
    """What a route does differently for clients older than `version`: to the request, or to the response."""

    version: tuple[int, int]
    function: Callable[[Any], Any]
    shapes: bool


def until(version: str, function: Callable[[Request], Any]) -> Gate:
    """A gate on requests of API versions before `version`: function(request) rewrites them to today's."""
    return Gate(parse_version(version), function, False)


def shape_until(version: str, function: Callable[[Any], Any]) -> Gate:
    """A gate on responses to API versions before `version`: function(body) returns the older shape of a
    newer one."""
    return Gate(parse_version(version), function, True)


class Route(NamedTuple):
    """One row of the table of routes."""

    method: str
    path: str
    pattern: re.Pattern[str]
    handler: Callable[..., Any]
    requests: list[Gate]
    shapes: list[Gate]


ROUTES: list[Route] = []
_ROUTE_INDEX: dict[tuple[str, str, str], list[Route]] = {}


def route(method: str, path: str, *gates: Gate) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Put the decorated handler(request, *names) into the table of routes, for the path with and without a
    version.

    A {name} in `path` matches at least one character, slashes too; the longer path goes first.  Gates run
    in the order they stand in: those on responses newest first, so that each only knows the step to the
    version before."""

    def register(handler: Callable[..., Any]) -> Callable[..., Any]:
        pattern = re.compile(re.sub(r"\\{\w+\\}", "(.+)", re.escape(path)), re.DOTALL)
        row = Route(method, path, pattern, handler, [gate for gate in gates if not gate.shapes],
                    [gate for gate in gates if gate.shapes])
        ROUTES.append(row)
        rows = _ROUTE_INDEX.setdefault(_route_key(method, path), [])
        rows.append(row)
        rows.sort(key=lambda row: -len(row.path))
        return handler

    return register


def _route_key(method: str, path: str) -> tuple[str, str, str]:
    """What a path and its route have in common: method, first and last part ("" for a parameter)."""
    last = path.rpartition("/")[2]
    return method, path[1:].partition("/")[0], "" if last.startswith("{") else last


def find_route(method: str, path: str) -> Optional[tuple[Route, tuple[str, ...]]]:
    """The route of a path without version, and its names; None where there is none."""
    key = _route_key(method, path)
    for row in itertools.chain(_ROUTE_INDEX.get(key, ()), _ROUTE_INDEX.get((*key[:2], ""), ())):
        match = row.pattern.fullmatch(path)
        if match:
            return row, match.groups()
    return None


def runs(job: str, parameters: str = "", status: int = 200, body: bool = False, reply: bool = True,
         stdin: bool = False) -> Callable[..., Any]:
    """The handler of a route that is one job: the path's names are its arguments, the query's `parameters`
    and, with `body`, the JSON body are its env, with `stdin` the body is its stdin.  Its reply is sent
    with `status`; 204 and reply=False send none."""

    def handler(request: Request, *names: str) -> Response:
        env = request.parameters(parameters)
        if body:
            env["body"] = request.object
        task = request.job(job, *names, **env)
        if stdin:
            task.stdin = request.body
        result = task.run()
        return Response(status, result if reply and status != 204 else None)

    return handler


def downloads(job: str, content_type: str, parameters: str = "") -> Callable[..., Any]:
    """The handler of a route whose response is what one job writes."""

    def handler(request: Request, *names: str) -> None:
        names = names or tuple(request.query.get("names", ()))
        task = request.job(job, *names, **request.parameters(parameters))
        task.stdout.add(request.stream(content_type))
        request.run(task)

    return handler


def follows(job: str, parameters: str, **defaults: Any) -> Callable[..., Any]:
    """The handler of a route whose response is JSON lines for as long as one job and the client last."""

    def handler(request: Request, *names: str) -> None:
        task = request.job(job, *names, **{**defaults, **request.parameters(parameters)})
        stream = request.stream()
        task.stdout.add(Lines(request, stream))
        task.on_ready = lambda facts: stream.start()
        request.run(task)

    return handler


def progresses(job: str, parameters: str, auth: str = "", **defaults: Any) -> Callable[..., Any]:
    """The handler of a route that shows one job's progress; the body is its stdin, `auth` a header with
    credentials."""

    def handler(request: Request, *names: str) -> None:
        env = {**defaults, **request.parameters(parameters)}
        if auth:
            env["authConfig"] = request.header_json(auth)
        request.progress(request.job(job, *names, **env))

    return handler


def resizes(job: str) -> Callable[..., Any]:
    """The handler that gives a terminal the size in the query's `h` and `w`."""

    def handler(request: Request, name: str) -> Response:
        size = {}
        for key, side in (("h", "height"), ("w", "width")):
            text = request.query.get(key, [""])[0]
            if not (text.isascii() and text.isdigit() and int(text) < 1 << 32):
                raise BadParameter(f'invalid resize {side} "{text[:40]}": invalid syntax')
            size[key] = int(text)
        request.job(job, name, **size).run()
        return Response(200)

    return handler


def refuses(error: type[DockerError], text: str) -> Callable[..., Any]:
    """The handler of a route whose feature this daemon does not have, by design."""

    def handler(request: Request, *names: str) -> Response:
        raise error(text.format(*names))

    return handler


# -- version gates: small functions, named after what they do

def members(node: Any, path: str) -> Iterator[tuple[dict[str, Any], str]]:
    """(object, name) of every member of `node` at the dotted `path`; a list stands for each of its elements,
    * for each member."""
    if isinstance(node, list):
        for item in node:
            yield from members(item, path)
    elif isinstance(node, dict):
        first, _, rest = path.partition(".")
        for name in list(node) if first == "*" else [first] if first in node else []:
            if rest:
                yield from members(node[name], rest)
            else:
                yield node, name


def drops(*paths: str) -> Callable[[Any], None]:
    """A shape gate: the members at the dotted `paths` did not exist yet."""

    def gate(item: Any) -> None:
        for path in paths:
            for holder, name in members(item, path):
                del holder[name]

    return gate


def without(*paths: str) -> Callable[[Request], None]:
    """A request gate: members of the body that came later than the client are not looked at."""
    return lambda request: drops(*paths)(request.object)


def ignores(*names: str) -> Callable[[Request], None]:
    """A request gate: parameters of the query that came later than the client are not looked at."""

    def gate(request: Request) -> None:
        for name in names:
            request.query.pop(name, None)

    return gate


def asks(**values: str) -> Callable[[Request], None]:
    """A request gate: what a later parameter of the query asks for was the only way."""
    return lambda request: request.query.update({name: [value] for name, value in values.items()})


def refuses_member(path: str, text: str, value: Any = None) -> Callable[[Request], None]:
    """A request gate: where the client asks for what it cannot know (a member at `path` that is true, or is
    `value`), ignoring it would do something else than what is meant."""

    def gate(request: Request) -> None:
        for holder, name in members(request.object, path):
            if holder[name] == value or value is None and holder[name]:
                raise BadParameter(text)

    return gate


def adds(**added: Any) -> Callable[[Any], None]:
    """A shape gate: these members existed still."""
    return lambda item: item.update({**added, **item})


def converts(convert: Callable[[Any], Any], *paths: str) -> Callable[[Any], None]:
    """A shape gate: the members at the dotted `paths` had another form, which `convert` gives their value."""

    def gate(item: Any) -> None:
        for path in paths:
            for holder, name in members(item, path):
                holder[name] = convert(holder[name])

    return gate


def exactly(template: dict[str, Any]) -> Callable[[Any], Any]:
    """A shape gate: these members and no others, with these values where the newest shape has none."""

    def shape(wanted: dict[str, Any], item: Any) -> dict[str, Any]:
        item = item or {}
        return {name: shape(value, item.get(name)) if isinstance(value, dict) else item.get(name, value)
                for name, value in wanted.items()}

    return lambda item: shape(template, item)


# Before 1.51 the containers of a listed image were not counted, before 1.39 what could not be found out was
# not left empty, before 1.25 security options were bare names, before 1.22 an image's id had no algorithm in
# front, before 1.19 these flags were numbers, and Docker 1.2.0 wrote null for no warnings.
uncounted = converts(lambda count: -1, "Containers")
unknown_system = converts(lambda text: text or "<unknown>", "KernelVersion", "OperatingSystem")
option_names_only = converts(lambda options: [
    option.partition(",")[0].partition("name=")[2] or option for option in options or []], "SecurityOptions")
plain_ids = converts(lambda text: text[7:] if str(text).startswith("sha256:") else text,
                     "Id", "ParentId", "Parent", "Image", "ImageID", "Deleted")
flags_as_numbers = converts(lambda flag: int(bool(flag)), "Debug", "IPv4Forwarding", "MemoryLimit",
                            "SwapLimit")
warnings_or_null = converts(lambda warnings: warnings or None, "Warnings")


def virtual_size(item: Any) -> None:
    """Before 1.44 an image's size stood in a second member too."""
    for image in item.get("Images") or [item]:
        image["VirtualSize"] = image.get("Size", 0)


def untagged_names(item: Any) -> None:
    """Before 1.43 an image without names had <none> for one."""
    if not item.get("RepoTags") and not item.get("RepoDigests"):
        item["RepoTags"], item["RepoDigests"] = ["<none>:<none>"], ["<none>@<none>"]


def as_container_config(item: Any) -> None:
    """Before 1.50 an image's config was written as a container's, with members that are always empty."""
    item["Config"] = {**CONFIG_1_49, **(item.get("Config") or {})}


def short_id_alias(item: Any) -> None:
    """Before 1.45 a container's short id was one of its aliases on user networks."""
    for name, endpoint in (item["NetworkSettings"].get("Networks") or {}).items():
        if name not in ("bridge", "host", "none", "default"):
            endpoint["Aliases"] = [*(endpoint.get("Aliases") or []), item["Id"][:12]]


def driver_in_config(item: Any) -> None:
    """Before 1.21 the volume driver stood in Config, and there was one network."""
    config = {"MacAddress": "", "NetworkDisabled": False, "ExposedPorts": None, **item["Config"]}
    item["Config"] = {**config, "VolumeDriver": item["HostConfig"].get("VolumeDriver", "")}
    item["NetworkSettings"].pop("Networks", None)


def volumes_as_maps(item: Any) -> None:
    """Before 1.20 there were Volumes and VolumesRW for Mounts, and resource limits stood in Config."""
    mounts = item.pop("Mounts", None) or []
    item["Volumes"] = {mount["Destination"]: mount.get("Source", "") for mount in mounts}
    item["VolumesRW"] = {mount["Destination"]: mount.get("RW", True) for mount in mounts}
    for old, new, empty in (("Memory", "Memory", 0), ("MemorySwap", "MemorySwap", 0),
                            ("CpuShares", "CpuShares", 0), ("Cpuset", "CpusetCpus", "")):
        item["Config"][old] = item["HostConfig"].get(new, empty)


def expected_commits(item: Any) -> None:
    """Before 1.49 each component's commit stood beside the one expected."""
    for name in ("ContainerdCommit", "RuncCommit", "InitCommit"):
        commit = item.setdefault(name, {"ID": "N/A"})
        commit["Expected"] = commit.get("ID", "")


def listed_in_1_14(item: Any) -> Any:
    """Docker 1.2.0's list: sizes only when asked for, and no status of a container that was never started."""
    sizes = {name: item[name] for name in ("SizeRw", "SizeRootFs") if name in item}
    status = "" if item["Status"] == "Created" else item["Status"]
    name = item["Image"]
    if HEX64.match(name):
        name = name[:12]
    elif ":" not in name.rpartition("/")[2]:
        name += ":latest"
    return {**exactly(CONTAINERS_1_14)(item), "Image": name, "Status": status, **sizes}


def no_error_no_answer(item: Any) -> Any:
    """Before 1.34 a failed removal could only be told by an empty answer."""
    return {} if item.get("Error") else item


def no_image_create_event(event: Any) -> Any:
    """Before 1.46 there was no event for an image that is made without a name."""
    return {} if (event.get("Type"), event.get("Action")) == ("image", "create") else event


def flat_event(event: Any) -> Any:
    """Before 1.22 there were events of containers and images only, of a handful of members."""
    names = ("status", "id", "from", "time", "timeNano") if event["Type"] in ("container", "image") else ()
    return {name: event[name] for name in names if name in event}


def one_network_in_stats(item: Any) -> None:
    """Before 1.21 all interfaces were one, and the container was not named."""
    networks = item.pop("networks", {}).values()
    item["network"] = {name: sum(counters[name] for counters in networks) for name in NETWORK_STATS}
    del item["name"], item["id"]


def with_filter(request: Request, name: str, value: str) -> None:
    """Put one more value of a filter into the query."""
    filters = request.parameters("filters:json").get("filters") or {}
    if not isinstance(filters, dict):
        raise BadParameter("invalid filter")
    request.query["filters"] = [json.dumps({**filters, name: [*filters.get(name, ()), value]})]


def all_volumes(request: Request) -> None:
    """Before 1.42 named volumes were pruned too."""
    with_filter(request, "all", "true")


def filter_is_reference(request: Request) -> None:
    """Before 1.41 `filter` was a pattern for repository names."""
    if request.query.get("filter", [""])[0]:
        with_filter(request, "reference", request.query["filter"][0])


def answers_at_the_end(request: Request) -> None:
    """Before 1.30 wait had no conditions and sent nothing before the exit."""
    request.query.pop("condition", None)
    request.early = False


def forgives_conflict(request: Request) -> None:
    """Before 1.20 it was no error to kill a container that does not run."""
    request.forgiving = True


def takes_host_config(request: Request) -> None:
    """Before 1.24 start took the HostConfig as its body."""
    request.host_config = request.object


def pause_is_off(request: Request) -> None:
    """Before 1.13 commit did not pause by default."""
    request.query.setdefault("pause", ["0"])


def asked_host_config(request: Request) -> dict[str, Any]:
    """The HostConfig in the body of a create request, an empty one put there where it is missing."""
    if not isinstance(request.object.get("HostConfig"), dict):
        request.object["HostConfig"] = {}
    return request.object["HostConfig"]


def limits_of_config(request: Request) -> None:
    """Clients before 1.18 to 1.21 put limits and the volume driver beside Config's members."""
    host = asked_host_config(request)
    for name in ("Memory", "MemorySwap", "CpuShares", "CpusetCpus", "VolumeDriver", "Cpuset"):
        value = request.object.pop(name, None)
        if value:
            name = "CpusetCpus" if name == "Cpuset" else name
            host[name] = host.get(name) or value


def shareable_ipc(request: Request) -> None:
    """Before 1.40 containers could share each other's IPC namespace by default."""
    asked_host_config(request)["IpcMode"] = asked_host_config(request).get("IpcMode") or "shareable"


def lenient_mounts(request: Request) -> None:
    """Before 1.42 options of another type of mount were not refused."""
    for mount in asked_host_config(request).get("Mounts") or []:
        for kind in {"volume", "tmpfs", "bind"} - {mount.get("Type")}:
            mount.pop(kind.capitalize() + "Options", None)


def one_network(request: Request) -> None:
    """Before 1.44 a container was created on one network."""
    endpoints = (request.object.get("NetworkingConfig") or {}).get("EndpointsConfig") or {}
    if len(endpoints) > 1:
        raise BadParameter("Container cannot be created with multiple network endpoints: "
                           + ", ".join(endpoints))


def all_streams(request: Request) -> None:
    """Before 1.42 a WebSocket got all streams."""
    request.query.update({name: ["1"] for name in ("stdin", "stdout", "stderr")})


# What older versions answer: each member with the value that it has when there is nothing to tell.
CONFIG_1_49: dict[str, Any] = {
    "Hostname": "", "Domainname": "", "User": "", "AttachStdin": False, "AttachStdout": False,
    "AttachStderr": False, "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": None, "Cmd": None,
    "Image": "", "Volumes": None, "WorkingDir": "", "Entrypoint": None, "OnBuild": None, "Labels": None,
}
CONFIG_1_14: dict[str, Any] = {
    "Hostname": "", "Domainname": "", "User": "", "Memory": 0, "MemorySwap": 0, "CpuShares": 0, "Cpuset": "",
    "AttachStdin": False, "AttachStdout": False, "AttachStderr": False, "PortSpecs": None,
    "ExposedPorts": None, "Tty": False, "OpenStdin": False, "StdinOnce": False, "Env": None, "Cmd": None,
    "Image": "", "Volumes": None, "WorkingDir": "", "Entrypoint": None, "NetworkDisabled": False,
    "OnBuild": None,
}
CONTAINER_1_14: dict[str, Any] = {
    "Id": "", "Created": "", "Path": "", "Args": [], "Config": CONFIG_1_14,
    "State": {"Running": False, "Paused": False, "Restarting": False, "Pid": 0, "ExitCode": 0,
              "StartedAt": "", "FinishedAt": ""},
    "Image": "",
    "NetworkSettings": {"IPAddress": "", "IPPrefixLen": 0, "Gateway": "", "Bridge": "", "PortMapping": None,
                        "Ports": None},
    "ResolvConfPath": "", "HostnamePath": "", "HostsPath": "", "Name": "", "Driver": "",
    "ExecDriver": "native-0.2", "MountLabel": "", "ProcessLabel": "", "Volumes": None, "VolumesRW": None,
    "HostConfig": {"Binds": None, "ContainerIDFile": "", "LxcConf": [], "Privileged": False,
                   "PortBindings": None, "Links": None, "PublishAllPorts": False, "Dns": None,
                   "DnsSearch": None, "VolumesFrom": None, "Devices": None, "NetworkMode": "", "CapAdd": None,
                   "CapDrop": None, "RestartPolicy": {"Name": "", "MaximumRetryCount": 0}},
}
CONTAINERS_1_14: dict[str, Any] = {"Id": "", "Names": [], "Image": "", "Command": "", "Created": 0,
                                   "Status": "", "Ports": []}
IMAGES_1_14: dict[str, Any] = {"ParentId": "", "RepoTags": ["<none>:<none>"], "Id": "", "Created": 0,
                               "Size": 0, "VirtualSize": 0}
IMAGE_1_14: dict[str, Any] = {
    "Id": "", "Parent": "", "Comment": "", "Created": "", "Container": "", "ContainerConfig": CONFIG_1_14,
    "DockerVersion": "", "Author": "", "Config": CONFIG_1_14, "Architecture": "", "Os": "", "Size": 0,
}
HISTORY_1_14: dict[str, Any] = {"Id": "", "Created": 0, "CreatedBy": "", "Tags": None, "Size": 0}
VERSION_1_14: dict[str, Any] = {
    "Version": "", "ApiVersion": "", "GitCommit": "", "GoVersion": "", "Os": "", "Arch": "",
    "KernelVersion": "",
}
INFO_1_14: dict[str, Any] = {
    "Containers": 0, "Images": 0, "Driver": "", "DriverStatus": [], "MemoryLimit": 0, "SwapLimit": 0,
    "IPv4Forwarding": 0, "Debug": 0, "NFd": 0, "NGoroutines": 0, "ExecutionDriver": "native-0.2",
    "NEventsListener": 0, "KernelVersion": "", "OperatingSystem": "", "IndexServerAddress": "",
    "InitSha1": "", "InitPath": "",
}


# -- the table of routes: first those that are one job, then those that this daemon refuses, then the others

CONTAINER_LIST = runs("containers", "all:bool limit:int size:bool filters:json since before")
ENDPOINT_GATES = [
    shape_until("1.48", drops("ImageManifestDescriptor", "NetworkSettings.Networks.*.GwPriority")),
    shape_until("1.44", drops("NetworkSettings.Networks.*.DNSNames")),
]
CONTAINER_LIST_GATES = [
    *ENDPOINT_GATES, shape_until("1.46", drops("HostConfig.Annotations")),
    shape_until("1.23", drops("State", "Mounts")), shape_until("1.22", drops("NetworkSettings")),
    shape_until("1.22", plain_ids), shape_until("1.21", drops("ImageID")),
    shape_until("1.20", drops("HostConfig")), shape_until("1.18", drops("Labels")),
    shape_until("1.15", listed_in_1_14),
]
ANY_PLATFORM = until("1.48", ignores("platform"))
BUILD_PARAMETERS = (
    "dockerfile t:list extrahosts:list remote q:bool nocache:bool cachefrom:json pull rm:bool forcerm:bool "
    "memory:int memswap:int cpushares:int cpusetcpus cpusetmems cpuperiod:int cpuquota:int buildargs:json "
    "shmsize:int squash:bool labels:json networkmode platform target outputs cgroupparent ulimits:json "
    "securityopt:list isolation session buildid version")
PLAIN_ROUTES: list[tuple[Any, ...]] = [  # method, path, handler, gates
    ("POST", "/auth", runs("auth", body=True)),
    ("GET", "/version", runs("version"),
        shape_until("1.35", drops("Platform", "Components")), shape_until("1.25", drops("MinAPIVersion")),
        shape_until("1.22", drops("BuildTime", "Experimental")), shape_until("1.18", exactly(VERSION_1_14))),
    ("GET", "/info", runs("info"),
        shape_until("1.50", drops("DiscoveredDevices")),
        shape_until("1.50", adds(BridgeNfIptables=False, BridgeNfIp6tables=False)),
        shape_until("1.49", drops("FirewallBackend")), shape_until("1.49", expected_commits),
        shape_until("1.46", drops("Containerd")),
        shape_until("1.44", drops("CDISpecDirs", "Runtimes.*.status")),
        shape_until("1.42", adds(KernelMemory=False, KernelMemoryTCP=False)),
        shape_until("1.41", drops("CgroupVersion", "DefaultAddressPools")),
        shape_until("1.40", drops("PidsLimit")),
        shape_until("1.39", unknown_system), shape_until("1.39", drops("Warnings")),
        shape_until("1.25", option_names_only), shape_until("1.25", drops("Isolation")),
        shape_until("1.24", adds(ExecutionDriver="native-0.2")),
        shape_until("1.19", flags_as_numbers), shape_until("1.15", exactly(INFO_1_14))),
    ("GET", "/events", follows("events", "since until filters:json"),
        shape_until("1.46", no_image_create_event), shape_until("1.22", flat_event)),
    ("GET", "/system/df", runs("system_df", "type:list"),
        until("1.42", ignores("type")),
        shape_until("1.44", virtual_size), shape_until("1.42", adds(BuilderSize=0))),
    ("GET", "/containers/json", CONTAINER_LIST, *CONTAINER_LIST_GATES),
    ("GET", "/containers/ps", CONTAINER_LIST, *CONTAINER_LIST_GATES),
    ("GET", "/containers/{name}/json", runs("container_inspect", "size:bool"),
        *ENDPOINT_GATES, shape_until("1.45", short_id_alias),
        shape_until("1.22", plain_ids), shape_until("1.22", adds(ExecDriver="native-0.2")),
        shape_until("1.21", driver_in_config), shape_until("1.20", volumes_as_maps),
        shape_until("1.15", exactly(CONTAINER_1_14))),
    ("GET", "/containers/{name}/top", runs("top", "ps_args")),
    ("GET", "/containers/{name}/changes", runs("container_changes")),
    ("GET", "/containers/{name}/stats", follows("stats", "stream:bool one-shot:bool", stream=True),
        until("1.41", ignores("one-shot")), shape_until("1.21", one_network_in_stats)),
    ("GET", "/containers/{name}/export", downloads("export", "application/octet-stream")),
    ("PUT", "/containers/{name}/archive", runs(
        "archive_put", "path noOverwriteDirNonDir:bool copyUIDGID:bool", reply=False, stdin=True)),
    ("POST", "/containers/{name}/stop", runs("stop", "t:int signal", 204), until("1.42", ignores("signal"))),
    ("POST", "/containers/{name}/restart", runs("restart", "t:int signal", 204),
        until("1.42", ignores("signal"))),
    ("POST", "/containers/{name}/pause", runs("pause", status=204)),
    ("POST", "/containers/{name}/unpause", runs("unpause", status=204)),
    ("POST", "/containers/{name}/rename", runs("rename", "name", 204)),
    ("POST", "/containers/{name}/update", runs("update", body=True), until("1.40", without("PidsLimit"))),
    ("POST", "/containers/{name}/resize", resizes("resize")),
    ("POST", "/containers/{name}/exec", runs("exec_create", "", 201, body=True),
        until("1.42", without("ConsoleSize"))),
    ("POST", "/containers/prune", runs("container_prune", "filters:json")),
    ("DELETE", "/containers/{name}", runs("delete", "v:bool link:bool force:bool", 204)),
    ("GET", "/exec/{id}/json", runs("exec_inspect")),
    ("POST", "/exec/{id}/resize", resizes("exec_resize")),
    ("GET", "/images/json", runs("images", "all:bool filters:json shared-size:bool manifests:bool"),
        until("1.47", ignores("manifests")), until("1.42", ignores("shared-size")),
        until("1.41", filter_is_reference),
        shape_until("1.48", drops("Descriptor")), shape_until("1.47", drops("Manifests")),
        shape_until("1.51", uncounted), shape_until("1.44", virtual_size),
        shape_until("1.43", untagged_names),
        shape_until("1.25", drops("SharedSize", "Containers")), shape_until("1.22", plain_ids),
        shape_until("1.18", drops("RepoDigests", "Labels")), shape_until("1.15", exactly(IMAGES_1_14))),
    ("GET", "/images/{name}/json", runs("image_inspect", "manifests:bool platform:json"),
        until("1.49", ignores("platform")), until("1.48", ignores("manifests")),
        shape_until("1.50", as_container_config), shape_until("1.48", drops("Descriptor", "Manifests")),
        shape_until("1.45", adds(Container="", ContainerConfig=CONFIG_1_49)),
        shape_until("1.44", virtual_size), shape_until("1.44", adds(Created="0001-01-01T00:00:00Z")),
        shape_until("1.22", plain_ids), shape_until("1.22", drops("RootFS", "Metadata")),
        shape_until("1.21", drops("RepoTags", "RepoDigests", "GraphDriver")),
        shape_until("1.15", exactly(IMAGE_1_14))),
    ("GET", "/images/{name}/history", runs("history", "platform:json"), ANY_PLATFORM,
        shape_until("1.22", plain_ids), shape_until("1.19", exactly(HISTORY_1_14))),
    ("GET", "/images/{name}/get", downloads("image_export", TAR, "platform:json"), ANY_PLATFORM),
    ("GET", "/images/get", downloads("image_export", TAR, "platform:json"), ANY_PLATFORM),
    ("GET", "/images/search", runs("search", "term limit:int filters:json")),
    ("GET", "/distribution/{name}/json", runs("distribution_inspect")),
    ("POST", "/images/{name}/push", progresses("push", "tag platform:json", "x-registry-auth"),
        until("1.46", ignores("platform"))),
    ("POST", "/images/load", progresses("load", "quiet:bool platform:json", quiet=True), ANY_PLATFORM),
    ("POST", "/images/prune", runs("image_prune", "filters:json")),
    ("DELETE", "/images/{name}", runs("image_delete", "force:bool noprune:bool platforms:list"),
        shape_until("1.22", plain_ids)),
    ("POST", "/build", progresses("build", BUILD_PARAMETERS, "x-registry-config", rm=True),
        until("1.40", ignores("outputs")), until("1.32", ignores("platform"))),
    ("POST", "/build/prune", runs("build_prune", "all:bool filters:json keep-storage:int reserved-space:int "
                                                 "max-used-space:int min-free-space:int")),
    ("POST", "/build/cancel", runs("build_cancel", "id", reply=False)),
    ("GET", "/networks", runs("networks", "filters:json detailed:bool"),
        until("1.28", asks(detailed="1"))),
    ("GET", "/networks/", runs("networks", "filters:json")),
    ("GET", "/networks/{id}", runs("network_inspect", "verbose:bool scope")),
    ("POST", "/networks/create", runs("network_create", "", 201, body=True),
        until("1.48", without("EnableIPv4"))),
    ("POST", "/networks/{id}/connect", runs("network_connect", body=True, reply=False),
        until("1.48", without("EndpointConfig.GwPriority"))),
    ("POST", "/networks/{id}/disconnect", runs("network_disconnect", body=True, reply=False)),
    ("POST", "/networks/prune", runs("network_prune", "filters:json")),
    ("DELETE", "/networks/{id}", runs("network_delete", status=204)),
    ("GET", "/volumes", runs("volumes", "filters:json")),
    ("GET", "/volumes/{name}", runs("volume_inspect")),
    ("POST", "/volumes/create", runs("volume_create", "", 201, body=True)),
    ("POST", "/volumes/prune", runs("volume_prune", "filters:json"), until("1.42", all_volumes)),
    ("DELETE", "/volumes/{name}", runs("volume_delete", "force:bool", 204), until("1.25", ignores("force"))),
    ("GET", "/plugins", lambda request: Response(200, [])),
]
for _method, _path, _handler, *_gates in PLAIN_ROUTES:
    route(_method, _path, *_gates)(_handler)

NO_MANAGER = ('This node is not a swarm manager. Use "docker swarm init" or "docker swarm join" to connect '
              "this node to swarm and try again.")
NO_EXPERIMENT = ("This experimental feature is disabled by default. Start the Docker daemon in experimental "
                 "mode in order to enable it.")
REFUSED_ROUTES: list[tuple[type[DockerError], str, str]] = [  # error, text, "METHOD path, ..."
    (Unavailable, NO_MANAGER, """
        GET /swarm, GET /swarm/unlockkey, POST /swarm/update, POST /swarm/unlock, GET /services,
        POST /services/create, GET /services/{id}, DELETE /services/{id}, POST /services/{id}/update,
        GET /services/{id}/logs, GET /nodes, GET /nodes/{id}, DELETE /nodes/{id}, POST /nodes/{id}/update,
        GET /tasks, GET /tasks/{id}, GET /tasks/{id}/logs, GET /secrets, POST /secrets/create,
        GET /secrets/{id}, DELETE /secrets/{id}, POST /secrets/{id}/update, GET /configs,
        POST /configs/create, GET /configs/{id}, DELETE /configs/{id}, POST /configs/{id}/update"""),
    (Unavailable, "This node is not part of a swarm", "POST /swarm/leave"),
    (Unavailable, "volume update only valid for cluster volumes, but swarm is unavailable",
     "PUT /volumes/{name}"),
    (NotSupported, "swarm mode is not supported by this daemon", "POST /swarm/init, POST /swarm/join"),
    (NotSupported, "plugins are not supported by this daemon",
     "POST /plugins/pull, POST /plugins/create, GET /plugins/privileges"),
    (NotFound, 'plugin "{0}" not found', """
        GET /plugins/{name}/json, DELETE /plugins/{name}, POST /plugins/{name}/enable,
        POST /plugins/{name}/disable, POST /plugins/{name}/push, POST /plugins/{name}/upgrade,
        POST /plugins/{name}/set"""),
    (NotSupported, NO_EXPERIMENT, """
        GET /containers/{name}/checkpoints, POST /containers/{name}/checkpoints,
        DELETE /containers/{name}/checkpoints/{checkpoint}"""),
    (NotFound, "page not found: this daemon has no BuildKit; build with DOCKER_BUILDKIT=0",
     "POST /session, POST /grpc"),
]
for _error, _text, _paths in REFUSED_ROUTES:
    for _method, _path in (_item.split() for _item in _paths.split(",")):
        route(_method, _path)(refuses(_error, _text))
PING_HEADERS = (("Builder-Version", "1"), ("Cache-Control", "no-cache, no-store, must-revalidate"),
                ("Pragma", "no-cache"), ("Swarm", "inactive"))


@route("GET", "/_ping")
@route("HEAD", "/_ping")
def ping(request: Request) -> Response:
    """What a client needs to know before its first call."""
    return Response(200, b"OK" if request.method == "GET" else b"", PING_HEADERS, "text/plain; charset=utf-8")


CREATE_GATES = [
    until("1.42", limits_of_config), until("1.25", without("HostConfig.AutoRemove")),
    until("1.40", shareable_ipc), until("1.40", without("HostConfig.Mounts.BindOptions.NonRecursive")),
    until("1.40", without("HostConfig.KernelMemoryTCP")), until("1.41", ignores("platform")),
    until("1.42", lenient_mounts), until("1.42", without("HostConfig.ConsoleSize")),
    until("1.42", without("HostConfig.Mounts.BindOptions.CreateMountpoint")),
    until("1.43", without("HostConfig.Annotations")),
    until("1.44", without("Healthcheck.StartInterval")), until("1.44", one_network),
    until("1.44", refuses_member("HostConfig.Mounts.BindOptions.ReadOnlyForceRecursive",
                                 "BindOptions.ReadOnlyForceRecursive needs API v1.44 or newer")),
    until("1.44", asks(defaultReadOnlyNonRecursive="1")),
    until("1.45", refuses_member("HostConfig.Mounts.VolumeOptions.Subpath",
                                 "VolumeOptions.Subpath needs API v1.45 or newer")),
    until("1.48", refuses_member("HostConfig.Mounts.Type", 'Mount type "Image" needs API v1.48 or newer',
                                 "image")),
    until("1.48", without("NetworkingConfig.EndpointsConfig.*.GwPriority")),
    shape_until("1.15", warnings_or_null),
]


@route("POST", "/containers/create", *CREATE_GATES)
def container_create(request: Request) -> Response:
    """Create a container from the body, which is the Config with HostConfig and NetworkingConfig in it."""
    if request.json is None:
        raise BadParameter("invalid JSON: got EOF while reading request body")
    asked_host_config(request)
    for name in ("Cmd", "Entrypoint"):  # either has always been one string too
        if isinstance(request.object.get(name), str):
            request.object[name] = [request.object[name]]
    env = request.parameters("name platform defaultReadOnlyNonRecursive:bool")
    return Response(201, request.job("create", env.pop("name", ""), body=request.object, **env).run())


@route("POST", "/containers/{name}/start", until("1.24", takes_host_config))
def container_start(request: Request, name: str) -> Response:
    """Start a container; a body, even {}, is tolerated where it is too short to say anything."""
    if request.host_config is None and not request.body.ended and not 0 <= request.body.length <= 7:
        raise BadParameter("starting container with non-empty request body was deprecated since API v1.22 "
                           "and removed in v1.24")
    env = request.parameters("detachKeys checkpoint checkpoint-dir")
    if request.host_config:
        env["hostconfig"] = request.host_config
    request.job("start", name, **env).run()
    return Response(204)


@route("POST", "/containers/{name}/kill", until("1.20", forgives_conflict))
def container_kill(request: Request, name: str) -> Response:
    """Send a signal."""
    try:
        request.job("kill", name, *request.parameters("signal").values()).run()
    except Conflict:
        if not request.forgiving:
            raise
    return Response(204)


@route("POST", "/containers/{name}/wait", until("1.30", answers_at_the_end),
       shape_until("1.34", no_error_no_answer), shape_until("1.30", drops("Error")))
def container_wait(request: Request, name: str) -> None:
    """The exit code, when there is one; the headers go out as soon as nothing can be missed."""
    job = request.job("wait", name, **request.parameters("condition"))
    stream = request.stream()
    if request.early:
        job.on_ready = lambda facts: stream.start()
    reply = {name: value for name, value in (request.run(job) or {}).items() if value is not None}
    Lines(request, stream).write(to_json(reply))


ATTACH_FLAGS = "logs:bool stream:bool stdin:bool stdout:bool stderr:bool detachKeys"


@route("POST", "/containers/{name}/attach")
def container_attach(request: Request, name: str) -> None:
    """Attach: the connection becomes the container's streams."""
    request.hijack(request.job("attach", name, **request.parameters(ATTACH_FLAGS)))


@route("GET", "/containers/{name}/attach/ws", until("1.42", all_streams))
def container_attach_ws(request: Request, name: str) -> None:
    """Attach over a WebSocket, RFC 6455: raw output, in binary messages since 1.28.  A page of another site
    may not, unless CORS is enabled: browsers name it."""
    headers, origin = request.headers, request.headers.get("origin")
    if "websocket" not in headers.get("upgrade", "").lower() or not headers.get("sec-websocket-key"):
        raise BadParameter("not websocket protocol")
    if (origin and origin.partition("://")[2] != headers.get("host")
            and request.server.cors not in ("*", origin)):
        raise Forbidden(f"a page of {origin} may not attach: CORS is not enabled for it")
    job = request.job("attach", name, raw=True, **request.parameters(ATTACH_FLAGS))

    def ready(facts: dict[str, Any]) -> None:
        key = headers["sec-websocket-key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
        accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
        head = ("HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
                f"Sec-WebSocket-Accept: {accept}\r\n\r\n")
        stream = request.connection.hijack(head.encode())
        job.hijacked = WebSocketStream(stream, 2 if request.version >= (1, 28) else 1)

    job.on_ready = ready
    job.run()
    job.hijacked.finish()


@route("POST", "/exec/{id}/start", until("1.42", without("ConsoleSize")))
def exec_start(request: Request, name: str) -> Optional[Response]:
    """Start an exec instance, detached or with the connection as its streams."""
    job = request.job("exec_start", name, body=request.object)
    if request.object.get("Detach"):
        job.run()
        return Response(200)
    request.hijack(job)
    return None


@route("GET", "/containers/{name}/logs")
def container_logs(request: Request, name: str) -> None:
    """What the container has written and, with `follow`, goes on to write."""
    flags = "stdout:bool stderr:bool since until timestamps:bool tail follow:bool details:bool"
    env = request.parameters(flags)
    if not (env.get("stdout") or env.get("stderr")):
        raise BadParameter("Bad parameters: you must choose at least one stream")
    job = request.job("logs", name, **env)

    def ready(facts: dict[str, Any]) -> None:
        tty = bool(facts.get("tty"))
        stream = request.stream(RAW_STREAM if tty or request.version < (1, 42) else MULTIPLEXED_STREAM)
        job.stdout.add(stream if tty else Frames(stream, 1))
        job.stderr.destinations[:] = [stream if tty else Frames(stream, 2)]  # no longer the daemon's log
        stream.start()

    job.on_ready = ready
    request.run(job)


def path_stat(facts: Any) -> dict[str, str]:
    """The header that tells what a path in a container is."""
    return {"X-Docker-Container-Path-Stat": base64.b64encode(to_json(facts).rstrip()).decode()}


@route("HEAD", "/containers/{name}/archive")
def archive_stat(request: Request, name: str) -> Response:
    """What is at a path in a container."""
    reply = request.job("archive_stat", name, **request.parameters("path")).run()
    return Response(200, b"", tuple(path_stat(reply).items()))


@route("GET", "/containers/{name}/archive")
def archive_get(request: Request, name: str) -> None:
    """A file or directory of a container as a tar stream; the job is ready(stat=...)."""
    job = request.job("archive_get", name, **request.parameters("path"))
    job.on_ready = lambda facts: job.stdout.add(request.stream(TAR, **path_stat(facts["stat"])))
    request.run(job)


@route("POST", "/commit", until("1.13", pause_is_off))
def container_commit(request: Request) -> Response:
    """Make an image of a container."""
    env = {"pause": True, **request.parameters("container repo tag author comment changes:list pause:bool")}
    return Response(201, request.job("commit", env.pop("container", ""), body=request.object, **env).run())


@route("POST", "/images/create", until("1.32", ignores("platform")))
def image_create(request: Request) -> None:
    """Pull an image, or import one: from the body (fromSrc=-) or an URL."""
    env = request.parameters("fromImage fromSrc repo tag message changes:list platform")
    image, source, repository, tag = (env.pop(name, "") for name in ("fromImage", "fromSrc", "repo", "tag"))
    if image:
        env["authConfig"] = request.header_json("x-registry-auth")
        request.progress(request.job("pull", image, tag, **env))
    else:
        request.progress(request.job("import", source, repository, tag, **env))


@route("POST", "/images/{name}/tag")
def image_tag(request: Request, name: str) -> Response:
    """Give an image another name."""
    given = request.parameters("repo tag")
    request.job("tag", name, given.get("repo", ""), given.get("tag", "")).run()
    return Response(201)


# -- the server

class Listener(NamedTuple):
    """A socket that listens: where (as -H names it), whether TLS is spoken there, the path it made ("" for
    none)."""

    host: str
    socket: socket.socket
    tls: bool
    path: str


def group_id(group: str) -> int:
    """The id of the group that owns Unix sockets, -1 for none; NotFound when it does not exist.

    Nobody had to ask for the default, docker, so a host without it is no error."""
    import grp
    if not group:
        return -1
    try:
        return int(group) if group.isdigit() else grp.getgrnam(group).gr_gid
    except KeyError:
        if group != "docker":
            raise NotFound(f"Group {group} not found; name an existing one by --group, or '' for none")
        log.warning("the group docker does not exist: only root can use the Unix socket")
        return -1


def remove_stale_socket(path: str) -> None:
    """Make room for a Unix socket at `path`; Conflict where a daemon listens there, or what is there is no
    socket."""
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise Conflict(f"can't listen on unix://{path}: there is a file that is no socket; remove it")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(2.0)
            try:
                probe.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
                return
            except OSError:
                pass  # it listens, and is busy
        raise Conflict(f"can't listen on unix://{path}: another daemon serves it")


def listen_unix(path: str, group: str) -> socket.socket:
    """A listening Unix socket at `path`, mode 0660 and owned by `group`, replacing a stale one."""
    gid = group_id(group)
    remove_stale_socket(path)
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(listener.fileno(), 0o600)  # bind(2) gives the file this mode: it is never open to others
        try:
            listener.bind(path)
        except OSError as error:
            raise DockerError(f"can't listen on unix://{path}: {error}") from None
        os.chown(path, -1, gid)
        os.chmod(path, 0o660)
        listener.listen(socket.SOMAXCONN)
    except BaseException:
        listener.close()
        raise
    return listener


def listen_tcp(address: str, tls: bool, verified: bool) -> socket.socket:
    """A listening TCP socket at "HOST:PORT", with a loud warning where anybody in reach becomes root by
    it."""
    host, colon, port = address.rpartition(":")
    if not colon or not port.isdigit():
        host, port = address, "2376" if tls else "2375"
    host = host.strip("[]")
    try:
        found = socket.getaddrinfo(host or None, int(port), type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, _, _, _, target = min(found, key=lambda item: item[0] != socket.AF_INET6 if not host else 0)
        dual = not host and family == socket.AF_INET6 and socket.has_dualstack_ipv6()
        listener = socket.create_server(target[:2], family=family, backlog=socket.SOMAXCONN,
                                        dualstack_ipv6=dual)
    except (OSError, OverflowError) as error:
        raise DockerError(f"can't listen on tcp://{address}: {error}") from None
    if not verified and not ipaddress.ip_address(listener.getsockname()[0].partition("%")[0]).is_loopback:
        log.warning("/!\\ DON'T BIND ON ANOTHER IP ADDRESS THAN 127.0.0.1 IF YOU DON'T KNOW WHAT YOU'RE "
                    "DOING /!\\")
        log.warning("[tcp://%s] Binding to IP address without --tlsverify is insecure and gives root access "
                    "on this machine to everyone who has access to your network.", address)
    return listener


def passed_sockets(number: str) -> list[socket.socket]:
    """The listening sockets that the service manager passed, or the one with descriptor `number`
    (sd_listen_fds(3))."""
    count = int(os.environ.get("LISTEN_FDS") or 0)
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or count < 1:
        raise DockerError("no sockets found via socket activation: make sure the service was started by "
                          "systemd")
    if number not in ("", "*") and not number.isdigit():
        raise BadParameter(f"failed to parse systemd fd address: should be a number: {number}")
    numbers = list(range(3, 3 + count)) if number in ("", "*") else [int(number)]
    if not set(numbers) <= set(range(3, 3 + count)):
        raise BadParameter(f"too few socket activated files passed in by systemd: {count}, from 3 on")
    sockets = [socket.socket(fileno=fd) for fd in numbers]
    for passed in sockets:
        passed.set_inheritable(False)
        passed.setblocking(True)
        if not passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            raise DockerError(f"failed to listen on systemd activated file: fd {passed.fileno()}")
    return sockets


def tls_context(env: Env) -> Any:
    """The ssl.SSLContext of serveapi's Tls* variables; clients need a certificate of TlsCa with TlsVerify."""
    import ssl
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_alpn_protocols(["http/1.1"])
    certificate, key, authority = (str(env.get(name) or "") for name in ("TlsCert", "TlsKey", "TlsCa"))
    try:
        context.load_cert_chain(certificate, key, password=lambda: "")  # or OpenSSL asks on the terminal
    except (OSError, ValueError) as error:
        raise DockerError(f"Couldn't load X509 key pair ({certificate}, {key}): {error}. "
                          "Key encrypted?") from None
    if env.get_bool("TlsVerify"):
        context.verify_mode = ssl.CERT_REQUIRED
        try:
            context.load_verify_locations(authority)
        except OSError as error:
            raise DockerError(f"Couldn't read CA certificate {authority}: {error}") from None
    return context


class ApiServer:
    """The jobs serveapi and acceptconnections, and what all connections share."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.watcher = DisconnectWatcher()
        self.activated = threading.Event()
        self.cors = ""                          # the origin whose pages may use the API, "*" for all
        self.idle: collections.OrderedDict[Connection, None] = collections.OrderedDict()
        self.connections = 0
        self.listeners: list[Listener] = []
        self.closed = False
        self._lock = threading.Lock()
        self._tls: Any = None
        self._logging = False
        self._common = b""
        self._date = (0, b"")

    # the jobs

    @job("serveapi")
    def serve_api(self, job: Job) -> None:
        """Listen on every host in job.args at once, and serve for as long as the daemon lives.

        env: Logging, EnableCors, CorsHeaders, Version, SocketGroup, Tls, TlsVerify, TlsCa, TlsCert,
        TlsKey, BufferRequests (requests wait until acceptconnections).  What listens already is closed
        when one fails."""
        if not job.args or any("://" not in host for host in job.args):
            raise BadParameter(f"usage: {job.name} PROTO://ADDR [PROTO://ADDR ...]")
        self._configure(job.env)
        try:
            for host in dict.fromkeys(job.args):
                self._listen(host, job.env)
            if job.env.get_bool("Tls") or job.env.get_bool("TlsVerify"):
                self._tls = tls_context(job.env)
            self.engine.on_shutdown(self.remove_sockets)  # serveapi goes on until close()
        except BaseException:
            self.close()
            for listener in self.listeners:
                listener.socket.close()
            raise
        make_server = http_server_class()  # now that the sockets listen: the import takes a tenth of a second
        threads = [threading.Thread(target=make_server(self, listener).serve, name=listener.host, daemon=True)
                   for listener in self.listeners]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()

    @job("acceptconnections")
    def accept_connections(self, job: Job) -> None:
        """Tell the service manager that the daemon is ready, and let the waiting requests go."""
        sd_notify("READY=1")
        self.activated.set()

    def _configure(self, env: Env) -> None:
        self._logging = env.get_bool("Logging")
        headers = [("Api-Version", API_VERSION), ("Docker-Experimental", "false"), ("Ostype", "linux"),
                   ("Server", f"Docker/{env.get('Version') or VERSION} (linux)")]
        if env.get_bool("EnableCors") or env.get("CorsHeaders"):
            self.cors = env.get("CorsHeaders") or "*"
            headers += [("Access-Control-Allow-Origin", self.cors),
                        ("Access-Control-Allow-Headers",
                         "Origin, X-Requested-With, Content-Type, Accept, X-Registry-Auth"),
                        ("Access-Control-Allow-Methods", "HEAD, GET, POST, DELETE, PUT, OPTIONS")]
        self._common = "".join(f"{name}: {value}\r\n" for name, value in headers).encode()
        if not env.get_bool("BufferRequests"):
            self.activated.set()

    def _listen(self, host: str, env: Env) -> None:
        """Open the socket or sockets that `host` names."""
        protocol, _, address = host.partition("://")
        tls, verified = env.get_bool("Tls") or env.get_bool("TlsVerify"), env.get_bool("TlsVerify")
        log.info("Listening for HTTP on %s (%s)", protocol, address)
        if protocol == "unix":
            opened = [listen_unix(address, str(env.get("SocketGroup") or ""))]
        elif protocol == "tcp":
            opened = [listen_tcp(address, tls, verified)]
        elif protocol == "fd":
            opened = passed_sockets(address)
        else:
            raise BadParameter(f"Invalid protocol format: {host}; use unix://, tcp:// or fd://")
        for sock in opened:
            inet = sock.family != socket.AF_UNIX
            self.listeners.append(Listener(host, sock, tls and inet, address if protocol == "unix" else ""))

    def close(self) -> None:
        """Listen no longer: serveapi ends.  The service manager's sockets stay as they are."""
        self.closed = True
        self.remove_sockets()
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                if not listener.host.startswith("fd:"):
                    listener.socket.shutdown(socket.SHUT_RDWR)  # wakes the thread that accepts

    def remove_sockets(self) -> None:
        """Remove the Unix sockets that were made, so that no new client comes."""
        for listener in self.listeners:
            with contextlib.suppress(OSError):
                if listener.path:
                    os.unlink(listener.path)

    # connections

    def serve_connection(self, sock: socket.socket, tls: bool) -> None:
        """Serve one client in the calling thread to the connection's end."""
        with self._lock:
            self.connections += 1
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            if self.connections > CONNECTIONS:
                Connection(self, sock).refuse(ProtocolError(503, "too many connections"))
                return
            if tls:
                sock = self._handshake(sock)
            Connection(self, sock).serve()
        except OSError as error:
            log.debug("a connection failed: %s", error)
        finally:
            sock.close()
            with self._lock:
                self.connections -= 1

    def _handshake(self, sock: socket.socket) -> socket.socket:
        """The TLS socket over `sock`; OSError where the client does not agree within HANDSHAKE_SECONDS."""
        sock.settimeout(HANDSHAKE_SECONDS)
        secured = self._tls.wrap_socket(sock, server_side=True, do_handshake_on_connect=False)
        try:
            secured.do_handshake()
            secured.settimeout(None)
            return secured
        except OSError as error:
            with contextlib.suppress(OSError):
                plain = Connection(self, socket.socket(fileno=secured.detach()))
                if getattr(error, "reason", "") == "HTTP_REQUEST":
                    plain.send(b"HTTP/1.0 400 Bad Request\r\n\r\n"
                               b"Client sent an HTTP request to an HTTPS server.\n")
                    plain.linger()
                plain.sock.close()
            raise

    # requests

    def answer(self, request: Request) -> None:
        """Find the request's route, run its handler between its gates, and send what comes of it."""
        if not self.activated.is_set():
            self.activated.wait()
        if self._logging:
            log.debug("%s %s", request.method, request.head.target)
        try:
            response = self._handle(request)
        except ClientGone:
            raise
        except ProtocolError as error:
            if request.started and request.started.running:
                raise ClientGone(str(error)) from None
            raise
        except Exception as error:
            response = self._failure(request, error)
        if response is not None:
            self.respond(request, response)

    def _handle(self, request: Request) -> Optional[Response]:
        """The handler's answer in the client's shape; None where the handler has sent it."""
        found = find_route(request.method, request.path)
        if found is None:
            if request.method == "OPTIONS":
                return Response(200)
            raise NotFound("page not found")
        request.route, names = found
        if request.version != NEWEST:
            self._check_version(request)
            for gate in request.route.requests:
                if request.version < gate.version:
                    gate.function(request)
        response = request.route.handler(request, *names)
        if response is None:
            if request.started:
                request.started.start()
                request.started.finish()
            return None
        if request.version != NEWEST and response.body is not None and not isinstance(response.body, bytes):
            response = response._replace(body=request.reshape(response.body))
        return response

    @staticmethod
    def _check_version(request: Request) -> None:
        named = ".".join(map(str, request.version))
        if request.version > NEWEST:
            raise BadParameter(f"client version {named} is too new. Maximum supported API version is "
                               f"{API_VERSION}")
        if request.version < OLDEST:
            raise BadParameter(f"client version {named} is too old. Minimum supported API version is "
                               f"{MIN_API_VERSION}, please upgrade your client to a newer version")

    def _failure(self, request: Request, error: Exception) -> Optional[Response]:
        """The answer that tells of `error`; None where it had to go into a stream under way."""
        status = http_status(error)
        if status == 500:
            log.error("Handler for %s %s returned error: %s", request.method, request.path, error,
                      exc_info=not isinstance(error, (DockerError, OSError)))
        if request.connection.hijacked:
            return None
        if request.started and request.started.running:
            request.started.fail(error)
            return None
        if status == 304:
            return Response(304)
        if request.named_version and request.version < (1, 24):  # errors were plain text
            return Response(status, f"{error}\n".encode("utf-8", "replace"),
                            (("X-Content-Type-Options", "nosniff"),), "text/plain; charset=utf-8")
        return Response(status, {"message": str(error)})

    def respond(self, request: Request, response: Response) -> None:
        """Send a whole response in one piece."""
        body, headers = response.body, response.headers
        if body is not None:
            if not isinstance(body, bytes):
                body = to_json(body)
            headers = (("Content-Type", response.content_type), *headers)
        body = body or b""
        if response.status not in (204, 304):
            headers = (*headers, ("Content-Length", str(len(body))))
        request.keep_alive = request.keep_alive and request.body.drainable
        head = self.head(request, response.status, headers)
        request.connection.send(head if request.method == "HEAD" else head + body)

    def head(self, request: Request, status: int, headers: Iterable[tuple[str, str]]) -> bytes:
        """A response's status line and headers, those that every response has included."""
        lines = "".join([f"{name}: {value}\r\n" for name, value in headers])
        if not request.keep_alive:
            lines += "Connection: close\r\n"
        elif request.head.minor == 0:
            lines += "Connection: keep-alive\r\n"
        return b"HTTP/1.1 %d %b\r\n%b%b%b\r\n" % (status, REASONS[status].encode(), self._common,
                                                self._date_line(), lines.encode("latin-1", "replace"))

    def _date_line(self) -> bytes:
        """The Date header, made once a second."""
        now = int(time.time())
        if self._date[0] != now:
            self._date = now, time.strftime("Date: %a, %d %b %Y %H:%M:%S GMT\r\n", time.gmtime(now)).encode()
        return self._date[1]


def http_server_class() -> Any:
    """The class of the accept loops: http.server's, with our connections in place of its request handler."""
    import http.server

    class Server(http.server.ThreadingHTTPServer):
        """Accepts on one listener; each connection has a thread of its own."""

        def __init__(self, api: ApiServer, listener: Listener) -> None:
            super().__init__(("", 0), http.server.BaseHTTPRequestHandler, bind_and_activate=False)
            self.socket.close()
            self.socket, self.api, self.tls = listener.socket, api, listener.tls

        def serve(self) -> None:
            """Accept until the API server is closed, then close the listener."""
            while not self.api.closed:
                self.handle_request()
            self.server_close()

        def get_request(self) -> tuple[socket.socket, Any]:
            """Accept; when descriptors have run out, not in a busy loop."""
            try:
                return self.socket.accept()
            except OSError as error:
                if not self.api.closed:
                    log.error("accept: %s", error)
                    time.sleep(0.1)
                raise

        def process_request(self, request: Any, client_address: Any) -> None:
            """Serve the connection in a thread of its own."""
            try:
                threading.Thread(target=self.api.serve_connection, args=(request, self.tls), daemon=True,
                                 name="connection").start()
            except RuntimeError as error:  # no thread to be had
                log.error("a connection is refused: %s", error)
                request.close()

    return Server


# ------------------------------------------------------------------------------------------------------------
# Builtins and main
#
# What `python3 dockerd.py -d` does, step by step as Docker 1.2.0's mainDaemon: options, engine, trap,
# builtins, the daemon in a background thread, the log line, serveapi.
# ------------------------------------------------------------------------------------------------------------


def register_builtins(engine: Engine) -> ApiServer:
    """Register the handlers that need no daemon: the network's, the API's; the rest comes with the daemon."""
    engine.register("init_networkdriver", init_networkdriver)
    server = ApiServer(engine)
    engine.install(server)
    engine.install(Registry())
    return server


def set_up_logging(config: Config) -> None:
    """The daemon's own log: on stderr, in the format and level asked for."""
    levels = {"trace": logging.DEBUG, "warn": logging.WARNING, "fatal": logging.CRITICAL,
              "panic": logging.CRITICAL}
    level = "debug" if config.debug else config.log_level
    handler = logging.StreamHandler()
    handler.setFormatter(LogFormatter(config.log_format == "json"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(levels.get(level, level.upper()))


class LogFormatter(logging.Formatter):
    """Lines as dockerd writes them: time="..." level=info msg="...", or JSON objects."""

    LEVELS = {"WARNING": "warning", "CRITICAL": "fatal"}

    def __init__(self, as_json: bool) -> None:
        super().__init__()
        self.as_json = as_json

    def format(self, record: logging.LogRecord) -> str:
        """One line for `record`; a traceback follows on lines of its own."""
        level = self.LEVELS.get(record.levelname, record.levelname.lower())
        when = rfc3339nano(int(record.created * 10**9), padded=True)
        text = record.getMessage()
        if record.exc_info:
            text += "\n" + self.formatException(record.exc_info)
        if self.as_json:
            return json.dumps({"level": level, "msg": text, "time": when})
        return f"time=\"{when}\" level={level} msg={json.dumps(text, ensure_ascii=False)}"


def hold_pidfile(path: str) -> None:
    """Write our pid to `path`; DockerError when the process that it names is a daemon that runs."""
    try:
        with open(path, encoding="ascii", errors="replace") as file:
            pid = file.read().strip()
        if (pid.isdigit() and int(pid) != os.getpid() and os.path.exists(f"/proc/{pid}")
                and _is_daemon(int(pid))):
            raise DockerError(
                f"process with PID {pid} is still running: is another daemon using the pid file {path}?"
            )
    except FileNotFoundError:
        pass
    try:
        os.makedirs(os.path.dirname(os.path.abspath(path)), 0o755, exist_ok=True)
        write_state(path, b"%d" % os.getpid(), mode=0o644, durable=False)
    except OSError as error:
        raise DockerError(
            f"failed to start daemon, ensure docker is not running or delete {path}: {error.strerror}"
        ) from None


def _is_daemon(pid: int) -> bool:
    """Whether the process is a Docker daemon: a pid may have been given to another program since."""
    command = read_text(f"/proc/{pid}/cmdline").replace("\0", " ")
    return "docker" in command


def load_daemon(config: Config, engine: Engine) -> None:
    """The background thread: load the daemon, install its jobs, then let the waiting requests through."""
    try:
        daemon = Daemon(config, engine)
        daemon.install()
        engine.job("acceptconnections").run()
        trim_memory()  # compiling this file has left more garbage than all that the daemon holds
    except (DockerError, OSError) as error:
        fatal(f"failed to start daemon: {error}")
    except Exception:
        log.exception("failed to start daemon")
        os._exit(1)


def fatal(text: str) -> None:
    """End the process with 1 and one line of explanation, from any thread."""
    log.critical("%s", text)
    logging.shutdown()
    os._exit(1)


def restart_from_bytecode(exec_root: str, code: types.CodeType) -> None:
    """Go on as a fresh image of this process that runs the compiled `code` of this file.

    To compile it leaves 30 MiB behind that no allocator gives back; this process has done it, the next image
    need not.  Where that fails it is a matter of memory alone, and the process goes on as it is."""
    path = os.path.join(exec_root, "dockerd.pyc")
    try:
        os.makedirs(exec_root, 0o711, exist_ok=True)
        write_bytecode(path, code)
        os.execv(sys.executable, [sys.executable, path, *sys.argv[1:]])
    except OSError as error:
        log.warning("cannot restart from bytecode, and go on with more memory: %s", error)


def main(argv: Optional[list[str]] = None, code: Optional[types.CodeType] = None) -> int:
    """Run the daemon with the command line `argv` (without the program's name); the exit code.

    `code` is this module's, when it has been compiled by this very process."""
    try:
        config = parse_options(sys.argv[1:] if argv is None else argv)
        if answer_at_once(config):
            return 0
        if config.check or config.repair:
            log.addHandler(logging.NullHandler())
            return check_root(config, config.repair)
    except LeftoverArgument as error:
        sys.stderr.write(f"{error}\n\n{usage()}")
        return 125
    except UsageError as error:
        sys.stderr.write(str(error) + "\n")
        return 125
    except DockerError as error:
        sys.stderr.write(str(error) + "\n")
        return 1
    set_up_logging(config)
    return serve(config, code)


def reload_configuration(config: Config, engine: Engine) -> None:
    """SIGHUP: take over what daemon.json says by now of the options that can change, a bad one is refused;
    and write the firewall's rules anew, which somebody may have flushed."""
    if "networks" in engine.variables:
        try:
            engine.variables["networks"].firewall.rebuild()
        except (OSError, DockerError) as error:
            log.error("the firewall's rules are not written anew: %s", error)
    try:
        changes = changed_options(config)
    except DockerError as error:
        log.error("the configuration is not reloaded: %s", error)
        return
    for name, value in changes.items():
        setattr(config, name, value)
    set_up_logging(config)
    log.info("reloaded the configuration: %s", ", ".join(sorted(changes)) or "nothing has changed")


def start_watchdog() -> None:
    """Send WATCHDOG=1 twice in each period that the service manager asks for; sd_watchdog_enabled(3)."""
    period = os.environ.get("WATCHDOG_USEC", "")
    if not period.isdigit() or os.environ.get("WATCHDOG_PID", str(os.getpid())) != str(os.getpid()):
        return

    def beat() -> None:
        while sd_notify("WATCHDOG=1"):
            time.sleep(int(period) / 2e6)

    threading.Thread(target=beat, name="watchdog", daemon=True).start()


def serve(config: Config, code: Optional[types.CodeType] = None) -> int:
    """Start the daemon that `config` describes and serve until a signal ends it."""
    global native
    native = load_native()
    os.umask(0o022)
    threading.stack_size(512 << 10)
    engine = Engine()
    pidfile = config.pidfile
    try:
        check_host_system()
        if pidfile:
            hold_pidfile(pidfile)
        if code is not None:
            restart_from_bytecode(config.exec_root, code)
    except DockerError as error:
        fatal(str(error))
    for warning in config.warnings:
        log.warning("%s", warning)

    def clean_up() -> None:
        sd_notify("STOPPING=1")
        daemon = engine.variables.get("httpapi.daemon")
        if daemon is not None:
            engine.shutdown_timeout = daemon.shutdown_timeout()
        engine.shutdown()
        if pidfile:
            with contextlib.suppress(OSError):
                os.unlink(pidfile)

    SignalTrap(clean_up, functools.partial(reload_configuration, config, engine)).install()
    start_watchdog()
    register_builtins(engine)
    threading.Thread(target=load_daemon, args=(config, engine), name="load", daemon=True).start()
    log.info("compiled helper: %s", "in use" if native is not None else "none, its Python twins are in use")
    log.info("docker daemon: %s %s; execdriver: %s; graphdriver: %s", VERSION, GIT_COMMIT, config.exec_driver,
             config.storage_driver)
    job = engine.job("serveapi", *config.hosts, Logging=True, EnableCors=config.api_enable_cors,
                     Version=VERSION, SocketGroup=config.group, Tls=config.tls, TlsVerify=config.tlsverify,
                     TlsCa=config.tlscacert, TlsCert=config.tlscert, TlsKey=config.tlskey,
                     BufferRequests=True)
    try:
        job.run()
    except (DockerError, OSError) as error:
        fatal(str(error))
    threading.Event().wait()  # a signal has ended serveapi: its thread ends the process when all is in order
    return 0


if __name__ == "__main__":
    sys.exit(main(code=None if __file__.endswith(".pyc") else sys._getframe().f_code))
