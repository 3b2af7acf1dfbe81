"""Kills a listener.

usage: store_kill.py at PID CLIENT FILE SIZE
           as soon as FILE has SIZE octets, or CLIENT has ended
       store_kill.py torn SIZE CMD...
           becomes CMD, for which no file may have more than SIZE octets, and which is
           killed when it would cut off what it wrote in vain
"""
import ctypes
import os
import platform
import resource
import signal
import struct
import sys


def ended(pid):
    try:
        with open("/proc/%d/stat" % pid, encoding="ascii") as f:
            return f.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:                     # and has been waited for
        return True


def at(pid, client, path, size):
    while os.stat(path).st_size < int(size) and not ended(int(client)):
        pass
    os.kill(int(pid), signal.SIGKILL)


def torn(size, *command):
    """A seccomp filter: ftruncate(2) is SIGSYS, as a signal that cannot be blocked."""
    ftruncate = {"x86_64": 77, "aarch64": 46}[platform.machine()]
    code = [(0x20, 0, 0, 0),                            # load the number of the call
            (0x15, 0, 1, ftruncate),                    # is it that?
            (0x06, 0, 0, 0x80000000),                   # SECCOMP_RET_KILL_PROCESS
            (0x06, 0, 0, 0x7fff0000)]                   # SECCOMP_RET_ALLOW
    filters = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *row) for row in code))

    class Program(ctypes.Structure):
        _fields_ = [("count", ctypes.c_ushort), ("filters", ctypes.c_void_p)]

    program = Program(len(code), ctypes.addressof(filters))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), int(size)))
    prctl = ctypes.CDLL(None, use_errno=True).prctl
    assert prctl(38, 1, 0, 0, 0) == 0                   # PR_SET_NO_NEW_PRIVS
    assert prctl(22, 2, ctypes.byref(program), 0, 0) == 0       # PR_SET_SECCOMP, a filter
    os.execv(command[0], command)


{"at": at, "torn": torn}[sys.argv[1]](*sys.argv[2:])
