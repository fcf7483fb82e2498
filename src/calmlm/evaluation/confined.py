"""What runs in the sandbox's own process: it shuts itself in, layer by layer, and then runs the program.

Run as a script by ``calmlm.evaluation.sandbox``, with nothing but the standard library::

    python -I -S confined.py SECONDS MEMORY FOLDER PROGRAM DESCRIPTOR

The first line of standard input is written to DESCRIPTOR when the program has run to its end.
"""

from __future__ import annotations

import contextlib
import os
import sys
import types
from collections.abc import Callable
from typing import Any

# Files and folders for which the program may ask, over its whole life.
_CHANGES = 64

_ZONES = "/usr/share/zoneinfo"  # which the program may read

# Layer 1: what the kernel refuses, whatever the interpreter is made to do. Names that a kernel or a machine lacks are
# passed over.
_SYSTEM_CALLS = """
    clone clone3 fork vfork execve execveat ptrace kill tkill tgkill rt_sigqueueinfo rt_tgsigqueueinfo pidfd_open
    pidfd_send_signal pidfd_getfd process_vm_readv process_vm_writev process_madvise kcmp
    socket socketpair connect bind listen accept accept4 sendto sendmsg sendmmsg recvfrom recvmsg
    setpriority sched_setaffinity sched_setattr sched_setparam sched_setscheduler ioprio_set setrlimit prlimit64
    mknod mknodat chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat
    setxattr lsetxattr fsetxattr setxattrat removexattr lremovexattr fremovexattr
    mount umount2 pivot_root chroot setns unshare open_tree move_mount fsopen fsconfig fsmount mount_setattr
    name_to_handle_at open_by_handle_at swapon swapoff reboot acct quotactl sethostname setdomainname
    init_module finit_module delete_module kexec_load kexec_file_load bpf perf_event_open userfaultfd
    keyctl add_key request_key io_uring_setup io_uring_enter io_uring_register memfd_create
    shmget semget msgget mq_open inotify_init inotify_init1 fanotify_init
    settimeofday clock_settime adjtimex clock_adjtime syslog iopl ioperm personality
""".split()

# Rights of Landlock, in the order of their bits.
_EXECUTE, _WRITE, _READ, _LIST = 1, 2, 4, 8
_REMOVE, _MAKE, _REFER, _TRUNCATE = 0b110000, 0b1_0001_1000_0000, 1 << 13, 1 << 14
_BY_VERSION = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}

# Layer 2: what the interpreter refuses, by the names of its audit events.
_FORBIDDEN = (
    "sqlite3.", "cpython.PyInterpreterState",
    "socket.", "subprocess.", "ctypes.", "os.system", "os.exec", "os.fork", "os.forkpty", "os.posix_spawn", "os.spawn",
    "os.startfile", "os.kill", "os.killpg", "pty.", "shutil.rmtree", "os.chmod", "os.chown", "os.setxattr",
    "os.putenv", "ftplib.", "smtplib.", "urllib.", "http.", "telnetlib.", "imaplib.", "nntplib.", "poplib.",
    "webbrowser.", "resource.setrlimit", "resource.prlimit", "signal.pthread_kill", "sys.addaudithook", "mmap.",
    "code.__new__", "syslog.", "fcntl.", "msvcrt.", "winreg.", "gc.get_objects", "gc.get_referrers",
    "gc.get_referents", "sys._current_frames", "sys.settrace", "sys.setprofile",
)  # fmt: skip
_LISTING = ("os.listdir", "os.scandir")
_CHANGING = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.utime", "os.chdir",
    "shutil.copyfile", "shutil.move",
)  # fmt: skip
_BLOCKED = (
    "ctypes", "_ctypes", "socket", "_socket", "subprocess", "_posixsubprocess", "multiprocessing", "_multiprocessing",
    "cffi", "_cffi_backend",
    # Interpreters of their own have no audit hook, and databases open their files without one.
    "interpreters", "_interpreters", "_xxsubinterpreters", "_interpchannels", "_xxinterpchannels", "_interpqueues",
    "_testcapi", "_testinternalcapi", "sqlite3", "_sqlite3", "dbm", "_dbm", "_gdbm",
)  # fmt: skip
# Functions without an audit event that reach beyond the process or its files.
_REMOVED = (
    "mkfifo", "mknod", "pidfd_open", "pidfd_send_signal", "setpriority", "sched_setaffinity", "sched_setparam",
    "sched_setscheduler", "setns", "unshare", "memfd_create", "chroot", "fchdir", "nice",
)  # fmt: skip


