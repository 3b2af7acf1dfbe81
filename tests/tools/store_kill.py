"""Kills a listener while it appends.

usage: store_kill.py PID CLIENT FILE SIZE
           as soon as FILE has SIZE octets, or CLIENT has ended
       store_kill.py PID CLIENT FILE
           when the note FILE.tail says that more is being appended than FILE holds
           yet; prints where that begins, and fails where it was all there by then
"""
import os
import signal
import sys
import time


def torn(path):
    try:
        with open(path + ".tail", "rb") as f:
            begin, end = map(int, f.read().split()[:2])
        return begin if begin < os.stat(path).st_size < end else None
    except (OSError, ValueError):
        return None


def ended(pid):
    try:
        with open("/proc/%d/stat" % pid, encoding="ascii") as f:
            return f.read().rpartition(")")[2].split()[0] == "Z"
    except OSError:                     # and has been waited for
        return True


pid, client, path, *size = sys.argv[1:]
pid, client = int(pid), int(client)
while not ended(client):
    if os.stat(path).st_size >= int(size[0]) if size else torn(path) is not None:
        break
os.kill(pid, signal.SIGKILL)
while not ended(pid):                   # its last write may be under way
    time.sleep(0.001)
if not size:
    begin = torn(path)
    sys.exit(1) if begin is None else print(begin)
