"""What the stores of the listener hold, read by other means than its own.

usage: store_check.py hard SCALE OUT       hand-made hard cases as the mbox OUT, and what
                                           they are in OUT.json; in percent, how large
                                           the large ones are
       store_check.py real N TO OUT FILE...
                                           N messages made of the FILEs, no two alike and
                                           none of over 300 N octets
       store_check.py numbered N OUT [LINES]
                                           N messages, some of them large, or of so many
                                           lines
       store_check.py same WANT STORE...   each STORE holds the messages of WANT (an
                                           OUT.json) to the octet, with their envelopes
       store_check.py whole WANT STORE [IDS]
                                           each message of STORE is one of WANT's and
                                           whole; those whose ids the file IDS lists,
                                           twice if it lists them twice, are there
       store_check.py dump STORE           what a STORE holds, an array a line

STORE is mbox:FILE, batch:FILE, maildir:DIR or eml:DIR; :N behind it says through
how many stores that put trace headers in front the messages went before, :N- that
this many are meant at most.  Prints how many messages there are.
"""
import collections
import glob
import json
import mailbox
import os
import random
import re
import sys

TRACE = re.compile(rb"Return-Path: <(.*)>\n((?:Delivered-To: .*\n)*)"
                   rb"Received: from .*\n\tby \S+ with \S+ id (\S+);\n\t.* \+0000\n")
FROM_LINE = re.compile(rb"From (.+) (?:Mon|Tue|Wed|Thu|Fri|Sat|Sun) (?:Jan|Feb|Mar|Apr|May|Jun|Jul"
                       rb"|Aug|Sep|Oct|Nov|Dec) [ 0-9]\d \d\d:\d\d:\d\d \d{4}\n")
ID = re.compile(rb"^Message-ID: (.*)$", re.I | re.M)


def normal(octets):
    """As a store that ends lines in LF holds what was sent."""
    octets = re.sub(rb"\r(?!\n)", b" ", octets).replace(b"\r\n", b"\n")
    return octets if octets.endswith(b"\n") or not octets else octets + b"\n"


# --- Stores; each message is (sender, [recipients], content with LF)

def read_batch(path):
    """RFC 2442, strictly: no line end but CRLF, no lone dot but at an end."""
    with open(path, "rb") as f:
        octets = f.read()
    assert re.fullmatch(rb"(?:[^\r\n]*\r\n)*", octets), "a bare CR or LF, or no end"
    sender, lines = None, iter(octets.split(b"\r\n")[:-1])
    for number, line in enumerate(lines, 1):
        if line == b"QUIT" or line.startswith(b"EHLO "):
            assert sender is None, (number, "in a transaction", line)
            assert number > 1 or line != b"QUIT"
        elif match := re.fullmatch(rb"MAIL FROM:<(.*?)>(?: [A-Z0-9-]+(?:=\S+)?)*", line):
            assert sender is None, (number, "MAIL in a transaction")
            sender, recipients = match.group(1), []
        elif match := re.fullmatch(rb"RCPT TO:<(.*?)>(?: [A-Z0-9-]+(?:=\S+)?)*", line):
            assert sender is not None
            recipients.append(match.group(1))
        else:
            assert line == b"DATA" and sender is not None and recipients, (number, line)
            content = []
            for text in lines:
                if text == b".":
                    break
                assert not text.startswith(b".") or text.startswith(b".."), text
                content.append(text[1:] if text.startswith(b".") else text)
            else:
                raise AssertionError("the file ends inside a message")
            yield sender, recipients, b"".join(line + b"\n" for line in content)
            sender = None
    assert sender is None, "the file ends inside a transaction"


def read_mbox(path):
    """As Python's mailbox has it; the quoting undone as mboxrd wants."""
    with open(path, "rb") as f:
        octets = f.read()
    if not octets:
        return
    assert octets.startswith(b"From ") and octets.endswith(b"\n\n"), octets[-100:]
    box = mailbox.mbox(path, create=False)
    for key in box.iterkeys():
        whole = box.get_bytes(key, from_=True)
        match = FROM_LINE.match(whole)
        assert match, whole[:200]
        yield match.group(1), re.sub(rb"^>(>*From )", rb"\1", whole[match.end():], flags=re.M)


def read_files(pattern):
    for path in sorted(glob.glob(pattern)):
        with open(path, "rb") as f:
            yield path, f.read()


def strip_trace(octets):
    match = TRACE.match(octets)
    assert match, ("no trace header", octets[:300])
    recipients = re.findall(rb"^Delivered-To: (.*)$", match.group(2), re.M)
    return match.group(1), recipients, octets[match.end():]


