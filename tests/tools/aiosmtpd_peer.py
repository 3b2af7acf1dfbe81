"""aiosmtpd, as it comes ("no") or taught the verb BSMTP ("yes"); prints its port.

It keeps what it takes in a folder, N.eml with the envelope in N.json.  Of the
domain example.net it refuses the recipient no and puts off the recipient later;
it takes no message with the subject "forbidden".
"""
import asyncio
import json
import sys

from aiosmtpd.smtp import SMTP


class Handler:
    def __init__(self, folder):
        self.folder, self.count = folder, 0

    async def handle_RCPT(self, server, session, envelope, address, options):
        if address == "no@example.net":
            return "550 5.1.1 no such user"
        if address == "later@example.net":
            return "450 4.2.1 later"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, server, session, envelope):
        if b"\nSubject: forbidden\r\n" in envelope.content:
            return "554 5.7.1 no such subjects"
        self.count += 1
        name = "%s/%06d." % (self.folder, self.count)
        with open(name + "eml", "wb") as f:
            f.write(envelope.content)
        with open(name + "json", "w", encoding="utf-8") as f:
            json.dump({"from": envelope.mail_from, "to": envelope.rcpt_tos}, f)
        return "250 2.0.0 taken"


class Taught(SMTP):
    async def smtp_BSMTP(self, arg):
        await self.smtp_EHLO(arg)


async def main():
    kind = Taught if sys.argv[1] == "yes" else SMTP
    handler = Handler(sys.argv[2])
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(handler, hostname="test.example"), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
