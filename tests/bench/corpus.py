"""Real-looking mail from a seeded generator: the same octets in every run."""
import base64
import random

HEAD = "From %s Mon Nov 23 12:00:00 2026\n"
SENDER, RECIPIENT = "a@example.org", "b@example.net"
POOL = 8 << 20          # distinct octets; more than a cache holds, repeated from there
WORDS = ("the of to and a in that is it was for on with as his they be at one have this from "
         "had not word but what some we can out other were all there when up use your how said "
         "an each she which their time will way about many then them would like so these her long "
         "make thing see him two has look more day could go come did number sound no most people "
         "message server receive connection größer naïve Grüße schedule tomorrow meeting attached").split()


class Corpus:
    """Messages of about so many octets each, and what they come to on the wire."""

    def __init__(self, size, seed=5):
        rng = random.Random(seed * 1000003 + size)
        lines = [line_of_text(rng) for _ in range(5000)]
        coded = [base64.b64encode(rng.randbytes(57)).decode() for _ in range(5000)]
        self.size = size
        self.messages = [message(rng, size, n, lines, coded)
                         for n in range(max(16, POOL // size))]

    def take(self, count):
        for n in range(count):
            yield self.messages[n % len(self.messages)]

    def write_mbox(self, path, count):
        """Writes so many messages; returns their octets on the wire, commands and all."""
        blocks = [HEAD.encode() % SENDER.encode() + quote(m) + b"\n" for m in self.messages]
        pool = b"".join(blocks)
        with open(path, "wb") as f:
            for _ in range(count // len(blocks)):
                f.write(pool)
            f.write(b"".join(blocks[:count % len(blocks)]))
        return self.octets(count)

    def octets(self, count):
        each = [wire_octets(m) for m in self.messages]
        return sum(each) * (count // len(each)) + sum(each[:count % len(each)])


def wire_octets(body):
    size = len(body) + body.count(b"\n")
    return size + len("MAIL FROM:<%s> BODY=8BITMIME\r\nRCPT TO:<%s>\r\nBDAT %d LAST\r\n"
                      % (SENDER, RECIPIENT, size))


def quote(body):
    """As an mbox has it (mboxrd)."""
    return b"\n".join(b">" + line if line.lstrip(b">").startswith(b"From ") else line
                      for line in body.split(b"\n"))


def line_of_text(rng):
    width, line = rng.choice((30, 60, 66, 72, 72, 72, 76)), ""
    while len(line) < width:
        line += rng.choice(WORDS) + rng.choice((" ", " ", " ", " ", ", ", ". "))
    return rng.choices(("", "> ", ">> ", ".", "..", "From ", ">From ", "\t"),
                       (860, 80, 20, 8, 4, 6, 2, 20))[0] + line.rstrip()


def header(rng, n, kind):
    ident = "%s.%d@example.org" % (rng.randbytes(8).hex(), n)
    return [
        "Received: from mx%d.example.net (mx%d.example.net [192.0.2.%d])" % (n % 7, n % 7, n % 250),
        "\tby mail.example.org with ESMTPS id %s" % rng.randbytes(6).hex(),
        "\tfor <%s>; Mon, 23 Nov 2026 12:%02d:%02d +0000" % (RECIPIENT, n // 60 % 60, n % 60),
        "DKIM-Signature: v=1; a=rsa-sha256; c=relaxed/relaxed; d=example.org; s=mail;",
        "\th=From:To:Subject:Date:Message-ID; bh=%s;" % base64.b64encode(rng.randbytes(32)).decode(),
        "\tb=%s" % base64.b64encode(rng.randbytes(48)).decode(),
        "From: Alice Example <%s>" % SENDER,
        "To: Bob Example <%s>" % RECIPIENT,
        "Subject: Re: %s" % " ".join(rng.choices(WORDS[:40], k=rng.randint(2, 7))),
        "Date: Mon, 23 Nov 2026 12:%02d:%02d +0000" % (n // 60 % 60, n % 60),
        "Message-ID: <%s>" % ident,
        "MIME-Version: 1.0",
        kind, ""]


def message(rng, size, n, lines, coded):
    """A header, paragraphs, and base64 behind them in large messages and some others."""
    attached = size >= 32 << 10 or n % 8 == 0
    boundary = "=_%s" % rng.randbytes(8).hex()
    text_type = "Content-Type: text/plain; charset=utf-8"
    out = header(rng, n, "Content-Type: multipart/mixed; boundary=\"%s\"" % boundary
                 if attached else text_type)
    if attached:
        out += ["--" + boundary, text_type, ""]
    left = size - sum(len(s.encode()) + 1 for s in out)
    text_end = left * 3 // 4 if attached else 0
    while left > text_end:
        line = "" if rng.random() < 0.12 else rng.choice(lines)
        out.append(line)
        left -= len(line.encode()) + 1
    if attached:
        out += ["--" + boundary, "Content-Type: application/octet-stream",
                "Content-Transfer-Encoding: base64", ""]
        left -= sum(len(s) + 1 for s in out[-4:]) + len(boundary) + 5
        out += rng.choices(coded, k=max(1, left // 77)) + ["--%s--" % boundary]
    return ("\n".join(out) + "\n").encode()