def limit(seconds: float, memory: int) -> None:
    """Limit processor time, memory, sizes of files, descriptors and processes."""
    import resource

    for what, value in (
        (resource.RLIMIT_CPU, int(seconds) + 1),
        (resource.RLIMIT_AS, memory),
        (resource.RLIMIT_FSIZE, 1 << 20),
        (resource.RLIMIT_NOFILE, 64),
        (resource.RLIMIT_CORE, 0),
        (resource.RLIMIT_NPROC, 1),
    ):
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(what, (value, value))


def libraries() -> list[str]:
    """Folders of the interpreter, which the program may read."""
    found = [path for path in sys.path if path] + [sys.prefix, sys.base_prefix]
    return [os.path.realpath(path) for path in found]


def apart(system: Any) -> None:
    """A user and a network namespace of its own: no interface but a loopback that is down."""
    system.unshare(0x10000000 | 0x40000000)


def landlock(system: Any, folder: str) -> None:
    """Only the folder can be changed, only it and the interpreter be read, through whatever path or descriptor."""
    import ctypes

    create, add, restrict = 444, 445, 446  # the same numbers on all architectures
    version = system.syscall(create, None, ctypes.c_size_t(0), ctypes.c_uint32(1))
    if version < 1:
        return
    handled = _BY_VERSION[max(known for known in _BY_VERSION if known <= version)]
    attributes = (ctypes.c_uint64 * 3)(handled, 3 if version >= 4 else 0, 3 if version >= 6 else 0)
    size = 24 if version >= 6 else 16 if version >= 4 else 8
    rules = system.syscall(create, attributes, ctypes.c_size_t(size), ctypes.c_uint32(0))
    if rules < 0:
        return
    reading = _EXECUTE | _READ | _LIST
    wanted = dict.fromkeys(("/lib", "/lib64", "/usr/lib", "/usr/lib64", _ZONES), reading)
    wanted |= dict.fromkeys(libraries(), reading)
    wanted[folder] = reading & ~_EXECUTE | _WRITE | _REMOVE | _MAKE | _REFER | _TRUNCATE
    wanted |= dict.fromkeys(("/dev/null", "/dev/urandom", "/etc/ld.so.cache", "/etc/localtime"), _READ)
    for path, rights in wanted.items():
        try:
            where = os.open(path, os.O_PATH | os.O_CLOEXEC)
        except OSError:
            continue
        kept = rights & handled
        rule = kept.to_bytes(8, sys.byteorder) + where.to_bytes(4, sys.byteorder)
        system.syscall(add, ctypes.c_int(rules), ctypes.c_int(1), ctypes.c_char_p(rule), ctypes.c_uint32(0))
        os.close(where)
    system.prctl(38, 1, 0, 0, 0)  # no new privileges, which the kernel asks for
    system.syscall(restrict, ctypes.c_int(rules), ctypes.c_uint32(0))
    os.close(rules)


def seccomp(system: Any) -> None:
    """The kernel refuses the calls above, with the error that the caller would get without the right to them."""
    import ctypes

    library = ctypes.CDLL("libseccomp.so.2")
    library.seccomp_init.restype = ctypes.c_void_p
    allow, refuse, errno = 0x7FFF0000, 0x00050000, 1
    rules = ctypes.c_void_p(library.seccomp_init(ctypes.c_uint32(allow)))
    for name in _SYSTEM_CALLS:
        number = library.seccomp_syscall_resolve_name(name.encode())
        if number >= 0:
            library.seccomp_rule_add(rules, ctypes.c_uint32(refuse | errno), ctypes.c_int(number), ctypes.c_uint(0))
    library.seccomp_load(rules)
    library.seccomp_release(rules)


