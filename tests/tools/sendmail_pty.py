"""Runs a command on a pseudo-terminal and copies what it prints.

usage: sendmail_pty.py [STEP...] -- COMMAND ARGUMENT...

The steps:  wait:TEXT  wait until TEXT was printed behind the last such place
            type:KEYS  type them; \\t \\n are understood
Exits as the command does.
"""
import os
import pty
import select
import sys
import time

at = sys.argv.index("--")
pid, fd = pty.fork()
if pid == 0:
    os.execvp(sys.argv[at + 1], sys.argv[at + 1:])
printed = b""
passed = 0
end = time.monotonic() + 30


def receive():
    """Something more was printed; False at the end."""
    global printed
    if not select.select([fd], [], [], max(0, end - time.monotonic()))[0]:
        sys.exit(f"nothing more behind {printed!r}")
    try:
        data = os.read(fd, 65536)
    except OSError:     # the command has gone
        data = b""
    printed += data
    sys.stdout.buffer.write(data)
    return bool(data)


try:
    for step in sys.argv[1:at]:
        verb, _, text = step.partition(":")
        octets = text.replace("\\t", "\t").replace("\\n", "\n").encode()
        if verb == "type":
            os.write(fd, octets)
            continue
        while printed.find(octets, passed) < 0:
            if not receive():
                sys.exit(f"never: {text!r} in {printed!r}")
        passed = printed.find(octets, passed) + len(octets)
    while receive():
        pass
finally:
    sys.stdout.flush()
    os.close(fd)        # which ends the command, if it goes on
    status = os.waitpid(pid, 0)[1]
sys.exit(os.waitstatus_to_exitcode(status))
