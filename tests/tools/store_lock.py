"""Another mail program that appends to an mbox: it has the lock for as long as it likes.

usage: store_lock.py FILE HELD RELEASE [TEXT]

Locks FILE, makes the file HELD, waits until there is a file RELEASE; with TEXT it
appends the one half of it before and the other behind that (\\n is understood).
"""
import fcntl
import os
import sys
import time

path, held, release, *text = sys.argv[1:]
text = text[0].replace("\\n", "\n").encode() if text else b""
with open(path, "ab", buffering=0) as f:
    fcntl.lockf(f, fcntl.LOCK_EX)
    f.write(text[:len(text) // 2])
    with open(held, "w"):
        pass
    while not os.path.exists(release):
        time.sleep(0.01)
    f.write(text[len(text) // 2:])
