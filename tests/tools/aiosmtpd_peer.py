"""aiosmtpd, as it comes ("no") or taught the verb BSMTP ("yes"); prints its port.
It refuses the recipient no@example.net."""
import asyncio
import sys

from aiosmtpd.smtp import SMTP


class Handler:
    async def handle_RCPT(self, server, session, envelope, address, options):
        if address == "no@example.net":
            return "550 5.1.1 no such user"
        envelope.rcpt_tos.append(address)
        return "250 2.1.5 ok"

    async def handle_DATA(self, server, session, envelope):
        return "250 2.0.0 taken"


class Taught(SMTP):
    async def smtp_BSMTP(self, arg):
        await self.smtp_EHLO(arg)


async def main():
    kind = Taught if sys.argv[1] == "yes" else SMTP
    server = await asyncio.get_running_loop().create_server(
        lambda: kind(Handler(), hostname="test.example"), "127.0.0.1", 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


asyncio.run(main())