def read(store):
    kind, path, *deep = store.split(":")
    most = bool(deep) and deep[0].endswith("-")
    deep = int(deep[0].rstrip("-")) if deep else 0
    for sender, recipients, octets in {"batch": read_batch, "mbox": traced_mbox,
                                       "maildir": traced_maildir, "eml": read_eml}[kind](path):
        for _ in range(deep):
            if not most or TRACE.match(octets):
                _, _, octets = strip_trace(octets)
        yield sender, recipients, octets


def traced_mbox(path):
    for from_line, octets in read_mbox(path):
        sender, recipients, content = strip_trace(octets)
        assert from_line == (sender or b"MAILER-DAEMON"), (from_line, sender)
        yield sender, recipients, content


def traced_maildir(path):
    assert not os.listdir(path + "/tmp"), "something left in tmp"
    for name, octets in read_files(path + "/new/*"):
        match = TRACE.match(octets)
        assert match and match.group(3).decode() == os.path.basename(name), (name, octets[:200])
        yield strip_trace(octets)


def read_eml(path):
    names = set(os.listdir(path)) - {"bsmtp.journal"}
    for name, octets in read_files(path + "/*.eml"):
        assert re.fullmatch(rb"(?:[^\r\n]*\r\n)*", octets), name
        with open(name[:-3] + "json", encoding="utf-8") as f:
            about = json.load(f)
        assert set(about) == {"from", "to", "peer", "helo", "protocol", "octets"}, about
        assert about["octets"] == len(octets), (name, about)
        names -= {os.path.basename(name), os.path.basename(name)[:-3] + "json"}
        yield (about["from"].encode(), [to.encode() for to in about["to"]],
               octets.replace(b"\r\n", b"\n"))
    assert not names, names


# --- What is sent

class Maker:
    """An mbox, with what its messages are to become beside it."""

    def __init__(self, path):
        self.path, self.what = path, []
        self.box = open(path, "wb")

    def add(self, sender, recipients, octets):
        self.box.write(b"From " + (sender or b"MAILER-DAEMON") + b" Mon Nov 23 12:00:00 2026\n")
        text = octets if octets.endswith(b"\n") else octets + b"\n"
        self.box.write(re.sub(rb"^(>*From )", rb">\1", text, flags=re.M) + b"\n")
        self.what.append([sender.decode(), [to.decode() for to in recipients],
                          normal(octets).decode("latin-1")])

    def close(self):
        self.box.close()
        with open(self.path + ".json", "w", encoding="utf-8") as f:
            json.dump(self.what, f)
        print(len(self.what))


def load(path):
    with open(path, encoding="utf-8") as f:
        return [(sender.encode(), [to.encode() for to in recipients], content.encode("latin-1"))
                for sender, recipients, content in json.load(f)]


BODIES = [
    b"plain\n",
    b".\n..\n...\n.x\n. \n.\r\n \n.",
    b"From me\n>From you\n>>From them\n>>>>>>>>From afar\nfrom low\n From in\nFrom\nFrom\ttab\n",
    b"text\n\nFrom a@x.example Mon Nov 23 12:00:00 2026\nSubject: not a message\n\ntext\n",
    b">\n>From\n> From \n>>\n>From \nFrom ",
    b"From ",
    b"F\nFr\nFro\nFrom\n>F\n>Fr\n>Fro\n>From",
    b"\n\n\n",
    b"text\n\n\n\n",
    b"",
    b"no end",
    b"\0\x01\x1a\x7f\x80\xfe\xff binary\n\xe2\x82\xac\n\0\n",
    b" leading\n\ttab\ntrailing \t \n \n\t\n",
    b"crlf\r\n.\r\nFrom crlf\r\n\r\n",
    b"QUIT\nRSET\nMAIL FROM:<evil@example.org>\nRCPT TO:<evil@example.org>\nDATA\nx\n.\nEHLO x\n",
    b"x" * 998 + b"\n",
    b"Return-Path: <not@it.example>\nDelivered-To: nor@this.example\nReceived: from x\n\tby y;\n",
]
SENDERS = [b"a@example.org", b"", b'"a b"@example.org', b"o'hara+tag=x@example.org",
           b'"quo\\"te\\\\"@example.org', "grün@bücher.example".encode(), b"a@[192.0.2.1]",
           b'"Mon Nov 23 12:00:00 2026"@example.org', b"x" * 64 + b"@example.org"]
