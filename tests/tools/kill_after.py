"""kill_after.py PID N - reads what send --json reports; when N messages are delivered,
kills PID, and reads to the end.  Fails if there were not so many."""
import json
import os
import signal
import sys

pid, left = int(sys.argv[1]), int(sys.argv[2])
for line in sys.stdin:
    event = json.loads(line)
    if event['event'] == 'message' and event['fate'] == 'delivered':
        left -= 1
        if left == 0:
            os.kill(pid, signal.SIGKILL)
sys.exit(left > 0)
