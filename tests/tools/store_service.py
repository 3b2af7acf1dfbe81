"""A service manager, as much of one as is needed.

usage: store_service.py activate ADDRESS-FILE FAMILY CMD...
           becomes CMD with a listening socket as descriptor 3; FAMILY is inet, several
           of them apart by commas, or unix:PATH
       store_service.py notified PATH OUT
           takes what is sent to the datagram socket PATH ("@NAME" is abstract), a line
           of OUT each, until STOPPING=1
"""
import os
import socket
import sys


def activate(file, families, *command):
    sockets = []
    for family in families.split(","):
        if family == "inet":
            s = socket.create_server(("127.0.0.1", 0))
        else:
            s = socket.socket(socket.AF_UNIX)
            s.bind(family.partition(":")[2])
            s.listen()
        sockets.append(s)
    with open(file, "w", encoding="utf-8") as f:
        for s in sockets:
            f.write("127.0.0.1:%d\n" % s.getsockname()[1] if s.family == socket.AF_INET
                    else "unix:%s\n" % s.getsockname())
    spare = [os.dup(s.fileno()) for s in sockets]       # none is where another has to be
    while min(spare) < 3 + len(sockets):
        spare = [os.dup(fd) for fd in spare]
    for n, fd in enumerate(spare):
        os.dup2(fd, 3 + n, inheritable=True)
    os.environ.update(LISTEN_FDS=str(len(sockets)), LISTEN_PID=str(os.getpid()))
    os.execvp(command[0], command)


def notified(path, out):
    s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
    s.bind("\0" + path[1:] if path.startswith("@") else path)
    with open(out, "w", encoding="utf-8", buffering=1) as f:
        said = ""
        while "STOPPING=1" not in said.split("\n"):
            said = s.recv(4096).decode()
            f.write(said + "\n")


{"activate": activate, "notified": notified}[sys.argv[1]](*sys.argv[2:])