RECIPIENTS = [[b"b@example.net"], [b'"a b"@example.net', b"c@example.net"],
              [b"-leading@example.net"], ["grün@bücher.example".encode()],
              [b'"$(touch pwned)"@example.net', b'"a\\"b\\\\c"@example.net', b"b@[192.0.2.1]"],
              [b"r%d@example.net" % n for n in range(60)]]


def hard(scale, out):
    maker, scale = Maker(out), int(scale)
    large = [b"y" * 1000 * scale + b"\n", b"From big\n" * 90 * scale,
             b"\n".join(b".%d" % n for n in range(30 * scale)) + b"\n"]
    for n, body in enumerate(BODIES + large):
        sender, recipients = SENDERS[n % len(SENDERS)], RECIPIENTS[n % len(RECIPIENTS)]
        maker.add(sender, recipients,
                  b"To: " + b",\n\t".join(recipients) + b"\nSubject: number %d\n\n" % n + body)
    # Headers alone, and fields that stores put in front of others.
    for head in (b"", b"\n", b"Received: from x\n\tby y\n", b"Delivered-To: x@example.net\n",
                 b"Return-Path: <x@example.net>\n\nDelivered-To: y\n"):
        maker.add(b"a@example.org", [b"b@example.net"], b"To: b@example.net\n" + head)
    maker.add(b"a@example.org", [b"b@example.net"], b"Delivered-To: x\nTo: b@example.net\n\nx\n")
    maker.close()


def real(count, to, out, *files):
    """Mail as it is found; the header that is put in front makes each its own."""
    maker, texts = Maker(out), []
    for file in files:
        if file.endswith(".mbox"):
            texts += [octets for _, octets in read_patches(file)]
        else:
            with open(file, "rb") as f:
                texts.append(f.read())
    texts = [text for text in texts if len(text) <= 300 * int(count)]
    pick = random.Random(2442)
    for n in range(int(count)):
        text = texts[n % len(texts)]
        if n >= len(texts):             # again, and now otherwise
            lines = text.splitlines(keepends=True)
            at = pick.randrange(len(lines) + 1)
            lines[at:at] = [pick.choice([b"From here\n", b".\n", b"..\n", b">From there\n", b"\n",
                                         b"\r\n", b"%d\n" % n, "Grüße\n".encode()])]
            text = b"".join(lines)
        maker.add(b"a%d@example.org" % n, to.encode().split(b","), b"X-Number: %d\n" % n + text)
    maker.close()


def read_patches(path):
    box = mailbox.mbox(path, create=False)
    return [(None, box.get_bytes(key)) for key in box.iterkeys()]


def numbered(count, out, all_lines=None):
    maker, pick, count = Maker(out), random.Random(4155), int(count)
    large = min(2000, 5 * count)
    for n in range(count):
        lines = int(all_lines or pick.choice([1, 3, 10, 40] * 12 + [large // 5, large]))
        maker.add(b"a@example.org", [b"b@example.net"],
                  b"To: b@example.net\nMessage-ID: <%d@example.org>\n\n" % n
                  + b"".join(b"line %d of %d in message %d, which ends at the last.\n.\nFrom %d\n"
                             % (k, lines, n, k) for k in range(lines)) + b"the end\n")
    maker.close()


# --- What is there

def shown(message):
    return "%r %r %d octets: %r" % (*message[:2], len(message[2]), message[2][:300])


def same(want, *stores):
    want = sorted(load(want))
    for store in stores:
        got = sorted(read(store))
        for a, b in zip(want, got):
            assert a == b, "%s\nwanted: %s\ngot: %s" % (store, shown(a), shown(b))
        assert len(want) == len(got), (store, len(want), len(got))
    print(len(want))


def whole(want, store, ids=None):
    known = {ID.search(message[2]).group(1): message for message in load(want)}
    there = collections.Counter()
    for message in read(store):
        found = ID.search(message[2])
        assert found and message == known[found.group(1)], "torn: " + shown(message)
        there[found.group(1)] += 1
    if ids:
        with open(ids, "rb") as f:
            lost = collections.Counter(f.read().split()) - there
        assert not lost, ("lost", lost)
    print(sum(there.values()))


def dump(store):
    for sender, recipients, content in read(store):
        print(json.dumps([sender.decode(), [to.decode() for to in recipients],
                          content.decode("latin-1")]))


if __name__ == "__main__":
    {"hard": hard, "real": real, "numbered": numbered, "same": same, "whole": whole,
     "dump": dump}[sys.argv[1]](*sys.argv[2:])
