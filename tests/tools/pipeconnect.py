"""Stands before a listener, at a port that it prints, and adds the keyword
PIPECONNECT to its EHLO replies: to Exim that is leave to talk early.

usage: pipeconnect.py HOST:PORT
"""
import asyncio
import sys

OFFER = b"250-PIPELINING\r\n"


async def pump(read, writer):
    try:
        while data := await read():
            writer.write(b"250-PIPECONNECT\r\n" + data if data == OFFER else data)
            await writer.drain()
        writer.write_eof()
    except OSError:
        writer.close()


async def serve(reader, writer):
    host, _, port = sys.argv[1].rpartition(":")
    there_reader, there_writer = await asyncio.open_connection(host, int(port))
    await asyncio.gather(
        pump(lambda: reader.read(65536), there_writer),
        pump(there_reader.readline, writer))
    writer.close()
    there_writer.close()


async def main():
    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
