"""A dialogue in one write.

usage: store_talk.py ADDRESS LINE...
       store_talk.py --stdio CMD LINE...        CMD's standard input and output are a socket

Prints the replies.  Backslashes are understood.
"""
import socket
import subprocess
import sys

where, *lines = sys.argv[1:]
if where == "--stdio":
    ours, theirs = socket.socketpair()
    command = subprocess.Popen(lines.pop(0), shell=True, stdin=theirs, stdout=theirs)
    theirs.close()
else:
    host, port = where.rsplit(":", 1)
    ours, command = socket.create_connection((host, int(port))), None
ours.settimeout(60)
ours.sendall("".join(lines).encode("latin-1").decode("unicode_escape").encode("latin-1"))
ours.shutdown(socket.SHUT_WR)
while data := ours.recv(65536):
    sys.stdout.write(data.decode("latin-1").replace("\r", ""))
sys.exit(command.wait() if command else 0)
