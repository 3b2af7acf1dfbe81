"""A server that misbehaves, for what no real one does.

usage: peer.py STEP...

Prints its port, takes one connection and plays the steps:
  recv            wait for octets         recv:TEXT  wait until TEXT was received
  send:TEXT       send it; \\r \\n are understood
  flood:TEXT      send it again and again until the peer goes
  big:N           send N octets of "a"
  close, reset    end the connection      eof        read to the peer's end
  tls:FILE        TLS from here on, with the certificate and key in FILE
  notified        read to the end of TLS, and write to the file "notified" whether the
                  peer said that it is the end
What was received is written to the file "received" at the end.
"""
import socket
import ssl
import struct
import sys

listener = socket.socket()
listener.bind(("127.0.0.1", 0))
listener.listen(1)
print(listener.getsockname()[1], flush=True)
peer, _ = listener.accept()
peer.settimeout(60)
received = b""


def receive():
    global received
    data = peer.recv(65536)
    received += data
    return bool(data)


try:
    for step in sys.argv[1:]:
        verb, _, text = step.partition(":")
        octets = text.replace("\\r", "\r").replace("\\n", "\n").encode()
        if verb == "recv":
            receive()
            while octets not in received and receive():
                pass
        elif verb == "send":
            peer.sendall(octets)
        elif verb == "flood":
            while True:
                peer.sendall(octets * 1000)
        elif verb == "big":
            for _ in range(int(text) // 100000):
                peer.sendall(b"a" * 100000)
        elif verb == "reset":
            peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            peer.close()
            break
        elif verb == "close":
            break
        elif verb == "tls":
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(text)
            peer = context.wrap_socket(peer, server_side=True, suppress_ragged_eofs=False)
        elif verb == "notified":
            try:
                while receive():
                    pass
                said = "yes"
            except ssl.SSLError:
                said = "no"
            with open("notified", "w") as f:
                f.write(said)
        elif verb == "eof":
            while receive():
                pass
        elif verb == "silent":
            try:
                while not receive():
                    pass
                listener.accept()
            except KeyboardInterrupt:
                pass
except OSError:
    pass
with open("received", "wb") as f:
    f.write(received)
