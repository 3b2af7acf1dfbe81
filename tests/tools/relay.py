"""Stands between a client and a server, at a port that it prints: whoever is in
between.

usage: relay.py HOST:PORT [STEP...]
  client:MATCH=TEXT	behind MATCH in what the client sends, in the same write, TEXT
			is slipped in, once a connection
  server:MATCH=TEXT	likewise in what the server sends
  pieces		what comes is passed on in pieces of 1, 2, 3... 7, 1... octets
  cut:N			the connection is closed behind the client's first N octets
			(and behind all there is, at the end of either side)
What was received is written to the files relay.client and relay.server.
"""
import socket
import sys
import threading

steps = [step.partition(":")[::2] for step in sys.argv[2:]]
pieces = any(verb == "pieces" for verb, _ in steps)
cut = next((int(text) for verb, text in steps if verb == "cut"), None)


def octets(text):
    return text.encode("latin-1").decode("unicode_escape").encode("latin-1")


def pump(who, source, target):
    injected = [tuple(map(octets, text.split("=", 1))) for verb, text in steps if verb == who]
    seen = b""
    size = 0
    try:
        while data := source.recv(65536):
            with open("relay." + who, "ab") as record:
                record.write(data)
            if who == "client" and cut is not None:
                data = data[:max(cut - len(seen), 0)]
            before = len(seen)
            seen += data
            for match, text in list(injected):
                at = seen.find(match)
                if at >= 0:
                    at += len(match) - before
                    data = data[:at] + text + data[at:]
                    injected.remove((match, text))
            while data:
                size = size % 7 + 1 if pieces else len(data)
                target.sendall(data[:size])
                data = data[size:]
            if who == "client" and cut is not None and len(seen) >= cut:
                source.shutdown(socket.SHUT_RDWR)
                break
        target.shutdown(socket.SHUT_WR)
    except OSError:
        # To close it would not do while the other thread reads there.
        for end in source, target:
            try:
                end.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass


host, _, port = sys.argv[1].rpartition(":")
listener = socket.create_server(("127.0.0.1", 0))
for name in "relay.client", "relay.server":
    open(name, "wb").close()
print(listener.getsockname()[1], flush=True)
while True:
    here, _ = listener.accept()
    there = socket.create_connection((host, int(port)))
    for end in here, there:
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    threading.Thread(target=pump, args=("client", here, there), daemon=True).start()
    threading.Thread(target=pump, args=("server", there, here), daemon=True).start()
