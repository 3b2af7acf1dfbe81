"""flight.py HOST:PORT TIMES - a relay that keeps the client's first flight (all that
it sends before the server has answered), and sends it again TIMES times, each on a
connection of its own.  Prints its port, and at the end the octets of the flight."""
import select
import socket
import sys

host, port = sys.argv[1].rsplit(':', 1)
server_address = (host, int(port))
listener = socket.create_server(('127.0.0.1', 0))
print(listener.getsockname()[1], flush=True)
client, _ = listener.accept()
server = socket.create_connection(server_address)
flight, answered, ended = b'', False, False
while not ended:
    for ready in select.select([client, server], [], [])[0]:
        octets = ready.recv(65536)
        ended = ended or not octets
        answered = answered or ready is server
        if ready is client and not answered:
            flight += octets
        (server if ready is client else client).sendall(octets)
client.close()
server.close()
for _ in range(int(sys.argv[2])):
    again = socket.create_connection(server_address)
    again.sendall(flight)
    again.shutdown(socket.SHUT_WR)
    try:
        while again.recv(65536):
            pass
    except ConnectionError:
        pass
    again.close()
print(len(flight), flush=True)