def confine(folder: str) -> None:
    """The layers of the system, each where the system has it."""
    try:
        import ctypes

        system = ctypes.CDLL(None, use_errno=True)
    except Exception:
        return
    layers: tuple[Callable[[], None], ...] = (
        lambda: apart(system),
        lambda: landlock(system, folder),
        lambda: seccomp(system),
    )
    for layer in layers:
        with contextlib.suppress(Exception):
            layer()
    # Its classes stay, and through them what they are made with, which would write anywhere in memory unseen.
    for name in [name for name in sys.modules if name.partition(".")[0] in ("ctypes", "_ctypes")]:
        vars(sys.modules.pop(name)).clear()


def guard(folder: str) -> Callable[[str, tuple[Any, ...]], None]:
    """An audit hook that refuses what reaches beyond the folder."""
    real, refuse, remaining = os.path.realpath, PermissionError, [_CHANGES]
    roots = tuple(each + "/" for each in (*libraries(), _ZONES))
    decode, is_folder, base = os.fsdecode, os.path.isdir, os.path.basename
    # This module's names are seen, and changed, from the frames of a program.
    forbidden, blocked, listing, changing = _FORBIDDEN, _BLOCKED, _LISTING, _CHANGING
    text, raw, number, shown, are, each_of = str, bytes, int, repr, isinstance, all
    more = f"not allowed here: more than {_CHANGES} changes to files"
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND

    def inside(path: Any) -> bool:
        return are(path, number) or (real(decode(path)) + "/").startswith(folder + "/")

    def known(path: Any) -> bool:
        return (real(decode(path)) + "/").startswith(roots)

    def change() -> None:
        remaining[0] -= 1
        if remaining[0] < 0:
            raise refuse(more)

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(forbidden):
            raise refuse("not allowed here: " + event)
        if event == "import":
            name, file = text(arguments[0]), base(text(arguments[1] or "")).partition(".")[0]
            if name.partition(".")[0] in blocked or name.rpartition(".")[2] in blocked or file in blocked:
                raise refuse("not allowed here: import " + name)
        if event == "open":
            path, _, flags = arguments
            # A descriptor of a folder would lead out of it, through paths that this hook takes for others.
            if are(path, number) or is_folder(decode(path)):
                raise refuse("not allowed here: open a descriptor or a folder")
            if not inside(path) and ((flags or 0) & writing or not known(path)):
                raise refuse("not allowed here: open " + shown(path))
            if (flags or 0) & writing:
                change()
        if event in listing and not inside(arguments[0] or ".") and not known(arguments[0] or "."):
            raise refuse("not allowed here: " + event)
        if event.startswith(changing):
            if not each_of(inside(path) for path in arguments[:2] if are(path, (text, raw))):
                raise refuse("not allowed here: " + event)
            change()

    return hook


def main() -> None:
    """Shut this process in, run the program, and say that it came to its end."""
    seconds, memory, folder, program, where = sys.argv[1:]
    done, descriptor = sys.stdin.buffer.readline(), int(where)
    sys.argv = [program]
    with open(program, encoding="utf-8") as file:
        source = file.read()
    folder = os.path.realpath(folder)
    # Before the door closes: what errors are told with, and what text is read and written with.
    import encodings.ascii
    import encodings.idna
    import encodings.latin_1  # noqa: F401
    import linecache  # noqa: F401
    import signal
    import tokenize  # noqa: F401
    import traceback  # noqa: F401

    limit(float(seconds), int(memory))
    confine(folder)
    for module in [os, signal, *(sys.modules[name] for name in ("posix", "_signal") if name in sys.modules)]:
        for name in _REMOVED:
            if hasattr(module, name):
                delattr(module, name)
    sys.modules.pop("resource", None)
    code = compile(source, program, "exec", dont_inherit=True)  # or this file's own __future__ would hold for it
    flush, write = sys.stdout.flush, os.write
    sys.addaudithook(guard(folder))
    # Nothing of this module; and what a program does when it is called as one is not asked for.
    own = sys.modules["__main__"] = sys.modules["program"] = types.ModuleType("program")
    exec(code, own.__dict__)
    flush()
    write(descriptor, done)


if __name__ == "__main__":
    main()
